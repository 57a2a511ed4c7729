//! The reasons why a call fails, and whether a retry can help.

use std::{
    error::Error,
    io::{self, ErrorKind},
    sync::Arc,
};

use migration_core::store::StoreError;
use redis::{FromRedisValue, RedisError, ServerError, Value};

/// The reason why the server did not do what it was asked.
#[derive(Debug)]
pub(super) enum Fail {
    /// The connection failed. `step` says what was tried.
    Io { step: &'static str, cause: io::Error },
    /// The server has answered with an error.
    Answer(String),
    /// The store's own error.
    Store(StoreError),
}

impl Fail {
    pub(super) fn connecting(cause: io::Error) -> Self {
        Self::Io { step: "connecting to", cause }
    }

    pub(super) fn asking(cause: io::Error) -> Self {
        Self::Io { step: "asking", cause }
    }

    /// Returns the failure for an answer that makes no sense.
    pub(super) fn nonsense(what: &str) -> Self {
        Self::asking(io::Error::new(ErrorKind::InvalidData, format!("its answer makes no sense: {what}")))
    }

    /// Returns the failure for an error with which the server has answered.
    pub(super) fn answer(error: &ServerError) -> Self {
        Self::Answer(format!("{} {}", error.code(), error.details().unwrap_or_default()))
    }

    /// Returns the failure for an error of the client crate. `as_io` makes a failure of what is not
    /// an answer of the server: [`connecting`](Self::connecting) or [`asking`](Self::asking).
    pub(super) fn of(error: RedisError, as_io: fn(io::Error) -> Self) -> Self {
        match ServerError::try_from(error) {
            Ok(error) => Self::answer(&error),
            Err(error) => as_io(io_error(&error)),
        }
    }

    /// Returns whether the connection was lost, so that the call can be made again on a new one.
    pub(super) fn is_loss(&self) -> bool {
        use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
        let Self::Io { cause, .. } = self else { return false };
        matches!(cause.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof)
    }

    /// Returns whether a signal has interrupted the call. The crate then has lost its place in the
    /// answers, and the connection is of no use.
    pub(super) fn is_interruption(&self) -> bool {
        matches!(self, Self::Io { cause, .. } if cause.kind() == ErrorKind::Interrupted)
    }

    /// Returns whether the same call can succeed later.
    pub(super) fn can_retry(&self) -> bool {
        match self {
            Self::Io { cause, .. } => StoreError::Io { step: String::new(), cause: cause.kind().into() }.can_retry(),
            Self::Answer(text) => kind_of(text) == ErrorKind::ResourceBusy,
            Self::Store(error) => error.can_retry(),
        }
    }

    /// Returns the reason without the step.
    pub(super) fn why(&self) -> String {
        match self {
            Self::Io { cause, .. } => cause.to_string(),
            Self::Answer(text) => text.clone(),
            Self::Store(error) => error.to_string(),
        }
    }

    /// Returns the error of a store. `needed` is how many bytes the call would have stored.
    pub(super) fn into_store_error(self, server: &str, needed: u64) -> StoreError {
        match self {
            Self::Io { step, cause } => StoreError::io(format!("{step} {server}"))(cause),
            Self::Answer(text) if text.starts_with("OOM ") => StoreError::NoRoom { needed, room: 0 },
            Self::Answer(text) => {
                let cause = io::Error::new(kind_of(&text), format!("it answers: {text}"));
                StoreError::io(format!("asking {server}"))(cause)
            }
            Self::Store(error) => error,
        }
    }
}

/// Converts an answer that is no error.
pub(super) fn parse<T: FromRedisValue>(answer: Value) -> Result<T, Fail> {
    redis::from_redis_value(answer).map_err(|error| Fail::nonsense(&error.to_string()))
}

/// Returns the I/O error for an error of the client crate that is not an answer of the server.
fn io_error(error: &RedisError) -> io::Error {
    let kind = match error.kind() {
        _ if error.is_timeout() => ErrorKind::TimedOut,
        // also if the socket is missing: a server makes it when it starts
        _ if error.is_connection_refusal() => ErrorKind::ConnectionRefused,
        redis::ErrorKind::AuthenticationFailed => ErrorKind::PermissionDenied,
        redis::ErrorKind::Parse => ErrorKind::InvalidData,
        redis::ErrorKind::Io => system_error(error).map_or(ErrorKind::Other, io::Error::kind),
        _ => ErrorKind::InvalidInput,
    };
    io::Error::new(kind, error.to_string())
}

/// Returns the system's error that an error of the client crate wraps.
fn system_error(error: &RedisError) -> Option<&io::Error> {
    let cause: &Arc<dyn Error + Send + Sync> = error.source()?.downcast_ref()?;
    (**cause).downcast_ref()
}

/// Returns what an error of the server is. A retry can help if it is [`ErrorKind::ResourceBusy`].
fn kind_of(answer: &str) -> ErrorKind {
    match answer.split(' ').next().unwrap_or_default() {
        // the server reads its data, runs a long script, lacks a replica; the cluster moves keys,
        // or has lost a server and chooses another one
        "LOADING" | "BUSY" | "TRYAGAIN" | "MASTERDOWN" | "NOREPLICAS" | "CLUSTERDOWN" | "MOVED" | "ASK" => {
            ErrorKind::ResourceBusy
        }
        "NOAUTH" | "WRONGPASS" | "NOPERM" => ErrorKind::PermissionDenied,
        "READONLY" => ErrorKind::ReadOnlyFilesystem,
        "MISCONF" => ErrorKind::StorageFull,
        _ => ErrorKind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the error of the store for what a server has sent.
    fn error(sent: &str) -> StoreError {
        let answer = redis::parse_redis_value(format!("-{sent}\r\n").as_bytes()).unwrap();
        Fail::of(answer.extract_error().unwrap_err(), Fail::asking).into_store_error("tcp:h:1", 7)
    }

    #[test]
    fn errors_say_whether_a_retry_can_help() {
        for text in ["LOADING data", "BUSY script", "CLUSTERDOWN no", "TRYAGAIN moving", "MASTERDOWN x", "MOVED 1 h:2"]
        {
            assert!(error(text).can_retry(), "{text}");
        }
        for text in ["NOAUTH x", "WRONGPASS x", "READONLY x", "MISCONF x", "ERR x", "", "WRONGTYPE x"] {
            assert!(!error(text).can_retry(), "{text}");
        }
        assert!(matches!(error("OOM command not allowed"), StoreError::NoRoom { needed: 7, room: 0 }));
    }

    #[test]
    fn errors_of_the_system_keep_their_kind() {
        let kind = |kind: ErrorKind| match Fail::of(io::Error::new(kind, "x").into(), Fail::connecting) {
            Fail::Io { step: "connecting to", cause } => cause.kind(),
            other => panic!("{other:?}"),
        };
        use ErrorKind::{ConnectionRefused, HostUnreachable, Interrupted, NotFound, TimedOut, WouldBlock};
        for same in [ConnectionRefused, HostUnreachable, Interrupted, TimedOut, ErrorKind::UnexpectedEof] {
            assert_eq!(kind(same), same);
        }
        assert_eq!((kind(WouldBlock), kind(NotFound)), (TimedOut, ConnectionRefused));
    }

    #[test]
    fn answers_of_another_form_are_errors_that_a_retry_does_not_help() {
        let fail = parse::<Vec<Vec<u8>>>(Value::Array(vec![Value::Int(1)])).unwrap_err();
        assert!(matches!(&fail, Fail::Io { cause, .. } if cause.kind() == ErrorKind::InvalidData), "{fail:?}");
        assert!(!fail.can_retry() && !fail.is_loss());
    }
}
