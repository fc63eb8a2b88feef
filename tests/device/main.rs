//! The provider `webgpu` on a GPU in software, which `ops/setup device` brings: the device path of the engine, from a weight
//! in device memory to a worker, is executed in every run of the tests. One case of each kind; the CPU has all of them.

#![expect(
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test"
)]

mod cases;
mod patches;
mod placement;
mod worker;

use scorer::config::{Config, Layers};
use scorer::engine::session::{hardware, plugin};
use testkit::worker::Settings;

/// The usual settings for the GPU in software, but for these; fails where there is none.
fn config(set: &[&str]) -> Config {
    let config = config_of(&[&["engine.execution_provider=webgpu"], set].concat());
    let found = plugin(&config.engine).is_some() && hardware(&config.engine).is_software;
    let allowed = std::env::var("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER");
    assert!(
        found && allowed.as_deref() == Ok("1"),
        "there is no GPU in software here: run ops/setup device and evaluate what it prints, as ops/test does"
    );
    config
}

fn config_of(set: &[&str]) -> Config {
    let set: Vec<String> = set.iter().map(|set| (*set).to_owned()).collect();
    let layers = Layers {
        set: &set,
        ..Layers::default()
    };
    Config::load(&layers).unwrap()
}

/// The settings of a process that uses it.
fn on_the_device(settings: Settings) -> Settings {
    config(&[]);
    settings.set("engine.execution_provider", "webgpu")
}
