//! Any words as a process's command line: no panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use monitor::source::procfs::parse_command_line;

fuzz_target!(|text: &str| {
    let mut words = vec!["qemu-system-x86_64".to_owned()];
    words.extend(text.split('\n').map(str::to_owned));
    let _ = parse_command_line(&words);
});
