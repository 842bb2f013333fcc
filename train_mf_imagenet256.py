"""CMT for Mean Flow on ImageNet 256x256: a weak net of size B/4 teaches one of size XL/2 (Eq. 8, App. B.4).

  python train_mf_imagenet256.py --data digits              # laptop: all stages in minutes, no download
  python train_mf_imagenet256.py --stage encode --source ILSVRC2012_img_train    # SD-VAE latents
  torchrun --nproc_per_node=8 train_mf_imagenet256.py               # the paper: MF-B/4, CMT, MF-XL/2
  torchrun --nproc_per_node=8 train_mf_imagenet256.py --mid none --post vanilla --out out/scratch
  torchrun --nproc_per_node=8 train_mf_imagenet256.py --mid none --init teacher --teacher SiT-XL-2-256.pt
  python train_mf_imagenet256.py --data digits --stage sample --seeds 0-63

pretrain: train the teacher, a small Mean Flow net. mid: regress the student onto the mean velocities between
all states of the teacher's roll-outs (Eq. 8). post: Mean Flow again. Paper: 1-step FID 3.34 in half the time.
Run the same command again to resume. Copy and fork. "choice": ours, not the paper's; "trap": a bug avoided.
New here: t from 1 to 0, u(z, t, r), du/dt, guidance in training, all pairs of states.
"""
# /// script
# dependencies = ["torch", "numpy", "lpips", "pillow", "scipy"]
# ///
import json
import math
import os
import re
import signal
import sys
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import fid                      # the score, and what runs share; it reads tables of this file (its docstring)
import nets                     # networks, their weights, distances
import solvers                  # trajectories, few-step samplers, seeds
from fid import INITS, count, fail, log, report
from solvers import fold, randn


# ---- knobs ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:                   # later ones win: default, matching rows of PRESETS, --field, --stage.field
    data: str = "imagenet"      # imagenet | digits | folder of latents: shards of --stage encode, or .npy
    stage: Literal["all", "encode", "pretrain", "mid", "post", "sample", "eval"] = "all"  # all: not finished
    out: str = ""               # folder of the run; "" = out/<data>, out/digits-mf
    source: str = ""            # encode: folder of ImageNet's class folders
    teacher: str = ""           # FILE, URL of a Mean Flow net or a SiT; "" = <out>/pretrain.pt
    pretrain: Literal["mf", "fm"] = "mf"     # teacher: Mean Flow (B.4) or flow matching (SiT)
    mid: Literal["cmt", "none"] = "cmt"                  # Eq. 8
    post: Literal["mf", "vanilla", "teacher"] = "mf"  # vanilla: by MF's own numbers; teacher: by its v
    init: str = "random"        # first weights: random | teacher (B.4: SiT) | FILE; sample, eval: show FILE
    weak: str = "dit-b/4"       # size of the teacher: row of nets.SIZES, or PATCHxWIDTHxDEPTH[xHEADS]
    size: str = "dit-xl/2"      # size of the student

    steps: int = 400_320        # optimiser steps; 80 epochs of batch 256 (MF, B/4)
    batch: int = 256            # images or pairs per step, over all processes (MF)
    batch_gpu: int = 0          # how many at once per process, to save memory; gradients accumulate; 0 = all
    lr: float = 1e-4            # learning rate of Adam (MF; B.4)
    decay: Literal["linear", "constant"] = "constant"    # of lr, to zero (B.4: constant)
    warmup: int = 0             # steps of linear warm-up; MF: none
    ema_beta: float = 0.9999    # share of the average weights that a step keeps (MF)
    class_dropout: float = 0.1  # share of samples (mid: trajectories) that get the null class (MF)

    omega: float = 0.2          # guided: omega v + kappa u(y) + (1 - omega - kappa) u(null), u at r = t;
    kappa: float = 0.92         # scale omega / (1 - kappa), one for all stages (B.4; MF-XL/2: 0.2, 0.92) ...
    guide_from: float = 0.0     # ... and only at times t from here ...
    guide_to: float = 0.75      # ... to here
    unguided: int = 100_080     # --mid none --init teacher: steps before guidance (B.4: 20 epochs)

    ratio: float = 0.25         # share of samples with r < t (MF)
    P_mean: float = -0.4        # logit t, logit r ~ N(P_mean, P_std^2), the larger is t (MF)
    P_std: float = 1.0
    power: float = 1.0          # p of the adaptive weight 1 / (|error|^2 + c)^p (MF)

    nodes: int = 8              # mid: states of a trajectory, the teacher's steps + 1: 28 pairs (B.4); 9: 36
    trajectories: int = 256     # choice: per solve; their pairs, shuffled, fill 64 steps of 112 (B.4)

    nfe: int = 8                # steps of the third score; 1 and 2 are the others; trajectories: --nodes
    labels: Literal["both", "random", "balanced"] = "both"    # of samples: drawn by seed, or seed % classes
    seeds: str = "0-63"         # sample: FIRST-LAST[:STEP]; 7-997:10 of balanced labels: class 7
    samples: int = 50_000       # eval: images per score
    repeat: int = 1             # eval: scores with fresh seeds, reported as mean, deviation and minimum
    vae: str = ""               # encode, decode: NAME, FOLDER; "" = the data's, else sd-vae-ft-mse (MF)

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "tf32"    # mid: bf16; du/dt never less than tf32
    compile: bool = False       # the net, and the function with the Jacobian product; --no-compile: not
    seed: int = 0
    log_every: int = 100
    save_every: int = 5_000     # steps between checkpoints and previews
    dry_run: bool = False       # say what would be skipped and trained and what is missing, and end


PRESETS = {  # (data, stage, its --mid or --post): later rows win, --help shows the result; "own" = a path
    ("*", "encode", "*"): dict(batch_gpu=32),                            # pictures at a time, twice: mirrored
    ("imagenet", "*", "*"): dict(compile=True),         # choice: twice as fast on an H200 (docs/costs.md)
    ("*", "pretrain", "fm"): dict(power=0.0),                                            # SiT: squared error
    # choice: a fixed target is drawn and learned in bf16 no worse than in fp32: measured on digits
    ("*", "mid", "*"): dict(steps=200_000, batch=112, precision="bf16",
                            ema_beta=0.999),                             # choice: EMA of mid-training
    # choice: iterations of post-training, not stated: from Table 4's 587 h, at the speed of its other rows
    ("*", "post", "*"): dict(steps=1_860_000, batch=64),                                   # B.4: 64
    ("*", "post", "vanilla"): dict(steps=1_200_960, batch=256),                            # MF: 240 epochs
    # choice: by the teacher's velocity, squared error, and less often r = t: measured on digits
    ("*", "post", "teacher"): dict(power=0.0, ratio=0.75),
    ("digits", "*", "*"): dict(out="out/digits-mf", precision="fp32", weak="4x64x2", size="4x128x4",
                               save_every=500, samples=2_000, labels="balanced", omega=1.0, kappa=0.0,
                               decay="linear", warmup=20),
    ("digits", "pretrain", "*"): dict(steps=1_500, batch=64, lr=4e-3, ema_beta=0.99),
    ("digits", "mid", "*"): dict(steps=1_500, batch=32, lr=4e-3, ema_beta=0.99, trajectories=64),
    ("digits", "post", "*"): dict(steps=1_000, batch=64, lr=4e-3, ema_beta=0.99, unguided=250),
    ("digits", "post", "vanilla"): dict(steps=1_900),                      # the time of mid and post together
}
ABOUT = {"pretrain": "stage 1 of 4, pre-training: squared errors fall; the loss in the log stays near 1",
         "pretrain fm": "stage 1 of 4, pre-training: the loss, a squared error, falls, but soon slowly",
         "mid": "stage 2 of 4, mid-training (Eq. 8): squared errors fall, and so does their mean, the loss",
         "post": "stage 3 of 4, post-training: squared errors fall slowly; the loss in the log stays near 1",
         "post teacher": "stage 3 of 4, post-training: the loss, a squared error, falls slowly",
         "eval": "stage 4 of 4, scores: every net's images compared with the data; lower is better"}
STAGES = ["pretrain", "mid", "post", "eval"]          # what --stage all runs, in this order: fid.stages_of
NO_TEACHER = ["mf", "vanilla"]                        # post-trainings that ask no teacher
FILES = {"imagenet": "data/imagenet256-sd"}
REFERENCE = {"imagenet": "imagenet256"}               # scored by ADM's statistics, others by their own
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
parse = partial(fid.parse, sys.modules[__name__])     # (argv) -> Config
RANK, WORLD, DEVICE = 0, 1, torch.device("cpu")       # of this process; launch() sets them


# ---- pairs and losses -------------------------------------------------------------------------
# z: README's x_t, a state between an image, t = 0, and noise, t = 1; u(z, t, r): mean velocity from t to r
def solve_size(cfg):
    """(n, pairs): trajectories per solve, and how many pairs each gives: all pairs of its states."""
    return cfg.trajectories, cfg.nodes * (cfg.nodes - 1) // 2


@torch.no_grad()
def teacher_pairs(cfg, teacher, shape, g):
    """Eq. 8: all pairs of states from --trajectories roll-outs of the frozen teacher, with random classes.

    Every process rolls out its share and gets all. Returns shuffled z, t, r, y and the target, the mean
    velocity from z_t to z_r, each (P n, ...): see pairs_of_states.
    """
    n, times = cfg.trajectories, torch.linspace(1, 0, cfg.nodes, dtype=torch.float64)
    mine = slice(RANK * n // WORLD, (RANK + 1) * n // WORLD)
    eps = randn((n, *shape), g)[mine]
    y = torch.randint(teacher.num_classes, (n,), generator=g, device=g.device)
    dropped = torch.rand(n, generator=g, device=g.device) < cfg.class_dropout
    y = torch.where(dropped, teacher.num_classes, y)  # choice: null trajectories too, for guidance in post
    with torch.autocast(DEVICE.type, HALF.get(cfg.precision), enabled=cfg.precision in HALF):
        states = rollout(cfg, teacher, eps, y[mine], times)
    z, t, r, target = pairs_of_states(gather(states), times)
    order = torch.randperm(len(z), generator=g, device=g.device)
    return [a[order] for a in (z, t, r, y.repeat(len(z) // n), target)]


@torch.no_grad()
def rollout(cfg, net, z, y, times):
    """States (N+1, B, ...) from z (B, ...) down `times` (N+1,).

    A Mean Flow net jumps. A flow-matching net is integrated by Heun's rule and guided by omega / (1 - kappa)
    at times in the interval; where there is no class, that changes nothing.
    """
    if net.r_embedder is not None:                    # two clocks, t and r: a Mean Flow
        return solvers.mean_flow(lambda x, t, r: net(x, t, r, y), z, times)
    # where loss_mf is 0, u = omega v + kappa u + (1 - omega - kappa) plain: so u = plain + scale (v - plain)
    scale, both = cfg.omega / (1 - cfg.kappa), torch.cat([torch.full_like(y, net.num_classes), y])

    def v(x, t):
        if scale == 1:
            return net(x, t, y=y)
        plain, own = net(torch.cat([x, x]), torch.cat([t, t]), y=both).chunk(2)
        inside = (t >= cfg.guide_from) & (t <= cfg.guide_to)
        return plain.lerp(own, torch.where(inside, scale, 1.0).to(own).view(-1, 1, 1, 1))
    return solvers.flow_heun(v, z, times)


def pairs_of_states(states, times):
    """Eq. 8: all pairs of the states of n trajectories, (N+1, n, C, H, W) at times (N+1,), noisiest first.

    Returns z_t (P n, C, H, W), t and r (P n,), P = (N+1) N / 2, and the target (z_t - z_r) / (t - r), the
    mean velocity between them.
    """
    first, second = torch.triu_indices(len(states), len(states), 1, device=states.device)
    times = times.to(states, non_blocking=True)
    target = (states[first] - states[second]) / (times[first] - times[second]).view(-1, 1, 1, 1, 1)
    t, r = (times[k].repeat_interleave(states.shape[1]) for k in (first, second))
    return states[first].flatten(0, 1), t, r, target.flatten(0, 1)


def loss_cmt_mf(u, z, t, r, y, target):
    """Eq. 8: |u(z, t, r, y) - target|^2 on pairs of a teacher's trajectory; and each one's square (B,).

    Unit weight (B.4), mean over numbers and pairs. The target is fixed data: no stop-gradient is needed.
    """
    square = (u(z, t, r, y) - target).square().flatten(1).sum(1)
    return square.mean() / target[0].numel(), square.detach()


WEIGHT_C = 1e-3                                       # c of the adaptive weight (MF's text; its code: 1e-2)
# What the losses ask of a network: u(z, t, r, y), its derivative slope(z, t, r, y, v) along the flow, and the
# null condition, for "no class" or "no caption".
Flow = namedtuple("Flow", "u slope null_y")


def draw_times(n, g, ratio, mean, std):
    """(t, r), each (n,), 0 < r <= t < 1: the larger and the smaller of two logit-normal draws (MF).

    r = t except for exactly round(ratio n) samples, spread evenly over the batch, so that every process and
    micro-batch has its share of them and no shape depends on chance. g: a CPU generator.
    """
    draws = torch.sigmoid(mean + std * torch.randn((2, n), generator=g))
    t, r = draws.amax(0), draws.amin(0)
    i, k = torch.arange(n), round(ratio * n)
    return t, torch.where(i * k // n < (i + 1) * k // n, r, t)      # true k times of n, evenly


def flow_of(cfg, net, null_y):
    """The Flow of net(z, t, r, y): u in --precision, du/dt in fp32 or TF32, both compiled by --compile."""
    cast = HALF.get(cfg.precision)

    def u(z, t, r, y):
        with torch.autocast(DEVICE.type, cast, enabled=cast is not None):
            return net(z, t, r, y)

    def slope(z, t, r, y, v):
        # choice: du/dt outside autocast: TF32 moves it by a thousandth, bf16 by a hundredth (docs/costs.md)
        return nets.derivative(net, z, t, r, y, v)    # torch.func.jvp along (v, 1, 0), but faster

    if cfg.compile:
        # trap: a compiled module inside jvp silently runs eager, so functions are compiled
        torch.compiler.reset()                        # trap: else u runs eager after 8 graphs, in silence
        u, slope = torch.compile(u), torch.compile(slope)
    return Flow(u, slope, null_y)


def guided_velocity(cfg, flow, v, u, at, guided):
    """The velocity that u is to learn: v itself, or where `guided` (B,)

      u_own, u_null = u(z, t, t, y), u(z, t, t, null_y)
      v = omega * v + kappa * u_own + (1 - omega - kappa) * u_null

    at: z, t, r, y. u (B, C, H, W): u(z, t, r, y), which is u_own where r = t. One more call answers the
    rows that lack u_null, and those that lack u_own. t, r, guided: on the CPU, to read without a wait.
    """
    z, t, r, y = at
    w_null = 1 - cfg.omega - cfg.kappa
    u_null, u_own = torch.zeros_like(z), u.to(z.dtype, copy=True)
    lack_null = guided & (abs(w_null) > 1e-9)
    lack_own = guided & (r < t) & (cfg.kappa > 0)
    i, j = (mask.nonzero()[:, 0].to(z.device, non_blocking=True) for mask in (lack_null, lack_own))
    if len(rows := torch.cat([i, j])):
        now = t.to(z.device, non_blocking=True)[rows]
        answers = flow.u(z[rows], now, now, torch.cat([flow.null_y.expand_as(y[i]), y[j]]))
        u_null[i], u_own[j] = answers.to(z.dtype).split([len(i), len(j)])
    where = guided.to(z.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(where, cfg.omega * v + w_null * u_null + cfg.kappa * u_own, v)


def loss_mf(flow, z, v, t, r, y, guided, cfg):
    """Mean Flow at z (B, C, H, W) = (1 - t) x + t eps, with v = eps - x. Without guidance it is

      u, dudt = jvp(u(z, t, r, y), along (v, 1, 0))
      square = |u - sg(v - (t - r) dudt)|^2
      loss = mean of square / sg(square + WEIGHT_C)^p          (as code of six lines: docs/walkthrough.md, 6)

    Where `guided` (B,) holds, v is the guided velocity, in the jvp too. du/dt is computed only where r < t:
    elsewhere it does not count. t, r, guided: on the CPU. Also returns square.
    """
    times = [a.to(z.device, non_blocking=True) for a in (t, r)]
    u = flow.u(z, *times, y)
    with torch.no_grad():                             # sg
        v = guided_velocity(cfg, flow, v, u, (z, t, r, y), guided)
        dudt, apart = torch.zeros_like(z), (r < t).nonzero()[:, 0].to(z.device, non_blocking=True)
        if len(apart):
            dudt[apart] = flow.slope(*(a[apart] for a in (z, *times, y, v)))
        target = v - (times[0] - times[1]).view(-1, 1, 1, 1) * dudt
    square = (u - target).square().flatten(1).sum(1)     # a sum (MF): the power p divides by its size
    loss = (square / (square.detach() + WEIGHT_C) ** cfg.power).mean()
    return loss, square.detach()


@torch.no_grad()
def teacher_velocity(cfg, teacher, z, t, y, guided):
    """v_T(z, t, y) of a frozen net. In --post teacher it replaces eps - x: u's target is v_T - (t - r) du/dt.

    v_T is also the direction of du/dt; unlike eps - x it has no noise of a single image. A Mean Flow net's
    u(z, t, t) is guided already; flow matching is guided here, by omega / (1 - kappa), where `guided` (B,)
    says so. t and guided come from the CPU.
    """
    t = t.to(z.device, non_blocking=True)
    with torch.autocast(DEVICE.type, HALF.get(cfg.precision), enabled=cfg.precision in HALF):
        v = teacher(z, t, t, y)
        if teacher.r_embedder is None and guided.any():
            i = guided.nonzero()[:, 0].to(z.device, non_blocking=True)
            plain = teacher(z[i], t[i], y=torch.full_like(y[i], teacher.num_classes))
            v[i] = plain.lerp(v[i], cfg.omega / (1 - cfg.kappa))
    return v


def is_guided(cfg, step, t, y, null_class):
    """Which samples (B,) have a guided target: those with a class, t in the interval, past --unguided."""
    from_teacher = cfg.stage == "post" and cfg.mid == "none" and cfg.init == "teacher"
    plain = (cfg.omega == 1 and cfg.kappa == 0) or (cfg.stage == "pretrain" and cfg.pretrain == "fm")
    if plain or (from_teacher and step < cfg.unguided):
        return torch.zeros_like(y, dtype=torch.bool)
    return (t >= cfg.guide_from) & (t <= cfg.guide_to) & (y != null_class)


# ---- train ------------------------------------------------------------------------------------
def solve(cfg, run, number):
    """A solve's pairs: z, t, r, y and target of each. They share nothing."""
    g = torch.Generator(DEVICE).manual_seed(fold(cfg.seed, "solve", number))
    return teacher_pairs(cfg, run.teacher, run.shape, g), None


def read_batch(cfg, images, step):
    """This process's share of a step's batch: moments or pixels, classes y, t, r. Pinned: no copy waits."""
    g = torch.Generator().manual_seed(fold(cfg.seed, cfg.stage, step, "data"))
    index = torch.randint(len(images.labels), (cfg.batch,), generator=g)
    flips = torch.rand(cfg.batch, generator=g) < 0.5
    dropped = torch.rand(cfg.batch, generator=g) < cfg.class_dropout
    y = torch.where(dropped, images.classes, images.labels[index])
    t, r = draw_times(cfg.batch, g, cfg.ratio, cfg.P_mean, cfg.P_std)
    if cfg.stage == "pretrain" and cfg.pretrain == "fm":      # trap: one clock learns v, no average of it
        t = r = torch.rand(cfg.batch, generator=g)            # SiT
    mine = slice(RANK * cfg.batch // WORLD, (RANK + 1) * cfg.batch // WORLD)
    batch = images.read(index[mine], flips[mine]), y[mine], t[mine], r[mine]
    return [a.pin_memory() for a in batch] if DEVICE.type != "cpu" else batch


def image_batch(cfg, run, step, mine):
    """The rows `mine` of a batch: z (B, C, H, W) at t, v = eps - x, class y; t, r, guided (B,) on the CPU."""
    g, B = torch.Generator(DEVICE).manual_seed(fold(cfg.seed, cfg.stage, step)), cfg.batch
    raw, y, t, r = next(run.ahead)                    # by read_batch, which draws times: one call a step
    guided = is_guided(cfg, step, t, y, run.net.num_classes)
    latent_noise, eps = randn((B, *run.shape), g)[mine], randn((B, *run.shape), g)[mine]
    x, y = to_input(raw, latent_noise), y.to(DEVICE, non_blocking=True)
    wide = t.to(DEVICE, non_blocking=True).view(-1, 1, 1, 1)
    return (1 - wide) * x + wide * eps, t, r, y, eps - x, guided


def batches(cfg, run, mine):
    """For each remaining step: rows `mine` of its batch, and what all pairs of its solve share, or None."""
    start, B, per_solve = run.tally["step"], cfg.batch, math.prod(solve_size(cfg))    # whole batches (check)
    for step in range(start, cfg.steps):
        if cfg.stage == "mid":
            number, at = divmod(step * B, per_solve)  # which solve; where in it the step's pairs begin
            if at == 0 or step == start:              # a solve serves several steps; resuming solves again
                pairs, shared = solve(cfg, run, number)
            yield [a[at:at + B][mine] for a in pairs], shared
        else:
            yield image_batch(cfg, run, step, mine), None


def loss_of(cfg, run, flow, rows):
    """The loss of a micro-batch and the squared error of each row (B,); rows come from batches."""
    if cfg.stage == "mid":
        z, t, r, y, target = rows
        return loss_cmt_mf(flow.u, z, t, r, y, target)                                        # Eq. 8
    z, t, r, y, v, guided = rows                      # guided: which samples guidance changes
    if cfg.stage == "pretrain":                       # "fm": read_batch draws r = t, no du/dt is left
        return loss_mf(flow, z, v, t, r, y, guided, cfg)
    assert cfg.post in ("mf", "vanilla", "teacher"), f"{cfg.post}: no branch returns its loss"
    if cfg.post == "teacher":                         # its velocities are guided already
        v, guided = teacher_velocity(cfg, run.teacher, z, t, y, guided), torch.zeros_like(guided)
    return loss_mf(flow, z, v, t, r, y, guided, cfg)


def train(cfg):
    """As in train_cmt_cifar.py, but u is a Flow, squared errors are kept by t - r, batches are read ahead."""
    if not (run := set_up(cfg)):      # run.flat: all weights of net as one vector, run.grad: its gradient
        return
    net, opt, tally, start, B = run.net, run.opt, run.tally, run.tally["step"], cfg.batch
    flow = flow_of(cfg, net, torch.tensor(net.num_classes, device=DEVICE))    # "no class" is the last
    errors = torch.zeros(2, 5, device=DEVICE)         # squared errors and their number, by t - r: 0, quarters
    share, micro = B // WORLD, cfg.batch_gpu or B // WORLD    # rows of a process, of a forward pass
    mine = slice(RANK * share, (RANK + 1) * share)
    run.ahead = fid.ahead(partial(read_batch, cfg, run.images), range(start, cfg.steps))  # lazy; mid: none
    for step, (batch, _) in enumerate(batches(cfg, run, mine), start):
        opt.param_groups[0]["lr"] = lr = lr_at(cfg, step)
        loss_sum, part = 0.0, micro / B * tally["scale"]      # of the mean over all processes; fp16 scales it
        for k in range(0, share, micro):
            rows = [a[k:k + micro] for a in batch]
            z, t, r, *_ = rows
            loss, square = loss_of(cfg, run, flow, rows)
            (loss * part).backward()
            loss_sum += loss.detach() * part
            fid.add_errors(errors, square / z[0].numel(), t - r)
        norm, mean, stop = total(run.grad, loss_sum, tally["scale"])          # the one wait of a step
        if math.isfinite(norm + mean):            # if not: no step, so weights and moments are untouched
            opt.step()                            # updates run.flat with run.grad
        run.grad.zero_()
        run.flat_ema.lerp_(run.flat, 1 - cfg.ema_beta)

        # bookkeeping from here on
        done = step + 1
        count(cfg, tally, mean, norm)                 # a skipped step lowers fp16's scale, ten end the run
        to_save = stop or done % cfg.save_every == 0 or done == cfg.steps
        if to_save or done % cfg.log_every == 0 or done == start + 1:
            report(cfg, lr, tally, **nets.peak_memory(), **fid.mse_by_gap(errors))
        if to_save and RANK == 0:
            nets.save_checkpoint(run.path, net=net, ema=run.ema, opt=opt, **run.saved, **tally)
            steps = cfg.nfe if cfg.stage == "pretrain" else 1
            preview = make_sampler(replace(cfg, labels="balanced"), run.ema, steps, decode=False)
            fid.save_preview(cfg, tally, stop, preview, ", the classes in turn")
        if to_save:
            fid.wait_for_first()
        if stop:
            fail(75, f"stopped by a signal; step {done} is saved, run the same command again to go on")


DECAYS = {"linear": lambda cfg, step: 1 - step / cfg.steps, "constant": lambda cfg, step: 1.0}


def lr_at(cfg, step):
    """Learning rate of a step: --warmup steps of warm-up, times --decay."""
    return cfg.lr * DECAYS[cfg.decay](cfg, step) * min(1.0, (step + 1) / (cfg.warmup + 1))


def set_up(cfg):
    """The stage's images, teacher, sizes, and begin's net and counts; None if there is nothing to do."""
    if not trains(cfg):
        return log(f"{cfg.stage}: not trained, as --teacher or --mid none says")
    ckpt, to_go = resume(cfg)                         # steps that are left
    images, stamp, teacher = None, "none", None       # stamp: what identifies data and teacher
    if to_go or not fid.same_names(cfg, ckpt):        # finished under the same names: nothing need be read
        if cfg.stage != "mid":                        # CMT needs no data
            images = load_data(cfg)
            stamp, shape, classes = images.stamp, images.shape, images.classes
        if cfg.stage == "mid" or (cfg.stage == "post" and cfg.post not in NO_TEACHER):
            weights, kwargs = teacher_state(cfg)
            teacher = build(cfg, kwargs, weights, cfg.teacher or "the teacher")
            teacher.requires_grad_()  # else autocast casts weights at each call; it is called under no_grad
            classes, shape = kwargs["num_classes"], (kwargs["in_channels"], *[kwargs["input_size"]] * 2)
            stamp += f", teacher {nets.stamp(weights)}"
        fid.same_data(ckpt, f"{cfg.out}/{cfg.stage}.pt", stamp)
    if not to_go:
        return log(f"{cfg.stage}: finished, nothing to do")
    kwargs = dict(size_row(cfg, "weak" if cfg.stage == "pretrain" else "size", shape[-1]),
                 input_size=shape[-1], in_channels=shape[0], num_classes=classes,
                 average_velocity=cfg.stage != "pretrain" or cfg.pretrain == "mf")
    state, what = (None, "") if ckpt else first_weights(cfg, kwargs)
    net = build(cfg, kwargs, state, what, train=True)
    adam = partial(torch.optim.Adam, betas=(0.9, 0.95), fused=True)           # MF
    return begin(cfg, ckpt, net, adam, stamp, kwargs, images=images, shape=shape, teacher=teacher)


# ---- nets -------------------------------------------------------------------------------------
def size_row(cfg, flag, side=0):
    """The kwargs that --weak or --size names, for squares of this side (0: not yet known)."""
    name = getattr(cfg, flag)
    rows = {row: nets.SIZES[row] for row in nets.SIZES if row.startswith("dit-")}
    if numbers := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", name):
        patch, width, depth, heads = (int(n or 0) for n in numbers.groups())
        rows[name] = dict(patch_size=patch, hidden_size=width, depth=depth, num_heads=heads or width // 32)
        unit = math.lcm(4, heads) if heads else 32
        if width % unit:
            fail(2, f"--{flag} {name}: the width {width} must be a multiple of {unit}")
    if name not in rows:
        fail(2, f"--{flag} {name}: not one of {', '.join(rows)}, nor PATCHxWIDTHxDEPTH[xHEADS] as in 4x64x2")
    if side % rows[name]["patch_size"]:
        fail(2, f"--{flag} {name}: its patches do not fill the {side} pixels of --data")
    return rows[name]


def read_net(cfg, name):
    """(weights, kwargs of its net) of a FILE or URL: ours, or bare weights of SiT, REPA or Mean Flow."""
    state, kwargs, stated = nets.read_weights(name)
    shape = nets.dit_shape(state, name)                     # a net of another kind is refused here
    if name == cfg.init and cfg.stage in RUN:
        fid.check_init(cfg, kwargs or shape)
    fid.same_guidance(cfg, stated, name)
    for row in size_row(cfg, "weak"), size_row(cfg, "size"):
        if {**row, "num_heads": 0}.items() <= shape.items():          # its heads are not known yet
            shape.update(row)
    if not kwargs and not shape["num_heads"]:
        size = f"{shape['patch_size']}x{shape['hidden_size']}x{shape['depth']}"
        flag = "weak" if name == cfg.teacher else "size"
        fail(3, f"{name}, a net of size {size}, does not say its heads; pass --{flag} {size}xHEADS")
    return state, kwargs or shape


def teacher_state(cfg):
    """(weights, kwargs of its net) of --teacher, else <out>/pretrain.pt."""
    if cfg.teacher:
        return read_net(cfg, cfg.teacher)
    if not (ckpt := nets.finished(f"{cfg.out}/pretrain.pt")):
        fail(3, f"no finished teacher in {cfg.out}; run --stage pretrain first, or pass --teacher FILE")
    fid.same_guidance(cfg, ckpt["cfg"], f"{cfg.out}/pretrain.pt")
    return ckpt["ema"], ckpt["model"]


def build(cfg, kwargs, state=None, what="", train=False):
    """A DiT from kwargs, with weights by name if given; a SiT's are turned to our clock."""
    torch.manual_seed(fold(cfg.seed, cfg.stage, "init"))
    net = nets.make(nets.DiT, kwargs, what)
    if state is not None:
        nets.load_flow(net, state, what)
    net = net.to(DEVICE)
    return net.train() if train else net.requires_grad_(False).eval()


def first_weights(cfg, kwargs):
    """(weights, name) that a student of `kwargs` starts from: mid.pt's, the teacher's, FILE's or none."""
    if cfg.stage == "pretrain":
        return None, ""
    if cfg.init not in INITS:
        return nets.fitting(*read_net(cfg, cfg.init), kwargs, cfg.init), cfg.init
    if cfg.stage == "post" and cfg.mid != "none":
        ckpt, path = fid.finished_mid(cfg, nets.finished), f"{cfg.out}/mid.pt"
        fid.same_guidance(cfg, ckpt["cfg"], path)
        # choice: the average, not the last weights
        return nets.fitting(ckpt["ema"], ckpt["model"], kwargs, path), path
    what = "the teacher (--init teacher)"
    return (nets.fitting(*teacher_state(cfg), kwargs, what), what) if cfg.init == "teacher" else (None, "")


# ---- sample -----------------------------------------------------------------------------------
def prior(net, seeds, labels):
    """z at t = 1 (B, C, H, W) and classes (B,): image i depends on seed i alone, not on batch or process."""
    generators = [torch.Generator().manual_seed(fold("sample", s)) for s in seeds]
    size = net.grid * net.patch_size
    z = solvers.noise((net.x_embedder.proj.in_channels, size, size), generators)
    drawn = [int(torch.randint(net.num_classes, (), generator=g)) for g in generators]
    y = torch.tensor([s % net.num_classes for s in seeds] if labels == "balanced" else drawn)
    return z.to(DEVICE), y.to(DEVICE)


def make_sampler(cfg, net, steps, decode=True):
    """f(seeds) -> images (B, C, H, W) of --labels in `steps` equal steps; decode=False: without the VAE."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    @torch.no_grad()
    def sampler(seeds):
        x = rollout(cfg, net, *prior(net, seeds, cfg.labels), times)[-1]
        return to_images(cfg, x) if decode else x
    return sampler


@torch.no_grad()
def draw_sheets(cfg, found):
    """A sheet per net, a column per class; stages.png, trajectory.png. Returns what stages.png is made of."""
    balanced = replace(cfg, labels="balanced")
    samplers = {(name, steps): make_sampler(balanced, net, steps)
                for name, net, kinds, _ in found for steps in kinds}
    shown, classes, words = fid.save_classes(cfg, found, samplers, found[0][1].num_classes)
    if found[0][0] == "teacher":
        teacher, times = found[0][1], torch.linspace(1, 0, cfg.nodes, dtype=torch.float64)
        z, y = prior(teacher, range(12), "balanced")
        states = rollout(cfg, teacher, z, y, times)                                  # (nodes, 12, C, H, W)
        jumps = {name: lambda x, t, net=net:                                          # to 0 in one step
                 rollout(cfg, net, x, y, torch.stack([t[0], 0 * t[0]]))[-1]
                 for name, net, *_ in found}
        fid.save_trajectory(cfg.out, states, times, jumps, partial(to_images, cfg),
                            [f"class {k}" for k in classes])
    return shown, classes, words


# ---- data -------------------------------------------------------------------------------------
def data_name(cfg):
    """The name of --data in PRESETS and in the default --out."""
    return cfg.data if cfg.data in (*FILES, "digits") else "own"


KIND = "mean, deviation; plain, flipped"              # what the shards of --stage encode hold
load_vae = cache(nets.sd_vae)                         # loaded once


class Latents:
    """Moments (mean, deviation) of SD-VAE latents; labels (N,) int64; stamp: changes when the data does.

    path: shards of --stage encode (index.json says what they are), memory-mapped, or a cache as REPA makes
    it: a folder or .zip with an .npy (8, h, w) per image (mean, then deviation or log variance), and a
    dataset.json or a folder per class. Every such file is read once before the first step; <out>/checked.txt
    says so to the next stage.
    """

    def __init__(self, path, out):
        self.path, self.pool, self.shards, self.side = path, ThreadPoolExecutor(8), [], 0
        if not os.path.exists(path):
            raise fid.DataError(f"--data {path} is not there; make latents by --stage encode --source "
                                f"FOLDER, or pass --data FOLDER, {', '.join(FILES)} or digits")
        with fid.blame(path):
            key = self.open_shards() if os.path.exists(f"{path}/index.json") else self.open_cache(out)
        self.stamp = f"{len(self.labels)} latents, crc32 {zlib.crc32(key.encode()):08x}"
        self.shape = 4, *self.moments(0, False).shape[1:]
        self.classes = int(self.labels.max()) + 1

    def open_shards(self):
        index = fid.made_of(self.path)
        if index["kind"] != KIND or index["scale"] != nets.SD_SCALE:
            raise fid.DataError(f"{self.path}: index.json says {index}; run --stage encode again")
        self.labels = torch.from_numpy(np.load(f"{self.path}/labels.npy"))
        self.shards = [np.load(f"{self.path}/{k:05d}.npy", mmap_mode="r") for k in range(index["shards"])]
        return json.dumps(index)

    def open_cache(self, out):
        self.names, self.open = fid.list_pictures(self.path, (".npy",))
        unlabelled = torch.zeros(len(self.names), dtype=torch.long), 1
        self.labels, _ = fid.read_labels(self.path, self.names) or unlabelled
        self.side = self.moments(0, False).shape[1]
        read, note = partial(self.moments, flip=False), f"{out}/checked.txt"
        return f"{fid.check_once(self.path, self.names, read, note)} {self.labels.tolist()}"

    def moments(self, k, flip):
        """(8, h, w) float32: mean and deviation of image k's latent, or of its mirror image's."""
        if self.shards:
            shard, k = divmod(k, len(self.shards[0]))
            return torch.from_numpy(self.shards[shard][k, int(flip)].astype(np.float32))
        x, name = self.open(self.names[k]), f"{self.path}/{self.names[k]}"
        if x.dtype.kind != "f" or x.shape != (8, side := self.side or x.shape[-1], side):
            raise fid.DataError(f"{name}: {x.dtype} {x.shape}, not mean and deviation (8, h, w) of a latent")
        mean, spread = torch.from_numpy(x.astype(np.float32)).chunk(2)
        if spread.min() < 0:          # trap: a log variance (always below 0 somewhere) is no deviation
            spread = (0.5 * spread).exp()
        x = torch.cat([mean, spread])
        return x.flip(2) if flip else x               # nearly the mirror image's; our shards hold that one

    def read(self, index, flips):
        """index (B,), flips (B,) -> moments (B, 8, h, w)."""
        return torch.stack(list(self.pool.map(self.moments, index.tolist(), flips.tolist())))


class Pixels:
    """The bundled digits with the interface of Latents, whole in memory, never flipped."""

    def __init__(self):
        self.pixels, self.labels = fid.digits()
        self.stamp = fid.stamp(self.pixels)
        self.shape, self.classes = tuple(self.pixels.shape[1:]), 10

    def read(self, index, flips):
        return self.pixels[index]


opened = cache(Latents)                               # once for all checks, once for all stages


def load_data(cfg):
    """Latents of --data, or the digits. If missing: exit code 3, with the remedy."""
    return Pixels() if cfg.data == "digits" else opened(FILES.get(cfg.data, cfg.data), cfg.out)


def to_input(raw, noise):
    """What the reader gave -> (B, C, H, W) on the device: digits in [-1, 1], or a sample of each latent."""
    if raw.dtype == torch.uint8:
        return fid.to_float(raw, DEVICE)
    mean, deviation = raw.to(DEVICE, non_blocking=True).chunk(2, 1)
    return nets.SD_SCALE * (mean + noise * deviation)


def vae_of(cfg):
    """The VAE of --vae, else the one that made --data."""
    return fid.encoder_of(FILES.get(data_name(cfg), cfg.data), "vae", load_vae, cfg.vae, DEVICE)


def to_images(cfg, x):
    """Samples -> images in [-1, 1]: latents through the VAE; digits are images already."""
    if cfg.data == "digits":
        return x
    return nets.decode_latents(vae_of(cfg), x / nets.SD_SCALE)


def encode_data(cfg):
    """--source, a folder per class -> shards of moments, fp16 (n, 2, 8, 32, 32): of it and its mirror."""
    target, (names, open_picture) = FILES.get(cfg.data, cfg.data), fid.list_pictures(cfg.source)
    labels, classes = fid.read_labels(cfg.source, names) or (torch.zeros(len(names), dtype=torch.long), 1)
    vae, number = vae_of(cfg), len(names)
    record = dict(kind=KIND, scale=nets.SD_SCALE, crop="ADM 256", vae=vae.identity, precision=cfg.precision,
                  labels=f"crc32 {zlib.crc32(labels.numpy()):08x}")

    def read(name):
        return np.asarray(fid.crop(fid.rgb(open_picture(name, exif=False)), 256))           # not upright: ADM

    def moments(images):                              # mirror images are encoded, latents are not flipped
        x = fid.to_float(images, DEVICE)
        return [torch.stack([nets.encode_moments(vae, y) for y in (x, x.flip(3))], 1).half()]
    record = fid.begin_encode(target, record, cfg.source, names, read, number * 2 * 8 * 32 * 32 * 2)
    with torch.autocast(DEVICE.type, HALF.get(cfg.precision), enabled=cfg.precision in HALF):
        fid.encode_shards(target, [""], names, read, moments, cfg.batch_gpu)
    if RANK == 0:
        np.save(f"{target}/labels.npy", labels.numpy())
        fid.write_json(f"{target}/index.json", dict(record, shards=-(-number // record["shard"])))
        log(f"encode: {target}, {number:,} images and their mirror images, {classes} classes")


# ---- plumbing ---------------------------------------------------------------------------------
# launch, gather, resume, begin, total, on_signal, main, lr_at, batches: one text in all four (test_house).
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]                      # USR1: Slurm's --signal
SIGNALS += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)      # trap: nohup ignores it
STOP = []                                             # signals received: the loop saves, then ends
NO_WEIGHT = ("dry_run data stage out source teacher vae seeds samples repeat nfe labels compile batch_gpu "
             "log_every save_every")                  # no weight depends on them: fid.steps_left
READ_BY = {  # which stages, or "stage method", read a knob; one that is not here is read by all
    "mid init size": "mid, post",
    "nodes trajectories": "mid", "post unguided": "post",
    "ratio P_mean P_std power": "pretrain, post", "pretrain weak": "pretrain",
}


def launch(cfg):
    """Join the other processes of torchrun, if any: gloo on CPUs, NCCL on GPUs. Plain python: one process."""
    global RANK, WORLD, DEVICE
    RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(DEVICE)
        torch.backends.cudnn.benchmark = True
    if cfg.data == "digits" or getattr(cfg, "res", 0) == 16:      # many threads only slow a small net down
        torch.set_num_threads(1)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type != "cpu" else "gloo", timeout=fid.TIMEOUT)
        fid.patient_group()                           # made now, while all processes are at one point


def gather(x):
    """(A, n / WORLD, ...) of each process -> (A, n, ...) on all of them."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)


def resume(cfg):
    """This stage's checkpoint, or None, and steps still to go; exit code 2 if other knobs made it."""
    ckpt = nets.load_checkpoint(path := f"{cfg.out}/{cfg.stage}.pt", whole=True)
    return ckpt, fid.steps_left(cfg, ckpt, path)


def begin(cfg, ckpt, net, optimizer, stamp, kwargs, **parts):
    """The run: net, ema, opt, tally, restored or new; flat, flat_ema, grad: each as one vector; and parts."""
    ema = deepcopy(net).requires_grad_(False).eval()
    (flat, grad), flat_ema = nets.flatten(net), nets.flatten(ema)[0]
    flat.grad = grad          # nets.flatten: all weights are views of flat, one vector with one learning rate
    opt, path = optimizer([flat]), f"{cfg.out}/{cfg.stage}.pt"
    tally = nets.restore(ckpt, path, net, ema, opt, fid.new_tally(cfg))
    fid.agree("data and sum of the first weights", (stamp, flat.sum(dtype=torch.float64).item()))
    saved = dict(data=stamp, model=kwargs, cfg=asdict(cfg), **fid.made_by(__file__))
    log(fid.begin_stage(cfg, tally, nets.memory(flat, opt, path, len(fid.ROAD))))
    return SimpleNamespace(net=net, ema=ema, opt=opt, flat=flat, flat_ema=flat_ema, grad=grad, tally=tally,
                           path=path, saved=saved, **parts)


def total(grad, loss, scale):
    """Sum gradient, loss and number of signals over the processes; the first two are divided by scale.

    Returns gradient norm, loss and stop as numbers: this is where the host waits for the device.
    """
    told = torch.stack([loss / scale, torch.full_like(loss, len(STOP))])      # trap: torch.tensor would wait
    if WORLD > 1:
        # choice: no DDP wrapper, the gradient is one vector: any number of processes, one result
        dist.all_reduce(grad)
        dist.all_reduce(told)                         # trap: process 0's own loss is not the loss
    if scale != 1:
        grad.div_(scale)
    return torch.stack([grad.norm(), *told]).tolist()


def on_signal(number, frame):
    """Ask the loop to save and leave (exit code 75); a second Ctrl-C leaves at once."""
    STOP.append(number)
    os.write(2, b"stopping: this step is saved first; Ctrl-C now leaves at once\n" * (RANK == 0))
    signal.signal(signal.SIGINT, signal.SIG_DFL)


LIMITS = {  # (a limit in words, its test): the fields it is for; read by fid.check_values
    ("above 0, below 1e12", lambda v: 0 < v < 1e12):
        "batch steps repeat log_every save_every P_std omega trajectories",
    ("above 0, at most 1", lambda v: 0 < v <= 1): "lr",
    ("in 1 to 1,000", lambda v: 1 <= v <= 1_000): "nfe",
    ("in -10 to 10", lambda v: abs(v) <= 10): "P_mean",
    ("0 or more", lambda v: v >= 0): "batch_gpu warmup power unguided",
    ("in [0, 1)", lambda v: 0 <= v < 1): "ema_beta class_dropout kappa",
    ("in [0, 1]", lambda v: 0 <= v <= 1): "ratio guide_from guide_to",
    ("2 or more", lambda v: v >= 2): "samples nodes",
}


def trains(cfg):
    """Whether this stage trains: pre-training if its net is asked for and not given, mid unless none."""
    if cfg.stage == "pretrain":
        return not cfg.teacher and (cfg.mid != "none" or cfg.init == "teacher" or cfg.post not in NO_TEACHER)
    return cfg.stage == "post" or (cfg.stage == "mid" and cfg.mid != "none")


def check(cfg):
    """Whether this stage trains; before any does, bad values (exit code 2) or files (3) end the run."""
    fid.check_values(cfg, LIMITS, WORLD if trains(cfg) else 0)
    if cfg.stage == "pretrain" and cfg.teacher:
        teacher_state(cfg)                            # read and checked, not trained
    if cfg.guide_from > cfg.guide_to:
        fail(2, f"--guide_from {cfg.guide_from} must not be above --guide_to {cfg.guide_to}")
    if cfg.stage == "mid" and trains(cfg):
        fid.check_solve(cfg, *solve_size(cfg), WORLD)
    if cfg.stage == "encode" and not os.path.exists(cfg.source):
        fail(3, f"--source {cfg.source or 'FOLDER'}: not there; name a folder with a folder for each class")
    side = 0                                          # not yet known
    if trains(cfg) and not os.path.exists(f"{cfg.out}/{cfg.stage}.pt"):
        if cfg.stage != "mid":                        # not after days of mid-training, which needs no data
            images = load_data(cfg)
            channels, _, side = images.shape
        if cfg.stage == "post":
            asked = cfg.teacher and (cfg.post not in NO_TEACHER or not os.path.exists(f"{cfg.out}/mid.pt"))
            shape = dict(in_channels=channels, input_size=side, num_classes=images.classes)
            fid.check_teacher(cfg, nets.finished, teacher_state if asked else None, images.stamp, shape)
        if cfg.stage != "pretrain" and cfg.init not in INITS:
            candidates(cfg)                           # --init FILE: is it a net?
    for flag in ("weak", "size"):
        size_row(cfg, flag, side)
    if cfg.stage == "eval" and cfg.data != "digits":
        fid.prefetch(REFERENCE.get(cfg.data, cfg.data))
    if cfg.stage in ("eval", "encode") and cfg.data != "digits":
        vae_of(cfg)     # not after training: is the VAE there?
    return trains(cfg)


# ---- main -------------------------------------------------------------------------------------
def candidates(cfg):
    """What to sample from: (name, net, {steps: kind of sampler}, checkpoint); --init FILE: only that."""
    found, stages = [], ["pretrain", "mid", "post", "alone/post"]    # alone: a run without mid-training
    if file := cfg.teacher if cfg.init in INITS else cfg.init:
        base = os.path.splitext(os.path.basename(file))[0]
        name, stages = ("teacher", stages[1:]) if cfg.init in INITS else (f"init_{base}", [])
        state, kwargs = read_net(cfg, file)
        found = [(name, build(cfg, kwargs, state, file), None)]
    for stage in stages:
        path = f"{cfg.out}/{stage}.pt"
        if ckpt := nets.finished(path):
            fid.same_guidance(cfg, ckpt["cfg"], path)
            name = "teacher" if stage == "pretrain" else stage.partition("/")[0]
            found.append((name, build(cfg, ckpt["model"], ckpt["ema"], stage), ckpt))
    if not found:
        fail(3, f"no finished stage in {cfg.out}: right --out? train without --stage, or --init")
    kinds, many = {1: 1, 2: 2, cfg.nfe: cfg.nfe}, {1: 1, cfg.nfe: cfg.nfe}    # one clock needs many steps
    return [(name, net, many if net.r_embedder is None else kinds, ckpt) for name, net, ckpt in found]


def evaluate(cfg):
    """Score every net there is, in 1, 2 and --nfe steps; --labels both: random and balanced, a row each."""
    found, rows = candidates(cfg), []
    log(ABOUT["eval"])
    stages = draw_sheets(cfg, found) if RANK == 0 else ()
    features = (fid.DigitsNet() if cfg.data == "digits" else fid.load_inception()).to(DEVICE)
    if cfg.data in REFERENCE:
        reference = fid.load_reference(REFERENCE[cfg.data])
    else:                                             # latents by their means: a perfect model reaches this
        images = load_data(cfg)
        fid.say_changed(found, images.stamp)
        mine = torch.arange(RANK, len(images.labels), WORLD).split(250)
        raws = (images.read(i, torch.zeros_like(i)) for i in mine)                   # not flipped
        drawn = (fid.to_uint8(to_images(cfg, to_input(raw, 0.0))) for raw in raws)
        reference = fid.measure(features, drawn, DEVICE, f"of --data {cfg.data}")
    for name, net, kinds, ckpt in found:
        for labels in ("random", "balanced") if cfg.labels == "both" else (cfg.labels,):
            rows.append(dict(stage=f"{name}, {labels} labels", **nets.cost(ckpt)))
            samplers = {steps: make_sampler(replace(cfg, labels=labels), net, steps) for steps in kinds}
            ours = fid.score_net(rows[-1], samplers, features, reference, cfg, labels=labels)
    decoder = "none (pixels)" if cfg.data == "digits" else vae_of(cfg).identity
    note = f"{fid.protocol(ours, reference)}\n{fid.guidance_note(cfg, decoder)}"
    log(fid.save_results(cfg, rows, note, stages))


def main(argv):
    """Run one stage, or with --stage all every stage that is not finished, in order, then the score."""
    cfg = parse(argv)
    opened.cache_clear()                              # a script may be called twice in one process
    launch(cfg)
    configs = fid.stages_of(sys.modules[__name__], argv)                # one for each stage
    if cfg.dry_run:
        raise SystemExit(fid.dry_run(sys.modules[__name__], argv, configs))
    with fid.one_line(cfg, nets.WeightsError):        # an error that a user can mend ends in one line
        fid.same_folder(cfg, __file__, argv)          # was it made by this script, with these knobs?
        # trap: where one process has a stage and another has not, they would wait for each other in check
        fid.agree(f"checkpoints in {cfg.out}", [s for s in STAGES if os.path.exists(f"{cfg.out}/{s}.pt")])
        trained = [c for c in configs if check(c)]
        with fid.begin_run(cfg, __file__, argv):      # its lock, its log
            log(fid.overview([(resume(c)[1], c) for c in trained], DEVICE, cfg))         # steps, time left
            for c in configs:
                if STOP:
                    fail(75, "stopped by a signal; run the same command again to go on")
                torch.backends.cuda.matmul.allow_tf32 = c.precision != "fp32"
                torch.backends.cudnn.allow_tf32 = c.precision != "fp32"
                for number in SIGNALS:                # training saves first, the rest just ends
                    signal.signal(number, fid.leave if c.stage in RUN else on_signal)
                if c.stage in fid.ROAD:               # has steps left
                    log(fid.words_of(c))              # ABOUT, of its stage or method
                RUN.get(c.stage, train)(c)
    if dist.is_initialized():
        dist.destroy_process_group()


RUN = {"encode": encode_data, "eval": evaluate,     # every other stage trains
       "sample": lambda cfg: fid.save_samples(cfg, candidates(cfg), make_sampler)}
if __name__ == "__main__":
    main(sys.argv[1:])
