//! The parts that run beside a worker as long as it lives: the heartbeat, the link, marks, updates. A
//! worker without one of them would look sound and not be: it hands back what it holds, and the
//! process ends, to be started again.

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Request;
use super::watchdog::Watchdog;

/// A part, as logs and errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Beats.
    Heartbeat,
    /// Keeps the link to the broker.
    Link,
    /// Removes crash marks that could not be removed at once.
    CrashMarks,
    /// Follows the model.
    Updater,
    /// Hears the signals that the process gets.
    Signals,
}

impl Part {
    /// In a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Heartbeat => "heartbeat",
            Self::Link => "link",
            Self::CrashMarks => "marks",
            Self::Updater => "updater",
            Self::Signals => "signals",
        }
    }
}

/// Tells the worker when a part ends.
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
        // In the end all parts are ended, when nobody listens any more. The queue of requests may be
        // full, and this may be any thread, the last of its runtime.
        let telling = move || {
            if requests.blocking_send(Request::Lost(part)).is_ok() {
                watchdog.arm();
            }
        };
        let thread = std::thread::Builder::new().name("scorer-alarm".into());
        if let Err(error) = thread.spawn(telling) {
            tracing::error!(%error, part = part.as_str(), "has ended, and the worker cannot be told");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Layers};
    use crate::worker::start::Life;
    use crate::worker::{Stop, Worker};
    use std::time::Duration;
    use tokio_util::sync::CancellationToken;

    fn parts() -> (Parts, mpsc::Receiver<Request>) {
        let (requests, inbox) = mpsc::channel(1);
        let watchdog = Watchdog::new(Duration::from_secs(60), |_| {});
        (Parts { requests, watchdog }, inbox)
    }

    async fn lost(inbox: &mut mpsc::Receiver<Request>) -> Part {
        match inbox.recv().await {
            Some(Request::Lost(part)) => part,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_part_that_returns_panics_or_is_ended_is_told_of() {
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
        let life = Life::begin(&config);
        let started = Worker::start(config, dir, "tiny", life, inbox, &parts, hurry);
        let (mut worker, beside) = started.unwrap();
        beside.tasks[0].abort();
        let ended = tokio::time::timeout(Duration::from_secs(30), worker.live()).await;
        assert_eq!(ended, Ok(Stop::PartLost(Part::Link)));
        beside.heartbeat.stop().await;
    }
}
