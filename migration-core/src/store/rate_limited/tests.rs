use super::{
    super::{
        ManualClock, MemoryPageStore, Namespace, Purpose,
        conformance::{Harm, InMemory, TestStore},
    },
    *,
};
use crate::vm::VmId;

const MIB: u64 = 1 << 20;
const VM: VmId = VmId([1; 16]);

/// A store with a limit of 1 MiB/s, and its clock.
struct Limited {
    memory: InMemory,
    store: RateLimited<Arc<MemoryPageStore>>,
    pace: Arc<ManualClock>,
}

impl Limited {
    fn new() -> Self {
        let (memory, pace) = (InMemory::default(), Arc::new(ManualClock::default()));
        let store = RateLimited::with_pace(memory.shared(), NonZeroU64::new(MIB), pace.clone());
        Self { memory, store, pace }
    }

    /// Returns the store with one namespace.
    fn with_a_namespace() -> (Self, VmNamespace) {
        let this = Self::new();
        let record = Record { vm: VM, purpose: Purpose::Stage, owner: Owner::new("host-7").unwrap() };
        let namespace = Namespace::new([7; 16]).of(VM);
        this.store.create(namespace.id, &record, Duration::from_secs(60)).unwrap();
        (this, namespace)
    }

    /// Puts `count` pages. Returns the time at which the put has begun.
    fn put(&self, namespace: VmNamespace, generation: u32, count: u64) -> Duration {
        let value = [1; PAGE_SIZE];
        let run: Vec<_> = (0..count).map(|page| PageToPut { page, value: &value }).collect();
        self.store.put(namespace, generation, &run).unwrap();
        self.pace.now()
    }

    fn get(
        &self,
        namespace: VmNamespace,
        count: u64,
        urgency: Urgency,
        time: Duration,
    ) -> (u64, Result<(), StoreError>) {
        let wanted: Vec<_> = (0..count).map(|page| PageToGet { page, generation: 1 }).collect();
        let mut got = 0;
        let result = self.store.get(namespace, &wanted, urgency, Instant::now() + time, &mut |_, _| got += 1);
        (got, result)
    }
}

impl TestStore for Limited {
    fn store(&self) -> &dyn PageStore {
        &self.store
    }

    fn advance(&mut self, by: Duration) {
        self.memory.advance(by);
    }

    fn lose_everything(&mut self) {
        self.memory.lose_everything();
    }

    fn harm(&mut self, namespace: NamespaceId, page: u64, harm: Harm) -> bool {
        self.memory.harm(namespace, page, harm)
    }
}

crate::page_store_conformance!(Limited::new);

#[test]
fn puts_keep_to_the_budget_for_as_long_as_it_lives() {
    let (test, namespace) = Limited::with_a_namespace();
    // 128 pages are half a MiB
    assert_eq!(test.put(namespace, 1, 128), Duration::ZERO);
    assert_eq!(test.put(namespace, 2, 128), Duration::from_millis(500));
    assert_eq!(test.put(namespace, 3, 1), Duration::from_secs(1));
    // an hour without a put gives no credit
    test.pace.advance(Duration::from_secs(3600));
    let start = test.put(namespace, 4, 128);
    assert_eq!(test.put(namespace, 5, 128), start + Duration::from_millis(500));
    // a refused put does not use the budget
    assert!(test.store.put(namespace, 6, &[]).is_err());
    assert_eq!(test.put(namespace, 7, 1), start + Duration::from_secs(1));
}

#[test]
fn prefetches_share_the_budget_and_faults_bypass_it() {
    let (test, namespace) = Limited::with_a_namespace();
    let long = Duration::from_secs(600);
    test.put(namespace, 1, 256);
    // the budget is used up for one second
    let (got, result) = test.get(namespace, 256, Urgency::Fault, long);
    assert!(result.is_ok() && got == 256);
    assert_eq!(test.pace.now(), Duration::ZERO);
    let (got, result) = test.get(namespace, 256, Urgency::Prefetch, long);
    assert!(result.is_ok() && got == 256);
    // the last of four pieces begins after the put and three pieces
    assert_eq!(test.pace.now(), Duration::from_millis(1750));
    // missing pages are reported for all pieces together
    let (got, result) = test.get(namespace, 400, Urgency::Prefetch, long);
    assert_eq!(got, 256);
    assert!(matches!(result, Err(StoreError::Missing { count: 144, first: 256, .. })), "{result:?}");
}

#[test]
fn a_prefetch_that_would_begin_after_its_deadline_takes_nothing_of_the_budget() {
    let (test, namespace) = Limited::with_a_namespace();
    test.put(namespace, 1, 256);
    let (got, result) = test.get(namespace, 256, Urgency::Prefetch, Duration::from_millis(900));
    assert!(matches!(result, Err(StoreError::TimedOut)) && got == 0);
    assert!(test.pace.now() <= Duration::from_millis(900), "{:?}", test.pace.now());
    assert_eq!(test.put(namespace, 2, 1), Duration::from_secs(1));
}

#[test]
fn the_limit_can_change() {
    let (test, namespace) = Limited::with_a_namespace();
    test.store.set_limit(None);
    for generation in 1..10 {
        assert_eq!(test.put(namespace, generation, 256), Duration::ZERO);
    }
    test.store.set_limit(NonZeroU64::new(2 * MIB));
    test.put(namespace, 10, 256);
    assert_eq!(test.put(namespace, 11, 1), Duration::from_millis(500));
    // an extremely low limit does not overflow
    test.store.set_limit(NonZeroU64::new(1));
    test.put(namespace, 12, 256);
    assert!(test.put(namespace, 13, 1) >= Duration::from_secs(1 << 20));
    assert_eq!(format!("{:?}", test.store), r#"RateLimited { store: "memory", limit: Some(1), .. }"#);
}

#[test]
fn a_wait_is_as_long_as_its_bound_and_no_longer() {
    let second = Duration::from_secs(1);
    let mut budget = Budget { limit: NonZeroU64::new(MIB), free_at: Duration::ZERO };
    assert_eq!(budget.reserve(second, MIB, Duration::ZERO), Some(Duration::ZERO));
    assert_eq!(budget.reserve(second, MIB, second - Duration::from_nanos(1)), None);
    assert_eq!(budget.reserve(second, 2 * MIB, second), Some(second));
    assert_eq!(budget.reserve(second, 1, 3 * second), Some(3 * second));
    budget.limit = None;
    assert_eq!(budget.reserve(second, u64::MAX, Duration::ZERO), Some(Duration::ZERO));
}

#[test]
fn it_has_the_name_of_the_store_and_waits_on_the_clock_of_the_process() {
    let limited = Limited::new();
    assert_eq!(limited.store.name(), limited.memory.shared().name());
    let clock = ProcessClock::default();
    let (begin, time) = (clock.now(), Duration::from_millis(2));
    // the wait is never shorter; how much longer it is depends on the host
    clock.wait(time);
    assert!(clock.now() >= begin + time);
}
