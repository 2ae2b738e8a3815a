from __future__ import annotations

import pytest

from callbacks import TensorBoard


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_metrics_are_grouped(complete_run):
    series = scalars(complete_run.folder / "tensorboard")
    assert {"train/loss", "train/lr", "train/grad_norm", "validation/loss", "validation/perplexity"} <= set(series)
    assert "train/step" not in series
    assert [step for step, _ in series["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in series["validation/loss"]] == [0, 3, 6]


def test_resumed_run_has_each_step_once(resumed_run, complete_run):
    assert scalars(resumed_run.folder / "tensorboard") == scalars(complete_run.folder / "tensorboard")


def test_events_are_flushed_after_each_log(stub_trainer, tmp_path):
    trainer = stub_trainer([TensorBoard("events")])
    trainer.call("on_fit_start")
    trainer.step = 1
    trainer.call("on_log", {"step": 1, "loss": 0.5})
    assert scalars(tmp_path / "events") == {"train/loss": [(1, 0.5)]}
    trainer.call("on_fit_end")


@pytest.mark.parametrize("end", [("on_fit_end",), ("on_exception", RuntimeError())])
def test_event_file_is_closed_at_the_end(stub_trainer, end):
    callback = TensorBoard()
    trainer = stub_trainer([callback])
    trainer.call("on_fit_start")
    writer = callback._writer
    trainer.call("on_log", {"loss": 0.5})
    trainer.call(*end)
    assert writer.all_writers is None  # closed
    trainer.call("on_exception", RuntimeError())


def test_empty_folder_name_raises():
    with pytest.raises(ValueError, match="folder must be a name, got ''"):
        TensorBoard("")
