//! eBPF.
pub mod layout;
mod mapped;
