"""Videos with labels: layouts on disk, preprocessing and decoding, random clips for training, and
a small data set of synthetic videos.

The VSPW layout, also for your own videos:

    DIR/train.txt, val.txt          one video name per line
    DIR/classes.txt                 one class name per line (optional for VSPW itself)
    DIR/data/<video>/origin/*.jpg   frames, in the order of their numbers (or .png)
    DIR/data/<video>/mask/*.png     label maps: 0 or 255 = ignored, 1 ... K = classes 0 ... K-1
                                    (with first_label = 0: 0 ... K-1, and 255 = ignored)

Cityscapes' official folders, in which one frame of 30 is labelled:

    DIR/leftImg8bit_sequence/<split>/<city>/<city>_<sequence>_<frame>_leftImg8bit.png
    DIR/gtFine/<split>/<city>/<city>_<sequence>_<frame>_gtFine_labelIds.png (or labelTrainIds)
"""
import argparse
import colorsys
import datetime
import http.client
import io
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from segformer import STRIDE, InputError, read_state_dict

IGNORE = 255       # the label of ignored pixels
WRONG = 254        # marks wrong pixels in pictures; not a class
MAX_CLASSES = 254  # values of 8 bits, without 0 and 255: ignored
MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]  # ImageNet's RGB, 0 ... 255
STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
FRAME_SIZE = (853, 480)  # VSPW's long and short side: frames are scaled to fit
CITYSCAPES_FRAME_SIZE = (1024, 512)
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CROP_TRIES = 10          # random crops to try until one passes MAX_CLASS_SHARE
MAX_CLASS_SHARE = 0.75   # largest share of one class in a crop
BRIGHTNESS = 32          # distortion: largest shift, of 255
CONTRAST = (0.5, 1.5)    # distortion: range of the factor
SATURATION = (0.5, 1.5)  # distortion: range of the factor
HUE = 18 / 180           # distortion: largest shift on the colour circle
CHECKED_MASKS = 200      # masks per split that are checked before a run
FREQUENT = 0.05          # label 0 looks like a class if it has this share of the pixels
SPARSE_SHARE = 0.25      # decode single pixels up to this share of them, else the image
LONGEST_WAIT = datetime.timedelta(hours=3)  # for a process that evaluates or downloads
TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # variables that it sets

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


# --------------------------------------------------------------------------- the files on disk

@dataclass(frozen=True)
class Video:
    """One video: its frames in order, and the label map of each frame, or None."""
    name: str
    frames: Sequence[Path]
    masks: Sequence[Path | None]
    offsets: tuple[int, ...] = ()  # of a clip of Cityscapes; empty for other videos
    first_label: int = 1           # the value of class 0 in the label maps


def read_lines(path: Path) -> list[str]:
    """The non-blank lines of a text file, stripped."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def is_cityscapes(root: Path) -> bool:
    """Whether a data folder is in Cityscapes' layout."""
    return (root / "gtFine").is_dir()


def read_classes(root: Path, default: Sequence[str] = ()) -> list[str]:
    """The class names of a data folder, or `default` if there is no classes.txt."""
    if not root.is_dir():
        raise InputError(f"{root}: no such data folder")
    if is_cityscapes(root):
        return CITYSCAPES_CLASSES
    path = root / "classes.txt"
    if default and not path.exists():
        return list(default)
    classes = read_lines(path)
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise InputError(f"{path}: has {len(classes)} class names; give 2 to {MAX_CLASSES}, with "
                         "the background")
    if len(set(classes)) < len(classes):
        raise InputError(f"{path}: names a class twice")
    return classes


def check_same_classes(theirs: Sequence[str], ours: Sequence[str], who: Path, root: Path):
    """Raise InputError unless `who`, a checkpoint, has the classes of the data in `root`. If names
    differ, but none changed places, only warn."""
    if len(theirs) != len(ours):
        raise InputError(f"{who}: has {len(theirs)} classes, but {root} has {len(ours)}")
    differ = [k for k in range(len(ours)) if theirs[k] != ours[k]]
    for k in differ:
        difference = f"class {k} is {theirs[k]!r} in {who}, but {ours[k]!r} in {root}"
        if theirs[k] in ours or ours[k] in theirs:
            raise InputError(f"{difference}: give classes.txt and masks the checkpoint's order")
    if differ:
        say(f"warning: {difference} ({len(differ)} names differ)")


def read_split(root: Path, split: str, offsets: Sequence[int] = (), sparse: bool = False,
               first_label: int = 1, training: bool = False) -> list[Video]:
    """The videos of a split; of Cityscapes only labelled frames and those at `offsets` from them.
    With `sparse`, frames may lack masks."""
    if is_cityscapes(root):
        return read_cityscapes(root, split, offsets, training)
    path = root / f"{split}.txt"
    videos: dict[str, Video] = {}
    for line in read_lines(path):
        name = PurePosixPath(line)
        if name.is_absolute() or ".." in name.parts or not name.parts:
            raise InputError(f"{path}: {line!r} is not the name of a folder in {root / 'data'}")
        name = str(name)  # `v/` is `v`
        if name in videos:
            raise InputError(f"{path}: names the video {name} twice")
        videos[name] = read_video(root / "data" / name, name, sparse, first_label)
    if not videos:
        raise InputError(f"{path}: names no video")
    return list(videos.values())


def read_video(folder: Path, name: str, sparse: bool, first_label: int) -> Video:
    """A video of the VSPW layout. Images in mask/ must be PNGs with a frame's name."""
    frames = list_frames(folder / "origin")
    present = images_in(folder / "mask")
    by_name = {path.stem: path for path in present if path.suffix.lower() == ".png"}
    masks = [by_name.get(frame.stem) for frame in frames]
    orphans = sorted(set(present) - set(masks))
    if orphans:
        raise InputError(f"{orphans[0]}: is not a PNG with the name of a frame in "
                         f"{folder / 'origin'} ({len(orphans)} of {len(present)} masks)")
    labelled = len(frames) - masks.count(None)
    if labelled == 0 or labelled < len(frames) and not sparse:
        missing = folder / "mask" / f"{frames[masks.index(None)].stem}.png"
        raise InputError(f"{missing}: no such mask; {labelled} of this video's {len(frames)} "
                         "frames are labelled (with --labels sparse, one is enough)")
    return Video(name, frames, masks, first_label=first_label)


def read_cityscapes(root: Path, split: str, offsets: Sequence[int], training: bool) -> list[Video]:
    """Clips of Cityscapes: a labelled frame and the references before it, or those after it in
    reverse. Training gets both, evaluation one. A side that lacks a frame is left out."""
    labels: dict[str, Path] = {}
    folder = root / "gtFine" / split
    for path in sorted(folder.glob("*/*_gtFine_label*Ids.png"), key=number_order):
        labels[path.name.partition("_gtFine")[0]] = path  # labelTrainIds come last and win
    if not labels:
        raise InputError(f"{folder}: no <city>/*_gtFine_labelIds.png there")
    sequences = root / "leftImg8bit_sequence" / split
    places = tuple(range(len(offsets), 0, -1))  # of the references in a clip
    videos = []
    for name, label in labels.items():
        city = sequences / label.parent.name
        sequence, _, number = name.rpartition("_")
        clips = []
        for direction in (-1, 1):
            numbers = [int(number) + direction * offset for offset in (*offsets, 0)]
            frames = [city / f"{sequence}_{n:06d}_leftImg8bit.png" for n in numbers]
            if all(path.exists() for path in frames[:-1]):
                masks = [None] * len(offsets) + [label]
                clips.append(Video(name, frames, masks, places, first_label=0))
        if not clips:
            clips = [Video(name, frames[-1:], [label], places, first_label=0)]
        videos += clips if training else clips[:1]
    return videos


def number_order(path: Path, number: str = r"\d+") -> tuple:
    """A sort key: the numbers in a file's name, so that 9 comes before 10."""
    parts = re.split(f"({number})", path.stem)  # text and numbers in turns
    for i in range(1, len(parts), 2):
        parts[i] = float(parts[i])
    return parts, path.name


def images_in(folder: Path) -> list[Path]:
    """The images in a folder, by their suffixes, without hidden files."""
    suffixes = Image.registered_extensions()
    return [path for path in Path(folder).iterdir()
            if path.suffix.lower() in suffixes and not path.name.startswith(".")]


def list_frames(folder: Path) -> list[Path]:
    """The frames in a folder, in the order of the numbers in their names. Raises InputError if
    that is ambiguous (1.05 and 1.1, or two frames of one name), and for other formats."""
    frames = sorted(images_in(folder), key=number_order)
    if not frames:
        raise InputError(f"{folder}: no frames in it ({', '.join(FRAME_SUFFIXES)})")
    names = set()
    for path in frames:
        if path.suffix.lower() not in FRAME_SUFFIXES or path.stem in names:
            raise InputError(f"{path}: frames are .jpg or .png, one for each moment")
        names.add(path.stem)
    if frames != sorted(frames, key=partial(number_order, number=r"\d+(?:\.\d+)?")):
        raise InputError(f"{folder}: the dots in its frames' names may start decimals; number the "
                         "frames without dots")
    return frames


# ------------------------------------------------------------------------------------- images

def read_image(path: Path) -> Image.Image:
    """Decode an image file, and turn it by its orientation tag."""
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # each of Pillow's decoders raises its own
        why = getattr(error, "strerror", None) or f"not a readable image ({error}); replace it"
        raise InputError(f"{path}: {why}") from None


def read_frame(path: Path) -> Image.Image:
    """Read a frame as RGB. Raises InputError if it is grey with more than 8 bits per pixel."""
    image = read_image(path)
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{path}: has more than 8 bits per channel (mode {image.mode}); convert "
                         "all frames to 8 bits, with one scale")
    return image.convert("RGB")


def read_frames(paths: Iterable[Path]) -> Iterator[Image.Image]:
    """Read the frames of one video as RGB. Raises InputError if their sizes differ."""
    size = None
    for path in paths:
        image = read_frame(path)
        size = size or image.size
        if image.size != size:
            raise InputError(f"{path}: {image.size}, but other frames of this video are {size}")
        yield image


def read_index_map(path: Path, size: tuple[int, int]) -> tuple[Image.Image, bool]:
    """Read a mask of the given (width, height): a grey PNG's values, or a palette PNG's indices.

    Editors renumber palettes. So a mask in the colours of `coloured` is read by these. Returns
    the values, and whether they were read by colours: then they count from 0.
    """
    image = read_image(path)
    with open(path, "rb") as file:
        header = file.read(25)
    if not header.startswith(PNG_SIGNATURE):
        raise InputError(f"{path}: is not a PNG inside; other formats change values")
    if image.mode not in ("1", "L", "P") or image.size != size:
        raise InputError(f"{path}: {image.size} in mode {image.mode}; a mask has its frame's size, "
                         f"here {size}, and is a grey or palette PNG of 8 bits")
    if image.mode == "P":
        colours = np.zeros((256, 3), dtype=np.uint8)
        palette = np.array(image.getpalette()).reshape(-1, 3)
        colours[:len(palette)] = palette
        used = np.flatnonzero(image.histogram())
        values = [PALETTE_INDEX.get(tuple(colour)) for colour in colours[used].tolist()]
        ours = [value for value in values if value is not None]
        if min(ours, default=IGNORE) < MAX_CLASSES:  # black and white could be anyone's
            if None in values:
                raise InputError(f"{path}: has colours of predicted masks, and others; paint with "
                                 "their colours only, without soft edges, or save a grey PNG")
            table = np.zeros(256, dtype=np.uint8)
            table[used] = values
            return Image.fromarray(table[np.array(image)]), True
        greys = np.arange(len(palette))[:, None]
        if (palette == palette[:, :1]).all() and (palette != greys).any():
            raise InputError(f"{path}: its palette shows greys that are not the stored values; "
                             "save it as a grey PNG")
    elif header[24] < 8:
        raise InputError(f"{path}: has fewer than 8 bits per pixel, in which some programs store "
                         "255 as 1; save it as a grey PNG of 8 bits")
    return Image.fromarray(np.array(image)), False  # without a palette: indices are values


def read_labels(path: Path, size: tuple[int, int], num_classes: int, first_label: int = 1
                ) -> Image.Image:
    """Read a label map of the given (width, height), in which classes count from `first_label`:
    -> classes 0 ... K-1, and 255 for all ignored."""
    image, is_prediction = read_index_map(path, size)
    if path.name.endswith("_gtFine_labelIds.png"):
        values = CITYSCAPES_IDS
    elif path.name.endswith("_gtFine_labelTrainIds.png"):
        values = range(num_classes)
    else:
        values = range(first_label, first_label + num_classes)
        if first_label and is_prediction:
            raise InputError(f"{path}: has the colours of a predicted mask, which counts from 0, "
                             "not from 1 as label maps here (--first-label 0 reads both)")
    highest = np.flatnonzero(image.histogram()[:IGNORE]).max(initial=0)
    if highest > max(values):
        raise InputError(f"{path}: label {highest}, but there are {num_classes} classes")
    classes = [IGNORE] * 256
    for k, value in enumerate(values):
        classes[value] = k
    return image.point(classes)


def check_labels(videos: Sequence[Video], classes: Sequence[str], split: str):
    """Read up to CHECKED_MASKS masks of a split before a run. Raises InputError if one can't be
    used, or if they leave nothing to learn. Warns if they seem to count from 0, and of classes
    without training pixels."""
    pairs = []
    for video in videos:
        pairs += [pair for pair in zip(video.masks, video.frames, strict=True) if pair[0]]
    checked = pairs[::math.ceil(len(pairs) / CHECKED_MASKS)]
    first_label = videos[0].first_label
    counts = np.zeros(256, dtype=np.int64)
    zeros = 0
    for mask, frame in checked:
        size = read_image(frame).size
        counts += read_labels(mask, size, len(classes), first_label).histogram()
        zeros += read_index_map(mask, size)[0].histogram()[0]
    missing = [name for k, name in enumerate(classes) if not counts[k]]
    present = len(classes) - len(missing)
    ignored = "0 and 255 are" if first_label else "255 is"
    text = (f"no mask of the {split} split has {', '.join(missing)}: {ignored} ignored, "
            f"{first_label} is {classes[0]!r}, and so on")
    from_zero = first_label and classes[-1] in missing and zeros > FREQUENT * counts.sum()
    if from_zero:
        text += f"; if 0 is {classes[0]!r}, give --first-label 0"
    if present == 0 or present == 1 and from_zero and split == "train":
        raise InputError(f"{pairs[0][0]} and {len(checked) - 1} more: {text}")
    if from_zero or split == "train" and missing and len(checked) == len(pairs):
        say(f"warning: {text}")


# ------------------------------------------------------------------------------ colours of masks

def make_palette() -> list[int]:
    """A colour for each class: hues a golden ratio apart, in three brightnesses."""
    palette = []
    for k in range(MAX_CLASSES):
        hue = k * 0.618034 % 1
        saturation = 0.55 + k % 3 / 5
        brightness = 0.95 - k // 3 % 3 / 5
        rgb = colorsys.hsv_to_rgb(hue, saturation, brightness)
        palette += [round(255 * value) for value in rgb]
    return palette + 3 * [255] + 3 * [0]  # WRONG is white, IGNORE black


PALETTE = make_palette()
PALETTE_INDEX = {tuple(PALETTE[3 * k:3 * k + 3]): k for k in range(256)}


def coloured(mask: np.ndarray) -> Image.Image:
    """Classes (H, W) uint8 as a palette image; 255, ignored, is black."""
    image = Image.fromarray(mask)
    image.putpalette(PALETTE)
    return image


# --------------------------------------------------------------------- preprocessing and decoding

def fit(size: tuple[int, int], frame_size: Sequence[float]) -> tuple[int, int]:
    """(width, height) scaled so that the long side fits into the long one of `frame_size`, and the
    short into the short."""
    scale = min(max(frame_size) / max(size), min(frame_size) / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def network_input(image: Image.Image, frame_size: Sequence[int] = FRAME_SIZE) -> Tensor:
    """An RGB frame -> (3, H, W) float32, normalised, H and W multiples of 32.

    It is fitted into `frame_size` (long, short), then resized up to multiples of 32, both as by
    OpenCV: bilinearly, half-pixel centres, no antialiasing, rounded.
    """
    width, height = fit(image.size, frame_size)
    stretched = (-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()  # channels-last: fast
    for size in ((height, width), stretched):
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bilinear").round_()
    return (x[0] - MEAN).div_(STD)


def interpolate_and_decode(logits: Tensor, network_size: Sequence[int],
                           frame_size: Sequence[int]) -> Tensor:
    """Logits (K, h, w) -> classes (H, W) uint8: resized bilinearly to the network's input size and
    from there to the frame's, both (height, width), as in the protocol."""
    for size in (network_size, frame_size):
        logits = F.interpolate(logits.view(1, *logits.shape[-3:]), tuple(size), mode="bilinear")
    return logits[0].max(0).indices.to(torch.uint8)  # on CPUs much faster than argmax


# ----------------------------------------------------------------------------- training clips

class ClipDataset(torch.utils.data.Dataset):
    """Random training clips: item i -> (images (T, 3, h, w) float32, labels uint8, 255 = ignored).

    Labels are (T, h, w), or (h, w), only the target's, if frames of the videos lack masks. The
    target is the last frame. There is no last item: each len(videos) items in a row have one clip
    of each video. Item i depends only on (seed, i). Videos without a possible target are left
    out, and counted in `too_short`. Raises InputError if that leaves none.
    """

    def __init__(self, videos: Sequence[Video], num_classes: int, offsets: Sequence[int],
                 crop: Sequence[int], frame_size: Sequence[int] = FRAME_SIZE,
                 scale_range: Sequence[float] = (0.5, 2.0), seed: int = 0):
        self.num_classes = num_classes
        self.offsets = tuple(offsets)
        self.crop = crop  # height, width
        self.frame_size = frame_size
        self.scale_range = sorted(scale_range)
        self.seed = seed
        self.sparse = any(None in video.masks for video in videos)
        directions = [self.possible_directions(video) for video in videos]
        self.directions = [found for found in directions if found]
        self.too_short = len(videos) - len(self.directions)
        if not self.directions:
            raise InputError(f"none of the {len(videos)} training videos has a labelled frame "
                             "with all references; give smaller offsets (--dilation)")

    def possible_directions(self, video: Video) -> list[tuple[Video, list[int]]]:
        """A video forwards and backwards, each with its possible targets: labelled frames with all
        references. A direction without any is left out."""
        backwards = replace(video, frames=video.frames[::-1], masks=video.masks[::-1])
        first = max(video.offsets or self.offsets)
        directions = []
        for played in (video, backwards):
            targets = [t for t in range(first, len(played.masks)) if played.masks[t]]
            if targets:
                directions.append((played, targets))
        return directions

    def choose(self, index: int) -> tuple[Video, np.random.Generator]:
        """Item i's frames and masks, target last, and a generator for its augmentation."""
        epoch, place = divmod(index, len(self.directions))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.directions))
        directions = self.directions[order[place]]
        rng = np.random.default_rng((self.seed, 1, index))
        video, targets = directions[rng.integers(len(directions))]
        target = targets[rng.integers(len(targets))]
        clip = [target - offset for offset in (*(video.offsets or self.offsets), 0)]
        frames, masks = [video.frames[t] for t in clip], [video.masks[t] for t in clip]
        return replace(video, frames=frames, masks=masks), rng

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        clip, rng = self.choose(index)
        frames = list(read_frames(clip.frames))
        labels = []
        for mask in clip.masks[-1:] if self.sparse else clip.masks:
            labels.append(read_labels(mask, frames[0].size, self.num_classes, clip.first_label))

        # Scale, crop and flip all frames alike.
        factor = rng.uniform(*self.scale_range)
        scaled_size = fit(frames[0].size, [side * factor for side in self.frame_size])
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
        targets = torch.full((len(labels), *self.crop), IGNORE, dtype=torch.uint8)
        for target, label in zip(targets, labels, strict=True):
            target[:height, :width] = torch.from_numpy(np.array(label))
        return images, targets[-1] if self.sparse else targets

    def choose_crop(self, label: Image.Image, size: tuple[int, int], rng: np.random.Generator):
        """A crop of the frame scaled to `size`: its (width, height), and its box before scaling."""
        crop = min(size[0], self.crop[1]), min(size[1], self.crop[0])
        x_scale, y_scale = label.width / size[0], label.height / size[1]
        for _ in range(CROP_TRIES):
            left = rng.integers(size[0] - crop[0] + 1)
            top = rng.integers(size[1] - crop[1] + 1)
            right, bottom = left + crop[0], top + crop[1]
            box = left * x_scale, top * y_scale, right * x_scale, bottom * y_scale
            part = cut(label, crop, box, False, Image.Resampling.NEAREST)
            counts = part.histogram()[:self.num_classes]
            present = sum(count > 0 for count in counts)
            if present > 1 and max(counts) < MAX_CLASS_SHARE * sum(counts):
                break
        return crop, box


def cut(image: Image.Image, size: tuple[int, int], box: tuple[float, ...], flip: bool,
        how: Image.Resampling) -> Image.Image:
    """The box of an image, scaled to `size` without antialiasing, as in evaluation, and flipped."""
    image = image.transform(size, Image.Transform.EXTENT, box, how)
    return ImageOps.mirror(image) if flip else image


def photometric_distortion(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue, each with p = 0.5. Contrast comes second
    or, as a coin decides, last."""
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
    """A look-up table for `Image.point`: what the levels 0 ... 255 become."""
    return values.clip(0, 255).round().astype(int).tolist()


# --------------------------------------------------------------------------- synthetic videos

SYNTHETIC_CLASSES = ["background", "columns", "rows", "diagonals", "checks"]
SYNTHETIC_SIZE = (128, 96)  # width, height
SYNTHETIC_VIDEOS = {"train": 200, "val": 24}
SYNTHETIC_FRAMES = 20  # a video
OBJECTS = 3            # a video
RADIUS = (18, 28)      # of an object, in pixels
TEXTURE = 40           # contrast of the textures
CHROMA = 45            # how far colours are from grey
PERIOD = 8             # of the textures, in pixels
MARGIN = 40            # of the background around the frame, for panning
CYCLE, BURST = 12, 3   # of so many frames, this many in a row are bad
BAD_MOMENTS = ("dark", "bright", "noisy", "glare", "shaken")


def write_synthetic(root: Path):
    """Make the synthetic videos in the VSPW layout: all of them, or nothing.

    Coloured objects move in front of a background; the texture of an object is its class. In
    bursts of three frames the textures are gone. The class can then only be seen 3, 6 and 9 frames
    earlier, so a method must find the same object there, by its colour.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}", dir=root.parent) as folder:
        made = Path(folder) / root.name
        for number, (split, count) in enumerate(SYNTHETIC_VIDEOS.items()):
            names = [f"{split}_{i:03d}" for i in range(count)]
            for i, name in enumerate(progress(iterable=names, desc=f"making {root}", unit="video")):
                rng = np.random.default_rng((0, number, i))
                video = made / "data" / name
                for t, (frame, labels) in enumerate(synthetic_video(rng)):
                    write_image(frame, video / f"origin/{t:05d}.jpg", quality=92)
                    write_image(labels, video / f"mask/{t:05d}.png")
            write_whole(made / f"{split}.txt", ("\n".join(names) + "\n").encode())
        write_whole(made / "classes.txt", ("\n".join(SYNTHETIC_CLASSES) + "\n").encode())
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
    pan = rng.uniform(-1.5, 1.5, 2)  # pixels a frame
    classes = rng.integers(1, len(SYNTHETIC_CLASSES), OBJECTS)
    first_hue = rng.uniform(0, 2 * math.pi)
    hues = first_hue + rng.permutation(OBJECTS) * 2 * math.pi / OBJECTS  # no two alike
    greys = rng.uniform(90, 160, OBJECTS)
    centres = rng.uniform(0.1, 0.9, (OBJECTS, 2)) * (height, width)  # in mid-video
    speeds = rng.uniform(-2.5, 2.5, (OBJECTS, 2))  # pixels a frame
    radii = rng.uniform(*RADIUS, (OBJECTS, 2))
    powers = rng.choice([2, 6], OBJECTS)  # ellipses and blunt boxes
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
    """Do to a picture (Y, Cb, Cr) without textures what else happens in a bad moment."""
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
    else:  # glare
        y, x = np.ogrid[:height, :width]
        distance = (y - rng.uniform(0, height)) ** 2 + (x - rng.uniform(0, width)) ** 2
        veil = 0.6 * np.exp(-distance / 70 ** 2)
        picture[0] += veil * (245 - picture[0])


# ------------------------------------------------------------------------------ for the scripts
#
#      You can stop reading here: the rest is files, errors, downloads, processes, fast decoding.

def write_whole(path: Path, content: bytes | memoryview):
    """Write a file whole or not at all. Raises OSError with its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_image(image: Image.Image, path: Path, **options):
    """Save an image in the format of its suffix, and make its folder if need be."""
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[path.suffix], **options)
    write_whole(path, buffer.getvalue())


def progress(**options) -> tqdm:
    """A progress bar: smooth on a terminal, a line every ten seconds in a file."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(dynamic_ncols=True, mininterval=interval, **options)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows all defaults except None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse that shows defaults. Errors are one line on stderr, with exit code 2."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter)

    def error(self, message: str):
        """End the script with the message."""
        self.exit(2, f"{self.prog}: {message}\n")


def between(low: float, high: float = 1e9, kind: type = int) -> Callable[[str], float]:
    """The type of an argument that is an int or a float from `low` to `high`."""
    def number(text: str) -> float:
        """Parse the argument. Errors of argparse print this function's name."""
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie in {low:g} ... {high:g}")
        return value

    return number


def add_shared_arguments(parser: argparse.ArgumentParser):
    """The arguments of both train.py and eval.py."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [accelerator.type, "cpu"] if accelerator else ["cpu"]
    add = parser.add_argument_group("both scripts").add_argument
    add("--data", type=Path, metavar="DIR",
        help="data folder; train.py can make one")
    add("--device", choices=devices, default=devices[0],
        help="where the network runs")
    add("--amp", choices=["bf16", "none"], default="none",
        help="mixed precision: bf16 is faster and a little less exact")

    add = parser.add_argument_group("both scripts (in eval.py: as in training)").add_argument
    add("--labels", choices=("dense", "sparse"),
        help="sparse: allow frames without masks")
    add("--first-label", type=int, choices=(0, 1),
        help="value of the first class in label maps; with 1, 0 is ignored")
    add("--dilation", dest="offsets", type=between(1), nargs="+", metavar="N",
        help="distances of the references, in frames, oldest first")
    add("--keep-ratio", type=between(0.01, 1, float),
        help="share of the tokens that STM keeps (by default the paper's); 1 for all")
    add("--frame-size", type=between(1), nargs=2, metavar=("LONG", "SHORT"),
        help="scale frames to fit this")


def refuse_to_overwrite(path: Path, instead: str = "give another name"):
    """Raise InputError if there is such a file, or such a folder with more in it than half-written
    files, *.tmp."""
    if path.is_file() or path.is_dir() and any(x.suffix != ".tmp" for x in path.iterdir()):
        raise InputError(f"{path}: exists already, and nothing is overwritten; {instead}")


def run_script(main: Callable[[], None]):
    """Run a script's main. An error that the user can fix becomes one line and exit code 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, for instance by a service
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # what it can't encode
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    code = 0
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        line = in_one_line(error)
        code = 130 if isinstance(error, KeyboardInterrupt) else 2 if line else 1
        if line is None:
            traceback.print_exc()
        else:
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    for loader in multiprocessing.active_children():
        loader.kill()
    if dist.is_initialized():
        # At once: an orderly end could wait for processes that wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def in_one_line(error: BaseException) -> str | None:
    """The message of an error that the user can fix; None for any other."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return "out of memory; try a smaller --frame-size, --crop or --batch-size, or --accumulate"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in text:
        return f"a process that loads clips ended: {text.strip().splitlines()[-1]}"
    if isinstance(error, dist.DistError) or dist.is_initialized() and "gloo" in text:
        return "lost contact with another process; its own message says why"
    if isinstance(error, (InputError, OSError)):
        # One from a loader's process arrives with that process's traceback before its last line.
        return re.sub(r"^[\w.]*Error: ", "", text.strip().splitlines()[-1])
    return None


def download_pretrained(source: str) -> Path:
    """The file `source`, or that of OWNER/NAME on Hugging Face (or HF_ENDPOINT), downloaded once
    into torch.hub's folder."""
    if Path(source).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return Path(source)
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    folder = Path(torch.hub.get_dir(), "checkpoints", source)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("pytorch_model.bin", "model.safetensors")]
    if kept := [file for file in files if file.exists()]:
        return kept[0]
    for file in files:
        url = f"{host}/{source}/resolve/main/{file.name}"
        try:
            torch.hub.download_url_to_file(url, str(file), progress=sys.stderr.isatty())
            read_state_dict(file)  # whole, or an error
            return file
        except (OSError, http.client.HTTPException, InputError) as error:
            file.unlink(missing_ok=True)
            if getattr(error, "code", 0) != 404 or file == files[-1]:
                raise InputError(f"{source}: no such file, and {url} can't be fetched ({error}); "
                                 f"put it at {file}") from None


def join_processes(args: argparse.Namespace):
    """Join the other processes if torchrun, or a cluster like it, started this one."""
    global patient_group
    if not TORCHRUN <= os.environ.keys():
        return
    if args.device.type == "cuda":
        args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(args.device)
        dist.init_process_group("nccl", device_id=args.device)
    else:
        dist.init_process_group("gloo")
    patient_group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


patient_group = None  # for exchanges that wait until others have evaluated


def gather(value) -> list:
    """The values of all processes, in the order of their ranks. Waits for hours if need be."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=patient_group)
    return values


def rank() -> int:
    """This process's number among those of torchrun, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of torchrun, or 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str):
    """Print a line to stderr, once for all processes."""
    if rank() == 0:
        print(text, file=sys.stderr)


@torch.no_grad()
def decode_mask(logits: Tensor, network_size: Sequence[int], frame_size: Sequence[int]) -> Tensor:
    """The same as `interpolate_and_decode`, on CPUs many times as fast. Bilinear weights are not
    negative, and the same for all classes. So a class that is the largest at all positions that
    a pixel reads is the pixel's class."""
    if logits.device.type != "cpu":
        return interpolate_and_decode(logits, network_size, frame_size)
    h, w = logits.shape[1:]
    largest = logits.max(0).indices.to(torch.uint8)  # (h, w)
    rows, row_weights = positions_read(h, network_size[0], frame_size[0])
    columns, column_weights = positions_read(w, network_size[1], frame_size[1])
    mask = largest[:, columns].amin(2)[rows].amin(1)  # (H, W)
    undecided = mask != largest[:, columns].amax(2)[rows].amax(1)
    if undecided.count_nonzero() > SPARSE_SHARE * mask.numel():
        return interpolate_and_decode(logits, network_size, frame_size)

    # Interpolate the logits of all classes at the M pixels that are left, as a weighted sum of the
    # positions that they read from.
    y, x = undecided.nonzero(as_tuple=True)
    weights = row_weights.to(logits)[y][:, :, None] * column_weights.to(logits)[x][:, None]
    positions = rows[y][:, :, None] * w + columns[x][:, None]  # (M, few, few)
    table = logits.flatten(1).T.contiguous()  # (h w, K)
    interpolated = F.embedding_bag(positions.flatten(1), table, mode="sum",
                                   per_sample_weights=weights.flatten(1))  # (M, K)
    mask[undecided] = interpolated.argmax(1).to(torch.uint8)
    return mask


@lru_cache(maxsize=16)
def positions_read(size: int, network_size: int, frame_size: int) -> tuple[Tensor, Tensor]:
    """Where the pixels of a side read from after both resizes, and weights: (frame_size, few)."""
    matrix = bilinear_matrix(network_size, frame_size) @ bilinear_matrix(size, network_size)
    read = matrix > 0
    few = int(read.sum(1).max())
    first = read.int().argmax(1).clamp(max=size - few)
    positions = first[:, None] + torch.arange(few)
    return positions, matrix.gather(1, positions)


def bilinear_matrix(size: int, new_size: int) -> Tensor:
    """The (new_size, size) matrix that resizes one side of an image bilinearly."""
    identity = torch.eye(size, device="cpu")
    return F.interpolate(identity[None, None], (new_size, size), mode="bilinear")[0, 0]
