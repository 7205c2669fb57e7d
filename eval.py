"""Evaluate on videos: the paper's protocol and metrics, or score masks that any method saved.

    python eval.py --checkpoint runs/mrcfa_b0/best.pt --data DIR --split val --save masks/
    python eval.py --checkpoint mrcfa_b1.pth --model mrcfa_b1 --num-classes 124 --data VSPW    # a released file
    python eval.py --predictions masks/ --data DIR --split val
"""
import argparse
import colorsys
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import (CITYSCAPES_FRAME_SIZE, FRAME_SIZE, IGNORE, DataError, Video, check_same_size, fit, list_frames,
                  network_input, read_classes, read_frame, read_index_map, read_labels, read_split)
from mrcfa import MRCFA, OFFSETS, REFERENCE_STRIDE, load_official, product, reference_indices
from segformer import (MIT_VARIANTS, SegFormer, bands, bilinear_matrix, load_pretrained, load_strictly,
                       read_checkpoint, read_state_dict)

WINDOWS = (8, 16)             # n of the video consistencies mVC_n, in frames
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
PAPER_FPS = {"b0": (73.4, 50.0), "b1": (58.7, 40.1), "b2": (39.2, 32.1), "b5": (17.2, 15.7)}  # SegFormer's and MRCFA's
ROUNDS = 7                    # of the benchmark
PICTURED = 3                  # videos of which there are pictures
PANEL, SHEET_COLUMNS = 200, 8  # of pictures: the long side of a panel in pixels, moments of a video on a sheet
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = {"mIoU": "mIoU", "weighted_IoU": "weighted IoU", "mVC8": "mVC8", "mVC16": "mVC16",
           "pixel_accuracy": "pixel acc."}


# -------------------------------------------------------------------------------------------------------------- metrics

class SegmentationMetrics:
    """IoUs and video consistencies over whole videos of label maps: classes are 0 ... K-1, 255 is ignored."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.confusion = np.zeros((num_classes, num_classes), dtype=np.int64)  # [label, prediction]
        self.consistencies: dict[int, list[float]] = {n: [] for n in WINDOWS}  # one a window, of all videos

    def update(self, labels, predictions):
        """Add one whole video, integer arrays or tensors (frames, H, W); ValueError where a value is no class."""
        labels, predictions = (torch.as_tensor(x).cpu().numpy() for x in (labels, predictions))
        if labels.dtype.kind not in "iu" or predictions.dtype.kind not in "iu":
            raise ValueError(f"labels {labels.dtype} and predictions {predictions.dtype} must both be integers")
        if labels.ndim != 3 or labels.shape != predictions.shape:
            raise ValueError(f"labels {labels.shape} and predictions {predictions.shape} must both be (frames, H, W)")
        k = self.num_classes
        if predictions.size and not 0 <= predictions.min() <= predictions.max() < k:
            raise ValueError(f"predictions {predictions.min()} ... {predictions.max()} go beyond 0 ... {k - 1}")
        for label, prediction in zip(labels, predictions):
            known = label != IGNORE
            label, prediction = label[known].astype(np.int64), prediction[known].astype(np.int64)
            if label.size and not 0 <= label.min() <= label.max() < k:
                raise ValueError(f"labels {label.min()} ... {label.max()} go beyond 0 ... {k - 1} and {IGNORE}")
            self.confusion += np.bincount(k * label + prediction, minlength=k * k).reshape(k, k)
        if len(labels) > max(WINDOWS):
            self._add_consistencies(labels, predictions)

    def merge(self, other: "SegmentationMetrics"):
        """Add the videos of another one."""
        self.confusion += other.confusion
        for n, consistencies in other.consistencies.items():
            self.consistencies[n] += consistencies

    def _add_consistencies(self, labels: np.ndarray, predictions: np.ndarray):
        # For how many frames, this one included, has each pixel had the value it has now? It is constant over the
        # n frames that end here where that is at least n. The protocol leaves out the window that ends with the video.
        label_run = np.ones(labels.shape[1:], dtype=np.int32)
        prediction_run = label_run.copy()
        for t in range(1, len(labels) - 1):
            label_run = np.where(labels[t] == labels[t - 1], label_run + 1, 1)
            prediction_run = np.where(predictions[t] == predictions[t - 1], prediction_run + 1, 1)
            for n in WINDOWS:
                constant = label_run >= n
                if t >= n - 1 and constant.any():
                    self.consistencies[n].append(float((prediction_run[constant] >= n).mean()))

    def class_iou(self) -> np.ndarray:
        """IoU of each class (K,), NaN for a class that doesn't occur in the labels."""
        hits, label_counts = self.confusion.diagonal(), self.confusion.sum(1)
        union = label_counts + self.confusion.sum(0) - hits
        return np.divide(hits, union, out=np.full(self.num_classes, math.nan), where=label_counts > 0)

    def compute(self) -> dict[str, float]:
        """mIoU, weighted_IoU, pixel_accuracy, mVC8, mVC16: 0 ... 1, or NaN where there was nothing to measure."""
        iou, label_counts = self.class_iou(), self.confusion.sum(1)
        present, total = label_counts > 0, label_counts.sum()
        result = {"mIoU": math.nan, "weighted_IoU": math.nan, "pixel_accuracy": math.nan}
        if total:
            result = {"mIoU": float(iou[present].mean()),
                      "weighted_IoU": float((iou[present] * label_counts[present]).sum() / total),
                      "pixel_accuracy": float(self.confusion.trace() / total)}
        return result | {f"mVC{n}": float(np.mean(c)) if c else math.nan for n, c in self.consistencies.items()}


def percent(value: float) -> str:
    """A share as a percentage, a dash where there is none."""
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def table(results: dict[str, dict[str, float]]) -> str:
    """The metrics of methods by name, a line each, in percent."""
    width = max(12, *map(len, results))
    return "\n".join([" " * width + "".join(f"{title:>14}" for title in COLUMNS.values()),
                      *(f"{name:{width}}" + "".join(f"{percent(metrics[key]):>14}" for key in COLUMNS)
                        for name, metrics in results.items())])


def json_metrics(metrics: dict[str, float]) -> dict[str, float | None]:
    """The metrics as JSON can hold them: null instead of NaN."""
    return {key: None if math.isnan(value) else value for key, value in metrics.items()}


# ------------------------------------------------------------------------------------------------------------- protocol

def decode_mask(logits: Tensor, network_size: tuple[int, int], frame_size: tuple[int, int]) -> Tensor:
    """Logits (K, h, w) -> classes (H, W) uint8 at the frame's size: bilinear to the network's input size, from there
    to the frame's, argmax. Sizes are (height, width)."""
    # Each side's two resizes are one matrix. Columns come first, while there are few rows; then a band of rows at a
    # time, so that all classes are never at full size and the band fits into the cache.
    rows, columns = ((bilinear_matrix(network, frame) @ bilinear_matrix(small, network)).to(logits)
                     for small, network, frame in zip(logits.shape[1:], network_size, frame_size))
    wide = torch.cat([logits[..., source] @ columns[band, source].T for band, source in bands(columns, 64)], dim=-1)
    masks = [(rows[band, source] @ wide[:, source]).max(0).indices for band, source in bands(rows, 16)]
    return torch.cat(masks).to(torch.uint8)


def segment_video(model: nn.Module, frames: Sequence[Path], frame_size: Sequence[int], amp: str | None = None,
                  offsets: Sequence[int] = ()) -> Iterator[np.ndarray]:
    """The masks (H, W) uint8 of a video's frames, in order and each at its frame's own size.

    `offsets` say where among the frames the references are, if not where the model would look for them.
    """
    device = next(model.parameters()).device
    stream = model.stream() if isinstance(model, MRCFA) else None
    if stream and offsets:
        stream.offsets = tuple(offsets)
    size: tuple[int, int] | None = None
    for path in frames:
        image = read_frame(path)
        size = size or image.size
        check_same_size(path, image.size, size)
        with torch.no_grad(), autocast(device, amp):
            x = network_input(image, frame_size).to(device)
            logits = (stream(x) if stream else model(x[None])[0]).float()
        yield decode_mask(logits, x.shape[-2:], size[::-1]).cpu().numpy()


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """Mixed precision for the network: "bf16", "fp16", or None for plain float32."""
    return torch.autocast(device.type, AMP.get(amp), enabled=amp is not None)


def evaluate(model: nn.Module, videos: list[Video], num_classes: int, frame_size: Sequence[int] = FRAME_SIZE,
             save: Path | None = None, amp: str | None = None) -> SegmentationMetrics:
    """Segment videos by the protocol and compare with their labels; `save` is a folder for the masks.

    In a torch.distributed process group each process takes its share of the videos, and all get the metrics of all.
    """
    training = model.training
    model.eval()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, each = videos[rank::processes], []
    mine = [video.up_to_label() for video in mine]
    frames = sum(len(video.frames) for video in mine)
    with tqdm(total=frames, desc="evaluate", unit="frame", dynamic_ncols=True, disable=rank > 0) as bar:
        for video in mine:
            masks, labels = [], []
            predictions = segment_video(model, video.frames, frame_size, amp, video.offsets)
            for frame, label, mask in zip(video.frames, video.masks, predictions):
                bar.update()
                if label:
                    masks.append(mask)
                    labels.append(np.array(read_labels(label, mask.shape[::-1], num_classes)))
                    if save:
                        save_mask(mask, save / video.name / f"{frame.stem}.png")
            each.append(SegmentationMetrics(num_classes))
            each[-1].update(np.stack(labels), np.stack(masks))
    model.train(training)
    shares = [each]
    if processes > 1:
        shares = [[] for _ in range(processes)]
        dist.all_gather_object(shares, each)
    metrics = SegmentationMetrics(num_classes)
    for i in range(len(videos)):
        metrics.merge(shares[i % processes][i // processes])
    return metrics


def score(predictions: Path, videos: list[Video], num_classes: int) -> SegmentationMetrics:
    """Compare the masks DIR/<video>/<frame>.png with the labels of the videos."""
    if not predictions.is_dir():
        raise DataError(f"{predictions}: no such folder of predictions")
    metrics = SegmentationMetrics(num_classes)
    for video in tqdm(videos, desc="score", unit="video", dynamic_ncols=True):
        labels, masks = [], []
        for frame, label in zip(video.frames, video.masks):
            if label is None:
                continue
            size = read_frame(frame).size
            path = predictions / video.name / f"{frame.stem}.png"
            masks.append(np.array(read_index_map(path, size)))
            if masks[-1].max() >= num_classes:
                raise DataError(f"{path}: class {masks[-1].max()}, but there are only 0 ... {num_classes - 1}")
            labels.append(np.array(read_labels(label, size, num_classes)))
            check_same_size(frame, size, labels[0].shape[::-1])
        metrics.update(np.stack(labels), np.stack(masks))
    return metrics


def palette(size: int = 256) -> list[int]:
    """RGB triples of distinct colours: hues a golden ratio apart, in three brightnesses."""
    colours = ((i * 0.618034 % 1, 0.55 + 0.2 * (i % 3), 0.95 - 0.2 * (i // 3 % 3)) for i in range(size))
    return [round(255 * value) for colour in colours for value in colorsys.hsv_to_rgb(*colour)]


def coloured(mask: np.ndarray) -> Image.Image:
    """Classes (H, W) uint8 as colours; 255, ignored, is black."""
    image = Image.fromarray(mask)
    image.putpalette(palette(IGNORE) + [0, 0, 0])
    return image.convert("RGB")


def save_mask(mask: np.ndarray, path: Path):
    """Write classes (H, W) uint8 as a palette PNG."""
    image = Image.fromarray(mask)
    image.putpalette(palette())  # makes it mode P
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# ------------------------------------------------------------------------------------------------------------- pictures

def draw_legend(image: Image.Image, present: Sequence[int], classes: Sequence[str]):
    """Write the names of some classes, on their colours, down the left side of an image."""
    draw, height, colours = ImageDraw.Draw(image), max(10, image.height // 30), palette()
    font = ImageFont.load_default(height)
    for i, k in enumerate(present):
        top, right = 2 + i * (height + 6), 10 + draw.textlength(classes[k], font)
        draw.rectangle((2, top, right, top + height + 6), tuple(colours[3 * k:3 * k + 3]))
        draw.text((6, top), classes[k], "black", font)


def overlay(frame: Image.Image, mask: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """A frame with its mask's colours over it, and the names of the classes that occur."""
    image = Image.blend(frame, coloured(mask), 0.5)
    draw_legend(image, np.unique(mask).tolist(), classes)
    return image


def panel(image: Image.Image, title: str) -> Image.Image:
    """An image at the size that all have in a picture, with its title above."""
    image = image.resize(fit(image.size, PANEL, PANEL), Image.Resampling.BILINEAR)
    framed = ImageOps.expand(image, (2, 20, 2, 2), "white")
    ImageDraw.Draw(framed).text((4, 3), title, "black", ImageFont.load_default(12))
    return framed


def tile(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Images of one size side by side, row by row."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (j * width, i * height))
    return sheet


def save_pictures(folder: Path, video: Video, classes: Sequence[str], masks: dict[str, Sequence[np.ndarray]]):
    """A video's frames, labels and predicted masks (H, W), by method: moving (VIDEO.webp) and as a sheet (VIDEO.png).

    Pixels whose prediction is wrong are hatched.
    """
    moments, present = [], set(np.unique(np.stack([mask for each in masks.values() for mask in each])).tolist())
    for t, (path, mask) in enumerate(zip(video.frames, video.masks)):
        if mask is None:
            continue
        frame = read_frame(path)
        labels = np.array(read_labels(mask, frame.size, len(classes)))
        row = [panel(frame, f"{video.name}, frame {t}"), panel(coloured(labels), "label")]
        y, x = np.indices(labels.shape)
        hatch = (x + y) % max(2, len(labels) // 16) < max(1, len(labels) // 64)
        for name, predicted in masks.items():
            picture = coloured(predicted[t])
            wrong = (predicted[t] != labels) & (labels != IGNORE) & hatch
            picture.paste("white", mask=Image.fromarray(wrong))
            row.append(panel(picture, f"{name}, errors hatched"))
        moments.append(row)
        present |= set(np.unique(labels).tolist()) - {IGNORE}
    key, blank = (Image.new("RGB", fit(frame.size, PANEL, PANEL), "white") for _ in range(2))
    draw_legend(key, sorted(present), classes)
    keys = [panel(key, "classes"), *[panel(blank, "")] * (len(row) - 1)]
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = [tile([[*row, keys[0]]]) for row in moments]
    first.save(folder / f"{video.name}.webp", save_all=True, append_images=others, duration=150, loop=0)
    shown = np.linspace(0, len(moments) - 1, min(SHEET_COLUMNS, len(moments))).round().astype(int)
    tile([*zip(*(moments[t] for t in shown), keys)]).save(folder / f"{video.name}.png")


def heat(values: Tensor) -> Image.Image:
    """Numbers (h, w) as colours, from the lowest in blue to the highest in red; dark where there is none (NaN)."""
    known = values[~values.isnan()]
    share = (values - known.min()) / (known.max() - known.min()).clamp(min=1e-12)
    colours = torch.stack([share, 1 - 2 * (share - 0.5).abs(), 1 - share], dim=-1)
    colours[values.isnan()] = 0.2
    return Image.fromarray((255 * colours).round().byte().numpy())


@torch.no_grad()
def explain(model: MRCFA, frames: Sequence[Path], frame_size: Sequence[int], place: tuple[int, int]) -> Image.Image:
    """What one pixel (x, y) of the target, the last frame, finds in each of its references: a row for each of these.

    Columns: the frame and the tokens that STM keeps; the pixel's affinities A^l to them; after SAR; after MAA; and the
    weights B with which their values are read. Every map has a scale of its own, from blue, low, to red, high.
    """
    images, device = [read_frame(path) for path in frames], next(model.parameters()).device
    encoded = [model.encode(network_input(image, frame_size)[None].to(device)) for image in images]
    queries, aggregation = model.queries(encoded[-1][0]), model.aggregation
    marked, (x, y), (width, height) = images[-1].copy(), place, images[-1].size
    r = height // 24
    ImageDraw.Draw(marked).ellipse((x - r, y - r, x + r, y + r), outline="red", width=r // 3 + 1)
    rows = []
    for path, image, (features, fused) in zip(frames, images, encoded[:-1]):
        reference = model.reference(features, F.avg_pool2d(fused, 2))
        kept, *keys, _ = model.keep(queries, reference)
        grid = [4 * side // model.reference_stride for side in fused.shape[-2:]]

        def at_pixel(affinities: Tensor) -> Image.Image:
            """Images of tokens (1, m c, h, w): their values at the pixel, over the reference frame."""
            h, w = affinities.shape[-2:]
            values = affinities[0, :, y * h // height, x * w // width].view(kept.shape[1], -1).mean(1)
            full = torch.full((grid[0] * grid[1],), math.nan).scatter(0, kept[0].cpu(), values.cpu())
            return Image.blend(image, heat(full.view(*grid)).resize(image.size, Image.Resampling.NEAREST), 0.6)

        where = torch.zeros(grid[0] * grid[1], dtype=torch.uint8).scatter(0, kept[0].cpu(), 255).view(*grid)
        where = Image.fromarray(where.numpy()).resize(image.size, Image.Resampling.NEAREST)

        stacks = (aggregation.g2, aggregation.g3, aggregation.g4)
        raw = [product(q, k) for q, k in zip(queries[:3], keys)]
        refined = [g.of_product(prepared, k) for g, prepared, k in zip(stacks, queries[3:], keys)]
        columns = {"target and its pixel": marked, f"reference {path.stem}": image,
                   "STM: dark is dropped": Image.composite(image, ImageEnhance.Brightness(image).enhance(0.25), where),
                   **{f"A{l}, stride {2 ** (l + 1)}": at_pixel(raw[l - 2]) for l in (4, 3, 2)},
                   **{f"SAR: G{l}(A{l})": at_pixel(refined[l - 2]) for l in (4, 3, 2)},
                   "MAA: M2": at_pixel(aggregation(queries, *keys)),
                   "B: what is read": at_pixel(model.attend(queries, reference)[0])}
        rows.append([panel(picture, title) for title, picture in columns.items()])
    return tile(rows)


# --------------------------------------------------------------------------------------------------------------- models

MRCFA_ARGUMENTS = ("reference_stride", "keep_ratio", "refine", "aggregate", "offsets")
MODELS = [f"{kind}_{variant}" for kind in ("mrcfa", "segformer") for variant in MIT_VARIANTS]


def build_model(config: dict) -> nn.Module:
    """The model that a checkpoint's `config` describes: its name, classes, and MRCFA's arguments."""
    kind, variant = config["model"].split("_")
    if kind == "segformer":
        return SegFormer(variant, len(config["classes"]))
    return MRCFA(variant, len(config["classes"]), *(config[key] for key in MRCFA_ARGUMENTS))


def load_model(path: Path, name: str | None = None, num_classes: int | None = None) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, one of train.py's or a released one of that name and class count, and its config.

    Raises DataError where the file is none, or is of another model or class count than asked for.
    """
    try:
        checkpoint = read_checkpoint(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    try:
        if "config" not in checkpoint:
            return load_released(checkpoint, name, num_classes)
        config = checkpoint["config"]
        if name not in (None, config["model"]):
            raise ValueError(f"is a {config['model']}, but --model says {name}")
        if num_classes not in (None, len(config["classes"])):
            raise ValueError(f"has {len(config['classes'])} classes, but --num-classes says {num_classes}")
        model = build_model(config)
        load_strictly(model, checkpoint["model"])
        return model, config
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def load_released(checkpoint: dict, name: str | None, num_classes: int | None) -> tuple[nn.Module, dict]:
    """The model of a released MRCFA or SegFormer checkpoint, and what would be its config; else ValueError."""
    state = read_state_dict(checkpoint)
    if name is None or num_classes is None:
        raise ValueError("is not one of train.py's checkpoints; for a released one give --model and --num-classes")
    classifier_bias, value = state.get("decode_head.linear_pred.bias"), state.get("decode_head.sr1_feat.weight")
    if classifier_bias is not None and len(classifier_bias) != num_classes:
        raise ValueError(f"has {len(classifier_bias)} classes, but --num-classes says {num_classes}")
    if name.startswith("mrcfa") != (value is not None):
        raise ValueError(f"is {'a SegFormer' if value is None else 'an MRCFA'}, but --model says {name}")
    stride = REFERENCE_STRIDE if value is None else 8 * value.shape[-1]
    config = {"model": name, "classes": [f"class {i}" for i in range(num_classes)],
              "frame_size": FRAME_SIZE if stride == REFERENCE_STRIDE else CITYSCAPES_FRAME_SIZE,
              **dict(zip(MRCFA_ARGUMENTS, (stride, None, True, True, OFFSETS)))}
    model = build_model(config)
    if isinstance(model, MRCFA):
        load_official(model, state)
    else:
        load_pretrained(model, state)
    return model, config


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
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    except OSError:
        return math.nan


def measure(methods: dict[str, Callable[[], Tensor]], size: tuple[int, int],
            device: torch.device) -> dict[str, tuple[float, float, float]]:
    """Seconds a frame of each method, and with its mask decoded, medians of several rounds in turn; its peak MB."""
    def seconds(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
        """How long some work takes, and its result."""
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, result

    times: dict[str, list] = {name: [] for name in methods}
    memory = {}
    for _ in range(ROUNDS):
        for name, method in methods.items():
            seconds(method)  # not counted: it warms up, and clears away what the method before it left in the caches
            peak_memory(device, reset=True)
            network, logits = seconds(method)
            memory[name] = peak_memory(device)
            decoding, _ = seconds(lambda: decode_mask(logits.float(), size, FRAME_SIZE[::-1]))
            times[name].append((network, network + decoding))
    return {name: (*np.median(times[name], axis=0), memory[name]) for name in methods}


@torch.no_grad()
def benchmark(args: argparse.Namespace):
    """Print what SegFormer, MRCFA by clips and MRCFA streaming cost with random weights, as a Markdown table."""
    device, size, num_classes = args.device, tuple(args.size), args.num_classes or 124
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    how = f"{args.amp or 'float32'}{', compiled' * args.compile}, {hardware}"
    print(f"{size[0]}x{size[1]}, {num_classes} classes, {how}\n")
    print("| | M params | GFLOPs | ms | FPS | / SegFormer | paper's | ms with mask | FPS with mask | peak MB |")
    print("|---|" + "---:|" * 9)
    for variant in args.variants:
        model = MRCFA(variant, num_classes).eval().to(device)
        clip = torch.randn(1, len(model.offsets) + 1, 3, *size, device=device)
        stream = model.stream()
        for _ in range(max(model.offsets) + 1):  # fill the history
            stream(clip[0, -1])
        methods = {"SegFormer": lambda: model.segformer(clip[:, -1])[0], "MRCFA by clips": lambda: model(clip)[0],
                   "MRCFA streaming": lambda: stream(clip[0, -1])}
        gflops = {}
        for name, method in methods.items():
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts plain products
                method()
            gflops[name] = counter.get_total_flops() / 1e9
        if args.compile:
            compile_parts(model)
            compile_parts(model.segformer)
        with autocast(device, args.amp):
            costs = measure(methods, size, device)
        count = {name: sum(p.numel() for n, p in model.named_parameters() if not n.startswith("auxiliary")
                           and (name != "SegFormer" or n.startswith("segformer"))) / 1e6 for name in methods}
        for name, (network, with_mask, megabytes) in costs.items():
            streaming = name == "MRCFA streaming" and variant in PAPER_FPS
            paper = f"{PAPER_FPS[variant][0] / PAPER_FPS[variant][1]:.2f}" if streaming else ""
            ratio = network / costs["SegFormer"][0]
            cells = [f"{variant} {name}", f"{count[name]:.2f}", f"{gflops[name]:.1f}", f"{1e3 * network:.0f}",
                     f"{1 / network:.2f}", f"{ratio:.2f}", paper, f"{1e3 * with_mask:.0f}", f"{1 / with_mask:.2f}",
                     f"{megabytes:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


# --------------------------------------------------------------------------------------------------------- command line

class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr, with exit code 2."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str):
        """End the script with the message."""
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """The type of an argument that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def device(text: str) -> torch.device:
    """The type of an argument that names a device."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not to be had: {str(error).splitlines()[0]}") from None


def command_line(main: Callable[[], None]):
    """Run a script's main; a DataError, even of a loader's worker process, ends it with one line and exit code 2."""
    try:
        main()
    except DataError as error:
        message = str(error).rsplit("DataError: ", 1)[-1].strip()
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def refuse_to_overwrite(path: Path, instead: str = "give another name"):
    """DataError where a file, or a folder with something in it, is already there; a half-written file is nothing."""
    if path.is_file() or path.is_dir() and any(inside.suffix != ".tmp" for inside in path.iterdir()):
        raise DataError(f"{path}: exists already, and nothing is overwritten; {instead}")


def parse_args() -> argparse.Namespace:
    """The command line of an evaluation."""
    parser = ArgumentParser("Evaluate a checkpoint or saved masks, segment a folder of frames, or measure the speed.")
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--checkpoint", type=Path, nargs="+", metavar="FILE",
         help="evaluate it on --data, or several side by side, or segment --frames; train.py's or a released one")
    what("--predictions", type=Path, help="score the masks DIR/<video>/<frame>.png (pixel = class from 0)")
    what("--benchmark", action="store_true", help="measure parameters, operations, time and memory of --variants")

    files = parser.add_argument_group("files").add_argument
    files("--data", type=Path, help="data folder with SPLIT.txt and data/<video>/{origin,mask}")
    files("--split", default="val", help="which videos: those that DIR/SPLIT.txt names")
    files("--frames", type=Path, help="a folder of frames without labels; their masks go to --save and --overlay")
    files("--save", type=Path, help="new folder for the predicted masks, palette PNGs")
    files("--overlay", type=Path, help="new folder for the masks of --frames over the frames, with a legend")
    files("--explain", nargs=4, metavar=("VIDEO", "FRAME", "X", "Y"),
          help="draw what one pixel of a frame of --data, counted from 0, finds in its references, into --pictures")
    files("--pictures", type=Path, help=f"new folder for pictures of the first {PICTURED} videos, moving and as sheets")
    files("--json", type=Path, help="new file for the metrics")
    files("--per-class", action="store_true", help="print each class's IoU, too")

    model = parser.add_argument_group("model").add_argument
    model("--model", choices=MODELS, metavar="NAME", help="what a released checkpoint is: mrcfa_b0 ... segformer_b5")
    model("--num-classes", type=positive, help="of a released checkpoint; of the benchmark, there 124 by default")
    model("--dilation", type=positive, nargs="+", metavar="N",
          help="how many frames back the references lie, if not as in training")
    model("--frame-size", type=positive, nargs=2, metavar=("LONG", "SHORT"),
          help="scale frames to fit this, if not as in training")
    model("--amp", choices=AMP, help="mixed precision, for speed on GPUs; float32 without")
    model("--compile", action="store_true", help="torch.compile the network: pays after a minute or so of compilation")
    model("--device", type=device, default=DEVICE, help="where the network runs")

    speed = parser.add_argument_group("benchmark").add_argument
    speed("--variants", nargs="+", choices=MIT_VARIANTS, default=list(PAPER_FPS), metavar="NAME", help="of b0 ... b5")
    speed("--size", type=positive, nargs=2, default=(480, 864), metavar=("H", "W"), help="multiples of 32")
    args = parser.parse_args()
    if args.checkpoint and (args.data is None) == (args.frames is None):
        parser.error("--checkpoint needs --data DIR to evaluate on, or --frames DIR to segment")
    if args.predictions and args.data is None:
        parser.error("--predictions needs the labels: --data DIR")
    if args.frames and not (args.save or args.overlay):
        parser.error("--frames needs --save DIR for the masks, or --overlay DIR")
    if args.explain and not (args.checkpoint and args.data and args.pictures):
        parser.error("--explain needs --checkpoint FILE, --data DIR and --pictures DIR")
    if args.frames and len(args.checkpoint) > 1:
        parser.error("--frames takes one --checkpoint")
    return args


def open_model(args: argparse.Namespace, path: Path) -> tuple[nn.Module, dict]:
    """A model as the command line wants it, ready to run, and its config."""
    model, config = load_model(path, args.model, args.num_classes)
    if args.dilation and isinstance(model, MRCFA):
        if len(args.dilation) != len(model.offsets):
            raise DataError(f"--dilation {args.dilation}: {path} takes {len(model.offsets)} references")
        model.offsets = tuple(args.dilation)
    config["frame_size"] = args.frame_size or config["frame_size"]
    model.eval().to(args.device)
    if args.compile:
        compile_parts(model)
    return model, config


def segment_frames(args: argparse.Namespace):
    """Segment a folder of frames: masks to --save, the masks over their frames to --overlay."""
    frames = list_frames(args.frames)
    model, config = open_model(args, args.checkpoint[0])
    masks = segment_video(model, frames, config["frame_size"], args.amp)
    for path in tqdm(frames, desc="segment", unit="frame", dynamic_ncols=True):
        mask = next(masks)
        if args.save:
            save_mask(mask, args.save / f"{path.stem}.png")
        if args.overlay:
            args.overlay.mkdir(parents=True, exist_ok=True)
            overlay(read_frame(path), mask, config["classes"]).save(args.overlay / f"{path.stem}.jpg", quality=92)
    print(f"{len(frames)} frames are in {' and '.join(str(path) for path in (args.save, args.overlay) if path)}")


def explain_pixel(args: argparse.Namespace):
    """Draw what --explain asks for."""
    model, config = open_model(args, args.checkpoint[0])
    name, *numbers = args.explain
    if not all(number.isdecimal() for number in numbers):
        raise DataError(f"--explain {' '.join(args.explain)}: after the video it takes three whole numbers")
    t, x, y = map(int, numbers)
    frames = list_frames(args.data / "data" / name / "origin")
    references = reference_indices(t, model.offsets) if isinstance(model, MRCFA) else []
    if not references or t >= len(frames):
        raise DataError(f"--explain {name} {t}: give an MRCFA's --checkpoint and a frame from {len(model.offsets)} to "
                        f"{len(frames) - 1}" if isinstance(model, MRCFA) else "--explain: SegFormer has no references")
    width, height = read_frame(frames[t]).size
    if x >= width or y >= height:
        raise DataError(f"--explain {x} {y}: the frame is {width}x{height}")
    args.pictures.mkdir(parents=True)
    path = args.pictures / f"{name}_{t}_{x}_{y}.png"
    explain(model, [frames[i] for i in (*references, t)], config["frame_size"], (x, y)).save(path)
    print(f"{path} shows what frame {t} finds at ({x}, {y})")


def evaluate_checkpoints(args: argparse.Namespace, classes: list[str]) -> dict[str, SegmentationMetrics]:
    """Evaluate one checkpoint or several on the same videos, and draw them side by side for --pictures."""
    results, masks = {}, {}
    for path in args.checkpoint:
        model, config = open_model(args, path)
        if len(config["classes"]) != len(classes):
            raise DataError(f"{path}: has {len(config['classes'])} classes, but {args.data} {len(classes)}")
        name = config["model"] if config["model"] not in results else str(path)
        videos = read_split(args.data, args.split, getattr(model, "offsets", ()))
        save = args.save / name if args.save and len(args.checkpoint) > 1 else args.save
        results[name] = evaluate(model, videos, len(classes), config["frame_size"], save, args.amp)
        if args.pictures:
            shown = [video.up_to_label() for video in videos[:PICTURED]]
            masks[name] = [list(segment_video(model, video.frames, config["frame_size"], args.amp, video.offsets))
                           for video in shown]
    if args.pictures:
        for i, video in enumerate(shown):
            save_pictures(args.pictures, video, classes, {name: masks[name][i] for name in masks})
    return results


def main():
    """Do what the command line says."""
    args = parse_args()
    for path in (args.save, args.json, args.overlay, args.pictures):
        if path:
            refuse_to_overwrite(path)
    if args.benchmark:
        return benchmark(args)
    if args.frames:
        return segment_frames(args)
    if args.explain:
        return explain_pixel(args)
    classes = read_classes(args.data)
    if args.predictions:
        results = {args.predictions.name: score(args.predictions, read_split(args.data, args.split), len(classes))}
    else:
        results = evaluate_checkpoints(args, classes)
    metrics = {name: result.compute() for name, result in results.items()}
    print(table(metrics))
    if args.per_class:
        for i, class_name in enumerate(classes):
            print(f"{class_name:30}" + "".join(f"{percent(result.class_iou()[i]):>8}" for result in results.values()))
    if args.json:
        values = {name: json_metrics(value) for name, value in metrics.items()}
        args.json.write_text(json.dumps(values if len(values) > 1 else next(iter(values.values())), indent=2) + "\n")


if __name__ == "__main__":
    command_line(main)
