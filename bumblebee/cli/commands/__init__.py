"""The commands of ``bumblebee``: one module each, named as the command.

Each has ``parser()``, which returns its options, and ``run(words)``, which parses the words after the command and executes it.
The modules are imported on demand, so this table is all that ``bumblebee --help`` needs.
"""

from __future__ import annotations

COMMANDS = {
    "fit": "Train a model from a recipe",
    "validate": "Compute the validation metrics of a trained model",
    "preview": "Show what a recipe would do, without training",
    "verify": "Check that training is numerically correct on this machine, and benchmark it",
    "generate": "Generate text from prompts",
    "chat": "Chat with a model in the terminal",
    "serve": "Serve a model: OpenAI-compatible API and chat page",
    "evaluate": "Evaluate a model: perplexity, multiple choice, generation, preferences",
    "sweep": "Search the options of a recipe for the best value of a metric",
    "plot": "Compare the metrics of runs in one figure",
    "rollouts": "Read the completions of a GRPO run, and rate its prompts",
    "tokenizer": "Train a tokenizer on text files",
    "consolidate": "Convert a sharded checkpoint to a model folder",
    "merge": "Merge a LoRA adapter into its base model",
}
