//! The floor: writes the stream to each connection once per frame, and does nothing else.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    time::{Duration, Instant},
};

use super::media::{FRAME, Media};

/// Serves at `address` until it is killed.
pub fn run(address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    let (sender, accepted) = mpsc::channel();
    std::thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            if greet(&mut socket).is_ok() && sender.send(socket).is_err() {
                return;
            }
        }
    });
    let mut start = Instant::now();
    let mut sockets: Vec<TcpStream> = Vec::new();
    let mut bytes = Vec::new();
    for due in Media::new() {
        bytes.extend_from_slice(due.tag.framed());
        if due.tag.kind() != downpour_media::flv::TagKind::Video {
            continue;
        }
        let now = Instant::now();
        std::thread::sleep((start + due.at).saturating_duration_since(now));
        // After a stall, the schedule shifts instead of catching up.
        let late = now.saturating_duration_since(start + due.at);
        if late > 5 * FRAME {
            start += late;
        }
        sockets.extend(accepted.try_iter());
        sockets.retain_mut(|socket| socket.write_all(&bytes).is_ok());
        bytes.clear();
    }
    Ok(())
}

fn greet(socket: &mut TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut head = [0; 1024];
    match socket.read(&mut head)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n"),
    }
}
