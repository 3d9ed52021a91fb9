//! How much memory a piece of work holds.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

/// Runs `work` and says how many bytes this thread held at the most, beyond those it held before.
pub fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    PEAK.set(before);
    let result = work();
    (result, usize::try_from(PEAK.get() - before).unwrap_or(0))
}

/// The system's allocator, counting by thread.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    // Constant and without a destructor: safe to use from inside an allocator.
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let held = HELD.get() + bytes;
    HELD.set(held);
    PEAK.set(PEAK.get().max(held));
}

// SAFETY: every call goes to `System` unchanged. `realloc` is left to its default, which allocates,
// copies and frees, so that a buffer's growth counts with both buffers held.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps to `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller keeps to `dealloc`'s contract, and the block came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}
