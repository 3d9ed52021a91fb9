//! Publishes an FLV file to an RTMP server in real time, over a blocking socket.
//!
//! ```console
//! $ cargo run -p downpour-rtmp --example publish -- movie.flv rtmp://localhost/live/movie
//! ```

use std::{
    env,
    error::Error,
    fs::File,
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    process::{self, ExitCode},
    time::{Duration, Instant},
};

use downpour_media::{flv::FlvTags, timeline::Timeline};
use downpour_rtmp::session::{ClientEvent, ClientSession, Purpose};

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let [path, url] = &arguments[..] else {
        eprintln!("usage: publish FILE.flv rtmp://HOST[:PORT]/APP/NAME[?QUERY]");
        return ExitCode::from(2);
    };
    match publish(path, url) {
        Ok(count) => {
            println!("published {count} tags");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cannot publish {path} to {url}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the number of tags sent.
fn publish(path: &str, url: &str) -> Result<u64, Box<dyn Error>> {
    let tags = FlvTags::new(File::open(path)?);
    let mut connection = Connection::open(url)?;
    connection.wait_for_start(Instant::now() + TIMEOUT)?;

    let (start, mut timeline, mut count) = (Instant::now(), Timeline::default(), 0);
    for tag in tags {
        let tag = tag?;
        let due = start + Duration::from_millis(timeline.rebase(tag.timestamp()).into());
        // Receiving while waiting answers the server's pings.
        while let Some(wait) = due.checked_duration_since(Instant::now()).filter(|w| !w.is_zero()) {
            if let Some(ClientEvent::Ended) = connection.receive(wait)? {
                return Err("the server ended the publication".into());
            }
        }
        connection.session.send(&tag)?;
        connection.flush()?;
        count += 1;
    }
    connection.close()?;
    Ok(count)
}

struct Connection {
    socket: TcpStream,
    session: ClientSession,
}

impl Connection {
    fn open(url: &str) -> Result<Self, Box<dyn Error>> {
        let url = url.parse::<downpour_rtmp::url::RtmpUrl>()?;
        let socket = TcpStream::connect((url.host(), url.port()))?;
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        let session = ClientSession::new(url, Purpose::Publish, process::id().into());
        let mut connection = Self { socket, session };
        connection.flush()?;
        Ok(connection)
    }

    fn wait_for_start(&mut self, deadline: Instant) -> Result<(), Box<dyn Error>> {
        while let Some(wait) = deadline.checked_duration_since(Instant::now()) {
            match self.receive(wait.max(Duration::from_millis(1)))? {
                Some(ClientEvent::Started) => return Ok(()),
                Some(ClientEvent::Ended) => return Err("the server ended the connection".into()),
                Some(ClientEvent::Tag(_)) | None => {}
            }
        }
        Err("the server does not answer".into())
    }

    /// Receives for up to `wait`. Returns the last event, if there was one.
    fn receive(&mut self, wait: Duration) -> Result<Option<ClientEvent>, Box<dyn Error>> {
        self.socket.set_read_timeout(Some(wait))?;
        let mut buffer = [0; 4096];
        let mut input = match self.socket.read(&mut buffer) {
            Ok(0) => return Err("the server closed the connection".into()),
            Ok(len) => &buffer[..len],
            Err(error) if is_timeout(&error) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut last = None;
        while let Some(event) = self.session.receive(&mut input)? {
            last = Some(event);
        }
        self.flush()?;
        Ok(last)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.write_all(&self.session.take_output())
    }

    /// Ends the publication and waits until the server has read everything: closing a socket with
    /// unread input would discard the last tags.
    fn close(mut self) -> Result<(), Box<dyn Error>> {
        self.session.finish()?;
        self.flush()?;
        self.socket.shutdown(Shutdown::Write)?;
        self.socket.set_read_timeout(Some(TIMEOUT))?;
        match io::copy(&mut self.socket, &mut io::sink()) {
            Err(error) if !is_timeout(&error) => Err(error.into()),
            _ => Ok(()),
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

const TIMEOUT: Duration = Duration::from_secs(10);
