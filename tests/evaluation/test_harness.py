"""lm-evaluation-harness: our model class against the harness's own ``hf`` model on local tasks, adapters, templates, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from importlib import import_module

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from bumblebee import Bumblebee, Generator, Tokenizer
from bumblebee.cli.commands import evaluate
from bumblebee.evaluation import harness
from bumblebee.evaluation.harness import BumblebeeLM, find_tasks, run_harness_tasks
from bumblebee.lora import LoRA

WORDS = "the bees fly from flower to flower in the garden and the keeper counts them every morning before breakfast".split()
TASKS = {
    "bee_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "bee_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "bee_answer": """
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n", " the"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + number * 5) % len(WORDS)] for number in range(count))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    """A folder of three tasks on 12 records; one text is longer than the model's positions, one choice is a single token."""
    folder = tmp_path_factory.mktemp("tasks")
    records = [
        {
            "question": words(number // 2, 12),
            "choices": [words(number + choice, 1 + 2 * choice) for choice in range(4)],
            "gold": number % 4,
            "text": words(number, 400 if number == 3 else 8),
        }
        for number in range(12)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}\n"
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}test_split: test\nfewshot_split: train\n{task}")
    return str(folder)


@pytest.fixture(scope="module")
def folder(tiny, tokenizer_folder, tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    Bumblebee(tiny(initializer_range=0.15)).save_pretrained(folder)
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory) -> str:
    """An adapter folder beside its base model, with weights that change the model clearly."""
    torch.manual_seed(1)
    model = Bumblebee.from_pretrained(folder)
    LoRA(rank=4)(model)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    return str(path)


def run(model, tasks: str, **options) -> dict:
    manager, names = find_tasks(list(TASKS), tasks)
    return simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)


def assert_same(ours: dict, theirs: dict) -> None:
    """Log-likelihoods of each sample within 1e-4, equal answers and metrics."""
    for task in TASKS:
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            if task == "bee_answer":
                assert one["resps"] == other["resps"] and one["filtered_resps"] == other["filtered_resps"]
            elif task == "bee_text":
                assert one["resps"][0][0] == pytest.approx(other["resps"][0][0], rel=1e-6, abs=1e-4)
            else:
                for (score,), (expected,) in zip(one["resps"], other["resps"], strict=True):
                    assert score[0] == pytest.approx(expected[0], abs=1e-4) and score[1] == expected[1]
        metrics, expected = ours["results"][task], theirs["results"][task]
        for name in ("acc,none", "acc_norm,none", "exact_match,none", "sample_len"):
            assert metrics.get(name) == expected.get(name)


@pytest.mark.slow
def test_samples_and_metrics_equal_the_hf_models(folder, tasks):
    hf = HFLM(pretrained=folder, device="cpu", batch_size=4, dtype="float32")
    assert_same(run(BumblebeeLM(folder, device="cpu"), tasks), run(hf, tasks))
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 1, "system_instruction": "Count."}
    model = BumblebeeLM(folder, device="cpu")
    ours, theirs = run(model, tasks, **chat), run(hf, tasks, **chat)
    assert model.chat_template(True) == hf.chat_template(True) and model.tokenizer_name == hf.tokenizer_name
    for task in TASKS:
        assert [one["arguments"] for one in ours["samples"][task]] == [one["arguments"] for one in theirs["samples"][task]]
    assert_same(ours, theirs)


@pytest.mark.slow
def test_unmerged_adapters_equal_the_hf_models(folder, adapter, tasks):
    hf = HFLM(pretrained=folder, peft=adapter, device="cpu", batch_size=4, dtype="float32")
    results = run_harness_tasks(Generator.from_pretrained(adapter, "cpu"), list(TASKS), include_path=tasks)
    assert_same(results, run(hf, tasks))


def test_open_messages_and_empty_contexts_equal_the_hf_models(folder):
    hf, ours = HFLM(pretrained=folder, device="cpu", dtype="float32"), BumblebeeLM(folder, device="cpu")
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "There are "}]
    assert ours.apply_chat_template(messages, False) == hf.apply_chat_template(messages, False)
    requests = [
        Instance("loglikelihood", {}, args, 0)
        for args in (("", " bees fly"), ("<|im_start|>user", " bees"), ("flowers ", "grow"), ("a" * 900, " bee"))
    ]
    for (score, greedy), (expected, is_greedy) in zip(ours.loglikelihood(requests), hf.loglikelihood(requests), strict=True):
        assert score == pytest.approx(expected, abs=1e-4) and greedy == is_greedy


def test_bad_arguments_name_what_is_right(folder, tasks):
    generator = Generator.from_pretrained(folder, "cpu")
    with pytest.raises(ValueError, match="unknown argument 'pretrained'; the model is named by path=FOLDER"):
        BumblebeeLM(generator, pretrained="x")
    with pytest.raises(ValueError, match="missing path: write path=FOLDER"):
        BumblebeeLM()
    with pytest.raises(ValueError, match="max_length must be 2 to 256"):
        BumblebeeLM(generator, max_length=257)
    with pytest.raises(ValueError, match="leave out batch_size 8"):
        BumblebeeLM(generator, batch_size=8)
    with pytest.raises(ValueError, match="num_beams is not supported"):
        run_harness_tasks(generator, ["bee_answer"], include_path=tasks, gen_kwargs={"num_beams": 2}, limit=1)
    with pytest.raises(ValueError, match="max_gen_toks must be 1 to 255"):
        run_harness_tasks(generator, ["bee_answer"], include_path=tasks, gen_kwargs={"max_gen_toks": 256}, limit=1)
    with pytest.raises(ValueError, match="folder not found: nowhere"):
        find_tasks(["bee_text"], "nowhere")


@pytest.mark.slow
def test_evaluate_runs_tasks_of_the_harness_by_name(folder, tasks, tmp_path, capsys):
    words = ["--model", folder, "--tasks", ",".join(TASKS), "--include_path", tasks, "--limit", "5", "--device", "cpu"]
    evaluate.run([*words, "--output", str(tmp_path / "out")])
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    expected = run_harness_tasks(Generator.from_pretrained(folder, "cpu"), list(TASKS), include_path=tasks, limit=5)["results"]
    for task, metric in (("bee_choice", "acc"), ("bee_choice", "acc_norm"), ("bee_text", "bits_per_byte")):
        assert results[task]["metrics"][metric]["value"] == expected[task][f"{metric},none"] and f"{metric} " in table
    assert results["bee_choice"]["metrics"]["acc"]["stderr"] == expected["bee_choice"]["acc_stderr,none"]
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples" / "bee_answer.jsonl").read_text().splitlines()]
    assert [sample["doc"] for sample in samples] == list(range(5)) and samples[0]["prompt"].startswith("Q: ")


@pytest.mark.slow
def test_command_is_the_harnesss_own(folder, tasks):
    command = [sys.executable, "-m", "bumblebee.evaluation.harness", "--model", "bumblebee", "--include_path", tasks]
    command += ["--model_args", f"path={folder}", "--device", "cpu"]
    done = subprocess.run([*command, "--tasks", "bee_choice"], capture_output=True, text=True)
    assert done.returncode == 0 and "|bee_choice|" in done.stdout.replace(" ", ""), done.stderr


def test_unknown_tasks_and_a_missing_package_are_one_line(tasks, monkeypatch):
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    with pytest.raises(ValueError, match=r"unknown task 'bee_choise' of lm-evaluation-harness \(did you mean 'bee_choice'"):
        find_tasks(["bee_choise"], tasks)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, harness.__name__)
    with pytest.raises(ValueError, match=r"^tasks: lm-eval is not installed: pip install 'bumblebee\[eval\]'$"):
        import_module(harness.__name__)
