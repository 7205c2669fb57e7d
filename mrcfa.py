"""MRCFA: Mining Relations among Cross-Frame Affinities for Video Semantic Segmentation.

Sun, Liu, Tang, Chhatkuli, Zhang, Van Gool, ECCV 2022, arXiv 2207.10436. The target frame is
segmented with the help of T-1 earlier reference frames. Queries Q come from the target, keys K and
values V from each reference. At the scales l = 2, 3, 4 the queries have the strides 8, 16, 32.
K^2, K^3 and V are brought to one grid of stride r = 32 (or 16); its cells are the reference's
tokens. V comes from F_hat, SegFormer's fused feature map F at stride 8 instead of 4.

    cross-frame affinities   A^l = Q^l (K^l)^T at the scales l = 2, 3, 4. Column j, reshaped to
                             (h_l, w_l), is the affinity map of reference token j over the target
    STM, selective           keeps the most important tokens of a reference, ranked by A^4: the
     token masking           same tokens at all scales, because MAA adds up the maps of *one* token
    SAR, single-scale        G^l, a stack of (2-D convolution, GroupNorm, ReLU), slides over the
     affinity refinement     target's positions and refines each token's affinity map separately
    MAA, multi-scale         M^3 = G^43(up(G^4(A^4)) + G^3(A^3))
     affinity aggregation    M^2 = G^32(up(M^3) + G^2(A^2))
    reconstruction           B_i = softmax(M^2) over the tokens of reference i; O_i = B_i V_i
                             O = mean of the O_i + F_hat of the target; a classifier reads O

`up` is the paper's Gamma, bilinear upsampling. The paper also has a Gamma around the sum of the
O_i. The released code averages them, without a Gamma, because they have stride 8 already. K^4
always has stride 32; for r = 16, A^4 is resized along the axis of the reference.

Letters in shapes: b clips, T frames per clip, K classes. The encoder's F_l has C_l channels and
n_l = h_l w_l positions. A reference has N tokens, of which STM keeps m.
"""
import math
import re
import warnings
from collections import deque
from contextlib import nullcontext
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer import (EMBED_DIM, InputError, SegFormer, at_least_float32, load_pretrained,
                       load_strictly, make_classifier, read_checkpoint, read_state_dict, rename,
                       segmentation_loss)

OFFSETS = (9, 6, 3)      # distances of the T-1 references from the target, oldest first
REFERENCE_STRIDE = 32    # r: 32 for VSPW, 16 for Cityscapes
IMPORTANCE_TOP = 5       # largest affinities that make up a token's importance
KEEP_RATIO = 0.5         # p, the share of a reference's tokens that STM keeps
KEEP_RATIO_B0 = 0.8      # p of b0
FRAME_LOSS_WEIGHT = 0.5  # weight of the per-frame loss; the clip loss has 1

# The layers of SAR's and MAA's stacks (see TokenwiseConvs), as in the released code: (channels in,
# channels out, kernel). Only b1 has two layers, and two channels per token between its stacks.
STACKS = {
    "g4": [(1, 1, 3)],
    "g3": [(1, 1, 5)],
    "g2": [(1, 1, 5)],
    "g43": [(1, 1, 3)],
    "g32": [(1, 1, 3)],
}
STACKS_B1 = {
    "g4": [(1, 1, 3), (1, 2, 3)],
    "g3": [(1, 1, 3), (1, 2, 3)],
    "g2": [(1, 1, 5), (1, 2, 3)],
    "g43": [(2, 2, 3), (2, 2, 3)],
    "g32": [(2, 2, 3), (2, 1, 3)],
}


def reference_indices(t: int, offsets: Sequence[int] = OFFSETS) -> list[int]:
    """Return the indices of target t's T-1 references in a video, oldest first; [] if t < T-1.

    If t is at most the largest offset, the references are spread evenly over the frames before t.
    """
    count = len(offsets)
    if t < count:
        return []
    if t <= max(offsets):       # <= and ceil: as in the released code
        return [math.ceil(t * k / count) for k in range(count)]
    return [t - offset for offset in offsets]


def as_sequence(x: Tensor) -> Tensor:
    """Maps as a sequence of positions: (b, C, h, w) -> (b, h w, C)."""
    return x.flatten(2).transpose(1, 2)


def as_maps(x: Tensor, size: Sequence[int]) -> Tensor:
    """A sequence of positions as maps: (b, h w, C) -> (b, C, h, w), in channels-last format."""
    return x.unflatten(1, tuple(size)).permute(0, 3, 1, 2)


def without_autocast(x: Tensor):
    """A context with autocast off on the device of x."""
    if not torch.amp.is_autocast_available(x.device.type):  # as on the meta device
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


# --------------------------------------------------------------- selective token masking (STM)

def token_importance(A: Tensor) -> Tensor:
    """A token's importance, the sum of the 5 largest entries in its column of A: (b, n_l, tokens)
    -> (b, 1, tokens)."""
    top = min(IMPORTANCE_TOP, A.shape[1])
    return A.topk(top, dim=1).values.sum(1, keepdim=True)


def selective_token_masking(importance: Tensor, keep_ratio: float) -> Tensor:
    """STM: the indices of the m = max(1, int(p N)) most important tokens, (b, 1, N) -> (b, m)."""
    m = max(1, int(keep_ratio * importance.shape[2]))
    return importance[:, 0].topk(m).indices


def take_tokens(x: Tensor, kept: Tensor) -> Tensor:
    """The tokens with the indices `kept` (b, m) out of x (b, N, C): (b, m, C)."""
    return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))


# ---------------------------------------------------------------------------------- SAR and MAA

class TokenwiseConvs(nn.Module):
    """A stack G of (convolution, GroupNorm, ReLU) that refines the map of each token separately.

    `layers` lists (channels in, channels out, kernel); without layers it is the identity. The maps
    of m tokens are (b, m c_in, h, w) and become (b, m c_out, h, w), a token's channels side by
    side. The convolutions slide over the target's positions; tokens never mix.
    """

    def __init__(self, *layers: tuple[int, int, int]):
        super().__init__()
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for c_in, c_out, kernel in layers:
            self.convs.append(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2))
            self.norms.append(nn.GroupNorm(1, c_out))

    def forward(self, maps: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            # In its plain form, with each token's map as an image of its own, a layer is
            #     images = maps.unflatten(1, (m, c_in)).flatten(0, 1)      # (b m, c_in, h, w)
            #     images = F.relu(norm(conv(images)))                      # (b m, c_out, h, w)
            #     maps = images.unflatten(0, (b, m)).flatten(1, 2)         # (b, m c_out, h, w)
            # One convolution with a group per token is the same. It is far faster, because Q K^T
            # has its tokens last in memory: they are the channels of a channels-last image.
            m = maps.shape[1] // conv.in_channels
            maps = F.conv2d(maps, conv.weight.repeat(m, 1, 1, 1), conv.bias.repeat(m),
                            padding=conv.padding, groups=m)
            # Unlike torch.nn.functional's, this one takes maps of a single position.
            maps = torch.group_norm(maps, m, norm.weight.repeat(m), norm.bias.repeat(m), norm.eps)
            maps = F.relu(maps, inplace=True)
        return maps


class AffinityAggregation(nn.Module):
    """SAR and MAA for one reference: affinity maps A^2, A^3, A^4 (b, m, h_l, w_l) -> M^2
    (b, m, h_2, w_2).

    `refine=False` leaves out SAR: G^4, G^3 and G^2 are the identity. `aggregate=False` leaves out
    MAA except for G^32: M^2 = G^32(G^2(A^2)). The second channel per token of b1 is made by SAR:
    without SAR, G^43 and G^32 of b1 are those of the other variants.
    """

    def __init__(self, variant: str, refine: bool = True, aggregate: bool = True):
        super().__init__()
        self.aggregate = aggregate
        stacks = STACKS_B1 if variant == "b1" and refine else STACKS
        if not refine:
            stacks = stacks | {"g4": [], "g3": [], "g2": []}
        if not aggregate:
            stacks = stacks | {"g4": [], "g3": [], "g43": []}
        self.g4 = TokenwiseConvs(*stacks["g4"])
        self.g3 = TokenwiseConvs(*stacks["g3"])
        self.g2 = TokenwiseConvs(*stacks["g2"])
        self.g43 = TokenwiseConvs(*stacks["g43"])
        self.g32 = TokenwiseConvs(*stacks["g32"])

    def forward(self, A2: Tensor, A3: Tensor, A4: Tensor) -> Tensor:    # (b, m, h_l, w_l)
        refined2 = self.g2(A2)                      # (b, m c, h_2, w_2), c channels per token
        if not self.aggregate:
            return self.g32(refined2)
        refined3 = self.g3(A3)                                          # (b, m c, h_3, w_3)
        refined4 = self.g4(A4)                                          # (b, m c, h_4, w_4)
        M3 = self.g43(up(refined4, refined3) + refined3)                # (b, m c, h_3, w_3)
        return self.g32(up(M3, refined2) + refined2)                    # (b, m, h_2, w_2)


def up(coarse: Tensor, fine: Tensor) -> Tensor:
    """MAA's upsampling, the paper's Gamma, to the size of `fine`. As in the released code it has
    `align_corners=True`; no other resizing has."""
    return F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=True)


# ------------------------------------------------------------------------------------ the model

class Reference(NamedTuple):
    """Keys and values of b reference frames, each computed from its own frame only."""
    key2: Tensor    # K^2 (b, N, C_2)
    key3: Tensor    # K^3 (b, N, C_3)
    key4: Tensor    # K^4 (b, n_4, C_4), on the grid of stride 32
    value: Tensor   # V   (b, N, 256)


class Reconstruction(NamedTuple):
    """The steps of `MRCFA.reconstruct` with one reference, as matrices except for M2 and O_i."""
    kept: Tensor    # indices of the tokens that STM keeps, (b, m)
    A2: Tensor      # the target's affinities to them, (b, n_l, m) for l = 2, 3, 4
    A3: Tensor
    A4: Tensor
    M2: Tensor      # a map for each token after SAR and MAA, (b, m, h_2, w_2)
    B: Tensor       # weights of the tokens' values, (b, n_2, m)
    O_i: Tensor     # the target's features read from this reference, (b, 256, h_2, w_2)


class MRCFA(nn.Module):
    """SegFormer with cross-frame affinities.

    In evaluation: a clip (b, T, 3, H, W), oldest frame first and target last -> the target's logits
    (b, K, H/4, W/4). A clip of fewer than T frames gets SegFormer's logits of its last frame.
    In training: -> (frame_logits, clip_logits), both (b, T, K, H/4, W/4). frame_logits[:, t] is
    SegFormer's prediction for frame t. All clip_logits are of the target: clip_logits[:, i] is read
    from O_i, and clip_logits[:, -1] from O.

    `reference_stride` is r, 32 or 16. `offsets` are the distances of the T-1 references from the
    target in a video: four of them make T = 5, with one more auxiliary classifier. `keep_ratio` is
    STM's p: None is the paper's for the variant, 1 keeps all tokens (no STM). `refine=False` leaves
    out SAR. `aggregate=False` leaves out MAA; STM then ranks by A^2, because nothing trains A^4.

    Raises ValueError unless H and W are multiples of 32, and for clips of more than T frames or,
    in training, of fewer.
    """

    def __init__(self, variant: str = "b1", num_classes: int = 124,
                 reference_stride: int = REFERENCE_STRIDE, keep_ratio: float | None = None,
                 refine: bool = True, aggregate: bool = True, offsets: Sequence[int] = OFFSETS):
        super().__init__()
        if keep_ratio is None:
            keep_ratio = KEEP_RATIO_B0 if variant == "b0" else KEEP_RATIO
        self.reference_stride = reference_stride
        self.keep_ratio = keep_ratio
        self.offsets = tuple(offsets)

        self.segformer = SegFormer(variant, num_classes)
        _, c2, c3, c4 = self.segformer.encoder.channels
        s2, s3 = reference_stride // 8, reference_stride // 16
        self.query2 = nn.Linear(c2, c2)
        self.query3 = nn.Linear(c3, c3)
        self.query4 = nn.Linear(c4, c4)
        self.key2 = nn.Linear(c2, c2)
        self.key3 = nn.Linear(c3, c3)
        self.key4 = nn.Linear(c4, c4)
        self.reduce2 = nn.Conv2d(c2, c2, s2, stride=s2)
        self.reduce3 = nn.Conv2d(c3, c3, s3, stride=s3)
        self.value = nn.Conv2d(EMBED_DIM, EMBED_DIM, s2, stride=s2)
        self.aggregation = AffinityAggregation(variant, refine, aggregate)
        self.auxiliary_classifiers = nn.ModuleList(
            make_classifier(EMBED_DIM, num_classes) for _ in offsets)
        self.classifier = make_classifier(EMBED_DIM, num_classes)

    def forward(self, clip: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        batch, frames = clip.shape[:2]
        T = len(self.offsets) + 1
        if frames < T and not self.training:
            return self.segformer(clip[:, -1])
        if frames != T:
            raise InputError(f"clip has {frames} frames; this model takes {T} (target last)")

        # All frames are encoded as one batch, time first: b maps of each frame, the target's last.
        images = clip.transpose(0, 1).flatten(0, 1)                     # (T b, 3, H, W)
        features, fused = self.encode(images)
        F_hat = self.at_stride_8(fused)                                 # (T b, 256, h_2, w_2)
        queries = self.queries([F_l[-batch:] for F_l in features])
        outputs = []
        for i in range(T - 1):
            of_frame_i = slice(i * batch, (i + 1) * batch)
            reference = self.keys_and_values([F_l[of_frame_i] for F_l in features],
                                             F_hat[of_frame_i])
            outputs.append(self.reconstruct(queries, reference).O_i)    # (b, 256, h_2, w_2)
        O = self.merge(outputs, F_hat[-batch:])
        logits = self.classify(self.classifier, O)                      # (b, K, h_1, w_1)
        if not self.training:
            return logits

        clip_logits = []
        for auxiliary, O_i in zip(self.auxiliary_classifiers, outputs, strict=True):
            clip_logits.append(self.classify(auxiliary, O_i))
        clip_logits.append(logits)
        frame_logits = self.segformer.classifier(fused)                 # (T b, K, h_1, w_1)
        frame_logits = frame_logits.unflatten(0, (T, batch)).transpose(0, 1)
        return frame_logits, torch.stack(clip_logits, dim=1)

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images (b, 3, H, W) -> [F_1 ... F_4] and SegFormer's fused F (b, 256, H/4, W/4)."""
        features = self.segformer.encoder(images)
        fused = self.segformer.head(features)
        return features, fused

    def at_stride_8(self, fused: Tensor) -> Tensor:
        """F_hat: F (b, 256, h_1, w_1) bilinearly at half the size, which is the mean of 2x2."""
        return F.avg_pool2d(fused, 2)

    # Affinities are unscaled dot products of up to 512 channels, too large for float16. So queries,
    # keys, values and affinities are computed with autocast off.

    def queries(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Q^2, Q^3, Q^4 of the target, (b, h_l, w_l, C_l), from its [F_1 ... F_4]."""
        with without_autocast(features[0]):
            _, f2, f3, f4 = (at_least_float32(F_l).permute(0, 2, 3, 1) for F_l in features)
            return [self.query2(f2), self.query3(f3), self.query4(f4)]

    def keys_and_values(self, features: Sequence[Tensor], F_hat: Tensor) -> Reference:
        """K and V of references, from their [F_1 ... F_4] and F_hat (b, 256, h_2, w_2)."""
        with without_autocast(F_hat):
            _, f2, f3, f4 = (at_least_float32(feature) for feature in features)
            key2 = self.key2(as_sequence(self.reduce2(f2)))             # (b, N, C_2)
            key3 = self.key3(as_sequence(self.reduce3(f3)))             # (b, N, C_3)
            key4 = self.key4(as_sequence(f4))                           # (b, n_4, C_4)
            value = as_sequence(self.value(at_least_float32(F_hat)))    # (b, N, 256)
        return Reference(key2, key3, key4, value)

    def reconstruct(self, queries: Sequence[Tensor], reference: Reference) -> Reconstruction:
        """Reconstruct the target's features from one reference. Returns all steps, O_i the last."""
        size2, size3, size4 = (Q.shape[1:3] for Q in queries)           # h_l, w_l
        Q2, Q3, Q4 = (Q.flatten(1, 2) for Q in queries)                 # (b, n_l, C_l)
        with without_autocast(reference.value):
            # Cross-frame affinities A = Q K^T at the coarsest scale. By these STM ranks the tokens.
            A4_all = Q4 @ reference.key4.mT                             # (b, n_4, n_4 of the ref.)
            if self.aggregation.aggregate:  # this is resized, not A^4, as in the released code
                importance = self.to_reference_stride(token_importance(A4_all), size4)
            else:                           # nothing trains A^4 then; A^2 takes its place
                importance = token_importance(Q2 @ reference.key2.mT)   # (b, 1, N)
            kept = selective_token_masking(importance, self.keep_ratio)         # (b, m)

            # The columns of these tokens. At the finer scales SAR and MAA need no others.
            A4_resized = self.to_reference_stride(A4_all, size4)        # (b, n_4, N)
            A4 = take_tokens(A4_resized.mT, kept).mT.contiguous()       # (b, n_4, m)
            A3 = Q3 @ take_tokens(reference.key3, kept).mT              # (b, n_3, m)
            A2 = Q2 @ take_tokens(reference.key2, kept).mT              # (b, n_2, m)

            # SAR and MAA. In the maps the tokens are the second axis, no longer the last one.
            M2 = self.aggregation(as_maps(A2, size2), as_maps(A3, size3), as_maps(A4, size4))

            # Each position of the target reads the values of the tokens with the weights B.
            B = as_sequence(M2).softmax(-1)                             # (b, n_2, m), over tokens
            V = take_tokens(reference.value, kept)                      # (b, m, 256)
            O_i = as_maps(B @ V, size2)                                 # (b, 256, h_2, w_2)
        return Reconstruction(kept, A2, A3, A4, M2, B, O_i)

    def to_reference_stride(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Resize each row of x (b, n, n_4), a map over the *reference* on a `grid` (h_4, w_4), from
        stride 32 to r: (b, n, N)."""
        if self.reference_stride == 32:
            return x
        rows = x.unflatten(2, tuple(grid))                              # (b, n, h_4, w_4)
        return F.interpolate(rows, scale_factor=32 // self.reference_stride,
                             mode="bilinear").flatten(2)

    def merge(self, outputs: Sequence[Tensor], F_hat: Tensor) -> Tensor:
        """O: the mean of the O_i, plus the target's own F_hat; all (b, 256, h_2, w_2)."""
        return sum(outputs) / len(outputs) + F_hat

    def classify(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply a classifier to x (b, 256, h_2, w_2) and upsample to stride 4: (b, K, h_1, w_1)."""
        logits = layer(x).contiguous()  # CPUs upsample many classes slowly in channels-last
        return F.interpolate(logits, scale_factor=2, mode="bilinear")

    def stream(self) -> "Stream":
        """A `Stream` for one video: `stream(frame)`, (3, H, W) -> logits (K, H/4, W/4)."""
        return Stream(self)


def mrcfa_loss(frame_logits: Tensor, clip_logits: Tensor, labels: Tensor,
               ignore_index: int = 255) -> Tensor:
    """0.5 CE(frame_logits, each frame's labels) + CE(all T clip_logits, the target's labels).

    Both logits are (b, T, K, h, w) and are upsampled to the labels. Labels are (b, T, H, W) int64,
    or (b, H, W) when only the target is labelled: then the first term takes the target's
    frame_logits only. Each CE is a mean over all pixels, ignored ones included. -> a scalar.
    """
    if labels.ndim == 3:
        labels = labels[:, None]
        frame_logits = frame_logits[:, -1:]
    target = labels[:, -1:].expand(-1, clip_logits.shape[1], -1, -1)
    frame_loss = segmentation_loss(frame_logits.flatten(0, 1), labels.flatten(0, 1), ignore_index)
    clip_loss = segmentation_loss(clip_logits.flatten(0, 1), target.flatten(0, 1), ignore_index)
    return FRAME_LOSS_WEIGHT * frame_loss + clip_loss


class Stream:
    """One video, frame by frame. Each frame is encoded once; its keys and values are cached.

    Call with the next frame (3, H, W) -> its logits (K, H/4, W/4), the same as for the clip of that
    frame and its references (`reference_indices`). Memory is constant: K and V are kept for as many
    frames as the largest offset. Raises ValueError if the model is in training mode.
    """

    def __init__(self, model: MRCFA):
        self.model = model
        self.t = 0
        self.history = deque(maxlen=max(model.offsets))  # a Reference per frame, up to frame t-1

    @torch.no_grad()
    def __call__(self, frame: Tensor) -> Tensor:
        model = self.model
        if model.training:
            raise InputError("call model.eval() before streaming")
        features, fused = model.encode(frame[None])
        F_hat = model.at_stride_8(fused)
        queries = model.queries(features)
        outputs = []
        for i in reference_indices(self.t, model.offsets):
            reference = self.history[i - self.t]  # negative: -1 is frame t-1
            outputs.append(model.reconstruct(queries, reference).O_i)
        if outputs:
            O = model.merge(outputs, F_hat)
            logits = model.classify(model.classifier, O)
        else:
            logits = model.segformer.classifier(fused)
        self.history.append(model.keys_and_values(features, F_hat))
        self.t += 1
        return logits[0]


# --------------------------------------------------------------------------- loading checkpoints
#
#             You can stop reading here: the rest reads checkpoints, our own and the authors'.

def load_checkpoint(path) -> tuple[nn.Module, dict]:
    """Load a checkpoint of train.py -> the model in eval mode on the CPU, and the run's config.

    It has "model" ("mrcfa_b0"), "classes" (names in label order), "frame_size" (long, short),
    "offsets" and more. Raises ValueError, one line with the path, for any other file.
    """
    checkpoint = read_checkpoint(path)
    try:
        config = checkpoint["config"]
        model = build_model(config["model"], model_arguments(config))
        load_strictly(model, read_state_dict(checkpoint["model"]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: is not a checkpoint of train.py ({why})") from None
    return model.eval(), config


def model_arguments(config: dict) -> dict:
    """The arguments of MRCFA(...) or SegFormer(...), from those of a training run."""
    kind, _, variant = config["model"].partition("_")
    arguments = {"variant": variant, "num_classes": len(config["classes"])}
    if kind == "segformer":
        return arguments
    for name in ("reference_stride", "keep_ratio", "refine", "aggregate", "offsets"):
        arguments[name] = config[name]
    return arguments


def build_model(name: str, arguments: dict) -> nn.Module:
    """A new "mrcfa_b0" ... "segformer_b5" with the arguments of MRCFA(...) or SegFormer(...)."""
    return MRCFA(**arguments) if name.startswith("mrcfa") else SegFormer(**arguments)


def load_weights(model: nn.Module, path, classes: Sequence[str] | None = None) -> list[str]:
    """Start from a file's weights: of an MRCFA, a SegFormer or its encoder, released or our own.

    Classifiers that don't fit, or of other `classes` or another order, keep their initialisation,
    with a warning. Returns the parts of the SegFormer ("head", "classifier") that keep theirs.
    Raises ValueError, with the path, if anything else is wrong.
    """
    content = read_checkpoint(path)
    config = content.get("config")  # of train.py, or anything of others
    theirs = config.get("classes") if isinstance(config, dict) else None
    try:
        state = read_weights(content)
        if classes and isinstance(theirs, list) and theirs != list(classes):
            warnings.warn(f"{path} has other classes or another order: {', '.join(theirs)}; "
                          "classifiers start from new weights")
            state = {key: value for key, value in state.items() if "classifier" not in key}
        if isinstance(model, SegFormer):  # takes the one inside an MRCFA
            state = {key: state[key] for key in state if key.startswith("segformer.")} or state
        if "value.weight" not in state:  # which every MRCFA has
            return load_pretrained(model, state)
        own = model.state_dict()
        for key in [key for key in state if "classifier" in key]:
            if key not in own or state[key].shape != own[key].shape:
                del state[key]
        new = tuple(key for key in own if "classifier" in key and key not in state)
        if new:
            warnings.warn("classifiers for other classes or references start from new weights")
        load_strictly(model, state, new)
        return ["classifier"] if "segformer.classifier.1.weight" in new else []
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def load_official(model: MRCFA, source):
    """Load a released MRCFA checkpoint, a path or a state dict. ValueError unless all keys fit."""
    load_strictly(model, read_weights(source))


def read_weights(source) -> dict[str, Tensor]:
    """The weights in a checkpoint, a path or a dict, under the keys of our MRCFA or SegFormer."""
    state = read_state_dict(source)
    if "value.weight" in state:
        return state  # of an MRCFA of ours
    if "decode_head.sr1_feat.weight" not in state:
        return rename(state)  # of a SegFormer
    ours, segformer = {}, {}
    for key, value in state.items():
        theirs = name = key.removeprefix("decode_head.")
        for pattern, our_name in OFFICIAL_RENAMES:
            name = re.sub(f"^{pattern}", our_name, name)
        if name != theirs:
            ours[name] = value
        else:
            segformer[key] = value
    for key, value in rename(segformer).items():
        ours[f"segformer.{key}"] = value
    return ours


# The released MRCFA's names of its own layers -> ours.
STACK = r"hypercorre_module\.hpn\.encoder_layer(\d)(?:to)?(\d?)"     # G^4, G^3, G^2; G^43, G^32
OFFICIAL_RENAMES = [
    (r"hypercorre_module\.q1", "query2"),               # theirs count from stage 2
    (r"hypercorre_module\.q2", "query3"),
    (r"hypercorre_module\.q3", "query4"),
    (r"hypercorre_module\.k1", "key2"),
    (r"hypercorre_module\.k2", "key3"),
    (r"hypercorre_module\.k3", "key4"),
    (r"sr([23])", r"reduce\1"),
    (r"sr1_feat", "value"),
    (rf"{STACK}\.0(\.conv2)?", r"aggregation.g\1\2.convs.0"),
    (rf"{STACK}\.1", r"aggregation.g\1\2.norms.0"),     # 2 is the ReLU
    (rf"{STACK}\.3(\.conv2)?", r"aggregation.g\1\2.convs.1"),
    (rf"{STACK}\.4", r"aggregation.g\1\2.norms.1"),
    (r"deco1\.smalldecoder", "auxiliary_classifiers.0"),
    (r"deco2\.smalldecoder", "auxiliary_classifiers.1"),
    (r"deco3\.smalldecoder", "auxiliary_classifiers.2"),
    (r"deco4\.smalldecoder", "classifier"),             # of O
]
