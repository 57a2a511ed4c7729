//! Errors that name the file they are about.

use std::{
    io::{self, ErrorKind},
    path::Path,
};

/// Says which file an error is about.
pub(crate) fn at(path: &Path) -> impl Fn(io::Error) -> io::Error + '_ {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// As [`at`], for a file that must not end here: `short` says what is wrong with it.
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
