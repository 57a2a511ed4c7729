#!/usr/bin/env bash
# The two commands of the README, set-up included:  ./do demo   and   ./do test
set -euo pipefail
cd "$(dirname "$0")"

# The crate userfaultfd runs bindgen at build time, which loads libclang.
need_libclang() {
    if ldconfig -p 2>/dev/null | grep -q 'libclang[-.0-9]*\.so' || [ -n "${LIBCLANG_PATH:-}" ] ||
        compgen -G '/usr/lib/llvm-*/lib/libclang[-.][0-9s]*' >/dev/null; then
        return
    fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing libclang (needed to build the crate userfaultfd)" >&2
        apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libclang-dev >&2
    else
        cat >&2 <<'EOF'
libclang is missing; the crate userfaultfd needs it at build time. Install it and run this again:
    Debian, Ubuntu:  sudo apt-get install libclang-dev
    Fedora:          sudo dnf install clang-devel
    Arch:            sudo pacman -S clang
EOF
        exit 1
    fi
}

need_rust() {
    command -v cargo >/dev/null && return
    echo "cargo is missing: install Rust from https://rustup.rs and run this again" >&2
    exit 1
}

# The tests of the Redis page store start a server of their own.
need_redis() {
    if command -v redis-server >/dev/null || command -v valkey-server >/dev/null; then return; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing redis-server (its page store's tests start one)" >&2
        # the package would start a service of its own, which nothing here uses
        if apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq redis-server >&2; then
            return
        fi
    fi
    echo "redis-server and valkey-server are missing: the tests that need one are skipped. Install one of them:" >&2
    echo "    Debian, Ubuntu:  sudo apt-get install redis-server" >&2
    echo "    Fedora:          sudo dnf install valkey" >&2
    echo "    Arch:            sudo pacman -S valkey" >&2
}

minivmm() { cargo run --quiet --release --locked -p minivmm -- "$@"; }

case "${1:-}" in
demo) shift; need_rust; need_libclang; minivmm demo "$@" ;;
bench) shift; need_rust; need_libclang; minivmm bench "$@" ;;
eval) shift; need_rust; need_libclang; minivmm eval "$@" ;;
test)
    shift; need_rust; need_libclang; need_redis
    # one runner for all crates; tests that start VMs do not run beside each other
    cargo test --workspace --features migration-transport/test-utils,migration-transport/redis --locked --no-fail-fast "$@" -- --test-threads=2
    ;;
build) shift; need_rust; need_libclang; cargo build --release --locked --workspace "$@" ;;
*)
    echo "usage: ./do demo | test | bench | eval | build" >&2
    exit 2
    ;;
esac
