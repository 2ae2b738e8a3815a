"""Whole models with quantized weights: quality, memory while loading, what stays as stored, and what is refused."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from bumblebee import Bumblebee, Generator, SamplingParams, Tokenizer
from bumblebee.checkpoint import weight_loader
from bumblebee.inference.placement.device_map import load_on_devices, part_sizes
from bumblebee.lora import LoRA
from bumblebee.models.loading import load_model
from bumblebee.nn.moe import Experts
from bumblebee.nn.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from datamodules import record_files

SAMPLES = Path(__file__).parent.parent.parent / "recipes" / "samples"
GREEDY = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)
LOSS = {"int8": 0.01, "int4": 0.03}  # relative to the model's own perplexity


@pytest.fixture(scope="module")
def ids(tokenizer_folder: Path) -> torch.Tensor:
    """The sample texts in rows of 65 tokens; the last 16 are held out."""
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    texts = [record_files.text_of(record) for record in record_files.read(str(SAMPLES / "pretrain.jsonl"))]
    ids = torch.tensor([id for text in texts for id in tokenizer.encode(text)])
    return ids[: len(ids) // 65 * 65].view(-1, 65)


@pytest.fixture(scope="module")
def folder(tiny, tokenizer_folder, ids, tmp_path_factory) -> Path:
    """A model trained for two seconds, with a tied head and biases."""
    torch.manual_seed(0)
    model = Bumblebee(tiny(hidden_size=64, intermediate_size=128, tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        rows = ids[:-16][torch.arange(8 * step, 8 * step + 8) % (len(ids) - 16)]
        loss = model(rows[:, :-1], labels=rows[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@torch.no_grad()
def perplexity(model: nn.Module, rows: torch.Tensor) -> float:
    return model(rows[:, :-1], labels=rows[:, 1:]).mean().exp().item()


def reference(folder: Path, quantized: nn.Module) -> Bumblebee:
    """The ordinary model with the dequantized weights."""
    model = Bumblebee.from_pretrained(folder).eval()
    model.load_state_dict(quantized.state_dict())
    return model


@pytest.mark.parametrize("scheme", LOSS)
def test_perplexity_and_greedy_text(folder, ids, scheme):
    model = Bumblebee.from_pretrained(folder).eval()
    generator = Generator.from_pretrained(folder, quantize=scheme)
    own, held_out = perplexity(model, ids[-16:]), ids[-16:]
    assert own < 120, "the model has learned something"
    assert abs(perplexity(generator.model, held_out) / own - 1) < LOSS[scheme]
    dequantized = reference(folder, generator.model)
    assert perplexity(generator.model, held_out) == pytest.approx(perplexity(dequantized, held_out), rel=2e-3)
    if scheme == "int8":
        prompts = ["The bee", "A list is"]
        texts = [out.text for out in generator.generate(prompts, GREEDY)]
        assert texts == [out.text for out in Generator(dequantized, generator.tokenizer).generate(prompts, GREEDY)]
    assert generator.precision == f"float32, {scheme} weights"
    assert generator.model.num_parameters() == model.num_parameters()
    assert generator.model.state_dict().keys() == model.state_dict().keys()


def test_weights_are_quantized_one_by_one(folder, monkeypatch):
    """While a folder is read, no more than one weight is unquantized, beside the final size."""
    models, held = [], []

    def recorded(*args, **kwargs):
        for pair in read(*args, **kwargs):
            yield pair
            parts = [
                part for module in models[0].modules() for part in (*module._parameters.values(), *module._buffers.values())
            ]
            tensors = {part.data_ptr(): part for part in parts if part is not None and not part.is_meta}
            held.append(sum(tensor.nbytes for tensor in tensors.values()))

    class Recorder(Bumblebee):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            models.append(self)

    read = weight_loader.read_tensors
    monkeypatch.setattr(weight_loader, "read_tensors", recorded)
    monkeypatch.setattr("bumblebee.models.loading.Bumblebee", Recorder)
    model = load_model(folder, quantize="int8")
    full = sum(parameter.nbytes for parameter in Bumblebee.from_pretrained(folder).parameters())
    assert max(held) == held[-1] < 0.3 * full
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert model.lm_head.quantized is model.model.embed_tokens.quantized


def test_adapters_are_merged_before(folder, tmp_path, ids):
    model = Bumblebee.from_pretrained(folder)
    LoRA(rank=4, alpha=8, dropout=0.0)(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    merged, quantized = load_model(tmp_path), load_model(tmp_path, quantize="int8")
    assert perplexity(quantized, ids[:8]) == pytest.approx(perplexity(merged, ids[:8]), rel=0.02)
    with pytest.raises(ValueError, match="LoRA cannot adapt a quantized model"):
        LoRA()(quantized)


def test_router_and_experts_stay_as_stored(tiny, tmp_path, caplog):
    sparse = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "shared_expert_gate": True,
    }
    Bumblebee(tiny(tie_word_embeddings=False, **sparse)).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_model(tmp_path, quantize="int4")
    assert "of the parameters of" in caplog.text and "routed experts, untied embeddings" in caplog.text
    kinds = {type(module) for module in model.model.layers[0].mlp.modules()}
    assert Experts in kinds and QuantizedLinear in kinds
    assert type(model.model.layers[0].mlp.shared_expert_gate) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    assert [type(weight).__name__ for weight in model.lm_head.modules() if isinstance(weight, QuantizedWeight)] == [
        "Int8Weight"
    ]


def test_device_map_plans_with_quantized_sizes(folder):
    full = part_sizes(Bumblebee.from_pretrained(folder), 4)
    room = sum(full) // 2  # on one device of two fifths of the model, only the quantized one fits
    with pytest.raises(ValueError, match="cannot hold them"):
        load_on_devices(folder, [torch.device("cpu")], [room])
    load_on_devices(folder, [torch.device("cpu")], [room], quantize="int4")


def test_unknown_schemes_are_refused(folder):
    with pytest.raises(ValueError, match="quantize must be int8, int4 or null, got 'int2'"):
        Generator.from_pretrained(folder, quantize="int2")  # type: ignore[arg-type]
