//! The run time of a vCPU thread, split: guest mode, polling for the end of a halt, and the rest. Pure arithmetic.
//!
//! The three always sum to the run time. Guest mode is measured by the clock, between entry and exit, without what the
//! thread waited meanwhile; polling is what KVM itself says it has polled; the host's part is what is left of the run time.
//! So interrupts, which end guest mode and are no run time, are in none of them. Two things do not fit in exactly, and both
//! are settled the same way: what a hypervisor below this host took in guest mode is no run time, and the figures are
//! read some microseconds apart. Where guest mode and polling are more than the run time of an interval, they get all of it,
//! and a little of the rest is made up for in the next.

/// What is made up for later at most, nanoseconds: above what readings are apart, below what anybody would look at.
const SKEW_NS: u64 = 1_000_000;

/// The split of one thread's run time since the first reading.
#[derive(Clone, Copy, Debug, Default)]
pub struct Split {
    last: Option<Figures>,
    parts: RunParts,
    owed: RunParts,
}

/// Cumulative figures of one reading, nanoseconds, each from a zero of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// Run time by the task clock.
    pub run_ns: u64,
    /// Guest mode, by the clock.
    pub guest_ns: u64,
    /// Polling, as KVM says; `None` if it does not.
    pub halt_poll_ns: Option<u64>,
}

/// Parts of the run time since the first reading, nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunParts {
    /// In guest mode.
    pub guest_ns: u64,
    /// In the kernel and in QEMU; with polling if that is not known.
    pub host_ns: u64,
    /// Polling for the end of a halt.
    pub halt_poll_ns: u64,
}

impl Split {
    /// Adds a reading. `None` if a figure is smaller than before: that reading is wrong, and is not remembered. The time in
    /// guest mode may be a little smaller, since the stay in progress is measured by two clocks.
    pub fn add(&mut self, now: Figures) -> Option<RunParts> {
        let last = *self.last.get_or_insert(now);
        let grown = grown(&last, &now)?;
        // What was counted too much is not counted again.
        self.last = Some(Figures { guest_ns: now.guest_ns.max(last.guest_ns), ..now });
        let (poll, owed_poll) = take(grown.halt_poll_ns.unwrap_or(0), self.owed.halt_poll_ns, grown.run_ns);
        let rest = grown.run_ns - poll;
        let (guest, owed_guest) = take(grown.guest_ns, self.owed.guest_ns, rest);
        self.owed = RunParts { guest_ns: owed_guest, host_ns: 0, halt_poll_ns: owed_poll };
        self.parts.halt_poll_ns += poll;
        self.parts.guest_ns += guest;
        self.parts.host_ns += rest - guest;
        Some(self.parts)
    }
}

/// How much each figure has grown.
fn grown(last: &Figures, now: &Figures) -> Option<Figures> {
    Some(Figures {
        run_ns: now.run_ns.checked_sub(last.run_ns)?,
        guest_ns: (now.guest_ns + SKEW_NS).checked_sub(last.guest_ns)?.saturating_sub(SKEW_NS),
        halt_poll_ns: match (last.halt_poll_ns, now.halt_poll_ns) {
            (Some(last), Some(now)) => Some(now.checked_sub(last)?),
            _ => None,
        },
    })
}

/// What a part gets of `room`, and what it is still owed.
fn take(grown: u64, owed: u64, room: u64) -> (u64, u64) {
    let wanted = grown + owed;
    let got = wanted.min(room);
    (got, (wanted - got).min(SKEW_NS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(readings: &[(u64, u64, u64)], expected: (u64, u64, u64)) {
        let mut split = Split::default();
        let mut parts = None;
        for (run_ns, guest_ns, poll) in readings {
            let now = Figures { run_ns: *run_ns, guest_ns: *guest_ns, halt_poll_ns: Some(*poll) };
            parts = split.add(now);
        }
        let parts = parts.unwrap();
        assert_eq!((parts.guest_ns, parts.host_ns, parts.halt_poll_ns), expected, "{readings:?}");
        let run = readings[readings.len() - 1].0 - readings[0].0;
        assert_eq!(parts.guest_ns + parts.host_ns + parts.halt_poll_ns, run, "{readings:?}");
    }

    #[test]
    fn the_parts_sum_to_the_run_time() {
        check(&[(7, 5, 3)], (0, 0, 0));
        check(&[(1_000, 500, 9), (2_000, 1_100, 109)], (600, 300, 100));
        check(&[(0, 0, 0), (10, 10, 0), (20, 10, 10)], (10, 0, 10));
    }

    #[test]
    fn readings_some_microseconds_apart_are_made_up_for() {
        // The guest's figure was read 5 later than the run time, then at the same moment.
        check(&[(0, 0, 0), (100, 105, 0), (200, 150, 0)], (150, 50, 0));
        check(&[(0, 0, 0), (100, 0, 0), (110, 0, 15), (130, 0, 15)], (0, 115, 15));
    }

    #[test]
    fn time_taken_below_this_host_is_not_made_up_for() {
        let second = 1_000_000_000;
        check(
            &[(0, 0, 0), (second / 2, second, 0), (second, second, 0)],
            (second / 2 + SKEW_NS, second / 2 - SKEW_NS, 0),
        );
    }

    #[test]
    fn a_reading_that_goes_backwards_is_discarded_and_the_next_is_not() {
        let mut split = Split::default();
        let at = |run_ns, guest_ns| Figures { run_ns, guest_ns, halt_poll_ns: Some(0) };
        split.add(at(0, 0)).unwrap();
        split.add(at(10 * SKEW_NS, 5 * SKEW_NS)).unwrap();
        for wrong in [
            at(9 * SKEW_NS, 5 * SKEW_NS),
            at(11 * SKEW_NS, 3 * SKEW_NS),
            Figures { halt_poll_ns: None, ..at(9 * SKEW_NS, 0) },
        ] {
            assert_eq!(split.add(wrong), None, "{wrong:?}");
        }
        assert_eq!(split.add(at(20 * SKEW_NS, 7 * SKEW_NS)).unwrap().guest_ns, 7 * SKEW_NS);
    }

    #[test]
    fn what_two_clocks_differ_by_is_not_counted_twice() {
        check(&[(0, 0, 0), (100, 60, 0), (200, 55, 0), (300, 70, 0)], (70, 230, 0));
    }
}
