//! kvm-monitor.
pub mod inventory;
pub mod source;
pub mod units;
