//! One job, from its delivery to its acknowledgement.

mod admission;
pub mod consumer;
mod consumer_health;
pub mod crash_marks;
mod deadline;
pub mod device_queue;
pub mod disposition;
mod doubt;
pub mod members;
pub mod pipeline;
pub mod recent_results;
pub mod settle;
