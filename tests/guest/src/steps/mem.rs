//! `mem`: anonymous memory that is touched and kept.

use crate::json::Object;

/// Takes that many MiB and writes every byte, so that every page is backed.
pub(crate) fn touch(mib: usize, kept: &mut Vec<Vec<u8>>) -> Object {
    let bytes = mib << 20;
    kept.push(vec![0x5a; bytes]);
    Object::new().raw("bytes", bytes)
}
