"""Build the native module for another machine, to be carried there and named by PREBUILT.

    python -m bench.gpu_run.prebuild --python /path/to/python3.12 --archs 90 --out prebuilt

Needs cmake, ninja, pybind11 and nvcc here, and the headers of that Python; about a minute of one core per
architecture. Beside the module lies a stamp of its sources, by which `bench/gpu.sh` knows a stale one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_run.build import cmake, sources_hash, stamp_of


def main(argv: Sequence[str] | None = None) -> int:
    """Build it and write its stamp."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that will import it")
    parser.add_argument("--archs", default="90", help='GPU architectures, such as "90" or "90;100"')
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--build", type=Path, default=Path("build/prebuild"), help="CMake's folder")
    parser.add_argument("--cpu", action="store_true", help="no GPU kernels")
    args = parser.parse_args(argv)
    asked = subprocess.run(
        [args.python, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if not cmake(args.build.absolute(), out, cuda=not args.cpu, archs=args.archs, python=args.python):
        return 1
    module = out / f"_C{asked.stdout.strip()}"
    stamp = {"sources": sources_hash(), "archs": "" if args.cpu else args.archs}
    stamp_of(module).write_text(json.dumps(stamp) + "\n")
    print(f"wrote {module}, {module.stat().st_size >> 10} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
