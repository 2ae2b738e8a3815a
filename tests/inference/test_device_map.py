"""Device maps: layers are assigned as planned, tensors are on the device of their layer, and results are unchanged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bumblebee import Bumblebee, Generator, SamplingParams, Tokenizer
from bumblebee.inference.attention_metadata import AttentionMetadata
from bumblebee.inference.kv_cache import KVCache
from bumblebee.inference.placement.device_map import assign_parts, available_devices, layer_devices, load_on_devices, part_sizes

CPU, META = torch.device("cpu"), torch.device("meta")  # meta computes nothing, but raises if devices differ
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = ["The bee", "A", "In the garden there are many flowers, and the bees"]


# -- planning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "memory", "expected"),
    [
        ([10, 5, 5, 10], [30, 30], [0, 0, 0, 0]),  # one device is enough
        ([10, 5, 5, 10], [20, 20], [0, 0, 1, 1]),  # balanced, although 20 would fit on the first
        ([4, 4, 4, 4, 4, 4], [16, 16, 16], [0, 0, 0, 1, 1, 1]),  # two are enough
        ([4, 4, 4, 4, 4, 4], [8, 16], [0, 0, 1, 1, 1, 1]),  # proportional to their memory
        ([9, 1, 1, 1], [2, 10, 4], [1, 2, 2, 2]),  # the first is too small for the embedding
        ([0, 7, 7, 0], [7, 7], [0, 0, 1, 1]),
    ],
)
def test_parts_are_assigned_to_the_fewest_devices(sizes, memory, expected):
    assert assign_parts(sizes, memory) == expected


@pytest.mark.parametrize(("sizes", "memory"), [([10, 5, 5, 10], [14, 15]), ([10], [9]), ([3, 3, 3], [4, 4])])
def test_model_too_large_for_all_devices_raises(sizes, memory):
    with pytest.raises(ValueError, match=f"{len(memory)} devices with .* GB of free memory cannot hold them"):
        assign_parts(sizes, memory)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=20), st.lists(st.integers(1, 400), min_size=1, max_size=5))
def test_assignment_is_ordered_fits_and_exists_if_possible(sizes, memory):
    """Greedy filling finds an assignment if there is one."""
    try:
        assigned = assign_parts(sizes, memory)
    except ValueError:
        rest = list(sizes)
        for room in memory:
            while rest and rest[0] <= room:
                room -= rest.pop(0)
        assert rest
        return
    assert len(assigned) == len(sizes) and assigned == sorted(assigned)
    for number, room in enumerate(memory):
        assert sum(size for size, device in zip(sizes, assigned, strict=True) if device == number) <= room


def test_tied_head_takes_no_memory(tiny):
    tied, untied = (part_sizes(Bumblebee(tiny(tie_word_embeddings=tie)), 2) for tie in (True, False))
    table, norm = 400 * 32 * 2, 32 * 2
    assert (tied[0], tied[-1]) == (table, norm) and (untied[0], untied[-1]) == (table, table + norm)
    assert tied[1:-1] == untied[1:-1] and len(tied) == 4
    assert sum(untied) == 2 * Bumblebee(tiny(tie_word_embeddings=False)).num_parameters()


def test_device_with_a_map_and_unknown_map_raise():
    with pytest.raises(ValueError, match="device_map: auto uses all GPUs, but device is cpu"):
        available_devices("auto", "cpu")
    with pytest.raises(ValueError, match="device_map must be auto or null, got 'balanced'"):
        available_devices("balanced", "auto")


# -- the model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tiny, tokenizer_folder, tmp_path_factory):
    """By ``tie_word_embeddings``; a large init std separates the top logits by far more than rounding."""
    folders = {}
    for tie in (True, False):
        folder = folders[tie] = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        Bumblebee(tiny(tie_word_embeddings=tie, initializer_range=0.3, num_hidden_layers=4)).save_pretrained(folder)
        Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folders


def halves(folder, first: torch.device, second: torch.device) -> Bumblebee:
    """Load onto two devices, each too small for the whole model."""
    whole = Bumblebee.from_pretrained(folder).num_parameters() * 4
    return load_on_devices(folder, [first, second], [int(whole * 0.9), int(whole * 0.9)])


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_loaded_to_the_device_of_their_layer(tied, folders):
    model = halves(folders[tied], CPU, META)
    devices = [device.type for device in layer_devices(model)]
    assert devices == sorted(devices) and set(devices) == {"cpu", "meta"}
    assert {tensor.device for tensor in model.model.embed_tokens.parameters()} == {CPU}
    assert model.lm_head.weight.device == (CPU if tied else META)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("cached", [True, False])
def test_layer_inputs_are_moved_to_its_device(cached, folders):
    """The meta device computes nothing, but an operation on tensors of two devices fails."""
    model, ids = halves(folders[False], CPU, META), torch.arange(12)[None]
    with torch.no_grad():
        if not cached:
            assert model(ids).device == META and model(ids).shape == (1, 12, 400)
            packed = torch.arange(6).repeat(2)[None]
            assert model(input_ids=ids, position_ids=packed).device == META
            return
        cache = KVCache(model.config, 4, 16, torch.float32, layer_devices(model))
        assert [layer.keys.device for layer in cache.layers] == layer_devices(model)
        for together in (True, False):  # one decode token, and eleven prefill tokens of another sequence
            metadata = AttentionMetadata.build([[0], [1]], [5, 11], [1, 11], 16, CPU, together)
            position_ids = torch.tensor([4, *range(11)])[None]
            assert model(ids, position_ids, cache=cache.prepare(metadata), logits_at=torch.tensor([0, 11])).shape == (2, 400)


def test_forward_fails_without_hooks(folders):
    """The previous test can fail."""
    model = halves(folders[False], CPU, META)
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    with pytest.raises(RuntimeError, match="device"), torch.no_grad():
        model(torch.arange(12)[None])


def same_as_on_one_device(folder, first: torch.device, second: torch.device) -> None:
    model = halves(folder, first, second)
    tokenizer = Tokenizer.from_pretrained(folder)
    expected = Generator(Bumblebee.from_pretrained(folder, device=first), tokenizer).generate(PROMPTS, GREEDY)
    completions = Generator(model, tokenizer).generate(PROMPTS, GREEDY)
    assert [out.token_ids for out in completions] == [out.token_ids for out in expected]
    assert len(set(completions[0].token_ids)) > 3


@pytest.mark.parametrize("tied", [True, False])
def test_spread_model_generates_the_same_tokens(tied, folders):
    """Both devices are the CPU here: this tests loading and the hooks."""
    same_as_on_one_device(folders[tied], CPU, torch.device("cpu", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [True, False])
def test_gpu_and_cpu_generate_the_same_as_one_gpu(tied, folders):
    same_as_on_one_device(folders[tied], torch.device("cuda", 0), CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [True, False])
def test_two_gpus_generate_the_same_as_one(tied, folders):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    same_as_on_one_device(folders[tied], torch.device("cuda", 0), torch.device("cuda", 1))


def test_device_map_changes_nothing_without_gpus(folders):
    if torch.cuda.is_available():
        pytest.skip("tests a machine without GPUs")
    plain, mapped = (Generator.from_pretrained(folders[True], device_map=each) for each in (None, "auto"))
    assert [out.text for out in mapped.generate(PROMPTS, GREEDY)] == [out.text for out in plain.generate(PROMPTS, GREEDY)]
