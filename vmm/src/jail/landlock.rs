//! Landlock rules: limits on files that hold whatever is in the mount namespace. A second wall behind the jail's root, where
//! the kernel has it (5.19, for renames between directories); besides, no signal leaves the process, and no TCP socket is
//! connected or bound.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};

/// The newest version of the interface whose rights are all known here.
const VERSION: ABI = ABI::V6;

/// Restricts the calling thread and those that it starts to `share` and to sockets in `directories`.
///
/// # Errors
/// The kernel has Landlock and refuses the rules.
pub(super) fn restrict(share: Option<&Path>, directories: &[PathBuf]) -> Result<(), RulesetError> {
    // An older Landlock would refuse every rename from one directory to another.
    let required = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let Ok(ruleset) = required.handle_access(AccessFs::Refer) else { return Ok(()) };
    let mut ruleset = ruleset
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(VERSION))?
        .handle_access(AccessNet::from_all(VERSION))?
        .scope(Scope::from_all(VERSION))?
        .create()?;
    if let Some(share) = share.and_then(|path| PathFd::new(path).ok()) {
        // Whiteouts of an overlay are character devices, and need no capability; other nodes do.
        let no = AccessFs::Execute | AccessFs::IoctlDev | AccessFs::MakeBlock;
        ruleset = ruleset.add_rule(PathBeneath::new(share, AccessFs::from_all(VERSION) & !no))?;
    }
    let own = AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::RemoveFile | AccessFs::RemoveDir;
    let descriptors = (Path::new("/proc/self"), AccessFs::ReadFile | AccessFs::ReadDir);
    for (path, access) in directories.iter().map(|path| (path.as_path(), own)).chain([descriptors]) {
        if let Ok(path) = PathFd::new(path) {
            ruleset = ruleset.add_rule(PathBeneath::new(path, access))?;
        }
    }
    ruleset.restrict_self().map(drop)
}
