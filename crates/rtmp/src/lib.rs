#![doc = include_str!("../README.md")]
#![warn(missing_docs, unreachable_pub)]

pub mod chunk;
pub mod handshake;
pub mod session;
pub mod url;
