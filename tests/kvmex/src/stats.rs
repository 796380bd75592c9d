//! KVM's own statistics of a vCPU, in the binary format of `Documentation/virt/kvm/api.rst`, section `KVM_GET_STATS_FD`.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt as _},
};

/// Bytes of `struct kvm_stats_header`.
const HEADER: usize = 24;
/// Bytes of `struct kvm_stats_desc` before the name.
const DESCRIPTOR: usize = 16;

/// Names and first values.
pub(crate) fn read(fd: &OwnedFd) -> io::Result<Vec<(String, u64)>> {
    let file = File::from(fd.try_clone()?);
    let header = bytes(&file, 0, HEADER)?;
    let [_, name_bytes, count, _, descriptors, data] =
        [0, 1, 2, 3, 4, 5].map(|field| word(&header, field * 4));
    let size = DESCRIPTOR + name_bytes;
    let descriptors = bytes(&file, descriptors, size * count)?;
    let offsets = || descriptors.chunks_exact(size).map(|descriptor| word(descriptor, 8));
    let values = bytes(&file, data, offsets().max().map_or(0, |last| last + 8))?;
    let value = |offset: usize| {
        let mut value = [0; 8];
        value.copy_from_slice(&values[offset..offset + 8]);
        u64::from_le_bytes(value)
    };
    let name = |descriptor: &[u8]| {
        let name = descriptor[DESCRIPTOR..].split(|b| *b == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    };
    Ok(descriptors.chunks_exact(size).map(name).zip(offsets().map(value)).collect())
}

fn bytes(file: &File, at: usize, count: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    file.read_exact_at(&mut bytes, at as u64)?;
    Ok(bytes)
}

fn word(bytes: &[u8], at: usize) -> usize {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    usize::try_from(u32::from_le_bytes(word)).unwrap_or(usize::MAX)
}
