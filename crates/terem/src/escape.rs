//! What is typed at a raw terminal: keys for the guest, and `Ctrl-a` for us.

/// `Ctrl-a`.
const ESCAPE: u8 = 0x01;

/// What the user wants besides typing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// `Ctrl-a x`.
    Quit,
    /// `Ctrl-a h`.
    Help,
}

/// Takes `Ctrl-a` and the key after it out of what is typed.
#[derive(Debug, Default)]
pub struct Escape {
    /// `Ctrl-a` was the last key.
    begun: bool,
}

impl Escape {
    /// Reads what was typed: keys for the guest go into `keys`; returns the first wish, and what was typed after it.
    pub fn read<'a>(&mut self, typed: &'a [u8], keys: &mut Vec<u8>) -> Option<(Wish, &'a [u8])> {
        for (index, &key) in typed.iter().enumerate() {
            let rest = typed.get(index + 1..).unwrap_or_default();
            match (std::mem::replace(&mut self.begun, false), key) {
                (false, ESCAPE) => self.begun = true,
                (true, b'x' | b'X') => return Some((Wish::Quit, rest)),
                (true, b'h' | b'H' | b'?') => return Some((Wish::Help, rest)),
                // `Ctrl-a Ctrl-a` sends one, and so does `Ctrl-a a` as in screen; other keys go to the guest as they are.
                (true, b'a') => keys.push(ESCAPE),
                (_, key) => keys.push(key),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(parts: &[&[u8]]) -> (Vec<u8>, Vec<Wish>) {
        let (mut escape, mut keys, mut wishes) = (Escape::default(), Vec::new(), Vec::new());
        for part in parts {
            let mut typed = *part;
            while let Some((wish, rest)) = escape.read(typed, &mut keys) {
                wishes.push(wish);
                typed = rest;
            }
        }
        (keys, wishes)
    }

    #[test]
    fn keys_and_wishes() {
        assert_eq!(all(&[b"ls\r"]), (b"ls\r".to_vec(), vec![]));
        assert_eq!(all(&[b"a\x01hb\x01xc"]), (b"abc".to_vec(), vec![Wish::Help, Wish::Quit]));
        assert_eq!(all(&[b"\x01", b"x"]), (vec![], vec![Wish::Quit]));
        assert_eq!(all(&[b"\x01\x01x"]), (b"\x01x".to_vec(), vec![]));
        assert_eq!(all(&[b"\x01az"]), (b"\x01z".to_vec(), vec![]));
    }
}
