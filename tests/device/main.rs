//! The provider `webgpu` on a GPU in software, which `ops/setup device` brings: the device path of the engine, from a weight
//! in device memory to a worker, is executed in every run of the tests. One case of each kind; the CPU has all of them.

#![expect(
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test"
)]

mod cases;
mod patches;
mod placement;
#[path = "../cases/table.rs"]
mod table;
mod worker;

use scorer::config::Config;
use scorer::engine::session::{hardware, plugin};
use table::settings;

/// The usual settings for the GPU in software, but for these; fails where there is none.
fn config(set: &[&str]) -> Config {
    let webgpu = ["engine.execution_provider=webgpu"];
    let config = settings(&[&webgpu, set].concat());
    let found = plugin(&config.engine).is_some() && hardware(&config.engine).is_software;
    let allowed = std::env::var("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER");
    assert!(
        found && allowed.as_deref() == Ok("1"),
        "there is no GPU in software here: run ops/setup device and evaluate what it prints, as ops/test does"
    );
    config
}
