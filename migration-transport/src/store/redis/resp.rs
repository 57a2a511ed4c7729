//! The protocol of the server (RESP 2): commands, and replies, of which nothing is believed.
//!
//! A client crate is not used for this. Those that there are copy each value twice, and allocate
//! what the server says that it will send.

use std::{fmt::Display, io, ops::Range};

use super::stream::{Stream, Wait};

/// Room of the read buffer. It takes all that is in flight of a prefetch, so that one call of the
/// system reads it.
const BUFFER_BYTES: usize = 320 << 10;
/// The longest value that a reply may have.
pub(super) const MAX_BULK_BYTES: usize = 256 << 10;
/// The longest line: a status, a number or an error.
const MAX_LINE_BYTES: usize = 4096;
/// Most parts of a reply that is a list, those of lists in it included. The longest ones are those
/// of a put of 4096 pages, and of all namespaces with their records.
const MAX_PARTS: usize = 20_000;
/// Most bytes of all values of a list.
const MAX_LIST_BYTES: usize = 4 << 20;
/// How deep lists may lie in lists.
const MAX_DEPTH: usize = 5;

/// Why the server did not do what it was asked.
#[derive(Debug)]
pub(super) enum Fail {
    /// The connection failed. `step` says what was tried.
    Io { step: &'static str, cause: io::Error },
    /// The server has answered with an error.
    Answer(String),
    /// The store's own error.
    Store(migration_core::store::StoreError),
}

impl Fail {
    pub(super) fn asking(cause: io::Error) -> Self {
        Self::Io { step: "asking", cause }
    }

    /// Returns the error for an answer that makes no sense.
    pub(super) fn nonsense(what: &str) -> Self {
        Self::asking(io::Error::new(io::ErrorKind::InvalidData, format!("its answer makes no sense: {what}")))
    }
}

/// A command: a name and its arguments.
pub(super) struct Command {
    args: usize,
    body: Vec<u8>,
}

impl Command {
    pub(super) fn new(name: &str) -> Self {
        Self { args: 0, body: Vec::with_capacity(128) }.arg(name)
    }

    pub(super) fn arg(mut self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        self.args += 1;
        write_head(&mut self.body, b'$', bytes.len());
        self.body.extend_from_slice(bytes);
        self.body.extend_from_slice(b"\r\n");
        self
    }

    pub(super) fn number(self, number: impl Display) -> Self {
        self.arg(number.to_string())
    }

    pub(super) fn write_to(&self, out: &mut Vec<u8>) {
        write_head(out, b'*', self.args);
        out.extend_from_slice(&self.body);
    }
}

/// Writes the line that begins a list (`*`) or a value (`$`).
pub(super) fn write_head(out: &mut Vec<u8>, kind: u8, count: usize) {
    out.push(kind);
    out.extend_from_slice(count.to_string().as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Status(String),
    Error(String),
    Number(i64),
    Bytes(Vec<u8>),
    Nothing,
    List(Vec<Reply>),
}

impl Reply {
    /// Returns the bytes of a value or a status.
    pub(super) fn bytes(self) -> Option<Vec<u8>> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Status(text) => Some(text.into_bytes()),
            _ => None,
        }
    }

    pub(super) fn list(self) -> Option<Vec<Reply>> {
        match self {
            Self::List(parts) => Some(parts),
            _ => None,
        }
    }

    pub(super) fn number(&self) -> Option<i64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Bytes(bytes) => str::from_utf8(bytes).ok()?.parse().ok(),
            _ => None,
        }
    }
}

/// What the rest of a reply may still take.
struct Budget {
    parts: usize,
    bytes: usize,
}

/// Reads replies. Its memory does not grow.
pub(super) struct Reader {
    buffer: Box<[u8]>,
    /// What was received and not yet read.
    unread: Range<usize>,
}

impl Reader {
    pub(super) fn new() -> Self {
        Self { buffer: vec![0; BUFFER_BYTES].into(), unread: 0..0 }
    }

    /// Receives until at least `needed` bytes are unread. `needed` is below [`BUFFER_BYTES`].
    fn fill(&mut self, stream: &mut Stream, wait: Wait, needed: usize) -> Result<(), Fail> {
        if self.unread.is_empty() {
            self.unread = 0..0;
        }
        if self.unread.start + needed > self.buffer.len() {
            self.buffer.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        while self.unread.len() < needed {
            let received = stream.read(&mut self.buffer[self.unread.end..], wait).map_err(Fail::asking)?;
            if received == 0 {
                return Err(Fail::asking(io::ErrorKind::UnexpectedEof.into()));
            }
            self.unread.end += received;
        }
        Ok(())
    }

    /// Returns the next line without its end.
    fn line(&mut self, stream: &mut Stream, wait: Wait) -> Result<&[u8], Fail> {
        let mut looked_at = 0;
        loop {
            let unread = &self.buffer[self.unread.clone()];
            if let Some(end) = unread[looked_at..].iter().position(|&byte| byte == b'\n') {
                let start = self.unread.start;
                let end = start + looked_at + end;
                self.unread.start = end + 1;
                let line = &self.buffer[start..end];
                return line.strip_suffix(b"\r").ok_or_else(|| Fail::nonsense("a line without its end"));
            }
            looked_at = unread.len();
            if looked_at > MAX_LINE_BYTES {
                return Err(Fail::nonsense("a line without end"));
            }
            self.fill(stream, wait, looked_at + 1)?;
        }
    }

    /// Returns the kind of the next reply, and the rest of its first line.
    fn head(&mut self, stream: &mut Stream, wait: Wait) -> Result<(u8, &[u8]), Fail> {
        let line = self.line(stream, wait)?;
        let (&kind, rest) = line.split_first().ok_or_else(|| Fail::nonsense("an empty line"))?;
        Ok((kind, rest))
    }

    /// Reads a reply that is a value of at most `most` bytes, and returns it without a copy. `None`
    /// stands for no value.
    ///
    /// `most` is at most [`MAX_BULK_BYTES`].
    pub(super) fn value(&mut self, stream: &mut Stream, wait: Wait, most: usize) -> Result<Option<&[u8]>, Fail> {
        let len = match self.head(stream, wait)? {
            (b'$', len) => length(len, most.min(MAX_BULK_BYTES))?,
            (b'-', text) => return Err(Fail::Answer(String::from_utf8_lossy(text).into_owned())),
            _ => return Err(Fail::nonsense("something else than a value")),
        };
        let Some(len) = len else { return Ok(None) };
        self.fill(stream, wait, len + 2)?;
        let start = self.unread.start;
        self.unread.start += len + 2;
        Ok(Some(&self.buffer[start..start + len]))
    }

    /// Reads the head of a reply that is a list of `parts` parts. The parts follow.
    pub(super) fn list_of(&mut self, stream: &mut Stream, wait: Wait, parts: usize) -> Result<(), Fail> {
        match self.head(stream, wait)? {
            (b'*', count) if length(count, parts)? == Some(parts) => Ok(()),
            (b'-', text) => Err(Fail::Answer(String::from_utf8_lossy(text).into_owned())),
            _ => Err(Fail::nonsense("something else than a list of the expected length")),
        }
    }

    /// Reads any reply.
    pub(super) fn reply(&mut self, stream: &mut Stream, wait: Wait) -> Result<Reply, Fail> {
        self.part(stream, wait, &mut Budget { parts: MAX_PARTS, bytes: MAX_LIST_BYTES }, MAX_DEPTH)
    }

    fn part(&mut self, stream: &mut Stream, wait: Wait, budget: &mut Budget, depth: usize) -> Result<Reply, Fail> {
        let text = |line: &[u8]| String::from_utf8_lossy(line).into_owned();
        let (kind, rest) = self.head(stream, wait)?;
        let len = match kind {
            b'+' => return Ok(Reply::Status(text(rest))),
            b'-' => return Ok(Reply::Error(text(rest))),
            b':' => {
                let number = str::from_utf8(rest).ok().and_then(|digits| digits.parse().ok());
                return number.map(Reply::Number).ok_or_else(|| Fail::nonsense("a number that is none"));
            }
            b'$' => length(rest, MAX_BULK_BYTES.min(budget.bytes))?,
            b'*' if depth > 0 => length(rest, budget.parts)?,
            _ => return Err(Fail::nonsense("a reply of an unknown kind")),
        };
        let Some(len) = len else { return Ok(Reply::Nothing) };
        if kind == b'$' {
            budget.bytes -= len;
            self.fill(stream, wait, len + 2)?;
            let start = self.unread.start;
            self.unread.start += len + 2;
            return Ok(Reply::Bytes(self.buffer[start..start + len].to_vec()));
        }
        budget.parts -= len;
        let mut parts = Vec::with_capacity(len);
        for _ in 0..len {
            parts.push(self.part(stream, wait, budget, depth - 1)?);
        }
        Ok(Reply::List(parts))
    }
}

/// Reads a length, which is at most `most`. -1 stands for nothing.
fn length(digits: &[u8], most: usize) -> Result<Option<usize>, Fail> {
    if digits == b"-1" {
        return Ok(None);
    }
    let number = str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
    number.filter(|&len| len <= most).map(Some).ok_or_else(|| Fail::nonsense("a length that is none, or too long"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::store::redis::stream;

    /// Lets a reader read what a server sends, which closes the connection then.
    fn read<T>(sent: &[u8], read: impl FnOnce(&mut Reader, &mut Stream, Wait) -> Result<T, Fail>) -> Result<T, Fail> {
        let (mut stream, mut server) = stream::pair();
        let wait = Wait::silence(Duration::from_secs(60));
        std::thread::scope(|scope| {
            scope.spawn(move || {
                // the reader may end before it has read all
                let _ = io::Write::write_all(&mut server, sent);
            });
            let result = read(&mut Reader::new(), &mut stream, wait);
            drop(stream);
            result
        })
    }

    fn reply(sent: &[u8]) -> Result<Reply, Fail> {
        read(sent, |reader, stream, wait| reader.reply(stream, wait))
    }

    fn is_nonsense<T: std::fmt::Debug>(result: &Result<T, Fail>) -> bool {
        matches!(result, Err(Fail::Io { cause, .. }) if cause.kind() == io::ErrorKind::InvalidData)
    }

    #[test]
    fn a_command_is_a_list_of_values() {
        let mut out = Vec::new();
        Command::new("SET").arg("key").number(12).write_to(&mut out);
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$2\r\n12\r\n");
    }

    #[test]
    fn replies_of_every_kind_are_read() {
        assert_eq!(reply(b"+OK\r\n").unwrap(), Reply::Status("OK".into()));
        assert_eq!(reply(b"-ERR no\r\n").unwrap(), Reply::Error("ERR no".into()));
        assert_eq!(reply(b":-7\r\n").unwrap(), Reply::Number(-7));
        assert_eq!(reply(b"$-1\r\n").unwrap(), Reply::Nothing);
        assert_eq!(reply(b"*-1\r\n").unwrap(), Reply::Nothing);
        assert_eq!(reply(b"$4\r\na\r\nb\r\n").unwrap(), Reply::Bytes(b"a\r\nb".to_vec()));
        let nested = Reply::List(vec![Reply::List(vec![]), Reply::Bytes(vec![])]);
        assert_eq!(reply(b"*2\r\n*0\r\n$0\r\n\r\n").unwrap(), nested);
    }

    #[test]
    fn values_that_wrap_around_the_buffer_are_whole() {
        let value = |byte: u8| [&b"$200000\r\n"[..], &vec![byte; 200_000], b"\r\n"].concat();
        let sent: Vec<u8> = (1..=5).flat_map(value).collect();
        let read = read(&sent, |reader, stream, wait| {
            for byte in 1..=5 {
                let value = reader.value(stream, wait, 200_000)?.map(<[u8]>::to_vec);
                assert_eq!(value, Some(vec![byte; 200_000]));
            }
            Ok(())
        });
        read.unwrap();
    }

    #[test]
    fn nothing_is_allocated_by_what_the_server_says() {
        for sent in [
            "$99999999999999\r\n",
            "$-2\r\n",
            "$262145\r\n",
            "*20001\r\n",
            "*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*0\r\n",
            "*2\r\n*20000\r\n",
            ":x\r\n",
            "?\r\n",
            "\r\n",
            "no line\n",
        ] {
            assert!(is_nonsense(&reply(sent.as_bytes())), "{sent:?}");
        }
        assert!(is_nonsense(&reply(&[b'+'; MAX_LINE_BYTES * 3])));
        let too_long = read(b"$11\r\nhello world\r\n", |reader, stream, wait| {
            reader.value(stream, wait, 10).map(|value| value.map(<[u8]>::to_vec))
        });
        assert!(is_nonsense(&too_long));
        let short = reply(b"$5\r\nab");
        assert!(matches!(&short, Err(Fail::Io { cause, .. }) if cause.kind() == io::ErrorKind::UnexpectedEof));
    }

    #[test]
    fn an_error_in_place_of_a_value_is_returned() {
        let result = read(b"-MOVED 7 h:1\r\n", |reader, stream, wait| reader.value(stream, wait, 10).map(|_| ()));
        assert!(matches!(&result, Err(Fail::Answer(text)) if text == "MOVED 7 h:1"), "{result:?}");
    }
}
