//! What ends an instruction early.

/// Exception vectors (Intel SDM vol. 3, table 6-1).
#[allow(missing_docs, reason = "the manual's own names")]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// How an event came about; decides what RIP is saved and how the IDT gate is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A fault: RIP is the instruction's own.
    Fault = 1,
    /// A trap or software interrupt (`int3`, `into`, `int n`): RIP is the next instruction's, and the
    /// gate's DPL is checked.
    Software,
    /// A trap of the processor's own (`#DB` single step): RIP is the next instruction's.
    Trap,
    /// An external interrupt or NMI.
    External,
}

/// An exception on its way to the guest. Eight bytes, so that `Result<(), Fault>` stays in a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// How it came about.
    pub kind: Kind,
    /// The vector.
    pub vector: u8,
    /// Whether `code` is pushed.
    pub has_code: bool,
    /// The error code.
    pub code: u32,
}

impl Fault {
    /// A fault without error code.
    #[must_use]
    pub const fn new(vector: u8) -> Self {
        Self { kind: Kind::Fault, vector, has_code: false, code: 0 }
    }

    /// A fault with error code.
    #[must_use]
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self { kind: Kind::Fault, vector, has_code: true, code }
    }

    /// `#UD`.
    pub const UD: Self = Self::new(vector::UD);
    /// `#NM`.
    pub const NM: Self = Self::new(vector::NM);
    /// `#DE`.
    pub const DE: Self = Self::new(vector::DE);
    /// `#GP(0)`.
    pub const GP0: Self = Self::with_code(vector::GP, 0);
    /// `#SS(0)`.
    pub const SS0: Self = Self::with_code(vector::SS, 0);
    /// `#MF`.
    pub const MF: Self = Self::new(vector::MF);
    /// `#XM`.
    pub const XM: Self = Self::new(vector::XM);
}

/// What executing an instruction gives.
pub type Exec<T = ()> = Result<T, Fault>;
