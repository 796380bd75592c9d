//! The sources. Each turns one interface of the host into values, or says why it cannot.

#[cfg(feature = "ebpf")]
pub mod ebpf;
#[cfg(not(feature = "ebpf"))]
#[path = "ebpf_absent.rs"]
pub mod ebpf;
pub mod libvirt;
pub mod netdev;
pub mod procfs;
pub mod virtual_function;
