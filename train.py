"""Train MRCFA, or the SegFormer it sits on, on labelled videos.

    python train.py                                        # mrcfa_b0 on synthetic videos, in minutes on a CPU
    python train.py --dataset vspw --data VSPW --model mrcfa_b1 --pretrained mit_b1.pth --out runs/vspw_b1
    torchrun --nproc_per_node 4 train.py --batch-size 2 --dataset vspw ...      # the paper's 4 GPUs x 2 clips
    python train.py --resume --out runs/vspw_b1            # goes on where that run was stopped, however it was

The run's folder gets last.pt, best.pt (by mIoU), pictures and log.jsonl, an object a line. Clips, augmentation and
dropout of step i depend on (seed, i) alone, so a run that was stopped ends as one that wasn't, bit for bit on a CPU.
"""
import argparse
import json
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import STRIDE, ClipDataset, Video, read_classes, read_split, write_synthetic
from eval import (MODELS, ArgumentParser, autocast, build_model, command_line, evaluate, load_weights, positive,
                  refuse_to_overwrite, segment_video, table)
from mrcfa import MRCFA, OFFSETS, mrcfa_loss
from segformer import load_strictly, read_checkpoint, segmentation_loss

# What a data set is trained with unless a flag says otherwise; VSPW's row is the recipe of the paper.
RECIPE = ("frame_size", "scale_range", "crop", "reference_stride", "positive_kernels",
          "batch_size", "iters", "lr", "head_lr", "warmup")
RECIPES = {
    "synthetic":  ((128, 96), (1.0, 1.0), (96, 128), 16, True, 4, 800, 1e-3, 1.0, 50),
    "folder":     ((853, 480), (0.5, 2.0), (480, 480), 32, False, 8, 40_000, 6e-5, 10.0, 1500),
    "vspw":       ((853, 480), (0.5, 2.0), (480, 480), 32, False, 8, 160_000, 6e-5, 10.0, 1500),
    "cityscapes": ((1024, 512), (0.5, 2.0), (512, 1024), 16, False, 8, 160_000, 6e-5, 10.0, 1500),
}
SYNTHETIC = Path("data/synthetic")
BETAS = (0.9, 0.999)      # of AdamW
WARMUP_START = 1e-6       # the share of the learning rate that the warm-up begins with
PLACE = ("out", "resume", "device")  # arguments of where a run happens; a checkpoint's `config` has all the others
PROGRESS = ("iteration", "evaluated", "best", "losses", "lines")  # what a run knows beside its networks: see Run


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The training loss of clips (B, T, 3, h, w) and labels (B, T, h, w) or, of the targets alone, (B, h, w)."""
    if isinstance(getattr(model, "module", model), MRCFA):
        frame_logits, clip_logits = model(images)
        return mrcfa_loss(frame_logits, clip_logits, labels)
    if labels.ndim == 3:
        images, labels = images[:, -1:], labels[:, None]
    return segmentation_loss(model(images.flatten(0, 1)), labels.flatten(0, 1))


def parameter_groups(model: nn.Module, args: argparse.Namespace) -> list[dict]:
    """AdamW's groups: the encoder, its LayerNorms without decay, and everything else at `head_lr` times the rate."""
    encoder: Any = getattr(model, "segformer", model).encoder
    inside = set(encoder.parameters())
    norms = {p for module in encoder.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    groups = ((inside - norms, args.lr, args.weight_decay), (norms, args.lr, 0.0),
              (set(model.parameters()) - inside, args.lr * args.head_lr, args.weight_decay))
    return [{"params": [p for p in model.parameters() if p in group], "base_lr": lr, "weight_decay": decay}
            for group, lr, decay in groups]


def lr_factor(i: int, iters: int, warmup: int) -> float:
    """What iteration i's learning rate is of the base: linear down to 0, after a linear warm-up."""
    return (1 - i / iters) * (1 - (max(0, 1 - i / warmup) if warmup else 0) * (1 - WARMUP_START))


def write_whole(path: Path, write: Callable[[BinaryIO], Any]):
    """Let `write` write a file, whole or not at all: under another name, down to the disk, then renamed."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def leave_signals(_: int):
    """What a loader's worker does about Ctrl-C and signals to all of a run's processes: leave them to the training."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


class Run:
    """A training and its folder: the model, the checkpoints and the log. One for each process, the first one writes."""

    def __init__(self, args: argparse.Namespace, model: nn.Module):
        self.args, self.model = args, model
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.optimizer = torch.optim.AdamW(parameter_groups(model, args), betas=BETAS)
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "fp16")
        self.signal = 0                                         # that told it to stop
        self.iteration, self.evaluated, self.best = 0, 0, -1.0  # `evaluated`: when that was, last
        self.losses: list[float] = []                           # since the log's last line
        self.lines: list[str] = []                              # of the log

    def resume(self, checkpoint: dict):
        """Take over the state of last.pt, and forget what the log says of later iterations."""
        load_strictly(self.model, checkpoint["model"])
        for group, own in zip(checkpoint["optimizer"]["param_groups"], self.optimizer.param_groups):
            group.update(base_lr=own["base_lr"], weight_decay=own["weight_decay"])  # flags may have changed them
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # there is nothing in it without fp16
            self.scaler.load_state_dict(checkpoint["scaler"])
        vars(self).update((name, checkpoint[name]) for name in PROGRESS)
        if self.rank == 0:
            write_whole(self.args.out / "log.jsonl", lambda file: file.write("".join(self.lines).encode()))
            print(f"going on at iteration {self.iteration} of {self.args.iters}", file=sys.stderr)

    def save(self, name: str):
        """Write a checkpoint that rebuilds the model by itself and continues the run."""
        if self.rank == 0:
            config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()
                      if key not in PLACE}
            content = {"model": self.model.state_dict(), "config": config, "optimizer": self.optimizer.state_dict(),
                       "scaler": self.scaler.state_dict(), **{name: getattr(self, name) for name in PROGRESS}}
            write_whole(self.args.out / name, lambda file: torch.save(content, file))

    def log(self, **values):
        """Add a line to log.jsonl."""
        self.lines.append(json.dumps({"iteration": self.iteration, **values}).replace("NaN", "null") + "\n")
        if self.rank == 0:
            with open(self.args.out / "log.jsonl", "a") as file:
                file.write(self.lines[-1])

    def evaluate(self, videos: list[Video]):
        """Evaluate; print, log, and keep the checkpoint if it is the best so far."""
        if self.processes > 1:  # the first process's BatchNorm statistics are the ones that are saved
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        methods = {self.args.model: partial(segment_video, model=self.model.eval(), frame_size=self.args.frame_size)}
        results = evaluate(methods, videos, self.args.classes, pictures=self.args.out / "pictures")
        metrics = results[self.args.model].compute()
        if self.rank == 0:
            tqdm.write(f"iteration {self.iteration}\n{table({self.args.model: metrics})}")
        self.log(**metrics)
        self.evaluated = self.iteration
        if metrics["mIoU"] > self.best:
            self.best = metrics["mIoU"]
            self.save("best.pt")
        self.save("last.pt")
        self.model.train()

    def samples(self, start: int, end: int) -> list[int]:
        """Which of the data set's clips this process takes in iterations start ... end - 1."""
        batches = range(start * self.args.accumulate, end * self.args.accumulate)
        firsts = (self.args.batch_size * (batch * self.processes + self.rank) for batch in batches)
        return [first + i for first in firsts for i in range(self.args.batch_size)]

    def step(self, network: Any, batches) -> float:
        """The mean loss of an iteration's `accumulate` batches, and its gradients."""
        args, total = self.args, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(self.iteration, args.iters, args.warmup)
        self.optimizer.zero_grad()
        for i in range(args.accumulate):
            images, labels = (x.to(args.device, non_blocking=True) for x in next(batches))
            share = (self.iteration * args.accumulate + i) * self.processes + self.rank
            torch.manual_seed(int(np.random.SeedSequence((args.seed, 2, share)).generate_state(1)[0]))  # of dropout
            if self.processes > 1:
                network.require_backward_grad_sync = i == args.accumulate - 1
            with autocast(args.device, args.amp):
                loss = loss_of(network, images, labels) / args.accumulate
            self.scaler.scale(loss).backward()
            total += loss.item()
        return total

    def train(self, clips: ClipDataset, val: list[Video]):
        """Train from the current iteration to the last one."""
        args, network = self.args, self.model.train()
        if self.processes > 1:
            network = DistributedDataParallel(self.model)
        if args.compile:
            network.compile()
        batches = iter(DataLoader(clips, args.batch_size, sampler=self.samples(self.iteration, args.iters),
                                  num_workers=args.workers, worker_init_fn=leave_signals,
                                  pin_memory=args.device.type == "cuda"))
        with tqdm(total=args.iters, initial=self.iteration, desc=args.model, unit="it", dynamic_ncols=True,
                  disable=self.rank > 0) as bar:
            while True:
                last = self.iteration >= args.iters
                due = last or args.eval_every and self.iteration % args.eval_every == 0
                if due and self.evaluated < self.iteration:
                    self.evaluate(val)
                if last:
                    return
                own_loss = self.step(network, batches)
                status = torch.tensor([own_loss, self.signal > 0], device=args.device)  # which all processes share
                if self.processes > 1:
                    dist.all_reduce(status)
                loss, stop = status[0].item() / self.processes, bool(status[1] > 0)
                if not math.isfinite(own_loss):
                    ends = [str(clips.choose(i)[0][-1]) for i in self.samples(self.iteration, self.iteration + 1)]
                    print(f"\nstopped: the loss of iteration {self.iteration} is {own_loss}, of the clips that end "
                          f"with {', '.join(ends)}; {args.out / 'last.pt'} is from before it", file=sys.stderr)
                if not math.isfinite(loss):  # before it spoils the weights
                    sys.exit(1)
                self.losses.append(loss)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.iteration += 1
                lr, mean_loss = self.optimizer.param_groups[0]["lr"], float(np.mean(self.losses))
                bar.update()
                bar.set_postfix(loss=f"{mean_loss:.3f}", lr=f"{lr:.1e}")
                if self.iteration % args.log_every == 0 or self.iteration == args.iters:
                    self.log(loss=mean_loss, lr=lr, iterations_per_second=bar.format_dict["rate"])
                    self.losses = []
                if stop or self.iteration % args.save_every == 0 or self.iteration == args.iters:
                    self.save("last.pt")
                if stop and self.rank == 0:
                    print(f"\nstopped at iteration {self.iteration}; "
                          f"to go on: python train.py --resume --out {args.out}", file=sys.stderr)
                if stop:
                    sys.exit(128 + (self.signal or signal.SIGTERM))


def add_arguments(parser: argparse.ArgumentParser):
    """The flags, without the defaults that depend on the data set."""
    run = parser.add_argument_group("the run").add_argument
    run("--model", choices=MODELS, default="mrcfa_b0", metavar="NAME", help="mrcfa_b0 ... b5, segformer_b0 ... b5")
    run("--dataset", choices=RECIPES, help="whose recipe to train with: folder if there is --data, else synthetic")
    run("--data", type=Path, help=f"data folder; the synthetic videos are made in theirs, by default {SYNTHETIC}")
    run("--out", type=Path, help="folder of this run, by default runs/MODEL; an existing one is only ever continued")
    run("--resume", action="store_true", help="continue the run in --out with the arguments that it was started with")
    run("--pretrained", type=Path, metavar="FILE", help="to start from: MiT, SegFormer, a released MRCFA, or a last.pt")
    run("--seed", type=int, default=0, help="of initialisation, clips and dropout; several show the spread")
    run("--workers", type=int, default=2, help="processes that load clips: more if the network waits for them")
    run("--log-every", type=positive, default=50, help="iterations to average into a line of log.jsonl")
    run("--save-every", type=positive, default=500, help="iterations between checkpoints: what a crash costs at most")
    run("--eval-every", type=int, default=0, help="iterations between evaluations; 0 evaluates at the end alone")
    clips = parser.add_argument_group("clips").add_argument
    clips("--batch-size", type=positive, help="clips a process takes at a time; the paper's 8 are 4 GPUs x 2")
    clips("--dilation", dest="offsets", type=positive, nargs="+", default=OFFSETS, metavar="N",
          help="frames back to the references")
    clips("--frame-size", type=positive, nargs=2, metavar=("LONG", "SHORT"),
          help="scale frames to fit this, here and in evaluation; smaller is faster and coarser")
    clips("--scale-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="random factor on that; 1 1: as it is")
    clips("--crop", type=positive, nargs=2, metavar=("H", "W"), help="multiples of 32: memory and time depend on it")
    recipe = parser.add_argument_group("optimiser").add_argument
    recipe("--accumulate", type=positive, default=1, help="batches an iteration: a large one in little memory")
    recipe("--iters", type=positive, help="iterations, over which the learning rate falls to 0")
    recipe("--lr", type=float, help="AdamW's learning rate for the encoder; higher from scratch")
    recipe("--head-lr", type=float, help="times that for everything else; 1 from scratch, where nothing is ahead")
    recipe("--weight-decay", type=float, default=0.01, help="AdamW's, on all but the encoder's LayerNorms")
    recipe("--warmup", type=int, help="iterations over which the rate rises; fewer in a short training")
    model = parser.add_argument_group("MRCFA, and what it is without its parts").add_argument
    model("--reference-stride", type=int, choices=(16, 32), help="of reference tokens: 16 is finer, and slower")
    model("--positive-kernels", action=argparse.BooleanOptionalAction,
          help="begin SAR's and MAA's convolutions with positive kernels, which learns faster; the paper's may invert")
    model("--keep-ratio", type=float, metavar="P", help="share of tokens that STM keeps, if not the paper's; 1: all")
    model("--no-refine", dest="refine", action="store_false", help="leave out SAR")
    model("--no-aggregate", dest="aggregate", action="store_false", help="leave out MAA: the finest scale alone")


def parse_args() -> argparse.Namespace:
    """The command line of a training: flags, above the run that is resumed, above the data set's recipe."""
    parser = ArgumentParser("Train MRCFA or SegFormer on labelled videos. Defaults are those of the synthetic videos; "
                            "RECIPES in train.py has the other data sets'.")
    add_arguments(parser)
    parser.set_defaults(**dict(zip(RECIPE, RECIPES["synthetic"])))
    args = parser.parse_args()
    out = args.out or Path("runs") / args.model
    if args.resume:  # what the run was started with are the defaults now
        checkpoint = read_checkpoint(out / "last.pt")
        if not checkpoint.keys() >= {"optimizer", "scaler", *PROGRESS} or "iters" not in checkpoint.get("config", ()):
            parser.error(f"{out / 'last.pt'} is of no run, or of an earlier version; use it as --pretrained")
        parser.set_defaults(**checkpoint["config"])
    else:
        dataset = args.dataset or ("folder" if args.data else "synthetic")
        parser.set_defaults(dataset=dataset, **dict(zip(RECIPE, RECIPES[dataset])))
    args = parser.parse_args(namespace=argparse.Namespace(out=out))
    if args.data is None and args.dataset != "synthetic":
        parser.error(f"--data DIR is missing: the folder of the {args.dataset} data set")
    args.data, args.device = args.data or SYNTHETIC, torch.device(args.device)
    if args.crop[0] % STRIDE or args.crop[1] % STRIDE:
        parser.error(f"--crop {args.crop[0]} {args.crop[1]}: both must be multiples of {STRIDE}")
    if not 0.1 <= args.scale_range[0] <= args.scale_range[1] <= 10:
        parser.error(f"--scale-range {args.scale_range[0]} {args.scale_range[1]}: must rise, within 0.1 ... 10")
    for name in ("seed", "workers", "lr", "head_lr", "weight_decay", "warmup", "eval_every"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 0 or more")
    return args


def train(args: argparse.Namespace):
    """Train and evaluate in this process, alone or as one of several."""
    if not args.resume:
        refuse_to_overwrite(args.out, f"go on with that run (--resume --out {args.out}) or name another folder (--out)")
    new = not args.out.exists()
    if args.dataset == "synthetic" and not args.data.exists() and not int(os.environ.get("LOCAL_RANK", 0)):
        write_synthetic(args.data)
    if dist.is_initialized():
        dist.barrier()  # until the videos are there, and all have seen that the run's folder isn't
    args.classes = read_classes(args.data)
    videos, val = (read_split(args.data, split, args.offsets) for split in ("train", "val"))
    clips = ClipDataset(videos, len(args.classes), args.offsets, args.crop, args.frame_size, args.scale_range,
                        args.seed)
    torch.manual_seed(args.seed)
    model = build_model(vars(args))
    if args.positive_kernels and isinstance(model, MRCFA):
        # By chance a kernel sums up to less than 0: it makes a hole of an image's peak, and ReLU leaves nothing of it.
        for conv in (module for module in model.aggregation.modules() if isinstance(module, nn.Conv2d)):
            conv.weight.data.abs_()
    if args.pretrained and not args.resume:
        load_weights(model, read_checkpoint(args.pretrained), args.pretrained)
    if dist.is_initialized() and args.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    run = Run(args, model.to(args.device))
    if run.rank == 0 and clips.too_short:
        print(f"warning: {clips.too_short} of {len(videos)} training videos are left out: no labelled frame of theirs "
              f"has references {max(args.offsets)} frames away (--dilation)", file=sys.stderr)
    if args.resume:
        run.resume(read_checkpoint(args.out / "last.pt"))
    else:
        if run.rank == 0:
            args.out.mkdir(parents=True, exist_ok=not new)  # an error where another run was faster
        run.save("last.pt")  # from here on there is something to resume
    for number in (signal.SIGTERM, signal.SIGINT):  # the training ends after its step, or its evaluation
        signal.signal(number, lambda n, _: setattr(run, "signal", n))
    run.train(clips, val)
    if run.rank == 0:
        print(f"the run is in {args.out}: checkpoints, log and pictures")


def main():
    """Train and evaluate as the command line says; as one of several processes, if torchrun started this one."""
    args = parse_args()
    if "LOCAL_RANK" not in os.environ:
        return train(args)
    if args.device.type == "cuda":  # a GPU for each process
        args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
