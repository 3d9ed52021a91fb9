//! Memory that short pieces share.

use std::{
    cell::UnsafeCell,
    fmt,
    mem::{self, MaybeUninit},
    ops::{Deref, DerefMut, Range},
    slice,
    sync::Arc,
};

use parking_lot::Mutex;

/// Gives room for pieces that are needed for about the same time, such as one stream's tags: many
/// short ones come out of one block of memory, which is freed with the last of them. To allocate and
/// free each by itself costs more than to copy it.
#[derive(Debug)]
pub struct BufferPool {
    memory: Arc<Memory>,
    /// Bytes of it that are given away.
    used: usize,
    most: usize,
}

/// Bytes that many share; each part of them is written once, by the one [`BufferMut`] that has it, and
/// only then read, by the [`Buffer`]s that it becomes.
struct Memory(Box<[Slot]>);

#[repr(transparent)]
struct Slot(UnsafeCell<MaybeUninit<u8>>);

// SAFETY: `BufferMut`s do not overlap, and nothing else writes; nothing reads what a `BufferMut` still has.
unsafe impl Sync for Slot {}

impl BufferPool {
    /// Blocks will have up to `most` bytes; what is over a quarter of that has memory of its own.
    pub fn new(most: usize) -> Self {
        Self { memory: Arc::new(Memory(Box::default())), used: 0, most }
    }

    /// Room for `len` bytes.
    #[inline]
    pub fn room(&mut self, len: usize) -> BufferMut {
        if len > self.most / 4 {
            return BufferMut::with_capacity(len);
        }
        if self.memory.0.len() - self.used < len {
            // Not more than some pieces of that length, for there may be thousands of slow streams.
            let wanted = (len * PIECES).next_power_of_two();
            self.memory = Arc::new(Memory::new(wanted.min(self.most)));
            self.used = 0;
        }
        let start = self.used;
        self.used += len;
        BufferMut { memory: self.memory.clone(), start, len: 0, end: self.used }
    }

    /// Address of the next piece, most of the time.
    #[inline]
    pub fn next_place(&self) -> usize {
        self.memory.0.as_ptr().addr() + self.used
    }

    /// Address of what is written for each piece besides.
    #[inline]
    pub fn count(&self) -> usize {
        Arc::as_ptr(&self.memory).addr() - COUNTS_BYTES
    }
}

/// Bytes in front of what an [`Arc`] points to, where it counts.
const COUNTS_BYTES: usize = 2 * size_of::<usize>();

impl Memory {
    fn new(len: usize) -> Self {
        let idle = if Self::keeps(len) { IDLE.lock().take(len) } else { None };
        Self(idle.unwrap_or_else(|| {
            let slots = Box::<[Slot]>::new_uninit_slice(len);
            // SAFETY: a slot is initialised whatever is in it.
            unsafe { slots.assume_init() }
        }))
    }

    /// Whether memory of that length is kept when it is idle: long blocks, which are of few lengths.
    fn keeps(len: usize) -> bool {
        (IDLE_LEAST..=IDLE_MOST).contains(&len) && len.is_power_of_two()
    }

    /// What was written there.
    ///
    /// # Safety
    /// All of it must have been, and not be again as long as the reference lasts.
    #[inline]
    unsafe fn written(&self, start: usize, len: usize) -> &[u8] {
        let slots = &self.0[start..start + len];
        // SAFETY: the caller says so.
        unsafe { slice::from_raw_parts(slots.as_ptr().cast::<u8>(), len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if Self::keeps(self.0.len()) {
            let freed = IDLE.lock().keep(mem::take(&mut self.0));
            // An allocator may take long over it: not behind the lock.
            drop(freed);
        }
    }
}

/// Long blocks whose pieces are gone: an allocator takes longer over such than over any other.
static IDLE: Mutex<Idle> = Mutex::new(Idle { blocks: Vec::new(), bytes: 0 });

struct Idle {
    blocks: Vec<Box<[Slot]>>,
    bytes: usize,
}

impl Idle {
    fn take(&mut self, len: usize) -> Option<Box<[Slot]>> {
        // Those that are likely to be in the cache still.
        let place = self.blocks.iter().rposition(|block| block.len() == len)?;
        self.bytes -= len;
        Some(self.blocks.remove(place))
    }

    /// Keeps `block` in place of some of other lengths, which may not be asked for any more; what is
    /// not kept.
    fn keep(&mut self, block: Box<[Slot]>) -> Vec<Box<[Slot]>> {
        let mut freed = Vec::new();
        while self.bytes + block.len() > IDLE_BYTES {
            // The oldest of them is in front.
            let Some(other) = self.blocks.iter().position(|idle| idle.len() != block.len()) else {
                freed.push(block);
                return freed;
            };
            let other = self.blocks.remove(other);
            self.bytes -= other.len();
            freed.push(other);
        }
        self.bytes += block.len();
        self.blocks.push(block);
        freed
    }
}

/// Memory to write into, which then is a [`Buffer`].
pub struct BufferMut {
    memory: Arc<Memory>,
    start: usize,
    /// Bytes that are written.
    len: usize,
    end: usize,
}

impl BufferMut {
    /// Of memory of its own.
    pub fn with_capacity(len: usize) -> Self {
        Self { memory: Arc::new(Memory::new(len)), start: 0, len: 0, end: len }
    }

    /// Bytes that fit before it would have to move.
    pub fn capacity(&self) -> usize {
        self.end - self.start
    }

    /// Sees to it that `more` bytes fit behind what there is.
    pub fn reserve(&mut self, more: usize) {
        if more > self.capacity() - self.len {
            self.move_to(self.len + more);
        }
    }

    /// Forgets the first `bytes` bytes of what is written.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.len, "{bytes} of {} bytes", self.len);
        self.start += bytes;
        self.len -= bytes;
    }

    /// Writes `bytes` behind what there is; what has not enough room moves.
    #[inline]
    pub fn put_slice(&mut self, bytes: &[u8]) {
        if bytes.len() > self.capacity() - self.len {
            self.move_to((self.len + bytes.len()).max(2 * self.capacity()));
        }
        let place = &self.memory.0[self.start + self.len..self.end][..bytes.len()];
        // SAFETY: the slots are this room's alone, from `start` to `end`, and none of them is in a
        // piece. `bytes` is no part of them, or there would be a reference to it.
        unsafe {
            let place = place.as_ptr().cast::<u8>().cast_mut();
            place.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        self.len += bytes.len();
    }

    #[cold]
    fn move_to(&mut self, capacity: usize) {
        let mut longer = Self::with_capacity(capacity);
        longer.put_slice(self);
        *self = longer;
    }

    /// What is written, to be shared.
    #[inline]
    pub fn freeze(self) -> Buffer {
        Buffer { start: self.start, len: self.len, memory: self.memory }
    }
}

impl Deref for BufferMut {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: a room has written all of `len`, and writes only through a `&mut` to itself.
        unsafe { self.memory.written(self.start, self.len) }
    }
}

impl DerefMut for BufferMut {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        let written = &self.memory.0[self.start..self.start + self.len];
        // SAFETY: as with `put_slice`; all of them are written. The reference lasts no longer than
        // that to the room.
        unsafe { slice::from_raw_parts_mut(written.as_ptr().cast::<u8>().cast_mut(), self.len) }
    }
}

impl From<&[u8]> for BufferMut {
    fn from(bytes: &[u8]) -> Self {
        let mut room = Self::with_capacity(bytes.len());
        room.put_slice(bytes);
        room
    }
}

/// Bytes that do not change. A clone shares them.
#[derive(Clone)]
pub struct Buffer {
    memory: Arc<Memory>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// A part of it.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let part = &self[range.clone()];
        Self { memory: self.memory.clone(), start: self.start + range.start, len: part.len() }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the room that it was has written all of it, and is no more.
        unsafe { self.memory.written(self.start, self.len) }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Debug for BufferMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl Clone for BufferMut {
    /// A copy.
    fn clone(&self) -> Self {
        Self::from(&self[..])
    }
}

impl PartialEq for BufferMut {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for BufferMut {}

impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Buffer {}

/// Pieces of a block, if all were as long as the first.
const PIECES: usize = 32;
/// The shortest block that is kept when it is idle.
const IDLE_LEAST: usize = 32 << 10;
/// Bytes of all that are kept.
const IDLE_BYTES: usize = 2 << 20;
/// The longest: some of each length have room.
const IDLE_MOST: usize = IDLE_BYTES / 8;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_have_their_room_and_do_not_overlap(
            lens in proptest::collection::vec(0..3000_usize, 0..50),
        ) {
            let mut block = BufferPool::new(8 << 10);
            let mut rooms: Vec<_> = lens.iter().map(|len| block.room(*len)).collect();
            for (n, (room, len)) in rooms.iter_mut().zip(&lens).enumerate() {
                prop_assert!(room.is_empty() && room.capacity() >= *len);
                let before = room.as_ptr();
                room.put_slice(&vec![n as u8; *len]);
                prop_assert!(*len == 0 || room.as_ptr() == before, "it was moved");
            }
            drop(block);
            let pieces: Vec<_> = rooms.into_iter().map(BufferMut::freeze).collect();
            for (n, (piece, len)) in pieces.iter().zip(&lens).enumerate() {
                prop_assert_eq!(&piece[..], &vec![n as u8; *len][..]);
                prop_assert_eq!(&piece.slice(len / 2..*len)[..], &piece[len / 2..]);
            }
        }
    }

    #[test]
    fn a_slow_stream_holds_little_and_a_long_piece_nothing_else() {
        let mut block = BufferPool::new(32 << 10);
        drop(block.room(100));
        assert!(block.memory.0.len() <= 2 * PIECES * 100);
        drop(block.room(6000));
        assert!(block.memory.0.len() <= 32 << 10);
        let before = block.next_place();
        let long = block.room(10_000);
        assert_eq!((long.capacity(), long.memory.0.len()), (10_000, 10_000));
        assert_eq!(block.next_place(), before);
    }

    #[test]
    fn what_outgrows_its_room_moves_and_hurts_nobody() {
        let mut block = BufferPool::new(8 << 10);
        let (mut first, mut second) = (block.room(4), block.room(4));
        second.put_slice(&[2; 4]);
        first.put_slice(&[1; 3]);
        first.put_slice(&[1; 3]);
        first[0] = 9;
        assert_eq!((&first[..], &second[..]), (&[9, 1, 1, 1, 1, 1][..], &[2; 4][..]));
    }

    #[test]
    fn pieces_can_be_written_and_read_on_many_threads() {
        let mut block = BufferPool::new(128 << 10);
        std::thread::scope(|scope| {
            for n in 0..200u8 {
                let mut room = block.room(3000);
                scope.spawn(move || {
                    (0..30).for_each(|_| room.put_slice(&[n; 100]));
                    let piece = room.freeze();
                    let same = piece.clone();
                    assert!(same.iter().all(|byte| *byte == n));
                });
            }
        });
    }

    #[test]
    fn idle_memory_is_used_again_and_has_a_bound() {
        let mut idle = Idle { blocks: Vec::new(), bytes: 0 };
        let new = |len| mem::take(&mut Memory::new(len).0);
        let lens = [32 << 10, 64 << 10, 128 << 10];
        lens.iter().cycle().take(1000).for_each(|len| drop(idle.keep(new(*len))));
        assert!(idle.bytes <= IDLE_BYTES && idle.bytes > IDLE_BYTES - (128 << 10));
        // What is not asked for any more makes room for what is.
        (0..100).for_each(|_| drop(idle.keep(new(64 << 10))));
        assert!(idle.blocks.iter().all(|block| block.len() == 64 << 10));
        assert_eq!((idle.bytes, idle.keep(new(64 << 10)).len()), (IDLE_BYTES, 1));
        let before = idle.bytes;
        assert_eq!(idle.take(64 << 10).map(|block| block.len()), Some(64 << 10));
        assert_eq!(idle.bytes, before - (64 << 10));
        assert!(idle.take(65_537).is_none());
        assert!(Memory::keeps(128 << 10) && !Memory::keeps(40_000) && !Memory::keeps(8 << 10));
        assert!(!Memory::keeps(2 << 20), "one would take the place of all others");
    }
}
