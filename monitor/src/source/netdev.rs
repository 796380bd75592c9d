//! Network devices of the host: which belongs to an interface, what kind it is, and what the kernel counts for it.
//!
//! Counters come from `/proc/PID/net/dev`, which shows the network namespace of that process and, unlike netlink, takes
//! no lock that somebody may hold for long. Devices of other namespaces are looked up by a thread that enters them
//! (`setns(2)`, CAP_SYS_ADMIN). A name says little: a tap can be moved to another namespace, or be deleted and its name
//! given to another VM's. So a tap is looked up through the file by which QEMU holds it (`pidfd_getfd(2)`, Linux 5.6, and
//! `TUNGETDEVNETNS`, 5.7) where that is possible. Knows no domain and no output.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _, Seek as _},
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, netdevice},
    process::{Pid, PidfdFlags, PidfdGetfdFlags},
    thread::LinkNameSpaceType,
};

use super::procfs::ProcfsError;
use crate::{
    inventory::QemuProcess,
    privilege::with_namespaces,
    units::{MonotonicNs, NicKey, Window},
};

/// What a device is, which decides who receives what the host sends through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A tap: what the host sends, the guest receives.
    Tap,
    /// A macvtap: the guest sits on the host's side of it, and what the device receives, the guest receives.
    Macvtap,
    /// Something else that ends at a guest; taken for a tap.
    Other,
}

/// A device that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Which.
    pub key: NicKey,
    /// What it is.
    pub kind: DeviceKind,
}

/// Looks devices up.
#[derive(Debug)]
pub struct Devices {
    root: PathBuf,
    own: Option<u32>,
    /// Any socket does for asking about devices of this process's own namespace.
    socket: Option<OwnedFd>,
    /// Namespaces of taps that are neither our own nor that of their QEMU.
    others: BTreeMap<u32, OwnedFd>,
}

/// What the files of a QEMU process say of a tap.
enum Held {
    /// It holds the tap.
    Device(Device),
    /// It holds taps, and this is none of them.
    Another,
    /// Nothing.
    Unknown,
}

impl Devices {
    /// `root` is `/proc`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self {
            own: namespace(&root.join("self/ns/net")),
            root: root.to_owned(),
            socket: socket().ok(),
            others: BTreeMap::new(),
        }
    }

    /// Finds the device of that name: a tap where its QEMU holds it, else in the namespace of its QEMU, or else in our
    /// own, where libvirt makes taps.
    pub fn find(&mut self, process: Option<QemuProcess>, name: &str) -> Option<Device> {
        let its = process.and_then(|process| self.in_namespace_of(process, |socket| device(socket, name)));
        let named = its.or_else(|| Some((self.own?, device(self.socket.as_ref()?, name)?)));
        let named = named.map(|(netns, (ifindex, kind))| Device { key: NicKey { netns, ifindex }, kind });
        if named.is_some_and(|device| device.kind != DeviceKind::Tap) {
            return named;
        }
        match process.map_or(Held::Unknown, |process| self.held(process, name)) {
            Held::Device(device) => Some(device),
            Held::Another => None,
            Held::Unknown => named,
        }
    }

    fn held(&mut self, process: QemuProcess, name: &str) -> Held {
        let dir = self.root.join(process.tgid.to_string());
        let files = tun_files(&dir);
        if files.is_empty() {
            return Held::Unknown;
        }
        let Some((number, _)) = files.into_iter().find(|(_, tap)| tap == name) else { return Held::Another };
        let found =
            namespace_of_tap(process, number).and_then(|inside| self.device_in(process, inside, name));
        found.map_or(Held::Unknown, Held::Device)
    }

    /// The device of that name in a namespace, which is remembered if it is one that we could not get at again.
    fn device_in(&mut self, process: QemuProcess, inside: OwnedFd, name: &str) -> Option<Device> {
        let netns = u32::try_from(rustix::fs::fstat(&inside).ok()?.st_ino).ok()?;
        let (ifindex, kind) = if self.own == Some(netns) {
            device(self.socket.as_ref()?, name)?
        } else {
            let found = enter(&inside, |socket| device(socket, name))?;
            if self.netns_of(process) != Some(netns) {
                self.others.insert(netns, inside);
            }
            found
        };
        Some(Device { key: NicKey { netns, ifindex }, kind })
    }

    fn netns_of(&self, process: QemuProcess) -> Option<u32> {
        namespace(&self.root.join(process.tgid.to_string()).join("ns/net"))
    }

    /// Lets go of namespaces that have no device of ours any more.
    pub fn keep(&mut self, needed: impl Fn(u32) -> bool) {
        self.others.retain(|netns, _| needed(*netns));
    }

    /// Finds a device by its index in the namespace of its QEMU.
    #[must_use]
    pub fn find_index(&self, process: QemuProcess, ifindex: u32) -> Option<String> {
        self.in_namespace_of(process, |socket| netdevice::index_to_name(socket, ifindex).ok())
            .map(|(_, name)| name)
    }

    /// The name that a device has now; `None` if it is gone.
    #[must_use]
    pub fn name(&self, process: Option<QemuProcess>, key: NicKey) -> Option<String> {
        if Some(key.netns) == self.own {
            return netdevice::index_to_name(self.socket.as_ref()?, key.ifindex).ok();
        }
        if let Some(other) = self.others.get(&key.netns) {
            return enter(other, |socket| netdevice::index_to_name(socket, key.ifindex).ok());
        }
        let (netns, name) =
            self.in_namespace_of(process?, |socket| netdevice::index_to_name(socket, key.ifindex).ok())?;
        (netns == key.netns).then_some(name)
    }

    /// Whether asking about devices of a namespace needs to enter it, which is dear.
    #[must_use]
    pub fn is_foreign(&self, netns: u32) -> bool {
        self.own != Some(netns)
    }

    /// The table with the counters of a namespace, given a process that lives in it or holds a tap in it.
    #[must_use]
    pub fn counters(&self, netns: u32, process: QemuProcess) -> CounterTable {
        let path = self.counters_file(netns, process);
        let file = self
            .others
            .get(&netns)
            .and_then(|other| enter(other, |_| File::open(self.root.join("thread-self/net/dev")).ok()));
        CounterTable { file, ..CounterTable::new(netns, path) }
    }

    /// The file that [`Devices::counters`] reads.
    #[must_use]
    pub fn counters_file(&self, netns: u32, process: QemuProcess) -> PathBuf {
        let whose = if self.own == Some(netns) {
            "self".to_owned()
        } else if self.others.contains_key(&netns) {
            format!("net:[{netns}]") // Names what no path leads to.
        } else {
            process.tgid.to_string()
        };
        self.root.join(whose).join("net/dev")
    }

    fn in_namespace_of<T: Send>(
        &self,
        process: QemuProcess,
        ask: impl FnOnce(&OwnedFd) -> Option<T> + Send,
    ) -> Option<(u32, T)> {
        let link = self.root.join(process.tgid.to_string()).join("ns/net");
        let netns = namespace(&link)?;
        if self.own == Some(netns) {
            return Some((netns, ask(self.socket.as_ref()?)?));
        }
        let file = File::open(link).ok()?;
        Some((netns, enter(&file, ask)?))
    }
}

/// Asks about devices of a network namespace, on a thread that enters it.
fn enter<T: Send>(
    namespace: &(impl AsFd + Sync),
    ask: impl FnOnce(&OwnedFd) -> Option<T> + Send,
) -> Option<T> {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let kind = Some(LinkNameSpaceType::Network);
            let enter = || rustix::thread::move_into_link_name_space(namespace.as_fd(), kind);
            with_namespaces(enter).ok()?;
            ask(&socket().ok()?)
        });
        inside.join().ok()?
    })
}

/// The network namespace of the tap that a process holds by a file.
fn namespace_of_tap(process: QemuProcess, number: RawFd) -> Option<OwnedFd> {
    /// `_IO('T', 227)` of `include/uapi/linux/if_tun.h`: opens the namespace of the device.
    const TUNGETDEVNETNS: libc::c_ulong = 0x54e3;
    let pid = Pid::from_raw(i32::try_from(process.tgid.0).ok()?)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    let file = rustix::process::pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).ok()?;
    // SAFETY: the call takes no argument; if the file is none of the tun driver, it fails.
    let opened = with_namespaces(|| unsafe { libc::ioctl(file.as_raw_fd(), TUNGETDEVNETNS) });
    // SAFETY: just opened, and nobody else's.
    (opened >= 0).then(|| unsafe { OwnedFd::from_raw_fd(opened) })
}

fn namespace(link: &Path) -> Option<u32> {
    u32::try_from(std::fs::metadata(link).ok()?.ino()).ok()
}

fn socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn device(socket: &OwnedFd, name: &str) -> Option<(u32, DeviceKind)> {
    if name.is_empty() || name.len() > 15 || name.contains(['/', '\0']) {
        return None; // Not a name the kernel would give (`dev_valid_name`).
    }
    let ifindex = netdevice::name_to_index(socket, name).ok()?;
    let kind = match driver(socket, name).as_deref() {
        Some("tun") => DeviceKind::Tap,
        Some("macvlan") => DeviceKind::Macvtap,
        _ => DeviceKind::Other,
    };
    Some((ifindex, kind))
}

/// `struct ethtool_drvinfo` of `include/uapi/linux/ethtool.h`.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    rest: [u8; 160],
}

/// `struct ifreq` with a pointer.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    data: *mut DriverInfo,
    rest: [u8; 16],
}

/// Name of the driver of a device (`ETHTOOL_GDRVINFO`).
fn driver(socket: &OwnedFd, name: &str) -> Option<String> {
    const GET_DRIVER_INFO: u32 = 3;
    let mut info = DriverInfo { command: GET_DRIVER_INFO, driver: [0; 32], rest: [0; 160] };
    let mut request = InterfaceRequest { name: [0; 16], data: &raw mut info, rest: [0; 16] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the request and what it points at live during the call and have the size the kernel writes.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) } != 0 {
        return None;
    }
    let end = info.driver.iter().position(|b| *b == 0)?;
    Some(String::from_utf8_lossy(&info.driver[..end]).into_owned())
}

/// A tap that a process holds open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeldTap {
    /// Of the tun driver: its name, in whatever namespace.
    Named(String),
    /// A macvtap: its index (`/dev/tapN`).
    Macvtap(u32),
}

/// The taps that a process holds open, each once, in the order of their files.
#[must_use]
pub fn held_taps(root: &Path, process: QemuProcess) -> Vec<HeldTap> {
    let dir = root.join(process.tgid.to_string());
    let mut taps = Vec::new();
    for (number, target) in files_below_dev(&dir) {
        let tap = match target.strip_prefix("tap") {
            Some(index) => index.parse().ok().map(HeldTap::Macvtap),
            None => tap_of_file(&dir, number).filter(|_| target == TUN).map(HeldTap::Named),
        };
        taps.extend(tap.filter(|tap| !taps.contains(tap)));
    }
    taps
}

/// The device of the tun driver, below `/dev`.
const TUN: &str = "net/tun";

/// The files of the tun driver that a process holds, and the name of the tap of each.
fn tun_files(dir: &Path) -> Vec<(RawFd, String)> {
    let files = files_below_dev(dir).into_iter().filter(|(_, target)| target == TUN);
    files.map(|(number, _)| (number, tap_of_file(dir, number).unwrap_or_default())).collect()
}

/// The open files of a process that are below `/dev`: number, and path from there.
fn files_below_dev(dir: &Path) -> Vec<(RawFd, String)> {
    let Ok(entries) = std::fs::read_dir(dir.join("fd")) else { return Vec::new() };
    let mut numbers: Vec<RawFd> =
        entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    let target = |number: RawFd| {
        let target = std::fs::read_link(dir.join("fd").join(number.to_string())).ok()?;
        Some((number, target.to_str()?.strip_prefix("/dev/")?.to_owned()))
    };
    numbers.into_iter().filter_map(target).collect()
}

/// The tap of a file of the tun driver; `None` if it has none, or lost it.
fn tap_of_file(dir: &Path, number: RawFd) -> Option<String> {
    tap_of_fdinfo(&std::fs::read_to_string(dir.join("fdinfo").join(number.to_string())).ok()?)
}

/// The line `iff:` of a tun file's fdinfo.
fn tap_of_fdinfo(text: &str) -> Option<String> {
    let name = text.lines().find_map(|line| line.strip_prefix("iff:"))?.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

/// What the kernel counts for a device, from the host's side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceCounters {
    /// What the host received from it.
    pub rx: Direction,
    /// What the host sent through it. For a tap: what its other end has read.
    pub tx: Direction,
}

/// One direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Direction {
    /// Bytes, Ethernet header included.
    pub bytes: u64,
    /// Packets; a GSO packet is one.
    pub packets: u64,
    /// Errors.
    pub errors: u64,
    /// Packets dropped by the driver, or for lack of a receiver.
    pub dropped: u64,
}

/// The counters of all devices of one network namespace.
#[derive(Debug)]
pub struct CounterTable {
    netns: u32,
    path: PathBuf,
    /// Open once it was read, or where no path leads to it.
    file: Option<File>,
    text: Vec<u8>,
    lines: Vec<(std::ops::Range<usize>, DeviceCounters)>,
    window: Option<Window>,
}

impl CounterTable {
    /// Nothing read yet. `path` is a `/proc/PID/net/dev`.
    #[must_use]
    pub fn new(netns: u32, path: PathBuf) -> Self {
        Self { netns, path, file: None, text: Vec::new(), lines: Vec::new(), window: None }
    }

    /// Whose devices these are.
    #[must_use]
    pub fn netns(&self) -> u32 {
        self.netns
    }

    /// The file it is read from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads all counters.
    ///
    /// # Errors
    /// If the process is gone or the file is not as expected. Then there are no counters.
    pub fn read(&mut self) -> Result<(), ProcfsError> {
        self.window = None;
        self.lines.clear();
        self.text.clear();
        let begin = MonotonicNs::now();
        let read = self.read_text();
        let end = MonotonicNs::now();
        read.map_err(|source| ProcfsError::Read { path: self.path.clone(), source })?;
        if !parse_table(&self.text, &mut self.lines) {
            let content = String::from_utf8_lossy(&self.text).chars().take(80).collect();
            return Err(ProcfsError::Parse { path: self.path.clone(), content });
        }
        self.window = Some(Window { begin, end });
        Ok(())
    }

    fn read_text(&mut self) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => {
                file.rewind()?;
                file
            }
            none => none.insert(File::open(&self.path)?),
        };
        // The kernel gives a page at most each time.
        let mut part = [0; 8192];
        loop {
            match file.read(&mut part)? {
                0 => return Ok(()),
                n => self.text.extend_from_slice(&part[..n]),
            }
        }
    }

    /// When it was read; `None` if that failed.
    #[must_use]
    pub fn window(&self) -> Option<Window> {
        self.window
    }

    /// The counters of a device. Lines rarely move, so the one of the last time is tried first.
    #[must_use]
    pub fn get(&self, device: &str, line: &mut usize) -> Option<DeviceCounters> {
        let is_it = |at: usize| {
            self.lines.get(at).is_some_and(|(name, _)| &self.text[name.clone()] == device.as_bytes())
        };
        if !is_it(*line) {
            *line = (0..self.lines.len()).find(|at| is_it(*at))?;
        }
        Some(self.lines[*line].1)
    }
}

/// Reads the lines of `/proc/net/dev` after its two of headings. False if one is not as expected.
fn parse_table(text: &[u8], lines: &mut Vec<(std::ops::Range<usize>, DeviceCounters)>) -> bool {
    let mut at = 0;
    for (number, line) in text.split_inclusive(|b| *b == b'\n').enumerate() {
        let begin = at;
        at += line.len();
        if number < 2 {
            continue;
        }
        // A name may hold a colon; the counters never do.
        let Some(colon) = line.iter().rposition(|b| *b == b':') else { return false };
        let blanks = line.iter().take_while(|b| **b == b' ').count();
        let mut rest = &line[colon + 1..];
        let mut direction = || {
            let mut next = || take_number(&mut rest);
            let found = Direction { bytes: next()?, packets: next()?, errors: next()?, dropped: next()? };
            for _ in 0..4 {
                next()?;
            }
            Some(found)
        };
        let (Some(rx), Some(tx)) = (direction(), direction()) else { return false };
        lines.push((begin + blanks..begin + colon.max(blanks), DeviceCounters { rx, tx }));
    }
    true
}

/// Takes the next decimal number off the text; `None` if there is something else.
fn take_number(text: &mut &[u8]) -> Option<u64> {
    let blanks = text.iter().take_while(|b| **b == b' ').count();
    let digits = text[blanks..].iter().take_while(|b| b.is_ascii_digit()).count();
    let (word, rest) = text[blanks..].split_at(digits);
    if word.is_empty() || rest.first().is_some_and(|b| !b.is_ascii_whitespace()) {
        return None;
    }
    *text = rest;
    word.iter().try_fold(0_u64, |sum, digit| sum.checked_mul(10)?.checked_add(u64::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       1       2    3    4    0     0          0         0        5       6    7    8    0     0       0          0
vnet0:1:18446744073709551615 2 0 9 0 0 0 0 50 6 0 8 0 0 0 0
";

    fn table(text: &str) -> Option<CounterTable> {
        let mut table = CounterTable::new(1, PathBuf::new());
        text.as_bytes().clone_into(&mut table.text);
        let good = parse_table(text.as_bytes(), &mut table.lines);
        good.then_some(table)
    }

    #[test]
    fn counters_are_found_by_name_wherever_the_line_is() {
        let table = table(TABLE).unwrap();
        let lo = DeviceCounters {
            rx: Direction { bytes: 1, packets: 2, errors: 3, dropped: 4 },
            tx: Direction { bytes: 5, packets: 6, errors: 7, dropped: 8 },
        };
        for hint in [0, 1, 7] {
            let mut line = hint;
            assert_eq!((table.get("lo", &mut line), line), (Some(lo), 0));
        }
        let mut line = 0;
        assert_eq!(table.get("vnet0:1", &mut line).map(|c| (c.rx.bytes, c.tx.dropped)), Some((u64::MAX, 8)));
        assert_eq!((table.get("vnet0", &mut line), table.get("", &mut line)), (None, None));
    }

    #[test]
    fn no_text_makes_it_panic() {
        let bad = [
            "",
            "\n",
            "a\nb\n:\n",
            "a\nb\nlo: 1 2 3\n",
            "a\nb\n    :1\n",
            "a\nb\nlo: x",
            "a\nb\n     ",
            "a\nb\nlo: 99999999999999999999 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
        ];
        for text in bad {
            let parsed = table(text).map(|table| table.lines.len());
            assert!(matches!(parsed, None | Some(0)), "{text:?}");
        }
        for end in 0..TABLE.len() {
            let _ = table(&TABLE[..end]);
        }
    }

    #[test]
    fn devices_of_this_namespace_are_found() {
        let mut devices = Devices::new(Path::new("/proc"));
        let lo = devices.find(None, "lo").unwrap();
        assert_eq!((lo.key.ifindex, lo.kind), (1, DeviceKind::Other));
        assert_eq!(devices.name(None, lo.key).as_deref(), Some("lo"));
        for bad in ["", "no-such-device", "../net/lo", "l\0", "a-name-that-is-too-long"] {
            assert_eq!(devices.find(None, bad), None, "{bad:?}");
        }
    }

    #[test]
    fn fdinfo_names_the_tap() {
        assert_eq!(tap_of_fdinfo("pos:\t0\nflags:\t0100002\niff:\tvnet3\n"), Some("vnet3".to_owned()));
        assert_eq!(tap_of_fdinfo("iff:\t\n"), None);
        assert_eq!(tap_of_fdinfo(""), None);
    }
}
