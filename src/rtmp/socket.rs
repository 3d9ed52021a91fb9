//! Reading from a socket without a buffer of its own.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    net::TcpStream,
};

/// Waits for bytes and hands them to `take`; `None` at the end of the stream. Dropping the future
/// loses nothing.
///
/// The bytes stand in a buffer of the thread, so a connection that waits holds none: ten thousand
/// idle ones cost little.
pub async fn read<T>(
    stream: &mut TcpStream,
    mut take: impl FnMut(&[u8]) -> T,
) -> io::Result<Option<T>> {
    poll_fn(|cx| poll_read(stream, cx, &mut take)).await
}

/// As [`read`], for who polls other things beside it.
pub fn poll_read<T>(
    stream: &mut TcpStream,
    cx: &mut Context<'_>,
    mut take: impl FnMut(&[u8]) -> T,
) -> Poll<io::Result<Option<T>>> {
    with_scratch(|scratch| {
        let mut buffer = ReadBuf::new(scratch);
        ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
        let bytes = buffer.filled();
        Poll::Ready(Ok(if bytes.is_empty() { None } else { Some(take(bytes)) }))
    })
}

/// As [`read`], for what is there already; otherwise [`io::ErrorKind::WouldBlock`].
pub fn try_read<T>(stream: &TcpStream, mut take: impl FnMut(&[u8]) -> T) -> io::Result<Option<T>> {
    with_scratch(|scratch| {
        let len = stream.try_read(scratch)?;
        Ok(match scratch.get(..len) {
            Some(bytes) if len > 0 => Some(take(bytes)),
            _ => None,
        })
    })
}

/// Lends the thread's buffer. A call within the call would get a new one.
fn with_scratch<T>(f: impl FnOnce(&mut [u8]) -> T) -> T {
    thread_local! {
        static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    }
    let mut scratch = SCRATCH.take();
    scratch.resize(SCRATCH_LEN, 0);
    let result = f(&mut scratch);
    SCRATCH.set(scratch);
    result
}

/// What one system call may bring: a few key frames' worth, and small enough that one connection
/// does not hold up the others.
const SCRATCH_LEN: usize = 64 << 10;
