use std::{fmt, str::FromStr};

use thiserror::Error;

use super::{Bubbling, DEFAULT_PIVOTS, Direction, HotFirst, Linear, MultiPivot, PushOrder, Random};

/// The largest number of pivots that users can choose. More pivots than the guest has threads that
/// read in different places only distribute the push over more places.
pub const MAX_PIVOTS: usize = 1024;

/// The orders that can be chosen by name, with their options. [`FromStr`] and
/// [`Display`](fmt::Display) are each other's inverse.
///
/// ```
/// use migration_core::strategy::push_order::{Direction, KnownOrder, parse};
///
/// let order = "multi-pivot:k=5,dir=forward".parse();
/// assert_eq!(order, Ok(KnownOrder::MultiPivot { k: 5, direction: Direction::Forward }));
/// assert_eq!(KnownOrder::default().to_string(), "multi-pivot:k=7,dir=dual");
/// assert_eq!(parse("random:seed=42").unwrap().name(), "random");
/// assert_eq!(
///     parse("random:sed=42").err().unwrap().to_string(),
///     "push order 'random:sed=42': it has no option 'sed'; there are linear, bubbling, \
///      multi-pivot[:k=1..1024,dir=dual|forward|backward], hot-first, random[:seed=N]"
/// );
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KnownOrder {
    /// [`Linear`].
    Linear,
    /// [`Bubbling`].
    Bubbling,
    /// [`MultiPivot`].
    MultiPivot {
        /// The number of the last pivots that are kept.
        k: usize,
        /// The directions in which their bubbles grow.
        direction: Direction,
    },
    /// [`HotFirst`].
    HotFirst,
    /// [`Random`].
    Random {
        /// The seed, which alone determines the order.
        seed: u64,
    },
}

impl KnownOrder {
    /// Returns a new order of this kind.
    pub fn build(self) -> Box<dyn PushOrder> {
        match self {
            Self::Linear => Box::new(Linear::default()),
            Self::Bubbling => Box::new(Bubbling::default()),
            Self::MultiPivot { k, direction } => Box::new(MultiPivot::new(k, direction)),
            Self::HotFirst => Box::new(HotFirst::default()),
            Self::Random { seed } => Box::new(Random::new(seed)),
        }
    }
}

/// Returns [`MultiPivot`], the best order of the papers.
impl Default for KnownOrder {
    fn default() -> Self {
        Self::MultiPivot { k: DEFAULT_PIVOTS, direction: Direction::Dual }
    }
}

/// Returns the order that users write as `text`; see [`KnownOrder`].
///
/// # Errors
/// Returns an error if there is no such order. The error lists the orders that there are.
pub fn parse(text: &str) -> Result<Box<dyn PushOrder>, UnknownOrder> {
    text.parse().map(KnownOrder::build)
}

/// The error that there is no such order, or that it has no such option.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "push order '{text}': {why}; there are linear, bubbling, \
     multi-pivot[:k=1..{MAX_PIVOTS},dir=dual|forward|backward], hot-first, random[:seed=N]"
)]
pub struct UnknownOrder {
    /// The text that the user wrote.
    pub text: String,
    /// What is wrong with the text.
    pub why: String,
}

impl FromStr for KnownOrder {
    type Err = UnknownOrder;

    fn from_str(text: &str) -> Result<Self, UnknownOrder> {
        let wrong = |why: String| UnknownOrder { text: text.to_owned(), why };
        let (name, options) = text.split_once(':').unwrap_or((text, ""));
        let mut order = match name {
            "linear" => Self::Linear,
            "bubbling" => Self::Bubbling,
            "multi-pivot" => Self::default(),
            "hot-first" => Self::HotFirst,
            "random" => Self::Random { seed: 0 },
            _ => return Err(wrong("no order has this name".to_owned())),
        };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            let done = match (&mut order, key) {
                (Self::MultiPivot { k, .. }, "k") => {
                    set(k, value.parse().ok().filter(|k| (1..=MAX_PIVOTS).contains(k)))
                }
                (Self::MultiPivot { direction, .. }, "dir") => set(direction, direction_of(value)),
                (Self::Random { seed }, "seed") => set(seed, value.parse().ok()),
                _ => return Err(wrong(format!("it has no option '{key}'"))),
            };
            done.ok_or_else(|| wrong(format!("'{value}' is no value for '{key}'")))?;
        }
        Ok(order)
    }
}

fn set<T>(place: &mut T, value: Option<T>) -> Option<()> {
    *place = value?;
    Some(())
}

fn direction_of(text: &str) -> Option<Direction> {
    [Direction::Dual, Direction::Forward, Direction::Backward].into_iter().find(|d| d.to_string() == text)
}

impl fmt::Display for KnownOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linear => f.write_str("linear"),
            Self::Bubbling => f.write_str("bubbling"),
            Self::MultiPivot { k, direction } => write!(f, "multi-pivot:k={k},dir={direction}"),
            Self::HotFirst => f.write_str("hot-first"),
            Self::Random { seed } => write!(f, "random:seed={seed}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_read() {
        let direction = Direction::Backward;
        for order in [
            KnownOrder::Linear,
            KnownOrder::Bubbling,
            KnownOrder::MultiPivot { k: 3, direction },
            KnownOrder::HotFirst,
            KnownOrder::Random { seed: u64::MAX },
        ] {
            let text = order.to_string();
            assert_eq!(text.parse(), Ok(order), "{text}");
            assert!(text.starts_with(order.build().name()), "{text}");
        }
        assert_eq!("multi-pivot".parse(), Ok(KnownOrder::default()));
    }

    #[test]
    fn nonsense_is_refused_with_what_there_is() {
        for text in [
            "",
            "lru",
            "linear:k=7",
            "multi-pivot:k=0",
            "multi-pivot:k=1025",
            "multi-pivot:dir=up",
            "multi-pivot:k",
            "random:seed=-1",
        ] {
            let error = parse(text).err().expect(text).to_string();
            assert!(error.contains("linear, bubbling") && error.contains("seed=N"), "{error}");
        }
    }
}
