//! The GPUs that Vulkan offers. WebGPU's plugin runs on one of them, but says neither which nor what it can
//! hold, so this asks the same drivers.

use std::ffi::CStr;
use std::sync::OnceLock;

use ash::vk;

use super::Hardware;

/// The environment variable by which tests allow a GPU in software.
const ALLOW_SOFTWARE: &str = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER";

/// The least that WebGPU guarantees of one buffer that a kernel reads.
const LEAST_BUFFER: u64 = 128 << 20;
/// The most that its implementation asks of any driver.
const MOST_BUFFER: u64 = (2 << 30) - 4;

/// A device of a Vulkan driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Gpu {
    /// As the driver calls it.
    pub(super) name: String,
    /// The driver and its version.
    pub(super) driver: String,
    /// Bytes of its own memory; for a GPU that shares the host's, what it may take of that.
    pub(super) memory: u64,
    /// Whether the CPU computes in its place.
    pub(super) software: bool,
    /// The most bytes of a buffer that a kernel can address.
    largest_buffer: u64,
}

/// All of them, asked for once.
///
/// # Errors
/// What is missing, and what to install; it is looked for again then.
pub(super) fn gpus() -> Result<Vec<Gpu>, String> {
    static FOUND: OnceLock<Vec<Gpu>> = OnceLock::new();
    match FOUND.get() {
        Some(found) => Ok(found.clone()),
        None => ask().map(|found| FOUND.get_or_init(|| found).clone()),
    }
}

fn ask() -> Result<Vec<Gpu>, String> {
    let library = |e: ash::LoadingError| {
        format!("the Vulkan library cannot be loaded ({e}): install libvulkan1")
    };
    let driver = |e: vk::Result| {
        format!(
            "Vulkan finds no driver ({e}): install the GPU's, for AMD and Intel mesa-vulkan-drivers"
        )
    };
    #[expect(unsafe_code, reason = "Vulkan has no safe interface")]
    // SAFETY: the library is Vulkan's own loader. The instance is destroyed after the last use of what came
    // from it, and nothing here outlives this function.
    unsafe {
        let entry = ash::Entry::load().map_err(library)?;
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_2);
        let wanted = vk::InstanceCreateInfo::default().application_info(&application);
        let instance = entry.create_instance(&wanted, None).map_err(driver)?;
        let devices = instance.enumerate_physical_devices();
        let found = devices.map(|all| {
            all.into_iter()
                .map(|one| describe(&instance, one))
                .collect()
        });
        instance.destroy_instance(None);
        found.map_err(driver)
    }
}

#[expect(unsafe_code, reason = "Vulkan has no safe interface")]
fn describe(instance: &ash::Instance, device: vk::PhysicalDevice) -> Gpu {
    let mut driver = vk::PhysicalDeviceDriverProperties::default();
    // SAFETY: the device is the instance's, both are alive, and the chained structure outlives the call.
    let (properties, memory) = unsafe {
        let mut all = vk::PhysicalDeviceProperties2::default().push_next(&mut driver);
        instance.get_physical_device_properties2(device, &mut all);
        let memory = instance.get_physical_device_memory_properties(device);
        (all.properties, memory)
    };
    let heaps = memory
        .memory_heaps
        .iter()
        .take(memory.memory_heap_count as usize);
    let own = heaps.filter(|heap| heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL));
    let text = |found: Result<&CStr, _>| {
        let text: Option<&CStr> = found.ok();
        text.map_or_else(String::new, |text| text.to_string_lossy().into_owned())
    };
    let (name, info) = (
        text(driver.driver_name_as_c_str()),
        text(driver.driver_info_as_c_str()),
    );
    Gpu {
        name: text(properties.device_name_as_c_str()),
        driver: format!("{name} {info}").trim().to_owned(),
        memory: own.map(|heap| heap.size).max().unwrap_or_default(),
        software: properties.device_type == vk::PhysicalDeviceType::CPU,
        largest_buffer: properties.limits.max_storage_buffer_range.into(),
    }
}

/// Those that WebGPU may run on: it prefers hardware.
fn candidates(all: &[Gpu]) -> impl Iterator<Item = &Gpu> {
    let software = all.iter().all(|gpu| gpu.software);
    all.iter().filter(move |gpu| gpu.software == software)
}

/// Whether there is a GPU that may be used.
///
/// # Errors
/// What is missing, and what to do.
pub(super) fn check(found: &Result<Vec<Gpu>, String>) -> Result<(), String> {
    judge(found, software_is_allowed())
}

/// Whether what WebGPU chose may be used, once there is a session: it passes over a GPU whose driver is too
/// old for it, and llvmpipe is installed with most others.
pub(super) fn check_chosen() -> Result<(), String> {
    judge_chosen(runs_on_llvmpipe(), software_is_allowed())
}

fn judge_chosen(llvmpipe: bool, allow_software: bool) -> Result<(), String> {
    match llvmpipe && !allow_software {
        true => Err(
            "WebGPU passes over the GPU and takes llvmpipe, which computes on the CPU: update the GPU's Vulkan driver, and \
             let the worker open /dev/dri"
                .into(),
        ),
        false => Ok(()),
    }
}

/// Whether llvmpipe computes: its threads are there when it is in use, and not before.
pub(super) fn runs_on_llvmpipe() -> bool {
    let threads = std::fs::read_dir("/proc/self/task");
    let mut threads = threads.into_iter().flatten().flatten();
    threads.any(|thread| {
        let name = std::fs::read_to_string(thread.path().join("comm"));
        name.is_ok_and(|name| name.starts_with("llvmpipe-"))
    })
}

fn software_is_allowed() -> bool {
    std::env::var_os(ALLOW_SOFTWARE).is_some_and(|value| value == "1")
}

fn judge(found: &Result<Vec<Gpu>, String>, allow_software: bool) -> Result<(), String> {
    let all = found.as_ref().map_err(Clone::clone)?;
    let Some(first) = candidates(all).next() else {
        return Err("Vulkan finds no GPU: install its driver, for AMD and Intel mesa-vulkan-drivers, and let the worker \
                    open /dev/dri"
            .into());
    };
    if first.software && !allow_software {
        return Err(format!(
            "{} is a GPU in software, which computes on the CPU and far more slowly than the provider cpu: install the \
             GPU's own Vulkan driver, and let the worker open /dev/dri",
            first.name
        ));
    }
    Ok(())
}

/// What WebGPU computes on. Among several GPUs it chooses one itself; all of them are named then.
pub(super) fn hardware() -> Hardware {
    let all = gpus().unwrap_or_default();
    let found: Vec<&Gpu> = candidates(&all).collect();
    let all = |of: fn(&Gpu) -> &str| {
        let words = found.iter().map(|gpu| of(gpu));
        words.collect::<Vec<_>>().join(" or ")
    };
    Hardware {
        model: all(|gpu| &gpu.name),
        driver: all(|gpu| &gpu.driver),
        is_software: found.iter().any(|gpu| gpu.software) || runs_on_llvmpipe(),
    }
}

/// The most bytes that a kernel of WebGPU can address in one buffer.
pub(super) fn largest_buffer() -> u64 {
    let found = gpus().unwrap_or_default();
    let least = candidates(&found).map(|gpu| gpu.largest_buffer).min();
    least
        .unwrap_or(LEAST_BUFFER)
        .clamp(LEAST_BUFFER, MOST_BUFFER)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(name: &str, software: bool) -> Gpu {
        Gpu {
            name: name.into(),
            driver: String::new(),
            memory: 0,
            software,
            largest_buffer: 0,
        }
    }

    #[test]
    fn a_gpu_is_preferred_to_one_in_software() {
        let all = [gpu("llvmpipe", true), gpu("radeon", false)];
        let names = |all: &[Gpu]| {
            candidates(all)
                .map(|gpu| gpu.name.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&all), ["radeon"]);
        assert_eq!(names(&all[..1]), ["llvmpipe"]);
    }

    #[test]
    fn what_is_missing_is_told_with_what_to_install() {
        let none = judge(&Ok(Vec::new()), true).unwrap_err();
        assert!(
            none.contains("no GPU") && none.contains("mesa-vulkan-drivers"),
            "{none}"
        );
        let broken = Err("the Vulkan library".to_owned());
        assert_eq!(judge(&broken, true), Err("the Vulkan library".into()));
        let software = Ok(vec![gpu("llvmpipe", true)]);
        let refused = judge(&software, false).unwrap_err();
        assert!(
            refused.starts_with("llvmpipe is a GPU in software"),
            "{refused}"
        );
        assert_eq!(judge(&software, true), Ok(()));
        let hardware = Ok(vec![gpu("llvmpipe", true), gpu("radeon", false)]);
        assert_eq!(judge(&hardware, false), Ok(()));
    }

    #[test]
    fn llvmpipe_is_no_gpu_unless_a_test_allows_it() {
        let refused = judge_chosen(true, false).unwrap_err();
        assert!(refused.contains("takes llvmpipe"), "{refused}");
        assert_eq!(judge_chosen(true, true), Ok(()));
        assert_eq!(judge_chosen(false, false), Ok(()));
    }
}
