//! The guest's end of a tap that vhost-net serves: a virtio-net driver without a guest.
//!
//! The rings are driven from this process's memory as a guest would drive them (`include/uapi/linux/vhost.h`,
//! `virtio_ring.h`), so that packets take the same way through the kernel: its vhost thread copies them between the rings
//! and the tap. Legacy layout, no indirect descriptors, one descriptor for each packet; x86-64 only.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::tap::RawTap;

const SET_FEATURES: libc::c_ulong = 0x4008_af00;
const SET_OWNER: libc::c_ulong = 0xaf01;
const SET_MEM_TABLE: libc::c_ulong = 0x4008_af03;
const SET_VRING_NUM: libc::c_ulong = 0x4008_af10;
const SET_VRING_ADDR: libc::c_ulong = 0x4028_af11;
const SET_VRING_BASE: libc::c_ulong = 0x4008_af12;
const SET_VRING_KICK: libc::c_ulong = 0x4008_af20;
const NET_SET_BACKEND: libc::c_ulong = 0x4008_af30;

/// Descriptors of a ring, and packets that can be under way in it.
pub const RING: u16 = 256;
/// Bytes of `struct virtio_net_hdr`, which stands before every packet.
const HEADER: usize = 10;
/// Bytes for one packet: the largest with segments, and its header.
const BUFFER: usize = 0x1_1000;
/// Where the parts of a ring are: 16 bytes for each descriptor; flags, index and 2 bytes each; flags, index and 8 bytes each.
const AVAILABLE: usize = 0x1000;
const USED: usize = 0x1800;
const RING_BYTES: usize = 0x3000;
const BUFFERS: usize = 2 * RING_BYTES;
const BYTES: usize = BUFFERS + 2 * RING as usize * BUFFER;
/// `VRING_DESC_F_WRITE`: the device writes to it.
const DEVICE_WRITES: u16 = 2;
/// `VRING_AVAIL_F_NO_INTERRUPT`: we look by ourselves.
const NO_INTERRUPT: u16 = 1;
/// How long the kernel may take for packets.
const PATIENCE: Duration = Duration::from_secs(60);

/// A driver of vhost-net. Dropping it ends the kernel's thread; the tap stays.
#[derive(Debug)]
pub struct VhostNet {
    // Before the memory that it uses.
    _device: File,
    memory: Memory,
    receive: Ring,
    transmit: Ring,
}

impl VhostNet {
    /// Takes the first queue of a tap that was opened with [`crate::tap::VnetHeader::Yes`].
    ///
    /// # Errors
    /// If this kernel has no `/dev/vhost-net`, or refuses.
    pub fn start(tap: &RawTap) -> Result<Self> {
        let device = File::options().read(true).write(true).open("/dev/vhost-net");
        let device = device.context("cannot open /dev/vhost-net: modprobe vhost_net")?;
        let memory = Memory::new()?;
        let fd = device.as_raw_fd();
        ioctl(fd, SET_OWNER, 0).context("VHOST_SET_OWNER")?;
        ioctl_with(fd, SET_FEATURES, &0_u64).context("VHOST_SET_FEATURES")?;
        let address = memory.address(0);
        // One region, whose guest addresses are ours: number, padding; guest address, bytes, our address, flags.
        ioctl_with(fd, SET_MEM_TABLE, &[1, address, BYTES as u64, address, 0])
            .context("VHOST_SET_MEM_TABLE")?;
        let receive = Ring::new(fd, (0, &memory))?;
        let transmit = Ring::new(fd, (1, &memory))?;
        let mut this = Self { _device: device, memory, receive, transmit };
        for buffer in 0..RING {
            this.receive.offer(&this.memory, (buffer, BUFFER), DEVICE_WRITES);
        }
        for ring in [0, 1] {
            let backend = [ring, tap.queues[0].as_raw_fd()];
            ioctl_with(fd, NET_SET_BACKEND, &backend).context("VHOST_NET_SET_BACKEND")?;
        }
        this.receive.kick()?;
        Ok(this)
    }

    /// Sends packets, each with its `virtio_net_hdr` in front of it, [`RING`] at most; returns when the kernel has
    /// taken all of them.
    ///
    /// # Errors
    /// If it does not take them.
    pub fn send<'p>(&mut self, packets: impl IntoIterator<Item = &'p [u8]>) -> Result<()> {
        for (buffer, packet) in (0..RING).zip(packets) {
            self.memory.write(self.transmit.buffer(buffer), packet);
            self.transmit.offer(&self.memory, (buffer, packet.len()), 0);
        }
        self.transmit.kick()?;
        let deadline = Instant::now() + PATIENCE;
        while self.transmit.take(&self.memory).is_some() || self.transmit.taken != self.transmit.offered {
            ensure!(Instant::now() < deadline, "vhost does not take the packets");
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Passes on so many packets, without their headers, and makes their buffers available again.
    ///
    /// # Errors
    /// If they do not come.
    pub fn receive(&mut self, count: usize, mut packet: impl FnMut(&[u8])) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for number in 0..count {
            let (buffer, bytes) = loop {
                match self.receive.take(&self.memory) {
                    Some(used) => break used,
                    None => ensure!(Instant::now() < deadline, "{number} of {count} packets came"),
                }
                std::thread::yield_now();
            };
            let at = self.receive.buffer(buffer);
            ensure!((HEADER..=BUFFER).contains(&bytes), "a packet of {bytes} bytes");
            packet(&self.memory.read(at, bytes)[HEADER..]);
            self.receive.offer(&self.memory, (buffer, BUFFER), DEVICE_WRITES);
        }
        self.receive.kick()
    }
}

/// One ring: its descriptors, what we offer, what the device has used.
#[derive(Debug)]
struct Ring {
    index: u16,
    kick: OwnedFd,
    /// Both count on beyond the size of the ring, and wrap.
    offered: u16,
    taken: u16,
}

impl Ring {
    fn new(device: RawFd, (index, memory): (u16, &Memory)) -> Result<Self> {
        // SAFETY: takes two numbers.
        let kick = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        ensure!(kick >= 0, "eventfd: {}", io::Error::last_os_error());
        // SAFETY: just made, and nobody else's.
        let kick = unsafe { OwnedFd::from_raw_fd(kick) };
        let ring = Self { index, kick, offered: 0, taken: 0 };
        let number = u32::from(index);
        memory.index(ring.at(AVAILABLE)).store(NO_INTERRUPT, Ordering::Relaxed);
        ioctl_with(device, SET_VRING_NUM, &[number, u32::from(RING)]).context("VHOST_SET_VRING_NUM")?;
        ioctl_with(device, SET_VRING_BASE, &[number, 0]).context("VHOST_SET_VRING_BASE")?;
        let [descriptors, available, used] = [0, AVAILABLE, USED].map(|part| memory.address(ring.at(part)));
        // Index and flags; descriptors, used, available; no log.
        let addresses = [u64::from(number), descriptors, used, available, 0];
        ioctl_with(device, SET_VRING_ADDR, &addresses).context("VHOST_SET_VRING_ADDR")?;
        let kick = [i32::from(index), ring.kick.as_raw_fd()];
        ioctl_with(device, SET_VRING_KICK, &kick).context("VHOST_SET_VRING_KICK")?;
        Ok(ring)
    }

    /// Where a part of it is in the memory.
    fn at(&self, part: usize) -> usize {
        usize::from(self.index) * RING_BYTES + part
    }

    fn buffer(&self, number: u16) -> usize {
        BUFFERS + (usize::from(self.index) * usize::from(RING) + usize::from(number)) * BUFFER
    }

    /// Gives a buffer to the device.
    fn offer(&mut self, memory: &Memory, (buffer, bytes): (u16, usize), flags: u16) {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&memory.address(self.buffer(buffer)).to_le_bytes());
        descriptor[8..12].copy_from_slice(&u32::try_from(bytes).expect("buffers are small").to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        memory.write(self.at(usize::from(buffer) * 16), &descriptor);
        let entry = usize::from(self.offered % RING) * 2;
        memory.write(self.at(AVAILABLE + 4 + entry), &buffer.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        memory.index(self.at(AVAILABLE + 2)).store(self.offered, Ordering::Release);
    }

    /// The next buffer that the device is done with, and how many bytes it wrote.
    fn take(&mut self, memory: &Memory) -> Option<(u16, usize)> {
        if memory.index(self.at(USED + 2)).load(Ordering::Acquire) == self.taken {
            return None;
        }
        let entry = memory.read(self.at(USED + 4 + usize::from(self.taken % RING) * 8), 8);
        self.taken = self.taken.wrapping_add(1);
        let word =
            |at: usize| entry[at..at + 4].iter().rev().fold(0, |word, byte| word << 8 | usize::from(*byte));
        Some((u16::try_from(word(0)).expect("the device was given small numbers"), word(4)))
    }

    fn kick(&self) -> Result<()> {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).context("cannot kick vhost")?;
        Ok(())
    }
}

fn ioctl(fd: RawFd, request: libc::c_ulong, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: every caller passes what the request takes: nothing, or the address of a value that lives through the call
    // and is at least as large as the request says.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn ioctl_with<T>(fd: RawFd, request: libc::c_ulong, value: &T) -> io::Result<()> {
    ioctl(fd, request, std::ptr::from_ref(value) as libc::c_ulong)
}

/// What guest and device share.
#[derive(Debug)]
struct Memory(NonNull<u8>);

// SAFETY: the mapping belongs to the value and holds plain bytes.
unsafe impl Send for Memory {}

impl Memory {
    fn new() -> Result<Self> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address the kernel chooses touches no memory in use.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), BYTES, access, flags, -1, 0) };
        ensure!(base != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        Ok(Self(NonNull::new(base.cast()).context("mapped at address 0")?))
    }

    fn address(&self, at: usize) -> u64 {
        self.0.as_ptr() as u64 + at as u64
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(bytes.len() <= BUFFER && at + bytes.len() <= BYTES, "{} bytes at {at:#x}", bytes.len());
        // SAFETY: inside the mapping (checked), at a place that the device does not read before an index says so.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.as_ptr().add(at), bytes.len()) }
    }

    fn read(&self, at: usize, bytes: usize) -> &[u8] {
        assert!(at + bytes <= BYTES, "{bytes} bytes at {at:#x}");
        // SAFETY: inside the mapping (checked), at a place that the device does not write before an index says so.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().add(at), bytes) }
    }

    /// What tells the other side how far this one is.
    fn index(&self, at: usize) -> &AtomicU16 {
        assert!(at + 2 <= BUFFERS && at.is_multiple_of(2), "no index at {at:#x}");
        // SAFETY: inside the mapping and aligned (checked); the kernel reads and writes it as one word.
        unsafe { self.0.as_ptr().add(at).cast::<AtomicU16>().as_ref().expect("not 0") }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; no reference outlives `self`, and the device is closed before.
        unsafe { libc::munmap(self.0.as_ptr().cast(), BYTES) };
    }
}
