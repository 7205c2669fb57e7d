"""MRCFA: Mining Relations among Cross-Frame Affinities for Video Semantic Segmentation.

Sun, Liu, Tang, Chhatkuli, Zhang, Van Gool, ECCV 2022, arXiv 2207.10436. A target frame asks (queries Q) and T-1 earlier
reference frames answer (keys K, values V), each by itself:

    cross-frame affinities                 A^l = Q^l (K^l)^T at l = 2, 3, 4 (strides 8, 16, 32): for each token of the
                                           reference an image, its affinities to all positions of the *target*
    STM, selective token masking           drops the tokens that matter least by A^4, at every scale the same ones,
                                           because MAA adds up the images of *one* token
    SAR, single-scale affinity refinement  2-D convolutions over each token's image, one stack G^l for all tokens
    MAA, multi-scale affinity aggregation  M^3 = G^43(up(G^4(A^4)) + G^3(A^3)), M^2 = G^32(up(M^3) + G^2(A^2))
    reconstruction                         O = mean_i B_i V_i + the target's F_hat; B_i = softmax(M^2) over i's tokens

The encoder's F_1 ... F_4 have C_l channels and n_l = h_l w_l positions. SegFormer's fused F is at stride 4 (`fused`),
F_hat is its 2x2 mean, at stride 8 (`own`); V is made of a reference's F_hat. A reference has N tokens, on one grid of
stride r at every scale, of which m are kept. `up` is the paper's Gamma. In shapes: B clips, T frames a clip, K classes.
"""
import re
from collections import deque
from typing import Any, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer import EMBED_DIM, SegFormer, classifier, load_strictly, read_state_dict, rename, segmentation_loss

OFFSETS = (9, 6, 3)            # how far back the references lie, in frames, oldest first
REFERENCE_STRIDE = 32          # 32 for VSPW, 16 for Cityscapes
IMPORTANCE_TOP = 5             # affinities that make up a token's importance
KEEP_RATIO = {"b0": 0.8}       # p, the share of reference tokens that STM keeps; 0.5 for every other variant
FRAME_LOSS_WEIGHT = 0.5        # of the per-frame logits beside the clip's


def reference_indices(t: int, offsets: Sequence[int] = OFFSETS) -> list[int]:
    """Frames that target `t` of a video refers to, oldest first; none for t < T-1.

    Up to the largest offset the references are spread evenly over what there is, from frame 0 on.
    """
    if t < len(offsets):
        return []
    if t <= max(offsets):
        return [-(-t * k // len(offsets)) for k in range(len(offsets))]                          # ceil(t k / (T-1))
    return [t - offset for offset in offsets]


def as_sequence(x: Tensor) -> Tensor:
    """A feature map as a sequence: (B, C, h, w) -> (B, h w, C)."""
    return x.flatten(2).transpose(1, 2)


def as_image(x: Tensor, size: Sequence[int]) -> Tensor:
    """The other way round: (B, h w, C) -> (B, C, h, w), in channels-last memory format."""
    return x.unflatten(1, tuple(size)).permute(0, 3, 1, 2)


def full_precision(*xs: Tensor) -> list[Tensor]:
    """In float32 (or float64): affinities are sums without 1/sqrt(d), more than float16 can hold."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in xs]


def product(x: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix product of maps (B, C, h, w) and rows (B, m, C): (B, m, h, w). Q K^T, and B V with V^T for the rows.

    As a 1x1 convolution with the rows for a kernel: faster on CPUs than matmul, and the outcome is images already.
    """
    images = [F.conv2d(image, kernel[..., None, None], bias) for image, kernel in zip(x.split(1), rows)]
    return torch.cat(images) if len(images) > 1 else images[0]


class Reference(NamedTuple):
    """All that reference frames contribute, computed from those frames alone."""
    key2: Tensor   # K^2 (B, N, C_2)
    key3: Tensor   # K^3 (B, N, C_3)
    key4: Tensor   # K^4 (B, n_4, C_4), on the grid of stride 32: for r = 16, `keep` resizes it
    value: Tensor  # V   (B, N, 256)


class Query(NamedTuple):
    """What target frames ask at one scale l: as it is, and prepared for SAR once for all references."""
    q: Tensor           # Q^l (B, C_l, h_l, w_l)
    convolved: Tensor   # Q^l after G^l's first convolution, centred
    covariance: Tensor  # of that, between channels (B, C_l, C_l)


def up(coarse: Tensor, fine: Tensor) -> Tensor:
    """MAA's upsampling to the grid of a finer scale: unlike all other resizing with `align_corners=True`."""
    return F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=True)


class AffinityRefinement(nn.Module):
    """A stack G of (convolution, GroupNorm(1), ReLU) that refines each reference token's image of affinities by itself.

    `layers` lists (channels in, channels out, kernel). Affinities of m tokens go in as (B, m c_in, h, w), the c
    channels of a token side by side, and come out as (B, m c_out, h, w). Without layers nothing is refined.
    """

    def __init__(self, *layers: tuple[int, int, int]):
        super().__init__()
        self.convs: Any = nn.ModuleList(nn.Conv2d(c_in, c_out, k, padding=k // 2) for c_in, c_out, k in layers)
        self.norms: Any = nn.ModuleList(nn.GroupNorm(1, c_out) for _, c_out, _ in layers)

    def convolve(self, i: int, x: Tensor, m: int) -> Tensor:
        """Layer i's convolution of m images, as one with a group for each image (fast in channels-last format)."""
        conv, c = self.convs[i], self.convs[i].in_channels
        weight, bias = conv.weight.repeat(m, 1, 1, 1), conv.bias.repeat(m)
        if c > conv.out_channels:  # 2 -> 1: on CPUs it is faster to convolve every channel by itself, and then sum
            x = F.conv2d(x, weight.flatten(0, 1)[:, None], padding=conv.padding, groups=m * c)
            return x[:, ::2] + x[:, 1::2] + conv.bias
        return F.conv2d(x, weight, bias, padding=conv.padding, groups=m)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        for i in range(first, len(self.convs)):
            m, norm = x.shape[1] // self.convs[i].in_channels, self.norms[i]
            x = F.relu_(F.group_norm(self.convolve(i, x, m), m, norm.weight.repeat(m), norm.bias.repeat(m), norm.eps))
        return x

    def prepare(self, q: Tensor) -> Query:
        """Queries Q (B, C, h, w), ready for `of_product`."""
        x = self.convolve(0, q, q.shape[1]) if self.convs else q                                 # of its C images
        x = x - x.mean((2, 3), keepdim=True)
        return Query(q, x, as_sequence(x).mT @ as_sequence(x) / x[0, 0].numel())

    def of_product(self, query: Query, keys: Tensor) -> Tensor:
        """self(Q K^T) for keys K (B, m, C): (B, m c_out, h, w); where there are layers, without forming Q K^T.

        The first convolution acts on positions and K on channels, so conv(Q K^T) = conv(Q) K^T: C images instead of m.
        GroupNorm normalises each token's image by itself: centring conv(Q) takes the mean away, and the bias with it;
        key k's image has the variance k^T cov(conv(Q)) k. What is left of GroupNorm is a scale for each key.
        """
        if not self.convs:
            return product(query.q, keys)
        variance, norm = (keys @ query.covariance * keys).sum(-1, keepdim=True), self.norms[0]   # (B, m, 1)
        keys = keys * (variance + norm.eps).rsqrt() * norm.weight
        return self(F.relu_(product(query.convolved, keys, norm.bias.expand(keys.shape[1]))), first=1)


class AffinityAggregation(nn.Module):
    """SAR and MAA of one reference's affinities A^l = Q^l (K^l)^T -> M^2 (B, m, h_2, w_2).

    Without `refine` (no SAR) the A^l are merged as they are; without `aggregate` (no MAA) M^2 = G^32(G^2(A^2)).
    """

    def __init__(self, variant: str, refine: bool = True, aggregate: bool = True):
        super().__init__()
        G, self.aggregate = AffinityRefinement, aggregate
        if variant == "b1" and refine:  # two channels a token between the first and the last layer
            self.g4, self.g3, self.g2 = (G((1, 1, kernel), (1, 2, 3)) for kernel in (3, 3, 5))
            self.g43, self.g32 = G((2, 2, 3), (2, 2, 3)), G((2, 2, 3), (2, 1, 3))
        else:
            self.g4, self.g3, self.g2 = (G((1, 1, kernel)) if refine else G() for kernel in (3, 5, 5))
            self.g43, self.g32 = G((1, 1, 3)), G((1, 1, 3))
        if not aggregate:
            self.g4 = self.g3 = self.g43 = G()

    def forward(self, queries: Sequence[Query], keys: Sequence[Tensor]) -> Tensor:               # of l = 2, 3, 4
        (q2, q3, q4), (k2, k3, k4) = queries, keys
        m2 = self.g2.of_product(q2, k2)                                                          # (B, m c, h_2, w_2)
        if self.aggregate:
            m4, m3 = self.g4.of_product(q4, k4), self.g3.of_product(q3, k3)                      # c = 2 for b1, else 1
            m3 = self.g43(up(m4, m3).add_(m3))                                                   # (B, m c, h_3, w_3)
            m2 = up(m3, m2).add_(m2)
        return self.g32(m2)


class MRCFA(nn.Module):
    """SegFormer with cross-frame affinities.

    In evaluation: clip (B, T, 3, H, W), oldest frame first and target last -> the target's logits (B, K, H/4, W/4);
    a clip shorter than T gets the last frame's SegFormer logits. In training: -> (frame_logits, clip_logits), both
    (B, T, K, H/4, W/4): SegFormer's for each frame; the target's from each O_i = B_i V_i alone and, last, from O.

    `offsets` say how far back the T-1 references of a video lie; `keep_ratio=None` is the paper's p for the variant, 1
    keeps all tokens (no STM); `refine=False` and `aggregate=False` leave out SAR and MAA.
    Raises ValueError for sides that are no multiples of 32, and for a T that is too long or, in training, too short.
    """

    def __init__(self, variant: str = "b1", num_classes: int = 124, reference_stride: int = REFERENCE_STRIDE,
                 keep_ratio: float | None = None, refine: bool = True, aggregate: bool = True,
                 offsets: Sequence[int] = OFFSETS):
        super().__init__()
        self.keep_ratio = KEEP_RATIO.get(variant, 0.5) if keep_ratio is None else keep_ratio
        self.reference_stride, self.offsets = reference_stride, tuple(offsets)
        if reference_stride not in (16, 32):
            raise ValueError(f"reference_stride must be 16 or 32, not {reference_stride}")
        if not offsets or min(offsets) < 1:
            raise ValueError(f"offsets must be one or more positive numbers of frames, not {self.offsets}")
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must lie in (0, 1], not {keep_ratio}")
        self.segformer = SegFormer(variant, num_classes)
        _, c2, c3, c4 = self.segformer.encoder.channels
        self.query2, self.query3, self.query4 = (nn.Linear(c, c) for c in (c2, c3, c4))
        self.key2, self.key3, self.key4 = (nn.Linear(c, c) for c in (c2, c3, c4))
        self.reduce2 = nn.Conv2d(c2, c2, reference_stride // 8, reference_stride // 8)
        self.reduce3 = nn.Conv2d(c3, c3, reference_stride // 16, reference_stride // 16)
        self.value = nn.Conv2d(EMBED_DIM, EMBED_DIM, reference_stride // 8, reference_stride // 8)
        self.aggregation = AffinityAggregation(variant, refine, aggregate)
        if not aggregate:  # stage 3 has no use then, and stage 4 only in STM, which has no gradient
            nn.ModuleList([self.query3, self.key3, self.reduce3, self.query4, self.key4]).requires_grad_(False)
        self.auxiliary_classifiers = nn.ModuleList(classifier(EMBED_DIM, num_classes) for _ in offsets)
        self.classifier = classifier(EMBED_DIM, num_classes)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear")                             # stride 8 -> 4
        self.resize = nn.Upsample(scale_factor=32 // reference_stride, mode="bilinear")          # stride 32 -> r

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
        outputs = [product(attention, values.mT) for attention, values in attended]             # O_i (B, 256, h_2, w_2)
        clip_logits = [classify(o) for classify, o in zip(self.auxiliary_classifiers, outputs)]
        clip_logits.append(self.classifier(torch.stack(outputs).mean(0) + own))
        frame_logits = self.segformer.classifier(fused).unflatten(0, (frames, batch)).transpose(0, 1)
        return frame_logits, torch.stack([self.upsample(x.contiguous()) for x in clip_logits], dim=1)

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images (B, 3, H, W) -> the encoder's [F_1 ... F_4] and SegFormer's fused F (B, 256, H/4, W/4)."""
        features = self.segformer.encoder(images)
        return features, self.segformer.head(features)

    def reference(self, features: Sequence[Tensor], own: Tensor) -> Reference:
        """Keys and values of frames, from those frames alone: their [F_1 ... F_4], and F_hat (B, 256, h_2, w_2)."""
        _, f2, f3, f4 = features
        return Reference(self.key2(as_sequence(self.reduce2(f2))), self.key3(as_sequence(self.reduce3(f3))),
                         self.key4(as_sequence(f4)), as_sequence(self.value(own)))

    def queries(self, features: Sequence[Tensor]) -> list[Query]:
        """The queries of target frames at l = 2, 3, 4, from their [F_1 ... F_4]."""
        sar, maps = self.aggregation, full_precision(*features[1:])
        layers = (self.query2, sar.g2), (self.query3, sar.g3), (self.query4, sar.g4)
        with torch.autocast(maps[0].device.type, enabled=False):
            return [g.prepare(as_image(query(as_sequence(f)), f.shape[-2:])) for (query, g), f in zip(layers, maps)]

    def segment(self, features: Sequence[Tensor], own: Tensor, references: Sequence[Reference]) -> Tensor:
        """The target's logits (B, K, H/4, W/4) from its [F_1 ... F_4], its F_hat, and its T-1 references."""
        queries, logits = self.queries(features), self.classifier(own)                           # (B, K, h_2, w_2)
        weight = next(self.classifier.parameters()).flatten(1)                                   # W (K, 256)
        for reference in references:
            attention, values = self.attend(queries, reference)
            # The classifier is linear: (mean_i B_i V_i + F_hat) W^T = sum_i B_i (V_i W^T / (T-1)) + F_hat W^T, with
            # as many columns to read out of each reference as there are classes, instead of 256.
            logits = logits + product(attention, (values @ weight.T / len(references)).mT)
        return self.upsample(logits.contiguous())  # on CPUs a channels-last map of many classes is slow

    def attend(self, queries: Sequence[Query], reference: Reference) -> tuple[Tensor, Tensor]:
        """Where the target reads in one reference: B_i, (B, m, h_2, w_2), and the kept values V_i (B, m, 256)."""
        with torch.autocast(reference.value.device.type, enabled=False):
            _, *keys, values = self.keep(queries, reference)
            m2 = self.aggregation(queries, keys)
            return as_image(as_sequence(m2).softmax(-1), m2.shape[-2:]), values                  # over the m tokens

    def keep(self, queries: Sequence[Query], reference: Reference) -> tuple[Tensor, ...]:
        """The tokens of a reference that STM keeps: where they are (B, m), their K^2, K^3, K^4 and V (B, m, C)."""
        key2, key3, key4, value = full_precision(*reference)
        q4 = queries[2].q
        kept = self.selective_token_masking(product(q4, key4))
        # For r = 16 the paper resizes A^4 over the reference's tokens; as A^4 = Q^4 (K^4)^T, that is to resize K^4.
        key4 = as_sequence(self.resize(as_image(key4, q4.shape[-2:])))                           # (B, N, C_4)
        return kept, *(x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) for x in (key2, key3, key4, value))

    def selective_token_masking(self, a4: Tensor) -> Tensor:
        """STM: which tokens of a reference are kept, (B, m), by A^4, an image (h_4, w_4) a token: (B, n_4, h_4, w_4).

        A token is as important as its 5 largest affinities add up to. The share that is kept is fixed, so m is, too.
        """
        grid, a4 = a4.shape[-2:], a4.flatten(2)
        importance = a4.topk(min(IMPORTANCE_TOP, a4.shape[2])).values.sum(-1)                    # (B, n_4)
        importance = self.resize(importance.unflatten(1, grid)[:, None]).flatten(1)              # of sums: (B, N)
        return importance.topk(max(1, int(self.keep_ratio * importance.shape[1]))).indices

    def stream(self) -> "Stream":
        """Segment one video frame by frame, each encoded once: `stream(frame)`, (3, H, W) -> (K, H/4, W/4)."""
        return Stream(self)


class Stream:
    """One video, frame by frame: each is encoded once, its keys and values alone are kept while they can be needed.

    Call with the next frame (3, H, W) -> its logits (K, H/4, W/4), as from the clip of that frame and its references
    (`reference_indices`). Memory is constant. Raises ValueError while the model is in training mode.
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
        references = [self.history[i - self.t] for i in reference_indices(self.t, self.offsets)]  # counted from the end
        logits = self.model.segment(features, own, references) if references else self.model.segformer.classifier(fused)
        self.history.append(self.model.reference(features, own))
        self.t += 1
        return logits[0]


def mrcfa_loss(frame_logits: Tensor, clip_logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """0.5 CE(frame_logits, each frame's labels) + CE(all T clip_logits, the target's labels): a scalar.

    Both logits (B, T, K, h, w); labels (B, T, H, W) int64, or (B, H, W) when only the target is labelled: then the
    first term takes the target's frame_logits alone. Ignored pixels count in each mean's denominator.
    """
    if labels.ndim == 3:
        labels, frame_logits = labels[:, None], frame_logits[:, -1:]
    target = labels[:, -1:].expand(-1, clip_logits.shape[1], -1, -1)
    return (FRAME_LOSS_WEIGHT * segmentation_loss(frame_logits.flatten(0, 1), labels.flatten(0, 1), ignore_index)
            + segmentation_loss(clip_logits.flatten(0, 1), target.flatten(0, 1), ignore_index))


def rename_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released MRCFA's weights under our keys. Their q1 ... q3 and k1 ... k3 belong to stages 2 ... 4."""
    classifiers = [int(m[1]) for key in state if (m := re.match(r"decode_head\.deco(\d+)\.", key))]
    names = {
        r"hypercorre_module\.([qk])(\d)": lambda m: f"{dict(q='query', k='key')[m[1]]}{int(m[2]) + 1}",
        r"hypercorre_module\.hpn\.encoder_layer(\d)(?:to(\d))?\.(\d)(?:\.conv2)?":  # 0 and 3 convolve, 1 and 4 norm
            lambda m: f"aggregation.g{m[1]}{m[2] or ''}.{('convs', 'norms')[int(m[3]) % 3]}.{int(m[3]) // 3}",
        r"sr1_feat": lambda m: "value",
        r"sr(\d)": lambda m: f"reduce{m[1]}",
        r"deco(\d+)\.smalldecoder":  # the last is the one of O
            lambda m: f"auxiliary_classifiers.{int(m[1]) - 1}" if int(m[1]) < max(classifiers) else "classifier",
    }
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in names.items():
            key = re.sub(rf"^decode_head\.{pattern}\b", replacement, key)
        ours[key] = value
    segformer = rename({key: ours.pop(key) for key in state if key in ours})
    return ours | {f"segformer.{key}": value for key, value in segformer.items()}


def load_official(model: MRCFA, source):
    """Load a released MRCFA checkpoint, a path or a state dict; ValueError unless every key fits."""
    load_strictly(model, rename_official(read_state_dict(source)))
