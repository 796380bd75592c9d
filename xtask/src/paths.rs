//! Where things are: the checkout, its target directory, the cache that outlives it.

use std::env;
use std::path::{Path, PathBuf};

/// The root of the checkout this xtask was compiled from.
pub(crate) fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_path_buf()
}

/// Where builds go; `CARGO_TARGET_DIR` is respected.
pub(crate) fn target() -> PathBuf {
    // A relative one is relative to where cargo was called, not to the checkout.
    let set = env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty());
    match set.map(std::path::absolute) {
        Some(Ok(dir)) => dir,
        _ => root().join("target"),
    }
}

/// What is dear to make and independent of the checkout: linkers, unpacked kernels.
pub(crate) fn cache() -> PathBuf {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map_or_else(|| target().join("cache"), |dir| dir.join("kvm-monitor"))
}
