//! Shared by the properties of RTMP connections.

use downpour_rtmp::{
    chunk::{ACKNOWLEDGEMENT, Message},
    handshake::PACKET_LEN,
};

use super::rtmp_chunks;

/// Length of a side's whole handshake: C0, C1 and C2, or S0, S1 and S2.
pub const HANDSHAKE_LEN: usize = 1 + 2 * PACKET_LEN;

/// Returns the first byte of `data`, which selects the case, and the input of the connection. If the
/// lowest bit of the first byte is set, a handshake precedes the rest of `data`.
pub fn split_input(data: &[u8]) -> Option<(u8, Vec<u8>)> {
    let (&choice, data) = data.split_first()?;
    let mut input = Vec::new();
    if choice & 1 != 0 {
        input.push(3);
        input.resize(HANDSHAKE_LEN, 0);
    }
    input.extend_from_slice(data);
    Some((choice, input))
}

/// Parses the messages of an output after its handshake. Leaves out acknowledgements, whose number may
/// depend on the split of the input.
///
/// # Panics
/// If the peer could not parse them.
pub fn messages(output: &[u8]) -> Vec<Message> {
    let chunks = output.get(HANDSHAKE_LEN..).unwrap_or_default();
    let (mut messages, error) = rtmp_chunks::read([chunks]);
    assert_eq!(error, None, "the peer can parse the output");
    messages.retain(|message| message.kind != ACKNOWLEDGEMENT);
    messages
}
