//! Values as command lines and requests write them.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use migration_core::vm::VmId;
use migration_transport::Address;
use thiserror::Error;

use crate::Protect;

/// The error for a text that is not a valid value. The error says what a valid value is.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct InvalidValue(String);

impl InvalidValue {
    pub(crate) fn new(why: String) -> Self {
        Self(why)
    }
}

/// Returns the text, for programs whose errors are texts.
impl From<InvalidValue> for String {
    fn from(error: InvalidValue) -> Self {
        error.0
    }
}

fn invalid<T>(why: String) -> Result<T, InvalidValue> {
    Err(InvalidValue(why))
}

/// Returns the path of a Unix socket that is written as `unix:PATH`. The path is absolute, because
/// processes have different working directories.
///
/// # Errors
/// Returns an error if the text is something else.
pub fn unix_path(text: &str) -> Result<PathBuf, InvalidValue> {
    match text.parse() {
        Ok(Address::Unix(path)) => absolute(path),
        Ok(Address::Tcp { .. }) => invalid(format!("{text}: memory passes through unix:PATH only")),
        Err(error) => invalid(error.to_string()),
    }
}

/// Returns the absolute path, for another process, whose working directory may differ.
///
/// # Errors
/// Returns an error if the path is empty, or if the working directory does not exist any more.
pub fn absolute(path: impl AsRef<Path>) -> Result<PathBuf, InvalidValue> {
    let path = path.as_ref();
    std::path::absolute(path).or_else(|e| invalid(format!("{}: {e}", path.display())))
}

/// Returns the address with an absolute path, for another process, whose working directory may
/// differ.
///
/// # Errors
/// Returns an error if the absolute path is too long for a socket.
pub fn absolute_address(address: &Address) -> Result<Address, InvalidValue> {
    match address {
        Address::Tcp { .. } => Ok(address.clone()),
        // the address is parsed again, because it may have become too long for a socket
        Address::Unix(path) => {
            let absolute = Address::Unix(absolute(path)?).to_string();
            absolute.parse().or_else(|e| invalid(format!("{address}: {e}")))
        }
    }
}

/// Returns a VM's ID from the 32 hexadecimal digits that `status` and `broker --list` show.
///
/// # Errors
/// Returns an error if the text is something else.
pub fn vm_id(text: &str) -> Result<VmId, InvalidValue> {
    let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    match u128::from_str_radix(text, 16).ok().filter(|_| digits) {
        Some(id) => Ok(VmId(id.to_be_bytes())),
        None => invalid(format!("{text}: a VM is named by 32 hexadecimal digits")),
    }
}

/// Returns the number of bytes of a size: a number with K, M, G or T (binary).
///
/// # Errors
/// Returns an error if the text is something else, zero, or above `u64`.
pub fn size(text: &str) -> Result<u64, InvalidValue> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let shift = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        _ => return invalid(format!("{text}: a size is a number with K, M, G or T")),
    };
    let number: u64 = digits.parse().or_else(|_| invalid(format!("{text}: not a size")))?;
    match number.checked_mul(1 << shift).filter(|&n| n > 0) {
        Some(bytes) => Ok(bytes),
        None => invalid(format!("{text}: zero, or too large")),
    }
}

/// Returns a number that is written as decimal or 0x….
///
/// # Errors
/// Returns an error if the text is something else.
pub fn number(text: &str) -> Result<u64, InvalidValue> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.or_else(|e| invalid(format!("{text}: {e}")))
}

/// Returns a time that is written as a number with us, ms, s, m or h. A number alone is seconds.
///
/// # Errors
/// Returns an error if the text is something else.
pub fn duration(text: &str) -> Result<Duration, InvalidValue> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len()));
    let number: f64 = digits.parse().or_else(|_| invalid(format!("{text}: not a duration")))?;
    let seconds = match unit {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "s" | "" => number,
        "m" | "min" => number * 60.0,
        "h" => number * 3600.0,
        _ => return invalid(format!("{text}: a duration is a number with us, ms, s, m or h")),
    };
    Duration::try_from_secs_f64(seconds).or_else(|e| invalid(format!("{text}: {e}")))
}

/// Returns a time in whole microseconds, at most `u64::MAX`.
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The protection, or `None` for no protection. (The type has a name because clap takes a field of
/// type `Option` for an option that may be left out.)
pub(crate) type FailSafe = Option<Protect>;

/// Returns the protection of a VM: `none|reverse|forward|both[:interval=100ms,detect=1s,dir=D]`.
///
/// # Errors
/// Returns an error if the text is something else, or forward checkpoints have no folder.
pub fn fail_safe(text: &str) -> Result<Option<Protect>, InvalidValue> {
    let (name, options) = text.split_once(':').unwrap_or((text, ""));
    let (reverse, forward) = match name {
        "none" if options.is_empty() => return Ok(None),
        "reverse" => (true, false),
        "forward" => (false, true),
        "both" => (true, true),
        _ => {
            return invalid(format!(
                "{text}: none, reverse, forward or both, with [:interval=100ms,detect=1s,dir=D], is meant"
            ));
        }
    };
    let mut protect = Protect { reverse, forward, interval_us: 100_000, detect_us: 1_000_000, dir: None };
    for option in options.split(',').filter(|o| !o.is_empty()) {
        let Some((key, value)) = option.split_once('=') else {
            return invalid(format!("{option}: KEY=VALUE is meant"));
        };
        let time = || match micros(duration(value)?) {
            us @ 1..=3_600_000_000 => Ok(us),
            _ => invalid(format!("{option}: between 1us and 1h")),
        };
        match key {
            "interval" => protect.interval_us = time()?,
            "detect" => protect.detect_us = time()?,
            // the server uses the folder, and its working directory may differ
            "dir" => protect.dir = Some(absolute(value)?),
            _ => return invalid(format!("{key}: interval, detect and dir are known")),
        }
    }
    if protect.forward && protect.dir.is_none() {
        return invalid(format!(
            "{text}: a forward checkpoint needs dir=D, a folder that the destination has as --checkpoints D"
        ));
    }
    Ok(Some(protect))
}

/// Encodes a bandwidth in bits per second; 0 for no limit.
pub(crate) mod bits {
    use migration_transport::Bandwidth;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bandwidth: &Bandwidth, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(bandwidth.bits_per_second().unwrap_or(0))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Bandwidth, D::Error> {
        u64::deserialize(from).map(Bandwidth::from_bits_per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protection() {
        assert_eq!(fail_safe("none"), Ok(None));
        let reverse = Protect { reverse: true, forward: false, interval_us: 100_000, detect_us: 1_000_000, dir: None };
        assert_eq!(fail_safe("reverse"), Ok(Some(reverse.clone())));
        let given = fail_safe("both:interval=20ms,detect=300ms,dir=/d");
        let both =
            Protect { forward: true, interval_us: 20_000, detect_us: 300_000, dir: Some("/d".into()), ..reverse };
        assert_eq!(given, Ok(Some(both)));
        for bad in [
            "",
            "none:interval=1s",
            "sideways",
            "reverse:interval",
            "reverse:interval=0",
            "reverse:often=1s",
            "forward",
        ] {
            assert!(fail_safe(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn units() {
        assert_eq!(size("1G"), Ok(1 << 30));
        assert_eq!(size("512MiB"), Ok(512 << 20));
        assert_eq!(size("4096"), Ok(4096));
        assert!(size("0").is_err() && size("").is_err() && size("1X").is_err() && size("99999999999T").is_err());
        assert_eq!(duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert!(duration("-1s").is_err() && duration("5 parsecs").is_err());
        assert_eq!(number("0x100000"), Ok(1 << 20));
        assert!(number("zz").is_err());
        assert_eq!(vm_id("0102030405060708090a0b0c0d0e0f10").map(|VmId(id)| id[15]), Ok(16));
        assert!(vm_id("+102030405060708090a0b0c0d0e0f10").is_err() && vm_id("12").is_err());
        assert_eq!(unix_path("unix:/b"), Ok("/b".into()));
        let here = std::env::current_dir().unwrap();
        let address = |text: &str| absolute_address(&text.parse().unwrap());
        assert_eq!(address("unix:sock"), Ok(Address::Unix(here.join("sock"))));
        assert_eq!(address("unix:/b"), Ok(Address::Unix("/b".into())));
        assert_eq!(address("tcp:h:1").unwrap().to_string(), "tcp:h:1");
        // the path as the person wrote it was short enough
        assert!(address(&format!("unix:{}", "x".repeat(107))).unwrap_err().to_string().contains("at most 107 bytes"));
        assert!(unix_path("tcp:h:1").is_err() && unix_path("/b").is_err());
    }
}
