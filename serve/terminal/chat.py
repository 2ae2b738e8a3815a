"""Chat: a person's inputs, a partner's answers, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from serve.terminal import commands, interrupts
from serve.terminal.answer import Answer
from serve.terminal.conversation import Conversation
from serve.terminal.keyboard import Keyboard, Lines
from serve.terminal.options import ChatOptions
from serve.terminal.partner import Partner, Piece, Refusal
from serve.terminal.screen import Screen

ENDS = {  # why an answer ended -> what is said about it
    "length": "cut off: the answer has all the tokens that it may have; /set max_new_tokens allows more, /reset makes room",
    "timeout": "cut off: the server gives an answer no more time",
    "content_filter": "cut off by the server's filter",
}


class Chat:
    """A conversation with a partner.

    Args:
        partner: who answers.
        conversation: what has been said.
        sampling: fields of SamplingParams; those left out are the partner's to choose.
        keyboard: where inputs come from.
        screen: where answers go.
    """

    def __init__(
        self, partner: Partner, conversation: Conversation, sampling: dict[str, Any], keyboard: Keyboard, screen: Screen
    ) -> None:
        self.partner, self.conversation, self.sampling = partner, conversation, sampling
        self.keyboard, self.screen = keyboard, screen
        self.over = False
        self.unanswered: str | None = None  # the last question, while it has no place in the conversation

    def run(self) -> bool:
        """Talk until the inputs end. Returns whether every question was answered."""
        if self.keyboard.interactive:
            self.screen.note(f"{self.partner.describe()}\nAlt-Enter begins a new line, Ctrl-C stops an answer; /help, /quit")
        answered = True
        while not self.over:
            try:
                answered = self._take(self.keyboard.read()) and answered
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self.keyboard.interactive:
                    raise
                self.screen.note("/quit or Ctrl-D leaves")
        return answered

    def _take(self, text: str) -> bool:
        """Do what an input says. Returns whether it could be done."""
        if text.startswith("/"):
            return commands.run(self, text)
        return not text.strip() or self.ask(text)

    def ask(self, question: str) -> bool:
        """Ask, and print the answer. An answer that was stopped is kept as far as it has come; a question without any is not.

        Returns:
            Whether there was an answer and nothing broke it off.
        """
        answer, refused = Answer(), None
        try:
            with (
                interrupts.noted() as interrupted,
                closing(self.partner.reply(self.conversation.asked(question), self.sampling)) as pieces,
            ):
                self._print(pieces, answer, interrupted)
        except KeyboardInterrupt:
            if not self.keyboard.interactive:
                raise
            answer.finish_reason = "stopped by Ctrl-C"
        except Refusal as refusal:
            refused = str(refusal)
        if answer.text:
            self.screen.piece("\n")
        self._keep(question, answer)
        self._comment(answer, refused)
        return refused is None

    def _print(self, pieces: Iterable[Piece], answer: Answer, interrupted: Callable[[], bool]) -> None:
        """Print the pieces as they come.

        Raises:
            KeyboardInterrupt: Ctrl-C; the pieces so far are all there will be.
        """
        for piece in pieces:
            answer.add(piece)
            self.screen.piece(piece.text)
            if interrupted():
                raise KeyboardInterrupt

    def _keep(self, question: str, answer: Answer) -> None:
        self.unanswered = None if answer.text else question
        if answer.text:
            self.conversation.turns.append((question, answer.text))

    def _comment(self, answer: Answer, refused: str | None) -> None:
        """What is to say about an answer."""
        if refused is not None:
            self.screen.error(refused)
        elif not answer.text:
            self.screen.note("no answer: the question is not kept; /retry asks it again")
        if self.keyboard.interactive and answer.text:
            said = (answer.speed(), ENDS.get(answer.finish_reason or "", answer.finish_reason))
            self.screen.note(" · ".join(part for part in said if part and part != "stop"))


def begin(options: ChatOptions, sampling: dict[str, Any]) -> Chat:
    """A chat with a model folder or a server.

    Raises:
        ValueError: no model there, or a device, dtype or setting that cannot be used.
    """
    screen, interactive = Screen(), sys.stdin.isatty() and sys.stdout.isatty()
    partner = partner_of(options)
    if partner.raw and options.raw is None:
        screen.note(f"{options.model} has no chat template: each input is continued as it stands (--raw false: ask in ChatML)")
    if partner.raw and options.system_prompt is not None:
        raise ValueError("system_prompt: there is no place for one where text is continued: say --system_prompt null")
    keyboard: Keyboard = Lines()
    if interactive:
        from serve.terminal.editor import Editor

        keyboard = Editor({name: command.words for name, command in commands.COMMANDS.items()}, commands.OF_FILES)
    return Chat(partner, Conversation(options.system_prompt, options.enable_history), sampling, keyboard, screen)


def partner_of(options: ChatOptions) -> Partner:
    """The model that the options name. Whatever a server does not need is not loaded for it."""
    if options.url is not None:
        from serve.terminal.remote import RemoteModel

        return RemoteModel(options.url, options.name, options.api_key, bool(options.raw))
    from bumblebee.inference.generator import Generator
    from serve.terminal.local import LocalModel

    assert options.model is not None
    generator = Generator.from_pretrained(
        options.model, options.device, options.dtype, options.device_map, options.trust_remote_code
    )
    return LocalModel(generator, options.model, options.raw)
