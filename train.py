"""Train MRCFA, or the SegFormer it sits on, on labelled videos.

    python train.py                                 # mrcfa_b0 on synthetic videos, minutes on a CPU
    python train.py --dataset vspw --data VSPW --model mrcfa_b1 --pretrained nvidia/mit-b1
    torchrun --nproc_per_node 4 train.py --dataset vspw ...     # on the same clips, four GPUs
    python train.py --resume --out runs/mrcfa_b1    # goes on where that run was stopped

The run's folder gets last.pt, best.pt (by mIoU), pictures and log.jsonl, an object a line. Clips
and augmentation of an iteration depend on the seed and its number alone, dropout on the number of
processes as well. So a run that was interrupted and resumed ends with the same weights, bit for bit
on a CPU.
"""
import argparse
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (CITYSCAPES_FRAME_SIZE, FRAME_SIZE, SYNTHETIC_SIZE, VSPW_CLASSES, ArgumentParser,
                  ClipDataset, HelpFormatter, Video, check_labels, check_same_classes,
                  download_pretrained, fraction, is_cityscapes, join_processes, positive, progress,
                  rank, read_classes, read_split, refuse_to_overwrite, run_script, say, world_size,
                  write_synthetic, write_whole)
from eval import (MODELS, Method, add_device_arguments, autocast, evaluate, metrics_table,
                  segment_video, without_nan)
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
    "eval_every": None,         # ten times a training
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
        "eval_every": 0,
    },
}
SYNTHETIC = Path("data/synthetic")
BETAS = (0.9, 0.999)            # of AdamW,
WEIGHT_DECAY = 0.01             # but 0 for the encoder's LayerNorms
WARMUP_START = 1e-6             # the share of the learning rate that the warm-up begins with
NOT_SAVED = ("out", "resume", "device")     # arguments that a checkpoint's `config` leaves out
PROGRESS = ("iteration", "evaluated", "best", "losses", "lines")    # of a Run, in checkpoints
# Arguments that can't change when a run goes on.
FIXED = {"model": "--model", "dataset": "--dataset", "reference_stride": "--reference-stride",
         "refine": "--sar", "aggregate": "--maa", "first_label": "--first-label"}


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of clips (B, T, 3, h, w) with labels (B, T, h, w), or the targets' (B, h, w)."""
    if isinstance(model, MRCFA):
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
    norms, others = [], []
    for module in encoder.modules():
        group = norms if isinstance(module, nn.LayerNorm) else others
        group += module.parameters(recurse=False)
    inside = {*norms, *others}
    outside = [parameter for parameter in model.parameters() if parameter not in inside]
    head_lr = args.lr * args.head_lr
    return [{"params": others, "base_lr": args.lr, "weight_decay": WEIGHT_DECAY},
            {"params": norms, "base_lr": args.lr, "weight_decay": 0.0},
            {"params": outside, "base_lr": head_lr, "weight_decay": WEIGHT_DECAY}]


def lr_factor(i: int, iters: int, warmup: int) -> float:
    """The learning rate of iteration i as a share of the base: linear warm-up, then down to 0."""
    falling = 1 - i / iters
    if i >= warmup:
        return falling
    return falling * (1 - (1 - i / warmup) * (1 - WARMUP_START))


def positive_kernels(model: MRCFA):
    """Make SAR's and MAA's kernels positive before training.

    By chance a kernel sums to less than 0: it makes a hole of a map's peak, and ReLU leaves nothing
    of it.
    """
    for module in model.aggregation.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.abs_()


def leave_signals(_: int):
    """What a loader's process does about Ctrl-C and SIGTERM: it leaves them to the training."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Run:
    """A training and its folder: model, checkpoints, log. Of several processes the first writes."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, clips: ClipDataset):
        self.args = args
        self.model = model
        self.clips = clips
        self.processes = world_size()
        self.share = args.batch_size // (self.processes * args.accumulate)  # clips at a time
        self.optimizer = torch.optim.AdamW(parameter_groups(model, args), betas=BETAS,
                                           fused=args.device.type == "cuda")
        self.iteration = 0
        self.evaluated = 0                  # the iteration of the last evaluation
        self.best = -1.0                    # mIoU
        self.losses: list[float] = []       # since the log's last line
        self.lines: list[str] = []          # of the log
        self.waited = 0.0                   # seconds for clips, since the log's last line
        self.logged = time.perf_counter()   # when that was written
        self.signal = 0                     # that told the run to stop
        self.evaluating = False

    # ------------------------------------------------------------------------- the training loop

    def train(self, val: list[Video]):
        """Train from the current iteration to the last one."""
        args = self.args
        self.in_training_mode()
        samples = self.samples(self.iteration, args.iters)
        batches = iter(DataLoader(self.clips, self.share, sampler=samples,
                                  num_workers=args.workers, worker_init_fn=leave_signals,
                                  pin_memory=args.device.type == "cuda"))
        if self.evaluation_is_due():        # the run was stopped in it
            self.evaluate(val)
        with progress(total=args.iters, initial=self.iteration, desc=args.model, unit="it",
                      disable=rank() > 0) as bar:
            while self.iteration < args.iters:
                self.set_learning_rate()
                loss = self.take_gradient(batches)
                loss, norm, stop = self.average_over_processes(loss)
                if not math.isfinite(loss) or not math.isfinite(norm):
                    self.refuse_step(loss, norm)
                self.optimizer.step()

                self.iteration += 1
                self.losses.append(loss)
                lr = self.optimizer.param_groups[0]["lr"]
                bar.set_postfix(loss=f"{np.mean(self.losses):.3f}", lr=f"{lr:.1e}", refresh=False)
                bar.update()
                due = self.evaluation_is_due()
                if self.iteration % args.log_every == 0 or self.iteration == args.iters:
                    self.log_training(lr, norm, bar.format_dict["rate"])
                if due or stop or self.iteration % args.save_every == 0:
                    self.save("last.pt")
                if stop:
                    if self.processes > 1:      # until the first process has saved
                        dist.barrier()
                    self.leave("stopped")
                if due:
                    self.evaluate(val)

    def set_learning_rate(self):
        """Give all parameters the learning rate of the iteration."""
        factor = lr_factor(self.iteration, self.args.iters, self.args.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def take_gradient(self, batches) -> torch.Tensor:
        """Load this process's share of the clips -> their mean loss, and its gradient."""
        args = self.args
        self.optimizer.zero_grad()
        total = torch.zeros((), device=args.device)
        for i in range(args.accumulate):
            start = time.perf_counter()
            images, labels = (x.to(args.device, non_blocking=True) for x in next(batches))
            self.waited += time.perf_counter() - start
            self.seed_dropout(i)
            with autocast(args.device, args.amp):
                loss = loss_of(self.model, images, labels) / args.accumulate
            loss.backward()
            total += loss.detach()
        return total

    def average_over_processes(self, loss: torch.Tensor) -> tuple[float, float, bool]:
        """Average the gradient over all processes -> the mean loss, the norm of its gradient, and
        whether one of them was told to stop."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        status = torch.stack([loss, torch.full_like(loss, self.signal > 0)])
        if self.processes > 1:      # in one vector: so it is always summed in the same order
            vector = parameters_to_vector([*gradients, status])
            dist.all_reduce(vector)
            vector_to_parameters(vector / self.processes, [*gradients, status])
        norm = get_total_norm(gradients)
        # The one copy from the device in an iteration:
        loss, stop, norm = torch.cat([status, norm[None]]).tolist()
        return loss, norm, stop > 0

    def refuse_step(self, loss: float, norm: float):
        """End the run before a loss or gradient that isn't finite spoils the weights."""
        first = self.iteration * self.args.batch_size
        clips = [self.clips.choose(i)[0] for i in range(first, first + self.args.batch_size)]
        targets = ", ".join(str(clip.frames[-1]) for clip in clips)
        say(f"\nstopped: the loss of iteration {self.iteration} is {loss}, the norm of its "
            f"gradient {norm}, of the clips that end with {targets}; {self.args.out / 'last.pt'} "
            "is from before it")
        sys.exit(1)

    def samples(self, start: int, end: int) -> list[int]:
        """Which of the data set's clips this process takes in iterations start ... end - 1."""
        count = self.args.batch_size // self.processes
        samples = []
        for i in range(start, end):
            first = i * self.args.batch_size + rank() * count
            samples += range(first, first + count)
        return samples

    def seed_dropout(self, part: int):
        """Let the random numbers of dropout depend on the seed and the first clip alone."""
        first = self.samples(self.iteration, self.iteration + 1)[part * self.share]
        seed = np.random.SeedSequence((self.args.seed, 2, first)).generate_state(1)[0]
        torch.manual_seed(int(seed))

    def in_training_mode(self):
        """Set the model to training mode, but for a part that is frozen."""
        self.model.train()
        if self.args.freeze_segformer:
            self.model.segformer.eval()

    # --------------------------------------------------------------------------------- evaluation

    def evaluation_is_due(self) -> bool:
        """Whether the current iteration ends with an evaluation that hasn't been."""
        every = self.args.eval_every
        planned = self.iteration == self.args.iters or every and self.iteration % every == 0
        return planned and self.evaluated < self.iteration

    def evaluate(self, videos: list[Video]):
        """Evaluate; print, log, and keep the checkpoint if it is the best so far.

        The last evaluation of an MRCFA has a second row, its single frames: what the references add
        is the difference.
        """
        args = self.args
        start = time.perf_counter()
        if self.processes > 1:      # the first process's BatchNorm statistics are those in last.pt
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        self.model.eval()
        segment = partial(segment_video, frame_size=args.frame_size)
        methods = [Method(args.model, partial(segment, model=self.model))]
        if self.iteration == args.iters and isinstance(self.model, MRCFA):
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
        if rank() == 0:
            names = [method.name for method in methods]
            tqdm.write(f"iteration {self.iteration}\n{metrics_table(names, results)}")
        self.in_training_mode()
        self.logged += time.perf_counter() - start      # no time of training

    # ------------------------------------------------------------------- checkpoints, log, signals

    def save(self, name: str):
        """Write a checkpoint that rebuilds the model by itself and continues the run."""
        if rank() > 0:
            return
        config = {}
        for key, value in vars(self.args).items():
            if key not in NOT_SAVED:
                config[key] = str(value) if isinstance(value, Path) else value
        content = {"model": self.model.state_dict(), "config": config,
                   "optimizer": self.optimizer.state_dict()}
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
            group["base_lr"], group["fused"] = own["base_lr"], own["fused"]     # may have changed
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for key in PROGRESS:
            setattr(self, key, checkpoint[key])
        if rank() == 0:
            write_whole(self.args.out / "log.jsonl", "".join(self.lines).encode())
        say(f"going on at iteration {self.iteration} of {self.args.iters}")

    def log_training(self, lr: float, norm: float, speed: float | None):
        """Add a line on the iterations since the last one to log.jsonl."""
        now = time.perf_counter()
        values = {"loss": float(np.mean(self.losses)), "lr": lr,
                  "gradient_norm": norm, "iterations_per_second": speed,
                  "waited_for_clips": self.waited / (now - self.logged)}    # a share of the time
        if self.args.device.type == "cuda":
            values["peak_MB"] = torch.cuda.max_memory_allocated() / 1e6
        self.log(**values)
        self.losses, self.waited, self.logged = [], 0.0, now

    def log(self, **values):
        """Add a line to log.jsonl."""
        line = json.dumps({"iteration": self.iteration, **values}) + "\n"
        self.lines.append(line)
        if rank() > 0:
            return
        path = self.args.out / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    def on_signal(self, number: int, _):
        """Ctrl-C and the like: end after the iteration, or at once in an evaluation, for which
        --resume makes up. A second one ends the process, but not under torchrun, which repeats
        each."""
        if not dist.is_initialized():
            signal.signal(number, signal.SIG_DFL)
        self.signal = number
        if self.evaluating:
            self.evaluating = False
            raise KeyboardInterrupt

    def leave(self, how: str):
        """End the process, and say how to go on."""
        launcher = "torchrun ..." if self.processes > 1 else "python"
        say(f"\n{how} at iteration {self.iteration}; to go on: {launcher} train.py --resume "
            f"--out {shlex.quote(str(self.args.out))}")
        sys.exit(128 + (self.signal or signal.SIGTERM))


# --------------------------------------------------------------------------------- command line

def make_parser() -> ArgumentParser:
    """The flags. What has no default here gets that of the data set's recipe."""
    parser = ArgumentParser(
        description="Train MRCFA or SegFormer on labelled videos. Defaults are those of the "
                    "synthetic videos; RECIPES in train.py has the other data sets'.",
        formatter_class=HelpFormatter)
    group = parser.add_argument_group("the run")
    group.add_argument("--model", choices=MODELS, default="mrcfa_b0", metavar="NAME",
                       help="mrcfa_b0 ... b5, segformer_b0 ... b5")
    group.add_argument("--dataset", choices=RECIPES,
                       help="data set, which picks the recipe: by default folder or cityscapes, "
                            "as --data looks, or else synthetic")
    group.add_argument("--data", type=Path, metavar="DIR",
                       help=f"data folder; the synthetic videos are made in {SYNTHETIC} by default")
    group.add_argument("--labels", choices=("dense", "sparse"), default="dense",
                       help="sparse: frames may lack masks, as in videos that you label yourself")
    group.add_argument("--first-label", type=int, choices=(0, 1), default=1,
                       help="value of the first class in label maps; with 1, 0 is ignored")
    group.add_argument("--out", type=Path, metavar="DIR",
                       help="folder of this run, by default runs/MODEL; an existing one is only "
                            "ever continued")
    group.add_argument("--resume", action="store_true",
                       help="continue the run in --out with the flags that it was started with, or "
                            "begin it")
    group.add_argument("--pretrained", metavar="FILE | OWNER/NAME",
                       help="weights to start from: of MiT, SegFormer, a released MRCFA, or a "
                            "last.pt; nvidia/mit-b0 ... are fetched from Hugging Face")
    group.add_argument("--seed", type=int, default=0, metavar="N",
                       help="seed of initialisation, clips and dropout; several show the spread")
    group.add_argument("--workers", type=int, default=2, metavar="N",
                       help="processes that load clips: more if the network waits for them")
    group.add_argument("--log-every", type=positive, default=50, metavar="N",
                       help="iterations to average into a line of log.jsonl")
    group.add_argument("--save-every", type=positive, default=500, metavar="N",
                       help="iterations between checkpoints: what a crash costs at most")
    group.add_argument("--eval-every", type=int, metavar="N",
                       help="iterations between evaluations, with real data by default a tenth of "
                            "the training; 0 evaluates at the end alone")

    group = parser.add_argument_group("clips")
    group.add_argument("--batch-size", type=positive, metavar="N",
                       help="clips of an iteration, which all processes share; the paper's are 8")
    group.add_argument("--dilation", dest="offsets", type=positive, nargs="+", default=OFFSETS,
                       metavar="N", help="frames back to the references")
    group.add_argument("--frame-size", type=positive, nargs=2, metavar=("LONG", "SHORT"),
                       help="scale frames to fit this, here and in evaluation; smaller is faster "
                            "and coarser")
    group.add_argument("--scale-range", type=float, nargs=2, metavar=("MIN", "MAX"),
                       help="range of a random factor on the frames' size; 1 1 leaves it")
    group.add_argument("--crop", type=positive, nargs=2, metavar=("H", "W"),
                       help="size of the random crops, multiples of 32; larger needs more memory")

    group = parser.add_argument_group("optimiser")
    group.add_argument("--accumulate", type=positive, default=1, metavar="N",
                       help="split each process's share of the clips into N parts, one after the "
                            "other: less memory")
    group.add_argument("--iters", type=positive, metavar="N",
                       help="iterations, over which the learning rate falls to 0")
    group.add_argument("--lr", type=float, help="learning rate of the encoder; higher from scratch")
    group.add_argument("--head-lr", type=float, metavar="FACTOR",
                       help="learning-rate multiplier for all other layers; 1 from scratch")
    group.add_argument("--warmup", type=int, metavar="N",
                       help="iterations over which the rate rises, by default as in the recipe "
                            "but at most a tenth of the training")

    group = parser.add_argument_group("MRCFA, and what it is without its parts")
    group.add_argument("--reference-stride", type=int, choices=(16, 32),
                       help="stride of the reference tokens; 16 is finer and slower")
    group.add_argument("--freeze-segformer", action="store_true",
                       help="leave the SegFormer of --pretrained as it is and train the affinities "
                            "alone: fast, and single frames stay as good as they were")
    group.add_argument("--positive-kernels", action=argparse.BooleanOptionalAction,
                       help="begin SAR's and MAA's convolutions with positive kernels, which "
                            "learns faster; the paper's may invert")
    group.add_argument("--keep-ratio", type=fraction, metavar="P",
                       help="share of tokens that STM keeps, by default the paper's; 1 keeps all")
    group.add_argument("--sar", dest="refine", action=argparse.BooleanOptionalAction, default=True,
                       help="refine affinities with SAR")
    group.add_argument("--maa", dest="aggregate", action=argparse.BooleanOptionalAction,
                       default=True,
                       help="merge scales with MAA; without, the finest is used alone")
    add_device_arguments(parser)
    return parser


def parse_args() -> tuple[argparse.Namespace, dict | None]:
    """The command line: flags, above the run that is continued, above the data set's recipe. With
    it, the checkpoint of a run that is continued.

    It is parsed twice: to find the run or the recipe, and then with their values as defaults.
    """
    parser = make_parser()
    parser.set_defaults(**RECIPES["synthetic"])     # for --help
    args = parser.parse_args()
    last = (args.out or Path("runs") / args.model) / "last.pt"
    checkpoint = read_checkpoint(last) if args.resume and last.exists() else None
    if checkpoint:
        defaults = checkpoint["config"]
    else:
        dataset = args.dataset or "synthetic"
        if args.data and not args.dataset:
            dataset = "cityscapes" if is_cityscapes(args.data) else "folder"
        defaults = {"dataset": dataset, **RECIPES[dataset], "warmup": None}
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    args.out = last.parent
    if args.warmup is None:
        args.warmup = min(RECIPES[args.dataset]["warmup"], args.iters // 10)
    if args.eval_every is None:
        args.eval_every = max(1, args.iters // 10)
    check_arguments(parser, args)
    args.data = args.data or SYNTHETIC
    args.device = torch.device(args.device)
    if checkpoint:
        check_resumption(args, checkpoint)
    return args, checkpoint


def check_resumption(args: argparse.Namespace, checkpoint: dict):
    """InputError where the flags are those of another run than the checkpoint's."""
    path = args.out / "last.pt"
    for name, flag in FIXED.items():
        old, new = checkpoint["config"][name], getattr(args, name)
        if old != new:
            raise InputError(f"{path}: is of a run with {flag} {old}, but the command says {new}; "
                             "give it another --out")
    if args.iters < checkpoint["iteration"]:
        raise InputError(f"--iters {args.iters}: {path} has {checkpoint['iteration']} iterations "
                         "already")


def check_arguments(parser: ArgumentParser, args: argparse.Namespace):
    """End the script where a value can't be."""
    if args.data is None and args.dataset != "synthetic":
        parser.error(f"--data DIR is missing: the folder of the {args.dataset} data set")
    if args.crop[0] % STRIDE or args.crop[1] % STRIDE:
        parser.error(f"--crop {args.crop[0]} {args.crop[1]}: both must be multiples of {STRIDE}")
    low, high = args.scale_range
    if not 0.1 <= low <= high <= 10:
        parser.error(f"--scale-range {low} {high}: must rise, within 0.1 ... 10")
    for name in ("seed", "workers", "lr", "head_lr", "warmup", "eval_every"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: must be 0 or more")
    if args.freeze_segformer and not (args.model.startswith("mrcfa") and args.pretrained):
        parser.error("--freeze-segformer needs an MRCFA as --model, and --pretrained FILE with the "
                     "SegFormer to freeze")


def check_batch_size(args: argparse.Namespace):
    """InputError where the clips of an iteration can't be shared evenly."""
    if args.batch_size % (world_size() * args.accumulate):
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of {world_size()} "
                         f"processes x --accumulate {args.accumulate}")


# ----------------------------------------------------------------------------------------- a run

def main():
    """Train and evaluate as the command line says; as one of several processes under torchrun."""
    args, checkpoint = parse_args()
    join_processes(args)
    check_batch_size(args)
    if not checkpoint:
        refuse_to_overwrite(args.out, "continue that run (--resume) or name another folder (--out)")
        if args.resume:
            say(f"no run in {args.out} yet: it begins")
    clips, val = prepare_data(args, checkpoint)
    run = Run(args, prepare_model(args, checkpoint), clips)
    if checkpoint:
        run.resume(checkpoint)
    if dist.is_initialized():
        begun = [0] * run.processes
        dist.all_gather_object(begun, run.iteration)    # and all have seen what is in the folder
        if len(set(begun)) > 1:
            raise InputError(f"{args.out}: not all processes find the same run there; several "
                             "machines must share this folder")
    say(what_runs(run, val))
    if rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
    if not checkpoint:
        run.save("last.pt")     # from here on there is something to resume
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, run.on_signal)
    try:
        run.train(val)
    except KeyboardInterrupt:
        run.leave("interrupted in the evaluation")
    if run.signal:
        run.leave("stopped")
    if rank() == 0:
        print(f"the run is in {args.out}: checkpoints, log and pictures")


def prepare_data(args: argparse.Namespace, checkpoint: dict | None
                 ) -> tuple[ClipDataset, list[Video]]:
    """The training clips and the videos to validate with. Each machine's first process makes or
    fetches what is missing."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or not dist.is_initialized():
        if args.dataset == "synthetic" and not args.data.exists():
            write_synthetic(args.data)
        if args.pretrained and not checkpoint:
            download_pretrained(args.pretrained)
    if dist.is_initialized():
        dist.barrier()
    classes = read_classes(args.data, default=VSPW_CLASSES if args.dataset == "vspw" else ())
    if checkpoint:
        check_same_classes(args.classes, classes, args.out / "last.pt", args.data)
    args.classes = classes
    splits = []
    for split in ("train", "val"):
        videos = read_split(args.data, split, args.offsets, args.labels == "sparse",
                            args.first_label, training=split == "train")
        check_labels(videos, classes, split)
        splits.append(videos)
    videos, val = splits
    clips = ClipDataset(videos, len(classes), args.offsets, args.crop, args.frame_size,
                        args.scale_range, args.seed)
    return clips, val


def prepare_model(args: argparse.Namespace, checkpoint: dict | None) -> nn.Module:
    """The model on its device, with the weights that the command line says."""
    torch.manual_seed(args.seed)
    model = build_model(args.model, model_arguments(vars(args)))
    if args.positive_kernels and isinstance(model, MRCFA):
        positive_kernels(model)
    if args.pretrained and not checkpoint:
        load_weights(model, download_pretrained(args.pretrained))
    elif args.lr == VSPW_RECIPE["lr"] and not args.pretrained:
        say(f"warning: --lr {args.lr:g} is for pretrained weights (--pretrained); from scratch, "
            "--lr 1e-3 --head-lr 1 learns faster")
    if args.freeze_segformer:
        model.segformer.requires_grad_(False)
    if dist.is_initialized() and args.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(args.device)


def what_runs(run: Run, val: list[Video]) -> str:
    """A line that says what is trained, how and on what."""
    args, clips = run.args, run.clips
    device = str(args.device)
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name(args.device)
    elif torch.version.cuda and not torch.cuda.is_available():
        device += " (this PyTorch is built for CUDA, but finds no GPU)"
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
    targets = sum(len(targets) for directions in clips.directions for _, targets in directions)
    left_out = f" ({clips.too_short} are too short for --dilation)" if clips.too_short else ""
    return (f"{args.model}, training {trained:.1f} M parameters on {run.processes} x {device} in "
            f"{args.amp or 'float32'}: {args.iters} iterations of {args.batch_size} clips, "
            f"{run.share} at a time in each process; training videos: {len(clips.videos)}{left_out}"
            f" with {targets} possible clips; validation videos: {len(val)}")


if __name__ == "__main__":
    run_script(main)
