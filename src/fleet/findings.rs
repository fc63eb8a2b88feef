//! What is wrong with a fleet, at a glance.
