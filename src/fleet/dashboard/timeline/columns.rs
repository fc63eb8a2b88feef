//! The timeline as a page gets it: in columns, as charts take them.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Serialize, Serializer};
use strum::VariantArray;

use super::candidate::Candidate;
use super::{Point, Range, STAGES, Sample, Stages};
use crate::fleet::dashboard::verdict::Class;
use crate::fleet::observer::Queues;

/// Versions that have a curve of their own; the workers of older ones are summed up.
const VERSIONS: usize = 8;

/// Points as columns, oldest first.
#[derive(Debug, Serialize)]
pub(in crate::fleet::dashboard) struct Columns {
    range: Range,
    every_ms: u64,
    /// Unix seconds.
    at: Vec<u64>,
    jobs_per_s: Vec<Option<f64>>,
    busy: Vec<Option<f64>>,
    alive: Vec<Option<usize>>,
    ready: Vec<Option<usize>>,
    waiting: Vec<Option<u32>>,
    retry: Vec<Option<u32>>,
    dead: Vec<Option<u32>>,
    oldest_s: Vec<Option<f64>>,
    workers_p50: Vec<Option<f64>>,
    workers_p95: Vec<Option<f64>>,
    stages: BTreeMap<&'static str, Percentiles>,
    classes: BTreeMap<&'static str, Vec<u64>>,
    versions: BTreeMap<String, Vec<Option<usize>>>,
    /// Of each interval the best, the worst and the last.
    #[serde(serialize_with = "rows")]
    candidates: Vec<Arc<Candidate>>,
}

fn rows<S: Serializer>(candidates: &[Arc<Candidate>], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(candidates.iter().map(Arc::as_ref))
}

#[derive(Debug, Serialize)]
struct Percentiles {
    p50: Vec<Option<f64>>,
    p95: Vec<Option<f64>>,
}

impl Columns {
    pub(super) fn of(range: Range, points: &[&Point]) -> Self {
        let fleet = |of: &dyn Fn(&Sample) -> Option<f64>| -> Vec<Option<f64>> {
            let of = |point: &&Point| point.fleet.as_ref().and_then(of).map(short);
            points.iter().map(of).collect()
        };
        let count = |of: &dyn Fn(&Sample) -> usize| -> Vec<Option<usize>> {
            points.iter().map(|p| p.fleet.as_ref().map(of)).collect()
        };
        let queue = |of: &dyn Fn(Queues) -> u32| -> Vec<Option<u32>> {
            let queues = |point: &&Point| point.fleet.as_ref().and_then(|fleet| fleet.queues);
            points.iter().map(|point| queues(point).map(of)).collect()
        };
        #[expect(clippy::cast_precision_loss, reason = "milliseconds of hours")]
        let seconds = |ms: u64| ms as f64 / 1e3;
        Self {
            range,
            every_ms: range.every_ms(),
            at: points.iter().map(|point| point.at_ms / 1000).collect(),
            jobs_per_s: fleet(&|s| s.jobs_per_s),
            busy: fleet(&|s| s.busy),
            alive: count(&|s| s.alive),
            ready: count(&|s| s.ready),
            waiting: queue(&|q| q.jobs),
            retry: queue(&|q| q.retry),
            dead: queue(&|q| q.dead),
            oldest_s: fleet(&|s| s.oldest_ms.map(seconds)),
            workers_p50: fleet(&|s| s.workers_p50),
            workers_p95: fleet(&|s| s.workers_p95),
            stages: stages(points),
            classes: classes(points),
            versions: versions(points),
            candidates: points
                .iter()
                .flat_map(|point| point.candidates.clone())
                .collect(),
        }
    }
}

fn stages(points: &[&Point]) -> BTreeMap<&'static str, Percentiles> {
    let column = |of: &dyn Fn(&Stages) -> f32| {
        let of = |point: &&Point| point.stages.as_ref().map(|stages| short(of(stages).into()));
        points.iter().map(of).collect()
    };
    let stage = |(at, name): (usize, &&'static str)| {
        let percentiles = Percentiles {
            p50: column(&|stages| stages[at].0),
            p95: column(&|stages| stages[at].1),
        };
        (*name, percentiles)
    };
    STAGES.iter().enumerate().map(stage).collect()
}

fn classes(points: &[&Point]) -> BTreeMap<&'static str, Vec<u64>> {
    let count = |class: &Class, point: &&Point| point.classes.get(class).copied().unwrap_or(0);
    let column = |class: &Class| {
        (
            class.word(),
            points.iter().map(|p| count(class, p)).collect(),
        )
    };
    Class::VARIANTS.iter().map(column).collect()
}

/// A column for each of the newest versions, one for those before them, one for workers without a model.
fn versions(points: &[&Point]) -> BTreeMap<String, Vec<Option<usize>>> {
    let fleets = || points.iter().map(|point| point.fleet.as_ref());
    let seen = fleets().flatten().flat_map(|fleet| fleet.versions.keys());
    let mut seen: Vec<u64> = seen.copied().flatten().collect();
    seen.sort_unstable_by(|a, b| b.cmp(a));
    seen.dedup();
    let oldest = seen
        .get(VERSIONS.saturating_sub(1))
        .or(seen.last())
        .copied();
    let column = |version: Option<u64>| match version {
        None => "none".to_owned(),
        Some(version) if Some(version) < oldest => "older".to_owned(),
        Some(version) => version.to_string(),
    };
    let mut columns: BTreeMap<String, Vec<Option<usize>>> = BTreeMap::new();
    for (at, fleet) in fleets().enumerate() {
        for (version, workers) in fleet.iter().flat_map(|fleet| &fleet.versions) {
            let fresh = || fleets().map(|fleet| fleet.map(|_| 0)).collect();
            let of = columns.entry(column(*version)).or_insert_with(fresh);
            *of[at].get_or_insert(0) += workers;
        }
    }
    columns
}

/// Four digits: enough for a chart, and a third of the bytes.
pub(in crate::fleet::dashboard) fn short(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}
