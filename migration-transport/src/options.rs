//! Settings of sockets and connectors.

use std::{net::IpAddr, time::Duration};

use socket2::{SockRef, TcpKeepalive};

/// Which TCP congestion control a connection uses (`TCP_CONGESTION`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Congestion {
    /// The system's default; but for a peer at a loopback address the first of `cubic` and `reno` that the kernel
    /// has. A default that paces, as `bbr` does, costs throughput where there is no network to be fair to.
    #[default]
    Auto,
    /// Always the system's default (`net.ipv4.tcp_congestion_control`).
    System,
    /// This one, for example `cubic`; when the kernel refuses it, the system's default.
    Named(String),
}

/// Settings of a connection's socket. The default suits most hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketOptions {
    /// Bytes for `SO_SNDBUF`. `None`: TCP lets the kernel tune it while it runs; Unix sockets ask for 1 MiB, of which
    /// the kernel grants up to `net.core.wmem_max`.
    pub send_buffer: Option<usize>,
    /// Bytes for `SO_RCVBUF` (TCP only: Unix sockets have no use for it). `None`: the kernel tunes it while it runs.
    /// A fixed size ends the tuning, and the kernel caps it at `net.core.rmem_max`, often less than what tuning
    /// reaches.
    pub receive_buffer: Option<usize>,
    /// TCP congestion control.
    pub congestion: Congestion,
    /// After how long without traffic TCP asks whether the peer still lives; about twice that later a dead one is
    /// noticed even where no idle time-out is set. `None`: never.
    pub keepalive: Option<Duration>,
    /// The idle time-out that both directions start with; `None`: none.
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

/// Settings of a connector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectOptions {
    /// How long one [`connect`](migration_core::channel::Connector::connect) may take over all addresses of the host.
    /// Name resolution has time-outs of its own and comes on top.
    pub connect_timeout: Duration,
    /// Settings of each connection.
    pub socket: SocketOptions,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self { connect_timeout: Duration::from_secs(10), socket: SocketOptions::default() }
    }
}

/// What Unix sockets ask for when nothing is configured. Measured: up to 1.5 times the throughput of the default of
/// 208 KiB, while 4 MiB, which falls out of the cache between the two copies, is slower than either.
const UNIX_SEND_BUFFER: usize = 1 << 20;

impl SocketOptions {
    /// Applies them to a TCP socket, best before it connects or listens: window scaling and pacing are settled then.
    /// None of them is worth a failed migration, so what the kernel refuses is left as it is.
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

    /// Applies them to a Unix socket.
    pub(crate) fn apply_unix(&self, socket: SockRef<'_>) {
        let _ = socket.set_send_buffer_size(self.send_buffer.unwrap_or(UNIX_SEND_BUFFER));
    }
}
