//! Connection slots of one listener. They limit its connections, in total and per client address.
//!
//! A connection is in one of three states:
//!
//! ```text
//! admitted ─► idle ◄──► busy        idle: no request yet, or kept alive between two requests
//!              │ ▲        │         busy: a request is being served
//!              ▼ └────────┼─┐       pinned: a viewer or a publisher; see admission for limits
//!          displaced    pinned
//! ```
//!
//! - The total counts all three states. An address's share counts idle and busy connections only:
//!   many viewers or publishers may be behind one address.
//! - If the total or the share is used up, a new connection takes the slot of an idle one: of one that
//!   is kept alive if there is one, otherwise of one that has sent no complete request, otherwise of a
//!   viewer whose stream is not live; in each case of the one that has been idle longest. So idle
//!   connections never prevent a client with a request from being served.
//! - If none is idle, the new connection takes a reserved slot, if there are any, or is refused. In a
//!   reserved slot only the requests of monitoring are served, and nothing is pinned.
//! - Loopback addresses have no share: proxies and monitoring run there.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Instant,
};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Limits of the connections of one listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotLimits {
    /// In total, at least 1.
    pub total: usize,
    /// Per client address (an IPv6 /64 is one address), not counting viewers and publishers.
    pub per_address: usize,
    /// Slots beyond the total, for connections that find all others in use.
    pub reserved: usize,
}

impl SlotLimits {
    /// `total` connections, of which one address may have `per_address`; `None` is half.
    pub fn new(total: usize, per_address: Option<usize>) -> Self {
        let total = total.max(1);
        let per_address = per_address.unwrap_or(total.div_ceil(2)).max(1);
        Self { total, per_address, reserved: 0 }
    }

    /// The same with reserved slots.
    pub fn with_reserved(self, reserved: usize) -> Self {
        Self { reserved, ..self }
    }
}

/// Converts a setting to the `per_address` of [`SlotLimits::new`]: 0 is the default.
pub fn share(setting: usize) -> Option<usize> {
    (setting > 0).then_some(setting)
}

/// Why a connection is idle. Connections of the first kind are displaced first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Idle {
    /// A request was answered, and none has followed.
    KeptAlive,
    /// No complete request has arrived.
    NoRequest,
    /// A viewer waits for a stream that is not live.
    NotLive,
}

/// Why a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum SlotRefusal {
    /// All slots are in use, and no connection is idle.
    #[error("all connection slots are in use")]
    Total,
    /// All slots of the client's address are in use, and none of its connections is idle.
    #[error("all connection slots of this address are in use")]
    Address,
}

/// The slots of one listener; clones share them.
#[derive(Debug, Clone)]
pub(super) struct Slots(Arc<Mutex<Table<Arc<Notify>>>>);

impl Slots {
    pub(super) fn new(limits: SlotLimits) -> Self {
        Self(Arc::new(Mutex::new(Table::new(limits))))
    }

    /// Takes a slot. Returns it, and `true` if another connection was displaced.
    pub(super) fn admit(&self, now: Instant, address: IpAddr) -> Result<(Slot, bool), SlotRefusal> {
        let signal = Arc::new(Notify::new());
        let mut table = self.0.lock();
        let (id, displaced) = table.admit(now, address, signal.clone())?;
        let is_reserved = table.is_reserved(id);
        drop(table);
        if let Some(displaced) = &displaced {
            displaced.notify_one();
        }
        let (slots, id, signal) = (self.clone(), Some(id), Some(signal));
        let slot = Slot { slots, id, signal, is_reserved };
        Ok((slot, displaced.is_some()))
    }
}

/// The slot of a connection. Dropping it frees the slot.
#[derive(Debug)]
pub struct Slot {
    slots: Slots,
    /// `None` while it is pinned.
    id: Option<u64>,
    signal: Option<Arc<Notify>>,
    is_reserved: bool,
}

impl Slot {
    /// `true` if it is one of the reserved slots. Such a slot must not be pinned.
    pub fn is_reserved(&self) -> bool {
        self.is_reserved
    }

    /// The only slot of a listener.
    #[cfg(test)]
    pub(crate) fn alone() -> Self {
        let slots = Slots::new(SlotLimits::new(1, None));
        slots.admit(Instant::now(), Ipv6Addr::LOCALHOST.into()).expect("it is free").0
    }

    /// Marks the connection as serving a request. Returns `false` if it has been displaced.
    #[must_use]
    pub fn set_busy(&self) -> bool {
        self.id.is_none_or(|id| self.slots.0.lock().set_idle(id, None))
    }

    /// Marks the connection as waiting for its client. Returns `false` if it has been displaced.
    pub fn set_idle(&self, now: Instant, idle: Idle) -> bool {
        self.id.is_none_or(|id| self.slots.0.lock().set_idle(id, Some((idle, now))))
    }

    /// Marks the connection as a publisher or viewer until [`Slot::unpin`]. Returns `false` if it has
    /// been displaced.
    #[must_use]
    pub fn pin(&mut self) -> bool {
        let Some(id) = self.id else { return true };
        let pinned = self.slots.0.lock().pin(id);
        if pinned {
            self.id = None;
        }
        pinned
    }

    /// As [`Slot::pin`], but permanently. Frees memory.
    #[must_use]
    pub fn pin_for_good(&mut self) -> bool {
        let pinned = self.pin();
        if pinned {
            self.signal = None;
        }
        pinned
    }

    /// Marks the connection as an idle one of `address`, even if that exceeds the address's share.
    pub fn unpin(&mut self, now: Instant, address: IpAddr) {
        if let (None, Some(signal)) = (self.id, &self.signal) {
            self.id = Some(self.slots.0.lock().unpin(now, address, signal.clone()));
        }
    }

    /// `true` if another connection has taken the slot. Close the connection then.
    pub fn is_displaced(&self) -> bool {
        self.id.is_some_and(|id| !self.slots.0.lock().entries.contains_key(&id))
    }

    /// Waits until the connection is displaced. If there are several such futures, one completes.
    pub fn displaced(&self) -> impl Future<Output = ()> + Send + use<> {
        let signal = self.signal.clone();
        async move {
            match signal {
                Some(signal) => signal.notified().await,
                None => std::future::pending().await,
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut table = self.slots.0.lock();
        match self.id {
            Some(id) => drop(table.remove(id)),
            None => table.pinned -= 1,
        }
    }
}

/// The state of [`Slots`], without I/O and clock. `S` notifies a displaced connection.
#[derive(Debug)]
struct Table<S> {
    limits: SlotLimits,
    next_id: u64,
    /// Number of pinned connections. They have no entry.
    pinned: usize,
    entries: HashMap<u64, Entry<S>>,
    /// Number of entries in reserved slots.
    reserved: usize,
    idle: IdleQueue,
    addresses: HashMap<IpAddr, AddressSlots>,
}

#[derive(Debug)]
struct Entry<S> {
    /// The address in whose share it counts; `None` for loopback.
    address: Option<IpAddr>,
    /// `None` while it is busy.
    idle: Option<(Idle, Instant)>,
    is_reserved: bool,
    signal: S,
}

#[derive(Debug, Default)]
struct AddressSlots {
    count: usize,
    idle: IdleQueue,
}

/// Idle connections. The first one is displaced first.
type IdleQueue = BTreeSet<(Idle, Instant, u64)>;

impl<S> Table<S> {
    fn new(limits: SlotLimits) -> Self {
        Self {
            limits,
            next_id: 0,
            pinned: 0,
            entries: HashMap::new(),
            reserved: 0,
            idle: IdleQueue::new(),
            addresses: HashMap::new(),
        }
    }

    /// Returns the id of the new slot, and the signal of the connection that was displaced.
    fn admit(
        &mut self,
        now: Instant,
        address: IpAddr,
        signal: S,
    ) -> Result<(u64, Option<S>), SlotRefusal> {
        let address = accountable(address);
        let share = address.and_then(|address| self.addresses.get(&address));
        let displaced = match share.filter(|share| share.count >= self.limits.per_address) {
            Some(share) => Some(share.idle.first().ok_or(SlotRefusal::Address)?.2),
            None if self.is_full() => match self.idle.first() {
                Some((.., id)) => Some(*id),
                None if self.reserved < self.limits.reserved => None,
                None => return Err(SlotRefusal::Total),
            },
            None => None,
        };
        let displaced = displaced.and_then(|id| self.remove(id));
        Ok((self.insert(now, address, signal), displaced))
    }

    fn insert(&mut self, now: Instant, address: Option<IpAddr>, signal: S) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let is_reserved = self.is_full() && self.limits.reserved > 0;
        self.reserved += usize::from(is_reserved);
        if let Some(address) = address {
            self.addresses.entry(address).or_default().count += 1;
        }
        self.entries.insert(id, Entry { address, idle: None, is_reserved, signal });
        self.set_idle(id, Some((Idle::NoRequest, now)));
        id
    }

    /// `true` if all slots that are not reserved are in use.
    fn is_full(&self) -> bool {
        self.entries.len() + self.pinned - self.reserved >= self.limits.total
    }

    fn is_reserved(&self, id: u64) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.is_reserved)
    }

    /// Returns `false` if the connection has been displaced.
    fn set_idle(&mut self, id: u64, idle: Option<(Idle, Instant)>) -> bool {
        let Some(entry) = self.entries.get_mut(&id) else { return false };
        let mut share = entry.address.and_then(|address| self.addresses.get_mut(&address));
        if let Some((kind, since)) = std::mem::replace(&mut entry.idle, idle) {
            self.idle.remove(&(kind, since, id));
            if let Some(share) = &mut share {
                share.idle.remove(&(kind, since, id));
            }
        }
        if let Some((kind, since)) = idle {
            self.idle.insert((kind, since, id));
            if let Some(share) = &mut share {
                share.idle.insert((kind, since, id));
            }
        }
        true
    }

    fn pin(&mut self, id: u64) -> bool {
        let pinned = self.remove(id).is_some();
        self.pinned += usize::from(pinned);
        pinned
    }

    fn unpin(&mut self, now: Instant, address: IpAddr, signal: S) -> u64 {
        self.pinned -= 1;
        self.insert(now, accountable(address), signal)
    }

    fn remove(&mut self, id: u64) -> Option<S> {
        self.set_idle(id, None);
        let entry = self.entries.remove(&id)?;
        self.reserved -= usize::from(entry.is_reserved);
        if let Some(address) = entry.address
            && let Some(share) = self.addresses.get_mut(&address)
        {
            share.count -= 1;
            if share.count == 0 {
                self.addresses.remove(&address);
            }
        }
        Some(entry.signal)
    }
}

/// The address in whose share a client counts: its /64 for IPv6, because one site usually has a whole
/// /64 (RFC 4291 §2.5.1). `None` for loopback.
fn accountable(address: IpAddr) -> Option<IpAddr> {
    match address.to_canonical() {
        address if address.is_loopback() => None,
        IpAddr::V6(address) => {
            Some(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into())
        }
        address => Some(address),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

    struct Sim {
        table: Table<usize>,
        start: Instant,
    }

    impl Sim {
        fn new(total: usize, per_address: usize) -> Self {
            let limits = SlotLimits::new(total, Some(per_address));
            Self { table: Table::new(limits), start: Instant::now() }
        }

        fn at(&self, ms: u64) -> Instant {
            self.start + Duration::from_millis(ms)
        }

        fn admit(
            &mut self,
            ms: u64,
            address: IpAddr,
            signal: usize,
        ) -> Result<(u64, Option<usize>), SlotRefusal> {
            self.table.admit(self.at(ms), address, signal)
        }
    }

    fn client(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn new_connection_takes_the_slot_of_the_longest_idle_one() {
        let mut sim = Sim::new(3, 3);
        for i in 0..3 {
            assert_eq!(sim.admit(i, LOOPBACK, i as usize), Ok((i, None)));
        }
        assert_eq!(sim.admit(3, client(1), 3), Ok((3, Some(0))));
        assert_eq!(sim.admit(4, client(2), 4), Ok((4, Some(1))));
        assert!(!sim.table.set_idle(0, None), "the displaced connection has no slot any longer");
    }

    #[test]
    fn kept_alive_connections_are_displaced_first() {
        let mut sim = Sim::new(3, 3);
        for i in 0..3 {
            sim.admit(i, LOOPBACK, i as usize).unwrap();
        }
        let later = sim.at(100);
        assert!(sim.table.set_idle(2, Some((Idle::KeptAlive, later))));
        assert_eq!(sim.admit(101, LOOPBACK, 3).unwrap().1, Some(2));
        assert_eq!(sim.admit(102, LOOPBACK, 4).unwrap().1, Some(0));
    }

    #[test]
    fn busy_and_pinned_connections_keep_their_slots() {
        let mut sim = Sim::new(2, 2);
        let (busy, _) = sim.admit(0, client(1), 0).unwrap();
        assert!(sim.table.set_idle(busy, None));
        let (pinned, _) = sim.admit(1, client(1), 1).unwrap();
        assert!(sim.table.pin(pinned));
        assert_eq!(sim.admit(2, client(2), 2), Err(SlotRefusal::Total));
        let now = sim.at(3);
        assert!(sim.table.set_idle(busy, Some((Idle::KeptAlive, now))));
        assert_eq!(sim.admit(4, client(2), 3).unwrap().1, Some(0));
    }

    #[test]
    fn full_share_displaces_connections_of_its_address_only() {
        let mut sim = Sim::new(100, 2);
        sim.admit(0, client(9), 9).unwrap();
        sim.admit(1, client(1), 0).unwrap();
        let (second, _) = sim.admit(2, client(1), 1).unwrap();
        let (third, displaced) = sim.admit(3, client(1), 2).unwrap();
        assert_eq!(displaced, Some(0));
        assert!(sim.table.set_idle(second, None) && sim.table.set_idle(third, None));
        assert_eq!(sim.admit(4, client(1), 3), Err(SlotRefusal::Address));
        assert!(sim.admit(5, client(2), 4).is_ok());
    }

    #[test]
    fn pinned_connections_do_not_count_in_the_share_of_their_address() {
        let mut sim = Sim::new(100, 2);
        for i in 0..50 {
            let (id, displaced) = sim.admit(i, client(1), i as usize).unwrap();
            assert_eq!(displaced, None);
            assert!(sim.table.pin(id));
        }
        let now = sim.at(60);
        let id = sim.table.unpin(now, client(1), 7);
        assert!(sim.table.set_idle(id, None));
        sim.admit(61, client(1), 8).unwrap();
        assert_eq!(sim.admit(62, client(1), 9).unwrap().1, Some(8));
        assert_eq!(sim.table.pinned, 49);
    }

    #[test]
    fn reserved_slots_are_for_those_that_find_all_others_in_use() {
        let mut sim = Sim::new(2, 2);
        sim.table.limits = sim.table.limits.with_reserved(1);
        let busy = [0, 1].map(|i| sim.admit(i, LOOPBACK, 0).unwrap().0);
        for id in busy {
            assert!(!sim.table.is_reserved(id) && sim.table.set_idle(id, None));
        }
        let (reserved, displaced) = sim.admit(2, LOOPBACK, 7).unwrap();
        assert!(sim.table.is_reserved(reserved) && displaced.is_none());
        // The next one takes it over while it is idle, and is refused while it is busy.
        let (next, displaced) = sim.admit(3, LOOPBACK, 8).unwrap();
        assert!(sim.table.is_reserved(next));
        assert_eq!(displaced, Some(7));
        assert!(sim.table.set_idle(next, None));
        assert_eq!(sim.admit(4, LOOPBACK, 9), Err(SlotRefusal::Total));
        // A slot that is free again is not a reserved one.
        sim.table.remove(busy[0]);
        let (id, displaced) = sim.admit(5, LOOPBACK, 10).unwrap();
        assert!(!sim.table.is_reserved(id) && displaced.is_none());
        assert_eq!(sim.table.reserved, 1);
    }

    #[test]
    fn loopback_has_no_share() {
        let mut sim = Sim::new(100, 1);
        for i in 0..50 {
            assert_eq!(sim.admit(i, LOOPBACK, 0).unwrap().1, None);
            assert_eq!(sim.admit(i, [127, 0, 0, 9].into(), 0).unwrap().1, None);
        }
    }

    #[test]
    fn ipv6_addresses_of_one_site_share_slots() {
        let cases = [
            ("2001:db8:1:2::1", Some("2001:db8:1:2::")),
            ("2001:db8:1:2:ffff::9", Some("2001:db8:1:2::")),
            ("::ffff:192.0.2.1", Some("192.0.2.1")),
            ("192.0.2.1", Some("192.0.2.1")),
            ("::ffff:127.0.0.1", None),
            ("::1", None),
        ];
        for (address, expected) in cases {
            let expected = expected.map(|expected| expected.parse().unwrap());
            assert_eq!(accountable(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn share_of_an_address_is_half_by_default() {
        let limits = |total, per_address| {
            let limits = SlotLimits::new(total, per_address);
            (limits.total, limits.per_address)
        };
        assert_eq!(limits(1024, None), (1024, 512));
        assert_eq!(limits(1024, Some(20)), (1024, 20));
        assert_eq!(limits(0, None), (1, 1));
    }

    #[tokio::test]
    async fn displaced_connection_is_notified_and_frees_its_slot_once() {
        let slots = Slots::new(SlotLimits::new(1, None));
        let now = Instant::now();
        let (first, _) = slots.admit(now, LOOPBACK).unwrap();
        assert!(!first.is_displaced());
        let (mut second, displaced) = slots.admit(now, LOOPBACK).unwrap();
        assert!(displaced);
        first.displaced().await;
        assert!(first.is_displaced() && !first.set_busy());
        drop(first);
        assert!(second.pin_for_good());
        assert!(matches!(slots.admit(now, LOOPBACK), Err(SlotRefusal::Total)));
        drop(second);
        assert!(slots.admit(now, LOOPBACK).is_ok());
    }

    proptest! {
        #[test]
        fn counts_agree_after_any_events(events: Vec<(u8, u8, u8)>) {
            let mut sim = Sim::new(12, 4);
            let mut pinned = Vec::new();
            for (step, (event, address, pick)) in events.into_iter().enumerate() {
                let (now, address) = (sim.at(step as u64), client(address % 5));
                let picked = sim.table.entries.keys().copied().min_by_key(|id| (id % 7) ^ u64::from(pick));
                match (event % 6, picked) {
                    (0..=1, _) => drop(sim.table.admit(now, address, step)),
                    (2, Some(id)) => drop(sim.table.set_idle(id, Some((Idle::KeptAlive, now)))),
                    (3, Some(id)) => drop(sim.table.set_idle(id, None)),
                    (4, Some(id)) if sim.table.pin(id) => pinned.push(address),
                    (5, _) if !pinned.is_empty() => {
                        pinned.pop();
                        sim.table.unpin(now, address, step);
                    }
                    _ => {}
                }
                let table = &sim.table;
                prop_assert_eq!(table.pinned, pinned.len());
                prop_assert!(table.entries.len() + table.pinned <= 12);
                let shares: usize = table.addresses.values().map(|share| share.count).sum();
                prop_assert_eq!(shares, table.entries.len());
                let idle = table.entries.values().filter(|entry| entry.idle.is_some()).count();
                prop_assert_eq!(table.idle.len(), idle);
                let idle: usize = table.addresses.values().map(|share| share.idle.len()).sum();
                prop_assert_eq!(table.idle.len(), idle);
            }
        }
    }
}
