"""Exact-match evaluation: questions of a dataset, greedy answers and the share of matches."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch

from bumblebee.cli.main import main
from bumblebee.evaluation.exact_match import answer, questions
from bumblebee.inference.generator import Generator
from bumblebee.model import Bumblebee
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.trainer import Trainer
from datamodules import SFT

PAIRS = {
    "How many wings has a bee?": "Four.",
    "What does a bee collect?": "Nectar and pollen.",
    "Who lays the eggs?": "A queen.",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    file = tmp_path_factory.mktemp("questions") / "bees.jsonl"
    records = [{"instruction": question, "output": answer} for question, answer in PAIRS.items()]
    records.append({"messages": [{"role": role, "content": text} for role, text in
                    (("user", "Hello"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Bye!"))]})  # fmt: skip
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def data_of(files, tokenizer_folder, **options) -> SFT:
    data = SFT(files, str(tokenizer_folder), max_length=64, **options)
    data.setup(0)
    return data


@pytest.mark.parametrize("packing", [True, False])
def test_prompt_includes_the_conversation_so_far(packing, files, tokenizer_folder):
    data = data_of(files, tokenizer_folder, packing=packing)
    asked = list(questions(data, data.train))
    tokenizer = data.tokenizer
    texts = {tokenizer.decode(q.prompt, skip_special_tokens=False): tokenizer.decode(q.answer) for q in asked}
    greeting = [{"role": "user", "content": "Hello"}]
    continued = [*greeting, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"}]
    expected = [([{"role": "user", "content": question}], answer) for question, answer in PAIRS.items()]
    expected += [(greeting, "Hello!"), (continued, "Bye!")]
    render = tokenizer.apply_chat_template
    assert texts == {render(messages, add_generation_prompt=True, tokenize=False): answer for messages, answer in expected}
    assert all(question.answer[-1] == tokenizer.chat_template.end_of_turn_id for question in asked)


@pytest.fixture(scope="module")
def trained(files, tokenizer_folder, tiny, tmp_path_factory):
    """The folder of a model trained until it reproduces the answers."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    torch.manual_seed(0)
    trainer = Trainer(max_steps=120, micro_batch_size=4, accumulate=1, precision="fp32", zero_stage=0, device="cpu")
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    trainer.fit(LanguageModeling(Bumblebee(tiny())), data_of(files, tokenizer_folder), optimizer, output_dir=folder)
    return folder


@pytest.mark.slow
def test_only_a_trained_model_gives_the_answers(trained, files, tokenizer_folder, tiny):
    data = data_of(files, tokenizer_folder)
    asked = list(questions(data, data.train))
    answers = answer(Generator.from_pretrained(trained, device="cpu"), asked)
    assert all(each.is_match for each in answers) and len(answers) == 5
    assert {each.question: each.text for each in answers} == {**PAIRS, "Hello": "Hello!", "Bye": "Bye!"}
    assert [each.turn for each in answers if each.question == "Bye"] == [2]
    torch.manual_seed(1)
    untrained = Generator(Bumblebee(tiny()), Tokenizer.from_pretrained(tokenizer_folder))
    assert not any(each.is_match for each in answer(untrained, asked))
    assert len(answer(untrained, asked, limit=2)) == 2


def test_longer_answer_is_not_a_match(trained, files, tokenizer_folder):
    data = data_of(files, tokenizer_folder)
    [first, *_] = questions(data, data.train)
    cut = replace(first, answer=first.answer[:-2])
    [result] = answer(Generator.from_pretrained(trained, device="cpu"), [cut])
    assert not result.is_match


def test_model_folder_lists_the_end_of_turn_as_eos(trained, tokenizer_folder):
    end = Tokenizer.from_pretrained(tokenizer_folder).chat_template.end_of_turn_id
    for name in ("config.json", "generation_config.json"):
        assert end in json.loads((trained / name).read_text())["eos_token_id"]


def test_command_prints_answers_and_the_share_of_matches(trained, files, tokenizer_folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
output_dir: {trained}
task: {{class_path: bumblebee.LanguageModeling, init_args: {{model: {{class_path: bumblebee.Bumblebee.from_pretrained,
  init_args: {{folder: {trained}}}}}}}}}
data: {{class_path: datamodules.SFT, init_args: {{files: {files}, tokenizer: {tokenizer_folder}, max_length: 64}}}}
optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-3}}}}
""")
    recipe.write_text(recipe.read_text().replace(str(tokenizer_folder), "gone"))  # the model's tokenizer is enough
    main(["evaluate", "--config", str(recipe), "--show", "2"])
    out = capsys.readouterr().out
    assert out.count("-> ") == 2
    assert "exact match: 5 of 5 (100.0%)" in out
    with pytest.raises(SystemExit) as done:
        main(["evaluate", "--config", str(recipe), "--split", "validation"])
    assert done.value.code == 2
    assert "no validation samples" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace(f"output_dir: {trained}", "output_dir: nowhere"))
    main(["evaluate", "--config", str(recipe), "--model", str(trained), "--limit", "1"])
    assert "exact match: 1 of 1" in capsys.readouterr().out
    recipe.write_text(recipe.read_text().replace("datamodules.SFT", "datamodules.Pretrain"))
    with pytest.raises(SystemExit) as done:
        main(["evaluate", "--config", str(recipe), "--model", str(trained)])
    assert done.value.code == 2
    assert "Pretrain has no questions to evaluate" in capsys.readouterr().err
