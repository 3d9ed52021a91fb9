//! The HTTP client of everything that a node fetches: one GET over a new connection.
//!
//! Plain HTTP/1.1. Redirects are not followed: the caller sees their status. Needs hyper and tokio
//! and nothing else of this crate.

use std::{io, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1,
    header::{CONNECTION, HOST, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpStream, ToSocketAddrs},
    task::JoinHandle,
    time::timeout,
};

/// The answer to a request. Its connection closes when this is dropped.
#[derive(Debug)]
pub struct Answer {
    response: Response<Incoming>,
    _connection: AbortOnDrop,
}

/// Connects to `address` and asks for `path`, which begins with a slash. `authority` is the value of
/// the `Host` header.
///
/// # Errors
/// If there is no connection, or no answer that is HTTP within 10 s.
pub async fn get(
    address: impl ToSocketAddrs,
    authority: &str,
    path: &str,
) -> Result<Answer, HttpClientError> {
    let asking = async {
        let socket = TcpStream::connect(address).await.map_err(HttpClientError::Connect)?;
        socket.set_nodelay(true).map_err(HttpClientError::Connect)?;
        let request = Request::get(path)
            .header(HOST, authority)
            .header(USER_AGENT, concat!("downpour/", env!("CARGO_PKG_VERSION")))
            .header(CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .map_err(|_| HttpClientError::InvalidTarget)?;
        let (mut sender, connection) = http1::Builder::new()
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD_LEN)
            .handshake(TokioIo::new(socket))
            .await?;
        let connection = AbortOnDrop(tokio::spawn(async move {
            // Whoever reads the answer sees the error as well.
            let _ = connection.await;
        }));
        let response = sender.send_request(request).await?;
        Ok(Answer { response, _connection: connection })
    };
    timeout(ANSWER_TIMEOUT, asking).await.map_err(|_| HttpClientError::Silent)?
}

impl Answer {
    /// The status.
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// The next bytes of the body; `None` at its end. Cancel-safe.
    ///
    /// # Errors
    /// If the connection fails.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, HttpClientError> {
        while let Some(frame) = self.response.body_mut().frame().await {
            // Frames without data are trailers.
            if let Ok(bytes) = frame?.into_data() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// The whole body, of at most `max_len` bytes.
    ///
    /// # Errors
    /// If the body is longer, or the connection fails.
    pub async fn body(self, max_len: usize) -> Result<Bytes, HttpClientError> {
        let Self { response, _connection } = self;
        match Limited::new(response.into_body(), max_len).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) => Err(match error.downcast::<hyper::Error>() {
                Ok(error) => HttpClientError::Http(*error),
                Err(_) => HttpClientError::TooLong,
            }),
        }
    }
}

/// Why there is no answer, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum HttpClientError {
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// HTTP or the connection below it failed.
    #[error("the connection failed: {0}")]
    Http(#[from] hyper::Error),
    /// The server does not answer in time.
    #[error("the server is silent")]
    Silent,
    /// The path or the authority holds characters that HTTP does not allow.
    #[error("the path or host is not valid in HTTP")]
    InvalidTarget,
    /// The body is longer than allowed.
    #[error("the answer is too long")]
    TooLong,
}

#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Time to connect and to read the head of the answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_HEADERS: usize = 100;
/// The longest head of an answer; also the most that is read from the socket at once.
const MAX_HEAD_LEN: usize = 64 << 10;
