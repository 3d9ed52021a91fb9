//! Reference-counted byte buffers, carved out of shared blocks.
//!
//! A [`BufferPool`] hands out [`BufferMut`]s; a `BufferMut` is filled and frozen into a [`Buffer`],
//! which is immutable and cheap to clone.

use std::{
    cell::UnsafeCell,
    fmt,
    mem::{self, MaybeUninit},
    ops::{Deref, DerefMut, Range},
    slice,
    sync::Arc,
};

use parking_lot::Mutex;

/// Allocates buffers with similar lifetimes, such as the tags of one stream, from shared blocks.
///
/// A block is freed with its last buffer. One allocation per block is cheaper than one per buffer,
/// even with the copy into the block.
#[derive(Debug)]
pub struct BufferPool {
    block: Arc<Block>,
    /// Bytes of `block` that have been handed out.
    used: usize,
    max_block_len: usize,
}

/// Memory shared by many buffers. Each part is written by one [`BufferMut`] and then only read, by
/// the [`Buffer`]s made from it.
struct Block(Box<[Slot]>);

#[repr(transparent)]
struct Slot(UnsafeCell<MaybeUninit<u8>>);

// SAFETY: `BufferMut`s do not overlap and are the only writers. While a `BufferMut` owns a slot,
// nothing else reads it.
unsafe impl Sync for Slot {}

impl BufferPool {
    /// A pool with blocks of up to `max_block_len` bytes. A buffer over a quarter of that gets an
    /// allocation for itself.
    pub fn new(max_block_len: usize) -> Self {
        Self { block: Arc::new(Block(Box::default())), used: 0, max_block_len }
    }

    /// Returns an empty buffer with a capacity of `len` bytes.
    #[inline]
    pub fn take(&mut self, len: usize) -> BufferMut {
        if len > self.max_block_len / 4 {
            return BufferMut::with_capacity(len);
        }
        if self.block.0.len() - self.used < len {
            // Sized by the buffer, because there may be thousands of low-bitrate streams.
            let wanted = (len * BUFFERS_PER_BLOCK).next_power_of_two();
            self.block = Arc::new(Block::new(wanted.min(self.max_block_len)));
            self.used = 0;
        }
        let start = self.used;
        self.used += len;
        BufferMut { block: self.block.clone(), start, len: 0, end: self.used }
    }

    /// Address of the next buffer, as a prefetch hint: wrong when the next buffer needs a new
    /// block.
    #[inline]
    pub fn next_address(&self) -> usize {
        self.block.0.as_ptr().addr() + self.used
    }

    /// Address of the block's reference counts, as a prefetch hint: every [`BufferPool::take`]
    /// writes to them.
    #[inline]
    pub fn refcount_address(&self) -> usize {
        Arc::as_ptr(&self.block).addr() - REFCOUNT_BYTES
    }
}

/// Bytes of reference counts in front of the value that an [`Arc`] points to.
const REFCOUNT_BYTES: usize = 2 * size_of::<usize>();

impl Block {
    fn new(len: usize) -> Self {
        let idle = if Self::is_recycled(len) { IDLE.lock().take(len) } else { None };
        Self(idle.unwrap_or_else(|| {
            let slots = Box::<[Slot]>::new_uninit_slice(len);
            // SAFETY: a slot is `MaybeUninit`, which is valid without initialisation.
            unsafe { slots.assume_init() }
        }))
    }

    /// `true` if blocks of `len` bytes are kept for reuse: long ones, which have few lengths.
    fn is_recycled(len: usize) -> bool {
        (MIN_IDLE_LEN..=MAX_IDLE_LEN).contains(&len) && len.is_power_of_two()
    }

    /// Returns `len` written bytes from `start`.
    ///
    /// # Safety
    /// All of them must have been written, and must not be written while the reference lives.
    #[inline]
    unsafe fn written(&self, start: usize, len: usize) -> &[u8] {
        let slots = &self.0[start..start + len];
        // SAFETY: the caller guarantees that the slots are initialised and not written to.
        unsafe { slice::from_raw_parts(slots.as_ptr().cast::<u8>(), len) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if Self::is_recycled(self.0.len()) {
            let evicted = IDLE.lock().put(mem::take(&mut self.0));
            // The allocator may be slow, so it runs outside the lock.
            drop(evicted);
        }
    }
}

/// Long blocks without buffers, kept for reuse: allocators are slow at this size.
static IDLE: Mutex<IdleBlocks> = Mutex::new(IdleBlocks { blocks: Vec::new(), bytes: 0 });

struct IdleBlocks {
    /// The least recently freed first.
    blocks: Vec<Box<[Slot]>>,
    bytes: usize,
}

impl IdleBlocks {
    fn take(&mut self, len: usize) -> Option<Box<[Slot]>> {
        // The most recently freed block is the most likely to be in the CPU's cache.
        let index = self.blocks.iter().rposition(|block| block.len() == len)?;
        self.bytes -= len;
        Some(self.blocks.remove(index))
    }

    /// Stores `block`, evicting blocks of other lengths, whose lengths may be out of use. Returns
    /// the blocks to free.
    fn put(&mut self, block: Box<[Slot]>) -> Vec<Box<[Slot]>> {
        let mut evicted = Vec::new();
        while self.bytes + block.len() > MAX_IDLE_BYTES {
            let Some(other) = self.blocks.iter().position(|idle| idle.len() != block.len()) else {
                evicted.push(block);
                return evicted;
            };
            let other = self.blocks.remove(other);
            self.bytes -= other.len();
            evicted.push(other);
        }
        self.bytes += block.len();
        self.blocks.push(block);
        evicted
    }
}

/// A growable buffer with one owner, to be filled and frozen into a [`Buffer`].
pub struct BufferMut {
    block: Arc<Block>,
    start: usize,
    /// Bytes written.
    len: usize,
    end: usize,
}

impl BufferMut {
    /// An empty buffer outside any pool, with a capacity of `len` bytes.
    pub fn with_capacity(len: usize) -> Self {
        Self { block: Arc::new(Block::new(len)), start: 0, len: 0, end: len }
    }

    /// Bytes that fit without a reallocation, the written ones included.
    pub fn capacity(&self) -> usize {
        self.end - self.start
    }

    /// Makes room for `additional` bytes, reallocating if needed.
    pub fn reserve(&mut self, additional: usize) {
        if additional > self.capacity() - self.len {
            self.reallocate(self.len + additional);
        }
    }

    /// Removes the first `bytes` bytes.
    ///
    /// # Panics
    /// If the buffer is shorter than `bytes`.
    pub fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.len, "advance by {bytes} in a buffer of {} bytes", self.len);
        self.start += bytes;
        self.len -= bytes;
    }

    /// Appends `bytes`, reallocating if they do not fit.
    #[inline]
    pub fn put_slice(&mut self, bytes: &[u8]) {
        if bytes.len() > self.capacity() - self.len {
            self.reallocate((self.len + bytes.len()).max(2 * self.capacity()));
        }
        let slots = &self.block.0[self.start + self.len..self.end][..bytes.len()];
        // SAFETY: this buffer alone owns the slots from `start` to `end`, and no `Buffer` covers
        // them yet. `bytes` cannot overlap them: a reference into this buffer would borrow it.
        unsafe {
            let target = slots.as_ptr().cast::<u8>().cast_mut();
            target.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        self.len += bytes.len();
    }

    #[cold]
    fn reallocate(&mut self, capacity: usize) {
        let mut longer = Self::with_capacity(capacity);
        longer.put_slice(self);
        *self = longer;
    }

    /// Makes the written bytes immutable and shareable, without a copy.
    #[inline]
    pub fn freeze(self) -> Buffer {
        Buffer { start: self.start, len: self.len, block: self.block }
    }
}

impl Deref for BufferMut {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the first `len` bytes are written, and writing to them needs `&mut self`.
        unsafe { self.block.written(self.start, self.len) }
    }
}

impl DerefMut for BufferMut {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        let slots = &self.block.0[self.start..self.start + self.len];
        // SAFETY: this buffer alone owns the slots, and all of them are written. The reference
        // lives no longer than `&mut self`.
        unsafe { slice::from_raw_parts_mut(slots.as_ptr().cast::<u8>().cast_mut(), self.len) }
    }
}

impl From<&[u8]> for BufferMut {
    fn from(bytes: &[u8]) -> Self {
        let mut buffer = Self::with_capacity(bytes.len());
        buffer.put_slice(bytes);
        buffer
    }
}

impl Clone for BufferMut {
    /// Copies the bytes.
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

impl fmt::Debug for BufferMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// An immutable byte buffer. Clones and slices share its memory.
#[derive(Clone)]
pub struct Buffer {
    block: Arc<Block>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Returns a part of the buffer, sharing its memory.
    ///
    /// # Panics
    /// If `range` is out of bounds.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let part = &self[range.clone()];
        Self { block: self.block.clone(), start: self.start + range.start, len: part.len() }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the `BufferMut` behind it has written these bytes and no longer exists, so
        // nothing writes to them.
        unsafe { self.block.written(self.start, self.len) }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Buffer {}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// Buffers per block, if all are as long as the block's first.
const BUFFERS_PER_BLOCK: usize = 32;
/// The shortest block that is kept for reuse, in bytes.
const MIN_IDLE_LEN: usize = 32 << 10;
/// The longest, in bytes: several blocks of each length fit.
const MAX_IDLE_LEN: usize = MAX_IDLE_BYTES / 8;
/// Bytes of all blocks kept for reuse.
const MAX_IDLE_BYTES: usize = 2 << 20;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn buffers_have_the_requested_capacity_and_do_not_overlap(
            lens in proptest::collection::vec(0..3000_usize, 0..50),
        ) {
            let mut pool = BufferPool::new(8 << 10);
            let mut buffers: Vec<_> = lens.iter().map(|len| pool.take(*len)).collect();
            for (n, (buffer, len)) in buffers.iter_mut().zip(&lens).enumerate() {
                prop_assert!(buffer.is_empty() && buffer.capacity() >= *len);
                let before = buffer.as_ptr();
                buffer.put_slice(&vec![n as u8; *len]);
                prop_assert!(*len == 0 || buffer.as_ptr() == before, "it was reallocated");
            }
            drop(pool);
            let buffers: Vec<_> = buffers.into_iter().map(BufferMut::freeze).collect();
            for (n, (buffer, len)) in buffers.iter().zip(&lens).enumerate() {
                prop_assert_eq!(&buffer[..], &vec![n as u8; *len][..]);
                prop_assert_eq!(&buffer.slice(len / 2..*len)[..], &buffer[len / 2..]);
            }
        }
    }

    #[test]
    fn block_size_follows_the_buffers() {
        let mut pool = BufferPool::new(32 << 10);
        drop(pool.take(100));
        assert!(pool.block.0.len() <= 2 * BUFFERS_PER_BLOCK * 100);
        drop(pool.take(6000));
        assert!(pool.block.0.len() <= 32 << 10);
    }

    #[test]
    fn a_long_buffer_gets_an_exact_allocation_outside_the_block() {
        let mut pool = BufferPool::new(32 << 10);
        drop(pool.take(6000));
        let before = pool.next_address();
        let long = pool.take(10_000);
        assert_eq!(long.capacity(), 10_000);
        assert_eq!(long.block.0.len(), 10_000);
        assert_eq!(pool.next_address(), before);
    }

    #[test]
    fn a_buffer_that_outgrows_its_capacity_moves_and_leaves_its_neighbour_intact() {
        let mut pool = BufferPool::new(8 << 10);
        let (mut first, mut second) = (pool.take(4), pool.take(4));
        second.put_slice(&[2; 4]);
        first.put_slice(&[1; 3]);
        first.put_slice(&[1; 3]);
        first[0] = 9;
        assert_eq!(first[..], [9, 1, 1, 1, 1, 1]);
        assert_eq!(second[..], [2; 4]);
    }

    #[test]
    fn many_threads_write_and_read_buffers_of_one_pool() {
        let mut pool = BufferPool::new(128 << 10);
        std::thread::scope(|scope| {
            for n in 0..200u8 {
                let mut buffer = pool.take(3000);
                scope.spawn(move || {
                    (0..30).for_each(|_| buffer.put_slice(&[n; 100]));
                    let buffer = buffer.freeze();
                    let clone = buffer.clone();
                    assert!(clone.iter().all(|byte| *byte == n));
                });
            }
        });
    }

    fn block(len: usize) -> Box<[Slot]> {
        mem::take(&mut Block::new(len).0)
    }

    #[test]
    fn idle_blocks_are_bounded_and_those_in_use_displace_others() {
        let mut idle = IdleBlocks { blocks: Vec::new(), bytes: 0 };
        let lens = [32 << 10, 64 << 10, 128 << 10];
        lens.iter().cycle().take(1000).for_each(|len| drop(idle.put(block(*len))));
        assert!(idle.bytes <= MAX_IDLE_BYTES && idle.bytes > MAX_IDLE_BYTES - (128 << 10));
        (0..100).for_each(|_| drop(idle.put(block(64 << 10))));
        assert!(idle.blocks.iter().all(|block| block.len() == 64 << 10));
        assert_eq!(idle.bytes, MAX_IDLE_BYTES);
        assert_eq!(idle.put(block(64 << 10)).len(), 1, "a full store keeps no further block");
    }

    #[test]
    fn idle_blocks_are_reused_by_exact_length() {
        let mut idle = IdleBlocks { blocks: Vec::new(), bytes: 0 };
        drop(idle.put(block(64 << 10)));
        assert!(idle.take(65_537).is_none());
        assert_eq!(idle.take(64 << 10).map(|block| block.len()), Some(64 << 10));
        assert_eq!(idle.bytes, 0);
    }

    #[test]
    fn only_long_powers_of_two_are_recycled() {
        assert!(Block::is_recycled(128 << 10));
        assert!(!Block::is_recycled(40_000));
        assert!(!Block::is_recycled(8 << 10));
        assert!(!Block::is_recycled(2 << 20), "one block would displace all others");
    }
}
