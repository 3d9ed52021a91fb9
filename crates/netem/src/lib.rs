//! A seeded bad network for tests, benches and demos: loss, bursts, delay, jitter, reordering,
//! duplication, rate limits and blackouts.
//!
//! [`Link`] is one direction of a path, without sockets or a clock: the same seed and input give
//! the same outcome. [`UdpRelay`] puts two links between each client and an upstream UDP address.
//!
//! ```
//! use std::time::{Duration, Instant};
//!
//! use bytes::Bytes;
//! use downpour_netem::{Link, LinkSettings};
//!
//! let settings = LinkSettings { delay: Duration::from_millis(20), ..LinkSettings::lossy(0.05) };
//! let mut link = Link::new(settings, 42);
//! let start = Instant::now();
//! for _ in 0..1000 {
//!     link.send(start, Bytes::from_static(b"datagram"));
//! }
//! assert_eq!(link.next_deadline(), Some(start + Duration::from_millis(20)));
//! let delivered = std::iter::from_fn(|| link.poll_output(start + Duration::from_secs(1))).count();
//! assert_eq!(delivered as u64, 1000 - link.stats().dropped_random);
//! assert!((920..980).contains(&delivered));
//! ```
//!
//! With a relay, the node under test connects to [`UdpRelay::local_addr`] instead of its peer:
//!
//! ```no_run
//! use downpour_netem::{LinkSettings, RelaySettings, UdpRelay};
//!
//! # async fn example() -> std::io::Result<()> {
//! let upstream = "127.0.0.1:5004".parse().unwrap();
//! let relay = UdpRelay::start(upstream, RelaySettings::symmetric(LinkSettings::lossy(0.02), 1))?;
//! println!("send to {}", relay.local_addr());
//! relay.set_settings(LinkSettings::cut(), LinkSettings::cut());
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs, unreachable_pub)]

pub mod link;
pub mod relay;

pub use link::{Blackout, Bursts, Link, LinkSettings, LinkStats};
pub use relay::{RelaySettings, RelayStats, UdpRelay};
