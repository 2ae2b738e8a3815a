"""A server and lm-evaluation-harness's clients of OpenAI's API, ``local-completions`` and ``local-chat-completions``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from helpers.server_process import Running, serving
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model

from bumblebee import Bumblebee, Generator, Tokenizer
from bumblebee.evaluation.harness import BumblebeeLM, find_tasks

pytestmark = pytest.mark.slow

SOURCE = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
CHOICE = """task: bee_choice
output_type: multiple_choice
doc_to_text: "Bees in {{number}} gardens"
doc_to_target: 0
doc_to_choice: [" fly", " sleep all day", " count the flowers"]
"""
ANSWER = """task: bee_answer
output_type: generate_until
doc_to_text: "Bees in {{number}} gardens"
doc_to_target: "fly"
generation_kwargs: {until: ["e"], max_gen_toks: 12}
"""


@pytest.fixture(scope="module")
def folder(tiny, tokenizer_folder, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    Bumblebee(tiny(initializer_range=0.15)).save_pretrained(folder)
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"number": number}) + "\n" for number in range(4)))
    for name, task in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(SOURCE.format(data=data) + task)
    return folder


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Running]:
    with serving(folder) as running:
        yield running


def responses(model, folder: Path, names: list[str], chat: bool = False) -> dict[str, list]:
    """What the model answered to each sample of some tasks."""
    manager, _ = find_tasks(names, str(folder))
    options = {"task_manager": manager, "bootstrap_iters": 0, "apply_chat_template": chat}
    with ThreadPoolExecutor(1) as thread:  # the clients use asyncio, and the browser of other tests may run a loop in this one
        results = thread.submit(simple_evaluate, model, tasks=names, **options).result()
    return {name: [sample["resps"] for sample in results["samples"][name]] for name in names}


def client(kind: str, server: Running, path: str, folder: Path, **options):
    return get_model(kind)(base_url=server.url + path, model="bumblebee", tokenizer=str(folder), num_concurrent=2, **options)


def test_local_completions_score_and_generate_like_the_folder(server, folder):
    names = ["bee_choice", "bee_answer"]
    theirs = responses(client("local-completions", server, "/v1/completions", folder), folder, names)
    ours = responses(BumblebeeLM(Generator.from_pretrained(folder, "cpu")), folder, names)
    assert theirs["bee_answer"] == ours["bee_answer"]
    for sample, expected in zip(theirs["bee_choice"], ours["bee_choice"], strict=True):
        for (score,), (other,) in zip(sample, expected, strict=True):
            assert score[0] == pytest.approx(other[0], abs=1e-4) and score[1] == other[1]


def test_local_chat_completions_answer_like_the_folder(server, folder):
    theirs = client("local-chat-completions", server, "/v1/chat/completions", folder)
    ours = BumblebeeLM(Generator.from_pretrained(folder, "cpu"))
    assert responses(theirs, folder, ["bee_answer"], True) == responses(ours, folder, ["bee_answer"], True)
