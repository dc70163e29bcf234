//! Layers as they are stored: plain, gzip (RFC 1952) or zstd (RFC 8878), told by their first bytes, as media types do not
//! always tell the truth.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Of the magic numbers of skippable frames: the last digit is any.
const SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];
/// What the own program of zstd takes unasked.
const MAX_WINDOW: u64 = 128 << 20;
const BUFFER: usize = 64 << 10;

/// A reader of what `stored` contains.
pub(crate) fn decoded<'a>(stored: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut stored = BufReader::with_capacity(BUFFER, stored);
    let begin = stored.fill_buf()?;
    Ok(if begin.starts_with(&GZIP) {
        Box::new(MultiGzDecoder::new(stored))
    } else if begin.starts_with(&ZSTD) || begin.get(1..4) == Some(&SKIPPABLE) {
        Box::new(Zstd { stored, decoder: FrameDecoder::new(), within: false })
    } else {
        Box::new(stored)
    })
}

/// Frames of zstd, one after the other.
struct Zstd<R> {
    stored: R,
    decoder: FrameDecoder,
    /// In a frame.
    within: bool,
}

impl<R: BufRead> Zstd<R> {
    /// Begins the next frame that has content; `false` at the end.
    fn begin(&mut self) -> io::Result<bool> {
        loop {
            if self.stored.fill_buf()?.is_empty() {
                return Ok(false);
            }
            self.decoder.set_max_window_size(MAX_WINDOW);
            match self.decoder.reset(&mut self.stored) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut (&mut self.stored).take(length), &mut io::sink())? != length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.within && !self.begin()? {
                return Ok(0);
            }
            self.within = true;
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buffer);
            }
            if self.decoder.is_finished() {
                self.within = false;
                continue;
            }
            let one = BlockDecodingStrategy::UptoBlocks(1);
            let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
            self.decoder.decode_blocks(&mut self.stored, one).map_err(invalid)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn all(stored: &[u8]) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        decoded(stored)?.read_to_end(&mut content).map(|_| content)
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(content: &[u8]) -> Vec<u8> {
        compress_to_vec(content, CompressionLevel::Fastest)
    }

    #[test]
    fn each_form_is_told_by_its_begin() {
        let content = b"layer ".repeat(50_000);
        assert_eq!(all(&content).unwrap(), content);
        assert_eq!(all(&gzip(&content)).unwrap(), content);
        assert_eq!(all(&zstd(&content)).unwrap(), content);
        assert_eq!(all(b"").unwrap(), b"");
    }

    #[test]
    fn what_follows_in_further_parts_is_read() {
        assert_eq!(all(&[gzip(b"a"), gzip(b"b")].concat()).unwrap(), b"ab");
        let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"xyz"].concat();
        assert_eq!(all(&[skipped.clone(), zstd(b"a"), skipped, zstd(b"b")].concat()).unwrap(), b"ab");
    }

    #[test]
    fn damage_is_an_error() {
        let (gzip, zstd) = (gzip(&[7; 9000]), zstd(&[7; 9000]));
        assert!(all(&gzip[..gzip.len() - 9]).is_err());
        assert!(all(&zstd[..zstd.len() - 2]).is_err());
        assert!(all(&[&gzip[..], b"rest"].concat()).is_err());
        assert!(all(&[&zstd[..], b"rest"].concat()).is_err());
        assert!(all(&[0x50, 0x2a, 0x4d, 0x18, 9, 0, 0, 0, 1]).is_err());
    }
}
