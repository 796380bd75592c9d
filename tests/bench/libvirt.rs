//! What one collection costs, all parties: ours with and without probes, beside a bulk call from Python, OpenStack
//! ceilometer's inspector, Debian's prometheus-libvirt-exporter and the same files of `/proc` read from Python.
//!
//! `libvirt SIZE…` measures against so many real domains: QEMU processes that are paused before their first instruction,
//! each with a disk, a tap and a balloon, under a libvirtd of our own. `libvirt scale SIZE…` measures libvirt's test
//! driver, which has domains without processes, by the thousand. CPU time is the scheduler's, of the client, libvirtd
//! and every QEMU. Everything is measured in turn, round after round, and medians are printed: figures of one run
//! compare, figures of two do not. A peer that is not installed is left out, and that is said.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for a terminal"
)]
#![expect(clippy::cast_precision_loss, reason = "averages")]

use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use lab::{Hog, Lab, LabDirs, cpu_ns};
use rustix::process::{Pid, Signal, kill_process};

const PEER: &str = include_str!("libvirt_peer.py");
const ROUNDS: usize = 3;
/// Collections of a peer in a round.
const COLLECTIONS: u64 = 2;
/// Before each of them, since ours come as often: what was not needed for so long is in no cache.
const PAUSE: Duration = Duration::from_secs(1);
/// How long one of our runs is measured in a round: as long as it is between looks at everything, one of which is in it.
const WINDOW: Duration = Duration::from_secs(10);
/// Processes that began so lately are looked at more closely.
const YOUNG: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(60);
/// At least, until the next process is asked what it shares.
const SHARED: Duration = Duration::from_millis(700);
const EXPORTER: &str = "prometheus-libvirt-exporter";

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let numbers =
        |words: &[String]| words.iter().map(|word| word.parse().expect("a number")).collect::<Vec<usize>>();
    match words.first().map(String::as_str) {
        Some("scale") => scale(&numbers(&words[1..])),
        Some(_) => domains(&numbers(&words)),
        None => domains(&[1, 10, 50, 100]),
    }
}

// ---- real domains

/// CPU time in nanoseconds of who takes part in collections.
#[derive(Clone, Copy, Default)]
struct Cost {
    wall_ns: u64,
    client_ns: u64,
    libvirtd_ns: u64,
    qemu_ns: u64,
    collections: u64,
}

/// Medians over rounds of one way, per collection, in milliseconds.
struct Row {
    name: String,
    rounds: Vec<Cost>,
    rss_kib: Option<u64>,
}

impl Row {
    fn median(&self, of: impl Fn(&Cost) -> u64) -> f64 {
        let mut each: Vec<f64> =
            self.rounds.iter().map(|cost| of(cost) as f64 / cost.collections.max(1) as f64 / 1e6).collect();
        each.sort_by(f64::total_cmp);
        each.get(each.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn total(&self) -> f64 {
        self.median(|c| c.client_ns + c.libvirtd_ns + c.qemu_ns)
    }
}

struct Stage {
    lab: Lab,
    qemus: Vec<u32>,
    monitor: PathBuf,
}

fn domains(sizes: &[usize]) {
    let dirs = LabDirs::from_env().unwrap();
    let monitor = PathBuf::from(std::env::var_os("KVM_MONITOR_BIN").expect("KVM_MONITOR_BIN is not set"));
    let mut stage = Stage { lab: Lab::start(&dirs).unwrap(), qemus: Vec::new(), monitor };
    let mut per_domain: Vec<(usize, Vec<(String, f64)>)> = Vec::new();
    for &size in sizes {
        stage.grow(size);
        let rows = stage.measure(size);
        print_rows(size, &rows);
        per_domain.push((
            size,
            rows.iter().map(|row| (row.name.clone(), row.total() * 1e3 / size as f64)).collect(),
        ));
    }
    print_slopes(&per_domain);
}

impl Stage {
    fn grow(&mut self, size: usize) {
        let begin = Instant::now();
        let mut script = String::new();
        for i in self.qemus.len()..size {
            let image = self.lab.scratch().join(format!("bench{i}.raw"));
            std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
            let file = self.lab.scratch().join(format!("bench{i}.xml"));
            std::fs::write(&file, domain_xml(i, &image)).unwrap();
            let _ = write!(script, "create --paused {};", file.display());
        }
        self.lab.virsh(&[&script]).unwrap();
        for i in self.qemus.len()..size {
            let file = self.lab.path(format!("/run/libvirt/qemu/bench{i}.pid"));
            self.qemus.push(std::fs::read_to_string(file).unwrap().trim().parse().unwrap());
        }
        eprintln!("{size} domains are there after {:.0} s", begin.elapsed().as_secs_f64());
        std::thread::sleep(YOUNG);
    }

    fn measure(&self, size: usize) -> Vec<Row> {
        let mut peers: Vec<(Row, Peer)> = ["procfs", "bulk", "ceilometer"]
            .into_iter()
            .filter_map(|name| {
                let peer = Peer::start(&self.lab, name, size)?;
                Some((row(&format!("{name} (Python)")), peer))
            })
            .collect();
        peers.extend(Peer::exporter(&self.lab).map(|peer| (row(EXPORTER), peer)));
        let mut ours: Vec<(Row, Vec<&str>)> = vec![
            (row("ours: probes and /proc"), vec!["--ebpf", "require", "--libvirt", "off"]),
            (row("ours: /proc alone"), vec!["--ebpf", "off", "--libvirt", "off"]),
            (
                row("ours: probes, between slow reads"),
                vec!["--ebpf", "require", "--libvirt", "require", "--libvirt-slow-interval", "1h"],
            ),
            (row("ours: libvirt and /proc, no probes"), vec!["--ebpf", "off", "--libvirt", "require"]),
        ];
        for round in 0..ROUNDS {
            for (row, peer) in &mut peers {
                let mut cost = self.cost(peer.pid(), COLLECTIONS, || {
                    std::thread::sleep(PAUSE);
                    peer.collect();
                });
                let paused = COLLECTIONS * u64::try_from(PAUSE.as_nanos()).unwrap();
                cost.wall_ns = cost.wall_ns.saturating_sub(paused);
                row.rounds.push(cost);
                row.rss_kib = rss_kib(peer.pid());
            }
            for (row, args) in &mut ours {
                self.run_ours(row, &[&args[..], &["--interval", "1s"]].concat(), size);
            }
            eprintln!("round {} of {ROUNDS} with {size} domains", round + 1);
        }
        let mut quick = row("ours: probes and /proc, at 10 ms");
        let mut often = row("ours: probes and /proc, at 100 ms");
        let args = ["--ebpf", "require", "--libvirt", "off", "--interval"];
        // Where CPUs are virtual, one that halts is taken away, and when it comes back its caches are somebody else's: what wakes
        // up a hundred times a second pays for that each time.
        let mut awake = row("the same, CPUs that never halt");
        let cpus = std::thread::available_parallelism().unwrap().get();
        if size <= 10 {
            let args = [&args[..], &["10ms"]].concat();
            for _ in 0..ROUNDS {
                self.run_ours(&mut quick, &args, size);
                let _awake: Vec<Hog> =
                    (0..cpus).map(|cpu| Hog::giving_way(&self.lab, cpu).unwrap()).collect();
                self.run_ours(&mut awake, &args, size);
            }
        }
        self.run_ours(&mut often, &[&args[..], &["100ms"]].concat(), size);
        let rows = peers.into_iter().map(|(row, _)| row).chain(ours.into_iter().map(|(row, _)| row));
        rows.chain([often, quick, awake]).filter(|row| !row.rounds.is_empty()).collect()
    }

    fn cost(&self, client: u32, collections: u64, collect: impl FnMut()) -> Cost {
        let libvirtd = self.lab.libvirtd_pid().unwrap();
        let qemu = || self.qemus.iter().map(|pid| cpu_ns(*pid)).sum::<u64>();
        let before = (cpu_ns(client), cpu_ns(libvirtd), qemu());
        let begin = Instant::now();
        std::iter::repeat_with(collect).take(usize::try_from(collections).unwrap()).last();
        let wall_ns = u64::try_from(begin.elapsed().as_nanos()).unwrap();
        Cost {
            wall_ns,
            client_ns: cpu_ns(client) - before.0,
            libvirtd_ns: cpu_ns(libvirtd) - before.1,
            qemu_ns: qemu() - before.2,
            collections,
        }
    }

    /// Starts the program, lets it settle, and measures it while it ticks.
    fn run_ours(&self, row: &mut Row, args: &[&str], size: usize) {
        let mut command = self.lab.command(&self.monitor);
        let mut child =
            command.arg("run").args(args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let samples = Arc::new(AtomicU64::new(0));
        let reader = {
            let (samples, stdout) = (Arc::clone(&samples), child.stdout.take().unwrap());
            std::thread::spawn(move || {
                // Text is not taken apart: what reads must cost little beside what is measured.
                for line in BufReader::with_capacity(1 << 20, stdout).split(b'\n').map_while(Result::ok) {
                    if line.starts_with(br#"{"type":"sample""#) {
                        samples.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        };
        let (all, deadline) = (size as u64, Instant::now() + PATIENCE);
        while samples.load(Ordering::Relaxed) < 2 * all {
            assert!(Instant::now() < deadline, "no samples of {size} domains");
            std::thread::sleep(Duration::from_millis(20));
        }
        // What each process shares is read every five minutes, at first of one after the other.
        std::thread::sleep(Duration::from_secs(1).max(SHARED * u32::try_from(size.min(10)).unwrap()));
        let before = samples.load(Ordering::Relaxed);
        let mut cost = self.cost(child.id(), 1, || std::thread::sleep(WINDOW));
        cost.collections = (samples.load(Ordering::Relaxed) - before) / all;
        row.rounds.push(cost);
        row.rss_kib = rss_kib(child.id()).max(row.rss_kib);
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        child.wait().unwrap();
        reader.join().unwrap();
    }
}

fn row(name: &str) -> Row {
    Row { name: name.to_owned(), rounds: Vec::new(), rss_kib: None }
}

fn domain_xml(i: usize, image: &Path) -> String {
    format!(
        "<domain type='qemu'><name>bench{i}</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os><cpu mode='custom'><model>qemu64</model></cpu>
<devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>
<target dev='vda' bus='virtio'/></disk>
<interface type='ethernet'><target dev='tapbench{i}'/><model type='virtio'/></interface>
<memballoon model='virtio'><stats period='1'/></memballoon></devices></domain>",
        image.display()
    )
}

/// Another program that collects on demand.
enum Peer {
    Script { child: Child, go: ChildStdin, done: BufReader<ChildStdout> },
    Exporter { child: Child, namespace: u32 },
}

impl Peer {
    /// `None` if it cannot run here.
    fn start(lab: &Lab, name: &str, size: usize) -> Option<Self> {
        let python =
            std::env::var_os("KVM_MONITOR_BENCH_PYTHON").unwrap_or_else(|| "/usr/bin/python3".into());
        let mut command = lab.command(python);
        command.args(["-c", PEER, name]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().ok()?;
        let (go, mut done) = (child.stdin.take()?, BufReader::new(child.stdout.take()?));
        let mut line = String::new();
        done.read_line(&mut line).ok()?;
        if line.trim() != format!("ready {size}") {
            eprintln!("{name} is not measured: it does not start (is it installed?)");
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        Some(Self::Script { child, go, done })
    }

    fn exporter(lab: &Lab) -> Option<Self> {
        let mut command = lab.command(EXPORTER);
        command.arg("--web.listen-address=127.0.0.1:9177").stdout(Stdio::null()).stderr(Stdio::null());
        let Ok(child) = command.spawn() else {
            eprintln!("{EXPORTER} is not measured: it is not installed");
            return None;
        };
        let peer = Self::Exporter { child, namespace: lab.supervisor_pid() };
        std::thread::sleep(Duration::from_secs(1));
        Some(peer)
    }

    fn pid(&self) -> u32 {
        let (Self::Script { child, .. } | Self::Exporter { child, .. }) = self;
        child.id()
    }

    fn collect(&mut self) {
        match self {
            Self::Script { go, done, .. } => {
                go.write_all(b"\n").unwrap();
                let mut line = String::new();
                done.read_line(&mut line).unwrap();
                assert_eq!(line, "done\n");
            }
            Self::Exporter { namespace, .. } => {
                let namespace = *namespace;
                std::thread::scope(|scope| scope.spawn(|| scrape(namespace)).join()).unwrap();
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let (Self::Script { child, .. } | Self::Exporter { child, .. }) = self;
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Fetches the exporter's page inside the lab's network.
fn scrape(supervisor: u32) {
    let file = std::fs::File::open(format!("/proc/{supervisor}/ns/net")).unwrap();
    let network = Some(rustix::thread::LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), network).unwrap();
    let mut stream = TcpStream::connect("127.0.0.1:9177").unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.contains("libvirt_up 1"), "{page}");
}

fn print_rows(size: usize, rows: &[Row]) {
    println!("\n{size} domains, per collection (one tick), medians of {ROUNDS} rounds");
    println!(
        "{:<36} {:>8} {:>9} {:>11} {:>8} {:>9} {:>13} {:>8} {:>9}",
        "", "wall ms", "client ms", "libvirtd ms", "QEMU ms", "all ms", "µs per domain", "own CPU", "RSS MiB"
    );
    for row in rows {
        let wall = row.median(|c| c.wall_ns);
        println!(
            "{:<36} {:>8.2} {:>9.3} {:>11.3} {:>8.3} {:>9.3} {:>13.1} {:>7.3}% {:>9.1}",
            row.name,
            wall,
            row.median(|c| c.client_ns),
            row.median(|c| c.libvirtd_ns),
            row.median(|c| c.qemu_ns),
            row.total(),
            row.total() * 1e3 / size as f64,
            100.0 * row.median(|c| c.client_ns) / wall,
            row.rss_kib.map_or(f64::NAN, |kib| kib as f64 / 1024.0),
        );
    }
    let find = |name: &str| rows.iter().find(|row| row.name.starts_with(name));
    // Neither asks anybody: what others spend meanwhile is not theirs.
    for ours in ["ours: probes and /proc", "ours: probes and /proc, at 100 ms"] {
        if let (Some(row), Some(peer)) = (find(ours), find("procfs")) {
            let over = row.median(|c| c.client_ns) / peer.median(|c| c.client_ns);
            println!("  {ours}, over procfs (Python), client alone: {over:.3}");
        }
    }
    for (ours, peer) in [
        ("ours: probes, between slow reads", "ceilometer"),
        ("ours: libvirt and /proc", "bulk"),
        ("ours: libvirt and /proc", "ceilometer"),
        ("ours: libvirt and /proc", EXPORTER),
    ] {
        if let (Some(ours), Some(peer)) = (find(ours), find(peer)) {
            println!("  {} over {}: {:.3}", ours.name, peer.name, ours.total() / peer.total());
        }
    }
}

/// Cost per domain at the most domains, over that at fewer.
fn print_slopes(sizes: &[(usize, Vec<(String, f64)>)]) {
    let Some(((most, last), fewer)) = sizes.split_last() else { return };
    for (size, costs) in fewer {
        println!("\ncost per domain at {most} domains over {size}:");
        for (name, now) in last {
            if let Some((_, before)) = costs.iter().find(|(known, _)| known == name) {
                println!("  {name:<36} {:.2}", now / before);
            }
        }
    }
}

// ---- domains by the thousand

fn scale(sizes: &[usize]) {
    let monitor = std::env::var_os("KVM_MONITOR_BIN").expect("KVM_MONITOR_BIN is not set");
    let sizes = if sizes.is_empty() { &[100, 1000, 10_000][..] } else { sizes };
    println!(
        "{:>8} {:>12} {:>15} {:>9} {:>14}",
        "domains", "CPU ms/tick", "µs/domain/tick", "RSS MiB", "KiB per domain"
    );
    let mut first: Option<(usize, u64)> = None;
    for &size in sizes {
        let file = std::env::temp_dir().join(format!("kvm-monitor-scale-{}.xml", std::process::id()));
        std::fs::write(&file, node_xml(size)).unwrap();
        let mut command = Command::new(&monitor);
        // Not `--libvirt require`: to open and describe so many takes longer than a first answer is waited for.
        command.args(["run", "--ebpf", "off", "--interval", "1s", "--connect"]);
        command.arg(format!("test://{}", file.display()));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::with_capacity(1 << 20, child.stdout.take().unwrap()).split(b'\n');
        let mut next_tick = || {
            let mut samples = 0;
            while samples < size {
                let line = lines.next().expect("the stream goes on").unwrap();
                samples += usize::from(line.starts_with(br#"{"type":"sample""#));
            }
        };
        (0..3).for_each(|_| next_tick());
        let before = cpu_ns(child.id());
        const TICKS: u64 = 5;
        (0..TICKS).for_each(|_| next_tick());
        let ms = (cpu_ns(child.id()) - before) as f64 / TICKS as f64 / 1e6;
        let rss = rss_kib(child.id()).unwrap_or(0);
        let (base, base_rss) = *first.get_or_insert((size, rss));
        let each = (rss.saturating_sub(base_rss)) as f64 / (size - base).max(1) as f64;
        println!(
            "{size:>8} {ms:>12.2} {:>15.2} {:>9.1} {each:>14.2}",
            ms * 1e3 / size as f64,
            rss as f64 / 1024.0
        );
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        drop(lines);
        child.wait().unwrap();
        std::fs::remove_file(file).unwrap();
    }
}

/// A node of the test driver.
fn node_xml(domains: usize) -> String {
    let mut xml = String::from("<node>");
    for i in 0..domains {
        let _ = write!(
            xml,
            "<domain type='test'><name>d{i}</name><uuid>00000000-0000-4000-8000-{i:012x}</uuid>
             <memory>1024</memory><vcpu>2</vcpu><os><type>hvm</type></os><devices>
             <disk type='file'><source file='/{i}'/><target dev='vda'/></disk>
             <interface type='bridge'><source bridge='br0'/><target dev='t{i}'/></interface></devices></domain>"
        );
    }
    xml + "</node>"
}

// ---- what the kernel says of processes

fn rss_kib(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?.trim().parse().ok()
}
