//! What the benches of this directory share.
#![allow(dead_code, reason = "no bench needs all of it")]

pub mod cpu;
pub mod document;
pub mod machine;
pub mod plot;
pub mod process;
pub mod repair;
