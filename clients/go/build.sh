#!/bin/sh
# Generates the stubs and builds clients/go/build/headwater-go from Debian's packages, with no network and no module.
# Exits 69 if a tool is missing.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
protos=$here/../../protos
debian=/usr/share/gocode
gopath=$here/build/gopath

missing=
for tool in go protoc protoc-gen-go protoc-gen-go-grpc; do
    command -v "$tool" >/dev/null || missing="$missing $tool"
done
for package in google.golang.org/grpc google.golang.org/genproto google.golang.org/protobuf; do
    [ -d "$debian/src/$package" ] || missing="$missing $package"
done
if [ -n "$missing" ]; then
    echo "build.sh: missing:$missing; run scripts/install-client-toolchains.sh" >&2
    exit 69
fi

mkdir -p "$gopath/src"
# The option go_package names the folder, so the stubs land where the import path says.
protoc -I"$protos" --go_out="$gopath/src" --go-grpc_out="$gopath/src" headwater/sampler/v1/sampler.proto

cd "$here"
GO111MODULE=off GOFLAGS='' GOPATH="$gopath:$debian" CGO_ENABLED=0 go build -o build/headwater-go main.go
