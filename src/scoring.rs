//! One job, from its delivery to its acknowledgement.

pub mod consumer;
mod consumer_health;
pub mod crash_marks;
pub mod device_queue;
pub mod disposition;
mod doubt;
pub mod pipeline;
pub mod recent_results;
mod settle;
