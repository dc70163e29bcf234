//! The files of an image, in a directory or in an archive, by their names in it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};

use crate::digest::Digest;
use crate::error::{ImageError, shown};
use crate::reference::{Reference, Transport};
use crate::tar::{Entries, Kind, Source};

/// Most files of an archive: each layer has one to three.
const MAX_MEMBERS: usize = 10_000;
/// Longest chain of links of an archive: docker has one from a layer to the same layer elsewhere.
const MAX_LINKS: usize = 8;
/// Largest file with JSON.
const MAX_JSON: u64 = 4 << 20;

/// Where the files are.
pub(crate) enum Blobs {
    Directory(OwnedFd),
    Archive { file: Rc<File>, members: HashMap<Vec<u8>, Member> },
}

pub(crate) enum Member {
    Data { at: u64, size: u64 },
    Link(Vec<u8>),
}

/// A file that is open.
pub(crate) struct Blob {
    pub(crate) reader: Box<dyn Read>,
    /// In bytes.
    pub(crate) size: u64,
}

impl Blobs {
    pub(crate) fn open(reference: &Reference) -> Result<Self, ImageError> {
        let path = &reference.path;
        let failed = |source: io::Error| ImageError::Open { path: path.clone(), source };
        if reference.transport == Transport::Oci {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            return open(path, flags, Mode::empty())
                .map(Self::Directory)
                .map_err(|error| failed(error.into()));
        }
        let (file, size) = regular(open_file(path).map_err(failed)?).map_err(failed)?;
        let file = Rc::new(file);
        let members = scan(Section { file: file.clone(), at: 0, left: size });
        let members = members.map_err(|source| ImageError::Archive { path: path.clone(), source })?;
        Ok(Self::Archive { file, members })
    }

    /// Opens the file `name`.
    pub(crate) fn file(&self, name: &str) -> Result<Blob, ImageError> {
        let found = match self {
            Self::Directory(directory) => in_directory(directory, name),
            Self::Archive { file, members } => in_archive(file, members, name),
        };
        found.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ImageError::Missing(shown(name)),
            _ => ImageError::Read { name: shown(name), source },
        })
    }

    /// Reads a small file, which has the digest `wanted`, if there is one.
    pub(crate) fn small(&self, name: &str, wanted: Option<&Digest>) -> Result<Vec<u8>, ImageError> {
        let failed = |source| ImageError::Read { name: shown(name), source };
        let mut content = Vec::new();
        self.file(name)?.reader.take(MAX_JSON + 1).read_to_end(&mut content).map_err(failed)?;
        if content.len() as u64 > MAX_JSON {
            return Err(failed(io::Error::other("It is larger than 4 MiB")));
        }
        let found = Digest::of(&content);
        if wanted.is_some_and(|wanted| *wanted != found) {
            return Err(ImageError::Digest { name: shown(name), found });
        }
        Ok(content)
    }
}

fn open_file(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
}

/// A regular file, and its size: a FIFO would hang, and a device may be endless.
fn regular(file: OwnedFd) -> io::Result<(File, u64)> {
    let status = fstat(&file)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "It is not a regular file"));
    }
    Ok((File::from(file), status.st_size.cast_unsigned()))
}

/// No link leads out of the directory.
fn in_directory(directory: &OwnedFd, name: &str) -> io::Result<Blob> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let (file, size) = regular(openat2(directory, name, flags, Mode::empty(), resolve)?)?;
    Ok(Blob { reader: Box::new(file), size })
}

fn in_archive(file: &Rc<File>, members: &HashMap<Vec<u8>, Member>, name: &str) -> io::Result<Blob> {
    let mut name = normal(name.as_bytes());
    for _ in 0..MAX_LINKS {
        match members.get(&name) {
            Some(Member::Data { at, size }) => {
                let section = Section { file: file.clone(), at: *at, left: *size };
                return Ok(Blob { reader: Box::new(section), size: *size });
            }
            Some(Member::Link(to)) => name.clone_from(to),
            None => return Err(io::ErrorKind::NotFound.into()),
        }
    }
    Err(io::Error::other("It is a link that leads nowhere"))
}

/// Where each file of an archive is; of several with one name the last counts, as with tar.
fn scan(archive: Section) -> Result<HashMap<Vec<u8>, Member>, crate::tar::TarError> {
    let mut entries = Entries::new(archive);
    let mut members = HashMap::new();
    while let Some(entry) = entries.next()? {
        let name = normal(&entry.path);
        let member = match entry.kind {
            Kind::File => Member::Data { at: entries.position(), size: entry.size },
            // From the directory that it is in.
            Kind::Symlink(to) => Member::Link(normal(&[parent(&name), b"/", to.as_slice()].concat())),
            Kind::HardLink(to) => Member::Link(normal(&to)),
            _ => continue,
        };
        if members.len() == MAX_MEMBERS {
            return Err(crate::tar::TarError::Extensions(entries.position()));
        }
        members.insert(name, member);
    }
    Ok(members)
}

fn parent(name: &[u8]) -> &[u8] {
    name.iter().rposition(|byte| *byte == b'/').map_or(b"", |end| &name[..end])
}

/// A path in an archive, which is a mere name there, in one form: without `.`, `..` and more slashes than are needed.
fn normal(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            other => parts.push(other),
        }
    }
    parts.join(&b'/')
}

/// A part of a file, read from where the others of the same file do not matter.
struct Section {
    file: Rc<File>,
    at: u64,
    left: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

impl Source for Section {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        self.left = self.left.checked_sub(count).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.at += count;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::{Archive, Scratch};

    fn read(blobs: &Blobs, name: &str) -> Result<Vec<u8>, ImageError> {
        blobs.small(name, None)
    }

    fn archive(scratch: &Scratch, content: Archive) -> Blobs {
        let path = scratch.write("archive", &content.finish());
        Blobs::open(&Reference::parse(&format!("oci-archive:{}", path.display())).unwrap()).unwrap()
    }

    #[test]
    fn files_of_a_directory_do_not_lead_out_of_it() {
        let scratch = Scratch::new("blobs");
        scratch.write("secret", b"secret");
        scratch.write("image/blobs/a", b"a");
        let image = scratch.path().join("image");
        symlink("../secret", image.join("up")).unwrap();
        symlink(scratch.path().join("secret"), image.join("absolute")).unwrap();
        symlink("blobs/a", image.join("within")).unwrap();
        let blobs = Blobs::open(&Reference::parse(&format!("oci:{}", image.display())).unwrap()).unwrap();
        assert_eq!(read(&blobs, "blobs/a").unwrap(), b"a");
        assert_eq!(read(&blobs, "within").unwrap(), b"a");
        for bad in ["up", "absolute", "../secret", "blobs"] {
            assert!(matches!(read(&blobs, bad), Err(ImageError::Read { .. })), "{bad}");
        }
        assert!(matches!(read(&blobs, "none"), Err(ImageError::Missing(_))));
    }

    #[test]
    fn files_of_an_archive_are_found_by_any_form_of_their_name() {
        let scratch = Scratch::new("blobs");
        let content = Archive::new().file("./blobs/a", &[1; 1000]).file("b", b"first").file("b", b"second");
        let content =
            content.link("layers/c", "../blobs/a").link("loop", "loop").link("out", "../../etc/passwd");
        let blobs = archive(&scratch, content);
        assert_eq!(read(&blobs, "blobs/a").unwrap().len(), 1000);
        assert_eq!(read(&blobs, "b").unwrap(), b"second");
        assert_eq!(read(&blobs, "layers/c").unwrap().len(), 1000);
        assert!(matches!(read(&blobs, "loop"), Err(ImageError::Read { .. })));
        assert!(matches!(read(&blobs, "out"), Err(ImageError::Missing(_))));
    }

    #[test]
    fn what_is_read_has_its_digest_and_is_small() {
        let scratch = Scratch::new("blobs");
        let content = Archive::new().file("a", b"a").file("large", &vec![0; (4 << 20) + 1]);
        let blobs = archive(&scratch, content);
        assert!(blobs.small("a", Some(&Digest::of(b"a"))).is_ok());
        let other = blobs.small("a", Some(&Digest::of(b"b")));
        assert!(matches!(other, Err(ImageError::Digest { .. })));
        assert!(matches!(read(&blobs, "large"), Err(ImageError::Read { .. })));
    }

    #[test]
    fn what_is_no_archive_is_told() {
        let scratch = Scratch::new("blobs");
        let path = scratch.write("text", b"text");
        let open = |text: String| Blobs::open(&Reference::parse(&text).unwrap());
        assert!(matches!(open(format!("oci-archive:{}", path.display())), Err(ImageError::Archive { .. })));
        assert!(matches!(open(format!("oci:{}", path.display())), Err(ImageError::Open { .. })));
        assert!(matches!(open("docker-archive:/dev/null".into()), Err(ImageError::Open { .. })));
        assert!(matches!(open("docker-archive:/none".into()), Err(ImageError::Open { .. })));
    }
}
