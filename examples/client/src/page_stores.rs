//! Page stores as command lines and requests name them.

use std::{fmt, str::FromStr};

use migration_transport::{Bandwidth, NamedStore};
use serde::{Deserialize, Serialize};

use crate::values::{self, InvalidValue, absolute};

/// A page store as a user writes it, `NAME=URL`: the text, which may contain a password, and the
/// store that the text names.
///
/// ```
/// use minivmm_client::StoreSpec;
/// let spec: StoreSpec = "rack-7=file:/srv/pages".parse()?;
/// assert_eq!(spec.store().name, "rack-7");
/// # Ok::<(), minivmm_client::values::InvalidValue>(())
/// ```
#[derive(Clone, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct StoreSpec {
    text: String,
    store: NamedStore,
}

impl StoreSpec {
    /// Returns the store.
    pub fn store(&self) -> &NamedStore {
        &self.store
    }

    /// Returns the text, for another process.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Returns the same store for another process, whose working directory may differ.
    ///
    /// # Errors
    /// Returns an error if the working directory does not exist any more.
    pub fn absolute(&self) -> Result<Self, InvalidValue> {
        for scheme in ["file:", "redis+unix:"] {
            let Some((name, rest)) = self.text.split_once('=') else { continue };
            let Some(path) = rest.strip_prefix(scheme) else { continue };
            let (path, options) = match path.split_once('?').filter(|_| scheme != "file:") {
                Some((path, options)) => (path, format!("?{options}")),
                None => (path, String::new()),
            };
            return format!("{name}={scheme}{}{options}", absolute(path)?.display()).parse();
        }
        Ok(self.clone())
    }
}

impl FromStr for StoreSpec {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        // the error does not show the text, which may contain a password
        let store = text.parse().map_err(|error| InvalidValue::new(format!("a page store: {error}")))?;
        Ok(Self { text: text.to_owned(), store })
    }
}

impl PartialEq for StoreSpec {
    fn eq(&self, other: &Self) -> bool {
        self.store == other.store
    }
}

/// Leaves out the text, which may contain a password.
impl fmt::Debug for StoreSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

impl TryFrom<String> for StoreSpec {
    type Error = InvalidValue;

    fn try_from(text: String) -> Result<Self, InvalidValue> {
        text.parse()
    }
}

impl From<StoreSpec> for String {
    fn from(spec: StoreSpec) -> Self {
        spec.text
    }
}

/// The options of a migration for page stores.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct PageStoreOptions {
    /// Stores in addition to those that the server was started with.
    pub stores: Vec<StoreSpec>,
    /// The names of the stores through which pages go. All stores are used if none is named.
    pub through: Vec<String>,
    /// The most bandwidth with which the destination reads from stores ahead of the guest.
    #[serde(rename = "gather_rate_bits", with = "values::bits")]
    pub gather_rate: Bandwidth,
}

impl Default for PageStoreOptions {
    fn default() -> Self {
        Self { stores: Vec::new(), through: Vec::new(), gather_rate: Bandwidth::UNLIMITED }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Result<StoreSpec, InvalidValue> {
        text.parse()
    }

    #[test]
    fn paths_are_made_absolute() {
        let here = std::env::current_dir().unwrap();
        let absolute = |text: &str| spec(text).unwrap().absolute().unwrap().text().to_owned();
        assert_eq!(absolute("rack-7=file:pages?=2"), format!("rack-7=file:{}/pages?=2", here.display()));
        assert_eq!(absolute("a=file:/srv"), "a=file:/srv");
        assert_eq!(absolute("a=memory:"), "a=memory:");
        for bad in ["", "rack-7", "file:/srv", "=file:/srv", "a b=file:/srv", "a=", "a=file:", "a=nfs:/srv"] {
            assert!(spec(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_store_is_sent_as_its_text() {
        let store = spec("rack-7=file:/srv").unwrap();
        assert_eq!(serde_json::to_string(&store).unwrap(), "\"rack-7=file:/srv\"");
        assert_eq!(serde_json::from_str::<StoreSpec>("\"rack-7=file:/srv\"").unwrap(), store);
        let error = spec("redis://:secret@10.0.0.7:6379/0").unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    #[test]
    fn options_that_a_client_does_not_send_are_off() {
        assert_eq!(serde_json::from_str::<PageStoreOptions>("{}").unwrap(), PageStoreOptions::default());
    }
}
