//! The stages of a job, in order: check, plan, look up, mark and fetch, decode, measure. The pipeline
//! judges a job; the settler settles it.

mod merge;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::merge::Asking;
use crate::candidate;
use crate::candidate::fetch::{self, Fetched, Fetcher};
use crate::config::{CandidatesConfig, Config, Provider, device_name, format_duration};
use crate::engine::patch::Patches;
use crate::engine::thread::EngineHandle;
use crate::engine::{Early, Evaluation};
use crate::model::plan::Plan;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::job::{Candidate, Compression, Job, Source, Task, Validation};
use crate::protocol::result::{
    Asked, Body, CandidateFacts, JobRef, Key, LossBody, ResultMessage, ResultOrigin, ScoreBody,
    Timings, Verdict,
};
use crate::protocol::stop::Stop;
use crate::scoring::admission::{self, Admission};
use crate::scoring::crash_marks::{CrashMark, CrashMarks};
use crate::scoring::deadline::{check_deadline, past_deadline};
use crate::scoring::device_queue::{DevicePermit, DeviceQueue, Length, NoTurn};
use crate::scoring::recent_results::RecentResults;
use crate::telemetry::metrics;
use crate::telemetry::traces::{Stage, Trace};
use crate::util::blocking;
use crate::util::clock::Lap;

/// What came of a job.
#[derive(Debug)]
pub enum Judged {
    /// It was judged now.
    Fresh {
        /// The verdict.
        verdict: Verdict,
        /// The digest of what was asked, unless the job was refused before that was known.
        key: Option<Key>,
        /// Must be ended when it is known what becomes of the verdict.
        mark: Option<CrashMark>,
    },
    /// Another delivery of the same job was answered before.
    Stored {
        /// The result, without context.
        message: Box<ResultMessage>,
        /// The digest of what was asked.
        key: Key,
    },
    /// It did not run, and nothing is wrong with it: the worker leaves before the job can run or before
    /// it is known whether it may, or idle workers can have it.
    Requeue,
}

/// Why a job that was admitted has no numbers.
#[derive(Debug, thiserror::Error)]
enum Unscored {
    /// It is refused, or failed.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// It was sent back while it waited for the device.
    #[error("sent back")]
    SentBack,
}

impl Judged {
    /// Refused before its key was known.
    fn without_key(failure: Failure) -> Self {
        Self::Fresh {
            verdict: Err(failure),
            key: None,
            mark: None,
        }
    }

    /// Judging panicked. That is a bug of the worker, so it says nothing about the candidate.
    pub fn panicked() -> Self {
        let message = "the worker's own fault, a panic; its log says where";
        Self::without_key(Failure::new(Code::InferenceFailed, message))
    }
}

/// Judges jobs on one immutable snapshot of model and weights.
#[derive(Debug, Clone)]
pub struct Pipeline {
    engine: EngineHandle,
    fetcher: Fetcher,
    candidates: Arc<CandidatesConfig>,
    /// Rungs of the retry ladder.
    retry_delays: Vec<Duration>,
    score_timeout: Duration,
    /// The share of stopped evaluations that are measured to the end all the same.
    finish_stopped: f64,
    /// How long the broker lets a job be held.
    consumer_timeout: Duration,
    origin: Arc<ResultOrigin>,
    provider: Provider,
    device: String,
    marks: Option<CrashMarks>,
    recent_results: RecentResults,
    device_queue: DeviceQueue,
    /// Notified of jobs for a newer version.
    newer: Arc<Notify>,
    leaving: CancellationToken,
}

impl Pipeline {
    /// Without marks, as outside a fleet, no result is looked up.
    pub fn new(
        engine: EngineHandle,
        config: &Config,
        fetcher: Fetcher,
        incarnation: &str,
        marks: Option<CrashMarks>,
    ) -> Self {
        let manifest = &engine.package.manifest;
        let origin = ResultOrigin {
            model: manifest.name.clone(),
            model_version: manifest.version,
            weights_id: engine.package.weights.weights_id.clone(),
            package_id: engine.package.package_id.clone(),
            worker_id: config.worker_id(),
            incarnation: incarnation.to_owned(),
        };
        Self {
            fetcher,
            candidates: Arc::new(config.candidates.clone()),
            retry_delays: config.amqp.retry_delays.clone(),
            score_timeout: config.worker.score_timeout,
            finish_stopped: config.worker.finish_stopped,
            consumer_timeout: config.amqp.consumer_timeout,
            origin: Arc::new(origin),
            provider: config.engine.execution_provider,
            device: device_name(config),
            engine,
            marks,
            recent_results: RecentResults::default(),
            device_queue: DeviceQueue::default(),
            newer: Arc::default(),
            leaving: CancellationToken::new(),
        }
    }

    /// The same, with what outlives it: recent results, the device queue, and who is notified of jobs
    /// for a newer version.
    #[must_use]
    pub fn with_shared(
        self,
        recent_results: RecentResults,
        device_queue: DeviceQueue,
        newer: Arc<Notify>,
    ) -> Self {
        Self {
            recent_results,
            device_queue,
            newer,
            ..self
        }
    }

    /// The worker and the model that its results come from.
    pub fn origin(&self) -> &Arc<ResultOrigin> {
        &self.origin
    }

    /// The engine behind it.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Ends the waits for candidates that are being fetched and for news of other workers: those jobs are
    /// requeued.
    pub fn leave(&self) {
        self.leaving.cancel();
    }

    /// Judges a job; its stages go into the trace.
    pub async fn judge(&self, job: &Job, job_ref: &JobRef, trace: &Trace) -> Judged {
        if let Err(failure) = self.check(job) {
            return Judged::without_key(failure);
        }
        let plan = match self.plan(&job.validation).await {
            Ok(plan) => plan,
            Err(failure) => return Judged::without_key(failure),
        };
        match &job.task {
            Task::Validate { .. } => self.judge_model(job, job_ref, plan, trace).await,
            Task::Score {
                candidate, stop, ..
            } => {
                let asked = (candidate.as_ref(), *stop);
                self.judge_candidate(job, asked, job_ref, plan, trace).await
            }
            Task::Merge {
                members,
                on_rejected,
                ..
            } => {
                let asking = Asking {
                    members,
                    on_rejected: *on_rejected,
                };
                self.judge_merge(job, asking, job_ref, plan, trace).await
            }
        }
    }

    async fn judge_model(
        &self,
        job: &Job,
        job_ref: &JobRef,
        plan: Arc<Plan>,
        trace: &Trace,
    ) -> Judged {
        let key = Key::new(&self.origin, job_ref, Asked::Model, &plan.hash);
        let mut mark = match self.admit(job_ref, &key).await {
            Ok(mark) => mark,
            Err(judged) => return judged,
        };
        let loss = self.validate(job, plan, mark.as_mut(), trace).await;
        judged(loss, mark, key)
    }

    async fn judge_candidate(
        &self,
        job: &Job,
        (candidate, stop): (&Candidate, Option<Stop>),
        job_ref: &JobRef,
        plan: Arc<Plan>,
        trace: &Trace,
    ) -> Judged {
        let sha256 = match claimed_digest(candidate).await {
            Ok(sha256) => sha256,
            Err(failure) => return Judged::without_key(failure),
        };
        let known = matches!(candidate.source, Source::Inline(_)).then_some(sha256);
        let asked = Asked::Candidate {
            candidate,
            sha256: &sha256,
            stop,
        };
        let key = Key::new(&self.origin, job_ref, asked, &plan.hash);
        let fetching = self.fetch(job, candidate, known, trace);
        // A job that may not run drops its fetch: a slow server may take minutes.
        let entered = tokio::try_join!(self.admit(job_ref, &key), fetching);
        let (mut mark, (fetched, fetch)) = match entered {
            Ok(entered) => entered,
            Err(judged) => return judged,
        };
        let mut timings = Timings {
            fetch,
            ..Timings::default()
        };
        let scored = match fetched {
            Ok(fetched) => {
                let early = stop.map(|stop| Early {
                    stop,
                    finish: key.lot() < self.finish_stopped,
                });
                let asked = (candidate, fetched, early);
                let mark = mark.as_mut();
                self.score(job, asked, plan, mark, &mut timings, trace)
                    .await
            }
            Err(failure) => Err(failure.into()),
        };
        judged(scored, mark, key)
    }

    /// Checks what needs neither tokens nor the candidate's bytes.
    fn check(&self, job: &Job) -> Result<(), Failure> {
        let ours = &self.origin;
        if let Some(other) = job.model.as_ref().filter(|model| **model != ours.model) {
            let message = format!("model: {other:?}, this worker serves {:?}", ours.model);
            return Err(Failure::new(Code::ModelMismatch, message));
        }
        check_deadline(job.deadline_ms)?;
        let Some(version) = job.task.model_version() else {
            return Ok(());
        };
        let code = match version.cmp(&ours.model_version) {
            std::cmp::Ordering::Equal => return Ok(()),
            std::cmp::Ordering::Less => Code::ModelVersionMismatch,
            std::cmp::Ordering::Greater => {
                self.newer.notify_one();
                Code::ModelVersionUnavailable
            }
        };
        let message = format!(
            "model_version: the job names {version}, this worker has {}",
            ours.model_version
        );
        Err(Failure::new(code, message)
            .with("worker", ours.model_version)
            .with("job", version))
    }

    /// Large plans are made off the async threads: every window is hashed, and its tokens are copied.
    ///
    /// # Errors
    /// `unknown_shard`, or windows that there are none of.
    pub async fn plan(&self, validation: &Validation) -> Result<Arc<Plan>, Failure> {
        let (package, validation) = (Arc::clone(&self.engine.package), validation.clone());
        let effort = Plan::effort(&package.shards, package.cut());
        let planning = blocking::by_size(effort, move || {
            let (wanted, nonce) = (validation.shards.as_deref(), &validation.nonce);
            Plan::new(&package.shards, wanted, nonce, package.cut()).map(Arc::new)
        });
        planning.await.unwrap_or_else(|| Err(panicked("planning")))
    }

    /// Fetches the candidate's bytes, and says how long that took. The deadline of the job and the end of
    /// the worker end the wait.
    async fn fetch(
        &self,
        job: &Job,
        candidate: &Candidate,
        known: Option<[u8; 32]>,
        trace: &Trace,
    ) -> Result<(Result<Fetched, Failure>, f64), Judged> {
        let began = Instant::now();
        let fetched = tokio::select! {
            biased;
            fetched = self.fetcher.fetch(candidate, known) => fetched,
            failure = past_deadline(job.deadline_ms) => Err(failure),
            () = self.leaving.cancelled() => return Err(Judged::Requeue),
        };
        Ok((fetched, trace.stage(Stage::Fetch, Lap::since(began))))
    }

    /// Looks the result up and marks the job, where there is a store. The error is how the job ends if
    /// it may not run.
    async fn admit(&self, job_ref: &JobRef, key: &Key) -> Result<Option<CrashMark>, Judged> {
        let stored = |message| Judged::Stored {
            message,
            key: key.clone(),
        };
        if let Some(message) = self.recent_results.find(key) {
            return Err(stored(Box::new(message)));
        }
        let Some(marks) = &self.marks else {
            return Ok(None);
        };
        let version = job_ref.model_version.unwrap_or(self.origin.model_version);
        let mut mark = marks.mark(&key.0, format!("{}:{version}", job_ref.submission_id));
        let read = |text: &str| {
            let read = self.origin.read(text, job_ref);
            read.inspect_err(|error| {
                tracing::warn!(%error, key = key.0, "a stored result is ignored");
            })
            .ok()
        };
        match admission::admit(&mut mark, read, &self.leaving).await {
            Admission::Run => Ok(Some(mark)),
            Admission::Answer(message) => Err(stored(message)),
            Admission::Reject(failure) => Err(Judged::Fresh {
                verdict: Err(failure),
                key: Some(key.clone()),
                mark: None,
            }),
            Admission::Requeue => Err(Judged::Requeue),
        }
    }

    async fn validate(
        &self,
        job: &Job,
        plan: Arc<Plan>,
        mark: Option<&mut CrashMark>,
        trace: &Trace,
    ) -> Result<Body, Unscored> {
        let (permit, _) = self.device(job, length(job, &plan), trace).await?;
        if let Some(mark) = mark {
            mark.mark_suspect().await?;
        }
        let began = Instant::now();
        let losses = permit.validate(Arc::clone(&plan), self.score_limit()).await;
        trace.stage(Stage::Forward, Lap::since(began));
        let losses = losses?;
        Ok(Body::Loss(LossBody {
            loss: crate::engine::statistics::mean(&losses),
            windows: losses.len() as u64,
            tokens: plan.targets.iter().sum(),
            plan: hex::encode(plan.hash),
        }))
    }

    async fn score(
        &self,
        job: &Job,
        (candidate, fetched, early): (&Candidate, Fetched, Option<Early>),
        plan: Arc<Plan>,
        mark: Option<&mut CrashMark>,
        timings: &mut Timings,
        trace: &Trace,
    ) -> Result<Body, Unscored> {
        let mut held = None;
        if let Some(mark) = mark.filter(|mark| mark.is_suspect()) {
            held = Some(self.device(job, length(job, &plan), trace).await?);
            mark.mark_suspect().await?;
        }
        let began = Instant::now();
        let decoded = self.decode(candidate, fetched, &plan).await;
        timings.decode = trace.stage(Stage::Decode, Lap::since(began));
        let (patches, facts) = decoded?;
        let (permit, queued) = match held {
            Some(held) => held,
            None => self.device(job, length(job, &plan), trace).await?,
        };
        timings.queued = queued;
        // A suspect was decoded while it had the device.
        check_deadline(job.deadline_ms)?;
        let evaluation = permit
            .score(patches, Arc::clone(&plan), early, self.score_limit())
            .await?;
        let laps = evaluation.laps;
        if let Some(lap) = laps.baseline {
            trace.stage(Stage::Baseline, lap);
        }
        timings.apply = trace.stage(Stage::Patch, laps.apply);
        trace.forward(laps.forward, evaluation.from);
        timings.forward = laps.running();
        timings.restore = trace.stage(Stage::Restore, laps.restore);
        timings.total = Lap::since(trace.received).millis();
        self.count(&evaluation, early);
        Ok(self.body(&evaluation, &plan, facts, *timings))
    }

    /// The device, and how long the job waited for it, unless its deadline passes first.
    async fn device(
        &self,
        job: &Job,
        length: Length,
        trace: &Trace,
    ) -> Result<(DevicePermit<'_>, f64), Unscored> {
        let began = Instant::now();
        let (name, longest) = (&job.submission_id, self.longest());
        let acquiring = self
            .device_queue
            .acquire(&self.engine, name, length, longest);
        let permit = tokio::select! {
            permit = acquiring => permit.map_err(|why| self.without_turn(why))?,
            failure = past_deadline(job.deadline_ms) => return Err(failure.into()),
        };
        let queued = trace.stage(Stage::DeviceWait, Lap::since(began));
        check_deadline(job.deadline_ms)?;
        Ok((permit, queued))
    }

    /// How much of the time that the broker lets a job be held it may need for the device. The rest is for
    /// everything else, and for what is not as fast as expected.
    fn longest(&self) -> Duration {
        self.consumer_timeout / 2
    }

    /// How long an evaluation may take. One that takes longer than the broker waits for is delivered again, and
    /// would be ended again, for ever.
    pub fn score_limit(&self) -> Duration {
        self.score_timeout.min(self.longest())
    }

    fn without_turn(&self, why: NoTurn) -> Unscored {
        let needed = match why {
            NoTurn::SentBack => return Unscored::SentBack,
            NoTurn::TooLong(needed) => needed,
        };
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let message = format!(
            "the job, with those before it, would need {:.1} s, which is more than half of amqp.consumer_timeout = {}",
            needed.as_secs_f64(),
            format_duration(self.consumer_timeout)
        );
        let failure = Failure::new(Code::ScoreTimeout, message)
            .with("needed_ms", millis(needed))
            .with("limit_ms", millis(self.longest()));
        Unscored::Failed(failure)
    }

    /// Decodes and checks the candidate as far as possible without the device, off the async threads,
    /// while another job computes.
    async fn decode(
        &self,
        candidate: &Candidate,
        fetched: Fetched,
        plan: &Plan,
    ) -> Result<(Arc<Patches>, CandidateFacts), Failure> {
        let (candidate, plan) = (candidate.clone(), plan.hash);
        let package = Arc::clone(&self.engine.package);
        let limits = (&*self.candidates).into();
        let size = decoding_size(&fetched, candidate.compression);
        let decoding = blocking::by_size(size, move || {
            let update = candidate::decode(
                &fetched.bytes,
                candidate.format,
                candidate.compression,
                &package,
                limits,
            )?;
            let (tensors, entries) = (update.tensors.len() as u64, update.entries());
            let l2_norm = update.l2_norm();
            let patches = Patches::new(&package, update, candidate.rule)?;
            let facts = CandidateFacts {
                sha256: hex::encode(fetched.sha256),
                tensors,
                entries,
                effective_entries: patches.effective_entries,
                l2_norm,
                sketch: patches.sketch(&package, &plan).values,
            };
            Ok((Arc::new(patches), facts))
        });
        decoding.await.unwrap_or_else(|| Err(panicked("decoding")))
    }

    /// Counts what shows whether stopping keeps its word.
    fn count(&self, evaluation: &Evaluation, early: Option<Early>) {
        if let Some(ratio) = evaluation.gain_ratio {
            metrics::gain_ratio(ratio);
        }
        let Some(Early { stop, .. }) = early else {
            return;
        };
        match (&evaluation.stopped, evaluation.gain_ratio) {
            (Some(stopped), _) => metrics::might_stop(stop, self.finish_stopped, Err(stopped)),
            (None, Some(_)) => {
                metrics::might_stop(stop, self.finish_stopped, Ok(evaluation.paired.delta));
            }
            // Too short to be decided early.
            (None, None) => {}
        }
    }

    fn body(
        &self,
        evaluation: &Evaluation,
        plan: &Plan,
        candidate: CandidateFacts,
        timings_ms: Timings,
    ) -> Body {
        let paired = evaluation.paired;
        Body::Score(Box::new(ScoreBody {
            // What was stopped did not help, whatever the mean of the windows that ran.
            score: match evaluation.stopped {
                Some(_) => 0.0,
                None => paired.delta.max(0.0),
            },
            delta: paired.delta,
            stderr: paired.stderr,
            ci95: paired.ci95,
            loss_before: paired.loss_before,
            loss_after: paired.loss_after,
            windows: evaluation.windows,
            tokens: evaluation.tokens,
            plan: hex::encode(plan.hash),
            candidate,
            execution_provider: self.provider.execution_provider().into(),
            device: self.device.clone(),
            precision: self.engine.package.manifest.precision.as_str().into(),
            timings_ms,
            stopped: evaluation.stopped,
        }))
    }
}

/// How long a job is that measures one candidate, or the model.
fn length(job: &Job, plan: &Plan) -> Length {
    Length::of(plan.windows.len(), job.task.may_stop())
}

/// How large what is to be decoded may be; what zstd holds is unknown.
fn decoding_size(fetched: &Fetched, compression: Option<Compression>) -> usize {
    match compression {
        None => fetched.bytes.len(),
        Some(Compression::Zstd) => usize::MAX,
    }
}

fn panicked(work: &str) -> Failure {
    let message = format!("{work} ended early, by a panic; the worker's log says where");
    Failure::new(Code::InferenceFailed, message)
}

/// A job that is sent back drops its mark, which removes it.
fn judged(outcome: Result<Body, Unscored>, mark: Option<CrashMark>, key: Key) -> Judged {
    let verdict = match outcome {
        Ok(body) => Ok(body),
        Err(Unscored::Failed(failure)) => Err(failure),
        Err(Unscored::SentBack) => return Judged::Requeue,
    };
    Judged::Fresh {
        verdict,
        key: Some(key),
        mark,
    }
}

/// The digest of an inline candidate's bytes; of any other, the one that the job claims.
async fn claimed_digest(candidate: &Candidate) -> Result<[u8; 32], Failure> {
    match &candidate.source {
        Source::Inline(data) => fetch::digest(data.clone()).await,
        Source::Url(_) => Ok(candidate.sha256.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests;
