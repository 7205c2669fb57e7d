"""Evaluate on videos: the paper's protocol and metrics, masks, pictures, and what all of it costs.

    python eval.py --checkpoint runs/mrcfa_b0/best.pt --data DIR --split val --save masks/
    python eval.py --checkpoint mrcfa_b1.pth --model mrcfa_b1 --num-classes 124 --data VSPW    # a released file
    python eval.py --predictions masks/ --data DIR --split val                                 # masks of any method
"""
import argparse
import colorsys
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import (CITYSCAPES_FRAME_SIZE, FRAME_SIZE, IGNORE, Video, fit, list_frames, network_input, read_classes,
                  read_frames, read_image, read_index_map, read_labels, read_split)
from mrcfa import MRCFA, OFFSETS, REFERENCE_STRIDE, product, reference_indices, rename_official
from segformer import (EMBED_DIM, MIT_VARIANTS, SegFormer, bands, bilinear_matrix, load_pretrained, load_strictly,
                       read_checkpoint, read_state_dict, rename)

MODELS = [f"{kind}_{variant}" for kind in ("mrcfa", "segformer") for variant in MIT_VARIANTS]
MRCFA_ARGUMENTS = ("reference_stride", "keep_ratio", "refine", "aggregate", "offsets")
WINDOWS = (8, 16)              # n of the video consistencies mVC_n, in frames
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ["cuda"] * torch.cuda.is_available() + ["cpu"] + ["mps"] * torch.backends.mps.is_available()
PICTURED = 3                   # videos of which there are pictures
PANEL, SHEET_COLUMNS = 200, 8  # of pictures: the long side of a panel in pixels, moments of a video on a sheet
WRONG = 254                    # a value that is no class, for the hatching of errors
PALETTE = [round(255 * value) for i in range(WRONG)  # hues a golden ratio apart, three brightnesses
           for value in colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.55 + i % 3 / 5, 0.95 - i // 3 % 3 / 5)]
PALETTE += 3 * [255] + 3 * [0]  # WRONG is white, IGNORE black
PAPER_RATIO = {"b0": 73.4 / 50.0, "b1": 58.7 / 40.1, "b2": 39.2 / 32.1, "b5": 17.2 / 15.7}  # SegFormer's FPS / MRCFA's
ROUNDS = 5                     # of the benchmark


# -------------------------------------------------------------------------------------------------------------- metrics

class SegmentationMetrics:
    """IoUs and video consistencies over whole videos of label maps: classes are 0 ... K-1, 255 is ignored."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # [label, prediction]
        self.consistencies: dict[int, list[float]] = {n: [] for n in WINDOWS}      # one a window, of all videos

    def update(self, labels, predictions):
        """Add one whole video, integer arrays or tensors (frames, H, W); ValueError where a value is no class."""
        labels, predictions = torch.as_tensor(labels).cpu(), torch.as_tensor(predictions).cpu()
        shaped = labels.ndim == 3 and labels.shape == predictions.shape
        if not shaped or labels.is_floating_point() or predictions.is_floating_point():
            raise ValueError(f"labels {labels.dtype} {tuple(labels.shape)} and predictions {predictions.dtype} "
                             f"{tuple(predictions.shape)} must both be integers and (frames, H, W)")
        k, confusion = self.num_classes, torch.zeros_like(self.confusion)
        for t, (label, prediction) in enumerate(zip(labels, predictions)):
            known, prediction = label != IGNORE, prediction.long()
            label = label[known].long()
            for name, values in ("label", label), ("prediction", prediction):
                if values.numel() and not 0 <= values.min() <= values.max() < k:
                    raise ValueError(f"{name}s in frame {t}: {values.min()} ... {values.max()}, "
                                     f"but classes are 0 ... {k - 1}")
            confusion += torch.bincount(k * label + prediction[known], minlength=k * k).view(k, k)
        self.confusion += confusion
        # For how many frames, this one included, has each pixel had the value it has now? It is constant over the
        # n frames that end here where that is at least n. The protocol leaves out the window that ends with the video.
        label_run = prediction_run = torch.ones(labels.shape[1:], dtype=torch.int32)
        for t in range(1, len(labels) - 1 if len(labels) > max(WINDOWS) else 1):
            label_run = torch.where(labels[t] == labels[t - 1], label_run + 1, 1)
            prediction_run = torch.where(predictions[t] == predictions[t - 1], prediction_run + 1, 1)
            for n in WINDOWS:
                constant = label_run >= n
                if t >= n - 1 and constant.any():
                    self.consistencies[n].append((prediction_run[constant] >= n).double().mean().item())

    def class_iou(self) -> Tensor:
        """IoU of each class (K,), NaN for a class that doesn't occur in the labels."""
        counts = self.confusion.double()
        hits, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        return (hits / (labelled + predicted - hits)).where(labelled > 0, math.nan)

    def compute(self) -> dict[str, float]:
        """mIoU, weighted_IoU, mVC8, mVC16, pixel_accuracy: 0 ... 1, or NaN where there was nothing to measure."""
        iou, share = self.class_iou(), self.confusion.double() / self.confusion.sum()        # NaN without labels
        return {"mIoU": iou.nanmean().item(), "weighted_IoU": (iou.nan_to_num() @ share.sum(1)).item(),
                **{f"mVC{n}": math.fsum(c) / len(c) if c else math.nan for n, c in self.consistencies.items()},
                "pixel_accuracy": share.trace().item()}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Shares by row and column as text, in percent, with a dash for NaN."""
    width, columns = max(12, *map(len, rows)), list(next(iter(rows.values())))
    cells = {name: ["-" if math.isnan(row[key]) else f"{100 * row[key]:.2f}" for key in columns]
             for name, row in rows.items()}
    return "\n".join(f"{name:{width}}" + "".join(f" {cell:>14}" for cell in row)
                     for name, row in {"": columns, **cells}.items())


# ------------------------------------------------------------------------------------------------------------- protocol

def decode_mask(logits: Tensor, network_size: Sequence[int], frame_size: Sequence[int]) -> Tensor:
    """Logits (K, h, w) -> classes (H, W) uint8 at the frame's size: bilinear to the network's input size, from there
    to the frame's, argmax. Sizes are (height, width)."""
    # Each side's two resizes are one matrix. Columns come first, while there are few rows; then a band of rows at a
    # time, so that all classes are never at full size and the band fits into the cache.
    rows, columns = (bilinear_matrix(network, frame) @ bilinear_matrix(small, network)
                     for small, network, frame in zip(logits.shape[1:], network_size, frame_size))
    of_rows, of_columns, rows, columns = bands(rows, 16), bands(columns, 64), rows.to(logits), columns.to(logits)
    wide = torch.cat([logits[..., source] @ columns[band, source].T for band, source in of_columns], dim=-1)
    masks = [(rows[band, source] @ wide[:, source]).max(0).indices for band, source in of_rows]
    return torch.cat(masks).to(torch.uint8)


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """Mixed precision for the network: "bf16", "fp16", or None for plain float32."""
    return torch.autocast(device.type, AMP[amp] if amp else None, enabled=amp is not None)


def segment_video(video: Video, model: nn.Module, frame_size: Sequence[int],
                  amp: str | None = None) -> Iterator[np.ndarray]:
    """The masks (H, W) uint8 of a video's frames, in order and each at its frame's own size."""
    device = next(model.parameters()).device
    network = model.stream() if isinstance(model, MRCFA) else lambda frame: model(frame[None])[0]
    for image in read_frames(video.frames):
        with torch.no_grad(), autocast(device, amp):
            x = network_input(image, frame_size).to(device)
            logits = network(x).float()
        yield decode_mask(logits, x.shape[-2:], image.size[::-1]).cpu().numpy()


def saved_masks(video: Video, folder: Path, num_classes: int) -> Iterator[np.ndarray | None]:
    """The masks DIR/<video>/<frame>.png of a video's labelled frames, and None for the others."""
    for path, label, image in zip(video.frames, video.masks, read_frames(video.frames)):
        mask_path = folder / video.name / f"{path.stem}.png"
        mask = np.array(read_index_map(mask_path, image.size)) if label else None
        if mask is not None and mask.max() >= num_classes:
            raise ValueError(f"{mask_path}: class {mask.max()}, but there are only 0 ... {num_classes - 1}")
        yield mask


def evaluate(methods: Mapping[str, Callable[[Video], Iterable]], videos: list[Video], classes: Sequence[str],
             save: Path | None = None, over: Path | None = None,
             pictures: Path | None = None) -> dict[str, SegmentationMetrics]:
    """Compare what each method gives for a video, a mask a frame, with its labels.

    Masks of labelled frames, or of all where no frame is, go to the folder `save`, and blended with the frames to
    `over`; of several methods, each has a folder in there. The first videos are drawn in `pictures`. In a
    torch.distributed process group each process takes its share of the videos, and all get the same metrics.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = videos[rank::processes]
    metrics = {name: SegmentationMetrics(len(classes)) for name in methods}
    with tqdm(total=sum(len(video.frames) for video in mine), desc="evaluate", unit="frame", dynamic_ncols=True,
              disable=rank > 0) as bar:
        for i, video in enumerate(mine):
            moments = []
            by_method = [method(video) for method in methods.values()]
            for t, (path, label, *masks) in enumerate(zip(video.frames, video.masks, *by_method)):
                bar.update()
                if label:
                    moments.append((t, np.array(read_labels(label, masks[0].shape[::-1], len(classes))), *masks))
                elif any(video.masks):
                    continue
                for name, mask in zip(methods, masks):
                    place = Path(name if methods.keys() - {name} else "", video.name, path.stem)
                    if save:
                        write_image(coloured(mask), save / f"{place}.png")
                    if over:
                        image = Image.blend(read_image(path).convert("RGB"), coloured(mask).convert("RGB"), 0.5)
                        write_image(draw_legend(image, np.unique(mask), classes), over / f"{place}.jpg")
            if moments:
                _, labels, *masks = (np.stack(x) for x in zip(*moments))
                for metric, of_method in zip(metrics.values(), masks):
                    metric.update(labels, of_method)
            if moments and pictures and rank == 0 and i < PICTURED:
                save_pictures(pictures / video.name, video, moments, list(methods), classes)
    for metric in metrics.values() if processes > 1 else ():
        shares: list[Any] = [None] * processes
        dist.all_gather_object(shares, (metric.confusion, metric.consistencies))
        metric.confusion = torch.stack([confusion for confusion, _ in shares]).sum(0)
        metric.consistencies = {n: [share for _, of in shares for share in of[n]] for n in WINDOWS}
    return metrics


# ------------------------------------------------------------------------------------------------------------- pictures

def coloured(mask: np.ndarray) -> Image.Image:
    """Classes (H, W) uint8 as a palette image, pixel = class; 255, ignored, is black."""
    image = Image.fromarray(mask)
    image.putpalette(PALETTE)
    return image


def write_image(image: Image.Image, path: Path):
    """Save an image in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92)  # of JPEGs


def draw_legend(image: Image.Image, present: Iterable[int], classes: Sequence[str]) -> Image.Image:
    """Write the names of some classes, on their colours, down the left side of an image."""
    draw, height = ImageDraw.Draw(image), max(10, image.height // 30)
    font = ImageFont.load_default(height)
    for i, k in enumerate(present):
        top = 2 + i * (height + 6)
        box = 2, top, 10 + draw.textlength(classes[k], font), top + height + 6
        draw.rectangle(box, tuple(PALETTE[3 * k:3 * k + 3]))
        draw.text((6, top), classes[k], "black", font)
    return image


def panel(image: Image.Image, title: str) -> Image.Image:
    """An image at the size that all have in a picture, with its title above."""
    image = image.convert("RGB").resize(fit(image.size, PANEL, PANEL), Image.Resampling.BILINEAR)
    framed = ImageOps.expand(image, (2, 20, 2, 2), "white")
    ImageDraw.Draw(framed).text((4, 3), title, "black", ImageFont.load_default(12))
    return framed


def tile(rows: Iterable[Sequence[Image.Image]]) -> Image.Image:
    """Images of one size side by side, row by row."""
    return Image.fromarray(np.vstack([np.hstack([np.asarray(image) for image in row]) for row in rows]))


def save_pictures(path: Path, video: Video, moments: list[tuple], names: Sequence[str], classes: Sequence[str]):
    """A video's labelled frames, labels and masks by method, moving (PATH.webp) and as a sheet of some (PATH.png).

    `moments` are of one labelled frame each: its number, labels, and masks. Wrong pixels are hatched.
    """
    rows = []
    for t, labels, *masks in moments:
        y, x = np.indices(labels.shape)
        hatched = (labels != IGNORE) & ((x + y) % max(2, len(labels) // 16) < max(1, len(labels) // 64))
        rows.append([panel(read_image(video.frames[t]), f"{video.name}, frame {t}"), panel(coloured(labels), "label"),
                     *(panel(coloured(np.where(hatched & (mask != labels), WRONG, mask)), f"{name}, errors hatched")
                       for name, mask in zip(names, masks))])
    present = {int(k) for _, *maps in moments for x in maps for k in np.unique(x)} - {IGNORE}
    blank = Image.new("RGB", fit(labels.shape[::-1], PANEL, PANEL), "white")
    key = draw_legend(blank.copy(), sorted(present), classes)
    keys = [panel(key, "classes"), *[panel(blank, "")] * (1 + len(masks))]
    first, *others = [tile([[*row, keys[0]]]) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(f"{path}.webp", save_all=True, append_images=others, duration=150, loop=0)
    shown = np.linspace(0, len(rows) - 1, min(SHEET_COLUMNS, len(rows))).round().astype(int)
    tile(zip(*(rows[i] for i in shown), keys)).save(f"{path}.png")


def heat(values: Tensor, over: Image.Image) -> Image.Image:
    """Numbers (h, w) as colours over an image, the lowest blue and the highest red; NaN is dark."""
    known = values[~values.isnan()]
    share = (values - known.min()) / (known.max() - known.min()).clamp(min=1e-12)
    colours = torch.stack([share, 1 - 2 * (share - 0.5).abs(), 1 - share], dim=-1).nan_to_num(0.2)
    image = Image.fromarray((255 * colours).round().byte().numpy())
    return Image.blend(over, image.resize(over.size, Image.Resampling.NEAREST), 0.6)


@torch.no_grad()
def explain(model: MRCFA, frames: Sequence[Path], frame_size: Sequence[int], place: tuple[int, int]) -> Image.Image:
    """What one pixel (x, y) of the target, the last frame, finds in its references: a column for each of these.

    Downwards: the tokens that STM keeps, the pixel's affinities A^l to them, these after SAR and after MAA, and the
    weights B with which their values are read. The last column is what SAR and MAA see: of the nearest reference's
    token that is read most, the affinities to all positions of the target. Every map has a scale of its own.
    """
    images, device = list(read_frames(frames)), next(model.parameters()).device
    encoded = [model.encode(network_input(image, frame_size)[None].to(device)) for image in images]
    queries, sar, target = model.queries(encoded[-1][0]), model.aggregation, images[-1]
    h, w = (4 * side // model.reference_stride for side in encoded[-1][1].shape[-2:])  # the grid of tokens

    def ringed(image: Image.Image, x: float, y: float) -> Image.Image:
        """A copy of an image with a ring round the place (x, y), each 0 ... 1."""
        image, r = image.copy(), image.height // 24
        x, y = x * image.width, y * image.height
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), outline="red", width=r // 3 + 1)
        return image

    x, y = (place[0] + 0.5) / target.width, (place[1] + 0.5) / target.height
    columns = []
    for path, image, (features, fused) in zip(frames, images, encoded[:-1]):
        reference = model.reference(features, F.avg_pool2d(fused, 2))
        kept, *keys, _ = model.keep(queries, reference)
        steps = {f"A{l} (target stride {2 ** (l + 1)})": product(queries[l - 2].q, keys[l - 2]) for l in (4, 3, 2)}
        steps |= {f"SAR: G{l}(A{l})": getattr(sar, f"g{l}").of_product(queries[l - 2], keys[l - 2]) for l in (4, 3, 2)}
        steps |= {"MAA: M2": sar(queries, keys), "B: what is read": model.attend(queries, reference)[0]}
        # Each step as an image of the target's positions for each token, (m, h_l, w_l), and what the pixel has in them.
        images_of = {name: step[0].unflatten(0, (kept.shape[1], -1)).mean(1).cpu() for name, step in steps.items()}
        found = {name: of[:, int(y * of.shape[1]), int(x * of.shape[2])] for name, of in images_of.items()}
        of_grid = {name: torch.full((h * w,), math.nan).scatter(0, kept[0].cpu(), values).view(h, w)
                   for name, values in found.items()}
        dropped = Image.fromarray(of_grid["MAA: M2"].isnan().numpy()).resize(image.size)
        dimmed = Image.composite(image.point(lambda v: v // 4), image, dropped)
        columns.append({"target and its pixel": ringed(target, x, y),
                        f"reference {path.stem}: STM drops dark": dimmed,
                        **{name: heat(values, image) for name, values in of_grid.items()}})
    token = int(found["B: what is read"].argmax())
    top, left = divmod(int(kept[0, token]), w)
    columns.append({"target, as it looks to": target,
                    "the token that is read most": ringed(image, (left + 0.5) / w, (top + 0.5) / h),
                    **{name: heat(of[token], target) for name, of in images_of.items()}})
    return tile(zip(*([panel(picture, title) for title, picture in column.items()] for column in columns)))


# --------------------------------------------------------------------------------------------------------------- models

def build_model(config: dict) -> nn.Module:
    """The model that a checkpoint's `config` describes: its name, classes, and MRCFA's arguments."""
    kind, variant = config["model"].split("_")
    if kind == "segformer":
        return SegFormer(variant, len(config["classes"]), config.get("embed_dim", EMBED_DIM))
    return MRCFA(variant, len(config["classes"]), *(config[key] for key in MRCFA_ARGUMENTS))


def load_weights(model: nn.Module, checkpoint: dict, path: Path):
    """Load train.py's weights, a released MRCFA's, or those of a SegFormer or its encoder, told apart by their keys.

    Classifiers of other classes keep their initialisation. Raises ValueError, with the path, if anything else is wrong.
    """
    try:
        state = read_state_dict(checkpoint)
        if "decode_head.sr1_feat.weight" in state:
            state = rename_official(state)
        if "value.weight" not in state:  # an MRCFA has that
            return load_pretrained(model, state)
        own = model.state_dict()
        other = {k for k, value in state.items() if "classifier" in k and len(value) != len(own.get(k, value))}
        if other:
            print("classifiers are of other classes and begin anew", file=sys.stderr)
        load_strictly(model, {key: value for key, value in state.items() if key not in other}, tuple(other))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_model(path: Path, args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """A checkpoint's model, ready to run as the command line says, and its config.

    Raises ValueError where the file is none, or is of another model or class count than the command line says.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint.get("config")
    if config is not None and not (isinstance(config, dict)
                                   and config.keys() >= {"model", "classes", "frame_size", *MRCFA_ARGUMENTS}):
        raise ValueError(f"{path}: its 'config' is not one of train.py's")
    if config is None and not (args.model and args.num_classes):
        raise ValueError(f"{path}: is not train.py's; for a released checkpoint give --model and --num-classes")
    if config is None:
        state = read_state_dict(checkpoint)
        renamed, value = rename(state), state.get("decode_head.sr1_feat.weight")
        stride = REFERENCE_STRIDE if value is None else 8 * value.shape[-1]
        config = {"model": ("segformer" if value is None else "mrcfa") + args.model[-3:],
                  "classes": [f"class {i}" for i in range(len(renamed.get("classifier.1.bias", ())))],
                  "frame_size": FRAME_SIZE if stride == REFERENCE_STRIDE else CITYSCAPES_FRAME_SIZE,
                  "embed_dim": len(renamed.get("head.fuse.weight", ())) or EMBED_DIM,
                  **dict(zip(MRCFA_ARGUMENTS, (stride, None, True, True, OFFSETS)))}
    if args.model not in (None, config["model"]) or args.num_classes not in (None, len(config["classes"])):
        raise ValueError(f"{path}: is a {config['model']} of {len(config['classes'])} classes, but --model or "
                         "--num-classes says something else")
    if len(config["classes"]) > WRONG:
        raise ValueError(f"{path}: has {len(config['classes'])} classes; masks, of 8 bits, can hold {WRONG}")
    model = build_model(config)
    load_weights(model, checkpoint, path)
    if isinstance(model, MRCFA):
        model.offsets = tuple(args.dilation or model.offsets)
    if args.compile:
        compile_parts(model)
    return model.eval().to(args.device), {**config, "frame_size": args.frame_size or config["frame_size"]}


def compile_parts(model: nn.Module):
    """torch.compile whatever runs once a frame."""
    for name in ("encode", "reference", "segment") if isinstance(model, MRCFA) else ("forward",):
        setattr(model, name, torch.compile(getattr(model, name)))


# ------------------------------------------------------------------------------------------------------------ benchmark

def peak_memory(device: torch.device, reset: bool = False) -> float:
    """The most memory in use since the last reset, in MB: the GPU's tensors, or on Linux the process; else NaN."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1e3
    except OSError:
        return math.nan


@torch.no_grad()
def benchmark(args: argparse.Namespace):
    """Print what SegFormer, MRCFA by clips and MRCFA streaming cost with random weights, as a Markdown table.

    Times are medians of several rounds in which the methods take turns.
    """
    device, size, num_classes = args.device, tuple(args.size), args.num_classes or 124
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{size[0]}x{size[1]}, {num_classes} classes, {args.amp or 'float32'}{', compiled' * args.compile}, "
          f"{hardware}\n")
    print("| | M params | GFLOPs | ms | FPS | / SegFormer | paper's | ms with mask | FPS with mask | peak MB |")
    print("|---|" + "---:|" * 9)

    def seconds(work: Callable[[], object]) -> float:
        """How long some work takes, once it has been done twice to warm up."""
        return Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads()).timeit(1).mean

    for variant in args.variants:
        model = MRCFA(variant, num_classes).eval().to(device)
        clip, stream = torch.randn(1, len(model.offsets) + 1, 3, *size, device=device), model.stream()
        for _ in range(max(model.offsets) + 1):  # fill the history
            stream(clip[0, -1])
        methods = {"SegFormer": lambda: model.segformer(clip[:, -1])[0], "MRCFA by clips": lambda: model(clip)[0],
                   "MRCFA streaming": lambda: stream(clip[0, -1])}
        times: dict[str, list] = {name: [] for name in methods}
        gflops, memory = {}, {}
        for name, method in methods.items():
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts plain products
                method()
            gflops[name] = counter.get_total_flops() / 1e9
        for part in (model, model.segformer) if args.compile else ():
            compile_parts(part)
        for name, method in ROUNDS * list(methods.items()):
            peak_memory(device, reset=True)
            with autocast(device, args.amp):
                network, memory[name], logits = seconds(method), peak_memory(device), method().float()
            times[name].append((network, network + seconds(lambda: decode_mask(logits, size, FRAME_SIZE[::-1]))))
        for name in methods:
            network, with_mask = np.median(times[name], axis=0)
            count = sum(p.numel() for part, p in model.named_parameters() if not part.startswith("auxiliary")
                        and (name != "SegFormer" or part.startswith("segformer"))) / 1e6
            paper = f"{PAPER_RATIO[variant]:.2f}" if name == "MRCFA streaming" and variant in PAPER_RATIO else ""
            print(f"| {variant} {name} | {count:.2f} | {gflops[name]:.1f} | {1e3 * network:.0f} | {1 / network:.2f} | "
                  f"{network / np.median(times['SegFormer'], axis=0)[0]:.2f} | {paper} | {1e3 * with_mask:.0f} | "
                  f"{1 / with_mask:.2f} | {memory[name]:.0f} |", flush=True)


# --------------------------------------------------------------------------------------------------------- command line

class ArgumentParser(argparse.ArgumentParser):
    """argparse with what both scripts take, whose errors are one line on stderr, with exit code 2."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.add_argument("--device", choices=DEVICES, default=DEVICES[0], help="where the network runs")
        self.add_argument("--amp", choices=AMP, help="mixed precision; in training fp16 scales its gradients")
        self.add_argument("--compile", action="store_true", help="torch.compile the network: pays after some minutes")

    def error(self, message: str):
        """End the script with the message."""
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """The type of an argument that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def command_line(main: Callable[[], None]):
    """Run a script's main; what is wrong with arguments, files or data is one line and exit code 2.

    Python's own development mode, `python -X dev train.py`, shows where the line comes from.
    """
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if sys.flags.dev_mode:
            raise
        message = str(error).rsplit("Error: ", 1)[-1].strip() or "interrupted"  # a loader's has its worker's traceback
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)


def refuse_to_overwrite(path: Path, instead: str = "give another name"):
    """ValueError where a file, or a folder with something in it, is already there; a half-written file is nothing."""
    if path.is_file() or path.is_dir() and any(inside.suffix != ".tmp" for inside in path.iterdir()):
        raise ValueError(f"{path}: exists already, and nothing is overwritten; {instead}")


def parse_args() -> argparse.Namespace:
    """The command line of an evaluation."""
    parser = ArgumentParser("Evaluate checkpoints or saved masks, segment a folder of frames, or measure the speed.")
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--checkpoint", type=Path, nargs="+", metavar="FILE", help="train.py's or a released one; or several")
    what("--predictions", type=Path, nargs="+", metavar="DIR",
         help="score the masks DIR/<video>/<frame>.png, pixel = class from 0; or several folders")
    what("--benchmark", action="store_true", help="measure parameters, operations, time and memory of --variants")
    files = parser.add_argument_group("files").add_argument
    files("--data", type=Path, help="data folder with SPLIT.txt and data/<video>/{origin,mask}")
    files("--split", default="val", help="which videos: those that DIR/SPLIT.txt names")
    files("--frames", type=Path, help="instead of --data a folder of frames without labels, for --save and --overlay")
    files("--save", type=Path, help="new folder for the predicted masks, palette PNGs")
    files("--overlay", type=Path, help="new folder for the masks over their frames, with a legend")
    files("--pictures", type=Path, help=f"new folder for pictures of the first {PICTURED} videos, moving and as sheets")
    files("--explain", nargs=4, metavar=("VIDEO", "FRAME", "X", "Y"),
          help="draw what one pixel of a frame of --data, counted from 0, finds in its references, into --pictures")
    files("--json", type=Path, help="new file for the metrics")
    files("--per-class", action="store_true", help="print each class's IoU, too")
    model = parser.add_argument_group("model").add_argument
    model("--model", choices=MODELS, metavar="NAME", help="what a released checkpoint is: mrcfa_b0 ... segformer_b5")
    model("--num-classes", type=positive, help="of a released checkpoint; of the benchmark, there 124 by default")
    model("--dilation", type=positive, nargs="+", metavar="N", help="frames back to references, if not as in training")
    model("--frame-size", type=positive, nargs=2, metavar=("LONG", "SHORT"), help="of frames, if not as in training")
    model("--variants", nargs="+", choices=MIT_VARIANTS, default=list(PAPER_RATIO), metavar="NAME", help="to benchmark")
    model("--size", type=positive, nargs=2, default=(480, 864), metavar=("H", "W"), help="of the benchmark's frames")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    if not args.benchmark and not args.data and not (args.checkpoint and args.frames):
        parser.error("--data DIR is missing, or --frames DIR to segment with --checkpoint FILE")
    if args.frames and (args.json or args.pictures or not (args.save or args.overlay)):
        parser.error("--frames have no labels: they need --save DIR for the masks or --overlay DIR, and nothing else")
    if args.explain and (not (args.checkpoint and args.pictures and args.data) or args.checkpoint[1:]
                         or args.save or args.overlay or args.json):
        parser.error("--explain needs one --checkpoint FILE, --data DIR and --pictures DIR, and nothing else")
    return args


def explain_pixel(args: argparse.Namespace):
    """Draw what --explain asks for."""
    model, config = load_model(args.checkpoint[0], args)
    if not isinstance(model, MRCFA):
        raise ValueError(f"--explain: {args.checkpoint[0]} is a {config['model']}, which has no references")
    video, *place = args.explain
    t, x, y = (int(number) if number.isdecimal() else -1 for number in place)
    frames = list_frames(args.data / "data" / video / "origin")
    width, height = read_image(frames[0]).size
    if not (len(model.offsets) <= t < len(frames) and 0 <= x < width and 0 <= y < height):
        raise ValueError(f"--explain {' '.join(args.explain)}: give a frame from {len(model.offsets)} to "
                         f"{len(frames) - 1}, and a place in its {width}x{height} pixels")
    path = args.pictures / f"{video}_{t}_{x}_{y}.png"
    refuse_to_overwrite(path)
    chosen = [frames[i] for i in (*reference_indices(t, model.offsets), t)]
    write_image(explain(model, chosen, config["frame_size"], (x, y)), path)
    print(f"{path} shows what frame {t} finds at ({x}, {y})")


def main():
    """Do what the command line says."""
    args = parse_args()
    for path in (args.save, args.json, args.overlay, args.pictures):
        if path and not args.explain:
            refuse_to_overwrite(path)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.touch()  # fails now, if at all, instead of after the evaluation
        args.json.unlink()
    if args.benchmark or args.explain:
        return benchmark(args) if args.benchmark else explain_pixel(args)
    methods: dict[str, Callable[[Video], Iterable]] = {}
    offsets: set[tuple[int, ...]] = set()  # of the references of all models
    classes = own = read_classes(args.data) if args.data else []
    for path in args.checkpoint or args.predictions:
        name, predict = path.name or "masks", partial(saved_masks, folder=path, num_classes=len(own))
        if args.checkpoint:
            model, config = load_model(path, args)
            name, classes = config["model"], config["classes"]
            if isinstance(model, MRCFA):
                offsets.add(model.offsets)
            predict = partial(segment_video, model=model, frame_size=config["frame_size"], amp=args.amp)
        if args.data and len(own) != len(classes):
            raise ValueError(f"{path}: has {len(classes)} classes, but {args.data} {len(own)}")
        names = [name, *(f"{name}_{i}" for i in range(2, len(methods) + 2))]  # one of them is free
        methods[next(free for free in names if free not in methods)] = predict
    if args.frames:
        frames = list_frames(args.frames)
        evaluate(methods, [Video("", frames, [None] * len(frames))], classes, args.save, args.overlay)
        return print(f"the frames are in {' and '.join(str(path) for path in (args.save, args.overlay) if path)}")
    if len(offsets) > 1 and (args.data / "gtFine").is_dir():
        raise ValueError(f"{args.data}: clips of Cityscapes are made for one model's references, but these lie "
                         f"{sorted(offsets)} frames back; evaluate one checkpoint at a time, or give one --dilation")
    videos = read_split(args.data, args.split, max(offsets, default=()))
    results = evaluate(methods, videos, own, args.save, args.overlay, args.pictures)
    metrics = {name: result.compute() for name, result in results.items()}
    print(table(metrics))
    if args.per_class:
        ious = {name: result.class_iou().tolist() for name, result in results.items()}
        print(table({k: {name: ious[name][i] for name in ious} for i, k in enumerate(own)}))
    if args.json:
        values = metrics if len(metrics) > 1 else next(iter(metrics.values()))
        args.json.write_text(json.dumps(values, indent=2).replace("NaN", "null") + "\n")


if __name__ == "__main__":
    command_line(main)
