//! The files and block devices that a QEMU process has open: its disks' images, seen from the host.
//!
//! Read from `/proc/PID/fd` and `/proc/PID/fdinfo`. Works without libvirt, and whatever path an image was opened by.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    os::unix::{ffi::OsStringExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use super::{OpenFiles, ProcfsError};
use crate::{
    inventory::QemuProcess,
    source::ebpf::{BLOCK_DEVICE, ImageKey},
    units::Tgid,
};

/// An image that a process has open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenImage {
    /// What it is.
    pub id: ImageId,
    /// Its path as the process sees it; of a deleted file the last one.
    pub path: PathBuf,
    /// Deleted, or replaced under its name.
    pub deleted: bool,
    /// Some descriptor is open past the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Some descriptor is open for writing.
    pub writable: bool,
    /// Some descriptor is open for reading: a log file's is not.
    pub readable: bool,
    /// The descriptors, ascending.
    pub fds: Vec<u32>,
}

/// What an image is on this host. Devices are as the kernel writes them: major << 20 | minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ImageId {
    /// A file.
    File {
        /// Device of its file system.
        device: u32,
        /// Its inode.
        inode: u64,
    },
    /// A block device.
    Device(u32),
}

impl ImageId {
    /// The file or block device that a path leads to, if it is one.
    #[must_use]
    pub fn of_path(path: &Path) -> Option<Self> {
        Self::of(&fs::metadata(path).ok()?)
    }

    /// As the kernel programs know it, opened by a process.
    #[must_use]
    pub fn key(self, tgid: Tgid) -> ImageKey {
        match self {
            Self::File { device, inode } => ImageKey { inode, device, tgid: tgid.0 },
            Self::Device(device) => ImageKey { inode: BLOCK_DEVICE, device, tgid: tgid.0 },
        }
    }

    fn of(metadata: &fs::Metadata) -> Option<Self> {
        const S_IFMT: u32 = 0o170_000;
        const S_IFREG: u32 = 0o100_000;
        const S_IFBLK: u32 = 0o060_000;
        match metadata.mode() & S_IFMT {
            S_IFREG => Some(Self::File { device: kernel_device(metadata.dev())?, inode: metadata.ino() }),
            S_IFBLK => Some(Self::Device(kernel_device(metadata.rdev())?)),
            _ => None,
        }
    }
}

/// `dev_t` of the C library into the kernel's own form, which has 12 and 20 bits.
fn kernel_device(device: u64) -> Option<u32> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    (major < 1 << 12 && minor < 1 << 20).then_some(major << 20 | minor)
}

/// The images of a process, each once, by id.
///
/// # Errors
/// If the process is gone or its descriptors cannot be listed (another user's, without `CAP_SYS_PTRACE`).
pub fn open_images(root: &Path, process: QemuProcess) -> Result<Vec<OpenImage>, ProcfsError> {
    let directory = root.join(process.tgid.to_string());
    let fds = directory.join("fd");
    let entries = fs::read_dir(&fds).map_err(|source| ProcfsError::Read { path: fds.clone(), source })?;
    let mut numbers: Vec<u32> = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    let mut images: BTreeMap<ImageId, OpenImage> = BTreeMap::new();
    let mut mounts = None;
    for fd in numbers {
        let Some(image) = open_image(&directory, fd, &mut mounts) else { continue };
        images
            .entry(image.id)
            .and_modify(|known| {
                known.direct |= image.direct;
                known.writable |= image.writable;
                known.readable |= image.readable;
                known.deleted &= image.deleted;
                known.fds.push(fd);
            })
            .or_insert(image);
    }
    Ok(images.into_values().collect())
}

/// `None` if the descriptor is no image, or closed meanwhile.
fn open_image(directory: &Path, fd: u32, mounts: &mut Option<String>) -> Option<OpenImage> {
    let link = directory.join("fd").join(fd.to_string());
    let target = fs::read_link(&link).ok()?.into_os_string().into_vec();
    // Sockets, pipes and the like have no path.
    if target.first() != Some(&b'/') {
        return None;
    }
    let mut id = ImageId::of(&fs::metadata(&link).ok()?)?;
    let info = fs::read_to_string(directory.join("fdinfo").join(fd.to_string())).ok()?;
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let flags = i32::from_str_radix(field("flags")?.trim(), 8).ok()?;
    if let ImageId::File { device, .. } = &mut id
        && let Some(mount) = field("mnt_id").map(str::trim)
    {
        let mounts =
            mounts.get_or_insert_with(|| fs::read_to_string(directory.join("mountinfo")).unwrap_or_default());
        *device = mount_device(mounts, mount).unwrap_or(*device);
    }
    let (path, deleted) = match target.strip_suffix(b" (deleted)") {
        Some(path) if fs::symlink_metadata(&link).is_ok() => (path.to_vec(), true),
        _ => (target, false),
    };
    let access = flags & libc::O_ACCMODE;
    Some(OpenImage {
        id,
        path: OsString::from_vec(path).into(),
        deleted,
        direct: flags & libc::O_DIRECT != 0,
        writable: access != libc::O_RDONLY,
        readable: access != libc::O_WRONLY,
        fds: vec![fd],
    })
}

/// The device of the file system of a mount, from `mountinfo`: what the kernel's own inodes say. btrfs tells `stat` a
/// device of each subvolume's instead.
fn mount_device(mounts: &str, mount: &str) -> Option<u32> {
    let line = mounts.lines().find(|line| line.split(' ').next() == Some(mount))?;
    let (major, minor) = line.split(' ').nth(2)?.split_once(':')?;
    let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    (major < 1 << 12 && minor < 1 << 20).then_some(major << 20 | minor)
}

/// Cheap signs that a process may have opened, closed or replaced an image since they were taken.
#[derive(Clone, Debug)]
pub struct ImageSigns {
    /// How many descriptors are open (`st_size` of the directory, Linux 6.2; 0 before).
    descriptors: u64,
    /// Where the first descriptor of each file and block device leads.
    links: Vec<Link>,
}

#[derive(Clone, Debug)]
struct Link {
    fd: u32,
    target: Option<PathBuf>,
    /// Open for reading: a log file and a file with a process id are not, and stay open as long as the process lives.
    readable: bool,
}

impl ImageSigns {
    /// Takes them.
    #[must_use]
    pub fn of(files: &OpenFiles, images: &[OpenImage]) -> Self {
        let link = |image: &OpenImage| {
            let fd = *image.fds.first()?;
            Some(Link { fd, target: files.target(fd), readable: image.readable })
        };
        Self { descriptors: files.count().unwrap_or(0), links: images.iter().filter_map(link).collect() }
    }

    /// Whether they are the same now: all of them, or those of files that are read.
    #[must_use]
    pub fn are_as_before(&self, files: &OpenFiles, all: bool) -> bool {
        let same = |link: &Link| files.target(link.fd) == link.target;
        files.count().unwrap_or(0) == self.descriptors
            && self.links.iter().filter(|link| all || link.readable).all(same)
    }

    /// Whether the kernel counts descriptors; if not, a new image goes unnoticed.
    #[must_use]
    pub fn are_complete(&self) -> bool {
        self.descriptors > 0
    }
}

/// The magic number of the file system that a descriptor of a process is on (`statfs.f_type`).
#[must_use]
pub fn file_system(root: &Path, process: QemuProcess, fd: u32) -> Option<u64> {
    let link = root.join(process.tgid.to_string()).join("fd").join(fd.to_string());
    u64::try_from(rustix::fs::statfs(&link).ok()?.f_type).ok()
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::unix::fs::OpenOptionsExt as _,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn a_file_that_is_open_twice_is_one_image() {
        let path = std::env::temp_dir().join(format!("kvm-monitor-images-{}", std::process::id()));
        let write = fs::File::create(&path).unwrap();
        let read = fs::OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(&path).unwrap();
        let process = QemuProcess { tgid: Tgid(std::process::id()), start_time_ticks: 0 };
        let find = || {
            let images = open_images(Path::new("/proc"), process).unwrap();
            images.into_iter().find(|image| image.path == path)
        };
        let image = find().unwrap();
        assert_eq!((image.writable, image.readable, image.direct, image.fds.len()), (true, true, false, 2));
        assert!(matches!(image.id, ImageId::File { inode, .. } if inode == read.metadata().unwrap().ino()));
        let files = OpenFiles::open(Path::new("/proc"), process).unwrap();
        let signs = ImageSigns::of(&files, std::slice::from_ref(&image));
        drop(write);
        assert!(!signs.are_as_before(&files, false));
        fs::remove_file(&path).unwrap();
        let image = find().unwrap();
        assert!(image.deleted && !image.writable);
    }

    #[test]
    fn a_file_that_is_only_written_is_a_sign_when_all_are_asked_for() {
        let paths = ["a", "b"].map(|name| {
            std::env::temp_dir().join(format!("kvm-monitor-signs-{}-{name}", std::process::id()))
        });
        let script = "exec 5>\"$1\"; echo; read go; exec 5>\"$2\"; echo; read go";
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", script, "sh"]).args(&paths).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = shell.spawn().unwrap();
        let process = QemuProcess { tgid: Tgid(shell.id()), start_time_ticks: 0 };
        let (mut go, mut done) = (shell.stdin.take().unwrap(), shell.stdout.take().unwrap());
        done.read_exact(&mut [0]).unwrap();
        let images = open_images(Path::new("/proc"), process).unwrap();
        let image = images.iter().find(|image| image.path == paths[0]).unwrap();
        assert!(!image.readable && image.fds == [5], "{image:?}");
        let files = OpenFiles::open(Path::new("/proc"), process).unwrap();
        let signs = ImageSigns::of(&files, &images);
        let ask = || [false, true].map(|all| signs.are_as_before(&files, all));
        assert_eq!(ask(), [true, true]);
        go.write_all(b"\n").unwrap();
        done.read_exact(&mut [0]).unwrap();
        assert_eq!(ask(), [true, false]);
        drop(go);
        shell.wait().unwrap();
        paths.iter().for_each(|path| fs::remove_file(path).unwrap());
    }

    #[test]
    fn the_device_of_a_mount_is_the_third_word() {
        let mounts = "22 1 0:20 / / rw - ext4 /dev/vda rw\n315 22 259:1048575 / /d rw - btrfs x rw\n";
        assert_eq!(mount_device(mounts, "22"), Some(20));
        assert_eq!(mount_device(mounts, "315"), Some(259 << 20 | 1_048_575));
        assert_eq!(mount_device(mounts, "31"), None);
        assert_eq!(mount_device("7 1 x:1 / /\n7", "7"), None);
    }
}
