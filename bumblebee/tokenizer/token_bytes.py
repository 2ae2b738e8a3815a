"""The UTF-8 bytes that each token of a vocabulary stands for."""

from __future__ import annotations

import json

import tokenizers


def token_bytes_table(backend: tokenizers.Tokenizer, size: int) -> list[bytes]:
    """The bytes of each id from 0 to ``size - 1``; empty for special and unused ids.

    Supports byte-level BPE (GPT-2, Qwen2, Llama 3) and SentencePiece vocabularies with byte fallback (Llama 2).
    """
    table = [b""] * size
    to_bytes = _byte_level_bytes if _is_byte_level(backend) else _sentencepiece_bytes
    added = backend.get_added_tokens_decoder()
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index not in added:
            table[index] = to_bytes(token)
        elif not added[index].special:
            table[index] = token.encode()
    return table


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    state = json.loads(backend.to_str())
    return '"ByteLevel"' in json.dumps([state.get("decoder"), state.get("pre_tokenizer")])


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's ``bytes_to_unicode``, inverted: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(unprintable)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_ALPHABET[character] for character in token)


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # byte fallback
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
