//! Stream information from a cloud that announces none: names in its HTTP API, codec headers
//! over RTMP.

use std::time::{Duration, Instant};

use super::{
    super::livestat::{self, LiveStream, LivestatError, RTMP_PORT},
    Upstream,
};
use crate::protocol::Protocol;
use downpour_repair::rtp::Ssrc;

impl Upstream {
    /// Starts a look-up if a publication has no name or may have ended, unless the repair
    /// connection announces streams.
    pub(super) fn look_up_names(&mut self, now: Instant) {
        let Some(cloud) = &self.cloud else { return };
        if self.is_announced() {
            return;
        }
        // A connection that is being made may announce the stream soon, unless it is made again to a v0
        // cloud.
        let wait = match (&self.connection, self.protocol()) {
            (Some(_), None) if self.last_protocol != Some(Protocol::V0) => NAME_WAIT,
            _ => Duration::ZERO,
        };
        let is_needed = self.streams.unnamed(now, wait).next().is_some()
            || self.streams.any_silent(now, SUSPECT_AFTER);
        let is_new =
            self.streams.unnamed(now, wait).count() > self.streams.unnamed(now, NEW_FOR).count();
        let interval = if is_new { NEW_LOOK_UP_INTERVAL } else { LOOK_UP_INTERVAL };
        let recent =
            self.last_name_lookup.is_some_and(|at| now.saturating_duration_since(at) < interval);
        if !is_needed || recent || self.name_lookup.is_some() {
            return;
        }
        self.last_name_lookup = Some(now);
        let api = cloud.api();
        self.name_lookup = Some(tokio::spawn(async move { livestat::fetch(&api).await }));
        self.needs_poll = true;
    }

    /// Starts the streams that the API names, and ends the silent streams that it no longer lists.
    pub(super) fn handle_names(&mut self, answer: Result<Vec<LiveStream>, LivestatError>) {
        let now = Instant::now();
        let found = match answer {
            Ok(found) => found,
            Err(error) => {
                let error = error.to_string();
                if error != self.name_lookup_failure {
                    let api = self.cloud.as_ref().map(|cloud| cloud.api());
                    tracing::warn!(api, error, "stream name lookup failed");
                    self.name_lookup_failure = error;
                }
                return;
            }
        };
        self.name_lookup_failure.clear();
        // A publication that began after the question may have the SSRC of another, which the answer
        // names (a Go cloud that restarted).
        let asked = self.last_name_lookup.map_or(Duration::ZERO, |at| now - at.min(now));
        let unnamed: Vec<_> = self.streams.unnamed(now, asked).collect();
        let listed: Vec<Ssrc> = found.iter().map(|stream| stream.ssrc).collect();
        for stream in found.into_iter().filter(|stream| unnamed.contains(&stream.ssrc)) {
            self.rtmp_port = stream.rtmp_port.or(self.rtmp_port);
            self.streams.stream_named(now, stream);
        }
        self.fetch_headers();
        if !self.is_announced() {
            self.streams.retain_streams(now, &listed, SUSPECT_AFTER);
        }
        self.look_up_names(now);
    }

    /// Starts to fetch the headers that streams have asked for.
    pub(super) fn fetch_headers(&mut self) {
        while let Some((ssrc, key)) = self.streams.poll_header_fetch() {
            let (Some(cloud), Some(fetch)) = (&self.cloud, &self.settings.fetch_headers) else {
                continue;
            };
            let host = cloud.api_host.as_ref().unwrap_or(&cloud.host).clone();
            let headers = fetch(host, self.rtmp_port.unwrap_or(RTMP_PORT), key);
            self.header_fetches.spawn(async move {
                let headers = tokio::time::timeout(FETCH_TIMEOUT, headers).await;
                (ssrc, headers.unwrap_or_else(|_| Err("no answer in time".into())))
            });
            self.needs_poll = true;
        }
    }

    fn is_announced(&self) -> bool {
        self.protocol() == Some(Protocol::Downpour)
    }
}

/// While the repair connection is being made, a stream waits this long for its announcement.
const NAME_WAIT: Duration = Duration::from_secs(1);
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(1);
/// The same while a publication is new: the API may list it a moment after its first packet.
const NEW_LOOK_UP_INTERVAL: Duration = Duration::from_millis(200);
const NEW_FOR: Duration = Duration::from_secs(3);
/// Less than media is held for the headers.
const FETCH_TIMEOUT: Duration = Duration::from_millis(2500);
/// A stream may have ended if it has been silent for this long.
const SUSPECT_AFTER: Duration = Duration::from_secs(3);
