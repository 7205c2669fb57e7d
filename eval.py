"""Evaluate on videos: the paper's protocol and metrics, masks, pictures, and what all of it costs.

    python eval.py --checkpoint runs/mrcfa_b0/best.pt --data DIR --split val --save masks/
    python eval.py --checkpoint mrcfa_b1.pth --model mrcfa_b1 --num-classes 124 --data VSPW
    python eval.py --predictions masks/ --data DIR --split val          # masks of any method
    torchrun --nproc_per_node 4 eval.py ...                             # videos shared out
"""
import argparse
import json
import math
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from data import (CITYSCAPES_CLASSES, CITYSCAPES_FRAME_SIZE, FRAME_SIZE, IGNORE, PALETTE,
                  VSPW_CLASSES, WRONG, ArgumentParser, HelpFormatter, Video, check_labels,
                  check_same_classes, coloured, decode_mask, fit, fraction, is_cityscapes,
                  join_processes, list_frames, network_input, positive, progress, rank,
                  read_classes, read_frame, read_frames, read_index_map, read_labels, read_split,
                  refuse_to_overwrite, run_script, say, world_size, write_image, write_whole)
from mrcfa import MRCFA, load_checkpoint, naming, read_weights, reference_indices
from segformer import EMBED_DIM, MIT_VARIANTS, InputError, SegFormer, load_strictly, read_checkpoint

MODELS = [f"{kind}_{variant}" for kind in ("mrcfa", "segformer") for variant in MIT_VARIANTS]
WINDOWS = (8, 16)               # n of the video consistencies mVC_n, in frames
PICTURED_VIDEOS = 3             # of which there are pictures,
PICTURED_FRAMES = 100           # of the first labelled frames of each
PANEL = 200                     # the long side of a picture's panels, in pixels,
LEGEND = 204                    # and the width of its legend's columns
PAPER_FPS = {                   # SegFormer's and MRCFA's
    "b0": (73.4, 50.0),
    "b1": (58.7, 40.1),
    "b2": (39.2, 32.1),
    "b5": (17.2, 15.7),
}
ROUNDS = 5                      # of the benchmark


# ------------------------------------------------------------------------------------- metrics

class SegmentationMetrics:
    """IoUs and temporal consistencies (mVC) over whole videos: classes are 0 ... K-1.

    255 is ignored; as in the protocol, mVC alone treats it as any other label.
    """

    def __init__(self, num_classes: int):
        if num_classes > IGNORE:
            raise InputError(f"{num_classes} classes; there can be up to {IGNORE}")
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)   # [label, mask]
        self.consistencies: dict[int, list[float]] = {n: [] for n in WINDOWS}       # one a window
        self.start_video()

    def update(self, labels, predictions):
        """Add one whole video, integer arrays or tensors (frames, H, W).

        Raises ValueError where shapes or types are wrong, or a value is no class.
        """
        labels = self.as_bytes(labels, "labels")
        predictions = self.as_bytes(predictions, "predictions")
        if labels.shape != predictions.shape:
            raise InputError(f"labels {tuple(labels.shape)} and predictions "
                             f"{tuple(predictions.shape)} must have one shape")
        for label, prediction in zip(labels, predictions, strict=True):
            self.add_frame(label, prediction)
        self.end_video()

    def as_bytes(self, values, name: str) -> np.ndarray:
        """Values of a video as uint8. Only labels can be ignored."""
        values = torch.as_tensor(values).cpu()
        if values.ndim != 3 or values.is_floating_point():
            raise InputError(f"{name} {values.dtype} {tuple(values.shape)} must be integers and "
                             "(frames, H, W)")
        if values.dtype != torch.uint8:
            values = values.long()
        wrong = (values < 0) | (values >= self.num_classes)
        if name == "labels":
            wrong &= values != IGNORE
        if wrong.any():
            low, high = values[wrong].min().item(), values[wrong].max().item()
            raise InputError(f"{name}: {low} ... {high}, but classes are 0 ... "
                             f"{self.num_classes - 1}")
        return values.to(torch.uint8).numpy()

    def start_video(self):
        """Begin a video: nothing of it is known yet."""
        self.label = self.prediction = None                 # of the frame before
        self.label_run = self.prediction_run = None         # for how many frames each pixel has had
                                                            # its value, up to the longest window
        self.windows: dict[int, list[float | None]] = {n: [] for n in WINDOWS}
                                                            # of the one that ends with each frame

    def add_frame(self, label: np.ndarray | None, prediction: np.ndarray | None):
        """Add a video's next frame, two (H, W) uint8. Its label can be None."""
        if label is None:
            self.label = None
            for n in WINDOWS:
                self.windows[n].append(None)
            return
        label, prediction = torch.from_numpy(label), torch.from_numpy(prediction)
        pairs = label.int() * (IGNORE + 1) + prediction
        counts = torch.bincount(pairs.flatten(), minlength=(IGNORE + 1) ** 2)
        counts = counts.view(IGNORE + 1, IGNORE + 1)
        self.confusion += counts[:self.num_classes, :self.num_classes]

        if self.label is None:                              # the first, or after one without label
            self.label_run = torch.zeros_like(label)
            self.prediction_run = torch.zeros_like(label)
        else:
            self.label_run *= label == self.label
            self.prediction_run *= prediction == self.prediction
        self.label_run = (self.label_run + 1).clamp_(max=max(WINDOWS))
        self.prediction_run = (self.prediction_run + 1).clamp_(max=max(WINDOWS))
        self.label, self.prediction = label, prediction
        for n in WINDOWS:
            constant = self.label_run >= n
            pixels = constant.count_nonzero().item()
            consistent = (constant & (self.prediction_run >= n)).count_nonzero().item()
            self.windows[n].append(consistent / pixels if pixels else None)

    def end_video(self):
        """Take over the video's windows. The protocol leaves out short videos, and the window that
        ends with the video."""
        for n, windows in self.windows.items():
            if len(windows) > max(WINDOWS):
                self.consistencies[n] += [window for window in windows[:-1] if window is not None]
        self.start_video()

    def class_iou(self) -> Tensor:
        """IoU of each class (K,), NaN for a class that doesn't occur in the labels."""
        counts = self.confusion.double()
        hits, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        iou = hits / (labelled + predicted - hits)
        return iou.where(labelled > 0, math.nan)

    def compute(self) -> dict[str, float]:
        """mIoU, weighted_IoU, mVC8, mVC16, pixel_accuracy: 0 ... 1, NaN if nothing was measured."""
        iou = self.class_iou()
        share = self.confusion.double() / self.confusion.sum()      # NaN without labels
        values = {"mIoU": iou.nanmean().item(),
                  "weighted_IoU": (iou.nan_to_num() @ share.sum(1)).item()}
        for n, consistencies in self.consistencies.items():
            count = len(consistencies)
            values[f"mVC{n}"] = math.fsum(consistencies) / count if count else math.nan
        values["pixel_accuracy"] = share.trace().item()
        return values

    def gather(self):
        """Add up what all processes of a torch.distributed group have counted."""
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (self.confusion, self.consistencies))
        self.confusion = torch.stack([confusion for confusion, _ in shares]).sum(0)
        self.consistencies = {n: [] for n in WINDOWS}
        for _, consistencies in shares:
            for n in WINDOWS:
                self.consistencies[n] += consistencies[n]


def table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Named rows of shares as text, in percent, with a dash for NaN."""
    first = max([12, *(len(name) for name, _ in rows)])
    width = max([14, *(len(column) for column in columns)])
    lines = [" " * first + "".join(f" {column:>{width}}" for column in columns)]
    for name, values in rows:
        cells = ["-" if math.isnan(value) else f"{100 * value:.2f}" for value in values]
        lines.append(f"{name:{first}}" + "".join(f" {cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def metrics_table(names: Sequence[str], results: Sequence[SegmentationMetrics]) -> str:
    """The metrics of each method, a row each."""
    values = [metrics.compute() for metrics in results]
    rows = [(name, list(row.values())) for name, row in zip(names, values, strict=True)]
    return table(list(values[0]), rows)


def without_nan(values: dict[str, float]) -> dict[str, float | None]:
    """The same for JSON, which has no NaN: None instead."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}


# ---------------------------------------------------------------------------------- evaluation

class Method(NamedTuple):
    """What is evaluated: a name, and a function from a video to a mask (H, W) uint8 a frame."""
    name: str
    predict: Callable[[Video], Iterator[np.ndarray | None]]


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """The context of --amp: bfloat16 where that is exact enough, or nothing special."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def segment_video(video: Video, model: nn.Module, frame_size: Sequence[int],
                  amp: str | None = None) -> Iterator[np.ndarray]:
    """The masks (H, W) uint8 of a video's frames, in order and each at its frame's own size."""
    device = next(model.parameters()).device
    stream = model.stream() if isinstance(model, MRCFA) else None
    for path, image in zip(video.frames, read_frames(video.frames), strict=True):
        x = network_input(image, frame_size).to(device)
        with torch.no_grad(), autocast(device, amp):
            logits = stream(x) if stream else model(x[None])[0]
        if not logits.sum().isfinite():
            raise InputError(f"{path}: the network's answer is not finite; nor are its weights, "
                             "probably")
        mask = decode_mask(logits.float(), x.shape[-2:], image.size[::-1])
        yield mask.cpu().numpy()


def saved_masks(video: Video, folder: Path, num_classes: int) -> Iterator[np.ndarray | None]:
    """The masks DIR/<video>/<frame>.png of a video's labelled frames, and None for the others."""
    frames = read_frames(video.frames)
    for path, label, image in zip(video.frames, video.masks, frames, strict=True):
        if label is None:
            yield None
            continue
        mask_path = folder / video.name / f"{path.stem}.png"
        mask = np.array(read_index_map(mask_path, image.size))
        if mask.max() >= num_classes:
            raise InputError(f"{mask_path}: class {mask.max()}, but there are only "
                             f"0 ... {num_classes - 1}")
        yield mask


def evaluate(methods: Sequence[Method], videos: Sequence[Video], classes: Sequence[str],
             save: Path | None = None, overlay: Path | None = None,
             pictures: Path | None = None) -> list[SegmentationMetrics]:
    """Compare each method's masks with the labels -> metrics for each method.

    Masks go to the folder `save`, and blended with the frames to `overlay`: of all frames, but of
    Cityscapes' clips of the labelled frame alone. Each of several methods has a folder in there.
    The first videos are drawn in `pictures`. In a torch.distributed group the processes share the
    videos, and all get the same metrics.
    """
    metrics = [SegmentationMetrics(len(classes)) for _ in methods]
    longest_first = sorted(range(len(videos)), key=lambda i: -len(videos[i].frames))
    mine = sorted(longest_first[rank()::world_size()])
    frames = sum(len(videos[i].frames) for i in mine)
    with progress(total=frames, desc="evaluate", unit="frame", disable=rank() > 0) as bar:
        for i in mine:
            video = videos[i]
            album = None
            if pictures and i < PICTURED_VIDEOS:
                album = Album(video, [method.name for method in methods], classes)
            predictions = zip(*(method.predict(video) for method in methods), strict=True)
            for t, masks in enumerate(predictions):
                label = None
                if video.masks[t]:
                    size = masks[0].shape[::-1]
                    label = np.array(read_labels(video.masks[t], size, len(classes),
                                                 video.first_label))
                for metric, mask in zip(metrics, masks, strict=True):
                    metric.add_frame(label, mask)
                if album and label is not None:
                    album.add(t, label, masks)
                is_reference = video.offsets and label is None      # in Cityscapes' clips
                for method, mask in zip(methods, masks, strict=True):
                    if mask is None or is_reference:
                        continue
                    folder = Path(video.name)
                    if len(methods) > 1:
                        folder = method.name / folder
                    write_mask(mask, video.frames[t], classes, save and save / folder,
                               overlay and overlay / folder)
                bar.update()
            for metric in metrics:
                metric.end_video()
            if album:
                album.save(pictures / f"{video.name}.webp")
    if dist.is_initialized():
        for metric in metrics:
            metric.gather()
    return metrics


def write_mask(mask: np.ndarray, frame: Path, classes: Sequence[str], save: Path | None,
               overlay: Path | None):
    """Write the mask of a frame into the folder `save`, and over the frame into `overlay`."""
    if save:
        write_image(coloured(mask), save / f"{frame.stem}.png", compress_level=1)
    if overlay:
        write_image(blend(frame, mask, classes), overlay / f"{frame.stem}.jpg", quality=92)


# ---------------------------------------------------------------------------------- checkpoints

def load_model(path: Path, args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """A checkpoint's model, ready to run as the command line says, and its config."""
    if "config" in read_checkpoint(path):
        model, config = load_checkpoint(path)
    elif args.model and args.num_classes:
        model, config = load_released(path, args.model, args.num_classes)
    else:
        raise InputError(f"{path}: is not train.py's; for a released checkpoint give --model and "
                         "--num-classes")
    if isinstance(model, MRCFA):
        model.offsets = tuple(args.dilation or model.offsets)
        model.keep_ratio = args.keep_ratio or model.keep_ratio
        config["offsets"] = model.offsets
    else:
        config.pop("offsets", None)
    if args.frame_size:
        config["frame_size"] = args.frame_size
    return model.eval().to(args.device), config


def load_released(path: Path, name: str, num_classes: int) -> tuple[nn.Module, dict]:
    """A released MRCFA or SegFormer, or the bare weights of one of ours, and a config for it."""
    kind, variant = name.split("_")
    try:
        state = read_weights(path)
        if kind == "mrcfa":
            kernel = state["value.weight"].shape[-1] if "value.weight" in state else 4
            model = MRCFA(variant, num_classes, reference_stride=8 * kernel)
        else:
            embed_dim = len(state.get("head.fuse.weight", ())) or EMBED_DIM
            model = SegFormer(variant, num_classes, embed_dim)
        load_strictly(model, state)
    except InputError as error:
        raise naming(path, error) from None
    unnamed = [f"class {k}" for k in range(num_classes)]
    classes = {124: VSPW_CLASSES, 19: CITYSCAPES_CLASSES}.get(num_classes, unnamed)
    frame_size = CITYSCAPES_FRAME_SIZE if num_classes == 19 else FRAME_SIZE
    return model, {"model": name, "classes": classes, "frame_size": frame_size}


# --------------------------------------------------------------------------------- command line

def parse_args() -> argparse.Namespace:
    """The command line of an evaluation."""
    parser = ArgumentParser(
        description="Evaluate checkpoints or saved masks, segment a folder of frames, or measure "
                    "the speed.", formatter_class=HelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--checkpoint", type=Path, nargs="+", metavar="FILE",
                       help="train.py's or a released one; or several")
    group.add_argument("--predictions", type=Path, nargs="+", metavar="DIR",
                       help="score the masks DIR/<video>/<frame>.png, pixel = class from 0; or "
                            "several folders")
    group.add_argument("--benchmark", action="store_true",
                       help="measure parameters, operations and time of --variants")

    group = parser.add_argument_group("files")
    group.add_argument("--data", type=Path, metavar="DIR",
                       help="data folder with SPLIT.txt and data/<video>/{origin,mask}")
    group.add_argument("--split", default="val", metavar="NAME",
                       help="evaluate the videos that DIR/NAME.txt lists")
    group.add_argument("--labels", choices=("dense", "sparse"),
                       help="sparse: frames may lack masks, if not as in training or dense")
    group.add_argument("--first-label", type=int, choices=(0, 1),
                       help="value of the first class in label maps, if not as in training or 1")
    group.add_argument("--frames", type=Path, metavar="DIR",
                       help="instead of --data a folder of frames without labels, for --save and "
                            "--overlay")
    group.add_argument("--save", type=Path, metavar="DIR",
                       help="new folder for the predicted masks, palette PNGs")
    group.add_argument("--overlay", type=Path, metavar="DIR",
                       help="new folder for the masks over their frames, with a legend")
    group.add_argument("--pictures", type=Path, metavar="DIR",
                       help=f"new folder for moving pictures of the first {PICTURED_VIDEOS} videos")
    group.add_argument("--explain", nargs=4, metavar=("VIDEO", "FRAME", "X", "Y"),
                       help="draw what one pixel of a frame of --data, counted from 0, finds in "
                            "its references, into --pictures")
    group.add_argument("--json", type=Path, metavar="FILE", help="new file for the metrics")
    group.add_argument("--per-class", action="store_true", help="print each class's IoU, too")
    group.add_argument("--single-frames", action="store_true",
                       help="evaluate an MRCFA's single frames (its SegFormer), too: a row that "
                            "shows what the references add")

    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=MODELS, metavar="NAME",
                       help="model in a released checkpoint: mrcfa_b0 ... segformer_b5")
    group.add_argument("--num-classes", type=positive, metavar="K",
                       help="number of classes in a released checkpoint, or in the benchmark (124)")
    group.add_argument("--dilation", type=positive, nargs="+", metavar="N",
                       help="frames back to the references, if not as in training")
    group.add_argument("--keep-ratio", type=fraction, metavar="P",
                       help="share of tokens that STM keeps, if not as in training; 1 keeps all")
    group.add_argument("--frame-size", type=positive, nargs=2, metavar=("LONG", "SHORT"),
                       help="scale frames to fit this, if not as in training")
    add_device_arguments(parser)

    group = parser.add_argument_group("benchmark")
    group.add_argument("--variants", nargs="+", choices=MIT_VARIANTS, default=list(PAPER_FPS),
                       metavar="NAME", help="encoder variants to measure")
    group.add_argument("--size", type=positive, nargs=2, default=(480, 864), metavar=("H", "W"),
                       help="size of the benchmark's frames")
    args = parser.parse_args()
    check_arguments(parser, args)
    args.device = torch.device(args.device)
    return args


def add_device_arguments(parser: argparse.ArgumentParser):
    """What train.py takes as well."""
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.insert(0, "mps")
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=devices, default=devices[0],
                       help="where the network runs")
    group.add_argument("--amp", choices=["bf16"],
                       help="mixed precision: faster, a little less exact")


def check_arguments(parser: ArgumentParser, args: argparse.Namespace):
    """End the script where arguments don't go together."""
    if not args.benchmark and not args.data and not (args.checkpoint and args.frames):
        parser.error("--data DIR is missing, or --frames DIR to segment with --checkpoint FILE")
    if args.frames and (args.json or args.pictures or not (args.save or args.overlay)):
        parser.error("--frames have no labels: they need --save DIR for the masks or "
                     "--overlay DIR, and nothing else")
    if args.explain:
        one = args.checkpoint and len(args.checkpoint) == 1 and args.pictures and args.data
        if not one or args.save or args.overlay or args.json:
            parser.error("--explain needs one --checkpoint FILE, --data DIR and --pictures DIR, "
                         "and nothing else")


def main():
    """Do what the command line says; as one of several processes, if torchrun started this one."""
    args = parse_args()
    if args.benchmark:
        benchmark(args)
    elif args.explain:
        explain_pixel(args)
    else:
        join_processes(args)
        run(args)


def run(args: argparse.Namespace):
    """Evaluate checkpoints or masks, or segment a folder of frames."""
    for path in (args.save, args.json, args.overlay, args.pictures):
        if path:
            refuse_to_overwrite(path)
    if dist.is_initialized():
        dist.barrier()                      # until all have seen that there is nothing
    methods, configs = prepare_methods(args)
    if args.frames:
        frames = list_frames(args.frames)
        video = Video("", frames, [None] * len(frames))
        for method, config in zip(methods, configs, strict=True):
            folder = method.name if len(methods) > 1 else ""
            evaluate([method], [video], config["classes"], args.save and args.save / folder,
                     args.overlay and args.overlay / folder)
        places = " and ".join(str(path) for path in (args.save, args.overlay) if path)
        if rank() == 0:
            print(f"the frames' predicted masks are in {places}")
        return

    classes = configs[0]["classes"]
    references = {config["offsets"] for config in configs if "offsets" in config}
    if len(references) > 1 and is_cityscapes(args.data):
        raise InputError(f"{args.data}: Cityscapes' clips are made for one model's references; "
                         "give one --dilation for all")
    first_label = args.first_label
    if first_label is None:
        first_label = configs[0].get("first_label", 1)
    labels = args.labels or configs[0].get("labels")
    videos = read_split(args.data, args.split, max(references, default=()), labels == "sparse",
                        first_label)
    check_labels(videos, classes, args.split)
    results = evaluate(methods, videos, classes, args.save, args.overlay, args.pictures)
    if rank() > 0:
        return
    names = [method.name for method in methods]
    values = [without_nan(metrics.compute()) for metrics in results]
    content = dict(zip(names, values, strict=True)) if len(names) > 1 else values[0]
    try:
        if args.json:
            write_whole(args.json, (json.dumps(content, indent=2) + "\n").encode())
    finally:                                # shown even where it can't be written
        print(metrics_table(names, results))
    if args.per_class:
        ious = torch.stack([metrics.class_iou() for metrics in results], dim=1)
        print(table(names, list(zip(classes, ious.tolist(), strict=True))))


def prepare_methods(args: argparse.Namespace) -> tuple[list[Method], list[dict]]:
    """The methods that the command line names, and for each a dict with its "classes" and more."""
    if args.predictions:
        classes = read_classes(args.data, default=VSPW_CLASSES)
        methods = []
        for folder in args.predictions:
            predict = partial(saved_masks, folder=folder, num_classes=len(classes))
            name = folder.absolute().name
            methods.append(Method(free_name(name, methods), predict))
        return methods, [{"classes": classes}] * len(methods)

    methods, configs = [], []
    for path in args.checkpoint:
        model, config = load_model(path, args)
        if args.data:
            classes = read_classes(args.data, default=config["classes"])
            check_same_classes(config["classes"], classes, path, args.data)
            config["classes"] = classes
        options = {"frame_size": config["frame_size"], "amp": args.amp}
        name = free_name(config["model"], methods)
        if name != config["model"]:
            say(f"{name} is {path}")
        methods.append(Method(name, partial(segment_video, model=model, **options)))
        configs.append(config)
        if isinstance(model, MRCFA) and args.single_frames:
            predict = partial(segment_video, model=model.segformer, **options)
            methods.append(Method(f"{name}_single_frames", predict))
            configs.append(config)
    return methods, configs


def free_name(name: str, methods: Sequence[Method]) -> str:
    """The name, or, if one of the methods has it, the name with a number."""
    taken = {method.name for method in methods}
    numbered = (f"{name}_{number}" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in taken)


# ------------------------------------------------------------------------------------- pictures

def blend(frame: Path, mask: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """A mask over its frame, with the names of its classes. A background keeps its colours."""
    original = read_frame(frame)
    image = Image.blend(original, coloured(mask).convert("RGB"), 0.5)
    if "background" in classes:
        image.paste(original, mask=Image.fromarray(mask == classes.index("background")))
    areas = np.bincount(mask.ravel(), minlength=IGNORE + 1)
    draw_legend(image, areas, classes, font_size=max(10, image.height // 30))
    return image


def draw_legend(image: Image.Image, areas: np.ndarray, classes: Sequence[str], font_size: int = 10):
    """Write the names of the classes with an area (256,) on their colours into an image, the
    largest first, in columns from its upper left corner."""
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(font_size)
    row = font_size + 6
    left, top, widest = 2, 2, 0
    for k in np.argsort(-areas, kind="stable"):
        if not areas[k] or k >= len(classes):
            continue
        if top + row > image.height and top > 2:            # the next column
            left, top, widest = left + widest + 2, 2, 0
        red, green, blue = PALETTE[3 * k:3 * k + 3]
        is_dark = 3 * red + 6 * green + blue < 1000
        width = round(font.getlength(classes[k])) + 8
        draw.rectangle((left, top, left + width, top + row - 1), (red, green, blue))
        draw.text((left + 4, top + 2), classes[k], "white" if is_dark else "black", font)
        top, widest = top + row, max(widest, width)


def panel(image: Image.Image, title: str) -> Image.Image:
    """An image at the size that all have in a picture, with its title above."""
    size = fit(image.size, (PANEL, PANEL))
    image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    framed = ImageOps.expand(image, (2, 20, 2, 2), "white")
    ImageDraw.Draw(framed).text((4, 4), title, "black", ImageFont.load_default(11))
    return framed


def tile(rows: Iterable[Sequence[Image.Image]]) -> Image.Image:
    """Images side by side, row by row: those of a row have one height, all rows one width."""
    stacked = [np.hstack([np.asarray(image) for image in row]) for row in rows]
    return Image.fromarray(np.vstack(stacked))


class Album:
    """A moving picture of a video's frames, labels and masks by method, wrong pixels hatched."""

    def __init__(self, video: Video, names: Sequence[str], classes: Sequence[str]):
        self.video = video
        self.names = names
        self.classes = classes
        self.areas = np.zeros(IGNORE + 1, dtype=np.int64)
        self.rows: list[list[Image.Image]] = []             # panels of a frame each

    def add(self, t: int, label: np.ndarray, masks: Sequence[np.ndarray]):
        """Draw the panels of frame t, unless there are enough."""
        if len(self.rows) == PICTURED_FRAMES:
            return
        y, x = np.indices(label.shape)
        stripes = (x + y) % max(2, len(label) // 16) < max(1, len(label) // 64)
        row = [panel(read_frame(self.video.frames[t]), f"{self.video.name}, frame {t}"),
               panel(coloured(label), "label")]
        for name, mask in zip(self.names, masks, strict=True):
            wrong = (label != IGNORE) & (mask != label)
            hatched = np.where(wrong & stripes, np.uint8(WRONG), mask)
            row.append(panel(coloured(hatched), f"{name}, errors hatched"))
        for values in (label, *masks):
            self.areas += np.bincount(values.ravel(), minlength=IGNORE + 1)
        self.rows.append(row)

    def save(self, path: Path):
        """Write the picture, with the names of all classes on their colours beside the panels."""
        if not self.rows:
            return
        height = self.rows[0][0].height
        present = np.count_nonzero(self.areas[:len(self.classes)])
        columns = math.ceil(present / (height // 16))       # a name has 16 pixels
        legend = Image.new("RGB", (max(1, columns) * LEGEND, height), "white")
        draw_legend(legend, self.areas, self.classes)
        first, *others = [tile([[*row, legend]]) for row in self.rows]
        write_image(first, path, save_all=True, append_images=others, duration=150, loop=0)


# ---------------------------------------------------------------------------- one pixel explained

def explain_pixel(args: argparse.Namespace):
    """Draw what --explain asks for."""
    model, config = load_model(args.checkpoint[0], args)
    if not isinstance(model, MRCFA):
        raise InputError(f"--explain: {args.checkpoint[0]} is a {config['model']}, which has no "
                         "references")
    video = args.explain[0]
    t, x, y = (int(number) if number.isdecimal() else -1 for number in args.explain[1:])
    frames = list_frames(args.data / "data" / video / "origin")
    width, height = read_frame(frames[0]).size
    first = len(model.offsets)
    if not (first <= t < len(frames) and 0 <= x < width and 0 <= y < height):
        raise InputError(f"--explain {' '.join(args.explain)}: give a frame from {first} to "
                         f"{len(frames) - 1}, and a place in its {width}x{height} pixels")
    path = args.pictures / f"{video.replace('/', '_')}_{t}_{x}_{y}.png"
    refuse_to_overwrite(path)
    chosen = [frames[i] for i in (*reference_indices(t, model.offsets), t)]
    write_image(explain(model, chosen, config["frame_size"], (x, y)), path)
    print(f"{path} shows what frame {t} finds at ({x}, {y})")


@torch.no_grad()
def explain(model: MRCFA, frames: Sequence[Path], frame_size: Sequence[int],
            place: tuple[int, int]) -> Image.Image:
    """What one pixel (x, y) of the target, the last frame, finds in its references: a column each.

    Downwards: the tokens that STM keeps, the pixel's affinities A^l to them, these after SAR and
    after MAA, and the weights B with which their values are read. The last column is what SAR and
    MAA see: the affinities of one token, the one of the nearest reference that is read most, to all
    positions of the target. Every map has a scale of its own, which stands over it.
    """
    images = list(read_frames(frames))
    device = next(model.parameters()).device
    encoded = [model.encode(network_input(image, frame_size)[None].to(device)) for image in images]
    queries = model.queries(encoded[-1][0])
    target = images[-1]
    x, y = (place[0] + 0.5) / target.width, (place[1] + 0.5) / target.height
    columns = []
    for path, image, (features, fused) in zip(frames[:-1], images[:-1], encoded[:-1], strict=True):
        h, w = (4 * side // model.reference_stride for side in fused.shape[-2:])    # of tokens
        reference = model.keys_and_values(features, model.at_stride_8(fused))
        kept, steps = reading_steps(model, queries, reference)
        found = pixel_maps(steps, kept, (x, y), (h, w))
        shown = dimmed(image, found["B: weights"])
        column = [panel(ringed(target, x, y), "target and its pixel"),
                  panel(shown, f"reference {path.stem}: STM drops dark")]
        column += [heat_panel(values, image, name) for name, values in found.items()]
        columns.append(column)
        nearest = image, kept, steps                # in the end, of the last reference

    # The token of the nearest reference that the pixel reads most.
    image, kept, steps = nearest
    B = steps["B: weights"]                                             # (m, h_2, w_2)
    token = int(B[:, int(y * B.shape[1]), int(x * B.shape[2])].argmax())
    top, left = divmod(int(kept[token]), w)
    its_place = (left + 0.5) / w, (top + 0.5) / h
    column = [panel(target, "target, as it looks to"),
              panel(ringed(image, *its_place), "the token that is read most")]
    column += [heat_panel(maps[token], target, name) for name, maps in steps.items()]
    columns.append(column)
    return tile(zip(*columns, strict=True))


def reading_steps(model: MRCFA, queries: Sequence[Tensor], reference) -> tuple[Tensor, dict]:
    """`MRCFA.reconstruct` step by step -> the kept tokens (m,), each step's maps (m, h_l, w_l)."""
    kept, A2, A3, A4 = model.affinities(queries, reference)
    stacks = model.aggregation
    M2 = stacks(A2, A3, A4)
    steps = {"A4 (target stride 32)": A4, "A3 (target stride 16)": A3, "A2 (target stride 8)": A2,
             "SAR: G4(A4)": stacks.g4(A4), "SAR: G3(A3)": stacks.g3(A3),
             "SAR: G2(A2)": stacks.g2(A2),
             "MAA: M2": M2, "B: weights": M2.softmax(1)}
    m = kept.shape[1]
    for name, maps in steps.items():
        channels = maps[0].unflatten(0, (m, -1))        # b1 has two a token
        steps[name] = channels.mean(1).cpu()
    return kept[0].cpu(), steps


def pixel_maps(steps: dict[str, Tensor], kept: Tensor, place: tuple[float, float],
               grid: tuple[int, int]) -> dict[str, Tensor]:
    """What the pixel at (x, y), 0 ... 1, has at each token of the grid, NaN where it's dropped."""
    found = {}
    for name, maps in steps.items():
        column, row = int(place[0] * maps.shape[2]), int(place[1] * maps.shape[1])
        tokens = torch.full((grid[0] * grid[1],), math.nan)
        tokens[kept] = maps[:, row, column].float()
        found[name] = tokens.view(grid)
    return found


def ringed(image: Image.Image, x: float, y: float) -> Image.Image:
    """A copy of an image with a ring round the place (x, y), each 0 ... 1."""
    image = image.copy()
    radius = max(3, image.height // 24)
    x, y = x * image.width, y * image.height
    box = x - radius, y - radius, x + radius, y + radius
    ImageDraw.Draw(image).ellipse(box, outline="red", width=radius // 3 + 1)
    return image


def dimmed(image: Image.Image, values: Tensor) -> Image.Image:
    """An image that is dark where the values over it are NaN."""
    dropped = Image.fromarray(values.isnan().numpy()).resize(image.size)
    return Image.composite(image.point(lambda v: v // 4), image, dropped)


def heat_panel(values: Tensor, over: Image.Image, title: str) -> Image.Image:
    """Numbers (h, w) as colours over an image, the lowest blue and the highest red; NaN is dark.
    The title gets both."""
    known = values[~values.isnan()]
    low, high = known.min(), known.max()
    share = (values - low) / (high - low).clamp(min=1e-12)
    colours = torch.stack([share, 1 - 2 * (share - 0.5).abs(), 1 - share], dim=-1).nan_to_num(0.2)
    image = Image.fromarray((255 * colours).round().byte().numpy())
    image = Image.blend(over, image.resize(over.size, Image.Resampling.NEAREST), 0.6)
    return panel(image, f"{title}   {low:.3g} ... {high:.3g}")


# ------------------------------------------------------------------------------------ benchmark

@torch.no_grad()
def benchmark(args: argparse.Namespace):
    """Print what SegFormer, MRCFA by clips and MRCFA streaming cost with random weights, as a
    Markdown table. Times are medians of several rounds in which the methods take turns."""
    num_classes = args.num_classes or 124
    hardware = str(args.device)
    if args.device.type == "cuda":
        hardware = torch.cuda.get_device_name(args.device)
    elif args.device.type == "cpu":
        hardware = f"{torch.get_num_threads()} CPU threads"
    print(f"{args.size[0]}x{args.size[1]}, {num_classes} classes, {args.amp or 'float32'}"
          f", {hardware}\n")
    print("| | M params | GFLOPs | ms | FPS | / SegFormer | paper's |")
    print("|---|" + "---:|" * 6)
    for variant in args.variants:
        model = MRCFA(variant, num_classes).eval().to(args.device)
        for row in benchmark_variant(variant, model, args):
            print(row, flush=True)


def benchmark_variant(variant: str, model: MRCFA, args: argparse.Namespace) -> list[str]:
    """The benchmark's three rows of one variant."""
    device, size = args.device, tuple(args.size)
    clip = torch.randn(1, len(model.offsets) + 1, 3, *size, device=device)
    frame = clip[0, -1]
    stream = model.stream()
    for _ in range(max(model.offsets) + 1):                 # fill the history
        stream(frame)
    works = {"SegFormer": lambda: model.segformer(clip[:, -1])[0],
             "MRCFA by clips": lambda: model(clip)[0],
             "MRCFA streaming": lambda: stream(frame)}
    gflops = {name: count_gflops(work) for name, work in works.items()}
    times = {name: [] for name in works}
    with autocast(device, args.amp):
        for _ in range(ROUNDS):
            for name, work in works.items():
                timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
                times[name].append(timer.timeit(1).mean)

    rows = []
    for name in works:
        time_a_frame = float(np.median(times[name]))
        ratio = time_a_frame / float(np.median(times["SegFormer"]))
        paper = ""
        if name == "MRCFA streaming" and variant in PAPER_FPS:
            paper = f"{PAPER_FPS[variant][0] / PAPER_FPS[variant][1]:.2f}"
        parts = model.segformer if name == "SegFormer" else model
        params = sum(p.numel() for p in parts.parameters())
        if parts is model:                                  # inference leaves these out
            params -= sum(p.numel() for p in model.auxiliary_classifiers.parameters())
        rows.append(f"| {variant} {name} | {params / 1e6:.2f} | {gflops[name]:.1f} | "
                    f"{1e3 * time_a_frame:.0f} | {1 / time_a_frame:.2f} | {ratio:.2f} | {paper} |")
    return rows


def count_gflops(work: Callable[[], object]) -> float:
    """Floating-point operations of some work, in 1e9; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # plain products
        work()
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    run_script(main)
