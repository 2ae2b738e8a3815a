"""The server's life cycle: start, shutdown, crashes and load. Each test starts its own server."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import pytest
from helpers.processes import run_command
from helpers.server_process import TIMEOUT, Running, completion, serving, wait_for

pytestmark = pytest.mark.slow

LONG = {"max_tokens": 2000, "ignore_eos": True, "temperature": 1.0}


def gone(processes: list[psutil.Process], seconds: float = 10) -> bool:
    """Whether all processes end in time; zombies count as ended."""
    return not psutil.wait_procs(processes, timeout=seconds)[1]


# -- start -----------------------------------------------------------------------------------------------------------------


def test_loading_server_is_alive_and_returns_503(served_folder: Path):
    with serving(served_folder, ready=False) as running:
        wait_for(lambda: responds(running), "a response", running.output)
        assert (running.http.get("/ready").status_code, running.http.get("/health").status_code) == (503, 200)
        rejected = running.complete()
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (503, "loading")
        assert rejected.headers["retry-after"] == "1"
        assert running.http.get("/v1/models").status_code == 200
        running.line("ready: ")
        assert running.http.get("/ready").status_code == 200
        assert running.complete(max_tokens=1).status_code == 200


def responds(running: Running) -> bool:
    try:
        return running.http.get("/health").status_code == 200
    except httpx.ConnectError:
        return False


def test_banner_describes_model_and_address(served_folder: Path):
    """Of a quantized model, which answers."""
    with serving(served_folder, "--name", "mine", "--cache_tokens", "4096", "--quantize", "int8") as running:
        line = running.line("ready: ")
        for part in (
            running.url,
            str(served_folder),
            "'mine'",
            "on cpu",
            "float32, int8 weights",
            "cache of 4,096 tokens",
            "context length 2,048",
        ):
            assert part in line
        running.http.get("/v1/models")
        assert len(running.lines) == 2, "requests are not logged"
        answer = running.post("/v1/completions", completion(model="mine", max_tokens=5)).json()
        assert answer["usage"]["completion_tokens"] == 5


def test_log_level_info_logs_each_request(served_folder: Path):
    with serving(served_folder, "--log_level", "info") as running:
        running.http.get("/v1/models")
        wait_for(lambda: "GET /v1/models" in running.output(), "a log line", running.output)


def rejected(*words: str, **options: Any) -> str:
    """The one-line error of a server that cannot start."""
    done = run_command("serve", *words, **options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_port_in_use_is_one_line(served_folder: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in rejected("--model", str(served_folder), "--port", str(port))


def test_missing_folder_model_or_tokenizer_is_one_line(served_folder: Path, tmp_path: Path):
    assert "model: folder not found: " in rejected("--model", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "empty is not a model folder: config.json not found" in rejected("--model", str(tmp_path / "empty"))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((served_folder / "config.json").read_bytes())
    assert "bare is not a tokenizer folder: it has no tokenizer.json" in rejected("--model", str(bare))
    (bare / "tokenizer.json").write_bytes((served_folder / "tokenizer.json").read_bytes())
    assert "has no model.safetensors" in rejected("--model", str(bare), "--port", "0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--host", "0.0.0.0"], "set --api_key KEY"),
        (["--host", "nowhere.invalid", "--without_key"], "is not an address of this machine"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--heartbeat_timeout", "0"], "heartbeat_timeout must be greater than 0"),
        (["--step_timeout", "-1"], "step_timeout must be greater than 0"),
        (["--max_queue", "-1"], "max_queue must be 0 or more"),
        (["--examples", " "], "examples must be non-empty strings, got [' ']"),
        (["--cache_tokens", "0"], "cache_tokens must be at least 1"),
        (["--max_running", "0"], "max_running must be at least 1"),
        (["--dtype", "int4"], "dtype: expected auto, float32, bfloat16 or float16, got 'int4'"),
        (["--quantize", "int2"], "quantize: expected int8, int4 or null, got 'int2'"),
        (["--device_map", "auto", "--device", "cpu"], "device_map auto uses all GPUs and cannot be combined with device cpu"),
    ],
)
def test_invalid_option_is_one_line(served_folder: Path, words: list[str], message: str):
    assert message in rejected("--model", str(served_folder), "--port", "0", *words)


def test_custom_model_class_needs_trust_remote_code(shifted_place: Path, server: Running):
    message = rejected("--model", "model", "--port", "0", cwd=shifted_place)
    assert "model was saved by shifted.Shifted, whose code would have to be imported" in message
    with serving("model", "--trust_remote_code", cwd=shifted_place) as running:
        own, plain = (each.complete(max_tokens=8, temperature=0.0).json()["choices"][0]["text"] for each in (running, server))
    assert own != plain


def test_requests_override_flags_override_recipe(served_folder: Path, tmp_path: Path):
    recipe = tmp_path / "serve.yaml"
    recipe.write_text(f"model: {served_folder}\nname: recipe\nmax_new_tokens: 3\ntemperature: 0.0\nignore_eos: true\n")
    with serving(served_folder, "--config", str(recipe), "--name", "flag") as running:
        body = completion(model="flag")
        answer = running.post("/v1/completions", body).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert running.post("/v1/completions", body).json()["choices"] == answer["choices"], "temperature 0"
        assert running.post("/v1/completions", {**body, "max_tokens": 5}).json()["usage"]["completion_tokens"] == 5


def test_adapter_folder_is_served_merged(served_folder: Path, tmp_path: Path):
    import torch

    from bumblebee import Bumblebee, Generator, SamplingParams
    from bumblebee.lora import LoRA

    model = Bumblebee.from_pretrained(served_folder)
    LoRA(rank=4, alpha=8, dropout=0.0)(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    params = SamplingParams(max_new_tokens=24, temperature=0.0, ignore_eos=True)
    base, adapted = (
        Generator.from_pretrained(folder, device="cpu").generate(["The list"], params)[0].text
        for folder in (served_folder, tmp_path / "adapter")
    )
    assert base != adapted
    with serving(tmp_path / "adapter", "--device_map", "auto", "--device", "auto") as running:
        answer = running.complete("The list", max_tokens=24, temperature=0.0, ignore_eos=True).json()
    assert answer["choices"][0]["text"] == adapted


# -- shutdown ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_signal_drains_and_exits_with_0(served_folder: Path, number: int):
    with serving(served_folder) as running:
        children = running.children
        with running.stream(**{**LONG, "max_tokens": 700}) as chunks:
            next(chunks)
            send_to_all(running, number)
            wait_for(lambda: running.http.get("/ready").status_code == 503, "draining")
            rejected = running.complete()
            assert (rejected.status_code, rejected.json()["error"]["code"]) == (503, "draining")
            rest = list(chunks)
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert running.end() == 0
        assert gone(children)
        assert "Traceback" not in running.output()


def send_to_all(running: Running, number: int) -> None:
    """Like a terminal, which sends Ctrl-C to all its processes, and systemd, which sends SIGTERM to all of a service."""
    for process in [psutil.Process(running.process.pid), *running.workers]:
        process.send_signal(number)


def test_drain_timeout_aborts_requests(served_folder: Path):
    with serving(served_folder, "--drain_timeout", "0.2") as running, running.stream(**LONG) as chunks:
        next(chunks)
        running.process.terminate()
        assert list(chunks)[-1]["error"]["code"] == "draining"
        assert running.end() == 0


def test_second_ctrl_c_stops_immediately(served_folder: Path):
    with serving(served_folder) as running, running.stream(**LONG) as chunks:
        children = running.children
        next(chunks)
        running.process.send_signal(signal.SIGINT)
        running.line("shutting down")
        running.process.send_signal(signal.SIGINT)
        assert running.end(5) == 128 + signal.SIGINT
        assert gone(children)


def test_stop_while_loading_exits_with_0(served_folder: Path):
    with serving(served_folder, ready=False) as running:
        wait_for(lambda: bool(running.workers), "a worker")
        children = running.children
        running.process.terminate()
        assert running.end() == 0
        assert gone(children)


def test_worker_killed_during_shutdown(served_folder: Path):
    with serving(served_folder) as running:
        for worker in running.workers:
            worker.kill()
        running.line("warning: worker process")
        running.process.terminate()
        wait_for(lambda: running.process.poll() is not None, "its end", running.output, 20)
        assert running.end() == 0
        assert "Traceback" not in running.output()


# -- crashes -------------------------------------------------------------------------------------------------------------------


def test_killed_worker_fails_its_requests_and_is_replaced(served_folder: Path):
    with serving(served_folder) as running:
        with running.stream(**LONG) as chunks:
            next(chunks)
            whole = run_in_thread(lambda: running.complete(**LONG))
            running.wait_for_metric("bumblebee_running", 2)
            [worker] = running.workers
            worker.kill()
            assert list(chunks)[-1]["error"]["code"] == "worker_died"
        whole.thread.join(TIMEOUT)
        assert (whole.result.status_code, whole.result.json()["error"]["code"]) == (500, "worker_died")
        assert (running.http.get("/ready").status_code, running.http.get("/health").status_code) == (503, 503)
        running.line("ready: ", count=2)
        assert running.complete(max_tokens=1).status_code == 200
        assert "killed by signal 9" in running.output()


HEARTBEAT = ("--heartbeat_timeout", "5")


def test_stopped_worker_fails_its_requests_and_is_replaced(served_folder: Path):
    with serving(served_folder, *HEARTBEAT) as running:
        with running.stream(**LONG) as chunks:
            next(chunks)
            whole = run_in_thread(lambda: running.complete(**LONG))
            running.wait_for_metric("bumblebee_running", 2)
            running.workers[0].suspend()
            assert list(chunks)[-1]["error"]["code"] == "worker_unresponsive"
        whole.thread.join(TIMEOUT)
        assert (whole.result.status_code, whole.result.json()["error"]["code"]) == (500, "worker_unresponsive")
        unready, unhealthy = (running.http.get(path) for path in ("/ready", "/health"))
        assert [unready.status_code, unhealthy.status_code] == [503, 503]
        assert unready.json() == unhealthy.json() == {"status": "restarting"}
        running.line("ready: ", count=2)
        assert {running.http.get(path).status_code for path in ("/ready", "/health")} == {200}
        assert running.complete(max_tokens=1).status_code == 200
        assert running.output().count("has sent no heartbeat for 5 s; killing it") == 1


def test_requests_avoid_a_stopped_worker_among_two(served_folder: Path):
    with serving(served_folder, "--device", "cpu", "cpu", *HEARTBEAT) as running:
        running.line("ready: ", count=2)
        running.workers[0].suspend()
        time.sleep(4)  # late, but not yet replaced
        assert [running.complete(max_tokens=1).status_code for _ in range(16)] == [200] * 16
        running.line("warning: worker process on cpu was killed; restarting")
        assert running.http.get("/ready").status_code == 200
        running.line("ready: ", count=3)
        assert [running.complete(max_tokens=1).status_code for _ in range(4)] == [200] * 4


def test_suspended_server_blames_no_worker(served_folder: Path):
    with serving(served_folder, "--heartbeat_timeout", "2") as running, running.stream(**LONG) as chunks:
        next(chunks)
        everything = [psutil.Process(running.process.pid), *running.workers]
        for process in everything:
            process.suspend()
        time.sleep(4)
        for process in everything:
            process.resume()
        assert list(chunks)[-1]["choices"][0]["finish_reason"] == "length"
        assert "killing it" not in running.output()


def run_in_thread(ask: Any) -> Any:
    """Run in a thread: ``.thread``, and ``.result`` after it has ended."""

    class Asked:
        result: Any = None

        def __init__(self) -> None:
            self.thread = threading.Thread(target=self.run)
            self.thread.start()

        def run(self) -> None:
            self.result = ask()

    return Asked()


def test_killed_server_leaves_no_process(served_folder: Path):
    with serving(served_folder) as running, running.stream(**LONG) as chunks:
        next(chunks)
        children = running.children
        assert len(children) >= 2  # the worker and multiprocessing's resource tracker
        running.process.kill()
        assert gone(children), children


def test_server_killed_while_loading_leaves_no_process(served_folder: Path):
    with serving(served_folder, ready=False) as running:
        wait_for(lambda: bool(running.workers), "a worker")
        children = running.children
        running.process.kill()
        assert gone(children), children


def test_two_workers_share_requests_and_one_survives(served_folder: Path):
    with serving(served_folder, "--device", "cpu", "cpu") as running:
        running.line("ready: ", count=2)
        with running.stream(**LONG) as first, running.stream(**LONG) as second:
            next(first), next(second)
            text = running.http.get("/metrics").text
            assert 'bumblebee_running{worker="0"} 1.0' in text and 'bumblebee_running{worker="1"} 1.0' in text
            running.workers[0].kill()
            ends = [list(chunks)[-1] for chunks in (first, second)]
            assert sorted("error" in end for end in ends) == [False, True]
        assert running.http.get("/ready").status_code == 200
        running.line("ready: ", count=3)


# -- load ----------------------------------------------------------------------------------------------------------------------


def test_burst_of_200_is_answered_or_rejected(served_folder: Path):
    with serving(served_folder, "--max_running", "16", "--max_queue", "100") as running:
        limits = httpx.Limits(max_connections=200)
        with httpx.Client(base_url=running.url, timeout=120, limits=limits) as client, ThreadPoolExecutor(200) as threads:
            body = completion(max_tokens=64, ignore_eos=True)
            responses = list(threads.map(lambda _: client.post("/v1/completions", json=body), range(200)))
        statuses = Counter(response.status_code for response in responses)
        assert set(statuses) <= {200, 429} and statuses[200] >= 116, statuses
        for response in responses:
            if response.status_code == 200:
                assert response.json()["usage"]["completion_tokens"] == 64
        running.wait_for_metric("bumblebee_running", 0)
        assert running.metric("bumblebee_waiting") == 0


def test_idle_server_uses_no_cpu(served_folder: Path):
    with serving(served_folder) as running:
        running.complete(max_tokens=4)
        time.sleep(1)
        processes = [psutil.Process(running.process.pid), *running.children]
        before, begun = sum(map(cpu_time, processes)), time.monotonic()
        time.sleep(10)
        share = (sum(map(cpu_time, processes)) - before) / (time.monotonic() - begun)
        assert share < 0.02, f"{share:.1%} of a core"


def cpu_time(process: psutil.Process) -> float:
    """CPU time in seconds."""
    times = process.cpu_times()
    return times.user + times.system


@pytest.mark.timeout(600)
def test_memory_is_flat_over_2000_requests(served_folder: Path):
    """A leak grows in every period. The allocator's pools grow in a few steps, which the median leaves out.

    The cache is small enough for the first requests to touch all of it: untouched memory is not resident yet.
    """
    with serving(served_folder, "--cache_tokens", "4096") as running, ThreadPoolExecutor(16) as threads:

        def resident_after(count: int) -> list[int]:
            """Bytes of the server and of each worker after some more requests."""
            for response in threads.map(lambda i: send_request(running, i), range(count)):
                assert response < 500
            return [process.memory_info().rss for process in processes]

        processes = [psutil.Process(running.process.pid), *running.workers]
        resident = [resident_after(500), *(resident_after(200) for _ in range(10))]
        for sizes in zip(*resident, strict=True):
            grown = [after - before for before, after in itertools.pairwise(sizes)]
            assert median(grown) < 200 * 4096, grown  # 4 KiB per request
            assert sizes[-1] - sizes[0] < 32 * 2**20, grown
        assert running.metric("bumblebee_running") == 0


def send_request(running: Running, number: int) -> int:
    """Alternate between complete responses, streams, abandoned streams and invalid bodies."""
    prompt = f"Number {number} of many"
    if number % 4 == 0:
        return running.complete(prompt, max_tokens=8).status_code
    if number % 4 == 3:
        return running.complete(prompt, max_tokens=-1).status_code
    with running.stream(prompt, max_tokens=8) as chunks:
        if number % 4 == 1:
            list(chunks)
        else:
            next(chunks)
    return 200


def test_server_process_does_not_import_torch(served_folder: Path):
    code = (
        "import sys; from serve.serve_options import ServeOptions; from serve.server import Server;"
        f"Server(ServeOptions({str(served_folder)!r}, port=0)); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
