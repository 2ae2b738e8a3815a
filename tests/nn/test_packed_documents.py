"""Several documents in one row give what each gives alone: logits, losses and gradients. Padding changes nothing.

A document begins where ``position_ids`` is 0; positions of padding are all 0.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee import Bumblebee
from bumblebee.nn import IGNORE_INDEX

V = 64
TOLERANCE = 1e-5
LENGTHS = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=3)


@pytest.fixture(scope="module", params=["naive", "sdpa"])
def model(request, tiny) -> Bumblebee:
    torch.manual_seed(0)
    return Bumblebee(tiny(vocab_size=V, initializer_range=0.2), attention=request.param)


def documents(lengths: list[list[int]], seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(V, (length,), generator=generator) for length in row] for row in lengths]


def pack(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, position_ids and labels (the next token of the same document) of equally long rows."""
    width = max(sum(map(len, row)) for row in rows)
    packed = [torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2)] + [
        torch.full((len(rows), width), IGNORE_INDEX)
    ]
    for number, row in enumerate(rows):
        start = 0
        for document in row:
            here = slice(start, start + len(document))
            packed[0][number, here] = document
            packed[1][number, here] = torch.arange(len(document))
            packed[2][number, start : here.stop - 1] = document[1:]
            start = here.stop
    return packed[0], packed[1], packed[2]


def pieces(packed: torch.Tensor, rows: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The parts of a packed result that belong to the documents, padding left out."""
    return [
        piece for row, out in zip(rows, packed, strict=True)
        for piece in out[: sum(map(len, row))].split([len(document) for document in row])
    ]  # fmt: skip


def test_packed_logits_equal_unpacked(model):
    @settings(deadline=None, max_examples=25)
    @given(LENGTHS, st.integers(0, 99))
    @torch.no_grad()
    def check(lengths, seed):
        rows = documents(lengths, seed)
        input_ids, position_ids, _ = pack(rows)
        together = pieces(model(input_ids, position_ids), rows)
        alone = [model(document[None])[0] for row in rows for document in row]
        torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)

    check()


def test_packed_losses_and_gradients_equal_unpacked(model):
    rows = documents([[5, 1, 7], [4, 6], [2]])
    input_ids, position_ids, labels = pack(rows)

    model.zero_grad()
    together = model(input_ids, position_ids, labels=labels)
    together.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    alone = [model(d[None, :-1], labels=d[None, 1:])[0] for row in rows for d in row]
    torch.cat(alone).sum().backward()

    ends_cut = [piece[:-1] for piece in pieces(together.detach(), rows)]
    torch.testing.assert_close(ends_cut, [loss.detach() for loss in alone], rtol=0, atol=TOLERANCE)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_without_position_ids_the_neighbour_would_be_seen(model):
    """What the two tests above would miss if packing did nothing."""
    rows = documents([[5, 7]])
    input_ids, position_ids, _ = pack(rows)
    assert (model(input_ids) - model(input_ids, position_ids))[0, 5:].abs().max() > 1e-2


def test_position_ids_of_one_document_change_nothing(model):
    input_ids, position_ids, _ = pack(documents([[9], [9]]))
    torch.testing.assert_close(model(input_ids, position_ids), model(input_ids), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_of_padding_gives_no_nan(tiny, dtype):
    model = Bumblebee(tiny(vocab_size=V)).to(dtype)
    input_ids, position_ids, labels = pack([*documents([[6]]), []])
    assert model(input_ids, position_ids).isfinite().all()
    losses = model(input_ids, position_ids, labels=labels)
    losses.sum().backward()
    assert losses[1].eq(0).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
