//! The containers of a pod that is not `krx run`'s: its owner, containerd's shim, tells who asks at the pod's socket
//! (`PodPaths::metrics`), by HTTP/1.0. The owner is as trusted as who asks; both are root.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use krx_proto::ProcessSpec;
use serde::{Deserialize, Serialize};

/// What to ask for.
pub const PATH: &str = "/containers";
/// Largest answer taken: a specification has a size cap, and so has a pod's number of containers.
const MAX_ANSWER: u64 = 64 << 20;
/// The owner serves one after the other, each for 5 seconds at most.
const LIMIT: Duration = Duration::from_secs(10);

/// A container, as far as a further process in it has to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodMember {
    /// Its id, containerd's.
    pub id: String,
    /// Its first process; a further one starts from its environment, user and capabilities.
    pub process: ProcessSpec,
}

/// Why a container could not be found.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    #[error("Cannot ask the pod's shim for its containers at {path}. A pod has none before its first start")]
    Ask {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("The pod has no container yet")]
    None,
    #[error("The pod has several containers, choose one by -c: {}", .0.join(", "))]
    Several(Vec<String>),
    #[error("The pod has no container whose id begins with {wanted}; it has {}", .there.join(", "))]
    NoSuch { wanted: String, there: Vec<String> },
}

/// Asks the owner of a pod for the pod's containers.
///
/// # Errors
/// [`MemberError::Ask`]: nobody answers there, or says something else.
pub fn ask(socket: &Path) -> Result<Vec<PodMember>, MemberError> {
    let asked = || -> io::Result<Vec<PodMember>> {
        let mut client = connect(socket)?;
        client.set_read_timeout(Some(LIMIT))?;
        client.set_write_timeout(Some(LIMIT))?;
        client.write_all(format!("GET {PATH} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut answer = Vec::new();
        client.take(MAX_ANSWER).read_to_end(&mut answer)?;
        parse(&answer)
    };
    asked().map_err(|source| MemberError::Ask { path: socket.into(), source })
}

/// Connects, a little later where the owner is only about to listen: it does so when the pod's first start is answered.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    const TRIES: u32 = 10;
    const PAUSE: Duration = Duration::from_millis(100);
    for _ in 1..TRIES {
        match UnixStream::connect(socket) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
    UnixStream::connect(socket)
}

/// The body of an answer, if that is one of success.
fn parse(answer: &[u8]) -> io::Result<Vec<PodMember>> {
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    match end.map(|end| answer.split_at(end + 4)) {
        Some((head, body)) if head.starts_with(b"HTTP/1.0 200 ") => Ok(serde_json::from_slice(body)?),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is not one of this version of krx")),
    }
}

/// The container that is `wanted` by its id or the begin of it; without, the only one.
///
/// # Errors
/// There is none, or more than one.
pub fn choose(members: Vec<PodMember>, wanted: Option<&str>) -> Result<PodMember, MemberError> {
    let ids = |members: &[PodMember]| members.iter().map(|member| member.id.clone()).collect::<Vec<_>>();
    let there = ids(&members);
    let begin = wanted.unwrap_or_default();
    let exact = members.iter().position(|member| Some(member.id.as_str()) == wanted);
    let mut found: Vec<_> = members.into_iter().filter(|member| member.id.starts_with(begin)).collect();
    match (exact, found.len(), wanted) {
        (Some(_), ..) => found.retain(|member| member.id == begin),
        (None, 0, Some(wanted)) => return Err(MemberError::NoSuch { wanted: wanted.into(), there }),
        (None, 2.., _) => return Err(MemberError::Several(ids(&found))),
        _ => {}
    }
    found.pop().ok_or(MemberError::None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(ids: &[&str]) -> Vec<PodMember> {
        let member = |id: &&str| PodMember { id: (*id).into(), process: ProcessSpec::default() };
        ids.iter().map(member).collect()
    }

    #[test]
    fn a_container_is_chosen_by_what_names_it_alone() {
        let chosen =
            |ids: &[&str], wanted: Option<&str>| choose(members(ids), wanted).map(|member| member.id);
        assert_eq!(chosen(&["abc"], None).unwrap(), "abc");
        assert_eq!(chosen(&["abc", "abd"], Some("abd")).unwrap(), "abd");
        assert_eq!(chosen(&["ab", "abc"], Some("ab")).unwrap(), "ab");
        assert_eq!(chosen(&["xy", "abc"], Some("a")).unwrap(), "abc");
        assert!(matches!(chosen(&[], None), Err(MemberError::None)));
        assert!(
            matches!(chosen(&["abc", "abd"], Some("ab")), Err(MemberError::Several(ids)) if ids.len() == 2)
        );
        assert!(matches!(chosen(&["abc", "x"], None), Err(MemberError::Several(_))));
        assert!(matches!(chosen(&["abc"], Some("b")), Err(MemberError::NoSuch { .. })));
    }

    #[test]
    fn only_an_answer_of_success_is_taken() {
        let text = serde_json::to_string(&members(&["a"])).unwrap();
        assert_eq!(
            parse(format!("HTTP/1.0 200 OK\r\nA: b\r\n\r\n{text}").as_bytes()).unwrap(),
            members(&["a"])
        );
        for odd in
            ["", "HTTP/1.0 404 Not Found\r\n\r\n[]", "HTTP/1.0 200 OK\r\n[]", "HTTP/1.0 200 OK\r\n\r\n{}"]
        {
            assert!(parse(odd.as_bytes()).is_err(), "{odd}");
        }
    }
}
