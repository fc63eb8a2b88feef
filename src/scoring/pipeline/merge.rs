//! Judges a merge: who is left out, what the others are worth, and how the result says it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use tokio::sync::oneshot;

use super::{Judged, Pipeline, Unscored, claimed_digest, decoding_size, judged};
use crate::candidate::fetch::Fetched;
use crate::config::format_duration;
use crate::engine::coalition::{self, Member};
use crate::engine::merge::{Merge, Passes, Worth};
use crate::engine::shares::Share;
use crate::model::plan::Plan;
use crate::protocol::failure::{Code, Failure, Remedy, Status};
use crate::protocol::job::{Job, Member as JobMember, Source};
use crate::protocol::merge::{
    Change, Contribution, GapBody, Joint, MergeBody, MergeMember, OnRejected,
};
use crate::protocol::result::{self, Asked, CandidateFacts, JobRef, Key, Timings};
use crate::scoring::crash_marks::{CrashMark, Pen};
use crate::scoring::deadline::{check_deadline, past_deadline};
use crate::scoring::device_queue::Length;
use crate::scoring::disposition::{Disposition, Try, dispose};
use crate::scoring::members::{Described, LeftOut, Members, Ready, beside, check_sizes, refusal};
use crate::telemetry::traces::{Stage, Trace};
use crate::util::blocking;
use crate::util::clock::{Lap, unix_ms};

/// Members that are fetched at the same time.
const FETCHED_AT_A_TIME: usize = 4;

/// A merge as its job has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asking<'a> {
    /// In ascending order of their ids.
    pub(super) members: &'a [JobMember],
    pub(super) on_rejected: OnRejected,
}

/// The bytes of a member, or why there are none.
type Body = Result<Fetched, Failure>;

impl Pipeline {
    pub(super) async fn judge_merge(
        &self,
        job: &Job,
        asking: Asking<'_>,
        job_ref: &JobRef,
        plan: Arc<Plan>,
        trace: &Trace,
    ) -> Judged {
        let Asking {
            members,
            on_rejected,
        } = asking;
        if let Err(failure) = self.check_members(members) {
            return Judged::without_key(failure);
        }
        let mut sha256s = Vec::with_capacity(members.len());
        for member in members {
            match claimed_digest(&member.candidate).await {
                Ok(sha256) => sha256s.push(sha256),
                Err(failure) => return Judged::without_key(failure),
            }
        }
        let asked = Asked::Merge {
            members,
            sha256s: &sha256s,
            on_rejected,
        };
        let key = Key::new(&self.origin, job_ref, asked, &plan.hash);
        let fetching = self.fetch_members(job, members, &sha256s, trace);
        // A job that may not run drops its fetches.
        let entered = tokio::try_join!(self.admit(job_ref, &key), fetching);
        let (mut mark, (bodies, fetch)) = match entered {
            Ok(entered) => entered,
            Err(judged) => return judged,
        };
        let bodies = bodies.and_then(|bodies| self.check_fetched(job, asking, job_ref, bodies));
        let merged = match bodies {
            Ok(bodies) => {
                self.merge_members(job, asking, bodies, plan, mark.as_mut(), trace)
                    .await
            }
            Err(failure) => Err(failure.into()),
        };
        let merged = merged.map(|mut body| {
            body.timings_ms.fetch = fetch;
            body.timings_ms.total = Lap::since(trace.received).millis();
            result::Body::Merge(Box::new(body))
        });
        judged(merged, mark, key)
    }

    /// Checks what needs no bytes that are to be fetched.
    fn check_members(&self, members: &[JobMember]) -> Result<(), Failure> {
        let config = &self.candidates;
        if members.len() > config.max_members {
            let message = format!(
                "members: {}, more than candidates.max_members = {}",
                members.len(),
                config.max_members
            );
            return Err(Failure::new(Code::InvalidJob, message));
        }
        let inline = |member: &JobMember| match &member.candidate.source {
            Source::Inline(data) => Some(data.len() as u64),
            Source::Url(_) => None,
        };
        let sizes = members
            .iter()
            .filter_map(|m| inline(m).or(m.candidate.size));
        check_sizes(sizes, ("candidates.max_bytes", config.max_bytes))?;
        check_sizes(
            members.iter().filter_map(inline),
            ("candidates.max_inline_bytes", config.max_inline_bytes),
        )
    }

    /// Fetches the members' bytes, some at a time, and says how long that took. The deadline of the job and the end of the
    /// worker end the wait.
    async fn fetch_members(
        &self,
        job: &Job,
        members: &[JobMember],
        sha256s: &[[u8; 32]],
        trace: &Trace,
    ) -> Result<(Result<Vec<Body>, Failure>, f64), Judged> {
        let began = Instant::now();
        // A time limit for each would let the broker's pass.
        let latest = began + self.fetching_limit();
        let fetches = members.iter().zip(sha256s).map(|(member, sha256)| {
            let inline = matches!(member.candidate.source, Source::Inline(_));
            let known = inline.then_some(*sha256);
            let fetch = self.fetcher.fetch(&member.candidate, known);
            let fetch = tokio::time::timeout_at(latest.into(), fetch);
            fetch
                .map(|fetched| fetched.unwrap_or_else(|_| Err(self.too_slow())))
                .boxed()
        });
        // Boxed and made at once: the compiler cannot show of a stream of borrowing futures that it may be sent.
        let fetches: Vec<BoxFuture<'_, Body>> = fetches.collect();
        let fetching = stream::iter(fetches).buffered(FETCHED_AT_A_TIME).collect();
        let bodies = tokio::select! {
            biased;
            bodies = fetching => Ok(bodies),
            failure = past_deadline(job.deadline_ms) => Err(failure),
            () = self.leaving.cancelled() => return Err(Judged::Requeue),
        };
        Ok((bodies, trace.stage(Stage::Fetch, Lap::since(began))))
    }

    /// How long all members together may take to be fetched.
    fn fetching_limit(&self) -> Duration {
        self.consumer_timeout / 4
    }

    fn too_slow(&self) -> Failure {
        let message = format!(
            "not fetched within {}, a quarter of amqp.consumer_timeout, together with the other members",
            format_duration(self.fetching_limit())
        );
        Failure::new(Code::CandidateUnavailable, message)
    }

    /// A member that cannot be fetched sends the job up the retry ladder while there is a rung left; then it is left out
    /// like any other.
    fn check_fetched(
        &self,
        job: &Job,
        asking: Asking<'_>,
        job_ref: &JobRef,
        bodies: Vec<Body>,
    ) -> Result<Vec<Body>, Failure> {
        let missing = asking.members.iter().zip(&bodies);
        let missing = missing.filter_map(|(member, body)| {
            let failure = body.as_ref().err()?;
            (failure.code.remedy() == Remedy::Retry).then(|| LeftOut {
                id: member.id.clone(),
                weight: member.weight,
                failure: failure.clone(),
            })
        });
        let missing: Vec<LeftOut> = missing.collect();
        let Some(code) = missing.first().map(|missing| missing.failure.code) else {
            return Ok(bodies);
        };
        let tried = Try {
            attempt: job_ref.attempt,
            deadline_ms: job.deadline_ms,
            now_ms: unix_ms(),
        };
        match dispose(Some(code), tried, &self.retry_delays) {
            Disposition::Climb { .. } => Err(refusal(missing)),
            Disposition::Answer | Disposition::AnswerTooLate | Disposition::AnswerAndDeadLetter => {
                Ok(bodies)
            }
        }
    }

    async fn merge_members(
        &self,
        job: &Job,
        asking: Asking<'_>,
        bodies: Vec<Body>,
        plan: Arc<Plan>,
        mark: Option<&mut CrashMark>,
        trace: &Trace,
    ) -> Result<MergeBody, Unscored> {
        let length = |passes| Length::of_merge(plan.windows.len(), passes);
        let (mut held, mut pen, mut suspect) = (None, None, None);
        if let Some(mark) = mark {
            if mark.is_suspect() {
                // At least one: how many it needs is known when they are decoded.
                held = Some(self.device(job, length(1), trace).await?);
                mark.mark_suspect().await?;
                suspect = Some(mark.pen());
            }
            pen = Some(mark.pen());
        }
        let began = Instant::now();
        let members = self.decode_members(asking.members, bodies, suspect).await;
        trace.stage(Stage::Decode, Lap::since(began));
        let ready = members?.ready(asking.on_rejected)?;
        let length = length(coalition::most_passes(&ready.members));
        let (permit, queued) = match held {
            Some((permit, queued)) => {
                let resized = permit.resize(length, self.longest());
                resized.map_err(|why| self.without_turn(why))?;
                (permit, queued)
            }
            None => self.device(job, length, trace).await?,
        };
        check_deadline(job.deadline_ms)?;
        let began = Instant::now();
        let merging = permit.merge(
            Arc::clone(&ready.members),
            asking.on_rejected,
            Arc::clone(&plan),
            self.score_limit(),
            between(job, pen, self.longest()),
        );
        let merge = merging.await.map_err(|why| self.without_turn(why))?;
        trace.stage(Stage::Forward, Lap::since(began));
        let merge = merge.map_err(|failure| beside(&ready.left_out, failure))?;
        let mut body = self.merge_body(ready, merge, &plan)?;
        body.timings_ms.queued = queued;
        Ok(body)
    }

    /// Decodes one after the other, off the async threads, and drops its bytes. Of a suspect, the mark names each.
    async fn decode_members(
        &self,
        described: &[JobMember],
        bodies: Vec<Body>,
        suspect: Option<Pen>,
    ) -> Result<Members, Failure> {
        let package = Arc::clone(&self.engine.package);
        let mut members = Members::new(package, (&*self.candidates).into());
        for (member, body) in described.iter().zip(bodies) {
            let described = Described::from(member);
            let fetched = match body {
                Ok(fetched) => fetched,
                Err(failure) => {
                    members.leave_out(described, failure);
                    continue;
                }
            };
            if let Some(pen) = &suspect {
                pen.note(Some(&member.id)).await;
            }
            let size = decoding_size(&fetched, member.candidate.compression);
            let decoding = blocking::by_size(size, move || {
                members.add(described, fetched)?;
                Ok(members)
            });
            let decoded = decoding.await;
            members = decoded.unwrap_or_else(|| Err(super::panicked("decoding")))?;
        }
        Ok(members)
    }

    /// What is answered for a merge. Of the timings, those of fetching and queueing are not known here.
    ///
    /// # Errors
    /// As the contract has it: of who is left out where nobody may be, or where nobody stays.
    pub fn merge_body(
        &self,
        ready: Ready,
        merge: Merge,
        plan: &Plan,
    ) -> Result<MergeBody, Failure> {
        let Ready {
            members,
            facts,
            left_out,
            decoding,
        } = ready;
        let merged = match merge {
            Merge::Measured(merged) => *merged,
            Merge::Refused(refused) => {
                let refused = refused.into_iter();
                let refused = refused.map(|(at, failure)| left(&members[at], failure));
                return Err(refusal(left_out.into_iter().chain(refused).collect()));
            }
        };
        let (joint, gap) = (merged.joint, merged.gap);
        Ok(MergeBody {
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
            members: reported(&members, facts, merged.members, left_out),
            gap: GapBody {
                value: gap.value,
                stderr: gap.stderr,
                large: gap.large,
            },
            execution_provider: self.provider.execution_provider().into(),
            device: self.device.clone(),
            precision: self.engine.package.manifest.precision.as_str().into(),
            timings_ms: Timings {
                decode: decoding,
                ..merged.times
            },
        })
    }
}

/// All members in ascending order of their ids, those that were left out before among them.
fn reported(
    members: &[Member],
    facts: Vec<CandidateFacts>,
    worths: Vec<Result<Worth, Failure>>,
    left_out: Vec<LeftOut>,
) -> Vec<MergeMember> {
    let measured = members.iter().zip(facts).zip(worths);
    let measured = measured.map(|((member, facts), worth)| match worth {
        Ok(worth) => scored(member, facts, worth),
        Err(failure) => unscored(left(member, failure)),
    });
    let mut members: Vec<MergeMember> = measured.collect();
    members.extend(left_out.into_iter().map(unscored));
    members.sort_by(|a, b| a.id.cmp(&b.id));
    members
}

/// What is done before each pass: it is not begun after the job's deadline, nor after half of the time that the broker lets
/// the job be held, and the mark says who is measured alone.
fn between(
    job: &Job,
    pen: Option<Pen>,
    longest: Duration,
) -> impl FnMut(Passes, &[&Member]) -> Result<(), Failure> + Send + 'static {
    let (deadline_ms, submission_id) = (job.deadline_ms, job.submission_id.clone());
    let (runtime, began) = (tokio::runtime::Handle::current(), Instant::now());
    move |passes, members| {
        check_deadline(deadline_ms)?;
        if began.elapsed() > longest {
            let message = format!(
                "the merge took longer than {}, half of amqp.consumer_timeout",
                format_duration(longest)
            );
            return Err(Failure::new(Code::ScoreTimeout, message));
        }
        let alone = match members {
            [alone] => Some(alone.id.clone()),
            _ => None,
        };
        let Passes { done, most } = passes;
        tracing::debug!(
            submission_id,
            done,
            most,
            ?alone,
            "a pass of a merge begins"
        );
        if let Some(pen) = pen.clone() {
            let (noted, known) = oneshot::channel();
            runtime.spawn(async move {
                pen.note(alone.as_deref()).await;
                noted.send(())
            });
            // Gone with its runtime, it needs no note.
            known.blocking_recv().ok();
        }
        Ok(())
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
