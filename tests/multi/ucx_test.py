#!/usr/bin/env python3
"""What crosses nodes carried by UCX, on the emulated cluster: every byte right, whoever fails; NCCL where a rank cannot.

usage: ucx_test.py CASE RAILYARD FOLDER-OF-THE-PROGRAMS     (as reissue_test.py, whose programs these are)
"""
import glob
import json
import os
import re

import reissue_test as r
from reissue_test import PROGRAMS, SLOW, calm, dedup, ends, expect, fail, job, mix, reissued, replica

WAYS = ("ucx", "ucx-staged")
SHIM = os.path.join(PROGRAMS, "libno_ucx_data.so")


def by(transport, **env):
    return {"RAILYARD_TRANSPORT": transport, "RAILYARD_VERIFY": "1", **env}


def carried(lines, ranks):
    """Bytes that UCX carried, of all ranks; None where it did not carry most of what was reissued: ranks meet, and get memory, meanwhile."""
    done = [sum(int(n) for n in re.findall(r"(\d+) (?:hierarchical|balanced|dedup|by replica)", line)) for line in expect(lines, "exchanges agreed on", ranks)]
    told = [re.search(r"nodes in (\d+) of these, (\d+) bytes", line) for line in r.said(lines, "UCX carried")]
    if len(told) < ranks or min(int(t.group(1)) for t in told) < max(done) / 2:
        return None
    return sum(int(t.group(2)) for t in told)


def until(run, sizes, ranks):
    """What run(size) gives of the first size that is large enough for UCX to carry most of it, and the bytes that it carried."""
    for size in sizes:
        out, lines = run(size)
        done = carried(lines, ranks)
        if done is not None:
            return out, lines, done
    return fail("UCX does not carry it:\n" + "\n".join(lines))


def verified(lines, done):
    for line in expect(lines, r"\d+ verified"):
        if int(re.search(r"(\d+) verified", line).group(1)) < done:
            fail(f"not all {done} were compared with plain NCCL: {line}")


def case_right():
    """Any exchange, by relays and balanced, between nodes of any size; every one compared with plain NCCL."""
    shapes = (("abbca", "hierarchical"), ("abbca", "balanced"), ("aabb", "hierarchical"), ("abcd", "hierarchical"), ("aaab", "balanced"))
    for transport in WAYS:
        for shape, strategy in shapes[:5 if SLOW == 1 else 2] if transport == "ucx-staged" else shapes[:2 if SLOW == 1 else 1]:
            done, lines, _ = until(lambda n: mix(shape, by(transport, RAILYARD_STRATEGY=strategy), number=str(n)), (60, 300, 1500), len(shape))
            verified(lines, done)


def case_dedup():
    """Packed messages, whole and in chunks; a third of the bytes crosses."""
    cases = (("aabb", "4", "yes"), ("abbca", "1", "yes"), ("abab", "2", "no"))
    for transport in WAYS:
        for shape, chunks, node_comm in cases[:3 if SLOW == 1 else 2] if transport == "ucx-staged" else cases[:1 if SLOW == 1 else 0]:
            env = by(transport, RAILYARD_CHUNKS=chunks, RAILYARD_NODE_COMM=node_comm)
            out, lines, done = until(lambda n: dedup("loop", shape, n, 16, env=env), (20, 100, 500), len(shape))
            whole = sum(int(n) for n in re.findall(r"(\d+) bytes crossed as", out))
            verified(lines, 40)
            print(f"{transport} {shape}: {done / whole:.2f} of the bytes crossed")
            if not 0.2 < done / whole < 0.9:  # what returns is not packed
                fail(f"{done} of {whole} bytes crossed")


def case_replica():
    for transport in WAYS:
        out, lines, _ = until(lambda n: replica("loop", "aaaabbbb", 2, n, env=by(transport)), (20, 100, 500), 8)
        calm(lines)
        verified(lines, 20)


def case_large():
    """Messages of many chunks."""
    env = by("ucx-staged", RAILYARD_STRATEGY="hierarchical", RAILYARD_STAGING="1G")
    out, lines, done = until(lambda n: dedup("loop", "aabb", n, 64, 768, 2048, env=env, least=0.1), (8, 40), 4)
    if done < 10 << 20:
        fail("these are not large")


def case_later():
    """On Railyard's thread, after the job's call has returned."""
    for transport in WAYS:
        env = by(transport, RAILYARD_HOLD="no", CUDA_MODULE_LOADING="EAGER")
        done, lines, _ = until(lambda n: mix("aabb", env, number=str(n)), (120, 600, 1500), 4)
        verified(lines, done)
        expect(lines, "after their calls had returned", 4)


def case_threads():
    for transport in WAYS:
        out, lines = job("reissue_right", "threads", "abba", "60", env=by(transport))
        calm(lines)
        reissued(out, 0.5)


def case_ends():
    """Aborts, exits, a byte that arrives wrong."""
    for case, victim in (("aborted", 1), ("exiting", 1)):
        ends(case, victim, env=by("ucx-staged", RAILYARD_VERIFY="0"))
    out, lines = ends("corrupted", 1, env=by("ucx-staged"))
    expect(lines, "differs from plain NCCL", 1)


def case_killed():
    """At any moment, also in the middle of a transfer: nobody hangs, the dead is named, the others go on without."""
    for transport, victim in (("ucx-staged", 2), ("ucx", 3)):
        for attempt in range(6):
            out, lines = ends("killed_any", victim, env=by(transport, RAILYARD_VERIFY="0"))
            if victim and not reissued(out):
                fail("those who are left do not engage:\n" + "\n".join(lines))
            if any(f"rank {victim}: " in line for line in lines):
                break  # else NCCL noticed before UCX did, and the job heard it from there
        else:
            fail("the dead was never named")


def case_staging():
    """No memory for it: NCCL carries it, and nothing else changes."""
    out, lines = dedup("loop", "aabb", 10, 16, 64, 4096, env=by("ucx-staged", RAILYARD_STAGING="1M", RAILYARD_STRATEGY="hierarchical", RAILYARD_VERIFY="0"))
    expect(lines, "UCX carried", 0)
    env = by("ucx-staged", RAILYARD_STAGING="64M", RAILYARD_STRATEGY="hierarchical")
    until(lambda n: dedup("loop", "aabb", n, 16, 64, 4096, env=env), (10, 50, 250), 4)


def case_one_rank():
    """A rank whose UCX cannot carry data: said once, and NCCL carries everything for all."""
    wrap = ["sh", "-c", f'if [ "$RANK" = 2 ]; then export LD_PRELOAD="$LD_PRELOAD:{SHIM}"; fi; exec "$@"', "sh"]
    out, lines = job("reissue_right", "mix", "aabb", "60", wrap=wrap, env=by("ucx"))
    expect(lines, "warning: NCCL carries everything: UCX cannot be used for data", 1)
    expect(lines, " (warning|error): ", 1)
    expect(lines, "UCX carried", 0)
    reissued(out, 0.7)


def case_switching():
    """Within one job, by railyard_strategy("NAME/ucx"), as tests/gpu/sweep compares them."""
    for number in ("90", "450"):
        out, lines = job("reissue_right", "switching", "aabb", number, env=by("ucx-staged", RAILYARD_LOG="plan"))
        calm(lines)
        if r.said(lines, ": balanced over UCX"):
            break
    for way in ("hierarchical over UCX", "hierarchical", "balanced over UCX", "balanced", "direct"):
        expect(lines, rf": {way} \(forced")
    print(out, end="")


def case_settings():
    """What is none of them is said; auto stays with NCCL where nothing was measured."""
    out, lines = job("reissue_right", "mix", "aabb", "30", env={"RAILYARD_TRANSPORT": "pigeon"})
    expect(lines, 'warning: RAILYARD_TRANSPORT: "pigeon" is none of', 4)
    reissued(out, 0.5)
    done, lines = mix("aabb", {"RAILYARD_TRANSPORT": "auto", "XDG_CACHE_HOME": "/nonexistent"}, number="60")
    expect(lines, "UCX carried", 0)


def case_auto():
    """Where it was measured to be faster than NCCL, whose emulated links are slow: that is not so of UCX's. And not where it is slower."""
    links = ("--nic", "0.5", "--nic-us", "100")
    for number in (15, 60, 200):
        sizes = ("loop", "aabb", str(number), "16", "128", "1024")
        out, lines, folder = r.auto(*sizes[:1], *sizes[2:], links=links, env={"RAILYARD_TRANSPORT": "auto", "RAILYARD_STRATEGY": "hierarchical"})
        if r.said(lines, ": hierarchical over UCX"):
            break
    expect(lines, ": hierarchical over UCX")
    cache = os.path.dirname(folder)
    for name in glob.glob(os.path.join(cache, "railyard", "cost-*.json")):
        with open(name, encoding="utf-8") as f:
            model = json.load(f)
        for name_, factor in (("bytes_per_us", 0.5), ("rank_bytes_per_us", 0.5), ("alpha_us", 2), ("message_us", 2)):
            model["ucx"][name_] = model["nic"][name_] * factor
        with open(name, "w", encoding="utf-8") as f:
            json.dump(model, f)
    out, lines = job("reissue_dedup", *sizes, links=links,
                     env={"RAILYARD_TRANSPORT": "auto", "RAILYARD_STRATEGY": "hierarchical", "XDG_CACHE_HOME": cache, "RAILYARD_LOG": "plan"})
    expect(lines, ": hierarchical")
    expect(lines, "over UCX \\(|UCX carried", 0)


if __name__ == "__main__":
    r.main(globals())
