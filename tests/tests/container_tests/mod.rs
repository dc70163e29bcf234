//! Tests of the suite `containers`, by what they are about.

pub(crate) mod security;
