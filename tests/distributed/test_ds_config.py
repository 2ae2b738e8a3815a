"""DeepSpeed's configuration: the user's is merged, and no key is silently ignored."""

from __future__ import annotations

import json

import pytest

from bumblebee.distributed.deepspeed.ds_config import EngineOptions, deepspeed_config, read_overrides, resolve_stage, uses_nvme


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
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, but trainer.zero_stage decides that .1.: drop it"),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "train_micro_batch_size_per_gpu is 1, but trainer.micro_batch_size decides .* .4.",
        ),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8, but trainer.accumulate decides that: drop it"),
        ({"gradient_clipping": 0.5}, "trainer.deepspeed.gradient_clipping is 0.5, but trainer.gradient_clip decides"),
        ({"bf16": {"enabled": False}}, "trainer.deepspeed.bf16.enabled is False, but trainer.precision is 'bf16': drop it"),
        (
            {"fp16": {"enabled": True}},
            "fp16.enabled is True, but trainer.precision is 'bf16': drop it or set trainer.precision to fp16",
        ),
        ({"bf16": False}, "trainer.deepspeed.bf16 must be a mapping such as {enabled: true}, got False"),
    ],
)
def test_a_contradiction_of_the_trainers_options_is_refused(overrides, named):
    with pytest.raises(ValueError, match=named):
        deepspeed_config(options(overrides=overrides))


ZERO = "trainer.deepspeed.zero_optimization"
OFFLOAD_RATIO = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}


@pytest.mark.parametrize(
    ("stage", "overrides", "named"),
    [
        (
            1,
            {"zero_optimization": {"overlap_comm": True}},
            f"{ZERO}.overlap_comm is true, which needs .*zero_stage 2 or 3, not 1",
        ),
        (
            0,
            {"zero_optimization": {"overlap_comm": True}},
            f"{ZERO}.overlap_comm is true, which needs .*zero_stage 2 or 3, not 0",
        ),
        (2, {"zero_optimization": {"compute_grad_norm": False}}, f"{ZERO}.compute_grad_norm is false, but the gradient norm"),
        (1, {"zero_optimization": {"legacy_stage1": True}}, f"{ZERO}.legacy_stage1 is true, but"),
        (2, {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, f"{ZERO}.zenflow is not supported"),
        (
            2,
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            f"{ZERO}.offload_param needs trainer.zero_stage 3, not 2",
        ),
        (
            0,
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            f"{ZERO}.offload_optimizer needs .* 1, 2 or 3, not 0",
        ),
        (2, OFFLOAD_RATIO, f"{ZERO}.offload_optimizer.ratio below 1 needs trainer.zero_stage 3"),
        (1, {"zero_optimization": {"offload_optimizer": "cpu"}}, f"{ZERO}.offload_optimizer must be a mapping .*, got 'cpu'"),
        (1, {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "device must be none, cpu or nvme, got 'gpu'"),
        (
            2,
            {"gradient_predivide_factor": 2},
            f"gradient_predivide_factor needs {ZERO}.reduce_scatter false at trainer.zero_stage 2",
        ),
        (3, {"prescale_gradients": True}, f"prescale_gradients needs {ZERO}.reduce_scatter false at trainer.zero_stage 3"),
        (1, {"communication_data_type": "int8"}, "communication_data_type must be fp32, bf16 or fp16, got 'int8'"),
    ],
)
def test_what_deepspeed_refuses_or_ignores_is_one_line(stage, overrides, named):
    with pytest.raises(ValueError, match=named):
        deepspeed_config(options(zero_stage=stage, overrides=overrides))


def test_overlap_of_communication_works_at_stages_2_and_3():
    for stage in (2, 3):
        config = deepspeed_config(options(zero_stage=stage, overrides={"zero_optimization": {"overlap_comm": True}}))
        assert config["zero_optimization"]["overlap_comm"] is True


def test_the_stage_is_the_trainers_or_that_of_the_file_or_1(tmp_path):
    file = tmp_path / "ds_z3_config.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert [resolve_stage(None, None), resolve_stage(2, None), resolve_stage(None, str(file)), resolve_stage(3, str(file))] == [
        1, 2, 3, 3,
    ]  # fmt: skip
    assert resolve_stage(None, {"zero_optimization": {"stage": "auto"}}) == 1
    with pytest.raises(ValueError, match="trainer.zero_stage is 1, but zero_optimization.stage in .*ds_z3_config.json is 3"):
        resolve_stage(1, str(file))
    with pytest.raises(ValueError, match=f"{ZERO}.stage must be 0, 1, 2 or 3, got 5"):
        resolve_stage(None, {"zero_optimization.stage": "5"})


def test_steps_per_print_is_the_users():
    assert deepspeed_config(options(overrides={"steps_per_print": 2000}))["steps_per_print"] == 2000


@pytest.mark.parametrize(
    ("precision", "stage", "section", "named"),
    [
        ("fp32", 0, {"enabled": True}, "enabled is True, but trainer.precision is 'fp32': drop it or set trainer.precision"),
        ("fp32", 2, {"enabled": True}, "enabled is True, but trainer.precision is 'fp32': drop it or set trainer.precision"),
        (
            "bf16",
            1,
            {"enabled": True},
            "enabled is True, but .* 'bf16' has weights of that dtype at trainer.zero_stage 1: drop it, or set .* 0",
        ),
        ("bf16", 0, {"enabled": False}, "enabled is False, but trainer.precision decides that .True.: drop it"),
        ("bf16", 0, {"dtype": "float16"}, "dtype is 'float16', but trainer.precision decides that .'bfloat16'.: drop it"),
        ("bf16", 1, True, " must be a mapping such as {enabled: true}, got True"),
    ],
)
def test_autocast_against_the_precision_is_refused(precision, stage, section, named):
    with pytest.raises(ValueError, match=f"trainer.deepspeed.torch_autocast.?{named}"):
        deepspeed_config(options(precision=precision, zero_stage=stage, overrides={"torch_autocast": section}))


def test_autocast_replaces_deepspeeds_half_precision_at_stage_0():
    config = deepspeed_config(options(zero_stage=0, overrides={"bf16": {"enabled": True}}))
    assert config == deepspeed_config(options(zero_stage=0)) and "bf16" not in config


def test_repeating_the_trainers_options_is_accepted():
    assert deepspeed_config(options(overrides={"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}))


def test_overrides_are_none_a_dict_or_a_file(tmp_path):
    assert read_overrides(None) == {}
    assert read_overrides({"a": 1}) == {"a": 1}
    (tmp_path / "ds.json").write_text(json.dumps({"a": {"b": 2}}))
    assert read_overrides(str(tmp_path / "ds.json")) == {"a": {"b": 2}}


def test_dotted_options_become_nested():
    """jsonargparse keeps dotted keys, and values as text."""
    parsed = {"zero_optimization": {"stage": 1}, "zero_optimization.overlap_comm": "false", "a.b.c": "2", "d": {"e.f": "text"}}
    nested = {"zero_optimization": {"stage": 1, "overlap_comm": False}, "a": {"b": {"c": 2}}, "d": {"e": {"f": "text"}}}
    assert read_overrides(parsed) == nested


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
    """As in configuration files for Hugging Face's Trainer."""
    config = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": "auto",
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
    }
    assert deepspeed_config(options(overrides=config)) == deepspeed_config(options())


def offloaded(**settings):
    return {"zero_optimization": {"offload_optimizer": {"device": "nvme", **settings}}}


def test_nvme_needs_stage_3_and_a_folder():
    with pytest.raises(ValueError, match="offload_optimizer.device: nvme needs trainer.zero_stage 3"):
        deepspeed_config(options(overrides=offloaded(nvme_path="/nvme")))
    with pytest.raises(ValueError, match="offload_optimizer.nvme_path is missing"):
        deepspeed_config(options(overrides=offloaded(), zero_stage=3))
    assert uses_nvme(deepspeed_config(options(overrides=offloaded(nvme_path="/nvme"), zero_stage=3)))
    assert not uses_nvme(deepspeed_config(options(zero_stage=3)))


@pytest.mark.parametrize("nothing", [None, {}, {"device": "none"}, {"device": "auto"}, "auto"])
def test_offload_names_the_device_of_what_is_offloaded(nothing):
    offloaded = {"offload_optimizer": {"device": "cpu"}, "offload_param": nothing}
    assert options(overrides={"zero_optimization": offloaded}).offload == {"optimizer": "cpu"}
    assert options(overrides={"zero_optimization": {"offload_optimizer": nothing}}).offload == {}
    assert options(overrides={"zero_optimization": "auto"}).offload == {}
