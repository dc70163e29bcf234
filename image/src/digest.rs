//! Digests of content (image-spec, descriptor.md): SHA-256, the only algorithm that images are written with.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, Read};
use std::rc::Rc;

use sha2::{Digest as _, Sha256};

const PREFIX: &str = "sha256:";

/// A SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Of `sha256:` and 64 hexadecimal digits in lower case.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::from_hex(text.strip_prefix(PREFIX)?)
    }

    pub(crate) fn from_hex(hex: &str) -> Option<Self> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        let mut digest = [0; 32];
        let pairs = hex.as_bytes().chunks_exact(2);
        if hex.len() != 64 {
            return None;
        }
        for (byte, pair) in digest.iter_mut().zip(pairs) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self(digest))
    }

    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The 64 digits.
    #[must_use]
    pub fn hex(&self) -> String {
        use fmt::Write as _;
        self.0.iter().fold(String::with_capacity(64), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }

    /// `ChainID` of a layer: of what it is and all that lies below it (image-spec, config.md).
    pub(crate) fn chain(below: Option<&Self>, layer: &Self) -> Self {
        below.map_or(*layer, |below| Self::of(format!("{below} {layer}").as_bytes()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What has been read through a [`Hashing`], known to others than its owner.
#[derive(Clone, Default)]
pub(crate) struct Tally(Rc<RefCell<(Sha256, u64)>>);

impl Tally {
    pub(crate) fn digest(&self) -> Digest {
        Digest(self.0.borrow().0.clone().finalize().into())
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.0.borrow().1
    }
}

/// A reader that adds all it passes on to a digest.
pub(crate) struct Hashing<R> {
    inner: R,
    tally: Tally,
}

impl<R> Hashing<R> {
    pub(crate) fn new(inner: R, tally: &Tally) -> Self {
        Self { inner, tally: tally.clone() }
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let (hasher, bytes) = &mut *self.tally.0.borrow_mut();
        hasher.update(&buffer[..count]);
        *bytes += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 180-2, appendix B.1.
    const ABC: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_digest_is_its_text() {
        assert_eq!(Digest::of(b"abc").to_string(), ABC);
        assert_eq!(Digest::parse(ABC), Some(Digest::of(b"abc")));
        for bad in
            ["", "sha256:", &ABC[7..], &ABC[..70], &ABC.to_uppercase(), "sha512:00", &format!("{ABC}0")]
        {
            assert_eq!(Digest::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_chain_is_of_all_its_layers() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(Digest::chain(None, &a), a);
        assert_eq!(Digest::chain(Some(&a), &b), Digest::of(format!("{a} {b}").as_bytes()));
    }

    #[test]
    fn what_is_read_is_counted() {
        let tally = Tally::default();
        let mut reader = Hashing::new(&b"abc"[..], &tally);
        io::copy(&mut reader, &mut io::sink()).unwrap();
        assert_eq!((tally.digest().to_string().as_str(), tally.bytes()), (ABC, 3));
    }
}
