//! A fleet of real workers under faults of every kind, drawn from a seed. After each round of faults the
//! fleet must be ready within 15 s, and of every job that the broker took there must be a result or a
//! parked copy. The rest of what must hold is in `judge` (answers), `fleet` (deaths), `testimony`
//! (deliveries) and `ledger` (copies).
//!
//! The test is a short run with a fixed seed. `ops/chaos` makes long ones: `CHAOS_MINUTES`, `CHAOS_SEED`,
//! `CHAOS_ROUND` to repeat one round alone, and `CHAOS_CLUSTER=1` for a broker of three nodes. A seed
//! repeats the plan and the jobs; processes and networks take their own time.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]
#![expect(
    clippy::print_stdout,
    reason = "the schedule, what was violated, and the report"
)]

mod broker;
mod client;
mod fleet;
mod inbox;
mod judge;
mod ledger;
mod load;
mod plan;
mod proxy;
mod records;
mod recovery;
mod report;
mod run;
mod settle;
mod strike;
mod testimony;

use std::time::Duration;

use run::Length;

/// Of the short run.
const SEED: u64 = 1;

#[test]
fn a_fleet_under_faults_loses_nothing_and_is_ready_soon() {
    let seed = number("CHAOS_SEED").unwrap_or(SEED);
    let length = match (number("CHAOS_ROUND"), number("CHAOS_MINUTES")) {
        (Some(round), _) => Length::Only(round),
        (None, Some(minutes)) => Length::Time(Duration::from_secs(60 * minutes)),
        (None, None) => Length::Rounds(plan::ROUNDS_PER_DECK),
    };
    let report = run::run(seed, length, number("CHAOS_CLUSTER") == Some(1));
    println!("{report}");
    assert_eq!(
        report.violations, 0,
        "see the lines with === above; the plan is that of seed {seed}"
    );
}

/// A number from the environment. Not under `SCORER_`: workers refuse what is no key of theirs.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}: {text:?} is no number")),
    )
}
