//! The eBPF source: loads the kernel programs, says which threads to follow, and reads what they counted.
//!
//! Data comes from the maps of `monitor-ebpf`, mapped into this process; one `BPF_PROG_TEST_RUN` per
//! [`monitor_ebpf::READ_BATCH`] threads brings the intervals in progress up to date. Knows neither domains nor
//! output.

pub mod layout;
mod mapped;
pub mod probes;
mod times;

use std::{collections::VecDeque, fs::File, io, io::Read as _, path::Path, sync::atomic::Ordering};

pub use self::times::{Doing, ThreadTimes};
use aya::{
    Btf, Ebpf as Object, EbpfLoader, Pod,
    maps::{Map, MapData},
    programs::{BtfTracePoint, Iter, ProgramError, RawTracePoint, RawTracePointRunOptions, TestRun as _},
};
use monitor_ebpf::{
    Armed, CLOCK_THREAD, COMPARISONS, CPUS, ChargeTables, Clock, FILTER_BITS, Filter, HISTOGRAMS, Layout,
    NOW_RUNNING, NOW_WAITING, READ_BATCH, READ_LAST, READ_LIVE, Reading, TABLE_ENTRIES, TABLE_PROBES,
    THREADS, Table, Thread, table_entry, table_slot, table_start,
};
pub use monitor_ebpf::{
    BUCKETS, Charges, Culprit, Histogram, Histograms, KIND_IDLE, KIND_KERNEL, KIND_PROCESS, bucket_range,
};

use self::{
    mapped::{Mapped, change_bit},
    probes::{Attach, Need, PROBES, Probe, ProbeGroup, ProbeState},
};
use crate::one_line;
use crate::units::{MonotonicNs, Tid, Window, duration_ns};

/// The programs, as `cargo xtask build-ebpf` made them.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("KVM_MONITOR_BPF_OBJECT"));

/// Kernel type information of the running kernel.
pub const BTF_FILE: &str = "/sys/kernel/btf/vmlinux";

/// Time after which a CPU stops writing its history, until a followed thread waits there again.
const DISARM_INTERVAL_NS: u64 = 10_000_000_000;

/// Why the kernel programs cannot run.
#[derive(Debug, thiserror::Error)]
pub enum EbpfError {
    /// A structure field the programs need was not found.
    #[error("the kernel's structures cannot be read")]
    Layout(#[from] layout::LayoutError),
    /// BTF could not be read by the loader.
    #[error("cannot read kernel type information (BTF)")]
    Btf(#[source] aya::BtfError),
    /// The object was refused as a whole.
    #[error("the kernel refused the BPF maps: {0}")]
    Load(String),
    /// One required program was refused.
    #[error("the kernel refused the program {program}: {reason}")]
    Program {
        /// Its name.
        program: &'static str,
        /// What the kernel said, one line.
        reason: String,
    },
    /// A map is not there or cannot be mapped.
    #[error("cannot use the BPF map {map}")]
    Map {
        /// Its name.
        map: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Reading the threads failed.
    #[error("cannot run the program read_threads: {0}")]
    Read(String),
}

/// Runs of a program while the kernel counted them (`kernel.bpf_stats_enabled`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramRuns {
    /// How often.
    pub count: u64,
    /// How long altogether, nanoseconds; contains the clock reads of the counting itself.
    pub ns: u64,
}

/// A thread that is followed.
#[derive(Debug, PartialEq, Eq)]
pub struct Slot {
    thread: u32,
    histograms: Option<u32>,
}

/// What is kept of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Times and counts.
    Times,
    /// Also the distributions of its runs and waits.
    TimesAndHistograms,
}

/// Places of an array map that are handed out; the one given back longest ago is used again first.
#[derive(Debug, Default)]
struct Places {
    free: VecDeque<u32>,
    used: u32,
}

impl Places {
    fn take(&mut self, limit: u32) -> Option<u32> {
        if self.used < limit {
            self.used += 1;
            return Some(self.used - 1);
        }
        self.free.pop_front()
    }

    fn give_back(&mut self, place: u32) {
        self.free.push_back(place);
    }
}

/// No more threads can be followed.
#[derive(Debug, thiserror::Error)]
#[error("no room in the kernel tables to follow another thread ({0} are followed)")]
pub struct Full(pub usize);

/// The loaded programs. Everything is detached when this is dropped, or the process ends in any way.
pub struct Ebpf {
    object: Object,
    states: Vec<(Probe, ProbeState)>,
    filter: Mapped<Filter>,
    table: Mapped<Table>,
    threads: Mapped<Thread>,
    readings: Mapped<Reading>,
    clock: Mapped<Clock>,
    histograms: Mapped<Histograms>,
    charges: Mapped<ChargeTables>,
    armed: Mapped<Armed>,
    disarmed: MonotonicNs,
    places: Places,
    histogram_places: Places,
    followed: usize,
    unseeded: bool,
}

#[repr(transparent)]
#[derive(Clone, Copy)]
struct Wire<T>(T);
// SAFETY: `Layout` is plain `u32`s without padding.
unsafe impl Pod for Wire<Layout> {}

impl Ebpf {
    /// Loads and attaches every program.
    ///
    /// # Errors
    /// If a required program or a map is refused; an optional one only shows in [`Ebpf::states`].
    pub fn open() -> Result<Self, EbpfError> {
        let layout = Wire(layout::resolve(Path::new(BTF_FILE))?);
        let btf = Btf::from_sys_fs().map_err(EbpfError::Btf)?;
        let mut object = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("LAYOUT", &layout, true)
            .load(OBJECT)
            .map_err(|e| EbpfError::Load(one_line(&e)))?;
        let mut states = Vec::new();
        for probe in PROBES {
            let state = match attach(&mut object, probe, &btf) {
                Ok(()) => ProbeState::Attached,
                Err(reason) if probe.need == Need::Required => {
                    return Err(EbpfError::Program { program: probe.program, reason });
                }
                Err(reason) => ProbeState::Failed(reason),
            };
            states.push((*probe, state));
        }
        let mut this = Self {
            filter: map(&object, "FILTER", 1)?,
            table: map(&object, "TABLE", 1)?,
            threads: map(&object, "THREADS", THREADS as usize)?,
            readings: map(&object, "READINGS", THREADS as usize)?,
            clock: map(&object, "CLOCK", 1)?,
            histograms: map(&object, "HISTOGRAMS", HISTOGRAMS as usize)?,
            charges: map(&object, "CHARGES", HISTOGRAMS as usize)?,
            armed: map(&object, "ARMED", 1)?,
            disarmed: MonotonicNs::now(),
            object,
            states,
            places: Places::default(),
            histogram_places: Places::default(),
            followed: 0,
            unseeded: false,
        };
        this.compare_clocks();
        drop(btf);
        give_memory_back();
        Ok(this)
    }

    /// What became of each program.
    #[must_use]
    pub fn states(&self) -> &[(Probe, ProbeState)] {
        &self.states
    }

    /// Runs of each program so far; empty unless the kernel counts them.
    #[must_use]
    pub fn runs(&self) -> Vec<(&'static str, ProgramRuns)> {
        let runs = |name: &'static str| Some((name, runs(&self.object, name)?));
        PROBES.iter().filter_map(|probe| runs(probe.program)).collect()
    }

    /// Begins to follow a thread. Call [`Ebpf::seed`] after the last of a batch.
    ///
    /// # Errors
    /// [`Full`] if the kernel tables have no room. Where only the histograms have none, the rest is kept.
    pub fn follow(&mut self, tid: Tid, keep: Keep) -> Result<Slot, Full> {
        self.follow_as(tid, None, keep)
    }

    fn follow_as(&mut self, tid: Tid, clock: Option<u32>, keep: Keep) -> Result<Slot, Full> {
        let full = Full(self.followed);
        let Some(entry) = self.entry_for(0, tid.0) else { return Err(full) };
        let Some(place) = self.places.take(THREADS) else { return Err(full) };
        let histograms = match keep {
            Keep::Times => None,
            Keep::TimesAndHistograms => self.histogram_places.take(HISTOGRAMS),
        };
        if let Some(histograms) = histograms {
            self.histograms.set(histograms as usize, Histograms::ZERO);
            self.charges.set(histograms as usize, ChargeTables::ZERO);
        }
        self.readings.set(place as usize, Reading::ZERO);
        let thread = Thread {
            tid: tid.0,
            histograms: clock.or(histograms.map(|h| h + 1)).unwrap_or(0),
            ..Thread::ZERO
        };
        self.threads.set(place as usize, thread);
        self.table.word(entry).store(table_entry(tid.0, place), Ordering::Release);
        let bit = tid.0 % FILTER_BITS;
        change_bit(self.filter.word((bit / 64) as usize), bit % 64, true);
        self.followed += 1;
        self.unseeded = true;
        Ok(Slot { thread: place, histograms })
    }

    /// Stops following a thread.
    #[expect(clippy::needless_pass_by_value, reason = "the slot must not be used afterwards")]
    pub fn forget(&mut self, slot: Slot) {
        let tid = self.threads.get(slot.thread as usize).tid;
        if let Some(entry) = self.entry_for(tid, tid) {
            self.table.word(entry).store(0, Ordering::Release);
        }
        self.threads.set(slot.thread as usize, Thread::ZERO);
        let shares = |other: u32| other != 0 && other % FILTER_BITS == tid % FILTER_BITS;
        if !(0..self.places.used).any(|place| shares(self.threads.get(place as usize).tid)) {
            let bit = tid % FILTER_BITS;
            change_bit(self.filter.word((bit / 64) as usize), bit % 64, false);
        }
        self.places.give_back(slot.thread);
        slot.histograms.into_iter().for_each(|place| self.histogram_places.give_back(place));
        self.followed -= 1;
    }

    /// The distributions of a thread's waits and runs since it is followed, if they are kept. Counts are modulo 2³².
    #[must_use]
    pub fn histograms(&self, slot: &Slot) -> Option<Histograms> {
        slot.histograms.map(|place| self.histograms.get(place as usize))
    }

    /// Takes what was charged for the thread's waits since the last call: the programs go on in another table.
    #[must_use]
    pub fn take_charges(&self, slot: &Slot) -> Option<Charges> {
        const WORDS: usize = size_of::<Charges>() / 8;
        let place = slot.histograms? as usize;
        let chosen = self.charges.word_of(place, 0);
        let (in_use, other) = if chosen.load(Ordering::Relaxed) & 1 == 0 { (0, 1) } else { (1, 0) };
        // The tables stand after the first word of `ChargeTables`.
        for word in 0..WORDS {
            self.charges.word_of(place, 1 + other * WORDS + word).store(0, Ordering::Relaxed);
        }
        chosen.store(other as u64, Ordering::Release);
        Some(self.charges.get(place).tables[in_use])
    }

    /// The table entry near `near`'s place that holds `tid`, or a free one for `tid` 0.
    fn entry_for(&self, tid: u32, near: u32) -> Option<usize> {
        let start = table_start(near);
        (0..TABLE_PROBES).map(|i| (start + i) as usize % TABLE_ENTRIES).find(|&entry| {
            let word = self.table.word(entry).load(Ordering::Acquire);
            if tid == 0 { word == 0 } else { table_slot(word, tid).is_some() }
        })
    }

    /// Lets the kernel look up the threads that are followed since the last call, so that one that never
    /// leaves its CPU is known as well. Walks over all tasks of the host.
    ///
    /// # Errors
    /// If the iterator cannot be run.
    pub fn seed(&mut self) -> Result<(), EbpfError> {
        if !std::mem::take(&mut self.unseeded) {
            return Ok(());
        }
        let program = "seed_threads";
        let failed = |e: &dyn std::error::Error| EbpfError::Program { program, reason: one_line(e) };
        let Some(iterator) = self.object.program_mut(program) else { return Ok(()) };
        let iterator: &mut Iter = iterator.try_into().map_err(|e: ProgramError| failed(&e))?;
        let id = iterator.attach().map_err(|e| failed(&e))?;
        let link = iterator.take_link(id).map_err(|e| failed(&e))?;
        let mut file: File = link.into_file().map_err(|e| failed(&e))?;
        let mut nothing = [0; 64];
        while file.read(&mut nothing).map_err(|e| failed(&e))? > 0 {}
        Ok(())
    }

    /// Reads every followed thread; [`Ebpf::times`] then has the figures.
    ///
    /// # Errors
    /// If the kernel refuses to run the reading program.
    pub fn read(&mut self) -> Result<Window, EbpfError> {
        let begin = MonotonicNs::now();
        let failed = |e: ProgramError| EbpfError::Read(program_error(&e));
        let program = self.object.program("read_threads");
        let program = program.ok_or_else(|| EbpfError::Read("not in the object".to_owned()))?;
        let program: &RawTracePoint = program.try_into().map_err(failed)?;
        for first in (0..self.places.used).step_by(READ_BATCH as usize) {
            let mut options = RawTracePointRunOptions::new();
            options.args[0] = u64::from(first);
            program.test_run(options).map_err(failed)?;
        }
        if begin.since(self.disarmed) > DISARM_INTERVAL_NS {
            self.disarmed = begin;
            (0..CPUS as usize / 8).for_each(|word| self.armed.word(word).store(0, Ordering::Relaxed));
        }
        Ok(Window { begin, end: MonotonicNs::now() })
    }

    /// Figures of a thread at the last [`Ebpf::read`]; `None` if it was never seen or could not be read.
    #[must_use]
    pub fn times(&self, slot: &Slot) -> Option<ThreadTimes> {
        let reading = self.readings.get(slot.thread as usize);
        matches!(reading.status, READ_LIVE | READ_LAST).then_some(ThreadTimes {
            run_ns: reading.run_ns,
            wait_ns: reading.wait_ns,
            on_cpu_ns: reading.on_cpu_ns,
            sched_ns: reading.sched_ns,
            open_run_ns: reading.open_run_ns,
            open_wait_ns: reading.open_wait_ns,
            preemptions: reading.preemptions,
            yields: reading.yields,
            wakeups: reading.wakeups,
            migrations: reading.migrations,
            doing: match reading.doing {
                NOW_RUNNING => Doing::Running,
                NOW_WAITING => Doing::Waiting,
                _ => Doing::Sleeping,
            },
            last: reading.status == READ_LAST,
        })
    }

    /// When the followed thread started, nanoseconds after boot; `None` until it was seen.
    #[must_use]
    pub fn started_ns(&self, slot: &Slot) -> Option<u64> {
        let started = self.readings.get(slot.thread as usize).start_boottime_ns;
        (started != 0).then_some(started)
    }

    /// Follows this thread itself and makes it sleep, which lets the kernel side compare the scheduler's clock with
    /// `CLOCK_MONOTONIC`. Later ticks repeat it by themselves, since this thread sleeps between them.
    fn compare_clocks(&mut self) {
        self.clock.set(0, Clock::ZERO);
        let me = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap_or(0);
        if self.follow_as(Tid(me), Some(CLOCK_THREAD), Keep::Times).is_err() {
            return; // Impossible in empty tables; without the clock nothing in progress is added.
        }
        for _ in 0..50 {
            if self.clock.get(0).count as usize >= COMPARISONS {
                return;
            }
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
    }
}

/// An attached program that does nothing: the yardstick of benchmarks.
pub struct Yardstick(Object);

impl Yardstick {
    const PROGRAM: &'static str = "bench_empty";

    /// Loads and attaches it.
    ///
    /// # Errors
    /// As [`Ebpf::open`].
    pub fn open() -> Result<Self, EbpfError> {
        let btf = Btf::from_sys_fs().map_err(EbpfError::Btf)?;
        let mut object =
            EbpfLoader::new().btf(Some(&btf)).load(OBJECT).map_err(|e| EbpfError::Load(one_line(&e)))?;
        let attach = Attach::BtfTracepoint("sched_switch");
        let probe = Probe { program: Self::PROGRAM, attach, group: ProbeGroup::Sched, need: Need::Required };
        self::attach(&mut object, &probe, &btf)
            .map_err(|reason| EbpfError::Program { program: Self::PROGRAM, reason })?;
        Ok(Self(object))
    }

    /// Its runs so far, if the kernel counts them.
    #[must_use]
    pub fn runs(&self) -> Option<ProgramRuns> {
        runs(&self.0, Self::PROGRAM)
    }
}

/// Runs of a program; `None` unless the kernel counts them.
fn runs(object: &Object, name: &str) -> Option<ProgramRuns> {
    let info = object.program(name)?.info().ok()?;
    let runs = ProgramRuns { count: info.run_count(), ns: duration_ns(info.run_time()) };
    (runs.count > 0).then_some(runs)
}

fn attach(object: &mut Object, probe: &Probe, btf: &Btf) -> Result<(), String> {
    let program = object.program_mut(probe.program).ok_or("not in the object")?;
    let error = |e: ProgramError| program_error(&e);
    match probe.attach {
        Attach::BtfTracepoint(name) => {
            let program: &mut BtfTracePoint = program.try_into().map_err(error)?;
            program.load(name, btf).map_err(error)?;
            program.attach().map_err(error)?;
        }
        Attach::Iterator(of) => {
            let program: &mut Iter = program.try_into().map_err(error)?;
            program.load(of, btf).map_err(error)?;
        }
        Attach::OnRequest => {
            let program: &mut RawTracePoint = program.try_into().map_err(error)?;
            program.load().map_err(error)?;
        }
    }
    Ok(())
}

fn map<T: Copy>(object: &Object, name: &'static str, len: usize) -> Result<Mapped<T>, EbpfError> {
    let failed = |source| EbpfError::Map { map: name, source };
    let data: &MapData = match object.map(name) {
        Some(Map::Array(data)) => data,
        _ => return Err(failed(io::Error::other("not an array in the object"))),
    };
    Mapped::new(data.fd(), len).map_err(failed)
}

/// Reading BTF takes tens of megabytes for a moment, which glibc would keep for later.
fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What the kernel said, without the verifier's log, which goes to the debug log.
fn program_error(error: &ProgramError) -> String {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        tracing::debug!(%verifier_log, "program refused");
        return io_error.to_string();
    }
    one_line(error)
}
