# make train: set up and train a small ConViT on real images.   make test: set up and run all tests.
# make test-prepare: set up TensorFlow in .venv-prepare, run the real preparation of ImageNet on miniature tars.
# make lint:  style.   make clean: remove the environments.   ARGS="..." is passed on to each command.
PYTHON ?= python3
ifneq ($(strip $(ARG)$(arg)$(args)),)
$(error arguments go into ARGS, as in: make train ARGS="--config.epochs=20")
endif
BIN = .venv/bin

train: .venv/ready
	$(BIN)/python train.py $(ARGS)

test: .venv/ready-to-test
	$(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal $(ARGS)

test-prepare: .venv-prepare/ready
	.venv-prepare/bin/python -m tests.prepare_for_real

lint: .venv/ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-prepare

.venv/ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ConViT needs Python 3.11 or later, $(PYTHON) is " + sys.version.split()[0] + ": give another one as make PYTHON=python3.12")'
	@echo "Installing into .venv, which takes some minutes the first time ..."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

.venv/ready-to-test: .venv/ready requirements-test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt -c constraints.txt
	@touch $@

.venv-prepare/ready: requirements-prepare.txt constraints.txt
	$(PYTHON) -m venv .venv-prepare
	.venv-prepare/bin/pip install --quiet --disable-pip-version-check -r requirements-prepare.txt -c constraints.txt
	@touch $@

.PHONY: train test test-prepare lint clean
