//! What the system tells of processors and graphics cards.

/// The model of the first processor; empty if unknown.
pub fn cpu_model() -> String {
    let mut system = sysinfo::System::new();
    system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
    let cpus = system.cpus().first();
    cpus.map(|cpu| cpu.brand().to_owned()).unwrap_or_default()
}

/// An NVIDIA card's model. The driver lists its cards under `/proc`.
pub fn nvidia_model() -> Option<String> {
    let cards = std::fs::read_dir("/proc/driver/nvidia/gpus").ok()?;
    let mut texts = cards
        .filter_map(|card| std::fs::read_to_string(card.ok()?.path().join("information")).ok());
    let text = texts.next()?;
    text.lines()
        .find_map(|line| line.strip_prefix("Model:"))
        .map(|model| model.trim().to_owned())
}

/// The version of NVIDIA's driver, in its own words.
pub fn nvidia_driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    text.lines().next().map(|line| line.trim().to_owned())
}
