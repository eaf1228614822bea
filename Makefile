# `make demo` and `make test` set everything up in .venv on first use; `make sanitize` runs the kernels' tests under
# AddressSanitizer.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = .venv/bin
READY = .venv/.ready

.PHONY: demo test sanitize lint clean

demo: $(READY)
	$(BIN)/springtide demo

test: lint
	$(BIN)/pytest

# A second environment that sees the packages of the first, but has its own build of the kernels. AddressSanitizer must
# find the exceptions' library when it starts.
ASAN = build/sanitized
sanitize: $(READY)
	$(PYTHON) -m venv $(ASAN)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(ASAN)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth
	$(ASAN)/bin/pip install --quiet --no-deps --config-settings=build-dir=build/asan \
		--config-settings=cmake.define.SPRINGTIDE_SANITIZE=ON .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(ASAN)/bin/python -m pytest tests/kernels

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

KERNELS = CMakeLists.txt $(wildcard src/springtide/kernels/cpu/*)

$(READY): pyproject.toml $(KERNELS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist
