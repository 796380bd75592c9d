//! Lab guest init (to come).
fn main() {}
