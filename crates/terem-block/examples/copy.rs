//! Copies an image: the library by itself.
//!
//! `cargo run --release -p terem-block --example copy -- SOURCE TARGET FORMAT [NAME=VALUE… | compress]`

use std::time::Instant;

use terem_block::{ConvertOptions, CreateOptions, Format, OpenOptions, convert};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, target, format, settings @ ..] = arguments.as_slice() else {
        return Err("SOURCE TARGET FORMAT [NAME=VALUE… | compress]".into());
    };
    let format = Format::from_name(format).ok_or("no such format")?;
    let mut create = CreateOptions { format, overwrite: true, ..CreateOptions::default() };
    let mut options = ConvertOptions { durable: false, ..ConvertOptions::default() };
    for setting in settings {
        let Some((name, value)) = setting.split_once('=') else {
            options.compress = setting == "compress";
            continue;
        };
        let known = format.create_options().iter().find(|option| option.name == name);
        (known.ok_or("no such setting")?.set)(&mut create, value)?;
    }
    let begun = Instant::now();
    convert(source, &OpenOptions::default(), target, &create, &options, &mut |_, _| true)?;
    println!("{:.3}", begun.elapsed().as_secs_f64());
    Ok(())
}
