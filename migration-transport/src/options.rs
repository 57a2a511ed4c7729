//! Settings for sockets and connectors.

use std::{net::IpAddr, time::Duration};

use socket2::{SockRef, TcpKeepalive};

/// The TCP congestion control of a connection (`TCP_CONGESTION`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Congestion {
    /// The system's default, except for a peer at a loopback address. There it is the first of
    /// `cubic` and `reno` that the kernel has: a default that paces, like `bbr`, reduces throughput
    /// where there is no shared network.
    #[default]
    Auto,
    /// Always the system's default (`net.ipv4.tcp_congestion_control`).
    System,
    /// This algorithm, for example `cubic`, or the system's default if the kernel refuses it.
    Named(String),
}

/// Settings for the socket of a connection. The default suits most hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketOptions {
    /// The size of the send buffer (`SO_SNDBUF`) in bytes. With `None` the kernel tunes it for TCP.
    /// For Unix sockets 1 MiB is requested, of which the kernel grants up to `net.core.wmem_max`.
    pub send_buffer: Option<usize>,
    /// The size of the receive buffer (`SO_RCVBUF`) in bytes, for TCP only (Unix sockets do not use
    /// it). With `None` the kernel tunes it. A fixed size turns tuning off, and the kernel limits
    /// it to `net.core.rmem_max`, which is often less than what tuning reaches.
    pub receive_buffer: Option<usize>,
    /// The TCP congestion control.
    pub congestion: Congestion,
    /// The time without traffic after which TCP probes the peer. If the peer is dead, that is
    /// noticed about twice that time later, even without an idle time-out. `None` turns probes off.
    pub keepalive: Option<Duration>,
    /// The initial idle time-out of both directions. `None` is no time-out.
    pub idle_timeout: Option<Duration>,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self {
            send_buffer: None,
            receive_buffer: None,
            congestion: Congestion::Auto,
            keepalive: Some(Duration::from_secs(15)),
            idle_timeout: None,
        }
    }
}

/// Settings for a connector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectOptions {
    /// The longest time of one [`connect`](migration_core::channel::Connector::connect) over all
    /// addresses of the host. Name resolution has time-outs of its own and is not included.
    pub connect_timeout: Duration,
    /// The settings for each connection.
    pub socket: SocketOptions,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self { connect_timeout: Duration::from_secs(10), socket: SocketOptions::default() }
    }
}

/// The default send buffer of Unix sockets in bytes. Measured: up to 1.5 times the throughput of
/// the kernel's default of 208 KiB. With 4 MiB the data leaves the cache between the two copies,
/// which is slower than either.
const UNIX_SEND_BUFFER: usize = 1 << 20;

impl SocketOptions {
    /// Applies the settings to a TCP socket, if possible before it connects or listens, when window
    /// scaling and pacing are decided. Ignores settings that the kernel refuses, because none is
    /// worth a failed migration.
    pub(crate) fn apply_tcp(&self, socket: SockRef<'_>, peer: Option<IpAddr>) {
        let _ = socket.set_tcp_nodelay(true);
        if let Some(bytes) = self.send_buffer {
            let _ = socket.set_send_buffer_size(bytes);
        }
        if let Some(bytes) = self.receive_buffer {
            let _ = socket.set_recv_buffer_size(bytes);
        }
        if let Some(time) = self.keepalive {
            let time = time.max(Duration::from_secs(1));
            let probes = (time / 3).max(Duration::from_secs(1));
            let _ =
                socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(time).with_interval(probes).with_retries(3));
        }
        match &self.congestion {
            Congestion::Auto if peer.is_some_and(|ip| ip.to_canonical().is_loopback()) => {
                let _ = socket.set_tcp_congestion(b"cubic").or_else(|_| socket.set_tcp_congestion(b"reno"));
            }
            Congestion::Named(name) => {
                let _ = socket.set_tcp_congestion(name.as_bytes());
            }
            Congestion::Auto | Congestion::System => {}
        }
    }

    /// Applies the settings to a Unix socket.
    pub(crate) fn apply_unix(&self, socket: SockRef<'_>) {
        let _ = socket.set_send_buffer_size(self.send_buffer.unwrap_or(UNIX_SEND_BUFFER));
    }
}
