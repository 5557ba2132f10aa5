#!/usr/bin/env python3
"""calibrate_test.py CASE RAILYARD: `railyard calibrate` on the emulated cluster.

What is checked: that it finds the bandwidth and latency that the links were given, keeps its result where it should, and
what it says and does where something is missing. Exit status 77 means skipped.
"""
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

import steady

railyard = sys.argv[2]
scratch = tempfile.TemporaryDirectory(prefix="railyard-calibrate-")


def calibrate(nodes, gpus, links, *options, status=0, env=None, prefix=()):
    command = [railyard, "emu", "-n", str(nodes), "-g", str(gpus), *links, "--", *prefix, "railyard", "calibrate", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500,
                          env={**os.environ, "XDG_CACHE_HOME": scratch.name, **(env or {})})
    text = done.stdout + done.stderr
    assert done.returncode == status, f"{' '.join(command)}: status {done.returncode} instead of {status}\n{text}"
    return text


def kept():
    models = {}
    for path in glob.glob(os.path.join(scratch.name, "railyard", "*")):
        name = re.fullmatch(r"cost-(kind-)?[0-9a-f]{16}\.json", os.path.basename(path))
        assert name, path
        with open(path) as f:
            model = json.load(f)
        if not name[1]:  # the other one is for all ranks on such hardware
            models[path] = model
    return models


def near(got, expected, tolerance, what):
    print(f"{what}: {got:.4g}, set to {expected:.4g}: {100 * (got / expected - 1):+.1f} %")
    assert expected * (1 - tolerance) < got < expected * (1 + tolerance), f"{what}: {got} instead of {expected}"


def shaped():
    """Links slow enough that two CPU cores keep up, so that what is measured is what was set."""
    steady.go_first()
    nic_gbit, nic_us, nvlink_gbit, nvlink_us = 0.8, 8000, 2, 3000
    for attempt in range(3):  # another program may take the processor for all of a run
        text = calibrate(2, 2, ["--nic", str(nic_gbit), "--nic-us", str(nic_us), "--nvlink", str(nvlink_gbit), "--nvlink-us",
                                str(nvlink_us)], "--seconds=6")
        (model,) = kept().values()
        try:
            near(model["nic"]["bytes_per_us"], nic_gbit * 1000 / 8, 0.2, "NIC bandwidth, MB/s")
            near(model["nic"]["rank_bytes_per_us"], nic_gbit * 1000 / 8, 0.2, "NIC bandwidth of one rank, MB/s")
            near(model["nic"]["alpha_us"] + model["group_us"], nic_us, 0.3, "NIC latency, us")
            near(model["local"]["bytes_per_us"], nvlink_gbit * 1000 / 8, 0.25, "in-node bandwidth, MB/s")
            near(model["node"]["bytes_per_us"], nvlink_gbit * 1000 / 8, 0.25, "the same over the node's communicator, MB/s")
            near(model["node"]["alpha_us"] + model["group_us"], nvlink_us, 0.3, "its latency, us")
            near(model["local"]["alpha_us"] + model["group_us"], nvlink_us, 0.3, "in-node latency, us")
            break
        except AssertionError as e:
            print(f"attempt {attempt + 1}: {e}")
            if attempt == 2 and steady.unsteady():
                print("skipped: this machine does not keep its pace, so nothing can be said of what is measured on it")
                sys.exit(77)
            if attempt == 2:
                raise
    assert all(model[link]["measured"] for link in ("self", "local", "node", "nic")), model
    fits = {what: float(off) for what, off in re.findall(r"^  (\S.*): model off by ([0-9.]+) %", text, re.M)}
    assert "all ranks of each node to the next node" in fits and "the same over a communicator of the node's ranks alone" in fits, fits
    assert any(what.startswith("exchange") for what in fits), fits
    print(text)


def shapes():
    picture = os.path.join(scratch.name, "picture.svg")
    text = calibrate(1, 3, [], "--seconds=1", f"--svg={picture}")
    assert re.search(r"nic .*GUESSED: there is no such link", text) and re.search(r"node .*GUESSED: there is no such link", text)
    assert "ranks of a node in pairs" in text, text
    assert xml.etree.ElementTree.parse(picture).getroot().tag.endswith("svg")
    text = calibrate(3, 1, [], "--seconds=1")
    assert re.search(r"local .*GUESSED: there is no such link", text), text
    calibrate(1, 1, [], "--seconds=1")
    # three clusters, three files; the same cluster again (whose nodes have other names each time) is the same file
    before = kept()
    assert len(before) == 3, before.keys()
    calibrate(3, 1, [], "--seconds=0.5")
    after = kept()
    assert before.keys() == after.keys() and before != after, after.keys()
    calibrate(2, 2, [], "--seconds=0.5", "--no-keep")
    assert kept().keys() == before.keys()


def errors():
    def refused(says, *options, status=2, **more):
        text = calibrate(1, 2, [], *options, status=status, **more)
        assert len(re.findall(re.escape(says), text)) == 1, f"expected once: {says}\nin: {text}"

    refused("--seconds=soon: expected a number", "--seconds=soon")
    refused("unexpected argument 'word'", "word")
    refused("cannot write /nonexistent/x.svg", "--svg=/nonexistent/x.svg", "--seconds=0.2", status=1)
    refused("cannot make the folder /proc/nowhere", "--seconds=0.2", status=1, env={"XDG_CACHE_HOME": "/proc/nowhere"})
    refused("set XDG_CACHE_HOME or HOME", "--seconds=0.2", status=1, env={"XDG_CACHE_HOME": "", "HOME": ""})
    text = calibrate(1, 2, [], "--help")
    assert text.count("Usage:") == 1 and "torchrun" in text, text
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([railyard, "calibrate"], capture_output=True, text=True, timeout=200, env=alone)
    assert done.returncode == 2 and "torchrun --nproc-per-node 8 --no-python railyard calibrate" in done.stderr, done


cases = {f.__name__: f for f in (shaped, shapes, errors)}
cases[sys.argv[1]]()
