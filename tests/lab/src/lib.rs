//! Test lab (to come).
