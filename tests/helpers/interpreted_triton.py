"""Triton kernels on the CPU: their modules imported with Triton's interpreter."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


@contextmanager
def interpreted(name: str) -> Iterator[ModuleType]:
    """Import a module of kernels with ``TRITON_INTERPRET=1``.

    The variable is read where a kernel is defined, Triton's own functions included, so Triton is imported anew for it, all but
    its extension module. Whoever has imported it before keeps the former one.
    """
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in list(sys.modules):
            if module == name or module.partition(".")[0] == "triton" and not module.startswith("triton._C"):
                patch.delitem(sys.modules, module)
        multiply_bf16(patch)
        yield importlib.import_module(name)
        for module in [module for module in sys.modules if module == name or module.partition(".")[0] == "triton"]:
            if not module.startswith("triton._C"):
                sys.modules.pop(module)


def multiply_bf16(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply matrices in bf16, whose bits it would otherwise multiply as integers (Triton 3.7)."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    multiply, cast = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl

    def create_dot(builder, a, b, *args):
        a, b = (cast(builder, x, language.float32) if x.dtype.scalar == language.bfloat16 else x for x in (a, b))
        return multiply(builder, a, b, *args)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
