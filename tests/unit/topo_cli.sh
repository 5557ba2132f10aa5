#!/bin/sh
# topo_cli.sh RAILYARD DATA: `railyard topo` as a user runs it: outputs, exit statuses, and nothing half-written on failure.
set -u
tool=$1 data=$2
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
failed=0

# expect STATUS TEXT-ON-STDERR ARGUMENT...
expect() {
    want=$1 text=$2
    shift 2
    "$tool" topo "$@" >"$dir/out" 2>"$dir/err"
    got=$?
    if [ $got -ne "$want" ]; then
        echo "FAIL: topo $*: exit status $got, expected $want: $(cat "$dir/err")"
        failed=1
    elif [ -n "$text" ] && ! grep -qF -- "$text" "$dir/err"; then
        echo "FAIL: topo $*: no '$text' in: $(cat "$dir/err")"
        failed=1
    elif [ "$want" -eq 1 ] && [ "$(wc -l <"$dir/err")" -ne 1 ]; then
        echo "FAIL: topo $*: not one line: $(cat "$dir/err")"
        failed=1
    fi
}

expect 0 ''
expect 0 '' --help
expect 0 '' --input "$data/rail8-nccl.xml"
grep -q 'mlx5_7 (PIX)' "$dir/out" || { echo "FAIL: no nearest NIC in the table"; failed=1; }
for format in text json xml svg; do
    expect 0 '' -i "$data/numa2-hwloc3.xml" -f $format -o "$dir/$format"
    [ -s "$dir/$format" ] || { echo "FAIL: $format: nothing written"; failed=1; }
    "$tool" topo -i "$data/numa2-hwloc3.xml" -f $format | cmp -s - "$dir/$format" || { echo "FAIL: $format: --output differs"; failed=1; }
done
if command -v lstopo-no-graphics >/dev/null; then
    lstopo-no-graphics -i "$dir/xml" --of console >"$dir/lstopo" 2>&1 && grep -q 'OpenFabrics "mlx5_0"' "$dir/lstopo" ||
        { echo "FAIL: lstopo does not open what --format xml wrote: $(cat "$dir/lstopo")"; failed=1; }
else
    echo "SKIPPED: no lstopo here to open the XML with"
fi

expect 2 "unknown format 'png'" --format png
expect 2 '--input extra' extra
expect 2 '' --no-such-option
expect 1 'No such file' --input "$dir/none.xml"
expect 1 'folder' --input "$dir"
: >"$dir/empty.xml"
expect 1 'empty' --input "$dir/empty.xml"
expect 1 'complete?' --input "$data/truncated-hwloc.xml"
expect 1 'no topology' --input "$data/not-a-topology.xml"
if [ "$(id -u)" -ne 0 ]; then
    cp "$data/rail8-nccl.xml" "$dir/secret.xml" && chmod 000 "$dir/secret.xml"
    expect 1 'Permission denied' --input "$dir/secret.xml"
fi

# on failure the output is as it was: absent, or the old one
mkdir "$dir/o"
expect 1 'complete?' --input "$data/truncated-hwloc.xml" --output "$dir/o/new"
echo old >"$dir/o/kept"
expect 1 'complete?' --input "$data/truncated-hwloc.xml" --output "$dir/o/kept"
[ "$(cat "$dir/o/kept")" = old ] || { echo "FAIL: a failed run changed its output"; failed=1; }
[ "$(ls "$dir/o")" = kept ] || { echo "FAIL: a failed run left: $(ls "$dir/o")"; failed=1; }
expect 1 'cannot write' --output "$dir/no/such/folder"
expect 1 'cannot write' --output "$dir"
[ -e /dev/full ] && expect 1 'No space left' --output /dev/full
exit $failed
