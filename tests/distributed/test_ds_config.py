"""DeepSpeed's configuration: merged with the user's, and nothing in it ignored."""

from __future__ import annotations

import json

import pytest

from bumblebee.distributed.deepspeed.ds_config import EngineOptions, deepspeed_config, read_overrides, uses_nvme


def options(**changes) -> EngineOptions:
    return EngineOptions(**{"precision": "bf16", "zero_stage": 1, "micro_batch_size": 4, "gradient_clip": 1.0,
                            "overrides": {}, **changes})  # fmt: skip


def test_overrides_are_merged_at_any_depth():
    config = deepspeed_config(options(overrides={"zero_optimization": {"reduce_bucket_size": 7}, "comms_logger": {"a": 1}}))
    assert config["zero_optimization"].items() >= {"stage": 1, "reduce_bucket_size": 7}.items()
    assert config["comms_logger"] == {"a": 1}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"zero_optimization": {"stage": 2}}, "trainer.deepspeed.zero_optimization.stage is 2.*make it 1"),
        ({"train_micro_batch_size_per_gpu": 1}, "trainer.deepspeed.train_micro_batch_size_per_gpu is 1.*make it 4"),
        ({"gradient_accumulation_steps": 8}, "trainer.deepspeed.gradient_accumulation_steps is 8"),
        ({"gradient_clipping": 0.5}, "trainer.deepspeed.gradient_clipping is 0.5"),
        ({"bf16": {"enabled": False}}, "trainer.deepspeed.bf16.enabled is False"),
        ({"bf16": False}, "trainer.deepspeed.bf16 is False"),
    ],
)
def test_a_contradiction_of_the_trainers_options_is_refused(overrides, named):
    with pytest.raises(ValueError, match=named):
        deepspeed_config(options(overrides=overrides))


def test_repeating_the_trainers_options_is_accepted():
    assert deepspeed_config(options(overrides={"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}))


def test_overrides_are_none_a_dict_or_a_file(tmp_path):
    assert read_overrides(None) == {}
    assert read_overrides({"a": 1}) == {"a": 1}
    (tmp_path / "ds.json").write_text(json.dumps({"a": {"b": 2}}))
    assert read_overrides(str(tmp_path / "ds.json")) == {"a": {"b": 2}}


def test_dotted_options_become_nested():
    """jsonargparse makes one key of the dots, and text of a value beside others."""
    given = {"zero_optimization": {"stage": 1}, "zero_optimization.overlap_comm": "false", "a.b.c": "2", "d": {"e.f": "text"}}
    wanted = {"zero_optimization": {"stage": 1, "overlap_comm": False}, "a": {"b": {"c": 2}}, "d": {"e": {"f": "text"}}}
    assert read_overrides(given) == wanted


@pytest.mark.parametrize(("content", "named"), [(None, "cannot read"), ("{", "cannot read"), ("[1]", "is not a JSON object")])
def test_an_unusable_file_of_overrides_is_refused(content, named, tmp_path):
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=f"trainer.deepspeed: .*{named}") as caught:
        read_overrides(str(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"zero_optimisation": {}}, "'zero_optimisation' is not supported .did you mean 'zero_optimization'"),
        ({"tensor_parallel": {}}, "'tensor_parallel' is not supported .supported keys: aio, bf16"),
        ({"optimizer": {"type": "Adam"}}, "trainer.deepspeed.optimizer is not supported: set by the recipe's optimizer"),
        ({"scheduler": {}}, "trainer.deepspeed.scheduler is not supported: set by the recipe's schedule"),
        (
            {"train_batch_size": 64},
            "trainer.deepspeed.train_batch_size is not supported: follows from trainer.micro_batch",
        ),
        ({"activation_checkpointing": {}}, "add bumblebee.transforms.ActivationCheckpointing"),
    ],
)
def test_a_key_that_would_be_ignored_is_refused(overrides, named):
    with pytest.raises(ValueError, match=named):
        deepspeed_config(options(overrides=overrides))


def test_auto_leaves_the_decision_to_the_trainer():
    """As in the files that people have for Hugging Face's Trainer."""
    theirs = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": "auto",
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
    }
    assert deepspeed_config(options(overrides=theirs)) == deepspeed_config(options())


def offloaded(**settings):
    return {"zero_optimization": {"offload_optimizer": {"device": "nvme", **settings}}}


def test_nvme_needs_stage_3_and_a_folder():
    with pytest.raises(ValueError, match="offload_optimizer.device: nvme needs trainer.zero_stage 3"):
        deepspeed_config(options(overrides=offloaded(nvme_path="/nvme")))
    with pytest.raises(ValueError, match="offload_optimizer.nvme_path is missing"):
        deepspeed_config(options(overrides=offloaded(), zero_stage=3))
    assert uses_nvme(deepspeed_config(options(overrides=offloaded(nvme_path="/nvme"), zero_stage=3)))
    assert not uses_nvme(deepspeed_config(options(zero_stage=3)))
