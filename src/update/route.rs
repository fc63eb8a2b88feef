//! The way from the weights that are served to those that are live: the fewest bytes to fetch.
//! Pure; a file that turned out bad is left out by the caller's price, and the next way is asked for.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use crate::protocol::update_manifest::Canary;
use crate::protocol::update_manifest::{Delta, FullWeights, UpdateManifest};

/// One file on the way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step<'m> {
    /// Whole weights, whatever was there before.
    Full(&'m FullWeights),
    /// Added to what is there.
    Delta(&'m Delta),
}

impl<'m> Step<'m> {
    /// The version that this step gives.
    pub fn to(self) -> u64 {
        match self {
            Self::Full(full) => full.version,
            Self::Delta(delta) => delta.to,
        }
    }

    /// Where the file is: mirrors, in order.
    pub fn urls(self) -> &'m [String] {
        match self {
            Self::Full(full) => &full.urls,
            Self::Delta(delta) => &delta.urls,
        }
    }

    /// SHA-256 of the file in hex.
    pub fn sha256(self) -> &'m str {
        match self {
            Self::Full(full) => &full.sha256,
            Self::Delta(delta) => &delta.sha256,
        }
    }

    /// Bytes of the file.
    pub fn size(self) -> u64 {
        match self {
            Self::Full(full) => full.size,
            Self::Delta(delta) => delta.size,
        }
    }

    /// A known answer of the version that this step gives.
    pub fn canary(self) -> Option<Canary> {
        match self {
            Self::Full(full) => full.canary,
            Self::Delta(delta) => delta.canary,
        }
    }
}

/// A way to the live version.
#[derive(Debug, Clone, PartialEq)]
pub struct Way<'m> {
    /// The version here that it starts from; none where it starts with whole weights.
    pub from: Option<u64>,
    /// Files to fetch, in order; empty where the live version is here already.
    pub steps: Vec<Step<'m>>,
}

/// What a way costs, in the order of importance: bytes to fetch, then files to apply.
type Cost = (u64, usize);

/// Finds the cheapest way to the manifest's live version from any of the versions that are `here`;
/// none where no way leads there. `price` is what a file costs in bytes; none when it must not be
/// used.
pub fn cheapest<'m>(
    manifest: &'m UpdateManifest,
    here: &[u64],
    price: impl Fn(Step<'m>) -> Option<u64>,
) -> Option<Way<'m>> {
    let mut ways = Ways::default();
    for version in here {
        ways.reach(*version, (0, 0), None);
    }
    for full in &manifest.full {
        let step = Step::Full(full);
        if let Some(price) = price(step) {
            ways.reach(full.version, (price, 1), Some(step));
        }
    }
    let mut onward: BTreeMap<u64, Vec<(&Delta, u64)>> = BTreeMap::new();
    for delta in &manifest.updates {
        if let Some(price) = price(Step::Delta(delta)) {
            onward.entry(delta.from).or_default().push((delta, price));
        }
    }
    while let Some(((bytes, files), at)) = ways.next() {
        for (delta, price) in onward.get(&at).into_iter().flatten() {
            let cost = (bytes.saturating_add(*price), files + 1);
            ways.reach(delta.to, cost, Some(Step::Delta(delta)));
        }
    }
    ways.to(manifest.live_version)
}

/// The best ways known so far, and the versions from which to look on: Dijkstra's algorithm.
#[derive(Default)]
struct Ways<'m> {
    /// By version: the cost, and the last step.
    best: BTreeMap<u64, (Cost, Option<Step<'m>>)>,
    open: BinaryHeap<Reverse<(Cost, u64)>>,
}

impl<'m> Ways<'m> {
    fn reach(&mut self, version: u64, cost: Cost, by: Option<Step<'m>>) {
        let known = self.best.get(&version);
        if known.is_none_or(|(known, _)| cost < *known) {
            self.best.insert(version, (cost, by));
            self.open.push(Reverse((cost, version)));
        }
    }

    /// The nearest version that was not looked on from yet.
    fn next(&mut self) -> Option<(Cost, u64)> {
        loop {
            let Reverse((cost, version)) = self.open.pop()?;
            // What was reached cheaper since lies in the heap twice.
            if self
                .best
                .get(&version)
                .is_some_and(|(best, _)| cost == *best)
            {
                return Some((cost, version));
            }
        }
    }

    /// Follows the steps back to where they began.
    fn to(&self, version: u64) -> Option<Way<'m>> {
        let mut steps = Vec::new();
        let (mut from, (_, mut by)) = (Some(version), *self.best.get(&version)?);
        while let Some(step) = by {
            steps.push(step);
            let Step::Delta(delta) = step else {
                from = None;
                break;
            };
            from = Some(delta.from);
            (_, by) = *self.best.get(&delta.from)?;
        }
        steps.reverse();
        Some(Way { from, steps })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::job::Format;
    use crate::protocol::message::V1;
    use rand::{Rng, SeedableRng};

    fn full(version: u64, size: u64) -> FullWeights {
        FullWeights {
            version,
            urls: vec![format!("full-{version}")],
            sha256: String::new(),
            size,
            graph_sha256: String::new(),
            canary: None,
        }
    }

    fn delta(from: u64, to: u64, size: u64) -> Delta {
        Delta {
            from,
            to,
            urls: vec![format!("{from}-{to}")],
            format: Format::BinaryV2,
            compression: None,
            sha256: String::new(),
            size,
            canary: None,
        }
    }

    fn manifest(live_version: u64, full: Vec<FullWeights>, updates: Vec<Delta>) -> UpdateManifest {
        UpdateManifest {
            v: V1,
            name: "tiny".into(),
            live_version,
            full,
            updates,
        }
    }

    fn names(way: &Way<'_>) -> Vec<String> {
        way.steps
            .iter()
            .map(|step| step.urls()[0].clone())
            .collect()
    }

    fn every(step: Step<'_>) -> Option<u64> {
        Some(step.size())
    }

    #[test]
    fn small_steps_are_taken_until_whole_weights_are_cheaper() {
        let updates = vec![
            delta(1, 2, 10),
            delta(2, 3, 10),
            delta(3, 4, 10),
            delta(2, 4, 15),
        ];
        let published = manifest(4, vec![full(3, 31), full(4, 36)], updates);
        let way = cheapest(&published, &[1], every).unwrap();
        assert_eq!(
            (way.from, names(&way)),
            (Some(1), vec!["1-2".into(), "2-4".into()])
        );
        // From 0 nothing leads on.
        let way = cheapest(&published, &[0], every).unwrap();
        assert_eq!((way.from, names(&way)), (None, vec!["full-4".into()]));
        // An older version that is still here is as good a start as the one that is served.
        let way = cheapest(&published, &[0, 3], every).unwrap();
        assert_eq!((way.from, names(&way)), (Some(3), vec!["3-4".into()]));
        let way = cheapest(&published, &[3, 4], every).unwrap();
        assert_eq!((way.from, way.steps.len()), (Some(4), 0));
    }

    #[test]
    fn what_must_not_be_used_is_gone_around_and_a_gap_is_no_way() {
        let updates = vec![delta(1, 2, 10), delta(2, 3, 10)];
        let published = manifest(3, vec![full(3, 500)], updates);
        let but = |name: &str| {
            let price = |step: Step<'_>| (step.urls()[0] != name).then(|| step.size());
            cheapest(&published, &[1], price).map(|way| names(&way))
        };
        assert_eq!(but("2-3"), Some(vec!["full-3".into()]));
        assert_eq!(but("full-3"), Some(vec!["1-2".into(), "2-3".into()]));
        assert_eq!(cheapest(&published, &[7], |_| None), None);
    }

    /// The least bytes by trying everything, which ends because no version is visited twice.
    fn least(published: &UpdateManifest, at: u64, seen: &mut Vec<u64>) -> Option<u64> {
        if at == published.live_version {
            return Some(0);
        }
        seen.push(at);
        let onward = published.updates.iter().filter(|d| d.from == at);
        let mut best = None;
        for delta in onward {
            if !seen.contains(&delta.to)
                && let Some(rest) = least(published, delta.to, seen)
            {
                best = Some(best.unwrap_or(u64::MAX).min(delta.size + rest));
            }
        }
        seen.pop();
        best
    }

    #[test]
    fn no_other_way_is_cheaper() {
        for seed in 0..500 {
            let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
            let mut version = || rng.random_range(0..7_u64);
            let edges: Vec<(u64, u64)> = (0..12).map(|_| (version(), version())).collect();
            let (wholes, live) = ([version(), version()], version());
            let updates = edges.iter().filter(|(from, to)| from != to);
            let updates = updates
                .map(|(from, to)| delta(*from, *to, rng.random_range(1..30)))
                .collect();
            let full = wholes.map(|v| full(v, rng.random_range(20..80))).to_vec();
            let published = manifest(live, full, updates);
            let wholes = published.full.iter();
            let starts = wholes.map(|f| (f.version, f.size)).chain([(0, 0)]);
            let expected = starts
                .filter_map(|(at, cost)| Some(cost + least(&published, at, &mut Vec::new())?))
                .min();
            let way = cheapest(&published, &[0], every);
            let found = way
                .as_ref()
                .map(|w| w.steps.iter().map(|s| s.size()).sum::<u64>());
            assert_eq!(found, expected, "seed {seed}");
            let Some(way) = way else { continue };
            // Each step begins where the one before ended.
            let mut at = way.from;
            for step in way.steps {
                if let Step::Delta(delta) = step {
                    assert_eq!(at, Some(delta.from), "seed {seed}");
                }
                at = Some(step.to());
            }
            assert_eq!(at, Some(live), "seed {seed}");
        }
    }
}
