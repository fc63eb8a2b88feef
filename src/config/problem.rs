//! What is wrong with a value, and where the value was given.

use std::path::Path;

use super::layers::ENVIRONMENT_PREFIX;

/// A value that is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    /// The key; for a layer that cannot be read at all, its name.
    pub(super) key: String,
    /// What is wrong, and where the value was given.
    pub(super) text: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.key, self.text)
    }
}

/// Where a value was given.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    Defaults,
    File(&'a Path),
    Environment(&'a str),
    Set,
}

impl Place<'_> {
    /// How the key is written there.
    pub(super) fn spelling(self, key: &str) -> String {
        match self {
            Self::Environment(_) => {
                let name = key.replace('.', "__").to_ascii_uppercase();
                format!("{ENVIRONMENT_PREFIX}{name}")
            }
            Self::Defaults | Self::File(_) | Self::Set => key.to_owned(),
        }
    }
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Defaults => f.write_str("the embedded defaults"),
            Self::File(path) => write!(f, "--config {}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::Set => f.write_str("--set"),
        }
    }
}
