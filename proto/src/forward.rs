//! The header of a connection that is carried on to a TCP port of the guest.

use serde::{Deserialize, Serialize};

/// First and only frame on such a connection. The agent answers with the byte [`FORWARDED`] once it is connected to the
/// port, or closes; after that the bytes are those of the TCP connection, and each direction ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardHello {
    pub port: u16,
}

pub const FORWARDED: u8 = 1;
