//! A master, two replicas, and the three sentinels that watch them.

use std::sync::Arc;

use crate::redis_server::Redis;
use crate::wait::{START, eventually, eventually_some};

/// The sentinels' name of the master.
pub const MASTER: &str = "mymaster";

/// How many sentinels must agree that the master is gone.
const QUORUM: usize = 2;

/// Servers of one test's own; the first was the master when they were started.
pub struct Sentinels {
    servers: Vec<Arc<Redis>>,
    sentinels: Vec<Redis>,
}

impl Sentinels {
    /// Three servers under three sentinels that know of each other, each with further arguments.
    #[track_caller]
    pub fn started(more: &[&str]) -> Self {
        let master = Redis::stopped().with(more);
        master.start();
        let mut servers = vec![Arc::new(master)];
        let port = servers[0].port();
        for _ in 0..2 {
            let replica = format!("127.0.0.1 {port}");
            let more = [more, &["--replicaof", &replica]].concat();
            let server = Redis::stopped().with(&more);
            server.start();
            servers.push(Arc::new(server));
        }
        eventually(START, "both replicas follow the master", || {
            let followed = |server: &Arc<Redis>| {
                let told = server.ask::<String>(&["INFO", "replication"]);
                told.is_some_and(|told| told.contains("master_link_status:up"))
            };
            servers[1..].iter().all(followed)
        });
        let sentinels = (0..3).map(|_| sentinel(port)).collect();
        let all = Self { servers, sentinels };
        all.await_complete();
        all
    }

    /// As `redis.url` takes it, for a user whose password is its name.
    pub fn urls(&self, user: &str) -> String {
        let url = |s: &Redis| format!("\"redis://{user}:{user}@127.0.0.1:{}\"", s.port());
        let urls: Vec<String> = self.sentinels.iter().map(url).collect();
        format!("[{}]", urls.join(", "))
    }

    /// The servers; the first was the master when they were started.
    pub fn servers(&self) -> &[Arc<Redis>] {
        &self.servers
    }

    /// The sentinels.
    pub fn sentinels(&self) -> &[Redis] {
        &self.sentinels
    }

    /// Waits until a sentinel names another master than this one, and that is one; its place among the servers.
    #[track_caller]
    pub fn another_master(&self, than: usize) -> usize {
        eventually_some(START, "another master", || {
            let named = self.sentinels.iter().find_map(|sentinel| {
                let asked = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER];
                let (_, port): (String, u16) = sentinel.ask(&asked)?;
                let place = self.servers.iter().position(|s| s.port() == port)?;
                (place != than).then_some(place)
            })?;
            let role: Vec<redis::Value> = self.servers[named].ask(&["ROLE"])?;
            let master = redis::Value::BulkString(b"master".to_vec());
            (role.first() == Some(&master)).then_some(named)
        })
    }

    fn await_complete(&self) {
        for sentinel in &self.sentinels {
            eventually(START, "every sentinel knows all others", || {
                let told: Option<std::collections::HashMap<String, String>> =
                    sentinel.ask(&["SENTINEL", "MASTER", MASTER]);
                told.is_some_and(|told| {
                    let is = |field: &str, text: &str| told.get(field).is_some_and(|t| t == text);
                    is("num-other-sentinels", "2") && is("num-slaves", "2") && is("flags", "master")
                })
            });
        }
    }
}

fn sentinel(master: u16) -> Redis {
    let settings = format!(
        "sentinel monitor {MASTER} 127.0.0.1 {master} {QUORUM}\n\
         sentinel down-after-milliseconds {MASTER} 1000\n\
         sentinel failover-timeout {MASTER} 3000\n"
    );
    let sentinel = Redis::stopped().with_file(&settings).with(&["--sentinel"]);
    sentinel.start();
    sentinel
}
