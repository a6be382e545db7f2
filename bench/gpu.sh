#!/usr/bin/env bash
# Build, test, check and benchmark slime_fused on the GPU at hand, offline, in under ten minutes.
#
#   OUT=dir        where results and logs go (default: bench/results/<device>)
#   ARCHIVE=file   everything in OUT as one file, written again after every part (default: OUT/results.tar.gz)
#   LIMIT=s        seconds for everything (default 560); every part has a guaranteed share of them
#   STEPS="..."    which steps: machine build tests bench micro end_to_end sweep sanitizer (default: all)
#   CASES="..."    cases of the benchmark (default: all, most important first)
#   ENV=dir        the environment on top of PYTHON; kept and used again (default: build/gpu-env)
#   PREBUILT=path  the native module, built beforehand (a .so, a wheel, or a folder with one): no compiler needed
#   WHEELS=a:b     folders with wheels of the peers, or with pieces of them
#   PYTHON=...     the interpreter that holds PyTorch (default python3)
#   CUDA=ON|OFF    whether the native kernels are compiled for the GPU (default ON)
#   BENCH_COMMIT=h the commit, where the tree has no history to ask
#   DEVICE=cpu     tiny problems and stand-in kernels without a GPU, to try the script itself
#   DRY_RUN=1      print the commands and their seconds, and import every Python module they use
#
# bench/README.md tells what the parts are, what they write, and what the exit code says.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHON=${PYTHON:-python3}
exec "$PYTHON" -m bench.gpu_run
