//! Bandwidths in the notation of operators.

use std::{fmt, str::FromStr, time::Duration};

use thiserror::Error;

/// A bandwidth, or no limit ([`UNLIMITED`](Self::UNLIMITED)).
///
/// It is parsed from a number with a unit: `bit`, `kbit`, `Mbit`, `Gbit` or `Tbit` (powers of 1000,
/// in bits) or `B`, `kB`, `MB`, `GB`, `KiB`, `MiB`, `GiB` (in bytes), each with or without `/s`.
/// `0` and `unlimited` mean no limit. [`Display`](fmt::Display) writes bits per second, in a form
/// that parses to the same bandwidth.
///
/// ```
/// use migration_transport::Bandwidth;
///
/// let limit: Bandwidth = "100MB/s".parse()?;
/// assert_eq!(limit, Bandwidth::from_bits_per_second(800_000_000));
/// assert_eq!(limit.to_string(), "800Mbit/s");
/// # Ok::<(), migration_transport::BandwidthError>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// The bandwidth in bits per second; 0 is no limit.
    bits: u64,
}

/// The reason why a text is not a bandwidth.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BandwidthError {
    /// The text does not start with a number such as `10` or `2.5`.
    #[error("{0:?}: a bandwidth starts with a number, as in `10Gbit` or `100MB/s`")]
    BadNumber(String),
    /// The unit is missing or unknown.
    #[error(
        "{0:?}: the unit is one of bit, kbit, Mbit, Gbit, Tbit, B, kB, MB, GB, KiB, MiB, GiB, with or without `/s`"
    )]
    BadUnit(String),
    /// The bandwidth is above 2^64 bits per second, or below one bit per second and not zero.
    #[error("{0:?}: out of range")]
    OutOfRange(String),
}

impl Bandwidth {
    /// No limit.
    pub const UNLIMITED: Self = Self { bits: 0 };

    /// Makes a bandwidth of `bits` bits per second; 0 is no limit.
    pub const fn from_bits_per_second(bits: u64) -> Self {
        Self { bits }
    }

    /// Makes a bandwidth of `bytes` bytes per second; 0 is no limit. Saturates at 2^64 bits per
    /// second.
    pub const fn from_bytes_per_second(bytes: u64) -> Self {
        Self { bits: bytes.saturating_mul(8) }
    }

    /// Returns the bandwidth in bits per second, or `None` if there is no limit.
    pub const fn bits_per_second(self) -> Option<u64> {
        if self.bits == 0 { None } else { Some(self.bits) }
    }

    /// Returns the bandwidth in bytes per second, or `None` if there is no limit.
    pub fn bytes_per_second(self) -> Option<f64> {
        self.bits_per_second().map(|bits| bits as f64 / 8.0)
    }

    /// Returns the time that `bytes` bytes take; zero if there is no limit.
    pub fn time_for(self, bytes: u64) -> Duration {
        match self.bytes_per_second() {
            None => Duration::ZERO,
            Some(rate) => Duration::try_from_secs_f64(bytes as f64 / rate).unwrap_or(Duration::MAX),
        }
    }
}

impl FromStr for Bandwidth {
    type Err = BandwidthError;

    fn from_str(text: &str) -> Result<Self, BandwidthError> {
        let trimmed = text.trim();
        if trimmed == "0" || trimmed == "unlimited" {
            return Ok(Self::UNLIMITED);
        }
        let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(end);
        let unit = unit.trim_start();
        let bad_number = || BandwidthError::BadNumber(text.into());
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        if whole.is_empty() || fraction.is_empty() || fraction.contains('.') {
            return Err(bad_number());
        }
        let scale: u128 = match unit.strip_suffix("/s").unwrap_or(unit) {
            "bit" => 1,
            "kbit" => 1_000,
            "Mbit" => 1_000_000,
            "Gbit" => 1_000_000_000,
            "Tbit" => 1_000_000_000_000,
            "B" => 8,
            "kB" => 8_000,
            "MB" => 8_000_000,
            "GB" => 8_000_000_000,
            "KiB" => 8 << 10,
            "MiB" => 8 << 20,
            "GiB" => 8 << 30,
            _ => return Err(BandwidthError::BadUnit(text.into())),
        };
        let out_of_range = || BandwidthError::OutOfRange(text.into());
        let whole: u64 = whole.parse().map_err(|_| out_of_range())?;
        // digits after the twelfth change less than a bit per second
        let digits = &fraction[..fraction.len().min(12)];
        let fraction: u64 = digits.parse().map_err(|_| bad_number())?;
        let bits = u128::from(whole) * scale + u128::from(fraction) * scale / 10u128.pow(digits.len() as u32);
        let bits = u64::try_from(bits).map_err(|_| out_of_range())?;
        // a tiny bandwidth must not become no limit
        if bits == 0 && (whole, fraction) != (0, 0) { Err(out_of_range()) } else { Ok(Self { bits }) }
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.bits == 0 {
            return f.write_str("unlimited");
        }
        // in the largest unit that the bandwidth reaches, with all its digits
        for (scale, digits, unit) in [(1_000_000_000, 9, "Gbit"), (1_000_000, 6, "Mbit"), (1_000, 3, "kbit")] {
            if self.bits >= scale {
                let fraction = format!("{:0digits$}", self.bits % scale);
                let fraction = fraction.trim_end_matches('0');
                let dot = if fraction.is_empty() { "" } else { "." };
                return write!(f, "{}{dot}{fraction}{unit}/s", self.bits / scale);
            }
        }
        write!(f, "{}bit/s", self.bits)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn good_bandwidths() {
        for (text, bits, shown) in [
            ("10Gbit", 10_000_000_000, "10Gbit/s"),
            ("1Gbit/s", 1_000_000_000, "1Gbit/s"),
            ("500Mbit", 500_000_000, "500Mbit/s"),
            ("2.5 Gbit", 2_500_000_000, "2.5Gbit/s"),
            ("100MB/s", 800_000_000, "800Mbit/s"),
            ("1MiB", 8_388_608, "8.388608Mbit/s"),
            ("7kbit", 7_000, "7kbit/s"),
            ("3Tbit", 3_000_000_000_000, "3000Gbit/s"),
            ("2B", 16, "16bit/s"),
            ("2kB/s", 16_000, "16kbit/s"),
            ("5GB", 40_000_000_000, "40Gbit/s"),
            ("1KiB", 8_192, "8.192kbit/s"),
            ("1GiB/s", 8_589_934_592, "8.589934592Gbit/s"),
            ("0.25kbit", 250, "250bit/s"),
            ("1.000000000001Tbit", 1_000_000_000_001, "1000.000000001Gbit/s"),
            ("1.99999999999999999999bit", 1, "1bit/s"),
            ("0.0bit", 0, "unlimited"),
            ("999bit", 999, "999bit/s"),
            ("1000bit", 1_000, "1kbit/s"),
            ("999999bit", 999_999, "999.999kbit/s"),
            ("1000000bit", 1_000_000, "1Mbit/s"),
            ("1000000000bit", 1_000_000_000, "1Gbit/s"),
            ("1bit/s", 1, "1bit/s"),
            ("0", 0, "unlimited"),
            ("unlimited", 0, "unlimited"),
            ("0Gbit", 0, "unlimited"),
        ] {
            let bandwidth: Bandwidth = text.parse().unwrap();
            assert_eq!(bandwidth, Bandwidth::from_bits_per_second(bits), "{text}");
            assert_eq!(bandwidth.to_string(), shown);
        }
    }

    #[test]
    fn bad_bandwidths_say_what_is_wrong() {
        type E = fn(String) -> BandwidthError;
        for (text, error) in [
            ("", BandwidthError::BadNumber as E),
            ("Gbit", BandwidthError::BadNumber),
            ("-1Gbit", BandwidthError::BadNumber),
            ("1.Gbit", BandwidthError::BadNumber),
            ("1.2.3Gbit", BandwidthError::BadNumber),
            ("1.123456789012.5Gbit", BandwidthError::BadNumber),
            (".5Gbit", BandwidthError::BadNumber),
            ("10", BandwidthError::BadUnit),
            ("10Gb", BandwidthError::BadUnit),
            ("10mbit", BandwidthError::BadUnit),
            ("10Gbit/h", BandwidthError::BadUnit),
            ("99999999999Gbit", BandwidthError::OutOfRange),
            ("999999999999999999999bit", BandwidthError::OutOfRange),
            ("0.5bit", BandwidthError::OutOfRange),
        ] {
            assert_eq!(text.parse::<Bandwidth>(), Err(error(text.into())));
        }
    }

    #[test]
    fn times() {
        let megabyte = Bandwidth::from_bytes_per_second(1_000_000);
        assert_eq!((megabyte.bits_per_second(), megabyte.bytes_per_second()), (Some(8_000_000), Some(1e6)));
        assert_eq!((Bandwidth::UNLIMITED.bits_per_second(), Bandwidth::UNLIMITED.bytes_per_second()), (None, None));
        assert_eq!(megabyte.time_for(500_000), Duration::from_millis(500));
        assert_eq!(Bandwidth::UNLIMITED.time_for(u64::MAX), Duration::ZERO);
        assert!(Bandwidth::from_bits_per_second(1).time_for(u64::MAX) > Duration::from_secs(1 << 60));
    }

    proptest! {
        #[test]
        fn display_reads_back(bits: u64) {
            let bandwidth = Bandwidth::from_bits_per_second(bits);
            prop_assert_eq!(bandwidth.to_string().parse(), Ok(bandwidth));
        }

        #[test]
        fn nothing_panics(text in "[0-9.]{0,25} ?[a-zA-Z/]{0,8}|.*") {
            let _ = text.parse::<Bandwidth>();
        }
    }
}
