//! Serves one request of a connection with hyper, so that the next one may be a viewer.
//!
//! hyper usually owns a connection from its first request to its last. A viewer must not pay for
//! hyper's buffers and state, so each request gets a separate hyper connection. It reads the bytes of
//! that request only, and is dropped once the answer is written.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use axum::{Router, body::Body};
use bytes::{Bytes, BytesMut};
use hyper::{
    body::{Body as HttpBody, Frame, SizeHint},
    server::conn::http1,
    service::{Service, service_fn},
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// The state of the connection after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The request was answered, and another one may follow.
    Answered,
    /// The connection must be closed.
    Closing,
}

/// Serves the request that starts in `bytes` and continues in `socket`. `len` is its length in bytes,
/// or `u64::MAX` if only hyper knows it. Bytes of later requests stay in `bytes`.
///
/// # Errors
/// If the connection fails, or the request is malformed.
pub(super) async fn serve_request(
    router: &Router,
    socket: &mut TcpStream,
    bytes: &mut BytesMut,
    len: u64,
    keep_alive: bool,
) -> hyper::Result<Outcome> {
    let progress = Arc::new(Progress::default());
    let mut left = len;
    let outcome = {
        let service = service_fn(|request| {
            let answer = TowerToHyperService::new(router.clone()).call(request);
            let progress = progress.clone();
            async move { answer.await.map(|response| response.map(|body| Watched { body, progress })) }
        });
        let io = RequestIo { socket, bytes, left: &mut left, progress: &progress };
        let connection = http1::Builder::new()
            .keep_alive(keep_alive)
            .serve_connection(TokioIo::new(io), service);
        let mut connection = std::pin::pin!(connection);
        std::future::poll_fn(|cx| match connection.as_mut().poll(cx) {
            Poll::Ready(result) => Poll::Ready(result.map(|()| Outcome::Closing)),
            Poll::Pending if progress.flushed.load(Ordering::Relaxed) => {
                Poll::Ready(Ok(Outcome::Answered))
            }
            Poll::Pending => Poll::Pending,
        })
        .await?
    };
    // The handler has not read the whole body, and the next request is behind it.
    Ok(if left > 0 { Outcome::Closing } else { outcome })
}

/// The progress of an answer.
#[derive(Debug, Default)]
struct Progress {
    /// hyper has dropped the answer's body: the answer is encoded.
    encoded: AtomicBool,
    /// hyper has flushed since. It does so only when its write buffer is empty: the answer is written.
    flushed: AtomicBool,
}

/// The body of an answer. Records when hyper drops it.
struct Watched {
    body: Body,
    progress: Arc<Progress>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.progress.encoded.store(true, Ordering::Relaxed);
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection that reads as one request.
struct RequestIo<'a> {
    socket: &'a mut TcpStream,
    /// Bytes already read from the socket.
    bytes: &'a mut BytesMut,
    /// Bytes of the request that hyper has not read.
    left: &'a mut u64,
    progress: &'a Progress,
}

impl AsyncRead for RequestIo<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if *this.left == 0 {
            // No waker is needed: hyper only has to write from here on.
            return Poll::Pending;
        }
        let room = usize::try_from(*this.left).unwrap_or(usize::MAX).min(buf.remaining());
        let count = match this.bytes.len() {
            0 => {
                let mut limited = ReadBuf::new(buf.initialize_unfilled_to(room));
                ready!(Pin::new(&mut *this.socket).poll_read(cx, &mut limited))?;
                let count = limited.filled().len();
                buf.advance(count);
                count
            }
            buffered => {
                let count = room.min(buffered);
                buf.put_slice(&this.bytes.split_to(count));
                count
            }
        };
        *this.left -= count as u64;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for RequestIo<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.socket).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // There is no buffer between hyper and the socket.
        if self.progress.encoded.load(Ordering::Relaxed) {
            self.progress.flushed.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.socket).poll_shutdown(cx)
    }
}
