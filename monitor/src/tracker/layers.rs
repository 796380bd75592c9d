//! The layers below a disk against each other: the guest's requests as QEMU counts them, QEMU's own on the host, and the
//! device's. Arithmetic on what the sources said; reads nothing itself.

use crate::{
    metric::Metric,
    sample::{Layers, Values},
    units::{MonotonicNs, SourceKind},
};

/// What the layers of each disk had counted at the last read of what QEMU knows.
#[derive(Debug, Default)]
pub(super) struct Comparison(Vec<(String, Counted)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counted {
    at: MonotonicNs,
    guest_written_bytes: Option<u64>,
    device_written_bytes: Option<u64>,
    /// Of reads, writes and flushes: by the guest's account and by the host's, nanoseconds.
    times: [Option<(u64, u64)>; 3],
}

impl Counted {
    fn now(values: &Values, at: MonotonicNs) -> Self {
        let time = |metric| values.now(SourceKind::Libvirt, metric).zip(values.now(SourceKind::Ebpf, metric));
        Self {
            at,
            guest_written_bytes: values.now(SourceKind::Libvirt, Metric::DiskWrBytes),
            device_written_bytes: values.now(SourceKind::Ebpf, Metric::DiskDeviceWrBytes),
            times: [Metric::DiskRdTime, Metric::DiskWrTime, Metric::DiskFlTime].map(time),
        }
    }

    /// What happened since an earlier state. Nothing is said of a counter that is missing or fell.
    fn since(&self, before: &Self) -> Layers {
        let rise = |now: Option<u64>, before: Option<u64>| now?.checked_sub(before?);
        let written = rise(self.guest_written_bytes, before.guest_written_bytes).filter(|bytes| *bytes > 0);
        let by_device = rise(self.device_written_bytes, before.device_written_bytes);
        #[expect(clippy::cast_precision_loss, reason = "a ratio")]
        let amplification = |(device, guest): (u64, u64)| device as f64 / guest as f64;
        let outside = |i: usize| {
            let ((guest, host), (guest_before, host_before)) = (self.times[i]?, before.times[i]?);
            guest.checked_sub(guest_before)?.checked_sub(host.checked_sub(host_before)?)
        };
        Layers {
            interval_ns: self.at.since(before.at),
            write_amplification: by_device.zip(written).map(amplification),
            rd_qemu_ns: outside(0),
            wr_qemu_ns: outside(1),
            fl_qemu_ns: outside(2),
        }
    }
}

impl Comparison {
    /// To be called once the values that QEMU knows are in the table. `None` the first time.
    pub(super) fn compare(&mut self, target: &str, values: &Values) -> Option<Layers> {
        let now = Counted::now(values, MonotonicNs::now());
        match self.0.iter_mut().find(|(of, _)| of == target) {
            Some((_, before)) => Some(now.since(&std::mem::replace(before, now))),
            None => {
                self.0.push((target.to_owned(), now));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: Counted = Counted {
        at: MonotonicNs(1_000),
        guest_written_bytes: Some(4_096),
        device_written_bytes: Some(0),
        times: [Some((10, 5)), Some((10, 5)), None],
    };

    #[test]
    fn what_the_guest_wrote_and_waited_for_is_held_against_the_host() {
        let now = Counted {
            at: MonotonicNs(3_000),
            guest_written_bytes: Some(8_192),
            device_written_bytes: Some(10_240),
            times: [Some((110, 65)), Some((20, 50)), Some((1, 1))],
        };
        let expected = Layers {
            interval_ns: 2_000,
            write_amplification: Some(2.5),
            rd_qemu_ns: Some(40),
            wr_qemu_ns: None,
            fl_qemu_ns: None,
        };
        assert_eq!(now.since(&BEFORE), expected);
    }

    #[test]
    fn nothing_is_said_of_what_is_missing_or_did_not_happen() {
        let now = Counted { device_written_bytes: None, ..BEFORE };
        assert_eq!(now.since(&BEFORE).write_amplification, None);
        assert_eq!(BEFORE.since(&BEFORE).write_amplification, None);
        let fallen = Counted { guest_written_bytes: Some(0), times: [None; 3], ..BEFORE };
        assert_eq!(fallen.since(&BEFORE), Layers { interval_ns: 0, ..Layers::default() });
    }
}
