//! Automation (to come).
fn main() {}
