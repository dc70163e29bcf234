//! What a person types to name an image: `oci:DIR`, `oci-archive:FILE` or `docker-archive:FILE`, each with `:TAG` where it
//! has several, as skopeo and podman have it (containers-transports(5)).

use std::path::PathBuf;

use crate::error::ImageError;

/// Where an image is, and which of those that are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    pub(crate) transport: Transport,
    pub(crate) path: PathBuf,
    pub(crate) tag: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// A directory with an OCI layout (image-spec, image-layout.md).
    Oci,
    /// The same in a tar archive.
    OciArchive,
    /// What `docker save` writes.
    DockerArchive,
}

impl Reference {
    /// # Errors
    /// The text has another form.
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        let parsed = text.split_once(':').and_then(|(transport, rest)| {
            let transport = match transport {
                "oci" => Transport::Oci,
                "oci-archive" => Transport::OciArchive,
                "docker-archive" => Transport::DockerArchive,
                _ => return None,
            };
            let (path, tag) = rest.split_once(':').map_or((rest, None), |(path, tag)| (path, Some(tag)));
            let valid = !path.is_empty() && tag.is_none_or(|tag| !tag.is_empty());
            valid.then(|| Self { transport, path: path.into(), tag: tag.map(Into::into) })
        });
        parsed.ok_or_else(|| ImageError::Reference(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> Option<(Transport, String, Option<String>)> {
        let parsed = Reference::parse(text).ok()?;
        Some((parsed.transport, parsed.path.display().to_string(), parsed.tag))
    }

    #[test]
    fn images_are_named_by_where_they_are() {
        assert_eq!(parts("oci:a/b"), Some((Transport::Oci, "a/b".into(), None)));
        assert_eq!(
            parts("oci-archive:/x.tar:v1"),
            Some((Transport::OciArchive, "/x.tar".into(), Some("v1".into())))
        );
        let docker = Some((Transport::DockerArchive, "x".into(), Some("repo/name:tag".into())));
        assert_eq!(parts("docker-archive:x:repo/name:tag"), docker);
        for bad in ["", "oci", "oci:", "oci::tag", "oci:x:", "docker:x", "x.tar", "OCI:x"] {
            assert_eq!(parts(bad), None, "{bad}");
        }
    }
}
