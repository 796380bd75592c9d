//! Our own memory: gives back what only the start needed.
//!
//! Loading kernel programs, connecting to libvirt and linking some forty libraries touch pages of code and constants that
//! are never looked at again, and glibc keeps the memory in which BTF was parsed. Linux takes neither back before it is
//! short of memory; a program that watches has no reason to hold them until then.

use std::ffi::c_void;

/// Drops what can be read again at any time: pages of mapped files that nobody wrote to. What is in use comes back by
/// itself, from the page cache. Also returns free heap.
pub fn release() {
    give_heap_back();
    let Ok(text) = std::fs::read_to_string("/proc/self/smaps") else { return };
    for (begin, length) in unwritten_files(&text) {
        // SAFETY: the range is a private mapping of a file without a page of its own (`Anonymous: 0 kB`) that cannot be
        // written to, so that what is dropped reads the same when it is mapped again. A range that has been unmapped
        // since is refused. No Rust object lives in memory that is mapped from a file.
        unsafe { libc::madvise(begin as *mut c_void, length, libc::MADV_DONTNEED) };
    }
}

/// Free memory of the allocator goes back to the kernel.
fn give_heap_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Begin and length of the private mappings of files that cannot be written to, and none of whose pages was: libraries'
/// relocated tables are protected after they were written, and must stay.
fn unwritten_files(smaps: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut current = None;
    for line in smaps.lines() {
        if let Some(range) = file_mapping(line) {
            current = range;
        } else if line.strip_prefix("Anonymous:").is_some_and(|amount| amount.trim() == "0 kB") {
            found.extend(current.take());
        }
    }
    found
}

/// `None` if the line heads no mapping; `Some(None)` if it heads one that is not to be touched.
fn file_mapping(line: &str) -> Option<Option<(usize, usize)>> {
    let mut words = line.split_ascii_whitespace();
    let (begin, end) = words.next()?.split_once('-')?;
    let (begin, end) = (usize::from_str_radix(begin, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let (access, path) = (words.next()?, words.nth(3));
    let wanted = matches!(access, "r--p" | "r-xp") && path.is_some_and(|path| path.starts_with('/'));
    Some(wanted.then_some((begin, end.checked_sub(begin)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_wrote_is_dropped() {
        let smaps = "\
1000-3000 r-xp 00000000 fe:00 17 /usr/lib/a b.so
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me sd
3000-4000 r--p 00002000 fe:00 17 /usr/lib/a.so
Anonymous:             4 kB
4000-5000 rw-p 00003000 fe:00 17 /usr/lib/a.so
Anonymous:             0 kB
5000-6000 r--p 00000000 00:00 0
Anonymous:             0 kB
6000-7000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
7000-9000 r--s 00000000 00:0d 8 /proc/x
Anonymous:             0 kB
";
        assert_eq!(unwritten_files(smaps), [(0x1000, 0x2000)]);
    }

    #[test]
    fn we_go_on_after_it() {
        let before = crate::metric::METRICS.len();
        release();
        assert_eq!(crate::metric::markdown().lines().count(), before + 2);
    }
}
