//! Taking jobs, from the registration at the broker until the last job that is held has ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::heartbeat::NameClaim;
use super::run::{Worker, offered};
use super::transition::{Activity, Interruption, Next, Retry, Transition, after, merge};
use crate::broker::amqp::Link;
use crate::candidate::fetch::Fetcher;
use crate::engine::EngineError;
use crate::engine::thread::{EngineHandle, TERMINATE_GRACE};
use crate::protocol::state::{Detail, State};
use crate::scoring::consumer::{Consumer, HAND_BACK, ServeEnd, Serving};
use crate::scoring::pipeline::Pipeline;
use crate::scoring::settle::Settler;
use crate::update::UpdaterHandle;

/// The part of the drain's time that is kept for closing the connections, at most.
const CLOSING: Duration = Duration::from_secs(2);
/// A consumer that lasted this long did not fail to register: the back-off starts over.
const LASTING: Duration = Duration::from_secs(30);

impl Worker {
    /// Takes jobs until something ends it. On the way out the consumer goes first, then the state
    /// changes, then running jobs end.
    pub(super) async fn serve(&mut self, engine: EngineHandle, link: Arc<Link>) -> Next {
        if let Err(transition) = self.wait_for_device(&engine).await {
            return self.enter(transition);
        }
        let since = Instant::now();
        let mut consumer = match self.register(engine.clone(), link).await {
            Ok(consumer) => consumer,
            Err(interruption) => {
                let next = self.enter(after(interruption));
                return self.back_off(next, since).await;
            }
        };
        self.lifecycle.advance(State::Ready, Detail::Serving);
        let audits = audits(&engine, self.config.engine.audit_interval);
        let asked = tokio::select! {
            ended = consumer.take() => Err(ended),
            transition = self.asked_to_leave() => Ok(transition),
            error = audits => Ok(self.on_audit_failure(&error)),
        };
        let asked_at = Instant::now();
        consumer.unregister().await;
        match asked {
            Ok(transition) => {
                let then = self.enter(transition);
                self.finish(consumer, asked_at, then).await
            }
            Err(ended) => {
                let next = self.enter(after(Interruption::ServeEnded(ended)));
                self.give_up(consumer, ended).await;
                match engine.loss() {
                    Some(loss) => self.lose_engine(loss),
                    None => self.back_off(next, since).await,
                }
            }
        }
    }

    /// Waits until the device is free: it may still compute for a job that was given up. The error is
    /// what came first.
    async fn wait_for_device(&mut self, engine: &EngineHandle) -> Result<(), Transition> {
        tokio::select! {
            biased;
            loss = engine.lost() => Err(after(Interruption::ServeEnded(ServeEnd::EngineLost(loss)))),
            _ = engine.turn() => Ok(()),
            transition = self.asked_to_leave() => Err(transition),
        }
    }

    async fn register(
        &mut self,
        engine: EngineHandle,
        link: Arc<Link>,
    ) -> Result<Consumer, Interruption> {
        let serving = match self.serving(engine, link).await {
            Ok(serving) => serving,
            Err(error) => {
                let detail = Detail::ModelLoadFailed.to_string();
                self.status.error(&detail, &error.to_string());
                return Err(Interruption::FetcherFailed);
            }
        };
        Consumer::register(Arc::new(serving))
            .await
            .map_err(Interruption::ServeEnded)
    }

    async fn serving(&mut self, engine: EngineHandle, link: Arc<Link>) -> anyhow::Result<Serving> {
        let fetcher = self.fetcher().await?;
        let marks = Some(self.marks.clone());
        let pipeline = Pipeline::new(engine, &self.config, fetcher, &self.incarnation, marks);
        let updates = self.updates.as_ref();
        let newer = updates.map_or_else(Arc::default, UpdaterHandle::newer);
        let recent_results = self.recent_results.clone();
        let device_queue = self.device_queue.clone();
        let settler = Settler {
            link,
            topology: Arc::clone(&self.topology),
            status: Arc::clone(&self.status),
            recent_results: recent_results.clone(),
            origin: Arc::clone(pipeline.origin()),
            results_ttl: self.config.results.ttl,
            retry_delays: self.config.amqp.retry_delays.clone(),
        };
        Ok(Serving {
            pipeline: pipeline.with_shared(recent_results, device_queue.clone(), newer),
            settler,
            device_queue,
            store: self.store.clone(),
            prefetch: self.config.amqp.prefetch,
            consumer_timeout: self.config.amqp.consumer_timeout,
            cautious: self.cautious,
            delivered: Default::default(),
            abandon: CancellationToken::new(),
        })
    }

    /// Made once, off the async threads: it reads the folder of what was fetched before.
    async fn fetcher(&mut self) -> anyhow::Result<Fetcher> {
        if let Some(fetcher) = &self.fetcher {
            return Ok(fetcher.clone());
        }
        let (limits, folder) = (self.config.candidates.clone(), self.config.candidates_dir());
        let making = tokio::task::spawn_blocking(move || Fetcher::new(limits, folder));
        let fetcher = self.fetcher.insert(making.await??);
        Ok(fetcher.clone())
    }

    /// Resolves when the worker must stop taking jobs although it could go on.
    async fn asked_to_leave(&mut self) -> Transition {
        loop {
            tokio::select! {
                request = self.requests.recv() => {
                    if let Some(transition) = self.on_request(Activity::Serving, request) {
                        return transition;
                    }
                }
                Some(update) = offered(&mut self.updates) => {
                    let version = update.package.manifest.version;
                    return after(Interruption::UpdateOffered(version, Box::new(update)));
                }
                true = taken(&mut self.claim) => return after(Interruption::NameTaken),
            }
        }
    }

    /// The engine is not what it was: nothing that it says can be relied on.
    fn on_audit_failure(&mut self, error: &EngineError) -> Transition {
        self.status.error(&error.detail.to_string(), &error.message);
        tracing::error!(%error, detail = %error.detail, "the audit failed; the model is loaded again");
        self.package_changed |= error.detail == Detail::PackageChanged;
        after(Interruption::AuditFailed(error.detail))
    }

    /// Lets running jobs end. Requests are still taken meanwhile, because a drain must not wait; only
    /// a worker that stops has no use for them.
    async fn finish(&mut self, consumer: Consumer, asked_at: Instant, mut then: Next) -> Next {
        let time = self.config.worker.drain_timeout;
        let deadline = asked_at + time.saturating_sub((time / 2).min(CLOSING) + HAND_BACK);
        let finishing = consumer.finish(deadline, self.hurry.clone());
        tokio::pin!(finishing);
        loop {
            tokio::select! {
                cut_short = &mut finishing => {
                    return if cut_short { then.cut_short() } else { then };
                }
                request = self.requests.recv(), if !matches!(then, Next::Stop(_)) => {
                    if let Some(transition) = self.on_request(Activity::Serving, request) {
                        let asked = self.enter(transition);
                        then = merge(then, asked);
                    }
                }
            }
        }
    }

    /// Ends the jobs that are held when no more can be taken.
    async fn give_up(&mut self, consumer: Consumer, ended: ServeEnd) {
        match ended {
            ServeEnd::Cleared => {
                self.cautious = false;
                consumer.abandon().await;
            }
            // The job that stalled is answered, so that it does not stall the next worker too.
            ServeEnd::Stalled => consumer.settle_stalled(TERMINATE_GRACE * 2).await,
            ServeEnd::BrokerLost | ServeEnd::Forbidden | ServeEnd::ConsumerLost => {
                self.cautious = true;
                consumer.abandon().await;
            }
            ServeEnd::EngineLost(_) => consumer.abandon().await,
        }
    }

    /// Waits before a retry that could otherwise fail at once, again and again.
    async fn back_off(&mut self, next: Next, served_since: Instant) -> Next {
        let wait = match next {
            Next::Retry(Retry::Publishing) => self.publishing.next_delay(),
            Next::Retry(Retry::Registering) => {
                self.publishing.reset();
                if served_since.elapsed() > LASTING {
                    self.registering.reset();
                }
                self.registering.next_delay()
            }
            next @ (Next::Again | Next::Rewarm | Next::Reload | Next::Swap(_) | Next::Stop(_)) => {
                // Not by time: a job may take long before its result turns out to be forbidden.
                self.publishing.reset();
                return next;
            }
        };
        self.wait(Some(wait)).await
    }
}

/// Resolves when another worker has the name; false = the heartbeat has ended.
async fn taken(claim: &mut watch::Receiver<NameClaim>) -> bool {
    claim
        .wait_for(|claim| *claim == NameClaim::Taken)
        .await
        .is_ok()
}

/// Audits the engine between jobs, again and again; resolves with the first difference.
async fn audits(engine: &EngineHandle, interval: Duration) -> EngineError {
    loop {
        tokio::time::sleep(interval).await;
        if let Err(error) = audit(engine).await {
            return error;
        }
        tracing::debug!("audit: package, weights and losses are unchanged");
    }
}

/// Verifies the files before it takes the device: jobs must not wait for a disk.
async fn audit(engine: &EngineHandle) -> Result<(), EngineError> {
    let package = Arc::clone(&engine.package);
    let verified = tokio::task::spawn_blocking(move || package.verify());
    match verified.await {
        Ok(Ok(())) => engine.turn().await.audit().await,
        Ok(Err(error)) => Err(EngineError::new(Detail::PackageChanged, error.to_string())),
        Err(error) => Err(EngineError::new(Detail::EngineLost, error.to_string())),
    }
}
