"""MRCFA: Mining Relations among Cross-Frame Affinities for Video Semantic Segmentation.

Sun, Liu, Tang, Chhatkuli, Zhang, Van Gool, ECCV 2022, arXiv 2207.10436. The target frame asks (queries Q), earlier
reference frames answer (keys K, values V). From the target's point of view, in the order of this file:

    cross-frame affinities                 A^l = Q^l (K^l)^T at scales l = 2, 3, 4 (strides 8, 16, 32)
    STM, selective token masking           keep the reference tokens that matter; all scales come to one grid of
                                           tokens, and MAA adds up a token's images, so it must be the same ones
    SAR, single-scale affinity refinement  2-D convolutions over each token's image: its affinities to all positions
                                           of the *target*
    MAA, multi-scale affinity aggregation  coarse to fine: M^3 = G^43(up(G^4(A^4)) + G^3(A^3)), then M^2 with A^2
    reconstruction                         O = mean_i softmax(M^2)_i V_i + the target's own F at stride 8

    model = MRCFA("b1", num_classes=124)
    load_official(model, "mrcfa_b1.pth")
    logits = model.eval()(clip)                       # (B, 4, 3, H, W), target last -> (B, 124, H/4, W/4)

    stream = model.stream()                           # a whole video: each frame is encoded once
    for frame in video:                               # (3, H, W)
        logits = stream(frame)                        # (124, H/4, W/4)

Letters and shapes: B clips of T frames, K classes; the encoder's maps F_1 ... F_4, n_l = h_l w_l positions each, and
SegFormer's fused map F at stride 4 (`fused`; at stride 8, `own`); N reference tokens a frame on a grid of stride r, m of
them kept.
"""
import re
from collections import deque
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer import (EMBED_DIM, SegFormer, classifier, load_strictly, read_state_dict, rename,
                       segmentation_loss)

OFFSETS = (9, 6, 3)            # how far back the references lie, in frames, oldest first
REFERENCE_STRIDE = 32          # 32 for VSPW, 16 for Cityscapes
IMPORTANCE_TOP = 5             # affinities that make up a token's importance
KEEP_RATIO = {"b0": 0.8}       # p, the share of reference tokens that STM keeps ...
DEFAULT_KEEP_RATIO = 0.5       # ... for every other variant
FRAME_LOSS_WEIGHT = 0.5        # of the per-frame logits beside the clip's


def reference_indices(t: int, offsets: Sequence[int] = OFFSETS) -> list[int]:
    """Frames that target `t` of a video refers to, oldest first; none while fewer than T frames exist.

    Up to the largest offset the history is spread evenly over what there is, from frame 0 on.
    """
    if t < len(offsets):
        return []
    if t <= max(offsets):
        return [-(-t * k // len(offsets)) for k in range(len(offsets))]                          # ceil(t k / (T-1))
    return [t - offset for offset in offsets]


def tokens(x: Tensor) -> Tensor:
    """A feature map as a sequence: (B, C, h, w) -> (B, h w, C)."""
    return x.flatten(2).transpose(1, 2)


def as_image(x: Tensor, size: Sequence[int]) -> Tensor:
    """The other way round: (B, h w, C) -> a channels-last (B, C, h, w)."""
    return x.unflatten(1, tuple(size)).permute(0, 3, 1, 2)


def full_precision(*xs: Tensor) -> list[Tensor]:
    """In float32 (or float64): affinities are sums without 1/sqrt(d), more than float16 can hold."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in xs]


def product(x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
    """The matrix product of maps (B, C, h, w) and rows (B, m, C), like Q K^T and B V: (B, m, h, w).

    As a 1x1 convolution with the rows for a kernel: faster on CPUs than matmul, and the outcome is images already.
    """
    images = [F.conv2d(image, rows[..., None, None], bias) for image, rows in zip(x.split(1), kernels)]
    return torch.cat(images) if len(images) > 1 else images[0]


class Reference(NamedTuple):
    """All that a reference frame contributes, computed from that frame alone."""
    key2: Tensor     # K^2 (B, N, C_2)
    key3: Tensor     # K^3 (B, N, C_3)
    key4: Tensor     # K^4 (B, n_4, C_4), on the grid of stride 32: for r = 16, `keep` resizes it
    value: Tensor    # V   (B, N, 256)


class Queries(NamedTuple):
    """What target frames ask every reference: Q^l (B, C_l, h_l, w_l), and the same as SAR prepares it."""
    q2: Tensor
    q3: Tensor
    q4: Tensor
    prepared2: tuple[Tensor, Tensor]
    prepared3: tuple[Tensor, Tensor]
    prepared4: tuple[Tensor, Tensor]


class AffinityRefinement(nn.Module):
    """A stack G of (convolution, GroupNorm(1), ReLU) that refines every reference token's image of affinities alike.

    `layers` lists (channels in, channels out, kernel). Affinities of m tokens go in as (B, m c_in, h, w), the c
    channels of a token side by side, and come out as (B, m c_out, h, w). `of_product` is the same for an affinity
    that is still a product Q K^T, and is never formed before its first convolution and norm. Without layers nothing is
    refined.
    """

    def __init__(self, *layers: tuple[int, int, int]):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c_in, c_out, k, padding=k // 2) for c_in, c_out, k in layers)
        self.norms = nn.ModuleList(nn.GroupNorm(1, c_out) for _, c_out, _ in layers)

    @staticmethod
    def convolve(conv: nn.Conv2d, x: Tensor, m: int) -> Tensor:
        """One convolution of m images with the same weights: a group for each, channels last, as Q K^T leaves them."""
        weight, bias, c = conv.weight.repeat(m, 1, 1, 1), conv.bias.repeat(m), conv.in_channels
        if c > conv.out_channels:  # 2 -> 1: on CPUs it is faster to convolve every channel by itself, and then sum
            x = F.conv2d(x, weight.flatten(0, 1)[:, None], padding=conv.padding, groups=m * c)
            return sum(x[:, i::c] for i in range(c)) + conv.bias
        return F.conv2d(x, weight, bias, padding=conv.padding, groups=m)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        for conv, norm in zip(self.convs[first:], self.norms[first:]):
            m = x.shape[1] // conv.in_channels
            x = self.convolve(conv, x, m)
            x = F.relu_(F.group_norm(x, m, norm.weight.repeat(m), norm.bias.repeat(m), norm.eps))
        return x

    def prepare(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Queries Q (B, C, h, w) for `of_product`, once for all references: convolved and centred; their covariance."""
        if not self.convs:
            return q, q
        q = self.convolve(self.convs[0], q, q.shape[1])
        q = q - q.mean((2, 3), keepdim=True)
        return q, tokens(q).mT @ tokens(q) / q[0, 0].numel()                                     # (B, C, C)

    def of_product(self, prepared: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
        """self(Q K^T) for keys K (B, m, C): (B, m c_out, h, w).

        Convolutions act on positions and Q K^T on channels, so they commute: convolve the C images of Q, not the m of
        A; the bias goes with the mean, which GroupNorm (of the one channel out) takes away. And the image of key k has
        the variance k^T cov(Q) k: GroupNorm is a scale of keys.
        """
        if not self.convs:
            return product(prepared[0], keys)
        (q, covariance), norm = prepared, self.norms[0]
        variance = (keys @ covariance * keys).sum(-1, keepdim=True)                              # (B, m, 1)
        keys = keys * (variance + norm.eps).rsqrt() * norm.weight
        return self(F.relu_(product(q, keys, norm.bias.expand(keys.shape[1]))), first=1)


class AffinityAggregation(nn.Module):
    """SAR and MAA of one reference's affinities A^l = Q^l (K^l)^T -> M^2 (B, m, h_2, w_2).

    To see what each is good for: without `refine` (SAR) the A^l are merged as they are, without `aggregate` (MAA) the
    finest scale is all there is.
    """

    def __init__(self, variant: str, refine: bool = True, aggregate: bool = True):
        super().__init__()
        if variant == "b1" and refine:  # two channels a token between the first and the last layer
            self.g4 = AffinityRefinement((1, 1, 3), (1, 2, 3))
            self.g3 = AffinityRefinement((1, 1, 3), (1, 2, 3))
            self.g2 = AffinityRefinement((1, 1, 5), (1, 2, 3))
            self.g43 = AffinityRefinement((2, 2, 3), (2, 2, 3))
            self.g32 = AffinityRefinement((2, 2, 3), (2, 1, 3))
        else:
            self.g4 = AffinityRefinement((1, 1, 3))
            self.g3 = AffinityRefinement((1, 1, 5))
            self.g2 = AffinityRefinement((1, 1, 5))
            self.g43 = AffinityRefinement((1, 1, 3))
            self.g32 = AffinityRefinement((1, 1, 3))
        if not refine:
            self.g4 = self.g3 = self.g2 = AffinityRefinement()
        self.aggregate = aggregate
        if not aggregate:
            self.g4 = self.g3 = self.g43 = AffinityRefinement()

    def forward(self, queries: Queries, key2: Tensor, key3: Tensor, key4: Tensor) -> Tensor:     # (B, m, C_l)
        def add_up(coarse: Tensor, fine: Tensor) -> Tensor:
            """up(coarse) + fine."""
            return F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=True).add_(fine)

        m2 = self.g2.of_product(queries.prepared2, key2)                                         # (B, m, h_2, w_2)
        if self.aggregate:
            m4 = self.g4.of_product(queries.prepared4, key4)                                     # (B, m, h_4, w_4)
            m3 = self.g43(add_up(m4, self.g3.of_product(queries.prepared3, key3)))               # (B, m, h_3, w_3)
            m2 = add_up(m3, m2)
        return self.g32(m2)


class MRCFA(nn.Module):
    """SegFormer with cross-frame affinities.

    In evaluation: clip (B, T, 3, H, W), oldest frame first and target last -> the target's logits (B, K, H/4, W/4);
    a clip shorter than T gets the last frame's SegFormer logits. In training: -> (frame_logits, clip_logits), both
    (B, T, K, H/4, W/4): SegFormer's for every frame, and the target's out of each reference alone and, last, of all.

    `offsets` say how far back the T-1 references of a video lie; `keep_ratio=None` is the paper's p for the variant, 1
    keeps all tokens (no STM); `refine=False` and `aggregate=False` leave out SAR and MAA.
    Raises ValueError for a size that is no multiple of 32, and for a T that isn't len(offsets) + 1.
    """

    def __init__(self, variant: str = "b1", num_classes: int = 124, reference_stride: int = REFERENCE_STRIDE,
                 keep_ratio: float | None = None, refine: bool = True, aggregate: bool = True,
                 offsets: Sequence[int] = OFFSETS):
        super().__init__()
        if reference_stride not in (16, 32):
            raise ValueError(f"reference_stride must be 16 or 32, not {reference_stride}")
        if not offsets or min(offsets) < 1:
            raise ValueError(f"offsets must be one or more positive numbers of frames, not {tuple(offsets)}")
        self.keep_ratio = KEEP_RATIO.get(variant, DEFAULT_KEEP_RATIO) if keep_ratio is None else keep_ratio
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must lie in (0, 1], not {keep_ratio}")
        self.reference_stride, self.offsets = reference_stride, tuple(offsets)

        self.segformer = SegFormer(variant, num_classes)
        c2, c3, c4 = self.segformer.encoder.channels[1:]
        self.query2, self.query3, self.query4 = nn.Linear(c2, c2), nn.Linear(c3, c3), nn.Linear(c4, c4)
        self.key2, self.key3, self.key4 = nn.Linear(c2, c2), nn.Linear(c3, c3), nn.Linear(c4, c4)
        self.reduce2 = nn.Conv2d(c2, c2, reference_stride // 8, reference_stride // 8)
        self.reduce3 = nn.Conv2d(c3, c3, reference_stride // 16, reference_stride // 16)
        self.value = nn.Conv2d(EMBED_DIM, EMBED_DIM, reference_stride // 8, reference_stride // 8)
        self.aggregation = AffinityAggregation(variant, refine, aggregate)
        if not aggregate:  # what the coarser scales are left for is STM, which has no gradient
            for layer in (self.query3, self.key3, self.reduce3, self.query4, self.key4):
                layer.requires_grad_(False)
        self.auxiliary_classifiers = nn.ModuleList(classifier(EMBED_DIM, num_classes) for _ in offsets)
        self.classifier = classifier(EMBED_DIM, num_classes)

    def forward(self, clip: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if clip.ndim != 5:
            raise ValueError(f"expected clips (B, T, 3, H, W), got the shape {tuple(clip.shape)}")
        batch, frames = clip.shape[:2]
        if frames < len(self.offsets) + 1 and not self.training:
            return self.segformer(clip[:, -1])
        if frames != len(self.offsets) + 1:
            raise ValueError(f"clip has {frames} frames; this model takes {len(self.offsets) + 1} (target last)")

        # Time first: then the references and the target are plain slices of the encoded batch.
        features, fused = self.encode(clip.transpose(0, 1).flatten(0, 1))                        # (T B, C_l, h_l, w_l)
        split = [x.split([(frames - 1) * batch, batch]) for x in (*features, F.avg_pool2d(fused, 2))]
        (*past_features, past_own), (*target_features, own) = zip(*split)
        past = self.reference(past_features, past_own)                                           # ((T-1) B, N, C)
        references = [Reference(*x) for x in zip(*(y.split(batch) for y in past))]
        if not self.training:
            return self.segment(target_features, own, references)

        queries = self.queries(target_features)
        attended = (self.attend(queries, reference) for reference in references)
        outputs = [product(attention, values.mT) for attention, values in attended]  # O_i (B, 256, h_2, w_2)
        clip_logits = [classify(o) for classify, o in zip(self.auxiliary_classifiers, outputs)]
        clip_logits.append(self.classifier(sum(outputs) / len(outputs) + own))
        frame_logits = self.segformer.classifier(fused).unflatten(0, (frames, batch)).transpose(0, 1)
        return frame_logits, torch.stack([upsample(x) for x in clip_logits], dim=1)

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images (B, 3, H, W) -> the encoder's [F_1 ... F_4] and SegFormer's fused F (B, 256, H/4, W/4)."""
        features = self.segformer.encoder(images)
        return features, self.segformer.head(features)

    def reference(self, features: Sequence[Tensor], own: Tensor) -> Reference:
        """Keys and values of frames, from those frames alone: [F_1 ... F_4], and F at stride 8 (B, 256, h_2, w_2)."""
        _, f2, f3, f4 = features
        return Reference(self.key2(tokens(self.reduce2(f2))), self.key3(tokens(self.reduce3(f3))),
                         self.key4(tokens(f4)), tokens(self.value(own)))

    def queries(self, features: Sequence[Tensor]) -> Queries:
        """The queries of target frames, from their [F_1 ... F_4]."""
        with torch.autocast(features[0].device.type, enabled=False):
            layers = zip((self.query2, self.query3, self.query4), full_precision(*features[1:]))
            q2, q3, q4 = (as_image(query(tokens(f)), f.shape[-2:]) for query, f in layers)       # (B, C_l, h_l, w_l)
            sar = self.aggregation
            return Queries(q2, q3, q4, sar.g2.prepare(q2), sar.g3.prepare(q3), sar.g4.prepare(q4))

    def segment(self, features: Sequence[Tensor], own: Tensor, references: Sequence[Reference]) -> Tensor:
        """The target's logits (B, K, H/4, W/4) from its [F_1 ... F_4], its F at stride 8, and its T-1 references."""
        queries, logits = self.queries(features), self.classifier(own)                           # (B, K, h_2, w_2)
        weight = self.classifier[1].weight.flatten(1) / len(references)
        for reference in references:
            attention, values = self.attend(queries, reference)
            # The classifier is linear: W (mean_i B_i V_i + F) = sum_i B_i (V_i W^T / (T-1)) + W F, with K columns to
            # read out of each reference instead of 256.
            logits = logits + product(attention, (values @ weight.T).mT)
        return upsample(logits)

    def attend(self, queries: Queries, reference: Reference) -> tuple[Tensor, Tensor]:
        """Where the target reads in one reference: weights B (B, m, h_2, w_2) of the kept values V (B, m, 256)."""
        with torch.autocast(queries.q4.device.type, enabled=False):
            _, key2, key3, key4, values = self.keep(queries, reference)
            m2 = self.aggregation(queries, key2, key3, key4)
            return as_image(tokens(m2).softmax(-1), m2.shape[-2:]), values

    def keep(self, queries: Queries, reference: Reference) -> tuple[Tensor, ...]:
        """The tokens of a reference that STM keeps: where they are (B, m), their K^2, K^3, K^4 and V (B, m, C)."""
        key2, key3, key4, value = full_precision(*reference)
        kept = self.selective_token_masking(product(queries.q4, key4))
        # For r = 16 the paper resizes A^4 over the reference's tokens; as A^4 = Q^4 (K^4)^T, that is to resize K^4.
        key4 = tokens(self.resize(as_image(key4, queries.q4.shape[-2:])))                        # (B, N, C_4)
        every = (key2, key3, key4, value)
        return kept, *(x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) for x in every)

    def selective_token_masking(self, a4: Tensor) -> Tensor:
        """STM: which tokens of a reference are kept, (B, m), by A^4: an image (h_4, w_4) a token, (B, n_4, h_4, w_4).

        A token is as important as its 5 largest affinities add up to. How many are kept follows from the frame's size
        alone: every shape is a constant.
        """
        grid, a4 = a4.shape[-2:], a4.flatten(2)
        importance = a4.topk(min(IMPORTANCE_TOP, a4.shape[2])).values.sum(-1)                    # (B, n_4)
        importance = self.resize(importance.unflatten(1, grid)[:, None]).flatten(1)              # (B, N)
        return importance.topk(max(1, int(self.keep_ratio * importance.shape[1]))).indices

    def resize(self, x: Tensor) -> Tensor:
        """From a reference's stride-32 grid to that of its tokens: (B, C, h_4, w_4) -> (B, C, h, w), h w = N."""
        scale = 32 // self.reference_stride
        return x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear")

    def stream(self) -> "Stream":
        """Segment one video frame by frame, each encoded once: `stream(frame)`, (3, H, W) -> (K, H/4, W/4)."""
        return Stream(self)


def upsample(logits: Tensor) -> Tensor:
    """Logits from stride 8 to stride 4. Contiguous first: on CPUs a channels-last map of many classes is slow."""
    return F.interpolate(logits.contiguous(), scale_factor=2, mode="bilinear")


class Stream:
    """One video, frame by frame: each is encoded once, its keys and values alone are kept while they can be needed.

    Call with the next frame (3, H, W) -> its logits (K, H/4, W/4), the same as from the clip of that frame and its
    references (`reference_indices`). Memory is constant: what max(offsets) frames contribute. A new video needs a new
    stream. Raises ValueError while the model is in training mode.
    """

    def __init__(self, model: MRCFA):
        self.model, self.offsets, self.t = model, model.offsets, 0
        self.history: deque[Reference] = deque(maxlen=max(model.offsets))                        # frame t-1 at its end

    @torch.no_grad()
    def __call__(self, frame: Tensor) -> Tensor:
        if self.model.training:
            raise ValueError("call model.eval() before streaming")
        features, fused = self.model.encode(frame[None])
        own = F.avg_pool2d(fused, 2)
        indices = reference_indices(self.t, self.offsets)
        if indices:
            references = [self.history[i - self.t] for i in indices]  # i - t counts from the end
            logits = self.model.segment(features, own, references)
        else:
            logits = self.model.segformer.classifier(fused)
        self.history.append(self.model.reference(features, own))
        self.t += 1
        return logits[0]


def mrcfa_loss(frame_logits: Tensor, clip_logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """0.5 CE(frame_logits, each frame's labels) + CE(clip_logits, the target's labels, T times): a scalar.

    Both logits (B, T, K, h, w); labels (B, T, H, W) int64, or (B, H, W) when only the target is labelled: then the
    first term takes the target's frame_logits alone. Ignored pixels count in each mean's denominator.
    """
    if labels.ndim == 3:
        labels, frame_logits = labels[:, None], frame_logits[:, -1:]
    target = labels[:, -1:].expand(-1, clip_logits.shape[1], -1, -1)
    return (FRAME_LOSS_WEIGHT * segmentation_loss(frame_logits.flatten(0, 1), labels.flatten(0, 1), ignore_index)
            + segmentation_loss(clip_logits.flatten(0, 1), target.flatten(0, 1), ignore_index))


# How the released checkpoints name what MRCFA adds -> ours. Their q1 ... q3 and k1 ... k3 belong to stages 2 ... 4.
RELEASED_NAMES = (
    (r"hypercorre_module\.q(\d)", lambda m: f"query{int(m[1]) + 1}"),
    (r"hypercorre_module\.k(\d)", lambda m: f"key{int(m[1]) + 1}"),
    (r"hypercorre_module\.hpn\.encoder_layer(\d)to(\d)", r"aggregation.g\1\2"),
    (r"hypercorre_module\.hpn\.encoder_layer(\d)", r"aggregation.g\1"),
    (r"\.([03])\.conv2", lambda m: f".convs.{int(m[1]) // 3}"),
    (r"(g\d+)\.([14])", lambda m: f"{m[1]}.norms.{int(m[2]) // 3}"),
    (r"sr1_feat", "value"),
    (r"sr(\d)", r"reduce\1"),
)


def rename_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released MRCFA's weights under our keys."""
    segformer, ours = {}, {}
    classifiers = {int(key.split(".")[1][4:]) for key in state if key.startswith("decode_head.deco")}
    for key, value in state.items():
        if match := re.match(r"decode_head\.deco(\d+)\.smalldecoder", key):  # the last is the one of O
            i = int(match[1])
            name = f"auxiliary_classifiers.{i - 1}" if i < max(classifiers) else "classifier"
            ours[name + key[match.end():]] = value
        elif key.startswith(("decode_head.hypercorre_module", "decode_head.sr")):
            name = key.removeprefix("decode_head.")
            for pattern, replacement in RELEASED_NAMES:
                name = re.sub(pattern, replacement, name)
            ours[name] = value
        else:
            segformer[key] = value
    return ours | {f"segformer.{key}": value for key, value in rename(segformer).items()}


def load_official(model: MRCFA, source):
    """Load a released MRCFA checkpoint, a path or a state dict; ValueError unless every key fits."""
    load_strictly(model, rename_official(read_state_dict(source)))
