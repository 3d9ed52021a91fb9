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
    /// Connects and asks to publish; done when the server agrees.
    ///
    /// `timeout` bounds this, and later each wait for the server to take what is sent.
    ///
    /// # Errors
    /// [`ClientError::Rejected`] with what the server said, if it refuses.
    pub async fn connect(url: &RtmpUrl, timeout: Duration) -> Result<Self, ClientError> {
        Connection::open(url, Purpose::Publish, timeout).await.map(Self)
    }

    /// Sends a tag, and looks at what the server has said meanwhile.
    ///
    /// # Errors
    /// If the server refuses, ends the publication, closes, or takes nothing for too long.
    pub async fn send(&mut self, tag: &Tag) -> Result<(), ClientError> {
        self.0.session.send(tag)?;
        self.flush().await
    }

    /// Waits until the system has taken all that was sent, and looks at what the server has said:
    /// a publisher that has nothing to send calls this once in a while.
    ///
    /// # Errors
    /// As for [`Publisher::send`].
    pub async fn flush(&mut self) -> Result<(), ClientError> {
        self.0.drain()?;
        if let Err(error) = self.0.write().await {
            // A server that refuses closes: what it said first says more than a broken pipe.
            self.0.drain()?;
            return Err(error);
        }
        match self.0.events.iter().any(|event| matches!(event, ClientEvent::Ended)) {
            true => Err(ClientError::Closed),
            false => Ok(()),
        }
    }

    /// Ends the publication properly, and waits for the server to close.
    ///
    /// # Errors
    /// If the end could not be told.
    pub async fn close(self) -> Result<(), ClientError> {
        self.0.close().await
    }
}

/// A connection that plays.
#[derive(Debug)]
pub struct Player(Connection);

impl Player {
    /// Connects and asks to play; done when the server agrees or sends the first tag.
    ///
    /// # Errors
    /// As for [`Publisher::connect`].
    pub async fn connect(url: &RtmpUrl, timeout: Duration) -> Result<Self, ClientError> {
        Connection::open(url, Purpose::Play, timeout).await.map(Self)
    }

    /// Waits for the next tag, as long as it takes; `None` when the stream is over or the server
    /// has closed. Dropping the future loses nothing.
    ///
    /// # Errors
    /// If the connection breaks, or the server says something that is not RTMP.
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

    /// Tells the server that we have seen enough, and waits for it to close.
    ///
    /// # Errors
    /// If it could not be told.
    pub async fn close(self) -> Result<(), ClientError> {
        self.0.close().await
    }
}

/// Why a client's connection failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection, or it broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The server did not answer, or took nothing, for this long.
    #[error("the server did not answer within {0:?}")]
    Timeout(Duration),
    /// The server said no.
    #[error("the server refused: {code}: {description}")]
    Rejected {
        /// Such as `NetStream.Publish.BadName`.
        code: String,
        /// The server's words.
        description: String,
    },
    /// The server does not speak RTMP as we know it.
    #[error(transparent)]
    Protocol(SessionError),
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

/// A socket and the session on it.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    session: ClientSession,
    /// What one read brought and the caller has not seen: read only when this is empty, or by a
    /// publisher, which is sent next to nothing.
    events: VecDeque<ClientEvent>,
    /// What the socket has not taken yet.
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
        // Closing before the server has read everything could lose the end of it.
        let goodbye = async {
            while !self.over {
                self.read().await?;
                self.events.clear();
            }
            Ok::<_, ClientError>(())
        };
        // Whatever goes wrong from here on, the server has been told.
        let _ = time::timeout(GOODBYE, goodbye).await;
        Ok(())
    }

    /// Waits for bytes and works on them.
    async fn read(&mut self) -> Result<(), ClientError> {
        let Self { stream, session, events, .. } = self;
        match socket::read(stream, |bytes| feed(session, events, bytes)).await? {
            Some(fed) => fed?,
            None => self.over = true,
        }
        Ok(())
    }

    /// Works on the bytes that are there.
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

    /// Sends all that the session has written. Dropping the future loses nothing.
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

/// How long a server may take to close after us.
const GOODBYE: Duration = Duration::from_secs(1);
