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

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from bumblebee.datamodule import Batch, DataModule
from bumblebee.inference.generator import Generator
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.nn import IGNORE_INDEX
from bumblebee.plotting.panels import Panel, ShownMetric
from bumblebee.rl.advantages import AdvantageKind, advantages_of
from bumblebee.rl.policy_loss import Normalisation, loss_divisor, loss_sum, token_losses, token_sums
from bumblebee.rl.reward_check import reward_notes
from bumblebee.rl.rollout import Question, Rollout, flat, rollout_seed, sample_groups
from bumblebee.rl.rollout_files import ScoredRollout, best_and_worst, write_rollouts
from bumblebee.rl.rollout_meter import RolloutMeter
from bumblebee.rl.sampled_text import SampledText
from bumblebee.rl.scoring import WeightedRewards
from bumblebee.rl.training_batch import completion_sums, prompts_of, training_batch, without_completions
from bumblebee.tasks.reference import evaluation_mode
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.task import ForwardFn, Task
from bumblebee.tasks.tokenizer_checks import adopt_tokenizer, check_length, check_predicts_tokens
from bumblebee.transforms import apply_transforms

_PER_COMPLETION = ("reward", "length", "truncated")
_PER_TOKEN = ("logprob_drift", "entropy")
_PER_GROUP = ("reward_std", "equal_groups", "group_variance")
_REWARD = ShownMetric("rl/reward", "reward", spread="rl/reward_spread")
_LENGTH = ShownMetric("rl/length", "length", axis="tokens per completion")
_TRUNCATED = ShownMetric("rl/truncated", "truncated", axis="share that is truncated", fraction=True)


class GRPO(Task):
    """Group relative policy optimization.

    Batches hold prompts, as from ``datamodules.Prompts``.

    Args:
        model: called as ``model(input_ids, position_ids=..., labels=...)``, returns token losses (R, T).
        rewards: reward functions, by class path or function path; see ``bumblebee/rewards/``.
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

    panels = (  # the loss is near 0 by construction
        Panel(_REWARD),
        Panel(_LENGTH, _TRUNCATED),
        Panel(
            ShownMetric("rl/entropy", "entropy", axis="entropy (nats per token)"),
            ShownMetric("rl/logprob_drift", "drift", axis="log-probability drift"),
        ),
        Panel(ShownMetric("rl/kl", "KL", axis="KL (nats per token)"), ShownMetric("rl/clipped", "clipped", fraction=True)),
    )
    headline = (
        _REWARD, _LENGTH, _TRUNCATED,
        ShownMetric("rl/time_sampling", "sampling", fraction=True), ShownMetric("rl/time_rewards", "scoring", fraction=True),
        ShownMetric("rl/time_training", "training", fraction=True),
    )  # fmt: skip

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
        self.rewards = WeightedRewards(rewards, reward_weights)
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.advantages, self.normalise, self.importance_cap = advantages, normalise, importance_cap
        self.keep_rollouts = keep_rollouts
        self._check()
        self.weights = {"grpo": 1.0}
        self.units = {
            **{f"rl/{name}": "completions" for name in (*_PER_COMPLETION, *(f"reward/{name}" for name in self.rewards.names))},
            **{f"rl/{name}": "tokens" for name in _PER_TOKEN},
            **{f"rl/{name}": "groups" for name in _PER_GROUP},
            "_reward_square": "completions",
        }
        self._run: RunContext | None = None
        self._meter = RolloutMeter(max_new_tokens)
        self._scored: list[ScoredRollout] = []  # of the last step, on this rank

    def _check(self) -> None:
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
        check_predicts_tokens(self.model)
        check_length(self.model, data)
        adopt_tokenizer(self.model, data.tokenizer, data.stop_ids)
        self.rewards.check()
        self._questions: dict[int, Question] = {each.index: each for each in samples}
        self._tokenizer, self._stop_ids = data.tokenizer, data.stop_ids
        longest = max(samples, key=lambda sample: len(sample.ids))
        positions = getattr(getattr(self.model, "config", None), "max_position_embeddings", math.inf)
        if len(longest.ids) + self.max_new_tokens > positions:
            raise ValueError(
                f"task.max_new_tokens: {self.max_new_tokens} and the longest prompt's {len(longest.ids)} tokens"
                f" ({longest.place}) exceed the model's {positions} positions; set a smaller max_new_tokens or data.max_length"
            )

    def begin(self, run: RunContext, /) -> None:
        """Keep the run's context, and load the rewards' models."""
        self._run = run
        self.rewards.begin(run.device)

    def begin_validation(self, device: torch.device) -> None:
        """Load the rewards' models."""
        self.rewards.begin(device)

    def summary(self) -> dict[str, object]:
        """Rewards, groups and the loss."""
        groups = f"{self.group_size} completions of at most {self.max_new_tokens} tokens"
        return {"rewards": str(self.rewards), "groups": groups, "advantages": self.advantages, "normalised by": self.normalise}

    # -- rollouts --------------------------------------------------------------------------------------------------------

    def prepare_step(self, window: list[Batch], step: int) -> list[Batch]:
        """Sample completions of this rank's prompts with the current weights, and score them. Collective."""
        assert self._run is not None, "begin has not been called"
        self._meter.begin_step()
        seed = self._run.seed
        prompts = [prompts_of(batch) for batch in window]
        params = [
            [self._params(rollout_seed(seed, step, index, number)) for number in range(self.group_size)]
            for batch in prompts
            for index, _ in batch
        ]
        with self._meter.timed("sampling"):
            groups = self._sample([each for batch in prompts for each in batch], params)
        rollouts = flat(groups)
        self._meter.add([len(rollout.tokens) for rollout in rollouts])
        questions = [self._questions[rollout.prompt] for rollout in rollouts]
        with self._meter.timed("rewards"):
            self.rewards.score(rollouts, questions)
        rewards = torch.tensor([each.reward for each in rollouts], dtype=torch.float64).view(len(groups), self.group_size)
        advantages = advantages_of(rewards, self.advantages)
        scored = zip(rollouts, questions, advantages.flatten().tolist(), strict=True)
        self._scored = [ScoredRollout(*each) for each in scored]
        if self.keep_rollouts:
            write_rollouts(self._run.output_dir / "rollouts", step + 1, self.keep_rollouts, self.rewards.names, self._scored)
        batches, at = [], 0
        for batch, own in zip(window, prompts, strict=True):
            part = slice(at, at + len(own))
            at += len(own)
            if own:
                batches.append(training_batch(own, groups[part], advantages[part]))
            else:
                batches.append(without_completions(batch, len(self.rewards.names)))
        return batches

    def largest_batch(self, batch: Batch, /) -> Batch:
        """Completions of the maximum length."""
        prompts, blank = prompts_of(batch), [0] * self.max_new_tokens
        rewards = [0.0] * len(self.rewards.names)
        groups = [
            [Rollout(index, blank, [0.0] * len(blank), rewards=rewards) for _ in range(self.group_size)] for index, _ in prompts
        ]
        return training_batch(prompts, groups, torch.zeros(len(groups), self.group_size))

    def completions_of(self, batch: Batch, /) -> tuple[int, int]:
        """See the base class."""
        rows, length = batch["input_ids"].shape
        return rows, length + 1  # the last token of a row is a label only

    def notes_on(self, samples: Sequence[object], /) -> list[list[str]]:
        """Rewards of the record's own answer and of an empty completion."""
        return reward_notes(self.rewards, [cast("Question", sample) for sample in samples], self._tokenizer.encode)

    def _sample(
        self, prompts: Sequence[tuple[int, list[int]]], params: Sequence[Sequence[SamplingParams]]
    ) -> list[list[Rollout]]:
        """``sample_groups`` from the current weights, which are gathered at stage 3. Collective in a run."""
        whole = nullcontext() if self._run is None else self._run.engine.whole_model()
        with whole, evaluation_mode(self.model):
            generator = Generator(self.model, self._tokenizer, self._stop_ids)  # type: ignore[arg-type]
            return sample_groups(generator, prompts, params)

    def _params(self, seed: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.max_new_tokens, seed=seed, logprobs=0)

    # -- a step ----------------------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """What the loss is divided by, and the numbers of completions, their tokens, and groups."""
        targets = batch["labels"] != IGNORE_INDEX
        completions, tokens = int(targets.any(dim=1).sum()), int(targets.sum())
        divisor = loss_divisor(self.normalise, completions, tokens, self.max_new_tokens)
        return {"grpo": divisor, "completions": completions, "tokens": tokens, "groups": completions // self.group_size}

    def tokens(self, counts: dict[str, float]) -> int:
        """Number of sampled tokens."""
        return int(counts["tokens"])

    def training_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sums of the loss, of rewards, and of what is logged about the completions."""
        log_probs = -model(batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"])
        losses = token_losses(log_probs, batch, self.importance_cap)
        sums = {**completion_sums(batch, self.rewards.names), **token_sums(log_probs, batch)}
        return {"grpo": loss_sum(losses, batch, self.normalise), **{name: value.double() for name, value in sums.items()}}

    def validation_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sums of the rewards and lengths of greedy completions."""
        prompts = prompts_of(batch)
        greedy = SamplingParams(max_new_tokens=self.max_new_tokens, temperature=0.0)
        rollouts = flat(self._sample(prompts, [[greedy]] * len(prompts)))
        self.rewards.score(rollouts, [self._questions[rollout.prompt] for rollout in rollouts])
        sums = {
            "rl/reward": sum(rollout.reward for rollout in rollouts),
            "rl/length": sum(len(rollout.tokens) for rollout in rollouts), "completions": len(rollouts),
            "rl/truncated": sum(rollout.truncated for rollout in rollouts),
            **{f"rl/reward/{name}": sum(each.rewards[at] for each in rollouts) for at, name in enumerate(self.rewards.names)},
        }  # fmt: skip
        return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in sums.items()}

    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Means of greedy completions: reward, length, and how many are truncated."""
        count = max(sums["completions"], 1.0)
        return {f"validation_{name}": value / count for name, value in sums.items() if name != "completions"}

    def sampled_texts(self) -> list[SampledText]:
        """The best and the worst completion of the last step, over all ranks. Collective."""
        return best_and_worst(self._scored, self.rewards.names)

    # -- metrics ---------------------------------------------------------------------------------------------------------

    def after_step(self) -> None:
        """The model's own, and the end of the step's time."""
        super().after_step()
        self._meter.end_step()

    def derived_metrics(self, means: Mapping[str, float], /) -> dict[str, float]:
        """Standard deviation of the rewards over all completions."""
        variance = means["_reward_square"] - means["rl/reward"] ** 2
        return {"rl/reward_spread": math.sqrt(max(variance, 0.0))}

    def metrics(self) -> dict[str, float]:
        """The model's own, the longest completion, speeds, where the time goes, and completions that could not be scored."""
        failures = self.rewards.failures.take() if self.rewards.can_fail else {}
        return {**super().metrics(), **self._meter.metrics(), **failures}

    def metric_sums(self) -> dict[str, Tensor]:
        """See the base class."""
        meter = self._meter.state()
        failures = self.rewards.failures.state() if meter and self.rewards.can_fail else {}  # none after a line
        return {**super().metric_sums(), **meter, **failures}

    def restore_metric_sums(self, sums: Mapping[str, Tensor]) -> None:
        """See the base class."""
        super().restore_metric_sums(sums)
        self._meter.restore(sums)
        self.rewards.failures.restore(sums)
