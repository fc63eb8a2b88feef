//! The memory in which the parts of a graph compute. They run one after the other, so they share it; with a
//! pool for each of them, a session of many parts would hold many times what it needs.

use std::ffi::CString;
use std::sync::{Mutex, PoisonError};

use ort::AsPointer;
use ort::environment::Environment;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::sys;

/// Memory that has a pool for all sessions of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pool {
    /// ONNX Runtime's name of the provider that allocates it.
    pub(super) provider: &'static str,
    pub(super) device: AllocationDevice<'static>,
    pub(super) device_id: i32,
    /// The most bytes it takes; 0 = as many as there are.
    pub(super) limit: usize,
}

/// Makes the pool for all sessions that want to share it, once in a process.
pub(super) fn share(environment: &Environment, pool: &Pool) -> ort::Result<()> {
    static SHARED: Mutex<Vec<Pool>> = Mutex::new(Vec::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let same = |known: &Pool| (&known.device, known.device_id) == (&pool.device, pool.device_id);
    if !shared.iter().any(same) {
        register(environment, pool)?;
        shared.push(pool.clone());
    }
    Ok(())
}

fn register(environment: &Environment, pool: &Pool) -> ort::Result<()> {
    const AS_MUCH_AS_NEEDED: i32 = 1;
    const USUAL: i32 = -1;
    let (device, kind) = (pool.device.clone(), MemoryType::Default);
    let memory = MemoryInfo::new(device, pool.device_id, AllocatorType::Arena, kind)?;
    let text = |text: String| CString::new(text).map_err(ort::Error::wrap);
    let provider = text(pool.provider.into())?;
    let options = [(text("device_id".into())?, text(pool.device_id.to_string())?)];
    let [keys, values] = [
        options.each_ref().map(|(key, _)| key.as_ptr()),
        options.each_ref().map(|(_, value)| value.as_ptr()),
    ];
    // The host has no numbers.
    let count = match pool.device == AllocationDevice::CPU {
        true => 0,
        false => options.len(),
    };
    let api = ort::api();
    let mut limits: *mut sys::OrtArenaCfg = std::ptr::null_mut();
    #[expect(unsafe_code, reason = "ort has no safe interface to this")]
    // SAFETY: the environment lives as long as the process. All else is made here, used by one call, which copies
    // it, and released once.
    unsafe {
        let made =
            (api.CreateArenaCfg)(pool.limit, AS_MUCH_AS_NEEDED, USUAL, USUAL, &raw mut limits);
        ort::Error::result_from_status(made)?;
        let registered = (api.CreateAndRegisterAllocatorV2)(
            environment.ptr().cast_mut(),
            provider.as_ptr(),
            memory.ptr(),
            limits,
            keys.as_ptr(),
            values.as_ptr(),
            count,
        );
        (api.ReleaseArenaCfg)(limits);
        ort::Error::result_from_status(registered)
    }
}
