//! Memory that is overwritten when its value goes.

use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};

/// A boxed value whose memory is zeroed after it was dropped: for keys inside types of other crates that
/// don't do so themselves.
pub struct Wiping<T>(Box<MaybeUninit<T>>);

impl<T> Wiping<T> {
    /// Boxes `value`. (The copy it was moved from is the compiler's business.)
    pub fn new(value: T) -> Wiping<T> {
        Wiping(Box::new(MaybeUninit::new(value)))
    }
}

impl<T> Deref for Wiping<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: written in new() and left initialized until drop().
        unsafe { self.0.assume_init_ref() }
    }
}

impl<T> DerefMut for Wiping<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in deref().
        unsafe { self.0.assume_init_mut() }
    }
}

impl<T> Drop for Wiping<T> {
    fn drop(&mut self) {
        // SAFETY: initialized in new(), dropped only here, and never read as a T again.
        unsafe { self.0.assume_init_drop() };
        let bytes: *mut u8 = self.0.as_mut_ptr().cast();
        for i in 0..size_of::<T>() {
            // SAFETY: i is inside the allocation, which is ours until the box is freed; MaybeUninit<T> may hold
            // any bytes. Volatile, so that the writes aren't optimized away as dead.
            unsafe { ptr::write_volatile(bytes.wrapping_add(i), 0) };
        }
        compiler_fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_writes_and_drops_once() {
        let witness = std::rc::Rc::new(());
        let mut wiping = Wiping::new((7u8, witness.clone()));
        wiping.deref_mut().0 += 1;
        assert_eq!(wiping.deref().0, 8);
        drop(wiping);
        assert_eq!(std::rc::Rc::strong_count(&witness), 1);
    }
}
