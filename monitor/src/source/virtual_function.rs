//! Virtual functions of network cards (SR-IOV) that guests were given: what the driver of the card counts for each.
//!
//! Their packets pass the card and not the host's kernel, but many drivers of physical functions can tell counts
//! (`ndo_get_vf_stats`, Linux 4.2), which rtnetlink gives as `IFLA_VF_STATS` of the physical function's link. Asking takes
//! a lock that others may hold for long, and some drivers ask their firmware, so a thread of its own does it
//! ([`VirtualFunctions`]). Knows no domain and no output.

use std::{
    io,
    os::fd::OwnedFd,
    path::Path,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    time::Duration,
};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkExtentMask, LinkMessage, LinkVfInfo, VfInfo, VfStats},
};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

use crate::units::{MonotonicNs, Window};

/// How long the tick waits for an answer that usually takes microseconds; what comes later is there for the next one.
const PATIENCE: Duration = Duration::from_millis(5);
/// How long the kernel is waited for.
const DEADLINE: Duration = Duration::from_secs(10);
/// More than a card with 256 functions answers.
const LARGEST: usize = 1 << 20;

/// A virtual function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualFunction {
    /// Network devices of its physical function; one of them is the one that knows.
    pub devices: Vec<u32>,
    /// Its number among those of its physical function.
    pub number: u32,
}

/// What a driver counts for a virtual function, from the guest's side. Drivers leave what they do not count at 0; all
/// that have counts at all have these (the kernel gives no way to tell).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FunctionCounters {
    /// Packets the guest received.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Packets for the guest that the card dropped (Linux 4.16).
    pub rx_dropped: Option<u64>,
    /// Packets the guest sent.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Packets of the guest that the card dropped (Linux 4.16).
    pub tx_dropped: Option<u64>,
}

impl VirtualFunction {
    /// The virtual function at a PCI address (`0000:03:10.2`); `None` if that is none. `sys` is `/sys`.
    #[must_use]
    pub fn find(sys: &Path, address: &str) -> Option<Self> {
        if address.is_empty() || address.contains(['/', '\0']) {
            return None;
        }
        let physical = sys.join("bus/pci/devices").join(address).join("physfn");
        let number = std::fs::read_dir(&physical).ok()?.flatten().find_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix("virtfn")?.parse().ok()?;
            let target = std::fs::read_link(entry.path()).ok()?;
            (target.file_name()? == address).then_some(number)
        })?;
        let index = |entry: std::fs::DirEntry| {
            std::fs::read_to_string(entry.path().join("ifindex")).ok()?.trim().parse().ok()
        };
        let devices = std::fs::read_dir(physical.join("net")).ok()?.flatten().filter_map(index).collect();
        Some(Self { devices, number })
    }
}

/// A question that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot ask for the virtual functions of network device {device}")]
pub struct AskError {
    /// Index of the device.
    pub device: u32,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// Counters of one network device's virtual functions, by number.
type OfDevice = (u32, Vec<(u32, FunctionCounters)>);

/// What one round of questions brought.
#[derive(Debug)]
pub struct Answer {
    /// When it was asked.
    pub window: Window,
    /// The last question that failed, and why.
    pub error: Option<AskError>,
    devices: Vec<OfDevice>,
}

impl Answer {
    /// The counters of a function; `None` if its driver has none.
    #[must_use]
    pub fn of(&self, function: &VirtualFunction) -> Option<FunctionCounters> {
        let its = self.devices.iter().filter(|(device, _)| function.devices.contains(device));
        let mut counters = its.flat_map(|(_, functions)| functions);
        Some(counters.find(|(number, _)| *number == function.number)?.1)
    }
}

/// Asks for the counters of virtual functions, on a thread that ends with this value.
#[derive(Debug)]
pub struct VirtualFunctions {
    questions: SyncSender<Vec<u32>>,
    answers: Receiver<Answer>,
    waiting: bool,
}

impl VirtualFunctions {
    /// Starts the thread.
    ///
    /// # Errors
    /// If there can be no thread or no socket.
    pub fn start() -> io::Result<Self> {
        let socket = socket()?;
        let (questions, asked) = sync_channel::<Vec<u32>>(1);
        let (told, answers) = sync_channel(1);
        std::thread::Builder::new().name("functions".into()).spawn(move || {
            while let Ok(devices) = asked.recv() {
                if told.send(answer(&socket, devices)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { questions, answers, waiting: false })
    }

    /// Asks about all functions of these network devices. The answer, or that to an earlier question; `None` if the kernel
    /// takes its time.
    pub fn ask(&mut self, devices: Vec<u32>) -> Option<Answer> {
        if !self.waiting {
            self.waiting = self.questions.try_send(devices).is_ok();
        }
        let answer = self.answers.recv_timeout(PATIENCE).ok()?;
        self.waiting = false;
        Some(answer)
    }
}

fn answer(socket: &OwnedFd, devices: Vec<u32>) -> Answer {
    let begin = MonotonicNs::now();
    let (mut told, mut error) = (Vec::new(), None);
    for device in devices {
        match functions_of(socket, device) {
            Ok(functions) => told.push((device, functions)),
            Err(source) => error = Some(AskError { device, source }),
        }
    }
    Answer { window: Window { begin, end: MonotonicNs::now() }, error, devices: told }
}

fn socket() -> io::Result<OwnedFd> {
    let (kind, flags) = (SocketType::RAW, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, kind, flags, None)?; // NETLINK_ROUTE is 0.
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(DEADLINE))?;
    Ok(socket)
}

/// All virtual functions of one network device, by number.
fn functions_of(socket: &OwnedFd, device: u32) -> io::Result<Vec<(u32, FunctionCounters)>> {
    let mut link = LinkMessage::default();
    link.header.index = device;
    link.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::Vf]));
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    header.sequence_number = device; // Tells an answer that came after its deadline from that to the next question.
    let mut question = NetlinkMessage::new(header, NetlinkPayload::from(RouteNetlinkMessage::GetLink(link)));
    question.finalize();
    let mut bytes = vec![0; question.buffer_len()];
    question.serialize(&mut bytes);
    rustix::net::send(socket, &bytes, SendFlags::empty())?;
    let mut bytes = vec![0; LARGEST];
    loop {
        let (length, whole) = rustix::net::recv(socket, &mut bytes[..], RecvFlags::TRUNC)?;
        let told = bytes.get(..whole.min(length)).filter(|_| whole <= LARGEST).unwrap_or_default();
        if let Some(functions) = read_answer(told, device)? {
            return Ok(functions);
        }
    }
}

/// `None` if it is the answer to another question.
fn read_answer(bytes: &[u8], device: u32) -> io::Result<Option<Vec<(u32, FunctionCounters)>>> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes)
        .map_err(|error| invalid(error.to_string()))?;
    if message.header.sequence_number != device {
        return Ok(None);
    }
    let link = match message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => link,
        NetlinkPayload::Error(error) => return Err(error.to_io()),
        _ => return Err(invalid("not the answer to what was asked".into())),
    };
    let lists = link.attributes.into_iter().filter_map(|attribute| match attribute {
        LinkAttribute::VfInfoList(list) => Some(list),
        _ => None,
    });
    Ok(Some(lists.flatten().filter_map(|function| counters(&function)).collect()))
}

/// `None` if the driver counts nothing for it.
fn counters(LinkVfInfo(facts): &LinkVfInfo) -> Option<(u32, FunctionCounters)> {
    let mut number = None;
    let mut counters = None;
    for fact in facts {
        match fact {
            VfInfo::Mac(mac) => number = Some(mac.vf_id),
            VfInfo::Stats(stats) => counters = Some(stats.iter().fold(FunctionCounters::default(), add)),
            _ => {}
        }
    }
    Some((number?, counters?))
}

fn add(mut to: FunctionCounters, stat: &VfStats) -> FunctionCounters {
    match *stat {
        VfStats::RxPackets(packets) => to.rx_packets = packets,
        VfStats::RxBytes(bytes) => to.rx_bytes = bytes,
        VfStats::RxDropped(packets) => to.rx_dropped = Some(packets),
        VfStats::TxPackets(packets) => to.tx_packets = packets,
        VfStats::TxBytes(bytes) => to.tx_bytes = bytes,
        VfStats::TxDropped(packets) => to.tx_dropped = Some(packets),
        _ => {}
    }
    to
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use netlink_packet_route::link::VfInfoMac;

    use super::*;

    fn told(device: u32, functions: Vec<LinkVfInfo>) -> Vec<u8> {
        let mut link = LinkMessage::default();
        link.header.index = device;
        link.attributes.push(LinkAttribute::VfInfoList(functions));
        let mut header = NetlinkHeader::default();
        header.sequence_number = device;
        let mut message =
            NetlinkMessage::new(header, NetlinkPayload::from(RouteNetlinkMessage::NewLink(link)));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn function(number: u32, stats: Option<Vec<VfStats>>) -> LinkVfInfo {
        let mac = VfInfo::Mac(VfInfoMac::new(number, &[2, 0, 0, 0, 0, 1]));
        LinkVfInfo([mac].into_iter().chain(stats.map(VfInfo::Stats)).collect())
    }

    #[test]
    fn counters_are_found_by_device_and_number() {
        let stats = vec![
            VfStats::RxPackets(1),
            VfStats::TxPackets(2),
            VfStats::RxBytes(3),
            VfStats::TxBytes(4),
            VfStats::RxDropped(5),
        ];
        let bytes = told(7, vec![function(0, None), function(3, Some(stats))]);
        let devices = vec![(7, read_answer(&bytes, 7).unwrap().unwrap())];
        let now = MonotonicNs::now();
        let answer = Answer { window: Window { begin: now, end: now }, error: None, devices };
        let of = |device, number| answer.of(&VirtualFunction { devices: vec![2, device], number });
        let expected = FunctionCounters {
            rx_packets: 1,
            rx_bytes: 3,
            rx_dropped: Some(5),
            tx_packets: 2,
            tx_bytes: 4,
            tx_dropped: None,
        };
        assert_eq!(of(7, 3), Some(expected));
        for (device, number) in [(7, 0), (7, 4), (8, 3)] {
            assert_eq!(of(device, number), None, "{device} {number}");
        }
        assert!(read_answer(&bytes, 8).unwrap().is_none(), "the answer to another question");
        for end in 0..bytes.len() {
            let _ = read_answer(&bytes[..end], 7);
        }
    }

    #[test]
    fn the_kernel_is_asked() {
        let mut functions = VirtualFunctions::start().unwrap();
        let none = VirtualFunction { devices: vec![1], number: 0 };
        let wait = |functions: &mut VirtualFunctions, devices: Vec<u32>| {
            std::iter::repeat_with(|| functions.ask(devices.clone())).find_map(|answer| answer).unwrap()
        };
        let answer = wait(&mut functions, vec![1]);
        assert!(answer.error.is_none(), "{answer:?}");
        assert_eq!(answer.devices, [(1, Vec::new())], "the loopback device has no functions");
        assert_eq!(answer.of(&none), None);
        let answer = wait(&mut functions, vec![2_147_483_647, 1]);
        assert!(answer.error.is_some_and(|error| error.device == 2_147_483_647), "no such device");
        assert_eq!(answer.devices.len(), 1, "the other one was asked about all the same");
    }

    #[test]
    fn functions_are_found_by_their_address() {
        let sys = std::env::temp_dir().join(format!("kvm-monitor-functions-{}", std::process::id()));
        let devices = sys.join("bus/pci/devices");
        let physical = devices.join("0000:03:00.0");
        for device in ["enp3s0", "enp3s0d1"] {
            std::fs::create_dir_all(physical.join("net").join(device)).unwrap();
        }
        std::fs::write(physical.join("net/enp3s0/ifindex"), "4\n").unwrap();
        for (number, address) in [(0, "0000:03:10.0"), (1, "0000:03:10.2")] {
            std::fs::create_dir_all(devices.join(address)).unwrap();
            symlink("../0000:03:00.0", devices.join(address).join("physfn")).unwrap();
            symlink(format!("../{address}"), physical.join(format!("virtfn{number}"))).unwrap();
        }
        let found = VirtualFunction::find(&sys, "0000:03:10.2");
        assert_eq!(found, Some(VirtualFunction { devices: vec![4], number: 1 }));
        for none in ["0000:03:00.0", "0000:03:10.4", "", "../0000:03:10.2"] {
            assert_eq!(VirtualFunction::find(&sys, none), None, "{none}");
        }
        std::fs::remove_dir_all(&sys).unwrap();
    }
}
