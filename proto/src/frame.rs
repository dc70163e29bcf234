//! Frames: a little-endian `u32` length, then that many bytes of a postcard-encoded value.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

/// Largest payload either side accepts. Stops a peer from making the other allocate what its length field claims;
/// a container with thousands of mounts and a megabyte of environment still fits.
pub const MAX_FRAME: usize = 4 << 20;

const PREFIX: usize = 4;

/// Why a frame could not be sent or read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("Connection to the peer failed")]
    Io(#[source] io::Error),
    #[error("A frame of {0} bytes is over the limit of {MAX_FRAME}")]
    TooLarge(usize),
    #[error("Frame is not a valid message")]
    Malformed(#[source] postcard::Error),
    #[error("Message cannot be encoded")]
    Unencodable(#[source] postcard::Error),
}

/// Encodes `value` with its length prefix.
///
/// # Errors
/// [`FrameError::TooLarge`] when it would be over [`MAX_FRAME`].
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_extend(value, vec![0; PREFIX]).map_err(FrameError::Unencodable)?;
    let payload = bytes.len() - PREFIX;
    let length =
        u32::try_from(payload).ok().filter(|_| payload <= MAX_FRAME).ok_or(FrameError::TooLarge(payload))?;
    bytes[..PREFIX].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// Decodes the payload of one frame. Bytes after the value are refused: they would mean the sides disagree.
///
/// # Errors
/// [`FrameError::Malformed`] for anything that is not exactly one value.
pub fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(payload).map_err(FrameError::Malformed)? {
        (value, []) => Ok(value),
        _ => Err(FrameError::Malformed(postcard::Error::SerdeDeCustom)),
    }
}

/// Takes one whole frame off the front of `buffer`, for callers that read without blocking.
/// `None` means that more bytes are needed.
///
/// # Errors
/// As [`read_frame`]; the length is checked as soon as its four bytes are there.
pub fn take_frame<T: DeserializeOwned>(buffer: &mut Vec<u8>) -> Result<Option<T>, FrameError> {
    let Some(prefix) = buffer.first_chunk::<PREFIX>() else { return Ok(None) };
    let length = checked_length(*prefix)?;
    let Some(payload) = buffer.get(PREFIX..PREFIX + length) else { return Ok(None) };
    let value = decode(payload)?;
    buffer.drain(..PREFIX + length);
    Ok(Some(value))
}

/// Reads one frame; blocks until it is whole.
///
/// # Errors
/// I/O errors (end of file included), a length over [`MAX_FRAME`], a payload that does not decode.
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read) -> Result<T, FrameError> {
    let mut prefix = [0; PREFIX];
    from.read_exact(&mut prefix).map_err(FrameError::Io)?;
    let mut payload = vec![0; checked_length(prefix)?];
    from.read_exact(&mut payload).map_err(FrameError::Io)?;
    decode(&payload)
}

/// Writes one frame in a single write where the peer takes it whole.
///
/// # Errors
/// I/O errors and values over [`MAX_FRAME`].
pub fn write_frame<T: Serialize>(to: &mut impl Write, value: &T) -> Result<(), FrameError> {
    to.write_all(&encode(value)?).map_err(FrameError::Io)
}

fn checked_length(prefix: [u8; PREFIX]) -> Result<usize, FrameError> {
    let length = usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX);
    if length > MAX_FRAME { Err(FrameError::TooLarge(length)) } else { Ok(length) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Call, Message, Request, VERSION};

    fn shutdown() -> Call {
        Call { number: 7, request: Request::Shutdown }
    }

    #[test]
    fn frame_round_trips() {
        let mut wire = Vec::new();
        write_frame(&mut wire, &shutdown()).unwrap();
        let call: Call = read_frame(&mut wire.as_slice()).unwrap();
        assert_eq!(call, shutdown());
    }

    #[test]
    fn length_over_the_cap_is_refused_before_the_payload_comes() {
        let mut buffer = u32::MAX.to_le_bytes().to_vec();
        assert!(matches!(take_frame::<Call>(&mut buffer), Err(FrameError::TooLarge(_))));
        assert!(matches!(read_frame::<Call>(&mut buffer.as_slice()), Err(FrameError::TooLarge(_))));
    }

    #[test]
    fn partial_frames_wait_for_the_rest() {
        let wire = encode(&shutdown()).unwrap();
        let mut buffer = Vec::new();
        for byte in &wire[..wire.len() - 1] {
            buffer.push(*byte);
            assert_eq!(take_frame::<Call>(&mut buffer).unwrap(), None);
        }
        buffer.push(wire[wire.len() - 1]);
        buffer.push(9);
        assert_eq!(take_frame::<Call>(&mut buffer).unwrap(), Some(shutdown()));
        assert_eq!(buffer, [9]);
    }

    #[test]
    fn trailing_bytes_in_a_frame_are_malformed() {
        let mut wire = encode(&shutdown()).unwrap();
        wire.push(0);
        wire[0] += 1;
        assert!(matches!(take_frame::<Call>(&mut wire), Err(FrameError::Malformed(_))));
    }

    #[test]
    fn garbage_is_an_error_and_not_a_panic() {
        for seed in 0..=u8::MAX {
            let payload: Vec<u8> = (0..64_u8).map(|i| i.wrapping_mul(31) ^ seed).collect();
            let _ = decode::<Message>(&payload);
            let _ = decode::<Call>(&payload);
        }
    }

    /// An older or newer peer must still be able to read the version out of the hello.
    #[test]
    fn hello_starts_with_variant_zero_and_the_version() {
        let hello = Message::Hello { version: VERSION, guest: crate::GuestInfo::default() };
        let wire = encode(&hello).unwrap();
        assert_eq!(wire[PREFIX], 0);
        assert_eq!(u16::from(wire[PREFIX + 1]), VERSION);
    }
}
