//! The members of a merge before they are measured. They come one at a time, in any order: each is decoded and its
//! bytes are dropped, and what they hold together is bounded as that of one candidate is.

use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use crate::candidate::fetch::Fetched;
use crate::candidate::{self, DecodeLimits, Decoded};
use crate::engine::coalition::{Member, Source};
use crate::model::package::Package;
use crate::protocol;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::job::{Compression, Format, Rule};
use crate::protocol::merge::OnRejected;
use crate::protocol::result::CandidateFacts;
use crate::util::clock::Lap;

/// What a job says of a member beside where its bytes are.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    /// Its name in the job.
    pub id: String,
    /// Its weight in the merge.
    pub weight: f64,
    /// The container.
    pub format: Format,
    /// Compression of the whole body.
    pub compression: Option<Compression>,
    /// What the values do.
    pub rule: Rule,
}

impl From<&protocol::job::Member> for Described {
    fn from(member: &protocol::job::Member) -> Self {
        Self {
            id: member.id.clone(),
            weight: member.weight,
            format: member.candidate.format,
            compression: member.candidate.compression,
            rule: member.candidate.rule,
        }
    }
}

/// A member that is left out.
#[derive(Debug, Clone, PartialEq)]
pub struct LeftOut {
    /// Its name in the job.
    pub id: String,
    /// Its weight in the merge.
    pub weight: f64,
    /// Why.
    pub failure: Failure,
}

/// Members under way.
#[derive(Debug)]
pub struct Members {
    package: Arc<Package>,
    limits: DecodeLimits,
    entries: u64,
    inflated: u64,
    decoded: Vec<(Member, CandidateFacts)>,
    left_out: Vec<LeftOut>,
    /// Milliseconds.
    decoding: f64,
}

/// Members that can be measured: at least one.
#[derive(Debug)]
pub struct Ready {
    /// In ascending order of their ids.
    pub members: Arc<[Member]>,
    pub(super) facts: Vec<CandidateFacts>,
    pub(super) left_out: Vec<LeftOut>,
    /// Milliseconds.
    pub(super) decoding: f64,
}

impl Members {
    /// None yet.
    pub fn new(package: Arc<Package>, limits: DecodeLimits) -> Self {
        Self {
            package,
            limits,
            entries: 0,
            inflated: 0,
            decoded: Vec::new(),
            left_out: Vec::new(),
            decoding: 0.0,
        }
    }

    /// Decodes the next one, or leaves it out if it would be refused alone.
    ///
    /// # Errors
    /// `candidate_too_large` when the members together exceed a limit that none of them exceeds.
    pub fn add(&mut self, described: Described, fetched: Fetched) -> Result<(), Failure> {
        let began = Instant::now();
        let decoded = candidate::decode_counted(
            &fetched.bytes,
            described.format,
            described.compression,
            &self.package,
            self.limits,
        );
        self.decoding += Lap::since(began).millis();
        let Decoded { update, inflated } = match decoded {
            Ok(decoded) => decoded,
            Err(failure) => {
                self.leave_out(described, failure);
                return Ok(());
            }
        };
        self.entries = self.entries.saturating_add(update.entries());
        self.inflated = self.inflated.saturating_add(inflated);
        let (entries, bytes) = (self.limits.max_entries, self.limits.max_inflated_bytes);
        if self.entries > entries {
            return Err(too_large("have", "candidates.max_entries", entries));
        }
        if self.inflated > bytes {
            return Err(too_large(
                "inflate to",
                "candidates.max_inflated_bytes",
                bytes,
            ));
        }
        let facts = CandidateFacts {
            sha256: hex::encode(fetched.sha256),
            tensors: update.tensors.len() as u64,
            entries: update.entries(),
            // Known once it is measured.
            effective_entries: 0,
            l2_norm: update.l2_norm(),
            sketch: Vec::new(),
        };
        let member = Member {
            id: described.id,
            source: Source {
                sha256: fetched.sha256,
                format: described.format,
                compression: described.compression,
            },
            update,
            rule: described.rule,
            weight: described.weight,
        };
        self.decoded.push((member, facts));
        Ok(())
    }

    /// Leaves one out that did not come so far.
    pub fn leave_out(&mut self, described: Described, failure: Failure) {
        self.left_out.push(LeftOut {
            id: described.id,
            weight: described.weight,
            failure,
        });
    }

    /// In ascending order of their ids, so that the order in which they came changes nothing.
    ///
    /// # Errors
    /// That of the first one left out, where nobody may be or nobody stays.
    pub fn ready(mut self, on_rejected: OnRejected) -> Result<Ready, Failure> {
        if self.decoded.is_empty() || (on_rejected == OnRejected::Fail && !self.left_out.is_empty())
        {
            return Err(refusal(self.left_out));
        }
        self.decoded.sort_by(|(a, _), (b, _)| a.id.cmp(&b.id));
        let (members, facts): (Vec<Member>, Vec<CandidateFacts>) = self.decoded.into_iter().unzip();
        Ok(Ready {
            members: members.into(),
            facts,
            left_out: self.left_out,
            decoding: self.decoding,
        })
    }
}

/// Bounds the bytes that the members are said to have, before the first of them is fetched. One that is too large by
/// itself is left out for that, and counts for nothing. `key` names the limit.
///
/// # Errors
/// `candidate_too_large`
pub fn check_sizes(
    sizes: impl Iterator<Item = u64>,
    (key, limit): (&str, u64),
) -> Result<(), Failure> {
    let sum = { sizes }
        .filter(|size| *size <= limit)
        .fold(0, u64::saturating_add);
    match sum > limit {
        true => Err(too_large("are", key, limit).with("size", sum)),
        false => Ok(()),
    }
}

/// The failure of a whole merge, with those that were left out before in its detail: without them it might have been
/// another.
pub(super) fn beside(left_out: &[LeftOut], failure: Failure) -> Failure {
    match left_out.is_empty() || failure.detail.contains_key("members") {
        true => failure,
        false => failure.with("members", named(left_out)),
    }
}

fn named(left_out: &[LeftOut]) -> Vec<serde_json::Value> {
    let named = |member: &LeftOut| json!({"id": member.id, "code": member.failure.code.as_str()});
    left_out.iter().map(named).collect()
}

/// Why a merge has no numbers: the first of those left out by id says it, the detail names all.
pub(super) fn refusal(mut left_out: Vec<LeftOut>) -> Failure {
    left_out.sort_by(|a, b| a.id.cmp(&b.id));
    let members = named(&left_out);
    let Some(first) = left_out.into_iter().next() else {
        return Failure::new(Code::InferenceFailed, "a merge of no members at all");
    };
    let message = format!("member {}: {}", first.id, first.failure.message);
    Failure::new(first.failure.code, message).with("members", members)
}

fn too_large(what: &str, key: &str, limit: u64) -> Failure {
    let message = format!("the members together {what} more than {key} = {limit}");
    Failure::new(Code::CandidateTooLarge, message).with("limit", limit)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::CandidatesConfig;
    use crate::engine::tests::{configuration, hazard};

    /// A candidate of so many entries in the first tensor; of none, it is empty.
    pub(in crate::scoring) fn candidate(package: &Package, entries: usize) -> bytes::Bytes {
        use std::io::Write as _;
        let tensor = &package.weights.tensors[0];
        let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), Default::default());
        for _ in 0..entries {
            packed.write_all(&0.5_f32.to_le_bytes()).unwrap();
        }
        for index in 0..i32::try_from(entries).unwrap() {
            packed.write_all(&index.to_le_bytes()).unwrap();
        }
        use base64::Engine as _;
        let data = base64::engine::general_purpose::STANDARD.encode(packed.finish().unwrap());
        let entry = serde_json::json!({"shape": tensor.shape, "k": entries, "data": data});
        serde_json::json!({ tensor.name.clone(): entry })
            .to_string()
            .into()
    }

    fn add(members: &mut Members, id: &str, entries: usize) -> Result<(), Failure> {
        let described = Described {
            id: id.into(),
            weight: 0.5,
            format: Format::BinaryV2,
            compression: None,
            rule: Rule::ParamDiff,
        };
        let fetched = Fetched {
            bytes: candidate(&members.package, entries),
            sha256: [0; 32],
        };
        members.add(described, fetched)
    }

    fn members(set: impl Fn(&mut CandidatesConfig)) -> (Members, tempfile::TempDir) {
        let (package, folder) = hazard();
        let mut config = configuration().candidates;
        set(&mut config);
        (Members::new(package, (&config).into()), folder)
    }

    #[test]
    fn one_that_would_be_refused_alone_is_left_out_and_too_many_entries_together_are_refused() {
        let (mut members, _folder) = members(|config| config.max_entries = 5);
        add(&mut members, "b", 3).unwrap();
        add(&mut members, "c", 6).unwrap();
        add(&mut members, "a", 2).unwrap();
        let failure = add(&mut members, "d", 1).unwrap_err();
        assert_eq!(failure.code, Code::CandidateTooLarge);
        assert!(failure.message.contains("max_entries"), "{failure}");
        let ready = members.ready(OnRejected::Drop).unwrap();
        let ids: Vec<&str> = ready.members.iter().map(|m| m.id.as_str()).collect();
        assert_eq!(ids, ["a", "b"]);
        let [left_out] = &ready.left_out[..] else {
            panic!("{:?}", ready.left_out)
        };
        assert_eq!(left_out.failure.code, Code::CandidateTooLarge);
    }

    #[test]
    fn nobody_may_be_left_out_where_that_fails_the_merge_and_somebody_must_stay() {
        let of = |ids: &[(&str, usize)], on_rejected| {
            let (mut members, _folder) = members(|config| config.max_entries = 5);
            for (id, entries) in ids {
                add(&mut members, id, *entries).unwrap();
            }
            members.ready(on_rejected).map(|ready| ready.members.len())
        };
        assert_eq!(of(&[("b", 2), ("a", 2)], OnRejected::Fail), Ok(2));
        assert_eq!(of(&[("b", 6), ("a", 2)], OnRejected::Drop), Ok(1));
        for (ids, on_rejected) in [
            ([("b", 6), ("a", 2)], OnRejected::Fail),
            ([("b", 6), ("a", 7)], OnRejected::Drop),
        ] {
            let failure = of(&ids, on_rejected).unwrap_err();
            assert_eq!(failure.code, Code::CandidateTooLarge);
            let named = failure.detail["members"].as_array().unwrap().len();
            assert_eq!(
                named,
                ids.iter().filter(|(_, entries)| *entries > 5).count()
            );
        }
    }

    #[test]
    fn inflated_bytes_are_bounded_together() {
        let (mut members, _folder) = members(|config| config.max_inflated_bytes = 40);
        add(&mut members, "a", 3).unwrap();
        let failure = add(&mut members, "b", 3).unwrap_err();
        assert!(failure.message.contains("max_inflated_bytes"), "{failure}");
    }

    #[test]
    fn declared_sizes_are_bounded_together() {
        let check = |sizes: &[u64]| check_sizes(sizes.iter().copied(), ("k", 10));
        assert_eq!(check(&[4, 6]), Ok(()));
        assert_eq!(check(&[11, 4, 6]), Ok(()), "refused by itself");
        assert_eq!(check(&[4, 7]).unwrap_err().code, Code::CandidateTooLarge);
        assert!(check(&[10; 64]).is_err());
    }
}
