//! Executes steps. Each function does exactly what its step says and returns what it did as JSON.

mod cpu;
mod disk;
mod mem;
mod net;

use std::collections::BTreeMap;
use std::io::{self, BufRead};
use std::net::{TcpListener, UdpSocket};
use std::thread;

use crate::clock;
use crate::json::Object;
use crate::script::{Script, Step};

/// The serial port that `wait` listens on; the first one is the console.
const WAIT_PORT: &str = "/dev/ttyS1";

/// What outlives a step.
#[derive(Default)]
pub(crate) struct Kept {
    /// Memory that earlier steps took; it stays in use until the guest ends.
    memory: Vec<Vec<u8>>,
    /// Receivers by port, open before the first step: a peer may send as soon as it sees the step begin.
    udp: BTreeMap<u16, UdpSocket>,
    tcp: BTreeMap<u16, TcpListener>,
}

/// Opens all ports that the script will receive on.
pub(crate) fn prepare(script: &Script) -> io::Result<Kept> {
    let mut kept = Kept::default();
    for (_, step) in &script.steps {
        match step {
            Step::UdpReceive { port, .. } => {
                drop(kept.udp.insert(*port, UdpSocket::bind((net::ANY, *port))?))
            }
            Step::TcpReceive { port } => drop(kept.tcp.insert(*port, TcpListener::bind((net::ANY, *port))?)),
            _ => {}
        }
    }
    Ok(kept)
}

/// Runs one step.
pub(crate) fn run(step: &Step, kept: &mut Kept) -> io::Result<Object> {
    match step {
        Step::Net(address) => net::configure(address),
        Step::Burn(cpus, time) => cpu::burn(*cpus, *time),
        Step::Cpu(cpus, time) => cpu::consume(*cpus, *time),
        Step::Write(requests) => disk::write(requests),
        Step::Read(requests) => disk::read(requests),
        Step::BufferedWrite(requests) => disk::write_buffered(requests),
        Step::Flush { disk, count } => disk::flush(disk, *count),
        Step::Discard { disk, offset_bytes, length_bytes } => {
            disk::discard(disk, *offset_bytes, *length_bytes)
        }
        Step::Udp(datagrams) => net::send_datagrams(datagrams),
        Step::UdpReceive { port, time } => net::receive_datagrams(&kept.udp[port], *time),
        Step::Tcp { to, bytes } => net::send_stream(*to, *bytes),
        Step::TcpReceive { port } => net::receive_stream(&kept.tcp[port]),
        Step::Memory { mib } => Ok(mem::touch(*mib, &mut kept.memory)),
        Step::Sleep(time) => {
            thread::sleep(*time);
            Ok(Object::new().raw("slept_ns", clock::ns(*time)))
        }
        Step::Wait => wait(),
    }
}

fn wait() -> io::Result<Object> {
    let port = std::fs::File::open(WAIT_PORT)?;
    let bytes = io::BufReader::new(port).read_line(&mut String::new())?;
    Ok(Object::new().raw("bytes", bytes))
}
