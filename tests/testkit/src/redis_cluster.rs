//! A Redis cluster: three masters with a replica each.

use std::sync::Arc;

use redis::Value;

use crate::port::free_port;
use crate::redis_server::Redis;
use crate::wait::{START, eventually, eventually_some};

const MASTERS: usize = 3;
/// The slots of a cluster.
const SLOTS: usize = 16_384;

/// Six nodes of one test's own; the first three were the masters when they were started, and node n + 3 follows node n.
pub struct RedisCluster {
    nodes: Vec<Arc<Redis>>,
}

impl RedisCluster {
    /// A cluster whose nodes know each other, each with further arguments.
    #[track_caller]
    pub fn started(more: &[&str]) -> Self {
        let bus: Vec<u16> = (0..2 * MASTERS).map(|_| free_port()).collect();
        let nodes: Vec<Arc<Redis>> = bus.iter().map(|bus| node(*bus, more)).collect();
        let cluster = Self { nodes };
        for n in 0..MASTERS {
            let (first, next) = (n * SLOTS / MASTERS, (n + 1) * SLOTS / MASTERS);
            let (first, last) = (first.to_string(), (next - 1).to_string());
            cluster.nodes[n].tell(&["CLUSTER", "ADDSLOTSRANGE", &first, &last]);
            cluster.nodes[n].tell(&["CLUSTER", "SET-CONFIG-EPOCH", &(n + 1).to_string()]);
        }
        for (node, bus) in cluster.nodes.iter().zip(&bus).skip(1) {
            let (port, bus) = (node.port().to_string(), bus.to_string());
            cluster.nodes[0].tell(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus]);
        }
        eventually(START, "all nodes know each other", || {
            let knows = |node: &Arc<Redis>| {
                let told = node.ask::<String>(&["CLUSTER", "NODES"]);
                told.is_some_and(|told| told.lines().count() == 2 * MASTERS)
            };
            cluster.nodes.iter().all(knows)
        });
        for n in MASTERS..2 * MASTERS {
            let master = cluster.id(n - MASTERS);
            cluster.nodes[n].tell(&["CLUSTER", "REPLICATE", &master]);
        }
        cluster.await_complete();
        cluster
    }

    /// The nodes.
    pub fn nodes(&self) -> &[Arc<Redis>] {
        &self.nodes
    }

    /// As `redis.url` takes it, for a user whose password is its name: the masters that were.
    pub fn urls(&self, user: &str) -> String {
        let url = |n: &Arc<Redis>| format!("\"redis://{user}:{user}@127.0.0.1:{}\"", n.port());
        let urls: Vec<String> = self.nodes[..MASTERS].iter().map(url).collect();
        format!("[{}]", urls.join(", "))
    }

    /// The slot of a key.
    #[track_caller]
    pub fn slot(&self, key: &str) -> u16 {
        let asked = self.nodes[0].ask(&["CLUSTER", "KEYSLOT", key]);
        asked.expect("a cluster computes slots")
    }

    /// The node that has a slot, as the nodes but those left out say.
    #[track_caller]
    pub fn master_of(&self, slot: u16, without: &[usize]) -> usize {
        eventually_some(START, "a node says that it has the slot", || {
            let mut asked = (0..self.nodes.len()).filter(|n| !without.contains(n));
            asked.find(|n| self.has(*n, slot))
        })
    }

    /// Moves a slot with its keys from one node to another, step by step, as `redis-cli --cluster reshard` does.
    #[track_caller]
    pub fn move_slot(&self, slot: u16, from: usize, to: usize) {
        let (number, port) = (slot.to_string(), self.nodes[to].port().to_string());
        let (source, target) = (self.id(from), self.id(to));
        self.nodes[to].tell(&["CLUSTER", "SETSLOT", &number, "IMPORTING", &source]);
        self.nodes[from].tell(&["CLUSTER", "SETSLOT", &number, "MIGRATING", &target]);
        eventually(START, "no key is left behind", || {
            let asked = ["CLUSTER", "GETKEYSINSLOT", &number, "10"];
            let keys: Vec<String> = self.nodes[from].ask(&asked).expect("a list of keys");
            for key in &keys {
                // A key may expire before it is moved.
                self.nodes[from].tell(&["MIGRATE", "127.0.0.1", &port, key, "0", "1000"]);
            }
            keys.is_empty()
        });
        for node in [to, from] {
            self.nodes[node].tell(&["CLUSTER", "SETSLOT", &number, "NODE", &target]);
        }
    }

    fn id(&self, node: usize) -> String {
        let id = self.nodes[node].ask(&["CLUSTER", "MYID"]);
        id.expect("a node of a cluster")
    }

    /// Whether a node says of itself that it is the slot's master.
    fn has(&self, node: usize, slot: u16) -> bool {
        let Some(ranges) = self.nodes[node].ask::<Vec<Vec<Value>>>(&["CLUSTER", "SLOTS"]) else {
            return false;
        };
        let port = Value::Int(self.nodes[node].port().into());
        ranges.iter().any(|range| match range.as_slice() {
            [
                Value::Int(first),
                Value::Int(last),
                Value::Array(master),
                ..,
            ] => (*first..=*last).contains(&slot.into()) && master.get(1) == Some(&port),
            _ => false,
        })
    }

    fn await_complete(&self) {
        for (n, node) in self.nodes.iter().enumerate() {
            eventually(START, "the cluster is complete", || {
                let state = node.ask::<String>(&["CLUSTER", "INFO"]);
                let is_ok = state.is_some_and(|state| state.contains("cluster_state:ok"));
                let told = node
                    .ask::<String>(&["INFO", "replication"])
                    .unwrap_or_default();
                let role = match n < MASTERS {
                    true => "connected_slaves:1",
                    false => "master_link_status:up",
                };
                is_ok && told.contains(role)
            });
        }
    }
}

fn node(bus: u16, more: &[&str]) -> Arc<Redis> {
    let bus = bus.to_string();
    let settings = [
        &["--cluster-enabled", "yes", "--cluster-port", &bus][..],
        &["--cluster-node-timeout", "1500"],
        &["--cluster-replica-validity-factor", "0"],
        more,
    ];
    let node = Redis::stopped().with(&settings.concat());
    node.start();
    Arc::new(node)
}
