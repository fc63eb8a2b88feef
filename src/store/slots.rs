//! Proof that a cluster can do all that the store asks for: the keys of every command lie in one slot.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use redis::cluster_routing::Slot;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::link::slot;
use super::scripts::Scripts;
use super::{Beat, Claim, FleetStore, Keep, Keys, Release, Store};
use crate::config::{Config, Layers, RedisConfig};

const MODEL: &str = "tinylm";
const SOON: Duration = Duration::from_secs(60);

/// Commands without a key.
const KEYLESS: [&str; 5] = ["CLIENT", "HELLO", "PING", "SCRIPT", "TIME"];

type Command = Vec<String>;

/// A server that takes every command down. It answers no more than the store needs to go on.
async fn server() -> (RedisConfig, UnboundedReceiver<Command>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let place = listener.local_addr().unwrap();
    let (taken, commands) = unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, taken.clone()));
        }
    });
    let set = [format!("redis.url=redis://{place}")];
    let layers = Layers {
        set: &set,
        ..Layers::default()
    };
    (Config::load(&layers).unwrap().redis, commands)
}

async fn serve(stream: TcpStream, taken: UnboundedSender<Command>) {
    let mut stream = BufReader::new(stream);
    while let Some(command) = read(&mut stream).await {
        let answer = match command[0].as_str() {
            "ZRANDMEMBER" => "*2\r\n$1\r\na\r\n$1\r\nb\r\n",
            "ZRANGEBYSCORE" => "*4\r\n$1\r\na\r\n$1\r\n1\r\n$1\r\nb\r\n$1\r\n2\r\n",
            "MGET" => "*2\r\n$-1\r\n$-1\r\n",
            "TIME" => "*2\r\n$1\r\n1\r\n$1\r\n0\r\n",
            "ZCARD" => ":1\r\n",
            // A refusal does not keep the store from the next call.
            "EVALSHA" => "-ERR no\r\n",
            _ => "+OK\r\n",
        };
        stream.write_all(answer.as_bytes()).await.unwrap();
        taken.send(command).unwrap();
    }
}

/// An array of texts, as clients send commands.
async fn read(stream: &mut BufReader<TcpStream>) -> Option<Command> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    let count: usize = line.trim().strip_prefix('*')?.parse().ok()?;
    let mut words = Vec::new();
    for _ in 0..count {
        line.clear();
        stream.read_line(&mut line).await.ok()?;
        let length: usize = line.trim().strip_prefix('$')?.parse().ok()?;
        let mut word = vec![0; length + 2];
        stream.read_exact(&mut word).await.ok()?;
        word.truncate(length);
        words.push(String::from_utf8(word).unwrap());
    }
    Some(words)
}

/// All that a worker asks for.
async fn ask_everything(store: &Store) {
    let (result, job, own, started_ms) = ("k", "s:7", "w1/i", 1);
    let event = [("to", "ready".to_owned())];
    drop(
        store
            .beat(&Beat {
                worker_id: "w1",
                incarnation: "incarnation",
                record: "{}",
                ttl: Duration::from_secs(5),
                events: &[event.to_vec()],
                leaving: false,
                dead: None,
            })
            .await,
    );
    let claim = Claim {
        result,
        job,
        own,
        started_ms,
        anyway: false,
        limit: Duration::from_secs(5),
    };
    let release = Release {
        job,
        own,
        started_ms,
        counted: true,
    };
    let keep = Keep {
        key: result,
        text: "{}",
        ttl: Duration::from_secs(5),
    };
    store.claim(&claim).await;
    store.release(&release, Some(&keep)).await;
    store.release(&release, None).await;
    store.count_deaths(job, &["w2/j".to_owned()]).await;
    store.hold_swap("w1", Duration::from_secs(5)).await;
    store.let_go_of_swap("w1").await;
    let others = ["w2/j".to_owned(), "w3/k".to_owned()];
    store.last_seqs(&others).await;
    store.live_workers().await;
    store.consuming_workers().await;
    store.idle_workers().await;
}

/// All that an observer or an operator asks for, but for what is looked for on every server.
async fn observe_everything(fleet: &FleetStore) {
    let ttl = Duration::from_secs(5);
    drop(fleet.live_records(Some(MODEL), ttl).await);
    drop(fleet.events(MODEL, None).await);
    drop(fleet.events(MODEL, Some("1-1")).await);
    drop(fleet.stored_result(MODEL, "k").await);
    drop(fleet.crash_marks(MODEL, "s:7").await);
}

/// The keys of a command.
fn keys(command: &Command) -> &[String] {
    match command[0].as_str() {
        name if KEYLESS.contains(&name) => &[],
        "EVALSHA" => &command[3..3 + command[2].parse::<usize>().unwrap()],
        "MGET" => &command[1..],
        _ => &command[1..2],
    }
}

fn scripts_of_the_store() -> BTreeSet<String> {
    let scripts = Scripts::new();
    let scripts = [
        &scripts.beat,
        &scripts.claim,
        &scripts.release,
        &scripts.count,
        &scripts.hold,
        &scripts.let_go,
    ];
    scripts.map(|script| script.get_hash().to_owned()).into()
}

#[tokio::test]
async fn the_keys_of_every_command_lie_in_the_models_slot() {
    let (config, mut commands) = server().await;
    let store = Store::new(&config, MODEL).unwrap();
    store.connect().await;
    let own: Slot = Keys::new(&config.namespace, MODEL).slot();
    assert_eq!(own, slot(&format!("{{{MODEL}}}")));
    let known = scripts_of_the_store();
    let (mut names, mut called) = (BTreeSet::new(), BTreeSet::new());
    let began = Instant::now();
    // On a slow machine a call may come too late, and the next ones are then left out.
    while called != known {
        assert!(
            began.elapsed() < SOON,
            "not called: {known:?} but {called:?}"
        );
        ask_everything(&store).await;
        observe_everything(&FleetStore::new(&config)).await;
        while let Ok(command) = commands.try_recv() {
            for key in keys(&command) {
                assert_eq!(slot(key), own, "{command:?}");
            }
            if command[0] == "EVALSHA" {
                called.insert(command[1].clone());
            }
            names.insert(command[0].clone());
        }
    }
    for name in [
        "MGET",
        "ZCARD",
        "ZRANDMEMBER",
        "XRANGE",
        "XREVRANGE",
        "GET",
        "HGETALL",
        "TIME",
    ] {
        assert!(names.contains(name), "{name} was not sent: {names:?}");
    }
}
