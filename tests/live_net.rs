//! What passes a tap, against both of its ends, on this machine's kernel.
//!
//! Most tests hold a tap by both ends, so that the truth is a number of this program; the last ones watch a real guest.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use lab::tap::{NetSpace, RawTap, VnetHeader, frame, tcp_with_segments};
use lab::{GuestSpec, Lab, LabDirs, NicBackend, NicSpec, UdpSink, Which, send_datagrams};
use monitor::{
    source::ebpf::{Bursts, DeviceTraffic, DropPlace, Ebpf, NicSlot, probes::ProbeGroup},
    units::{MonotonicNs, NicKey},
};

use serde_json::{Value, json};

const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x77, 1, 1];
const HOST: [u8; 6] = [0xfe, 0x54, 0, 0x77, 1, 1];

fn open() -> Ebpf {
    Ebpf::open(&[ProbeGroup::Net]).unwrap()
}

fn key(space: &NetSpace, device: &str) -> NicKey {
    NicKey { netns: space.inode().unwrap(), ifindex: space.ifindex(device).unwrap() }
}

fn read(ebpf: &mut Ebpf, slot: &NicSlot) -> DeviceTraffic {
    ebpf.read().unwrap();
    ebpf.traffic(slot).unwrap().clone()
}

/// Lengths between the least and the most of an Ethernet frame, every one of them.
fn length(number: u64) -> usize {
    60 + usize::try_from(number * 7919 % 1455).unwrap()
}

#[test]
fn a_million_packets_of_mixed_sizes_each_way_are_exact() {
    const PACKETS: u64 = 1_000_000;
    let mut ebpf = open();
    let space = NetSpace::new().unwrap();
    let tap = RawTap::open(&space, "tap0", 1, VnetHeader::No).unwrap();
    let other = RawTap::open(&space, "tap1", 1, VnetHeader::No).unwrap();
    let slot = ebpf.watch(key(&space, "tap0"), 0).unwrap();
    let socket = space.frame_socket("tap0", VnetHeader::No).unwrap();
    let (mut to_guest, mut to_host) = (frame(GUEST, HOST, 1514), frame(HOST, GUEST, 1514));
    let (mut buffer, mut truth) = ([0; 2048], [[0, 0]; 2]);
    for number in 0..PACKETS {
        let bytes = length(number);
        socket.send(&to_guest[..bytes]).unwrap();
        assert_eq!(tap.receive(&mut buffer), Some(bytes));
        truth[0] = [truth[0][0] + 1, truth[0][1] + bytes as u64];
        let bytes = length(number * 3);
        tap.send(&to_host[..bytes]).unwrap();
        truth[1] = [truth[1][0] + 1, truth[1][1] + bytes as u64];
        if number % 1000 == 0 {
            other.send(&to_host).unwrap(); // Nobody watches this one.
            to_guest[20] = to_guest[20].wrapping_add(1);
            to_host[20] = to_host[20].wrapping_add(1);
        }
    }
    let traffic = read(&mut ebpf, &slot);
    let kernel = space.counters("tap0").unwrap();
    println!("truth {truth:?}\nebpf {traffic:?}\nkernel {kernel:?}");
    assert_eq!([traffic.xmit.packets, traffic.xmit.bytes], truth[0]);
    assert_eq!([traffic.receive.packets, traffic.receive.bytes], truth[1]);
    assert_eq!([kernel.tx_packets, kernel.tx_bytes], truth[0]);
    assert_eq!([kernel.rx_packets, kernel.rx_bytes], truth[1]);
    assert_eq!(traffic.xmit.wire_packets, Some(PACKETS), "nothing was to be segmented");
    assert_eq!(traffic.receive.wire_packets, Some(PACKETS));
    assert_eq!(traffic.refused, 0);
    assert_eq!(ebpf.sources(&slot), [Some(HOST), Some(GUEST)]);
}

#[test]
fn segments_are_counted_as_they_would_be_on_a_wire() {
    let mut ebpf = open();
    let space = NetSpace::new().unwrap();
    let tap = RawTap::open(&space, "tap0", 1, VnetHeader::Yes).unwrap();
    let slot = ebpf.watch(key(&space, "tap0"), 0).unwrap();
    let socket = space.frame_socket("tap0", VnetHeader::Yes).unwrap();
    let mut buffer = vec![0; 70_000];
    let (mut packets, mut bytes, mut wire) = (0, 0, 0);
    for (payload, segment) in
        [(1448, 0), (1449, 1448), (2896, 1448), (2897, 1448), (60_000, 1448), (5_000, 536)]
    {
        let mut packet = tcp_with_segments(payload, segment);
        if segment == 0 {
            packet[..10].fill(0); // No offload asked for.
        }
        socket.send(&packet).unwrap();
        assert_eq!(tap.receive(&mut buffer), Some(packet.len()));
        tap.send(&packet).unwrap();
        packets += 1;
        bytes += packet.len() as u64 - 10;
        wire += if segment == 0 { 1 } else { payload.div_ceil(usize::from(segment)) as u64 };
        let traffic = read(&mut ebpf, &slot);
        let [xmit, receive] = [traffic.xmit, traffic.receive].map(|side| side.wire_packets.unwrap());
        assert_eq!([xmit, receive], [wire, wire], "{payload} bytes in segments of {segment}");
    }
    let traffic = read(&mut ebpf, &slot);
    println!("wire {wire}: {traffic:?}");
    for side in [traffic.xmit, traffic.receive] {
        assert_eq!((side.packets, side.bytes, side.wire_packets), (packets, bytes, Some(wire)));
    }
}

/// A guest that reads nothing: its ring takes as many packets as it has room for, the rest is dropped for one reason.
#[test]
fn drops_of_a_suspended_guest_have_their_reason_and_equal_the_taps_own() {
    const PACKETS: u64 = 20_000;
    let mut ebpf = open();
    let space = NetSpace::new().unwrap();
    let tap = RawTap::open(&space, "tap0", 1, VnetHeader::No).unwrap();
    let slot = ebpf.watch(key(&space, "tap0"), 0).unwrap();
    let socket = space.frame_socket("tap0", VnetHeader::No).unwrap();
    let packet = frame(GUEST, HOST, 200);
    let sent = (0..PACKETS).filter(|_| socket.send(&packet).is_ok()).count() as u64;
    let traffic = read(&mut ebpf, &slot);
    let dropped = space.counters("tap0").unwrap().tx_dropped;
    println!("sent {sent}, dropped {dropped}: {traffic:?}");
    assert!(dropped > 10_000 && traffic.xmit.packets > 0);
    assert_eq!((traffic.refused, traffic.xmit.packets), (dropped, PACKETS - dropped));
    let [drops] = traffic.drops.as_deref().unwrap() else { panic!("one place and one reason") };
    assert_eq!((drops.place, drops.packets), (DropPlace::Device, dropped));
    assert_eq!(ebpf.drop_reason(drops.reason), "FULL_RING");
    let mut buffer = [0; 2048];
    let queued = std::iter::from_fn(|| tap.receive(&mut buffer)).count() as u64;
    assert_eq!(queued, traffic.xmit.packets, "what was delivered waited in the ring");
    assert_eq!(space.counters("tap0").unwrap().tx_packets, queued);
}

/// Two bursts of known size, far apart.
#[test]
fn the_largest_millisecond_is_that_of_a_burst() {
    const PACKETS: u32 = 40;
    let mut ebpf = open();
    let space = NetSpace::new().unwrap();
    let tap = RawTap::open(&space, "tap0", 1, VnetHeader::No).unwrap();
    let slot = ebpf.watch(key(&space, "tap0"), 0).unwrap();
    let packet = frame(HOST, GUEST, 1000);
    let late = Duration::from_millis(100);
    assert_eq!(ebpf.take_bursts(&slot, MonotonicNs::now()).map(|b| b.most_packets), [None, None]);
    let began = MonotonicNs::now();
    (0..PACKETS).for_each(|_| tap.send(&packet).unwrap());
    let took = MonotonicNs::now().since(began);
    std::thread::sleep(late);
    let [xmit, receive] = ebpf.take_bursts(&slot, MonotonicNs::now());
    println!(
        "{PACKETS} packets in {took} ns: {:?} bytes, {:?} packets",
        receive.most_bytes, receive.most_packets
    );
    assert_eq!(xmit, Bursts::none());
    // A burst that took less than a millisecond lies in two of them at most.
    let most = receive.most_packets.unwrap();
    assert!(most <= PACKETS.into() && receive.most_bytes == Some(most * 1000));
    assert!(took > 1_000_000 || most >= u64::from(PACKETS) / 2);
    let windows: u32 = receive.closed.iter().sum();
    assert!((1..=2 + took / 1_000_000).contains(&u64::from(windows)), "{windows} windows");
    tap.send(&packet).unwrap();
    std::thread::sleep(late);
    let [_, receive] = ebpf.take_bursts(&slot, MonotonicNs::now());
    assert_eq!(
        (receive.most_packets, receive.most_bytes),
        (Some(1), Some(1000)),
        "the earlier ones were taken"
    );
    assert_eq!(receive.closed.iter().sum::<u32>(), windows + 1);
}

#[test]
fn queues_add_up_and_devices_are_told_apart() {
    let mut ebpf = open();
    let spaces = [NetSpace::new().unwrap(), NetSpace::new().unwrap()];
    // The same name and index in two namespaces.
    let taps = [0, 1].map(|i| RawTap::open(&spaces[i], "tap0", 2, VnetHeader::No).unwrap());
    let slots = [0, 1].map(|i| ebpf.watch(key(&spaces[i], "tap0"), 2).unwrap());
    assert_eq!(spaces[0].ifindex("tap0").unwrap(), spaces[1].ifindex("tap0").unwrap());
    let packet = frame(HOST, GUEST, 100);
    for (i, count) in [(0, 5), (1, 7)] {
        (0..count).for_each(|_| (&taps[i].queues[1]).write_all(&packet).unwrap());
        taps[i].send(&packet).unwrap();
    }
    for (slot, count) in slots.iter().zip([5, 7]) {
        let traffic = read(&mut ebpf, slot);
        let received: Vec<u64> = traffic.queues.iter().map(|[_, receive]| receive.packets).collect();
        assert_eq!((received, traffic.receive.packets), (vec![1, count], count + 1));
    }
    // A device that is made anew counts from 0.
    let [first, second] = taps;
    drop(first);
    let [slot, other] = slots;
    ebpf.unwatch(slot);
    let tap = RawTap::open(&spaces[0], "tap0", 1, VnetHeader::No).unwrap();
    let slot = ebpf.watch(key(&spaces[0], "tap0"), 0).unwrap();
    tap.send(&packet).unwrap();
    second.send(&packet).unwrap();
    assert_eq!(read(&mut ebpf, &slot).receive.packets, 1);
    assert_eq!(read(&mut ebpf, &other).receive.packets, 9);
}

/// A queueing discipline in front of the tap that lets little through, and a filter on the tap that lets nothing.
#[test]
fn drops_of_a_queueing_discipline_and_of_a_filter_are_told_apart() {
    const PACKETS: u64 = 60;
    let mut ebpf = open();
    let space = NetSpace::new().unwrap();
    let tap = RawTap::open(&space, "tap0", 1, VnetHeader::No).unwrap();
    let slot = ebpf.watch(key(&space, "tap0"), 0).unwrap();
    let socket = space.frame_socket("tap0", VnetHeader::No).unwrap();
    let packet = frame(GUEST, HOST, 1000);
    // 8 kbit/s: two packets at once, four wait, which takes seconds.
    let limits = "qdisc replace dev tap0 root tbf rate 8kbit burst 2000 limit 4000";
    space.tc(&limits.split(' ').collect::<Vec<_>>()).unwrap();
    let refused = (0..PACKETS).filter(|_| socket.send(&packet).is_err()).count() as u64;
    let traffic = read(&mut ebpf, &slot);
    println!("{refused} of {PACKETS} refused: {traffic:?}");
    let [drops] = traffic.drops.as_deref().unwrap() else { panic!("one place and one reason") };
    assert_eq!((drops.place, drops.packets), (DropPlace::Before, refused));
    let reason = ebpf.drop_reason(drops.reason);
    assert!(["QDISC_DROP", "QDISC_OVERLIMIT"].contains(&reason.as_str()), "{reason}");
    assert!(refused > PACKETS / 2 && traffic.xmit.packets <= PACKETS - refused);
    assert_eq!(traffic.refused, 0, "the driver refused nothing");

    space.tc(&["qdisc", "del", "dev", "tap0", "root"]).unwrap();
    let before = read(&mut ebpf, &slot);
    let dropped_before = space.counters("tap0").unwrap().tx_dropped;
    tap.filter_everything().unwrap();
    (0..PACKETS).for_each(|_| drop(socket.send(&packet)));
    let after = read(&mut ebpf, &slot);
    println!("filtered: {after:?}");
    assert_eq!(after.xmit, before.xmit, "nothing got through");
    assert_eq!(after.refused, PACKETS);
    assert_eq!(space.counters("tap0").unwrap().tx_dropped - dropped_before, PACKETS);
    let reasons = after.drops.unwrap();
    let filtered = reasons.iter().find(|d| ebpf.drop_reason(d.reason).contains("FILTER")).unwrap();
    assert_eq!((filtered.place, filtered.packets), (DropPlace::Device, PACKETS));
}

/// A datagram of a guest to a port of the host.
fn datagram(to: [u8; 6], payload: u16) -> Vec<u8> {
    let mut bytes = frame(to, GUEST, 14 + 28 + usize::from(payload));
    bytes[12..14].copy_from_slice(&0x0800_u16.to_be_bytes());
    bytes[14] = 0x45;
    bytes[16..18].copy_from_slice(&(28 + payload).to_be_bytes());
    bytes[22..24].copy_from_slice(&[64, 17]);
    bytes[26..30].copy_from_slice(&[192, 0, 2, 2]);
    bytes[30..34].copy_from_slice(&[192, 0, 2, 1]);
    let sum: u32 = bytes[14..34].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    bytes[24..26].copy_from_slice(&(!folded).to_be_bytes());
    bytes[36..38].copy_from_slice(&PORT.to_be_bytes());
    bytes[38..40].copy_from_slice(&(8 + payload).to_be_bytes());
    bytes // No checksum of the datagram, which is allowed.
}

const PORT: u16 = 5_007;

/// The host has no memory left for what a guest sends to one of its sockets.
#[test]
fn drops_for_lack_of_memory_have_their_reason() {
    const PACKETS: u64 = 400;
    let mut ebpf = open();
    let space = NetSpace::new().unwrap();
    let tap = RawTap::open(&space, "tap0", 1, VnetHeader::No).unwrap();
    let slot = ebpf.watch(key(&space, "tap0"), 0).unwrap();
    space.ip(&["link", "set", "tap0", "address", "fe:54:00:77:01:01"]).unwrap();
    space.ip(&["addr", "add", "192.0.2.1/24", "dev", "tap0"]).unwrap();
    let socket = space.run(|| Ok(std::net::UdpSocket::bind(("192.0.2.1", PORT))?)).unwrap();
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 0).unwrap(); // The kernel's least.
    let packet = datagram(HOST, 100);
    (0..PACKETS).for_each(|_| tap.send(&packet).unwrap());
    let traffic = read(&mut ebpf, &slot);
    socket.set_nonblocking(true).unwrap();
    let mut buffer = [0; 2048];
    let kept = std::iter::from_fn(|| socket.recv(&mut buffer).ok()).count() as u64;
    println!("{kept} of {PACKETS} kept: {traffic:?}");
    assert_eq!(traffic.receive.packets, PACKETS, "the host took them all from the tap");
    assert!(kept > 0 && kept < PACKETS / 2);
    let drops = traffic.drops.unwrap();
    let [drops] = drops.as_slice() else { panic!("one place and one reason: {drops:?}") };
    assert_eq!((drops.place, drops.packets), (DropPlace::After, PACKETS - kept));
    assert_eq!(ebpf.drop_reason(drops.reason), "SOCKET_RCVBUFF");
}

/// Tags count: those in a packet, and those that the driver puts in, where this kernel has VLAN devices.
#[test]
fn bytes_include_vlan_tags_as_the_devices_own_do() {
    let mut ebpf = open();
    let space = NetSpace::new().unwrap();
    let tap = RawTap::open(&space, "tap0", 1, VnetHeader::No).unwrap();
    let slot = ebpf.watch(key(&space, "tap0"), 0).unwrap();
    let socket = space.frame_socket("tap0", VnetHeader::No).unwrap();
    let (mut to_guest, mut to_host) = (frame(GUEST, HOST, 500), frame(HOST, GUEST, 600));
    for tagged in [&mut to_guest, &mut to_host] {
        tagged[12..16].copy_from_slice(&[0x81, 0, 0, 5]);
    }
    let mut buffer = [0; 2048];
    let (mut truth, count) = ([0, 0], 30);
    for _ in 0..count {
        socket.send(&to_guest).unwrap();
        truth[0] += tap.receive(&mut buffer).unwrap() as u64;
        tap.send(&to_host).unwrap();
        truth[1] += to_host.len() as u64;
    }
    match space.ip(&"link add link tap0 name vlan5 type vlan id 5".split(' ').collect::<Vec<_>>()) {
        Ok(()) => {
            space.ip(&["link", "set", "vlan5", "up"]).unwrap();
            let untagged = space.frame_socket("vlan5", VnetHeader::No).unwrap();
            for _ in 0..count {
                untagged.send(&frame(GUEST, HOST, 700)).unwrap();
                let length = tap.receive(&mut buffer).unwrap();
                assert_eq!((length, &buffer[12..16]), (704, &[0x81, 0, 0, 5][..]));
                truth[0] += length as u64;
            }
        }
        Err(error) => println!("this kernel has no VLAN devices: {error}"),
    }
    let (traffic, kernel) = (read(&mut ebpf, &slot), space.counters("tap0").unwrap());
    println!("truth {truth:?}, ebpf {traffic:?}");
    assert_eq!([traffic.xmit.bytes, traffic.receive.bytes], truth);
    assert_eq!([kernel.tx_bytes, kernel.rx_bytes], truth);
}

/// What passes while a device begins to be watched is counted or not, never twice.
#[test]
fn a_device_that_is_watched_while_packets_flow_misses_none_and_counts_none_twice() {
    let mut ebpf = open();
    let space = NetSpace::new().unwrap();
    let tap = RawTap::open(&space, "tap0", 1, VnetHeader::No).unwrap();
    let socket = space.frame_socket("tap0", VnetHeader::No).unwrap();
    let (to_guest, to_host) = (frame(GUEST, HOST, 300), frame(HOST, GUEST, 400));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flow = scope.spawn(|| {
            let mut buffer = [0; 2048];
            while !stop.load(Ordering::Relaxed) {
                socket.send(&to_guest).unwrap();
                assert!(tap.receive(&mut buffer).is_some());
                tap.send(&to_host).unwrap();
            }
        });
        let count = |c: lab::tap::DeviceCounters| [c.tx_packets, c.rx_packets, c.tx_bytes, c.rx_bytes];
        let watched = (0..20).map(|round| {
            let before = count(space.counters("tap0").unwrap());
            let slot = ebpf.watch(key(&space, "tap0"), 0).unwrap();
            let after = count(space.counters("tap0").unwrap());
            if round < 19 {
                ebpf.unwatch(slot);
                return None;
            }
            Some((slot, before, after))
        });
        let (slot, before, after) = watched.last().flatten().unwrap();
        while space.counters("tap0").unwrap().tx_packets < after[0] + 20_000 {}
        stop.store(true, Ordering::Relaxed);
        flow.join().unwrap();
        let end = count(space.counters("tap0").unwrap());
        let traffic = read(&mut ebpf, &slot);
        let (xmit, receive) = (traffic.xmit, traffic.receive);
        let counted = [xmit.packets, receive.packets, xmit.bytes, receive.bytes];
        println!("before {before:?}, after {after:?}, in the end {end:?}; counted {counted:?}");
        // The device counts a packet for the guest when that takes it: one may have been sent before the device was watched, and
        // have been taken afterwards.
        let waiting = [1, 0, 300, 0];
        for (i, counted) in counted.into_iter().enumerate() {
            let least = end[i] - after[i] - waiting[i];
            assert!((least..=end[i] - before[i]).contains(&counted), "{i}: {counted}");
        }
        assert_eq!(xmit.wire_packets, Some(xmit.packets), "nothing was to be segmented");
    });
}

#[test]
fn a_real_guest_is_counted_alike_by_all_sources() {
    guest_is_counted_alike(NicBackend::Qemu);
}

/// The same with the kernel moving the packets, where it can.
#[test]
fn a_real_guest_with_vhost_is_counted_alike_by_all_sources() {
    if Path::new("/dev/vhost-net").exists() {
        guest_is_counted_alike(NicBackend::Vhost);
    } else {
        println!("this kernel has no vhost-net: `cargo xtask lab` tries it on others");
    }
}

/// A real guest sends and receives an exact number of datagrams; then it is suspended while more are sent.
fn guest_is_counted_alike(backend: NicBackend) {
    const PATIENCE: Duration = Duration::from_secs(90);
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let nic = NicSpec { backend, ..NicSpec::new("tap-n", 9) };
    let script = format!("{} wait udp=10.77.9.1:5000x1000x512B udprx=5001x3s end=idle", nic.net_step("eth0"));
    let guest = lab.boot(&GuestSpec { nics: vec![nic.clone()], ..GuestSpec::new("net", &script) }).unwrap();
    let _sink = UdpSink::start(&lab, 5000).unwrap();
    let program = std::env::var_os("KVM_MONITOR_BIN").unwrap();
    let mut monitor = lab.command(&program);
    monitor
        .args(["run", "--domain", "net", "--interval", "200ms", "--libvirt-interval", "200ms"])
        .stdout(Stdio::piped());
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let mut monitor = monitor.spawn().unwrap();
    let lines = BufReader::new(monitor.stdout.take().unwrap());
    let mut samples = lines.lines().map_while(Result::ok).filter_map(|line| {
        let line: Value = serde_json::from_str(&line).unwrap();
        (line["type"] == "sample").then(|| line["interfaces"][0].clone())
    });
    let first = samples.by_ref().find(|i| i["tx_packets"]["libvirt"].is_u64()).unwrap();
    println!("first: {first}");
    assert_eq!((&first["device"], &first["mac"]), (&json!("tap-n"), &json!("52:54:00:77:00:09")));
    guest.go_on(PATIENCE).unwrap();
    guest.wait_begin(Which::Kind("udprx"), PATIENCE).unwrap();
    let to = SocketAddr::from((nic.guest_address(), 5001));
    assert_eq!(send_datagrams(&lab, to, (300, 700), Duration::from_millis(1)).unwrap(), 300);
    guest.wait_end(PATIENCE).unwrap();
    let both_ways =
        [("tx_packets", 1000), ("tx_bytes", 1000 * 554), ("rx_packets", 300), ("rx_bytes", 300 * 742)];
    let grown = |now: &Value, metric: &str, source: &str| {
        Some(now[metric][source].as_u64()? - first[metric][source].as_u64()?)
    };
    let settled = |i: &Value| {
        grown(i, "rx_packets", "libvirt") == Some(300) && grown(i, "tx_packets", "libvirt") == Some(1000)
    };
    let last = samples.by_ref().take(50).find(settled).expect("libvirt never told of all packets");
    println!("last: {last}");
    for (metric, expected) in both_ways {
        for source in ["ebpf", "procfs", "libvirt"] {
            assert_eq!(grown(&last, metric, source), Some(expected), "{metric} {source}");
        }
    }
    assert_eq!(last["rx_backlog_packets"]["ebpf"], 0);
    // Suspended, it reads nothing.
    lab.virsh(&["suspend", "net"]).unwrap();
    assert_eq!(send_datagrams(&lab, to, (3000, 100), Duration::ZERO).unwrap(), 3000);
    let stuck = samples.by_ref().take(50).find(|i| {
        let [ebpf, procfs] = ["ebpf", "procfs"].map(|source| i["rx_drop"][source].as_u64());
        ebpf.is_some_and(|drops| drops != 0) && ebpf == procfs
    });
    let stuck = stuck.expect("the drops never agree");
    println!("suspended: {stuck}");
    let backlog = stuck["rx_backlog_packets"]["ebpf"].as_u64().unwrap();
    assert_eq!(stuck["rx_drop_reasons"]["FULL_RING"], stuck["rx_drop"]["ebpf"]);
    assert_eq!(
        backlog,
        grown(&stuck, "rx_packets", "ebpf").unwrap() - grown(&stuck, "rx_packets", "procfs").unwrap()
    );
    assert!(backlog > 0);
    // Not by libvirt: resuming, it would give the tap its address once more, which the tap has.
    lab.virsh(&["qemu-monitor-command", "net", "--hmp", "cont"]).unwrap();
    let drained = samples.by_ref().take(100).find(|i| i["rx_backlog_packets"]["ebpf"] == 0);
    let drained = drained.expect("the backlog does not end");
    assert_eq!(grown(&drained, "rx_packets", "ebpf"), grown(&drained, "rx_packets", "procfs"));
    monitor.kill().unwrap();
    monitor.wait().unwrap();
}
