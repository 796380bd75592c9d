//! BPF array maps in this process's memory: reading a value is a memory access, not a system call.
//!
//! The kernel maps every page at once, used or not, and they count as ours. So an array is mapped piece by piece, as its
//! values are used: maps are sized for many more threads, devices and images than a host mostly has.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering},
};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// What is mapped at a time, bytes; a multiple of every page size.
const PIECE: usize = 64 << 10;

/// A `BPF_F_MMAPABLE` array of `len` values of type `T`, shared with the kernel programs.
///
/// `T` is one of the plain types of `monitor_ebpf`: any bit pattern is a value, and the alignment is at most 8.
#[derive(Debug)]
pub(super) struct Mapped<T> {
    base: NonNull<T>,
    len: usize,
    fd: OwnedFd,
    /// A bit for each piece that is mapped.
    mapped: Box<[AtomicU64]>,
    of: PhantomData<T>,
}

// SAFETY: the mapping belongs to the value and is accessed by volatile or atomic operations only.
unsafe impl<T> Send for Mapped<T> {}

impl<T: Copy> Mapped<T> {
    /// Reserves addresses for the array behind `fd`, and maps its first piece.
    pub(super) fn new(fd: impl AsFd, len: usize) -> io::Result<Self> {
        let bytes = len * size_of::<T>();
        // SAFETY: a new mapping at an address the kernel chooses touches no memory in use.
        let base =
            unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), MapFlags::PRIVATE)? };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        let words = bytes.div_ceil(PIECE).div_ceil(64);
        let mapped = (0..words).map(|_| AtomicU64::new(0)).collect();
        let this = Self { base, len, fd: fd.as_fd().try_clone_to_owned()?, mapped, of: PhantomData };
        this.map_piece(0)?;
        Ok(this)
    }

    /// Maps one piece of the array over the addresses that are reserved for it.
    fn map_piece(&self, piece: usize) -> io::Result<()> {
        let begin = piece * PIECE;
        let bytes = PIECE.min(self.len * size_of::<T>() - begin);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: inside the addresses reserved in `new`, which only this value uses; `T`s there are shared with the
        // kernel programs, and nobody has a reference to one before its piece is mapped.
        unsafe {
            let at = self.base.as_ptr().cast::<u8>().add(begin).cast();
            mmap(at, bytes, ProtFlags::READ | ProtFlags::WRITE, flags, &self.fd, begin as u64)?;
        }
        self.mapped[piece / 64].fetch_or(1 << (piece % 64), Ordering::Release);
        Ok(())
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

    /// The 16-bit number at `offset` of value `index`.
    pub(super) fn short_of(&self, index: usize, offset: usize) -> &AtomicU16 {
        assert!(
            offset.is_multiple_of(2) && offset < size_of::<T>(),
            "number at {offset} outside of the value"
        );
        // SAFETY: inside the mapping (checked) and aligned; nobody accesses this one as a part of a larger number while both
        // are in use.
        unsafe { AtomicU16::from_ptr(self.at(index).cast::<u8>().add(offset).cast()) }
    }

    /// The byte at `offset` of value `index`.
    pub(super) fn byte_of(&self, index: usize, offset: usize) -> &AtomicU8 {
        assert!(offset < size_of::<T>(), "byte {offset} outside of the value");
        // SAFETY: inside the mapping (checked); nobody accesses this one as a part of a larger number while both are in use.
        unsafe { AtomicU8::from_ptr(self.at(index).cast::<u8>().add(offset)) }
    }

    /// The 64-bit word `word` of value 0.
    pub(super) fn word(&self, word: usize) -> &AtomicU64 {
        self.word_of(0, word)
    }

    fn at(&self, index: usize) -> *mut T {
        assert!(index < self.len, "value {index} of {}", self.len);
        let begin = index * size_of::<T>();
        for piece in begin / PIECE..=(begin + size_of::<T>() - 1) / PIECE {
            if self.mapped[piece / 64].load(Ordering::Acquire) & 1 << (piece % 64) == 0 {
                self.map_piece(piece).expect("the first piece could be mapped, and there are few");
            }
        }
        // SAFETY: inside the mapping (checked).
        unsafe { self.base.as_ptr().add(index) }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: reserved in `new` with this length; no reference outlives `self`.
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
