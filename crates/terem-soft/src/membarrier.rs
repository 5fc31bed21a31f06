//! A barrier on all threads of the process, so that the other side can do without one.

use std::sync::OnceLock;

const CMD_PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
const CMD_REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: the call takes no pointer and only orders memory accesses.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// Every store that any thread made before this call is visible after it, and every load that any thread
/// makes after it sees what was stored before (membarrier(2), private expedited). Where the kernel has no
/// membarrier, a full fence here and the store buffers' short life have to do.
pub(crate) fn all_threads() {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let expedited = *REGISTERED.get_or_init(|| membarrier(CMD_REGISTER_PRIVATE_EXPEDITED));
    if !(expedited && membarrier(CMD_PRIVATE_EXPEDITED)) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}
