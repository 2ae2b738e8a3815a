"""lm-evaluation-harness on our engine (the extra ``eval``).

    python -m bumblebee.evaluation.harness --model bumblebee --model_args path=FOLDER --tasks arc_easy,gsm8k ...

is the harness's own command ``lm_eval``, with all its options, and one more model. The harness finds models by name in a
registry and has no plugins: only a process that has imported this module knows the name ``bumblebee``. In Python,
:func:`run_harness_tasks` evaluates a generator, such as one of a model in training.

Tokens are those of the harness's ``hf`` model: special tokens that a text spells are special tokens, a begin-of-text token is
put first where the tokenizer does so, and long contexts are cut on the left.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from tqdm import tqdm

from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.scoring import Continuation, score
from bumblebee.evaluation.statistics import Estimate
from bumblebee.evaluation.tasks.task import EvaluationTask, Progress, SampleResult
from bumblebee.inference.generator import Generator
from bumblebee.inference.request import EngineRequest
from bumblebee.inference.sampling.sampling_params import MAX_STOP_LENGTH, MAX_STOPS, SamplingParams
from bumblebee.tokenizer.assistant_mask import Message
from bumblebee.utils.formatting import hint

try:
    from lm_eval import simple_evaluate
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as missing:
    if missing.name is None or missing.name.partition(".")[0] != "lm_eval":
        raise
    if __name__ == "__main__":
        print("error: lm-eval is not installed: pip install 'bumblebee[eval]'", file=sys.stderr)
        sys.exit(2)
    raise ValueError("tasks: lm-eval is not installed: pip install 'bumblebee[eval]'") from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKS = 256  # new tokens of tasks that set no limit, as of the harness's hf model
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")

TokenizedRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # texts or None, context, continuation


@register_model("bumblebee")
class BumblebeeLM(TemplateLM):
    """Our generator as a model of the harness.

    Args:
        path: model folder or adapter folder, whose adapter is not merged; or a generator.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto for the checkpoint's dtype, or float32, bfloat16, float16.
        device_map: auto spreads the layers over all GPUs if one of them is too small.
        trust_remote_code: run code that the folder names or contains.
        max_length: positions to use, at most the model's; None for all of them.
        max_gen_toks: new tokens of tasks that set no limit.
        prefix_token_id: token before a text without context; None for begin-of-text, or else end-of-text.
        add_bos_token: put the tokenizer's prefix before each text; None does so.
        think_end_token: answers begin after this text.
        batch_size: None, 1 or "auto": the engine batches by tokens, and needs none.
        max_batch_size: see ``batch_size``.
        unknown: refused, by name.

    Raises:
        ValueError: the folder cannot be loaded, or an argument is unknown or out of range.
    """

    def __init__(
        self,
        path: str | Generator | None = None,
        device: str | None = None,
        dtype: str = "auto",
        device_map: str | None = None,
        trust_remote_code: bool = False,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        think_end_token: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"model_args: unknown argument {next(iter(unknown))!r}; the model is named by path=FOLDER")
        if path is None:
            raise ValueError("model_args: missing path: write path=FOLDER")
        if device_map not in (None, "auto"):
            raise ValueError(f"model_args: device_map must be auto, got {device_map!r}")
        if str(batch_size or 1) not in ("1", "auto"):
            raise ValueError(f"batch_size: the engine batches by tokens; leave out batch_size {batch_size}")
        if isinstance(path, Generator):
            self.generator = path
        else:
            map_to: Literal["auto"] | None = "auto" if device_map else None
            self.generator = Generator.from_pretrained(path, device or "auto", dtype, map_to, trust_remote_code)
        positions = self.generator.model.config.max_position_embeddings
        if max_length is not None and not 1 < max_length <= positions:
            raise ValueError(f"model_args: max_length must be 2 to {positions}, the model's positions, got {max_length}")
        self._device = self.generator.device
        self.max_length, self.max_gen_toks = max_length or positions, max_gen_toks
        self.add_bos_token, self.think_end_token = add_bos_token, think_end_token
        self.custom_prefix_token_id = prefix_token_id

    # -- tokens ----------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        eos = self.generator.tokenizer.eos_token_id
        return min(self.generator.stop_ids, default=0) if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        if self.custom_prefix_token_id is not None:
            return self.custom_prefix_token_id
        bos = self.generator.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, a part of the names of the harness's cached requests."""
        return self.generator.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Encode a text, with the tokenizer's prefix unless the text begins with it or ``add_special_tokens`` is False."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token is not False
        return self.generator.tokenizer.prompt_ids(string, parse_special=True, add_special_tokens=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's chat template as the harness records it, or None if none is applied."""
        if chat_template is False:
            return None
        template = self.generator.tokenizer.settings.get("chat_template")
        if isinstance(template, list):
            named = {str(each["name"]): str(each["template"]) for each in template}
            return named.get(chat_template if isinstance(chat_template, str) else "default")
        return template

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """Render a conversation; without ``add_generation_prompt`` its last message is left open, to be continued."""
        render = self.generator.tokenizer.chat_template.render
        if add_generation_prompt:
            return render(chat_history, None, True)
        text, last = render(chat_history, None, False), str(chat_history[-1]["content"])
        end = text.rindex(last.strip())
        return text[: end + len(last.lstrip() if text[end:].startswith(last.lstrip()) else last.strip())]

    # -- log-likelihoods -------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[TokenizedRequest], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        continuations = [self._within_positions(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm or None) as bar:
            scores = score(self.generator, continuations, bar.update)
        answers = [(each.log_prob, each.is_greedy) for each in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _within_positions(self, context: list[int], continuation: list[int]) -> Continuation:
        """Cut the context on the left; the last token of a continuation is never read and takes no position."""
        room = max(self.max_length + 1 - len(continuation), 1)
        return Continuation((context or [self.prefix_token_id])[-room:], continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of all positions that predict each token once."""
        windows: list[TokenizedRequest] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            own = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            counts.append(len(own))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # -- generation ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string of the task, the end-of-text token or the limit of new tokens."""
        engine_requests, stops = [], []
        for number, request in enumerate(requests):
            context, gen_kwargs = request.args
            params, until = self._sampling(gen_kwargs)
            ids = self.tok_encode(context)[-(self.max_length - params.max_new_tokens) :]
            engine_requests.append(EngineRequest(str(number), ids or [self.prefix_token_id], params))
            stops.append(until)
        texts = self._generate(engine_requests, disable_tqdm)
        answers = [
            postprocess_generated_text(text, until, self.think_end_token) for text, until in zip(texts, stops, strict=True)
        ]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _generate(self, requests: list[EngineRequest], disable_tqdm: bool) -> list[str]:
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm or None) as bar:
            return [completion.text for completion in self.generator.complete(requests, bar.update)]

    def _sampling(self, gen_kwargs: Mapping[str, object]) -> tuple[SamplingParams, list[str]]:
        """How to sample, and the strings that end the answer.

        What a task leaves open is as in the folder's generation_config.json. An answer that may contain a train of thought
        is not ended by strings, which count only after it.

        Raises:
            ValueError: an argument is not supported, or no position is left for the context.
        """
        kwargs = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        until, new_tokens = [str(stop) for stop in kwargs.pop("until")], int(kwargs.pop("max_gen_toks"))
        do_sample = kwargs.pop("do_sample")
        if kwargs.get("num_beams") == 1:
            del kwargs["num_beams"]
        if unknown := [name for name in kwargs if name not in SAMPLING]:
            raise ValueError(f"gen_kwargs: {unknown[0]} is not supported; what is: {', '.join(SAMPLING)}")
        if not 0 < new_tokens < self.max_length:
            raise ValueError(
                f"gen_kwargs: max_gen_toks must be 1 to {self.max_length - 1}, since the model has {self.max_length}"
                f" positions, got {new_tokens}: set it with --gen_kwargs"
            )
        values = {name: value for name, value in kwargs.items() if value is not None}
        if not do_sample:
            values["temperature"] = 0.0
        elif "seed" not in values:  # another one for each sample, which the harness's seed repeats
            values["seed"] = int(torch.randint(2**31, ()))
        stop = [] if self.think_end_token else [each for each in until if 0 < len(each) <= MAX_STOP_LENGTH][:MAX_STOPS]
        return replace(self.generator.defaults, **values, stop=stop, max_new_tokens=new_tokens), until

    def get_model_info(self) -> dict[str, object]:
        """What the harness writes about the model into its results."""
        model = self.generator.model
        source = None if model.source is None else str(model.source)
        return {
            "model_num_parameters": model.num_parameters(),
            "model_dtype": str(self.generator.dtype),
            "model_folder": source,
        }


# -- tasks ---------------------------------------------------------------------------------------------------------------


def run_harness_tasks(
    generator: Generator,
    names: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = False,
    system_instruction: str | None = None,
    include_path: str | None = None,
    gen_kwargs: Mapping[str, object] | None = None,
    seed: int = 1234,
    log_samples: bool = True,
) -> dict[str, object]:
    """Evaluate a generator on tasks of the harness.

    Args:
        generator: the model.
        names: tasks, groups and tags, or patterns of them such as ``arc_*``.
        num_fewshot: examples before each question; None for the task's own number.
        limit: maximum number of samples of each task; None for all.
        apply_chat_template: render each prompt as a conversation.
        fewshot_as_multiturn: with a chat template, each example is a turn of its own.
        system_instruction: system prompt.
        include_path: folder of further tasks (YAML), which precede the harness's own.
        gen_kwargs: replace those of the tasks.
        seed: of the choice of examples, of bootstrapped errors and of sampling.
        log_samples: return the samples too.

    Returns:
        The harness's results: ``results`` has the metrics of each task, as ``{"acc,none": ..., "acc_stderr,none": ...}``,
        ``samples`` a list of records for each task, ``versions``, ``n-shot`` and ``configs`` what repeats them.

    Raises:
        ValueError: a task is unknown, or its data cannot be loaded.
    """
    manager, tasks = find_tasks(names, include_path)
    with _data_errors(tasks):
        results = simple_evaluate(
            model=BumblebeeLM(generator),
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn,
            system_instruction=system_instruction,
            gen_kwargs=dict(gen_kwargs) if gen_kwargs else None,
            log_samples=log_samples,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert results is not None
    return dict(results)


def find_tasks(names: Sequence[str], include_path: str | None = None) -> tuple[TaskManager, list[str]]:
    """The harness's task manager and the tasks that some names or patterns stand for.

    The index of the harness's own tasks takes seconds to build: it is left out where ``include_path`` has all of them.

    Raises:
        ValueError: a task is unknown; the message names the closest ones.
    """
    if include_path is not None:
        if not os.path.isdir(include_path):
            raise ValueError(f"include_path: folder not found: {include_path}")
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own, own.match_tasks(list(names))
    manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            raise ValueError(f"tasks: unknown task {name!r} of lm-evaluation-harness{hint(name, manager.all_tasks)}")
    return manager, manager.match_tasks(list(names))


class HarnessTask(EvaluationTask[tuple[str, int]]):
    """A task, group or tag of lm-evaluation-harness. Its items are documents: the names of their tasks and their indices.

    ``fewshot`` and ``chat`` are the evaluation's; 0 examples mean the task's own number. With ``chat`` each example is a turn.

    Args:
        name: of the task.
        include_path: folder of further tasks (YAML), which precede the harness's own.

    Raises:
        ValueError: the task is unknown.
    """

    metric: ClassVar[str] = "acc"

    def __init__(self, name: str, include_path: str | None = None) -> None:
        self.name, self.include_path = name, include_path
        self._manager, self._names = find_tasks([name], include_path)
        self._whole: tuple[int, dict[str, Estimate]] = (0, {})  # number of samples, and the harness's own metrics of them

    def items(self, context: EvaluationContext) -> Sequence[tuple[str, int]]:
        """The documents, of several tasks in turn."""
        with _data_errors(self._names):
            tasks = self._manager.load(self._names)["tasks"]
            counts = {name: len(task.eval_docs) for name, task in tasks.items()}
        return sorted(((name, index) for name in counts for index in range(counts[name])), key=lambda item: item[1])

    def results(self, context: EvaluationContext, items: Sequence[tuple[str, int]], progress: Progress) -> list[SampleResult]:
        """The samples, with the metrics that the harness has of each; one name for each filter of the answers."""
        indices: dict[str, list[int]] = {}
        for name, index in items:
            indices.setdefault(name, []).append(index)
        with _data_errors(list(indices)):
            results = simple_evaluate(
                BumblebeeLM(context.generator),
                tasks=list(indices),
                task_manager=self._manager,
                num_fewshot=context.fewshot or None,
                samples=indices,
                apply_chat_template=context.chat,
                fewshot_as_multiturn=context.chat,
            )
        assert results is not None
        self._whole = len(items), _estimates(results["results"])
        samples: dict[tuple[str, int], list[dict[str, Any]]] = {item: [] for item in items}
        for name, records in results["samples"].items():
            for record in records:
                samples[name, record["doc_id"]].append(record)
        progress(len(items))
        return [_sample_result(*item, samples[item]) for item in items]

    def metrics(self, results: Sequence[SampleResult]) -> dict[str, Estimate]:
        """The harness's metrics; of samples that several processes have shared out the mean of each sample's."""
        count, metrics = self._whole
        return metrics if len(results) == count else super().metrics(results)


def _sample_result(task: str, index: int, records: Sequence[Mapping[str, Any]]) -> SampleResult:
    """One document, whose records differ by the filter of the answer."""
    first = records[0]
    scores: dict[str, float] = {}
    for record in records:
        suffix = "" if record["filter"] == "none" else f",{record['filter']}"
        values = {f"{name}{suffix}": record[name] for name in record["metrics"]}
        scores |= {name: float(value) for name, value in values.items() if isinstance(value, Real)}
    prompts = [str(arguments[0]) for arguments in first["arguments"]]
    answer = json.dumps(first["filtered_resps"], ensure_ascii=False, default=str)
    return SampleResult(prompts[0], answer, str(first["target"]), scores, {"harness_task": task, "doc": index})


def _estimates(results: Mapping[str, Mapping[str, object]]) -> dict[str, Estimate]:
    """The metrics of all tasks; of several tasks each begins with its task's name."""
    estimates = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, comma, filter_name = key.partition(",")
            if comma and isinstance(value, Real) and not name.endswith("_stderr"):
                stderr = metrics.get(f"{name}_stderr,{filter_name}")
                label = name if filter_name == "none" else key
                label = label if len(results) == 1 else f"{task} {label}"
                estimates[label] = Estimate(float(value), float(stderr) if isinstance(stderr, Real) else None)
    return estimates


@contextmanager
def _data_errors(tasks: Sequence[str]) -> Iterator[None]:
    """Raise a ValueError of one line where the data of a task cannot be loaded."""
    try:
        yield
    except OSError as error:  # datasets' own errors are connection or file errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"tasks: the data of {', '.join(tasks)} cannot be loaded: {reason}") from error


def main() -> None:
    """Run the harness's command, with the model ``bumblebee``."""
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        if os.environ.get("BUMBLEBEE_TRACEBACK"):
            raise
        print(f"error: {str(error).strip().partition(chr(10))[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
