"""CMT on ImageNet 64x64 (pixels), 512x512 (latents): EDM2 becomes a 1-2 step generator (Sec. 4.2, App. B.3, B.5).

  python train_cmt_imagenet.py --data digits                # laptop: the whole road in minutes, no download
  torchrun --nproc_per_node=8 train_cmt_imagenet.py --res 64                      # the paper's run, ECT
  torchrun --nproc_per_node=8 train_cmt_imagenet.py --res 64 --post ecd           # its best: 1.78 / 1.32
  torchrun --nproc_per_node=8 train_cmt_imagenet.py --res 512                     # XXL on latents, ECD
  python train_cmt_imagenet.py --res 64 --stage encode --source ILSVRC2012_img_train
  python train_cmt_imagenet.py --data digits --stage sample --seeds 0-63

pretrain: fetch EDM2 (or train it). vgg: the latent VGG of ELatentLPIPS (512). mid: regress the student onto the
ends of the teacher's trajectories, classes given (Eq. 7). post: ECT, or ECD with an autoguided teacher (Eq. 3).
Run the same command again to resume. Copy and fork as you please.
"""
import argparse
import difflib
import errno
import fcntl
import hashlib
import inspect
import io
import json
import math
import os
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

import fid
import nets
import solvers


# ---- knobs ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:                   # field default < matching rows of PRESETS < command line; --flag is the field
    data: str = "imagenet"      # imagenet | digits | an EDM2 .zip or folder: PNG or latent .npy, dataset.json
    res: int = 64               # 64: pixels; 512: latents 4x64x64
    stage: Literal["all", "encode", "pretrain", "vgg", "mid", "post", "sample", "eval"] = "all"
    out: str = ""               # folder of the run; "" = out/<data><res>, out/digits-imagenet
    source: str = ""            # encode: folder of ImageNet's class folders
    teacher: str = ""           # FILE, URL, name of an EDM2 snapshot; "" = the official one; scratch = train it
    mid: Literal["cmt", "none"] = "cmt"                  # Eq. 7
    post: Literal["ect", "ecd", "ecd_code"] = "ect"      # Eq. 3; ecd_code: numbers of the authors' 512 script
    init: str = "teacher"       # student's first weights: teacher | random | FILE; sample, eval: show FILE

    steps: int = 50_000         # optimiser steps; x batch 128 = 6.4 Mimg (B.3)
    batch: int = 128            # images or pairs (x_t, x_0) per step, over all processes (B.3)
    batch_gpu: int = 0          # per process and forward pass, the rest by accumulation; 0 = all at once
    optimizer: Literal["adam", "sgd"] = "adam"           # sgd: of the latent VGG (B.5)
    beta2: float = 0.99         # choice: as ECT (B.3); the authors' 512 script has 0.999 in mid-training
    lr: float = 7e-4            # B.3
    decay: Literal["linear", "constant", "sqrt", "steps"] = "linear"   # of lr; sqrt: EDM2; steps: B.5
    decay_from: int = 0         # sqrt: steps before it falls (EDM2: 35,000 and 70,000)
    warmup: int = 0             # steps of linear warm-up
    clip: float = 0.0           # largest gradient norm; 0 = off, as the official code
    ema_beta: float = 0.999     # choice: the number is missing in B.3; as in their 512 script
    ema_std: float = 0.0        # > 0: power-function EMA of this relative width (EDM2), instead of ema_beta
    dropout: float = 0.5        # of the student (B.3, as ECT-XL) ...
    dropout_res: int = 16       # ... in blocks up to this resolution; 0 = all

    loss: Literal["lpips", "elatent", "huber", "l2"] = "lpips"         # mid: d of Eq. 7
    ensemble: Literal["none", "bg", "bgc", "bgcfnc"] = "none"    # elatent: random views of both (B.5)
    vgg: str = ""               # weights of lpips or elatent; "" = fetched, or <out>/vgg.pt
    nfe: int = 16               # teacher steps per trajectory (B.3)
    trajectories: int = 128     # choice: per solve, pairs shuffled over several steps; 0 = batch/nfe (paper)
    q: int = 512                # post: the step in t is n(t) t / q (B.3: 1/512)
    huber: float = 0.06         # post: c of the pseudo-Huber norm (ECT on ImageNet)
    ecd: Literal["heun", "euler"] = "heun"               # post ecd: the teacher's step from t to r
    main: str = ""              # post ecd: teacher of the step; "" = --teacher
    guide: str = ""             # weak model for autoguidance; "" = none
    w: float = 1.0              # autoguidance weight, D = guide + w (main - guide); 1 = off
    P_mean: float = -0.8        # ln sigma ~ N(P_mean, P_std^2), not cut off (ECT, EDM2)
    P_std: float = 1.6

    mid_sigma: float = 1.526    # second noise level of 2-step sampling (ECT)
    sampler: Literal["dpmpp", "heun"] = "dpmpp"          # of the teacher: nfe steps; heun: 32 steps, 63 calls
    labels: Literal["random", "balanced"] = "random"     # of samples: drawn by seed, or seed % classes
    seeds: str = "0-63"         # sample: one image per seed, FIRST-LAST
    samples: int = 50_000       # eval: images per score
    repeat: int = 1             # eval: scores with fresh seeds, reported as mean, deviation and minimum
    inception: str = ""         # eval: Inception weights; "" = fetched
    vae: str = "stabilityai/sd-vae-ft-mse"               # 512: encode and decode (EDM2), by diffusers

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "tf32"    # as the authors; mid: bf16; fp32: exact
    threads: int = 0            # CPU threads; 0 = torch's default. choice: not measured, bits depend on it
    timeout: int = 600          # seconds after which a process that does not answer ends the run
    seed: int = 0
    log_every: int = 100
    save_every: int = 2_500


PRESETS = {  # (data, stage, method): matching rows are laid over each other, top to bottom; "own" = a path
    ("imagenet512", "*", "*"): dict(loss="elatent", dropout=0.0, post="ecd", ensemble="bgcfnc"),
    ("*", "pretrain", "*"): dict(steps=327_680, batch=2048, lr=7e-3, decay="sqrt", decay_from=35_000,
                                 warmup=4_883, ema_std=0.050, dropout=0.1, dropout_res=0),  # EDM2 Table 6, XL
    ("imagenet512", "pretrain", "*"): dict(steps=458_752, lr=6.5e-3, decay_from=70_000, P_mean=-0.4,
                                           P_std=1.0, dropout=0.1),                         # XXL
    ("imagenet512", "vgg", "*"): dict(steps=500_400, batch=256, lr=0.1, optimizer="sgd", decay="steps",
                                      ema_beta=0.0),                                        # B.5: 100 epochs
    # choice: a fixed target is drawn and learned in bf16 no worse than in fp32: measured on digits
    ("*", "mid", "*"): dict(precision="bf16"),
    ("imagenet512", "mid", "*"): dict(steps=100_000, lr=2e-4, beta2=0.999),                 # B.5
    ("*", "post", "*"): dict(lr=1e-4, ema_beta=0.9999),                                     # B.3
    # choice: the nets of 64's ECD teacher are not named; XL by its cost, the guide of EDM2's own preset
    ("*", "post", "ecd"): dict(steps=100_000, decay="constant", q=256),
    ("imagenet64", "post", "ecd"): dict(guide="edm2-img64-xs-0134217-0.110", w=1.7),
    ("imagenet512", "post", "*"): dict(decay="constant", q=1024, main="edm2-img512-xxl-0939524-0.075",
                                       guide="edm2-img512-m-0268435-0.155", w=2.05),
    # choice: B.5 says lr 1e-4 and 12.8 Mimg, the authors' script 1e-6, Table 8 16 Mimg
    ("imagenet512", "post", "ecd_code"): dict(steps=125_000, lr=1e-6),
    ("digits", "*", "*"): dict(out="out/digits-imagenet", precision="fp32", dropout=0.0, threads=1,
                               log_every=50, save_every=250, samples=2_000, beta2=0.99, labels="balanced"),
    ("digits", "pretrain", "*"): dict(steps=2_000, batch=32, lr=1e-2, decay_from=500, warmup=50, ema_std=0.1,
                                      P_mean=-1.2, P_std=1.2),
    ("digits", "vgg", "*"): dict(steps=300, batch=128, lr=3e-3, ema_beta=0.0),
    ("digits", "mid", "*"): dict(steps=900, batch=32, lr=3e-3, ema_beta=0.99),
    ("digits", "post", "*"): dict(steps=600, batch=32, lr=3e-4, ema_beta=0.99, q=512, decay="linear"),
}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FILES = {"imagenet64": "data/imagenet64.zip", "imagenet512": "data/imagenet512-sd.zip"}
FREE = {  # fields that may differ when a stage goes on, or is found finished; of --teacher only the path may
    "*": "stage out source vgg inception vae seeds samples repeat mid_sigma sampler labels batch_gpu timeout "
         "log_every save_every",
    "pretrain": "teacher mid post init nfe trajectories q huber ecd main guide w loss ensemble",
    "vgg": "teacher mid post init nfe trajectories q huber ecd main guide w loss ensemble P_mean P_std dropout",
    "mid": "teacher post q huber ecd main guide w P_mean P_std",
    "post": "teacher trajectories loss ensemble nfe",
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
    if cfg.data == "imagenet" and cfg.res not in (64, 512):
        fail(2, f"--res {cfg.res} is not possible with --data imagenet; it is 64 or 512")
    return f"imagenet{cfg.res}" if cfg.data == "imagenet" else "digits" if cfg.data == "digits" else "own"


def seed_range(text):
    """"0-63" or "7" -> list of ints; empty if it is neither."""
    first, _, last = text.partition("-")
    last = last or first
    return list(range(int(first), int(last) + 1)) if first.isdigit() and last.isdigit() else []


# ---- data -------------------------------------------------------------------------------------
MEAN, STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)    # of raw latents per channel (EDM2)


class Images:
    """Pictures of an EDM2 zip or folder, read when they are asked for: uint8 pixels, or float32 latent moments.

    labels (N,) int64, 0 where dataset.json has none; classes: how many; stamp: changes when the data does.
    """

    def __init__(self, path):
        self.path, self.zip, self.pool = path, None, ThreadPoolExecutor(8)    # threads: one handle, no fork
        with fid.blame(path):
            if os.path.isdir(path):
                found = [os.path.join(d, f) for d, _, fs in os.walk(path) for f in fs]
                stamps = {os.path.relpath(f, path).replace(os.sep, "/"): os.path.getsize(f) for f in found}
            else:
                self.zip = zipfile.ZipFile(path)
                stamps = {i.filename: i.CRC for i in self.zip.infolist()}
            self.names = sorted(n for n in stamps if n.endswith((".png", ".npy")))
            if not self.names:
                raise fid.DataError(f"{path}: holds no .png and no .npy")
            listed = json.loads(self.bytes("dataset.json"))["labels"] if "dataset.json" in stamps else None
        given = dict(listed or ())
        if listed and (missing := [n for n in self.names if n not in given]):
            raise fid.DataError(f"{path}: dataset.json has no label for {missing[0]} and {len(missing) - 1} others")
        self.labels = torch.tensor([given.get(n, 0) for n in self.names])
        self.classes = int(self.labels.max()) + 1 if listed else 0
        key = repr([(n, stamps[n]) for n in self.names]) + repr(listed and self.labels.tolist())
        self.stamp, self.shape = f"{len(self.names)} images, crc32 {zlib.crc32(key.encode()):08x}", None
        self.shape = self.image(0).shape

    def bytes(self, name):
        if self.zip:
            return self.zip.read(name)
        with open(os.path.join(self.path, name), "rb") as f:
            return f.read()

    def image(self, k):
        """Image k as stored: uint8 (3 | 1, H, W), or float32 (8, h, w): mean and deviation of a latent."""
        with fid.blame(f"{self.path}: {self.names[k]}"):
            raw = io.BytesIO(self.bytes(self.names[k]))
            x = np.load(raw) if self.names[k].endswith(".npy") else np.asarray(Image.open(raw))
            if x.dtype == np.uint8:
                x = np.atleast_3d(x).transpose(2, 0, 1)
            if self.shape not in (None, x.shape) or x.ndim != 3 or x.dtype not in (np.uint8, np.float32):
                raise fid.DataError(f"{self.path}: {self.names[k]} is {x.dtype} {x.shape}, the first is {self.shape}")
        return torch.from_numpy(np.ascontiguousarray(x))

    def read(self, index):
        """index (B,) -> (B, C, H, W) as stored."""
        return torch.stack(list(self.pool.map(self.image, index.tolist())))


class Digits:
    """The bundled digits with the interface of Images, whole in memory."""

    def __init__(self):
        (self.pixels, self.labels), self.classes = fid.digits(), 10
        self.stamp = f"{len(self.pixels)} images, crc32 {zlib.crc32(self.pixels.numpy()):08x}"
        self.shape, self.pool = self.pixels[0].shape, ThreadPoolExecutor(1)

    def read(self, index):
        return self.pixels[index]


def load_data(cfg):
    """Images of --data. Missing or not of --res: exit code 3 with the remedy."""
    if cfg.data == "digits":
        return Digits()
    images = Images(FILES.get(data_name(cfg), cfg.data))
    side, expected = images.shape[-1], 64 if cfg.res == 512 else cfg.res
    if images.shape[1] != side or side != expected or (images.shape[0] == 8) != (cfg.res == 512):
        fail(3, f"--data {images.path} holds {tuple(images.shape)}; --res {cfg.res} needs "
                f"{(8, 64, 64) if cfg.res == 512 else (3, cfg.res, cfg.res)}: other --res, or --stage encode")
    return images


def to_input(raw, noise, device):
    """What Images.read gave -> the network's input on device: pixels in [-1, 1], or a latent of deviation 0.5.

    A latent is a fresh sample of its posterior each time, mean + noise * deviation, then EDM2's scale and bias.
    """
    if raw.dtype == torch.uint8:
        return to_float(raw, device)
    mean, std = raw.to(device, non_blocking=True).chunk(2, 1)
    mu, sd = (torch.tensor(v).to(device, non_blocking=True).view(1, 4, 1, 1) for v in (MEAN, STD))
    return ((mean + noise * std - mu) * (0.5 / sd)).contiguous(memory_format=torch.channels_last)


def to_float(images, device):
    """uint8 (B, C, H, W) -> [-1, 1], channels_last, on device."""
    return (images.to(device, non_blocking=True).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def vae_of(cfg, device):
    """The SD-VAE of diffusers, frozen, float32. Exit code 3 with the install line where diffusers is missing."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        fail(3, "512x512 images need the SD-VAE: pip install diffusers transformers accelerate")
    return AutoencoderKL.from_pretrained(cfg.vae).to(device).requires_grad_(False).eval()


def to_images(x, vae):
    """Network output -> images in [-1, 1]; vae, if not None, decodes latents, 16 at a time."""
    if vae is None:
        return x
    mu, sd = (torch.tensor(v, device=x.device).view(1, 4, 1, 1) for v in (MEAN, STD))
    raw = x * (sd / 0.5) + mu
    return torch.cat([vae.decode(part).sample for part in raw.split(16)]) * 2 - 1    # trap: EDM2's VAE is in [0, 1]


def crop(image, res):
    """Centre crop of ADM and EDM2: halve (BOX) while twice too large, BICUBIC to res, cut. RGB in, RGB out."""
    while min(image.size) >= 2 * res:
        image = image.resize(tuple(n // 2 for n in image.size), Image.BOX)
    scale = res / min(image.size)
    image = image.resize(tuple(round(n * scale) for n in image.size), Image.BICUBIC)
    left, top = (image.width - res) // 2, (image.height - res) // 2
    return image.crop((left, top, left + res, top + res))


def encode(cfg, rank, world, device):
    """--source (a folder per class) -> EDM2's zip: PNG at 64 pixels, moments of the SD-VAE at 512.

    In parts of 1,000 images, each renamed when it is whole, so that a killed run goes on; then one zip of them all.
    """
    target = FILES.get(data_name(cfg), cfg.data)
    if not os.path.isdir(cfg.source):
        fail(3, f"--source {cfg.source!r} is no folder; name ImageNet's training folder, one folder per class")
    classes = sorted(d for d in os.listdir(cfg.source) if os.path.isdir(os.path.join(cfg.source, d)))
    found = [(os.path.join(cfg.source, d, f), k) for k, d in enumerate(classes)
             for f in sorted(os.listdir(os.path.join(cfg.source, d)))]
    if not found:
        fail(3, f"--source {cfg.source} holds no folder of images; name ImageNet's training folder")
    vae, parts = vae_of(cfg, device) if cfg.res == 512 else None, f"{target}.parts"
    os.makedirs(parts, exist_ok=True)
    names = [f"{i // 1000:05d}/img{'' if vae is None else '-mean-std-'}{i:08d}.{'npy' if vae else 'png'}"
             for i in range(len(found))]
    for part in range(rank, -(-len(found) // 1000), world):
        path = f"{parts}/{part:05d}.zip"
        if not os.path.exists(path):
            encode_part(cfg, found[part * 1000:][:1000], names[part * 1000:], path, vae, device)
            log(cfg, f"encode: {min(len(found), (part + 1) * 1000):,}/{len(found):,} images")
    if world > 1:
        dist.barrier()
    if rank == 0:
        with zipfile.ZipFile(target + ".tmp", "w") as out:
            for part in sorted(os.listdir(parts)):
                with zipfile.ZipFile(f"{parts}/{part}") as z:
                    for name in z.namelist():
                        out.writestr(name, z.read(name))
            labels = [[name, k] for name, (_, k) in zip(names, found)]
            out.writestr("dataset.json", json.dumps({"labels": labels}))
        os.replace(target + ".tmp", target)
        log(cfg, f"encode: {target}, {len(found):,} images, {len(classes)} classes; {parts} can be deleted")


@torch.no_grad()
def encode_part(cfg, found, names, path, vae, device):
    """One part of encode: found (path, class) -> zip `path` under `names`, by way of a temporary file."""
    with zipfile.ZipFile(path + ".tmp", "w") as z, ThreadPoolExecutor(8) as pool:
        def read(item):
            with fid.blame(item[0]), Image.open(item[0]) as image:
                return np.asarray(crop(image.convert("RGB"), cfg.res))
        for i in range(0, len(found), 64):
            pixels = np.stack(list(pool.map(read, found[i:i + 64])))
            if vae is None:
                results = [Image.fromarray(p) for p in pixels]
            else:                                     # trap: EDM2 feeds [0, 1] where Stable Diffusion feeds [-1, 1]
                x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
                code = vae.encode(x).latent_dist
                results = torch.cat([code.mean, code.std], 1).cpu().numpy()
            for name, result in zip(names[i:], results):
                buffer = io.BytesIO()
                np.save(buffer, result) if vae else result.save(buffer, format="PNG", compress_level=0)
                z.writestr(name, buffer.getvalue())
    os.replace(path + ".tmp", path)


# ---- losses -----------------------------------------------------------------------------------
def loss_edm2(net, x, sigma, eps, y):
    """EDM2 Eq. 21: EDM's denoising loss under a learned log variance u(sigma); sum over pixels, mean over images."""
    s = sigma.view(-1, 1, 1, 1)
    D_x, u = net(x + s * eps, sigma, y, return_logvar=True)
    weight = inverse_c_out(sigma, net.sigma_data).view(-1, 1, 1, 1)
    return (weight / u.exp() * (D_x - x) ** 2 + u).sum() / len(x)


def inverse_c_out(sigma, sigma_data=0.5):
    """1 / c_out^2 = (sigma^2 + sd^2) / (sigma sd)^2, (B,): EDM's weight, and ECT's on ImageNet."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def autoguided(main, guide, w):
    """Autoguidance (Karras et al. 2024): D = guide + w (main - guide), as a function of (x, sigma, y)."""
    if guide is None or w == 1:
        return main
    return lambda x, sigma, y: guide(x, sigma, y).lerp(main(x, sigma, y), w)


@torch.no_grad()
def teacher_pairs(cfg, teacher, classes, sigmas, shape, g, rank, world):
    """Eq. 7: one solve of the frozen teacher gives nfe pairs (state, end) per trajectory, for any world size.

    sigmas (nfe+1,): decreasing grid; shape: of one input; g: Generator. Returns, shuffled, x_t (P, C, H, W), t (P,)
    and owner (P,), the ends x_0 (n, C, H, W) and one-hot classes y (n, classes): pair p is regressed onto
    x_0[owner[p]], given y[owner[p]].
    """
    levels = sigmas.to(g.device, torch.float32)
    n, N = solves(cfg)[0], cfg.nfe
    mine = slice(rank * n // world, (rank + 1) * n // world)
    x_T = levels[0] * randn((n, *shape), g)[mine]     # choice: pure noise, no guidance, uniform classes
    y = one_hot(torch.randint(max(classes, 1), (n,), generator=g, device=g.device), classes)
    xs = gather(solvers.dpmpp(lambda x, s: teacher(x, s, y[mine]), x_T, sigmas, order=3), world)
    order = torch.randperm(N * n, generator=g, device=g.device)
    return xs[:N].flatten(0, 1)[order], levels[:N].repeat_interleave(n)[order], xs[-1], order % n, y


def one_hot(labels, classes):
    """labels (B,) -> (B, classes) float32; (B, 0) for a net without classes."""
    return F.one_hot(labels, classes).float() if classes else torch.zeros(len(labels), 0, device=labels.device)


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


def make_distance(cfg, device):
    """d of Eq. 7: LPIPS at 64 pixels, ELatentLPIPS on latents, on digits a small VGG of their labels, or pixels."""
    path = cfg.vgg or f"{cfg.out}/vgg.pt"
    if cfg.loss in ("huber", "l2"):
        return nets.PixelDistance(0.06 if cfg.loss == "huber" else 0.0)
    if cfg.data != "digits" and cfg.loss == "lpips":
        path = cfg.vgg or nets.fetch("https://download.pytorch.org/models/vgg16-397923af.pth")
        distance = nets.LPIPS(nets.load_pretrained(path)[0])
    elif not os.path.exists(path):
        fail(3, f"{path} is not there; run --stage vgg first, or pass --vgg FILE or --loss l2")
    else:
        distance = latent_vgg(cfg, 0)
        state = nets.load_pretrained(path)[0]
        own = distance.state_dict()
        nets.load_weights(distance, {k: v for k, v in state.items() if k in own}, path)
    return distance.to(device).requires_grad_(False).eval()


def latent_vgg(cfg, classes):
    """The VGG that measures: with a head of `classes` to train it on labels (B.5), 0 = the distance alone."""
    if cfg.data == "digits":
        return nets.VGG()
    return nets.ELatentLPIPS(num_classes=classes, ensemble=cfg.ensemble)


def loss_vgg(net, x, labels, cfg, g):
    """Cross-entropy of the VGG's logits (B.5: no augmentation). Digits: under noise, so that it knows more of them."""
    if cfg.data == "digits":
        x = x + 0.2 * torch.rand((), generator=g, device=x.device) * randn(x.shape, g)
    return F.cross_entropy(net.logits(x), labels)


# ---- sample -----------------------------------------------------------------------------------
def class_prior(net, seeds, device, labels="random"):
    """x_T (B, C, H, W), one-hot classes (B, classes), a generator per seed: image i depends on seed i alone."""
    generators = [torch.Generator().manual_seed(fold("sample", s)) for s in seeds]
    shape, classes = (net.img_channels, net.img_resolution, net.img_resolution), max(net.label_dim, 1)
    x_T = 80.0 * solvers.noise(shape, generators).to(device)
    drawn = [int(torch.randint(classes, (), generator=g)) for g in generators]
    y = torch.tensor([s % classes for s in seeds] if labels == "balanced" else drawn)
    return x_T, one_hot(y.to(device), net.label_dim), generators


def make_sampler(cfg, net, kind, device, guide=None):
    """kind: "teacher" = its solver, "1", "2" = few-step. Returns f(seeds, labels) -> (B, C, H, W), not yet decoded."""
    @torch.no_grad()
    def sample(seeds, labels=cfg.labels):
        x_T, y, generators = class_prior(net, seeds, device, labels)
        D = autoguided(net, guide, cfg.w) if kind == "teacher" else net

        def f(x, sigma):
            return D(x, sigma, y)
        if kind == "teacher" and cfg.sampler == "heun":
            return solvers.heun(f, x_T, solvers.edm_sigmas(32))[-1]
        if kind == "teacher":
            return solvers.dpmpp(f, x_T, solvers.logsnr_sigmas(cfg.nfe))[-1]
        return solvers.few_step(f, x_T, [80.0, cfg.mid_sigma][:int(kind)], generators)
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


TRAINED = "pretrain", "vgg", "mid", "post"            # stages with a loop that saves when it is asked to stop
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


def snapshot(name):
    """Weights and constructor arguments of a FILE, a URL, or an EDM2 snapshot by name."""
    if name.startswith("edm2-") and not os.path.exists(name):
        name = nets.EDM2_URL % name
    return nets.load_pretrained(name)


def teacher_state(cfg):
    """(weights, constructor arguments) of --teacher, else <out>/pretrain.pt, else the official teacher."""
    if cfg.teacher not in ("", "scratch"):
        return snapshot(cfg.teacher)
    if state := finished(f"{cfg.out}/pretrain.pt"):
        return state["ema"], state["model"]
    if cfg.teacher or data_name(cfg) not in nets.PRETRAINED:
        fail(3, f"no finished teacher in {cfg.out}; run --stage pretrain first, or pass --teacher FILE")
    return snapshot(nets.PRETRAINED[data_name(cfg)])


def build(cfg, model, device, state=None, what="", train=False):
    """An EDM2 from constructor arguments (of an official file or SIZES), with weights by name if given.

    Frozen (train=False): its weights are normalised once, in the precision of the stage.
    """
    torch.manual_seed(fold(cfg.seed, cfg.stage, "init"))    # choice: a random student has a start of its own
    scratch = cfg.stage == "pretrain" and train             # u(sigma) is trained with the teacher, then dropped
    own = dict(logvar_channels=128 if scratch else 0, dropout_res=cfg.dropout_res or None,
               dropout=cfg.dropout if train else 0.0)
    net = nets.EDM2Precond(**{**model, **own})
    if state is not None:
        state = {k: v for k, v in state.items() if scratch or not k.startswith("logvar_")}
        nets.load_weights(net, state, what)
    net = net.to(device, memory_format=torch.channels_last)
    net.compute_dtype = HALF.get(cfg.precision)
    return net if train else nets.freeze(net)


def student(cfg, model, device, teacher):
    """The net to train. First weights: mid.pt's in post (unless --mid none), else the teacher's or --init FILE's."""
    state, what = teacher, "the teacher"
    if cfg.stage == "vgg":
        torch.manual_seed(fold(cfg.seed, "vgg"))
        return latent_vgg(cfg, model["label_dim"]).to(device)
    if cfg.stage == "post" and cfg.mid != "none":
        what = f"{cfg.out}/mid.pt"
        if not (ckpt := finished(what)):
            fail(3, f"{what} is not finished; run --stage mid first, or pass --mid none")
        state = ckpt["ema"]
    elif cfg.stage == "pretrain" or cfg.init == "random":
        state = None
    elif cfg.init != "teacher":
        state, what = snapshot(cfg.init)[0], cfg.init
    return build(cfg, model, device, state, what, train=True)


def model_size(cfg, images):
    """Constructor arguments of the EDM2 for --data: XL at 64 pixels, XXL for latents, the tiny one for digits."""
    size = dict(digits="edm2-8", imagenet512="edm2-xxl").get(data_name(cfg), "edm2-xl")
    channels, _, side = images.shape
    return dict(img_resolution=side, img_channels=channels // 2 if channels == 8 else channels,
                label_dim=images.classes, **nets.SIZES[size])


def power_ema(std, done, batch):
    """beta of a power-function EMA with relative width std, after `done` images (EDM2 Eq. 123-127)."""
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return (1 - batch / done) ** (roots[np.isreal(roots)].real.max() + 1)


def lr_at(cfg, step):
    """Learning rate of a step: warm-up, then linear to 0, constant, 1/sqrt (EDM2 Eq. 67) or a tenth at 30, 60, 90 %."""
    at = step / cfg.steps
    decay = dict(linear=1 - at, constant=1.0, steps=0.1 ** (10 * at // 3),
                 sqrt=max(step / max(cfg.decay_from, 1), 1) ** -0.5)[cfg.decay]
    return cfg.lr * decay * min(1.0, (step + 1) / (cfg.warmup + 1))


def memory_plan(cfg, model, frozen, world, device):
    """One line: what a process will hold. Activations are counted on a copy of the net without memory (meta)."""
    seen = {}
    with torch.device("meta"):
        twin = nets.EDM2Precond(**{**model, "logvar_channels": 0})
        twin.compute_dtype = HALF.get(cfg.precision)
        x, y = torch.zeros(1, twin.img_channels, *[twin.img_resolution] * 2), torch.zeros(1, twin.label_dim)
        keep = lambda t: seen.setdefault(t.untyped_storage()._cdata, t)              # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), nets.hoist(twin):
            twin(x, torch.ones(1), y)
            own = {t.untyped_storage()._cdata for t in [*twin.parameters(), *twin.buffers()]}
    one = sum(t.untyped_storage().nbytes() for k, t in seen.items() if k not in own) / 1e9
    size = sum(p.numel() for p in twin.parameters()) * 4 / 1e9
    held = 6 if twin.compute_dtype else 7             # weights, gradients, Adam's two, EMA; hoisted and its gradient
    n, others = cfg.batch_gpu or cfg.batch // world, sum(t.nbytes for m in frozen for t in m.buffers()) / 1e9
    total = held * size + others + one * n
    text = (f"memory a process: {total:.1f} GB = {held * size:.1f} weights, gradients, Adam, EMA, hoisted + "
            f"{others:.1f} frozen nets + {n} images at once of {one:.3f}")
    if device.type == "cuda" and total * 1e9 > (room := torch.cuda.get_device_properties(device).total_memory):
        fit = max(1, int((room / 1e9 - total + one * n) / one))
        text += f"; this device has {room / 1e9:.0f} GB: pass --batch_gpu {2 ** int(math.log2(fit))}"
    log(cfg, text)


def train(cfg, rank, world, device):
    """One stage (pretrain, vgg, mid, post) from its last checkpoint to its end. Method first, bookkeeping last."""
    path, B = f"{cfg.out}/{cfg.stage}.pt", cfg.batch
    ckpt = resume(cfg, path)
    if ckpt and ckpt["step"] >= cfg.steps:
        return log(cfg, f"{cfg.stage}: {path} is finished, nothing to do")
    images, data, weights, model = None, "none", None, None
    if cfg.stage != "mid":                                                        # CMT needs no data
        images = load_data(cfg)
        data = images.stamp
    if ckpt and ckpt["data"] != data:
        fail(2, f"--data {cfg.data} has changed: {path} saw {ckpt['data']}, now {data}; use another --out")
    if cfg.stage in ("mid", "post"):
        weights, model = teacher_state(cfg)
    model = model or model_size(cfg, images)
    frozen = []
    if cfg.stage == "mid" or cfg.stage == "post" and cfg.post != "ect":
        main, size = snapshot(cfg.main) if cfg.stage == "post" and cfg.main else (weights, model)
        frozen = [build(cfg, size, device, main, cfg.main or "the teacher")]
    if cfg.stage == "post" and cfg.post != "ect" and cfg.guide and cfg.w != 1:
        state, size = snapshot(cfg.guide)
        frozen.append(build(cfg, size, device, state, cfg.guide))
    net = student(cfg, model, device, weights).train()
    classes = model["label_dim"]
    shape = model["img_channels"], model["img_resolution"], model["img_resolution"]
    if cfg.stage != "vgg":
        memory_plan(cfg, model, frozen, world, device)
    ema = deepcopy(net).requires_grad_(False).eval()
    (flat, grad), flat_ema = flatten(net), flatten(ema)[0]
    flat.grad = grad[:-1]
    opt = torch.optim.Adam([flat], lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    if cfg.optimizer == "sgd":
        opt = torch.optim.SGD([flat], lr=cfg.lr, momentum=0.9, weight_decay=1e-4, fused=True)      # B.5
    sigmas, (_, pairs) = solvers.logsnr_sigmas(cfg.nfe), solves(cfg)
    if cfg.stage == "mid":
        distance = make_distance(cfg, device)
    mine = slice(rank * B // world, (rank + 1) * B // world)                      # this process's share of a batch
    micro = torch.arange(B // world, device=device).split(cfg.batch_gpu or B)

    def read(step):
        g = torch.Generator().manual_seed(fold(cfg.seed, cfg.stage, step, "data"))
        index = torch.randint(len(images.labels), (B,), generator=g)[mine]
        return images.read(index), images.labels[index]
    start, since, scale, health = restore(cfg, ckpt, path, net, ema, opt, device)
    ckpt = weights = main = state = None              # as large as the net, and needed no more
    reader = ThreadPoolExecutor(1)                                                # one step ahead
    ahead = reader.submit(read, start) if images is not None else None
    log(cfg, f"{cfg.stage}: {len(flat):,} parameters, steps {start} to {cfg.steps}, {world} process(es) on "
             f"{device}, {torch.get_num_threads()} CPU thread(s) each")

    for step in range(start, cfg.steps):
        opt.param_groups[0]["lr"] = lr = lr_at(cfg, step)
        g = torch.Generator(device).manual_seed(fold(cfg.seed, cfg.stage, step))
        if cfg.stage == "mid":
            solve, at = divmod(step * B, pairs)
            if at == 0 or step == start:                                         # a solve feeds several steps
                g.manual_seed(fold(cfg.seed, "solve", solve))
                x_t, t, x_0, owner, y = teacher_pairs(cfg, frozen[0], classes, sigmas, shape, g, rank, world)
                target = distance.features(x_0) if cfg.ensemble == "none" else None       # once per trajectory
        else:
            (raw, labels), ahead = ahead.result(), reader.submit(read, step + 1)
            noise, eps = randn((B, *shape), g)[mine], randn((B, *shape), g)[mine]
            x, labels = to_input(raw, noise, device), labels.to(device, non_blocking=True)
            sigma, y = (cfg.P_mean + cfg.P_std * randn(B, g))[mine].exp(), one_hot(labels, classes)

        nets.force_weight_norm(net)                               # EDM2 Eq. 66, once per step
        with nets.hoist(net):                                     # weights normalised once for all micro-batches
            for k, i in enumerate(micro):
                mask_seed = fold(cfg.seed, cfg.stage, step, "dropout", rank * len(micro) + k)
                torch.manual_seed(mask_seed)          # trap: else every process has the same dropout mask
                g.manual_seed(mask_seed)              # trap: a generator that went on would depend on the split
                if cfg.stage == "pretrain":
                    loss = loss_edm2(net, x[i], sigma[i], eps[i], y[i])
                elif cfg.stage == "vgg":
                    loss = loss_vgg(net, x[i], labels[i], cfg, g)
                elif cfg.stage == "mid":
                    p = at + mine.start + i
                    def f(x, s, own=y[owner[p]]):
                        return net(x, s, own)
                    if target is None:                # ensembling: one random view of both, drawn for each pair
                        loss = distance(f(x_t[p], t[p]), x_0[owner[p]], g).mean()
                    else:
                        loss = loss_cmt(f, x_t[p], t[p], [m[owner[p]] for m in target], distance)      # Eq. 7
                else:
                    s, r = sigma[i], ect_step(sigma[i], cfg.q)
                    x_t, x_r = (x[i] + level.view(-1, 1, 1, 1) * eps[i] for level in (s, r))           # same noise
                    if frozen:
                        with torch.no_grad():
                            D = autoguided(frozen[0], frozen[1] if len(frozen) > 1 else None, cfg.w)
                            x_r = solvers.ode_step(lambda x, s: D(x, s, y[i]), x_t, s, r,
                                                   2 if cfg.ecd == "heun" else 1)
                    loss = loss_ect(lambda x, s: net(x, s, y[i]), x[i], x_t, x_r, s, r, mask_seed, cfg.huber,
                                    inverse_c_out(s, net.sigma_data))                                  # Eq. 3
                (loss * (len(i) / B) * scale).backward()
                grad[-1] += loss.detach() * (len(i) / B) * scale
        if world > 1:
            # choice: one all-reduce of one vector, no DDP wrapper: any number of processes, one result
            dist.all_reduce(grad)                 # trap: process 0's own loss is not the loss: it rides along
        update(opt, flat, grad, health, scale, cfg)
        flat_ema.lerp_(flat, 1 - (power_ema(cfg.ema_std, (step + 1) * B, B) if cfg.ema_std else cfg.ema_beta))

        # bookkeeping from here on
        done, stop = step + 1, any_stop(world)
        to_save = stop or done % cfg.save_every == 0 or done == cfg.steps
        if to_save or done % cfg.log_every == 0:
            report(cfg, done, lr, health, since)
        if to_save and rank == 0:
            save(path, step=done, net=net.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(),
                 model=model, cfg=asdict(cfg), data=data,
                 seconds=since["seconds"], skipped=int(health[2]), scale=scale.item())
            if cfg.stage != "vgg" and shape[0] != 4:
                grid = make_sampler(cfg, ema, "teacher" if cfg.stage == "pretrain" else "1", device)(range(64))
                save_grid(grid, f"{cfg.out}/samples_{cfg.stage}_{done:07d}.png")
            since["clock"] = time.time()
        if stop:
            fail(75, f"stopped by a signal; step {done} is saved, run the same command again to go on")
    if world > 1:
        dist.barrier()


def solves(cfg):
    """Trajectories that a call of teacher_pairs solves, and the pairs they give."""
    n = cfg.trajectories or cfg.batch // cfg.nfe
    return n, n * cfg.nfe


def check_files(configs):
    """Everything that the stages to come need and that is not there, a line each with its remedy; exit code 3."""
    missing = {}
    for cfg in configs:
        name, out = data_name(cfg), cfg.out
        path = FILES.get(name, cfg.data)
        done = os.path.exists(f"{out}/{cfg.stage}.pt") and finished(f"{out}/{cfg.stage}.pt")
        official = cfg.stage == "pretrain" and cfg.teacher != "scratch" and (cfg.teacher or name in nets.PRETRAINED)
        needs_data = cfg.stage in ("pretrain", "post") or cfg.stage == "vgg" and wants_vgg(cfg) \
            or cfg.stage == "eval" and name not in fid.REFERENCES
        if needs_data and not done and not official and cfg.data != "digits" and not os.path.exists(path):
            missing[path] = (f"{path} is not there; pass --data PATH, or make it from ImageNet: python "
                             f"train_cmt_imagenet.py --res {cfg.res} --stage encode --source FOLDER")
        for file in {cfg.vgg, cfg.teacher, cfg.main, cfg.guide} - {"", "scratch"}:
            if "://" not in file and not file.startswith("edm2-") and not os.path.exists(file):
                missing[file] = f"{file}: no such file"
    for message in list(missing.values())[:-1]:
        if os.environ.get("RANK", "0") == "0":
            print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    if missing:
        fail(3, list(missing.values())[-1])


def wants_vgg(cfg):
    """Whether mid-training needs a VGG that has to be trained on the labels of the data first."""
    own = cfg.loss == "elatent" or cfg.data == "digits" and cfg.loss == "lpips"
    return own and cfg.mid != "none" and not cfg.vgg


def check_batch(cfg, world):
    """Everything that must divide, before anything is trained; exit code 2."""
    share = cfg.batch // world
    if cfg.batch % world:
        fail(2, f"--batch {cfg.batch} must be a multiple of the {world} processes")
    if cfg.batch_gpu and share % cfg.batch_gpu:
        fail(2, f"--batch_gpu {cfg.batch_gpu} must divide the {share} images of --batch in a process")
    if cfg.ensemble != "none" and cfg.loss != "elatent":
        fail(2, f"--ensemble {cfg.ensemble} belongs to --loss elatent, not {cfg.loss}")
    if (cfg.res == 512) != (cfg.loss == "elatent") and cfg.loss in ("lpips", "elatent") and cfg.stage == "mid":
        fail(2, f"--loss {cfg.loss} does not measure --res {cfg.res}; lpips is for 64, elatent for 512")
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
        state, model = snapshot(cfg.init)
        return [("init", build(cfg, model, device, state, cfg.init), few, {})]
    state, model = teacher_state(cfg)
    net = build(cfg, model, device, state, "the teacher")
    own = cfg.teacher in ("", "scratch") and load(f"{cfg.out}/pretrain.pt")           # else trained elsewhere
    found = [("teacher", net, {"teacher": 32 if cfg.sampler == "heun" else cfg.nfe}, own or {})]
    for stage in ("mid", "post"):
        if ckpt := finished(f"{cfg.out}/{stage}.pt"):
            found.append((stage, build(cfg, ckpt["model"], device, ckpt["ema"], stage), few, ckpt))
    return found


def weak_model(cfg, device):
    """The guide of the teacher's samples, or None without --guide."""
    if not cfg.guide or cfg.w == 1:
        return None
    state, model = snapshot(cfg.guide)
    return build(cfg, model, device, state, cfg.guide)


def sample(cfg, rank, world, device):
    """One PNG per seed in <out>/samples/<net>_<steps>, and a sheet of them all: samples_<net>_<steps>.png."""
    seeds, guide = seed_range(cfg.seeds), weak_model(cfg, device)
    vae = vae_of(cfg, device) if cfg.res == 512 and cfg.data != "digits" else None
    for name, net, kinds, _ in candidates(cfg, device):
        for kind, n in kinds.items():
            folder = f"{cfg.out}/samples/{name}_{n}"
            os.makedirs(folder, exist_ok=True)
            sampler, images = make_sampler(cfg, net, kind, device, guide), []
            for i in range(0, len(seeds), 64):
                images.append(to_images(sampler(seeds[i:i + 64]), vae).cpu())
                for seed, image in zip(seeds[i:i + 64], fid.to_uint8(images[-1]).permute(0, 2, 3, 1).numpy()):
                    if seed % world == rank:
                        Image.fromarray(image.squeeze()).save(f"{folder}/{seed:06d}.png")
            if rank == 0:
                save_grid(torch.cat(images)[:1024], f"{cfg.out}/samples_{name}_{n}.png")
            log(cfg, f"sample: {len(seeds)} images in {folder}")


def evaluate(cfg, rank, world, device):
    """Score every net there is: the teacher with its solver (and its guide), the students in 1 and 2 steps."""
    metric, name = "FD-digits" if cfg.data == "digits" else "FID", data_name(cfg)
    vae = vae_of(cfg, device) if cfg.res == 512 and cfg.data != "digits" else None
    features = (fid.DigitsNet() if cfg.data == "digits" else fid.load_inception(cfg.inception)).to(device)
    if name in fid.REFERENCES:
        reference = fid.load_reference(name)
    else:
        images = load_data(cfg)
        raws = map(images.read, torch.arange(rank, len(images.labels), world).split(250))
        if vae is not None:                           # latents are decoded at their mean
            raws = (fid.to_uint8(to_images(to_input(raw, 0.0, device), vae)) for raw in raws)
        reference = fid.measure(features, raws, device, file=f"of --data {cfg.data}")
    found, guide, table = candidates(cfg, device), weak_model(cfg, device), []
    for name, net, kinds, ckpt in found:
        row = dict.fromkeys(("1", "2", "teacher"), "-")
        for kind, n in kinds.items():
            latent = make_sampler(cfg, net, kind, device, guide)
            sampler = lambda seeds: to_images(latent(seeds), vae)                    # noqa: E731
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
        note = (f"second noise level {cfg.mid_sigma}, {cfg.labels} labels, teacher by {cfg.sampler}, guide "
                f"{cfg.guide or 'none'}, w {cfg.w}")
        results(cfg, metric, table, fid.protocol(ours, reference), note, found[0][2].get("teacher", cfg.nfe))
        sheets(cfg, found, vae, device)


@torch.no_grad()
def sheets(cfg, found, vae, device):
    """Pictures: a sheet per net with a column per class, one noise through the stages, trajectories and answers."""
    classes, rows = min(10, found[0][1].label_dim or 10), []
    for name, net, kinds, _ in found:
        for kind, n in kinds.items():
            x = to_images(make_sampler(cfg, net, kind, device)(range(10 * classes), "balanced"), vae).cpu()
            save_grid(x, f"{cfg.out}/samples_{name}_{n}step.png", columns=classes)
            rows.append(x[:2 * classes])
    save_grid(torch.cat(rows), f"{cfg.out}/samples_stages.png", columns=2 * classes)
    (_, teacher, *_), *students = found
    x_T, y, _ = class_prior(teacher, range(3), device, "balanced")
    sigmas, rows = solvers.logsnr_sigmas(cfg.nfe), []
    xs = solvers.dpmpp(lambda x, s: teacher(x, s, y), x_T, sigmas)                   # (nfe+1, 3, C, H, W)
    shown = xs / sigmas.clamp(min=1).to(xs).view(-1, 1, 1, 1, 1)                     # states at unit scale
    for j in range(3):
        rows.append(shown[:, j])
        rows += [net(xs[:, j], sigmas.to(xs), y[j].expand(len(xs), -1)) for _, net, *_ in students]   # D_x of each
    save_grid(to_images(torch.cat(rows), vae), f"{cfg.out}/samples_trajectory.png", columns=cfg.nfe + 1)


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
        encode(cfg, rank, world, device)
    elif cfg.stage == "sample":
        sample(cfg, rank, world, device)
    elif cfg.stage == "eval":
        evaluate(cfg, rank, world, device)
    elif cfg.stage == "pretrain" and cfg.teacher != "scratch" and (
            cfg.teacher or data_name(cfg) in nets.PRETRAINED):
        teacher_state(cfg)                            # fetched and checked, not trained
    elif cfg.stage == "vgg" and not wants_vgg(cfg) or cfg.stage == "mid" and cfg.mid == "none":
        return
    else:
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
    check_files(configs)
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
