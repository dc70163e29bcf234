//! The library's file system, with what a guest may ask of it bounded. Here and not where requests are judged, because
//! the library reads them a second time, and another vCPU may have changed them in between: what is bounded here is what
//! is served.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::PassthroughFs;

use super::kept::Kept;
use super::known::Known;

type Inode = u64;
type Handle = u64;
type Opened = (Option<Handle>, OpenOptions, Option<u32>);
type Created = (Entry, Option<Handle>, OpenOptions, Option<u32>);
type AddEntry<'a> = &'a mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>;
type AddEntryPlus<'a> = &'a mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>;

/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX`: no attribute and no list of them is larger, and the library allocates what the
/// guest has room for, up to 4 GiB.
const MAX_XATTR: u32 = 64 << 10;
/// Most of a directory read at once, which the library allocates, too.
const MAX_LISTING: u32 = 1 << 20;

/// What the guest is served from.
pub(super) struct Bounded {
    files: PassthroughFs,
    kept: Kept,
    known: Known,
}

impl Bounded {
    /// `most`: files that the guest may know and have open.
    pub(super) fn new(files: PassthroughFs, most: u64) -> Self {
        Self { files, kept: Kept::default(), known: Known::new(most) }
    }

    /// Takes back what the library has counted for a node of which there is no room to know.
    fn admit(&self, context: &Context, node: Inode) -> io::Result<()> {
        self.known.room_for(node).inspect_err(|_| self.files.forget(context, node, 1))
    }

    fn told(&self, entry: Entry) -> Entry {
        self.known.told(entry.inode);
        entry
    }
}

macro_rules! forward {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $answer:ty;)*) => {
        $(fn $name(&self, $($argument: $kind),*) -> $answer {
            self.files.$name($($argument),*)
        })*
    };
}

/// What makes a file, of which the guest is told.
macro_rules! make {
    ($($name:ident($($argument:ident: $kind:ty),*);)*) => {
        $(fn $name(&self, $($argument: $kind),*) -> io::Result<Entry> {
            self.known.room()?;
            self.files.$name($($argument),*).map(|entry| self.told(entry))
        })*
    };
}

macro_rules! close {
    ($($name:ident($($argument:ident: $kind:ty),*);)*) => {
        $(fn $name(&self, $($argument: $kind),*) -> io::Result<()> {
            self.files.$name($($argument),*)?;
            self.known.closed();
            Ok(())
        })*
    };
}

impl FileSystem for Bounded {
    type Inode = Inode;
    type Handle = Handle;

    /// Linux resolves `.` and `..` itself and never asks. The library would walk up, as far as the share's root.
    fn lookup(&self, context: &Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        match name.to_bytes() {
            b"." | b".." => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            _ => {
                let entry = self.files.lookup(context, parent, name)?;
                self.admit(context, entry.inode)?;
                Ok(self.told(entry))
            }
        }
    }

    fn create(
        &self,
        context: &Context,
        parent: Inode,
        name: &CStr,
        arguments: CreateIn,
    ) -> io::Result<Created> {
        self.known.room()?;
        let created = self.files.create(context, parent, name, arguments)?;
        self.known.told(created.0.inode);
        created.1.iter().for_each(|_| self.known.opened());
        Ok(created)
    }

    fn forget(&self, context: &Context, inode: Inode, count: u64) {
        self.known.forgotten(inode, count);
        self.files.forget(context, inode, count);
    }

    fn batch_forget(&self, context: &Context, requests: Vec<(Inode, u64)>) {
        requests.iter().for_each(|(inode, count)| self.known.forgotten(*inode, *count));
        self.files.batch_forget(context, requests);
    }

    fn destroy(&self) {
        self.known.clear();
        self.files.destroy();
    }

    fn getxattr(&self, context: &Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.files.getxattr(context, inode, name, size.min(MAX_XATTR))
    }

    fn listxattr(&self, context: &Context, inode: Inode, size: u32) -> io::Result<ListxattrReply> {
        self.files.listxattr(context, inode, size.min(MAX_XATTR))
    }

    /// The guest keeps its pages of a file that has stayed what it was.
    fn open(&self, context: &Context, inode: Inode, flags: u32, fuse_flags: u32) -> io::Result<Opened> {
        self.known.room()?;
        let (handle, mut options, passthrough) = self.files.open(context, inode, flags, fuse_flags)?;
        handle.iter().for_each(|_| self.known.opened());
        if let Ok((stat, _)) = self.files.getattr(context, inode, handle)
            && self.kept.opened(inode, &stat)
        {
            options |= OpenOptions::KEEP_CACHE;
        }
        Ok((handle, options, passthrough))
    }

    fn opendir(
        &self,
        context: &Context,
        inode: Inode,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.known.room()?;
        let opened = self.files.opendir(context, inode, flags)?;
        opened.0.iter().for_each(|_| self.known.opened());
        Ok(opened)
    }

    fn readdir(
        &self,
        context: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add: AddEntry<'_>,
    ) -> io::Result<()> {
        self.files.readdir(context, inode, handle, size.min(MAX_LISTING), offset, add)
    }

    fn readdirplus(
        &self,
        context: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add: AddEntryPlus<'_>,
    ) -> io::Result<()> {
        // An entry for which there is no room in the answer is looked up, and forgotten by the library.
        let (mut told, mut refused) = (false, None);
        let mut counted = |directory: DirEntry<'_>, entry: Entry| {
            let node = entry.inode;
            self.admit(context, node).inspect_err(|error| refused = error.raw_os_error())?;
            // Nothing is forgotten by the library where the answer cannot be written at all.
            let added = add(directory, entry).inspect_err(|_| self.files.forget(context, node, 1))?;
            if added > 0 {
                self.known.told(node);
                told = true;
            }
            Ok(added)
        };
        self.files.readdirplus(context, inode, handle, size.min(MAX_LISTING), offset, &mut counted)?;
        // The library takes `.` and `..`, which it does not tell, for entries told: no error would mean the end of the directory.
        refused.filter(|_| !told).map_or(Ok(()), |error| Err(io::Error::from_raw_os_error(error)))
    }

    make! {
        symlink(c: &Context, target: &CStr, parent: Inode, name: &CStr);
        mknod(c: &Context, parent: Inode, name: &CStr, mode: u32, device: u32, umask: u32);
        mkdir(c: &Context, parent: Inode, name: &CStr, mode: u32, umask: u32);
        link(c: &Context, inode: Inode, parent: Inode, name: &CStr);
    }

    close! {
        release(c: &Context, inode: Inode, flags: u32, handle: Handle, flush: bool, unlock: bool, owner: Option<u64>);
        releasedir(c: &Context, inode: Inode, flags: u32, handle: Handle);
    }

    // All else the library has; what it has not keeps the trait's answer, ENOSYS.
    forward! {
        init(capable: FsOptions) -> io::Result<FsOptions>;
        statfs(c: &Context, inode: Inode) -> io::Result<statvfs64>;
        getattr(c: &Context, inode: Inode, handle: Option<Handle>) -> io::Result<(stat64, Duration)>;
        setattr(c: &Context, inode: Inode, attributes: stat64, handle: Option<Handle>, valid: SetattrValid)
            -> io::Result<(stat64, Duration)>;
        access(c: &Context, inode: Inode, mask: u32) -> io::Result<()>;
        readlink(c: &Context, inode: Inode) -> io::Result<Vec<u8>>;
        unlink(c: &Context, parent: Inode, name: &CStr) -> io::Result<()>;
        rmdir(c: &Context, parent: Inode, name: &CStr) -> io::Result<()>;
        rename(c: &Context, from: Inode, old: &CStr, to: Inode, new: &CStr, flags: u32) -> io::Result<()>;
        read(c: &Context, inode: Inode, handle: Handle, to: &mut dyn ZeroCopyWriter, size: u32, offset: u64,
            owner: Option<u64>, flags: u32) -> io::Result<usize>;
        write(c: &Context, inode: Inode, handle: Handle, from: &mut dyn ZeroCopyReader, size: u32, offset: u64,
            owner: Option<u64>, delayed: bool, flags: u32, fuse_flags: u32) -> io::Result<usize>;
        flush(c: &Context, inode: Inode, handle: Handle, owner: u64) -> io::Result<()>;
        fsync(c: &Context, inode: Inode, data_only: bool, handle: Handle) -> io::Result<()>;
        fallocate(c: &Context, inode: Inode, handle: Handle, mode: u32, offset: u64, length: u64)
            -> io::Result<()>;
        lseek(c: &Context, inode: Inode, handle: Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fsyncdir(c: &Context, inode: Inode, data_only: bool, handle: Handle) -> io::Result<()>;
        setxattr(c: &Context, inode: Inode, name: &CStr, value: &[u8], flags: u32) -> io::Result<()>;
        removexattr(c: &Context, inode: Inode, name: &CStr) -> io::Result<()>;
    }
}
