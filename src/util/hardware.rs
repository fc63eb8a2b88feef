//! What the system tells of processors and graphics cards.

use std::path::{Path, PathBuf};

/// The model of the first processor; empty if unknown.
pub fn cpu_model() -> String {
    let mut system = sysinfo::System::new();
    system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
    let cpus = system.cpus().first();
    cpus.map(|cpu| cpu.brand().to_owned()).unwrap_or_default()
}

/// Sets of instructions that this processor has, of those by which libraries choose their kernels.
pub fn instructions() -> Vec<&'static str> {
    macro_rules! found {
        ($detected:ident, $($set:tt)*) => {{
            let all = [$(($set, std::arch::$detected!($set))),*];
            all.into_iter().filter_map(|(set, found)| found.then_some(set)).collect()
        }};
    }
    #[cfg(target_arch = "x86_64")]
    return found!(is_x86_feature_detected, "sse4.1" "avx" "avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512dq" "avx512vl"
        "avx512vnni" "avxvnni");
    #[cfg(target_arch = "aarch64")]
    return found!(is_aarch64_feature_detected, "neon" "fp16" "dotprod" "i8mm" "bf16" "sve" "sve2");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return Vec::new();
}

/// The models of NVIDIA's cards, in the order of their PCI addresses.
pub fn nvidia_models() -> Vec<String> {
    nvidia_models_below(Path::new("/proc/driver/nvidia/gpus"))
}

/// The driver has a folder for each card, named after its address.
fn nvidia_models_below(cards: &Path) -> Vec<String> {
    let cards = std::fs::read_dir(cards).into_iter().flatten().flatten();
    let mut cards: Vec<_> = cards.map(|card| card.path()).collect();
    cards.sort();
    let model = |card: &PathBuf| {
        let facts = std::fs::read_to_string(card.join("information")).unwrap_or_default();
        let model = facts.lines().find_map(|line| line.strip_prefix("Model:"));
        model.map_or("NVIDIA GPU", str::trim).to_owned()
    };
    cards.iter().map(model).collect()
}

/// The version of NVIDIA's driver, in its own words.
pub fn nvidia_driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    text.lines().next().map(|line| line.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nvidia_cards_come_in_the_order_of_their_addresses() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(nvidia_models_below(&root.path().join("none")), [""; 0]);
        for (address, facts) in [
            ("0000:41:00.0", "Model: \t\t NVIDIA B\nIRQ: 1\n"),
            ("0000:01:00.0", "Model: \t\t NVIDIA A\n"),
            ("0000:c1:00.0", "IRQ: 3\n"),
        ] {
            let card = root.path().join(address);
            std::fs::create_dir(&card).unwrap();
            std::fs::write(card.join("information"), facts).unwrap();
        }
        let found = nvidia_models_below(root.path());
        assert_eq!(found, ["NVIDIA A", "NVIDIA B", "NVIDIA GPU"]);
    }
}
