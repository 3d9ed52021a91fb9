//! A small HTTP client and a parser of metrics.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use serde_json::Value;

/// A response with its whole body.
pub struct Answer {
    pub status: u16,
    pub body: String,
}

/// Requests `path` and reads the whole response.
pub fn get(addr: SocketAddr, path: &str) -> io::Result<Answer> {
    let mut socket = request(addr, path)?;
    let head = read_head(&mut socket)?;
    let mut body = String::new();
    socket.read_to_string(&mut body)?;
    Ok(Answer { status: head.status, body })
}

/// Requests `path` and parses the JSON body.
pub fn get_json(addr: SocketAddr, path: &str) -> io::Result<(u16, Value)> {
    let Answer { status, body } = get(addr, path)?;
    let value = serde_json::from_str(&body).map_err(io::Error::other)?;
    Ok((status, value))
}

/// Connects and sends a request. The caller reads the response.
pub fn request(addr: SocketAddr, path: &str) -> io::Result<TcpStream> {
    let mut socket = TcpStream::connect_timeout(&addr, TIMEOUT)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n")?;
    Ok(socket)
}

/// The head of a response.
pub struct Head {
    pub status: u16,
    pub fields: String,
}

/// Reads the head of a response and no byte of its body.
pub fn read_head(socket: &mut TcpStream) -> io::Result<Head> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > HEAD_MAX || socket.read(&mut byte)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "truncated head"));
        }
        head.push(byte[0]);
    }
    let fields = String::from_utf8(head).map_err(io::Error::other)?.to_ascii_lowercase();
    let status = fields.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("no status in {fields}")))?;
    Ok(Head { status, fields })
}

/// One scrape in Prometheus's text format.
pub struct Metrics(String);

impl Metrics {
    pub fn scrape(addr: SocketAddr) -> io::Result<Self> {
        get(addr, "/metrics").map(|answer| Self(answer.body))
    }

    /// The sum of all series with this name and these labels; 0 if there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let series = self.0.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (found, has) = series.split_once('{').unwrap_or((series, ""));
            let all = labels.iter().all(|(key, value)| has.contains(&format!("{key}=\"{value}\"")));
            (found == name && all).then(|| value.parse::<f64>().ok()).flatten()
        });
        series.sum()
    }

    /// `true` if a series with this name exists: a test must not pass because a metric was renamed.
    pub fn has(&self, name: &str) -> bool {
        self.0.lines().any(|line| line.split(['{', ' ']).next() == Some(name))
    }

    pub fn text(&self) -> &str {
        &self.0
    }
}

const TIMEOUT: Duration = Duration::from_secs(10);
const HEAD_MAX: usize = 64 * 1024;
