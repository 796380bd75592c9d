//! What a source's claim of a truth comes to: right, explained by a named cause, or wrong. Pure.

use crate::{
    compare::{
        amount::{amount, percent, signed},
        report::Verdict,
        truth::{Claim, Watch},
    },
    metric::Scope,
    reconcile::{
        Allowance, Cause,
        causes::{Moment, Subject},
        real, real_difference,
    },
    units::{SourceKind, Unit},
};

/// Of times, so much of the truth may stay unexplained: clocks differ by that.
const TOLERATED_SHARE: f64 = 0.001;
/// What makes the host's view of a quantity another one than the guest's.
const HOST_AND_GUEST: [Cause; 6] = [
    Cause::Backlog,
    Cause::QemuOpen,
    Cause::Qcow2Metadata,
    Cause::FlushElided,
    Cause::QemuFlush,
    Cause::Throttle,
];

/// The result.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ClaimJudgement {
    pub(super) verdict: Verdict,
    pub(super) causes: Vec<Cause>,
    /// How far the truth lies outside of what the source says, and no cause explains it.
    pub(super) unexplained: f64,
    pub(super) reason: String,
}

/// What a claim is about, beside the watch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known<'a> {
    /// Format and cache mode of the disk.
    pub(super) image: Option<&'a (String, String)>,
    /// How often QEMU stopped the guest.
    pub(super) stops: u64,
}

/// Judges what a source says.
pub(super) fn judge(
    watch: &Watch,
    (source, claim): (SourceKind, Claim),
    known: Known<'_>,
) -> Option<ClaimJudgement> {
    let (def, truth) = (watch.def()?, real(watch.truth.value));
    let (off, unit) = (off(truth, claim), def.unit);
    let judgement = |verdict, causes, reason| {
        let unexplained = if verdict == Verdict::Disagree { off.abs() } else { 0.0 };
        Some(ClaimJudgement { verdict, causes, unexplained, reason })
    };
    if off.abs() <= tolerated(truth, unit) {
        return judgement(Verdict::Agree, Vec::new(), agrees(truth, claim, unit));
    }
    if def.scope == Scope::Memory && def.metric != crate::metric::Metric::MemoryActual {
        return match (watch.reported_ns, watch.truth.at_ns) {
            (Some(reported), Some(at)) if reported < at => {
                let age = crate::compare::amount::time(real(at - reported));
                let reason =
                    format!("the guest's report was {age} old: {}", Cause::StaleBalloon.explanation());
                judgement(Verdict::Explained, vec![Cause::StaleBalloon], reason)
            }
            _ => {
                let reason = "the guest reported later, or nobody knows when".to_owned();
                judgement(Verdict::NotComparable, Vec::new(), reason)
            }
        };
    }
    if let Some(causes) = between_host_and_guest(watch, (source, claim), known) {
        let reasons: Vec<&str> = causes.iter().map(|c| c.explanation()).collect();
        let reason = reasons.join("; ");
        return judgement(Verdict::Explained, causes, reason);
    }
    let share =
        if truth > 0.0 { format!(" ({})", signed(percent(off / truth * 100.0))) } else { String::new() };
    let (size, more) = (amount(off.abs(), unit), if off > 0.0 { "too much" } else { "too little" });
    judgement(Verdict::Disagree, Vec::new(), format!("{size}{share} {more}, and no known cause explains it"))
}

/// The causes that make the host's view another one, if they account for what a source says.
fn between_host_and_guest(
    watch: &Watch,
    (source, claim): (SourceKind, Claim),
    known: Known<'_>,
) -> Option<Vec<Cause>> {
    let (def, truth) = (watch.def()?, real(watch.truth.value));
    let [image_format, image_cache] = known.image.map_or([None; 2], |(format, cache)| {
        [format, cache].map(|text| Some(text.as_str()).filter(|text| !text.is_empty()))
    });
    // The truth is the guest's, as libvirt's figures are.
    let (reference, other) = (SourceKind::Ebpf, SourceKind::Libvirt);
    let subject = Subject { def, reference, other, image_format, image_cache, clock_tick_ns: 0, cpus: 1 };
    // One packet more QEMU has read already, and keeps.
    let queued = match source {
        SourceKind::Ebpf => watch.backlog_packets,
        SourceKind::Procfs | SourceKind::Libvirt => 0,
    };
    let backlog_packets = (watch.backlog_packets > 0).then_some(queued + 1);
    let moment = Moment { backlog_packets, stops: known.stops, ..Moment::default() };
    let mut sum = Allowance::NOTHING;
    let mut causes = Vec::new();
    let ours = |cause: &Cause| match cause {
        Cause::Backlog => true,
        // An image is opened before anything is known to begin.
        Cause::QemuOpen => source == SourceKind::Ebpf && watch.truth.between_ns.is_none(),
        _ => source == SourceKind::Ebpf,
    };
    for cause in HOST_AND_GUEST.into_iter().filter(|c| c.applies(&subject) && ours(c)) {
        let more = cause.allows(&subject, &moment);
        sum = sum.and(more);
        // A cause that works in the other direction has no part in it.
        let less = off(truth, claim) > 0.0;
        if if less { more.low < 0 } else { more.high > 0 } {
            causes.push(cause);
        }
        let fits = truth - claim.at_most <= real_difference(sum.high)
            && truth - claim.at_least >= real_difference(sum.low);
        if fits {
            return Some(causes);
        }
    }
    None
}

fn agrees(truth: f64, claim: Claim, unit: Unit) -> String {
    if (claim.value - truth).abs() < 0.5 {
        return "exactly right".to_owned();
    }
    let (low, high) = (amount(claim.at_least, unit), amount(claim.at_most, unit));
    format!("right: its readings say that it was between {low} and {high}")
}

/// How much more a source says than what was true; less, if negative; 0 within its bounds.
pub(super) fn off(truth: f64, claim: Claim) -> f64 {
    if truth < claim.at_least {
        claim.at_least - truth
    } else if truth > claim.at_most {
        claim.at_most - truth
    } else {
        0.0
    }
}

fn tolerated(truth: f64, unit: Unit) -> f64 {
    if unit == Unit::Nanoseconds { TOLERATED_SHARE * truth } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::truth::Truth;

    struct Case {
        at: (&'static str, &'static str),
        truth: u64,
        says: [f64; 2],
        image: Option<(&'static str, &'static str)>,
    }

    fn of(
        case: &Case,
        source: SourceKind,
        prepare: impl FnOnce(&mut Watch),
    ) -> (Verdict, Vec<&'static str>, f64) {
        let mut watch = Watch::new(Truth {
            scope: case.at.0.into(),
            metrics: vec![case.at.1.into()],
            value: case.truth,
            ..Truth::default()
        });
        prepare(&mut watch);
        let [at_least, at_most] = case.says;
        let claim = Claim { value: at_most, at_least, at_most };
        let image = case.image.map(|(format, cache)| (format.to_owned(), cache.to_owned()));
        let found = judge(&watch, (source, claim), Known { image: image.as_ref(), stops: 1 }).unwrap();
        (found.verdict, found.causes.iter().map(|c| c.name()).collect(), found.unexplained)
    }

    #[test]
    fn counts_have_to_be_exact_or_framed() {
        let check = |truth, says, expected: (Verdict, f64)| {
            let case = Case { at: ("interfaces", "rx_packets"), truth, says, image: None };
            let (verdict, _, unexplained) = of(&case, SourceKind::Libvirt, |_| {});
            assert_eq!((verdict, unexplained), expected, "{truth} {says:?}");
        };
        check(100, [100.0, 100.0], (Verdict::Agree, 0.0));
        check(100, [90.0, 110.0], (Verdict::Agree, 0.0));
        check(100, [101.0, 101.0], (Verdict::Disagree, 1.0));
        check(100, [80.0, 95.0], (Verdict::Disagree, 5.0));
        check(0, [3.0, 3.0], (Verdict::Disagree, 3.0));
    }

    #[test]
    fn times_may_differ_by_a_thousandth() {
        let check = |says, expected: Verdict| {
            let case = Case { at: ("vcpus", "run_ns"), truth: 1_000_000, says, image: None };
            assert_eq!(of(&case, SourceKind::Ebpf, |_| {}).0, expected, "{says:?}");
        };
        check([1_000_900.0, 1_100_000.0], Verdict::Agree);
        check([1_002_000.0, 1_100_000.0], Verdict::Disagree);
        check([900_000.0, 990_000.0], Verdict::Disagree);
    }

    #[test]
    fn host_and_guest_differ_for_known_reasons_in_known_directions() {
        let disk = |metric, truth, says, image| Case { at: ("disks", metric), truth, says, image };
        let check = |case: Case, expected: (Verdict, &[&str])| {
            let (verdict, causes, _) = of(&case, SourceKind::Ebpf, |_| {});
            assert_eq!((verdict, causes.as_slice()), expected, "{:?} {:?}", case.at, case.says);
        };
        let (raw, qcow2) = (Some(("raw", "none")), Some(("qcow2", "none")));
        let cached = Some(("raw", "writeback"));
        check(disk("fl_req", 3, [1.0, 1.0], raw), (Verdict::Explained, &["flush_elided"]));
        // The guest was stopped once, and may be being stopped.
        check(disk("fl_req", 3, [5.0, 5.0], raw), (Verdict::Explained, &["qemu_flush"]));
        check(disk("fl_req", 3, [6.0, 6.0], raw), (Verdict::Disagree, &[]));
        check(disk("wr_req", 3, [4.0, 4.0], raw), (Verdict::Disagree, &[]));
        check(disk("wr_req", 3, [4.0, 4.0], qcow2), (Verdict::Explained, &["qcow2_metadata"]));
        check(disk("rd_req", 3, [16.0, 16.0], cached), (Verdict::Explained, &["qemu_open"]));
        check(disk("rd_req", 3, [16.0, 16.0], raw), (Verdict::Disagree, &[]));
        check(disk("rd_req", 3, [2.0, 2.0], cached), (Verdict::Disagree, &[]));
        // libvirt has the guest's figures.
        let (verdict, ..) = of(&disk("fl_req", 3, [1.0, 1.0], raw), SourceKind::Libvirt, |_| {});
        assert_eq!(verdict, Verdict::Disagree);
    }

    #[test]
    fn what_waits_in_the_queue_was_not_taken() {
        let with = |source, says: f64, packets| {
            let case = Case { at: ("interfaces", "rx_packets"), truth: 0, says: [says, says], image: None };
            of(&case, source, |watch| watch.backlog_packets = packets).0
        };
        assert_eq!(with(SourceKind::Ebpf, 300.0, 299), Verdict::Explained);
        assert_eq!(with(SourceKind::Ebpf, 301.0, 299), Verdict::Disagree);
        assert_eq!(with(SourceKind::Libvirt, 1.0, 299), Verdict::Explained);
        assert_eq!(with(SourceKind::Libvirt, 2.0, 299), Verdict::Disagree);
        assert_eq!(with(SourceKind::Libvirt, 1.0, 0), Verdict::Disagree);
    }

    #[test]
    fn an_old_report_explains_memory_and_a_newer_one_says_nothing() {
        let case = |metric| Case { at: ("memory", metric), truth: 10, says: [20.0, 20.0], image: None };
        let at = |metric, reported_ns| {
            let found = of(&case(metric), SourceKind::Libvirt, |watch| {
                (watch.truth.at_ns, watch.reported_ns) = (Some(5_000), reported_ns);
            });
            found.0
        };
        assert_eq!(at("unused_bytes", Some(1_000)), Verdict::Explained);
        assert_eq!(at("unused_bytes", Some(6_000)), Verdict::NotComparable);
        assert_eq!(at("unused_bytes", None), Verdict::NotComparable);
        assert_eq!(at("actual_bytes", Some(1_000)), Verdict::Disagree);
    }
}
