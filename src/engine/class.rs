//! The class of an engine. Two engines of one class give the same bits for the same weights, windows and
//! plan; bits of different classes are not compared.

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::session::{self, Hardware};
use crate::config::{EngineConfig, Provider};
use crate::model::package::Package;
use crate::util::hardware::instructions;

/// Everything beside weights and windows that the bits of a loss may depend on.
#[derive(Debug, Serialize)]
struct Class<'a> {
    provider: &'a str,
    device: &'a str,
    driver: &'a str,
    host: Option<Host>,
    version: &'a str,
    git: Option<&'a str>,
    onnxruntime: Option<&'static str>,
    plugin: Option<String>,
    precision: &'a str,
    micro_batch: usize,
    cuts: &'a [usize],
    deterministic: bool,
    tf32: bool,
}

/// Where the host computes. Its kernels depend on the instructions it has, which virtual machines hide behind
/// one name for many processors; and a product of few rows is split among the threads, of which one with a
/// single row adds up in another order than one with several.
#[derive(Debug, Serialize)]
struct Host {
    instructions: Vec<&'static str>,
    threads: usize,
}

/// Hex SHA-256 over the class.
pub(super) fn digest(
    config: &EngineConfig,
    hardware: &Hardware,
    package: &Package,
    micro_batch: usize,
    cuts: &[usize],
) -> String {
    let host = || Host {
        instructions: instructions(),
        threads: session::threads(config),
    };
    let class = Class {
        provider: config.execution_provider.execution_provider(),
        device: &hardware.model,
        driver: &hardware.driver,
        host: (config.execution_provider == Provider::Cpu).then(host),
        version: env!("CARGO_PKG_VERSION"),
        git: option_env!("SCORER_BUILD_GIT"),
        onnxruntime: session::library_build(config),
        plugin: session::plugin(config).map(|plugin| plugin.sha256),
        precision: package.manifest.precision.as_str(),
        micro_batch,
        cuts,
        deterministic: config.deterministic,
        tf32: config.tf32,
    };
    // Text, numbers and booleans always encode.
    let encoded = serde_json::to_vec(&class).unwrap_or_default();
    hex::encode(Sha256::digest(encoded))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{configuration, hazard};
    use super::*;

    #[test]
    fn whatever_bits_may_depend_on_makes_another_class() {
        let (package, _dir) = hazard();
        let hardware = |model: &str, driver: &str| Hardware {
            model: model.into(),
            driver: driver.into(),
            is_software: false,
        };
        let config = configuration().engine;
        let usual = digest(&config, &hardware("card", "1.0"), &package, 8, &[]);
        assert_eq!(usual.len(), 64);
        let mut same = config.clone();
        same.audit_interval = std::time::Duration::from_secs(1);
        // The library that is loaded counts, not what its file is called.
        same.onnxruntime = Some("libonnxruntime.so".into());
        assert_eq!(
            digest(&same, &hardware("card", "1.0"), &package, 8, &[]),
            usual
        );
        let (mut free, mut tf32, mut more) = (config.clone(), config.clone(), config.clone());
        (free.deterministic, tf32.tf32) = (false, true);
        more.threads = session::threads(&config) + 1;
        let others = [
            digest(&config, &hardware("another", "1.0"), &package, 8, &[]),
            digest(&config, &hardware("card", "1.1"), &package, 8, &[]),
            digest(&config, &hardware("card", "1.0"), &package, 7, &[]),
            digest(&free, &hardware("card", "1.0"), &package, 8, &[]),
            digest(&tf32, &hardware("card", "1.0"), &package, 8, &[]),
            digest(&more, &hardware("card", "1.0"), &package, 8, &[]),
        ];
        for (at, other) in others.iter().enumerate() {
            assert_ne!(*other, usual, "{at}");
        }
        // On a GPU the host computes nothing that is rounded.
        for config in [&mut same, &mut more] {
            config.execution_provider = Provider::Cuda;
        }
        let on_gpu = |config| digest(config, &hardware("card", "1.0"), &package, 8, &[]);
        assert_eq!(on_gpu(&same), on_gpu(&more));
    }
}
