//! Any text as a domain's XML: no panic, and what comes of it is no larger than the text allows.
#![no_main]

use libfuzzer_sys::fuzz_target;
use monitor::source::libvirt::xml::parse_domain;

fuzz_target!(|text: &str| {
    let Ok(domain) = parse_domain(text) else { return };
    assert!(!domain.name.is_empty());
    // QEMU's machines stop at 4096 vCPUs; every device needs an element of its own.
    assert!(domain.vcpus.len() <= 4096);
    assert!(domain.vcpus.windows(2).all(|pair| pair[0].index < pair[1].index));
    assert!(domain.disks.len() + domain.interfaces.len() <= text.len() / 7);
    let images: usize = domain.disks.iter().map(|disk| disk.backing_chain.len()).sum();
    assert!(images <= text.len() / 7);
});
