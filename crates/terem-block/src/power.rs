//! For tests: random work on an image, the power fails at any moment, and what may be in the image then.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use terem_memory::AlignedBuffer;

use crate::chain::open_chain;
use crate::engine::Engine;
use crate::executor::{Executor, LocalFuture, join_all};
use crate::node::Node;
use crate::{AioEngine, BlockBackend, Disk, Format, IoError, Op, OpenOptions, journal};

pub(crate) const SIZE: u64 = 1 << 20;
pub(crate) const SECTOR: u64 = 512;

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// What may be in each sector.
#[derive(Default)]
pub(crate) struct History {
    /// At the last flush.
    flushed: HashMap<u64, Vec<u8>>,
    /// Written since, with the moment.
    since: Vec<(usize, u64, u8)>,
    /// The moments of the flushes, with what each sector could hold then.
    flushes: Vec<(usize, HashMap<u64, Vec<u8>>)>,
}

impl History {
    fn wrote(&mut self, offset: u64, length: u64, value: u8) {
        let now = journal::now();
        self.since.extend((offset / SECTOR..(offset + length) / SECTOR).map(|sector| (now, sector, value)));
    }

    fn flush(&mut self) {
        for &(_, sector, value) in &self.since {
            self.flushed.insert(sector, vec![value]);
        }
        self.flushes.push((journal::now(), self.flushed.clone()));
    }

    /// The values that a sector may have after a cut at `cut`; `None` where nothing was ever written.
    fn allowed(&self, cut: usize, initial: u8) -> HashMap<u64, Vec<u8>> {
        let last = self.flushes.iter().rfind(|(at, _)| *at <= cut);
        let mut allowed = last.map(|(_, values)| values.clone()).unwrap_or_default();
        let from = last.map_or(0, |(at, _)| *at);
        for &(at, sector, value) in &self.since {
            if at >= from && at < cut {
                allowed.entry(sector).or_insert_with(|| vec![initial]).push(value);
            }
        }
        allowed
    }
}

/// What is in the image before.
pub(crate) const INITIAL: u8 = 0x11;

/// Random requests, some of them side by side.
pub(crate) async fn work(node: &Node, random: &mut Random, history: &mut History) {
    let size = node.size();
    for _ in 0..40 {
        let mut requests: Vec<LocalFuture<'_, Result<(), IoError>>> = Vec::new();
        let lanes = 1 + random.below(3);
        for lane in 0..lanes {
            // Side by side in their own parts of the disk, so that the outcome is known.
            let part = size / lanes / SECTOR * SECTOR;
            let most = if random.below(3) == 0 { 200 } else { 8 };
            let length = SECTOR * (1 + random.below(most));
            let offset = lane * part + SECTOR * random.below((part - length) / SECTOR);
            let value = u8::try_from(1 + random.below(255)).expect("a byte");
            let op = if random.below(5) == 0 {
                history.wrote(offset, length, 0);
                Op::WriteZeroes { offset, length, unmap: value > 100 }
            } else {
                history.wrote(offset, length, value);
                let bytes = vec![value; usize::try_from(length).expect("small")];
                Op::Write { offset, memory: Arc::new(AlignedBuffer::from_slice(&bytes)) }
            };
            requests.push(Box::pin(node.execute(op)));
        }
        join_all(requests).await.expect("written");
        if random.below(3) == 0 {
            node.execute(Op::Flush).await.expect("flushed");
            history.flush();
        }
    }
    node.close().await.expect("closed");
    history.flush();
}

/// The values that each sector may have, after a cut at a moment.
pub(crate) type Allowed = HashMap<u64, Vec<u8>>;

/// Fills the empty image with [`INITIAL`], if so; what is in it then.
pub(crate) fn fill(image: &Path, format: Format, really: bool) -> u8 {
    if !really {
        return 0;
    }
    let options = OpenOptions { format: Some(format), ..OpenOptions::default() };
    let disk = Disk::open(image, &options).expect("opened");
    let bytes = vec![INITIAL; usize::try_from(disk.size()).expect("small")];
    disk.run(Op::Write { offset: 0, memory: Arc::new(AlignedBuffer::from_slice(&bytes)) }).expect("written");
    disk.close().expect("closed");
    INITIAL
}

/// Works on the image, which holds `initial`, cuts the power at about forty moments, and lets `verify` look at what is left then: a copy of
/// the image at the second path.
pub(crate) fn cut_power(
    seed: u64,
    image: &Path,
    format: Format,
    initial: u8,
    cut_image: &Path,
    mut verify: impl FnMut(&Path, &Allowed, usize),
) {
    let before = fs::read(image).expect("read");
    let engine = Engine::new(AioEngine::Auto).expect("an engine");
    // A small table cache, so that tables are also written back for want of room.
    let open = OpenOptions { table_cache: 0, format: Some(format), ..OpenOptions::default() };
    let node = open_chain(&engine, image, &open).expect("opened");
    let (mut random, mut history) = (Random(seed), History::default());
    journal::begin();
    let executor = Executor::new(engine);
    executor.block_on(work(&node, &mut random, &mut history)).expect("waited");
    drop((node, executor));

    let end = journal::now();
    assert!(end > 50, "only {end} writes");
    for i in 0..=40 {
        // Most of them early, where most tables are made.
        let cut = end * i * i / 1600;
        // From "nothing without a sync" to "everything at once".
        let chance = random.below(5);
        let mut coin = Random(seed + i as u64);
        let file = journal::after_power_cut(before.clone(), cut, || coin.below(4) < chance);
        fs::write(cut_image, file).expect("written");
        verify(cut_image, &history.allowed(cut, initial), cut);
    }
}

/// Reads the image after a cut: every sector must be one of what is allowed.
pub(crate) fn verify_contents(image: &Path, format: Format, allowed: &Allowed, initial: u8, cut: usize) {
    let options = OpenOptions { aio: AioEngine::Threads, format: Some(format), ..OpenOptions::read_only() };
    let disk = Disk::open(image, &options).expect("opened");
    let memory = Arc::new(AlignedBuffer::new(usize::try_from(disk.size()).expect("small")));
    disk.run(Op::Read { offset: 0, memory: Arc::clone(&memory) as Arc<dyn crate::IoMemory> }).expect("read");
    for (sector, bytes) in memory.to_vec().chunks(512).enumerate() {
        let initial = [initial];
        let allowed = allowed.get(&(sector as u64)).map_or(&initial[..], Vec::as_slice);
        let first = bytes[0];
        assert!(
            allowed.contains(&first) && bytes.iter().all(|b| *b == first),
            "cut at {cut}: sector {sector:#x} is {first:#x}, not one of {allowed:x?}"
        );
    }
}
