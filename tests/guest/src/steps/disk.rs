//! Requests to virtual disks: exact numbers of reads, writes, flushes and discards.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use crate::clock;
use crate::json::Object;
use crate::script::Requests;

/// Alignment that direct I/O needs on any device.
const ALIGN: usize = 4096;
/// `BLKDISCARD` of linux/fs.h, `_IO(0x12, 119)`; takes offset and length.
const BLKDISCARD: libc::c_ulong = 0x1277;

/// What the kernel may take to find a disk that was plugged in.
const HOTPLUG: Duration = Duration::from_secs(20);

/// Direct writes, one request each.
pub(crate) fn write(requests: &Requests) -> io::Result<Object> {
    let mut disk = open(&requests.disk, OpenOptions::new().write(true).custom_flags(libc::O_DIRECT))?;
    timed(requests, |buffer| disk.write_all(buffer))
}

/// Direct reads, one request each.
pub(crate) fn read(requests: &Requests) -> io::Result<Object> {
    let mut disk = open(&requests.disk, OpenOptions::new().read(true).custom_flags(libc::O_DIRECT))?;
    timed(requests, |buffer| disk.read_exact(buffer))
}

/// Writes into the page cache and one fsync: how many requests reach the disk is the guest kernel's choice.
pub(crate) fn write_buffered(requests: &Requests) -> io::Result<Object> {
    let mut disk = open(&requests.disk, OpenOptions::new().write(true))?;
    let done = timed(requests, |buffer| disk.write_all(buffer))?;
    disk.sync_all()?;
    Ok(done)
}

/// That many flushes.
pub(crate) fn flush(disk: &str, count: u64) -> io::Result<Object> {
    let file = open(disk, OpenOptions::new().write(true))?;
    for _ in 0..count {
        file.sync_all()?;
    }
    Ok(Object::new().raw("flushes", count))
}

/// Discards a range.
pub(crate) fn discard(disk: &str, offset_bytes: u64, length_bytes: u64) -> io::Result<Object> {
    let file = open(disk, OpenOptions::new().write(true))?;
    let range = [offset_bytes, length_bytes];
    // SAFETY: the descriptor is open, and BLKDISCARD reads two u64 at the pointer.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD as _, range.as_ptr()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(Object::new().raw("bytes", length_bytes)) }
}

/// There is no file of the device, or no device behind it yet.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO))
}

/// A disk that was plugged in a moment ago is waited for.
fn open(disk: &str, options: &OpenOptions) -> io::Result<File> {
    let start = Instant::now();
    loop {
        match options.open(format!("/dev/{disk}")) {
            Err(error) if is_absent(&error) && start.elapsed() < HOTPLUG => {
                std::thread::sleep(Duration::from_millis(10));
            }
            opened => return opened,
        }
    }
}

fn timed(requests: &Requests, mut one: impl FnMut(&mut [u8]) -> io::Result<()>) -> io::Result<Object> {
    let mut memory = vec![0x5a; requests.size_bytes + ALIGN];
    let skip = memory.as_ptr().align_offset(ALIGN);
    let buffer = &mut memory[skip..skip + requests.size_bytes];
    let start = Instant::now();
    for _ in 0..requests.count {
        one(buffer)?;
    }
    let bytes = requests.count * u64::try_from(requests.size_bytes).unwrap_or(u64::MAX);
    Ok(Object::new()
        .raw("requests", requests.count)
        .raw("bytes", bytes)
        .raw("wall_ns", clock::ns(start.elapsed())))
}
