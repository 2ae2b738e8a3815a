"""Model check: a small model with the options of the recipe's against formulas in fp64, and against transformers.

The formulas (``reference_model``) cover every option. transformers is a second reference where it is installed and has the
architecture; it reads the model from a folder that Bumblebee writes. Always in fp32, with the task that trains: logits of rows
and of packed documents, the loss, the router losses, and the gradients of both.

A subclass of Bumblebee computes something else. Of it only two properties are checked: packed documents are independent, and no
token sees the future.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bumblebee.checkpoint.families import OWN, family_of
from bumblebee.checkpoint.weight_mapping import to_file_tensors
from bumblebee.config import BumblebeeConfig
from bumblebee.datamodule import Batch
from bumblebee.distributed import process_group
from bumblebee.model import Bumblebee
from bumblebee.models.huggingface import load_unmodified
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.verify import reference_model
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.checks.tolerances import worst_vector_error
from bumblebee.verify.context import Context
from bumblebee.verify.small_model import FAMILY_CONFIGS, LENGTH, draw_weights, shrink

# fp32 stays below 6e-6 (outputs) and 2e-5 (gradients) over all families. A wrong option gives 1e-3 and more.
OUTPUT_BOUND, GRADIENT_BOUND = 3e-5, 1e-4
DOCUMENTS = ((20, 1, 23, 12), (9, 22, 23, 10))  # lengths in each packed row; the rest is padding
MIN_MARGIN = 1e-5  # between a selected and a rejected expert: rounding must not select another


class Case(NamedTuple):
    """A small model, and the rows that it is compared on."""

    model: Bumblebee
    config: BumblebeeConfig
    weights: dict[str, Tensor]  # of the reference: fp64, requiring gradients
    batch: Batch  # packed documents
    input_ids: Tensor  # (B, T), also read as rows of a single document


def run(context: Context) -> CheckResult:
    """The worst case over the options of the recipe's model, or of all families without one."""
    subject = context.subject
    assert subject.model_class is not None
    if subject.model_class is not Bumblebee:
        assert subject.config is not None
        return _check_properties(context, subject.model_class, subject.config)
    configs = FAMILY_CONFIGS if subject.config is None else {"recipe": subject.config}
    errors: dict[str, float] = {}
    notes: list[str] = []
    for name, config in configs.items():
        found, note = _errors(context, name, shrink(config))
        notes.append(note)
        if failed := [what for what, error in found.items() if not error <= _bound(what)]:
            notes.append(f"{name}: {', '.join(failed)}")
        for what, error in found.items():
            errors[what] = max(error, errors.get(what, 0.0), key=lambda value: (value != value, value))
    measurements = tuple(Measurement(what, error, _bound(what)) for what, error in errors.items())
    return CheckResult(measurements, "; ".join(dict.fromkeys(note for note in notes if note)))


def _bound(what: str) -> float:
    if what.startswith("tensors"):
        return 0.0
    return GRADIENT_BOUND if "gradient" in what else OUTPUT_BOUND


def _errors(context: Context, name: str, config: BumblebeeConfig) -> tuple[dict[str, float], str]:
    """Errors of one model by measurement name, and a note."""
    model = Bumblebee(config, attention=context.fp32_attention).to(context.device)
    expected_shapes = reference_model.expected_shapes(config)
    shapes = {parameter: tuple(tensor.shape) for parameter, tensor in model.named_parameters()}
    if wrong := sorted(key for key, _ in shapes.items() ^ expected_shapes.items()):
        return {"tensors missing, unexpected or misshapen": float(len(set(wrong)))}, f"{name}: {wrong[0]}"
    case, packed, rows = _draw(model, config, context.device)
    errors = {"tensors missing, unexpected or misshapen": 0.0}
    with torch.no_grad():
        errors["logits"] = worst_vector_error(model(case.input_ids), rows.logits)
        errors["packed logits"] = worst_vector_error(model(case.input_ids, case.batch["position_ids"]), packed.logits)
    errors |= _training_errors(case, packed)
    theirs, note = _transformers_errors(context, name, case)
    return errors | theirs, note


def _draw(
    model: Bumblebee, config: BumblebeeConfig, device: torch.device
) -> tuple[Case, reference_model.Output, reference_model.Output]:
    """Draw weights and tokens until no expert is selected by a hair, and compute the reference."""
    positions = torch.arange(LENGTH, device=device).expand(len(DOCUMENTS), -1)
    for seed in itertools.count():
        draw_weights(model, config, seed)
        weights = {key: tensor.detach().double() for key, tensor in (*model.named_parameters(), *model.named_buffers())}
        for key in dict(model.named_parameters()):
            weights[key].requires_grad_()
        batch = {key: tensor.to(device) for key, tensor in packed_batch(config.vocab_size, seed).items()}
        case = Case(model, config, weights, batch, batch["input_ids"])
        packed = reference_model.forward(weights, config, case.input_ids, batch["position_ids"])
        rows = reference_model.forward(weights, config, case.input_ids, positions)
        if all(routing.margin > MIN_MARGIN for routing in (*packed.routings, *rows.routings)):
            return case, packed, rows
    raise AssertionError


def packed_batch(vocab_size: int, seed: int) -> Batch:
    """Rows of documents with padding; a seventh of the labels is left out."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(DOCUMENTS), LENGTH)
    input_ids, labels = (torch.randint(vocab_size, shape, generator=generator) for _ in range(2))
    labels[:, 3::7] = IGNORE_INDEX
    position_ids = torch.zeros(shape, dtype=torch.int64)
    for row, lengths in enumerate(DOCUMENTS):
        labels[row, sum(lengths) :] = IGNORE_INDEX
        position_ids[row, : sum(lengths)] = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


# -- losses and gradients ----------------------------------------------------------------------------------------------


def _training_errors(case: Case, packed: reference_model.Output) -> dict[str, float]:
    """Errors of the loss and the router losses, and of their gradients, as the task computes them."""
    task = LanguageModeling(case.model)
    counts = {name: float(count) for name, count in task.all_counts(case.batch).items()}
    losses = task.all_losses(case.model, case.batch)
    zero = {name: loss.detach() * 0 for name, loss in losses.items()}
    parts = {"loss": {**zero, "loss": losses["loss"]}}
    expected = {"loss": reference_model.cross_entropy(packed.logits, case.batch["labels"])}
    if packed.routings:
        parts["router losses"] = {**losses, "loss": zero["loss"]}
        counted = torch.tensor(
            [[t < sum(lengths) for t in range(LENGTH)] for lengths in DOCUMENTS], device=case.input_ids.device
        )
        expected["router losses"] = reference_model.router_loss(case.config, packed.routings, counted)
    errors: dict[str, float] = {}
    for what, terms in parts.items():
        loss, reference = task.total(terms, counts), expected[what]
        value, expected_value = loss.item(), reference.item()
        if expected_value == 0:  # both coefficients of the router losses are zero
            errors[what] = abs(value)
            continue
        errors[what] = abs(value / expected_value - 1)
        gradients = _gradients(loss, case.model), _named_gradients(reference, case.weights)
        errors[f"gradient of the {what}"] = gradient_error(*gradients, case.weights)
    return errors


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    return _named_gradients(loss, dict(model.named_parameters()))


def _named_gradients(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in trained.items()}
    gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
    pairs = zip(trained.items(), gradients, strict=True)
    return {name: torch.zeros_like(leaf) if gradient is None else gradient for (name, leaf), gradient in pairs}


def gradient_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> float:
    """The worst relative error of a tensor's gradient.

    Gradients are multiplied by the size of their tensor's weights, so that they compare. Of those that are nearly zero, as the
    key biases' are, the error is relative to 1 % of the whole norm.
    """
    sizes = {name: weights[name].detach().square().mean().sqrt() for name in expected}
    norms = {name: float((expected[name] * sizes[name]).norm()) for name in expected}
    smallest = 0.01 * float(torch.tensor(list(norms.values())).norm())
    errors = [
        float(((actual[name].double() - expected[name]) * sizes[name]).norm()) / max(norms[name], smallest) for name in expected
    ]
    return max(errors, key=lambda error: (error != error, error))


# -- transformers ------------------------------------------------------------------------------------------------------


def _transformers_errors(context: Context, name: str, case: Case) -> tuple[dict[str, float], str]:
    """Errors against transformers, which reads a folder that the model writes; none if it lacks the architecture."""
    family = family_of(case.config)
    if family.architecture == OWN:
        return {}, f"{name}: transformers has no such architecture, formulas only"
    folder = context.folder / f"model-{name.replace(' ', '-')}-{process_group.rank()}"
    case.model.save_pretrained(folder)
    peer = load_unmodified(folder)
    if peer is None:
        return {}, "transformers is not installed: formulas only"
    peer.to(case.input_ids.device)
    logits = peer(case.input_ids).logits
    with torch.no_grad():
        errors = {"logits of transformers": worst_vector_error(case.model(case.input_ids), logits.double())}
        ours = case.model(case.input_ids, case.batch["position_ids"])
        errors["packed logits of transformers"] = max(
            worst_vector_error(ours[row, begin:end], peer(case.input_ids[row, begin:end][None]).logits[0].double())
            for row, lengths in enumerate(DOCUMENTS)
            for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)
            for begin in [end - length]
        )
    labels = case.batch["labels"]
    losses = case.model(case.input_ids, labels=labels)
    actual = _gradients(losses.sum(), case.model)
    rules = family.rules(case.config)
    actual |= dict(to_file_tensors(rules, list(actual.items())))  # transformers names some tensors like the files
    weights = {key: tensor.detach() for key, tensor in peer.named_parameters()}
    targets = labels != IGNORE_INDEX
    expected = _gradients(nn.functional.cross_entropy(logits[targets], labels[targets], reduction="sum"), peer)
    errors["gradient of transformers"] = gradient_error(actual, expected, weights)
    return errors, ""


# -- subclasses --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _check_properties(context: Context, model_class: type[Bumblebee], config: BumblebeeConfig) -> CheckResult:
    """Packed documents equal the documents alone, and a changed token changes no logits before it."""
    torch.manual_seed(0)
    small = shrink(config)
    model = model_class(small, attention=context.fp32_attention).to(context.device).eval()
    batch = {key: tensor.to(context.device) for key, tensor in packed_batch(small.vocab_size, 0).items()}
    input_ids = batch["input_ids"]
    packed = model(input_ids, batch["position_ids"])
    alone = max(
        worst_vector_error(packed[row, begin:end], model(input_ids[row, begin:end][None])[0].double())
        for row, lengths in enumerate(DOCUMENTS)
        for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)
        for begin in [end - length]
    )
    changed = input_ids.clone()
    changed[:, LENGTH // 2] = (changed[:, LENGTH // 2] + 1) % small.vocab_size
    before = worst_vector_error(model(changed)[:, : LENGTH // 2], model(input_ids)[:, : LENGTH // 2].double())
    errors = {"packed documents": alone, "tokens before a changed one": before}
    note = f"{model_class.__qualname__} computes something of its own: only its properties are checked"
    return CheckResult(tuple(Measurement(what, error, OUTPUT_BOUND) for what, error in errors.items()), note)
