//! BPF array maps in this process's memory: reading a value is a memory access, not a system call.

use std::{
    io,
    marker::PhantomData,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A `BPF_F_MMAPABLE` array of `len` values of type `T`, shared with the kernel programs.
///
/// `T` is one of the plain types of `monitor_ebpf`: any bit pattern is a value, and the alignment is at most 8.
#[derive(Debug)]
pub(super) struct Mapped<T> {
    base: NonNull<T>,
    len: usize,
    of: PhantomData<T>,
}

// SAFETY: the mapping belongs to the value and is accessed by volatile or atomic operations only.
unsafe impl<T> Send for Mapped<T> {}

impl<T: Copy> Mapped<T> {
    /// Maps the array behind `fd`.
    pub(super) fn new(fd: impl AsFd, len: usize) -> io::Result<Self> {
        let bytes = len * size_of::<T>();
        // SAFETY: a new mapping at an address the kernel chooses touches no memory in use.
        let base = unsafe {
            mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { base, len, of: PhantomData })
    }

    /// How many values there are.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.len).unwrap_or(u32::MAX)
    }

    /// A copy of value `index`.
    pub(super) fn get(&self, index: usize) -> T {
        // SAFETY: `at` is inside the mapping; any bit pattern is a `T`.
        unsafe { self.at(index).read_volatile() }
    }

    /// Replaces value `index`; for values the programs do not use at that moment.
    pub(super) fn set(&self, index: usize, value: T) {
        // SAFETY: `at` is inside the mapping.
        unsafe { self.at(index).write_volatile(value) }
    }

    /// The 64-bit word `word` of value `index`, for values that are made of words.
    pub(super) fn word_of(&self, index: usize, word: usize) -> &AtomicU64 {
        assert!((word + 1) * 8 <= size_of::<T>(), "word {word} outside of the value");
        // SAFETY: inside the mapping (checked), aligned (values are multiples of 8 bytes from a page on), and only
        // ever accessed atomically.
        unsafe { AtomicU64::from_ptr(self.at(index).cast::<u64>().add(word)) }
    }

    /// The 32-bit number `half` of value `index`, for values that are made of words.
    pub(super) fn half_of(&self, index: usize, half: usize) -> &AtomicU32 {
        assert!((half + 1) * 4 <= size_of::<T>(), "half word {half} outside of the value");
        // SAFETY: as in `word_of`; nobody accesses this one as a part of a larger number.
        unsafe { AtomicU32::from_ptr(self.at(index).cast::<u32>().add(half)) }
    }

    /// The 64-bit word `word` of value 0.
    pub(super) fn word(&self, word: usize) -> &AtomicU64 {
        self.word_of(0, word)
    }

    fn at(&self, index: usize) -> *mut T {
        assert!(index < self.len, "value {index} of {}", self.len);
        // SAFETY: inside the mapping (checked).
        unsafe { self.base.as_ptr().add(index) }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; no reference outlives `self`.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len * size_of::<T>()) };
    }
}

/// Sets or clears one bit.
pub(super) fn change_bit(word: &AtomicU64, bit: u32, on: bool) {
    if on {
        word.fetch_or(1 << bit, Ordering::Release);
    } else {
        word.fetch_and(!(1 << bit), Ordering::Release);
    }
}
