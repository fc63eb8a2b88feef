//! The last merges: what their members are worth, in less than a megabyte.

use std::collections::VecDeque;

use serde::Serialize;
use serde_json::Value;

use super::roster::keep;
use super::text::{NAME, cut};
use super::verdict::Verdict;
use crate::protocol::failure::{Code, ErrorBody, Status};
use crate::protocol::job::Kind;
use crate::protocol::merge::{Change, Contribution, GapBody, Joint, MergeBody, MergeMember};
use crate::protocol::result::{Body, ResultMessage};

/// Merges that are remembered.
const MERGES: usize = 50;
/// Members of all of them together, about 200 bytes each: of larger merges fewer are remembered.
const MEMBERS: usize = 50 * 64;
/// Members of one of them: no worker takes more.
const MOST: usize = 1000;

/// The last merges.
#[derive(Debug, Default)]
pub(super) struct Merges {
    /// Oldest first.
    kept: VecDeque<Merge>,
    /// So many were seen: a page that knows the number has the newest.
    pub(super) seen: u64,
}

/// What became of a merge.
#[derive(Debug, Serialize)]
pub(super) struct Merge {
    submission_id: Box<str>,
    #[serde(flatten)]
    verdict: Verdict,
    /// None: it was refused, or failed.
    measured: Option<Measured>,
    members: Vec<Member>,
    /// Members beyond the [`MOST`].
    unlisted: usize,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Measured {
    joint: Joint,
    gap: GapBody,
    passes: u64,
    total_ms: f64,
}

/// One that was left out has no numbers.
#[derive(Debug, Serialize)]
struct Member {
    id: Box<str>,
    status: Status,
    /// Why it was left out.
    code: Option<&'static str>,
    weight: Option<f64>,
    alone: Option<Change>,
    last: Option<Change>,
    contribution: Option<Contribution>,
}

/// A merge in the list.
#[derive(Debug, Serialize)]
pub(super) struct Row<'a> {
    at_ms: u64,
    submission_id: &'a str,
    status: Status,
    verdict: &'static str,
    members: usize,
    left_out: usize,
    joint: Option<Joint>,
    large_gap: Option<bool>,
    worker: &'a str,
}

/// One merge.
#[derive(Debug, Serialize)]
pub(super) struct Last<'a> {
    /// Other results of the same job among those that are remembered.
    earlier: usize,
    #[serde(flatten)]
    merge: &'a Merge,
}

impl Merges {
    /// Adds a result that was not seen before, if it is one of a merge.
    pub(super) fn note(&mut self, result: &ResultMessage, verdict: &Verdict) {
        let Some(merge) = Merge::of(result, verdict) else {
            return;
        };
        self.seen += 1;
        self.kept.push_back(merge);
        keep(&mut self.kept, MERGES);
        while self.kept.iter().map(|m| m.members.len()).sum::<usize>() > MEMBERS {
            self.kept.pop_front();
        }
    }

    /// The newest first.
    pub(super) fn rows(&self) -> Vec<Row<'_>> {
        self.kept.iter().rev().map(Merge::row).collect()
    }

    /// The newest of this name.
    pub(super) fn last(&self, submission_id: &str) -> Option<Last<'_>> {
        let newest_first = self.kept.iter().rev();
        let mut found = newest_first.filter(|merge| *merge.submission_id == *submission_id);
        Some(Last {
            merge: found.next()?,
            earlier: found.count(),
        })
    }
}

impl Merge {
    fn of(result: &ResultMessage, verdict: &Verdict) -> Option<Self> {
        match result.kind {
            Kind::Merge => {}
            Kind::Score | Kind::Validate => return None,
        }
        let (measured, mut members) = match &result.body {
            Body::Merge(body) => (
                Some(Measured::of(body)),
                body.members.iter().map(Member::of).collect(),
            ),
            Body::Error { error } => (None, Member::refused(error)),
            Body::Score(_) | Body::Loss(_) => return None,
        };
        let unlisted = members.len().saturating_sub(MOST);
        members.truncate(MOST);
        members.shrink_to_fit();
        Some(Self {
            submission_id: result.submission_id.as_str().into(),
            verdict: verdict.clone(),
            measured,
            members,
            unlisted,
        })
    }

    fn row(&self) -> Row<'_> {
        let left_out = self.members.iter().filter(|m| m.contribution.is_none());
        Row {
            at_ms: self.verdict.at_ms,
            submission_id: &self.submission_id,
            status: self.verdict.status,
            verdict: self.verdict.verdict,
            members: self.members.len() + self.unlisted,
            left_out: left_out.count(),
            joint: self.measured.map(|measured| measured.joint),
            large_gap: self.measured.map(|measured| measured.gap.large),
            worker: &self.verdict.worker,
        }
    }
}

impl Measured {
    fn of(body: &MergeBody) -> Self {
        Self {
            joint: body.joint,
            gap: body.gap,
            passes: body.passes,
            total_ms: body.timings_ms.total,
        }
    }
}

impl Member {
    fn of(member: &MergeMember) -> Self {
        Self {
            id: cut(&member.id, NAME).into(),
            status: member.status,
            code: member.error.as_ref().map(|error| error.code.as_str()),
            weight: Some(member.weight),
            alone: member.alone,
            last: member.last,
            contribution: member.contribution,
        }
    }

    /// Those that an error names: `{members: [{id, code}]}`.
    fn refused(error: &ErrorBody) -> Vec<Self> {
        let members = error.detail.get("members").and_then(Value::as_array);
        let member = |member: &Value| {
            let code = member.get("code").cloned().unwrap_or_default();
            let code: Option<Code> = serde_json::from_value(code).ok();
            Some(Self {
                id: cut(member.get("id")?.as_str()?, NAME).into(),
                status: code.unwrap_or(error.code).status(),
                code: code.map(Code::as_str),
                weight: None,
                alone: None,
                last: None,
                contribution: None,
            })
        };
        members.into_iter().flatten().filter_map(member).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::dashboard::made::{merged, rejected, scored};
    use crate::fleet::dashboard::verdict::SeenResult;
    use serde_json::json;

    fn note(merges: &mut Merges, seen: &SeenResult) {
        merges.note(&seen.result, &Verdict::of(seen));
    }

    fn told(told: impl Serialize) -> Value {
        serde_json::to_value(told).unwrap()
    }

    /// An example with so many members that have long names.
    fn of_many(id: &str, members: usize) -> SeenResult {
        let change = json!({"delta": 0.1, "stderr": null});
        let member = json!({
            "id": "é".repeat(1000), "status": "scored", "weight": 1.0, "alone": change, "last": change,
            "contribution": {"value": 0.1, "stderr": null, "ci95": null},
        });
        merged(
            1,
            json!({"submission_id": id, "members": vec![member; members]}),
        )
    }

    #[test]
    fn a_merge_is_remembered_with_what_its_members_are_worth() {
        let mut merges = Merges::default();
        note(&mut merges, &merged(5, json!({"submission_id": "m"})));
        let rows = told(merges.rows());
        let row = &rows[0];
        for (field, value) in [
            ("at_ms", json!(5)),
            ("submission_id", json!("m")),
            ("verdict", json!("merged")),
            ("members", json!(3)),
            ("left_out", json!(1)),
            ("large_gap", json!(false)),
            ("worker", json!("node7-cuda0")),
        ] {
            assert_eq!(row[field], value, "{field}");
        }
        assert_eq!(row["joint"]["delta"], 0.00151);
        let merge = told(merges.last("m"));
        assert_eq!(
            (&merge["earlier"], &merge["windows"]),
            (&json!(0), &json!(17))
        );
        assert_eq!(merge["measured"]["passes"], 4);
        let members = &merge["members"];
        assert_eq!(members[0]["alone"]["delta"], 0.0008);
        assert_eq!(members[0]["contribution"]["ci95"][1], 0.000_965);
        assert_eq!(members[1]["code"], "candidate_empty");
        assert_eq!(members[1]["contribution"], Value::Null);
        assert!(merges.last("n").is_none());
    }

    #[test]
    fn a_merge_without_numbers_names_the_members_that_are_refused() {
        let mut merges = Merges::default();
        let members = json!([
            {"id": "<b>", "code": "candidate_empty"}, {"id": "gone", "code": "candidate_unavailable"},
            {"id": "odd", "code": "of the future"}, {"id": 7}, "none",
        ]);
        let refused =
            json!({"kind": "merge", "submission_id": "m", "error.detail": {"members": members}});
        note(&mut merges, &rejected(1, refused));
        let merge = told(merges.last("m"));
        let named = |at: usize| {
            let member = &merge["members"][at];
            ["id", "code", "status"].map(|field| member[field].clone())
        };
        assert_eq!(named(0), ["<b>", "candidate_empty", "rejected"]);
        assert_eq!(named(1), ["gone", "candidate_unavailable", "failed"]);
        assert_eq!(named(2), [json!("odd"), Value::Null, json!("rejected")]);
        assert_eq!(merge["members"].as_array().map(Vec::len), Some(3));
        assert_eq!(
            (&merge["status"], &merge["measured"]),
            (&json!("rejected"), &Value::Null)
        );
    }

    #[test]
    fn other_results_are_no_merges() {
        let mut merges = Merges::default();
        note(&mut merges, &scored(1, json!({})));
        note(&mut merges, &rejected(1, json!({})));
        note(&mut merges, &scored(1, json!({"kind": "merge"})));
        assert_eq!((merges.seen, merges.rows().len()), (0, 0));
    }

    #[test]
    fn only_the_last_merges_are_remembered_and_of_larger_ones_fewer() {
        for (members, remembered, unlisted) in
            [(2, MERGES, 0), (64, MERGES, 0), (1000, 3, 0), (1001, 3, 1)]
        {
            let mut merges = Merges::default();
            for n in 0..=MERGES {
                note(&mut merges, &of_many(&format!("m{n}"), members));
            }
            assert_eq!(merges.rows().len(), remembered, "{members}");
            assert_eq!(merges.rows()[0].submission_id, "m50");
            assert_eq!(merges.seen, 51);
            assert_eq!(merges.kept[0].unlisted, unlisted);
            assert!(merges.kept[0].members[0].id.len() <= NAME);
            let bytes = size_of::<Member>() + NAME;
            assert!(MEMBERS * bytes < 1_500_000, "{bytes} for each member");
        }
    }

    #[test]
    fn of_a_job_with_several_results_the_newest_is_told() {
        let mut merges = Merges::default();
        for version in [7, 8] {
            let seen = merged(
                version,
                json!({"submission_id": "m", "model_version": version}),
            );
            note(&mut merges, &seen);
        }
        let last = told(merges.last("m"));
        assert_eq!(
            (&last["model_version"], &last["earlier"]),
            (&json!(8), &json!(1))
        );
    }
}
