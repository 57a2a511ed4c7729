//! A connection to the server that is made anew when it has failed.

use std::{
    io::{self, ErrorKind},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use ::redis::{Client, Connection, RedisError, RedisResult, cmd};
use migration_core::store::StoreError;

/// The pause before a connection that could not be made is tried again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

pub(super) struct Link {
    client: Client,
    shown: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    open: Option<(Connection, ServerInfo)>,
    /// The pause after the last failure to connect, and when it ends.
    pause: Duration,
    paused_until: Option<Instant>,
}

/// What the server says about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ServerInfo {
    /// It is another one after each start.
    pub(super) run_id: [u8; 16],
    /// Whether the server never evicts keys to make room.
    keeps_keys: bool,
    used_bytes: u64,
    most_bytes: u64,
}

impl ServerInfo {
    pub(super) fn ask(connection: &mut Connection) -> RedisResult<Self> {
        cmd("INFO").query::<String>(connection).map(|text| Self::parse(&text))
    }

    /// Reads the lines of an answer to `INFO`.
    fn parse(text: &str) -> Self {
        let mut info = Self::default();
        let (mut most, mut system) = (0, 0);
        for (key, value) in text.lines().filter_map(|line| line.split_once(':')) {
            let number = || value.trim().parse().unwrap_or(0);
            match key {
                "run_id" => {
                    let half = value.get(..32).and_then(|digits| u128::from_str_radix(digits, 16).ok());
                    info.run_id = half.unwrap_or_default().to_be_bytes();
                }
                "maxmemory_policy" => info.keeps_keys = value.trim() == "noeviction",
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
}

impl Link {
    pub(super) fn new(url: &str) -> Result<Self, StoreError> {
        // the URL may have a password in it: it is not shown
        let client = Client::open(url).map_err(|error| failed("reading the URL of a server", error))?;
        let shown = client.get_connection_info().addr().to_string();
        Ok(Self { client, shown, state: Mutex::default() })
    }

    /// Returns the address of the server, without a password.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    /// Calls the server, and connects to it first if need be. Connecting, and each read and write,
    /// may take `timeout`.
    pub(super) fn with<T>(
        &self,
        timeout: Duration,
        call: impl FnOnce(&mut Connection, &ServerInfo) -> RedisResult<T>,
    ) -> Result<T, StoreError> {
        // of a call that panicked, an answer may still come
        let mut state = self.state.lock().unwrap_or_else(|poisoned: PoisonError<_>| {
            let mut state = poisoned.into_inner();
            state.open = None;
            state
        });
        self.state.clear_poison();
        let timeout = timeout.max(Duration::from_millis(1));
        if state.open.is_none() {
            state.open = Some(self.connect(&mut state, timeout)?);
        }
        let Some((connection, info)) = &mut state.open else { return Err(StoreError::TimedOut) };
        let timeouts =
            connection.set_read_timeout(Some(timeout)).and_then(|()| connection.set_write_timeout(Some(timeout)));
        let result = timeouts.and_then(|()| call(connection, info));
        result.map_err(|error| {
            // unless it is the server's answer: one that is late would be taken for that of the
            // next call
            if error.code().is_none() {
                state.open = None;
            }
            failed(&format!("asking {}", self.shown), error)
        })
    }

    fn connect(&self, state: &mut State, timeout: Duration) -> Result<(Connection, ServerInfo), StoreError> {
        let step = format!("connecting to {}", self.shown);
        let now = Instant::now();
        if state.paused_until.is_some_and(|until| until > now) {
            let why = "the last attempt has failed, and the next one has to wait";
            return Err(StoreError::io(step)(io::Error::new(ErrorKind::ConnectionRefused, why)));
        }
        let made = self.client.get_connection_with_timeout(timeout).and_then(|mut connection| {
            connection.set_read_timeout(Some(timeout))?;
            connection.set_write_timeout(Some(timeout))?;
            let info = ServerInfo::ask(&mut connection)?;
            Ok((connection, info))
        });
        match made {
            Ok((_, info)) if !info.keeps_keys => {
                let why = "it may evict keys, and pages would be lost: set its maxmemory-policy to noeviction";
                Err(StoreError::io(step)(io::Error::new(ErrorKind::Unsupported, why)))
            }
            Ok(made) => {
                state.pause = Duration::ZERO;
                state.paused_until = None;
                Ok(made)
            }
            Err(error) => {
                state.pause = (state.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
                state.paused_until = Some(now + state.pause);
                Err(failed(&step, error))
            }
        }
    }
}

/// Returns the error of a store. Its kind says whether a retry can help.
fn failed(step: &str, error: RedisError) -> StoreError {
    let kind = match &error {
        error if error.code() == Some("OOM") => return StoreError::NoRoom { needed: 0, room: 0 },
        error if error.is_timeout() => ErrorKind::TimedOut,
        error if error.is_connection_refusal() => ErrorKind::ConnectionRefused,
        error if error.is_connection_dropped() => ErrorKind::ConnectionReset,
        // the server reads its data, or has none of a script's time
        error if matches!(error.code(), Some("LOADING" | "BUSY" | "TRYAGAIN" | "MASTERDOWN")) => {
            ErrorKind::ResourceBusy
        }
        error if error.is_io_error() => ErrorKind::BrokenPipe,
        _ => ErrorKind::Other,
    };
    StoreError::io(step.to_owned())(io::Error::new(kind, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_says_about_itself_is_read() {
        let id = "0123456789abcdef0123456789abcdef01234567";
        let text = format!(
            "# Server\r\nrun_id:{id}\r\n# Memory\r\nused_memory:100\r\nmaxmemory:0\r\nmaxmemory_policy:noeviction\r\ntotal_system_memory:300\r\n"
        );
        let info = ServerInfo::parse(&text);
        assert_eq!(info.run_id, 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef_u128.to_be_bytes());
        assert!(info.keeps_keys);
        assert_eq!(info.room(), 200);
        let limited = ServerInfo::parse(&text.replace("maxmemory:0", "maxmemory:150"));
        assert_eq!(limited.room(), 50);
        assert!(!ServerInfo::parse(&text.replace("noeviction", "allkeys-lru")).keeps_keys);
        assert!(!ServerInfo::parse("nothing of use").keeps_keys);
    }

    #[test]
    fn a_url_that_makes_no_sense_is_refused_and_not_shown() {
        let error = Link::new("redis://:secret@").map(drop).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
        assert!(!error.can_retry());
    }
}
