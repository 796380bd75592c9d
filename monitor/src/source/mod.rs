//! Sources.
#[cfg(feature = "ebpf")]
pub mod ebpf;
