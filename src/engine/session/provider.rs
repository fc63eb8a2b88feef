//! What each execution provider needs, one row each. Nothing else in the engine asks which provider it is.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ort::ep;
use ort::memory::AllocationDevice;
use ort::session::builder::SessionBuilder;

use super::SessionError;
use super::arena::Pool;
use super::devices::{Look, look_cpu, look_cuda, look_webgpu};
use super::library::{environment, load_cuda, register_webgpu};
use super::vulkan;
use crate::config::{EngineConfig, Provider};
use crate::model::onnx::{Graph, Rewrite, WeightSpec};
use crate::model::tensor::Dtype;
use crate::util::hardware;

/// Puts a provider into a session; an error if it cannot be used here.
pub(super) type Register =
    fn(&EngineConfig, SessionBuilder) -> Result<SessionBuilder, SessionError>;

/// A provider as the engine sees it.
pub(super) struct Row {
    /// Which one it is.
    pub(super) provider: Provider,
    /// How a session gets it.
    pub(super) register: Register,
    /// What is wrong with the device, once a session has it.
    pub(super) check_chosen: fn() -> Result<(), String>,
    /// The memory of its device; none if the weights stay in the host's.
    pub(super) storage: Option<Storage>,
    /// The pool of memory that sessions may share; none if they do without being asked.
    pub(super) pool: fn(&EngineConfig) -> Option<Pool>,
    /// Held by the session that does anything, if the provider bears only one at a time in a process.
    turn: Option<&'static Mutex<()>>,
    /// Whether this element type has no kernels there.
    pub(super) lacks: fn(Dtype) -> bool,
    /// What is rewritten in a graph, because there are no kernels for it.
    pub(super) rewrites: &'static [Rewrite],
    /// The most bytes that one tensor may have, if there is a limit.
    pub(super) largest_tensor: fn() -> Option<u64>,
    /// The hardware that the bits of a result may depend on.
    hardware: fn(&EngineConfig) -> Hardware,
    /// What it sees on this machine.
    pub(super) look: fn(&EngineConfig) -> Look,
    /// What its errors say.
    pub(super) texts: Texts,
    /// What to install when it is missing.
    pub(super) needs: &'static str,
}

/// A device, as its driver tells it; what is unknown is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hardware {
    /// Its model.
    pub model: String,
    /// The driver and its version.
    pub driver: String,
    /// Whether it is software in place of a GPU.
    pub is_software: bool,
}

/// Where the weights live on a device, and the host memory that they are written from.
pub(super) struct Storage {
    pub(super) memory: AllocationDevice<'static>,
    pub(super) staging: AllocationDevice<'static>,
}

/// Parts of messages: ONNX Runtime has no error codes for these.
pub(super) struct Texts {
    pub(super) out_of_memory: &'static [&'static str],
    /// The device is gone, and everything in its memory.
    pub(super) lost: &'static [&'static str],
    /// There is no device to begin with.
    pub(super) missing: &'static [&'static str],
}

static CPU: Row = Row {
    provider: Provider::Cpu,
    register: |_, builder| Ok(builder),
    check_chosen: || Ok(()),
    storage: None,
    pool: |_| {
        Some(Pool {
            provider: "CPUExecutionProvider",
            device: AllocationDevice::CPU,
            device_id: 0,
            limit: 0,
        })
    },
    turn: None,
    lacks: |_| false,
    rewrites: &[],
    largest_tensor: || None,
    hardware: |_| Hardware {
        model: hardware::cpu_model(),
        ..Hardware::default()
    },
    look: look_cpu,
    texts: Texts {
        out_of_memory: &["Failed to allocate memory", "bad_alloc"],
        lost: &[],
        missing: &[],
    },
    needs: "nothing but ONNX Runtime",
};

static CUDA: Row = Row {
    provider: Provider::Cuda,
    register: register_cuda,
    check_chosen: || Ok(()),
    storage: Some(Storage {
        memory: AllocationDevice::CUDA,
        staging: AllocationDevice::CUDA_PINNED,
    }),
    pool: |config| {
        let limit = config.gpu_memory_limit.unwrap_or_default();
        Some(Pool {
            provider: "CUDAExecutionProvider",
            device: AllocationDevice::CUDA,
            device_id: config.device_id,
            limit: usize::try_from(limit).unwrap_or(0),
        })
    },
    turn: None,
    lacks: |_| false,
    rewrites: &[Rewrite::Sequence],
    largest_tensor: || None,
    hardware: cuda_hardware,
    look: look_cuda,
    texts: Texts {
        out_of_memory: &["out of memory", "CUDA_ERROR_OUT_OF_MEMORY"],
        // After these the process can use the GPU no more.
        lost: &["CUDA failure 700", "CUDA failure 719"],
        missing: &[],
    },
    needs: "an NVIDIA driver, the GPU build of ONNX Runtime (PyPI onnxruntime-gpu) and its CUDA 13 and cuDNN 9 \
            libraries, in NVIDIA's Python packages or on LD_LIBRARY_PATH",
};

/// The sessions of a process share one device, and its memory is managed without a lock: two at once end the
/// process.
static WEBGPU_TURN: Mutex<()> = Mutex::new(());

static WEBGPU: Row = Row {
    provider: Provider::WebGpu,
    register: register_first_gpu,
    check_chosen: vulkan::check_chosen,
    storage: Some(Storage {
        memory: AllocationDevice::WEBGPU_BUFFER,
        // The device has no memory that the host can reach.
        staging: AllocationDevice::CPU,
    }),
    pool: |_| None,
    turn: Some(&WEBGPU_TURN),
    lacks: |dtype| dtype == Dtype::Bf16,
    rewrites: &Rewrite::ALL,
    largest_tensor: || Some(vulkan::largest_buffer()),
    hardware: |_| vulkan::hardware(),
    look: look_webgpu,
    texts: Texts {
        // An allocation without memory succeeds; what uses it fails.
        out_of_memory: &[
            "[Invalid Buffer",
            "narrowing_error",
            "MapAsyncStatus value: 3",
        ],
        lost: &[
            "device lost",
            "Device lost",
            "[Device] is lost",
            "MapAsyncStatus value: ",
        ],
        missing: &["Failed to get a WebGPU", "Failed to create wgpu::Instance"],
    },
    needs: "the WebGPU plugin (PyPI onnxruntime-ep-webgpu), libvulkan1 and the GPU's Vulkan driver (for AMD and Intel \
            mesa-vulkan-drivers)",
};

pub(super) const ROWS: [&Row; 3] = [&CUDA, &WEBGPU, &CPU];

pub(super) fn row(provider: Provider) -> &'static Row {
    match provider {
        Provider::Cpu => &CPU,
        Provider::Cuda => &CUDA,
        Provider::WebGpu => &WEBGPU,
    }
}

/// What is rewritten in a graph for the configured provider.
pub fn rewrites(config: &EngineConfig) -> &'static [Rewrite] {
    row(config.execution_provider).rewrites
}

/// Which card a number of CUDA's means depends on its environment, so with cards of several models the number
/// stands beside all of them.
fn cuda_hardware(config: &EngineConfig) -> Hardware {
    let mut models = hardware::nvidia_models();
    models.dedup();
    let model = match models.as_slice() {
        [one] => one.clone(),
        several => format!("{} of {}", config.device_id, several.join(", ")),
    };
    Hardware {
        model,
        driver: hardware::nvidia_driver().unwrap_or_default(),
        is_software: false,
    }
}

/// The hardware of the configured device.
pub fn hardware(config: &EngineConfig) -> Hardware {
    (row(config.execution_provider).hardware)(config)
}

/// What an error of any provider means, if its text is known.
pub(super) fn classify(text: &str) -> Option<fn(String) -> SessionError> {
    let one = |texts: fn(&Texts) -> &'static [&'static str]| {
        let mut known = ROWS.iter().flat_map(|row| texts(&row.texts));
        known.any(|part| text.contains(part))
    };
    if one(|texts| texts.out_of_memory) {
        Some(SessionError::OutOfMemory)
    } else if one(|texts| texts.lost) {
        Some(SessionError::Lost)
    } else if one(|texts| texts.missing) {
        Some(SessionError::Unavailable)
    } else {
        None
    }
}

impl Row {
    /// Waits until no other session does anything, if the provider needs that.
    pub(super) fn turn(&self) -> Option<MutexGuard<'static, ()>> {
        let turn = self.turn?;
        Some(turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Its name in ONNX Runtime, which also reports by it where a node runs.
    pub(super) fn name(&self) -> &'static str {
        self.provider.execution_provider()
    }

    /// Refuses weights and constants that the device would not hold or compute with, by name.
    pub(super) fn accepts(
        &self,
        weights: &[WeightSpec],
        graph: &Graph,
    ) -> Result<(), SessionError> {
        if let Some(weight) = weights.iter().find(|weight| (self.lacks)(weight.dtype)) {
            let dtype = weight.dtype.as_str();
            return Err(SessionError::NoKernel(format!(
                "{} is {dtype}",
                weight.input
            )));
        }
        let sizes = weights.iter().map(|w| (w.input.as_str(), w.bytes.len()));
        let constants: Vec<_> = graph.initializers();
        let constants = constants.iter().map(|held| {
            let element = held.dtype.map_or(1, Dtype::size);
            (
                held.name.as_str(),
                held.shape.iter().product::<usize>() * element,
            )
        });
        match (self.largest_tensor)() {
            None => Ok(()),
            Some(most) => sizes
                .chain(constants)
                .try_for_each(|(name, bytes)| self.fits(name, bytes, most)),
        }
    }

    fn fits(&self, tensor: &str, bytes: usize, most: u64) -> Result<(), SessionError> {
        if bytes as u64 <= most {
            return Ok(());
        }
        Err(SessionError::Unavailable(format!(
            "{tensor} has {bytes} bytes, and {} on this device holds at most {most} in one tensor and silently drops what is \
             beyond; use another device or provider",
            self.name()
        )))
    }

    /// The provider cannot be used, and what to do about it.
    pub(super) fn unavailable(&self, reason: &str) -> SessionError {
        SessionError::Unavailable(format!(
            "{} is not available: {}; to run on the CPU say engine.execution_provider = \"cpu\"",
            self.name(),
            self.needing(reason)
        ))
    }

    /// Why it cannot be used, and what it needs. ONNX Runtime ends its sentences.
    pub(super) fn needing(&self, reason: &str) -> String {
        format!("{}. It needs {}", reason.trim_end_matches('.'), self.needs)
    }
}

fn register_cuda(
    config: &EngineConfig,
    builder: SessionBuilder,
) -> Result<SessionBuilder, SessionError> {
    load_cuda(config).map_err(|reason| CUDA.unavailable(&reason))?;
    let mut cuda = ep::CUDA::default()
        .with_device_id(config.device_id)
        .with_tf32(config.tf32);
    if config.deterministic {
        // The exhaustive search may choose a different algorithm in every process.
        cuda = cuda.with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Default);
    }
    let limit = config.gpu_memory_limit;
    if let Some(limit) = limit.and_then(|bytes| usize::try_from(bytes).ok()) {
        cuda = cuda.with_memory_limit(limit);
    }
    // Without `error_on_failure`, a provider that does not start is left out of the session.
    let added = builder.with_execution_providers([cuda.build().error_on_failure()]);
    added.map_err(|e| CUDA.unavailable(&e.to_string()))
}

fn register_first_gpu(
    config: &EngineConfig,
    builder: SessionBuilder,
) -> Result<SessionBuilder, SessionError> {
    let unusable = |reason: String| WEBGPU.unavailable(&reason);
    vulkan::check(&vulkan::gpus()).map_err(unusable)?;
    register_webgpu(config).map_err(unusable)?;
    let mut devices = environment(config)?.devices();
    // An empty list would make a session on the CPU.
    let found = devices.find(|device| device.ep().is_ok_and(|name| name == WEBGPU.name()));
    let device = found.ok_or_else(|| unusable("the plugin offers no device".into()))?;
    let added = builder.with_devices([device], None);
    added.map_err(|e| unusable(e.to_string()))
}
