//! The parts that run in the background as long as the worker lives: the heartbeat, the link, crash
//! marks, updates. A worker that has lost one would look healthy and not be, so it hands back what it
//! holds and the process ends, to be restarted.

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::orders::Request;
use super::transition::Ask;
use super::watchdog::Watchdog;

/// A part, as logs and errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Part {
    /// Publishes the worker's record.
    Heartbeat,
    /// Keeps the worker connected to the broker.
    Link,
    /// Removes crash marks that could not be removed at once.
    #[strum(serialize = "marks")]
    CrashMarks,
    /// Follows the published versions of the model.
    Updater,
    /// Forwards the signals that the process gets.
    Signals,
}

impl Part {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// Starts parts, and tells the worker when one ends.
#[derive(Debug, Clone)]
pub(super) struct Parts {
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) watchdog: Watchdog,
}

/// Held by a part; dropped with it, however it ends.
pub(super) struct Alive {
    part: Part,
    parts: Parts,
}

impl Parts {
    /// Runs a part in a task of its own.
    pub(super) fn spawn(
        &self,
        part: Part,
        work: impl Future<Output = ()> + Send + 'static,
    ) -> JoinHandle<()> {
        let alive = self.alive(part);
        tokio::spawn(async move {
            let _alive = alive;
            work.await;
        })
    }

    /// For a part that has its own thread.
    pub(super) fn alive(&self, part: Part) -> Alive {
        Alive {
            part,
            parts: self.clone(),
        }
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        let Parts { requests, watchdog } = self.parts.clone();
        let part = self.part;
        // When the worker ends, so do its parts, and no one listens. On a thread of its own: the queue of
        // requests may be full, and this may be the last thread of its runtime.
        let report = move || {
            if requests.blocking_send(Ask::PartLost(part).into()).is_ok() {
                watchdog.arm();
            }
        };
        let thread = std::thread::Builder::new().name("scorer-alarm".into());
        if let Err(error) = thread.spawn(report) {
            tracing::error!(%error, part = part.as_str(), "a part ended, and the worker cannot be told");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Layers};
    use crate::worker::assemble::Startup;
    use crate::worker::run::Worker;
    use crate::worker::transition::{Ask, Stop};
    use std::time::Duration;
    use tokio_util::sync::CancellationToken;

    fn parts() -> (Parts, mpsc::Receiver<Request>) {
        let (requests, inbox) = mpsc::channel(1);
        let watchdog = Watchdog::new(Duration::from_secs(60), |_| {});
        (Parts { requests, watchdog }, inbox)
    }

    async fn lost(inbox: &mut mpsc::Receiver<Request>) -> Part {
        match inbox.recv().await.map(|request| request.ask) {
            Some(Ask::PartLost(part)) => part,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn the_worker_is_told_of_a_part_that_returns_panics_or_is_aborted() {
        let (parts, mut inbox) = parts();
        parts.spawn(Part::Updater, async {});
        assert_eq!(lost(&mut inbox).await, Part::Updater);
        parts.spawn(Part::Link, async { panic!("on purpose") });
        assert_eq!(lost(&mut inbox).await, Part::Link);
        parts
            .spawn(Part::CrashMarks, std::future::pending())
            .abort();
        assert_eq!(lost(&mut inbox).await, Part::CrashMarks);
        let alive = parts.alive(Part::Heartbeat);
        let beating = std::thread::spawn(move || {
            let _alive = alive;
            panic!("on purpose");
        });
        drop(beating.join());
        assert_eq!(lost(&mut inbox).await, Part::Heartbeat);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_worker_that_loses_a_part_ends_and_says_which() {
        let set = [
            format!("worker.id=parts-{}", std::process::id()),
            "model.name=tiny".to_owned(),
            "model.dir=/nowhere".to_owned(),
            "amqp.url=amqp://127.0.0.1:1".to_owned(),
            "redis.url=redis://127.0.0.1:1".to_owned(),
        ];
        let layers = Layers {
            set: &set,
            ..Layers::default()
        };
        let config = Config::load(&layers).unwrap();
        let (parts, inbox) = parts();
        let (dir, hurry) = ("/nowhere".into(), CancellationToken::new());
        let startup = Startup::begin(&config);
        let assembled = Worker::assemble(config, dir, "tiny", startup, inbox, &parts, hurry);
        let (mut worker, background) = assembled.unwrap();
        background.tasks[0].abort();
        let ended = tokio::time::timeout(Duration::from_secs(30), worker.live()).await;
        assert_eq!(ended, Ok(Stop::PartLost(Part::Link)));
        background.heartbeat.stop().await;
    }
}
