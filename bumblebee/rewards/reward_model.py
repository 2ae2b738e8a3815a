"""RewardModel: a trained reward model scores completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bumblebee.checkpoint.adapters.folder import is_reward_model
from bumblebee.rewards.reward import CompletionError, InputReward, RewardInput
from bumblebee.tokenizer.assistant_mask import Message
from bumblebee.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from bumblebee.models.base import LanguageModel

At = Literal["end_of_turn", "end_of_text"]


class RewardModel(InputReward):
    """Score of a completion by a reward model, such as one that ``bumblebee.RewardModel`` has trained.

    The conversation up to the question and the completion are rendered with the chat template of the model's folder. Each rank
    holds the whole model on its device.

    Args:
        folder: of the reward model, or of an adapter: a sequence classifier of transformers with one label, of a supported
            family.
        batch_size: completions in a forward pass; those of similar length are scored together.
        dtype: of the weights: auto for the folder's, float32, bfloat16 or float16.
        at: the token whose score counts: end_of_turn, the one that ends the answer, as ``bumblebee.RewardModel`` trains; or
            end_of_text, the last one that the chat template writes, such as a newline after it, as TRL trains.

    Raises:
        ValueError: an option that cannot be used, or a folder without a reward model.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 16,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        at: At = "end_of_turn",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
        if at not in ("end_of_turn", "end_of_text"):
            raise ValueError(f"at must be end_of_turn or end_of_text, got {at!r}")
        self.folder, self.batch_size, self.dtype, self.at = folder, batch_size, dtype, at
        self.tokenizer: Tokenizer | None = None
        self.model: LanguageModel | None = None

    def check(self) -> None:
        """Check the folder, and read its tokenizer.

        Raises:
            ValueError: it holds no reward model of a supported family, or no tokenizer with a chat template.
        """
        from bumblebee.checkpoint.hf_folder import load_config

        if Path(self.folder).is_dir() and not is_reward_model(self.folder):
            raise ValueError(f"folder: {self.folder} does not hold a reward model, but a model that predicts tokens")
        load_config(self.folder)
        self.tokenizer = Tokenizer.from_pretrained(self.folder)
        self.tokenizer.chat_template.end_of_turn_id  # noqa: B018  (raises for a template that cannot be used)

    def begin(self, device: torch.device) -> None:
        """Load the model."""
        import torch

        from bumblebee.models.loading import load_model

        if self.tokenizer is None:
            self.check()
        dtype: torch.dtype | None = None if self.dtype == "auto" else getattr(torch, self.dtype)
        self.model = load_model(self.folder, dtype, device).eval().requires_grad_(False)

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """See the base class. Without ``begin``, the model is loaded onto the default device."""
        if self.model is None:
            from bumblebee.distributed.process_group import pick_device

            self.begin(pick_device("auto"))
        assert self.model is not None
        rows = [self._ids(each) for each in inputs]
        positions = self.model.config.max_position_embeddings
        for index, row in enumerate(rows):
            if len(row) > positions:
                raise CompletionError(index, "cannot read", f"{len(row)} tokens, the model has {positions} positions")
        return score_rows(self.model, rows, self.batch_size)

    def _ids(self, each: RewardInput) -> list[int]:
        """The tokens of a conversation, up to the one whose score counts."""
        assert self.tokenizer is not None
        template = self.tokenizer.chat_template
        prompt: Sequence[Message] = each.messages or [{"role": "user", "content": each.prompt}]
        whole: list[Message] = [*prompt, {"role": "assistant", "content": each.completion}]
        if self.at == "end_of_text":
            return template.apply(whole, each.tools)
        try:
            chat = template.encode_turns(whole, each.tools, "last")[-1]
        except ValueError:  # the template omits a part, such as the reasoning: score what the model has written
            answer = self.tokenizer.encode(each.completion)
            return [*template.apply(prompt, each.tools, add_generation_prompt=True), *answer, template.end_of_turn_id]
        return chat.ids[: len(chat.ids) - chat.target_mask[::-1].index(True)]


def score_rows(model: LanguageModel, rows: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """Score of the last token of each row of token ids, in batches of similar lengths."""
    import torch

    device = next(model.parameters()).device
    scores = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            width = len(rows[part[-1]])
            input_ids = torch.tensor([[*rows[index], *[0] * (width - len(rows[index]))] for index in part])
            last = torch.tensor([number * width + len(rows[index]) - 1 for number, index in enumerate(part)])
            values = model(input_ids.to(device), logits_at=last.to(device)).flatten().tolist()
            for index, value in zip(part, values, strict=True):
                scores[index] = value
    return scores
