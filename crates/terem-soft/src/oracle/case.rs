//! One experiment: what goes in, what comes out, and where it all lies.

/// Linear address of the code page.
pub(crate) const CODE: u64 = 0x1000_0000;
/// Linear address of the pages that may be written.
pub(crate) const DATA: u64 = 0x2000_0000;
/// Bytes that may be written; the page after them is not there.
pub(super) const DATA_LEN: usize = 0x2000;
/// Linear address of a page that can only be read.
pub(super) const READ_ONLY: u64 = DATA + 0x3000;
/// Code bytes of a case, at most.
pub(super) const CODE_LEN: usize = 128;
/// Cases that go to the other process at once.
pub(super) const BATCH: usize = 64;
/// Vector of `int3`, which ends every case.
pub(super) const END: u32 = 3;

/// A generator of random numbers (xorshift64*): the same everywhere, and safe in a signal handler.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        // Splitmix64, so that neighbouring seeds are far apart.
        let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((z ^ z >> 31) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    pub(super) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Values at which arithmetic turns.
const EDGES: [u64; 24] = [
    0,
    1,
    2,
    0xff,
    0x7f,
    0x80,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
    0x3f80_0000_bf80_0000, // 1.0, -1.0
    0x7f80_0000_ff80_0000, // infinities
    0x7fc0_0000_7fa0_0001, // quiet and signalling NaN
    0x0000_0001_8000_0000, // denormal, -0
    0x3ff0_0000_0000_0000, // the same in double precision
    0x7ff0_0000_0000_0000,
    0x7ff4_0000_0000_0001,
    0xfff8_0000_0000_0000,
    0x000f_ffff_ffff_ffff,
];

/// A value that is random, or small, or on an edge.
pub(super) fn value(r: &mut Random) -> u64 {
    match r.below(8) {
        0..=2 => r.next(),
        3 => r.pick(&EDGES),
        4 => r.next() & 0x3f,
        5 => (r.next() & 0xff).wrapping_sub(128),
        6 => r.next() >> (r.next() & 63),
        _ => {
            // Floating-point numbers of ordinary size.
            let f = (r.next() as i32 >> (r.next() & 31)) as f32 * 0.37;
            match r.below(3) {
                0 => f64::from(f).to_bits(),
                1 => u64::from(f.to_bits()) << 32 | u64::from((f * 3.0).to_bits()),
                _ => u64::from(f.to_bits()),
            }
        }
    }
}

/// What memory holds before a case.
pub(super) fn fill(seed: u64, memory: &mut [u8]) {
    let mut r = Random::new(seed);
    for word in memory.chunks_exact_mut(8) {
        word.copy_from_slice(&value(&mut r).to_le_bytes());
    }
}

/// An FXSAVE area.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct FxArea(pub(super) [u8; 512]);

/// The upper halves of the YMM registers, as XSAVE has them.
pub(super) type Uppers = [u8; 256];

/// What goes in.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Case {
    pub(super) seed: u64,
    pub(super) code: [u8; CODE_LEN],
    pub(super) len: usize,
    /// Options of the decoder, as the model has it.
    pub(super) decoding: u32,
    pub(super) gpr: [u64; 16],
    pub(super) rflags: u64,
    pub(super) fx: FxArea,
    pub(super) uppers: Uppers,
    /// Which of x87, SSE and AVX state is as said here; the others are in their initial configuration.
    pub(super) present: u64,
    /// Flags that need not be equal afterwards.
    pub(super) undefined: u64,
}

/// What comes out.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Outcome {
    /// The exception's vector; [`END`]: it ran to its end. `u32::MAX`: nothing came out.
    pub(super) vector: u32,
    pub(super) code: u32,
    pub(super) cr2: u64,
    pub(super) rip: u64,
    pub(super) gpr: [u64; 16],
    pub(super) rflags: u64,
    pub(super) fx: FxArea,
    pub(super) uppers: Uppers,
    pub(super) data: [u8; DATA_LEN],
}

impl Outcome {
    pub(super) const NONE: Self = Self {
        vector: u32::MAX,
        code: 0,
        cr2: 0,
        rip: 0,
        gpr: [0; 16],
        rflags: 0,
        fx: FxArea([0; 512]),
        uppers: [0; 256],
        data: [0; DATA_LEN],
    };
}
