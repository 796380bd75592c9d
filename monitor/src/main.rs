//! kvm-monitor.
fn main() {}
