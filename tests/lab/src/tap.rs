//! A tap whose both ends a test holds, in a network namespace of its own: every packet is one that the test asked for.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// Protocol number for experiments (IEEE 802): nobody on the host listens to it.
pub const ETHERTYPE: u16 = 0x88b5;

/// A network namespace that exists as long as this value, or devices and sockets in it are in use.
#[derive(Debug)]
pub struct NetSpace(File);

impl NetSpace {
    /// A new one, without IPv6, so that nothing sends by itself.
    pub fn new() -> Result<Self> {
        let make = || -> Result<Self> {
            // SAFETY: the thread shares nothing that the flag would take away from others.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET)? };
            for who in ["all", "default"] {
                let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{who}/disable_ipv6"), "1"); // No IPv6 at all.
            }
            Ok(Self(File::open("/proc/thread-self/ns/net")?))
        };
        on_thread(make).context("cannot make a network namespace")
    }

    /// The namespace that this process lives in.
    pub fn own() -> Result<Self> {
        Ok(Self(File::open("/proc/thread-self/ns/net")?))
    }

    /// The one that a process lives in.
    pub fn of_process(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/net");
        Ok(Self(File::open(&path).with_context(|| format!("cannot open {path}"))?))
    }

    /// A path that leads to it as long as this value exists.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// What identifies it, as in `/proc/PID/ns/net`.
    pub fn inode(&self) -> Result<u32> {
        Ok(u32::try_from(self.0.metadata()?.ino())?)
    }

    /// Runs a function on a thread inside. Sockets and devices it makes stay there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_thread(|| {
            let kind = Some(LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&self.0), kind)?;
            work()
        })
    }

    /// Runs `ip` inside.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        self.command("ip", arguments)
    }

    /// Runs `tc` inside.
    pub fn tc(&self, arguments: &[&str]) -> Result<()> {
        self.command("tc", arguments)
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Result<()> {
        self.run(|| {
            let output = std::process::Command::new(program).args(arguments).output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), said.trim());
            Ok(())
        })
    }

    /// The index of a device inside.
    pub fn ifindex(&self, device: &str) -> Result<u32> {
        self.run(|| {
            let name = CString::new(device)?;
            // SAFETY: a string with an end.
            match unsafe { libc::if_nametoindex(name.as_ptr()) } {
                0 => Err(io::Error::last_os_error()).with_context(|| format!("no device {device}")),
                index => Ok(index),
            }
        })
    }

    /// The kernel's counters of a device inside, of `/proc/net/dev`.
    pub fn counters(&self, device: &str) -> Result<DeviceCounters> {
        let text = self.run(|| Ok(fs::read_to_string("/proc/thread-self/net/dev")?))?;
        let line = text.lines().find_map(|line| line.trim_start().strip_prefix(&format!("{device}:")));
        let numbers: Vec<u64> =
            line.context("no such device")?.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        ensure!(numbers.len() >= 16, "unexpected /proc/net/dev");
        Ok(DeviceCounters {
            rx_bytes: numbers[0],
            rx_packets: numbers[1],
            rx_dropped: numbers[3],
            tx_bytes: numbers[8],
            tx_packets: numbers[9],
            tx_dropped: numbers[11],
        })
    }

    /// Takes every packet of [`frame`] that a device inside receives, and forgets it: else the kernel would drop it, since
    /// nobody listens. Lasts as long as the value.
    pub fn swallow(&self, device: &str) -> Result<OwnedFd> {
        let index = self.ifindex(device)?;
        self.run(|| {
            let socket = FrameSocket::open(index, (VnetHeader::No, ETHERTYPE))?;
            let nothing = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 }; // BPF_RET | BPF_K: take 0 bytes.
            let program = libc::sock_fprog { len: 1, filter: (&raw const nothing).cast_mut() };
            socket.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, program)?;
            Ok(socket.0)
        })
    }

    /// A socket that sends whole frames through a device inside. With `vnet`, each begins with a `virtio_net_hdr`.
    pub fn frame_socket(&self, device: &str, vnet: VnetHeader) -> Result<FrameSocket> {
        let index = self.ifindex(device)?;
        self.run(|| FrameSocket::open(index, (vnet, 0)))
    }
}

/// What the kernel counts of a device, from the host's side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceCounters {
    /// Bytes received from it.
    pub rx_bytes: u64,
    /// Packets received from it.
    pub rx_packets: u64,
    /// Packets that were not received.
    pub rx_dropped: u64,
    /// Bytes that whoever has the tap has read.
    pub tx_bytes: u64,
    /// Packets that it has read.
    pub tx_packets: u64,
    /// Packets it was not given.
    pub tx_dropped: u64,
}

fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether frames begin with a `virtio_net_hdr` (10 bytes), which can ask for segmentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VnetHeader {
    /// They do.
    Yes,
    /// They do not.
    No,
}

/// The guest's end of a tap, one file per queue. The tap goes when it is dropped.
#[derive(Debug)]
pub struct RawTap {
    /// Queues.
    pub queues: Vec<File>,
    /// Name of the device.
    pub name: String,
}

/// `struct ifreq` with flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: libc::c_short,
    rest: [u8; 22],
}

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;

impl RawTap {
    /// Makes a tap in a namespace and brings it up. Reads do not block.
    pub fn open(space: &NetSpace, name: &str, queues: usize, vnet: VnetHeader) -> Result<Self> {
        let tap = space.run(|| {
            let files: Result<Vec<File>> = (0..queues).map(|_| open_queue(name, queues, vnet)).collect();
            Ok(Self { queues: files?, name: name.to_owned() })
        })?;
        space.ip(&["link", "set", name, "up"])?;
        Ok(tap)
    }

    /// Lets the tap take nothing any more (`TUNATTACHFILTER`).
    pub fn filter_everything(&self) -> Result<()> {
        const TUNATTACHFILTER: libc::c_ulong = 0x4010_54d5;
        let nothing = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 }; // BPF_RET | BPF_K: take 0 bytes.
        let program = libc::sock_fprog { len: 1, filter: (&raw const nothing).cast_mut() };
        for queue in &self.queues {
            // SAFETY: a tun file, and the program lives during the call.
            let set = unsafe { libc::ioctl(queue.as_raw_fd(), TUNATTACHFILTER, &raw const program) };
            ensure!(set == 0, "TUNATTACHFILTER: {}", io::Error::last_os_error());
        }
        Ok(())
    }

    /// A frame of the guest.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.queues[0]).write_all(frame)
    }

    /// The next frame for the guest, if there is one: its length.
    pub fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        self.queues.iter().find_map(|mut queue| queue.read(buffer).ok())
    }
}

fn open_queue(name: &str, queues: usize, vnet: VnetHeader) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open("/dev/net/tun").context("cannot open /dev/net/tun")?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    if vnet == VnetHeader::Yes {
        flags |= libc::IFF_VNET_HDR;
    }
    let flags = libc::c_short::try_from(flags)?;
    let mut request = InterfaceRequest { name: [0; 16], flags, rest: [0; 22] };
    ensure!(name.len() < 16, "{name} is too long");
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the file is a tun file and the request what the call expects.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    ensure!(made == 0, "TUNSETIFF {name}: {}", io::Error::last_os_error());
    if vnet == VnetHeader::Yes {
        // SAFETY: as above; the argument is a number.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4) };
        ensure!(set == 0, "TUNSETOFFLOAD: {}", io::Error::last_os_error());
    }
    Ok(file)
}

/// Sends whole frames through one device.
#[derive(Debug)]
pub struct FrameSocket(OwnedFd);

impl FrameSocket {
    /// With protocol 0 it receives nothing.
    fn open(ifindex: u32, (vnet, protocol): (VnetHeader, u16)) -> Result<Self> {
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        ensure!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        // SAFETY: just opened, and nobody else's.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        if vnet == VnetHeader::Yes {
            socket.set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1_i32)?;
        }
        // Large enough that a full send buffer is never why a frame is not sent.
        socket.set(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 64_i32 << 20)?;
        // SAFETY: zeroes are a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET)?;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = i32::try_from(ifindex)?;
        let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>())?;
        // SAFETY: the address lives during the call and has that length.
        let bound = unsafe { libc::bind(socket.0.as_raw_fd(), (&raw const address).cast(), length) };
        ensure!(bound == 0, "bind: {}", io::Error::last_os_error());
        Ok(socket)
    }

    /// `T` is what the option takes.
    fn set<T>(&self, level: i32, option: i32, value: T) -> Result<()> {
        let length = libc::socklen_t::try_from(size_of::<T>())?;
        // SAFETY: the value lives during the call and has that length.
        let set =
            unsafe { libc::setsockopt(self.0.as_raw_fd(), level, option, (&raw const value).cast(), length) };
        ensure!(set == 0, "setsockopt {option}: {}", io::Error::last_os_error());
        Ok(())
    }

    /// Sends one frame. `ENOBUFS` says that the device dropped it.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the frame lives during the call.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// An Ethernet frame of that length (at least 14) to nobody in particular.
#[must_use]
pub fn frame(destination: [u8; 6], source: [u8; 6], length: usize) -> Vec<u8> {
    let mut frame = vec![0; length.max(14)];
    frame[..6].copy_from_slice(&destination);
    frame[6..12].copy_from_slice(&source);
    frame[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
    frame
}

/// A TCP packet over IPv4 with that payload and, in front of it, the `virtio_net_hdr` that asks for segments of at most
/// `segment` bytes.
#[must_use]
pub fn tcp_with_segments(payload: usize, segment: u16) -> Vec<u8> {
    const OPTIONS: usize = 12;
    let tcp = 20 + OPTIONS;
    let headers = 14 + 20 + tcp;
    // flags NEEDS_CSUM, type TCPv4, hdr_len, gso_size, csum_start, csum_offset; little endian.
    let mut packet = vec![1, 1];
    for number in [u16::try_from(headers).unwrap_or(0), segment, 34, 16] {
        packet.extend(number.to_le_bytes());
    }
    let mut bytes = frame([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2], headers + payload);
    bytes[12..14].copy_from_slice(&0x0800_u16.to_be_bytes());
    bytes[14] = 0x45;
    bytes[16..18].copy_from_slice(&u16::try_from(20 + tcp + payload).unwrap_or(u16::MAX).to_be_bytes());
    bytes[22] = 64;
    bytes[23] = 6;
    bytes[26..30].copy_from_slice(&[192, 0, 2, 1]);
    bytes[30..34].copy_from_slice(&[192, 0, 2, 2]);
    bytes[46] = u8::try_from((tcp / 4) << 4).unwrap_or(0x50);
    packet.extend(bytes);
    packet
}
