//! Interfaces of real guests: every kind of device that libvirt makes, and what can happen to one.
//!
//! The real binary watches guests of a [`Lab`]; packets are frames that this program sends, or datagrams that a guest
//! was told to send, so that each number is known. Needs root and the variables that `cargo xtask test` sets.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::print_stderr, reason = "what was measured, for a person")]

use std::time::Duration;

use lab::tap::{NetSpace, RawTap, VnetHeader, frame};
use lab::{Guest, GuestSpec, Lab, LabDirs, NicSpec, StartState, Which};
use serde_json::{Value, json};
use support::{Run, is_change_of, is_sample_of, program};

#[path = "support/mod.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod support;

const PATIENCE: Duration = Duration::from_secs(300);
const QUICK: [&str; 4] = ["--interval", "100ms", "--libvirt-interval", "200ms"];
/// Nobody on the host has this address.
const HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const SOURCES: [&str; 3] = ["ebpf", "procfs", "libvirt"];

fn start_lab() -> (Lab, NetSpace) {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let space = NetSpace::of_process(lab.supervisor_pid()).unwrap();
    (lab, space)
}

fn watch(lab: &Lab, domains: &[&str]) -> Run {
    let wanted: Vec<&str> = domains.iter().flat_map(|name| ["--domain", *name]).collect();
    Run::start(lab.command(program()), &[&["run"], &wanted[..], &QUICK[..]].concat())
}

fn mac(number: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0x78, 0, number]
}

/// The XML of an interface: its type, what is inside of it, and the number its address ends with.
fn interface(kind: &str, inside: &str, number: u8) -> String {
    format!(
        "<interface type='{kind}'><mac address='52:54:00:78:00:{number:02x}'/>{inside}<model type='virtio'/></interface>"
    )
}

fn of_mac(sample: &Value, number: u8) -> &Value {
    let text = format!("52:54:00:78:00:{number:02x}");
    let found = sample["interfaces"].as_array().into_iter().flatten().find(|i| i["mac"] == text.as_str());
    found.unwrap_or(&Value::Null)
}

/// One guest with an interface of every kind. Each carries another number of packets each way.
#[test]
fn every_kind_of_interface_is_counted_from_the_guests_side() {
    const KINDS: u8 = 5;
    let (lab, space) = start_lab();
    for command in [
        "link add br-a type bridge mcast_snooping 0",
        "link set br-a up",
        "link add br-b type bridge mcast_snooping 0",
        "link set br-b up",
        "link add va type veth peer name vb",
        "link set va up",
        "link set vb up",
    ] {
        space.ip(&command.split(' ').collect::<Vec<_>>()).unwrap();
    }
    let network = lab.scratch().join("network.xml");
    let text = "<network><name>net-b</name><forward mode='bridge'/><bridge name='br-b'/></network>";
    std::fs::write(&network, text).unwrap();
    lab.virsh(&["net-create", network.to_str().unwrap()]).unwrap();
    let interfaces = [
        interface("ethernet", "<target dev='tap-e'/>", 0),
        interface("ethernet", "<target dev='tap-q'/><driver name='qemu' queues='2'/>", 1),
        interface("bridge", "<source bridge='br-a'/><target dev='tap-b'/>", 2),
        interface("network", "<source network='net-b'/><target dev='tap-n'/>", 3),
        interface("direct", "<source dev='va' mode='bridge'/>", 4),
        interface("user", "", 5),
    ];
    let sent = |number: u8| 100 + 10 * u64::from(number);
    let received = |number: u8| 50 + 5 * u64::from(number);
    let mut script = String::new();
    for n in 0..KINDS {
        script += &format!("net=eth{n},10.78.{n}.2/24,10.78.{n}.1,02:00:00:00:00:01 ");
    }
    script += "wait ";
    for n in 0..KINDS {
        script += &format!("udp=10.78.{n}.1:5000x{}x300B ", sent(n));
    }
    let spec =
        GuestSpec { extra_devices_xml: interfaces.concat(), vcpus: 2, ..GuestSpec::new("kinds", &script) };
    let guest = lab.boot(&spec).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let mut run = watch(&lab, &["kinds"]);
    let uuid = guest.uuid.clone();
    let everything = |sample: &Value| {
        is_sample_of(sample, &uuid)
            && (0..KINDS).all(|n| SOURCES[1..].iter().all(|s| of_mac(sample, n)["tx_packets"][s].is_u64()))
    };
    let first = run.wait("all interfaces", |r| everything(r));
    let told = run.wait("a description", |r| is_sample_of(r, &uuid));
    assert!(told["interfaces"].as_array().unwrap().len() >= usize::from(KINDS));

    guest.go_on(PATIENCE).unwrap();
    // On the way to a tap, out of a bridge, out of the other end of the wire below a macvtap.
    for (n, device) in ["tap-e", "tap-q", "br-a", "br-b", "vb"].into_iter().enumerate() {
        let n = u8::try_from(n).unwrap();
        let socket = space.frame_socket(device, VnetHeader::No).unwrap();
        (0..received(n)).for_each(|_| socket.send(&frame(mac(n), HOST, 200)).unwrap());
    }
    guest.wait_end(PATIENCE).unwrap();
    let grown = |sample: &Value, n: u8, metric: &str, source: &str| {
        let of = |sample: &Value| of_mac(sample, n)[metric][source].as_u64();
        Some(of(sample)? - of(&first).unwrap_or(0))
    };
    let all_there = |r: &Value| {
        is_sample_of(r, &uuid)
            && (0..KINDS).all(|n| {
                grown(r, n, "tx_packets", "libvirt") == Some(sent(n))
                    && grown(r, n, "rx_packets", "libvirt") == Some(received(n))
            })
    };
    let last = run.wait("all packets, by libvirt", all_there);
    for n in 0..KINDS {
        eprintln!("{}", of_mac(&last, n));
        for (metric, expected) in [
            ("tx_packets", sent(n)),
            ("tx_bytes", sent(n) * (300 + 42)),
            ("rx_packets", received(n)),
            ("rx_bytes", received(n) * 200),
        ] {
            for source in SOURCES {
                let expected = Some(expected);
                let is = grown(&last, n, metric, source);
                if n == 4 && source == "ebpf" && metric.starts_with("rx") {
                    assert_eq!(is, None, "a macvtap's are not seen by probes");
                } else {
                    assert_eq!(is, expected, "interface {n}: {metric} by {source}");
                }
            }
        }
        if n != 4 {
            assert_eq!(of_mac(&last, n)["rx_backlog_packets"]["ebpf"], 0);
        }
    }
    let queues = of_mac(&last, 1)["queues"].as_array().unwrap();
    assert_eq!(queues.len(), 2);
    let sum = |key: &str| queues.iter().filter_map(|q| q[key].as_u64()).sum::<u64>();
    assert_eq!((sum("received_packets"), sum("sent_packets")), (received(1), sent(1)), "{queues:?}");

    let ended = run.stop();
    let described = ended.records.iter().rfind(|r| r["type"] == "domain").unwrap();
    let interfaces = described["domain"]["interfaces"].as_array().unwrap();
    let kinds: Vec<_> = interfaces.iter().map(|i| (i["type"].clone(), i["observable"].clone())).collect();
    let expected = ["ethernet", "ethernet", "bridge", "network", "direct", "user"];
    // libvirt tells what a network comes down to: a bridge.
    for ((kind, observable), expected) in kinds.iter().zip(expected) {
        let is_it = kind == expected || (expected == "network" && kind == "bridge");
        assert!(is_it && *observable == json!(expected != "user"), "{kind} {observable} for {expected}");
    }
    assert!(interfaces[5]["observable_reason"].as_str().unwrap().contains("user-mode"), "{described}");
}

/// A guest that has not run an instruction: its tap takes packets until its ring is full.
fn boot_paused(lab: &Lab, name: &str) -> Guest {
    let nic = NicSpec::new("tap-f", 6);
    let spec = GuestSpec {
        nics: vec![nic],
        memory_mib: 64,
        start: StartState::Paused,
        ..GuestSpec::new(name, "sleep=1s")
    };
    lab.boot(&spec).unwrap()
}

fn send(space: &NetSpace, device: &str, (count, bytes): (usize, usize)) {
    let socket = space.frame_socket(device, VnetHeader::No).unwrap();
    let packet = frame(mac(9), HOST, bytes);
    (0..count).for_each(|_| socket.send(&packet).unwrap());
}

fn wait_for(run: &mut Run, uuid: &str, (packets, bytes): (u64, u64)) -> Value {
    run.wait(&format!("{packets} packets of {bytes} bytes"), |r| {
        let nic = &r["interfaces"][0];
        is_sample_of(r, uuid)
            && nic["rx_packets"]["ebpf"] == packets
            && nic["rx_bytes"]["ebpf"] == bytes
            && (r["epoch"] != 0 || backlog(nic) == Some(packets))
    })
}

/// Packets in the ring of the tap, and those that QEMU took: it reads one before it finds that the guest cannot.
fn backlog(nic: &Value) -> Option<u64> {
    let taken = nic["rx_packets"]["procfs"].as_u64()?;
    (taken <= 1).then_some(nic["rx_backlog_packets"]["ebpf"].as_u64()? + taken)
}

fn wait_change(run: &mut Run, uuid: &str, reason: &str) -> Value {
    run.wait(reason, |r| is_change_of(r, uuid, "changed") && r["reason"].as_str().unwrap().contains(reason))
}

#[test]
fn a_device_is_followed_whatever_becomes_of_it() {
    let (lab, space) = start_lab();
    let guest = boot_paused(&lab, "first");
    let uuid = guest.uuid.clone();
    let mut run = watch(&lab, &["first"]);
    wait_for(&mut run, &uuid, (0, 0));
    send(&space, "tap-f", (10, 100));
    wait_for(&mut run, &uuid, (10, 1_000));

    space.ip(&["link", "set", "tap-f", "mtu", "9000"]).unwrap();
    send(&space, "tap-f", (10, 5_000));
    wait_for(&mut run, &uuid, (20, 51_000));

    for command in ["set tap-f down", "set tap-f name tap-g", "set tap-g up"] {
        space.ip(&[&["link"], &command.split(' ').collect::<Vec<_>>()[..]].concat()).unwrap();
    }
    send(&space, "tap-g", (10, 100));
    wait_change(&mut run, &uuid, "is called tap-g now");
    let sample = wait_for(&mut run, &uuid, (30, 52_000));
    assert_eq!(sample["epoch"], 0);

    // Back to its name, which is all that libvirt knows, and away to where neither we nor its QEMU live.
    let elsewhere = NetSpace::new().unwrap();
    for command in ["set tap-g down", "set tap-g name tap-f", "set tap-f netns"] {
        let mut words = vec!["link"];
        words.extend(command.split(' '));
        let path = elsewhere.path();
        if command.ends_with("netns") {
            words.push(&path);
        }
        space.ip(&words).unwrap();
    }
    elsewhere.ip(&["link", "set", "tap-f", "up"]).unwrap();
    let told = run.wait("the move", |r| {
        is_change_of(r, &uuid, "changed")
            && r["domain"]["interfaces"][0]["netns"] == elsewhere.inode().unwrap()
    });
    assert_eq!(told["epoch"], 1, "its counters start anew: {told}");
    run.wait("a sample", |r| is_sample_of(r, &uuid) && r["epoch"] == 1);
    send(&elsewhere, "tap-f", (7, 100));
    let sample = wait_for(&mut run, &uuid, (7, 700));
    assert!(sample["interfaces"][0]["rx_drop"]["procfs"].is_u64(), "the kernel's counters there: {sample}");

    // Deleted. A device that has its name now is not the guest's.
    elsewhere.ip(&["link", "del", "tap-f"]).unwrap();
    wait_change(&mut run, &uuid, "network device tap-f gone");
    let _other = RawTap::open(&space, "tap-f", 1, VnetHeader::No).unwrap();
    send(&space, "tap-f", (5, 100));
    for _ in 0..25 {
        let sample = run.wait("a sample", |r| is_sample_of(r, &uuid));
        assert!(
            sample["interfaces"][0].get("rx_packets").is_none_or(|v| v.get("ebpf").is_none()),
            "{sample}"
        );
    }
    let ended = run.stop();
    let resets = ended.records.iter().filter(|r| r["kind"] == "counter_reset").count();
    assert_eq!(resets, 1, "the move");
}

#[test]
fn the_name_of_a_tap_goes_to_another_guest() {
    let (lab, space) = start_lab();
    let first = boot_paused(&lab, "first");
    let mut run = watch(&lab, &[]);
    wait_for(&mut run, &first.uuid, (0, 0));
    send(&space, "tap-f", (10, 100));
    let sample = wait_for(&mut run, &first.uuid, (10, 1_000));
    let of_first = sample["interfaces"][0].clone();
    first.destroy().unwrap();
    run.wait("its end", |r| is_change_of(r, &first.uuid, "gone"));
    let second = boot_paused(&lab, "second");
    wait_for(&mut run, &second.uuid, (0, 0));
    send(&space, "tap-f", (5, 100));
    let sample = wait_for(&mut run, &second.uuid, (5, 500));
    assert_eq!(sample["interfaces"][0]["device"], of_first["device"]);

    // What only the guest can have sent, on its way to the guest: rx and tx must be swapped, or a switch is broken.
    let socket = space.frame_socket("tap-f", VnetHeader::No).unwrap();
    let own = NicSpec::new("tap-f", 6).mac;
    (0..64).for_each(|_| socket.send(&frame(HOST, own, 100)).unwrap());
    run.wait_event("direction_mismatch", "tap-f");
    let ended = run.stop();
    let told = ended.records.iter().filter(|r| r["kind"] == "direction_mismatch").count();
    assert_eq!(told, 1, "it is said once");
}

/// How long the guest of the next test is suspended: a minute when asked for.
fn suspension() -> Duration {
    let seconds = std::env::var("KVM_MONITOR_SUSPENDED_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(4))
}

/// Some 10,000 packets a second to a guest that is suspended, and what becomes of the stream when it goes on.
#[test]
fn a_suspended_guest_loses_what_its_tap_says() {
    const BURST: usize = 100;
    let (lab, space) = start_lab();
    let nic = NicSpec::new("tap-f", 6);
    let script = format!("{} wait sleep=1s wait", nic.net_step("eth0"));
    let guest = lab.boot(&GuestSpec { nics: vec![nic], ..GuestSpec::new("asleep", &script) }).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let uuid = guest.uuid.clone();
    let mut run = watch(&lab, &["asleep"]);
    run.wait("a sample", |r| is_sample_of(r, &uuid) && r["interfaces"][0]["rx_packets"]["ebpf"].is_u64());
    lab.virsh(&["suspend", "asleep"]).unwrap();
    run.wait_event("paused", "");
    let before = space.counters("tap-f").unwrap();
    let socket = space.frame_socket("tap-f", VnetHeader::No).unwrap();
    let packet = frame(mac(9), HOST, 200);
    let end = std::time::Instant::now() + suspension();
    let mut sent = 0;
    while std::time::Instant::now() < end {
        (0..BURST).for_each(|_| drop(socket.send(&packet)));
        sent += BURST as u64;
        std::thread::sleep(Duration::from_millis(10));
    }
    let now = space.counters("tap-f").unwrap();
    let (dropped, taken) = (now.tx_dropped - before.tx_dropped, now.tx_packets - before.tx_packets);
    eprintln!("sent {sent}, dropped {dropped}, taken by QEMU {taken}");
    assert!(dropped > sent / 2 && taken <= 1, "its ring was full most of the time");
    let at_rest = run.wait("all drops", |r| {
        let nic = &r["interfaces"][0];
        is_sample_of(r, &uuid)
            && ["ebpf", "procfs"].iter().all(|source| nic["rx_drop"][source] == dropped)
            && nic["rx_drop_reasons"] == json!({"FULL_RING": dropped})
    });
    let nic = &at_rest["interfaces"][0];
    assert_eq!(nic["rx_backlog_packets"]["ebpf"], sent - dropped - taken, "{nic}");

    // libvirt gives the tap its address at every start of the guest, and fails where it is there already.
    space.ip(&["addr", "flush", "dev", "tap-f"]).unwrap();
    lab.virsh(&["resume", "asleep"]).unwrap();
    guest.go_on(PATIENCE).unwrap();
    run.wait("the ring empty, by all sources", |r| {
        let nic = &r["interfaces"][0];
        is_sample_of(r, &uuid)
            && nic["rx_backlog_packets"]["ebpf"] == 0
            && SOURCES.iter().all(|source| nic["rx_packets"][source] == before.tx_packets + sent - dropped)
    });
    let ended = run.stop();
    let mut last = 0;
    for sample in ended.records.iter().filter(|r| is_sample_of(r, &uuid)) {
        let Some(drops) = sample["interfaces"][0]["rx_drop"]["ebpf"].as_u64() else { continue };
        assert!(drops >= last && sample["epoch"] == 0, "{drops} after {last}");
        last = drops;
    }
}

/// A running guest gets an interface and loses it again.
#[test]
fn an_interface_comes_and_goes() {
    let (lab, space) = start_lab();
    let nic = NicSpec::new("tap-f", 6);
    let script = format!("{} wait sleep=1s wait", nic.net_step("eth0"));
    let guest = lab.boot(&GuestSpec { nics: vec![nic], ..GuestSpec::new("plugged", &script) }).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let uuid = guest.uuid.clone();
    // By events alone: nothing else would tell within the test.
    let arguments = ["run", "--domain", "plugged", "--interval", "100ms", "--libvirt-interval", "500ms"];
    let mut run = Run::start(lab.command(program()), &arguments);
    run.wait("a sample", |r| is_sample_of(r, &uuid) && r["interfaces"][0]["rx_packets"]["ebpf"].is_u64());
    let file = lab.scratch().join("plugged.xml");
    std::fs::write(&file, interface("ethernet", "<target dev='tap-hot'/>", 9)).unwrap();
    for round in 1..=2 {
        lab.virsh(&["attach-device", "plugged", file.to_str().unwrap(), "--live"]).unwrap();
        run.wait("its device, counted", |r| {
            is_sample_of(r, &uuid) && of_mac(r, 9)["rx_packets"]["ebpf"] == 0
        });
        send(&space, "tap-hot", (50, 100));
        let sample =
            run.wait("its packets", |r| is_sample_of(r, &uuid) && of_mac(r, 9)["rx_packets"]["ebpf"] == 50);
        assert_eq!(of_mac(&sample, 9)["rx_bytes"]["ebpf"], 5_000);
        assert_eq!(sample["epoch"], round, "a new device starts anew: {sample}");
        lab.virsh(&["detach-device", "plugged", file.to_str().unwrap(), "--live"]).unwrap();
        let gone = run.wait("its end", |r| {
            is_change_of(r, &uuid, "changed") && r["domain"]["interfaces"].as_array().unwrap().len() == 1
        });
        let left = run.wait("a sample", |r| is_sample_of(r, &uuid) && of_mac(r, 9).is_null());
        assert!(left["interfaces"][0]["rx_packets"]["ebpf"].is_u64(), "{gone}");
    }
    run.stop();
}

/// Segmentation and a queue nobody empties, on a stream of a real guest: both differences are explained by name, and
/// nothing is left.
#[test]
fn a_comparison_explains_segments_and_a_backlog() {
    let (lab, space) = start_lab();
    let nic = NicSpec::new("tap-f", 6);
    let script = format!("{} wait tcp=10.77.6.1:5001x3000000B", nic.net_step("eth0"));
    let guest = lab.boot(&GuestSpec { nics: vec![nic], ..GuestSpec::new("segments", &script) }).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let sink = lab.in_network(|| std::net::TcpListener::bind("10.77.6.1:5001")).unwrap().unwrap();
    let sink = std::thread::spawn(move || {
        std::io::copy(&mut sink.accept().unwrap().0, &mut std::io::sink()).unwrap()
    });
    let mut run = watch(&lab, &["segments"]);
    let uuid = guest.uuid.clone();
    run.wait_fresh(&uuid, "libvirt");
    run.wait_fresh(&uuid, "libvirt");
    guest.go_on(PATIENCE).unwrap();
    guest.wait_end(PATIENCE).unwrap();
    assert_eq!(sink.join().unwrap(), 3_000_000);
    run.wait_fresh(&uuid, "libvirt");
    lab.virsh(&["suspend", "segments"]).unwrap();
    run.wait_fresh(&uuid, "ebpf");
    let before =
        run.wait("a sample", |r| is_sample_of(r, &uuid) && r["interfaces"][0]["rx_packets"]["ebpf"].is_u64());
    let stuck = before["interfaces"][0]["rx_packets"]["ebpf"].as_u64().unwrap() + 100;
    send(&space, "tap-f", (100, 200));
    for _ in 0..5 {
        run.wait("the backlog, by all sources", |r| {
            let nic = &r["interfaces"][0];
            is_sample_of(r, &uuid)
                && nic["rx_packets"]["ebpf"] == stuck
                && nic["rx_packets"]["libvirt"].is_u64()
        });
    }
    let ended = run.stop();
    let stream = lab.scratch().join("stream.ndjson");
    let lines: Vec<String> = ended.records.iter().map(ToString::to_string).collect();
    std::fs::write(&stream, lines.join("\n") + "\n").unwrap();
    let mut compare = lab.command(program());
    let output = compare.args(["compare", "--format", "json"]).arg(&stream).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let entities = report["domains"][0]["entities"].as_array().unwrap();
    let nic = entities.iter().find(|e| e["scope"] == "interfaces").unwrap();
    let mut causes = std::collections::BTreeSet::new();
    for metric in nic["metrics"].as_array().unwrap() {
        for comparison in metric["comparisons"].as_array().unwrap() {
            eprintln!("{}: {} {}", metric["metric"], comparison["verdict"], comparison["explained"]);
            assert!(comparison["verdict"] != "disagree" && comparison["unexplained"] == 0.0, "{comparison}");
            let explained = comparison["explained"].as_array().unwrap();
            causes.extend(explained.iter().map(|e| e["cause"].as_str().unwrap().to_owned()));
        }
    }
    assert!(causes.contains("gso") && causes.contains("backlog"), "{causes:?}");
    let sent = &before["interfaces"][0];
    assert!(sent["tx_wire_packets"]["ebpf"].as_u64() > sent["tx_packets"]["ebpf"].as_u64(), "{sent}");
}
