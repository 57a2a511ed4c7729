//! Threads for a migration on Linux: named, and with a priority after their role.

use std::{io, sync::Arc, sync::mpsc, thread};

use migration_core::spawner::{GuestImpact, Joiner, Role, Spawner, StdJoiner};

use urgent::{Member, Urgent};

mod urgent;

/// What a VMM does on each new thread before the SDK's code runs there, such as setting an affinity
/// or installing a seccomp filter. An error ends the thread, and `spawn` returns it.
pub type Setup = dyn Fn(Role, GuestImpact) -> io::Result<()> + Send + Sync;

/// The [`Spawner`] for threads of the standard library on Linux.
///
/// | role | low impact | balanced | fast |
/// |---|---|---|---|
/// | bulk | `SCHED_IDLE` (else nice 19) | `SCHED_BATCH` | nice −5 |
/// | background | `SCHED_IDLE` (else nice 19) | `SCHED_BATCH` | unchanged |
/// | hand-over | nice −10, time slices of 0.1 ms | the same | the same |
/// | demand | nice −10 | nice −10 | nice −10 |
/// | control | unchanged | unchanged | unchanged |
///
/// A thread under `SCHED_IDLE` is preempted at once when a vCPU wants the core; on a host whose
/// cores are all busy it hardly moves. `SCHED_BATCH` keeps the normal share but does not preempt
/// when it wakes. A priority that cannot be had (below 0 it needs CAP_SYS_NICE) is left as it was.
/// Threads on demand do little, and the guest waits for each bit of it.
///
/// In a hand-over the guest waits too, and each thread wakes another one, or a vCPU. A short time
/// slice lets a thread that is woken go before one that has a longer slice, without waiting for the
/// next tick (4 ms); it needs no permission, and Linux 6.12. In the pause these threads are
/// real-time ones (`SCHED_RR`) where that is permitted, for 5 ms at most: the scheduler moves
/// threads of the usual policies away from a core on which another process is in the kernel for
/// long, and leaves a real-time thread that was woken there behind it, for seconds if it comes to
/// that, however idle the other cores are. A thread called `mig-urgent` ends it.
#[derive(Clone, Default)]
pub struct LinuxSpawner {
    setup: Option<Arc<Setup>>,
    urgent: Arc<Urgent>,
}

impl LinuxSpawner {
    /// Returns a spawner that sets names and priorities only.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a spawner that also runs `setup` on each new thread, after its priority is set: a
    /// seccomp filter need not allow `sched_setscheduler`.
    pub fn with_setup(setup: impl Fn(Role, GuestImpact) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self { setup: Some(Arc::new(setup)), urgent: Arc::default() }
    }
}

impl Spawner for LinuxSpawner {
    /// Starts a thread called `name` (Linux shows its first 15 bytes). Returns when its set-up is
    /// done.
    fn spawn(
        &self,
        role: Role,
        impact: GuestImpact,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Box<dyn Joiner>> {
        let (setup, urgent) = (self.setup.clone(), self.urgent.clone());
        let (report, ready) = mpsc::sync_channel(1);
        let handle = thread::Builder::new().name(name.to_owned()).spawn(move || {
            if let Some(priority) = priority(role, impact) {
                sched::apply(priority);
            }
            // also of a thread that assumes the role later, and of one that panics
            let member = Member { urgent: &urgent, always: role == Role::HandOver };
            if member.always {
                urgent.join(setup.clone());
            }
            let done = setup.map_or(Ok(()), |setup| setup(role, impact));
            let run = done.is_ok();
            // the other end waits for this, so it is there
            let _ = report.send(done);
            if run {
                body();
            }
            drop(member);
        })?;
        // a set-up that panicked sends nothing
        match ready.recv().unwrap_or_else(|_| Err(io::Error::other("the thread's set-up panicked"))) {
            Ok(()) => Ok(Box::new(StdJoiner(handle))),
            Err(error) => {
                let _ = handle.join();
                Err(error)
            }
        }
    }

    fn assume(&self, role: Role, impact: GuestImpact) {
        sched::apply(priority(role, impact).unwrap_or(Priority::Nice(0)));
        match role {
            Role::HandOver => self.urgent.join(self.setup.clone()),
            _ => self.urgent.leave(),
        }
    }

    fn begin_switch_over(&self) {
        self.urgent.begin();
    }

    fn end_switch_over(&self) {
        self.urgent.end();
    }
}

/// Lets others go first (`SCHED_BATCH`, nice 19) in all threads that this process has now, as far
/// as permitted: for a process that has handed its VM over to another one of this machine. To free
/// the VM and to unmap its RAM takes milliseconds in the kernel, in whichever thread is the last
/// one to let go of them, and the guest runs on the same cores. (Under `SCHED_IDLE` it would take
/// seconds beside vCPUs that are busy.)
pub fn lower_priority() {
    // a thread that is missed does its part at its own priority
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    threads.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).for_each(sched::lower_priority);
}

/// The threads of a VM's vCPUs go before others as long as this lives, each as far as permitted:
/// for a hand-over on one machine, which has work to do on the cores on which the guest runs. Else
/// a vCPU may wait until that work, or a thread of the kernel that happens to wake up on its core,
/// rests: where the kernel does not preempt itself that is a tick, or several. Threads under
/// another policy than the usual ones stay as they are, and so does what somebody else changes
/// meanwhile.
#[derive(Debug)]
pub struct PriorityBoost(Vec<sched::Change>);

impl PriorityBoost {
    /// These threads, by the operating system's numbers, have short time slices: they wait less for
    /// their turn, and have as much of a core as before. (Where the kernel has no such thing,
    /// before Linux 6.12, nothing changes.)
    pub fn sooner(threads: &[u32]) -> Self {
        Self::with(threads, None)
    }

    /// And they have more of it, nice −10. For a short time: others have a tenth.
    pub fn first(threads: &[u32]) -> Self {
        Self::with(threads, Some(sched::PREFERRED))
    }

    fn with(threads: &[u32], nice: Option<i32>) -> Self {
        Self(threads.iter().filter_map(|&thread| sched::prefer(thread, nice)).collect())
    }
}

impl Drop for PriorityBoost {
    fn drop(&mut self) {
        self.0.iter().for_each(sched::Change::take_back);
    }
}

/// How the scheduler is to treat a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Priority {
    /// Has its turn soon after it is woken, and more of a core than others. Threads that it starts
    /// are normal ones.
    Prompt,
    Idle,
    Batch,
    /// Of normal threads.
    Nice(i32),
}

fn priority(role: Role, impact: GuestImpact) -> Option<Priority> {
    match (role, impact) {
        (Role::Bulk | Role::Background, GuestImpact::Low) => Some(Priority::Idle),
        (Role::Bulk | Role::Background, GuestImpact::Balanced) => Some(Priority::Batch),
        (Role::Bulk, GuestImpact::Fast) => Some(Priority::Nice(-5)),
        (Role::HandOver, _) => Some(Priority::Prompt),
        (Role::Demand, _) => Some(Priority::Nice(-10)),
        _ => None,
    }
}

#[allow(unsafe_code)]
mod sched {
    use super::Priority;

    pub(super) const PREFERRED: libc::c_int = -10;
    /// Threads that a thread starts are normal ones.
    const RESET_ON_FORK: u64 = libc::SCHED_FLAG_RESET_ON_FORK.unsigned_abs() as u64;
    /// The shortest time slice that the kernel gives, in ns.
    const SHORT: u64 = 100_000;

    /// Sets the calling thread's priority, as far as permitted.
    pub(super) fn apply(priority: Priority) {
        match priority {
            Priority::Prompt => {
                normal(libc::SCHED_OTHER, 0);
                if prefer(0, Some(PREFERRED)).is_none() {
                    set_nice(0, PREFERRED);
                }
            }
            Priority::Idle if set_policy(0, libc::SCHED_IDLE, 0) => {}
            Priority::Idle => set_nice(0, 19),
            // what it had as a prompt thread ends
            Priority::Batch => normal(libc::SCHED_BATCH, Share::of(0).map_or(0, |share| share.nice.max(0))),
            Priority::Nice(nice) => normal(libc::SCHED_OTHER, nice),
        }
    }

    /// Gives the calling thread one of the usual policies, and time slices as all have them.
    fn normal(policy: libc::c_int, nice: i32) {
        let share = |flags| Share { policy: policy.unsigned_abs(), flags, nice, slice: 0 };
        // a thread whose children are normal ones may have to stay so
        if !share(0).give(0) && !share(RESET_ON_FORK).give(0) {
            set_policy(0, policy, 0);
            set_nice(0, nice);
        }
    }

    pub(super) fn this_thread() -> libc::pid_t {
        // SAFETY: takes no arguments.
        unsafe { libc::gettid() }
    }

    /// Makes a thread a real-time one, as far as permitted, or ends that. Its niceness and time
    /// slice come back then.
    pub(super) fn set_real_time(thread: libc::pid_t, on: bool) {
        let (policy, priority) = if on { (libc::SCHED_RR, 1) } else { (libc::SCHED_OTHER, 0) };
        set_policy(thread, policy | libc::SCHED_RESET_ON_FORK, priority);
    }

    /// If the calling thread is a real-time one, ends that.
    pub(super) fn set_usual_if_real_time() {
        // SAFETY: takes a number only; 0 names the calling thread.
        let policy = unsafe { libc::sched_getscheduler(0) } & !libc::SCHED_RESET_ON_FORK;
        if policy == libc::SCHED_RR {
            set_real_time(0, false);
        }
    }

    /// Returns whether the calling thread may set policies at all.
    pub(super) fn may_change_policies() -> bool {
        set_policy(0, libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, 0)
    }

    /// Lets others go before a thread.
    pub(super) fn lower_priority(thread: libc::pid_t) {
        set_policy(thread, libc::SCHED_BATCH, 0);
        set_nice(thread, 19);
    }

    /// A thread's share of a core, under one of the usual policies.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Share {
        policy: u32,
        flags: u64,
        pub(super) nice: i32,
        /// In ns. The kernel says 0 if it knows none (before Linux 6.12), and gives the usual one
        /// for 0.
        pub(super) slice: u64,
    }

    impl Share {
        const SIZE: u32 = size_of::<libc::sched_attr>() as u32;

        pub(super) fn of(thread: u32) -> Option<Self> {
            // SAFETY: all of it are numbers.
            let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
            // SAFETY: the kernel writes up to so many bytes.
            let got = unsafe { libc::syscall(libc::SYS_sched_getattr, thread, &raw mut attr, Self::SIZE, 0) };
            let usual = [libc::SCHED_OTHER, libc::SCHED_BATCH].map(libc::c_int::unsigned_abs);
            (got == 0 && usual.contains(&attr.sched_policy)).then_some(Self {
                policy: attr.sched_policy,
                flags: attr.sched_flags,
                nice: attr.sched_nice,
                slice: attr.sched_runtime,
            })
        }

        fn give(self, thread: u32) -> bool {
            let attr = libc::sched_attr {
                size: Self::SIZE,
                sched_policy: self.policy,
                sched_flags: self.flags,
                sched_nice: self.nice,
                sched_priority: 0,
                sched_runtime: self.slice,
                sched_deadline: 0,
                sched_period: 0,
            };
            // SAFETY: `attr` is valid for the call, and says how long it is.
            unsafe { libc::syscall(libc::SYS_sched_setattr, thread, &raw const attr, 0) == 0 }
        }
    }

    /// What has become of a thread's share.
    #[derive(Debug)]
    pub(super) struct Change {
        thread: u32,
        was: Share,
        is: Share,
    }

    impl Change {
        /// Unless somebody else has changed it since, or the thread has ended.
        pub(super) fn take_back(&self) {
            if Share::of(self.thread) == Some(self.is) {
                self.was.give(self.thread);
            }
        }
    }

    /// Lets a thread go before others, and have more than they, if it is to be so nice.
    pub(super) fn prefer(thread: u32, nice: Option<i32>) -> Option<Change> {
        let was = Share::of(thread)?;
        let slice = if was.slice == 0 { SHORT } else { was.slice.min(SHORT) };
        let short = Share { slice, ..was };
        let more = nice.filter(|nice| *nice < was.nice);
        // not for threads that it starts, as KVM starts one of its own at a vCPU's first run
        let flags = was.flags | RESET_ON_FORK;
        let given = more.is_some_and(|nice| Share { nice, flags, ..short }.give(thread)) || short.give(thread);
        given.then(|| Some(Change { thread, was, is: Share::of(thread)? })).flatten()
    }

    fn set_policy(thread: libc::pid_t, policy: libc::c_int, sched_priority: libc::c_int) -> bool {
        let param = libc::sched_param { sched_priority };
        // a thread whose children are normal ones may have to stay so
        [policy, policy | libc::SCHED_RESET_ON_FORK].into_iter().any(|policy| {
            // SAFETY: `param` is valid for the call; 0 names the calling thread.
            unsafe { libc::sched_setscheduler(thread, policy, &raw const param) == 0 }
        })
    }

    fn set_nice(thread: libc::pid_t, nice: libc::c_int) {
        // SAFETY: takes numbers only. On Linux, 0 names the calling thread, not the process. Not
        // being permitted to is no failure, see `LinuxSpawner`.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, thread.unsigned_abs(), nice) };
    }

    #[cfg(test)]
    pub(super) fn policy() -> libc::c_int {
        // SAFETY: takes a number only; 0 names the calling thread.
        unsafe { libc::sched_getscheduler(0) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn policy_of(role: Role, impact: GuestImpact) -> (String, libc::c_int) {
        let seen = Arc::new(Mutex::new(None));
        let body = {
            let seen = seen.clone();
            move || {
                let name = thread::current().name().unwrap_or_default().to_owned();
                *seen.lock().unwrap() = Some((name, sched::policy()));
            }
        };
        LinuxSpawner::new().spawn(role, impact, "bulk-0", Box::new(body)).unwrap().join();
        let seen = seen.lock().unwrap().take();
        seen.unwrap()
    }

    #[test]
    fn roles_get_their_priority() {
        assert_eq!(policy_of(Role::Bulk, GuestImpact::Low), ("bulk-0".into(), libc::SCHED_IDLE));
        assert_eq!(policy_of(Role::Background, GuestImpact::Balanced).1, libc::SCHED_BATCH);
        assert_eq!(policy_of(Role::Demand, GuestImpact::Low).1, libc::SCHED_OTHER);
        assert_eq!(policy_of(Role::Bulk, GuestImpact::Fast).1, libc::SCHED_OTHER);
    }

    /// The table of [`LinuxSpawner`].
    #[test]
    fn the_priority_follows_role_and_impact() {
        use GuestImpact::{Balanced, Fast, Low};
        use Priority::{Batch, Idle, Nice, Prompt};
        for (role, expected) in [
            (Role::Bulk, [Some(Idle), Some(Batch), Some(Nice(-5))]),
            (Role::Background, [Some(Idle), Some(Batch), None]),
            (Role::HandOver, [Some(Prompt); 3]),
            (Role::Demand, [Some(Nice(-10)); 3]),
            (Role::Control, [None; 3]),
        ] {
            assert_eq!([Low, Balanced, Fast].map(|impact| priority(role, impact)), expected, "{role:?}");
        }
    }

    #[test]
    fn a_niceness_is_set_where_it_is_permitted() {
        let nice = |priority: Option<Priority>| {
            let body = move || {
                if let Some(priority) = priority {
                    sched::apply(priority);
                }
                sched::Share::of(0).map(|share| share.nice)
            };
            thread::spawn(body).join().unwrap()
        };
        let own = nice(None).unwrap();
        let above = (own + 3).min(19);
        assert_eq!(nice(Some(Priority::Nice(above))), Some(above));
        // what is below needs a permission, and else stays
        let below = nice(Some(Priority::Nice(own - 4)));
        assert!(below == Some(own - 4) || below == Some(own), "{below:?}");
        if below == Some(own - 4) {
            let [prompt, demand] = [Priority::Prompt, Priority::Nice(-10)].map(|priority| nice(Some(priority)));
            assert_eq!((prompt, demand), (Some(-10), Some(-10)));
        }
        assert_eq!(nice(Some(Priority::Batch)), Some(own.max(0)));
    }

    #[test]
    fn a_setup_runs_on_the_new_thread_and_may_panic() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let noted = seen.clone();
        let spawner = LinuxSpawner::with_setup(move |role, impact| {
            noted.lock().unwrap().push((thread::current().name().map(str::to_owned), role, impact));
            assert_ne!(role, Role::Demand, "as asked");
            Ok(())
        });
        let (sent, received) = mpsc::channel();
        let body = Box::new(move || sent.send(()).unwrap());
        spawner.spawn(Role::Bulk, GuestImpact::Fast, "bulk-0", body).unwrap().join();
        received.recv().unwrap();
        assert_eq!(*seen.lock().unwrap(), [(Some("bulk-0".into()), Role::Bulk, GuestImpact::Fast)]);
        let body = Box::new(|| unreachable!("must not run"));
        let error = spawner.spawn(Role::Demand, GuestImpact::Low, "t", body).map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), "the thread's set-up panicked");
    }

    #[test]
    fn a_thread_takes_up_another_role() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let body = {
            let seen = seen.clone();
            move || {
                let spawner = LinuxSpawner::new();
                for role in [Role::Demand, Role::Bulk, Role::Control] {
                    spawner.assume(role, GuestImpact::Balanced);
                    seen.lock().unwrap().push(sched::policy());
                }
            }
        };
        LinuxSpawner::new().spawn(Role::Bulk, GuestImpact::Balanced, "t", Box::new(body)).unwrap().join();
        assert_eq!(*seen.lock().unwrap(), [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_OTHER]);
    }

    #[test]
    fn a_thread_of_a_hand_over_is_prompt_and_not_a_real_time_one() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let body = {
            let seen = seen.clone();
            move || {
                let spawner = LinuxSpawner::new();
                for role in [Role::Control, Role::HandOver, Role::Control, Role::HandOver, Role::Background] {
                    spawner.assume(role, GuestImpact::Balanced);
                    let child = thread::spawn(|| sched::Share::of(0)).join().unwrap();
                    seen.lock().unwrap().push((sched::policy(), sched::Share::of(0), child));
                }
            }
        };
        LinuxSpawner::new().spawn(Role::HandOver, GuestImpact::Balanced, "t", Box::new(body)).unwrap().join();
        let seen = seen.lock().unwrap();
        let policies: Vec<_> = seen.iter().map(|s| s.0 & !libc::SCHED_RESET_ON_FORK).collect();
        assert_eq!(policies, [&[libc::SCHED_OTHER; 4][..], &[libc::SCHED_BATCH]].concat());
        let [control, prompt, ..] = [0, 1, 2].map(|n| seen[n].1.unwrap());
        assert!(prompt.nice <= control.nice && control.nice >= 0, "{control:?} {prompt:?}");
        assert!(prompt.slice < control.slice || control.slice == 0, "{control:?} {prompt:?}");
        // nothing of it is left
        let after = |n: usize| seen[n].1.map(|share| (share.nice, share.slice));
        assert_eq!([after(2), after(4)], [after(0); 2]);
        if prompt.nice < control.nice {
            assert_eq!(seen[1].2.map(|share| share.nice), Some(0), "a thread that it starts is a normal one");
        }
    }

    #[test]
    fn vcpus_are_preferred_for_a_while() {
        // SAFETY: takes no arguments.
        #[allow(unsafe_code)]
        let this = unsafe { libc::gettid() }.unsigned_abs();
        let was = sched::Share::of(this).unwrap();
        let sooner = PriorityBoost::sooner(&[this, u32::MAX >> 1]);
        assert_eq!(sooner.0.len(), 1);
        assert_eq!(sched::Share::of(this).unwrap().nice, was.nice);
        drop(sooner);
        assert_eq!(sched::Share::of(this), Some(was));
        // it leaves again before it is at rest
        let preferred = PriorityBoost::first(&[this]);
        let sooner = PriorityBoost::sooner(&[this]);
        let is = sched::Share::of(this).unwrap();
        // SAFETY: takes no pointers.
        #[allow(unsafe_code)]
        let permitted = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -10) } == 0;
        assert_eq!(is.nice, if permitted { -10 } else { was.nice }, "{is:?}");
        drop(preferred);
        assert_eq!(sched::Share::of(this), Some(was));
        drop(sooner);
        assert_eq!(sched::Share::of(this), Some(was));
        let preferred = PriorityBoost::first(&[this]);
        sched::apply(Priority::Idle);
        drop(preferred);
        assert_eq!(sched::policy(), libc::SCHED_IDLE, "somebody else's wish");
    }

    #[test]
    fn a_failed_setup_fails_the_spawn_and_runs_nothing() {
        let spawner = LinuxSpawner::with_setup(|_, _| Err(io::ErrorKind::PermissionDenied.into()));
        let body = Box::new(|| unreachable!("must not run"));
        let error = spawner.spawn(Role::Bulk, GuestImpact::Low, "t", body).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}
