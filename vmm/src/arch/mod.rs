//! What is particular to a processor architecture. krx knows x86-64.

pub mod x86_64;
