//! The memory in which the parts of a graph compute. They run one after the other, so they share it; with a
//! pool for each of them, a session of many parts would hold many times what it needs.

use std::sync::OnceLock;

use ort::AsPointer;
use ort::environment::Environment;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::sys;

/// Makes the pool of host memory for all sessions that want to share it, once in a process.
pub(super) fn share(environment: &Environment) -> ort::Result<()> {
    static SHARED: OnceLock<ort::Result<()>> = OnceLock::new();
    match SHARED.get_or_init(|| register(environment)) {
        Ok(()) => Ok(()),
        Err(error) => Err(ort::Error::new(error.to_string())),
    }
}

fn register(environment: &Environment) -> ort::Result<()> {
    const NO_LIMIT: usize = 0;
    const AS_MUCH_AS_NEEDED: i32 = 1;
    const USUAL: i32 = -1;
    let (device, kind) = (AllocationDevice::CPU, MemoryType::Default);
    let memory = MemoryInfo::new(device, 0, AllocatorType::Arena, kind)?;
    let api = ort::api();
    let mut limits: *mut sys::OrtArenaCfg = std::ptr::null_mut();
    #[expect(unsafe_code, reason = "ort has no safe interface to this")]
    // SAFETY: the environment lives as long as the process. The limits are made here, used by one call, which
    // copies them, and released once.
    unsafe {
        let made = (api.CreateArenaCfg)(NO_LIMIT, AS_MUCH_AS_NEEDED, USUAL, USUAL, &raw mut limits);
        ort::Error::result_from_status(made)?;
        let registered =
            (api.CreateAndRegisterAllocator)(environment.ptr().cast_mut(), memory.ptr(), limits);
        (api.ReleaseArenaCfg)(limits);
        ort::Error::result_from_status(registered)
    }
}
