//! What holds of the transport and of every device whatever a guest does: properties, tried on random guests.

mod devices;
mod transport;
