//! The machine, in the order in which it is made: [`plan`], [`boot`], [`acpi`].

#![forbid(unsafe_code)]

pub mod acpi;
pub mod board;
pub mod boot;
pub mod e820;
pub mod plan;
