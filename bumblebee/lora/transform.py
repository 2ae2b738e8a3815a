"""The LoRA transform: low-rank updates of linear layers, listed under ``task.transforms`` in a recipe.

The run then saves adapter folders in PEFT's layout: the updates, and the path of the base model.
"""

from __future__ import annotations

from pathlib import Path

from bumblebee.checkpoint.adapters.settings import EXPERTS
from bumblebee.checkpoint.model_files import files_of
from bumblebee.lora import peft_layers
from bumblebee.lora.adapter_files import AdapterFiles
from bumblebee.lora.switch import has_adapters
from bumblebee.lora.targets import adapter_rules, resolve_targets
from bumblebee.models.base import LanguageModel
from bumblebee.nn.moe import Experts
from bumblebee.nn.quantized import QuantizedWeight


class LoRA:
    """Trains low-rank updates of linear layers and freezes everything else.

    A layer computes ``W x + s B A x``, where A has ``rank`` rows and B, which is initialized to zero, has ``rank`` columns. The
    initial A depends only on the run's seed and the layer's name.

    Args:
        rank: rank of the updates.
        alpha: numerator of the scale s = alpha / rank, so that the rank can change without a new learning rate.
        dropout: probability of dropping an input of A during training.
        targets: "all-linear" for the projections of attention and MLP; or a list of name suffixes, such as
            [q_proj, v_proj]; or a regular expression for complete module names.
        dora: also learn the magnitude of each row of W + s B A (DoRA, arXiv 2402.09353).
        rslora: use s = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
        experts: also train an update for each expert of a mixture of experts; requires dropout 0 and no dora. A forward pass
            then materializes the merged weights of a layer's experts.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        rank: int = 64,
        alpha: int = 128,
        dropout: float = 0.1,
        targets: str | list[str] = "all-linear",
        dora: bool = False,
        rslora: bool = False,
        experts: bool = False,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if alpha < 1:
            raise ValueError(f"alpha must be at least 1, got {alpha}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if experts and (dropout or dora):
            raise ValueError(f"experts requires dropout 0 and dora false, got dropout {dropout:g} and dora {str(dora).lower()}")
        if not targets:
            raise ValueError("targets must be all-linear, a list of names or a regular expression, got an empty value")
        self.rank, self.alpha, self.dropout, self.targets = rank, alpha, dropout, targets
        self.dora, self.rslora, self.experts = dora, rslora, experts

    def __call__(self, model: LanguageModel) -> None:
        """Add adapters to the model, in place.

        Raises:
            ValueError: targets match no layer, the model already has adapters, or it was not loaded from a folder.
        """
        if has_adapters(model):
            raise ValueError("task.transforms: the model already has LoRA adapters; list LoRA once")
        if any(isinstance(module, QuantizedWeight) for module in model.modules()):
            raise ValueError("task.transforms: LoRA cannot adapt a quantized model: load it without quantize")
        base = getattr(model, "source", None)
        if base is None:
            raise ValueError(
                "task.transforms: LoRA needs a model loaded from a folder, because only adapters are saved, with the path of"
                " their base model: set task.model to bumblebee.Bumblebee.from_pretrained with a folder"
            )
        if self.experts and not any(isinstance(module, Experts) for module in model.modules()):
            raise ValueError("experts: the model is not a mixture of experts")
        self._inject(model, base)

    def _inject(self, model: LanguageModel, base: Path) -> None:
        with peft_layers.unsharded_adapters():
            config = peft_layers.create_config(
                base,
                r=self.rank,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=resolve_targets(model, self.targets),
                target_parameters=list(EXPERTS) if self.experts else None,
                use_dora=self.dora,
                use_rslora=self.rslora,
            )
            peft_layers.inject(model, config)
            peft_layers.initialize(model)
        adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
        if model.config.score_head:
            peft_layers.save_score_head(config)
        model.files = AdapterFiles(model.config, config, adapter_rules(model), adapted, files_of(model).fingerprint())
