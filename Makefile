# Two commands for a newcomer: `make demo` and `make test`. Each does all of its own set-up.

PYTHON := .venv/bin/python
# Taps, bridges and the guest's root file system need root; -E keeps XDG_CACHE_HOME, CI, proxies.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -E)

.PHONY: demo test test-all fuzz soak perf perf-gate setup setup-peers setup-fuzz clean clean-cache

demo: setup
	@$(SUDO) $(PYTHON) -m tests.lab.demo $(DEMO_ARGS)

test: setup-peers
	@$(SUDO) $(PYTHON) -m pytest $(if $(TESTS),$(TESTS),tests) $(PYTEST_ARGS)

# The long ones too: an hour. make test-all TESTS=tests/vmm/kvm
test-all:
	@$(MAKE) --no-print-directory test PYTEST_ARGS="--all $(PYTEST_ARGS)"

# make fuzz SECONDS=600 TARGETS="ring blk"; see docs/testing.md
fuzz: setup-fuzz
	@$(PYTHON) -m tests.fuzz $(if $(SECONDS),--seconds $(SECONDS)) $(TARGETS)

# make soak SECONDS=3600; see docs/testing.md
soak: setup
	@$(SUDO) $(PYTHON) -m tests.soak $(if $(SECONDS),--seconds $(SECONDS))

# make perf PERF_ARGS="blk --only tmpfs --server vdev --server qsd"; see docs/performance.md
perf: setup-peers
	@$(SUDO) $(PYTHON) -m perf run $(PERF_ARGS)

perf-gate: setup-peers
	@$(SUDO) $(PYTHON) -m perf gate $(PERF_ARGS)

setup:
	@tests/lab/setup.sh

setup-peers:
	@tests/lab/setup.sh peers

setup-fuzz:
	@tests/lab/setup.sh fuzz

clean:
	$(SUDO) rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	$(SUDO) find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The guest kernel, initrd and root file system are kept outside the checkout, shared by all.
clean-cache:
	$(SUDO) rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/vdev"
