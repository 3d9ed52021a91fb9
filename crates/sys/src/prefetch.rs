//! Prefetch hints.

/// Asks the CPU to load the cache lines of `bytes` bytes from `address` in parallel, and returns at
/// once.
///
/// With hundreds of streams, a stream's state is in no cache when its packet arrives. Loading its
/// lines one after another would take longer than processing the packet.
///
/// Any address is allowed: one without memory behind it has no effect.
#[inline]
pub fn prefetch(address: usize, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..(address % CACHE_LINE + bytes).div_ceil(CACHE_LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let address = std::ptr::without_provenance(address.wrapping_add(line * CACHE_LINE));
        // SAFETY: a prefetch has no architectural effect, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address) };
    }
    // Other architectures have no stable intrinsic for it.
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (address, bytes);
}

/// Bytes per cache line.
#[cfg(target_arch = "x86_64")]
const CACHE_LINE: usize = 64;
