"""Chat templates in the style of well-known models, and tiny tokenizers for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from bumblebee.tokenizer.tokenizer import SPLIT_PATTERN

CORPUS = ["The bumblebee isn't afraid of 12 flowers.\n\n  user assistant system It flies; à côté, 花から花へ 🐝! [INST]"] * 30
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|head|>", "<|eot|>", "<s>", "</s>"]

# Llama 3 style: begin-of-text token, headers, trimmed contents.
LLAMA = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|head|>\n\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|head|>\n\n' }}{% endif %}
"""

# Mistral style: no system prompt, no generation prompt, strict order.
MISTRAL = """
{{ bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# Qwen style: default system prompt, tools as JSON, `continue` and `set`, special tokens spelled literally.
QWEN = """
{%- if messages[0].role == 'system' %}{% set first = messages[0].content %}{% else %}{% set first = 'Be good.' %}{% endif %}
<|im_start|>system
{{ first }}
{%- if tools %}

# Tools
{%- for tool in tools %}

{{ tool | tojson }}
{%- endfor %}
{%- endif -%}
<|im_end|>
{% for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if message.content is string %}{{ message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>' }}{{ call.function | tojson(indent=1) }}{{ '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

# Reasoning model style: strips the reasoning from all answers before the last question.
THINKING = """
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

# With {% generation %} tags.
TAGGED = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

# GLM-4 style: roles are special tokens, and nothing ends a turn.
GLM = """[gMASK]<sop>
{%- for message in messages %}
    {{- '<|' + message.role + '|>' + (message.metadata or '') + '\n' + message.content }}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}
"""
GLM_TOKENS = ["[gMASK]", "<sop>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


def byte_level(**flags: bool) -> tokenizers.Tokenizer:
    """A byte-level BPE as in GPT-2; flags are those of its special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    blanks = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, blanks])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False, **flags) for token in SPECIAL])
    return backend


def sentencepiece(prefix: str) -> tokenizers.Tokenizer:
    """As Llama 2: \u2581 for a space and before a text; ``prefix`` is "first" or "always" (Metaspace), or "normalizer"."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = [piece for piece in learned["vocab"] if piece.replace("\u2581", "").isascii()]
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: index for index, piece in enumerate([*first, *pieces])}
    merges = [(a, b) for a, b in learned["merges"] if {a, b, a + b} <= set(vocabulary)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend


def write(folder: Path, backend: tokenizers.Tokenizer, template: Any) -> Path:
    """Write a tokenizer folder that transformers can load."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
