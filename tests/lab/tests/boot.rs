//! A lab guest does exactly what its script says, and the host's counters agree with it.
//!
//! Needs root, libvirt, QEMU and the variables of [`lab::LabDirs::from_env`]; feature `live`.

use std::time::Duration;

use lab::{DiskSpec, GuestSpec, Hog, ImageFormat, Lab, LabDirs, NicSpec, StartState, UdpSink, Which};

const BOOT: Duration = Duration::from_secs(60);

/// Firmware reads the first sectors of a disk before Linux starts, at most that often.
const FIRMWARE_READS: i64 = 4;

#[test]
fn a_guest_reports_what_it_did() {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let nic = NicSpec::new("tap-boot", 1);
    let script = format!(
        "{} wait cpu=all:0.2s burn=cpu1:0.2s write=vda:100x4096 flush=vda:1 read=vda:50x65536 read=vdb:5x4096 \
         bwrite=vdb:10x4096 discard=vda:0+65536 mem=8M udp=10.77.1.1:5000x200x1000B udprx=6000x2.5s",
        nic.net_step("eth0")
    );
    let qcow2 = DiskSpec { format: ImageFormat::Qcow2, iothread: Some(1), ..DiskSpec::raw("vdb", 8 << 20) };
    let spec = GuestSpec {
        vcpus: 2,
        disks: vec![DiskSpec::raw("vda", 16 << 20), qcow2],
        nics: vec![nic.clone()],
        vcpu_pin: Some("0".into()),
        ..GuestSpec::new("boot", &script)
    };
    let sink = UdpSink::start(&lab, 5000).unwrap();
    let guest = lab.boot(&spec).unwrap();
    assert_eq!(guest.vcpu_tids().unwrap().len(), 2);
    guest.wait_begin(Which::Kind("wait"), BOOT).unwrap();
    guest.go_on(BOOT).unwrap();
    guest.wait_begin(Which::Kind("udprx"), BOOT).unwrap();
    let to = (nic.guest_address(), 6000).into();
    let sent = lab::send_datagrams(&lab, to, (20, 100), Duration::from_millis(5)).unwrap();
    let truth = guest.wait_end(BOOT).unwrap();

    let did = |kind, key| truth.of_kind(kind).next().unwrap().did(key);
    assert_eq!((did("write", "requests"), did("read", "bytes")), (Some(100), Some(50 * 65536)));
    assert_eq!((did("mem", "bytes"), did("udp", "sent")), (Some(8 << 20), Some(200)));
    assert!(truth.of_kind("cpu").next().unwrap().cpu_ns().values().all(|ns| *ns >= 200_000_000));
    assert_eq!((sink.packets(), sink.payload_bytes()), (200, 200_000));
    assert_eq!(did("udprx", "received"), Some(sent));

    let stats = lab.virsh(&["domstats", "boot"]).unwrap();
    let host = |key: &str| value(&stats, key);
    let net = |key| truth.total(key).unwrap();
    assert_eq!((host("net.0.tx.pkts"), host("net.0.rx.pkts")), (200, 20));
    assert_eq!(host("net.0.tx.bytes"), net("net.eth0.tx_bytes"));
    assert_eq!(host("net.0.rx.bytes"), net("net.eth0.rx_bytes"));
    assert_eq!(host("block.0.wr.reqs"), 100);
    assert_eq!(host("block.0.fl.reqs"), net("disk.vda.fl_ios"));
    let firmware = host("block.0.rd.reqs") - net("disk.vda.rd_ios");
    assert!((0..=FIRMWARE_READS).contains(&firmware), "{firmware} more reads than the guest made");
}

#[test]
fn a_hog_takes_its_share_of_a_pinned_vcpu() {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let spec =
        GuestSpec { vcpu_pin: Some("0".into()), ..GuestSpec::new("contended", "burn=cpu0:2s sleep=9") };
    let guest = lab.boot(&spec).unwrap();
    let hog = Hog::start(&lab, 0).unwrap();
    guest.wait_begin(Which::Kind("burn"), BOOT).unwrap();
    let (vcpu, other) = (guest.vcpu_times().unwrap()[0], hog.time().unwrap());
    guest.wait_step(Which::Kind("burn"), BOOT).unwrap();
    let (vcpu_end, other_end) = (guest.vcpu_times().unwrap()[0], hog.time().unwrap());
    for ns in [vcpu_end.run_ns - vcpu.run_ns, vcpu_end.wait_ns - vcpu.wait_ns] {
        assert!((500_000_000..1_900_000_000).contains(&ns), "{ns} ns of 2 s, shared by two");
    }
    assert!(other_end.run_ns - other.run_ns > 500_000_000);
}

#[test]
fn a_guest_that_stands_is_told_with_where_it_stands() {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let spec = GuestSpec { start: StartState::Paused, ..GuestSpec::new("stands", "sleep=1s") };
    let guest = lab.boot(&spec).unwrap();
    let error = guest.wait_begin(Which::Number(0), Duration::ZERO).unwrap_err().to_string();
    // Where every x86 CPU begins.
    for part in ["its last step: none", "paused", "first look", "second look", "EIP=0000fff0"] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
}

#[test]
fn a_script_that_cannot_run_is_an_error() {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let check = |script: &str, step, expected: &str| {
        let name = script.split('=').next().unwrap();
        let guest = lab.boot(&GuestSpec::new(name, script)).unwrap();
        let error =
            guest.wait_begin(Which::Number(step), BOOT).and_then(|_| guest.wait_end(BOOT)).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };
    check("slep=1", 0, "cannot read the step slep=1");
    check("flush=vdz:1", 0, "step flush=vdz:1: No such file");
    check("sleep=0.1 end=poweroff", 1, "QEMU has ended");
}

fn value(stats: &str, key: &str) -> i64 {
    let line = stats.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("no {key} in {stats}")).parse().expect("a number")
}
