//! Moments at even distances, kept by a timer of the kernel's.
//!
//! The runtime's own timers are good to a millisecond, and each that is set wakes the runtime once more, which at a
//! hundred ticks a second is a good part of what they cost.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::{Interest, unix::AsyncFd};

/// The moments of one distance, the first at once.
#[derive(Debug)]
pub struct Pace(AsyncFd<OwnedFd>);

impl Pace {
    /// Starts; a distance of less than a nanosecond is one.
    ///
    /// # Errors
    /// If there are no more descriptors.
    ///
    /// # Panics
    /// Outside a runtime with I/O.
    pub fn start(distance: Duration) -> io::Result<Self> {
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let soon = timespec(Duration::from_nanos(1));
        let it_interval = timespec(distance.max(Duration::from_nanos(1)));
        let when = Itimerspec { it_interval, it_value: soon };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &when)?;
        // SAFETY: an owned descriptor stays the same open file until the `AsyncFd` that owns it is dropped.
        let timer = unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) };
        Ok(Self(timer?))
    }

    /// Waits for the next moment. Returns how many have passed unseen before it. Cancel safe.
    pub async fn next(&mut self) -> u64 {
        loop {
            // It fails when the runtime ends, and then nobody waits any more.
            let Ok(mut ready) = self.0.readable().await else { std::future::pending().await };
            let mut passed = [0; 8];
            let read = rustix::io::read(ready.get_inner().as_fd(), &mut passed);
            // The timer is empty now, or was; it makes itself known again when it expires.
            ready.clear_ready();
            if read == Ok(passed.len()) {
                return u64::from_ne_bytes(passed).saturating_sub(1);
            }
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    let tv_sec = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    Timespec { tv_sec, tv_nsec: duration.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn moments_that_nobody_waited_for_are_counted() {
        let distance = Duration::from_millis(2);
        // Before it starts: else a pause between the two is missing from the time.
        let begin = std::time::Instant::now();
        let mut pace = Pace::start(distance).unwrap();
        let mut moments = 0;
        for _ in 0..20 {
            moments += 1 + pace.next().await;
        }
        // Nobody looks for some of them.
        std::thread::sleep(5 * distance);
        let unseen = pace.next().await;
        assert!(unseen >= 3, "{unseen}");
        moments += 1 + unseen;
        // The first came at once: not one more than there is time for.
        let most = begin.elapsed().as_nanos() / distance.as_nanos() + 1;
        assert!(u128::from(moments) <= most, "{moments} of {most}");
    }
}
