"""Videos with labels: the layouts on disk, the way into and out of the network, random clips for
training, and a small data set of synthetic videos.

The VSPW layout, also for your own videos:

    DIR/train.txt, val.txt          one video name a line
    DIR/classes.txt                 one class name a line (VSPW itself does without)
    DIR/data/<video>/origin/*.jpg   frames, ordered by the numbers in their names (.png is fine)
    DIR/data/<video>/mask/*.png     label maps: 0 or 255 = ignored, 1 ... K = classes 0 ... K-1

Cityscapes' official folders, in which one frame of 30 is labelled:

    DIR/leftImg8bit_sequence/<split>/<city>/<city>_<sequence>_<frame>_leftImg8bit.png
    DIR/gtFine/<split>/<city>/<city>_<sequence>_<frame>_gtFine_labelIds.png (or labelTrainIds)

What you can put right yourself (a missing file, a label that doesn't exist) is an InputError or an
OSError, with one line that names the file.
"""
import argparse
import codecs
import contextlib
import io
import math
import os
import re
import signal
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from segformer import STRIDE, InputError, bilinear_matrix, row_bands

IGNORE = 255
MAX_CLASSES = 254                   # a label map of 8 bits holds these, 0 and 255
MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]   # of ImageNet's RGB, 0 ... 255
STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
FRAME_SIZE = (853, 480)             # VSPW's long and short side: frames are scaled to fit
CITYSCAPES_FRAME_SIZE = (1024, 512)
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CROP_TRIES = 10                     # for a crop whose target has two classes and none that covers
MAX_CLASS_SHARE = 0.75              # more than this share of its labelled pixels
BRIGHTNESS = 32                     # photometric distortion: +- grey levels of 255,
CONTRAST = (0.5, 1.5)               # factors,
SATURATION = (0.5, 1.5)
HUE = 18 / 180                      # and a share of the colour circle
CHECKED_MASKS = 200                 # that a run looks into before it begins
SPARSE_SHARE = 0.25                 # of pixels to interpolate, up to which one by one is faster

VSPW_CLASSES = """
wall ceiling door stair ladder escalator playground_slide handrail_or_fence window rail goal
pillar pole floor ground grass sand athletic_field road path crosswalk building house bridge tower
windmill well_or_well_lid other_construction sky mountain stone wood ice snowfield grandstand sea
river lake waterfall water billboard_or_bulletin_board sculpture pipeline flag parasol_or_umbrella
cushion_or_carpet tent roadblock car bus truck bicycle motorcycle wheeled_machine ship_or_boat
raft airplane tyre traffic_light lamp person cat dog horse cattle other_animal tree flower
other_plant toy ball_net backboard skateboard bat ball cupboard_or_showcase_or_storage_rack box
traveling_case_or_trolley_case basket bag_or_package trash_can cage plate tub_or_bowl_or_pot
bottle_or_cup barrel fishbowl bed pillow table_or_desk chair_or_seat bench sofa shelf bathtub gun
commode roaster other_machine refrigerator washing_machine microwave_oven fan curtain textiles
clothes painting_or_poster mirror flower_pot_or_vase clock book tool blackboard tissue
screen_or_television computer printer mobile_phone keyboard other_electronic_product fruit food
instrument train
""".split()
CITYSCAPES_CLASSES = """
road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person
rider car truck bus train motorcycle bicycle
""".split()
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


# ----------------------------------------------------------------------------- what is on disk

@dataclass(frozen=True)
class Video:
    """One video: its frames in order, and for each its label map, or None where it has none."""
    name: str
    frames: Sequence[Path]
    masks: Sequence[Path | None]
    offsets: tuple[int, ...] = ()   # of the references in `frames`, if the training doesn't say


def read_lines(path: Path) -> list[str]:
    """The non-blank lines of a text file, stripped. UTF-8, or UTF-16 as Windows tools write it."""
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{path}: is not UTF-8 text; save it as UTF-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def is_cityscapes(root: Path) -> bool:
    """Whether a data folder is in Cityscapes' layout."""
    return (root / "gtFine").is_dir()


def read_classes(root: Path, default: Sequence[str] = ()) -> list[str]:
    """The class names of a data folder, in label order; `default` where there is no classes.txt."""
    if not root.is_dir():
        raise InputError(f"{root}: no such data folder; give the one that holds train.txt, val.txt "
                         "and data/")
    if is_cityscapes(root):
        return CITYSCAPES_CLASSES
    path = root / "classes.txt"
    if not path.exists():
        if not default:
            raise InputError(f"{path}: no such file; list the class names in it, one a line, "
                             "label 1 first (only VSPW does without: --dataset vspw)")
        return list(default)
    classes = read_lines(path)
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise InputError(f"{path}: {len(classes)} classes; a label map can hold 1 to {MAX_CLASSES}")
    return classes


def check_same_classes(theirs: Sequence[str], ours: Sequence[str], who: Path, root: Path):
    """InputError where the classes of `who`, a checkpoint, are not those of the data in `root`.

    Other names for the same number of classes are said on stderr, unless names changed places.
    """
    if len(theirs) != len(ours):
        raise InputError(f"{who}: has {len(theirs)} classes, but {root} has {len(ours)}")
    differences = []
    for k, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if their == our:
            continue
        differences.append(f"class {k} is {their!r} in {who}, but {our!r} in {root}")
        if their in ours or our in theirs:
            raise InputError(f"{differences[-1]}: the order of the classes differs; put "
                             "classes.txt and the masks in one order")
    if differences:
        print(f"warning: {differences[0]} ({len(differences)} names differ)", file=sys.stderr)


def read_split(root: Path, split: str, offsets: Sequence[int] = (),
               sparse: bool = False) -> list[Video]:
    """The videos of a split; of Cityscapes only the frames at `offsets` from the labelled ones.

    Where `sparse`, frames may lack masks, but not all of a video's. Errors name what is missing.
    """
    if is_cityscapes(root):
        return read_cityscapes(root, split, offsets)
    path = root / f"{split}.txt"
    names = read_lines(path)
    if not names:
        raise InputError(f"{path}: names no video")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: names the video {name} twice")
    return [read_video(root / "data" / name, name, path, sparse) for name in names]


def read_video(folder: Path, name: str, split: Path, sparse: bool) -> Video:
    """One video of the VSPW layout, which the file `split` names."""
    frames = list_frames(folder / "origin", f", but {split.name} names this video")
    present = set((folder / "mask").glob("[!.]*.png"))
    masks: list[Path | None] = []
    for frame in frames:
        mask = folder / "mask" / f"{frame.stem}.png"
        masks.append(mask if mask in present else None)
    orphans = sorted(present - set(masks))
    if orphans:
        raise InputError(f"{orphans[0]}: this mask has no frame of its name in {folder / 'origin'} "
                         f"({len(orphans)} of {len(present)} masks have none); copy the frames, or "
                         "rename or remove the masks")
    labelled = len(frames) - masks.count(None)
    if labelled == 0:
        raise InputError(f"{folder / 'mask'}: none of this video's {len(frames)} frames has a mask "
                         f"there; that of {frames[0].name} would be {frames[0].stem}.png")
    if labelled < len(frames) and not sparse:
        first = folder / "mask" / f"{frames[masks.index(None)].stem}.png"
        raise InputError(f"{first}: no such mask ({labelled} of this video's {len(frames)} frames "
                         "are labelled; --labels sparse allows that)")
    return Video(name, frames, masks)


def read_cityscapes(root: Path, split: str, offsets: Sequence[int]) -> list[Video]:
    """Clips of Cityscapes: a labelled frame after the references before it, or those after it, in
    reverse.

    Training gets both, evaluation one. A side on which a reference is missing is left out.
    """
    labels: dict[str, Path] = {}
    folder = root / "gtFine" / split
    for path in sorted(folder.glob("*/*_gtFine_label*Ids.png"), key=number_order):
        labels[path.name.partition("_gtFine")[0]] = path    # of two, labelTrainIds comes last
    if not labels:
        raise InputError(f"{folder}: no <city>/*_gtFine_labelIds.png there")
    sequences = root / "leftImg8bit_sequence" / split
    if not sequences.is_dir():
        raise InputError(f"{sequences}: no such folder; it is in "
                         "leftImg8bit_sequence_trainvaltest.zip")
    videos = []
    for name, label in labels.items():
        city = sequences / label.parent.name
        sequence, _, number = name.rpartition("_")
        sides = []
        for direction in (-1, 1):
            numbers = [int(number) + direction * offset for offset in offsets]
            side = [city / f"{sequence}_{n:06d}_leftImg8bit.png" for n in numbers]
            if all(path.exists() for path in side):
                sides.append(side)
        if not sides:
            sides = [[]]
        for side in sides if split == "train" else sides[:1]:
            frames = [*side, city / f"{name}_leftImg8bit.png"]
            masks = [None] * len(side) + [label]
            videos.append(Video(name, frames, masks, tuple(range(len(offsets), 0, -1))))
    return videos


def number_order(path: Path) -> tuple:
    """A sort key for files: by the numbers in their names, frame_9 before frame_10."""
    parts = re.split(r"(\d+)", path.stem)           # text and numbers in turns
    for i in range(1, len(parts), 2):
        parts[i] = int(parts[i])
    return parts, path.name


def list_frames(folder: Path, why: str = "") -> list[Path]:
    """The frames in a folder, in the order of the numbers in their names."""
    frames = []
    for path in Path(folder).glob("[!.]*"):
        suffix = path.suffix.lower()
        if suffix in FRAME_SUFFIXES:
            frames.append(path)
        elif suffix in Image.registered_extensions():
            raise InputError(f"{path}: frames are {', '.join(FRAME_SUFFIXES)}; convert it, or "
                             "remove it from the folder")
    if not frames:
        raise InputError(f"{folder}: no such folder, or no frames in it "
                         f"({', '.join(FRAME_SUFFIXES)}){why}")
    frames.sort(key=number_order)
    by_stem: dict[str, Path] = {}
    for path in frames:
        twin = by_stem.setdefault(path.stem, path)
        if twin is not path:
            raise InputError(f"{path}: {twin.name} has the same name, so their masks would; remove "
                             "one of the two")
    return frames


# ------------------------------------------------------------------------------------- images

def read_image(path: Path) -> Image.Image:
    """An image file, decoded, and turned as its orientation tag says."""
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:      # each of Pillow's decoders raises its own
        why = getattr(error, "strerror", None) or f"not a readable image ({error}); replace it"
        raise InputError(f"{path}: {why}") from None


def read_frame(path: Path) -> Image.Image:
    """A frame as RGB. InputError where 8 bits a colour can't show what is in the file."""
    image = read_image(path)
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{path}: has more than 8 bits a pixel (mode {image.mode}); convert the "
                         "frames to 8 bits, all with the same scale")
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] < 255:
            raise InputError(f"{path}: has transparent pixels; save frames without transparency")
    return image.convert("RGB")


def read_frames(paths: Iterable[Path]) -> Iterator[Image.Image]:
    """The frames of one video as RGB. InputError where one can't be read or has another size."""
    size = None
    for path in paths:
        image = read_frame(path)
        size = size or image.size
        if image.size != size:
            raise InputError(f"{path}: {image.size}, but other frames of this video are {size} "
                             "(width, height)")
        yield image


def read_index_map(path: Path, size: tuple[int, int]) -> Image.Image:
    """A mask of the given (width, height): a grey PNG's values, or a palette PNG's indices."""
    image = read_image(path)
    with open(path, "rb") as file:
        header = file.read(25)
    if not header.startswith(PNG_SIGNATURE):
        raise InputError(f"{path}: is not a PNG inside; a mask must be one, because other formats "
                         "change values")
    if image.mode.startswith("RGB"):
        raise InputError(f"{path}: is a colour picture in mode {image.mode} ({colours_of(image)}); "
                         "a mask is a grey or palette PNG, in which a pixel's value is its class")
    if image.mode not in ("1", "L", "P") or image.size != size:
        raise InputError(f"{path}: {image.size} in mode {image.mode}; a mask has its frame's size, "
                         f"here {size}, and is an 8-bit single-channel image (mode L or P)")
    values = np.array(image, dtype=np.uint8)        # of a palette image its indices
    bits = header[24]
    if image.mode == "L" and bits < 8:              # Pillow stretches greys to 0 ... 255
        values //= 255 // (2 ** bits - 1)
    return Image.fromarray(values)


def colours_of(image: Image.Image) -> str:
    """Up to ten colours of an image, for an error message."""
    colours = np.unique(np.array(image.convert("RGB")).reshape(-1, 3), axis=0)
    shown = ", ".join(str(tuple(colour)) for colour in colours[:10].tolist())
    if len(colours) <= 10:
        return f"colours {shown}"
    return f"{len(colours)} colours, among them {shown}"


def read_labels(path: Path, size: tuple[int, int], num_classes: int) -> Image.Image:
    """A label map of the given (width, height), with classes 0 ... K-1, and 255 for all ignored."""
    image = read_index_map(path, size)
    if path.name.endswith("_gtFine_labelIds.png"):
        values = CITYSCAPES_IDS
    elif path.name.endswith("_gtFine_labelTrainIds.png"):
        values = range(num_classes)
    else:
        values = range(1, num_classes + 1)
    counts = image.histogram()[:IGNORE]
    highest = max((value for value in range(IGNORE) if counts[value]), default=0)
    if highest > max(values):
        raise InputError(f"{path}: label {highest}, but there are {num_classes} classes, "
                         f"{values[0]} ... {values[-1]}")
    classes = [IGNORE] * 256
    for k, value in enumerate(values):
        classes[value] = k
    return image.point(classes)


def check_labels(videos: Sequence[Video], classes: Sequence[str], split: str):
    """Look into the masks of a split before a long run: all of them, or the first CHECKED_MASKS.

    InputError if one can't be used or no pixel has a class. A line on stderr says what else is odd:
    a single class, masks without any, classes that never occur.
    """
    by_video = [[mask for mask in video.masks if mask] for video in videos]
    first_ones_first = chain(*zip_longest(*by_video))       # the first mask of each video, ...
    masks = [mask for mask in first_ones_first if mask]
    found: set[int] = set()
    empty = []
    for i, mask in enumerate(masks):
        if i >= CHECKED_MASKS and found:
            break
        labels = read_labels(mask, read_image(mask).size, len(classes))
        counts = labels.histogram()[:len(classes)]
        present = {k for k in range(len(classes)) if counts[k]}
        found |= present
        if not present:
            empty.append(mask)
    numbers = f"0 and 255 are ignored, 1 is {classes[0]!r}, and so on"
    if not found:
        raise InputError(f"{masks[0]}: no pixel of this mask or of the {split} split's other "
                         f"{len(masks) - 1} has a class: {numbers}")
    missing = [name for k, name in enumerate(classes) if k not in found]
    if len(found) == 1 and missing:
        only = classes[found.pop()]
        print(f"warning: all labelled pixels of the {split} split are {only!r}: {numbers}",
              file=sys.stderr)
    elif missing and split == "train" and len(masks) <= CHECKED_MASKS:
        print(f"warning: no mask of the {split} split has {', '.join(missing)}: {numbers}",
              file=sys.stderr)
    if empty and len(masks) <= CHECKED_MASKS:
        print(f"warning: {len(empty)} of {len(masks)} masks of the {split} split, {empty[0]} for "
              f"one, have no pixel with a class: {numbers}", file=sys.stderr)


# ------------------------------------------------------------------ into and out of the network

def fit(size: tuple[int, int], long: float, short: float) -> tuple[int, int]:
    """(width, height) scaled so that the long side fits into `long`, the short into `short`."""
    scale = min(long / max(size), short / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def network_input(image: Image.Image, frame_size: Sequence[int] = FRAME_SIZE) -> Tensor:
    """An RGB frame -> (3, H, W) float32, normalised, H and W multiples of 32.

    The frame is fitted into `frame_size` (long, short), then resized up to multiples of 32. Both
    resizes are bilinear as OpenCV does it: half-pixel centres, no antialiasing, rounded.
    """
    width, height = fit(image.size, *frame_size)
    padded = (-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()    # channels-last: fast
    for size in ((height, width), padded):
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bilinear").round_()
    return (x[0] - MEAN).div_(STD)


def decode_mask(logits: Tensor, network_size: Sequence[int], frame_size: Sequence[int]) -> Tensor:
    """Logits (K, h, w) -> classes (H, W) uint8 at the frame's size.

    The protocol's two bilinear resizes, to the network's input size and from there to the frame's,
    then argmax. Sizes are (height, width).
    """
    # Bilinear weights are positive, sum to 1 and are the same for all classes. So where one class
    # is the largest at all positions that a pixel reads from, it is the pixel's class.
    h, w = logits.shape[1:]
    rows, row_weights = positions_read(h, network_size[0], frame_size[0])
    columns, column_weights = positions_read(w, network_size[1], frame_size[1])
    rows, columns = rows.to(logits.device), columns.to(logits.device)
    largest = logits.max(0).indices.to(torch.uint8)                     # (h, w)
    if (largest[:, 1:] != largest[:, :-1]).float().mean() > SPARSE_SHARE:
        return decode_everywhere(logits, network_size, frame_size)
    lowest = highest = largest
    for dim, positions in ((1, columns), (0, rows)):                    # of all that a pixel reads
        lowest = extremum(lowest, positions, dim, torch.minimum)
        highest = extremum(highest, positions, dim, torch.maximum)
    mask = lowest                                                       # (H, W)
    undecided = lowest != highest
    if undecided.count_nonzero() > SPARSE_SHARE * mask.numel():
        return decode_everywhere(logits, network_size, frame_size)

    # Interpolate the logits of all classes at the M pixels that are left, as a weighted sum of the
    # positions that they read from.
    y, x = undecided.nonzero(as_tuple=True)
    weights = row_weights.to(logits)[y][:, :, None] * column_weights.to(logits)[x][:, None]
    positions = rows[y][:, :, None] * w + columns[x][:, None]           # (M, few, few)
    table = logits.flatten(1).T.contiguous()                            # (h w, K)
    interpolated = F.embedding_bag(positions.flatten(1), table, mode="sum",
                                   per_sample_weights=weights.flatten(1))   # (M, K)
    mask[undecided] = interpolated.argmax(1).to(torch.uint8)
    return mask


def resize_matrix(size: int, network_size: int, frame_size: int) -> Tensor:
    """Both resizes of a side as one matrix (frame_size, size)."""
    return bilinear_matrix(network_size, frame_size) @ bilinear_matrix(size, network_size)


@lru_cache(maxsize=16)
def positions_read(size: int, network_size: int, frame_size: int) -> tuple[Tensor, Tensor]:
    """Where the pixels of a side read from after both resizes, and weights: (frame_size, few)."""
    matrix = resize_matrix(size, network_size, frame_size)
    read = matrix > 0
    few = int(read.sum(1).max())
    first = read.int().argmax(1).clamp(max=size - few)
    positions = first[:, None] + torch.arange(few)
    return positions, matrix.gather(1, positions)


def extremum(x: Tensor, positions: Tensor, dim: int, of_two) -> Tensor:
    """The smallest or largest of x along `dim` over each row of `positions` (n, few)."""
    result = x.index_select(dim, positions[:, 0])
    for column in positions.T[1:]:
        result = of_two(result, x.index_select(dim, column))
    return result


def decode_everywhere(logits: Tensor, network_size: Sequence[int],
                      frame_size: Sequence[int]) -> Tensor:
    """`decode_mask` at every pixel, in bands that stay in a CPU's cache."""
    h, w = logits.shape[1:]
    wide = []
    for _, source, matrix in resize_bands(w, network_size[1], frame_size[1], 64):
        wide.append(logits[:, :, source] @ matrix.to(logits).T)
    wide = torch.cat(wide, dim=2)                                       # (K, h, W)
    mask = []
    for _, source, matrix in resize_bands(h, network_size[0], frame_size[0], 16):
        full = matrix.to(logits) @ wide[:, source]                      # (K, 16, W)
        mask.append(full.max(0).indices.to(torch.uint8))
    return torch.cat(mask)


@lru_cache(maxsize=16)
def resize_bands(size: int, network_size: int, frame_size: int, rows: int) -> list[tuple]:
    """`row_bands` of both resizes of a side."""
    return row_bands(resize_matrix(size, network_size, frame_size), rows)


# ----------------------------------------------------------------------------------- training

class ClipDataset(torch.utils.data.Dataset):
    """Random training clips: item i -> (images (T, 3, h, w) float32, labels int64, 255 = ignored).

    Labels are (T, h, w), or (h, w) where the target, the last frame, is the only one that must have
    them. The items never end: len(videos) in a row are an epoch, one clip of each video. Item i
    depends on (seed, i) alone. Videos without a labelled frame that has all its references are left
    out, and counted in `too_short`. InputError where all are.
    """

    def __init__(self, videos: Sequence[Video], num_classes: int, offsets: Sequence[int],
                 crop: Sequence[int], frame_size: Sequence[int] = FRAME_SIZE,
                 scale_range: Sequence[float] = (0.5, 2.0), seed: int = 0):
        self.num_classes = num_classes
        self.offsets = tuple(offsets)
        self.crop = crop                            # height, width
        self.frame_size = frame_size
        self.scale_range = scale_range
        self.seed = seed
        self.videos = []
        self.ways = []                              # of each video, see `both_ways`
        for video in videos:
            ways = self.both_ways(video)
            if any(targets for _, targets in ways):
                self.videos.append(video)
                self.ways.append(ways)
        self.too_short = len(videos) - len(self.videos)
        if not self.videos:
            raise InputError(f"none of the {len(videos)} training videos has a labelled frame with "
                             f"others {max(offsets)} frames before or after it; give smaller "
                             "offsets (--dilation)")

    def both_ways(self, video: Video) -> list[tuple[Video, list[int]]]:
        """A video forwards and backwards, each with its possible targets: labelled, with all
        references."""
        backwards = replace(video, frames=video.frames[::-1], masks=video.masks[::-1])
        first = max(video.offsets or self.offsets)
        ways = []
        for way in (video, backwards):
            targets = [t for t in range(first, len(way.masks)) if way.masks[t]]
            ways.append((way, targets))
        return ways

    def choose(self, index: int) -> tuple[list[Path], list[Path | None], np.random.Generator]:
        """Item i's frames and masks, target last, and the random numbers for its augmentation."""
        epoch, place = divmod(index, len(self.videos))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.videos))
        ways = self.ways[order[place]]
        rng = np.random.default_rng((self.seed, 1, index))
        chosen = rng.integers(max(len(targets) for _, targets in ways))
        first, second = ways
        if rng.random() < 0.5:
            first, second = second, first
        way, targets = first
        if not targets:
            way, targets = second
        target = targets[chosen % len(targets)]
        clip = [target - offset for offset in (*(way.offsets or self.offsets), 0)]
        return [way.frames[t] for t in clip], [way.masks[t] for t in clip], rng

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        paths, masks, rng = self.choose(index)
        if None in masks:
            masks = masks[-1:]
        frames = list(read_frames(paths))
        labels = [read_labels(mask, frames[0].size, self.num_classes) for mask in masks]

        # Scale, crop and flip all frames alike.
        factor = rng.uniform(*self.scale_range)
        long, short = self.frame_size
        scaled_size = fit(frames[0].size, long * factor, short * factor)
        size, box = self.choose_crop(labels[-1], scaled_size, rng)
        flip = rng.random() < 0.5
        frames = [cut(frame, size, box, flip, Image.Resampling.BILINEAR) for frame in frames]
        labels = [cut(label, size, box, flip, Image.Resampling.NEAREST) for label in labels]

        # Distort the colours of each frame on its own, normalise, and pad to the crop's size.
        width, height = size
        images = torch.zeros(len(frames), 3, *self.crop)
        for image, frame in zip(images, frames, strict=True):
            pixels = torch.from_numpy(np.array(photometric_distortion(frame, rng)))
            image[:, :height, :width] = (pixels.permute(2, 0, 1) - MEAN) / STD
        targets = torch.full((len(labels), *self.crop), IGNORE)
        for target, label in zip(targets, labels, strict=True):
            target[:height, :width] = torch.from_numpy(np.array(label))
        return images, targets if len(targets) == len(images) else targets[-1]

    def choose_crop(self, label: Image.Image, size: tuple[int, int], rng: np.random.Generator):
        """A crop of the frame scaled to `size`: its (width, height), and its box in the unscaled
        frame."""
        crop = min(size[0], self.crop[1]), min(size[1], self.crop[0])
        x_scale, y_scale = label.width / size[0], label.height / size[1]
        for _ in range(CROP_TRIES):
            left = rng.integers(size[0] - crop[0] + 1)
            top = rng.integers(size[1] - crop[1] + 1)
            right, bottom = left + crop[0], top + crop[1]
            box = left * x_scale, top * y_scale, right * x_scale, bottom * y_scale
            part = label.resize(crop, Image.Resampling.NEAREST, box)
            counts = part.histogram()[:self.num_classes]
            present = sum(count > 0 for count in counts)
            if present > 1 and max(counts) < MAX_CLASS_SHARE * sum(counts):
                break
        return crop, box


def collate_clips(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch of clips. If some have the target's labels alone, the batch has only the targets'."""
    if any(labels.ndim == 2 for _, labels in items):
        items = [(images, labels if labels.ndim == 2 else labels[-1]) for images, labels in items]
    return default_collate(items)


def cut(image: Image.Image, size: tuple[int, int], box: tuple[float, ...], flip: bool,
        how: Image.Resampling) -> Image.Image:
    """The box of an image, scaled to `size` (nothing outside of it ever is) and flipped."""
    image = image.resize(size, how, box)
    return ImageOps.mirror(image) if flip else image


def photometric_distortion(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue, each with p = 0.5.

    Brightness comes first, contrast second or, as a coin decides, last.
    """
    levels = np.arange(256.0)
    brightness = rng.uniform(-BRIGHTNESS, BRIGHTNESS) if rng.random() < 0.5 else 0
    contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else 1
    contrast_first = rng.random() < 0.5
    saturation = rng.uniform(*SATURATION) if rng.random() < 0.5 else 1
    hue = rng.uniform(-HUE, HUE) if rng.random() < 0.5 else 0

    bright = (levels + brightness).clip(0, 255)
    image = image.point(3 * table_of(bright * (contrast if contrast_first else 1)))
    if saturation != 1 or hue != 0:
        turned = (levels + 256 * hue).round() % 256
        tables = table_of(turned) + table_of(levels * saturation) + table_of(levels)
        image = image.convert("HSV").point(tables).convert("RGB")
    if contrast != 1 and not contrast_first:
        image = image.point(3 * table_of(levels * contrast))
    return image


def table_of(values: np.ndarray) -> list[int]:
    """What the grey levels 0 ... 255 become, as a look-up table for `Image.point`."""
    return values.clip(0, 255).round().astype(int).tolist()


# --------------------------------------------------------------------------- synthetic videos

SYNTHETIC_CLASSES = ["background", "columns", "rows", "diagonals", "checks"]
SYNTHETIC_SIZE = (128, 96)                      # width, height: 8 x 6 reference tokens of stride 16
SYNTHETIC_VIDEOS = {"train": 200, "val": 24}
SYNTHETIC_FRAMES = 20                           # a video
OBJECTS = 3                                     # a video
RADIUS = (18, 28)                               # of an object, in pixels
TEXTURE = 40                                    # contrast of the textures
CHROMA = 45                                     # how far colours are from grey
PERIOD = 8                                      # of the textures, in pixels
MARGIN = 40                                     # of the background around the frame, for panning
CYCLE, BURST = 12, 3                            # of so many frames, this many in a row are bad
BAD_MOMENTS = ("dark", "bright", "noisy", "glare", "shaken")


def write_synthetic(root: Path, seed: int = 0):
    """Make the data set of synthetic videos in the VSPW layout: all of it, or nothing.

    Coloured objects move before a moving background; an object's texture is its class. In bursts of
    three frames the picture is out of focus, and dark, noisy or the like as well: it still shows
    where the objects are and of what colour, but not *what* they are. That can be seen 3, 6 and 9
    frames earlier. So other frames are all that helps, and a method must find the same object in
    them, by its colour.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}", dir=root.parent) as folder:
        made = Path(folder) / root.name
        for number, (split, count) in enumerate(SYNTHETIC_VIDEOS.items()):
            names = [f"{split}_{i:03d}" for i in range(count)]
            for i, name in enumerate(progress(iterable=names, desc=f"making {root}", unit="video")):
                rng = np.random.default_rng((seed, number, i))
                for t, (frame, labels) in enumerate(synthetic_video(rng)):
                    write_image(frame, made / "data" / name / "origin" / f"{t:05d}.jpg", quality=92)
                    write_image(labels, made / "data" / name / "mask" / f"{t:05d}.png")
            write_whole(made / f"{split}.txt", ("\n".join(names) + "\n").encode())
        write_whole(made / "classes.txt", ("\n".join(SYNTHETIC_CLASSES) + "\n").encode())
        if not root.exists():                   # another process may have been faster
            made.rename(root)


def synthetic_video(rng: np.random.Generator) -> Iterator[tuple[Image.Image, Image.Image]]:
    """The frames of one synthetic video and their label maps, 1 ... K."""
    width, height = SYNTHETIC_SIZE
    y, x = np.mgrid[:height, :width].astype(np.float32)

    # Everything is drawn as Y, Cb, Cr: textures, which tell the classes, in Y, colours in Cb, Cr.
    background = np.stack([110 + 30 * smooth_noise(rng, 24),
                           128 + 12 * smooth_noise(rng, 32),
                           128 + 12 * smooth_noise(rng, 32)])
    grain = 25 * smooth_noise(rng, 6)
    pan = rng.uniform(-1.5, 1.5, 2)                             # pixels a frame
    classes = rng.integers(1, len(SYNTHETIC_CLASSES), OBJECTS)
    first_hue = rng.uniform(0, 2 * math.pi)
    hues = first_hue + rng.permutation(OBJECTS) * 2 * math.pi / OBJECTS     # no two alike
    greys = rng.uniform(90, 160, OBJECTS)
    centres = rng.uniform(0.1, 0.9, (OBJECTS, 2)) * (height, width)         # in mid-video
    speeds = rng.uniform(-2.5, 2.5, (OBJECTS, 2))               # pixels a frame
    radii = rng.uniform(*RADIUS, (OBJECTS, 2))
    powers = rng.choice([2, 6], OBJECTS)                        # ellipses and blunt boxes
    turns = rng.uniform(0, math.pi, OBJECTS)
    phase = rng.integers(CYCLE)
    moment = ""

    for t in range(SYNTHETIC_FRAMES):
        bad = (t + phase) % CYCLE < BURST
        if not bad:
            moment = ""
        elif not moment:
            moment = rng.choice(BAD_MOMENTS)
        since = t - SYNTHETIC_FRAMES / 2
        top, left = (MARGIN + pan * since).round().astype(int)
        rows, columns = slice(top, top + height), slice(left, left + width)
        picture = background[:, rows, columns].copy()
        if not bad:
            picture[0] += grain[rows, columns]
        labels = np.ones((height, width), np.uint8)
        for i in range(OBJECTS):
            dy = y - centres[i, 0] - speeds[i, 0] * since
            dx = x - centres[i, 1] - speeds[i, 1] * since
            cos, sin = math.cos(turns[i]), math.sin(turns[i])
            u = (cos * dx + sin * dy) / radii[i, 0]
            v = (cos * dy - sin * dx) / radii[i, 1]
            inside = abs(u) ** powers[i] + abs(v) ** powers[i] < 1
            picture[0][inside] = greys[i]
            if not bad:
                picture[0][inside] += TEXTURE * texture(classes[i], dx, dy)[inside]
            picture[1][inside] = 128 + CHROMA * math.cos(hues[i])
            picture[2][inside] = 128 + CHROMA * math.sin(hues[i])
            labels[inside] = 1 + classes[i]
        if bad:
            spoil(picture, moment, rng)
        planes = [Image.fromarray(plane) for plane in picture.clip(0, 255).astype(np.uint8)]
        yield Image.merge("YCbCr", planes).convert("RGB"), Image.fromarray(labels)


def smooth_noise(rng: np.random.Generator, cell: int) -> np.ndarray:
    """A smooth random texture in -1 ... 1, larger than the frame by the margins."""
    width, height = SYNTHETIC_SIZE[0] + 2 * MARGIN, SYNTHETIC_SIZE[1] + 2 * MARGIN
    grains = rng.uniform(-1, 1, (height // cell, width // cell)).astype(np.float32)
    return np.array(Image.fromarray(grains).resize((width, height), Image.Resampling.BICUBIC))


def texture(k: int, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The texture of class k, about -1 ... 1, at distances from an object's centre."""
    a, b = 2 * math.pi / PERIOD * dx, 2 * math.pi / PERIOD * dy
    name = SYNTHETIC_CLASSES[k]
    if name == "columns":
        return np.sin(a)
    if name == "rows":
        return np.sin(b)
    if name == "diagonals":
        return np.sin(0.7 * (a + b))
    return 1.4 * np.sin(a) * np.sin(b)


def spoil(picture: np.ndarray, moment: str, rng: np.random.Generator):
    """Do to an out-of-focus picture (Y, Cb, Cr) what else happens in a bad moment of that kind."""
    height, width = picture.shape[1:]
    if moment == "dark":
        picture[0] *= 0.5
    elif moment == "bright":
        picture[0] *= 1.4
    elif moment == "noisy":
        picture += rng.normal(0, 15, picture.shape)
    elif moment == "shaken":
        shifted = [np.roll(picture, shift, axis=2) for shift in range(-4, 5)]
        picture[:] = np.mean(shifted, axis=0)
    else:                                       # glare
        y, x = np.ogrid[:height, :width]
        distance = (y - rng.uniform(0, height)) ** 2 + (x - rng.uniform(0, width)) ** 2
        veil = 0.6 * np.exp(-distance / 70 ** 2)
        picture[0] += veil * (245 - picture[0])


# ------------------------------------------------------- files, progress and errors of the scripts

def write_whole(path: Path, content: bytes | memoryview, durable: bool = False):
    """Write a file whole or not at all, if `durable` even in a power cut. OSError with its path."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_image(image: Image.Image, path: Path, **options):
    """Save an image in the format of its suffix, in a folder that need not be there yet."""
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[path.suffix], **options)
    write_whole(path, buffer.getvalue())


def progress(**options) -> tqdm:
    """A progress bar: smooth on a terminal, a line every ten seconds in a file."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(dynamic_ncols=True, mininterval=interval, maxinterval=max(10, interval), **options)


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr, with exit code 2."""

    def error(self, message: str):
        """End the script with the message."""
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """The type of an argument that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def file_path(text: str) -> Path:
    """The type of an argument that is a path; ~ is the home folder, however the shell passes it."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def refuse_to_overwrite(path: Path, instead: str = "give another name"):
    """InputError where there is a file, or a folder with something in it other than half-written
    files, *.tmp."""
    if path.is_file() or path.is_dir() and any(x.suffix != ".tmp" for x in path.iterdir()):
        raise InputError(f"{path}: exists already, and nothing is overwritten; {instead}")


class SafeStream:
    """stdout or stderr that never fails a run: not on a closed pipe, not on a full disk, and not on
    a character that the terminal can't show."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str):
        """Write what can be written."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.attempt(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self):
        """Flush what can be flushed."""
        self.attempt(self.stream.flush)

    def attempt(self, call, *args):
        """Make a call; if that fails, send all that follows to nowhere."""
        try:
            call(*args)
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


def run_script(main: Callable[[], None]):
    """Run a script's main. What a person can put right is one line on stderr, and exit code 2.

    Python's own development mode, `python -X dev train.py`, shows where the line comes from.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, interrupt)
    out, err = SafeStream(sys.stdout), SafeStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except (InputError, OSError, MemoryError, torch.OutOfMemoryError,
                KeyboardInterrupt) as error:
            if sys.flags.dev_mode:
                raise
            print(f"{Path(sys.argv[0]).name}: {in_one_line(error)}", file=sys.stderr)
            sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error) or sys.flags.dev_mode:
                raise
            print(f"{Path(sys.argv[0]).name}: {in_one_line(MemoryError())}", file=sys.stderr)
            sys.exit(2)
        finally:
            out.flush()
            for number, handler in before.items():
                signal.signal(number, handler)


def interrupt(number: int, _):
    """Answer Ctrl-C; the next one ends the process, whatever it does."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def in_one_line(error: BaseException) -> str:
    """What an error says, for a person."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return ("out of memory; smaller frames or a smaller batch need less (--frame-size, --crop, "
                "--batch-size with --accumulate)")
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    # An error in a loader's process arrives with that process's traceback before its last line.
    last = str(error).strip().splitlines()[-1]
    return re.sub(r"^[\w.]*Error: ", "", last)
