# Everything a developer runs. Needs GNU make 3.81 or newer and Python 3.10 or newer; no compiler.
#
#   make test ARGS="-k rope -x"       options for pytest
#   make .venv PYTHON=python3.12      which Python the environment is made with (make clean first to change it)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICK := runs/quickstart
PACKAGES := $(patsubst %/__init__.py,%,$(wildcard $(addsuffix /__init__.py,bumblebee callbacks datamodules serve)))
# An editable install knows the top-level packages of its day, so the marker's name lists them: a new one reinstalls.
INSTALLED := $(VENV)/.installed-$(subst $() $(),-,$(PACKAGES))

.PHONY: help .venv quickstart test test-slow golden docs vendor lint types format clean

help:  ## this list
	@sed -n 's/^\([a-z.-]*\):.*## /\1	/p' Makefile

.venv: $(INSTALLED)  ## the environment: built when missing, updated when pyproject.toml or constraints.txt change

$(INSTALLED): pyproject.toml constraints.txt
	$(if $(wildcard $(BIN)/pip),,$(check_python))
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -e '.[dev]' -c constraints.txt
	rm -f $(VENV)/.installed-*
	touch $@

# Asked when the environment is about to be made; $(error) keeps the refusal to one line.
check_python = $(if $(filter True,$(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 10))' 2>/dev/null)),, \
	$(error $(PYTHON) is missing or older than Python 3.10, which Bumblebee needs: name another, make .venv PYTHON=python3.12))

# From nothing to a model that answers: text, then questions, then preferences. Each stage begins with the folder of the last.
quickstart: .venv  ## train a small model on Python's own documentation in three stages, and ask it
	$(BIN)/python recipes/quickstart/make_data.py --output $(QUICK)/data
	$(BIN)/bumblebee tokenizer --files $(QUICK)/data/documents.jsonl --vocab_size 4096 --output $(QUICK)/tokenizer --overwrite
	$(BIN)/bumblebee fit --config recipes/quickstart/pretrain.yaml --overwrite
	$(BIN)/bumblebee fit --config recipes/quickstart/sft.yaml --overwrite
	$(BIN)/bumblebee fit --config recipes/quickstart/dpo.yaml --overwrite
	$(BIN)/bumblebee merge --adapter $(QUICK)/dpo --output $(QUICK)/chat --overwrite
	@echo; echo "what the pretrained model writes:"; echo
	@$(BIN)/bumblebee generate --model $(QUICK)/pretrain --prompt "Return a new list" --temperature 0.5 --max_new_tokens 48 --seed 1
	@echo; echo "what the fine-tuned model answers:"; echo
	@$(BIN)/bumblebee evaluate --config recipes/quickstart/sft.yaml --model $(QUICK)/chat --split validation
	@echo; echo "preferences on pairs that it has not seen, before and after DPO:"
	@sed -n 's/.*validation at \(step [0-9]*\).*\(rewards.accuracies [0-9.]*\).*\(logps.accuracies [0-9.]*\).*/  \1: \2 (rewarded more), \3 (more probable)/p' \
	  $(QUICK)/dpo/log.txt
	@echo; echo "curves: $(QUICK)/{pretrain,sft,dpo}/loss.png"
	@echo "Ask it yourself, in a browser at http://127.0.0.1:8000, or here:"
	@echo "  $(BIN)/bumblebee serve --config recipes/quickstart/serve.yaml"
	@echo "  $(BIN)/bumblebee chat --model $(QUICK)/chat"

# A process for each core; the tests of a file stay together, since they share what takes long to make. ARGS="-n 0" has one.
SHARED := -n auto --dist loadfile
# Idle OpenMP threads must sleep: spinning, they take the cores from each other when several processes share them.
test: .venv  ## the tests that take seconds
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -m "not slow" $(SHARED) $(ARGS)

test-slow: .venv  ## the tests that train, start processes or run whole commands
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -m slow --timeout 1800 $(SHARED) $(ARGS)

golden: .venv  ## write the golden losses anew, after a change that is meant to change them
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python tests/golden/golden.py

docs: .venv  ## write docs/configuration.md and the table in docs/gpu.md anew, after a change of options or sizes
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_gpu.py

vendor:  ## the chat page's libraries, fetched from npm again and compared with their checksums
	serve/page/vendor/fetch.sh

lint: .venv  ## what must be clean before a commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)

types: .venv
	$(BIN)/mypy $(PACKAGES)

format: .venv  ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# runs/ is left alone: it holds somebody's trained models.
clean:  ## remove the environment and the caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
