#!/usr/bin/env python3
"""The documents against the code: the README's and the man page's tables of settings and commands. usage: check_docs.py BUILD"""
import os
import re
import subprocess
import sys

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RAILYARD = os.path.join(TOP, sys.argv[1], "tools", "railyard", "railyard")
bad = []


def read(name):
    with open(os.path.join(TOP, name), encoding="utf-8") as f:
        return f.read()


def tool(*args):
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAILYARD_")}
    return subprocess.run([RAILYARD, *args], stdout=subprocess.PIPE, text=True, check=True, env=env).stdout


readme, man = read("README.md"), read("docs/railyard.1")
table = tool("env", "--markdown").strip()
if table not in readme:
    bad.append("README.md's table of settings is not what `railyard env --markdown` prints")
plain_man = re.sub(r"\\f.|\\", "", man)
for row in table.splitlines()[2:]:
    name, _, default, text = [c.strip().strip("`") for c in row.strip("|").split("|")]
    if f".It Ev {name} " not in man:
        bad.append(f"docs/railyard.1 does not have {name}")
    elif text.replace("`", "")[1:] not in plain_man:
        bad.append(f"docs/railyard.1 says something else of {name} than {text!r}")
for name in re.findall(r"RAILYARD_[A-Z_]+", readme + man + "".join(read(f"docs/{f}") for f in os.listdir(f"{TOP}/docs"))):
    if f"`{name}`" not in table:
        bad.append(f"the documents speak of {name}, which is no setting")
for line in tool("--help").splitlines():
    command = re.match(r"  (\w+) +\S", line)
    if not command:
        continue
    for where, text in (("README.md", readme), ("docs/railyard.1", man)):
        if f"railyard {command.group(1)}" not in text:
            bad.append(f"{where} does not have `railyard {command.group(1)}`")
for link in re.findall(r"\]\(([^)#]+)\)", readme):
    if not link.startswith("http") and not os.path.exists(os.path.join(TOP, link)):
        bad.append(f"README.md links to {link}, which does not exist")
lint = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", os.path.join(TOP, "docs", "railyard.1")], stdout=subprocess.PIPE,
                      stderr=subprocess.STDOUT, text=True) if not subprocess.run(["which", "mandoc"], stdout=subprocess.DEVNULL).returncode else None
if lint and lint.stdout.strip():
    bad.append("mandoc: " + lint.stdout.strip())
for text in bad:
    print(text)
sys.exit(1 if bad else 0)
