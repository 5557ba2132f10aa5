#!/usr/bin/env python3
"""Text of several domains, for jobs whose routing shall have something to learn: programming and natural languages, as a
machine's packages bring them.

    tests/gpu/domains.py --into DIR [--each 2M] [--vocabulary 4096]   finds text here; DIR can be carried elsewhere
    tests/gpu/megatron_moe.py --loader DIR …                          trains on it, through DataLoader and DistributedSampler

Owns: finding text, turning it into tokens (frequent words are one, the rest is spelled in bytes), the map-style dataset of
windows, the loader. Not: training. More languages: `apt-get install manpages-de manpages-fr manpages-ja manpages-ru …`.
"""
import argparse
import collections
import glob
import gzip
import json
import os
import re
import site
import sys
import sysconfig

# Domain: (folders, endings). What a folder does not have is another machine's.
SOURCES = {
    "python": ([sysconfig.get_path("stdlib")], (".py",)),
    "c": (["/usr/include/linux", "/usr/include/" + (sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"), "/usr/include"],
          (".h",)),
    "c++": (["/usr/include/c++", "/usr/local/cuda/include"] + [os.path.join(d, "torch", "include")
                                                               for d in site.getsitepackages()],
            (".hpp", ".cuh", ".tcc", ".h", "")),
    "javascript": (["/usr/share/nodejs", "/usr/lib/node_modules", "/usr/local/lib/node_modules"], (".js",)),
    "perl": (glob.glob("/usr/share/perl*/*") + ["/usr/share/perl5"], (".pm", ".pl")),
    "rust": (glob.glob(os.path.expanduser("~/.rustup/toolchains/*/lib/rustlib/src"))
             + glob.glob(os.path.expanduser("~/.cargo/registry/src/*")),
             (".rs",)),
    "go": (glob.glob("/usr/lib/go*/src") + glob.glob("/usr/share/go*/src") + ["/usr/local/go/src"], (".go",)),
}
LEAST = 150000  # bytes that make a domain
PIECES = re.compile(r" ?[A-Za-z_\u00c0-\u024f\u0370-\u052f]+|\d|\n+ *|[ \t]+|.", re.S)


def files(folders, endings):
    for folder in folders:
        for root, subs, names in os.walk(folder):
            subs[:] = sorted(s for s in subs if s not in ("__pycache__", "site-packages", "dist-packages", "test", "tests"))
            for name in sorted(names):
                if os.path.splitext(name)[1] in endings:
                    yield os.path.join(root, name)


def manual(data):
    """A manual page's text without most of its markup."""
    out = []
    for line in data.decode("utf-8", "ignore").split("\n"):
        if line.startswith((".\\\"", "'\\\"", ".\\}", ".de", ".ie", ".el", ".if")):
            continue
        line = re.sub(r"^[.'][A-Za-z]{1,2} ?", "", line)
        line = re.sub(r"\\f(\[[A-Z]*\]|[A-Z]|\([A-Z]{2})|\\&|\\c|\\s[-+]?\d", "", line)
        line = re.sub(r"\\\[?\(?(aq|dq|cq|oq)\]?", "'", line).replace("\\-", "-").replace("\\ ", " ").replace("\\e", "\\")
        out.append(line.strip('"'))
    return "\n".join(out)


def find(each):
    """{domain: text of at most so many bytes}"""
    texts = {}

    def take(domain, paths, convert):
        parts, size = [], 0
        for path in paths:
            try:
                with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
                    text = convert(f.read(1 << 20))
            except (OSError, EOFError):
                continue  # a link to nowhere, a damaged file
            parts.append(text)
            size += len(text.encode())
            if size >= each:
                break
        text = "\n".join(parts).encode()[:each].decode("utf-8", "ignore")
        if len(text.encode()) >= LEAST:
            texts[domain] = text

    for domain, (folders, endings) in SOURCES.items():
        take(domain, files(folders, endings), lambda data: data.decode("utf-8", "ignore"))
    for folder in ["/usr/share/man"] + sorted(glob.glob("/usr/share/man/*")):
        language = "en" if folder == "/usr/share/man" else os.path.basename(folder)
        if language != "en" and (language.startswith("man") or not os.path.isdir(folder)):
            continue
        pages = [p for i in range(1, 9) for p in sorted(glob.glob("%s/man%d/*.gz" % (folder, i)))]
        take("man-" + language, [p for p in pages if not os.path.islink(p)], manual)
    return texts


def build(texts, size):
    """(pieces that are one token: numbers from 256 on)"""
    frequent = collections.Counter()
    for text in texts.values():
        here = collections.Counter(PIECES.findall(text))
        total = sum(len(p) * n for p, n in here.items())
        for piece, n in here.items():
            if len(piece.encode()) > 1 and n > 3:
                frequent[piece] += n * (len(piece.encode()) - 1) / total  # each domain counts alike
    return [p for p, _ in frequent.most_common(size - 256)]


def spell(piece, numbers):
    """The longest known beginning, and so on; what is not known is bytes."""
    tokens = []
    while piece:
        for n in range(min(len(piece), 24), 0, -1):
            if piece[:n] in numbers:
                tokens.append(numbers[piece[:n]])
                break
        else:
            n = 1
            tokens += piece[0].encode()
        piece = piece[n:]
    return tokens


def encode(text, numbers):
    import numpy as np
    known = {}
    out = []
    for piece in PIECES.findall(text):
        tokens = known.get(piece)
        if tokens is None:
            tokens = known[piece] = spell(piece, numbers)
        out += tokens
    return np.array(out, dtype=np.uint16)


def write(into, each, size):
    import numpy as np
    texts = find(each)
    if len(texts) < 2:
        raise SystemExit("domains: this machine has text of %s only" % (", ".join(texts) or "no domain"))
    pieces = build(texts, size)
    numbers = {p: 256 + i for i, p in enumerate(pieces)}
    os.makedirs(into, exist_ok=True)
    counts = {}
    for domain, text in sorted(texts.items()):
        tokens = encode(text, numbers)
        counts[domain] = len(tokens)
        np.save(os.path.join(into, domain + ".npy"), tokens)
    with open(os.path.join(into, "meta.json"), "w") as f:
        json.dump({"vocabulary": 256 + len(pieces), "domains": counts, "pieces": pieces}, f)
    print("domains: %d, %d tokens of a vocabulary of %d: %s" % (
        len(counts), sum(counts.values()), 256 + len(pieces), ", ".join("%s %d" % c for c in sorted(counts.items()))))


class Windows:
    """Map-style: sample i is a window of one domain, {"tokens", "labels"} of `seq` tokens each and its number. held_out: the
    last sixteenth of each."""

    def __init__(self, folder, seq, held_out=False):
        import numpy as np
        with open(os.path.join(folder, "meta.json")) as f:
            meta = json.load(f)
        self.vocabulary, self.seq = meta["vocabulary"], seq
        self.names = sorted(meta["domains"])
        self.tokens, self.at = [], []
        for d, name in enumerate(self.names):
            tokens = np.load(os.path.join(folder, name + ".npy"), mmap_mode="r")
            cut = len(tokens) * 15 // 16
            tokens = tokens[cut:] if held_out else tokens[:cut]
            self.tokens.append(tokens)
            self.at += [(d, i * seq) for i in range((len(tokens) - 1) // seq)]

    def __len__(self):
        return len(self.at)

    def __getitem__(self, i):
        import torch
        d, at = self.at[i]
        window = torch.from_numpy(self.tokens[d][at:at + self.seq + 1].astype("int64"))
        return {"tokens": window[:-1], "labels": window[1:], "sample": i}

    def domain(self, i):
        return self.names[self.at[i][0]]


def batches(folder, seq, batch, rank, world, seed, workers=0, reorder=None):
    """(dataset, iterator without end over batches): PyTorch's DataLoader with a DistributedSampler, epoch after epoch. reorder: a seed
    by which each global batch's samples are dealt to ranks and slots in another order."""
    import torch
    from torch.utils.data import DataLoader, DistributedSampler
    dataset = Windows(folder, seq)
    if len(dataset) < batch * world:
        raise SystemExit("domains: %d windows in %s; a step takes %d" % (len(dataset), folder, batch * world))

    class Reordered(DistributedSampler):
        def __iter__(self):
            parts = []
            for r in range(world):  # what each rank is dealt otherwise
                self.rank = r
                parts.append(list(super().__iter__()))
            self.rank, draw = rank, torch.Generator().manual_seed(reorder * 1000003 + self.epoch)
            for at in range(0, len(parts[0]) // batch * batch, batch):
                whole = [i for part in parts for i in part[at:at + batch]]
                order = torch.randperm(len(whole), generator=draw).tolist()
                yield from (whole[k] for k in order[rank * batch:(rank + 1) * batch])

    sampler = (DistributedSampler if reorder is None else Reordered)(
        dataset, num_replicas=world, rank=rank, shuffle=True, seed=seed, drop_last=True)
    loader = DataLoader(dataset, batch_size=batch, sampler=sampler, num_workers=workers, drop_last=True,
                        pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0)

    def endless():
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    return dataset, endless()


def size_of(text):
    factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    return int(text[:-1] if factor > 1 else text) * factor


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--into", required=True, metavar="DIR")
    p.add_argument("--each", type=size_of, default=2 << 20, help="bytes of text of each domain at most (default 2M)")
    p.add_argument("--vocabulary", type=int, default=4096)
    a = p.parse_args()
    if not 512 <= a.vocabulary <= 65536:
        sys.exit("domains: --vocabulary: 512 to 65536")
    write(a.into, a.each, a.vocabulary)
