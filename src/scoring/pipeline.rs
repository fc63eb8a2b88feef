//! The path of a job: check, plan, look up, mark and fetch, decode, measure. The only place that knows
//! the order of the stages. It judges; settling is the consumer's.

use crate::config::device_name;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::candidate::fetch::{self, Fetched, Fetcher};
use crate::candidate::{self, DecodeLimits};
use crate::config::{Config, Provider};
use crate::engine::Evaluation;
use crate::engine::patch::Patches;
use crate::engine::thread::{EngineHandle, Turn};
use crate::model::plan::Plan;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::job::{Candidate, Compression, Job, Source, Task};
use crate::protocol::result::{
    Body, CandidateFacts, JobRef, Key, LossBody, ResultMessage, ResultOrigin, ScoreBody, Timings,
    Verdict,
};
use crate::scoring::crash_marks::{Attempt, CrashMarks, Passage};
use crate::scoring::device_queue::{Place, Waiting};
use crate::scoring::recent_results::RecentResults;
use crate::telemetry::traces::{Stage, Trace};
use crate::util::blocking;
use crate::util::clock::{Lap, unix_ms};

/// A judged job.
#[derive(Debug)]
pub enum Judged {
    /// Judged now.
    Fresh {
        /// The verdict.
        verdict: Verdict,
        /// What was asked, exactly, where that is defined.
        key: Option<Key>,
        /// To be ended when it is known what becomes of the verdict.
        attempt: Option<Attempt>,
    },
    /// Another delivery of the same job was answered before, and Redis had the result.
    Stored {
        /// The result, without context.
        message: Box<ResultMessage>,
        /// What was asked, exactly.
        key: Key,
    },
    /// Not computed, by nobody's fault: it is handed back. The worker leaves before the job can be
    /// computed, or before it is known whether it may be, or others have nothing to do.
    Undecided,
}

/// Why a job that could be computed has no numbers.
enum Unscored {
    /// It is refused, or failed.
    Failed(Failure),
    /// It is sent back while it waited for the device.
    SentBack,
}

impl From<Failure> for Unscored {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl Judged {
    /// Refused before it was clear what exactly is asked.
    fn without_key(failure: Failure) -> Self {
        Self::Fresh {
            verdict: Err(failure),
            key: None,
            attempt: None,
        }
    }

    /// Judging panicked: a fault of ours, so it says nothing about the candidate.
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
    limits: DecodeLimits,
    score_timeout: Duration,
    answerer: Arc<ResultOrigin>,
    provider: Provider,
    device: String,
    marks: Option<CrashMarks>,
    recent_results: RecentResults,
    waiting: Waiting,
    /// Told of jobs for a newer version.
    newer: Arc<Notify>,
    leaving: CancellationToken,
}

impl Pipeline {
    /// Puts the parts together. Without marks nothing is looked up either.
    pub fn new(
        engine: EngineHandle,
        config: &Config,
        fetcher: Fetcher,
        incarnation: &str,
        marks: Option<CrashMarks>,
    ) -> Self {
        let manifest = &engine.package.manifest;
        let answerer = ResultOrigin {
            model: manifest.name.clone(),
            model_version: manifest.version,
            weights_id: engine.package.weights.weights_id.clone(),
            package_id: engine.package.package_id.clone(),
            worker_id: config.worker_id(),
            incarnation: incarnation.to_owned(),
        };
        Self {
            fetcher,
            limits: (&config.candidates).into(),
            score_timeout: config.worker.score_timeout,
            answerer: Arc::new(answerer),
            provider: config.engine.execution_provider,
            device: device_name(config),
            engine,
            marks,
            recent_results: RecentResults::default(),
            waiting: Waiting::default(),
            newer: Arc::default(),
            leaving: CancellationToken::new(),
        }
    }

    /// The same, with what outlives it: results of jobs that come again, the line of jobs, and who is
    /// told of jobs for a newer version.
    #[must_use]
    pub fn with_shared(
        self,
        recent_results: RecentResults,
        waiting: Waiting,
        newer: Arc<Notify>,
    ) -> Self {
        Self {
            recent_results,
            waiting,
            newer,
            ..self
        }
    }

    /// Who answers.
    pub fn answerer(&self) -> &ResultOrigin {
        &self.answerer
    }

    /// The engine behind it.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Results that are not settled yet.
    pub fn recent_results(&self) -> &RecentResults {
        &self.recent_results
    }

    /// The jobs that wait for the device.
    pub fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// Ends the waits for candidates on their way and for what became of other workers: their jobs
    /// are handed back.
    pub fn leave(&self) {
        self.leaving.cancel();
    }

    /// Judges a job; its stages go into the trace.
    pub async fn judge(&self, job: &Job, job_ref: &JobRef, trace: &Trace) -> Judged {
        if let Err(failure) = self.check(job) {
            return Judged::without_key(failure);
        }
        let plan = match self.plan(job).await {
            Ok(plan) => plan,
            Err(failure) => return Judged::without_key(failure),
        };
        match &job.task {
            Task::Validate { .. } => self.judge_model(job, job_ref, plan, trace).await,
            Task::Score { candidate, .. } => {
                self.judge_candidate(job, candidate, job_ref, plan, trace)
                    .await
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
        let key = Key::new(&self.answerer, job_ref, None, &plan.hash);
        let mut attempt = match self.enter(job_ref, &key).await {
            Ok(attempt) => attempt,
            Err(judged) => return judged,
        };
        let loss = self.validate(job, plan, attempt.as_mut(), trace).await;
        judged(loss, attempt, key)
    }

    async fn judge_candidate(
        &self,
        job: &Job,
        candidate: &Candidate,
        job_ref: &JobRef,
        plan: Arc<Plan>,
        trace: &Trace,
    ) -> Judged {
        let sha256 = match claimed_digest(candidate).await {
            Ok(sha256) => sha256,
            Err(failure) => return Judged::without_key(failure),
        };
        let known = matches!(candidate.source, Source::Inline(_)).then_some(sha256);
        let asked = Some((candidate, &sha256));
        let key = Key::new(&self.answerer, job_ref, asked, &plan.hash);
        let fetching = self.fetch(job, candidate, known, trace);
        // Whatever ends the job drops the fetch: a stranger's server may take minutes.
        let entered = tokio::try_join!(self.enter(job_ref, &key), fetching);
        let (mut attempt, (fetched, fetch)) = match entered {
            Ok(entered) => entered,
            Err(judged) => return judged,
        };
        let mut timings = Timings {
            fetch,
            ..Timings::default()
        };
        let scored = match fetched {
            Ok(fetched) => {
                let asked = (candidate, fetched);
                let attempt = attempt.as_mut();
                self.score(job, asked, plan, attempt, &mut timings, trace)
                    .await
            }
            Err(failure) => Err(failure.into()),
        };
        judged(scored, attempt, key)
    }

    /// Everything that needs no tokens and no bytes.
    fn check(&self, job: &Job) -> Result<(), Failure> {
        let ours = &self.answerer;
        if let Some(other) = job.model.as_ref().filter(|model| **model != ours.model) {
            let message = format!("model: {other:?}, this worker serves {:?}", ours.model);
            return Err(Failure::new(Code::ModelMismatch, message));
        }
        check_deadline(job)?;
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

    /// Large ones off the async threads: every window is hashed, and its tokens are copied.
    async fn plan(&self, job: &Job) -> Result<Arc<Plan>, Failure> {
        let (package, validation) = (Arc::clone(&self.engine.package), job.validation.clone());
        let effort = Plan::effort(&package.shards, package.cut());
        let planning = blocking::by_size(effort, move || {
            let (wanted, nonce) = (validation.shards.as_deref(), &validation.nonce);
            Plan::new(&package.shards, wanted, nonce, package.cut()).map(Arc::new)
        });
        planning.await.unwrap_or_else(|| {
            let message = "planning ended early, by a panic; the worker's log says where";
            Err(Failure::new(Code::InferenceFailed, message))
        })
    }

    /// The candidate's bytes, and how long it took to get them; what is not here when the deadline
    /// passes, or when the worker leaves, is not waited for.
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
            failure = past_deadline(job) => Err(failure),
            () = self.leaving.cancelled() => return Err(Judged::Undecided),
        };
        Ok((fetched, trace.stage(Stage::Fetch, Lap::since(began))))
    }

    /// Looks the result up and marks the job, where there is a Redis; waits where others have marked
    /// it. The error is how the job ends here.
    async fn enter(&self, job_ref: &JobRef, key: &Key) -> Result<Option<Attempt>, Judged> {
        if let Some(message) = self.recent_results.find(key) {
            return Err(Judged::Stored {
                message: Box::new(message),
                key: key.clone(),
            });
        }
        let Some(marks) = &self.marks else {
            return Ok(None);
        };
        let version = job_ref.model_version.unwrap_or(self.answerer.model_version);
        let name = format!("{}:{version}", job_ref.submission_id);
        match marks.enter(&key.0, name, &self.leaving).await {
            Passage::Stored(text, attempt) => match self.answerer.read(&text, job_ref) {
                Ok(message) => Err(Judged::Stored {
                    message: Box::new(message),
                    key: key.clone(),
                }),
                Err(error) => {
                    tracing::warn!(%error, key = key.0, "a stored result is ignored");
                    Ok(Some(attempt))
                }
            },
            Passage::Poisoned(failure) => Err(Judged::Fresh {
                verdict: Err(failure),
                key: Some(key.clone()),
                attempt: None,
            }),
            Passage::HandedBack => Err(Judged::Undecided),
            Passage::Free(attempt) => Ok(Some(attempt)),
        }
    }

    async fn validate(
        &self,
        job: &Job,
        plan: Arc<Plan>,
        attempt: Option<&mut Attempt>,
        trace: &Trace,
    ) -> Result<Body, Unscored> {
        let (place, turn, _) = self.turn(job, &plan, trace).await?;
        if let Some(attempt) = attempt {
            attempt.mark().await?;
        }
        let began = Instant::now();
        let losses = turn.validate(Arc::clone(&plan), self.score_timeout).await;
        trace.stage(Stage::Forward, Lap::since(began));
        let losses = losses?;
        place.computed();
        Ok(Body::Loss(LossBody {
            loss: crate::engine::statistics::mean(&losses),
            windows: losses.len() as u64,
            tokens: plan.targets,
            plan: hex::encode(plan.hash),
        }))
    }

    async fn score(
        &self,
        job: &Job,
        (candidate, fetched): (&Candidate, Fetched),
        plan: Arc<Plan>,
        attempt: Option<&mut Attempt>,
        timings: &mut Timings,
        trace: &Trace,
    ) -> Result<Body, Unscored> {
        let mut early = None;
        if let Some(attempt) = attempt.filter(|attempt| attempt.is_suspect()) {
            early = Some(self.turn(job, &plan, trace).await?);
            attempt.mark().await?;
        }
        let began = Instant::now();
        let decoded = self.decode(candidate, fetched, &plan).await;
        timings.decode = trace.stage(Stage::Decode, Lap::since(began));
        let (patches, facts) = decoded?;
        let (place, turn, queued) = match early {
            Some(early) => early,
            None => self.turn(job, &plan, trace).await?,
        };
        timings.queued = queued;
        // A suspect was decoded since.
        check_deadline(job)?;
        let evaluation = turn
            .score(patches, Arc::clone(&plan), self.score_timeout)
            .await?;
        place.computed();
        let laps = evaluation.laps;
        if let Some(lap) = laps.baseline {
            trace.stage(Stage::Baseline, lap);
        }
        timings.apply = trace.stage(Stage::Patch, laps.apply);
        trace.stage(Stage::Forward, laps.forward);
        timings.forward = laps.running();
        timings.restore = trace.stage(Stage::Restore, laps.restore);
        timings.total = Lap::since(trace.received).millis();
        Ok(self.body(&evaluation, &plan, facts, *timings))
    }

    /// The device, and how long the job waited for it, unless its deadline passes first.
    async fn turn(
        &self,
        job: &Job,
        plan: &Plan,
        trace: &Trace,
    ) -> Result<(Place, Turn<'_>, f64), Unscored> {
        let began = Instant::now();
        let place = self.waiting.enter(&job.submission_id, plan.windows.len());
        let turn = tokio::select! {
            turn = place.turn(&self.engine) => turn.ok_or(Unscored::SentBack)?,
            failure = past_deadline(job) => return Err(failure.into()),
        };
        let queued = trace.stage(Stage::DeviceWait, Lap::since(began));
        check_deadline(job)?;
        Ok((place, turn, queued))
    }

    /// Off the async threads, beside the computation of another job: everything that can be known
    /// of a candidate without the device.
    async fn decode(
        &self,
        candidate: &Candidate,
        fetched: Fetched,
        plan: &Plan,
    ) -> Result<(Arc<Patches>, CandidateFacts), Failure> {
        let (candidate, plan) = (candidate.clone(), plan.hash);
        let (package, limits) = (Arc::clone(&self.engine.package), self.limits);
        // How much is inside zstd nobody knows.
        let size = match candidate.compression {
            None => fetched.bytes.len(),
            Some(Compression::Zstd) => usize::MAX,
        };
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
        decoding.await.unwrap_or_else(|| {
            let message = "decoding ended early, by a panic; the worker's log says where";
            Err(Failure::new(Code::InferenceFailed, message))
        })
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
            score: paired.delta.max(0.0),
            delta: paired.delta,
            stderr: paired.stderr,
            ci95: paired.ci95,
            loss_before: paired.loss_before,
            loss_after: paired.loss_after,
            windows: plan.windows.len() as u64,
            tokens: plan.targets,
            plan: hex::encode(plan.hash),
            candidate,
            execution_provider: self.provider.execution_provider().into(),
            device: self.device.clone(),
            precision: self.engine.package.manifest.precision.as_str().into(),
            timings_ms,
        }))
    }
}

/// What is sent back is no attempt: dropping it takes the mark away.
fn judged(outcome: Result<Body, Unscored>, attempt: Option<Attempt>, key: Key) -> Judged {
    let verdict = match outcome {
        Ok(body) => Ok(body),
        Err(Unscored::Failed(failure)) => Err(failure),
        Err(Unscored::SentBack) => return Judged::Undecided,
    };
    Judged::Fresh {
        verdict,
        key: Some(key),
        attempt,
    }
}

/// Of the bytes where they are here, else what the job claims.
async fn claimed_digest(candidate: &Candidate) -> Result<[u8; 32], Failure> {
    match &candidate.source {
        Source::Inline(data) => fetch::digest(data.clone()).await,
        Source::Url(_) => Ok(candidate.sha256.unwrap_or_default()),
    }
}

/// Resolves when the job's deadline has passed, by the clock that it is given in; that may be set
/// meanwhile.
async fn past_deadline(job: &Job) -> Failure {
    const LOOK: Duration = Duration::from_secs(1);
    loop {
        if let Err(failure) = check_deadline(job) {
            return failure;
        }
        let left = job.deadline_ms.map(|at| at.saturating_sub(unix_ms()) + 1);
        match left {
            Some(left) => tokio::time::sleep(Duration::from_millis(left).min(LOOK)).await,
            None => std::future::pending().await,
        }
    }
}

fn check_deadline(job: &Job) -> Result<(), Failure> {
    match job.deadline_ms.filter(|deadline| unix_ms() > *deadline) {
        Some(deadline) => {
            let message = format!(
                "deadline_ms: {deadline} has passed by {} ms",
                unix_ms().saturating_sub(deadline)
            );
            Err(Failure::new(Code::DeadlineExceeded, message))
        }
        None => Ok(()),
    }
}
