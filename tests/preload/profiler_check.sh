#!/bin/sh
# profiler_check.sh PROGRAM CASE ENGINE: profiler_cases with a folder of its own.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$1" "$2" "$3" "$folder/trace"
