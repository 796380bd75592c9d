//! Threads whose time is known: one that spins and knows its own, and a real-time one that keeps others from a CPU.

#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![allow(dead_code, reason = "no test program uses all of it")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use monitor::units::{MonotonicNs, Tid};
use rustix::thread::{CpuSet, sched_setaffinity};

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

/// A thread pinned to one CPU that spins, and reads its own CPU clock when asked.
pub(crate) struct Spinner {
    pub(crate) tid: Tid,
    ask: Arc<AtomicBool>,
    answers: mpsc::Receiver<(u64, u64)>,
    stop: Arc<AtomicBool>,
    pub(crate) turns: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Spinner {
    pub(crate) fn start(cpu: usize) -> Self {
        let (ask, stop, turns) = (<Arc<AtomicBool>>::default(), <Arc<AtomicBool>>::default(), Arc::default());
        let (answer, answers) = mpsc::channel();
        let (hello, tids) = mpsc::channel();
        let (asked, stopped, turned) = (Arc::clone(&ask), Arc::clone(&stop), Arc::<AtomicU64>::clone(&turns));
        let thread = std::thread::spawn(move || {
            pin(cpu);
            hello.send(own_tid()).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                turned.fetch_add(1, Ordering::Relaxed);
                if asked.swap(false, Ordering::Acquire) {
                    let own = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
                    let own = monitor::units::nanoseconds(own.tv_sec, own.tv_nsec);
                    answer.send((own, MonotonicNs::now().0)).unwrap();
                }
            }
        });
        Self { tid: tids.recv().unwrap(), ask, answers, stop, turns, thread: Some(thread) }
    }

    /// Its CPU time by its own clock, and `CLOCK_MONOTONIC` just after.
    pub(crate) fn own_time(&self) -> (u64, MonotonicNs) {
        self.ask.store(true, Ordering::Release);
        let (own, at) = self.answers.recv_timeout(PATIENCE).unwrap();
        (own, MonotonicNs(at))
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

pub(crate) fn own_tid() -> Tid {
    Tid(u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap())
}

pub(crate) fn pin(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None, &cpus).unwrap();
}

/// A real-time thread that spins on one CPU until dropped.
pub(crate) struct Bully {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bully {
    /// Returns when it runs.
    pub(crate) fn start(cpu: usize) -> Self {
        let stop = <Arc<AtomicBool>>::default();
        let stopped = Arc::clone(&stop);
        let (ready, running) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            pin(cpu);
            let parameters = libc::sched_param { sched_priority: 10 };
            // SAFETY: plain system call on this thread with a valid parameter block.
            let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
            assert_eq!(result, 0, "no real-time priority: {}", std::io::Error::last_os_error());
            ready.send(()).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        running.recv_timeout(PATIENCE).unwrap();
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Bully {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}
