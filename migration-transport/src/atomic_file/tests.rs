use std::{
    fs::{self, Permissions},
    io::Write as _,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
};

use tempfile::TempDir;

use super::*;

/// The id of a user that is neither root nor the user of the tests.
const STRANGER: u32 = 54321;

fn write(path: &Path, text: &str) -> io::Result<()> {
    let new = AtomicFile::create(path)?;
    new.file().write_all(text.as_bytes())?;
    new.commit()
}

fn names(dir: &TempDir) -> Vec<String> {
    let names = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// A function that puts something at a path.
type Plant = Box<dyn Fn(&Path)>;

/// Returns things that another user may have put at `vm.new`, each with its name.
fn planted(victim: &Path) -> Vec<(&'static str, Plant)> {
    let (linked, pointed) = (victim.to_owned(), victim.to_owned());
    let mut all: Vec<(&'static str, Plant)> = vec![
        ("a hard link", Box::new(move |path| fs::hard_link(&linked, path).unwrap())),
        ("a symbolic link", Box::new(move |path| symlink(&pointed, path).unwrap())),
        ("a dangling link", Box::new(|path| symlink("/no/such/file", path).unwrap())),
        ("a folder", Box::new(|path| fs::create_dir(path).unwrap())),
        (
            "a FIFO",
            Box::new(|path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap()),
        ),
        ("a socket", Box::new(|path| drop(std::os::unix::net::UnixListener::bind(path).unwrap()))),
    ];
    if geteuid().is_root() {
        let plant: Plant = Box::new(|path| {
            fs::write(path, "a stranger's").unwrap();
            fs::set_permissions(path, Permissions::from_mode(0o666)).unwrap();
            chown(path, Some(STRANGER), Some(STRANGER)).unwrap();
        });
        all.push(("a file of another owner", plant));
    } else {
        eprintln!("without files of another owner: that needs root");
    }
    all
}

#[test]
fn what_is_planted_at_the_unfinished_name_is_neither_used_nor_removed() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    for (what, plant) in planted(&victim) {
        fs::write(&victim, "untouched").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (path, new) = (dir.path().join("vm"), dir.path().join("vm.new"));
        plant(&new);
        let before = fs::symlink_metadata(&new).unwrap();
        write(&path, "whole").unwrap();
        let after = fs::symlink_metadata(&new).unwrap();
        assert_eq!((before.ino(), before.mode(), before.uid()), (after.ino(), after.mode(), after.uid()), "{what}");
        assert_eq!(names(&dir), ["vm", "vm.new"], "{what}");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched", "{what}");
        let found = fs::symlink_metadata(&path).unwrap();
        assert!(found.is_file() && found.nlink() == 1 && found.uid() == geteuid().as_raw(), "{what}");
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), mode(&path)), ("whole", 0o600), "{what}");
        // after a drop in the middle no file of ours is left
        drop(AtomicFile::create(&path).unwrap());
        assert_eq!(names(&dir), ["vm", "vm.new"], "{what}");
    }
}

#[test]
fn what_is_no_file_of_ours_is_not_replaced() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    for (what, plant) in planted(&victim) {
        fs::write(&victim, "untouched").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm");
        plant(&path);
        if what == "a hard link" {
            // the name is replaced, and the file to which it pointed stays unchanged
            write(&path, "whole").unwrap();
        } else {
            let error = AtomicFile::create(&path).unwrap_err();
            let kinds = [ErrorKind::AlreadyExists, ErrorKind::PermissionDenied];
            assert!(kinds.contains(&error.kind()) && error.to_string().contains("/vm: "), "{what}: {error}");
        }
        assert_eq!(
            (names(&dir), fs::read_to_string(&victim).unwrap()),
            (vec!["vm".into()], "untouched".into()),
            "{what}"
        );
    }
}

#[test]
fn a_leftover_goes_and_a_writer_keeps_others_out() {
    let dir = tempfile::tempdir().unwrap();
    let (path, new) = (dir.path().join("vm"), dir.path().join("vm.new"));
    fs::write(&new, "of a crash").unwrap();
    let first = AtomicFile::create(&path).unwrap();
    assert_eq!((names(&dir), mode(&new)), (vec!["vm.new".into()], 0o600));
    let error = AtomicFile::create(&path).unwrap_err();
    assert!(error.kind() == ErrorKind::ResourceBusy && error.to_string().contains("vm.new"), "{error}");
    first.file().write_all(b"1").unwrap();
    first.commit().unwrap();
    assert_eq!((names(&dir), fs::read(&path).unwrap()), (vec!["vm".into()], b"1".to_vec()));
    // a lock that any user could take does not stop a writer
    fs::write(&new, "readable").unwrap();
    fs::set_permissions(&new, Permissions::from_mode(0o644)).unwrap();
    let stranger = File::open(&new).unwrap();
    stranger.lock_shared().unwrap();
    write(&path, "2").unwrap();
    assert_eq!((names(&dir), fs::read(&path).unwrap()), (vec!["vm".into(), "vm.new".into()], b"2".to_vec()));
}

#[test]
fn an_unfinished_file_that_was_replaced_is_not_renamed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, new) = (dir.path().join("vm"), dir.path().join("vm.new"));
    let file = AtomicFile::create(&path).unwrap();
    fs::remove_file(&new).unwrap();
    fs::write(&new, "forged").unwrap();
    assert_eq!(file.commit().unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!((names(&dir), fs::read_to_string(&new).unwrap()), (vec!["vm.new".into()], "forged".into()));
}

#[test]
fn modes_do_not_depend_on_what_was_there_and_shared_files_follow_the_umask() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm");
    fs::write(&path, "old").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
    write(&path, "new").unwrap();
    assert_eq!(mode(&path), 0o600);
    let shared = AtomicFile::create_shared(&path).unwrap();
    shared.commit().unwrap();
    let plain = dir.path().join("plain");
    fs::write(&plain, "").unwrap();
    assert_eq!(mode(&path), mode(&plain));
}

#[test]
fn long_names_and_folders_that_move() {
    let parent = tempfile::tempdir().unwrap();
    let (folder, moved) = (parent.path().join("folder"), parent.path().join("moved"));
    fs::create_dir(&folder).unwrap();
    let name = "x".repeat(255);
    write(&folder.join(&name), "long").unwrap();
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    // a folder that gets the path later does not get the file
    let new = AtomicFile::create(&folder.join("vm")).unwrap();
    fs::rename(&folder, &moved).unwrap();
    fs::create_dir(&folder).unwrap();
    new.commit().unwrap();
    assert!(moved.join("vm").exists() && fs::read_dir(&folder).unwrap().count() == 0);
    assert_eq!(AtomicFile::create(Path::new("/")).unwrap_err().kind(), ErrorKind::InvalidInput);
    let error = AtomicFile::create(&parent.path().join("none/vm")).unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("none/vm: "), "{error}");
}

#[test]
fn what_cannot_be_opened_is_not_called_damaged() {
    let dir = tempfile::tempdir().unwrap();
    assert!(open_regular(&dir.path().join("none")).unwrap().is_none());
    assert_eq!(open_regular(dir.path()).unwrap_err().kind(), ErrorKind::InvalidData);
    let long = open_regular(&dir.path().join("x".repeat(300))).unwrap_err();
    assert_eq!(long.kind(), ErrorKind::InvalidFilename);
}

#[test]
fn an_unfinished_file_is_closed_on_exec() {
    let dir = tempfile::tempdir().unwrap();
    let new = AtomicFile::create(&dir.path().join("f")).unwrap();
    let flags = rustix::io::fcntl_getfd(new.file()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}
