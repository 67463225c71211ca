# make demo   the whole path on drawn scenes: shards, training, evaluation, exports
# make test   the tests
# make test-faults   many real processes killed and hung at random
# make lint   ruff
# make test-compat   our shards in the readers of others, each in an environment of its own (.compat/NAME)
# Each sets up .venv first, from setup.py and constraints.txt.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
READERS := energon huggingface open_clip

.PHONY: demo test test-faults test-compat lint clean

demo: $(READY)
	$(VENV)/bin/python -m pretrain demo

# Three files at a time, on 2 cores: while one waits for a cluster or for ranks of its own, the others compute. Compiled
# beforehand, since hundreds of processes follow, and none of them may where PYTHONDONTWRITEBYTECODE is set.
test: $(READY)
	$(VENV)/bin/python -m compileall -q pretrain data_tools launch tests
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-faults: $(READY)
	$(VENV)/bin/python -m pytest -m faults

test-compat: $(READY) $(READERS:%=.compat/%/.ready)
	$(VENV)/bin/python -m pytest tests/compat

.compat/%/.ready: tests/compat/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed; found " + sys.version.split()[0] + ". Try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]'
	@# As pip does it, but with all cores. Some packages hold files that are no Python 3.
	@$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $(READY)

clean:
	rm -rf $(VENV) .compat
