//! Any lines `NAME=VALUE` as the statistics of a domain: no panic, and lists that stay short whatever numbers the names
//! hold.
#![no_main]

use libfuzzer_sys::fuzz_target;
use monitor::{
    source::libvirt::stats::{DomainStats, Value},
    units::DomainUuid,
};

fuzz_target!(|text: &str| {
    let value = |text: &'_ str| match (text.parse(), text.parse()) {
        (Ok(number), _) => Value::Unsigned(number),
        (_, Ok(number)) => Value::Signed(number),
        _ => Value::Other,
    };
    let lines = text.lines().filter_map(|line| line.split_once('='));
    let parameters = lines.clone().map(|(name, text)| (name, value(text)));
    let stats = DomainStats::from_parameters(DomainUuid([7; 16]), parameters);
    let names = lines.clone().map(|(name, text)| (name, Value::Text(text)));
    let named = DomainStats::from_parameters(DomainUuid([7; 16]), names);
    for stats in [stats, named] {
        let lines = lines.clone().count();
        assert!(stats.vcpus.len() + stats.blocks.len() + stats.interfaces.len() + stats.perf.len() <= lines);
    }
});
