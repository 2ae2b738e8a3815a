"""What the rewards give for the answers in the data and for saying nothing, so that a wrong reward is seen before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bumblebee.rewards.judge import Judge
from bumblebee.rl.rollout import Question, Rollout
from bumblebee.rl.sampled_text import SampledText
from bumblebee.rl.scoring import WeightedRewards
from bumblebee.utils.formatting import printable

ANSWER_KEYS = ("completion", "answer", "solution", "output", "response", "target")


def reward_notes(
    rewards: WeightedRewards, questions: Sequence[Question], encode: Callable[[str], list[int]]
) -> list[list[str]]:
    """For each question some lines: the reward of the record's own answer, if it has one, and of an empty completion.

    Args:
        rewards: of the task.
        questions: that are shown.
        encode: from a text to token ids, for rewards of lengths.

    Raises:
        RewardError: see ``WeightedRewards.score``.
    """
    keys = [*_keys_of(rewards), *ANSWER_KEYS]
    answers = [_answer_in(question.record, keys) for question in questions]
    texts = [(question, text) for question, (_, text) in zip(questions, answers, strict=True) if text is not None]
    scored = iter(_scored(rewards, [*texts, *((question, "") for question in questions)], encode))
    of_answers = [next(scored) if text is not None else None for _, text in answers]
    lines = [
        _lines(key, answer, empty)
        for (key, _), answer, empty in zip(answers, of_answers, list(scored), strict=True)
    ]  # fmt: skip
    for url in _endpoints(rewards) if lines else ():
        lines[-1].append(f"{url} was asked for these rewards; --samples 0 asks for none")
    return lines


def _endpoints(rewards: WeightedRewards) -> list[str]:
    """Where requests go, which may cost money, also from worker processes."""
    functions = [*rewards.functions, *(getattr(function, "reward", None) for function in rewards.functions)]
    return list(dict.fromkeys(function.base_url for function in functions if isinstance(function, Judge)))


def _keys_of(rewards: WeightedRewards) -> list[str]:
    """Of answers that reward functions read, also those in worker processes."""
    functions = [*rewards.functions, *(getattr(function, "reward", None) for function in rewards.functions)]
    return [key for key in (getattr(function, "key", None) for function in functions) if isinstance(key, str)]


def _answer_in(record: Mapping[str, object], keys: Sequence[str]) -> tuple[str, str | None]:
    """The first of the keys that the record has, and the answer there as text; the last message's of a conversation."""
    key = next((key for key in keys if record.get(key) is not None), "")
    answer = record.get(key)
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        answer = answer[-1].get("content")
    return key, None if answer is None else str(answer)


def _scored(
    rewards: WeightedRewards, texts: Sequence[tuple[Question, str]], encode: Callable[[str], list[int]]
) -> list[SampledText]:
    rollouts = [Rollout(question.index, encode(text), text=text) for question, text in texts]
    rewards.score(rollouts, [question for question, _ in texts])
    return [
        SampledText("", rollout.text, reward=rollout.reward, rewards=dict(zip(rewards.names, rollout.rewards, strict=True)))
        for rollout in rollouts
    ]


def _lines(key: str, answer: SampledText | None, empty: SampledText) -> list[str]:
    silence = f"empty completion: {empty.score}"
    if answer is None:
        return [f"the record has no answer under any of the keys {', '.join(ANSWER_KEYS)}", silence]
    assert answer.reward is not None and empty.reward is not None
    doubt = "" if answer.reward > empty.reward else "  (not more than for an empty completion: is the reward right?)"
    text = printable(answer.text.strip().replace("\n", "⏎"))
    return [f"its {key!r}, {text if len(text) <= 40 else '… ' + text[-40:]}: {answer.score}{doubt}", silence]
