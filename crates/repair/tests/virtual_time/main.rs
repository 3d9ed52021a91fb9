//! Sender and receiver over emulated links, in virtual time.

mod receiver;
mod residual;
mod seeds;
mod sim;
