//! What each provider could run on here, and how to name it in the configuration.

use serde::Serialize;

use super::library::{beside_runtime, environment, register_webgpu};
use super::provider::ROWS;
use super::vulkan;
use crate::config::{EngineConfig, Provider};
use crate::util::hardware;

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
        let missing = usable.err().map(|why| row.needing(&why.to_string()));
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
    let seen = Seen {
        name: hardware::cpu_model(),
        memory_bytes: Some(system.total_memory()),
        driver: None,
        software: false,
        settings: settings(Provider::Cpu, None),
        environment: Vec::new(),
    };
    let usable = environment(config).map(drop);
    (vec![seen], usable.map_err(|e| e.to_string()))
}

/// CUDA counts the GPUs in the order of their addresses if the environment says so.
pub(super) fn look_cuda(config: &EngineConfig) -> Look {
    let models = hardware::nvidia_models();
    let several = (models.len() > 1).then_some("CUDA_DEVICE_ORDER=PCI_BUS_ID");
    let library = "libonnxruntime_providers_cuda.so";
    let usable = beside_runtime(config, library).and_then(|found| match (found, models.len()) {
        (false, _) => Err(format!("{library} is not beside ONNX Runtime")),
        (true, 0) => Err("the NVIDIA driver shows no GPU".into()),
        (true, _) => Ok(()),
    });
    let seen = models.into_iter().enumerate().map(|(id, name)| Seen {
        name,
        memory_bytes: None,
        driver: hardware::nvidia_driver(),
        software: false,
        settings: settings(Provider::Cuda, Some(format!("engine.device_id={id}"))),
        environment: several.into_iter().collect(),
    });
    (seen.collect(), usable)
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
