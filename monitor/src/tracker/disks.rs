//! The images of one domain's disks: which of QEMU's open files and devices belong to which disk, and what the kernel
//! programs counted for them.
//!
//! A disk is the sum of its images: those it has now (a backing chain) and those it had before (a snapshot, another
//! medium), so that its counters go on when images come and go.

use std::path::{Path, PathBuf};

use super::Depth;
use crate::{
    inventory::{self, Observable, QemuProcess},
    ledger::new_in_histogram,
    metric::Metric,
    sample::{DiskDetail, Values},
    source::{
        ebpf::{
            Aio, Below, Counted, Ebpf, FLUSH, Image, ImageHistograms, ImageKind, ImageSlot, Latencies,
            NotWatched, Opened, Plan, READ, WRITE,
        },
        procfs::{
            OpenFiles, ProcfsError,
            images::{ImageId, ImageSigns, OpenImage, file_system, open_images},
        },
    },
    units::{Bytes, Count, MonotonicNs, Nanos, SourceKind},
};

/// Where the kernel does not count descriptors, images are looked for that often.
const FULL_LOOK_NS: u64 = 10_000_000_000;
/// The half of a word of [`Image::errnos`] that has the count.
const LOW: u64 = 0xffff_ffff;

/// The images of a domain.
#[derive(Debug, Default)]
pub(super) struct Disks {
    images: Vec<Watched>,
    totals: Vec<Total>,
    signs: Option<ImageSigns>,
    looked: Option<MonotonicNs>,
}

/// An image that is watched.
#[derive(Debug)]
struct Watched {
    target: String,
    id: ImageId,
    slot: ImageSlot,
    writable: bool,
    /// Only block jobs write to it since it had so many writes.
    jobs_from: Option<Written>,
    /// It is not the disk's yet but what that is copied to: what is not seen of it takes nothing from the disk's figures.
    is_copy: bool,
}

/// Writes of an image: requests and bytes.
type Written = [u64; 2];

/// What is known of a disk beside its images.
#[derive(Debug)]
struct Total {
    target: String,
    /// Counted for images it no longer has.
    earlier: Box<(Figures, Histograms)>,
    /// Of those, and of images that became the one on top, what block jobs wrote.
    by_jobs: Written,
    /// Its latencies as of the last sample that had them.
    histograms: Option<Box<Histograms>>,
    /// Requests that had ended by then and by the last reading: with no more of them there are no more latencies.
    ended: [Ended; 2],
    /// Why an image of it is not watched.
    blind: Option<String>,
    lost: u64,
}

/// The sum of several images' figures.
#[derive(Clone, Copy, Debug)]
struct Figures {
    image: Image,
    /// Of the host's device below.
    below: Image,
}

/// Requests that ended, by operation: of the images, and of the host's device below.
type Ended = [[u64; 3]; 2];

/// The sum of several images' latencies.
#[derive(Clone, Copy, Debug)]
struct Histograms {
    image: ImageHistograms,
    below: ImageHistograms,
}

impl Figures {
    const ZERO: Self = Self { image: Image::ZERO, below: Image::ZERO };

    fn ended(&self) -> Ended {
        let ended = |image: &Image| {
            [READ, WRITE, FLUSH].map(|o| {
                let operation = image.operations[o as usize];
                operation.done + operation.failed
            })
        };
        [ended(&self.image), ended(&self.below)]
    }

    fn add(&mut self, counted: &Counted, plan: Plan) {
        add(&mut self.image, &counted.image);
        match (plan.below, counted.below) {
            (Below::Same, _) => add(&mut self.below, &counted.image),
            (_, Some(below)) => add(&mut self.below, &below),
            (_, None) => {}
        }
    }
}

impl Histograms {
    const ZERO: Self = Self { image: ImageHistograms::ZERO, below: ImageHistograms::ZERO };

    fn add(&mut self, latencies: &Latencies, plan: Plan) {
        add_histograms(&mut self.image, &latencies.image);
        match (plan.below, &latencies.below) {
            (Below::Same, _) => add_histograms(&mut self.below, &latencies.image),
            (_, Some(below)) => add_histograms(&mut self.below, below),
            (_, None) => {}
        }
    }
}

/// Where to look.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) root: &'a Path,
    pub(super) process: QemuProcess,
    pub(super) files: &'a OpenFiles,
    pub(super) disks: &'a [inventory::Disk],
}

impl Place<'_> {
    /// Whether a path, as the process sees it, is that of an image.
    fn leads_to(&self, path: &Path, image: &OpenImage) -> bool {
        let inside = self.root.join(self.process.tgid.to_string()).join("root");
        let path = inside.join(path.strip_prefix("/").unwrap_or(path));
        ImageId::of_path(&path).is_some_and(|id| id == image.id)
    }
}

impl Disks {
    /// Nothing is counted.
    pub(super) fn are_unwatched(&self) -> bool {
        self.images.is_empty()
    }

    /// Another description of the disks: look at the images again, whatever `/proc` says.
    pub(super) fn described(&mut self) {
        self.signs = None;
    }

    /// Every slot, at the end of the process.
    pub(super) fn take_slots(&mut self) -> Vec<ImageSlot> {
        std::mem::take(self).images.into_iter().map(|image| image.slot).collect()
    }

    /// Looks whether QEMU opened, closed or replaced an image, and follows. Returns what the reader of the stream has
    /// to be told.
    pub(super) fn look(
        &mut self,
        ebpf: &mut Ebpf,
        at: Place<'_>,
        depth: Depth,
    ) -> Result<Vec<String>, ProcfsError> {
        let now = MonotonicNs::now();
        let due = |signs: &ImageSigns| {
            !signs.are_complete() && self.looked.is_none_or(|at| now.since(at) >= FULL_LOOK_NS)
        };
        if let Some(signs) = &self.signs
            && signs.are_as_before(at.files, depth == Depth::Full)
            && !due(signs)
        {
            return Ok(Vec::new());
        }
        let open = open_images(at.root, at.process)?;
        self.looked = Some(now);
        self.signs = Some(ImageSigns::of(at.files, &open));
        let wanted: Vec<(usize, &OpenImage, Plan)> = open
            .iter()
            .filter_map(|image| {
                let disk = self.disk_of(image, at)?;
                let plan = plan(ebpf, image, at, &at.disks[disk]);
                let counts = plan.data.is_some() || !is_copy(image, &at.disks[disk], at);
                counts.then_some((disk, image, plan))
            })
            .collect();
        self.keep(ebpf, &wanted, at.disks);
        self.note_jobs(ebpf, &wanted, at);
        let mut notices = Vec::new();
        for (disk, image, plan) in wanted {
            if self.images.iter().any(|watched| watched.id == image.id) {
                continue;
            }
            let target = &at.disks[disk].target;
            match ebpf.watch_image(image.id.key(at.process.tgid), plan) {
                Ok(slot) => {
                    self.images.push(Watched {
                        target: target.clone(),
                        id: image.id,
                        slot,
                        writable: image.writable,
                        jobs_from: is_for_jobs(image, &at.disks[disk], at).then_some([0; 2]),
                        is_copy: is_copy(image, &at.disks[disk], at),
                    });
                    self.total(target).blind = None;
                }
                Err(NotWatched::Off) => {}
                Err(_) if is_copy(image, &at.disks[disk], at) => {}
                Err(error) => {
                    let total = self.total(target);
                    let reason = format!("disk {target}, {}: {error}", image.path.display());
                    if total.blind.as_ref() != Some(&reason) {
                        total.blind = Some(reason.clone());
                        notices.push(reason);
                    }
                }
            }
        }
        Ok(notices)
    }

    /// Stops watching what is no longer there, or is another disk's, or has to be counted otherwise.
    fn keep(&mut self, ebpf: &mut Ebpf, wanted: &[(usize, &OpenImage, Plan)], disks: &[inventory::Disk]) {
        let stays = |watched: &Watched| {
            wanted.iter().any(|(disk, image, plan)| {
                image.id == watched.id
                    && disks[*disk].target == watched.target
                    && *plan == watched.slot.plan()
            })
        };
        let (stay, go) = std::mem::take(&mut self.images).into_iter().partition(stays);
        self.images = stay;
        for watched in go {
            let plan = watched.slot.plan();
            let Some((counted, latencies)) = ebpf.unwatch_image(watched.slot) else { continue };
            let total = self.total(&watched.target);
            add_written(&mut total.by_jobs, written(&counted.image), watched.jobs_from);
            total.earlier.0.add(&counted, plan);
            if let Some(latencies) = latencies {
                total.earlier.1.add(&latencies, plan);
            }
        }
        self.totals.retain(|total| disks.iter().any(|disk| disk.target == total.target));
    }

    /// Takes note to which images only block jobs write now.
    fn note_jobs(&mut self, ebpf: &Ebpf, wanted: &[(usize, &OpenImage, Plan)], at: Place<'_>) {
        for watched in &mut self.images {
            let Some((disk, image, _)) = wanted.iter().find(|(_, image, _)| image.id == watched.id) else {
                continue;
            };
            watched.is_copy = is_copy(image, &at.disks[*disk], at);
            if is_for_jobs(image, &at.disks[*disk], at) == watched.jobs_from.is_some() {
                continue;
            }
            let Some(now) = ebpf.image(&watched.slot).map(|counted| written(&counted.image)) else {
                continue;
            };
            match watched.jobs_from.take() {
                None => watched.jobs_from = Some(now),
                from => {
                    let total = self.totals.iter_mut().find(|total| total.target == watched.target);
                    total.into_iter().for_each(|total| add_written(&mut total.by_jobs, now, from));
                }
            }
        }
    }

    /// The disk that an image belongs to: by its path, by what the disk's paths lead to, or as before.
    fn disk_of(&self, image: &OpenImage, at: Place<'_>) -> Option<usize> {
        let paths = |disk: &inventory::Disk| {
            let top = (disk.observable == Observable::Yes).then_some(disk.source.clone()).flatten();
            let others = disk.backing_chain.iter().chain(&disk.mirror).cloned();
            top.into_iter().chain(others).map(PathBuf::from).collect::<Vec<_>>()
        };
        let by = |belongs: &dyn Fn(&Path) -> bool| {
            at.disks.iter().position(|disk| paths(disk).iter().any(|path| belongs(path)))
        };
        by(&|path| path == image.path).or_else(|| by(&|path| at.leads_to(path, image))).or_else(|| {
            let known = self.images.iter().find(|watched| watched.id == image.id)?;
            at.disks.iter().position(|disk| disk.target == known.target)
        })
    }

    fn total(&mut self, target: &str) -> &mut Total {
        let at = self.totals.iter().position(|total| total.target == target).unwrap_or_else(|| {
            self.totals.push(Total {
                target: target.to_owned(),
                earlier: Box::new((Figures::ZERO, Histograms::ZERO)),
                by_jobs: [0; 2],
                histograms: None,
                ended: Default::default(),
                blind: None,
                lost: 0,
            });
            self.totals.len() - 1
        });
        &mut self.totals[at]
    }

    /// Puts the figures of one disk. Returns how many requests more could not be timed, or ended unseen.
    pub(super) fn put(
        &mut self,
        ebpf: &Ebpf,
        target: &str,
        (values, detail): (&mut Values, &mut DiskDetail),
    ) -> u64 {
        let Some(seen) = self.seen(target) else { return 0 };
        let images = self.images.iter().filter(|watched| watched.target == target);
        let Some(total) = self.totals.iter_mut().find(|total| total.target == target) else { return 0 };
        let (mut sum, mut by_jobs, mut have_jobs) = (total.earlier.0, total.by_jobs, total.by_jobs != [0; 2]);
        for watched in images {
            if let Some(counted) = ebpf.image(&watched.slot) {
                sum.add(&counted, watched.slot.plan());
                add_written(&mut by_jobs, written(&counted.image), watched.jobs_from);
                have_jobs |= watched.jobs_from.is_some();
            }
        }
        total.ended[1] = sum.ended();
        put_image(values, &sum.image, seen);
        if seen.data && have_jobs {
            values.put(SourceKind::Ebpf, Metric::DiskJobWrReq, Count(by_jobs[0]));
            values.put(SourceKind::Ebpf, Metric::DiskJobWrBytes, Bytes(by_jobs[1]));
        }
        if seen.below.is_ok() {
            put_below(values, &sum.below);
        }
        detail.errors = errors(&sum.image);
        let all = [sum.image, sum.below].map(|image| image.untimed + image.unseen).iter().sum();
        let lost = u64::saturating_sub(all, total.lost);
        total.lost = all;
        lost
    }

    /// Puts the latencies of one disk since the last call.
    pub(super) fn put_histograms(&mut self, ebpf: &Ebpf, target: &str, detail: &mut DiskDetail) {
        let Some(seen) = self.seen(target) else { return };
        let images = self.images.iter().filter(|watched| watched.target == target);
        let Some(total) = self.totals.iter_mut().find(|total| total.target == target) else { return };
        let mut new: [[Vec<[u64; 3]>; 3]; 2] = Default::default();
        if total.ended[0] != total.ended[1] {
            total.ended[0] = total.ended[1];
            let mut now = Box::new(total.earlier.1);
            for watched in images {
                if let Some(latencies) = ebpf.latencies(&watched.slot) {
                    now.add(&latencies, watched.slot.plan());
                }
            }
            let before = total.histograms.get_or_insert_with(|| Box::new(Histograms::ZERO));
            let since = |before: &ImageHistograms, now: &ImageHistograms| {
                [READ, WRITE, FLUSH].map(|operation| {
                    let at = operation as usize;
                    new_in_histogram(&before.operations[at], &now.operations[at])
                })
            };
            new = [since(&before.image, &now.image), since(&before.below, &now.below)];
            total.histograms = Some(now);
        }
        let [[read, write, flush], [device_read, device_write, _]] = new;
        if seen.data {
            (detail.rd_hist, detail.wr_hist) = (Some(read), Some(write));
        }
        if seen.flush {
            detail.fl_hist = Some(flush);
        }
        match seen.below {
            Ok(()) => {
                (detail.device_rd_hist, detail.device_wr_hist) = (Some(device_read), Some(device_write))
            }
            Err(reason) => detail.device_reason = Some(reason),
        }
    }

    /// `None` if the disk has no image that is watched, or one that cannot be: a part of its figures is none.
    fn seen(&self, target: &str) -> Option<Seen> {
        let total = self.totals.iter().find(|total| total.target == target)?;
        let own = || self.images.iter().filter(|watched| watched.target == target && !watched.is_copy);
        (own().next().is_some() && total.blind.is_none()).then(|| Seen {
            data: own().all(|image| image.slot.plan().data.is_some()),
            flush: own().all(|image| !image.writable || image.slot.plan().flush.is_some()),
            below: own().map(|image| image.slot.below()).find(Result::is_err).unwrap_or(Ok(())),
        })
    }
}

/// Which requests of a disk are seen.
#[derive(Clone, Copy)]
struct Seen {
    data: bool,
    flush: bool,
    /// The device's share; why not.
    below: Result<(), &'static str>,
}

fn plan(ebpf: &Ebpf, image: &OpenImage, at: Place<'_>, disk: &inventory::Disk) -> Plan {
    let kind = match image.id {
        ImageId::Device(_) => ImageKind::Device,
        ImageId::File { .. } => {
            let fd = image.fds.first().copied().unwrap_or_default();
            ImageKind::File(file_system(at.root, at.process, fd).unwrap_or(0))
        }
    };
    let aio = Aio::of_name(disk.io.as_deref());
    let opened = Opened { kind, direct: image.direct, aio, writable: image.writable };
    Plan::of(opened, |hook| ebpf.can(hook))
}

/// Whether a guest does not write to an image: it lies below the one on top of its disk, or is what that one is copied to.
fn is_for_jobs(image: &OpenImage, disk: &inventory::Disk, at: Place<'_>) -> bool {
    is_one_of(image, disk.backing_chain.iter().chain(&disk.mirror), at)
        && !is_one_of(image, disk.source.iter(), at)
}

/// Whether an image is what its disk is copied to, and none of the disk's own.
fn is_copy(image: &OpenImage, disk: &inventory::Disk, at: Place<'_>) -> bool {
    is_one_of(image, disk.mirror.iter(), at)
        && !is_one_of(image, disk.source.iter().chain(&disk.backing_chain), at)
}

fn is_one_of<'a>(image: &OpenImage, mut paths: impl Iterator<Item = &'a String>, at: Place<'_>) -> bool {
    paths.any(|path| Path::new(path) == image.path || at.leads_to(Path::new(path), image))
}

fn written(image: &Image) -> Written {
    let write = image.operations[WRITE as usize];
    [write.done, write.bytes]
}

/// Adds what was written since only block jobs write to an image, if that is so.
fn add_written(sum: &mut Written, now: Written, jobs_from: Option<Written>) {
    for ((sum, now), from) in sum.iter_mut().zip(now).zip(jobs_from.into_iter().flatten()) {
        *sum += now.saturating_sub(from);
    }
}

fn put_image(values: &mut Values, image: &Image, seen: Seen) {
    const EBPF: SourceKind = SourceKind::Ebpf;
    let [read, write, flush] = [READ, WRITE, FLUSH].map(|o| image.operations[o as usize]);
    if seen.data {
        values.put(EBPF, Metric::DiskRdReq, Count(read.done));
        values.put(EBPF, Metric::DiskRdBytes, Bytes(read.bytes));
        values.put(EBPF, Metric::DiskRdTime, Nanos(read.time_ns));
        values.put(EBPF, Metric::DiskWrReq, Count(write.done));
        values.put(EBPF, Metric::DiskWrBytes, Bytes(write.bytes));
        values.put(EBPF, Metric::DiskWrTime, Nanos(write.time_ns));
        values.put(EBPF, Metric::DiskErrs, Count(read.failed + write.failed + flush.failed));
        values.put(EBPF, Metric::DiskInflight, Count(image.in_flight()));
        values.put(EBPF, Metric::DiskOpenReq, Count(image.open_requests));
        values.put(EBPF, Metric::DiskOpenBytes, Bytes(image.open_bytes));
    }
    if seen.flush {
        values.put(EBPF, Metric::DiskFlReq, Count(flush.done));
        values.put(EBPF, Metric::DiskFlTime, Nanos(flush.time_ns));
        values.put(EBPF, Metric::DiskDiscardReq, Count(image.discards));
        values.put(EBPF, Metric::DiskDiscardBytes, Bytes(image.discard_bytes));
        values.put(EBPF, Metric::DiskZeroReq, Count(image.zeroes));
        values.put(EBPF, Metric::DiskZeroBytes, Bytes(image.zero_bytes));
    }
}

fn put_below(values: &mut Values, below: &Image) {
    const EBPF: SourceKind = SourceKind::Ebpf;
    let [read, write] = [READ, WRITE].map(|o| below.operations[o as usize]);
    values.put(EBPF, Metric::DiskDeviceRdReq, Count(read.done));
    values.put(EBPF, Metric::DiskDeviceRdBytes, Bytes(read.bytes));
    values.put(EBPF, Metric::DiskDeviceRdTime, Nanos(read.time_ns));
    values.put(EBPF, Metric::DiskDeviceWrReq, Count(write.done));
    values.put(EBPF, Metric::DiskDeviceWrBytes, Bytes(write.bytes));
    values.put(EBPF, Metric::DiskDeviceWrTime, Nanos(write.time_ns));
}

/// Failed requests by error number; an empty list where there was none.
fn errors(image: &Image) -> Vec<(u32, u64)> {
    let split = |word: &u64| ((word >> 32) as u32, word & LOW);
    let mut errors: Vec<_> = image.errnos.iter().map(split).filter(|(_, count)| *count > 0).collect();
    if image.other_errors > 0 {
        errors.push((0, image.other_errors));
    }
    errors.sort_unstable();
    errors
}

fn add(sum: &mut Image, image: &Image) {
    for (sum, one) in sum.begun.iter_mut().zip(&image.begun) {
        *sum += one;
    }
    for (sum, one) in sum.operations.iter_mut().zip(&image.operations) {
        sum.done += one.done;
        sum.failed += one.failed;
        sum.bytes += one.bytes;
        sum.time_ns += one.time_ns;
    }
    sum.discards += image.discards;
    sum.discard_bytes += image.discard_bytes;
    sum.zeroes += image.zeroes;
    sum.zero_bytes += image.zero_bytes;
    sum.open_requests += image.open_requests;
    sum.open_bytes += image.open_bytes;
    sum.untimed += image.untimed;
    sum.unseen += image.unseen;
    sum.other_errors += image.other_errors;
    for word in image.errnos.iter().filter(|word| **word != 0) {
        match sum.errnos.iter_mut().find(|place| **place >> 32 == word >> 32 || **place == 0) {
            Some(place) => *place = (word & !LOW) | ((*place & LOW) + (word & LOW)),
            None => sum.other_errors += word & LOW,
        }
    }
}

fn add_histograms(sum: &mut ImageHistograms, image: &ImageHistograms) {
    for (sum, one) in sum.operations.iter_mut().zip(&image.operations) {
        for (sum, one) in sum.iter_mut().zip(one) {
            *sum = sum.wrapping_add(*one);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_several_images_are_summed_by_number() {
        let mut sum = Image::ZERO;
        let image = Image { errnos: [5 << 32 | 2, 28 << 32 | 1, 0, 0, 0, 0], ..Image::ZERO };
        add(&mut sum, &image);
        add(&mut sum, &Image { errnos: [28 << 32 | 4, 0, 0, 0, 0, 0], other_errors: 3, ..Image::ZERO });
        assert_eq!(errors(&sum), [(0, 3), (5, 2), (28, 5)]);
        assert_eq!(errors(&Image::ZERO), []);
    }
}
