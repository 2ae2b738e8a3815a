"""Teacher: the frozen model that a student is distilled from.

The student's forward pass runs inside the teacher's head, so that the weights of both heads are there in the same place; at
ZeRO stage 3 they are gathered only there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bumblebee.checkpoint.adapters.folder import base_model_folder, is_reward_model
from bumblebee.datamodule import Batch, DataModule
from bumblebee.model import Bumblebee
from bumblebee.models.base import LanguageModel
from bumblebee.models.loading import load_model
from bumblebee.nn.linear_distillation import HeadInput
from bumblebee.nn.lm_head import LMHead
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.task import ForwardFn
from bumblebee.tasks.tokenizer_checks import check_length, check_vocabulary
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.tokenizer.vocab_merges import has_vocab_and_merges

HeadLoss = Callable[[HeadInput, HeadInput, Tensor], Tensor]  # of the student's, the teacher's, and labels


class Teacher:
    """A frozen model.

    Args:
        model: in evaluation mode and without gradients.
        head: its head.
        is_known: its logits are known to be those of its head.
    """

    def __init__(self, model: ForwardFn, head: LMHead, is_known: bool = False) -> None:
        self.model, self.head, self.is_known = model, head, is_known

    @classmethod
    def open(cls, folder: str, run: RunContext) -> Teacher:
        """Load a model folder onto the run's devices, in its precision; at stage 3 it is sharded. Collective."""
        with run.building():
            model = load_model(folder, run.engine.options.weights_dtype, run.device)
        cls.check(model, folder, run.data)
        head = head_of(model, f"teacher: {folder}")
        return cls(run.frozen(model), head, type(model) is Bumblebee)

    @classmethod
    def open_for_validation(cls, folder: str, device: torch.device) -> Teacher:
        """Load a model folder outside of a training run."""
        model = load_model(folder, device=device)
        return cls(model.eval().requires_grad_(False), head_of(model, f"teacher: {folder}"))

    @staticmethod
    def check(model: LanguageModel, folder: str, data: DataModule) -> None:
        """Check that the model fits the data.

        Raises:
            ValueError: it has too few positions, or fewer ids than the tokenizer.
        """
        check_length(model, data)
        check_vocabulary("teacher", folder, model.config, data.tokenizer)

    def with_student(self, student: ForwardFn, head: LMHead, batch: Batch, loss: HeadLoss) -> Tensor:
        """Run both models on a batch, and return what ``loss`` returns for its targets. Collective at stage 3.

        Args:
            student: the trained model, as ``training_step`` receives it.
            head: the student's.
            batch: on the models' device.
            loss: called once both heads have their input.

        Raises:
            ValueError: a model computes its logits in another way than by its head alone.
        """
        results: list[Tensor] = []
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "labels": batch["labels"]}
        device = batch["labels"].device.type
        with_gradients, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device)

        def in_teacher(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            teacher = HeadInput(hidden, weight)

            def in_student(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
                results.append(loss(HeadInput(hidden, weight), teacher, labels))
                return results[0]

            # As outside: the teacher runs without gradients, and at stage 0 under autocast.
            with torch.set_grad_enabled(with_gradients), torch.autocast(device, dtype, autocast), head.computing(in_student):
                outputs.append(student(**inputs))
            return labels.new_zeros(())  # not the loss: DeepSpeed would run the teacher's hooks in the backward pass

        outputs: list[Tensor] = []
        with torch.no_grad(), self.head.computing(in_teacher):
            self.model(**inputs)
        if not results:
            role = "task.model" if outputs else "teacher"
            raise ValueError(f"{role}: the logits are not those of the head alone (scaled or capped): it cannot be distilled")
        return outputs[0]


def head_of(model: nn.Module, role: str) -> LMHead:
    """The head of a model.

    Raises:
        ValueError: it is not a linear layer without bias.
    """
    head = LMHead.find(model)
    if head is None:
        raise ValueError(f"{role}: {type(model).__name__} has no linear head without bias: it cannot be distilled")
    return head


def check_folder(folder: str, tokenizer: Tokenizer | None) -> None:
    """Check that a teacher is a language model with the data's tokenizer, as far as its folder shows.

    A tokenizer may have further tokens, whose ids the other one does not use.

    Raises:
        ValueError: it is not.
    """
    if is_reward_model(folder):
        raise ValueError(f"teacher: {folder} is a reward model, which scores texts and predicts no tokens")
    own = next((each for each in (Path(folder), base_model_folder(folder)) if _has_tokenizer(each)), None)
    if own is None or tokenizer is None or Path(tokenizer.name_or_path).resolve() == own.resolve():
        return
    tokens = {index: token for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    of_teacher = Tokenizer.from_pretrained(own).backend.get_vocab(with_added_tokens=True)
    for token, index in sorted(of_teacher.items(), key=lambda item: item[1]):
        if tokens.get(index, token) != token:
            raise ValueError(
                f"teacher: {folder} has another tokenizer than the data: the id {index} is {token!r} there and"
                f" {tokens[index]!r} in the data; a teacher needs the student's tokenizer"
            )


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or has_vocab_and_merges(folder)
