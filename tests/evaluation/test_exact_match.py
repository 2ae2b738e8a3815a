"""Answers: the questions of the data are asked as they are there, and a right answer is known from a wrong one."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch

from bumblebee.cli.main import main
from bumblebee.evaluation.exact_match import answered, questions
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
def test_each_question_is_asked_behind_what_was_said_before(packing, files, tokenizer_folder):
    data = data_of(files, tokenizer_folder, packing=packing)
    asked = list(questions(data, data.train))
    tokenizer = data.tokenizer
    texts = {tokenizer.decode(q.prompt, skip_special_tokens=False): tokenizer.decode(q.answer) for q in asked}
    begun = [{"role": "user", "content": "Hello"}]
    goes_on = [*begun, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"}]
    expected = [([{"role": "user", "content": question}], answer) for question, answer in PAIRS.items()]
    expected += [(begun, "Hello!"), (goes_on, "Bye!")]
    render = tokenizer.apply_chat_template
    assert texts == {render(messages, add_generation_prompt=True, tokenize=False): answer for messages, answer in expected}
    assert all(question.answer[-1] == tokenizer.chat_template.end_of_turn_id for question in asked)


@pytest.fixture(scope="module")
def taught(files, tokenizer_folder, tiny, tmp_path_factory):
    """A model that has learned the answers by heart."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    torch.manual_seed(0)
    trainer = Trainer(max_steps=120, micro_batch_size=4, accumulate=1, precision="fp32", zero_stage=0, device="cpu")
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    trainer.fit(LanguageModeling(Bumblebee(tiny())), data_of(files, tokenizer_folder), optimizer, output_dir=folder)
    return folder


def test_a_model_that_knows_the_answers_gives_them_and_another_does_not(taught, files, tokenizer_folder, tiny):
    data = data_of(files, tokenizer_folder)
    asked = list(questions(data, data.train))
    found = answered(Generator.from_pretrained(taught, device="cpu"), asked)
    assert all(each.right for each in found) and len(found) == 5
    assert {each.question: each.given for each in found} == {**PAIRS, "Hello": "Hello!", "Bye": "Bye!"}
    assert [each.turn for each in found if each.question == "Bye"] == [2]
    torch.manual_seed(1)
    stranger = Generator(Bumblebee(tiny()), Tokenizer.from_pretrained(tokenizer_folder))
    assert not any(each.right for each in answered(stranger, asked))
    assert len(answered(stranger, asked, limit=2)) == 2


def test_an_answer_that_goes_on_too_long_is_wrong(taught, files, tokenizer_folder):
    data = data_of(files, tokenizer_folder)
    [first, *_] = questions(data, data.train)
    cut = replace(first, answer=first.answer[:-2])
    [found] = answered(Generator.from_pretrained(taught, device="cpu"), [cut])
    assert not found.right


def test_a_fine_tuned_model_folder_names_the_id_that_ends_an_answer(taught, tokenizer_folder):
    end = Tokenizer.from_pretrained(tokenizer_folder).chat_template.end_of_turn_id
    for name in ("config.json", "generation_config.json"):
        assert end in json.loads((taught / name).read_text())["eos_token_id"]


def test_the_command_tells_questions_answers_and_the_share(taught, files, tokenizer_folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
output_dir: {taught}
task: {{class_path: bumblebee.LanguageModeling, init_args: {{model: {{class_path: bumblebee.Bumblebee.from_pretrained,
  init_args: {{folder: {taught}}}}}}}}}
data: {{class_path: datamodules.SFT, init_args: {{files: {files}, tokenizer: {tokenizer_folder}, max_length: 64}}}}
optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-3}}}}
""")
    main(["answer", "--config", str(recipe), "--show", "2"])
    out = capsys.readouterr().out
    assert out.count("-> ") == 2
    assert "answered as in the data: 5 of 5 questions (100.0%)" in out
    with pytest.raises(SystemExit) as done:
        main(["answer", "--config", str(recipe), "--split", "validation"])
    assert done.value.code == 2
    assert "no validation samples" in capsys.readouterr().err
