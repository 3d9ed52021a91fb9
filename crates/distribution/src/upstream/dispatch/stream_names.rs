//! Look-ups of stream names in the cloud's HTTP API, for clouds that announce none.

use std::time::{Duration, Instant};

use super::{
    super::livestat::{self, LiveStream, LivestatError},
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
        // A connection that is being made may announce the stream soon.
        let wait = match (&self.connection, self.protocol()) {
            (Some(_), None) => NAME_WAIT,
            _ => Duration::ZERO,
        };
        let is_needed = self.streams.unnamed(now, wait).next().is_some()
            || self.streams.any_silent(now, SUSPECT_AFTER);
        let recent =
            self.last_name_lookup.is_some_and(|at| now.duration_since(at) < LOOK_UP_INTERVAL);
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
        let unnamed: Vec<_> = self.streams.unnamed(now, Duration::ZERO).collect();
        let listed: Vec<Ssrc> = found.iter().map(|stream| stream.ssrc).collect();
        for stream in found.into_iter().filter(|stream| unnamed.contains(&stream.ssrc)) {
            self.streams.stream_named(now, stream);
        }
        if !self.is_announced() {
            self.streams.retain_streams(now, &listed, SUSPECT_AFTER);
        }
    }

    fn is_announced(&self) -> bool {
        self.protocol() == Some(Protocol::Downpour)
    }
}

/// While the repair connection is being made, a stream waits this long for its announcement.
const NAME_WAIT: Duration = Duration::from_secs(1);
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(1);
/// A stream may have ended if it has been silent for this long.
const SUSPECT_AFTER: Duration = Duration::from_secs(3);
