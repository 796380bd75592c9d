//! A look into an ELF file: just enough to tell that a BPF object is one.

use anyhow::{Context as _, Result, bail, ensure};

/// `e_machine` of BPF objects.
const EM_BPF: u16 = 247;

/// Fails unless the bytes are a BPF object with type information.
pub(crate) fn check_bpf_object(bytes: &[u8]) -> Result<()> {
    let sections = sections(bytes)?;
    if !sections.iter().any(|name| name == ".BTF") {
        bail!("it has no .BTF section, only: {}", sections.join(" "));
    }
    Ok(())
}

/// Names of the sections of a little-endian 64-bit BPF object.
fn sections(bytes: &[u8]) -> Result<Vec<String>> {
    ensure!(bytes.starts_with(b"\x7fELF\x02\x01"), "not a little-endian 64-bit ELF file");
    let machine = half(bytes, 18)?;
    ensure!(machine == EM_BPF, "built for machine {machine}, not for BPF ({EM_BPF})");
    // Elf64_Ehdr: e_shoff, e_shentsize, e_shnum, e_shstrndx. Elf64_Shdr: sh_name 0, sh_offset 24.
    let headers = offset(bytes, 40)?;
    let (size, count, names) = (half(bytes, 58)?, half(bytes, 60)?, half(bytes, 62)?);
    let header = |index: u16| headers + usize::from(size) * usize::from(index);
    let strings = offset(bytes, header(names) + 24)?;
    (0..count)
        .map(|index| {
            let start = strings + usize::try_from(word(bytes, header(index))?)?;
            let name = bytes.get(start..).context("a section name lies outside the file")?;
            let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            Ok(String::from_utf8_lossy(&name[..end]).into_owned())
        })
        .collect()
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().context("the ELF file is cut short")
}

fn half(bytes: &[u8], at: usize) -> Result<u16> {
    Ok(u16::from_le_bytes(field(bytes, at)?))
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    Ok(u32::from_le_bytes(field(bytes, at)?))
}

fn offset(bytes: &[u8], at: usize) -> Result<usize> {
    Ok(usize::try_from(u64::from_le_bytes(field(bytes, at)?))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_not_a_bpf_object() {
        let reason = |bytes: &[u8]| check_bpf_object(bytes).unwrap_err().to_string();
        assert!(reason(b"").contains("not a little-endian"));
        assert!(reason(b"\x7fELF\x02\x01").contains("cut short"));
        let mut x86 = b"\x7fELF\x02\x01".to_vec();
        x86.resize(64, 0);
        x86[18] = 62;
        assert!(reason(&x86).contains("machine 62"));
    }
}
