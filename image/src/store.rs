//! The cache of unpacked layers. Each lies in a directory named by its ChainID, which tells what it is and what is below it, and
//! is put there when it is whole and what was read has the digests that it should.
//!
//! `krx-layers/ID/fs` are the files of a layer; `krx-tmp` is where layers become whole, by one process at a time (`krx-lock`); `krx-runs` is
//! [`ContainerRoot`]'s. What is left in the last two is removed, so they have names that are nobody else's.

use std::cell::RefCell;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{FlockOperation, flock, syncfs};

use crate::blobs::Blobs;
use crate::decode::decoded;
use crate::digest::{Digest, Hashing, Tally};
use crate::error::{ImageError, LayerError};
use crate::manifest::{self, Chosen, Config, Layer};
use crate::overlay::Overlay;
use crate::reference::Reference;
use crate::remove;
use crate::root::ContainerRoot;
use crate::tar::{Entries, Sequential};
use crate::unpack::{Budget, Tree};

/// What an import is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Waits for another process that imports.
    Waiting,
    /// Begins with a layer, of so many bytes.
    Layer { number: usize, of: usize, bytes: u64 },
    /// Has read so many bytes more of it.
    Read(u64),
    /// All layers are there.
    Done,
}

/// A directory with layers.
#[derive(Debug, Clone)]
pub struct Store {
    path: PathBuf,
}

/// An image whose layers are all in a store.
#[derive(Debug)]
pub struct Image {
    pub config: Config,
    /// Directories of the layers, the lowest first.
    layers: Vec<PathBuf>,
}

impl Store {
    /// Opens a store, which is made if it is not there.
    ///
    /// # Errors
    /// The directory cannot be made or used.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let store = Self { path: path.into() };
        // What images hold is for root alone: files with setuid of anyone's making are among it.
        let make = |directory| DirBuilder::new().recursive(true).mode(0o700).create(directory);
        [store.layers(), store.tmp(), store.runs()]
            .iter()
            .try_for_each(make)
            .map_err(|error| store.failed(error))?;
        Ok(store)
    }

    fn layers(&self) -> PathBuf {
        self.path.join("krx-layers")
    }

    fn tmp(&self) -> PathBuf {
        self.path.join("krx-tmp")
    }

    pub(crate) fn runs(&self) -> PathBuf {
        self.path.join("krx-runs")
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn failed(&self, source: io::Error) -> ImageError {
        ImageError::Store { path: self.path.clone(), source }
    }

    /// The directory for one container of an image, named `name`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn root(&self, image: &Image, name: &str) -> Result<ContainerRoot, ImageError> {
        ContainerRoot::make(self, &image.layers, name)
    }

    /// Brings an image's layers into the store, those that are not there. `progress` is told about it, as it may take long.
    /// The process has to have mounts of its own ([`private_mounts`](crate::private_mounts)).
    ///
    /// # Errors
    /// The image is not there, is damaged or cannot be used, or the disk is full.
    pub fn import(&self, reference: &Reference, progress: impl FnMut(Step)) -> Result<Image, ImageError> {
        let blobs = Blobs::open(reference)?;
        let Chosen { config, layers } = manifest::choose(&blobs, reference)?;
        let mut chains: Vec<Digest> = Vec::new();
        for layer in &layers {
            chains.push(Digest::chain(chains.last(), &layer.diff_id));
        }
        self.clear_left();
        let paths: Vec<_> = chains.iter().map(|chain| self.layers().join(chain.hex()).join("fs")).collect();
        if !paths.iter().all(|path| path.is_dir()) {
            self.unpack_missing(&blobs, &layers, &paths, progress)?;
        }
        Ok(Image { config, layers: paths })
    }

    fn unpack_missing(
        &self,
        blobs: &Blobs,
        layers: &[Layer],
        paths: &[PathBuf],
        mut progress: impl FnMut(Step),
    ) -> Result<(), ImageError> {
        let _lock = self.lock(|| progress(Step::Waiting)).map_err(|error| self.failed(error))?;
        remove::clear(&self.tmp()).map_err(|error| self.failed(error))?;
        let progress = Rc::new(RefCell::new(&mut progress));
        let mut budget = Budget::IMAGE;
        for (index, layer) in layers.iter().enumerate().filter(|(index, _)| !paths[*index].is_dir()) {
            let blob = blobs.file(&layer.name)?;
            let number = index + 1;
            progress.borrow_mut()(Step::Layer { number, of: layers.len(), bytes: blob.size });
            let told = Told { reader: blob.reader, progress: progress.clone() };
            let at = self.tmp().join("layer");
            let made = self.unpack(told, layer, &paths[..index], &at, &mut budget).and_then(|()| {
                let place = paths[index].parent().unwrap_or(&self.path);
                fs::rename(&at, place).map_err(|error| self.failed(error).into())
            });
            if let Err(error) = made {
                let _ = remove::clear(&self.tmp());
                return Err(match error {
                    Failed::Image(error) => error,
                    Failed::Layer(source) => ImageError::Layer { number, source },
                });
            }
        }
        progress.borrow_mut()(Step::Done);
        Ok(())
    }

    /// Unpacks one layer on top of those `below`, in the directory `at`.
    fn unpack(
        &self,
        stored: impl Read,
        layer: &Layer,
        below: &[PathBuf],
        at: &Path,
        budget: &mut Budget,
    ) -> Result<(), Failed> {
        let own = at.join("fs");
        fs::create_dir(at).and_then(|()| fs::create_dir(&own)).map_err(|error| self.failed(error))?;
        let open = |path: &Path| -> Result<OwnedFd, ImageError> {
            File::open(path).map(Into::into).map_err(|error| self.failed(error))
        };
        let (tree, overlay) = match below.last() {
            None => {
                fs::set_permissions(&own, fs::Permissions::from_mode(0o755))
                    .map_err(|error| self.failed(error))?;
                (Tree::new(open(&own)?, None), None)
            }
            Some(under) => {
                like(under, &own).map_err(|error| self.failed(error))?;
                let (work, merged) = (at.join("work"), at.join("merged"));
                [&work, &merged].iter().try_for_each(fs::create_dir).map_err(|error| self.failed(error))?;
                let refused = |source| ImageError::Overlay { path: self.path.clone(), source };
                let overlay = Overlay::mount(below, &own, &work, &merged).map_err(refused)?;
                (Tree::new(open(&merged)?, Some(open(&own)?)), Some(overlay))
            }
        };
        fill(tree, stored, layer, budget)?;
        drop(overlay);
        for aside in ["work", "merged"].iter().filter(|_| !below.is_empty()) {
            remove::remove_path(&at.join(aside)).map_err(|error| self.failed(error))?;
        }
        // Whole also after a power cut, before it is known by its name.
        syncfs(open(&own)?).map_err(|errno| self.failed(errno.into()).into())
    }

    /// Removes what an import that was killed has left, unless there is one.
    fn clear_left(&self) {
        let is_left = fs::read_dir(self.tmp()).is_ok_and(|mut entries| entries.next().is_some());
        if is_left
            && let Ok(lock) = self.lock_file()
            // Held by this descriptor, until all is removed.
            && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let _ = remove::clear(&self.tmp());
        }
    }

    fn lock_file(&self) -> io::Result<File> {
        File::options().create(true).append(true).open(self.path.join("krx-lock"))
    }

    /// Waits until no other process imports.
    fn lock(&self, waiting: impl FnOnce()) -> io::Result<File> {
        let file = self.lock_file()?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            waiting();
            flock(&file, FlockOperation::LockExclusive)?;
        }
        Ok(file)
    }
}

/// Whose fault it is.
enum Failed {
    Layer(LayerError),
    Image(ImageError),
}

impl From<LayerError> for Failed {
    fn from(error: LayerError) -> Self {
        Self::Layer(error)
    }
}

impl From<ImageError> for Failed {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

/// Unpacks what is stored, all of which is read, and compares its digests.
fn fill(tree: Tree, stored: impl Read, layer: &Layer, budget: &mut Budget) -> Result<(), LayerError> {
    let (outer, inner) = (Tally::default(), Tally::default());
    let mut stored = Hashing::new(stored, &outer);
    {
        let content = decoded(&mut stored).map_err(LayerError::Decode)?;
        // Also of what is no file's data.
        let most = budget.stream;
        let mut entries = Entries::new(Sequential(Hashing::new(content, &inner).take(most)));
        tree.unpack(&mut entries, budget)?;
        io::copy(&mut entries.into_inner().0, &mut io::sink()).map_err(LayerError::Decode)?;
        budget.stream -= inner.bytes();
        if budget.stream == 0 {
            return Err(LayerError::TooLarge(Budget::IMAGE.bytes >> 30));
        }
    }
    io::copy(&mut stored, &mut io::sink()).map_err(LayerError::Decode)?;
    let compare = |what, found: Digest, wanted: Digest| {
        if found == wanted { Ok(()) } else { Err(LayerError::Digest { what, found, wanted }) }
    };
    if let Some(wanted) = layer.digest {
        compare("file", outer.digest(), wanted)?;
    }
    compare("content", inner.digest(), layer.diff_id)
}

/// Gives the root of a layer what that below it has; the layer may say something else.
pub(crate) fn like(below: &Path, own: &Path) -> io::Result<()> {
    let below = fs::metadata(below)?;
    chown(own, Some(below.uid()), Some(below.gid()))?;
    fs::set_permissions(own, below.permissions())
}

/// A reader of whose progress is told.
struct Told<R, P> {
    reader: R,
    progress: Rc<RefCell<P>>,
}

impl<R: Read, P: FnMut(Step)> Read for Told<R, P> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.progress.borrow_mut()(Step::Read(count as u64));
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use serde_json::json;

    use super::*;
    use crate::testing::{Archive, Layout, Scratch};

    /// A layout with an image of one layer, `stored`, that is said to hold `content`.
    fn image(scratch: &Scratch, stored: &[u8], content: &[u8]) {
        let layout = Layout::new(scratch, "image");
        let layer = layout.blob(stored, "application/vnd.oci.image.layer.v1.tar");
        let id = Digest::of(content).to_string();
        let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [id] } });
        let config = layout.blob(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
        layout.index(&[layout.manifest(&config, &[layer])]);
    }

    fn import(scratch: &Scratch) -> (Store, Result<Image, ImageError>, Vec<Step>) {
        let store = Store::open(&scratch.path().join("store")).unwrap();
        let reference = Reference::parse(&format!("oci:{}", scratch.path().join("image").display())).unwrap();
        let mut steps = Vec::new();
        let image = store.import(&reference, |step| steps.push(step));
        (store, image, steps)
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn a_layer_is_unpacked_once() {
        let scratch = Scratch::new("store");
        let layer = Archive::new().directory("etc").file("etc/file", b"data").finish();
        image(&scratch, &gzip(&layer), &layer);
        let (_, first, steps) = import(&scratch);
        let first = first.unwrap();
        assert_eq!(fs::read(first.layers[0].join("etc/file")).unwrap(), b"data");
        assert!(
            matches!(steps[0], Step::Layer { number: 1, of: 1, .. }) && steps.last() == Some(&Step::Done)
        );
        let (store, second, steps) = import(&scratch);
        assert_eq!((second.unwrap().layers, steps), (first.layers, vec![]));
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_import_has_left_is_removed() {
        let scratch = Scratch::new("store");
        let layer = Archive::new().file("file", b"data").finish();
        image(&scratch, &layer, &layer);
        scratch.write("store/krx-tmp/layer/fs/half", b"");
        scratch.write("store/tmp/precious", b"");
        let (store, image, _) = import(&scratch);
        assert!(!image.unwrap().layers[0].join("half").exists());
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
        // Also where nothing is to be unpacked; what is somebody else's stays.
        scratch.write("store/krx-tmp/layer/fs/half", b"");
        import(&scratch).1.unwrap();
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
        assert!(scratch.path().join("store/tmp/precious").exists());
        // While somebody unpacks, it is his.
        scratch.write("store/krx-tmp/layer/fs/half", b"");
        let lock = store.lock(|| ()).unwrap();
        import(&scratch).1.unwrap();
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 1);
        drop(lock);
        import(&scratch).1.unwrap();
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
    }

    /// What is wrong with a layer is told, and nothing of it is kept.
    fn refused(stored: &[u8], content: &[u8]) -> LayerError {
        let scratch = Scratch::new("store");
        image(&scratch, stored, content);
        let (store, refused, _) = import(&scratch);
        assert_eq!(fs::read_dir(store.layers()).unwrap().count(), 0);
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
        match refused {
            Err(ImageError::Layer { number: 1, source }) => source,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_layer_that_is_not_what_it_is_said_to_be_is_not_kept() {
        let layer = Archive::new().file("file", b"data").finish();
        assert!(matches!(refused(&layer, b"other"), LayerError::Digest { what: "content", .. }));
        assert!(matches!(refused(&gzip(&layer)[..40], &layer), LayerError::Tar(_) | LayerError::Decode(_)));
        assert!(matches!(refused(b"no archive", b"no archive"), LayerError::Tar(_)));
        let out = Archive::new().file("../out", b"").finish();
        assert!(matches!(refused(&out, &out), LayerError::Entry { .. }));
    }

    #[test]
    fn a_damaged_file_is_told_from_damaged_content() {
        let scratch = Scratch::new("store");
        let layer = Archive::new().file("file", b"data").finish();
        image(&scratch, &layer, &layer);
        let path = scratch.path().join("image/blobs/sha256").join(Digest::of(&layer).hex());
        let longer = [layer.as_slice(), &[0; 512]].concat();
        fs::write(path, longer).unwrap();
        let (_, refused, _) = import(&scratch);
        let refused = refused.unwrap_err();
        let is_file =
            matches!(refused, ImageError::Layer { source: LayerError::Digest { what: "file", .. }, .. });
        assert!(is_file, "{refused:?}");
    }
}
