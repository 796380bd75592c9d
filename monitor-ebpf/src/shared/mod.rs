//! The areas beside scheduling, each with its types in a file of its own.

mod process;

pub use process::*;
