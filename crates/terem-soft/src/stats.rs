//! Counters that other threads read while the vCPU counts.

use std::sync::atomic::{AtomicU64, Ordering};

use terem_cpu::Counters;

/// A number that one thread changes and others read.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds. Only the vCPU's own thread does, so that this is no locked instruction.
    #[inline(always)]
    pub(crate) fn add(&self, n: u64) {
        self.set(self.get().wrapping_add(n));
    }

    #[inline(always)]
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    #[inline(always)]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What one vCPU counts; [`Counters`] says what the numbers mean.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) instructions: Counter,
    pub(crate) blocks_decoded: Counter,
    pub(crate) blocks_translated: Counter,
    pub(crate) code_bytes: Counter,
    pub(crate) code_capacity: Counter,
    pub(crate) code_flushes: Counter,
    pub(crate) code_writes: Counter,
    pub(crate) page_walks: Counter,
    pub(crate) tlb_flushes: Counter,
    pub(crate) tlb_page_flushes: Counter,
    pub(crate) interrupts: Counter,
    pub(crate) exceptions: Counter,
    pub(crate) port_accesses: Counter,
    pub(crate) mmio_accesses: Counter,
    pub(crate) direct_runs: Counter,
    pub(crate) direct_pages: Counter,
    /// Virtual nanoseconds, without the present sleep.
    halted: Counter,
    /// Virtual time at which the present sleep began, plus 1; 0 while the vCPU is awake.
    asleep: Counter,
}

impl Stats {
    /// The vCPU goes to sleep at this virtual time.
    pub(crate) fn sleeps(&self, now: u64) {
        self.asleep.set(now.saturating_add(1));
    }

    /// It woke up.
    pub(crate) fn wakes(&self, now: u64) {
        let since = self.asleep.get();
        self.asleep.set(0);
        self.halted.add(now.saturating_add(1).saturating_sub(since));
    }

    /// All numbers at the virtual time `now`.
    pub(crate) fn read(&self, now: u64) -> Counters {
        let asleep = self.asleep.get();
        let present = if asleep == 0 { 0 } else { now.saturating_add(1).saturating_sub(asleep) };
        Counters {
            halted: asleep != 0,
            halted_ns: self.halted.get() + present,
            instructions_interpreted: self.instructions.get(),
            blocks_decoded: self.blocks_decoded.get(),
            blocks_translated: self.blocks_translated.get(),
            code_bytes: self.code_bytes.get(),
            code_capacity: self.code_capacity.get(),
            code_flushes: self.code_flushes.get(),
            code_writes: self.code_writes.get(),
            page_walks: self.page_walks.get(),
            tlb_flushes: self.tlb_flushes.get(),
            tlb_page_flushes: self.tlb_page_flushes.get(),
            interrupts: self.interrupts.get(),
            exceptions: self.exceptions.get(),
            port_accesses: self.port_accesses.get(),
            mmio_accesses: self.mmio_accesses.get(),
            direct_runs: self.direct_runs.get(),
            direct_pages: self.direct_pages.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_counts_while_it_lasts() {
        let stats = Stats::default();
        stats.sleeps(0);
        assert_eq!((stats.read(70).halted, stats.read(70).halted_ns), (true, 70));
        stats.wakes(100);
        assert_eq!((stats.read(500).halted, stats.read(500).halted_ns), (false, 100));
        stats.sleeps(1000);
        assert_eq!(stats.read(1010).halted_ns, 110);
    }
}
