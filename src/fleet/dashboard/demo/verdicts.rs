//! What workers answer.

use std::collections::VecDeque;

use rand::Rng;
use rand::rngs::StdRng;
use rmpv::Value;
use sha2::{Digest, Sha256};

use super::SeenResult;
use super::job::{Fate, Job};
use super::merges;
use super::miners::{Habit, LEADER, Miner, miners};
use crate::fleet::dashboard::roster::keep;
use crate::protocol::failure::{Code, Failure, Status};
use crate::protocol::heartbeat::Record;
use crate::protocol::job::Kind;
use crate::protocol::message::V1;
use crate::protocol::result::{
    Body, CandidateFacts, LossBody, ResultMessage, SKETCH_BINS, ScoreBody, Timings,
};

/// The loss of the model, nats per target.
pub(super) const LOSS: f64 = 2.8714;
/// Windows of a job, and targets of a window.
pub(super) const WINDOWS: u64 = 64;
pub(super) const TARGETS: u64 = 1024;
/// What an honest update gains as a rule.
pub(super) const GAIN: f64 = 8e-4;
/// Weights that an update changes, of each bin of its sketch.
const PER_BIN: u64 = 60_000;
/// Who copies takes this long.
const COPIED_MS: u64 = 30_000;
/// Updates that may be copied.
const LEADING: usize = 1000;
/// Places in which the sketch of a copy differs.
const TOUCHED: usize = 3;

pub(super) type Sketch = [u64; SKETCH_BINS];

/// What miners have sent, and what is found about it.
#[derive(Debug)]
pub(super) struct Verdicts {
    pub(super) miners: Vec<Miner>,
    /// The last updates of the miner that is copied.
    leading: VecDeque<Update>,
    /// The epoch of the last scored job and its plan.
    plan: (u64, String),
    package_id: String,
}

/// An update of the miner that is copied.
#[derive(Debug, Clone, Copy)]
struct Update {
    at_ms: u64,
    epoch: u64,
    sketch: Sketch,
    gain: f64,
}

/// An answer and where the time went.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answered {
    pub(super) at_ms: u64,
    pub(super) timings: Timings,
}

impl Verdicts {
    pub(super) fn new(random: &mut StdRng) -> Self {
        Self {
            miners: miners(random),
            leading: VecDeque::new(),
            plan: (0, digest("epoch 0")),
            package_id: digest("package"),
        }
    }

    /// The answer of a worker to a job.
    pub(super) fn answer(
        &mut self,
        job: &Job,
        worker: &Record,
        answered: Answered,
        random: &mut StdRng,
    ) -> SeenResult {
        let (status, body) = self.body(job, worker, answered, random);
        let result = ResultMessage {
            v: V1,
            kind: match job.fate {
                Fate::Measured => Kind::Validate,
                Fate::Merged(_) => Kind::Merge,
                Fate::Scored | Fate::Ended(_) | Fate::Unavailable => Kind::Score,
            },
            submission_id: job.submission_id(),
            context: Some(self.context(job).into()),
            model: worker.model.name.clone(),
            model_version: worker.model.version.unwrap_or_default(),
            weights_id: worker.model.weights_id.clone(),
            package_id: Some(self.package_id.clone()),
            worker_id: worker.worker_id.clone(),
            incarnation: worker.incarnation.clone(),
            attempt: job.attempt,
            status,
            body,
            scored_at_ms: answered.at_ms,
        };
        SeenResult {
            at_ms: answered.at_ms,
            key: result.may_be_stored().then(|| hex_of::<32>(random)),
            trace_id: trace_id(random),
            result,
        }
    }

    fn context(&self, job: &Job) -> Value {
        let epoch = ("epoch_id".into(), job.epoch.into());
        let name = || self.miners[job.miner].name.as_str().into();
        Value::Map(match job.fate {
            Fate::Measured | Fate::Merged(_) => vec![epoch],
            Fate::Scored | Fate::Ended(_) | Fate::Unavailable => {
                vec![("miner_id".into(), name()), epoch]
            }
        })
    }

    fn body(
        &mut self,
        job: &Job,
        worker: &Record,
        answered: Answered,
        random: &mut StdRng,
    ) -> (Status, Body) {
        match job.fate {
            Fate::Measured => {
                let loss = Body::Loss(LossBody {
                    loss: LOSS + 0.002 * normal(random),
                    windows: WINDOWS,
                    tokens: WINDOWS * TARGETS,
                    plan: self.plan(job.epoch),
                });
                (Status::Scored, loss)
            }
            Fate::Scored => {
                let score = self.score(job, worker, answered, random);
                (Status::Scored, Body::Score(Box::new(score)))
            }
            Fate::Merged(scene) => {
                let plan = merges::plan(job.epoch);
                let says = (worker, plan, answered.timings);
                merges::answer(scene, &self.miners, says, random)
            }
            Fate::Ended(code) => ended(code, random),
            Fate::Unavailable => ended(Code::CandidateUnavailable, random),
        }
    }

    fn score(
        &mut self,
        job: &Job,
        worker: &Record,
        answered: Answered,
        random: &mut StdRng,
    ) -> ScoreBody {
        let (delta, sketch) = self.update(job, answered.at_ms, random);
        let stderr = (0.12 * delta.abs() + 4e-5) * random.random_range(0.7..1.4);
        let loss_before = LOSS + 2e-4 * (job.epoch % 7) as f64;
        ScoreBody {
            score: delta.max(0.0),
            delta,
            stderr: Some(stderr),
            ci95: Some([delta - 2.0 * stderr, delta + 2.0 * stderr]),
            loss_before,
            loss_after: loss_before - delta,
            windows: WINDOWS,
            tokens: WINDOWS * TARGETS,
            plan: self.plan(job.epoch),
            candidate: facts(&sketch, random),
            execution_provider: worker.engine.execution_provider.clone(),
            device: worker.engine.device.clone(),
            precision: worker.engine.precision.clone().unwrap_or_default(),
            timings_ms: answered.timings,
            stopped: None,
        }
    }

    /// What an update gains, and its sketch.
    fn update(&mut self, job: &Job, at_ms: u64, random: &mut StdRng) -> (f64, Sketch) {
        let miner = &self.miners[job.miner];
        let gain = GAIN * miner.skill * (0.6 * normal(random)).exp();
        let copied =
            |update: &&Update| update.epoch == job.epoch && update.at_ms + COPIED_MS <= at_ms;
        let (delta, sketch) = match (miner.habit, self.leading.iter().rfind(copied)) {
            (Habit::Copied, Some(update)) => (
                update.gain * random.random_range(0.97..1.0),
                touched(update.sketch, random),
            ),
            (Habit::Noisy, _) => (2e-5 * normal(random), sketch(random)),
            (Habit::Inverted, _) => (-gain, sketch(random)),
            (
                Habit::Honest | Habit::Copied | Habit::Malformed | Habit::Altered | Habit::Gone,
                _,
            ) => (gain, sketch(random)),
        };
        if job.miner == LEADER {
            keep(&mut self.leading, LEADING);
            self.leading.push_back(Update {
                at_ms,
                epoch: job.epoch,
                sketch,
                gain: delta,
            });
        }
        (delta, sketch)
    }

    /// The windows change with the epoch.
    fn plan(&mut self, epoch: u64) -> String {
        if self.plan.0 != epoch {
            self.plan = (epoch, digest(&format!("epoch {epoch}")));
        }
        self.plan.1.clone()
    }
}

fn ended(code: Code, random: &mut StdRng) -> (Status, Body) {
    let error = Failure::new(code, message(code, random)).to_error();
    (code.status(), Body::Error { error })
}

/// What a worker says of a refused or failed job.
fn message(code: Code, random: &mut StdRng) -> String {
    let known = MESSAGES.iter().find(|(known, _)| *known == code);
    let text = known.map_or("", |(_, text)| *text);
    if code == Code::CandidateDigestMismatch {
        return format!("{text} {}", hex_of::<32>(random));
    }
    text.to_owned()
}

const MESSAGES: [(Code, &str); 6] = [
    (
        Code::CandidateMalformed,
        "blocks.3.mlp.up.weight: zlib: corrupt deflate stream",
    ),
    (
        Code::CandidateDigestMismatch,
        "sha256: the bytes as fetched have",
    ),
    (
        Code::CandidateShapeMismatch,
        "blocks.11.attention.query.weight: [2048, 1024], the model has [2048, 2048]",
    ),
    (
        Code::CandidateNonFinite,
        "blocks.0.mlp.down.weight: value 88213 is NaN",
    ),
    (
        Code::DeadlineExceeded,
        "deadline_ms passed while the job waited",
    ),
    (
        Code::CandidateUnavailable,
        "https://updates.example/miner-14/latest.safetensors: connection refused",
    ),
];

pub(super) fn facts(sketch: &Sketch, random: &mut StdRng) -> CandidateFacts {
    let entries = PER_BIN * SKETCH_BINS as u64 + random.random_range(0..100_000);
    CandidateFacts {
        sha256: hex_of::<32>(random),
        tensors: 146,
        entries,
        effective_entries: entries - random.random_range(0..20_000),
        l2_norm: random.random_range(0.4..1.3),
        sketch: sketch.iter().map(|value| Some(*value)).collect(),
    }
}

/// Of weights that nobody else has chosen.
pub(super) fn sketch(random: &mut StdRng) -> Sketch {
    std::array::from_fn(|_| random.random_range(0..(1_u64 << 53) / PER_BIN))
}

/// Of nearly the same weights.
fn touched(mut sketch: Sketch, random: &mut StdRng) -> Sketch {
    for _ in 0..TOUCHED {
        sketch[random.random_range(0..SKETCH_BINS)] /= 2;
    }
    sketch
}

/// Most jobs belong to a trace.
fn trace_id(random: &mut StdRng) -> Option<String> {
    random.random_bool(0.9).then(|| hex_of::<16>(random))
}

/// So many bytes.
fn hex_of<const N: usize>(random: &mut StdRng) -> String {
    let mut bytes = [0; N];
    random.fill(&mut bytes[..]);
    hex::encode(bytes)
}

/// A digest that says the same for the same text.
pub(super) fn digest(text: &str) -> String {
    hex::encode(Sha256::digest(text))
}

/// Normally distributed, with mean 0 and deviation 1.
pub(super) fn normal(random: &mut StdRng) -> f64 {
    let (u, v): (f64, f64) = (random.random(), random.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (v * std::f64::consts::TAU).cos()
}
