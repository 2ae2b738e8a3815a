"""``bumblebee serve``: serve a model with an OpenAI-compatible API and a chat page."""

from __future__ import annotations

from collections.abc import Sequence

from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import ConfigFile, Parser, command_parser
from bumblebee.cli.sampling_options import add_sampling_options, explicit_sampling


def parser() -> Parser:
    """Return the options of the command."""
    from serve.serve_options import ServeOptions

    options = command_parser("serve")
    options.add_argument("--config", action=ConfigFile, help="file of options; if repeated, later files override earlier ones")
    options.add_class_arguments(ServeOptions, None, skip={"sampling"})
    add_sampling_options(options, leave_out=("logprobs", "seed", "spelled_ids"))
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    options = parser()
    cfg = options.parse(words)
    with user_errors(cfg, options.words):
        from serve.serve_options import ServeOptions
        from serve.server import Server

        values = {name: cfg[name] for name in ServeOptions.__dataclass_fields__ if name in cfg}
        Server(ServeOptions(**values, sampling=explicit_sampling(cfg))).run()
