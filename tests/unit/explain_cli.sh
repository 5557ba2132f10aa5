#!/bin/sh
# explain_cli.sh RAILYARD: `railyard explain` as a user runs it: figures that were worked out by hand, pictures, exit statuses.
set -u
tool=$1
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
failed=0

# expect STATUS TEXT ARGUMENT...: TEXT on the output where it succeeds, on one line of errors where it does not
expect() {
    want=$1 text=$2
    shift 2
    "$tool" explain "$@" >"$dir/out" 2>"$dir/err"
    got=$?
    [ "$want" -eq 0 ] && where=$dir/out || where=$dir/err
    if [ $got -ne "$want" ]; then
        echo "FAIL: explain $*: exit status $got, expected $want: $(cat "$dir/err")"
        failed=1
    elif ! grep -qF -- "$text" "$where"; then
        echo "FAIL: explain $*: no '$text' in: $(cat "$where")"
        failed=1
    elif [ "$want" -eq 1 ] && [ "$(wc -l <"$dir/err")" -ne 1 ]; then
        echo "FAIL: explain $*: not one line: $(cat "$dir/err")"
        failed=1
    fi
}
also() {
    grep -qE -- "$1" "$dir/out" || { echo "FAIL: no '$1' in: $(cat "$dir/out")"; failed=1; }
}

expect 0 'explain' --help

# 2 x 2, 100 bytes each: 25 to every rank. Across: 8 messages of 25, or 4 of 50; then half of what came is passed on in the node.
expect 0 '4 ranks on 2 nodes; the plans of all ranks were verified' --uniform 100 --nodes 2 --gpus 2
also 'across nodes +8, 200 B +4, 200 B +4, 200 B$'
also 'in the node +4, 100 B +8, 200 B +8, 200 B$'
also 'busiest node sends across +4, 100 B +2, 100 B +2, 100 B$'
also 'packed by copies +0, 0 B +0, 0 B +0, 0 B$'
also 'staging, rank with most +0 B +256 B +256 B$'
also 'send 50 B to rank 2 \(node 1, rail 0\)'
also 'receive 50 B from rank 2 \(node 1, rail 0\): into staging at 0'
also 'send 25 B to rank 1 in the node: what rank 2 sent, from staging at 25'
also 'receive 25 B from rank 1 in the node: what rank 3 sent'

# the same with segments that lie apart, and with ranks dealt out, whose segments for a node are no neighbours: packed first
expect 0 'copy 25 B of what goes to rank 3 into staging at 25' --uniform 100 --nodes 2 --gpus 2 --apart
also 'packed by copies +0, 0 B +8, 200 B +8, 200 B$'
also 'staging, rank with most +0 B +512 B +512 B$'
expect 0 'copy 25 B of what goes to rank 3 into staging at 25' --uniform 100 --nodes 2 --gpus 2 --dealt
expect 0 'rank 3 of 4 (node 1, rail 1): direct' --uniform 100 --nodes 2 --gpus 2 --strategy direct --rank 3

# balanced: one rank of each node sends all, 600 kB; it gives half to its neighbour, which carries it across on its rail
{ printf '\223NUMPY\001\000v\000%-117s\n' "{'descr': '<u4', 'fortran_order': False, 'shape': (4, 4), }"
    for cell in 0 0 1 1  0 0 0 0  1 1 0 0  0 0 0 0; do
        if [ $cell = 1 ]; then printf '\340\223\004\000'; else printf '\000\000\000\000'; fi
    done
} >"$dir/skew.npy"
expect 0 'send 300 kB to rank 1 in the node: from the segment for rank 3 on' "$dir/skew.npy" --nodes 2 --gpus 2 --strategy balanced
also '^  group 0, inside the node:'
also 'send 300 kB to rank 2 \(node 1, rail 0\)$'
also 'groups +1 +2 +3$'
expect 0 'send 300 kB to rank 3 (node 1, rail 1): what rank 0 sent, from staging at 0' "$dir/skew.npy" --nodes 2 --gpus 2 --strategy balanced --rank 1

# rows of 64 B, every other one new: 2 x 100 rows to the other node, 100 of them distinct, 6400 B and 4 B for each row. That is more
# than a rank's 6400 B, so the relay writes the other rank's rows out; with a quarter distinct it passes on 4000 B.
expect 0 'pack 100 of 200 rows of 64 B for node 1, 7200 B, into staging at 0' --uniform 25600 --nodes 2 --gpus 2 --row-bytes 64
also 'send 7200 B to rank 2 \(node 1, rail 0\): 100 of 200 rows, packed in staging at 0'
also 'receive 7200 B from rank 2 \(node 1, rail 0\): packed, into staging at 7424'
also 'write out 100 of 200 rows that rank 2 packed, 6400 B, from staging at 7424 into staging at 14848'
also 'send 6400 B to rank 1 in the node: what rank 2 sent, written out, from staging at 14848'
also 'write out 100 of 200 rows that rank 2 packed, 6400 B, from staging at 7424 into place'
also 'across nodes +8, 51.2 kB +4, 51.2 kB +4, 51.2 kB +4, 28.8 kB$'
also 'rows written out +0, 0 B +0, 0 B +0, 0 B +8, 51.2 kB$'
expect 0 'send 4000 B to rank 1 in the node: what rank 2 sent, packed' --uniform 25600 --nodes 2 --gpus 2 --row-bytes 64 --distinct 0.25
also 'receive 4000 B from rank 1 in the node: packed, into staging'
expect 0 'hierarchical, 0 copies' --uniform 25600 --nodes 2 --gpus 2 --row-bytes 64 --strategy hierarchical
expect 0 'in 19 messages for other nodes' --uniform 1M --nodes 20 --gpus 2 --row-bytes 64
also 'write out .* of 19 packed messages into place'
# in chunks: of 7 rows to each of two ranks, of which the second's are equal to the first's, the first parts have 3 each
expect 0 'send 1536 B to rank 2 (node 1, rail 0): 7 of 14 rows' --uniform 14336 --nodes 2 --gpus 2 --row-bytes 512 --chunks 2
also 'send 2048 B to rank 2 \(node 1, rail 0\): 7 of 14 rows, packed in staging at 1536'
also '^beside that'
also '^  after group 1:'
also 'across nodes +8, 28.7 kB +4, 28.7 kB +4, 28.7 kB +12, 14.6 kB$'
expect 2 'into 1, 2 or 4 chunks' --uniform 1K --nodes 2 --gpus 2 --row-bytes 64 --chunks 3
expect 2 'by --row-bytes' --uniform 1K --nodes 2 --gpus 2 --chunks 2
expect 2 'by --row-bytes' --uniform 1K --nodes 2 --gpus 2 --strategy dedup
expect 2 'by --row-bytes' --uniform 1K --nodes 2 --gpus 2 --distinct 0.5
expect 2 'no share of rows' --uniform 1K --nodes 2 --gpus 2 --row-bytes 64 --distinct 2
expect 2 'no number of bytes of a row' --uniform 1K --nodes 2 --gpus 2 --row-bytes 0
expect 1 'are too many to prove plans' --uniform 1G --nodes 2 --gpus 2 --row-bytes 1

# uneven nodes: rank 4 of the larger node has local index 4, so its relay on the other is 4 mod 2 = 0: rank 5
expect 0 'send 2000 B to rank 5 (node 1, rail 0)' --uniform 7000 --node-sizes 5,2 --rank 4
expect 0 'rank 9 of 10' --zipf 64K --node-sizes 4,4,2 --all
[ "$(grep -c '^rank ' "$dir/out")" -eq 10 ] || { echo "FAIL: --all shows not 10 plans"; failed=1; }
expect 0 'in 31 messages to ranks in other nodes, 32768 B each: 8, 16, 24,' --uniform 1M --nodes 32 --gpus 8
expect 0 '1 ranks on 1 node;' --uniform 1M --nodes 1 --gpus 1

# from files: a matrix that nothing but the command knows
header() { # SIDES: a version 1.0 header of 128 bytes, as NumPy writes it
    printf '\223NUMPY\001\000v\000%-117s\n' "{'descr': '|u1', 'fortran_order': False, 'shape': ($1), }"
}
{ header '2, 2' && printf '\001\002\003\004'; } >"$dir/m.npy"
expect 0 'send 2 B to rank 1 (node 1, rail 0)' "$dir/m.npy" --nodes 2 --gpus 1
also 'receive 3 B from rank 1 \(node 1, rail 0\)'
also 'across nodes +2, 5 B +2, 5 B +2, 5 B$'
{ header '1, 4' && printf '\001\002\003\004'; } >"$dir/row.npy"
expect 1 'no square matrix' "$dir/row.npy" --nodes 2 --gpus 2
expect 1 'on which nodes' "$dir/m.npy"
expect 1 'a matrix of 2 ranks, but the nodes have 4' "$dir/m.npy" --nodes 2 --gpus 2
expect 1 'No such file' "$dir/none.npy" --nodes 2 --gpus 2
mkdir "$dir/empty"
expect 1 "$dir/empty" "$dir/empty"

# a folder of traces: two ranks on one node, one of which recorded two exchanges of 10 and 30 elements of 2 bytes to the other
mkdir "$dir/trace"
cat >"$dir/trace/trace-h-1.jsonl" <<'END'
{"t":"head","schema":"railyard-trace","version":1,"host":"h","pid":1,"wall_ns":1,"mono_ns":1,"railyard":"0.1.0","nccl":22809,"nccl_path":"x"}
{"t":"comm","comm":"00000000000000aa","rank":0,"nranks":2,"parent":"","name":null,"birth":"init","device":0,"wall_ns":1,"matrix":"none.npy","seat":{"node":"h","host":"h"}}
{"t":"map","comm":"00000000000000aa","rank":0,"nodes":1,"node":[0,0],"hosts":["h"]}
{"t":"x","comm":"00000000000000aa","rank":0,"n":0,"wall_ns":2,"type":"bfloat16","type_bytes":2,"send":[0,10],"recv":[0,7]}
{"t":"x","comm":"00000000000000aa","rank":0,"n":1,"wall_ns":3,"type":"bfloat16","type_bytes":2,"send":[0,30],"recv":[0,7]}
END
expect 0 'communicator 00000000000000aa, the average of 2 exchanges' "$dir/trace"
also 'send 40 B to rank 1 in the node'
also 'receive 14 B from rank 1 in the node'
expect 1 "begins with bb" "$dir/trace" --comm bb
expect 1 'tells the nodes itself' "$dir/trace" --nodes 1 --gpus 2

# pictures: well-formed, one panel for each group, one line for each pair
expect 0 'verified' --uniform 100 --nodes 2 --gpus 2 --svg "$dir/p.svg"
[ "$(grep -c 'group [01]</text>' "$dir/p.svg")" -eq 3 ] || { echo "FAIL: not 3 panels"; failed=1; }
[ "$(grep -c '<title>rank' "$dir/p.svg")" -eq 36 ] || { echo "FAIL: not 16 + 12 + 8 lines"; failed=1; }
expect 0 'verified' --zipf 100K --nodes 40 --gpus 2 --svg "$dir/n.svg"
grep -q '<title>node 3 to 5: ' "$dir/n.svg" || { echo "FAIL: no nodes in the picture of 80 ranks"; failed=1; }
for svg in p n; do
    python3 -c 'import sys, xml.dom.minidom as m; m.parse(sys.argv[1])' "$dir/$svg.svg" || { echo "FAIL: $svg.svg is no XML"; failed=1; }
done
expect 1 'cannot be written' --uniform 100 --nodes 2 --gpus 2 --svg "$dir/no/such/p.svg"
[ -e /dev/full ] && expect 1 'No space left' --uniform 100 --nodes 2 --gpus 2 --svg /dev/full

expect 2 'which matrix' --nodes 2 --gpus 2
expect 2 'go together' --uniform 1K --nodes 2
expect 2 "unknown strategy 'dedup2'" --uniform 1K --nodes 2 --gpus 2 --strategy dedup2
expect 2 'no number of bytes' --uniform 1X --nodes 2 --gpus 2
expect 2 'no number from' --uniform 1K --node-sizes 4,x
expect 1 'on which nodes' --uniform 1K
expect 1 'there is no rank 4' --uniform 1K --nodes 2 --gpus 2 --rank 4
expect 1 'more than 4096 ranks' --uniform 1K --nodes 4096 --gpus 2
exit $failed
