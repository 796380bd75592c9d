//! Network steps: an address without ARP traffic, exact numbers of datagrams, streams of exact length.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use crate::clock;
use crate::json::Object;
use crate::script::{Datagrams, NetAddress};

/// Every address of the guest.
pub(crate) const ANY: Ipv4Addr = Ipv4Addr::UNSPECIFIED;
/// How often a receiver looks whether its time is over.
const RECEIVE_SLICE: Duration = Duration::from_millis(50);

/// Sets address, mask, "up" and the neighbour: `ip` for one interface, by the classic ioctls.
pub(crate) fn configure(net: &NetAddress) -> io::Result<Object> {
    let socket = UdpSocket::bind((ANY, 0))?;
    let mask = u32::MAX.checked_shl(32 - net.prefix_bits).unwrap_or(0);
    let up = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).expect("two low flags fit").to_ne_bytes();
    control(&socket, libc::SIOCSIFADDR, &interface(&net.device, &address(net.address)))?;
    control(&socket, libc::SIOCSIFNETMASK, &interface(&net.device, &address(mask.into())))?;
    control(&socket, libc::SIOCSIFFLAGS, &interface(&net.device, &up))?;
    if let Some((peer, mac)) = net.neighbour {
        control(&socket, libc::SIOCSARP, &neighbour(&net.device, peer, mac))?;
    }
    Ok(Object::new().text("address", &format!("{}/{}", net.address, net.prefix_bits)))
}

/// Sends datagrams.
pub(crate) fn send_datagrams(datagrams: &Datagrams) -> io::Result<Object> {
    let socket = UdpSocket::bind((ANY, 0))?;
    let payload = vec![0x5a; datagrams.size_bytes];
    let (start, mut sent, mut errors) = (Instant::now(), 0u64, 0u64);
    for number in 0..datagrams.count {
        thread::sleep((datagrams.gap * number).saturating_sub(start.elapsed()));
        match socket.send_to(&payload, datagrams.to) {
            Ok(_) => sent += 1,
            Err(_) => errors += 1,
        }
    }
    let bytes = sent * u64::try_from(payload.len()).unwrap_or(u64::MAX);
    Ok(Object::new()
        .raw("sent", sent)
        .raw("errors", errors)
        .raw("payload_bytes", bytes)
        .raw("wall_ns", clock::ns(start.elapsed())))
}

/// Counts the datagrams that arrive until the time is over, and those that came before the step.
pub(crate) fn receive_datagrams(socket: &UdpSocket, time: Duration) -> io::Result<Object> {
    socket.set_read_timeout(Some(RECEIVE_SLICE))?;
    let (start, mut received, mut bytes, mut buffer) = (Instant::now(), 0u64, 0usize, [0; 65536]);
    while start.elapsed() < time {
        if let Ok(length) = socket.recv(&mut buffer) {
            received += 1;
            bytes += length;
        }
    }
    Ok(Object::new().raw("received", received).raw("payload_bytes", bytes))
}

/// Sends that many bytes over one connection, and waits until the peer has read them.
pub(crate) fn send_stream(to: SocketAddrV4, bytes: usize) -> io::Result<Object> {
    let (start, mut left, buffer) = (Instant::now(), bytes, vec![0x5a; 65536]);
    let mut stream = TcpStream::connect(to)?;
    while left > 0 {
        left -= stream.write(&buffer[..left.min(buffer.len())])?;
    }
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(Object::new().raw("payload_bytes", bytes).raw("wall_ns", clock::ns(start.elapsed())))
}

/// Accepts one connection and reads it to its end.
pub(crate) fn receive_stream(listener: &TcpListener) -> io::Result<Object> {
    let (mut stream, peer) = listener.accept()?;
    let (mut bytes, mut buffer) = (0, vec![0; 65536]);
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(Object::new().raw("payload_bytes", bytes).text("peer", &peer.to_string())),
            length => bytes += length,
        }
    }
}

fn control(socket: &UdpSocket, request: libc::c_ulong, argument: &[u8]) -> io::Result<()> {
    // SAFETY: the socket is open; `argument` is as large as the structure of the request (`interface`: ifreq,
    // `neighbour`: arpreq), which these requests only read.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), request as _, argument.as_ptr()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct sockaddr_in` with port 0.
fn address(address: Ipv4Addr) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&2u16.to_ne_bytes()); // AF_INET
    bytes[4..8].copy_from_slice(&address.octets());
    bytes
}

/// `struct ifreq`: the name, and the data of the request behind it.
fn interface(device: &str, data: &[u8]) -> [u8; 40] {
    let mut bytes = [0; 40];
    bytes[..device.len()].copy_from_slice(device.as_bytes());
    bytes[16..16 + data.len()].copy_from_slice(data);
    bytes
}

/// `struct arpreq` of a permanent entry.
fn neighbour(device: &str, peer: Ipv4Addr, mac: [u8; 6]) -> [u8; 68] {
    let mut bytes = [0; 68];
    bytes[..16].copy_from_slice(&address(peer));
    bytes[16..18].copy_from_slice(&1u16.to_ne_bytes()); // ARPHRD_ETHER
    bytes[18..24].copy_from_slice(&mac);
    bytes[32..36].copy_from_slice(&6u32.to_ne_bytes()); // ATF_COM | ATF_PERM
    bytes[52..52 + device.len()].copy_from_slice(device.as_bytes());
    bytes
}
