//! Boards: which devices there are and how they are wired.

pub mod ports;
