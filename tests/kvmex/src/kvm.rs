//! The little of KVM's interface that is needed: `include/uapi/linux/kvm.h` and `arch/x86/include/uapi/asm/kvm.h`.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    ptr::NonNull,
};

use crate::{END_PORT, Round};

const CREATE_VM: libc::c_ulong = 0xAE01;
const GET_VCPU_MMAP_SIZE: libc::c_ulong = 0xAE04;
const CREATE_VCPU: libc::c_ulong = 0xAE41;
const SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_AE46;
const SET_TSS_ADDR: libc::c_ulong = 0xAE47;
const CREATE_IRQCHIP: libc::c_ulong = 0xAE60;
const IRQ_LINE: libc::c_ulong = 0x4008_AE61;
const GET_IRQCHIP: libc::c_ulong = 0xC208_AE62;
const SET_IRQCHIP: libc::c_ulong = 0x8208_AE63;
const RUN: libc::c_ulong = 0xAE80;
const SET_REGS: libc::c_ulong = 0x4090_AE82;
const GET_SREGS: libc::c_ulong = 0x8138_AE83;
const SET_SREGS: libc::c_ulong = 0x4138_AE84;
const SET_MP_STATE: libc::c_ulong = 0x4004_AE99;
const GET_STATS_FD: libc::c_ulong = 0xAECE;

/// `KVM_EXIT_IO`.
pub(crate) const EXIT_IO: u32 = 2;
/// `KVM_EXIT_HLT`.
pub(crate) const EXIT_HLT: u32 = 5;
/// `KVM_EXIT_MMIO`.
pub(crate) const EXIT_MMIO: u32 = 6;

const MEMORY_BYTES: usize = 0x8000;
/// Where a vCPU begins.
const CODE: usize = 0x1000;
/// What handles the interrupt.
const HANDLER: u16 = 0x600;
/// The first vector of the interrupt controller (8259), which stands for its line 0.
const VECTOR: u8 = 0x20;
/// Real-mode segment beyond the memory: a store there has no memory behind it.
const NOWHERE: u16 = 0x1000;
/// Intel's processors need three pages for real mode; far above the memory.
const TSS: libc::c_ulong = 0xfffb_d000;
/// `rflags` of a vCPU that takes interrupts.
const RFLAGS: u64 = 0x202;

/// Whether the kernel has the interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Irqchip {
    /// There is none: `hlt` returns to user space.
    None,
    /// In the kernel: `hlt` waits there.
    Kernel,
}

fn ioctl(fd: RawFd, request: libc::c_ulong, argument: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: every caller passes what the request takes: a number, or the address of a value that lives through the
    // call and is as large as the request says.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn ioctl_with<T>(fd: RawFd, request: libc::c_ulong, value: &mut T) -> io::Result<i32> {
    ioctl(fd, request, std::ptr::from_mut(value) as libc::c_ulong)
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Memory that is mapped and unmapped.
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the value and holds plain bytes.
unsafe impl Send for Mapping {}
// SAFETY: what is written after the start is written by the kernel and by guests, and read through volatile reads.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(bytes: usize, fd: Option<RawFd>) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | if fd.is_none() { libc::MAP_ANONYMOUS } else { 0 };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address the kernel chooses touches no memory in use.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, fd.unwrap_or(-1), 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { base, bytes })
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.bytes, "{} bytes at {at:#x} do not fit", bytes.len());
        // SAFETY: inside the mapping (checked), which nothing else refers to yet.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(at), bytes.len()) }
    }

    fn read<T: Copy>(&self, at: usize) -> T {
        assert!(
            at + size_of::<T>() <= self.bytes && at.is_multiple_of(align_of::<T>()),
            "no value at {at:#x}"
        );
        // SAFETY: inside the mapping and aligned (checked: mappings begin on a page); any bytes are an integer.
        unsafe { self.base.as_ptr().add(at).cast::<T>().read_volatile() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; no reference outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// The guest's memory, with its program.
pub(crate) struct Memory(Mapping);

impl Memory {
    pub(crate) fn new(round: &Round) -> io::Result<Self> {
        let mut memory = Mapping::new(MEMORY_BYTES, None)?;
        memory.write(CODE, &code(round));
        // The real-mode table: offset, then segment 0.
        memory.write(usize::from(VECTOR) * 4, &HANDLER.to_le_bytes());
        memory.write(usize::from(HANDLER), &[0xcf]); // iret
        Ok(Self(memory))
    }
}

fn code(round: &Round) -> Vec<u8> {
    let [end, _] = END_PORT.to_le_bytes();
    let mut code = Vec::new();
    repeat(&mut code, round.outs, &[0xe6, 0x10]); // out 0x10, al
    repeat(&mut code, round.cpuids, &[0x66, 0x31, 0xc0, 0x0f, 0xa2]); // xor eax, eax; cpuid
    repeat(&mut code, round.mmios, &[0x26, 0xa2, 0, 0]); // mov es:[0], al
    repeat(&mut code, round.spins, &[]);
    repeat(&mut code, round.hlts, &[0xf4]); // hlt
    code.extend([0xe6, end, 0xf4]); // out END_PORT, al; hlt, which is not reached
    code
}

/// `mov esi, times; top: body; dec esi; jnz top`. Not ecx, which cpuid overwrites.
fn repeat(code: &mut Vec<u8>, times: u32, body: &[u8]) {
    if times == 0 {
        return;
    }
    code.extend([0x66, 0xbe]);
    code.extend(times.to_le_bytes());
    code.extend(body);
    code.extend([0x66, 0x4e, 0x75]);
    let back = i8::try_from(body.len() + 4).expect("bodies are short");
    code.push((-back).cast_unsigned());
}

/// A virtual machine.
pub(crate) struct Vm {
    fd: OwnedFd,
    run_bytes: usize,
    _memory: Memory,
}

impl Vm {
    pub(crate) fn new(memory: Memory, irqchip: Irqchip) -> io::Result<Self> {
        #[repr(C)]
        struct Region {
            slot: u32,
            flags: u32,
            guest_address: u64,
            bytes: u64,
            address: u64,
        }
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let fd = owned(ioctl(kvm.as_raw_fd(), CREATE_VM, 0)?);
        let run_bytes = ioctl(kvm.as_raw_fd(), GET_VCPU_MMAP_SIZE, 0)?;
        ioctl(fd.as_raw_fd(), SET_TSS_ADDR, TSS)?;
        if irqchip == Irqchip::Kernel {
            prepare_irqchip(fd.as_raw_fd())?;
        }
        let address = memory.0.base.as_ptr() as u64;
        let mut region = Region { slot: 0, flags: 0, guest_address: 0, bytes: MEMORY_BYTES as u64, address };
        ioctl_with(fd.as_raw_fd(), SET_USER_MEMORY_REGION, &mut region)?;
        Ok(Self { fd, run_bytes: usize::try_from(run_bytes).map_err(io::Error::other)?, _memory: memory })
    }

    pub(crate) fn vcpu(&self, index: u32) -> io::Result<Run> {
        let fd = owned(ioctl(self.fd.as_raw_fd(), CREATE_VCPU, libc::c_ulong::from(index))?);
        let run = Mapping::new(self.run_bytes, Some(fd.as_raw_fd()))?;
        Ok(Run { fd, run })
    }

    /// An edge on line 0 of the interrupt controller, which the first vCPU gets.
    pub(crate) fn interrupt(&self) -> io::Result<()> {
        for level in [1_u32, 0] {
            let mut line = [0, level]; // kvm_irq_level: irq, level
            ioctl_with(self.fd.as_raw_fd(), IRQ_LINE, &mut line)?;
        }
        Ok(())
    }
}

/// Makes the interrupt controller as a guest's firmware would, and lets it end interrupts by itself.
fn prepare_irqchip(vm: RawFd) -> io::Result<()> {
    /// Byte offsets in `struct kvm_pic_state`, which stands behind the chip's number and padding.
    const STATE: usize = 8;
    const MASK: usize = STATE + 2;
    const BASE: usize = STATE + 5;
    const AUTO_END: usize = STATE + 10;
    #[repr(C, align(8))]
    struct Chip([u8; 520]);
    ioctl(vm, CREATE_IRQCHIP, 0)?;
    let mut chip = Chip([0; 520]); // Number 0: the first of the two.
    ioctl_with(vm, GET_IRQCHIP, &mut chip)?;
    chip.0[MASK] = 0xfe;
    chip.0[BASE] = VECTOR;
    chip.0[AUTO_END] = 1;
    ioctl_with(vm, SET_IRQCHIP, &mut chip).map(drop)
}

/// A virtual CPU.
pub(crate) struct Run {
    fd: OwnedFd,
    run: Mapping,
}

/// `struct kvm_regs`: sixteen general registers, then the two that matter here.
#[repr(C)]
struct Registers {
    general: [u64; 16],
    rip: u64,
    rflags: u64,
}

/// Index of `rsp` in `struct kvm_regs`.
const RSP: usize = 6;
/// Bytes of `struct kvm_segment`, eight of which begin `struct kvm_sregs`: cs, ds, es, fs, gs, ss, tr, ldt.
const SEGMENT: usize = 24;
const SREGS: usize = 0x138;

impl Run {
    /// As at the start of a round.
    pub(crate) fn reset(&self) -> io::Result<()> {
        let fd = self.fd.as_raw_fd();
        // Words, for the alignment that the kernel's structure has.
        let mut sregs = [0_u64; SREGS / 8];
        ioctl_with(fd, GET_SREGS, &mut sregs)?;
        for (segment, selector) in [(0, 0), (1, 0), (2, NOWHERE), (5, 0)] {
            let at = segment * SEGMENT / 8;
            sregs[at] = u64::from(selector) << 4;
            // The limit is in the lower half of the second word, then comes the selector.
            sregs[at + 1] = sregs[at + 1] & !(0xffff << 32) | u64::from(selector) << 32;
        }
        ioctl_with(fd, SET_SREGS, &mut sregs)?;
        let mut registers = Registers { general: [0; 16], rip: CODE as u64, rflags: RFLAGS };
        registers.general[RSP] = 0x7000;
        ioctl_with(fd, SET_REGS, &mut registers)?;
        let mut runnable = 0_u32;
        ioctl_with(fd, SET_MP_STATE, &mut runnable).map(drop)
    }

    /// `KVM_RUN`; the reason of the return.
    pub(crate) fn enter(&self) -> io::Result<u32> {
        ioctl(self.fd.as_raw_fd(), RUN, 0)?;
        Ok(self.run.read(8)) // kvm_run.exit_reason
    }

    /// The port of a `KVM_EXIT_IO`.
    pub(crate) fn port(&self) -> u16 {
        self.run.read(34) // kvm_run.io.port
    }

    pub(crate) fn statistics(&self) -> io::Result<OwnedFd> {
        ioctl(self.fd.as_raw_fd(), GET_STATS_FD, 0).map(owned)
    }
}
