#!/bin/sh
# Writes src/gen; `npm run generate` calls it with protoc-gen-es on the PATH.
set -eu

cd "$(dirname "$0")"
mkdir -p src/gen
# Beside our own: what a status says beyond its code (ErrorInfo, BadRequest, RetryInfo), and the names of the codes.
protoc -I ../../protos -I node_modules/google-proto-files \
    --es_out=src/gen --es_opt=target=ts,import_extension=js \
    headwater/sampler/v1/sampler.proto google/rpc/code.proto google/rpc/error_details.proto
