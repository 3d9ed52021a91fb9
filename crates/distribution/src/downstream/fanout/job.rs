//! What a fan-out worker is given to send, and to whom.

use std::{any::Any, sync::Arc, time::Duration};

use bytes::Bytes;

use crate::downstream::routes::Target;
use downpour_repair::rtp::{Burst, Ssrc};
use downpour_sys::buffer::{Buffer, BufferMut};

/// Packets of one length, one behind the other; the last one may be shorter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Train {
    bytes: Buffer,
    stride: usize,
}

impl Train {
    /// Puts packets together, in their order, into as few trains as their lengths allow.
    pub fn collect(packets: impl IntoIterator<Item = Bytes>) -> Vec<Self> {
        let mut trains: Vec<(BufferMut, usize)> = Vec::new();
        for packet in packets.into_iter().filter(|packet| !packet.is_empty()) {
            match trains.last_mut() {
                // Behind a shorter one, none can follow.
                Some((bytes, stride))
                    if packet.len() <= *stride && bytes.len().is_multiple_of(*stride) =>
                {
                    bytes.put_slice(&packet);
                }
                _ => trains.push((BufferMut::from(&packet[..]), packet.len())),
            }
        }
        trains.into_iter().map(|(bytes, stride)| Self { bytes: bytes.freeze(), stride }).collect()
    }

    /// How many they are.
    pub fn packets(&self) -> usize {
        self.bytes.len().div_ceil(self.stride)
    }

    /// All packets, laid end to end.
    pub fn bytes(&self) -> &Buffer {
        &self.bytes
    }

    /// Bytes from one packet's start to the next one's, at least 1.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// At most `count` packets from the one at `first` on, sharing the train's memory.
    pub(super) fn slice(&self, first: usize, count: usize) -> Buffer {
        let end = self.bytes.len();
        let [first, last] = [first, first + count].map(|packet| (packet * self.stride).min(end));
        self.bytes.slice(first..last)
    }
}

impl From<&Burst> for Train {
    fn from(burst: &Burst) -> Self {
        Self { bytes: burst.bytes().clone(), stride: burst.stride() }
    }
}

impl From<Bytes> for Train {
    /// One packet.
    fn from(packet: Bytes) -> Self {
        Self { stride: packet.len().max(1), bytes: BufferMut::from(&packet[..]).freeze() }
    }
}

/// How a train is to leave where the fan-out paces.
#[derive(Clone)]
pub struct Pace {
    /// Bytes a second of its stream.
    pub rate: u64,
    /// From one video frame of its stream to the next.
    pub interval: Duration,
    /// Dropped when its last packet has left for the last target.
    pub held: Option<Arc<dyn Any + Send + Sync>>,
}

/// A worker's task.
pub(super) enum Task {
    Send(Job),
    /// Nothing follows in this lane: what waits there is to leave at once.
    Finish(Ssrc),
    #[cfg(test)]
    Panic,
}

impl Task {
    /// What it takes of a queue's bounds.
    pub(super) fn weight(&self) -> QueueCost {
        match self {
            Self::Send(job) => job.weight(),
            Self::Finish(lane) => QueueCost { lane: *lane, bytes: 0 },
            #[cfg(test)]
            Self::Panic => QueueCost { lane: Ssrc(0), bytes: 0 },
        }
    }

    /// Bytes that are to be sent for it, to all of its targets.
    pub(super) fn bytes_to_send(&self) -> usize {
        match self {
            Self::Send(job) => job.train.bytes.len().saturating_mul(job.share.len()),
            _ => 0,
        }
    }

    /// Packets that are to be sent for it, times targets.
    pub(super) fn packets_to_send(&self) -> u64 {
        match self {
            Self::Send(job) => (job.train.packets() * job.share.len()) as u64,
            _ => 0,
        }
    }
}

/// One task's part of what is in a queue: its lane's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueCost {
    pub(super) lane: Ssrc,
    /// That it holds.
    pub(super) bytes: usize,
}

/// A train for a worker's share of its targets.
pub(super) struct Job {
    /// Its stream: what is in one lane keeps its order.
    pub(super) lane: Ssrc,
    pub(super) train: Train,
    pub(super) share: TargetShare,
    /// `None` leaves at once.
    pub(super) pace: Option<Pace>,
}

impl Job {
    pub(super) fn weight(&self) -> QueueCost {
        QueueCost { lane: self.lane, bytes: self.train.bytes.len() }
    }
}

/// How many workers there are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Workers {
    pub(super) count: usize,
    /// Those with which lists begin. Where these are half of them, short lists are left to that half,
    /// each of which has more to do at a time, and so fewer wakes and calls for all of it; long lists
    /// are for all.
    pub(super) begin: usize,
}

impl From<usize> for Workers {
    /// Lists begin with all of them in turn.
    fn from(count: usize) -> Self {
        Self { count, begin: count }
    }
}

/// Those of a list of targets that are one worker's.
///
/// The list is cut into chunks, which go to the workers in turn, from one on that the lane decides:
/// a long list is shared by all workers, many short ones are spread over them, and each target of a
/// stream has its worker and so its order as long as it keeps its place in the list, which the
/// routes see to.
#[derive(Debug, Clone)]
pub(super) struct TargetShare {
    targets: Arc<[Target]>,
    first: usize,
    workers: usize,
}

impl TargetShare {
    /// The share of one of `workers`; `None` if it has none.
    pub(super) fn of(
        targets: &Arc<[Target]>,
        lane: Ssrc,
        worker: usize,
        workers: impl Into<Workers>,
    ) -> Option<Self> {
        let Workers { count: workers, begin } = workers.into();
        let begins_at = lane.0 as usize % begin.max(1);
        let first = (worker + workers - begins_at) % workers;
        let any = first * CHUNK < targets.len();
        any.then(|| Self { targets: targets.clone(), first, workers })
    }

    /// Targets in it.
    pub(super) fn len(&self) -> usize {
        let chunks = self.targets.len() / CHUNK;
        let whole = chunks.saturating_sub(self.first).div_ceil(self.workers);
        let has_last = chunks >= self.first && (chunks - self.first).is_multiple_of(self.workers);
        whole * CHUNK + usize::from(has_last) * (self.targets.len() % CHUNK)
    }

    /// Its chunks.
    pub(super) fn chunks(&self) -> impl Iterator<Item = &[Target]> {
        self.targets.chunks(CHUNK).skip(self.first).step_by(self.workers)
    }

    /// Its target at `index`.
    pub(super) fn get(&self, index: usize) -> Option<Target> {
        let chunk = self.first + index / CHUNK * self.workers;
        self.targets.get(chunk * CHUNK + index % CHUNK).copied()
    }
}

/// Enough that a chunk's calls cost more than handing it over, and few enough that a thousand
/// targets are work for 16 workers.
const CHUNK: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn targets(count: usize) -> Arc<[Target]> {
        (0..count).map(|n| Target { addr: ([127, 0, 0, 1], n as u16).into() }).collect()
    }

    #[test]
    fn a_slice_is_some_packets_and_the_last_may_be_shorter() {
        let train = Train { bytes: BufferMut::from(&b"aabbccd"[..]).freeze(), stride: 2 };
        assert_eq!(train.packets(), 4);
        assert_eq!(&train.slice(1, 2)[..], b"bbcc");
        assert_eq!(&train.slice(2, 8)[..], b"ccd");
        assert!(train.slice(4, 8).is_empty());
    }

    proptest! {
        #[test]
        fn each_target_is_in_one_share(count in 0..600_usize, lane: u32, workers in 1..17_usize) {
            let targets = targets(count);
            let shares: Vec<_> =
                (0..workers).filter_map(|w| TargetShare::of(&targets, Ssrc(lane), w, workers)).collect();
            let mut all = Vec::new();
            for share in &shares {
                let own: Vec<_> = share.chunks().flatten().copied().collect();
                prop_assert_eq!(own.len(), share.len());
                prop_assert!(!own.is_empty());
                prop_assert_eq!(share.get(own.len()).filter(|_| share.workers == 1), None);
                for (index, target) in own.iter().enumerate() {
                    prop_assert_eq!(share.get(index), Some(*target));
                }
                all.extend(own);
            }
            all.sort_by_key(|target| target.addr);
            prop_assert_eq!(&all[..], &targets[..]);
            // A long list is work for all of them.
            prop_assert_eq!(shares.len(), workers.min(count.div_ceil(CHUNK)));
        }
    }
}
