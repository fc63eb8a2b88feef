//! The same jobs and the same model in Celery and dramatiq, their results stored in the same Redis.

use std::path::Path;
use std::process::{Command, Stdio};

use testkit::folder::Folder;
use testkit::hazard::hazard_job;
use testkit::package::fixtures;
use testkit::process::Group;

use crate::Arguments;
use crate::contest::{Services, scorer_alone};
use crate::sample::{median, watch};

/// A fourth of ours: they are slower.
const SHARE: usize = 4;

/// A framework's worker.
#[derive(Clone, Copy)]
struct Worker {
    name: &'static str,
    /// Enqueues, when it is run as a program.
    script: &'static str,
    /// What Python is told to start a worker.
    command: &'static str,
    /// It applies the candidate, which takes a session of its own; else it runs the model as it is.
    applies: bool,
}

const CELERY: Worker = Worker {
    name: "Celery",
    script: "celery_worker.py",
    command: "-m celery -A celery_worker worker --pool solo --without-gossip --without-mingle --without-heartbeat",
    applies: true,
};
const DRAMATIQ: Worker = Worker {
    name: "dramatiq",
    script: "dramatiq_worker.py",
    command: "-m dramatiq dramatiq_worker --processes 1 --threads 1",
    applies: true,
};
const WORKERS: [Worker; 4] = [
    CELERY,
    DRAMATIQ,
    Worker {
        name: "Celery, candidate not applied",
        applies: false,
        ..CELERY
    },
    Worker {
        name: "dramatiq, candidate not applied",
        applies: false,
        ..DRAMATIQ
    },
];

/// Jobs that a worker holds, theirs and ours: enough for none to wait for the broker.
const PREFETCH: u16 = 16;

/// Redis' number of the database that holds their results, and nothing else.
const DATABASE: u8 = 5;

/// Takes turns with them.
pub(crate) fn beside_python(services: &Services, arguments: &Arguments) {
    let Some(python) = &arguments.python else {
        eprintln!("Celery and dramatiq are left out: --python is not given, ops/plumbing does");
        return;
    };
    let mut ours = Vec::new();
    let mut theirs = vec![Vec::new(); WORKERS.len()];
    for _ in 0..arguments.rounds {
        ours.push(scorer_alone(services, PREFETCH, arguments.jobs).jobs_per_second);
        for (rates, worker) in theirs.iter_mut().zip(WORKERS) {
            rates.push(turn(services, python, worker, arguments.jobs / SHARE));
        }
    }
    println!(
        "\n## Beside Python workers, one of each, prefetch {PREFETCH}, median of {} turns\n",
        arguments.rounds
    );
    println!("| worker | jobs/s | scorer's x |\n| --- | --- | --- |");
    let names = WORKERS.iter().map(|worker| worker.name);
    for (name, rates) in std::iter::once("scorer")
        .chain(names)
        .zip(std::iter::once(&ours).chain(&theirs))
    {
        let ratios = ours.iter().zip(rates).map(|(ours, theirs)| ours / theirs);
        println!(
            "| {name} | {:.0} | {:.1} |",
            median(rates.clone()),
            median(ratios.collect())
        );
    }
}

/// Jobs per second of one framework's worker.
fn turn(services: &Services, python: &Path, worker: Worker, jobs: usize) -> f64 {
    let folder = Folder::new("python");
    let job = folder.join("job.json");
    let text = hazard_job("job", 2.0).to_string();
    std::fs::write(&job, text).expect("a writable folder");
    // What a worker that was killed has not acknowledged is not for the next one.
    let queue = format!("bench-{}", uuid::Uuid::new_v4().simple());
    let redis = services.redis.url().replace("/0", &format!("/{DATABASE}"));
    let program = |arguments: &[&str]| {
        let mut command = Command::new(python);
        command
            .args(arguments)
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/python"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("BENCH_AMQP", services.rabbit.url())
            .env("BENCH_REDIS", &redis)
            .env("BENCH_QUEUE", &queue)
            .env("BENCH_PREFETCH", PREFETCH.to_string())
            .env("dramatiq_queue_prefetch", PREFETCH.to_string())
            .env("BENCH_MODEL", fixtures().join("hazard"))
            .env("BENCH_JOB", &job)
            .env("BENCH_APPLY", u8::from(worker.applies).to_string())
            .stdin(Stdio::null());
        command
    };
    let enqueued = program(&[worker.script, &jobs.to_string()])
        .output()
        .expect("python runs");
    let said = String::from_utf8_lossy(&enqueued.stderr);
    assert!(enqueued.status.success(), "{}: {said}", worker.name);
    let command: Vec<&str> = worker.command.split(' ').collect();
    let mut worker = program(&command);
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
