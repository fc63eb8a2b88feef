//! The search: every world once, nearest first; then backwards from where all is done.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::rc::Rc;

use crate::moves::Moves;
use crate::world::{Broken, Kind, Move, Scenario, World};

/// What a search has seen.
#[derive(Debug)]
pub(crate) struct Explored {
    pub(crate) worlds: usize,
    pub(crate) kinds: Vec<Kind>,
}

/// A shortest way to a broken invariant.
#[derive(Debug)]
pub(crate) struct Counterexample {
    pub(crate) broken: Vec<Broken>,
    pub(crate) moves: Vec<Move>,
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} after {} moves:", self.broken, self.moves.len())?;
        for Move { kind, worker, job } in &self.moves {
            write!(f, "\n  {kind:?}")?;
            job.map_or(Ok(()), |job| write!(f, " {job:?}"))?;
            worker.map_or(Ok(()), |w| write!(f, ", worker {w}"))?;
        }
        Ok(())
    }
}

/// How a world was first reached.
struct Came {
    from: usize,
    what: Move,
    exchanged: bool,
}

#[derive(Default)]
struct Found {
    worlds: Vec<Rc<World>>,
    numbers: HashMap<Rc<World>, usize>,
    came: Vec<Option<Came>>,
    /// From where a world is reached without disturbances.
    before: Vec<Vec<usize>>,
}

/// Explores a scenario to the end, or to the first broken invariant.
pub(crate) fn search(scenario: &Scenario) -> Result<Explored, Counterexample> {
    let mut found = Found::default();
    let mut kinds = Vec::new();
    found.number(scenario.start(), None);
    let mut at = 0;
    while let Some(world) = found.worlds.get(at).cloned() {
        for next in Moves::from(scenario, &world) {
            let (what, exchanged) = (next.what, next.exchanged);
            let came = Came {
                from: at,
                what,
                exchanged,
            };
            if !next.broken.is_empty() {
                return Err(found.counterexample(Some(&came), next.broken));
            }
            if !kinds.contains(&what.kind) {
                kinds.push(what.kind);
            }
            let number = found.number(next.world, Some(came));
            if !what.kind.disturbs() {
                found.before[number].push(at);
            }
        }
        at += 1;
    }
    match found.first_stuck() {
        Some(number) => Err(found.counterexample(found.came[number].as_ref(), vec![Broken::Stuck])),
        None => Ok(Explored {
            worlds: found.worlds.len(),
            kinds,
        }),
    }
}

impl Found {
    fn number(&mut self, world: World, came: Option<Came>) -> usize {
        if let Some(number) = self.numbers.get(&world) {
            return *number;
        }
        let number = self.worlds.len();
        let world = Rc::new(world);
        self.worlds.push(Rc::clone(&world));
        self.numbers.insert(world, number);
        self.came.push(came);
        self.before.push(Vec::new());
        number
    }

    /// Backwards from every world in which all is done: what is not met cannot get there.
    fn first_stuck(&self) -> Option<usize> {
        let mut met: Vec<bool> = self.worlds.iter().map(|world| world.is_done()).collect();
        let mut open: VecDeque<usize> = (0..met.len()).filter(|number| met[*number]).collect();
        while let Some(number) = open.pop_front() {
            for before in &self.before[number] {
                if !std::mem::replace(&mut met[*before], true) {
                    open.push_back(*before);
                }
            }
        }
        met.iter().position(|met| !met)
    }

    fn counterexample(&self, last: Option<&Came>, broken: Vec<Broken>) -> Counterexample {
        let mut way = Vec::new();
        let mut last = last;
        while let Some(came) = last {
            way.push(came);
            last = self.came[came.from].as_ref();
        }
        // Names that were exchanged on the way are told as they were at the start.
        let mut exchanged = false;
        let tell = |came: &&Came| {
            let name = |w: usize| if exchanged { 1 - w } else { w };
            let what = Move {
                worker: came.what.worker.map(name),
                ..came.what
            };
            exchanged ^= came.exchanged;
            what
        };
        let moves = way.iter().rev().map(tell).collect();
        Counterexample { broken, moves }
    }
}
