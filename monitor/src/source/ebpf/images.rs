//! How the requests on an image are counted: chosen from how QEMU has it open. Pure.

pub use monitor_ebpf::{BLOCK_DEVICE, FLUSH, Image, ImageHistograms, ImageKey, Operation, READ, WRITE};
use monitor_ebpf::{BY_BIO, BY_CALL, BY_IOMAP, FLUSH_BY_BIO, FLUSH_BY_CALL, FLUSH_BY_EXT4};

/// Programs that are attached together, while some image needs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Direct I/O on files: `iomap_dio_rw_begin`, `iomap_dio_complete`.
    Iomap,
    /// The block layer: `block_bio_queue`, `block_rq_complete`, `block_bio_complete`.
    Bio,
    /// ext4's flushes and ranges.
    Ext4,
    /// io_uring: `io_uring_submit_req`, `io_uring_complete`.
    Uring,
    /// System calls: `sys_enter`, `sys_exit`; every system call of the host pays for them.
    Calls,
}

impl Hook {
    /// Every one.
    pub const ALL: [Self; 5] = [Self::Iomap, Self::Bio, Self::Ext4, Self::Uring, Self::Calls];

    /// The programs; what ends requests before what begins them, so that none begins whose end is not seen.
    #[must_use]
    pub const fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Iomap => &["iomap_dio_complete", "iomap_dio_rw_begin"],
            Self::Bio => &["block_bio_complete", "block_rq_complete", "block_bio_queue"],
            Self::Ext4 => {
                &["ext4_sync_file_exit", "ext4_sync_file_enter", "ext4_punch_hole", "ext4_zero_range"]
            }
            Self::Uring => &["io_uring_complete", "io_uring_submit_req"],
            Self::Calls => &["block_sys_exit", "block_sys_enter"],
        }
    }
}

/// What an image is, on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// A block device.
    Device,
    /// A file, by the magic number of its file system (`statfs.f_type`).
    File(u64),
}

/// How QEMU makes its requests (`aio=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aio {
    /// A pool of threads.
    Threads,
    /// The kernel's aio; only with direct I/O.
    Native,
    /// io_uring.
    Uring,
    /// Not told.
    Unknown,
}

impl Aio {
    /// From libvirt's `io=`, or QEMU's `aio=`.
    #[must_use]
    pub fn of_name(name: Option<&str>) -> Self {
        match name {
            Some("threads") => Self::Threads,
            Some("native") => Self::Native,
            Some("io_uring") => Self::Uring,
            _ => Self::Unknown,
        }
    }
}

/// What was counted for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// The requests of the process.
    pub image: Image,
    /// What the device below was asked for; `None` if it is not counted apart.
    pub below: Option<Image>,
}

/// The latencies of an image.
#[derive(Clone, Debug)]
pub struct Latencies {
    /// Of the requests of the process.
    pub image: Box<ImageHistograms>,
    /// Of the device below; `None` if they are not kept.
    pub below: Option<Box<ImageHistograms>>,
}

/// How QEMU has an image open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// What it is.
    pub kind: ImageKind,
    /// Past the page cache (`O_DIRECT`).
    pub direct: bool,
    /// How requests are made.
    pub aio: Aio,
    /// For writing too.
    pub writable: bool,
}

/// Magic numbers of include/uapi/linux/magic.h: file systems whose direct I/O goes through iomap.
const IOMAP: [u64; 6] = [EXT4, XFS, 0x9123_683e, 0xf2f5_2010, 0x0116_1970, 0x5a4f_4653];
const EXT4: u64 = 0xef53;
const XFS: u64 = 0x5846_5342;

/// Which hooks count an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Reads and writes; `None` if nothing here sees them.
    pub data: Option<Hook>,
    /// Flushes and discards, likewise.
    pub flush: Option<Hook>,
    /// What the device below is asked for on the image's behalf.
    pub below: Below,
}

/// How the share of an image in the work of the host's block device is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// The requests of the process are those of the device.
    Same,
    /// The process makes them, in the file system.
    Process,
    /// The process makes some, and the kernel's threads write back what it left in the page cache.
    Cached,
    /// It is not; why.
    NotAttributable(&'static str),
}

impl Below {
    fn of(opened: Opened, data: Option<Hook>, bio: bool) -> Self {
        match opened.kind {
            _ if !bio => Self::NotAttributable("the kernel refused the probes of the block layer"),
            _ if data == Some(Hook::Bio) => Self::Same,
            ImageKind::File(magic) if magic != EXT4 && magic != XFS => Self::NotAttributable(
                "the image is on a file system that does not hand its files' pages to one block device (known: ext4, xfs)",
            ),
            _ if opened.direct || !opened.writable => Self::Process,
            _ => Self::Cached,
        }
    }
}

impl Plan {
    /// The cheapest hooks that see the requests of an image opened so. `can` says which the kernel has.
    ///
    /// System calls are watched for reads and writes through the page cache only, which nothing else shows; never for
    /// flushes alone.
    #[must_use]
    pub fn of(opened: Opened, can: impl Fn(Hook) -> bool) -> Self {
        let calls = match opened.aio {
            Aio::Uring => Hook::Uring,
            Aio::Native | Aio::Threads | Aio::Unknown => Hook::Calls,
        };
        let data = match opened.kind {
            ImageKind::Device if opened.direct => Some(Hook::Bio),
            ImageKind::File(magic) if opened.direct && IOMAP.contains(&magic) && can(Hook::Iomap) => {
                Some(Hook::Iomap)
            }
            // Before Linux 6.5: a request as the file system passes it on, in parts where the file is not contiguous.
            ImageKind::File(EXT4 | XFS) if opened.direct && can(Hook::Bio) => Some(Hook::Bio),
            // Requests of the kernel's aio are in memory of the process, and their ends in a ring there.
            _ if opened.aio == Aio::Native => None,
            _ => Some(calls),
        };
        let flush = match opened.kind {
            ImageKind::Device => Some(Hook::Bio),
            ImageKind::File(EXT4) if can(Hook::Ext4) => Some(Hook::Ext4),
            ImageKind::File(_) if opened.aio == Aio::Uring => Some(Hook::Uring),
            ImageKind::File(_) => data.filter(|hook| *hook == Hook::Calls),
        };
        let data = data.filter(|h| can(*h));
        let below = Below::of(opened, data, can(Hook::Bio));
        Self { data, flush: flush.filter(|h| can(*h)), below }
    }

    /// The hooks, each once.
    pub fn hooks(self) -> impl Iterator<Item = Hook> {
        let below = matches!(self.below, Below::Process | Below::Cached).then_some(Hook::Bio);
        let wanted = [self.data, self.flush, below];
        Hook::ALL.into_iter().filter(move |hook| wanted.contains(&Some(*hook)))
    }

    /// As the kernel programs want it.
    #[must_use]
    pub fn counted_by(self) -> u32 {
        let data = match self.data {
            Some(Hook::Iomap) => BY_IOMAP,
            Some(Hook::Bio) => BY_BIO,
            Some(Hook::Uring | Hook::Calls) => BY_CALL,
            Some(Hook::Ext4) | None => 0,
        };
        let flush = match self.flush {
            Some(Hook::Ext4) => FLUSH_BY_EXT4,
            Some(Hook::Bio) => FLUSH_BY_BIO,
            Some(Hook::Uring | Hook::Calls) => FLUSH_BY_CALL,
            Some(Hook::Iomap) | None => 0,
        };
        data | flush
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TMPFS: u64 = 0x0102_1994;

    fn plan(kind: ImageKind, direct: bool, aio: Aio) -> (Option<Hook>, Option<Hook>) {
        let plan = Plan::of(Opened { kind, direct, aio, writable: true }, |_| true);
        (plan.data, plan.flush)
    }

    #[test]
    fn the_cheapest_hook_that_sees_the_requests_is_chosen() {
        use Aio::{Native, Threads, Unknown, Uring};
        use ImageKind::{Device, File};
        for aio in [Threads, Native, Uring] {
            assert_eq!(plan(File(EXT4), true, aio), (Some(Hook::Iomap), Some(Hook::Ext4)));
            assert_eq!(plan(Device, true, aio), (Some(Hook::Bio), Some(Hook::Bio)));
        }
        assert_eq!(plan(File(EXT4), false, Threads), (Some(Hook::Calls), Some(Hook::Ext4)));
        assert_eq!(plan(File(EXT4), false, Unknown), (Some(Hook::Calls), Some(Hook::Ext4)));
        assert_eq!(plan(File(EXT4), false, Uring), (Some(Hook::Uring), Some(Hook::Ext4)));
        assert_eq!(plan(File(XFS), true, Uring), (Some(Hook::Iomap), Some(Hook::Uring)));
        assert_eq!(plan(File(TMPFS), false, Threads), (Some(Hook::Calls), Some(Hook::Calls)));
        assert_eq!(plan(Device, false, Threads), (Some(Hook::Calls), Some(Hook::Bio)));
    }

    #[test]
    fn system_calls_are_never_watched_for_direct_io_on_a_file_where_iomap_shows_it() {
        let opened = Opened { kind: ImageKind::File(XFS), direct: true, aio: Aio::Threads, writable: true };
        let plan = Plan { data: Some(Hook::Iomap), flush: None, below: Below::Process };
        assert_eq!(Plan::of(opened, |_| true), plan);
    }

    #[test]
    fn what_a_kernel_lacks_is_replaced_or_left_out() {
        let opened = |aio| Opened { kind: ImageKind::File(EXT4), direct: true, aio, writable: true };
        let before_6_5 = |hook| hook != Hook::Iomap;
        for aio in [Aio::Threads, Aio::Uring, Aio::Native] {
            let plan = Plan::of(opened(aio), before_6_5);
            assert_eq!((plan.data, plan.below), (Some(Hook::Bio), Below::Same));
        }
        let calls_only = |hook| matches!(hook, Hook::Calls | Hook::Uring);
        assert_eq!(Plan::of(opened(Aio::Threads), calls_only).data, Some(Hook::Calls));
        assert_eq!(Plan::of(opened(Aio::Uring), calls_only).data, Some(Hook::Uring));
        assert_eq!(Plan::of(opened(Aio::Native), calls_only).data, None);
        let ext4_is_a_module = |hook| hook != Hook::Ext4;
        assert_eq!(Plan::of(opened(Aio::Threads), ext4_is_a_module).flush, None);
        assert_eq!(Plan::of(opened(Aio::Uring), ext4_is_a_module).flush, Some(Hook::Uring));
        let nothing = Plan::of(opened(Aio::Threads), |_| false);
        assert_eq!((nothing.counted_by(), nothing.hooks().count()), (0, 0));
        assert!(matches!(nothing.below, Below::NotAttributable(_)));
    }

    #[test]
    fn the_share_of_the_device_is_known_where_pages_or_requests_lead_back_to_the_image() {
        let below = |kind, direct, writable| {
            Plan::of(Opened { kind, direct, aio: Aio::Threads, writable }, |_| true).below
        };
        assert_eq!(below(ImageKind::File(EXT4), true, true), Below::Process);
        assert_eq!(below(ImageKind::File(EXT4), false, true), Below::Cached);
        assert_eq!(below(ImageKind::File(XFS), false, false), Below::Process);
        assert_eq!(below(ImageKind::Device, true, true), Below::Same);
        assert_eq!(below(ImageKind::Device, false, true), Below::Cached);
        assert!(matches!(below(ImageKind::File(TMPFS), false, true), Below::NotAttributable(_)));
    }

    #[test]
    fn data_and_flushes_are_counted_by_one_hook_each() {
        let opened = Opened { kind: ImageKind::Device, direct: true, aio: Aio::Native, writable: true };
        let device = Plan::of(opened, |_| true);
        assert_eq!(device.hooks().collect::<Vec<_>>(), [Hook::Bio]);
        assert_eq!(device.counted_by(), BY_BIO | FLUSH_BY_BIO);
    }
}
