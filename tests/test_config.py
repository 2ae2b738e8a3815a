"""BumblebeeConfig rejects inconsistent values by name; its presets equal the published configs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee import BumblebeeConfig
from bumblebee.config import PRESETS

# Parameters of the published Qwen2.5 weights and of Qwen3-30B-A3B; `parameters_by_hand` computes the same from the shapes.
PUBLISHED = {
    "0.5b": 494_032_768,
    "1.5b": 1_543_714_304,
    "3b": 3_085_938_688,
    "7b": 7_615_616_512,
    "14b": 14_770_033_664,
    "30b-a3b": 30_532_122_624,
    "32b": 32_763_876_352,
    "72b": 72_706_203_648,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def parameters_by_hand(c: BumblebeeConfig) -> int:
    """The sum over the weights of a Qwen2, or of a Qwen3-MoE."""
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = c.hidden_size * (2 * queries + 2 * keys) + (queries + 2 * keys if c.attention_bias else 0)
    attention += 2 * c.head_dim if c.qk_norm else 0
    experts = c.hidden_size * (c.num_experts + c.num_experts * 3 * (c.moe_intermediate_size or 0))
    layer = attention + (experts or 3 * c.hidden_size * c.intermediate_size) + 2 * c.hidden_size
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return tables + c.num_hidden_layers * layer + c.hidden_size


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    assert parameters_by_hand(BumblebeeConfig.preset(name)) == PUBLISHED[name]


def test_every_preset_but_the_tiny_ones_is_a_published_one():
    assert set(PRESETS) == {*PUBLISHED, "tiny", "tiny-moe"}


def test_a_preset_takes_changes_and_stays_as_it_was():
    assert BumblebeeConfig.preset("0.5b", num_hidden_layers=4).num_hidden_layers == 4
    assert BumblebeeConfig.preset("0.5b").num_hidden_layers == 24


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown preset '0\.6b'; available: tiny, tiny-moe, 0\.5b, .*72b"):
        BumblebeeConfig.preset("0.6b")


def test_an_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown field 'num_layers' \(did you mean 'num_hidden_layers'"):
        BumblebeeConfig.preset("tiny", num_layers=4)
    with pytest.raises(ValueError, match=r"unknown field 'zzz'$"):
        BumblebeeConfig.preset("tiny", zzz=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1, got -1"),
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"hidden_size": 20}, "head_dim 5 must be even"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "su", "factor": 4.0}}, "rope_type 'su'; available: default, linear, dynamic"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_type None; available: default, linear"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' requires original_max_position_embeddings"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "beta": 1}}, "rope_type 'linear' does not support beta"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor must be in (0, 1], got 0.0"),
        ({"partial_rotary_factor": 0.4}, "head_dim 8 times partial_rotary_factor 0.4 must be even"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; available: silu, gelu"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'; available: rmsnorm, layernorm"),
        ({"residual_dropout": 1.0}, "residual_dropout must be in [0, 1), got 1.0"),
        ({"embedding_dropout": -0.1}, "embedding_dropout must be in [0, 1), got -0.1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
         "requires low_freq_factor, original_max_position_embeddings"),
        ({"attention_bias": False, "attention_output_bias": True}, "attention_output_bias requires attention_bias"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_value(tiny, changes, message):
    with pytest.raises(ValueError) as caught:
        tiny(**changes)
    assert message in str(caught.value)


def test_head_dim_is_hidden_size_by_heads_unless_it_is_set(tiny):
    assert tiny().head_dim == 8
    assert tiny(head_dim=16).head_dim == 16
    assert tiny(hidden_size=30, head_dim=8).head_dim == 8, "hidden_size need not divide then"


@pytest.mark.parametrize(("given_", "ids"), [(None, []), (7, [7]), (0, [0]), ([7, 9], [7, 9])])
def test_eos_token_ids_is_always_a_list(tiny, given_, ids):
    assert tiny(eos_token_id=given_).eos_token_ids == ids


@settings(deadline=None)
@given(
    heads=st.sampled_from([(4, 1), (4, 2), (4, 4), (6, 3)]),
    head_dim=st.integers(1, 32).map(lambda half: 2 * half),
    scaling=st.sampled_from([None, LLAMA3, {"rope_type": "default"}]),
    eos=st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9)),
)
def test_a_dict_of_its_fields_gives_the_same_config_again(heads, head_dim, scaling, eos):
    config = BumblebeeConfig(
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim, rope_scaling=scaling, eos_token_id=eos
    )
    assert BumblebeeConfig(**config.to_dict()) == config


# -- mixtures of experts -------------------------------------------------------------------------------------------------

MIXTURE = {"num_experts": 4, "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [({}, [0, 1, 2, 3, 4, 5]), ({"decoder_sparse_step": 2}, [1, 3, 5]), ({"mlp_only_layers": [0]}, [1, 2, 3, 4, 5]),
     ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, [5])],
)  # fmt: skip
def test_which_layers_are_sparse_is_a_pattern(changes, sparse):
    config = BumblebeeConfig.preset("tiny", **MIXTURE, **changes)
    assert [layer for layer in range(6) if config.is_sparse(layer)] == sparse


@pytest.mark.parametrize("none", [0, None])
def test_without_experts_their_options_say_nothing(none):
    changes = {"num_experts": none, "decoder_sparse_step": 7, "qk_norm": False, "attention_bias": True}
    assert BumblebeeConfig.preset("tiny-moe", **changes) == BumblebeeConfig.preset("tiny")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at least 1 and at most num_experts, 4; got 5"),
        ({"num_experts": -1}, "num_experts must be at least 1, got -1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, got 0"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef must be at least 0, got -0.1"),
        ({"router_bias_update_rate": float("nan")}, "router_bias_update_rate must be at least 0, got nan"),
        ({"router_balance_loss": "device"}, "router_balance_loss must be sequence or batch, got 'device'"),
        ({"shared_expert_gate": True}, "shared_expert_gate requires n_shared_experts"),
        ({"decoder_sparse_step": 7}, "none of the . layers is sparse"),
        ({"mlp_gated": False}, "experts are gated MLPs without biases"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        BumblebeeConfig.preset("tiny", **{**MIXTURE, **changes})
