//! The real program as somebody without rights starts it: exit codes, what goes to which output, signals, slow and
//! vanished readers, bad input.
//!
//! Needs no network, no libvirtd and no rights: libvirt's `test` driver runs inside the program. What it streams is
//! validated by a program that is not ours. Every wait is for an event; the deadline only ends a test that hangs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt::Write as _,
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use monitor::metric::METRICS;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_kvm-monitor");
const PYTHON: &str = "/usr/bin/python3";
/// Ends what hangs; nothing here takes a tenth of it.
const DEADLINE: Duration = Duration::from_secs(60);
/// A socket that nobody serves.
const NO_LIBVIRT: &str = "qemu+unix:///system?socket=/nonexistent/s";
/// One running domain named `test`; only that one, for a host may run others.
const TEST_DOMAIN: &str = "--connect test:///default --domain test --ebpf off";

/// The program while it runs. Killed after the deadline, or when a test fails before its end.
struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
    stderr: mpsc::Receiver<String>,
    _deadline: mpsc::Sender<()>,
}

/// What a run left.
#[derive(Debug)]
struct Ended {
    status: ExitStatus,
    /// What had not been read before.
    stdout: String,
    stderr: String,
}

/// Splits arguments at white space.
fn words(line: &str) -> Vec<OsString> {
    line.split_whitespace().map(OsString::from).collect()
}

/// Arguments of which the last is a path.
fn with_path(line: &str, path: &Path) -> Vec<OsString> {
    words(line).into_iter().chain([path.into()]).collect()
}

fn run(line: &str) -> Ended {
    start(words(line)).end()
}

fn start(args: impl IntoIterator<Item = OsString>) -> Running {
    let mut command = Command::new(PROGRAM);
    command.args(args);
    start_command(command)
}

fn start_command(mut command: Command) -> Running {
    command.env_remove("KVM_MONITOR_LOG").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let errors = BufReader::new(child.stderr.take().unwrap());
    let (to, stderr) = mpsc::channel();
    thread::spawn(move || errors.lines().map_while(Result::ok).try_for_each(|line| to.send(line)));
    let (_deadline, ended) = mpsc::channel::<()>();
    let process = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
    thread::spawn(move || {
        if ended.recv_timeout(DEADLINE) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
        }
    });
    Running { child, stdout, stderr, _deadline }
}

impl Running {
    /// The next line of standard output.
    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}, stderr: {}", self.stderr()))
    }

    /// Waits until a line of standard error contains `text`.
    fn logged(&self, text: &str) {
        let mut others = Vec::new();
        for line in &self.stderr {
            if line.contains(text) {
                return;
            }
            others.push(line);
        }
        panic!("ended without {text:?} on standard error: {others:#?}");
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// What is on standard error from here to the end of the program.
    fn stderr(&self) -> String {
        self.stderr.iter().map(|line| line + "\n").collect()
    }

    fn end(mut self) -> Ended {
        let mut stdout = String::new();
        self.stdout.read_to_string(&mut stdout).unwrap();
        let stderr = self.stderr();
        let status = self.child.wait().unwrap();
        Ended { status, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Exit 0 with nothing to complain about.
    #[track_caller]
    fn fine(self) -> Self {
        assert_eq!((self.code(), self.stderr.as_str()), (Some(0), ""), "{self:?}");
        self
    }

    /// Exit 2, nothing on standard output, and an error whose first line says all of `parts`.
    #[track_caller]
    fn refused(self, parts: &[&str]) -> Self {
        assert_eq!((self.code(), self.stdout.as_str()), (Some(2), ""), "{self:?}");
        let first = self.stderr.lines().next().unwrap_or_default();
        assert!(first.to_lowercase().starts_with("error"), "{self:?}");
        for part in parts {
            assert!(first.contains(part), "{part:?} is not in {first:?}");
        }
        self
    }

    /// As [`Ended::refused`], in one line.
    #[track_caller]
    fn refused_in_one_line(self, parts: &[&str]) {
        let this = self.refused(parts);
        assert_eq!(this.stderr.lines().count(), 1, "{}", this.stderr);
    }

    #[track_caller]
    fn lines(&self) -> Vec<Value> {
        parse(&self.stdout)
    }
}

/// Lines of JSON, each whole and ended.
#[track_caller]
fn parse(text: &str) -> Vec<Value> {
    assert!(text.is_empty() || text.ends_with('\n'), "the last line is cut: {:?}", text.lines().last());
    let line = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
    text.split_terminator('\n').map(line).collect()
}

fn of_type<'a>(lines: &'a [Value], name: &'a str) -> impl Iterator<Item = &'a Value> {
    lines.iter().filter(move |line| line["type"] == name)
}

/// The order of DESIGN.md section 4, and a summary that counts what was written.
#[track_caller]
fn check_stream(lines: &[Value]) {
    let types: Vec<&str> = lines.iter().map(|line| line["type"].as_str().unwrap()).collect();
    assert_eq!((types.first(), types.last()), (Some(&"session"), Some(&"summary")), "{types:?}");
    let summary = lines.last().unwrap();
    for name in ["session", "domain", "sample", "event", "health", "summary"] {
        let counted = types.iter().filter(|t| **t == name).count();
        let told = summary["records"].get(name).map_or(0, |n| n.as_u64().unwrap());
        let expected = if name == "summary" { 0 } else { counted as u64 };
        assert_eq!(told, expected, "{name} in {summary}");
    }
    for line in lines {
        assert!(!has_null(line), "{line}");
    }
}

fn has_null(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.iter().any(has_null),
        Value::Object(map) => map.values().any(has_null),
        _ => false,
    }
}

/// A directory of a test; gone with its end.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("kvm-monitor-cli-{}-{number}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    /// A host of libvirt's test driver with these domains, as arguments of the program.
    fn host(&self, domains: &str) -> String {
        let path = self.0.join("host.xml");
        let text = format!(
            "<node><cpu><mhz>2000</mhz><model>x</model><active>4</active><nodes>1</nodes><sockets>1</sockets>\
             <cores>4</cores><threads>1</threads></cpu><memory>33554432</memory>{domains}</node>"
        );
        fs::write(&path, text).unwrap();
        format!("--ebpf off --connect test://{}", path.display())
    }

    /// As [`Dir::host`] with so many domains, and the arguments to watch them alone.
    fn host_of(&self, count: usize, name: impl Fn(usize) -> String) -> (String, String) {
        let (mut domains, mut wanted) = (String::new(), String::new());
        for i in 0..count {
            let (name, uuid) = (name(i), uuid(i));
            let _ = write!(
                domains,
                "<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory>1024</memory><vcpu>1</vcpu>\
                 <os><type>hvm</type></os></domain>"
            );
            let _ = write!(wanted, " --domain {uuid}");
        }
        (self.host(&domains), wanted)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn uuid(number: usize) -> String {
    format!("11111111-1111-4111-8111-{number:012}")
}

/// What Python's `jsonschema` finds wrong with each line; panics if it finds the schema wrong.
fn validate(lines: &[impl AsRef<str>]) -> Vec<Option<String>> {
    let schema: Value = serde_json::from_str(&run("schema").fine().stdout).unwrap();
    let lines: Vec<&str> = lines.iter().map(AsRef::as_ref).collect();
    let mut python = Command::new(PYTHON)
        .args(["-c", include_str!("fixtures/validate.py")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start {PYTHON}: {e}; `cargo xtask setup` installs it"));
    let task = json!({ "schema": schema, "lines": lines }).to_string();
    // If it ends before it has read all, it says why on its standard error.
    let _ = python.stdin.take().unwrap().write_all(task.as_bytes());
    let output = python.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the validator failed (is python3-jsonschema installed?): {said}");
    let verdicts: Vec<Option<String>> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(verdicts.len(), lines.len());
    verdicts
}

#[track_caller]
fn all_valid(text: &str) {
    let lines: Vec<&str> = text.split_terminator('\n').collect();
    assert!(!lines.is_empty(), "nothing to validate");
    for (line, verdict) in lines.iter().zip(validate(&lines)) {
        assert_eq!(verdict, None, "{line}");
    }
}

fn golden() -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|e| e == "ndjson")).collect();
    files.sort();
    files.iter().map(|path| fs::read_to_string(path).unwrap()).collect()
}

/// The program without any capability, whoever runs the test.
fn without_capabilities() -> Command {
    if !rustix::process::geteuid().is_root() {
        return Command::new(PROGRAM);
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", PROGRAM]);
    command
}

fn run_without_capabilities(line: &str) -> Ended {
    let mut command = without_capabilities();
    command.args(words(line));
    start_command(command).end()
}

/// What stands in the way of kernel probes first, where there are no capabilities.
fn probe_obstacles() -> &'static [&'static str] {
    if !cfg!(feature = "ebpf") {
        &["built without kernel probes", "cargo xtask build"]
    } else if File::open("/sys/kernel/btf/vmlinux").is_err() {
        &["/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF"]
    } else {
        &["no permission", "CAP_BPF", "CAP_PERFMON"]
    }
}

#[test]
fn bad_usage_is_refused_with_cause_and_fix() {
    for (line, cause, fix) in [
        ("--no-such-option", "'--no-such-option'", "--help"),
        ("run --no-such-option", "'--no-such-option'", "--help"),
        ("no-such-command", "'no-such-command'", "--help"),
        ("run --interval abc", "'abc' for '--interval", "for example 500ms"),
        ("run --interval 5", "'5' for '--interval", "for example 500ms"),
        ("run --interval -1s", "'-1'", "--help"),
        ("run --interval 0s", "'0s' for '--interval", "longer than 0"),
        ("run --interval 9ms", "--interval 9ms", "10ms is the least"),
        ("run --interval 500000000000y", "'--interval", "100 years at most"),
        ("run --libvirt-interval 500000000000y", "'--libvirt-interval", "100 years at most"),
        ("run --duration 1x", "'1x' for '--duration", "for example 500ms"),
        ("run --duration 0s", "'0s' for '--duration", "longer than 0"),
        ("run --duration 500000000000y", "'--duration", "100 years at most"),
        ("run --ebpf maybe", "'maybe' for '--ebpf", "[possible values: auto, off, require]"),
        ("run --probes sched,nonsense", "'nonsense' for '--probes", "[possible values: sched"),
        ("run --ebpf off --probes sched", "--probes and --ebpf off contradict", "leave out one"),
        ("list --format xml", "'xml' for '--format", "[possible values: text, json]"),
        ("schema --format xml", "'xml' for '--format", "[possible values: json, markdown, equivalents]"),
    ] {
        let ended = run(line).refused(&[cause]);
        assert!(ended.stderr.contains(fix), "{line}: {fix:?} is not in {}", ended.stderr);
    }
}

#[test]
fn a_domain_that_does_not_exist_is_refused() {
    for command in ["run", "list"] {
        let line = format!("{command} --connect test:///default --ebpf off --domain");
        for domain in ["nosuch", "11111111-1111-4111-8111-111111111111", "a\u{1b}[31mb\u{202e}"] {
            let ended = start(with_path(&line, Path::new(domain))).end();
            assert!(!ended.stderr.chars().any(|c| c != '\n' && monitor::is_disruptive(c)), "{ended:?}");
            let shown = monitor::visible(domain);
            ended.refused_in_one_line(&["no domain", &shown, "`kvm-monitor list`"]);
        }
    }
}

#[test]
fn libvirt_that_is_required_and_not_there_is_refused() {
    for command in ["run", "list"] {
        let line = format!("{command} --ebpf off --libvirt require --connect {NO_LIBVIRT}");
        run(&line).refused_in_one_line(&["--libvirt require", "/nonexistent/s", "start it"]);
    }
    for command in ["run", "list"] {
        let line = format!("{command} --ebpf off --domain nosuch --connect {NO_LIBVIRT}");
        run(&line).refused_in_one_line(&["no domain \"nosuch\"", "/proc", "/nonexistent/s", "start it"]);
    }
    let ended = run(&format!("list --libvirt require --connect {NO_LIBVIRT}"));
    assert_eq!(ended.stderr.matches("Failed to connect").count(), 1, "said once: {}", ended.stderr);
    run("run --ebpf off --libvirt require --connect nosuch:///x")
        .refused_in_one_line(&["unknown connection URI nosuch:///x", "qemu:///system"]);
    let check = run(&format!("check --ebpf off --libvirt require --connect {NO_LIBVIRT}"));
    assert_eq!(check.code(), Some(2), "{check:?}");
    assert!(check.stdout.contains("/nonexistent/s"), "{check:?}");
}

#[test]
fn without_libvirt_auto_goes_on_and_says_why() {
    let ended = run(&format!("run --ebpf off --duration 10ms --interval 10ms --connect {NO_LIBVIRT}"));
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "one warning: {}", ended.stderr);
    let lines = ended.lines();
    check_stream(&lines);
    let sources = &lines[0]["sources"];
    assert_eq!(sources["libvirt"]["available"], false);
    let reason = sources["libvirt"]["reason"].as_str().unwrap();
    for part in ["/nonexistent/s", "No such file or directory", "systemctl start"] {
        assert!(reason.contains(part), "{part:?} is not in {reason:?}");
    }
    assert_eq!(sources["procfs"], json!({ "available": true, "details": {} }));

    let listed = run(&format!("list --connect {NO_LIBVIRT}"));
    assert_eq!((listed.code(), listed.stderr.lines().count()), (Some(0), 1), "{listed:?}");
    assert!(listed.stderr.contains("listing what /proc shows"), "{listed:?}");
}

#[test]
fn what_is_switched_off_is_not_warned_of() {
    let lines = run("run --ebpf off --libvirt off --interval 10ms --duration 10ms").fine().lines();
    check_stream(&lines);
    for source in ["ebpf", "libvirt"] {
        let expected =
            json!({ "available": false, "reason": format!("switched off by --{source} off"), "details": {} });
        assert_eq!(lines[0]["sources"][source], expected);
    }
}

#[test]
fn without_capabilities_probes_are_refused_if_required_and_named_if_not() {
    let parts = [&["--ebpf require"], probe_obstacles()].concat();
    run_without_capabilities("run --libvirt off --ebpf require").refused_in_one_line(&parts);

    let ended = run_without_capabilities("run --libvirt off --ebpf auto --interval 10ms --duration 10ms");
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    let lines = ended.lines();
    check_stream(&lines);
    let ebpf = &lines[0]["sources"]["ebpf"];
    assert_eq!(ebpf["available"], false);
    for part in probe_obstacles() {
        assert!(ebpf["reason"].as_str().unwrap().contains(part), "{part:?} is not in {ebpf}");
    }
    let probes = lines[0]["probes"].as_array().unwrap();
    assert!(!probes.is_empty());
    assert!(probes.iter().all(|p| p["state"] == "off" && p["reason"] == ebpf["reason"]), "{probes:?}");
}

#[test]
fn a_stream_is_complete_and_in_order() {
    let line = format!("run {TEST_DOMAIN} --interval 20ms --libvirt-interval 20ms --duration 200ms");
    let lines = run(&line).fine().lines();
    check_stream(&lines);
    let types: Vec<&str> = lines.iter().map(|line| line["type"].as_str().unwrap()).collect();
    let samples: Vec<&Value> = of_type(&lines, "sample").collect();
    let expected = [vec!["session", "domain"], vec!["sample"; samples.len()], vec!["health", "summary"]];
    assert_eq!(types, expected.concat());

    let (session, summary) = (&lines[0], lines.last().unwrap());
    assert_eq!(session["schema_version"], 1);
    assert_eq!(session["interval_ns"], 20_000_000);
    assert_eq!(session["sources"]["libvirt"]["details"]["uri"], "test:///default");
    assert_eq!(summary["ticks"], samples.len());
    assert_eq!(summary["records_dropped"], 0);
    assert_eq!(summary["reason"], "the time given by --duration is over");
    assert!(summary["wall_ns"].as_u64().unwrap() >= 200_000_000, "{summary}");
    for (i, pair) in samples.windows(2).enumerate() {
        assert_eq!((&pair[0]["seq"], &pair[1]["seq"]), (&json!(i), &json!(i + 1)));
        let moment = |sample: &Value| sample["mono_ns"].as_u64().unwrap();
        assert_eq!(pair[1]["interval_ns"], moment(pair[1]) - moment(pair[0]));
        assert_eq!(pair[0]["domain"], pair[1]["domain"]);
    }
}

#[test]
fn what_a_source_does_not_tell_is_absent() {
    let line = format!("run {TEST_DOMAIN} --interval 20ms --duration 20ms");
    let lines = run(&line).fine().lines();
    let domain = &of_type(&lines, "domain").next().unwrap()["domain"];
    for key in ["pid", "pid_start_time", "title", "metadata"] {
        assert_eq!(domain.get(key), None, "{domain}");
    }
    assert_eq!(domain["vcpus"], json!([{ "vcpu": 0 }, { "vcpu": 1 }]));
    // The test driver tells the state and no number.
    let sample = of_type(&lines, "sample").next().unwrap();
    let windows: Vec<&String> = sample["windows"].as_object().unwrap().keys().collect();
    assert_eq!(windows, ["libvirt"]);
    assert_eq!(sample["cpu"], json!({}));
    assert_eq!(sample["vcpus"], json!([{ "vcpu": 0 }, { "vcpu": 1 }]));
    assert_eq!(sample["interfaces"], json!([{ "device": "testnet0", "mac": "aa:bb:cc:dd:ee:ff" }]));
    assert_eq!(sample["disks"], json!([{ "target": "vda" }]));
    assert_eq!(sample["memory"], json!({}));
}

#[test]
fn every_line_validates() {
    all_valid(&run(&format!("run {TEST_DOMAIN} --interval 20ms --duration 60ms")).fine().stdout);
    for uri in ["test:///default", NO_LIBVIRT] {
        all_valid(
            &run_without_capabilities(&format!("run --interval 20ms --duration 60ms --connect {uri}")).stdout,
        );
    }
    all_valid(&run("list --format json --connect test:///default").fine().stdout);
    all_valid(&golden());
}

#[test]
fn what_breaks_the_schema_is_found() {
    let golden = golden();
    let lines: Vec<&str> = golden.split_terminator('\n').collect();
    let full = |start: &str| *lines.iter().find(|l| l.starts_with(start) && l.contains("per_s")).unwrap();
    let any = |start: &str| *lines.iter().find(|l| l.starts_with(start)).unwrap();
    let (sample, domain) = (full(r#"{"type":"sample""#), any(r#"{"type":"domain""#));
    let (event, summary) = (any(r#"{"type":"event""#), any(r#"{"type":"summary""#));
    // The line, what is done to it, where (`""` is the whole line), with what.
    let mut doctored = vec![sample.to_owned(), domain.to_owned(), event.to_owned(), summary.to_owned()];
    let untouched = doctored.len();
    for (line, at, key, value) in [
        (sample, "/vcpus/0/run_ns", "ebpf", json!("12")),
        (sample, "/vcpus/0/run_ns", "ebpf", json!(1.5)),
        (sample, "/vcpus/0/run_ns", "ebpf", json!(-1)),
        (sample, "/vcpus/0/run_ns", "ebpf", Value::Null),
        (sample, "/vcpus/0/run_ns", "guess", json!(1)),
        (sample, "/vcpus/0/run_ns", "best", json!("guess")),
        (sample, "/vcpus/0/run_ns", "per_s", json!(-0.5)),
        (sample, "/vcpus/0", "run_time", json!({ "ebpf": 1, "best": "ebpf" })),
        (sample, "/vcpus/0", "run_ns", json!(12)),
        (sample, "/vcpus/0", "run_ns", json!({})),
        (sample, "/memory", "rss_bytes", json!({ "procfs": 1, "best": "procfs", "per_s": 1 })),
        (sample, "/cpu", "vcpu", json!(0)),
        (sample, "/windows", "libvirt", json!([1])),
        (sample, "/windows", "guess", json!([1, 2])),
        (sample, "/domain", "id", json!(1)),
        (sample, "", "interval_ns", json!("1s")),
        (sample, "", "seq", Value::Null),
        (sample, "", "extra", json!(1)),
        (sample, "", "type", json!("sampel")),
        (sample, "", "type", json!("domain")),
        (domain, "/domain", "id", Value::Null),
        (domain, "/domain", "pid", json!("7")),
        (domain, "/domain", "extra", json!(1)),
        (domain, "/domain/memory", "max_kib", json!(1)),
        (domain, "", "change", json!("vanished")),
        (event, "", "kind", json!("surprise")),
        (summary, "/records", "sample", json!(-1)),
        (summary, "", "ticks", json!(true)),
    ] {
        let mut line: Value = serde_json::from_str(line).unwrap();
        line.pointer_mut(at).unwrap()[key] = value;
        doctored.push(line.to_string());
    }
    for (line, key) in
        [(sample, "type"), (sample, "seq"), (sample, "windows"), (domain, "domain"), (summary, "ticks")]
    {
        let mut line: Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove(key).unwrap();
        doctored.push(line.to_string());
    }
    doctored.extend([sample[..sample.len() - 1].to_owned(), "[]".to_owned(), String::new()]);
    for (i, (line, verdict)) in doctored.iter().zip(validate(&doctored)).enumerate() {
        assert_eq!(verdict.is_none(), i < untouched, "{verdict:?} about {line}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut running = start(words(&format!("run {TEST_DOMAIN} --interval 10ms")));
    assert_eq!(running.line()["type"], "session");
    close_stdout(running).fine();
    for line in ["schema", "schema --format markdown", "list --connect test:///default", "--help"] {
        close_stdout(start(words(line))).fine();
    }
}

/// Drops the reading end of the program's standard output and waits for the program.
fn close_stdout(mut running: Running) -> Ended {
    let mut other = Command::new("true").stdout(Stdio::piped()).spawn().unwrap();
    running.stdout = BufReader::new(other.stdout.take().unwrap());
    other.wait().unwrap();
    running.end()
}

#[test]
fn an_output_that_cannot_be_written_is_refused_by_name() {
    let dir = Dir::new();
    let closed = dir.0.join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o500)).unwrap();
    for (output, cause) in [
        (PathBuf::from("/dev/full"), "No space left on device"),
        (dir.0.clone(), "Is a directory"),
        (dir.0.join("none/stream"), "No such file or directory"),
        (closed.join("stream"), "Permission denied"),
    ] {
        let mut command = without_capabilities();
        command.args(with_path(&format!("run {TEST_DOMAIN} --interval 10ms --output"), &output));
        start_command(command).end().refused_in_one_line(&[output.to_str().unwrap(), cause]);
    }
    for line in [&format!("run {TEST_DOMAIN} --interval 10ms"), "schema", "list --connect test:///default"] {
        let mut command = Command::new("sh");
        command.args(["-c", r#"exec "$@" > /dev/full"#, "sh", PROGRAM]).args(words(line));
        start_command(command).end().refused_in_one_line(&["standard output", "No space left on device"]);
    }
}

#[test]
fn a_stream_goes_to_a_file() {
    let dir = Dir::new();
    let path = dir.0.join("stream.ndjson");
    fs::write(&path, "what was there before\n".repeat(1000)).unwrap();
    let line = format!("run {TEST_DOMAIN} --interval 20ms --duration 60ms --output");
    assert_eq!(start(with_path(&line, &path)).end().fine().stdout, "");
    check_stream(&parse(&fs::read_to_string(&path).unwrap()));
}

#[test]
fn a_signal_ends_the_stream_with_its_summary() {
    for (signal, name) in [(Signal::INT, "SIGINT"), (Signal::TERM, "SIGTERM"), (Signal::HUP, "SIGHUP")] {
        let mut running = start(words(&format!("run {TEST_DOMAIN} --interval 10ms")));
        let mut lines = Vec::new();
        while lines.last().is_none_or(|line: &Value| line["type"] != "sample") {
            lines.push(running.line());
        }
        running.signal(signal);
        lines.extend(running.end().fine().lines());
        check_stream(&lines);
        assert_eq!(lines.last().unwrap()["reason"], name);
    }
}

/// Reads nothing but the first line, until the program has logged so many ticks; then interrupts it and reads on.
fn read_late((host, wanted): (String, String), ticks: usize) -> Vec<Value> {
    let mut running = start(words(&format!("run -vv {host} {wanted} --interval 10ms")));
    let mut lines = vec![running.line()];
    for _ in 0..ticks {
        running.logged(" tick ");
    }
    running.signal(Signal::INT);
    let ended = running.end();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    lines.extend(ended.lines());
    check_stream(&lines);
    lines
}

#[test]
fn a_slow_reader_does_not_stop_ticks() {
    let dir = Dir::new();
    // 30 kB a tick: a pipe holds two ticks, the program's queue all of them.
    let lines = read_late(dir.host_of(100, |i| format!("d{i}")), 50);
    let summary = lines.last().unwrap();
    let ticks = summary["ticks"].as_u64().unwrap();
    assert!(ticks >= 50, "{summary}");
    assert_eq!(summary["records_dropped"], 0);
    let samples: Vec<&Value> = of_type(&lines, "sample").collect();
    assert_eq!(samples.len() as u64, 100 * ticks);
    for (i, sample) in samples.iter().enumerate() {
        assert_eq!(sample["seq"], i / 100);
    }
}

#[test]
fn a_reader_that_is_too_slow_loses_samples_and_is_told_how_many() {
    let dir = Dir::new();
    // 200 kB a tick: the queue is full after 40.
    let lines = read_late(dir.host_of(50, |i| format!("d{i}{}", "x".repeat(4000))), 100);
    let summary = lines.last().unwrap();
    let dropped = summary["records_dropped"].as_u64().unwrap();
    assert!(dropped > 0, "{summary}");
    let samples = of_type(&lines, "sample").count() as u64;
    assert_eq!(samples + dropped, 50 * summary["ticks"].as_u64().unwrap(), "only samples are dropped");
    assert_eq!(of_type(&lines, "domain").count(), 50);
}

#[test]
fn a_thousand_domains() {
    let dir = Dir::new();
    let (host, _) = dir.host_of(1000, |i| format!("d{i}"));
    let uuids: Vec<String> = (0..1000).map(uuid).collect();
    let mut running = start(words(&format!("run {host} --interval 50ms")));
    // libvirt may answer after the first ticks, so the end is when the last has its second sample.
    let mut lines = Vec::new();
    let is_end = |line: &Value| line["seq"] == 1 && line["domain"]["uuid"] == uuids[999];
    while lines.last().is_none_or(|line| !is_end(line)) {
        lines.push(running.line());
    }
    running.signal(Signal::INT);
    lines.extend(running.end().lines());
    check_stream(&lines);
    assert_eq!(lines.last().unwrap()["records_dropped"], 0);
    let mut samples: BTreeMap<&str, u64> = BTreeMap::new();
    for sample in of_type(&lines, "sample") {
        let seen = samples.entry(sample["domain"]["uuid"].as_str().unwrap()).or_default();
        assert_eq!(sample["seq"], *seen);
        *seen += 1;
    }
    for uuid in &uuids {
        assert!(samples[uuid.as_str()] >= 2, "{uuid}");
        assert_eq!(of_type(&lines, "domain").filter(|l| l["domain"]["uuid"] == **uuid).count(), 1);
    }
}

/// Text that steers a terminal, ends a line or pretends to be one, as far as libvirt lets it into a domain.
const HOSTILE: &str = r#"
    <domain type="test">
      <name>a&#x9b;31m"b\te&lt;&#x202e;&#x2028;&#x7f;&#9;</name>
      <uuid>11111111-1111-4111-8111-000000000000</uuid>
      <title>&#x85;&#x2029;{"type":"summary"}</title>
      <metadata>
        <n:instance xmlns:n="http://openstack.org/xmlns/libvirt/nova/1.1"><n:name>&#10;{"type":"summary"}&#10;</n:name></n:instance>
      </metadata>
      <memory>1024</memory>
      <vcpu>1</vcpu>
      <os><type>hvm</type></os>
      <devices>
        <disk type="file"><source file="/a&#10;&#x9b;31m"/><target dev="vda"/><serial>&#x2066;</serial></disk>
        <interface type="bridge">
          <mac address="52:54:00:00:00:01"/><source bridge="b&#x9b;"/><target dev="t&#x9b;&#10;"/>
        </interface>
      </devices>
    </domain>"#;

#[test]
fn text_of_tenants_neither_reaches_the_terminal_nor_breaks_a_line() {
    let dir = Dir::new();
    let host = dir.host(HOSTILE) + " --domain " + &uuid(0);
    let list = run(&format!("list {host}")).fine().stdout;
    let json = run(&format!("list --format json {host}")).fine().stdout;
    let stream = run(&format!("run {host} --interval 20ms --duration 20ms")).fine().stdout;
    for text in [&list, &json, &stream] {
        let raw = text.chars().find(|c| *c != '\n' && monitor::is_disruptive(*c));
        assert_eq!(raw, None, "{text:?}");
    }
    assert!(list.starts_with(r#"a\u{9b}31m"b\te<\u{202e}\u{2028}\u{7f}\t  "#), "{list}");
    assert_eq!(list.lines().count(), 5, "{list}");
    let lines = parse(&stream);
    check_stream(&lines);
    all_valid(&(json.clone() + &stream));
    for domain in [&parse(&json)[0], of_type(&lines, "domain").next().unwrap()] {
        let domain = &domain["domain"];
        assert_eq!(domain["name"], "a\u{9b}31m\"b\\te<\u{202e}\u{2028}\u{7f}\t");
        assert_eq!(domain["title"], "\u{85}\u{2029}{\"type\":\"summary\"}");
        let name = domain["metadata"]["instance_name"].as_str().unwrap();
        assert_eq!(name.trim(), r#"{"type":"summary"}"#);
    }
    let mut chosen = words("list --ebpf off --domain");
    chosen.push("a\u{9b}31m\"b\\te<\u{202e}\u{2028}\u{7f}\t".into());
    chosen.extend(words(&format!("--connect test://{}", dir.0.join("host.xml").display())));
    assert_eq!(start(chosen).end().fine().stdout, list, "a domain is found by any name it has");
}

#[test]
fn list_shows_domains_as_text_and_as_lines() {
    let text = run("list --connect test:///default --domain test").fine().stdout;
    for part in
        ["test  6695eb01-f6a4-8304-79aa-97f2502e193f  (running)", "found by libvirt", "testnet0", "disk vda"]
    {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let by_uuid = run("list --connect test:///default --domain 6695EB01F6A4830479AA97F2502E193F");
    assert_eq!(by_uuid.fine().stdout, text);
    let lines = run("list --format json --connect test:///default --domain test").fine().lines();
    let [line] = lines.as_slice() else { panic!("{lines:?}") };
    assert_eq!((&line["type"], &line["domain"]["name"]), (&json!("domain"), &json!("test")));
}

#[test]
fn check_says_what_each_source_can_do() {
    let says = |report: &str, name: &str| {
        report.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{report}")).to_owned()
    };
    let report = run_without_capabilities(&format!("check --connect {NO_LIBVIRT}")).fine().stdout;
    for part in probe_obstacles() {
        assert!(says(&report, "ebpf ").contains(part), "{part:?} is not in {report}");
    }
    assert!(says(&report, "procfs ").contains(" yes "), "{report}");
    let report = run("check --connect test:///default").fine().stdout;
    assert!(says(&report, "libvirt ").contains("yes  test:///default answers"), "{report}");
    for host in ["ebpf ", "procfs "] {
        assert!(says(&report, host).contains("test driver"), "{report}");
    }

    let report = run(&format!("check --ebpf off --connect {NO_LIBVIRT}")).fine().stdout;
    assert!(report.contains("/nonexistent/s") && report.contains("systemctl start"), "{report}");
    assert_eq!(report.matches("Failed to connect").count(), 1, "said once: {report}");
    let report = run("check --ebpf off --libvirt off").fine().stdout;
    assert_eq!(report.matches("switched off").count(), 2, "{report}");
}

/// Their kernel is another one: what has their names here is something else.
#[test]
fn domains_elsewhere_are_libvirts_alone() {
    let ended = run("run --connect test:///default --interval 10ms --duration 50ms");
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    let session: Value = serde_json::from_str(ended.stdout.lines().next().unwrap()).unwrap();
    for source in ["ebpf", "procfs"] {
        let told = &session["sources"][source];
        assert_eq!(told["available"], false, "{told}");
        assert!(told["reason"].as_str().unwrap().contains("test driver"), "{told}");
    }
    assert_eq!(session["sources"]["libvirt"]["available"], true);
    let line = "run --connect qemu+ssh://nobody@host.invalid/system --ebpf require --interval 10ms";
    run(line).refused(&["--ebpf require", "host.invalid", "run kvm-monitor there"]);
}

#[test]
fn schema_help_and_version() {
    let schema: Value = serde_json::from_str(&run("schema").fine().stdout).unwrap();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    let table = run("schema --format markdown").fine().stdout;
    assert_eq!(table.lines().count(), METRICS.len() + 2, "{table}");
    for def in METRICS {
        assert!(table.contains(&format!("| `{}` | `{}` |", def.scope.key(), def.name)), "{}", def.name);
    }
    assert_eq!(run("--version").fine().stdout, concat!("kvm-monitor ", env!("CARGO_PKG_VERSION"), "\n"));
    let help = run("--help").fine().stdout;
    for command in ["run", "list", "check", "schema"] {
        assert!(help.contains(&format!("\n  {command} ")), "{help}");
        assert!(run(&format!("{command} --help")).fine().stdout.contains("Usage: kvm-monitor"), "{command}");
    }
    let run_help = run("run --help").fine().stdout;
    for option in [
        "--connect",
        "--domain",
        "--interval",
        "--libvirt-interval",
        "--libvirt-slow-interval",
        "--duration",
        "--ebpf",
        "--libvirt",
        "--probes",
        "--output",
    ] {
        assert!(run_help.contains(&format!("{option} <")), "{option}: {run_help}");
    }
}
