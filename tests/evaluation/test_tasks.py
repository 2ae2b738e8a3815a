"""Evaluation tasks on a tiny model, against naive formulas: full forward passes, log-softmax in fp64, textbook errors."""

from __future__ import annotations

import json
import math
from statistics import stdev

import pytest
import torch

from bumblebee.cli.main import main
from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.statistics import mean, ratio
from bumblebee.evaluation.tasks import ExactMatch, Generation, MultipleChoice, Perplexity, PreferenceAccuracy
from bumblebee.inference.generator import Generator
from bumblebee.model import Bumblebee
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.training.validation import validation_sums
from datamodules import SFT, Preferences, Pretrain

TEXTS = ["The bee visits the flower.", "Honey is made of nectar, and kept in the hive for the winter.", "A queen lays eggs."]
QUESTIONS = [
    {"context": "A bee collects", "choices": ["nectar", "iron and coal", "rain"], "gold": 0},
    {"context": "The hive is", "choices": ["home", "a long and winding river"], "gold": 1},
    {"context": "Eggs are laid by the ", "choices": ["queen", "drone"], "gold": 0},
]
PAIRS = [
    {"messages": [{"role": "user", "content": text}], "chosen": {"role": "assistant", "content": yes},
     "rejected": {"role": "assistant", "content": no}}
    for text, yes, no in (("Wings?", "Four.", "Five hundred."), ("Eggs?", "A queen lays them.", "No."), ("Hi", "Hello", "Bye"))
]  # fmt: skip


def nothing(count: int) -> None:
    pass


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tiny, tmp_path_factory):
    """A model folder with random weights of a size that makes its predictions differ, and the task files in it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    Bumblebee(tiny(initializer_range=0.3)).save_pretrained(folder)
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    write(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    write(folder / "choices.jsonl", QUESTIONS)
    write(folder / "pairs.jsonl", PAIRS)
    write(folder / "prompts.jsonl", [{"prompt": "Two and two is", "answer": ["4", "four"]}, {"prompt": "A", "answer": "B"}])
    return folder


@pytest.fixture(scope="module")
def context(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    return EvaluationContext(Generator(Bumblebee.from_pretrained(folder, dtype=torch.float32), tokenizer))


def log_probs(context, ids, first):
    """Log-probability of each id from index ``first``, by one full forward pass in fp64."""
    model = context.generator.model
    with torch.no_grad():
        logits = model(torch.tensor([ids])).double()[0]
    table = logits.log_softmax(-1)
    return [float(table[index - 1, ids[index]]) for index in range(first, len(ids))]


def run(task, context):
    return task.results(context, task.items(context), nothing)


@pytest.mark.parametrize("kind", [Pretrain, SFT])
def test_perplexity_equals_validation_and_fp64(kind, context, folder, tmp_path):
    file = str(folder / "texts.jsonl")
    if kind is SFT:
        turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": TEXTS[1]}]
        file = write(tmp_path / "chats.jsonl", [{"messages": turns}, {"messages": [*turns, *turns]}])
    data = kind(file, str(folder), max_length=64)
    task = Perplexity(data)
    results = run(task, context)
    metrics = task.metrics(results)

    trained = LanguageModeling(context.generator.model)
    trained.setup(data)
    batches = (data.collate([data.train[index]]) for index in range(len(data.train)))
    expected = trained.validation_metrics(validation_sums(trained, context.generator.model, batches))
    assert metrics["loss"].value == pytest.approx(expected["validation_loss"], rel=1e-5)
    assert metrics["perplexity"].value == pytest.approx(expected["validation_perplexity"], rel=1e-5)
    assert metrics["bits_per_byte"].value == pytest.approx(expected["validation_bits_per_byte"], rel=1e-5)

    items = task.items(context)
    for item, result in zip(items, results, strict=True):
        whole = [*item.ids, item.labels[-1]]
        naive = log_probs(context, whole, 1)
        wanted = -sum(p for p, label in zip(naive, item.labels, strict=True) if label != IGNORE_INDEX)
        assert result.scores["loss"] == pytest.approx(wanted, rel=1e-5)
    if kind is Pretrain:  # by hand: the bytes of the texts after their first tokens, which nothing predicts
        firsts = sum(len(context.generator.tokenizer.decode(item.ids[:1]).encode()) for item in items)
        total = sum(len(text.encode()) for text in TEXTS) - firsts
        nats = sum(result.scores["loss"] for result in results)
        assert metrics["bits_per_byte"].value == pytest.approx(nats / math.log(2) / total)


def test_perplexity_of_pairs_scores_the_chosen_responses(context, folder):
    data = Preferences(str(folder / "pairs.jsonl"), str(folder), max_length=64)
    assert [result.answer for result in run(Perplexity(data), context)] == [pair["chosen"]["content"] for pair in PAIRS]


@pytest.mark.parametrize("fewshot", [0, 1])
def test_multiple_choice_equals_full_forward_passes(fewshot, context, folder):
    task = MultipleChoice(str(folder / "choices.jsonl"), fewshot=fewshot)
    encode = context.generator.tokenizer.encode
    for index, (question, result) in enumerate(zip(QUESTIONS, run(task, context), strict=True)):
        other = QUESTIONS[1 if index == 0 else 0]
        example = f"{other['context']} {other['choices'][other['gold']]}\n\n" if fewshot else ""
        assert result.prompt == example + question["context"]
        before = len(encode(result.prompt.rstrip()))
        wholes = [encode(f"{result.prompt} {choice}") for choice in question["choices"]]
        sums = [math.fsum(log_probs(context, whole, before)) for whole in wholes]
        assert result.details["log_probs"] == pytest.approx(sums, rel=1e-5)
        norm = [value / len(choice.encode()) for value, choice in zip(sums, question["choices"], strict=True)]
        expected = {"acc": sums.index(max(sums)) == question["gold"], "acc_norm": norm.index(max(norm)) == question["gold"]}
        assert result.scores == expected


def test_chat_puts_examples_into_earlier_turns(context, folder):
    task = MultipleChoice(str(folder / "choices.jsonl"), fewshot=1, chat=True, system="Be brief.")
    question = task.items(context)[0]
    ids, continuation = task._ids(context, question, "nectar")
    turns = [("system", "Be brief."), ("user", "The hive is"), ("assistant", "a long and winding river")]
    messages = [{"role": role, "content": content} for role, content in [*turns, ("user", "A bee collects")]]
    assert ids == context.generator.encode_chat(messages)
    assert context.generator.tokenizer.decode(continuation) == "nectar"


def test_preference_accuracy_equals_full_forward_passes(context, folder):
    data = Preferences(str(folder / "pairs.jsonl"), str(folder), max_length=64)
    task = PreferenceAccuracy(data, reference=str(folder))
    items = task.items(context)
    results = task.results(context, items, nothing)
    for pair, result in zip(items, results, strict=True):
        sums = [math.fsum(log_probs(context, [*s.ids, s.labels[-1]], s.first + 1)) for s in pair]
        assert result.details["log_probs"] == pytest.approx(sums, rel=1e-5)
        assert result.scores["acc"] == (sums[0] > sums[1])
        lengths = [len(segment.targets) for segment in pair]
        assert result.scores["acc_norm"] == (sums[0] / lengths[0] > sums[1] / lengths[1])
    assert "reward_acc" in task.metrics(results)


def length_ratio(answer: str, expected: str) -> float:
    return len(expected) / (len(answer) + len(expected))


def test_generation_scorers(context, folder, monkeypatch):
    names = ["exact_match", "contains", "regex", f"{__name__}.length_ratio"]
    task = Generation(str(folder / "prompts.jsonl"), scorers=names, extract=r"is (\w+)")
    item, _ = task.items(context)
    assert task._result(context, item, " It is four .").scores == {
        "exact_match": 1.0, "contains": 1.0, "regex": 1.0, "length_ratio": 0.5,
    }  # fmt: skip
    assert set(task._result(context, item, "no").scores.values()) == {0.0, 1.0}  # "" has all the length of the expected one
    results = run(Generation(str(folder / "prompts.jsonl"), max_new_tokens=4), context)
    prompts = ["Two and two is", "A"]
    assert [r.answer for r in results] == [c.text for c in context.generator.generate(prompts, task_params(max_new_tokens=4))]
    with pytest.raises(ValueError, match="unknown scorer 'exact'"):
        Generation("file", scorers=["exact"])
    with pytest.raises(ValueError, match="cannot import 'math.nothing'"):
        Generation("file", scorers=["math.nothing"])


def task_params(**options):
    from bumblebee.inference.sampling.sampling_params import SamplingParams

    return SamplingParams(temperature=0.0, **options)


def test_standard_errors():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert mean(values) == (0.6, pytest.approx(stdev(values) / math.sqrt(5)))
    assert mean(values).stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))  # as of a binomial share
    assert mean([2.0]) == (2.0, None)
    assert ratio(values, [1.0] * 5) == pytest.approx(mean(values))  # equal lengths: the mean
    value, error = ratio([2.0, 6.0, 3.0], [1.0, 2.0, 3.0])
    residuals = [2 - value, 6 - 2 * value, 3 - 3 * value]
    assert value == pytest.approx(11 / 6)
    assert error == pytest.approx(math.sqrt(sum(r * r for r in residuals) / 2) / math.sqrt(3) / 2)


def test_command_runs_several_tasks_and_can_be_repeated(folder, tmp_path, capsys):
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(f"""tasks:
  words: {{class_path: bumblebee.evaluation.tasks.Generation, init_args: {{file: {folder}/prompts.jsonl, max_new_tokens: 4}}}}
  texts: {{class_path: bumblebee.evaluation.tasks.Perplexity, init_args: {{data: {{class_path: datamodules.Pretrain,
    init_args: {{files: {folder}/texts.jsonl, max_length: 64}}}}}}}}
""")
    short = f"multiple_choice:{folder}/choices.jsonl,perplexity:{folder}/texts.jsonl"
    words = ["evaluate", "--model", str(folder), "--tasks", short, f"preference_accuracy:{folder}/pairs.jsonl", str(tasks)]
    main([*words, "--output", str(tmp_path / "out"), "--device", "cpu"])
    out = capsys.readouterr().out
    names = ["multiple_choice:choices", "perplexity:texts", "preference_accuracy:pairs", "words", "texts"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [*results["tasks"]] == names and all(name in out for name in names) and "±" in out
    assert results["tasks"]["texts"]["metrics"] == results["tasks"]["perplexity:texts"]["metrics"]
    assert results["settings"]["tasks"] == words[4:] and {"torch", "bumblebee"} <= {*results["versions"]}
    assert str(folder / "model.safetensors") in results["digests"] and "commit" in results
    lines = (tmp_path / "out" / results["tasks"]["multiple_choice:choices"]["file"]).read_text().splitlines()
    assert {"prompt", "answer", "expected", "scores"} <= {*json.loads(lines[0])} and len(lines) == 3
    with pytest.raises(SystemExit) as ended:
        main([*words, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and "add --overwrite" in capsys.readouterr().err
    main([*words[:5], "--limit", "2", "--output", str(tmp_path / "out"), "--overwrite", "--device", "cpu"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"][names[0]]["samples"] == 2


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"context": "A", "choices": ["b", "c"]}, "missing key 'gold'; the record's keys: 'context', 'choices'"),
        (
            {"context": "A", "choices": ["b", "c"], "gold": 2},
            "'gold' must be the index of the right choice, from 0 to 1",
        ),
        ({"context": "A", "choices": "bc", "gold": 0}, "'choices' must be a list of strings"),
    ],
)
def test_bad_record_is_one_line_with_file_and_line(record, reason, folder, tmp_path, capsys):
    file = write(tmp_path / "bad.jsonl", [QUESTIONS[0], record])
    words = ["evaluate", "--model", str(folder), "--tasks", f"multiple_choice:{file}", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and f"{file}:2: {reason}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--tasks", "perplexity:"], "needs data"),
        (["--tasks", "perplexitty"], "unknown task 'perplexitty' (did you mean 'perplexity'?)"),
        (["--tasks", "multiple_choice"], "multiple_choice needs a file: write multiple_choice:FILE"),
        (["--tasks", "perplexity"], "perplexity needs data: name a file, as perplexity:FILE, or a recipe with --config"),
        (["--tasks", "generation:nothing.jsonl"], "file not found: nothing.jsonl"),
        ([], "missing required option 'tasks'"),
        (["--tasks", "exact_match", "--limit", "0"], "limit must be at least 1, got 0"),
    ],
)
def test_bad_options_are_one_line(words, reason, folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--model", str(folder), *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and reason in error


def test_error_in_a_file_of_tasks_names_its_line(folder, tmp_path, capsys):
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("tasks:\n  a:\n    class_path: bumblebee.evaluation.tasks.MultipleChoice\n    init_args:\n      fil: x\n")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--model", str(folder), "--tasks", str(tasks)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and f"{tasks}:5" in error and "fil" in error


def test_exact_match_needs_questions(context, folder):
    with pytest.raises(ValueError, match="Pretrain has no questions"):
        ExactMatch(Pretrain(str(folder / "texts.jsonl"), str(folder))).items(context)


def test_quickstart_table_shows_every_result(tmp_path):
    """Of results.json files with the tasks that the Makefile evaluates."""
    import show_results

    for _, folder, task, metric, _ in show_results.ROWS:
        file = tmp_path / "evaluation" / folder / "results.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        results = json.loads(file.read_text()) if file.exists() else {"tasks": {}}
        results["tasks"].setdefault(task, {"metrics": {}})["metrics"][metric] = {"value": 0.5, "stderr": 0.01}
        file.write_text(json.dumps(results))
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "metrics.jsonl").write_text('{"step": 1, "bigram_bits_per_byte": 1.9}\n')
    lines = show_results.lines(tmp_path)
    assert [line[2:56].rstrip() for line in lines[:1] + lines[2:]] == [row[0] for row in show_results.ROWS]
    assert lines[1].endswith("1.900") and lines[-1].endswith("50.0% ± 1.0%")
