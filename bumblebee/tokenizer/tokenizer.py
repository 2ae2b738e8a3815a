"""The tokenizer of a model folder: text to ids and back, and the training of a new one.

The work is done by the ``tokenizers`` library; this file reads and writes the folder's files (tokenizer.json and
tokenizer_config.json), keeps text that spells a special token text, and knows the bytes of each token. Conversations are
the matter of chat_template.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from bumblebee.adapter_folders import folder_with_file
from bumblebee.json_files import read_json, write_json
from bumblebee.tokenizer.chat_template import ChatTemplate, content_of, default_for
from bumblebee.tokenizer.chatml import CHATML
from bumblebee.tokenizer.special_token_guard import replace_surrogates
from bumblebee.tokenizer.template_sources import template_files
from bumblebee.tokenizer.template_tokenizer import encode_text

END_OF_TEXT = "<|endoftext|>"
# What a new tokenizer reserves: the end of a document, and the turn marks of ChatML, so that a chat needs no new rows.
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
# Where a text is cut before merging, as in Qwen2. It has to be Qwen2's: transformers 5 takes only vocabulary and merges from
# the tokenizer.json beside a Qwen2 config.json, and cuts in its own way. (It also composes characters first, NFC. We do not,
# so that decoding gives back every text: the ids of text that is not NFC are not the same there.)
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to ids and back.

    Args:
        backend: the library's tokenizer.
        settings: the content of tokenizer_config.json, also a chat template that the folder keeps in a file of its own.
        name_or_path: where it comes from, for error messages.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any], name_or_path: str = "this tokenizer") -> None:
        self.backend = backend
        self.settings = settings
        self.name_or_path = name_or_path
        # User text that spells "<|im_end|>" is text. Special ids are put in by those who mean them.
        backend.encode_special_tokens = True

    def __reduce__(self) -> tuple[Any, ...]:
        # Between processes the backend forgets encode_special_tokens, and a compiled template cannot travel at all.
        return type(self), (self.backend, self.settings, self.name_or_path)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer files of a model folder; an adapter folder without any has its base model's.

        Raises:
            ValueError: a file is missing or damaged; the message names it.
        """
        if not (Path(folder) / "tokenizer.json").is_file():
            folder = folder_with_file(folder, "tokenizer.json")
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            there = "has no tokenizer.json" if Path(folder).is_dir() else "is not there"
            raise ValueError(f"{folder} is no tokenizer folder: it {there}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare class
            raise ValueError(f"{file}: {error}") from error
        config = Path(folder) / "tokenizer_config.json"
        settings = read_json(config) if config.is_file() else {}
        return cls(backend, settings | template_files(Path(folder)), str(folder))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> Tokenizer:
        """A byte-level BPE (as in GPT-2 and Qwen2) learned from texts.

        Args:
            texts: read once.
            vocab_size: entries wanted, the 256 bytes and the special tokens among them; small texts may give fewer.
            show_progress: the library's progress bars.

        Raises:
            ValueError: fewer entries than the bytes and special tokens need.
        """
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and the special tokens need {least}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=show_progress,
        )
        backend.train_from_iterator(texts, trainer)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHATML,
        }
        return cls(backend, settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which holds the chat template, also the default one.

        transformers' AutoTokenizer reads them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        template = self.settings.get("chat_template") or default_for(self)
        write_json(folder / "tokenizer_config.json", self.settings | ({"chat_template": template} if template else {}))

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special token is added, and none is recognised in it. Lone surrogates become U+FFFD."""
        return encode_text(self.backend, replace_surrogates(text))

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a text that a model is to continue: behind the begin-of-text token, where the folder puts one."""
        return self.prefix_ids + self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts, on all cores."""
        encodings = self.backend.encode_batch_fast([replace_surrogates(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token's exact spelling, or None."""
        return self.backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: a model needs at least as many rows."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, or None where the folder names none."""
        return self._id_of_setting("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, or None."""
        return self._id_of_setting("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills a batch, or None."""
        return self._id_of_setting("pad_token")

    @cached_property
    def prefix_ids(self) -> list[int]:
        """What the folder's own rules put before a text: the begin-of-text token, or nothing."""
        added = self.backend.encode("", add_special_tokens=True).ids
        return added if added and added == [self.bos_token_id] else []

    def _id_of_setting(self, name: str) -> int | None:
        token = content_of(self.settings.get(name))
        return None if token is None else self.token_to_id(token)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The folder's chat template, or ChatML.

        Raises:
            ValueError: it is no valid Jinja; there is none, and the special tokens of ChatML are missing.
        """
        return ChatTemplate(self)

    @cached_property
    def end_of_turn_ids(self) -> list[int]:
        """What ends an answer in the chat template: one id, or none where no special token does, or there is no template."""
        try:
            return [self.chat_template.end_of_turn_id]
        except ValueError:  # then it is the end-of-text token alone
            return []

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
    ) -> list[int] | str:
        """A conversation as ids, or as text where ``tokenize`` is off; see ChatTemplate.

        Raises:
            ValueError: the template cannot render it.
        """
        apply = self.chat_template.apply if tokenize else self.chat_template.render
        return apply(messages, tools, add_generation_prompt)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes each id stands for, empty for special tokens. Their concatenation is the text."""
        table = [b""] * self.vocab_size
        to_bytes = _bytes_of_byte_level if _is_byte_level(self.backend) else _bytes_of_sentencepiece
        added = self.backend.get_added_tokens_decoder()
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            if index not in self.special_ids:
                table[index] = token.encode() if index in added else to_bytes(token)
        return table


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    state = json.loads(backend.to_str())
    return '"ByteLevel"' in json.dumps([state.get("decoder"), state.get("pre_tokenizer")])


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _bytes_of_byte_level(token: str) -> bytes:
    return bytes(_ALPHABET[character] for character in token)


def _bytes_of_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # a byte the vocabulary has no piece for
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
