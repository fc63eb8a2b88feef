//! The values that enter the parts of a graph, computed with the weights of the baseline. A candidate that
//! leaves the first parts alone starts from them.

use std::collections::HashMap;

use ort::value::{DynValue, ValueType};

/// Passes of which something is kept. Each new nonce adds one, however small its values are.
const PASSES: usize = 64;

/// Values by name, where the session left them.
pub(super) type Values = HashMap<String, DynValue>;

/// A pass over the windows of a plan, which some values belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// The hash of the plan.
    pub plan: [u8; 32],
    /// The micro-batch.
    pub batch: usize,
}

/// The values of one micro-batch.
#[derive(Debug, Default)]
pub(super) struct Entered {
    pub(super) values: Values,
    /// The first so many parts have made all of theirs.
    pub(super) parts: usize,
}

impl Entered {
    fn bytes(&self) -> u64 {
        self.values.values().map(bytes).sum()
    }
}

/// What is kept, within a budget.
#[derive(Debug)]
pub(super) struct Activations {
    budget: u64,
    /// The last one was used last.
    passes: Vec<(Pass, HashMap<usize, Entered>)>,
}

impl Activations {
    pub(super) fn within(budget: u64) -> Self {
        Self {
            budget,
            passes: Vec::new(),
        }
    }

    /// Bytes that are kept.
    pub(super) fn bytes(&self) -> u64 {
        let all = self.passes.iter().flat_map(|(_, entered)| entered.values());
        all.map(Entered::bytes).sum()
    }

    /// What is kept for a micro-batch; it is given back by [`Activations::put`].
    pub(super) fn take(&mut self, pass: Pass, number: usize) -> Entered {
        let found = self.passes.iter().position(|(known, _)| *known == pass);
        let Some(at) = found else {
            return Entered::default();
        };
        let (pass, mut entered) = self.passes.remove(at);
        let taken = entered.remove(&number);
        self.passes.push((pass, entered));
        taken.unwrap_or_default()
    }

    /// Keeps the values of a micro-batch, if they fit beside those of the same pass. Those of other passes go first.
    pub(super) fn put(&mut self, pass: Pass, number: usize, entered: Entered) {
        let bytes = entered.bytes();
        if bytes == 0 || bytes > self.budget {
            return;
        }
        let is_it = |known: &(Pass, _)| known.0 == pass;
        while self.bytes() + bytes > self.budget {
            let Some(oldest) = self.passes.iter().position(|known| !is_it(known)) else {
                return;
            };
            self.passes.remove(oldest);
        }
        match self.passes.iter_mut().find(|known| is_it(known)) {
            Some((_, kept)) => drop(kept.insert(number, entered)),
            None => {
                let surplus = (self.passes.len() + 1).saturating_sub(PASSES);
                self.passes.drain(..surplus);
                self.passes.push((pass, HashMap::from([(number, entered)])));
            }
        }
    }

    /// Forgets those of a plan.
    pub(super) fn forget(&mut self, plan: &[u8; 32]) {
        self.passes.retain(|(pass, _)| pass.plan != *plan);
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.passes.clear();
    }
}

fn bytes(value: &DynValue) -> u64 {
    match value.dtype() {
        ValueType::Tensor { ty, shape, .. } => {
            ty.byte_size(shape.num_elements()).unwrap_or_default() as u64
        }
        ValueType::Sequence(_) | ValueType::Map { .. } | ValueType::Optional(_) => 0,
    }
}

#[cfg(test)]
mod tests;
