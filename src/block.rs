//! Memory that short pieces share.

use bytes::BytesMut;

/// Gives room for pieces that are needed for about the same time, such as one stream's tags: many
/// short ones come out of one block of memory, which is freed with the last of them. To allocate and
/// free each by itself costs more than to copy it.
#[derive(Debug)]
pub(crate) struct Block {
    rest: BytesMut,
    most: usize,
}

impl Block {
    /// Blocks will have up to `most` bytes; what is over a quarter of that has memory of its own.
    pub(crate) fn of(most: usize) -> Self {
        Self { rest: BytesMut::new(), most }
    }

    /// An empty buffer with room for `len` bytes, which must not be outgrown: its memory would become
    /// as much as the block's.
    #[inline]
    pub(crate) fn room(&mut self, len: usize) -> BytesMut {
        if len > self.most / 4 {
            return BytesMut::with_capacity(len);
        }
        if self.rest.capacity() < len {
            // Not more than some pieces of that length, for there may be thousands of slow streams.
            self.rest = BytesMut::with_capacity((len * PIECES).min(self.most));
        }
        let rest = self.rest.split_off(len);
        std::mem::replace(&mut self.rest, rest)
    }
}

/// Pieces of a block, if all were as long as the first.
const PIECES: usize = 24;

#[cfg(test)]
mod tests {
    use bytes::BufMut;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_have_their_room_and_do_not_overlap(
            lens in proptest::collection::vec(0..3000_usize, 0..50),
        ) {
            let mut block = Block::of(8 << 10);
            let mut pieces: Vec<_> = lens.iter().map(|len| block.room(*len)).collect();
            for (n, (piece, len)) in pieces.iter_mut().zip(&lens).enumerate() {
                prop_assert!(piece.is_empty() && piece.capacity() >= *len);
                let before = piece.as_ptr();
                piece.put_bytes(n as u8, *len);
                prop_assert!(*len == 0 || piece.as_ptr() == before, "it was moved");
            }
            for (n, (piece, len)) in pieces.iter().zip(&lens).enumerate() {
                prop_assert_eq!(&piece[..], &vec![n as u8; *len][..]);
            }
        }
    }

    #[test]
    fn a_slow_stream_holds_little_and_a_long_piece_nothing_else() {
        let mut block = Block::of(32 << 10);
        drop(block.room(100));
        assert!(block.rest.capacity() <= 2400);
        drop(block.room(6000));
        assert!(block.rest.capacity() <= 32 << 10);
        let before = block.rest.as_ptr();
        assert_eq!(block.room(10_000).capacity(), 10_000);
        assert_eq!(block.rest.as_ptr(), before);
    }
}
