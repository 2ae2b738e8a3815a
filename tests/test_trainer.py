"""The training loop on one rank: gradients, metrics, callbacks, folders, byte-identical resumes, signals.

Two ranks: ``system/test_two_ranks.py``. Whole commands, kills and full disks: ``system/test_commands.py``.
"""

from __future__ import annotations

import json
import math
import signal

import numpy
import pytest
import torch
from helpers.training_runs import (
    SMALL,
    Noisy,
    Recorder,
    Rows,
    SignalIn,
    reference_gradient,
    small_model,
    train,
    weight_bytes,
    weights,
)
from helpers.zero_stages import EACH_STAGE

from bumblebee.callback import Callback
from bumblebee.checkpoint.trainer_state import checkpoints
from bumblebee.model import Bumblebee
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.trainer import Trainer
from bumblebee.training import loader
from bumblebee.training.metrics.jsonl_log import json_line

UNEQUAL = (16, 1, 7, 0, 12, 0, 0, 3)  # targets of 8 samples: some micro-batches have none
SGD = ("SGD", {"lr": 1.0})


# -- gradients -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def before():
    return {name: tensor.clone() for name, tensor in small_model().named_parameters()}


@pytest.mark.parametrize(("micro", "accumulate"), [(8, 1), (1, 8), (2, 4), (4, 2), (3, 3)])
def test_gradient_is_the_mean_over_all_targets(micro, accumulate, before, tmp_path):
    step = {"max_steps": 1, "optimizer": SGD, "gradient_clip": None, "data": {"samples": 8, "targets": UNEQUAL}}
    train(tmp_path, micro_batch_size=micro, accumulate=accumulate, **step)
    expected = reference_gradient(Rows(8, UNEQUAL))
    for name, after in weights(tmp_path).items():
        torch.testing.assert_close(
            before[name] - after, expected[name], rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n} {text}"
        )


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_steps_without_targets_do_not_change_weights(stage, before, tmp_path):
    metrics = train(tmp_path, data={"samples": 8, "targets": (0,)}, max_steps=3, zero_stage=stage)
    after = weights(tmp_path)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name != "lm_head.weight")
    assert [line["tokens"] for line in metrics] == [0, 0, 0]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    assert not any("loss" in line for line in metrics)


def test_a_step_without_targets_is_skipped(tmp_path, monkeypatch):
    """Samples 4 to 7 have no targets. The optimizer's state does not change in their step, whether it is second or omitted."""
    data = {"samples": 12, "targets": (16,) * 4 + (0,) * 4 + (16,) * 4}
    for name, order, steps in (("second", [*range(12)], 3), ("never", [*range(4), *range(8, 12), *range(4, 8)], 2)):
        monkeypatch.setattr(loader, "epoch_order", lambda *_, order=order: numpy.array(order))
        train(tmp_path / name, data=data, max_steps=steps)
    assert weight_bytes(tmp_path / "second") == weight_bytes(tmp_path / "never")


def test_training_is_deterministic_for_a_seed(tmp_path):
    run = {"task": "Noisy", "data": {"samples": 22}, "max_steps": 8}
    first, second = train(tmp_path / "a", **run), train(tmp_path / "b", **run)
    assert first == second
    assert weight_bytes(tmp_path / "a") == weight_bytes(tmp_path / "b")
    train(tmp_path / "c", seed=43, **run)
    assert weight_bytes(tmp_path / "a") != weight_bytes(tmp_path / "c")


def test_worker_processes_do_not_change_the_result(tmp_path):
    assert train(tmp_path / "a", task="Noisy") == train(tmp_path / "b", task="Noisy", workers=2)
    assert weight_bytes(tmp_path / "a") == weight_bytes(tmp_path / "b")


# -- metrics -------------------------------------------------------------------------------------------------------------


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path):
    run = {"max_steps": 7, "data": {"samples": 22, "targets": (16, 1, 7, 0, 12)}}
    each = train(tmp_path / "each", log_every=1, **run)
    every_third = train(tmp_path / "third", log_every=3, **run)
    assert [line["step"] for line in every_third] == [3, 6, 7]
    done = 0
    for line in every_third:
        steps = [one for one in each if done < one["step"] <= line["step"]]
        before = [0, *(one["tokens"] for one in each)]
        targets = [one["tokens"] - before[one["step"] - 1] for one in steps]
        total = sum(one.get("loss", 0.0) * count for one, count in zip(steps, targets, strict=True))
        assert math.isclose(line["loss"], total / sum(targets), rel_tol=1e-6)
        assert line["tokens"] == steps[-1]["tokens"]
        done = line["step"]


def test_metrics_of_a_step(tmp_path):
    metrics = train(tmp_path, schedule=("Linear", {"warmup_steps": 2}), max_steps=6, data={"samples": 22, "targets": (16,)})
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in metrics] == [round(n / 22, 6) for n in (4, 8, 12, 16, 20, 22)]
    assert [line["tokens"] for line in metrics] == [16 * n for n in (4, 8, 12, 16, 20, 22)]
    expected = [0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025]
    assert all(math.isclose(line["lr"], rate) for line, rate in zip(metrics, expected, strict=True))


def test_a_logged_value_is_in_the_next_line_only(tmp_path):
    class Extra(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 3:
                trainer.log("extra", 1.5)

    metrics = fit(tmp_path, {"extra": Extra()}, max_steps=6, log_every=2)
    assert [line.get("extra") for line in metrics] == [None, 1.5, None]


def test_logged_terms_have_their_own_counts(tmp_path):
    class TwoTerms(LanguageModeling):
        """The second term is 2 for each row."""

        def __init__(self, model):
            super().__init__(model)
            self.weights = {"tokens_loss": 1.0, "rows_loss": 0.25}

        def counts(self, batch):
            return {"tokens_loss": super().counts(batch)["loss"], "rows_loss": len(batch["labels"])}

        def training_step(self, model, batch):
            loss = super().training_step(model, batch)["loss"]
            return {"tokens_loss": loss, "rows_loss": loss * 0 + 2.0 * len(batch["labels"])}

    one = train(tmp_path / "one", max_steps=3, data={"samples": 22, "targets": (16,)})
    two = fit(tmp_path / "two", {}, task=TwoTerms(small_model()), max_steps=3)
    for plain, line in zip(one, two, strict=True):
        assert math.isclose(line["tokens_loss"], plain["loss"], rel_tol=1e-6)
        assert math.isclose(line["rows_loss"], 2.0)
        assert math.isclose(line["loss"], plain["loss"] + 0.25 * 2.0, rel_tol=1e-6)


def fit(folder, callbacks, task=None, data=None, **options):
    """Run with the given instances of callbacks, task and data."""
    recorder = Recorder()
    trainer = Trainer(**{**SMALL, **options})
    parts = (
        task or LanguageModeling(small_model()),
        data or Rows(22, (16,)),
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
    )
    trainer.fit(*parts, None, {"recorder": recorder, **callbacks}, folder)
    return recorder.metrics


# -- callbacks -----------------------------------------------------------------------------------------------------------


class Witness(Callback):
    """Records every hook call with the number of steps done."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda trainer, *args: self.seen.append((name, trainer.step, *args))


def test_hooks_are_called_in_the_documented_order(tmp_path):
    class Saves(Callback):
        def on_save(self, trainer):
            if trainer.step == 2:
                trainer.save_checkpoint()

    witness = Witness()
    fit(tmp_path, {"witness": witness, "saves": Saves(), "none": None}, max_steps=2, log_every=2)
    assert [entry[:2] for entry in witness.seen] == [
        ("on_fit_start", 0),
        ("on_step_start", 0), ("on_step_end", 1), ("on_save", 1),
        ("on_step_start", 1), ("on_step_end", 2), ("on_log", 2), ("on_save", 2), ("on_checkpoint_saved", 2),
        ("on_fit_end", 2),
    ]  # fmt: skip
    assert witness.seen[-2][2] == tmp_path / "checkpoint-2"


def test_an_error_propagates_after_on_exception(tmp_path):
    class Fails(Callback):
        def on_step_end(self, trainer):
            raise RuntimeError("on fire")

    witness = Witness()
    with pytest.raises(RuntimeError, match="on fire") as caught:
        fit(tmp_path, {"fails": Fails(), "witness": witness})
    assert witness.seen[-1] == ("on_exception", 1, caught.value)
    assert not (tmp_path / "config.json").exists()


def test_a_run_after_a_failed_one_works(tmp_path):
    class Fails(Callback):
        def on_step_end(self, trainer):
            raise RuntimeError("on fire")

    with pytest.raises(RuntimeError):
        fit(tmp_path / "failed", {"fails": Fails()}, zero_stage=2)
    assert train(tmp_path / "next", zero_stage=2) == train(tmp_path / "again", zero_stage=2)


def test_a_callback_can_stop_a_run(tmp_path):
    metrics = train(tmp_path, callbacks={"stop": ("StopAfter", {"step": 3})})
    assert metrics[-1]["step"] == 3
    assert (tmp_path / "model.safetensors").exists()


def test_validation_does_not_depend_on_batch_or_change_training(tmp_path):
    class Validates(Callback):
        def __init__(self):
            self.losses = []

        def on_step_end(self, trainer):
            trainer.validate()

        def on_validation_end(self, trainer, metrics):
            self.losses.append(metrics["validation_loss"])

    plain = fit(tmp_path / "plain", {}, max_steps=3)
    losses = []
    for micro, accumulate in ((4, 1), (1, 4)):
        validates = Validates()
        metrics = fit(tmp_path / f"micro{micro}", {"v": validates}, max_steps=3, micro_batch_size=micro, accumulate=accumulate)
        losses.append(validates.losses)
        assert all(math.isclose(a["loss"], b["loss"], rel_tol=1e-5) for a, b in zip(plain, metrics, strict=True))
    assert len(losses[0]) == 3
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(*losses, strict=True))


# -- options and folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_steps", 0), ("micro_batch_size", 0), ("accumulate", -1), ("log_every", 0), ("workers", -1), ("epochs", 0.0),
     ("max_skipped_steps", 0), ("epochs", -1.0), ("epochs", math.nan), ("gradient_clip", 0.0), ("gradient_clip", -1.0)],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(option, value):
    with pytest.raises(ValueError) as caught:
        Trainer(**{option: value})
    assert str(caught.value).startswith(option) and str(value) in str(caught.value)


def test_a_folder_with_a_run_is_refused(tmp_path):
    train(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="already holds a run.*trainer.resume auto.*overwrite"):
        train(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


def test_overwrite_deletes_only_the_run(tmp_path):
    train(tmp_path, max_steps=4, callbacks={"checkpoint": ("Checkpoint", {"every": 1, "keep": None})})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "more").mkdir()
    train(tmp_path, max_steps=2, overwrite=True, callbacks={"checkpoint": ("Checkpoint", {"every": 1})})
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "more").is_dir()
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [1, 2]


def test_unusable_options_are_refused_before_writing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir: .*file is a file"):
        train(tmp_path / "file")
    with pytest.raises(ValueError, match="nothing to train on"):
        train(tmp_path / "new", data={"samples": 0})
    with pytest.raises(ValueError, match="trainer.resume: nowhere is not a complete checkpoint"):
        train(tmp_path / "new", resume="nowhere")
    with pytest.raises(ValueError, match="trainer.zero_stage is 1, but trainer.deepspeed.zero_optimization.stage is 3"):
        train(tmp_path / "new", zero_stage=1, deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match="seed .*-1"):
        train(tmp_path / "new", seed=-1)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_is_a_model_folder(tmp_path):
    train(tmp_path, max_steps=3, zero_stage=3, callbacks={"checkpoint": ("Checkpoint", {"every": 3})})
    ids = torch.arange(12)[None]
    logits = [Bumblebee.from_pretrained(folder)(ids) for folder in (tmp_path, tmp_path / "checkpoint-3")]
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], small_model()(ids))


# -- resume --------------------------------------------------------------------------------------------------------------

EACH = {"checkpoint": ("Checkpoint", {"every": 1, "keep": None})}
LONG = {
    "max_steps": 14,
    "task": "Noisy",
    "schedule": ("Cosine", {"warmup_steps": 3}),
    "data": {"samples": 22},
}  # 6 steps per epoch


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function that returns (folder, metrics) of an uninterrupted run, made once for each set of options."""
    done = {}

    def of(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in done:
            folder = tmp_path_factory.mktemp("whole")
            done[key] = folder, train(folder, callbacks=EACH, **LONG, **options)
        return done[key]

    return of


def stopped(folder, step, **options):
    """The long run, stopped after a step."""
    return train(folder, callbacks={**EACH, "stop": ("StopAfter", {"step": step})}, **LONG, **options)


FAST = [(0, "fp32"), (3, "fp32")]
SLOW = [(1, "fp32"), (2, "fp32"), *((stage, "bf16") for stage in (0, 1, 2, 3))]


@pytest.mark.parametrize(("stage", "precision"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_resume_is_byte_identical(stage, precision, uninterrupted, tmp_path):
    options = {"zero_stage": stage, "precision": precision}
    whole, metrics = uninterrupted(**options)
    stopped(tmp_path, 4, **options)
    stopped(tmp_path, 6, resume="auto", **options)  # the first epoch's last step
    again = train(tmp_path, callbacks=EACH, resume="auto", **LONG, **options)
    assert weight_bytes(tmp_path) == weight_bytes(whole)
    assert again == metrics


@pytest.mark.parametrize("step", [1, 5, 6, 7, 13])
def test_resume_from_a_path_is_byte_identical(step, uninterrupted, tmp_path):
    whole, metrics = uninterrupted(zero_stage=1, precision="fp32")
    again = train(tmp_path, resume=str(whole / f"checkpoint-{step}"), zero_stage=1, **LONG)
    assert again == metrics
    assert weight_bytes(tmp_path) == weight_bytes(whole)


def test_resume_with_workers_is_byte_identical(uninterrupted, tmp_path):
    whole, _ = uninterrupted(zero_stage=1, precision="fp32")
    train(tmp_path, resume=str(whole / "checkpoint-5"), zero_stage=1, workers=2, **LONG)
    assert weight_bytes(tmp_path) == weight_bytes(whole)


def test_resume_between_two_lines_continues_their_sums(tmp_path):
    """Also those of the routers, and what a callback has logged."""
    model = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.5}
    run = {"max_steps": 8, "log_every": 4, "zero_stage": 0, "model": model, "task": "Noisy"}
    metrics = train(tmp_path / "whole", callbacks={"log": ("LogOnce", {"step": 5})}, **run)
    for step in (5, 6):
        callbacks = {**EACH, "log": ("LogOnce", {"step": 5}), "stop": ("StopAfter", {"step": step})}
        train(tmp_path / "pieces", callbacks=callbacks, resume="auto", **run)
    again = train(tmp_path / "pieces", resume="auto", **run)
    assert list(map(json_line, again)) == list(map(json_line, metrics))
    assert [line.get("extra") for line in again] == [None, 1.5] and "router/load" in again[1]


def test_checkpoints_of_a_resumed_run_are_byte_identical(uninterrupted, tmp_path):
    """Weights, optimizer state and random state."""
    whole, _ = uninterrupted(zero_stage=1, precision="fp32")
    train(tmp_path, callbacks=EACH, resume=str(whole / "checkpoint-5"), zero_stage=1, **LONG)
    for ours in sorted((whole / "checkpoint-14").rglob("*")):
        if ours.is_file():
            assert ours.read_bytes() == (tmp_path / ours.relative_to(whole)).read_bytes(), ours.name


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run = {"max_steps": 3, "callbacks": EACH}
    metrics = train(tmp_path, **run)
    before = weight_bytes(tmp_path)
    assert train(tmp_path, resume="auto", **run) == metrics
    assert weight_bytes(tmp_path) == before


def test_resume_auto_without_a_checkpoint_starts_a_run(tmp_path):
    assert train(tmp_path / "a", resume="auto") == train(tmp_path / "b")


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_resume_uses_the_recipes_gradient_clip(stage, tmp_path):
    run = {"max_steps": 2, "zero_stage": stage, "optimizer": SGD, "data": {"samples": 22, "targets": (16,)}}
    train(tmp_path, callbacks={**EACH, "stop": ("StopAfter", {"step": 1})}, gradient_clip=1e-9, **run)
    before = weights(tmp_path / "checkpoint-1")
    train(tmp_path, resume="auto", gradient_clip=None, **run)
    assert max(float((weights(tmp_path)[name] - tensor).abs().max()) for name, tensor in before.items()) > 1e-3


def test_resume_with_another_seed_or_data_is_refused(tmp_path):
    train(tmp_path, max_steps=4, callbacks=EACH)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for changed, message in (({"seed": 7}, "seed 42.*7"), ({"data": {"samples": 21}}, "samples 22.*21")):
        with pytest.raises(ValueError, match=f"trainer.resume.*{message}"):
            train(tmp_path, max_steps=6, resume="auto", **changed)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_resume_with_another_model_is_refused(tmp_path):
    train(tmp_path, max_steps=2, callbacks=EACH)
    with pytest.raises(ValueError, match="was trained with intermediate_size 64, this run has 96: set it back, or"):
        train(tmp_path, max_steps=4, resume="auto", model={"intermediate_size": 96})


def test_a_partial_checkpoint_is_ignored_and_deleted(tmp_path):
    run = {"max_steps": 6, "callbacks": EACH}
    metrics = train(tmp_path / "whole", **run)
    stopped_here = {**EACH, "stop": ("StopAfter", {"step": 3})}
    train(tmp_path / "run", max_steps=6, callbacks=stopped_here)
    partial = tmp_path / "run" / ".checkpoint-4.partial"
    partial.mkdir()
    (partial / "trainer_state.json").write_text("{}")
    no_state = tmp_path / "run" / "checkpoint-5"  # a folder that was copied in part
    no_state.mkdir()
    (no_state / "config.json").write_text("{}")
    assert train(tmp_path / "run", resume="auto", **run) == metrics
    assert not partial.exists()
    assert weight_bytes(tmp_path / "run") == weight_bytes(tmp_path / "whole")


def test_resume_from_an_older_checkpoint_replaces_later_ones(tmp_path):
    run = {"max_steps": 5, "callbacks": EACH}
    train(tmp_path, **run)
    (tmp_path / "checkpoint-4" / "stale").write_text("of the earlier run")
    train(tmp_path, resume=str(tmp_path / "checkpoint-2"), **run)
    assert not (tmp_path / "checkpoint-4" / "stale").exists()
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [1, 2, 3, 4, 5]


# -- signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resume_is_byte_identical(number, uninterrupted, tmp_path):
    whole, metrics = uninterrupted(zero_stage=1, precision="fp32")
    last = {"checkpoint": ("Checkpoint", {"every": None})}
    interrupting = {**last, "signal": ("SignalIn", {"step": 4, "number": number})}
    handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    before = train(tmp_path, callbacks=interrupting, zero_stage=1, **LONG)
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers
    assert before == metrics[:5]
    assert [(checkpoint.step, checkpoint.last) for checkpoint in checkpoints(tmp_path)] == [(5, True)]
    assert not (tmp_path / "model.safetensors").exists()  # the run is not finished
    assert train(tmp_path, callbacks=last, resume="auto", zero_stage=1, **LONG) == metrics
    assert weight_bytes(tmp_path) == weight_bytes(whole)


def test_resume_completes_a_run_signalled_in_its_last_step(tmp_path):
    train(tmp_path / "whole")
    interrupting = {"checkpoint": ("Checkpoint", {}), "signal": ("SignalIn", {"step": 5})}
    train(tmp_path / "run", callbacks=interrupting)
    train(tmp_path / "run", resume="auto")
    assert weight_bytes(tmp_path / "run") == weight_bytes(tmp_path / "whole")


def test_sigterm_after_ctrl_c_is_not_a_second_ctrl_c(tmp_path):
    both = {"ctrl_c": ("SignalIn", {"step": 2, "number": signal.SIGINT}), "term": ("SignalIn", {"step": 2})}
    train(tmp_path, callbacks={"checkpoint": ("Checkpoint", {}), **both})
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [3]


def test_a_second_signal_stops_at_once(tmp_path):
    witness = Witness()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, {"witness": witness, "signal": SignalIn(step=2, number=signal.SIGINT, times=2)})
    assert witness.seen[-1][:2] == ("on_exception", 2)
    assert not checkpoints(tmp_path)


def test_a_changed_random_state_changes_the_weights(tmp_path):
    """The resume tests rely on this: a random state that is not restored changes the weights."""

    class Disturbs(Callback):
        def on_step_start(self, trainer):
            if trainer.step == 3:
                torch.rand(())

    for name, callbacks in (("as it is", {}), ("disturbed", {"disturbs": Disturbs()})):
        fit(tmp_path / name, callbacks, task=Noisy(small_model()))
    assert weight_bytes(tmp_path / "as it is") != weight_bytes(tmp_path / "disturbed")
