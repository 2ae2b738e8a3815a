"""Parity with TRL's GKDTrainer: same batch, same generalised JSD and gradients."""

from __future__ import annotations

import pytest
import torch
from helpers.training_runs import Rows, small_model

from bumblebee import Distillation

gkd = pytest.importorskip("trl.experimental.gkd")

CASES = {  # our options; TRL's
    "forward": ({"divergence": "forward_kl"}, {"beta": 0.0}),
    "reverse": ({"divergence": "reverse_kl", "temperature": 2.0}, {"beta": 1.0, "temperature": 2.0}),
    "jsd": ({"divergence": "jsd", "jsd_beta": 0.3}, {"beta": 0.3}),
    "jsd warm": ({"divergence": "jsd", "temperature": 0.7}, {"beta": 0.5, "temperature": 0.7}),
    "jsd at 0": ({"divergence": "jsd", "jsd_beta": 0.0}, {"beta": 0}),
    "jsd at 1": ({"divergence": "jsd", "jsd_beta": 1.0}, {"beta": 1}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Student and teacher, of different widths and larger weights than initial ones, and a batch."""
    paths = [tmp_path_factory.mktemp(name) for name in ("student", "teacher")]
    for seed, (path, width) in enumerate(zip(paths, (32, 48), strict=True)):
        model = small_model(seed, hidden_size=width, initializer_range=0.2)
        model.save_pretrained(path)
    rows = Rows(6)
    rows.setup(0)
    return *map(str, paths), rows.collate(rows.train)


@pytest.mark.parametrize("name", CASES)
def test_divergence_and_gradients_equal_trl(name, folders):
    from transformers import AutoModelForCausalLM

    student, teacher, batch = folders
    options, settings = CASES[name]
    ours = small_model(0, initializer_range=0.2)
    task = Distillation(ours, teacher, **options)
    rows = Rows(6)
    rows.setup(0)
    task.setup(rows)
    task.begin_validation(torch.device("cpu"))
    sums, targets = task.training_step(ours, batch), task.counts(batch)["loss"]
    (sums["loss"] / targets).backward()

    theirs, frozen = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, teacher))
    with torch.no_grad():
        of_teacher = frozen(batch["input_ids"]).logits
    loss = gkd.GKDTrainer.generalized_jsd_loss(theirs(batch["input_ids"]).logits, of_teacher, batch["labels"], **settings)
    loss.backward()
    torch.testing.assert_close(sums["loss"] / targets, loss, rtol=1e-6, atol=1e-6)
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[key]).norm() <= 1e-5 * gradients[key].norm(), key
