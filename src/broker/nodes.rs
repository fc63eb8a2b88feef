//! The nodes of a cluster, in the order in which this process tries them.

use std::collections::VecDeque;
use std::time::Duration;

use rand::Rng;
use rand::seq::SliceRandom as _;

use crate::config::AmqpConfig;

/// How long a node may take for one connection.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest AMQP heartbeat where there are several nodes.
const ALERT: Duration = Duration::from_secs(3);
/// How long a node may take for one connection, or for a consumer, where there is another to go to. A worker
/// may wait once for each before it is ready.
const BRIEF: Duration = Duration::from_secs(2);

/// The nodes of `amqp.url`, which are tried in turn. Each process has an order of its own, so that a fleet
/// that loses a node spreads over the others, and keeps that order.
#[derive(Debug, Clone)]
pub struct Nodes {
    pub(super) config: AmqpConfig,
    patience: Duration,
    /// The next one to try comes first.
    urls: VecDeque<String>,
}

impl Nodes {
    /// In a random order.
    pub fn new(config: &AmqpConfig) -> Self {
        Self::shuffled(config, &mut rand::rng())
    }

    fn shuffled(config: &AmqpConfig, random: &mut impl Rng) -> Self {
        let mut urls = config.urls.clone();
        urls.shuffle(random);
        Self {
            config: config.clone(),
            patience: PATIENCE,
            urls: urls.into(),
        }
    }

    /// The same, but each node may take only this long for a connection.
    #[must_use]
    pub fn within(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// AMQP heartbeat of a connection: a node is given up after two of them.
    pub(super) fn heartbeat(&self) -> Duration {
        self.at_most(ALERT, self.config.heartbeat)
    }

    /// How long each may take for one connection.
    pub(super) fn patience(&self) -> Duration {
        self.briefly(self.patience)
    }

    /// How long a node may take for what a lone one may take so long for.
    pub(super) fn briefly(&self, alone: Duration) -> Duration {
        self.at_most(BRIEF, alone)
    }

    /// No longer than this where there is another node to go to.
    fn at_most(&self, limit: Duration, alone: Duration) -> Duration {
        match self.count() {
            0 | 1 => alone,
            _ => alone.min(limit),
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.urls.len()
    }

    /// How long it may take to find one that answers.
    pub fn longest(&self) -> Duration {
        self.patience() * u32::try_from(self.count()).unwrap_or(u32::MAX)
    }

    /// The URL to try next. It becomes the last one at once: the attempt may be given up halfway, and a
    /// node that was lost is tried again after all the others.
    pub(super) fn take(&mut self) -> Option<String> {
        let url = self.urls.pop_front()?;
        self.urls.push_back(url.clone());
        Some(url)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Layers};
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;
    use std::collections::HashSet;

    fn config(urls: &[&str]) -> AmqpConfig {
        let set = [format!("amqp.url={urls:?}")];
        let layers = Layers {
            set: &set,
            ..Layers::default()
        };
        Config::load(&layers).unwrap().amqp
    }

    fn taken(nodes: &mut Nodes, count: usize) -> Vec<String> {
        (0..count).map_while(|_| nodes.take()).collect()
    }

    #[test]
    fn every_round_has_each_node_once_in_the_same_order_and_the_lost_one_last() {
        let config = config(&["amqp://a", "amqp://b", "amqp://c"]);
        let mut nodes = Nodes::new(&config);
        let first = taken(&mut nodes, 3);
        let each: HashSet<&String> = first.iter().collect();
        assert_eq!(each, config.urls.iter().collect());
        assert_eq!(taken(&mut nodes, 3), first);
        // Connected to the first, which is then lost.
        assert_eq!(nodes.take().as_ref(), first.first());
        let round = taken(&mut nodes, 3);
        assert_eq!(round, [&first[1..], &first[..1]].concat());
    }

    #[test]
    fn a_fleet_begins_on_all_nodes_and_spreads_over_the_others_when_one_is_lost() {
        let config = config(&["amqp://a", "amqp://b", "amqp://c"]);
        let mut seconds: HashSet<(String, String)> = HashSet::new();
        for seed in 0..64 {
            let mut nodes = Nodes::shuffled(&config, &mut StdRng::seed_from_u64(seed));
            let pair = taken(&mut nodes, 2);
            seconds.insert((pair[0].clone(), pair[1].clone()));
        }
        assert_eq!(seconds.len(), 6, "{seconds:?}");
    }

    #[test]
    fn a_lone_node_is_tried_again_and_all_nodes_take_no_longer_than_each_may() {
        let mut lone = Nodes::new(&config(&["amqp://a"]));
        assert_eq!(taken(&mut lone, 2), ["amqp://a", "amqp://a"]);
        assert_eq!(lone.longest(), PATIENCE);
        let three = Nodes::new(&config(&["amqp://a", "amqp://b", "amqp://c"]));
        assert_eq!(three.longest(), BRIEF * 3);
        let three = three.within(Duration::from_secs(1));
        assert_eq!(three.longest(), Duration::from_secs(3));
        assert_eq!(lone.heartbeat(), lone.config.heartbeat);
        assert_eq!(three.heartbeat(), ALERT);
    }
}
