//! Sender and receiver over emulated links, in virtual time.

#![allow(unreachable_pub, reason = "one module serves the others of this binary")]

mod receiver;
mod residual;
mod seeds;
mod sim;
