//! Client of a cloud's `GET /stat/livestat`, which gives a v0 publication its stream key.

use std::time::Duration;

use serde::Deserialize;

use crate::http_client::{self, HttpClientError};
use downpour_media::StreamKey;
use downpour_repair::rtp::Ssrc;

/// One entry of `publishers` in `GET /stat/livestat`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveStream {
    /// The stream's key.
    pub key: StreamKey,
    /// SSRC of the publication's RTP.
    pub ssrc: Ssrc,
    /// Unix time of media time 0, in milliseconds.
    pub start_unix_ms: u64,
    /// TCP port of the cloud's RTMP, where the entry has an RTMP URL.
    pub rtmp_port: Option<u16>,
}

/// Fetches the list of live streams from the API at `cloud`, a `host:port`. Entries without a valid
/// key are skipped.
///
/// # Errors
/// If the API cannot be reached, takes more than 3 s, or answers anything but a list of at most
/// 4 MiB.
pub async fn fetch(cloud: &str) -> Result<Vec<LiveStream>, LivestatError> {
    tokio::time::timeout(TIMEOUT, request(cloud)).await.map_err(|_| LivestatError::Timeout)?
}

async fn request(cloud: &str) -> Result<Vec<LiveStream>, LivestatError> {
    let answer = http_client::get(cloud, cloud, "/stat/livestat").await?;
    parse(&answer.body(MAX_BODY).await?)
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
            rtmp_port: rtmp_port(&entry.url),
        })
    };
    Ok(data.publishers.unwrap_or_default().into_iter().filter_map(usable).collect())
}

/// Returns the port of an `rtmp://` URL. Its host is the name by which the encoder knows the cloud.
fn rtmp_port(url: &str) -> Option<u16> {
    let authority = url.strip_prefix("rtmp://")?.split('/').next()?;
    match authority.rsplit_once(':') {
        Some((_, port)) if !port.ends_with(']') => port.parse().ok(),
        _ => Some(RTMP_PORT),
    }
}

/// Why there is no list of streams.
#[derive(Debug, thiserror::Error)]
pub enum LivestatError {
    /// There is no connection, or the answer is not complete.
    #[error(transparent)]
    Http(#[from] HttpClientError),
    /// The API did not answer in time.
    #[error("no answer within {} s", TIMEOUT.as_secs())]
    Timeout,
    /// The API answered with an error status.
    #[error("the API answers status {0}")]
    Status(i64),
    /// The answer is not in the API's format.
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
    #[serde(default)]
    url: String,
}

/// The port of RTMP where a URL has none.
pub(super) const RTMP_PORT: u16 = 1935;
const TIMEOUT: Duration = Duration::from_secs(3);
const MAX_BODY: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_without_a_valid_key_are_skipped() {
        let body = br#"{"status":200,"data":{"publishers":[
            {"key":"live/movie","url":"rtmp://h:1936/live/movie","start_time":1700000000000,"ssrc":1020304,"stream_id":1},
            {"key":"nothing","ssrc":5}],"players":null}}"#;
        let expected = LiveStream {
            key: "live/movie".parse().unwrap(),
            ssrc: Ssrc(1_020_304),
            start_unix_ms: 1_700_000_000_000,
            rtmp_port: Some(1936),
        };
        assert_eq!(parse(body).unwrap(), [expected]);
        let none = br#"{"status":200,"data":{"publishers":null,"players":null}}"#;
        assert_eq!(parse(none).unwrap(), []);
        let refused = parse(br#"{"status":404,"data":"no such room"}"#);
        assert!(matches!(refused, Err(LivestatError::Status(404))));
        let ports =
            ["rtmp://[::1]/live/a", "rtmp://[::1]:19/live/a", "rtmp://h:x/a", "http://h:80/a"];
        assert_eq!(ports.map(rtmp_port), [Some(1935), Some(19), None, None]);
        assert!(matches!(parse(b"<html>"), Err(LivestatError::Malformed)));
    }
}
