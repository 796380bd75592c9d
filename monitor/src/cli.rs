//! The command line: what the user typed, and the [`Config`] that follows from it.

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::sink::report::Format;

use crate::source::ebpf::probes::ProbeGroup;

/// Profiles KVM and QEMU guests from the host, without an agent inside.
#[derive(Debug, Parser)]
#[command(name = "kvm-monitor", version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Log more to standard error: -v progress, -vv every tick. KVM_MONITOR_LOG takes a full filter.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Stream samples as NDJSON, one JSON object per line.
    Run(RunArgs),
    /// Compare the sources: how accurate each is, live or from a recorded stream.
    Compare(CompareArgs),
    /// Show the domains: QEMU process, vCPU threads, interfaces, disks, and how each was found.
    List(ListArgs),
    /// Show what this host can do, source by source and probe by probe; if not, why and what to do.
    Check(SourceArgs),
    /// Print the JSON Schema of the stream, or the metric table.
    Schema(SchemaArgs),
}

/// Which sources to use, and how.
#[derive(Clone, Debug, Args)]
pub struct SourceArgs {
    /// libvirt connection URI; opened read-only.
    #[arg(long, value_name = "URI", default_value = "qemu:///system")]
    pub connect: String,
    /// Kernel probes: use them if possible, never, or fail without them.
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    pub ebpf: Mode,
    /// libvirt: use it if possible, never, or fail without it.
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    pub libvirt: Mode,
}

/// Arguments of `run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Sources.
    #[command(flatten)]
    pub sources: SourceArgs,
    /// Only this domain; may be given several times.
    #[arg(long = "domain", value_name = "NAME|UUID")]
    pub domains: Vec<String>,
    /// Time between samples, 10ms at least.
    #[arg(long, value_name = "DUR", default_value = "1s")]
    pub interval: Period,
    /// Time between reads of libvirt [default: the larger of 1s and --interval].
    #[arg(long, value_name = "DUR")]
    pub libvirt_interval: Option<Period>,
    /// Time between reads of what libvirt has to ask QEMU for, while kernel probes work; the guests pay for
    /// these. At least --libvirt-interval.
    /// [default: 10s; compare: a twentieth of --duration, 10s at most]
    #[arg(long, value_name = "DUR")]
    pub libvirt_slow_interval: Option<Period>,
    /// How long to run [default: until a signal].
    #[arg(long, value_name = "DUR")]
    pub duration: Option<Period>,
    /// Groups of kernel probes to attach, separated by commas [default: all].
    #[arg(long, value_enum, value_delimiter = ',', value_name = "GROUPS")]
    pub probes: Option<Vec<ProbeGroup>>,
    /// Where the output goes: a file, or - for standard output.
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub output: String,
}

/// Arguments of `compare`.
#[derive(Clone, Debug, Args)]
pub struct CompareArgs {
    /// A recorded stream, plain or zstd, - for standard input [default: measure now].
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// How the report is written.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Exit with status 1 if more than so many per cent of any figure are unexplained.
    #[arg(long, value_name = "PERCENT")]
    pub fail_over: Option<f64>,
    /// What the guests did by their own account, for test labs: a JSON array.
    #[arg(long, value_name = "FILE")]
    pub truth: Option<PathBuf>,
    /// How to measure.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Arguments of `list`.
#[derive(Clone, Debug, Args)]
pub struct ListArgs {
    /// Sources.
    #[command(flatten)]
    pub sources: SourceArgs,
    /// Only this domain; may be given several times.
    #[arg(long = "domain", value_name = "NAME|UUID")]
    pub domains: Vec<String>,
    /// Text for a person, or the `domain` lines of the stream.
    #[arg(long, value_enum, default_value_t = ListFormat::Text)]
    pub format: ListFormat,
}

/// Arguments of `schema`.
#[derive(Clone, Debug, Args)]
pub struct SchemaArgs {
    /// JSON Schema of the stream, or the metric table.
    #[arg(long, value_enum, default_value_t = SchemaFormat::Json)]
    pub format: SchemaFormat,
}

/// Whether to use a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Use it if possible.
    Auto,
    /// Do not use it.
    Off,
    /// Fail without it.
    Require,
}

/// Output of `list`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ListFormat {
    /// For a person.
    Text,
    /// `domain` lines.
    Json,
}

/// Output of `schema`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SchemaFormat {
    /// JSON Schema (draft 2020-12).
    Json,
    /// The metric table.
    Markdown,
    /// The metric table with what ceilometer and prometheus-libvirt-exporter call each figure.
    Equivalents,
}

/// Time between reads of libvirt's dear groups, if nothing else is asked for.
const SLOW_INTERVAL: Duration = Duration::from_secs(10);

/// Longest duration taken: far from where sums of durations and clocks overflow.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 86_400);

/// A duration as `500ms`, `10s`, `5m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Period(pub Duration);

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match humantime::parse_duration(text) {
            Ok(duration) if duration.is_zero() => Err("must be longer than 0".to_owned()),
            Ok(duration) if duration > LONGEST => Err("must be 100 years at most".to_owned()),
            Ok(duration) => Ok(Self(duration)),
            Err(error) => Err(format!("{error}; write for example 500ms, 10s or 5m")),
        }
    }
}

/// What `run` does, resolved from what was typed.
#[derive(Clone, Debug)]
pub struct Config {
    /// libvirt connection URI.
    pub uri: String,
    /// Kernel probes.
    pub ebpf: Mode,
    /// libvirt.
    pub libvirt: Mode,
    /// Names or UUIDs; empty means all.
    pub domains: Vec<String>,
    /// Time between samples.
    pub interval: Duration,
    /// Time between reads of libvirt.
    pub libvirt_interval: Duration,
    /// Time between reads of libvirt's dear groups while kernel probes work.
    pub libvirt_slow_interval: Duration,
    /// Groups of kernel probes asked for by name; absent means every one that works.
    pub probes: Option<Vec<ProbeGroup>>,
    /// How long to run.
    pub duration: Option<Duration>,
    /// File, or `-`.
    pub output: String,
}

/// What `compare` does, resolved from what was typed.
#[derive(Clone, Debug)]
pub struct CompareConfig {
    /// A recorded stream, or how to make one.
    pub stream: Stream,
    /// How the report is written.
    pub format: Format,
    /// Limit on what is unexplained, per cent.
    pub limit_pct: Option<f64>,
    /// File of ground truth.
    pub truth: Option<PathBuf>,
    /// Names or UUIDs; empty means all.
    pub domains: Vec<String>,
    /// File of the report, or `-`.
    pub output: String,
}

/// Where `compare` takes its samples from.
#[derive(Clone, Debug)]
pub enum Stream {
    /// A file.
    Recorded(PathBuf),
    /// Measured now.
    Live(Box<Config>),
}

impl CompareConfig {
    /// Fills in what was not typed, and checks the rest.
    ///
    /// # Errors
    /// If options contradict each other or a limit.
    pub fn resolve(args: CompareArgs) -> Result<Self, ConfigError> {
        let CompareArgs { file, format, fail_over, truth, mut run } = args;
        if fail_over.is_some_and(|limit| !limit.is_finite() || limit < 0.0) {
            return Err(ConfigError::BadLimit);
        }
        let (domains, output) = (run.domains.clone(), run.output.clone());
        let stream = match file {
            Some(_) if run.duration.is_some() => return Err(ConfigError::RecordedDuration),
            Some(file) => Stream::Recorded(file),
            None => {
                // Few readings compare little: the guests pay for more of them while they are compared.
                let often = run.duration.map(|d| Period((d.0 / 20).min(SLOW_INTERVAL)));
                run.libvirt_slow_interval = run.libvirt_slow_interval.or(often);
                Stream::Live(Box::new(Config::resolve(run)?))
            }
        };
        Ok(Self { stream, format, limit_pct: fail_over, truth, domains, output })
    }
}

/// Options that contradict each other or a limit.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The limit of a comparison is no share.
    #[error("--fail-over takes a share in per cent, such as 0.5")]
    BadLimit,
    /// A recorded stream has its own duration.
    #[error("--duration and a recorded stream contradict each other: leave out one of them")]
    RecordedDuration,
    /// The interval is too short.
    #[error("--interval {0:?} is too short: 10ms is the least")]
    IntervalTooShort(Duration),
    /// Probes are asked for and forbidden.
    #[error("--probes and --ebpf off contradict each other: leave out one of them")]
    ProbesOff,
}

impl Config {
    /// Fills in what was not typed, and checks the rest.
    ///
    /// # Errors
    /// If options contradict each other or a limit.
    pub fn resolve(args: RunArgs) -> Result<Self, ConfigError> {
        let interval = args.interval.0;
        if interval < Duration::from_millis(10) {
            return Err(ConfigError::IntervalTooShort(interval));
        }
        let libvirt_interval = args.libvirt_interval.map_or(interval.max(Duration::from_secs(1)), |p| p.0);
        if args.sources.ebpf == Mode::Off && args.probes.is_some() {
            return Err(ConfigError::ProbesOff);
        }
        Ok(Self {
            uri: args.sources.connect,
            ebpf: args.sources.ebpf,
            probes: args.probes,
            libvirt: args.sources.libvirt,
            domains: args.domains,
            interval,
            libvirt_interval,
            libvirt_slow_interval: args
                .libvirt_slow_interval
                .map_or(SLOW_INTERVAL, |p| p.0)
                .max(libvirt_interval),
            duration: args.duration.map(|p| p.0),
            output: args.output,
        })
    }

    /// The groups of kernel probes to attach.
    #[must_use]
    pub fn probe_groups(&self) -> &[ProbeGroup] {
        self.probes.as_deref().unwrap_or(ProbeGroup::ALL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(line: &str) -> Result<Config, String> {
        let cli = Cli::try_parse_from(["kvm-monitor", "run"].into_iter().chain(line.split_whitespace()));
        let Command::Run(args) = cli.map_err(|e| e.to_string())?.command else { unreachable!() };
        Config::resolve(args).map_err(|e| e.to_string())
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn libvirt_intervals_follow_the_interval() {
        let check = |line: &str, libvirt, slow| {
            let c = config(line).unwrap();
            let expected = (Duration::from_millis(libvirt), Duration::from_millis(slow));
            assert_eq!((c.libvirt_interval, c.libvirt_slow_interval), expected, "{line}");
        };
        check("", 1_000, 10_000);
        check("--interval 10ms", 1_000, 10_000);
        check("--interval 30s", 30_000, 30_000);
        check("--interval 100ms --libvirt-interval 100ms --libvirt-slow-interval 1s", 100, 1_000);
    }

    #[test]
    fn bad_values_are_refused_with_the_reason() {
        let check = |line: &str, expected: &str| {
            let error = config(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        };
        check("--interval 9ms", "10ms is the least");
        check("--interval 0s", "longer than 0");
        check("--duration 500000000000y", "100 years");
        check("--ebpf off --probes sched", "contradict");
        check("--interval abc", "write for example");
        check("--ebpf maybe", "possible values");
        check("--no-such-option", "unexpected argument");
    }
}
