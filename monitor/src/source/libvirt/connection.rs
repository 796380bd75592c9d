//! The few libvirt calls used, each behind a small safe function. Every one of them may block for as long as the
//! daemon likes, so only the worker's thread comes here.
//!
//! The wrapper of the crate `virt` leaks the records of `virConnectGetAllDomainStats` and panics where a reference
//! cannot be dropped, so this module calls the C functions itself. The connection is read-only.

use std::{
    ffi::{CStr, CString, c_char},
    fmt, ptr, slice,
    sync::Once,
    time::Duration,
};

use virt::sys;

use super::{
    error::{CallError, LibvirtError},
    events::{self, EventSink},
    job::Job,
    stats::{Builder, DeviceMark, DomainStats, Value},
};
use crate::units::DomainUuid;

/// Which groups of values a collection reads (`virDomainStatsTypes`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups(u32);

impl Groups {
    /// State of the domain; does not involve QEMU.
    pub const STATE: Self = Self(sys::VIR_DOMAIN_STATS_STATE);
    /// CPU time of the process.
    pub const CPU_TOTAL: Self = Self(sys::VIR_DOMAIN_STATS_CPU_TOTAL);
    /// Memory; asks QEMU.
    pub const BALLOON: Self = Self(sys::VIR_DOMAIN_STATS_BALLOON);
    /// vCPUs; asks QEMU.
    pub const VCPU: Self = Self(sys::VIR_DOMAIN_STATS_VCPU);
    /// Network interfaces; does not involve QEMU.
    pub const INTERFACE: Self = Self(sys::VIR_DOMAIN_STATS_INTERFACE);
    /// Disks; asks QEMU.
    pub const BLOCK: Self = Self(sys::VIR_DOMAIN_STATS_BLOCK);

    /// Perf events that somebody enabled; read by libvirt from its own descriptors.
    pub const PERF: Self = Self(sys::VIR_DOMAIN_STATS_PERF);
    /// How fast guests write to their memory, where somebody had it measured; asks QEMU.
    pub const DIRTYRATE: Self = Self(sys::VIR_DOMAIN_STATS_DIRTYRATE);

    /// What libvirt tells without asking QEMU: guests do not pay for it, and no QEMU can hold up the answer.
    #[must_use]
    pub const fn fast() -> Self {
        Self::STATE.and(Self::INTERFACE)
    }

    /// What makes libvirt ask QEMU, or takes it long; iothreads are left out, they tell nothing but polling parameters.
    #[must_use]
    pub const fn slow() -> Self {
        Self::CPU_TOTAL.and(Self::VCPU).and(Self::BALLOON).and(Self::BLOCK).and(Self::PERF)
    }

    /// As [`Groups::slow`], with what costs QEMU a question more and mostly has no answer.
    #[must_use]
    pub const fn rare() -> Self {
        Self::slow().and(Self::DIRTYRATE)
    }

    /// These groups and those.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are among these.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A version of libvirt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First part.
    pub major: u64,
    /// Second part.
    pub minor: u64,
    /// Third part.
    pub release: u64,
}

impl Version {
    /// libvirt packs them as `1000000 × major + 1000 × minor + release`.
    const fn unpack(packed: u64) -> Self {
        Self { major: packed / 1_000_000, minor: packed / 1000 % 1000, release: packed % 1000 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.release)
    }
}

/// Whom the connection reached. The hypervisor's version is not asked for: `virConnectGetVersion` can make libvirtd probe
/// its QEMU binary, and took 4 s with libvirt 9.0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// URI as libvirt resolved it.
    pub uri: String,
    /// Version of the library in this process.
    pub client_version: Option<Version>,
    /// Version of the daemon's library.
    pub library_version: Option<Version>,
    /// Driver, for example `QEMU` or `TEST`.
    pub hypervisor: Option<String>,
}

/// An open read-only connection.
pub(super) struct Connection {
    raw: sys::virConnectPtr,
    /// Callbacks registered on it.
    callbacks: Vec<std::ffi::c_int>,
}

impl Connection {
    pub(super) fn open_read_only(uri: &str) -> Result<Self, LibvirtError> {
        silence_libvirt();
        let name = CString::new(uri).map_err(|_| LibvirtError::Uri { uri: uri.to_owned() })?;
        // SAFETY: `name` is a NUL-terminated string that lives over the call, which keeps no reference to it.
        let raw = unsafe { sys::virConnectOpenReadOnly(name.as_ptr()) };
        if raw.is_null() {
            return Err(LibvirtError::Open { uri: uri.to_owned(), error: CallError::last() });
        }
        Ok(Self { raw, callbacks: Vec::new() })
    }

    /// Ends the connection, and every call on it, when the other side has not shown life for 20 s. Drivers inside this
    /// process have no other side, and without an event loop there is none of it.
    pub(super) fn keep_alive(&self) {
        // SAFETY: `raw` is an open connection.
        unsafe { sys::virConnectSetKeepAlive(self.raw, 5, 3) };
    }

    /// Lets events come. A driver without them is looked at as often as any other.
    pub(super) fn register(&mut self, sink: &EventSink) {
        self.callbacks = events::register(self.raw, sink);
    }

    /// Whether the connection can carry a call. True only says that no failure was noticed yet.
    pub(super) fn is_alive(&self) -> bool {
        // SAFETY: `raw` is an open connection.
        unsafe { sys::virConnectIsAlive(self.raw) == 1 }
    }

    /// Whom it reached; what cannot be told is absent.
    pub(super) fn describe(&self, asked: &str) -> Connected {
        // SAFETY: `raw` is an open connection; the text is allocated for the caller, `take_text` frees it.
        let uri = take_text(unsafe { sys::virConnectGetURI(self.raw) });
        // SAFETY: `raw` is an open connection; the text is static in the driver.
        let hypervisor = copy_text(unsafe { sys::virConnectGetType(self.raw) });
        // SAFETY: the first argument is writable; null for the others is allowed ("the library's version only").
        let client = read_version(|v| unsafe { sys::virGetVersion(v, ptr::null(), ptr::null_mut()) });
        // SAFETY: `raw` is an open connection and the number is writable.
        let library = read_version(|v| unsafe { sys::virConnectGetLibVersion(self.raw, v) });
        Connected {
            uri: uri.unwrap_or_else(|| asked.to_owned()),
            client_version: client,
            library_version: library,
            hypervisor,
        }
    }

    /// A domain, if there is one.
    pub(super) fn domain(&self, uuid: DomainUuid) -> Result<Option<DomainRef<'_>>, LibvirtError> {
        // SAFETY: `raw` is an open connection; the UUID has VIR_UUID_BUFLEN bytes.
        let raw = unsafe { sys::virDomainLookupByUUID(self.raw, uuid.0.as_ptr()) };
        if !raw.is_null() {
            return Ok(Some(DomainRef { raw, _connection: self }));
        }
        match CallError::last() {
            gone if gone.code == sys::VIR_ERR_NO_DOMAIN => Ok(None),
            source => Err(LibvirtError::Call { call: "virDomainLookupByUUID", source }),
        }
    }

    /// All active domains, transient and persistent; a domain that is busy with a job is not waited for.
    pub(super) fn all_domain_stats(&self, groups: Groups) -> Result<Records<'_>, LibvirtError> {
        const FLAGS: u32 = sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
            | sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
            | sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_BACKING;
        let mut list = ptr::null_mut();
        // SAFETY: `raw` is an open connection; `list` receives an array that `Records` frees.
        let count = unsafe { sys::virConnectGetAllDomainStats(self.raw, groups.0, &raw mut list, FLAGS) };
        match usize::try_from(count) {
            Ok(count) => Ok(Records { list, count, _connection: self }),
            Err(_) => Err(call_error("virConnectGetAllDomainStats")),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        for id in &self.callbacks {
            // SAFETY: `raw` is still a connection, and the id one that it gave. Fails if the daemon is gone.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.raw, *id) };
        }
        // SAFETY: this is our only reference, and nothing borrowed from it is left. A failure leaves nothing to do.
        unsafe { sys::virConnectClose(self.raw) };
    }
}

/// The records of one bulk call.
pub(super) struct Records<'c> {
    list: *mut sys::virDomainStatsRecordPtr,
    count: usize,
    _connection: &'c Connection,
}

impl Records<'_> {
    pub(super) fn iter(&self) -> impl Iterator<Item = Record<'_>> {
        let records: &[sys::virDomainStatsRecordPtr] = if self.list.is_null() {
            &[]
        } else {
            // SAFETY: the call returned `count` records at `list`; they stay until `self` is dropped.
            unsafe { slice::from_raw_parts(self.list, self.count) }
        };
        // SAFETY: each entry points at a record that lives as long as the list.
        records.iter().map(|record| Record { raw: unsafe { &**record } })
    }
}

impl Drop for Records<'_> {
    fn drop(&mut self) {
        if !self.list.is_null() {
            // SAFETY: the list comes from `virConnectGetAllDomainStats` and is freed once; it ends with a null entry.
            unsafe { sys::virDomainStatsRecordListFree(self.list) };
        }
    }
}

/// The record of one domain.
pub(super) struct Record<'r> {
    raw: &'r sys::_virDomainStatsRecord,
}

impl Record<'_> {
    pub(super) fn uuid(&self) -> Result<DomainUuid, LibvirtError> {
        let mut bytes = [0_u8; 16];
        // SAFETY: the record holds a reference to its domain; the buffer has VIR_UUID_BUFLEN bytes.
        let result = unsafe { sys::virDomainGetUUID(self.raw.dom, bytes.as_mut_ptr()) };
        if result == 0 { Ok(DomainUuid(bytes)) } else { Err(call_error("virDomainGetUUID")) }
    }

    /// The id of this run, absent once the domain stopped.
    pub(super) fn id(&self) -> Option<u32> {
        id_of(self.raw.dom)
    }

    /// The live XML; `Ok(None)` if the domain vanished meanwhile.
    pub(super) fn xml(&self) -> Result<Option<String>, LibvirtError> {
        xml_of(self.raw.dom)
    }

    /// What libvirt does with its QEMU at this moment, without asking that.
    pub(super) fn control(&self) -> Result<Control, LibvirtError> {
        // SAFETY: an all-zero value is valid for this plain C struct.
        let mut info: sys::virDomainControlInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the record holds a reference to its domain; `info` is writable.
        if unsafe { sys::virDomainGetControlInfo(self.raw.dom, &raw mut info, 0) } != 0 {
            return Err(call_error("virDomainGetControlInfo"));
        }
        let since = Duration::from_millis(info.stateTime);
        Ok(match info.state {
            sys::VIR_DOMAIN_CONTROL_JOB => Control::Job(since),
            sys::VIR_DOMAIN_CONTROL_OCCUPIED => Control::Occupied(since),
            _ => Control::Free,
        })
    }

    /// Its values, and a mark of the devices they tell of.
    pub(super) fn stats(&self, uuid: DomainUuid) -> (DomainStats, DeviceMark) {
        let mut builder = Builder::new(uuid);
        for (name, value) in self.parameters().iter().filter_map(named_value) {
            builder.put(name, value);
        }
        let (mut stats, mark) = builder.finish();
        stats.id = self.id();
        (stats, mark)
    }

    fn parameters(&self) -> &[sys::virTypedParameter] {
        // SAFETY: libvirt says that `nparams` parameters are at `params`; they live as long as the record.
        unsafe { parameters_at(self.raw.params, self.raw.nparams) }
    }
}

/// # Safety
/// `count` parameters at `list` live for as long as the result is used; null is none.
pub(super) unsafe fn parameters_at<'a>(
    list: sys::virTypedParameterPtr,
    count: std::ffi::c_int,
) -> &'a [sys::virTypedParameter] {
    match usize::try_from(count) {
        // SAFETY: the caller's promise.
        Ok(count) if !list.is_null() => unsafe { slice::from_raw_parts(list, count) },
        _ => &[],
    }
}

/// Name and value; `None` if the name is no text.
pub(super) fn named_value(parameter: &sys::virTypedParameter) -> Option<(&str, Value<'_>)> {
    Some((text_in(&parameter.field)?, value_of(parameter)))
}

/// A domain that was looked up.
pub(super) struct DomainRef<'c> {
    raw: sys::virDomainPtr,
    _connection: &'c Connection,
}

impl DomainRef<'_> {
    pub(super) fn id(&self) -> Option<u32> {
        id_of(self.raw)
    }

    pub(super) fn xml(&self) -> Result<Option<String>, LibvirtError> {
        xml_of(self.raw)
    }

    /// The job that runs, if one does. Asks QEMU.
    pub(super) fn job(&self) -> Result<Option<Job>, LibvirtError> {
        let (mut kind, mut parameters, mut count) = (0, ptr::null_mut(), 0);
        // SAFETY: the domain is ours, and the three are writable; the parameters are allocated for us.
        let result = unsafe {
            sys::virDomainGetJobStats(self.raw, &raw mut kind, &raw mut parameters, &raw mut count, 0)
        };
        if result != 0 {
            return match CallError::last() {
                gone if gone.code == sys::VIR_ERR_NO_DOMAIN
                    || gone.code == sys::VIR_ERR_OPERATION_INVALID =>
                {
                    Ok(None)
                }
                source => Err(LibvirtError::Call { call: "virDomainGetJobStats", source }),
            };
        }
        // SAFETY: libvirt says so.
        let list = unsafe { parameters_at(parameters, count) };
        let job = Job::from_parameters(list.iter().filter_map(named_value));
        // SAFETY: they were allocated for us, and nothing of them is left in use.
        unsafe { sys::virTypedParamsFree(parameters, count) };
        let runs =
            matches!(u32::try_from(kind), Ok(sys::VIR_DOMAIN_JOB_BOUNDED | sys::VIR_DOMAIN_JOB_UNBOUNDED));
        Ok(runs.then_some(job))
    }
}

impl Drop for DomainRef<'_> {
    fn drop(&mut self) {
        // SAFETY: this is the only reference of ours. A failure leaves nothing to do.
        unsafe { sys::virDomainFree(self.raw) };
    }
}

/// What libvirt does with a QEMU (`virDomainControlState`), and for how long it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Nothing, or an error: the next call is answered, if only by that.
    Free,
    /// A job that takes its time: migration, save, a dump, a block job.
    Job(Duration),
    /// It waits for an answer of QEMU's monitor.
    Occupied(Duration),
}

impl Control {
    /// How long it has not answered; `None` if it does.
    #[must_use]
    pub const fn busy_for(self) -> Option<Duration> {
        match self {
            Self::Free => None,
            Self::Job(time) | Self::Occupied(time) => Some(time),
        }
    }
}

fn id_of(domain: sys::virDomainPtr) -> Option<u32> {
    // SAFETY: the caller holds a reference to the domain.
    let id = unsafe { sys::virDomainGetID(domain) };
    (id != u32::MAX).then_some(id)
}

fn xml_of(domain: sys::virDomainPtr) -> Result<Option<String>, LibvirtError> {
    // SAFETY: the caller holds a reference to the domain; the text is allocated for us.
    let text = take_text(unsafe { sys::virDomainGetXMLDesc(domain, 0) });
    match text {
        Some(text) => Ok(Some(text)),
        None => match CallError::last() {
            gone if gone.code == sys::VIR_ERR_NO_DOMAIN => Ok(None),
            source => Err(LibvirtError::Call { call: "virDomainGetXMLDesc", source }),
        },
    }
}

fn value_of(parameter: &sys::virTypedParameter) -> Value<'_> {
    let value = &parameter.value;
    match u32::try_from(parameter.type_) {
        // SAFETY: the type says which member of the union libvirt wrote.
        Ok(sys::VIR_TYPED_PARAM_INT) => Value::Signed(unsafe { value.i }.into()),
        // SAFETY: as above.
        Ok(sys::VIR_TYPED_PARAM_UINT) => Value::Unsigned(unsafe { value.ui }.into()),
        // SAFETY: as above.
        Ok(sys::VIR_TYPED_PARAM_LLONG) => Value::Signed(unsafe { value.l }),
        // SAFETY: as above.
        Ok(sys::VIR_TYPED_PARAM_ULLONG) => Value::Unsigned(unsafe { value.ul }),
        // SAFETY: as above.
        Ok(sys::VIR_TYPED_PARAM_STRING) => text_value(unsafe { value.s }),
        _ => Value::Other,
    }
}

fn text_value<'a>(text: *const c_char) -> Value<'a> {
    if text.is_null() {
        return Value::Other;
    }
    // SAFETY: libvirt hands out NUL-terminated text that lives as long as the parameter borrowed by the caller.
    unsafe { CStr::from_ptr(text) }.to_str().map_or(Value::Other, Value::Text)
}

/// The text in a fixed field, up to its NUL.
fn text_in(field: &[c_char]) -> Option<&str> {
    // SAFETY: `c_char` and `u8` have the same size and every bit pattern is valid for both.
    let bytes = unsafe { slice::from_raw_parts(field.as_ptr().cast::<u8>(), field.len()) };
    CStr::from_bytes_until_nul(bytes).ok()?.to_str().ok()
}

fn copy_text(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: libvirt hands out NUL-terminated text, and the caller's object keeps it alive.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// Copies and frees text that libvirt allocated for its caller.
fn take_text(text: *mut c_char) -> Option<String> {
    let copy = copy_text(text);
    // SAFETY: the text was allocated by malloc for us, or is null, which `free` ignores.
    unsafe { libc::free(text.cast()) };
    copy
}

fn read_version(read: impl FnOnce(*mut std::ffi::c_ulong) -> i32) -> Option<Version> {
    let mut packed = 0;
    (read(&raw mut packed) == 0).then(|| Version::unpack(packed))
}

fn call_error(call: &'static str) -> LibvirtError {
    LibvirtError::Call { call, source: CallError::last() }
}

/// libvirt prints every error to stderr unless told otherwise; ours are reported once, by the caller.
fn silence_libvirt() {
    static ONCE: Once = Once::new();
    ONCE.call_once(virt::error::clear_error_callback);
}
