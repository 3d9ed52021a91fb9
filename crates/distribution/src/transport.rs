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

/// The cloud's end.
///
/// It keeps no connection alive by itself: an existing Go edge that waits for a data stream which
/// will not come is freed by the idle timeout alone.
pub fn server() -> TransportConfig {
    let mut config = common();
    config
        // The true timeout is the lesser of both ends': 10 s with our edges. Existing edges dial
        // again when theirs has gone idle, which costs them a repair, so they get quic-go's 30 s.
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

/// The edge's end.
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

/// What an edge's endpoint is made with: connection ids of two bytes, for it has a connection or two
/// and the id is in each repair. (None at all would tie a connection to the cloud's address, which
/// the one before it takes along when it goes.)
pub(super) fn edge_endpoint() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    config.cid_generator(|| Box::new(RandomConnectionIdGenerator::new(2)));
    config
}

/// A UDP socket with room for a burst of nacks or repairs. An IPv6 wildcard takes IPv4 too.
///
/// # Errors
/// What the system said.
pub(super) fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(addr),
        socket2::Type::DGRAM,
        Some(socket2::Protocol::UDP),
    )?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // The kernel gives what its limits allow, which is not worth failing for.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// `min_mtu` and the MTU discovery stay at their defaults: under random loss the black-hole
/// detector falls back to 1200 bytes, so a datagram must always be ready to meet that size.
fn common() -> TransportConfig {
    let mut acks = AckFrequencyConfig::default();
    // Nothing waits for an ack: what is lost is asked for again by number, and answers time the round
    // trip. One an answer would cost a tenth of the answers.
    acks.ack_eliciting_threshold(VarInt::from_u32(16))
        .reordering_threshold(VarInt::from_u32(0))
        .max_ack_delay(Some(ACK_DELAY));
    let mut config = TransportConfig::default();
    config
        .congestion_controller_factory(Arc::new(RepairControlFactory))
        // A lost first packet is sent again after three times this.
        .initial_rtt(Duration::from_millis(100))
        .ack_frequency_config(Some(acks));
    config
}

const ACK_DELAY: Duration = Duration::from_millis(20);
const SOCKET_BUFFER: usize = 4 * 1024 * 1024;
/// Streams that an edge may have open: the control or info stream, and its successors.
const SERVER_BIDI_STREAMS: u32 = 4;
/// Bytes of datagrams that wait for the congestion window.
pub(super) const SERVER_DATAGRAM_BUFFER: usize = 1024 * 1024;
/// Nacks too long for a datagram.
pub(super) const SERVER_UNI_STREAMS: u32 = 16;
/// Repairs too long for a datagram.
pub(super) const CLIENT_UNI_STREAMS: u32 = 128;
