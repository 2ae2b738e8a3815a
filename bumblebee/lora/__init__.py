"""LoRA (arXiv 2106.09685): train low-rank updates of linear layers with PEFT, save them as adapter folders.

Reading and merging adapters needs no peft: ``bumblebee/checkpoint/adapters``.
"""

from bumblebee.lora.attach import attach
from bumblebee.lora.merge_check import logit_differences
from bumblebee.lora.switch import adapters_off, has_adapters
from bumblebee.lora.transform import LoRA

__all__ = ["LoRA", "adapters_off", "attach", "has_adapters", "logit_differences"]
