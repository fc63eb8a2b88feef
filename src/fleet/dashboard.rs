//! `scorer dashboard`: the fleet as a web page that updates itself. It reads records and events from
//! Redis, queue depths, and copies of results and dead-lettered jobs; it settles nothing.

mod access;
mod demo;
mod history;

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

pub use crate::fleet::dashboard::access::Access;
use history::{History, Parked};

use crate::broker::BrokerError;
use crate::broker::amqp::{Deliveries, Delivery, Link};
use crate::broker::topology::Topology;
use crate::config::Config;
use crate::fleet::observer::Observer;
use crate::protocol::result::ResultMessage;
use crate::telemetry::listener::{self, Limits};
use crate::util::backoff::Backoff;
use crate::util::clock::unix_ms;

const EVERY: Duration = Duration::from_secs(1);
/// Pages that are kept up to date at the same time; the listener has room for other requests beside them.
const MOST_PAGES: usize = 48;

/// Path, kind and text of each file of the page.
const FILES: [(&str, &str, &str); 3] = [
    (
        "/",
        "text/html; charset=utf-8",
        include_str!("dashboard/page.html"),
    ),
    (
        "/page.js",
        "text/javascript",
        include_str!("dashboard/page.js"),
    ),
    ("/page.css", "text/css", include_str!("dashboard/page.css")),
];

/// Shared by all parts: the history, and the page last made from it.
#[derive(Clone)]
struct Board {
    history: Arc<Mutex<History>>,
    page: watch::Sender<Arc<str>>,
}

impl Board {
    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self) {
        if let Ok(page) = serde_json::to_string(self.history().page()) {
            self.page.send_replace(page.into());
        }
    }
}

/// Serves the page until the process ends.
pub async fn serve(config: Config, model: Option<String>, listener: TcpListener, access: Access) {
    let board = Board {
        history: Arc::default(),
        page: watch::Sender::new("{}".into()),
    };
    tokio::spawn(watch_results(config.clone(), board.clone()));
    tokio::spawn(look(config, model, board.clone()));
    let (pages, places) = (board.page.clone(), Arc::new(Semaphore::new(MOST_PAGES)));
    let mut routes = Router::new();
    for (path, kind, text) in FILES {
        let file = move || std::future::ready(([(header::CONTENT_TYPE, kind)], text));
        routes = routes.route(path, get(file));
    }
    let routes = routes
        .route("/events", get(async move || follow(&pages, &places)))
        .layer(axum::middleware::from_fn_with_state(
            Arc::new(access),
            crate::fleet::dashboard::access::guard,
        ));
    listener::serve(listener, routes, Limits::LASTING).await;
}

/// Sends the page now and whenever it changes. Open pages are counted apart from short requests, which are
/// therefore never refused.
fn follow(pages: &watch::Sender<Arc<str>>, places: &Arc<Semaphore>) -> Response {
    match Arc::clone(places).try_acquire_owned() {
        Ok(place) => events(pages.subscribe(), place).into_response(),
        Err(_) => {
            let why = format!("{MOST_PAGES} pages are open already; close one\n");
            (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
        }
    }
}

fn events(mut pages: watch::Receiver<Arc<str>>, place: OwnedSemaphorePermit) -> impl IntoResponse {
    pages.mark_changed();
    let events = futures_util::stream::unfold((pages, place), async |(mut pages, place)| {
        // The next page is taken when the last has been sent: a slow reader skips some.
        pages.changed().await.ok()?;
        let page = Arc::clone(&pages.borrow_and_update());
        let event: Result<Event, Infallible> = Ok(Event::default().data(&*page));
        Some((event, (pages, place)))
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}

/// Looks at the fleet every second.
async fn look(config: Config, model: Option<String>, board: Board) {
    let mut observer = Observer::new(&config, model);
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match observer.look().await {
            Ok(view) => board.history().see(&view),
            Err(error) => board.history().lose_sight(error.to_string()),
        }
        let last = board.history().last_event();
        // Events missed now are read at the next look.
        let events = observer.events(last.as_deref()).await;
        board.history().add_events(events.unwrap_or_default());
        board.publish();
    }
}

/// Reads copies of results and dead-lettered jobs while there is a connection to RabbitMQ.
async fn watch_results(config: Config, board: Board) {
    let mut backoff = Backoff::new();
    loop {
        let model = config
            .model
            .name
            .clone()
            .or_else(|| board.history().model());
        if let Some(model) = model {
            let topology = Topology::new(&config.amqp, &model);
            match subscribe(&config, &topology).await {
                Ok(watching) => {
                    backoff.reset();
                    board.history().watches(Ok(unix_ms()));
                    watching.follow(&board).await;
                    let why = "the connection to RabbitMQ is lost".to_owned();
                    board.history().watches(Err(why));
                }
                Err(error) => board.history().watches(Err(error.to_string())),
            }
        }
        tokio::time::sleep(backoff.next_delay()).await;
    }
}

/// Exclusive queues: nothing is kept for the dashboard while it is not connected.
struct Watching {
    link: Link,
    results: Deliveries,
    parked: Deliveries,
}

async fn subscribe(config: &Config, topology: &Topology) -> Result<Watching, BrokerError> {
    let link = Link::connect(&config.amqp, "scorer-dashboard").await?;
    let all = format!("{}.*", topology.model);
    let (_, results) = link.subscribe(&topology.results_exchange(), &[all]).await?;
    let (dead, model) = (topology.dead_exchange(), topology.model.clone());
    let (_, parked) = link.subscribe(&dead, &[model]).await?;
    Ok(Watching {
        link,
        results,
        parked,
    })
}

impl Watching {
    async fn follow(mut self, board: &Board) {
        loop {
            tokio::select! {
                Some(delivery) = self.results.next() => {
                    let label = delivery.properties.label();
                    if let Ok(result) = ResultMessage::decode(&delivery.body, label) {
                        board.history().judge(&result);
                    }
                }
                Some(delivery) = self.parked.next() => board.history().park(parked(&delivery)),
                () = self.link.lost.cancelled() => return,
                else => return self.link.close().await,
            }
        }
    }
}

fn parked(delivery: &Delivery) -> Parked {
    let properties = &delivery.properties;
    let id = properties
        .correlation_id
        .clone()
        .or_else(|| properties.message_id.clone());
    Parked {
        submission_id: id.unwrap_or_default(),
        code: properties.dead_letter_reason().unwrap_or_default(),
        message: properties.dead_letter_message().unwrap_or_default(),
        worker: properties.dead_lettered_by().unwrap_or_default(),
        at_ms: unix_ms(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;

    #[tokio::test]
    async fn the_first_that_a_page_is_told_is_the_newest_and_comes_at_once() {
        let pages = watch::Sender::new(Arc::from("old"));
        pages.send_replace(Arc::from("new"));
        let places = Arc::new(Semaphore::new(1));
        let mut told = follow(&pages, &places).into_body().into_data_stream();
        assert_eq!(told.next().await.unwrap().unwrap(), "data: new\n\n");
        pages.send_replace(Arc::from("skipped"));
        pages.send_replace(Arc::from("newer"));
        assert_eq!(told.next().await.unwrap().unwrap(), "data: newer\n\n");

        let full = follow(&pages, &places);
        assert_eq!(full.status(), StatusCode::SERVICE_UNAVAILABLE);
        drop(told);
        assert_eq!(follow(&pages, &places).status(), StatusCode::OK);
    }
}
