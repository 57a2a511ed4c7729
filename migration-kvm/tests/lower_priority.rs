//! The priority of a process that has handed its VM over. A test of its own process, because it
//! changes every thread.

use std::{
    fs,
    path::Path,
    sync::{Arc, Barrier},
    thread,
};

use migration_kvm::spawner::lower_priority;

const SCHED_BATCH: i64 = 3;

/// Returns niceness and policy of the thread whose folder this is.
fn priority(task: &Path) -> (i64, i64) {
    let stat = fs::read_to_string(task.join("stat")).unwrap();
    // the name may have blanks; the state is the third field of proc(5), and the first after it
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[19 - 3].parse().unwrap(), fields[41 - 3].parse().unwrap())
}

fn priorities() -> Vec<(i64, i64)> {
    fs::read_dir("/proc/self/task").unwrap().map(|task| priority(&task.unwrap().path())).collect()
}

#[test]
fn every_thread_lets_others_go_first() {
    let [begun, ended] = [(); 2].map(|()| Arc::new(Barrier::new(3)));
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let (begun, ended) = (begun.clone(), ended.clone());
            thread::spawn(move || {
                begun.wait();
                ended.wait();
            })
        })
        .collect();
    begun.wait();
    assert!(priorities().iter().all(|priority| *priority != (19, SCHED_BATCH)));
    lower_priority();
    let after = priorities();
    ended.wait();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(after.len() >= 3 && after.iter().all(|priority| *priority == (19, SCHED_BATCH)), "{after:?}");
}
