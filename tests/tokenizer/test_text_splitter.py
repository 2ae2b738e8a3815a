"""Long texts are encoded in pieces: the ids are those of the whole text, for every kind of tokenizer."""

from __future__ import annotations

import itertools
from random import Random

import pytest
import tokenizers
from helpers.chat_folders import CORPUS, byte_level, sentencepiece
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from bumblebee import Tokenizer
from bumblebee.tokenizer import text_splitter
from bumblebee.tokenizer.regex_pairs import RegexPairs, UnsupportedPatternError
from bumblebee.tokenizer.text_splitter import GPT2_PATTERN, WORDS_PATTERN, TextSplitter
from bumblebee.tokenizer.vocab_merges import SPLIT_PATTERN

LLAMA3 = SPLIT_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
]
PATTERNS = [SPLIT_PATTERN, LLAMA3, O200K, GPT2_PATTERN, WORDS_PATTERN, *DEEPSEEK, r"a(?:bc?|c)+?\.| (?=[b])|[^ ]"]
# Words, blanks and line feeds in runs, CJK, marks that combine with what precedes them, apostrophes, digits, added tokens.
PARTS = [
    *(
        "bumblebee",
        "isn't",
        "It's",
        "à côté",
        "A",
        "ss",
        "ﬁ",
        "ŉ",
        "12",
        "3",
        "花から花へ",
        "他们",
        "。",
        "，",
        "、",
        "각",
        "한국어",
    ),
    *(
        " ",
        "  ",
        " " * 40,
        "\n",
        "\n" * 40,
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u0301",
        "\u3099",
        "\u200d",
        "▁",
        "🐝",
        "!",
        "/",
    ),
    *("the\u0301 ", "क्ष ", "सा ", "قال ", "<|im_end|>", "user assistant", "<b>", "x ", "y\n", "ab ab ab ab "),
]


def split_by(*patterns: str, normalizer: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    backend = byte_level()
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def with_added_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.add_tokens([AddedToken("  ", normalized=False), AddedToken("user assistant"), AddedToken("<b>", lstrip=True)])
    return backend


def gpt2(add_prefix_space: bool) -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return backend


def unigram() -> tokenizers.Tokenizer:
    """As T5 and XLM-RoBERTa."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"unk_token": "<unk>", "special_tokens": ["<unk>"], "show_progress": False}
    backend.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=60, **options))
    return backend


def wordpiece() -> tokenizers.Tokenizer:
    """As BERT."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


SPLIT = {
    "qwen": lambda: split_by(SPLIT_PATTERN, normalizer=normalizers.NFC()),
    "nfkd": lambda: split_by(SPLIT_PATTERN, normalizer=normalizers.NFKD()),
    "llama3": lambda: split_by(LLAMA3),
    "o200k": lambda: split_by(O200K),
    "deepseek": lambda: split_by(*DEEPSEEK),
    "added tokens": lambda: with_added_tokens(split_by(SPLIT_PATTERN)),
    "gpt2": lambda: gpt2(False),
    "prefix space": lambda: gpt2(True),
    "metaspace first": lambda: sentencepiece("first"),
    "metaspace always": lambda: with_added_tokens(sentencepiece("always")),
    "prepend": lambda: sentencepiece("normalizer"),
    "unigram": unigram,
    "wordpiece": wordpiece,
}


@pytest.mark.parametrize("kind", SPLIT)
def test_pieces_have_the_ids_of_the_whole_text(kind):
    tok, random = Tokenizer(SPLIT[kind](), {}), Random(0)
    splitter, count = tok._text_splitter, 0
    for _ in range(40):
        text = "".join(random.choices(PARTS, k=random.randrange(120)))
        pieces = list(splitter.split(text, random.randrange(1, 12)))
        assert "".join(pieces) == text
        backends = [tok.backend, *itertools.repeat(splitter.continuation, len(pieces) - 1)]
        encoded = [b.encode(piece, add_special_tokens=False).ids for b, piece in zip(backends, pieces, strict=True)]
        assert [*itertools.chain(*encoded)] == tok.backend.encode(text, add_special_tokens=False).ids
        count += len(pieces)
    assert count > 100


@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_are_those_of_both_sides_where_none_can_join_them(pattern):
    pairs, split = RegexPairs(pattern), pre_tokenizers.Split(Regex(pattern), "isolated")

    random, count = Random(0), 0
    for parts in [PARTS] * 15 + ["ab c.\n1"] * 15:
        text = "".join(random.choices(parts, k=random.randrange(30)))
        whole = [span for _, span in split.pre_tokenize_str(text)]
        for at in range(1, len(text)):
            x, y = text[at - 1], text[at]
            if len(x.casefold()) > 1 or pairs.join(x, y) or not (pairs.covers(x) or pairs.covers(y)):
                continue
            left, right = (split.pre_tokenize_str(side) for side in (text[:at], text[at:]))
            assert whole == [*(span for _, span in left), *((at + begin, at + end) for _, (begin, end) in right)]
            count += 1
    assert count > 20


@pytest.mark.parametrize(
    "pattern", [r"a*", r"(?<=a)b", r"\bword", r"^a", r"a++", r"(?!b)a", r"(a)\1", r"a{2,3}", "a)", "(?i:[ß])"]
)
def test_other_patterns_are_not_read(pattern):
    with pytest.raises(UnsupportedPatternError):
        RegexPairs(pattern)


def reordering() -> tokenizers.Tokenizer:
    return split_by(r"\b\w+|\s+", normalizer=normalizers.NFC())


def with_word_tokens() -> tokenizers.Tokenizer:
    backend = split_by(SPLIT_PATTERN)
    backend.add_tokens([AddedToken("bee", single_word=True)])
    return backend


def merging_words() -> tokenizers.Tokenizer:
    """A BPE of whole texts with tokens of several words."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.train_from_iterator(["one two one two"], trainers.BpeTrainer(vocab_size=30, show_progress=False))
    return backend


@pytest.mark.parametrize("make", [reordering, with_word_tokens, merging_words])
def test_tokenizer_that_looks_across_words_gets_the_whole_text(make):
    text = "one two " * 50
    assert list(TextSplitter(Tokenizer(make(), {}).backend).split(text, 10)) == [text]


@pytest.mark.parametrize("text", ["a" * 99, " " * 99, "\n" * 99, "e\u0301" * 50, "1 2 3 " * 20])
def test_text_without_a_boundary_is_whole(text):
    assert list(TextSplitter(split_by(SPLIT_PATTERN)).split(text, 10)) == [text]


def test_long_texts_have_the_ids_of_encode_in_a_batch(monkeypatch):
    monkeypatch.setattr(text_splitter.TextSplitter.split, "__defaults__", (50,))
    monkeypatch.setattr("bumblebee.tokenizer.tokenizer.GROUP", 200)
    for backend in (byte_level(), sentencepiece("normalizer")):
        tok = Tokenizer(backend, {})
        texts = ["It flies over flowers. " * 30, "", "short", "二 花から花へ。その花" * 20, "a"]
        assert len(list(tok._text_splitter.split(texts[0]))) > 5
        assert [ids.tolist() for ids in tok.encode_batch(texts)] == [tok.encode(text) for text in texts]
    assert tok.encode_batch([]) == []


def test_truncation_and_padding_of_the_file_are_ignored():
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    tok, expected = Tokenizer(backend, {}), byte_level()
    assert tok.encode("It flies, it flies.") == expected.encode("It flies, it flies.").ids
    assert [len(ids) for ids in tok.encode_batch(["It flies.", "a"])] == [len(tok.encode("It flies.")), 1]
