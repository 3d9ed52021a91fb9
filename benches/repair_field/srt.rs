//! SRT: `srt-live-transmit` on both ends with default settings, except for the latency. It sends the
//! bytes of one read, here one datagram, as one packet.

use std::io;

use crate::{
    common::process::Process,
    run::{Rig, Setup, start_pair},
};

pub const PROGRAM: &str = "srt-live-transmit";

pub fn start(setup: &Setup) -> io::Result<Rig> {
    let latency = setup.budget().as_millis();
    start_pair(setup, |ends| {
        let transmit = |name, input: String, output: String| {
            Process::start(setup.dir, name, PROGRAM, &[&input, &output])
        };
        Ok([
            transmit(
                "srt-receiver",
                format!("srt://:{}?mode=listener&latency={latency}", ends.listener.port()),
                format!("udp://{}", ends.output),
            )?,
            transmit(
                "srt-sender",
                format!("udp://127.0.0.1:{}?mode=listener", ends.input.port()),
                format!("srt://{}?mode=caller&latency={latency}", ends.wire),
            )?,
        ])
    })
}
