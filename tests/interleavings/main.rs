//! Every interleaving of what two workers, a broker and Redis can do with a few jobs, explored to
//! the end: nothing is lost and nothing is stuck. The same search must find each seeded bug.
//!
//! An explicit-state model checker. A [`World`](world::World) is everything that matters at one
//! moment: the copies of jobs, what workers do, what is published and stored. `moves.rs` lists what
//! can happen next, with at most so many disturbances (crashes, lost links, drains, ...) in one run,
//! and `search.rs` visits every world that can be reached. What a verdict means and which states may
//! follow each other is asked of the real `dispose`, `Code` and `State::may_become`; the rest
//! of the rules is a table, `jobs.rs` and `workers.rs`, that names at each step the function of the
//! crate it mirrors. Change them together.
//!
//! Left out: time; the order within a queue; Redis being away (copies of a result may differ then);
//! undecodable bodies and rejections (they settle as scores do); `reply_to`; deadlines; updates; two
//! workers of one name; how it is found out that an incarnation is dead. A process that ends is
//! started again; one that stays away is one that does nothing.

mod jobs;
mod moves;
mod search;
mod workers;
mod world;

use search::{Counterexample, search};
use world::{Broken, Bug, Job, Kind, Scenario};

const ALL: &[Job] = &[Job::Ordinary, Job::Flaky, Job::Killer];
const ORDINARY: &[Job] = &[Job::Ordinary];
const FLAKY: &[Job] = &[Job::Flaky];
const KILLER: &[Job] = &[Job::Killer];
const ORDINARY_AND_FLAKY: &[Job] = &[Job::Ordinary, Job::Flaky];
const ORDINARY_AND_KILLER: &[Job] = &[Job::Ordinary, Job::Killer];

fn scenario(jobs: &'static [Job], prefetch: usize, disturbances: u8) -> Scenario {
    Scenario {
        jobs,
        prefetch,
        disturbances,
        nacks_count: true,
        bug: None,
    }
}

/// A broker from 4.3 on.
fn with_free_nacks(scenario: Scenario) -> Scenario {
    Scenario {
        nacks_count: false,
        ..scenario
    }
}

/// Explores a scenario to the end. Everything must have happened but what cannot in it: a model in
/// which nothing goes wrong proves nothing.
#[track_caller]
fn holds(scenario: Scenario, impossible: &[Kind]) -> String {
    let explored = match search(&scenario) {
        Ok(explored) => explored,
        Err(found) => panic!("{scenario:?}: {found}"),
    };
    let happened = &explored.kinds;
    let mixed_up = impossible.iter().any(|kind| happened.contains(kind));
    let all = happened.len() + impossible.len() == Kind::Drain as usize + 1;
    assert!(all && !mixed_up, "only {happened:?}");
    format!("{} worlds: {scenario:?}", explored.worlds)
}

/// Finds a seeded bug by the invariants that it breaks.
#[track_caller]
fn finds(bug: Bug, scenario: Scenario, broken: &[Broken]) -> Counterexample {
    let bug = Some(bug);
    match search(&Scenario { bug, ..scenario }) {
        Ok(_) => panic!("{bug:?} is not found"),
        Err(found) => {
            let expected = broken.iter().all(|broken| found.broken.contains(broken));
            assert!(expected, "{bug:?} breaks {found}");
            found
        }
    }
}

#[test]
fn one_disturbance_of_three_jobs_loses_nothing_and_leaves_nothing_stuck() {
    println!("{}", holds(scenario(ALL, 1, 1), &[Kind::CutOff]));
}

#[test]
#[ignore = "1.8 million worlds: three quarters of a minute and 600 MB"]
fn neither_do_two_disturbances_of_three_jobs() {
    println!("{}", holds(scenario(ALL, 1, 2), &[]));
}

#[test]
fn three_disturbances_of_one_job_lose_nothing() {
    let scenario = scenario(ORDINARY, 1, 3);
    let impossible = [Kind::Kill, Kind::RungExpires];
    println!("{}", holds(scenario, &impossible));
    println!("{}", holds(with_free_nacks(scenario), &impossible));
}

#[test]
fn a_job_that_climbs_the_ladder_is_answered_and_parked() {
    let alone = scenario(FLAKY, 1, 2);
    let impossible = [Kind::Kill, Kind::Score, Kind::Stall];
    println!("{}", holds(alone, &impossible));
    println!("{}", holds(with_free_nacks(alone), &impossible));
    let beside_another = scenario(ORDINARY_AND_FLAKY, 1, 2);
    println!("{}", holds(beside_another, &[Kind::Kill]));
}

#[test]
fn a_killer_gets_few_workers_and_harms_no_job_beside_it() {
    let scenario_of_two = scenario(ORDINARY_AND_KILLER, 1, 2);
    println!("{}", holds(scenario_of_two, &[Kind::RungExpires]));
    let held_together = scenario(ORDINARY_AND_KILLER, 2, 1);
    let impossible = [Kind::RungExpires, Kind::CutOff];
    println!("{}", holds(held_together, &impossible));
    let alone = with_free_nacks(scenario(KILLER, 1, 2));
    println!("{}", holds(alone, &[Kind::RungExpires, Kind::Score]));
}

#[test]
fn each_seeded_bug_is_found() {
    let ordinary = |disturbances| scenario(ORDINARY, 1, disturbances);
    let killer = scenario(KILLER, 1, 0);
    let together = scenario(ORDINARY_AND_KILLER, 2, 0);
    let lost = [Broken::AckedUnconfirmed, Broken::JobLost];
    for (bug, scenario, broken) in [
        (Bug::AckBeforeConfirm, ordinary(0), &lost[..]),
        (
            Bug::RepublishWithoutConfirmBeforeAck,
            scenario(FLAKY, 1, 0),
            &lost,
        ),
        (
            Bug::ResultNotStoredFirst,
            ordinary(1),
            &[Broken::CopiesDiffer],
        ),
        (Bug::NackOnPoison, killer, &[Broken::LimitReached]),
        (Bug::NackOnPoison, with_free_nacks(killer), &[Broken::Stuck]),
        (Bug::MarksIgnored, killer, &[Broken::KilledTooMany]),
        (Bug::BystandersMarked, together, &[Broken::InnocentPoisoned]),
        (
            Bug::ReadyWhileCancelled,
            ordinary(1),
            &[Broken::ReadyUnregistered],
        ),
        (
            Bug::ConsumerOutlivesReady,
            ordinary(1),
            &[Broken::DeliveredUnready],
        ),
        (Bug::ForgottenRewarm, ordinary(2), &[Broken::ReadyUnproven]),
        (Bug::ForgottenReload, ordinary(2), &[Broken::ReadyUnproven]),
        (Bug::EndlessNack, ordinary(2), &[Broken::AttemptBurned]),
        (
            Bug::HandBackCountsAsAttempt,
            ordinary(2),
            &[Broken::AttemptBurned],
        ),
    ] {
        println!("{bug:?} breaks {}", finds(bug, scenario, broken));
    }
}
