//! Tasks of a fan-out worker: packet trains, and the worker's share of their targets.

use std::{any::Any, sync::Arc, time::Duration};

use bytes::Bytes;

use crate::downstream::routes::Target;
use downpour_repair::rtp::{Burst, Ssrc};
use downpour_sys::buffer::{Buffer, BufferMut};

/// Packet train: packets of equal length, back to back in one buffer. The last one may be shorter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Train {
    bytes: Buffer,
    stride: usize,
}

impl Train {
    /// Joins packets, in order, into as few trains as their lengths allow. Empty packets are left out.
    pub fn collect(packets: impl IntoIterator<Item = Bytes>) -> Vec<Self> {
        let mut trains: Vec<(BufferMut, usize)> = Vec::new();
        for packet in packets.into_iter().filter(|packet| !packet.is_empty()) {
            match trains.last_mut() {
                // A shorter packet ends its train.
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

    /// The number of packets.
    pub fn packets(&self) -> usize {
        self.bytes.len().div_ceil(self.stride)
    }

    /// All packets, back to back.
    pub fn bytes(&self) -> &Buffer {
        &self.bytes
    }

    /// Length of each packet but the last one in bytes, at least 1.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Up to `count` packets, starting with the one at index `first`. Shares the train's memory.
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
    /// A train of one packet.
    fn from(packet: Bytes) -> Self {
        Self { stride: packet.len().max(1), bytes: BufferMut::from(&packet[..]).freeze() }
    }
}

/// How a paced fan-out spreads a train over time.
#[derive(Clone)]
pub struct Pace {
    /// Rate of the stream in bytes per second.
    pub rate: u64,
    /// Time between two video frames of the stream.
    pub interval: Duration,
    /// Dropped once the last packet has been sent to the last target.
    pub held: Option<Arc<dyn Any + Send + Sync>>,
}

/// A worker's task.
pub(super) enum Task {
    Send(Job),
    /// The flow has ended: send its waiting packets at once.
    Finish(Ssrc),
    #[cfg(test)]
    Panic,
}

impl Task {
    /// The task's cost in its queue.
    pub(super) fn cost(&self) -> QueueCost {
        match self {
            Self::Send(job) => job.cost(),
            Self::Finish(flow) => QueueCost { flow: *flow, bytes: 0 },
            #[cfg(test)]
            Self::Panic => QueueCost { flow: Ssrc(0), bytes: 0 },
        }
    }

    /// Bytes to send, to all targets together.
    pub(super) fn bytes_to_send(&self) -> usize {
        match self {
            Self::Send(job) => job.train.bytes.len().saturating_mul(job.share.len()),
            _ => 0,
        }
    }

    /// Packets to send, to all targets together.
    pub(super) fn packets_to_send(&self) -> u64 {
        match self {
            Self::Send(job) => (job.train.packets() * job.share.len()) as u64,
            _ => 0,
        }
    }
}

/// Cost of a task in its queue: one task and its bytes, charged to a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueCost {
    pub(super) flow: Ssrc,
    /// Bytes that the task holds in memory.
    pub(super) bytes: usize,
}

/// A train and one worker's share of its targets.
pub(super) struct Job {
    /// The stream. Jobs of one flow are sent in order.
    pub(super) flow: Ssrc,
    pub(super) train: Train,
    pub(super) share: TargetShare,
    /// `None` sends the train at once.
    pub(super) pace: Option<Pace>,
}

impl Job {
    pub(super) fn cost(&self) -> QueueCost {
        QueueCost { flow: self.flow, bytes: self.train.bytes.len() }
    }
}

/// The number of workers, and how target lists are divided among them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Workers {
    pub(super) count: usize,
    /// The first chunk of each list goes to one of the first `first_choice` workers. With half of
    /// `count`, short lists stay on half of the workers: larger rounds, so fewer wake-ups and system
    /// calls. Long lists still use all workers.
    pub(super) first_choice: usize,
}

impl From<usize> for Workers {
    /// Lists start at any of the workers.
    fn from(count: usize) -> Self {
        Self { count, first_choice: count }
    }
}

/// One worker's share of a list of targets.
///
/// The list is cut into chunks, which go to the workers round-robin; the flow decides which worker gets
/// the first one. So a long list is shared by all workers, and many short lists are spread over them.
/// A target that keeps its index in the list keeps its worker, and with it the order of its packets;
/// [`Routes`](crate::downstream::routes::Routes) keeps the indices stable.
#[derive(Debug, Clone)]
pub(super) struct TargetShare {
    targets: Arc<[Target]>,
    first: usize,
    workers: usize,
}

impl TargetShare {
    /// The share of worker number `worker`, or `None` if it is empty.
    pub(super) fn of(
        targets: &Arc<[Target]>,
        flow: Ssrc,
        worker: usize,
        workers: impl Into<Workers>,
    ) -> Option<Self> {
        let Workers { count: workers, first_choice } = workers.into();
        let starts_at = flow.0 as usize % first_choice.max(1);
        let first = (worker + workers - starts_at) % workers;
        let any = first * CHUNK < targets.len();
        any.then(|| Self { targets: targets.clone(), first, workers })
    }

    /// The number of targets.
    pub(super) fn len(&self) -> usize {
        let chunks = self.targets.len() / CHUNK;
        let whole = chunks.saturating_sub(self.first).div_ceil(self.workers);
        let has_last = chunks >= self.first && (chunks - self.first).is_multiple_of(self.workers);
        whole * CHUNK + usize::from(has_last) * (self.targets.len() % CHUNK)
    }

    /// The chunks of the list that belong to the share.
    pub(super) fn chunks(&self) -> impl Iterator<Item = &[Target]> {
        self.targets.chunks(CHUNK).skip(self.first).step_by(self.workers)
    }

    /// The target at `index` within the share.
    pub(super) fn get(&self, index: usize) -> Option<Target> {
        let chunk = self.first + index / CHUNK * self.workers;
        self.targets.get(chunk * CHUNK + index % CHUNK).copied()
    }
}

/// Targets per chunk: enough that sending to them costs more than queueing the job, few enough that a
/// thousand targets keep 16 workers busy.
const CHUNK: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn targets(count: usize) -> Arc<[Target]> {
        (0..count)
            .map(|n| Target::from(std::net::SocketAddr::from(([127, 0, 0, 1], n as u16))))
            .collect()
    }

    #[test]
    fn a_slice_ends_with_the_train() {
        let train = Train { bytes: BufferMut::from(&b"aabbccd"[..]).freeze(), stride: 2 };
        assert_eq!(train.packets(), 4);
        assert_eq!(&train.slice(1, 2)[..], b"bbcc");
        assert_eq!(&train.slice(2, 8)[..], b"ccd");
        assert!(train.slice(4, 8).is_empty());
    }

    proptest! {
        #[test]
        fn each_target_is_in_one_share(count in 0..600_usize, flow: u32, workers in 1..17_usize) {
            let targets = targets(count);
            let share = |worker| TargetShare::of(&targets, Ssrc(flow), worker, workers);
            let shares: Vec<_> = (0..workers).filter_map(share).collect();
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
            // A long list is divided among all workers.
            prop_assert_eq!(shares.len(), workers.min(count.div_ceil(CHUNK)));
        }
    }
}
