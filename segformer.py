"""SegFormer: the Mix Transformer encoder (MiT) and the all-MLP head, in plain PyTorch.

SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers (Xie et al., NeurIPS 2021,
arXiv 2105.15203). This file needs nothing but torch and can be copied into another project by itself:

    model = SegFormer("b1", num_classes=19)
    load_pretrained(model, "mit_b1.pth")
    logits = model(images)                            # (B, 3, H, W) -> (B, 19, H/4, W/4)

Inside the encoder a feature map is (B, h, w, C): LayerNorm and Linear act on the last axis as they are, and seen as
(B, C, h, w) it is a channels-last image, the layout in which convolutions are fast. Neither view copies anything.
"""
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBED_DIM = 256  # width of the head for b0 and b1, and for every MRCFA
DROPOUT = 0.1    # of whole channels, before every classifier

# The encoders' channels C_1 ... C_4 and numbers of blocks; the rest is the same for all.
MIT_VARIANTS = {
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}
HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)
MLP_RATIO = 4


def conv_last(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution to a map whose channels come last: (B, h, w, C) -> (B, h', w', C')."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class EfficientAttention(nn.Module):
    """Self-attention in which keys and values come from a map reduced r x r times (SegFormer, section 3.1)."""

    def __init__(self, channels: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.reduce = nn.Conv2d(channels, channels, reduction, reduction) if reduction > 1 else nn.Identity()
        self.norm = nn.LayerNorm(channels) if reduction > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:                                                      # (B, h, w, C)
        reduced = self.norm(conv_last(self.reduce, x))                                           # (B, h/r, w/r, C)
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)              # (B, heads, n, d)
        k, v = self.kv(reduced).flatten(1, 2).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)                            # (B, n, heads, d)
        return self.proj(out.reshape(x.shape))


class MixFFN(nn.Module):
    """MLP with a depthwise 3x3 convolution inside, which stands in for a positional encoding."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = MLP_RATIO * channels
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:                                                      # (B, h, w, C)
        return self.fc2(F.gelu(conv_last(self.dwconv, self.fc1(x))))


class Block(nn.Module):
    """Transformer block: attention and Mix-FFN, both pre-norm and residual."""

    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = EfficientAttention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MixFFN(channels)
        # Stochastic depth (arXiv 1603.09382) drops a sample's whole branch: (1, B, h, w, C) has B "channels" to drop.
        self.drop_path = nn.Dropout3d(drop_path)

    def forward(self, x: Tensor) -> Tensor:                                                      # (B, h, w, C)
        x = x + self.drop_path(self.attn(self.norm1(x))[None])[0]
        return x + self.drop_path(self.mlp(self.norm2(x))[None])[0]


class Stage(nn.Module):
    """Overlapping patch embedding and the blocks that follow it: one F_l out of F_{l-1}."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, blocks: list[Block]):
        super().__init__()
        self.embed = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2)
        self.embed_norm = nn.LayerNorm(channels)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:                                                      # (B, C_{l-1}, H, W)
        x = self.embed_norm(self.embed(x).permute(0, 2, 3, 1))                                   # (B, h, w, C_l)
        return self.norm(self.blocks(x)).permute(0, 3, 1, 2)                                     # (B, C_l, h, w)


class MixVisionTransformer(nn.Module):
    """MiT encoder: images (B, 3, H, W) -> [F_1, F_2, F_3, F_4], each (B, C_l, H/s, W/s) at s = 4, 8, 16, 32.

    Raises ValueError where H or W is no multiple of 32.
    """

    def __init__(self, channels: tuple[int, ...], depths: tuple[int, ...], drop_path: float = 0.1):
        super().__init__()
        self.channels = channels
        rates = (drop_path * i / (sum(depths) - 1) for i in range(sum(depths)))
        self.stages = nn.ModuleList()
        for i, (c, depth) in enumerate(zip(channels, depths)):
            blocks = [Block(c, HEADS[i], REDUCTIONS[i], next(rates)) for _ in range(depth)]
            kernel, stride, in_channels = (3, 2, channels[i - 1]) if i else (7, 4, 3)
            self.stages.append(Stage(in_channels, c, kernel, stride, blocks))
        self.apply(self._init)

    @staticmethod
    def _init(module: Any):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"frame size {height}x{width} (height x width) must be a multiple of 32 on both sides")
        features = [images.contiguous(memory_format=torch.channels_last)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[1:]


def mit(variant: str, drop_path: float = 0.1) -> MixVisionTransformer:
    """The MiT encoder "b0" ... "b5"; `drop_path` is the last block's rate, rising linearly from 0 in the first."""
    if variant not in MIT_VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose from {', '.join(MIT_VARIANTS)}")
    return MixVisionTransformer(*MIT_VARIANTS[variant], drop_path)


class SegFormerHead(nn.Module):
    """All-MLP head up to, and without, its classifier: [F_1 ... F_4] -> F, (B, embed_dim, H/4, W/4)."""

    def __init__(self, channels: tuple[int, ...], embed_dim: int = EMBED_DIM):
        super().__init__()
        self.linears: Any = nn.ModuleList(nn.Linear(c, embed_dim) for c in channels)
        self.fuse = nn.Conv2d(4 * embed_dim, embed_dim, 1, bias=False)  # of the projected F_4, F_3, F_2, F_1
        self.norm: Any = nn.BatchNorm2d(embed_dim)
        nn.init.kaiming_normal_(self.fuse.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: list[Tensor]) -> Tensor:
        # The 1x1 convolution of the concatenation is a sum over stages, and it commutes with bilinear upsampling:
        # project each F_l by the one matrix W_fuse,l W_l at its own stride, then upsample and sum.
        fuse, shift = self.fuse.weight.flatten(1), torch.zeros_like(self.norm.bias)
        if not self.norm.training:  # with fixed statistics BatchNorm is a scale of W_fuse and a shift
            scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
            fuse, shift = scale[:, None] * fuse, self.norm.bias - scale * self.norm.running_mean
        weights, extras = reversed(fuse.chunk(4, dim=1)), (shift, 0, 0, 0)
        out, *coarser = [F.conv2d(feature, (weight @ linear.weight)[..., None, None], weight @ linear.bias + extra)
                         for feature, linear, weight, extra in zip(features, self.linears, weights, extras)]
        for x in coarser:
            out += F.interpolate(x, out.shape[-2:], mode="bilinear")
        return F.relu_(self.norm(out) if self.norm.training else out)


def classifier(embed_dim: int, num_classes: int) -> nn.Sequential:
    """Channel dropout and a 1x1 convolution: (B, embed_dim, h, w) -> logits (B, K, h, w)."""
    return nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(embed_dim, num_classes, 1))


class SegFormer(nn.Module):
    """MiT encoder, all-MLP head, classifier: images (B, 3, H, W) -> logits (B, K, H/4, W/4).

    Published heads are 256 wide for b0 and b1 and 768 for b2 ... b5 (`embed_dim`). H and W must be multiples of 32.
    """

    def __init__(self, variant: str = "b1", num_classes: int = 124, embed_dim: int = EMBED_DIM):
        super().__init__()
        self.encoder = mit(variant)
        self.head = SegFormerHead(self.encoder.channels, embed_dim)
        self.classifier = classifier(embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.head(self.encoder(images)))


def bilinear_matrix(size: int, new_size: int) -> Tensor:
    """The (new_size, size) matrix that resizes one side bilinearly, `align_corners=False`; an image takes two."""
    return F.interpolate(torch.eye(size)[None, None], (new_size, size), mode="bilinear")[0, 0]


def bands(matrix: Tensor, rows: int = 32) -> list[tuple[slice, slice]]:
    """A bilinear matrix as bands of some rows and the few columns that matter to them: (rows, columns) each."""
    result = []
    for first in range(0, len(matrix), rows):
        used = matrix[first:first + rows].any(0).nonzero()
        result.append((slice(first, first + rows), slice(int(used[0]), int(used[-1]) + 1)))
    return result


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross entropy of logits (B, K, h, w), upsampled bilinearly, with labels (B, H, W) int64: a scalar.

    The mean is over *all* pixels: ignored ones add 0 but stay in the denominator, as in the released code.
    """
    # Full-size maps of K classes are what fills the memory in training. The gradient with respect to the *small* logits
    # is small, so it is taken here already, a band of rows at a time: nothing larger is alive, and a band is in cache.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    matrix, width = bilinear_matrix(logits.shape[2], labels.shape[1]), labels.shape[2]
    places, matrix = bands(matrix), matrix.to(logits)
    total, gradient = logits.new_zeros(()), torch.zeros_like(logits)
    with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
        for small, label, grad in zip(logits.detach().split(1), labels.split(1), gradient.split(1)):
            for rows, source in places:
                part = small[:, :, source].contiguous().requires_grad_()                         # (1, K, few, w)
                full = matrix[rows, source] @ F.interpolate(part, (part.shape[2], width), mode="bilinear")
                loss = F.cross_entropy(full, label[:, rows], ignore_index=ignore_index, reduction="sum")
                grad[:, :, source] += torch.autograd.grad(loss, part)[0]
                total += loss.detach()
        linear = logits.flatten() @ gradient.flatten()  # has that gradient; its value is taken away again
    return (total + (linear - linear.detach())) / labels.numel()


# Keys of NVlabs', Hugging Face's and mmsegmentation's checkpoints -> ours, applied in this order, stages from 0.
RENAMES = {
    r"^layers\.(\d)\.0\.projection": r"encoder.stages.\1.embed",
    r"^layers\.(\d)\.0\.norm": r"encoder.stages.\1.embed_norm",
    r"^layers\.(\d)\.1": r"encoder.stages.\1.blocks", r"^layers\.(\d)\.2": r"encoder.stages.\1.norm",
    r"attn\.attn\.in_proj_": "attn.qkv.", r"attn\.attn\.out_proj": "attn.proj",
    r"ffn\.layers\.0": "mlp.fc1", r"ffn\.layers\.1": "mlp.dwconv", r"ffn\.layers\.4": "mlp.fc2",
    r"^(convs|fusion_conv)\.": r"head.\1.",
    r"^patch_embed(?:dings)?\.(\d)\.proj": r"encoder.stages.\1.embed",
    r"^patch_embed(?:dings)?\.(\d)\.(?:layer_)?norm": r"encoder.stages.\1.embed_norm",
    r"^(?:layer_)?norm\.(\d)": r"encoder.stages.\1.norm", r"^block\.(\d)": r"encoder.stages.\1.blocks",
    r"layer_norm_(\d)": r"norm\1", r"attention\.self\.layer_norm": "attn.norm",
    r"attention\.self\.query": "attn.q", r"attention\.self": "attn", r"attention\.output\.dense": "attn.proj",
    r"attn\.sr": "attn.reduce", r"mlp\.dense": "mlp.fc", r"dwconv\.dwconv": "dwconv",
    r"^linear_c\.(\d)\.proj": r"head.linears.\1", r"^linear_fuse\.bn|^batch_norm": "head.norm",
    r"^linear_fuse(?:\.conv)?": "head.fuse", r"^(?:linear_pred|classifier)\b(?!\.1)": "classifier.1",
    r"^stages": "encoder.stages",  # ours
}
# The ImageNet classifiers, and a layer that mmsegmentation creates and never uses.
DEAD_KEYS = re.compile(r"(head|classifier|decode_head\.conv_seg)\.(weight|bias)")
# What a file that can't be read looks like, by its first bytes.
SIGNS = {b"<": "a web page: download the file itself", b"PK": "a truncated checkpoint: download it again",
         b"version https://git-lfs": "a Git LFS pointer: fetch the file itself (git lfs pull)",
         b"": "no checkpoint, or a truncated one"}


def read_checkpoint(path) -> dict:
    """The dict that a checkpoint file holds, read with `weights_only=True`; ValueError where it is no such file."""
    with open(path, "rb") as file:
        start = file.read(32).lstrip()
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # type: ignore[import-not-found]  # optional, for this format alone
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            return content
        why = f"not a checkpoint but a {type(content).__name__}"
    except ImportError:
        why = "needs the safetensors package (pip install safetensors), or give the same weights as pytorch_model.bin"
    except Exception as error:  # each of torch.load's file formats raises its own
        start = b"PK" if isinstance(error, EOFError) or re.search("EOF|truncated", str(error)) else start
        why = "can't be read, it looks like " + next(looks for sign, looks in SIGNS.items() if start.startswith(sign))
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            why = f"would run code when loaded ({code[1]}); if you trust it, save its state dict alone in another file"
    raise ValueError(f"{path}: {why}")


def read_state_dict(source) -> dict[str, Tensor]:
    """The state dict in a checkpoint (path or dict), bare or under "state_dict" or "model"; else ValueError."""
    state = source if isinstance(source, dict) else read_checkpoint(source)
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ValueError("there is no state dict (tensors by name, bare or under 'state_dict' or 'model')")
    return state


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """NVlabs', Hugging Face's, mmsegmentation's or our weights under the keys of our `SegFormer`, without dead keys."""
    renamed = {}
    for key, value in state.items():
        if DEAD_KEYS.fullmatch(key):
            continue
        key = re.sub(r"^(backbone|segformer\.encoder|encoder|decode_head)\.", "", key)
        key = re.sub(r"^(patch_embed|block|norm|linear_c)(\d)\.", lambda m: f"{m[1]}.{int(m[2]) - 1}.", key)  # from 0
        for pattern, ours in RENAMES.items():
            key = re.sub(pattern, ours, key)
        renamed[key] = value.flatten(1) if re.search(r"\.mlp\.fc\d\.weight$", key) else value  # of 1x1 convolutions
    # Our Linears are one for q and one for k and v; Hugging Face has three, mmsegmentation one.
    for key in [k for k in renamed if ".attn.key." in k]:
        if (value_key := key.replace(".key.", ".value.")) in renamed:
            renamed[key.replace(".key.", ".kv.")] = torch.cat([renamed.pop(key), renamed.pop(value_key)])
    for key in [k for k in renamed if ".attn.qkv." in k]:
        q, k, v = renamed.pop(key).chunk(3)
        renamed |= {key.replace(".qkv.", ".q."): q, key.replace(".qkv.", ".kv."): torch.cat([k, v])}
    return renamed


def variant_of(state: dict[str, Tensor]) -> str | None:
    """Which MiT a state dict, in our naming, has inside, by widths and depths; None where it is no whole one."""
    widths = tuple(len(value) for key, value in sorted(state.items()) if re.search(r"stages\.\d\.embed\.bias$", key))
    blocks = [match[1] for key in state if (match := re.search(r"stages\.(\d)\.blocks\.\d+\.norm1\.bias$", key))]
    depths = tuple(blocks.count(stage) for stage in "0123")
    return next((name for name, sizes in MIT_VARIANTS.items() if sizes == (widths, depths)), None)


def load_strictly(module: nn.Module, state: dict[str, Tensor], may_miss: tuple[str, ...] = ()):
    """`module.load_state_dict(state)` with errors for people; keys that start with one of `may_miss` can be absent."""
    own = module.state_dict()
    theirs, ours = variant_of(state), variant_of(own)
    if None not in (theirs, ours) and theirs != ours:
        raise ValueError(f"holds the weights of a MiT-{theirs}, this model is built on MiT-{ours}")
    wrong = [f"{k} is missing" for k in own if k not in state and not k.startswith(may_miss)]
    wrong += [f"{k} is unexpected" for k in state if k not in own]
    wrong += [f"{k} is {tuple(v.shape)} instead of {tuple(own[k].shape)}" for k, v in state.items()
              if k in own and v.shape != own[k].shape]
    if wrong:
        raise ValueError(f"{len(wrong)} weights don't fit this {type(module).__name__}: {', '.join(wrong)}")
    module.load_state_dict(state, strict=False)


def load_pretrained(module: nn.Module, source):
    """Load ImageNet or SegFormer weights into an encoder, a SegFormer or an MRCFA.

    `source` is a path or a state dict, with the names of NVlabs, Hugging Face or mmsegmentation. What an ImageNet
    encoder can't have keeps its initialisation. Skipped with a warning are a classifier of another class count, in an
    MRCFA a head of another width, and mmsegmentation's head, which is another network. Raises ValueError, with the
    keys, for everything else that doesn't fit.
    """
    state = rename(read_state_dict(source))
    segformer = getattr(module, "segformer", module)  # an MRCFA has one inside
    if not any(key.startswith("encoder.stages.") for key in state):
        raise ValueError("no MiT weights: expected 'patch_embed1.proj.weight', 'layers.0.0.projection.weight' or "
                         f"'encoder.patch_embeddings.0.proj.weight' and the like, found {', '.join(list(state)[:3])}")
    if isinstance(segformer, MixVisionTransformer):
        head = ("head.", "classifier.")
        load_strictly(segformer, {k.removeprefix("encoder."): v for k, v in state.items() if not k.startswith(head)})
        return
    width, classes = (len(state.get(key, ())) for key in ("head.fuse.weight", "classifier.1.bias"))  # 0: has none
    own_classes, skipped = len(segformer.state_dict()["classifier.1.bias"]), {}
    if "head.fusion_conv.conv.weight" in state:
        skipped = {"head": "mmsegmentation's has BatchNorm and ReLU after each projection, this one hasn't"}
    elif width not in (0, EMBED_DIM) and module is not segformer:
        skipped = dict.fromkeys(("head", "classifier"), f"the head is {width} wide, MRCFA's is {EMBED_DIM}")
    elif classes not in (0, own_classes):
        skipped = {"classifier": f"it has {classes} classes, this model {own_classes}"}
    for part, why in skipped.items():
        warnings.warn(f"{part} skipped: {why}; it keeps its initialisation")
    state = {key: value for key, value in state.items() if key.partition(".")[0] not in skipped}
    absent = {"head", "classifier"} - {key.partition(".")[0] for key in state}
    load_strictly(segformer, state, tuple(f"{part}." for part in absent))
