//! The record of a worker as it is when the story starts.

use rand::Rng;
use rand::rngs::StdRng;

use super::MODEL;
use super::part::{PER_HOST, Part};
use super::script::{NEW, OLD, trouble};
use super::verdicts::{LOSS, digest};
use crate::protocol::heartbeat::{
    BrokerFacts, Build, EngineFacts, HostFacts, JobFacts, LastError, MemoryFacts, ModelFacts,
    PlacementFacts, ProgressFacts, Record, RefusedVersion, StoreFacts, UpdateFacts, WarmFacts,
};
use crate::protocol::state::{Detail, State};

/// A GPU: its name, the one host of so many that has it, and how long it takes for what others do in 1.
const GPUS: [(&str, usize, f64); 2] = [("NVIDIA A100-SXM4-80GB", 5, 1.6), ("NVIDIA H200", 1, 1.0)];
/// The same for software.
const SOFTWARE: (&str, f64) = ("llvmpipe (LLVM 19.1.7, 256 bits)", 6.0);
const GIB: u64 = 1 << 30;

/// The GPU of a place, and its pace.
pub(super) fn gpu(place: usize, part: Part) -> (&'static str, f64) {
    let host = place / PER_HOST + 1;
    let has = |(_, of, _): &&(&str, usize, f64)| host.is_multiple_of(*of);
    match GPUS.iter().find(has) {
        Some((name, _, pace)) if part != Part::Software => (*name, *pace),
        Some(_) | None => SOFTWARE,
    }
}

/// The record of the worker at a place that plays a part.
pub(super) fn record(place: usize, part: Part, start_ms: u64, random: &mut StdRng) -> Record {
    let host = format!("gpu-{:03}", place / PER_HOST + 1);
    let device = place % PER_HOST;
    let provider = if part == Part::Software {
        "webgpu"
    } else {
        "cuda"
    };
    let started_at_ms = if part == Part::Warming {
        start_ms - 14_000
    } else {
        start_ms - 1000 * random.random_range(90_000..180_000)
    };
    Record {
        worker_id: format!("{host}-{provider}{device}"),
        incarnation: incarnation(random),
        seq: start_ms.saturating_sub(started_at_ms) / 1000,
        started_at_ms,
        pid: random.random_range(300..60_000),
        pid_space: Some(digest(&host).split_off(48)),
        host,
        build: Build {
            version: env!("CARGO_PKG_VERSION").into(),
            git: None,
        },
        warm: warm(part, start_ms, random),
        engine: engine(gpu(place, part).0, device, part),
        host_info: host_info(gpu(place, part).0, part),
        broker: BrokerFacts {
            connected: true,
            generation: random.random_range(1..4),
            blocked: part == Part::Blocked,
            ..BrokerFacts::default()
        },
        store: store(part),
        memory: MemoryFacts {
            rss_bytes: random.random_range(3 * GIB..5 * GIB),
        },
        update: Some(update(part, start_ms)),
        ..Record::default()
    }
}

/// As a version 4 UUID is written.
pub(super) fn incarnation(random: &mut StdRng) -> String {
    uuid::Builder::from_random_bytes(random.random())
        .into_uuid()
        .to_string()
}

fn warm(part: Part, start_ms: u64, random: &mut StdRng) -> WarmFacts {
    let inert = [
        "blocks.7.attention.query.lora_A.weight",
        "blocks.7.attention.value.lora_A.weight",
    ];
    let inert = inert.iter().filter(|_| part == Part::Inert);
    let inert: Vec<String> = inert.map(|name| (*name).to_owned()).collect();
    WarmFacts {
        attempt: random.random_range(1..4),
        last_at_ms: Some(start_ms - 1000 * random.random_range(60..30_000)),
        last_ms: Some(random.random_range(5_200..8_900)),
        baseline_loss: Some(LOSS),
        next_retry_at_ms: None,
        inert_count: inert.len() as u64,
        inert,
    }
}

fn engine(gpu: &str, device: usize, part: Part) -> EngineFacts {
    let software_device = part == Part::Software;
    let (provider, device) = match software_device {
        true => ("WebGpuExecutionProvider", format!("webgpu:{device}")),
        false => ("CUDAExecutionProvider", format!("cuda:{device}")),
    };
    EngineFacts {
        execution_provider: provider.into(),
        device,
        precision: Some("f32".into()),
        onnxruntime: Some("1.31.1".into()),
        software_device,
        micro_batch: Some(8),
        placement: Some(PlacementFacts {
            device: 1_412,
            host: 23,
        }),
        parts: Some(1),
        class: Some(digest(gpu)),
    }
}

fn host_info(gpu: &str, part: Part) -> HostFacts {
    HostFacts {
        cpu_model: "INTEL(R) XEON(R) PLATINUM 8558".into(),
        cores: 192,
        ram_bytes: 2_048 * GIB,
        gpu_model: (part != Part::Software).then(|| gpu.to_owned()),
        gpu_memory_bytes: None,
        os: "Linux".into(),
        arch: "x86_64".into(),
    }
}

fn store(part: Part) -> StoreFacts {
    let why = "results are not stored: OOM command not allowed when used memory > 'maxmemory'.";
    StoreFacts {
        ok: part != Part::Storeless,
        last_error: (part == Part::Storeless).then(|| why.to_owned()),
    }
}

fn update(part: Part, start_ms: u64) -> UpdateFacts {
    UpdateFacts {
        live_version: Some(NEW),
        looked_at_ms: Some(start_ms),
        refused: (part == Part::Canary).then(|| RefusedVersion {
            version: NEW,
            why: trouble(Detail::CanaryMismatch).unwrap_or_default().into(),
            at_ms: start_ms.saturating_sub(35 * 60_000),
        }),
        ..UpdateFacts::default()
    }
}

/// The model in one version.
pub(super) fn model(version: Option<u64>) -> ModelFacts {
    let shards = (0..4).collect();
    ModelFacts {
        name: MODEL.into(),
        version,
        weights_id: version.map(|version| digest(&format!("{MODEL} {version}"))),
        plan: version.map(|_| digest(MODEL)),
        shards: version.map_or_else(Vec::new, |_| shards),
        baseline_cache_entries: version.map_or(0, |_| 3),
    }
}

/// The version of a worker whose turn comes or came at this time.
pub(super) fn version(part: Part, swap_ms: u64, start_ms: u64) -> u64 {
    let stayed = matches!(part, Part::Canary | Part::Paused);
    if stayed || swap_ms > start_ms {
        OLD
    } else {
        NEW
    }
}

/// What a worker has done since it began, at so many jobs a second.
pub(super) fn jobs(record: &Record, until_ms: u64, per_s: f64, random: &mut StdRng) -> JobFacts {
    let worked_s = until_ms.saturating_sub(record.started_at_ms) as f64 / 1000.0;
    let done = worked_s * per_s * random.random_range(0.7..0.8);
    JobFacts {
        scored: (done * 0.95) as u64,
        rejected: (done * 0.03) as u64,
        failed: (done * 0.008) as u64,
        duplicates: (done * 0.002) as u64,
        redelivered: (done * 0.001) as u64,
        last_scored_at_ms: (done >= 1.0).then_some(until_ms),
        ..JobFacts::default()
    }
}

/// The progress of a worker that has computed until then.
pub(super) fn progress(jobs: &JobFacts, until_ms: u64) -> ProgressFacts {
    ProgressFacts {
        counter: jobs.answered() * 8,
        at_ms: until_ms,
        busy_ms: 0,
    }
}

/// The error of a state.
pub(super) fn last_error(state: State, detail: Detail, at_ms: u64) -> Option<LastError> {
    let text = trouble(detail).filter(|_| state == State::Degraded)?;
    Some(LastError {
        code: detail.to_string(),
        message: text.to_owned(),
        at_ms,
    })
}
