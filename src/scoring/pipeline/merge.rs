//! Judges a merge: who is left out, what the others are worth, and how the result says it.

use std::sync::Arc;

use tokio::sync::watch;

use super::Pipeline;
use crate::engine::coalition::Member;
use crate::engine::merge::{Merge, Merged, Passes, Worth};
use crate::engine::shares::Share;
use crate::model::plan::Plan;
use crate::protocol::failure::{Failure, Status};
use crate::protocol::merge::{
    Change, Contribution, GapBody, Joint, MergeBody, MergeMember, OnRejected,
};
use crate::protocol::result::{Body, CandidateFacts, Verdict};
use crate::scoring::members::{LeftOut, Members};

impl Pipeline {
    /// Measures members together, on windows of its own plan. `passes` hears of each pass. Of the timings only those of
    /// the device and of decoding are known here.
    ///
    /// # Errors
    /// As the contract has it: of who is left out where nobody may be, or where nobody stays; of the merge as a whole.
    pub async fn merge(
        &self,
        mut members: Members,
        on_rejected: OnRejected,
        plan: Arc<Plan>,
        passes: watch::Sender<Passes>,
    ) -> Verdict {
        members.sort();
        let Members {
            decoded,
            left_out,
            decoding,
            ..
        } = members;
        if decoded.is_empty() || (on_rejected == OnRejected::Fail && !left_out.is_empty()) {
            return Err(refusal(left_out));
        }
        let (members, facts): (Vec<Member>, Vec<CandidateFacts>) = decoded.into_iter().unzip();
        let members: Arc<[Member]> = members.into();
        let turn = self.engine.turn().await;
        let limit = self.score_limit();
        let merging = turn.merge(
            Arc::clone(&members),
            on_rejected,
            Arc::clone(&plan),
            limit,
            passes,
        );
        match merging.await? {
            Merge::Measured(merged) => {
                let mut body = self.merge_body(&members, facts, left_out, *merged, &plan);
                body.timings_ms.decode = decoding;
                Ok(Body::Merge(Box::new(body)))
            }
            Merge::Refused(refused) => {
                let refused = refused.into_iter();
                let refused = refused.map(|(at, failure)| left(&members[at], failure));
                Err(refusal(left_out.into_iter().chain(refused).collect()))
            }
        }
    }

    fn merge_body(
        &self,
        members: &[Member],
        facts: Vec<CandidateFacts>,
        left_out: Vec<LeftOut>,
        merged: Merged,
        plan: &Plan,
    ) -> MergeBody {
        let measured = members.iter().zip(facts).zip(merged.members);
        let measured = measured.map(|((member, facts), worth)| match worth {
            Ok(worth) => scored(member, facts, worth),
            Err(failure) => unscored(left(member, failure)),
        });
        let mut members: Vec<MergeMember> = measured.collect();
        members.extend(left_out.into_iter().map(unscored));
        members.sort_by(|a, b| a.id.cmp(&b.id));
        let (joint, gap) = (merged.joint, merged.gap);
        MergeBody {
            joint: Joint {
                delta: joint.delta,
                stderr: joint.stderr,
                ci95: joint.ci95,
                loss_before: joint.loss_before,
                loss_after: joint.loss_after,
            },
            windows: plan.windows.len() as u64,
            tokens: plan.targets.iter().sum(),
            plan: hex::encode(plan.hash),
            passes: merged.passes,
            members,
            gap: GapBody {
                value: gap.value,
                stderr: gap.stderr,
                large: gap.large,
            },
            execution_provider: self.provider.execution_provider().into(),
            device: self.device.clone(),
            precision: self.engine.package.manifest.precision.as_str().into(),
            timings_ms: merged.times,
        }
    }
}

fn left(member: &Member, failure: Failure) -> LeftOut {
    LeftOut {
        id: member.id.clone(),
        weight: member.weight,
        failure,
    }
}

fn scored(member: &Member, facts: CandidateFacts, worth: Worth) -> MergeMember {
    let Share {
        alone,
        last,
        contribution,
    } = worth.share;
    MergeMember {
        id: member.id.clone(),
        status: Status::Scored,
        weight: member.weight,
        error: None,
        candidate: Some(CandidateFacts {
            effective_entries: worth.effective_entries,
            ..facts
        }),
        alone: Some(Change {
            delta: alone.value,
            stderr: alone.stderr,
        }),
        last: Some(Change {
            delta: last.value,
            stderr: last.stderr,
        }),
        contribution: Some(Contribution {
            value: contribution.value,
            stderr: contribution.stderr,
            ci95: contribution.ci95,
        }),
    }
}

fn unscored(left_out: LeftOut) -> MergeMember {
    MergeMember {
        id: left_out.id,
        status: left_out.failure.code.status(),
        weight: left_out.weight,
        error: Some(left_out.failure.to_error()),
        candidate: None,
        alone: None,
        last: None,
        contribution: None,
    }
}

/// The first by id says why; the detail names all.
fn refusal(mut left_out: Vec<LeftOut>) -> Failure {
    left_out.sort_by(|a, b| a.id.cmp(&b.id));
    let named = |member: &LeftOut| serde_json::json!({"id": member.id, "code": member.failure.code.as_str()});
    let members: Vec<serde_json::Value> = left_out.iter().map(named).collect();
    let Some(first) = left_out.into_iter().next() else {
        return super::panicked("gathering the members");
    };
    let message = format!("member {}: {}", first.id, first.failure.message);
    Failure::new(first.failure.code, message).with("members", members)
}
