//! Newtypes for ids, times and amounts, so that a thread id never travels as a bare number.
//!
//! Knows nothing of sources or output beyond how an id is spelled.

use std::{fmt, str::FromStr, time::Duration};

/// Process id (thread group id) of a QEMU process, in this program's pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tgid(pub u32);

/// Thread id, in this program's pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tid(pub u32);

/// A network device: inode number of its network namespace (`/proc/PID/ns/net`), and its index there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NicKey {
    /// Inode number of the namespace.
    pub netns: u32,
    /// Index of the device in that namespace.
    pub ifindex: u32,
}

/// Number of a vCPU as QEMU and libvirt count it, from 0; numbering may have holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VcpuIndex(pub u32);

impl fmt::Display for Tgid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Tid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for VcpuIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// UUID of a domain, the identity that survives restarts and renames.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainUuid(pub [u8; 16]);

/// Text that is not a UUID.
#[derive(Debug, thiserror::Error)]
#[error("not a UUID: {0:?}")]
pub struct NotAUuid(pub String);

impl FromStr for DomainUuid {
    type Err = NotAUuid;

    /// Reads 32 hexadecimal digits, hyphens ignored, as libvirt does (`virUUIDParse`).
    fn from_str(text: &str) -> Result<Self, NotAUuid> {
        let bad = || NotAUuid(text.chars().take(64).collect());
        let mut bytes = [0; 16];
        let mut digits = text.trim().chars().filter(|c| *c != '-');
        for byte in &mut bytes {
            for _ in 0..2 {
                let digit = digits.next().and_then(|c| c.to_digit(16)).ok_or_else(bad)?;
                *byte = *byte << 4 | u8::try_from(digit).map_err(|_| bad())?;
            }
        }
        if digits.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

impl fmt::Display for DomainUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: [u8; 16] = *b"0123456789abcdef";
        let mut text = [b'-'; 36];
        let places = text.iter_mut().enumerate().filter(|(at, _)| ![8, 13, 18, 23].contains(at));
        let digits = self.0.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        for ((_, place), digit) in places.zip(digits) {
            *place = DIGITS[usize::from(digit)];
        }
        f.write_str(std::str::from_utf8(&text).unwrap_or_default())
    }
}

impl fmt::Debug for DomainUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A moment on `CLOCK_MONOTONIC`, nanoseconds: the clock of all arithmetic, and of the kernel side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MonotonicNs(pub u64);

impl MonotonicNs {
    /// The moment now.
    #[must_use]
    pub fn now() -> Self {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Self(nanoseconds(t.tv_sec, t.tv_nsec))
    }

    /// Nanoseconds since `earlier`, 0 if that lies in the future.
    #[must_use]
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Nanoseconds of a `timespec`; negative parts count as 0.
#[must_use]
pub fn nanoseconds(seconds: i64, nanoseconds: i64) -> u64 {
    let seconds = u64::try_from(seconds).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(nanoseconds).unwrap_or(0))
}

/// A duration as nanoseconds, saturating after 584 years.
#[must_use]
pub fn duration_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// When a source was read: begin before the first value, end after the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Before the first value was read.
    pub begin: MonotonicNs,
    /// After the last value was read.
    pub end: MonotonicNs,
}

/// Who says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceKind {
    /// Kernel probes of this program.
    Ebpf,
    /// Files under `/proc` and `/sys`.
    Procfs,
    /// libvirt's API.
    Libvirt,
}

impl SourceKind {
    /// How many sources there are.
    pub const COUNT: usize = 3;
    /// Every source.
    pub const ALL: [Self; Self::COUNT] = [Self::Ebpf, Self::Procfs, Self::Libvirt];

    /// The name in records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Procfs => "procfs",
            Self::Libvirt => "libvirt",
        }
    }
}

/// A length of time, nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nanos(pub u64);

/// An amount of data, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// A number of things.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Count(pub u64);

impl Bytes {
    /// From KiB, the unit of libvirt's memory figures; `None` on overflow.
    #[must_use]
    pub fn from_kib(kib: u64) -> Option<Self> {
        kib.checked_mul(1024).map(Self)
    }
}

/// What a number is a number of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nanoseconds.
    Nanoseconds,
    /// Bytes.
    Bytes,
    /// A plain count.
    Count,
}

/// An amount that knows its unit.
pub trait Quantity: Copy {
    /// The unit of [`Quantity::raw`].
    const UNIT: Unit;
    /// The bare number.
    fn raw(self) -> u64;
}

impl Quantity for Nanos {
    const UNIT: Unit = Unit::Nanoseconds;
    fn raw(self) -> u64 {
        self.0
    }
}

impl Quantity for Bytes {
    const UNIT: Unit = Unit::Bytes;
    fn raw(self) -> u64 {
        self.0
    }
}

impl Quantity for Count {
    const UNIT: Unit = Unit::Count;
    fn raw(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuid_text_and_back() {
        let text = "4d5e0e2b-3c1f-4a7b-9d8e-0123456789ab";
        let uuid: DomainUuid = text.parse().unwrap();
        assert_eq!(uuid.to_string(), text);
        assert_eq!(text.replace('-', "").parse::<DomainUuid>().unwrap(), uuid);
    }

    #[test]
    fn what_is_not_a_uuid_is_refused() {
        for bad in
            ["", "4d5e0e2b", "4d5e0e2b-3c1f-4a7b-9d8e-0123456789abc", "zz5e0e2b-3c1f-4a7b-9d8e-0123456789ab"]
        {
            assert!(bad.parse::<DomainUuid>().is_err(), "{bad}");
        }
    }
}
