"""Chat templates with tool calls in the formats of several model families, and the special tokens they need."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken

from bumblebee.tokenizer.chatml import CHATML
from bumblebee.tokenizer.tokenizer import Tokenizer
from helpers import chat_folders

TOOLS = "{%- if tools %}<|start|>tools{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|eot|>{% endif %}"

# One call, an object without markers.
LLAMA = (
    TOOLS
    + """
{%- for message in messages %}
    {{- '<|start|>' + message.role + '<|head|>\n\n' }}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{{- '<|start|>assistant<|head|>\n\n' if add_generation_prompt }}
"""
)

# A list of objects after a special token; the objects contain the ids, which have nine characters.
MISTRAL = """
{{- bos_token }}
{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- elif message.tool_calls %}
        {{- message.content + '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{% endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# Each name between two special tokens, then the arguments.
HEADS = (
    MISTRAL.replace("'[TOOL_CALLS] ['", "''")
    .replace("']' + eos_token", "eos_token")
    .replace(
        """{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last }}""",
        "{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}",
    )
)

# The name follows the role; each call is a separate message.
GLM = (
    TOOLS
    + """
{%- for message in messages %}
    {{- '<|start|>' + message.role + (message.metadata or '') + '\n' + message.content }}
{%- endfor %}
{{- '<|start|>assistant' if add_generation_prompt }}
"""
)

# Markers around all calls and around each one, arguments in a code block.
DEEPSEEK = (
    TOOLS
    + """
{%- for message in messages %}
    {{- '<|start|>' + message.role + '<|head|>' + message.content }}
    {%- if message.tool_calls %}
        {{- '[CALLS]' }}
        {%- for call in message.tool_calls %}
            {{- '[CALL]function[SEP]' + call.function.name + '\n```json\n' + call.function.arguments | tojson }}
            {{- '\n```[/CALL]' }}{{- '\n' if not loop.last }}
        {%- endfor %}
        {{- '[/CALLS]' }}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{{- '<|start|>assistant<|head|>' if add_generation_prompt }}
"""
)

# A reasoning block, possibly empty, in the answers after the last question.
THINKING = """
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}<|im_start|>system{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {{- '<think>\n\n</think>\n\n' if message.role == 'assistant' and loop.index0 > ns.last }}
    {{- message.content }}
    {%- for call in message.tool_calls %}
        {{- '\n' if message.content or not loop.first }}
        {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}
"""

TEMPLATES = {
    "chatml": CHATML, "qwen": chat_folders.QWEN, "llama": LLAMA, "mistral": MISTRAL, "heads": HEADS, "glm": GLM,
    "deepseek": DEEPSEEK, "thinking": THINKING,
}  # fmt: skip
ONE_CALL = ("llama", "glm")  # at most one call per answer
NO_TEXT = ("llama", "glm")  # no text next to a call
MARKERS = ["[TOOL_CALLS]", "[ARGS]", "[CALLS]", "[CALL]", "[SEP]", "[/CALL]", "[/CALLS]", "[AVAILABLE_TOOLS]"]


def tokenizer_of(name: str, folder: Path) -> Tokenizer:
    """Write a tokenizer folder with one of these templates, and load it."""
    backend = chat_folders.byte_level()
    backend.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in MARKERS])
    return Tokenizer.from_pretrained(chat_folders.write(folder, backend, TEMPLATES[name]))
