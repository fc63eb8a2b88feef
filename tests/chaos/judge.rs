//! What must hold of every job of a round, once nothing more will come.

use std::collections::HashMap;

use serde_json::Value;
use testkit::http::Server;

use crate::ledger::{Answer, Entry, Kind};
use crate::plan::DELAYS;

/// What a round's answers are held to.
pub(crate) struct Judge<'a> {
    pub(crate) server: &'a Server,
    /// How often others may have taken each worker for dead in this round.
    pub(crate) suspects: &'a HashMap<String, usize>,
}

impl Judge<'_> {
    /// The violations of one job.
    pub(crate) fn judge(&self, id: &str, entry: &Entry) -> Vec<String> {
        let answers = entry.answers.values();
        let told = answers.filter_map(|answer| self.objection(id, entry, answer));
        let mut violations: Vec<String> = told.map(|what| format!("{id}: {what}")).collect();
        if has_contradiction(entry) {
            let ids: Vec<&String> = entry.answers.keys().collect();
            violations.push(format!("{id} is both scored and rejected: {ids:?}"));
        }
        violations
    }

    fn objection(&self, id: &str, entry: &Entry, answer: &Answer) -> Option<String> {
        let result = &answer.result;
        let code = result["error"]["code"].as_str();
        let (status, kind) = (result["status"].as_str().unwrap_or_default(), entry.kind);
        let last = DELAYS.len() as u64 + 1;
        let expected = match (kind, status, code) {
            (Kind::Sound | Kind::Validate | Kind::Flaky, "scored", None) => true,
            (Kind::Refused, "rejected", Some("candidate_non_finite")) => true,
            (Kind::Flaky | Kind::Gone, "failed", Some("candidate_unavailable")) => {
                // Every rung was climbed, and it is parked.
                answer.attempts.iter().all(|n| *n == last) && (entry.parked > 0 || entry.exposed)
            }
            (Kind::Killer, "failed", Some("poisoned")) => entry.parked > 0,
            (_, "failed", Some("poisoned")) => self.may_be_poisoned(result),
            _ => false,
        };
        if !expected {
            return Some(format!("{kind:?} was answered {result}"));
        }
        // A drain, a death, a lost link: none of them is an attempt.
        let most = match kind {
            Kind::Flaky | Kind::Gone => last.min(self.server.asked(&format!("/{id}")) as u64),
            Kind::Sound | Kind::Refused | Kind::Validate | Kind::Killer => 1,
        };
        let burned = answer.attempts.iter().any(|attempt| *attempt > most.max(1));
        burned.then(|| format!("{kind:?}: attempts {:?}, at most {most}", answer.attempts))
    }

    /// An innocent job is poisoned rightly only if those who are named died, or others had reason to
    /// think so.
    fn may_be_poisoned(&self, result: &Value) -> bool {
        let mut named: HashMap<&str, usize> = HashMap::new();
        let workers = result["error"]["detail"]["workers"].as_array();
        for worker in workers.into_iter().flatten().filter_map(Value::as_str) {
            *named.entry(worker).or_default() += 1;
        }
        let known = |worker: &str| self.suspects.get(worker).copied().unwrap_or_default();
        !named.is_empty() && named.iter().all(|(worker, times)| *times <= known(worker))
    }
}

/// Whatever happens, a candidate is not both.
fn has_contradiction(entry: &Entry) -> bool {
    let has = |status: &str| entry.answers.values().any(|a| a.result["status"] == status);
    has("scored") && has("rejected")
}
