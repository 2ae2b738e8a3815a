"""What the user chooses for ``bumblebee chat``, beside how tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NOT_OFFERED = ("logprobs", "spelled_ids")  # options of sampling whose results a terminal has no place for


@dataclass(frozen=True)
class ChatOptions:
    """Options of a chat in the terminal.

    Args:
        model: model folder to talk to, in this process.
        url: server to talk to instead, such as http://127.0.0.1:8000.
        api_key: the key that the server asks for.
        name: the model's name at the server.
        device: auto, cpu, cuda or cuda:N; of a model folder.
        device_map: auto spreads the layers of a model too large for one GPU over all; null puts it on one device.
        dtype: auto (the file's), float32, bfloat16 or float16; of a model folder.
        trust_remote_code: run code that the model folder names or holds.
        system_prompt: what the model is told before the conversation.
        enable_history: answer with the conversation in mind; false: each question alone.
        raw: continue each input as plain text, without a chat template; null: where the model folder has none.

    Raises:
        ValueError: neither or both of a model folder and a server.
    """

    model: str | None = None
    url: str | None = None
    api_key: str | None = None
    name: str = "bumblebee"
    device: str = "auto"
    device_map: Literal["auto"] | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    system_prompt: str | None = None
    enable_history: bool = True
    raw: bool | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.url is None):
            both = "" if self.model is None else ", not both"
            raise ValueError(f"say whom to talk to: --model FOLDER or --url http://127.0.0.1:8000{both}")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http://HOST:PORT, got {self.url}")
