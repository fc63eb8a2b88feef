//! Jobs of very different length on two workers: how much longer than necessary they take, by prefetch.

use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;
use testkit::pace::Pace;
use testkit::wait::secs;

use crate::Arguments;
use crate::contest::Services;
use crate::sample::median;

const WORKERS: usize = 2;
const JOBS: usize = 40;

/// Runs the same jobs, in the same order, at each prefetch.
pub(crate) fn by_prefetch(services: &Services, arguments: &Arguments) {
    println!(
        "\n## Makespan of {JOBS} jobs on {WORKERS} workers, median of {} orders\n",
        arguments.rounds
    );
    println!("70 % take 0.1 s, 20 % 0.6 s, 10 % 3 s; 1.00 is the sum shared evenly.\n");
    println!("| prefetch | makespan | most that a short job waited behind |\n| --- | --- | --- |");
    for prefetch in [1, 2, 4, 8] {
        let runs: Vec<(f64, f64)> = (0..arguments.rounds)
            .map(|seed| makespan(services, prefetch, seed as u64))
            .collect();
        let share = median(runs.iter().map(|run| run.0).collect());
        let wait = median(runs.iter().map(|run| run.1).collect());
        println!("| {prefetch} | {share:.2} | {wait:.1} s |");
    }
}

/// Of the time that the jobs' own times sum to, for each worker; and the longest wait on a worker of a short job.
fn makespan(services: &Services, prefetch: u16, seed: u64) -> (f64, f64) {
    let stack = services.stack();
    let workers: Vec<_> = (0..WORKERS)
        .map(|n| {
            let settings = services.settings(&stack).set("amqp.prefetch", prefetch);
            let id = format!("w{n}");
            let worker = stack.worker_with(&id, |_| settings.set("worker.id", &id));
            worker.ready();
            worker
        })
        .collect();
    let aggregator = stack.aggregator();
    aggregator.collect_results();
    let pace = Pace::measure(&aggregator);
    let mut random = StdRng::seed_from_u64(seed);
    let jobs: Vec<(String, f64)> = (0..JOBS)
        .map(|n| (format!("job-{n}"), length(random.random_range(0..10))))
        .collect();
    let bodies: Vec<Value> = jobs.iter().map(|(id, s)| pace.job(id, *s)).collect();
    let began = Instant::now();
    for body in &bodies {
        aggregator.submit(body);
    }
    let ids: Vec<String> = jobs.iter().map(|(id, _)| id.clone()).collect();
    aggregator.all_results(&ids, secs(120));
    let took = began.elapsed().as_secs_f64();
    let timing = |id: &String, stage: &str| {
        let result = aggregator.result(id).json();
        let millis = result["timings_ms"][stage].as_f64();
        millis.unwrap_or_else(|| panic!("a scored job: {result}")) / 1e3
    };
    let needed: f64 = ids.iter().map(|id| timing(id, "forward")).sum();
    let short = jobs.iter().filter(|(_, seconds)| *seconds < 0.5);
    let waits = short.map(|(id, _)| timing(id, "queued"));
    let wait = waits.fold(0.0, f64::max);
    for worker in &workers {
        worker.drain();
    }
    (took * WORKERS as f64 / needed, wait)
}

fn length(draw: u8) -> f64 {
    match draw {
        0..7 => 0.1,
        7..9 => 0.6,
        _ => 3.0,
    }
}
