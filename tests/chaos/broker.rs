//! The RabbitMQ that is struck: one node, or three, of which the one that leads the jobs queue is the victim.

use std::sync::Arc;

use testkit::broker::Rabbit;
use testkit::cluster::Cluster;

use crate::proxy::Proxy;

/// Nodes of a cluster: as many as a quorum queue has replicas.
const NODES: usize = 3;

pub(crate) struct Broker {
    nodes: Nodes,
    /// For the aggregator, which nothing disturbs but the loss of the node that it happens to be on.
    front: Proxy,
}

enum Nodes {
    One(Arc<Rabbit>),
    Three(Cluster),
}

impl Broker {
    pub(crate) fn start(clustered: bool) -> Self {
        let nodes = if clustered {
            Nodes::Three(Cluster::started(NODES))
        } else {
            Nodes::One(Arc::new(Rabbit::started()))
        };
        let front = Proxy::before(&nodes.urls());
        Self { nodes, front }
    }

    /// Any node.
    pub(crate) fn node(&self) -> Arc<Rabbit> {
        match &self.nodes {
            Nodes::One(node) => Arc::clone(node),
            Nodes::Three(cluster) => Arc::clone(&cluster.nodes()[0]),
        }
    }

    /// Where the aggregator connects.
    pub(crate) fn url(&self) -> &str {
        self.front.url()
    }

    /// A proxy for a worker; each prefers another node.
    pub(crate) fn proxy(&self, worker: usize) -> Proxy {
        let mut urls = self.nodes.urls();
        let first = worker % urls.len();
        urls.rotate_left(first);
        Proxy::before(&urls)
    }

    /// The node to strike.
    pub(crate) fn leader(&self, queue: &str) -> Arc<Rabbit> {
        match &self.nodes {
            Nodes::One(node) => Arc::clone(node),
            Nodes::Three(cluster) => Arc::clone(&cluster.nodes()[cluster.leader(queue)]),
        }
    }

    /// Whether the jobs queue and its ladder are empty to the last: a passive declare does not count
    /// what waits to arrive elsewhere as a dead letter. False also where nobody answers.
    pub(crate) fn holds_nothing(&self, jobs: &str) -> bool {
        let rows = self
            .leader(jobs)
            .control(&["list_queues", "name", "messages"]);
        let rows = rows.as_ref().and_then(serde_json::Value::as_array);
        rows.is_some_and(|rows| {
            let mut ours = rows.iter().filter(|row| {
                let name = row["name"].as_str();
                name.is_some_and(|name| name.starts_with(jobs))
            });
            ours.all(|row| row["messages"] == 0)
        })
    }

    /// Waits until a node that was struck takes part again, so that the next fault leaves a majority.
    pub(crate) fn rejoined(&self, queue: &str) {
        match &self.nodes {
            Nodes::One(_) => {}
            Nodes::Three(cluster) => cluster.await_online(queue, NODES),
        }
    }
}

impl Nodes {
    fn urls(&self) -> Vec<String> {
        match self {
            Self::One(node) => vec![node.url()],
            Self::Three(cluster) => cluster.nodes().iter().map(|node| node.url()).collect(),
        }
    }
}
