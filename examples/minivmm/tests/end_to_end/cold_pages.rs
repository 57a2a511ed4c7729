//! Cold pages of a VM that are in a page store, from the command line.

use serde_json::Value;

use crate::common::{Lab, Outcome, Suite, ensure, ensure_says, usage};

/// A guest that has filled 48 MiB and works on two of them.
const GUEST: &str = "hot:size=2M,data=40M";

pub(crate) fn add(suite: &mut Suite) {
    for backing in ["anon", "thp", "memfd"] {
        suite.post_copy(format!("cold_pages/agile/{backing}"), backing, move |lab| agile(lab, backing));
    }
    suite.post_copy("cold_pages/limits_by_hand", "anon", limits_by_hand);
    suite.post_copy("cold_pages/refusals", "hugetlb", refusals);
}

fn cold(status: &Value) -> Option<u64> {
    status["paging"]["cold_bytes"].as_u64()
}

fn agile(lab: &Lab, backing: &str) -> Outcome {
    let store = format!("a=file:{}", lab.arg("pages"));
    let destination = lab.receive("b", &["--store", &store])?;
    let kept = ["--backing", backing, "--store", &store, "--cold-store", "a", "--resident-limit", "32M"];
    let mut source = lab.workload("a", GUEST, &kept)?;
    let status = source.wait_until("pages are cold", |status| cold(status) >= Some(8 << 20))?;
    ensure(status["paging"]["limit_bytes"] == 32 << 20, || format!("{status}"))?;
    let report = source.migrate_well(&destination.address, &["--strategy", "agile", "--json"])?;
    ensure(report["strategy"] == "agile", || format!("{report}"))?;
    let status = destination.wait_until("the last page is here", |status| status["gathering"].is_null())?;
    ensure(status["workload"]["errors"] == 0, || format!("{status}"))?;
    destination.works()?;
    destination.quit()
}

fn limits_by_hand(lab: &Lab) -> Outcome {
    let vm = lab.workload("a", GUEST, &["--store", "m=memory:", "--cold-store", "m", "--resident-limit", "off"])?;
    let status = vm.status()?;
    ensure(status["paging"]["store"] == "m" && status["paging"]["cold_bytes"] == 0, || format!("{status}"))?;
    let answer = vm.ask(&["resident-limit", "auto"])?;
    ensure(answer["limit"] == "auto", || format!("{answer}"))?;
    vm.wait_until("the working set is estimated", |status| status["paging"]["working_set_bytes"].is_u64())?;
    vm.ask(&["resident-limit", "32M"])?;
    vm.wait_until("pages are cold", |status| cold(status) > Some(0))?;
    vm.ask(&["resident-limit", "off"])?;
    let status = vm.wait_until("all pages are back", |status| status["paging"]["cold_bytes"] == 0)?;
    ensure(status["workload"]["errors"] == 0, || format!("{status}"))?;
    vm.works()?;
    vm.quit()
}

fn refusals(lab: &Lab) -> Outcome {
    let run = ["run", "--memory", "64M", "--workload", GUEST];
    let (code, _, stderr) = usage(&[&run[..], &["--cold-store", "nowhere"]].concat())?;
    ensure(code == Some(1), || format!("{code:?}: {stderr}"))?;
    ensure_says(&stderr, "nowhere")?;
    let (code, _, stderr) = usage(&[&run[..], &["--resident-limit", "32M"]].concat())?;
    ensure(code == Some(2), || format!("{code:?}: {stderr}"))?;
    let huge = ["--backing", "hugetlb", "--store", "m=memory:", "--cold-store", "m"];
    let (code, _, stderr) = usage(&[&run[..], &huge].concat())?;
    ensure(code == Some(1), || format!("{code:?}: {stderr}"))?;
    ensure_says(&stderr, "use memfd, thp or anon")?;
    let vm = lab.workload("a", GUEST, &[])?;
    let status = vm.status()?;
    ensure(status["paging"].is_null(), || format!("{status}"))?;
    let answer = vm.ctl(&["resident-limit", "32M"])?;
    ensure(answer.code == Some(1), || format!("{answer:?}"))?;
    vm.quit()
}
