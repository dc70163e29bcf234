//! The one line a host client sends before its bytes: `CONNECT <port>\n`. A pure parser; the line is looked at in the
//! socket (`MSG_PEEK`) until it is whole, so that nothing behind it is ever taken out too early.

/// Longest line, its end included. Stops a client that sends without end from being listened to.
pub(super) const MAX_LINE: usize = 32;

const VERB: &[u8] = b"CONNECT ";

/// What the first bytes of a client say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line {
    /// Could still become a valid line.
    Incomplete,
    /// The first `len` bytes are the line and ask for `port`.
    Connect {
        port: u32,
        len: usize,
    },
    Malformed,
}

/// Looks at the first bytes of a client, at most [`MAX_LINE`] of them.
pub(super) fn scan(seen: &[u8]) -> Line {
    let common = seen.len().min(VERB.len());
    if seen[..common] != VERB[..common] {
        return Line::Malformed;
    }
    let digits = &seen[common..];
    match digits.iter().position(|byte| !byte.is_ascii_digit()) {
        None if seen.len() >= MAX_LINE => Line::Malformed,
        None => Line::Incomplete,
        Some(end) if digits[end] == b'\n' && common + end < MAX_LINE => match port(&digits[..end]) {
            Some(port) => Line::Connect { port, len: common + end + 1 },
            None => Line::Malformed,
        },
        Some(_) => Line::Malformed,
    }
}

/// The answer to a client whose connection the guest accepted.
pub(super) fn accepted(host_port: u32) -> String {
    format!("OK {host_port}\n")
}

fn port(digits: &[u8]) -> Option<u32> {
    let ten = |port: u32, digit: &u8| port.checked_mul(10)?.checked_add(u32::from(digit - b'0'));
    if digits.is_empty() { None } else { digits.iter().try_fold(0, ten) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_line_gives_port_and_length() {
        assert_eq!(scan(b"CONNECT 1024\n"), Line::Connect { port: 1024, len: 13 });
        assert_eq!(scan(b"CONNECT 1024\nCONNECT 1\n"), Line::Connect { port: 1024, len: 13 });
        assert_eq!(scan(b"CONNECT 4294967295\n"), Line::Connect { port: u32::MAX, len: 19 });
        assert_eq!(scan(b"CONNECT 0\n"), Line::Connect { port: 0, len: 10 });
    }

    #[test]
    fn every_beginning_of_a_line_is_incomplete() {
        let line = b"CONNECT 4294967295\n";
        for end in 0..line.len() {
            assert_eq!(scan(&line[..end]), Line::Incomplete, "{end}");
        }
    }

    #[test]
    fn garbage_is_malformed_at_its_first_wrong_byte() {
        for garbage in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"\n",
            b"connect 1\n",
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT  1\n",
            b"CONNECT +1\n",
            b"CONNECT -1\n",
            b"CONNECT 1 \n",
            b"CONNECT 1\r\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 99999999999999999999\n",
            b"CONNECT \xff\n",
            b"\0",
        ] {
            assert_eq!(scan(garbage), Line::Malformed, "{}", garbage.escape_ascii());
        }
    }

    #[test]
    fn line_without_end_is_malformed_at_the_limit() {
        let mut line = b"CONNECT ".to_vec();
        line.resize(MAX_LINE - 1, b'0');
        assert_eq!(scan(&line), Line::Incomplete);
        let mut ended = line.clone();
        ended.push(b'\n');
        assert_eq!(scan(&ended), Line::Connect { port: 0, len: MAX_LINE });
        line.push(b'0');
        assert_eq!(scan(&line), Line::Malformed);
        line.push(b'\n');
        assert_eq!(scan(&line), Line::Malformed);
    }
}
