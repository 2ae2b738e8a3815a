"""The GPU benchmark runs its parts, keeps what they report, and ends those that fail or hang, without a GPU."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.documents import ROOT

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import decode, offline, parts, several, shapes, verification
from benchmarks.gpu.parts import Part, all_parts, select
from benchmarks.gpu.report import Records, page, targets_table

ORIGIN = {
    "kind": "cuda",
    "device": "1 x H100",
    "torch": "2.13",
    "deepspeed": "0.19",
    "python": "3.12",
    "commit": "abc",
    "date": "d",
}


def part(code: str, limit: float = 30, **options: object) -> Part:
    return Part("part", ("-c", code), limit, **options)  # type: ignore[arg-type]


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path, "test", ORIGIN)


def run(records: Records, *several_parts: Part, resume: bool = False) -> int:
    return command.run(several_parts, records, resume)


@pytest.mark.slow
def test_failed_and_hung_parts_keep_what_they_reported_and_the_next_runs(records, capsys):
    report_one = "from benchmarks.gpu.results import report, skip; report(mfu=0.25, memory=float('nan'))\n"
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    hung = part(f"{report_one}{child}print('child', p.pid, flush=True); p.wait()", limit=6)
    failed = Part("train-failed", ("-c", f"{report_one}raise ValueError('a reason')"), 30)
    skipped = Part("flash", ("-c", f"{report_one}skip('no package')"), 30)
    missing = Part("nano", ("-c", "raise SystemExit(9)"), 30, ("no_such_module",))
    assert run(records, hung, failed, skipped, missing) == 1
    printed = capsys.readouterr()
    assert (
        printed.err == "failed: part, train-failed\n"
        and "| training MFU, d20 shape | 50% | 25.0% (train-failed) | not met |" in printed.out
    )
    pid = next(line.split()[-1] for line in printed.out.splitlines() if "child" in line)
    assert not Path(f"/proc/{pid}").exists() or not several._runs(int(pid))
    ends = {line["part"]: line for line in records.read() if "status" in line}
    assert [(line["status"], line.get("reason")) for line in ends.values()] == [
        ("timed out", "killed after 6 s"), ("failed", "exit code 1: ValueError: a reason"), ("skipped", "no package"),
        ("skipped", "not installed: no_such_module"),
    ]  # fmt: skip
    assert [line["result"] for line in records.read() if "result" in line] == [{"mfu": 0.25, "memory": None}] * 3
    assert all(ORIGIN.items() <= line.items() for line in records.read())
    text = records.page.read_text()
    assert "ValueError: a reason" in text and "1 x H100, torch 2.13, deepspeed 0.19, commit abc, date d" in text


def test_resume_leaves_out_what_was_ok_on_the_same_commit_and_hardware(tmp_path, records):
    for name, status in (("a", "ok"), ("b", "failed"), ("c", "ok"), ("c", "timed out")):
        records.append(part=name, begins=True)
        records.append(part=name, status=status, seconds=1)
    records.lines.open("a").write('{"part": "cut o')  # by a kill
    assert records.finished() == {"a"}
    assert Records(tmp_path, "test", {**ORIGIN, "date": "later"}).finished() == {"a"}
    assert Records(tmp_path, "test", {**ORIGIN, "commit": "def"}).finished() == set()


def test_targets_are_met_not_met_or_not_measured():
    def of(name: str, kind: str = "cuda", **result: float) -> dict[str, object]:
        return {**ORIGIN, "part": name, "kind": kind, "result": result}

    measured = [
        of("train-a", mfu=0.4),
        of("train-b", mfu=0.5),
        of("decode-1", share_of_bandwidth=0.59),
        of("decode-8", share_of_bandwidth=0.9),
    ]
    states = [line.split("|")[-2].strip() for line in targets_table(measured).splitlines()[2:]]
    assert states == ["met", "not met", "not measured"]
    assert "not met" not in targets_table([of("decode-1", "cpu", share_of_bandwidth=0.01)])
    again = [{**of("train-b"), "begins": True}, of("train-b", mfu=0.3)]  # the last run of a part counts
    assert "40.0% (train-a)" in targets_table([*measured, *again]) and "0.3" in page([*measured, *again])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_has_a_script_that_takes_its_options(device, tmp_path):
    """What a GPU runs is read here, by the parsers of the scripts; a CPU runs the same parts."""
    from benchmarks.gpu.training import arguments

    names = [each.name for each in all_parts(device, tmp_path)]
    assert len(set(names)) == len(names) and names == [each.name for each in all_parts("cuda", tmp_path)]
    for each in (*all_parts(device, tmp_path), *several.all_parts(device, 2)):
        module = each.command[1]
        if module.startswith("benchmarks.gpu."):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
        if module == "benchmarks.gpu.training":
            assert arguments().parse_args(each.command[2:]).device == device
    if device == "cuda":
        assert [each.name for each in all_parts(device, tmp_path) if each.skipped] == []
        assert len(parts._gpu_tests(device)) > 8 and all((ROOT / file).is_file() for file in parts._gpu_tests(device)[7:])


def test_only_selects_by_name_or_its_beginning_and_refuses_others(tmp_path, capsys):
    every = all_parts("cuda", tmp_path)
    assert [each.name for each in select(every, ["train-flash", "decode-64"])] == ["decode-64", "train-flash"]
    assert {"decode-1", "decode-64-sampled"} <= {each.name for each in select(every, ["decode"])}
    for words, message in (
        (["--device", "cpu", "--only", "trian"], "--only: unknown part 'trian'; available: environment, probe,"),
        ([], "--device: cuda, but no GPU is visible; --device cpu tries the command"),
    ):
        if not words and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as refusal:
            command.main(words)
        assert refusal.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_published_shapes_have_their_published_sizes():
    from bumblebee import Bumblebee

    def parameters(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Bumblebee(shapes.model_config(name, "cuda")).parameters())

    assert [round(parameters(name) / 1e6) for name in ("d20", "qwen3-0.6b", "1.5b")] == [561, 596, 1544]
    with pytest.raises(ValueError, match="unknown shape 'd21'"):
        shapes.model_config("d21", "cpu")


@pytest.mark.parametrize(
    ("name", "gb_per_s"), [("NVIDIA H100 80GB HBM3", 3350), ("NVIDIA H200", 4800), ("NVIDIA H100 PCIe", 2000)]
)
def test_bandwidth_of_known_gpus_is_that_of_the_data_sheet(name, gb_per_s, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert decode.bandwidth("cuda") == (gb_per_s * 1e9, "data sheet")
    assert command.default_name("cuda") == name.lower().replace(" ", "-")


@pytest.mark.slow
def test_training_decoding_and_both_engines_run_with_small_shapes(tmp_path, capsys, monkeypatch):
    """In this process, with a stand-in for nano-vllm that has its signatures."""
    from benchmarks.gpu import training

    words = ["--device", "cpu", "--variant", "default", "--steps", "3"]
    training.train(training.arguments().parse_args(words), shapes.TRAINING["cpu"])
    decode.main("cpu", 2, 0.0)

    class LLM:
        def __init__(self, model: str, enforce_eager: bool, max_model_len: int) -> None:
            assert (Path(model) / "config.json").is_file()

        def generate(self, prompts, sampling_params, use_tqdm=True):
            assert isinstance(prompts[0][0], int)

    stub = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "nanovllm", stub)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(offline, "in_process", lambda engine, folder, device: offline.ENGINES[engine](folder, device))
    assert offline.main("cpu") == 0
    results = [json.loads(line.removeprefix("RESULT ")) for line in capsys.readouterr().out.splitlines() if "RESULT" in line]
    trained, decoded, ours, theirs, ratio = results
    assert trained["tokens_per_s"] > 0 and trained["predicted_gb"] > 0 and trained["peak"] == "measured"
    assert decoded["batch"] == 2 and decoded["gb_per_step"] > 0 and 0 < decoded["share_of_bandwidth"] < 1
    assert ours["new_tokens"] == theirs["new_tokens"] and ratio.keys() == {"share_of_nano_vllm"}


def test_failed_checks_of_verify_are_reported_with_their_bounds():
    figure = {"name": "worst tensor", "value": 0.5, "bound": 1e-4, "unit": "", "passed": False}
    speed = {"name": "matmul", "value": 3.0, "bound": None, "unit": "TFLOP/s", "passed": True}
    checks = [
        {"name": "gradient", "status": "FAIL", "measurements": [figure], "error": ""},
        {"name": "matmul throughput", "status": "measured", "measurements": [speed], "error": ""},
    ]
    assert list(verification.summary({"checks": checks})) == [
        {"checks": 2, "failed": ["gradient"]},
        {"check": "gradient", "measurement": "worst tensor", "value": 0.5, "bound": 1e-4},
        {"check": "matmul throughput", "measurement": "matmul", "value": 3.0, "unit": "TFLOP/s"},
    ]


STAND_IN = """
import os, signal, subprocess, sys, time
def report(text): print("RESULT " + text, flush=True)
if "--resume" in sys.argv:
    report('{"rank": 0, "starts_at": 2}'); report('{"rank": 1, "starts_at": 2}'); report('{"rank": 0, "step": 8}'); sys.exit()
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
report(f'{{"rank": 1, "process": {rank.pid}, "starts_at": 0}}'); report('{"rank": 1, "step": 3}')
rank.wait()
if HANGS:  # a rank that waits for the one that was killed
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    report(f'{{"rank": 0, "process": {rank.pid}, "starts_at": 0}}'); time.sleep(60)
sys.exit(1)
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_killed_rank_must_end_the_others_and_the_run_must_resume(hangs, capsys, tmp_path, monkeypatch):
    """With a stand-in for torchrun; the command itself runs it with real ranks."""
    script = tmp_path / "launcher.py"
    script.write_text(STAND_IN.replace("HANGS", str(hangs)))
    monkeypatch.setattr(several, "launcher", lambda ranks: (sys.executable, str(script)))
    monkeypatch.setattr(several, "EXIT", 1.0 if hangs else 20.0)
    assert several.run_one("kill", "cpu", 2) == int(hangs)
    killed, resumed = (json.loads(line[7:]) for line in capsys.readouterr().out.splitlines() if line.startswith("RESULT "))
    assert killed["exit_code"] == (None if hangs else 1) and len(killed["processes_left"]) == int(hangs)
    assert not any(map(several._runs, killed["processes_left"]))  # they are ended
    assert resumed["continued"] and resumed["last_step"] == several.STEPS


@pytest.mark.slow
def test_rank_that_raises_ends_all_ranks_and_is_heard(capsys):
    assert several.run_one("raise", "cpu", 2) == 0
    result = json.loads(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("RESULT "))[7:])
    assert (
        result["passed"] and result["message_printed"] and result["processes_left"] == [] and result["seconds"] < several.EXIT
    )
