//! What listens at an address where a migration destination was expected.

use crate::wire::{MAGIC, SEALED_MAGIC};

/// Most characters of a stranger's words that are shown.
const MAX_SHOWN: usize = 64;
/// Bytes of a stranger's words that are worth reading: what is shown is at most so long.
pub const FOREIGN_BYTES: usize = 64;

/// Says in words what answered with these bytes in place of a migration destination. What it said
/// is shown in part, with all that is not printable escaped.
///
/// ```
/// use migration_core::describe_foreign_peer;
///
/// let what = describe_foreign_peer(b"HTTP/1.1 400 Bad Request\r\n");
/// assert_eq!(what, r#"it answers as an HTTP server does: "HTTP/1.1 400 Bad Request""#);
/// ```
pub fn describe_foreign_peer(said: &[u8]) -> String {
    let line = said.split(|&byte| byte == b'\r' || byte == b'\n').next().unwrap_or(said);
    let quoted = |bytes: &[u8]| {
        let escaped: String = String::from_utf8_lossy(bytes).escape_debug().take(MAX_SHOWN).collect();
        format!("\"{escaped}\"")
    };
    match said {
        [] => "it says nothing".into(),
        _ if said.starts_with(b"HTTP/") => format!("it answers as an HTTP server does: {}", quoted(line)),
        _ if said.starts_with(b"SSH-") => format!("it answers as an SSH server does: {}", quoted(line)),
        _ if [MAGIC, SEALED_MAGIC].iter().any(|magic| said.starts_with(magic)) => {
            "it sends back what it receives, as an echo server does".into()
        }
        // a record of TLS: an alert or a handshake, of version 3.x
        [0x15 | 0x16, 3, ..] => "it answers as a TLS server does".into(),
        _ if line.is_empty() => format!("it says {}", quoted(said)),
        _ => format!("it says {}", quoted(line)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn well_known_servers_are_named() {
        for (said, named) in [
            (&b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"[..], "as an SSH server does: \"SSH-2.0-OpenSSH_9.2p1 Debian-2\""),
            (b"LIVEMIGR\x01\0\x01\0", "as an echo server does"),
            (b"LIVESEAL", "as an echo server does"),
            (b"\x15\x03\x01\x00\x02\x02\x46", "as a TLS server does"),
            (b"220 mail \x1b[31mESMTP\r\n", r#"it says "220 mail \u{1b}[31mESMTP""#),
            (b"\r\n\r\n", r#"it says "\r\n\r\n""#),
            (b"", "it says nothing"),
        ] {
            let what = describe_foreign_peer(said);
            assert!(what.ends_with(named), "{what}");
        }
    }

    proptest! {
        #[test]
        fn whatever_it_says_is_shown_in_printable_characters_and_in_part(said: Vec<u8>) {
            let what = describe_foreign_peer(&said);
            prop_assert!(what.chars().count() < 120 && !what.chars().any(char::is_control), "{what:?}");
        }
    }
}
