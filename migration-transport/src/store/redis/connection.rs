//! A connection to a server that has let this client in, and that keeps what it is given.

use std::{
    io::{self, ErrorKind, IoSlice},
    sync::Arc,
};

use migration_core::store::Incarnation;
use rustls::ClientConfig;

use super::{
    resp::{Command, Fail, Reader, Reply},
    stream::{Stream, Wait},
};
use crate::Address;

/// How servers are spoken to.
pub(super) struct Settings {
    pub(super) user: Option<String>,
    pub(super) password: Option<String>,
    pub(super) database: u32,
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) cluster: bool,
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
    /// Reads the lines of an answer to `INFO`.
    pub(super) fn parse(text: &str) -> Self {
        let mut info = Self::default();
        let (mut most, mut system) = (0, 0);
        for (key, value) in text.lines().filter_map(|line| line.split_once(':')) {
            let value = value.trim();
            let number = || value.parse().unwrap_or(0);
            match key {
                "run_id" => {
                    let half = value.get(..32).and_then(|digits| u128::from_str_radix(digits, 16).ok());
                    info.run_id = half.unwrap_or_default().to_be_bytes();
                }
                "maxmemory_policy" => info.keeps_keys = value == "noeviction",
                "role" => info.is_replica = value != "master",
                "cluster_enabled" => info.in_cluster = value == "1",
                "used_memory" => info.used_bytes = number(),
                "maxmemory" => most = number(),
                "total_system_memory" => system = number(),
                _ => {}
            }
        }
        info.most_bytes = if most == 0 { system } else { most };
        info
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
    stream: Stream,
    reader: Reader,
    /// Commands that are not yet sent.
    out: Vec<u8>,
    /// Commands whose reply was not yet read.
    pending: usize,
    /// What the server said when the connection was made.
    pub(super) info: ServerInfo,
    /// Names what this connection stages, and no other.
    pub(super) name: Incarnation,
}

impl Connection {
    /// Connects, and refuses a server that does not keep pages.
    pub(super) fn open(address: &Address, settings: &Settings, wait: Wait) -> Result<Self, Fail> {
        let mut this = Self::greet(address, settings, wait)?;
        this.info = this.ask_info(wait)?;
        let checked = this.info.check(settings.cluster);
        checked.map_err(|cause| Fail::Io { step: "connecting to", cause })?;
        Ok(this)
    }

    /// Connects, and says who this client is.
    pub(super) fn greet(address: &Address, settings: &Settings, wait: Wait) -> Result<Self, Fail> {
        let failed = |cause| Fail::Io { step: "connecting to", cause };
        let stream = Stream::connect(address, settings.tls.as_ref(), wait).map_err(failed)?;
        let mut this = Self {
            stream,
            reader: Reader::new(),
            out: Vec::new(),
            pending: 0,
            info: ServerInfo::default(),
            name: Incarnation::random(),
        };
        if let Some(password) = &settings.password {
            let auth = Command::new("AUTH");
            let auth = settings.user.iter().fold(auth, |auth, user| auth.arg(user));
            this.ask(&auth.arg(password), wait)?;
        }
        if settings.database != 0 {
            this.ask(&Command::new("SELECT").number(settings.database), wait)?;
        }
        Ok(this)
    }

    pub(super) fn ask_info(&mut self, wait: Wait) -> Result<ServerInfo, Fail> {
        let text = self.ask(&Command::new("INFO"), wait)?.bytes();
        let text = text.ok_or_else(|| Fail::nonsense("no text about itself"))?;
        Ok(ServerInfo::parse(&String::from_utf8_lossy(&text)))
    }

    /// Sends a command, and returns the reply, which is no error.
    pub(super) fn ask(&mut self, command: &Command, wait: Wait) -> Result<Reply, Fail> {
        self.queue(command);
        self.flush(wait)?;
        self.reply(wait)
    }

    /// Adds a command to those that [`flush`](Self::flush) sends.
    pub(super) fn queue(&mut self, command: &Command) {
        command.write_to(&mut self.out);
        self.pending += 1;
    }

    pub(super) fn flush(&mut self, wait: Wait) -> Result<(), Fail> {
        let sent = self.stream.write_all(&self.out, wait).map_err(Fail::asking);
        self.out.clear();
        sent
    }

    /// Sends parts that are `commands` commands together.
    pub(super) fn send(&mut self, parts: &mut [IoSlice<'_>], commands: usize, wait: Wait) -> Result<(), Fail> {
        self.pending += commands;
        self.stream.write_slices(parts, wait).map_err(Fail::asking)
    }

    /// Reads the next reply, which is no error.
    pub(super) fn reply(&mut self, wait: Wait) -> Result<Reply, Fail> {
        match self.any_reply(wait)? {
            Reply::Error(text) => Err(Fail::Answer(text)),
            reply => Ok(reply),
        }
    }

    pub(super) fn any_reply(&mut self, wait: Wait) -> Result<Reply, Fail> {
        let reply = self.reader.reply(&mut self.stream, wait)?;
        self.pending -= 1;
        Ok(reply)
    }

    /// Reads the next reply, a value of at most `most` bytes, and hands it out without a copy.
    pub(super) fn value(&mut self, wait: Wait, most: usize) -> Result<Option<&[u8]>, Fail> {
        let value = self.reader.value(&mut self.stream, wait, most)?;
        self.pending -= 1;
        Ok(value)
    }

    /// Reads the next reply, a list of values of at most `most` bytes, and hands each to `take`.
    pub(super) fn values(
        &mut self,
        wait: Wait,
        count: usize,
        most: usize,
        mut take: impl FnMut(usize, &[u8]),
    ) -> Result<(), Fail> {
        self.reader.list_of(&mut self.stream, wait, count)?;
        for at in 0..count {
            take(at, self.reader.value(&mut self.stream, wait, most)?.unwrap_or_default());
        }
        self.pending -= 1;
        Ok(())
    }

    /// Returns whether nothing is under way, so that the connection can serve another request.
    pub(super) fn is_idle(&self) -> bool {
        self.pending == 0 && self.out.is_empty()
    }
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

    #[test]
    fn what_a_server_says_about_itself_is_read() {
        let info = ServerInfo::parse(&text());
        assert_eq!(info.run_id, 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef_u128.to_be_bytes());
        assert_eq!(info.room(), 200);
        info.check(false).unwrap();
        let limited = ServerInfo::parse(&text().replace("maxmemory:0", "maxmemory:150"));
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
            let error = ServerInfo::parse(&text().replace(was, is)).check(cluster).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
        }
        assert!(ServerInfo::parse("nothing of use").check(false).is_err());
        let demoted = text().replace("role:master", "role:slave").replace("cluster_enabled:0", "cluster_enabled:1");
        assert_eq!(ServerInfo::parse(&demoted).check(true).unwrap_err().kind(), ErrorKind::ResourceBusy);
    }
}
