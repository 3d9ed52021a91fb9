//! RIST, main profile: `ristsender` and `ristreceiver` with default settings, except for the buffer.

use std::io;

use crate::{
    common::process::Process,
    run::{Rig, Setup, start_pair},
};

pub const SENDER: &str = "ristsender";
const RECEIVER: &str = "ristreceiver";

pub fn start(setup: &Setup) -> io::Result<Rig> {
    let buffer = setup.budget().as_millis().to_string();
    let common = ["-p", "1", "-S", "0", "-v", "4", "-b", &buffer];
    start_pair(setup, |ends| {
        let rist = |name, program, input: String, output: String| {
            let arguments = [&common[..], &["-i", &input, "-o", &output]].concat();
            Process::start(setup.dir, name, program, &arguments)
        };
        Ok([
            rist(
                "rist-receiver",
                RECEIVER,
                format!("rist://@{}", ends.listener),
                format!("udp://{}", ends.output),
            )?,
            rist(
                "rist-sender",
                SENDER,
                format!("udp://@{}", ends.input),
                format!("rist://{}", ends.wire),
            )?,
        ])
    })
}
