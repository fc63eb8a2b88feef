//! What goes over the wire and into Redis: every message, code, name and schema. It does no I/O and
//! knows no driver, so a client can be built from it alone.

mod blob;
mod candidate;
pub mod context;
pub mod control;
pub mod document;
pub mod encoding;
pub mod failure;
pub mod heartbeat;
pub mod job;
pub(crate) mod json;
pub mod label;
mod member;
pub mod merge;
pub mod message;
pub mod names;
pub mod result;
pub mod schema;
pub mod signature;
pub mod state;
pub mod stop;
mod tree;
pub mod update_manifest;
mod version;
mod word;
