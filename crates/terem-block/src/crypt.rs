//! Data that are encrypted in a [`File`]: any offset, length and memory, whatever the size of an encrypted sector.
//!
//! ```text
//!  read:   File ──ciphertext──> buffer ──decrypt, piece by piece──> the request's memory
//!  write:  the request's memory ──piece by piece──> buffer, encrypted there ──ciphertext──> File
//! ```
//!
//! A request's memory never holds ciphertext, and is read once only: a guest that changes it meanwhile gets what it
//! wrote at some moment. Requests are cut into chunks. A large one's chunks are encrypted by worker threads while the
//! I/O of others goes on; a small one is quicker done on the disk's own thread. Writes of parts of sectors read these
//! before, with nobody else writing there.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::channel;

use terem_crypt::{SECTOR, SectorCipher};
use terem_memory::{AlignedBuffer, IoMemory};

use crate::IoError;
use crate::engine::View;
use crate::executor::{LocalFuture, join_all};
use crate::file::{File, to_usize};
use crate::range_lock::RangeLock;

/// Bytes of a chunk: one file operation, and one job of a worker thread. A multiple of every sector's size.
const CHUNK: usize = 256 << 10;
/// Chunks of one request that are under way at once; bounds the memory that a large one takes.
const FLYING: usize = 16;
/// Buffers kept for later requests.
const KEPT: usize = 16;
/// Up to so many bytes are not worth the way to another thread and back: some microseconds of encryption.
const INLINE: usize = 32 << 10;
/// Bytes that are encrypted in one piece; they stay in the first-level cache.
const PIECE: usize = 32 << 10;
/// Most zeroes that are written at once.
const ZEROES: usize = 2 << 20;

/// A place in a file, and the same place as the cipher counts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Offset in the file.
    pub(crate) file: u64,
    /// Bytes before it as the initialization vectors count them. Sectors begin at multiples of their size.
    pub(crate) cipher: u64,
}

impl Place {
    fn add(self, bytes: u64) -> Self {
        Self { file: self.file + bytes, cipher: self.cipher + bytes }
    }
}

/// Encrypts what goes into a file, and decrypts what comes out of it.
pub(crate) struct Crypt {
    cipher: Arc<SectorCipher>,
    /// What is added to sector numbers.
    tweak: u64,
    /// By sector: shared to read or to write it whole, exclusive to write a part of it.
    sectors: RangeLock,
    buffers: RefCell<Vec<Arc<AlignedBuffer>>>,
}

impl Crypt {
    pub(crate) fn new(cipher: SectorCipher, tweak: u64) -> Self {
        Self { cipher: Arc::new(cipher), tweak, sectors: RangeLock::default(), buffers: RefCell::default() }
    }

    /// Bytes of an encrypted sector.
    pub(crate) fn sector_size(&self) -> u64 {
        self.cipher.sector_size() as u64
    }

    /// The sectors that `length` bytes at `place` touch.
    fn sectors(&self, place: Place, length: usize) -> Range<u64> {
        let size = self.sector_size();
        place.cipher / size..(place.cipher + length as u64).div_ceil(size)
    }

    /// Fills `view` with what is at `place`.
    pub(crate) async fn read(&self, file: &File, place: Place, view: View) -> Result<(), IoError> {
        if view.len() == 0 {
            return Ok(());
        }
        let _sectors = self.sectors.shared(self.sectors(place, view.len())).await;
        self.read_locked(file, place, &view).await
    }

    async fn read_locked(&self, file: &File, place: Place, view: &View) -> Result<(), IoError> {
        let size = self.sector_size();
        let before = place.cipher % size;
        let start = Place { file: place.file - before.min(place.file), cipher: place.cipher - before };
        if before > place.file {
            return Err(IoError::Corrupt("an encrypted sector begins before the file".into()));
        }
        let skip = to_usize(before);
        let total = (skip + view.len()).next_multiple_of(to_usize(size));
        self.chunks(total, |chunk| {
            Box::pin(self.read_chunk(file, start.add(chunk.start as u64), chunk, skip, view))
        })
        .await
    }

    /// Reads the sectors `chunk` (bytes from the first sector on), of which the first `skip` are not asked for.
    async fn read_chunk(
        &self,
        file: &File,
        place: Place,
        chunk: Range<usize>,
        skip: usize,
        view: &View,
    ) -> Result<(), IoError> {
        let (cipher, sector, length) = (Arc::clone(&self.cipher), self.sector(place), chunk.len());
        let target = Target { view: view.clone(), skip };
        if length > INLINE
            && let Some(cached) = file.cached()
        {
            // The thread that decrypts reads too: it then finds everything in its own processor's cache.
            let (target, cipher, first) = (target.clone(), Arc::clone(&cipher), chunk.start);
            let work = move || {
                let mut piece = vec![0; PIECE.min(length)];
                for at in (0..length).step_by(PIECE) {
                    let piece = &mut piece[..PIECE.min(length - at)];
                    if !cached.read(place.file + at as u64, piece) {
                        return false;
                    }
                    cipher.decrypt(sector.wrapping_add((at / SECTOR) as u64), piece);
                    target.put(first + at, piece);
                }
                true
            };
            if self.work(file, length, work).await? {
                return Ok(());
            }
        }
        let (buffer, bytes) = self.buffer(length);
        file.read(place.file, &[bytes]).await?;
        let encrypted = Arc::clone(&buffer);
        let work = move || {
            let mut piece = vec![0; PIECE.min(length)];
            for at in (0..length).step_by(PIECE) {
                let piece = &mut piece[..PIECE.min(length - at)];
                encrypted.read_at(at, piece);
                cipher.decrypt(sector.wrapping_add((at / SECTOR) as u64), piece);
                target.put(chunk.start + at, piece);
            }
        };
        self.work(file, length, work).await?;
        self.give_back(buffer);
        Ok(())
    }

    /// Writes `views`, one after the other, to `place`.
    pub(crate) async fn write(&self, file: &File, place: Place, views: &[View]) -> Result<(), IoError> {
        let length: usize = views.iter().map(View::len).sum();
        if length == 0 {
            return Ok(());
        }
        let size = self.sector_size();
        let (head, end) = (place.cipher % size, place.cipher + length as u64);
        let tail = end.next_multiple_of(size) - end;
        let sectors = self.sectors(place, length);
        if head == 0 && tail == 0 {
            let _sectors = self.sectors.shared(sectors).await;
            return self.write_whole(file, place, views).await;
        }
        let _sectors = self.sectors.exclusive(sectors).await;
        if head > place.file {
            return Err(IoError::Corrupt("an encrypted sector begins before the file".into()));
        }
        let start = Place { file: place.file - head, cipher: place.cipher - head };
        let (before, after) = (View::zeroed(to_usize(head)), View::zeroed(to_usize(tail)));
        if head > 0 {
            self.read_locked(file, start, &before).await?;
        }
        if tail > 0 {
            self.read_locked(file, place.add(length as u64), &after).await?;
        }
        let all: Vec<_> = [before].into_iter().chain(views.iter().cloned()).chain([after]).collect();
        self.write_whole(file, start, &all).await
    }

    /// Writes whole sectors.
    async fn write_whole(&self, file: &File, place: Place, views: &[View]) -> Result<(), IoError> {
        let views: Arc<[View]> = views.into();
        let total = views.iter().map(View::len).sum();
        self.chunks(total, |chunk| {
            Box::pin(self.write_chunk(file, place.add(chunk.start as u64), chunk, Arc::clone(&views)))
        })
        .await
    }

    async fn write_chunk(
        &self,
        file: &File,
        place: Place,
        chunk: Range<usize>,
        views: Arc<[View]>,
    ) -> Result<(), IoError> {
        let (cipher, sector, length) = (Arc::clone(&self.cipher), self.sector(place), chunk.len());
        let mut buffer = self.buffer(length).0;
        let work = move || {
            let own = Arc::get_mut(&mut buffer)?.as_mut_slice();
            for at in (0..length).step_by(PIECE) {
                let piece = &mut own[at..length.min(at + PIECE)];
                gather(&views, chunk.start + at, piece);
                cipher.encrypt(sector.wrapping_add((at / SECTOR) as u64), piece);
            }
            Some(buffer)
        };
        // Nobody else has a share of it.
        let buffer = self.work(file, length, work).await?.ok_or(IoError::Closed)?;
        let memory: Arc<dyn IoMemory> = Arc::<AlignedBuffer>::clone(&buffer);
        file.write(place.file, &[View::new(memory).part(0, length)]).await?;
        self.give_back(buffer);
        Ok(())
    }

    /// Writes encrypted zeroes: what is not written reads as anything.
    pub(crate) async fn write_zeroes(&self, file: &File, place: Place, length: u64) -> Result<(), IoError> {
        let zeroes = View::zeroed(to_usize(length).min(ZEROES));
        let mut done = 0;
        while done < length {
            let part = zeroes.part(0, to_usize(length - done));
            let n = part.len() as u64;
            self.write(file, place.add(done), &[part]).await?;
            done += n;
        }
        Ok(())
    }

    /// The number of the sector at `place`.
    fn sector(&self, place: Place) -> u64 {
        (place.cipher / SECTOR as u64).wrapping_add(self.tweak)
    }

    /// Carries out `one` for each chunk of `total` bytes, some at once.
    async fn chunks<'a>(
        &'a self,
        total: usize,
        one: impl Fn(Range<usize>) -> LocalFuture<'a, Result<(), IoError>>,
    ) -> Result<(), IoError> {
        if total <= CHUNK {
            return one(0..total).await;
        }
        let next = Cell::new(0);
        let take = || {
            let start = next.get();
            next.set(start + CHUNK);
            (start < total).then(|| start..(start + CHUNK).min(total))
        };
        let workers = (0..total.div_ceil(CHUNK).min(FLYING)).map(|_| {
            Box::pin(async {
                while let Some(chunk) = take() {
                    one(chunk).await?;
                }
                Ok(())
            }) as LocalFuture<'_, _>
        });
        join_all(workers.collect()).await
    }

    /// Does `work` on `length` bytes here or on another thread.
    async fn work<T: Send + 'static>(
        &self,
        file: &File,
        length: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, IoError> {
        if length <= INLINE {
            return Ok(work());
        }
        let (tell, told) = channel();
        file.engine().compute(move || drop(tell.send(work()))).await?;
        told.recv().map_err(|_| IoError::Closed)
    }

    /// A buffer for `length` bytes (at most [`CHUNK`]) that nobody else has, and those.
    fn buffer(&self, length: usize) -> (Arc<AlignedBuffer>, View) {
        let kept = if length > INLINE { self.buffers.borrow_mut().pop() } else { None };
        let buffer = kept
            .unwrap_or_else(|| Arc::new(AlignedBuffer::new(if length > INLINE { CHUNK } else { length })));
        let memory: Arc<dyn IoMemory> = Arc::<AlignedBuffer>::clone(&buffer);
        (buffer, View::new(memory).part(0, length))
    }

    /// Keeps a buffer, if nobody else holds it any more.
    fn give_back(&self, buffer: Arc<AlignedBuffer>) {
        let mut buffers = self.buffers.borrow_mut();
        if buffer.len() == CHUNK && Arc::strong_count(&buffer) == 1 && buffers.len() < KEPT {
            buffers.push(buffer);
        }
    }
}

/// Where decrypted bytes go.
#[derive(Clone)]
struct Target {
    view: View,
    /// Bytes of the first sector that are not asked for.
    skip: usize,
}

impl Target {
    /// Puts in what was decrypted, which begins `at` bytes after the beginning of the first sector.
    fn put(&self, at: usize, bytes: &[u8]) {
        let unwanted = self.skip.saturating_sub(at).min(bytes.len());
        let to = self.view.part((at + unwanted).saturating_sub(self.skip), bytes.len() - unwanted);
        to.put(&bytes[unwanted..]);
    }
}

/// Copies the bytes from `at` on of `views`, one after the other.
fn gather(views: &[View], at: usize, buf: &mut [u8]) {
    let (mut skip, mut done) = (at, 0);
    for view in views {
        if skip >= view.len() {
            skip -= view.len();
            continue;
        }
        let n = (view.len() - skip).min(buf.len() - done);
        view.get(skip, &mut buf[done..done + n]);
        (done, skip) = (done + n, 0);
    }
}
