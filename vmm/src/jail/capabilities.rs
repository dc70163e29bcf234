//! The capabilities that are left. Threads inherit them, and no program is executed that could have others.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
};

/// What serving files of all owners takes, as fuse-backend-rs does it.
pub const KEPT: CapabilitySet = CapabilitySet::empty()
    // chown(2), to any owner.
    .union(CapabilitySet::CHOWN)
    // Files and directories of any mode: the guest's kernel has judged who may use them, by groups that it does not tell.
    .union(CapabilitySet::DAC_OVERRIDE)
    // linkat(2) by descriptor, which is how the library makes hard links. It would open files by handle, too, anywhere
    // on their file system: no thread has that system call.
    .union(CapabilitySet::DAC_READ_SEARCH)
    // chmod(2), utimensat(2) and extended attributes on files of any owner.
    .union(CapabilitySet::FOWNER)
    // Keeps setgid bits where root writes or changes a mode; the library drops it for a call that must clear them.
    .union(CapabilitySet::FSETID)
    // Files that a user of the guest makes are made as that user and group.
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    // The attribute security.capability: packages have programs with capabilities.
    .union(CapabilitySet::SETFCAP);

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
pub(super) fn drop_others() -> io::Result<()> {
    // First, as it takes a capability itself.
    for capability in each().filter(|capability| !KEPT.contains(*capability)) {
        match remove_capability_from_bounding_set(capability) {
            // There are no more of them.
            Err(Errno::INVAL) => break,
            removed => removed?,
        }
    }
    clear_ambient_capability_set()?;
    let kept = capabilities(None)?.permitted & KEPT;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    Ok(set_capabilities(None, sets)?)
}

/// Each that there can be, also those that are younger than this program.
fn each() -> impl Iterator<Item = CapabilitySet> {
    (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number))
}

#[cfg(test)]
mod tests {
    use rustix::thread::{capability_is_in_bounding_set, set_thread_res_uid};

    use super::*;

    /// On a thread of its own: what is dropped is gone.
    #[test]
    fn what_is_not_kept_is_gone() {
        std::thread::spawn(|| {
            if keep_for_all_users().is_err() || drop_others().is_err() {
                eprintln!("SKIP: dropping capabilities needs root");
                return;
            }
            let left = capabilities(None).unwrap();
            assert!(KEPT.contains(left.effective | left.permitted), "{left:?}");
            assert!(left.inheritable.is_empty(), "{left:?}");
            let known = each().map_while(|one| Some((one, capability_is_in_bounding_set(one).ok()?)));
            let bounding: Vec<_> = known.filter(|(_, is_in)| *is_in).map(|(one, _)| one).collect();
            assert!(bounding.iter().all(|one| KEPT.contains(*one)), "{bounding:?}");
            let user = |id: u32| rustix::thread::Uid::from_raw(id);
            set_thread_res_uid(user(0), user(1000), user(0)).unwrap();
            assert_eq!(capabilities(None).unwrap().effective, left.effective, "for another user");
        })
        .join()
        .unwrap();
    }
}
