#!/usr/bin/env bash
# Build, test, check and benchmark slime_fused on the GPU at hand, offline, in under ten minutes.
#
#   WHEELS=dir   wheels of the peers to install for this run (optional; see bench/README.md)
#   OUT=dir      where logs and results go (default: bench/results/<device>)
#   STEPS="..."  which steps, in this order: machine build tests sanitizer micro bench (default: all)
#   BUDGET=s     seconds for the `bench` step (default 240)
#   LIMIT=s      seconds for everything (default 560): later parts get what earlier ones leave
#   CASES="..."  cases of the `bench` step (default: all, most important first)
#   PYTHON=...   interpreter (default python3); packages go to a temporary environment on top of its own
#   CUDA=ON|OFF  whether the native kernels are compiled for the GPU (default ON)
#   BENCH_COMMIT=hash  the commit, where the tree has no history to ask
#   DRY_RUN=1    print the commands, and import every Python module they use, without running them
#
# A part that fails does not stop the others. The exit code is non-zero if a correctness step (build, tests,
# sanitizer) failed. Logs are packed into one archive: OUT/logs.tar.gz.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 2
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-machine build tests sanitizer micro bench}
BUDGET=${BUDGET:-240}
LIMIT=${LIMIT:-560}
CASES=${CASES:-}
DRY_RUN=${DRY_RUN:-0}
WHEELS=${WHEELS:-}
CUDA=${CUDA:-ON}
CORRECTNESS=" environment build stream-tests tests-alone tests memcheck racecheck "

device_name() { nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1; }
slug() { printf '%s' "$1" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-' | sed 's/^-//; s/-$//'; }
# Compute capability 9.0 -> 90.
architecture() { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. '; }

DEVICE=$(device_name)
OUT=${OUT:-bench/results/$(slug "${DEVICE:-no-gpu}")}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
SCRATCH=$(mktemp -d)
LOGS=$SCRATCH/logs
VENV=$SCRATCH/venv
mkdir -p "$LOGS"
trap 'rm -rf "$SCRATCH"' EXIT
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
STARTED=$SECONDS
SUMMARY=()
FAILED=0

seconds_left() { echo $((LIMIT - (SECONDS - STARTED))); }
smaller() { echo $(($1 < $2 ? $1 : $2)); }

# part NAME SECONDS COMMAND...: run it with a time limit and a log of its own, and remember how it went.
part() {
  local name=$1 limit begun=$SECONDS code
  limit=$(smaller "$2" "$(seconds_left)")
  shift 2
  if [[ $DRY_RUN == 1 ]]; then
    printf 'DRY_RUN %s (%s s):' "$name" "$limit"
    printf ' %q' "$@"
    printf '\n'
    return 0
  fi
  if ((limit < 5)); then
    skip "$name" "no time left"
    return 124
  fi
  printf '== %s\n' "$name"
  timeout --kill-after=10 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  code=$?
  tail -n "${TAIL:-15}" "$LOGS/$name.log"
  SUMMARY+=("$(printf '%-14s %-6s %4d s' "$name" "$([[ $code == 0 ]] && echo ok || echo "rc=$code")" $((SECONDS - begun)))")
  if [[ $code != 0 && $CORRECTNESS == *" $name "* ]]; then FAILED=1; fi
  return $code
}

# skip NAME REASON: a part that cannot run here.
skip() {
  printf '== %s: skipped, %s\n' "$1" "$2"
  SUMMARY+=("$(printf '%-14s skipped: %s' "$1" "$2")")
}

report_machine() {
  date -u
  git rev-parse HEAD 2>/dev/null
  nvidia-smi
  nvcc --version | tail -n 2
  "$PYTHON" - <<'PY'
import importlib
for name in ("torch", "triton", "numpy", "transformers", "pytest", "hypothesis", "pybind11", "cmake", "ninja",
             "liger_kernel", "cut_cross_entropy", "trl", "quack"):
    try:
        module = importlib.import_module(name)
        print(name, getattr(module, "__version__", "present"))
    except Exception as error:
        print(name, "missing:", type(error).__name__, str(error).splitlines()[:1])
PY
}

# An environment that sees everything of PYTHON's own and forgets what is installed into it.
make_environment() {
  "$BASE_PYTHON" -m venv --without-pip "$VENV" &&
    "$BASE_PYTHON" -c 'import sysconfig; print(*{sysconfig.get_path(p) for p in ("purelib", "platlib")}, sep="\n")' \
      >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth" &&
    "$VENV/bin/python" -c 'import torch, pip; print("torch", torch.__version__, "pip", pip.__version__)'
}

# Editable, because the top-level folder triton_kernels/ is the subpackage slime_fused.triton_kernels only after
# installation; compiled for this card alone.
build_package() {
  SLIME_FUSED_CUDA=$1 SLIME_FUSED_CUDA_ARCHS=$(architecture) "$VENV/bin/python" -m pip install -v \
    --no-build-isolation --no-deps --no-index -e "$ROOT" &&
    "$VENV/bin/python" -c "
import slime_fused, slime_fused.triton_kernels
print(slime_fused.__file__, slime_fused.triton_kernels.__file__)
print(slime_fused.build_info())
print(slime_fused.available_backends())"
}

# One by one: a wheel for another Python must not keep the others out.
install_wheels() {
  local wheel code=0
  for wheel in "$WHEELS"/*.whl; do
    "$VENV/bin/python" -m pip install -q --no-index --no-deps --no-compile "$wheel" || code=1
  done
  return $code
}

import_modules() {
  "$PYTHON" - <<'PY'
import importlib
for name in ("bench.cases", "bench.contestants", "bench.cpu", "bench.gpu", "bench.measure", "bench.oracle",
             "bench.peers", "bench.registry", "bench.report", "bench.results", "bench.runner", "bench.sanitize",
             "bench.worker", "bench.end_to_end", "bench.micro.row_kernels", "bench.micro.triton_kernels"):
    importlib.import_module(name)
    print("imported", name)
PY
}
# cmake and ninja may live beside the interpreter only.
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH
export -f report_machine make_environment build_package install_wheels architecture
export PYTHON ROOT VENV WHEELS BASE_PYTHON=$PYTHON

wants() { [[ " $STEPS " == *" $1 "* ]]; }

if part environment 60 bash -c make_environment && [[ $DRY_RUN != 1 ]]; then PYTHON=$VENV/bin/python; fi
if [[ -n $WHEELS ]]; then part wheels 120 bash -c install_wheels; fi
if wants machine; then TAIL=60 part machine 90 bash -c report_machine; fi
if wants build && ! part build 240 bash -c "build_package $CUDA"; then
  # Without the native kernels the Triton backend can still be tested and timed.
  part build-cpu 120 bash -c "build_package OFF"
fi

if wants tests; then
  # Only files with GPU tests: others may import what this machine lacks, and would stop the collection.
  mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
  # A kernel on the wrong stream makes every later number meaningless, so that is asked first.
  TAIL=8 part stream-tests 90 "$PYTHON" -m pytest -q -x -m gpu -k stream -p no:cacheprovider "${gpu_tests[@]}"
  # Triton compiles hundreds of kernels for these: several processes where pytest-xdist is there.
  parallel=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n 8); fi
  pytest_gpu=("$PYTHON" -m pytest -q -k "not stream" --maxfail=30 --tb=short -p no:cacheprovider "${gpu_tests[@]}")
  TAIL=12 part tests-alone 60 "${pytest_gpu[@]}" -m "gpu and alone"
  TAIL=40 part tests 220 "${pytest_gpu[@]}" -m "gpu and not alone" --durations=8 ${parallel[@]+"${parallel[@]}"}
fi

if wants sanitizer; then
  if command -v compute-sanitizer >/dev/null 2>&1 || [[ $DRY_RUN == 1 ]]; then
    for tool in memcheck racecheck; do
      # Our kernels alone, whose names hold the namespace: PyTorch's would take the time.
      part $tool 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
        --kernel-name kernel_substring=slime_fused --report-api-errors no "$PYTHON" -m bench.sanitize
    done
  else
    skip sanitizer "compute-sanitizer is not installed"
  fi
fi

if wants micro; then
  for name in row_kernels triton_kernels; do
    if [[ -f bench/micro/$name.py ]]; then
      TAIL=40 part "micro-${name%_kernels}" 90 "$PYTHON" -m "bench.micro.$name" --out "$OUT/$name.json"
    else
      skip "micro-${name%_kernels}" "bench/micro/$name.py is not there"
    fi
  done
fi

if wants bench; then
  # The process under way when the budget ends may take another 20 seconds.
  budget=$(smaller "$BUDGET" $(($(seconds_left) - 25)))
  # shellcheck disable=SC2086  # CASES is a list of words
  TAIL=200 part bench $((budget + 25)) "$PYTHON" -m bench.gpu --out "$OUT" --time-budget "$budget" \
    ${CASES:+--cases $CASES}
fi

if [[ $DRY_RUN == 1 ]]; then
  import_modules || exit 1
  exit 0
fi

{
  printf 'device: %s\n' "${DEVICE:-none}"
  printf '%s\n' "${SUMMARY[@]}"
  printf 'total %d s\n' $((SECONDS - STARTED))
} | tee "$LOGS/summary.txt"
tar -czf "$OUT/logs.tar.gz" -C "$SCRATCH" logs
exit $FAILED
