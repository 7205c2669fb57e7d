"""Videos with labels: the VSPW layout on disk, random clips for training, network inputs for inference, and a small
data set of synthetic videos that shows in minutes what other frames are good for.

    DIR/train.txt, val.txt          one video name a line
    DIR/classes.txt                 one class name a line (VSPW itself does without)
    DIR/data/<video>/origin/*.jpg   frames, in the order of their names (.png is fine)
    DIR/data/<video>/mask/*.png     label maps: 0 or 255 = ignored, 1 ... K = classes 0 ... K-1

or Cityscapes' official folders, in which one frame of 30 is labelled:

    DIR/leftImg8bit_sequence/<split>/<city>/<city>_<sequence>_<frame>_leftImg8bit.png
    DIR/gtFine/<split>/<city>/<city>_<sequence>_<frame>_gtFine_labelIds.png (or labelTrainIds)

What a person can put right (a missing file, a label that doesn't exist) is an OSError or ValueError of one line.
"""
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

IGNORE = 255
MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]  # of ImageNet's RGB, 0 ... 255
STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
FRAME_SIZE = (853, 480)      # VSPW's long and short side: frames are scaled to fit
CITYSCAPES_FRAME_SIZE = (1024, 512)
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
STRIDE = 32                  # network inputs are multiples of it
CROP_TRIES = 10              # for a crop whose target has two classes and none that covers more than
MAX_CLASS_SHARE = 0.75       # this share of its labelled pixels
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 18 / 180  # photometric distortion

VSPW_CLASSES = """
wall ceiling door stair ladder escalator playground_slide handrail_or_fence window rail goal pillar pole floor ground
grass sand athletic_field road path crosswalk building house bridge tower windmill well_or_well_lid other_construction
sky mountain stone wood ice snowfield grandstand sea river lake waterfall water billboard_or_bulletin_board sculpture
pipeline flag parasol_or_umbrella cushion_or_carpet tent roadblock car bus truck bicycle motorcycle wheeled_machine
ship_or_boat raft airplane tyre traffic_light lamp person cat dog horse cattle other_animal tree flower other_plant
toy ball_net backboard skateboard bat ball cupboard_or_showcase_or_storage_rack box traveling_case_or_trolley_case
basket bag_or_package trash_can cage plate tub_or_bowl_or_pot bottle_or_cup barrel fishbowl bed pillow table_or_desk
chair_or_seat bench sofa shelf bathtub gun commode roaster other_machine refrigerator washing_machine microwave_oven
fan curtain textiles clothes painting_or_poster mirror flower_pot_or_vase clock book tool blackboard tissue
screen_or_television computer printer mobile_phone keyboard other_electronic_product fruit food instrument train
""".split()
CITYSCAPES_CLASSES = """
road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck bus
train motorcycle bicycle
""".split()
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of them, in labelIds.png


# ------------------------------------------------------------------------------------------------------ what is on disk

@dataclass(frozen=True)
class Video:
    """One video: its frames in order and, one for each, their label maps, None where there is none."""
    name: str
    frames: Sequence[Path]
    masks: Sequence[Path | None]
    offsets: tuple[int, ...] = ()  # of the references from a target in `frames`, if that isn't up to the training


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that aren't blank, stripped."""
    return [line.strip() for line in path.read_text("utf-8-sig", "replace").splitlines() if line.strip()]


def read_classes(root: Path) -> list[str]:
    """The class names of a data folder in label order: Cityscapes' 19, those of classes.txt, or VSPW's 124."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such data folder; give the one that holds train.txt, val.txt and data/")
    if (root / "gtFine").is_dir():
        return CITYSCAPES_CLASSES
    classes = read_lines(root / "classes.txt") if (root / "classes.txt").exists() else VSPW_CLASSES
    if not 1 <= len(classes) < IGNORE:
        raise ValueError(f"{root}/classes.txt: {len(classes)} classes; a label map can hold 1 to {IGNORE - 1}")
    return classes


def read_split(root: Path, split: str, offsets: Sequence[int] = ()) -> list[Video]:
    """The videos of a split, of Cityscapes just the frames at `offsets`; the errors name what is missing."""
    if (root / "gtFine").is_dir():
        return read_cityscapes(root, split, offsets)
    videos = []
    for name in read_lines(root / f"{split}.txt"):
        folder = root / "data" / name
        frames = list_frames(folder / "origin", f", but {split}.txt names this video")
        masks = [folder / "mask" / f"{frame.stem}.png" for frame in frames]
        missing = sorted(set(masks) - set((folder / "mask").glob("*.png")))
        if missing:
            raise ValueError(f"{missing[0]}: no such mask ({len(missing)} of this video's {len(masks)} are missing)")
        videos.append(Video(name, frames, masks))
    if not videos:
        raise ValueError(f"{root / split}.txt: names no video")
    return videos


def read_cityscapes(root: Path, split: str, offsets: Sequence[int]) -> list[Video]:
    """Clips of Cityscapes: a labelled frame after the references before it, or those after it, in reverse.

    Training gets both, evaluation one. A side on which a reference is missing is left out.
    """
    labels = {label.name.partition("_gtFine")[0]: label  # of two for a frame, labelTrainIds comes last and wins
              for label in sorted((root / "gtFine" / split).glob("*/*_gtFine_label*Ids.png"))}
    if not labels:
        raise ValueError(f"{root / 'gtFine' / split}: no <city>/*_gtFine_labelIds.png there")
    sequences = root / "leftImg8bit_sequence" / split
    if not sequences.is_dir():
        raise ValueError(f"{sequences}: no such folder; it is in leftImg8bit_sequence_trainvaltest.zip")
    videos = []
    for name, label in labels.items():
        folder, (sequence, _, number) = sequences / label.parent.name, name.rpartition("_")
        sides = [[folder / f"{sequence}_{int(number) + sign * offset:06d}_leftImg8bit.png" for offset in offsets]
                 for sign in (-1, 1)]
        whole = [side for side in sides if all(path.exists() for path in side)] or [[]]
        for side in whole if split == "train" else whole[:1]:
            videos.append(Video(name, [*side, folder / f"{name}_leftImg8bit.png"], [None] * len(side) + [label],
                                tuple(range(len(offsets), 0, -1))))
    return videos


def list_frames(folder: Path, why: str = "") -> list[Path]:
    """The frames in a folder, in the order of their names."""
    frames = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in FRAME_SUFFIXES)
    if not frames:
        raise ValueError(f"{folder}: no such folder, or no frames in it ({', '.join(FRAME_SUFFIXES)}){why}")
    for path, other in zip(frames, frames[1:]):
        if path.stem == other.stem:
            raise ValueError(f"{other}: {path.name} has the same name, so their masks would; remove one of the two")
    return frames


def read_image(path: Path) -> Image.Image:
    """An image file, decoded; ValueError where that fails."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or f"not a readable image ({error}); replace it"
        raise ValueError(f"{path}: {why}") from None


def read_frames(paths: Iterable[Path]) -> Iterator[Image.Image]:
    """The frames of one video as RGB; ValueError where one can't be read or isn't of the first one's size."""
    size = None
    for path in paths:
        image = read_image(path).convert("RGB")
        size = size or image.size
        if image.size != size:
            raise ValueError(f"{path}: {image.size}, but other frames of this video are {size} (width, height)")
        yield image


def read_index_map(path: Path, size: tuple[int, int]) -> Image.Image:
    """A single-channel 8-bit image of the given (width, height); a palette's indices are the values themselves."""
    image = read_image(path)
    if image.mode not in ("L", "P") or image.size != size:
        raise ValueError(f"{path}: {image.size} in mode {image.mode}; a mask has its frame's size, here {size}, and is "
                         "an 8-bit single-channel image (mode L or P)")
    return Image.frombuffer("L", image.size, image.tobytes())


def read_labels(path: Path, size: tuple[int, int], num_classes: int) -> Image.Image:
    """A label map of the given (width, height) with the classes as 0 ... K-1 and everything ignored as 255."""
    image = read_index_map(path, size)
    values: Sequence[int] = range(1, num_classes + 1)
    if path.name.endswith("_gtFine_labelIds.png"):
        values = CITYSCAPES_IDS
    elif path.name.endswith("_gtFine_labelTrainIds.png"):
        values = range(num_classes)
    highest = max((value for value, count in enumerate(image.histogram()[:IGNORE]) if count), default=0)
    if highest > max(values):
        raise ValueError(f"{path}: label {highest}, but there are {num_classes} classes, {values[0]} ... {values[-1]}")
    return image.point([values.index(value) if value in values else IGNORE for value in range(256)])


# ------------------------------------------------------------------------------------------------------------ inference

def fit(size: tuple[int, int], long: float, short: float) -> tuple[int, int]:
    """(width, height) scaled, up or down, until the long side is at most `long` and the short one at most `short`."""
    scale = min(long / max(size), short / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def network_input(image: Image.Image, frame_size: Sequence[int] = FRAME_SIZE) -> Tensor:
    """A frame -> (3, H, W) float32, normalised: fitted into `frame_size` (long, short), then up to multiples of 32.

    Both resizes are bilinear as OpenCV does it: half-pixel centres, no antialiasing, rounded to whole grey levels.
    """
    width, height = fit(image.size, *frame_size)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    for size in (height, width), (-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE):
        x = F.interpolate(x, size, mode="bilinear").round()
    return (x[0] - MEAN) / STD


# ------------------------------------------------------------------------------------------------------------- training

class ClipDataset(torch.utils.data.Dataset):
    """Random training clips: item i -> (images (T, 3, h, w) float32, labels (T, h, w) int64, 255 = ignored).

    Labels are (h, w) where the target, the last frame, is the only one that has them. There is no end to the items;
    len(videos) in a row are an epoch, one clip of each video. Item i depends on (seed, i) alone. Videos too short for
    `offsets` are left out, and counted in `too_short`; ValueError where all are.
    """

    def __init__(self, videos: list[Video], num_classes: int, offsets: Sequence[int], crop: Sequence[int],
                 frame_size: Sequence[int] = FRAME_SIZE, scale_range: tuple[float, float] = (0.5, 2.0), seed: int = 0):
        self.num_classes, self.offsets, self.crop = num_classes, offsets, crop
        self.frame_size, self.scale_range, self.seed = frame_size, scale_range, seed
        self.videos = [video for video in videos if any(targets for _, targets in self.ways(video))]
        self.too_short = len(videos) - len(self.videos)
        if not self.videos:
            raise ValueError(f"none of the {len(videos)} training videos is longer than the largest offset, "
                             f"{max(offsets)} frames; give smaller offsets (--dilation)")

    def ways(self, video: Video) -> list[tuple[Video, list[int]]]:
        """A video as it is and backwards, each with the frames that can be targets: labelled, with all references."""
        both = video, replace(video, frames=video.frames[::-1], masks=video.masks[::-1])
        first = max(video.offsets or self.offsets)
        return [(way, [t for t, mask in enumerate(way.masks) if mask and t >= first]) for way in both]

    def choose(self, index: int) -> tuple[list[Path], list[Path | None], np.random.Generator]:
        """Item i's frames and masks, target last, and the random numbers for its augmentation."""
        epoch, place = divmod(index, len(self.videos))
        video = self.videos[np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.videos))[place]]
        rng = np.random.default_rng((self.seed, 1, index))
        ways = self.ways(video)
        chosen, backwards = rng.integers(max(len(targets) for _, targets in ways)), rng.random() < 0.5
        way, targets = ways[backwards] if ways[backwards][1] else ways[not backwards]
        clip = [targets[chosen % len(targets)] - offset for offset in (*(video.offsets or self.offsets), 0)]
        return [way.frames[t] for t in clip], [way.masks[t] for t in clip], rng

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        paths, masks, rng = self.choose(index)
        frames = list(read_frames(paths))
        labels = [read_labels(mask, frames[0].size, self.num_classes) for mask in masks if mask]
        # Scale, crop and flip all frames alike, distort the colours of each; normalise, and pad to the crop's size.
        factor = rng.uniform(*self.scale_range)
        size = fit(frames[0].size, self.frame_size[0] * factor, self.frame_size[1] * factor)
        (width, height), box = self.choose_crop(labels[-1], size, rng)
        flip = rng.random() < 0.5
        images, targets = torch.zeros(len(frames), 3, *self.crop), torch.full((len(labels), *self.crop), IGNORE)

        def cut(image: Image.Image, how: Image.Resampling) -> Image.Image:
            """The crop of an image, scaled and flipped."""
            image = image.resize((width, height), how, box)  # nothing outside the crop is ever scaled
            return ImageOps.mirror(image) if flip else image

        for image, frame in zip(images, frames):
            frame = photometric_distortion(cut(frame, Image.Resampling.BILINEAR), rng)
            image[:, :height, :width] = (torch.from_numpy(np.array(frame)).permute(2, 0, 1) - MEAN) / STD
        for target, label in zip(targets, labels):
            target[:height, :width] = torch.from_numpy(np.array(cut(label, Image.Resampling.NEAREST)))
        return images, targets if len(labels) == len(frames) else targets[-1]

    def choose_crop(self, label: Image.Image, size: tuple[int, int], rng: np.random.Generator):
        """A crop of the frame scaled to `size`: its (width, height), and its box in the unscaled frame."""
        crop = min(size[0], self.crop[1]), min(size[1], self.crop[0])
        scale = label.width / size[0], label.height / size[1]
        for _ in range(CROP_TRIES):
            left, top = rng.integers(size[0] - crop[0] + 1), rng.integers(size[1] - crop[1] + 1)
            box = left * scale[0], top * scale[1], (left + crop[0]) * scale[0], (top + crop[1]) * scale[1]
            counts = label.resize(crop, Image.Resampling.NEAREST, box).histogram()[:self.num_classes]
            if sum(count > 0 for count in counts) > 1 and max(counts) < MAX_CLASS_SHARE * sum(counts):
                break
        return crop, box


def photometric_distortion(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue, each changed with p = 0.5, contrast before the other two or after."""
    def curve(values: np.ndarray) -> list[int]:
        """256 values as a look-up table, which does whatever acts on each value by itself."""
        return values.clip(0, 255).round().astype(int).tolist()

    levels = np.arange(256.0)
    bright = levels + (rng.uniform(-BRIGHTNESS, BRIGHTNESS) if rng.random() < 0.5 else 0)
    contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else 1
    contrast_first = rng.random() < 0.5
    saturation = rng.uniform(*SATURATION) if rng.random() < 0.5 else 1
    hue = rng.uniform(-HUE, HUE) if rng.random() < 0.5 else 0
    image = image.point(curve(bright.clip(0, 255) * (contrast if contrast_first else 1)) * 3)
    if saturation != 1 or hue != 0:
        turned = ((levels + 256 * hue).round() % 256).astype(int).tolist()
        image = image.convert("HSV").point(turned + curve(levels * saturation) + curve(levels)).convert("RGB")
    return image if contrast_first or contrast == 1 else image.point(curve(levels * contrast) * 3)


# ----------------------------------------------------------------------------------------------------- synthetic videos

SYNTHETIC_CLASSES = ["background", "columns", "rows", "diagonals", "checks"]
SYNTHETIC_SIZE = (128, 96)                     # width and height: reference tokens of stride 16 are 8 x 6
SYNTHETIC_VIDEOS = {"train": 200, "val": 24}
SYNTHETIC_FRAMES = 20                          # a video
OBJECTS, RADIUS = 3, (18, 28)                  # of a video; in pixels
TEXTURE, CHROMA = 40, 45                       # contrast of the textures, and how far colours are from grey
PERIOD = 8                                     # of the textures, in pixels
CYCLE, BURST = 12, 3                           # of so many frames, this many in a row are bad
BAD_MOMENTS = ("dark", "bright", "noisy", "glare", "shaken")


def write_synthetic(root: Path, seed: int = 0):
    """Make the data set of synthetic videos in the VSPW layout: all of it, or nothing if it is interrupted.

    Coloured objects move before a moving background; an object's texture is its class. In bursts of three frames the
    picture is out of focus, and dark, noisy or the like as well: it still shows where the objects are and of what
    colour, but not *what* they are. That can be seen 3, 6 and 9 frames earlier, so other frames are all that helps,
    and a method must find the same object in them, by its colour.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}", dir=root.parent) as folder:
        made = Path(folder) / root.name
        for number, (split, count) in enumerate(SYNTHETIC_VIDEOS.items()):
            names = [f"{split}_{i:03d}" for i in range(count)]
            for i, name in enumerate(tqdm(names, desc=f"making {root}", unit="video", dynamic_ncols=True)):
                origin, mask = (made / "data" / name / kind for kind in ("origin", "mask"))
                origin.mkdir(parents=True)
                mask.mkdir()
                for t, (frame, labels) in enumerate(synthetic_video(np.random.default_rng((seed, number, i)))):
                    frame.save(origin / f"{t:05d}.jpg", quality=92)
                    labels.save(mask / f"{t:05d}.png")
            (made / f"{split}.txt").write_text("\n".join(names) + "\n")
        (made / "classes.txt").write_text("\n".join(SYNTHETIC_CLASSES) + "\n")
        if not root.exists():  # another process may have been faster
            made.rename(root)


def synthetic_video(rng: np.random.Generator) -> Iterator[tuple[Image.Image, Image.Image]]:
    """The frames of one synthetic video and their label maps, 1 ... K."""
    (width, height), margin = SYNTHETIC_SIZE, 40
    y, x = np.mgrid[:height, :width].astype(np.float32)

    def noise(cell: int) -> np.ndarray:
        """A smooth random texture in -1 ... 1, larger than the frame by the margins."""
        size = width + 2 * margin, height + 2 * margin
        grains = rng.uniform(-1, 1, (size[1] // cell, size[0] // cell)).astype(np.float32)
        return np.array(Image.fromarray(grains).resize(size, Image.Resampling.BICUBIC))

    # Everything is drawn as Y, Cb, Cr: textures, which are the classes, are in Y, and colours in Cb and Cr.
    background = np.stack([110 + 30 * noise(24), 128 + 12 * noise(32), 128 + 12 * noise(32)])
    grain = 25 * noise(6)
    pan = rng.uniform(-1.5, 1.5, 2)                                                     # pixels a frame
    classes = rng.integers(1, len(SYNTHETIC_CLASSES), OBJECTS)
    hues = rng.uniform(0, 2 * math.pi) + rng.permutation(OBJECTS) * 2 * math.pi / OBJECTS   # no two alike
    greys = rng.uniform(90, 160, OBJECTS)
    centres = rng.uniform(0.1, 0.9, (OBJECTS, 2)) * (height, width)                     # in the middle of the video
    speeds = rng.uniform(-2.5, 2.5, (OBJECTS, 2))
    radii, powers = rng.uniform(*RADIUS, (OBJECTS, 2)), rng.choice([2, 6], OBJECTS)     # ellipses and blunt boxes
    turns = rng.uniform(0, math.pi, OBJECTS)
    phase, moment = rng.integers(CYCLE), ""

    for t in range(SYNTHETIC_FRAMES):
        bad = (t + phase) % CYCLE < BURST
        moment = (moment or rng.choice(BAD_MOMENTS)) if bad else ""
        since = t - SYNTHETIC_FRAMES / 2
        top, left = (margin + pan * since).round().astype(int)
        picture = background[:, top:top + height, left:left + width].copy()
        picture[0] += (not bad) * grain[top:top + height, left:left + width]
        labels = np.ones((height, width), np.uint8)
        for i in range(OBJECTS):
            dy, dx = y - centres[i, 0] - speeds[i, 0] * since, x - centres[i, 1] - speeds[i, 1] * since
            cos, sin = math.cos(turns[i]), math.sin(turns[i])
            u, v = (cos * dx + sin * dy) / radii[i, 0], (cos * dy - sin * dx) / radii[i, 1]
            inside = abs(u) ** powers[i] + abs(v) ** powers[i] < 1
            a, b = 2 * math.pi / PERIOD * dx, 2 * math.pi / PERIOD * dy
            texture = (np.sin(a), np.sin(b), np.sin(0.7 * (a + b)), 1.4 * np.sin(a) * np.sin(b))[classes[i] - 1]
            picture[0][inside] = greys[i] + (not bad) * TEXTURE * texture[inside]
            picture[1][inside] = 128 + CHROMA * math.cos(hues[i])
            picture[2][inside] = 128 + CHROMA * math.sin(hues[i])
            labels[inside] = 1 + classes[i]
        if bad:
            spoil(picture, moment, rng)
        planes = [Image.fromarray(plane) for plane in picture.clip(0, 255).astype(np.uint8)]
        yield Image.merge("YCbCr", planes).convert("RGB"), Image.fromarray(labels)


def spoil(picture: np.ndarray, moment: str, rng: np.random.Generator):
    """Do to a picture (Y, Cb, Cr) that is out of focus what else happens in that kind of bad moment."""
    height, width = picture.shape[1:]
    if moment == "dark":
        picture[0] *= 0.5
    elif moment == "bright":
        picture[0] *= 1.4
    elif moment == "noisy":
        picture += rng.normal(0, 15, picture.shape)
    elif moment == "shaken":
        picture[:] = np.mean([np.roll(picture, shift, axis=2) for shift in range(-4, 5)], axis=0)
    else:
        y, x = np.ogrid[:height, :width]
        veil = 0.6 * np.exp(-((y - rng.uniform(0, height)) ** 2 + (x - rng.uniform(0, width)) ** 2) / 70 ** 2)
        picture[0] += veil * (245 - picture[0])
