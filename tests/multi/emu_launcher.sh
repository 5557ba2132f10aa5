#!/bin/bash
# emu_launcher.sh RAILYARD: what `railyard emu` promises about the ranks' environment, their ends, and its own.
railyard=$1
fails=0
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

fail() {
    echo "FAIL: $*"
    fails=$((fails + 1))
}
# is NAME WANTED GOT
is() {
    [ "$2" = "$3" ] || fail "$1: expected '$2', got '$3'"
}
gone() { # no process has this word in its command line, soon
    echo "$1" >"$tmp/word" # grep has it in a file, not in its own command line
    for _ in $(seq 40); do
        grep -lsaF -f "$tmp/word" /proc/[0-9]*/cmdline >"$tmp/left" || return 0
        sleep 0.1
    done
    return 1
}

# torchrun's variables; two nodes are two hosts to NCCL, and hosts of two runs differ
out=$("$railyard" emu -n 2 -g 2 -- sh -c 'echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $GROUP_RANK $NODE_RANK $MASTER_ADDR ${NCCL_HOSTID%-*}' | sort)
is environment "0/4 0/2 0 0 127.0.0.1 emu-node0
1/4 1/2 0 0 127.0.0.1 emu-node0
2/4 0/2 1 1 127.0.0.1 emu-node1
3/4 1/2 1 1 127.0.0.1 emu-node1" "$out"
a=$("$railyard" emu -- sh -c 'echo $NCCL_HOSTID $MASTER_PORT')
b=$("$railyard" emu -- sh -c 'echo $NCCL_HOSTID $MASTER_PORT')
[ "$a" != "$b" ] || fail "two runs share host and port: $a"
out=$(LD_LIBRARY_PATH=/nowhere "$railyard" emu -- sh -c 'echo $LD_LIBRARY_PATH')
case $out in
*/emu:/nowhere) ;;
*) fail "LD_LIBRARY_PATH is $out" ;;
esac
[ -f "${out%%:*}/libnccl.so.2" ] || fail "no libnccl.so.2 in ${out%%:*}"

# ends
"$railyard" emu -n 1 -g 3 -- true || fail "status $? of ranks that ended well"
err=$("$railyard" emu -n 2 -g 2 -- sh -c 'test $RANK != 2 || exit 7; exec sleep 60' 2>&1)
is "status of the rank that failed" 7 $?
case $err in
*"rank 2 (node 1) failed with status 7"*) ;;
*) fail "what was said of rank 2: $err" ;;
esac
err=$("$railyard" emu -g 2 -- sh -c 'test $RANK = 0 || kill -SEGV $$; exec sleep 60' 2>&1)
is "status of the rank that a signal ended" 139 $?
case $err in
*"rank 1 (node 0) was ended by signal 11"*) ;;
*) fail "what was said of rank 1: $err" ;;
esac
start=$SECONDS
"$railyard" emu -g 2 -- bash -c 'test $RANK = 0 || exit 1; trap "" TERM; sleep 60 & wait; sleep 60' 2>/dev/null
is "status when a rank ignores SIGTERM" 1 $?
[ $((SECONDS - start)) -le 10 ] || fail "a rank that ignores SIGTERM lived $((SECONDS - start)) s"

# signals go to the ranks; whatever happens to the launcher, no rank stays
word=railyard-launcher-test-$$
"$railyard" emu -g 2 -- sh -c "sleep 60 & p=\$!; trap 'kill \$p; echo \$RANK >>$tmp/term; exit 5' TERM; : $word; wait" 2>/dev/null &
sleep 0.5
kill -TERM $!
wait $!
is "status after SIGTERM" 143 $?
is "ranks that saw SIGTERM" "0 1" "$(sort "$tmp/term" | xargs)"
"$railyard" emu -g 2 -- sh -c "exec sleep 61.$$" 2>/dev/null &
sleep 0.5
{ kill -KILL $! && wait $!; } 2>/dev/null
gone "61.$$" || fail "ranks outlived their launcher: $(cat "$tmp/left")"

# wrong use
for args in "" "-n 0 -- true" "-g x -- true" "--nic fast -- true" "--nosuch -- true"; do
    # shellcheck disable=SC2086
    "$railyard" emu $args >/dev/null 2>&1
    is "status of 'emu $args'" 2 $?
done
err=$("$railyard" emu -- "$tmp/nothing" 2>&1)
is "status of a program that does not exist" 127 $?
case $err in
*"cannot run $tmp/nothing"*) ;;
*) fail "what was said: $err" ;;
esac

[ $fails = 0 ]
