//! Measures a merge: each member alone, all together, and all but each, with one baseline and at most two passes a
//! member and one. A pass whose weights equal, bit for bit, those of one that ran is not run again.

use std::collections::HashMap;
use std::sync::Arc;

use super::coalition::{self, Member};
use super::shares::{Gap, MemberLosses, Share, Shares, shares};
use super::statistics::Paired;
use super::{Engine, Patched};
use crate::model::plan::Plan;
use crate::protocol::failure::{Code, Failure};
use crate::protocol::merge::OnRejected;
use crate::protocol::result::Timings;

/// How far a merge has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Passes {
    /// Passes that have run.
    pub done: u64,
    /// The most that may run in all.
    pub most: u64,
}

/// Hears of each pass before its weights are summed, whether it then runs or not, and of the members that it applies: one
/// that is measured alone, or several. An error ends the merge.
pub type Between<'a> = &'a mut dyn FnMut(Passes, &[&Member]) -> Result<(), Failure>;

/// A member that was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Worth {
    /// Weights that it changes by itself.
    pub effective_entries: u64,
    /// What it is worth.
    pub share: Share,
}

/// A merge that was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// One for each member, in their order: what it is worth, or why it was left out.
    pub members: Vec<Result<Worth, Failure>>,
    /// Of all that were not left out.
    pub joint: Paired,
    /// What the contributions do not sum to.
    pub gap: Gap,
    /// Passes that ran, without the baseline.
    pub passes: u64,
    /// Milliseconds of applying, running and restoring; the baseline's are with the running.
    pub times: Timings,
}

/// How a merge ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Merge {
    /// With numbers.
    Measured(Box<Merged>),
    /// With members that are refused, by their places: one of those that may not be, or everyone.
    Refused(Vec<(usize, Failure)>),
}

impl Engine {
    /// Measures a merge and leaves the weights as they were. The members are in ascending order of their ids.
    ///
    /// # Errors
    /// A typed failure; the weights are restored in that case too.
    pub fn merge(
        &mut self,
        members: &[Member],
        on_rejected: OnRejected,
        plan: &Plan,
        between: Between<'_>,
    ) -> Result<Merge, Failure> {
        self.while_memory_lasts(plan, |engine, batch| {
            let _busy = engine.progress.begin();
            let mut runs = Runs::new(
                engine,
                plan,
                batch,
                coalition::most_passes(members),
                between,
            )?;
            runs.merge(members, on_rejected)
        })
    }
}

/// The losses of a coalition, in the order of the plan, and how many weights it changes.
type Losses = (Arc<Vec<f64>>, u64);

/// The passes of a merge.
struct Runs<'a> {
    engine: &'a mut Engine,
    plan: &'a Plan,
    batch: usize,
    between: Between<'a>,
    before: Arc<Vec<f64>>,
    /// The losses of every coalition that ran, by its fingerprint.
    known: HashMap<[u8; 32], Arc<Vec<f64>>>,
    passes: Passes,
    times: Timings,
}

impl<'a> Runs<'a> {
    fn new(
        engine: &'a mut Engine,
        plan: &'a Plan,
        batch: usize,
        most: u32,
        between: Between<'a>,
    ) -> Result<Self, Failure> {
        let began = std::time::Instant::now();
        let before = engine.baseline(plan, batch)?;
        Ok(Self {
            engine,
            plan,
            batch,
            between,
            before,
            known: HashMap::new(),
            passes: Passes {
                done: 0,
                most: most.into(),
            },
            times: Timings {
                forward: began.elapsed().as_secs_f64() * 1e3,
                ..Timings::default()
            },
        })
    }

    fn merge(&mut self, members: &[Member], on_rejected: OnRejected) -> Result<Merge, Failure> {
        let mut alone = Vec::with_capacity(members.len());
        for member in members {
            let measured = self.alone(member)?;
            let ends = measured.is_err() && on_rejected == OnRejected::Fail;
            alone.push(measured);
            if ends {
                break;
            }
        }
        let places = alone.iter().enumerate();
        let refused = places.filter_map(|(at, measured)| Some((at, measured.clone().err()?)));
        let refused: Vec<(usize, Failure)> = refused.collect();
        let staying = members.iter().zip(&alone);
        let staying: Vec<(&Member, &Losses)> = staying
            .filter_map(|(member, alone)| Some((member, alone.as_ref().ok()?)))
            .collect();
        if staying.is_empty() || (on_rejected == OnRejected::Fail && !refused.is_empty()) {
            return Ok(Merge::Refused(refused));
        }
        let Shares {
            joint,
            members: shares,
            gap,
        } = self.together(&staying)?;
        let mut shares = shares.into_iter();
        let worths = alone.into_iter().map(|alone| {
            let (_, effective_entries) = alone?;
            let share = shares.next().ok_or_else(lost)?;
            Ok(Worth {
                effective_entries,
                share,
            })
        });
        Ok(Merge::Measured(Box::new(Merged {
            members: worths.collect(),
            joint,
            gap,
            passes: self.passes.done,
            times: self.times,
        })))
    }

    /// What a member does by itself; the inner error refuses it.
    fn alone(&mut self, member: &Member) -> Result<Result<Losses, Failure>, Failure> {
        match self.losses(&[member]) {
            Err(failure) if is_not_finite(&failure) => Ok(Err(failure)),
            losses => losses.map(Ok),
        }
    }

    /// Measures all that stay, and all but each.
    fn together(&mut self, staying: &[(&Member, &Losses)]) -> Result<Shares, Failure> {
        let members: Vec<&Member> = staying.iter().map(|(member, _)| *member).collect();
        let (joint, _) = self.coalition(&members, "together")?;
        let mut withouts = Vec::with_capacity(members.len());
        for member in &members {
            // Of equal members it is the last that is left out: the sums of the others are then the same, bit for bit.
            let out = members.iter().rposition(|other| other.equals(member));
            let others = members.iter().enumerate();
            let others = others.filter(|(at, _)| Some(*at) != out);
            let others: Vec<&Member> = others.map(|(_, other)| *other).collect();
            let what = format!("without {}", member.id);
            withouts.push(self.coalition(&others, &what)?.0);
        }
        let pairs = staying.iter().zip(&withouts);
        let losses: Vec<MemberLosses<'_>> = pairs
            .map(|((_, (alone, _)), without)| MemberLosses { alone, without })
            .collect();
        Ok(shares(&self.before, &joint, &losses))
    }

    /// What several members do; where that is not finite, nobody in particular is to blame.
    fn coalition(&mut self, members: &[&Member], what: &str) -> Result<Losses, Failure> {
        self.losses(members).map_err(|failure| {
            if is_not_finite(&failure) {
                let message = format!("the members, {what}: {}", failure.message);
                return Failure::new(Code::NonFiniteLoss, message);
            }
            failure
        })
    }

    /// The losses of these members, which are in ascending order of their ids.
    fn losses(&mut self, members: &[&Member]) -> Result<Losses, Failure> {
        // Before the sums: where many passes need not run, these may take longer than those that do.
        (self.between)(self.passes, members)?;
        let engine = &self.engine;
        let patches = coalition::patches(&engine.package, members, &|| engine.goes_on())?;
        let effective = patches.effective_entries;
        if effective == 0 {
            return Ok((Arc::clone(&self.before), 0));
        }
        let fingerprint = coalition::fingerprint(&patches);
        if let Some(known) = self.known.get(&fingerprint) {
            return Ok((Arc::clone(known), effective));
        }
        let Patched { after, laps, .. } =
            self.engine
                .run_patched(&patches, self.plan, self.batch, &self.before, None)?;
        self.passes.done += 1;
        self.times.apply += laps.apply.millis();
        self.times.forward += laps.running();
        self.times.restore += laps.restore.millis();
        if let Some(window) = after.iter().position(|loss| !loss.is_finite()) {
            let message = format!("the loss of window {window} is not finite");
            return Err(Failure::new(Code::NonFiniteLoss, message));
        }
        let after = Arc::new(after);
        self.known.insert(fingerprint, Arc::clone(&after));
        Ok((after, effective))
    }
}

fn is_not_finite(failure: &Failure) -> bool {
    matches!(failure.code, Code::NonFiniteLoss | Code::CandidateNonFinite)
}

fn lost() -> Failure {
    Failure::new(
        Code::InferenceFailed,
        "a member that was measured has no numbers",
    )
}

#[cfg(test)]
mod tests;
