#!/bin/sh
# hold_check.sh RAILYARD PRELOAD ENGINE PROGRAM CASE NODES GPUS: the case with librailyard.so beside the test engine.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$2" "$folder/librailyard.so"
cp "$3" "$folder/librailyard-engine.so"
LD_PRELOAD="$LD_PRELOAD${LD_PRELOAD:+:}$folder/librailyard.so" "$1" emu -n "$6" -g "$7" -- "$4" "$5" >"$folder/out" 2>&1 && status=0 || status=$?
cat "$folder/out"
if [ "$status" != 0 ] || [ -s "$folder/out" ]; then
    echo "hold_check: exit $status, or output where none was due"
    exit 1
fi
