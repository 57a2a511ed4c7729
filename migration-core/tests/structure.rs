//! How the source is cut: no circle between the modules of a crate, no large file, no long
//! function.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Bytes of the largest source file. More is too much to read at one go.
const MAX_BYTES: u64 = 35 << 10;
/// Lines of the longest function.
const MAX_LINES: usize = 100;
/// The library crates. The folder of a packaged crate has no other crate beside it.
const CRATES: [&str; 4] = ["migration-core", "migration-kvm", "migration-transport", "migration-crypto"];

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Adds the Rust files below a folder.
fn rust_files(folder: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            let built = path.file_name().is_some_and(|name| name == "target" || name == ".git");
            if !built {
                rust_files(&path, into);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// Returns the Rust files of the crates, the examples and the fuzz targets.
fn all_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for folder in CRATES.iter().chain(&["examples", "fuzz"]) {
        rust_files(&project().join(folder), &mut files);
    }
    files
}

/// Returns the source without comments and without the module of unit tests at its end.
fn code(source: &str) -> String {
    let end = source.find("#[cfg(test)]\nmod tests {").unwrap_or(source.len());
    let lines = source[..end].lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// Adds the paths that a tree of a `use` names, such as `a::{b, c::d}`.
fn expand(prefix: &str, tree: &str, into: &mut Vec<String>) {
    let Some((before, inner)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default().trim();
        if !path.is_empty() {
            into.push(format!("{prefix}{path}"));
        }
        return;
    };
    let inner = inner.rsplit_once('}').map_or(inner, |(inner, _)| inner);
    let prefix = format!("{prefix}{}", before.trim());
    let (mut depth, mut start) = (0, 0);
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&prefix, &inner[start..at], into);
                start = at + 1;
            }
            _ => {}
        }
    }
    expand(&prefix, &inner[start..], into);
}

/// Returns the paths that all `use` items name, and those that begin with `crate::` elsewhere.
fn paths(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut item = String::new();
    for line in code.lines().map(str::trim) {
        let begins = line.strip_prefix("use ").or_else(|| {
            let (visibility, tree) = line.split_once(" use ")?;
            visibility.starts_with("pub").then_some(tree)
        });
        match begins {
            Some(tree) => item = tree.to_owned(),
            None if !item.is_empty() => item += line,
            None => continue,
        }
        if let Some(tree) = item.strip_suffix(';') {
            expand("", tree, &mut found);
            item.clear();
        }
    }
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at..];
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':').unwrap_or(rest.len());
        found.push(rest[..end].trim_end_matches(':').to_owned());
    }
    found
}

/// The top-level modules of a crate.
struct Crate {
    modules: BTreeSet<String>,
    /// What the crate's root re-exports, and from which of its names.
    exported: BTreeMap<String, String>,
    /// For each module the modules that it names, and where.
    uses: BTreeMap<String, BTreeMap<String, String>>,
}

impl Crate {
    fn read(name: &str) -> Option<Self> {
        let src = project().join(name).join("src");
        let root = code(&fs::read_to_string(src.join("lib.rs")).ok()?);
        let declared = |line: &str| Some(line.trim().strip_suffix(';')?.rsplit_once("mod ")?.1.to_owned());
        let exported = paths(&root).into_iter().filter_map(|path| {
            let (from, name) = (path.split("::").next()?, path.rsplit("::").next()?);
            (from != "crate" && from != name).then(|| (name.to_owned(), from.to_owned()))
        });
        let mut this = Self {
            modules: root.lines().filter_map(declared).collect(),
            exported: exported.collect(),
            uses: BTreeMap::new(),
        };
        let mut files = Vec::new();
        rust_files(&src, &mut files);
        for file in files {
            let relative = file.strip_prefix(&src).unwrap().with_extension("");
            let mut path: Vec<&str> = relative.iter().map(|part| part.to_str().unwrap()).collect();
            path.retain(|part| *part != "mod");
            if path != ["lib"] && !path.iter().any(|part| part.ends_with("tests")) {
                this.read_module(&path, &code(&fs::read_to_string(&file).unwrap()));
            }
        }
        Some(this)
    }

    fn read_module(&mut self, path: &[&str], code: &str) {
        let own = path[0];
        for named in paths(code) {
            let mut parts = named.split("::").map(str::trim).peekable();
            let mut base: Vec<&str> = match parts.peek() {
                Some(&"crate") => {
                    parts.next();
                    Vec::new()
                }
                Some(&"super") => path.to_vec(),
                _ => continue,
            };
            while parts.next_if_eq(&"super").is_some() {
                base.pop();
            }
            let Some(top) = base.first().copied().or_else(|| parts.next()) else { continue };
            let Some(module) = self.module_of(top) else { continue };
            if module != own {
                let at = format!("{} names {named}", path.join("/"));
                self.uses.entry(own.to_owned()).or_default().entry(module).or_insert(at);
            }
        }
    }

    /// Returns the module that has what the root calls by this name.
    fn module_of(&self, name: &str) -> Option<String> {
        let mut name = name;
        // a re-export of a re-export is the most there is
        for _ in 0..3 {
            if self.modules.contains(name) {
                return Some(name.to_owned());
            }
            name = self.exported.get(name)?;
        }
        None
    }

    /// Returns a way from a module back to itself.
    fn circle(&self, start: &str) -> Option<Vec<String>> {
        let mut ways = vec![vec![(start.to_owned(), String::new())]];
        let mut seen = BTreeSet::new();
        while let Some(way) = ways.pop() {
            let (last, _) = way.last()?;
            for (next, at) in self.uses.get(last).into_iter().flatten() {
                let longer = [&way[..], &[(next.clone(), at.clone())]].concat();
                if next == start {
                    return Some(longer.into_iter().skip(1).map(|(_, at)| at).collect());
                }
                if seen.insert(next.clone()) {
                    ways.push(longer);
                }
            }
        }
        None
    }
}

#[test]
fn modules_of_a_crate_do_not_name_each_other_in_a_circle() {
    for name in CRATES {
        let Some(this) = Crate::read(name) else { continue };
        assert!(this.modules.len() > 5, "{name}: only {:?}", this.modules);
        for module in &this.modules {
            let circle = this.circle(module).unwrap_or_default();
            assert!(circle.is_empty(), "{name}: a circle of modules:\n  {}", circle.join("\n  "));
        }
    }
}

#[test]
fn the_check_of_circles_sees_every_form_of_a_path() {
    let source = "use crate::{a, b::{c, d as e},\n    f};\npub(crate) use super::g;\nfn x() { crate::h::i(); } // crate::no::one";
    let found = paths(&code(source));
    for path in ["crate::a", "crate::b::c", "crate::b::d", "crate::f", "super::g", "crate::h::i"] {
        assert!(found.iter().any(|named| named == path), "{path} is not among {found:?}");
    }
    assert!(!found.iter().any(|named| named.contains("no")), "{found:?}");
}

#[test]
fn no_source_file_is_large() {
    let files = all_files();
    assert!(files.iter().any(|file| file.ends_with("tests/structure.rs")));
    for file in files {
        let bytes = fs::metadata(&file).unwrap().len();
        assert!(bytes <= MAX_BYTES, "{} has {bytes} bytes, above {MAX_BYTES}", file.display());
    }
}

#[test]
fn no_function_is_long() {
    for name in CRATES {
        let mut files = Vec::new();
        rust_files(&project().join(name).join("src"), &mut files);
        for file in files {
            let source = fs::read_to_string(&file).unwrap();
            let lines: Vec<&str> = source.lines().collect();
            for (at, line) in lines.iter().enumerate() {
                let indent = line.len() - line.trim_start().len();
                let words = line[indent..].split("fn ").next().unwrap_or_default().split_whitespace();
                let is_function = line.contains("fn ")
                    && words
                        .clone()
                        .all(|word| word.starts_with("pub") || ["const", "unsafe", "async"].contains(&word));
                if !is_function || line.ends_with([';', '}']) {
                    continue;
                }
                // formatted code ends a function with a brace in the column where it began
                let close = format!("{}}}", &line[..indent]);
                let length = lines[at..].iter().position(|line| *line == close).map_or(0, |end| end + 1);
                assert!(length <= MAX_LINES, "{}: {} has {length} lines", file.display(), line.trim());
            }
        }
    }
}
