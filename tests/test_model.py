"""The complete model: shapes, losses, tied weights, overridden builders, sizes on the meta device."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from torch import nn

from bumblebee import Bumblebee, BumblebeeConfig, Generator, SamplingParams
from bumblebee.config import PRESETS
from bumblebee.model import Block
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.lm_head import LMHead
from bumblebee.nn.mlp import MLP, GatedMLP

B, T, V = 2, 9, 64


@pytest.fixture(scope="module")
def model(tiny) -> Bumblebee:
    torch.manual_seed(0)
    return Bumblebee(tiny(vocab_size=V, initializer_range=0.2))


@pytest.fixture(scope="module")
def input_ids() -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))


def test_logits_have_a_row_for_each_position(model, input_ids):
    assert model(input_ids).shape == (B, T, V)


def test_a_position_does_not_see_later_ones(model, input_ids):
    changed = input_ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    before, after = model(input_ids), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-6)
    assert ((before[:, 5:] - after[:, 5:]).abs().amax(-1) > 1e-3).all()


def test_logits_at_selects_tokens_of_the_flattened_batch(model, input_ids):
    places = torch.tensor([3, 8, input_ids.shape[1] + 2])
    at = model(input_ids, logits_at=places)
    assert at.shape == (3, V)
    torch.testing.assert_close(at, model(input_ids).flatten(0, 1)[places], rtol=0, atol=1e-5)


def test_losses_are_the_cross_entropy_of_the_logits(model, input_ids):
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = IGNORE_INDEX
    expected = nn.functional.cross_entropy(model(input_ids).flatten(0, 1), labels.flatten(), reduction="none")
    losses = model(input_ids, labels=labels)
    torch.testing.assert_close(losses.flatten(), expected, rtol=0, atol=1e-5)
    assert losses[:, -1].tolist() == [0.0, 0.0]


def test_batch_without_targets_gives_zero_loss_and_gradients(model, input_ids):
    model.zero_grad()
    losses = model(input_ids, labels=torch.full_like(input_ids, IGNORE_INDEX))
    losses.sum().backward()
    assert losses.eq(0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.eq(0).all(), name


@pytest.mark.parametrize("attention", ["naive", "sdpa", "auto"])
def test_the_choice_of_attention_does_not_change_the_logits(model, input_ids, attention):
    other = Bumblebee(model.config, attention=attention)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(input_ids), model(input_ids), rtol=0, atol=1e-5)


def test_unavailable_attention_is_refused_at_construction(tiny):
    with pytest.raises(ValueError, match="unknown attention 'fast'"):
        Bumblebee(tiny(), attention="fast")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"'flash' cannot run: .*no GPU is visible$"):
            Bumblebee(tiny(), attention="flash")


def test_initial_weights_follow_the_seed_and_the_config(tiny):
    def build(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return Bumblebee(tiny(initializer_range=0.05)).state_dict()

    one, again, other = build(1), build(1), build(2)
    assert all(torch.equal(one[key], again[key]) for key in one)
    weight = one["model.layers.1.mlp.gate_proj.weight"]
    assert not torch.equal(weight, other["model.layers.1.mlp.gate_proj.weight"])
    assert weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert one["model.layers.0.self_attn.q_proj.bias"].eq(0).all() and one["model.norm.weight"].eq(1).all()


def test_a_tied_head_is_the_embedding_table_and_counted_once(tiny):
    tied, untied = Bumblebee(tiny()), Bumblebee(tiny(tie_word_embeddings=False))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == 400 * 32


def test_state_dict_keys_are_those_of_hugging_face(tiny):
    keys = set(Bumblebee(tiny(num_hidden_layers=1, attention_output_bias=True)).state_dict())
    attention = {f"self_attn.{name}_proj.{part}" for name in "qkvo" for part in ("weight", "bias")}
    rest = {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    layer = {f"model.layers.0.{name}" for name in attention | rest | norms}
    assert keys == layer | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("3b", 3_085_938_688), ("7b", 7_615_616_512),
        ("14b", 14_770_033_664), ("30b-a3b", 30_532_122_624), ("32b", 32_763_876_352), ("72b", 72_706_203_648),
    ],
)  # fmt: skip
def test_preset_has_the_published_parameter_count(name, parameters):
    with torch.device("meta"):
        model = Bumblebee(BumblebeeConfig.preset(name))
    assert model.num_parameters() == parameters
    assert all(parameter.is_meta for parameter in model.parameters())


def test_tiny_has_five_million_parameters():
    with torch.device("meta"):
        assert 4.5e6 < Bumblebee(BumblebeeConfig.preset("tiny")).num_parameters() < 5.5e6
    assert len(PRESETS) == 10


class Research(Bumblebee):
    """Another norm, and another feed-forward part in every second layer."""

    def build_norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.hidden_size)

    def build_mlp(self, layer: int) -> nn.Module:
        size = self.config.hidden_size
        plain = nn.Sequential(nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))
        return plain if layer % 2 else super().build_mlp(layer)


def test_a_subclass_that_overrides_norm_and_ffn_works_and_trains(tiny, input_ids):
    torch.manual_seed(0)
    model = Research(tiny(vocab_size=V))
    assert isinstance(model.model.layers[0].mlp, GatedMLP) and isinstance(model.model.layers[1].mlp, nn.Sequential)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids[:, :-1], labels=input_ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(4.16, abs=0.3), "ln 64: nothing is known before training"
    assert losses[-1] < 0.5


class OtherNorm(Bumblebee):
    def build_norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.hidden_size)


class OtherHeadNorm(Bumblebee):
    def build_head_norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.head_dim)


class OtherAttention(Bumblebee):
    def build_attention(self, layer: int) -> nn.Module:
        attention = super().build_attention(layer)
        attention.window = 3
        return attention


class OtherFFN(Bumblebee):
    def build_mlp(self, layer: int) -> nn.Module:
        return MLP(self.config.hidden_size, 48, "relu2")


class Parallel(Block):
    """Attention and feed-forward part side by side."""

    def forward(self, x, rotary, mask, cache=None):
        y = self.input_layernorm(x)
        return x + self.self_attn(y, rotary, mask, cache) + self.mlp(y)


class OtherBlock(Bumblebee):
    def build_block(self, layer: int) -> nn.Module:
        return Parallel(self.build_norm(), self.build_attention(layer), nn.Identity(), self.build_mlp(layer))


class Capped(LMHead):
    """Logits between -5 and 5."""

    def forward(self, hidden, labels=None):
        logits = 5 * torch.tanh(super().forward(hidden) / 5)
        return logits if labels is None else nn.functional.cross_entropy(logits.mT, labels, reduction="none")


class OtherHead(Bumblebee):
    def build_head(self) -> nn.Module:
        return Capped(self.config.hidden_size, self.config.vocab_size)


class NoPositions(Bumblebee):
    def build_rotary(self) -> None:
        return None


class LearnedPositions(NoPositions):
    def build_positions(self) -> nn.Module:
        return nn.Embedding(self.config.max_position_embeddings, self.config.hidden_size)


PARTS = [OtherNorm, OtherHeadNorm, OtherAttention, OtherFFN, OtherBlock, OtherHead, NoPositions, LearnedPositions]


@pytest.mark.parametrize("kind", PARTS)
def test_overridden_builder_trains_loads_and_generates(kind, tiny, tokenizer_folder, tmp_path):
    torch.manual_seed(0)
    model = kind(tiny(initializer_range=0.3))
    ids = torch.randint(0, 400, (2, 12))
    model.train()(ids[:, :-1], labels=ids[:, 1:]).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path)
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    generator = Generator.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(generator.model) is kind
    text = ids[0].tolist()
    actual = generator.generate([text], SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True))[0].token_ids
    for _ in range(6):  # without a cache
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert actual == text[12:]


def test_without_positions_token_order_does_not_matter(tiny, input_ids):
    swapped = input_ids.clone()
    swapped[:, :2] = input_ids[:, [1, 0]]
    config = tiny(vocab_size=V, num_hidden_layers=1, initializer_range=0.3)
    for kind, same in ((NoPositions, True), (LearnedPositions, False), (Bumblebee, False)):
        model = kind(config).eval()
        one, other = model(input_ids)[:, -1], model(swapped)[:, -1]
        assert torch.allclose(one, other, atol=1e-5) == same


class Scaled(Bumblebee):
    """Keeps a number of its own in the config."""

    def build_norm(self) -> nn.Module:
        norm = super().build_norm()
        nn.init.constant_(norm.weight, self.config.extra["scale"])
        return norm


def test_a_subclass_is_saved_and_loaded_as_what_it_is(tiny, input_ids, tmp_path):
    model = Research(tiny(vocab_size=V))
    model.save_pretrained(tmp_path / "m")
    again = Research.from_pretrained(tmp_path / "m")
    assert torch.equal(model(input_ids), again(input_ids))
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    assert raw["model_class"] == f"{__name__}.Research"
    assert raw["architectures"] == ["BumblebeeForCausalLM"], "no Hugging Face model computes this"


def test_subclass_is_imported_only_with_trust_remote_code(tiny, input_ids, tmp_path, monkeypatch):
    model = Scaled(tiny(vocab_size=V, extra={"scale": 0.5}))
    model.save_pretrained(tmp_path / "m")
    monkeypatch.delitem(sys.modules, __name__)
    with pytest.raises(ValueError, match=rf"was saved by {__name__}.Scaled, whose code would have to be imported"):
        Bumblebee.from_pretrained(tmp_path / "m")
    assert __name__ not in sys.modules
    again = Bumblebee.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert type(again).__name__ == "Scaled" and again.config == model.config and again.config.extra == {"scale": 0.5}
    assert torch.equal(model(input_ids), again(input_ids))


@pytest.mark.parametrize("path", ["no_such_module.Model", f"{__name__}.NoSuchModel", "Model"])
def test_a_subclass_that_cannot_be_found_is_named(tiny, tmp_path, path):
    Bumblebee(tiny()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["BumblebeeForCausalLM"], "model_class": path}))
    with pytest.raises(ValueError, match=f"was saved by {path}, which cannot be imported"):
        Bumblebee.from_pretrained(tmp_path, trust_remote_code=True)


def test_another_models_weights_are_where_a_subclass_begins(tiny, tmp_path):
    Bumblebee(tiny(extra={})).save_pretrained(tmp_path)
    model = Scaled.from_pretrained  # a folder of Bumblebee itself names no class
    with pytest.raises(KeyError, match="scale"):
        model(tmp_path)

    class Same(Bumblebee):
        pass

    assert Same.from_pretrained(tmp_path).config.model_class.endswith("Same")


def test_overriding_the_former_build_ffn_is_refused():
    with pytest.raises(TypeError, match="build_ffn is never called: the method was renamed to build_mlp"):
        type("Old", (Bumblebee,), {"build_ffn": lambda self, layer: None})
