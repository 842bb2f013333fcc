"""CMT on CIFAR-10, FFHQ-64, AFHQv2-64: a diffusion teacher becomes a one-step generator (Sec. 4.2, App. B.2).

  python train_cmt_cifar.py --data digits                   # laptop: all stages in minutes, no download
  torchrun --nproc_per_node=8 train_cmt_cifar.py            # CIFAR-10: download, mid, post, scores
  torchrun --nproc_per_node=8 train_cmt_cifar.py --data ffhq --stage mid
  python train_cmt_cifar.py --data my_images.zip --res 32   # your own images: .zip, folder, .npz

pretrain: train or fetch the teacher. mid: regress the student onto the ends of its trajectories (Eq. 7).
post: ECT with a fixed q (Eq. 3). Paper: CIFAR-10, 1/2-step FID 2.74/1.97. The same command again resumes.
Copy and fork. "choice": ours, not the paper's; "trap": a bug avoided.
"""
# /// script
# dependencies = ["torch", "numpy", "lpips", "pillow", "scipy"]
# ///
import math
import os
import signal
import sys
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Literal

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
    data: str = "cifar10"       # cifar10 | ffhq | afhqv2 | digits | folder, .zip or .npz of your own images
    res: int = 0                # own images are cropped and resized (LANCZOS) to this; 0 = they have one size
    stage: Literal["all", "pretrain", "mid", "post", "sample", "eval"] = "all"   # all: those not finished
    out: str = ""               # folder of the run; "" = out/<data>
    teacher: str = ""           # FILE, URL; "" = <out>/pretrain.pt, else the official one; scratch = train it
    mid: Literal["cmt", "kd", "slow", "none"] = "cmt"    # Eq. 7; kd, slow: the paper's ablations (4.3)
    post: Literal["ect", "ecd", "ecd_euler", "annealed"] = "ect"  # ecd: x_r by the teacher; annealed: q grows
    init: str = "teacher"       # first weights: teacher | random | FILE; sample, eval: show FILE

    steps: int = 300_000        # of mid (others: PRESETS); x batch 128 = 38.4 million pairs (Sec. 4.2)
    batch: int = 128            # images or pairs (x_t, x_0) per step, over all processes (B.2)
    batch_gpu: int = 0          # how many at once per process, to save memory; gradients accumulate; 0 = all
    lr: float = 2e-4            # learning rate of RAdam (B.2); pretrain: of Adam
    decay: Literal["linear", "constant"] = "linear"      # of lr, to zero (B.2)
    warmup: int = 0             # steps of linear warm-up
    ema_beta: float = 0.999     # average = beta average + (1 - beta) weights; choice: as the authors' code
    dropout: float = 0.2        # in the net that is trained (B.2; pretrain: EDM)

    loss: Literal["lpips", "huber", "l2"] = "lpips"      # mid: d of Eq. 7; huber: a norm; l2: a mean square
    huber_c: float = 0.06       # of sqrt(|.|^2 + c^2) - c, mid and post; post: 0 = the norm itself (ECT)
    nfe: int = 16               # steps of the teacher, in trajectories and in samples (B.2)
    trajectories: int = 128     # choice: per solve; their pairs serve several steps; 0 = batch/nfe (paper)
    q: int = 4096               # post: the gap t - r is n(t) t / q, see ect_step (B.2: 1/4096)
    stair: int = 0              # post annealed: steps at each of q, q^2, q^3, ... (q 2: 2, 4, 8); else 0
    P_mean: float = -1.1        # ln sigma ~ N(P_mean, P_std^2), not truncated (ECT)
    P_std: float = 2.0

    second_sigma: float = 0.821 # second noise level of 2-step sampling (ECT)
    sigma_shift: float = 0.0    # choice: sample the net as trained (official: c_skip(sigma - 0.003))
    seeds: str = "0-63"         # sample: one image per seed, FIRST-LAST or FIRST-LAST:STEP
    samples: int = 50_000       # eval: images per score
    repeat: int = 1             # eval: scores with fresh seeds, reported as mean, deviation and minimum

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"    # mid: bf16; TF32 rounds away ECT's 1/4096
    compile: bool = False       # torch.compile for a stage's nets; --no-compile turns it off
    seed: int = 0
    log_every: int = 100
    save_every: int = 5_000     # steps between checkpoints and previews
    dry_run: bool = False       # say what would be skipped and trained and what is missing, and end


PRESETS = {  # (data, stage, its --mid or --post): later rows win, --help shows the result; "own" = a path
    ("*", "pretrain", "*"): dict(steps=390_625, batch=512, lr=1e-3, warmup=19_531, dropout=0.13,
                                 ema_beta=0.99929, decay="constant", P_mean=-1.2, P_std=1.2),   # EDM Table 7
    ("cifar10", "*", "*"): dict(compile=True),          # choice: twice as fast on an H200 (docs/costs.md)
    ("ffhq", "*", "*"): dict(res=64, compile=True),
    ("afhqv2", "*", "*"): dict(res=64, compile=True),
    ("ffhq", "pretrain", "*"): dict(steps=781_250, batch=256, lr=2e-4, warmup=39_062, dropout=0.05,
                                    ema_beta=0.99964),
    ("afhqv2", "pretrain", "*"): dict(steps=781_250, batch=256, lr=2e-4, warmup=39_062, dropout=0.25,
                                      ema_beta=0.99964),
    # choice: a fixed target is drawn and learned in bf16 no worse than in fp32: digits (docs/costs.md)
    ("*", "mid", "*"): dict(precision="bf16"),
    ("*", "post", "*"): dict(steps=100_000, lr=1e-4, ema_beta=0.9999, huber_c=0.0),       # B.2
    ("ffhq", "post", "*"): dict(q=512),
    ("afhqv2", "post", "*"): dict(q=1024),
    ("*", "post", "annealed"): dict(q=2, stair=25_000, steps=200_000, decay="constant"),   # ECT, 25.6 million
    # choice: a start for own images, hours on one GPU; the lengths above are for 50,000 and more
    ("own", "*", "*"): dict(samples=10_000),
    ("own", "pretrain", "*"): dict(steps=50_000, batch=128, lr=2e-4, warmup=1_000),
    ("own", "mid", "*"): dict(steps=20_000),
    ("own", "post", "*"): dict(steps=10_000, warmup=100, ema_beta=0.999),
    ("own", "post", "annealed"): dict(stair=1_250),                                        # q from 2 to 256
    # choice: pseudo-Huber in both stages, which scores best on digits (docs/results.md)
    ("digits", "*", "*"): dict(precision="fp32", dropout=0.0, loss="huber", log_every=50, save_every=250,
                               samples=2_000, batch=32),
    ("digits", "pretrain", "*"): dict(steps=2_000, lr=2e-3, warmup=50, decay="linear", ema_beta=0.995),
    ("digits", "mid", "*"): dict(steps=900, lr=2e-3, ema_beta=0.99),
    # choice: warm-up: RAdam's first 5 steps are plain gradient steps, and the gradient grows with q
    ("digits", "post", "*"): dict(steps=600, lr=3e-4, ema_beta=0.99, q=512, warmup=20, huber_c=0.06),
    ("digits", "post", "annealed"): dict(steps=1_500, stair=187, q=2, lr=1e-3, decay="linear"),
}
ABOUT = {"pretrain": "stage 1 of 4, pre-training: the loss soon falls slowly, but images still improve",
         "mid": "stage 2 of 4, mid-training (Eq. 7): the loss, the distance to the teacher's ends, falls",
         "post": "stage 3 of 4, post-training (Eq. 3): a large gradient and a level loss are normal",
         "eval": "stage 4 of 4, scores: every net's images compared with the data; lower is better"}
STAGES = ["pretrain", "mid", "post", "eval"]          # what --stage all runs, in this order: fid.stages_of
NO_TEACHER = ["ect", "annealed"]                      # post-trainings that ask no teacher
FILES = {"cifar10": "data/cifar-10-python.tar.gz",
         "ffhq": "data/ffhq-64x64.zip", "afhqv2": "data/afhqv2-64x64.zip"}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
parse = partial(fid.parse, sys.modules[__name__])     # (argv) -> Config
RANK, WORLD, DEVICE = 0, 1, torch.device("cpu")       # of this process; launch() sets them


# ---- pairs and losses -------------------------------------------------------------------------
# sigma, t, r: noise levels, from 80 to 0.002 along a trajectory; D_x, f_t, f_r: a net's answers
def loss_dm(net, x, sigma, eps, sigma_data=0.5):
    """EDM Eq. 8: denoising, mean over pixels. sigma: (B,)."""
    D_x = net(x + sigma.view(-1, 1, 1, 1) * eps, sigma)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2          # 1 / c_out^2
    return (weight.view(-1, 1, 1, 1) * (D_x - x) ** 2).mean()


teacher_solver = solvers.dpmpp                        # of every trajectory and sample of the teacher
teacher_sigmas = solvers.logsnr_sigmas                # (steps) -> steps + 1 noise levels, from 80


def solve_size(cfg):
    """(n, used): trajectories per solve (Slow CMT: per level), and how many states of each become pairs."""
    n = cfg.trajectories or cfg.batch // cfg.nfe
    return (cfg.batch, 1) if cfg.mid == "kd" else (n, cfg.nfe)                # KD: the noise alone


@torch.no_grad()
def teacher_pairs(cfg, teacher, shape, g):
    """Eq. 7: n trajectories of the frozen teacher; the first `used` states of each are paired with its end.

      xs = teacher_solver(teacher, x_T, sigmas)                  # one trajectory; x_i of Eq. 7 is xs[nfe - i]
      pairs = [(xs[k], sigmas[k], xs[-1]) for k in range(used)]

    shape: one image's. Every process draws its share and gets all. Returns shuffled x_t (P, C, H, W), t
    and owner (P,), and the ends x_0 (n, C, H, W): pair p's end is x_0[owner[p]].
    """
    n, used = solve_size(cfg)
    sigmas = teacher_sigmas(cfg.nfe)                  # (nfe+1,), from 80 to 0.002
    levels = sigmas.to(g.device, torch.float32, non_blocking=True)
    mine = slice(RANK * n // WORLD, (RANK + 1) * n // WORLD)
    # choice: x_T is pure noise (Eq. 7, the authors' 512-pixel code); their CIFAR code adds a training image
    x_T = levels[0] * randn((n, *shape), g)[mine]
    xs = gather(teacher_solver(teacher, x_T, sigmas))                                # (nfe+1, n, C, H, W)
    order = torch.randperm(used * n, generator=g, device=g.device)
    t, owner = levels[:used].repeat_interleave(n), torch.arange(n, device=g.device).repeat(used)
    return xs[:used].flatten(0, 1)[order], t[order], owner[order], xs[-1]


def loss_cmt(net, x_t, t, target, d):
    """Eq. 7: regress states x_t (B, C, H, W) of teacher trajectories, at levels t (B,), onto their ends.

    d: from make_distance; target: d.features of the ends, computed once per trajectory. Unit weight, mean
    (B.2, B.3). The target is fixed data: no stop-gradient is needed (Sec. 3.2).
    """
    return d.distance(d.features(net(x_t, t)), target).mean()


def ect_step(t, q, k=8.0, b=1.0):
    """Second noise level: r = t (1 - n(t) / q), at least 0; n(t) = 1 + k sigmoid(-b t), k and b of ECT."""
    return t * (1 - (1 + k * torch.sigmoid(-b * t)) / q).clamp(min=0)


def loss_ect(net, x_t, x_r, t, r, huber_c=0.0):
    """Eq. 3: |f(x_t, t) - stop_gradient f(x_r, r)| / (t - r), mean over images.

    x_t, x_r: the same image with the same noise at t > r (ECT), or joined by a teacher's step (ECD).
    net(x, sigma) uses one dropout mask in both calls. huber_c: c in sqrt(d^2 + c^2) - c; 0 = the plain norm.
    """
    with torch.no_grad():
        f_r = torch.where(r.view(-1, 1, 1, 1) > 0, net(x_r, r), x_r)  # trap: net(x_r, 0), q < 5, is NaN
    f_t = net(x_t, t)
    # trap: vector_norm has slope 0 where both agree; the root of a sum of squares would have 0 * inf
    d = torch.linalg.vector_norm((f_t - f_r).flatten(1), dim=1)
    if huber_c:
        d = (d.square() + huber_c**2).sqrt() - huber_c
    return (d / (t - r)).mean()


def make_distance(cfg):
    """d of Eq. 7, by --loss: an object with features(x) -> [(B, ...)] and distance(a, b) -> (B,)."""
    if cfg.loss in ("huber", "l2"):
        return nets.PixelDistance(cfg.huber_c if cfg.loss == "huber" else 0.0)
    assert cfg.loss == "lpips", f"{cfg.loss}: make_distance returns nothing for it"
    return nets.pretrained_lpips().to(DEVICE)


@torch.no_grad()
def slow_pairs(cfg, teacher, images, g):
    """Ablation, Slow CMT (4.3): as teacher_pairs, but n images a level, each solved from there to its end."""
    (n, used), sigmas = solve_size(cfg), teacher_sigmas(cfg.nfe)
    levels = sigmas[:used].to(g.device, torch.float32, non_blocking=True)
    mine = slice(RANK * n // WORLD, (RANK + 1) * n // WORLD)
    x = draw(images, used * n, g).unflatten(0, (used, n))
    x_t = (x + levels.view(-1, 1, 1, 1, 1) * randn(x.shape, g))[:, mine]
    x_0 = torch.stack([teacher_solver(teacher, x_t[i], sigmas[i:])[-1] for i in range(used)])
    x_t, x_0 = gather(x_t).flatten(0, 1), gather(x_0).flatten(0, 1)
    order = torch.randperm(used * n, generator=g, device=g.device)
    return x_t[order], levels.repeat_interleave(n)[order], order, x_0          # pair p's end is x_0[order[p]]


# ---- train ------------------------------------------------------------------------------------
def solve(cfg, run, number):
    """A solve's pairs, x_t, t, owner (P, ...), and what they share: features of the n ends, made once."""
    g = torch.Generator(DEVICE).manual_seed(fold(cfg.seed, "solve", number))
    assert cfg.mid in ("cmt", "kd", "slow"), f"{cfg.mid}: no branch draws its pairs"
    if cfg.mid == "slow":
        *pairs, x_0 = slow_pairs(cfg, run.teacher, run.images, g)
    else:
        *pairs, x_0 = teacher_pairs(cfg, run.teacher, run.shape, g)
    return pairs, run.distance.features(x_0)


def image_batch(cfg, run, step, mine):
    """The rows `mine` of a batch of images x (B, C, H, W), noise levels t (B,) and noises eps."""
    g, B = torch.Generator(DEVICE).manual_seed(fold(cfg.seed, cfg.stage, step)), cfg.batch
    x, eps = draw(run.images, B, g)[mine], randn((B, *run.shape), g)[mine]
    return x, (cfg.P_mean + cfg.P_std * randn(B, g))[mine].exp(), eps


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


def loss_of(cfg, run, step, f, rows, shared):
    """The loss of a micro-batch: f(x, t) is the net in training; rows and shared come from batches."""
    if cfg.stage == "mid":
        x_t, t, owner = rows                          # owner: which end of the solve is a pair's
        return loss_cmt(f, x_t, t, [a[owner] for a in shared], run.distance)                  # Eq. 7
    x, t, eps = rows
    if cfg.stage == "pretrain":
        return loss_dm(f, x, t, eps, run.net.sigma_data)
    assert cfg.post in ("ect", "annealed", "ecd", "ecd_euler"), f"{cfg.post}: no branch returns its loss"
    q = cfg.q ** (1 + step // cfg.stair) if cfg.post == "annealed" else cfg.q               # q, q^2, q^3, ...
    r = ect_step(t, q)
    x_t, x_r = (x + s.view(-1, 1, 1, 1) * eps for s in (t, r))
    if cfg.post in ("ecd", "ecd_euler"):              # by the frozen teacher: no gradient
        x_r = solvers.ode_step(run.teacher, x_t, t, r, 1 if cfg.post == "ecd_euler" else 2)
    return loss_ect(f, x_t, x_r, t, r, cfg.huber_c)                                           # Eq. 3


def train(cfg):
    """Run a stage from its last checkpoint to its end. Mid-training (docs/walkthrough.md, 3) is in short

      for x_t, t, end in teacher_pairs, shuffled, solve after solve:
          loss_cmt(net, x_t, t, features of end, distance).backward(); opt.step()
    """
    if not (run := set_up(cfg)):      # run.flat: all weights of net as one vector, run.grad: its gradient
        return
    net, opt, tally, start, B = run.net, run.opt, run.tally, run.tally["step"], cfg.batch
    share, micro = B // WORLD, cfg.batch_gpu or B // WORLD    # rows of a process, of a forward pass
    mine = slice(RANK * share, (RANK + 1) * share)
    cast_net = in_precision(cfg, net)
    for step, (batch, shared) in enumerate(batches(cfg, run, mine), start):
        opt.param_groups[0]["lr"] = lr = lr_at(cfg, step)
        loss_sum, part = 0.0, micro / B * tally["scale"]      # of the mean over all processes; fp16 scales it
        for k in range(0, share, micro):
            seed = fold(cfg.seed, cfg.stage, step, "dropout") + mine.start + k  # of the first row
            f = partial(cast_net, masks=nets.dropout_masks(net, range(seed, seed + micro)))
            loss = loss_of(cfg, run, step, f, [a[k:k + micro] for a in batch], shared)
            (loss * part).backward()
            loss_sum += loss.detach() * part
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
            report(cfg, lr, tally, **nets.peak_memory())
        if to_save and RANK == 0:
            nets.save_checkpoint(run.path, net=net, ema=run.ema, opt=opt, **run.saved, **tally)
            kind = "teacher" if cfg.stage == "pretrain" else 1        # of make_sampler
            fid.save_preview(cfg, tally, stop, make_sampler(cfg, run.ema, kind))
        if to_save:
            fid.wait_for_first()
        if stop:
            fail(75, f"stopped by a signal; step {done} is saved, run the same command again to go on")


DECAYS = {"linear": lambda cfg, step: 1 - step / cfg.steps, "constant": lambda cfg, step: 1.0}        # B.2


def lr_at(cfg, step):
    """Learning rate of a step: --warmup steps of warm-up, times --decay."""
    return cfg.lr * DECAYS[cfg.decay](cfg, step) * min(1.0, (step + 1) / (cfg.warmup + 1))


def set_up(cfg):
    """The stage's images, teacher, distance, and begin's net and counts; None if there is nothing to do."""
    if cfg.stage == "mid" and cfg.mid == "none":
        return log("mid: left out by --mid none")
    if cfg.stage == "pretrain" and given_teacher(cfg):
        teacher_state(cfg)                            # fetched and checked
        return log(f"pretrain: not trained, the teacher is {cfg.teacher or 'there'}")
    ckpt, to_go = resume(cfg)                         # steps that are left
    images, stamp, teacher, weights = None, "none", None, None   # stamp: what identifies data and teacher
    if to_go or not fid.same_names(cfg, ckpt):        # finished under the same names: nothing need be read
        if needs_data(cfg):
            images = load_data(cfg)
            stamp, seen = fid.stamp(images), cfg.steps * cfg.batch / len(images)
            log(f"{cfg.data}: {stamp}, each seen {seen:,.3g} times, unconditional")
            if len(images) < 1_000:
                fid.say(f"warning: images: {len(images)}; so few are learned by heart (docs/faq.md)")
            images = images.to(DEVICE)
        if cfg.stage == "mid" or (cfg.stage == "post" and cfg.post not in NO_TEACHER):
            weights = teacher_state(cfg)              # and the kwargs of its net
            stamp += f", teacher {nets.stamp(weights[0])}"
        fid.same_data(ckpt, f"{cfg.out}/{cfg.stage}.pt", stamp)
    if not to_go:
        return log(f"{cfg.stage}: finished, nothing to do")
    if weights:
        # choice: the teacher too in --precision: bf16 moves its ends less than a finer solve would
        teacher = in_precision(cfg, build(cfg, weights[1], weights[0], cfg.teacher or "the teacher"))
    state, kwargs, source = (None, ckpt["model"], "") if ckpt else first_weights(cfg, images, weights)
    net = build(cfg, kwargs, state, source, train=True)        # with a checkpoint begin loads its weights
    distance = make_distance(cfg) if cfg.stage == "mid" else None
    adam, radam = partial(torch.optim.Adam, fused=True), partial(torch.optim.RAdam, foreach=False)
    optimizer = adam if cfg.stage == "pretrain" else radam          # Adam: EDM; RAdam: B.2
    return begin(cfg, ckpt, net, optimizer, stamp, kwargs, images=images, teacher=teacher, distance=distance,
                 shape=(net.img_channels, net.img_resolution, net.img_resolution))


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


def build(cfg, kwargs, state=None, what="", train=False, shift=0.0):
    """A DDPM++ from kwargs (of an official file or SIZES), with weights by name if given; shift: of sigma."""
    torch.manual_seed(fold(cfg.seed, cfg.stage, "init"))    # choice: a random student has a start of its own
    net = nets.make(nets.EDMPrecond, kwargs, what, augment_dim=0, dropout=cfg.dropout if train else 0.0,
                    sigma_shift=shift)                # trap: of drawn students alone; else the ends move
    if state is not None:
        nets.load_weights(net, state, what)
    net = net.to(DEVICE, memory_format=torch.channels_last)
    return net.train() if train else net.requires_grad_(False).eval()


def first_weights(cfg, images, weights):
    """(weights, kwargs, name) that a net starts from; weights: the teacher's, with kwargs, if read."""
    if cfg.stage == "pretrain":
        return None, model_size(cfg, images), ""
    if cfg.stage == "post" and cfg.mid != "none" and cfg.init in INITS:
        ckpt = fid.finished_mid(cfg, nets.finished)
        return ckpt["ema"], ckpt["model"], f"{cfg.out}/mid.pt"
    state, kwargs = weights or teacher_state(cfg)     # the student has the teacher's size
    if cfg.init not in INITS:
        return nets.fitting(*nets.load_pretrained(cfg.init), kwargs, cfg.init), kwargs, cfg.init
    return (state, kwargs, "the teacher") if cfg.init == "teacher" else (None, kwargs, "")


def in_precision(cfg, net):
    """net as the losses call it: compiled with --compile and run in --precision; losses are in fp32."""
    net = torch.compile(net, dynamic=False) if cfg.compile else net
    cast = HALF.get(cfg.precision)

    def f(x, sigma, masks=None):
        with torch.autocast(DEVICE.type, cast, enabled=cast is not None):
            return net(x, sigma, masks=masks)
    return f


def model_size(cfg, images):
    """The kwargs of the DDPM++ for images of this size."""
    _, channels, height, width = images.shape
    if height != width or f"ddpm++-{height}" not in nets.SIZES:
        fail(3, f"--data {cfg.data}: no net of nets.SIZES draws {width}x{height} pixels; pass --res "
                f"{fid.net_side(min(width, height))}")
    return {**nets.SIZES[f"ddpm++-{height}"], "img_channels": channels}


# ---- sample -----------------------------------------------------------------------------------
def prior(net, seeds):
    """x_T (B, C, H, W) and a generator per seed: image i depends on seed i alone, not on batch or process."""
    generators = [torch.Generator().manual_seed(fold("sample", s)) for s in seeds]
    shape = net.img_channels, net.img_resolution, net.img_resolution
    return 80.0 * solvers.noise(shape, generators).to(DEVICE), generators


def make_sampler(cfg, net, kind):
    """f(seeds) -> (B, C, H, W). kind: 1 or 2 steps of a consistency model, or "teacher": its solver."""
    @torch.no_grad()
    def sampler(seeds):
        x_T, generators = prior(net, seeds)
        if kind == "teacher":
            return teacher_solver(net, x_T, teacher_sigmas(cfg.nfe))[-1]
        return solvers.few_step(net, x_T, [80.0, cfg.second_sigma][:kind], generators)
    return sampler


@torch.no_grad()
def draw_sheets(cfg, found):
    """Saves stages.png and trajectory.png. Returns what the first is made of, to draw it with its scores."""
    shown = [(name, steps, make_sampler(cfg, net, kind)(range(10)))
             for name, net, kinds, _ in found for steps, kind in kinds.items() if kind != 2]
    if data_name(cfg) == "own" and os.path.exists(cfg.data):     # to compare with: there may be no score
        shown.append(("real images", 0, fid.to_float(load_data(cfg)[:10], "cpu")))
    stages = shown, (), fid.about(cfg, found)         # without names of columns, and with words below
    fid.save_stages(cfg.out, *stages)
    if found[0][0] == "teacher":
        teacher, sigmas = found[0][1], teacher_sigmas(cfg.nfe)
        xs = teacher_solver(teacher, prior(teacher, range(10))[0], sigmas)           # (nfe+1, 10, C, H, W)
        answers = {name: lambda x, sigma, net=net: net(x, sigma.to(x)) for name, net, *_ in found}
        fid.save_trajectory(cfg.out, xs, sigmas, answers)
    return stages


# ---- data -------------------------------------------------------------------------------------
def data_name(cfg):
    """The name of --data in PRESETS and in the default --out."""
    return cfg.data if cfg.data in (*FILES, "digits") else "own"


def needs_data(cfg):
    """Whether this stage trains on images: CMT does not, it needs only its teacher; Slow CMT does."""
    return dict(pretrain=not given_teacher(cfg), mid=cfg.mid == "slow", post=True).get(cfg.stage, False)


@cache                                                # once for all checks, once for all stages
def opened(path, side):
    """Images of the archive of CIFAR-10, or of any file or folder, cropped to side (0: as they are)."""
    return fid.read_cifar(path) if path.endswith(".tar.gz") else fid.load_images(path, side)


def load_data(cfg):
    """All images of --data as uint8 (N, C, H, W). If missing, CIFAR-10 is fetched; others: exit code 3."""
    path = FILES.get(cfg.data, cfg.data)
    if cfg.data == "digits":
        return fid.digits()[0]
    if cfg.data == "cifar10" and not os.path.exists(path):
        path = nets.fetch(fid.CIFAR_URL)
    if not os.path.exists(path):
        fail(3, f"--data {path or repr(path)} is not there; pass --data PATH, {', '.join(FILES)} "
                "or digits, or link an EDM zip there")
    return opened(path, cfg.res)


def draw(images, n, g):
    """n of the images in [-1, 1] on the generator's device."""
    # choice: drawn with replacement, no augmentation: a batch is then a function of its step alone
    return fid.to_float(images[torch.randint(len(images), (n,), generator=g, device=g.device)], g.device)


# ---- plumbing ---------------------------------------------------------------------------------
# launch, gather, resume, begin, total, on_signal, main, lr_at, batches: one text in all four (test_house).
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]                      # USR1: Slurm's --signal
SIGNALS += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)      # trap: nohup ignores it
STOP = []                                             # signals received: the loop saves, then ends
NO_WEIGHT = ("dry_run data stage out teacher seeds samples repeat second_sigma sigma_shift compile batch_gpu "
             "log_every save_every")                  # no weight depends on them: fid.steps_left
READ_BY = {  # which stages, or "stage method", read a knob; one that is not here is read by all
    "mid init huber_c": "mid, post",
    "nfe loss": "mid", "trajectories": "mid, not mid kd", "P_mean P_std": "pretrain, post",
    "post q stair": "post",
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
    ("above 0, below 1e12", lambda v: 0 < v < 1e12): "batch steps repeat log_every save_every P_std",
    ("above 0, at most 1", lambda v: 0 < v <= 1): "lr",
    ("above 0, below 80", lambda v: 0 < v < 80): "second_sigma",
    ("in 2 to 1,000", lambda v: 2 <= v <= 1_000): "nfe",
    ("in -10 to 10", lambda v: abs(v) <= 10): "P_mean",
    ("0 or more", lambda v: v >= 0): "batch_gpu warmup stair huber_c trajectories res sigma_shift",
    ("in [0, 1)", lambda v: 0 <= v < 1): "ema_beta dropout",
    ("2 or more", lambda v: v >= 2): "samples",
    ("in 2 to 2^20: beyond, t - r is mostly rounding", lambda v: 2 <= v <= 2**20): "q",
}


def check(cfg):
    """Whether this stage trains; before any does, bad values (exit code 2) or files (3) end the run."""
    trains = cfg.stage not in RUN and (needs_data(cfg) or (cfg.stage == "mid" and cfg.mid != "none"))
    fid.check_values(cfg, LIMITS, WORLD if trains else 0)
    side = dict(cifar10=32, ffhq=64, afhqv2=64).get(cfg.data, cfg.res)
    if cfg.res and cfg.res != side:
        fail(2, f"--res {cfg.res}: --data {cfg.data} has {side}x{side} pixels; leave --res out")
    if cfg.stage == "post" and (cfg.post == "annealed") != (cfg.stair > 0):
        fail(2, f"--stair {cfg.stair} with --post {cfg.post}: of annealed alone, above 0; leave it out")
    if cfg.stage == "post" and cfg.stair and cfg.q ** (1 + (cfg.steps - 1) // cfg.stair) > 2**20:
        fail(2, f"--stair {cfg.stair}: q passes 2^20 in {cfg.steps} steps, t - r is rounding; raise it")
    if cfg.stage == "mid" and trains:
        fid.check_solve(cfg, *solve_size(cfg), WORLD)
        if cfg.loss == "huber" and not cfg.huber_c:
            fail(2, f"--loss huber --huber_c {cfg.huber_c}: huber needs a c above 0; or --loss l2")
    if trains and not os.path.exists(f"{cfg.out}/{cfg.stage}.pt"):
        check_files(cfg)                              # one that has begun compares its data in train
    if cfg.stage == "post" and cfg.precision != "fp32":
        fid.say(f"warning: {cfg.precision} is too coarse for post-training (docs/faq.md); pass fp32")
    if cfg.stage == "eval" and cfg.data != "digits":
        fid.prefetch(cfg.data, must=cfg.data in FILES)
    return trains


def check_files(cfg):
    """Check now, not after days of other stages, that --data, --teacher, --init and VGG are usable."""
    read_teacher = teacher_state if given_teacher(cfg) else None
    if cfg.stage == "mid" and (cfg.data in (*FILES, "digits") or os.path.exists(cfg.data)):
        side, _, channels = ((8, 8, 1) if cfg.data == "digits" else (cfg.res or 32, 0, 3) if cfg.data in FILES
                             else fid.image_shape(cfg.data, cfg.res))
        if read_teacher and cfg.data not in FILES:    # it is to draw such images
            shape = dict(img_channels=channels, img_resolution=side, label_dim=0)
            fid.check_teacher(cfg, nets.finished, read_teacher, None, shape)
        if cfg.loss == "lpips" and (channels != 3 or side < 16):
            fail(2, f"--loss lpips needs 3x16x16 at least, not {channels}x{side}x{side}; pass --loss huber")
        make_distance(cfg)                            # its VGG: fetched
    if cfg.stage != "pretrain" and cfg.init not in INITS:
        candidates(cfg)                               # --init FILE: is it a net?
    if needs_data(cfg):                               # can it be read, and by the teacher and its net?
        images = load_data(cfg)
        if cfg.stage == "pretrain":
            model_size(cfg, images)                   # is there a net for this size?
        shape = dict(img_channels=images.shape[1], img_resolution=images.shape[2], label_dim=0)
        fid.check_teacher(cfg, nets.finished, read_teacher, fid.stamp(images), shape)


# ---- main -------------------------------------------------------------------------------------
def candidates(cfg):
    """What to sample from: (name, net, {steps: kind of sampler}, checkpoint); --init FILE: only that."""
    found, few = [], {1: 1, 2: 2}                     # steps of a row: how make_sampler draws it
    if cfg.init not in INITS:
        state, kwargs = nets.load_pretrained(cfg.init)
        fid.check_init(cfg, kwargs)
        name = "init_" + os.path.splitext(os.path.basename(cfg.init))[0]
        return [(name, build(cfg, kwargs, state, cfg.init, shift=cfg.sigma_shift), few, None)]
    ckpt = nets.finished(f"{cfg.out}/pretrain.pt") if cfg.teacher in ("", "scratch") else None
    if ckpt or given_teacher(cfg):
        state, kwargs = teacher_state(cfg)
        teacher = build(cfg, kwargs, state, cfg.teacher or "the teacher")
        found = [("teacher", teacher, {1: 1, cfg.nfe: "teacher"}, ckpt)]
    for stage in ("mid", "post", "alone/post"):       # alone: a run without mid-training, to compare with
        if ckpt := nets.finished(f"{cfg.out}/{stage}.pt"):
            net = build(cfg, ckpt["model"], ckpt["ema"], stage, shift=cfg.sigma_shift)
            found.append((stage.partition("/")[0], net, few, ckpt))
    return found or fail(3, f"no finished stage in {cfg.out}: right --out? train without --stage, or --init")


def evaluate(cfg):
    """Score every net there is, the teacher by its solver, students in 1 and 2 steps: <out>/results.md."""
    found, rows = candidates(cfg), []
    log(ABOUT["eval"])
    stages = draw_sheets(cfg, found) if RANK == 0 else ()
    images = None if cfg.data in FILES else load_data(cfg)
    fid.say_changed(found, "" if images is None else fid.stamp(images))
    if data_name(cfg) == "own" and fid.from_first(partial(fid.prefetch, cfg.data, False)):
        return log(f"eval: no Inception, not scored; open stages.png, trajectory.png, curve.png in {cfg.out}")
    features = (fid.DigitsNet() if cfg.data == "digits" else fid.load_inception()).to(DEVICE)
    reference = fid.load_reference(cfg.data) if images is None else fid.measure(
        features, images[RANK::WORLD].split(250), DEVICE, f"of --data {cfg.data}")
    for name, net, kinds, ckpt in found:
        rows.append(dict(stage=name, **nets.cost(ckpt)))
        samplers = {steps: make_sampler(cfg, net, kind) for steps, kind in kinds.items()}
        ours = fid.score_net(rows[-1], samplers, features, reference, cfg)
    note = (f"{cfg.samples} samples a score, seeds from 0, EMA weights, second sigma {cfg.second_sigma}, "
            f"sigma_shift {cfg.sigma_shift}, teacher by {fid.name_of(teacher_solver)}.")
    log(fid.save_results(cfg, rows, f"{fid.protocol(ours, reference)}\n{note}", stages))


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


RUN = {"eval": evaluate,                              # every other stage trains
       "sample": lambda cfg: fid.save_samples(cfg, candidates(cfg), make_sampler)}
if __name__ == "__main__":
    main(sys.argv[1:])
