//! Where records go. A new kind of sink is a file here, a variant and an arm.

pub mod ndjson;
pub mod report;

pub use ndjson::{Ndjson, SinkEnd, SinkError};
