//! The areas beside scheduling, each with its types in a file of its own.

mod block;
mod net;
mod process;

pub use block::*;
pub use net::*;
pub use process::*;
