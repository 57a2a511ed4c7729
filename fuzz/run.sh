#!/usr/bin/env bash
# Runs every fuzz target for some seconds each:  fuzz/run.sh [seconds, default 30] [target …]
# Installs cargo-fuzz if it is missing; works on a copy of the corpus, so the tree stays clean. What made a target crash is
# left in fuzz/artifacts/<target>. Needs the nightly toolchain, and libclang for migration-kvm (FUZZ_FEATURES= does without).
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-30}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(frames protocol state receiver handshake records)
features=${FUZZ_FEATURES-kvm}

cargo fuzz --version >/dev/null 2>&1 || cargo install cargo-fuzz --locked >&2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
for target in "${targets[@]}"; do
    max_len=4096
    [ "$target" = receiver ] && max_len=16384
    [ "$target" = state ] && max_len=8192
    cp -r "corpus/$target" "$work/$target"
    options=(--no-default-features --features "$features")
    if ! cargo +nightly fuzz build "${options[@]}" "$target" >"$work/log" 2>&1; then
        tail -n 40 "$work/log" >&2
        echo "$target: does not build"
        failed=1
        continue
    fi
    if cargo +nightly fuzz run "${options[@]}" "$target" "$work/$target" -- -max_total_time="$seconds" \
        -rss_limit_mb=1024 -max_len="$max_len" -timeout=20 -print_final_stats=1 >"$work/log" 2>&1; then
        runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/log")
        memory=$(sed -n 's/^stat::peak_rss_mb: *//p' "$work/log")
        echo "$target: ok, $runs runs in $seconds s, peak memory $memory MB, coverage$(grep -o ' cov: [0-9]*' "$work/log" | tail -n 1 | cut -d: -f2)"
    else
        tail -n 60 "$work/log" >&2
        echo "$target: FAILED, see fuzz/artifacts/$target"
        failed=1
    fi
done
exit $failed
