//! What a run did and found.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::fleet::{Cause, Death};
use crate::ledger::{Entry, Kind as JobKind};
use crate::plan::Kind;

#[derive(Default)]
pub(crate) struct Report {
    pub(crate) seed: u64,
    /// The broker is a cluster of three nodes.
    pub(crate) clustered: bool,
    pub(crate) rounds: u64,
    pub(crate) took: Duration,
    pub(crate) faults: BTreeMap<Kind, usize>,
    pub(crate) deaths: BTreeMap<Cause, usize>,
    /// The most workers that died while they held one job's mark.
    pub(crate) most_deaths: usize,
    pub(crate) resubmitted: usize,
    pub(crate) lost: usize,
    pub(crate) recoveries: Vec<Duration>,
    /// Jobs that workers say to have answered, each held to when it came.
    pub(crate) testified: usize,
    pub(crate) violations: usize,
    jobs: BTreeMap<JobKind, usize>,
    statuses: BTreeMap<String, usize>,
    answers: u32,
    copies: u32,
    identical: u32,
    reread: u32,
    parked: usize,
    poisoned_innocents: usize,
}

impl Report {
    pub(crate) fn new(seed: u64, clustered: bool) -> Self {
        Self {
            seed,
            clustered,
            ..Self::default()
        }
    }

    /// How long a recovery took; one that took too long is a violation, once.
    pub(crate) fn note(
        &mut self,
        recovery: Result<Duration, String>,
        violations: &mut Vec<String>,
    ) {
        match recovery {
            Ok(took) => self.recoveries.push(took),
            Err(late) if violations.contains(&late) => {}
            Err(late) => violations.push(late),
        }
    }

    /// Counts a job once nothing more will come.
    pub(crate) fn count_job(&mut self, entry: &Entry) {
        if !entry.confirmed {
            return;
        }
        *self.jobs.entry(entry.kind).or_default() += 1;
        self.parked += usize::from(entry.parked > 0);
        for answer in entry.answers.values() {
            let result = &answer.result;
            let code = result["error"]["code"].as_str();
            let status = code.or(result["status"].as_str()).unwrap_or_default();
            *self.statuses.entry(status.to_owned()).or_default() += 1;
            self.answers += 1;
            self.copies += answer.copies.max(1) - 1;
            self.identical += answer.identical.max(1) - 1;
            self.reread += answer.reread;
            let innocent = entry.kind != JobKind::Killer;
            self.poisoned_innocents += usize::from(innocent && status == "poisoned");
        }
    }

    pub(crate) fn count_deaths(&mut self, deaths: &[Death]) {
        let mut of: BTreeMap<&String, usize> = BTreeMap::new();
        for death in deaths {
            *self.deaths.entry(death.cause).or_default() += 1;
            for job in death.marked.iter().flatten() {
                *of.entry(job).or_default() += 1;
            }
        }
        self.most_deaths = of.into_values().max().unwrap_or_default();
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: usize = self.faults.values().sum();
        let jobs: usize = self.jobs.values().sum();
        let minutes = self.took.as_secs_f64() / 60.0;
        let nodes = if self.clustered { 3 } else { 1 };
        writeln!(
            f,
            "seed {}, {} rounds, {minutes:.1} minutes, RabbitMQ on {nodes} node(s)",
            self.seed, self.rounds
        )?;
        writeln!(f, "faults      {total}: {:?}", self.faults)?;
        writeln!(
            f,
            "deaths      {:?}; at most {} of one job, those included that Redis forgot",
            self.deaths, self.most_deaths
        )?;
        writeln!(f, "jobs        {jobs}: {:?}", self.jobs)?;
        writeln!(f, "results     {}: {:?}", self.answers, self.statuses)?;
        writeln!(
            f,
            "duplicates  {} further copies, {} of them equal in every byte; {} read again",
            self.copies, self.identical, self.reread
        )?;
        writeln!(f, "parked      {}", self.parked)?;
        writeln!(
            f,
            "lost        {}; {} submitted again after a queue was deleted",
            self.lost, self.resubmitted
        )?;
        writeln!(
            f,
            "poisoned    {} that kill nobody",
            self.poisoned_innocents
        )?;
        writeln!(
            f,
            "deliveries  {} held to the log of their worker",
            self.testified
        )?;
        let longest = self.recoveries.iter().max().copied().unwrap_or_default();
        writeln!(f, "recovery    {:.1} s at most", longest.as_secs_f64())?;
        write!(f, "violations  {}", self.violations)
    }
}
