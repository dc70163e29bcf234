//! The capabilities that are left. Threads inherit them, and no program is executed that could have others.

use std::io;

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};
use rustix::thread::{CapabilitiesSecureBits, set_capabilities_secure_bits};

/// What serving files of all owners takes, as fuse-backend-rs does it.
pub const KEPT: [Capability; 8] = [
    // chown(2), to any owner.
    Capability::CAP_CHOWN,
    // Files and directories of any mode: the guest's kernel has judged who may use them, by groups that it does not tell.
    Capability::CAP_DAC_OVERRIDE,
    // linkat(2) by descriptor, which is how the library makes hard links. It would open files by handle, too, anywhere
    // on their file system: no thread has that system call.
    Capability::CAP_DAC_READ_SEARCH,
    // chmod(2), utimensat(2) and extended attributes on files of any owner.
    Capability::CAP_FOWNER,
    // Keeps setgid bits where root writes or changes a mode; the library drops it for a call that must clear them.
    Capability::CAP_FSETID,
    // Files that a user of the guest makes are made as that user and group.
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    // The attribute security.capability: packages have programs with capabilities.
    Capability::CAP_SETFCAP,
];

/// Has this thread, and those it starts, keep its capabilities in force when it acts for another user. A file is made as the
/// user and group of the request, but a user may make it where only another of its groups may, which the host cannot know
/// (a volume with an `fsGroup`). Nothing is guarded by that: the guest's kernel names the user as it likes.
///
/// # Errors
/// What the kernel says; not to be expected of root.
pub fn keep_for_all_users() -> io::Result<()> {
    Ok(set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?)
}

/// Drops all but [`KEPT`] from all five sets of the calling thread; nothing is inheritable.
///
/// # Errors
/// What the kernel says; not to be expected of root.
pub(super) fn drop_others() -> Result<(), CapsError> {
    // First, as it takes a capability itself.
    for capability in caps::all().into_iter().filter(|capability| !KEPT.contains(capability)) {
        // A kernel that is older than the list does not know the last ones.
        if caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false) {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    let held = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = KEPT.into_iter().filter(|capability| held.contains(capability)).collect();
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

#[cfg(test)]
mod tests {
    use rustix::thread::set_thread_res_uid;

    use super::*;

    /// On a thread of its own: what is dropped is gone.
    #[test]
    fn what_is_not_kept_is_gone() {
        std::thread::spawn(|| {
            if keep_for_all_users().is_err() || drop_others().is_err() {
                eprintln!("SKIP: dropping capabilities needs root");
                return;
            }
            for set in [CapSet::Effective, CapSet::Permitted, CapSet::Bounding] {
                let left = caps::read(None, set).unwrap();
                assert!(left.iter().all(|capability| KEPT.contains(capability)), "{left:?}");
            }
            assert!(caps::read(None, CapSet::Inheritable).unwrap().is_empty());
            let kept = caps::read(None, CapSet::Effective).unwrap();
            let user = |id: u32| rustix::thread::Uid::from_raw(id);
            set_thread_res_uid(user(0), user(1000), user(0)).unwrap();
            assert_eq!(caps::read(None, CapSet::Effective).unwrap(), kept, "for another user");
        })
        .join()
        .unwrap();
    }
}
