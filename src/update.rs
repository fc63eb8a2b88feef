//! How a worker follows its model: what training publishes ([`manifest`]), who vouches for it
//! ([`signature`]), and which way leads from the weights that are served to those that are live
//! ([`route`]).

pub mod build;
pub mod download;
pub mod manifest;
pub mod route;
pub mod signature;
pub mod state;
