//! Loop devices over files in memory, a file system on one of them, and fio making requests in place of QEMU.

#![expect(clippy::unwrap_used, reason = "for tests and benchmarks")]
#![allow(dead_code, reason = "no program uses all of it")]

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use monitor::units::Tgid;
use serde_json::Value;

/// Size of each loop device, MiB.
pub(crate) const MIB: u32 = 96;

/// A loop device over a file in memory, and a file on a file system on another one. All go when this is dropped.
pub(crate) struct Stage {
    directory: PathBuf,
    /// A device for requests.
    pub(crate) device: String,
    /// The device below the file.
    pub(crate) below: String,
    /// A file for requests, [`Stage::FILE_MIB`] large and written.
    pub(crate) file: PathBuf,
}

impl Stage {
    pub(crate) const FILE_MIB: u32 = MIB - 24;

    pub(crate) fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("kvm-monitor-{name}-{}", std::process::id()));
        let memory = directory.join("memory");
        std::fs::create_dir_all(&memory).unwrap();
        let _ = Command::new("modprobe").args(["--quiet", "loop"]).status(); // On a kernel without, losetup says so.
        run("mount", &["-t", "tmpfs", "-o", &format!("size={}m", 2 * MIB + 64), "tmpfs", text(&memory)]);
        let device = loop_device(&memory.join("device"));
        let below = loop_device(&memory.join("below"));
        let mounted = directory.join("mounted");
        std::fs::create_dir_all(&mounted).unwrap();
        // Nobody writes to it later of his own accord, as the kernel does to finish a hasty format.
        run("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=0", &below]);
        run("mount", &["-o", "noatime", &below, text(&mounted)]);
        let file = mounted.join("file");
        std::fs::write(&file, vec![0xa5; (Self::FILE_MIB as usize) << 20]).unwrap();
        run("sync", &["-f", text(&file)]);
        Self { directory, device, below, file }
    }

    /// Where the file system is mounted.
    pub(crate) fn mounted(&self) -> PathBuf {
        self.directory.join("mounted")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for (program, args) in [
            ("umount", vec![text(&self.mounted()).to_owned()]),
            ("losetup", vec!["--detach".to_owned(), self.device.clone()]),
            ("losetup", vec!["--detach".to_owned(), self.below.clone()]),
            // A loop device that somebody still looks at lets go of its file a moment later.
            ("umount", vec!["--lazy".to_owned(), text(&self.directory.join("memory")).to_owned()]),
        ] {
            let _ = Command::new(program).args(args).status();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn loop_device(file: &Path) -> String {
    std::fs::write(file, vec![0; (MIB as usize) << 20]).unwrap();
    let losetup = |options: &[&str]| {
        Command::new("losetup").args(["--find", "--show"]).args(options).arg(file).output().unwrap()
    };
    let mut output = losetup(&["--direct-io=on"]);
    if !output.status.success() {
        output = losetup(&[]); // tmpfs has no direct I/O before Linux 6.6.
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub(crate) fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status();
    assert!(status.is_ok_and(|status| status.success()), "{program} {args:?} failed");
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// fio, which begins when it is told to, so that its process id is known before. Killed when dropped.
pub(crate) struct Fio(Child);

impl Fio {
    /// With more options than those for one job of one process that tells its figures.
    pub(crate) fn prepare(options: &str, on: &Path) -> Self {
        let script = format!(
            "read go; exec fio --name=b --filename={} --thread --group_reporting --output-format=json {options}",
            on.display()
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        Self(shell.spawn().unwrap())
    }

    pub(crate) fn tgid(&self) -> Tgid {
        Tgid(self.0.id())
    }

    /// Lets it begin.
    pub(crate) fn begin(&mut self) {
        self.0.stdin.take().unwrap().write_all(b"\n").unwrap();
    }

    /// What it says of its job at the end.
    pub(crate) fn end(mut self) -> Value {
        let mut output = Vec::new();
        std::io::Read::read_to_end(&mut self.0.stdout.take().unwrap(), &mut output).unwrap();
        assert!(self.0.wait().unwrap().success(), "{}", String::from_utf8_lossy(&output));
        // fio may have something to say before its answer.
        let answer = output.iter().position(|byte| *byte == b'{').unwrap_or_default();
        let mut told: Value = serde_json::from_slice(&output[answer..]).expect("fio's answer");
        told["jobs"][0].take()
    }

    /// Lets it make its requests; what it says of them.
    pub(crate) fn go(mut self) -> Value {
        self.begin();
        self.end()
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads and writes, by what fio says of a job.
pub(crate) fn total_ios(job: &Value) -> u64 {
    ["read", "write"].map(|of| job[of]["total_ios"].as_u64().unwrap()).iter().sum()
}
