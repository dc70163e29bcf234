//! From the files of an image to what it consists of: the manifest for this platform, its configuration and its layers
//! (image-spec, image-index.md, manifest.md and config.md; for docker's archives the file `manifest.json`).

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::blobs::Blobs;
use crate::digest::Digest;
use crate::error::{ImageError, shown};
use crate::reference::{Reference, Transport};

/// As many as overlayfs is given, less what a container needs.
const MAX_LAYERS: usize = 120;
/// An index in an index in an index.
const MAX_DEPTH: usize = 4;
const INDEX: &str = "index.json";
const DOCKER: &str = "manifest.json";
/// Of an entry of the index, its name (image-spec, annotations.md).
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The same, as containerd has it.
const IMAGE_NAME: &str = "io.containerd.image.name";

/// How an image is to be run, unless other wishes are told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// Each `NAME=VALUE`.
    pub env: Vec<String>,
    pub working_dir: Option<String>,
    /// `USER[:GROUP]`, by name or number.
    pub user: Option<String>,
}

/// A layer, by where it is and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    pub(crate) name: String,
    /// Of the file, as far as it is told.
    pub(crate) digest: Option<Digest>,
    /// Of what the file holds, decompressed.
    pub(crate) diff_id: Digest,
}

/// An image that was chosen.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) config: Config,
    /// The lowest first.
    pub(crate) layers: Vec<Layer>,
}

/// An image of docker's archives.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Chooses what `reference` names.
pub(crate) fn choose(blobs: &Blobs, reference: &Reference) -> Result<Chosen, ImageError> {
    let (config, name, layers) = match reference.transport {
        Transport::DockerArchive => docker(blobs, reference.tag.as_deref())?,
        Transport::Oci | Transport::OciArchive => oci(blobs, reference.tag.as_deref())?,
    };
    let configuration: ImageConfiguration = json(&config, &name, "an image configuration")?;
    let (os, arch) = (configuration.os(), configuration.architecture());
    if (os, arch) != (&Os::Linux, &Arch::Amd64) {
        return Err(ImageError::Unusable(format!(
            "it is for {}, and krx runs linux/amd64",
            shown(&format!("{os}/{arch}"))
        )));
    }
    let ids = configuration.rootfs().diff_ids();
    if ids.len() != layers.len() {
        let text = format!("it has {} layers, and its configuration tells of {}", layers.len(), ids.len());
        return Err(ImageError::Unusable(text));
    }
    if layers.len() > MAX_LAYERS {
        let text = format!("it has {} layers, and krx stacks {MAX_LAYERS} at most", layers.len());
        return Err(ImageError::Unusable(text));
    }
    let layers = layers.into_iter().zip(ids).map(|((name, digest), id)| {
        let diff_id = Digest::parse(id).ok_or_else(|| unusable_digest(id))?;
        Ok(Layer { name, digest, diff_id })
    });
    Ok(Chosen { layers: layers.collect::<Result<_, ImageError>>()?, config: run_config(&configuration)? })
}

/// The content of a configuration, its name, and of each layer the file and its digest.
type Parts = (Vec<u8>, String, Vec<(String, Option<Digest>)>);

fn docker(blobs: &Blobs, tag: Option<&str>) -> Result<Parts, ImageError> {
    let images: Vec<DockerImage> = json(&blobs.small(DOCKER, None)?, DOCKER, "a list of images")?;
    let tags = |image: &DockerImage| image.repo_tags.clone().unwrap_or_default();
    let mut fitting = images.iter().filter(|image| match tag {
        None => true,
        Some(tag) => tags(image).iter().any(|own| own == tag || own.strip_suffix(":latest") == Some(tag)),
    });
    let all = || images.iter().flat_map(tags).collect::<Vec<_>>().join(", ");
    let image = match (fitting.next(), fitting.next()) {
        (Some(image), None) => image,
        (Some(_), Some(_)) => return Err(ImageError::Choice(shown(&all()))),
        (None, _) => return Err(none(tag, &all())),
    };
    // Both its own and OCI's way to name a file by its content.
    let digest = |name: &str| {
        let last = name.rsplit('/').next().unwrap_or(name);
        Digest::from_hex(last.strip_suffix(".json").unwrap_or(last))
    };
    let config = blobs.small(&image.config, digest(&image.config).as_ref())?;
    // A layer's name there is that of what it holds, or of something else: its DiffID tells.
    Ok((config, image.config.clone(), image.layers.iter().map(|layer| (layer.clone(), None)).collect()))
}

fn oci(blobs: &Blobs, tag: Option<&str>) -> Result<Parts, ImageError> {
    let index: ImageIndex = json(&blobs.small(INDEX, None)?, INDEX, "an image index")?;
    let mut found = named(&index, tag)?;
    for _ in 0..MAX_DEPTH {
        let (name, digest) = place(&found)?;
        let content = blobs.small(&name, Some(&digest))?;
        match found.media_type() {
            MediaType::ImageIndex => found = for_platform(&json(&content, &name, "an image index")?)?,
            MediaType::Other(other) if other.contains("manifest.list") => {
                found = for_platform(&json(&content, &name, "a list of manifests")?)?;
            }
            _ => return manifest(blobs, &json(&content, &name, "an image manifest")?),
        }
    }
    Err(ImageError::Unusable(format!("its indices are nested more than {MAX_DEPTH} times")))
}

fn manifest(blobs: &Blobs, manifest: &ImageManifest) -> Result<Parts, ImageError> {
    let (name, digest) = place(manifest.config())?;
    let config = blobs.small(&name, Some(&digest))?;
    let layers =
        manifest.layers().iter().map(|layer| place(layer).map(|(name, digest)| (name, Some(digest))));
    Ok((config, name, layers.collect::<Result<_, _>>()?))
}

/// The entry of the index of a layout with that name, or the only one for this platform.
fn named(index: &ImageIndex, tag: Option<&str>) -> Result<Descriptor, ImageError> {
    let names = |entry: &Descriptor| -> Vec<String> {
        let annotations = entry.annotations().as_ref();
        let of = |key| annotations.and_then(|all| all.get(key)).cloned();
        of(REF_NAME).into_iter().chain(of(IMAGE_NAME)).collect()
    };
    let entries = index.manifests();
    let all = || entries.iter().flat_map(names).collect::<Vec<_>>().join(", ");
    let mut fitting =
        entries.iter().filter(|entry| tag.is_none_or(|tag| names(entry).iter().any(|own| own == tag)));
    match (fitting.next(), fitting.next()) {
        (Some(entry), None) => Ok(entry.clone()),
        (None, _) => Err(none(tag, &all())),
        (Some(_), Some(_)) if tag.is_some() || entries.iter().all(|entry| names(entry).is_empty()) => {
            for_platform(index)
        }
        (Some(_), Some(_)) => Err(ImageError::Choice(shown(&all()))),
    }
}

/// The entry for Linux on x86-64; one that tells no platform is taken at its word later.
fn for_platform(index: &ImageIndex) -> Result<Descriptor, ImageError> {
    let fits = |entry: &&Descriptor| {
        entry
            .platform()
            .as_ref()
            .is_none_or(|own| (own.os(), own.architecture()) == (&Os::Linux, &Arch::Amd64))
    };
    index.manifests().iter().find(fits).cloned().ok_or_else(|| {
        let platforms = index.manifests().iter().filter_map(|entry| entry.platform().as_ref());
        let names: Vec<_> = platforms.map(|own| format!("{}/{}", own.os(), own.architecture())).collect();
        ImageError::Unusable(format!("it has nothing for linux/amd64, but for {}", shown(&names.join(", "))))
    })
}

/// The file of a descriptor.
fn place(descriptor: &Descriptor) -> Result<(String, Digest), ImageError> {
    let text = descriptor.digest().to_string();
    let digest = Digest::parse(&text).ok_or_else(|| unusable_digest(&text))?;
    Ok((format!("blobs/sha256/{}", digest.hex()), digest))
}

fn unusable_digest(text: &str) -> ImageError {
    ImageError::Unusable(format!("{} is not a SHA-256 digest", shown(text)))
}

fn none(tag: Option<&str>, all: &str) -> ImageError {
    ImageError::Unusable(match tag {
        Some(tag) if all.is_empty() => format!("there is none named {tag}, as none has a name: leave it out"),
        Some(tag) => format!("there is none named {tag}, but {}", shown(all)),
        None => "there is none in it".into(),
    })
}

fn run_config(configuration: &ImageConfiguration) -> Result<Config, ImageError> {
    let Some(config) = configuration.config() else { return Ok(Config::default()) };
    let names = config.env().iter().flatten().map(|text| text.split('=').next().unwrap_or_default());
    if let Some(odd) = names.chain(config.user().as_deref()).find(|text| text.contains(char::is_control)) {
        return Err(ImageError::Unusable(format!("{} is no name of a user or a variable", shown(odd))));
    }
    let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    Ok(Config {
        entrypoint: list(config.entrypoint()),
        cmd: list(config.cmd()),
        env: list(config.env()),
        working_dir: text(config.working_dir()),
        user: text(config.user()),
    })
}

fn json<T: DeserializeOwned>(content: &[u8], name: &str, what: &'static str) -> Result<T, ImageError> {
    serde_json::from_slice(content).map_err(|source| ImageError::Json { name: shown(name), what, source })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{Archive, Layout, Scratch};

    fn choose_in(scratch: &Scratch, text: &str) -> Result<Chosen, ImageError> {
        let reference =
            Reference::parse(&text.replace('@', &scratch.path().join("image").display().to_string()))?;
        choose(&Blobs::open(&reference)?, &reference)
    }

    fn configuration(arch: &str, layers: &[Digest]) -> Value {
        let ids: Vec<_> = layers.iter().map(ToString::to_string).collect();
        json!({
            "architecture": arch, "os": "linux", "rootfs": { "type": "layers", "diff_ids": ids },
            "config": { "Entrypoint": ["/bin/e"], "Cmd": ["c"], "Env": ["A=1"], "WorkingDir": "/w", "User": "u:g" },
        })
    }

    fn layout(scratch: &Scratch) -> Layout<'_> {
        Layout::new(scratch, "image")
    }

    /// An image of one layer, by its manifest's descriptor.
    fn image(layout: &Layout<'_>, arch: &str) -> Value {
        let layer = layout.blob(b"layer", "application/vnd.oci.image.layer.v1.tar");
        let config = configuration(arch, &[Digest::of(b"content")]).to_string();
        let config = layout.blob(config.as_bytes(), "application/vnd.oci.image.config.v1+json");
        layout.manifest(&config, &[layer])
    }

    #[test]
    fn the_manifest_of_this_platform_is_chosen() {
        let scratch = Scratch::new("manifest");
        let layout = layout(&scratch);
        let with = |mut entry: Value, arch: &str| {
            entry["platform"] = json!({ "os": "linux", "architecture": arch });
            entry
        };
        let inner = json!({ "schemaVersion": 2, "manifests": [with(image(&layout, "arm64"), "arm64"), with(image(&layout, "amd64"), "amd64")] });
        let inner = layout.blob(inner.to_string().as_bytes(), "application/vnd.oci.image.index.v1+json");
        layout.index(&[inner]);
        let Chosen { config, layers } = choose_in(&scratch, "oci:@").unwrap();
        assert_eq!((config.entrypoint, config.cmd), (vec!["/bin/e".to_string()], vec!["c".to_string()]));
        assert_eq!((config.env, config.user.as_deref()), (vec!["A=1".to_string()], Some("u:g")));
        assert_eq!(config.working_dir.as_deref(), Some("/w"));
        assert_eq!(layers[0].digest, Some(Digest::of(b"layer")));
        assert_eq!(layers[0].diff_id, Digest::of(b"content"));
        layout.index(&[with(image(&layout, "arm64"), "arm64")]);
        let refused = choose_in(&scratch, "oci:@").unwrap_err().to_string();
        assert!(refused.contains("arm64"), "{refused}");
    }

    #[test]
    fn of_several_images_one_is_named() {
        let scratch = Scratch::new("manifest");
        let layout = layout(&scratch);
        let named = |name: &str| {
            let mut entry = image(&layout, "amd64");
            entry["annotations"] = json!({ REF_NAME: name });
            entry
        };
        layout.index(&[named("v1"), named("v2")]);
        assert!(choose_in(&scratch, "oci:@:v2").is_ok());
        assert!(matches!(choose_in(&scratch, "oci:@"), Err(ImageError::Choice(all)) if all == "v1, v2"));
        let none = choose_in(&scratch, "oci:@:v3").unwrap_err().to_string();
        assert!(none.contains("v3") && none.contains("v1, v2"), "{none}");
        layout.index(&[]);
        assert!(choose_in(&scratch, "oci:@").is_err());
    }

    #[test]
    fn what_docker_saves_is_understood() {
        let scratch = Scratch::new("manifest");
        let config = configuration("amd64", &[Digest::of(b"layer")]).to_string();
        let name = format!("{}.json", Digest::of(config.as_bytes()).hex());
        let save = |name: &str, tags: &[&[&str]]| {
            let image =
                |tags: &&[&str]| json!({ "Config": name, "RepoTags": tags, "Layers": ["x/layer.tar"] });
            let images: Vec<_> = tags.iter().map(image).collect();
            let archive = Archive::new().file(name, config.as_bytes()).file("x/layer.tar", b"layer");
            let archive = archive.file(DOCKER, json!(images).to_string().as_bytes());
            scratch.write("image", &archive.finish());
        };
        save(&name, &[&["busybox:latest"]]);
        assert_eq!(choose_in(&scratch, "docker-archive:@").unwrap().layers[0].name, "x/layer.tar");
        assert!(choose_in(&scratch, "docker-archive:@:busybox").is_ok());
        assert!(choose_in(&scratch, "docker-archive:@:other").is_err());
        save(&name, &[&["a:1"], &["b:1"]]);
        assert!(
            matches!(choose_in(&scratch, "docker-archive:@"), Err(ImageError::Choice(all)) if all == "a:1, b:1")
        );
        save(&format!("{}.json", Digest::of(b"else").hex()), &[&[]]);
        assert!(matches!(choose_in(&scratch, "docker-archive:@"), Err(ImageError::Digest { .. })));
        assert!(matches!(choose_in(&scratch, "oci-archive:@"), Err(ImageError::Missing(_))));
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let scratch = Scratch::new("manifest");
        let layout = layout(&scratch);
        let refused = |manifest: Value| {
            layout.index(&[manifest]);
            choose_in(&scratch, "oci:@").unwrap_err()
        };
        let config = |ids: &[Digest]| {
            let text = configuration("amd64", ids).to_string();
            layout.blob(text.as_bytes(), "application/vnd.oci.image.config.v1+json")
        };
        assert!(matches!(
            refused(layout.manifest(&config(&[Digest::of(b"x")]), &[])),
            ImageError::Unusable(_)
        ));
        let many = vec![Digest::of(b"x"); 121];
        let layer = layout.blob(b"x", "application/vnd.oci.image.layer.v1.tar");
        let manifest = layout.manifest(&config(&many), &vec![layer; 121]);
        assert!(matches!(refused(manifest), ImageError::Unusable(_)));
        let mut other = image(&layout, "amd64");
        other["digest"] = json!(Digest::of(b"none").to_string());
        assert!(matches!(refused(other.clone()), ImageError::Missing(_)));
        other["digest"] = json!("sha256:../../../etc/passwd");
        assert!(matches!(refused(other), ImageError::Json { .. } | ImageError::Unusable(_)));
        let mut text = layout.blob(b"no json", "application/vnd.oci.image.manifest.v1+json");
        assert!(matches!(refused(text.clone()), ImageError::Json { .. }));
        layout.overwrite(&text, b"no jsom");
        assert!(matches!(refused(text.clone()), ImageError::Digest { .. }));
        // An index that is in itself cannot be: its digest would have to be in it. A chain of them can.
        text = image(&layout, "amd64");
        for _ in 0..6 {
            let index = json!({ "schemaVersion": 2, "manifests": [text] });
            text = layout.blob(index.to_string().as_bytes(), "application/vnd.oci.image.index.v1+json");
        }
        assert!(matches!(refused(text), ImageError::Unusable(_)));
    }
}
