//! What the benchmarks of krx are made of: starts that are watched, exits that are counted, reports that can be
//! compared. Measured are the built programs, as a user runs them; nothing here links them.

pub mod exits;
pub mod host;
pub mod launch;
pub mod microvm;
pub mod plot;
pub mod report;
pub mod resident;
pub mod root;
pub mod start;
pub mod system_calls;
pub mod tracing;
