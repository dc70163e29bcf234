//! What users and strangers may give to `krx` that cannot be: each is refused in a sentence, with the documented exit code,
//! before there is a VM, and nothing stays of it. Needs no VM, but root, as `krx run` does.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

mod bundles;
mod desk;
mod flags;
mod images;
