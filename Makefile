# Developer commands. Requires GNU make 3.81 or newer and Python 3.10 or newer, no compiler.
#
#   make test ARGS="-k rope -x"       pass options to pytest
#   make .venv PYTHON=python3.12      create the environment with this Python (run make clean first to change it)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICK := runs/quickstart
QUICK_RL := runs/quickstart_rl
PACKAGES := $(patsubst %/__init__.py,%,$(wildcard $(addsuffix /__init__.py,bumblebee callbacks datamodules serve)))
# An editable install has a fixed list of top-level packages. The marker's name contains them, so a new package reinstalls.
INSTALLED := $(VENV)/.installed-$(subst $() $(),-,$(PACKAGES))

.PHONY: help .venv quickstart quickstart-rl test test-slow golden docs gpu gpus vendor lint types format clean

help:  ## list the targets
	@sed -n 's/^\([a-z.-]*\):.*## /\1	/p' Makefile

.venv: $(INSTALLED)  ## create the environment, or update it after changes of pyproject.toml or constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(if $(wildcard $(BIN)/pip),,$(check_python))
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -e '.[dev]' -c constraints.txt
	rm -f $(VENV)/.installed-*
	touch $@

# Evaluated before the environment is created; $(error) prints one line.
check_python = $(if $(filter True,$(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 10))' 2>/dev/null)),, \
	$(error $(PYTHON) is missing or older than Python 3.10, which Bumblebee requires: choose another one with make .venv PYTHON=python3.12))

# Pretraining on text, fine-tuning on questions, alignment with preferences. Each stage starts from the previous one's folder.
quickstart: .venv  ## train a small model on Python's own documentation in three stages and query it
	$(BIN)/python recipes/quickstart/make_data.py --output $(QUICK)/data
	$(BIN)/bumblebee tokenizer --files $(QUICK)/data/documents.jsonl --vocab_size 4096 --output $(QUICK)/tokenizer --overwrite
	$(BIN)/bumblebee fit --config recipes/quickstart/pretrain.yaml --overwrite
	$(BIN)/bumblebee fit --config recipes/quickstart/sft.yaml --overwrite
	$(BIN)/bumblebee fit --config recipes/quickstart/dpo.yaml --overwrite
	$(BIN)/bumblebee merge --adapter $(QUICK)/dpo --output $(QUICK)/chat --overwrite
	@echo; echo "Text by the pretrained model:"; echo
	@$(BIN)/bumblebee generate --model $(QUICK)/pretrain --prompt "Return a new list" --temperature 0.5 --max_new_tokens 48 --seed 1
	@echo; echo "Answers of the final model:"; echo
	@$(BIN)/bumblebee evaluate --config recipes/quickstart/sft.yaml --model $(QUICK)/chat --split validation \
	  --output $(QUICK)/evaluation/questions --overwrite
	@$(BIN)/bumblebee evaluate --model $(QUICK)/pretrain --tasks perplexity:$(QUICK)/data/documents_validation.jsonl \
	  --max_length 256 --output $(QUICK)/evaluation/pretrain --overwrite >/dev/null
	@$(BIN)/bumblebee evaluate --model $(QUICK)/sft --tasks preference_accuracy:$(QUICK)/data/preferences_validation.jsonl \
	  --output $(QUICK)/evaluation/sft --overwrite >/dev/null
	@$(BIN)/bumblebee evaluate --model $(QUICK)/chat --tasks recipes/evaluation/quickstart.yaml \
	  --output $(QUICK)/evaluation/chat --overwrite >/dev/null
	@echo; echo "Results, with standard errors:"; echo
	@$(BIN)/python recipes/quickstart/show_results.py --runs $(QUICK)
	@echo; echo "Loss curves: $(QUICK)/{pretrain,sft,dpo}/loss.png"
	@echo "Chat with the model in a browser at http://127.0.0.1:8000, or in the terminal:"
	@echo "  $(BIN)/bumblebee serve --config recipes/quickstart/serve.yaml"
	@echo "  $(BIN)/bumblebee chat --model $(QUICK)/chat"

# A model that has learnt sums from a careless teacher, then reinforcement learning with a Python function as the reward.
quickstart-rl: .venv  ## teach a small model to add by reinforcement learning, from rewards alone
	$(BIN)/python recipes/quickstart_rl/make_sums.py --output $(QUICK_RL)/data
	$(BIN)/bumblebee tokenizer --files $(QUICK_RL)/data/tokenizer.txt --vocab_size 300 --output $(QUICK_RL)/tokenizer --overwrite
	$(BIN)/bumblebee fit --config recipes/quickstart_rl/sft.yaml --overwrite
	$(BIN)/bumblebee fit --config recipes/quickstart_rl/grpo.yaml --overwrite
	@echo; $(BIN)/python recipes/quickstart_rl/show_rewards.py --runs $(QUICK_RL)
	@echo; echo "Rewards during training: $(QUICK_RL)/grpo/loss.png, completions: $(QUICK_RL)/grpo/rollouts"

# One process per core. The tests of a file run in the same process, since they share expensive fixtures. ARGS="-n 0": one process.
SHARED := -n auto --dist loadfile
# Idle OpenMP threads must sleep: spinning threads of several processes slow each other down.
test: .venv  ## run the fast tests
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -m "not slow" $(SHARED) $(ARGS)

test-slow: .venv  ## run the tests that train, start processes or run whole commands
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -m slow --timeout 1800 $(SHARED) $(ARGS)

golden: .venv  ## regenerate the golden losses, after a change that is meant to change them
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python tests/golden/golden.py

docs: .venv  ## regenerate docs/configuration.md and the table in docs/gpu.md, after a change of options or sizes
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_gpu.py

# ARGS="--only train decode" runs some of the parts, ARGS=--resume those that have not been ok yet.
gpu: .venv  ## measure what only a GPU can show: speed, memory, exactness (docs/gpu.md)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

gpus: .venv  ## the same for all GPUs of this machine together: scaling, and ranks that fail
	$(BIN)/python -m benchmarks.gpu.several $(ARGS)

vendor:  ## fetch the chat page's libraries from npm and compare them with their checksums
	serve/page/vendor/fetch.sh

lint: .venv  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/lint-imports --no-cache

types: .venv  ## run mypy only
	$(BIN)/mypy $(PACKAGES)

format: .venv  ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# runs/ is kept: it contains trained models.
clean:  ## remove the environment and the caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
