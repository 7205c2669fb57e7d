"""MRCFA: Mining Relations among Cross-Frame Affinities for Video Semantic Segmentation.

Sun, Liu, Tang, Chhatkuli, Zhang, Van Gool, ECCV 2022, arXiv 2207.10436. A target frame asks with
queries Q. T-1 earlier reference frames answer with keys K and values V, each by itself. Queries
keep the target's own grid at each scale. A reference has one grid for all scales, of stride r; its
cells are its tokens. Strided convolutions bring K^2, K^3 and V to that grid. (K^4 has stride 32
already; where r = 16, A^4 is resized.)

    cross-frame affinities   A^l = Q^l (K^l)^T at the scales l = 2, 3, 4 (strides 8, 16, 32).
                             Column j, seen as (h_l, w_l), is the affinity map of reference token j
                             over the target's positions
    STM, selective           keeps a reference's most important tokens, ranked by A^4: the same
     token masking           tokens at every scale, because MAA adds up the maps of *one* token
    SAR, single-scale        G^l, a stack of (2-D convolution, GroupNorm, ReLU), refines each
     affinity refinement     token's affinity map by itself
    MAA, multi-scale         M^3 = G^43(up(G^4(A^4)) + G^3(A^3))
     affinity aggregation    M^2 = G^32(up(M^3) + G^2(A^2))
    reconstruction           B_i = softmax(M^2) over the tokens of reference i; O_i = B_i V_i
                             O = mean of the O_i + F_hat of the target; a classifier reads O

F is SegFormer's fused feature map at stride 4, and F_hat the same at stride 8. V comes from the
reference's F_hat. `up` is the paper's Gamma, bilinear upsampling. The paper has a Gamma around the
sum of the O_i, too; the code has none there, because the O_i have stride 8 already.

In shapes, and only there, B is the number of clips, T of frames in a clip, K of classes. The
encoder's F_l has C_l channels and n_l = h_l w_l positions. A reference has N tokens; STM keeps m,
and A^l is (n_l, m) then.
"""
import math
import re
import sys
from collections import deque
from contextlib import nullcontext
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer import (EMBED_DIM, InputError, SegFormer, at_least_float32, classifier,
                       load_pretrained, load_strictly, read_checkpoint, read_state_dict, rename,
                       segmentation_loss, some_keys)

OFFSETS = (9, 6, 3)             # how far back the references lie, in frames, oldest first
REFERENCE_STRIDE = 32           # r: 32 for VSPW, 16 for Cityscapes
IMPORTANCE_TOP = 5              # affinities that make up a token's importance
KEEP_RATIO = 0.5                # p, the share of a reference's tokens that STM keeps
KEEP_RATIO_B0 = 0.8             # the same for b0
FRAME_LOSS_WEIGHT = 0.5         # weight of the per-frame loss; the clip loss has 1


def reference_indices(t: int, offsets: Sequence[int] = OFFSETS) -> list[int]:
    """The T-1 frames that target `t` of a video refers to, oldest first; none, [], for t < T-1.

    Up to the largest offset they are spread evenly over the frames before t, from frame 0 on.
    """
    count = len(offsets)
    if t < count:
        return []
    if t <= max(offsets):
        return [math.ceil(t * k / count) for k in range(count)]
    return [t - offset for offset in offsets]


def as_sequence(x: Tensor) -> Tensor:
    """Maps as a sequence of positions: (B, C, h, w) -> (B, h w, C)."""
    return x.flatten(2).transpose(1, 2)


def as_maps(x: Tensor, size: Sequence[int]) -> Tensor:
    """The other way round: (B, h w, C) -> maps (B, C, h, w), in channels-last memory format."""
    return x.unflatten(1, tuple(size)).permute(0, 3, 1, 2)


def up(coarse: Tensor, fine: Tensor) -> Tensor:
    """MAA's upsampling (the paper's Gamma) to the size of `fine`.

    It is the only resizing with `align_corners=True`, as in the released code.
    """
    return F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=True)


def take_tokens(x: Tensor, kept: Tensor) -> Tensor:
    """The rows `kept` (B, m) of the tokens x (B, N, C): (B, m, C)."""
    return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))


def without_autocast(x: Tensor):
    """A context in which x's own precision holds, whatever autocast says outside."""
    if not torch.amp.is_autocast_available(x.device.type):      # as on the meta device
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


# --------------------------------------------------------------------------------- SAR and MAA

class TokenwiseConvs(nn.Module):
    """A stack G of (convolution, GroupNorm, ReLU), of SAR or MAA: each token's map by itself.

    `layers` lists (channels in, channels out, kernel). The maps of m tokens go in as
    (B, m c_in, h, w), the c channels of a token side by side, and come out as (B, m c_out, h, w).
    The convolutions see the target's positions; tokens never mix. Without layers nothing changes.
    """

    def __init__(self, *layers: tuple[int, int, int]):
        super().__init__()
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for c_in, c_out, kernel in layers:
            self.convs.append(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2))
            self.norms.append(nn.GroupNorm(1, c_out))

    def forward(self, maps: Tensor) -> Tensor:
        # All tokens share the weights. One convolution with a group for each token, in the
        # channels-last format that Q K^T comes in, is far faster than token by token.
        for conv, norm in zip(self.convs, self.norms, strict=True):
            m = maps.shape[1] // conv.in_channels
            maps = F.conv2d(maps, conv.weight.repeat(m, 1, 1, 1), conv.bias.repeat(m),
                            padding=conv.padding, groups=m)
            # A group for each token: the norm, too, sees each token's map by itself.
            maps = F.group_norm(maps, m, norm.weight.repeat(m), norm.bias.repeat(m), norm.eps)
            maps = F.relu(maps, inplace=True)
        return maps


class AffinityAggregation(nn.Module):
    """SAR and MAA of one reference: each token's affinity maps A^2, A^3, A^4 -> M^2 (h_2, w_2).

    Without `refine` (no SAR) G^4, G^3 and G^2 change nothing. Without `aggregate` (no MAA)
    M^2 = G^32(G^2(A^2)). Kernels and channels are the released code's. b1 alone has stacks of two
    layers, and two channels for each token inside. Without SAR nothing makes the second channel,
    so b1's G^43 and G^32 are those of the other variants.
    """

    def __init__(self, variant: str, refine: bool = True, aggregate: bool = True):
        super().__init__()
        self.aggregate = aggregate
        stack = TokenwiseConvs          # short for the table below
        if variant == "b1" and refine:
            self.g4 = stack((1, 1, 3), (1, 2, 3))
            self.g3 = stack((1, 1, 3), (1, 2, 3))
            self.g2 = stack((1, 1, 5), (1, 2, 3))
            self.g43 = stack((2, 2, 3), (2, 2, 3))
            self.g32 = stack((2, 2, 3), (2, 1, 3))
        else:
            self.g4 = stack((1, 1, 3)) if refine else stack()
            self.g3 = stack((1, 1, 5)) if refine else stack()
            self.g2 = stack((1, 1, 5)) if refine else stack()
            self.g43 = stack((1, 1, 3))
            self.g32 = stack((1, 1, 3))
        if not aggregate:
            self.g4, self.g3, self.g43 = stack(), stack(), stack()

    def forward(self, A2: Tensor, A3: Tensor, A4: Tensor) -> Tensor:    # (B, m, h_l, w_l)
        refined2 = self.g2(A2)                                          # (B, m c, h_2, w_2)
        if not self.aggregate:
            return self.g32(refined2)
        refined3 = self.g3(A3)                                          # (B, m c, h_3, w_3)
        refined4 = self.g4(A4)                                          # (B, m c, h_4, w_4)
        M3 = self.g43(up(refined4, refined3) + refined3)                # (B, m c, h_3, w_3)
        return self.g32(up(M3, refined2) + refined2)                    # (B, m, h_2, w_2)


# --------------------------------------------------------------------------------- the model

class Reference(NamedTuple):
    """Keys and values of B reference frames. Each frame's depend on that frame alone."""
    key2: Tensor    # K^2 (B, N, C_2)
    key3: Tensor    # K^3 (B, N, C_3)
    key4: Tensor    # K^4 (B, n_4, C_4), on the grid of stride 32
    value: Tensor   # V   (B, N, 256)


class MRCFA(nn.Module):
    """SegFormer with cross-frame affinities.

    In evaluation: a clip (B, T, 3, H, W), oldest frame first and target last -> the target's logits
    (B, K, H/4, W/4). A clip shorter than T gets the last frame's SegFormer logits.
    In training: -> (frame_logits, clip_logits), both (B, T, K, H/4, W/4). Of frame_logits, each of
    the T is SegFormer's answer for one frame. All T clip_logits are of the target: read from each
    of the T-1 O_i alone and, last, from O.

    `reference_stride` is r. `offsets` say how far back the T-1 references of a video lie.
    `keep_ratio` is STM's p: None is the paper's for the variant, 1 keeps all tokens (no STM).
    `refine=False` leaves out SAR, `aggregate=False` MAA.

    Raises ValueError for sides that are no multiples of 32, and for clips of more than T frames or,
    in training, of fewer.
    """

    def __init__(self, variant: str = "b1", num_classes: int = 124,
                 reference_stride: int = REFERENCE_STRIDE, keep_ratio: float | None = None,
                 refine: bool = True, aggregate: bool = True, offsets: Sequence[int] = OFFSETS):
        super().__init__()
        if keep_ratio is None:
            keep_ratio = KEEP_RATIO_B0 if variant == "b0" else KEEP_RATIO
        if reference_stride not in (16, 32):
            raise InputError(f"reference_stride must be 16 or 32, not {reference_stride}")
        if not offsets or min(offsets) < 1:
            raise InputError("offsets must be one or more positive numbers of frames, not "
                             f"{tuple(offsets)}")
        if not 0 < keep_ratio <= 1:
            raise InputError(f"keep_ratio must lie in (0, 1], not {keep_ratio}")
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
        if not aggregate:       # then stages 3 and 4 have no use
            for unused in (self.query3, self.key3, self.reduce3, self.query4, self.key4):
                unused.requires_grad_(False)
        self.auxiliary_classifiers = nn.ModuleList()
        for _ in offsets:
            self.auxiliary_classifiers.append(classifier(EMBED_DIM, num_classes))
        self.classifier = classifier(EMBED_DIM, num_classes)

    def forward(self, clip: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if clip.ndim != 5:
            raise InputError(f"expected clips (B, T, 3, H, W), got the shape {tuple(clip.shape)}")
        batch, frames = clip.shape[:2]
        T = len(self.offsets) + 1
        if frames < T and not self.training:
            return self.segformer(clip[:, -1])
        if frames != T:
            raise InputError(f"clip has {frames} frames; this model takes {T} (target last)")

        # All frames are encoded as one batch, time first: B maps of each frame, the target's last.
        images = clip.transpose(0, 1).flatten(0, 1)                     # (T B, 3, H, W)
        features, fused = self.encode(images)
        F_hat = self.at_stride_8(fused)                                 # (T B, 256, h_2, w_2)
        queries = self.queries([F_l[-batch:] for F_l in features])
        outputs = []
        for i in range(T - 1):
            of_frame_i = slice(i * batch, (i + 1) * batch)
            reference = self.keys_and_values([F_l[of_frame_i] for F_l in features],
                                             F_hat[of_frame_i])
            outputs.append(self.reconstruct(queries, reference))        # O_i (B, 256, h_2, w_2)
        O = self.merge(outputs, F_hat[-batch:])
        logits = self.classify(self.classifier, O)                      # (B, K, h_1, w_1)
        if not self.training:
            return logits

        clip_logits = []
        for auxiliary, O_i in zip(self.auxiliary_classifiers, outputs, strict=True):
            clip_logits.append(self.classify(auxiliary, O_i))
        clip_logits.append(logits)
        frame_logits = self.segformer.classifier(fused)                 # (T B, K, h_1, w_1)
        frame_logits = frame_logits.unflatten(0, (T, batch)).transpose(0, 1)
        return frame_logits, torch.stack(clip_logits, dim=1)

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images (B, 3, H, W) -> [F_1 ... F_4] and SegFormer's fused F (B, 256, H/4, W/4)."""
        features = self.segformer.encoder(images)
        fused = self.segformer.head(features)
        return features, fused

    def at_stride_8(self, fused: Tensor) -> Tensor:
        """F_hat: F (B, 256, h_1, w_1) bilinearly at half the size, which is the mean of 2x2."""
        return F.avg_pool2d(fused, 2)

    # Autocast is off for all that affinities are made of: they are sums over all channels that
    # nothing scales down, too large for float16.

    def queries(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Q^2, Q^3, Q^4 of the target, (B, h_l, w_l, C_l), from its [F_1 ... F_4]."""
        queries = []
        layers = (self.query2, self.query3, self.query4)
        with without_autocast(features[0]):
            for layer, feature in zip(layers, features[1:], strict=True):
                queries.append(layer(at_least_float32(feature).permute(0, 2, 3, 1)))
        return queries

    def keys_and_values(self, features: Sequence[Tensor], F_hat: Tensor) -> Reference:
        """K and V of references, from their [F_1 ... F_4] and F_hat (B, 256, h_2, w_2)."""
        with without_autocast(F_hat):
            _, f2, f3, f4 = (at_least_float32(feature) for feature in features)
            key2 = self.key2(as_sequence(self.reduce2(f2)))             # (B, N, C_2)
            key3 = self.key3(as_sequence(self.reduce3(f3)))             # (B, N, C_3)
            key4 = self.key4(as_sequence(f4))                           # (B, n_4, C_4)
            value = as_sequence(self.value(at_least_float32(F_hat)))             # (B, N, 256)
        return Reference(key2, key3, key4, value)

    def reconstruct(self, queries: Sequence[Tensor], reference: Reference) -> Tensor:
        """The target's features, reconstructed from one reference: O_i (B, 256, h_2, w_2)."""
        with without_autocast(reference.value):
            kept, A2, A3, A4 = self.affinities(queries, reference)
            M2 = self.aggregation(A2, A3, A4)                           # (B, m, h_2, w_2)
            B_i = as_sequence(M2).softmax(-1)                           # (B, n_2, m), over tokens
            V_i = take_tokens(reference.value, kept)                    # (B, m, 256)
            return as_maps(B_i @ V_i, M2.shape[-2:])

    def affinities(self, queries: Sequence[Tensor], reference: Reference) -> tuple[Tensor, ...]:
        """The cross-frame affinities A^l = Q^l (K^l)^T of the tokens that STM keeps.

        -> the kept tokens' numbers (B, m), and their affinity maps A^2, A^3, A^4 (B, m, h_l, w_l).
        """
        size2, size3, size4 = (Q.shape[1:3] for Q in queries)           # h_l, w_l
        Q2, Q3, Q4 = (Q.flatten(1, 2) for Q in queries)                 # (B, n_l, C_l)
        # All of A^4 is needed: STM ranks the tokens by it. Without MAA nothing trains A^4, and A^2
        # takes its place.
        A4 = Q4 @ reference.key4.mT                                     # (B, n_4, n_4 of the ref.)
        if self.aggregation.aggregate:
            importance = self.to_reference_stride(self.importance(A4), size4)
        else:
            importance = self.importance(Q2 @ reference.key2.mT)        # (B, 1, N)
        kept = self.selective_token_masking(importance[:, 0])           # (B, m)

        # Keep the columns of these tokens. At the finer scales compute no others.
        A4 = self.to_reference_stride(A4, size4)                        # (B, n_4, N)
        A4 = take_tokens(A4.mT, kept).mT.contiguous()                   # (B, n_4, m)
        A3 = Q3 @ take_tokens(reference.key3, kept).mT                  # (B, n_3, m)
        A2 = Q2 @ take_tokens(reference.key2, kept).mT                  # (B, n_2, m)
        return kept, as_maps(A2, size2), as_maps(A3, size3), as_maps(A4, size4)

    def importance(self, affinity: Tensor) -> Tensor:
        """The importance of tokens (B, 1, tokens): the sum of the 5 largest of each token's
        affinities (B, n_l, tokens)."""
        top = min(IMPORTANCE_TOP, affinity.shape[1])
        return affinity.topk(top, dim=1).values.sum(1, keepdim=True)

    def selective_token_masking(self, importance: Tensor) -> Tensor:
        """STM: the indices (B, m) of the m = max(1, int(p N)) most important of N tokens (B, N)."""
        m = max(1, int(self.keep_ratio * importance.shape[1]))
        return importance.topk(m).indices

    def to_reference_stride(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Resize each row of x (B, n, n_4) from stride 32 to r: (B, n, N).

        A row runs over the positions of the *reference*. All frames have one size, so their `grid`
        (h_4, w_4) is the target's.
        """
        if self.reference_stride == 32:
            return x
        rows = x.unflatten(2, tuple(grid))                              # (B, n, h_4, w_4)
        return F.interpolate(rows, scale_factor=32 // self.reference_stride,
                             mode="bilinear").flatten(2)

    def merge(self, outputs: Sequence[Tensor], F_hat: Tensor) -> Tensor:
        """O: the mean of the O_i, plus the target's own F_hat; all (B, 256, h_2, w_2)."""
        return sum(outputs) / len(outputs) + F_hat

    def classify(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply a classifier to x (B, 256, h_2, w_2) and upsample to stride 4: (B, K, h_1, w_1)."""
        logits = layer(x).contiguous()      # CPUs upsample many classes slowly in channels-last
        return F.interpolate(logits, scale_factor=2, mode="bilinear")

    def stream(self) -> "Stream":
        """A `Stream` for one video: `stream(frame)`, (3, H, W) -> logits (K, H/4, W/4)."""
        return Stream(self)


class Stream:
    """One video, frame by frame. Each frame is encoded once; its keys and values are remembered.

    Call with the next frame (3, H, W) -> its logits (K, H/4, W/4), the same as for the clip of that
    frame and its references (`reference_indices`). Memory is constant: K and V are kept for as many
    frames as the largest offset. Raises ValueError for a frame of another size, and while the model
    is in training mode.
    """

    def __init__(self, model: MRCFA):
        self.model = model
        self.shape = None                                               # of the frames, all alike
        self.t = 0
        self.history: deque[Reference] = deque(maxlen=max(model.offsets))   # frame t-1 at its end

    @torch.no_grad()
    def __call__(self, frame: Tensor) -> Tensor:
        model = self.model
        if model.training:
            raise InputError("call model.eval() before streaming")
        if frame.ndim != 3 or frame.shape != (self.shape or frame.shape):
            raise InputError("expected frames (3, H, W), all of one size; got "
                             f"{tuple(frame.shape)} after {tuple(self.shape or ())}")
        self.shape = frame.shape
        features, fused = model.encode(frame[None])
        F_hat = model.at_stride_8(fused)
        references = []
        for i in reference_indices(self.t, model.offsets):
            references.append(self.history[i - self.t])     # negative: -1 is frame t-1
        if references:
            queries = model.queries(features)
            outputs = [model.reconstruct(queries, reference) for reference in references]
            O = model.merge(outputs, F_hat)
            logits = model.classify(model.classifier, O)
        else:
            logits = model.segformer.classifier(fused)
        self.history.append(model.keys_and_values(features, F_hat))
        self.t += 1
        return logits[0]


def mrcfa_loss(frame_logits: Tensor, clip_logits: Tensor, labels: Tensor,
               ignore_index: int = 255) -> Tensor:
    """0.5 CE(frame_logits, each frame's labels) + CE(all T clip_logits, the target's labels).

    Both logits are (B, T, K, h, w) and are upsampled to the labels. Labels are (B, T, H, W) int64,
    or (B, H, W) when only the target is labelled: then the first term takes the target's
    frame_logits alone. Each CE is a mean over all pixels, ignored ones included. -> a scalar.
    """
    if labels.ndim == 3:
        labels = labels[:, None]
        frame_logits = frame_logits[:, -1:]
    target = labels[:, -1:].expand(-1, clip_logits.shape[1], -1, -1)
    frame_loss = segmentation_loss(frame_logits.flatten(0, 1), labels.flatten(0, 1), ignore_index)
    clip_loss = segmentation_loss(clip_logits.flatten(0, 1), target.flatten(0, 1), ignore_index)
    return FRAME_LOSS_WEIGHT * frame_loss + clip_loss


# --------------------------------------------------------------------------------- checkpoints

def load_checkpoint(path) -> tuple[nn.Module, dict]:
    """A checkpoint of train.py, of either model -> the model in eval mode on the CPU, and a dict.

    The dict has at least "model" ("mrcfa_b0"), "classes" (names in label order), "frame_size"
    (long, short) and, for an MRCFA, "offsets". Raises ValueError, one line with the path, for any
    other file.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint.get("config")
    if not isinstance(config, dict) or not {"model", "classes", "frame_size"} <= config.keys():
        raise InputError(f"{path}: is no checkpoint of train.py, which would hold 'model' and "
                         f"'config'; it holds {some_keys(checkpoint)}")
    try:
        model = build_model(config["model"], model_arguments(config))
        load_strictly(model, read_state_dict(checkpoint.get("model")))
    except InputError as error:
        raise naming(path, error) from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: its 'config' isn't one of train.py's ({error!r})") from None
    return model.eval(), config


def model_arguments(config: dict) -> dict:
    """The arguments of MRCFA(...) or SegFormer(...), from those of a training."""
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


def load_weights(model: nn.Module, path):
    """Start from the weights in a file: of a released MRCFA, of a SegFormer or its encoder, or of
    another training.

    Classifiers that don't fit keep their initialisation, and a line on stderr says so. Raises
    ValueError, with the path, if anything else is wrong.
    """
    try:
        state = read_weights(path)
        if "value.weight" not in state:                 # which every MRCFA has
            load_pretrained(model, state)
            return
        if isinstance(model, SegFormer):                # takes the one inside
            prefix = "segformer."
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        own = model.state_dict()
        for key in [key for key in state if "classifier" in key]:
            if key not in own or state[key].shape != own[key].shape:
                del state[key]
        new = tuple(key for key in own if "classifier" in key and key not in state)
        if new:
            print("classifiers for other classes or references start from new weights",
                  file=sys.stderr)
        load_strictly(model, state, new)
    except InputError as error:
        raise naming(path, error) from None


def naming(path, error: InputError) -> InputError:
    """The same error, with the path of the file before it."""
    message = str(error)
    return InputError(message if message.startswith(str(path)) else f"{path}: {message}")


def load_official(model: MRCFA, source):
    """Load a released MRCFA checkpoint, a path or a state dict. ValueError unless all keys fit."""
    load_strictly(model, read_weights(source))


def read_weights(source) -> dict[str, Tensor]:
    """The weights in a checkpoint, a path or a dict, under the keys of our MRCFA or SegFormer."""
    state = read_state_dict(source)
    if "value.weight" in state:
        return state                                    # of an MRCFA of ours
    if "decode_head.sr1_feat.weight" not in state:
        return rename(state)                            # of a SegFormer
    numbers = re.findall(r"decode_head\.deco(\d+)\.", " ".join(state))
    last = max(map(int, numbers), default=0)            # the classifier of O
    renames = [*OFFICIAL_RENAMES, (rf"deco{last}\.smalldecoder", "classifier")]
    for number in range(1, last):
        renames.append((rf"deco{number}\.smalldecoder", f"auxiliary_classifiers.{number - 1}"))
    ours, segformer = {}, {}
    for key, value in state.items():
        theirs = name = key.removeprefix("decode_head.")
        for pattern, our_name in renames:
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
    (r"sr2", "reduce2"),
    (r"sr3", "reduce3"),
    (r"sr1_feat", "value"),
    (rf"{STACK}\.0(\.conv2)?", r"aggregation.g\1\2.convs.0"),
    (rf"{STACK}\.1", r"aggregation.g\1\2.norms.0"),     # 2 is the ReLU
    (rf"{STACK}\.3(\.conv2)?", r"aggregation.g\1\2.convs.1"),
    (rf"{STACK}\.4", r"aggregation.g\1\2.norms.1"),
]
