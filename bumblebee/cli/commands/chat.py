"""``bumblebee chat``: chat with a model in the terminal, in this process or on a server."""

from __future__ import annotations

from collections.abc import Sequence

from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import ConfigFile, Parser, command_parser
from bumblebee.cli.sampling_options import add_sampling_options, explicit_sampling


def parser() -> Parser:
    """Return the options of the command."""
    from serve.terminal.chat import ChatOptions
    from serve.terminal.commands import UNSUPPORTED_SAMPLING

    options = command_parser("chat")
    options.add_argument("--config", action=ConfigFile, help="file of options; if repeated, later files override earlier ones")
    options.add_class_arguments(ChatOptions, None)
    add_sampling_options(options, leave_out=UNSUPPORTED_SAMPLING)
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command; without a terminal the exit code is 1 if a request failed."""
    options = parser()
    cfg = options.parse(words)
    with user_errors(cfg, options.words):
        from serve.terminal.chat import ChatOptions, open_chat

        chat_options = ChatOptions(**{name: cfg[name] for name in ChatOptions.__dataclass_fields__})
        session = open_chat(chat_options, explicit_sampling(cfg))
    raise SystemExit(not session.run() and not session.reader.interactive)
