//! Reads from a socket into a buffer that all connections of a thread share.

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

/// Waits for bytes and passes them to `take`. Returns `None` at the end of the stream. Cancel-safe.
///
/// The buffer belongs to the thread, so an idle connection holds none.
pub(super) async fn read<T>(
    stream: &mut TcpStream,
    mut take: impl FnMut(&[u8]) -> T,
) -> io::Result<Option<T>> {
    poll_fn(|cx| poll_read(stream, cx, &mut take)).await
}

/// As [`read`], for callers that poll other futures too.
pub(super) fn poll_read<T>(
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

/// As [`read`], but fails with [`io::ErrorKind::WouldBlock`] if no bytes have arrived.
pub(super) fn try_read<T>(
    stream: &TcpStream,
    mut take: impl FnMut(&[u8]) -> T,
) -> io::Result<Option<T>> {
    with_scratch(|scratch| {
        let len = stream.try_read(scratch)?;
        Ok(match scratch.get(..len) {
            Some(bytes) if len > 0 => Some(take(bytes)),
            _ => None,
        })
    })
}

/// Calls `f` with the thread's buffer. A nested call gets a new buffer.
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

/// Bytes per system call: a few key frames, and few enough that one connection does not delay the
/// others.
const SCRATCH_LEN: usize = 64 << 10;
