//! RIST, main profile: `ristsender` and `ristreceiver`, at their defaults but for the buffer.

use std::io;

use crate::{
    common::process::{Process, free_address},
    media::{Sink, Source},
    run::{Rig, Setup},
    wire::{Door, Way, Wire},
};

pub const SENDER: &str = "ristsender";
const RECEIVER: &str = "ristreceiver";

pub fn start(setup: &Setup) -> io::Result<Rig> {
    let [input, listener, output] = [(); 3].map(|()| free_address());
    let wire = Wire::start(
        &[Door { upstream: listener, way: Way::Forward }],
        &setup.profile.clean(),
        setup.seed,
    )?;
    let buffer = setup.budget().as_millis().to_string();
    let sink = Sink::udp(setup.clock, output)?;
    let common = ["-p", "1", "-S", "0", "-v", "4", "-b", &buffer];
    let receiver = Process::start(
        setup.dir,
        "rist-receiver",
        RECEIVER,
        &[&common[..], &["-i", &format!("rist://@{listener}"), "-o", &format!("udp://{output}")]]
            .concat(),
    )?;
    let sender = Process::start(
        setup.dir,
        "rist-sender",
        SENDER,
        &[
            &common[..],
            &["-i", &format!("udp://@{input}"), "-o", &format!("rist://{}", wire.door(0))],
        ]
        .concat(),
    )?;
    let source = Source::udp(setup.clock, setup.profile.cadence, input)?;
    Ok(Rig { wire, source, sink, processes: vec![receiver, sender], edge: None })
}
