//! An RTMP client: publishes a stream, or plays one.

use std::{collections::VecDeque, io, time::Duration};

use bytes::BytesMut;
use tokio::{io::AsyncWriteExt, net::TcpStream, time};

use super::socket;
use downpour_media::flv::Tag;
use downpour_rtmp::{
    session::{ClientEvent, ClientSession, Purpose, SessionError},
    url::RtmpUrl,
};

/// A connection that publishes.
#[derive(Debug)]
pub struct Publisher(Connection);

impl Publisher {
    /// Connects and requests to publish. Returns once the server accepts.
    ///
    /// `timeout` limits this, and each later write.
    ///
    /// # Errors
    /// [`ClientError::Rejected`] with the server's reason if it refuses.
    pub async fn connect(url: &RtmpUrl, timeout: Duration) -> Result<Self, ClientError> {
        Connection::open(url, Purpose::Publish, timeout).await.map(Self)
    }

    /// Sends a tag, and handles messages of the server that have arrived.
    ///
    /// # Errors
    /// If the server refuses, ends the publication, closes, or reads nothing for the timeout.
    pub async fn send(&mut self, tag: &Tag) -> Result<(), ClientError> {
        self.0.session.send(tag)?;
        self.flush().await
    }

    /// Writes pending bytes, and handles messages of the server that have arrived. A publisher
    /// without tags to send should call this about once per second.
    ///
    /// # Errors
    /// As for [`Publisher::send`].
    pub async fn flush(&mut self) -> Result<(), ClientError> {
        self.0.drain()?;
        if let Err(error) = self.0.write().await {
            // A server that refuses closes the connection: its reason says more than a broken pipe.
            self.0.drain()?;
            return Err(error);
        }
        match self.0.events.iter().any(|event| matches!(event, ClientEvent::Ended)) {
            true => Err(ClientError::Closed),
            false => Ok(()),
        }
    }

    /// Ends the publication, and waits for the server to close.
    ///
    /// # Errors
    /// If the end cannot be sent.
    pub async fn close(self) -> Result<(), ClientError> {
        self.0.close().await
    }
}

/// A connection that plays.
#[derive(Debug)]
pub struct Player(Connection);

impl Player {
    /// Connects and requests to play. Returns once the server accepts or sends the first tag.
    ///
    /// # Errors
    /// As for [`Publisher::connect`].
    pub async fn connect(url: &RtmpUrl, timeout: Duration) -> Result<Self, ClientError> {
        Connection::open(url, Purpose::Play, timeout).await.map(Self)
    }

    /// Waits for the next tag, without a timeout. Returns `None` once the stream is over or the
    /// server has closed. Cancel-safe.
    ///
    /// # Errors
    /// If the connection breaks, or the server violates the protocol.
    pub async fn next(&mut self) -> Result<Option<Tag>, ClientError> {
        loop {
            self.0.write().await?;
            match self.0.events.pop_front() {
                Some(ClientEvent::Tag(tag)) => return Ok(Some(tag)),
                Some(ClientEvent::Started) => continue,
                Some(ClientEvent::Ended) => self.0.over = true,
                None => {}
            }
            if self.0.over {
                return Ok(None);
            }
            self.0.read().await?;
        }
    }

    /// Ends the playback, and waits for the server to close.
    ///
    /// # Errors
    /// If the end cannot be sent.
    pub async fn close(self) -> Result<(), ClientError> {
        self.0.close().await
    }
}

/// Plays a stream until its codec headers have come, and returns them and its metadata.
///
/// # Errors
/// As for [`Player::connect`] and [`Player::next`]; [`ClientError::NoHeaders`] if the server sends frames
/// without them.
pub async fn fetch_headers(url: &RtmpUrl) -> Result<Vec<Tag>, ClientError> {
    let mut player = Player::connect(url, HEADERS_TIMEOUT).await?;
    let (mut headers, mut frames) = (Vec::<Tag>::new(), 0);
    // A server sends the headers before the first frame of their kind.
    while frames < FRAMES_WITHOUT_HEADERS {
        let next = time::timeout(HEADERS_TIMEOUT, player.next()).await;
        match next.map_err(|_| ClientError::Timeout(HEADERS_TIMEOUT))?? {
            Some(tag) if tag.is_header() => headers.push(tag),
            Some(_) => frames += 1,
            None => break,
        }
    }
    match headers.iter().any(Tag::is_sequence_header) {
        true => Ok(headers),
        false => Err(ClientError::NoHeaders),
    }
}

/// Why a connection of a client failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection cannot be opened, or broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The server did not answer, or read nothing, for this time.
    #[error("the server did not answer within {0:?}")]
    Timeout(Duration),
    /// The server refused.
    #[error("the server refused: {code}: {description}")]
    Rejected {
        /// Such as `NetStream.Publish.BadName`.
        code: String,
        /// The server's explanation.
        description: String,
    },
    /// The server violated the protocol.
    #[error(transparent)]
    Protocol(SessionError),
    /// The stream has no codec headers.
    #[error("the server sends no codec headers")]
    NoHeaders,
    /// The server closed or ended the publication without a reason.
    #[error("the server closed the connection")]
    Closed,
}

impl From<SessionError> for ClientError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Rejected { code, description } => Self::Rejected { code, description },
            error => Self::Protocol(error),
        }
    }
}

/// A socket and its session.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    session: ClientSession,
    /// Events that the caller has not seen. Bounded by one read: a player reads only when it is empty,
    /// and a publisher receives next to nothing.
    events: VecDeque<ClientEvent>,
    /// Bytes to write.
    output: BytesMut,
    timeout: Duration,
    over: bool,
}

impl Connection {
    async fn open(url: &RtmpUrl, purpose: Purpose, timeout: Duration) -> Result<Self, ClientError> {
        let connect = async {
            let stream = TcpStream::connect((url.host(), url.port())).await?;
            stream.set_nodelay(true)?;
            let mut connection = Self {
                stream,
                session: ClientSession::new(url.clone(), purpose, rand::random()),
                events: VecDeque::new(),
                output: BytesMut::new(),
                timeout,
                over: false,
            };
            loop {
                connection.write().await?;
                match connection.events.front() {
                    Some(ClientEvent::Started) => {
                        connection.events.pop_front();
                        return Ok(connection);
                    }
                    Some(ClientEvent::Tag(_)) => return Ok(connection),
                    Some(ClientEvent::Ended) => return Err(ClientError::Closed),
                    None if connection.over => return Err(ClientError::Closed),
                    None => connection.read().await?,
                }
            }
        };
        time::timeout(timeout, connect).await.map_err(|_| ClientError::Timeout(timeout))?
    }

    async fn close(mut self) -> Result<(), ClientError> {
        self.session.finish()?;
        self.write().await?;
        self.stream.shutdown().await?;
        // Closing before the server has read everything could lose the last bytes.
        let goodbye = async {
            while !self.over {
                self.read().await?;
                self.events.clear();
            }
            Ok::<_, ClientError>(())
        };
        // A failure does not matter here: the end has been sent.
        let _ = time::timeout(GOODBYE, goodbye).await;
        Ok(())
    }

    /// Waits for bytes and handles them.
    async fn read(&mut self) -> Result<(), ClientError> {
        let Self { stream, session, events, .. } = self;
        match socket::read(stream, |bytes| feed(session, events, bytes)).await? {
            Some(fed) => fed?,
            None => self.over = true,
        }
        Ok(())
    }

    /// Handles the bytes that have arrived.
    fn drain(&mut self) -> Result<(), ClientError> {
        loop {
            let Self { stream, session, events, .. } = self;
            match socket::try_read(stream, |bytes| feed(session, events, bytes)) {
                Ok(Some(fed)) => fed?,
                Ok(None) => return Err(ClientError::Closed),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes the session's output. Cancel-safe.
    async fn write(&mut self) -> Result<(), ClientError> {
        self.output.unsplit(self.session.take_output());
        while !self.output.is_empty() {
            let written = time::timeout(self.timeout, self.stream.write_buf(&mut self.output));
            written.await.map_err(|_| ClientError::Timeout(self.timeout))??;
        }
        Ok(())
    }
}

fn feed(
    session: &mut ClientSession,
    events: &mut VecDeque<ClientEvent>,
    mut bytes: &[u8],
) -> Result<(), SessionError> {
    while let Some(event) = session.receive(&mut bytes)? {
        events.push_back(event);
    }
    Ok(())
}

/// Longer than a few round trips.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(2);
/// Frames of a stream after which no headers follow.
const FRAMES_WITHOUT_HEADERS: usize = 8;
/// Time that a server has to close.
const GOODBYE: Duration = Duration::from_secs(1);
