//! Merges of the simulated fleet: what members are worth together, and each beside the others, as if the loss were
//! quadratic in the weights.

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::json;

use super::miners::{Habit, LEADER, Miner};
use super::verdicts::{GAIN, LOSS, TARGETS, digest, facts, normal, sketch};
use crate::protocol::failure::{Code, Failure, Status};
use crate::protocol::heartbeat::Record;
use crate::protocol::merge::{Change, Contribution, GapBody, Joint, MergeBody, MergeMember};
use crate::protocol::result::{Body, CandidateFacts, Timings};

/// Windows of a merge: fewer than a candidate's, for it takes many passes.
pub(super) const WINDOWS: u64 = 16;
/// 97.5 % of Student's t for so many windows.
const STUDENT: f64 = 2.131;
/// Members of most merges.
const MEMBERS: usize = 10;
/// What two members gain twice, of the geometric mean of what they gain alone; and two copies.
const SHARED: f64 = 0.02;
const COPIED: f64 = 0.85;

/// What a merge is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scene {
    /// Two members are copies of a third.
    Copies,
    /// Steps that are far too large.
    LargeGap,
    /// Some members are left out.
    LeftOut,
    /// Nobody may be left out, and one would be.
    Refused,
}

/// In the order in which they come, again and again.
const SCENES: [Scene; 4] = [
    Scene::Copies,
    Scene::LargeGap,
    Scene::LeftOut,
    Scene::Refused,
];

impl Scene {
    /// Of the merge with this number.
    pub(super) fn of(number: u64) -> Self {
        SCENES[number as usize % SCENES.len()]
    }

    /// Passes over the windows: all members, each alone, and all but each. None where nothing is measured.
    pub(super) fn passes(self) -> u64 {
        match self {
            Self::Copies | Self::LargeGap | Self::LeftOut => 2 * MEMBERS as u64 + 1,
            Self::Refused => 0,
        }
    }

    fn wants(self, habit: Habit) -> bool {
        match habit {
            Habit::Honest | Habit::Noisy | Habit::Inverted => true,
            Habit::Copied => self == Self::Copies,
            Habit::Malformed | Habit::Altered | Habit::Gone => false,
        }
    }
}

/// A member that is merged.
struct Merged {
    id: String,
    gain: f64,
    /// The leader, or who copies it.
    alike: bool,
}

/// What a worker answers.
pub(super) fn answer(
    scene: Scene,
    miners: &[Miner],
    (worker, plan, timings): (&Record, String, Timings),
    random: &mut StdRng,
) -> (Status, Body) {
    match scene {
        Scene::Copies | Scene::LargeGap | Scene::LeftOut => {
            let merged = merged(scene, miners, random);
            let body = MergeBody {
                plan,
                execution_provider: worker.engine.execution_provider.clone(),
                device: worker.engine.device.clone(),
                precision: worker.engine.precision.clone().unwrap_or_default(),
                timings_ms: timings,
                ..measured(scene, &merged, miners, random)
            };
            (Status::Scored, Body::Merge(Box::new(body)))
        }
        Scene::Refused => refused(miners),
    }
}

/// Miners of whom nobody knows before what they are worth; with copies, also the one that is copied.
fn merged(scene: Scene, miners: &[Miner], random: &mut StdRng) -> Vec<Merged> {
    let wanted = miners.iter().enumerate();
    let wanted = wanted.filter(|(_, miner)| scene.wants(miner.habit));
    let mut places: Vec<usize> = wanted.map(|(place, _)| place).collect();
    let must = |place: usize| scene == Scene::Copies && is_alike(place, miners);
    while places.len() > MEMBERS {
        let at = random.random_range(0..places.len());
        if !must(places[at]) {
            places.remove(at);
        }
    }
    let leading = gain(&miners[LEADER], random);
    let member = |place: usize| {
        let alike = is_alike(place, miners);
        Merged {
            id: id(place),
            gain: match alike {
                true => leading * random.random_range(0.97..1.0),
                false => gain(&miners[place], random),
            },
            alike,
        }
    };
    places.into_iter().map(member).collect()
}

/// Miners' names may have characters that names of members must not.
fn id(place: usize) -> String {
    format!("miner-{:02}", place + 1)
}

fn is_alike(place: usize, miners: &[Miner]) -> bool {
    place == LEADER || miners[place].habit == Habit::Copied
}

/// What a miner's update gains with its weight.
fn gain(miner: &Miner, random: &mut StdRng) -> f64 {
    let gain = GAIN * miner.skill * (0.3 * normal(random)).exp() / 2.0;
    match miner.habit {
        Habit::Noisy => 2e-5 * normal(random),
        Habit::Inverted => -gain,
        Habit::Honest | Habit::Copied | Habit::Malformed | Habit::Altered | Habit::Gone => gain,
    }
}

/// The numbers, but for what the worker says of itself.
fn measured(scene: Scene, merged: &[Merged], miners: &[Miner], random: &mut StdRng) -> MergeBody {
    let mut members: Vec<MergeMember> = merged
        .iter()
        .map(|member| scored(member, twice(member, merged), random))
        .collect();
    let contributions = || { members.iter() }.filter_map(|member| member.contribution);
    let sum: f64 = contributions().map(|contribution| contribution.value).sum();
    let largest = contributions().map(|c| c.value.abs()).fold(0.0, f64::max);
    let large = scene == Scene::LargeGap;
    let gap = if large { -0.6 } else { 0.004 } * largest;
    let (delta, stderr) = (sum + gap, 0.05 * sum.abs());
    if scene == Scene::LeftOut {
        members.extend(left_out(miners));
        members.sort_by(|a, b| a.id.cmp(&b.id));
    }
    MergeBody {
        joint: Joint {
            delta,
            stderr: Some(stderr),
            ci95: Some(around(delta, stderr)),
            loss_before: LOSS,
            loss_after: LOSS - delta,
        },
        windows: WINDOWS,
        tokens: WINDOWS * TARGETS,
        plan: String::new(),
        passes: scene.passes(),
        members,
        gap: GapBody {
            value: gap,
            stderr: Some(0.01 * largest),
            large,
        },
        execution_provider: String::new(),
        device: String::new(),
        precision: String::new(),
        timings_ms: Timings::default(),
    }
}

/// What a member gains that others gain too.
fn twice(member: &Merged, merged: &[Merged]) -> f64 {
    let others = merged.iter().filter(|other| other.id != member.id);
    let with = |other: &Merged| {
        let share = if member.alike && other.alike {
            COPIED
        } else {
            SHARED
        };
        share * (member.gain * other.gain).abs().sqrt()
    };
    others.map(with).sum()
}

fn scored(member: &Merged, twice: f64, random: &mut StdRng) -> MergeMember {
    let alone = member.gain;
    let last = alone - twice;
    let value = f64::midpoint(alone, last);
    let mut stderr = |delta: f64| (0.06 * delta.abs() + 1e-5) * random.random_range(0.7..1.4);
    let error = stderr(value);
    MergeMember {
        id: member.id.clone(),
        status: Status::Scored,
        weight: 1.0 / MEMBERS as f64,
        error: None,
        alone: Some(Change {
            delta: alone,
            stderr: Some(stderr(alone)),
        }),
        last: Some(Change {
            delta: last,
            stderr: Some(stderr(last)),
        }),
        contribution: Some(Contribution {
            value,
            stderr: Some(error),
            ci95: Some(around(value, error)),
        }),
        candidate: Some(CandidateFacts {
            sketch: Vec::new(),
            ..facts(&sketch(random), random)
        }),
    }
}

fn around(value: f64, stderr: f64) -> [f64; 2] {
    [value - STUDENT * stderr, value + STUDENT * stderr]
}

/// Those whose updates do not parse.
fn malformed(miners: &[Miner]) -> impl Iterator<Item = String> {
    let malformed = miners.iter().enumerate();
    let malformed = malformed.filter(|(_, miner)| miner.habit == Habit::Malformed);
    malformed.map(|(place, _)| id(place))
}

fn left_out(miners: &[Miner]) -> impl Iterator<Item = MergeMember> {
    malformed(miners).map(|id| MergeMember {
        status: Code::CandidateMalformed.status(),
        weight: 1.0 / MEMBERS as f64,
        error: Some(Failure::new(Code::CandidateMalformed, MALFORMED).to_error()),
        candidate: None,
        alone: None,
        last: None,
        contribution: None,
        id,
    })
}

const MALFORMED: &str = "blocks.3.mlp.up.weight: zlib: corrupt deflate stream";

/// A merge of which nobody may be left out.
fn refused(miners: &[Miner]) -> (Status, Body) {
    let code = Code::CandidateMalformed;
    let ids: Vec<String> = malformed(miners).collect();
    let first = ids.first().map_or("", String::as_str);
    let named = |id: &String| json!({"id": id, "code": code.as_str()});
    let members: Vec<serde_json::Value> = ids.iter().map(named).collect();
    let failure = Failure::new(code, format!("member {first}: {MALFORMED}"));
    let error = failure.with("members", members).to_error();
    (code.status(), Body::Error { error })
}

/// The digest of a merge's windows.
pub(super) fn plan(epoch: u64) -> String {
    digest(&format!("merge of epoch {epoch}"))
}
