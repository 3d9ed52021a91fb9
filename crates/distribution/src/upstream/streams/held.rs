//! Streams whose reception ended without their publication: the cloud, or the connection to it, is
//! gone. Their viewers stay for [`Settings::hold`](super::Settings::hold), in case it comes back.
//!
//! ```text
//! received ── the cloud restarts or is out of reach ─► held ── the key starts again ─► received
//!                                                       └── the time is over ────────► ended
//! ```

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use downpour_hub::{PublicationInfo, Publisher};
use downpour_media::StreamKey;
use downpour_repair::control::StreamInfo;

use super::{ReceivedStream, Streams};

/// Publishers of held streams, by key. Dropping one ends its stream.
#[derive(Default)]
pub(super) struct HeldStreams(HashMap<StreamKey, (Instant, Publisher)>);

impl HeldStreams {
    /// Ends the streams that have waited long enough.
    pub(super) fn expire(&mut self, now: Instant) {
        self.0.retain(|key, (until, _)| {
            if *until <= now {
                tracing::info!(stream = %key, "stream did not come back; its viewers are closed");
            }
            *until > now
        });
    }
}

impl Streams {
    /// Sets whether there is a connection on which the cloud announces streams and their ends.
    pub fn set_announced(&mut self, now: Instant, announced: bool) {
        self.announced = announced;
        self.cloud_closes &= !announced;
        for stream in self.streams.values_mut() {
            // A new connection announces each stream that is still live.
            stream.unconfirmed_since = announced.then_some(now);
        }
    }

    /// The cloud has said that it shuts down: the ends that it announces now are its own.
    pub fn cloud_closes(&mut self) {
        self.cloud_closes = true;
    }

    /// Holds the publication of a stream that is no longer received.
    pub(super) fn hold(&mut self, now: Instant, stream: ReceivedStream) {
        let hold = self.settings.hold;
        if hold > Duration::ZERO && self.held.0.len() < self.settings.max_streams {
            self.held.0.insert(stream.key, (now + hold, stream.publisher));
        }
    }

    /// Returns the publisher of a stream that starts: that of the held stream under its key, or a new
    /// one. `None` if the key is taken.
    pub(super) fn publisher_for(&mut self, up: &StreamInfo) -> Option<Publisher> {
        if let Some((_, mut publisher)) = self.held.0.remove(&up.key) {
            tracing::info!(stream = %up.key, ssrc = %up.ssrc, "stream is back; its viewers go on");
            publisher.splice_with(up.headers.clone());
            return Some(publisher);
        }
        let mut info = PublicationInfo::starting_at(up.start_unix_ms);
        if let Some(id) = up.publication {
            info.id = id;
        }
        info.headers = up.headers.clone();
        match self.hub.publish_with(up.key.clone(), info) {
            Ok(publisher) => Some(publisher),
            Err(error) => {
                tracing::error!(stream = %up.key, %error, "stream not received");
                None
            }
        }
    }
}
