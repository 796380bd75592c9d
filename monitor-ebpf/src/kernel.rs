//! Reading kernel structures at offsets that user space found in the running kernel's BTF.
//!
//! Rust emits no CO-RE relocations, so no offset stands in this source: `LAYOUT` is read-only data, filled in
//! before the load, and the verifier folds each offset into the instruction.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use monitor_ebpf::Layout;

#[unsafe(no_mangle)]
pub(crate) static LAYOUT: Layout = Layout::ZERO;

/// A pointer to a kernel structure.
pub(crate) type Address = *const u8;

/// The value of one offset. Volatile, because the compiler believes the zeros of the initializer.
#[inline(always)]
pub(crate) fn offset(at: &u32) -> u32 {
    // SAFETY: a reference is readable and aligned.
    unsafe { core::ptr::read_volatile(at) }
}

/// Reads a field through a pointer the verifier trusts (an argument of a BTF tracepoint, or what was
/// loaded through one): one load instruction, and a fault reads as 0.
///
/// # Safety
/// `base` must be such a pointer; the verifier refuses the program otherwise.
#[inline(always)]
pub(crate) unsafe fn load<T>(base: Address, offset: u32) -> T {
    // SAFETY: the caller's pointer is one the verifier checks itself, offset included.
    unsafe { core::ptr::read_volatile(base.add(offset as usize).cast::<T>()) }
}

/// Reads a field through an address that may be stale; `None` if it cannot be read.
#[inline(always)]
pub(crate) fn probe<T>(base: u64, offset: u32) -> Option<T> {
    // SAFETY: the helper checks the address itself and fails on any that is not readable.
    unsafe { bpf_probe_read_kernel((base + u64::from(offset)) as *const T).ok() }
}

/// The run queue of the CPU that `task` is on.
///
/// # Safety
/// `task` must be a pointer that the verifier trusts.
#[inline(always)]
pub(crate) unsafe fn run_queue(task: Address) -> Address {
    // SAFETY: by the caller; the second pointer was loaded through the first.
    unsafe {
        let cfs_rq: Address = load(task, offset(&LAYOUT.task_cfs_rq));
        load(cfs_rq, offset(&LAYOUT.cfs_rq_rq))
    }
}
