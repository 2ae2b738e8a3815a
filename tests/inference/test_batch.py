"""``bumblebee generate``: prompts from a file, one JSON line per completion, in the order of the prompts."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bumblebee import Bumblebee, Generator, SamplingParams, Tokenizer
from bumblebee.cli.main import main
from bumblebee.inference.batch import BatchGeneration, PromptRecord
from datamodules.prompt_files import read_prompts

PROMPTS = ["The bee", "A", "In the garden there are many flowers", "Ünïcödé 🐝", "x y"]


@pytest.fixture(scope="module")
def folder(tiny, tokenizer_folder, tmp_path_factory):
    """A model folder whose generation_config.json enables sampling."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    Bumblebee(tiny(initializer_range=0.3)).save_pretrained(folder)
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 7, "max_new_tokens": 9, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture
def jsonl(tmp_path):
    """A file of prompt records."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "id": n}) + "\n" for n, p in enumerate(PROMPTS)), encoding="utf-8")
    return file


def run(folder: str, *words: object) -> None:
    main(["generate", "--model", folder, "--device", "cpu", *map(str, words)])


def error_of(capsys, folder: str, *words: object) -> str:
    with pytest.raises(SystemExit) as ended:
        run(folder, *words)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err.removeprefix("bumblebee: ").removesuffix("\n")


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


GREEDY = ("--temperature", "0", "--max_new_tokens", "6", "--ignore_eos")


def test_lines_keep_order_and_keys_of_the_records(folder, jsonl, tmp_path, capsys):
    run(folder, "--prompts", jsonl, "--output", tmp_path / "new" / "out.jsonl", *GREEDY)
    written = lines(tmp_path / "new" / "out.jsonl")
    generator = Generator.from_pretrained(folder, device="cpu")
    params = SamplingParams(temperature=0.0, max_new_tokens=6, top_k=7, ignore_eos=True)
    for number, (line, prompt) in enumerate(zip(written, PROMPTS, strict=True)):
        [expected] = generator.generate([prompt], params)
        assert line == {
            "prompt": prompt, "id": number, "text": expected.text, "finish_reason": "length",
            "prompt_tokens": len(generator.encode(prompt)), "new_tokens": 6,
        }  # fmt: skip
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "", "no progress bar without a terminal"


def test_lines_of_a_text_file_are_prompts(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("The bee\r\n\n  \nA  \nlast", encoding="utf-8")
    run(folder, "--prompts", tmp_path / "p.txt", *GREEDY)
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["The bee", "A  ", "last"]


def test_compressed_files_are_read(tmp_path):
    for name, text in (("a.txt.gz", "one\ntwo\n"), ("b.jsonl.gz", '{"prompt": "one"}\n{"prompt": "two"}\n')):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        prompts = list(read_prompts(str(tmp_path / name)))
        assert [prompt.content for prompt in prompts] == ["one", "two"]
        assert [prompt.place for prompt in prompts] == [f"{tmp_path / name}:1", f"{tmp_path / name}:2"]


def test_flags_override_the_folders_generation_config(folder, jsonl, capsys):
    generator = Generator.from_pretrained(folder, device="cpu")
    run(folder, "--prompts", jsonl, "--seed", "3")
    written = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    params = SamplingParams(temperature=0.5, top_k=7, max_new_tokens=9, seed=3)
    assert written == [out.text for out in generator.generate(PROMPTS, params)]
    run(folder, "--prompts", jsonl, "--seed", "3", "--temperature", "1.0", "--top_k", "0")
    other = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    params = SamplingParams(max_new_tokens=9, seed=3)
    assert other == [out.text for out in generator.generate(PROMPTS, params)] and other != written


def test_samples_of_a_prompt_differ_and_are_numbered(folder, jsonl, capsys):
    run(folder, "--prompts", jsonl, "--num_samples", "3", "--seed", "5", "--temperature", "2", "--top_k", "0")
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["id"], line["sample"]) for line in written] == [(n, k) for n in range(len(PROMPTS)) for k in range(3)]
    assert len({line["text"] for line in written[:3]}) == 3
    run(folder, "--prompt", PROMPTS[0], "--num_samples", "2", "--seed", "6", "--temperature", "2", "--top_k", "0")
    again = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert again == [line["text"] for line in written[1:3]], "sample n has the seed of the first plus n"


def test_logprobs_are_written_with_token_texts(folder, jsonl, capsys):
    run(folder, "--prompts", jsonl, "--logprobs", "2", *GREEDY)
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert len(line["logprobs"]) == line["new_tokens"] == 6
        for token in line["logprobs"]:
            assert [set(each) for each in token["top"]] == [{"id", "token", "logprob"}] * 2
            assert (token["id"], token["token"]) == (token["top"][0]["id"], token["top"][0]["token"])
            first, second = (each["logprob"] for each in token["top"])
            assert 0 > token["logprob"] == first >= second


def test_chats_and_questions_use_the_chat_template(folder, tmp_path, capsys):
    question = {"role": "user", "content": "Why?"}
    system = {"role": "system", "content": "Be short."}
    conversation = [question, {"role": "assistant", "content": "So."}, {"role": "user", "content": "How?"}]
    records = [{"prompt": "Why?"}, {"messages": [question]}, {"messages": [system, question]}, {"messages": conversation}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run(folder, "--prompts", tmp_path / "c.jsonl", "--chat", "--system", "Be kind.", *GREEDY)
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    generator = Generator.from_pretrained(folder, device="cpu")
    default = {"role": "system", "content": "Be kind."}
    chats = [[default, question], [default, question], [system, question], [default, *conversation]]
    prompts = [generator.tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    params = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
    assert [line["text"] for line in written] == [out.text for out in generator.generate(prompts, params)]
    assert [line["prompt_tokens"] for line in written] == list(map(len, prompts))


def test_single_prompt_is_printed_with_its_completion(folder, capsys):
    generator = Generator.from_pretrained(folder, device="cpu")
    [expected] = generator.generate(["The bee"], SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True))
    for stream in ("--stream", "--no_stream"):
        run(folder, "--prompt", "The bee", stream, *GREEDY)
        assert capsys.readouterr().out == f"The bee{expected.text}\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a record must be a JSON object, {...}, not an array"),
        ('{"id": 5}', "expected one of 'prompt' and 'messages'; the record's keys: 'id'"),
        ('{"prompt": "a", "messages": []}', "expected one of 'prompt' and 'messages'"),
        ('{"prompt": ""}', "'prompt' is empty"),
        ('{"prompt": 7}', "'prompt' must be a string, not a number"),
        ('{"prompt": null}', "'prompt' must be a string, not null"),
        ('{"prompt": "a", "text": "b"}', "the output uses the key 'text': rename the record's key"),
        ('{"messages": []}', "'messages' is empty"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "'assistant' cannot come first"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "must end with 'user'"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "robot"),
        ('{"prompt": "' + "bee " * 500 + '"}', "the model takes 256, including new ones"),
        ('{"prompt": "\xff"}', "UTF-8"),
    ],
)
def test_bad_record_is_reported_with_file_and_line(folder, record, message, tmp_path, capsys):
    file, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(b'{"prompt": "a good one"}\n\n' + record.encode("latin-1") + b"\n")
    error = error_of(capsys, folder, "--prompts", file, "--output", output)
    assert error.startswith(f"prompts: {file}:3: ") and message in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "prompt: give either --prompt TEXT or --prompts FILE"),
        (["--prompt", "a", "--prompts", "{tmp}/p.jsonl"], "prompt: give either --prompt TEXT or --prompts FILE"),
        (["--prompts", "{tmp}/none.jsonl"], "file not found: {tmp}/none.jsonl"),
        (["--prompts", "{tmp}/p.docx"], "unsupported file type '.docx'"),
        (["--prompts", "{tmp}/empty.jsonl"], "prompts: the file has none"),
        (["--prompts", "{tmp}"], "prompts: {tmp} is a folder; name a file in it"),
        (["--prompt", ""], "prompt: the prompt is empty: there is nothing to continue"),
        (["--prompt", "a", "--system", "b"], "prompt: a system prompt needs a chat: add --chat true, or write messages"),
        (["--prompt", "a", "--num_samples", "0"], "num_samples must be at least 1, got 0"),
        (["--prompt", "a", "--output", "{tmp}/empty.jsonl"], "empty.jsonl already exists: add --overwrite to replace it"),
        (["--prompt", "a", "--output", "{tmp}"], "output: {tmp} is a folder; name a file in it"),
        (["--prompts", "{tmp}/p.jsonl", "--output", "{tmp}/p.jsonl", "--overwrite"], "p.jsonl is the prompts file"),
        (["--prompt", "a", "--top_p", "2"], "top_p must be more than 0 and at most 1, got 2.0"),
        (["--prompt", "a", "--logit_bias", "{{400: 1}}"], "logit_bias: token id 400 is out of the vocabulary"),
        (["--prompt", "a", "--seed", str(2**64 - 1), "--num_samples", "2"], "seed must be a 64-bit integer"),
    ],
)  # fmt: skip
def test_invalid_options_are_reported_in_one_line(folder, words, message, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "empty.jsonl").touch()
    error = error_of(capsys, folder, *(word.format(tmp=tmp_path) for word in words))
    assert message.format(tmp=tmp_path) in error
    assert (tmp_path / "p.jsonl").read_text() == '{"prompt": "a"}\n'


def test_overwrite_replaces_the_output(folder, jsonl, tmp_path):
    (tmp_path / "out.jsonl").write_text("before\n" * 1000)
    run(folder, "--prompts", jsonl, "--output", tmp_path / "out.jsonl", "--overwrite", *GREEDY)
    assert [line["prompt"] for line in lines(tmp_path / "out.jsonl")] == PROMPTS


@pytest.mark.slow
def test_killed_run_leaves_complete_lines_in_order(folder, tmp_path):
    """With SIGKILL, while it writes."""
    file, output = tmp_path / "many.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"prompt": "bee", "id": n}) + "\n" for n in range(5000)))
    words = ["generate", "--model", folder, "--device", "cpu", "--prompts", str(file), "--output", str(output)]
    process = subprocess.Popen([sys.executable, "-m", "bumblebee", *words], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (output.exists() and output.stat().st_size > 2000):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "killed before it finished"
    assert output.read_bytes().endswith(b"\n")
    written = lines(output)
    assert [line["id"] for line in written] == list(range(len(written))) and 0 < len(written) < 5000


def test_chat_stops_at_end_of_turn_token_of_the_template(folder):
    """A base model's folder names only the end-of-text token; the chat template ends turns with another one."""
    generator = Generator.from_pretrained(folder)
    [end] = generator.tokenizer.end_of_turn_ids
    assert end not in generator.stop_ids
    chat = BatchGeneration(generator, [PromptRecord.of("a")], SamplingParams(), chat=True)
    plain = BatchGeneration(generator, [PromptRecord.of("a")], SamplingParams())
    assert chat.requests[0].params.stop_ids == [end] and plain.requests[0].params.stop_ids == []
    forced = SamplingParams(logit_bias={end: 100.0}, max_new_tokens=5)
    [text] = [
        output for output in generator.outputs(BatchGeneration(generator, [PromptRecord.of("a")], forced, chat=True).requests)
    ]
    assert (len(text.tokens), text.finish_reason) == (1, "stop")
