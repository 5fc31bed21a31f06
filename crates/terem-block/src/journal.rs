//! For tests: what this thread's files were told, so that the storage can be rebuilt as a power cut at any
//! moment would leave it: everything that a finished sync covers, and of the rest any sectors at all.

use std::cell::RefCell;

use crate::engine::View;

/// The unit that storage writes whole or not at all.
const SECTOR: usize = 512;

#[derive(Debug)]
struct Record {
    offset: u64,
    change: Change,
    ended: bool,
    /// The number of records at the end of the sync that made it durable.
    durable: Option<usize>,
}

#[derive(Debug)]
enum Change {
    Write(Vec<u8>),
    Zero(u64),
    Grow(u64),
}

thread_local! {
    static RECORDS: RefCell<Option<Vec<Record>>> = const { RefCell::new(None) };
}

/// Records from now on.
pub(crate) fn begin() {
    RECORDS.set(Some(Vec::new()));
}

/// The number of records so far: a moment at which the power can fail.
pub(crate) fn now() -> usize {
    RECORDS.with_borrow(|records| records.as_ref().map_or(0, Vec::len))
}

fn add(offset: u64, change: Change, ended: bool) -> Option<usize> {
    RECORDS.with_borrow_mut(|records| {
        let records = records.as_mut()?;
        records.push(Record { offset, change, ended, durable: None });
        Some(records.len() - 1)
    })
}

/// A write has begun.
pub(crate) fn write(offset: u64, views: &[View]) -> Option<usize> {
    RECORDS.with_borrow(Option::is_some).then(|| {
        let bytes = views.iter().flat_map(View::to_vec).collect();
        add(offset, Change::Write(bytes), false)
    })?
}

/// A write of plain bytes has begun.
pub(crate) fn write_bytes(offset: u64, bytes: &[u8]) -> Option<usize> {
    add(offset, Change::Write(bytes.to_vec()), false)
}

/// A write has ended.
pub(crate) fn ended(record: Option<usize>) {
    RECORDS.with_borrow_mut(|records| {
        if let (Some(records), Some(record)) = (records, record) {
            records[record].ended = true;
        }
    });
}

/// `fallocate` has ended.
pub(crate) fn allocated(mode: i32, offset: u64, length: u64) {
    let zeroes = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
    add(offset, if zeroes { Change::Zero(length) } else { Change::Grow(length) }, true);
}

/// A sync begins; the records that it covers.
pub(crate) fn sync_begins() -> Vec<usize> {
    RECORDS.with_borrow(|records| {
        let records = records.iter().flatten().enumerate();
        records.filter(|(_, r)| r.ended && r.durable.is_none()).map(|(i, _)| i).collect()
    })
}

/// That sync has ended.
pub(crate) fn synced(covered: &[usize]) {
    RECORDS.with_borrow_mut(|records| {
        let Some(records) = records else { return };
        let now = records.len();
        covered.iter().for_each(|&i| records[i].durable = records[i].durable.or(Some(now)));
    });
}

/// The file as a power cut at moment `cut` may leave it, when it began as `file`. `keep` decides for each
/// sector that no sync covers.
pub(crate) fn after_power_cut(mut file: Vec<u8>, cut: usize, mut keep: impl FnMut() -> bool) -> Vec<u8> {
    RECORDS.with_borrow(|records| {
        for record in records.iter().flatten().take(cut) {
            let durable = record.durable.is_some_and(|at| at <= cut);
            let start = usize::try_from(record.offset).expect("a small file");
            let length = match &record.change {
                Change::Write(bytes) => bytes.len(),
                Change::Zero(length) | Change::Grow(length) => {
                    usize::try_from(*length).expect("a small file")
                }
            };
            let mut at = 0;
            while at < length {
                let next = (at + SECTOR - (start + at) % SECTOR).min(length);
                if durable || keep() {
                    // Punching a hole beyond the end would not make the file longer.
                    file.resize(file.len().max(start + next), 0);
                    match &record.change {
                        Change::Write(bytes) => {
                            file[start + at..start + next].copy_from_slice(&bytes[at..next]);
                        }
                        Change::Zero(_) => file[start + at..start + next].fill(0),
                        Change::Grow(_) => {}
                    }
                }
                at = next;
            }
        }
    });
    file
}
