//! What `cargo xtask bench net` measures beside the programs of the monitor; see `monitor-ebpf/src/net_bench.rs`.

use aya::{
    Btf, Ebpf as Object, EbpfLoader,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        tc::{SchedClassifierLinkId, TcAttachOptions},
    },
};
use monitor_ebpf::NicCell;

use super::{
    EbpfError, OBJECT, ProgramRuns, map,
    probes::{Attach, Need, Probe, ProbeGroup},
    program_error, runs,
};
use crate::one_line;

/// Programs that benchmarks compare with; detached when dropped.
pub struct NetYardstick(Object);

impl NetYardstick {
    const EMPTY: &'static str = "bench_empty_net";
    const CLASSIFIERS: [(&'static str, TcAttachType); 2] =
        [("bench_tcx_xmit", TcAttachType::Egress), ("bench_tcx_receive", TcAttachType::Ingress)];

    /// Attaches a program that does nothing to the tracepoint `net_dev_xmit`.
    ///
    /// # Errors
    /// As [`super::Ebpf::open`].
    pub fn open_empty() -> Result<Self, EbpfError> {
        let mut object = load()?;
        let btf = Btf::from_sys_fs().map_err(EbpfError::Btf)?;
        let attach = Attach::BtfTracepoint("net_dev_xmit");
        let probe = Probe { program: Self::EMPTY, attach, group: ProbeGroup::Net, need: Need::Required };
        super::attach(&mut object, &probe, &btf)
            .map_err(|reason| EbpfError::Program { program: Self::EMPTY, reason })?;
        Ok(Self(object))
    }

    /// Attaches classifiers that count both ways to a device of this thread's network namespace (tcx, Linux 6.6).
    ///
    /// # Errors
    /// As [`super::Ebpf::open`].
    pub fn open_tcx(device: &str) -> Result<Self, EbpfError> {
        let mut object = load()?;
        for (program, side) in Self::CLASSIFIERS {
            attach_classifier(&mut object, program, (device, side))
                .map_err(|error| EbpfError::Program { program, reason: program_error(&error) })?;
        }
        Ok(Self(object))
    }

    /// Runs of the programs so far, by name, if the kernel counts them.
    #[must_use]
    pub fn runs(&self) -> Vec<(&'static str, ProgramRuns)> {
        let classifiers = Self::CLASSIFIERS.map(|(program, _)| program);
        let all = [Self::EMPTY].into_iter().chain(classifiers);
        all.filter_map(|program| Some((program, runs(&self.0, program)?))).collect()
    }

    /// Packets that the classifiers counted: sent by the host, received by it.
    ///
    /// # Errors
    /// If their map cannot be read.
    pub fn packets(&self) -> Result<[u64; 2], EbpfError> {
        let cells = map::<NicCell>(&self.0, "NIC_CELLS")?;
        let cpus = aya::util::nr_cpus().unwrap_or(1);
        let sum = |of: fn(&NicCell) -> u64| (0..cpus).map(|cpu| of(&cells.get(cpu))).sum();
        Ok([sum(|cell| cell.xmit.packets), sum(|cell| cell.receive.packets)])
    }
}

fn load() -> Result<Object, EbpfError> {
    let btf = Btf::from_sys_fs().map_err(EbpfError::Btf)?;
    EbpfLoader::new().btf(Some(&btf)).load(OBJECT).map_err(|e| EbpfError::Load(one_line(&e)))
}

fn attach_classifier(
    object: &mut Object,
    program: &'static str,
    (device, side): (&str, TcAttachType),
) -> Result<SchedClassifierLinkId, ProgramError> {
    let Some(program) = object.program_mut(program) else { return Err(ProgramError::NotLoaded) };
    let program: &mut SchedClassifier = program.try_into()?;
    program.load()?;
    program.attach_with_options(device, side, TcAttachOptions::TcxOrder(LinkOrder::default()))
}
