"""StudentSamples: completions that a student samples, for a teacher to correct (on-policy distillation, arXiv 2306.13649).

Tokens are sampled at temperature 1, without top-k or top-p: from the distribution that is trained. Seeds depend on the step,
the prompt and the number of the completion only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bumblebee.datamodule import Batch, DataModule
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.nn import IGNORE_INDEX
from bumblebee.rl.rollout import Rollout, flat, rollout_seed, sample_groups
from bumblebee.rl.sampled_text import SampledText
from bumblebee.rl.training_batch import completion_rows, prompts_of
from bumblebee.tasks.policy_sampling import check_room, policy_generator
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.weight_gathering import Gathering, GatherWeights, gathering_in_run


class StudentSamples:
    """Turns batches of prompts into batches of completions.

    Args:
        model: the student.
        data: prompts, set up.
        per_prompt: completions of each prompt.
        max_new_tokens: maximum tokens of a completion.

    Raises:
        ValueError: a prompt and its completion may exceed the model's positions.
    """

    def __init__(self, model: nn.Module, data: DataModule, per_prompt: int, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.stop_ids = model, data.tokenizer, data.stop_ids
        self.per_prompt, self.max_new_tokens = per_prompt, max_new_tokens
        self.run: RunContext | None = None
        self.gathering: Gathering | None = None
        self._questions = {sample.index: sample.question for sample in data.train}
        self._last: list[Rollout] = []  # of the last step, on this rank
        self._longest = max(len(sample.ids) for split in (data.train, data.validation) for sample in split or ())
        check_room(model, max_new_tokens, self._longest)

    def choose_gathering(self, option: GatherWeights) -> None:
        """Decide how to gather the weights at stage 3, when everything else that the run holds is in memory. Collective."""
        assert self.run is not None
        sizes = self.per_prompt, [self._longest], self.max_new_tokens
        self.gathering = gathering_in_run(option, self.model, self.run, *sizes)

    def window(self, window: Sequence[Batch], step: int) -> list[Batch]:
        """Sample completions of a step's prompts on this rank with the current weights. Collective."""
        assert self.run is not None
        seed, numbers = self.run.seed, range(self.per_prompt)
        prompts = [prompts_of(batch) for batch in window]
        every = [prompt for of_batch in prompts for prompt in of_batch]
        params = [[self._params(seed=rollout_seed(seed, step, index, number)) for number in numbers] for index, _ in every]
        sampled = self._sample(every, params)
        self._last, groups = flat(sampled), iter(sampled)
        return [
            _rows(batch, of_batch, [next(groups) for _ in of_batch])
            for batch, of_batch in zip(window, prompts, strict=True)
        ]  # fmt: skip

    def greedy(self, batch: Batch) -> Batch:
        """One completion of each prompt of a batch, without randomness, on the batch's device. Collective in a run."""
        prompts, params = prompts_of(batch), self._params(temperature=0.0)
        rows = _rows(batch, prompts, self._sample(prompts, [[params]] * len(prompts)))
        return {name: tensor.to(batch["labels"].device) for name, tensor in rows.items()}

    def texts(self) -> list[SampledText]:
        """The first completion of the last step on this rank, if there is one."""
        return [SampledText(self._questions[rollout.prompt], rollout.text) for rollout in self._last[:1]]

    def largest(self, batch: Batch) -> Batch:
        """Completions of the maximum length, without sampling."""
        blank = Rollout(0, [0] * self.max_new_tokens, [0.0] * self.max_new_tokens)
        prompts = prompts_of(batch)
        return _rows(batch, prompts, [[blank] * self.per_prompt for _ in prompts])

    def _params(self, seed: int | None = None, temperature: float = 1.0) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.max_new_tokens, seed=seed, temperature=temperature)

    def _sample(
        self, prompts: Sequence[tuple[int, list[int]]], params: Sequence[Sequence[SamplingParams]]
    ) -> list[list[Rollout]]:
        with policy_generator(self.model, self.tokenizer, self.stop_ids, self.run, self.gathering) as generator:
            return sample_groups(generator, prompts, params)


def _rows(batch: Batch, prompts: Sequence[tuple[int, list[int]]], groups: Sequence[Sequence[Rollout]]) -> Batch:
    """``input_ids``, ``labels`` and ``position_ids`` (R, T), and ``truncated`` (R,); a row without targets if R is 0."""
    if not prompts:
        row = {name: batch[name][:1] for name in ("input_ids", "labels", "position_ids")}
        truncated = torch.zeros(1, dtype=torch.float64)
        return {**row, "labels": torch.full_like(row["labels"], IGNORE_INDEX), "truncated": truncated}
    rows = completion_rows(prompts, groups)
    del rows["sampled_log_probs"]
    truncated = torch.tensor([float(rollout.truncated) for group in groups for rollout in group], dtype=torch.float64)
    return {**rows, "truncated": truncated}
