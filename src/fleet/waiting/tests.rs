use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::protocol::heartbeat::Record;
use crate::store::LiveRecord;

const STEP: u64 = 100;
const BEAT: u64 = 1000;
const TTL: u64 = 5000;
const PREFETCH: usize = 4;

/// A queue, its workers, and what they say of themselves.
struct Fleet {
    random: StdRng,
    now: u64,
    /// Waiting jobs: each is the number of its arrival.
    queue: VecDeque<usize>,
    /// When each arrived.
    arrivals: Vec<u64>,
    /// When each that is to be tried again comes back.
    retry: Vec<u64>,
    workers: Vec<Consumer>,
    /// When jobs were delivered or tried again.
    moved: VecDeque<u64>,
    /// Jobs that went to be tried again since the last look, and those that came back.
    tried: (usize, usize),
    /// When as many of one as of the other went unseen.
    crossed: Vec<(u64, usize)>,
    started: u64,
}

struct Consumer {
    alive: bool,
    /// When it begins to consume, or is started again.
    next: u64,
    work_ms: u64,
    busy_until: u64,
    held: VecDeque<usize>,
    record: Record,
    /// When `record` was written; what it said then.
    written: Option<(u64, Record)>,
}

impl Fleet {
    fn new(seed: u64, workers: usize) -> Self {
        let mut fleet = Self {
            random: StdRng::seed_from_u64(seed),
            now: 1_000_000,
            queue: VecDeque::new(),
            arrivals: Vec::new(),
            retry: Vec::new(),
            workers: Vec::new(),
            moved: VecDeque::new(),
            tried: (0, 0),
            crossed: Vec::new(),
            started: 0,
        };
        for _ in 0..workers {
            let worker = fleet.consumer();
            fleet.workers.push(worker);
        }
        fleet
    }

    fn consumer(&mut self) -> Consumer {
        self.started += 1;
        let record = Record {
            incarnation: self.started.to_string(),
            // A clock of its own.
            started_at_ms: self.now + 777_777,
            ..Record::default()
        };
        Consumer {
            alive: true,
            next: self.now + self.random.random_range(2000..5000),
            work_ms: self.random.random_range(200..2000),
            busy_until: 0,
            held: VecDeque::new(),
            record,
            written: None,
        }
    }

    fn arrive(&mut self, jobs: usize) {
        for _ in 0..jobs {
            self.queue.push_back(self.arrivals.len());
            self.arrivals.push(self.now);
        }
    }

    fn step(&mut self, retry_share: f64) {
        self.now += STEP;
        let (now, before) = (self.now, self.retry.len());
        self.retry.retain(|due| *due > now);
        let back = before - self.retry.len();
        self.arrive(back);
        self.tried.1 += back;
        self.moved.extend(std::iter::repeat_n(now, back));
        for which in 0..self.workers.len() {
            self.work(which, retry_share);
        }
        while self.moved.front().is_some_and(|at| at + 2 * BEAT < now) {
            self.moved.pop_front();
        }
    }

    fn work(&mut self, which: usize, retry_share: f64) {
        let now = self.now;
        let worker = &mut self.workers[which];
        if worker.alive && now >= worker.next {
            if !worker.held.is_empty() && now >= worker.busy_until {
                worker.held.pop_front();
                worker.busy_until = now + worker.work_ms;
                if self.random.random_bool(retry_share) {
                    self.retry.push(now + 5000);
                    self.tried.0 += 1;
                    self.moved.push_back(now);
                } else {
                    worker.record.jobs.scored += 1;
                }
            }
            while worker.held.len() < PREFETCH
                && let Some(job) = self.queue.pop_front()
            {
                if worker.held.is_empty() {
                    worker.busy_until = now + worker.work_ms;
                }
                worker.held.push_back(job);
                self.moved.push_back(now);
            }
        }
        let written = worker.written.as_ref().map(|(at, _)| *at);
        if worker.alive && written.is_none_or(|at| at + BEAT <= now) {
            worker.record.at_ms = now + 777_777;
            worker.record.jobs.buffered = worker.held.len() as u64;
            worker.written = Some((now, worker.record.clone()));
        }
    }

    /// It dies, and its jobs return to where they were.
    fn kill(&mut self, which: usize) {
        let worker = &mut self.workers[which];
        worker.alive = false;
        while let Some(job) = worker.held.pop_back() {
            self.queue.push_front(job);
        }
        self.queue.make_contiguous().sort_unstable();
    }

    fn restart(&mut self, which: usize) {
        self.workers[which] = self.consumer();
    }

    fn view(&self) -> View {
        let records = self.workers.iter().filter_map(|w| w.written.as_ref());
        let live = records.filter(|(at, _)| at + TTL > self.now);
        let worker = |(at, record): &(u64, Record)| Worker {
            record: record.clone(),
            live: LiveRecord {
                age_ms: self.now - at,
                text: String::new(),
            },
        };
        let count = |jobs: usize| u32::try_from(jobs).unwrap();
        View {
            at_ms: self.now,
            model: Some("m".into()),
            workers: live.map(worker).collect(),
            queues: Some(Ok(Queues {
                jobs: count(self.queue.len()),
                retry: count(self.retry.len()),
                dead: 0,
                consumers: 1,
            })),
        }
    }

    fn look(&mut self, waiting: &mut Waiting) -> Option<Oldest> {
        let (to, back) = std::mem::take(&mut self.tried);
        self.crossed.push((self.now, to.min(back)));
        waiting.see(&self.view())
    }

    /// The age is within two looks that of a job as near to the oldest as jobs moved in two heartbeats, or
    /// crossed on their way to a retry queue and back while it waited.
    fn check(&self, oldest: Option<Oldest>) {
        let Some(front) = self.queue.front() else {
            assert_eq!(oldest, None);
            return;
        };
        let since = self.arrivals[*front];
        let crossed = self.crossed.iter().filter(|(at, _)| *at >= since);
        let slack = self.moved.len() + crossed.map(|(_, jobs)| jobs).sum::<usize>();
        let last = self.arrivals.len() - 1;
        let age = |number: usize| self.now - self.arrivals[number.min(last)];
        let (least, most) = (age(front + slack), age(front.saturating_sub(slack)));
        let told = oldest.expect("a job waits");
        let exact = age(*front);
        assert!(
            told.millis() + 2 * BEAT >= least && told.millis() <= most + 2 * BEAT,
            "at {}: {told:?}, but {exact} ({least} to {most}), {} wait",
            self.now,
            self.queue.len(),
        );
    }

    fn bursts(&mut self) {
        if self.random.random_bool(0.02) {
            let jobs = self.random.random_range(1..60);
            self.arrive(jobs);
        }
        if self.random.random_bool(0.3) {
            self.arrive(1);
        }
    }
}

#[test]
fn the_age_is_right_whatever_comes_and_is_tried_again() {
    let mut told = 0;
    for seed in 0..40 {
        let mut fleet = Fleet::new(seed, 3);
        let mut waiting = Waiting::default();
        for step in 0..6000 {
            fleet.bursts();
            fleet.step(0.1);
            if step % 10 == 0 {
                let oldest = fleet.look(&mut waiting);
                fleet.check(oldest);
                told += usize::from(matches!(oldest, Some(Oldest::About(1..))));
            }
        }
    }
    assert!(told > 1000, "{told}");
}

/// What waits when a death is forgotten may be wrong; what comes later is right.
#[test]
fn after_a_death_it_is_right_again_once_what_waited_then_is_gone() {
    let mut told = 0;
    for seed in 0..40 {
        let mut fleet = Fleet::new(seed, 4);
        let mut waiting = Waiting::default();
        // Until when, and then until which arrival, the age may be wrong.
        let (mut unsure_ms, mut unsure) = (0, 0);
        for step in 0..12_000 {
            fleet.bursts();
            fleet.step(0.02);
            if step % 1500 == 700 {
                fleet.kill(step % 4);
                unsure_ms = fleet.now + TTL + SETTLED as u64 * BEAT + BEAT;
            }
            if step % 1500 == 800 {
                fleet.restart((step - 100) % 4);
            }
            if fleet.now <= unsure_ms {
                unsure = fleet.arrivals.len();
            }
            if step % 10 == 0 {
                let oldest = fleet.look(&mut waiting);
                if fleet.queue.is_empty() {
                    unsure = 0;
                }
                if fleet.queue.front().is_none_or(|front| *front >= unsure) {
                    fleet.check(oldest);
                    told += usize::from(matches!(oldest, Some(Oldest::About(1..))));
                }
            }
        }
    }
    assert!(told > 1000, "{told}");
}

fn idle(at_ms: u64, jobs: u32) -> View {
    let queues = Queues {
        jobs,
        ..Queues::default()
    };
    View {
        at_ms,
        model: Some("m".into()),
        workers: Vec::new(),
        queues: Some(Ok(queues)),
    }
}

/// One that has run for a time, has answered so many jobs and holds so many.
fn consumer(incarnation: &str, age_ms: u64, answered: u64, held: u64) -> Worker {
    let mut record = Record {
        incarnation: incarnation.into(),
        at_ms: 1_000_000 + age_ms,
        started_at_ms: 1_000_000,
        ..Record::default()
    };
    (record.jobs.scored, record.jobs.buffered) = (answered, held);
    Worker {
        record,
        live: LiveRecord::default(),
    }
}

#[test]
fn jobs_of_a_dead_worker_that_were_counted_twice_are_taken_back() {
    let mut waiting = Waiting::default();
    let mut look = |second: u64, jobs: u32, workers: Vec<Worker>| {
        let view = idle(second * 1000, jobs);
        waiting.see(&View { workers, ..view })
    };
    look(0, 0, vec![consumer("dies", 1, 0, 4)]);
    // It is dead, and its jobs wait again; its record is there for five seconds.
    for second in 1..=5 {
        look(second, 4, vec![consumer("dies", 1, 0, 4)]);
    }
    for second in 6..20 {
        look(second, 4, Vec::new());
    }
    // They waited before the queue was last empty.
    assert_eq!(look(20, 5, Vec::new()), Some(Oldest::AtLeast(20_000)));
    // All but the one that came then are taken.
    let other = consumer("other", 1, 0, 4);
    assert_eq!(look(25, 1, vec![other]), Some(Oldest::About(5000)));
}

#[test]
fn of_a_worker_that_is_first_seen_counts_what_it_answered_during_the_watch() {
    let mut waiting = Waiting::default();
    let mut look = |second: u64, jobs: u32, workers: Vec<Worker>| {
        let view = idle(second * 1000, jobs);
        waiting.see(&View { workers, ..view })
    };
    look(0, 0, Vec::new());
    look(1, 5, Vec::new());
    // One more has come, and three were answered by a worker that began after the watch.
    let new = |answered| consumer("new", 8000, answered, 0);
    assert_eq!(look(10, 3, vec![new(3)]), Some(Oldest::About(9000)));
    assert_eq!(look(11, 1, vec![new(5)]), Some(Oldest::About(1000)));
    // One that was there before it was out of sight.
    let old = consumer("old", 3_600_000, 1000, 0);
    assert_eq!(look(12, 1, vec![new(5), old]), Some(Oldest::About(2000)));
    let old = consumer("old", 3_600_000, 1001, 0);
    look(13, 1, vec![new(5), old]);
    assert_eq!(look(14, 1, vec![new(5)]), Some(Oldest::About(1000)));
}

#[test]
fn what_waited_before_the_watch_is_older_than_it() {
    let mut waiting = Waiting::default();
    assert_eq!(waiting.see(&idle(1000, 5)), Some(Oldest::AtLeast(0)));
    assert_eq!(waiting.see(&idle(9000, 7)), Some(Oldest::AtLeast(8000)));
    assert_eq!(waiting.see(&idle(10_000, 0)), None);
    assert_eq!(waiting.see(&idle(11_000, 1)), Some(Oldest::About(0)));
    assert_eq!(waiting.see(&idle(15_000, 9)), Some(Oldest::About(4000)));
}

#[test]
fn what_is_unknown_has_no_age_and_another_model_has_its_own() {
    let mut waiting = Waiting::default();
    waiting.see(&idle(1000, 0));
    let unknown = View {
        queues: Some(Err("RabbitMQ: away".into())),
        ..idle(2000, 0)
    };
    assert_eq!(waiting.see(&unknown), None);
    assert_eq!(waiting.see(&idle(3000, 1)), Some(Oldest::About(0)));
    let other = View {
        model: Some("other".into()),
        ..idle(4000, 1)
    };
    assert_eq!(waiting.see(&other), Some(Oldest::AtLeast(0)));
}

#[test]
fn a_long_backlog_is_kept_in_few_steps() {
    let mut waiting = Waiting::default();
    waiting.see(&idle(0, 0));
    // A job a second for a day, and nobody takes them.
    let day = 86_400_u32;
    for second in 1..=day {
        let told = waiting.see(&idle(u64::from(second) * 1000, second));
        assert_eq!(told, Some(Oldest::About(u64::from(second - 1) * 1000)));
        assert!(waiting.rises.len() <= MOST_RISES);
    }
    // Half of it leaves.
    let mut view = idle(u64::from(day) * 1000, day / 2);
    view.workers = vec![consumer("a", 10, u64::from(day / 2), 0)];
    let exact = u64::from(day / 2) * 1000;
    let told = waiting.see(&view).unwrap().millis();
    assert!(told.abs_diff(exact) <= exact / 100, "{told}");
}

#[test]
fn records_that_lie_overflow_nothing() {
    let mut waiting = Waiting::default();
    for (at_ms, answered) in [(1, 0), (2, u64::MAX), (3, 0), (4, u64::MAX)] {
        let mut view = idle(at_ms, 3);
        let mut record = Record {
            at_ms: u64::MAX,
            ..Record::default()
        };
        (record.jobs.scored, record.jobs.buffered) = (answered, u64::MAX);
        let live = LiveRecord {
            age_ms: u64::MAX,
            text: String::new(),
        };
        view.workers = vec![Worker { record, live }; 3];
        assert!(waiting.see(&view).is_some());
    }
}

#[test]
fn an_answer_says_which_kind_it_is() {
    let json = |oldest| serde_json::to_string(&oldest).unwrap();
    assert_eq!(json(Oldest::About(7)), r#"{"bound":"about","ms":7}"#);
    assert_eq!(json(Oldest::AtLeast(7)), r#"{"bound":"at_least","ms":7}"#);
}
