"""Measure the server under concurrent load, against transformers' ``generate`` in the same kind of HTTP server.

    python benchmarks/serve.py [fp32|bf16]

26.7 M parameters. Takes about five minutes.

Both servers load the same folder, run on the same cores and serve the same client: prompts of 128 tokens, 128 new tokens,
greedy, streamed. Their tokens are compared first. Then, in turn:

- streams: sequential requests, and 16 concurrent ones. transformers' generate runs one request at a time, under a lock.
- arrivals: Poisson arrivals at several rates: time to first token (TTFT), time per output token (TPOT), goodput: completions
  per second that stay within both latency bounds.
- burst: 200 simultaneous requests to our server; each must be completed or refused.
- idle: CPU time of our server's processes without requests.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common import header, median, parser, table

PROMPT, NEW, VOCABULARY = 128, 128, 8192
ROUNDS, CONCURRENT, BURST = 3, 16, 200
RATES, ARRIVALS = (0.5, 2.0, 8.0), 30  # requests/s; requests per rate
FIRST, FURTHER = 1.0, 0.1  # latency bounds of goodput in seconds: time to first token, time per further token
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
THREADS = "2"
QUICKSTART = str(Path(__file__).parents[1] / "recipes" / "quickstart")  # reads the tokenizer's training text
END = 0  # id of the end-of-text token, which is forbidden, so that all completions have the same length


@dataclass
class Completion:
    """A response, with times in seconds since the request."""

    status: int = 200
    tokens: list[str] = field(default_factory=list)
    text: str = ""
    first: float = 0.0
    last: float = 0.0

    @property
    def further(self) -> float:
        """Seconds per token after the first."""
        return (self.last - self.first) / (NEW - 1)

    @property
    def good(self) -> bool:
        """Whether it is within the latency bounds."""
        return self.status == 200 and self.first <= FIRST and self.further <= FURTHER


# -- the folder and the two servers ------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """A model folder with random weights and a tokenizer."""
    import torch

    sys.path.insert(0, QUICKSTART)
    import stdlib_docs

    from bumblebee import Bumblebee, BumblebeeConfig, Tokenizer

    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    }  # fmt: skip
    config = BumblebeeConfig(**shape, initializer_range=0.1)  # varied text
    Bumblebee(config).save_pretrained(folder)
    tokenizer = Tokenizer.train([entry.document for entry in stdlib_docs.entries()], VOCABULARY)
    assert tokenizer.eos_token_id == END
    tokenizer.save_pretrained(folder)


def peer(folder: str, dtype: str, port: int) -> None:
    """Serve transformers' generate with Starlette and uvicorn, one request at a time."""
    import threading

    import torch
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route
    from transformers import AutoModelForCausalLM, LogitsProcessor
    from transformers.generation.streamers import BaseStreamer

    from bumblebee import Tokenizer
    from bumblebee.inference.detokenizer import Detokenizer

    tokenizer = Tokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPES[dtype])).eval()
    lock = threading.Lock()

    class Queue(BaseStreamer):
        def __init__(self) -> None:
            self.loop, self.queue, self.prompt = asyncio.get_running_loop(), asyncio.Queue(), True

        def put(self, value):
            if not self.prompt:
                self.loop.call_soon_threadsafe(self.queue.put_nowait, int(value))
            self.prompt = False

        def end(self):
            self.loop.call_soon_threadsafe(self.queue.put_nowait, None)

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, END] = -float("inf")
            return scores

    def run(ids: list[int], new: int, streamer: Queue) -> None:
        with lock, torch.inference_mode():
            inputs = torch.tensor([ids])
            model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=new, streamer=streamer,
                pad_token_id=END, logits_processor=[Forbid()],
            )  # fmt: skip

    async def ready(request: Request) -> JSONResponse:
        return JSONResponse({})

    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        streamer = Queue()
        threading.Thread(target=run, args=(body["prompt"], body["max_tokens"], streamer), daemon=True).start()

        async def events():
            pieces = Detokenizer(tokenizer)
            while (token := await streamer.queue.get()) is not None:
                chunk = {"choices": [{"text": pieces.add(token), "logprobs": {"tokens": [str(token)]}}]}
                yield f"data: {json.dumps(chunk)}\n\n"
            yield f"data: {json.dumps({'choices': [{'text': pieces.finish()}]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/ready", ready), Route("/v1/completions", completions, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def server(command: Sequence[str], port: int) -> Iterator[tuple[str, int]]:
    """Start a server and wait until it is ready; yields (address, process id) and terminates it afterwards."""
    import httpx

    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])  # benchmarks/serve.py shadows the package
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            time.sleep(0.2)
            assert process.poll() is None, "the server exited"
            try:
                if httpx.get(f"{address}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
        yield address, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


# -- the client ----------------------------------------------------------------------------------------------------------


def prompts(count: int, seed: int) -> list[list[int]]:
    """Random prompts without common prefixes, so that the prefix cache does not help."""
    rng = random.Random(seed)
    return [[rng.randrange(1, VOCABULARY) for _ in range(PROMPT)] for _ in range(count)]


async def complete(client, address: str, prompt: list[int]) -> Completion:
    """Send one streamed request."""
    completion, begin = Completion(), time.perf_counter()
    body = {"model": "bumblebee", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True, "logprobs": 0}
    body["logit_bias"] = {str(END): -100}
    async with client.stream("POST", f"{address}/v1/completions", json=body) as response:
        completion.status = response.status_code
        async for line in response.aiter_lines():
            if response.status_code == 200 and line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                tokens = choices[0]["logprobs"]["tokens"] if choices and choices[0].get("logprobs") else []
                completion.tokens += tokens
                completion.text += choices[0].get("text", "") if choices else ""
                completion.last = time.perf_counter() - begin
                completion.first = completion.first or completion.last
    return completion


async def send_all(address: str, prompt_list: list[list[int]], times: Sequence[float]) -> tuple[float, list[Completion]]:
    """Send each prompt at its time; returns (total seconds, completions)."""
    import httpx

    async def later(client, prompt, at):
        await asyncio.sleep(at)
        return await complete(client, address, prompt)

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        begin = time.perf_counter()
        completions = await asyncio.gather(*(later(client, prompt, at) for prompt, at in zip(prompt_list, times, strict=True)))
        return time.perf_counter() - begin, list(completions)


async def send_sequentially(address: str, prompt_list: list[list[int]]) -> tuple[float, list[Completion]]:
    """Send each prompt after the previous completion; returns (total seconds, completions)."""
    parts = [await send_all(address, [prompt], [0.0]) for prompt in prompt_list]
    return sum(seconds for seconds, _ in parts), [completion for _, completions in parts for completion in completions]


# -- measurements ---------------------------------------------------------------------------------------------------------


def check_equal(ours: str, theirs: str, dtype: str) -> str:
    """Compare the completions: equal in fp32; in bf16, where rounding differs, report the common prefixes."""
    prompt_list = prompts(4, 1)
    mine, others = (asyncio.run(send_sequentially(each, prompt_list))[1] for each in (ours, theirs))
    lengths = [len(completion.tokens) for completion in [*mine, *others]]
    assert all(length == NEW for length in lengths), lengths
    shared = [os.path.commonprefix([a.text, b.text]) for a, b in zip(mine, others, strict=True)]
    equal = sum(a.text == b.text for a, b in zip(mine, others, strict=True))
    assert dtype != "fp32" or equal == len(prompt_list), "the completions differ"
    return f"Equal completions: {equal} of {len(prompt_list)}; common prefixes of at least {min(map(len, shared))} characters."


def streams(ours: str, theirs: str) -> list[list[object]]:
    """Tokens per second of sequential and of concurrent streams."""
    rates: dict[str, list[float]] = {"theirs": [], "one": [], "many": []}
    for number in range(ROUNDS):
        for name, address, count in (("theirs", theirs, 2), ("one", ours, 2)):
            seconds, _ = asyncio.run(send_sequentially(address, prompts(count, 10 + number)))
            rates[name].append(count * NEW / seconds)
        seconds, completions = asyncio.run(send_all(ours, prompts(CONCURRENT, 20 + number), [0.0] * CONCURRENT))
        assert all(completion.status == 200 and len(completion.tokens) == NEW for completion in completions)
        rates["many"].append(CONCURRENT * NEW / seconds)

    def ratio(name: str, over: str) -> str:
        return f"{median([a / b for a, b in zip(rates[name], rates[over], strict=True)]):.2f}"

    return [
        ["transformers, sequential", f"{median(rates['theirs']):.0f}", "1", ""],
        ["Bumblebee, sequential", f"{median(rates['one']):.0f}", ratio("one", "theirs"), "1"],
        [f"Bumblebee, {CONCURRENT} concurrent", f"{median(rates['many']):.0f}", ratio("many", "theirs"), ratio("many", "one")],
    ]


def arrivals(address: str, rate: float) -> list[object]:
    """Latency percentiles in milliseconds, and goodput, at one rate."""
    rng = random.Random(3)
    times, now = [], 0.0
    for _ in range(ARRIVALS):
        now += rng.expovariate(rate)
        times.append(now)
    seconds, completions = asyncio.run(send_all(address, prompts(ARRIVALS, 4), times))
    done = [completion for completion in completions if completion.status == 200]

    def percentiles(values: list[float]) -> str:
        values = sorted(values)
        return " / ".join(
            f"{1000 * values[min(int(fraction * len(values)), len(values) - 1)]:.0f}" for fraction in (0.5, 0.9, 0.99)
        )

    good = sum(completion.good for completion in completions) / seconds
    return [
        percentiles([completion.first for completion in done]),
        percentiles([completion.further for completion in done]),
        f"{good:.2f}",
        len(completions) - len(done),
    ]


def burst(address: str) -> str:
    """Outcome of many simultaneous requests."""
    seconds, completions = asyncio.run(send_all(address, prompts(BURST, 5), [0.0] * BURST))
    completed = sum(completion.status == 200 and len(completion.tokens) == NEW for completion in completions)
    refused = sum(completion.status in (429, 503) for completion in completions)
    assert completed + refused == BURST, sorted({(completion.status, len(completion.tokens)) for completion in completions})
    return f"{BURST} simultaneous requests: {completed} completed, {refused} refused, in {seconds:.0f} s."


def idle(process_id: int, seconds: float = 10.0) -> str:
    """CPU time of an idle process and its children."""
    import psutil

    parent = psutil.Process(process_id)
    processes = [parent, *parent.children(recursive=True)]

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    time.sleep(2)
    before = used()
    time.sleep(seconds)
    return f"Idle: {100 * (used() - before) / seconds:.2f} % of a core in {len(processes)} processes."


def main(dtype: str) -> None:
    os.environ["OMP_NUM_THREADS"] = THREADS
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        port, peer_port = free_port(), free_port()
        mine = [sys.executable, "-m", "bumblebee", "serve", "--model", folder, "--port", str(port), "--dtype", DTYPES[dtype]]
        theirs = [sys.executable, str(Path(__file__).resolve()), "--peer", folder, dtype, str(peer_port)]
        with server(mine, port) as (ours, process_id), server(theirs, peer_port) as (peers, _):
            print(
                header(
                    f"Serving, {dtype}, 26.7 M parameters, prompts of {PROMPT}, completions of {NEW} tokens, {THREADS} threads"
                )
            )
            print(check_equal(ours, peers, dtype), "\n")
            print(table(["server", "tokens/s", "vs transformers", "vs sequential"], streams(ours, peers)), "\n")
            columns = ["requests/s", "server", "TTFT, ms, p50 / 90 / 99", "TPOT, ms, p50 / 90 / 99", "goodput, 1/s", "refused"]
            rows = [
                [rate, name, *arrivals(address, rate)]
                for rate in RATES
                for name, address in (("transformers", peers), ("Bumblebee", ours))
            ]
            print(f"{ARRIVALS} arrivals per rate. Goodput: TTFT at most {FIRST} s, TPOT at most {FURTHER} s.\n")
            print(table(columns, rows), "\n")
            print(burst(ours), "\n")
            print(idle(process_id))


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("dtype", nargs="?", choices=["fp32", "bf16"], default="bf16")
    arguments.add_argument("--peer", nargs=3, metavar=("FOLDER", "DTYPE", "PORT"), help="used by the script itself")
    options = arguments.parse_args()
    if options.peer:
        peer(options.peer[0], options.peer[1], int(options.peer[2]))
    else:
        main(options.dtype)
