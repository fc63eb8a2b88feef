//! The schemas of all messages, by name.

use schemars::Schema;

use crate::model::manifest::Manifest;
use crate::protocol::control::{ControlAnswer, ControlMessage};
use crate::protocol::heartbeat::Record;
use crate::protocol::message::JobMessage;
use crate::protocol::result::ResultMessage;
use crate::protocol::schema::of;
use crate::protocol::update_manifest::UpdateManifest;

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
