"""Train MRCFA, or the SegFormer that it builds on, on labelled videos.

    python train.py                                 # mrcfa_b0 on synthetic videos, minutes on a CPU
    python train.py --dataset vspw --data VSPW --model mrcfa_b1 --pretrained nvidia/mit-b1
    torchrun --nproc_per_node 4 train.py --dataset vspw ...     # on the same clips, four GPUs
    python train.py --resume --out runs/mrcfa_b1    # continues a run that was stopped

The run's folder gets last.pt, best.pt (by mIoU), pictures, and log.jsonl with one object per line.
The clips of an iteration and their augmentation depend only on the seed and the iteration; dropout
also depends on the number of processes, as does BatchNorm on CPUs. So a run that was interrupted
and resumed ends with the same weights, on a CPU bit for bit.
"""
import argparse
import io
import json
import math
import os
import shlex
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (CITYSCAPES_FRAME_SIZE, FRAME_SIZE, SYNTHETIC_SIZE, VSPW_CLASSES, ArgumentParser,
                  ClipDataset, Video, add_shared_arguments, between, check_labels,
                  check_same_classes, download_pretrained, gather, is_cityscapes, join_processes,
                  progress, rank, read_classes, read_split, refuse_to_overwrite, run_script, say,
                  world_size, write_synthetic, write_whole)
from eval import MODELS, autocast, evaluate, metrics_table, segment_video, without_nan
from mrcfa import MRCFA, OFFSETS, build_model, load_weights, model_arguments, mrcfa_loss
from segformer import STRIDE, InputError, load_strictly, read_checkpoint, segmentation_loss

# What a data set is trained with unless a flag overrides it. VSPW's is the recipe of the paper.
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
    "eval_every": None,         # every tenth of the run
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
WEIGHT_DECAY = 0.01  # of AdamW; 0 for the encoder's LayerNorms
WARMUP_START = 1e-6  # share of the learning rate at the start of the warm-up
MOST_LEFT_OUT = 10   # iterations in a row without a finite gradient that end a run
NOT_SAVED = ("out", "resume", "device")  # arguments that a checkpoint's `config` leaves out
# Arguments that a continued run would ignore or misread if they changed.
FIXED = ("dataset", "first_label", "freeze_segformer", "pretrained", "positive_kernels")


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
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
    """Make SAR's and MAA's kernels positive before training: a random kernel with a negative sum
    turns peaks into valleys, which ReLU removes."""
    for module in model.aggregation.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.abs_()


def leave_signals(_: int):
    """Make a loader's process ignore Ctrl-C and SIGTERM: the training process answers them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Run:
    """A training run and its folder: model, checkpoints, log. Only the first process writes."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, clips: ClipDataset):
        self.args = args
        self.model = model
        self.clips = clips
        self.processes = world_size()
        self.share = args.batch_size // (self.processes * args.accumulate)  # clips at a time
        groups = parameter_groups(model, args)
        self.optimizer = torch.optim.AdamW(groups, fused=args.device.type == "cuda")
        self.iteration = 0
        self.best = -1.0   # mIoU
        self.left_out = 0  # iterations in a row without a finite gradient
        self.signal = 0    # the number of a signal to stop, if one came

    # ------------------------------------------------------------------------- the training loop

    def train(self, val: list[Video]):
        """Train from the current iteration to the last one, and evaluate whenever it is due."""
        args = self.args
        samples = range(self.first_sample(), args.iters * args.batch_size, self.processes)
        batches = iter(DataLoader(self.clips, self.share, sampler=samples,
                                  num_workers=args.workers, worker_init_fn=leave_signals,
                                  pin_memory=args.device.type == "cuda"))
        losses = []  # since the log's last line
        self.set_training_mode()
        with progress(total=args.iters, initial=self.iteration, desc=args.model, unit="it",
                      disable=rank() > 0) as bar:
            while True:
                done = self.iteration >= args.iters
                due = args.eval_every and self.iteration % args.eval_every == 0
                if done or due and self.iteration > 0:
                    self.evaluate(val, done)
                if done:
                    break
                loss, norm, stop = self.step(batches)
                if math.isfinite(loss):
                    losses.append(loss)
                mean = np.mean(losses) if losses else math.nan
                lr = self.optimizer.param_groups[0]["lr"]
                bar.set_postfix(loss=f"{mean:.3f}", lr=f"{lr:.1e}", refresh=False)
                bar.update()
                if self.iteration % args.log_every == 0 or self.iteration == args.iters:
                    self.log(loss=float(mean), lr=lr, gradient_norm=norm,
                             iterations_per_second=bar.format_dict["rate"] or math.nan)
                    losses = []
                if stop or self.iteration % args.save_every == 0:
                    self.save("last.pt")
                if stop:
                    gather(None)  # until the first process has saved
                    self.leave("stopped")

    def step(self, batches) -> tuple[float, float, bool]:
        """One iteration -> its loss, the norm of its gradient, and whether a process was told to
        stop. Without a finite gradient nothing changes except the iteration's number."""
        args = self.args
        factor = lr_factor(self.iteration, args.iters, args.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=args.device)
        for part in range(args.accumulate):
            images, labels = (x.to(args.device, non_blocking=True) for x in next(batches))
            self.seed_dropout(part)
            with autocast(args.device, args.amp):
                part_loss = loss_of(self.model, images, labels.long()) / args.accumulate
            part_loss.backward()
            loss += part_loss.detach()
        loss, norm, stop = self.average_over_processes(loss)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.left_out = 0
        else:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            self.report_left_out(loss, norm)
        self.iteration += 1
        return loss, norm, stop

    def average_over_processes(self, loss: Tensor) -> tuple[float, float, bool]:
        """Average the gradient over all processes -> the mean loss, the norm of its gradient, and
        whether one of them was told to stop."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        status = torch.stack([loss, torch.full_like(loss, self.signal > 0)])
        if self.processes > 1:  # in one vector: so it is always summed in the same order
            vector = parameters_to_vector([*gradients, status])
            dist.all_reduce(vector)
            vector_to_parameters(vector / self.processes, [*gradients, status])
        norm = get_total_norm(gradients)
        # The only copy from the device in an iteration.
        loss, stop, norm = torch.cat([status, norm[None]]).tolist()
        return loss, norm, stop > 0

    def report_left_out(self, loss: float, norm: float):
        """Warn of an iteration without a finite gradient. End the run after several in a row."""
        self.left_out += 1
        first = self.iteration * self.args.batch_size
        clips = [self.clips.choose(i)[0] for i in range(first, first + self.args.batch_size)]
        targets = ", ".join(str(clip.frames[-1]) for clip in clips)
        say(f"\nwarning: iteration {self.iteration} is left out: its loss is {loss}, the norm of "
            f"its gradient {norm}; its clips end with {targets}")
        if self.left_out == MOST_LEFT_OUT:
            say(f"stopped: the last {MOST_LEFT_OUT} iterations had no finite gradient; look at "
                "their frames, or continue with a lower --lr or with --amp none")
            sys.exit(1)

    def first_sample(self) -> int:
        """The first clip of this process in this iteration. The processes take clips in turns."""
        return self.iteration * self.args.batch_size + rank()

    def seed_dropout(self, part: int):
        """Make dropout's random numbers depend only on the seed and the first clip."""
        first = self.first_sample() + part * self.share * self.processes
        seed = np.random.SeedSequence((self.args.seed, 2, first)).generate_state(1)[0]
        torch.manual_seed(int(seed))

    def set_training_mode(self):
        """Set the model to training mode, except for a frozen part."""
        self.model.train()
        if self.args.freeze_segformer:
            self.model.segformer.eval()

    # --------------------------------------------------------------------------------- evaluation

    def evaluate(self, videos: list[Video], done: bool):
        """Evaluate; print, log, and keep the checkpoint if it is the best so far. In the end also
        evaluate an MRCFA's single frames: the difference is what the references add."""
        args = self.args
        if self.processes > 1:  # the first process's BatchNorm statistics are those in last.pt
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        self.save("last.pt")
        self.model.eval()  # from here on a signal is answered at once
        if self.signal:
            raise KeyboardInterrupt
        segment = partial(segment_video, frame_size=args.frame_size)
        methods = {args.model: partial(segment, model=self.model)}
        if done and isinstance(self.model, MRCFA):
            methods["single_frames"] = partial(segment, model=self.model.segformer)
        results = evaluate(methods, videos, args.classes, pictures=args.out / "pictures")
        self.set_training_mode()
        metrics = results[args.model].compute()
        self.log(**metrics)
        if metrics["mIoU"] > self.best:
            self.best = metrics["mIoU"]
            self.save("best.pt")
        self.save("last.pt")
        if rank() == 0:
            tqdm.write(f"iteration {self.iteration}\n{metrics_table(results)}")

    # ------------------------------------------------------------------- checkpoints, log, signals

    def save(self, name: str):
        """Write a checkpoint that holds all it takes to rebuild the model and continue the run."""
        if rank() > 0:
            return
        config = vars(self.args) | {"data": str(self.args.data)}
        for key in NOT_SAVED:
            del config[key]
        content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                   "iteration": self.iteration, "best": self.best, "config": config}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_whole(self.args.out / name, buffer.getbuffer())

    def resume(self, checkpoint: dict):
        """Take over the state in last.pt."""
        try:
            load_strictly(self.model, checkpoint["model"])
        except InputError as error:
            raise InputError(f"{self.args.out / 'last.pt'}: {error}") from None
        groups = checkpoint["optimizer"]["param_groups"]
        for group, own in zip(groups, self.optimizer.param_groups, strict=True):
            group["base_lr"], group["fused"] = own["base_lr"], own["fused"]  # may have changed
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.iteration, self.best = checkpoint["iteration"], checkpoint["best"]
        say(f"continuing at iteration {self.iteration} of {self.args.iters}")

    def log(self, **values: float):
        """Append a line to log.jsonl. After a crash an iteration can have two."""
        if rank() == 0:
            line = json.dumps({"iteration": self.iteration, **without_nan(values)})
            with open(self.args.out / "log.jsonl", "a") as file:
                file.write(line + "\n")

    def on_signal(self, number: int, _):
        """Stop after the iteration, or at once in an evaluation, which --resume repeats.

        A second signal ends the process, but not under torchrun, which sends each signal twice.
        """
        if not dist.is_initialized():
            signal.signal(number, signal.SIG_DFL)
        is_first = not self.signal
        self.signal = number
        if is_first and not self.model.training:
            raise KeyboardInterrupt

    def leave(self, how: str):
        """End the process, and print how to continue."""
        launcher = "torchrun ..." if self.processes > 1 else "python"
        say(f"\n{how} at iteration {self.iteration}; to go on: {launcher} train.py --resume "
            f"--out {shlex.quote(str(self.args.out))}")
        sys.exit(128 + (self.signal or signal.SIGTERM))


# --------------------------------------------------------------------------------- command line

def make_parser() -> ArgumentParser:
    """The flags. What has no default here gets that of the data set's recipe."""
    parser = ArgumentParser("Train MRCFA or SegFormer on labelled videos. Defaults are those of "
                            "the synthetic videos; RECIPES in train.py has the others.")
    add = parser.add_argument_group("the run").add_argument
    add("--model", choices=MODELS, default="mrcfa_b0", metavar="NAME",
        help="mrcfa_b0 ... b5, segformer_b0 ... b5")
    add("--dataset", choices=RECIPES,
        help="data set and its recipe, by default as --data looks like")
    add("--out", type=Path, metavar="DIR",
        help="folder of this run, never overwritten (default: runs/MODEL)")
    add("--resume", action="store_true",
        help="continue the run in --out with its own flags, or start it")
    add("--pretrained", metavar="FILE | OWNER/NAME",
        help="weights of MiT, SegFormer or MRCFA to start from; nvidia/mit-b0 ... are downloaded")
    add("--seed", type=between(0), default=0, help="seed of initialisation, clips and dropout")
    add("--workers", type=between(0), default=2,
        help="processes that load clips; more if the GPU is idle")
    add("--log-every", type=between(1), default=50, help="iterations per line of log.jsonl")
    add("--save-every", type=between(1), default=500,
        help="iterations between checkpoints, which a crash can cost")
    add("--eval-every", type=between(0),
        help="iterations between evaluations (on real data a tenth of the run); 0: only at the end")

    add = parser.add_argument_group("clips").add_argument
    add("--batch-size", type=between(1),
        help="clips per iteration, over all processes; the paper has 8")
    add("--scale-range", type=between(0.1, kind=float), nargs=2, metavar=("MIN", "MAX"),
        help="range of a random factor on the frames' size; 1 1 turns it off")
    add("--crop", type=between(1), nargs=2, metavar=("H", "W"),
        help="size of random crops, multiples of 32; half of them are mirrored")

    add = parser.add_argument_group("optimiser").add_argument
    add("--accumulate", type=between(1), default=1,
        help="split each process's clips into N parts, one after the other, to save memory")
    add("--iters", type=between(1), help="iterations, over which the learning rate falls to 0")
    add("--lr", type=between(0, kind=float), help="the encoder's learning rate; more from scratch")
    add("--head-lr", type=between(0, kind=float), metavar="FACTOR",
        help="learning-rate multiplier of all other layers; 1 from scratch")
    add("--warmup", type=between(0),
        help="iterations over which the rate rises, by default a tenth or fewer")

    add = parser.add_argument_group("MRCFA, and what it is without its parts").add_argument
    add("--reference-stride", type=int, choices=(16, 32),
        help="stride of the reference tokens; 16 is finer and slower")
    add("--freeze-segformer", action="store_true",
        help="train only MRCFA's own layers, on the SegFormer of --pretrained")
    add("--positive-kernels", action=argparse.BooleanOptionalAction,
        help="start SAR and MAA, unless --pretrained has them, with positive kernels: not in the "
             "paper, but faster to learn")
    add("--sar", dest="refine", action=argparse.BooleanOptionalAction, default=True,
        help="refine affinities with SAR")
    add("--maa", dest="aggregate", action=argparse.BooleanOptionalAction, default=True,
        help="merge scales with MAA, or use only the finest")
    add_shared_arguments(parser)
    parser.set_defaults(labels="dense", first_label=1, offsets=OFFSETS)
    return parser


def parse_args() -> tuple[argparse.Namespace, dict | None]:
    """The command line, and the checkpoint of a run that is continued. It is parsed twice: to find
    that run or the recipe, and then with their values as defaults."""
    parser = make_parser()
    parser.set_defaults(**RECIPES["synthetic"])  # for --help
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
    if args.data is None and args.dataset != "synthetic":
        parser.error(f"--data DIR is missing: the folder of the {args.dataset} data set")
    if args.crop[0] % STRIDE or args.crop[1] % STRIDE:
        parser.error(f"--crop {args.crop[0]} {args.crop[1]}: both must be multiples of {STRIDE}")
    if args.freeze_segformer and not (args.model.startswith("mrcfa") and args.pretrained):
        parser.error("--freeze-segformer needs an MRCFA as --model, and --pretrained FILE with the "
                     "SegFormer to freeze")
    args.data = args.data or SYNTHETIC
    args.device = torch.device(args.device)
    for name in FIXED if checkpoint else ():
        before, now = checkpoint["config"][name], getattr(args, name)
        if before != now:
            flag = name.replace("_", "-")
            parser.error(f"--{flag}: the run in {args.out} has {before} and can't change to {now}; "
                         "leave the flag out, or give another --out")
    return args, checkpoint


# ----------------------------------------------------------------------------------------- a run

def main():
    """Train and evaluate as the command line asks, as one of several processes under torchrun."""
    args, checkpoint = parse_args()
    join_processes(args)
    if args.batch_size % (world_size() * args.accumulate):
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of {world_size()} "
                         f"processes x --accumulate {args.accumulate}")
    if not checkpoint:
        refuse_to_overwrite(args.out, "continue that run (--resume) or name another folder (--out)")
        if args.resume:
            say(f"no run in {args.out} yet: starting it")
    clips, val = prepare_data(args, checkpoint)
    run = Run(args, prepare_model(args, checkpoint), clips)
    if checkpoint:
        run.resume(checkpoint)
    if len(set(gather(run.iteration))) > 1:     # and all have seen what is in the folder
        raise InputError(f"{args.out}: not all processes find the same run there; several machines "
                         "must share this folder")
    say(what_runs(run, val))
    if not checkpoint:
        run.save("last.pt")     # from here on there is a run to resume
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, run.on_signal)
    try:
        run.train(val)
    except KeyboardInterrupt:
        run.leave("interrupted in the evaluation")
    if rank() == 0:
        print(f"the run is in {args.out}: checkpoints, log and pictures")


def prepare_data(args: argparse.Namespace, checkpoint: dict | None
                 ) -> tuple[ClipDataset, list[Video]]:
    """The training clips and the videos to validate with. Each machine's first process makes or
    fetches what is missing."""
    if not dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        if args.dataset == "synthetic" and not args.data.exists():
            write_synthetic(args.data)
        if args.pretrained and not checkpoint:
            download_pretrained(args.pretrained)
    gather(None)                # until everything is there
    classes = read_classes(args.data, default=VSPW_CLASSES if args.dataset == "vspw" else ())
    if checkpoint:
        before = checkpoint["config"]["data"]
        if before != str(args.data):
            say(f"warning: {args.out} was trained on {before} so far, now {args.data}; best.pt "
                "has the best mIoU on either")
        check_same_classes(args.classes, classes, args.out / "last.pt", args.data)
    args.classes = classes
    read = partial(read_split, args.data, offsets=args.offsets, sparse=args.labels == "sparse",
                   first_label=args.first_label)
    train = read("train", training=True)
    val = read("val") if args.model.startswith("mrcfa") else read("val", offsets=())
    check_labels(train, classes, "train")
    check_labels(val, classes, "val")
    clips = ClipDataset(train, len(classes), args.offsets, args.crop, args.frame_size,
                        args.scale_range, args.seed)
    return clips, val


def prepare_model(args: argparse.Namespace, checkpoint: dict | None) -> nn.Module:
    """The model on its device, with the weights that the command line asks for."""
    torch.manual_seed(args.seed)
    model = build_model(args.model, model_arguments(vars(args)))
    if args.positive_kernels and isinstance(model, MRCFA):
        positive_kernels(model)
    if args.pretrained and not checkpoint:
        path = download_pretrained(args.pretrained)
        untrained = load_weights(model, path, args.classes)
        if args.freeze_segformer and untrained:
            raise InputError(f"--freeze-segformer: {path} has no weights for this SegFormer's "
                             f"{' and '.join(untrained)}; train a segformer on these videos first")
    elif args.lr == VSPW_RECIPE["lr"] and not args.pretrained:
        say(f"warning: --lr {args.lr:g} is for pretrained weights (--pretrained); from scratch, "
            "--lr 1e-3 --head-lr 1 learns faster")
    if args.freeze_segformer:
        model.segformer.requires_grad_(False)
    if dist.is_initialized() and args.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(args.device)


def what_runs(run: Run, val: list[Video]) -> str:
    """A line on what is trained, how and on what."""
    args, clips = run.args, run.clips
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
    targets = sum(len(targets) for directions in clips.directions for _, targets in directions)
    too_short = f" ({clips.too_short} are too short for --dilation)" if clips.too_short else ""
    return (f"{args.model}, training {trained:.1f} M parameters on {run.processes} x {args.device} "
            f"with --amp {args.amp}: {args.iters} iterations of {args.batch_size} clips, "
            f"{run.share} at a time; {len(clips.directions)} training videos{too_short} with "
            f"{targets} possible clips; {len(val)} validation videos")


if __name__ == "__main__":
    run_script(main)
