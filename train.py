"""Train MRCFA, or the SegFormer it sits on, on labelled videos with the recipe of the paper.

    python train.py --model mrcfa_b1 --data VSPW --dataset vspw --pretrained mit_b1.pth --out runs/vspw_b1
    python train.py --resume --out runs/vspw_b1            # goes on where that run was stopped

The run's folder holds last.pt, best.pt (by mIoU) and log.jsonl, one JSON object an interval.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import FRAME_SIZE, SCALE_RANGE, STRIDE, ClipDataset, DataError, Video, read_classes, read_split
from eval import (MODELS, ArgumentParser, build_model, command_line, device, evaluate, json_metrics, positive,
                  refuse_to_overwrite, table)
from mrcfa import MRCFA, OFFSETS, REFERENCE_STRIDE, mrcfa_loss
from segformer import load_pretrained, load_strictly, read_checkpoint, segmentation_loss

BETAS = (0.9, 0.999)      # of AdamW
WARMUP_START = 1e-6       # the share of the learning rate that the warm-up begins with
PLACE = ("out", "resume", "device")  # arguments that belong to where a run happens, and aren't resumed


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The training loss of clips (B, T, 3, h, w) and labels (B, T, h, w); SegFormer takes each frame by itself."""
    if isinstance(model, MRCFA):
        return mrcfa_loss(*model(images), labels)
    return segmentation_loss(model(images.flatten(0, 1)), labels.flatten(0, 1))


def parameter_groups(model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> list[dict]:
    """AdamW's groups: the encoder, its LayerNorms without decay, and everything else at `head_lr` times the rate."""
    encoder = getattr(model, "segformer", model).encoder
    norms = [p for module in encoder.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()]
    taken, inside = set(norms), set(encoder.parameters())
    decayed, rest = ([p for p in encoder.parameters() if p not in taken],
                     [p for p in model.parameters() if p not in inside])
    return [{"params": decayed, "base_lr": lr, "weight_decay": weight_decay},
            {"params": norms, "base_lr": lr, "weight_decay": 0.0},
            {"params": rest, "base_lr": lr * head_lr, "weight_decay": weight_decay}]


def lr_factor(i: int, iters: int, warmup: int) -> float:
    """What iteration i's learning rate is of the base: linear down to 0, after a linear warm-up."""
    factor = 1 - i / iters
    return factor * (1 - (1 - i / warmup) * (1 - WARMUP_START)) if i < warmup else factor


def save_checkpoint(path: Path, content: dict):
    """Write a checkpoint whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Run:
    """A run's folder: its checkpoints and its log."""

    def __init__(self, args: argparse.Namespace, config: dict, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.args, self.config, self.model, self.optimizer = args, config, model, optimizer
        self.iteration, self.best = 0, -1.0

    def resume(self):
        """Take over the state of last.pt, and forget what the log says of later iterations."""
        path = self.args.out / "last.pt"
        checkpoint = read_checkpoint(path)
        load_strictly(self.model, checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.iteration, self.best = checkpoint["iteration"], checkpoint["best"]
        log = self.args.out / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if json.loads(line)["iteration"] <= self.iteration))

    def save(self, name: str):
        """Write a checkpoint that rebuilds the model by itself and continues the run."""
        args = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()
                if key not in PLACE}
        save_checkpoint(self.args.out / name, {
            "model": self.model.state_dict(), "config": self.config, "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration, "best": self.best, "args": args})

    def log(self, **values):
        """Add a line to log.jsonl."""
        with open(self.args.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"iteration": self.iteration, **values}) + "\n")

    def evaluate(self, videos: list[Video]):
        """Evaluate; print, log, and keep the checkpoint if it is the best so far."""
        metrics = evaluate(self.model, videos, len(self.config["classes"]), self.config["frame_size"]).compute()
        tqdm.write(f"iteration {self.iteration}\n{table(self.config['model'], metrics)}")
        self.log(**json_metrics(metrics))
        if metrics["mIoU"] > self.best:
            self.best = metrics["mIoU"]
            self.save("best.pt")

    def train(self, clips: ClipDataset, val: list[Video]):
        """Train from the current iteration to the last one."""
        args = self.args
        order = range(self.iteration * args.batch_size, args.iters * args.batch_size)
        loader = DataLoader(clips, args.batch_size, sampler=order, num_workers=args.workers)
        losses, since = [], time.time()
        self.model.train()
        with tqdm(total=args.iters, initial=self.iteration, desc=args.model, unit="it", dynamic_ncols=True) as bar:
            for images, labels in loader:
                torch.manual_seed((args.seed << 32) + self.iteration)  # dropout follows from (seed, iteration)
                for group in self.optimizer.param_groups:
                    group["lr"] = group["base_lr"] * lr_factor(self.iteration, args.iters, args.warmup)
                loss = loss_of(self.model, images.to(args.device), labels.to(args.device))
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                losses.append(loss.item())
                self.iteration += 1
                bar.update()
                bar.set_postfix(loss=f"{np.mean(losses):.3f}", lr=f"{self.optimizer.param_groups[0]['lr']:.1e}")

                if self.iteration % args.log_every == 0 or self.iteration == args.iters:
                    speed = len(losses) * args.batch_size / (time.time() - since)
                    self.log(loss=float(np.mean(losses)), lr=self.optimizer.param_groups[0]["lr"],
                             clips_per_second=round(speed, 3))
                    losses, since = [], time.time()
                if self.iteration % args.save_every == 0 or self.iteration == args.iters:
                    self.save("last.pt")
                if args.eval_every and self.iteration % args.eval_every == 0 and self.iteration < args.iters:
                    self.evaluate(val)
                    since = time.time()
        self.evaluate(val)
        self.save("last.pt")


def parse_args() -> argparse.Namespace:
    """The command line of a training; every value of the paper's recipe is the default of a flag."""
    parser = ArgumentParser("Train MRCFA or SegFormer on labelled videos.")
    run = parser.add_argument_group("the run").add_argument
    run("--model", choices=MODELS, default="mrcfa_b0", metavar="NAME",
        help="mrcfa_b0 ... mrcfa_b5, or the baseline segformer_b0 ... segformer_b5")
    run("--data", type=Path, help="data folder with train.txt, val.txt and data/<video>/{origin,mask}")
    run("--out", type=Path, help="folder of this run, by default runs/MODEL; an existing one is only ever continued")
    run("--resume", action="store_true", help="continue the run in --out with the arguments that it was started with")
    run("--pretrained", type=Path, help="ImageNet or SegFormer weights to start from: far better than from scratch")
    run("--seed", type=int, default=0, help="of initialisation, clips and dropout; several show the spread")
    run("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="where the network runs")
    run("--workers", type=int, default=2, help="processes that load clips: more if the network waits for them")
    run("--log-every", type=positive, default=50, help="iterations to average into a line of log.jsonl")
    run("--save-every", type=positive, default=500, help="iterations between checkpoints: what a crash costs at most")
    run("--eval-every", type=int, default=0, help="iterations between evaluations; 0 evaluates at the end alone")

    clips = parser.add_argument_group("clips").add_argument
    clips("--batch-size", type=positive, default=8, help="clips an iteration; the paper's 8 are 4 GPUs x 2")
    clips("--dilation", type=positive, nargs="+", default=OFFSETS, metavar="N",
          help="how many frames back the references lie; less where frames are far apart in time")
    clips("--frame-size", type=positive, nargs=2, default=FRAME_SIZE, metavar=("LONG", "SHORT"),
          help="scale frames to fit this, here and in evaluation; smaller is faster and coarser")
    clips("--scale-range", type=float, nargs=2, default=SCALE_RANGE, metavar=("MIN", "MAX"),
          help="random factor on the frame size in training; 1 1 keeps sizes as they are")
    clips("--crop", type=positive, nargs=2, default=(480, 480), metavar=("H", "W"),
          help="random crop, multiples of 32: memory and time depend on it")

    recipe = parser.add_argument_group("model and optimiser").add_argument
    recipe("--reference-stride", type=int, choices=(16, 32), default=REFERENCE_STRIDE,
           help="of MRCFA's reference tokens: 16 sees finer things at four times the affinities")
    recipe("--iters", type=positive, default=160_000, help="iterations, over which the learning rate falls to 0")
    recipe("--lr", type=float, default=6e-5, help="AdamW's learning rate for the encoder; higher from scratch")
    recipe("--head-lr", type=float, default=10.0,
           help="times that for everything else; 1 from scratch, where nothing is ahead")
    recipe("--weight-decay", type=float, default=0.01, help="AdamW's, on all but the encoder's LayerNorms")
    recipe("--warmup", type=int, default=1500, help="iterations over which the rate rises; fewer in a short training")

    args = parser.parse_args()
    args.out = args.out or Path("runs") / args.model
    if args.resume:  # what the run was started with are the defaults now
        saved = load_for_resume(args.out)["args"]
        parser.set_defaults(**saved)
        args = parser.parse_args(namespace=argparse.Namespace(out=args.out))
    if args.data is None:
        parser.error("--data DIR is missing: the folder with train.txt, val.txt and data/")
    if args.crop[0] % STRIDE or args.crop[1] % STRIDE:
        parser.error(f"--crop {args.crop[0]} {args.crop[1]}: both must be multiples of {STRIDE}")
    if not 0 < args.scale_range[0] <= args.scale_range[1]:
        parser.error(f"--scale-range {args.scale_range[0]} {args.scale_range[1]}: must rise, from above 0")
    return args


def load_for_resume(out: Path) -> dict:
    """The last checkpoint of a run."""
    try:
        return read_checkpoint(out / "last.pt")
    except ValueError as error:
        raise DataError(f"can't resume: {error}") from None


def main():
    """Train and evaluate as the command line says."""
    args = parse_args()
    if not args.resume:
        refuse_to_overwrite(args.out)
    classes, train, val = read_classes(args.data), read_split(args.data, "train"), read_split(args.data, "val")
    clips = ClipDataset(train, len(classes), args.dilation, args.crop, args.frame_size, args.scale_range, args.seed)
    if clips.too_short:
        print(f"warning: {clips.too_short} of {len(train)} training videos are too short for --dilation "
              f"{max(args.dilation)} and left out", file=sys.stderr)

    torch.manual_seed(args.seed)
    config = {"model": args.model, "classes": classes, "reference_stride": args.reference_stride,
              "offsets": list(args.dilation), "frame_size": list(args.frame_size)}
    model = build_model(config)
    if args.pretrained and not args.resume:
        try:
            load_pretrained(model, args.pretrained)
        except ValueError as error:
            raise DataError(f"--pretrained {args.pretrained}: {error}") from None
    model.to(args.device)
    groups = parameter_groups(model, args.lr, args.head_lr, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=BETAS)
    run = Run(args, config, model, optimizer)
    if args.resume:
        run.resume()
    args.out.mkdir(parents=True, exist_ok=True)
    run.train(clips, val)


if __name__ == "__main__":
    command_line(main)
