//! Names of streams, looked up in the cloud's HTTP API.

use std::time::{Duration, Instant};

use super::{
    super::livestat::{self, LiveStream, LivestatError},
    Upstream,
};
use crate::protocol::Protocol;
use downpour_repair::rtp::Ssrc;

impl Upstream {
    /// Asks the HTTP API for names where the repair connection does not tell them.
    pub(super) fn look_up(&mut self, now: Instant) {
        let Some(cloud) = &self.cloud else { return };
        let told = self.protocol() == Some(Protocol::Downpour);
        // A connection that is just being made may tell soon.
        let wait = match (&self.repair, self.protocol()) {
            (Some(_), None) => WAIT_FOR_NAME,
            _ => Duration::ZERO,
        };
        let unnamed = !told && self.intake.unnamed(now, wait).next().is_some();
        let maybe_over = !told && self.intake.any_silent(now, SILENCE_IS_SUSPECT);
        let recently = self.last_lookup.is_some_and(|at| now.duration_since(at) < LOOK_UP_EVERY);
        if !(unnamed || maybe_over) || recently || self.lookup.is_some() {
            return;
        }
        self.last_lookup = Some(now);
        let address = cloud.api();
        self.lookup = Some(tokio::spawn(async move { livestat::fetch(&address).await }));
        self.begun = true;
    }

    pub(super) fn handle_lookup(&mut self, found: Result<Vec<LiveStream>, LivestatError>) {
        let now = Instant::now();
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                let reason = error.to_string();
                if reason != self.lookup_failure {
                    tracing::warn!("cannot ask the cloud's API for stream names: {reason}");
                    self.lookup_failure = reason;
                }
                return;
            }
        };
        self.lookup_failure.clear();
        let unnamed: Vec<_> = self.intake.unnamed(now, Duration::ZERO).collect();
        let listed: Vec<Ssrc> = found.iter().map(|stream| stream.ssrc).collect();
        for stream in found.into_iter().filter(|stream| unnamed.contains(&stream.ssrc)) {
            self.intake.stream_named(now, stream);
        }
        if self.protocol() != Some(Protocol::Downpour) {
            self.intake.retain_streams(now, &listed, SILENCE_IS_SUSPECT);
        }
    }
}

const WAIT_FOR_NAME: Duration = Duration::from_secs(1);
const LOOK_UP_EVERY: Duration = Duration::from_secs(1);
/// A stream that has been silent for so long may have ended without our being told.
const SILENCE_IS_SUSPECT: Duration = Duration::from_secs(3);
