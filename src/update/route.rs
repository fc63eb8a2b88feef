//! The route from the local weights to the live ones: the fewest bytes to download. Pure; the caller's
//! price leaves out a file that turned out bad, and asks for the next route.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use crate::protocol::update_manifest::{Canary, Delta, FullWeights, UpdateManifest};

/// One file on the route.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step<'m> {
    /// Whole weights, independent of what was there before.
    Full(&'m FullWeights),
    /// Added to what is there.
    Delta(&'m Delta),
}

impl<'m> Step<'m> {
    /// Every step of a manifest.
    pub fn all(manifest: &'m UpdateManifest) -> impl Iterator<Item = Self> {
        let full = manifest.full.iter().map(Self::Full);
        full.chain(manifest.updates.iter().map(Self::Delta))
    }

    /// The file's mirrors, in order.
    pub fn urls(self) -> &'m [String] {
        let (Self::Full(FullWeights { urls, .. }) | Self::Delta(Delta { urls, .. })) = self;
        urls
    }

    /// The version that it leads to.
    pub fn to(self) -> u64 {
        match self {
            Self::Full(full) => full.version,
            Self::Delta(delta) => delta.to,
        }
    }

    /// SHA-256 of the file in hex.
    pub fn sha256(self) -> &'m str {
        let (Self::Full(FullWeights { sha256, .. }) | Self::Delta(Delta { sha256, .. })) = self;
        sha256
    }

    /// Bytes of the file.
    pub fn size(self) -> u64 {
        let (Self::Full(FullWeights { size, .. }) | Self::Delta(Delta { size, .. })) = self;
        *size
    }

    /// A known answer of that version.
    pub fn canary(self) -> Option<Canary> {
        let (Self::Full(FullWeights { canary, .. }) | Self::Delta(Delta { canary, .. })) = self;
        *canary
    }
}

/// A route to the live version.
#[derive(Debug, Clone, PartialEq)]
pub struct Route<'m> {
    /// The local version that it starts from; none if it starts with whole weights.
    pub from: Option<u64>,
    /// Files to download, in order; none if the live version is local already.
    pub steps: Vec<Step<'m>>,
}

/// The cost of a route, most important first: bytes to download, files to apply.
type Cost = (u64, usize);

/// Finds the cheapest route to a version from any of the `local` versions; None if
/// there is none. `price` is what a file costs in bytes; None if it must not be used.
pub fn cheapest<'m>(
    manifest: &'m UpdateManifest,
    to: u64,
    local: &[u64],
    price: impl Fn(Step<'m>) -> Option<u64>,
) -> Option<Route<'m>> {
    let mut search = Search::default();
    for version in local {
        search.reach(*version, (0, 0), None);
    }
    for full in &manifest.full {
        let step = Step::Full(full);
        if let Some(price) = price(step) {
            search.reach(full.version, (price, 1), Some(step));
        }
    }
    let mut onward: BTreeMap<u64, Vec<(&Delta, u64)>> = BTreeMap::new();
    for delta in &manifest.updates {
        if let Some(price) = price(Step::Delta(delta)) {
            onward.entry(delta.from).or_default().push((delta, price));
        }
    }
    while let Some(((bytes, files), at)) = search.next() {
        for (delta, price) in onward.get(&at).into_iter().flatten() {
            let cost = (bytes.saturating_add(*price), files + 1);
            search.reach(delta.to, cost, Some(Step::Delta(delta)));
        }
    }
    search.to(to)
}

/// The best routes so far, and the versions to continue from: Dijkstra's algorithm.
#[derive(Default)]
struct Search<'m> {
    /// By version: the cost, and the last step.
    best: BTreeMap<u64, (Cost, Option<Step<'m>>)>,
    open: BinaryHeap<Reverse<(Cost, u64)>>,
}

impl<'m> Search<'m> {
    fn reach(&mut self, version: u64, cost: Cost, by: Option<Step<'m>>) {
        let known = self.best.get(&version);
        if known.is_none_or(|(known, _)| cost < *known) {
            self.best.insert(version, (cost, by));
            self.open.push(Reverse((cost, version)));
        }
    }

    /// The nearest version that the search has not continued from.
    fn next(&mut self) -> Option<(Cost, u64)> {
        loop {
            let Reverse((cost, version)) = self.open.pop()?;
            // A version that was reached again, cheaper, is in the heap twice.
            if self
                .best
                .get(&version)
                .is_some_and(|(best, _)| cost == *best)
            {
                return Some((cost, version));
            }
        }
    }

    /// Follows the steps back to where they start.
    fn to(&self, version: u64) -> Option<Route<'m>> {
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
        Some(Route { from, steps })
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

    fn names(route: &Route<'_>) -> Vec<String> {
        route
            .steps
            .iter()
            .map(|step| step.urls()[0].clone())
            .collect()
    }

    fn every(step: Step<'_>) -> Option<u64> {
        Some(step.size())
    }

    #[test]
    fn deltas_are_used_until_whole_weights_are_cheaper() {
        let updates = vec![
            delta(1, 2, 10),
            delta(2, 3, 10),
            delta(3, 4, 10),
            delta(2, 4, 15),
        ];
        let published = manifest(4, vec![full(3, 31), full(4, 36)], updates);
        let route = cheapest(&published, published.live_version, &[1], every).unwrap();
        assert_eq!(
            (route.from, names(&route)),
            (Some(1), vec!["1-2".into(), "2-4".into()])
        );
        // Nothing leads on from 0.
        let route = cheapest(&published, published.live_version, &[0], every).unwrap();
        assert_eq!((route.from, names(&route)), (None, vec!["full-4".into()]));
        // An older version that is still local is as good a start as the one that is served.
        let route = cheapest(&published, published.live_version, &[0, 3], every).unwrap();
        assert_eq!((route.from, names(&route)), (Some(3), vec!["3-4".into()]));
        let route = cheapest(&published, published.live_version, &[3, 4], every).unwrap();
        assert_eq!((route.from, route.steps.len()), (Some(4), 0));
    }

    #[test]
    fn a_file_that_must_not_be_used_is_avoided_and_a_gap_is_no_route() {
        let updates = vec![delta(1, 2, 10), delta(2, 3, 10)];
        let published = manifest(3, vec![full(3, 500)], updates);
        let but = |name: &str| {
            let price = |step: Step<'_>| (step.urls()[0] != name).then(|| step.size());
            cheapest(&published, published.live_version, &[1], price).map(|route| names(&route))
        };
        assert_eq!(but("2-3"), Some(vec!["full-3".into()]));
        assert_eq!(but("full-3"), Some(vec!["1-2".into(), "2-3".into()]));
        assert_eq!(
            cheapest(&published, published.live_version, &[7], |_| None),
            None
        );
    }

    /// The fewest bytes, found by trying everything; no version is visited twice.
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
    fn no_other_route_is_cheaper() {
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
            let route = cheapest(&published, published.live_version, &[0], every);
            let found = route
                .as_ref()
                .map(|w| w.steps.iter().map(|s| s.size()).sum::<u64>());
            assert_eq!(found, expected, "seed {seed}");
            let Some(route) = route else { continue };
            // Each step begins where the one before ended.
            let mut at = route.from;
            for step in route.steps {
                if let Step::Delta(delta) = step {
                    assert_eq!(at, Some(delta.from), "seed {seed}");
                }
                at = Some(match step {
                    Step::Full(full) => full.version,
                    Step::Delta(delta) => delta.to,
                });
            }
            assert_eq!(at, Some(live), "seed {seed}");
        }
    }
}
