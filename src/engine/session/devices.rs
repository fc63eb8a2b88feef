//! What each provider could run on here, and how to name it in the configuration.

use std::path::Path;

use serde::Serialize;

use super::library::{beside_runtime, environment, register_webgpu};
use super::provider::ROWS;
use super::vulkan;
use crate::config::{EngineConfig, Provider};

/// A provider, and what it sees of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sight {
    /// The word of the configuration.
    pub provider: &'static str,
    /// ONNX Runtime's name.
    pub execution_provider: &'static str,
    /// Why a worker cannot use it here and what to install; none if it can.
    pub missing: Option<String>,
    /// What it sees, even if something else is missing.
    pub devices: Vec<Seen>,
}

/// A device that a provider sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// As its driver calls it.
    pub name: String,
    /// Bytes of memory, where that is known.
    pub memory_bytes: Option<u64>,
    /// The driver and its version, where that is known.
    pub driver: Option<String>,
    /// Whether the CPU computes in its place.
    pub software: bool,
    /// The keys of the configuration to set.
    pub settings: Vec<String>,
    /// The environment that those settings hold in, beside the usual one.
    pub environment: Vec<&'static str>,
}

/// What all providers see, the configuration's default first.
pub fn devices(config: &EngineConfig) -> Vec<Sight> {
    let rows = ROWS.iter().map(|row| {
        let (devices, usable) = (row.look)(config);
        let missing = usable
            .err()
            .map(|why| format!("{why}. It needs {}", row.needs));
        Sight {
            provider: row.provider.as_str(),
            execution_provider: row.name(),
            missing,
            devices,
        }
    });
    rows.collect()
}

/// What is there, and whether the provider can use it.
pub(super) type Look = (Vec<Seen>, Result<(), String>);

fn settings(provider: Provider, more: Option<String>) -> Vec<String> {
    let word = format!("engine.execution_provider={}", provider.as_str());
    std::iter::once(word).chain(more).collect()
}

pub(super) fn look_cpu(config: &EngineConfig) -> Look {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
    let model = system.cpus().first().map(|cpu| cpu.brand().to_owned());
    let seen = Seen {
        name: model.unwrap_or_default(),
        memory_bytes: Some(system.total_memory()),
        driver: None,
        software: false,
        settings: settings(Provider::Cpu, None),
        environment: Vec::new(),
    };
    let usable = environment(config).map(drop);
    (vec![seen], usable.map_err(|e| e.to_string()))
}

pub(super) fn look_cuda(config: &EngineConfig) -> Look {
    let seen = nvidia(Path::new("/"));
    let library = "libonnxruntime_providers_cuda.so";
    let usable = beside_runtime(config, library).and_then(|found| match (found, seen.len()) {
        (false, _) => Err(format!("{library} is not beside ONNX Runtime")),
        (true, 0) => Err("the NVIDIA driver shows no GPU".into()),
        (true, _) => Ok(()),
    });
    (seen, usable)
}

/// The GPUs that the NVIDIA driver shows below `root`, in the order of their PCI addresses: so CUDA counts
/// them if it is told to.
fn nvidia(root: &Path) -> Vec<Seen> {
    let cards = std::fs::read_dir(root.join("proc/driver/nvidia/gpus"));
    let cards = cards.into_iter().flatten().flatten();
    let mut cards: Vec<_> = cards.map(|card| card.path().join("information")).collect();
    cards.sort();
    let version = std::fs::read_to_string(root.join("sys/module/nvidia/version"));
    let driver = version
        .ok()
        .map(|version| format!("NVIDIA {}", version.trim()));
    let several = (cards.len() > 1).then_some("CUDA_DEVICE_ORDER=PCI_BUS_ID");
    let seen = cards.iter().enumerate().map(|(id, card)| {
        let facts = std::fs::read_to_string(card).unwrap_or_default();
        let model = facts.lines().find_map(|line| line.strip_prefix("Model:"));
        Seen {
            name: model.map_or("NVIDIA GPU", str::trim).to_owned(),
            memory_bytes: None,
            driver: driver.clone(),
            software: false,
            settings: settings(Provider::Cuda, Some(format!("engine.device_id={id}"))),
            environment: several.into_iter().collect(),
        }
    });
    seen.collect()
}

pub(super) fn look_webgpu(config: &EngineConfig) -> Look {
    let found = vulkan::gpus();
    let usable = vulkan::check(&found).and_then(|()| register_webgpu(config));
    let seen = found.into_iter().flatten().map(|gpu| Seen {
        name: gpu.name,
        memory_bytes: Some(gpu.memory),
        driver: Some(gpu.driver),
        software: gpu.software,
        settings: settings(Provider::WebGpu, None),
        environment: Vec::new(),
    });
    (seen.collect(), usable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nvidia_gpus_are_numbered_by_their_pci_addresses() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(nvidia(root.path()), []);
        let card = |address: &str| format!("proc/driver/nvidia/gpus/{address}/information");
        write(&card("0000:41:00.0"), "Model: \t\t NVIDIA B\nIRQ: 1\n");
        let one = nvidia(root.path());
        assert_eq!(
            one[0].settings,
            ["engine.execution_provider=cuda", "engine.device_id=0"]
        );
        assert_eq!(one[0].driver, None);
        write(&card("0000:01:00.0"), "Model: \t\t NVIDIA A\n");
        write("sys/module/nvidia/version", "580.95.05\n");
        let two = nvidia(root.path());
        let names: Vec<_> = two.iter().map(|gpu| gpu.name.as_str()).collect();
        assert_eq!(names, ["NVIDIA A", "NVIDIA B"]);
        assert_eq!(two[1].settings[1..], ["engine.device_id=1"]);
        assert_eq!(two[1].environment, ["CUDA_DEVICE_ORDER=PCI_BUS_ID"]);
        assert_eq!(two[1].driver.as_deref(), Some("NVIDIA 580.95.05"));
    }
}
