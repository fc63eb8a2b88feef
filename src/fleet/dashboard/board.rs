//! What the dashboard has seen since it started, and what it makes of it. No I/O.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::contributors::{self, Contributors};
use super::demo::{Demo, Moment, Past};
use super::jobs::Jobs;
use super::merges::{self, Merges};
use super::news::{Change, Marks, News, ParkedJob};
use super::roster::{self, Roster};
use super::stored::Question;
use super::timeline::{Range, Sample, Timeline, short};
use super::verdict::{Class, SeenResult, Verdict};
use crate::fleet::findings::{Finding, Losses, Lost, findings};
use crate::fleet::observer::{Queues, View};
use crate::fleet::waiting::{Oldest, Waiting};
use crate::store::StreamEntry;
use crate::util::clock::unix_ms;

/// Looks that a demonstration begins with, and the time between two of them.
const DEMO_LOOKS: u64 = 30;
const DEMO_EVERY_MS: u64 = 2000;

/// Everything that is remembered.
#[derive(Debug, Default)]
pub(super) struct Board {
    /// By Redis' clock; 0 = not looked yet.
    at_ms: u64,
    /// The same moment by this machine's clock.
    looked_ms: u64,
    /// Simulated workers, if it is a demonstration.
    demo: Option<usize>,
    /// Why the fleet is unknown.
    unknown: Option<String>,
    model: Option<String>,
    queues: Option<Queues>,
    queues_unknown: Option<String>,
    watching: Watching,
    roster: Roster,
    waiting: Waiting,
    oldest: Option<Oldest>,
    losses: Losses,
    findings: Vec<Finding>,
    sample: Sample,
    pub(super) timeline: Timeline,
    pub(super) news: News,
    jobs: Jobs,
    merges: Merges,
    contributors: Option<Contributors>,
}

/// Whether results and dead-lettered jobs are seen.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Watching {
    /// Since when.
    watching_since_ms: Option<u64>,
    /// Why not.
    unwatched: Option<String>,
}

/// What a page is told every second.
#[derive(Debug, Serialize)]
pub(super) struct Now<'a> {
    fleet_rev: u64,
    at_ms: u64,
    demo: Option<usize>,
    model: Option<&'a str>,
    unknown: Option<&'a str>,
    queues: Option<Queues>,
    queues_unknown: Option<&'a str>,
    #[serde(flatten)]
    watching: &'a Watching,
    contributors: Option<&'a str>,
    totals: Totals,
    findings: &'a [Finding],
    #[serde(flatten)]
    workers: roster::Columns<'a>,
    lost: &'a [Lost],
    /// Results by class or code.
    verdicts: &'a BTreeMap<&'static str, u64>,
    classes: &'a BTreeMap<Class, u64>,
    news: Marks,
    /// How many were seen.
    merges: u64,
    timeline_at: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Serialize)]
struct Totals {
    alive: usize,
    ready: usize,
    /// 0 to 1.
    busy: Option<f64>,
    jobs_per_s: Option<f64>,
    p50_ms: Option<f64>,
    p95_ms: Option<f64>,
    oldest: Option<Oldest>,
}

/// What the board has of a job.
#[derive(Debug, Serialize)]
pub(super) struct SeenJob<'a> {
    /// The newest first.
    verdicts: Vec<&'a Verdict>,
    parked: Vec<&'a ParkedJob>,
    #[serde(flatten)]
    watching: &'a Watching,
}

/// The last merges.
#[derive(Debug, Serialize)]
pub(super) struct SeenMerges<'a> {
    /// The newest first.
    merges: Vec<merges::Row<'a>>,
    #[serde(flatten)]
    watching: &'a Watching,
}

impl Board {
    /// With contributors by this key of a job's context.
    pub(super) fn new(contributors: Option<String>) -> Self {
        Self {
            contributors: contributors.map(Contributors::new),
            ..Self::default()
        }
    }

    /// The model that is looked at, once it is known.
    pub(super) fn model(&self) -> Option<String> {
        self.model.clone()
    }

    /// Now, by Redis' clock as far as it is known.
    pub(super) fn now_ms(&self) -> u64 {
        match self.at_ms {
            0 => unix_ms(),
            at_ms => at_ms + unix_ms().saturating_sub(self.looked_ms),
        }
    }

    /// The fleet as it is now, and the changes of state since the last look, oldest first.
    pub(super) fn see(&mut self, view: &View, events: Vec<StreamEntry>) {
        (self.at_ms, self.looked_ms, self.unknown) = (view.at_ms, unix_ms(), None);
        self.model.clone_from(&view.model);
        (self.queues, self.queues_unknown) = match &view.queues {
            Some(Ok(queues)) => (Some(*queues), None),
            Some(Err(why)) => (None, Some(why.clone())),
            None => (None, None), // there are several models
        };
        self.roster.see(view);
        self.losses.see(view);
        self.losses.hear(&events);
        for event in events {
            self.news.events.push(Change::of(event));
        }
        self.oldest = self.waiting.see(view);
        self.findings = findings(view, self.oldest, self.losses.list());
        self.sample = Sample {
            queues: self.queues,
            oldest_ms: self.oldest_ms(),
            ..self.roster.sample()
        };
        self.timeline.look(view.at_ms, Some(&self.sample));
    }

    fn oldest_ms(&self) -> Option<u64> {
        match self.oldest {
            // The past of a demonstration knows better.
            Some(Oldest::AtLeast(_)) if self.demo.is_some() => None,
            Some(oldest) => Some(oldest.millis()),
            None => self.queues.map(|_| 0),
        }
    }

    /// Notes that the fleet is unknown. The last look is kept, marked as old.
    pub(super) fn lose_sight(&mut self, why: String) {
        self.unknown = Some(why);
        self.timeline.look(self.now_ms(), None);
    }

    /// The last event that is known.
    pub(super) fn last_event(&self) -> Option<String> {
        self.news
            .events
            .iter()
            .next_back()
            .map(|change| change.id.clone())
    }

    /// Notes since when results and dead-lettered jobs are received, or why they are not.
    pub(super) fn watches(&mut self, watching: Result<u64, String>) {
        self.watching = match watching {
            Ok(since_ms) => Watching {
                watching_since_ms: Some(since_ms),
                unwatched: None,
            },
            Err(why) => Watching {
                watching_since_ms: None,
                unwatched: Some(why),
            },
        };
    }

    /// Adds a result, unless it is another copy of one that was seen.
    pub(super) fn judge(&mut self, seen: &SeenResult) {
        let result = &seen.result;
        let verdict = Verdict::of(seen);
        let id = &result.submission_id;
        if self.jobs.has(id, &verdict) {
            return;
        }
        self.timeline.judge(id, &verdict, 1);
        self.roster.judge(id, &verdict);
        if let Some(contributors) = &mut self.contributors {
            contributors.judge(result, &verdict);
        }
        self.merges.note(result, &verdict);
        self.jobs.add(id, verdict);
    }

    /// Adds a dead-lettered job.
    pub(super) fn park(&mut self, parked: ParkedJob) {
        self.news.parked.push(parked);
    }

    pub(super) fn names(&self) -> roster::Names<'_> {
        self.roster.names()
    }

    pub(super) fn names_rev(&self) -> u64 {
        self.roster.rev
    }

    pub(super) fn now(&self) -> Now<'_> {
        let sample = &self.sample;
        // Without the fleet nobody has asked for the queues either.
        let seen = self.unknown.is_none();
        Now {
            fleet_rev: self.roster.rev,
            at_ms: self.at_ms,
            demo: self.demo,
            model: self.model.as_deref(),
            unknown: self.unknown.as_deref(),
            queues: self.queues.filter(|_| seen),
            queues_unknown: self.queues_unknown.as_deref().filter(|_| seen),
            watching: &self.watching,
            contributors: self.contributors.as_ref().map(Contributors::key),
            totals: Totals {
                alive: sample.alive,
                ready: sample.ready,
                busy: sample.busy.map(short),
                jobs_per_s: sample.jobs_per_s.map(short),
                p50_ms: sample.workers_p50.map(short),
                p95_ms: sample.workers_p95.map(short),
                oldest: self.oldest.filter(|_| seen),
            },
            findings: &self.findings,
            workers: self.roster.columns(self.at_ms),
            lost: self.losses.list(),
            verdicts: self.jobs.counts(),
            classes: self.jobs.classes(),
            news: self.news.marks(),
            merges: self.merges.seen,
            timeline_at: self.timeline.last(),
        }
    }

    pub(super) fn worker(&self, name: &str) -> Option<roster::Detail<'_>> {
        let newest_first = self.news.events.iter().rev();
        self.roster.detail(name, self.at_ms, newest_first)
    }

    pub(super) fn job(&self, id: &str) -> SeenJob<'_> {
        let parked = self.news.parked.iter().rev();
        SeenJob {
            verdicts: self.jobs.of(id).rev().collect(),
            parked: parked.filter(|job| job.submission_id == id).collect(),
            watching: &self.watching,
        }
    }

    pub(super) fn merges(&self) -> SeenMerges<'_> {
        SeenMerges {
            merges: self.merges.rows(),
            watching: &self.watching,
        }
    }

    pub(super) fn merge(&self, id: &str) -> Option<merges::Last<'_>> {
        self.merges.last(id)
    }

    /// Begins a demonstration: as if a fleet had been watched for a day. Only the charts know that day; the
    /// rest has seen the last moments of it.
    pub(super) fn begin_demo(&mut self, workers: usize, at_ms: u64) -> Demo {
        self.demo = Some(workers);
        let began_ms = at_ms.saturating_sub(DEMO_LOOKS * DEMO_EVERY_MS);
        let mut demo = Demo::new(workers, began_ms);
        let mut last_ms = 0;
        for past in demo.past(Range::looks_before(began_ms)) {
            self.remember(&past, past.at_ms.saturating_sub(last_ms));
            last_ms = past.at_ms;
        }
        self.watches(Ok(began_ms));
        for look in 0..DEMO_LOOKS {
            self.play(demo.step(began_ms + look * DEMO_EVERY_MS));
        }
        demo
    }

    /// A moment of the past for the charts. Its results stand for all since the moment before.
    fn remember(&mut self, past: &Past, since_ms: u64) {
        self.timeline.look(past.at_ms, Some(&past.sample));
        let all = past.sample.jobs_per_s.unwrap_or_default()
            * Duration::from_millis(since_ms).as_secs_f64();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "jobs of some minutes"
        )]
        let each = (all as u64).div_ceil(past.results.len().max(1) as u64);
        for result in &past.results {
            let verdict = Verdict::of(&SeenResult {
                at_ms: past.at_ms,
                result: result.clone(),
                key: None,
                trace_id: None,
            });
            self.timeline.judge(&result.submission_id, &verdict, each);
        }
    }

    /// Shows a moment of a demonstration.
    pub(super) fn play(&mut self, moment: Moment) {
        self.see(&moment.view, moment.events);
        for seen in &moment.results {
            self.judge(seen);
        }
        for parked in moment.parked {
            self.park(parked);
        }
    }

    /// What to ask Redis of a job.
    pub(super) fn question(&self, id: &str) -> Question {
        let seen = || self.jobs.of(id).rev();
        let versions = seen().map(|verdict| verdict.model_version);
        let served = self.sample.versions.keys().copied().flatten();
        Question {
            model: self.model(),
            submission_id: id.to_owned(),
            key: seen().find_map(|v| v.key.as_deref().map(str::to_owned)),
            versions: versions.chain(served).collect(),
        }
    }

    /// Who sends what, if that is asked for.
    pub(super) fn contributors(&self) -> Option<contributors::Table<'_>> {
        let contributors = self.contributors.as_ref()?;
        Some(contributors.table(self.watching.watching_since_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::dashboard::made::{fleet, merged, rejected, scored};
    use serde_json::{Value, json};

    const START: u64 = 1_000_000_000;

    fn now(board: &Board) -> Value {
        serde_json::to_value(board.now()).unwrap()
    }

    #[test]
    fn the_page_is_told_how_every_worker_is_by_a_clock_that_all_share() {
        let mut board = Board::default();
        for second in 0..=20 {
            let jobs = json!({"jobs": {"scored": second * 3, "p95_ms": 5.0}});
            let ill = json!({"ready": false, "state": "degraded", "state_detail": "stuck"});
            let at_ms = START + second * 1000;
            board.see(&fleet(at_ms, &[("a", jobs), ("b", ill)]), Vec::new());
        }
        let now = now(&board);
        let words = now["words"].as_array().unwrap();
        let word = |place: &Value| words[usize::try_from(place.as_i64().unwrap()).unwrap()].clone();
        let workers = &now["workers"];
        assert_eq!(word(&workers["state"][1]), "degraded");
        assert_eq!(word(&workers["why"][1]), "stuck");
        assert_eq!(
            (&workers["ready"], &workers["for_s"][0]),
            (&json!("10"), &json!(60))
        );
        assert_eq!(
            (&workers["rate"][0], &now["totals"]["jobs_per_s"]),
            (&json!(3.0), &json!(3.0))
        );
        assert_eq!(
            (&now["totals"]["ready"], &now["totals"]["alive"]),
            (&json!(1), &json!(2))
        );
        let names = serde_json::to_value(board.names()).unwrap();
        assert_eq!(names["ids"], json!(["a", "b"]));
        assert_eq!(names["rev"], 1, "nothing changed in it");
    }

    #[test]
    fn a_fleet_out_of_sight_is_unknown_until_it_is_seen_again_and_leaves_a_gap() {
        let mut board = Board::default();
        board.see(&fleet(START, &[("a", json!({}))]), Vec::new());
        board.lose_sight("Redis: away".into());
        let unseen = now(&board);
        assert_eq!(unseen["unknown"], "Redis: away");
        assert_eq!(unseen["queues"], Value::Null, "an old number");
        board.timeline.look(START + 2_000, None);
        board.see(&fleet(START + 4_000, &[("a", json!({}))]), Vec::new());
        assert_eq!(now(&board)["unknown"], Value::Null);
        let columns = serde_json::to_value(board.timeline.columns(Range::TenMinutes, 0)).unwrap();
        assert_eq!(columns["alive"], json!([1, null]));
    }

    #[test]
    fn workers_with_one_id_are_told_apart_and_one_that_has_gone_is_remembered() {
        let mut board = Board::default();
        let twin = json!({"incarnation": "0123456789", "state": "degraded", "state_detail": "duplicate_id"});
        board.see(&fleet(START, &[("a", json!({})), ("a", twin)]), Vec::new());
        let names = serde_json::to_value(board.names()).unwrap();
        assert_eq!(names["ids"], json!(["a", "a~01234567"]));
        board.see(&fleet(START + 1000, &[]), Vec::new());
        let gone = serde_json::to_value(board.worker("a")).unwrap();
        assert_eq!(
            (&gone["alive"], &gone["lost_at_ms"]),
            (&json!(false), &json!(START))
        );
        assert!(board.worker("b").is_none());
    }

    #[test]
    fn of_two_models_each_worker_is_found_by_its_id_too() {
        let mut board = Board::default();
        let other = json!({"model": {"name": "n"}});
        board.see(&fleet(START, &[("a", json!({})), ("b", other)]), Vec::new());
        let names = serde_json::to_value(board.names()).unwrap();
        assert_eq!(names["ids"], json!(["m/a", "n/b"]));
        board.judge(&scored(START, json!({"worker_id": "a"})));
        for name in ["a", "m/a"] {
            let worker = serde_json::to_value(board.worker(name)).unwrap();
            assert_eq!(worker["id"], "m/a");
            assert_eq!(worker["results"].as_array().map(Vec::len), Some(1));
        }
    }

    #[test]
    fn a_record_that_names_no_model_says_nothing_of_the_others() {
        let mut board = Board::default();
        let nameless = json!({"model": {"name": ""}});
        board.see(
            &fleet(START, &[("a", json!({})), ("b", nameless)]),
            Vec::new(),
        );
        let names = serde_json::to_value(board.names()).unwrap();
        assert_eq!(names["ids"], json!(["a", "b"]));
    }

    #[test]
    fn a_text_of_any_length_is_told_and_remembered_in_part() {
        let mut board = Board::default();
        let long = "é".repeat(100_000);
        let worker = json!({"state": "degraded", "state_detail": long, "host": long});
        board.see(&fleet(START, &[("a", worker)]), Vec::new());
        board.judge(&rejected(
            START,
            json!({"submission_id": "s", "error.message": long, "worker_id": long}),
        ));
        let size = |told: serde_json::Result<String>| told.unwrap().len();
        assert!(size(serde_json::to_string(&board.now())) < 2000);
        assert!(size(serde_json::to_string(&board.names())) < 500);
        assert!(size(serde_json::to_string(&board.job("s").verdicts[0].message)) < 1100);
        assert!(size(serde_json::to_string(&board.job("s").verdicts[0].worker)) < 300);
    }

    #[test]
    fn a_result_is_counted_once_however_often_it_comes_and_found_by_its_job() {
        let mut board = Board::default();
        board.see(&fleet(START, &[("node7-cuda0", json!({}))]), Vec::new());
        let good = scored(START, json!({}));
        let bad = rejected(
            START + 1,
            json!({"submission_id": "bad", "worker_id": "node7-cuda0"}),
        );
        for seen in [&good, &good, &bad, &good] {
            board.judge(seen);
        }
        let told = now(&board);
        assert_eq!(told["verdicts"]["better"], 1, "{told}");
        let id = &good.result.submission_id;
        let job = serde_json::to_value(board.job(id)).unwrap();
        assert_eq!(job["verdicts"][0]["delta"], 0.0008, "{job}");
        let code = bad.result.code().unwrap().as_str();
        assert_eq!(told["verdicts"][code], 1, "{told}");
        let worker = serde_json::to_value(board.worker("node7-cuda0")).unwrap();
        assert_eq!(
            worker["results"].as_array().map(Vec::len),
            Some(2),
            "{worker}"
        );
        assert_eq!(worker["stages"]["forward"]["count"], 1, "{worker}");
        let question = board.question(id);
        assert_eq!((question.key, question.versions), (good.key, [7].into()));
    }

    #[test]
    fn a_merge_is_counted_once_and_is_neither_a_candidate_nor_a_stage_of_one() {
        let mut board = Board::new(Some("miner_id".into()));
        board.see(&fleet(START, &[("node7-cuda0", json!({}))]), Vec::new());
        let merge = merged(START, json!({}));
        for seen in [&merge, &merge] {
            board.judge(seen);
        }
        board.timeline.look(START + 600_000, None);
        let told = now(&board);
        assert_eq!(
            (&told["merges"], &told["verdicts"]),
            (&json!(1), &json!({"merged": 1}))
        );
        assert_eq!(told["classes"], json!({"merged": 1}));
        let list = serde_json::to_value(board.merges()).unwrap();
        assert_eq!(list["merges"].as_array().map(Vec::len), Some(1), "{list}");
        assert!(board.merge(&merge.result.submission_id).is_some());
        let day = serde_json::to_value(board.timeline.columns(Range::Day, 0)).unwrap();
        assert_eq!(day["classes"]["merged"], json!([1]));
        assert_eq!(day["candidates"], json!([]));
        assert_eq!(day["stages"]["total"]["p50"], json!([null]));
        let worker = serde_json::to_value(board.worker("node7-cuda0")).unwrap();
        assert_eq!(worker["results"][0]["verdict"], "merged", "{worker}");
        let rows = serde_json::to_value(board.contributors()).unwrap();
        assert_eq!(rows["rows"], json!([]));
    }

    #[test]
    fn nothing_grows_without_end() {
        let mut board = Board::new(Some("miner_id".into()));
        for n in 0..1100 {
            let id = format!("s{n}");
            let context = json!({"miner_id": format!("m{n}")});
            board.judge(&scored(
                START + n * 300_000,
                json!({"submission_id": id, "context": context}),
            ));
            let event = StreamEntry {
                id,
                fields: BTreeMap::new(),
            };
            let worker = format!("w{n}");
            let view = fleet(START + n * 300_000, &[(&worker, json!({}))]);
            board.see(&view, vec![event.clone(), event]);
        }
        let day = serde_json::to_value(board.timeline.columns(Range::Day, 0)).unwrap();
        assert_eq!(day["at"].as_array().map(Vec::len), Some(288));
        assert_eq!(board.news.events.iter().count(), 2000);
        let table = serde_json::to_value(board.contributors()).unwrap();
        assert_eq!(table["rows"].as_array().map(Vec::len), Some(1001));
        assert_eq!(table["rows"][1000]["submissions"], 100);
        assert!(board.worker("w0").is_none() && board.worker("w1099").is_some());
    }
}
