//! Domain events: libvirt calls back on the thread of its event loop, which hands them on and never waits.
//!
//! The event loop is one of the process, started with the first connection that wants events. It also answers and
//! sends keepalive messages. Domains and details come as libvirt words them; knows no record and no metric.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::mpsc::{Sender, error::TrySendError};
use virt::sys;

use super::{
    connection::{named_value, parameters_at},
    job::Job,
};
use crate::{
    inventory::DomainState,
    units::{Bytes, DomainUuid, MonotonicNs},
};

/// Something happened to a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainEvent {
    /// Which domain.
    pub uuid: DomainUuid,
    /// Its name; text a tenant may have chosen.
    pub name: String,
    /// When libvirt called.
    pub at: MonotonicNs,
    /// What.
    pub what: What,
    /// In words.
    pub detail: String,
}

/// What happened to a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It started here.
    Started,
    /// It came from another host.
    MigratedIn,
    /// It stopped.
    Stopped,
    /// It went to another host.
    MigratedAway,
    /// Its state is another one, though it goes on.
    State(DomainState),
    /// The guest restarted inside the same QEMU.
    Rebooted,
    /// A device came or went.
    Hotplug,
    /// A device could not be taken out.
    HotplugFailed,
    /// The balloon has another size: what the guest has now, bytes.
    Balloon(u64),
    /// A job on a disk began, is ready or ended.
    BlockJob,
    /// Another pass over the guest's memory begins: a migration, a save or the like is under way.
    JobPass,
    /// A job on the domain (migration, save, backup, …) is over.
    JobEnded,
    /// I/O on a disk failed.
    IoError,
    /// Its description changed: metadata, title, limits, a medium.
    Changed,
}

/// Where callbacks put events.
#[derive(Clone)]
pub(super) struct EventSink {
    pub(super) events: Sender<DomainEvent>,
    /// An event found the queue full.
    pub(super) overflowed: std::sync::Arc<AtomicBool>,
}

impl EventSink {
    fn put(&self, domain: sys::virDomainPtr, what: What, detail: String) {
        let Some((uuid, name)) = identity(domain) else { return };
        let event = DomainEvent { uuid, name, at: MonotonicNs::now(), what, detail };
        if let Err(TrySendError::Full(_)) = self.events.try_send(event) {
            self.overflowed.store(true, Ordering::Relaxed);
        }
    }
}

/// Starts the event loop of libvirt's client library, once; false if it cannot run. It has to run before a connection
/// is opened that shall bring events.
pub(super) fn start_loop() -> bool {
    static RUNS: OnceLock<bool> = OnceLock::new();
    *RUNS.get_or_init(|| {
        // SAFETY: no requirement but to come before connections that use it, which `OnceLock` makes wait.
        if unsafe { sys::virEventRegisterDefaultImpl() } != 0 {
            return false;
        }
        std::thread::Builder::new().name("libvirt-events".into()).spawn(run_loop).is_ok()
    })
}

fn run_loop() {
    loop {
        // SAFETY: the default implementation is registered; only this thread runs it.
        if unsafe { sys::virEventRunDefaultImpl() } != 0 {
            // It says why to nobody; once more, but not in a tight loop.
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Registers every callback on a connection. Kinds that the driver does not know are left out; what they would tell is
/// found by looking again.
pub(super) fn register(connection: sys::virConnectPtr, sink: &EventSink) -> Vec<c_int> {
    macro_rules! generic {
        ($callback:ident, $kind:ty) => {
            // SAFETY: libvirt keeps all callbacks as one type and calls each with the arguments of its event, which is
            // how the function of that name was written (`VIR_DOMAIN_EVENT_CALLBACK` in libvirt-domain.h).
            unsafe { std::mem::transmute::<$kind, sys::virConnectDomainEventGenericCallback>(Some($callback)) }
        };
    }
    let callbacks = [
        (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, generic!(lifecycle, sys::virConnectDomainEventCallback)),
        (sys::VIR_DOMAIN_EVENT_ID_REBOOT, Some(reboot as Generic)),
        (
            sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
            generic!(added, sys::virConnectDomainEventDeviceAddedCallback),
        ),
        (
            sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
            generic!(removed, sys::virConnectDomainEventDeviceRemovedCallback),
        ),
        (
            sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED,
            generic!(removal_failed, sys::virConnectDomainEventDeviceRemovalFailedCallback),
        ),
        (
            sys::VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE,
            generic!(balloon, sys::virConnectDomainEventBalloonChangeCallback),
        ),
        (
            sys::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2,
            generic!(block_job, sys::virConnectDomainEventBlockJobCallback),
        ),
        (
            sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON,
            generic!(io_error, sys::virConnectDomainEventIOErrorReasonCallback),
        ),
        (
            sys::VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION,
            generic!(job_pass, sys::virConnectDomainEventMigrationIterationCallback),
        ),
        (
            sys::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED,
            generic!(job_ended, sys::virConnectDomainEventJobCompletedCallback),
        ),
        (
            sys::VIR_DOMAIN_EVENT_ID_METADATA_CHANGE,
            generic!(metadata, sys::virConnectDomainEventMetadataChangeCallback),
        ),
        (sys::VIR_DOMAIN_EVENT_ID_TUNABLE, generic!(tunable, sys::virConnectDomainEventTunableCallback)),
        (
            sys::VIR_DOMAIN_EVENT_ID_DISK_CHANGE,
            generic!(disk_change, sys::virConnectDomainEventDiskChangeCallback),
        ),
    ];
    let mut registered = Vec::new();
    for (event, callback) in callbacks {
        let opaque = Box::into_raw(Box::new(sink.clone())).cast::<c_void>();
        // The event ids are below 100.
        let event = c_int::try_from(event).unwrap_or_default();
        // SAFETY: `connection` is open; a null domain means all; the callback takes what its event brings; `opaque`
        // stays valid until libvirt calls `release` on it, once.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connection,
                std::ptr::null_mut(),
                event,
                callback,
                opaque,
                Some(release),
            )
        };
        if id >= 0 {
            registered.push(id);
        } else {
            // SAFETY: libvirt did not take it; it comes from `Box::into_raw` above.
            drop(unsafe { Box::from_raw(opaque.cast::<EventSink>()) });
        }
    }
    registered
}

type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);

unsafe extern "C" fn release(opaque: *mut c_void) {
    // SAFETY: libvirt hands back what `register` gave it, once, after the last call of the callback.
    drop(unsafe { Box::from_raw(opaque.cast::<EventSink>()) });
}

/// What `register` handed over.
///
/// # Safety
/// `opaque` must be the pointer of a callback that is being called.
unsafe fn sink<'a>(opaque: *mut c_void) -> &'a EventSink {
    // SAFETY: the caller's promise; libvirt releases it after the last call only.
    unsafe { &*opaque.cast::<EventSink>() }
}

unsafe extern "C" fn lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    if let Some((what, detail)) = lifecycle_of(event, detail) {
        // SAFETY: a callback being called.
        unsafe { sink(opaque) }.put(domain, what, detail.to_owned());
    }
    0
}

/// `virDomainEventType` and its details; `None` for what changes nothing that runs.
fn lifecycle_of(event: c_int, detail: c_int) -> Option<(What, &'static str)> {
    let pick = |words: &[&'static str]| {
        usize::try_from(detail)
            .ok()
            .and_then(|at| words.get(at).copied())
            .unwrap_or("for a reason unknown to us")
    };
    let event = c_uint::try_from(event).ok()?;
    Some(match event {
        sys::VIR_DOMAIN_EVENT_STARTED => {
            let words =
                ["booted", "migrated in", "restored from a saved state", "from a snapshot", "woken up"];
            (if detail == 1 { What::MigratedIn } else { What::Started }, pick(&words))
        }
        sys::VIR_DOMAIN_EVENT_SUSPENDED => {
            let words = [
                "paused on request",
                "paused for migration",
                "paused after an I/O error",
                "paused by the watchdog",
                "restored as paused",
                "paused by a snapshot",
                "paused after a failed call",
                "paused for post-copy migration",
                "paused after a failed post-copy migration",
            ];
            (What::State(DomainState::Paused), pick(&words))
        }
        sys::VIR_DOMAIN_EVENT_RESUMED => {
            let words =
                ["resumed on request", "resumed after migration", "resumed from a snapshot", "in post-copy"];
            (What::State(DomainState::Running), pick(&words))
        }
        sys::VIR_DOMAIN_EVENT_STOPPED => {
            let words = ["shut down", "destroyed", "crashed", "migrated away", "saved", "failed", "snapshot"];
            (if detail == 3 { What::MigratedAway } else { What::Stopped }, pick(&words))
        }
        sys::VIR_DOMAIN_EVENT_SHUTDOWN => {
            let words = ["shutting down", "shut down by the guest", "shut down by the host"];
            (What::State(DomainState::ShuttingDown), pick(&words))
        }
        sys::VIR_DOMAIN_EVENT_PMSUSPENDED => {
            (What::State(DomainState::Suspended), pick(&["suspended to memory", "suspended to disk"]))
        }
        sys::VIR_DOMAIN_EVENT_CRASHED => (
            What::State(DomainState::Crashed),
            pick(&["the guest panicked", "the guest loaded a crash kernel"]),
        ),
        // Defined and undefined: a new configuration for the next start.
        _ => return None,
    })
}

unsafe extern "C" fn reboot(_: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: a callback being called.
    unsafe { sink(opaque) }.put(domain, What::Rebooted, "the guest rebooted".to_owned());
}

unsafe extern "C" fn added(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: a callback being called, with text that lives as long.
    unsafe { sink(opaque).put(domain, What::Hotplug, format!("device {} was added", text(alias))) };
}

unsafe extern "C" fn removed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `added`.
    unsafe { sink(opaque).put(domain, What::Hotplug, format!("device {} was removed", text(alias))) };
}

unsafe extern "C" fn removal_failed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `added`.
    unsafe {
        sink(opaque).put(domain, What::HotplugFailed, format!("device {} could not be removed", text(alias)));
    };
}

unsafe extern "C" fn balloon(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    actual_kib: c_ulonglong,
    opaque: *mut c_void,
) {
    let Some(Bytes(actual)) = Bytes::from_kib(actual_kib) else { return };
    let detail = format!("the balloon leaves {actual} bytes to the guest");
    // SAFETY: a callback being called.
    unsafe { sink(opaque) }.put(domain, What::Balloon(actual), detail);
}

unsafe extern "C" fn block_job(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    disk: *const c_char,
    kind: c_int,
    status: c_int,
    opaque: *mut c_void,
) {
    let pick = |words: &[&'static str], at: c_int| {
        usize::try_from(at).ok().and_then(|at| words.get(at).copied()).unwrap_or("unknown")
    };
    let kind = pick(&["job", "pull", "copy", "commit", "active commit", "backup"], kind);
    let status = pick(&["completed", "failed", "canceled", "is ready"], status);
    // SAFETY: as in `added`.
    unsafe { sink(opaque).put(domain, What::BlockJob, format!("{kind} of {} {status}", text(disk))) };
}

unsafe extern "C" fn io_error(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    path: *const c_char,
    alias: *const c_char,
    action: c_int,
    reason: *const c_char,
    opaque: *mut c_void,
) {
    let action = match action {
        1 => "the guest is paused",
        2 => "the guest is told",
        _ => "ignored",
    };
    // SAFETY: as in `added`.
    unsafe {
        let (alias, path, reason) = (text(alias), text(path), text(reason));
        let reason = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
        sink(opaque).put(domain, What::IoError, format!("I/O error on {alias}, {path}{reason}: {action}"));
    }
}

unsafe extern "C" fn job_pass(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    pass: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: a callback being called.
    unsafe { sink(opaque) }.put(domain, What::JobPass, format!("memory is transferred, pass {pass}"));
}

unsafe extern "C" fn job_ended(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    parameters: sys::virTypedParameterPtr,
    count: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: a callback being called, with so many parameters that live as long.
    let list = unsafe { parameters_at(parameters, count) };
    let detail = end_of(&Job::from_parameters(list.iter().filter_map(named_value)));
    // SAFETY: a callback being called.
    unsafe { sink(opaque) }.put(domain, What::JobEnded, detail);
}

/// The end of a job in words.
fn end_of(job: &Job) -> String {
    use std::fmt::Write as _;
    let mut text = format!("job {} is over", job.operation);
    for (what, amount, unit) in [
        ("after", job.elapsed_ns.map(|ns| ns / 1_000_000), "ms"),
        ("memory transferred", job.memory_processed_bytes, "bytes"),
        ("passes", job.memory_iteration, ""),
        ("the guest stood for", job.downtime_ns.map(|ns| ns / 1_000_000), "ms"),
    ] {
        if let Some(amount) = amount {
            let _ = write!(text, ", {what} {amount}{}{unit}", if unit.is_empty() { "" } else { " " });
        }
    }
    text
}

unsafe extern "C" fn metadata(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _kind: c_int,
    _namespace: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: a callback being called.
    unsafe { sink(opaque) }.put(domain, What::Changed, "metadata changed".to_owned());
}

unsafe extern "C" fn tunable(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _parameters: sys::virTypedParameterPtr,
    _count: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: a callback being called.
    unsafe { sink(opaque) }.put(domain, What::Changed, "limits or pinning changed".to_owned());
}

unsafe extern "C" fn disk_change(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _old: *const c_char,
    _new: *const c_char,
    alias: *const c_char,
    _reason: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: as in `added`.
    unsafe { sink(opaque).put(domain, What::Changed, format!("medium of {} changed", text(alias))) };
}

/// # Safety
/// Null, or NUL-terminated text that lives as long as this call.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn identity(domain: sys::virDomainPtr) -> Option<(DomainUuid, String)> {
    let mut uuid = [0_u8; 16];
    // SAFETY: the caller's callback holds the domain; the buffer has VIR_UUID_BUFLEN bytes. Answered without the daemon.
    if unsafe { sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: as above; the text lives as long as the domain.
    Some((DomainUuid(uuid), unsafe { text(sys::virDomainGetName(domain)) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_job_says_what_is_known() {
        let job = Job { operation: "save", elapsed_ns: Some(20_000_000), ..Job::default() };
        assert_eq!(end_of(&job), "job save is over, after 20 ms");
        assert_eq!(
            end_of(&Job { memory_iteration: Some(3), ..job }),
            "job save is over, after 20 ms, passes 3"
        );
    }

    #[test]
    fn lifecycle_events_have_their_words() {
        let check =
            |event, detail, expected| assert_eq!(lifecycle_of(event, detail), expected, "{event} {detail}");
        check(2, 0, Some((What::Started, "booted")));
        check(2, 1, Some((What::MigratedIn, "migrated in")));
        check(3, 2, Some((What::State(DomainState::Paused), "paused after an I/O error")));
        check(4, 0, Some((What::State(DomainState::Running), "resumed on request")));
        check(5, 4, Some((What::Stopped, "saved")));
        check(5, 3, Some((What::MigratedAway, "migrated away")));
        check(5, 99, Some((What::Stopped, "for a reason unknown to us")));
        check(0, 0, None);
        check(99, 0, None);
        check(-1, -1, None);
    }
}
