"""Train MRCFA, or the SegFormer it sits on, on labelled videos.

    python train.py                                 # mrcfa_b0 on synthetic videos, minutes on a CPU
    python train.py --dataset vspw --data VSPW --model mrcfa_b1 --pretrained mit_b1.pth
    torchrun --nproc_per_node 4 train.py --batch-size 2 --dataset vspw ...      # the paper's 4 x 2
    python train.py --resume --out runs/mrcfa_b1    # goes on where that run was stopped

The run's folder gets last.pt, best.pt (by mIoU), pictures and log.jsonl, an object a line. Clips,
augmentation and dropout of an iteration depend on the seed and its number alone. So a run that was
interrupted and resumed ends with the same weights, bit for bit on a CPU.
"""
import argparse
import io
import json
import math
import os
import re
import shlex
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (CITYSCAPES_FRAME_SIZE, FRAME_SIZE, SYNTHETIC_SIZE, VSPW_CLASSES, ArgumentParser,
                  ClipDataset, Video, check_labels, check_same_classes, collate_clips, file_path,
                  positive, progress, read_classes, read_split, refuse_to_overwrite, run_script,
                  write_synthetic, write_whole)
from eval import (AMP, MODELS, Method, add_device_arguments, evaluate, metrics_table, segment_video,
                  without_nan)
from mrcfa import MRCFA, OFFSETS, build_model, load_weights, model_arguments, mrcfa_loss
from segformer import STRIDE, InputError, load_strictly, read_checkpoint, segmentation_loss

# What a data set is trained with unless a flag says otherwise. VSPW's is the recipe of the paper.
VSPW_RECIPE = {
    "frame_size": FRAME_SIZE,
    "scale_range": (0.5, 2.0),
    "crop": (480, 480),
    "reference_stride": 32,
    "positive_kernels": False,
    "batch_size": 8,
    "iters": 160_000,
    "lr": 6e-5,
    "head_lr": 10.0,
    "warmup": 1500,
}
RECIPES = {
    "vspw": VSPW_RECIPE,
    "folder": VSPW_RECIPE | {"iters": 40_000},
    "cityscapes": VSPW_RECIPE | {
        "frame_size": CITYSCAPES_FRAME_SIZE,
        "crop": (512, 1024),
        "reference_stride": 16,
    },
    "synthetic": {
        "frame_size": SYNTHETIC_SIZE,
        "scale_range": (1.0, 1.0),
        "crop": SYNTHETIC_SIZE[::-1],
        "reference_stride": 16,
        "positive_kernels": True,
        "batch_size": 4,
        "iters": 800,
        "lr": 1e-3,
        "head_lr": 1.0,
        "warmup": 50,
    },
}
SYNTHETIC = Path("data/synthetic")
BETAS = (0.9, 0.999)            # of AdamW
WARMUP_START = 1e-6             # the share of the learning rate that the warm-up begins with
PLACE = ("out", "resume", "device")     # arguments that a checkpoint's `config` leaves out
PROGRESS = ("iteration", "evaluated", "best", "losses", "lines")    # of a Run, in checkpoints
# What PyTorch says where a loader's process was killed, or ran out of shared memory or files.
LOADER_ENDED = re.compile(r"DataLoader worker \(pid|shared memory|ancdata|Too many open files|"
                          r"unable to (open|write|mmap|allocate)")


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of clips (B, T, 3, h, w) with labels (B, T, h, w), or the targets' (B, h, w)."""
    if isinstance(getattr(model, "module", model), MRCFA):
        frame_logits, clip_logits = model(images)
        return mrcfa_loss(frame_logits, clip_logits, labels)
    if labels.ndim == 3:
        images, labels = images[:, -1:], labels[:, None]
    logits = model(images.flatten(0, 1))
    return segmentation_loss(logits, labels.flatten(0, 1))


def parameter_groups(model: nn.Module, args: argparse.Namespace) -> list[dict]:
    """AdamW's groups: the encoder, its LayerNorms without decay, and all else at `head_lr` times
    the rate."""
    encoder = getattr(model, "segformer", model).encoder
    norms = set()
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            norms |= set(module.parameters())
    inside = set(encoder.parameters())
    groups = [{"params": [], "base_lr": args.lr, "weight_decay": args.weight_decay},
              {"params": [], "base_lr": args.lr, "weight_decay": 0.0},
              {"params": [], "base_lr": args.lr * args.head_lr, "weight_decay": args.weight_decay}]
    for parameter in model.parameters():
        if parameter in norms:
            groups[1]["params"].append(parameter)
        elif parameter in inside:
            groups[0]["params"].append(parameter)
        else:
            groups[2]["params"].append(parameter)
    return groups


def lr_factor(i: int, iters: int, warmup: int) -> float:
    """What iteration i's learning rate is of the base: linear down to 0, after a linear warm-up."""
    falling = 1 - i / iters
    if i >= warmup:
        return falling
    return falling * (1 - (1 - i / warmup) * (1 - WARMUP_START))


def positive_kernels(model: MRCFA):
    """Make SAR's and MAA's kernels positive before training.

    By chance a kernel sums to less than 0: it makes a hole of an image's peak, and ReLU leaves
    nothing of it.
    """
    for module in model.aggregation.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.abs_()


def leave_signals(_: int):
    """What a loader's process does about Ctrl-C and signals to all of a run's processes: it leaves
    them to the training."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):      # not on Windows
        os.setpgrp()


class Run:
    """A training and its folder: model, checkpoints, log. Of several processes the first writes."""

    def __init__(self, args: argparse.Namespace, model: nn.Module):
        self.args = args
        self.model = model
        self.rank, self.processes = 0, 1
        if dist.is_initialized():
            self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.optimizer = torch.optim.AdamW(parameter_groups(model, args), betas=BETAS)
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "fp16")
        self.iteration = 0
        self.evaluated = 0                  # the iteration of the last evaluation
        self.best = -1.0                    # mIoU
        self.losses: list[float] = []       # since the log's last line
        self.lines: list[str] = []          # of the log
        self.signal = 0                     # that told the run to stop
        self.evaluating = False

    # ------------------------------------------------------------------------- the training loop

    def train(self, clips: ClipDataset, val: list[Video]):
        """Train from the current iteration to the last one."""
        args = self.args
        self.clips = clips
        network = self.in_training_mode()
        if self.processes > 1:
            network = DistributedDataParallel(self.model)
        if args.compile:
            network.compile()
        samples = self.samples(self.iteration, args.iters)
        loader = DataLoader(clips, args.batch_size, sampler=samples, num_workers=args.workers,
                            collate_fn=collate_clips, worker_init_fn=leave_signals,
                            pin_memory=args.device.type == "cuda")
        batches = iter(loader)
        with progress(total=args.iters, initial=self.iteration, desc=args.model, unit="it",
                      disable=self.rank > 0) as bar:
            while True:
                last = self.iteration == args.iters
                due = last or args.eval_every and self.iteration % args.eval_every == 0
                if due and self.evaluated < self.iteration:
                    self.evaluate(val, last)
                if last:
                    return
                stop = self.step(network, batches)
                lr = self.optimizer.param_groups[0]["lr"]
                mean_loss = float(np.mean(self.losses))
                bar.set_postfix(loss=f"{mean_loss:.3f}", lr=f"{lr:.1e}", refresh=False)
                bar.update()
                last = self.iteration == args.iters
                if last or self.iteration % args.log_every == 0:
                    speed = bar.format_dict["rate"]
                    self.log(loss=mean_loss, lr=lr, iterations_per_second=speed)
                    self.losses = []
                if last or stop or self.iteration % args.save_every == 0:
                    self.save("last.pt")
                if stop:
                    self.leave("stopped")

    def samples(self, start: int, end: int) -> list[int]:
        """Which of the data set's clips this process takes in iterations start ... end - 1."""
        samples = []
        for batch in range(start * self.args.accumulate, end * self.args.accumulate):
            first = self.args.batch_size * (batch * self.processes + self.rank)
            samples += range(first, first + self.args.batch_size)
        return samples

    def step(self, network: nn.Module, batches) -> bool:
        """One iteration -> whether this process, or one of the others, was told to stop."""
        args = self.args
        factor = lr_factor(self.iteration, args.iters, args.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.zero_grad()
        total = torch.zeros((), device=args.device)
        for i in range(args.accumulate):
            images, labels = (x.to(args.device, non_blocking=True) for x in next(batches))
            self.seed_dropout(self.iteration * args.accumulate + i)
            if self.processes > 1:
                network.require_backward_grad_sync = i == args.accumulate - 1
            with torch.autocast(args.device.type, AMP.get(args.amp), enabled=args.amp is not None):
                loss = loss_of(network, images, labels) / args.accumulate
            self.scaler.scale(loss).backward()
            total += loss.detach()

        status = torch.stack([total, torch.full_like(total, self.signal > 0)])
        if self.processes > 1:
            dist.all_reduce(status)
        summed, stop = status.tolist()      # the one copy from the device in an iteration
        loss = summed / self.processes
        if not math.isfinite(loss):         # before it spoils the weights
            self.refuse_loss(total.item())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses.append(loss)
        self.iteration += 1
        return stop > 0

    def seed_dropout(self, batch: int):
        """Let the random numbers of dropout depend on the seed, the batch and the process alone."""
        share = batch * self.processes + self.rank
        seed = np.random.SeedSequence((self.args.seed, 2, share)).generate_state(1)[0]
        torch.manual_seed(int(seed))

    def refuse_loss(self, own_loss: float):
        """End a run whose loss is not finite."""
        if not math.isfinite(own_loss):
            clips = self.samples(self.iteration, self.iteration + 1)
            targets = [str(self.clips.choose(i)[0][-1]) for i in clips]
            print(f"\nstopped: the loss of iteration {self.iteration} is {own_loss}, of the clips "
                  f"that end with {', '.join(targets)}; {self.args.out / 'last.pt'} is from before "
                  "it", file=sys.stderr)
        sys.exit(1)

    def in_training_mode(self) -> nn.Module:
        """The model in training mode, but for a part that is held."""
        self.model.train()
        if self.args.hold_segformer:
            self.model.segformer.eval()
        return self.model

    # --------------------------------------------------------------------------------- evaluation

    def evaluate(self, videos: list[Video], last: bool):
        """Evaluate; print, log, and keep the checkpoint if it is the best so far.

        The last evaluation of an MRCFA has a second row, its single frames: what the references add
        is the difference.
        """
        args = self.args
        if self.processes > 1:      # the first process's BatchNorm statistics are those in last.pt
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        self.model.eval()
        segment = partial(segment_video, frame_size=args.frame_size)
        methods = [Method(args.model, partial(segment, model=self.model))]
        if last and isinstance(self.model, MRCFA):
            methods.append(Method("single_frames", partial(segment, model=self.model.segformer)))
        self.evaluating = True      # from here on a signal is answered at once
        if self.signal:
            raise KeyboardInterrupt
        results = evaluate(methods, videos, args.classes, pictures=args.out / "pictures")
        self.evaluating = False
        metrics = results[0].compute()
        self.evaluated = self.iteration
        self.log(**without_nan(metrics))
        if metrics["mIoU"] > self.best:
            self.best = metrics["mIoU"]
            self.save("best.pt")
        self.save("last.pt")
        if self.rank == 0:
            names = [method.name for method in methods]
            tqdm.write(f"iteration {self.iteration}\n{metrics_table(names, results)}")
        self.in_training_mode()

    # ------------------------------------------------------------------- checkpoints, log, signals

    def save(self, name: str):
        """Write a checkpoint that rebuilds the model by itself and continues the run."""
        if self.rank > 0:
            return
        config = {}
        for key, value in vars(self.args).items():
            if key not in PLACE:
                config[key] = str(value) if isinstance(value, Path) else value
        content = {"model": self.model.state_dict(), "model_args": model_arguments(config),
                   "config": config, "optimizer": self.optimizer.state_dict(),
                   "scaler": self.scaler.state_dict()}
        for key in PROGRESS:
            content[key] = getattr(self, key)
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_whole(self.args.out / name, buffer.getbuffer(), durable=True)

    def resume(self, checkpoint: dict):
        """Take over the state of last.pt, and forget what the log says of later iterations."""
        load_strictly(self.model, checkpoint["model"])
        groups = checkpoint["optimizer"]["param_groups"]
        for group, own in zip(groups, self.optimizer.param_groups, strict=True):
            group["base_lr"] = own["base_lr"]               # flags may have changed them
            group["weight_decay"] = own["weight_decay"]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:                            # there is nothing in it without fp16
            self.scaler.load_state_dict(checkpoint["scaler"])
        for key in PROGRESS:
            setattr(self, key, checkpoint[key])
        if self.rank == 0:
            write_whole(self.args.out / "log.jsonl", "".join(self.lines).encode())
            print(f"going on at iteration {self.iteration} of {self.args.iters}", file=sys.stderr)

    def log(self, **values):
        """Add a line to log.jsonl."""
        line = json.dumps({"iteration": self.iteration, **values}) + "\n"
        self.lines.append(line)
        if self.rank > 0:
            return
        path = self.args.out / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    def on_signal(self, number: int, _):
        """Ctrl-C and the like: end after the iteration, or at once in an evaluation, for which
        --resume makes up. A second one ends the process."""
        signal.signal(number, signal.SIG_DFL)
        self.signal = number
        if self.evaluating:
            raise KeyboardInterrupt

    def leave(self, how: str):
        """End the process, and say how to go on."""
        if self.rank == 0:
            print(f"\n{how} at iteration {self.iteration}; to go on: "
                  f"{resume_command(self.args.out)}", file=sys.stderr)
        sys.exit(128 + (self.signal or signal.SIGTERM))


def resume_command(out: Path) -> str:
    """The command that continues a run, to paste."""
    launcher = "python"
    if "LOCAL_RANK" in os.environ:
        launcher = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', 1)}"
    return f"{launcher} train.py --resume --out {shlex.quote(str(out))}"


# --------------------------------------------------------------------------------- command line

def make_parser() -> ArgumentParser:
    """The flags. What has no default here gets that of the data set's recipe."""
    parser = ArgumentParser(
        description="Train MRCFA or SegFormer on labelled videos. Defaults are those of the "
                    "synthetic videos; RECIPES in train.py has the other data sets'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("the run")
    group.add_argument("--model", choices=MODELS, default="mrcfa_b0", metavar="NAME",
                       help="mrcfa_b0 ... b5, segformer_b0 ... b5")
    group.add_argument("--dataset", choices=RECIPES,
                       help="whose recipe to train with: folder if there is --data, else synthetic")
    group.add_argument("--data", type=file_path, metavar="DIR",
                       help=f"data folder; the synthetic videos are made in {SYNTHETIC} by default")
    group.add_argument("--labels", choices=("dense", "sparse"), default="dense",
                       help="sparse: frames may lack masks, as in videos that you label yourself")
    group.add_argument("--out", type=file_path, metavar="DIR",
                       help="folder of this run, by default runs/MODEL; an existing one is only "
                            "ever continued")
    group.add_argument("--resume", action="store_true",
                       help="continue the run in --out with the arguments that it was started with")
    group.add_argument("--pretrained", type=file_path, metavar="FILE",
                       help="to start from: MiT, SegFormer, a released MRCFA, or a last.pt")
    group.add_argument("--seed", type=int, default=0, metavar="N",
                       help="of initialisation, clips and dropout; several show the spread")
    group.add_argument("--workers", type=int, default=2, metavar="N",
                       help="processes that load clips: more if the network waits for them")
    group.add_argument("--log-every", type=positive, default=50, metavar="N",
                       help="iterations to average into a line of log.jsonl")
    group.add_argument("--save-every", type=positive, default=500, metavar="N",
                       help="iterations between checkpoints: what a crash costs at most")
    group.add_argument("--eval-every", type=int, default=0, metavar="N",
                       help="iterations between evaluations; 0 evaluates at the end alone")
    add_clip_arguments(parser)
    add_optimiser_arguments(parser)
    add_mrcfa_arguments(parser)
    add_device_arguments(parser)
    return parser


def add_clip_arguments(parser: ArgumentParser):
    """The flags of how clips are cut from the videos."""
    group = parser.add_argument_group("clips")
    group.add_argument("--batch-size", type=positive, metavar="N",
                       help="clips a process takes at a time; the paper's 8 are 4 GPUs x 2")
    group.add_argument("--dilation", dest="offsets", type=positive, nargs="+", default=OFFSETS,
                       metavar="N", help="frames back to the references")
    group.add_argument("--frame-size", type=positive, nargs=2, metavar=("LONG", "SHORT"),
                       help="scale frames to fit this, here and in evaluation; smaller is faster "
                            "and coarser")
    group.add_argument("--scale-range", type=float, nargs=2, metavar=("MIN", "MAX"),
                       help="random factor on that; 1 1: as it is")
    group.add_argument("--crop", type=positive, nargs=2, metavar=("H", "W"),
                       help="multiples of 32: memory and time depend on it")


def add_optimiser_arguments(parser: ArgumentParser):
    """The flags of how long, and at which rates, is trained."""
    group = parser.add_argument_group("optimiser")
    group.add_argument("--accumulate", type=positive, default=1, metavar="N",
                       help="batches an iteration: a large one in little memory")
    group.add_argument("--iters", type=positive, metavar="N",
                       help="iterations, over which the learning rate falls to 0")
    group.add_argument("--lr", type=float, help="AdamW's rate for the encoder; higher from scratch")
    group.add_argument("--head-lr", type=float, metavar="FACTOR",
                       help="times that for all else; 1 from scratch, where nothing is ahead")
    group.add_argument("--weight-decay", type=float, default=0.01,
                       help="AdamW's, on all but the encoder's LayerNorms")
    group.add_argument("--warmup", type=int, metavar="N",
                       help="iterations over which the rate rises, by default as in the recipe "
                            "but at most a tenth of the training")


def add_mrcfa_arguments(parser: ArgumentParser):
    """The flags of MRCFA's own parts."""
    group = parser.add_argument_group("MRCFA, and what it is without its parts")
    group.add_argument("--reference-stride", type=int, choices=(16, 32),
                       help="of reference tokens: 16 is finer, and slower")
    group.add_argument("--hold-segformer", action="store_true",
                       help="leave the SegFormer of --pretrained as it is and train the affinities "
                            "alone: fast, and single frames stay as good as they were")
    group.add_argument("--positive-kernels", action=argparse.BooleanOptionalAction,
                       help="begin SAR's and MAA's convolutions with positive kernels, which "
                            "learns faster; the paper's may invert")
    group.add_argument("--keep-ratio", type=float, metavar="P",
                       help="share of tokens that STM keeps, if not the paper's; 1: all")
    group.add_argument("--refine", action=argparse.BooleanOptionalAction, default=True,
                       help="use SAR")
    group.add_argument("--aggregate", action=argparse.BooleanOptionalAction, default=True,
                       help="use MAA; without it there is the finest scale alone")


def parse_args() -> argparse.Namespace:
    """The command line: flags, above the run that is resumed, above the data set's recipe."""
    parser = make_parser()
    parser.set_defaults(**RECIPES["synthetic"])     # for --help
    args = parser.parse_args()
    out = args.out or Path("runs") / args.model
    if args.resume:             # what the run was started with are the defaults now
        parser.set_defaults(**read_run(out / "last.pt")["config"])
    else:
        dataset = args.dataset or ("folder" if args.data else "synthetic")
        parser.set_defaults(dataset=dataset, **RECIPES[dataset] | {"warmup": None})
    args = parser.parse_args(namespace=argparse.Namespace(out=out))
    if args.warmup is None:
        args.warmup = min(RECIPES[args.dataset]["warmup"], args.iters // 10)
    check_arguments(parser, args)
    args.data = args.data or SYNTHETIC
    args.device = torch.device(args.device)
    return args


def read_run(path: Path) -> dict:
    """The checkpoint of a run, to resume it."""
    checkpoint = read_checkpoint(path)
    config = checkpoint.get("config")
    whole = {"optimizer", "scaler", *PROGRESS} <= checkpoint.keys()
    if not whole or not isinstance(config, dict) or "iters" not in config:
        raise InputError(f"{path} is of no run, or of an earlier version; use it as --pretrained")
    return checkpoint


def check_arguments(parser: ArgumentParser, args: argparse.Namespace):
    """End the script where a value can't be."""
    if args.data is None and args.dataset != "synthetic":
        parser.error(f"--data DIR is missing: the folder of the {args.dataset} data set")
    if args.crop[0] % STRIDE or args.crop[1] % STRIDE:
        parser.error(f"--crop {args.crop[0]} {args.crop[1]}: both must be multiples of {STRIDE}")
    low, high = args.scale_range
    if not 0.1 <= low <= high <= 10:
        parser.error(f"--scale-range {low} {high}: must rise, within 0.1 ... 10")
    if args.keep_ratio is not None and not 0 < args.keep_ratio <= 1:
        parser.error(f"--keep-ratio: keep_ratio must lie in (0, 1], not {args.keep_ratio}")
    for name in ("seed", "workers", "lr", "head_lr", "weight_decay", "warmup", "eval_every"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: must be 0 or more")
    if args.hold_segformer and not (args.model.startswith("mrcfa") and args.pretrained):
        parser.error("--hold-segformer needs an MRCFA as --model, and --pretrained FILE with the "
                     "SegFormer to hold")


def train(args: argparse.Namespace):
    """Train and evaluate in this process, alone or as one of several."""
    if not args.resume:
        instead = f"go on with that run ({resume_command(args.out)}) or name another folder (--out)"
        refuse_to_overwrite(args.out, instead)
    new = not args.out.exists()
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if args.dataset == "synthetic" and first_here and not args.data.exists():
        write_synthetic(args.data)
    if dist.is_initialized():
        dist.barrier()          # until the videos are there, and all have seen that the run isn't
    classes = read_classes(args.data, default=VSPW_CLASSES if args.dataset == "vspw" else ())
    if args.resume:
        check_same_classes(args.classes, classes, args.out / "last.pt", args.data)
    args.classes = classes
    sparse = args.labels == "sparse"
    videos = read_split(args.data, "train", args.offsets, sparse)
    val = read_split(args.data, "val", args.offsets, sparse)
    check_labels(videos, classes, "train")
    check_labels(val, classes, "val")
    clips = ClipDataset(videos, len(classes), args.offsets, args.crop, args.frame_size,
                        args.scale_range, args.seed)

    torch.manual_seed(args.seed)
    model = build_model(args.model, model_arguments(vars(args)))
    if args.positive_kernels and isinstance(model, MRCFA):
        positive_kernels(model)
    if args.pretrained and not args.resume:
        load_weights(model, args.pretrained)
    elif args.lr == VSPW_RECIPE["lr"] and not args.pretrained:
        print(f"warning: --lr {args.lr:g} is for pretrained weights (--pretrained FILE); from "
              "scratch, --lr 1e-3 --head-lr 1 learns faster", file=sys.stderr)
    if args.hold_segformer:
        model.segformer.requires_grad_(False)
    if dist.is_initialized() and args.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    run = Run(args, model.to(args.device))
    if run.rank == 0 and clips.too_short:
        print(f"warning: {clips.too_short} of {len(videos)} training videos are left out: no "
              f"labelled frame of theirs has references {max(args.offsets)} frames away "
              "(--dilation)", file=sys.stderr)
    if args.resume:
        run.resume(read_run(args.out / "last.pt"))
    else:
        if run.rank == 0:
            args.out.mkdir(parents=True, exist_ok=not new)  # an error where another run was faster
        run.save("last.pt")     # from here on there is something to resume
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, run.on_signal)
    try:
        run.train(clips, val)
    except KeyboardInterrupt:
        run.leave("interrupted in the evaluation")
    except RuntimeError as error:
        if not LOADER_ENDED.search(str(error)):
            raise
        raise InputError(f"a process that loads clips ended: {str(error).strip().splitlines()[-1]} "
                         "Was it out of memory? Try fewer --workers. To go on: "
                         f"{resume_command(args.out)}") from None
    if run.signal:
        run.leave("stopped")
    if run.rank == 0:
        print(f"the run is in {args.out}: checkpoints, log and pictures")


def main():
    """Train and evaluate as the command line says; as one of several processes under torchrun."""
    args = parse_args()
    if "LOCAL_RANK" not in os.environ:
        train(args)
        return
    if args.device.type == "cuda":      # a GPU for each process
        args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
