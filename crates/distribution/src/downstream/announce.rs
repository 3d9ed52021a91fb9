//! Fixed targets, which get every stream: name look-up, and the port announcement of wire v0.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use downpour_repair::fec::Fec;
use tokio::{sync::watch, task::JoinSet, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{fanout::Fanout, routes::FixedTarget};
use crate::address::Destination;

/// Keeps the addresses of the fan-out's fixed targets current and announces the ports to them every
/// [`ANNOUNCE_EVERY`]: an edge may start at any time and reads the ports from its first datagram only
/// (wire v0).
pub(super) async fn announce(
    fanout: Fanout,
    mut destinations: watch::Receiver<Vec<(Destination, Fec)>>,
    (quic_port, api_port): (u16, u16),
    shutdown: CancellationToken,
) {
    let mut datagram = BytesMut::with_capacity(8);
    datagram.put_slice(b"0001");
    datagram.put_u16(quic_port);
    datagram.put_u16(api_port);
    let datagram: Bytes = datagram.freeze();
    let mut targets = Targets::new(destinations.borrow_and_update().clone());
    fanout.routes().set_fixed(targets.known());
    let mut ticks = tokio::time::interval(ANNOUNCE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = targets.next() => if changed {
                fanout.routes().set_fixed(targets.known());
                fanout.send_to_fixed(datagram.clone());
            },
            Ok(()) = destinations.changed() => {
                targets.replace(destinations.borrow_and_update().clone());
                fanout.routes().set_fixed(targets.known());
                fanout.send_to_fixed(datagram.clone());
            }
            _ = ticks.tick() => {
                targets.look_up();
                fanout.send_to_fixed(datagram.clone());
            }
        }
    }
}

/// The destinations, and the address that each look-up found last.
struct Targets {
    destinations: Vec<(Destination, Fec)>,
    addresses: Vec<Option<SocketAddr>>,
    failed: HashSet<usize>,
    last_round: Option<Instant>,
    look_ups: JoinSet<(usize, Result<SocketAddr, String>)>,
}

impl Targets {
    /// Addresses are known at once, names after [`Targets::look_up`].
    fn new(destinations: Vec<(Destination, Fec)>) -> Self {
        let literal =
            |(d, _): &(Destination, Fec)| Some((d.host().parse::<IpAddr>().ok()?, d.port()).into());
        Self {
            addresses: destinations.iter().map(literal).collect(),
            destinations,
            failed: HashSet::new(),
            last_round: None,
            look_ups: JoinSet::new(),
        }
    }

    /// Replaces the destinations. Names that stay keep their addresses; the others are looked up.
    fn replace(&mut self, destinations: Vec<(Destination, Fec)>) {
        let before = std::mem::replace(self, Self::new(destinations));
        for ((destination, _), address) in self.destinations.iter().zip(&mut self.addresses) {
            let mut old = before.destinations.iter().zip(&before.addresses);
            let old =
                old.find(|((old, _), _)| old == destination).and_then(|(_, address)| *address);
            *address = address.or(old);
        }
        self.look_up();
    }

    fn known(&self) -> Vec<FixedTarget> {
        let known = self.addresses.iter().zip(&self.destinations);
        known
            .filter_map(|(addr, (_, fec))| Some(FixedTarget { addr: (*addr)?, fec: *fec }))
            .collect()
    }

    /// Starts the look-ups that are due: failed names at every call, the others every
    /// [`LOOK_UP_EVERY`]. They run in tasks, so that a slow name server delays nothing else.
    fn look_up(&mut self) {
        if !self.look_ups.is_empty() {
            return;
        }
        let all = self.last_round.is_none_or(|at| at.elapsed() >= LOOK_UP_EVERY);
        if all {
            self.last_round = Some(Instant::now());
        }
        for (i, (destination, _)) in self.destinations.iter().enumerate() {
            let is_name = destination.host().parse::<IpAddr>().is_err();
            if is_name && (all || self.failed.contains(&i)) {
                let (host, port) = (destination.host().to_owned(), destination.port());
                let current = self.addresses[i];
                self.look_ups.spawn(async move {
                    let found = tokio::net::lookup_host((host, port));
                    let found = match tokio::time::timeout(LOOK_UP_TIMEOUT, found).await {
                        Ok(Ok(addresses)) => {
                            choose(addresses, current).ok_or("no address".to_owned())
                        }
                        Ok(Err(error)) => Err(error.to_string()),
                        Err(_) => Err("the name server does not answer".to_owned()),
                    };
                    (i, found)
                });
            }
        }
    }

    /// Waits for the next look-up to end. Returns `true` if a known address changed. A name that
    /// cannot be found keeps its last address.
    async fn next(&mut self) -> bool {
        let Some(Ok((i, found))) = self.look_ups.join_next().await else {
            return std::future::pending().await;
        };
        let (destination, _) = &self.destinations[i];
        match found {
            Ok(address) => {
                if self.failed.remove(&i) {
                    tracing::info!(%destination, "address of a name in downstream.targets found again");
                }
                self.addresses[i].replace(address) != Some(address)
            }
            Err(why) => {
                if self.failed.insert(i) {
                    tracing::error!(
                        %destination,
                        error = why,
                        "no address for a name in downstream.targets"
                    );
                }
                false
            }
        }
    }
}

/// Chooses an address of a name: the current one if it is still among them, since the order of a name
/// server's answers must not cost an edge its stream; else IPv4 before IPv6, since edges listen on
/// IPv4 by default.
fn choose(
    addresses: impl Iterator<Item = SocketAddr>,
    current: Option<SocketAddr>,
) -> Option<SocketAddr> {
    addresses.min_by_key(|address| (Some(*address) != current, address.is_ipv6()))
}

const ANNOUNCE_EVERY: Duration = Duration::from_secs(5);
/// Names may move to other addresses.
const LOOK_UP_EVERY: Duration = Duration::from_secs(30);
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_are_known_at_once_and_names_after_their_look_up() {
        let destinations = ["127.0.0.1:5000", "localhost:5001", "no-such-name.invalid:5002"];
        let destinations = destinations.map(|d| (d.parse().unwrap(), Fec::Auto)).to_vec();
        let mut targets = Targets::new(destinations);
        let literal = FixedTarget { addr: ([127, 0, 0, 1], 5000).into(), fec: Fec::Auto };
        assert_eq!(targets.known(), [literal]);
        targets.look_up();
        let mut changes = 0;
        while !targets.look_ups.is_empty() {
            changes += usize::from(targets.next().await);
        }
        assert_eq!(changes, 1);
        assert_eq!((targets.known().len(), targets.failed.len()), (2, 1));
        assert!(targets.known()[1].addr.ip().is_loopback());
        // A name that can no longer be found keeps its address.
        targets.look_ups.spawn(async { (1, Err("gone".into())) });
        assert!(!targets.next().await);
        assert_eq!(targets.known().len(), 2);

        // Replaced destinations: a name that stays keeps its address.
        targets.replace(vec![
            ("localhost:5001".parse().unwrap(), Fec::Off),
            ("127.0.0.2:5000".parse().unwrap(), Fec::Off),
        ]);
        let known: Vec<_> = targets.known().iter().map(|target| target.addr.port()).collect();
        assert_eq!(known, [5001, 5000]);

        let [v6, a, b] = ["[::1]:1", "10.0.0.1:1", "10.0.0.2:1"].map(|a| a.parse().unwrap());
        assert_eq!(choose([v6, a, b].into_iter(), None), Some(a));
        assert_eq!(choose([v6, a, b].into_iter(), Some(b)), Some(b));
        assert_eq!(choose([v6].into_iter(), Some(b)), Some(v6));
    }
}
