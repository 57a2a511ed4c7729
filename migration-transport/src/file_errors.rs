//! Errors with the path of the file.

use std::{
    io::{self, ErrorKind},
    path::Path,
};

/// Returns a function that adds the path of the file to an error.
pub(crate) fn at(path: &Path) -> impl Fn(io::Error) -> io::Error + '_ {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Returns a function like [`at`], for a file that is too short if its end is reached here: `short`
/// is the reason.
pub(crate) fn cut<'a>(path: &'a Path, short: &'a str) -> impl Fn(io::Error) -> io::Error + 'a {
    move |error| match error.kind() {
        ErrorKind::UnexpectedEof => damaged(path, short),
        _ => at(path)(error),
    }
}

pub(crate) fn damaged(path: &Path, why: impl ToString) -> io::Error {
    at(path)(invalid(why))
}

pub(crate) fn invalid(why: impl ToString) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why.to_string())
}
