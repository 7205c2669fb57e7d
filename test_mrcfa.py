"""Everything that the five scripts promise, at tiny sizes.

The golden numbers come from the released MRCFA code: its answers, at six places of each output,
to weights and clips that are functions of a name and a seed (`tensor_for`, `clip_for`).
"""

import errno
import http.server
import io
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as evaluation
import segformer
import train as training
from data import ClipDataset, decode_mask, fit, network_input, read_labels, read_split
from eval import SegmentationMetrics
from mrcfa import (MRCFA, TokenwiseConvs, build_model, load_checkpoint, load_official, mrcfa_loss,
                   reference_indices)
from segformer import (MIT_VARIANTS, InputError, SegFormer, load_pretrained, mit, read_checkpoint,
                       segmentation_loss)

torch.set_num_threads(1)  # at tiny sizes as fast as more, and in several processes at once faster

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


def backbone_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of NVlabs' MiT checkpoints."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name, *weight):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    previous = 3
    for i, (c, depth, r) in enumerate(zip(*MIT_VARIANTS[variant], (8, 4, 2, 1)), 1):
        layer(f"patch_embed{i}.proj", c, previous, *([7, 7] if i == 1 else [3, 3]))
        layer(f"patch_embed{i}.norm", c)
        for j in range(depth):
            block = f"block{i}.{j}"
            for norm in ("norm1", "norm2") + (("attn.norm",) if r > 1 else ()):
                layer(f"{block}.{norm}", c)
            layer(f"{block}.attn.q", c, c)
            layer(f"{block}.attn.kv", 2 * c, c)
            layer(f"{block}.attn.proj", c, c)
            if r > 1:
                layer(f"{block}.attn.sr", c, c, r, r)
            layer(f"{block}.mlp.fc1", 4 * c, c)
            layer(f"{block}.mlp.dwconv.dwconv", 4 * c, 1, 3, 3)
            layer(f"{block}.mlp.fc2", c, 4 * c)
        layer(f"norm{i}", c)
        previous = c
    return shapes


def head_shapes(variant: str, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the SegFormer head in NVlabs' and the released MRCFA's checkpoints."""
    shapes = {
        "conv_seg.weight": (classes, 128, 1, 1), "conv_seg.bias": (classes,),
        "linear_fuse.conv.weight": (256, 1024, 1, 1), "linear_fuse.bn.num_batches_tracked": (),
        "linear_pred.weight": (classes, 256, 1, 1), "linear_pred.bias": (classes,),
    }
    for i, c in enumerate(MIT_VARIANTS[variant][0], 1):
        shapes |= {f"linear_c{i}.proj.weight": (256, c), f"linear_c{i}.proj.bias": (256,)}
    return shapes | {
        f"linear_fuse.bn.{name}": (256,)
        for name in ("weight", "bias", "running_mean", "running_var")
    }


def mrcfa_shapes(variant: str, classes: int, stride: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the released MRCFA has beside SegFormer."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name, *weight):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    for i, c in enumerate(MIT_VARIANTS[variant][0][1:], 1):
        layer(f"hypercorre_module.q{i}", c, c)
        layer(f"hypercorre_module.k{i}", c, c)
        if i < 3:
            layer(f"sr{i + 1}", c, c, *[stride // 4 // 2**i] * 2)
    layer("sr1_feat", 256, 256, stride // 8, stride // 8)
    for i in range(1, 5):
        layer(f"deco{i}.smalldecoder.1", classes, 256, 1, 1)
    stacks = {
        "4": [(1, 1, 3)], "3": [(1, 1, 5)], "2": [(1, 1, 5)], "4to3": [(1, 1, 3)],
        "3to2": [(1, 1, 3)],
    }
    if variant == "b1":
        stacks = {
            "4": [(1, 1, 3), (2, 1, 3)], "3": [(1, 1, 3), (2, 1, 3)], "2": [(1, 1, 5), (2, 1, 3)],
            "4to3": [(2, 2, 3), (2, 2, 3)], "3to2": [(2, 2, 3), (1, 2, 3)],
        }
    for stack, layers in stacks.items():
        for i, (c_out, c_in, k) in enumerate(layers):
            layer(f"hypercorre_module.hpn.encoder_layer{stack}.{3 * i}.conv2", c_out, c_in, k, k)
            layer(f"hypercorre_module.hpn.encoder_layer{stack}.{3 * i + 1}", c_out)
    return shapes


def official_state(variant: str, classes: int, stride: int = 32) -> dict[str, torch.Tensor]:
    """What torch.load(released checkpoint)["state_dict"] would hold, with the recipe's numbers."""
    head = head_shapes(variant, classes) | mrcfa_shapes(variant, classes, stride)
    shapes = {f"backbone.{k}": v
              for k, v in backbone_shapes(variant).items()
              } | {f"decode_head.{k}": v
                   for k, v in head.items()}
    return {name: tensor_for(name, shape) for name, shape in shapes.items()}


def clip_for(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.RandomState(1234).randn(1, frames, 3, height, width).astype(np.float32))


def labels_for(frames: int, height: int, width: int, classes: int) -> torch.Tensor:
    rng = np.random.RandomState(4321)
    blocks = rng.randint(0, classes, (1, frames, height // 16, width // 16))
    blocks[rng.rand(*blocks.shape) < 0.125] = 255
    return torch.from_numpy(blocks.repeat(16, -2).repeat(16, -1).astype(np.int64))


GOLDEN = {
    ("b0", 64, 96, 32, 124): {
        "logits": [-0.579858254, 0.09617523, 0.341824625, 0.473718748, 0.267709451, 0.047103384],
        "single_frame": [0.03703697, -0.5957582, -0.60470593, -0.144221544, -0.96601522,
                         -0.16774866],
        "first_reference": [0.245184332, 0.696238518, -0.320632398, 0.735933363, -0.267042577,
                            -0.051347777],
        "loss": 7.153429634883025,
        "gradients": [1.08608, 0.466613, 0.799969, 2.70025, 0.0155813, 0.0153572, 0.00918052,
                      4.30118, 0.722335],
        "features": [-0.03991168, 1.01213896, -0.00223392, 1.02753806, -0.01210265, 1.0014689,
                     0.00808963, 1.0030514],
    },
    ("b1", 128, 192, 32, 124): {
        "logits": [-0.67400898, 0.58559511, -0.727786303, 0.094124402, 0.190180247, -1.035840482],
        "single_frame": [-0.069999933, 0.04868485, -0.201928198, -0.648705125, 0.131139636,
                         0.252927721],
        "first_reference": [0.635372043, 0.894113839, -1.178493738, -0.481829762, 0.064659543,
                            0.530973196],
        "loss": 6.686786305338053,
        "gradients": [0.368263, 0.398308, 0.768069, 1.7538, 0.0230825, 0.0266861, 0.00883147,
                      2.40141, 0.376834],
        "features": [-0.02259039, 0.98873377, 0.00848132, 1.01494288, 0.00041813, 1.01131427,
                     0.00376999, 1.00374424],
    },
    ("b1", 64, 128, 16, 19): {
        "logits": [1.049733327, -0.357004097, 0.100858241, 0.829892119, 0.14103904, -2.073089692],
        "single_frame": [1.028192163, 0.81969893, 0.073725149, 0.738957703, -0.488692433,
                         0.566952169],
        "first_reference": [0.678258181, 0.351024926, -0.447475821, -0.042600069, 0.57902354,
                            0.210003227],
        "loss": 4.414047714631646,
        "gradients": [0.898812, 0.636581, 1.14584, 2.69874, 0.031225, 0.0261392, 0.0186984, 2.40469,
                      0.656199],
        "features": [-0.02110067, 0.99534529, 0.00476753, 1.01363993, 0.00165143, 1.00976443,
                     0.00158492, 1.00482249],
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
        features = model.segformer.encoder(clip[0])
        np.testing.assert_allclose([f(x).item() for x in features for f in (torch.mean, torch.std)],
                                   golden["features"], atol=1e-6)
        np.testing.assert_allclose(at_six_places(model(clip)), golden["logits"], atol=1e-4)
        np.testing.assert_allclose(at_six_places(model(clip[:, -1:])), golden["single_frame"],
                                   atol=1e-4)
        np.testing.assert_allclose(at_six_places(model.double()(clip.double())), golden["logits"],
                                   atol=1e-7)


def test_training_answers_as_the_released_code(released):
    model, clip, labels, golden = released
    model.training = True  # and nothing below it: dropout stays off
    frame_logits, clip_logits = model(clip)
    np.testing.assert_allclose(at_six_places(frame_logits[:, -1]), golden["single_frame"],
                               atol=1e-4)
    np.testing.assert_allclose(at_six_places(clip_logits[:, 0]), golden["first_reference"],
                               atol=1e-4)
    loss = mrcfa_loss(frame_logits, clip_logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-4)
    parameters = dict(model.named_parameters())
    assert [parameters[name].grad.norm().item() for name in GRADIENTS] == pytest.approx(
        golden["gradients"], rel=2e-3)
    model.double()
    assert mrcfa_loss(*model(clip.double()), labels).item() == pytest.approx(
        golden["loss"], abs=1e-7)


@pytest.mark.parametrize("variant, classes, stride, mrcfa, segformer",
                         [("b0", 124, 32, 5.186, 3.746), ("b1", 124, 32, 16.226, 13.709),
                          ("b2", 124, 32, 27.271, 24.754), ("b5", 124, 32, 84.517, 82.001),
                          ("b0", 19, 16, 4.220, None), ("b1", 19, 16, 14.882, None), ])
def test_parameters_in_millions(variant, classes, stride, mrcfa, segformer):
    with torch.device("meta"):
        model = MRCFA(variant, classes, stride)

    def count(module):
        return sum(p.numel() for p in module.parameters()) / 1e6

    assert count(model) - count(model.auxiliary_classifiers) == pytest.approx(mrcfa, abs=1e-3)
    assert segformer is None or count(model.segformer) == pytest.approx(segformer, abs=1e-3)


@pytest.mark.parametrize("variant", ["b3", "b4"])
@pytest.mark.parametrize("stride", [16, 32])
def test_every_released_key_of_the_other_variants_is_used(variant, stride):
    load_official(MRCFA(variant, 3, stride), official_state(variant, 3, stride))


# -------------------------------------------------------------------------------------------- model


def tiny(classes=5, stride=32, offsets=(9, 6, 3)) -> MRCFA:
    torch.manual_seed(0)
    return MRCFA("b0", classes, stride, offsets=offsets).eval()


def test_refinement_is_a_convolution_of_each_tokens_image():
    refine = TokenwiseConvs((1, 2, 3), (2, 1, 5))
    images = torch.randn(3, 4, 6, 7)  # 3 clips, 4 tokens
    expected = images.flatten(0, 1)[:, None]
    for conv, norm in zip(refine.convs, refine.norms):
        expected = norm(conv(expected)).relu()
    torch.testing.assert_close(refine(images), expected[:, 0].unflatten(0, (3, 4)), atol=1e-5,
                               rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_holds_large_affinities(dtype):
    model, clip = tiny(), torch.randn(1, 4, 3, 64, 96)
    with torch.no_grad():
        for layer in (model.query2, model.query3, model.query4):
            layer.weight *= 3e5  # affinities beyond float16's 65504
        expected = model(clip)
        with torch.autocast("cpu", dtype):
            logits = model(clip)
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_the_loss_and_its_gradient_stay_exact_under_autocast():
    logits, labels = torch.randn(2, 5, 16, 16), torch.randint(0, 5, (2, 64, 64))
    results = []
    for enabled in (False, True):
        x = logits.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = segmentation_loss(x, labels)
            loss.backward()
        results.append((loss, x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


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
        torch.testing.assert_close(model(clips), torch.cat([model(clip[None]) for clip in clips]),
                                   atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("offsets", [(9, 6, 3), (2,)])
def test_stream_answers_as_the_clips_do(stride, offsets):
    model, video = tiny(stride=stride, offsets=offsets), torch.randn(14, 3, 64, 96)
    stream = model.stream()
    with torch.no_grad():
        for t, frame in enumerate(video):
            clip = video[[*reference_indices(t, offsets), t]]
            torch.testing.assert_close(stream(frame), model(clip[None])[0], atol=1e-5, rtol=1e-5)
            assert len(stream.history) <= max(offsets)


def test_stream_keeps_the_keys_and_values_of_nine_frames_and_nothing_else():
    model, kept = tiny(), []
    stream = model.stream()
    for t in range(30):
        stream(torch.randn(3, 64, 96))
        tensors = [x for reference in stream.history for x in reference]
        kept.append(sum(x.untyped_storage().nbytes() for x in tensors))
    assert (kept[8] == kept[19] == kept[29] == 9 * 4 * (6 * (64 + 160 + 256) + 6 * 256)
            )  # frames, bytes, N x C_l


@pytest.mark.parametrize("stride", [16, 32])
def test_model_can_be_exported_as_one_graph(stride):
    model, clip = tiny(stride=stride), torch.randn(1, 4, 3, 64, 64)
    with torch.no_grad():
        expected = model(clip)
        torch.testing.assert_close(torch.export.export(model, (clip,)).module()(clip), expected)
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend="eager")(clip), expected)


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
        kept, *affinities = model.affinities(model.queries(features), reference)
        output = model.reconstruct(model.queries(features), reference)
    assert [x.shape[1] for x in (kept, *affinities)] == [1, 1, 1, 1]
    assert output.shape == (4, 256, 8, 12)
    value = reference.value.gather(1, kept[..., None].expand(-1, -1, 256))
    torch.testing.assert_close(output, value.mT[..., None].expand_as(output))


@pytest.mark.parametrize("variant", ["b0", "b1"])
@pytest.mark.parametrize(
    "switches",
    [{}, {"refine": False}, {"aggregate": False}, {"keep_ratio": 1.0}, {"offsets": (3,)}],
)
def test_every_parameter_learns_whatever_is_left_out(variant, switches):
    model = MRCFA(variant, 3, **switches)
    clip_logits = model(torch.randn(1, len(model.offsets) + 1, 3, 64, 64))
    mrcfa_loss(*clip_logits, torch.randint(0, 3, (1, len(model.offsets) + 1, 64, 64))).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert not without and frozen == ({"query3", "key3", "reduce3", "query4", "key4"}
                                      if "aggregate" in switches else set())


def test_without_sar_and_maa_the_finest_affinities_are_merged_as_they_are():
    sar = MRCFA("b0", 3, refine=False, aggregate=False).aggregation
    images = torch.randn(2, 5, 6, 8)
    torch.testing.assert_close(sar.g2(images), images)
    torch.testing.assert_close(sar(images, None, None), sar.g32(images))


@pytest.mark.parametrize("target_only", [False, True])
def test_loss_is_the_papers_and_so_are_its_gradients(target_only):
    torch.manual_seed(0)
    frame_logits, clip_logits = (torch.randn(2, 3, 5, 8, 10, dtype=torch.float64,
                                             requires_grad=True) for _ in range(2))
    labels = torch.randint(0, 5, (2, 75, 40) if target_only else
                           (2, 3, 75, 40))  # more than two bands of rows
    labels[..., :7] = 255

    def cross_entropy(logits, label):
        return F.cross_entropy(F.interpolate(logits, (75, 40), mode="bilinear"), label,
                               ignore_index=255, reduction="none").mean()

    target = labels if target_only else labels[:, -1]
    expected = 0.5 * (cross_entropy(frame_logits[:, -1], labels) if target_only else
                      sum(cross_entropy(frame_logits[:, t], labels[:, t]) for t in range(3)) / 3)
    expected = expected + sum(cross_entropy(clip_logits[:, t], target) for t in range(3)) / 3
    loss = mrcfa_loss(frame_logits, clip_logits, labels)
    torch.testing.assert_close(loss, expected)
    for ours, plain in zip(torch.autograd.grad(loss, (frame_logits, clip_logits)),
                           torch.autograd.grad(expected, (frame_logits, clip_logits))):
        torch.testing.assert_close(ours, plain)


def test_model_refuses_what_it_cannot_take():
    model = tiny()
    for clip, named in ((torch.zeros(1, 4, 3, 64, 90), "64x90"), (torch.zeros(
            1, 5, 3, 64, 64), "5 frames"), (torch.zeros(1, 3, 64, 64), "B, T, 3, H, W")):
        with pytest.raises(ValueError, match=named):
            model(clip)
    with pytest.raises(ValueError, match="3 frames"):
        model.train()(torch.zeros(1, 3, 3, 64, 64))
    with pytest.raises(ValueError, match="eval"):
        model.stream()(torch.zeros(3, 64, 64))
    for wrong in ({"variant": "b9"}, {"reference_stride": 8}, {"keep_ratio": 1.5}, {"offsets": ()},
                  {"offsets": (3, 0)}):
        with pytest.raises(ValueError, match="b9|8|1.5|offsets"):
            MRCFA(**{"variant": "b0", **wrong})


# ------------------------------------------------------------------------------------------ weights


def test_nvlabs_weights_go_into_encoder_segformer_and_mrcfa(tmp_path):
    encoder = {
        name: tensor_for("backbone." + name, shape)
        for name, shape in backbone_shapes("b0").items()
    }
    path = tmp_path / "mit_b0.pth"
    torch.save(encoder | {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)},
               path)
    for module in (mit("b0"), SegFormer("b0", 7), MRCFA("b0", 7)):
        load_pretrained(module, path)
        inside = getattr(module, "segformer", module)
        features = getattr(inside, "encoder", inside).eval()(clip_for(4, 64, 96)[0])
        golden = GOLDEN["b0", 64, 96, 32, 124]["features"]
        np.testing.assert_allclose([f(x).item() for x in features for f in (torch.mean, torch.std)],
                                   golden, atol=1e-6)

    whole = {f"backbone.{k}": v
             for k, v in encoder.items()} | {
                 f"decode_head.{k}": tensor_for(f"decode_head.{k}", shape)
                 for k, shape in head_shapes("b0", 124).items()
             }
    model = SegFormer("b0", 124).eval()
    load_pretrained(model, {"state_dict": whole})
    with torch.no_grad():
        logits = model(clip_for(4, 64, 96)[0, -1:])
    np.testing.assert_allclose(at_six_places(logits), GOLDEN["b0", 64, 96, 32, 124]["single_frame"],
                               atol=1e-4)
    with pytest.warns(UserWarning, match="classifier skipped: it has 124 classes, this model 7"):
        load_pretrained(SegFormer("b0", 7), whole)


HUGGING_FACE = {
    "proj": "encoder.patch_embeddings.{i}.proj", "norm": "encoder.patch_embeddings.{i}.layer_norm",
    "last": "encoder.layer_norm.{i}", "norm1": "layer_norm_1", "norm2": "layer_norm_2",
    "attn.norm": "attention.self.layer_norm", "attn.sr": "attention.self.sr",
    "attn.q": "attention.self.query", "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.dense1", "mlp.fc2": "mlp.dense2", "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
    "block": "encoder.block.{i}.{j}.",
}
MMSEGMENTATION = {
    "proj": "layers.{i}.0.projection", "norm": "layers.{i}.0.norm", "last": "layers.{i}.2",
    "norm1": "norm1", "norm2": "norm2", "attn.norm": "attn.norm", "attn.sr": "attn.sr",
    "attn.proj": "attn.attn.out_proj", "mlp.fc1": "ffn.layers.0", "mlp.fc2": "ffn.layers.4",
    "mlp.dwconv.dwconv": "ffn.layers.1", "block": "layers.{i}.1.{j}.",
}


def in_other_names(state: dict[str, torch.Tensor],
                   names: dict[str, str]) -> dict[str, torch.Tensor]:
    """NVlabs' weights of an encoder in the naming of Hugging Face or mmsegmentation."""
    renamed = {}
    for key, value in state.items():
        place, kind = key.rsplit(".", 1)
        if place.startswith("patch_embed"):
            renamed[names[place[13:]].format(i=int(place[11]) - 1) + "." + kind] = value
        elif place.startswith("norm"):
            renamed[names["last"].format(i=int(place[4]) - 1) + "." + kind] = value
        else:
            block, j, layer = place.split(".", 2)
            prefix = names["block"].format(i=int(block[5]) - 1, j=j)
            if names is HUGGING_FACE and layer == "attn.kv":
                for part, half in zip(("key", "value"), value.chunk(2)):
                    renamed[f"{prefix}attention.self.{part}.{kind}"] = half
            elif names is MMSEGMENTATION and layer == "attn.q":
                both = torch.cat([value, state[f"{place.removesuffix('.q')}.kv.{kind}"]])
                renamed[f"{prefix}attn.attn.in_proj_{kind}"] = both
            elif layer != "attn.kv":
                convolution = names is MMSEGMENTATION and "fc" in layer and kind == "weight"
                if convolution:
                    value = value[..., None, None]
                renamed[f"{prefix}{names[layer]}.{kind}"] = value
    return renamed


@pytest.mark.parametrize("names, prefix", [(HUGGING_FACE, ""), (HUGGING_FACE, "segformer."),
                                           (MMSEGMENTATION, ""), (MMSEGMENTATION, "backbone."), ])
def test_hugging_face_and_mmsegmentation_weights_are_the_same_network(names, prefix):
    encoder = {
        name: tensor_for("backbone." + name, shape)
        for name, shape in backbone_shapes("b0").items()
    }
    state = {prefix + name: value for name, value in in_other_names(encoder, names).items()}
    for module in (mit("b0"), MRCFA("b0", 7)):
        load_pretrained(module, state)
        features = getattr(getattr(module, "segformer", module), "encoder", module).eval()(clip_for(
            4, 64, 96)[0])
        golden = GOLDEN["b0", 64, 96, 32, 124]["features"]
        np.testing.assert_allclose([f(x).item() for x in features for f in (torch.mean, torch.std)],
                                   golden, atol=1e-6)


def test_hugging_faces_head_is_ours_and_mmsegmentations_is_not():
    encoder = {
        name: tensor_for("backbone." + name, shape)
        for name, shape in backbone_shapes("b0").items()
    }
    head = {
        f"decode_head.{k}": tensor_for(f"decode_head.{k}", shape)
        for k, shape in head_shapes("b0", 124).items() if "conv_seg" not in k
    }
    ours = {
        "linear_fuse.conv": "linear_fuse", "linear_fuse.bn": "batch_norm",
        "linear_pred": "classifier", **{f"linear_c{i + 1}": f"linear_c.{i}"
                                        for i in range(4)},
    }
    for theirs, name in ours.items():
        head = {
            key.replace(f"decode_head.{theirs}.", f"decode_head.{name}."): value
            for key, value in head.items()
        }
    model = SegFormer("b0", 124).eval()
    load_pretrained(model,
                    {f"segformer.{k}": v
                     for k, v in in_other_names(encoder, HUGGING_FACE).items()} | head)
    with torch.no_grad():
        logits = model(clip_for(4, 64, 96)[0, -1:])
    np.testing.assert_allclose(at_six_places(logits), GOLDEN["b0", 64, 96, 32, 124]["single_frame"],
                               atol=1e-4)

    other = {
        "decode_head.convs.0.conv.weight": torch.zeros(
            256, 32, 1, 1), "decode_head.fusion_conv.conv.weight": torch.zeros(256, 1024, 1, 1),
        "decode_head.conv_seg.weight": torch.zeros(124, 256, 1, 1),
    }
    with pytest.warns(UserWarning, match="head skipped: mmsegmentation's has BatchNorm"):
        load_pretrained(
            model, {f"backbone.{k}": v
                    for k, v in in_other_names(encoder, MMSEGMENTATION).items()}
            | other)


def test_safetensors_are_read(tmp_path):
    header = (b'{"__metadata__":{"format":"pt"},'
              b'"a":{"dtype":"F32","shape":[2,1],"data_offsets":[2,10]},'
              b'"b":{"dtype":"BF16","shape":[],"data_offsets":[0,2]}}')
    data = bytes([0x80, 0x3F]) + bytes([0, 0, 0x80, 0x3F, 0, 0, 0, 0xC0])  # 1; 1 and -2
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    tensors = read_checkpoint(path)
    assert tensors.keys() == {"a", "b"}
    assert tensors["a"].tolist() == [[1], [-2]]
    assert tensors["b"].dtype == torch.bfloat16 and tensors["b"].item() == 1
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="can't be read"):
        read_checkpoint(path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    state = official_state("b0", 5)
    for wrong, match in (
            (state | {"decode_head.extra.weight": torch.zeros(1)},
             "1 weights .*extra.weight is unexpected"),
            ({key: value for key, value in state.items() if "sr1_feat" not in key},
             "2 weights .*value.weight is missing, value.bias is missing"),
            (official_state("b1", 5), "MiT-b1, this model is built on MiT-b0"),
            (official_state("b0", 6), r"classifier.1.bias is \(6,\) instead of \(5,\)")):
        with pytest.raises(ValueError, match=match):
            load_official(MRCFA("b0", 5), wrong)
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole.pth")
    cut_off = (tmp_path / "whole.pth").read_bytes()[:-50]
    for content in (b"<!DOCTYPE html>", b"version https://git-lfs.github.com", b"", cut_off):
        (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_pretrained(SegFormer("b0", 5), tmp_path / "weights.pth")
        assert f"weights.pth: can't be read as a checkpoint; it begins with {content[:40]!r}" in (
            str(error.value))
    torch.save({"model": {}, "made": Path}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"would run code when loaded \(pathlib"):
        load_pretrained(SegFormer("b0", 5), tmp_path / "weights.pth")
    (tmp_path / "weights.safetensors").write_bytes(b"0")
    with pytest.raises(ValueError, match="needs the safetensors package|can't be read"):
        load_pretrained(SegFormer("b0", 5), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="no MiT weights"):
        load_pretrained(SegFormer("b0", 5), {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)})
    with pytest.raises(ValueError, match="no state dict"):
        load_pretrained(SegFormer("b0", 5), {0: torch.zeros(1)})


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
    assert metrics.compute() == pytest.approx(
        {
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
    metrics.update(labels[:16], 1 - predictions[:16])  # too short for consistencies
    assert metrics.compute()["mVC16"] == 3 / 4
    for wrong, match in ((np.full_like(labels, 3), "3"), (predictions[:5], "one shape"),
                         (predictions * 1.0, "integers"), (predictions - 1, "-1")):
        with pytest.raises(ValueError, match=match):
            metrics.update(labels, wrong)


def test_masks_decode_as_two_interpolations_and_argmax():
    logits = torch.randn(21, 8, 12).to(memory_format=torch.contiguous_format)
    full = F.interpolate(F.interpolate(logits[None], (32, 48), mode="bilinear"), (37, 41),
                         mode="bilinear")[0]
    assert torch.equal(decode_mask(logits, (32, 48), (37, 41)).long(), full.argmax(0))


# --------------------------------------------------------------------------------------------- data

CLASSES = ["sky", "road", "car"]


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
            colours = np.array([(0, 0, 0), (60, 120, 200), (90, 90, 90), (220, 60, 40)],
                               dtype=np.uint8)
            frame = colours[labels] + rng.integers(0, 20, (*labels.shape, 1), dtype=np.uint8)
            for folder, array, suffix in (("origin", frame, "jpg"), ("mask", labels, "png")):
                path = root / "data" / name / folder / f"{t:05d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    (root / "train.txt").write_text("\n".join(name for name in lengths if name != "v"))
    (root / "val.txt").write_text("\ufeffv", "utf-8")  # some editors begin a file like that
    return root


@pytest.fixture
def videos(tmp_path) -> Path:
    return write_videos(tmp_path / "videos", {"a": 6, "b": 5, "short": 2, "v": 18})


def test_inference_frames_are_resized_as_the_protocol_says():
    for size, fitted in (((1920, 1080), (853, 480)), ((320, 240), (640, 480)),
                         ((480, 640), (480, 640)), ((3000, 1), (853, 1))):
        assert fit(size, (853, 480)) == fit(size, (480, 853)) == fitted
    pixels = np.random.default_rng(0).integers(0, 256, (45, 100, 3), dtype=np.uint8)

    def bilinear(x: np.ndarray, size: int,
                 axis: int) -> np.ndarray:  # half-pixel centres, no antialiasing
        x = np.moveaxis(x, axis, 0)
        at = ((np.arange(size) + 0.5) * len(x) / size - 0.5).clip(0, len(x) - 1)
        low, share = at.astype(int), (at % 1)[:, None, None]
        return np.moveaxis((1 - share) * x[low] + share * x[(low + 1).clip(max=len(x) - 1)], 0,
                           axis)

    expected = pixels.astype(float)
    for height, width in (23, 50), (32, 64):  # fitted into 50x30, then up to multiples of 32
        expected = bilinear(bilinear(expected, height, 0), width, 1).round()
    x = network_input(Image.fromarray(pixels), (50, 30))
    grey = (x * torch.tensor([58.395, 57.12, 57.375])[:, None, None] +
            torch.tensor([123.675, 116.28, 103.53])[:, None, None])
    off = abs(grey.permute(1, 2, 0).numpy() - expected)
    assert off.max() < 1.001 and (off < 1e-3).mean() > 0.99  # but for exact halves


def test_clips_keep_frames_and_labels_together(videos, monkeypatch):
    monkeypatch.setattr(data, "photometric_distortion", lambda image, rng: image)
    train = read_split(videos, "train")
    clips = ClipDataset(train, 3, (3, 2, 1), crop=(64, 64), frame_size=(96, 64))
    assert clips.too_short == 1 and len(clips.videos) == 2
    colours = torch.tensor([(70, 130, 210), (100, 100, 100), (230, 70, 50)])
    agree, seen, moves = [], set(), set()
    for i in range(16):
        images, labels = clips[i]
        assert (images.shape == (4, 3, 64, 64) and labels.shape == (4, 64, 64)
                and labels.dtype == torch.int64)
        grey = images * data.STD + data.MEAN
        nearest = (grey[:, None] - colours[None, :, :, None, None]).abs().sum(2).argmin(1)
        agree.append((nearest == labels)[labels != 255].float().mean().item())
        seen |= set(labels.unique().tolist())
        x = [(label == 2).nonzero()[:, 1].float().mean() for label in labels]
        moves.add(bool(x[-1] > x[0]))
    assert np.mean(agree) > 0.95 and seen == {0, 1, 2, 255}
    assert moves == {True, False}  # flipped or backwards


def test_a_clip_depends_on_seed_and_index_alone(videos):
    def clips(seed):
        return ClipDataset(read_split(videos, "train"), 3, (3, 2, 1), crop=(32, 32),
                           frame_size=(96, 64), seed=seed)

    first, second = clips(0), clips(0)
    later = second[5][0]
    assert torch.equal(first[3][0], second[3][0]) and torch.equal(first[5][0], later)
    assert not torch.equal(first[3][0],
                           clips(1)[3][0]) and not torch.equal(first[3][0], first[5][0])


def test_distortion_changes_each_frame_within_its_limits():
    image = Image.new("RGB", (8, 8), (100, 150, 200))
    changed = np.array([
        np.asarray(data.photometric_distortion(image, np.random.default_rng(i)))[0, 0]
        for i in range(200)
    ]).astype(int)
    same = (abs(changed - (100, 150, 200)) <= 1).all(1).mean()
    assert 0.01 < same < 0.2  # 1/16 of the draws change nothing
    assert changed.min() >= 0 and changed[:, 2].max() == 255 and np.ptp(changed, axis=0).min() > 60


@pytest.fixture
def few_synthetic(monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_VIDEOS", {"train": 2, "val": 2})


def test_synthetic_videos_hide_what_and_not_where_and_not_in_the_references(
        few_synthetic, tmp_path):
    data.write_synthetic(tmp_path / "a")
    data.write_synthetic(tmp_path / "b")
    files = [
        sorted(path.relative_to(tmp_path / x) for path in (tmp_path / x).rglob("*.*")) for x in "ab"
    ]
    assert files[0] == files[1] and len(files[0]) == 3 + 4 * 20 * 2
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
               for path in files[0])
    train, val = (read_split(tmp_path / "a", split) for split in ("train", "val"))
    assert not {video.name for video in train} & {video.name for video in val}
    bad = 0
    for video in train + val:
        frames = [
            np.array(next(data.read_frames([path])).convert("L")).astype(float)
            for path in video.frames
        ]
        labels = [np.array(read_labels(path, data.SYNTHETIC_SIZE, 5)) for path in video.masks]
        assert len(np.unique(labels)) > 1 and (labels[0] != labels[-1]).mean() > 0.05  # things move
        # Textures vary over half a period. Noise varies over a pixel and is left out.
        smooth = [
            F.avg_pool2d(torch.from_numpy(frame)[None], 3, 1, 1)[0].numpy() for frame in frames
        ]
        texture = [
            abs(x[:, 8:] - 2 * x[:, 4:-4] + x[:, :-8])[label[:, 4:-4] > 0].mean()
            for x, label in zip(smooth, labels)
        ]
        for t in range(9, 20):
            if texture[t] < 0.6 * np.median(texture):
                bad += 1
                assert min(texture[t - offset] for offset in (3, 6, 9)) > 0.6 * np.median(texture)
    assert bad >= 4


def test_interrupted_synthetic_videos_leave_nothing(few_synthetic, tmp_path, monkeypatch):
    def interrupted(rng):
        yield next(synthetic_video(rng))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        synthetic_video = data.synthetic_video
        patch.setattr(data, "synthetic_video", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.write_synthetic(tmp_path / "data")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- the scripts


def run(script, monkeypatch, *args) -> int:
    """A script's exit code, its main called in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
    monkeypatch.setattr(training.tqdm, "write", print)
    try:
        data.run_script(script.main)
    except SystemExit as stop:
        return stop.code
    return 0


SMALL = ["--crop", 64, 64, "--frame-size", 96, 64, "--batch-size", 2, "--dilation", 3, 2, 1,
         "--warmup", 1, "--workers", 0, "--log-every", 1, "--eval-every", 0]


@pytest.mark.parametrize("model", ["mrcfa_b0", "segformer_b0"])
def test_train_evaluate_save_and_score(model, videos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert (run(training, monkeypatch, "--model", model, "--data", videos, "--out", out, "--iters",
                3, *SMALL, "--eval-every", 2) == 0)
    assert "(1 are too short" in capsys.readouterr().err
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in log if "loss" in line
            ] == [1, 2, 3] and [line["iteration"] for line in log if "mIoU" in line] == [2, 3]
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert (checkpoint["config"].items() >= {
        "model": model, "classes": CLASSES, "frame_size": [96, 64], "reference_stride": 32,
        "offsets": [3, 2, 1], "keep_ratio": None, "refine": True, "aggregate": True, "iters": 3,
        "data": str(videos),
    }.items())
    with (Image.open(out / "pictures" / "v.webp") as
          animation, Image.open(out / "pictures" / "v.png") as sheet):
        panels = (
            4 if model == "mrcfa_b0" else 3)  # frame, label, masks, and an MRCFA's single frames
        assert (animation.n_frames == 18 and animation.width == (panels + 1) * 204
                and sheet.size == (9 * 204, panels * 155))

    masks, result = tmp_path / "masks", tmp_path / "metrics.json"
    assert (run(evaluation, monkeypatch, "--checkpoint", out / "last.pt", "--data", videos,
                "--save", masks, "--json", result, "--per-class") == 0)
    printed = capsys.readouterr().out
    assert "mVC16" in printed and "road" in printed
    metrics = json.loads(result.read_text())
    assert metrics == {key: log[-1][key] for key in metrics}  # the same as at the end of training
    saved = sorted((masks / "v").iterdir())
    with Image.open(saved[0]) as mask:
        assert len(saved) == 18 and mask.mode == "P" and mask.size == (96, 64)
    again = tmp_path / "again.json"
    assert (run(evaluation, monkeypatch, "--predictions", masks, "--data", videos, "--json",
                again) == 0)
    assert json.loads(again.read_text()) == metrics
    # Three of one name: the copies get names of their own, inside the new folder alone.
    copies = tmp_path / "copies"
    masks.rename(tmp_path / "a_3")
    (masks := tmp_path / "a").symlink_to("a_3")
    assert (run(evaluation, monkeypatch, "--predictions", masks, tmp_path / "a_3", masks, masks,
                "--data", videos, "--save", copies) == 0)
    assert sorted(path.name for path in copies.iterdir()) == ["a", "a_2", "a_3", "a_4"]
    assert [path.name for path in sorted((masks / "v").iterdir())] == [path.name for path in saved]

    for args in ([training, "--data", videos, "--out", out], [
            evaluation, "--predictions", masks, "--data", videos, "--json", result
    ], [evaluation, "--checkpoint", out / "last.pt", "--data", videos, "--save", masks]):
        assert run(args[0], monkeypatch, *args[1:]) == 2
        assert "exists already" in capsys.readouterr().err


def write_cityscapes(root: Path) -> Path:
    """Labelled frames with all frames around, with none after, and without one of those before."""
    rng = np.random.default_rng(0)
    for split, city, sequence, target, missing in (
            ("train", "aachen", 0, 19, []), ("train", "bochum", 3, 42, [45]),
            ("train", "bochum", 4, 19, [13]), ("train", "ulm", 0, 19, [16, 22]),
            ("val", "munster", 1, 19, []), ("val", "munster", 2, 30, [27])):
        for t in range(target - 19, target + 11):
            if t not in missing:
                path = (root / "leftImg8bit_sequence" / split / city /
                        f"{city}_{sequence:06d}_{t:06d}_leftImg8bit.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 32), (t, sequence, 0)).save(path)
        path = (root / "gtFine" / split / city /
                f"{city}_{sequence:06d}_{target:06d}_gtFine_labelIds.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = rng.choice([0, 1, 7, 8, 24, 33], (4, 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(ids).save(path)
    return root


def test_cityscapes_clips_follow_the_frames_numbers(tmp_path):
    root = write_cityscapes(tmp_path / "cityscapes")
    clips = ClipDataset(read_split(root, "train", (9, 6, 3)), 19, (9, 6, 3), (32, 32), (64, 32))
    assert clips.too_short == 1  # ulm's, with a frame missing on both sides
    seen = {video.name: set() for video in clips.videos}
    for i in range(60):
        clip, _ = clips.choose(i)
        paths, masks = clip.frames, clip.masks
        numbers = [int(path.name.split("_")[2]) for path in paths]
        assert masks[:3] == [None] * 3 and masks[3].name.startswith(
            paths[3].name.removesuffix("_leftImg8bit.png"))
        seen[paths[3].name.removesuffix("_leftImg8bit.png")].add(tuple(numbers))
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
    assert [mask.name for mask in read_split(root, "train", (3,))[0].masks
            if mask] == [train_ids.name]
    Image.fromarray(np.array([[19]], dtype=np.uint8)).save(train_ids)
    with pytest.raises(ValueError, match="label 19"):
        read_labels(train_ids, (1, 1), 19)
    (root / "leftImg8bit_sequence").rename(root / "elsewhere")
    with pytest.raises(ValueError, match="leftImg8bit_sequence/train: no such folder"):
        read_split(root, "train", (3,))


@pytest.mark.parametrize("model", ["mrcfa_b0", "segformer_b0"])
def test_cityscapes_trains_and_evaluates_its_labelled_frames_alone(model, tmp_path, monkeypatch,
                                                                   capsys):
    root, out, masks = (write_cityscapes(
        tmp_path / "cityscapes"), tmp_path / "run", tmp_path / "masks")
    args = [
        "--dataset", "cityscapes", "--data", root, "--model", model, "--out", out, "--iters", 3,
        "--batch-size", 2, "--workers", 0]
    assert run(training, monkeypatch, *args, "--crop", 64, 128, "--frame-size", 128, 64) == 0
    config = torch.load(out / "last.pt", weights_only=True)["config"]
    assert config["reference_stride"] == 16 and len(config["classes"]) == 19
    entry = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert entry["mVC8"] is None and entry["mVC16"] is None and entry["mIoU"] is not None
    assert (run(evaluation, monkeypatch, "--checkpoint", out / "last.pt", "--data", root, "--save",
                masks) == 0)
    row = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert row[0] == model and row[3:5] == ["-", "-"]
    saved = [path for path in masks.rglob("*.png")]
    assert sorted(path.parent.name for path in saved) == [
        "munster_000001_000019", "munster_000002_000030"]
    assert run(evaluation, monkeypatch, "--predictions", masks, "--data", root) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].split()[1:] == row[1:]
    if (model == "mrcfa_b0"
        ):  # the logits of the second video's clip: played backwards, as nothing comes before
        network = MRCFA("b0", 19, 16)
        network.load_state_dict(torch.load(out / "last.pt", weights_only=True)["model"])
        frames = [
            root / f"leftImg8bit_sequence/val/munster/munster_000002_{t:06d}_leftImg8bit.png"
            for t in (39, 36, 33, 30)
        ]
        clip = torch.stack(
            [network_input(next(data.read_frames([path])), (128, 64)) for path in frames])
        with torch.no_grad():
            expected = decode_mask(network.eval()(clip[None])[0], (64, 128), (32, 64))
        with Image.open(
                masks / "munster_000002_000030" / "munster_000002_000030_leftImg8bit.png") as mask:
            assert np.array_equal(np.array(mask), expected.numpy())
        checkpoint = torch.load(out / "last.pt", weights_only=True)
        checkpoint["config"]["offsets"] = (3, 2, 1)
        torch.save(checkpoint, tmp_path / "other.pt")
        both = ["--checkpoint", out / "last.pt", tmp_path / "other.pt", "--data", root]
        assert (run(evaluation, monkeypatch, *both) == 2
                and "[(3, 2, 1), (9, 6, 3)] frames back" in capsys.readouterr().err)
        assert run(evaluation, monkeypatch, *both, "--dilation", 9, 6, 3) == 0


def test_without_arguments_it_makes_videos_trains_and_shows_pictures(few_synthetic, tmp_path,
                                                                     monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(training.RECIPES, "synthetic",
                        training.RECIPES["synthetic"] | {"iters": 2, "warmup": 1})
    assert run(training, monkeypatch, "--workers", 0) == 0
    assert "mVC8" in capsys.readouterr().out
    assert {path.name
            for path in (tmp_path / "runs/mrcfa_b0/pictures").iterdir()} == {
                f"val_00{i}.{x}"
                for i in "01"
                for x in ("webp", "png")
            }
    made = (tmp_path / "data/synthetic").stat().st_mtime_ns
    for args, code, message in (([], 2, "exists already"), (["--resume"], 0, ""), ([
            "--out", "runs/second", "--no-sar", "--keep-ratio", 1
    ], 0, "")):
        assert (run(training, monkeypatch, "--workers", 0, *args) == code
                and message in capsys.readouterr().err)
    config = torch.load("runs/second/last.pt", weights_only=True)["config"]
    assert (not config["refine"] and config["aggregate"] and config["keep_ratio"] == 1
            and config["reference_stride"] == 16)
    assert (tmp_path / "data/synthetic").stat().st_mtime_ns == made


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_training_ends_where_an_unbroken_one_does(workers, videos, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    args = [
        "--data", videos, "--iters", 4, "--save-every", 2, *SMALL, "--workers", workers,
        "--log-every", 3]
    assert run(training, monkeypatch, *args, "--out", whole) == 0
    with monkeypatch.context() as patch:
        calls = iter(range(3))  # the fourth iteration never happens
        patch.setattr(
            training, "loss_of", lambda *a, real=training.loss_of:
            (real(*a) if next(calls, None) is not None else sys.exit(9)))
        assert run(training, patch, *args, "--out", broken) == 9
    assert torch.load(broken / "last.pt", weights_only=True)["iteration"] == 2
    assert run(training, monkeypatch, "--resume", "--out", broken) == 0
    assert_same_run(whole, broken)
    torch.save({"model": {}}, broken / "last.pt")
    assert run(training, monkeypatch, "--resume", "--out", broken) == 2


def test_a_resumed_training_takes_new_flags(videos, tmp_path, monkeypatch):
    out, seeds = tmp_path / "run", []
    assert run(training, monkeypatch, "--data", videos, "--out", out, "--iters", 1, *SMALL) == 0
    monkeypatch.setattr(
        training, "loss_of",
        lambda *a, real=training.loss_of: seeds.append(torch.initial_seed() % 2**32) or real(*a))
    for i, seed in enumerate((0, 0, 1), 2):
        more = [
            "--iters", i, "--lr", 1e-5, "--head-lr", 2, "--weight-decay", 0.5, "--amp", "fp16",
            "--seed", seed]
        assert run(training, monkeypatch, "--resume", "--out", out, *more) == 0
    groups = torch.load(out / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["base_lr"] for group in groups
            ] == [1e-5, 1e-5, 2e-5] and [group["weight_decay"]
                                         for group in groups] == [0.5, 0, 0.5]
    assert (run(training, monkeypatch, "--data", videos, "--out", tmp_path / "other", "--iters", 1,
                "--seed", 1, *SMALL) == 0)
    assert (run(training, monkeypatch, "--data", videos, "--out", tmp_path / "same", "--iters", 1,
                *SMALL) == 0)
    assert (
        len(set(seeds)) == 5
    )  # that dropout begins with, on CPUs of 32 bits: of four iterations, and of the two seeds


def test_learning_rate_warms_up_and_falls():
    factors = [
        training.lr_factor(i, 100, warmup)
        for i, warmup in ((0, 10), (5, 10), (50, 10), (100, 10), (0, 0))
    ]
    assert factors == pytest.approx([1e-6, 0.95 * (0.5 + 0.5e-6), 0.5, 0, 1])


def assert_same_run(first: Path, second: Path):
    """Two runs have the same weights, optimiser, best metric and log, bit for bit."""
    a, b = (torch.load(path / "last.pt", weights_only=True) for path in (first, second))
    for key in a["model"]:
        assert torch.equal(a["model"][key], b["model"][key]), key
    for i, state in a["optimizer"]["state"].items():
        assert all(
            torch.equal(value, b["optimizer"]["state"][i][name]) for name, value in state.items())
    assert a["iteration"] == b["iteration"] and a["best"] == b["best"]
    logs = [[json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
            for path in (first, second)]
    for line in logs[0] + logs[1]:
        line.pop("iterations_per_second", None)
        line.pop("waited_for_clips", None)
    assert logs[0] == logs[1]


def join(rank: int, count: int, port: int):
    """Let this process be one of `count` that meet at a port, as torchrun would."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count),
                        ("LOCAL_WORLD_SIZE", count), ("MASTER_PORT", port)):
        os.environ[name] = str(value)
    os.environ["MASTER_ADDR"] = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def without_chance(model):
    """Training mode without dropout, drop path and BatchNorm's batch statistics."""
    model.eval()
    model.training = True
    return model


def start_training(args: list, group: tuple = (), told: Path | None = None, inside: str = "",
                   moment: int = 0):
    """The main function of a process of its own: train.py, one of a `group` (rank, count, port).

    At its end it tells of its clips and weights in the file `told`. Something happens to it, after
    `moment` times: all of its processes are told to stop ("signal"); it is killed when it calls
    os.fsync ("writing"), os.replace ("written") or decode_mask ("evaluation"); or it fails in an
    iteration ("spoilt frame", "out of memory", "killed").
    """
    def kill_in(module, name):
        real, calls = getattr(module, name), iter(range(moment))

        def killing(*a):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a)

        setattr(module, name, killing)

    def in_loss(do):
        real, calls = training.loss_of, iter(range(moment))
        training.loss_of = lambda *a: (next(calls, None) is None and do(), real(*a))[1]

    def fail(error):
        raise error

    if inside == "signal":
        def stop_all():
            for process in torch.multiprocessing.active_children():
                os.system(f"kill {process.pid}")    # from outside, as a batch system does
                process.join(0.5)                   # one that ends at it has the time to
            for _ in range(2 if group else 1):      # torchrun repeats it
                os.kill(os.getpid(), signal.SIGTERM)

        in_loss(stop_all)
    elif inside == "spoilt frame":
        in_loss(lambda: fail(InputError("frame 7 is spoilt")))
    elif inside == "out of memory":
        in_loss(lambda: fail(MemoryError()))
    elif inside == "killed":
        kill_in(training, "loss_of")
    elif inside:
        kill_in(*{"writing": (os, "fsync"), "written": (os, "replace"),
                  "evaluation": (evaluation, "decode_mask")}[inside])
    if group:
        join(*group)
    if told:
        taken, choose, train = [], ClipDataset.choose, training.Run.train
        ClipDataset.choose = lambda self, index: taken.append(index) or choose(self, index)
        training.Run.in_training_mode = lambda self: without_chance(self.model)

        def train_and_tell(self, *a):
            train(self, *a)
            torch.save({"taken": taken, "model": self.model.state_dict()}, told)

        training.Run.train = train_and_tell
    sys.argv = ["train.py", *map(str, args)]
    data.run_script(training.main)


def processes(*arguments: tuple, target=start_training) -> list[int]:
    """The exit codes of processes that run side by side."""
    context = torch.multiprocessing.get_context("spawn")
    started = [context.Process(target=target, args=a) for a in arguments]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def test_a_training_is_the_same_on_any_number_of_processes(videos, tmp_path, monkeypatch, capsys):
    (videos / "val.txt").write_text("a\nv\nb")
    args = ["--model", "segformer_b0", "--data", videos, "--iters", 3, *SMALL, "--lr", 1e-3]
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    assert processes(([*args, "--out", one, "--accumulate", 2], (), tmp_path / "one.pt")) == [0]
    port = free_port()
    assert processes(*(([*args, "--out", two], (rank, 2, port), tmp_path / f"two{rank}.pt")
                       for rank in range(2))) == [0, 0]
    # Two, stopped in their second iteration, and one that goes on.
    port = free_port()
    assert processes(*(([*args, "--out", resumed], (rank, 2, port), tmp_path / "_.pt", "signal", 1)
                       for rank in range(2))) == [128 + signal.SIGTERM] * 2
    again = [*args, "--out", resumed, "--resume"]
    assert processes((again, (), tmp_path / "resumed.pt")) == [0]

    told = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    assert sorted(told["one"]["taken"]) == list(range(6))
    assert sorted(told["two0"]["taken"] + told["two1"]["taken"]) == list(range(6))
    assert len(told["two0"]["taken"]) == 3 and told["resumed"]["taken"] == [4, 5]
    for key, value in told["one"]["model"].items():
        assert torch.equal(told["two0"]["model"][key], told["two1"]["model"][key]), key
        for other in ("two0", "resumed"):
            torch.testing.assert_close(told[other]["model"][key], value, atol=1e-5, rtol=1e-4)
    # The metrics of all processes together are those of one.
    result = tmp_path / "metrics.json"
    assert run(evaluation, monkeypatch, "--checkpoint", two / "last.pt", "--data", videos, "--json",
               result) == 0
    log = [json.loads(line) for line in (two / "log.jsonl").read_text().splitlines()]
    assert log[-1] == {"iteration": 3, **json.loads(result.read_text())}
    assert all(line["gradient_norm"] > 0 and line["waited_for_clips"] > 0 for line in log[:-1])


@pytest.mark.parametrize("how, codes, message", [
    ("spoilt frame", {2}, "train.py: frame 7 is spoilt"),
    ("out of memory", {2}, "train.py: out of memory"),
    ("killed", {-signal.SIGKILL, 2}, "lost contact with another process"),
])
def test_a_failing_process_says_why_and_ends_the_others(how, codes, message, videos, tmp_path,
                                                        capfd):
    args = ["--data", videos, "--iters", 9, *SMALL, "--out", tmp_path / "run"]
    port = free_port()
    ended = processes((args, (0, 2, port)), (args, (1, 2, port), None, how, 1))
    error = capfd.readouterr().err
    assert set(ended) == codes and message in error and "Traceback" not in error


def test_the_same_command_begins_and_continues_a_run(videos, tmp_path, monkeypatch, capsys):
    command = ["--data", videos, "--out", tmp_path / "run", *SMALL, "--resume", "--iters"]
    for iterations in (1, 1, 2):
        assert run(training, monkeypatch, *command, iterations) == 0
    error = capsys.readouterr().err
    assert "mrcfa_b0 with" in error and "1 x CPU with 1 threads, float32" in error
    assert "2 iterations of 2 clips" in error and "going on at iteration 1 of 2" in error
    for other, message in ((["--model", "mrcfa_b1"], "--model mrcfa_b0, but the command says"),
                           (["--no-sar"], "--sar True, but the command says False"),
                           (["--iters", 1], "--iters 1: ")):
        assert run(training, monkeypatch, *command, 2, *other) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(training.torch, "__version__", "3.0")
    assert run(training, monkeypatch, *command, 3) == 0
    assert "but not bit for bit" in capsys.readouterr().err


def test_killed_training_goes_on_as_if_nothing_had_been(videos, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    args = ["--data", videos, "--iters", 4, "--save-every", 1, "--eval-every", 2, *SMALL]
    assert run(training, monkeypatch, *args, "--out", whole) == 0
    # Inside the first checkpoint, inside an evaluation, and before a checkpoint gets its name.
    assert processes(([*args, "--out", killed], (), None, "writing", 0)) == [-signal.SIGKILL]
    assert processes(([*args, "--out", killed], (), None, "evaluation", 5)) == [-signal.SIGKILL]
    assert processes((["--resume", "--out", killed], (), None, "written", 4)) == [-signal.SIGKILL]
    assert run(training, monkeypatch, "--resume", "--out", killed) == 0
    assert_same_run(whole, killed)


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(videos, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "run", training.loss_of

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "loss_of", interrupted)
        assert run(training, patch, "--data", videos, "--out", out, "--iters", 4, *SMALL) == 130
    assert (f"stopped at iteration 1; to go on: python train.py --resume --out {out}"
            in capsys.readouterr().err)
    assert torch.load(out / "last.pt", weights_only=True)["iteration"] == 1
    args = ["--resume", "--out", out, "--workers", 2]
    assert processes((args, (), None, "signal", 1)) == [128 + signal.SIGTERM]
    assert torch.load(out / "last.pt", weights_only=True)["iteration"] == 3
    assert run(training, monkeypatch, "--resume", "--out", out) == 0


@pytest.mark.parametrize("spoil, message", [
    (lambda loss: loss * math.nan, "the loss of iteration 0 is nan"),
    (lambda loss: loss.register_hook(lambda gradient: gradient * math.nan) and loss,
     "the norm of its gradient nan"),
])
def test_what_is_not_finite_never_reaches_the_weights(spoil, message, videos, tmp_path, monkeypatch,
                                                      capsys):
    real = training.loss_of
    for amp, skips in (([], 0), (["--amp", "fp16"], 2)):
        out = tmp_path / f"run{skips}"
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(training, "MAX_SKIPS", 3)
            patch.setattr(training, "loss_of", lambda *a: calls.append(0) or spoil(real(*a)))
            args = ["--data", videos, "--out", out, "--iters", 9, *SMALL, "--save-every", 1, *amp]
            assert run(training, patch, *args) == 1
        error = capsys.readouterr().err
        if "gradient" in message:   # which float16's scaler mends, if it can
            assert len(calls) == 1 + skips
        if not skips:
            assert message in error and error.count("origin") == 2
        checkpoint = torch.load(out / "last.pt", weights_only=True)
        assert all(torch.isfinite(x).all() for x in checkpoint["model"].values())


def test_a_run_stopped_in_its_first_evaluation_has_its_iterations(videos, tmp_path, monkeypatch):
    out = tmp_path / "run"
    args = ["--data", videos, "--out", out, "--iters", 2, *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", lambda *a, **b: os.kill(os.getpid(), signal.SIGTERM))
        assert run(training, patch, *args) == 128 + signal.SIGTERM
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert checkpoint["iteration"] == 2 and checkpoint["evaluated"] == 0


def test_released_checkpoint_goes_through_evaluation(videos, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mrcfa_b0.pth"
    torch.save({"meta": {}, "state_dict": official_state("b0", 3)}, path)
    args = ["--checkpoint", path, "--data", videos, "--frame-size", 96, 64]
    assert (run(evaluation, monkeypatch, *args, "--model", "mrcfa_b0", "--num-classes", 3, "--save",
                tmp_path / "masks") == 0)
    assert len(list((tmp_path / "masks" / "v").iterdir())) == 18
    for more, message in ((["--model", "mrcfa_b1", "--num-classes", 3], "MiT-b0"), ([
            "--model", "mrcfa_b0", "--num-classes", 4
    ], "of 3 classes"), ([], "give --model and --num-classes"), ([
            "--model", "segformer_b0", "--num-classes", 3
    ], "is a mrcfa_b0")):
        assert run(evaluation, monkeypatch, *args, *more) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(path) in error and message in error
    torch.save(SegFormer("b0", 3, embed_dim=768).state_dict(),
               path)  # as wide as the published heads of b2 ... b5
    for classes in (3, 4):
        code = run(evaluation, monkeypatch, *args, "--model", "segformer_b0", "--num-classes",
                   classes)
        assert code == (0 if classes == 3 else 2)


def test_training_starts_from_released_and_own_weights(videos, tmp_path, monkeypatch, capsys):
    torch.save({"meta": {}, "state_dict": official_state("b0", 5)}, tmp_path / "released.pth")
    args = ["--data", videos, "--iters", 1, "--lr", 0, *SMALL]  # nothing moves from where it starts

    def start(name: str, *more) -> dict[str, torch.Tensor]:
        assert run(training, monkeypatch, *args, "--out", tmp_path / name, *more) == 0
        return torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]

    state = start("tuned", "--pretrained", tmp_path / "released.pth")
    assert "classifiers are of other classes" in capsys.readouterr(
    ).err and state["classifier.1.bias"].shape == (3,)
    assert torch.equal(state["value.weight"],
                       tensor_for("decode_head.sr1_feat.weight", (256, 256, 4, 4)))
    assert torch.equal(state["segformer.encoder.stages.0.embed.bias"],
                       tensor_for("backbone.patch_embed1.proj.bias", (32,)))
    again = start("again", "--pretrained", tmp_path / "tuned/last.pt")
    assert torch.equal(again["classifier.1.weight"], state["classifier.1.weight"])
    segformer = start("segformer", "--model", "segformer_b0")
    inside = start("inside", "--pretrained", tmp_path / "segformer/last.pt")
    assert torch.equal(inside["segformer.classifier.1.weight"], segformer["classifier.1.weight"])
    assert (run(training, monkeypatch, *args, "--out", tmp_path / "b1", "--model", "mrcfa_b1",
                "--pretrained", tmp_path / "tuned/last.pt") == 2)
    assert ("tuned/last.pt" in (error := capsys.readouterr().err)
            and "MiT-b0, this model is built on MiT-b1" in error)


def test_a_folder_of_frames_is_segmented(videos, tmp_path, monkeypatch, capsys):
    path, frames, masks = tmp_path / "model.pt", videos / "data/v/origin", tmp_path / "masks"
    torch.save({"meta": {}, "state_dict": official_state("b0", 3)}, path)
    args = ["--checkpoint", path, "--model", "mrcfa_b0", "--num-classes", 3, "--frame-size", 96, 64]
    assert (run(evaluation, monkeypatch, *args, "--frames", frames, "--save", masks, "--amp",
                "bf16") == 0)
    assert sorted(mask.stem for mask in masks.iterdir()) == sorted(
        frame.stem for frame in frames.iterdir())
    assert run(evaluation, monkeypatch, *args, "--frames", frames, "--save", masks) == 2
    assert "exists already" in capsys.readouterr().err
    assert (run(evaluation, monkeypatch, *args, "--frames", frames, "--overlay",
                tmp_path / "over") == 0)
    with (Image.open(tmp_path / "over/00000.jpg") as image, Image.open(frames / "00000.jpg") as
          frame, Image.open(masks / "00000.png") as mask):
        half = (np.array(frame).astype(float) + np.array(mask.convert("RGB"))) / 2
        assert abs(np.array(image).astype(float) - half)[:, 80:].mean() < 12  # beside the legend
    Image.new("RGB", (64, 64)).save(frames / "99999.png")
    assert run(evaluation, monkeypatch, *args, "--frames", frames, "--save", tmp_path / "more") == 2
    assert ("99999.png: (64, 64), but other frames of this video are (96, 64)"
            in capsys.readouterr().err)


def test_two_checkpoints_side_by_side_and_one_pixel_explained(videos, tmp_path, monkeypatch,
                                                              capsys):
    for variant in ("b0", "b1"):
        torch.save(
            {
                "model": MRCFA(variant, 3, 16).state_dict(), "config": {
                    "model": f"mrcfa_{variant}", "classes": CLASSES, "frame_size": [96, 64],
                    "reference_stride": 16, "keep_ratio": None, "refine": True, "aggregate": True,
                    "offsets": [9, 6, 3],
                },
            }, tmp_path / f"{variant}.pt")
    both, pictures, result = ([tmp_path / "b0.pt", tmp_path / "b1.pt"], tmp_path / "pictures",
                              tmp_path / "metrics.json")
    args = [
        "--checkpoint", *both, "--data", videos, "--pictures", pictures, "--json", result, "--save",
        tmp_path / "masks"]
    assert run(evaluation, monkeypatch, *args) == 0
    metrics = json.loads(result.read_text())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:]] == list(metrics) == ["mrcfa_b0", "mrcfa_b1"]
    assert f"{100 * metrics['mrcfa_b1']['mIoU']:.2f}" == rows[2][1]
    assert (tmp_path / "masks/mrcfa_b1/v/00000.png").exists()
    with Image.open(pictures / "v.webp") as animation:
        assert animation.n_frames == 18 and animation.width == 5 * 204
    for path in both:
        out = tmp_path / f"explained {path.stem}"
        explained = ["--checkpoint", path, "--data", videos, "--pictures", out]
        explained += ["--explain", "v", 12, 95, 0]
        assert run(evaluation, monkeypatch, *explained) == 0
        assert run(evaluation, monkeypatch, *explained) == 2
        assert "v_12_95_0.png: exists already" in capsys.readouterr().err
        with Image.open(out / "v_12_95_0.png") as picture:
            assert picture.size == (4 * 204, 10 * 155)
    for place, message in ((("v", 2, 0, 0), "a frame from 3 to 17"), (("v", 12, 96, 0), "96x64"),
                           (("v", "x", 0, 0), "--explain v x 0 0: give a frame")):
        assert (run(evaluation, monkeypatch, "--checkpoint", both[0], "--data", videos, "--explain",
                    *place, "--pictures", tmp_path / "no") == 2)
        assert message in capsys.readouterr().err


def test_benchmark_prints_a_row_for_each_way(monkeypatch, capsys):
    assert (run(evaluation, monkeypatch, "--benchmark", "--variants", "b0", "--size", 64, 64,
                "--num-classes", 3) == 0)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.splitlines() if line.startswith("| b0")]
    assert [row[0] for row in rows] == ["b0 SegFormer", "b0 MRCFA by clips", "b0 MRCFA streaming"]
    gflops = [float(row[2]) for row in rows]
    assert (gflops[1] > gflops[2] >= gflops[0] > 0 and rows[2][6] == "1.47"
            and float(rows[0][5]) == 1)


def spoil(videos: Path, how: str):
    frame, mask = videos / "data/v/origin/00003.jpg", videos / "data/v/mask/00003.png"
    if how == "truncated":
        frame.write_bytes(frame.read_bytes()[:500])
    elif how == "mask missing":
        mask.unlink()
    elif how == "mask size":
        Image.new("L", (90, 64)).save(mask)
    elif how == "label":
        Image.new("L", (96, 64), 7).save(mask)
    elif how == "mode":
        Image.new("RGB", (96, 64)).save(mask)
    elif how == "split":
        (videos / "val.txt").unlink()
    elif how == "video":
        (videos / "val.txt").write_text("v\nnowhere\n")


@pytest.mark.parametrize(
    "how, message",
    [("truncated", "00003.jpg"), ("mask missing", "00003.png: no such mask"),
     ("mask size", "(90, 64) in mode L; a mask has its frame's size, here (96, 64)"),
     ("label", "00003.png: label 7, but there are 3 classes"), ("mode", "mode RGB"),
     ("split", "val.txt"),
     ("video", "nowhere"), ],
)
def test_bad_data_is_one_line_that_names_it(how, message, videos, tmp_path, monkeypatch, capsys):
    spoil(videos, how)
    (tmp_path / "masks" / "v").mkdir(parents=True)
    for i in range(18):
        Image.new("P", (96, 64)).save(tmp_path / "masks" / "v" / f"{i:05d}.png")
    path = tmp_path / "model.pt"
    torch.save({"meta": {}, "state_dict": official_state("b0", 3)}, path)
    args = [
        "--checkpoint", path, "--model", "mrcfa_b0", "--num-classes", 3, "--data", videos,
        "--frame-size", 96, 64]
    assert run(evaluation, monkeypatch, *args) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py:")]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize(
    "script, args, message",
    [(training, ["--data", "nowhere"], "nowhere: no such data folder"),
     (training, ["--dataset", "vspw"], "--data DIR is missing"),
     (evaluation, ["--checkpoint", "none.pt"], "--data DIR is missing"),
     (evaluation, ["--checkpoint", "none.pt", "--frames", "{videos}/data/v/origin"
                   ], "they need --save"),
     (evaluation, ["--checkpoint", "none.pt", "--frames", "{videos}/data/v/origin", "--save",
                   "masks", "--json", "new"], "nothing else"),
     (evaluation, ["--checkpoint", "a", "b", "--data", "{videos}", "--explain", "v", "9", "0", "0",
                   "--pictures", "new"], "one --checkpoint"),
     (training, ["--data", "{videos}", "--dilation", "30"], "none of the 3 training videos"),
     (training, ["--data", "{videos}", "--crop", "60", "64"], "multiples of 32"),
     (training, ["--model", "mrcfa_b7"], "mrcfa_b7"),
     (training, ["--keep-ratio", "1.5"], "keep_ratio must lie in (0, 1], not 1.5"),
     (training, ["--device", "quantum"], "quantum"),
     (training, ["--seed", "-1"], "--seed -1: must be 0 or more"),
     (training, ["--lr", "nan"], "--lr nan: must be 0 or more"),
     (training, ["--scale-range", "0.001", "1"], "--scale-range 0.001 1.0"),
     (training, ["--batch-size", "5", "--accumulate", "2"], "multiple of 2 (1 processes x "
      "--accumulate 2), like 4 or 6"),
     (training, ["--data", "{videos}", "--pretrained", "none.pth", *map(str, SMALL)], "none.pth"),
     (evaluation, ["--data", "{videos}", "--checkpoint", "none.pt"
                   ], "eval.py: none.pt: No such file or directory"),
     (evaluation, ["--data", "{videos}", "--predictions", "none"],
      "none/v/00000.png: No such file"),
     (evaluation, ["--data", "{videos}", "--predictions", "{videos}/data"
                   ], "00000.png: No such file"), ],
)
def test_bad_arguments_are_one_line_that_names_them(script, args, message, videos, tmp_path,
                                                    monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(script, monkeypatch, *[arg.format(videos=videos) for arg in args]) == 2
    error = [
        line for line in capsys.readouterr().err.splitlines()
        if line.startswith(f"{script.__name__}.py")
    ]
    assert len(error) == 1 and message in error[0]


def test_prediction_masks_must_fit(videos, tmp_path, monkeypatch, capsys):
    for name, size, value in (("size", (90, 64), 0), ("class", (96, 64), 3)):
        folder = tmp_path / name / "v"
        folder.mkdir(parents=True)
        for i in range(18):
            Image.new("L", size, value).save(folder / f"{i:05d}.png")
        assert run(evaluation, monkeypatch, "--predictions", folder.parent, "--data", videos) == 2
    error = capsys.readouterr().err
    assert ("(90, 64) in mode L; a mask has its frame's size, here (96, 64)" in error
            and "class 3, but there are only 0 ... 2" in error)


def test_a_spoilt_frame_stops_training_from_inside_a_worker(videos, tmp_path, monkeypatch, capsys):
    for path in (videos / "data").glob("[ab]/origin/*.jpg"):
        path.write_bytes(path.read_bytes()[:500])
    args = [*SMALL]
    args[args.index("--workers") + 1] = 1
    assert (run(training, monkeypatch, "--data", videos, "--out", tmp_path / "run", "--iters", 2,
                *args) == 2)
    error = [
        line for line in capsys.readouterr().err.splitlines()
        if line.startswith("training.py") or line.startswith("train.py")
    ]
    assert len(error) == 1 and "not a readable image" in error[0]


# ----------------------------------------------------------------------- real files, real accidents


def released_arguments(tmp_path: Path, classes=3, name="released.pth") -> list:
    """Arguments of eval.py that name a small released checkpoint."""
    path = tmp_path / name
    torch.save({"meta": {}, "state_dict": official_state("b0", classes)}, path)
    return [
        "--checkpoint", path, "--model", "mrcfa_b0", "--num-classes", classes, "--frame-size", 96,
        64]


def write_masks(folder: Path, values: dict[str, int], count=18, size=(96, 64)) -> Path:
    """Prediction masks of the video v, of one class each: {folder: class}."""
    for name, value in values.items():
        (folder / name / "v").mkdir(parents=True)
        for t in range(count):
            Image.new("L", size, value).save(folder / name / "v" / f"{t:05d}.png")
    return folder


def test_frames_are_read_as_they_are_displayed(tmp_path):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    turned = Image.Exif()
    turned[0x0112] = 6  # display it turned to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    assert np.array_equal(np.array(data.read_frame(tmp_path / "turned.png")), np.rot90(pixels, -1))
    Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 1000).save(tmp_path / "deep.png")
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "glass.png")
    for name, message in (("deep", "more than 8 bits"), ("glass", "transparent")):
        with pytest.raises(InputError, match=f"{name}.png.*{message}"):
            data.read_frame(tmp_path / f"{name}.png")
    Image.new("RGBA", (4, 4), (9, 8, 7, 255)).save(tmp_path / "opaque.png")
    assert data.read_frame(tmp_path / "opaque.png").getpixel((0, 0)) == (9, 8, 7)


def grey_png(path: Path, values: np.ndarray, bits: int):
    """A grey PNG of 1, 2 or 4 bits a pixel, which Pillow can read but not write."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (len(content).to_bytes(4, "big") + kind + content +
                zlib.crc32(kind + content).to_bytes(4, "big"))

    rows = b""
    for row in values:
        as_bits = "".join(f"{value:0{bits}b}" for value in row)
        rows += b"\0" + bytes(
            int(as_bits[i:i + 8].ljust(8, "0"), 2) for i in range(0, len(as_bits), 8))
    height, width = values.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    path.write_bytes(data.PNG_SIGNATURE + chunk(b"IHDR", header) +
                     chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_masks_of_few_bits_keep_their_values(bits, tmp_path):
    values = np.arange(24).reshape(4, 6) % 2**bits
    grey_png(tmp_path / "mask.png", values, bits)
    assert np.array_equal(np.array(data.read_index_map(tmp_path / "mask.png", (6, 4))), values)


def test_masks_of_other_kinds_are_refused(tmp_path):
    colours = np.zeros((4, 6, 3), np.uint8)
    colours[0] = 200, 0, 50
    Image.fromarray(colours).save(tmp_path / "colours.png")
    Image.new("L", (6, 4), 3).save(tmp_path / "jpeg.png", "JPEG")
    Image.new("I;16", (6, 4), 3).save(tmp_path / "deep.png")
    for name, message in (("colours", "mode RGB"), ("jpeg", "not a PNG"),
                          ("deep", "mode I;16")):
        with pytest.raises(InputError, match=f"{name}.png.*{message}"):
            data.read_index_map(tmp_path / f"{name}.png", (6, 4))


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for names in ([f"{t}" for t in range(1, 13)], ["b_2", "b_10", "c_1"],
                  ["frame_9999", "frame_10000"]):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            Image.new("RGB", (8, 8)).save(folder / f"{name}.jpg")
        assert [path.stem for path in data.list_frames(folder)] == names
    for names in ((["0.9", "0.95", "1.0", "1.05", "1.1"]), (["v1.9", "v1.10"])):
        folder = tmp_path / f"with dots {names[0]}"
        folder.mkdir()
        for name in names:
            Image.new("RGB", (8, 8)).save(folder / f"{name}.jpg")
        with pytest.raises(InputError, match="number the frames without dots"):
            data.list_frames(folder)


def test_text_files_of_other_encodings(tmp_path):
    path = tmp_path / "classes.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-be"):
        path.write_bytes((b"\xfe\xff" if encoding == "utf-16-be" else b"") +
                         "ciel é\r\n\r\n车\r\n".encode(encoding))
        assert data.read_lines(path) == ["ciel é", "车"]
    for content in ("ciel é".encode("latin-1"), "sky".encode("utf-16-le")):
        path.write_bytes(content)
        with pytest.raises(InputError, match="classes.txt: is not UTF-8"):
            data.read_lines(path)


def only_values(videos: Path, kept: list[int]):
    """Leave only some label values in all masks, and 255 in place of the others."""
    for path in (videos / "data").rglob("mask/*.png"):
        with Image.open(path) as mask:
            mask.point([v if v in kept else 255 for v in range(256)]).save(path)


def remove_frame(videos: Path):
    (videos / "data/v/origin/00004.jpg").unlink()


@pytest.mark.parametrize(
    "change, message",
    [(lambda videos: only_values(videos, []),
      "no pixel of this mask or of the val split's other 17 has a class"),
     (remove_frame, "mask/00004.png: this mask has no frame of its name"),
     (lambda videos: (videos / "val.txt").write_text("v\nv\n"), "names the video v twice"),
     (lambda videos: (videos / "classes.txt").write_text("road\nsky\ncar\n"),
      "'sky' in .*, but 'road' in .*order"),
     (lambda videos: (videos / "classes.txt").write_text("sky\nroad\n"),
      "has 3 classes, but .* has 2")])
def test_data_that_is_not_what_was_meant_is_refused(change, message, videos, tmp_path, monkeypatch,
                                                    capsys):
    torch.save(
        {
            "model": SegFormer("b0", 3).state_dict(),
            "config": {"model": "segformer_b0", "classes": CLASSES, "frame_size": [96, 64]},
        }, tmp_path / "model.pt")
    change(videos)
    assert (run(evaluation, monkeypatch, "--checkpoint", tmp_path / "model.pt", "--data",
                videos) == 2)
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_other_class_names_and_a_single_class_are_said(videos, tmp_path, monkeypatch, capsys):
    args = ["--model", "segformer_b0", "--data", videos, "--out", tmp_path / "run", *SMALL]
    only_values(videos, [2])
    assert run(training, monkeypatch, *args, "--iters", 1) == 0
    assert "no mask of the train split has sky, car" in capsys.readouterr().err
    resume = ["--resume", "--out", tmp_path / "run", "--iters", 2]
    (videos / "classes.txt").write_text("sky\nstreet\ncar\n")
    assert run(training, monkeypatch, *resume) == 0
    assert "class 1 is 'road' in" in capsys.readouterr().err
    for names, message in (("car\nsky\nstreet", "the order of the classes differs"),
                           ("heaven\ncar\nstreet", "the order of the classes differs"),
                           ("sky\nroad", "has 3 classes, but"),
                           ("sky", "names 1 classes; give 2")):
        (videos / "classes.txt").write_text(names)
        assert run(training, monkeypatch, *resume) == 2
        assert message in capsys.readouterr().err
    (videos / "classes.txt").unlink()
    assert run(training, monkeypatch, *args[:-1], 1, "--out", tmp_path / "other") == 2
    assert "classes.txt: no such file; list the class names" in capsys.readouterr().err


def test_classes_without_pixels_are_said(videos, capsys):
    train = read_split(videos, "train")
    data.check_labels(train, CLASSES, "train")
    assert capsys.readouterr().err == ""
    data.check_labels(train, [*CLASSES, "box"], "train")
    error = capsys.readouterr().err
    assert "no mask of the train split has box: 0 and 255 are ignored, 1 is 'sky'" in error
    Image.new("L", (96, 64), 4).save(videos / "data/a/mask/00003.png")  # no mask that can't be used
    with pytest.raises(InputError, match="00003.png: label 4, but there are 3 classes"):
        data.check_labels(train, CLASSES, "train")


def test_warm_up_is_a_tenth_of_a_short_training(monkeypatch):
    for more, warmup in (([], 1500), (["--iters", "2000"], 200), (["--warmup", "7"], 7)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--dataset", "vspw", "--data", "x", *more])
        assert training.parse_args()[0].warmup == warmup


def test_results_are_saved_whatever_happens_to_the_terminal(videos, tmp_path, monkeypatch):
    (videos / "classes.txt").write_text("земля\n车\nciel é", "utf-8")
    folders = write_masks(tmp_path, {"NaN": 0, "other": 1})
    args = ["--data", videos, "--per-class", "--predictions", folders / "NaN", folders / "other"]
    broken = os.fdopen(os.pipe()[1], "w")  # its reading end is closed when the numbers are written
    os.close(broken.fileno() - 1)
    for name, terminal in (("ascii", io.TextIOWrapper(io.BytesIO(), "ascii")), ("closed", broken),
                           ("none", None)):
        monkeypatch.setattr(sys, "stdout", terminal)
        run(evaluation, monkeypatch, *args, "--json", tmp_path / f"{name}.json")
        metrics = json.loads((tmp_path / f"{name}.json").read_text())
        assert list(metrics) == ["NaN", "other"] and metrics["NaN"]["mVC8"] == 1


class FullDisk:
    """A file on a disk that is full."""
    def __init__(self, path, mode, limit):
        self.file, self.limit = open(path, mode), limit

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.file.write(content[:self.limit])
        if len(content) > self.limit:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_and_leaves_what_was_there(videos, tmp_path, monkeypatch, capsys):
    out, masks = tmp_path / "run", tmp_path / "masks"
    args = ["--model", "segformer_b0", "--data", videos, "--out", out, *SMALL]
    assert run(training, monkeypatch, *args, "--iters", 2, "--save-every", 1) == 0
    before = (out / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(data, "open", lambda path, mode: FullDisk(path, mode, 5000), raising=False)
        assert run(training, patch, "--resume", "--out", out, "--iters", 3) == 2
        assert f"train.py: {out / 'last.pt'}: No space left on device" in capsys.readouterr().err
        patch.setattr(
            data, "open", lambda path, mode: FullDisk(path, mode, 50)
            if "w" in mode else open(path, mode), raising=False)
        assert (run(evaluation, patch, "--checkpoint", out / "last.pt", "--data", videos, "--save",
                    masks) == 2)
        assert (f"eval.py: {masks / 'v/00000.png'}: No space left on device"
                in capsys.readouterr().err)
    assert (out / "last.pt").read_bytes() == before
    assert not [path for path in tmp_path.rglob("*.tmp")] and not list(masks.rglob("*.png"))
    assert run(training, monkeypatch, "--resume", "--out", out, "--iters", 3) == 0


def test_a_killed_loader_is_one_line(videos, tmp_path, monkeypatch, capsys):
    args = [*SMALL]
    args[args.index("--workers") + 1] = 1
    with monkeypatch.context() as patch:
        patch.setattr(ClipDataset, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert (run(training, patch, "--data", videos, "--out", tmp_path / "a b", "--iters", 2,
                    *args) == 2)
    assert "a process that loads clips ended" in capsys.readouterr().err.splitlines()[-1]
    assert run(training, monkeypatch, "--resume", "--out", tmp_path / "a b", "--workers", 0) == 0


@pytest.mark.parametrize("wrap", [
    lambda state: {"module." + key: value for key, value in state.items()},
    lambda state: {"epoch": 3, "state_dict": {"model.net.0." + key: value
                                              for key, value in state.items()}},
    lambda state: {"_orig_mod." + key: value for key, value in state.items()},
    lambda state: {"checkpoint": {"generator": {"weights": state}},
                   "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}},
])
def test_weights_are_found_wherever_people_have_them(wrap):
    model, other = SegFormer("b0", 3), SegFormer("b0", 3)
    load_pretrained(other, wrap(model.state_dict()))
    assert all(
        torch.equal(value,
                    other.state_dict()[key]) for key, value in model.state_dict().items())
    official = MRCFA("b0", 3)
    load_official(official, wrap(official_state("b0", 3)))
    assert torch.equal(official.value.weight,
                       tensor_for("decode_head.sr1_feat.weight", (256, 256, 4, 4)))


def test_checkpoints_that_are_not_what_was_meant_are_named(videos, tmp_path, monkeypatch, capsys):
    state = mit("b0").state_dict()
    for content, message in (({"student": state, "teacher": state},
                              "several state dicts in it ('student', 'teacher')"), ({
                                  "epoch": 3, "args": {}
                              }, "no state dict in it (weights by name); it holds 'epoch', 'args'"),
                             (state,
                              "which would have a classifier; it holds 'stages.0.embed.weight'")):
        torch.save(content, tmp_path / "file.pth")
        args = [
            "--checkpoint", tmp_path / "file.pth", "--model", "segformer_b0", "--num-classes", 3,
            "--data", videos]
        assert run(evaluation, monkeypatch, *args) == 2
        assert (f"{tmp_path / 'file.pth'}: " in (error := capsys.readouterr().err)
                and message in error)


def transformers_5(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """NVlabs' weights of an encoder under the names that transformers 5 has in memory."""
    names = {
        "proj": "patch_embeddings.proj", "norm": "patch_embeddings.layer_norm",
        "norm1": "layernorm_before", "norm2": "layernorm_after",
        "attn.sr": "attention.sequence_reduction.sequence_reduction",
        "attn.norm": "attention.sequence_reduction.layer_norm", "attn.q": "attention.q_proj",
        "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
    }
    renamed = {}
    for key, value in state.items():
        part, *middle, kind = key.split(".")
        stage = f"stages.{int(re.search('[0-9]', part)[0]) - 1}"
        if part.startswith("patch_embed"):
            renamed[f"{stage}.{names[middle[0]]}.{kind}"] = value
        elif part.startswith("norm"):
            renamed[f"{stage}.layer_norm.{kind}"] = value
        elif middle[1:] == ["attn", "kv"]:
            for name, half in zip(("k_proj", "v_proj"), value.chunk(2)):
                renamed[f"{stage}.blocks.{middle[0]}.attention.{name}.{kind}"] = half
        else:
            renamed[f"{stage}.blocks.{middle[0]}.{names['.'.join(middle[1:])]}.{kind}"] = value
    return renamed


@pytest.mark.parametrize("prefix", ["", "segformer."])
def test_transformers_5_names_in_memory_are_the_same_network(prefix):
    encoder = {
        name: tensor_for("backbone." + name, shape)
        for name, shape in backbone_shapes("b0").items()
    }
    state = {prefix + key: value for key, value in transformers_5(encoder).items()}
    module = mit("b0")
    load_pretrained(
        module,
        state | {"classifier.weight": torch.zeros(1000, 256), "classifier.bias": torch.zeros(1000)})
    golden = GOLDEN["b0", 64, 96, 32, 124]
    features = module.eval()(clip_for(4, 64, 96)[0])
    np.testing.assert_allclose([f(x).item() for x in features for f in (torch.mean, torch.std)],
                               golden["features"], atol=1e-6)
    head = {}
    for key, shape in head_shapes("b0", 124).items():
        name = (key.replace("linear_fuse.conv", "linear_fuse").replace(
            "linear_fuse.bn", "batch_norm").replace("linear_pred", "classifier"))
        name = re.sub(r"linear_c(\d)", lambda m: f"linear_projections.{int(m[1]) - 1}", name)
        if "conv_seg" not in name:
            head[f"decode_head.{name}"] = tensor_for(f"decode_head.{key}", shape)
    model = SegFormer("b0", 124).eval()
    load_pretrained(model,
                    {"segformer." + key: value
                     for key, value in transformers_5(encoder).items()} | head)
    with torch.no_grad():
        np.testing.assert_allclose(at_six_places(model(clip_for(4, 64, 96)[0, -1:])),
                                   golden["single_frame"], atol=1e-4)


def test_ctrl_c_in_an_evaluation_is_answered_at_once(videos, tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "run", []

    def interrupting(self, *_):
        seen.append(0)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationMetrics, "add_frame", interrupting)
        args = ["--model", "segformer_b0", "--data", videos, "--out", out, "--iters", 1, *SMALL]
        assert run(training, patch, *args) == 130 and len(seen) < 10
        assert ("interrupted in the evaluation at iteration 1; to go on: "
                f"python train.py --resume --out {out}" in capsys.readouterr().err)
        seen.clear()
        assert (run(evaluation, patch, "--checkpoint", out / "last.pt", "--data", videos) == 130
                and len(seen) < 10)
        assert capsys.readouterr().err.splitlines()[-1] == "eval.py: interrupted"
    assert run(training, monkeypatch, "--resume", "--out", out) == 0
    assert "mIoU" in (out / "log.jsonl").read_text()


def test_paths_may_begin_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv",
                        ["train.py", "--out=~/r", "--data", "~/d", "--dataset", "folder"])
    args, _ = training.parse_args()
    assert args.out == tmp_path / "r" and args.data == tmp_path / "d"
    assert (training.resume_command(
        Path("~/a $b'c")) == """python train.py --resume --out '~/a $b'"'"'c'""")


def test_a_log_that_is_no_terminal_stays_short(videos, tmp_path, monkeypatch, capsys):
    assert (run(training, monkeypatch, "--data", videos, "--out", tmp_path / "run", "--iters", 12,
                *SMALL, "--model", "segformer_b0") == 0)
    assert (capsys.readouterr().err.count("loss=")
            <= 2)  # at the end, and where the machine is very slow once in between


@pytest.fixture(scope="module")
def all_124_classes(tmp_path_factory) -> Path:
    """A video of 18 frames with blocks of all 124 classes, and masks that are a bit wrong."""
    root = tmp_path_factory.mktemp("vspw")
    labels = ((1 + np.arange(128) % 124).astype(np.uint8).reshape(8, 16).repeat(8, 0).repeat(
        8, 1))  # 64 x 128
    for t in range(18):
        for folder, array, suffix in (("origin", labels, "jpg"), ("mask", labels, "png"),
                                      ("../../predicted/12345678_video",
                                       np.roll(labels - 1, t % 3, 1), "png")):
            path = root / "data/12345678_video" / folder / f"{t:08d}.{suffix}"
            path.resolve().parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path.resolve())
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("12345678_video")
    return root


def test_every_way_out_holds_124_classes(all_124_classes, tmp_path, monkeypatch, capsys):
    root, video = all_124_classes, "12345678_video"
    out = {name: tmp_path / name for name in ("save", "overlay", "pictures", "metrics.json")}
    args = [
        "--predictions", root / "predicted", "--data", root, "--per-class", "--json",
        out["metrics.json"]]
    for name in ("save", "overlay", "pictures"):
        args += [f"--{name}", out[name]]
    assert run(evaluation, monkeypatch, *args) == 0
    printed = capsys.readouterr()
    rows = [line.split()[0] for line in printed.out.splitlines() if line and line[0] != " "]
    assert rows == ["predicted", *data.VSPW_CLASSES]
    assert 0 < json.loads(out["metrics.json"].read_text())["mIoU"] < 1
    with (Image.open(out["save"] / video / "00000004.png") as
          saved, Image.open(root / "predicted" / video / "00000004.png") as mask):
        assert np.array_equal(np.array(saved), np.array(mask))
    legend = Image.new("RGB", (3000, 112), "white")
    evaluation.draw_legend(legend, np.arange(256), data.VSPW_CLASSES)
    seen = {colour for _, colour in legend.getcolors(2 ** 16)}
    for k in range(124):        # all but the first, whose area is 0
        assert (tuple(data.PALETTE[3 * k:3 * k + 3]) in seen) == (k > 0)
    with (Image.open(out["pictures"] / f"{video}.png") as
          sheet, Image.open(out["pictures"] / f"{video}.webp") as animation):
        # The legend has many columns.
        assert animation.n_frames == 18
        assert animation.width > 3 * 204 + 1000 and sheet.width > 9 * 204
    assert len(list((out["overlay"] / video).glob("*.jpg"))) == 18


def test_released_files_of_known_class_counts_have_names(tmp_path):
    for count, classes in ((124, data.VSPW_CLASSES), (19, data.CITYSCAPES_CLASSES),
                           (2, ["class 0", "class 1"])):
        torch.save(SegFormer("b0", count).state_dict(), tmp_path / "file.pth")
        _, config = evaluation.load_released(tmp_path / "file.pth", "b0")
        assert config["classes"] == classes


# --------------------------------------------------------------- one's own videos, labels, files


def masks_from_zero(videos: Path):
    """Turn the label maps into those of most labelling tools: the first class is 0."""
    for path in (videos / "data").rglob("mask/*.png"):
        with Image.open(path) as mask:
            mask.point([255, 0, 1, 2, *[255] * 252]).save(path)


def test_predicted_masks_can_be_labels(videos, tmp_path, monkeypatch, capsys):
    """Label, train, predict, put the masks among the labels, and evaluate: nothing shifts."""
    masks_from_zero(videos)
    for path in (videos / "data").rglob("mask/*.png"):
        with Image.open(path) as mask:
            if mask.getextrema()[1] == 2:           # as the last class is rare, nothing refuses it
                mask.point([0, 1, 255, *[255] * 253]).save(path)
    out, masks = tmp_path / "run", tmp_path / "masks"
    args = ["--data", videos, "--out", out, "--iters", 2, *SMALL]
    assert run(training, monkeypatch, *args, "--first-label", 0) == 0
    assert "as if they counted" not in capsys.readouterr().err
    assert run(training, monkeypatch, *args, "--resume", "--first-label", 1) == 2
    evaluate = ["--checkpoint", out / "last.pt", "--data", videos]
    assert run(evaluation, monkeypatch, *evaluate, "--save", masks) == 0
    for path in (masks / "v").iterdir():
        path.replace(videos / "data/v/mask" / path.name)
    capsys.readouterr()
    assert run(evaluation, monkeypatch, *evaluate) == 0     # the checkpoint knows the first label
    assert capsys.readouterr().out.split()[6:8] == ["100.00", "100.00"]
    assert run(evaluation, monkeypatch, *evaluate, "--first-label", 1) == 2
    assert "the colours of a predicted mask" in (error := capsys.readouterr().err)
    assert "--first-label 0" in error


def test_masks_that_count_from_zero_are_named(videos, capsys):
    masks_from_zero(videos)
    for first_label, said in ((1, True), (0, False)):
        data.check_labels(read_split(videos, "train", first_label=first_label), CLASSES, "train")
        error = capsys.readouterr().err
        assert ("0 ... 2, as if they counted classes from 0" in error) == said
    labels = read_labels(videos / "data/a/mask/00000.png", (96, 64), 3, first_label=0)
    assert labels.histogram()[255] == 16 and labels.getpixel((50, 2)) == 0
    only_values(videos, [0, 1])         # a background and one class: one of two would be left
    with pytest.raises(InputError, match="0 ... 1, as if they counted classes from 0"):
        data.check_labels(read_split(videos, "train"), CLASSES[:2], "train")


def test_masks_of_an_optimiser_are_refused(tmp_path):
    grey = Image.new("L", (6, 4), 3)
    packed = grey.point(lambda _: 1).convert("P")
    packed.putpalette([0, 0, 0, 3, 3, 3])           # the same picture, stored as 1
    packed.save(tmp_path / "packed.png")
    with pytest.raises(InputError, match="packed.png: its pixels show greys other than"):
        read_labels(tmp_path / "packed.png", (6, 4), 3)
    packed.putpalette([0, 0, 0, 128, 0, 0])         # a palette of colours means its indices
    packed.save(tmp_path / "coloured.png")
    assert read_labels(tmp_path / "coloured.png", (6, 4), 3).getextrema() == (0, 0)


@pytest.mark.parametrize("names, message", [
    ("../v", "'../v' is no name of a folder inside"), ("/v", "'/v' is no name of a folder"),
    (".", "'.' is no name of a folder inside"), ("v\nv/", "names the video v twice"),
])
def test_names_of_videos_stay_in_their_folder(names, message, videos):
    (videos / "val.txt").write_text(names)
    with pytest.raises(InputError, match=message):
        read_split(videos, "val")


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    (tmp_path / "null").symlink_to(os.devnull)
    data.write_whole(tmp_path / "null", b"metrics")
    assert (tmp_path / "null").is_symlink() and Path(os.devnull).is_char_device()


def test_logits_that_are_not_finite_are_refused(videos, tmp_path, monkeypatch, capsys):
    state = official_state("b0", 3)
    state["decode_head.linear_fuse.conv.weight"][0, 0] = math.nan
    arguments = released_arguments(tmp_path)
    torch.save({"state_dict": state}, tmp_path / "released.pth")
    assert run(evaluation, monkeypatch, *arguments, "--data", videos) == 2
    assert "00000.jpg: the network's answer is not finite" in capsys.readouterr().err


def test_no_memory_is_not_called_a_spoilt_file(videos, tmp_path, monkeypatch, capsys):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", no_memory)
    monkeypatch.setattr(data.ImageOps, "exif_transpose", no_memory)
    assert run(evaluation, monkeypatch, *released_arguments(tmp_path), "--data", videos) == 2
    assert "eval.py: out of memory" in capsys.readouterr().err


def test_masks_of_another_size_are_said_before_a_training(videos, tmp_path, monkeypatch, capsys):
    for path in (videos / "data/v/mask").iterdir():
        Image.new("L", (48, 32), 1).save(path)
    monkeypatch.setenv("LOCAL_RANK", "0")           # left in a shell: it doesn't make a group
    assert run(training, monkeypatch, "--data", videos, "--out", tmp_path / "run", "--iters", 1,
               *SMALL) == 2
    assert "(48, 32) in mode L; a mask has its frame's size" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def safetensors_bytes(state: dict[str, torch.Tensor]) -> bytes:
    header, content = {}, b""
    for name, value in state.items():
        start, content = len(content), content + value.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape),
                        "data_offsets": [start, len(content)]}
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + content


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server of what is in a folder, in place of Hugging Face, and torch.hub's own folder."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            path = folder / self.path.strip("/")
            if not path.is_file():
                return self.send_error(404)
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if "broken" not in self.path else content[:1000])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
        yield folder
        server.shutdown()


def test_pretrained_weights_by_name(hub, videos, tmp_path, monkeypatch, capsys):
    encoder = {}
    for key, value in official_state("b0", 3).items():
        if key.startswith("backbone."):
            encoder[key.removeprefix("backbone.")] = value

    def serve(name, file, content):
        path = hub / name / "resolve/main" / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)

    buffer = io.BytesIO()
    torch.save(encoder, buffer)
    serve("nvidia/mit-b0", "pytorch_model.bin", buffer.getvalue())
    serve("nvidia/safe", "model.safetensors", safetensors_bytes(encoder))
    serve("nvidia/broken", "pytorch_model.bin", buffer.getvalue())
    serve("nvidia/page", "pytorch_model.bin", b"<!DOCTYPE html><html>sign in</html>")
    args = ["--data", videos, "--iters", 1, *SMALL, "--lr", 0, "--out"]
    for name in ("mit-b0", "safe"):
        assert run(training, monkeypatch, *args, tmp_path / name, "--pretrained", f"nvidia/{name}",
                   "--warmup", 0) == 0
        state = torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        assert torch.equal(state["segformer.encoder.stages.0.embed.weight"],
                           encoder["patch_embed1.proj.weight"])
    (hub / "nvidia/mit-b0/resolve/main/pytorch_model.bin").unlink()     # it is kept
    assert data.download_pretrained("nvidia/mit-b0").name == "pytorch_model.bin"
    for name, message in (("broken", "can't be read as a checkpoint"), ("page", "is a web page"),
                          ("none", "404")):
        assert run(training, monkeypatch, *args, tmp_path / name, "--pretrained",
                   f"nvidia/{name}") == 2
        error = capsys.readouterr().err
        assert message in error and f"nvidia/{name}/resolve/main/" in error and "put it at" in error
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match="can't be fetched .*refused"):
        data.download_pretrained("nvidia/mit-b1")
    left = [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert sorted(path.parent.name for path in left) == ["mit-b0", "safe"]


# --------------------------------------------------------------------------------------- few labels


def keep_masks(videos: Path, kept: dict[str, list[int]]):
    """Remove all masks of some videos but those of a few frames."""
    for name, frames in kept.items():
        for path in (videos / "data" / name / "mask").iterdir():
            if int(path.stem) not in frames:
                path.unlink()


def test_training_takes_a_few_labelled_frames(videos, tmp_path, monkeypatch, capsys):
    keep_masks(videos, {"a": [1, 5], "v": [0, 12]})  # b and short have all of theirs
    args = ["--data", videos, *SMALL]
    for script, more in ((training, ["--out", tmp_path / "dense"]),
                         (evaluation, ["--predictions", tmp_path])):
        assert (run(script, monkeypatch, *args[:2], *more,
                    *(SMALL if script is training else [])) == 2)
        assert "labelled; --labels sparse allows that)" in capsys.readouterr().err
    for model in ("mrcfa_b0", "segformer_b0"):
        whole, broken = tmp_path / f"whole {model}", tmp_path / f"broken {model}"
        flags = [*args, "--labels", "sparse", "--model", model, "--iters", 4, "--save-every", 2]
        assert run(training, monkeypatch, *flags, "--out", whole) == 0
        with monkeypatch.context() as patch:
            calls = iter(range(3))
            patch.setattr(
                training, "loss_of", lambda *a, real=training.loss_of:
                (real(*a) if next(calls, None) is not None else sys.exit(9)))
            assert run(training, patch, *flags, "--out", broken) == 9
        assert run(training, monkeypatch, "--resume", "--out", broken) == 0
        assert_same_run(whole, broken)
    (videos / "data/v/mask/00000.png").unlink()
    (videos / "data/v/mask/00012.png").unlink()
    assert run(training, monkeypatch, *args, "--labels", "sparse", "--out", tmp_path / "none") == 2
    assert "v/mask: none of this video's 18 frames has a mask" in capsys.readouterr().err


def test_sparse_clips_end_at_labelled_frames(videos):
    keep_masks(videos, {"a": [1, 5], "b": [4]})
    clips = ClipDataset(read_split(videos, "train", sparse=True), 3, (3, 2, 1), crop=(32, 32),
                        frame_size=(96, 64))
    assert clips.too_short == 1
    seen = set()
    for i in range(40):
        clip, _ = clips.choose(i)
        assert clip.masks[-1].stem == clip.frames[-1].stem
        seen.add(tuple(int(path.stem) for path in clip.frames))
    assert seen == {(2, 3, 4, 5), (4, 3, 2, 1), (1, 2, 3, 4)}
    assert clips[0][1].shape == (32, 32)  # the target's labels alone


def test_evaluation_of_a_few_labelled_frames_uses_all(videos, tmp_path, monkeypatch, capsys):
    arguments = released_arguments(tmp_path)
    assert (run(evaluation, monkeypatch, *arguments, "--data", videos, "--save",
                tmp_path / "dense") == 0)
    keep_masks(videos, {"v": [3, 12]})
    args = [
        *arguments, "--data", videos, "--labels", "sparse", "--json", tmp_path / "metrics.json",
        "--pictures", tmp_path / "pictures"]
    assert (run(evaluation, monkeypatch, *args, "--save", tmp_path / "sparse", "--overlay",
                tmp_path / "over") == 0)
    assert "16 of them are of frames without labels" in capsys.readouterr().out
    masks = [sorted((tmp_path / name / "v").iterdir()) for name in ("dense", "sparse")]
    assert [path.read_bytes()
            for path in masks[0]] == [path.read_bytes()
                                      for path in masks[1]] and len(masks[1]) == 18
    expected = SegmentationMetrics(3)
    for t in (3, 12):
        label = np.array(read_labels(videos / f"data/v/mask/{t:05d}.png", (96, 64), 3))
        with Image.open(masks[0][t]) as mask:
            expected.update(label[None], np.array(mask)[None])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == {**expected.compute(), "mVC8": None, "mVC16": None}
    with Image.open(tmp_path / "pictures/v.webp") as animation:
        assert animation.n_frames == 2
    assert (run(evaluation, monkeypatch, "--predictions", tmp_path / "sparse", "--data", videos,
                "--labels", "sparse") == 0)


def test_consistency_counts_windows_that_are_labelled_throughout():
    metrics = SegmentationMetrics(2)
    for t in range(40):
        label, mask = torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
        mask[0, 0] = t == 5
        metrics.add_frame(*(None, None) if t == 10 else (label, mask))
    metrics.end_video()
    # Windows of 8 end at frames 7 ... 9, all with the pixel that flickers, and at 18 ... 38;
    # windows of 16 at 26 ... 38.
    assert (metrics.compute()["mVC8"] == pytest.approx((3 * 3 / 4 + 21) / 24)
            and len(metrics.consistencies[16]) == 13)


# ------------------------------------------------------------------------------- beside the network


def blobs(classes=124, size=(60, 108)) -> torch.Tensor:
    """Logits like a real video's: a few areas of one class each, with noise."""
    torch.manual_seed(0)
    areas = torch.randn(1, classes, 2, 3)
    return F.interpolate(areas, size, mode="bilinear")[0] * 5 + 0.02 * torch.randn(classes, *size)


@pytest.mark.parametrize("network, frame", [((240, 432), (241, 427)), ((128, 192), (300, 401)),
                                            ((256, 384), (61, 99)), ((60, 108), (60, 108)), ])
def test_masks_of_real_videos_decode_exactly_without_interpolating_all(network, frame, monkeypatch):
    logits = blobs()
    full = F.interpolate(F.interpolate(logits[None], network, mode="bilinear"), frame,
                         mode="bilinear")[0]
    monkeypatch.setattr(data, "interpolate_and_decode", None)
    assert torch.equal(decode_mask(logits, network, frame).long(), full.argmax(0))


def test_background_work_keeps_order_passes_errors_and_stops():
    made = []

    def numbers():
        for i in range(10):
            made.append(i)
            if i == 7:
                raise InputError("seven")
            yield i

    taken = []
    with pytest.raises(InputError, match="seven"):
        for i in evaluation.in_background(numbers()):
            taken.append(i)
            assert len(made) <= len(taken) + evaluation.AHEAD + 1
    assert taken == list(
        range(7)) and not [t for t in threading.enumerate() if "ThreadPool" in t.name]
    background = evaluation.in_background(iter(range(10**9)))
    assert next(background) == 0
    background.close()
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def start_evaluation(args: list, group: tuple, frame: str = ""):
    """The main function of a process of its own: eval.py, one of a `group`; it fails at `frame`."""
    join(*group)
    read = data.read_frame

    def read_or_fail(path):
        if path.name == frame:
            raise InputError(f"{path}: spoilt")
        return read(path)

    data.read_frame = read_or_fail
    sys.argv = ["eval.py", *map(str, args)]
    data.run_script(evaluation.main)


def test_two_processes_evaluate_as_one_does(videos, tmp_path, monkeypatch, capfd):
    (videos / "val.txt").write_text("a\nv\nb")
    arguments = released_arguments(tmp_path)
    names = ["save", "overlay", "pictures", "json"]
    both = []
    for number in ("one", "two"):
        both.append([*arguments, "--data", videos, "--per-class", "--single-frames"])
        for name in names:
            both[-1] += [f"--{name}", tmp_path / f"{number}_{name}"]
    assert run(evaluation, monkeypatch, *both[0]) == 0
    printed = capfd.readouterr().out
    port = free_port()
    assert processes(*((both[1], (rank, 2, port)) for rank in range(2)),
                     target=start_evaluation) == [0, 0]
    assert capfd.readouterr().out == printed
    for name in names:
        one, two = tmp_path / f"one_{name}", tmp_path / f"two_{name}"
        files = sorted(path.relative_to(one) for path in one.rglob("*.*"))
        assert files == sorted(path.relative_to(two) for path in two.rglob("*.*"))
        assert all((one / path).read_bytes() == (two / path).read_bytes() for path in files)
    assert (tmp_path / "one_json").read_text() == (tmp_path / "two_json").read_text()
    port = free_port()      # and where one fails, none is left waiting
    again = [*arguments, "--data", videos]
    assert processes(*((again, (rank, 2, port), "00017.jpg") for rank in range(2)),
                     target=start_evaluation) == [2, 2]
    assert "00017.jpg: spoilt" in capfd.readouterr().err


def test_videos_are_shared_out_evenly_by_frames(monkeypatch):
    lengths = [5, 1, 30, 4, 2, 9, 12, 1]
    videos = [data.Video(f"{i}", ["frame"] * n, [None] * n) for i, n in enumerate(lengths)]
    monkeypatch.setattr(evaluation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluation.dist, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(evaluation.dist, "get_rank", lambda rank=rank: rank)
        shares.append(evaluation.share_of_videos(videos))
    assert sorted(shares[0] + shares[1]) == list(range(8))
    assert [sum(lengths[i] for i in share) for share in shares] == [32, 32]


class CountOperations(TorchDispatchMode):
    """Count what PyTorch dispatches: what an accelerator would have to be told one by one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_training_step_does_not_starve_an_accelerator(monkeypatch):
    monkeypatch.setattr(segformer, "LOSS_BAND", 10**6)  # whole maps, as on an accelerator
    model = MRCFA("b1", 5).train()
    clips, labels = torch.randn(8, 4, 3, 64, 64), torch.randint(0, 5, (8, 4, 64, 64))
    with CountOperations() as operations:
        mrcfa_loss(*model(clips), labels)
    assert operations.count <= 4000


# -------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_rebuilds_its_model(videos, tmp_path, monkeypatch):
    for name, model_class in (("mrcfa_b0", MRCFA), ("segformer_b0", SegFormer)):
        assert (run(training, monkeypatch, "--model", name, "--data", videos, "--out",
                    tmp_path / name, "--iters", 1, *SMALL) == 0)
        path = tmp_path / name / "last.pt"
        model, config = load_checkpoint(path)
        assert isinstance(model, model_class) and not model.training
        assert (config["model"] == name and config["classes"] == CLASSES
                and list(config["frame_size"]) == [96, 64])
        checkpoint = torch.load(path, weights_only=True)
        for key, value in model.state_dict().items():
            assert torch.equal(value, checkpoint["model"][key]), key
        assert list(config["offsets"]) == [3, 2, 1]
        for change in ({"model": {}}, {"config": {}}, {"config": {**config, "classes": 3}}, {
                "config": {**config, "model": "mrcfa_b9"}
        }, {"config": {**config, "classes": CLASSES + ["one more"]}}):
            torch.save(checkpoint | change, tmp_path / "wrong.pt")
            with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'wrong.pt'}: ")) as error:
                load_checkpoint(tmp_path / "wrong.pt")
            assert "\n" not in str(error.value)
    for name in ("nothing.pt", "."):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            load_checkpoint(tmp_path / name)


def test_a_held_segformer_stays_as_it_was(videos, tmp_path, monkeypatch, capsys):
    args = ["--data", videos, "--iters", 2, *SMALL]
    assert (run(training, monkeypatch, *args, "--model", "segformer_b0", "--out",
                tmp_path / "first") == 0)
    held = [*args, "--out", tmp_path / "held", "--freeze-segformer"]
    assert (run(training, monkeypatch, *held) == 2
            and "--freeze-segformer needs" in capsys.readouterr().err)
    assert run(training, monkeypatch, *held, "--pretrained", tmp_path / "first/last.pt") == 0
    rows = [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line.count(".") == 5
    ]
    assert rows == ["mrcfa_b0", "single_frames"]
    first, second = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
                     for name in ("first", "held"))
    assert all(torch.equal(value, second[f"segformer.{key}"]) for key, value in first.items())
    start = build_model("mrcfa_b0", {"variant": "b0", "num_classes": 3})
    assert not torch.equal(second["aggregation.g2.convs.0.weight"],
                           start.aggregation.g2.convs[0].weight)


# ------------------------------------------------------------------------------------- and the rest


def test_wrong_labels_and_frames_are_refused():
    logits, stream = torch.zeros(2, 3, 4, 4), tiny().stream()
    for labels in (torch.zeros(2, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"labels must be int64 and \(B, H, W\), .* B = 2"):
            segmentation_loss(logits, labels)
    stream(torch.zeros(3, 64, 96))
    for frame in (torch.zeros(3, 96, 64), torch.zeros(1, 3, 64, 96)):
        with pytest.raises(ValueError, match=r"in a stream of \(3, 64, 96\)"):
            stream(frame)


def test_segmentation_loss_counts_ignored_pixels():
    logits, labels = torch.zeros(1, 4, 2, 2), torch.full((1, 8, 8), 255)
    labels[:, :4] = 1
    assert segmentation_loss(logits, labels).item() == pytest.approx(math.log(4) / 2)


def test_labels_are_read_as_the_layout_says(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(np.array([[0, 1, 2, 3, 255]], dtype=np.uint8)).save(path)
    assert np.array(read_labels(path, (5, 1), 3)).tolist() == [[255, 0, 1, 2, 255]]
    with pytest.raises(ValueError, match="label 3, but there are 2 classes"):
        read_labels(path, (5, 1), 2)


def test_readme_runs_as_printed(videos, tmp_path, monkeypatch):
    folder = Path(__file__).parent
    text = (folder / "README.md").read_text() + (folder / "RESULTS.md").read_text()
    monkeypatch.chdir(tmp_path)  # where the snippets find a run and a folder of frames
    (videos / "data/v/origin").rename(tmp_path / "frames")
    Path("runs/mrcfa_b0").mkdir(parents=True)
    config = {"model": "mrcfa_b0", "classes": CLASSES, "frame_size": [96, 64], "offsets": [9, 6, 3]}
    config |= {"reference_stride": 32, "keep_ratio": None, "refine": True, "aggregate": True}
    checkpoint = {"model": MRCFA("b0", 3).state_dict(), "config": config}
    torch.save(checkpoint, "runs/mrcfa_b0/last.pt")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert len(list(Path("masks").iterdir())) == 18

    lines = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        lines += block.splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for code in re.findall(r"`(python [^`]+)`", prose):
        lines.append(code.replace("\n", " "))
    commands = 0
    for line in lines:
        for script, arguments in re.findall(r"\b(train|eval)\.py([^&]*)", line.split("#")[0]):
            if any(word in arguments for word in ("--resume", "--help", "...")):
                continue
            arguments = arguments.replace(" N", " 1").split()
            monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
            # This exits where there is no such flag.
            {"train": training, "eval": evaluation}[script].parse_args()
            commands += 1
    assert commands > 10
