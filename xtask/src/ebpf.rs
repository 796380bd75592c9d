//! Building the kernel side: which compiler and linker, and the object itself.
//!
//! Two routes lead there. *rustup*: the toolchain that `rust-toolchain.toml` pins, with its source, and a linker
//! that borrows the compiler's own LLVM. *distro*: the distribution's compiler, source and LLVM, and a linker built
//! on that LLVM. The first that works is taken; each says what failed, and only then is the next one tried.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, bail, ensure};

use crate::{apt, elf, paths, process};

const TARGET: &str = "bpfel-unknown-none";
/// Environment variable that allows one route only.
const ROUTE_VARIABLE: &str = "KVM_MONITOR_BPF_ROUTE";
/// The release whose default is the LLVM of the pinned compiler.
const RUSTUP_LINKER: &str = "0.10.3";
/// The release that can be built on a distribution's LLVM.
const DISTRO_LINKER: &str = "0.13.0";
/// What the distro route needs on Debian.
pub(crate) const DISTRO_PACKAGES: [&str; 5] =
    ["rustc-web", "cargo-web", "rust-web-src", "llvm-22-dev", "g++"];

/// A way to a BPF compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// The pinned toolchain of rustup.
    Rustup,
    /// The distribution's packages.
    Distro,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rustup => "rustup",
            Self::Distro => "distro",
        })
    }
}

/// A compiler with the source of its `core`.
struct Compiler {
    route: Route,
    /// Holds `bin/cargo`, `bin/rustc` and `lib`.
    prefix: PathBuf,
    /// Major version of the LLVM inside.
    llvm: u32,
}

/// Everything needed to build for BPF.
pub(crate) struct Toolchain {
    compiler: Compiler,
    linker: PathBuf,
}

/// Why there is no object.
enum Broken {
    /// The compiler or linker could not be had, or does not work: another route may.
    Route(anyhow::Error),
    /// Our own code does not compile: no other route would help.
    Source(anyhow::Error),
}

/// Builds the BPF object if it is not up to date, once per run, and returns its path.
pub(crate) fn build_ebpf() -> Result<PathBuf> {
    static OBJECT: OnceLock<PathBuf> = OnceLock::new();
    match OBJECT.get() {
        Some(object) => Ok(object.clone()),
        None => try_routes(build_by).map(|object| OBJECT.get_or_init(|| object).clone()),
    }
}

/// A toolchain for BPF, prepared if need be.
pub(crate) fn toolchain() -> Result<Toolchain> {
    try_routes(|route| prepare(route).map_err(Broken::Route))
}

/// The toolchain that would be used, if nothing has to be prepared for it.
pub(crate) fn ready() -> Option<Toolchain> {
    routes().ok()?.into_iter().find_map(|route| {
        let compiler = Compiler::find(route).ok()?;
        let linker = compiler.linker();
        process::is_executable(&linker).then_some(Toolchain { compiler, linker })
    })
}

fn routes() -> Result<Vec<Route>> {
    let forced = env::var(ROUTE_VARIABLE).unwrap_or_default();
    match forced.as_str() {
        "" => Ok(vec![Route::Rustup, Route::Distro]),
        "rustup" => Ok(vec![Route::Rustup]),
        "distro" => Ok(vec![Route::Distro]),
        other => bail!("{ROUTE_VARIABLE} is `{other}`: it must be `rustup` or `distro`"),
    }
}

fn try_routes<T>(attempt: impl Fn(Route) -> Result<T, Broken>) -> Result<T> {
    let mut reasons = Vec::new();
    for route in routes()? {
        match attempt(route) {
            Ok(value) => return Ok(value),
            Err(Broken::Source(error)) => return Err(error),
            Err(Broken::Route(error)) => {
                eprintln!("the {route} route to a BPF compiler does not work: {error:#}");
                reasons.push(format!("by the {route} route: {error:#}"));
            }
        }
    }
    bail!("no compiler for BPF works on this machine\n  {}", reasons.join("\n  "))
}

fn prepare(route: Route) -> Result<Toolchain> {
    let compiler = match Compiler::find(route) {
        Ok(compiler) => compiler,
        Err(missing) => {
            eprintln!("preparing the {route} route to a BPF compiler: {missing:#}");
            install_compiler(route).with_context(|| missing.to_string())?;
            Compiler::find(route)?
        }
    };
    let linker = compiler.linker();
    if !process::is_executable(&linker) {
        compiler.install_linker()?;
    }
    Ok(Toolchain { compiler, linker })
}

fn install_compiler(route: Route) -> Result<()> {
    if route == Route::Distro {
        return apt::install(&DISTRO_PACKAGES, apt::Conflicts::Keep);
    }
    let channel = pinned_channel()?;
    let rustup = process::find_program("rustup").context("installing it needs rustup")?;
    // Installs what is missing of both; what is there is left as it is.
    let arguments = ["toolchain", "install", &channel, "--profile", "minimal", "--no-self-update"];
    let components = ["--component", "rust-src,rustfmt,clippy"];
    process::run_tailed(Command::new(rustup).args(arguments).args(components))
}

impl Compiler {
    fn find(route: Route) -> Result<Self> {
        let prefix = match route {
            Route::Rustup => rustup_prefix()?,
            Route::Distro => distro_prefix()?,
        };
        let source = prefix.join("lib/rustlib/src/rust/library/core/src/lib.rs");
        ensure!(source.exists(), "the source of `core` (rust-src) is missing: no {}", source.display());
        let cargo = prefix.join("bin/cargo");
        ensure!(process::is_executable(&cargo), "no {}", cargo.display());
        let version = process::output(Command::new(prefix.join("bin/rustc")).arg("-vV"))?;
        let compiler = Self { route, prefix, llvm: llvm_major(&version)? };
        ensure!(
            route == Route::Rustup || release(&version)? >= minimum_release()?,
            "{} is older than the workspace's rust-version",
            version.lines().next().unwrap_or_default()
        );
        if route == Route::Distro {
            compiler.llvm_prefix()?;
        }
        Ok(compiler)
    }

    /// Where this compiler's linker is, once installed. The name says all that decides whether it fits.
    fn linker(&self) -> PathBuf {
        self.linker_root().join("bin/bpf-linker")
    }

    fn linker_root(&self) -> PathBuf {
        let name = match self.route {
            Route::Rustup => format!("bpf-linker-{RUSTUP_LINKER}"),
            Route::Distro => format!("bpf-linker-{DISTRO_LINKER}-llvm-{}", self.llvm),
        };
        paths::cache().join("tools").join(name)
    }

    fn install_linker(&self) -> Result<()> {
        let root = self.linker_root();
        eprintln!("building bpf-linker into {} (once, about two minutes)", root.display());
        let mut command = self.cargo();
        command.args(["install", "bpf-linker", "--locked", "--force", "--version"]);
        match self.route {
            Route::Rustup => command.arg(RUSTUP_LINKER),
            Route::Distro => command
                .args([DISTRO_LINKER, "--no-default-features", "--features"])
                .arg(format!("llvm-{}", self.llvm))
                .env("LLVM_PREFIX", self.llvm_prefix()?),
        };
        // Outside the checkout, so that its settings for cargo do not apply.
        process::run_tailed(command.arg("--root").arg(&root).current_dir("/"))
    }

    /// Where the LLVM that matches the distribution's compiler is installed.
    fn llvm_prefix(&self) -> Result<String> {
        let major = self.llvm;
        let programs = [format!("llvm-config-{major}"), "llvm-config".to_owned()];
        for program in programs.iter().filter_map(|name| process::find_program(name)) {
            let ask = |what| process::output(Command::new(&program).arg(what));
            if ask("--version")?.starts_with(&format!("{major}.")) {
                return Ok(ask("--prefix")?.trim().to_owned());
            }
        }
        bail!("no llvm-config of LLVM {major}, the version inside the compiler")
    }

    /// This compiler's cargo, whatever toolchain runs us.
    fn cargo(&self) -> Command {
        let bin = self.prefix.join("bin");
        let mut command = process::cargo(bin.join("cargo"));
        let path = env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(bin.clone()).chain(env::split_paths(&path));
        command.env("PATH", env::join_paths(path).unwrap_or_default());
        command.env("RUSTC", bin.join("rustc")).env_remove("RUSTDOC");
        command.env_remove("RUSTC_WORKSPACE_WRAPPER").env_remove("RUSTUP_TOOLCHAIN");
        match self.route {
            // The linker loads the first libLLVM it meets there.
            Route::Rustup => command.env("LD_LIBRARY_PATH", self.prefix.join("lib")),
            Route::Distro => command.env_remove("LD_LIBRARY_PATH"),
        };
        command
    }
}

impl Toolchain {
    /// One line on what it is.
    pub(crate) fn describe(&self) -> String {
        let Compiler { route, prefix, llvm } = &self.compiler;
        format!(
            "{route} route, LLVM {llvm}, {} and {}",
            prefix.join("bin/rustc").display(),
            self.linker.display()
        )
    }

    /// Whether `cargo clippy` exists for this compiler.
    pub(crate) fn has_clippy(&self) -> bool {
        process::is_executable(&self.compiler.prefix.join("bin/cargo-clippy"))
    }

    /// `cargo SUBCOMMAND` on the kernel side for the BPF target.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut command = self.compiler.cargo();
        let flags = [
            format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
            "-Cdebuginfo=2".to_owned(),
            // 32-bit arithmetic, and atomic operations that return the old value (Linux 5.12).
            "-Ctarget-cpu=v3".to_owned(),
            "-Clink-arg=--btf".to_owned(),
        ];
        command.current_dir(paths::root()).arg(subcommand);
        command.args(["--profile", "bpf", "--package", "monitor-ebpf"]);
        command.args(["--target", TARGET, "-Zbuild-std=core"]);
        command.arg("--target-dir").arg(self.target_dir());
        // build-std on the pinned stable compiler.
        command.env("RUSTC_BOOTSTRAP", "1");
        // The object is the same whatever the user's environment says: incremental builds cut a crate into many units, which
        // inlines less, and then the verifier refuses programs.
        command.env("CARGO_INCREMENTAL", "0");
        command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        command.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &self.linker);
        command
    }

    /// Each route has its own: artifacts of two compilers would evict each other.
    fn target_dir(&self) -> PathBuf {
        paths::target().join("bpf").join(self.compiler.route.to_string())
    }
}

fn build_by(route: Route) -> Result<PathBuf, Broken> {
    let toolchain = prepare(route).map_err(Broken::Route)?;
    process::run_tailed(toolchain.cargo("build").args(["--bin", "probes"])).map_err(judge)?;
    let built = toolchain.target_dir().join(TARGET).join("bpf/probes");
    publish(&built, &paths::target().join("bpf/probes.o")).map_err(Broken::Route)
}

/// Tells an error in our own code from a toolchain that does not work.
fn judge(error: anyhow::Error) -> Broken {
    let text = error.to_string();
    let toolchain_at_fault = [
        "LLVM shared lib",
        "error while loading",
        "linker `",
        "bitcode",
        "Invalid record",
        "can't find crate for `core`",
    ];
    if text.contains("could not compile `monitor-ebpf`")
        && !toolchain_at_fault.iter().any(|sign| text.contains(sign))
    {
        return Broken::Source(error.context("the kernel side does not compile"));
    }
    Broken::Route(error)
}

/// Copies the object to its stable path, only if it changed: the program that embeds it is rebuilt by date.
fn publish(built: &Path, object: &Path) -> Result<PathBuf> {
    let bytes = fs::read(built).with_context(|| format!("cannot read {}", built.display()))?;
    elf::check_bpf_object(&bytes).with_context(|| format!("{} is not usable", built.display()))?;
    if fs::read(object).ok().as_ref() != Some(&bytes) {
        let partial = object.with_extension("o.partial");
        fs::write(&partial, &bytes)
            .and_then(|()| fs::rename(&partial, object))
            .with_context(|| format!("cannot write {}", object.display()))?;
    }
    Ok(object.to_path_buf())
}

/// The directory of the pinned toolchain.
fn rustup_prefix() -> Result<PathBuf> {
    let rustup = process::find_program("rustup").context("rustup is not installed")?;
    let channel = pinned_channel()?;
    // Only ask: installing is a step of its own.
    let mut command = Command::new(rustup);
    command.args(["which", "--toolchain", &channel, "rustc"]).env("RUSTUP_AUTO_INSTALL", "0");
    let rustc =
        process::output(&mut command).with_context(|| format!("rustup has no toolchain {channel}"))?;
    let bin = Path::new(rustc.trim()).parent();
    Ok(bin.and_then(Path::parent).context("rustup named no path")?.to_path_buf())
}

/// Where the distribution's own compiler is.
fn distro_prefix() -> Result<PathBuf> {
    let prefix = PathBuf::from("/usr");
    let rustc = prefix.join("bin/rustc");
    let real = fs::canonicalize(&rustc).context("the distribution's rustc is not installed")?;
    ensure!(real.file_name().is_none_or(|name| name != "rustup"), "{} belongs to rustup", rustc.display());
    Ok(prefix)
}

fn pinned_channel() -> Result<String> {
    toml_value(&paths::root().join("rust-toolchain.toml"), "channel")
}

fn minimum_release() -> Result<(u32, u32)> {
    major_minor(&toml_value(&paths::root().join("Cargo.toml"), "rust-version")?)
}

/// The string a key is set to; enough for our own files.
fn toml_value(file: &Path, key: &str) -> Result<String> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    text.lines()
        .filter_map(|line| line.split_once('='))
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim().trim_matches('"').to_owned())
        .with_context(|| format!("{} sets no `{key}`", file.display()))
}

/// A line of `rustc -vV`.
fn version_field<'a>(version: &'a str, field: &str) -> Result<&'a str> {
    version
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .map(str::trim)
        .with_context(|| format!("rustc -vV has no line `{field}`"))
}

fn release(version: &str) -> Result<(u32, u32)> {
    major_minor(version_field(version, "release:")?)
}

fn llvm_major(version: &str) -> Result<u32> {
    Ok(major_minor(version_field(version, "LLVM version:")?)?.0)
}

fn major_minor(version: &str) -> Result<(u32, u32)> {
    let mut numbers = version.split('.').map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => bail!("`{version}` is not a version"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: &str = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\n\
                           release: 1.96.0\nLLVM version: 22.1.8\n";

    #[test]
    fn reads_what_rustc_says_about_itself() {
        assert_eq!(release(VERSION).unwrap(), (1, 96));
        assert_eq!(llvm_major(VERSION).unwrap(), 22);
        assert!(llvm_major("release: 1.96.0").unwrap_err().to_string().contains("LLVM version:"));
        assert!(major_minor("stable").is_err());
    }

    #[test]
    fn our_own_files_pin_a_toolchain_at_least_as_new_as_promised() {
        assert!(major_minor(&pinned_channel().unwrap()).unwrap() >= minimum_release().unwrap());
    }

    #[test]
    fn an_error_in_our_code_is_not_blamed_on_the_route() {
        let verdict = |text: &str| matches!(judge(anyhow::anyhow!("{text}")), Broken::Source(_));
        assert!(verdict("error[E0425]\nerror: could not compile `monitor-ebpf` (bin \"probes\")"));
        assert!(!verdict("unable to find LLVM shared lib\nerror: could not compile `monitor-ebpf`"));
        assert!(!verdict("error: failed to download `core`"));
    }
}
