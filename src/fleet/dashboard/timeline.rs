//! The fleet over time, from minutes to a day: what the charts draw. Every range has its own points, so a
//! day costs no more than ten minutes.

mod candidate;
mod columns;
mod range;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use candidate::{Candidate, Few};
use hdrhistogram::Histogram;

pub(super) use columns::{Columns, short};
pub(super) use range::Range;

use super::verdict::{Class, Verdict};
use crate::fleet::observer::Queues;
use crate::protocol::result::Timings;

/// Stages of a scored job, in order.
pub(super) const STAGES: [&str; 7] = [
    "queued", "fetch", "decode", "apply", "forward", "restore", "total",
];

/// Median and 95th percentile of each of the [`STAGES`], milliseconds.
type Stages = [(f32, f32); STAGES.len()];

/// The times of the [`STAGES`].
pub(super) fn stage_times(timings: &Timings) -> [f64; STAGES.len()] {
    [
        timings.queued,
        timings.fetch,
        timings.decode,
        timings.apply,
        timings.forward,
        timings.restore,
        timings.total,
    ]
}

/// Intervals by which a clock may be set back before what lies ahead is forgotten.
const MOST_BACK: u64 = 10;

/// The fleet at one look.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sample {
    pub(super) alive: usize,
    pub(super) ready: usize,
    /// None: this was the first look.
    pub(super) jobs_per_s: Option<f64>,
    /// Share of the ready workers that computed, 0 to 1.
    pub(super) busy: Option<f64>,
    pub(super) queues: Option<Queues>,
    /// Age of the oldest waiting job; 0 = none waits.
    pub(super) oldest_ms: Option<u64>,
    /// Median of the workers' medians.
    pub(super) workers_p50: Option<f64>,
    /// The slowest worker's.
    pub(super) workers_p95: Option<f64>,
    /// Workers by the version that they have.
    pub(super) versions: BTreeMap<Option<u64>, usize>,
}

/// All ranges.
#[derive(Debug)]
pub(super) struct Timeline {
    tiers: [Tier; 4],
}

/// One range.
#[derive(Debug)]
struct Tier {
    range: Range,
    points: VecDeque<Point>,
    open: Interval,
}

/// A point that is not complete yet.
#[derive(Debug, Default)]
struct Interval {
    /// 0 = nothing was noted.
    start_ms: u64,
    samples: Vec<Sample>,
    classes: BTreeMap<Class, u64>,
    candidates: Few,
    stages: Option<Box<[Histogram<u32>; STAGES.len()]>>,
}

/// An interval that is over. Means, but for what must not vanish from a day's view: the fewest that were
/// ready, the longest queues and the oldest job.
#[derive(Debug, Clone, Default)]
struct Point {
    at_ms: u64,
    /// None: nobody saw the fleet.
    fleet: Option<Sample>,
    classes: BTreeMap<Class, u64>,
    candidates: Vec<Arc<Candidate>>,
    stages: Option<Stages>,
}

impl Default for Timeline {
    fn default() -> Self {
        let ranges = [
            Range::TenMinutes,
            Range::Hour,
            Range::EightHours,
            Range::Day,
        ];
        Self {
            tiers: ranges.map(|range| Tier {
                range,
                points: VecDeque::new(),
                open: Interval::default(),
            }),
        }
    }
}

impl Timeline {
    /// Notes a look; none = the fleet could not be seen.
    pub(super) fn look(&mut self, at_ms: u64, sample: Option<&Sample>) {
        for tier in &mut self.tiers {
            let open = tier.at(at_ms);
            open.samples.extend(sample.cloned());
        }
    }

    /// Notes results like this one.
    pub(super) fn judge(&mut self, submission_id: &str, verdict: &Verdict, count: u64) {
        let candidate = Candidate::of(submission_id, verdict).map(Arc::new);
        for tier in &mut self.tiers {
            let open = tier.at(verdict.at_ms);
            *open.classes.entry(verdict.class).or_default() += count;
            if let Some(timings) = &verdict.timings_ms {
                open.time(timings);
            }
            if let Some(candidate) = &candidate {
                open.candidates.note(candidate);
            }
        }
    }

    /// When each range's last point ended.
    pub(super) fn last(&self) -> BTreeMap<&'static str, u64> {
        let last = |tier: &Tier| (tier.range.into(), tier.points.back().map_or(0, |p| p.at_ms));
        self.tiers.iter().map(last).collect()
    }

    /// The points after a time.
    pub(super) fn columns(&self, range: Range, after_ms: u64) -> Columns {
        let tier = self.tiers.iter().find(|tier| tier.range == range);
        let points = tier.into_iter().flat_map(|tier| &tier.points);
        let points: Vec<&Point> = points.filter(|point| point.at_ms > after_ms).collect();
        Columns::of(range, &points)
    }
}

impl Tier {
    /// The interval that holds a time; an earlier one is closed. A clock that was set back a little goes on
    /// in the open interval; set back further, what lies ahead is forgotten.
    fn at(&mut self, at_ms: u64) -> &mut Interval {
        let every = self.range.every_ms();
        let start = at_ms - at_ms % every;
        if start > self.open.start_ms {
            let done = std::mem::replace(&mut self.open, Interval::starting(start));
            if done.start_ms > 0 {
                self.points.push_back(done.point(done.start_ms + every));
            }
            let surplus = self.points.len().saturating_sub(self.range.points());
            self.points.drain(..surplus);
        } else if start + MOST_BACK * every < self.open.start_ms {
            self.points.retain(|point| point.at_ms <= start);
            self.open = Interval::starting(start);
        }
        &mut self.open
    }
}

impl Interval {
    fn starting(start_ms: u64) -> Self {
        Self {
            start_ms,
            ..Self::default()
        }
    }

    /// In hundredths of a millisecond, to 1 %.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float becomes the nearest whole number there is"
    )]
    fn time(&mut self, timings: &Timings) {
        if self.stages.is_none() {
            let empty = || Histogram::new_with_bounds(1, 360_000_000, 2).ok();
            let made: Option<Vec<_>> = STAGES.iter().map(|_| empty()).collect();
            self.stages = made.and_then(|made| made.try_into().ok());
        }
        let times = stage_times(timings);
        for (stage, ms) in self.stages.iter_mut().flat_map(|s| s.iter_mut()).zip(times) {
            stage.saturating_record((ms * 100.0).round() as u64);
        }
    }

    fn point(&self, at_ms: u64) -> Point {
        #[expect(clippy::cast_precision_loss, reason = "to 1 %")]
        let at = |stage: &Histogram<u32>, share| stage.value_at_quantile(share) as f32 / 100.0;
        let stages = self.stages.as_ref();
        Point {
            at_ms,
            fleet: Sample::over(&self.samples),
            classes: self.classes.clone(),
            candidates: self.candidates.list(),
            stages: stages.map(|s| s.each_ref().map(|stage| (at(stage, 0.5), at(stage, 0.95)))),
        }
    }
}

impl Sample {
    /// What stands for all of these.
    fn over(samples: &[Self]) -> Option<Self> {
        let last = samples.last()?;
        let mean = |of: &dyn Fn(&Self) -> Option<f64>| {
            let values: Vec<f64> = samples.iter().filter_map(of).collect();
            #[expect(clippy::cast_precision_loss, reason = "at most 300 looks")]
            let count = values.len() as f64;
            (count > 0.0).then(|| values.iter().sum::<f64>() / count)
        };
        let queues = samples.iter().filter_map(|sample| sample.queues);
        Some(Self {
            alive: last.alive,
            ready: samples.iter().map(|s| s.ready).min().unwrap_or_default(),
            jobs_per_s: mean(&|s| s.jobs_per_s),
            busy: mean(&|s| s.busy),
            queues: queues.reduce(|a, b| Queues {
                jobs: a.jobs.max(b.jobs),
                retry: a.retry.max(b.retry),
                dead: a.dead.max(b.dead),
                consumers: a.consumers.min(b.consumers),
            }),
            oldest_ms: samples.iter().filter_map(|s| s.oldest_ms).max(),
            workers_p50: mean(&|s| s.workers_p50),
            workers_p95: samples
                .iter()
                .filter_map(|s| s.workers_p95)
                .reduce(f64::max),
            versions: last.versions.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::dashboard::made::{rejected, scored};
    use serde_json::json;

    /// A multiple of every range's interval.
    const START: u64 = 600_000_000;

    fn sample(ready: usize, waiting: u32, version: Option<u64>) -> Sample {
        Sample {
            alive: 10,
            ready,
            jobs_per_s: Some(2.0),
            queues: Some(Queues {
                jobs: waiting,
                ..Queues::default()
            }),
            versions: [(version, 10)].into(),
            ..Sample::default()
        }
    }

    #[test]
    fn what_must_not_vanish_from_a_days_view_is_in_it() {
        let mut timeline = Timeline::default();
        for second in 0..=300_u64 {
            let bad = second == 77;
            let look = sample(if bad { 0 } else { 10 }, if bad { 500 } else { 0 }, Some(7));
            timeline.look(START + second * 1000, Some(&look));
        }
        let day = serde_json::to_value(timeline.columns(Range::Day, 0)).unwrap();
        assert_eq!(day["at"], json!([START / 1000 + 300]));
        assert_eq!(
            (&day["ready"], &day["waiting"]),
            (&json!([0]), &json!([500]))
        );
        assert_eq!(day["jobs_per_s"], json!([2.0]));
        let minutes = timeline.columns(Range::TenMinutes, START + 290_000);
        let minutes = serde_json::to_value(minutes).unwrap();
        let after: Vec<_> = (146..=150).map(|at| START / 1000 + at * 2).collect();
        assert_eq!(minutes["at"], json!(after));
    }

    #[test]
    fn stages_have_percentiles_and_classes_counts() {
        let mut timeline = Timeline::default();
        let good = Verdict::of(&scored(START, json!({})));
        for n in 1..=100 {
            let forward = f64::from(n);
            let timings = Timings {
                forward,
                ..Timings::default()
            };
            let timings_ms = Some(timings);
            timeline.judge(
                "s",
                &Verdict {
                    timings_ms,
                    ..good.clone()
                },
                1,
            );
        }
        timeline.judge("r", &Verdict::of(&rejected(START, json!({}))), 3);
        timeline.look(START + 2000, None);
        let told = serde_json::to_value(timeline.columns(Range::TenMinutes, 0)).unwrap();
        let near = |stage: &str, share: &str, value: f64| {
            let found = told["stages"][stage][share][0].as_f64().unwrap();
            assert!(
                (found - value).abs() <= 0.01 * value + 0.011,
                "{stage} {found}"
            );
        };
        near("forward", "p50", 50.0);
        near("forward", "p95", 95.0);
        near("fetch", "p95", 0.0);
        let counts = ["better", "rejected", "worse"].map(|class| told["classes"][class].clone());
        assert_eq!(counts, [json!([100]), json!([3]), json!([0])]);
    }

    #[test]
    fn an_intervals_best_worst_and_last_candidate_stand_for_it() {
        let mut timeline = Timeline::default();
        for (n, delta) in [0.1, -0.5, 0.2, 0.7, 0.3].into_iter().enumerate() {
            let seen = scored(START + n as u64, json!({"delta": delta}));
            timeline.judge(&n.to_string(), &Verdict::of(&seen), 1);
        }
        timeline.judge("r", &Verdict::of(&rejected(START + 9, json!({}))), 1);
        let only = scored(START + 2000, json!({"delta": 0.4}));
        timeline.judge("only", &Verdict::of(&only), 1);
        timeline.look(START + 4000, None);
        let told = serde_json::to_value(timeline.columns(Range::TenMinutes, 0)).unwrap();
        let rows = told["candidates"].as_array().unwrap();
        let names: Vec<&str> = rows.iter().map(|row| row[4].as_str().unwrap()).collect();
        assert_eq!(names, ["1", "3", "4", "only"]);
    }

    #[test]
    fn of_many_versions_the_newest_have_a_curve_each() {
        let mut timeline = Timeline::default();
        for version in 0..=11_u64 {
            let has = (version > 0).then_some(version);
            timeline.look(START + version * 2000, Some(&sample(1, 0, has)));
        }
        let told = serde_json::to_value(timeline.columns(Range::TenMinutes, 0)).unwrap();
        let names: Vec<&String> = told["versions"].as_object().unwrap().keys().collect();
        let expected = ["10", "3", "4", "5", "6", "7", "8", "9", "none", "older"];
        assert_eq!(names, expected);
        assert_eq!(told["versions"]["older"][1], 10);
        assert_eq!(told["versions"]["none"][1], 0);
    }

    #[test]
    fn a_clock_that_was_set_back_goes_on_where_it_was() {
        let mut timeline = Timeline::default();
        for at_ms in [START + 10_000, START, START + 12_000] {
            timeline.look(at_ms, Some(&sample(1, 0, None)));
        }
        assert_eq!(timeline.last()["10m"], START + 12_000);
        // An hour back: not an hour without a point.
        for at_ms in [START - 3_600_000, START - 3_597_000] {
            timeline.look(at_ms, Some(&sample(1, 0, None)));
        }
        assert_eq!(timeline.last()["10m"], START - 3_598_000);
    }

    #[test]
    fn a_past_is_looked_at_as_finely_as_each_range_needs() {
        let now = START + 1234;
        let looks: Vec<u64> = Range::looks_before(now).collect();
        assert!(looks.is_sorted() && looks.len() < 1500, "{}", looks.len());
        let mut timeline = Timeline::default();
        for at_ms in looks {
            timeline.look(at_ms, Some(&sample(1, 0, None)));
        }
        timeline.look(now, None);
        for (range, points) in [
            (Range::TenMinutes, 300),
            (Range::Hour, 360),
            (Range::Day, 287),
        ] {
            let told = serde_json::to_value(timeline.columns(range, 0)).unwrap();
            let alive = told["alive"].as_array().unwrap();
            let seen = alive.iter().filter(|alive| !alive.is_null()).count();
            assert!(seen >= points - 1, "{range:?} {seen}");
        }
    }
}
