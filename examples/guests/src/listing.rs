//! Lists the workloads and their keys for the user.

use crate::{
    check::wanted,
    spec::{COMMON_KEYS, Key, LIST},
};

/// Returns a list of every workload with its keys, followed by the keys that all workloads take.
pub fn listing() -> String {
    let mut text = String::new();
    for info in LIST {
        text.push_str(&format!("{:<12}{}\n", info.name, info.summary));
        info.keys.iter().for_each(|key| text.push_str(&line(key)));
    }
    text.push_str("\nKeys that every workload takes beside its own:\n");
    COMMON_KEYS.iter().for_each(|key| text.push_str(&line(key)));
    text
}

/// Formats a key with its default, its effect and the values that it takes.
fn line(key: &Key) -> String {
    let value = format!("{}={}", key.name, key.default);
    format!("{:<16}{value:<18}{} ({})\n", "", key.summary, wanted(key.kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the lines of each workload and, last, the lines of the keys that all take.
    fn sections(text: &str) -> Vec<(&str, Vec<&str>)> {
        let mut sections: Vec<(&str, Vec<&str>)> = Vec::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            match line.strip_prefix(' ') {
                None => sections.push((line.split_whitespace().next().unwrap_or(""), Vec::new())),
                Some(key) => sections.last_mut().unwrap().1.push(key.trim_start()),
            }
        }
        sections
    }

    #[test]
    fn every_key_is_listed_once_with_its_explanation() {
        let text = listing();
        let sections = sections(&text);
        assert_eq!(sections.len(), LIST.len() + 1);
        let common = ("Keys", COMMON_KEYS);
        let expected = LIST.iter().map(|info| (info.name, info.keys)).chain([common]);
        for ((name, keys), (listed, lines)) in expected.zip(&sections) {
            assert_eq!((name, keys.len()), (*listed, lines.len()), "{text}");
            for (key, line) in keys.iter().zip(lines) {
                assert!(line.starts_with(&format!("{}={}", key.name, key.default)), "{line}");
                assert!(!key.summary.is_empty() && line.contains(key.summary), "{line}");
            }
            let mut names: Vec<_> = keys.iter().map(|key| key.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), keys.len(), "{name} has a key twice");
        }
    }

    /// The guest's programs read exactly the keys that the list shows.
    #[test]
    fn every_key_that_the_guest_reads_is_listed() {
        let sources = [
            include_str!("../guest/spec.rs"),
            include_str!("../guest/main.rs"),
            include_str!("../guest/programs.rs"),
            include_str!("../guest/writers.rs"),
            include_str!("../guest/touches.rs"),
            include_str!("../guest/regions.rs"),
            include_str!("../guest/churn.rs"),
            include_str!("../guest/balloon.rs"),
        ];
        let mut read = Vec::new();
        for source in sources {
            for (at, call) in source.match_indices("value(\"") {
                let name = source[at + call.len()..].split('"').next().unwrap();
                read.push(name);
            }
        }
        assert!(read.len() > 20, "{read:?}");
        let known = |name: &str| LIST.iter().flat_map(|info| info.keys).chain(COMMON_KEYS).any(|key| key.name == name);
        assert!(read.iter().all(|name| known(name)), "{read:?}");
        let every = LIST.iter().flat_map(|info| info.keys).chain(COMMON_KEYS);
        // A helper reads some keys by a name that it is given; the table in the first source
        // contains all names.
        let named = |name: &str| sources[1..].iter().any(|source| source.contains(&format!("\"{name}\"")));
        let unread: Vec<_> = every.map(|key| key.name).filter(|name| !read.contains(name) && !named(name)).collect();
        assert!(unread.is_empty(), "nobody reads {unread:?}");
    }
}
