//! Entries of a tar archive (pax interchange format of POSIX.1-2017, and the GNU extensions for long names), one after the
//! other, of a stream that nobody vouches for: what an entry may have besides its data is bounded.

use std::io::{self, Read};

use tar::Header;

const BLOCK: u64 = 512;
/// Largest extension of an entry; its name and attributes are in it.
const MAX_EXTENSION: u64 = 1 << 20;
/// Most extensions of one entry: a header of each kind is what is written.
const MAX_EXTENSIONS: usize = 8;
/// As Linux has it (`PATH_MAX`).
const MAX_PATH: usize = 4096;
const XATTR: &[u8] = b"SCHILY.xattr.";

/// Why this is no archive.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("The stream cannot be read")]
    Read(#[from] io::Error),
    #[error("The archive ends too early, or is none")]
    Truncated,
    #[error("The header at byte {0} is damaged")]
    Header(u64),
    #[error("The entry at byte {0} has extensions that are too large or too many")]
    Extensions(u64),
    #[error("The entry at byte {at} is of type {kind:?}, which is not known")]
    Kind { at: u64, kind: char },
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    File,
    Directory,
    /// With the path of the file that it is another name of.
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    Fifo,
    /// With major and minor number.
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
}

/// What an archive says of a file. Nothing in it has been judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Of the data that follows, in bytes; 0 unless it is a file.
    pub size: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch, and nanoseconds.
    pub modified: (i64, u32),
    /// Extended attributes, name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A stream in which one can go forwards.
pub trait Source: Read {
    /// # Errors
    /// There are not so many bytes.
    fn skip(&mut self, count: u64) -> io::Result<()>;
}

/// A stream of which all has to be read to go forwards.
pub struct Sequential<R>(pub R);

impl<R: Read> Read for Sequential<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> Source for Sequential<R> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let skipped = io::copy(&mut (&mut self.0).take(count), &mut io::sink())?;
        if skipped == count { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// The entries of an archive. Between two calls of [`Self::next`], the data of the entry can be read from it.
pub struct Entries<S> {
    source: S,
    /// Bytes of the current entry's data, and those after it up to the next header, that have not been read.
    data: u64,
    padding: u64,
    position: u64,
}

/// What extensions say of the entry that follows them.
#[derive(Default)]
struct Extras {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    modified: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: bool,
}

impl<S: Source> Entries<S> {
    pub fn new(source: S) -> Self {
        Self { source, data: 0, padding: 0, position: 0 }
    }

    /// What is behind the entries.
    pub fn into_inner(self) -> S {
        self.source
    }

    /// Where in the archive the next byte of data is.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next entry; `None` at the end.
    ///
    /// # Errors
    /// What follows is no entry.
    #[allow(clippy::should_implement_trait)] // Data is read in between, which an iterator would not allow.
    pub fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extras = Extras::default();
        let begin = self.position;
        for count in 0..=MAX_EXTENSIONS {
            self.skip_data()?;
            let at = self.position;
            let Some(header) = self.header()? else {
                return if count == 0 { Ok(None) } else { Err(TarError::Truncated) };
            };
            let size = field(&header.as_old().size, || header.entry_size()).ok_or(TarError::Header(at))?;
            match header.entry_type().as_byte() {
                b'x' => extras.add(&self.extension(size)?).ok_or(TarError::Header(at))?,
                b'L' => extras.path = Some(until_nul(self.extension(size)?)),
                b'K' => extras.link = Some(until_nul(self.extension(size)?)),
                // Of the whole archive: a comment, in those of images.
                b'g' => self.begin(size),
                _ => return self.entry(&header, extras, at).map(Some),
            }
        }
        Err(TarError::Extensions(begin))
    }

    fn entry(&mut self, header: &Header, extras: Extras, at: u64) -> Result<Entry, TarError> {
        let damaged = |_| TarError::Header(at);
        let path = extras.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = || {
            let own = || header.link_name_bytes().unwrap_or_default().into_owned();
            extras.link.clone().unwrap_or_else(own)
        };
        let device = || -> io::Result<_> {
            Ok((header.device_major()?.unwrap_or_default(), header.device_minor()?.unwrap_or_default()))
        };
        let kind = match header.entry_type().as_byte() {
            _ if extras.sparse => return Err(TarError::Kind { at, kind: 'S' }),
            // Before there was a type for directories, their names said it.
            b'0' | b'\0' | b'7' if path.ends_with(b"/") => Kind::Directory,
            b'0' | b'\0' | b'7' => Kind::File,
            b'1' => Kind::HardLink(link()),
            b'2' => Kind::Symlink(link()),
            b'3' => device().map(|(major, minor)| Kind::CharDevice(major, minor)).map_err(damaged)?,
            b'4' => device().map(|(major, minor)| Kind::BlockDevice(major, minor)).map_err(damaged)?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return Err(TarError::Kind { at, kind: other.into() }),
        };
        let old = header.as_old();
        let number = |value: Option<u64>| value.ok_or(TarError::Header(at));
        let id = |given: Option<u32>, own: Option<u64>| {
            given.or_else(|| u32::try_from(own?).ok()).ok_or(TarError::Header(at))
        };
        // Nothing but a file has data, whatever its header says.
        let size = match kind {
            Kind::File => number(extras.size.or_else(|| field(&old.size, || header.entry_size())))?,
            _ => 0,
        };
        let mode = number(field(&old.mode, || header.mode().map(u64::from)))? & 0o7777;
        let modified = number(field(&old.mtime, || header.mtime()))?;
        let entry = Entry {
            kind,
            size,
            mode: u32::try_from(mode).unwrap_or_default(),
            uid: id(extras.uid, field(&old.uid, || header.uid()))?,
            gid: id(extras.gid, field(&old.gid, || header.gid()))?,
            modified: extras.modified.unwrap_or_else(|| (i64::try_from(modified).unwrap_or_default(), 0)),
            xattrs: extras.xattrs,
            path,
        };
        let long = |path: &[u8]| path.len() > MAX_PATH;
        let longer = matches!(&entry.kind, Kind::HardLink(to) | Kind::Symlink(to) if long(to));
        if longer || long(&entry.path) {
            return Err(TarError::Header(at));
        }
        self.begin(size);
        Ok(entry)
    }

    /// The next block, if it is a header; `None` for the end: zeros, or nothing more.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        let at = self.position;
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut read = 0;
        while read < block.len() {
            match self.source.read(&mut block[read..]) {
                Ok(0) if read == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Truncated),
                Ok(count) => read += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.position += BLOCK;
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        // Of all bytes, those of the sum itself being blanks.
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        let own: u32 = block[148..156].iter().map(|byte| u32::from(*byte)).sum();
        let blanks = 8 * u32::from(b' ');
        if header.cksum().ok() == Some(sum - own + blanks) {
            Ok(Some(header))
        } else {
            Err(TarError::Header(at))
        }
    }

    fn begin(&mut self, size: u64) {
        self.data = size;
        self.padding = size.wrapping_neg() % BLOCK;
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let rest = self.data.checked_add(self.padding).ok_or(TarError::Truncated)?;
        if rest > 0 {
            let end = |error: io::Error| match error.kind() {
                io::ErrorKind::UnexpectedEof => TarError::Truncated,
                _ => error.into(),
            };
            self.source.skip(rest).map_err(end)?;
            self.position = self.position.saturating_add(rest);
        }
        (self.data, self.padding) = (0, 0);
        Ok(())
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENSION {
            return Err(TarError::Extensions(self.position));
        }
        self.begin(size);
        let mut content = Vec::new();
        self.read_to_end(&mut content)?;
        Ok(content)
    }
}

impl<S: Source> Read for Entries<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.data).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let count = self.source.read(&mut buffer[..most])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.data -= count as u64;
        self.position += count as u64;
        Ok(count)
    }
}

impl Extras {
    /// Adds records of a pax header, each `LENGTH KEY=VALUE\n`. `None` when one is malformed.
    fn add(&mut self, mut records: &[u8]) -> Option<()> {
        while !records.is_empty() {
            let blank = records.iter().take(20).position(|byte| *byte == b' ')?;
            let length: usize = text(&records[..blank])?.parse().ok()?;
            let record = records.get(blank + 1..length)?.strip_suffix(b"\n")?;
            records = &records[length..];
            let equals = record.iter().position(|byte| *byte == b'=')?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => self.path = Some(value.into()),
                b"linkpath" => self.link = Some(value.into()),
                b"size" => self.size = Some(text(value)?.parse().ok()?),
                b"uid" => self.uid = Some(text(value)?.parse().ok()?),
                b"gid" => self.gid = Some(text(value)?.parse().ok()?),
                b"mtime" => self.modified = Some(time(text(value)?)?),
                _ if key.starts_with(b"GNU.sparse.") => self.sparse = true,
                _ => {
                    if let Some(name) = key.strip_prefix(XATTR) {
                        self.xattrs.push((name.into(), value.into()));
                    }
                }
            }
        }
        Some(())
    }
}

/// A number of a header; a field that was left empty is 0.
fn field(bytes: &[u8], parse: impl FnOnce() -> io::Result<u64>) -> Option<u64> {
    let is_empty = bytes.iter().all(|byte| matches!(byte, 0 | b' '));
    if is_empty { Some(0) } else { parse().ok() }
}

fn text(bytes: &[u8]) -> Option<&str> {
    str::from_utf8(bytes).ok()
}

/// Seconds with a fraction, perhaps before the epoch.
fn time(text: &str) -> Option<(i64, u32)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    Some(match (whole.starts_with('-'), nanoseconds) {
        (true, 1..) => (seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds),
        _ => (seconds, nanoseconds),
    })
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

#[cfg(test)]
mod tests {
    use tar::{Builder, EntryType};

    use super::*;

    fn header(kind: u8, size: u64) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::new(kind));
        header.set_size(size);
        header.set_mode(0o4755);
        header.set_uid(1);
        header.set_gid(2);
        header.set_mtime(3);
        header
    }

    fn append(archive: &mut Builder<Vec<u8>>, kind: u8, path: &str, data: &[u8]) {
        archive.append_data(&mut header(kind, data.len() as u64), path, data).unwrap();
    }

    /// A pax record.
    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = key.len() + value.len() + 3;
        let length =
            (1..9).map(|digits| rest + digits).find(|all| all.to_string().len() + rest == *all).unwrap();
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    }

    fn all(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
        let mut entries = Entries::new(Sequential(archive));
        let mut found = Vec::new();
        while let Some(entry) = entries.next()? {
            let mut data = Vec::new();
            entries.read_to_end(&mut data)?;
            found.push((entry, data));
        }
        Ok(found)
    }

    #[test]
    fn entries_have_what_their_headers_say() {
        let mut archive = Builder::new(Vec::new());
        append(&mut archive, b'5', "dir/", b"");
        append(&mut archive, b'0', "dir/file", &[7; 513]);
        let long = "x/".repeat(300);
        append(&mut archive, b'0', &format!("{long}file"), b"long");
        archive.append_link(&mut header(b'2', 0), "link", "../else").unwrap();
        let entries = all(&archive.into_inner().unwrap()).unwrap();
        assert_eq!(entries[0].0.kind, Kind::Directory);
        let (file, data) = &entries[1];
        assert_eq!((file.path.as_slice(), file.mode, file.uid, file.gid), (&b"dir/file"[..], 0o4755, 1, 2));
        assert_eq!((file.modified, data.len()), ((3, 0), 513));
        assert_eq!(entries[2].0.path, format!("{long}file").as_bytes());
        assert_eq!(entries[3].0.kind, Kind::Symlink(b"../else".into()));
    }

    #[test]
    fn fields_that_are_left_empty_are_zero() {
        let mut header = Header::new_gnu();
        header.set_path("x").unwrap();
        header.set_cksum();
        let entries = all(header.as_bytes()).unwrap();
        let entry = &entries[0].0;
        assert_eq!((entry.size, entry.mode, entry.uid, entry.modified), (0, 0, 0, (0, 0)));
    }

    #[test]
    fn pax_records_go_before_headers() {
        let records = [
            record("path", b"name"),
            record("uid", b"70000"),
            record("mtime", b"-1.25"),
            record("SCHILY.xattr.user.x", b"a\nb\0c"),
            record("comment", b"ignored"),
        ];
        let mut archive = Builder::new(Vec::new());
        append(&mut archive, b'x', "extension", &records.concat());
        append(&mut archive, b'0', "other", b"data");
        let entries = all(&archive.into_inner().unwrap()).unwrap();
        let entry = &entries[0].0;
        assert_eq!(
            (entry.path.as_slice(), entry.uid, entry.modified),
            (&b"name"[..], 70000, (-2, 750_000_000))
        );
        assert_eq!(entry.xattrs, [(b"user.x".to_vec(), b"a\nb\0c".to_vec())]);
    }

    #[test]
    fn what_is_not_read_is_passed_over() {
        let mut archive = Builder::new(Vec::new());
        append(&mut archive, b'0', "a", &[1; 700]);
        append(&mut archive, b'0', "b", b"b");
        let archive = archive.into_inner().unwrap();
        let mut entries = Entries::new(Sequential(archive.as_slice()));
        entries.next().unwrap();
        assert_eq!(entries.position(), 512);
        assert_eq!(entries.next().unwrap().unwrap().path, b"b");
        assert!(entries.next().unwrap().is_none());
    }

    #[test]
    fn damage_is_told() {
        let mut archive = Builder::new(Vec::new());
        append(&mut archive, b'0', "a", &[1; 700]);
        let archive = archive.into_inner().unwrap();
        assert!(matches!(all(&archive[..600]), Err(TarError::Read(_))));
        assert!(matches!(all(&archive[..100]), Err(TarError::Truncated)));
        let mut damaged = archive.clone();
        damaged[0] ^= 1;
        assert!(matches!(all(&damaged), Err(TarError::Header(0))));
        assert!(matches!(all(&[7; 512]), Err(TarError::Header(0))));
        assert!(all(b"").unwrap().is_empty());
    }

    #[test]
    fn extensions_are_bounded() {
        let mut archive = Builder::new(Vec::new());
        (0..9).for_each(|_| append(&mut archive, b'x', "extension", &record("a", b"b")));
        append(&mut archive, b'0', "file", b"");
        assert!(matches!(all(&archive.into_inner().unwrap()), Err(TarError::Extensions(0))));
        let mut huge = header(b'L', 2 << 30);
        huge.set_path("x").unwrap();
        huge.set_cksum();
        assert!(matches!(all(huge.as_bytes()), Err(TarError::Extensions(_))));
        let mut alone = Builder::new(Vec::new());
        append(&mut alone, b'x', "extension", &record("a", b"b"));
        assert!(matches!(all(&alone.into_inner().unwrap()), Err(TarError::Truncated)));
    }

    #[test]
    fn odd_records_and_kinds_are_refused() {
        for bad in ["5 a=b", "99 a=b\n", "x a=b\n", "6 ab\n", "0 a=b\n", "12 uid=-123\n", "11 mtime=x\n"] {
            let mut archive = Builder::new(Vec::new());
            append(&mut archive, b'x', "extension", bad.as_bytes());
            append(&mut archive, b'0', "file", b"");
            assert!(matches!(all(&archive.into_inner().unwrap()), Err(TarError::Header(_))), "{bad}");
        }
        let mut archive = Builder::new(Vec::new());
        append(&mut archive, b'x', "extension", &record("GNU.sparse.major", b"1"));
        append(&mut archive, b'0', "file", b"");
        assert!(matches!(all(&archive.into_inner().unwrap()), Err(TarError::Kind { .. })));
        let mut archive = Builder::new(Vec::new());
        append(&mut archive, b'M', "file", b"");
        assert!(matches!(all(&archive.into_inner().unwrap()), Err(TarError::Kind { kind: 'M', .. })));
    }
}
