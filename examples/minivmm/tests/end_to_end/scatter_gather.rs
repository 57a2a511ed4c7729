//! Scatter-gather: pages go through page stores, and the source is free when each page is somewhere
//! else. Stores in folders, and in servers on Unix sockets that the trials start.

use std::{fs, path::PathBuf};

use libtest_mimic::Failed;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    common::{Lab, Outcome, PageServer, Process, Suite, ensure, ensure_says, usage, wait_for},
    post_copy::number,
};

/// Guests that notice a wrong page at once, and each wrong page at their end.
const WORKLOADS: [&str; 6] = [
    "touch:size=16M,data=8M",
    "random:size=24M,data=8M",
    "storm:size=24M,data=8M",
    "quicksort:regions=6,size=4M,slice=2ms,data=8M",
    "kv:percent=60,step=100ms,data=8M",
    "churn:size=24M,data=8M",
];
/// A guest that has work for as long as a trial takes, and soon touches all its pages.
const GUEST: &str = "random:size=24M";
/// A guest that does not touch most of its pages: they stay missing until they are gathered.
const CALM_GUEST: &str = "hot:size=1M,data=32M";
/// The direct link is so slow that most pages go through the stores.
const SLOW: [&str; 4] = ["--strategy", "scatter-gather", "--bandwidth", "100Mbit"];
/// At this rate the pages of a guest take half a minute.
const LONG: [&str; 6] = ["--strategy", "scatter-gather", "--bandwidth", "100Mbit", "--gather-rate", "5Mbit"];

pub(crate) fn add(suite: &mut Suite) {
    for (n, backing) in ["anon", "thp", "memfd"].into_iter().enumerate() {
        for (m, sealed) in [false, true].into_iter().enumerate() {
            let how = if sealed { "sealed" } else { "plain" };
            let [in_file, in_server] = [2 * n + m, 2 * n + m + 3].map(|at| WORKLOADS[at % WORKLOADS.len()]);
            suite.post_copy(format!("scatter_gather/moves/file/{how}/{backing}"), backing, move |lab| {
                moves(lab, &InFolder::new(lab, "a"), Way { spec: in_file, backing, sealed })
            });
            suite.with_page_servers(format!("scatter_gather/moves/server/{how}/{backing}"), move |lab| {
                moves(lab, &PageServer::start(lab, "a", &[])?, Way { spec: in_server, backing, sealed })
            });
        }
    }
    suite.post_copy("scatter_gather/two_stores", "anon", two_stores);
    suite.post_copy("scatter_gather/source_killed_after_its_release", "anon", source_killed);
    suite.post_copy("scatter_gather/named_on_one_side", "anon", named_on_one_side);
    suite.post_copy("scatter_gather/not_the_same_at_both_ends", "anon", not_the_same);
    suite.post_copy("scatter_gather/in_memory", "anon", in_memory);
    suite.post_copy("scatter_gather/whole_huge_pages", "hugetlb", whole_huge_pages);
    suite.post_copy("scatter_gather/no_further_before_it_is_complete", "anon", no_further);
    suite.post_copy("scatter_gather/quit_while_it_gathers", "anon", quit_while_it_gathers);
    suite.post_copy("scatter_gather/after_a_refresh", "memfd", after_a_refresh);
    suite.with_page_servers("scatter_gather/unreachable", unreachable);
    suite.with_page_servers("scatter_gather/read_only", read_only);
    suite.with_page_servers("scatter_gather/full", full);
    suite.with_page_servers("scatter_gather/silent_while_it_gathers", silent_while_it_gathers);
    suite.with_page_servers("scatter_gather/replica_dies", replica_dies);
}

/// A page store that is looked at from outside.
trait Store {
    /// Returns `NAME=URL`.
    fn option(&self) -> String;

    /// Returns how many namespaces are in it.
    fn namespaces(&self) -> Result<usize, Failed>;
}

/// A store in a folder of the lab.
struct InFolder {
    name: String,
    folder: PathBuf,
}

impl InFolder {
    fn new(lab: &Lab, name: &str) -> Self {
        Self { name: name.to_owned(), folder: lab.path(&format!("pages-{name}")) }
    }
}

impl Store for InFolder {
    fn option(&self) -> String {
        format!("{}=file:{}", self.name, self.folder.display())
    }

    fn namespaces(&self) -> Result<usize, Failed> {
        let files = fs::read_dir(&self.folder)?.collect::<Result<Vec<_>, _>>()?;
        Ok(files.iter().filter(|file| file.path().extension().is_some_and(|ext| ext == "pages")).count())
    }
}

impl Store for PageServer {
    fn option(&self) -> String {
        format!("{}={}", self.name(), self.url())
    }

    fn namespaces(&self) -> Result<usize, Failed> {
        // a cluster has a set for each of its parts
        let sum = "local n = 0 for _, key in ipairs(redis.call('KEYS', '*:spaces')) do n = n + redis.call('ZCARD', key) end \
                   return n";
        self.count(&format!("EVAL \"{sum}\" 0"))
    }
}

/// Nothing is left in the store, at the latest soon: the last page is here before the store is told.
fn forgotten(store: &dyn Store) -> Outcome {
    wait_for("all namespaces are forgotten", || Ok((store.namespaces()? == 0).then_some(())))
}

struct Way {
    spec: &'static str,
    backing: &'static str,
    sealed: bool,
}

/// Whether all pages are here.
fn gathered(status: &Value) -> bool {
    status["gathering"].is_null()
}

/// What holds of every scatter-gather that has moved its VM.
fn went_through_stores(report: &Value) -> Outcome {
    let pages = |name: &str| number(report, "pages", name);
    let good = report["strategy"] == "scatter-gather" && report["eviction_ms"].as_f64() > Some(0.0);
    ensure(good && pages("cold") == 0, || format!("{report}"))?;
    ensure(pages("stored") > 0 && pages("direct") + pages("stored") == pages("distinct"), || format!("{report}"))?;
    let stores = report["stores"].as_array().ok_or("no stores")?;
    let put: u64 = stores.iter().filter_map(|store| store["pages"].as_u64()).sum();
    ensure(put >= pages("stored"), || format!("{report}"))?;
    let bytes = |store: &Value| store["bytes"].as_u64() == store["pages"].as_u64().map(|pages| pages << 12);
    ensure(stores.iter().all(bytes), || format!("{report}"))
}

fn moves(lab: &Lab, store: &dyn Store, way: Way) -> Outcome {
    let Way { spec, backing, sealed } = way;
    let (option, key) = (store.option(), lab.key("seal-key")?);
    let mut both = vec!["--store", &option];
    if sealed {
        both.extend(["--seal-key-file", &key]);
    }
    let options = [&["--cpus", "2", "--backing", backing], &both[..]].concat();
    let mut source = lab.workload("source", &format!("{spec},for=1500ms"), &options)?;
    ensure(source.status()?["gathering"].is_null(), || "it gathers at home".into())?;
    let destination = lab.receive("destination", &both)?;
    let report = source.migrate_well(&destination.address, &[&SLOW[..], &["--push-order", "hot-first"]].concat())?;
    went_through_stores(&report)?;
    ensure(report["stores"][0]["failed"].is_null(), || format!("{report}"))?;
    let status = destination.wait_until("all is here", |s| gathered(s) && s["workload"]["state"] == "finished")?;
    ensure(status["workload"]["errors"] == 0 && status["workload"]["first_error"].is_null(), || format!("{status}"))?;
    forgotten(store)?;
    destination.quit()
}

/// A guest at work that knows these stores.
fn guest(lab: &Lab, stores: &[&str]) -> Result<Process, Failed> {
    lab.workload("source", GUEST, &named(&["--backing", "anon"], stores))
}

fn calm_guest(lab: &Lab, stores: &[&str]) -> Result<Process, Failed> {
    lab.workload("source", CALM_GUEST, &named(&["--backing", "anon"], stores))
}

fn receiver(lab: &Lab, stores: &[&str]) -> Result<Process, Failed> {
    lab.receive("destination", &named(&[], stores))
}

fn named<'a>(options: &[&'a str], stores: &[&'a str]) -> Vec<&'a str> {
    options.iter().copied().chain(stores.iter().flat_map(|store| ["--store", store])).collect()
}

/// The VM is whole, and works.
fn complete(destination: &Process) -> Outcome {
    destination.wait_until("all is here", gathered)?;
    destination.works()
}

/// The migration is refused for this reason, and the guest works on.
fn refused(source: &Process, to: &Process, options: &[&str], why: &str) -> Outcome {
    refused_by(source, to, &[&SLOW[..], options].concat(), why)
}

fn refused_by(source: &Process, to: &Process, options: &[&str], why: &str) -> Outcome {
    let answer = source.migrate(&to.address, options)?;
    ensure(answer.code == Some(1) && answer.json["outcome"] == "failed", || format!("{answer:?}"))?;
    ensure_says(answer.reason(), why)?;
    ensure(answer.json["downtime_ms"].is_null(), || format!("paused for nothing: {answer:?}"))?;
    source.works()
}

fn two_stores(lab: &Lab) -> Outcome {
    let [a, b] = ["a", "b"].map(|name| InFolder::new(lab, name));
    let (mut source, destination) = (guest(lab, &[&a.option()])?, receiver(lab, &[&a.option(), &b.option()])?);
    // one of them is named for this migration
    let second = b.option();
    let options = [&SLOW[..], &["--store", &second, "--through", "a", "--through", "b"]].concat();
    let report = source.migrate_well(&destination.address, &options)?;
    went_through_stores(&report)?;
    let used = |n: usize| report["stores"][n]["pages"].as_u64() > Some(0);
    ensure(used(0) && used(1), || format!("{report}"))?;
    complete(&destination)?;
    forgotten(&a)?;
    forgotten(&b)?;
    destination.quit()
}

fn source_killed(lab: &Lab) -> Outcome {
    let a = InFolder::new(lab, "a");
    let (mut source, destination) = (calm_guest(lab, &[&a.option()])?, receiver(lab, &[&a.option()])?);
    let options = [&SLOW[..], &["--gather-rate", "80Mbit"]].concat();
    let answer = source.migrate(&destination.address, &options)?;
    source.kill()?;
    ensure(answer.json["outcome"] == "completed", || format!("{answer:?}"))?;
    let status = destination.status()?;
    ensure(status["state"] == "running" && status["gathering"]["source"] == 0, || format!("{status}"))?;
    let missing = status["gathering"]["missing_pages"].as_u64();
    ensure(missing > Some(0) && status["gathering"]["stores"]["a"].as_u64() == missing, || format!("{status}"))?;
    complete(&destination)?;
    forgotten(&a)?;
    destination.quit()
}

fn named_on_one_side(lab: &Lab) -> Outcome {
    let [a, b] = ["a", "b"].map(|name| InFolder::new(lab, name));
    let source = guest(lab, &[&a.option()])?;
    let without = lab.receive("without", &[])?;
    refused(&source, &without, &[], "the destination does not fetch from any")?;
    let other = lab.receive("other", &["--store", &b.option()])?;
    refused(&source, &other, &[], "there is no page store a here")?;
    refused(&source, &other, &["--through", "b"], "there is no page store b here: name it by --store b=URL")?;
    let elsewhere = a.option().replace("pages-a", "pages-c");
    refused(&source, &other, &["--store", &elsewhere], "page store a is named twice")?;
    let few = ["--strategy", "scatter-gather:replicas=2"];
    refused_by(&source, &other, &few, "2 copies of each page go into as many page stores, and there are 1")?;
    // an attempt that fails forgets what it has made
    forgotten(&a)?;
    source.quit()?;
    let source = lab.workload("no-stores", GUEST, &[])?;
    refused(&source, &other, &[], "there is no page store here: name one by --store NAME=URL")?;
    let wrong = source.migrate(&other.address, &["--through", "a"])?;
    ensure(wrong.code == Some(2), || format!("--through without scatter-gather: {wrong:?}"))?;
    source.quit()?;
    without.quit()?;
    other.quit()
}

fn not_the_same(lab: &Lab) -> Outcome {
    let (a, key, other_key) = (InFolder::new(lab, "a"), lab.key("key")?, lab.key("other-key")?);
    let (option, elsewhere) = (a.option(), a.option().replace("pages-a", "pages-b"));
    let sealed = ["--store", &option, "--seal-key-file", &key];
    let source = lab.workload("source", GUEST, &[&["--backing", "anon"], &sealed[..]].concat())?;
    let others = [
        vec!["--store", &option],
        vec!["--store", &option, "--seal-key-file", &other_key],
        vec!["--store", &elsewhere, "--seal-key-file", &key],
    ];
    for (n, other) in others.iter().enumerate() {
        let destination = lab.receive(&format!("destination-{n}"), other)?;
        refused(
            &source,
            &destination,
            &[],
            "page store a is not the same at both ends, or is sealed with another key",
        )?;
        forgotten(&a)?;
        destination.quit()?;
    }
    source.quit()
}

fn in_memory(lab: &Lab) -> Outcome {
    let (code, stdout, stderr) = usage(&["receive", "--listen", "tcp:127.0.0.1:0", "--store", "a=memory:"])?;
    ensure(code == Some(1) && stdout.is_empty(), || format!("{code:?} {stdout}"))?;
    ensure_says(&stderr, "page store a is in the memory of this process (memory:)")?;
    let b = InFolder::new(lab, "b");
    let (source, destination) = (guest(lab, &["a=memory:"])?, receiver(lab, &[&b.option()])?);
    refused(&source, &destination, &["--through", "a"], "the other end cannot read it")?;
    source.quit()?;
    destination.quit()
}

fn whole_huge_pages(lab: &Lab) -> Outcome {
    let a = InFolder::new(lab, "a");
    let options = ["--backing", "hugetlb", "--store", &a.option()];
    let source = lab.workload("source", "random:size=16M", &options)?;
    let destination = receiver(lab, &[&a.option()])?;
    refused(&source, &destination, &[], "cannot fetch single pages")?;
    source.quit()?;
    destination.quit()
}

/// A VM that runs at its destination and gathers slowly, and whose source is gone.
fn gathers_long(lab: &Lab, store: &dyn Store) -> Result<Process, Failed> {
    let (mut source, destination) = (calm_guest(lab, &[&store.option()])?, receiver(lab, &[&store.option()])?);
    let report = source.migrate_well(&destination.address, &LONG)?;
    went_through_stores(&report)?;
    Ok(destination)
}

fn no_further(lab: &Lab) -> Outcome {
    let a = InFolder::new(lab, "a");
    let destination = gathers_long(lab, &a)?;
    let third = lab.receive("third", &[])?;
    let answer = destination.migrate(&third.address, &[])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    ensure_says(answer.reason(), "pages of the VM are missing")?;
    let status = destination.status()?;
    ensure(status["state"] == "running" && !gathered(&status), || format!("{status}"))?;
    destination.quit()?;
    third.quit()
}

fn quit_while_it_gathers(lab: &Lab) -> Outcome {
    let a = InFolder::new(lab, "a");
    let destination = gathers_long(lab, &a)?;
    ensure(a.namespaces()? == 1, || "nothing is in the store".into())?;
    destination.quit()?;
    forgotten(&a)
}

/// The successor knows the stores, too.
fn after_a_refresh(lab: &Lab) -> Outcome {
    let a = InFolder::new(lab, "a");
    let options = ["--backing", "memfd", "--store", &a.option()];
    let mut source = lab.workload("source", GUEST, &options)?;
    let report = source.ask(&["refresh"])?;
    ensure(report["outcome"] == "completed", || format!("{report}"))?;
    source.ended()?;
    let destination = receiver(lab, &[&a.option()])?;
    let answer = source.migrate(&destination.address, &SLOW)?;
    ensure(answer.code == Some(0), || format!("{answer:?}"))?;
    went_through_stores(&answer.json)?;
    complete(&destination)?;
    forgotten(&a)?;
    destination.quit()
}

/// Nobody listens there; or only the destination does not reach it.
fn unreachable(lab: &Lab) -> Outcome {
    let nobody = format!("a=redis+unix:{}", lab.arg("nobody"));
    let (code, _, stderr) = usage(&["receive", "--listen", "tcp:127.0.0.1:0", "--store", &nobody])?;
    ensure(code == Some(1), || format!("{code:?}"))?;
    ensure_says(&stderr, "page store a")?;
    let (here, there) = (PageServer::start(lab, "a", &[])?, PageServer::start(lab, "there", &[])?);
    let destination = receiver(lab, &[&format!("a={}", there.url())])?;
    let source = guest(lab, &[])?;
    refused(&source, &destination, &["--store", &nobody], "page store a")?;
    drop(there);
    refused(&source, &destination, &["--store", &here.option()], "page store a does not answer at the destination")?;
    forgotten(&here)?;
    source.quit()?;
    destination.quit()
}

/// A server that only reads, because it waits for a primary.
fn read_only(lab: &Lab) -> Outcome {
    let server = PageServer::start(lab, "a", &["--replicaof", "127.0.0.1 1"])?;
    let (code, _, stderr) = usage(&["receive", "--listen", "tcp:127.0.0.1:0", "--store", &server.option()])?;
    ensure(code == Some(1), || format!("{code:?}"))?;
    ensure_says(&stderr, "it is a replica, and can be read only")?;
    let (source, destination) = (guest(lab, &[])?, lab.receive("destination", &[])?);
    refused(&source, &destination, &["--store", &server.option()], "it is a replica, and can be read only")?;
    source.quit()?;
    destination.quit()
}

/// What has no room in the store goes directly.
fn full(lab: &Lab) -> Outcome {
    let server = PageServer::start(lab, "a", &["--maxmemory", "12mb", "--maxmemory-policy", "noeviction"])?;
    let (mut source, destination) = (guest(lab, &[&server.option()])?, receiver(lab, &[&server.option()])?);
    let report =
        source.migrate_well(&destination.address, &["--strategy", "scatter-gather", "--bandwidth", "300Mbit"])?;
    ensure(report["stores"][0]["failed"].is_string(), || format!("it was not full: {report}"))?;
    ensure(number(&report, "pages", "direct") > 0, || format!("{report}"))?;
    complete(&destination)?;
    forgotten(&server)?;
    destination.quit()
}

/// The guest waits for a store that does not answer, and `status` says so.
fn silent_while_it_gathers(lab: &Lab) -> Outcome {
    let server = PageServer::start(lab, "a", &[])?;
    let (mut source, destination) = (guest(lab, &[&server.option()])?, receiver(lab, &[&server.option()])?);
    let options = [&SLOW[..], &["--gather-rate", "80Mbit"]].concat();
    source.migrate_well(&destination.address, &options)?;
    server.signal(Signal::SIGSTOP)?;
    let status = destination.wait_until("the guest waits", |s| s["gathering"]["faults"].as_u64() > Some(0))?;
    ensure(status["gathering"]["stores"]["a"].as_u64() > Some(0), || format!("{status}"))?;
    server.signal(Signal::SIGCONT)?;
    complete(&destination)?;
    forgotten(&server)?;
    destination.quit()
}

fn replica_dies(lab: &Lab) -> Outcome {
    let (a, b) = (PageServer::start(lab, "a", &[])?, PageServer::start(lab, "b", &[])?);
    let both = [a.option(), b.option()];
    let both = [both[0].as_str(), both[1].as_str()];
    let (mut source, destination) = (guest(lab, &both)?, receiver(lab, &both)?);
    let options = ["--strategy", "scatter-gather:replicas=2", "--bandwidth", "100Mbit", "--gather-rate", "80Mbit"];
    let report = source.migrate_well(&destination.address, &options)?;
    went_through_stores(&report)?;
    drop(a);
    complete(&destination)?;
    forgotten(&b)?;
    destination.quit()
}
