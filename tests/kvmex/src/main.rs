//! `kvmex`: executes one round for each line on standard input, and says on standard output what it did.
//!
//! `kvmex [outs=N] [cpuids=N] [mmios=N] [hlts=N] [spins=N] [vcpus=N]`; other arguments are left to whoever reads the
//! command line. The first line of output names the threads: `ready TID…`; each round ends with one `done IO MMIO HLT` for
//! every vCPU.

use std::{
    io::{self, BufRead as _, Write as _},
    time::Duration,
};

use kvmex::{Irqchip, Machine, Round};

const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> io::Result<()> {
    let (mut round, mut vcpus) = (Round::NONE, 1);
    for (name, value) in std::env::args().filter_map(|a| Some((a.split_once('=')?.0.to_owned(), number(&a)?)))
    {
        match name.as_str() {
            "outs" => round.outs = value,
            "cpuids" => round.cpuids = value,
            "mmios" => round.mmios = value,
            "hlts" => round.hlts = value,
            "spins" => round.spins = value,
            "vcpus" => vcpus = value,
            _ => {}
        }
    }
    let machine = Machine::new(vcpus, round, Irqchip::None)?;
    let mut out = io::stdout().lock();
    let tids: Vec<_> = machine.tids().iter().map(u32::to_string).collect();
    writeln!(out, "ready {}", tids.join(" "))?;
    out.flush()?;
    for line in io::stdin().lock().lines() {
        line?;
        machine.begin();
        for did in machine.end(PATIENCE)? {
            writeln!(out, "done {} {} {}", did.io, did.mmio, did.hlt)?;
        }
        out.flush()?;
    }
    Ok(())
}

fn number(argument: &str) -> Option<u32> {
    argument.split_once('=')?.1.parse().ok()
}
