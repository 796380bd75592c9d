//! The areas beside scheduling, each with its types in a file of its own.

mod net;
mod process;

pub use net::*;
pub use process::*;
