//! A barrier on all threads of the process, so that the other side can do without one.

use std::sync::OnceLock;

const CMD_PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
const CMD_REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: the call takes no pointer and only orders memory accesses.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// Announces to the kernel that this process will use [`all_threads`]; true if it can. With one thread that takes
/// a microsecond, with several some 15 ms (the kernel waits for a grace period of its own), so programs that care
/// for their start call it first of all.
pub fn announce_barriers() -> bool {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    *REGISTERED.get_or_init(|| membarrier(CMD_REGISTER_PRIVATE_EXPEDITED))
}

/// Every store that any thread made before this call is visible after it, and every load that any thread
/// makes after it sees what was stored before (membarrier(2), private expedited). Where the kernel has no
/// membarrier, a full fence here and the store buffers' short life have to do.
pub(crate) fn all_threads() {
    if !(announce_barriers() && membarrier(CMD_PRIVATE_EXPEDITED)) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}
