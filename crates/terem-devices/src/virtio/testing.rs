//! What tests and fuzz targets put around a device: backends in memory, and a guest driver.

pub mod backends;
#[cfg(test)]
pub mod driver;
#[cfg(test)]
pub mod ring;
