//! The life of a worker: load, prove, serve, drain. [`transition`] decides what each request and
//! interruption leads to, without I/O; [`run`](mod@run) performs it, and a newcomer starts there, at
//! `Worker::live`.

mod assemble;
pub mod health;
pub mod heartbeat;
mod host;
pub mod lifecycle;
mod link;
mod orders;
mod parts;
mod run;
mod serve;
mod swap;
pub mod systemd;
mod transition;
mod warmup;
mod watchdog;

pub use orders::Wish;
pub use parts::Part;
pub use run::run;
pub use transition::Stop;
