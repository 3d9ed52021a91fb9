//! SRT: `srt-live-transmit` on both ends, at its defaults but for the latency. It sends what it
//! reads with one call, here one datagram, as one packet.

use std::io;

use crate::{
    common::process::{Process, free_address},
    media::{Sink, Source},
    run::{Rig, Setup},
    wire::{Door, Way, Wire},
};

pub const PROGRAM: &str = "srt-live-transmit";

pub fn start(setup: &Setup) -> io::Result<Rig> {
    let [input, listener, output] = [(); 3].map(|()| free_address());
    let wire = Wire::start(
        &[Door { upstream: listener, way: Way::Forward }],
        &setup.profile.clean(),
        setup.seed,
    )?;
    let latency = setup.budget().as_millis();
    let sink = Sink::udp(setup.clock, output)?;
    let receiver = Process::start(
        setup.dir,
        "srt-receiver",
        PROGRAM,
        &[
            &format!("srt://:{}?mode=listener&latency={latency}", listener.port()),
            &format!("udp://{output}"),
        ],
    )?;
    let sender = Process::start(
        setup.dir,
        "srt-sender",
        PROGRAM,
        &[
            &format!("udp://127.0.0.1:{}?mode=listener", input.port()),
            &format!("srt://{}?mode=caller&latency={latency}", wire.door(0)),
        ],
    )?;
    let source = Source::udp(setup.clock, setup.profile.cadence, input)?;
    Ok(Rig { wire, source, sink, processes: vec![receiver, sender], edge: None })
}
