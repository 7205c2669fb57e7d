"""SegFormer: the Mix Transformer encoder (MiT) and the all-MLP head, in plain PyTorch.

SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers (Xie et al.,
NeurIPS 2021, arXiv 2105.15203). This file needs nothing but torch, so you can copy it by itself:

    model = SegFormer("b1", num_classes=19)
    load_pretrained(model, "mit_b1.pth")
    logits = model(images)                  # (B, 3, H, W) -> (B, 19, H/4, W/4)

Inside a stage of the encoder a feature map has its channels last, (B, h, w, C): LayerNorm and
Linear act on the last axis. The same memory seen as (B, C, h, w) is a channels-last image, in which
convolutions are fast.
"""
import json
import math
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The encoders' channels C_1 ... C_4 and numbers of blocks. All else is the same for every variant.
MIT_VARIANTS = {
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}
HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)   # r of each stage's attention
MLP_RATIO = 4
STRIDE = 32      # stride of F_4: image sides must be multiples of it
EMBED_DIM = 256  # width of the head of b0 and b1, and of every MRCFA
DROPOUT = 0.1    # rate of the channel dropout before every classifier
SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


class InputError(ValueError):
    """An error that the user can fix. The scripts print it as one line, without a traceback."""


# ------------------------------------------------------------------------------------ the encoder

def conv_channels_last(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution to a map with its channels last: (B, h, w, C) -> (B, h', w', C')."""
    x = conv(x.permute(0, 3, 1, 2))
    return x.permute(0, 2, 3, 1)


class EfficientAttention(nn.Module):
    """Self-attention with keys and values from a map r times smaller per side (section 3.1)."""

    def __init__(self, channels: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.reduce = nn.Identity()
        self.norm = nn.Identity()
        if reduction > 1:
            self.reduce = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:             # (B, h, w, C)
        reduced = conv_channels_last(self.reduce, x)    # (B, h/r, w/r, C)
        reduced = self.norm(reduced)
        k, v = self.kv(reduced).chunk(2, dim=-1)
        q = self.split_heads(self.q(x))                 # (B, heads, h w, C / heads)
        k = self.split_heads(k)                         # (B, heads, h w / r^2, C / heads)
        v = self.split_heads(v)
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).reshape(x.shape)      # (B, h, w, C)
        return self.proj(out)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, heads, h w, C / heads)"""
        return x.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MixFFN(nn.Module):
    """MLP with a depthwise 3x3 convolution inside, which replaces a positional encoding."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = MLP_RATIO * channels
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:             # (B, h, w, C)
        x = self.fc1(x)                                 # (B, h, w, 4 C)
        x = conv_channels_last(self.dwconv, x)
        return self.fc2(F.gelu(x))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training drop a sample's whole branch at random."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """Transformer block: attention and Mix-FFN, both with a norm before and a residual around."""

    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)  # the published weights' epsilon
        self.attn = EfficientAttention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MixFFN(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:             # (B, h, w, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class Stage(nn.Module):
    """Overlapping patch embedding and the blocks after it: one F_l out of F_{l-1}."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int,
                 blocks: list[Block]):
        super().__init__()
        self.embed = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2)
        self.embed_norm = nn.LayerNorm(channels)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:             # (B, C_{l-1}, h_{l-1}, w_{l-1})
        x = self.embed(x).permute(0, 2, 3, 1)           # (B, h_l, w_l, C_l)
        x = self.embed_norm(x)
        x = self.norm(self.blocks(x))
        return x.permute(0, 3, 1, 2)                    # (B, C_l, h_l, w_l)


class MixVisionTransformer(nn.Module):
    """MiT encoder: images (B, 3, H, W) -> [F_1, F_2, F_3, F_4], F_l (B, C_l, H/s, W/s).

    The strides s are 4, 8, 16 and 32. Raises ValueError unless H and W are multiples of 32.
    """

    def __init__(self, channels: tuple[int, ...], depths: tuple[int, ...], drop_path: float = 0.1):
        super().__init__()
        self.channels = channels
        self.stages = nn.ModuleList()
        rate_step = drop_path / (sum(depths) - 1)
        in_channels = 3
        for i in range(4):
            blocks = []
            for number in range(sum(depths[:i]), sum(depths[:i + 1])):
                blocks.append(Block(channels[i], HEADS[i], REDUCTIONS[i], rate_step * number))
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            self.stages.append(Stage(in_channels, channels[i], kernel, stride, blocks))
            in_channels = channels[i]
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module: nn.Module):
        """Linear: truncated normal. Convolution: normal, by its fan-out. Biases: 0."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            fan_out = height * width * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise InputError(f"frame size {height}x{width} (height x width): both sides must be "
                             f"multiples of {STRIDE}")
        x = images.contiguous(memory_format=torch.channels_last)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def mit(variant: str, drop_path: float = 0.1) -> MixVisionTransformer:
    """The MiT encoder "b0" ... "b5". Drop path rises from 0 in the first block to `drop_path`."""
    channels, depths = MIT_VARIANTS[variant]
    return MixVisionTransformer(channels, depths, drop_path)


# ------------------------------------------------------------------------- the head and SegFormer

class SegFormerHead(nn.Module):
    """All-MLP head without its classifier (section 3.2): [F_1 ... F_4] -> F (B, 256, H/4, W/4)."""

    def __init__(self, channels: tuple[int, ...], embed_dim: int = EMBED_DIM):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(c, embed_dim) for c in channels)
        self.fuse = nn.Conv2d(4 * embed_dim, embed_dim, 1, bias=False)  # F_4 comes first
        self.norm = nn.BatchNorm2d(embed_dim)
        nn.init.kaiming_normal_(self.fuse.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: list[Tensor]) -> Tensor:
        # The paper projects the four maps, upsamples them to stride 4, concatenates them and fuses
        # them with a 1x1 convolution:
        #     maps = [upsample(linear(feature)) for linear, feature in zip(self.linears, features)]
        #     fused = self.fuse(torch.cat(maps[::-1], dim=1))
        # That is a sum of four 1x1 convolutions, which commute with bilinear upsampling. So project
        # and fuse each map at its own stride, upsample, and add: the same, and much faster.
        fuse_weights = self.fuse.weight.flatten(1).chunk(4, dim=1)[::-1]   # F_1's first
        maps = []
        for feature, linear, fuse in zip(features, self.linears, fuse_weights, strict=True):
            weight = fuse @ linear.weight           # (256, C_l), both layers in one
            bias = fuse @ linear.bias
            maps.append(F.conv2d(feature, weight[:, :, None, None], bias))
        fused = maps[0]
        for x in maps[1:]:
            fused += F.interpolate(x, fused.shape[-2:], mode="bilinear")
        return F.relu(self.norm(fused), inplace=True)


def make_classifier(embed_dim: int, num_classes: int) -> nn.Sequential:
    """Channel dropout and a 1x1 convolution: (B, embed_dim, h, w) -> logits (B, K, h, w)."""
    return nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(embed_dim, num_classes, 1))


class SegFormer(nn.Module):
    """Encoder, head, classifier: images (B, 3, H, W) -> logits (B, K, H/4, W/4).

    `embed_dim` is the head's width: published heads have 256 for b0 and b1, 768 for b2 ... b5.
    Raises ValueError unless H and W are multiples of 32.
    """

    def __init__(self, variant: str = "b1", num_classes: int = 124, embed_dim: int = EMBED_DIM):
        super().__init__()
        self.encoder = mit(variant)
        self.head = SegFormerHead(self.encoder.channels, embed_dim)
        self.classifier = make_classifier(embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images)
        fused = self.head(features)
        return self.classifier(fused)


# --------------------------------------------------------------------------------------- the loss

def segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross entropy of logits (B, K, h, w), upsampled bilinearly, with int64 labels (B, H, W).

    The mean is over *all* pixels, as in MRCFA's released code: ignored ones add 0 but are counted.
    """
    logits = at_least_float32(logits).contiguous()  # CPUs upsample channels-last logits slowly
    full = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    total = F.cross_entropy(full, labels, ignore_index=ignore_index, reduction="sum")
    return total / labels.numel()


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------- loading weights
#
#          You can stop reading here: the rest reads, renames and loads other people's weights.

def load_pretrained(module: nn.Module, source) -> list[str]:
    """Load ImageNet or SegFormer weights into an encoder, a SegFormer or an MRCFA.

    `source` is a path or a state dict, in the naming of NVlabs, Hugging Face (files, and
    transformers 5 in memory) or mmsegmentation. Skipped with a warning: a classifier of another
    class count; a head of another width, with its classifier; and mmsegmentation's head, which is
    another network. Returns the parts of the SegFormer, "head" and "classifier", that keep their
    initialisation. Raises ValueError, with the keys, for everything else that doesn't fit.
    """
    state = rename(read_state_dict(source))
    if not any(key.startswith("encoder.stages.") for key in state):
        raise InputError("no MiT weights in it, in the naming of NVlabs, Hugging Face or "
                         f"mmsegmentation; it holds {some_keys(state)}")
    segformer = getattr(module, "segformer", module)  # an MRCFA has one inside
    if isinstance(segformer, MixVisionTransformer):
        state = {key: state[key] for key in state if not key.startswith(("head.", "classifier."))}
        load_strictly(nn.ModuleDict({"encoder": segformer}), state)
        return []

    own = segformer.state_dict()
    initial = []
    for part, weight in (("head", "head.fuse.weight"), ("classifier", "classifier.1.weight")):
        keys = [key for key in state if key.startswith(f"{part}.")]
        why = ""
        if "head.fusion_conv.conv.weight" in keys:
            why = "mmsegmentation's is another network"
        elif weight in state and state[weight].shape != own[weight].shape:
            why = f"it is {tuple(state[weight].shape)}, this model's {tuple(own[weight].shape)}"
        if why:
            warnings.warn(f"{part} skipped, so that it keeps its initialisation: {why}")
            state = {key: value for key, value in state.items() if key not in keys}
        if why or not keys:
            initial.append(part)
    load_strictly(segformer, state, tuple(f"{part}." for part in initial))
    return initial


def load_strictly(module: nn.Module, state: dict[str, Tensor], may_miss: tuple[str, ...] = ()):
    """`module.load_state_dict(state)`, with errors as a ValueError of one line. Only keys that
    start with one of `may_miss` can be absent."""
    own = {key: value for key, value in module.state_dict().items() if key.startswith(may_miss)}
    try:
        module.load_state_dict(own | state)
    except RuntimeError as error:  # of several lines
        raise InputError(" ".join(str(error).split())) from None


def read_checkpoint(path) -> dict:
    """Read the dict in a checkpoint file with `weights_only=True`; ValueError for other files."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(40)
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # each file format raises its own
        why = f"can't be read as a checkpoint; it begins with {start!r}"
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            why = f"would run code when loaded ({code[1]}); save only its state dict in a file"
        raise InputError(f"{path}: {why}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a checkpoint but a {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file: the length of a header, the header in JSON, the data."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")   # of the data
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        stored = content[start + first:start + end]     # a copy
        values = torch.frombuffer(stored, dtype=SAFETENSORS_TYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def read_state_dict(source) -> dict[str, Tensor]:
    """Return the weights in `source`, a path or a dict, or in its "state_dict" or "model", without
    what DataParallel, Lightning or torch.compile put before each key."""
    content = source if isinstance(source, dict) else read_checkpoint(source)
    for name in ("state_dict", "model"):
        if isinstance(content.get(name), dict):
            content = content[name]
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError("there is no state dict in it (weights by name); it holds "
                         f"{some_keys(content)}")
    prefixes = re.compile(r"^(module\.|model\.|_orig_mod\.)+|_orig_mod\.")
    return {prefixes.sub("", key): value for key, value in content.items()}


def some_keys(content: dict) -> str:
    """The first keys of a dict, for an error message."""
    return ", ".join(repr(key) for key in list(content)[:4]) or "nothing"


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any known naming under the keys of our `SegFormer`, without dead ones."""
    renamed = {}
    for key, value in state.items():
        if DEAD_KEYS.fullmatch(key):
            continue
        key = re.sub(r"^(backbone|segformer\.encoder|segformer|encoder|decode_head)\.", "", key)
        nvlabs = re.match(r"(patch_embed|block|norm|linear_c)([1-4])\.", key)
        if nvlabs:      # counts stages from 1
            key = f"{nvlabs[1]}.{int(nvlabs[2]) - 1}.{key[nvlabs.end():]}"
        for pattern, ours in RENAMES:
            key = re.sub(pattern, ours, key)
        if re.search(r"\.mlp\.fc\d\.weight$", key):
            value = value.flatten(1)    # mmsegmentation has 1x1 convolutions
        renamed[key] = value
    return join_keys_and_values(renamed)


def join_keys_and_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge separate q, k and v, or one fused qkv, into our q and kv."""
    for key in list(state):
        if ".attn.k." in key and key.replace(".k.", ".v.") in state:
            k, v = state.pop(key), state.pop(key.replace(".k.", ".v."))
            state[key.replace(".k.", ".kv.")] = torch.cat([k, v])
        elif ".attn.qkv." in key:
            q, k, v = state.pop(key).chunk(3)
            state[key.replace(".qkv.", ".q.")] = q
            state[key.replace(".qkv.", ".kv.")] = torch.cat([k, v])
    return state


# ImageNet's classifiers, and a layer that mmsegmentation creates and never uses.
DEAD_KEYS = re.compile(r"(head|classifier|decode_head\.conv_seg)\.(weight|bias)")

# Their names -> ours, applied from top to bottom, once a leading `backbone.`, `encoder.`,
# `segformer.` or `decode_head.` is gone and stages count from 0.
RENAMES = [
    # mmsegmentation
    (r"^layers\.(\d)\.0\.projection", r"encoder.stages.\1.embed"),
    (r"^layers\.(\d)\.0\.norm", r"encoder.stages.\1.embed_norm"),
    (r"^layers\.(\d)\.1", r"encoder.stages.\1.blocks"),
    (r"^layers\.(\d)\.2", r"encoder.stages.\1.norm"),
    (r"attn\.attn\.in_proj_", r"attn.qkv."),
    (r"attn\.attn\.out_proj", r"attn.proj"),
    (r"ffn\.layers\.0", r"mlp.fc1"),
    (r"ffn\.layers\.1", r"mlp.dwconv"),
    (r"ffn\.layers\.4", r"mlp.fc2"),
    (r"^(convs|fusion_conv)\.", r"head.\1."),
    # transformers 5, in memory
    (r"^stages\.(\d)\.patch_embeddings\.proj", r"encoder.stages.\1.embed"),
    (r"^stages\.(\d)\.patch_embeddings\.layer_norm", r"encoder.stages.\1.embed_norm"),
    (r"^stages\.(\d)\.layer_norm", r"encoder.stages.\1.norm"),
    (r"layernorm_before", r"norm1"),
    (r"layernorm_after", r"norm2"),
    (r"attention\.sequence_reduction\.sequence_reduction", r"attn.reduce"),
    (r"attention\.sequence_reduction\.layer_norm", r"attn.norm"),
    (r"attention\.([qkv])_proj", r"attn.\1"),
    (r"attention\.o_proj", r"attn.proj"),
    (r"^linear_projections\.(\d)\.proj", r"head.linears.\1"),
    # Hugging Face's files
    (r"^patch_embeddings\.(\d)\.proj", r"encoder.stages.\1.embed"),
    (r"^patch_embeddings\.(\d)\.layer_norm", r"encoder.stages.\1.embed_norm"),
    (r"^layer_norm\.(\d)", r"encoder.stages.\1.norm"),
    (r"layer_norm_(\d)", r"norm\1"),
    (r"attention\.self\.layer_norm", r"attn.norm"),
    (r"attention\.self\.sr", r"attn.reduce"),
    (r"attention\.self\.([qkv])(uery|ey|alue)", r"attn.\1"),
    (r"attention\.output\.dense", r"attn.proj"),
    (r"mlp\.dense", r"mlp.fc"),
    (r"^batch_norm", r"head.norm"),
    (r"^classifier(?!\.1)", r"classifier.1"),
    # NVlabs
    (r"^patch_embed\.(\d)\.proj", r"encoder.stages.\1.embed"),
    (r"^patch_embed\.(\d)\.norm", r"encoder.stages.\1.embed_norm"),
    (r"^block\.(\d)", r"encoder.stages.\1.blocks"),
    (r"^norm\.(\d)", r"encoder.stages.\1.norm"),
    (r"attn\.sr", r"attn.reduce"),
    (r"dwconv\.dwconv", r"dwconv"),
    (r"^linear_c\.(\d)\.proj", r"head.linears.\1"),
    (r"^linear_fuse\.bn", r"head.norm"),
    (r"^linear_fuse(\.conv)?", r"head.fuse"),
    (r"^linear_pred", r"classifier.1"),
    # ours
    (r"^stages", r"encoder.stages"),
]
