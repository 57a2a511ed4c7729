//! The limit of a VM's resident memory, and what has to be evicted to keep it.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// The share of a limit by which resident memory is brought below it, so that not every page that
/// comes back causes an eviction: 1/64.
const SLACK: u64 = 64;

/// The limit of a VM's resident memory.
///
/// ```
/// use migration_core::working_set::ResidentLimit;
/// assert_eq!("512M".parse(), Ok(ResidentLimit::Bytes(512 << 20)));
/// assert_eq!("auto".parse(), Ok(ResidentLimit::Auto));
/// assert_eq!(ResidentLimit::Bytes(3 << 30).to_string(), "3G");
/// assert!("-1".parse::<ResidentLimit>().is_err());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResidentLimit {
    /// There is none, and no page is evicted: `off`.
    #[default]
    Off,
    /// So many bytes, above zero.
    Bytes(u64),
    /// The estimate of the working set: `auto`.
    Auto,
}

/// A text that is no [`ResidentLimit`].
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a limit of resident memory; use a size above zero such as 512M or 3G, auto, or off")]
pub struct BadLimit(pub String);

const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl FromStr for ResidentLimit {
    type Err = BadLimit;

    fn from_str(text: &str) -> Result<Self, BadLimit> {
        match text {
            "off" => return Ok(Self::Off),
            "auto" => return Ok(Self::Auto),
            _ => {}
        }
        let unit = UNITS.iter().find(|(unit, _)| text.ends_with([*unit, unit.to_ascii_lowercase()]));
        let (digits, shift) = unit.map_or((text, 0), |&(_, shift)| (&text[..text.len() - 1], shift));
        let number = Some(digits).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        let bytes = number.and_then(|digits| digits.parse::<u64>().ok()?.checked_mul(1 << shift));
        let bytes = bytes.filter(|&bytes| bytes != 0);
        bytes.map(Self::Bytes).ok_or_else(|| BadLimit(text.chars().take(64).collect()))
    }
}

impl fmt::Display for ResidentLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Off => f.write_str("off"),
            Self::Auto => f.write_str("auto"),
            Self::Bytes(bytes) => match UNITS.iter().find(|(_, shift)| bytes != 0 && bytes % (1 << shift) == 0) {
                Some((unit, shift)) => write!(f, "{}{unit}", bytes >> shift),
                None => write!(f, "{bytes}"),
            },
        }
    }
}

/// Decides how much is evicted.
///
/// ```
/// use migration_core::working_set::{LimitPolicy, ResidentLimit};
/// let policy = LimitPolicy { limit: ResidentLimit::Bytes(64 << 20), floor: 16 << 20, most: 4 << 20 };
/// assert_eq!(policy.to_evict(64 << 20, 0), 0);
/// assert_eq!(policy.to_evict((64 << 20) + 4096, 0), (1 << 20) + 4096); // with some slack
/// assert_eq!(policy.to_evict(1 << 30, 0), 4 << 20); // not all at once
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitPolicy {
    /// The limit.
    pub limit: ResidentLimit,
    /// Bytes that stay resident, whatever the limit is: a guest that can keep hardly any page makes
    /// no progress.
    pub floor: u64,
    /// The most bytes that are evicted at one time.
    pub most: u64,
}

impl LimitPolicy {
    /// Returns the limit in bytes if the working set is estimated to have `estimate` bytes; `None`
    /// if there is no limit.
    pub fn bytes(&self, estimate: u64) -> Option<u64> {
        let bytes = match self.limit {
            ResidentLimit::Off => return None,
            ResidentLimit::Bytes(bytes) => bytes,
            ResidentLimit::Auto => estimate,
        };
        Some(bytes.max(self.floor))
    }

    /// Returns how many bytes to evict while `resident` bytes are resident. Nothing is evicted up to
    /// the limit; above it, resident memory is brought to 1/64 below the limit.
    pub fn to_evict(&self, resident: u64, estimate: u64) -> u64 {
        match self.bytes(estimate) {
            Some(limit) if resident > limit => {
                let goal = (limit - limit / SLACK).max(self.floor);
                (resident - goal).min(self.most)
            }
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn limits_read_back() {
        for (text, limit) in [
            ("off", ResidentLimit::Off),
            ("auto", ResidentLimit::Auto),
            ("1", ResidentLimit::Bytes(1)),
            ("5000", ResidentLimit::Bytes(5000)),
            ("512M", ResidentLimit::Bytes(512 * MIB)),
            ("2T", ResidentLimit::Bytes(2 << 40)),
            ("7K", ResidentLimit::Bytes(7 << 10)),
        ] {
            assert_eq!(text.parse(), Ok(limit));
            assert_eq!(limit.to_string(), text);
        }
        assert_eq!("512m".parse(), Ok(ResidentLimit::Bytes(512 * MIB)));
        let long = "9".repeat(100);
        for bad in ["", "0", "0M", "M", "1.5G", "+1", "-1", " 1", "1 M", "16777216T", "1MB", "é", &long] {
            let error = bad.parse::<ResidentLimit>().unwrap_err();
            assert!(error.0.len() <= 64 && error.to_string().contains("auto"), "{bad}");
        }
    }

    #[test]
    fn the_estimate_is_the_limit_only_where_that_is_asked_for() {
        let policy = |limit| LimitPolicy { limit, floor: 2 * MIB, most: u64::MAX };
        let evicted = |limit, estimate| policy(limit).to_evict(100 * MIB, estimate);
        assert_eq!(evicted(ResidentLimit::Off, 0), 0);
        assert_eq!(evicted(ResidentLimit::Auto, 100 * MIB), 0);
        assert_eq!(evicted(ResidentLimit::Auto, 64 * MIB), 37 * MIB);
        assert_eq!(evicted(ResidentLimit::Bytes(64 * MIB), 0), 37 * MIB);
        // the floor holds for both
        assert_eq!(evicted(ResidentLimit::Auto, 0), 98 * MIB);
        assert_eq!(evicted(ResidentLimit::Bytes(1), 0), 98 * MIB);
        assert_eq!(policy(ResidentLimit::Bytes(1)).to_evict(2 * MIB, 0), 0);
        assert_eq!(policy(ResidentLimit::Off).bytes(5), None);
    }
}
