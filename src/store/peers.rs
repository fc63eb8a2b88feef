//! What a worker reads of the other workers of its model, in their heartbeat records.

use redis::AsyncCommands;

use super::health::Errand;
use super::{Reply, STORE_TIMEOUT, Store, own_name};
use crate::protocol::document::from_json;

/// How many workers are looked at in search of idle ones.
const MOST_LOOKED_AT: usize = 64;

/// The parts of a heartbeat record that are read here. A worker of another version may leave any out.
#[derive(Debug, Default, PartialEq, serde::Deserialize)]
#[serde(default)]
struct Peer {
    incarnation: String,
    seq: Option<u64>,
    state: String,
    accepting: bool,
    jobs: Option<Load>,
    broker: Consumer,
}

/// The jobs that a worker holds.
#[derive(Debug, PartialEq, serde::Deserialize)]
struct Load {
    in_flight: u64,
    buffered: u64,
}

/// Whether the broker has the worker's consumer.
#[derive(Debug, Default, PartialEq, serde::Deserialize)]
#[serde(default)]
struct Consumer {
    consuming: bool,
}

impl Peer {
    fn read(text: &str) -> Option<Self> {
        from_json(text.as_bytes()).ok()
    }

    fn lives_as(&self, incarnation: &str) -> bool {
        self.incarnation == incarnation && self.state != "stopped"
    }

    /// Ready, and holding no job.
    fn is_idle(&self) -> bool {
        let holds_none = |load: &Load| load.in_flight + load.buffered == 0;
        self.accepting && self.jobs.as_ref().is_some_and(holds_none)
    }
}

impl Store {
    /// The `seq` in the record of each `WORKER_ID/INCARNATION`; none where that incarnation has no
    /// record, or one that says `stopped`.
    pub async fn last_seqs(&self, fields: &[String]) -> Reply<Vec<Option<u64>>> {
        let owners: Vec<(&str, &str)> = fields
            .iter()
            .map(|field| field.rsplit_once('/').unwrap_or((field, "")))
            .collect();
        // A worker whose name another one holds reports under a name of its own.
        let keys = owners.iter().flat_map(|(id, incarnation)| {
            let own_name = own_name(id, incarnation);
            [self.keys.worker(id), self.keys.worker(&own_name)]
        });
        let keys: Vec<String> = keys.collect();
        let read = self.bounded(Errand::Look, STORE_TIMEOUT, |mut connection| async move {
            connection.mget::<_, Vec<Option<String>>>(keys).await
        });
        let records = read.await;
        records.map(|records| {
            let seqs = owners.iter().zip(records.chunks(2));
            let seqs = seqs.map(|((_, incarnation), records)| {
                let mut peers = records.iter().flatten().filter_map(|text| Peer::read(text));
                peers.find(|peer| peer.lives_as(incarnation))?.seq
            });
            seqs.collect()
        })
    }

    /// The number of workers of this model that send heartbeats, ready or not.
    pub async fn live_workers(&self) -> Reply<u32> {
        let index = self.keys.workers();
        self.bounded(Errand::Look, STORE_TIMEOUT, |mut connection| async move {
            connection.zcard(index).await
        })
        .await
    }

    /// How many of them say that the broker has their consumer.
    pub async fn consuming_workers(&self) -> Reply<u32> {
        // The largest count reads all of them, with a command that workers may send anyway.
        let peers = self.peers(i32::MAX).await;
        peers.map(|peers| {
            let consuming = peers.iter().filter(|peer| peer.broker.consuming);
            u32::try_from(consuming.count()).unwrap_or(u32::MAX)
        })
    }

    /// How many workers of this model could take a job at once: ready, and holding none. Of a large
    /// fleet only a sample is looked at.
    pub async fn idle_workers(&self) -> Reply<usize> {
        let peers = self.peers(MOST_LOOKED_AT).await;
        peers.map(|peers| peers.iter().filter(|peer| peer.is_idle()).count())
    }

    /// The readable records of up to so many workers, chosen at random.
    async fn peers(&self, most: impl redis::ToRedisArgs) -> Reply<Vec<Peer>> {
        let keys = self.keys.clone();
        let mut named = redis::cmd("ZRANDMEMBER");
        named.arg(keys.workers()).arg(most);
        let read = self.bounded(Errand::Look, STORE_TIMEOUT, |mut connection| async move {
            let ids: Vec<String> = named.query_async(&mut connection).await?;
            let records: Vec<String> = ids.iter().map(|id| keys.worker(id)).collect();
            if records.is_empty() {
                return Ok(Vec::new());
            }
            connection.mget::<_, Vec<Option<String>>>(records).await
        });
        read.await.map(|records| {
            let records = records.iter().flatten();
            records.filter_map(|text| Peer::read(text)).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_tells_who_lives_and_who_is_idle_and_one_without_its_jobs_is_not() {
        for (record, lives, idle) in [
            (
                r#"{"incarnation": "i", "seq": 7, "state": "ready"}"#,
                true,
                false,
            ),
            (
                r#"{"incarnation": "i", "seq": 7, "state": "stopped"}"#,
                false,
                false,
            ),
            (
                r#"{"incarnation": "j", "seq": 7, "state": "ready"}"#,
                false,
                false,
            ),
            (r#"{"accepting": true}"#, false, false),
            (
                r#"{"accepting": true, "jobs": {"in_flight": 0, "buffered": 0}}"#,
                false,
                true,
            ),
            (
                r#"{"accepting": true, "jobs": {"in_flight": 0, "buffered": 1}}"#,
                false,
                false,
            ),
            (
                r#"{"accepting": false, "jobs": {"in_flight": 0, "buffered": 0}}"#,
                false,
                false,
            ),
        ] {
            let peer = Peer::read(record).unwrap();
            assert_eq!(
                (peer.lives_as("i"), peer.is_idle()),
                (lives, idle),
                "{record}"
            );
        }
        assert_eq!(Peer::read("[]"), None);
    }
}
