"""How does the server answer many at once, against transformers' generate behind the same kind of HTTP server?

    python benchmarks/serve.py [fp32|bf16]     26.7 M parameters; about five minutes

Both servers load the same folder, run on the same cores and are asked by the same client: prompts of 128 tokens, 128 new ones,
greedy, streamed. First it is checked that they answer with the same tokens. Then, taking turns:

- streams: one after the other, and 16 at once. transformers' generate takes one request at a time, as it does behind a lock.
- arrivals: requests come at random (Poisson) at several rates. Time to the first token, time of each further one, and goodput:
  answers a second of those that kept both within bounds.
- a burst of 200 requests at once to our server: each must be answered or refused.
- idle: processor time of our server's processes while nobody asks.
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

from common import header, median, table

PROMPT, NEW, VOCABULARY = 128, 128, 8192
TURNS, AT_ONCE, BURST = 3, 16, 200
RATES, ARRIVALS = (0.5, 2.0, 8.0), 30  # requests a second; requests at each rate
FIRST, FURTHER = 1.0, 0.1  # seconds that an answer may take to be good: to its first token, to each further one
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
THREADS = "2"
QUICKSTART = str(Path(__file__).parents[1] / "recipes" / "quickstart")  # reads the text that the tokenizer is trained on
END = 0  # id of the end-of-text token, which is forbidden: all answers are of one length


@dataclass
class Answer:
    """What came back, and when (seconds since the request)."""

    status: int = 200
    tokens: list[str] = field(default_factory=list)
    text: str = ""
    first: float = 0.0
    last: float = 0.0

    @property
    def further(self) -> float:
        """Seconds of each token after the first."""
        return (self.last - self.first) / (NEW - 1)

    @property
    def good(self) -> bool:
        """Whether it came within the bounds."""
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
    config = BumblebeeConfig(**shape, initializer_range=0.1)  # so that texts vary
    Bumblebee(config).save_pretrained(folder)
    tokenizer = Tokenizer.train([entry.document for entry in stdlib_docs.entries()], VOCABULARY)
    assert tokenizer.eos_token_id == END
    tokenizer.save_pretrained(folder)


def peer(folder: str, dtype: str, port: int) -> None:
    """transformers' generate behind Starlette and uvicorn, one request at a time."""
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
    """(address, process id) of a server that is ready; it is told to end afterwards."""
    import httpx

    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])  # here a script has the name of a package
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            time.sleep(0.2)
            assert process.poll() is None, "the server has ended"
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
    """Prompts that share nothing, so that no cache helps."""
    draw = random.Random(seed)
    return [[draw.randrange(1, VOCABULARY) for _ in range(PROMPT)] for _ in range(count)]


async def ask(client, address: str, prompt: list[int]) -> Answer:
    """One streamed request."""
    answer, begin = Answer(), time.perf_counter()
    body = {"model": "bumblebee", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True, "logprobs": 0}
    body["logit_bias"] = {str(END): -100}
    async with client.stream("POST", f"{address}/v1/completions", json=body) as response:
        answer.status = response.status_code
        async for line in response.aiter_lines():
            if response.status_code == 200 and line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                tokens = choices[0]["logprobs"]["tokens"] if choices and choices[0].get("logprobs") else []
                answer.tokens += tokens
                answer.text += choices[0].get("text", "") if choices else ""
                answer.last = time.perf_counter() - begin
                answer.first = answer.first or answer.last
    return answer


async def all_at(address: str, asked: list[list[int]], times: Sequence[float]) -> tuple[float, list[Answer]]:
    """Ask each prompt at its time; (seconds for all, answers)."""
    import httpx

    async def later(client, prompt, at):
        await asyncio.sleep(at)
        return await ask(client, address, prompt)

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        begin = time.perf_counter()
        answers = await asyncio.gather(*(later(client, prompt, at) for prompt, at in zip(asked, times, strict=True)))
        return time.perf_counter() - begin, list(answers)


async def one_after_the_other(address: str, asked: list[list[int]]) -> tuple[float, list[Answer]]:
    """(seconds, answers)."""
    parts = [await all_at(address, [prompt], [0.0]) for prompt in asked]
    return sum(seconds for seconds, _ in parts), [answer for _, answers in parts for answer in answers]


# -- what is measured ----------------------------------------------------------------------------------------------------


def check_equal(ours: str, theirs: str, dtype: str) -> str:
    """Both answer the same: in fp32 to the end, in bf16 as far as rounding does not part them, which is told."""
    asked = prompts(4, 1)
    mine, others = (asyncio.run(one_after_the_other(each, asked))[1] for each in (ours, theirs))
    assert all(len(answer.tokens) == NEW for answer in [*mine, *others]), [len(answer.tokens) for answer in [*mine, *others]]
    shared = [os.path.commonprefix([a.text, b.text]) for a, b in zip(mine, others, strict=True)]
    equal = sum(a.text == b.text for a, b in zip(mine, others, strict=True))
    assert dtype != "fp32" or equal == len(asked), "the answers differ"
    return f"equal answers: {equal} of {len(asked)}; all begin with at least {min(map(len, shared))} equal characters"


def streams(ours: str, theirs: str) -> list[list[object]]:
    """Tokens a second of one stream after the other and of many at once."""
    rates: dict[str, list[float]] = {"theirs": [], "one": [], "many": []}
    for turn in range(TURNS):
        for name, address, count in (("theirs", theirs, 2), ("one", ours, 2)):
            seconds, _ = asyncio.run(one_after_the_other(address, prompts(count, 10 + turn)))
            rates[name].append(count * NEW / seconds)
        seconds, answers = asyncio.run(all_at(ours, prompts(AT_ONCE, 20 + turn), [0.0] * AT_ONCE))
        assert all(answer.status == 200 and len(answer.tokens) == NEW for answer in answers)
        rates["many"].append(AT_ONCE * NEW / seconds)

    def ratio(name: str, over: str) -> str:
        return f"{median([a / b for a, b in zip(rates[name], rates[over], strict=True)]):.2f}"

    return [
        ["transformers, one after the other", f"{median(rates['theirs']):.0f}", "1", ""],
        ["Bumblebee, one after the other", f"{median(rates['one']):.0f}", ratio("one", "theirs"), "1"],
        [f"Bumblebee, {AT_ONCE} at once", f"{median(rates['many']):.0f}", ratio("many", "theirs"), ratio("many", "one")],
    ]


def arrivals(address: str, rate: float) -> list[object]:
    """Latencies in milliseconds and goodput at one rate."""
    draw = random.Random(3)
    times, now = [], 0.0
    for _ in range(ARRIVALS):
        now += draw.expovariate(rate)
        times.append(now)
    seconds, answers = asyncio.run(all_at(address, prompts(ARRIVALS, 4), times))
    done = [answer for answer in answers if answer.status == 200]

    def at(values: list[float]) -> str:
        values = sorted(values)
        return " / ".join(f"{1000 * values[min(int(share * len(values)), len(values) - 1)]:.0f}" for share in (0.5, 0.9, 0.99))

    good = sum(answer.good for answer in answers) / seconds
    return [
        at([answer.first for answer in done]),
        at([answer.further for answer in done]),
        f"{good:.2f}",
        len(answers) - len(done),
    ]


def burst(address: str) -> str:
    """What becomes of many requests at once."""
    seconds, answers = asyncio.run(all_at(address, prompts(BURST, 5), [0.0] * BURST))
    whole = sum(answer.status == 200 and len(answer.tokens) == NEW for answer in answers)
    refused = sum(answer.status in (429, 503) for answer in answers)
    assert whole + refused == BURST, sorted({(answer.status, len(answer.tokens)) for answer in answers})
    return f"{BURST} requests at once: {whole} answered whole, {refused} refused, in {seconds:.0f} s"


def idle(process_id: int, seconds: float = 10.0) -> str:
    """Processor time of a process and its children."""
    import psutil

    parent = psutil.Process(process_id)
    family = [parent, *parent.children(recursive=True)]

    def used() -> float:
        return sum(sum(each.cpu_times()[:2]) for each in family)

    time.sleep(2)
    before = used()
    time.sleep(seconds)
    return f"idle: {100 * (used() - before) / seconds:.2f} % of a core in {len(family)} processes"


def main(dtype: str) -> None:
    os.environ["OMP_NUM_THREADS"] = THREADS
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        port, other = free_port(), free_port()
        mine = [sys.executable, "-m", "bumblebee", "serve", "--model", folder, "--port", str(port), "--dtype", DTYPES[dtype]]
        theirs = [sys.executable, str(Path(__file__).resolve()), "peer", folder, dtype, str(other)]
        with server(mine, port) as (ours, process_id), server(theirs, other) as (peers, _):
            print(
                header(f"Serving, {dtype}, 26.7 M parameters, prompts of {PROMPT}, answers of {NEW} tokens, {THREADS} threads")
            )
            print(check_equal(ours, peers, dtype), "\n")
            print(table(["server", "tokens/s", "of transformers", "of one stream"], streams(ours, peers)), "\n")
            names = ["requests/s", "server", "first token, ms, p50 / 90 / 99", "each further, ms", "good answers/s", "refused"]
            rows = [
                [rate, name, *arrivals(address, rate)]
                for rate in RATES
                for name, address in (("transformers", peers), ("Bumblebee", ours))
            ]
            print(f"{ARRIVALS} arrivals at each rate; good is a first token in {FIRST} s and {FURTHER} s for each further\n")
            print(table(names, rows), "\n")
            print(burst(ours), "\n")
            print(idle(process_id))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peer"]:
        peer(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "bf16")
