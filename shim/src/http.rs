//! As much of HTTP as a pod's owner is asked with for the timings of its starts and for its containers: the head of a request as it comes, and the answer to
//! it. Pure: `observe` reads and writes.
//!
//! Whoever may open the socket may say anything: nothing but the first line of a head is looked at, and that for three words.

/// Largest head: one that never ends is not to fill the shim's memory.
pub const MAX_HEAD: usize = 8 << 10;
const END: &[u8] = b"\r\n\r\n";

/// What has come of a request.
#[derive(Debug, Default)]
pub struct Head(Vec<u8>);

/// What a part of a request has made of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// There is more of the head to come.
    More,
    /// The head is too large, or the request ends before it does.
    Refused,
    Whole(String),
}

impl Head {
    /// Takes the next part; an empty one is the request's end.
    pub fn add(&mut self, part: &[u8]) -> Taken {
        // The end may begin in the part before.
        let from = self.0.len().saturating_sub(END.len() - 1);
        self.0.extend_from_slice(part);
        if part.is_empty() || self.0.len() > MAX_HEAD {
            return Taken::Refused;
        }
        if self.0[from..].windows(END.len()).any(|bytes| bytes == END) {
            return Taken::Whole(String::from_utf8_lossy(&self.0).into_owned());
        }
        Taken::More
    }
}

/// What is at a path: its type, and its text.
pub type Page = (&'static str, String);

/// The answer to a request's first line; nothing else of it matters. HTTP/1.0 (RFC 1945): the connection ends with it. `page`
/// says what is at a path.
pub fn answer(head: Option<&str>, page: impl Fn(&str) -> Option<Page>) -> String {
    const TEXT: &str = "text/plain; charset=utf-8";
    let line = head.and_then(|head| head.lines().next()).unwrap_or_default();
    let words: Vec<_> = line.split(' ').collect();
    let (status, (kind, body)) = match words[..] {
        ["GET", path, version] if version.starts_with("HTTP/1.") => {
            match page(path.split('?').next().unwrap_or_default()) {
                Some(page) => ("200 OK", page),
                None => ("404 Not Found", (TEXT, "There are /metrics and /containers alone\n".into())),
            }
        }
        [_, _, version] if version.starts_with("HTTP/1.") => {
            ("405 Method Not Allowed\r\nAllow: GET", (TEXT, "There is GET alone\n".into()))
        }
        _ => {
            ("400 Bad Request", (TEXT, "That is no request of HTTP/1 with a head of at most 8 KiB\n".into()))
        }
    };
    format!(
        "HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_found_wherever_it_is_cut() {
        let whole = b"GET /metrics HTTP/1.0\r\nA: b\r\n\r\n";
        for cut in 1..whole.len() {
            let mut head = Head::default();
            assert_eq!(head.add(&whole[..cut]), Taken::More, "{cut}");
            assert_eq!(head.add(&whole[cut..]), Taken::Whole(String::from_utf8_lossy(whole).into()), "{cut}");
        }
        let mut head = Head::default();
        assert_eq!(head.add(&whole[..5]), Taken::More);
        assert_eq!(head.add(b""), Taken::Refused, "it ends before its head does");
    }

    #[test]
    fn a_head_has_a_largest_size() {
        let mut head = Head::default();
        assert_eq!(head.add(&[b'x'; MAX_HEAD]), Taken::More);
        assert_eq!(head.add(b"x"), Taken::Refused);
        assert_eq!(Head::default().add(&[b"\r\n\r\n".as_slice(), &[0; MAX_HEAD]].concat()), Taken::Refused);
        assert!(matches!(Head::default().add(b"\xff\0\r\n\r\n"), Taken::Whole(_)));
    }

    fn page(path: &str) -> Option<Page> {
        (path == "/metrics").then(|| ("text/plain", "x 1\n".into()))
    }

    #[test]
    fn only_the_one_request_has_figures() {
        let status = |request: Option<&str>| {
            let answer = answer(request, page);
            assert!(answer.contains("\r\n\r\n"));
            answer.split("\r\n").next().unwrap_or_default().to_string()
        };
        for line in ["GET /metrics HTTP/1.0", "GET /metrics?x=y HTTP/1.1"] {
            assert_eq!(status(Some(&format!("{line}\r\nHost: x\r\n\r\n"))), "HTTP/1.0 200 OK");
        }
        assert_eq!(status(Some("GET / HTTP/1.1\r\n\r\n")), "HTTP/1.0 404 Not Found");
        assert_eq!(status(Some("POST /metrics HTTP/1.1\r\n\r\n")), "HTTP/1.0 405 Method Not Allowed");
        for odd in [None, Some(""), Some("\r\n\r\n"), Some("GET /metrics"), Some("GET  /metrics HTTP/1.0")] {
            assert_eq!(status(odd), "HTTP/1.0 400 Bad Request");
        }
        assert!(answer(Some("GET /metrics HTTP/1.0\r\n\r\n"), page).ends_with("\r\n\r\nx 1\n"));
    }
}
