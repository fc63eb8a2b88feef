//! The JSON Schemas of every message, generated from the types that decode them.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema};

use crate::control::{ControlAnswer, ControlMessage};
use crate::heartbeat::Record;
use crate::job::message::JobMessage;
use crate::package::Manifest;
use crate::result::ResultMessage;
use crate::update::manifest::UpdateManifest;

/// All schemas by name.
pub const NAMES: [&str; 7] = [
    "score_job.v1",
    "score_result.v1",
    "heartbeat.v1",
    "control.v1",
    "control_answer.v1",
    "model_package.v1",
    "update_manifest.v1",
];

/// The schema of this name, draft 2020-12.
pub fn schema(name: &str) -> Option<Schema> {
    match name.trim_end_matches(".json") {
        "score_job.v1" => Some(of::<JobMessage>()),
        "score_result.v1" => Some(of::<ResultMessage>()),
        "heartbeat.v1" => Some(of::<Record>()),
        "control.v1" => Some(of::<ControlMessage>()),
        "control_answer.v1" => Some(of::<ControlAnswer>()),
        "model_package.v1" => Some(of::<Manifest>()),
        "update_manifest.v1" => Some(of::<UpdateManifest>()),
        _ => None,
    }
}

fn of<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12()
        .into_generator()
        .into_root_schema_for::<T>()
}
