//! A process watched while it works: how many jobs are done, and what processor time it took.

use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(20);
/// A contender that gets nothing done for so long is broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// Linux counts processor time in hundredths of a second for its readers, whatever the kernel does inside.
const MICROS_PER_TICK: f64 = 10_000.0;

/// What a contender did, between the first tenth of its jobs and the last twentieth.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) jobs_per_second: f64,
    /// Microseconds of processor time for each job.
    pub(crate) micros: f64,
}

#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    done: usize,
    ticks: u64,
}

/// Watches until all jobs are done. `processes` are those that work.
pub(crate) fn watch(jobs: usize, processes: &[u32], mut done: impl FnMut() -> usize) -> Pace {
    let (mut samples, mut moved): (Vec<Sample>, _) = (Vec::new(), Instant::now());
    loop {
        let sample = Sample {
            done: done(),
            at: Instant::now(),
            ticks: processes.iter().map(|pid| ticks(*pid)).sum(),
        };
        if samples.last().is_none_or(|last| last.done != sample.done) {
            moved = sample.at;
        }
        assert!(
            moved.elapsed() < PATIENCE,
            "{} of {jobs} jobs done, and no more",
            sample.done
        );
        samples.push(sample);
        if sample.done >= jobs {
            break;
        }
        std::thread::sleep(POLL);
    }
    let reached = |share: usize| {
        let at = samples.iter().find(|s| s.done * 100 >= jobs * share);
        *at.expect("all jobs are done")
    };
    let (from, to) = (reached(10), reached(95));
    let (seconds, count) = (
        (to.at - from.at).as_secs_f64(),
        (to.done - from.done) as f64,
    );
    Pace {
        jobs_per_second: count / seconds,
        micros: (to.ticks - from.ticks) as f64 * MICROS_PER_TICK / count,
    }
}

/// User and system time so far.
fn ticks(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    let text = text.expect("the process is alive");
    // The name in parentheses may hold spaces.
    let (_, fields) = text.rsplit_once(')').expect("a stat line");
    let field = |n: usize| fields.split_ascii_whitespace().nth(n)?.parse::<u64>().ok();
    field(11).expect("utime") + field(12).expect("stime")
}

/// The middle one.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
