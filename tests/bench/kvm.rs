//! What the probes of KVM cost per event, beside an empty program on a raw tracepoint.
//!
//! The kernel counts runs and time of each program (`kernel.bpf_stats_enabled`); the time contains the counting's own
//! clock reads, which is why the empty program is measured in the same round. Exits are rehearsed: this thread runs the
//! programs itself (`BPF_PROG_TEST_RUN`), with addresses where they find what they look for, so that it works where no guest
//! mode is entered. Returns to user space are real ones as well. Figures of one run compare, figures of two do not.
//!
//! Before that, exits a second of a vCPU that does nothing else, with and without the probes.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for a terminal"
)]
#![expect(clippy::cast_precision_loss, reason = "averages")]

#[path = "../support/counting.rs"]
mod counting;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use counting::Counting;
use kvmex::{Irqchip, Machine, Round};
use monitor::{
    source::ebpf::{Ebpf, Keep, ProgramRuns, Yardstick, probes::ProbeGroup},
    units::Tid,
};

const ROUNDS: usize = 5;
const RUNS: u32 = 5_000;
/// Exits of a storm.
const STORM: u32 = 20_000;
const PATIENCE: Duration = Duration::from_secs(60);
/// Of the kernel's `arch/x86/kvm/trace.h`.
const ISAS: [(u32, &str); 2] = [(1, "VMX"), (2, "SVM")];

/// Nanoseconds of each run, by what ran.
type Figures = BTreeMap<String, Vec<f64>>;

fn put(figures: &mut Figures, name: &str, before: Option<ProgramRuns>, after: Option<ProgramRuns>) {
    let (before, after) = (before.unwrap_or(ProgramRuns { count: 0, ns: 0 }), after.unwrap());
    let ns = (after.ns - before.ns) as f64 / (after.count - before.count) as f64;
    figures.entry(name.to_owned()).or_default().push(ns);
}

fn runs(ebpf: &Ebpf, program: &str) -> Option<ProgramRuns> {
    ebpf.runs().into_iter().find(|(name, _)| *name == program).map(|(_, runs)| runs)
}

fn rehearse(figures: &mut Figures) {
    let yardstick = Yardstick::open_raw().unwrap();
    let before = yardstick.runs_raw();
    (0..RUNS).for_each(|_| yardstick.rehearse_raw().unwrap());
    put(figures, "0 empty program, rehearsed", before, yardstick.runs_raw());
    drop(yardstick);
    for followed in [false, true] {
        let ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
        // In a thread of its own: the one that opened the probes is followed already, for its clock.
        std::thread::scope(|scope| {
            scope.spawn(|| rehearse_exits(figures, ebpf, followed)).join().unwrap();
        });
    }
}

fn rehearse_exits(figures: &mut Figures, mut ebpf: Ebpf, followed: bool) {
    let me = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
    let other = Machine::new(1, Round::NONE, Irqchip::None).unwrap();
    let tid = if followed { me } else { other.tids()[0] };
    let slot = ebpf.follow(Tid(tid), Keep::Everything, None).unwrap();
    ebpf.seed().unwrap();
    let whose = if followed { "a vCPU" } else { "another thread" };
    for (isa, isa_name) in ISAS {
        let args = ebpf.pretend_exits(&slot, isa).unwrap();
        let programs = ["kvm_exit", "kvm_entry"];
        let before = programs.map(|program| runs(&ebpf, program));
        for _ in 0..RUNS {
            programs.iter().for_each(|program| ebpf.rehearse(program, args).unwrap());
        }
        for (program, before) in programs.into_iter().zip(before) {
            let name = format!("1 {program} of {whose}, {isa_name}, rehearsed");
            put(figures, &name, before, runs(&ebpf, program));
        }
    }
    let program = "kvm_vcpu_wakeup";
    let before = runs(&ebpf, program);
    (0..RUNS).for_each(|_| ebpf.rehearse(program, [50_000, 1, 1]).unwrap());
    put(figures, &format!("2 {program} of {whose}, rehearsed"), before, runs(&ebpf, program));
    if followed {
        // Else this was no rehearsal of what is meant.
        let _ = ebpf.read();
        let halts = ebpf.kvm_figures(&slot).map(|figures| figures.halts);
        assert_eq!(halts, Some(u64::from(RUNS)), "the programs did not find the thread");
    }
}

/// Real returns to user space.
fn really(figures: &mut Figures) {
    let machine = Machine::new(1, Round { outs: RUNS, ..Round::NONE }, Irqchip::None).unwrap();
    let round = || {
        machine.begin();
        machine.end(PATIENCE).unwrap();
    };
    let yardstick = Yardstick::open_raw().unwrap();
    let before = yardstick.runs_raw();
    round();
    put(figures, "3 empty program, real returns to user space", before, yardstick.runs_raw());
    drop(yardstick);
    for followed in [false, true] {
        let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
        let _slot = followed.then(|| ebpf.follow(Tid(machine.tids()[0]), Keep::Everything, None).unwrap());
        let program = "kvm_userspace_exit";
        let before = runs(&ebpf, program);
        round();
        let whose = if followed { "a vCPU" } else { "another thread" };
        put(figures, &format!("4 {program} of {whose}, real"), before, runs(&ebpf, program));
    }
}

/// Exits of an exit storm, with and without the probes, in turn: what a guest loses.
fn storms() {
    const PAIRS: usize = 5;
    println!("exits a second of one vCPU that does nothing else, medians of {PAIRS} rounds each, in turn");
    let kinds = [
        ("cpuid, answered by KVM", Round { cpuids: STORM, ..Round::NONE }),
        ("port I/O, answered by user space", Round { outs: STORM, ..Round::NONE }),
    ];
    for (kind, round) in kinds {
        let machine = Machine::new(1, round, Irqchip::None).unwrap();
        let storm = || {
            let begin = Instant::now();
            machine.begin();
            machine.end(PATIENCE).unwrap();
            f64::from(STORM) / begin.elapsed().as_secs_f64()
        };
        storm(); // Pages are there afterwards.
        let mut per_s = [(); 3].map(|()| Vec::new());
        for pair in 0..PAIRS {
            eprintln!("{kind}: round {} of {PAIRS}", pair + 1);
            per_s[0].push(storm());
            let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
            per_s[1].push(storm());
            let _slot = ebpf.follow(Tid(machine.tids()[0]), Keep::Everything, None).unwrap();
            ebpf.seed().unwrap();
            per_s[2].push(storm());
        }
        let [without, unwatched, watched] = per_s.map(|mut values| {
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        });
        println!(
            "{kind:<34} without {without:>9.0}, not watched {unwatched:>9.0} ({:.3}), watched {watched:>9.0} ({:.3})",
            unwatched / without,
            watched / without
        );
    }
}

fn main() {
    storms();
    let _counting = Counting::on();
    let mut figures = Figures::new();
    for round in 0..ROUNDS {
        eprintln!("round {} of {ROUNDS}", round + 1);
        rehearse(&mut figures);
        really(&mut figures);
    }
    println!("median of {ROUNDS} rounds, in ns per run (lowest, highest), and without the empty program's");
    let mut empty = 0.0;
    for (name, mut values) in figures {
        values.sort_by(f64::total_cmp);
        let median = values[values.len() / 2];
        if name.contains("empty") {
            empty = median;
        }
        println!(
            "{:<52} {median:>8.1} ({:.1}, {:.1}) {:>8.1}",
            &name[2..],
            values[0],
            values[values.len() - 1],
            median - empty
        );
    }
}
