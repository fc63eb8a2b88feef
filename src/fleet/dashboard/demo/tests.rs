use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::protocol::encoding::Encoding;
use crate::protocol::heartbeat::Record;
use crate::protocol::job::Kind;
use crate::protocol::merge::MergeMember;
use crate::protocol::names::is_submission_id;
use crate::protocol::state::State;

const START: u64 = 1_790_000_000_000;
const SIZES: [usize; 3] = [3, 100, 1000];

/// The first so many seconds of a fleet.
fn play(demo: &mut Demo, seconds: u64) -> impl Iterator<Item = Moment> {
    (1..=seconds).map(|second| demo.step(START + second * 1000))
}

/// Fewer of a large fleet, for tests are not optimised.
fn seconds(workers: usize) -> u64 {
    if workers > 500 { 8 } else { 100 }
}

fn times() -> impl Iterator<Item = u64> {
    (0..240).map(|n| START - (240 - n) * 360_000)
}

fn miner(result: &ResultMessage) -> String {
    let context = serde_json::to_value(&result.context).unwrap();
    context["miner_id"].as_str().unwrap_or_default().to_owned()
}

fn candidate(result: &ResultMessage) -> Option<(&[Option<u64>], &str)> {
    match &result.body {
        Body::Score(body) => Some((&body.candidate.sketch, &body.candidate.sha256)),
        Body::Loss(_) | Body::Merge(_) | Body::Error { .. } => None,
    }
}

fn same(one: &[Option<u64>], other: &[Option<u64>]) -> usize {
    one.iter().zip(other).filter(|(a, b)| a == b).count()
}

#[test]
fn the_same_size_and_times_give_the_same_fleet() {
    for workers in [3, 100] {
        let played = || {
            let mut demo = Demo::new(workers, START);
            let past = demo.past(times());
            let moments: Vec<Moment> = play(&mut demo, 30).collect();
            format!("{past:?} {moments:?}")
        };
        assert!(played() == played(), "{workers}");
    }
}

#[test]
fn every_record_and_result_is_what_a_worker_writes() {
    let schema: serde_json::Value =
        serde_json::from_str(include_str!("../../../../schemas/heartbeat.v1.json")).unwrap();
    let schema = jsonschema::validator_for(&schema).unwrap();
    for workers in SIZES {
        let mut demo = Demo::new(workers, START);
        let moments: Vec<Moment> = play(&mut demo, 5).collect();
        let last = moments.last().unwrap();
        for worker in last.view.workers.iter().step_by(1 + workers / 200) {
            let (record, text) = (&worker.record, &worker.live.text);
            assert!(
                schema.is_valid(&serde_json::from_str(text).unwrap()),
                "{text}"
            );
            assert_eq!(serde_json::from_str::<Record>(text).unwrap(), *record);
            assert_eq!(Record::read(text).as_ref(), Some(record));
            assert!(record.jobs.p50_ms <= record.jobs.p95_ms, "{text}");
            assert!(record.jobs.in_flight <= 1, "{text}");
            assert!(
                record.started_at_ms <= record.last_state_change_at_ms,
                "{text}"
            );
            assert_eq!(record.at_ms + worker.live.age_ms, last.view.at_ms, "{text}");
        }
        let results = moments.iter().flat_map(|moment| &moment.results);
        for SeenResult { result, key, .. } in results {
            let text = serde_json::to_vec(result).unwrap();
            let read = ResultMessage::decode(&text, Encoding::Json).unwrap();
            assert_eq!(serde_json::to_vec(&read).unwrap(), text);
            assert!(
                is_submission_id(&result.submission_id),
                "{}",
                result.submission_id
            );
            assert_eq!(key.is_some(), result.may_be_stored());
        }
    }
}

#[test]
fn workers_are_sorted_and_their_counters_never_fall() {
    for workers in SIZES {
        let mut demo = Demo::new(workers, START);
        let mut known: BTreeMap<String, (u64, u64, u64)> = BTreeMap::new();
        for moment in play(&mut demo, seconds(workers)) {
            let ids = moment.view.workers.iter().map(|w| &w.record.worker_id);
            assert!(ids.is_sorted());
            for worker in moment.view.workers {
                let record = worker.record;
                let counters = (record.jobs.answered(), record.progress.counter, record.seq);
                let before = known
                    .insert(record.incarnation, counters)
                    .unwrap_or_default();
                assert!(
                    before.0 <= counters.0 && before.1 <= counters.1,
                    "{}",
                    record.worker_id
                );
                assert!(before.2 <= counters.2, "{}", record.worker_id);
            }
        }
    }
}

#[test]
fn what_comes_waits_or_is_held_or_is_answered_and_workers_count_it() {
    for workers in SIZES {
        let mut demo = Demo::new(workers, START);
        let held = |demo: &Demo| -> usize { demo.workers.iter().map(|w| w.device.held()).sum() };
        let inside = |demo: &Demo| {
            let line = u64::from(demo.line.waiting() + demo.line.retrying());
            (line + held(demo) as u64) as f64
        };
        for second in 1..=seconds(workers) {
            let before = inside(&demo);
            let moment = demo.step(START + second * 1000);
            let came = inside(&demo) - before + moment.results.len() as f64;
            let due = demo.tide.demand(second as f64);
            assert!(
                (0.8 * due - 1.0..=1.2 * due + 1.0).contains(&came),
                "{came} {due}"
            );
            let queues = moment.view.queues.unwrap().unwrap();
            assert_eq!(queues.jobs, demo.line.waiting());
            assert_eq!(queues.consumers as usize, {
                let consuming = |w: &&crate::fleet::observer::Worker| w.record.broker.consuming;
                moment.view.workers.iter().filter(consuming).count()
            });
        }
    }
}

#[test]
fn a_worker_counts_exactly_the_results_that_are_seen() {
    let mut demo = Demo::new(100, START);
    let answered = |moment: &Moment| -> BTreeMap<String, u64> {
        let records = moment.view.workers.iter().map(|w| &w.record);
        records
            .map(|r| (r.incarnation.clone(), r.jobs.answered()))
            .collect()
    };
    let mut counted = answered(&demo.step(START));
    for moment in play(&mut demo, 60) {
        for seen in &moment.results {
            *counted.entry(seen.result.incarnation.clone()).or_default() += 1;
        }
        for (incarnation, answered) in answered(&moment) {
            assert_eq!(counted.entry(incarnation).or_insert(answered), &answered);
        }
    }
}

#[test]
fn changes_are_such_as_workers_make_and_in_their_order() {
    for workers in SIZES {
        let mut demo = Demo::new(workers, START);
        let (mut last, mut live) = ((0, 0), 0);
        for moment in play(&mut demo, seconds(workers)) {
            for event in moment.events {
                let (ms, number) = event.id.split_once('-').unwrap();
                let id = (ms.parse::<u64>().unwrap(), number.parse::<u64>().unwrap());
                assert!(id > last, "{id:?} after {last:?}");
                last = id;
                let state = |field: &str| {
                    let word = event.fields[field].clone().into();
                    serde_json::from_value::<State>(word).unwrap()
                };
                let (from, to) = (state("from"), state("to"));
                assert!(from == to || from.may_become(to), "{from:?} to {to:?}");
                live += u64::from(ms.parse::<u64>().unwrap() > START);
            }
        }
        assert!(live > 0 || workers < SMALL);
    }
}

#[test]
fn a_fifth_of_a_fleet_is_sick_in_every_way() {
    for workers in [100, 1000] {
        let mut demo = Demo::new(workers, START);
        let view = demo.step(START + 1000).view;
        let (ready, sick): (Vec<_>, Vec<_>) = view.workers.iter().partition(|w| w.record.ready);
        let share = sick.len() as f64 / workers as f64;
        assert!((0.15..0.25).contains(&share), "{share}");
        let details: BTreeSet<&str> = sick
            .iter()
            .map(|w| w.record.state_detail.as_str())
            .collect();
        for detail in [
            "ep_unavailable",
            "canary_mismatch",
            "stuck",
            "out_of_memory",
            "model_load_failed",
            "broker_disconnected",
            "paused",
            "drain_control",
            "startup_baseline",
        ] {
            assert!(details.contains(detail), "{detail}");
        }
        let refused = |w: &&&crate::fleet::observer::Worker| {
            w.record
                .update
                .as_ref()
                .is_some_and(|update| update.refused.is_some())
        };
        assert!(sick.iter().filter(refused).count() >= 2);
        for kind in [
            |record: &Record| record.broker.blocked,
            |record: &Record| !record.store.ok,
            |record: &Record| record.warm.inert_count > 0,
            |record: &Record| record.engine.software_device,
            |record: &Record| record.model.version == Some(script::OLD),
        ] {
            assert!(ready.iter().any(|w| kind(&w.record)));
        }
    }
}

#[test]
fn of_a_small_fleet_one_is_sick() {
    let mut demo = Demo::new(3, START);
    let view = demo.step(START + 1000).view;
    let details = view.workers.iter().map(|w| w.record.state_detail.as_str());
    assert_eq!(
        details.collect::<Vec<_>>(),
        ["serving", "serving", "ep_unavailable"]
    );
}

#[test]
fn somebody_vanishes_in_the_first_minute_without_a_word() {
    let mut demo = Demo::new(100, START);
    let moments: Vec<Moment> = play(&mut demo, 60).collect();
    let ids = |moment: &Moment| -> BTreeSet<String> {
        let workers = moment.view.workers.iter();
        workers.map(|w| w.record.worker_id.clone()).collect()
    };
    let gone = &ids(&moments[0]) - &ids(&moments[59]);
    let events = moments.iter().flat_map(|moment| &moment.events);
    let stopped: BTreeSet<String> = events
        .filter(|event| event.fields["to"] == "stopped")
        .map(|event| event.fields["worker_id"].clone())
        .collect();
    assert_eq!((&gone - &stopped).len(), 1);
}

#[test]
fn two_miners_send_copies_and_nobody_else_does() {
    for (workers, seconds) in [(3, 900), (100, 90)] {
        let mut demo = Demo::new(workers, START);
        let (mut seen, mut copies): (Vec<ResultMessage>, BTreeMap<String, usize>) =
            Default::default();
        for result in play(&mut demo, seconds).flat_map(|moment| moment.results) {
            let Some((sketch, sha256)) = candidate(&result.result) else {
                continue;
            };
            for earlier in seen.iter().rev() {
                let Some((other, digest)) = candidate(earlier) else {
                    continue;
                };
                let places = same(sketch, other);
                assert!(places <= 2 || places >= 56, "{places}");
                assert_ne!(sha256, digest);
                if places >= 56 {
                    *copies.entry(miner(&result.result)).or_default() += 1;
                }
            }
            seen.push(result.result);
        }
        let copiers: Vec<&str> = copies.keys().map(String::as_str).collect();
        assert_eq!(copiers, ["miner-11", "miner-17"], "{workers}");
    }
}

#[test]
fn merges_have_copies_a_large_gap_and_members_that_are_left_out() {
    for (workers, seconds) in [(3, 400), (100, 120)] {
        let mut demo = Demo::new(workers, START);
        let (mut copies, mut large, mut left_out, mut refused) = (0, 0, 0, 0);
        let results = play(&mut demo, seconds).flat_map(|moment| moment.results);
        for result in results.map(|seen| seen.result) {
            let body = match (result.kind, &result.body) {
                (Kind::Merge, Body::Merge(body)) => body,
                (Kind::Merge, Body::Error { error }) => {
                    assert_eq!(error.detail["members"][0]["id"], "miner-19");
                    refused += 1;
                    continue;
                }
                (Kind::Merge | Kind::Score | Kind::Validate, _) => continue,
            };
            assert!(body.members.is_sorted_by(|a, b| a.id < b.id));
            assert!(body.members.iter().all(|m| is_submission_id(&m.id)));
            let measured = body
                .members
                .iter()
                .filter_map(|m| Some((m, m.contribution?)));
            let sum: f64 = measured.clone().map(|(_, own)| own.value).sum();
            assert!((sum + body.gap.value - body.joint.delta).abs() < 1e-12);
            let largest = measured
                .clone()
                .map(|(_, own)| own.value)
                .fold(0.0, f64::max);
            let beyond = body.gap.value.abs() > 0.03 * largest;
            let clear = body.gap.value.abs() > 2.0 * body.gap.stderr.unwrap();
            assert_eq!(body.gap.large, beyond && clear);
            assert_eq!(body.passes, 2 * measured.clone().count() as u64 + 1);
            let falls = |m: &MergeMember, own: f64| own < 0.5 * m.alone.unwrap().delta.abs();
            let fallen =
                measured.filter(|(m, own)| m.alone.unwrap().delta > 1e-4 && falls(m, own.value));
            let fallen: Vec<&str> = fallen.map(|(m, _)| m.id.as_str()).collect();
            copies += usize::from(fallen == ["miner-03", "miner-11", "miner-17"]);
            large += usize::from(body.gap.large);
            left_out += usize::from(body.members.iter().any(|m| m.error.is_some()));
        }
        let seen = [copies, large, left_out, refused];
        assert!(seen.iter().all(|seen| *seen > 0), "{workers}: {seen:?}");
    }
}

#[test]
fn miners_differ_and_some_have_hostile_names() {
    let mut demo = Demo::new(100, START);
    let mut seen: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    let mut parked = Vec::new();
    for moment in play(&mut demo, 60) {
        for SeenResult { result, .. } in &moment.results {
            let verdict = match &result.body {
                Body::Score(body) => match body.ci95 {
                    Some([low, _]) if low > 0.0 => "better",
                    Some([_, high]) if high < 0.0 => "worse",
                    Some(_) | None => "unclear",
                },
                Body::Loss(_) => "validated",
                Body::Merge(_) => "merged",
                Body::Error { error } => error.code.as_str(),
            };
            seen.entry(miner(result)).or_default().insert(verdict);
        }
        parked.extend(moment.parked);
    }
    for (name, verdict) in [
        ("miner-01", "better"),
        ("miner-05", "unclear"),
        ("miner-08", "worse"),
        ("miner-19", "candidate_malformed"),
        ("miner-26", "candidate_digest_mismatch"),
        ("miner-14", "candidate_unavailable"),
        ("<b>miner</b>", "better"),
        ("", "validated"),
        ("", "merged"),
    ] {
        assert!(seen[name].contains(verdict), "{name}: {:?}", seen[name]);
    }
    assert!(seen.keys().any(|name| name.chars().count() == 64));
    assert!(!parked.is_empty());
    assert!(parked.iter().all(|job| job.code == "candidate_unavailable"));
}

#[test]
fn results_are_late_since_the_rack_is_away_and_were_not_before() {
    for workers in SIZES {
        let mut demo = Demo::new(workers, START);
        let minutes = (0..60).map(|minute| START - (60 - minute) * 60_000);
        let past = demo.past(minutes);
        let oldest: Vec<u64> = past
            .iter()
            .map(|p| p.sample.oldest_ms.unwrap_or(0))
            .collect();
        assert!(oldest[..40].iter().all(|ms| *ms < 60_000), "{oldest:?}");
        let now_ms = demo.line.oldest_ms(START).unwrap();
        assert!(now_ms > 120_000, "{now_ms}");
        let ready = |minute: usize| past[minute].sample.ready;
        assert!(ready(59) < ready(40));
    }
}

#[test]
fn the_past_is_that_of_the_fleet() {
    for workers in SIZES {
        let mut demo = Demo::new(workers, START);
        let past = demo.past(times());
        assert!(past.iter().map(|p| p.at_ms).eq(times()));
        let updated = |p: &Past| {
            p.sample
                .versions
                .get(&Some(script::NEW))
                .copied()
                .unwrap_or(0)
        };
        assert!(past.iter().map(updated).is_sorted());
        for Past {
            at_ms,
            sample,
            results,
        } in &past
        {
            assert!(sample.ready <= sample.alive && sample.alive <= workers);
            assert_eq!(sample.versions.values().sum::<usize>(), workers);
            assert!(results.iter().all(|result| result.scored_at_ms == *at_ms));
        }
        let view = demo.step(START + 1000).view;
        let near = past.last().unwrap().sample.ready as f64;
        assert!((near - view.ready() as f64).abs() <= 1.0 + 0.06 * workers as f64);
        assert!((updated(past.last().unwrap()) as f64 / workers as f64 - 0.67).abs() < 0.1);
    }
}
