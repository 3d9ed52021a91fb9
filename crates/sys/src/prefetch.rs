//! Memory that will be needed soon.

/// Has the processor fetch `bytes` bytes from `address` on, all at once, while the caller does
/// something else. Where there are hundreds of streams each one is in no cache when its packet comes,
/// and to wait for one line after the other takes longer than all the rest.
///
/// It may be any address: where there is no memory, nothing is fetched.
#[inline]
pub fn prefetch(address: usize, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..(address % LINE + bytes).div_ceil(LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let address = std::ptr::without_provenance(address.wrapping_add(line * LINE));
        // SAFETY: to prefetch any address does nothing that a program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address) };
    }
    // Elsewhere there is no stable way to say so.
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (address, bytes);
}

/// Bytes of a line of the cache.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;
