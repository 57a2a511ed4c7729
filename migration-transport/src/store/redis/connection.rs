//! A connection to a server that has let this client in, and that keeps what it is given.
//!
//! The crate `redis` connects, speaks TLS, writes commands and reads answers, of which this module
//! has several under way. The crate reads a whole answer, however long it is. What an answer says is
//! checked afterwards.

use std::{
    io::{self, ErrorKind},
    time::{Duration, Instant},
};

use migration_core::store::Incarnation;
use redis::{
    Client, Cmd, ConnectionAddr, FromRedisValue, InfoDict, IntoConnectionInfo, RedisConnectionInfo, RedisResult,
    TlsCertificates, Value,
    io::tcp::{TcpSettings, socket2::TcpKeepalive},
};

use super::fail::{Fail, parse};
use crate::Address;

/// How servers are spoken to.
pub(super) struct Settings {
    pub(super) user: Option<String>,
    pub(super) password: Option<String>,
    pub(super) database: u32,
    pub(super) tls: Option<TlsCertificates>,
    pub(super) cluster: bool,
}

impl Settings {
    /// Connects to a server. The crate limits neither the search for the host's addresses nor the
    /// time until a server on a Unix socket accepts, and tries each address of a host for `timeout`.
    pub(super) fn connect(&self, address: &Address, timeout: Duration) -> RedisResult<redis::Connection> {
        let address = match (address, &self.tls) {
            (Address::Unix(path), _) => ConnectionAddr::Unix(path.clone()),
            (Address::Tcp { host, port }, None) => ConnectionAddr::Tcp(host.clone(), *port),
            (Address::Tcp { host, port }, Some(_)) => {
                ConnectionAddr::TcpTls { host: host.clone(), port: *port, insecure: false, tls_params: None }
            }
        };
        let mut login = RedisConnectionInfo::default().set_db(self.database.into()).set_skip_set_lib_name();
        if let Some(password) = &self.password {
            login = login.set_password(password);
        }
        if let Some(user) = &self.user {
            login = login.set_username(user);
        }
        let tcp = TcpSettings::default().set_nodelay(true).set_keepalive(TcpKeepalive::new());
        let server = address.into_connection_info()?.set_redis_settings(login).set_tcp_settings(tcp);
        let client = match (server.addr(), &self.tls) {
            (ConnectionAddr::TcpTls { .. }, Some(files)) => Client::build_with_tls(server, files.clone()),
            _ => Client::open(server),
        };
        client?.get_connection_with_timeout(timeout)
    }
}

/// How long a call may wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    /// The longest time without a byte.
    silence: Duration,
    /// When it ends at the latest.
    until: Option<Instant>,
}

impl Wait {
    pub(super) fn silence(silence: Duration) -> Self {
        Self { silence, until: None }
    }

    pub(super) fn until(self, until: Instant) -> Self {
        Self { until: Some(until), ..self }
    }

    /// Returns the time left if a wait begins now. It is never zero.
    pub(super) fn left(self) -> Duration {
        let left = self.until.map_or(self.silence, |at| at.saturating_duration_since(Instant::now()));
        left.min(self.silence).max(Duration::from_millis(1))
    }

    /// Returns whether the time until which it ends has passed.
    pub(super) fn is_over(self) -> bool {
        self.until.is_some_and(|at| at <= Instant::now())
    }

    /// Returns the time left.
    ///
    /// # Errors
    /// Returns an error if there is none.
    fn check(self) -> Result<Duration, Fail> {
        match self.is_over() {
            true => Err(Fail::asking(ErrorKind::TimedOut.into())),
            false => Ok(self.left()),
        }
    }
}

/// What a server says about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ServerInfo {
    /// It is another one after each start.
    pub(super) run_id: [u8; 16],
    /// Whether the server never evicts keys to make room.
    keeps_keys: bool,
    is_replica: bool,
    in_cluster: bool,
    pub(super) used_bytes: u64,
    /// The limit that is set, or else the memory of the server's host.
    pub(super) most_bytes: u64,
}

impl ServerInfo {
    /// Reads an answer to `INFO`.
    pub(super) fn new(info: &InfoDict) -> Self {
        let text = |key: &str| info.get::<String>(key).unwrap_or_default();
        let number = |key: &str| info.get::<u64>(key).unwrap_or(0);
        let run_id = text("run_id").get(..32).and_then(|digits| u128::from_str_radix(digits, 16).ok());
        let limit = number("maxmemory");
        Self {
            run_id: run_id.unwrap_or_default().to_be_bytes(),
            keeps_keys: text("maxmemory_policy") == "noeviction",
            is_replica: text("role") != "master",
            in_cluster: text("cluster_enabled") == "1",
            used_bytes: number("used_memory"),
            most_bytes: if limit == 0 { number("total_system_memory") } else { limit },
        }
    }

    pub(super) fn room(&self) -> u64 {
        self.most_bytes.saturating_sub(self.used_bytes)
    }

    /// Refuses a server that does not keep pages, or that is asked in the wrong way.
    fn check(&self, cluster: bool) -> io::Result<()> {
        let refused = |why: &str| Err(io::Error::new(ErrorKind::Unsupported, why));
        if !self.keeps_keys {
            return refused("it may evict keys, and pages would be lost: set its maxmemory-policy to noeviction");
        }
        match (cluster, self.in_cluster) {
            (true, false) => return refused("it is not part of a cluster: its URL begins with `redis://`"),
            (false, true) => return refused("it is part of a cluster, whose URL begins with `redis-cluster://`"),
            _ => {}
        }
        match (self.is_replica, cluster) {
            (false, _) => Ok(()),
            (true, false) => refused("it is a replica, and can be read only: name its master"),
            // the map of the cluster was an old one
            (true, true) => Err(io::Error::new(ErrorKind::ResourceBusy, "it has become a replica")),
        }
    }
}

/// A connection. Each command that was sent is answered once, in order.
pub(super) struct Connection {
    link: redis::Connection,
    /// The longest waits for a read and a write that the socket has at present.
    read_wait: Option<Duration>,
    write_wait: Option<Duration>,
    /// Commands that are not yet sent.
    out: Vec<u8>,
    /// Commands whose answer was not yet read.
    pending: usize,
    /// What the server said when the connection was made.
    pub(super) info: ServerInfo,
    /// Names what this connection stages, and no other.
    pub(super) name: Incarnation,
}

impl Connection {
    /// Asks the server about itself.
    pub(super) fn greet(link: redis::Connection, wait: Wait) -> Result<Self, Fail> {
        let mut this = Self {
            link,
            read_wait: None,
            write_wait: None,
            out: Vec::new(),
            pending: 0,
            info: ServerInfo::default(),
            name: Incarnation::random(),
        };
        this.info = this.ask_info(wait)?;
        Ok(this)
    }

    /// Refuses a server that does not keep pages.
    pub(super) fn check(self, cluster: bool) -> Result<Self, Fail> {
        self.info.check(cluster).map_err(Fail::connecting)?;
        Ok(self)
    }

    pub(super) fn ask_info(&mut self, wait: Wait) -> Result<ServerInfo, Fail> {
        match self.ask(&redis::cmd("INFO"), wait)? {
            // the command itself: where nobody listens, TCP can connect a socket to itself
            Value::Array(_) => Err(Fail::connecting(ErrorKind::ConnectionRefused.into())),
            text => Ok(ServerInfo::new(&parse(text)?)),
        }
    }

    /// Sends a command, and returns the answer, which is no error.
    pub(super) fn ask<T: FromRedisValue>(&mut self, command: &Cmd, wait: Wait) -> Result<T, Fail> {
        self.queue(command);
        self.flush(wait)?;
        parse(self.answer(wait)?)
    }

    /// Adds a command to those that [`flush`](Self::flush) sends.
    pub(super) fn queue(&mut self, command: &Cmd) {
        command.write_packed_command(&mut self.out);
        self.pending += 1;
    }

    /// Sends the commands that wait for it.
    pub(super) fn flush(&mut self, wait: Wait) -> Result<(), Fail> {
        if self.out.is_empty() {
            return Ok(());
        }
        let left = wait.check()?;
        if self.write_wait != Some(left) {
            self.link.set_write_timeout(Some(left)).map_err(asking)?;
            self.write_wait = Some(left);
        }
        self.link.send_packed_command(&self.out).map_err(asking)?;
        self.out.clear();
        Ok(())
    }

    /// Returns how many bytes wait to be sent.
    pub(super) fn unsent(&self) -> usize {
        self.out.len()
    }

    /// Reads the next answer, which is no error.
    pub(super) fn answer(&mut self, wait: Wait) -> Result<Value, Fail> {
        match self.any_answer(wait)? {
            Value::ServerError(error) => Err(Fail::answer(&error)),
            answer => Ok(answer),
        }
    }

    /// Reads the next answer.
    pub(super) fn any_answer(&mut self, wait: Wait) -> Result<Value, Fail> {
        let left = wait.check()?;
        if self.read_wait != Some(left) {
            self.link.set_read_timeout(Some(left)).map_err(asking)?;
            self.read_wait = Some(left);
        }
        let answer = self.link.recv_response().map_err(asking)?;
        self.pending -= 1;
        Ok(answer)
    }

    /// Returns whether nothing is under way, so that the connection can serve another request.
    pub(super) fn is_idle(&self) -> bool {
        self.pending == 0 && self.out.is_empty()
    }
}

/// Returns the failure of a call on a connection.
fn asking(error: redis::RedisError) -> Fail {
    Fail::of(error, Fail::asking)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> String {
        let id = "0123456789abcdef0123456789abcdef01234567";
        let lines = [
            "# Server",
            &format!("run_id:{id}"),
            "used_memory:100",
            "maxmemory:0",
            "maxmemory_policy:noeviction",
            "total_system_memory:300",
            "role:master",
            "cluster_enabled:0",
        ];
        lines.join("\r\n")
    }

    fn info(text: &str) -> ServerInfo {
        ServerInfo::new(&InfoDict::new(text))
    }

    #[test]
    fn what_a_server_says_about_itself_is_read() {
        let found = info(&text());
        assert_eq!(found.run_id, 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef_u128.to_be_bytes());
        assert_eq!(found.room(), 200);
        found.check(false).unwrap();
        let limited = info(&text().replace("maxmemory:0", "maxmemory:150"));
        assert_eq!(limited.room(), 50);
    }

    #[test]
    fn a_server_that_does_not_keep_pages_is_refused() {
        for (was, is, cluster, why) in [
            ("noeviction", "allkeys-lru", false, "noeviction"),
            ("role:master", "role:slave", false, "replica"),
            ("cluster_enabled:0", "cluster_enabled:1", false, "redis-cluster"),
            ("cluster_enabled:0", "cluster_enabled:0", true, "redis://"),
        ] {
            let error = info(&text().replace(was, is)).check(cluster).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
        }
        assert!(info("nothing of use").check(false).is_err());
        let demoted = text().replace("role:master", "role:slave").replace("cluster_enabled:0", "cluster_enabled:1");
        assert_eq!(info(&demoted).check(true).unwrap_err().kind(), ErrorKind::ResourceBusy);
    }
}
