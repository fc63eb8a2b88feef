//! Control messages: what an operator may ask of a worker. None of them names a URL or a path.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::job::Encoding;
use crate::job::document::from_document;
use crate::job::message::V1;

/// What is asked.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Take no jobs until `resume`.
    Pause,
    /// Take jobs again.
    Resume,
    /// Finish what runs, then exit.
    Drain,
    /// Look for new weights now.
    Update,
    /// Read the package directory again.
    Reload,
    /// Prove the session again.
    Rewarm,
}

impl Command {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Drain => "drain",
            Self::Update => "update",
            Self::Reload => "reload",
            Self::Rewarm => "rewarm",
        }
    }
}

/// A control message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "control.v1")]
pub struct ControlMessage {
    /// Always 1.
    pub v: V1,
    /// What is asked.
    pub command: Command,
    /// Of whom; default everyone who gets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_id: Option<String>,
}

/// Decodes a control message.
///
/// # Errors
/// A sentence that names the field.
pub fn decode(body: &[u8], encoding: Encoding) -> Result<ControlMessage, String> {
    from_document(&encoding.decode(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_names_a_place_is_refused() {
        assert!(
            decode(
                br#"{"v":1,"command":"reload","url":"http://evil"}"#,
                Encoding::Json
            )
            .is_err()
        );
        assert!(decode(br#"{"v":1,"command":"explode"}"#, Encoding::Json).is_err());
        let message = decode(br#"{"v":1,"command":"rewarm"}"#, Encoding::Json).unwrap();
        assert_eq!(message.command, Command::Rewarm);
    }
}
