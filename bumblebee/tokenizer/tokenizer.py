"""The tokenizer of a model folder: text to ids and back, and training of a new one.

The ``tokenizers`` library does the work. This module reads and writes the files of the folder (tokenizer.json and
tokenizer_config.json) and makes sure that text that spells a special token is encoded as text. Conversations are tokenized in
chat_template.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from bumblebee.checkpoint.adapters.folder import folder_with_file
from bumblebee.tokenizer.assistant_mask import Message
from bumblebee.tokenizer.chat_template import ChatTemplate, Tool
from bumblebee.tokenizer.chatml import CHATML
from bumblebee.tokenizer.special_token_guard import replace_surrogates
from bumblebee.tokenizer.template_sources import (
    default_template,
    named_template,
    special_tokens,
    template_from_files,
    token_content,
)
from bumblebee.tokenizer.template_tokenizer import TemplateTokenizer, encode_text
from bumblebee.tokenizer.text_splitter import TextSplitter
from bumblebee.tokenizer.token_bytes import token_bytes_table
from bumblebee.tokenizer.vocab_merges import END_OF_TEXT, SPLIT_PATTERN, VOCAB, has_vocab_and_merges, read_vocab_and_merges
from bumblebee.utils.json_files import read_json, write_json
from bumblebee.utils.text_files import write_text

FILE = "tokenizer.json"
# Special tokens of a new tokenizer: the end of a document, and ChatML's, so that chat training needs no new embedding rows.
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
# A new tokenizer splits text with Qwen2's pattern, because transformers 5 takes only the vocabulary and merges from the
# tokenizer.json next to a Qwen2 config.json and splits by itself. (Qwen2 also normalizes to NFC first. We do not, so that
# decoding restores every text; the ids of text that is not in NFC therefore differ.)


def tokenizer_folder_of(folder: str | Path) -> Path:
    """The folder itself, or for an adapter folder without tokenizer files the nearest one below it that has some."""
    with_json = folder_with_file(folder, FILE)
    return with_json if (with_json / FILE).is_file() else folder_with_file(folder, VOCAB)


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: {error}") from error


def _missing_files(folder: Path) -> str:
    if not folder.is_dir():
        return f"folder not found: {folder}"
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder} is not a tokenizer folder: it has only tokenizer.model, of SentencePiece; write a {FILE} with"
            f" transformers: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    return f"{folder} is not a tokenizer folder: it has no {FILE}"


Piece = tuple[int, bool, str]  # index of the text, whether it begins with this piece, the piece
GROUP = 1 << 20  # characters of the pieces that are encoded at once


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces with at least GROUP characters together, except for the last ones."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[2])
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


class Tokenizer:
    """Text to ids and back.

    Args:
        backend: the library's tokenizer.
        settings: the content of tokenizer_config.json, including a chat template that the folder keeps in a file of its own.
        name_or_path: the folder, for error messages.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any], name_or_path: str = "this tokenizer") -> None:
        self.backend = backend
        self.settings = settings
        self.name_or_path = name_or_path
        # User text that spells "<|im_end|>" is text. Callers that need a special token insert its id.
        backend.encode_special_tokens = True
        # A tokenizer.json may hold the settings of an earlier training, which would cut or pad every text.
        backend.no_truncation()
        backend.no_padding()

    def __reduce__(self) -> tuple[object, ...]:
        # Pickling loses the backend's encode_special_tokens, and compiled templates cannot be pickled.
        return type(self), (self.backend, self.settings, self.name_or_path)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer files of a model folder; an adapter folder without any uses its base model's.

        A folder has tokenizer.json, or vocab.json and merges.txt, which are converted.

        Raises:
            ValueError: a file is missing or damaged; the message names it.
        """
        folder = tokenizer_folder_of(folder)
        config = folder / "tokenizer_config.json"
        settings = read_json(config) if config.is_file() else {}
        if (folder / FILE).is_file():
            backend = _read_backend(folder / FILE)
        elif has_vocab_and_merges(folder):
            backend, settings = read_vocab_and_merges(folder, settings)
        else:
            raise ValueError(_missing_files(folder))
        return cls(backend, settings | template_from_files(folder), str(folder))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> Tokenizer:
        """Train a byte-level BPE, as in GPT-2 and Qwen2.

        Args:
            texts: iterated once.
            vocab_size: number of tokens, including the 256 bytes and the special tokens; small texts may yield fewer.
            show_progress: show the library's progress bars.

        Raises:
            ValueError: ``vocab_size`` is smaller than the bytes and special tokens require.
        """
        minimum = 256 + len(SPECIAL_TOKENS)
        if vocab_size < minimum:
            raise ValueError(f"vocab_size must be at least {minimum} (256 bytes and the special tokens), got {vocab_size}")
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

    def with_chat_template(self, name: str | None) -> Tokenizer:
        """This tokenizer with another chat template, which is saved with it.

        Args:
            name: path of a Jinja file, or "chatml"; None keeps the folder's own.

        Raises:
            ValueError: there is no such file, or the tokenizer has no token to end ChatML's turns with.
        """
        if name is None:
            return self
        source = named_template(name, self.backend, self.settings)
        if name == "chatml" and self.prefix_ids:  # the base model has never seen a text without begin-of-text token
            source = "{{- bos_token }}\n" + source
        return Tokenizer(self.backend, self.settings | {"chat_template": source}, self.name_or_path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, including the chat template (also if it is the default one).

        transformers' AutoTokenizer can load the folder.

        Raises:
            OSError: a file cannot be written; names the file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))  # its own save() does not raise an OSError
        template = self.settings.get("chat_template") or default_template(self.backend)
        write_json(folder / "tokenizer_config.json", self.settings | ({"chat_template": template} if template else {}))

    def encode(self, text: str) -> list[int]:
        """Encode a text without adding or recognizing special tokens. Lone surrogates become U+FFFD."""
        return encode_text(self.backend, replace_surrogates(text))

    def prompt_ids(self, text: str, parse_special: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Encode a text to be continued by a model.

        Args:
            text: the text.
            parse_special: encode special tokens that are spelled in the text, such as "<|im_end|>", as their ids.
            add_special_tokens: put ``prefix_ids`` first, unless the text itself begins with them.
        """
        ids = self._template_tokenizer.encode([(text, True)])[0] if parse_special else self.encode(text)
        prefix = self.prefix_ids if add_special_tokens else []
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` each text, on all cores: uint32 arrays.

        Long texts are encoded in pieces where the ids are provably the same (text_splitter.py), which bounds the memory.
        """
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups(self._pieces(texts)):
            for is_first in (True, False):
                own = [(index, piece) for index, first, piece in group if first is is_first]
                backend = self.backend if is_first else self._text_splitter.continuation
                encodings = backend.encode_batch_fast([piece for _, piece in own], add_special_tokens=False) if own else []
                for (index, _), encoding in zip(own, encodings, strict=True):
                    ids[index].append(np.array(encoding.ids, np.uint32))
        return [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in ids]

    def _pieces(self, texts: Sequence[str]) -> Iterator[Piece]:
        for index, text in enumerate(texts):
            for number, piece in enumerate(self._text_splitter.split(replace_surrogates(text))):
                yield index, number == 0, piece

    @cached_property
    def _text_splitter(self) -> TextSplitter:
        return TextSplitter(self.backend)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token of the vocabulary, or None."""
        return self.backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """The largest id plus one: the number of embedding rows that a model needs at least."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-text token, or None if tokenizer_config.json does not name one."""
        return self._id_of_setting("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the begin-of-text token, or None."""
        return self._id_of_setting("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, or None."""
        return self._id_of_setting("pad_token")

    @cached_property
    def _template_tokenizer(self) -> TemplateTokenizer:
        return TemplateTokenizer(self.backend)

    @cached_property
    def prefix_ids(self) -> list[int]:
        """The ids that the folder's post-processor puts before a text: the begin-of-text token, or nothing."""
        added = self.backend.encode("", add_special_tokens=True).ids
        return added if added and added == [self.bos_token_id] else []

    def _id_of_setting(self, name: str) -> int | None:
        token = token_content(self.settings.get(name))
        return None if token is None else self.token_to_id(token)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The folder's chat template, or ChatML.

        Raises:
            ValueError: the template is not valid Jinja; or there is none and the special tokens of ChatML are missing.
        """
        template = self.settings.get("chat_template")
        return ChatTemplate(self.backend, template, special_tokens(self.settings), self.name_or_path)

    @cached_property
    def end_of_turn_ids(self) -> list[int]:
        """The ids that end an answer in the chat template; empty without a template or if no special token ends a turn."""
        try:
            return self.chat_template.end_of_turn_ids
        except ValueError:  # only the end-of-text token ends an answer then
            return []

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
    ) -> list[int] | str:
        """Ids of a conversation, or its text if ``tokenize`` is False; see :class:`ChatTemplate`.

        Raises:
            ValueError: the template cannot render it.
        """
        apply = self.chat_template.apply if tokenize else self.chat_template.render
        return apply(messages, tools, add_generation_prompt)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens: "bos_token", "eos_token", "pad_token" and so on, as far as the folder has them."""
        return special_tokens(self.settings)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which do not stand for text."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes of each id, empty for special tokens. The bytes of a text are those of its ids, concatenated."""
        return token_bytes_table(self.backend, self.vocab_size)
