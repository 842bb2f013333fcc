"""CMT on MS-COCO, text to image: a SiT with REPA teaches an MM-DiT Mean Flow (Eq. 8, App. B.6).

  python train_t2i_coco.py --data digits                           # laptop: the whole road, no download
  python train_t2i_coco.py --stage encode --source coco            # train2014, val2014, annotations -> shards
  torchrun --nproc_per_node=8 train_t2i_coco.py                    # the paper: SiT + REPA, CMT, Mean Flow
  torchrun --nproc_per_node=8 train_t2i_coco.py --mid none --post vanilla --init random --out out/scratch
  torchrun --nproc_per_node=8 train_t2i_coco.py --mid none --post vanilla --teacher SIT.pt --out out/sit
  python train_t2i_coco.py --data digits --stage sample --prompts "the digit seven|the digit two"

pretrain: train the teacher, SiT + REPA. mid: start from its weights, regress onto the mean velocities between
all states of its guided trajectories (Eq. 8; reads captions, no images). post: Mean Flow + REPA. Paper: 1-
and 2-step FID 15.12 and 5.01 in half the time (teacher, mid and post 32 hours, Mean Flow from scratch 60).
Run the same command again to resume. Copy and fork. "choice": ours, not the paper's; "trap": a bug avoided.
New: captions, their encoders, SiT, REPA, --clip; not here: a weak teacher, --post teacher, --unguided.
"""
# /// script
# dependencies = ["torch", "numpy", "lpips", "pillow", "scipy"]
# ///
import itertools
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
from dataclasses import asdict, dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fid                      # the score, and what runs share; it reads tables of this file (its docstring)
import nets                     # networks, their weights, distances
import solvers                  # trajectories, few-step samplers, seeds
from fid import INITS, count, fail, log, report
from solvers import fold, randn


# ---- knobs ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:                   # later ones win: default, matching rows of PRESETS, --field, --stage.field
    data: str = "coco"          # coco | digits | folder: shards of --stage encode, or U-ViT's features
    stage: Literal["all", "encode", "pretrain", "mid", "post", "sample", "eval"] = "all"   # all: not finished
    out: str = ""               # folder of the run; "" = out/<data>, out/digits-t2i
    source: str = ""            # encode: folder with COCO's train2014, val2014 and annotations
    encoders: str = ""          # FOLDER of clip-vit-large-patch14, dinov2-base; "" = the data's, the hub's
    teacher: str = ""           # FILE, URL of a SiT; "" = <out>/pretrain.pt
    pretrain: Literal["repa", "plain"] = "repa"          # the teacher: SiT with REPA (B.6), or without
    mid: Literal["cmt", "none"] = "cmt"                  # Eq. 8
    post: Literal["mf", "vanilla", "xl"] = "mf"          # after mid | MF's own length | xl: other kappa
    init: str = "teacher"       # first weights: teacher's (B.6: SiT) | random | FILE; sample, eval: show FILE
    size: str = "mmdit/2"       # of teacher and student: mmdit/2, or PATCHxDEPTH (width 32 DEPTH)

    steps: int = 50_000         # optimiser steps (B.6: the teacher)
    batch: int = 256            # images or pairs per step, over all processes (MF, REPA)
    batch_gpu: int = 0          # how many at once per process, to save memory; gradients accumulate; 0 = all
    lr: float = 1e-4            # learning rate of Adam (B.6; MF, REPA)
    decay: Literal["linear", "constant"] = "constant"    # of lr, to zero (B.6: constant)
    warmup: int = 0             # steps of linear warm-up; MF, REPA: none
    clip: float = 0.0           # largest gradient norm; 0 = off, as MF
    ema_beta: float = 0.9999    # share of the average weights that a step keeps (MF, REPA)
    caption_dropout: float = 0.1    # share of samples (mid: trajectories) with the null caption (U-ViT)

    omega: float = 1.0          # guided velocity: omega v + kappa u(text) + (1 - omega - kappa) u(null);
    kappa: float = 0.5          # choice: scale omega / (1 - kappa) = 2 (B.6), these two as MF-B/2
    guide_from: float = 0.0     # choice: guidance at all times t from here ...
    guide_to: float = 1.0       # ... to here, as REPA's sampler; B.6 does not give the numbers

    repa: float = 0.5           # weight of REPA's alignment with DINOv2, in pretrain and post; 0 = off
    ratio: float = 0.25         # share of samples with r < t (MF)
    P_mean: float = -0.4        # logit t, logit r ~ N(P_mean, P_std^2), the larger is t (MF)
    P_std: float = 1.0
    power: float = 1.0          # p of the adaptive weight 1 / (|error|^2 + c)^p (MF)

    nodes: int = 8              # mid: states of a trajectory, the teacher's steps + 1: 28 pairs (B.6); 9: 36
    trajectories: int = 256     # choice: per solve, for 64 steps of 4 x 28 pairs (B.6), shuffled

    nfe: int = 50               # the teacher's samples (B.6); students: 1 and 2; trajectories: --nodes
    prompts: str = ""           # sample: captions between bars | FILE.txt, one a line; "" = validation's
    seeds: str = "0-7"          # sample: one image per seed and caption, FIRST-LAST or FIRST-LAST:STEP
    samples: int = 30_000       # eval: images per score (U-ViT)
    repeat: int = 1             # eval: scores with fresh seeds, reported as mean, deviation and minimum
    vae: str = ""               # encode, decode: NAME, FOLDER; "" = the data's, else sd-vae-ft-mse

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "tf32"    # mid: bf16; du/dt never less than tf32
    compile: bool = False       # the net, and the function with the Jacobian product; --no-compile: not
    seed: int = 0
    log_every: int = 100
    save_every: int = 5_000     # steps between checkpoints and previews
    dry_run: bool = False       # say what would be skipped and trained and what is missing, and end


PRESETS = {  # (data, stage, its --mid or --post): later rows win, --help shows the result; "own" = a path
    ("*", "encode", "*"): dict(batch_gpu=32),                                # pictures at a time
    ("*", "pretrain", "*"): dict(clip=1.0),                                                # REPA
    ("*", "pretrain", "plain"): dict(repa=0.0),
    # choice: steps of mid and post: Table 5's hours at the teacher's FLOP/s; their EMA, 0.9999 being too slow
    # choice: a fixed target is drawn and learned in bf16 no worse than in fp32: measured on digits
    ("*", "mid", "*"): dict(steps=4_400, batch=112, ema_beta=0.999, precision="bf16"),
    ("coco", "pretrain", "*"): dict(compile=True),        # choice: 14 % off a step, H200 (docs/costs.md)
    ("coco", "mid", "*"): dict(compile=True),             # choice: 38 % off
    ("*", "post", "*"): dict(steps=9_500, ema_beta=0.999),
    ("*", "post", "vanilla"): dict(steps=63_000, ema_beta=0.9999),                         # from SiT: 40,000
    ("*", "post", "xl"): dict(omega=0.2, kappa=0.9),
    ("digits", "*", "*"): dict(out="out/digits-t2i", precision="fp32", size="2x3", save_every=500,
                               samples=2_000, nfe=8, batch=32, decay="linear", warmup=20, ema_beta=0.99,
                               trajectories=64),
    ("digits", "pretrain", "*"): dict(steps=1_500, lr=1e-3),
    ("digits", "mid", "*"): dict(steps=800, lr=1e-3),
    ("digits", "post", "*"): dict(steps=700, lr=5e-4),
}
ABOUT = {"pretrain": "stage 1 of 4, pre-training: squared errors and the loss, less REPA's reward, fall",
         "mid": "stage 2 of 4, mid-training (Eq. 8): squared errors fall, and so does their mean, the loss",
         "post": "stage 3 of 4, post-training: squared errors fall slowly, the loss in the log hardly",
         "eval": "stage 4 of 4, scores: every net's images compared with the data; lower is better"}
STAGES = ["pretrain", "mid", "post", "eval"]          # what --stage all runs, in this order: fid.stages_of
NO_TEACHER = ["mf", "vanilla", "xl"]                  # post-trainings that ask no teacher
FILES = {"coco": "data/coco256-sd"}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
parse = partial(fid.parse, sys.modules[__name__])     # (argv) -> Config
RANK, WORLD, DEVICE = 0, 1, torch.device("cpu")       # of this process; launch() sets them


# ---- pairs and losses -------------------------------------------------------------------------
# z: README's x_t, a state between an image, t = 0, and noise, t = 1; u(z, t, r): mean velocity from t to r
def solve_size(cfg):
    """(n, pairs): trajectories per solve, and how many pairs each gives: all pairs of its states."""
    return cfg.trajectories, cfg.nodes * (cfg.nodes - 1) // 2


@torch.no_grad()
def teacher_pairs(cfg, teacher, text, null, shape, g):
    """Eq. 8: all pairs of states from one roll-out of the frozen teacher per caption, text (n, L, D).

    Every process rolls out its share and gets all. Returns shuffled z (P n, C, H, W), t and r (P n,), the
    caption's number (P n,), and the target, as in pairs_of_states.
    """
    n, times = len(text), torch.linspace(1, 0, cfg.nodes, dtype=torch.float64)
    mine = slice(RANK * n // WORLD, (RANK + 1) * n // WORLD)
    eps = randn((n, *shape), g)[mine]
    with torch.autocast(DEVICE.type, HALF.get(cfg.precision), enabled=cfg.precision in HALF):
        states = rollout(cfg, teacher, eps, text[mine], null, times)
    z, t, r, target = pairs_of_states(gather(states), times)
    owner, order = torch.arange(n, device=g.device), torch.randperm(len(z), generator=g, device=g.device)
    return [a[order] for a in (z, t, r, owner.repeat(len(z) // n), target)]


@torch.no_grad()
def rollout(cfg, net, z, text, null, times):
    """States (N+1, B, ...) from z (B, ...) down `times` (N+1,).

    A Mean Flow net jumps. A SiT is integrated by Heun's rule (B.6) and guided by omega / (1 - kappa) at times
    in the interval; for the null caption that changes nothing.
    """
    if net.r_embedder is not None:                    # two clocks, t and r: a Mean Flow
        return solvers.mean_flow(lambda x, t, r: net(x, t, text, r, repa=False), z, times)
    # where loss_mf is 0, u = omega v + kappa u + (1 - omega - kappa) plain: so u = plain + scale (v - plain)
    scale, both = cfg.omega / (1 - cfg.kappa), torch.cat([null.expand_as(text), text])

    def v(x, t):
        if scale == 1:
            return net(x, t, text, repa=False)
        plain, own = net(torch.cat([x, x]), torch.cat([t, t]), both, repa=False).chunk(2)
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


def repa_flow(cfg, net, null):
    """The Flow of net(z, t, text, r); a list that keeps REPA's features of its last pass with a gradient."""
    kept, aligned = [], cfg.stage != "mid"            # mid-training leaves the projector as it is

    def in_order(z, t, r, text, repa=True):           # r behind text; trap: no REPA in du/dt and guidance
        return net(z, t, text, r, repa and aligned and torch.is_grad_enabled())
    flow = flow_of(cfg, in_order, null)

    def u(*args):
        answer = flow.u(*args)
        if isinstance(answer, tuple):                 # of a net with a projector
            answer, kept[:] = answer[0], answer[1:]
        return answer
    return flow._replace(u=u), kept


def loss_repa(features, tokens):
    """REPA: minus the mean cosine of projected features (B, N, D) and DINOv2's tokens of the clean image."""
    return -F.cosine_similarity(features.float(), tokens.float(), dim=2).mean()


def loss_sit(u, z, v, t, text):
    """Flow matching: |u(z, t) - v|^2, mean over numbers; and each one's square (B,)."""
    square = (u(z, t, t, text) - v).square().flatten(1).sum(1)
    return square.mean() / v[0].numel(), square.detach()


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


# ---- train ------------------------------------------------------------------------------------
def features_of(run, words, drop):
    """Features of captions (B, L, D), those of "no caption" where drop (B,) says so."""
    return torch.where(drop.to(DEVICE, non_blocking=True).view(-1, 1, 1), run.null, run.encoder(words))


def solve(cfg, run, number):
    """A solve's pairs: z, t, r, owner, target of each; and what they share: the captions' features."""
    g = torch.Generator().manual_seed(fold(cfg.seed, "captions", number))
    index, pick, drop = draw_captions(cfg, run.images, cfg.trajectories, g)
    texts = features_of(run, *pinned([run.images.texts(index, pick), drop]))
    g = torch.Generator(DEVICE).manual_seed(fold(cfg.seed, "solve", number))
    return teacher_pairs(cfg, run.teacher, texts, run.null, run.images.shape, g), texts


def read_batch(cfg, images, step):
    """This process's share of a step's batch: pixels or moments, tokens, words, drop, t, r, guided."""
    g = torch.Generator().manual_seed(fold(cfg.seed, cfg.stage, step, "data"))
    index, pick, drop = draw_captions(cfg, images, cfg.batch, g)
    t, r = draw_times(cfg.batch, g, cfg.ratio, cfg.P_mean, cfg.P_std)
    if cfg.stage == "pretrain":
        t = r = torch.rand(cfg.batch, generator=g)                                # SiT
    guided = (t >= cfg.guide_from) & (t <= cfg.guide_to) & ~drop & (cfg.omega != 1 or cfg.kappa != 0)
    mine = slice(RANK * cfg.batch // WORLD, (RANK + 1) * cfg.batch // WORLD)
    return pinned([*images.read(index[mine], pick[mine]), drop[mine], t[mine], r[mine], guided[mine]])


def image_batch(cfg, run, step, mine):
    """The rows `mine` of a batch: z (B, C, H, W), v = eps - x, text, tokens; on the CPU t, r, guided (B,)."""
    g, shape = torch.Generator(DEVICE).manual_seed(fold(cfg.seed, cfg.stage, step)), run.images.shape
    raw, tokens, words, drop, t, r, guided = next(run.ahead)          # by read_batch: one call a step
    latent_noise, eps = randn((cfg.batch, *shape), g)[mine], randn((cfg.batch, *shape), g)[mine]
    x, text = to_input(raw, latent_noise), features_of(run, words, drop)
    wide, tokens = (a.to(DEVICE, non_blocking=True) for a in (t.view(-1, 1, 1, 1), tokens))
    return (1 - wide) * x + wide * eps, t, r, text, eps - x, guided, tokens


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


def loss_of(cfg, run, flow, rows, texts):
    """The loss of a micro-batch and the squared error of each row (B,); rows and texts come from batches."""
    if cfg.stage == "mid":
        z, t, r, owner, target = rows                 # owner: which caption of the solve is a pair's
        return loss_cmt_mf(flow.u, z, t, r, texts[owner], target)                             # Eq. 8
    z, t, r, text, v, guided, tokens = rows           # guided: which samples guidance changes; DINOv2's
    if cfg.stage == "pretrain":
        loss, square = loss_sit(flow.u, z, v, t.to(DEVICE, non_blocking=True), text)
    else:                                             # "mf", "vanilla", "xl": differ in numbers only
        assert cfg.post in ("mf", "vanilla", "xl"), f"{cfg.post}: no branch returns its loss"
        loss, square = loss_mf(flow, z, v, t, r, text, guided, cfg)
    if run.kept:                                      # REPA's features of that pass
        repa = loss_repa(run.kept.pop(), tokens)
        loss = loss + cfg.repa * repa
        run.errors[:, 5] += torch.stack([-repa.detach(), torch.ones_like(repa)]).nan_to_num() * len(z)
    return loss, square


def train(cfg):
    """As in train_mf_imagenet256.py, but with captions, and with REPA in pre- and post-training."""
    if not (run := set_up(cfg)):      # run.flat: all weights of net as one vector, run.grad: its gradient
        return
    net, opt, tally, start, B = run.net, run.opt, run.tally, run.tally["step"], cfg.batch
    flow, run.kept = repa_flow(cfg, net, run.null)
    run.errors = torch.zeros(2, 6, device=DEVICE)     # squared errors and their number, by t - r; REPA's
    share, micro = B // WORLD, cfg.batch_gpu or B // WORLD    # rows of a process, of a forward pass
    mine = slice(RANK * share, (RANK + 1) * share)
    run.ahead = fid.ahead(partial(read_batch, cfg, run.images), range(start, cfg.steps))  # lazy; mid: none
    for step, (batch, texts) in enumerate(batches(cfg, run, mine), start):
        opt.param_groups[0]["lr"] = lr = lr_at(cfg, step)
        loss_sum, part = 0.0, micro / B * tally["scale"]      # of the mean over all processes; fp16 scales it
        for k in range(0, share, micro):
            rows = [a[k:k + micro] for a in batch]
            z, t, r, *_ = rows
            loss, square = loss_of(cfg, run, flow, rows, texts)
            (loss * part).backward()
            loss_sum += loss.detach() * part
            fid.add_errors(run.errors, square / z[0].numel(), t - r)
        norm, mean, stop = total(run.grad, loss_sum, tally["scale"])          # the one wait of a step
        if cfg.clip and norm > cfg.clip:
            run.grad *= cfg.clip / norm
        if math.isfinite(norm + mean):            # if not: no step, so weights and moments are untouched
            opt.step()                            # updates run.flat with run.grad
        run.grad.zero_()
        run.flat_ema.lerp_(run.flat, 1 - cfg.ema_beta)

        # bookkeeping from here on
        done = step + 1
        count(cfg, tally, mean, norm)                 # a skipped step lowers fp16's scale, ten end the run
        to_save = stop or done % cfg.save_every == 0 or done == cfg.steps
        if to_save or done % cfg.log_every == 0 or done == start + 1:
            report(cfg, lr, tally, **nets.peak_memory(), **fid.mse_by_gap(run.errors))
        if to_save and RANK == 0:
            nets.save_checkpoint(run.path, net=net, ema=run.ema, opt=opt, **run.saved, **tally)
            drawn = "the digit above" if cfg.data == "digits" else "each tenth of the data"
            fid.save_preview(cfg, tally, stop, run.preview(run.ema), f", captions of {drawn}")
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
    if to_go or not fid.same_names(cfg, ckpt):        # finished under the same names: nothing need be read
        images, teacher = load_data(cfg), None        # mid reads captions, never an image
        stamp = images.stamp
        if cfg.stage == "mid" or (cfg.stage == "post" and cfg.post not in NO_TEACHER):
            weights, kwargs = teacher_state(cfg)
            teacher = build(cfg, kwargs, weights, cfg.teacher or "the teacher")
            teacher.requires_grad_()  # else autocast casts weights at each call; it is called under no_grad
            stamp += f", teacher {nets.stamp(weights)}"
        fid.same_data(ckpt, f"{cfg.out}/{cfg.stage}.pt", stamp)
    if not to_go:
        return log(f"{cfg.stage}: finished, nothing to do")
    encoder = text_encoder(cfg)
    null = encoder(images.null[None])
    kwargs = model_size(cfg, images, null.shape[-1])
    state, what = (None, "") if ckpt else first_weights(cfg)
    net = build(cfg, kwargs, state, what, train=True)
    beta2 = 0.999 if cfg.stage == "pretrain" else 0.95                        # REPA; MF
    adam = partial(torch.optim.Adam, betas=(0.9, beta2), fused=True)
    # previews: captions of the data, from each tenth in turn; their features may be cached (no CLIP needed)
    k, n = torch.arange(60), images.count
    shown = encoder(images.texts((k % 10 * n // 10 + n // 20 + k // 10) % n, 0.0 * k))
    steps, text = cfg.nfe if cfg.stage == "pretrain" else 1, lambda seeds: shown[list(seeds)]
    preview = partial(make_sampler, cfg, steps=steps, text=text, null=null, decode=False)
    return begin(cfg, ckpt, net, adam, stamp, kwargs, images=images, encoder=encoder, null=null,
                 teacher=teacher, preview=preview)


# ---- nets -------------------------------------------------------------------------------------
def size_row(cfg, side=0):
    """The kwargs that --size names, for squares of this side (0: not yet known)."""
    rows = {"mmdit/2": dict(nets.SIZES["mmdit/2"], repa_depth=8, projector_dim=2048)}              # REPA
    if numbers := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", cfg.size):
        patch, depth = map(int, numbers.groups())
        rows[cfg.size] = dict(patch_size=patch, depth=depth, repa_depth=1, projector_dim=128)
    if cfg.size not in rows:
        fail(2, f"--size {cfg.size}: neither mmdit/2 nor PATCHxDEPTH as in 2x3")
    if side % rows[cfg.size]["patch_size"]:
        fail(2, f"--size {cfg.size}: its patches do not fill the {side} pixels of --data")
    return rows[cfg.size]


def model_size(cfg, images, width):
    """The kwargs of the net to train, for these images, and captions' features of this width."""
    tokens, side = images.read(torch.tensor([0]), torch.zeros(1))[1][0], images.shape[-1]           # (N, D)
    row = size_row(cfg, side)
    if cfg.repa and not len(tokens):
        fail(3, f"--data {cfg.data} holds no DINOv2 tokens; run --stage encode, or pass --repa 0")
    if cfg.repa and len(tokens) != (side // row["patch_size"]) ** 2:
        fail(2, f"--size {cfg.size}: REPA has {len(tokens)} tokens an image, that is another patch size")
    return dict(row, input_size=side, in_channels=images.shape[0], context_dim=width,
                average_velocity=cfg.stage != "pretrain", repa_dim=tokens.shape[-1] if cfg.repa else 0)


def read_net(cfg, name):
    """(weights, kwargs of its net) of a FILE or URL: ours, or a bare state dict of --size."""
    state, kwargs, stated = nets.read_weights(name)
    if "context_embedder.weight" not in state:
        kind = f"no MM-DiT, but a net{nets.MAKERS.get(name, '')} without context_embedder.weight"
        raise nets.WeightsError(f"{name}: {kind}; pass such a net")
    if name == cfg.init and cfg.stage in RUN:
        fid.check_init(cfg, kwargs)
    fid.same_guidance(cfg, stated, name)
    if not kwargs:
        two_clocks = any(k.startswith(("r_embedder.", "h_embedder.")) for k in state)
        width = state["context_embedder.weight"].shape[-1]
        kwargs = dict(model_size(cfg, load_data(cfg), width), average_velocity=two_clocks)
    return state, kwargs


def teacher_state(cfg):
    """(weights, kwargs of its net) of --teacher, else <out>/pretrain.pt."""
    if cfg.teacher:
        return read_net(cfg, cfg.teacher)
    if not (ckpt := nets.finished(f"{cfg.out}/pretrain.pt")):
        fail(3, f"no finished teacher in {cfg.out}; run --stage pretrain first, or pass --teacher FILE")
    return ckpt["ema"], ckpt["model"]


def build(cfg, kwargs, state=None, what="", train=False):
    """An MM-DiT from kwargs, with weights by name if given; a second clock starts at zero."""
    torch.manual_seed(fold(cfg.seed, cfg.stage, "init"))
    net = nets.make(nets.MMDiT, kwargs, what)
    if state is not None:
        nets.load_flow(net, state, what)
    net = net.to(DEVICE)
    return net.train() if train else net.requires_grad_(False).eval()


def first_weights(cfg):
    """(weights, their name) the student starts from: mid.pt's in post, the teacher's, FILE's, or none."""
    if cfg.stage == "pretrain":
        return None, ""
    if cfg.init not in INITS:
        return read_net(cfg, cfg.init)[0], cfg.init
    if cfg.stage == "post" and cfg.mid != "none":
        ckpt, path = fid.finished_mid(cfg, nets.finished), f"{cfg.out}/mid.pt"
        fid.same_guidance(cfg, ckpt["cfg"], path)
        return ckpt["ema"], path
    return (teacher_state(cfg)[0], "the teacher") if cfg.init == "teacher" else (None, "")


# ---- sample -----------------------------------------------------------------------------------
def prior(net, seeds):
    """z at t = 1 (B, C, H, W): image i depends on seed i alone, not on batch, process or caption."""
    generators = [torch.Generator().manual_seed(fold("sample", s)) for s in seeds]
    size = net.grid * net.patch_size
    return solvers.noise((net.x_embedder.proj.in_channels, size, size), generators).to(DEVICE)


def make_sampler(cfg, net, steps, text, null, decode=True):
    """f(seeds) -> images (B, C, H, W) of the captions whose features are text(seeds), in `steps` equal steps.

    decode=False: without the VAE.
    """
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    @torch.no_grad()
    def sampler(seeds):
        x = rollout(cfg, net, prior(net, seeds), text(seeds), null, times)[-1]
        return to_images(cfg, x) if decode else x
    return sampler


def validation_text(images, encoder, seeds):
    """Captions of the validation set, one for each seed, and their features (B, L, D)."""
    captions, words = images.validation(seeds)
    return captions, encoder(encoder.ids(captions) if words is None else words)


def read_digits(sampler, reader, right):
    """The sampler; right (2,) counts its images in which reader sees the caption's digit, and all of them."""
    def watched(seeds):
        x = sampler(seeds)
        seen = reader.logits(fid.to_uint8(x)).argmax(1).cpu()
        right.add_(torch.tensor([(seen == torch.tensor(seeds) % 10).sum(), len(x)]))
        return x
    return watched


@torch.no_grad()
def draw_sheets(cfg, found, images, encoder):
    """A sheet per net, a row per caption; stages.png, trajectory.png. Returns what stages.png is made of."""
    (captions, text), null = validation_text(images, encoder, range(10)), encoder(images.null[None])
    captions = [caption or f"caption {k}" for k, caption in enumerate(captions)]     # U-ViT: no text
    seeds, shown = [k + 10 * j for k in range(10) for j in range(8)], []             # 8 of each caption
    labels = [f"{caption}\nseeds {k}, {k + 10}, ..., {k + 70}" for k, caption in enumerate(captions)]
    for name, net, kinds, _ in found:
        for steps in kinds:
            sampler = make_sampler(cfg, net, steps, lambda some: text[[s % 10 for s in some]], null)
            rows = [*zip(labels, fid.draw_seeds(sampler, seeds, cfg.batch_gpu or 64).cpu().split(8))]
            path = f"{cfg.out}/samples_{name}_{steps}step.png"
            fid.save_captions(path, name, steps, rows, scores="; scores: results.md in this folder")
            shown.append((name, steps, torch.stack([row[0] for _, row in rows])))
    guided = ", each with the caption and without" * (cfg.omega / (1 - cfg.kappa) != 1)
    heun = f"\nA teacher's step is one of Heun's: two calls{guided}."
    words = fid.about(cfg, found) + heun
    fid.save_stages(cfg.out, shown, captions, words)
    if found[0][0] == "teacher":
        teacher, times = found[0][1], torch.linspace(1, 0, cfg.nodes, dtype=torch.float64)
        states = rollout(cfg, teacher, prior(teacher, range(len(text))), text, null, times)
        jumps = {name: lambda x, t, net=net:                                          # to 0 in one step
                 rollout(cfg, net, x, text, null, torch.stack([t[0], 0 * t[0]]))[-1]
                 for name, net, *_ in found}
        fid.save_trajectory(cfg.out, states, times, jumps, partial(to_images, cfg), captions, heun)
    return shown, captions, words


# ---- data -------------------------------------------------------------------------------------
def data_name(cfg):
    """The name of --data in PRESETS and in the default --out."""
    return cfg.data if cfg.data in (*FILES, "digits") else "own"


load_vae = cache(nets.sd_vae)                         # loaded once
KIND = "coco: moments = mean, deviation; DINOv2 tokens; captions"
SAYINGS = "the digit {}", "a {}", "the number {}", "{}", "a handwritten {}"      # five captions, as COCO has
DIGITS = "zero one two three four five six seven eight nine".split()


class Coco:
    """Memory-mapped shards of --stage encode, or U-ViT's extracted features (a small file for each array).

    Image k has moments (8, h, w), mean and deviation of its SD-VAE latent; DINOv2 tokens (N, D), none from
    U-ViT; and captions first[k] to first[k + 1], as CLIP's token ids (77,), U-ViT's as features (77, 768).
    Each of U-ViT's files is read once before the first step; <out>/checked.txt says so to the next stage.
    """

    def __init__(self, path, out):
        self.path, self.maps, self.pool = path, {}, ThreadPoolExecutor(8)
        if not os.path.exists(path):
            raise fid.DataError(f"--data {path} is not there; make latents by --stage encode --source "
                                f"FOLDER, or pass --data FOLDER, {', '.join(FILES)} or digits")
        with fid.blame(path):
            key = self.open_shards() if os.path.exists(f"{path}/index.json") else self.open_features(out)
            one = self.moments(0).numpy()
        self.shape, self.count = (4, *one.shape[1:]), len(self.first) - 1
        self.stamp = f"{self.count} images, crc32 {zlib.crc32(key + one.tobytes()):08x}"

    def open_shards(self):
        index = fid.made_of(self.path)
        if index["kind"] != KIND or index["scale"] != nets.SD_SCALE:
            raise fid.DataError(f"{self.path}: index.json says {index}; run --stage encode again")
        for name in ("moments", "tokens"):
            files = [f"{self.path}/{name}_{k:05d}.npy" for k in range(index["shards"])]
            self.maps[name] = [np.load(file, mmap_mode="r") for file in files]
        self.first, self.ids = np.load(f"{self.path}/first.npy"), np.load(f"{self.path}/ids.npy")
        self.null = torch.from_numpy(np.load(f"{self.path}/null.npy"))
        with open(f"{self.path}/val.json") as f:
            self.val = json.load(f)
        return json.dumps(index).encode() + self.ids.tobytes()

    def open_features(self, out):
        names, self.open = fid.list_pictures(self.path, (".npy",))
        there, counts = set(names), {"train": [], "val": []}                   # captions of each image
        for part, captions in counts.items():
            while f"{part}/{len(captions)}_0.npy" in there:
                start = f"{part}/{len(captions)}_"
                captions.append(next(j for j in itertools.count() if f"{start}{j}.npy" not in there))
                there -= {f"{start}{j}.npy" for j in range(captions[-1])} | {f"{start[:-1]}.npy"}
        if there != {"empty_context.npy"}:
            raise fid.DataError(f"{self.path}: no captions, or a gap in the numbers of U-ViT's files; left "
                                f"over: {sorted(there)[:3]}; --stage encode makes them whole")
        self.null = self.array("empty_context")
        self.first, self.val = np.cumsum([0, *counts["train"]]), counts["val"]
        stamp = fid.check_once(self.path, names, lambda k: self.array(names[k][:-4]), f"{out}/checked.txt")
        return stamp.encode()

    def array(self, name):
        x = self.open(f"{name}.npy")
        if x.dtype.kind != "f" or x.ndim != 3 - ("_" in name) or ("_" not in name and len(x) != 8):
            raise fid.DataError(f"{self.path}/{name}.npy: {x.dtype} {x.shape}, not what U-ViT keeps there")
        return torch.from_numpy(x.astype(np.float32))

    def row(self, name, k):
        shard, k = divmod(k, len(self.maps[name][0]))
        return torch.from_numpy(np.array(self.maps[name][shard][k]))

    def moments(self, k):
        if self.maps:
            return self.row("moments", k).float()
        mean, log_variance = self.array(f"train/{k}").chunk(2)                       # U-ViT
        return torch.cat([mean, (0.5 * log_variance).exp()])

    def tokens(self, k):
        return self.row("tokens", k) if self.maps else torch.empty(0)

    def words(self, k, pick):
        j = int(pick * (self.first[k + 1] - self.first[k]))
        if not self.maps:
            return self.array(f"train/{k}_{j}")
        return torch.from_numpy(self.ids[self.first[k] + j].astype(np.int64))

    def texts(self, index, pick):
        """A caption of each image in index (B,), chosen by pick (B,) in [0, 1): ids or features (B, ...)."""
        return torch.stack(list(self.pool.map(self.words, index.tolist(), pick.tolist())))

    def read(self, index, pick):
        """index, pick (B,) -> moments (B, 8, h, w), tokens (B, N, D), or (B, 0), and texts."""
        moments, tokens = (list(self.pool.map(f, index.tolist())) for f in (self.moments, self.tokens))
        return torch.stack(moments), torch.stack(tokens), self.texts(index, pick)

    def validation(self, seeds):
        """A caption of the validation set for each seed, as text; from U-ViT only its features."""
        order = torch.randperm(len(self.val), generator=torch.Generator().manual_seed(0))
        picks = [(int(order[s % len(order)]), fold("caption", s)) for s in seeds]
        if self.maps:
            return [self.val[k][n % len(self.val[k])] for k, n in picks], None
        return [""] * len(picks), torch.stack([self.array(f"val/{k}_{n % self.val[k]}") for k, n in picks])


class CaptionedDigits:
    """The bundled digits with the interface of Coco: pixels, random features, five sayings of each."""

    def __init__(self, grid):
        self.pixels, self.labels = fid.digits()
        self.tokens = random_tokens(self.pixels, grid)
        self.ids = Words().ids([s.format(d) for d in DIGITS for s in SAYINGS])
        self.stamp = fid.stamp(self.pixels)
        self.shape, self.count = tuple(self.pixels.shape[1:]), len(self.pixels)
        self.null = Words().ids([""])[0]

    def texts(self, index, pick):
        return self.ids[self.labels[index] * len(SAYINGS) + (pick * len(SAYINGS)).long()]

    def read(self, index, pick):
        return self.pixels[index], self.tokens[index], self.texts(index, pick)

    def validation(self, seeds):                      # of the digit seed % 10
        return [SAYINGS[s // 10 % len(SAYINGS)].format(DIGITS[s % 10]) for s in seeds], None


class Words:
    """The text encoder of the digits: a fixed random vector per word, any word, plus one per place."""
    LENGTH, WIDTH = 4, 32

    def __init__(self, device="cpu"):
        seeded = {n: torch.Generator().manual_seed(fold("words", n)) for n in (4096, self.LENGTH)}
        tables = (torch.randn((n, self.WIDTH), generator=g) for n, g in seeded.items())
        self.table, self.place = (table.to(device) for table in tables)

    def ids(self, captions):
        """Captions -> (B, L) int64; 0 = no word. Punctuation is left out."""
        words = [re.findall(r"\w+", caption.lower())[:self.LENGTH] for caption in captions]
        rows = [[1 + zlib.crc32(word.encode()) % 4095 for word in row] for row in words]
        return torch.tensor([row + [0] * (self.LENGTH - len(row)) for row in rows])

    def __call__(self, words):
        """ids (B, L) -> features (B, L, D)."""
        return self.table[words.to(self.table.device, non_blocking=True)] + self.place


def random_tokens(images, grid):
    """DINOv2 of the digits: two fixed random convolutions, (B, 1, 8, 8) uint8 -> (B, grid * grid, 32)."""
    g, x = torch.Generator().manual_seed(fold("tokens")), images.float() / 127.5 - 1
    for c in (1, 32):
        x = F.conv2d(x, torch.randn((32, c, 3, 3), generator=g) / (9 * c) ** 0.5, padding=1).relu()
    x = F.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)
    return x - x.mean((0, 1))


def text_encoder(cfg):
    """Captions -> ids -> features: CLIP, or the digits' fixed vectors."""
    if cfg.data == "digits":
        return Words(DEVICE)
    path, folder = FILES.get(cfg.data, cfg.data), in_encoders(cfg, nets.CLIP)
    return fid.encoder_of(path, "text", nets.CLIPText, folder, DEVICE)


def in_encoders(cfg, name):
    """The folder of CLIP or DINOv2 in that of --encoders; "" if it is not there."""
    folder = f"{cfg.encoders}/{os.path.basename(name)}"
    return folder if cfg.encoders and os.path.isdir(folder) else ""


opened = cache(Coco)                                  # once for all checks, once for all stages


def load_data(cfg):
    """Coco of --data, or the digits. If missing: exit code 3, with the remedy."""
    if cfg.data == "digits":
        return CaptionedDigits(8 // size_row(cfg, 8)["patch_size"])
    return opened(FILES.get(cfg.data, cfg.data), cfg.out)


def draw_captions(cfg, images, n, g):
    """n image numbers; for each, a number in [0, 1) that picks its caption, and whether that is dropped."""
    index = torch.randint(images.count, (n,), generator=g)
    return index, torch.rand(n, generator=g), torch.rand(n, generator=g) < cfg.caption_dropout


def pinned(batch):
    """The batch, pinned for a GPU so that copying it does not wait for the GPU's current work."""
    return [a.pin_memory() for a in batch] if DEVICE.type != "cpu" else batch


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


def read_coco(source, part):
    """[(image file, its captions)] of train2014 or val2014, by image id (U-ViT)."""
    name = f"{source}/annotations/captions_{part}.json"
    with fid.blame(name):
        with open(name) as f:
            given = json.load(f)
        captions = {}
        for a in given["annotations"]:
            captions.setdefault(a["image_id"], []).append(a["caption"])
        images = sorted((i["id"], i["file_name"]) for i in given["images"])
        ids = [k for k, _ in images]
        told = sorted(k for k, some in captions.items() if all(isinstance(text, str) for text in some))
        if ids != told or not ids:
            raise fid.DataError(f"{name}: {len(ids)} images, captions of {len(told)} are text, not both: "
                                f"{sorted(set(ids) ^ set(told))[:3]}; each needs one entry, and captions")
        return [(f"{part}/{file}", captions[k]) for k, file in images]


def encode_data(cfg):
    """--source -> shards of moments and DINOv2 tokens, CLIP's token ids of all captions, val.npz for FID."""
    target, clip = FILES.get(cfg.data, cfg.data), text_encoder(cfg)
    train, val = (read_coco(cfg.source, part) for part in ("train2014", "val2014"))
    names, texts = [name for name, _ in train + val], [c for _, captions in train for c in captions]
    vae = vae_of(cfg)
    vision = fid.encoder_of(target, "vision", nets.dinov2, in_encoders(cfg, nets.DINO), DEVICE)
    inception = fid.load_inception().to(DEVICE)
    record = dict(kind=KIND, scale=nets.SD_SCALE, crop="U-ViT 256", precision=cfg.precision, vae=vae.identity,
                  vision=vision.identity, text=clip.identity, inception=inception.protocol,
                  captions=f"crc32 {zlib.crc32(repr(train + val).encode()):08x}")

    def read(name):
        picture = fid.open_picture(f"{cfg.source}/{name}", f"{cfg.source}/{name}", exif=False)
        return np.asarray(fid.square(fid.rgb(picture), 256))

    def encode(images):
        moments = nets.encode_moments(vae, fid.to_float(images, DEVICE))
        return moments.half(), vision(images).half()
    size = len(train) * 2 * (8 * 32**2 + 16**2 * 768)                         # moments and tokens in fp16
    record = fid.begin_encode(target, record, cfg.source, names, read, size)
    with torch.autocast(DEVICE.type, HALF.get(cfg.precision), enabled=cfg.precision in HALF):
        fid.encode_shards(target, ["moments_", "tokens_"], names[:len(train)], read, encode, cfg.batch_gpu)
    if not os.path.exists(f"{target}/val.npz"):
        mine = names[len(train) + RANK::WORLD]
        batches = fid.read_ahead(read, [mine[i:i + 64] for i in range(0, len(mine), 64)])
        reference = fid.measure(inception, batches, DEVICE)
        if RANK == 0:
            fid.save_statistics(f"{target}/val.npz", reference)
    if RANK == 0:
        ids = torch.cat([clip.ids(texts[i:i + 1024]) for i in range(0, len(texts), 1024)])
        np.save(f"{target}/ids.npy", ids.numpy().astype(np.uint16))                  # CLIP has 49,408 tokens
        np.save(f"{target}/first.npy", np.cumsum([0] + [len(captions) for _, captions in train]))
        np.save(f"{target}/null.npy", clip.ids([""])[0].numpy())
        fid.write_json(f"{target}/val.json", [captions for _, captions in val])
        fid.write_json(f"{target}/index.json", dict(record, shards=-(-len(train) // record["shard"])))
        log(f"encode: {target}, {len(train):,} images, {len(texts):,} captions, {len(val):,} for FID")


# ---- plumbing ---------------------------------------------------------------------------------
# launch, gather, resume, begin, total, on_signal, main, lr_at, batches: one text in all four (test_house).
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]                      # USR1: Slurm's --signal
SIGNALS += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)      # trap: nohup ignores it
STOP = []                                             # signals received: the loop saves, then ends
NO_WEIGHT = ("dry_run data stage out source encoders teacher vae prompts seeds samples repeat nfe compile "
             "batch_gpu log_every save_every")        # no weight depends on them: fid.steps_left
READ_BY = {  # which stages, or "stage method", read a knob; one that is not here is read by all
    "mid init omega kappa guide_from guide_to": "mid, post",
    "nodes trajectories": "mid", "post": "post",
    "ratio P_mean P_std power": "pretrain, post", "pretrain": "pretrain",
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
    ("0 or more", lambda v: v >= 0): "batch_gpu warmup clip repa power",
    ("in [0, 1)", lambda v: 0 <= v < 1): "ema_beta caption_dropout kappa",
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
    for part in ("train2014", "val2014") if cfg.stage == "encode" else ():
        name = f"annotations/captions_{part}.json"
        if not cfg.source or not os.path.exists(f"{cfg.source}/{name}"):
            fail(3, f"--source {cfg.source or 'FOLDER'} holds no {name}; name COCO's folder")
    size_row(cfg)
    if cfg.guide_from > cfg.guide_to:
        fail(2, f"--guide_from {cfg.guide_from} must not be above --guide_to {cfg.guide_to}")
    if cfg.stage == "mid" and trains(cfg):
        fid.check_solve(cfg, *solve_size(cfg), WORLD)
    if trains(cfg) and not os.path.exists(f"{cfg.out}/{cfg.stage}.pt"):
        images = load_data(cfg)                       # do they have what this stage needs, of this size?
        shape = model_size(cfg, images, text_encoder(cfg)(images.null[None]).shape[-1])
        if cfg.stage != "pretrain":
            shape = {k: shape[k] for k in ("input_size", "in_channels", "context_dim")}
            fid.check_teacher(cfg, nets.finished, teacher_state if cfg.teacher else None, images.stamp, shape)
        if cfg.stage != "pretrain" and cfg.init not in INITS:
            candidates(cfg)                           # --init FILE: is it a net?
    if cfg.prompts:
        given_prompts(cfg) if cfg.stage == "sample" else fid.say("warning: --prompts need --stage sample")
    if cfg.stage == "eval" and cfg.data != "digits":  # found now, not after days of training
        load_data(cfg)
        if not os.path.exists(path := f"{FILES.get(cfg.data, cfg.data)}/val.npz"):
            fail(3, f"{path}: not there; --stage encode makes it, or python fid.py --save")
        fid.prefetch(cfg.data)
        vae_of(cfg)
        text_encoder(cfg)
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
    few, many = {1: 1, 2: 2}, {1: 1, cfg.nfe: cfg.nfe}                        # one clock needs many steps
    return [(name, net, many if net.r_embedder is None else few, ckpt) for name, net, ckpt in found]


def given_prompts(cfg):
    """--prompts: captions between bars, or FILE.txt with one a line; "": eight of the validation set."""
    given, captions = cfg.prompts, cfg.prompts.split("|")
    if given.endswith(".txt"):
        with fid.blame(given), open(given, encoding="utf-8-sig") as f:        # with a byte-order mark or not
            captions = f.readlines()
    captions = [c.strip() for c in captions if c.strip()]
    if not given and not any(captions := load_data(cfg).validation(range(8))[0]):
        fail(2, f"--prompts is empty, and --data {cfg.data} holds no text; pass --prompts 'a cat|a dog'")
    known = {*" ".join([*SAYINGS, *DIGITS]).split()}
    if cfg.data == "digits" and (new := {*re.findall(r"\w+", " ".join(captions).lower())} - known):
        fid.say(f"warning: --prompts: the net of the digits has never seen {', '.join(sorted(new))}")
    return captions or fail(2, f"--prompts {given}: holds no caption; write one a line, or 'a cat|a dog'")


def slug(text):
    """A caption as part of a file name, with a checksum where another caption would have the same name."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-")[:40]
    return words if words.replace("-", " ") == text else f"{words}-{zlib.crc32(text.encode()):08x}"


def sample_captions(cfg):
    """A PNG per caption and seed in <out>/samples/<net>_<steps>, and a sheet with the captions."""
    seeds, batch, encoder = fid.seed_range(cfg.seeds), cfg.batch_gpu or 64, text_encoder(cfg)
    found, prompts, null = candidates(cfg), given_prompts(cfg), encoder(encoder.ids([""]))
    fid.say_missing(cfg, [name for name, *_ in found])
    for prompt in prompts:
        if torch.equal(encoder.ids([prompt]), encoder.ids([f"{prompt} zero"])):         # no room for a word
            log(f"warning: --prompts {prompt!r} fills the text encoder, which reads no word more")
    for name, net, kinds, _ in found:
        for steps in kinds:
            folder, shown = fid.samples_folder(cfg, name, steps, net), []
            for prompt in prompts:
                text = encoder(encoder.ids([prompt]))
                sampler = make_sampler(cfg, net, steps, lambda part: text.expand(len(part), -1, -1), null)
                fid.save_images(sampler, seeds, f"{folder}/{slug(prompt)}_", batch)
                if RANK == 0 and len(shown) < 64:
                    shown.append((prompt, fid.draw_seeds(sampler, seeds[:8], batch)))
            sheet = f"{cfg.out}/samples_{name}_{steps}step_prompts.png"
            if RANK == 0:
                fid.save_captions(sheet, name, steps, shown, [f"seed {k}" for k in seeds[:8]])
            log(f"sample: {len(seeds)} images of each caption ({len(prompts)}) in {folder}; open {sheet}")


def evaluate(cfg):
    """Score every net there is, the teacher in --nfe steps, students in 1 and 2: <out>/results.md.

    Caption i of the validation set makes image i. For digits, columns say how many show the right digit.
    """
    digits, images, encoder = cfg.data == "digits", load_data(cfg), text_encoder(cfg)
    found, rows = candidates(cfg), []
    log(ABOUT["eval"])
    stages = draw_sheets(cfg, found, images, encoder) if RANK == 0 else ()
    features = (fid.DigitsNet() if digits else fid.load_inception()).to(DEVICE)
    if digits:
        reference = fid.measure(features, images.pixels[RANK::WORLD].split(250), DEVICE, "of --data digits")
    else:
        reference = fid.load_reference(f"{FILES.get(cfg.data, cfg.data)}/val.npz")
    null, text_of = encoder(images.null[None]), lambda seeds: validation_text(images, encoder, seeds)[1]
    for name, net, kinds, ckpt in found:
        right = {steps: torch.zeros(2) for steps in kinds}
        rows.append(dict(stage=name, **nets.cost(ckpt)))
        samplers = {steps: make_sampler(cfg, net, steps, text_of, null) for steps in kinds}
        if digits:
            samplers = {steps: read_digits(f, features, right[steps]) for steps, f in samplers.items()}
        ours = fid.score_net(rows[-1], samplers, features, reference, cfg)
        for steps, counts in right.items() if digits else ():
            if WORLD > 1:
                dist.all_reduce(counts)
            rows[-1][f"{steps}-step shows its digit"] = f"{counts[0] / counts[1]:.1%}"
    decoder = "none (pixels)" if digits else vae_of(cfg).identity
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


RUN = {"encode": encode_data, "sample": sample_captions, "eval": evaluate}    # every other stage trains
if __name__ == "__main__":
    main(sys.argv[1:])
