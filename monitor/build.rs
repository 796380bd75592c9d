//! Embeds the BPF object that `cargo xtask build-ebpf` made.
//!
//! With the feature `ebpf` the object's path must be in `KVM_MONITOR_BPF_OBJECT` (every `cargo xtask` command
//! sets it) or be `target/bpf/probes.o`. Without an object the build fails here, with the fix.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=KVM_MONITOR_BPF_OBJECT");
    if env::var_os("CARGO_FEATURE_EBPF").is_none() {
        return;
    }
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts"));
    let object = env::var_os("KVM_MONITOR_BPF_OBJECT")
        .map_or_else(|| manifest.join("../target/bpf/probes.o"), PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    if object.is_file() {
        println!("cargo::rustc-env=KVM_MONITOR_BPF_OBJECT={}", object.display());
    } else {
        println!(
            "cargo::error=no BPF object at {}: run `cargo xtask build-ebpf` first, or build with \
             --no-default-features for a program without kernel probes",
            object.display()
        );
    }
}
