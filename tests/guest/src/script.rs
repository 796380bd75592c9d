//! The steps language: words `kind=argument` become [`Step`]s. Pure parsing; nothing is executed here.
//!
//! | word | meaning |
//! |---|---|
//! | `net=eth0,10.77.0.2/24[,10.77.0.1,MAC]` | address of an interface, and a permanent neighbour |
//! | `burn=cpu0:2.0s`, `burn=all:2.0s` | spin for that long by the guest's clock, on one CPU or on all at once |
//! | `cpu=cpu0:2.0s`, `cpu=all:2.0s` | spin until the spinning thread(s) got that much CPU time |
//! | `write=vda:1000x4096`, `read=vda:160x65536` | requests of that many bytes, sequential from 0, `O_DIRECT` |
//! | `bwrite=vda:100x4096` | the same through the page cache, then fsync |
//! | `flush=vda:3` | fsync of the block device, that often |
//! | `discard=vda:0+1048576` | BLKDISCARD of offset + length |
//! | `udp=10.77.0.1:5000x1000x512B[@100]` | datagrams of that payload [per second] |
//! | `udprx=5000x2.0s` | count datagrams on a port, until that time is over; the port is open from the start |
//! | `tcp=10.77.0.1:5001x1000000B` | one connection, that many bytes (segmentation offload applies) |
//! | `tcprx=5002` | accept one connection, read it to its end |
//! | `mem=64M` | touch that much anonymous memory and keep it |
//! | `sleep=2.5s` | sleep |
//! | `wait` | wait for a line on the second serial port |
//! | `times=N` | repeat all steps |
//! | `end=idle\|poweroff\|reboot` | what to do after the last step (default `idle`) |

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

/// What the guest is asked to do.
#[derive(Debug, PartialEq)]
pub(crate) struct Script {
    /// The steps, each with the word it came from.
    pub(crate) steps: Vec<(String, Step)>,
    /// How often to run all of them.
    pub(crate) times: u32,
    /// What to do afterwards.
    pub(crate) end: End,
}

/// What happens after the last step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum End {
    Idle,
    PowerOff,
    Reboot,
}

/// One step of the workload.
#[derive(Debug, PartialEq)]
pub(crate) enum Step {
    Net(NetAddress),
    /// Spin for a wall time.
    Burn(Cpus, Duration),
    /// Spin for a CPU time.
    Cpu(Cpus, Duration),
    Write(Requests),
    Read(Requests),
    BufferedWrite(Requests),
    Flush {
        disk: String,
        count: u64,
    },
    Discard {
        disk: String,
        offset_bytes: u64,
        length_bytes: u64,
    },
    Udp(Datagrams),
    UdpReceive {
        port: u16,
        time: Duration,
    },
    Tcp {
        to: SocketAddrV4,
        bytes: usize,
    },
    TcpReceive {
        port: u16,
    },
    Memory {
        mib: usize,
    },
    Sleep(Duration),
    Wait,
}

/// Where to spin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Cpus {
    All,
    One(usize),
}

/// A number of equal requests to a disk.
#[derive(Debug, PartialEq)]
pub(crate) struct Requests {
    pub(crate) disk: String,
    pub(crate) count: u64,
    pub(crate) size_bytes: usize,
}

/// A number of equal datagrams to one destination.
#[derive(Debug, PartialEq)]
pub(crate) struct Datagrams {
    pub(crate) to: SocketAddrV4,
    pub(crate) count: u32,
    pub(crate) size_bytes: usize,
    /// Time from one datagram to the next; zero: as fast as possible.
    pub(crate) gap: Duration,
}

/// The address of an interface.
#[derive(Debug, PartialEq)]
pub(crate) struct NetAddress {
    pub(crate) device: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) prefix_bits: u32,
    /// A neighbour whose MAC is known, so that no ARP packet spoils the counts.
    pub(crate) neighbour: Option<(Ipv4Addr, [u8; 6])>,
}

/// Reads a script. The error names the word that is wrong.
pub(crate) fn parse(text: &str) -> Result<Script, String> {
    let mut script = Script { steps: Vec::new(), times: 1, end: End::Idle };
    for word in text.split_whitespace() {
        let (kind, argument) = word.split_once('=').unwrap_or((word, ""));
        let known = match kind {
            "times" => argument.parse().map(|times| script.times = times).ok(),
            "end" => end(argument).map(|end| script.end = end),
            _ => step(kind, argument).map(|step| script.steps.push((word.to_owned(), step))),
        };
        known.ok_or_else(|| format!("cannot read the step {word}"))?;
    }
    Ok(script)
}

fn end(argument: &str) -> Option<End> {
    Some(match argument {
        "idle" => End::Idle,
        "poweroff" => End::PowerOff,
        "reboot" => End::Reboot,
        _ => return None,
    })
}

fn step(kind: &str, argument: &str) -> Option<Step> {
    Some(match kind {
        "net" => Step::Net(net(argument)?),
        "burn" => spin(argument, Step::Burn)?,
        "cpu" => spin(argument, Step::Cpu)?,
        "write" => Step::Write(requests(argument)?),
        "read" => Step::Read(requests(argument)?),
        "bwrite" => Step::BufferedWrite(requests(argument)?),
        "flush" => {
            let (disk, count) = argument.split_once(':')?;
            Step::Flush { disk: device(disk)?, count: count.parse().ok()? }
        }
        "discard" => discard(argument)?,
        "udp" => Step::Udp(datagrams(argument)?),
        "udprx" => {
            let (port, time) = argument.split_once('x')?;
            Step::UdpReceive { port: port.parse().ok()?, time: duration(time)? }
        }
        "tcp" => {
            let (to, bytes) = argument.split_once('x')?;
            Step::Tcp { to: to.parse().ok()?, bytes: size(bytes)? }
        }
        "tcprx" => Step::TcpReceive { port: argument.parse().ok()? },
        "mem" => Step::Memory { mib: argument.strip_suffix('M')?.parse().ok()? },
        "sleep" => Step::Sleep(duration(argument)?),
        "wait" => Step::Wait,
        _ => return None,
    })
}

fn spin(argument: &str, step: fn(Cpus, Duration) -> Step) -> Option<Step> {
    let (cpus, time) = argument.split_once(':')?;
    let cpus = match cpus {
        "all" => Cpus::All,
        one => Cpus::One(one.strip_prefix("cpu")?.parse().ok()?),
    };
    Some(step(cpus, duration(time)?))
}

fn requests(argument: &str) -> Option<Requests> {
    let (disk, rest) = argument.split_once(':')?;
    let (count, bytes) = rest.split_once('x')?;
    Some(Requests { disk: device(disk)?, count: count.parse().ok()?, size_bytes: size(bytes)? })
}

fn discard(argument: &str) -> Option<Step> {
    let (disk, range) = argument.split_once(':')?;
    let (offset, length) = range.split_once('+')?;
    Some(Step::Discard {
        disk: device(disk)?,
        offset_bytes: offset.parse().ok()?,
        length_bytes: length.parse().ok()?,
    })
}

fn datagrams(argument: &str) -> Option<Datagrams> {
    let (what, per_s) = argument.split_once('@').map_or((argument, None), |(what, rate)| (what, Some(rate)));
    let gap = match per_s {
        None => Duration::ZERO,
        Some(rate) => Duration::try_from_secs_f64(1.0 / rate.parse::<f64>().ok()?).ok()?,
    };
    let mut parts = what.split('x');
    let (to, count, bytes) = (parts.next()?, parts.next()?, parts.next()?);
    Some(Datagrams { to: to.parse().ok()?, count: count.parse().ok()?, size_bytes: size(bytes)?, gap })
}

fn net(argument: &str) -> Option<NetAddress> {
    let mut parts = argument.split(',');
    let device = device(parts.next()?)?;
    let (address, bits) = parts.next()?.split_once('/')?;
    let neighbour = match (parts.next(), parts.next()) {
        (Some(address), Some(mac_text)) => Some((address.parse().ok()?, mac(mac_text)?)),
        _ => None,
    };
    let prefix_bits = bits.parse().ok().filter(|bits| *bits <= 32)?;
    Some(NetAddress { device, address: address.parse().ok()?, prefix_bits, neighbour })
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// A device name: short enough for the kernel, and no way out of /dev.
fn device(name: &str) -> Option<String> {
    let good = !name.is_empty() && name.len() < 16 && name.bytes().all(|b| b.is_ascii_alphanumeric());
    good.then(|| name.to_owned())
}

/// Bytes, with or without the unit `B`; never none.
fn size(text: &str) -> Option<usize> {
    text.strip_suffix('B').unwrap_or(text).parse().ok().filter(|bytes| *bytes > 0)
}

/// Seconds with a fraction, with or without the unit `s`.
fn duration(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.strip_suffix('s').unwrap_or(text).parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(word: &str, expected: Step) {
        let script = parse(word).expect(word);
        assert_eq!(script.steps, [(word.to_owned(), expected)]);
    }

    #[test]
    fn every_kind_of_step_is_read() {
        let requests = |count, size_bytes| Requests { disk: "vda".into(), count, size_bytes };
        let second = Duration::from_secs(1);
        check("burn=all:1s", Step::Burn(Cpus::All, second));
        check("cpu=cpu1:1.0", Step::Cpu(Cpus::One(1), second));
        check("write=vda:3x4096", Step::Write(requests(3, 4096)));
        check("read=vda:3x512B", Step::Read(requests(3, 512)));
        check("bwrite=vda:1x1", Step::BufferedWrite(requests(1, 1)));
        check("flush=vdb:2", Step::Flush { disk: "vdb".into(), count: 2 });
        check("discard=vda:0+8", Step::Discard { disk: "vda".into(), offset_bytes: 0, length_bytes: 8 });
        check("udprx=5000x1s", Step::UdpReceive { port: 5000, time: second });
        check("tcprx=5000", Step::TcpReceive { port: 5000 });
        check("mem=64M", Step::Memory { mib: 64 });
        check("sleep=1", Step::Sleep(second));
        check("wait", Step::Wait);
    }

    #[test]
    fn addresses_are_read() {
        let to = SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 1), 5000);
        let gap = Duration::from_millis(10);
        check("udp=10.77.0.1:5000x7x512B@100", Step::Udp(Datagrams { to, count: 7, size_bytes: 512, gap }));
        check("tcp=10.77.0.1:5000x9B", Step::Tcp { to, bytes: 9 });
        let neighbour = Some((Ipv4Addr::new(10, 77, 0, 1), [0xfe, 0x54, 0, 1, 2, 3]));
        let net =
            NetAddress { device: "eth0".into(), address: [10, 77, 0, 2].into(), prefix_bits: 24, neighbour };
        check("net=eth0,10.77.0.2/24,10.77.0.1,fe:54:00:01:02:03", Step::Net(net));
    }

    #[test]
    fn a_wrong_word_is_named() {
        let wrong = [
            "burn=cpuX:1s",
            "burn=1s",
            "cpu=cpu0:-1s",
            "read=../x:1x1",
            "read=vda:1x0",
            "mem=64",
            "net=eth0,1.2.3.4/33",
            "udp=1.2.3.4:5x1x1@0",
            "sleep=",
            "sleep=inf",
            "end=never",
            "times=x",
            "nonsense",
        ];
        for word in wrong {
            assert_eq!(parse(word), Err(format!("cannot read the step {word}")), "{word}");
        }
    }

    #[test]
    fn times_and_end_apply_to_the_script() {
        let script = parse("sleep=1 times=3 end=poweroff").expect("a good script");
        assert_eq!((script.steps.len(), script.times, script.end), (1, 3, End::PowerOff));
    }
}
