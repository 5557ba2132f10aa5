#!/usr/bin/env python3
"""The engine engaged, on the emulated cluster: never wrong, never a hang. The programs check every byte; here is read what was said.

usage: reissue_test.py CASE RAILYARD FOLDER-OF-THE-PROGRAMS
"""
import atexit
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import steady

CASE, RAILYARD, PROGRAMS = sys.argv[1:4]
PRELOAD = os.path.join(PROGRAMS, "..", "..", "plugin", "librailyard.so")
# The patience also bounds how long ranks may take to meet: not too short where they are slow.
SLOW = 4 if re.search("lib[at]san", subprocess.run(["ldd", PRELOAD], stdout=subprocess.PIPE, text=True, check=False).stdout) else 1
LIMIT = 600  # seconds; the programs end by themselves sooner, and say where they were


def fail(text):
    sys.exit(f"reissue_test: {CASE}: {text}")


def job(program, *args, ranks=4, nodes=2, env=None, status=0, preload=True, wrap=(), links=()):
    """Run it; what it printed, and what Railyard did."""
    argv = [RAILYARD, "emu", "-n", str(nodes), "-g", str(ranks // nodes), *links, *(["--preload"] if preload else []), "--", *wrap,
            os.path.join(PROGRAMS, program), *args]
    settings = {"RAILYARD_LOG": "info", "RAILYARD_STRATEGY": "hierarchical", **(env or {})}
    p = subprocess.Popen(argv, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = p.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        p.terminate()
        out, err = p.communicate()
        fail(f"{program} {' '.join(args)} hangs:\n{out}{err}")
    if p.returncode != status:
        fail(f"{program} {' '.join(args)} ended with {p.returncode} instead of {status}:\n{out}{err}")
    return out, [line for line in err.splitlines() if line.startswith("railyard[")]


def said(lines, text):
    return [line for line in lines if re.search(text, line)]


def expect(lines, text, number=None):
    found = said(lines, text)
    if (number is None and not found) or (number is not None and len(found) != number):
        fail(f"{len(found)} lines say {text!r} instead of {number or 'some'}:\n" + "\n".join(lines))
    return found


def calm(lines):
    """No warning, no error."""
    expect(lines, r" (warning|error): ", 0)


def reissued(out, least=0.0, most=1.0):
    found = re.findall(r"(\d+) exchanges, (\d+) reissued", out)
    if not found:
        fail(f"no result in:\n{out}")
    for made, done in found:
        if not least <= int(done) / int(made) <= most:
            fail(f"{done} of {made} exchanges were reissued, not {least} to {most} of them")
    return sum(int(done) for _, done in found)


def mix(shape, env=None, number="150"):
    out, lines = job("reissue_right", "mix", shape, number, ranks=len(shape), nodes=1, env=env)
    calm(lines)
    return reissued(out, 0.7), lines


def case_even():
    for shape in ("aabb", "abab", "ab"):
        mix(shape)


def case_uneven():
    for shape in ("abb", "aaab", "abbca", "aabcbb"):
        mix(shape, number="100")


def case_eight():
    mix("aaaabbbb", number="80")
    mix("abcabcab", number="80")


def case_odd_shapes():
    """Everybody alone on a node; all on one node."""
    mix("abcd")
    mix("aaaa")


def case_verify():
    """Every third exchange both ways: all equal, all counted."""
    for shape, n in (("aabb", 3), ("abbca", 1)):
        done, lines = mix(shape, {"RAILYARD_VERIFY": str(n)})
        for line in expect(lines, r"\d+ verified", len(shape)):
            hierarchical, verified = map(int, re.search(r"(\d+) hierarchical, (\d+) verified", line).groups())
            if hierarchical < done or verified != -(-hierarchical // n):
                fail(f"{verified} verified, {done} of them after the beginning, every {n}: {line}")


def case_strategies():
    out, lines = job("reissue_right", "plain", "aabb", env={"RAILYARD_STRATEGY": "direct"})
    calm(lines)
    reissued(out, 0, 0)
    agreed = [int(n) for line in expect(lines, "exchanges agreed on", 4) for n in re.findall(r"(\d+) exchanges agreed on", line)]
    if min(agreed) < 50:
        fail(f"direct is agreed on, too: {agreed}")
    out, lines = job("reissue_right", "plain", "aabb", env={"RAILYARD_STRATEGY": "observe"})
    calm(lines)
    reissued(out, 0, 0)
    expect(lines, "exchanges agreed on", 0)
    out, lines = job("reissue_right", "plain", "aabb", env={"RAILYARD_STRATEGY": "auto"})
    calm(lines)
    reissued(out)


def case_balanced():
    """Rails evened out, in stages: any shape of nodes, verified by Railyard itself too; nothing is reissued any other way."""
    for shape, nodes in (("aabb", 2), ("abbca", 3), ("aaab", 2), ("abcd", 4), ("abcabcab", 3)):
        done, lines = mix(shape, {"RAILYARD_STRATEGY": "balanced", "RAILYARD_VERIFY": "7"}, number="80" if len(shape) > 5 else "120")
        for line in expect(lines, r"0 hierarchical, \d+ balanced, \d+ verified", len(shape)):
            balanced, verified = map(int, re.search(r"(\d+) balanced, (\d+) verified", line).groups())
            if balanced < done or verified < done // 7:
                fail(f"{balanced} balanced and {verified} verified of {done}: {line}")


def case_in_place():
    out, lines = job("reissue_right", "in_place", "abba")
    calm(lines)


def case_types():
    """A mismatch of types is no harm, but nothing that is agreed on."""
    out, lines = job("reissue_right", "types", "abba")
    calm(lines)
    reissued(out, 0, 0.5)


def case_verify_scratch():
    """No memory left to compare in: said once, results right."""
    out, lines = job("reissue_right", "mix", "aabb", env={"RAILYARD_VERIFY": "1", "RAILYARD_STAGING": "1M"})
    expect(lines, "warning: verify: exchange .* was not compared", 4)
    expect(lines, "warning", 4)


def case_captured():
    out, lines = job("reissue_right", "captured", "abba")
    calm(lines)
    print(out, end="")


def case_threads():
    out, lines = job("reissue_right", "threads", "abba", "60")
    calm(lines)
    reissued(out, 0.5)


def case_init_all():
    out, lines = job("reissue_right", "init_all", "-", "60", ranks=1, nodes=1)
    calm(lines)
    reissued(out, 0.5)


def confusing(case, shape):
    patience = str(0.5 * SLOW)
    out, lines = job("reissue_confusing", case, shape, ranks=len(shape), nodes=1, env={"RAILYARD_PATIENCE": patience})
    calm(lines)
    print(out, end="")
    for line in expect(lines, "for messages"):
        if float(re.search(r"/ (\d+) us for messages", line).group(1)) > float(patience) * 0.5e6 and case == "drift":
            fail(f"waiting out the patience counts as what messages take: {line}")
    return reissued(out)


def case_strays():
    for shape in ("aabb", "abb"):
        if confusing("strays", shape) < 40:
            fail("little was reissued")


def case_again():
    confusing("again", "abab")


def case_drift():
    confusing("drift", "aabb")


def case_hasty():
    out, lines = job("reissue_confusing", "hasty", "abba", env={"RAILYARD_PATIENCE": str(0.3 * SLOW)})
    calm(lines)
    reissued(out)


def case_churn():
    out, lines = job("reissue_confusing", "churn", "abba")
    calm(lines)
    reissued(out, 0.9)


def case_crossed():
    """Thread against thread: no rank waits for its patience to end."""
    out, lines = job("reissue_confusing", "crossed", "abab", env={"RAILYARD_PATIENCE": "60"})
    calm(lines)
    reissued(out, 0.8)


def ends(case, victim, shape="abab", env=None):
    return job("reissue_ends", case, shape, str(victim), env=env)


def case_aborted():
    for victim in (1, 0):
        ends("aborted", victim)


def case_left_alone():
    for victim in (2, 0):
        ends("left_alone", victim)


def case_killed():
    for victim in (2, 0):
        out, lines = ends("killed", victim)
        if len(re.findall(r"rank \d: .* after", out)) != 3:
            fail(f"not all that are left said how it ended:\n{out}")
        expect(lines, f"warning: communicator [0-9a-f]+: rank {victim}: .*plain NCCL from here")


def case_killed_any():
    for victim in (2, 0, 3, 1):
        out, lines = ends("killed_any", victim)
        if victim and not reissued(out):
            fail(f"those who are left do not engage:\n" + "\n".join(lines))


def case_stopped():
    """A rank, and the yardmaster, stopped for 2.5 times the patience."""
    for victim in (2, 0):
        out, lines = ends("stopped", victim, env={"RAILYARD_PATIENCE": "1"})
        calm(lines)
        print(out, end="")
        if victim and re.search(r"\b0 direct", out):
            fail("the patience did not end")


def case_corrupted():
    for victim in (1, 0):
        out, lines = ends("corrupted", victim, env={"RAILYARD_VERIFY": "1"})
        number, peer, offset = re.search(r"exchange (\d+), rank (\d+), byte (\d+)", out).groups()
        expect(lines, f"warning: .*exchange {number} differs from plain NCCL in what came from rank {peer}, from byte {offset} on", 1)


def case_refused():
    out, lines = ends("refused", 1)
    print(out, end="")


def case_exiting():
    for victim in (1, 0, -1):
        out, lines = ends("exiting", victim)
        expect(lines, " error: (?!.*after its call has returned)", 0)  # that one is right: nobody else makes that exchange


def case_forking():
    # LeakSanitizer does not find what only the threads that a child lacks refer to
    out, lines = ends("forking", 0, env={"ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":detect_leaks=0"})
    calm(lines)


def case_staging():
    out, lines = ends("staging", 0, env={"RAILYARD_STAGING": "1M", "RAILYARD_LOG": "plan"})
    calm(lines)
    expect(lines, "more than RAILYARD_STAGING")
    out, lines = job("reissue_right", "plain", "aabb", env={"RAILYARD_STAGING": "0"})
    calm(lines)


def one_rank_differs(what, seconds="0.2"):
    """plain, with `what` done on rank 2."""
    wrap = ["sh", "-c", f'if [ "$RANK" = 2 ]; then {what}; fi; exec "$@"', "sh"]
    out, lines = job("reissue_right", "plain", "aabb", "50", seconds, wrap=wrap, env={"RAILYARD_PATIENCE": "1"})
    reissued(out, 0, 0)
    expect(lines, "exchanges agreed on", 0)
    return lines


def case_unequal():
    for name, value in (("VERIFY", "5"), ("STAGING", "2M"), ("STRATEGY", "auto"), ("PATIENCE", "2"), ("NODE_COMM", "no"), ("TRANSPORT", "ucx"), ("STRATEGY", "observe")):
        for seconds in ("0.2", "2", "6"):  # on a busy machine ranks may not have met when a short job ends
            lines = one_rank_differs(f"export RAILYARD_{name}={value}", seconds)
            if any("warning" in line for line in lines):
                break
        for line in expect(lines, "warning", 4):
            if "other settings" not in line or not re.search("rank 2 on|than rank 2", line):
                fail(f"does not say which rank differs: {line}")


def case_some_ranks():
    lines = one_rank_differs("unset LD_PRELOAD", "1.5")
    expect(lines, "no word from rank 2 of 4", 3)
    expect(lines, "error", 0)


# ---- equal rows ----

DEDUP = {"RAILYARD_STRATEGY": "dedup"}
SLOW_LINKS = ("--nic", "0.1", "--nic-us", "100")


def crossed(out, kind="go"):
    """The share of the bytes that crossed, of exchanges that the engine did; None where it did none."""
    done, whole, left = map(int, re.search(rf"{kind}: (\d+) of \d+ by the engine, (\d+) bytes crossed as (\d+)", out).groups())
    return left / whole if done and whole else None


def crosses(out, least, most, kind="go"):
    share = crossed(out, kind)
    if share is None or not least <= share <= most:
        fail(f"{kind}: {share} of the bytes crossed, not {least} to {most} of them:\n{out}")


def dedup(case, shape="aabb", *args, env=None, least=1.0):
    out, lines = job("reissue_dedup", case, shape, *map(str, args), ranks=len(shape), nodes=1, env={**DEDUP, **(env or {})})
    calm(lines)
    reissued(out, least)
    return out, lines


def report(folder):
    text = subprocess.run([RAILYARD, "report", folder, "--json", "-"], stdout=subprocess.PIPE, check=True, text=True).stdout
    comm = json.loads(text)["communicators"][0]
    return comm, {d["direction"]: d for d in comm["directions"]}


def searches(folder):
    """How many each rank made."""
    per_rank = {}
    for name in glob.glob(os.path.join(folder, "trace-*.jsonl")):
        with open(name, encoding="utf-8") as f:
            for line in map(json.loads, f):
                if line["t"] == "comm":
                    per_rank.setdefault(line["rank"], [])
                if line["t"] == "rows":
                    per_rank[line["rank"]].append(line)
    return per_rank


def case_dedup_loop():
    """16 different rows each, 32 of them to each rank on average: what goes is left to a third, what returns as it was."""
    for shape in ("aabb", "abab", "abbca"):
        out, _ = dedup("loop", shape, 30, 16)
        crosses(out, 0.1, 0.6)
        crosses(out, 1, 1, "return")
    out, _ = dedup("loop", "aaaabbbb", 10, 16)
    crosses(out, 0.05, 0.3)


def case_dedup_chunks():
    """What one chunk brought is passed on beside the next: over the nodes' communicators and without, and checked against plain."""
    cases = (("aabb", 4, "yes"), ("abab", 4, "no"), ("aaaabbbb", 2, "yes"), ("abbca", 4, "yes"))
    for shape, chunks, node_comm in cases if SLOW == 1 else cases[:2]:
        env = {"RAILYARD_CHUNKS": str(chunks), "RAILYARD_LOG": "plan", "RAILYARD_NODE_COMM": node_comm, "RAILYARD_VERIFY": "4"}
        out, lines = dedup("loop", shape, 40, 16, env=env)
        crosses(out, 0.05, 0.9)  # every fourth exchange is made both ways
        expect(lines, rf": dedup in {chunks} chunks \(")
    out, lines = dedup("loop", "aabb", 10, 16, env={"RAILYARD_CHUNKS": "1", "RAILYARD_LOG": "plan"})
    expect(lines, "chunks", 0)
    # sums come back in the order in which rows lie, not by parts
    _, lines = sums("loop", "aabb", 12, 3, env={"RAILYARD_CHUNKS": "4", "RAILYARD_LOG": "plan"}, least=0.8, most=1)
    expect(lines, "in . chunks", 0)


def case_dedup_verify():
    out, lines = dedup("loop", "abba", 20, 16, env={"RAILYARD_VERIFY": "1"})
    crosses(out, 0.2, 1.6)  # each exchange is made both ways
    for line in expect(lines, r"\d+ verified", 4):
        packed, verified = map(int, re.search(r"(\d+) dedup, (\d+) verified", line).groups())
        if verified != packed:
            fail(f"{verified} verified, not {packed}: {line}")


def case_dedup_padding():
    out, _ = dedup("padding", "aabb", 20)
    crosses(out, 0.38, 0.45)  # 60 % of the rows are zeros


def case_dedup_equal_splits():
    """Rows of 3 KiB that nothing tells of are found as pieces of 1 KiB."""
    folder = tempfile.mkdtemp(prefix="railyard-dedup-")
    atexit.register(shutil.rmtree, folder, True)
    out, _ = dedup("equal_splits", "abab", 20, 24, 64, 1536, env={"RAILYARD_TRACE": folder})
    crosses(out, 0.1, 0.3)
    crosses(out, 1, 1, "return")
    _, ways = report(folder)
    print({k: (w["bytes_saved"], w["searched"]["repeated"], w["searched"]["padding"]) for k, w in ways.items()})
    if ways["return"]["bytes_saved"] or not 0.25 < ways["go"]["searched"]["padding"] < 0.35:
        fail(f"directions are mixed up: {ways}")


def case_dedup_widths():
    for shape in ("aabb", "abbca"):
        dedup("widths", shape, 40, least=0.85)  # none at all where nobody sends anything


def case_dedup_wrong_width():
    for width in ("1000", "96", "65536"):
        out, _ = dedup("loop", "abab", 15, 16, env={"RAILYARD_ROW_BYTES": width})
        crosses(out, 0.1, 1)


def case_dedup_unlike():
    """A rank that takes rows for twice as wide finds less; the others are none the worse for it."""
    out, _ = dedup("unlike", "abab", 40, 8)
    crosses(out, 0.2, 0.8)


def case_dedup_mix():
    """Anything at all, cut into rows of some width."""
    for width in ("32", "0"):
        mix("abbca", {**DEDUP, "RAILYARD_ROW_BYTES": width}, "80")


def case_dedup_captured():
    out, _ = dedup("captured", "abba", 0, 16, least=0.5)
    crosses(out, 0.1, 0.6)


def case_dedup_threads():
    out, lines = job("reissue_right", "threads", "abba", "40", env={**DEDUP, "RAILYARD_ROW_BYTES": "20"})
    calm(lines)
    reissued(out, 0.5)


def case_dedup_staging():
    """No memory for what is packed: direct, and said so."""
    out, lines = job("reissue_dedup", "loop", "aabb", "20", "16", "64", "4096", ranks=4, nodes=1,
                     env={**DEDUP, "RAILYARD_STAGING": "300K", "RAILYARD_LOG": "plan"})
    expect(lines, "more than RAILYARD_STAGING")
    expect(lines, r" (warning|error): ", 0)
    reissued(out, 0.3, 0.99)


def case_dedup_ends():
    for case, victim in (("aborted", 1), ("left_alone", 2), ("killed", 2), ("exiting", 1)):
        ends(case, victim, env={**DEDUP, "RAILYARD_ROW_BYTES": "20"})


def auto(case, *args, links=SLOW_LINKS, env=None, program="reissue_dedup"):
    """On a cluster that was measured, recorded. What was printed, the lines, the folder of the trace."""
    folder = tempfile.mkdtemp(prefix="railyard-dedup-")
    atexit.register(shutil.rmtree, folder, True)
    settings = {"XDG_CACHE_HOME": folder, "RAILYARD_TRACE": os.path.join(folder, "trace"), "RAILYARD_STRATEGY": "auto",
                "RAILYARD_SAMPLE": "1", "RAILYARD_LOG": "plan", **(env or {})}
    job("../../tools/railyard/railyard", "calibrate", "--seconds=1", env={"XDG_CACHE_HOME": folder}, preload=False, links=links)
    out, lines = job(program, case, "aabb", *map(str, args), env=settings, links=links)
    expect(lines, r" (warning|error): ", 0)
    return out, lines, os.path.join(folder, "trace")


def case_dedup_auto():
    """Chosen by itself where the NIC is slow, for what goes and not for what returns."""
    steady.go_first()  # where others take the processors agreeing may take longer than it saves
    for attempt in range(3):
        out, lines, folder = auto("by_itself", 15, 16, 128, 1024)
        if crossed(out):
            break
    crosses(out, 0.05, 0.6)
    expect(lines, ": dedup ")
    comm, ways = report(folder)
    go, back = ways["go"], ways["return"]
    print({k: (w["bytes_cross_node"], w["bytes_saved"], w["bytes_could_save"], w["estimate"]) for k, w in ways.items()})
    if not comm["agreed_on"]["by_strategy"].get("dedup") or not go["packed"] or back["packed"]:
        fail(f"what goes is to go packed, what returns is not: {ways}")
    if not 0.7 < go["searched"]["repeated"] < 1 or back["searched"]["repeated"] > 0.01 or back["bytes_could_save"]:
        fail(f"the searches found something else: {ways}")
    if not go["bytes_cross_node"] > go["bytes_could_save"] >= go["bytes_saved"] > 0.02 * go["bytes_cross_node"]:
        fail(f"saved: {go}")
    if not go["estimate"] or not 0.2 < go["estimate"]["plain_us"] / go["estimate"]["took_us"] < 50:
        fail(f"nothing to compare with: {go}")


def case_dedup_declines():
    """Nothing repeats: hardly ever looked at, and never waited for."""
    out, lines, folder = auto("by_itself", 60, 1 << 30, 128, 1024, links=("--nic", "4"))
    expect(lines, ": dedup ", 0)
    for rank, found in searches(folder).items():
        print(f"rank {rank}: {len(found)} searches")
        if not 3 <= len(found) <= 12 + 360 // 64:
            fail(f"rank {rank} searched {len(found)} of 360 exchanges")
        if max(f["n"] for f in found[:4]) > 30:
            fail(f"rank {rank} is slow to begin: {found[:4]}")


def case_dedup_observe():
    """Nothing is reissued or waited for, and the report says what could be saved."""
    out, lines, folder = auto("by_itself", 30, 32, 128, 1024, links=("--nic", "4"), env={"RAILYARD_STRATEGY": "observe"})
    reissued(out, 0, 0)
    expect(lines, "agreed on", 0)
    comm, ways = report(folder)
    if comm["agreed_on"] or not 0.5 < ways["go"]["bytes_could_save"] / ways["go"]["bytes_cross_node"] < 1:
        fail(f"what could be saved: {ways}")
    if any(w["bytes_saved"] or w["packed"] for w in ways.values()) or ways["return"]["bytes_could_save"]:
        fail(f"nothing was saved: {ways}")


# ---- rows of one token added up on their way back ----

SUM = {**DEDUP, "RAILYARD_COMBINE": "sum"}


def summed(out):
    """Exchanges that came back, those summed, the share of the bytes that crossed."""
    made, done, whole, left = map(int, re.search(r"back: (\d+) exchanges, (\d+) summed, (\d+) bytes crossed as (\d+)", out).groups())
    return made, done, left / whole


def sums(case, shape="aabb", *args, env=None, least=0.0, most=0.0):
    """From `least` to `most` of the exchanges that come back are summed."""
    out, lines = job("reissue_sum", case, shape, *map(str, args), ranks=len(shape), nodes=1, env={**SUM, **(env or {})})
    calm(lines)
    made, done, share = summed(out)
    if not least <= done / made <= most:
        fail(f"{case} {shape} {args}: {done} of {made} exchanges were summed, not {least} to {most} of them:\n" + "\n".join(lines))
    return share, lines


def case_sum_loop():
    """All but the first few, and what crosses is what rows of different tokens take."""
    for shape, k, row, most in (("aabb", 3, 96, 0.75), ("abab", 4, 512, 0.62), ("abbca", 4, 100, 0.95), ("aaaabbbb", 8, 64, 0.45)):
        share, lines = sums("loop", shape, 12, k, row, least=0.8, most=1)
        print(f"{shape}, top {k}: {share:.2f} of the bytes crossed")
        if not 0.1 < share < most:
            fail(f"{shape}, top {k}: {share} of the bytes crossed")
        for line in expect(lines, r", (\d+) summed", len(shape)):
            if int(re.search(r", (\d+) summed", line).group(1)) < 19:
                fail(f"less than is to be: {line}")
    sums("loop", "aabb", 8, 3, env={"RAILYARD_COMBINE": "sum:3"}, least=0.8, most=1)
    sums("idle", "abab", 16, least=0.4, most=1)


def case_sum_exact():
    """Unless somebody asked for it, and where it is not dedup that rows go out by."""
    for env in ({"RAILYARD_COMBINE": "exact"}, {"RAILYARD_STRATEGY": "hierarchical"},
                {"RAILYARD_COMBINE": "sum:2"}, {"RAILYARD_COMBINE": "sum:6"}):
        sums("loop", "aabb", 8, env=env)


def case_sum_refuses():
    cases = (("many_twins", 0.5), ("zeros", 0.5), ("drops", 0.5), ("unequal", 0), ("equal", 0.5), ("types", 0.25))
    for i, (case, most) in enumerate(cases):
        shapes = ("aabb", "abbca")
        for shape in shapes if SLOW == 1 else shapes[i % 2:i % 2 + 1]:  # under sanitizers each case and each shape once at least
            sums(case, shape, 16, least=most * 0.6, most=most)


def case_sum_twins():
    """Tokens with the same bytes: the others' rows are summed all the same."""
    for shape in ("aabb", "abbca"):
        sums("twins", shape, 16, least=0.8, most=1)


def case_sum_outstanding():
    sums("nested", "abab", 16, least=0.3, most=0.5)
    sums("unanswered", "aabb", 24, least=0.55, most=0.67)


def case_sum_settings():
    for name, words in (("sums", "none of exact, sum, and sum:K"), ("sum:1", "none of exact, sum, and sum:K")):
        out, lines = job("reissue_sum", "loop", "aabb", "4", env={**SUM, "RAILYARD_COMBINE": name})
        expect(lines, f"error: RAILYARD_COMBINE: .*{name}.*{words}.*Taken as exact", 4)
        if summed(out)[1]:
            fail("summed all the same")
    for value in ("sum", "sum:4"):
        lines = one_rank_differs(f"export RAILYARD_COMBINE={value}")
        for line in expect(lines, "warning", 4):
            if "other settings" not in line:
                fail(f"does not say which rank differs: {line}")


def case_sum_verify():
    """What is summed is not compared, all else is; said once."""
    share, lines = sums("loop", "abba", 8, env={"RAILYARD_VERIFY": "1"}, least=0.7, most=1)
    expect(lines, "exchanges that are summed differ from plain NCCL", 1)
    for line in expect(lines, r"\d+ verified", 4):
        packed, done, verified = map(int, re.search(r"(\d+) dedup, (\d+) summed, (\d+) verified", line).groups())
        if verified != packed:
            fail(f"{verified} verified, not {packed}: {line}")


def case_sum_staging():
    """Not enough memory to sum in, or to keep anything: exact."""
    for size in ("200K", "1M"):
        out, lines = job("reissue_sum", "loop", "aabb", "8", "3", "1024", env={**SUM, "RAILYARD_STAGING": size})
        expect(lines, r" (warning|error): ", 0)


def case_sum_ends():
    """Whatever is kept for returns that never come."""
    for case, victim in (("aborted", 1), ("left_alone", 2), ("killed", 2), ("exiting", 1)):
        ends(case, victim, env={**SUM, "RAILYARD_ROW_BYTES": "20"})


def case_sum_mix():
    """Anything at all, to the bit, as nothing of it was equal on its way out."""
    for width in ("32", "0"):
        mix("abbca", {**SUM, "RAILYARD_ROW_BYTES": width}, "80")


def case_sum_auto():
    """Chosen by itself where the NIC is slow."""
    steady.go_first()
    for attempt in range(3):
        out, lines, folder = auto("by_itself", 12, 4, 4096, program="reissue_sum", links=("--nic", "0.3", "--nic-us", "100"),
                                  env={"RAILYARD_COMBINE": "sum"})
        made, done, share = summed(out)
        if done:
            break
    expect(lines, ": sum ")
    print(f"{done} of {made} summed, {share:.2f} of the bytes crossed")
    if done < made / 4 or share > 0.9:
        fail(f"{done} of {made} summed, {share} of the bytes crossed")


def case_sum_report():
    """The report says what was saved."""
    folder = tempfile.mkdtemp(prefix="railyard-sum-")
    atexit.register(shutil.rmtree, folder, True)
    settings = {"XDG_CACHE_HOME": folder, "RAILYARD_TRACE": os.path.join(folder, "trace"), "RAILYARD_STRATEGY": "dedup",
                "RAILYARD_COMBINE": "sum"}
    out, lines = job("reissue_sum", "loop", "aabb", "8", "4", "1024", env=settings)
    calm(lines)
    made, done, share = summed(out)
    comm, ways = report(os.path.join(folder, "trace"))
    print(ways["return"])
    if comm["agreed_on"]["by_strategy"].get("sum") != done or ways["return"]["summed"] != 4 * done:
        fail(f"{done} were summed, the report says {comm['agreed_on']['by_strategy']} and {ways['return']}")
    if not 0.1 < ways["return"]["bytes_saved"] / ways["return"]["bytes_cross_node"] < 0.8:
        fail(f"saved: {ways['return']}")


# ---- several communicators at once ----


def skip_if_unsteady():
    if steady.unsteady():
        print(f"reissue_test: {CASE}: SKIPPED: others take the processors, and agreeing takes longer than it saves")
        sys.exit(77)



BESIDE = r"communicator (\w+), exchange \d+: .*, beside ([\d.]+) MB of other communicators \(a byte takes the NICs ([\d.]+) times as long\)"


def beside(case, seconds, kib, links=("--nic", "2"), env=None, preload=True):
    """What the short exchanges took, half of them at most, in us; the lines."""
    out, lines = job("reissue_beside", case, "aabb", str(seconds), str(kib), env={"RAILYARD_ROW_BYTES": "1024", "RAILYARD_LOG": "plan", **(env or {})},
                     links=links, preload=preload)
    calm(lines)
    print(out, end="")
    return float(re.search(r"half took (\d+) us", out).group(1)), lines


def case_beside():
    """Manifests tell of what other communicators have on the NICs, and the report names it; nothing is told where they take turns."""
    for when in ("together", "apart") if SLOW == 1 else ("together",):
        folder = tempfile.mkdtemp(prefix="railyard-beside-")
        atexit.register(shutil.rmtree, folder, True)
        trace = os.path.join(folder, "trace")
        _, lines = beside(when, 1, 256, env={"RAILYARD_TRACE": trace, "RAILYARD_SAMPLE": "1"})
        told = {m.group(1): m for m in (re.search(BESIDE, line) for line in lines) if m}
        text = subprocess.run([RAILYARD, "report", trace, "--json", "-"], stdout=subprocess.PIPE, check=True, text=True).stdout
        shares = {c["id"]: c["beside"] for c in json.loads(text)["communicators"]}
        print(when, {k: m.groups()[1:] for k, m in told.items()}, shares)
        if when == "apart":
            if told or any(shares.values()) or said(lines, "of their time beside them"):
                fail("communicators that take turns are said to be beside each other")
            continue
        if len(shares) != 2 or set(told) != set(shares):
            fail("both communicators are to be told of")
        if not all(0.05 < v <= 1 for v in shares.values()):
            fail("each ran beside the other, part of the time")
        expect(lines, r"other communicators' ran \d+ % of their time beside them", 8)


def case_beside_short():
    """Long exchanges that auto makes by dedup, and short ones on another communicator: these take no longer than they do with plain NCCL."""
    steady.go_first()
    folder = tempfile.mkdtemp(prefix="railyard-beside-")
    atexit.register(shutil.rmtree, folder, True)
    job("../../tools/railyard/railyard", "calibrate", "--seconds=1", env={"XDG_CACHE_HOME": folder}, preload=False, links=("--nic", "0.5"))
    slow = []
    for attempt in range(4):
        plain, _ = beside("together", 1, 256, links=("--nic", "0.5"), preload=False)
        us, lines = beside("together", 1, 256, links=("--nic", "0.5"), env={"XDG_CACHE_HOME": folder, "RAILYARD_STRATEGY": "auto"})
        if us > 2 * plain + 1000:
            slow.append(f"{us:.0f} us, with plain NCCL {plain:.0f} us")
        elif said(lines, ": dedup "):
            return
    skip_if_unsteady()
    fail(f"short exchanges took {slow} beside long ones" if slow else "the long ones were never made by dedup")


def case_pace():
    """What little dedup saves here is held against the pace of plain NCCL, which is watched for that: both are measured."""
    steady.go_first()
    for attempt in range(3):
        out, lines, _ = auto("long", 3, 128, 384, program="reissue_beside", links=("--nic", "0.2"), env={"RAILYARD_ROW_BYTES": "1024"})
        watched = said(lines, r"the next \d+ pass by, to see how fast plain NCCL goes")
        found = said(lines, r"the time from one exchange to the next is [\d.]+ % of what it is without agreeing")
        ratios = [float(re.search(r"is ([\d.]+) %", line).group(1)) for line in found]
        print(len(watched), ratios)
        if ratios:
            break
    if not watched:  # too slow for dedup to be worth its price
        skip_if_unsteady()
    if not watched or not ratios or not all(20 < v < 500 for v in ratios):
        fail(f"plain NCCL was watched {len(watched)} times, paces of {ratios} %")


# ---- communicators of the nodes' ranks ----

OVER = r"; (\d+) over communicators of the nodes' ranks"


def node(case, shape="abab", victim=1, env=None):
    return job("reissue_node", case, shape, str(victim), ranks=len(shape), nodes=1, env=env)


def case_node_used():
    """Made once, by all that have neighbours, and used from then on."""
    for shape, env in (("abab", None), ("aabbc", None), ("abbab", {**DEDUP, "RAILYARD_ROW_BYTES": "20"}), ("aabb", {"RAILYARD_VERIFY": "4"})):
        out, lines = node("used", shape, env=env)
        calm(lines)
        reissued(out, 1)
        for line in expect(lines, "exchanges agreed on", 3 * len(shape)):
            done, over = (int(re.search(what, line).group(1)) for what in (r", (\d+) hierarchical", OVER))
            done += sum(int(n) for n in re.findall(r", (\d+) dedup", line))
            if over != done - 9:
                fail(f"not all after the first 9: {line}")


def case_node_unused():
    """Switched off, failed on one rank, or an NCCL that cannot: as if there were none."""
    out, lines = node("off", env={"RAILYARD_NODE_COMM": "no"})
    calm(lines)
    for victim in (1, 0):
        out, lines = node("refused", victim=victim)
        expect(lines, " warning: ", 1)
        expect(lines, "warning: .*what is passed on inside the node stays on it: ncclCommSplit", 1)
        expect(lines, OVER, 0)


def case_node_aborted():
    for victim in (2, 0):
        node("aborted", victim=victim)


def case_node_splitting():
    """A rank does not come to the split."""
    for victim in (1, 0):
        node("aborted_splitting", victim=victim)
        out, lines = node("killed_splitting", victim=victim)
        expect(lines, OVER, 0)


# ---- twin communicators ----

REPLICA = {"RAILYARD_STRATEGY": "replica"}


def replica(case, shape, twins, *args, env=None, links=(), status=0):
    return job("reissue_replica", case, shape, str(twins), *map(str, args), ranks=len(shape), nodes=1, env={**REPLICA, **(env or {})},
               links=links, status=status)


def case_replica_eight():
    """Eight twins on two nodes: an eighth of the bytes cross the slow links, bit for bit the same comes out."""
    out, lines = replica("loop", "a" * 8 + "b" * 8, 8, 15, links=("--nic", "0.4", "--nic-us", "100"))
    calm(lines)
    reissued(out, 1)
    print(out, end="")
    crosses(out, 1 / 8, 1 / 8 + 0.0005)
    expect(lines, "is one of 8 twins")


def case_replica_shapes():
    """Several ranks of a twin on a node, odd numbers, chunks; ranks in any order."""
    for shape, twins, chunks in (("aabb", 2, 4), ("abab", 2, 1), ("aaabbb", 3, 2), ("aaaabbbb", 2, 4), ("aabbcc", 2, 0), ("aaaabb", 2, 2)):
        out, lines = replica("loop", shape, twins, 12, env={"RAILYARD_CHUNKS": str(chunks)})
        calm(lines)
        reissued(out, 1)
        crosses(out, 1 / twins, 1 / twins + 0.0005)


def case_replica_changing():
    """Equality comes and goes: each exchange goes right by itself."""
    for shape, twins in (("aabb", 2), ("aaabbb", 3)):
        out, lines = replica("changing", shape, twins, 12)
        calm(lines)


def case_replica_verify():
    out, lines = replica("loop", "aaaabbbb", 2, 12, env={"RAILYARD_VERIFY": "1"})
    calm(lines)
    reissued(out, 1)
    for line in expect(lines, r"\d+ verified", 8):
        done, verified = map(int, re.search(r"(\d+) by replica, (\d+) verified", line).groups())
        if verified != done:
            fail(f"not all verified: {line}")


def case_replica_alone():
    """No twins, whatever is asked for: nothing is made, sent or said. Nor on one node alone."""
    for env in ({}, {"RAILYARD_STRATEGY": "auto"}):
        out, lines = replica("alone", "ab", 1, 30, env=env)
        calm(lines)
        expect(lines, "twin", 0)
    out, lines = replica("alone", "aa", 2, 30, env={"RAILYARD_STRATEGY": "auto"})
    expect(lines, "twin", 0)


def case_replica_auto():
    """Chosen by itself where the bytes are equal and links are slow, and not where they are not."""
    folder = tempfile.mkdtemp(prefix="railyard-replica-")
    atexit.register(shutil.rmtree, folder, True)
    env = {"RAILYARD_STRATEGY": "auto", "RAILYARD_LOG": "plan", "XDG_CACHE_HOME": folder, "RAILYARD_SAMPLE": "1"}
    links = ("--nic", "0.2", "--nic-us", "100")
    for attempt in range(3):
        steady.go_first()
        out, lines = replica("by_itself", "aabb", 2, 150, env=env, links=links)
        calm(lines)
        if reissued(out) >= 60:
            break
    print(out, end="")
    reissued(out, 0.4)
    expect(lines, r"was never measured")
    job("../../tools/railyard/railyard", "calibrate", "--seconds=0.5", "--no-ucx", env={"XDG_CACHE_HOME": folder}, preload=False, links=links)
    out, lines = replica("unlike", "aabb", 2, 100, env=env, links=links)
    calm(lines)
    expect(lines, r"2 ranks on 2 nodes were not measured by themselves: links are taken to be as on 2 nodes, 4 ranks")
    expect(lines, r"was never measured", 0)
    expect(lines, r"sends other bytes")
    expect(lines, r"replica in", 0)


def case_replica_fewer():
    out, lines = replica("fewer", "aaabbb", 3)
    calm(lines)
    print(out, end="")
    if len(expect(lines, "is one of 3 twins")) < 6 or len(expect(lines, "is one of 2 twins")) < 4:
        fail("not all say so")


def case_replica_mixed():
    """Both agreements at once, and none of them for long."""
    for shape, twins, links in (("aaaabbbb", 2, ("--nic", "0.1", "--nic-us", "1000")), ("aabb", 2, ()), ("aaabbbb", 3, ())):
        for env in ({"RAILYARD_STRATEGY": "auto", "RAILYARD_SAMPLE": "1"}, {"RAILYARD_VERIFY": "2"}):
            out, lines = replica("mixed", shape, twins, 200 // SLOW, env=env, links=links)
            calm(lines)
            print(shape, env, out, end="")


def case_replica_switching():
    out, lines = replica("switching", "aaaabbbb", 2)
    calm(lines)
    for line in expect(lines, r"exchanges agreed on", 8):
        alone, together = map(int, re.search(r"(\d+) hierarchical, (\d+) by replica", line).groups())
        if alone < 10 or together < 50:
            fail(f"not both: {line}")


def case_replica_stops():
    """A twin that comes no more costs its share of the patience, once."""
    for victim in (1, 0):
        out, lines = replica("stops", "aaabbb", 3, 30, victim, env={"RAILYARD_PATIENCE": str(4 * SLOW)})
        expect(lines, " error: ", 0)
        print(out, end="")


def case_replica_killed():
    for victim in (1, 3, 0):
        out, lines = replica("killed", "aabb", 2, 30, victim)
        if len(re.findall(r"rank \d: (failed|went on) after", out)) != 3:
            fail(f"not all that are left said how it ended:\n{out}")


def case_replica_aborted():
    for victim in (1, 0):
        replica("aborted", "aabb", 2, 0, victim)


def case_replica_making():
    out, lines = replica("making", "aabb", 2, 0, 1)
    calm(lines)


# ---- calls that return before their exchanges are carried out ----

AFTER = r"; (\d+) after their calls had returned"


def later(case, shape="abab", *args, env=None, status=0):
    return job("reissue_later", case, shape, *map(str, args), env=env, status=status)


def given_away(lines, ranks=4, least=1):
    for line in expect(lines, "exchanges agreed on", ranks):
        found = re.search(AFTER, line)
        if not found or int(found.group(1)) < least:
            fail(f"not enough was given away: {line}")


def case_later_at_once():
    for shape, env in (("abab", None), ("aabb", {**DEDUP, "RAILYARD_ROW_BYTES": "20"}), ("abab", {"RAILYARD_STRATEGY": "direct"})):
        out, lines = later("at_once", shape, env=env)
        calm(lines)
        given_away(lines, least=4)


def case_later_ahead():
    for env in (None, {**DEDUP, "RAILYARD_ROW_BYTES": "32"}, {"RAILYARD_VERIFY": "3"}, {"RAILYARD_STRATEGY": "direct"}):
        out, lines = later("ahead", "aabb", env=env)
        calm(lines)
        given_away(lines, 8, 40)
        print(out, end="")


def case_later_chained():
    for env in (None, {"RAILYARD_STRATEGY": "direct"}):
        out, lines = later("chained", env=env)
        calm(lines)
        given_away(lines, least=70)


def case_later_aborted():
    for victim in (1, 0):
        out, lines = later("aborted", "abab", victim)
        expect(lines, " error: ", 0)
        out, lines = later("aborted_one", "abab", victim)
        expect(lines, " error: ", 0)


def case_later_killed():
    for victim in (2, 0):
        later("killed", "abab", victim)  # whether a line says so depends on who notices first
        out, lines = later("killed_unnoticed", "abab", victim, env={"RAILYARD_PATIENCE": str(2 * SLOW)})
        expect(lines, " error: .*fails on rank . after its call has returned.*RAILYARD_HOLD=yes", 3)


def case_later_stuck():
    out, lines = later("stuck", "aabb", env={"RAILYARD_PATIENCE": "0.5"})
    expect(lines, r" error: communicator [0-9a-f]+, exchange \d+ could not be enqueued for \d+ s.*RAILYARD_HOLD=yes", 4)


def case_later_frees():
    for victim in (1, 0):
        out, lines = later("frees", "abab", victim)
        calm(lines)


def case_later_lazy():
    """Modules loaded at first use would keep Railyard's thread from launching: held, as said once by each rank."""
    out, lines = job("reissue_right", "mix", "aabb", "50", env={"CUDA_MODULE_LOADING": "LAZY"})
    expect(lines, "warning: RAILYARD_HOLD=no needs CUDA_MODULE_LOADING=EAGER, which is LAZY", 4)
    expect(lines, "warning", 4)
    expect(lines, AFTER, 0)
    out, lines = job("reissue_right", "mix", "aabb", "50", env={"RAILYARD_HOLD": "yes", "CUDA_MODULE_LOADING": "LAZY"})
    calm(lines)
    expect(lines, AFTER, 0)


def case_later_recorded():
    """A trace has each exchange once, with its duration where that was sampled."""
    folder = tempfile.mkdtemp(prefix="railyard-later-")
    atexit.register(shutil.rmtree, folder, True)
    out, lines = job("reissue_right", "mix", "aabb", "100", env={"RAILYARD_TRACE": folder, "RAILYARD_SAMPLE": "2"})
    calm(lines)
    given_away(lines, least=50)
    for name in glob.glob(os.path.join(folder, "trace-*.jsonl")):
        with open(name, encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
        numbers = [line["n"] for line in lines if line["t"] == "x"]
        took = [line["n"] for line in lines if line["t"] == "us"]
        if sorted(numbers) != list(range(len(numbers))) or len(numbers) < 100:
            fail(f"{name}: exchanges {numbers}")
        if len(took) < 30:
            fail(f"{name}: only {len(took)} durations")


def redirected(case, shape="aabb", *args, env=None, least=0.6):
    """Layers, `least` of them redirected."""
    out, lines = job("reissue_redirect", case, shape, *map(str, args), ranks=len(shape), nodes=1, env=env)
    made, moved = map(int, re.search(r"(\d+) layers, (\d+) redirected", out).groups())
    if not least <= moved / made <= (0 if case == "refused" else 1):
        fail(f"{case} {shape} {args}: {moved} of {made} layers were redirected, not {least}:\n{out}")
    return lines


def case_redirect_engaged():
    """However exchanges are carried out, every row is where it is to be."""
    cases = (("abbca", 4, 50, {}), ("aaabbb", 5, 256, {"RAILYARD_STRATEGY": "dedup", "RAILYARD_VERIFY": "1"}), ("aabb", 2, 514, {"RAILYARD_STRATEGY": "balanced"}),
             ("aabb", 3, 96, {}), ("abab", 2, 1030, {"RAILYARD_VERIFY": "2"}), ("abcd", 1, 16, {}), ("aabb", 3, 128, {"RAILYARD_STRATEGY": "dedup"}))
    for shape, k, row, env in cases if SLOW == 1 else cases[:3]:
        lines = redirected("engaged", shape, 30, k, row, env=env)
        calm(lines)
        expect(lines, r"exchanges agreed on, [1-9]" if not env.get("RAILYARD_STRATEGY") else ", [1-9][0-9]+ " + env["RAILYARD_STRATEGY"], len(shape))
    calm(redirected("paused", "aabb", 12))


def case_redirect_plain():
    """Nothing but this is done to exchanges: the communicator is observed, or all goes direct."""
    for shape, env in (("aabb", {"RAILYARD_STRATEGY": "auto"}), ("abba", {"RAILYARD_STRATEGY": "direct"})):
        calm(redirected("from_start", shape, 60, env=env, least=0.2))


def case_redirect_sum():
    """Returns are summed, but not those of what was redirected."""
    for shape in ("aabb", "abbca"):
        lines = redirected("only_moves", shape, 40, 3, 192, env={**SUM, "RAILYARD_COMBINE": "sum:3"})
        calm(lines)
        expect(lines, r", 1[0-9][0-9] dedup", len(shape))  # dispatch and what goes back to experts
        expect(lines, r", \d+ summed", 0)


def case_redirect_refused():
    for env in ({"RAILYARD_STRATEGY": "observe"}, {"RAILYARD_STAGING": "1K"}, {"RAILYARD_HOLD": "no", "CUDA_MODULE_LOADING": "EAGER"}):
        redirected("refused", "aabb", env=env, least=0)
    lines = redirected("wrong", "aabb")
    expect(lines, "error: .*it was to be redirected: it is of other counts than was said", 4)


def main(cases=globals()):
    case = cases.get("case_" + CASE)
    if not case:
        fail("there is no such case")
    case()
    print(f"{CASE}: ok")


if __name__ == "__main__":
    main()
