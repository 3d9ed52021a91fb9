//! An HTTP-FLV client: receives a live stream from any server.

use std::{io, str::FromStr, time::Duration};

use hyper::{StatusCode, Uri};
use tokio::time::timeout;

use downpour_distribution::http_client::{self, Answer, HttpClientError};
use downpour_media::flv::{FlvError, FlvReader, Tag};

/// An HTTP-FLV stream that is being received.
#[derive(Debug)]
pub struct FlvClient {
    answer: Answer,
    reader: FlvReader,
    idle: Duration,
}

impl FlvClient {
    /// Connects and requests the stream. The server must answer within 10 s, and later send
    /// something at least once per `idle`.
    ///
    /// # Errors
    /// If the connection fails, or the answer is not 200.
    pub async fn connect(url: &FlvUrl, idle: Duration) -> Result<Self, FlvClientError> {
        let path = url.uri.path_and_query().map_or("/", |path| path.as_str());
        let authority = url.uri.authority().map_or("", |authority| authority.as_str());
        let answer = http_client::get((url.host(), url.port()), authority, path).await?;
        if answer.status() != StatusCode::OK {
            return Err(refusal(answer).await);
        }
        Ok(Self { answer, reader: FlvReader::new(), idle })
    }

    /// Waits for the next tag. Returns `None` once the server has ended the stream. Cancel-safe.
    ///
    /// # Errors
    /// If the connection breaks, sends nothing for the idle time, or sends something else than FLV.
    pub async fn next(&mut self) -> Result<Option<Tag>, FlvClientError> {
        loop {
            if let Some(tag) = self.reader.next_tag()? {
                return Ok(Some(tag));
            }
            let chunk = timeout(self.idle, self.answer.chunk());
            match chunk.await.map_err(|_| FlvClientError::Silent)?? {
                Some(bytes) => self.reader.push(&bytes),
                None if self.reader.is_inside_tag() => return Err(FlvClientError::CutShort),
                None => return Ok(None),
            }
        }
    }
}

/// `http://HOST[:PORT]/PATH`.
///
/// ```
/// use downpour::http::client::FlvUrl;
/// let url: FlvUrl = "http://[::1]/live/movie.flv?a=b".parse().unwrap();
/// assert_eq!((url.host(), url.port()), ("::1", 80));
/// assert!("https://host/live/movie.flv".parse::<FlvUrl>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlvUrl {
    uri: Uri,
}

impl FlvUrl {
    /// A host name or an address, without brackets.
    pub fn host(&self) -> &str {
        self.uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
    }

    /// The TCP port; 80 if the URL has none.
    pub fn port(&self) -> u16 {
        self.uri.port_u16().unwrap_or(80)
    }
}

impl FromStr for FlvUrl {
    type Err = InvalidFlvUrl;

    fn from_str(text: &str) -> Result<Self, InvalidFlvUrl> {
        match text.split_once("://") {
            Some(("http", _)) => {}
            Some(("https", _)) => return Err(InvalidFlvUrl("https is not supported, only http")),
            _ => return Err(InvalidFlvUrl("it does not start with http://")),
        }
        let uri: Uri = text.parse().map_err(|_| InvalidFlvUrl("it is malformed"))?;
        if uri.host().is_none_or(str::is_empty) {
            return Err(InvalidFlvUrl("it has no host"));
        }
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err(InvalidFlvUrl("a user and password are not supported"));
        }
        Ok(Self { uri })
    }
}

/// Why a text is not an [`FlvUrl`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an HTTP-FLV URL: {0}")]
pub struct InvalidFlvUrl(&'static str);

/// Why a stream cannot be received.
#[derive(Debug, thiserror::Error)]
pub enum FlvClientError {
    /// The URL cannot be requested.
    #[error(transparent)]
    Url(#[from] InvalidFlvUrl),
    /// The connection cannot be opened.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The server answered another status than 200.
    #[error("the server answered {status}{text}")]
    Refused {
        /// The status.
        status: StatusCode,
        /// Empty, or a colon and the first characters of the answer's body.
        text: String,
    },
    /// HTTP or the connection below it failed.
    #[error("the connection failed: {0}")]
    Http(#[from] hyper::Error),
    /// The body is not FLV.
    #[error(transparent)]
    Flv(#[from] FlvError),
    /// The connection was closed inside a tag.
    #[error("the server closed the connection inside a tag")]
    CutShort,
    /// The server sent nothing for too long.
    #[error("the server sent nothing in time")]
    Silent,
}

impl From<HttpClientError> for FlvClientError {
    fn from(error: HttpClientError) -> Self {
        match error {
            HttpClientError::Connect(error) => Self::Connect(error),
            HttpClientError::Http(error) => Self::Http(error),
            HttpClientError::Silent | HttpClientError::TooLong => Self::Silent,
            HttpClientError::InvalidTarget => {
                Self::Url(InvalidFlvUrl("it has a path that HTTP does not allow"))
            }
        }
    }
}

async fn refusal(answer: Answer) -> FlvClientError {
    let status = answer.status();
    let body = timeout(REFUSAL_TIMEOUT, answer.body(MAX_REFUSAL_LEN)).await;
    let text = body.ok().and_then(Result::ok).unwrap_or_default();
    let text: String = String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control()).collect();
    let text = if text.is_empty() { text } else { format!(": {text}") };
    FlvClientError::Refused { status, text }
}

const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_REFUSAL_LEN: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_says_what_is_wrong_with_a_url() {
        for (text, expected) in [
            ("ftp://host/x.flv", "http://"),
            ("host/x.flv", "http://"),
            ("https://host/x.flv", "https"),
            ("http://a:b@host/x.flv", "password"),
            ("http:///x.flv", "malformed"),
            ("http://host/a b", "malformed"),
        ] {
            let error = text.parse::<FlvUrl>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
