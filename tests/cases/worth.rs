//! What members of a merge are worth, held against the truth: the Shapley values from every coalition of eight
//! candidates of the language model. And whole merges, through the pipeline.

use std::collections::HashMap;
use std::fmt::Write as _;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use scorer::candidate;
use scorer::engine::Engine;
use scorer::engine::coalition::{self, Member, Source};
use scorer::engine::merge::{Merge, Merged};
use scorer::engine::trial::build;
use scorer::model::package::Package;
use scorer::model::plan::Plan;
use scorer::protocol::encoding::Encoding;
use scorer::protocol::failure::Code;
use scorer::protocol::job::{self, Rule};
use scorer::protocol::merge::{MergeBody, OnRejected};
use scorer::protocol::result::{Body, JobRef, Timings, Verdict};
use scorer::scoring::pipeline::Judged;
use scorer::telemetry::traces::Trace;

use sha2::{Digest as _, Sha256};

use super::*;

const MEMBERS: usize = 8;

/// Honest, inverted and random updates.
const MIXED: [&str; MEMBERS] = [
    "gradient-medium-rate",
    "gradient-list",
    "gradient-unsorted",
    "difference-few-steps",
    "difference-more-steps",
    "inverted-gradient-301",
    "inverted-difference-303",
    "noise-small",
];

/// The same with four of one.
const COPIED: [&str; MEMBERS] = [
    "difference-more-steps",
    "difference-more-steps",
    "difference-more-steps",
    "difference-more-steps",
    "gradient-unsorted",
    "difference-few-steps",
    "inverted-gradient-301",
    "noise-small",
];

struct Bench {
    engine: Engine,
    plan: Plan,
    cases: Value,
}

impl Bench {
    fn new(out: &Path, shards: Option<&[u64]>) -> Self {
        let dir = super::tinylm::package("graph-folded.onnx", 1, out);
        let package = Arc::new(Package::load(&dir, false, &[]).unwrap());
        let plan = Plan::new(&package.shards, shards, "", package.cut()).unwrap();
        let mut engine = Engine::load(package, &config(&[]).engine, Arc::default()).unwrap();
        engine.warm().unwrap();
        let cases = table(&model_dir());
        Self {
            engine,
            plan,
            cases,
        }
    }

    fn member(&self, place: usize, name: &str, weight: f64) -> Member {
        let cases = self.cases["cases"].as_array().unwrap();
        let case = cases.iter().find(|case| case["name"] == name).unwrap();
        let bytes = std::fs::read(model_dir().join(case["file"].as_str().unwrap())).unwrap();
        let limits = (&config(&[]).candidates).into();
        let format = serde_json::from_value(case["format"].clone()).unwrap();
        let semantics = serde_json::from_value(case["semantics"].clone()).unwrap();
        Member {
            id: format!("{place}-{name}"),
            source: Source {
                sha256: Sha256::digest(&bytes).into(),
                format,
                compression: None,
            },
            update: candidate::decode(&bytes, format, None, &self.engine.package, limits).unwrap(),
            rule: Rule::new(semantics, case["learning_rate"].as_f64()).unwrap(),
            weight,
        }
    }

    fn merged(&mut self, members: &[Member]) -> Merged {
        let mut nobody = |_, _: &[&Member]| Ok(());
        let merge = self
            .engine
            .merge(members, OnRejected::Drop, &self.plan, &mut nobody);
        match merge.unwrap() {
            Merge::Measured(merged) => *merged,
            Merge::Refused(refused) => panic!("{refused:?}"),
        }
    }

    /// The change of the loss by every coalition: the bits of its place say who is in it.
    fn game(&mut self, members: &[Member]) -> Vec<f64> {
        let mut known = HashMap::new();
        let mut delta = |coalition: usize| {
            let inside = members.iter().enumerate();
            let inside = inside.filter(|(at, _)| coalition >> at & 1 == 1);
            let inside: Vec<&Member> = inside.map(|(_, member)| member).collect();
            // Copies make equal coalitions.
            let names: Vec<String> = inside.iter().map(|member| member.id[2..].into()).collect();
            if let Some(delta) = known.get(&names) {
                return *delta;
            }
            let patches = coalition::patches(&self.engine.package, &inside, &|| Ok(())).unwrap();
            let score = self.engine.score(&patches, &self.plan, None).unwrap();
            known.insert(names, score.paired.delta);
            score.paired.delta
        };
        (0..1 << members.len()).map(&mut delta).collect()
    }
}

/// What each member adds to a coalition, over all orders in which they may join.
fn shapley(game: &[f64]) -> Vec<f64> {
    let members = game.len().ilog2();
    let factorial = |n: u32| f64::from((1..=n).product::<u32>());
    let value = |member: u32| {
        let without = (0..game.len()).filter(|coalition| coalition >> member & 1 == 0);
        without
            .map(|coalition| {
                let size = coalition.count_ones();
                let orders = factorial(size) * factorial(members - size - 1) / factorial(members);
                orders * (game[coalition | 1 << member] - game[coalition])
            })
            .sum()
    };
    (0..members).map(value).collect()
}

/// Members of a merge beside the truth.
struct Compared {
    /// As a table, in millionths of the unit of the loss.
    table: String,
    /// The largest error of the half-sums, as a share of the largest value.
    error: f64,
    /// Whether the merge warns of it.
    gap_is_large: bool,
}

fn compared(bench: &mut Bench, names: [&str; MEMBERS], weight: f64) -> Compared {
    let members = names.iter().enumerate();
    let members: Vec<Member> = members
        .map(|(place, name)| bench.member(place, name, weight))
        .collect();
    let exact = shapley(&bench.game(&members));
    let merged = bench.merged(&members);
    let largest = exact
        .iter()
        .fold(0.0_f64, |most, value| most.max(value.abs()));
    let mut worst = [0.0_f64; 3];
    let mut table = format!("\nweight {weight}\n| member | alone | last | half-sum | exact |\n");
    for ((member, worth), exact) in members.iter().zip(&merged.members).zip(&exact) {
        let share = worth.as_ref().unwrap().share;
        let values = [
            share.alone.value,
            share.last.value,
            share.contribution.value,
        ];
        let [alone, last, half] = values.map(|value| value * 1e6);
        let (id, exact_shown) = (&member.id, exact * 1e6);
        writeln!(
            table,
            "| {id} | {alone:.1} | {last:.1} | {half:.2} | {exact_shown:.2} |"
        )
        .unwrap();
        for (worst, value) in worst.iter_mut().zip(values) {
            *worst = worst.max((value - exact).abs() / largest);
        }
    }
    let (joint, gap, passes) = (merged.joint, merged.gap, merged.passes);
    writeln!(table, "joint {:.6}, {gap:?}, {passes} passes", joint.delta).unwrap();
    writeln!(
        table,
        "errors of alone, last and half-sum: {worst:.5?} of the largest value"
    )
    .unwrap();
    Compared {
        table,
        error: worst[2],
        gap_is_large: gap.large,
    }
}

#[test]
fn half_sums_are_the_shapley_values_within_a_few_per_cent() {
    let out = tempfile::tempdir().unwrap();
    // Four windows: a coalition takes a few milliseconds, and there are many.
    let mut bench = Bench::new(out.path(), Some(&[59_996]));
    for (names, weight, most) in [
        (MIXED, 0.125, 0.01),
        (MIXED, 0.5, 0.03),
        (COPIED, 0.5, 0.03),
    ] {
        let compared = compared(&mut bench, names, weight);
        println!("{}", compared.table);
        assert!(compared.error <= most, "{}", compared.table);
    }
}

/// Steps ten times too large lead far away from where the loss is quadratic.
#[test]
fn where_half_sums_fail_the_gap_is_large() {
    let out = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(out.path(), None);
    let compared = compared(&mut bench, MIXED, 5.0);
    println!("{}", compared.table);
    assert!(
        compared.error > 0.03 && compared.gap_is_large,
        "{}",
        compared.table
    );
}

/// A member as a job brings it.
fn member(case: &Value, id: &str, weight: f64, file: &Path) -> Value {
    let mut candidate = json!({
        "format": "binary_v2", "semantics": case["semantics"],
        "data": BASE64_STANDARD.encode(std::fs::read(file).unwrap()),
    });
    if case["learning_rate"].is_number() {
        candidate["learning_rate"] = case["learning_rate"].clone();
    }
    json!({"id": id, "weight": weight, "candidate": candidate})
}

async fn judged(pipeline: &Pipeline, members: Vec<Value>, on_rejected: OnRejected) -> Verdict {
    let job = json!({
        "v": 1, "kind": "merge", "submission_id": "merge", "members": members, "on_rejected": on_rejected.as_str(),
        "model_version": pipeline.origin().model_version,
    });
    let job = job::decode(job.to_string().as_bytes(), Encoding::Json).unwrap();
    let job_ref = JobRef::new(&job, 1);
    let judged = pipeline.judge(&job, &job_ref, &Trace::silent()).await;
    let Judged::Fresh { verdict, .. } = judged else {
        panic!("{judged:?}")
    };
    verdict
}

/// Of candidates of the language model, in this order.
async fn verdict(pipeline: &Pipeline, names: &[&str], on_rejected: OnRejected) -> Verdict {
    let cases = table(&model_dir());
    let cases = cases["cases"].as_array().unwrap();
    let members = names.iter().map(|name| {
        let case = cases.iter().find(|case| case["name"] == *name).unwrap();
        let file = model_dir().join(case["file"].as_str().unwrap());
        member(case, name, 0.25, &file)
    });
    judged(pipeline, members.collect(), on_rejected).await
}

fn body(verdict: Verdict) -> MergeBody {
    let Ok(Body::Merge(mut body)) = verdict else {
        panic!("{verdict:?}")
    };
    body.timings_ms = Timings::default();
    *body
}

#[tokio::test(flavor = "multi_thread")]
async fn the_order_of_the_members_changes_no_bit_and_who_is_left_out_is_named() {
    let out = tempfile::tempdir().unwrap();
    let dir = super::tinylm::package("graph-folded.onnx", 1, out.path());
    let pipeline = pipeline(&dir).await;
    let sound = ["noise-small", "gradient-list", "difference-few-steps"];
    let refused = ["malformed-nan", "malformed-huge-weights"];
    let mut names = [&sound[..], &refused].concat();
    let first = body(verdict(&pipeline, &names, OnRejected::Drop).await);
    names.reverse();
    let again = body(verdict(&pipeline, &names, OnRejected::Drop).await);
    assert_eq!(first, again);
    let told: Vec<(&str, Option<Code>)> = first
        .members
        .iter()
        .map(|member| {
            (
                member.id.as_str(),
                member.error.as_ref().map(|error| error.code),
            )
        })
        .collect();
    let expected = [
        ("difference-few-steps", None),
        ("gradient-list", None),
        ("malformed-huge-weights", Some(Code::NonFiniteLoss)),
        ("malformed-nan", Some(Code::CandidateNonFinite)),
        ("noise-small", None),
    ];
    assert_eq!(told, expected);
    // Its pass ran; otherwise those left out change nothing.
    let without = body(verdict(&pipeline, &sound, OnRejected::Drop).await);
    let stayed = first.members.iter().filter(|member| member.error.is_none());
    assert_eq!(stayed.cloned().collect::<Vec<_>>(), without.members);
    assert_eq!(
        (first.joint, first.passes),
        (without.joint, without.passes + 1)
    );

    for (names, on_rejected) in [(&names[..], OnRejected::Fail), (&refused, OnRejected::Drop)] {
        let failure = verdict(&pipeline, names, on_rejected).await.unwrap_err();
        let listed = failure.detail["members"].as_array().unwrap();
        assert_eq!(listed[0]["code"], failure.code.as_str(), "{failure}");
        assert!(listed.iter().any(|member| member["id"] == "malformed-nan"));
    }
}

/// What bounds one candidate bounds the members together; one that breaks a bound by itself is left out and counts for
/// nothing.
#[tokio::test(flavor = "multi_thread")]
async fn members_are_bounded_together() {
    let out = tempfile::tempdir().unwrap();
    let dir = super::tinylm::package("graph-folded.onnx", 1, out.path());
    let names = ["noise-small", "difference-few-steps", "malformed-empty"];
    let file = |name: &str| model_dir().join(format!("candidates/{name}.json"));
    let size = |name| std::fs::metadata(file(name)).unwrap().len();
    let [largest, ..] = names.map(size);
    let all: u64 = names.map(size).iter().sum();
    for (key, limit, expected) in [
        ("max_members", 3, Ok(2)),
        ("max_members", 2, Err(Code::InvalidJob)),
        ("max_inline_bytes", all, Ok(2)),
        ("max_inline_bytes", all - 1, Err(Code::CandidateTooLarge)),
        ("max_bytes", all - 1, Err(Code::CandidateTooLarge)),
        ("max_inline_bytes", largest - 1, Ok(1)),
    ] {
        let limited = config(&[&format!("candidates.{key}={limit}")]);
        let pipeline = super::pipeline_with(&dir, &limited).await;
        let verdict = verdict(&pipeline, &names, OnRejected::Drop).await;
        let scored = verdict.map(|found| {
            let members = body(Ok(found)).members;
            members.iter().filter(|m| m.error.is_none()).count()
        });
        let scored = scored.map_err(|failure| failure.code);
        assert_eq!(scored, expected, "{key} = {limit}");
    }
}

/// Holds the merges of a table against what a pipeline of each says; the largest difference.
async fn compared_with(folder: &Path, package: impl Fn(&Value, &Path) -> PathBuf) -> f64 {
    let table = std::fs::read(folder.join("merges.json")).unwrap();
    let table: Value = serde_json::from_slice(&table).unwrap();
    let mut largest: f64 = 0.0;
    for (at, merge) in table["merges"].as_array().unwrap().iter().enumerate() {
        let out = tempfile::tempdir().unwrap();
        let pipeline = pipeline(&package(merge, out.path())).await;
        let expected = merge["members"].as_array().unwrap();
        let members = expected.iter().rev().map(|expected| {
            let file = folder.join(expected["file"].as_str().unwrap());
            let (id, weight) = (&expected["id"], expected["weight"].as_f64());
            member(expected, id.as_str().unwrap(), weight.unwrap(), &file)
        });
        let body = body(judged(&pipeline, members.collect(), OnRejected::Fail).await);
        let name = format!("merge {at} of {}", folder.display());
        let mut is_close = |field: &str, found: f64, expected: &Value| {
            largest = largest.max(close(&name, field, &json!(found), expected));
        };
        is_close("loss_before", body.joint.loss_before, &merge["loss_before"]);
        is_close("loss_after", body.joint.loss_after, &merge["loss_after"]);
        assert_eq!(body.members.len(), expected.len());
        for (member, expected) in body.members.iter().zip(in_order(expected)) {
            let contribution = member.contribution.unwrap();
            is_close("alone", member.alone.unwrap().delta, &expected["alone"]);
            is_close("last", member.last.unwrap().delta, &expected["last"]);
            is_close(
                "contribution",
                contribution.value,
                &expected["contribution"],
            );
            is_close("stderr", contribution.stderr.unwrap(), &expected["stderr"]);
        }
    }
    largest
}

fn in_order(members: &[Value]) -> Vec<&Value> {
    let mut members: Vec<&Value> = members.iter().collect();
    members.sort_by_key(|member| member["id"].as_str());
    members
}

/// Coalitions of weights of 16 bits, each computed on its own by numpy, in f64.
#[tokio::test(flavor = "multi_thread")]
async fn merges_of_weights_of_16_bits_agree_with_the_independent_table() {
    let half = model_dir().join("half");
    let package = |merge: &Value, out: &Path| {
        let word = |name: &str| merge[name].as_str().unwrap();
        let (objective, to) = (Objective::causal_lm(16), out.join("package"));
        let recipe = recipe(&half, word("graph"), word("checkpoint"), objective, &to);
        build(&recipe).unwrap();
        recipe.out
    };
    let largest = compared_with(&half, package).await;
    println!("largest difference to the independent losses: {largest:.3e}");
}

/// Coalitions of the language model, each computed on its own by PyTorch, in f64.
#[tokio::test(flavor = "multi_thread")]
async fn merges_agree_with_pytorch() {
    let package = |_: &Value, out: &Path| super::tinylm::package("graph-folded.onnx", 1, out);
    let largest = compared_with(&model_dir(), package).await;
    println!("largest difference to PyTorch: {largest:.3e}");
}
