//! Code that the benches share.
#![allow(dead_code, reason = "no bench uses all of it")]

pub mod cpu;
pub mod document;
pub mod machine;
pub mod plot;
pub mod process;
pub mod repair;
