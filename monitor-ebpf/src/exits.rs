//! What crosses the boundary about KVM: exits of followed vCPU threads from guest mode and from the kernel.
//!
//! The programs are in `kvm.rs`. The values of one thread are at its histogram place; a host with more vCPUs than
//! places has none for the rest.

/// Exits of one vCPU thread, cumulative since it is followed. Written by that thread only, in the KVM tracepoints.
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuExits {
    /// Odd while what follows, or the [`ExitTable`] of the same place, changes; different after it.
    pub sequence: u32,
    /// [`MODE_UNKNOWN`], [`MODE_GUEST`] or [`MODE_HOST`].
    pub mode: u32,
    /// Place in the [`ExitTable`] of the last exit's reason.
    pub reason: u32,
    /// [`ISA_VMX`] or [`ISA_SVM`] as the last exit had it; 0 = there was none.
    pub isa: u32,
    /// `CLOCK_MONOTONIC` of the last entry or exit, nanoseconds.
    pub since_ns: u64,
    /// Time the thread had been on a CPU then, nanoseconds: `Thread::on_cpu_ns + CLOCK_MONOTONIC - Thread::since_ns`.
    /// Differences of it leave out what the thread waited or slept meanwhile; the rest of it means nothing.
    pub position_ns: u64,
    /// Time on a CPU between entries and exits, finished stays only, nanoseconds.
    pub guest_ns: u64,
    /// Exits from guest mode (`kvm_exit`).
    pub exits: u64,
    /// Returns of `KVM_RUN` to user space (`kvm_userspace_exit`).
    pub userspace_exits: u64,
    /// Those with `EINTR`: a signal, or QEMU's `immediate_exit`, took the vCPU out of the kernel.
    pub kicks: u64,
    /// Halts in the kernel that ended (`kvm_vcpu_wakeup`).
    pub halts: u64,
    /// Those that ended while polling: the thread did not sleep.
    pub halts_polled: u64,
    /// `kvm_vcpu.stat.generic.halt_poll_success_ns + halt_poll_fail_ns`, as of the last halt or the first event;
    /// nanoseconds since the vCPU was made.
    pub halt_poll_ns: u64,
    /// Address of the `struct kvm_vcpu`; 0 until the first entry or exit. Only ever read through
    /// `bpf_probe_read_kernel`.
    pub vcpu: u64,
    /// 1 once `halt_poll_ns` was read.
    pub halt_poll_known: u32,
    /// Nothing; there is no padding before the end of the second cache line.
    pub reserved: u32,
}

impl VcpuExits {
    /// Nothing seen.
    pub const ZERO: Self = Self {
        sequence: 0,
        mode: MODE_UNKNOWN,
        reason: 0,
        isa: 0,
        since_ns: 0,
        position_ns: 0,
        guest_ns: 0,
        exits: 0,
        userspace_exits: 0,
        kicks: 0,
        halts: 0,
        halts_polled: 0,
        halt_poll_ns: 0,
        vcpu: 0,
        halt_poll_known: 0,
        reserved: 0,
    };
}

/// No entry or exit seen yet.
pub const MODE_UNKNOWN: u32 = 0;
/// In guest mode since the last event.
pub const MODE_GUEST: u32 = 1;
/// Outside guest mode since the last event.
pub const MODE_HOST: u32 = 2;

/// `KVM_ISA_VMX` of the kernel's `arch/x86/kvm/trace.h`: reasons are `exit_reason` of Intel's VMX.
pub const ISA_VMX: u32 = 1;
/// `KVM_ISA_SVM`: reasons are `exit_code` of AMD's SVM.
pub const ISA_SVM: u32 = 2;

/// Exits of one vCPU thread by reason, cumulative since it is followed; changes under [`VcpuExits::sequence`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitTable {
    /// Exits from guest mode, by [`reason_place`].
    pub counts: [u64; REASONS],
    /// Time from those exits to the next entry by the wall clock, sleep included, nanoseconds.
    pub ns: [u64; REASONS],
    /// Returns to user space, by [`userspace_place`].
    pub userspace: [u64; USERSPACE_REASONS],
}

impl ExitTable {
    /// Nothing counted.
    pub const ZERO: Self = Self { counts: [0; REASONS], ns: [0; REASONS], userspace: [0; USERSPACE_REASONS] };
}

/// Reasons that are told apart; see [`reason_place`].
pub const REASONS: usize = 192;
/// Codes below this stand at their own place: all of VMX's, and SVM's intercepts.
const DIRECT: u32 = 0xb0;
/// SVM's codes of nested paging and AVIC begin here.
const SVM_HIGH: u32 = 0x400;
const SVM_HIGH_COUNT: u32 = 14;
/// The place of `SVM_EXIT_ERR` (−1).
const PLACE_ERROR: u32 = DIRECT + SVM_HIGH_COUNT;
/// The place of every code that has none of its own.
pub const PLACE_OTHER: u32 = PLACE_ERROR + 1;

/// The place of an exit reason in an [`ExitTable`].
#[must_use]
#[inline(always)]
pub const fn reason_place(isa: u32, code: u32) -> u32 {
    // VMX keeps flags such as "the entry failed" above the basic reason.
    let code = if isa == ISA_VMX { code & 0xffff } else { code };
    if code < DIRECT {
        code
    } else if isa == ISA_SVM && code.wrapping_sub(SVM_HIGH) < SVM_HIGH_COUNT {
        DIRECT + (code - SVM_HIGH)
    } else if isa == ISA_SVM && code == u32::MAX {
        PLACE_ERROR
    } else {
        PLACE_OTHER
    }
}

/// The code that a place stands for; `None` for [`PLACE_OTHER`].
#[must_use]
pub const fn reason_code(place: u32) -> Option<u32> {
    if place < DIRECT {
        Some(place)
    } else if place < PLACE_ERROR {
        Some(SVM_HIGH + (place - DIRECT))
    } else if place == PLACE_ERROR {
        Some(u32::MAX)
    } else {
        None
    }
}

/// Reasons of returns to user space that are told apart; see [`userspace_place`].
pub const USERSPACE_REASONS: usize = 64;
/// The place of returns with `EINTR`; the reason in `kvm_run` may then be that of an earlier return.
pub const USERSPACE_INTERRUPTED: u32 = 61;
/// The place of returns with another error.
pub const USERSPACE_ERROR: u32 = 62;
/// The place of every reason that has none of its own.
pub const USERSPACE_OTHER: u32 = 63;

/// The place of a return to user space: its `KVM_EXIT_…` number, unless `KVM_RUN` failed.
#[must_use]
#[inline(always)]
pub const fn userspace_place(reason: u32, error: i32) -> u32 {
    if error == -EINTR {
        USERSPACE_INTERRUPTED
    } else if error < 0 {
        USERSPACE_ERROR
    } else if reason < USERSPACE_INTERRUPTED {
        reason
    } else {
        USERSPACE_OTHER
    }
}

/// `EINTR` of the kernel's `errno-base.h`.
pub const EINTR: i32 = 4;

/// Byte offsets into KVM's structures; 0 = not found, which none of them is. In a map and not in read-only data,
/// because KVM may be loaded after the programs are.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmLayout {
    /// `vcpu_svm.vmcb`: the control block in use, a pointer.
    pub svm_vmcb: u32,
    /// `vmcb.control.exit_code`.
    pub vmcb_exit_code: u32,
    /// `vcpu_vmx.exit_reason`, or `vcpu_vmx.vt.exit_reason` (Linux 6.16).
    pub vmx_exit_reason: u32,
    /// `kvm_vcpu.stat.generic.halt_poll_success_ns`.
    pub halt_poll_success: u32,
    /// `kvm_vcpu.stat.generic.halt_poll_fail_ns`.
    pub halt_poll_fail: u32,
    /// Nothing; there is no padding.
    pub reserved: u32,
}

impl KvmLayout {
    /// Nothing found.
    pub const ZERO: Self = Self {
        svm_vmcb: 0,
        vmcb_exit_code: 0,
        vmx_exit_reason: 0,
        halt_poll_success: 0,
        halt_poll_fail: 0,
        reserved: 0,
    };
}

const _: () = assert!(size_of::<VcpuExits>() == 128);
const _: () = assert!(size_of::<ExitTable>() == 3584);
const _: () = assert!(size_of::<KvmLayout>() == 24);
const _: () = assert!(PLACE_OTHER as usize == REASONS - 1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_stands_for_one_code() {
        for place in 0..PLACE_OTHER {
            let code = reason_code(place).unwrap();
            assert_eq!(reason_place(ISA_SVM, code), place, "{code:#x}");
        }
        assert_eq!(reason_code(PLACE_OTHER), None);
        for code in [0xb0, 0x3ff, 0x40e, 0x8000_0001, u32::MAX - 1] {
            assert_eq!(reason_place(ISA_SVM, code), PLACE_OTHER, "{code:#x}");
        }
    }

    #[test]
    fn vmx_flags_are_no_part_of_the_reason() {
        assert_eq!(reason_place(ISA_VMX, 0x8000_0021), 33);
        assert_eq!(reason_place(ISA_VMX, 0x400), PLACE_OTHER);
    }

    #[test]
    fn a_failed_run_has_no_reason_of_its_own() {
        assert_eq!(userspace_place(5, 0), 5);
        assert_eq!(userspace_place(5, 1), 5);
        assert_eq!(userspace_place(2, -EINTR), USERSPACE_INTERRUPTED);
        assert_eq!(userspace_place(2, -11), USERSPACE_ERROR);
        assert_eq!(userspace_place(61, 0), USERSPACE_OTHER);
        assert_eq!(userspace_place(u32::MAX, 0), USERSPACE_OTHER);
    }
}
