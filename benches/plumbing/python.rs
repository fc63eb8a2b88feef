//! The same jobs and the same model in Celery and dramatiq, their results stored in the same Redis.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::Arguments;
use crate::contest::{Services, scorer_alone};
use crate::sample::{median, watch};
use crate::support::jobs::hazard_job;
use crate::support::package::fixtures;
use crate::support::process::{Folder, Group};

/// A tenth of ours: they are slower.
const SHARE: usize = 10;
/// Redis' numbers of the databases that hold their results, and nothing else.
const FRAMEWORKS: [(&str, u8); 2] = [("celery", 5), ("dramatiq", 6)];

/// Takes turns with them.
pub(crate) fn beside_python(services: &Services, arguments: &Arguments) {
    let Some(python) = &arguments.python else {
        eprintln!("Celery and dramatiq are left out: --python is not given, ops/plumbing does");
        return;
    };
    let mut rates = vec![Vec::new(); 1 + FRAMEWORKS.len()];
    for _ in 0..arguments.rounds {
        rates[0].push(scorer_alone(services, arguments.jobs).jobs_per_second);
        for (rates, framework) in rates[1..].iter_mut().zip(FRAMEWORKS) {
            rates.push(turn(services, python, framework, arguments.jobs / SHARE));
        }
    }
    println!(
        "\n## Beside Python workers, one of each, median of {} turns\n",
        arguments.rounds
    );
    println!("| worker | jobs/s | scorer is faster by |\n| --- | --- | --- |");
    let names = ["scorer"].into_iter().chain(FRAMEWORKS.map(|f| f.0));
    for (name, own) in names.zip(&rates) {
        let ratios = rates[0].iter().zip(own).map(|(ours, theirs)| ours / theirs);
        println!(
            "| {name} | {:.0} | {:.1} |",
            median(own.clone()),
            median(ratios.collect())
        );
    }
}

/// Jobs per second of one framework's worker.
fn turn(services: &Services, python: &Path, (framework, db): (&str, u8), jobs: usize) -> f64 {
    let folder = Folder::new("python");
    let job = folder.join("job.json");
    let text = hazard_job("job", 2.0).to_string();
    std::fs::write(&job, text).expect("a writable folder");
    let redis = services.redis.url().replace("/0", &format!("/{db}"));
    let program = |arguments: &[&str]| {
        let mut command = Command::new(python);
        command
            .args(arguments)
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/python"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("BENCH_AMQP", services.rabbit.url())
            .env("BENCH_REDIS", &redis)
            .env("BENCH_MODEL", fixtures().join("hazard"))
            .env("BENCH_JOB", &job)
            .stdin(Stdio::null());
        command
    };
    let enqueue = format!("{framework}_worker.py");
    let enqueued = program(&[&enqueue, &jobs.to_string()])
        .output()
        .expect("python runs");
    let said = String::from_utf8_lossy(&enqueued.stderr);
    assert!(enqueued.status.success(), "{framework}: {said}");
    let mut worker = match framework {
        "celery" => program(&[
            "-m",
            "celery",
            "-A",
            "celery_worker",
            "worker",
            "--pool",
            "solo",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
        ]),
        _ => program(&[
            "-m",
            "dramatiq",
            "dramatiq_worker",
            "--processes",
            "1",
            "--threads",
            "1",
        ]),
    };
    let mut group = Group::spawn(worker.stdout(Stdio::null()).stderr(Stdio::null()));
    let mut connection = redis::Client::open(redis.as_str())
        .and_then(|client| client.get_connection())
        .expect("redis accepts a connection");
    let pid = group.child().id();
    let pace = watch(jobs, &[pid], || {
        redis::cmd("DBSIZE")
            .query(&mut connection)
            .expect("redis counts")
    });
    drop(group);
    redis::cmd("FLUSHDB")
        .exec(&mut connection)
        .expect("redis forgets");
    pace.jobs_per_second
}
