//! A virtual machine without firmware and operating system: each vCPU executes, in real mode, exactly the instructions
//! it is asked for. Its threads are named as QEMU names them. The truth for tests of what KVM's tracepoints say.
//!
//! Without an interrupt controller in the kernel every `hlt` returns to user space; with one it waits in the kernel for
//! [`Machine::interrupt`]. x86-64 only.

mod kvm;
mod stats;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

pub use kvm::Irqchip;
use kvm::{Memory, Run, Vm};

/// What each vCPU executes in one round: so many of each, then an `out` to [`END_PORT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// `out 0x10, al`: one return to user space each.
    pub outs: u32,
    /// `xor eax, eax; cpuid`: handled in the kernel.
    pub cpuids: u32,
    /// A store of one byte to an address without memory: one return to user space each.
    pub mmios: u32,
    /// `hlt`.
    pub hlts: u32,
    /// `dec` and `jnz`: time in guest mode without exits of its own.
    pub spins: u32,
}

impl Round {
    /// Nothing but the end.
    pub const NONE: Self = Self { outs: 0, cpuids: 0, mmios: 0, hlts: 0, spins: 0 };
}

/// The `out` that ends a round; no port of the interrupt controllers in the kernel.
pub const END_PORT: u16 = 0x30;

/// How often `KVM_RUN` returned in one round, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Returns {
    /// `KVM_EXIT_IO`, the end included.
    pub io: u64,
    /// `KVM_EXIT_MMIO`.
    pub mmio: u64,
    /// `KVM_EXIT_HLT`.
    pub hlt: u64,
    /// `EINTR`.
    pub interrupted: u64,
}

impl Returns {
    /// All of them.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.io + self.mmio + self.hlt + self.interrupted
    }
}

/// The machine; its vCPU threads live until it is dropped.
pub struct Machine {
    vm: Arc<Vm>,
    vcpus: Vec<VcpuThread>,
}

struct VcpuThread {
    tid: u32,
    stats: OwnedFd,
    /// Within a round.
    busy: Arc<AtomicBool>,
    rounds: Option<mpsc::Sender<()>>,
    ended: mpsc::Receiver<io::Result<Returns>>,
    thread: Option<JoinHandle<()>>,
}

impl Machine {
    /// Makes the machine; its vCPUs wait for the first round.
    ///
    /// # Errors
    /// If KVM refuses anything.
    pub fn new(vcpus: u32, round: Round, irqchip: Irqchip) -> io::Result<Self> {
        let memory = Memory::new(&round)?;
        let vm = Arc::new(Vm::new(memory, irqchip)?);
        ignore_kicks();
        let vcpus = (0..vcpus).map(|index| VcpuThread::start(&vm, index)).collect::<io::Result<_>>()?;
        Ok(Self { vm, vcpus })
    }

    /// Thread ids of the vCPUs.
    #[must_use]
    pub fn tids(&self) -> Vec<u32> {
        self.vcpus.iter().map(|vcpu| vcpu.tid).collect()
    }

    /// Begins a round on every vCPU.
    pub fn begin(&self) {
        for vcpu in &self.vcpus {
            if let Some(rounds) = &vcpu.rounds {
                vcpu.busy.store(true, Ordering::Release);
                let _ = rounds.send(()); // A thread that is gone is noticed at the end.
            }
        }
    }

    /// No vCPU is within a round.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.vcpus.iter().all(|vcpu| !vcpu.busy.load(Ordering::Acquire))
    }

    /// Waits for the end of a round.
    ///
    /// # Errors
    /// If a vCPU failed, or did not end within `patience`.
    pub fn end(&self, patience: Duration) -> io::Result<Vec<Returns>> {
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "a vCPU did not end its round");
        self.vcpus.iter().map(|vcpu| vcpu.ended.recv_timeout(patience).map_err(late)?).collect()
    }

    /// What KVM itself counts for a vCPU: `exits`, `halt_poll_success_ns` and so on (`KVM_GET_STATS_FD`, Linux 5.14).
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn statistics(&self, vcpu: usize) -> io::Result<Vec<(String, u64)>> {
        stats::read(&self.vcpus[vcpu].stats)
    }

    /// Interrupts the first vCPU, which ends a `hlt` in the kernel.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn interrupt(&self) -> io::Result<()> {
        self.vm.interrupt()
    }

    /// Sends the vCPU thread a signal, as QEMU does to get it out of the kernel.
    ///
    /// # Errors
    /// If the thread is gone.
    pub fn kick(&self, vcpu: usize) -> io::Result<()> {
        let tid = i32::try_from(self.vcpus[vcpu].tid).map_err(io::Error::other)?;
        // SAFETY: sends a signal that has a handler; no memory is involved.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGUSR1) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits until the vCPU thread sleeps, which within a round is a `hlt` in the kernel.
    ///
    /// # Errors
    /// If it does not within `patience`.
    pub fn wait_asleep(&self, vcpu: usize, patience: Duration) -> io::Result<()> {
        let file = format!("/proc/self/task/{}/stat", self.vcpus[vcpu].tid);
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            let stat = std::fs::read_to_string(&file)?;
            // The state stands behind the name, which is in brackets.
            if stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S')) {
                return Ok(());
            }
            std::thread::yield_now();
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the vCPU does not halt"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for vcpu in &mut self.vcpus {
            vcpu.rounds = None;
        }
        for i in 0..self.vcpus.len() {
            // A vCPU within a round leaves it at a signal, once the sender is gone.
            while self.vcpus[i].thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
                let _ = self.kick(i);
                std::thread::sleep(Duration::from_millis(1));
            }
            if let Some(thread) = self.vcpus[i].thread.take() {
                let _ = thread.join();
            }
        }
    }
}

impl VcpuThread {
    fn start(vm: &Arc<Vm>, index: u32) -> io::Result<Self> {
        let run = vm.vcpu(index)?;
        let stats = run.statistics()?;
        let (rounds, begin) = mpsc::channel::<()>();
        let (end, ended) = mpsc::channel();
        let (hello, tid) = mpsc::channel();
        let vm = Arc::clone(vm);
        let busy = Arc::new(AtomicBool::new(false));
        let is_busy = Arc::clone(&busy);
        let thread = std::thread::Builder::new().name(format!("CPU {index}/KVM")).spawn(move || {
            // SAFETY: has no arguments and cannot fail.
            let _ = hello.send(unsafe { libc::gettid() }.unsigned_abs());
            while begin.recv().is_ok() {
                let asked_to_stop = || begin.try_recv() == Err(mpsc::TryRecvError::Disconnected);
                let did = round(&run, asked_to_stop);
                is_busy.store(false, Ordering::Release);
                if end.send(did).is_err() {
                    break;
                }
            }
            drop((run, vm)); // In this order.
        })?;
        let tid = tid.recv().map_err(io::Error::other)?;
        Ok(Self { tid, stats, busy, rounds: Some(rounds), ended, thread: Some(thread) })
    }
}

/// Executes one round.
fn round(run: &Run, asked_to_stop: impl Fn() -> bool) -> io::Result<Returns> {
    let mut returns = Returns::default();
    run.reset()?;
    loop {
        match run.enter() {
            Ok(kvm::EXIT_IO) => {
                returns.io += 1;
                if run.port() == END_PORT {
                    return Ok(returns);
                }
            }
            Ok(kvm::EXIT_MMIO) => returns.mmio += 1,
            Ok(kvm::EXIT_HLT) => returns.hlt += 1,
            Ok(other) => return Err(io::Error::other(format!("unexpected KVM_EXIT {other}"))),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                returns.interrupted += 1;
                if asked_to_stop() {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// SIGUSR1 interrupts system calls and does nothing else.
fn ignore_kicks() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: an all-zero sigaction is a valid value, without flags, so that system calls are not restarted.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // SAFETY: the handler does nothing, which is allowed at any moment; both pointers are valid or null.
    unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) };
}
