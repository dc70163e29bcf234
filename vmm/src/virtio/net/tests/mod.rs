//! The device against an emulated driver; a socket in the tap's place, and a tap where there is one.

mod driver;
mod frames;
mod hostile;
mod judged;
mod real_tap;
mod vhost;
