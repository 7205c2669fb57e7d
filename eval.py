"""Evaluate on videos: the paper's protocol and metrics, or score masks that any method saved.

    python eval.py --checkpoint runs/mrcfa_b0/best.pt --data DIR --split val --save masks/
    python eval.py --checkpoint mrcfa_b1.pth --model mrcfa_b1 --num-classes 124 --data VSPW    # a released file
    python eval.py --predictions masks/ --data DIR --split val
"""
import argparse
import colorsys
import json
import math
import sys
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data import FRAME_SIZE, IGNORE, DataError, Video, network_input, read_classes, read_frame, read_index_map, read_labels, read_split
from mrcfa import MRCFA, OFFSETS, REFERENCE_STRIDE, load_official
from segformer import MIT_VARIANTS, SegFormer, load_pretrained, load_strictly, read_checkpoint, read_state_dict

WINDOWS = (8, 16)             # n of the video consistencies mVC_n, in frames
CLASSES_AT_ONCE = 8           # of the logits at full size, when decoding a mask
COLUMNS = {"mIoU": "mIoU", "weighted_IoU": "weighted IoU", "mVC8": "mVC8", "mVC16": "mVC16", "pixel_accuracy": "pixel acc."}


# -------------------------------------------------------------------------------------------------------------- metrics

class SegmentationMetrics:
    """IoUs and video consistencies over whole videos of label maps: classes are 0 ... K-1, 255 is ignored."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.confusion = np.zeros((num_classes, num_classes), dtype=np.int64)  # [label, prediction]
        self.consistencies: dict[int, list[float]] = {n: [] for n in WINDOWS}  # one a window, of all videos

    def update(self, labels, predictions):
        """Add one whole video: integer arrays or tensors (frames, H, W). ValueError where they don't fit or a value is no class."""
        labels, predictions = np.asarray(labels), np.asarray(predictions)
        if labels.ndim != 3 or labels.shape != predictions.shape:
            raise ValueError(f"labels {labels.shape} and predictions {predictions.shape} must both be (frames, H, W)")
        k = self.num_classes
        if predictions.size and not 0 <= predictions.min() <= predictions.max() < k:
            raise ValueError(f"predictions {predictions.min()} ... {predictions.max()} outside the classes 0 ... {k - 1}")
        for label, prediction in zip(labels, predictions):
            known = label != IGNORE
            label, prediction = label[known].astype(np.int64), prediction[known].astype(np.int64)
            if label.size and not 0 <= label.min() <= label.max() < k:
                raise ValueError(f"labels {label.min()} ... {label.max()} outside the classes 0 ... {k - 1} and {IGNORE}")
            self.confusion += np.bincount(k * label + prediction, minlength=k * k).reshape(k, k)
        if len(labels) > max(WINDOWS):
            self._add_consistencies(labels, predictions)

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


def table(name: str, metrics: dict[str, float]) -> str:
    """The metrics of one method as two lines, in percent."""
    width = max(len(name), 12)
    return (" " * width + "".join(f"{title:>14}" for title in COLUMNS.values()) + "\n"
            + f"{name:{width}}" + "".join(f"{percent(metrics[key]):>14}" for key in COLUMNS))


def json_metrics(metrics: dict[str, float]) -> dict[str, float | None]:
    """The metrics as JSON can hold them: null instead of NaN."""
    return {key: None if math.isnan(value) else value for key, value in metrics.items()}


# ------------------------------------------------------------------------------------------------------------- protocol

def decode_mask(logits: Tensor, network_size: tuple[int, int], frame_size: tuple[int, int]) -> Tensor:
    """Logits (K, h, w) -> classes (H, W) uint8 at the frame's size: bilinear to the network's input size, from there
    to the frame's, argmax. Sizes are (height, width)."""
    best, mask = None, None
    # Only a few classes at a time are ever at full size, beside the best of those before. Contiguous, because
    # bilinear upsampling of a channels-last map of many classes is slow on CPUs.
    for first in range(0, len(logits), CLASSES_AT_ONCE):
        some = logits[None, first:first + CLASSES_AT_ONCE].contiguous()
        for size in (network_size, frame_size):
            some = F.interpolate(some, size, mode="bilinear") if some.shape[-2:] != size else some
        value, index = some[0].max(0)
        index = (index + first).to(torch.uint8)
        if best is None:
            best, mask = value, index
        else:
            mask = torch.where(value > best, index, mask)
            best = torch.maximum(value, best)
    return mask


def single_frames(model: SegFormer) -> Callable[[Tensor], Tensor]:
    """What `MRCFA.stream` is to MRCFA, for SegFormer, to which every frame stands alone."""
    return torch.no_grad()(lambda frame: model(frame[None])[0])


def segment_video(model: nn.Module, frames: Sequence[Path], frame_size: Sequence[int]) -> Iterator[np.ndarray]:
    """The masks (H, W) uint8 of a video's frames, in order and each at its frame's own size."""
    device = next(model.parameters()).device
    stream = model.stream() if isinstance(model, MRCFA) else single_frames(model)
    for path in frames:
        image = read_frame(path)
        x = network_input(image, frame_size).to(device)
        yield decode_mask(stream(x), x.shape[-2:], (image.height, image.width)).cpu().numpy()


def evaluate(model: nn.Module, videos: list[Video], num_classes: int, frame_size: Sequence[int] = FRAME_SIZE,
             save: Path | None = None) -> SegmentationMetrics:
    """Segment videos by the protocol and compare with their labels; `save` is a folder for the masks."""
    training, metrics = model.training, SegmentationMetrics(num_classes)
    model.eval()
    with tqdm(total=sum(len(video.frames) for video in videos), desc="evaluate", unit="frame", dynamic_ncols=True) as bar:
        for video in videos:
            masks, labels = [], []
            for i, mask in enumerate(segment_video(model, video.frames, frame_size)):
                masks.append(mask)
                labels.append(np.array(read_labels(video.masks[i], mask.shape[::-1], num_classes)))
                if save:
                    save_mask(mask, save / video.name / f"{video.frames[i].stem}.png")
                bar.update()
            update_video(metrics, video, labels, masks)
    model.train(training)
    return metrics


def update_video(metrics: SegmentationMetrics, video: Video, labels: list[np.ndarray], masks: list[np.ndarray]):
    """Add a video to the metrics; a DataError where its frames differ in size."""
    if len({label.shape for label in labels}) > 1:
        raise DataError(f"{video.frames[0].parent}: frames of different sizes; a video has one")
    metrics.update(np.stack(labels), np.stack(masks))


def score(predictions: Path, videos: list[Video], num_classes: int) -> SegmentationMetrics:
    """Compare the masks DIR/<video>/<frame>.png with the labels of the videos."""
    if not predictions.is_dir():
        raise DataError(f"{predictions}: no such folder of predictions")
    metrics = SegmentationMetrics(num_classes)
    for video in tqdm(videos, desc="score", unit="video", dynamic_ncols=True):
        labels, masks = [], []
        for frame, label in zip(video.frames, video.masks):
            with Image.open(frame) as image:  # the header is enough for the size
                size = image.size
            path = predictions / video.name / f"{frame.stem}.png"
            masks.append(np.array(read_index_map(path, size)))
            if masks[-1].max() >= num_classes:
                raise DataError(f"{path}: class {masks[-1].max()}, but there are {num_classes} (0 ... {num_classes - 1})")
            labels.append(np.array(read_labels(label, size, num_classes)))
        update_video(metrics, video, labels, masks)
    return metrics


def palette(size: int = 256) -> list[int]:
    """RGB triples of distinct colours: hues a golden ratio apart, in three brightnesses."""
    colours = (colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.55 + 0.2 * (i % 3), 0.95 - 0.2 * (i // 3 % 3)) for i in range(size))
    return [round(255 * value) for colour in colours for value in colour]


def save_mask(mask: np.ndarray, path: Path):
    """Write classes (H, W) uint8 as a palette PNG."""
    image = Image.fromarray(mask)
    image.putpalette(palette())  # makes it mode P
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# --------------------------------------------------------------------------------------------------------------- models

MODELS = [f"{kind}_{variant}" for kind in ("mrcfa", "segformer") for variant in MIT_VARIANTS]


def build_model(config: dict) -> nn.Module:
    """The model that a checkpoint's `config` describes: model, classes, and for MRCFA reference_stride and offsets."""
    kind, variant = config["model"].split("_")
    if kind == "segformer":
        return SegFormer(variant, len(config["classes"]))
    return MRCFA(variant, len(config["classes"]), config["reference_stride"], offsets=config["offsets"])


def load_model(path: Path, name: str | None = None, num_classes: int | None = None) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, and its config: one of train.py's, or a released file of the given name and class count.

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
    """A model out of a released MRCFA or SegFormer checkpoint, and what would be its config; ValueError if it doesn't fit."""
    state = read_state_dict(checkpoint)
    if name is None or num_classes is None:
        raise ValueError("is not one of train.py's checkpoints; for a released one give --model and --num-classes")
    classifier_bias, values = state.get("decode_head.linear_pred.bias"), state.get("decode_head.sr1_feat.weight")
    if classifier_bias is not None and len(classifier_bias) != num_classes:
        raise ValueError(f"has {len(classifier_bias)} classes, but --num-classes says {num_classes}")
    if name.startswith("mrcfa") != (values is not None):
        raise ValueError(f"is not the {name} that --model asks for, but a {'SegFormer' if values is None else 'MRCFA'}")
    config = {"model": name, "classes": [f"class {i}" for i in range(num_classes)], "offsets": OFFSETS,
              "reference_stride": REFERENCE_STRIDE if values is None else 8 * values.shape[-1], "frame_size": FRAME_SIZE}
    model = build_model(config)
    if isinstance(model, MRCFA):
        load_official(model, state)
    else:
        load_pretrained(model, state)
    return model, config


# --------------------------------------------------------------------------------------------------------- command line

class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr, with exit code 2."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """The type of an argument that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def command_line(main: Callable[[], None]):
    """Run a script's main; a DataError, be it out of a loader's worker process, ends it with one line and exit code 2."""
    try:
        main()
    except DataError as error:
        message = str(error).rsplit("DataError: ", 1)[-1].strip()
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)


def refuse_to_overwrite(path: Path):
    """DataError where a file, or a folder with something in it, is already there."""
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        raise DataError(f"{path}: exists already; give another name, or remove it")


def parse_args() -> argparse.Namespace:
    """The command line of an evaluation."""
    parser = ArgumentParser("Evaluate a checkpoint, or saved masks, on labelled videos.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="train.py's, or a released one together with --model and --num-classes")
    source.add_argument("--predictions", type=Path, help="score the masks DIR/<video>/<frame>.png (pixel = class from 0) of any method")
    parser.add_argument("--model", choices=MODELS, metavar="NAME", help="what a released checkpoint is: mrcfa_b0 ... segformer_b5")
    parser.add_argument("--num-classes", type=positive, help="how many classes a released checkpoint tells apart")
    parser.add_argument("--data", type=Path, required=True, help="data folder with SPLIT.txt and data/<video>/{origin,mask}")
    parser.add_argument("--split", default="val", help="which videos: those that DIR/SPLIT.txt names")
    parser.add_argument("--save", type=Path, help="folder for the predicted masks, palette PNGs")
    parser.add_argument("--json", type=Path, help="file for the metrics")
    parser.add_argument("--per-class", action="store_true", help="print each class's IoU, too")
    parser.add_argument("--dilation", type=positive, nargs="+", metavar="N", help="how many frames back the references lie, other than in training")
    parser.add_argument("--frame-size", type=positive, nargs=2, metavar=("LONG", "SHORT"),
                        help="scale frames to fit this long and short side, other than in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the network runs")
    return parser.parse_args()


def main():
    """Evaluate as the command line says; print and save the metrics."""
    args = parse_args()
    for path in (args.save, args.json):
        if path:
            refuse_to_overwrite(path)
    videos, classes = read_split(args.data, args.split), read_classes(args.data)
    if args.predictions:
        name, metrics = args.predictions.name, score(args.predictions, videos, len(classes))
    else:
        model, config = load_model(args.checkpoint, args.model, args.num_classes)
        if len(config["classes"]) != len(classes):
            raise DataError(f"{args.checkpoint}: tells {len(config['classes'])} classes apart, but {args.data} has {len(classes)}")
        if args.dilation and isinstance(model, MRCFA):
            if len(args.dilation) != len(model.offsets):
                raise DataError(f"--dilation {' '.join(map(str, args.dilation))}: this model takes {len(model.offsets)} references")
            model.offsets = tuple(args.dilation)
        name, frame_size = config["model"], args.frame_size or config["frame_size"]
        metrics = evaluate(model.to(args.device), videos, len(classes), frame_size, args.save)
    result = metrics.compute()
    print(table(name, result))
    if args.per_class:
        print("\n".join(f"{class_name:30} {percent(iou):>6}" for class_name, iou in zip(classes, metrics.class_iou())))
    if args.json:
        args.json.write_text(json.dumps(json_metrics(result), indent=2) + "\n")


if __name__ == "__main__":
    command_line(main)
