//! What the page asks for.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures_util::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::board::SeenJob;
use super::files::{FILES, PAGE, media_type};
use super::news::Marks;
use super::stored::{Question, StoredJob};
use super::timeline::Range;
use super::{App, MOST_PAGES, Told};

type Shared = State<Arc<App>>;

pub(super) fn routes(app: Arc<App>) -> Router {
    let file = |path: &str, text: &'static str| {
        let kind = [(header::CONTENT_TYPE, media_type(path))];
        get(move || std::future::ready((kind, text)))
    };
    let mut routes = Router::new().route("/", file("page.html", PAGE));
    for (path, text) in FILES {
        routes = routes.route(&format!("/{path}"), file(path, text));
    }
    routes
        .route("/events", get(follow))
        .route("/news", get(news))
        .route("/timeline", get(timeline))
        .route("/worker", get(worker))
        .route("/job", get(job))
        .route("/merges", get(merges))
        .route("/merge", get(merge))
        .route("/contributors", get(contributors))
        .with_state(app)
}

/// Tells a page how the fleet is, now and whenever that changes. Open pages are counted apart from short
/// requests, which are therefore never refused.
async fn follow(State(app): Shared) -> Response {
    match Arc::clone(&app.places).try_acquire_owned() {
        Ok(place) => events(app.told.subscribe(), place).into_response(),
        Err(_) => {
            let why = format!("{MOST_PAGES} pages are open already; close one\n");
            (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
        }
    }
}

fn events(
    mut told: watch::Receiver<Option<Told>>,
    place: OwnedSemaphorePermit,
) -> impl IntoResponse {
    told.mark_changed();
    let events = stream::unfold((told, place, None), async |(mut told, place, known)| {
        // The next is taken when the last has been sent: a slow reader skips some.
        told.changed().await.ok()?;
        let now = told.borrow_and_update().clone();
        let rev = now.as_ref().map(|now| now.names_rev).or(known);
        let events = now.into_iter().flat_map(move |now| now.events(known));
        Some((stream::iter(events), (told, place, rev)))
    });
    Sse::new(events.flatten()).keep_alive(KeepAlive::default())
}

impl Told {
    /// The names only if the page has older ones.
    fn events(self, known: Option<u64>) -> impl Iterator<Item = Result<Event, Infallible>> {
        let names = (known != Some(self.names_rev)).then_some(("fleet", self.names));
        let parts = names.into_iter().chain([("now", self.now)]);
        parts.map(|(kind, text)| Ok(Event::default().event(kind).data(&*text)))
    }
}

async fn news(State(app): Shared, Query(marks): Query<Marks>) -> Response {
    Json(app.board().news.after(marks)).into_response()
}

#[derive(Deserialize)]
struct Stretch {
    range: String,
    /// What the page has already.
    #[serde(default)]
    after: u64,
}

async fn timeline(State(app): Shared, Query(stretch): Query<Stretch>) -> Response {
    match stretch.range.parse::<Range>() {
        Ok(range) => Json(app.board().timeline.columns(range, stretch.after)).into_response(),
        Err(_) => missing("range is one of 10m, 1h, 8h and 1d"),
    }
}

#[derive(Deserialize)]
struct Named {
    id: String,
}

async fn worker(State(app): Shared, Query(named): Query<Named>) -> Response {
    match app.board().worker(&named.id) {
        Some(worker) => Json(worker).into_response(),
        None => missing("no such worker was seen since the dashboard started"),
    }
}

#[derive(Serialize)]
struct JobAnswer<'a> {
    id: &'a str,
    #[serde(flatten)]
    seen: SeenJob<'a>,
    #[serde(flatten)]
    stored: StoredJob,
}

async fn job(State(app): Shared, Query(named): Query<Named>) -> Response {
    let question: Question = app.board().question(&named.id);
    let stored = match &app.store {
        Some(store) => StoredJob::ask(store, &question).await,
        None => StoredJob::unknown("the fleet is simulated"),
    };
    let board = app.board();
    let answer = JobAnswer {
        id: &named.id,
        seen: board.job(&named.id),
        stored,
    };
    Json(answer).into_response()
}

async fn merges(State(app): Shared) -> Response {
    Json(app.board().merges()).into_response()
}

async fn merge(State(app): Shared, Query(named): Query<Named>) -> Response {
    match app.board().merge(&named.id) {
        Some(merge) => Json(merge).into_response(),
        None => {
            missing("it is not among the last merges that were seen since the dashboard started")
        }
    }
}

async fn contributors(State(app): Shared) -> Response {
    match app.board().contributors() {
        Some(table) => Json(table).into_response(),
        None => missing("start the dashboard with --contributors KEY"),
    }
}

fn missing(why: &str) -> Response {
    (StatusCode::NOT_FOUND, Json(json!({"error": why}))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::dashboard::board::Board;

    async fn body(response: Response) -> impl futures_util::Stream<Item = String> {
        let chunks = response.into_body().into_data_stream();
        chunks.map(|chunk| String::from_utf8(chunk.unwrap().to_vec()).unwrap())
    }

    fn told(names_rev: u64, now: &str) -> Option<Told> {
        Some(Told {
            names_rev,
            names: format!("names {names_rev}").into(),
            now: now.into(),
        })
    }

    #[tokio::test]
    async fn a_page_is_told_the_newest_at_once_and_names_when_they_change() {
        let app = Arc::new(App::new(Board::default(), None));
        app.told.send_replace(told(1, "old"));
        app.told.send_replace(told(1, "new"));
        let mut page = std::pin::pin!(body(follow(State(Arc::clone(&app))).await).await);
        assert_eq!(
            page.next().await.unwrap(),
            "event: fleet\ndata: names 1\n\n"
        );
        assert_eq!(page.next().await.unwrap(), "event: now\ndata: new\n\n");
        app.told.send_replace(told(1, "skipped"));
        app.told.send_replace(told(1, "newer"));
        assert_eq!(page.next().await.unwrap(), "event: now\ndata: newer\n\n");
        app.told.send_replace(told(2, "newest"));
        assert_eq!(
            page.next().await.unwrap(),
            "event: fleet\ndata: names 2\n\n"
        );
    }

    #[tokio::test]
    async fn the_last_place_is_free_again_when_its_page_is_closed() {
        let app = Arc::new(App::new(Board::default(), None));
        let open = async || follow(State(Arc::clone(&app))).await;
        let mut pages = Vec::new();
        for _ in 0..MOST_PAGES {
            pages.push(open().await);
        }
        assert_eq!(open().await.status(), StatusCode::SERVICE_UNAVAILABLE);
        pages.pop();
        assert_eq!(open().await.status(), StatusCode::OK);
    }
}
