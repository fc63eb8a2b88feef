//! The members within a merge job, and the checks that turn them into [`Member`]s.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::candidate::CandidateMessage;
use super::failure::Failure;
use super::job::{Member, invalid};
use super::names::is_submission_id;

/// A member as the wire carries it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemberMessage {
    /// Names it within the job; 1 to 128 of `[A-Za-z0-9._:-]`.
    #[schemars(regex(pattern = r"^[A-Za-z0-9._:-]{1,128}$"))]
    pub id: String,
    /// What it changes.
    pub candidate: CandidateMessage,
    /// What its change is multiplied by; finite and not 0. Default one by the number of members as sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("not" = {"const": 0}))]
    pub weight: Option<f64>,
}

/// The members in ascending order of their ids, which the order in the message does not change.
pub(super) fn check_members(messages: Vec<MemberMessage>) -> Result<Vec<Member>, Failure> {
    if messages.len() < 2 {
        return Err(invalid(format!(
            "members: {}, a merge needs at least 2",
            messages.len()
        )));
    }
    #[expect(
        clippy::cast_precision_loss,
        reason = "a message holds no 2^53 members"
    )]
    let equal = 1.0 / messages.len() as f64;
    let members = messages.into_iter().enumerate();
    let members = members.map(|(at, message)| {
        member(message, equal).map_err(|failure| Failure {
            message: format!("members[{at}].{}", failure.message),
            ..failure
        })
    });
    let mut members = members.collect::<Result<Vec<Member>, Failure>>()?;
    members.sort_by(|a, b| a.id.cmp(&b.id));
    match members.windows(2).find(|pair| pair[0].id == pair[1].id) {
        Some(twice) => Err(invalid(format!("members: {} is given twice", twice[0].id))),
        None => Ok(members),
    }
}

fn member(message: MemberMessage, equal: f64) -> Result<Member, Failure> {
    let MemberMessage {
        id,
        candidate,
        weight,
    } = message;
    if !is_submission_id(&id) {
        let message = "id: must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -";
        return Err(invalid(message));
    }
    let weight = weight.unwrap_or(equal);
    if !weight.is_finite() || weight == 0.0 {
        return Err(invalid("weight: must be finite and not 0"));
    }
    Ok(Member {
        id,
        weight,
        candidate: candidate.try_into()?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::protocol::encoding::Encoding;
    use crate::protocol::job::tests::{BOTH, Fields, decoded, fields, put, refusal, remove, value};
    use crate::protocol::job::{Job, Kind, Task};
    use crate::protocol::merge::OnRejected;

    fn candidate(encoding: Encoding) -> rmpv::Value {
        let mut candidate = fields(json!({"format": "binary_v2", "semantics": "param_diff"}));
        let data = match encoding {
            Encoding::Json => "e30=".into(),
            Encoding::MessagePack => rmpv::Value::Binary(b"{}".to_vec()),
        };
        candidate.push(("data".into(), data));
        rmpv::Value::Map(candidate)
    }

    /// A merge of `b`, then `a`; a member is bent before it is put in.
    fn merge(encoding: Encoding, bend: impl Fn(&mut Fields)) -> Fields {
        let mut job =
            fields(json!({"v": 1, "kind": "merge", "submission_id": "s-1", "model_version": 7}));
        let member = |id: &str| {
            let mut member: Fields = vec![
                ("id".into(), id.into()),
                ("candidate".into(), candidate(encoding)),
            ];
            if id == "a" {
                bend(&mut member);
            }
            rmpv::Value::Map(member)
        };
        let members = rmpv::Value::Array(vec![member("b"), member("a")]);
        put(&mut job, "members", members);
        job
    }

    #[track_caller]
    fn refused(named: &str, bend: impl Fn(&mut Fields)) {
        for encoding in BOTH {
            let (answered, message) = refusal(merge(encoding, &bend), encoding);
            assert_eq!(answered.as_deref(), Some("s-1"));
            assert!(message.starts_with(named), "{message:?}, not {named:?}");
        }
    }

    #[track_caller]
    fn members(job: Job) -> Vec<(String, f64)> {
        let Task::Merge {
            members,
            on_rejected: OnRejected::Drop,
            ..
        } = job.task
        else {
            panic!("{job:?}")
        };
        members.into_iter().map(|m| (m.id, m.weight)).collect()
    }

    #[test]
    fn members_are_in_the_order_of_their_ids_and_share_where_no_weight_is_given() {
        for encoding in BOTH {
            let job = decoded(merge(encoding, |_| ()), encoding).unwrap();
            assert_eq!(job.task.kind(), Kind::Merge);
            assert_eq!(members(job), [("a".into(), 0.5), ("b".into(), 0.5)]);
            let weighted = merge(encoding, |m| put(m, "weight", value(json!(-2))));
            let job = decoded(weighted, encoding).unwrap();
            assert_eq!(members(job), [("a".into(), -2.0), ("b".into(), 0.5)]);
        }
    }

    #[test]
    fn what_is_wrong_with_a_member_is_named_with_its_place() {
        for wrong in [json!(""), json!("a b"), json!(5), json!(["a"])] {
            refused("members[1].id: ", |m| put(m, "id", value(wrong.clone())));
        }
        refused("members: b is given twice", |m| put(m, "id", "b".into()));
        for wrong in [json!(0), json!(-0.0), json!("1"), json!([1])] {
            refused("members[1].weight: ", |m| {
                put(m, "weight", value(wrong.clone()));
            });
        }
        refused("members[1].colour: ", |m| put(m, "colour", "red".into()));
        refused("members[1].candidate.format: ", |m| {
            put(m, "candidate.format", "pickle".into());
        });
        refused("members[1].candidate.learning_rate: not allowed", |m| {
            put(m, "candidate.learning_rate", value(json!(0.5)));
        });
        refused("members[1].candidate.url, candidate.data: neither", |m| {
            remove(m, "candidate.data");
        });
        let text = merge(Encoding::MessagePack, |m| {
            put(m, "candidate.data", "e30=".into());
        });
        let (_, message) = refusal(text, Encoding::MessagePack);
        assert!(
            message.starts_with("members[1].candidate.data: "),
            "{message}"
        );
    }

    #[test]
    fn what_is_wrong_with_a_merge_is_named() {
        let bent = |path: &str, wrong: serde_json::Value| {
            BOTH.map(|encoding| {
                let mut job = merge(encoding, |_| ());
                put(&mut job, path, value(wrong.clone()));
                refusal(job, encoding).1
            })
        };
        for (path, wrong, named) in [
            ("members", json!([]), "members: 0, "),
            ("members", json!({}), "members: "),
            ("members", json!(null), "missing field `members`"),
            ("on_rejected", json!("keep"), "on_rejected: "),
            (
                "validation",
                json!({"stop": {"alpha": 0.01}}),
                "validation.stop: ",
            ),
            ("candidate", json!({}), "candidate: "),
            (
                "model_version",
                json!(null),
                "missing field `model_version`",
            ),
        ] {
            for message in bent(path, wrong) {
                assert!(message.starts_with(named), "{message:?}, not {named:?}");
            }
        }
    }
}
