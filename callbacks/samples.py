"""Samples: text that the model writes during training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.rl.sampled_text import SampledText
from bumblebee.training.metrics.jsonl_log import truncate_after
from bumblebee.utils.formatting import printable
from bumblebee.utils.text_files import append_text

if TYPE_CHECKING:
    from bumblebee.inference.generator import Generator
    from bumblebee.trainer import Trainer

FILE = "samples.jsonl"


class Samples(Callback):
    """Shows what the model writes every few steps: printed, in samples.jsonl and in TensorBoard.

    It generates completions of some prompts: on rank 0, while the other ranks wait; at ZeRO stage 3 every device holds the
    whole model during that time. In reinforcement learning it also shows the best and the worst of the completions that the
    step has sampled anyway, with their rewards.

    Args:
        prompts: texts to continue; null generates nothing, for tasks that sample completions themselves.
        every: optimizer steps between two times; the last step is one in any case.
        max_new_tokens: maximum number of generated tokens.
        temperature: divides the logits; 0 is greedy decoding.

    Raises:
        ValueError: there are no prompts, or a number is out of range.
    """

    def __init__(
        self, prompts: list[str] | None = None, every: int = 500, max_new_tokens: int = 64, temperature: float = 0.8
    ) -> None:
        if prompts is not None and not prompts:
            raise ValueError("prompts must not be empty")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)  # raises before training starts
        self.prompts, self.every = list(prompts or ()), every
        self.max_new_tokens, self.temperature = max_new_tokens, temperature

    def check(self, trainer: Trainer) -> None:
        """Check the data.

        Raises:
            ValueError: the model is a reward model, the data has no tokenizer, or there is nothing to show.
        """
        if not self.prompts and trainer.task.sampled_texts() is None:
            name = type(trainer.task).__name__
            raise ValueError(f"callbacks: Samples needs prompts to continue: {name} does not sample completions itself")
        if getattr(getattr(trainer.task.model, "config", None), "score_head", False):
            raise ValueError("callbacks: Samples needs a model that predicts tokens, not a reward model: remove the callback")
        if trainer.data.tokenizer is None:
            raise ValueError("callbacks: Samples needs a tokenizer: set data.tokenizer, or remove the callback")

    def on_fit_start(self, trainer: Trainer) -> None:
        """Check the prompts and drop samples after the step that the run resumes from.

        Raises:
            ValueError: a prompt is empty or too long.
        """
        if self.prompts:
            generator = self._generator(trainer)
            for prompt in self.prompts:
                generator.prepare(prompt, self._params(trainer))
            trainer.engine.train()
        if trainer.is_main:
            truncate_after(trainer.output_dir / FILE, trainer.step)

    def on_save(self, trainer: Trainer) -> None:
        """Show texts if due; in this hook so that it does not count towards the time of the step."""
        ends = trainer.step == trainer.plan.max_steps or trainer.should_stop
        if trainer.step % self.every and not ends:
            return
        samples = [*self._generate(trainer), *(trainer.task.sampled_texts() or ())]
        if trainer.is_main:
            self._write(trainer, samples)
        trainer.report_samples(samples)

    def _generate(self, trainer: Trainer) -> list[SampledText]:
        """Completions of the prompts, on rank 0."""
        if not self.prompts:
            return []
        texts: list[str] = []
        with trainer.engine.whole_model():
            if trainer.is_main:
                generations = self._generator(trainer).generate(self.prompts, self._params(trainer))
                texts = [generation.text for generation in generations]
        trainer.engine.train()
        return [SampledText(prompt, text) for prompt, text in zip(self.prompts, texts, strict=False)]

    def _generator(self, trainer: Trainer) -> Generator:
        from bumblebee.inference.generator import Generator

        assert trainer.data.tokenizer is not None
        return Generator(trainer.engine.model, trainer.data.tokenizer)  # type: ignore[arg-type]

    def _params(self, trainer: Trainer) -> SamplingParams:
        """Seeded by the step, so that a resumed run generates the same texts; the global random state is not used."""
        seed = trainer.seed + trainer.step
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=seed)

    def _write(self, trainer: Trainer, samples: Sequence[SampledText]) -> None:
        lines = [json.dumps({"step": trainer.step, **sample.to_json()}, ensure_ascii=False) + "\n" for sample in samples]
        append_text(trainer.output_dir / FILE, "".join(lines))
        for sample in samples:
            trainer.print(_described(sample, trainer.step))


def _described(sample: SampledText, step: int) -> str:
    """On the console; a completion with a reward may be long, and is on one line."""
    if sample.reward is None:
        return f"{sample.title} at step {step:,}: {sample.prompt}{sample.text}"
    return (
        f"{sample.title} completion at step {step:,}, {sample.score}: {_shortened(sample.prompt)} → {_shortened(sample.text)}"
    )


def _shortened(text: str, length: int = 400) -> str:
    """On one line, without the middle of a long text: its end often has the answer."""
    line = printable(text.strip().replace("\n", "⏎"))
    return line if len(line) <= length else f"{line[: length // 2]} … {line[-length // 2 :]}"
