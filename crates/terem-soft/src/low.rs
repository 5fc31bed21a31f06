//! A value at a low address: translated code reaches it by absolute addresses of 32 bits.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::mm::munmap;
use terem_cpu::{CpuError, DebugControl, Stop, Vcpu, VcpuState};

/// Memory for a value, below 2 GiB if the host has some there.
#[derive(Debug)]
pub(crate) struct Room<T>(NonNull<MaybeUninit<T>>);

impl<T> Room<T> {
    /// Takes it from the host, zeroed.
    ///
    /// # Errors
    /// The host's, when it has no memory.
    pub(crate) fn new() -> io::Result<Self> {
        const { assert!(align_of::<T>() <= 4096, "mappings are aligned to pages") };
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        for flags in [flags | libc::MAP_32BIT, flags] {
            // SAFETY: a new mapping at an address of the kernel's choice.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), size_of::<T>(), protection, flags, -1, 0) };
            if at != libc::MAP_FAILED
                && let Some(to) = NonNull::new(at.cast())
            {
                // What a child process does by mistake at such low addresses does not look right to it. It is no loss if
                // the host does not know that.
                // SAFETY: the mapping just made.
                let _ = unsafe { libc::madvise(at, size_of::<T>(), libc::MADV_DONTFORK) };
                return Ok(Self(to));
            }
        }
        Err(io::Error::last_os_error())
    }

    /// Its first byte's address, if that and all others are below 2 GiB.
    pub(crate) fn low(&self) -> Option<u32> {
        let (at, size) = (self.0.as_ptr() as usize, size_of::<T>());
        at.checked_add(size).filter(|&end| i32::try_from(end).is_ok()).and_then(|_| u32::try_from(at).ok())
    }

    /// Puts a value there.
    pub(crate) fn put(self, value: T) -> Low<T> {
        let at = self.0.cast::<T>();
        std::mem::forget(self);
        // SAFETY: the mapping is large enough, aligned, and nobody else's.
        unsafe { at.write(value) };
        Low(at, PhantomData)
    }
}

impl<T> Drop for Room<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), size_of::<T>()) };
    }
}

/// The owner of a value in its own [`Room`]: a `Box` in all but where its value lies.
#[derive(Debug)]
pub(crate) struct Low<T>(NonNull<T>, PhantomData<T>);

// SAFETY: it owns the value, as a `Box` does.
unsafe impl<T: Send> Send for Low<T> {}

impl<T> Deref for Low<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the value is there until this one is dropped.
        unsafe { self.0.as_ref() }
    }
}

impl<T> DerefMut for Low<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and this is the only owner.
        unsafe { self.0.as_mut() }
    }
}

impl<T> Drop for Low<T> {
    fn drop(&mut self) {
        // SAFETY: the value is not used any more, and its mapping was made by `Room::new`.
        unsafe {
            self.0.drop_in_place();
            let _ = munmap(self.0.as_ptr().cast(), size_of::<T>());
        }
    }
}

impl<T: Vcpu> Vcpu for Low<T> {
    fn run(&mut self) -> Stop {
        T::run(self)
    }

    fn reset(&mut self) {
        T::reset(self);
    }

    fn save(&self) -> VcpuState {
        T::save(self)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), CpuError> {
        T::restore(self, state)
    }

    fn set_registers(&mut self, state: &VcpuState) -> Result<(), CpuError> {
        T::set_registers(self, state)
    }

    fn translate(&self, linear: u64) -> Option<u64> {
        T::translate(self, linear)
    }

    fn debug(&mut self, control: &DebugControl) -> Result<(), CpuError> {
        T::debug(self, control)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_value_lies_low_and_is_dropped_once() {
        let counted = Arc::new(());
        let room = Room::<(Arc<()>, [u64; 4096])>::new().unwrap();
        let address = room.low().expect("this host has memory below 2 GiB");
        let mut low = room.put((Arc::clone(&counted), [7; 4096]));
        let (_, array) = &mut *low;
        array[1] = 8;
        let first = array[..3].to_vec();
        assert_eq!((&raw const *low as usize, first), (address as usize, vec![7, 8, 7]));
        assert_eq!(Arc::strong_count(&counted), 2);
        drop(low);
        assert_eq!(Arc::strong_count(&counted), 1);
    }
}
