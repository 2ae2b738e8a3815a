"""GRPO: reinforcement learning from the rewards of groups of completions (arXiv 2402.03300), and its relatives.

For each prompt the model samples a group of completions; a completion's advantage A compares its reward with the others'
(``bumblebee/rl/advantages.py``). The completions of a rollout batch are sampled with the weights before its first step, and
trained on in ``steps_per_rollout`` times ``rollout_epochs`` optimizer steps. The loss of a token is in
``bumblebee/rl/policy_loss.py``. Token losses are added up in one of these ways:

    sequence    mean over completions of the mean over a completion's tokens        GRPO
    token       mean over the tokens of all completions of the step                 DAPO, arXiv 2503.14476
    constant    sum / (completions * max_new_tokens)                                Dr. GRPO, arXiv 2503.20783
    sum         mean over completions of the sum over a completion's tokens         RLOO, arXiv 2402.14740

All numbers are of the whole step: all micro-batches and ranks. Advantages are those of the whole rollout batch. Completions
are sampled and scored by ``bumblebee/tasks/group_sampler.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from bumblebee.datamodule import Batch, DataModule
from bumblebee.models.loading import load_model
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.batch_invariant import batch_invariant
from bumblebee.rl.advantages import AdvantageKind, advantages_of
from bumblebee.rl.dynamic_sampling import Place, fill_places, with_sampled_groups
from bumblebee.rl.invariance import check_invariant_model, check_invariant_run
from bumblebee.rl.panels import HEADLINE, PANELS
from bumblebee.rl.policy_loss import KLEstimator, Normalisation, PolicyLoss, RatioLevel, Surrogate, loss_divisor, loss_sum
from bumblebee.rl.reward_check import reward_notes
from bumblebee.rl.rollout import Question, Rollout
from bumblebee.rl.rollout_files import ScoredRollout, best_and_worst, write_rollouts
from bumblebee.rl.sampled_text import SampledText
from bumblebee.rl.scoring import WeightedRewards
from bumblebee.rl.tool_use import tool_use_of
from bumblebee.rl.training_batch import completion_sums, prompts_of, training_batch, without_completions
from bumblebee.tasks.group_sampler import GroupSampler
from bumblebee.tasks.pair_log_probs import token_log_probs
from bumblebee.tasks.reference import FrozenReference, PolicyReference
from bumblebee.tasks.reference_choice import ReferenceChoice
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.task import ForwardFn, Task
from bumblebee.tasks.tokenizer_checks import adopt_tokenizer, check_length, check_predicts_tokens
from bumblebee.tasks.weight_gathering import GatherWeights
from bumblebee.transforms import apply_transforms

_PER_COMPLETION = ("reward", "truncated")
_PER_GROUP = ("reward_std", "equal_groups", "group_variance")
_RESAMPLED = ("resampled", "excluded")  # per group


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
        importance_cap: largest weight of a token that corrects for the sampler's rounding; null does not weight.
        keep_rollouts: rollout batches whose completions stay in output_dir/rollouts; 0 writes none.
        steps_per_rollout: optimizer steps whose completions are sampled together, before the first of them.
        rollout_epochs: times that sampled completions are trained on.
        surrogate: objective of a token: clip, cispo or sapo.
        ratio: of probabilities after and before steps: of each token, or of a whole completion (sequence).
        clip: how far ratios may fall below 1, and rise above it; null does not clip.
        clip_high: how far ratios may rise above 1, if that is not ``clip``.
        sapo_temperatures: of sapo, for positive and for negative advantages.
        kl_beta: weight of the KL divergence from the reference in the loss; 0 needs no reference.
        kl_estimator: k1, k2 or k3.
        kl_correction: multiply the KL term by the ratio, so that its gradient is that of the divergence.
        reference: adapters_off (the model without its adapters), copy (the initial model), the folder of another model, or
            auto: adapters_off if the model has adapters, else copy.
        resample_rounds: how often a step may sample groups of further prompts in place of groups with equal rewards, which are
            then left out of the loss; 0 trains on all groups (docs/rl.md).
        batch_invariant: sample and train with log-probabilities that are equal bit for bit, which is slower (docs/rl.md).
        tools: Python functions, by path, that the model may call in completions (docs/rl.md); null for none.
        max_turns: with tools, maximum number of turns of a completion; the last one's calls are not made.
        tool_timeout: seconds for one call, in a worker process; null calls tools in the training process, without a limit.
        tool_processes: worker processes on each rank.
        gather_weights: at ZeRO stage 3, hold all weights on every device while completions are sampled (all), or those of one
            block at a time (layers), which is slower; auto: all if they fit in memory (docs/rl.md).

    Raises:
        ValueError: a number out of range.
    """

    panels, headline = PANELS, HEADLINE

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
        steps_per_rollout: int = 1,
        rollout_epochs: int = 1,
        surrogate: Surrogate = "clip",
        ratio: RatioLevel = "token",
        clip: float | None = 0.2,
        clip_high: float | None = None,
        sapo_temperatures: tuple[float, float] = (1.0, 1.05),
        kl_beta: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        kl_correction: bool = True,
        reference: str = "auto",
        resample_rounds: int = 0,
        batch_invariant: bool = False,
        tools: list[Callable[..., object]] | None = None,
        max_turns: int = 4,
        tool_timeout: float | None = 30.0,
        tool_processes: int = 4,
        gather_weights: GatherWeights = "auto",
    ) -> None:
        self.model, self.transforms = model, apply_transforms(model, transforms)
        self.rewards = WeightedRewards(rewards, reward_weights)
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.advantages, self.normalise, self.keep_rollouts = advantages, normalise, keep_rollouts
        self.resample_rounds, self.batch_invariant = resample_rounds, batch_invariant
        self.tool_use = tool_use_of(tools, max_turns, tool_timeout, tool_processes)
        self.sampler = GroupSampler(model, self.rewards, group_size, max_new_tokens, self.tool_use, batch_invariant)
        self.steps_per_rollout, self.rollout_epochs, self.gather_weights = steps_per_rollout, rollout_epochs, gather_weights
        self.policy_loss = PolicyLoss(
            surrogate, ratio, clip, clip_high, sapo_temperatures, importance_cap, kl_beta, kl_estimator, kl_correction
        )
        self.reference_choice = ReferenceChoice(model, reference)
        self._reference: PolicyReference | FrozenReference | None = None
        self._check()
        self.weights = {"grpo": 1.0}
        self.units = {
            **{f"rl/{name}": "completions" for name in (*_PER_COMPLETION, *(f"reward/{name}" for name in self.rewards.names))},
            **self.policy_loss.units(self.off_policy),
            **{f"rl/{name}": "groups" for name in (*_PER_GROUP, *(_RESAMPLED if resample_rounds else ()))},
            "rl/length": "trained",
            "_reward_square": "completions",
        }
        self._run: RunContext | None = None
        self._scored: list[ScoredRollout] = []  # of the last step, on this rank

    def _check(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2: a completion is compared with others; got {self.group_size}")
        for name in ("max_new_tokens", "steps_per_rollout", "rollout_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.reference_choice.name != "auto" and not self.policy_loss.kl_beta:
            raise ValueError(f"reference: {self.reference_choice.name} has no effect without kl_beta")
        if self.keep_rollouts < 0:
            raise ValueError(f"keep_rollouts must be at least 0, got {self.keep_rollouts}")
        if self.resample_rounds < 0:
            raise ValueError(f"resample_rounds must be at least 0, got {self.resample_rounds}")
        if self.resample_rounds and self.advantages == "batch_std":
            raise ValueError(
                "resample_rounds replaces groups with equal rewards, from which advantages: batch_std does learn; use another"
                " kind of advantages, or resample_rounds: 0"
            )

    @property
    def off_policy(self) -> bool:
        """Whether several steps are taken on a rollout batch."""
        return self.steps_per_rollout * self.rollout_epochs > 1

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
        if self.batch_invariant:
            check_invariant_model(self.model)
        check_predicts_tokens(self.model)
        check_length(self.model, data)
        adopt_tokenizer(self.model, data.tokenizer, data.stop_ids)
        self.rewards.check()
        if self.policy_loss.kl_beta:
            self.reference_choice.set_up()
        self.sampler.set_up(data)

    def begin(self, run: RunContext, /) -> None:
        """Keep the run's context, and load the reference and the rewards' models."""
        if self.batch_invariant:
            check_invariant_run(run.device, run.precision, run.zero_stage)
        self._run = self.sampler.run = run
        self._reference = self.reference_choice.open(run) if self.policy_loss.kl_beta else None
        self.rewards.begin(run.device)
        self.sampler.choose_gathering(self.gather_weights)

    def begin_validation(self, device: torch.device) -> None:
        """Load the rewards' models."""
        self.rewards.begin(device)

    def summary(self) -> dict[str, object]:
        """Rewards, groups and the loss."""
        groups = f"{self.group_size} completions of at most {self.max_new_tokens} tokens"
        kl = f"{self.policy_loss.kl_beta:g} x {self.policy_loss.kl_estimator} from {self.reference_choice}"
        steps = f"{self.steps_per_rollout} x {self.rollout_epochs} per rollout batch"
        return {
            "rewards": str(self.rewards), "groups": groups, "advantages": self.advantages, "normalised by": self.normalise,
            **({"steps": steps, "loss": str(self.policy_loss)} if self.off_policy else {}),
            **({"tools": str(self.tool_use)} if self.tool_use else {}),
            **({"KL": kl} if self.policy_loss.kl_beta else {}),
            **({"weights for sampling": str(self.sampler.gathering)} if self.sampler.gathering else {}),
        }  # fmt: skip

    def frozen_models(self) -> list[nn.Module]:
        """The reference, unless it is the model itself, or there is none, and the rewards' models."""
        reference = self.reference_choice.frozen_models() if self.policy_loss.kl_beta else []
        return [*reference, *(load_model(str(folder)) for folder in self.rewards.folders().values())]

    def fixed_folders(self) -> dict[str, Path]:
        """The folders of the reference and of the rewards' models."""
        return {**(self.reference_choice.folders() if self.policy_loss.kl_beta else {}), **self.rewards.folders()}

    # -- rollouts --------------------------------------------------------------------------------------------------------

    def prepare_windows(self, windows: list[list[Batch]], step: int, /) -> list[list[Batch]]:
        """Sample completions of this rank's prompts with the current weights, and score them. Collective."""
        assert self._run is not None, "begin has not been called"
        self.sampler.meter.begin_step()
        own = [[index for index, _ in prompts_of(batch)] for window in windows for batch in window]
        groups = self.sampler.groups([index for prompts in own for index in prompts], step)
        sample = partial(self.sampler.groups, step=step)
        places = fill_places(groups, self.sampler.pool, self._run.seed, step, self.resample_rounds, sample)
        trained = [group for place in places for group in place.trained]
        rewards = torch.tensor([[each.reward for each in group] for group in trained], dtype=torch.float64)
        advantages = advantages_of(rewards.view(len(trained), self.group_size), self.advantages)
        self._keep(places, advantages, step)
        taken, rows = iter(places), iter(advantages)
        places_of = iter([[next(taken) for _ in prompts] for prompts in own])
        batches = iter([self._training_batch(batch, next(places_of), rows) for window in windows for batch in window])
        return [[self._with_log_probs(next(batches)) for _ in window] for window in windows]

    def _keep(self, places: Sequence[Place], advantages: Tensor, step: int) -> None:
        """Keep the completions for ``sampled_texts`` and in output_dir/rollouts; 0 is the advantage of those not trained on."""
        assert self._run is not None
        rows, zeros = iter(advantages.tolist()), [0.0] * self.group_size
        self._scored = [
            ScoredRollout(rollout, self.sampler.questions[rollout.prompt], advantage)
            for place in places
            for group in place.groups
            for rollout, advantage in zip(group, zeros if place.left_out(group) else next(rows), strict=True)
        ]
        if self.keep_rollouts:
            keep = self.keep_rollouts * self.steps_per_rollout * self.rollout_epochs
            write_rollouts(self._run.output_dir / "rollouts", step + 1, keep, self.rewards.names, self._scored)

    def _training_batch(self, batch: Batch, places: Sequence[Place], advantages: Iterator[Tensor]) -> Batch:
        """The completions in the places of a batch of prompts; takes the advantages of their groups."""
        groups = [group for place in places for group in place.trained]
        if groups:
            prompts = [self.sampler.prompt(group[0].prompt) for group in groups]
            trained = training_batch(prompts, groups, torch.stack([next(advantages) for _ in groups]))
        else:
            trained = without_completions(batch, len(self.rewards.names))
        return with_sampled_groups(trained, places, len(self.rewards.names)) if self.resample_rounds else trained

    def _with_log_probs(self, batch: Batch) -> Batch:
        """Add the log-probabilities of the policy before the first step and of the reference, as needed. Collective."""
        assert self._run is not None
        if not self.off_policy and self._reference is None:
            return batch
        moved, engine = self._run.to_device(batch), self._run.engine
        if self.off_policy:
            with batch_invariant(self.batch_invariant):
                batch["old_log_probs"] = PolicyReference(self.model, nullcontext).token_log_probs(engine, moved).cpu()
        if self._reference is not None:
            batch["reference_log_probs"] = self._reference.token_log_probs(engine, moved).cpu()
        return batch

    def without_targets(self, batch: Batch, /) -> Batch:
        """See the base class."""
        return without_completions(batch, len(self.rewards.names))

    def prepared_options(self) -> dict[str, object]:
        """See the base class."""
        kl = "with" if self.policy_loss.kl_beta else "without"
        return {
            "group_size": self.group_size, "rewards": self.rewards.names, "reference": f"{kl} kl_beta",
            "resample_rounds": self.resample_rounds,
        }  # fmt: skip

    def largest_batch(self, batch: Batch, /) -> Batch:
        """Completions of the maximum length."""
        prompts, blank = [self.sampler.prompt(index) for index, _ in prompts_of(batch)], [0] * self.max_new_tokens
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
        return reward_notes(self.rewards, [cast("Question", sample) for sample in samples], self.sampler.tokenizer.encode)

    # -- a step ----------------------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """What the loss is divided by, and the numbers of completions, their tokens, and groups."""
        targets = batch["labels"] != IGNORE_INDEX
        trained, tokens = int(targets.any(dim=1).sum()), int(targets.sum())
        divisor = loss_divisor(self.normalise, trained, tokens, self.max_new_tokens)
        completions, groups = len(batch["reward"]), len(batch["reward_std"])
        return {"grpo": divisor, "trained": trained, "completions": completions, "tokens": tokens, "groups": groups}

    def tokens(self, counts: dict[str, float]) -> int:
        """Number of sampled tokens."""
        tokens = int(counts["tokens"])
        self.sampler.meter.add_trained(tokens)
        return tokens

    def training_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sums of the loss, of rewards, and of what is logged about the completions."""
        self.sampler.meter.begin_step()
        with batch_invariant(self.batch_invariant):
            log_probs = token_log_probs(model, batch)  # (R, T), 0 elsewhere
        losses, token_sums = self.policy_loss(log_probs, batch)
        sums = {**completion_sums(batch, self.rewards.names), **token_sums}
        return {"grpo": loss_sum(losses, batch, self.normalise), **{name: value.double() for name, value in sums.items()}}

    def validation_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sums of the rewards and lengths of greedy completions."""
        rollouts = self.sampler.greedy([index for index, _ in prompts_of(batch)])
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
        self.sampler.meter.end_step()

    def derived_metrics(self, means: Mapping[str, float], /) -> dict[str, float]:
        """Standard deviation of the rewards over all completions."""
        variance = means["_reward_square"] - means["rl/reward"] ** 2
        return {"rl/reward_spread": math.sqrt(max(variance, 0.0))}

    def metrics(self) -> dict[str, float]:
        """The model's own, and those of sampling: lengths, speeds, where the time goes, tools, failed rewards."""
        return {**super().metrics(), **self.sampler.metrics()}

    def metric_sums(self) -> dict[str, Tensor]:
        """See the base class."""
        return {**super().metric_sums(), **self.sampler.state()}

    def restore_metric_sums(self, sums: Mapping[str, Tensor]) -> None:
        """See the base class."""
        super().restore_metric_sums(sums)
        self.sampler.restore(sums)
