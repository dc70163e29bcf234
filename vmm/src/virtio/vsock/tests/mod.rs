//! The device against an emulated driver, and unix sockets for the host.

mod credit;
mod driver;
mod hostile;
mod lifecycle;
mod streams;
