"""The chat template of folders that do not bring one: ChatML, with tools in the syntax of Qwen2.

It is an ordinary template: it is saved to tokenizer_config.json and works in transformers and vLLM. It adds no system prompt
of its own. Calls are JSON between <tool_call> and </tool_call> in the assistant's turn, results are between <tool_response> and
</tool_response> in a user turn, and consecutive results share one turn.
"""

# The special tokens that the template writes; a tokenizer without them cannot use it.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

CHATML = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- '# Tools\n\nThese functions can be called:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\n\nA call is one JSON object between tags:\n<tool_call>\n' }}
    {{- '{"name": <name of the function>, "arguments": <object of its arguments>}\n</tool_call><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- '\n' if message.content or not loop.first }}
            {{- '<tool_call>\n{"name": ' + (function.name | tojson) }}
            {{- ', "arguments": ' + (function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- elif message.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role != 'system' %}
        {{- raise_exception("no role '" + message.role + "': there are system, user, assistant and tool") }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}
""".strip()


def chatml_ending_with(end: str) -> str:
    """ChatML for a tokenizer that lacks its special tokens: turns end with another token, and <|im_start|> is plain text.

    No embedding has to be added to a base model. A user cannot end a turn, because special tokens in user text are text.
    """
    return CHATML.replace(CHATML_TOKENS[1], end.replace("\\", "\\\\").replace("'", "\\'"))
