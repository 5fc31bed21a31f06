//! `terem disk map --picture`: an image to look at.
//!
//! Two strips of cells in the order of a curve-free grid: above, the disk (what each part of it is, and which image of
//! the chain it comes from); below, the image's file (what lies where: tables, data, compressed data, nothing, and
//! what is lost). A cell stands for the same number of bytes everywhere in a strip, and has the colour of what fills
//! most of it.

use super::arguments::Image;
use super::describe::human;
use super::failed;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::print;
use std::fmt::Write;
use std::path::Path;
use terem_block::{BlockBackend, Disk, ExtentKind, FileRun, FileUse, file_map};

/// Cells of a row, and most rows of a strip.
const COLUMNS: usize = 64;
const ROWS: usize = 32;
/// Side of a cell in the SVG.
const CELL: usize = 12;

/// A kind of cell: its name, colour (SVG), and colour on a terminal (of the 256).
type Kind = (&'static str, &'static str, u8);

const DISK_KINDS: [Kind; 6] = [
    ("nothing", "#eceff1", 255),
    ("zero", "#b0bec5", 249),
    ("data", "#1565c0", 25),
    ("compressed", "#6a1b9a", 54),
    ("backing file", "#2e7d32", 28),
    ("further down", "#9e9d24", 142),
];
const FILE_KINDS: [Kind; 7] = [
    ("free", "#eceff1", 255),
    ("data", "#1565c0", 25),
    ("compressed", "#6a1b9a", 54),
    ("tables", "#ef6c00", 202),
    ("refcounts", "#f9a825", 220),
    ("snapshots only", "#00838f", 30),
    ("lost", "#c62828", 160),
];

/// A strip: its title, kinds, and the kind of each cell.
struct Strip {
    title: String,
    kinds: &'static [Kind],
    cells: Vec<usize>,
}

/// Bytes by kind for each cell.
struct Counter {
    total: u64,
    per_cell: u64,
    kinds: usize,
    bytes: Vec<u64>,
}

impl Counter {
    fn new(total: u64, unit: u64, kinds: usize) -> Self {
        let most = (COLUMNS * ROWS) as u64;
        let per_cell = total.div_ceil(most).next_multiple_of(unit.max(512)).max(512);
        let cells = usize::try_from(total.div_ceil(per_cell)).unwrap_or(0);
        Self { total, per_cell, kinds, bytes: vec![0; cells * kinds] }
    }

    fn add(&mut self, offset: u64, length: u64, kind: usize) {
        let end = offset.saturating_add(length).min(self.total);
        let mut at = offset;
        while at < end {
            let cell = at / self.per_cell;
            let next = ((cell + 1) * self.per_cell).min(end);
            let index = usize::try_from(cell).unwrap_or(usize::MAX).saturating_mul(self.kinds) + kind;
            if let Some(bytes) = self.bytes.get_mut(index) {
                *bytes += next - at;
            }
            at = next;
        }
    }

    /// The kind that fills most of each cell; something goes before nothing.
    fn cells(&self) -> Vec<usize> {
        let most = |cell: &[u64]| {
            let largest = cell.iter().enumerate().skip(1).max_by_key(|(_, bytes)| **bytes);
            largest.filter(|(_, bytes)| **bytes > 0).map_or(0, |(kind, _)| kind)
        };
        self.bytes.chunks(self.kinds).map(most).collect()
    }

    fn strip(&self, title: &str, kinds: &'static [Kind]) -> Strip {
        let title = format!("{title}: {}, {} a cell", human(self.total), human(self.per_cell));
        Strip { title, kinds, cells: self.cells() }
    }
}

/// Draws the map of a disk into a file, or on standard output.
pub fn draw(disk: &Disk, image: &Image, file: Option<&Path>) -> Result<Exit, Failure> {
    let read = |error| Failure::host(format!("cannot read {}: {error}", image.path.display()));
    let unit = u64::from(disk.geometry().optimal_io_size);
    let mut disk_cells = Counter::new(disk.size(), unit, DISK_KINDS.len());
    for extent in disk.block_status(0, u64::MAX).map_err(read)? {
        let kind = match (extent.kind, extent.depth) {
            (ExtentKind::Unallocated, _) => 0,
            (ExtentKind::Zero, _) => 1,
            (ExtentKind::Data, 0) => 2,
            (ExtentKind::Compressed, 0) => 3,
            (_, 1) => 4,
            _ => 5,
        };
        disk_cells.add(extent.offset, extent.length, kind);
    }
    let mut strips = vec![disk_cells.strip("disk", &DISK_KINDS)];
    let (length, runs) =
        file_map(&image.path, image.format).map_err(|error| failed("read", &image.path, &error))?;
    if !runs.is_empty() {
        let mut file_cells = Counter::new(length, unit, FILE_KINDS.len());
        for FileRun { offset, length, what } in runs {
            let kind = match what {
                FileUse::Data => 1,
                FileUse::Compressed => 2,
                FileUse::Table => 3,
                FileUse::Refcounts => 4,
                FileUse::Snapshot => 5,
                FileUse::Leaked => 6,
            };
            file_cells.add(offset, length, kind);
        }
        strips.push(file_cells.strip("file", &FILE_KINDS));
    }
    let name = image.path.display().to_string();
    match file {
        None => print(&on_terminal(&name, &strips)),
        Some(file) => {
            std::fs::write(file, svg(&name, &strips))
                .map_err(|error| Failure::host(format!("cannot write {}: {error}", file.display())))?;
            Ok(Exit::Success)
        }
    }
}

/// Two rows of cells to a line, by half blocks in two colours.
fn on_terminal(name: &str, strips: &[Strip]) -> String {
    let mut text = format!("{name}\n");
    for strip in strips {
        let _ = writeln!(text, "\n{}", strip.title);
        let colour = |kind: usize| strip.kinds[kind].2;
        let rows: Vec<&[usize]> = strip.cells.chunks(COLUMNS).collect();
        for pair in rows.chunks(2) {
            for column in 0..pair[0].len() {
                let lower = pair.get(1).and_then(|row| row.get(column));
                let _ = write!(text, "\x1b[38;5;{}", colour(pair[0][column]));
                match lower {
                    Some(&kind) => {
                        let _ = write!(text, ";48;5;{}m▀", colour(kind));
                    }
                    None => text += ";49m▀",
                }
            }
            text += "\x1b[0m\n";
        }
        for (kind, (name, _, colour)) in strip.kinds.iter().enumerate() {
            if strip.cells.contains(&kind) {
                let _ = write!(text, "\x1b[38;5;{colour}m█\x1b[0m {name}  ");
            }
        }
        text += "\n";
    }
    text
}

fn svg(name: &str, strips: &[Strip]) -> String {
    let escaped = name.replace('&', "&amp;").replace('<', "&lt;");
    let width = COLUMNS * CELL + 40;
    let mut body = String::new();
    let mut y = 50;
    for strip in strips {
        let title = &strip.title;
        let _ = writeln!(body, r#"<text x="20" y="{y}" font-size="14">{title}</text>"#);
        y += 10;
        for (i, &kind) in strip.cells.iter().enumerate() {
            let (x, y) = (20 + i % COLUMNS * CELL, y + i / COLUMNS * CELL);
            let (side, colour) = (CELL - 1, strip.kinds[kind].1);
            let _ =
                writeln!(body, r#"<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="{colour}"/>"#);
        }
        y += strip.cells.len().div_ceil(COLUMNS) * CELL + 20;
        let mut x = 20;
        for (kind, (name, colour, _)) in strip.kinds.iter().enumerate() {
            if strip.cells.contains(&kind) {
                let (top, side, text_x) = (y - 11, CELL, x + CELL + 5);
                let _ = writeln!(
                    body,
                    r#"<rect x="{x}" y="{top}" width="{side}" height="{side}" fill="{colour}"/><text x="{text_x}" y="{y}" font-size="12">{name}</text>"#
                );
                x += 110;
            }
        }
        y += 40;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{y}\" font-family=\"sans-serif\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"20\" y=\"25\" font-size=\"16\" font-weight=\"bold\">{escaped}</text>\n{body}</svg>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_have_the_colour_of_what_fills_them() {
        let mut counter = Counter::new(4 * 2048 * 65536, 65536, 3);
        assert_eq!(counter.per_cell, 4 * 65536);
        counter.add(0, 65536, 1);
        counter.add(65536, 3 * 65536, 2);
        counter.add(2 * 4 * 65536, 65536, 1);
        assert_eq!(counter.cells()[..3], [2, 0, 1]);
        assert_eq!(counter.cells().len(), 2048);
        let strip = counter.strip("disk", &DISK_KINDS);
        let (terminal, svg) = (on_terminal("a<b", std::slice::from_ref(&strip)), svg("a<b", &[strip]));
        assert_eq!(terminal.lines().count(), 1 + 2 + ROWS / 2 + 1);
        assert_eq!(svg.matches("<rect").count(), 1 + 2048 + 3);
        assert!(svg.contains("a&lt;b"));
    }
}
