//! RabbitMQ nodes on the loopback that form one cluster.

use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::Value;

use crate::broker::{Mapper, Rabbit, recommended};
use crate::wait::{eventually, eventually_some, secs};

/// Nodes that know each other. Each can be stopped, killed, frozen and started again by itself.
pub struct Cluster {
    nodes: Vec<Arc<Rabbit>>,
}

impl Cluster {
    /// Starts this many nodes, with the settings that `ops/rabbitmq/cluster.conf` has, and waits until they are one cluster.
    /// A quorum queue has a replica on up to three.
    #[track_caller]
    pub fn started(size: usize) -> Self {
        let mapper = Arc::new(Mapper::new());
        let cookie = uuid::Uuid::new_v4().simple().to_string();
        let nodes: Vec<Arc<Rabbit>> = (0..size)
            .map(|_| Arc::new(Rabbit::with(Arc::clone(&mapper), &cookie)))
            .collect();
        let mut peers = format!(
            "cluster_formation.peer_discovery_backend = classic_config\n\
             cluster_formation.target_cluster_size_hint = {size}\n"
        );
        for key in ["net_ticktime", "cluster_partition_handling"] {
            writeln!(peers, "{key} = {}", recommended(key)).expect("a String takes every write");
        }
        for (n, node) in nodes.iter().enumerate() {
            let name = node.name();
            writeln!(
                peers,
                "cluster_formation.classic_config.nodes.{} = {name}",
                n + 1
            )
            .expect("a String takes every write");
        }
        for node in &nodes {
            node.configure(&peers);
            node.launch();
        }
        let cluster = Self { nodes };
        for node in &cluster.nodes {
            node.await_start();
        }
        cluster.await_running(size);
        cluster
    }

    /// The nodes, in the order of their indices.
    pub fn nodes(&self) -> &[Arc<Rabbit>] {
        &self.nodes
    }

    /// What `amqp.url` is for somebody who knows every node.
    pub fn urls(&self) -> String {
        let urls: Vec<String> = self.nodes.iter().map(|node| node.url()).collect();
        format!("{urls:?}")
    }

    /// The index of the node with this host and port.
    #[track_caller]
    pub fn at(&self, place: &str) -> usize {
        let found = self.nodes.iter().position(|node| node.place() == place);
        found.unwrap_or_else(|| panic!("{place} is no node of the cluster"))
    }

    /// Shuts RabbitMQ down on a node and has the others forget it.
    #[track_caller]
    pub fn remove(&self, node: usize) {
        let gone = &self.nodes[node];
        gone.order(&["stop_app"]);
        let mut others = self.running().filter(|other| other.name() != gone.name());
        let other = others.next().expect("another node");
        other.order(&["forget_cluster_node", gone.name()]);
    }

    /// Waits until this many nodes are running, in the eyes of each of them.
    #[track_caller]
    pub fn await_running(&self, count: usize) {
        eventually(secs(60), &format!("{count} nodes are one cluster"), || {
            let views = self.running().map(|node| {
                let status = node.control(&["cluster_status"])?;
                Some(status["running_nodes"].as_array()?.len())
            });
            let views: Vec<Option<usize>> = views.collect();
            views.len() == count && views.iter().all(|seen| *seen == Some(count))
        });
    }

    /// Waits until a quorum queue has a leader on a running node; the node's index.
    #[track_caller]
    pub fn leader(&self, queue: &str) -> usize {
        eventually_some(secs(60), &format!("{queue} has a leader"), || {
            let asked = self.running().next().expect("a running node");
            let rows = asked.control(&["list_queues", "name", "leader"])?;
            let row = rows.as_array()?.iter().find(|row| row["name"] == queue)?;
            self.nodes
                .iter()
                .position(|node| row["leader"] == node.name() && node.is_running())
        })
    }

    /// Has another node lead a quorum queue, as an operator does who rebalances queues; returns when it does.
    #[track_caller]
    pub fn move_leader(&self, queue: &str, to: usize) {
        let node = self.nodes[to].name();
        let code = format!(
            "{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)), \
             rabbit_quorum_queue:transfer_leadership(Queue, '{node}'), ok."
        );
        eventually(secs(60), &format!("{node} leads {queue}"), || {
            self.nodes[to].control(&["eval", &code]);
            self.leader(queue) == to
        });
    }

    /// Waits until a quorum queue has its replicas on this many nodes that are up.
    #[track_caller]
    pub fn await_online(&self, queue: &str, count: usize) {
        eventually(secs(60), &format!("{queue} is on {count} nodes"), || {
            let asked = self.running().next().expect("a running node");
            let rows = asked.control(&["list_queues", "name", "online"]);
            let rows = rows.as_ref().and_then(Value::as_array);
            let row = rows.and_then(|rows| rows.iter().find(|row| row["name"] == queue));
            row.and_then(|row| row["online"].as_array())
                .is_some_and(|online| online.len() == count)
        });
    }

    /// The same for all quorum queues whose names begin like this.
    #[track_caller]
    pub fn await_all_online(&self, beginning: &str, count: usize) {
        let what = format!("all queues of {beginning} are on {count} nodes");
        eventually(secs(60), &what, || {
            let asked = self.running().next().expect("a running node");
            let rows = asked.control(&["list_queues", "name", "type", "online"]);
            let rows = rows.as_ref().and_then(Value::as_array);
            rows.is_some_and(|rows| {
                let ours = rows.iter().filter(|row| {
                    let name = row["name"].as_str();
                    row["type"] == "quorum" && name.is_some_and(|name| name.starts_with(beginning))
                });
                let mut online = ours.map(|row| row["online"].as_array().map_or(0, Vec::len));
                online.all(|online| online == count)
            })
        });
    }

    fn running(&self) -> impl Iterator<Item = &Arc<Rabbit>> {
        self.nodes.iter().filter(|node| node.is_running())
    }
}
