//! The yardsticks of `cargo xtask bench net`: the least a program on a packet's way costs, and what the counting of
//! `net.rs` costs as classifiers on a single device (tcx). The monitor never loads them.
//!
//! The classifiers are as lean as they could be: one device, so no look-up; and they do not see what the driver
//! refuses, nor the queue that is chosen after them.

use aya_ebpf::{
    macros::{btf_tracepoint, classifier},
    programs::{BtfTracePointContext, TcContext},
};
use monitor_ebpf::NicSide;

use crate::{
    atomic::Word,
    net::{cell, count, count_window, nic},
};

/// `TCX_NEXT` of `include/uapi/linux/bpf.h`: whatever the next program says.
const NEXT: i32 = -1;
/// One packet among so many is looked at for its source address.
const SAMPLE: u64 = 64;
/// Ethernet, IPv4 and TCP with its usual options: what is in front of the data of most packets that get segmented.
const HEADERS: u32 = 14 + 20 + 32;

/// Does nothing on the tracepoint that the host's sending ends at.
#[btf_tracepoint(function = "net_dev_xmit")]
pub(crate) fn bench_empty_net(_ctx: BtfTracePointContext) -> i32 {
    0
}

/// Counts what the host sends through the device that has place 0.
#[classifier]
pub(crate) fn bench_tcx_xmit(ctx: TcContext) -> i32 {
    if let Some(cell) = cell(0) {
        count_classified(&ctx, &mut cell.xmit, 0);
    }
    NEXT
}

/// Counts what it receives from it.
#[classifier]
pub(crate) fn bench_tcx_receive(ctx: TcContext) -> i32 {
    if let Some(cell) = cell(0) {
        count_classified(&ctx, &mut cell.receive, 1);
    }
    NEXT
}

#[inline(always)]
fn count_classified(ctx: &TcContext, side: &mut NicSide, of: u32) {
    // SAFETY: the context of a classifier, which outlives this call.
    let skb = unsafe { &*ctx.skb.skb };
    let tag = if skb.vlan_present != 0 { 4 } else { 0 };
    let wire = match (skb.gso_size, skb.gso_segs) {
        (0, _) => 1,
        (size, 0) => skb.len.saturating_sub(HEADERS).wrapping_add(size - 1) / size,
        (_, segments) => segments,
    };
    let bytes = skb.len + tag;
    if side.packets.is_multiple_of(SAMPLE)
        && let (Some(nic), Ok(source)) = (nic(0), ctx.load::<[u16; 3]>(6))
    {
        let [a, b, c] = source.map(u64::from);
        Word::of(&nic.source_mac[of as usize]).store(a | b << 16 | c << 32);
    }
    count(side, bytes, wire);
    count_window(side, bytes, of);
}
