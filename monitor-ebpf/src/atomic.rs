//! Numbers in maps that several CPUs, or a CPU and user space, change at once.
//!
//! Rust's BPF target has atomic loads and stores only, though the instructions for the rest are there since Linux 5.12;
//! hence the intrinsics. On x86 all of them are locked instructions.

use core::intrinsics::{AtomicOrdering::Relaxed, atomic_cxchg, atomic_xadd, atomic_xchg};

/// A number that is changed by the functions of this module only.
#[derive(Clone, Copy)]
pub(crate) struct Word(*mut u64);

impl Word {
    /// The number behind a reference into a map, whose memory is writable whatever the reference says.
    #[inline(always)]
    pub(crate) fn of(number: &u64) -> Self {
        Self(core::ptr::from_ref(number).cast_mut())
    }

    /// Its value.
    #[inline(always)]
    pub(crate) fn load(self) -> u64 {
        // SAFETY: made from a reference: aligned and readable.
        unsafe { core::ptr::read_volatile(self.0) }
    }

    /// Replaces it.
    #[inline(always)]
    pub(crate) fn store(self, value: u64) {
        // SAFETY: aligned, and in a map.
        unsafe { core::ptr::write_volatile(self.0, value) }
    }

    /// Adds to it.
    #[inline(always)]
    pub(crate) fn add(self, value: u64) {
        // SAFETY: aligned, and in a map.
        unsafe { atomic_xadd::<u64, u64, { Relaxed }>(self.0, value) };
    }

    /// Replaces it and returns what it was.
    #[inline(always)]
    pub(crate) fn swap(self, value: u64) -> u64 {
        // SAFETY: aligned, and in a map.
        unsafe { atomic_xchg::<u64, { Relaxed }>(self.0, value) }
    }

    /// Replaces it if it is `old`; returns what it was.
    #[inline(always)]
    pub(crate) fn exchange(self, old: u64, new: u64) -> u64 {
        // SAFETY: aligned, and in a map.
        unsafe { atomic_cxchg::<u64, { Relaxed }, { Relaxed }>(self.0, old, new) }.0
    }
}

/// A 16-bit number that others read and replace at the same time, no reader or writer of which sees it half changed.
#[derive(Clone, Copy)]
pub(crate) struct Half(*mut u16);

impl Half {
    /// A number in a map.
    #[inline(always)]
    pub(crate) fn of(number: &u16) -> Self {
        Self(core::ptr::from_ref(number).cast_mut())
    }

    /// Its value.
    #[inline(always)]
    pub(crate) fn load(self) -> u16 {
        // SAFETY: made from a reference: aligned and readable.
        unsafe { core::ptr::read_volatile(self.0) }
    }

    /// Replaces it.
    #[inline(always)]
    pub(crate) fn store(self, value: u16) {
        // SAFETY: aligned, and in a map.
        unsafe { core::ptr::write_volatile(self.0, value) }
    }
}
