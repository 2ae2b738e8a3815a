"""GroupSampler: completions of prompts, sampled from the weights in training and scored by rewards.

Tokens are sampled at temperature 1, without top-k or top-p, so that the sampled distribution is the one whose log-probabilities
are trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from bumblebee.datamodule import DataModule
from bumblebee.distributed import process_group
from bumblebee.inference.generator import Generator
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.nn.batch_invariant import batch_invariant
from bumblebee.rewards.reward import RewardError
from bumblebee.rl.rollout import Question, Rollout, flat, rollout_seed, sample_groups
from bumblebee.rl.rollout_meter import RolloutMeter
from bumblebee.rl.scoring import WeightedRewards
from bumblebee.rl.tool_meter import ToolMeter
from bumblebee.rl.tool_use import ToolUse
from bumblebee.tasks.policy_sampling import check_room, policy_generator
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.weight_gathering import Gathering, GatherWeights, gathering_in_run


class GroupSampler:
    """Samples groups of completions.

    Args:
        model: the policy.
        rewards: score the completions.
        group_size: completions of each prompt.
        max_new_tokens: maximum tokens of a completion.
        tool_use: lets the policy call tools; None for single answers.
        invariant: compute batch-invariant log-probabilities.

    Attributes:
        run: the run's context; None outside of a training run.
        gathering: how the weights are gathered at stage 3, after ``choose_gathering``; else None.
        meter: counts and times what is sampled.
        questions: prompts by their index in the data, after ``set_up``.
        pool: indices of the training prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        rewards: WeightedRewards,
        group_size: int,
        max_new_tokens: int,
        tool_use: ToolUse | None,
        invariant: bool,
    ) -> None:
        self.model, self.rewards, self.tool_use, self.invariant = model, rewards, tool_use, invariant
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.run: RunContext | None = None
        self.gathering: Gathering | None = None
        self.meter, self._tool_meter = RolloutMeter(max_new_tokens), ToolMeter()
        self.questions: dict[int, Question] = {}
        self.pool: list[int] = []

    def set_up(self, data: DataModule) -> None:
        """Read the prompts.

        Raises:
            ValueError: a prompt and its completion may exceed the model's positions.
        """
        assert data.tokenizer is not None
        self.questions = {sample.index: sample for split in (data.train, data.validation) for sample in split or ()}
        self.pool = [sample.index for sample in data.train]
        self.tokenizer, self._stop_ids = data.tokenizer, data.stop_ids
        if self.tool_use is not None:
            self.tool_use.set_up(data.tokenizer)
        own = self.tool_use.prompt_ids if self.tool_use is not None else lambda question: question.ids
        self._prompts = {index: own(question) for index, question in self.questions.items()}
        longest = max(self._prompts, key=lambda index: len(self._prompts[index]))
        tokens, place = len(self._prompts[longest]), self.questions[longest].place
        check_room(self.model, self.max_new_tokens, tokens, f" ({place})")

    def choose_gathering(self, option: GatherWeights) -> None:
        """Decide how to gather the weights at stage 3, when everything else that the run holds is in memory. Collective."""
        assert self.run is not None
        lengths = [len(ids) for ids in self._prompts.values()]
        self.gathering = gathering_in_run(option, self.model, self.run, self.group_size, lengths, self.max_new_tokens)

    def prompt(self, index: int) -> tuple[int, list[int]]:
        """A prompt's index and its token ids, with the descriptions of tools."""
        return index, self._prompts[index]

    def groups(self, prompts: Sequence[int], step: int) -> list[list[Rollout]]:
        """A group of completions of each prompt on this rank, with rewards. Collective."""
        assert self.run is not None
        seed, numbers = self.run.seed, range(self.group_size)
        params = [[self._params(rollout_seed(seed, step, index, number)) for number in numbers] for index in prompts]
        with self.meter.timed("sampling"):
            groups = self._sample(prompts, params)
        rollouts = flat(groups)
        self.meter.add([len(rollout.tokens) for rollout in rollouts])
        self._tool_meter.add(rollouts)
        with self.meter.timed("rewards"):
            self._score(rollouts)
        return groups

    def greedy(self, prompts: Sequence[int]) -> list[Rollout]:
        """One completion of each prompt, without randomness, with rewards. Collective in a run."""
        greedy = SamplingParams(max_new_tokens=self.max_new_tokens, temperature=0.0)
        rollouts = flat(self._sample(prompts, [[greedy]] * len(prompts)))
        self._score(rollouts)
        return rollouts

    def _params(self, seed: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.max_new_tokens, seed=seed, logprobs=0)

    def _sample(self, indices: Sequence[int], params: Sequence[Sequence[SamplingParams]]) -> list[list[Rollout]]:
        """Completions from the current weights, which are gathered at stage 3."""
        prompts = [self.prompt(index) for index in indices]
        if self.tool_use is not None:
            return self._sample_with_tools(self.tool_use, prompts, params)
        with self._generator() as generator:
            return sample_groups(generator, prompts, params)

    def _sample_with_tools(
        self, tool_use: ToolUse, prompts: Sequence[tuple[int, list[int]]], params: Sequence[Sequence[SamplingParams]]
    ) -> list[list[Rollout]]:
        """If tools cannot be called on one rank, all ranks stop, once none of them samples any more."""
        groups: list[list[Rollout]] = []
        error: RewardError | None = None
        try:
            with self._generator() as generator:
                groups = tool_use.sample(generator, [(self.questions[index], ids) for index, ids in prompts], params)
        except RewardError as failure:
            error = failure
        process_group.raise_on_all_ranks(error, "tools cannot be called on another rank")
        return groups

    @contextmanager
    def _generator(self) -> Iterator[Generator]:
        sampling = policy_generator(self.model, self.tokenizer, self._stop_ids, self.run, self.gathering)
        with sampling as generator, batch_invariant(self.invariant):
            yield generator

    def _score(self, rollouts: Sequence[Rollout]) -> None:
        self.rewards.score(rollouts, [self.questions[rollout.prompt] for rollout in rollouts])

    # -- metrics -----------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Lengths, speeds, where the time goes, calls of tools, and completions that could not be scored. Collective."""
        failures = self.rewards.failures.take() if self.rewards.can_fail else {}
        tools = self._tool_meter.metrics() if self.tool_use else {}
        return {**self.meter.metrics(), **failures, **tools}

    def state(self) -> dict[str, Tensor]:
        """What ``metrics`` has summed on this rank, for a checkpoint between two lines."""
        meter = self.meter.state()
        failures = self.rewards.failures.state() if meter and self.rewards.can_fail else {}  # none after a line
        tools = self._tool_meter.state() if self.tool_use else {}
        return {**meter, **failures, **tools}

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from ``state``."""
        self.meter.restore(sums)
        self.rewards.failures.restore(sums)
        self._tool_meter.restore(sums)
