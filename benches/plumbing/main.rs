//! What a job costs besides its model, on services of the bench's own: our worker beside a bare lapin loop that does the
//! same without scoring, from one worker to four, and beside Celery and dramatiq; the makespan of jobs of very
//! different length by prefetch; and `scorer status` of a large fleet. `ops/plumbing` runs it all.
//!
//! Contenders take turns within one run, so that noise hits all alike. The figures to keep are ratios.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a failed step ends the benchmark, and its tables are for people"
)]

mod bare;
mod contest;
mod fairness;
mod fleet;
mod python;
mod sample;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// What a job costs besides its model.
#[derive(Debug, Parser)]
struct Arguments {
    /// Times that every contender has its turn.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Jobs of a turn.
    #[arg(long, default_value_t = 4000)]
    jobs: usize,
    /// Only these parts.
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// A Python that has the packages of benches/python/requirements.txt; without it the Python workers are left out.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Another `scorer` to measure beside this one.
    #[arg(long)]
    against: Option<PathBuf>,
    /// `cargo bench` says so.
    #[arg(long, hide = true)]
    bench: bool,
    /// Becomes the bare loop: URL NAMESPACE PREFETCH WINDOW.
    #[arg(long, hide = true, num_args = 4)]
    bare: Option<Vec<String>>,
}

/// A part of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// One worker beside a bare loop, by prefetch.
    Bare,
    /// One, two and four workers.
    Scaling,
    /// Celery and dramatiq.
    Python,
    /// Makespan of jobs of very different length, by prefetch.
    Fairness,
    /// `scorer status` of 10,000 workers.
    Fleet,
}

impl Arguments {
    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

fn main() {
    let arguments = Arguments::parse();
    if let Some(bare) = &arguments.bare {
        return bare::run(&bare[0], &bare[1], &bare[2], &bare[3]);
    }
    let stacks = contest::Services::start();
    if arguments.wants(Part::Bare) {
        contest::beside_a_bare_loop(&stacks, &arguments);
    }
    if arguments.wants(Part::Scaling) {
        contest::from_one_to_four(&stacks, &arguments);
    }
    if arguments.wants(Part::Python) {
        python::beside_python(&stacks, &arguments);
    }
    if arguments.wants(Part::Fairness) {
        fairness::by_prefetch(&stacks, &arguments);
    }
    if arguments.wants(Part::Fleet) {
        fleet::status_of_many(&stacks);
    }
}
