"""Saving and loading checkpoints of a run: a model folder, and the training state in it.

The trainer owns how a checkpoint is written, ``callbacks.Checkpoint`` when, and how many are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from bumblebee.checkpoint.digests import NAME, describe_damage
from bumblebee.checkpoint.integrity import check_intact, shard_damage, state_files
from bumblebee.checkpoint.model_files import files_of
from bumblebee.checkpoint.trainer_state import TRAINER_STATE, TRAINING_STATE, read_trainer_state
from bumblebee.datamodule import DataModule
from bumblebee.distributed import process_group
from bumblebee.training import random_state
from bumblebee.training.collective_folder import collective_folder
from bumblebee.training.fingerprint import check_fingerprint, data_fingerprint
from bumblebee.training.metrics.window import load_window, save_window
from bumblebee.training.plan import Position
from bumblebee.training.prepared_windows import rollout_options
from bumblebee.training.run_state import RunState
from bumblebee.utils.json_files import write_json


def write_checkpoint(run: RunState, path: Path, last: bool, model: bool) -> None:
    """Write a checkpoint; complete or absent. Collective.

    Args:
        run: the run.
        path: the checkpoint's folder.
        last: whether the run ends here.
        model: whether to write the weights as a model folder too.

    Raises:
        OSError: it cannot be written.
        OtherRankFailed: another rank cannot write it.
    """
    with collective_folder(path, replace=True) as (partial, digests):
        digests.update(_write_model(run, partial, weights=model))
        state = partial / TRAINING_STATE
        state.mkdir(exist_ok=True)
        shards = run.engine.save(state, files_of(run.task.model).includes)
        written = shards | random_state.save_random_state(state, process_group.rank())
        written |= save_window(run, state) | run.windows.save(state)
        digests.update((f"{TRAINING_STATE}/{name}", digest) for name, digest in written.items())
        if run.is_main:
            write_json(partial / TRAINER_STATE, _trainer_state(run, last))


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare the files that training resumes from with their digests. Collective.

    Every machine reads every file once, as its ranks are about to: they divide the files between them. Without digests, as in
    earlier versions, only damage that makes a file unreadable or incomplete is noticed.

    Raises:
        ValueError: on all ranks; names a damaged file and the previous good checkpoint.
    """
    try:
        check_intact(checkpoint, _damage, option="--trainer.resume ")
    except ValueError as error:
        raise ValueError(f"trainer.resume: {error}") from error


def _damage(checkpoint: Path) -> str | None:
    damage = describe_damage(checkpoint, process_group.share_of_machine(state_files(checkpoint)))
    first = next(iter(process_group.all_gather_items([damage] if damage else [])), None)
    if first is not None:
        return first
    damage = _structural_damage(checkpoint) if process_group.is_main() else None
    return next(iter(process_group.all_gather_items([damage] if damage else [])), None)


def _structural_damage(checkpoint: Path) -> str | None:
    """What cannot be read, or is missing, whatever the digests say."""
    try:
        state = read_trainer_state(checkpoint)
        if "fingerprint" in state and (checkpoint / NAME).is_file() and not state_files(checkpoint):
            return f"{checkpoint / NAME} is damaged: it does not list the training state"  # earlier versions had no list
        for rank in range(state["ranks"]):
            random_state.read_random_state(checkpoint / TRAINING_STATE, rank)
    except ValueError as error:
        return str(error)
    return shard_damage(checkpoint)


def check_model_and_optimizer(run: RunState, path: Path) -> None:
    """Check that a run has the model and the optimizer whose state a checkpoint holds; its engine exists.

    Raises:
        ValueError: names what differs. A checkpoint of an earlier version, which does not say, is not checked.
    """
    files_of(run.task.model).check_resumed(path)
    check_fingerprint(path, read_trainer_state(path).get("fingerprint", {}), run.fingerprint)


def load_checkpoint(run: RunState, path: Path) -> None:
    """Restore model, optimizer, random state, schedule and callbacks. Collective.

    The run that wrote the checkpoint may have had another number of ranks, ZeRO stage or precision. With the same ones, the
    resumed run is identical to the last bit to one that was never interrupted.
    """
    state = read_trainer_state(path)
    run.engine.load(path / TRAINING_STATE)
    random_state.load_random_state(path / TRAINING_STATE, process_group.rank(), state["ranks"])
    load_window(run, path / TRAINING_STATE, state["ranks"])
    run.step, run.tokens = run.plan.origin.step, state["tokens"]
    run.skipped.load_state_dict(state.get("skipped_steps", {}))
    run.engine.load_scaler_state(state["loss_scaler"])
    with _reported(path, "optimizer_groups"):
        run.engine.load_group_state(state.get("optimizer_groups", []))  # checkpoints of earlier versions have none
    with _reported(path, "schedule"):
        run.schedule.load_state_dict(state["schedule"])
    for name, callback in run.callbacks.items():
        if name in state["callbacks"]:
            with _reported(path, f"callbacks.{name}"):
                callback.load_state_dict(state["callbacks"][name])


@contextmanager
def _reported(checkpoint: Path, name: str) -> Iterator[None]:
    """Name the file and the part of it that cannot be restored."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"trainer.resume: the state of {name} in {checkpoint / TRAINER_STATE} is damaged: {reason}") from error


def resumed_position(checkpoint: Path, data: DataModule, seed: int) -> Position:
    """Where in the data a checkpoint's run was.

    Raises:
        ValueError: its data had another order or size, so its position is meaningless for this run.
    """
    state = read_trainer_state(checkpoint)
    for name, value in {"seed": seed, "samples": len(data.train)}.items():
        if state[name] != value:
            raise ValueError(f"trainer.resume: {checkpoint} was trained with {name} {state[name]}, this run has {value}")
    check_fingerprint(checkpoint, state.get("fingerprint", {}), data_fingerprint(data))
    return Position(**state["position"])


def write_model(run: RunState, folder: Path) -> None:
    """Write the model folder: weights in the training precision, config, tokenizer. Collective."""
    with collective_folder(folder) as (partial, digests):
        digests.update(_write_model(run, partial))


def _write_model(run: RunState, folder: Path, weights: bool = True) -> dict[str, str]:
    """Write a model folder's files; returns the SHA-256 of the weight files by name, on rank 0. Collective."""
    digests: dict[str, str] = {}
    files = files_of(run.task.model)
    # The training state holds trainable parameters only: a model with frozen ones is always written.
    weights = weights or any(files.includes(n) and not p.requires_grad for n, p in run.engine.model.named_parameters())
    tensors = run.engine.full_tensors(files.includes) if weights else iter(())
    try:
        if run.is_main:
            if weights:
                digests = files.write(folder, tensors)
            else:
                files.write_configs(folder, run.engine.dtype)
            if run.data.tokenizer is not None:
                run.data.tokenizer.save_pretrained(folder)
    finally:
        for _ in tensors:  # every rank takes part in gathering every tensor, even if writing failed
            pass
    return digests


def saved_rollout_options(checkpoint: Path) -> Mapping[str, object]:
    """What the rollout batch depends on that a checkpoint is in the middle of."""
    options: Mapping[str, object] = read_trainer_state(checkpoint).get("rollout_batch", {})
    return options


def _progress(run: RunState) -> dict[str, object]:
    position = asdict(run.plan.position(run.step))
    if position["into"]:
        return {"position": position, "rollout_batch": rollout_options(run.task, run.plan)}
    return {"position": {name: value for name, value in position.items() if name != "into"}}


def _trainer_state(run: RunState, last: bool) -> dict[str, object]:
    return {
        **_progress(run),
        "seed": run.seed,
        "samples": run.plan.samples,
        "fingerprint": run.fingerprint,
        "tokens": run.tokens,
        "skipped_steps": run.skipped.state_dict(),
        "last": last,
        "ranks": run.plan.world_size,
        "zero_stage": run.zero_stage,
        "precision": run.precision,
        "dtype": run.engine.dtype,
        "loss_scaler": run.engine.scaler_state(),
        "optimizer_groups": run.engine.group_state(),
        "schedule": run.schedule.state_dict(),
        "callbacks": {name: callback.state_dict() for name, callback in run.callbacks.items()},
    }
