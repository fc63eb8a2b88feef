//! Turns of contenders that empty the same queue.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, QueuePurgeOptions};
use testkit::aggregator::{Aggregator, runtime};
use testkit::broker::Rabbit;
use testkit::encoding::Encoding;
use testkit::hazard::hazard_job;
use testkit::package::{MODEL, Package};
use testkit::process::Group;
use testkit::redis_server::Redis;
use testkit::stack::Stack;
use testkit::wait::{SOON, eventually, secs};
use testkit::worker::Settings;

use crate::Arguments;
use crate::sample::{Pace, median, watch};

/// Of the parts that do not compare prefetches: jobs here are quicker than the broker.
const PREFETCH: u16 = 4;

/// What all parts share: services of the bench's own and a model of a few hundred parameters.
pub(crate) struct Services {
    pub(crate) rabbit: Arc<Rabbit>,
    pub(crate) redis: Arc<Redis>,
    pub(crate) package: Package,
}

impl Services {
    pub(crate) fn start() -> Self {
        Self {
            rabbit: Arc::new(Rabbit::started()),
            redis: Arc::new(Redis::started()),
            package: Package::hazard(),
        }
    }

    pub(crate) fn stack(&self) -> Stack {
        Stack::on(Arc::clone(&self.rabbit), Arc::clone(&self.redis))
    }

    pub(crate) fn settings(&self, stack: &Stack) -> Settings {
        let settings = stack.settings();
        settings
            .set("model.dir", self.package.path().display())
            .set("heartbeat.interval", "1s")
            .set("heartbeat.ttl", "10s")
    }
}

/// Who works.
#[derive(Clone)]
enum Contender {
    /// A loop: a message, its answer, the confirm, the acknowledgement, the next message.
    Loop,
    /// The same for all that are prefetched at once.
    Concurrent,
    Scorer(PathBuf),
}

/// The queues of a stack, declared by a worker that has gone again.
struct Course<'a> {
    services: &'a Services,
    stack: Stack,
    aggregator: Aggregator,
    results: String,
}

impl<'a> Course<'a> {
    fn new(services: &'a Services) -> Self {
        let stack = services.stack();
        let declarer = stack.worker_on("declarer", &services.package.path());
        declarer.ready();
        declarer.drain();
        Self {
            services,
            aggregator: stack.aggregator(),
            results: stack.object(&format!("results.{MODEL}")),
            stack,
        }
    }

    /// Fills the queue, lets the contender empty it, and checks that nothing is lost.
    fn turn(&self, contender: &Contender, workers: usize, prefetch: u16, jobs: usize) -> Pace {
        self.fill(jobs);
        let running: Vec<Group> = (0..workers)
            .map(|n| self.start(contender, n, prefetch))
            .collect();
        let mut running = running;
        let pids: Vec<u32> = running.iter_mut().map(|g| g.child().id()).collect();
        let pace = watch(jobs, &pids, || self.depth(&self.results));
        drop(running);
        self.aggregator.expect_empty(&self.stack.jobs_queue());
        // What is published twice would hide what is lost.
        assert_eq!(self.depth(&self.results), jobs, "results");
        self.purge();
        pace
    }

    fn start(&self, contender: &Contender, number: usize, prefetch: u16) -> Group {
        let mut command = match contender {
            Contender::Loop => self.bare(prefetch, 1),
            Contender::Concurrent => self.bare(prefetch, prefetch),
            Contender::Scorer(program) => {
                let mut command = Command::new(program);
                let settings = self.services.settings(&self.stack);
                settings
                    .set("worker.id", format!("w{number}"))
                    .set("amqp.prefetch", prefetch)
                    .apply(command.arg("run"));
                command
            }
        };
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Group::spawn(&mut command)
    }

    fn bare(&self, prefetch: u16, window: u16) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        let namespace = &self.stack.namespace;
        command
            .args(["--bare", &self.services.rabbit.url(), namespace])
            .args([prefetch.to_string(), window.to_string()]);
        command
    }

    fn fill(&self, jobs: usize) {
        let exchange = self.stack.object("jobs");
        runtime().block_on(async {
            let channel = self.aggregator.connection.create_channel().await;
            let channel = channel.expect("a channel");
            for n in 0..jobs {
                let id = format!("{n}-{}", uuid::Uuid::new_v4().simple());
                let body = Encoding::MessagePack.encode(&hazard_job(&id, 2.0));
                let properties = BasicProperties::default()
                    .with_content_type(Encoding::MessagePack.content_type().into())
                    .with_delivery_mode(2);
                let options = BasicPublishOptions::default();
                let (to, key) = (exchange.as_str().into(), MODEL.into());
                let sent = channel.basic_publish(to, key, options, &body, properties);
                drop(sent.await.expect("publishing"));
            }
            channel.close(200, "done".into()).await.expect("closing");
        });
        eventually(SOON, "all jobs are in the queue", || {
            self.depth(&self.stack.jobs_queue()) == jobs
        });
    }

    fn purge(&self) {
        runtime().block_on(async {
            let channel = self.aggregator.connection.create_channel().await;
            let channel = channel.expect("a channel");
            let queue = self.results.as_str().into();
            let purged = channel.queue_purge(queue, QueuePurgeOptions::default());
            purged.await.expect("purging");
            channel.close(200, "done".into()).await.expect("closing");
        });
        eventually(secs(10), "no result is left", || {
            self.depth(&self.results) == 0
        });
    }

    fn depth(&self, queue: &str) -> usize {
        let depth = self.aggregator.depth(queue);
        depth.expect("the queue is there").0 as usize
    }
}

/// This build's program.
fn scorer() -> Contender {
    Contender::Scorer(testkit::program::scorer())
}

/// One worker beside the bare loops, at several prefetches.
pub(crate) fn beside_a_bare_loop(services: &Services, arguments: &Arguments) {
    let course = Course::new(services);
    let mut contenders = vec![
        ("bare loop", Contender::Loop),
        ("bare, all at once", Contender::Concurrent),
        ("scorer", scorer()),
    ];
    if let Some(other) = &arguments.against {
        contenders.push(("the other scorer", Contender::Scorer(other.clone())));
    }
    println!(
        "\n## One worker, {} jobs, median of {} turns\n",
        arguments.jobs, arguments.rounds
    );
    println!("| prefetch | worker | jobs/s | x the loop | x all at once | CPU, us/job |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for prefetch in [1, 2, PREFETCH, 8, 16] {
        let mut paces = vec![Vec::new(); contenders.len()];
        for _ in 0..arguments.rounds {
            for (paces, (_, contender)) in paces.iter_mut().zip(&contenders) {
                paces.push(course.turn(contender, 1, prefetch, arguments.jobs));
            }
        }
        for (own, (name, _)) in paces.iter().zip(&contenders) {
            println!(
                "| {prefetch} | {name} | {:.0} | {:.2} | {:.2} | {:.0} |",
                median(own.iter().map(|p| p.jobs_per_second).collect()),
                ratio(own, &paces[0]),
                ratio(own, &paces[1]),
                median(own.iter().map(|p| p.micros).collect()),
            );
        }
    }
}

/// Of turns that followed each other, so that the machine's moods cancel.
fn ratio(own: &[Pace], other: &[Pace]) -> f64 {
    let pairs = own.iter().zip(other);
    median(
        pairs
            .map(|(a, b)| a.jobs_per_second / b.jobs_per_second)
            .collect(),
    )
}

/// One, two and four workers on one queue.
pub(crate) fn from_one_to_four(services: &Services, arguments: &Arguments) {
    let course = Course::new(services);
    println!(
        "\n## One to four workers, {} jobs, none lost\n",
        arguments.jobs
    );
    println!("| workers | jobs/s |\n| --- | --- |");
    for workers in [1, 2, 4] {
        let turns = (0..arguments.rounds).map(|_| {
            course
                .turn(&scorer(), workers, PREFETCH, arguments.jobs)
                .jobs_per_second
        });
        println!("| {workers} | {:.0} |", median(turns.collect()));
    }
}

/// One worker, for the comparison with others.
pub(crate) fn scorer_alone(services: &Services, prefetch: u16, jobs: usize) -> Pace {
    Course::new(services).turn(&scorer(), 1, prefetch, jobs)
}
