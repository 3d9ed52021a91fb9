//! Asks a cloud's HTTP API which streams there are: how v0 names a publication.

use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, body::Bytes, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;

use downpour_media::StreamKey;
use downpour_repair::rtp::Ssrc;

/// One entry of `publishers` in `GET /stat/livestat`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveStream {
    /// The stream's name.
    pub key: StreamKey,
    /// The publication.
    pub ssrc: Ssrc,
    /// Unix time of media time 0, in milliseconds.
    pub start_unix_ms: u64,
}

/// Fetches the list from the API at `cloud`, a `host:port`, within a few seconds and a few megabytes. Entries that
/// name no usable stream are left out.
///
/// # Errors
/// If the API cannot be reached or answers something else; the text says which.
pub async fn fetch(cloud: &str) -> Result<Vec<LiveStream>, LivestatError> {
    tokio::time::timeout(TIMEOUT, request(cloud)).await.map_err(|_| LivestatError::Timeout)?
}

async fn request(cloud: &str) -> Result<Vec<LiveStream>, LivestatError> {
    let socket = TcpStream::connect(cloud).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(socket)).await?;
    let request = Request::get("/stat/livestat")
        .header(header::HOST, cloud)
        .header(header::CONNECTION, "close")
        .body(Empty::new())
        .map_err(|_| LivestatError::Malformed)?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
        parse(&body.map_err(|_| LivestatError::Malformed)?.to_bytes())
    };
    // The connection has to be driven while the answer is read; it ends with it.
    tokio::select! {
        answer = answer => answer,
        Err(error) = connection => Err(error.into()),
    }
}

fn parse(body: &[u8]) -> Result<Vec<LiveStream>, LivestatError> {
    let answer: Answer = serde_json::from_slice(body).map_err(|_| LivestatError::Malformed)?;
    if answer.status != 200 {
        return Err(LivestatError::Status(answer.status));
    }
    let data: Lists = serde_json::from_value(answer.data).map_err(|_| LivestatError::Malformed)?;
    let usable = |entry: Entry| {
        Some(LiveStream {
            key: entry.key.parse().ok()?,
            ssrc: Ssrc(entry.ssrc),
            start_unix_ms: u64::try_from(entry.start_time).unwrap_or(0),
        })
    };
    Ok(data.publishers.unwrap_or_default().into_iter().filter_map(usable).collect())
}

/// Why the list of streams is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum LivestatError {
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(#[from] std::io::Error),
    /// The connection broke.
    #[error("no answer: {0}")]
    Http(#[from] hyper::Error),
    /// Too slow.
    #[error("no answer within {} s", TIMEOUT.as_secs())]
    Timeout,
    /// The API says no.
    #[error("the API answers status {0}")]
    Status(i64),
    /// Something else lives there.
    #[error("the answer is not a list of streams")]
    Malformed,
}

#[derive(Deserialize)]
struct Answer {
    status: i64,
    #[serde(default)]
    data: serde_json::Value,
}

#[derive(Deserialize)]
struct Lists {
    publishers: Option<Vec<Entry>>,
}

#[derive(Deserialize)]
struct Entry {
    key: String,
    ssrc: u32,
    #[serde(default)]
    start_time: i64,
}

const TIMEOUT: Duration = Duration::from_secs(3);
const MAX_BODY: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_and_unusable_ones_left_out() {
        let body = br#"{"status":200,"data":{"publishers":[
            {"key":"live/movie","url":"","start_time":1700000000000,"ssrc":1020304,"stream_id":1},
            {"key":"nothing","ssrc":5}],"players":null}}"#;
        let expected = LiveStream {
            key: "live/movie".parse().unwrap(),
            ssrc: Ssrc(1_020_304),
            start_unix_ms: 1_700_000_000_000,
        };
        assert_eq!(parse(body).unwrap(), [expected]);
        let none = br#"{"status":200,"data":{"publishers":null,"players":null}}"#;
        assert_eq!(parse(none).unwrap(), []);
        let refused = parse(br#"{"status":404,"data":"no such room"}"#);
        assert!(matches!(refused, Err(LivestatError::Status(404))));
        assert!(matches!(parse(b"<html>"), Err(LivestatError::Malformed)));
    }
}
