//! The guest's initial file system: `/init`, the kernel modules it needs and their load order, as a newc archive.
//!
//! Works on an unpacked kernel package (`boot/vmlinuz-*`, `lib/modules/VERSION`), without depmod and cpio: what a
//! module depends on is read from the module itself. Not compressed: inflating is slow in an emulated guest.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// What a guest with virtio disks, NICs and a balloon needs.
pub(crate) const GUEST_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon"];

/// The kernel image of an unpacked kernel package.
pub(crate) fn kernel_image(kernel_dir: &Path) -> Result<PathBuf> {
    one_of(&kernel_dir.join("boot"), "vmlinuz-")
}

/// Builds the archive, with these modules and what they depend on.
pub(crate) fn build(kernel_dir: &Path, init: &Path, names: &[&str]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["proc", "sys", "dev", "mod", "tmp"] {
        archive.add(directory, 0o040_755, b"");
    }
    // The kernel opens /dev/console before /init can mount devtmpfs.
    archive.add_device("dev/console", 0o020_600, (5, 1));
    let init = fs::read(init).with_context(|| format!("cannot read the guest's init {}", init.display()))?;
    archive.add("init", 0o100_755, &init);
    let modules = Modules::find(&one_of(&kernel_dir.join("lib/modules"), "")?)?;
    let mut order = Vec::new();
    for name in names {
        modules.load(name, &mut order, &mut archive)?;
    }
    archive.add("mod/order", 0o100_644, order.join("\n").as_bytes());
    Ok(archive.finish())
}

/// The only (or last) entry of a directory whose name starts with `prefix`.
fn one_of(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let named =
        |path: &PathBuf| path.file_name().and_then(OsStr::to_str).is_some_and(|n| n.starts_with(prefix));
    let found = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(named).max();
    found.with_context(|| format!("no {prefix}* in {}: not an unpacked kernel package", directory.display()))
}

/// The modules of one kernel.
struct Modules {
    /// Module name (with `_`) to file.
    files: BTreeMap<String, PathBuf>,
    builtin: Vec<String>,
}

impl Modules {
    fn find(directory: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        collect(&directory.join("kernel"), &mut files)?;
        let builtin = fs::read_to_string(directory.join("modules.builtin")).unwrap_or_default();
        Ok(Self { files, builtin: builtin.lines().map(|path| module_name(Path::new(path))).collect() })
    }

    /// Adds a module after what it depends on; those already in `order` are not repeated.
    fn load(&self, name: &str, order: &mut Vec<String>, archive: &mut Archive) -> Result<()> {
        let file = format!("{name}.ko");
        if order.contains(&file) || self.builtin.iter().any(|builtin| builtin == name) {
            return Ok(());
        }
        let path = self.files.get(name).with_context(|| format!("the guest kernel has no module {name}"))?;
        let content = read_module(path)?;
        for needed in dependencies(&content) {
            self.load(&needed, order, archive)?;
        }
        archive.add(&format!("mod/{file}"), 0o100_644, &content);
        order.push(file);
        Ok(())
    }
}

fn collect(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.insert(module_name(&entry.path()), entry.path());
        }
    }
    Ok(())
}

/// `…/virtio-rng.ko.xz` is `virtio_rng`.
fn module_name(path: &Path) -> String {
    let file = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    file.split('.').next().unwrap_or_default().replace('-', "_")
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    let unpacker = match path.extension().and_then(OsStr::to_str) {
        Some("ko") => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!("{} is not a kernel module", path.display()),
    };
    let output = Command::new(unpacker).arg("-dc").arg(path).output();
    let output = output.with_context(|| format!("cannot run {unpacker} to unpack {}", path.display()))?;
    ensure!(output.status.success(), "{unpacker} cannot unpack {}", path.display());
    Ok(output.stdout)
}

/// The `depends=` entry of a module's `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let list = module[start + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(list).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// A newc archive (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    /// Major and minor number of a device node.
    device: (u32, u32),
    content: &'a [u8],
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(&Entry { name, mode, device: (0, 0), content });
    }

    fn add_device(&mut self, name: &str, mode: u32, device: (u32, u32)) {
        self.entry(&Entry { name, mode, device, content: b"" });
    }

    fn entry(&mut self, entry: &Entry<'_>) {
        self.entries += 1;
        let size = u32::try_from(entry.content.len()).expect("modules and init are far below 4 GiB");
        let name_size = u32::try_from(entry.name.len() + 1).expect("our names are short");
        let (major, minor) = entry.device;
        // ino, mode, uid, gid, nlink, mtime, size, device major and minor, rdev major and minor, name size, check
        let fields = [self.entries, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(entry.name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(entry.content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, b"");
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_entry_is_a_header_a_name_and_the_content_each_padded() {
        let mut archive = Archive::default();
        archive.add("abc", 0o100_644, b"hello");
        let text = String::from_utf8(archive.bytes.clone()).unwrap();
        assert!(text.starts_with("070701000000010000" /* ino, mode */), "{text}");
        assert_eq!(&text[6 + 8..6 + 16], "000081a4");
        assert_eq!(&text[110..], "abc\0\0\0hello\0\0\0"); // The header has 110 bytes.
        assert_eq!(archive.finish().len() % 4, 0);
    }

    #[test]
    fn dependencies_come_from_the_module() {
        let check = |module: &[u8], expected: &[&str]| assert_eq!(dependencies(module), expected);
        check(b"\x7fELF\0license=GPL\0depends=virtio,virtio-ring\0x=y\0", &["virtio", "virtio_ring"]);
        check(b"\0depends=\0", &[]);
        check(b"nothing", &[]);
        check(b"\0depends=cut", &["cut"]);
    }

    #[test]
    fn a_module_name_has_no_dash_and_no_suffix() {
        assert_eq!(module_name(Path::new("kernel/x/virtio-rng.ko.xz")), "virtio_rng");
    }
}
