//! Text for people: errors with their causes, and text from outside, made safe for a terminal and
//! for a line of a log.

use std::{
    error::Error,
    fmt::{self, Write},
};

/// The largest number of bytes of a text that [`Escaped`] shows. It states how many more there are.
/// The limit is longer than any reason that this crate gives.
pub const MAX_SHOWN: usize = 2048;

/// Displays text from outside (a reason from a peer, an address, a name, the output of another
/// process) so that it cannot begin a new line, send control codes to a terminal or reorder the
/// text around it.
///
/// Some characters are written as escapes like `\n` and `\u{1b}`, as in a Rust string: control
/// characters, line and paragraph separators, format characters (which include those that change
/// the direction of text), unassigned and private characters, and unusual spaces. All other
/// characters are written unchanged, quotes and backslashes too. So escaping a text twice gives the
/// same as escaping it once. At most [`MAX_SHOWN`] bytes of the text are shown.
///
/// Keep values unescaped where they are data, in a report or in an error. Escape them where a
/// person sees them.
///
/// ```
/// use migration_core::text::Escaped;
///
/// assert_eq!(Escaped("no room\n\x1b]0;owned\x07").to_string(), r"no room\n\u{1b}]0;owned\u{7}");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Escaped<'a>(pub &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut end = self.0.len().min(MAX_SHOWN);
        while !self.0.is_char_boundary(end) {
            end -= 1;
        }
        let (shown, rest) = self.0.split_at(end);
        shown.chars().try_for_each(|c| write_char(f, c))?;
        if !rest.is_empty() {
            write!(f, "… ({} bytes more)", rest.len())?;
        }
        Ok(())
    }
}

fn write_char(f: &mut fmt::Formatter<'_>, c: char) -> fmt::Result {
    if matches!(c, '\\' | '\'' | '"') {
        return f.write_char(c);
    }
    // `escape_debug` escapes a combining mark at the beginning of a text only, so put a letter
    // before it
    let mut pair = [b'a'; 5];
    let len = 1 + c.encode_utf8(&mut pair[1..]).len();
    let pair = std::str::from_utf8(&pair[..len]).map_err(|_| fmt::Error)?;
    pair.escape_debug().skip(1).try_for_each(|c| f.write_char(c))
}

/// Shows an error with all its causes, as `what failed: because of this: because of that`.
///
/// No error of these crates repeats its [`source`](Error::source) in its own text, so this is how
/// one is printed for people. Errors of other crates may repeat it: a cause with whose text the
/// line ends already is left out.
///
/// ```
/// use std::io;
/// use migration_core::{MigrationError, text::Chain};
///
/// let refused = io::Error::new(io::ErrorKind::ConnectionRefused, "connection refused");
/// let error = MigrationError::link("tcp:there:4444")(refused);
/// assert_eq!(error.to_string(), "link to tcp:there:4444");
/// assert_eq!(Chain(&error).to_string(), "link to tcp:there:4444: connection refused");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'a));

/// Returns the text of an error with all its causes, as [`Chain`] shows it.
pub fn describe(error: impl Error) -> String {
    Chain(&error).to_string()
}

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = self.0.to_string();
        f.write_str(&last)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            let text = cause.to_string();
            if !last.ends_with(&text) {
                write!(f, ": {text}")?;
                last = text;
            }
            next = cause.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An error with these words and this cause.
    #[derive(Debug)]
    struct Words(&'static str, Option<Box<Words>>);

    impl fmt::Display for Words {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Words {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as &(dyn Error + 'static))
        }
    }

    #[test]
    fn a_chain_shows_each_cause_once() {
        let chain = |a, b, c| {
            let inner = Words(b, Some(Box::new(Words(c, None))));
            Chain(&Words(a, Some(Box::new(inner)))).to_string()
        };
        assert_eq!(chain("saving", "the disk", "it is full"), "saving: the disk: it is full");
        // errors that repeat their causes
        assert_eq!(
            chain("saving: the disk: it is full", "the disk: it is full", "it is full"),
            chain("saving", "the disk", "it is full")
        );
        assert_eq!(chain("saving: the disk", "the disk", "it is full"), chain("saving", "the disk", "it is full"));
        assert_eq!(Chain(&Words("alone", None)).to_string(), "alone");
    }

    fn escaped(text: &str) -> String {
        Escaped(text).to_string()
    }

    #[test]
    fn control_codes_for_terminals_are_escaped() {
        let bad = ('\0'..='\x1f')
            .chain('\x7f'..='\u{9f}')
            .chain(['\u{ad}', '\u{61c}', '\u{180e}', '\u{2028}', '\u{2029}', '\u{fff9}', '\u{e0041}', '\u{feff}'])
            .chain('\u{200b}'..='\u{200f}')
            .chain('\u{202a}'..='\u{202e}')
            .chain('\u{2060}'..='\u{206f}');
        for c in bad {
            let text = escaped(&format!("<{c}>"));
            assert!(text.starts_with("<\\") && text.ends_with('>'), "{c:?}: {text:?}");
            assert!(text.bytes().all(|b| (0x20..0x7f).contains(&b)), "{c:?}: {text:?}");
        }
    }

    #[test]
    fn plain_text_of_any_script_stays_as_it_is() {
        for text in ["tcp:127.0.0.1:4444: it's \"busy\" \\ 100 %", "Gerät läuft", "नमस्ते", "e\u{301}", "虚拟机", "🚚"]
        {
            assert_eq!(escaped(text), text);
        }
    }

    #[test]
    fn escaping_twice_changes_nothing() {
        let once = escaped("a\u{1b}[2J\\\n\u{202e}");
        assert_eq!(once, r"a\u{1b}[2J\\n\u{202e}");
        assert_eq!(escaped(&once), once);
    }

    #[test]
    fn long_text_is_cut_between_characters_and_says_so() {
        let text = format!("x{}", "é".repeat(MAX_SHOWN));
        let shown = escaped(&text);
        assert!(shown.starts_with("xé") && shown.len() < MAX_SHOWN + 40);
        assert!(shown.ends_with(&format!("é… ({} bytes more)", text.len() - (MAX_SHOWN - 1))), "{shown}");
    }
}
