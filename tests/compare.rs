//! `compare` on streams made by hand in the form that DESIGN.md and `record` fix: sources that are both right, sources
//! that are off for a known reason, and sources that were tampered with. Each finding has to come out by itself, and
//! each kind of damaged line has to be named with its number while the rest is used.
//!
//! Needs no rights and no clock.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use monitor::{
    compare::{
        Report,
        input::Kind,
        report::{ComparisonReport, Finding, Verdict},
        truth::Truth,
    },
    recorded::Feed,
    sink::report::{Format, render},
};
use serde_json::{Value, json};

const SECOND: u64 = 1_000_000_000;
const SECONDS: u64 = 120;
const UUID: &str = "4d5e0e2b-3c1f-4a7b-9d8e-0123456789ab";

// What really happens: a guest whose load changes every second, with pauses.

/// Packets received by the guest up to a time.
fn packets(at: u64) -> u64 {
    let (second, part) = (at / SECOND, at % SECOND);
    let rate = |s: u64| if s % 9 < 2 { 0 } else { 400 + 100 * (s % 4) };
    (0..second).map(rate).sum::<u64>() + rate(second) * part / SECOND
}

/// Packets sent: other seconds are busy.
fn sent(at: u64) -> u64 {
    packets(at + 4 * SECOND) / 3
}

/// CPU time of the vCPU: some share of each second, in one go.
fn run(at: u64) -> u64 {
    let (second, part) = (at / SECOND, at % SECOND);
    let share = |s: u64| (s % 10) * SECOND / 10;
    (0..second).map(share).sum::<u64>() + part.min(share(second))
}

/// What each source says at a moment; a source that is not read is absent.
type Says = Box<dyn Fn(u64) -> u64>;

struct Figure {
    scope: &'static str,
    metric: &'static str,
    ebpf: Option<Says>,
    procfs: Option<Says>,
    libvirt: Option<Says>,
}

fn says(f: impl Fn(u64) -> u64 + 'static) -> Option<Says> {
    Some(Box::new(f))
}

fn figure(scope: &'static str, metric: &'static str) -> Figure {
    Figure { scope, metric, ebpf: None, procfs: None, libvirt: None }
}

/// A figure of which eBPF and libvirt say so.
fn both(
    scope: &'static str,
    metric: &'static str,
    ebpf: impl Fn(u64) -> u64 + 'static,
    libvirt: impl Fn(u64) -> u64 + 'static,
) -> Figure {
    Figure { ebpf: says(ebpf), libvirt: says(libvirt), ..figure(scope, metric) }
}

fn session() -> Value {
    json!({"type": "session", "schema_version": 1, "tool_version": "0.1.0",
        "host": {"hostname": "host1", "kernel": "6.12", "boot_id": "b", "cpus": 4, "hz": 100},
        "clock": {"arithmetic": "CLOCK_MONOTONIC", "mono_ns": SECOND, "ts": wall(SECOND)},
        "interval_ns": SECOND,
        "sources": {"ebpf": {"available": true}, "libvirt": {"available": true}, "procfs": {"available": true}}})
}

fn domain(disk_format: &str, nic: &str) -> Value {
    json!({"type": "domain", "ts": wall(SECOND), "mono_ns": SECOND, "change": "appeared", "reason": "x", "epoch": 0,
        "domain": {"uuid": UUID, "name": "web1", "state": "running", "virt_type": "kvm", "vcpus": [{"vcpu": 0}],
            "interfaces": [{"device": "tap1", "type": nic}],
            "disks": [{"target": "vda", "source_type": "file", "format": disk_format, "cache": "none"}],
            "memory": {}, "balloon": {"model": "virtio", "stats_period_s": 10}}})
}

fn wall(mono: u64) -> String {
    format!("2027-01-15T08:{:02}:{:02}.000000000Z", mono / SECOND / 60, mono / SECOND % 60)
}

/// eBPF and procfs are read at each second, libvirt 0.3 s before.
fn sample(seq: u64, figures: &[Figure], extra: &Value) -> Value {
    let tick = (seq + 1) * SECOND;
    let (ebpf, procfs, libvirt) = (tick, tick + 50_000, tick - 300_000_000);
    let value = |f: &Figure| {
        let mut sources = serde_json::Map::new();
        for (name, says, at) in [
            ("ebpf", &f.ebpf, ebpf + 10_000),
            ("procfs", &f.procfs, procfs + 20_000),
            ("libvirt", &f.libvirt, libvirt + 400_000),
        ] {
            if let Some(says) = says {
                sources.insert(name.to_owned(), says(at).into());
            }
        }
        Value::Object(sources)
    };
    let part = |scope: &str, identity: Value| {
        let mut object = identity;
        for f in figures.iter().filter(|f| f.scope == scope) {
            object[f.metric] = value(f);
        }
        if let Some(more) = extra.get(scope).and_then(Value::as_object) {
            more.iter().for_each(|(k, v)| object[k] = v.clone());
        }
        object
    };
    let windows = json!({"ebpf": [ebpf, ebpf + 20_000], "procfs": [procfs, procfs + 40_000],
        "libvirt": [libvirt, libvirt + 800_000]});
    json!({"type": "sample", "seq": seq, "ts": wall(tick), "mono_ns": tick, "interval_ns": SECOND,
        "domain": {"uuid": UUID, "name": "web1"}, "epoch": 0, "windows": windows,
        "cpu": part("cpu", json!({})), "vcpus": [part("vcpus", json!({"vcpu": 0}))],
        "interfaces": [part("interfaces", json!({"device": "tap1"}))],
        "disks": [part("disks", json!({"target": "vda"}))], "memory": part("memory", json!({}))})
}

fn ends() -> [Value; 2] {
    [
        json!({"type": "health", "mono_ns": 1, "sources": {"ebpf": {"reads": 120, "errors": 0, "lost": 1}},
            "programs": {"sched_switch": {"run_count": 1000, "run_ns": 90_000}}, "misses": {"kfree_skb": 7}, "cpu_ns": 5_000_000,
            "rss_bytes": 9_000_000}),
        json!({"type": "summary", "reason": "SIGINT", "ticks": 120, "ticks_missed": 2, "records_dropped": 3,
            "wall_ns": 120 * SECOND, "cpu_ns": 5_000_000}),
    ]
}

fn lines(head: &[Value], figures: &[Figure], extra: &Value) -> Vec<String> {
    let samples = (0..SECONDS).map(|seq| sample(seq, figures, extra));
    head.iter().cloned().chain(samples).chain(ends()).map(|line| type_first(&line)).collect()
}

/// serde_json sorts keys; the stream has `type` first.
fn type_first(line: &Value) -> String {
    let mut rest = line.clone();
    let kind = rest.as_object_mut().unwrap().remove("type").unwrap();
    format!("{{\"type\":{kind},{}", &rest.to_string()[1..])
}

fn report_of(lines: &[String], limit_pct: Option<f64>) -> Report {
    let mut feed = Feed::new(Vec::new(), Vec::new());
    lines.iter().for_each(|line| feed.push(format!("{line}\n").as_bytes()));
    feed.finish(limit_pct)
}

fn report(figures: Vec<Figure>) -> Report {
    report_in("raw", "bridge", figures)
}

fn report_in(disk_format: &str, nic: &str, figures: Vec<Figure>) -> Report {
    report_of(&lines(&[session(), domain(disk_format, nic)], &figures, &json!({})), Some(0.5))
}

fn comparison<'a>(report: &'a Report, metric: &str, other: &str) -> &'a ComparisonReport {
    let metrics = report.domains.iter().flat_map(|d| &d.entities).flat_map(|e| &e.metrics);
    let comparisons = metrics.filter(|m| m.metric == metric).flat_map(|m| &m.comparisons);
    comparisons.into_iter().find(|c| c.other == other).unwrap_or_else(|| panic!("no {metric} {{{other}}}"))
}

fn finding<'a>(report: &'a Report, cause: &str) -> &'a Finding {
    let found = report.findings.iter().find(|f| f.cause == cause);
    found.unwrap_or_else(|| panic!("no finding {cause}: {:#?}", report.findings))
}

fn bytes(at: u64) -> u64 {
    packets(at) * 1_042
}

#[test]
fn sources_that_are_right_agree_exactly() {
    let report = report(vec![
        both("interfaces", "rx_bytes", bytes, |at| 7_000 + bytes(at)),
        both("interfaces", "rx_packets", packets, packets),
        both("interfaces", "tx_packets", sent, sent),
        both("disks", "wr_req", sent, sent),
    ]);
    for metric in ["rx_bytes", "rx_packets", "tx_packets", "wr_req"] {
        let of = comparison(&report, metric, "libvirt");
        assert_eq!((of.verdict, of.unexplained), (Verdict::Agree, 0.0), "{metric}: {of:?}");
        assert_eq!(of.ticks, SECONDS - 2, "{metric}");
    }
    assert!(report.findings.is_empty(), "{:#?}", report.findings);
    assert_eq!((report.summary.compared, report.summary.exceeded), (4, false));
}

#[test]
fn one_per_cent_too_many_bytes_is_detected_and_named() {
    let report = report(vec![both("interfaces", "rx_bytes", bytes, |at| bytes(at) * 101 / 100)]);
    let of = comparison(&report, "rx_bytes", "libvirt");
    assert_eq!((of.verdict, of.looks_like), (Verdict::Disagree, Some("factor")), "{of:?}");
    assert!(of.reason.contains("+1.0"), "{}", of.reason);
    assert!(report.summary.exceeded && report.summary.largest_unexplained_pct > 0.5);
}

#[test]
fn a_swapped_direction_is_detected_and_named() {
    let figures = |nic| {
        let received = both("interfaces", "rx_packets", packets, sent);
        report_in("raw", nic, vec![received, both("interfaces", "tx_packets", sent, packets)])
    };
    let swapped = figures("bridge");
    let of = comparison(&swapped, "rx_packets", "libvirt");
    assert_eq!((of.verdict, of.looks_like), (Verdict::Disagree, Some("direction")), "{of:?}");
    // Of macvtap libvirt is known to show the host's view.
    let macvtap = figures("direct");
    let of = comparison(&macvtap, "rx_packets", "libvirt");
    assert_eq!((of.verdict, of.looks_like, of.unexplained), (Verdict::Explained, Some("direction"), 0.0));
}

#[test]
fn a_lost_second_is_detected_and_placed() {
    let lost = |at: u64| packets(at) - (packets(at.min(61 * SECOND)) - packets(at.min(60 * SECOND)));
    let report = report(vec![both("interfaces", "rx_packets", packets, lost)]);
    let of = comparison(&report, "rx_packets", "libvirt");
    assert_eq!((of.verdict, of.looks_like), (Verdict::Disagree, Some("step")), "{of:?}");
    let missing = u32::try_from(packets(61 * SECOND) - packets(60 * SECOND)).unwrap();
    assert!(
        of.unexplained > 0.0 && of.unexplained <= f64::from(missing) * 1.1,
        "{} of {missing}",
        of.unexplained
    );
    assert!(of.reason.contains("lost about 5") || of.reason.contains("lost about 6"), "{}", of.reason);
}

#[test]
fn a_lost_second_of_even_traffic_is_detected_too() {
    // Each reading alone leaves room for a second's worth; all of them together do not.
    let even = |at: u64| at / 1_000_000;
    let lost = move |at: u64| even(at) - if at > 60 * SECOND { 1_000 } else { 0 };
    let report = report(vec![both("interfaces", "rx_packets", even, lost)]);
    let of = comparison(&report, "rx_packets", "libvirt");
    assert_eq!((of.verdict, of.looks_like), (Verdict::Disagree, Some("step")), "{of:?}");
    assert!(of.reason.contains("were lost about"), "{}", of.reason);
}

#[test]
fn a_source_that_is_three_seconds_late_is_detected_and_named() {
    let report =
        report(vec![both("interfaces", "rx_packets", packets, |at| packets(at.saturating_sub(3 * SECOND)))]);
    let of = comparison(&report, "rx_packets", "libvirt");
    assert_eq!((of.verdict, of.looks_like), (Verdict::Disagree, Some("late")), "{of:?}");
    assert!(of.reason.contains("3.000 s"), "{}", of.reason);
}

#[test]
fn a_counter_that_stands_still_is_detected() {
    let report = report(vec![both("disks", "wr_req", packets, |_| 5)]);
    let of = comparison(&report, "wr_req", "libvirt");
    assert_eq!((of.verdict, of.looks_like), (Verdict::Disagree, Some("constant")));
}

#[test]
fn clock_ticks_are_a_cause_with_a_size() {
    let ticks = |at: u64| run(at) / 10_000_000 * 10_000_000;
    let figures = vec![Figure { procfs: says(run), ..both("vcpus", "run_ns", run, ticks) }];
    let report = report(figures);
    let of = comparison(&report, "run_ns", "libvirt");
    assert!(of.verdict != Verdict::Disagree && of.unexplained == 0.0, "{of:?}");
    let of = comparison(&report, "run_ns", "procfs");
    assert_eq!(of.verdict, Verdict::Agree, "{of:?}");
    let late = |at: u64| (run(at) + 7_000_000 * (at / SECOND % 2)) / 10_000_000 * 10_000_000;
    let report = self::report(vec![both("vcpus", "run_ns", run, late)]);
    let of = comparison(&report, "run_ns", "libvirt");
    assert!(of.verdict != Verdict::Disagree, "{of:?}");
}

#[test]
fn a_constant_wait_is_said_to_be_kept_by_nobody_and_ceilometer_to_count_it_twice() {
    let wait = |at: u64| run(at) / 4;
    let report = report(vec![
        both("vcpus", "run_ns", run, run),
        both("vcpus", "wait_ns", wait, wait),
        Figure { libvirt: says(|_| 0), ..figure("vcpus", "libvirt_wait_ns") },
    ]);
    assert!(finding(&report, "not_kept").explanation.contains("constantly 0"));
    let ceilometer = finding(&report, "ceilometer_wait");
    assert!(ceilometer.sentence.contains("25.") && ceilometer.amount > 1e9, "{ceilometer:?}");
    assert!(!report.summary.exceeded);
}

#[test]
fn cpu_time_above_the_sum_of_vcpus_is_the_emulators() {
    let report = report(vec![
        Figure { ebpf: says(run), ..figure("cpu", "vcpu_run_ns") },
        Figure { libvirt: says(|at| run(at) + at / 50), ..figure("cpu", "time_ns") },
    ]);
    let found = finding(&report, "emulator_included");
    assert!((found.amount - 119e9 / 50.0).abs() < 0.1e9, "{found:?}");
}

#[test]
fn a_header_per_packet_is_recognized() {
    let report = report(vec![
        both("interfaces", "tx_packets", sent, sent),
        both("interfaces", "tx_bytes", |at| sent(at) * 1_028, |at| sent(at) * 1_042),
    ]);
    let of = comparison(&report, "tx_bytes", "libvirt");
    assert_eq!((of.verdict, of.explained[0].cause), (Verdict::Explained, "eth_header"), "{of:?}");
    assert!(of.reason.starts_with("+14 bytes"), "{}", of.reason);
}

#[test]
fn a_backlog_explains_what_the_guest_did_not_take() {
    // From second 60 on the guest takes nothing.
    let taken = |at: u64| packets(at.min(60 * SECOND));
    let delivered = |at: u64| packets(at.min(62 * SECOND));
    let figures = [both("interfaces", "rx_packets", delivered, taken)];
    let head = [session(), domain("raw", "bridge")];
    let backlog = delivered(SECONDS * SECOND) - taken(SECONDS * SECOND);
    let mut lines = lines(&head, &figures, &json!({}));
    let with = report_of(&lines, None);
    assert_eq!(comparison(&with, "rx_packets", "libvirt").verdict, Verdict::Disagree, "no backlog is known");
    for line in &mut lines {
        *line = line.replace(
            "\"device\":\"tap1\",",
            &format!("\"device\":\"tap1\",\"rx_backlog_packets\":{{\"ebpf\":{backlog}}},"),
        );
    }
    assert!(finding(&report_of(&lines, None), "backlog").amount > 0.0);
}

#[test]
fn disks_whose_host_and_guest_side_differ_by_nature() {
    let half = |at: u64| packets(at) / 2;
    let raw = report(vec![both("disks", "wr_bytes", half, packets)]);
    assert_eq!(comparison(&raw, "wr_bytes", "libvirt").verdict, Verdict::Disagree);
    let qcow2 = report_in("qcow2", "bridge", vec![both("disks", "wr_bytes", half, packets)]);
    assert_eq!(comparison(&qcow2, "wr_bytes", "libvirt").explained[0].cause, "qcow2_metadata");
    let flushes = report(vec![both("disks", "fl_req", half, packets)]);
    assert_eq!(comparison(&flushes, "fl_req", "libvirt").explained[0].cause, "flush_elided");
    // The host never flushes more often than the guest.
    let wrong = report(vec![both("disks", "fl_req", packets, half)]);
    assert_eq!(comparison(&wrong, "fl_req", "libvirt").verdict, Verdict::Disagree);
    let throttled = report(vec![both("disks", "rd_time_ns", run, |at| run(at) * 3)]);
    assert_eq!(comparison(&throttled, "rd_time_ns", "libvirt").explained[0].cause, "throttle");
    let opened = || both("disks", "rd_req", |at| packets(at) + if at > 9 * SECOND { 13 } else { 0 }, packets);
    // With direct I/O, these reads are told apart by the monitor.
    assert_eq!(comparison(&report(vec![opened()]), "rd_req", "libvirt").verdict, Verdict::Disagree);
    let cached = type_first(&domain("raw", "bridge")).replace("\"none\"", "\"writeback\"");
    let mut lines = lines(&[session()], &[opened()], &json!({}));
    lines.insert(1, cached);
    let opened = report_of(&lines, None);
    assert_eq!(comparison(&opened, "rd_req", "libvirt").explained[0].cause, "qemu_open");
}

#[test]
fn a_flush_when_the_guest_is_stopped_is_qemus_own() {
    let stop = 60 * SECOND;
    let flushed = || both("disks", "fl_req", move |at| u64::from(at > stop), |_| 0);
    let written = || both("disks", "wr_req", sent, sent);
    let head = [session(), domain("raw", "bridge")];
    let found = report_of(&lines(&head, &[flushed(), written()], &json!({})), None);
    assert_eq!(finding(&found, "qemu_flush").verdict, Verdict::Explained);
    // But not any number of them.
    let often = both("disks", "fl_req", move |at| 4 * u64::from(at > stop), |_| 0);
    let mut lines = lines(&head, &[often, written()], &json!({}));
    let verdict = |lines: &[String]| comparison(&report_of(lines, None), "fl_req", "libvirt").verdict;
    assert_eq!(verdict(&lines), Verdict::Disagree);
    let paused =
        json!({"type": "event", "kind": "paused", "domain": {"uuid": UUID, "name": "web1"}, "detail": ""});
    for _ in 0..3 {
        lines.insert(20, type_first(&paused));
    }
    assert_eq!(verdict(&lines), Verdict::Explained);
}

#[test]
fn a_wait_that_libvirt_reads_is_counted_twice_by_ceilometer() {
    let wait = |at: u64| run(at) / 2;
    let report = report(vec![
        both("vcpus", "run_ns", run, run),
        both("vcpus", "wait_ns", wait, wait),
        Figure { libvirt: says(wait), ..figure("vcpus", "libvirt_wait_ns") },
    ]);
    let found = finding(&report, "ceilometer_wait");
    assert!(found.sentence.contains("not using one: 50.") && found.amount > 1e9, "{found:?}");
    assert!(report.findings.iter().all(|f| f.cause != "not_kept"), "{:#?}", report.findings);
}

#[test]
fn packets_cut_for_the_wire_are_segmentation_offload() {
    let report = report(vec![
        both("interfaces", "tx_packets", sent, sent),
        Figure { ebpf: says(|at| 3 * sent(at)), ..figure("interfaces", "tx_wire_packets") },
    ]);
    let found = finding(&report, "gso");
    let total = f64::from(u32::try_from(sent(SECONDS * SECOND)).unwrap());
    assert!((found.amount / (2.0 * total) - 1.0).abs() < 0.05, "{found:?}");
}

#[test]
fn what_the_page_cache_absorbs_is_the_difference_to_the_device() {
    let with = |device: fn(u64) -> u64| {
        report(vec![
            Figure { ebpf: says(bytes), ..figure("disks", "wr_bytes") },
            Figure { ebpf: says(device), ..figure("disks", "device_wr_bytes") },
        ])
    };
    assert!(finding(&with(|at| bytes(at) / 4), "cache_absorbed").amount < 0.0);
    // With direct I/O nothing is in between.
    assert!(with(bytes).findings.iter().all(|found| found.cause != "cache_absorbed"));
}

#[test]
fn the_threads_beside_the_vcpus_are_named() {
    let report = report(vec![
        Figure { ebpf: says(run), ..figure("cpu", "vcpu_run_ns") },
        Figure { ebpf: says(|at| at / 100), ..figure("cpu", "vhost_run_ns") },
        Figure { ebpf: says(|at| at / 50), ..figure("cpu", "emulator_run_ns") },
        Figure { libvirt: says(|at| run(at) + at / 50 + at / 100), ..figure("cpu", "time_ns") },
    ]);
    let sentence = &finding(&report, "emulator_included").sentence;
    assert!(sentence.ends_with("Of it, the emulator 2.380 s, vhost 1.190 s."), "{sentence}");
}

#[test]
fn old_memory_reports_are_said_to_be_old() {
    let head = [session(), domain("raw", "bridge")];
    let figures = [Figure { libvirt: says(|_| 1 << 30), ..figure("memory", "available_bytes") }];
    let stale = lines(&head, &figures, &json!({"memory": {"age_s": 55, "stale": true}}));
    let found = report_of(&stale, None);
    let found = finding(&found, "stale_balloon");
    assert!(found.sentence.contains("55 s") && (found.amount - 55.0).abs() < 1e-9, "{found:?}");
}

#[test]
fn the_same_stream_gives_the_same_report_in_every_format() {
    let make = || report(vec![both("interfaces", "rx_bytes", bytes, |at| bytes(at) * 101 / 100)]);
    for format in [Format::Text, Format::Markdown, Format::Html, Format::Json] {
        let (one, two) = (render(&make(), format), render(&make(), format));
        assert_eq!(one, two, "{format:?}");
        assert!(one.contains("rx_bytes") && one.contains("host1"), "{format:?}");
        for own in ["ticks_missed", "2 missed"] {
            assert!(one.contains(own) || format == Format::Json || own == "ticks_missed", "{format:?}");
        }
        assert!(one.contains("kfree_skb: 7 events missed") || format == Format::Json, "{format:?}");
    }
    let json: Value = serde_json::from_str(&render(&make(), Format::Json)).unwrap();
    assert_eq!(json["own"]["ticks"], json!([120, 2]));
    assert_eq!(json["own"]["records_dropped"], 3);
    assert_eq!(json["own"]["misses"], json!({"kfree_skb": 7}));
}

#[test]
fn html_needs_no_network_and_holds_no_markup_of_tenants() {
    let figures = [both("interfaces", "rx_bytes", bytes, bytes)];
    let text = lines(&[session(), domain("raw", "bridge")], &figures, &json!({}));
    let evil: Vec<String> =
        text.iter().map(|l| l.replace("\"web1\"", "\"<script>alert(1)</script>\"")).collect();
    let html = render(&report_of(&evil, None), Format::Html);
    assert!(!html.contains("<script") && html.contains("&lt;script&gt;"));
    assert!(!html.contains("http://") && !html.contains("https://") && html.contains("<svg"));
}

fn good() -> Vec<String> {
    lines(
        &[session(), domain("raw", "bridge")],
        &[both("interfaces", "rx_packets", packets, packets)],
        &json!({}),
    )
}

/// Checks that damage is named with its line, and that the rest is compared.
fn check_damage(damage: impl FnOnce(&mut Vec<String>), kind: Kind, at: &[u64]) -> Report {
    let mut lines = good();
    damage(&mut lines);
    let report = report_of(&lines, None);
    let problem = report.input.problems.get(&kind).unwrap_or_else(|| panic!("{kind:?}: {:?}", report.input));
    assert_eq!(problem.first_lines, at, "{kind:?}");
    let of = comparison(&report, "rx_packets", "libvirt");
    assert_eq!((of.verdict, of.unexplained), (Verdict::Agree, 0.0), "{kind:?}: {of:?}");
    assert!(of.ticks > 40, "{kind:?}: {}", of.ticks);
    let text = render(&report, Format::Text);
    assert!(text.contains(kind.meaning()), "{text}");
    report
}

#[test]
fn bad_lines_are_named_and_the_rest_is_used() {
    check_damage(|l| l[10].truncate(100), Kind::Truncated, &[11]);
    check_damage(|l| l.insert(4, "hello".into()), Kind::NotJson, &[5]);
    check_damage(|l| l.insert(4, "{\"a\":1}".into()), Kind::NotAStream, &[5]);
    check_damage(|l| l.insert(4, "{\"type\":\"trace\"}".into()), Kind::UnknownType, &[5]);
    check_damage(|l| l[20] = format!("{}{}", &l[19][..30], l[20]), Kind::Interleaved, &[21]);
    check_damage(|l| l.swap(30, 31), Kind::Reordered, &[32]);
    check_damage(|l| drop(l.drain(30..35)), Kind::Missing, &[31]);
    check_damage(|l| l.truncate(100), Kind::NoSummary, &[100]);
    check_damage(|l| l.insert(60, l[0].clone()), Kind::Restarted, &[61]);
    let other = type_first(&session()).replace("\"schema_version\":1", "\"schema_version\":2");
    check_damage(|l| l.insert(100, other), Kind::OtherVersion, &[101, 102, 103, 104, 105]);
    check_damage(
        |l| l.iter_mut().skip(50).for_each(|l| *l = l.replace("2027-01-15", "2027-01-16")),
        Kind::ClockStep,
        &[51],
    );
}

#[test]
fn two_hosts_in_one_file_are_two_hosts() {
    let other: Vec<String> = good().iter().map(|l| l.replace("host1", "host2")).collect();
    let both = check_damage(|l| l.extend(other), Kind::OtherHost, &[SECONDS + 5]);
    let hosts: Vec<&str> = both.domains.iter().map(|d| d.host.as_str()).collect();
    assert_eq!(hosts, ["host1", "host2"]);
}

#[test]
fn any_damage_at_all_is_survived() {
    let text = good().join("\n");
    for cut in (0..text.len()).step_by(9_973) {
        let mut feed = Feed::new(Vec::new(), Vec::new());
        let (a, b) = text.as_bytes().split_at(cut);
        feed.push(b);
        feed.push(a);
        feed.push(&[0xff, 0xfe, b'\n', 0]);
        let report = feed.finish(None);
        for format in [Format::Text, Format::Markdown, Format::Html, Format::Json] {
            assert!(!render(&report, format).is_empty());
        }
    }
}

#[test]
fn truth_is_one_more_column() {
    let truth = Truth {
        domain: "web1".into(),
        scope: "interfaces".into(),
        entity: "tap1".into(),
        metrics: vec!["rx_packets".into()],
        quantity: "received packets".into(),
        value: packets(SECONDS * SECOND) - packets(SECOND),
        ..Truth::default()
    };
    let mut feed = Feed::new(vec![truth], Vec::new());
    good().iter().for_each(|line| feed.push(format!("{line}\n").as_bytes()));
    let report = feed.finish(None);
    let claims = &report.domains[0].truth[0].claims;
    assert_eq!(claims.iter().map(|c| c.source).collect::<Vec<_>>(), ["ebpf", "libvirt"]);
    assert!(claims[0].difference.abs() < 1e-9, "{claims:?}");
    assert!(render(&report, Format::Text).contains("received packets"));
}

#[test]
fn a_source_that_is_wrong_about_a_truth_is_a_finding_and_exceeds_the_limit() {
    let truth = |value, between_ns| Truth {
        domain: "web1".into(),
        scope: "interfaces".into(),
        entity: "tap1".into(),
        metrics: vec!["rx_packets".into()],
        quantity: "received packets".into(),
        between_ns,
        value,
        ..Truth::default()
    };
    let report = |truth: Truth| {
        let mut feed = Feed::new(vec![truth], Vec::new());
        good().iter().for_each(|line| feed.push(format!("{line}\n").as_bytes()));
        feed.finish(Some(1.0))
    };
    // Second 45 to 47: nothing happens before second 47 of each nine, nor in the two before.
    let span = Some([45 * SECOND + SECOND / 2, 55 * SECOND + SECOND / 2]);
    let really = packets(55 * SECOND) - packets(46 * SECOND);
    let right = report(truth(really, span));
    assert!(!right.summary.exceeded && right.findings.is_empty(), "{:?}", right.findings);
    assert_eq!(right.summary.truth.map(|t| (t.claims, t.right)), Some((2, 2)));
    let wrong = report(truth(really + 100, span));
    assert!(wrong.summary.exceeded && wrong.summary.compared > 0);
    let found = finding(&wrong, "against_truth");
    assert_eq!((found.verdict, found.amount), (Verdict::Disagree, -100.0));
    assert!(render(&wrong, Format::Text).contains("too little"));
}

// The program itself.

/// A file that is gone after the test.
struct TempFile(std::path::PathBuf);

impl TempFile {
    fn new(name: &str, content: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("kvm-monitor-compare-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        Self(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Exit status, standard output and standard error of `compare`.
fn run_program(args: &[&str]) -> (Option<i32>, String, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_kvm-monitor"))
        .arg("compare")
        .args(args)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_exit_status_says_whether_the_limit_is_kept() {
    let stream = |off: u64| {
        let figures = [both("interfaces", "rx_bytes", bytes, move |at| bytes(at) * (100 + off) / 100)];
        lines(&[session(), domain("raw", "bridge")], &figures, &json!({})).join("\n")
    };
    let check = |off, args: &[&str], status, expected: &str| {
        let file = TempFile::new(&format!("limit-{off}-{}", args.len()), stream(off).as_bytes());
        let (code, out, err) = run_program(&[&[file.0.to_str().unwrap()], args].concat());
        assert_eq!(code, Some(status), "{off} {args:?}: {err}");
        assert!(out.contains(expected), "{out}");
    };
    check(0, &[], 0, "1 agree");
    check(0, &["--fail-over", "0"], 0, "is kept");
    check(1, &[], 0, "1 disagree");
    check(1, &["--fail-over", "0.5"], 1, "is EXCEEDED");
    check(1, &["--fail-over", "5", "--format", "markdown"], 0, "is kept");
}

#[test]
fn a_compressed_stream_gives_the_same_report() {
    let text = good().join("\n");
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let plain = TempFile::new("plain", text.as_bytes());
    let packed = TempFile::new("packed", &ruzstd::encoding::compress_to_vec(text.as_bytes(), level));
    let reports = [&plain, &packed].map(|file| run_program(&[file.0.to_str().unwrap(), "--format", "json"]));
    assert_eq!(reports[0], reports[1]);
    assert_eq!(reports[0].0, Some(0));
}

#[test]
fn what_cannot_be_compared_is_an_error_with_the_reason() {
    let check = |content: &str, expected: &str| {
        let file = TempFile::new(&format!("bad-{}", content.len()), content.as_bytes());
        let (code, _, err) = run_program(&[file.0.to_str().unwrap()]);
        assert_eq!(code, Some(2), "{err}");
        assert!(err.contains(expected), "{err}");
    };
    check("", "is empty");
    check("hello\nworld\n", "no session line");
    check(&good()[..2].join("\n"), "no sample");
    check(&good()[..4].join("\n"), "too few readings");
    let (code, _, err) = run_program(&["/nonexistent"]);
    assert!(code == Some(2) && err.contains("cannot read /nonexistent"), "{err}");
    let (code, _, err) = run_program(&["x", "--duration", "5s"]);
    assert!(code == Some(2) && err.contains("contradict"), "{err}");
    let (code, _, err) = run_program(&["x", "--fail-over", "-1"]);
    assert!(code == Some(2), "{err}");
}
