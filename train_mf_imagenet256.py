"""CMT for Mean Flow on ImageNet 256x256: a weak net of size B/4 teaches one of size XL/2 (Eq. 8, App. B.4).

  python train_mf_imagenet256.py --data digits              # laptop: the whole road in minutes, no download
  python train_mf_imagenet256.py --stage encode --source ILSVRC2012_img_train    # SD-VAE latents
  torchrun --nproc_per_node=8 train_mf_imagenet256.py               # the paper: MF-B/4, CMT, MF-XL/2
  torchrun --nproc_per_node=8 train_mf_imagenet256.py --mid none --post vanilla --out out/scratch
  torchrun --nproc_per_node=8 train_mf_imagenet256.py --mid none --init sit --teacher SiT-XL-2-256.pt
  python train_mf_imagenet256.py --data digits --stage sample --seeds 0-63

pretrain: Mean Flow from scratch, small: the teacher. mid: regress the student onto the mean velocities between
all states of the teacher's roll-outs (Eq. 8). post: Mean Flow again. Paper: 1-step FID 3.34 in half the time.
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
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
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
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import fid
import nets
import solvers


# ---- knobs ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:                   # field default < matching rows of PRESETS < command line; --flag is the field
    data: str = "imagenet"      # imagenet | digits | folder of latents: shards of --stage encode, .npy, .pt
    stage: Literal["all", "encode", "pretrain", "mid", "post", "sample", "eval"] = "all"   # all: each not finished
    out: str = ""               # folder of the run; "" = out/<data>, out/digits-mf
    source: str = ""            # encode: folder of ImageNet's class folders
    teacher: str = ""           # FILE, URL of a Mean Flow net or a SiT; "" = <out>/pretrain.pt
    pretrain: Literal["mf", "fm"] = "mf"                 # the teacher: Mean Flow (B.4), or flow matching (SiT)
    mid: Literal["cmt", "none"] = "cmt"                  # Eq. 8
    post: Literal["mf", "vanilla"] = "mf"                # batch 64 after mid-training (B.4), or MF's own recipe
    init: str = "random"        # student's first weights: random | sit: the teacher's | FILE; sample, eval: show FILE
    weak: str = "dit-b/4"       # size of the teacher: row of nets.SIZES, or PATCHxWIDTHxDEPTH
    size: str = "dit-xl/2"      # size of the student

    steps: int = 400_320        # optimiser steps; 80 epochs of batch 256 (MF, B/4)
    batch: int = 256            # images or pairs per step, over all processes (MF)
    batch_gpu: int = 0          # per process and forward pass, the rest by accumulation; 0 = all at once
    lr: float = 1e-4            # MF; B.4
    decay: Literal["linear", "constant"] = "constant"    # of lr, to zero (B.4: constant)
    beta2: float = 0.95         # of Adam (MF)
    warmup: int = 0             # steps of linear warm-up; MF: none
    clip: float = 0.0           # largest gradient norm; 0 = off, as MF
    ema_beta: float = 0.9999    # MF
    dropout: float = 0.1        # of the class: share of samples (mid: trajectories) with the null class (MF)

    omega: float = 0.2          # guided velocity: omega v + kappa u(y) + (1 - omega - kappa) u(null), u at r = t;
    kappa: float = 0.92         # scale omega / (1 - kappa), one for all stages (B.4; MF-XL/2: 0.2, 0.92) ...
    guide_from: float = 0.0     # ... and only at times t from here ...
    guide_to: float = 0.75      # ... to here
    unguided: int = 100_080     # --mid none --init sit: first steps without guidance (B.4, Zhu: 20 epochs)

    ratio: float = 0.25         # share of samples with r < t (MF)
    P_mean: float = -0.4        # logit t, logit r ~ N(P_mean, P_std^2), the larger is t (MF)
    P_std: float = 1.0
    power: float = 1.0          # p of the adaptive weight 1 / (|error|^2 + c)^p (MF)
    weight_c: float = 1e-3      # c (MF's text; its released code 1e-2)

    nodes: int = 8              # mid: states of a trajectory, noise and end included: 28 pairs (B.4); 9: 36
    trajectories: int = 32      # choice: per solve, for eight steps of 4 x 28 pairs (B.4), shuffled
    diagonal: int = 0           # mid: times each state is paired with itself, r = t; 0 = Eq. 8 alone
    solver: Literal["heun", "euler"] = "heun"            # of a flow-matching teacher

    nfe: int = 8                # steps of the third score; 1 and 2 are the others
    labels: Literal["both", "random", "balanced"] = "both"    # of samples: drawn by seed, or seed % classes
    seeds: str = "0-63"         # sample: one image per seed, FIRST-LAST
    samples: int = 50_000       # eval: images per score
    repeat: int = 1             # eval: scores with fresh seeds, reported as mean, deviation and minimum
    inception: str = ""         # eval: Inception weights; "" = fetched
    reference: str = ""         # eval: statistics; "" = ADM's for imagenet, else of the data itself, decoded
    vae: str = "stabilityai/sd-vae-ft-mse"               # encode and decode (MF), by diffusers

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "tf32"    # of the network; clocks never in 16 bits; mid: bf16
    product: Literal["fp32", "same"] = "fp32"            # precision of du/dt; same = that of --precision
    compile: bool = False       # the network, and the function that holds the Jacobian product
    threads: int = 0            # CPU threads; 0 = torch's default. choice: not measured, bits depend on it
    timeout: int = 600          # seconds after which a process that does not answer ends the run
    seed: int = 0
    log_every: int = 100
    save_every: int = 5_000


PRESETS = {  # (data, stage, method): matching rows are laid over each other, top to bottom; "own" = a path
    ("*", "pretrain", "fm"): dict(power=0.0),                                              # SiT: squared error
    # choice: a fixed target is drawn and learned in bf16 no worse than in fp32: measured on digits
    ("*", "mid", "*"): dict(steps=200_000, batch=112, precision="bf16",
                            ema_beta=0.999),                             # choice: EMA of mid-training
    # choice: iterations of post-training, 587 h at the speed of Table 4's other rows
    ("*", "post", "*"): dict(steps=1_860_000, batch=64),                                   # B.4: 64
    ("*", "post", "vanilla"): dict(steps=1_200_960, batch=256),                            # MF: 240 epochs
    ("digits", "*", "*"): dict(out="out/digits-mf", precision="fp32", weak="4x64x2", size="4x128x4", threads=1,
                               log_every=100, save_every=500, samples=2_000, labels="balanced",
                               omega=1.0, kappa=0.0, decay="linear", warmup=20),
    ("digits", "pretrain", "*"): dict(steps=1_500, batch=64, lr=4e-3, ema_beta=0.99),
    ("digits", "mid", "*"): dict(steps=1_500, batch=32, lr=4e-3, ema_beta=0.99, trajectories=64),
    ("digits", "post", "*"): dict(steps=1_000, batch=64, lr=4e-3, ema_beta=0.99, unguided=250),
    ("digits", "post", "vanilla"): dict(steps=1_900),                        # the time of mid and post together
}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FILES = {"imagenet": "data/imagenet256-sd"}
FREE = {  # fields that may differ when a stage goes on, or is found finished; of --teacher only the path may
    "*": "stage out source vae inception reference seeds samples repeat nfe labels compile batch_gpu timeout "
         "log_every save_every",
    "pretrain": "teacher mid post init size nodes trajectories diagonal solver unguided",
    "mid": "teacher pretrain post weak ratio P_mean P_std power weight_c unguided",
    "post": "teacher pretrain weak nodes trajectories diagonal solver",
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
SCALE = 0.18215                                       # of latents of Stable Diffusion's first VAE: deviation 1
SHARD = 16_384                                        # images in a file of --stage encode: 0.5 GB


class Latents:
    """Moments (mean, deviation) of SD-VAE latents, memory-mapped; labels (N,) int64; stamp: of the data.

    path: shards of --stage encode (index.json says what they are), or a cache that others made: a folder of
    .npy (REPA, EDM2: mean and deviation; U-ViT: mean and log variance) or .pt (Mean Flow's JAX code), one per
    image, (8, h, w), with a dataset.json or a folder per class.
    """

    def __init__(self, path):
        self.path, self.pool, self.maps, self.names = path, ThreadPoolExecutor(8), [], []
        with fid.blame(path):
            if os.path.exists(f"{path}/index.json"):
                self.open_shards()
            else:
                self.open_cache()
        self.shape = (4, *self.moments(0, False).shape[1:])
        self.classes = int(self.labels.max()) + 1

    def open_shards(self):
        with open(f"{self.path}/index.json") as f:
            index = json.load(f)
        if index["kind"] != "mean, deviation; plain, flipped" or index["scale"] != SCALE:
            raise fid.DataError(f"{self.path}: index.json says {index}; run --stage encode again")
        self.labels = torch.from_numpy(np.load(f"{self.path}/labels.npy"))
        self.maps = [np.load(f"{self.path}/{k:05d}.npy", mmap_mode="r") for k in range(index["shards"])]
        if sum(map(len, self.maps)) != len(self.labels):
            raise fid.DataError(f"{self.path}: its shards do not hold {len(self.labels)} latents, as labels.npy")
        self.stamp = f"{len(self.labels)} latents, crc32 {zlib.crc32(json.dumps(index).encode()):08x}"

    def open_cache(self):
        found = [os.path.join(d, f) for d, _, fs in os.walk(self.path) for f in fs]
        found = sorted(os.path.relpath(f, self.path) for f in found)
        self.names = [f for f in found if f.endswith((".npy", ".pt"))]
        if "data.mdb" in found or not self.names:
            raise fid.DataError(f"{self.path}: no index.json, .npy or .pt in it (the pickles of an LMDB are not "
                                "read); make latents by --stage encode --source FOLDER")
        if "dataset.json" in found:
            with open(f"{self.path}/dataset.json") as f:
                given = dict(json.load(f)["labels"])
            self.labels = torch.tensor([given[n.replace(os.sep, "/")] for n in self.names])
        else:
            folders = sorted({os.path.dirname(n) for n in self.names})
            self.labels = torch.tensor([folders.index(os.path.dirname(n)) for n in self.names])
        key = repr((self.names, self.labels.tolist())).encode()
        self.stamp = f"{len(self.names)} latents, crc32 {zlib.crc32(key):08x}"

    def moments(self, k, flip):
        """(8, h, w) float32: mean and deviation of image k's latent, or of its mirror image's."""
        if self.maps:
            shard, k = divmod(k, len(self.maps[0]))
            return torch.from_numpy(self.maps[shard][k, int(flip)].astype(np.float32))
        name = f"{self.path}/{self.names[k]}"
        with fid.blame(name):
            x = np.load(name) if name.endswith(".npy") else torch.load(name, weights_only=True)
            x = torch.cat(list(x.values())) if isinstance(x, dict) else torch.as_tensor(x)
            if x.ndim != 3 or len(x) != 8:
                raise fid.DataError(f"{name} is {tuple(x.shape)}, not 8 channels: mean and deviation")
        mean, spread = x.float().chunk(2)
        if spread.min() < 0:          # trap: a log variance (always below 0 somewhere) is no deviation
            spread = (0.5 * spread).exp()
        x = torch.cat([mean, spread])
        return x.flip(2) if flip else x               # the encoder is not quite symmetric; our shards hold both

    def read(self, index, flips):
        """index (B,), flips (B,) -> moments (B, 8, h, w)."""
        return torch.stack(list(self.pool.map(self.moments, index.tolist(), flips.tolist())))


class Pixels:
    """The bundled digits with the interface of Latents, whole in memory, never flipped."""

    def __init__(self):
        self.pixels, self.labels = fid.digits()
        self.stamp = f"{len(self.pixels)} images, crc32 {zlib.crc32(self.pixels.numpy()):08x}"
        self.shape, self.classes = tuple(self.pixels.shape[1:]), 10

    def read(self, index, flips):
        return self.pixels[index]


def load_data(cfg):
    """Latents of --data, or the digits. Missing: exit code 3 with the remedy."""
    return Pixels() if cfg.data == "digits" else Latents(data_file(cfg))


def data_file(cfg):
    """Where the latents of --data are; exit code 3 if they are not."""
    path = FILES.get(cfg.data, cfg.data)
    if cfg.data != "digits" and not os.path.exists(path):
        fail(3, f"{path}: not there; make latents by --stage encode --source FOLDER, or pass --data FOLDER")
    return path


def to_latents(raw, noise, device):
    """What read gave -> (B, C, H, W) on device: pixels in [-1, 1], or a fresh sample of each latent, times SCALE."""
    if raw.dtype == torch.uint8:
        return to_float(raw, device)
    mean, deviation = raw.to(device, non_blocking=True).chunk(2, 1)
    return SCALE * (mean + noise * deviation)


def to_float(images, device):
    """uint8 (B, C, H, W) -> [-1, 1], channels_last, on device."""
    return (images.to(device, non_blocking=True).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def sd_vae(cfg, device):
    """The SD-VAE of diffusers, frozen, float32; None for digits. Exit code 3 if diffusers is missing."""
    if cfg.data == "digits":
        return None
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        fail(3, "256x256 images need the SD-VAE: pip install diffusers transformers accelerate")
    return AutoencoderKL.from_pretrained(cfg.vae).to(device).requires_grad_(False).eval()


def decoded(x, vae):
    """Samples -> images in [-1, 1]; vae, if not None, decodes latents, 16 at a time."""
    return x if vae is None else torch.cat([vae.decode(part / SCALE).sample for part in x.split(16)])


def crop(image, res):
    """Centre crop of ADM and EDM2: halve (BOX) while twice too large, BICUBIC to res, cut. RGB in, RGB out."""
    while min(image.size) >= 2 * res:
        image = image.resize(tuple(n // 2 for n in image.size), Image.BOX)
    scale = res / min(image.size)
    image = image.resize(tuple(round(n * scale) for n in image.size), Image.BICUBIC)
    left, top = (image.width - res) // 2, (image.height - res) // 2
    return image.crop((left, top, left + res, top + res))


def encode_folder(cfg, rank, world, device):
    """--source (a folder per class) -> shards of moments, fp16 (n, 2, 8, 32, 32), the second flipped; index.json.

    A shard is renamed when it is whole, so a killed run goes on; index.json is written last.
    """
    target = FILES.get(cfg.data, cfg.data)
    if not os.path.isdir(cfg.source):
        fail(3, f"--source {cfg.source!r} is no folder; name ImageNet's training folder, one folder per class")
    classes = sorted(d for d in os.listdir(cfg.source) if os.path.isdir(os.path.join(cfg.source, d)))
    found = [(os.path.join(cfg.source, d, f), k) for k, d in enumerate(classes)
             for f in sorted(os.listdir(os.path.join(cfg.source, d)))]
    if not found:
        fail(3, f"--source {cfg.source} holds no folder of images; name ImageNet's training folder")
    vae, shards = sd_vae(cfg, device), -(-len(found) // SHARD)
    os.makedirs(target, exist_ok=True)
    for k in range(rank, shards, world):
        path = f"{target}/{k:05d}.npy"
        if not os.path.exists(path):
            encode_shard([name for name, _ in found[k * SHARD:(k + 1) * SHARD]], path, vae, device)
            log(cfg, f"encode: {min(len(found), (k + 1) * SHARD):,}/{len(found):,} images")
    if world > 1:
        dist.barrier()
    if rank == 0:
        np.save(f"{target}/labels.npy", np.array([k for _, k in found], np.int64))
        with open(f"{target}/index.json.tmp", "w") as f:
            json.dump(dict(kind="mean, deviation; plain, flipped", scale=SCALE, vae=cfg.vae, crop="ADM 256",
                           classes=classes, images=len(found), shards=shards), f)
        os.replace(f"{target}/index.json.tmp", f"{target}/index.json")
        log(cfg, f"encode: {target}, {len(found):,} images and their mirror images, {len(classes)} classes")


@torch.no_grad()
def encode_shard(names, path, vae, device):
    """Image files -> one shard, by way of a temporary file. Flipped: encoded again, not a flipped latent."""
    shard = None
    with ThreadPoolExecutor(8) as pool:
        def read(name):
            with fid.blame(name), Image.open(name) as image:
                return np.asarray(crop(image.convert("RGB"), 256))
        for i in range(0, len(names), 32):
            pixels = torch.from_numpy(np.stack(list(pool.map(read, names[i:i + 32]))))
            x = to_float(pixels.permute(0, 3, 1, 2), device)
            for flip in range(2):
                code = vae.encode(x.flip(3) if flip else x).latent_dist
                moments = torch.cat([code.mean, code.std], 1).half().cpu().numpy()
                if shard is None:
                    shape = (len(names), 2, *moments.shape[1:])
                    shard = np.lib.format.open_memmap(path + ".tmp", "w+", np.float16, shape)
                shard[i:i + 32, flip] = moments
    shard.flush()
    os.replace(path + ".tmp", path)


# ---- losses -----------------------------------------------------------------------------------
def draw_times(n, g, ratio, mean, std):
    """(t, r), each (n,), 0 < r <= t < 1: of two logit-normal draws the larger and the smaller (MF).

    r = t but for exactly round(ratio n) samples, spread evenly over the batch: every process and micro-batch has
    its share of them, and no shape depends on chance. g: a CPU generator, so positions are known without waiting.
    """
    draws = torch.sigmoid(mean + std * torch.randn((2, n), generator=g))
    t, r = draws.amax(0), draws.amin(0)
    i, k = torch.arange(n), round(ratio * n)
    return t, torch.where(i * k // n < (i + 1) * k // n, r, t)


class TwoProducts(TorchFunctionMode):
    """Inside: the derivative of a linear layer is itself without bias, two products and no more.

    Autograd's own rule adds the absent derivatives of weights and bias, empty tensors whose shapes it works out in
    Python: a third of the time of a small net.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and (x := forward_ad.unpack_dual(args[0])).tangent is not None:
            return forward_ad.make_dual(func(x.primal, *args[1:]), func(x.tangent, args[1]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def derivative(net, z, t, r, y, v):
    """du/dt along the flow, (B, C, H, W): v . du/dz + du/dt at fixed r, of u = net(z, t, r, y); not recorded."""
    one = torch.ones_like(t)                          # trap: r stands still (FID 61, else 329: MF, Table 1b)
    if torch.compiler.is_compiling():
        return torch.func.jvp(lambda z, t: net(z, t, r, y, repa=False), (z, t), (v, one))[1]
    with forward_ad.dual_level(), TwoProducts():      # the same product with less ado: 60 % of its time
        u = net(forward_ad.make_dual(z, v), forward_ad.make_dual(t, one), r, y, repa=False)
        return forward_ad.unpack_dual(u).tangent


def loss_mf(f, slope, z, v, t, r, y, null, led, cfg):
    """Mean Flow: w |u - sg(v~ - (t - r) du/dt)|^2, w = sg(|.|^2 + c)^-p, mean over samples; also |.|^2 (B,).

    f(z, t, r, y) -> u; slope(z, t, r, y, v) -> du/dt; z (B, C, H, W) = (1 - t) x + t eps; v = eps - x;
    t, r, y (B,) on the CPU; null: the null class; led (B,) bool: samples with guidance. v~ is v, and where led
    omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null); the same v~ is the tangent of z.
    Where r = t the factor (t - r) is 0: no product. There u(z, t, t | y) is u itself: no second forward.
    """
    far, rest = r < t, 1 - cfg.omega - cfg.kappa
    ask_null = led if abs(rest) > 1e-9 else torch.zeros_like(led)
    ask_own = led & far if cfg.kappa else torch.zeros_like(led)
    near, far, i, j = (m.nonzero()[:, 0].to(z.device, non_blocking=True) for m in (led & ~far, far, ask_null, ask_own))
    share = 1 + (cfg.omega - 1) * led.to(v.dtype)
    t, r, y, share = (a.to(z.device, non_blocking=True) for a in (t, r, y, share))
    target = share.view(-1, 1, 1, 1) * v
    with torch.no_grad():
        if len(i) + len(j):
            at = torch.cat([i, j])
            asked = f(z[at], t[at], t[at], torch.cat([torch.full_like(y[i], null), y[j]]))
            target[i] += rest * asked[:len(i)]
            target[j] += cfg.kappa * asked[len(i):]
        if len(far):
            product = slope(z[far], t[far], r[far], y[far], target[far])
            target[far] -= (t - r)[far].view(-1, 1, 1, 1) * product
    u = f(z, t, r, y)
    if cfg.kappa:
        target[near] += cfg.kappa * u.detach()[near]
    square = (u - target).square().flatten(1).sum(1)
    return (square / (square.detach() + cfg.weight_c) ** cfg.power).mean(), square.detach()


def all_pairs(nodes, diagonal=0):
    """(i, j), each (P,): every pair i < j of a trajectory's states, noisiest first, and `diagonal` times i = j."""
    i, j = torch.triu_indices(nodes, nodes, 1)
    same = torch.arange(nodes).repeat(diagonal)
    return torch.cat([i, same]), torch.cat([j, same])


def velocity(cfg, net, y):
    """u(x, t, r) of a Mean Flow net, classes y; of a flow-matching net v(x, t), guided by omega / (1 - kappa).

    Guidance where t is inside the interval. Null-labelled samples are not guided: there both answers are one.
    """
    scale, null = cfg.omega / (1 - cfg.kappa), torch.full_like(y, net.num_classes)

    def u(x, t, r=None):
        own = net(x, t, r, y)
        if net.r_embedder is None and scale != 1 and cfg.guide_from <= t[0] <= cfg.guide_to:
            return net(x, t, r, null).lerp(own, scale)
        return own
    return u


@torch.no_grad()
def rollout(cfg, net, z, y, times):
    """States (N+1, B, ...) from z down `times` (N+1,), and the mean velocity of each step, (N, B, ...).

    A Mean Flow net jumps; a flow-matching net is integrated by --solver.
    """
    calls, u = [], velocity(cfg, net, y)

    def recorded(x, t, r=None):
        calls.append(u(x, t, r))
        return calls[-1]
    one_clock = solvers.flow_heun if cfg.solver == "heun" else solvers.flow_euler
    states = (one_clock if net.r_embedder is None else solvers.mean_flow)(recorded, z, times)
    return states, torch.stack(calls).unflatten(0, (len(times) - 1, -1)).mean(1)


@torch.no_grad()
def teacher_pairs(cfg, teacher, shape, g, rank, world):
    """Eq. 8: one roll-out of the frozen teacher gives all pairs of its states, for any number of processes.

    Returns z (P n, C, H, W), t, r, y (P n,) and the target, the mean velocity (z_t - z_r) / (t - r), with n
    trajectories of random class, one in ten of the null class: in post-training u needs both.
    """
    n, times = solves(cfg)[0], torch.linspace(1, 0, cfg.nodes, dtype=torch.float64)
    mine = slice(rank * n // world, (rank + 1) * n // world)
    noise = randn((n, *shape), g)[mine]
    y = torch.randint(teacher.num_classes, (n,), generator=g, device=g.device)
    drop = torch.rand(n, generator=g, device=g.device) < cfg.dropout
    y = torch.where(drop, teacher.num_classes, y)     # choice: null trajectories too, for guidance in post
    states, velocities = (gather(x, world) for x in rollout(cfg, teacher, noise, y[mine], times))
    i, j = (k.to(g.device) for k in all_pairs(cfg.nodes, cfg.diagonal))
    times, wide = times.to(states), (-1, 1, 1, 1, 1)
    done = torch.cat([torch.zeros_like(states[:1]), (velocities * -times.diff().view(wide)).cumsum(0)])
    target = (done[j] - done[i]) / (times[i] - times[j]).view(wide)       # prefix sums: no difference of states
    if cfg.diagonal:
        u, ts = velocity(cfg, teacher, y[mine]), times.view(-1, 1).expand(-1, n)[:, mine]
        own = torch.stack([u(x[mine], t, t) for x, t in zip(states, ts)])
        target[i == j] = gather(own, world)[i[i == j]]
    t, r = times[i].repeat_interleave(n), times[j].repeat_interleave(n)
    return states[i].flatten(0, 1), t, r, y.repeat(len(i)), target.flatten(0, 1)


def loss_cmt_mf(f, z, t, r, y, target):
    """Eq. 8: |u(z, t, r) - target|^2 on pairs of a teacher's trajectory; also the square error (B,) of each.

    Unit weight (B.4), mean over numbers and pairs. The target is fixed data: no stop-gradient is needed.
    """
    square = (f(z, t, r, y) - target).square().flatten(1).sum(1)
    return square.mean() / target[0].numel(), square.detach()


# ---- sample -----------------------------------------------------------------------------------
def noises(net, seeds, device, labels="random"):
    """z at t = 1 (B, C, H, W) and classes (B,): image i depends on seed i alone, not on batch or rank."""
    generators = [torch.Generator().manual_seed(fold("sample", s)) for s in seeds]
    size = net.grid * net.patch_size
    z = solvers.noise((net.x_embedder.proj.in_channels, size, size), generators)
    drawn = [int(torch.randint(net.num_classes, (), generator=g)) for g in generators]
    y = torch.tensor([s % net.num_classes for s in seeds] if labels == "balanced" else drawn)
    return z.to(device), y.to(device)


def make_sampler(cfg, net, steps, device, labels="balanced"):
    """Returns f(seeds) -> (B, C, H, W), not yet decoded: `steps` equal jumps from t = 1 to 0."""
    @torch.no_grad()
    def sample(seeds):
        z, y = noises(net, seeds, device, labels)
        return rollout(cfg, net, z, y, torch.linspace(1, 0, steps + 1, dtype=torch.float64))[0][-1]
    return sample


def preview(x):
    """Latents -> something to look at without a VAE: their first three channels. Pixels stay as they are."""
    return x[:, :3] / 2 if x.shape[1] == 4 else x


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


def mse_by_gap(errors, world, *names):
    """The log's text and numbers; errors (2, 5 + len(names)) is cleared.

    Its rows: sums, counts; its columns: squared errors by t - r (0, quarters), then one for each of names.
    """
    if world > 1:
        dist.all_reduce(errors)
    total, count = errors.tolist()
    errors.zero_()
    means = [e / k if k else None for e, k in zip(total, count)]
    far = sum(total[1:5]) / sum(count[1:5]) if any(count[1:5]) else None
    shown = [("mse r=t", means[0]), ("mse r<t", far), *zip(names, means[5:])]
    text = "".join(f"{name} {m:.4f} | " for name, m in shown if m is not None)
    return text, dict(mse_same=means[0], mse_gaps=means[1:5], **dict(zip(names, means[5:])))


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


def read_net(cfg, name):
    """(weights, constructor arguments) of a FILE or URL: ours, or a bare state dict of SiT, REPA, Mean Flow."""
    state, model = nets.load_pretrained(name)
    shape = shape_of(state, name)                     # a net of another kind is refused here
    if "://" not in name and (stated := torch.load(name, map_location="cpu", weights_only=True).get("cfg")):
        check_guidance(cfg, stated, name)
    return state, model or shape


def shape_of(state, name):
    """Constructor arguments of a DiT, read off its weights (a bare state dict does not say them)."""
    try:
        hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1]) * patch
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    except KeyError as e:
        raise nets.WeightsError(f"{name}: no DiT, SiT or Mean Flow net, it has no {e}") from None
    model = dict(input_size=side, in_channels=channels, patch_size=patch, hidden_size=hidden, depth=depth)
    heads = [row["num_heads"] for row in nets.SIZES.values() if model.items() >= {
        k: row.get(k) for k in ("hidden_size", "depth")}.items()]
    two = any(k.startswith(("r_embedder.", "h_embedder.")) for k in state)
    heads = (heads or [max(1, hidden // 64)])[0]
    return dict(model, num_heads=heads, num_classes=classes, average_velocity=two)


def check_guidance(cfg, stated, what):
    """Guidance is part of a Mean Flow, so all stages share it (B.4: imperative); exit code 2 if weights differ."""
    if stated.get("pretrain") == "fm" and stated["stage"] == "pretrain" or "omega" not in stated:
        return                                        # plain flow matching: guided when it is rolled out
    scales = [c["omega"] / (1 - c["kappa"]) for c in (stated, asdict(cfg))]
    spans = [(c["guide_from"], c["guide_to"]) for c in (stated, asdict(cfg))]
    if abs(scales[0] - scales[1]) > 1e-6 or spans[0] != spans[1] and scales[0] != 1:
        fail(2, f"{what} was trained with guidance {scales[0]:.4g} for t in {list(spans[0])}, this stage has "
                f"{scales[1]:.4g} in {list(spans[1])}; pass its --omega, --kappa, --guide_from, --guide_to")


def teacher_state(cfg):
    """(weights, constructor arguments) of --teacher, else <out>/pretrain.pt."""
    if cfg.teacher:
        return read_net(cfg, cfg.teacher)
    if not (state := finished(f"{cfg.out}/pretrain.pt")):
        fail(3, f"no finished teacher in {cfg.out}; run --stage pretrain first, or pass --teacher FILE")
    check_guidance(cfg, state["cfg"], f"{cfg.out}/pretrain.pt")
    return state["ema"], state["model"]


def build(cfg, model, device, state=None, what="", train=False):
    """A DiT from constructor arguments, with weights by name if given; a SiT's are turned to our clock."""
    torch.manual_seed(fold(cfg.seed, cfg.stage, "init"))
    net = nets.DiT(**model)
    if state is not None:
        nets.load_flow(net, state, what)
    net = net.to(device)
    return net if train else net.requires_grad_(False).eval()


def student(cfg, model, device, teacher):
    """The net to train. First weights: random, mid.pt's in post (unless --mid none), teacher's, or FILE's."""
    state, what = None, cfg.init
    if cfg.stage == "post" and cfg.mid != "none":
        what = f"{cfg.out}/mid.pt"
        if not (ckpt := finished(what)):
            fail(3, f"{what} is not finished; run --stage mid first, or pass --mid none")
        check_guidance(cfg, ckpt["cfg"], what)
        state = ckpt["ema"]           # choice: the average, not the last weights
    elif cfg.init == "sit" and cfg.stage != "pretrain":
        state, what = teacher, "the teacher (--init sit)"
    elif cfg.init != "random" and cfg.stage != "pretrain":
        state = read_net(cfg, cfg.init)[0]
    return build(cfg, model, device, state, what, train=True)


def model_size(cfg, like):
    """Constructor arguments of the net to train: --weak in pretrain, else --size; like: those of its data."""
    name = cfg.weak if cfg.stage == "pretrain" else cfg.size
    if own := re.fullmatch(r"(\d+)x(\d+)x(\d+)", name):
        patch, hidden, depth = map(int, own.groups())
        row = dict(patch_size=patch, hidden_size=hidden, depth=depth, num_heads=hidden // 32)
    else:
        row = nets.SIZES[name]
    if like["input_size"] % row["patch_size"]:
        fail(2, f"{name}: patches of {row['patch_size']} do not fill the {like['input_size']} pixels of --data")
    return {**row, **like, "average_velocity": cfg.stage != "pretrain" or cfg.pretrain == "mf"}


def forward(cfg, net, device):
    """(f, slope) as the losses call them: u in --precision, du/dt in --product's; compiled by --compile."""
    cast, same = HALF.get(cfg.precision), cfg.product == "same"

    def f(z, t, r, y):
        with torch.autocast(device.type, cast, enabled=cast is not None):
            return net(z, t, r, y)

    def slope(z, t, r, y, v):
        with torch.autocast(device.type, cast if same else None, enabled=same and cast is not None):
            return derivative(net, z, t, r, y, v)

    def exact(*a):
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before, matmul.allow_tf32 = matmul.allow_tf32, False
        cudnn.allow_tf32 = False                      # trap: the patches are embedded by a convolution
        try:
            return inner(*a)
        finally:
            matmul.allow_tf32 = cudnn.allow_tf32 = before
    # trap: a compiled module inside jvp runs eager, in silence; so the functions are compiled, never the module
    f, inner = (torch.compile(f), torch.compile(slope)) if cfg.compile else (f, slope)
    return f, inner if same else exact


def train(cfg, rank, world, device):
    """One stage (pretrain, mid, post) from its last checkpoint to its end. Method first, bookkeeping last."""
    path, B = f"{cfg.out}/{cfg.stage}.pt", cfg.batch
    ckpt = resume(cfg, path)
    if ckpt and ckpt["step"] >= cfg.steps:
        return log(cfg, f"{cfg.stage}: {path} is finished, nothing to do")
    images, data, weights, model = None, "none", None, None
    if cfg.stage != "mid":                                                        # CMT needs no data
        images = load_data(cfg)
        data = images.stamp
        like = dict(input_size=images.shape[-1], in_channels=images.shape[0], num_classes=images.classes)
    if ckpt and ckpt["data"] != data:
        fail(2, f"--data {cfg.data} has changed: {path} saw {ckpt['data']}, now {data}; use another --out")
    if cfg.stage == "mid" or cfg.stage == "post" and cfg.mid == "none" and cfg.init == "sit":
        weights, model = teacher_state(cfg)
    if cfg.stage == "mid":
        teacher = build(cfg, model, device, weights, "the teacher")
        like = {k: model[k] for k in ("input_size", "in_channels", "num_classes")}
    model = model_size(cfg, like)
    net = student(cfg, model, device, weights).train()
    shape, null = (model["in_channels"], model["input_size"], model["input_size"]), model["num_classes"]
    ema = deepcopy(net).requires_grad_(False).eval()
    (flat, grad), flat_ema = flatten(net), flatten(ema)[0]
    flat.grad = grad[:-1]
    opt = torch.optim.Adam([flat], lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    f, slope = forward(cfg, net, device)
    pairs, errors = solves(cfg)[1], torch.zeros(2, 5, device=device)      # sum, count by t - r: 0, quarters
    mine = slice(rank * B // world, (rank + 1) * B // world)                      # this process's share
    micro = torch.arange(B // world).split(cfg.batch_gpu or B)

    def read(step):
        g = torch.Generator().manual_seed(fold(cfg.seed, cfg.stage, step, "data"))
        index, flips = torch.randint(len(images.labels), (B,), generator=g), torch.rand(B, generator=g) < 0.5
        y = torch.where(torch.rand(B, generator=g) < cfg.dropout, null, images.labels[index])
        t, r = draw_times(B, g, cfg.ratio, cfg.P_mean, cfg.P_std)
        if not model["average_velocity"]:             # trap: one clock learns v, which an average would spoil
            t = r = torch.rand(B, generator=g)                                    # SiT
        return images.read(index[mine], flips[mine]), y[mine], t[mine], r[mine]
    start, since, scale, health = restore(cfg, ckpt, path, net, ema, opt, device)
    ckpt = weights = None                             # as large as the net, and needed no more
    reader = ThreadPoolExecutor(1)                                                # one step ahead
    ahead = reader.submit(read, start) if images is not None else None
    log(cfg, f"{cfg.stage}: {len(flat):,} parameters, steps {start} to {cfg.steps}, {world} process(es) on "
             f"{device}, {torch.get_num_threads()} CPU thread(s) each")

    for step in range(start, cfg.steps):
        decay = 1 - step / cfg.steps if cfg.decay == "linear" else 1.0
        opt.param_groups[0]["lr"] = lr = cfg.lr * decay * min(1.0, (step + 1) / (cfg.warmup + 1))
        g = torch.Generator(device).manual_seed(fold(cfg.seed, cfg.stage, step))
        if cfg.stage == "mid":
            solve, at = divmod(step * B, pairs)
            if at == 0 or step == start:                                         # a solve feeds several steps
                g.manual_seed(fold(cfg.seed, "solve", solve))
                with torch.autocast(device.type, HALF.get(cfg.precision), enabled=cfg.precision in HALF):
                    bank = teacher_pairs(cfg, teacher, shape, g, rank, world)
                order = torch.randperm(pairs, generator=g, device=device)
            z, t, r, y, target = (a[order[at:at + B][mine]] for a in bank)
        else:
            (raw, y, t, r), ahead = ahead.result(), reader.submit(read, step + 1)
            noise, eps = randn((B, *shape), g)[mine], randn((B, *shape), g)[mine]
            x, level = to_latents(raw, noise, device), t.to(device, non_blocking=True).view(-1, 1, 1, 1)
            z, v = (1 - level) * x + level * eps, eps - x
            led = guided(cfg, step, t, y, null)

        gaps = (4 * (t - r)).ceil().long().to(device, non_blocking=True)          # 0, or the quarter of t - r
        for i in micro:                                                           # this process's share
            if cfg.stage == "mid":
                loss, square = loss_cmt_mf(f, z[i], t[i], r[i], y[i], target[i])                  # Eq. 8
            else:
                loss, square = loss_mf(f, slope, z[i], v[i], t[i], r[i], y[i], null, led[i], cfg)
            (loss * (len(i) / B) * scale).backward()
            grad[-1] += loss.detach() * (len(i) / B) * scale
            ok = square.isfinite()
            errors[0].index_add_(0, gaps[i], torch.where(ok, square / z[0].numel(), 0.0))
            errors[1].index_add_(0, gaps[i], ok.float())
        if world > 1:
            # choice: one all-reduce of one vector, no DDP wrapper: any number of processes, one result
            dist.all_reduce(grad)                 # trap: process 0's own loss is not the loss: it rides along
        update(opt, flat, grad, health, scale, cfg)
        flat_ema.lerp_(flat, 1 - cfg.ema_beta)

        # bookkeeping from here on
        done, stop = step + 1, any_stop(world)
        to_save = stop or done % cfg.save_every == 0 or done == cfg.steps
        if to_save or done % cfg.log_every == 0:
            text, numbers = mse_by_gap(errors, world)
            report(cfg, done, lr, health, since, text, **numbers)
        if to_save and rank == 0:
            save(path, step=done, net=net.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(),
                 model=model, cfg=asdict(cfg), data=data,
                 seconds=since["seconds"], skipped=int(health[2]), scale=scale.item())
            steps = cfg.nfe if cfg.stage == "pretrain" else 1
            save_grid(preview(make_sampler(cfg, ema, steps, device)(range(64))),
                      f"{cfg.out}/samples_{cfg.stage}_{done:07d}.png")
            since["clock"] = time.time()
        if stop:
            fail(75, f"stopped by a signal; step {done} is saved, run the same command again to go on")
    if world > 1:
        dist.barrier()


def guided(cfg, step, t, y, null):
    """Which samples (B,) have a guided target: labelled, t inside the interval, past --unguided."""
    off = cfg.omega == 1 and cfg.kappa == 0 or cfg.stage == "pretrain" and cfg.pretrain == "fm" or \
        cfg.stage == "post" and cfg.mid == "none" and cfg.init == "sit" and step < cfg.unguided
    return (t >= cfg.guide_from) & (t <= cfg.guide_to) & (y != null) & (not off)


def solves(cfg):
    """Trajectories that a call of teacher_pairs rolls out, and the pairs they give."""
    return cfg.trajectories, cfg.trajectories * len(all_pairs(cfg.nodes, cfg.diagonal)[0])


def check_batch(cfg, world):
    """Everything that must divide or make sense, before anything is trained; exit code 2."""
    share = cfg.batch // world
    if cfg.batch % world:
        fail(2, f"--batch {cfg.batch} must be a multiple of the {world} processes")
    if cfg.batch_gpu and share % cfg.batch_gpu:
        fail(2, f"--batch_gpu {cfg.batch_gpu} must divide the {share} images of --batch in a process")
    if not (cfg.omega > 0 and 0 <= cfg.kappa < 1 and 0 <= cfg.guide_from <= cfg.guide_to <= 1):
        fail(2, f"--omega {cfg.omega} --kappa {cfg.kappa} --guide_from {cfg.guide_from} --guide_to "
                f"{cfg.guide_to}: omega must be above 0, kappa in [0, 1), the interval inside [0, 1]")
    if not (0 <= cfg.ratio <= 1 and 0 <= cfg.dropout < 1 and cfg.nodes >= 2 and cfg.trajectories >= 1):
        fail(2, f"--ratio {cfg.ratio} --dropout {cfg.dropout} --nodes {cfg.nodes} --trajectories "
                f"{cfg.trajectories}: shares are in [0, 1], nodes 2 at least, trajectories 1")
    if not 0 < cfg.weight_c < math.inf:
        fail(2, f"--weight_c {cfg.weight_c} is not possible; it must be above 0")
    for field in ("weak", "size"):
        name = getattr(cfg, field)
        own = re.fullmatch(r"[1-9]\d*x([1-9]\d*)x[1-9]\d*", name)
        if own and int(own[1]) % 32:
            fail(2, f"--{field} {name}: the width {own[1]} must be a multiple of 32, the width of a head")
        if not (own or name.startswith("dit-") and name in nets.SIZES):
            rows = ", ".join(k for k in nets.SIZES if k.startswith("dit-"))
            fail(2, f"--{field} {name}: not one of {rows}, nor PATCHxWIDTHxDEPTH as in 4x64x2")
    n, pairs = solves(cfg)
    if cfg.stage != "mid" or cfg.mid == "none":
        return
    if pairs % cfg.batch:
        fail(2, f"the {pairs} pairs of --nodes {cfg.nodes} and --trajectories {cfg.trajectories} must fill "
                f"whole batches of --batch {cfg.batch}")
    if n % world:
        fail(2, f"the {n} --trajectories of a solve must be a multiple of the {world} processes")


def candidates(cfg, device):
    """What to sample from: (name, net, {kind of sampler: steps}, checkpoint); --init FILE: it alone."""
    kinds = {"1": 1, "2": 2, "many": cfg.nfe}
    if cfg.init not in ("sit", "random"):
        state, model = read_net(cfg, cfg.init)
        return [("init", build(cfg, model, device, state, cfg.init), kinds, {})]
    found = []
    if cfg.teacher:
        state, model = teacher_state(cfg)
        found.append(("teacher", build(cfg, model, device, state, cfg.teacher), kinds, {}))
    for stage in ("pretrain", "mid", "post")[bool(cfg.teacher):]:
        if ckpt := finished(f"{cfg.out}/{stage}.pt"):
            check_guidance(cfg, ckpt["cfg"], f"{cfg.out}/{stage}.pt")
            name = "teacher" if stage == "pretrain" else stage
            found.append((name, build(cfg, ckpt["model"], device, ckpt["ema"], stage), kinds, ckpt))
    if not found:
        fail(3, f"no finished stage in {cfg.out}; run --stage pretrain first, or pass --init FILE")
    return [(name, net, kinds if net.r_embedder is not None else {"many": cfg.nfe}, ckpt)
            for name, net, kinds, ckpt in found]


def sample(cfg, rank, world, device):
    """One PNG per seed in <out>/samples/<net>_<steps>, and a sheet of them all: samples_<net>_<steps>.png."""
    seeds, vae = seed_range(cfg.seeds), sd_vae(cfg, device)
    for name, net, kinds, _ in candidates(cfg, device):
        for n in kinds.values():
            folder = f"{cfg.out}/samples/{name}_{n}"
            os.makedirs(folder, exist_ok=True)
            sampler, images = make_sampler(cfg, net, n, device, cfg.labels), []
            for i in range(0, len(seeds), 64):
                images.append(decoded(sampler(seeds[i:i + 64]), vae).cpu())
                for seed, image in zip(seeds[i:i + 64], fid.to_uint8(images[-1]).permute(0, 2, 3, 1).numpy()):
                    if seed % world == rank:
                        Image.fromarray(image.squeeze()).save(f"{folder}/{seed:06d}.png")
            if rank == 0:
                save_grid(torch.cat(images)[:1024], f"{cfg.out}/samples_{name}_{n}.png")
            log(cfg, f"sample: {len(seeds)} images in {folder}")


def evaluate(cfg, rank, world, device):
    """Score every net there is, in 1, 2 and --nfe steps; --labels both: random and balanced, a row each."""
    metric, vae = "FD-digits" if cfg.data == "digits" else "FID", sd_vae(cfg, device)
    features = (fid.DigitsNet() if cfg.data == "digits" else fid.load_inception(cfg.inception)).to(device)
    if cfg.reference or cfg.data == "imagenet":
        reference = fid.load_reference(cfg.reference or "imagenet256")
    else:
        batches = own_images(load_data(cfg), rank, world, vae, device)
        reference = fid.measure(features, batches, device, file=f"of --data {cfg.data}")
    found, table = candidates(cfg, device), []
    for name, net, kinds, ckpt in found:
        for labels in ("random", "balanced") if cfg.labels == "both" else (cfg.labels,):
            row = dict.fromkeys(("1", "2", "many"), "-")
            for kind, n in kinds.items():
                latents = make_sampler(cfg, net, n, device, labels)
                sampler = lambda seeds: decoded(latents(seeds), vae)                 # noqa: E731
                scores, ours = score(cfg, sampler, features, reference, rank, world, device)
                row[kind] = f"{scores.mean():.2f}"
                if cfg.repeat > 1:
                    row[kind] += f" +- {scores.std():.2f}, min {scores.min():.2f}"
                log(cfg, f"eval: {name} {n}-step {metric} {row[kind]}, {labels} labels",
                    stage="eval", net=name, metric=f"{n}-step {metric}", labels=labels, values=scores.tolist())
            seen = ckpt["step"] * ckpt["cfg"]["batch"] if ckpt else 0
            seconds, name_it = f"{ckpt.get('seconds', 0):.0f}", f"{name}, {labels} labels"
            table.append([name_it, ckpt.get("step", "-"), f"{seen:,}", seconds, *row.values()])
    if rank == 0:
        note = (f"decoder {cfg.vae if vae else 'none (pixels)'}, guidance {cfg.omega / (1 - cfg.kappa):.4g} "
                f"(omega {cfg.omega}, kappa {cfg.kappa}) for t in [{cfg.guide_from}, {cfg.guide_to}]")
        results(cfg, metric, table, fid.protocol(ours, reference), note, cfg.nfe)
        sheets(cfg, found, vae, device)


@torch.no_grad()
def own_images(images, rank, world, vae, device):
    """The data itself as uint8 batches, latents by their means, decoded: what a perfect model could reach."""
    for i in torch.arange(rank, len(images.labels), world).split(250):
        raw = images.read(i, torch.zeros(len(i), dtype=torch.bool))
        yield raw if vae is None else fid.to_uint8(decoded(to_latents(raw, 0.0, device), vae))


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
def sheets(cfg, found, vae, device):
    """Pictures: a sheet per net, a column per class; one noise through the stages; trajectories and answers."""
    classes, rows = min(10, found[0][1].num_classes), []
    for name, net, kinds, _ in found:
        for n in kinds.values():
            x = decoded(make_sampler(cfg, net, n, device)(range(10 * classes)), vae).cpu()
            save_grid(x, f"{cfg.out}/samples_{name}_{n}step.png", columns=classes)
            rows.append(x[:2 * classes])
    save_grid(torch.cat(rows), f"{cfg.out}/samples_stages.png", columns=2 * classes)
    (_, first, *_), *others = found
    times, rows = torch.linspace(1, 0, cfg.nodes, dtype=torch.float64), []
    z, y = noises(first, range(3), device)
    states = rollout(cfg, first, z, y, times)[0]                                     # (nodes, 3, C, H, W)
    for j in range(3):
        x, t = states[:, j], times.to(states)
        rows.append(x)
        rows += [x - t.view(-1, 1, 1, 1) * net(x, t, t * 0, y[j].expand(len(x))) for _, net, *_ in others]
    save_grid(decoded(torch.cat(rows), vae), f"{cfg.out}/samples_trajectory.png", columns=cfg.nodes)


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
    if cfg.stage == "encode":
        encode_folder(cfg, rank, world, device)
    elif cfg.stage == "sample":
        sample(cfg, rank, world, device)
    elif cfg.stage == "eval":
        evaluate(cfg, rank, world, device)
    elif cfg.stage == "pretrain" and cfg.teacher:
        teacher_state(cfg)                            # read and checked, not trained
    elif cfg.stage != "mid" or cfg.mid != "none":
        log(cfg, f"{cfg.stage}: {json.dumps(asdict(cfg))}")
        train(cfg, rank, world, device)


def main(argv=None):
    """Run one stage, or with --stage all every stage that is not finished, in order, then the score."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = parse(argv)
    rank, world, device = ddp_init(cfg)
    stages = ["pretrain", "mid", "post", "eval"] if cfg.stage == "all" else [cfg.stage]
    if cfg.stage == "all" and cfg.mid == "none" and cfg.init != "sit":
        stages = stages[1:]                           # nothing learns from a teacher
    configs = [parse([*argv, "--stage", stage]) for stage in stages]
    if cfg.stage == "all":                            # --init FILE: what started from it is scored, not the file
        configs[-1] = parse([*argv, "--stage", "eval", "--init", Config.init])
    for c in configs:
        check_batch(c, world)
        if c.stage == "post" and not os.path.exists(f"{c.out}/post.pt"):
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
