//! `scorer dashboard`: the fleet as a web page that updates itself. It only reads: Redis, queue depths,
//! and copies of results and dead-lettered jobs.

mod access;
mod board;
mod contributors;
mod copies;
mod demo;
mod files;
mod jobs;
mod live;
mod made;
mod merges;
mod news;
mod roster;
mod routes;
mod stored;
mod text;
mod timeline;
mod verdict;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Interval, MissedTickBehavior};

pub use access::Access;
pub use demo::SIZES;

use crate::config::Config;
use crate::store::FleetStore;
use crate::telemetry::listener::{self, Limits};
use crate::util::clock::unix_ms;
use board::Board;

/// Between two looks at the fleet.
const EVERY: Duration = Duration::from_secs(1);
/// Pages that are kept up to date at the same time; the listener has room for other requests beside them.
const MOST_PAGES: usize = 48;

/// Which fleet the page shows.
#[derive(Debug)]
pub enum Fleet {
    /// The one in Redis: of one model, or of all.
    Live {
        /// How to reach it.
        config: Box<Config>,
        /// None: every model.
        model: Option<String>,
    },
    /// A simulated one.
    Demo {
        /// One of [`SIZES`].
        workers: usize,
    },
}

/// Shared by all parts.
struct App {
    board: Mutex<Board>,
    /// What every page was told last; none before the first look.
    told: watch::Sender<Option<Told>>,
    places: Arc<Semaphore>,
    /// None: a simulated fleet has none.
    store: Option<FleetStore>,
}

/// The list of workers, and what changes every second.
#[derive(Debug, Clone)]
struct Told {
    names_rev: u64,
    names: Arc<str>,
    now: Arc<str>,
}

/// Serves the page until the process ends. `contributors` is the key of a job's context that says who sent it.
pub async fn serve(
    fleet: Fleet,
    contributors: Option<String>,
    listener: TcpListener,
    access: Access,
) {
    let store = match &fleet {
        Fleet::Live { config, .. } => Some(FleetStore::new(&config.redis)),
        Fleet::Demo { .. } => None,
    };
    let app = Arc::new(App::new(Board::new(contributors), store));
    match fleet {
        Fleet::Live { config, model } => {
            tokio::spawn(live::watch_results((*config).clone(), Arc::clone(&app)));
            tokio::spawn(live::look(*config, model, Arc::clone(&app)));
        }
        Fleet::Demo { workers } => {
            tokio::spawn(play(workers, Arc::clone(&app)));
        }
    }
    let guard = axum::middleware::from_fn_with_state(Arc::new(access), access::guard);
    let routes = routes::routes(app).layer(guard);
    listener::serve(listener, routes, Limits::LASTING).await;
}

impl App {
    fn new(board: Board, store: Option<FleetStore>) -> Self {
        Self {
            board: Mutex::new(board),
            told: watch::Sender::new(None),
            places: Arc::new(Semaphore::new(MOST_PAGES)),
            store,
        }
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells every page how the board is now.
    fn publish(&self) {
        let before = self.told.borrow().clone();
        let board = self.board();
        let names_rev = board.names_rev();
        let names = match before.filter(|told| told.names_rev == names_rev) {
            Some(told) => Ok(told.names),
            None => serde_json::to_string(&board.names()).map(Arc::from),
        };
        let now = serde_json::to_string(&board.now()).map(Arc::from);
        if let (Ok(names), Ok(now)) = (names, now) {
            self.told.send_replace(Some(Told {
                names_rev,
                names,
                now,
            }));
        }
    }
}

/// Plays a simulated fleet, as if the dashboard had watched it for a day.
async fn play(workers: usize, app: Arc<App>) {
    let mut demo = app.board().begin_demo(workers, unix_ms());
    let mut ticks = ticks();
    loop {
        ticks.tick().await;
        let moment = demo.step(unix_ms());
        app.board().play(moment);
        app.publish();
    }
}

fn ticks() -> Interval {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
