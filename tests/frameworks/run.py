"""Runs the tests of each framework in an environment of its own: what `make test-integrations` calls.

Frameworks pin versions that exclude each other. Each `<name>.txt` beside this file is a pip requirements file whose
first lines may say, in comments:

    # tests: paths for pytest, the first line
    # python: 3.12, where another version than this one is needed
    # without: packages to take out again, whose wheels need CUDA's libraries to be imported
    # any-python: packages that ask for another Python than they need; their requirements are then held to this one

An environment is made once, in `.integrations/<name>`, and again when its requirements change.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.resolve()
ROOT = FOLDER.parents[1]
ENVIRONMENTS = ROOT / ".integrations"
TEST_TOOLS = ("pytest>=8", "pytest-timeout>=2.3")
SHOWN = ("torch", "transformers", "trl", "accelerate", "peft")
"""Packages whose versions the summary names, beside what a requirements file pins."""


@dataclass(frozen=True)
class Framework:
    """One requirements file."""

    name: str
    text: str

    def listed(self, key: str) -> list[str]:
        """The words after ``# key:``, over all lines that begin so."""
        return [word for line in re.findall(rf"^#\s*{key}:(.*)$", self.text, re.MULTILINE) for word in line.split()]

    @property
    def folder(self) -> Path:
        """Of the environment."""
        return ENVIRONMENTS / self.name

    @property
    def python(self) -> str:
        """The interpreter of the environment."""
        return str(self.folder / "bin" / "python")

    @property
    def log(self) -> Path:
        """What pip said."""
        return ENVIRONMENTS / f"{self.name}.log"

    def install(self, torch: str) -> None:
        """Make the environment, unless it is there with these requirements.

        Raises CalledProcessError; the log holds the reason.
        """
        version = self.listed("python")
        base = f"python{version[0]}" if version else sys.executable
        stamp = self.folder / ".installed"
        key = hashlib.sha256(f"{base}\n{torch}\n{self.text}\n{TEST_TOOLS}".encode()).hexdigest()
        if stamp.exists() and stamp.read_text() == key:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        ENVIRONMENTS.mkdir(exist_ok=True)
        with self.log.open("w") as log:

            def run(*command: str) -> None:
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)

            run(base, "-m", "venv", str(self.folder))
            pip = (self.python, "-m", "pip")
            run(*pip, "install", "--upgrade", "pip")
            run(*pip, "install", torch)
            # What is installed may not be exchanged for another build of several gigabytes.
            constraint = self.folder / "constraints.txt"
            constraint.write_text(f"torch=={self.version('torch')}\n")
            requirements = str(FOLDER / f"{self.name}.txt")
            for package in self.listed("any-python"):
                run(*pip, "install", "--no-deps", "--ignore-requires-python", package)
            run(*pip, "install", "--constraint", str(constraint), "-r", requirements, *TEST_TOOLS)
            if unwanted := self.listed("without"):
                run(*pip, "uninstall", "--yes", *unwanted)
            # The checkout as it is: an editable install would build over the extension module of `make build`.
            (path,) = self.folder.glob("lib/python*/site-packages")
            (path / "slime_fused_checkout.pth").write_text(f"{ROOT}\n")
        stamp.write_text(key)

    def version(self, package: str) -> str:
        """Of an installed package; empty if there is none."""
        ask = f"from importlib.metadata import version; print(version({package!r}))"
        answer = subprocess.run([self.python, "-c", ask], capture_output=True, text=True, check=False)
        return answer.stdout.strip()

    def versions(self) -> str:
        """Those that matter, as one line."""
        pinned = re.findall(r"^([A-Za-z][\w.-]*)", self.text, re.MULTILINE)
        names = list(dict.fromkeys([*pinned, *SHOWN]))
        return ", ".join(f"{name} {found}" for name in names if (found := self.version(name)))

    def test(self) -> bool:
        """Whether all of its tests passed, and there were some."""
        # One thread: the models are tiny. No hub: everything is made on the spot.
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [self.python, "-m", "pytest", "-p", "no:cacheprovider", *self.listed("tests")]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def read_frameworks(only: list[str]) -> list[Framework]:
    """Those of this folder, or the named ones.

    Raises SystemExit for a name without a file and for a file that names no tests.
    """
    known = {path.stem: Framework(path.stem, path.read_text()) for path in sorted(FOLDER.glob("*.txt"))}
    for name in only:
        if name not in known:
            raise SystemExit(f"ONLY: expected names among {', '.join(known)}, got {name!r}")
    for framework in known.values():
        if not framework.listed("tests"):
            raise SystemExit(f"{framework.name}.txt: expected a first line `# tests: <paths>`, got none")
    return [known[name] for name in only or known]


def main() -> int:
    """Exit status: 0 if every framework was installed and its tests passed."""
    parser = argparse.ArgumentParser(description="Tests of other frameworks, each in an environment of its own.")
    parser.add_argument("only", nargs="*", help="names of requirements files here; all if none is given")
    parser.add_argument("--torch", default="torch==2.13.0", help="the requirement that gives PyTorch")
    args = parser.parse_args()
    outcomes: list[tuple[str, str, str]] = []
    for framework in read_frameworks(args.only):
        print(f"== {framework.name}", flush=True)
        try:
            framework.install(args.torch)
        except (subprocess.CalledProcessError, OSError) as error:
            reason = error if isinstance(error, OSError) else f"see {framework.log.relative_to(ROOT)}"
            outcomes.append((framework.name, "could not install", str(reason)))
            continue
        outcomes.append((framework.name, "passed" if framework.test() else "failed", framework.versions()))
    print("\n== summary")
    for name, outcome, detail in outcomes:
        print(f"{name:<16} {outcome:<18} {detail}")
    return 0 if all(outcome == "passed" for _, outcome, _ in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
