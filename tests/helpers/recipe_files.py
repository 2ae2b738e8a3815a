"""A small recipe for tests of the command line, and the folder of the sample texts."""

from __future__ import annotations

from pathlib import Path

SAMPLES = Path(__file__).parents[2] / "recipes" / "samples"

RECIPE = """\
seed: 1
output_dir: out

task:
  class_path: bumblebee.LanguageModeling
  init_args:
    model:
      class_path: bumblebee.Bumblebee
      init_args:
        config:
          vocab_size: 400
          hidden_size: 32
          intermediate_size: 64
          num_hidden_layers: 2
          num_attention_heads: 4
          num_key_value_heads: 2

data:
  class_path: datamodules.Pretrain
  init_args:
    files: data.jsonl
    tokenizer: tok
    max_length: 32

optimizer:
  class_path: torch.optim.AdamW
  init_args:
    lr: 1.0e-3

schedule: {class_path: bumblebee.optim.Cosine, init_args: {warmup_ratio: 0.1}}

trainer:
  max_steps: 2
  micro_batch_size: 2
  accumulate: 1
  precision: fp32
  device: cpu

callbacks:
  checkpoint:
    class_path: callbacks.Checkpoint
    init_args:
      every: 1
"""
