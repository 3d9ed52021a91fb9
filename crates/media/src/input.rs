//! Taking bytes from the front of untrusted input.

/// Takes the first `N` bytes. Returns `None`, with nothing taken, if there are fewer.
///
/// For a length that is not a constant, use `split_off(..len)`.
pub(crate) fn take_chunk<const N: usize>(input: &mut &[u8]) -> Option<[u8; N]> {
    let (chunk, rest) = input.split_first_chunk()?;
    *input = rest;
    Some(*chunk)
}
