//! What travels between two ranks: a kind, a length, that many bytes.

use std::io::{self, Read, Write};

/// The sender, or a rank it has heard of, has failed: whose number in four bytes, then what happened.
pub(super) const LOST: u8 = 0;
/// Everybody has come.
pub(super) const WELCOME: u8 = 1;
/// Kinds from here on are calls.
pub(super) const FIRST_CALL: u8 = 2;

/// One message.
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) payload: Vec<u8>,
}

pub(super) fn write(stream: &mut impl Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    let mut header = [kind; 9];
    header[1..].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    stream.write_all(&header)?;
    stream.write_all(payload)
}

pub(super) fn read(stream: &mut impl Read) -> io::Result<Frame> {
    let mut kind = [0];
    let mut length = [0; 8];
    stream.read_exact(&mut kind)?;
    stream.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    // Grows with what arrives: a length that lies reserves nothing.
    let mut payload = Vec::with_capacity(length.min(1 << 20) as usize);
    stream.take(length).read_to_end(&mut payload)?;
    if (payload.len() as u64) < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Frame { kind: kind[0], payload })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_a_part_of_it_is_an_error() {
        let mut bytes = Vec::new();
        write(&mut bytes, 7, b"abc").unwrap();
        write(&mut bytes, 8, b"").unwrap();
        let mut rest = &bytes[..];
        let frame = read(&mut rest).unwrap();
        assert_eq!((frame.kind, &frame.payload[..]), (7, &b"abc"[..]));
        assert_eq!(read(&mut rest).unwrap().payload, b"");
        assert!(rest.is_empty());
        for cut in [0, 1, 8, 9, 11] {
            let error = read(&mut &bytes[..cut]).err().expect("an error").kind();
            assert_eq!(error, io::ErrorKind::UnexpectedEof, "{cut}");
        }
    }
}
