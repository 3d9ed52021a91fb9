//! Sockets with full buffers, which count the datagrams that they drop.

use std::{
    collections::HashSet,
    fs, io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
};

use socket2::SockRef;

use crate::bare::set_udp;

/// Sockets on loopback with full receive buffers. The kernel drops and counts all their datagrams.
///
/// They enable UDP_GRO. Otherwise the kernel would segment messages in the sender's time, which a
/// network card does in hardware.
pub struct Sinks {
    sockets: Vec<UdpSocket>,
    ports: HashSet<u16>,
}

impl Sinks {
    pub fn new() -> io::Result<Self> {
        let mut sockets = Vec::new();
        let mut ports = HashSet::new();
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        for _ in 0..SOCKETS {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            SockRef::from(&socket).set_recv_buffer_size(0)?;
            set_udp(&socket, libc::UDP_GRO, 1)?;
            let port = socket.local_addr()?.port();
            for _ in 0..FILLING {
                sender.send_to(&[0], (Ipv4Addr::LOCALHOST, port))?;
            }
            ports.insert(port);
            sockets.push(socket);
        }
        Ok(Self { sockets, ports })
    }

    /// Returns `count` different addresses of the sockets.
    pub fn addresses(&self, count: usize) -> Vec<SocketAddrV4> {
        let ports: Vec<_> = self
            .sockets
            .iter()
            .filter_map(|socket| Some(socket.local_addr().ok()?.port()))
            .collect();
        let address = |(index, port): (usize, u16)| {
            let host = index / SOCKETS;
            SocketAddrV4::new(
                Ipv4Addr::new(127, 1, (host / 250) as u8, (host % 250) as u8 + 1),
                port,
            )
        };
        ports
            .into_iter()
            .cycle()
            .take(count)
            .enumerate()
            .map(|(i, port)| address((i, port)))
            .collect()
    }

    /// Number of dropped messages. A message with several segments counts once.
    pub fn dropped(&self) -> io::Result<u64> {
        let table = fs::read_to_string("/proc/net/udp")?;
        let drops = table.lines().skip(1).filter_map(|line| {
            let mut columns = line.split_whitespace();
            let (_, port) = columns.nth(1)?.split_once(':')?;
            let port = u16::from_str_radix(port, 16).ok()?;
            let drops = columns.next_back()?.parse::<u64>().ok()?;
            self.ports.contains(&port).then_some(drops)
        });
        Ok(drops.sum())
    }
}

const SOCKETS: usize = 40;
/// More one-byte datagrams than the smallest buffer holds.
const FILLING: usize = 64;
