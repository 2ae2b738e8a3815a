"""Samples: what the model writes while it is being trained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.inference.sampling_params import SamplingParams
from bumblebee.training.metric_formatting import say
from callbacks.metrics_history import cut_back

if TYPE_CHECKING:
    from bumblebee.inference.generator import Generator
    from bumblebee.trainer import Trainer

FILE = "samples.jsonl"


class Samples(Callback):
    """Continues some prompts now and then; prints the texts and writes them to samples.jsonl.

    Rank 0 generates while the others wait. At ZeRO stage 3 every device holds the whole model for that time.

    Args:
        prompts: texts to continue.
        every: optimizer steps between two samples; there is one at the end in any case.
        max_new_tokens: tokens to add at most.
        temperature: the logits are divided by it; 0 always takes the most likely token.

    Raises:
        ValueError: no prompts, or a number out of its range.
    """

    def __init__(self, prompts: list[str], every: int = 500, max_new_tokens: int = 64, temperature: float = 0.8) -> None:
        if not prompts:
            raise ValueError("prompts must hold at least one text, got none")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)  # refuses early
        self.prompts, self.every, self.max_new_tokens, self.temperature = list(prompts), every, max_new_tokens, temperature

    def on_fit_start(self, trainer: Trainer) -> None:
        """Refuse what cannot be continued, and remove what comes after the step from which the run goes on.

        Raises:
            ValueError: data without a tokenizer, or a prompt that is empty or too long.
        """
        if trainer.data.tokenizer is None:
            raise ValueError("callbacks: Samples needs a tokenizer: set data.tokenizer, or remove the callback")
        generator = self._generator(trainer)
        for prompt in self.prompts:
            generator.prepare(prompt, self._params(trainer))
        trainer.engine.train()
        if trainer.is_main:
            cut_back(trainer.output_dir / FILE, trainer.step)

    def on_save(self, trainer: Trainer) -> None:
        """Generate if it is time; here, since the step is over then, and its time is known."""
        ends = trainer.step == trainer.plan.max_steps or trainer.should_stop
        if trainer.step % self.every and not ends:
            return
        with trainer.engine.whole_model():
            if trainer.is_main:
                generations = self._generator(trainer).generate(self.prompts, self._params(trainer))
        trainer.engine.train()
        if trainer.is_main:
            self._write(trainer, [generation.text for generation in generations])

    def _generator(self, trainer: Trainer) -> Generator:
        from bumblebee.inference.generator import Generator

        assert trainer.data.tokenizer is not None
        return Generator(trainer.engine.model, trainer.data.tokenizer)  # type: ignore[arg-type]

    def _params(self, trainer: Trainer) -> SamplingParams:
        """The seed is the step's, so that a resumed run writes the same; the global random state has no part in it."""
        seed = trainer.seed + trainer.step
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=seed)

    def _write(self, trainer: Trainer, texts: list[str]) -> None:
        with (trainer.output_dir / FILE).open("a", encoding="utf-8") as stream:
            for prompt, text in zip(self.prompts, texts, strict=True):
                line = {"step": trainer.step, "prompt": prompt, "text": text}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                say(f"sample at step {trainer.step:,}: {prompt}{text}")
