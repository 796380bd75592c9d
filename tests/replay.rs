//! Readings built by hand → the lines of the stream, compared with the golden files in `tests/golden`.
//!
//! Needs no rights and no clock. After a change that is meant, `KVM_MONITOR_UPDATE_GOLDEN=1` writes the files anew,
//! to be reviewed as a diff.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use SourceKind::{Ebpf, Libvirt, Procfs};
use monitor::{
    inventory::{
        Balloon, Disk, Domain, DomainState, FoundBy, Interface, Observable, Owner, QemuProcess, Vcpu,
    },
    metric::{Kind, METRICS, Metric, MetricDef, Scope},
    model::{Rate, rate},
    record::{
        self, Change, ClockPair, DomainName, DomainRecord, Event, EventKind, Health, Host, ProbeInfo,
        ProgramHealth, Record, SCHEMA_VERSION, Session, SourceHealth, SourceInfo, Subject, Summary, Tick,
        timestamp,
    },
    sample::{
        BackingImage, CulpritKind, DiskDetail, DomainSample, InterfaceDetail, Layers, PreemptedBy,
        QueueDetail, ReadClass, Values, VcpuDetail,
    },
    source::{
        ebpf::{ExitReason, ExitReasons},
        libvirt::{Job, stats::DirtyRate},
    },
    units::{Bytes, Count, DomainUuid, MonotonicNs, Nanos, SourceKind, Tgid, Tid, Unit, VcpuIndex, Window},
};
use serde_json::Value;

const SECOND: u64 = 1_000_000_000;
const MIB: u64 = 1 << 20;
/// Wall clock of the first tick.
const START_S: i64 = 1_800_000_000;
const EVERY_CLASS: [ReadClass; 6] = [
    ReadClass::Ebpf,
    ReadClass::Procfs,
    ReadClass::ProcfsSlow,
    ReadClass::ProcfsNet,
    ReadClass::LibvirtFast,
    ReadClass::LibvirtSlow,
];

// What is measured.

fn uuid() -> DomainUuid {
    DomainUuid(*b"\x4d\x5e\x0e\x2b\x3c\x1f\x4a\x7b\x9d\x8e\x01\x23\x45\x67\x89\xab")
}

/// Nothing known but who it is.
fn bare() -> Domain {
    Domain {
        uuid: uuid(),
        name: "qemu-4711".into(),
        id: None,
        state: DomainState::Unknown,
        monitor: monitor::inventory::MonitorState::default(),
        title: None,
        owner: Owner::default(),
        virt_type: None,
        process: None,
        vcpus: Vec::new(),
        vcpus_max: None,
        cpu_limits: Vec::new(),
        interfaces: Vec::new(),
        disks: Vec::new(),
        memory_max_bytes: None,
        memory_current_bytes: None,
        balloon: None,
        found_by: FoundBy::Procfs,
    }
}

/// A guest of OpenStack with everything a source can tell.
fn full() -> Domain {
    let some = |text: &str| Some(text.to_owned());
    Domain {
        name: "instance-0000002a".into(),
        id: Some(7),
        state: DomainState::Running,
        title: some("web \"1\"\n\u{9b}31m"),
        owner: Owner {
            manager: Some("nova"),
            instance_id: some("100"),
            instance_name: some("web-1"),
            flavor: some("m1.small"),
            project: some("shop"),
            project_id: some("p-1"),
            user: some("zoë"),
            user_id: some("u-1"),
            image_id: some("i-1"),
            cluster_version: some("4.7"),
        },
        virt_type: some("kvm"),
        process: Some(QemuProcess { tgid: Tgid(4711), start_time_ticks: 123_456 }),
        vcpus: vec![
            Vcpu { index: VcpuIndex(0), tid: Some(Tid(4720)), affinity: some("0-3") },
            Vcpu { index: VcpuIndex(2), tid: None, affinity: None },
        ],
        vcpus_max: Some(4),
        cpu_limits: limits(&[("quota_us", 50_000), ("shares", 1024)]),
        interfaces: interfaces(),
        disks: disks(),
        memory_max_bytes: Some(2048 * MIB),
        memory_current_bytes: Some(1024 * MIB),
        balloon: Some(Balloon { model: "virtio".into(), stats_period_s: 10 }),
        found_by: FoundBy::Libvirt,
        ..bare()
    }
}

fn limits(list: &[(&str, u64)]) -> Vec<(String, u64)> {
    list.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
}

fn interfaces() -> Vec<Interface> {
    let tap = Interface {
        device: "tap1".into(),
        ifindex: Some(12),
        netns: Some(4_026_531_840),
        since_ns: Some(90),
        alias: Some("net0".into()),
        mac: Some("52:54:00:00:00:01".into()),
        kind: "bridge".into(),
        source: Some("br-int".into()),
        bridge: Some("br-int".into()),
        interface_id: Some("0f".into()),
        limits: limits(&[("inbound_average_bytes_per_s", 1_024_000)]),
        host_pci: None,
        model: Some("virtio".into()),
        queues: 2,
        filterref: Some("no-spoofing".into()),
        parameters: vec![("interfaceid".into(), "0f".into()), ("profileid".into(), "p".into())],
        observable: Observable::Yes,
    };
    let user = Interface {
        device: String::new(),
        ifindex: None,
        netns: None,
        since_ns: None,
        alias: Some("net1".into()),
        mac: Some("52:54:00:00:00:02".into()),
        kind: "user".into(),
        source: None,
        bridge: None,
        interface_id: None,
        limits: Vec::new(),
        host_pci: None,
        model: None,
        queues: 1,
        filterref: None,
        parameters: Vec::new(),
        observable: Observable::No("user-mode network: no host device"),
    };
    vec![tap, user]
}

fn disks() -> Vec<Disk> {
    let some = |text: &str| Some(text.to_owned());
    let image = Disk {
        target: "vda".into(),
        source: some("/srv/web 1.qcow2"),
        source_type: "file".into(),
        device: "disk".into(),
        bus: some("virtio"),
        format: some("qcow2"),
        cache: some("none"),
        io: some("native"),
        iothread: Some(1),
        serial: some("0123"),
        backing_chain: vec!["/srv/base.qcow2".into(), "/srv/raw.img".into()],
        mirror: some("/srv/copy.raw"),
        limits: limits(&[("read_iops_sec", 300), ("total_bytes_sec", 1_000_000)]),
        limits_group: some("fast"),
        observable: Observable::Yes,
    };
    let empty = Disk {
        target: "sda".into(),
        source: None,
        source_type: "file".into(),
        device: "cdrom".into(),
        bus: None,
        format: None,
        cache: None,
        io: None,
        iothread: None,
        serial: None,
        backing_chain: Vec::new(),
        mirror: None,
        limits: Vec::new(),
        limits_group: None,
        observable: Observable::No("no medium"),
    };
    vec![image, empty]
}

// Readings.

/// A domain whose readings are played in, and the lines that come of it.
struct Replay {
    domain: Domain,
    sample: DomainSample,
    epoch: u32,
    ticks: u64,
    lines: String,
}

impl Replay {
    fn new(domain: Domain) -> Self {
        let sample = DomainSample::new(domain.vcpus.len(), domain.interfaces.len(), domain.disks.len());
        Self { domain, sample, epoch: 0, ticks: 0, lines: String::new() }
    }

    fn now(&self) -> u64 {
        (100 + self.ticks) * SECOND
    }

    /// A reading of one class of which `put` fills the values.
    fn read(&mut self, class: ReadClass, put: impl FnOnce(&mut DomainSample)) {
        // Classes are read one after the other, 1 ms apart, and each takes 0.2 ms.
        let begin = self.now() + 1_000_000 * class as u64;
        self.sample.begin(class);
        put(&mut self.sample);
        let window = Window { begin: MonotonicNs(begin), end: MonotonicNs(begin + 200_000) };
        self.sample.end(class, window);
    }

    /// A reading with every number that class can have.
    fn read_all(&mut self, class: ReadClass) {
        let ticks = self.ticks;
        self.read(class, |sample| {
            each(sample, |number, values| put_all(values, class, (number, ticks)));
            match class {
                ReadClass::Ebpf => {
                    sample.vcpu_details[0] = detail(ticks);
                    sample.interface_details[0] = interface_detail(ticks);
                    sample.disk_details.iter_mut().take(1).for_each(|disk| *disk = disk_detail(ticks));
                }
                ReadClass::LibvirtSlow => libvirt_detail(sample, ticks),
                ReadClass::Procfs | ReadClass::ProcfsSlow | ReadClass::ProcfsNet | ReadClass::LibvirtFast => {
                }
            }
        });
    }

    /// Ends a tick: writes its line.
    fn tick(&mut self) -> Value {
        let wall = jiff::Timestamp::new(START_S + i64::try_from(self.ticks).unwrap(), 5).unwrap();
        let tick = Tick::new(wall, MonotonicNs(self.now()), SECOND);
        let subject =
            Subject { seq: self.ticks, epoch: self.epoch, domain: &self.domain, sample: &self.sample };
        let line = line(&Record::Sample(record::Sample::new(&tick, subject)));
        let value = serde_json::from_str(&line).unwrap();
        check_rates(&value, &self.sample);
        self.lines += &line;
        self.sample.written();
        self.ticks += 1;
        value
    }
}

/// The values of every entity, numbered.
fn each(sample: &mut DomainSample, mut f: impl FnMut(u64, &mut Values)) {
    f(0, &mut sample.cpu);
    f(0, &mut sample.memory);
    for entities in [&mut sample.vcpus, &mut sample.interfaces, &mut sample.disks] {
        (0..).zip(entities).for_each(|(number, values)| f(number, values));
    }
}

/// Histograms and culprits come less often than numbers.
fn detail(ticks: u64) -> VcpuDetail {
    let histograms = ticks % 2 == 1;
    let culprit = |who: &str, kind, pid, ns| PreemptedBy { who: who.into(), kind, pid, ns };
    VcpuDetail {
        state: Some("waiting"),
        wait_hist: histograms.then(|| vec![[0, 1, 3], [1024, 1088, 17]]),
        run_hist: histograms.then(Vec::new),
        preempted_by: histograms.then(|| {
            vec![
                culprit("web\u{9b}-2", CulpritKind::Vm, Some(4800), 17_000),
                culprit("vhost-4800", CulpritKind::Vhost, Some(4801), 2_000),
                culprit("irq", CulpritKind::Irq, None, 900),
                culprit("idle", CulpritKind::Idle, None, 500),
            ]
        }),
        exits: histograms.then(|| ExitReasons {
            guest: vec![
                reason("HLT", 100, Some(4_000_000_000)),
                reason("IO_INSTRUCTION", 1_001, Some(20_000_000)),
            ],
            userspace: vec![reason("IO", 1_001, None)],
        }),
        ..VcpuDetail::default()
    }
}

/// What libvirt's dear groups bring beside numbers.
fn libvirt_detail(sample: &mut DomainSample, ticks: u64) {
    sample.balloon_updated_s = u64::try_from(START_S - 3).ok();
    sample.perf = limits(&[("cpu_cycles", 7_000_000), ("page_faults", 15)]);
    if let Some(vcpu) = sample.vcpu_details.first_mut() {
        vcpu.libvirt_state = Some("running");
        vcpu.kvm_stats = limits(&[("halt_exits", 100), ("io_exits", 1_001)]);
    }
    let vcpu_bytes_per_s = [(0, 2 * MIB)].into();
    let mode = Some("dirty-ring".to_owned());
    let rate = DirtyRate {
        measuring: false,
        started_s: 99,
        period_s: 1,
        mode,
        bytes_per_s: Some(2 * MIB),
        vcpu_bytes_per_s,
    };
    sample.dirty_rate = (ticks == 1).then_some(rate);
    sample.job = (ticks == 1).then_some(Job {
        operation: "migration_out",
        elapsed_ns: Some(1_500_000_000),
        downtime_ns: Some(30_000_000),
        memory_total_bytes: Some(1024 * MIB),
        memory_processed_bytes: Some(600 * MIB),
        memory_remaining_bytes: Some(424 * MIB),
        memory_bytes_per_s: Some(100 * MIB),
        memory_dirty_bytes_per_s: Some(MIB),
        memory_iteration: Some(2),
        throttle_pct: Some(20),
        disk_total_bytes: Some(0),
        disk_processed_bytes: Some(0),
        disk_remaining_bytes: Some(0),
    });
}

/// A file and an image on the network below the one on top.
fn backing() -> Vec<BackingImage> {
    let file = BackingImage {
        index: Some(3),
        path: Some("/vm/base.qcow2".to_owned()),
        capacity_bytes: Some(1 << 30),
        allocation_bytes: Some(200_704),
        physical_bytes: Some(262_144),
    };
    vec![file, BackingImage { index: Some(5), ..BackingImage::default() }]
}

/// Latencies come as often as the histograms of vCPUs; errors stay.
fn disk_detail(ticks: u64) -> DiskDetail {
    let histogram = |buckets: &[[u64; 3]]| (ticks % 2 == 1).then(|| buckets.to_vec());
    DiskDetail {
        rd_hist: histogram(&[[65_536, 69_632, 90], [131_072, 139_264, 9], [1_048_576, 1_114_112, 1]]),
        wr_hist: histogram(&[[65_536, 69_632, 2]]),
        fl_hist: histogram(&[[4_194_304, 4_456_448, 1]]),
        device_rd_hist: histogram(&[[32_768, 34_816, 40]]),
        device_wr_hist: histogram(&[[16_384, 17_408, 3]]),
        device_reason: (ticks % 2 == 1).then_some("the image is on a file system of many devices"),
        layers: (ticks % 2 == 1).then_some(Layers {
            interval_ns: 2_000_000_000,
            write_amplification: Some(1.25),
            rd_qemu_ns: Some(7_000_000),
            wr_qemu_ns: Some(0),
            fl_qemu_ns: None,
        }),
        backing: if ticks % 2 == 1 { backing() } else { Vec::new() },
        errors: vec![(0, 1), (5, 2), (28, 3), (131, 4)],
    }
}

fn reason(name: &'static str, count: u64, ns: Option<u64>) -> ExitReason {
    ExitReason { name: name.into(), count, ns }
}

fn interface_detail(ticks: u64) -> InterfaceDetail {
    let queue =
        |n| QueueDetail { received_packets: n, received_bytes: 100 * n, sent_packets: 0, sent_bytes: 0 };
    InterfaceDetail {
        rx_drop_reasons: vec![("FULL_RING".into(), 7 + ticks), ("TAP_FILTER".into(), 1)],
        tx_drop_reasons: vec![("NOT_SPECIFIED".into(), 4)],
        rx_host_drop_reasons: vec![("QDISC_DROP".into(), 2)],
        tx_host_drop_reasons: vec![("NETFILTER_DROP".into(), 3)],
        rx_burst_hist: (ticks % 2 == 1).then(|| vec![[1472, 1536, 9]]),
        tx_burst_hist: (ticks % 2 == 1).then(Vec::new),
        queues: vec![queue(5), queue(6)],
    }
}

fn put(values: &mut Values, source: SourceKind, metric: Metric, number: u64) {
    match metric.def().unit {
        Unit::Nanoseconds => values.put(source, metric, Nanos(number)),
        Unit::Bytes => values.put(source, metric, Bytes(number)),
        Unit::Count => values.put(source, metric, Count(number)),
    }
}

/// A number of its own for each metric, source and entity, growing with time.
fn put_all(values: &mut Values, class: ReadClass, (entity, ticks): (u64, u64)) {
    for def in values.scope().metrics() {
        for source in def.sources.iter().copied().filter(|s| ReadClass::of(def.metric, *s) == class) {
            let row = def.metric as u64;
            let step = if def.unit == Unit::Nanoseconds { 3_000_000 } else { 10 };
            // Rows further down get less, so that what is available exceeds what is usable.
            let first = 1_000_000 * (200 - row) + 1_000 * entity + source as u64;
            put(values, source, def.metric, first + ticks * step * (row + 1));
        }
    }
}

fn line(record: &Record<'_>) -> String {
    let mut line = Vec::new();
    record.write_line(&mut line);
    String::from_utf8(line).unwrap()
}

// Checks.

/// Compares with a golden file, or writes it.
#[track_caller]
fn golden(name: &str, lines: &str) {
    check_lines(lines);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
    if std::env::var_os("KVM_MONITOR_UPDATE_GOLDEN").is_some_and(|v| v == "1") {
        return fs::write(&path, lines).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    if let Some(difference) = first_difference(&expected, lines) {
        panic!(
            "tests/golden/{name}, {difference}\nIf that is meant: KVM_MONITOR_UPDATE_GOLDEN=1, and review the diff."
        );
    }
}

/// Where two texts begin to differ, with what stands around it.
fn first_difference(expected: &str, found: &str) -> Option<String> {
    if expected == found {
        return None;
    }
    let (mut old, mut new) = (expected.split_inclusive('\n'), found.split_inclusive('\n'));
    for number in 1.. {
        let (old, new) = (old.next().unwrap_or(""), new.next().unwrap_or(""));
        if old == new {
            continue;
        }
        let same = old.chars().zip(new.chars()).take_while(|(a, b)| a == b).count();
        let around = |line: &str| line.chars().skip(same.saturating_sub(60)).take(120).collect::<String>();
        return Some(format!(
            "line {number}, from character {same}:\n  expected …{:?}\n  found    …{:?}",
            around(old),
            around(new)
        ));
    }
    None
}

/// What holds for every line.
#[track_caller]
fn check_lines(lines: &str) {
    assert!(!lines.is_empty() && lines.ends_with('\n'));
    for line in lines.lines() {
        assert!(line.starts_with(r#"{"type":""#), "{line}");
        assert!(!line.chars().any(monitor::is_disruptive), "{line}");
        let value: Value = serde_json::from_str(line).unwrap();
        let mut leaves = vec![&value];
        while let Some(value) = leaves.pop() {
            match value {
                Value::Null => panic!("null in {line}"),
                Value::Array(items) => leaves.extend(items),
                Value::Object(map) => leaves.extend(map.values()),
                _ => {}
            }
        }
        check_order(line);
    }
}

/// Metrics stand in the order of the table, sources in theirs, in every entity.
#[track_caller]
fn check_order(line: &str) {
    if !line.starts_with(r#"{"type":"sample""#) {
        return;
    }
    let mut rest = line;
    for key in ["seq", "ts", "mono_ns", "interval_ns", "domain", "epoch", "windows"]
        .into_iter()
        .chain(Scope::ALL.map(Scope::key))
    {
        let at = rest.find(&format!("\"{key}\":")).unwrap_or_else(|| panic!("no {key} from here: {rest}"));
        rest = &rest[at..];
    }
    // Every object that has several of the keys has them in this order.
    let metrics = METRICS.iter().map(|def| def.name);
    let places: BTreeMap<&str, usize> = metrics.zip(0..).collect();
    for scope in Scope::ALL {
        let at = line.find(&format!("\"{}\":", scope.key())).unwrap();
        let next = Scope::ALL.iter().filter_map(|s| line.find(&format!("\"{}\":", s.key())));
        let end = next.filter(|n| *n > at).min().unwrap_or(line.len());
        for entity in line[at..end].split("},{\"") {
            let names: Vec<&str> = scope.metrics().iter().map(|def| def.name).collect();
            // Images below a disk's have some of its keys once more.
            let own = entity.split(r#""backing""#).next().unwrap();
            let keys = own.split('"').filter(|word| names.contains(word)).map(|name| places[name]);
            let keys: Vec<usize> = keys.collect();
            assert!(keys.is_sorted(), "{entity}");
        }
    }
}

/// Every rate lies between its bounds, and is there exactly if two readings give one.
#[track_caller]
fn check_rates(line: &Value, sample: &DomainSample) {
    let one = |values, at: String| check_entity(line.pointer(&at).unwrap(), values, sample);
    one(&sample.cpu, "/cpu".into());
    one(&sample.memory, "/memory".into());
    for (scope, entities) in
        [(Scope::Vcpu, &sample.vcpus), (Scope::Interface, &sample.interfaces), (Scope::Disk, &sample.disks)]
    {
        assert_eq!(line[scope.key()].as_array().unwrap().len(), entities.len());
        for (i, values) in entities.iter().enumerate() {
            one(values, format!("/{}/{i}", scope.key()));
        }
    }
}

#[track_caller]
fn check_entity(entity: &Value, values: &Values, sample: &DomainSample) {
    for def in values.scope().metrics() {
        let fresh: Vec<SourceKind> =
            def.sources.iter().copied().filter(|s| told(def, *s, values, sample)).collect();
        let Some(best) = fresh.first() else {
            assert_eq!(entity.get(def.name), None, "nobody told {}", def.name);
            continue;
        };
        let metric = &entity[def.name];
        assert_eq!(metric["best"], best.name(), "{}", def.name);
        for source in SourceKind::ALL {
            let expected = fresh.contains(&source).then(|| values.now(source, def.metric).unwrap());
            assert_eq!(metric.get(source.name()).map(|n| n.as_u64().unwrap()), expected, "{}", def.name);
        }
        let written = metric.get("per_s").map(|n| n.as_f64().unwrap());
        match bounds(def, *best, values, sample) {
            None => assert_eq!(written, None, "{} has no rate", def.name),
            Some(Rate { low, high, .. }) => {
                let unit = if def.unit == Unit::Nanoseconds { 1e9 } else { 1.0 };
                let written = written.unwrap_or_else(|| panic!("{} lacks its rate", def.name));
                assert!(low <= written * unit && written * unit <= high, "{}: {written}", def.name);
            }
        }
    }
}

fn told(def: &MetricDef, source: SourceKind, values: &Values, sample: &DomainSample) -> bool {
    sample.reads(ReadClass::of(def.metric, source)).fresh && values.now(source, def.metric).is_some()
}

fn bounds(def: &MetricDef, source: SourceKind, values: &Values, sample: &DomainSample) -> Option<Rate> {
    let reads = sample.reads(ReadClass::of(def.metric, source));
    let before = (values.before(source, def.metric)?, reads.before?);
    let now = (values.now(source, def.metric)?, reads.now?);
    (def.kind == Kind::Counter).then(|| rate(before, now).ok()).flatten()
}

// The lines of each type.

fn info(reason: Option<&str>, details: &[(&'static str, &str)]) -> SourceInfo {
    SourceInfo {
        available: reason.is_none(),
        reason: reason.map(str::to_owned),
        details: details.iter().map(|(key, value)| (*key, (*value).to_owned())).collect(),
    }
}

fn session(host: Host, sources: [SourceInfo; 3], probes: Vec<ProbeInfo>) -> String {
    let [ebpf, libvirt, procfs] = sources;
    line(&Record::Session(Session {
        schema_version: SCHEMA_VERSION,
        tool_version: "0.1.0",
        host,
        clock: ClockPair { arithmetic: "CLOCK_MONOTONIC", mono_ns: 100 * SECOND, ts: wall(0) },
        interval_ns: SECOND,
        sources: [("ebpf", ebpf), ("libvirt", libvirt), ("procfs", procfs)].into(),
        probes,
    }))
}

fn wall(second: i64) -> String {
    timestamp(jiff::Timestamp::new(START_S + second, 123_456_789).unwrap())
}

#[test]
fn sessions() {
    let host = |boot_id, numa_nodes| Host {
        hostname: "host1".into(),
        kernel: "6.12.0-1-amd64".into(),
        boot_id,
        cpus: 64,
        numa_nodes,
        hz: 100,
    };
    let probe =
        |name, state, reason: Option<&str>| ProbeInfo { name, state, reason: reason.map(str::to_owned) };
    let connected = [("uri", "qemu:///system"), ("hypervisor", "QEMU"), ("library_version", "9.0.0")];
    let all = session(
        host(Some("21c09cd0-dd8b-4d14-ac56-3899761b7d9b".into()), Some(2)),
        [info(None, &[]), info(None, &connected), info(None, &[])],
        vec![
            probe("sched_switch", "attached", None),
            probe("sched_wakeup", "failed", Some("no such tracepoint; waits are counted late")),
        ],
    );
    let none = session(
        host(None, None),
        [
            info(Some("no permission; run as root"), &[]),
            info(Some("not there"), &connected[..1]),
            info(None, &[]),
        ],
        vec![probe("sched_switch", "off", Some("no permission; run as root"))],
    );
    golden("session.ndjson", &(all + &none));
}

#[test]
fn domains() {
    let record = |change, reason, (domain, epoch): (&Domain, u32), since_ns| {
        line(&Record::Domain(DomainRecord {
            ts: wall(1),
            mono_ns: 101 * SECOND,
            change,
            reason,
            epoch,
            domain: record::Domain::new(domain, since_ns),
        }))
    };
    let (full, bare) = (full(), bare());
    let since: BTreeMap<_, _> = [("ebpf", 99 * SECOND)].into();
    let mut lines = record(Change::Appeared, "listed by libvirt", (&full, 0), since);
    lines += &record(Change::Appeared, "QEMU process found", (&bare, 0), BTreeMap::new());
    let paused = Domain { state: DomainState::Paused, ..bare };
    lines += &record(Change::Changed, "state running → paused", (&paused, 1), BTreeMap::new());
    lines += &record(Change::Gone, "its QEMU process ended", (&paused, 1), BTreeMap::new());
    golden("domain.ndjson", &lines);
}

/// At the first tick nothing has a rate; at the second everything has; at the third libvirt was not read; at the
/// fourth only its cheap groups were.
#[test]
fn samples_of_all_sources() {
    let mut replay = Replay::new(full());
    let mut lines = Vec::new();
    let every = EVERY_CLASS.as_slice();
    for classes in [every, every, &every[..3], &every[..4]] {
        classes.iter().for_each(|class| replay.read_all(*class));
        lines.push(replay.tick());
    }
    let text = |i: usize| lines[i].to_string();
    assert!(!text(0).contains("per_s") && !text(0).contains("util_pct"), "a rate needs two readings");
    for scope in Scope::ALL {
        check_complete(scope, &lines[1]);
    }
    assert!(!text(2).contains("libvirt"), "libvirt was not read: {}", text(2));
    assert!(lines[3]["interfaces"][0]["rx_bytes"]["per_s"].is_f64(), "{}", text(3));
    assert!(!lines[3]["disks"].to_string().contains("libvirt"), "the dear groups were not read");
    golden("sample_all_sources.ndjson", &replay.lines);
}

/// A sample has every key that the schema knows in a scope, and every source of every metric.
#[track_caller]
fn check_complete(scope: Scope, line: &Value) {
    let schema = record::schema().to_value();
    let (one, schema_of_one) = match scope {
        Scope::Cpu | Scope::Memory => ("", ""),
        Scope::Vcpu | Scope::Interface | Scope::Disk => ("/0", "/items"),
    };
    let entity = line.pointer(&format!("/{}{one}", scope.key())).unwrap();
    let known = format!("/$defs/Sample/properties/{}{schema_of_one}/properties", scope.key());
    for key in schema.pointer(&known).unwrap().as_object().unwrap().keys() {
        assert!(entity.get(key).is_some(), "{key} is not in {entity}");
    }
    for def in scope.metrics() {
        let metric = &entity[def.name];
        assert_eq!(metric["best"], def.sources[0].name(), "{}", def.name);
        assert!(def.sources.iter().all(|s| metric[s.name()].is_u64()), "{}: {metric}", def.name);
        assert_eq!(metric["per_s"].is_f64(), def.kind == Kind::Counter, "{}: {metric}", def.name);
    }
}

/// As on a host without `/proc` of the guests: everything comes from libvirt, with its own reading at every second
/// tick only.
#[test]
fn samples_of_libvirt_alone() {
    let mut replay = Replay::new(full());
    for tick in 0..3 {
        if tick != 1 {
            replay.read_all(ReadClass::LibvirtFast);
            replay.read_all(ReadClass::LibvirtSlow);
        }
        let line = replay.tick();
        assert_eq!(line["windows"].as_object().unwrap().len(), usize::from(tick != 1));
        assert_eq!(line["cpu"].get("time_ns").is_some(), tick != 1);
    }
    golden("sample_libvirt.ndjson", &replay.lines);
}

/// As without libvirt: no balloon, no requests of the guest.
#[test]
fn samples_of_kernel_programs_and_procfs() {
    let tap = Interface { mac: None, alias: None, ..interfaces().swap_remove(0) };
    let domain = Domain { interfaces: vec![tap], disks: Vec::new(), balloon: None, ..full() };
    let mut replay = Replay::new(domain);
    for _ in 0..2 {
        replay.read_all(ReadClass::Ebpf);
        replay.read_all(ReadClass::Procfs);
        replay.read_all(ReadClass::ProcfsSlow);
        replay.read_all(ReadClass::ProcfsNet);
        replay.tick();
    }
    assert!(!replay.lines.contains("libvirt") && !replay.lines.contains("used_bytes"));
    golden("sample_ebpf_procfs.ndjson", &replay.lines);
}

/// A busy vCPU, in figures that can be checked in the head; then a counter that goes backwards, a reading that
/// lacks a number, and new counters after a restart.
#[test]
fn samples_of_a_vcpu() {
    let vcpus = vec![Vcpu { index: VcpuIndex(0), tid: Some(Tid(4720)), affinity: None }];
    let mut replay = Replay::new(Domain { vcpus, ..bare() });
    let mut tick = |run: Option<u64>, wait: u64, restarted: bool| {
        if restarted {
            replay.sample.clear();
            replay.epoch += 1;
        }
        replay.read(ReadClass::Ebpf, |sample| {
            sample.vcpus[0].put_some(Ebpf, Metric::VcpuRun, run.map(Nanos));
            sample.vcpus[0].put(Ebpf, Metric::VcpuWait, Nanos(wait));
        });
        replay.read(ReadClass::Procfs, |sample| {
            sample.cpu.put(Procfs, Metric::CpuTime, Nanos(run.unwrap_or(0)));
        });
        replay.tick()
    };
    let rates = |line: &Value| ["run_ns", "wait_ns"].map(|m| line["vcpus"][0][m]["per_s"].as_f64());
    assert_eq!(rates(&tick(Some(5_000_000_000), 10_000_000, false)), [None, None]);
    let busy = tick(Some(5_750_000_000), 260_000_000, false);
    assert_eq!(rates(&busy), [Some(0.75), Some(0.25)]);
    assert_eq!(busy["cpu"]["util_pct"]["value"], 75.0);
    let backwards = tick(Some(5_700_000_000), 260_000_000, false);
    assert_eq!(rates(&backwards), [None, Some(0.0)], "never clamped; an idle counter has the rate 0");
    assert_eq!(backwards["cpu"].get("util_pct"), None);
    let lacking = tick(None, 260_000_000, false);
    assert_eq!(lacking["vcpus"][0].get("run_ns"), None);
    assert_eq!(
        rates(&tick(Some(6_000_000_000), 270_000_000, false)),
        [None, Some(0.01)],
        "no reading before"
    );
    assert_eq!(
        rates(&tick(Some(7_000_000_000), 280_000_000, true)),
        [None, None],
        "rates never cross an epoch"
    );
    golden("sample_vcpu.ndjson", &replay.lines);
}

/// The balloon as the guest leaves it: fresh, stale, never reported, without a period, with fewer figures, and with
/// figures that do not fit together.
#[test]
fn samples_of_memory() {
    let usable = Metric::MemoryUsable;
    let unused = Metric::MemoryUnused;
    let available = Metric::MemoryAvailable;
    let mut lines = String::new();
    for (period, age_s, figures, expected) in [
        (
            Some(10),
            Some(30),
            &[(available, 900), (unused, 100), (usable, 400)][..],
            r#"[500,"available_minus_usable",30,false]"#,
        ),
        (Some(10), Some(31), &[(available, 900), (unused, 100)], r#"[800,"available_minus_unused",31,true]"#),
        (Some(10), None, &[(Metric::MemoryActual, 1024)], "[null,null,null,null]"),
        (Some(0), Some(5), &[(available, 900), (usable, 900)], r#"[0,"available_minus_usable",5,true]"#),
        (None, Some(5), &[(unused, 100), (usable, 400)], "[null,null,5,true]"),
        (Some(10), Some(0), &[(available, 100), (usable, 400)], "[null,null,0,false]"),
    ] {
        let balloon = period.map(|stats_period_s| Balloon { model: "virtio".into(), stats_period_s });
        let mut replay = Replay::new(Domain { balloon, ..bare() });
        replay.read(ReadClass::LibvirtSlow, |sample| {
            figures.iter().for_each(|(metric, mib)| put(&mut sample.memory, Libvirt, *metric, mib * MIB));
            sample.balloon_updated_s = age_s.map(|age: i64| u64::try_from(START_S - age).unwrap());
        });
        let memory = &replay.tick()["memory"];
        let used = memory["used_bytes"].as_u64().map(|bytes| bytes / MIB);
        let found = serde_json::json!([used, memory["used_by"], memory["age_s"], memory["stale"]]);
        assert_eq!(found.to_string(), expected);
        // Not read at the next tick: nothing of it is repeated as if it were new.
        assert_eq!(replay.tick()["memory"], serde_json::json!({}));
        lines += &replay.lines;
    }
    golden("sample_memory.ndjson", &lines);
}

#[test]
fn events_of_every_kind() {
    use EventKind::{
        Balloon, BlockJob, ClockStep, CounterBackwards, CounterReset, Crashed, DirectionMismatch, Hotplug,
        HotplugFailed, IoError, Job, LostEvents, Migrated, MonitorBack, MonitorSilent, Paused, Rebooted,
        Reconfigured, Resumed, SourceBack, SourceLost, Started, Stopped,
    };
    let kinds = [
        Started,
        Stopped,
        Migrated,
        Paused,
        Resumed,
        Rebooted,
        Crashed,
        Hotplug,
        HotplugFailed,
        Balloon,
        BlockJob,
        Job,
        IoError,
        Reconfigured,
        MonitorSilent,
        MonitorBack,
        CounterReset,
        CounterBackwards,
        DirectionMismatch,
        ClockStep,
        SourceLost,
        SourceBack,
        LostEvents,
    ];
    let mut lines = String::new();
    for kind in kinds {
        let of_domain = !matches!(kind, SourceLost | SourceBack | LostEvents);
        lines += &line(&Record::Event(Event {
            ts: wall(2),
            mono_ns: 102 * SECOND,
            kind,
            domain: of_domain.then(|| DomainName { uuid: uuid(), name: "web\n\u{202e}1" }),
            detail: "what \"happened\"",
        }));
    }
    let schema = record::schema().to_value();
    let known = schema.pointer("/$defs/EventKind/oneOf").unwrap().as_array().unwrap();
    for kind in known {
        let text = format!("\"kind\":{}", kind["const"]);
        assert!(lines.contains(&text), "{text} is in no golden line");
    }
    golden("event.ndjson", &lines);
}

#[test]
fn health() {
    let source = |reads, errors, last_error: Option<&str>| SourceHealth {
        reads,
        errors,
        lost: errors / 2,
        last_error: last_error.map(str::to_owned),
    };
    let record = |rss_bytes, programs, misses: &[(&'static str, u64)]| {
        line(&Record::Health(Health {
            ts: wall(60),
            mono_ns: 160 * SECOND,
            sources: [
                ("ebpf", source(60, 0, None)),
                ("libvirt", source(6, 4, Some("virConnectGetAllDomainStats failed: gone"))),
                ("procfs", source(60, 0, None)),
            ]
            .into(),
            programs,
            misses: misses.iter().copied().collect(),
            cpu_ns: 48_000_000,
            rss_bytes,
        }))
    };
    let programs = [("sched_switch", ProgramHealth { run_count: 1_000_000, run_ns: 97_000_000 })].into();
    let full = record(Some(21 * MIB), programs, &[("kfree_skb", 3)]);
    golden("health.ndjson", &(full + &record(None, BTreeMap::new(), &[])));
}

#[test]
fn summary() {
    let records = [("session", 1), ("domain", 3), ("sample", 118), ("event", 2), ("health", 3)].into();
    let line = line(&Record::Summary(Summary {
        ts: wall(120),
        reason: "SIGTERM",
        records,
        ticks: 60,
        ticks_missed: 1,
        records_dropped: 2,
        wall_ns: 60 * SECOND,
        cpu_ns: 97_000_000,
    }));
    golden("summary.ndjson", &line);
}

#[test]
fn the_first_difference_is_found() {
    assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
    let check = |expected: &str, found: &str, part: &str| {
        let text = first_difference(expected, found).unwrap();
        assert!(text.contains(part), "{text}");
    };
    check("a\nbcd\n", "a\nbce\n", "line 2, from character 2");
    check("a\nb\n", "a\n", "line 2, from character 0");
    check("", "a\n", "line 1, from character 0");
    check("a", "a\n", "line 1, from character 1");
}

#[test]
fn every_golden_file_belongs_to_a_test() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let here = include_str!("replay.rs");
    let mut unknown = String::new();
    for entry in fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !here.contains(&format!("golden(\"{name}\"")) {
            let _ = write!(unknown, " {name}");
        }
    }
    assert_eq!(unknown, "");
}
