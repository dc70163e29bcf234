//! User, groups and capabilities of a process about to exec: root's powers go away here, in the one order that works.

use krx_proto::{Capabilities, User};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::error::{Doing, StepError};
use crate::sys::process::{CapabilitySets, clear_ambient, drop_bounding, raise_ambient, set_capabilities};

/// Capability sets are masks of 64 bits.
const CAPABILITIES: u32 = u64::BITS;
/// `CAP_SYS_ADMIN`, without which only a process that can gain no privileges may install a filter (seccomp(2)).
const SYS_ADMIN: u64 = 1 << 21;

/// Who a process is.
#[derive(Debug)]
pub(crate) struct Credentials {
    pub(crate) user: User,
    pub(crate) capabilities: Option<Capabilities>,
    pub(crate) no_new_privileges: bool,
    /// A filter of system calls is to be installed between [`Self::apply`] and [`Self::settle`].
    pub(crate) filtered: bool,
}

impl Credentials {
    /// Makes the calling process that user, with those capabilities.
    pub(crate) fn apply(&self) -> Result<(), StepError> {
        let (uid, gid) = (Uid::from_raw(self.user.uid), Gid::from_raw(self.user.gid));
        let groups: Vec<Gid> = self.user.additional_gids.iter().copied().map(Gid::from_raw).collect();
        setgroups(&groups).doing(|| "Cannot set the additional groups")?;
        setresgid(gid, gid, gid).doing(|| format!("Cannot become group {gid}"))?;
        let become_user = || setresuid(uid, uid, uid).doing(|| format!("Cannot become user {uid}"));
        match &self.capabilities {
            None => become_user()?,
            Some(wanted) => {
                // The bounding set first: it takes a capability to change it. Then the user, keeping the permitted
                // set over the change, as the sets wanted may be more than such a user has.
                bound(wanted.bounding)?;
                prctl::set_keepcaps(true).doing(|| "Cannot keep capabilities")?;
                become_user()?;
                prctl::set_keepcaps(false).doing(|| "Cannot stop keeping capabilities")?;
                set_sets(wanted, self.borrowed(wanted))?;
                set_ambient(wanted.ambient)?;
            }
        }
        if self.no_new_privileges {
            prctl::set_no_new_privs().doing(|| "Cannot set no_new_privileges")?;
        }
        Ok(())
    }

    /// Gives up what was needed for the filter alone.
    pub(crate) fn settle(&self) -> Result<(), StepError> {
        match &self.capabilities {
            Some(wanted) if self.borrowed(wanted) != 0 => set_sets(wanted, 0),
            _ => Ok(()),
        }
    }

    /// What installing the filter takes beyond the capabilities wanted.
    fn borrowed(&self, wanted: &Capabilities) -> u64 {
        if self.filtered && !self.no_new_privileges { SYS_ADMIN & !wanted.effective } else { 0 }
    }
}

fn set_sets(wanted: &Capabilities, more: u64) -> Result<(), StepError> {
    set_capabilities(CapabilitySets {
        effective: wanted.effective | more,
        permitted: wanted.permitted | more,
        inheritable: wanted.inheritable,
    })
    .doing(|| "Cannot set the effective, permitted and inheritable capabilities")
}

fn bound(allowed: u64) -> Result<(), StepError> {
    for capability in members(!allowed) {
        match drop_bounding(capability) {
            // The kernel's last capability is passed.
            Err(Errno::EINVAL) => break,
            result => {
                result.doing(|| format!("Cannot drop capability {capability} from the bounding set"))?
            }
        }
    }
    Ok(())
}

fn set_ambient(wanted: u64) -> Result<(), StepError> {
    clear_ambient().doing(|| "Cannot clear the ambient capabilities")?;
    for capability in members(wanted) {
        match raise_ambient(capability) {
            // A capability this kernel does not know, from a list made for another.
            Err(Errno::EINVAL) => {}
            result => result.doing(|| format!("Cannot make capability {capability} ambient"))?,
        }
    }
    Ok(())
}

/// The capabilities in a set, in ascending order.
fn members(set: u64) -> impl Iterator<Item = u32> {
    (0..CAPABILITIES).filter(move |capability| set >> capability & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_is_borrowed_only_where_a_filter_needs_it() {
        let borrowed = |effective: u64, no_new_privileges: bool, filtered: bool| {
            let wanted = Capabilities { effective, ..Capabilities::default() };
            let user = User::default();
            Credentials { user, capabilities: Some(wanted), no_new_privileges, filtered }.borrowed(&wanted)
        };
        assert_eq!(borrowed(0, false, true), SYS_ADMIN);
        assert_eq!(borrowed(SYS_ADMIN, false, true), 0);
        assert_eq!((borrowed(0, true, true), borrowed(0, false, false)), (0, 0));
    }

    #[test]
    fn members_of_a_set_are_its_bits() {
        assert_eq!(members(0).count(), 0);
        assert_eq!(members(0b1010_0001).collect::<Vec<_>>(), [0, 5, 7]);
        assert_eq!(members(u64::MAX).last(), Some(63));
    }
}
