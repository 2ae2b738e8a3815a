"""GRPO: reinforcement learning from the rewards of groups of completions (arXiv 2402.03300), and its relatives.

For each prompt the model samples a group of completions; a completion's advantage A compares its reward with the others'
(``bumblebee/rl/advantages.py``). Each step takes one optimizer step on new completions, so that the policy is the one that
sampled them, and the gradient of a token's loss is that of

    -w A log p(token),    w = min(p(token) / p_sampled(token), importance_cap), a constant

w corrects for the rounding between the engine that samples and the training forward pass (arXiv 2512.01374 calls it truncated
importance sampling); in fp32 it is 1 up to rounding. Token losses are added up in one of these ways:

    sequence    mean over completions of the mean over a completion's tokens        GRPO
    token       mean over the tokens of all completions of the step                 DAPO, arXiv 2503.14476
    constant    sum / (completions * max_new_tokens)                                Dr. GRPO, arXiv 2503.20783
    sum         mean over completions of the sum over a completion's tokens         RLOO, arXiv 2402.14740

All numbers are of the whole step: all micro-batches and ranks. Tokens are sampled at temperature 1, without top-k or top-p, so
that the sampled distribution is the one whose log-probabilities are trained.
Shapes: R completions (rows), T positions.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bumblebee.datamodule import Batch, DataModule
from bumblebee.distributed import process_group
from bumblebee.inference.generator import Generator
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.nn import IGNORE_INDEX
from bumblebee.rewards import RewardError, RewardFunction
from bumblebee.rl.advantages import AdvantageKind, advantages_of
from bumblebee.rl.rollout import Rollout, flat, rollout_seed, sample_groups
from bumblebee.tasks.reference import evaluation_mode
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.task import ForwardFn, Task
from bumblebee.tasks.tokenizer_checks import adopt_tokenizer, check_length
from bumblebee.transforms import apply_transforms
from bumblebee.utils.formatting import plural
from bumblebee.utils.text_files import append_text

Normalisation = Literal["sequence", "token", "constant", "sum"]
_PER_COMPLETION = ("reward", "length", "truncated")
_PER_TOKEN = ("logprob_drift", "entropy")


class GRPO(Task):
    """Group relative policy optimization.

    Batches hold prompts, as from ``datamodules.Prompts``.

    Args:
        model: called as ``model(input_ids, position_ids=..., labels=...)``, returns token losses (R, T).
        rewards: reward functions, by class path or function path; see ``bumblebee/rewards.py``.
        transforms: applied to the model in order, such as bumblebee.lora.LoRA.
        reward_weights: of the reward functions in their sum; null weights all 1.
        group_size: completions of each prompt.
        max_new_tokens: maximum tokens of a completion.
        advantages: group_std, group_mean, leave_one_out or batch_std.
        normalise: how token losses are added up: sequence, token, constant or sum.
        importance_cap: largest weight of a token; null does not weight.
        keep_rollouts: steps whose completions stay in output_dir/rollouts; 0 writes none.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        rewards: list[Callable[[list[str], list[str], list[Mapping[str, object]]], Sequence[float]]],
        transforms: list[Callable[[nn.Module], object]] | None = None,
        reward_weights: list[float] | None = None,
        group_size: int = 8,
        max_new_tokens: int = 256,
        advantages: AdvantageKind = "group_std",
        normalise: Normalisation = "sequence",
        importance_cap: float | None = 2.0,
        keep_rollouts: int = 20,
    ) -> None:
        self.model, self.transforms = model, apply_transforms(model, transforms)
        self.rewards: list[RewardFunction] = list(rewards)
        self.reward_weights = [1.0] * len(rewards) if reward_weights is None else list(reward_weights)
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.advantages, self.normalise, self.importance_cap = advantages, normalise, importance_cap
        self.keep_rollouts = keep_rollouts
        self._check()
        self.names = _unique([_name_of(reward) for reward in rewards])
        self.weights = {"grpo": 1.0}
        self.units = {
            **{f"rl/{name}": "completions" for name in (*_PER_COMPLETION, *(f"reward/{name}" for name in self.names))},
            **{f"rl/{name}": "tokens" for name in _PER_TOKEN},
            **{f"rl/{name}": "groups" for name in ("reward_std", "equal_groups")},
        }
        self._seconds, self._sampled = 0.0, 0  # of rollouts since the last line of metrics, on this rank

    def _check(self) -> None:
        if not self.rewards:
            raise ValueError("rewards must name at least one reward function, such as bumblebee.rewards.ExactAnswer")
        if len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards")
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2: a completion is compared with others; got {self.group_size}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.importance_cap is not None and not self.importance_cap >= 1:
            raise ValueError(f"importance_cap must be at least 1, got {self.importance_cap}")
        if self.keep_rollouts < 0:
            raise ValueError(f"keep_rollouts must be at least 0, got {self.keep_rollouts}")

    # -- preparation -----------------------------------------------------------------------------------------------------

    def setup(self, data: DataModule) -> None:
        """Check that the data holds prompts that leave room for completions."""
        samples = [sample for split in (data.train, data.validation) for sample in split or ()]
        if data.tokenizer is None or not all(hasattr(sample, "question") for sample in samples[:1]):
            raise ValueError(f"data: GRPO needs prompts, as from datamodules.Prompts; {type(data).__name__} has none")
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                raise ValueError(
                    f"GRPO needs a model without dropout; {name} has {module.p}: set dropout 0 (LoRA's default is 0.1)"
                )
        check_length(self.model, data)
        adopt_tokenizer(self.model, data.tokenizer, data.stop_ids)
        self._samples, self._tokenizer, self._stop_ids = {each.index: each for each in samples}, data.tokenizer, data.stop_ids
        longest = max(len(sample.ids) for sample in samples)
        positions = getattr(getattr(self.model, "config", None), "max_position_embeddings", math.inf)
        if longest + self.max_new_tokens > positions:
            raise ValueError(
                f"task.max_new_tokens: {self.max_new_tokens} and the longest prompt's {longest} tokens exceed the model's"
                f" {positions} positions; set a smaller max_new_tokens or data.max_length"
            )

    def begin(self, run: RunContext, /) -> None:
        """Keep the run's context."""
        self._run = run

    def begin_validation(self, device: torch.device) -> None:
        """Nothing: validation needs the model only."""

    def summary(self) -> dict[str, object]:
        """Rewards, groups and the loss."""
        rewards = ", ".join(
            name if weight == 1 else f"{weight:g} x {name}"
            for name, weight in zip(self.names, self.reward_weights, strict=True)
        )
        groups = f"{self.group_size} completions of at most {self.max_new_tokens} tokens"
        return {"rewards": rewards, "groups": groups, "advantages": self.advantages, "normalised by": self.normalise}

    # -- rollouts --------------------------------------------------------------------------------------------------------

    def prepare_step(self, window: list[Batch], step: int) -> list[Batch]:
        """Sample completions of this rank's prompts with the current weights, and score them. Collective."""
        began = time.perf_counter()
        prompts = [_prompts_of(batch) for batch in window]
        with self._run.engine.whole_model(), evaluation_mode(self.model):
            groups = self._sample([each for batch in prompts for each in batch], step)
        rollouts = flat(groups)
        self._seconds += time.perf_counter() - began
        self._sampled += sum(len(rollout.tokens) for rollout in rollouts)
        self._score_on_all_ranks(rollouts)
        rewards = torch.tensor([[self._reward(each) for each in group] for group in groups], dtype=torch.float64)
        advantages = advantages_of(rewards.view(len(groups), self.group_size), self.advantages)
        self._write(rollouts, advantages.flatten().tolist(), step)
        batches, at = [], 0
        for batch, own in zip(window, prompts, strict=True):
            part = slice(at, at + len(own))
            batches.append(
                self._training_batch(own, groups[part], advantages[part])
                if own
                else _without_completions(batch, len(self.names))
            )
            at += len(own)
        return batches

    def largest_batch(self, batch: Batch, /) -> Batch:
        """Completions of the maximum length."""
        prompts, blank = _prompts_of(batch), [0] * self.max_new_tokens
        rewards = [0.0] * len(self.names)
        groups = [
            [Rollout(index, blank, [0.0] * len(blank), rewards=rewards) for _ in range(self.group_size)] for index, _ in prompts
        ]
        return self._training_batch(prompts, groups, torch.zeros(len(groups), self.group_size))

    def _sample(self, prompts: Sequence[tuple[int, list[int]]], step: int) -> list[list[Rollout]]:
        if not prompts:
            return []
        params = [
            [self._params(rollout_seed(self._run.seed, step, index, number)) for number in range(self.group_size)]
            for index, _ in prompts
        ]
        return sample_groups(self._generator(), prompts, params)

    def _generator(self) -> Generator:
        return Generator(self.model, self._tokenizer, self._stop_ids)  # type: ignore[arg-type]

    def _params(self, seed: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.max_new_tokens, seed=seed, logprobs=0)

    def _score_on_all_ranks(self, rollouts: list[Rollout]) -> None:
        """``_score``; if a reward fails on one rank, all ranks stop. Collective."""
        error: RewardError | None = None
        try:
            self._score(rollouts)
        except RewardError as failure:
            error = failure
        process_group.raise_on_all_ranks(error, "a reward function failed on another rank")

    def _score(self, rollouts: list[Rollout]) -> None:
        """Call the reward functions.

        Raises:
            RewardError: one raised, or returned another number of rewards, or one that is not finite.
        """
        samples = [self._samples[rollout.prompt] for rollout in rollouts]
        prompts, records = [sample.question for sample in samples], [sample.record for sample in samples]
        texts = [rollout.text for rollout in rollouts]
        for name, reward in zip(self.names, self.rewards, strict=True):
            try:
                values = [float(value) for value in reward(prompts, texts, records)] if rollouts else []
            except Exception as error:
                places = _shortened(list(dict.fromkeys(sample.place for sample in samples)))
                raise RewardError(f"task.rewards: {name} failed on completions of {places}: {_origin(error)}") from error
            if len(values) != len(rollouts):
                given = plural(len(values), "reward")
                raise RewardError(f"task.rewards: {name} returned {given} for {len(rollouts)} completions")
            for value, rollout, sample in zip(values, rollouts, samples, strict=True):
                if not math.isfinite(value):
                    raise RewardError(f"task.rewards: {name} returned {value} for a completion of {sample.place}")
                rollout.rewards.append(value)

    def _reward(self, rollout: Rollout) -> float:
        return sum(weight * reward for weight, reward in zip(self.reward_weights, rollout.rewards, strict=True))

    def _training_batch(
        self, prompts: Sequence[tuple[int, list[int]]], groups: Sequence[Sequence[Rollout]], advantages: Tensor
    ) -> Batch:
        """One row per completion, after its prompt; padded on the right."""
        rows = [(ids, rollout) for (_, ids), group in zip(prompts, groups, strict=True) for rollout in group]
        shape = len(rows), max(len(ids) + len(rollout.tokens) for ids, rollout in rows) - 1
        input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
        sampled = torch.zeros(shape, dtype=torch.float32)
        for row, (ids, rollout) in enumerate(rows):
            begin, end = len(ids) - 1, len(ids) + len(rollout.tokens) - 1
            input_ids[row, :end] = torch.tensor([*ids, *rollout.tokens][:-1])
            labels[row, begin:end] = torch.tensor(rollout.tokens)
            sampled[row, begin:end] = torch.tensor(rollout.log_probs)
        totals = torch.tensor([[self._reward(each) for each in group] for group in groups], dtype=torch.float64)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": torch.arange(shape[1]).repeat(shape[0], 1),
            "sampled_log_probs": sampled,
            "advantages": advantages.flatten().float(),
            "rewards": torch.tensor([rollout.rewards for _, rollout in rows], dtype=torch.float64),
            "reward": totals.flatten(),
            "truncated": torch.tensor([float(rollout.truncated) for _, rollout in rows], dtype=torch.float64),
            "reward_std": totals.std(dim=1),
        }

    def _write(self, rollouts: Sequence[Rollout], advantages: Sequence[float], step: int) -> None:
        """Write the completions of a step, and delete those of older steps. Each rank has files of its own."""
        if not self.keep_rollouts:
            return
        folder = self._run.output_dir / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        rank = "" if self._run.is_main else f"-rank-{process_group.rank()}"
        file = folder / f"step-{step + 1:06d}{rank}.jsonl"
        file.unlink(missing_ok=True)  # of a run that was cut after this step
        append_text(file, "".join(self._line(*each, step) for each in zip(rollouts, advantages, strict=True)))
        (folder / f"step-{step + 1 - self.keep_rollouts:06d}{rank}.jsonl").unlink(missing_ok=True)

    def _line(self, rollout: Rollout, advantage: float, step: int) -> str:
        sample = self._samples[rollout.prompt]
        line = {
            "step": step + 1, "place": sample.place, "prompt": sample.question, "completion": rollout.text,
            "reward": self._reward(rollout), **dict(zip(self.names, rollout.rewards, strict=True)),
            "advantage": advantage, "tokens": len(rollout.tokens), "truncated": rollout.truncated,
        }  # fmt: skip
        return json.dumps(line, ensure_ascii=False) + "\n"

    # -- a step ----------------------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """What the loss is divided by, and the numbers of completions, their tokens, and groups."""
        targets = batch["labels"] != IGNORE_INDEX
        completions, tokens = int(targets.any(dim=1).sum()), int(targets.sum())
        divisors = {"token": tokens, "constant": completions * self.max_new_tokens}
        groups = completions // self.group_size
        return {
            "grpo": divisors.get(self.normalise, completions),
            "completions": completions,
            "tokens": tokens,
            "groups": groups,
        }

    def tokens(self, counts: dict[str, float]) -> int:
        """Number of sampled tokens."""
        return int(counts["tokens"])

    def training_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sums of the loss, of rewards, and of what is logged about the completions."""
        labels = batch["labels"]
        log_probs = -model(batch["input_ids"], position_ids=batch["position_ids"], labels=labels)  # (R, T), 0 elsewhere
        targets = labels != IGNORE_INDEX
        drift = torch.where(targets, log_probs.detach() - batch["sampled_log_probs"], 0.0)
        weights = torch.ones_like(drift) if self.importance_cap is None else drift.exp().clamp(max=self.importance_cap)
        # p / p.detach() is 1; its gradient is that of log p.
        ratios = (log_probs - log_probs.detach()).exp()
        losses = torch.where(targets, -weights * batch["advantages"][:, None] * ratios, 0.0)
        lengths = targets.sum(dim=1)
        loss = (losses.sum(dim=1) / lengths.clamp(min=1)).sum() if self.normalise == "sequence" else losses.sum()
        sums = {
            "rl/reward": batch["reward"].sum(), "rl/length": lengths.sum(), "rl/truncated": batch["truncated"].sum(),
            "rl/logprob_drift": drift.abs().sum(), "rl/entropy": -log_probs.detach().sum(),
            "rl/reward_std": batch["reward_std"].sum(), "rl/equal_groups": (batch["reward_std"] == 0).sum(),
            **{f"rl/reward/{name}": batch["rewards"][:, at].sum() for at, name in enumerate(self.names)},
        }  # fmt: skip
        return {"grpo": loss, **{name: value.double() for name, value in sums.items()}}

    def validation_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sums of the rewards and lengths of greedy completions."""
        prompts = _prompts_of(batch)
        engine = getattr(self, "_run", None) and self._run.engine
        with evaluation_mode(self.model):
            params = [[SamplingParams(max_new_tokens=self.max_new_tokens, temperature=0.0)]] * len(prompts)
            if engine:
                with engine.whole_model():
                    groups = sample_groups(self._generator(), prompts, params) if prompts else []
            else:
                groups = sample_groups(self._generator(), prompts, params)
        rollouts = flat(groups)
        self._score(rollouts)
        sums = {
            "rl/reward": sum(self._reward(rollout) for rollout in rollouts),
            "rl/length": sum(len(rollout.tokens) for rollout in rollouts), "completions": len(rollouts),
            **{f"rl/reward/{name}": sum(each.rewards[at] for each in rollouts) for at, name in enumerate(self.names)},
        }  # fmt: skip
        return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in sums.items()}

    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean reward and length of greedy completions."""
        count = max(sums["completions"], 1.0)
        return {f"validation_{name}": value / count for name, value in sums.items() if name != "completions"}

    def metrics(self) -> dict[str, float]:
        """The model's own, and the speed of sampling on this rank."""
        seconds, sampled, self._seconds, self._sampled = self._seconds, self._sampled, 0.0, 0
        speed = {"rl/sampled_tokens_per_second": sampled / seconds} if seconds else {}
        return {**super().metrics(), **speed}


def _prompts_of(batch: Batch) -> list[tuple[int, list[int]]]:
    """(index, token ids) of each prompt of a batch; none of a batch that only fills up a rank's share."""
    rows = zip(batch["index"].tolist(), batch["lengths"].tolist(), batch["input_ids"].tolist(), strict=True)
    return [(index, ids[:length]) for index, length, ids in rows if index >= 0]


def _without_completions(batch: Batch, rewards: int) -> Batch:
    """A batch of one row without targets, for a rank that runs out of prompts in the last step of an epoch."""
    row = {name: batch[name][:1] for name in ("input_ids", "labels", "position_ids")}
    zero = torch.zeros(1, dtype=torch.float64)
    return {
        **row,
        "sampled_log_probs": torch.zeros_like(row["labels"], dtype=torch.float32),
        "advantages": zero.float(),
        "rewards": zero.expand(1, rewards),
        "reward": zero,
        "truncated": zero,
        "reward_std": zero[:0],
    }


def _shortened(places: Sequence[str]) -> str:
    """The first three places, and how many more there are."""
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more


def _origin(error: Exception) -> str:
    """An error with the file and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error!r} ({frame.filename}:{frame.lineno})"


def _name_of(reward: RewardFunction) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def _unique(names: Sequence[str]) -> list[str]:
    """Names with a number where one occurs several times."""
    return [name if names.count(name) == 1 else f"{name}_{names[:at].count(name) + 1}" for at, name in enumerate(names)]
