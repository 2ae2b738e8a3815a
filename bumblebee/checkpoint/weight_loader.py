"""Loading the weights of a model folder into a model, strictly: no key may be missing or unexpected."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from bumblebee.checkpoint.adapters.folder import base_model_folder
from bumblebee.checkpoint.families import family_of
from bumblebee.checkpoint.hf_folder import load_config
from bumblebee.checkpoint.parameter_loader import Device, ParameterLoader
from bumblebee.checkpoint.quantize_weights import LoadQuantizer
from bumblebee.checkpoint.weight_files import weight_files
from bumblebee.checkpoint.weight_mapping import Rule, file_shape, slices_by_file_key, split_for
from bumblebee.checkpoint.weight_reader import read_tensors
from bumblebee.models.load_context import current_load_context


def load_weights(
    folder: str | Path, model: nn.Module, dtype: torch.dtype | None, device: Device, allow_pickle: bool = False
) -> None:
    """Load the weights of a supported architecture.

    Args:
        folder: the model folder.
        model: may be on the meta device; its parameters are replaced.
        dtype: dtype of the parameters; None keeps the file's.
        device: device of the parameters, or a function from a key of the model to its device.
        allow_pickle: see ``read_tensors``.

    Raises:
        ValueError: keys are missing or unexpected, or a shape differs; the message names them.
    """
    config = load_config(folder)
    family = family_of(config)

    def is_unused(key: str) -> bool:
        return key.endswith(family.unused_keys)

    load_mapped_weights(folder, model, dtype, device, family.rules(config), is_unused, allow_pickle)


def load_mapped_weights(
    folder: str | Path,
    model: nn.Module,
    dtype: torch.dtype | None,
    device: Device,
    rules: Iterable[Rule] = (),
    is_unused: Callable[[str], bool] = lambda key: False,
    allow_pickle: bool = False,
) -> None:
    """Load weights whose keys map to the model's by explicit rules.

    Args:
        folder: the model folder.
        model: see ``load_weights``.
        dtype: see ``load_weights``.
        device: see ``load_weights``.
        rules: how the file's tensors map to the model's.
        is_unused: whether a key of the file may be ignored.
        allow_pickle: see ``read_tensors``.

    Raises:
        ValueError: see ``load_weights``.
    """
    if current_load_context().shapes_only:
        weight_files(base_model_folder(folder), allow_pickle)  # raises if they are missing
        return
    scheme = current_load_context().quantize
    quantizer = None if scheme is None else LoadQuantizer(model, scheme)
    parameters = ParameterLoader(model, dtype, device, quantizer or (lambda key: False))
    missing, unexpected = slices_by_file_key(rules, parameters.shapes), []
    for key, tensor in read_tensors(folder, dtype, allow_pickle=allow_pickle):
        if slices := missing.pop(key, None):
            _check_shape(folder, key, tuple(tensor.shape), file_shape(slices))
            for target, part in zip(slices, split_for(slices, tensor), strict=True):
                parameters.load(target, part)
        elif key not in parameters.tied and not is_unused(key):
            unexpected.append(key)
    _check_keys(folder, sorted(missing), unexpected)
    parameters.finish()
    if quantizer is not None:
        quantizer.finish(folder)


def _check_shape(folder: str | Path, key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"{folder}: {key} has shape {list(shape)}, expected {list(expected)} from config.json")


def _check_keys(folder: str | Path, missing: list[str], unexpected: list[str]) -> None:
    problems = [
        f"{len(keys)} {problem} key{'s' * (len(keys) > 1)}: {', '.join(keys[:3])}"
        for problem, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if problems:
        raise ValueError(f"the weights in {folder} do not match the model: {'; '.join(problems)}")
