"""Evaluate on videos: the paper's protocol and metrics, masks, pictures, and costs.

    python eval.py --checkpoint runs/mrcfa_b0/best.pt --data DIR --save masks/
    python eval.py --checkpoint mrcfa_b1.pth --model mrcfa_b1 --num-classes 124 --data VSPW
    python eval.py --predictions masks/ --data DIR  # masks of any method
    torchrun --nproc_per_node 4 eval.py ...         # videos shared out
"""
import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from data import (CITYSCAPES_CLASSES, CITYSCAPES_FRAME_SIZE, FRAME_SIZE, IGNORE, MAX_CLASSES,
                  PALETTE, VSPW_CLASSES, WRONG, ArgumentParser, Video, add_shared_arguments,
                  between, check_labels, check_same_classes, coloured, decode_mask, gather,
                  join_processes, list_frames, network_input, progress, rank, read_classes,
                  read_frame, read_frames, read_index_map, read_labels, read_split,
                  refuse_to_overwrite, run_script, world_size, write_image)
from mrcfa import MRCFA, as_maps, load_checkpoint, read_weights, reference_indices
from segformer import (EMBED_DIM, MIT_VARIANTS, InputError, SegFormer, load_strictly,
                       read_checkpoint)

MODELS = [f"{kind}_{variant}" for kind in ("mrcfa", "segformer") for variant in MIT_VARIANTS]
WINDOWS = (8, 16)      # n of the video consistencies mVC_n, in frames
PICTURED_VIDEOS = 3    # videos with pictures
PICTURED_FRAMES = 100  # frames in a picture, the first labelled ones
PANEL = 200            # long side of a picture's panels, in pixels
LEGEND = 204           # width of a legend's column, for letters of 10 pixels
ROUNDS = 5             # times that the benchmark measures each model

Masks = Iterator[np.ndarray | None]  # (H, W) uint8, or None, for each frame
Segment = Callable[[Video], Masks]


# ------------------------------------------------------------------------------------- metrics

class SegmentationMetrics:
    """IoUs and temporal consistencies (mVC) over whole videos. Classes are 0 ... K-1.

    255 is ignored, except by mVC: like the authors' script it treats 255 as any other label.
    (That script also leaves videos of up to 16 frames out of mIoU; here all count.)
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # [label, mask]
        self.consistencies = {n: [] for n in WINDOWS}  # a share for each window

    def update(self, labels, predictions):
        """Add a whole video, integers (frames, H, W), 255 only in labels. Raises ValueError."""
        labels = self.as_bytes(labels, "labels")
        predictions = self.as_bytes(predictions, "predictions")
        if labels.shape != predictions.shape:
            raise InputError(f"labels {tuple(labels.shape)} and predictions "
                             f"{tuple(predictions.shape)} must have one shape")
        for label, prediction in zip(labels, predictions, strict=True):
            pairs = 256 * label.int() + prediction
            counts = torch.bincount(pairs.flatten(), minlength=256 ** 2).view(256, 256)
            self.confusion += counts[:self.num_classes, :self.num_classes]
        if len(labels) > max(WINDOWS):  # as in the protocol
            self.add_consistencies(labels, predictions)

    def as_bytes(self, values, name: str) -> Tensor:
        """Values of a video as uint8. Only labels can be ignored."""
        values = torch.as_tensor(values).cpu()
        if values.ndim != 3 or values.is_floating_point():
            found = f"{values.dtype} {tuple(values.shape)}"
            raise InputError(f"{name} must be integers (frames, H, W), not {found}")
        if values.dtype != torch.uint8:
            values = values.long()
        wrong = (values < 0) | (values >= self.num_classes)
        if name == "labels":
            wrong &= values != IGNORE
        if wrong.any():
            value = values[wrong][0].item()
            raise InputError(f"{name}: {value} is not a class; give 0 ... {self.num_classes - 1}")
        return values.to(torch.uint8)

    def add_consistencies(self, labels: Tensor, predictions: Tensor):
        """Add mVC's windows: of the pixels whose label is constant in a window, the share whose
        prediction is, too. The protocol has no window that ends at the last frame."""
        label_runs = run_lengths(labels[:-1])
        prediction_runs = run_lengths(predictions[:-1])
        for label_run, prediction_run in zip(label_runs, prediction_runs, strict=True):
            for n in WINDOWS:  # the n frames up to this one
                constant = label_run >= n
                consistent = constant & (prediction_run >= n)
                pixels = constant.sum().item()
                if pixels:
                    self.consistencies[n].append(consistent.sum().item() / pixels)

    def class_iou(self) -> Tensor:
        """IoU of each class (K,), NaN for a class that doesn't occur in the labels."""
        hits = self.confusion.double().diagonal()
        labelled, predicted = self.confusion.sum(1), self.confusion.sum(0)
        iou = hits / (labelled + predicted - hits)
        return iou.where(labelled > 0, math.nan)

    def compute(self) -> dict[str, float]:
        """mIoU, weighted_IoU, mVC8, mVC16, pixel_accuracy: 0 ... 1, NaN if nothing was measured."""
        iou = self.class_iou()
        share = self.confusion.double() / self.confusion.sum()  # NaN without labels
        values = {"mIoU": iou.nanmean().item(),
                  "weighted_IoU": (iou.nan_to_num() @ share.sum(1)).item()}
        for n, shares in self.consistencies.items():
            values[f"mVC{n}"] = math.fsum(shares) / len(shares) if shares else math.nan
        values["pixel_accuracy"] = share.trace().item()
        return values

    def add_other_processes(self):
        """Add what the other processes of a torch.distributed group have counted."""
        shares = gather((self.confusion, self.consistencies))
        self.confusion = sum(confusion for confusion, _ in shares)
        for n in WINDOWS:
            self.consistencies[n] = sum((share[n] for _, share in shares), [])


def run_lengths(frames: Tensor) -> Iterator[Tensor]:
    """For each frame, how many frames each pixel (H, W) has had its value, up to max(WINDOWS)."""
    run, previous = torch.zeros_like(frames[0]), frames[0]
    for frame in frames:
        run = (run * (frame == previous) + 1).clamp(max=max(WINDOWS))
        previous = frame
        yield run


def table(columns: Sequence[str], rows: dict[str, Sequence[float]]) -> str:
    """Named rows of shares as text, in percent, with a dash for NaN."""
    lines = [["", *columns]]
    for name, values in rows.items():
        cells = ["-" if math.isnan(value) else f"{100 * value:.2f}" for value in values]
        lines.append([name, *cells])
    first = max(12, *map(len, rows))
    width = max(14, *map(len, columns))
    return "\n".join(name.ljust(first) + "".join(f" {cell:>{width}}" for cell in cells)
                     for name, *cells in lines)


def metrics_table(results: dict[str, SegmentationMetrics]) -> str:
    """A row of metrics for each method."""
    values = {name: metrics.compute() for name, metrics in results.items()}
    columns = list(next(iter(values.values())))
    return table(columns, {name: list(row.values()) for name, row in values.items()})


def without_nan(values: dict[str, float]) -> dict[str, float | None]:
    """The same for JSON, which has no NaN or infinity: None instead."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


# ---------------------------------------------------------------------------------- evaluation

def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """The context of --amp: bfloat16 where it is exact enough."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def segment_video(video: Video, model: nn.Module, frame_size: Sequence[int],
                  amp: str | None = None) -> Masks:
    """The mask (H, W) uint8 of each frame, at its size; None for references of Cityscapes."""
    device = next(model.parameters()).device
    stream = model.stream() if isinstance(model, MRCFA) else None
    frames = read_frames(video.frames)
    for path, label, image in zip(video.frames, video.masks, frames, strict=True):
        x = network_input(image, frame_size).to(device)
        # Without --amp recent GPUs also compute in float32. By default they would use TF32.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=amp == "bf16")
        with torch.no_grad(), exact, autocast(device, amp):
            logits = stream(x) if stream else model(x[None])[0]
        if not logits.sum().isfinite():
            raise InputError(f"{path}: the network's output is not finite; are its weights?")
        if video.offsets and not label:
            yield None
            continue
        yield decode_mask(logits.float(), x.shape[-2:], image.size[::-1]).cpu().numpy()


def saved_masks(video: Video, folder: Path, num_classes: int) -> Masks:
    """The masks DIR/<video>/<frame>.png of labelled frames, and None for the others."""
    frames = read_frames(video.frames)
    for path, label, image in zip(video.frames, video.masks, frames, strict=True):
        if label is None:
            yield None
            continue
        mask_path = folder / video.name / f"{path.stem}.png"
        mask = np.array(read_index_map(mask_path, image.size)[0])
        if mask.max() >= num_classes:
            raise InputError(f"{mask_path}: class {mask.max()}, but there are only "
                             f"0 ... {num_classes - 1}")
        yield mask


def evaluate(methods: dict[str, Segment], videos: Sequence[Video], classes: Sequence[str],
             save: Path | None = None, overlay: Path | None = None, pictures: Path | None = None
             ) -> dict[str, SegmentationMetrics]:
    """Compare the masks of each method with the labels -> metrics of each.

    Masks are written to `save`, masks over their frames to `overlay`; several methods have a
    folder each. The first videos are drawn in `pictures`. The processes of a torch.distributed
    group share the videos, and all get the same metrics.
    """
    results = {name: SegmentationMetrics(len(classes)) for name in methods}
    longest_first = sorted(range(len(videos)), key=lambda i: -len(videos[i].frames))
    mine = sorted(longest_first[rank()::world_size()])
    frames = len(methods) * sum(len(videos[i].frames) for i in mine)
    with progress(total=frames, desc="evaluate", unit="frame", disable=rank() > 0) as bar:
        for i in mine:
            video = videos[i]
            masks = {name: [] for name in methods}  # of the labelled frames
            for name, segment in methods.items():
                folder = Path(name if len(methods) > 1 else "", video.name)
                for frame, mask_path, mask in zip(video.frames, video.masks, segment(video)):
                    bar.update()
                    if mask is None:
                        continue
                    if mask_path:
                        masks[name].append(mask)
                    path = folder / frame.stem
                    if save:
                        write_image(coloured(mask), save / f"{path}.png", compress_level=1)
                    if overlay:
                        image = blend(frame, mask, classes)
                        write_image(image, overlay / f"{path}.jpg", quality=92)
            labels = []
            for mask_path, mask in zip(filter(None, video.masks), masks[name]):
                size = mask.shape[::-1]
                label = read_labels(mask_path, size, len(classes), video.first_label)
                labels.append(np.array(label))
            for name, metrics in results.items():
                if labels and None not in video.masks:
                    metrics.update(np.stack(labels), np.stack(masks[name]))
                else:  # no mVC where labels are missing
                    for label, mask in zip(labels, masks[name], strict=True):
                        metrics.update(label[None], mask[None])
            if pictures and labels and i < PICTURED_VIDEOS:
                draw_video(pictures / f"{video.name}.webp", video, labels, masks, classes)
    for metrics in results.values():
        metrics.add_other_processes()
    return results


# ---------------------------------------------------------------------------------- checkpoints

def load_model(args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """The checkpoint's model, set up as the command line asks, and its config."""
    path = args.checkpoint
    if "config" in read_checkpoint(path):
        model, config = load_checkpoint(path)
    elif args.model and args.num_classes:
        model, config = load_released(path, args.model, args.num_classes)
    else:
        raise InputError(f"{path}: is not train.py's; if released, give --model and --num-classes")
    if isinstance(model, MRCFA):
        model.offsets = tuple(args.offsets or model.offsets)
        model.keep_ratio = args.keep_ratio or model.keep_ratio
        config["offsets"] = model.offsets
    else:
        config.pop("offsets", None)
    if args.frame_size:
        config["frame_size"] = args.frame_size
    return model.eval().to(args.device), config


def load_released(path: Path, name: str, num_classes: int) -> tuple[nn.Module, dict]:
    """A released MRCFA or SegFormer, or bare weights of ours, and a config for it."""
    kind, variant = name.split("_")
    content = read_checkpoint(path)
    try:
        state = read_weights(content)
        if kind == "mrcfa":
            kernel = state["value.weight"].shape[-1] if "value.weight" in state else 4
            model = MRCFA(variant, num_classes, 8 * kernel)
        else:
            embed_dim = len(state.get("head.fuse.weight", ())) or EMBED_DIM
            model = SegFormer(variant, num_classes, embed_dim)
        load_strictly(model, state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    unnamed = [f"class {k}" for k in range(num_classes)]
    classes = {124: VSPW_CLASSES, 19: CITYSCAPES_CLASSES}.get(num_classes, unnamed)
    frame_size = CITYSCAPES_FRAME_SIZE if num_classes == 19 else FRAME_SIZE
    return model, {"model": name, "classes": classes, "frame_size": frame_size}


# --------------------------------------------------------------------------------- command line

def parse_args() -> argparse.Namespace:
    """The command line of an evaluation."""
    parser = ArgumentParser("Evaluate a checkpoint or masks, segment a folder of frames, or "
                            "measure the speed.")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="train.py's or the authors' checkpoint")
    add("--predictions", type=Path, metavar="DIR",
        help="score the masks DIR/<video>/<frame>.png, pixel = class from 0")
    add("--benchmark", action="store_true",
        help="measure parameters, operations and time of --variants")

    add = parser.add_argument_group("files").add_argument
    add("--split", default="val", metavar="NAME", help="the videos in NAME.txt of --data")
    add("--frames", type=Path, metavar="DIR",
        help="instead of --data, unlabelled frames, for --save and --overlay")
    add("--save", type=Path, metavar="DIR", help="new folder for masks, palette PNGs")
    add("--overlay", type=Path, metavar="DIR", help="new folder for masks over their frames")
    add("--pictures", type=Path, metavar="DIR",
        help=f"new folder for animations of the first {PICTURED_VIDEOS} videos")
    add("--explain", nargs=4, metavar=("VIDEO", "FRAME", "X", "Y"),
        help="draw into --pictures what a pixel reads from its references; frames from 0 on")
    add("--json", type=Path, metavar="FILE", help="new file for the metrics")
    add("--per-class", action="store_true", help="also print the IoU of each class")
    add("--single-frames", action="store_true",
        help="also evaluate an MRCFA's SegFormer, which sees no references")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, metavar="NAME",
        help="model in a released checkpoint: mrcfa_b0 ... segformer_b5")
    add("--num-classes", type=between(1, MAX_CLASSES),
        help="classes of a released checkpoint, or of the benchmark (default: 124)")
    add_shared_arguments(parser)

    add = parser.add_argument_group("benchmark").add_argument
    add("--variants", nargs="+", choices=MIT_VARIANTS, default=["b0", "b1", "b2", "b5"],
        metavar="NAME", help="encoder variants to measure")
    add("--size", type=between(1), nargs=2, default=(480, 864), metavar=("H", "W"),
        help="size of the benchmark's frames")
    args = parser.parse_args()
    if not args.benchmark and not args.data and not (args.checkpoint and args.frames):
        parser.error("--data DIR is missing, or --checkpoint FILE with --frames DIR")
    if args.frames and (args.json or args.pictures or not (args.save or args.overlay)):
        parser.error("--frames have no labels: they need --save DIR or --overlay DIR, and "
                     "nothing else")
    if args.explain and not (args.checkpoint and args.pictures and args.data):
        parser.error("--explain needs --checkpoint FILE, --data DIR and --pictures DIR")
    args.device = torch.device(args.device)
    return args


def main():
    """Do what the command line asks, as one of several processes under torchrun."""
    args = parse_args()
    if args.benchmark:
        benchmark(args)
    elif args.explain:
        explain_pixel(args)
    else:
        join_processes(args)
        run(args)


def run(args: argparse.Namespace):
    """Evaluate a checkpoint or masks, or segment a folder of frames."""
    for path in (args.save, args.json, args.overlay, args.pictures):
        if path:
            refuse_to_overwrite(path)
    gather(None)  # until all have seen that
    methods, config = prepare_methods(args)
    classes = config["classes"]
    if args.frames:
        frames = list_frames(args.frames)
        videos = [Video("", frames, [None] * len(frames))]
    else:
        offsets = config.get("offsets", ())
        sparse = (args.labels or config.get("labels")) == "sparse"
        trained_with = config.get("first_label", 1)
        first_label = trained_with if args.first_label is None else args.first_label
        videos = read_split(args.data, args.split, offsets, sparse, first_label)
        check_labels(videos, classes, args.split)
    results = evaluate(methods, videos, classes, args.save, args.overlay, args.pictures)
    if rank() > 0 or args.frames:
        return
    content = {name: without_nan(metrics.compute()) for name, metrics in results.items()}
    if len(content) == 1:
        content, = content.values()
    try:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(content, indent=2) + "\n")
    finally:  # printed even if it can't be written
        print(metrics_table(results))
    if args.per_class:
        ious = torch.stack([metrics.class_iou() for metrics in results.values()], dim=1)
        print(table(list(results), dict(zip(classes, ious.tolist(), strict=True))))


def prepare_methods(args: argparse.Namespace) -> tuple[dict[str, Segment], dict]:
    """The methods on the command line, and a dict with their "classes" and more."""
    if args.predictions:
        classes = read_classes(args.data, default=VSPW_CLASSES)
        segment = partial(saved_masks, folder=args.predictions, num_classes=len(classes))
        return {args.predictions.absolute().name: segment}, {"classes": classes}

    model, config = load_model(args)
    if args.data:
        classes = read_classes(args.data, default=config["classes"])
        check_same_classes(config["classes"], classes, args.checkpoint, args.data)
        config["classes"] = classes
    segment = partial(segment_video, frame_size=config["frame_size"], amp=args.amp)
    methods = {config["model"]: partial(segment, model=model)}
    if isinstance(model, MRCFA) and args.single_frames:
        methods["single_frames"] = partial(segment, model=model.segformer)
    return methods, config


# ------------------------------------------------------------------------------------- pictures

def blend(frame: Path, mask: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """A mask over its frame, with its classes' names. A background keeps its colours."""
    original = read_frame(frame)
    image = Image.blend(original, coloured(mask).convert("RGB"), 0.5)
    if "background" in classes:
        image.paste(original, mask=Image.fromarray(mask == classes.index("background")))
    areas = np.bincount(mask.ravel(), minlength=256)
    draw_legend(image, areas, classes, font_size=max(10, image.height // 30))
    return image


def draw_legend(image: Image.Image, areas: np.ndarray, classes: Sequence[str], font_size: int = 10):
    """Write the names of the classes with an area (256,) into an image, on their colours, the
    largest first, in columns from the left."""
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(font_size)
    height = font_size + 6
    rows = max(1, image.height // height)
    shown = [k for k in np.argsort(-areas, kind="stable") if areas[k] and k < len(classes)]
    for i, k in enumerate(shown):
        left, top = i // rows * LEGEND * font_size // 10, i % rows * height
        red, green, blue = PALETTE[3 * k:3 * k + 3]
        is_dark = 3 * red + 6 * green + blue < 1000
        right = left + round(font.getlength(classes[k])) + 8
        draw.rectangle((left, top, right, top + height - 1), (red, green, blue))
        draw.text((left + 4, top + 2), classes[k], "white" if is_dark else "black", font)


def panel(image: Image.Image, title: str) -> Image.Image:
    """An image at the size that all have in a picture, with its title above."""
    image = ImageOps.contain(image.convert("RGB"), (PANEL, PANEL))
    framed = ImageOps.expand(image, (2, 20, 2, 2), "white")
    ImageDraw.Draw(framed).text((4, 4), title, "black", ImageFont.load_default(11))
    return framed


def tile(rows: Iterable[Sequence[Image.Image]]) -> Image.Image:
    """Images side by side, row by row. A row has one height, and all rows have one width."""
    stacked = [np.hstack([np.asarray(image) for image in row]) for row in rows]
    return Image.fromarray(np.vstack(stacked))


def draw_video(path: Path, video: Video, labels: Sequence[np.ndarray],
               masks: dict[str, Sequence[np.ndarray]], classes: Sequence[str]):
    """Animate a video's labelled frames: frame, label, each method's mask with errors hatched, and
    the names of all classes."""
    labelled = [t for t, mask_path in enumerate(video.masks) if mask_path]
    y, x = np.indices(labels[0].shape)
    stripes = (x + y) % max(2, len(y) // 16) < max(1, len(y) // 64)
    areas = np.zeros(256, dtype=np.int64)
    rows = []
    for i, t in enumerate(labelled[:PICTURED_FRAMES]):
        label = labels[i]
        row = [panel(read_frame(video.frames[t]), f"{video.name}, frame {t}"),
               panel(coloured(label), "label")]
        areas += np.bincount(label.ravel(), minlength=256)
        for name in masks:
            mask = masks[name][i]
            wrong = (label != IGNORE) & (mask != label)
            hatched = np.where(wrong & stripes, np.uint8(WRONG), mask)
            row.append(panel(coloured(hatched), f"{name}, errors hatched"))
            areas += np.bincount(mask.ravel(), minlength=256)
        rows.append(row)
    height = rows[0][0].height
    columns = math.ceil(np.count_nonzero(areas[:len(classes)]) / (height // 16))
    legend = Image.new("RGB", (max(1, columns) * LEGEND, height), "white")
    draw_legend(legend, areas, classes)
    first, *others = [tile([[*row, legend]]) for row in rows]
    write_image(first, path, save_all=True, append_images=others, duration=150, loop=0)


# ---------------------------------------------------------------------------- one pixel explained

def explain_pixel(args: argparse.Namespace):
    """Draw what --explain asks for."""
    model, config = load_model(args)
    if not isinstance(model, MRCFA):
        raise InputError(f"--explain: {args.checkpoint} is not an MRCFA: it has no references")
    video = args.explain[0]
    t, x, y = (int(number) if number.isdecimal() else -1 for number in args.explain[1:])
    frames = list_frames(args.data / "data" / video / "origin")
    width, height = read_frame(frames[0]).size
    first = len(model.offsets)
    if not (first <= t < len(frames) and 0 <= x < width and 0 <= y < height):
        raise InputError(f"--explain {' '.join(args.explain)}: give a frame from {first} to "
                         f"{len(frames) - 1}, and a place in {width}x{height} pixels")
    path = args.pictures / f"{video.replace('/', '_')}_{t}_{x}_{y}.png"
    refuse_to_overwrite(path)
    chosen = [frames[i] for i in (*reference_indices(t, model.offsets), t)]
    write_image(explain(model, chosen, config["frame_size"], (x, y)), path)
    print(f"{path} shows what frame {t} reads at ({x}, {y})")


@torch.no_grad()
def explain(model: MRCFA, frames: Sequence[Path], frame_size: Sequence[int],
            place: tuple[int, int]) -> Image.Image:
    """Draw what one pixel (x, y) of the target, the last frame, reads from its references.

    A column per reference: the tokens that STM keeps, the pixel's affinities A^4 and A^2 to
    them, the same after SAR and after MAA, and the weights B of their values. The last column
    has what SAR and MAA convolve: the affinities of one token (ringed) to the whole target.
    """
    device = next(model.parameters()).device

    def encode(image: Image.Image) -> tuple[list[Tensor], Tensor]:
        """[F_1 ... F_4] and F of an image."""
        return model.encode(network_input(image, frame_size)[None].to(device))

    *images, target = read_frames(frames)
    features, _ = encode(target)
    queries = model.queries(features)
    x, y = (place[0] + 0.5) / target.width, (place[1] + 0.5) / target.height
    columns = []
    for path, image in zip(frames[:-1], images, strict=True):
        features, fused = encode(image)
        h, w = (4 * side // model.reference_stride for side in fused.shape[-2:])
        reference = model.keys_and_values(features, model.at_stride_8(fused))
        kept, steps = reconstruction_steps(model, queries, reference)
        heats = []
        for name, maps in steps.items():
            read = torch.full((h * w,), math.nan)  # NaN for tokens that STM drops
            read[kept] = maps[:, int(y * maps.shape[1]), int(x * maps.shape[2])]
            heats.append(heat_panel(read.view(h, w), image, name))
        dropped = Image.fromarray(read.view(h, w).isnan().numpy()).resize(image.size)
        dark = Image.composite(image.point(lambda v: v // 4), image, dropped)
        columns.append([panel(dark, f"reference {path.stem}, STM"), *heats])

    # The token of the nearest reference, the last one, that the pixel reads most.
    position = int(read.nan_to_num().argmax())
    top, left = divmod(position, w)
    columns[-1][0] = panel(ringed(dark, (left + 0.5) / w, (top + 0.5) / h),
                           f"reference {path.stem}, a token")
    token = kept.tolist().index(position)
    heats = [heat_panel(maps[token], target, name) for name, maps in steps.items()]
    columns.append([panel(ringed(target, x, y), "target and its pixel"), *heats])
    return tile(zip(*columns, strict=True))


def reconstruction_steps(model: MRCFA, queries: Sequence[Tensor], reference
                         ) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens (m,) that STM keeps, and the maps (m, h_l, w_l) of some steps after it."""
    kept, A2, _, A4, M2, B, _ = model.reconstruct(queries, reference)
    size2, _, size4 = (Q.shape[1:3] for Q in queries)
    A2, A4, B = as_maps(A2, size2), as_maps(A4, size4), as_maps(B, size2)
    steps = {"A4 (target stride 32)": A4, "A2 (target stride 8)": A2,
             "SAR: G2(A2)": model.aggregation.g2(A2), "MAA: M2": M2, "B: weights": B}
    for name, maps in steps.items():
        channels = maps[0].unflatten(0, (kept.shape[1], -1))  # b1 has two per token
        steps[name] = channels.mean(1).float().cpu()
    return kept[0].cpu(), steps


def ringed(image: Image.Image, x: float, y: float) -> Image.Image:
    """A copy of an image with a ring around the place (x, y), each 0 ... 1."""
    image = image.copy()
    radius = max(3, image.height // 24)
    centre = x * image.width, y * image.height
    ImageDraw.Draw(image).circle(centre, radius, outline="red", width=radius // 3 + 1)
    return image


def heat_panel(values: Tensor, over: Image.Image, title: str) -> Image.Image:
    """Numbers (h, w) as colours over an image: blue is lowest, red highest, NaN dark."""
    known = values[~values.isnan()]
    low, high = known.min(), known.max()
    share = (values - low) / (high - low).clamp(min=1e-12)
    colours = torch.stack([share, 1 - 2 * (share - 0.5).abs(), 1 - share], dim=-1)
    image = Image.fromarray((255 * colours.nan_to_num(0.2)).round().byte().numpy())
    image = Image.blend(over, image.resize(over.size, Image.Resampling.NEAREST), 0.6)
    return panel(image, f"{title}   {low:.3g} ... {high:.3g}")


# ------------------------------------------------------------------------------------ benchmark

@torch.no_grad()
def benchmark(args: argparse.Namespace):
    """Print what SegFormer, MRCFA by clips and MRCFA streaming cost, as a Markdown table. Times
    are medians of several rounds in which they take turns."""
    num_classes = args.num_classes or 124
    print(f"{args.size[0]}x{args.size[1]}, {num_classes} classes, {args.amp}, {args.device}\n")
    print("| | M params | GFLOPs | ms | FPS | / SegFormer |")
    print("|---|" + "---:|" * 5)
    for variant in args.variants:
        model = MRCFA(variant, num_classes).eval().to(args.device)
        clip = torch.randn(1, len(model.offsets) + 1, 3, *args.size, device=args.device)
        del model.auxiliary_classifiers  # only training needs these
        stream = model.stream()
        for _ in range(max(model.offsets) + 1):  # fill the history
            stream(clip[0, -1])
        works = {"SegFormer": lambda: model.segformer(clip[:, -1])[0],
                 "MRCFA by clips": lambda: model(clip)[0],
                 "MRCFA streaming": lambda: stream(clip[0, -1])}
        times = {name: [] for name in works}
        for name, work in list(works.items()) * ROUNDS:
            timer = Timer("work()", globals=locals(), num_threads=torch.get_num_threads())
            with autocast(args.device, args.amp):
                times[name].append(timer.timeit(1).mean)

        for name, work in works.items():
            parts = model.segformer if name == "SegFormer" else model
            params = sum(p.numel() for p in parts.parameters()) / 1e6
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                work()
            gflops = counter.get_total_flops() / 1e9
            seconds = np.median(times[name])
            ratio = seconds / np.median(times["SegFormer"])
            print(f"| {variant} {name} | {params:.2f} | {gflops:.1f} | {1e3 * seconds:.0f} "
                  f"| {1 / seconds:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    run_script(main)
