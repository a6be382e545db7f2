# Two commands do everything on a fresh machine: `make test` and `make demo`.
PYTHON ?= python3
VENV ?= .venv
# A PyTorch that installs without gigabytes of GPU libraries; `make TORCH=torch ...` takes the newest instead.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

# The tests that compare numbers run once more with other products: no library promises the same bits everywhere.
OTHER_PRODUCTS := MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=default \
  SLIME_FUSED_CPU_ISA=scalar OMP_NUM_THREADS=1
PRODUCT_TESTS := $(addprefix tests/, $(addsuffix .py, test_slime_values test_slime_loss test_token_ops test_autograd \
  test_autocast test_edges test_float16 test_scales test_fused test_vocab_sweep test_properties test_cross_entropy \
  test_backend_grid test_preference_loss test_token_statistics test_token_statistics_edges \
  test_unit_losses_statistics trainer/test_trainer trainer/test_losses trainer/test_sft trainer/test_readme \
  model/test_head integrations/test_trl_enable))

.PHONY: test test-integrations lint build demo bench report clean

test: build lint
	$(BIN)/python -m pytest
	$(OTHER_PRODUCTS) $(BIN)/python -m pytest -p tests.reordered_products -k 'not peak_memory' $(PRODUCT_TESTS)

# Other people's trainers, each in an environment of its own under .integrations/; one of them: ONLY=llama_factory.
test-integrations: build
	$(BIN)/python tests/frameworks/run.py --torch '$(TORCH)' $(ONLY)

# Everything the project needs, in an environment of its own; again only when the requirements change.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	SLIME_FUSED_CUDA=OFF $(BIN)/python -m pip install --quiet --editable '.[dev,cuda12]' 'cmake>=3.25' ninja 'pybind11>=2.13'
	touch $@

# The native module, incrementally. CUDA kernels too where nvcc is found, for one architecture to keep it short;
# the tests compile them for all.
build: $(VENV)/.installed
	mkdir -p build
	$(BIN)/cmake -S . -B build/dev -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DSLIME_FUSED_CUDA=AUTO -DSLIME_FUSED_CUDA_ARCHS=90 >build/dev.log \
	  || (cat build/dev.log; exit 1)
	$(BIN)/cmake --build build/dev

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' '*.cc' | xargs $(BIN)/clang-format --dry-run --Werror

# A real model on real pairs, fused and naive. Your own: make demo DEMO_DATA=pairs.jsonl DEMO_MODEL=folder
demo: build
	$(BIN)/python examples/demo.py $(if $(DEMO_DATA),--data $(DEMO_DATA)) $(if $(DEMO_MODEL),--model $(DEMO_MODEL))

bench: build
	$(BIN)/python -m bench.cpu

report: build
	$(BIN)/python -m bench.report --plots docs

clean:
	rm -rf build dist *.egg-info slime_fused/_C*.so
