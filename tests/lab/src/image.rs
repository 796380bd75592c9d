//! Disk images, written without qemu-img.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// qcow2's usual cluster size, bytes, as a power of two and as a number.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: usize = 1 << CLUSTER_BITS;
/// What one L1 entry covers, bytes: one cluster of 8-byte L2 entries, a cluster each.
const L1_ENTRY_COVERS: u64 = 1 << (CLUSTER_BITS + CLUSTER_BITS - 3);

/// A raw image in which every block is written: a read of a hole would never reach the device.
pub(crate) fn write_raw(path: &Path, size_bytes: u64) -> io::Result<()> {
    static CHUNK: [u8; CLUSTER] = [0xa5; CLUSTER];
    let mut file = File::create(path)?;
    let mut left = size_bytes;
    while left > 0 {
        let part = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK.len());
        file.write_all(&CHUNK[..part])?;
        left -= u64::try_from(part).unwrap_or(left);
    }
    file.sync_all()
}

/// A qcow2 image with nothing allocated, on top of a raw image or of nothing.
pub(crate) fn write_qcow2(path: &Path, size_bytes: u64, below: Option<&Path>) -> io::Result<()> {
    let below = below.map(|below| below.as_os_str().as_encoded_bytes()).unwrap_or_default();
    fs::write(path, empty_qcow2(size_bytes, below))
}

/// Four clusters: header, refcount table, refcount block, L1 table (QEMU's docs/interop/qcow2.txt, version 3).
/// The name of the backing file, in the first cluster, follows the header extension that says it is raw.
fn empty_qcow2(size_bytes: u64, backing_file: &[u8]) -> Vec<u8> {
    const HEADER: u32 = 104;
    const EXTENSIONS: u32 = 24;
    let cluster = |number: u64| number << CLUSTER_BITS;
    let l1_entries = u32::try_from(size_bytes.div_ceil(L1_ENTRY_COVERS)).expect("far below 2 EiB");
    let mut image = Vec::with_capacity(4 * CLUSTER);
    image.extend(b"QFI\xfb");
    image.extend(3u32.to_be_bytes());
    let name_bytes = u32::try_from(backing_file.len()).expect("a path");
    image.extend(u64::from(if name_bytes > 0 { HEADER + EXTENSIONS } else { 0 }).to_be_bytes());
    image.extend(name_bytes.to_be_bytes());
    image.extend(CLUSTER_BITS.to_be_bytes());
    image.extend(size_bytes.to_be_bytes());
    image.extend(0u32.to_be_bytes()); // No encryption.
    image.extend(l1_entries.to_be_bytes());
    image.extend(cluster(3).to_be_bytes()); // L1 table.
    image.extend(cluster(1).to_be_bytes()); // Refcount table,
    image.extend(1u32.to_be_bytes()); // of one cluster.
    image.extend([0; 12]); // No snapshots.
    image.extend([0; 24]); // No feature bits.
    image.extend(4u32.to_be_bytes()); // Refcounts have 2^4 bits.
    image.extend(HEADER.to_be_bytes());
    if name_bytes > 0 {
        image.extend(0xe279_2acau32.to_be_bytes()); // Format of the backing file,
        image.extend(3u32.to_be_bytes());
        image.extend(b"raw\0\0\0\0\0"); // padded to 8.
        image.extend([0; 8]); // No further extension.
        image.extend(backing_file);
    }
    image.resize(CLUSTER, 0);
    image.extend(cluster(2).to_be_bytes()); // The only refcount block.
    image.resize(2 * CLUSTER, 0);
    image.extend([0, 1, 0, 1, 0, 1, 0, 1]); // The four clusters are in use.
    image.resize(4 * CLUSTER, 0);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_qcow2_has_its_tables_where_the_header_says() {
        let image = empty_qcow2(1 << 30, b"");
        let number = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
        assert_eq!((image.len(), number(24)), (4 * CLUSTER, 1 << 30));
        assert_eq!(image[36..40], 2u32.to_be_bytes()); // Entries of the L1 table.
        assert_eq!((number(40), number(48)), (3 << 16, 1 << 16));
        assert_eq!((number(1 << 16), number(2 << 16)), (2 << 16, 0x0001_0001_0001_0001));
        assert_eq!(image[100..104], 104u32.to_be_bytes());
        assert_eq!(number(8), 0);
    }

    #[test]
    fn a_qcow2_on_another_image_names_it_where_the_header_says() {
        let image = empty_qcow2(1 << 20, b"/s/below.raw");
        let start = u64::from_be_bytes(image[8..16].try_into().unwrap());
        let start = usize::try_from(start).unwrap();
        assert_eq!(image[16..20], 12u32.to_be_bytes());
        assert_eq!(&image[start..start + 12], b"/s/below.raw");
        assert_eq!((image.len(), &image[112..115]), (4 * CLUSTER, &b"raw"[..]));
    }
}
