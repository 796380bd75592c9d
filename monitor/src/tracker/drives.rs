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
fn disks_of(images: &[OpenImage], drives: &[Drive]) -> Vec<Disk> {
    let named = |image: &OpenImage| drives.iter().find(|drive| image.path.as_os_str() == drive.file.as_str());
    // A log is not read, and what is executed is in no image format.
    let (top, below): (Vec<_>, Vec<_>) = images
        .iter()
        .filter(|image| image.readable && !is_shared_memory(image))
        .partition(|image| image.writable || named(image).is_some());
    let mut disks: Vec<Disk> = top.iter().map(|image| disk_of(image, named(image))).collect();
    disks.sort_by(|a, b| (&a.target, &a.source).cmp(&(&b.target, &b.source)));
    tell_apart(&mut disks);
    let below = below.iter().map(|image| image.path.to_string_lossy().into_owned());
    if let [disk] = disks.as_mut_slice() {
        disk.backing_chain = below.collect();
    }
    disks
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
    fn unnamed_disks_are_called_by_their_file() {
        let disks = disks_of(&[image("/a/disk.raw", true), image("/bb/disk.raw", true)], &[]);
        assert_eq!(names(&disks), [("disk.raw", "/a/disk.raw"), ("disk.raw (2)", "/bb/disk.raw")]);
    }
}
