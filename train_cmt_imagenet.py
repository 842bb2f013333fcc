"""CMT on ImageNet 64x64 (pixels), 512x512 (latents): EDM2 becomes a 1-2 step generator (Sec. 4.2, B.3, B.5).

  python train_cmt_imagenet.py --data digits                # laptop: all stages in minutes, no download
  torchrun --nproc_per_node=8 train_cmt_imagenet.py --res 64                      # the paper's run, ECT
  torchrun --nproc_per_node=8 train_cmt_imagenet.py --res 64 --post ecd           # its best: 1.78 / 1.32
  torchrun --nproc_per_node=8 train_cmt_imagenet.py --res 512                     # XXL on latents, ECD
  python train_cmt_imagenet.py --res 64 --stage encode --source ILSVRC2012_img_train
  python train_cmt_imagenet.py --data digits --stage sample --seeds 0-63

pretrain: fetch EDM2, or train it. vgg: the VGG that measures latents or digits. mid: regress the student onto
the ends of the teacher's trajectories, classes given (Eq. 7). post: ECT, or ECD with an autoguided teacher
(Eq. 3). Run the same command again to resume. "choice": ours, not the paper's; "trap": a bug avoided.
New: classes, EDM2 (casts inside), reads ahead, autoguided, views, VGG; not here: CIFAR's kd, slow, annealed.
"""
# /// script
# dependencies = ["torch", "numpy", "lpips", "pillow", "scipy"]
# ///
import math
import os
import signal
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
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
    data: str = "imagenet"      # imagenet | digits | an EDM2 .zip or folder: PNG or latent .npy, dataset.json
    res: int = 64               # 64: pixels; 512: latents 4x64x64; own images: their size
    stage: Literal["all", "encode", "pretrain", "vgg", "mid", "post", "sample", "eval"] = "all"
    out: str = ""               # folder of the run; "" = out/<data><res>, out/digits-imagenet
    source: str = ""            # encode: folder of ImageNet's class folders
    teacher: str = ""           # FILE, URL, EDM2 snapshot; "" = pretrain.pt or official; scratch = train it
    mid: Literal["cmt", "none"] = "cmt"                  # Eq. 7
    post: Literal["ect", "ecd", "ecd_euler", "ecd_code"] = "ect"     # Eq. 3; ecd_code: as their 512 script
    init: str = "teacher"       # first weights: teacher | random | FILE; sample, eval: show FILE

    steps: int = 50_000         # of mid, others: PRESETS; x batch 128 = 6.4 million pairs (B.3)
    batch: int = 128            # images or pairs (x_t, x_0) per step, over all processes (B.3)
    batch_gpu: int = 0          # how many at once per process, to save memory; gradients accumulate; 0 = all
    lr: float = 7e-4            # learning rate of Adam (B.3)
    decay: Literal["linear", "constant", "sqrt", "steps"] = "linear"     # of lr; sqrt: EDM2; steps: B.5
    warmup: int = 0             # steps of linear warm-up
    ema_beta: float = 0.999     # share of the average weights that a step keeps; choice: as in their 512 code
    ema_std: float = 0.0        # > 0: power-function EMA of this relative width (EDM2), instead of ema_beta
    dropout: float = 0.5        # of the student, at resolutions up to 16 (B.3, as ECT-XL); pretrain: all

    loss: Literal["lpips", "elatent", "huber", "l2"] = "lpips"       # d of Eq. 7; lpips of digits: a VGG
    ensemble: Literal["none", "bg", "bgc", "bgcfnc"] = "none"        # elatent: random views of both (B.5)
    huber_c: float = 0.06       # of sqrt(|.|^2 + c^2) - c, mid and post (ECT on ImageNet)
    nfe: int = 16               # teacher steps per trajectory (B.3)
    trajectories: int = 128     # choice: per solve, pairs shuffled over several steps; 0 = batch/nfe (paper)
    q: int = 512                # post: the step in t is n(t) t / q (B.3: 1/512)
    main: str = ""              # post ecd: teacher of the step from t to r; "" = --teacher
    guide: str = ""             # weak model that guides the teacher's step and its samples; "" = none
    w: float = 1.0              # autoguidance weight, D = guide + w (main - guide); 1 = off
    P_mean: float = -0.8        # ln sigma ~ N(P_mean, P_std^2), not cut off (ECT, EDM2)
    P_std: float = 1.6

    second_sigma: float = 1.526 # second noise level of 2-step sampling (ECT)
    sampler: Literal["dpmpp", "heun"] = "dpmpp"          # of the teacher: nfe steps; heun: 32 steps, 63 calls
    labels: Literal["random", "balanced"] = "random"     # of samples: drawn by seed, or seed % classes
    seeds: str = "0-63"         # sample: FIRST-LAST[:STEP]; 7-997:10 of balanced labels: class 7
    samples: int = 50_000       # eval: images per score
    repeat: int = 1             # eval: scores with fresh seeds, reported as mean, deviation and minimum
    vae: str = ""               # 512: encode, decode: NAME, FOLDER; "" = the data's, else ft-mse (EDM2)

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "tf32"    # as the authors; mid: bf16; fp32: exact
    compile: bool = False       # the nets that a stage trains or asks; --no-compile: not
    seed: int = 0
    log_every: int = 100
    save_every: int = 2_500     # steps between checkpoints and previews
    dry_run: bool = False       # say what would be skipped and trained and what is missing, and end


# Settings of the data that are no knobs: Adam's beta2, the VGG's SGD (set_up), SQRT_FROM.
ECD = dict(steps=100_000, decay="constant", q=256)                                          # B.3
# choice: the nets of 64's ECD teacher are not named; XL by its cost, the guide of EDM2's own preset
GUIDED = dict(guide="edm2-img64-xs-0134217-0.110", w=1.7)
PRESETS = {  # (data, stage, its --mid or --post): later rows win, --help shows the result; "own" = a path
    ("*", "encode", "*"): dict(batch_gpu=8),              # pictures at a time: 0.63 GB each at 512 (EDM2: 8)
    ("imagenet512", "*", "*"): dict(loss="elatent", dropout=0.0, post="ecd", ensemble="bgcfnc"),
    ("*", "pretrain", "*"): dict(steps=327_680, batch=2048, lr=7e-3, decay="sqrt", warmup=4_883,
                                 ema_std=0.050, dropout=0.1),          # EDM2 Table 6: XL, then XXL
    ("imagenet512", "pretrain", "*"): dict(steps=458_752, lr=6.5e-3, P_mean=-0.4, P_std=1.0, dropout=0.1),
    ("imagenet512", "vgg", "*"): dict(steps=500_400, batch=256, lr=0.1, decay="steps", ema_beta=0.0),   # B.5
    # choice: a fixed target is drawn and learned in bf16 no worse than in fp32: measured on digits
    ("*", "mid", "*"): dict(precision="bf16"),
    ("imagenet64", "mid", "*"): dict(compile=True),       # choice: a fifth off a step, H200 (docs/costs.md)
    ("imagenet512", "mid", "*"): dict(steps=100_000, lr=2e-4),                              # B.5
    ("*", "post", "*"): dict(lr=1e-4, ema_beta=0.9999),                                     # B.3
    ("*", "post", "ecd"): ECD, ("*", "post", "ecd_euler"): ECD,
    ("imagenet64", "post", "ecd"): GUIDED, ("imagenet64", "post", "ecd_euler"): GUIDED,
    ("imagenet512", "post", "*"): dict(decay="constant", q=1024, main="edm2-img512-xxl-0939524-0.075",
                                       guide="edm2-img512-m-0268435-0.155", w=2.05),
    # choice: B.5 says lr 1e-4 and 12.8 Mimg, the authors' script 1e-6, Table 8 16 Mimg
    ("imagenet512", "post", "ecd_code"): dict(steps=125_000, lr=1e-6),
    # choice: a start for own images, as the CIFAR script's
    ("own", "*", "*"): dict(samples=10_000, dropout=0.1),
    ("own", "pretrain", "*"): dict(steps=50_000, batch=256, warmup=500),
    ("own", "mid", "*"): dict(steps=20_000),
    ("own", "post", "*"): dict(steps=10_000, ema_beta=0.999),
    ("digits", "*", "*"): dict(out="out/digits-imagenet", precision="fp32", dropout=0.0, log_every=50,
                               save_every=250, samples=2_000, labels="balanced"),
    ("digits", "pretrain", "*"): dict(steps=2_000, batch=32, lr=1e-2, warmup=50, ema_std=0.1, P_mean=-1.2,
                                      P_std=1.2),
    ("digits", "vgg", "*"): dict(steps=300, batch=128, lr=3e-3, ema_beta=0.0),
    ("digits", "mid", "*"): dict(steps=900, batch=32, lr=3e-3, ema_beta=0.99),
    ("digits", "post", "*"): dict(steps=600, batch=32, lr=3e-4, ema_beta=0.99, q=512, decay="linear"),
}
ABOUT = {"pretrain": "stage 1 of 5, pre-training (EDM2): the loss falls while the images improve",
         "vgg": "stage 2 of 5, the VGG that measures in mid-training: its loss on labels falls to about 0",
         "mid": "stage 3 of 5, mid-training (Eq. 7): the loss, the distance to the teacher's ends, falls",
         "post": "stage 4 of 5, post-training (Eq. 3): the loss hardly falls; judge by scores",
         "eval": "stage 5 of 5, scores: every net's images compared with the data; lower is better"}
STAGES = ["pretrain", "vgg", "mid", "post", "eval"]   # what --stage all runs, in this order: fid.stages_of
NO_TEACHER = ["ect"]                                  # post-trainings that ask no teacher
FILES = {"imagenet64": "data/imagenet64.zip", "imagenet512": "data/imagenet512-sd.zip"}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
parse = partial(fid.parse, sys.modules[__name__])     # (argv) -> Config
RANK, WORLD, DEVICE = 0, 1, torch.device("cpu")       # of this process; launch() sets them


# ---- pairs and losses -------------------------------------------------------------------------
# sigma, t, r, levels: noise levels, from 80 to 0.002 along a trajectory; D_x, f_t, f_r: a net's images
def loss_edm2(net, x, sigma, eps, sigma_data=0.5):
    """EDM2 Eq. 21: denoising under a learned log variance u(sigma); sum over pixels, mean over images."""
    D_x, u = net(x + sigma.view(-1, 1, 1, 1) * eps, sigma, return_logvar=True)
    weight = edm_weight(sigma, sigma_data).view(-1, 1, 1, 1)
    return (weight / u.exp() * (D_x - x) ** 2 + u).sum() / len(x)


def edm_weight(sigma, sigma_data=0.5):
    """(sigma^2 + sd^2) / (sigma sd)^2 = 1 / c_out^2, (B,): EDM's weight, and ECT's on ImageNet."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def one_hot(labels, classes):
    """labels (B,) -> (B, classes) float32; (B, 0) for a net without classes."""
    return F.one_hot(labels, classes).float() if classes else labels.new_zeros(len(labels), 0).float()


teacher_solver = solvers.dpmpp                        # of trajectories, and of samples by --sampler dpmpp
teacher_sigmas = solvers.logsnr_sigmas                # (steps) -> steps + 1 noise levels, from 80
HEUN_STEPS = 32                                       # of --sampler heun: 63 calls (EDM2)


def solve_size(cfg):
    """(n, used): trajectories per solve, and how many states of each become pairs: all but the end."""
    return cfg.trajectories or cfg.batch // cfg.nfe, cfg.nfe


@torch.no_grad()
def teacher_pairs(cfg, teacher, shape, g, classes):
    """Eq. 7: n trajectories of the frozen teacher; the first `used` states of each are paired with its end.

      xs = teacher_solver(teacher, x_T, sigmas)                  # one trajectory; x_i of Eq. 7 is xs[nfe - i]
      pairs = [(xs[k], sigmas[k], xs[-1]) for k in range(used)]

    shape: one image's. Every process draws its share and gets all. Returns shuffled x_t (P, C, H, W), t,
    the classes y and owner (P,), and the ends x_0 (n, C, H, W): pair p's end is x_0[owner[p]].
    """
    n, used = solve_size(cfg)
    sigmas = teacher_sigmas(cfg.nfe)                  # (nfe+1,), from 80 to 0.002
    levels = sigmas.to(g.device, torch.float32, non_blocking=True)
    mine = slice(RANK * n // WORLD, (RANK + 1) * n // WORLD)
    # choice: x_T is pure noise (Eq. 7, as in the authors' 512-pixel code), no guidance, uniform classes
    x_T = levels[0] * randn((n, *shape), g)[mine]
    y = one_hot(torch.randint(max(classes, 1), (n,), generator=g, device=g.device), classes)
    xs = gather(teacher_solver(lambda x, sigma: teacher(x, sigma, y[mine]), x_T, sigmas))
    order = torch.randperm(used * n, generator=g, device=g.device)
    t, owner = levels[:used].repeat_interleave(n), torch.arange(n, device=g.device).repeat(used)
    return xs[:used].flatten(0, 1)[order], t[order], y[owner[order]], owner[order], xs[-1]


def loss_cmt(net, x_t, t, target, d):
    """Eq. 7: regress states x_t (B, C, H, W) of teacher trajectories, at levels t (B,), onto their ends.

    d: from make_distance; target: d.features of the ends, computed once per trajectory. Unit weight, mean
    (B.2, B.3). The target is fixed data: no stop-gradient is needed (Sec. 3.2).
    """
    return d.distance(d.features(net(x_t, t)), target).mean()


def loss_cmt_views(net, x_t, t, x_0, distance, view):
    """loss_cmt, each pair seen through a random view of its own (B.5); view: rows of distance.draw."""
    view = dict(zip(distance.views, view))
    seen, end = (distance.features(distance.augment(x, view)) for x in (net(x_t, t), x_0))
    return distance.distance(seen, end).mean()


def ect_step(t, q, k=8.0, b=1.0):
    """Second noise level: r = t (1 - n(t) / q), at least 0; n(t) = 1 + k sigmoid(-b t), k and b of ECT."""
    return t * (1 - (1 + k * torch.sigmoid(-b * t)) / q).clamp(min=0)


def loss_ect(net, x_t, x_r, t, r, weight, huber_c=0.0):
    """Eq. 3 with EDM's weight (B,) for 1 / (t - r), as in ECT on ImageNet: weight |f(x_t, t) - sg f(x_r, r)|.

    Mean over images. x_t, x_r: one image with one noise at t > r (ECT), or joined by a teacher's step (ECD).
    net(x, sigma) uses one dropout mask in both calls. huber_c: c in sqrt(d^2 + c^2) - c; 0 = the plain norm.
    """
    with torch.no_grad():
        f_r = torch.where(r.view(-1, 1, 1, 1) > 0, net(x_r, r), x_r)  # trap: net(x_r, 0), q < 5, is NaN
    f_t = net(x_t, t)
    # trap: vector_norm has slope 0 where both agree; the root of a sum of squares would have 0 * inf
    d = torch.linalg.vector_norm((f_t - f_r).flatten(1), dim=1)
    if huber_c:
        d = (d.square() + huber_c**2).sqrt() - huber_c
    return (d * weight).mean()


def autoguided(main, guide, w):
    """Autoguidance (Karras et al. 2024): D = guide + w (main - guide), as a function of (x, sigma, y)."""
    if guide is None or w == 1:
        return main
    return lambda x, sigma, class_labels: guide(x, sigma, class_labels).lerp(main(x, sigma, class_labels), w)


def make_distance(cfg):
    """d of Eq. 7: LPIPS at 64 pixels, ELatentLPIPS on latents, a VGG of their labels on digits; or pixels."""
    if cfg.loss in ("huber", "l2"):
        return nets.PixelDistance(cfg.huber_c if cfg.loss == "huber" else 0.0)
    assert cfg.loss in ("lpips", "elatent"), f"{cfg.loss}: make_distance returns nothing for it"
    if cfg.loss == "lpips" and cfg.data != "digits":
        return nets.pretrained_lpips().to(DEVICE)
    path = f"{cfg.out}/vgg.pt"
    if not (ckpt := nets.finished(path)):
        fail(3, f"{path} is not finished; run --stage vgg first, or pass --loss l2")
    distance = new_vgg(cfg, 0)
    kept = distance.state_dict()                      # without the classifier
    nets.load_weights(distance, {k: v for k, v in ckpt["ema"].items() if k in kept}, path)
    return distance.requires_grad_(False).eval()


def wants_vgg(cfg):
    """Whether mid-training measures with a VGG that is first trained on the labels of the data."""
    return cfg.mid != "none" and (cfg.loss == "elatent" or (cfg.data == "digits" and cfg.loss == "lpips"))


def new_vgg(cfg, classes):
    """The VGG that measures, with a head of `classes` to train it on labels (B.5); 0 = only the distance."""
    torch.manual_seed(fold(cfg.seed, "vgg"))
    if cfg.data == "digits":
        return nets.VGG().to(DEVICE)
    return nets.ELatentLPIPS(num_classes=classes, ensemble=cfg.ensemble).to(DEVICE)


# ---- train ------------------------------------------------------------------------------------
def solve(cfg, run, number):
    """A solve's pairs: x_t, t, y, owner, views of each; and what they share: its ends, mostly as features."""
    g = torch.Generator(DEVICE).manual_seed(fold(cfg.seed, "solve", number))
    *pairs, x_0 = teacher_pairs(cfg, run.teacher, run.shape, g, run.classes)
    views = () if cfg.ensemble == "none" else run.distance.draw(pairs[0], g).values()        # of each pair
    shared = [x_0] if views else run.distance.features(x_0)              # once per end; of views: per pair
    return [*pairs, *views], shared


def read_batch(cfg, images, step):
    """This process's share of a step's batch: images as stored, labels. Pinned: no copy to a GPU waits."""
    g = torch.Generator().manual_seed(fold(cfg.seed, cfg.stage, step, "data"))
    index = torch.randint(len(images.labels), (cfg.batch,), generator=g)
    index = index[RANK * cfg.batch // WORLD:(RANK + 1) * cfg.batch // WORLD]
    share = images.read(index), images.labels[index]
    return share if DEVICE.type == "cpu" else [a.pin_memory() for a in share]


def image_batch(cfg, run, step, mine):
    """The rows `mine` of a batch: x (B, C, H, W), noise levels t (B,), one-hot y, noises eps, labels (B,)."""
    g, B = torch.Generator(DEVICE).manual_seed(fold(cfg.seed, cfg.stage, step)), cfg.batch
    raw, labels = next(run.ahead)                     # in the order of steps: one call a step
    latent_noise, eps = randn((B, *run.shape), g)[mine], randn((B, *run.shape), g)[mine]
    x, labels = to_input(raw, latent_noise), labels.to(DEVICE, non_blocking=True)
    t, y = (cfg.P_mean + cfg.P_std * randn(B, g))[mine].exp(), one_hot(labels, run.classes)
    if cfg.stage == "vgg" and cfg.data == "digits":   # their VGG is to know noisy ones; one strength a batch
        g.manual_seed(fold(cfg.seed, cfg.stage, step, "dropout", 0))     # only a name: scores depend on it
        x = x + 0.2 * torch.rand((), generator=g, device=DEVICE) * randn((B, *run.shape), g)[mine]
    return x, t, y, eps, labels


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


def loss_of(cfg, run, seed, rows, shared):
    """The loss of a micro-batch: rows and shared come from batches; seed is for its first row's dropout."""
    if cfg.stage == "vgg":                            # B.5: cross-entropy, images not augmented
        x, *_, labels = rows
        torch.manual_seed(seed)                       # trap: else every process has the same dropout mask
        return F.cross_entropy(run.net.logits(x), labels)
    masks = nets.dropout_masks(run.net, range(seed, seed + len(rows[0])))
    f = partial(run.net, class_labels=rows[2], masks=masks)
    if cfg.stage == "mid":
        x_t, t, _, owner, *view = rows                # owner: which end of the solve is a pair's
        target = [a[owner] for a in shared]
        if view:
            return loss_cmt_views(f, x_t, t, *target, run.distance, view)
        return loss_cmt(f, x_t, t, target, run.distance)                                      # Eq. 7
    x, t, y, eps, _ = rows
    if cfg.stage == "pretrain":
        return loss_edm2(f, x, t, eps, run.net.sigma_data)
    assert cfg.post in ("ect", "ecd", "ecd_euler", "ecd_code"), f"{cfg.post}: no branch returns its loss"
    r, weight = ect_step(t, cfg.q), edm_weight(t, run.net.sigma_data)
    x_t, x_r = (x + s.view(-1, 1, 1, 1) * eps for s in (t, r))
    if cfg.post in ("ecd", "ecd_euler", "ecd_code"):  # by the frozen teacher: no gradient
        teacher, order = partial(run.teacher, class_labels=y), 1 if cfg.post == "ecd_euler" else 2
        x_r = solvers.ode_step(teacher, x_t, t, r, order)
    return loss_ect(f, x_t, x_r, t, r, weight, cfg.huber_c)                                   # Eq. 3


def train(cfg):
    """Run a stage from its last checkpoint to its end. As plain loops: docs/walkthrough.md, 3 and 5."""
    if not (run := set_up(cfg)):      # run.flat: all weights of net as one vector, run.grad: its gradient
        return
    net, opt, tally, start, B = run.net, run.opt, run.tally, run.tally["step"], cfg.batch
    share, micro = B // WORLD, cfg.batch_gpu or B // WORLD    # rows of a process, of a forward pass
    mine = slice(RANK * share, (RANK + 1) * share)
    run.ahead = fid.ahead(partial(read_batch, cfg, run.images), range(start, cfg.steps))  # lazy; mid: none
    for step, (batch, shared) in enumerate(batches(cfg, run, mine), start):
        opt.param_groups[0]["lr"] = lr = lr_at(cfg, step)
        loss_sum, part = 0.0, micro / B * tally["scale"]      # of the mean over all processes; fp16 scales it
        with nets.hoist(net, force=True):             # EDM2 Eq. 66: normalised once for all micro-batches
            for k in range(0, share, micro):
                seed = fold(cfg.seed, cfg.stage, step, "dropout") + mine.start + k  # of the first row
                loss = loss_of(cfg, run, seed, [a[k:k + micro] for a in batch], shared)
                (loss * part).backward()
                loss_sum += loss.detach() * part
        norm, mean, stop = total(run.grad, loss_sum, tally["scale"])          # the one wait of a step
        if math.isfinite(norm + mean):            # if not: no step, so weights and moments are untouched
            opt.step()                            # updates run.flat with run.grad
        run.grad.zero_()
        run.flat_ema.lerp_(run.flat, 1 - ema_beta(cfg, step))

        # bookkeeping from here on
        done = step + 1
        count(cfg, tally, mean, norm)                 # a skipped step lowers fp16's scale, ten end the run
        to_save = stop or done % cfg.save_every == 0 or done == cfg.steps
        if to_save or done % cfg.log_every == 0 or done == start + 1:
            report(cfg, lr, tally, **nets.peak_memory())
        if to_save and RANK == 0:
            nets.save_checkpoint(run.path, net=net, ema=run.ema, opt=opt, **run.saved, **tally)
            fid.save_preview(cfg, tally, stop, previewer(cfg, run.ema), ", the classes in turn")
        if to_save:
            fid.wait_for_first()
        if stop:
            fail(75, f"stopped by a signal; step {done} is saved, run the same command again to go on")


SQRT_FROM = dict(imagenet64=35_000, imagenet512=70_000, own=5_000, digits=500)    # of --decay sqrt (EDM2)
DECAYS = {"linear": lambda cfg, step: 1 - step / cfg.steps, "constant": lambda cfg, step: 1.0,
          "sqrt": lambda cfg, step: max(step / SQRT_FROM[data_name(cfg)], 1) ** -0.5,          # EDM2 Eq. 67
          "steps": lambda cfg, step: 0.1 ** sum(step >= k * cfg.steps for k in (0.3, 0.6, 0.9))}         # B.5


def lr_at(cfg, step):
    """Learning rate of a step: --warmup steps of warm-up, times --decay."""
    return cfg.lr * DECAYS[cfg.decay](cfg, step) * min(1.0, (step + 1) / (cfg.warmup + 1))


def ema_beta(cfg, step):
    """--ema_beta, or that of a power-function EMA of relative width --ema_std (EDM2 Eq. 123-127)."""
    if not cfg.ema_std:
        return cfg.ema_beta
    roots = np.roots([1, 7, 16 - cfg.ema_std**-2, 12 - cfg.ema_std**-2])
    return (1 - 1 / (step + 1)) ** (roots[np.isreal(roots)].real.max() + 1)


def set_up(cfg):
    """The stage's images, teacher, distance, and begin's net and counts; None if there is nothing to do."""
    if cfg.stage == "mid" and cfg.mid == "none":
        return log("mid: left out by --mid none")
    if cfg.stage == "pretrain" and given_teacher(cfg):
        state, kwargs = teacher_state(cfg)            # fetched and checked
        if cfg.teacher and not os.path.exists(f"{cfg.out}/mid.pt"):
            build(cfg, kwargs, state, cfg.teacher)    # does it fit? not after hours of training the VGG
        return log(f"pretrain: not trained, the teacher is {cfg.teacher or 'there'}")
    if cfg.stage == "vgg" and not wants_vgg(cfg):
        return log(f"vgg: not trained, --loss {cfg.loss} of --data {cfg.data} needs none")
    ckpt, to_go = resume(cfg)                         # steps that are left
    if to_go or not fid.same_names(cfg, ckpt):        # finished under the same names: nothing need be read
        images, asked = load_data(cfg) if needs_data(cfg) else None, asked_nets(cfg)
        stamp = images.stamp if images else "none"
        if images and len(images.labels) < 1_000:
            fid.say(f"warning: images: {len(images.labels)}; so few are learned by heart (docs/faq.md)")
        stamp += "".join(f", {name} {nets.stamp(state)}" for name, (state, _) in asked.items())
        fid.same_data(ckpt, f"{cfg.out}/{cfg.stage}.pt", stamp)
    if not to_go:
        return log(f"{cfg.stage}: finished, nothing to do")
    frozen = {name: build(cfg, size, state, getattr(cfg, name) or "the teacher")
              for name, (state, size) in asked.items() if name != "guide" or cfg.w != 1}
    teacher = autoguided(frozen.get("main") or frozen.get("teacher"), frozen.get("guide"), cfg.w)
    state, kwargs, source = (None, ckpt["model"], "") if ckpt else first_weights(cfg, images, asked)
    net = build(cfg, kwargs, state, source, train=True)        # with a checkpoint begin loads its weights
    distance = make_distance(cfg) if cfg.stage == "mid" else None
    # choice: as ECT (B.3); the authors' 512 script has 0.999 in mid-training
    beta2 = 0.999 if cfg.stage == "mid" and data_name(cfg) == "imagenet512" else 0.99
    optimizer = partial(torch.optim.Adam, betas=(0.9, beta2), fused=True)
    if cfg.stage == "vgg" and data_name(cfg) == "imagenet512":
        optimizer = partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4, fused=True)     # B.5
    return begin(cfg, ckpt, net, optimizer, stamp, kwargs, images=images, teacher=teacher, distance=distance,
                 shape=(kwargs["img_channels"], *[kwargs["img_resolution"]] * 2), classes=kwargs["label_dim"])


# ---- nets -------------------------------------------------------------------------------------
def given_teacher(cfg):
    """Whether pre-training means reading or fetching a teacher, not training it."""
    return cfg.teacher != "scratch" and bool(cfg.teacher or data_name(cfg) in nets.PRETRAINED)


def teacher_state(cfg):
    """(weights, kwargs of its net) of --teacher, else <out>/pretrain.pt, else the official teacher."""
    if cfg.teacher not in ("", "scratch"):
        state, kwargs, stated = nets.read_weights(cfg.teacher)
        if (stage := stated.get("stage", "pretrain")) != "pretrain":
            fail(3, f"--teacher {cfg.teacher} is of --stage {stage}, no denoiser; pass what pretrain made")
        return state, kwargs
    if ckpt := nets.finished(f"{cfg.out}/pretrain.pt"):
        return ckpt["ema"], ckpt["model"]
    if cfg.teacher or data_name(cfg) not in nets.PRETRAINED:
        fail(3, f"no finished teacher in {cfg.out}; run --stage pretrain first, or pass --teacher FILE")
    return nets.load_pretrained(nets.PRETRAINED[data_name(cfg)])


def build(cfg, kwargs, state=None, what="", train=False):
    """An EDM2 from kwargs (of an official file or SIZES), with weights by name if given.

    Frozen (train=False): its weights are normalised once, in the precision of the stage.
    """
    if cfg.stage == "vgg":
        return new_vgg(cfg, kwargs["label_dim"])
    torch.manual_seed(fold(cfg.seed, cfg.stage, "init"))    # choice: a random student has a start of its own
    pretrain = cfg.stage == "pretrain" and train      # then u(sigma) is trained too, and dropped afterwards
    net = nets.make(nets.EDM2Precond, kwargs, what, logvar_channels=128 if pretrain else 0,
                    dropout=cfg.dropout if train else 0.0, dropout_res=None if pretrain else 16)
    if state is not None:
        nets.load_weights(net, {k: v for k, v in state.items() if not k.startswith("logvar_")}, what)
    net = net.to(DEVICE, memory_format=torch.channels_last)
    net.compute_dtype = HALF.get(cfg.precision)      # EDM2 casts inside: no in_precision() as for CIFAR
    if cfg.compile and cfg.stage not in RUN:
        net.compile(dynamic=False)
    return net.train() if train else nets.freeze(net)


def asked_nets(cfg):
    """{name: (weights, kwargs)} of the nets a stage uses: the teacher, or in ECD --main, and --guide."""
    names = ("main", "guide") if cfg.stage == "post" and cfg.post not in NO_TEACHER else ()
    asked = {name: nets.load_pretrained(getattr(cfg, name)) for name in names if getattr(cfg, name)}
    if cfg.stage == "mid" or (names and not cfg.main):
        asked["teacher"] = teacher_state(cfg)
    return asked


def first_weights(cfg, images, asked):
    """(weights, kwargs, name) that a net starts from; asked: the nets that the stage uses."""
    if cfg.stage in ("pretrain", "vgg"):
        return None, model_size(cfg, images), ""
    if cfg.stage == "post" and cfg.mid != "none" and cfg.init in INITS:
        ckpt = fid.finished_mid(cfg, nets.finished)
        return ckpt["ema"], ckpt["model"], f"{cfg.out}/mid.pt"
    state, kwargs = asked.get("teacher") or teacher_state(cfg)       # the student has the teacher's size
    if cfg.init not in INITS:
        return nets.fitting(*nets.load_pretrained(cfg.init), kwargs, cfg.init), kwargs, cfg.init
    return (state, kwargs, "the teacher") if cfg.init == "teacher" else (None, kwargs, "")


def model_size(cfg, images):
    """The kwargs of the EDM2 for --data: XXL for ImageNet's latents, tiny for 8x8 pixels, else XL."""
    channels, _, side = images.shape
    size = "edm2-8" if side == 8 else "edm2-xxl" if data_name(cfg) == "imagenet512" else "edm2-xl"
    return dict(img_resolution=side, img_channels=4 if channels == 8 else channels,
                label_dim=images.classes, **nets.SIZES[size])


# ---- sample -----------------------------------------------------------------------------------
def prior(net, seeds, labels):
    """x_T (B, C, H, W), one-hot classes, a generator per seed: image i depends on seed i alone."""
    generators = [torch.Generator().manual_seed(fold("sample", s)) for s in seeds]
    shape, classes = (net.img_channels, net.img_resolution, net.img_resolution), max(net.label_dim, 1)
    x_T = 80.0 * solvers.noise(shape, generators).to(DEVICE)
    drawn = [int(torch.randint(classes, (), generator=g)) for g in generators]
    y = torch.tensor([s % classes for s in seeds] if labels == "balanced" else drawn)
    return x_T, one_hot(y.to(DEVICE), net.label_dim), generators


def make_sampler(cfg, net, kind):
    """f(seeds) -> (B, C, H, W). kind: 1 or 2 steps of a consistency model, or "teacher": solved, guided."""
    D = net
    if kind == "teacher" and cfg.guide and cfg.w != 1:
        state, kwargs = nets.load_pretrained(cfg.guide)
        D = autoguided(net, build(cfg, kwargs, state, cfg.guide), cfg.w)

    @torch.no_grad()
    def sampler(seeds):
        x_T, y, generators = prior(net, seeds, cfg.labels)
        f = partial(D, class_labels=y)
        if kind != "teacher":
            return to_images(cfg, solvers.few_step(f, x_T, [80.0, cfg.second_sigma][:kind], generators))
        if cfg.sampler == "heun":
            return to_images(cfg, solvers.heun(f, x_T, solvers.edm_sigmas(HEUN_STEPS))[-1])
        return to_images(cfg, teacher_solver(f, x_T, teacher_sigmas(cfg.nfe))[-1])
    return sampler


def previewer(cfg, net):
    """Sampler of previews; None where there is nothing to see: for a VGG, or latents without their VAE."""
    if cfg.stage != "vgg" and net.img_channels != 4:
        plain = replace(cfg, guide="", labels="balanced")
        return make_sampler(plain, net, "teacher" if cfg.stage == "pretrain" else 1)


@torch.no_grad()
def draw_sheets(cfg, found):
    """A sheet per net, a column per class; stages.png, trajectory.png. Returns what stages.png is made of."""
    balanced = replace(cfg, labels="balanced")
    samplers = {(name, steps): make_sampler(balanced, net, kind)
                for name, net, kinds, _ in found for steps, kind in kinds.items()}
    shown, classes, words = fid.save_classes(cfg, found, samplers, found[0][1].label_dim)
    if found[0][0] == "teacher":
        teacher, sigmas = found[0][1], teacher_sigmas(cfg.nfe)
        x_T, y, _ = prior(teacher, range(12), "balanced")
        xs = teacher_solver(lambda x, sigma: teacher(x, sigma, y), x_T, sigmas)      # (nfe+1, 12, C, H, W)
        answers = {name: lambda x, sigma, net=net: net(x, sigma.to(x), y) for name, net, *_ in found}
        fid.save_trajectory(cfg.out, xs, sigmas, answers, partial(to_images, cfg),
                            [f"class {k}" for k in classes])
    return shown, classes, words


# ---- data -------------------------------------------------------------------------------------
def data_name(cfg):
    """The name of --data in PRESETS and in the default --out."""
    if cfg.data == "imagenet" and cfg.res not in (64, 512):
        fail(2, f"--res {cfg.res} is not possible with --data imagenet; it is 64 or 512")
    return {"imagenet": f"imagenet{cfg.res}", "digits": "digits"}.get(cfg.data, "own")


MEAN, STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)    # of raw latents per channel (EDM2)
load_vae = cache(nets.sd_vae)                         # loaded once


class Images:
    """Images of an EDM2 zip or folder, read when they are asked for: uint8 pixels, or moments of latents.

    labels (N,) int64, 0 where the data has none; classes: how many; stamp: changes when the data does. Every
    image is read once before the first step; <out>/checked.txt says so to the next stage.
    """

    def __init__(self, path, out):
        self.path, self.shape, self.pool = path, None, ThreadPoolExecutor(8)
        self.names, self.open = fid.list_pictures(path, (*fid.PICTURES, ".npy"))
        unlabelled = torch.zeros(len(self.names), dtype=torch.long), 0
        self.labels, self.classes = fid.read_labels(path, self.names) or unlabelled
        self.shape = tuple(self.image(0).shape)
        self.stamp = fid.check_once(path, self.names, self.image, f"{out}/checked.txt")
        self.stamp += f", labels {zlib.crc32(self.labels.numpy()):08x}"

    def image(self, k):
        """Image k as stored: uint8 (3 | 1, H, W), or float32 (8, h, w): mean and deviation of a latent."""
        x = self.open(self.names[k])
        if x.dtype == np.uint8:
            x = x.transpose(2, 0, 1)
        if self.shape not in (None, x.shape) or x.ndim != 3 or x.dtype not in (np.uint8, np.float32):
            raise fid.DataError(f"{self.path}: {self.names[k]} is {x.dtype} {x.shape}, not {self.shape}; "
                                "make them alike by --stage encode --source FOLDER")
        return torch.from_numpy(np.ascontiguousarray(x))

    def read(self, index):
        """index (B,) -> (B, C, H, W) as stored."""
        return torch.stack(list(self.pool.map(self.image, index.tolist())))


class Digits:
    """The bundled digits with the interface of Images, whole in memory."""

    def __init__(self):
        (self.pixels, self.labels), self.classes = fid.digits(), 10
        self.stamp, self.shape = fid.stamp(self.pixels), self.pixels[0].shape

    def read(self, index):
        return self.pixels[index]


def needs_data(cfg):
    """Whether this stage trains on images: CMT does not, it needs only its teacher."""
    return dict(pretrain=not given_teacher(cfg), vgg=wants_vgg(cfg), post=True).get(cfg.stage, False)


opened = cache(Images)                                # once for all checks, once for all stages


def load_data(cfg):
    """Images of --data; exit code 3, with the remedy, if they are not there or their size is not --res."""
    if cfg.data == "digits":
        return Digits()
    if not os.path.exists(path := FILES.get(data_name(cfg), cfg.data)):
        fail(3, f"{path} is not there; pass --data PATH or digits, or make it from ImageNet: python "
                f"train_cmt_imagenet.py --res {cfg.res} --stage encode --source FOLDER")
    images = opened(path, cfg.out)
    channels, side = ([8], 64) if cfg.res == 512 else ([1, 3], cfg.res)
    if images.shape[0] not in channels or images.shape[1:] != (side, side):
        fits = 512 if images.shape[0] == 8 else images.shape[1]
        fail(3, f"--data {images.path} holds {tuple(images.shape)}; --res {cfg.res} needs "
                f"{(channels[-1], side, side)}: pass --res {fits}, or run --stage encode")
    return images


@cache
def latent_scale(device):
    """Mean and deviation of raw latents, each (1, 4, 1, 1); kept, so that no step waits for a copy."""
    return [torch.tensor(numbers, device=device).view(1, 4, 1, 1) for numbers in (MEAN, STD)]


def to_input(raw, noise):
    """Images as stored -> the network's input: pixels in [-1, 1], or a latent of deviation 0.5.

    A latent is a new sample of its posterior each time, mean + noise * deviation, on EDM2's scale.
    """
    if raw.dtype == torch.uint8:
        return fid.to_float(raw, DEVICE)
    (mean, deviation), (mu, sd) = raw.to(DEVICE, non_blocking=True).chunk(2, 1), latent_scale(DEVICE)
    return ((mean + noise * deviation - mu) * (0.5 / sd)).contiguous(memory_format=torch.channels_last)


def vae_of(cfg):
    """The VAE of --vae, else the one that made --data."""
    return fid.encoder_of(FILES.get(data_name(cfg), cfg.data), "vae", load_vae, cfg.vae, DEVICE)


def to_images(cfg, x):
    """Network output -> images in [-1, 1]: latents (4 channels) through the VAE; pixels are images."""
    if x.shape[1] != 4:
        return x
    mu, sd = latent_scale(x.device)
    pixels = nets.decode_latents(vae_of(cfg), x * (sd / 0.5) + mu)
    # trap: EDM2's VAE is in [0, 1], and its pixels are floor(255 v), half a level darker than to_uint8's
    return (pixels.clamp(0, 1) * 255).floor() / 127.5 - 1


def encode_target(cfg):
    """The .zip that --stage encode makes; exit code 2 if it is no .zip or not ours, 3 without --source."""
    target = FILES.get(data_name(cfg), cfg.data)
    if not os.path.exists(cfg.source):
        fail(3, f"--source {cfg.source or 'FOLDER'}: not there; name a folder with a folder for each class")
    if not target.endswith(".zip"):
        fail(2, f"--data {target}: images are encoded into a .zip; name one")
    if os.path.exists(target) and not os.path.exists(f"{target}.parts/begun.json"):
        fail(2, f"{target} is there already, {target}.parts does not say of what; name another --data ZIP")
    return target


def encode_data(cfg):
    """--source, a folder per class -> EDM2's zip: PNG at 64 pixels, moments of the SD-VAE at 512.

    First as shards in <zip>.parts, then all in one file: for a while, twice its size is needed.
    """
    target = encode_target(cfg)
    parts = f"{target}.parts"
    names, open_picture = fid.list_pictures(cfg.source)
    labels, _ = fid.read_labels(cfg.source, names) or (torch.zeros(len(names), dtype=torch.long), 1)
    vae, size = None, 3 * cfg.res**2
    record = dict(crop=f"EDM2 {cfg.res}", precision=cfg.precision,
                  labels=f"crc32 {zlib.crc32(labels.numpy()):08x}")
    if cfg.res == 512:
        vae, size = vae_of(cfg), 4 * 8 * 64**2
        record["vae"] = vae.identity

    def read(name):
        return np.asarray(fid.crop(fid.rgb(open_picture(name, exif=False)), cfg.res))      # EDM2 rotates none

    def encode(images):               # trap: EDM2 feeds [0, 1] where Stable Diffusion feeds [-1, 1]
        return [nets.encode_moments(vae, images.to(DEVICE).float() / 255) if vae else images]
    size *= len(names) * (1 if os.path.exists(target) else 2)
    record = fid.begin_encode(parts, record, cfg.source, names, read, size)
    with torch.autocast(DEVICE.type, HALF.get(cfg.precision), enabled=cfg.precision in HALF):
        fid.encode_shards(parts, [""], names, read, encode, cfg.batch_gpu)
    if RANK == 0 and not os.path.exists(target):
        fid.write_whole(target, lambda file: fid.write_zip(file, parts, record, labels.tolist()))
    log(f"encode: {target}, {len(names):,} images; {parts} can be deleted")


# ---- plumbing ---------------------------------------------------------------------------------
# launch, gather, resume, begin, total, on_signal, main, lr_at, batches: one text in all four (test_house).
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]                      # USR1: Slurm's --signal
SIGNALS += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)      # trap: nohup ignores it
STOP = []                                             # signals received: the loop saves, then ends
NEED_STAGE = {"vgg": "steps batch lr"}                # flags that need the stage's name: --vgg.steps
NO_WEIGHT = ("dry_run data stage out source teacher main guide vae seeds samples repeat second_sigma sampler "
             "labels compile batch_gpu log_every save_every")     # no weight depends on them: fid.steps_left
READ_BY = {  # which stages, or "stage method", read a knob; one that is not here is read by all
    "mid init huber_c": "mid, post",
    "nfe loss ensemble trajectories": "mid",
    "P_mean P_std": "pretrain, post", "dropout": "pretrain, mid, post",
    "post q w": "post",
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
    ("above 0, below 1e12", lambda v: 0 < v < 1e12): "batch steps repeat log_every save_every P_std res",
    ("above 0, at most 1", lambda v: 0 < v <= 1): "lr",
    ("above 0, below 80", lambda v: 0 < v < 80): "second_sigma",
    ("in 2 to 1,000", lambda v: 2 <= v <= 1_000): "nfe",
    ("in -10 to 10", lambda v: abs(v) <= 10): "P_mean",
    ("0 or more", lambda v: v >= 0): "batch_gpu warmup huber_c trajectories ema_std w",
    ("in [0, 1)", lambda v: 0 <= v < 1): "ema_beta dropout",
    ("2 or more", lambda v: v >= 2): "samples",
    ("in 2 to 2^20: beyond, t - r is mostly rounding", lambda v: 2 <= v <= 2**20): "q",
}


def check(cfg):
    """Whether this stage trains; before any does, bad values (exit code 2) or files (3) end the run."""
    trains = cfg.stage not in RUN and (needs_data(cfg) or (cfg.stage == "mid" and cfg.mid != "none"))
    fid.check_values(cfg, LIMITS, WORLD if trains else 0)
    if cfg.stage == "encode":
        encode_target(cfg)
    if cfg.post == "ecd_code" and data_name(cfg) in ("imagenet64", "own"):
        fail(2, "--post ecd_code: the numbers of the authors' script for --res 512 alone; pass --post ecd")
    if cfg.w != 1 and not cfg.guide:
        fail(2, f"--w {cfg.w}: there is no --guide whose answer it weighs; name one, or pass --w 1")
    if cfg.stage == "mid" and trains:
        fid.check_solve(cfg, *solve_size(cfg), WORLD)
        if cfg.ensemble != "none" and cfg.loss != "elatent":
            fail(2, f"--ensemble {cfg.ensemble} belongs to --loss elatent; pass --ensemble none")
        if (cfg.res == 512) != (cfg.loss == "elatent") and cfg.loss in ("lpips", "elatent"):
            fail(2, f"--loss {cfg.loss} does not measure --res {cfg.res}; lpips is for 64, elatent for 512")
        if cfg.loss == "huber" and not cfg.huber_c:
            fail(2, f"--loss huber --huber_c {cfg.huber_c}: huber needs a c above 0; or --loss l2")
    if cfg.stage == "post" and cfg.precision in ("bf16", "fp16"):
        fid.say(f"warning: {cfg.precision} is too coarse for post-training (docs/faq.md); pass tf32")
    if trains and not os.path.exists(f"{cfg.out}/{cfg.stage}.pt"):
        check_files(cfg)                              # one that has begun compares its data in train
    if cfg.stage in ("sample", "eval") and cfg.guide:
        nets.load_pretrained(cfg.guide)
    if cfg.stage in ("encode", "sample", "eval") and cfg.res == 512 and cfg.data != "digits":
        vae_of(cfg)                                   # are diffusers and the VAE there?
    if cfg.stage == "eval" and cfg.data != "digits":
        fid.prefetch(data_name(cfg), must=data_name(cfg) != "own")
    return trains


def check_files(cfg):
    """Check now, not after days of other stages, that --data, --teacher, --init, VGG and guide are usable."""
    there = cfg.data == "digits" or os.path.exists(FILES.get(data_name(cfg), cfg.data))
    if needs_data(cfg) or there:
        images = load_data(cfg)
        channels, side, _ = images.shape
        by_vgg = cfg.stage == "mid" and cfg.loss == "lpips" and cfg.data != "digits"
        if by_vgg and (channels != 3 or side < 16):
            fail(2, f"--loss lpips needs 3x16x16 at least, not {channels}x{side}x{side}; pass --loss huber")
        if cfg.stage in ("mid", "post"):
            given, size = teacher_state if given_teacher(cfg) else None, model_size(cfg, images)
            wanted = {k: size[k] for k in nets.INTERFACE}
            fid.check_teacher(cfg, nets.finished, given, images.stamp, wanted)
    if cfg.stage in ("mid", "post") and cfg.init not in INITS:
        candidates(cfg)                               # --init FILE: is it a net?
    if cfg.stage == "mid" and not wants_vgg(cfg) and (there or cfg.dry_run):
        make_distance(cfg)                            # its VGG: fetched, if later stages have their data
    for name in (cfg.main, cfg.guide) if cfg.stage == "post" and cfg.post not in NO_TEACHER else ():
        if name:
            nets.load_pretrained(name)


# ---- main -------------------------------------------------------------------------------------
def candidates(cfg):
    """What to sample from: (name, net, {steps: kind of sampler}, checkpoint); --init FILE: only that."""
    found, few = [], {1: 1, 2: 2}                     # steps of a row: how make_sampler draws it
    if cfg.init not in INITS:
        state, kwargs = nets.load_pretrained(cfg.init)
        fid.check_init(cfg, kwargs)
        name = "init_" + os.path.splitext(os.path.basename(cfg.init))[0]
        return [(name, build(cfg, kwargs, state, cfg.init), few, None)]
    ckpt = nets.finished(f"{cfg.out}/pretrain.pt") if cfg.teacher in ("", "scratch") else None
    if ckpt or given_teacher(cfg):
        state, kwargs = teacher_state(cfg)
        steps = HEUN_STEPS if cfg.sampler == "heun" else cfg.nfe
        teacher = build(cfg, kwargs, state, cfg.teacher or "the teacher")
        found = [("teacher", teacher, {1: 1, steps: "teacher"}, ckpt)]
    for stage in ("mid", "post", "alone/post"):       # alone: a run without mid-training, to compare with
        if ckpt := nets.finished(f"{cfg.out}/{stage}.pt"):
            net = build(cfg, ckpt["model"], ckpt["ema"], stage)
            found.append((stage.partition("/")[0], net, few, ckpt))
    return found or fail(3, f"no finished stage in {cfg.out}: right --out? train without --stage, or --init")


def evaluate(cfg):
    """Score every net there is, the teacher by its solver, students in 1 and 2 steps: <out>/results.md."""
    found, rows = candidates(cfg), []
    log(ABOUT["eval"])
    stages = draw_sheets(cfg, found) if RANK == 0 else ()
    images = None if data_name(cfg) in fid.REFERENCES else load_data(cfg)
    fid.say_changed(found, images.stamp if images else "")
    if data_name(cfg) == "own" and fid.from_first(partial(fid.prefetch, cfg.data, False)):
        return log(f"eval: no Inception, not scored; open stages.png, trajectory.png, curve.png in {cfg.out}")
    features = (fid.DigitsNet() if cfg.data == "digits" else fid.load_inception()).to(DEVICE)
    if not images:
        reference = fid.load_reference(data_name(cfg))
    else:
        raws = map(images.read, torch.arange(RANK, len(images.labels), WORLD).split(250))
        drawn = (fid.to_uint8(to_images(cfg, to_input(raw, 0.0))) for raw in raws)  # latents at their means
        reference = fid.measure(features, drawn, DEVICE, f"of --data {cfg.data}")
    for name, net, kinds, ckpt in found:
        rows.append(dict(stage=name, **nets.cost(ckpt)))
        samplers = {steps: make_sampler(cfg, net, kind) for steps, kind in kinds.items()}
        ours = fid.score_net(rows[-1], samplers, features, reference, cfg)
    solver = "heun" if cfg.sampler == "heun" else fid.name_of(teacher_solver)
    note = (f"{cfg.samples} samples a score, seeds from 0, EMA weights, second sigma {cfg.second_sigma}, "
            f"{cfg.labels} labels, teacher by {solver}, guide {cfg.guide or 'none'}, w {cfg.w}")
    log(fid.save_results(cfg, rows, f"{fid.protocol(ours, reference)}\n{note}.", stages))


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


RUN = {"encode": encode_data, "eval": evaluate,        # every other stage trains
       "sample": lambda cfg: fid.save_samples(cfg, candidates(cfg), make_sampler)}
if __name__ == "__main__":
    main(sys.argv[1:])
