//! Disks of domains that libvirt does not tell of: the images that QEMU holds open, with what its command line says of
//! them.

use std::collections::BTreeMap;

use super::Tracker;
use crate::{
    inventory::{Disk, Observable, QemuProcess},
    metric::Scope,
    sample::{DiskDetail, Values},
    source::procfs::{
        Drive,
        images::{ImageId, OpenImage, open_images},
    },
    units::SourceKind,
};

impl Tracker {
    /// Makes the disks of a domain those whose images its process has open.
    pub(super) fn look_for_images(&mut self, i: usize, process: QemuProcess) {
        let images = match open_images(&self.root, process) {
            Ok(images) => images,
            Err(error) if error.is_gone() => return,
            Err(error) => return self.count(SourceKind::Procfs).failed(&error),
        };
        let tracked = &mut self.domains[i];
        let disks = disks_of(&images, &tracked.drives);
        if disks == tracked.domain.disks {
            return;
        }
        let (old, sample) = (&tracked.domain.disks, &mut tracked.sample);
        let values = disks.iter().map(|disk| {
            let at = old.iter().position(|known| known.target == disk.target);
            at.map_or_else(|| Values::new(Scope::Disk), |at| sample.disks[at].clone())
        });
        sample.disks = values.collect();
        sample.disk_details = vec![DiskDetail::default(); disks.len()];
        tracked.domain.disks = disks;
        tracked.disks.described();
        self.changed(i, "images of its QEMU process changed");
    }
}

/// One disk for each image that the command line names or that is open for writing. What else is open for reading are
/// images below them; whose, can be told only where there is one disk.
///
/// A snapshot lays another image over one that is named, which is then no longer written to: the disk keeps its name.
fn disks_of(images: &[OpenImage], drives: &[Drive]) -> Vec<Disk> {
    let named = |image: &OpenImage| drives.iter().find(|drive| image.path.as_os_str() == drive.file.as_str());
    // A log is not read, and what is executed is in no image format.
    let (top, below): (Vec<_>, Vec<_>) = images
        .iter()
        .filter(|image| image.readable && !is_shared_memory(image))
        .partition(|image| image.writable || named(image).is_some());
    let (covered, top): (Vec<_>, Vec<_>) =
        top.into_iter().partition(|image| named(image).is_some_and(|drive| is_covered(image, drive)));
    let (known, mut others): (Vec<_>, Vec<_>) = top.into_iter().partition(|image| named(image).is_some());
    let mut disks: Vec<Disk> = known.iter().map(|image| disk_of(image, named(image))).collect();
    for image in &covered {
        let cover = cover_of(image, &others, covered.len()).map(|at| others.remove(at));
        let mut disk = disk_of(cover.unwrap_or(image), named(image));
        if cover.is_some() {
            disk.format = None; // What the command line says is of the image below.
            disk.backing_chain.push(image.path.to_string_lossy().into_owned());
        }
        disks.push(disk);
    }
    disks.extend(others.iter().map(|image| disk_of(image, None)));
    disks.sort_by(|a, b| (&a.target, &a.source).cmp(&(&b.target, &b.source)));
    tell_apart(&mut disks);
    let below = below.iter().map(|image| image.path.to_string_lossy().into_owned());
    if let [disk] = disks.as_mut_slice() {
        disk.backing_chain.extend(below);
    }
    disks
}

/// The guest could write to it once, and QEMU does not any more.
fn is_covered(image: &OpenImage, drive: &Drive) -> bool {
    !image.writable && !drive.read_only && drive.device == "disk"
}

/// Which of several images nobody named lies over this one: the only one there is, if this is the only one covered; else
/// the one of the same name in the same directory, up to what follows the last dot.
fn cover_of(image: &OpenImage, others: &[&OpenImage], covered: usize) -> Option<usize> {
    if covered == 1 && others.len() == 1 {
        return Some(0);
    }
    let name = |image: &OpenImage| image.path.with_extension("");
    let mut alike = (0..others.len()).filter(|at| name(others[*at]) == name(image));
    alike.next().filter(|_| alike.next().is_none())
}

/// Guest memory that is a file: QEMU's `memory-backend-file` and `memfd`.
fn is_shared_memory(image: &OpenImage) -> bool {
    ["/dev/shm", "/dev/hugepages", "/run/hugepages", "/memfd:"]
        .iter()
        .any(|dir| image.path.to_string_lossy().starts_with(dir))
}

fn disk_of(image: &OpenImage, drive: Option<&Drive>) -> Disk {
    let file_name = image.path.file_name().unwrap_or(image.path.as_os_str()).to_string_lossy();
    let is_device = matches!(image.id, ImageId::Device(_));
    Disk {
        target: drive.and_then(|drive| drive.id.clone()).unwrap_or_else(|| file_name.into_owned()),
        source: Some(image.path.to_string_lossy().into_owned()),
        source_type: if is_device { "block" } else { "file" }.to_owned(),
        device: drive.map_or("disk", |drive| drive.device).to_owned(),
        bus: None,
        format: drive.and_then(|drive| drive.format.clone()),
        cache: drive.and_then(|drive| drive.cache.clone()),
        io: drive.and_then(|drive| drive.io.clone()),
        iothread: None,
        serial: None,
        backing_chain: Vec::new(),
        mirror: None,
        limits: Vec::new(),
        limits_group: None,
        observable: Observable::Yes,
    }
}

/// Files of the same name in different directories.
fn tell_apart(disks: &mut [Disk]) {
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for disk in disks {
        let count = seen.entry(disk.target.clone()).or_default();
        *count += 1;
        if *count > 1 {
            disk.target = format!("{} ({count})", disk.target);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(path: &str, writable: bool) -> OpenImage {
        let id = ImageId::File { device: 1, inode: path.len() as u64 };
        let path = path.into();
        OpenImage { id, path, deleted: false, direct: true, writable, readable: true, fds: vec![9] }
    }

    fn names(disks: &[Disk]) -> Vec<(&str, &str)> {
        disks.iter().map(|d| (d.target.as_str(), d.source.as_deref().unwrap())).collect()
    }

    #[test]
    fn disks_are_what_is_written_or_named() {
        let drive = Drive {
            id: Some("scsi0".into()),
            file: "/vm/a.qcow2".into(),
            device: "disk",
            ..Drive::default()
        };
        let cd =
            Drive { id: Some("ide2".into()), file: "/iso/x.iso".into(), device: "cdrom", ..Drive::default() };
        let log = OpenImage { readable: false, ..image("/var/log/a.log", true) };
        let images =
            [image("/vm/a.qcow2", true), image("/vm/base.qcow2", false), log, image("/dev/shm/ram", true)];
        let one = disks_of(&images, &[drive.clone(), cd.clone()]);
        assert_eq!(names(&one), [("scsi0", "/vm/a.qcow2")]);
        assert_eq!(one[0].backing_chain, ["/vm/base.qcow2"]);
        let two = disks_of(&[&images[..], &[image("/iso/x.iso", false)]].concat(), &[drive, cd]);
        assert_eq!(names(&two), [("ide2", "/iso/x.iso"), ("scsi0", "/vm/a.qcow2")]);
        assert_eq!((two[0].device.as_str(), two[1].backing_chain.len()), ("cdrom", 0));
    }

    #[test]
    fn a_disk_keeps_its_name_under_a_snapshot() {
        let drive = |id: &str, file: &str| Drive {
            id: Some(id.into()),
            file: file.into(),
            device: "disk",
            ..Drive::default()
        };
        let drives = [drive("vda", "/vm/a.qcow2"), drive("vdb", "/vm/b.qcow2")];
        let (a, b) = (image("/vm/a.qcow2", false), image("/vm/b.qcow2", true));
        let one = disks_of(&[a.clone(), b.clone(), image("/snap/x", true)], &drives);
        assert_eq!(names(&one), [("vda", "/snap/x"), ("vdb", "/vm/b.qcow2")]);
        assert_eq!(
            (one[0].backing_chain.as_slice(), one[1].backing_chain.len()),
            (&["/vm/a.qcow2".into()][..], 0)
        );
        let b = image("/vm/b.qcow2", false);
        let both = [a.clone(), b.clone(), image("/vm/b.snap", true), image("/vm/a.snap", true)];
        assert_eq!(names(&disks_of(&both, &drives)), [("vda", "/vm/a.snap"), ("vdb", "/vm/b.snap")]);
        let unlike = [a.clone(), b, image("/vm/x", true), image("/vm/y", true)];
        let unknown = [("vda", "/vm/a.qcow2"), ("vdb", "/vm/b.qcow2"), ("x", "/vm/x"), ("y", "/vm/y")];
        assert_eq!(names(&disks_of(&unlike, &drives)), unknown);
        let fixed = [Drive { read_only: true, ..drive("vda", "/vm/a.qcow2") }];
        assert_eq!(
            names(&disks_of(&[a, image("/vm/x", true)], &fixed)),
            [("vda", "/vm/a.qcow2"), ("x", "/vm/x")]
        );
    }

    #[test]
    fn unnamed_disks_are_called_by_their_file() {
        let disks = disks_of(&[image("/a/disk.raw", true), image("/bb/disk.raw", true)], &[]);
        assert_eq!(names(&disks), [("disk.raw", "/a/disk.raw"), ("disk.raw (2)", "/bb/disk.raw")]);
    }
}
