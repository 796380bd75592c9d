//! Exits of followed vCPU threads: from guest mode to the kernel, and from the kernel to user space.
//!
//! Raw tracepoints, since KVM is a module on most hosts and aya cannot load programs against a module's BTF. They
//! were measured to be cheaper than classic tracepoints too, and need no tracefs; what only the classic record has, the
//! reason of an exit, is read where KVM itself keeps it. The current thread is the vCPU's in all of these.

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_F_MMAPABLE,
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns, generated::bpf_get_current_task_btf},
    macros::{map, raw_tracepoint},
    maps::Array,
    programs::RawTracePointContext,
};
use monitor_ebpf::{
    EINTR, ExitTable, HISTOGRAMS, ISA_SVM, ISA_VMX, KvmLayout, MODE_GUEST, MODE_HOST, PLACE_OTHER, Thread,
    VcpuExits, reason_place, userspace_place,
};

use crate::{
    kernel::{Address, LAYOUT, load, offset, probe},
    sched::{followed, get, is_followed, set},
};

#[map(name = "VCPU_EXITS")]
static VCPU_EXITS: Array<VcpuExits> = Array::with_max_entries(HISTOGRAMS, BPF_F_MMAPABLE);
#[map(name = "EXIT_TABLES")]
static EXIT_TABLES: Array<ExitTable> = Array::with_max_entries(HISTOGRAMS, BPF_F_MMAPABLE);
#[map(name = "KVM_LAYOUT")]
static KVM_LAYOUT: Array<KvmLayout> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// The followed thread that runs this program, and its figures.
struct Current {
    thread: &'static Thread,
    exits: &'static mut VcpuExits,
    table: &'static mut ExitTable,
}

#[inline(always)]
fn current() -> Option<Current> {
    // The thread id is in the lower half.
    #[expect(clippy::cast_possible_truncation, reason = "the upper half is the process id")]
    let tid = bpf_get_current_pid_tgid() as u32;
    if !is_followed(tid) {
        return None;
    }
    let thread = followed(tid)?;
    let place = u32::from(thread.histograms.checked_sub(1)?);
    // SAFETY: valid map values; only the thread itself changes those of its place.
    unsafe {
        let exits = VCPU_EXITS.get_ptr_mut(place)?.as_mut()?;
        let table = EXIT_TABLES.get_ptr_mut(place)?.as_mut()?;
        Some(Current { thread, exits, table })
    }
}

/// A word of the tracepoint's arguments.
#[inline(always)]
fn arg(ctx: &RawTracePointContext, index: usize) -> u64 {
    // SAFETY: the callers ask for arguments that their tracepoint has.
    unsafe { *ctx.as_ptr().cast::<u64>().add(index) }
}

/// `trace_kvm_exit(struct kvm_vcpu *vcpu, u32 isa)` (Linux 5.16), with interrupts off on VMX; up to some Linux on SVM
/// after them. Counts the exit by reason, and adds the stay in guest mode, nanoseconds on a CPU.
#[raw_tracepoint(tracepoint = "kvm_exit")]
pub(crate) fn kvm_exit(ctx: RawTracePointContext) -> i32 {
    let Some(Current { thread, exits, table }) = current() else { return 0 };
    // SAFETY: plain helper call.
    let now = unsafe { bpf_ktime_get_ns() };
    let (vcpu, isa) = (arg(&ctx, 0), low(arg(&ctx, 1)));
    let reason = reason(vcpu, isa);
    let sequence = begin(exits);
    let position = position(thread, now);
    if exits.mode == MODE_GUEST {
        let guest = exits.guest_ns.wrapping_add(position.wrapping_sub(exits.position_ns));
        set(&mut exits.guest_ns, guest);
    }
    let count = exits.exits.wrapping_add(1);
    set(&mut exits.exits, count);
    set(&mut exits.reason, reason);
    set(&mut exits.isa, isa);
    stands(exits, MODE_HOST, position, now);
    // Read back: the compiler knows that the place it has is in bounds, and the verifier does not.
    let reason = get(&exits.reason);
    if let Some(count) = table.counts.get_mut(reason as usize) {
        let counted = count.wrapping_add(1);
        set(count, counted);
    }
    meet(exits, vcpu);
    end(exits, sequence);
    0
}

/// `trace_kvm_entry(struct kvm_vcpu *vcpu, bool force_immediate_exit)`, with interrupts off. Adds the time since the
/// exit to its reason, nanoseconds by the wall clock.
#[raw_tracepoint(tracepoint = "kvm_entry")]
pub(crate) fn kvm_entry(ctx: RawTracePointContext) -> i32 {
    let Some(Current { thread, exits, table }) = current() else { return 0 };
    let vcpu = arg(&ctx, 0);
    // SAFETY: plain helper call.
    let now = unsafe { bpf_ktime_get_ns() };
    let sequence = begin(exits);
    if exits.mode == MODE_HOST
        && let Some(ns) = table.ns.get_mut(exits.reason as usize)
    {
        let outside = ns.wrapping_add(now.wrapping_sub(exits.since_ns));
        set(ns, outside);
    }
    stands(exits, MODE_GUEST, position(thread, now), now);
    meet(exits, vcpu);
    end(exits, sequence);
    0
}

/// `trace_kvm_userspace_exit(__u32 reason, int errno)`: `KVM_RUN` returns, `errno` is its result. Counts, reads no
/// clock.
#[raw_tracepoint(tracepoint = "kvm_userspace_exit")]
pub(crate) fn kvm_userspace_exit(ctx: RawTracePointContext) -> i32 {
    let Some(Current { exits, table, .. }) = current() else { return 0 };
    let (reason, error) = (low(arg(&ctx, 0)), low(arg(&ctx, 1)).cast_signed());
    let sequence = begin(exits);
    let count = exits.userspace_exits.wrapping_add(1);
    set(&mut exits.userspace_exits, count);
    if error == -EINTR {
        let kicks = exits.kicks.wrapping_add(1);
        set(&mut exits.kicks, kicks);
    }
    if let Some(count) = table.userspace.get_mut(userspace_place(reason, error) as usize) {
        let counted = count.wrapping_add(1);
        set(count, counted);
    }
    end(exits, sequence);
    0
}

/// `trace_kvm_vcpu_wakeup(__u64 ns, bool waited, bool valid)`: a halt in the kernel ended. Counts it, and copies how long
/// KVM says it has polled.
#[raw_tracepoint(tracepoint = "kvm_vcpu_wakeup")]
pub(crate) fn kvm_vcpu_wakeup(ctx: RawTracePointContext) -> i32 {
    let Some(Current { exits, .. }) = current() else { return 0 };
    let waited = arg(&ctx, 1) & 0xff != 0;
    let sequence = begin(exits);
    let halts = exits.halts.wrapping_add(1);
    set(&mut exits.halts, halts);
    if !waited {
        let polled = exits.halts_polled.wrapping_add(1);
        set(&mut exits.halts_polled, polled);
    }
    if exits.vcpu != 0 {
        copy_halt_poll(exits);
    }
    end(exits, sequence);
    0
}

/// Notes in which mode the vCPU is from now on.
#[inline(always)]
fn stands(exits: &mut VcpuExits, mode: u32, position: u64, now: u64) {
    set(&mut exits.mode, mode);
    set(&mut exits.position_ns, position);
    set(&mut exits.since_ns, now);
}

/// Notes the `struct kvm_vcpu`, and how long it has polled so far, at its first event.
#[inline(always)]
fn meet(exits: &mut VcpuExits, vcpu: u64) {
    if exits.vcpu != vcpu {
        set(&mut exits.vcpu, vcpu);
        copy_halt_poll(exits);
    }
}

#[inline(never)]
fn copy_halt_poll(exits: &mut VcpuExits) {
    let Some(layout) = layout() else { return };
    if layout.halt_poll_success == 0 || layout.halt_poll_fail == 0 {
        return;
    }
    let success: Option<u64> = probe(exits.vcpu, layout.halt_poll_success);
    let fail: Option<u64> = probe(exits.vcpu, layout.halt_poll_fail);
    if let (Some(success), Some(fail)) = (success, fail) {
        set(&mut exits.halt_poll_ns, success.wrapping_add(fail));
        set(&mut exits.halt_poll_known, 1);
    }
}

/// The place of the reason for this exit, as `kvm_x86_ops.get_exit_info()` finds it for the classic tracepoint.
#[inline(always)]
fn reason(vcpu: u64, isa: u32) -> u32 {
    let Some(layout) = layout() else { return PLACE_OTHER };
    let code: Option<u32> = match isa {
        ISA_VMX if layout.vmx_exit_reason != 0 => probe(vcpu, layout.vmx_exit_reason),
        ISA_SVM if layout.svm_vmcb != 0 && layout.vmcb_exit_code != 0 => {
            probe::<u64>(vcpu, layout.svm_vmcb).and_then(|vmcb| probe(vmcb, layout.vmcb_exit_code))
        }
        _ => None,
    };
    code.map_or(PLACE_OTHER, |code| reason_place(isa, code))
}

#[inline(always)]
fn layout() -> Option<&'static KvmLayout> {
    // SAFETY: a valid map value for the life of the program; user space changes whole words.
    unsafe { KVM_LAYOUT.get_ptr(0)?.as_ref() }
}

/// How long the current thread has been on a CPU, see [`VcpuExits::position_ns`].
#[inline(always)]
fn position(thread: &Thread, now: u64) -> u64 {
    // SAFETY: plain helper call (Linux 5.11); the verifier trusts the pointer it returns.
    let arrived: u64 = unsafe {
        let task: Address = bpf_get_current_task_btf().cast_const().cast();
        load(task, offset(&LAYOUT.task_last_arrival))
    };
    thread.on_cpu_ns.wrapping_add(now).wrapping_sub(arrived)
}

/// What follows changes the figures of this thread: see `begin` in `sched.rs`.
#[inline(always)]
fn begin(exits: &mut VcpuExits) -> u32 {
    let sequence = exits.sequence | 1;
    set(&mut exits.sequence, sequence);
    sequence
}

#[inline(always)]
fn end(exits: &mut VcpuExits, sequence: u32) {
    set(&mut exits.sequence, sequence.wrapping_add(1));
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "32-bit arguments are passed in 64-bit words")]
const fn low(word: u64) -> u32 {
    word as u32
}

/// The yardstick of `cargo xtask bench kvm`: what any program on a raw tracepoint costs at least. The monitor never
/// loads it.
#[raw_tracepoint(tracepoint = "kvm_userspace_exit")]
pub(crate) fn bench_empty_raw(_ctx: RawTracePointContext) -> i32 {
    0
}
