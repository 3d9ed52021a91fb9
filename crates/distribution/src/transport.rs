//! QUIC transport settings of the repair connection, for both ends.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use quinn::{AckFrequencyConfig, EndpointConfig, IdleTimeout, TransportConfig, VarInt};
use quinn_proto::RandomConnectionIdGenerator;

use super::congestion::RepairControlFactory;

/// Transport settings of the cloud.
///
/// It sends no keep-alives: a v0 edge that waits for a data stream which never opens is freed only by
/// the idle timeout.
pub fn server() -> TransportConfig {
    let mut config = common();
    config
        // The smaller timeout of both ends applies: 10 s with our edges. v0 edges get quic-go's 30 s,
        // because they reconnect after an idle timeout and lose a repair by it.
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(30_000))))
        .max_concurrent_bidi_streams(VarInt::from_u32(SERVER_BIDI_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(SERVER_UNI_STREAMS))
        .stream_receive_window(VarInt::from_u32(256 * 1024))
        .receive_window(VarInt::from_u32(1024 * 1024))
        .send_window(1024 * 1024)
        .datagram_receive_buffer_size(Some(256 * 1024))
        .datagram_send_buffer_size(SERVER_DATAGRAM_BUFFER);
    config
}

/// Transport settings of an edge.
pub fn client() -> TransportConfig {
    let mut config = common();
    config
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(10_000))))
        .keep_alive_interval(Some(Duration::from_secs(1)))
        .max_concurrent_bidi_streams(VarInt::from_u32(4))
        .max_concurrent_uni_streams(VarInt::from_u32(CLIENT_UNI_STREAMS))
        .stream_receive_window(VarInt::from_u32(1024 * 1024))
        .receive_window(VarInt::from_u32(4 * 1024 * 1024))
        .send_window(256 * 1024)
        .datagram_receive_buffer_size(Some(2 * 1024 * 1024))
        .datagram_send_buffer_size(256 * 1024);
    config
}

/// Endpoint settings of an edge: connection IDs of two bytes, which suffice for one or two connections,
/// because each repair carries the ID. (With empty IDs, packets would be matched to connections by the
/// cloud's address, and a reconnect would share that with the previous connection.)
pub(super) fn edge_endpoint() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    config.cid_generator(|| Box::new(RandomConnectionIdGenerator::new(2)));
    config
}

/// Binds a UDP socket with buffers for a burst of NACKs or repairs. An IPv6 wildcard address accepts
/// IPv4 too.
///
/// # Errors
/// The error of the system call.
pub(super) fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(addr),
        socket2::Type::DGRAM,
        Some(socket2::Protocol::UDP),
    )?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Best effort: the kernel limits the sizes.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Transport settings of both ends.
///
/// `min_mtu` and MTU discovery keep their defaults: under random loss, black-hole detection falls back
/// to 1200 bytes, so every datagram must be able to shrink to that size.
fn common() -> TransportConfig {
    let mut acks = AckFrequencyConfig::default();
    // Nothing waits for an ACK: lost packets are requested again by number, and repairs measure the
    // round trip. One ACK per repair would cost a tenth of the repairs' bandwidth.
    acks.ack_eliciting_threshold(VarInt::from_u32(16))
        .reordering_threshold(VarInt::from_u32(0))
        .max_ack_delay(Some(ACK_DELAY));
    let mut config = TransportConfig::default();
    config
        .congestion_controller_factory(Arc::new(RepairControlFactory))
        // A lost first packet is retransmitted after three times this value.
        .initial_rtt(Duration::from_millis(100))
        .ack_frequency_config(Some(acks));
    config
}

const ACK_DELAY: Duration = Duration::from_millis(20);
const SOCKET_BUFFER: usize = 4 * 1024 * 1024;
/// Bidirectional streams of an edge: the control or info stream, and its successors.
const SERVER_BIDI_STREAMS: u32 = 4;
/// Bytes of datagrams that may wait for the congestion window.
pub(super) const SERVER_DATAGRAM_BUFFER: usize = 1024 * 1024;
/// Unidirectional streams of an edge, for NACKs too long for a datagram.
pub(super) const SERVER_UNI_STREAMS: u32 = 16;
/// Unidirectional streams of the cloud, for repairs too long for a datagram.
pub(super) const CLIENT_UNI_STREAMS: u32 = 128;
