//! Ctrl-C as a value: waiting functions of the lab return [`Interrupted`] instead of the process dying mid-way.

use std::io;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, Signal, kill_process};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// SIGINT or SIGTERM arrived after [`catch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// From now on the first SIGINT or SIGTERM is remembered; a second one kills as usual (and the lab still goes).
pub fn catch() {
    let handler: extern "C" fn(libc::c_int) = remember;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler is async-signal-safe: it stores an atomic and calls signal().
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Fails if a signal has arrived.
pub fn check() -> Result<(), Interrupted> {
    if REQUESTED.load(Ordering::Relaxed) { Err(Interrupted) } else { Ok(()) }
}

/// Sends SIGINT to a child, as Ctrl-C would.
pub fn send(child: &Child) -> io::Result<()> {
    Ok(kill_process(Pid::from_child(child), Signal::INT)?)
}

extern "C" fn remember(signal: libc::c_int) {
    REQUESTED.store(true, Ordering::Relaxed);
    // SAFETY: signal() is async-signal-safe, and restores the default action.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}
