#!/bin/sh
# Installs what the Go and TypeScript clients are built with; does nothing that is done already.
#
# Go and protoc are Debian's packages, so root or sudo is needed once. node 20.3 or newer must be there; npm does the rest.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)

# golang-github-golang-protobuf-1-5-dev is named on purpose: left to itself, apt picks 1-3 for golang-google-grpc-dev,
# with which programs compile and then panic at their start.
debian_packages="
    golang-go
    golang-google-grpc-dev
    golang-google-protobuf-dev
    golang-github-golang-protobuf-1-5-dev
    protoc-gen-go-1-5
    protoc-gen-go-grpc
    protobuf-compiler
"

say() {
    echo "install-client-toolchains: $*"
}

fail() {
    say "$*" >&2
    exit 1
}

is_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "needs root or sudo to run: $*"
    fi
}

install_debian_packages() {
    command -v apt-get >/dev/null || fail "Go and protoc come from Debian's packages, and there is no apt-get here"
    missing=
    for package in $debian_packages; do
        is_installed "$package" || missing="$missing $package"
    done
    if [ -z "$missing" ]; then
        say "Debian packages: present"
        return
    fi
    say "Debian packages: installing$missing"
    as_root apt-get update -qq
    # shellcheck disable=SC2086 # a list of words
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
}

install_typescript() {
    folder=$root/clients/typescript
    if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
        fail "TypeScript: install node 20.3 or newer with npm first"
    fi
    # npm writes the hidden lock file last, so it is older than the real one if that changed since.
    installed=$folder/node_modules/.package-lock.json
    if [ -f "$installed" ] && [ ! "$folder/package-lock.json" -nt "$installed" ]; then
        say "TypeScript: present"
        return
    fi
    say "TypeScript: npm ci"
    (cd "$folder" && npm ci --no-audit --no-fund)
}

install_debian_packages
install_typescript
