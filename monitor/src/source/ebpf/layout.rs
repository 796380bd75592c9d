//! Finds the offsets of kernel structure fields in the running kernel's BTF.
//!
//! The only other place that knows kernel structures is `monitor-ebpf/src/kernel.rs`.

use std::{collections::BTreeMap, path::Path};

use btf_rs::{Btf, Type};
use monitor_ebpf::{
    BlockLayout, CALL_FALLOCATE, CALL_FLUSH, CALL_READ, CALL_WRITE, Layout, NO_FIELD, NetLayout,
};

/// Why an offset could not be found.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// BTF is absent or unreadable.
    #[error("cannot read kernel type information (BTF)")]
    Read(#[from] std::io::Error),
    /// BTF is not understood.
    #[error("cannot understand kernel type information (BTF)")]
    Btf(#[from] btf_rs::Error),
    /// This kernel has no such field.
    #[error("this kernel has no {structure}.{field}")]
    NoField {
        /// The structure asked for.
        structure: &'static str,
        /// The path of the field within it.
        field: &'static str,
    },
}

/// Reads the kernel's type information.
///
/// # Errors
/// If it cannot be read or understood.
pub fn kernel_types(btf_file: &Path) -> Result<Btf, LayoutError> {
    Ok(Btf::from_bytes(&std::fs::read(btf_file)?)?)
}

/// Finds every offset that the scheduling programs need.
///
/// # Errors
/// If a structure lacks a field; the message names it.
pub fn sched(btf: &Btf) -> Result<Layout, LayoutError> {
    let at = |structure, field| offset(btf, structure, field);
    let nr_running = at("rq", "nr_running")?;
    let delayed = at("rq", "cfs")
        .and_then(|cfs| Ok((cfs + at("cfs_rq", "h_nr_queued")?, cfs + at("cfs_rq", "h_nr_runnable")?)));
    let (rq_queued, rq_runnable) = match delayed {
        Ok(fields) => fields,
        // Before Linux 6.14: queued threads are not told apart, and the difference is 0.
        Err(LayoutError::NoField { .. }) => (nr_running, nr_running),
        Err(error) => return Err(error),
    };
    let task_cpu = match at("task_struct", "thread_info.cpu") {
        Err(LayoutError::NoField { .. }) => at("task_struct", "cpu")?,
        found => found?,
    };
    let (arrival, queued) =
        (at("task_struct", "sched_info.last_arrival")?, at("task_struct", "sched_info.last_queued")?);
    // The reading program takes both at once.
    if queued != arrival + 8 {
        return Err(LayoutError::NoField {
            structure: "sched_info",
            field: "last_queued after last_arrival",
        });
    }
    Ok(Layout {
        task_pid: at("task_struct", "pid")?,
        task_on_cpu: at("task_struct", "on_cpu")?,
        task_on_rq: at("task_struct", "on_rq")?,
        task_cpu,
        task_start_boottime: at("task_struct", "start_boottime")?,
        task_sum_exec_runtime: at("task_struct", "se.sum_exec_runtime")?,
        task_exec_start: at("task_struct", "se.exec_start")?,
        task_cfs_rq: at("task_struct", "se.cfs_rq")?,
        task_run_delay: at("task_struct", "sched_info.run_delay")?,
        task_last_queued: queued,
        task_last_arrival: arrival,
        task_tgid: at("task_struct", "tgid")?,
        task_flags: at("task_struct", "flags")?,
        task_comm: at("task_struct", "comm")?,
        task_prio: at("task_struct", "prio")?,
        task_prev_sum_exec_runtime: at("task_struct", "se.prev_sum_exec_runtime")?,
        task_throttled: optional(at("task_struct", "throttled"))?,
        cfs_rq_throttle_count: optional(at("cfs_rq", "throttle_count"))?,
        cfs_rq_throttled_clock_self: optional(at("cfs_rq", "throttled_clock_self"))?,
        cfs_rq_throttled_clock_self_time: optional(at("cfs_rq", "throttled_clock_self_time"))?,
        task_signal: at("task_struct", "signal")?,
        task_exit_state: at("task_struct", "exit_state")?,
        task_thread_node: at("task_struct", "thread_node")?,
        signal_thread_head: at("signal_struct", "thread_head")?,
        signal_sum_sched_runtime: at("signal_struct", "sum_sched_runtime")?,
        cfs_rq_rq: at("cfs_rq", "rq")?,
        rq_nr_running: nr_running,
        rq_queued,
        rq_runnable,
        rq_clock: at("rq", "clock")?,
        rq_clock_task: at("rq", "clock_task")?,
    })
}

/// [`NO_FIELD`] for a field that this kernel does not have.
fn optional(offset: Result<u32, LayoutError>) -> Result<u32, LayoutError> {
    match offset {
        Err(LayoutError::NoField { .. }) => Ok(NO_FIELD),
        known => known,
    }
}

/// Finds every offset that the network programs need, for a host with so many CPUs.
///
/// # Errors
/// If a structure lacks a field; the message names it.
pub fn net(btf: &Btf, cpus: u32) -> Result<NetLayout, LayoutError> {
    let at = |structure, field| offset(btf, structure, field);
    let (skb_vlan, skb_vlan_bit) = match at("sk_buff", "vlan_all") {
        Ok(bytes) => (bytes, 0),
        Err(LayoutError::NoField { .. }) => {
            let bits = bit_offset(btf, "sk_buff", "vlan_present")?;
            (bits / 8, 1 << (bits % 8))
        }
        Err(error) => return Err(error),
    };
    let ip_summed = bit_offset(btf, "sk_buff", "ip_summed")?;
    let shared_gso_size = at("skb_shared_info", "gso_size")?;
    if at("skb_shared_info", "gso_segs")? != shared_gso_size + 2 {
        return Err(LayoutError::NoField { structure: "skb_shared_info", field: "gso_segs after gso_size" });
    }
    Ok(NetLayout {
        cpus,
        skb_dev: at("sk_buff", "dev")?,
        skb_len: at("sk_buff", "len")?,
        skb_head: at("sk_buff", "head")?,
        skb_end: at("sk_buff", "end")?,
        skb_queue_mapping: at("sk_buff", "queue_mapping")?,
        skb_iif: at("sk_buff", "skb_iif")?,
        skb_vlan,
        skb_vlan_bit,
        skb_ip_summed: ip_summed / 8,
        skb_ip_summed_bit: ip_summed % 8,
        skb_mac_header: at("sk_buff", "mac_header")?,
        skb_transport_header: at("sk_buff", "transport_header")?,
        shared_gso_size,
        shared_gso_type: at("skb_shared_info", "gso_type")?,
        dev_ifindex: at("net_device", "ifindex")?,
        dev_net: at("net_device", "nd_net.net")?,
        net_inum: at("net", "ns.inum")?,
    })
}

/// Names of the kernel's reasons to drop a packet, by number (`enum skb_drop_reason`), without their common prefix.
/// Empty where the kernel tells none, or tells them at another place than the program looks at.
#[must_use]
pub fn drop_reasons(btf: &Btf) -> BTreeMap<u32, String> {
    drop_reason_names(btf).unwrap_or_default().unwrap_or_default()
}

fn drop_reason_names(btf: &Btf) -> Result<Option<BTreeMap<u32, String>>, btf_rs::Error> {
    let mut names = BTreeMap::new();
    for found in btf.resolve_types_by_name("skb_drop_reason")? {
        let Type::Enum(reasons) = found else { continue };
        for reason in &reasons.members {
            let name = btf.resolve_name(reason)?;
            names.insert(reason.val(), name.trim_start_matches("SKB_DROP_REASON_").to_owned());
        }
    }
    Ok((!names.is_empty()).then_some(names))
}

/// Finds what the disk programs need. What a kernel lacks is 0 there: the program that needs it cannot be loaded, or user
/// space does not ask for it.
///
/// # Errors
/// If a structure lacks a field that every image needs; the message names it.
pub fn block(btf: &Btf) -> Result<BlockLayout, LayoutError> {
    let at = |structure, field| offset(btf, structure, field);
    let maybe = |structure, field| match offset(btf, structure, field) {
        Err(LayoutError::NoField { .. }) => Ok(0),
        found => found,
    };
    Ok(BlockLayout {
        kiocb_file: at("kiocb", "ki_filp")?,
        kiocb_complete: at("kiocb", "ki_complete")?,
        kiocb_flags: at("kiocb", "ki_flags")?,
        iter_count: at("iov_iter", "count")?,
        iter_data_source: maybe("iov_iter", "data_source")?,
        file_inode: at("file", "f_inode")?,
        inode_number: at("inode", "i_ino")?,
        inode_sb: at("inode", "i_sb")?,
        inode_mode: at("inode", "i_mode")?,
        inode_rdev: at("inode", "i_rdev")?,
        sb_dev: at("super_block", "s_dev")?,
        bio_bdev: at("bio", "bi_bdev")?,
        bio_opf: at("bio", "bi_opf")?,
        bio_status: at("bio", "bi_status")?,
        bio_size: at("bio", "bi_iter.bi_size")?,
        bio_next: at("bio", "bi_next")?,
        bio_private: at("bio", "bi_private")?,
        bio_pages: at("bio", "bi_io_vec")?,
        vec_page: at("bio_vec", "bv_page")?,
        page_head: at("page", "compound_head")?,
        page_mapping: at("page", "mapping")?,
        mapping_host: at("address_space", "host")?,
        dio_kiocb: maybe("iomap_dio", "iocb")?,
        request_bio: at("request", "bio")?,
        task_flags: at("task_struct", "flags")?,
        bdev_dev: at("block_device", "bd_dev")?,
        preflush: 1 << enumerator(btf, "req_flag_bits", "__REQ_PREFLUSH")?,
        uring_opcode: maybe("io_kiocb", "opcode")?,
        uring_fd: maybe("io_kiocb", "cqe.fd")?,
        cqe_res: maybe("io_uring_cqe", "res")?,
        uring_complete_has_cqe: u32::from(
            tracepoint_arguments(btf, "btf_trace_io_uring_complete")? == Some(3),
        ),
        task_files: at("task_struct", "files")?,
        files_fdt: at("files_struct", "fdt")?,
        fdt_max: at("fdtable", "max_fds")?,
        fdt_fd: at("fdtable", "fd")?,
        call_arguments: call_arguments(btf)?,
        calls: CALLS,
    })
}

/// What system calls do, by their numbers.
const CALLS: [u8; monitor_ebpf::CALLS] = {
    let mut calls = [0; monitor_ebpf::CALLS];
    calls[call(libc::SYS_pread64)] = CALL_READ;
    calls[call(libc::SYS_preadv)] = CALL_READ;
    calls[call(libc::SYS_pwrite64)] = CALL_WRITE;
    calls[call(libc::SYS_pwritev)] = CALL_WRITE;
    calls[call(libc::SYS_fdatasync)] = CALL_FLUSH;
    calls[call(libc::SYS_fsync)] = CALL_FLUSH;
    calls[call(libc::SYS_fallocate)] = CALL_FALLOCATE;
    calls
};

/// The number of a system call, which is looked at: else this does not compile.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "indexes an array at compile time"
)]
const fn call(number: libc::c_long) -> usize {
    number as usize
}

/// Where `struct pt_regs` has the first four arguments of a system call.
fn call_arguments(btf: &Btf) -> Result<[u32; 4], LayoutError> {
    let at = |field| offset(btf, "pt_regs", field);
    if cfg!(target_arch = "aarch64") {
        let first = at("regs")?;
        return Ok([first, first + 8, first + 16, first + 24]);
    }
    Ok([at("di")?, at("si")?, at("dx")?, at("r10")?])
}

/// The value of one enumerator.
fn enumerator(btf: &Btf, of: &'static str, name: &'static str) -> Result<u32, LayoutError> {
    for found in btf.resolve_types_by_name(of)? {
        let Type::Enum(found) = found else { continue };
        for member in &found.members {
            if btf.resolve_name(member)? == name {
                return Ok(member.val());
            }
        }
    }
    Err(LayoutError::NoField { structure: of, field: name })
}

/// How many arguments a tracepoint gives its programs (the first parameter of the type is not one); `None` if there is
/// no such tracepoint.
fn tracepoint_arguments(btf: &Btf, of: &'static str) -> Result<Option<usize>, LayoutError> {
    let found = match btf.resolve_types_by_name(of) {
        Ok(found) => found,
        Err(_) => return Ok(None),
    };
    for found in found {
        let Type::Typedef(found) = found else { continue };
        let Type::Ptr(pointer) = btf.resolve_chained_type(&found)? else { continue };
        if let Type::FuncProto(of) = btf.resolve_chained_type(&pointer)? {
            return Ok(Some(of.parameters.len().saturating_sub(1)));
        }
    }
    Ok(None)
}

/// The byte offset of `field`, a path of member names joined by dots, inside `structure`.
pub(super) fn offset(btf: &Btf, structure: &'static str, field: &'static str) -> Result<u32, LayoutError> {
    Ok(bit_offset(btf, structure, field)? / 8)
}

fn bit_offset(btf: &Btf, structure: &'static str, field: &'static str) -> Result<u32, LayoutError> {
    let missing = LayoutError::NoField { structure, field };
    for found in btf.resolve_types_by_name(structure)? {
        if let Some(bits) = path_bits(btf, found, field)? {
            return Ok(bits);
        }
    }
    Err(missing)
}

/// The bit offset of a dotted path below `within`, looking into unnamed structures and unions.
fn path_bits(btf: &Btf, within: Type, path: &str) -> Result<Option<u32>, btf_rs::Error> {
    let (Type::Struct(members) | Type::Union(members)) = within else { return Ok(None) };
    let (name, rest) = path.split_once('.').unwrap_or((path, ""));
    for member in &members.members {
        let member_name = btf.resolve_name(member)?;
        let inner = match (member_name.as_str(), rest) {
            (found, "") if found == name => return Ok(Some(member.bit_offset())),
            (found, rest) if found == name => rest,
            ("", _) => path,
            _ => continue,
        };
        let of = skip_qualifiers(btf, btf.resolve_chained_type(member)?)?;
        if let Some(bits) = path_bits(btf, of, inner)? {
            return Ok(Some(member.bit_offset() + bits));
        }
    }
    Ok(None)
}

fn skip_qualifiers(btf: &Btf, mut of: Type) -> Result<Type, btf_rs::Error> {
    loop {
        of = match of {
            Type::Typedef(t) => btf.resolve_chained_type(&t)?,
            Type::Const(t) => btf.resolve_chained_type(&t)?,
            Type::Volatile(t) => btf.resolve_chained_type(&t)?,
            other => return Ok(other),
        };
    }
}
