//! `scorer devices`: what each provider sees on this machine, and how to name it.

use serde_json::json;

use super::{Fault, Outcome, answer, answer_json, plain};
use crate::config::Config;
use crate::engine::session::{Seen, Sight, devices};

pub(super) async fn show(config: Config, json: bool) -> Outcome {
    let looking = tokio::task::spawn_blocking(move || devices(&config.engine));
    let found = looking.await.map_err(Fault::internal)?;
    match json {
        true => answer_json(&json!({ "providers": found })),
        false => answer(&text(&found)),
    }
}

fn text(found: &[Sight]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["PROVIDER", "DEVICE", "MEMORY", "DRIVER", "SETTINGS"]);
    for sight in found {
        table.add_rows(sight.devices.iter().map(|seen| row(sight.provider, seen)));
    }
    let missing = found.iter().filter_map(|sight| {
        let why = sight.missing.as_ref()?;
        Some(format!(
            "\n\n{} cannot be used: {}",
            sight.provider,
            plain(why)
        ))
    });
    table.to_string() + &missing.collect::<String>()
}

#[expect(clippy::cast_precision_loss, reason = "a size for people")]
fn row(provider: &str, seen: &Seen) -> [String; 5] {
    let gibibytes = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let settings = seen.settings.iter().map(String::as_str);
    let settings = settings.chain(seen.environment.iter().copied());
    let software = if seen.software { ", software" } else { "" };
    [
        provider.to_owned(),
        plain(&seen.name) + software,
        seen.memory_bytes.map_or("-".into(), gibibytes),
        seen.driver.as_deref().map_or("-".into(), plain),
        settings.collect::<Vec<_>>().join("\n"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_is_listed_with_its_settings_and_what_is_missing_below() {
        let seen = Seen {
            name: "llvmpipe\u{7}".into(),
            memory_bytes: Some(3 << 29),
            driver: None,
            software: true,
            settings: vec!["engine.execution_provider=webgpu".into()],
            environment: Vec::new(),
        };
        let sight = |provider, missing: Option<&str>, devices| Sight {
            provider,
            execution_provider: "",
            missing: missing.map(str::to_owned),
            devices,
        };
        let text = text(&[
            sight("cuda", Some("no driver"), Vec::new()),
            sight("webgpu", None, vec![seen]),
        ]);
        for part in [
            "llvmpipe\\u{7}, software",
            "1.5 GiB",
            "engine.execution_provider=webgpu",
            "\n\ncuda cannot be used: no driver",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
