"""Templates that write no special token at the end of an answer: the next turn's token ends it, or the end-of-text token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers.chat_folders import GLM, GLM_TOKENS, TAGGED, byte_level, sentencepiece

from bumblebee import Tokenizer
from bumblebee.tokenizer.chatml import CHATML

# In the style of Alpaca's prompts: roles are text.
TEXTUAL = """
{%- for message in messages %}{{ '### ' + message.role + ':\n' + message.content + '\n\n' }}{% endfor %}
{{- '### assistant:\n' if add_generation_prompt }}
"""
ONE = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
TWO = [*ONE, {"role": "user", "content": "<|user|>"}, {"role": "assistant", "content": "four "}]


def tokenizer(template: str, eos: str | None = "</s>") -> Tokenizer:
    backend = byte_level()
    backend.add_special_tokens(GLM_TOKENS)
    return Tokenizer(backend, {"chat_template": template, **({"eos_token": eos} if eos else {})}, "FOLDER")


def marked(tok: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> str:
    """The conversation as text, with each target in brackets."""
    chat = tok.chat_template.encode(messages, **options)
    text, before = "", False
    for id, is_target in zip([*chat.ids, None], [*chat.target_mask, False], strict=True):
        text += "«" * (is_target and not before) + "»" * (before and not is_target)
        text += "" if id is None else tok.decode([id], skip_special_tokens=False)
        before = is_target
    return text


def test_next_role_ends_an_answer_as_in_glm():
    tok = tokenizer(GLM)
    assert marked(tok, ONE) == "[gMASK]<sop><|user|>\none<|assistant|>«\ntwo<|user|>»"
    first, second = "<|user|>\none<|assistant|>«\ntwo<|user|>»", "\n<|user|><|assistant|>«\nfour<|user|>»"
    assert marked(tok, TWO) == f"[gMASK]<sop>{first}{second}"
    assert marked(tok, TWO, train_on="last") == f"[gMASK]<sop>{first.replace('«', '').replace('»', '')}{second}"
    ids = tok.chat_template.encode(TWO).ids
    assert ids.count(tok.token_to_id("<|user|>")) == 3, "spelled by the user, it is text"


def test_generation_stops_at_each_role_that_may_follow():
    tok = tokenizer(GLM)
    assert {tok.backend.id_to_token(id) for id in tok.end_of_turn_ids} >= {"<|user|>", "<|observation|>"}
    assert tok.backend.id_to_token(tok.chat_template.end_of_turn_id) == "<|user|>"
    assert tokenizer(CHATML).end_of_turn_ids == [tok.token_to_id("<|im_end|>")]


def test_tool_result_ends_the_call_before_it():
    messages = [ONE[0], {"role": "assistant", "metadata": "add", "content": "{}"}, {"role": "observation", "content": "3"}]
    expected = "<|assistant|>«add\n{}<|observation|>»\n3<|assistant|>«\ntwo<|user|>»"
    assert marked(tokenizer(GLM), [*messages, ONE[1]]).endswith(expected)


def test_prompt_ids_equal_those_of_generation():
    tok = tokenizer(GLM)
    chat = tok.chat_template.encode(TWO, train_on="last")
    prompt = tok.apply_chat_template(TWO[:-1], add_generation_prompt=True)
    assert chat.ids[: chat.target_mask.index(True)] == prompt


def test_end_of_text_ends_the_last_answer_of_a_textual_template():
    tok = tokenizer(TEXTUAL)
    assert marked(tok, ONE).endswith("### assistant:\n«two</s>»")
    assert marked(tok, TWO, train_on="last").endswith("### assistant:\n«four</s>»")
    assert tok.end_of_turn_ids == [tok.token_to_id("</s>")]
    with pytest.raises(ValueError, match=r"FOLDER: .*; use train_on: last, which ends the last turn with '</s>'"):
        tok.chat_template.encode(TWO)


def test_template_without_any_token_to_stop_at_is_refused():
    with pytest.raises(ValueError, match=r"FOLDER: .* without a special token, and the tokenizer has no eos_token"):
        tokenizer(TEXTUAL, eos=None).chat_template.encode(ONE)
    assert tokenizer(TEXTUAL, eos=None).end_of_turn_ids == []


@pytest.mark.parametrize(
    "template", [CHATML.replace("<|im_end|>", "END"), TAGGED.replace("content + '<|im_end|>'", "content + 'END'")]
)
def test_blanks_before_the_next_turn_are_part_of_the_answer(template):
    turn = "<|im_start|>assistant\n«twoEND\n<|im_start|>»"
    assert marked(tokenizer(template), ONE) == f"<|im_start|>user\noneEND\n{turn}"
    assert marked(tokenizer(template), TWO).count("END\n<|im_start|>»") == 2


def test_chatml_without_its_tokens_ends_turns_with_end_of_text(tmp_path: Path):
    backend = tokenizers.Tokenizer.from_str(sentencepiece("first").to_str().replace("<|im_", "<|no_"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    tok = Tokenizer(backend, settings, "FOLDER").with_chat_template("chatml")
    assert tok.chat_template.render(ONE) == "<|im_start|>user\none</s>\n<|im_start|>assistant\ntwo</s>\n"
    assert tok.end_of_turn_ids == [tok.token_to_id("</s>")]
    tok.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).chat_template.sources == tok.chat_template.sources
    processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", backend.token_to_id("<s>"))])
    backend.post_processor = processor
    assert Tokenizer(backend, settings).with_chat_template("chatml").chat_template.render(ONE).startswith("<s><|im_start|>")


def test_unknown_template_name_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="'alpaca' is not a file; expected the path of a Jinja template, or chatml"):
        tokenizer(GLM).with_chat_template("alpaca")
    with pytest.raises(ValueError, match="chatml needs the special token"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), {}, "FOLDER").with_chat_template("chatml")
