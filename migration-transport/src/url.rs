//! Addresses: `tcp:HOST:PORT` and `unix:PATH`.

use std::{fmt, path::PathBuf, str::FromStr};

use thiserror::Error;

/// The longest path in bytes that a Unix socket address can hold (`sun_path` without its final
/// zero).
pub const UNIX_PATH_MAX: usize = 107;

/// The address of a destination in the notation of operators.
///
/// [`Display`](fmt::Display) writes the form that [`FromStr`] parses.
///
/// ```
/// use migration_transport::Address;
///
/// let address: Address = "tcp:[::1]:4444".parse()?;
/// assert_eq!(address, Address::Tcp { host: "::1".into(), port: 4444 });
/// assert_eq!(address.to_string(), "tcp:[::1]:4444");
/// # Ok::<(), migration_transport::AddressError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// `tcp:HOST:PORT`.
    Tcp {
        /// A host name, an IPv4 address, or an IPv6 address (here without brackets).
        host: String,
        /// The port; 0 lets a listener choose a free one.
        port: u16,
    },
    /// `unix:PATH`: a Unix socket in the file system.
    Unix(PathBuf),
}

/// The reason why a text is not an address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddressError {
    /// The text starts neither with `tcp:` nor with `unix:`.
    #[error("{0:?}: an address starts with `tcp:` or `unix:`")]
    UnknownScheme(String),
    /// There is no host before the port.
    #[error("{0:?}: the host is missing (use 0.0.0.0 or [::] to listen on all interfaces)")]
    NoHost(String),
    /// The host has an invalid character, or an IPv6 address is not in brackets.
    #[error("{0:?}: not a host name or address (IPv6 addresses stand in brackets: `tcp:[::1]:4444`)")]
    BadHost(String),
    /// The port is missing or is no number from 0 to 65535.
    #[error("{0:?}: a port number from 0 to 65535 is expected at the end")]
    BadPort(String),
    /// The path is empty.
    #[error("{0:?}: the path is missing")]
    NoPath(String),
    /// The path has a zero byte, or more than [`UNIX_PATH_MAX`] bytes.
    #[error("{0:?}: a socket's path has at most {UNIX_PATH_MAX} bytes and no zero byte")]
    BadPath(String),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let whole = || text.to_owned();
        match text.split_once(':') {
            Some(("tcp", rest)) => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| AddressError::BadPort(whole()))?;
                // `u16::from_str` accepts a plus sign, which is not allowed here
                let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
                let port = port.parse().ok().filter(|_| digits).ok_or_else(|| AddressError::BadPort(whole()))?;
                if host.is_empty() || host == "[]" {
                    return Err(AddressError::NoHost(whole()));
                }
                let host = match host.strip_prefix('[') {
                    Some(inner) => inner.strip_suffix(']').filter(|inner| is_ipv6(inner)),
                    None => Some(host).filter(|host| host.chars().all(is_host_char)),
                };
                let host = host.ok_or_else(|| AddressError::BadHost(whole()))?.to_owned();
                Ok(Self::Tcp { host, port })
            }
            Some(("unix", "")) => Err(AddressError::NoPath(whole())),
            Some(("unix", path)) if path.len() > UNIX_PATH_MAX || path.contains('\0') => {
                Err(AddressError::BadPath(whole()))
            }
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            _ => Err(AddressError::UnknownScheme(whole())),
        }
    }
}

/// Returns whether the text is an IPv6 address, optionally followed by `%` and the interface of a
/// link-local address.
fn is_ipv6(text: &str) -> bool {
    let (address, zone) = text.split_once('%').unwrap_or((text, "0"));
    address.parse::<std::net::Ipv6Addr>().is_ok() && !zone.is_empty() && zone.chars().all(is_host_char)
}

fn is_host_char(c: char) -> bool {
    !c.is_control() && !c.is_whitespace() && !"[]:/?#@%\\".contains(c)
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl From<std::net::SocketAddr> for Address {
    fn from(address: std::net::SocketAddr) -> Self {
        Self::Tcp { host: address.ip().to_string(), port: address.port() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Address, AddressError> {
        text.parse()
    }

    #[test]
    fn good_addresses() {
        for (text, host, port) in [
            ("tcp:host-1.example.org:4444", "host-1.example.org", 4444),
            ("tcp:0.0.0.0:0", "0.0.0.0", 0),
            ("tcp:[::]:65535", "::", 65535),
            ("tcp:[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ] {
            let address = parse(text).unwrap();
            assert_eq!(address, Address::Tcp { host: host.into(), port });
            assert_eq!(address.to_string(), text);
        }
        assert_eq!(parse("unix:/run/a:b c").unwrap(), Address::Unix("/run/a:b c".into()));
        assert_eq!(parse("unix:rel").unwrap().to_string(), "unix:rel");
        assert!(parse(&format!("unix:{}", "x".repeat(UNIX_PATH_MAX))).is_ok());
    }

    #[test]
    fn bad_addresses_say_what_is_wrong() {
        type E = fn(String) -> AddressError;
        let long = format!("unix:{}", "x".repeat(108));
        for (text, error) in [
            ("", AddressError::UnknownScheme as E),
            ("host:44", AddressError::UnknownScheme),
            ("TCP:host:44", AddressError::UnknownScheme),
            ("tcp:", AddressError::BadPort),
            ("tcp:host", AddressError::BadPort),
            ("tcp:host:", AddressError::BadPort),
            ("tcp:host:+1", AddressError::BadPort),
            ("tcp:host:65536", AddressError::BadPort),
            ("tcp::44", AddressError::NoHost),
            ("tcp:[]:44", AddressError::NoHost),
            ("tcp:::1:44", AddressError::BadHost),
            ("tcp:[host]:44", AddressError::BadHost),
            ("tcp:[::1:44", AddressError::BadHost),
            ("tcp:[::1%]:44", AddressError::BadHost),
            ("tcp:a b:44", AddressError::BadHost),
            ("tcp:tcp://h:44", AddressError::BadHost),
            ("unix:", AddressError::NoPath),
            ("unix:a\0b", AddressError::BadPath),
            (&long, AddressError::BadPath),
        ] {
            assert_eq!(parse(text), Err(error(text.into())));
        }
    }

    proptest! {
        #[test]
        fn nothing_panics_and_what_parses_prints_the_same(text in "(tcp:|unix:|)[\\[\\]:a-z0-9%./ ]{0,20}(:[0-9]{1,5})?") {
            if let Ok(address) = parse(&text) {
                prop_assert_eq!(parse(&address.to_string()), Ok(address));
            }
        }

        #[test]
        fn socket_addresses_round_trip(address: std::net::SocketAddr) {
            let address = Address::from(address);
            prop_assert_eq!(parse(&address.to_string()), Ok(address));
        }
    }
}
