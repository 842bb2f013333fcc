"""CMT on CIFAR-10, FFHQ-64, AFHQv2-64: a diffusion teacher becomes a one-step generator (Sec. 4.2, App. B.2).

  python train_cmt_cifar.py --data digits                   # laptop: the whole road in minutes, no download
  torchrun --nproc_per_node=8 train_cmt_cifar.py            # CIFAR-10: fetch all, mid, post, eval
  torchrun --nproc_per_node=8 train_cmt_cifar.py --data ffhq --stage mid
  python train_cmt_cifar.py --data my_images.zip --res 32   # your own images: .zip, folder, .npz
  python train_cmt_cifar.py --data digits --mid none --post annealed --out out/ect        # vanilla ECT
  python train_cmt_cifar.py --data digits --stage sample --seeds 0-63

pretrain: train or fetch the teacher. mid: regress the student onto the ends of the teacher's trajectories
(Eq. 7). post: ECT with a fixed step (Eq. 3). Paper: 1/2-step FID 2.74/1.97 on CIFAR-10, 38.4 + 12.8 Mimg.
Run the same command again to resume. Copy and fork as you please.
"""
import argparse
import difflib
import errno
import fcntl
import hashlib
import inspect
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import time
import traceback
import zipfile
import zlib
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import fid
import nets
import solvers


# ---- knobs ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:                   # field default < matching rows of PRESETS < command line; --flag is the field
    data: str = "cifar10"       # cifar10 | ffhq | afhqv2 | digits | folder, .zip or .npz of your own images
    stage: Literal["all", "pretrain", "vgg", "mid", "post", "sample", "eval", "bias"] = "all"  # all: each not finished
    out: str = ""               # folder of the run; "" = out/<data>
    teacher: str = ""           # FILE, URL; "" = <out>/pretrain.pt, else the official one; scratch = train it
    mid: Literal["cmt", "kd", "slow", "none"] = "cmt"    # cmt: Eq. 7; kd: x_T only; slow: a solve per pair (4.3)
    post: Literal["ect", "ecd", "annealed"] = "ect"      # Eq. 3, fixed step; distillation; ECT's own schedule
    init: str = "teacher"       # student's first weights: teacher | random | FILE; sample, eval: show FILE
    res: int = 0                # own images are cropped and resized (LANCZOS) to this; 0 = they have one size

    steps: int = 300_000        # optimiser steps; x batch 128 = 38.4 Mimg (Sec. 4.2)
    batch: int = 128            # images or pairs (x_t, x_0) per step, over all processes (B.2)
    batch_gpu: int = 0          # per process and forward pass, the rest by accumulation; 0 = all at once
    optimizer: Literal["radam", "adam"] = "radam"        # B.2
    lr: float = 2e-4            # B.2
    decay: Literal["linear", "constant"] = "linear"      # of lr, to zero (B.2)
    warmup: int = 0             # steps of linear warm-up
    clip: float = 0.0           # largest gradient norm; 0 = off, as the official code
    ema_beta: float = 0.999     # choice: the number is missing in B.2; the authors' run script passes 0.999
    dropout: float = 0.2        # of the student (B.2)

    loss: Literal["lpips", "huber", "l2"] = "lpips"      # mid: d of Eq. 7; the others are those of App. D
    vgg: str = ""               # VGG-16 weights for lpips; "" = fetched; digits: a small VGG of their own
    nfe: int = 16               # teacher steps per trajectory (B.2)
    trajectories: int = 128     # choice: per solve, pairs shuffled over several steps; 0 = batch/nfe (paper)
    q: int = 4096               # post: the step in t is n(t) t / q (B.2: 1/4096)
    double: int = 0             # post: steps until q grows by its first value again; 0 = never (B.2)
    huber: float = 0.0          # post: c of the pseudo-Huber norm; 0 = plain L2 norm, as ECT on CIFAR-10
    ecd: Literal["heun", "euler"] = "heun"               # post ecd: the teacher's step from t to r
    P_mean: float = -1.1        # ln sigma ~ N(P_mean, P_std^2), not cut off (ECT)
    P_std: float = 2.0

    mid_sigma: float = 0.821    # second noise level of 2-step sampling (ECT)
    sigma_shift: float = 0.0    # choice: sample the trained function; 0.003 gives official files their scores
    seeds: str = "0-63"         # sample: one image per seed, FIRST-LAST
    samples: int = 50_000       # eval: images per score
    repeat: int = 1             # eval: scores with fresh seeds, reported as mean, deviation and minimum
    inception: str = ""         # eval: Inception weights; "" = fetched

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"    # mid: bf16; TF32 rounds away ECT's 1/4096
    compile: bool = False
    threads: int = 0            # CPU threads; 0 = torch's default. choice: not measured, bits depend on it
    timeout: int = 600          # seconds after which a process that does not answer ends the run
    seed: int = 0
    log_every: int = 100
    save_every: int = 5_000


PRESETS = {  # (data, stage, method): matching rows are laid over each other, top to bottom; "own" = a path
    ("*", "pretrain", "*"): dict(steps=390_625, batch=512, lr=1e-3, warmup=19_531, dropout=0.13,
                                 ema_beta=0.99929, optimizer="adam", decay="constant",
                                 P_mean=-1.2, P_std=1.2),                                   # EDM Table 7
    ("ffhq", "*", "*"): dict(res=64),
    ("afhqv2", "*", "*"): dict(res=64),
    ("ffhq", "pretrain", "*"): dict(steps=781_250, batch=256, lr=2e-4, warmup=39_062, dropout=0.05,
                                    ema_beta=0.99964),
    ("afhqv2", "pretrain", "*"): dict(steps=781_250, batch=256, lr=2e-4, warmup=39_062, dropout=0.25,
                                      ema_beta=0.99964),
    # choice: a fixed target is drawn and learned in bf16 no worse than in fp32: measured on digits
    ("*", "mid", "*"): dict(precision="bf16"),
    ("*", "post", "*"): dict(steps=100_000, lr=1e-4, ema_beta=0.9999),                    # B.2
    ("ffhq", "post", "*"): dict(q=512),
    ("afhqv2", "post", "*"): dict(q=1024),
    ("*", "post", "annealed"): dict(q=2, double=25_000, steps=200_000, decay="constant"),  # ECT, 25.6 Mimg
    ("digits", "*", "*"): dict(precision="fp32", dropout=0.0, threads=1, log_every=50, save_every=250, samples=2_000),
    ("digits", "pretrain", "*"): dict(steps=2_000, batch=32, lr=2e-3, warmup=50, decay="linear",
                                      ema_beta=0.995),
    ("digits", "vgg", "*"): dict(steps=300, batch=128, lr=3e-3),
    ("digits", "mid", "*"): dict(steps=900, batch=32, lr=2e-3, ema_beta=0.99),
    # choice: warm-up: RAdam's first 5 steps are lr |gradient|, not adapted, and the gradient grows with q
    ("digits", "post", "*"): dict(steps=600, batch=32, lr=3e-4, ema_beta=0.99, q=512, warmup=20),
    ("digits", "post", "annealed"): dict(q=2, double=187, steps=1_500, lr=1e-3),
}
FILES = {"cifar10": "data/cifar-10-python.tar.gz",
         "ffhq": "data/ffhq-64x64.zip", "afhqv2": "data/afhqv2-64x64.zip"}
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"
FREE = {  # fields that may differ when a stage goes on, or is found finished; of --teacher only the path may
    "*": "stage out vgg inception seeds samples repeat mid_sigma sigma_shift compile batch_gpu timeout "
         "log_every save_every",
    "pretrain": "teacher mid post init nfe trajectories q double huber ecd loss",
    "vgg": "teacher mid post init nfe trajectories q double huber ecd loss P_mean P_std dropout",
    "mid": "teacher post q double huber ecd P_mean P_std",
    "post": "teacher trajectories loss nfe",
}


def parse(argv=None):
    """argv (list of str, None = sys.argv[1:]) -> Config. Unknown flag or bad value: one line, exit code 2."""
    p = argparse.ArgumentParser(description=__doc__, epilog=inspect.getsource(Config), allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                argument_default=argparse.SUPPRESS, usage="%(prog)s [--field value ...]")
    p.error = lambda message: fail(2, f"{message}; --help lists every flag")
    for f in fields(Config):
        how = dict(type=f.type if f.type in (int, float) else str, choices=get_args(f.type) or None)
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        p.add_argument(f"--{f.name}", help=argparse.SUPPRESS, **how)
    flags, unknown = p.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{f.name}" for f in fields(Config)], 1)
        fail(2, f"unknown flag {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "--help lists all"))
    flags = vars(flags)                               # only what was typed
    name = data_name(Config(**flags))
    given = asdict(Config(**{**PRESETS.get((name, "*", "*"), {}), **flags}))
    key = name, given["stage"], given.get(given["stage"], "*")
    rows = [row for pattern, row in PRESETS.items() if all(a in ("*", b) for a, b in zip(pattern, key))]
    cfg = Config(**{"out": f"out/{name}"} | {k: v for row in rows for k, v in row.items()} | flags)
    for field in ("batch", "steps", "nfe", "repeat", "log_every", "save_every", "lr", "P_std", "mid_sigma",
                  "timeout"):
        if not 0 < getattr(cfg, field, 1) < math.inf:
            fail(2, f"--{field} {getattr(cfg, field)} is not possible; it must be above 0")
    for field in ("batch_gpu", "warmup", "clip", "double", "huber", "threads", "trajectories", "diagonal", "power"):
        if not 0 <= getattr(cfg, field, 0) < math.inf:
            fail(2, f"--{field} {getattr(cfg, field)} is not possible; it must not be negative")
    for field in ("ema_beta", "dropout"):
        if not 0 <= getattr(cfg, field) < 1:
            fail(2, f"--{field} {getattr(cfg, field)} is not possible; it must be in [0, 1)")
    for field in ("q", "samples"):
        if getattr(cfg, field, 2) < 2:
            fail(2, f"--{field} {getattr(cfg, field)} is not possible; it must be 2 at least")
    if os.path.isfile(cfg.out):
        fail(2, f"--out {cfg.out} is a file; name a folder")
    if not seed_range(cfg.seeds):
        fail(2, f"--seeds {cfg.seeds} is not possible; write 7 or 0-63")
    if name == "own" and os.sep not in cfg.data and "." not in cfg.data and not os.path.exists(cfg.data):
        fail(2, f"--data {cfg.data}: not one of {', '.join([*FILES, 'digits'])}, and no such file or folder")
    return cfg


def data_name(cfg):
    """The name of --data in PRESETS and in the default --out."""
    return cfg.data if cfg.data in (*FILES, "digits") else "own"


def seed_range(text):
    """"0-63" or "7" -> list of ints; empty if it is neither."""
    first, _, last = text.partition("-")
    last = last or first
    return list(range(int(first), int(last) + 1)) if first.isdigit() and last.isdigit() else []


# ---- data -------------------------------------------------------------------------------------
def load_data(cfg):
    """Images of --data as uint8 (N, C, H, W), whole in memory. Missing: exit code 3 with the remedy."""
    if cfg.data == "digits":
        return fid.digits()[0]
    path = data_file(cfg)
    if not os.path.exists(path):
        path = nets.fetch(CIFAR_URL, md5=CIFAR_MD5)
    return read_cifar(path) if path.endswith(".tar.gz") else read_own(path, cfg.res)


def data_file(cfg):
    """Where the images of --data are; exit code 3 if they are not, and cannot be fetched."""
    path = FILES.get(cfg.data, cfg.data)
    if cfg.data not in ("digits", "cifar10") and not os.path.exists(path):
        fail(3, f"--data {cfg.data}: {path} is not there; put or link an EDM zip there, or pass --data PATH")
    return path


def read_cifar(path):
    """The 50,000 training images in cifar-10-python.tar.gz, not unpickled: the pixels lie in one piece."""
    nets.check_sums(path, f"{path} (delete it to download it again)", "", CIFAR_MD5)
    marker = b"T" + (10_000 * 3072).to_bytes(4, "little")          # BINSTRING and its length
    with tarfile.open(path) as tar:
        raw = [tar.extractfile(f"cifar-10-batches-py/data_batch_{i}").read() for i in range(1, 6)]
    pixels = b"".join(r[(i := r.index(marker) + 5):i + 10_000 * 3072] for r in raw)
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 3, 32, 32)


def read_own(path, res):
    """A folder, .zip or .npz. res > 0: centre crop and LANCZOS to res; smaller images are refused."""
    if not res:
        return torch.cat(list(fid.read_images(path, batch=256))).contiguous()
    with fid.blame(path):
        names, read = fid.image_source(path)
        images = np.empty((len(names), 3, res, res), np.uint8)
        for i, name in enumerate(names):
            image = Image.fromarray(read(name).squeeze()).convert("RGB")
            (w, h), side = image.size, min(image.size)
            if side < res:
                raise fid.DataError(f"{path}: {name} is {w}x{h}, smaller than --res {res}")
            if (w, h) != (res, res):
                box = (w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2
                image = image.resize((res, res), Image.LANCZOS, box=box)
            images[i] = np.asarray(image).transpose(2, 0, 1)
    return torch.from_numpy(images)


def to_float(images, device):
    """uint8 (B, C, H, W) -> [-1, 1], channels_last, on device."""
    return (images.to(device, non_blocking=True).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


# ---- losses -----------------------------------------------------------------------------------
def loss_dm(net, x, sigma, eps, sigma_data=0.5):
    """EDM Eq. 8: denoising, weight (sigma^2 + sd^2) / (sigma sd)^2, mean over pixels. sigma: (B,)."""
    s = sigma.view(-1, 1, 1, 1)
    weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    return (weight * (net(x + s * eps, sigma) - x) ** 2).mean()


@torch.no_grad()
def teacher_pairs(cfg, teacher, images, sigmas, shape, g, rank, world):
    """Eq. 7: one solve of the frozen teacher gives nfe pairs (state, end) per trajectory, for any world size.

    sigmas (nfe+1,): decreasing grid; shape: of one image; g: Generator. Returns, shuffled, x_t (P, C, H, W), t (P,)
    and owner (P,), and the ends x_0 (n, C, H, W): pair p is regressed onto x_0[owner[p]]. Sec. 4.3: kd takes only
    x_T, a batch at a time; slow takes x_t = x + t eps of data, and solves from each of them to its own end.
    """
    device, levels = g.device, sigmas.to(g.device, torch.float32)
    n, N = solves(cfg)[0], 1 if cfg.mid == "kd" else cfg.nfe
    mine = slice(rank * n // world, (rank + 1) * n // world)
    t = levels[:N].repeat_interleave(n)
    if cfg.mid == "slow":
        x = draw(images, N * n, g).view(N, n, *shape)
        x_t = (x + levels[:-1].view(-1, 1, 1, 1, 1) * randn((N, n, *shape), g))[:, mine]
        x_0 = torch.stack([solvers.dpmpp(teacher, x_t[i], sigmas[i:])[-1] for i in range(N)])
        x_t, x_0 = gather(x_t, world).flatten(0, 1), gather(x_0, world).flatten(0, 1)
        order = torch.randperm(N * n, generator=g, device=device)
        return x_t[order], t[order], x_0, order
    # choice: x_T is pure noise (Eq. 7, the authors' 512-pixel code); their CIFAR code adds a training image
    x_T = levels[0] * randn((n, *shape), g)[mine]
    xs = gather(solvers.dpmpp(teacher, x_T, sigmas, order=3), world)                 # (nfe+1, n, C, H, W)
    order = torch.randperm(N * n, generator=g, device=device)
    return xs[:N].flatten(0, 1)[order], t[order], xs[-1], order % n


def loss_cmt(net, x_t, t, target, distance):
    """Eq. 7: states x_t (B, C, H, W) of teacher trajectories, at noise levels t (B,), onto their ends.

    target: distance.features of the ends, computed once per trajectory. Unit weight, mean over pairs (B.2).
    The target is fixed data: no stop-gradient is needed (Sec. 3.2).
    """
    return distance.distance(distance.features(net(x_t, t)), target).mean()


def ect_step(t, q, k=8.0, b=1.0):
    """ECT's second noise level: r = t (1 - n(t) / q), at least 0; n(t) = 1 + k sigmoid(-b t). t, r: (B,)."""
    return t * (1 - (1 + k * torch.sigmoid(-b * t)) / q).clamp(min=0)


def loss_ect(net, x, x_t, x_r, t, r, mask_seed, huber=0.0, weight=None):
    """Eq. 3: w |f(x_t, t) - stop_gradient f(x_r, r)|, mean over images. weight (B,): None = ECT's 1 / (t - r).

    x clean; x_t, x_r the same image with the same noise at t > r (ECT), or joined by a teacher's step (ECD).
    huber: c of sqrt(d^2 + c^2) - c, 0 for the norm itself. mask_seed: of dropout, the same at t and r.
    """
    torch.manual_seed(mask_seed)
    with torch.no_grad():
        D_r = torch.where(r.view(-1, 1, 1, 1) > 0, net(x_r, r), x)    # trap: at r = 0 the net sees ln 0
    torch.manual_seed(mask_seed)                  # trap: else the loss is the difference of two dropout masks
    D_t = net(x_t, t)
    d = torch.linalg.vector_norm((D_t - D_r).flatten(1), dim=1)   # trap: sqrt has slope 0 * inf at D_t = D_r
    if huber:
        d = (d.square() + huber**2).sqrt() - huber
    return (d / (t - r) if weight is None else d * weight).mean()


def gradient_bias(net, x_t, x_r, t, r, end):
    """Theorem 5.1 measured at one start: |grad L_oracle - grad L_CM|^2, L_oracle, the relative bias, the cosine.

    d = squared L2, w = 1, means over images (Eq. 12, 13, App. F.4). end (B, C, H, W): where the teacher's ODE
    takes x_t; x_r the same image and noise at r < t. Relative: |difference| / |grad L_oracle|. Floats.
    """
    params = [p.requires_grad_() for p in net.parameters()]
    oracle, cm, loss = 0.0, 0.0, 0.0
    for a, b, t, r, e in zip(*(v.split(250) for v in (x_t, x_r, t, r, end))):
        with torch.no_grad():
            f_r = net(b, r)
        f_t = net(a, t)
        grads = []
        for target in (e, f_r):
            d = (f_t - target).square().sum() / len(x_t)
            loss += d.item() * (target is e)
            slopes = torch.autograd.grad(d, params, retain_graph=True)
            grads.append(torch.cat([v.flatten() for v in slopes]).double())
        oracle, cm = oracle + grads[0], cm + grads[1]
    norm, gap = oracle.norm().item(), (oracle - cm).norm().item()
    return gap**2, loss, gap / norm, (oracle @ cm).item() / (norm * cm.norm().item())


def make_distance(cfg, channels, device):
    """d of Eq. 7: LPIPS on the images as they are (B.2), on digits a small VGG of their labels, or pixels."""
    if cfg.loss != "lpips":
        return nets.PixelDistance(0.06 if cfg.loss == "huber" else 0.0)
    if cfg.data == "digits":
        distance, path = nets.VGG(), f"{cfg.out}/vgg.pt"
        if not (state := load(path)):
            fail(3, f"{path} is not there; run --stage vgg first, or pass --loss l2")
        nets.load_weights(distance, state["ema"], path)
    else:
        if channels != 3:
            fail(2, f"--loss lpips needs 3 channels, {cfg.data} has {channels}; pass --loss huber")
        path = cfg.vgg or nets.fetch("https://download.pytorch.org/models/vgg16-397923af.pth")
        distance = nets.LPIPS(nets.load_pretrained(path)[0])
    return distance.to(device).requires_grad_(False).eval()


def train_vgg(cfg, device):
    """The small VGG of --data digits, trained on their labels (the idea of App. B.5): <out>/vgg.pt."""
    images, labels = fid.digits()
    torch.manual_seed(fold(cfg.seed, "vgg"))
    vgg = nets.VGG()
    opt = torch.optim.Adam(vgg.parameters(), lr=cfg.lr)
    for step in range(cfg.steps):
        opt.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)
        i = torch.randint(len(images), (cfg.batch,))
        dx, dy = torch.randint(-1, 2, (2,)).tolist()                                 # shifts by one pixel
        x = to_float(images[i].roll((dx, dy), (2, 3)), "cpu")
        loss = F.cross_entropy(vgg.logits(x + 0.2 * torch.rand(()) * torch.randn(x.shape)), labels[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
    right = (vgg.logits(to_float(images, "cpu")).argmax(1) == labels).float().mean().item()
    save(f"{cfg.out}/vgg.pt", step=cfg.steps, ema=vgg.state_dict(), model={}, cfg=asdict(cfg))
    log(cfg, f"vgg: {cfg.steps} steps, cross-entropy {loss.item():.4f}, {right:.1%} of the digits right")


# ---- sample -----------------------------------------------------------------------------------
def prior(net, seeds, device):
    """x_T (B, C, H, W) and a generator per seed: image i depends on seed i alone, not on batch or rank."""
    generators = [torch.Generator().manual_seed(fold("sample", s)) for s in seeds]
    shape = net.img_channels, net.img_resolution, net.img_resolution
    return 80.0 * solvers.noise(shape, generators).to(device), generators


def make_sampler(cfg, net, kind, device):
    """kind: "teacher" = its solver with nfe steps, "1", "2" = few-step. Returns f(seeds) -> (B, C, H, W)."""
    @torch.no_grad()
    def sample(seeds):
        x_T, generators = prior(net, seeds, device)
        if kind == "teacher":
            return solvers.dpmpp(net, x_T, solvers.logsnr_sigmas(cfg.nfe))[-1]
        return solvers.few_step(net, x_T, [80.0, cfg.mid_sigma][:int(kind)], generators)
    return sample


def save_grid(images, path, columns=8):
    """(N, C, H, W) in [-1, 1] -> one PNG, rows of `columns`, small images enlarged by whole pixels."""
    images = fid.to_uint8(images.cpu()).numpy()
    n, c, h, w = images.shape
    sheet = np.zeros((-(-n // columns) * columns, h + 1, w + 1, c), np.uint8)
    sheet[:n, :h, :w] = images.transpose(0, 2, 3, 1)
    sheet = sheet.reshape(-1, columns, h + 1, w + 1, c).swapaxes(1, 2).reshape(-1, columns * (w + 1), c)
    zoom = max(1, 32 // h)
    sheet = sheet.repeat(zoom, 0).repeat(zoom, 1)
    Image.fromarray(sheet.squeeze()).save(path + ".tmp", format="PNG")
    os.replace(path + ".tmp", path)


# ---- plumbing ---------------------------------------------------------------------------------
def fail(code, message, every=False):
    """One line, then exit: 1 crash, 2 usage or config, 3 data or weights, 4 diverged, 75 stopped and saved.

    every: from each process that comes here, not only the first: another one may not meet this fault.
    """
    if every or code == 1 or os.environ.get("RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def ddp_init(cfg):
    """(rank, world, device). Without torchrun one process and no group; gloo on CPUs, NCCL on GPUs."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(seconds=cfg.timeout))
    return rank, world, device


def fold(*key):
    """A 63-bit seed from anything: randomness is a function of (seed, stage, step), so none is ever saved."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def one_line(cfg, world):
    """What a user can mend ends as one line with its exit code; anything else stays a crash with its trace."""
    try:
        yield
    except (fid.DataError, nets.WeightsError, OSError) as e:
        full = getattr(e, "errno", 0) in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)
        fail(3, str(e).splitlines()[0] + f"; free some space for {cfg.out} and run again" * full, every=True)
    except torch.OutOfMemoryError:
        now = cfg.batch_gpu or cfg.batch // world
        fail(1, f"out of memory with {now} images at once; run again with --batch_gpu {max(1, now // 2)}")
    except RuntimeError as e:
        calls = [f.line for f in traceback.extract_tb(e.__traceback__) if "dist." in f.line]
        if not calls:
            raise
        fail(1, f"{calls[0]}: another process died, or did not answer for --timeout {cfg.timeout} s; run again")


def randn(shape, g):
    """Unit Gaussian noise on the generator's device. Every process draws the whole batch, keeps its share."""
    return torch.randn(shape, generator=g, device=g.device)


def draw(images, n, g):
    """n of the images in [-1, 1] on the generator's device."""
    # choice: drawn with replacement, no augmentation: a batch is then a function of its step alone
    return to_float(images[torch.randint(len(images), (n,), generator=g, device=g.device)], g.device)


def gather(x, world):
    """(A, n/world, ...) of each process -> (A, n, ...) on all of them."""
    if world == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)


def flatten(net):
    """Make net's weights views of one vector and its gradients of another; returns both (frozen: None).

    Optimiser, EMA, norm and all-reduce are then one operation each. The gradient's last element is the loss.
    """
    params, offset = list(net.parameters()), 0
    flat = torch.empty(sum(p.numel() for p in params), device=params[0].device)
    frozen = not any(p.requires_grad for p in params)
    grad = None if frozen else torch.zeros(len(flat) + 1, device=flat.device)
    for p in params:
        p.data = flat.as_strided(p.shape, p.stride(), offset).copy_(p.detach())
        if not frozen:
            p.grad = grad.as_strided(p.shape, p.stride(), offset)
        offset += p.numel()
    return flat, grad


def log(cfg, text, **numbers):
    """A line on the screen and in log.txt; numbers, if any, go to metrics.jsonl. First process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
        with open(f"{cfg.out}/log.txt", "a") as f:
            f.write(text + "\n")
        if numbers:
            with open(f"{cfg.out}/metrics.jsonl", "a") as f:
                f.write(json.dumps(numbers) + "\n")


def save(path, **state):
    """Write a checkpoint by temporary file, flush, rename: a kill at any moment leaves a whole one."""
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:              # trap: torch turns a full disk into a RuntimeError
        with suppress(FileNotFoundError):
            os.remove(path + ".tmp")
        def size(x):
            return sum(map(size, x.values())) if isinstance(x, dict) else x.nbytes if torch.is_tensor(x) else 0
        fail(3, f"{path}: cannot write {size(state):,} bytes ({type(e).__name__}); free some space, run again")
    if os.path.exists(path):
        os.replace(path, path + ".prev")
    os.replace(path + ".tmp", path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def load(path):
    """The checkpoint at path, or the one before (with a warning) if that is damaged; None if there is none.

    The file is a zip with a CRC per tensor, which torch does not check: 9 in 10 flipped bits would load in
    silence. Exit code 3 if there are checkpoints and none is whole: never a fresh start.
    """
    found = [p for p in (path, path + ".prev") if os.path.exists(p)]
    for p in found:
        try:
            with zipfile.ZipFile(p) as z:
                if z.testzip() is not None:
                    raise ValueError("wrong CRC")
            state = torch.load(p, map_location="cpu", weights_only=True)
            if p != path:
                print(f"warning: {path} is missing or damaged; going on from {p}", file=sys.stderr)
            return state
        except Exception as e:                        # damage can surface as any error
            print(f"warning: {p} is damaged ({type(e).__name__}: {str(e)[:80]!r})", file=sys.stderr)
    if found:
        fail(3, f"{path}: damaged, and so is the one before it; move both away to start this stage again")
    return None


def resume(cfg, path):
    """load(path), if it was made by this configuration; else exit code 2 names the field that differs."""
    state = load(path)
    free = f"{FREE['*']} {FREE.get(cfg.stage, '')}".split()
    for name, value in state["cfg"].items() if state else ():
        now = getattr(cfg, name, value)
        if name not in free and now != value:
            fail(2, f"{path} was made with --{name} {value}, now it is {now}; use another --out")
    return state


def restore(cfg, ckpt, path, net, ema, opt, device):
    """Put back what the checkpoint at path holds, if there is one.

    Returns the first step to do, what `report` counts from, the loss scale (fp16) and the health of `update`.
    """
    start, seconds, skipped, scale = 0, 0.0, 0, 2.0**15 if cfg.precision == "fp16" else 1.0
    if ckpt:
        nets.load_weights(net, ckpt["net"], path)
        nets.load_weights(ema, ckpt["ema"], path)
        opt.load_state_dict(ckpt["opt"])
        start, seconds, skipped, scale = (ckpt[k] for k in ("step", "seconds", "skipped", "scale"))
    since = dict(step=start, clock=time.time(), seconds=seconds, skipped=skipped)
    health = [0.0, 0, skipped, 0, 0]
    return start, since, torch.tensor(scale, device=device), torch.tensor(health, device=device)


MAX_BAD = 10                                          # steps in a row without a finite gradient: give up


def update(opt, flat, grad, health, scale, cfg):
    """One optimiser step, or none if loss or gradient is not finite; decided on the device, without waiting.

    health (5,): steps skipped in a row, the most so far, in all; sums of loss and norm since the last log.
    A skipped step leaves the weights as they are, bit for bit; the optimiser's moments see a zero gradient.
    """
    grad.div_(scale)
    norm, loss = torch.linalg.vector_norm(grad[:-1]), grad[-1].clone()
    ok = (norm + loss).isfinite()
    if cfg.clip:
        grad.mul_((cfg.clip / (norm + 1e-12)).clamp(max=1))
    torch.where(ok, grad, torch.zeros_like(norm), out=grad)
    before = flat.clone()
    opt.step()
    torch.where(ok, flat, before, out=flat)           # trap: the moments alone would still move the weights
    grad.zero_()
    row, finite = (health[0] + 1) * ~ok, torch.where(ok, torch.stack([loss, norm]), 0.0)
    health.copy_(torch.stack([row, torch.maximum(row, health[1]), health[2] + ~ok, *(health[3:] + finite)]))
    if cfg.precision == "fp16":                       # loss scale: halved at overflow, doubled by 2,000 steps
        scale.mul_(torch.where(ok, 2 ** (1 / 2000), 0.5))


def report(cfg, step, lr, health, since, text="", **numbers):
    """The line of a step: means of loss and norm since the last one, speed, time left.

    health: of update; since: {step, clock, seconds, skipped}, moved on; text, numbers: what a script adds to the line.
    Exit code 4 after MAX_BAD steps in a row without a finite gradient.
    """
    (_, worst, skipped, loss, norm), n = health.tolist(), step - since["step"]
    took, good = time.time() - since["clock"], max(1, n - skipped + since["skipped"])
    health[3:] = 0
    since.update(step=step, clock=time.time(), seconds=since["seconds"] + took, skipped=skipped)
    images, rate, loss, norm = step * cfg.batch, n * cfg.batch / took, loss / good, norm / good
    memory = torch.cuda.max_memory_allocated() / 2**20               # MiB, the most so far
    unit = 2**20 if sys.platform == "darwin" else 2**10              # macOS counts bytes, Linux KiB
    memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    log(cfg, f"{cfg.stage} {step:6d}/{cfg.steps} {step / cfg.steps:4.0%} | loss {loss:.5f} | {text}"
             f"grad {norm:.3g} | skipped {skipped:.0f} | lr {lr:.2e} | {images / 1e6:.3f} Mimg | "
             f"{memory:.0f} MiB | {rate:.0f} img/s | {(cfg.steps - step) * cfg.batch / rate / 60:.1f} min left",
        stage=cfg.stage, step=step, images=images, loss=loss, grad=norm, skipped=int(skipped),
        lr=lr, images_per_second=rate, seconds=since["seconds"], memory=memory, **numbers)
    if worst >= MAX_BAD:
        fail(4, f"{cfg.stage}: loss or gradient not finite in {worst:.0f} steps in a row before step "
                f"{step}; {cfg.out} keeps the last good one; try a smaller --lr with another --out")


TRAINED = "pretrain", "mid", "post"                   # stages with a loop that saves when it is asked to stop
STOP = []                                             # signals received: SIGTERM, or Ctrl-C once


def on_signal(number, frame):
    """Ask the loop to save and leave (exit code 75); a second Ctrl-C leaves at once."""
    STOP.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def any_stop(world):
    """True on every process as soon as one got a signal. A CPU tensor (gloo): nobody waits for the GPU."""
    flag = torch.tensor([float(bool(STOP))])
    if world > 1:
        dist.all_reduce(flag)
    return flag.item() > 0


# ---- main -------------------------------------------------------------------------------------
def finished(path):
    """The checkpoint at path, or None if there is none or its stage has not come to its end."""
    state = load(path)
    return state if state and state["step"] >= state["cfg"]["steps"] else None


def teacher_state(cfg):
    """(weights, constructor arguments) of --teacher, else <out>/pretrain.pt, else the official teacher."""
    if cfg.teacher not in ("", "scratch"):
        return nets.load_pretrained(cfg.teacher)
    if state := finished(f"{cfg.out}/pretrain.pt"):
        return state["ema"], state["model"]
    if cfg.teacher or cfg.data not in nets.PRETRAINED:
        fail(3, f"no finished teacher in {cfg.out}; run --stage pretrain first, or pass --teacher FILE")
    return nets.load_pretrained(nets.PRETRAINED[cfg.data])


def build(cfg, model, device, state=None, what="", train=False):
    """A DDPM++ from constructor arguments (of an official file or SIZES), with weights by name if given."""
    torch.manual_seed(fold(cfg.seed, cfg.stage, "init"))    # choice: a random student has a start of its own
    net = nets.EDMPrecond(**{**model, "augment_dim": 0, "dropout": cfg.dropout if train else 0.0,
                             "sigma_shift": cfg.sigma_shift})
    if state is not None:
        nets.load_weights(net, state, what)
    net = net.to(device, memory_format=torch.channels_last)
    return net if train else net.requires_grad_(False).eval()


def student(cfg, model, device, teacher):
    """The net to train. First weights: mid.pt's in post (unless --mid none), else the teacher's or --init FILE's."""
    state, what = teacher, "the teacher"
    if cfg.stage == "post" and cfg.mid != "none":
        what = f"{cfg.out}/mid.pt"
        if not (ckpt := finished(what)):
            fail(3, f"{what} is not finished; run --stage mid first, or pass --mid none")
        state = ckpt["ema"]
    elif cfg.stage == "pretrain" or cfg.init == "random":
        state = None
    elif cfg.init != "teacher":
        state, what = nets.load_pretrained(cfg.init)[0], cfg.init
    return build(cfg, model, device, state, what, train=True)


def forward(cfg, net, device):
    """net as the losses call it: compiled by --compile, inside in --precision; the losses stay in fp32."""
    net = torch.compile(net) if cfg.compile else net
    cast = dict(bf16=torch.bfloat16, fp16=torch.float16).get(cfg.precision)

    def f(x, sigma):
        with torch.autocast(device.type, cast, enabled=cast is not None):
            return net(x, sigma)
    return f


def model_size(cfg, images):
    """Constructor arguments of the DDPM++ for images of this size; None: for the size that --data has."""
    if images is None:
        return nets.SIZES[f"ddpm++-{dict(digits=8, cifar10=32).get(cfg.data, cfg.res or 32)}"]
    _, channels, height, width = images.shape
    if height != width or f"ddpm++-{height}" not in nets.SIZES:
        fail(3, f"--data {cfg.data}: {width}x{height} fit no DDPM++ of nets.SIZES (8, 16, 32, 64); pass --res")
    return {**nets.SIZES[f"ddpm++-{height}"], "img_channels": channels}


def train(cfg, rank, world, device):
    """One stage (pretrain, mid, post) from its last checkpoint to its end. Method first, bookkeeping last."""
    path, B = f"{cfg.out}/{cfg.stage}.pt", cfg.batch
    ckpt = resume(cfg, path)
    if ckpt and ckpt["step"] >= cfg.steps:
        return log(cfg, f"{cfg.stage}: {path} is finished, nothing to do")
    images, data, weights, model = None, "none", None, None
    if cfg.stage != "mid" or cfg.mid == "slow":                                   # CMT needs no data
        images = load_data(cfg)
        data = f"{len(images)} images, crc32 {zlib.crc32(images.numpy()):08x}"
    if ckpt and ckpt["data"] != data:
        fail(2, f"--data {cfg.data} has changed: {path} saw {ckpt['data']}, now {data}; use another --out")
    if cfg.stage != "pretrain":
        weights, model = teacher_state(cfg)
    model = model or model_size(cfg, images)
    if cfg.stage == "mid" or cfg.stage == "post" and cfg.post == "ecd":
        # choice: the teacher too in --precision: bf16 moves its ends less than a finer solve would
        teacher = forward(cfg, build(cfg, model, device, weights, "the teacher"), device)
    net = student(cfg, model, device, weights).train()
    images = images.to(device) if images is not None else None
    ema = deepcopy(net).requires_grad_(False).eval()
    (flat, grad), flat_ema = flatten(net), flatten(ema)[0]
    flat.grad = grad[:-1]
    opt = torch.optim.Adam([flat], lr=cfg.lr, fused=True)
    if cfg.optimizer == "radam":
        opt = torch.optim.RAdam([flat], lr=cfg.lr, foreach=True)          # in a third of foreach=False's time
    f = forward(cfg, net, device)
    shape = net.img_channels, net.img_resolution, net.img_resolution
    sigmas, (_, pairs) = solvers.logsnr_sigmas(cfg.nfe), solves(cfg)
    if cfg.stage == "mid":
        distance = make_distance(cfg, shape[0], device)
    micro = torch.arange(B // world, device=device).add(rank * (B // world)).split(cfg.batch_gpu or B)
    start, since, scale, health = restore(cfg, ckpt, path, net, ema, opt, device)
    ckpt = weights = None                             # as large as the net, and needed no more
    log(cfg, f"{cfg.stage}: {len(flat):,} parameters, steps {start} to {cfg.steps}, {world} process(es) on "
             f"{device}, {torch.get_num_threads()} CPU thread(s) each")

    for step in range(start, cfg.steps):
        decay = 1 - step / cfg.steps if cfg.decay == "linear" else 1.0            # linear to zero (B.2)
        opt.param_groups[0]["lr"] = lr = cfg.lr * decay * min(1.0, (step + 1) / (cfg.warmup + 1))
        g = torch.Generator(device).manual_seed(fold(cfg.seed, cfg.stage, step))
        if cfg.stage == "mid":
            solve, at = divmod(step * B, pairs)
            if at == 0 or step == start:                                         # a solve feeds several steps
                g.manual_seed(fold(cfg.seed, "solve", solve))
                x_t, t, x_0, owner = teacher_pairs(cfg, teacher, images, sigmas, shape, g, rank, world)
                target = distance.features(x_0)                                   # once per trajectory
        else:
            x, eps = draw(images, B, g), randn((B, *shape), g)
            sigma = (cfg.P_mean + cfg.P_std * randn(B, g)).exp()
            q = cfg.q ** (1 + step // cfg.double) if cfg.double else cfg.q

        for k, i in enumerate(micro):                                             # this process's share
            mask_seed = fold(cfg.seed, cfg.stage, step, "dropout", rank * len(micro) + k)
            torch.manual_seed(mask_seed)              # trap: else every process has the same dropout mask
            if cfg.stage == "pretrain":
                loss = loss_dm(f, x[i], sigma[i], eps[i], net.sigma_data)
            elif cfg.stage == "mid":
                p = at + i
                loss = loss_cmt(f, x_t[p], t[p], [m[owner[p]] for m in target], distance)     # Eq. 7
            else:
                r = ect_step(sigma[i], q)
                x_t, x_r = (x[i] + s.view(-1, 1, 1, 1) * eps[i] for s in (sigma[i], r))       # same noise
                if cfg.post == "ecd":
                    with torch.no_grad():
                        x_r = solvers.ode_step(teacher, x_t, sigma[i], r, 2 if cfg.ecd == "heun" else 1)
                loss = loss_ect(f, x[i], x_t, x_r, sigma[i], r, mask_seed, cfg.huber)         # Eq. 3
            (loss * (len(i) / B) * scale).backward()
            grad[-1] += loss.detach() * (len(i) / B) * scale
        if world > 1:
            # choice: one all-reduce of one vector, no DDP wrapper: any number of processes, one result
            dist.all_reduce(grad)                 # trap: process 0's own loss is not the loss: it rides along
        update(opt, flat, grad, health, scale, cfg)
        flat_ema.lerp_(flat, 1 - cfg.ema_beta)

        # bookkeeping from here on
        done, stop = step + 1, any_stop(world)
        to_save = stop or done % cfg.save_every == 0 or done == cfg.steps
        if to_save or done % cfg.log_every == 0:
            report(cfg, done, lr, health, since)
        if to_save and rank == 0:
            save(path, step=done, net=net.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(),
                 model=model, cfg=asdict(cfg), data=data,
                 seconds=since["seconds"], skipped=int(health[2]), scale=scale.item())
            grid = make_sampler(cfg, ema, "teacher" if cfg.stage == "pretrain" else "1", device)(range(64))
            save_grid(grid, f"{cfg.out}/samples_{cfg.stage}_{done:07d}.png")
            since["clock"] = time.time()
        if stop:
            fail(75, f"stopped by a signal; step {done} is saved, run the same command again to go on")
    if world > 1:
        dist.barrier()


def solves(cfg):
    """Trajectories that a call of teacher_pairs solves (slow: per level), and the pairs they give."""
    if cfg.mid == "kd":
        return cfg.batch, cfg.batch
    n = cfg.trajectories or cfg.batch // cfg.nfe
    return n, n * cfg.nfe


def check_batch(cfg, world):
    """Everything that must divide, before anything is trained; exit code 2."""
    share = cfg.batch // world
    if cfg.batch % world:
        fail(2, f"--batch {cfg.batch} must be a multiple of the {world} processes")
    if cfg.batch_gpu and share % cfg.batch_gpu:
        fail(2, f"--batch_gpu {cfg.batch_gpu} must divide the {share} images of --batch in a process")
    n, pairs = solves(cfg)
    if cfg.stage != "mid" or cfg.mid == "none":
        return
    if pairs < 1 or pairs % cfg.batch:
        fail(2, f"--nfe {cfg.nfe} and --trajectories {cfg.trajectories} must fill whole batches of "
                f"--batch {cfg.batch}")
    if n % world:
        fail(2, f"the {n} --trajectories of a solve must be a multiple of the {world} processes")


def candidates(cfg, device):
    """What to sample from: (name, net, {kind of sampler: steps}, checkpoint); --init FILE: it alone."""
    few = {"1": 1, "2": 2}
    if cfg.init not in ("teacher", "random"):
        state, model = nets.load_pretrained(cfg.init)
        model = model or model_size(cfg, None)
        return [("init", build(cfg, model, device, state, cfg.init), few, {})]
    state, model = teacher_state(cfg)
    net = build(cfg, model, device, state, "the teacher")
    own = cfg.teacher in ("", "scratch") and load(f"{cfg.out}/pretrain.pt")           # else trained elsewhere
    found = [("teacher", net, {"teacher": cfg.nfe}, own or {})]
    for stage in ("mid", "post"):
        if ckpt := finished(f"{cfg.out}/{stage}.pt"):
            found.append((stage, build(cfg, ckpt["model"], device, ckpt["ema"], stage), few, ckpt))
    return found


def sample(cfg, rank, world, device):
    """One PNG per seed in <out>/samples/<net>_<steps>, and a sheet of them all: samples_<net>_<steps>.png."""
    seeds = seed_range(cfg.seeds)
    for name, net, kinds, _ in candidates(cfg, device):
        for kind, n in kinds.items():
            folder = f"{cfg.out}/samples/{name}_{n}"
            os.makedirs(folder, exist_ok=True)
            sampler, images = make_sampler(cfg, net, kind, device), []
            for i in range(0, len(seeds), 64):
                images.append(sampler(seeds[i:i + 64]).cpu())
                for seed, image in zip(seeds[i:i + 64], fid.to_uint8(images[-1]).permute(0, 2, 3, 1).numpy()):
                    if seed % world == rank:
                        Image.fromarray(image.squeeze()).save(f"{folder}/{seed:06d}.png")
            if rank == 0:
                save_grid(torch.cat(images)[:1024], f"{cfg.out}/samples_{name}_{n}.png")
            log(cfg, f"sample: {len(seeds)} images in {folder}")


def evaluate(cfg, rank, world, device):
    """Score every net there is: the teacher with its solver, the students in 1 and 2 steps."""
    metric = "FD-digits" if cfg.data == "digits" else "FID"
    images = None
    features = (fid.DigitsNet() if cfg.data == "digits" else fid.load_inception(cfg.inception)).to(device)
    if cfg.data in FILES:
        reference = fid.load_reference(cfg.data)
    else:
        images = load_data(cfg)
        reference = fid.measure(features, images[rank::world].split(250), device, file=f"of --data {cfg.data}")
    found, table = candidates(cfg, device), []
    for name, net, kinds, ckpt in found:
        row = dict.fromkeys(("1", "2", "teacher"), "-")
        for kind, n in kinds.items():
            sampler = make_sampler(cfg, net, kind, device)
            scores, ours = score(cfg, sampler, features, reference, rank, world, device)
            row[kind] = f"{scores.mean():.2f}"
            if cfg.repeat > 1:
                row[kind] += f" +- {scores.std():.2f}, min {scores.min():.2f}"
            log(cfg, f"eval: {name} {n}-step {metric} {row[kind]}",
                stage="eval", net=name, metric=f"{n}-step {metric}", values=scores.tolist())
        seen = ckpt["step"] * ckpt["cfg"]["batch"] if ckpt else 0
        seconds = f"{ckpt.get('seconds', 0):.0f}"
        table.append([name, ckpt.get("step", "-"), f"{seen:,}", seconds, *row.values()])
    if rank == 0:
        note = f"second noise level {cfg.mid_sigma}, sigma_shift {cfg.sigma_shift}"
        results(cfg, metric, table, fid.protocol(ours, reference), note, cfg.nfe)
        sheets(cfg, images, found, device)


def bias(cfg, device):
    """Gradient bias of Eq. 3 (Theorem 5.1) at every start there is and at a random one: <out>/bias.md.

    The oracle end of (x_t, t) is the teacher's own ODE in 48 Heun steps on EDM's grid, scaled to end at 0.
    """
    images, g = load_data(cfg).to(device), torch.Generator(device).manual_seed(fold(cfg.seed, "bias"))
    found, names = candidates(cfg, device), dict(teacher="diffusion", mid="CMT", post="CMT + ECT")
    starts = {names.get(name, name): net for name, net, *_ in found}
    starts["random"] = build(cfg, model_size(cfg, images), device)
    x, t = draw(images, cfg.samples, g), (cfg.P_mean + cfg.P_std * randn(cfg.samples, g)).exp()
    eps, end, ratios = randn(x.shape, g), [], solvers.edm_sigmas(48, 1.0, 0.002 / 80).tolist()
    x_t = x + t.view(-1, 1, 1, 1) * eps
    with torch.no_grad():
        for state, level in zip(x_t.split(250), t.split(250)):
            for high, low in zip(ratios, ratios[1:]):
                state = solvers.ode_step(found[0][1], state, high * level, low * level, 2)
            end.append(state)
    lines = ["| start | step | squared bias | oracle loss | relative bias | cosine |", "|---|---|---|---|---|---|"]
    for q in (4096, 64, 10):
        r = ect_step(t, q)
        x_r = x + r.view(-1, 1, 1, 1) * eps
        for name, net in starts.items():
            row = gradient_bias(net, x_t, x_r, t, r, torch.cat(end))
            lines.append(f"| {name} | 1/{q} | {row[0]:.4g} | {row[1]:.3f} | {row[2]:.3f} | {row[3]:.3f} |")
            log(cfg, lines[-1], stage="bias", start=name, q=q, values=row)
    with open(f"{cfg.out}/bias.md", "w") as f:
        f.write("\n".join([*lines, "", f"{cfg.samples} images, ln t ~ N({cfg.P_mean}, {cfg.P_std}^2)"]) + "\n")


def score(cfg, sampler, features, reference, rank, world, device):
    """Frechet distances of --repeat sets of --samples images (float64), and the last set's fid.Reference."""
    distances = []
    for j in range(cfg.repeat):
        seeds = range(j * cfg.samples + rank, (j + 1) * cfg.samples, world)
        batches = (fid.to_uint8(sampler(seeds[i:i + 250])) for i in range(0, len(seeds), 250))
        ours = fid.measure(features, batches, device)
        distances.append(fid.frechet_distance(ours.mu, ours.cov, reference.mu, reference.cov))
    return torch.tensor(distances, dtype=torch.float64), ours


def results(cfg, metric, table, protocol, note, steps):
    """The table of scores and how they were measured: on the screen, in log.txt and in <out>/results.md."""
    head = ["stage", "steps", "images", "seconds", *(f"{k}-step {metric}" for k in ("1", "2", steps))]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *table]]
    lines += ["", protocol, f"{cfg.samples} samples a score, seeds from 0, EMA weights, {note}."]
    log(cfg, "\n".join(lines))
    with open(f"{cfg.out}/results.md", "w") as f:
        f.write("\n".join(lines) + "\n")


@torch.no_grad()
def sheets(cfg, images, found, device):
    """Pictures: data, a sheet per net, one noise through the stages, trajectories with students' answers."""
    if images is not None:
        save_grid(to_float(images[::max(1, len(images) // 64)][:64], "cpu"), f"{cfg.out}/samples_data.png")
    rows = []
    for name, net, kinds, _ in found:
        for kind, n in kinds.items():
            x = make_sampler(cfg, net, kind, device)(range(64)).cpu()
            save_grid(x, f"{cfg.out}/samples_{name}_{n}step.png")
            rows.append(x[:16])
    save_grid(torch.cat(rows), f"{cfg.out}/samples_stages.png", columns=16)
    (_, teacher, *_), *students = found
    sigmas, rows = solvers.logsnr_sigmas(cfg.nfe), []
    xs = solvers.dpmpp(teacher, prior(teacher, range(3), device)[0], sigmas)         # (nfe+1, 3, C, H, W)
    shown = xs / sigmas.clamp(min=1).to(xs).view(-1, 1, 1, 1, 1)                     # states at unit scale
    for j in range(3):
        rows.append(shown[:, j])
        rows += [net(xs[:, j], sigmas.to(xs)) for _, net, *_ in students]            # D_x of each state
    save_grid(torch.cat(rows), f"{cfg.out}/samples_trajectory.png", columns=cfg.nfe + 1)


def open_out(cfg, argv):
    """Make <out>, lock it (two runs in it would mix), say in log.txt what runs. First process only."""
    os.makedirs(cfg.out, exist_ok=True)
    lock = open(f"{cfg.out}/.lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)    # released by the system, however the process ends
    except OSError:
        lock.seek(0)
        fail(2, f"another run ({lock.read()}) is at work in {cfg.out}; use another --out")
    lock.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=lock, flush=True)
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD"]
    commit = ""
    with suppress(OSError):                           # no git on this machine
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    log(cfg, f"{' '.join([os.path.basename(__file__), *argv])} | commit {commit or 'none'} | "
             f"torch {torch.__version__} | {device}")
    return lock


def run_stage(cfg, rank, world, device):
    """The stage that cfg names; nothing, if it is finished or not wanted."""
    if cfg.stage == "vgg":
        wanted = cfg.data == "digits" and cfg.loss == "lpips" and cfg.mid != "none"
        if wanted and rank == 0 and not resume(cfg, f"{cfg.out}/vgg.pt"):
            train_vgg(cfg, device)
        if world > 1:
            dist.barrier()
    elif cfg.stage == "sample":
        sample(cfg, rank, world, device)
    elif cfg.stage == "eval":
        evaluate(cfg, rank, world, device)
    elif cfg.stage == "bias":
        if rank == 0:
            bias(cfg, device)
    elif cfg.stage == "pretrain" and cfg.teacher != "scratch" and (
            cfg.teacher or cfg.data in nets.PRETRAINED):
        teacher_state(cfg)                            # fetched and checked, not trained
    elif cfg.stage != "mid" or cfg.mid != "none":
        log(cfg, f"{cfg.stage}: {json.dumps(asdict(cfg))}")
        train(cfg, rank, world, device)


def main(argv=None):
    """Run one stage, or with --stage all every stage that is not finished, in order, then the score."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = parse(argv)
    rank, world, device = ddp_init(cfg)
    stages = ["pretrain", "vgg", "mid", "post", "eval"] if cfg.stage == "all" else [cfg.stage]
    configs = [parse([*argv, "--stage", stage]) for stage in stages]
    if cfg.stage == "all":                            # --init FILE: what started from it is scored, not the file
        configs[-1] = parse([*argv, "--stage", "eval", "--init", Config.init])
    for c in configs:
        check_batch(c, world)
        own = c.stage == "post" or c.stage == "mid" and c.mid == "slow"
        if own and not os.path.exists(f"{c.out}/{c.stage}.pt"):
            data_file(c)                              # not after days of mid-training, which needs no data
    with one_line(cfg, world), open_out(cfg, argv) if rank == 0 else nullcontext():      # holds the lock of <out>
        for c in configs:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = c.precision != "fp32"
            for number in (signal.SIGTERM, signal.SIGINT):          # training saves first, the rest just ends
                signal.signal(number, on_signal if c.stage in TRAINED else signal.SIG_DFL)
            run_stage(c, rank, world, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
