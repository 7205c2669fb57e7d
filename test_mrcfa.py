"""Everything that the five scripts promise, at tiny sizes.

The golden numbers come from the released MRCFA code: its answers, at six places of each output, to
weights and clips that are functions of a name and a seed (`tensor_for`, `clip_for`).
"""
import argparse
import csv
import errno
import http.server
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import eval as evaluation
import train as training
from data import ClipDataset, decode_mask, fit, network_input, read_labels, read_split
from eval import SegmentationMetrics
from mrcfa import (MRCFA, Reference, TokenwiseConvs, load_checkpoint, load_official, mrcfa_loss,
                   reference_indices)
from segformer import (InputError, SegFormer, load_pretrained, mit, read_checkpoint,
                       segmentation_loss)

torch.set_num_threads(1)    # at tiny sizes as fast as more


# ------------------------------------------------------------------ the released code's checkpoints

def tensor_for(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith("running_var"):
        array = 1 + 0.1 * rng.rand(*shape)
    elif len(shape) >= 2:
        array = rng.randn(*shape) / np.sqrt(np.prod(shape[1:]))
    else:
        array = 0.1 * rng.randn(*shape) + (0 if name.endswith(("bias", "running_mean")) else 1)
    return torch.from_numpy(array.astype(np.float32))


# Our names -> those of the released code, whose SegFormer has NVlabs' names. <2-1> stands for 1.
RELEASED = {
    r"segformer\.encoder\.stages\.(\d)\.embed\.": r"backbone.patch_embed<\1+1>.proj.",
    r"segformer\.encoder\.stages\.(\d)\.embed_norm": r"backbone.patch_embed<\1+1>.norm",
    r"segformer\.encoder\.stages\.(\d)\.blocks": r"backbone.block<\1+1>",
    r"segformer\.encoder\.stages\.(\d)\.norm": r"backbone.norm<\1+1>",
    r"(.*)attn\.reduce": r"\1attn.sr",
    r"(.*)mlp\.dwconv": r"\1mlp.dwconv.dwconv",
    r"segformer\.head\.linears\.(\d)": r"decode_head.linear_c<\1+1>.proj",
    r"segformer\.head\.fuse": "decode_head.linear_fuse.conv",
    r"segformer\.head\.norm": "decode_head.linear_fuse.bn",
    r"segformer\.classifier\.1": "decode_head.linear_pred",
    r"query(\d)": r"decode_head.hypercorre_module.q<\1-1>",
    r"key(\d)": r"decode_head.hypercorre_module.k<\1-1>",
    r"reduce(\d)": r"decode_head.sr\1",
    r"value": "decode_head.sr1_feat",
    r"auxiliary_classifiers\.(\d)": r"decode_head.deco<\1+1>.smalldecoder",
    r"classifier": "decode_head.deco4.smalldecoder",
    r"aggregation\.g(\d)(\d)": r"aggregation.g\1to\2",
    r"aggregation\.g(.*)\.convs\.0": r"decode_head.hypercorre_module.hpn.encoder_layer\1.0.conv2",
    r"aggregation\.g(.*)\.norms\.0": r"decode_head.hypercorre_module.hpn.encoder_layer\1.1",
    r"aggregation\.g(.*)\.convs\.1": r"decode_head.hypercorre_module.hpn.encoder_layer\1.3.conv2",
    r"aggregation\.g(.*)\.norms\.1": r"decode_head.hypercorre_module.hpn.encoder_layer\1.4",
}


def renamed(key: str, names: dict[str, str]) -> str:
    """A key after all replacements at its start."""
    for pattern, theirs in names.items():
        key = re.sub(f"^{pattern}", theirs, key)
    return re.sub(r"<(\d)([+-]1)>", lambda match: str(int(match[1]) + int(match[2])), key)


def official_state(variant: str, classes: int, stride: int = 32) -> dict[str, torch.Tensor]:
    """What torch.load(released checkpoint)["state_dict"] would hold, with the recipe's numbers."""
    state = {}
    for key, value in MRCFA(variant, classes, stride).state_dict().items():
        name = renamed(key, RELEASED)
        state[name] = tensor_for(name, tuple(value.shape))
    return state | {"decode_head.conv_seg.weight": torch.zeros(classes, 128, 1, 1),
                    "decode_head.conv_seg.bias": torch.zeros(classes)}


def encoder_weights(prefix: str = "") -> dict[str, torch.Tensor]:
    """NVlabs' MiT-b0."""
    state = official_state("b0", 124)
    return {prefix + key[9:]: state[key] for key in state if key.startswith("backbone.")}


def head_weights() -> dict[str, torch.Tensor]:
    """NVlabs' head of b0 for 124 classes."""
    state = official_state("b0", 124)
    return {key: state[key] for key in state if re.search("linear_|conv_seg", key)}


def clip_for(frames: int, height: int, width: int) -> torch.Tensor:
    clip = np.random.RandomState(1234).randn(1, frames, 3, height, width)
    return torch.from_numpy(clip.astype(np.float32))


def labels_for(frames: int, height: int, width: int, classes: int) -> torch.Tensor:
    rng = np.random.RandomState(4321)
    blocks = rng.randint(0, classes, (1, frames, height // 16, width // 16))
    blocks[rng.rand(*blocks.shape) < 0.125] = 255
    return torch.from_numpy(blocks.repeat(16, -2).repeat(16, -1).astype(np.int64))


GOLDEN = {
    ("b0", 64, 96, 32, 124): {
        "logits": [-0.57985825, 0.09617523, 0.34182462, 0.47371875, 0.26770945, 0.04710338],
        "segformer": [0.03703697, -0.5957582, -0.60470593, -0.14422154, -0.96601522, -0.16774866],
        "loss": 7.153429634883025,
        "gradients": [1.086, 0.4666, 0.8, 2.7, 0.01558, 0.01536, 0.00918, 4.301, 0.7223],
    },
    ("b1", 128, 192, 32, 124): {
        "logits": [-0.67400898, 0.58559511, -0.7277863, 0.0941244, 0.19018025, -1.03584048],
        "segformer": [-0.06999993, 0.04868485, -0.2019282, -0.64870512, 0.13113964, 0.25292772],
        "loss": 6.686786305338053,
        "gradients": [0.3683, 0.3983, 0.7681, 1.754, 0.02308, 0.02669, 0.008832, 2.401, 0.3768],
    },
    ("b1", 64, 128, 16, 19): {
        "logits": [1.04973333, -0.3570041, 0.10085824, 0.82989212, 0.14103904, -2.07308969],
        "segformer": [1.02819216, 0.81969893, 0.07372515, 0.7389577, -0.48869243, 0.56695217],
        "loss": 4.414047714631646,
        "gradients": [0.8988, 0.6366, 1.146, 2.699, 0.03122, 0.02614, 0.0187, 2.405, 0.6562],
    },
}
GRADIENTS = [
    "segformer.encoder.stages.0.embed.weight", "segformer.encoder.stages.1.blocks.0.attn.kv.weight",
    "segformer.head.linears.3.weight", "segformer.head.fuse.weight", "query2.weight", "key4.weight",
    "aggregation.g2.convs.0.weight", "value.weight", "classifier.1.weight",
]


def at_six_places(x: torch.Tensor) -> np.ndarray:
    places = np.linspace(0.013 * x.numel(), 0.987 * x.numel(), 6).astype(int)
    return x.detach().double().flatten()[places].numpy()


def assert_golden(x: torch.Tensor, golden: list[float], atol: float = 1e-4):
    np.testing.assert_allclose(at_six_places(x), golden, atol=atol)


assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)     # also state dicts


@pytest.fixture(params=GOLDEN, ids=lambda case: f"{case[0]}-{case[1]}x{case[2]}-stride{case[3]}")
def released(request):
    variant, height, width, stride, classes = request.param
    model = MRCFA(variant, classes, stride).eval()
    load_official(model, {"meta": {}, "state_dict": official_state(variant, classes, stride)})
    clip, labels = clip_for(4, height, width), labels_for(4, height, width, classes)
    return model, clip, labels, GOLDEN[request.param]


# ------------------------------------------------------------------------------------------- parity

def test_inference_answers_as_the_released_code(released):
    model, clip, _, golden = released
    with torch.no_grad():
        assert_golden(model(clip), golden["logits"])
        assert_golden(model(clip[:, -1:]), golden["segformer"])
        assert_golden(model.double()(clip.double()), golden["logits"], atol=1e-7)


def test_training_answers_as_the_released_code(released):
    model, clip, labels, golden = released
    model.training = True   # and nothing below it: dropout stays off
    frame_logits, clip_logits = model(clip)
    assert_golden(frame_logits[:, -1], golden["segformer"])
    loss = mrcfa_loss(frame_logits, clip_logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-4)
    parameters = dict(model.named_parameters())
    norms = [parameters[name].grad.norm().item() for name in GRADIENTS]
    assert norms == pytest.approx(golden["gradients"], rel=2e-3)
    loss = mrcfa_loss(*model.double()(clip.double()), labels)
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-7)


@pytest.mark.parametrize("variant, classes, stride, mrcfa, segformer", [
    ("b0", 124, 32, 5.186, 3.746), ("b1", 124, 32, 16.226, 13.709),
    ("b2", 124, 32, 27.271, 24.754), ("b3", 124, 32, 47.147, None), ("b4", 124, 32, 63.917, None),
    ("b5", 124, 32, 84.517, 82.001), ("b0", 19, 16, 4.220, None), ("b1", 19, 16, 14.882, None),
])
def test_parameters_in_millions(variant, classes, stride, mrcfa, segformer):
    with torch.device("meta"):
        model = MRCFA(variant, classes, stride)

    def count(module):
        return sum(p.numel() for p in module.parameters()) / 1e6

    assert count(model) - count(model.auxiliary_classifiers) == pytest.approx(mrcfa, abs=1e-3)
    assert segformer is None or count(model.segformer) == pytest.approx(segformer, abs=1e-3)


def test_drop_path_rises_over_all_blocks():
    rates = [block.drop_path.rate for stage in mit("b0").stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])


# -------------------------------------------------------------------------------------------- model

def tiny(classes=5, stride=32, offsets=(9, 6, 3)) -> MRCFA:
    torch.manual_seed(0)
    return MRCFA("b0", classes, stride, offsets=offsets).eval()


def assert_near(x: torch.Tensor, y: torch.Tensor):
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_refinement_is_a_convolution_of_each_tokens_map():
    refine = TokenwiseConvs((1, 2, 3), (2, 1, 5))
    for clips, height, width in ((3, 6, 7), (1, 1, 1)):
        maps = torch.randn(clips, 4, height, width)     # of 4 tokens
        expected = maps.flatten(0, 1)[:, None]
        for conv, norm in zip(refine.convs, refine.norms):
            expected = norm(conv(expected)).relu()
        assert_near(refine(maps), expected[:, 0].unflatten(0, (clips, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_holds_large_affinities(dtype):
    model, clip = tiny(), torch.randn(1, 4, 3, 64, 96)
    with torch.no_grad():
        for layer in (model.query2, model.query3, model.query4):
            layer.weight *= 3e5         # affinities beyond float16's 65504
        expected = model(clip)
        with torch.autocast("cpu", dtype):
            logits = model(clip)
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_is_computed_in_float32_at_least(dtype):
    logits, labels = torch.randn(2, 5, 16, 16).to(dtype), torch.randint(0, 5, (2, 64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = segmentation_loss(logits, labels)
    wide = logits if dtype == torch.float64 else logits.float()
    assert loss.dtype == wide.dtype and torch.equal(loss, segmentation_loss(wide, labels))


@pytest.mark.parametrize("stride", [16, 32])
def test_nothing_is_made_on_a_device_of_its_own(stride):
    """On torch's meta device: what is made on another one fails here, without a GPU."""
    with torch.device("meta"):
        model = MRCFA("b0", 5, stride)
        clip = torch.zeros(2, 4, 3, 64, 96)
        labels = torch.zeros(2, 4, 64, 96, dtype=torch.int64)
    loss = mrcfa_loss(*model.train()(clip), labels)
    loss.backward()
    assert loss.is_meta and model.query2.weight.grad.is_meta
    stream = model.eval().stream()
    for _ in range(5):
        logits = stream(clip[0, 0])
    assert decode_mask(logits, (64, 96), (90, 120)).is_meta


def test_clips_of_a_batch_do_not_see_each_other():
    model, clips = tiny(), torch.randn(2, 4, 3, 64, 96)
    with torch.no_grad():
        assert_near(model(clips), torch.cat([model(clip[None]) for clip in clips]))


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("offsets", [(9, 6, 3), (2,)])
def test_stream_answers_as_the_clips_do(stride, offsets):
    model, video = tiny(stride=stride, offsets=offsets), torch.randn(14, 3, 64, 96)
    stream = model.stream()
    with torch.no_grad():
        for t, frame in enumerate(video):
            clip = video[[*reference_indices(t, offsets), t]]
            assert_near(stream(frame), model(clip[None])[0])
            assert len(stream.history) <= max(offsets)


def test_stream_keeps_the_keys_and_values_of_nine_frames_and_nothing_else():
    stream = tiny().stream()
    for _ in range(12):
        stream(torch.randn(3, 64, 96))
    kept = [x.untyped_storage().nbytes() for reference in stream.history for x in reference]
    floats = 6 * (64 + 160 + 256) + 6 * 256     # N x C_l of the keys, and of the values
    assert sum(kept) == 9 * 4 * floats


def test_reference_indices_follow_the_protocol():
    expected = {0: [], 2: [], 3: [0, 1, 2], 4: [0, 2, 3], 8: [0, 3, 6], 9: [0, 3, 6],
                10: [1, 4, 7], 40: [31, 34, 37]}
    assert {t: reference_indices(t) for t in expected} == expected
    assert reference_indices(3, (3, 2, 1)) == [0, 1, 2] and reference_indices(5, (4,)) == [1]


def test_target_reads_only_what_it_is_given():
    """Logits change with each reference, and STM at p -> 0 leaves one token of each."""
    model, clip = tiny(), torch.randn(1, 4, 3, 64, 96)
    with torch.no_grad():
        before = model(clip)
        for i in range(3):
            other = clip.clone()
            other[:, i] = torch.randn(3, 64, 96)
            assert not torch.allclose(model(other), before, atol=1e-4)
        model.keep_ratio = 1e-6
        features, fused = model.encode(clip[0])
        reference = model.keys_and_values(features, model.at_stride_8(fused))
        kept, A2, A3, A4, M2, B, output = model.reconstruct(model.queries(features), reference)
    assert [x.shape[-1] for x in (kept, A2, A3, A4, B)] == [1] * 5 and M2.shape[1] == 1
    assert (B == 1).all() and output.shape == (4, 256, 8, 12)
    value = reference.value.gather(1, kept[..., None].expand(-1, -1, 256))
    torch.testing.assert_close(output, value.mT[..., None].expand_as(output))


@pytest.mark.parametrize("variant", ["b0", "b1"])
@pytest.mark.parametrize("switches", [
    {}, {"refine": False}, {"aggregate": False}, {"keep_ratio": 1.0}, {"offsets": (3,)},
])
def test_every_parameter_learns_whatever_is_left_out(variant, switches):
    model = MRCFA(variant, 3, **switches)
    T = len(model.offsets) + 1
    logits = model(torch.randn(1, T, 3, 64, 64))
    mrcfa_loss(*logits, torch.randint(0, 3, (1, T, 64, 64))).backward()
    without = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    unused = {"query3", "key3", "reduce3", "query4", "key4"}
    assert without == (unused if "aggregate" in switches else set())


def test_without_sar_and_maa_the_finest_affinities_are_merged_as_they_are():
    aggregation = MRCFA("b0", 3, refine=False, aggregate=False).aggregation
    maps = torch.randn(2, 5, 6, 8)
    torch.testing.assert_close(aggregation.g2(maps), maps)
    torch.testing.assert_close(aggregation(maps, None, None), aggregation.g32(maps))


@pytest.mark.parametrize("aggregate, ranked_by", [(True, "key4"), (False, "key2")])
def test_stm_ranks_tokens_by_affinities_that_are_trained(aggregate, ranked_by):
    """An important token is one to which 5 positions of the target have large affinities."""
    model = MRCFA("b0", 3, keep_ratio=1 / 6, aggregate=aggregate)
    queries = [torch.ones(1, 32 // stride * 2, 32 // stride * 3, 4) for stride in (8, 16, 32)]
    token = torch.arange(6) == 4
    keys = {name: torch.zeros(1, 6, 4) for name in ("key2", "key3", "key4")}
    keys[ranked_by][:, token] = 1
    values = torch.arange(6.0).view(1, 6, 1).expand(1, 6, 256)
    steps = model.reconstruct(queries, Reference(**keys, value=values))
    assert (steps.kept == 4).all() and (steps.O_i == 4).all()


@pytest.mark.parametrize("target_only", [False, True])
def test_loss_is_the_papers(target_only):
    frame_logits, clip_logits = torch.randn(2, 2, 3, 5, 8, 10, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 3, 75, 40))
    labels[..., :7] = 255

    def cross_entropy(logits, label):       # of one frame
        full = F.interpolate(logits, (75, 40), mode="bilinear")
        return F.cross_entropy(full, label, ignore_index=255, reduction="none").mean()

    frames = [2] if target_only else [0, 1, 2]
    frame_loss = sum(cross_entropy(frame_logits[:, t], labels[:, t]) for t in frames) / len(frames)
    clip_loss = sum(cross_entropy(clip_logits[:, t], labels[:, 2]) for t in range(3)) / 3
    loss = mrcfa_loss(frame_logits, clip_logits, labels[:, 2] if target_only else labels)
    torch.testing.assert_close(loss, 0.5 * frame_loss + clip_loss)


def test_model_and_stream_refuse_what_they_cannot_take():
    model = tiny()
    for shape, named in (((1, 4, 3, 64, 90), "64x90"), ((1, 5, 3, 64, 64), "5 frames")):
        with pytest.raises(ValueError, match=named):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="3 frames"):
        model.train()(torch.zeros(1, 3, 3, 64, 64))
    with pytest.raises(ValueError, match="eval"):
        model.stream()(torch.zeros(3, 64, 64))


# ------------------------------------------------------------------------------------------ weights

@pytest.fixture(scope="module")
def segformer() -> SegFormer:
    """The one inside a released MRCFA, which the golden numbers have checked."""
    model = MRCFA("b0", 124)
    load_official(model, official_state("b0", 124))
    return model.segformer


def test_nvlabs_weights_go_into_encoder_segformer_and_mrcfa(segformer, tmp_path):
    path = tmp_path / "mit_b0.pth"
    imagenet = {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    torch.save(encoder_weights() | imagenet, path)
    for module in (mit("b0"), SegFormer("b0", 7), MRCFA("b0", 7)):
        load_pretrained(module, path)
        inside = getattr(module, "segformer", module)
        encoder = getattr(inside, "encoder", inside)
        assert_equal(encoder.state_dict(), segformer.encoder.state_dict())

    whole = encoder_weights("backbone.") | head_weights()
    model = SegFormer("b0", 124)
    load_pretrained(model, {"state_dict": whole})
    assert_equal(model.state_dict(), segformer.state_dict())
    with pytest.warns(UserWarning, match=r"classifier skipped.* \(124, .* model's \(7, "):
        assert load_pretrained(SegFormer("b0", 7), whole) == ["classifier"]
    with pytest.warns(UserWarning, match=r"head skipped.* \(256, .* model's \(768, "):
        assert load_pretrained(SegFormer("b0", 124, 768), whole) == ["head", "classifier"]


# NVlabs' names of a MiT -> others'. Keys and values are layers of their own there.
HUGGING_FACE = {
    r"patch_embed(\d)\.proj": r"encoder.patch_embeddings.<\1-1>.proj",
    r"patch_embed(\d)\.norm": r"encoder.patch_embeddings.<\1-1>.layer_norm",
    r"norm(\d)": r"encoder.layer_norm.<\1-1>",
    r"block(\d)": r"encoder.block.<\1-1>",
    r"(.*)\.norm(\d)": r"\1.layer_norm_\2",
    r"(.*)attn\.norm": r"\1attention.self.layer_norm",
    r"(.*)attn\.sr": r"\1attention.self.sr",
    r"(.*)attn\.proj": r"\1attention.output.dense",
    r"(.*)attn\.q": r"\1attention.self.query",
    r"(.*)attn\.k": r"\1attention.self.key",
    r"(.*)attn\.v": r"\1attention.self.value",
    r"(.*)mlp\.fc": r"\1mlp.dense",
}
TRANSFORMERS_5 = {      # in memory
    r"patch_embed(\d)\.proj": r"stages.<\1-1>.patch_embeddings.proj",
    r"patch_embed(\d)\.norm": r"stages.<\1-1>.patch_embeddings.layer_norm",
    r"norm(\d)": r"stages.<\1-1>.layer_norm",
    r"block(\d)": r"stages.<\1-1>.blocks",
    r"(.*)\.norm1": r"\1.layernorm_before",
    r"(.*)\.norm2": r"\1.layernorm_after",
    r"(.*)attn\.norm": r"\1attention.sequence_reduction.layer_norm",
    r"(.*)attn\.sr": r"\1attention.sequence_reduction.sequence_reduction",
    r"(.*)attn\.proj": r"\1attention.o_proj",
    r"(.*)attn\.([qkv])": r"\1attention.\2_proj",
}
MMSEGMENTATION = {      # where queries, keys and values are one layer
    r"patch_embed(\d)\.proj": r"layers.<\1-1>.0.projection",
    r"patch_embed(\d)\.norm": r"layers.<\1-1>.0.norm",
    r"norm(\d)": r"layers.<\1-1>.2",
    r"block(\d)": r"layers.<\1-1>.1",
    r"(.*)attn\.proj": r"\1attn.attn.out_proj",
    r"(.*)attn\.q\.": r"\1attn.attn.in_proj_",
    r"(.*)mlp\.fc1": r"\1ffn.layers.0",
    r"(.*)mlp\.dwconv\.dwconv": r"\1ffn.layers.1",
    r"(.*)mlp\.fc2": r"\1ffn.layers.4",
}


def in_other_names(names: dict[str, str]) -> dict[str, torch.Tensor]:
    """NVlabs' MiT-b0 in the naming of others."""
    state, others = encoder_weights(), {}
    for key, value in state.items():
        if names is MMSEGMENTATION and ".q." in key:
            value = torch.cat([value, state[key.replace(".q.", ".kv.")]])
        if names is MMSEGMENTATION and re.search(r"fc\d\.weight", key):
            value = value[..., None, None]      # a 1x1 convolution
        if ".kv." not in key:
            others[renamed(key, names)] = value
        elif names is not MMSEGMENTATION:
            for role, half in zip("kv", value.chunk(2)):
                others[renamed(key.replace("kv", role), names)] = half
    return others


@pytest.mark.parametrize("names, prefix", [
    (HUGGING_FACE, ""), (HUGGING_FACE, "segformer."), (TRANSFORMERS_5, ""),
    (TRANSFORMERS_5, "segformer."), (MMSEGMENTATION, ""), (MMSEGMENTATION, "backbone."),
])
def test_weights_of_other_namings_are_the_same_network(names, prefix, segformer):
    state = {prefix + key: value for key, value in in_other_names(names).items()}
    if names is not MMSEGMENTATION:         # ImageNet's classifier is left out
        state |= {"classifier.weight": torch.zeros(1000, 256), "classifier.bias": torch.zeros(1000)}
    model = mit("b0")
    load_pretrained(model, state)
    assert_equal(model.state_dict(), segformer.encoder.state_dict())


@pytest.mark.parametrize("names, linear", [(HUGGING_FACE, r"linear_c.\1"),
                                           (TRANSFORMERS_5, r"linear_projections.\1")])
def test_hugging_faces_heads_are_ours(names, linear, segformer):
    state = {f"segformer.{key}": value for key, value in in_other_names(names).items()}
    for key, value in head_weights().items():
        for nvlabs, theirs in (("linear_fuse.conv", "linear_fuse"), ("linear_pred", "classifier"),
                               ("linear_fuse.bn", "batch_norm")):
            key = key.replace(nvlabs, theirs)
        key = re.sub(r"linear_c(\d)", lambda match: f"linear_c{int(match[1]) - 1}", key)
        if "conv_seg" not in key:
            state[re.sub(r"linear_c(\d)", linear, key)] = value
    model = SegFormer("b0", 124)
    load_pretrained(model, state)
    assert_equal(model.state_dict(), segformer.state_dict())


def test_mmsegmentations_head_is_another_network():
    state = {f"backbone.{key}": value for key, value in in_other_names(MMSEGMENTATION).items()}
    state["decode_head.convs.0.conv.weight"] = torch.zeros(256, 32, 1, 1)
    state["decode_head.fusion_conv.conv.weight"] = torch.zeros(256, 1024, 1, 1)
    state["decode_head.conv_seg.weight"] = torch.zeros(124, 256, 1, 1)
    with pytest.warns(UserWarning, match="head skipped.*mmsegmentation"):
        load_pretrained(SegFormer("b0", 124), state)


def safetensors_bytes(state: dict[str, torch.Tensor]) -> bytes:
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        start, content = len(content), content + value.view(torch.uint8).numpy().tobytes()
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[value.dtype]
        header[name] = {"dtype": dtype, "shape": list(value.shape),
                        "data_offsets": [start, len(content)]}
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + content


def test_safetensors_are_read(tmp_path):
    state = {"a": torch.tensor([[1.5], [-2.0]]), "b": torch.tensor([3.0], dtype=torch.bfloat16)}
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors_bytes(state))
    assert_equal(read_checkpoint(path), state)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="can't be read"):
        read_checkpoint(path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    state = official_state("b0", 5)
    extra = state | {"decode_head.extra.weight": torch.zeros(1)}
    lacking = {key: value for key, value in state.items() if "sr1_feat.bias" not in key}
    for wrong, match in (
            (extra, 'for MRCFA: Unexpected .*extra.weight"'),
            (lacking, 'for MRCFA: Missing .* "value.bias"'),
            (official_state("b1", 5), r"for segformer.encoder.stages.0.embed.weight: .*\[64, "),
            (official_state("b0", 6), r"for classifier.1.bias: .*\[6\].*\[5\]")):
        with pytest.raises(ValueError, match=match) as error:
            load_official(MRCFA("b0", 5), wrong)
        assert "\n" not in str(error.value)
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole.pth")
    cut_off = (tmp_path / "whole.pth").read_bytes()[:-50]
    for content in (b"<!DOCTYPE html>", b"version https://git-lfs.github.com", b"", cut_off):
        (tmp_path / "weights.pth").write_bytes(content)
        said = f"weights.pth: can't be read as a checkpoint; it begins with {content[:40]!r}"
        with pytest.raises(ValueError, match=re.escape(said)):
            load_pretrained(SegFormer("b0", 5), tmp_path / "weights.pth")
    torch.save({"model": {}, "made": Path}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"would run code when loaded \(pathlib"):
        load_pretrained(SegFormer("b0", 5), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="no MiT weights"):
        load_pretrained(SegFormer("b0", 5), {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)})
    with pytest.raises(ValueError, match="no state dict"):
        load_pretrained(SegFormer("b0", 5), {0: 1})


@pytest.mark.parametrize("wrap", [
    lambda state: {"module." + key: value for key, value in state.items()},
    lambda state: {"_orig_mod.module." + key: value for key, value in state.items()},
    lambda state: {"module._orig_mod." + key: value for key, value in state.items()},
    lambda state: {"epoch": 3, "state_dict": {f"model.{key}": state[key] for key in state}},
    lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}},
])
def test_weights_are_found_where_trainers_put_them(wrap):
    model, other = SegFormer("b0", 3), SegFormer("b0", 3)
    load_pretrained(other, wrap(model.state_dict()))
    assert_equal(other.state_dict(), model.state_dict())
    load_official(MRCFA("b0", 3), wrap(official_state("b0", 3)))


# ------------------------------------------------------------------------------------------ metrics

def drifting_videos(seed=0, height=24, width=32, classes=124):
    """Labels that drift slowly and predictions that flicker around them, of known metrics."""
    rng = np.random.RandomState(seed)
    for length in (20, 17, 16, 31):
        scene = rng.randint(0, classes, (height // 4, (width + length) // 4 + 1))
        scene = scene.repeat(4, 0).repeat(4, 1)
        scene[rng.rand(*scene.shape) < 0.05] = 255
        labels = np.stack([scene[:, t // 12:t // 12 + width] for t in range(length)])
        noise = rng.randint(0, classes, labels.shape)
        predictions = np.where((rng.rand(*labels.shape) < 0.02) | (labels == 255), noise, labels)
        biased = rng.rand(height, width) < 0.2
        predictions[:, biased] = (predictions[:, biased] + 1) % classes
        yield labels.astype(np.uint8), predictions.astype(np.uint8)


def test_metrics_are_the_released_ones():
    metrics = SegmentationMetrics(124)
    for labels, predictions in drifting_videos():
        metrics.update(labels, torch.from_numpy(predictions).long())
    assert metrics.compute() == pytest.approx({
        "mIoU": 0.631208815370469, "weighted_IoU": 0.6805026198855385,
        "pixel_accuracy": 0.7809539339584183, "mVC8": 0.8359410863348004,
        "mVC16": 0.7408778047814949,
    }, abs=1e-9)


def test_metrics_by_hand():
    metrics = SegmentationMetrics(3)
    assert all(math.isnan(value) for value in metrics.compute().values())
    labels = np.zeros((17, 1, 4), dtype=int)
    labels[:, 0, 3] = 255
    predictions = labels % 255
    # One pixel of four flickers, inside the only window of 16 and in 5 of the 9 of 8.
    predictions[4, 0, 0] = 1
    metrics.update(labels.astype(np.uint16), predictions)
    assert metrics.compute() == pytest.approx({
        "mIoU": 50 / 51, "weighted_IoU": 50 / 51, "pixel_accuracy": 50 / 51, "mVC16": 3 / 4,
        "mVC8": (5 * 3 / 4 + 4) / 9,
    })
    np.testing.assert_equal(metrics.class_iou().tolist(), [50 / 51, math.nan, math.nan])
    metrics.update(labels[:16], 1 - predictions[:16])       # too short for consistencies
    assert metrics.compute()["mVC16"] == 3 / 4
    for wrong, match in ((np.full_like(labels, 3), "3"), (predictions[:5], "one shape"),
                         (predictions * 1.0, "integers"), (predictions - 1, "-1")):
        with pytest.raises(ValueError, match=match):
            metrics.update(labels, wrong)


def decoded_plainly(logits: torch.Tensor, network: tuple, frame: tuple) -> torch.Tensor:
    full = F.interpolate(F.interpolate(logits[None], network, mode="bilinear"), frame,
                         mode="bilinear")
    return full[0].argmax(0)


def test_masks_decode_as_two_interpolations_and_argmax():
    logits = torch.randn(21, 8, 12)
    expected = decoded_plainly(logits, (32, 48), (37, 41))
    assert torch.equal(decode_mask(logits, (32, 48), (37, 41)).long(), expected)


@pytest.mark.parametrize("network, frame", [((240, 432), (241, 427)), ((128, 192), (300, 401)),
                                            ((256, 384), (61, 99)), ((60, 108), (60, 108))])
def test_masks_of_real_videos_decode_exactly_without_interpolating_all(network, frame, monkeypatch):
    torch.manual_seed(0)
    areas = F.interpolate(torch.randn(1, 124, 2, 3), (60, 108), mode="bilinear")[0]
    logits = 5 * areas + 0.02 * torch.randn(124, 60, 108)       # a few areas of one class each
    monkeypatch.setattr(data, "interpolate_and_decode", None)
    mask = decode_mask(logits, network, frame)
    assert torch.equal(mask.long(), decoded_plainly(logits, network, frame))


# --------------------------------------------------------------------------------------------- data

CLASSES = ["sky", "road", "car"]
COLOURS = np.array([(0, 0, 0), (60, 120, 200), (90, 90, 90), (220, 60, 40)], dtype=np.uint8)


def write_videos(root: Path, lengths: dict[str, int], size=(96, 64)) -> Path:
    """A data folder in the VSPW layout: a bright square (class 2) before two halves."""
    rng = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for name, length in lengths.items():
        for t in range(length):
            labels = np.full(size[::-1], 1, dtype=np.uint8)
            labels[size[1] // 2:] = 2
            labels[20:44, 8 + 3 * t:32 + 3 * t] = 3
            labels[:4, :4] = 0
            frame = COLOURS[labels] + rng.integers(0, 20, (*labels.shape, 1), dtype=np.uint8)
            for folder, array, suffix in (("origin", frame, "jpg"), ("mask", labels, "png")):
                path = root / "data" / name / folder / f"{t:05d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    (root / "train.txt").write_text("\n".join(name for name in lengths if name != "v"))
    (root / "val.txt").write_text("\ufeffv", "utf-8")       # some editors begin a file like that
    return root


@pytest.fixture
def videos(tmp_path) -> Path:
    return write_videos(tmp_path / "videos", {"a": 6, "b": 5, "short": 2, "v": 18})


def test_inference_frames_are_resized_as_the_protocol_says():
    for size, fitted in (((1920, 1080), (853, 480)), ((320, 240), (640, 480)),
                         ((480, 640), (480, 640)), ((3000, 1), (853, 1))):
        assert fit(size, (853, 480)) == fit(size, (480, 853)) == fitted
    pixels = np.random.default_rng(0).integers(0, 256, (45, 100, 3), dtype=np.uint8)

    def bilinear(x: np.ndarray, size: int, axis: int) -> np.ndarray:
        """With half-pixel centres and no antialiasing."""
        x = np.moveaxis(x, axis, 0)
        at = ((np.arange(size) + 0.5) * len(x) / size - 0.5).clip(0, len(x) - 1)
        low, share = at.astype(int), (at % 1)[:, None, None]
        resized = (1 - share) * x[low] + share * x[(low + 1).clip(max=len(x) - 1)]
        return np.moveaxis(resized, 0, axis)

    expected = pixels.astype(float)
    for height, width in (23, 50), (32, 64):    # fitted into 50x30, then up to multiples of 32
        expected = bilinear(bilinear(expected, height, 0), width, 1).round()
    x = network_input(Image.fromarray(pixels), (50, 30))
    off = abs((x * data.STD + data.MEAN).permute(1, 2, 0).numpy() - expected)
    assert off.max() < 1.001 and (off < 1e-3).mean() > 0.99     # but for exact halves


def test_training_frames_are_shrunk_as_inference_frames_are():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    shrunk = data.cut(image, (64, 32), (0, 0, 128, 64), False, Image.Resampling.BILINEAR)
    expected = (network_input(image, (64, 32)) * data.STD + data.MEAN).permute(1, 2, 0).numpy()
    assert abs(np.array(shrunk) - expected).max() < 1.001


def test_clips_keep_frames_and_labels_together(videos, monkeypatch):
    monkeypatch.setattr(data, "photometric_distortion", lambda image, rng: image)
    clips = ClipDataset(read_split(videos, "train"), 3, (3, 2, 1), (64, 64), frame_size=(96, 64))
    assert clips.too_short == 1 and len(clips.directions) == 2
    colours = torch.from_numpy(COLOURS[1:].astype(int) + 10)
    agree, seen, moves = [], set(), set()
    for i in range(16):
        images, labels = clips[i]
        assert images.shape == (4, 3, 64, 64)
        assert labels.shape == (4, 64, 64) and labels.dtype == torch.uint8
        pixels = images * data.STD + data.MEAN
        nearest = (pixels[:, None] - colours[None, :, :, None, None]).abs().sum(2).argmin(1)
        agree.append((nearest == labels)[labels != 255].float().mean().item())
        seen |= set(labels.unique().tolist())
        x = [(label == 2).nonzero()[:, 1].float().mean() for label in labels]
        moves.add(bool(x[-1] > x[0]))
    assert np.mean(agree) > 0.95 and seen == {0, 1, 2, 255}
    assert moves == {True, False}       # flipped or backwards


def test_a_clip_depends_on_seed_and_index_alone(videos):
    def clips(seed):
        return ClipDataset(read_split(videos, "train"), 3, (3, 2, 1), (32, 32), (96, 64), seed=seed)

    first, second = clips(0), clips(0)
    later = second[5][0]
    assert torch.equal(first[3][0], second[3][0]) and torch.equal(first[5][0], later)
    for other in (clips(1)[3], first[5]):
        assert not torch.equal(first[3][0], other[0])


def test_distortion_changes_each_frame_within_its_limits():
    image, changed = Image.new("RGB", (8, 8), (100, 150, 200)), []
    for i in range(200):
        distorted = data.photometric_distortion(image, np.random.default_rng(i))
        changed.append(distorted.getpixel((0, 0)))
    changed = np.array(changed)
    same = (abs(changed - (100, 150, 200)) <= 1).all(1).mean()
    assert 0.01 < same < 0.2        # 1/16 of the draws change nothing
    assert changed.min() >= 0 and changed[:, 2].max() == 255 and np.ptp(changed, axis=0).min() > 60


@pytest.fixture
def few_synthetic(monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_VIDEOS", {"train": 2, "val": 2})


def files_in(folder: Path) -> dict[Path, bytes]:
    """All files in a folder, by their paths in it."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_synthetic_videos_hide_what_and_not_where_and_not_in_the_references(few_synthetic,
                                                                            tmp_path):
    data.write_synthetic(tmp_path / "a")
    data.write_synthetic(tmp_path / "b")
    files = files_in(tmp_path / "a")
    assert files == files_in(tmp_path / "b") and len(files) == 3 + 4 * 20 * 2
    train, val = (read_split(tmp_path / "a", split) for split in ("train", "val"))
    assert not {video.name for video in train} & {video.name for video in val}
    bad = 0
    for video in train + val:
        labels = [np.array(read_labels(path, data.SYNTHETIC_SIZE, 5)) for path in video.masks]
        assert len(np.unique(labels)) > 1
        assert (labels[0] != labels[-1]).mean() > 0.05      # things move
        texture = []
        for frame, label in zip(data.read_frames(video.frames), labels):
            # Textures vary over half a period. Noise varies over a pixel and is left out.
            grey = torch.from_numpy(np.array(frame.convert("L"), dtype=float))
            x = F.avg_pool2d(grey[None], 3, 1, 1)[0].numpy()
            change = abs(x[:, 8:] - 2 * x[:, 4:-4] + x[:, :-8])
            texture.append(change[label[:, 4:-4] > 0].mean())
        for t in range(9, 20):
            if texture[t] < 0.6 * np.median(texture):
                bad += 1
                assert min(texture[t - offset] for offset in (3, 6, 9)) > 0.6 * np.median(texture)
    assert bad >= 4


def test_interrupted_synthetic_videos_leave_nothing(few_synthetic, tmp_path, monkeypatch):
    def interrupted(rng, real=data.synthetic_video):
        yield next(real(rng))
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "synthetic_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.write_synthetic(tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_frames_are_read_as_they_are_displayed(tmp_path):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    turned = Image.Exif()
    turned[0x0112] = 6      # display it turned to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    assert np.array_equal(np.array(data.read_frame(tmp_path / "turned.png")), np.rot90(pixels, -1))
    Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 1000).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="deep.png.*more than 8 bits"):
        data.read_frame(tmp_path / "deep.png")


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    def listed(names: list[str]) -> list[str]:
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            (folder / f"{name}.jpg").touch()
        return [path.stem for path in data.list_frames(folder)]

    for names in ([f"{t}" for t in range(1, 13)], ["b_2", "b_10", "c_1"],
                  ["frame_9999", "frame_10000"]):
        assert listed(names) == names
    for names in (["0.9", "0.95", "1.0", "1.05", "1.1"], ["v1.9", "v1.10"]):
        with pytest.raises(InputError, match="number the frames without dots"):
            listed(names)


def test_labels_are_read_as_the_layout_says(tmp_path, monkeypatch):
    path, opened, real = tmp_path / "mask.png", [], Image.open
    Image.fromarray(np.array([[0, 1, 2, 3, 255]], dtype=np.uint8)).save(path)
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or real(path))
    assert np.array(read_labels(path, (5, 1), 3)).tolist() == [[255, 0, 1, 2, 255]]
    assert opened == [path]         # a mask is decoded once
    with pytest.raises(ValueError, match="label 3, but there are 2 classes"):
        read_labels(path, (5, 1), 2)


def test_masks_of_other_kinds_are_refused(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "colours.png")
    Image.new("L", (6, 4), 3).save(tmp_path / "jpeg.png", "JPEG")
    Image.new("I;16", (6, 4), 3).save(tmp_path / "deep.png")
    Image.new("L", (6, 4), 255).convert("1").save(tmp_path / "optimised.png")
    packed = Image.new("P", (6, 4), 1)
    packed.putpalette([0, 0, 0, 3, 3, 3])           # a picture of the value 3, stored as 1
    packed.save(tmp_path / "packed.png")
    for name, message in (("colours", "mode RGB"), ("jpeg", "not a PNG"), ("deep", "mode I;16"),
                          ("optimised", "has fewer than 8 bits"),
                          ("packed", "its palette shows greys that are not the stored")):
        with pytest.raises(InputError, match=f"{name}.png.*{message}"):
            data.read_index_map(tmp_path / f"{name}.png", (6, 4))
    packed.putpalette([0, 0, 0, 128, 0, 0])         # a palette of colours means its indices
    packed.save(tmp_path / "coloured.png")
    assert read_labels(tmp_path / "coloured.png", (6, 4), 3).getextrema() == (0, 0)


def test_predicted_masks_are_read_by_their_colours(tmp_path):
    """Editors and optimisers renumber the palette of a mask that they save."""
    assert len(data.PALETTE_INDEX) == 256       # no two classes have one colour
    label = np.arange(24, dtype=np.uint8).reshape(4, 6) % 5
    label[0, 0] = 255
    colours = np.array(data.PALETTE).reshape(-1, 3)
    order = np.array([3, 255, 0, 4, 2, 1])      # the class that each new index stands for
    edited = Image.fromarray(np.argsort(order)[np.searchsorted(np.sort(order), label)]
                             .astype(np.uint8))
    edited.putpalette(colours[order].ravel().tolist())
    edited.save(tmp_path / "edited.png")
    assert np.array_equal(read_labels(tmp_path / "edited.png", (6, 4), 5, first_label=0), label)
    with pytest.raises(InputError, match="edited.png: has the colours of a predicted mask"):
        read_labels(tmp_path / "edited.png", (6, 4), 5, first_label=1)
    other = edited.convert("RGB")
    other.putpixel((5, 3), (255, 0, 0))         # and is saved with a palette of its own
    other.quantize().save(tmp_path / "other.png")
    with pytest.raises(InputError, match="other.png: has colours of predicted masks, and others"):
        data.read_index_map(tmp_path / "other.png", (6, 4))
    black = Image.new("P", (6, 4), 0)           # and it alone tells nothing
    black.putpalette([0, 0, 0, 128, 0, 0])
    black.save(tmp_path / "black.png")
    assert read_labels(tmp_path / "black.png", (6, 4), 5, first_label=0).getextrema() == (0, 0)


def test_text_files_are_utf8(tmp_path):
    path = tmp_path / "classes.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes("ciel é\r\n\r\n车\r\n".encode(encoding))
        assert data.read_lines(path) == ["ciel é", "车"]
    for encoding in ("latin-1", "utf-16"):
        path.write_bytes("ciel é".encode(encoding))
        with pytest.raises(InputError, match="classes.txt: is not UTF-8"):
            data.read_lines(path)


@pytest.mark.parametrize("names, message", [
    ("../v", "'../v' is not the name of a folder in"), ("/v", "'/v' is not the name of"),
    (".", "'.' is not the name of a folder in"), ("v\nv/", "names the video v twice"),
])
def test_names_of_videos_stay_in_their_folder(names, message, videos):
    (videos / "val.txt").write_text(names)
    with pytest.raises(InputError, match=message):
        read_split(videos, "val")


def write_cityscapes(root: Path) -> Path:
    """Labelled frames with all frames around, with none after, and without one of those before."""
    rng = np.random.default_rng(0)
    for split, city, sequence, target, missing in (
            ("train", "aachen", 0, 19, []), ("train", "bochum", 3, 42, [45]),
            ("train", "bochum", 4, 19, [13]), ("train", "ulm", 0, 19, [16, 22]),
            ("val", "munster", 1, 19, []), ("val", "munster", 2, 30, [27])):
        frames = root / "leftImg8bit_sequence" / split / city
        labels = root / "gtFine" / split / city
        frames.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for t in range(target - 19, target + 11):
            if t not in missing:
                path = frames / f"{city}_{sequence:06d}_{t:06d}_leftImg8bit.png"
                Image.new("RGB", (64, 32), (t, sequence, 0)).save(path)
        ids = rng.choice([0, 1, 7, 8, 24, 33], (4, 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        path = labels / f"{city}_{sequence:06d}_{target:06d}_gtFine_labelIds.png"
        Image.fromarray(ids).save(path)
    return root


def test_cityscapes_clips_follow_the_frames_numbers(tmp_path):
    root = write_cityscapes(tmp_path / "cityscapes")
    assert [len(video.frames) for video in read_split(root, "train", (9, 6, 3))] == [4, 4, 4, 1]
    train = read_split(root, "train", (9, 6, 3), training=True)     # both sides of a frame
    clips = ClipDataset(train, 19, (9, 6, 3), (32, 32), (64, 32))
    assert clips.too_short == 1     # ulm's, with a frame missing on both sides
    seen = {directions[0][0].name: set() for directions in clips.directions}
    for i in range(60):
        clip, _ = clips.choose(i)
        name = clip.frames[-1].name.removesuffix("_leftImg8bit.png")
        assert clip.masks[:3] == [None] * 3 and clip.masks[3].name.startswith(name)
        seen[name].add(tuple(int(path.name.split("_")[2]) for path in clip.frames))
    assert seen == {
        "aachen_000000_000019": {(10, 13, 16, 19), (28, 25, 22, 19)},
        "bochum_000003_000042": {(33, 36, 39, 42)}, "bochum_000004_000019": {(28, 25, 22, 19)},
    }
    images, labels = clips[0]
    assert images.shape == (4, 3, 32, 32) and labels.shape == (32, 32)

    ids = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    Image.fromarray(np.array([[0, 7, 8, 24, 33, 255]], dtype=np.uint8)).save(ids)
    assert np.array(read_labels(ids, (6, 1), 19)).tolist() == [[255, 0, 1, 11, 18, 255]]
    train_ids = ids.with_name("aachen_000000_000019_gtFine_labelTrainIds.png")
    Image.fromarray(np.array([[0, 18, 255]], dtype=np.uint8)).save(train_ids)
    assert np.array(read_labels(train_ids, (3, 1), 19)).tolist() == [[0, 18, 255]]
    assert read_split(root, "train", (3,))[0].masks == [None, train_ids]
    Image.fromarray(np.array([[19]], dtype=np.uint8)).save(train_ids)
    with pytest.raises(ValueError, match="label 19"):
        read_labels(train_ids, (1, 1), 19)


# -------------------------------------------------------------------------------------- the scripts

SMALL = ["--crop", 64, 64, "--frame-size", 96, 64, "--batch-size", 2, "--dilation", 3, 2, 1,
         "--warmup", 1, "--workers", 0, "--log-every", 1, "--eval-every", 0]


@pytest.fixture
def run(monkeypatch):
    """run(script, arguments ...) calls a script's main in this process -> its exit code."""
    monkeypatch.setattr(training.tqdm, "write", print)

    def run(script, *args) -> int:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            data.run_script(script.main)
        except SystemExit as stop:
            return stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return 0

    return run


def saved(out: Path, name: str = "last.pt") -> dict:
    """A checkpoint of a run."""
    return torch.load(out / name, weights_only=True)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def released_arguments(tmp_path: Path, classes=3, change=None) -> list:
    """Arguments of eval.py that name a small released checkpoint."""
    path, state = tmp_path / "released.pth", official_state("b0", classes)
    torch.save({"meta": {}, "state_dict": state | (change or {})}, path)
    return ["--checkpoint", path, "--model", "mrcfa_b0", "--num-classes", classes,
            "--frame-size", 96, 64]


def write_checkpoint(path: Path, model, name: str, classes: list[str] | None = None):
    """A checkpoint of train.py for the videos of these tests."""
    config = {"model": name, "classes": classes or CLASSES, "frame_size": [96, 64],
              "offsets": [9, 6, 3], "reference_stride": getattr(model, "reference_stride", None),
              "keep_ratio": None, "refine": True, "aggregate": True}
    torch.save({"model": model.state_dict(), "config": config}, path)


def errors_of(script, capsys) -> list[str]:
    """The lines in which a script says what went wrong."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith((f"{script.__name__}.py", "Traceback"))]


@pytest.mark.parametrize("model", ["mrcfa_b0", "segformer_b0"])
def test_train_evaluate_save_and_score(model, videos, tmp_path, run, capsys):
    out = tmp_path / "run"
    train = ["--model", model, "--data", videos, "--out", out, *SMALL]
    assert run(training, *train, "--iters", 3, "--eval-every", 2) == 0
    assert "(1 are too short" in capsys.readouterr().err
    log = log_of(out)
    assert [line["iteration"] for line in log if "loss" in line] == [1, 2, 3]
    assert [line["iteration"] for line in log if "mIoU" in line] == [2, 3]
    assert saved(out)["config"].items() >= {
        "model": model, "classes": CLASSES, "frame_size": [96, 64], "reference_stride": 32,
        "offsets": [3, 2, 1], "keep_ratio": None, "refine": True, "aggregate": True, "iters": 3,
        "data": str(videos),
    }.items()
    with Image.open(out / "pictures" / "v.webp") as animation:
        # Frame, label, masks, an MRCFA's single frames, legend.
        panels = 5 if model == "mrcfa_b0" else 4
        assert animation.n_frames == 18 and animation.width == panels * 204

    masks, result = tmp_path / "masks", tmp_path / "metrics.json"
    score = [evaluation, "--data", videos, "--json"]
    assert run(*score, result, "--checkpoint", out / "last.pt", "--save", masks, "--per-class") == 0
    printed = capsys.readouterr().out
    assert "mVC16" in printed and "road" in printed
    metrics = json.loads(result.read_text())
    assert metrics == {key: log[-1][key] for key in metrics}    # as at the end of training
    files = sorted((masks / "v").iterdir())
    with Image.open(files[0]) as mask:
        assert len(files) == 18 and mask.mode == "P" and mask.size == (96, 64)
    assert run(*score, tmp_path / "again.json", "--predictions", masks) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == metrics

    labels = shutil.copytree(videos / "data/v/mask", tmp_path / "labels/v").parent
    for wrong, message in (
            ([training, *train], "exists already"),
            ([*score, result, "--predictions", masks], "exists already"),
            ([*score, tmp_path / "3.json", "--predictions", masks, "--save", masks], "already"),
            ([*score, tmp_path / "3.json", "--predictions", labels], "3, but there are only 0")):
        assert run(*wrong) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("model", ["mrcfa_b0", "segformer_b0"])
def test_cityscapes_trains_and_evaluates_its_labelled_frames_alone(model, tmp_path, run,
                                                                   monkeypatch, capsys):
    root, out, masks = tmp_path / "cityscapes", tmp_path / "run", tmp_path / "masks"
    write_cityscapes(root)
    segmented = []
    monkeypatch.setattr(evaluation, "network_input",
                        lambda *a: segmented.append(0) or network_input(*a))
    assert run(training, "--dataset", "cityscapes", "--data", root, "--model", model, "--out", out,
               "--iters", 3, "--batch-size", 2, "--workers", 0, "--crop", 64, 128,
               "--frame-size", 128, 64) == 0
    three_times = {"mrcfa_b0": 3 * 8 + 8, "segformer_b0": 3 * 2}    # and once single frames
    assert len(segmented) == three_times[model]
    config = saved(out)["config"]
    assert config["reference_stride"] == 16 and len(config["classes"]) == 19
    entry = log_of(out)[-1]
    assert entry["mVC8"] is None and entry["mVC16"] is None and entry["mIoU"] is not None
    assert run(evaluation, "--checkpoint", out / "last.pt", "--data", root, "--save", masks) == 0
    row = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert row[0] == model and row[3:5] == ["-", "-"]
    names = sorted(path.parent.name for path in masks.rglob("*.png"))
    assert names == ["munster_000001_000019", "munster_000002_000030"]
    assert run(evaluation, "--predictions", masks, "--data", root) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].split()[1:] == row[1:]
    if model == "mrcfa_b0":     # the second video's clip is played backwards: one before is missing
        network = MRCFA("b0", 19, 16)
        network.load_state_dict(saved(out)["model"])
        frames = root / "leftImg8bit_sequence/val/munster"
        clip = []
        for t in (39, 36, 33, 30):
            frame = data.read_frame(frames / f"munster_000002_{t:06d}_leftImg8bit.png")
            clip.append(network_input(frame, (128, 64)))
        with torch.no_grad():
            logits = network.eval()(torch.stack(clip)[None])[0]
        name = "munster_000002_000030"
        with Image.open(masks / name / f"{name}_leftImg8bit.png") as mask:
            assert np.array_equal(np.array(mask), decode_mask(logits, (64, 128), (32, 64)).numpy())


def test_without_arguments_it_makes_videos_trains_and_shows_pictures(few_synthetic, tmp_path, run,
                                                                     monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = training.RECIPES["synthetic"] | {"iters": 2, "warmup": 1}
    monkeypatch.setitem(training.RECIPES, "synthetic", short)
    assert run(training, "--workers", 0) == 0
    assert "mVC8" in capsys.readouterr().out
    pictures = sorted(path.name for path in Path("runs/mrcfa_b0/pictures").iterdir())
    assert pictures == ["val_000.webp", "val_001.webp"]
    made = Path("data/synthetic").stat().st_mtime_ns
    second = ["--out", "runs/second", "--no-sar", "--keep-ratio", 1]
    for args, code, message in (([], 2, "exists already"), (["--resume"], 0, ""), (second, 0, "")):
        assert run(training, "--workers", 0, *args) == code
        assert message in capsys.readouterr().err
    config = saved(Path("runs/second"))["config"]
    assert not config["refine"] and config["aggregate"]
    assert config["keep_ratio"] == 1 and config["reference_stride"] == 16
    assert Path("data/synthetic").stat().st_mtime_ns == made


def assert_same_run(first: Path, second: Path):
    """Two runs have the same weights, optimiser, best metric and log, bit for bit."""
    a, b = saved(first), saved(second)
    assert_equal(a["model"], b["model"])
    assert_equal(a["optimizer"]["state"], b["optimizer"]["state"])
    assert a["iteration"] == b["iteration"] and a["best"] == b["best"]
    logs = log_of(first), log_of(second)
    for line in logs[0] + logs[1]:
        line.pop("iterations_per_second", None)
    assert logs[0][-2:] == logs[1][-2:]     # a line can stand twice where a run was killed


def test_a_resumed_training_takes_new_flags(videos, tmp_path, run, monkeypatch):
    (videos / "val.txt").write_text("short")
    seeds, real = [], training.loss_of

    def loss_of(*args):
        seeds.append(torch.initial_seed() % 2**32)      # that dropout begins with
        return real(*args)

    start = ["--model", "segformer_b0", "--data", videos, "--iters", 1, *SMALL]
    assert run(training, *start, "--out", tmp_path / "run") == 0
    monkeypatch.setattr(training, "loss_of", loss_of)
    for i, seed in enumerate((0, 0, 1), 2):
        assert run(training, "--resume", "--out", tmp_path / "run", "--iters", i, "--lr", 1e-5,
                   "--head-lr", 2, "--amp", "bf16", "--seed", seed) == 0
    assert saved(tmp_path / "run")["config"]["amp"] == "bf16"
    torch.save(saved(tmp_path / "run") | {"best": 2.0}, tmp_path / "run/last.pt")
    assert run(training, "--resume", "--out", tmp_path / "run", "--amp", "none") == 0
    assert saved(tmp_path / "run")["config"]["amp"] == "none"
    assert saved(tmp_path / "run")["best"] == 2.0       # and best.pt stays as it is
    groups = saved(tmp_path / "run")["optimizer"]["param_groups"]
    assert [group["base_lr"] for group in groups] == [1e-5, 1e-5, 2e-5]
    assert [group["weight_decay"] for group in groups] == [0.01, 0, 0.01]
    norms = [name for name in saved(tmp_path / "run")["model"] if re.search("encoder.*norm", name)]
    assert len(groups[1]["params"]) == len(norms) > 0
    assert run(training, *start, "--out", tmp_path / "other", "--seed", 1) == 0
    assert run(training, *start, "--out", tmp_path / "same") == 0
    assert len(set(seeds)) == 5     # of four iterations, and of the two seeds


def test_learning_rate_warms_up_and_falls(monkeypatch):
    steps = ((0, 10), (5, 10), (50, 10), (100, 10), (0, 0))
    factors = [training.lr_factor(i, 100, warmup) for i, warmup in steps]
    assert factors == pytest.approx([1e-6, 0.95 * (0.5 + 0.5e-6), 0.5, 0, 1])
    for more, warmup in (([], 1500), (["--iters", "2000"], 200), (["--warmup", "7"], 7)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--dataset", "vspw", "--data", "x", *more])
        assert training.parse_args()[0].warmup == warmup


def test_the_same_command_begins_and_continues_a_run(videos, tmp_path, run, capsys):
    (videos / "val.txt").write_text("short")
    command = [training, "--data", videos, "--out", tmp_path / "run", *SMALL,
               "--scale-range", 2, 0.5, "--resume", "--iters"]
    for iterations in (1, 1, 2):
        assert run(*command, iterations) == 0
    error = capsys.readouterr().err
    assert "mrcfa_b0, training 5.1 M parameters on 1 x cpu with --amp none: 2 iterations" in error
    assert "run yet: starting it" in error and "continuing at iteration 1 of 2" in error
    for other, message in ((["--model", "mrcfa_b1"], "size mismatch for segformer.encoder"),
                           (["--no-sar"], 'Unexpected key(s) in state_dict: "aggregation.g4'),
                           (["--dataset", "vspw"], "--dataset: the run in"),
                           (["--first-label", 0], "--first-label: the run in"),
                           (["--freeze-segformer", "--pretrained", "x.pth"], "--freeze-segformer"),
                           (["--pretrained", "x.pth"], "has None and can't change to x.pth")):
        assert run(*command, 2, *other) == 2
        assert message in (error := capsys.readouterr().err) and str(tmp_path / "run") in error
    shutil.copytree(videos, tmp_path / "moved")
    assert run(*command, 1, "--data", tmp_path / "moved") == 0      # nothing is left to do
    assert f"was trained on {videos} so far, now {tmp_path}/moved" in capsys.readouterr().err
    assert saved(tmp_path / "run")["iteration"] == 2


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(videos, tmp_path, run, monkeypatch, capsys):
    out, real = tmp_path / "run", training.loss_of

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "loss_of", interrupted)
        assert run(training, "--model", "segformer_b0", "--data", videos, "--out", out,
                   "--iters", 4, *SMALL) == 130
    said = f"stopped at iteration 1; to go on: python train.py --resume --out {out}"
    assert said in capsys.readouterr().err and saved(out)["iteration"] == 1
    assert processes(1, "train.py", "--resume", "--out", out, "--workers", 2, accident="signal",
                     moment=1) == [128 + signal.SIGTERM]
    assert saved(out)["iteration"] == 3
    assert run(training, "--resume", "--out", out) == 0


def test_ctrl_c_in_an_evaluation_is_answered_at_once(videos, tmp_path, run, monkeypatch, capsys):
    out, seen = tmp_path / "run", []

    def interrupting(*_):
        seen.append(0)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "read_labels", interrupting)
        assert run(training, "--model", "segformer_b0", "--data", videos, "--out", out,
                   "--iters", 1, *SMALL) == 130
        assert "interrupted in the evaluation at iteration 1" in capsys.readouterr().err
        assert len(seen) == 3
        seen.clear()
        assert run(evaluation, "--checkpoint", out / "last.pt", "--data", videos) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "eval.py: interrupted"
        assert len(seen) == 3
    assert saved(out)["iteration"] == 1 and saved(out)["best"] == -1
    assert run(training, "--resume", "--out", out) == 0
    assert "mIoU" in log_of(out)[-1]


@pytest.mark.parametrize("spoil", [
    lambda loss: loss * math.nan,
    lambda loss: loss.register_hook(lambda gradient: gradient * math.inf) and loss,
])
def test_an_iteration_that_is_not_finite_is_left_out(spoil, videos, tmp_path, run, monkeypatch,
                                                     capsys):
    """Weights, optimiser and BatchNorm's statistics are those from before it."""
    real, calls = training.loss_of, []

    def loss_of(model, images, labels):
        calls.append(0)
        loss = real(model, images, labels)
        if len(calls) == 2:
            model.head.norm.running_mean.data.fill_(math.nan)
        return spoil(loss) if len(calls) == 2 else loss

    out = tmp_path / "run"
    args = [training, "--model", "segformer_b0", "--data", videos, "--out", out, *SMALL,
            "--save-every", 1, "--resume"]
    monkeypatch.setattr(training, "loss_of", loss_of)
    assert run(*args, "--iters", 3) == 0
    error = capsys.readouterr().err
    assert error.count("iteration 1 is left out: its loss is") == 1 and error.count("origin") == 2
    assert all(torch.isfinite(x).all() for x in saved(out)["model"].values())
    assert {int(state["step"]) for state in saved(out)["optimizer"]["state"].values()} == {2}
    monkeypatch.setattr(training, "loss_of", lambda *a: spoil(real(*a)))
    before = saved(out)["model"]
    assert run(*args, "--iters", 20) == 1
    assert "stopped: the last 10 iterations" in capsys.readouterr().err
    assert_equal(saved(out)["model"], before)


def test_released_checkpoint_goes_through_evaluation(videos, tmp_path, run, capsys):
    args = [evaluation, *released_arguments(tmp_path), "--data", videos]
    assert run(*args, "--save", tmp_path / "masks") == 0
    assert len(list((tmp_path / "masks" / "v").iterdir())) == 18
    path = tmp_path / "released.pth"
    for more, message in ((["--model", "mrcfa_b1"], "segformer.encoder.stages.0.embed.weight: "),
                          (["--num-classes", 4], "size mismatch for classifier.1.bias"),
                          (["--model", "segformer_b0"], '"value.weight"')):
        assert run(*args, *more) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(path) in error and message in error
    assert run(evaluation, "--checkpoint", path, "--data", videos) == 2
    assert "give --model and --num-classes" in capsys.readouterr().err
    # As wide as the published heads of b2 ... b5.
    torch.save(SegFormer("b0", 3, embed_dim=768).state_dict(), path)
    assert run(*args, "--model", "segformer_b0") == 0
    for count, classes in ((124, data.VSPW_CLASSES), (19, data.CITYSCAPES_CLASSES),
                           (2, ["class 0", "class 1"])):
        torch.save(SegFormer("b0", count).state_dict(), path)
        assert evaluation.load_released(path, "segformer_b0", count)[1]["classes"] == classes


def test_evaluation_takes_other_references_and_tokens(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write_checkpoint(path, tiny(3), "mrcfa_b0")
    for flags, expected in (([], ((9, 6, 3), 0.8)),
                            (["--dilation", "2", "1", "--keep-ratio", "1"], ((2, 1), 1))):
        command = ["eval.py", "--data", "x", "--checkpoint", str(path), *flags]
        monkeypatch.setattr(sys, "argv", command)
        model, config = evaluation.load_model(evaluation.parse_args())
        assert (model.offsets, model.keep_ratio) == expected
        assert config["offsets"] == model.offsets


def test_training_starts_from_released_and_own_weights(videos, tmp_path, run, capsys):
    (videos / "val.txt").write_text("short")
    released_arguments(tmp_path, classes=5)

    def start(name: str, *more) -> dict[str, torch.Tensor]:
        """Nothing moves from where it starts."""
        assert run(training, "--data", videos, "--iters", 1, "--lr", 0, *SMALL, "--out",
                   tmp_path / name, *more) == 0
        return saved(tmp_path / name)["model"]

    with pytest.warns(UserWarning, match="classifiers for other classes"):
        state = start("tuned", "--pretrained", tmp_path / "released.pth")
    assert state["classifier.1.bias"].shape == (3,)
    value = tensor_for("decode_head.sr1_feat.weight", (256, 256, 4, 4))
    assert torch.equal(state["value.weight"], value)
    embed = tensor_for("backbone.patch_embed1.proj.bias", (32,))
    assert torch.equal(state["segformer.encoder.stages.0.embed.bias"], embed)
    again = start("again", "--pretrained", tmp_path / "tuned/last.pt")
    assert torch.equal(again["classifier.1.weight"], state["classifier.1.weight"])
    two = start("two", "--pretrained", tmp_path / "tuned/last.pt", "--dilation", 2, 1)
    assert torch.equal(two["classifier.1.weight"], state["classifier.1.weight"])
    alone = start("alone", "--pretrained", tmp_path / "tuned/last.pt", "--model", "segformer_b0")
    assert torch.equal(alone["head.fuse.weight"], state["segformer.head.fuse.weight"])
    segformer = start("segformer", "--model", "segformer_b0")
    inside = start("inside", "--pretrained", tmp_path / "segformer/last.pt")
    assert torch.equal(inside["segformer.classifier.1.weight"], segformer["classifier.1.weight"])
    assert run(training, "--data", videos, "--iters", 1, *SMALL, "--out", tmp_path / "b1",
               "--model", "mrcfa_b1", "--pretrained", tmp_path / "tuned/last.pt") == 2
    assert "tuned/last.pt: " in (error := capsys.readouterr().err) and "size mismatch" in error


def test_a_frozen_segformer_stays_as_it_was(videos, tmp_path, run, capsys):
    args = [training, "--data", videos, "--iters", 2, *SMALL]
    assert run(*args, "--model", "segformer_b0", "--out", tmp_path / "first") == 0
    frozen = [*args, "--out", tmp_path / "frozen", "--freeze-segformer"]
    assert run(*frozen) == 2
    assert "--freeze-segformer needs" in capsys.readouterr().err
    assert run(*frozen, "--pretrained", tmp_path / "first/last.pt") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[0] for line in lines if line.count(".") == 5]
    assert rows == ["mrcfa_b0", "single_frames"]
    model = tiny(3)             # as the run began, with the same seed
    start = model.aggregation.g2.convs[0].weight.clone()
    model.load_state_dict(saved(tmp_path / "frozen")["model"])
    assert_equal(model.segformer.state_dict(), saved(tmp_path / "first")["model"])
    assert not torch.equal(model.aggregation.g2.convs[0].weight, start)


def test_what_no_file_has_trained_is_not_frozen(videos, tmp_path, run, capsys):
    encoder, wide, other, order = (tmp_path / f"{name}.pt" for name in "abcd")
    torch.save(mit("b0").state_dict(), encoder)
    torch.save(SegFormer("b0", 3, embed_dim=768).state_dict(), wide)
    torch.save(SegFormer("b0", 7).state_dict(), other)
    write_checkpoint(order, SegFormer("b0", 3), "segformer_b0", ["car", "sky", "road"])
    args = [training, "--data", videos, "--iters", 1, "--lr", 0, *SMALL, "--pretrained"]
    for path, parts in ((encoder, "head and classifier"), (wide, "head and classifier"),
                        (other, "classifier"), (order, "classifier")):
        with warnings.catch_warnings(record=True):
            assert run(*args, path, "--freeze-segformer", "--out", tmp_path / "frozen") == 2
        assert f"{path} has no weights for this SegFormer's {parts};" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="other classes or another order: car, sky, road"):
        assert run(*args, order, "--out", tmp_path / "tuned", "--model", "segformer_b0") == 0
    before, after = saved(tmp_path, order.name)["model"], saved(tmp_path / "tuned")["model"]
    assert torch.equal(before["head.fuse.weight"], after["head.fuse.weight"])
    assert not torch.equal(before["classifier.1.weight"], after["classifier.1.weight"])


def test_a_checkpoint_rebuilds_its_model(tmp_path):
    path, wrong = tmp_path / "last.pt", tmp_path / "wrong.pt"
    for name, model in (("mrcfa_b0", MRCFA("b0", 3, 16)), ("segformer_b0", SegFormer("b0", 3))):
        write_checkpoint(path, model, name)
        rebuilt, config = load_checkpoint(path)
        assert type(rebuilt) is type(model) and not rebuilt.training
        assert config["model"] == name and config["classes"] == CLASSES
        assert list(config["frame_size"]) == [96, 64] and list(config["offsets"]) == [9, 6, 3]
        assert_equal(rebuilt.state_dict(), model.state_dict())
        for change in ({"model": {}}, {"config": {}}, {"config": {**config, "classes": 3}},
                       {"config": {**config, "model": "mrcfa_b9"}},
                       {"config": {**config, "classes": [*CLASSES, "one more"]}}):
            torch.save(saved(tmp_path) | change, wrong)
            with pytest.raises(ValueError, match=re.escape(f"{wrong}: ")) as error:
                load_checkpoint(wrong)
            assert "\n" not in str(error.value)
    for name in ("nothing.pt", "."):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            load_checkpoint(tmp_path / name)


def test_a_folder_of_frames_is_segmented(videos, tmp_path, run, capsys):
    frames, masks, over = videos / "data/v/origin", tmp_path / "masks", tmp_path / "over"
    args = [evaluation, *released_arguments(tmp_path), "--frames", frames]
    assert run(*args, "--save", masks, "--amp", "bf16") == 0
    assert sorted(x.stem for x in masks.iterdir()) == sorted(x.stem for x in frames.iterdir())
    assert run(*args, "--save", masks) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(*args, "--overlay", over) == 0
    frame, mask = Image.open(frames / "00000.jpg"), Image.open(masks / "00000.png")
    half = Image.blend(frame, mask.convert("RGB"), 0.5)
    off = abs(np.array(Image.open(over / "00000.jpg")).astype(float) - np.array(half))
    assert off[:, 80:].mean() < 12      # beside the legend
    Image.new("RGB", (64, 64)).save(frames / "99999.png")
    assert run(*args, "--save", tmp_path / "more") == 2
    said = "99999.png: (64, 64), but other frames of this video are (96, 64)"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["b0", "b1"])
def test_single_frames_beside_it_and_one_pixel_explained(variant, videos, tmp_path, run, capsys):
    path, out = tmp_path / "last.pt", tmp_path / "explained"
    pictures, result = tmp_path / "pictures", tmp_path / "metrics.json"
    write_checkpoint(path, MRCFA(variant, 3, 16), f"mrcfa_{variant}")
    assert run(evaluation, "--checkpoint", path, "--data", videos, "--pictures", pictures,
               "--json", result, "--save", tmp_path / "masks", "--single-frames") == 0
    metrics = json.loads(result.read_text())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:]] == list(metrics) == [f"mrcfa_{variant}", "single_frames"]
    assert f"{100 * metrics['single_frames']['mIoU']:.2f}" == rows[2][1]
    assert (tmp_path / "masks/single_frames/v/00000.png").exists()
    with Image.open(pictures / "v.webp") as animation:
        assert animation.n_frames == 18 and animation.width == 5 * 204
    explain = [evaluation, "--checkpoint", path, "--data", videos, "--pictures", out]
    assert run(*explain, "--explain", "v", 12, 95, 0) == 0
    with Image.open(out / "v_12_95_0.png") as picture:
        assert picture.size == (4 * 204, 6 * 155)
    for place, message in ((("v", 12, 95, 0), "v_12_95_0.png: exists already"),
                           (("v", 2, 0, 0), "a frame from 3 to 17"), (("v", 12, 96, 0), "96x64"),
                           (("v", "x", 0, 0), "--explain v x 0 0: give a frame")):
        assert run(*explain, "--explain", *place) == 2
        assert message in capsys.readouterr().err


def test_benchmark_prints_a_row_for_each_way(run, capsys):
    assert run(evaluation, "--benchmark", "--variants", "b0", "--size", 64, 64,
               "--num-classes", 3) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| b0")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in rows] == ["b0 SegFormer", "b0 MRCFA by clips", "b0 MRCFA streaming"]
    gflops = [float(row[2]) for row in rows]
    assert gflops[1] > gflops[2] >= gflops[0] > 0
    assert float(rows[0][5]) == 1


# -------------------------------------------------------------------------- processes and accidents

def fail(error: Exception):
    raise error


def stop_all(repeat: int):
    """Tell this process and its loaders to stop, as a batch system does."""
    for process in torch.multiprocessing.active_children():
        os.system(f"kill {process.pid}")    # from outside
        process.join(0.5)                   # one that ends at it has the time to
    for _ in range(repeat):
        os.kill(os.getpid(), signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(script: str, args: list, told: Path | None, group: dict, accident: str, moment: int):
    """The main function of a process of its own, which may be one of a group.

    At its end train.py tells of its clips and weights in the file `told`. After `moment` times,
    where it happens, there is an accident.
    """
    os.environ |= group
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    accidents = {
        "infinite loss": (training, "loss_of", lambda: math.inf),
        "signal": (training, "loss_of", lambda: stop_all(2 if group else 1)),   # torchrun repeats
        "spoilt clip": (training, "loss_of", lambda: fail(InputError("a frame is spoilt"))),
        "spoilt frame": (data, "read_frame", lambda: fail(InputError("a frame is spoilt"))),
        "killed": (training, "loss_of", die),
        "killed in writing": (Path, "replace", die),    # a checkpoint, before it gets its name
        "killed in evaluation": (evaluation, "decode_mask", die),
    }
    if accident:
        module, name, happen = accidents[accident]
        real, calls = getattr(module, name), itertools.count()

        def with_accident(*a):
            factor = happen() if next(calls) == moment else None
            return real(*a) if factor is None else factor * real(*a)

        setattr(module, name, with_accident)
    if told:
        taken, choose, train = [], ClipDataset.choose, training.Run.train
        ClipDataset.choose = lambda self, index: taken.append(index) or choose(self, index)

        def without_chance(self):
            """Training mode without dropout, drop path and BatchNorm's batch statistics."""
            self.model.eval().training = True

        def train_and_tell(self, *a):
            try:
                train(self, *a)
            finally:
                torch.save({"taken": taken, "model": self.model.state_dict()}, told)

        training.Run.set_training_mode, training.Run.train = without_chance, train_and_tell
    sys.argv = [script, *map(str, args)]
    data.run_script({"train.py": training, "eval.py": evaluation}[script].main)


def processes(count: int, script: str, *args, told: Path | None = None, accident: str = "",
              moment: int = 0) -> list[int]:
    """The exit codes of processes that run a script together, as on a cluster with one in each pod;
    torchrun would also set LOCAL_RANK. The accident happens in the last one."""
    context, port, started = torch.multiprocessing.get_context("spawn"), free_port(), []
    for rank in range(count):
        group = {"RANK": f"{rank}", "WORLD_SIZE": f"{count}", "MASTER_PORT": f"{port}",
                 "MASTER_ADDR": "127.0.0.1"} if count > 1 else {}
        happens = accident if rank == count - 1 else ""
        name = told and told.with_name(f"{told.name}{rank}")
        arguments = (script, args, name, group, happens, moment)
        started.append(context.Process(target=start, args=arguments))
        started[-1].start()
    for process in started:
        process.join(100)
        process.kill()      # one that hangs
    return [process.exitcode for process in started]


def test_a_training_is_the_same_on_any_number_of_processes(videos, tmp_path):
    args = ["train.py", "--model", "segformer_b0", "--data", videos, "--iters", 3, *SMALL,
            "--lr", 1e-3, "--out"]
    one, two, told = tmp_path / "one", tmp_path / "two", tmp_path / "told"
    told.mkdir()
    assert processes(1, *args, one, "--accumulate", 2, told=told / "one") == [0]
    # Two, of which one is told to stop in its second iteration, and one that goes on.
    assert processes(2, *args, two, told=told / "two", accident="signal",
                     moment=1) == [128 + signal.SIGTERM] * 2
    assert processes(1, *args, two, "--resume", told=told / "resumed") == [0]

    taken, models = {}, {}
    for path in told.iterdir():
        taken[path.name], models[path.name] = torch.load(path, weights_only=True).values()
    assert sorted(taken["one0"]) == list(range(6)) and taken["resumed0"] == [4, 5]
    assert sorted(taken["two0"] + taken["two1"]) == [0, 1, 2, 3] and len(taken["two0"]) == 2
    assert_equal(models["two0"], models["two1"])
    torch.testing.assert_close(models["resumed0"], models["one0"], atol=1e-5, rtol=1e-4)
    logs = [log_of(out)[:3] for out in (one, two)]
    assert all(line["gradient_norm"] > 0 for line in logs[1])
    losses = [[line["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_infinite_loss_of_one_process_is_left_out_by_all(videos, tmp_path, run, capfd):
    (videos / "val.txt").write_text("a\nb")
    out, result = tmp_path / "run", tmp_path / "metrics.json"
    assert processes(2, "train.py", "--model", "segformer_b0", "--data", videos, "--iters", 3,
                     *SMALL, "--out", out, told=tmp_path / "told", accident="infinite loss",
                     moment=1) == [0, 0]
    assert capfd.readouterr().err.count("iteration 1 is left out: its loss is inf") == 1
    first, second = (saved(tmp_path, f"told{rank}")["model"] for rank in range(2))
    assert_equal(first, second)
    assert all(value.isfinite().all() for value in first.values())
    states = saved(out)["optimizer"]["state"].values()
    assert {int(state["step"]) for state in states} == {2}
    # The metrics of all processes together are those of one.
    assert run(evaluation, "--checkpoint", out / "last.pt", "--data", videos, "--json", result) == 0
    assert log_of(out)[-1] == {"iteration": 3, **json.loads(result.read_text())}


def test_only_exchanges_that_wait_for_an_evaluation_may_take_hours(monkeypatch):
    groups = []
    for name in data.TORCHRUN:
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(data, "patient_group", None)
    monkeypatch.setattr(data.dist, "init_process_group", lambda *a, **k: groups.append(k))
    monkeypatch.setattr(data.dist, "new_group", lambda **k: groups.append(k) or "patient")
    data.join_processes(argparse.Namespace(device=torch.device("cpu")))
    assert groups == [{}, {"backend": "gloo", "timeout": data.LONGEST_WAIT}]
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(data.dist, "all_gather_object", lambda *_, group: groups.append(group))
    data.gather(None)
    assert groups[-1] == "patient"


@pytest.mark.parametrize("accident, codes, message", [
    ("spoilt clip", {2}, "train.py: a frame is spoilt"),
    ("killed", {-signal.SIGKILL, 2}, "lost contact with another process"),
])
def test_a_failing_process_says_why_and_ends_the_others(accident, codes, message, videos, tmp_path,
                                                        capfd):
    ended = processes(2, "train.py", "--model", "segformer_b0", "--data", videos, "--iters", 9,
                      *SMALL, "--out", tmp_path / "run", accident=accident, moment=1)
    error = capfd.readouterr().err
    assert set(ended) == codes and message in error and "Traceback" not in error


def test_killed_training_goes_on_as_if_nothing_had_been(videos, tmp_path, run):
    (videos / "val.txt").write_text("a")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    args = ["--model", "segformer_b0", "--data", videos, "--iters", 4, "--save-every", 1, *SMALL,
            "--eval-every", 2, "--out"]
    assert run(training, *args, whole) == 0
    resume = ["--resume", "--out", killed]
    for command, accident, moment in (([*args, killed], "killed in writing", 0),
                                      ([*args, killed], "killed in evaluation", 5),
                                      (resume, "killed in writing", 4)):
        assert processes(1, "train.py", *command, accident=accident,
                         moment=moment) == [-signal.SIGKILL]
    assert run(training, *resume) == 0
    assert_same_run(whole, killed)


def test_two_processes_evaluate_as_one_does(videos, tmp_path, run, capfd):
    write_videos(videos, {"w": 17})     # as v long enough for consistencies
    (videos / "val.txt").write_text("a\nv\nb\nw")
    released = [*released_arguments(tmp_path), "--data", videos]

    def command(number: str) -> list:
        out = tmp_path / number
        return [*released, "--per-class", "--single-frames", "--save", out / "save", "--overlay",
                out / "overlay", "--pictures", out / "pictures", "--json", out / "metrics.json"]

    assert run(evaluation, *command("one")) == 0
    printed = capfd.readouterr().out
    assert processes(2, "eval.py", *command("two")) == [0, 0]
    assert capfd.readouterr().out == printed
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
    # If one fails, none is left waiting.
    assert processes(2, "eval.py", *released, accident="spoilt frame", moment=9) == [2, 2]
    assert "eval.py: a frame is spoilt" in capfd.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_what_was_there(videos, tmp_path, run, monkeypatch,
                                                           capsys):
    out, masks = tmp_path / "run", tmp_path / "masks"
    assert run(training, "--model", "segformer_b0", "--data", videos, "--out", out, *SMALL,
               "--iters", 2, "--save-every", 1) == 0
    before = (out / "last.pt").read_bytes()
    resume = [training, "--resume", "--out", out, "--iters", 3]
    evaluate = [evaluation, "--checkpoint", out / "last.pt", "--data", videos, "--save", masks]

    def write_some(path, content, real=Path.write_bytes):
        real(path, content[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    for command, path in ((resume, out / "last.pt"), (evaluate, masks / "v/00000.png")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", write_some)
            assert run(*command) == 2
        assert f"{path}: No space left on device" in capsys.readouterr().err
    assert (out / "last.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp")) and not list(masks.rglob("*.png"))
    assert run(*resume) == 0


def test_loaders_that_fail_or_are_killed_are_one_line(videos, tmp_path, run, monkeypatch, capsys):
    args = ["--data", videos, "--out", tmp_path / "a b", "--iters", 2, *SMALL, "--workers", 1]
    with monkeypatch.context() as patch:
        patch.setattr(ClipDataset, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert run(training, *args) == 2
    assert "a process that loads clips ended" in errors_of(training, capsys)[0]
    for path in (videos / "data").glob("[ab]/origin/*.jpg"):
        path.write_bytes(path.read_bytes()[:500])
    assert run(training, "--resume", "--out", tmp_path / "a b") == 2
    error, = errors_of(training, capsys)
    assert "not a readable image" in error


def test_results_are_saved_whatever_happens_to_the_terminal(videos, tmp_path, run, monkeypatch):
    (videos / "classes.txt").write_text("земля\n车\nciel é\n4", "utf-8")
    masks = shutil.copytree(videos / "data/v/mask", tmp_path / "masks/v").parent
    broken = os.fdopen(os.pipe()[1], "w")   # its reading end is closed when the numbers are written
    os.close(broken.fileno() - 1)
    for name, terminal in (("ascii", io.TextIOWrapper(io.BytesIO(), "ascii")), ("closed", broken),
                           ("none", None)):
        monkeypatch.setattr(sys, "stdout", terminal)
        run(evaluation, "--data", videos, "--per-class", "--predictions", masks,
            "--json", tmp_path / f"{name}.json")
        assert json.loads((tmp_path / f"{name}.json").read_text())["mVC8"] == 1


def test_logits_that_are_not_finite_are_refused(videos, tmp_path, run, capsys):
    nan = {"decode_head.linear_fuse.conv.weight": torch.full((256, 1024, 1, 1), math.nan)}
    assert run(evaluation, *released_arguments(tmp_path, change=nan), "--data", videos) == 2
    assert "00000.jpg: the network's output is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_evaluation_without_amp_is_in_float32(amp, videos):
    """cuDNN's convolutions would round float32 to TF32 on recent GPUs."""
    model, seen = SegFormer("b0", 3).eval(), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    list(evaluation.segment_video(read_split(videos, "val")[0], model, (96, 64), amp))
    assert seen == [amp == "bf16"] * 18 and torch.backends.cudnn.allow_tf32


def test_no_memory_is_not_called_a_spoilt_file(videos, tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr(data.ImageOps, "exif_transpose", lambda _: fail(MemoryError()))
    assert run(evaluation, *released_arguments(tmp_path), "--data", videos) == 2
    assert "eval.py: out of memory" in capsys.readouterr().err


# ---------------------------------------------------------------- data and arguments that are wrong

def only_values(videos: Path, kept: list[int]):
    """Leave only some label values in all masks, and 255 in place of the others."""
    for path in (videos / "data").rglob("mask/*.png"):
        with Image.open(path) as mask:
            mask.point([v if v in kept else 255 for v in range(256)]).save(path)


def in_mask(image: Image.Image):
    return lambda videos: image.save(videos / "data/v/mask/00003.png")


def in_file(name: str, content: str):
    return lambda videos: (videos / name).write_text(content)


@pytest.mark.parametrize("spoil, message", [
    (lambda videos: os.truncate(videos / "data/v/origin/00003.jpg", 500), "00003.jpg: not a rea"),
    (lambda videos: os.remove(videos / "data/v/mask/00003.png"), "00003.png: no such mask"),
    (in_mask(Image.new("L", (90, 64))), "a mask has its frame's size, here (96, 64)"),
    (in_mask(Image.new("L", (96, 64), 7)), "00003.png: label 7, but there are 3 classes"),
    (in_file("val.txt", "v\nnowhere\n"), "nowhere"),
    (lambda videos: only_values(videos, []), "and 17 more: no mask of the val split has"),
    (lambda videos: os.remove(videos / "data/v/origin/00004.jpg"),
     "mask/00004.png: is not a PNG with the name of a frame"),
    (lambda videos: os.rename(videos / "data/v/mask/00004.png", videos / "data/v/mask/00004.jpg"),
     "mask/00004.jpg: is not a PNG with the name of a frame"),
    (lambda videos: shutil.copy(videos / "data/v/origin/00003.jpg",
                                videos / "data/v/origin/00003.png"), "00003.png: frames are .jpg"),
    (lambda videos: Image.new("L", (96, 64)).save(videos / "data/v/origin/00003.bmp"),
     "00003.bmp: frames are .jpg or .png, one for each moment"),
    (lambda videos: shutil.rmtree(videos / "data/v/mask"), "v/mask: No such file or directory"),
    (in_file("classes.txt", "road\nsky\ncar\n"), "'road' in"),
])
def test_bad_data_is_one_line_that_names_it(spoil, message, videos, tmp_path, run, capsys):
    write_checkpoint(tmp_path / "last.pt", SegFormer("b0", 3), "segformer_b0")
    spoil(videos)
    assert run(evaluation, "--checkpoint", tmp_path / "last.pt", "--data", videos) == 2
    error, = errors_of(evaluation, capsys)
    assert message in error


@pytest.mark.parametrize("script, args, message", [
    (training, "--data nowhere", "nowhere: no such data folder"),
    (training, "--dataset vspw", "--data DIR is missing"),
    (training, "--data {videos} --dilation 30", "none of the 3 training videos"),
    (training, "--data {videos} --crop 60 64", "multiples of 32"),
    (training, "--keep-ratio 1.5", "argument --keep-ratio: 1.5 must lie in 0.01 ... 1"),
    (training, "--lr nan", "argument --lr: nan must lie in 0 ... "),
    (evaluation, "--num-classes 300", "argument --num-classes: 300 must lie in 1 ... 254"),
    (training, "--crop 64.5 64", "argument --crop: invalid number value: '64.5'"),
    (training, "--batch-size 5 --accumulate 2", "multiple of 1 processes x --accumulate 2"),
    (training, "--data {videos} --dilation 3 2 1 --pretrained none.pth", "none.pth"),
    (evaluation, "--checkpoint none.pt", "--data DIR is missing"),
    (evaluation, "--checkpoint none.pt --frames {videos}/data/v/origin", "they need --save"),
    (evaluation, "--checkpoint none.pt --frames {videos}/data/v/origin --save masks --json new",
     "nothing else"),
    (evaluation, "--checkpoint a --data {videos} --explain v 9 0 0", "--explain needs"),
    (evaluation, "--data {videos} --checkpoint none.pt", "none.pt: No such file or directory"),
    (evaluation, "--data {videos} --predictions none", "none/v/00000.png: No such file"),
])
def test_bad_arguments_are_one_line_that_names_them(script, args, message, videos, tmp_path, run,
                                                    monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(script, *[arg.format(videos=videos) for arg in args.split()]) == 2
    error, = errors_of(script, capsys)
    assert message in error


def test_other_class_names_and_a_single_class_are_said(videos, tmp_path, run, capsys):
    args = ["--model", "segformer_b0", "--data", videos, *SMALL, "--iters", 1]
    only_values(videos, [2])
    assert run(training, *args, "--out", tmp_path / "run") == 0
    assert "no mask of the train split has sky, car" in capsys.readouterr().err
    resume = ["--resume", "--out", tmp_path / "run", "--iters", 2]
    (videos / "classes.txt").write_text("sky\nstreet\ncar\n")
    assert run(training, *resume) == 0
    assert "class 1 is 'road' in" in capsys.readouterr().err
    for names, message in (("car\nsky\nstreet", "give classes.txt and masks the checkpoint's"),
                           ("heaven\ncar\nstreet", "give classes.txt and masks"),
                           ("sky\nroad", "has 3 classes, but"),
                           ("sky", "has 1 class names; give 2"),
                           ("sky\nroad\nsky", "names a class twice")):
        (videos / "classes.txt").write_text(names)
        assert run(training, *resume) == 2
        assert message in capsys.readouterr().err
    (videos / "classes.txt").unlink()
    assert run(training, *args, "--out", tmp_path / "other") == 2
    assert "classes.txt: No such file" in capsys.readouterr().err


def test_classes_without_pixels_are_said(videos, capsys):
    train = read_split(videos, "train")
    data.check_labels(train, CLASSES, "train")
    assert capsys.readouterr().err == ""
    data.check_labels(train, [*CLASSES, "box"], "train")
    said = "no mask of the train split has box: 0 and 255 are ignored, 1 is 'sky'"
    assert said in capsys.readouterr().err
    Image.new("L", (96, 64), 4).save(videos / "data/a/mask/00003.png")
    with pytest.raises(InputError, match="00003.png: label 4, but there are 3 classes"):
        data.check_labels(train, CLASSES, "train")


def test_every_way_out_holds_124_classes(tmp_path, run, capsys):
    """A video with blocks of all classes, and masks that are a bit wrong."""
    root, name, out = tmp_path / "vspw", "12345678_video", tmp_path / "out"
    labels = (1 + np.arange(128) % 124).astype(np.uint8).reshape(8, 16).repeat(8, 0).repeat(8, 1)
    for folder in ("origin", "mask"):
        (root / "data" / name / folder).mkdir(parents=True)
    (root / "predicted" / name).mkdir(parents=True)
    for t in range(18):
        Image.fromarray(labels).save(root / "data" / name / "origin" / f"{t:08d}.jpg")
        Image.fromarray(labels).save(root / "data" / name / "mask" / f"{t:08d}.png")
        mask = Image.fromarray(np.roll(labels - 1, t % 3, 1))
        mask.save(root / "predicted" / name / f"{t:08d}.png")
    (root / "val.txt").write_text(name)
    assert run(evaluation, "--predictions", root / "predicted", "--data", root, "--per-class",
               "--json", out / "metrics.json", "--save", out / "save", "--overlay", out / "overlay",
               "--pictures", out / "pictures") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[0] for line in lines if line and line[0] != " "]
    assert rows == ["predicted", *data.VSPW_CLASSES]
    assert 0 < json.loads((out / "metrics.json").read_text())["mIoU"] < 1
    copy = np.array(Image.open(out / "save" / name / "00000004.png"))
    assert np.array_equal(copy, np.array(Image.open(root / "predicted" / name / "00000004.png")))
    legend = Image.new("RGB", (4000, 112), "white")
    evaluation.draw_legend(legend, np.arange(256), data.VSPW_CLASSES)
    seen = {colour for _, colour in legend.getcolors(2 ** 16)}
    for k in range(124):        # all but the first, whose area is 0
        assert (tuple(data.PALETTE[3 * k:3 * k + 3]) in seen) == (k > 0)
    with Image.open(out / "pictures" / f"{name}.webp") as animation:
        assert animation.n_frames == 18
        assert animation.width > 3 * 204 + 1000     # the legend has many columns
    assert len(list((out / "overlay" / name).glob("*.jpg"))) == 18


# ----------------------------------------------------------------------------- one's own videos

def masks_from_zero(videos: Path, kept: int = 3):
    """Turn the label maps into those of most labelling tools, where the first class is 0."""
    values = [255, 0, 1, 2][:kept + 1]
    for path in (videos / "data").rglob("mask/*.png"):
        with Image.open(path) as mask:
            mask.point(values + [255] * (256 - len(values))).save(path)


def test_predicted_masks_can_be_labels(videos, tmp_path, run, capsys):
    """Label, train, predict, put the masks among the labels, and evaluate: nothing shifts."""
    masks_from_zero(videos, kept=2)     # as the last class is missing, no value is too high
    out, masks = tmp_path / "run", tmp_path / "masks"
    args = [training, "--data", videos, "--out", out, "--iters", 2, *SMALL,
            "--model", "segformer_b0"]
    assert run(*args, "--first-label", 0) == 0
    assert "give --first-label 0" not in capsys.readouterr().err
    assert run(*args, "--resume", "--first-label", 1) == 2
    evaluate = [evaluation, "--checkpoint", out / "last.pt", "--data", videos]
    assert run(*evaluate, "--save", masks) == 0
    for path in (masks / "v").iterdir():
        path.replace(videos / "data/v/mask" / path.name)
    capsys.readouterr()
    assert run(*evaluate) == 0          # the checkpoint knows the first label
    assert capsys.readouterr().out.split()[6:8] == ["100.00", "100.00"]
    assert run(*evaluate, "--first-label", 1) == 2
    error = capsys.readouterr().err
    assert "the colours of a predicted mask" in error and "--first-label 0" in error


def test_masks_that_count_from_zero_are_named(videos, capsys):
    masks_from_zero(videos)
    for first_label, said in ((1, True), (0, False)):
        data.check_labels(read_split(videos, "train", first_label=first_label), CLASSES, "train")
        error = capsys.readouterr().err
        assert ("has car: 0 and 255 are ignored" in error) == said
        assert ("; if 0 is 'sky', give --first-label 0" in error) == said
    labels = read_labels(videos / "data/a/mask/00000.png", (96, 64), 3, first_label=0)
    assert labels.histogram()[255] == 16 and labels.getpixel((50, 2)) == 0
    only_values(videos, [0, 1])         # a background and one class: one of two would be left
    with pytest.raises(InputError, match="if 0 is 'sky', give --first-label 0"):
        data.check_labels(read_split(videos, "train"), CLASSES[:2], "train")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server of what is in a folder, in place of Hugging Face, and torch.hub's own folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
        yield folder
        server.shutdown()


def test_pretrained_weights_by_name(hub, videos, tmp_path, run, monkeypatch, capsys):
    def serve(name, file, content):
        path = hub / name / "resolve/main" / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)

    encoder, buffer = encoder_weights(), io.BytesIO()
    torch.save(encoder, buffer)
    serve("nvidia/mit-b0", "pytorch_model.bin", buffer.getvalue())
    serve("nvidia/safe", "model.safetensors", safetensors_bytes(encoder))
    serve("nvidia/broken", "pytorch_model.bin", buffer.getvalue()[:1000])
    serve("nvidia/page", "pytorch_model.bin", b"<!DOCTYPE html><html>sign in</html>")
    args = [training, "--model", "segformer_b0", "--data", videos, "--iters", 1, *SMALL,
            "--lr", 0, "--out"]
    for name in ("mit-b0", "safe"):
        assert run(*args, tmp_path / name, "--pretrained", f"nvidia/{name}") == 0
        embed = saved(tmp_path / name)["model"]["encoder.stages.0.embed.weight"]
        assert torch.equal(embed, encoder["patch_embed1.proj.weight"])
    (hub / "nvidia/mit-b0/resolve/main/pytorch_model.bin").unlink()     # it is kept
    assert data.download_pretrained("nvidia/mit-b0").name == "pytorch_model.bin"
    for name, message in (("broken", "can't be read as a checkpoint"),
                          ("page", "begins with b'<!DOCTYPE html>"), ("none", "404")):
        assert run(*args, tmp_path / name, "--pretrained", f"nvidia/{name}") == 2
        error = capsys.readouterr().err
        assert message in error and f"nvidia/{name}/resolve/main/" in error and "put it at" in error
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match="can't be fetched .*refused"):
        data.download_pretrained("nvidia/mit-b1")
    left = [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert sorted(path.parent.name for path in left) == ["mit-b0", "safe"]


def keep_masks(videos: Path, kept: dict[str, list[int]]):
    """Remove all masks of some videos but those of a few frames."""
    for name, frames in kept.items():
        for path in (videos / "data" / name / "mask").iterdir():
            if int(path.stem) not in frames:
                path.unlink()


def test_training_takes_a_few_labelled_frames(videos, tmp_path, run, capsys):
    keep_masks(videos, {"a": [1, 5], "v": [0, 12]})     # b and short have all of theirs
    args = ["--data", videos, *SMALL]
    for command in ([training, *args, "--out", tmp_path / "dense"],
                    [evaluation, *args[:2], "--predictions", tmp_path]):
        assert run(*command) == 2
        assert "labelled (with --labels sparse, one is enough)" in capsys.readouterr().err
    for model in ("mrcfa_b0", "segformer_b0"):
        flags = [*args, "--labels", "sparse", "--model", model, "--out", tmp_path / model]
        assert run(training, *flags, "--iters", 2) == 0
        assert log_of(tmp_path / model)[-1]["mIoU"] is not None
    keep_masks(videos, {"v": []})
    assert run(training, *args, "--labels", "sparse", "--out", tmp_path / "none") == 2
    assert "mask/00000.png: no such mask; 0 of this video's 18 frames" in capsys.readouterr().err


def test_sparse_clips_end_at_labelled_frames(videos):
    keep_masks(videos, {"a": [1, 5], "b": [4]})
    mask = videos / "data/a/mask/00001.png"
    mask.rename(mask.with_suffix(".PNG"))       # as some tools write it
    clips = ClipDataset(read_split(videos, "train", sparse=True), 3, (3, 2, 1), (32, 32), (96, 64))
    assert clips.too_short == 1
    seen = set()
    for i in range(40):
        clip, _ = clips.choose(i)
        assert clip.masks[-1].stem == clip.frames[-1].stem
        seen.add(tuple(int(path.stem) for path in clip.frames))
    assert seen == {(2, 3, 4, 5), (4, 3, 2, 1), (1, 2, 3, 4)}
    assert clips[0][1].shape == (32, 32)    # the target's labels alone


def test_evaluation_of_a_few_labelled_frames_uses_all(videos, tmp_path, run):
    args = [evaluation, *released_arguments(tmp_path), "--data", videos]
    dense, sparse, result = tmp_path / "dense", tmp_path / "sparse", tmp_path / "metrics.json"
    assert run(*args, "--save", dense) == 0
    labelled = [t for t in range(18) if t != 5]
    keep_masks(videos, {"v": labelled})
    assert run(*args, "--labels", "sparse", "--json", result, "--save", sparse, "--pictures",
               tmp_path / "pictures", "--overlay", tmp_path / "over") == 0
    assert files_in(dense) == files_in(sparse) and len(files_in(sparse)) == 18
    expected = SegmentationMetrics(3)
    for t in labelled:
        label = np.array(read_labels(videos / f"data/v/mask/{t:05d}.png", (96, 64), 3))
        with Image.open(dense / f"v/{t:05d}.png") as mask:
            expected.update(label[None], np.array(mask)[None])
    metrics = json.loads(result.read_text())
    assert metrics == {**expected.compute(), "mVC8": None, "mVC16": None}
    with Image.open(tmp_path / "pictures/v.webp") as animation:
        assert animation.n_frames == 17
    assert run(evaluation, "--predictions", sparse, "--data", videos, "--labels", "sparse") == 0


# -------------------------------------------------------------------------------------- the README

def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """The commands of train.py and eval.py in Markdown, in blocks and in the running text."""
    text = text.replace("\\\n", "")
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [code.replace("\n", " ") for code in re.findall(r"`(python [^`]+)`", prose)]
    variables = re.findall(r'^(\w+)="(.*)"$', text, re.MULTILINE)
    commands = []
    for line in lines:
        for name, value in variables:
            line = line.replace(f"${name}", value)
        for script, arguments in re.findall(r"\b(train|eval)\.py([^&]*)", line.split("#")[0]):
            if not any(word in arguments for word in ("--resume", "--help", "...")):
                commands.append((script, arguments.replace(" N", " 1").split()))
    return commands


def test_readme_runs_as_printed(videos, tmp_path, monkeypatch):
    folder = Path(__file__).parent
    text = (folder / "README.md").read_text() + (folder / "RESULTS.md").read_text()
    monkeypatch.chdir(tmp_path)     # where the snippets find a run and a folder of frames
    (videos / "data/v/origin").rename(tmp_path / "frames")
    Path("runs/mrcfa_b0").mkdir(parents=True)
    write_checkpoint(Path("runs/mrcfa_b0/last.pt"), MRCFA("b0", 3), "mrcfa_b0")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    made = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), made)
    assert made["mask"].shape == made["image"].size[::-1]

    commands = commands_in(text)
    assert len(commands) > 10
    for script, arguments in commands:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        # This exits where there is no such flag.
        {"train": training, "eval": evaluation}[script].parse_args()


@pytest.mark.parametrize("name, runs", [
    ("Synthetic", ("default", "default")),
    ("DAVIS, SegFormer frozen", ("SegFormer-9k, 1500 more", "frozen SegFormer-9k, 1500")),
    ("DAVIS, all layers trained", ("SegFormer-15k", "joint 6000")),
])
def test_readmes_results_are_means_of_the_runs(name, runs):
    folder = Path(__file__).parent
    with open(folder / "assets/runs.csv") as file:
        rows = list(csv.DictReader(file))
    line, = re.findall(rf"^\| {name} \| (.*) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    cells = [float(number) for number in re.findall(r"-?[\d.]+", line.replace("+", ""))]
    means = []
    for metric in ("mIoU", "mVC8"):
        for model, run in zip(("SegFormer", "MRCFA"), runs, strict=True):
            values = [float(row[metric]) for row in rows if row["data"] == name.split(",")[0]
                      and row["model"] == model and row["run"] == run]
            means.append(np.mean(values))
        means.append(means[-1] - means[-2])
    assert cells[1:] == pytest.approx(means, abs=0.11)     # of rounded numbers
    assert cells[0] == len(values)
