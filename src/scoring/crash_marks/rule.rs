//! The counting rule: which marks are deaths, when a job is poisoned, and when a worker counts as dead. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::protocol::failure::{Code, Failure};
use crate::store::DEAD;

/// A worker whose record has been missing for this many TTLs is dead.
const GONE_FOR: u32 = 2;
/// No job waits for longer than this many TTLs. After that it runs, and nothing is counted.
const MOST_TTLS: u32 = 20;

/// When a job's marks make it poisoned. A death is a mark of another incarnation that says `dead:`.
#[derive(Debug)]
pub(in crate::scoring) struct Rule {
    /// The field of our own marks.
    pub(in crate::scoring) own: String,
    /// So many deaths make a job poisoned.
    pub(in crate::scoring) poison_after: usize,
}

impl Rule {
    /// Whether any of the marks is another incarnation's.
    pub(in crate::scoring) fn has_foreign(&self, marks: &[(String, String)]) -> bool {
        marks.iter().any(|(field, _)| *field != self.own)
    }

    /// The marks of others that are neither deaths nor of workers known to be alive: those workers may
    /// be running the job, or may have died of it.
    ///
    /// # Errors
    /// `poisoned`, when enough workers died.
    pub(in crate::scoring) fn open_marks(
        &self,
        marks: &[(String, String)],
        alive: &HashSet<String>,
    ) -> Result<Vec<String>, Failure> {
        let foreign = marks.iter().filter(|(field, _)| *field != self.own);
        let (dead, open): (Vec<_>, Vec<_>) =
            foreign.partition(|(_, value)| value.starts_with(DEAD));
        if dead.len() >= self.poison_after {
            return Err(poisoned(&dead));
        }
        let open = open.into_iter().map(|(field, _)| field.clone());
        Ok(open.filter(|field| !alive.contains(field)).collect())
    }
}

fn poisoned(dead: &[&(String, String)]) -> Failure {
    let ids = dead.iter().map(|(field, _)| field.as_str());
    let mut ids: Vec<&str> = ids
        .map(|field| field.rsplit_once('/').map_or(field, |(id, _)| id))
        .collect();
    ids.sort_unstable();
    let message = format!(
        "{} workers died while they were scoring this job: {}",
        ids.len(),
        ids.join(", ")
    );
    let failure = Failure::new(Code::Poisoned, message)
        .with("deaths", ids.len())
        .with("workers", json!(ids));
    // Of a merge: the members that they worked on, each once.
    let noted = dead.iter().filter_map(|(_, value)| value.split_once(' '));
    let members: BTreeSet<&str> = noted.map(|(_, member)| member).collect();
    if members.is_empty() {
        return failure;
    }
    let named = members.iter().copied().collect::<Vec<&str>>().join(", ");
    let members = { members.iter() }.map(|id| json!({"id": id, "code": Code::Poisoned.as_str()}));
    let members: Vec<serde_json::Value> = members.collect();
    Failure {
        message: format!("{}; members that they worked on: {named}", failure.message),
        ..failure
    }
    .with("members", members)
}

/// What a waiting job has seen of the incarnations behind its open marks.
#[derive(Debug)]
pub(in crate::scoring) struct Watch {
    ttl: Duration,
    began: Instant,
    /// The last time that Redis answered.
    looked: Instant,
    seen: HashMap<String, Seen>,
    /// Those known to be alive.
    pub(in crate::scoring) alive: HashSet<String>,
}

#[derive(Debug)]
struct Seen {
    /// At the first look; 0 = there was no record.
    first_seq: u64,
    gone_since: Option<Instant>,
}

impl Watch {
    pub(in crate::scoring) fn new(ttl: Duration, now: Instant) -> Self {
        Self {
            ttl,
            began: now,
            looked: now,
            seen: HashMap::new(),
            alive: HashSet::new(),
        }
    }

    /// Notes the `seq` of each; returns those that are dead. A newer `seq` proves that a worker is alive.
    /// One whose record is missing for [`GONE_FOR`] TTLs is dead, provided that we could see it: the
    /// count starts again when our own heartbeats did not get through, or when we did not look for a
    /// TTL, because then their records may be missing for the same reason.
    pub(in crate::scoring) fn look(
        &mut self,
        open: &[String],
        seqs: &[Option<u64>],
        since_beat: Duration,
        now: Instant,
    ) -> Vec<String> {
        if since_beat > self.ttl || now.duration_since(self.looked) > self.ttl {
            for seen in self.seen.values_mut() {
                seen.gone_since = None;
            }
        }
        self.looked = now;
        let mut dead = Vec::new();
        for (field, seq) in open.iter().zip(seqs) {
            let seen = self.seen.entry(field.clone()).or_insert(Seen {
                first_seq: seq.unwrap_or(0),
                gone_since: None,
            });
            match seq {
                Some(seq) if *seq > seen.first_seq => {
                    self.alive.insert(field.clone());
                }
                Some(_) => seen.gone_since = None,
                None => {
                    let since = *seen.gone_since.get_or_insert(now);
                    if now.duration_since(since) >= self.ttl * GONE_FOR {
                        dead.push(field.clone());
                    }
                }
            }
        }
        dead
    }

    /// Redis has not answered for a TTL, or the job has waited for long enough.
    pub(in crate::scoring) fn gives_up(&self, now: Instant) -> bool {
        now.duration_since(self.looked) > self.ttl
            || now.duration_since(self.began) > self.ttl * MOST_TTLS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(5);
    const FRESH: Duration = Duration::from_millis(500);

    /// Looks every half second at one incarnation, and says when it was found dead.
    fn dies_at(
        watch: &mut Watch,
        began: Instant,
        looks: impl Iterator<Item = (f64, Option<u64>, Duration)>,
    ) -> Option<f64> {
        let open = ["w/1".to_owned()];
        for (at, seq, since_beat) in looks {
            let now = began + Duration::from_secs_f64(at);
            if !watch.look(&open, &[seq], since_beat, now).is_empty() {
                return Some(at);
            }
        }
        None
    }

    fn every_half_second(until: u32) -> impl Iterator<Item = f64> {
        (0..until * 2).map(|n| f64::from(n) / 2.0)
    }

    #[test]
    fn a_poisoned_job_names_the_workers_that_died_and_our_own_marks_are_not_foreign() {
        let rule = Rule {
            own: "me/1".into(),
            poison_after: 2,
        };
        let marks = |fields: &[&str]| -> Vec<(String, String)> {
            let mark = |field: &&str| ((*field).to_owned(), "dead:7".to_owned());
            fields.iter().map(mark).collect()
        };
        let found = rule.open_marks(&marks(&["w/2", "me/1", "v/1"]), &HashSet::new());
        let failure = found.unwrap_err();
        assert_eq!(failure.code, Code::Poisoned);
        assert!(failure.message.ends_with("this job: v, w"), "{failure}");
        assert_eq!(failure.detail["workers"], json!(["v", "w"]));
        assert!(rule.has_foreign(&marks(&["me/1", "me/2"])));
        assert!(!rule.has_foreign(&marks(&["me/1"])));
    }

    #[test]
    fn a_poisoned_merge_names_the_members_that_were_worked_on() {
        let rule = Rule {
            own: "me/1".into(),
            poison_after: 3,
        };
        let marks = [
            ("v/1", "dead:5 m3"),
            ("w/2", "dead:6 m3"),
            ("x/3", "dead:7"),
        ];
        let marks = marks.map(|(field, value)| (field.to_owned(), value.to_owned()));
        let failure = rule.open_marks(&marks, &HashSet::new()).unwrap_err();
        let expected = json!([{"id": "m3", "code": "poisoned"}]);
        assert_eq!(failure.detail["members"], expected);
        assert!(failure.message.ends_with("worked on: m3"), "{failure}");
    }

    #[test]
    fn a_newer_seq_is_a_sign_of_life_and_the_same_one_is_not() {
        let began = Instant::now();
        let mut watch = Watch::new(TTL, began);
        let open = ["w/1".to_owned()];
        for seq in [7, 7] {
            watch.look(&open, &[Some(seq)], FRESH, began);
            assert!(watch.alive.is_empty());
        }
        watch.look(&open, &[Some(8)], FRESH, began);
        assert!(watch.alive.contains("w/1"));
        // A record that was gone and is there again was written since.
        let mut watch = Watch::new(TTL, began);
        watch.look(&open, &[None], FRESH, began);
        watch.look(&open, &[Some(1)], FRESH, began);
        assert!(watch.alive.contains("w/1"));
    }

    #[test]
    fn a_record_that_is_missing_for_two_ttls_is_a_death() {
        let began = Instant::now();
        let there_for =
            |secs: f64| every_half_second(60).map(move |at| (at, (at < secs).then_some(7), FRESH));
        let mut watch = Watch::new(TTL, began);
        assert_eq!(dies_at(&mut watch, began, there_for(0.0)), Some(10.0));
        let mut watch = Watch::new(TTL, began);
        assert_eq!(dies_at(&mut watch, began, there_for(4.5)), Some(14.5));
        assert!(!watch.gives_up(began + Duration::from_secs(14)));
    }

    #[test]
    fn nobody_is_dead_while_our_own_beats_or_looks_fail() {
        let began = Instant::now();
        let mut watch = Watch::new(TTL, began);
        let away = every_half_second(60).map(|at| (at, None, TTL * 2));
        assert_eq!(dies_at(&mut watch, began, away), None);
        // Beats are lost from the 3rd second to the 12th: the wait begins anew.
        let mut watch = Watch::new(TTL, began);
        let gap = every_half_second(60).map(|at| {
            let since_beat = if (3.0..12.0).contains(&at) {
                TTL * 2
            } else {
                FRESH
            };
            (at, None, since_beat)
        });
        assert_eq!(dies_at(&mut watch, began, gap), Some(21.5));
        // We were frozen from the 3rd second to the 20th.
        let mut watch = Watch::new(TTL, began);
        let frozen = every_half_second(60)
            .filter(|at| !(3.0..20.0).contains(at))
            .map(|at| (at, None, FRESH));
        assert_eq!(dies_at(&mut watch, began, frozen), Some(30.0));
    }

    #[test]
    fn no_job_waits_for_ever() {
        let began = Instant::now();
        let mut watch = Watch::new(TTL, began);
        let same = every_half_second(100).map(|at| (at, Some(7), FRESH));
        assert_eq!(dies_at(&mut watch, began, same), None);
        assert!(!watch.gives_up(began + TTL * 20));
        assert!(watch.gives_up(began + TTL * 20 + FRESH));
        assert!(
            Watch::new(TTL, began).gives_up(began + TTL + FRESH),
            "Redis does not answer any more"
        );
    }
}
