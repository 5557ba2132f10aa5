"""What the tests of `railyard plan` and `railyard sim` share: running the command, and gathering what is wrong until the end."""
import subprocess
import sys


class Cli:
    def __init__(self, railyard, *command):
        self.command, self.name, self.bad = [railyard, *command], " ".join(command), []

    def run(self, *args, status=0):
        p = subprocess.run([*self.command, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.check(f"{self.name} {' '.join(args)}: exit status {p.returncode}, not {status}: {p.stderr}", p.returncode == status)
        return p

    def check(self, what, ok):
        if not ok:
            self.bad.append(what)

    def wants(self, text, *args, status=1):
        """The command fails so, and says `text` in one line (a usage error adds a hint)."""
        p = self.run(*args, status=status)
        self.check(f"{self.name} {' '.join(args)}: '{p.stderr.strip()}' does not say '{text}'", text in p.stderr)
        self.check(f"{self.name} {' '.join(args)}: more than one line of error", status == 2 or p.stderr.count("\n") == 1)

    def end(self, otherwise=0):
        for text in self.bad:
            print(text)
        sys.exit(1 if self.bad else otherwise)
