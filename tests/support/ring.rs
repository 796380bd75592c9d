//! Threads that pass a token on: every hop is a switch.

#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![allow(dead_code, reason = "no test program uses all of it")]

use std::{
    fs::File,
    io::{Read as _, Write as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use monitor::units::Tid;
use rustix::thread::{CpuSet, sched_setaffinity};

/// Threads that pass a token on through pipes, all on one CPU; they end when it is dropped.
pub(crate) struct Ring {
    pub(crate) tids: Vec<Tid>,
    pub(crate) hops: Arc<AtomicU64>,
    start: File,
    pause_us: Arc<AtomicU64>,
}

impl Ring {
    /// They wait for [`Ring::begin`].
    pub(crate) fn new(threads: usize, cpu: usize) -> Self {
        let pipes: Vec<_> = (0..threads).map(|_| rustix::pipe::pipe().unwrap()).collect();
        let hops = Arc::new(AtomicU64::new(0));
        let pause_us = Arc::new(AtomicU64::new(0));
        let (tell, tids) = std::sync::mpsc::channel();
        let start = File::from(pipes[0].1.try_clone().unwrap());
        for i in 0..threads {
            let mut from = File::from(pipes[i].0.try_clone().unwrap());
            let mut to = File::from(pipes[(i + 1) % threads].1.try_clone().unwrap());
            let (tell, hops) = (tell.clone(), Arc::clone(&hops));
            let pause_us = (i == 0).then(|| Arc::clone(&pause_us));
            std::thread::spawn(move || {
                let mut cpus = CpuSet::new();
                cpus.set(cpu);
                sched_setaffinity(None, &cpus).unwrap();
                tell.send(rustix::thread::gettid()).unwrap();
                let mut token = [0];
                while from.read(&mut token).unwrap() == 1 && token[0] == b'x' {
                    hops.fetch_add(1, Ordering::Relaxed);
                    let pause_us = pause_us.as_ref().map_or(0, |pause| pause.load(Ordering::Relaxed));
                    if pause_us != 0 {
                        std::thread::sleep(Duration::from_micros(pause_us));
                    }
                    if to.write_all(&token).is_err() {
                        return; // The ring has ended.
                    }
                }
                let _ = to.write_all(b"q"); // The next one ends as well.
            });
        }
        let tid = |_| Tid(u32::try_from(tids.recv().unwrap().as_raw_nonzero().get()).unwrap());
        Self { tids: (0..threads).map(tid).collect(), hops, start, pause_us }
    }

    /// Lets the token rest so long on each of its rounds, which leaves their CPU to others: threads that always come from a
    /// sleep take all of it else, whatever their priority.
    pub(crate) fn rest(&self, pause: Duration) {
        self.pause_us.store(u64::try_from(pause.as_micros()).unwrap(), Ordering::Relaxed);
    }

    /// Gives them the token.
    pub(crate) fn begin(&mut self) {
        self.start.write_all(b"x").unwrap();
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let _ = self.start.write_all(b"q"); // Fails only if they have ended.
    }
}
