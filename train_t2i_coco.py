"""CMT on MS-COCO, text to image: a SiT with REPA teaches an MM-DiT Mean Flow (Eq. 8, App. B.6).

  python train_t2i_coco.py --data digits                           # laptop: the whole road, no download
  python train_t2i_coco.py --stage encode --source coco            # train2014, val2014, annotations -> shards
  torchrun --nproc_per_node=8 train_t2i_coco.py                    # the paper: SiT + REPA, CMT, Mean Flow
  torchrun --nproc_per_node=8 train_t2i_coco.py --mid none --post vanilla --init random --out out/scratch
  torchrun --nproc_per_node=8 train_t2i_coco.py --mid none --post vanilla --teacher SIT.pt --out out/sit
  python train_t2i_coco.py --data digits --stage sample --prompts "the digit seven|the digit two"

pretrain: SiT + REPA, the teacher. mid: from its weights, regress onto the mean velocities between all states
of its guided trajectories (Eq. 8; reads captions, no image). post: Mean Flow + REPA. Paper: 1- and 2-step FID
15.12, 5.01 in half the time (teacher, mid, post: 32 hours, Mean Flow from scratch: 60).
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
from PIL import Image, ImageDraw
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import fid
import nets
import solvers


# ---- knobs ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:                   # field default < matching rows of PRESETS < command line; --flag is the field
    data: str = "coco"          # coco | digits | folder: shards of --stage encode, or U-ViT's features
    stage: Literal["all", "encode", "pretrain", "mid", "post", "sample", "eval"] = "all"   # all: each not finished
    out: str = ""               # folder of the run; "" = out/<data>, out/digits-t2i
    source: str = ""            # encode: folder with COCO's train2014, val2014 and annotations
    cache_text: bool = False    # encode: CLIP's features of every caption (49 GB) beside their token ids
    teacher: str = ""           # FILE, URL of a SiT; "" = <out>/pretrain.pt
    pretrain: Literal["repa", "plain"] = "repa"          # the teacher: SiT with REPA (B.6), or without
    mid: Literal["cmt", "none"] = "cmt"                  # Eq. 8
    post: Literal["mf", "vanilla", "xl"] = "mf"          # after mid | MF's own length | xl: other kappa
    init: str = "sit"           # student's first weights: the teacher's (B.6) | random | FILE; sample, eval: FILE
    size: str = "mmdit/2"       # of teacher and student: row of nets.SIZES, or PATCHxDEPTH (width 32 DEPTH)

    steps: int = 50_000         # optimiser steps (B.6: the teacher)
    batch: int = 256            # images or pairs per step, over all processes (MF, REPA)
    batch_gpu: int = 0          # per process and forward pass, the rest by accumulation; 0 = all at once
    lr: float = 1e-4            # B.6; MF, REPA
    decay: Literal["linear", "constant"] = "constant"    # of lr, to zero (B.6: constant)
    beta2: float = 0.95         # of Adam (MF)
    warmup: int = 0             # steps of linear warm-up; MF, REPA: none
    clip: float = 0.0           # largest gradient norm; 0 = off, as MF
    ema_beta: float = 0.9999    # MF, REPA
    dropout: float = 0.1        # share of samples (mid: trajectories) with the null caption (U-ViT)

    omega: float = 1.0          # v~ = omega v + kappa u(text) + (1 - omega - kappa) u(null), u at r = t;
    kappa: float = 0.5          # choice: scale omega / (1 - kappa) = 2 (B.6), these two as MF-B/2
    guide_from: float = 0.0     # choice: guidance at all times t from here ...
    guide_to: float = 1.0       # ... to here, as REPA's sampler; the numbers of B.6 are lost

    repa: float = 0.5           # weight of REPA's alignment with DINOv2, in pretrain and post; 0 = off
    repa_depth: int = 8         # after this block of the image stream (REPA)
    projector: int = 2048       # width of REPA's projector

    ratio: float = 0.25         # share of samples with r < t (MF)
    P_mean: float = -0.4        # logit t, logit r ~ N(P_mean, P_std^2), the larger is t (MF)
    P_std: float = 1.0
    power: float = 1.0          # p of the adaptive weight 1 / (|error|^2 + c)^p (MF)
    weight_c: float = 1e-3      # c (MF's text; its released code 1e-2)

    nodes: int = 8              # mid: states of a trajectory, noise and end included: 28 pairs (B.6); 9: 36
    trajectories: int = 32      # choice: per solve, for eight steps of 4 x 28 pairs (B.6), shuffled
    diagonal: int = 0           # mid: times each state is paired with itself, r = t; 0 = Eq. 8 alone
    solver: Literal["heun", "euler"] = "heun"            # of the teacher (B.6)

    nfe: int = 50               # steps of the teacher's samples (B.6); the students have 1 and 2
    prompts: str = ""           # sample: captions between bars, or FILE, one a line; "" = validation set's
    seeds: str = "0-7"          # sample: one image per seed and caption, FIRST-LAST
    samples: int = 30_000       # eval: images per score (U-ViT)
    repeat: int = 1             # eval: scores with fresh seeds, reported as mean, deviation and minimum
    inception: str = ""         # encode, eval: Inception weights; "" = fetched
    reference: str = ""         # eval: statistics; "" = of the validation images, by --stage encode
    vae: str = "stabilityai/sd-vae-ft-mse"               # choice: MF's; REPA's script decodes with ft-ema
    text: str = "openai/clip-vit-large-patch14"          # U-ViT
    vision: str = "facebook/dinov2-base"                 # REPA

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "tf32"    # of the network; clocks never in 16 bits; mid: bf16
    product: Literal["fp32", "same"] = "fp32"            # precision of du/dt; same = that of --precision
    compile: bool = False       # the network, and the function that holds the Jacobian product
    threads: int = 0            # CPU threads; 0 = torch's default. choice: not measured, bits depend on it
    timeout: int = 600          # seconds after which a process that does not answer ends the run
    seed: int = 0
    log_every: int = 100
    save_every: int = 5_000


PRESETS = {  # (data, stage, method): matching rows are laid over each other, top to bottom; "own" = a path
    ("*", "pretrain", "*"): dict(beta2=0.999, clip=1.0),                                   # REPA
    ("*", "pretrain", "plain"): dict(repa=0.0),
    # choice: steps of mid and post: Table 5's hours at the teacher's FLOP/s; EMA of mid-training
    # choice: a fixed target is drawn and learned in bf16 no worse than in fp32: measured on digits
    ("*", "mid", "*"): dict(steps=4_400, batch=112, ema_beta=0.999, precision="bf16"),
    ("*", "post", "*"): dict(steps=9_500),
    ("*", "post", "vanilla"): dict(steps=63_000),                                          # from SiT: 40,000
    ("*", "post", "xl"): dict(omega=0.2, kappa=0.9),
    ("digits", "*", "*"): dict(out="out/digits-t2i", precision="fp32", size="2x3", repa_depth=1, projector=128,
                               threads=1, save_every=500, samples=2_000, nfe=8, batch=32, decay="linear", warmup=20,
                               ema_beta=0.99, trajectories=64),
    ("digits", "pretrain", "*"): dict(steps=1_500, lr=1e-3),
    ("digits", "mid", "*"): dict(steps=800, lr=1e-3),
    ("digits", "post", "*"): dict(steps=700, lr=5e-4),
}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FILES = {"coco": "data/coco256-sd"}
FREE = {  # fields that may differ when a stage goes on, or is found finished; of --teacher only the path may
    "*": "stage out source cache_text vae inception reference prompts seeds samples repeat nfe compile "
         "batch_gpu timeout log_every save_every",
    "pretrain": "teacher mid post init omega kappa guide_from guide_to nodes trajectories diagonal solver",
    "mid": "teacher pretrain post ratio P_mean P_std power weight_c",
    "post": "teacher pretrain nodes trajectories diagonal solver",
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
SHARD = 4_096                                         # images a shard: moments 67 MB, tokens 1.6 GB, text 4.8
KIND = "coco: moments = mean, deviation; DINOv2 tokens; captions"
SAYINGS = "the digit {}", "a {}", "the number {}", "{}", "a handwritten {}"          # five captions, as COCO has
DIGITS = "zero one two three four five six seven eight nine".split()


class Coco:
    """Memory-mapped shards of --stage encode, or U-ViT's extracted features (a small file for each array).

    Of image k: moments (8, h, w), mean and deviation of its SD-VAE latent; DINOv2 tokens (N, D), or None;
    some five captions, as CLIP's token ids (77,) or its features (77, 768). stamp changes with the data.
    """

    def __init__(self, path):
        self.path, self.pool, self.maps = path, ThreadPoolExecutor(8), {}
        with fid.blame(path):
            key = self.open_shards() if os.path.exists(f"{path}/index.json") else self.open_features()
            one = self.moments(0).numpy()
        self.shape, self.count = (4, *one.shape[1:]), len(self.first) - 1
        self.stamp = f"{self.count} images, crc32 {zlib.crc32(key + one.tobytes()):08x}"

    def open_shards(self):
        with open(f"{self.path}/index.json") as f:
            index = json.load(f)
        if index["kind"] != KIND or index["scale"] != SCALE:
            raise fid.DataError(f"{self.path}: index.json says {index}; run --stage encode again")
        self.maps = {name: [np.load(f"{self.path}/{name}_{k:05d}.npy", mmap_mode="r")
                            for k in range(index["shards"])] for name in index["arrays"]}
        self.first, self.ids = np.load(f"{self.path}/first.npy"), np.load(f"{self.path}/ids.npy")
        self.null = torch.from_numpy(np.load(f"{self.path}/null.npy"))
        if sum(map(len, self.maps["moments"])) != len(self.first) - 1 or len(self.ids) != self.first[-1]:
            raise fid.DataError(f"{self.path}: shards and captions do not fit; run --stage encode again")
        with open(f"{self.path}/val.json") as f:
            self.val = json.load(f)
        return json.dumps(index).encode() + self.ids.tobytes()

    def open_features(self):
        self.null = torch.from_numpy(np.load(f"{self.path}/empty_context.npy"))
        train, val = (np.bincount([int(n.split("_")[0]) for n in os.listdir(f"{self.path}/{part}")
                                   if re.fullmatch(r"\d+_\d+\.npy", n)]) for part in ("train", "val"))
        self.first, self.val = np.concatenate([[0], train.cumsum()]), val.tolist()
        return train.tobytes()

    def array(self, name):
        with fid.blame(f"{self.path}/{name}.npy"):
            return torch.from_numpy(np.load(f"{self.path}/{name}.npy")).float()

    def at(self, name, k):
        size = len(self.maps[name][0])
        return torch.from_numpy(np.array(self.maps[name][k // size][k % size]))

    def moments(self, k):
        """(8, h, w) float32: mean and deviation of image k's latent."""
        if self.maps:
            return self.at("moments", k).float()
        mean, log_variance = self.array(f"train/{k}").chunk(2)                       # U-ViT
        return torch.cat([mean, (0.5 * log_variance).exp()])

    def tokens(self, k):
        return self.at("tokens", k) if self.maps else None

    def words(self, k, pick):
        """The caption of image k that pick in [0, 1) falls on: ids (77,), or features (77, 768) fp16."""
        j = int(pick * (self.first[k + 1] - self.first[k]))
        if not self.maps:
            return self.array(f"train/{k}_{j}")
        if "text" not in self.maps:
            return torch.from_numpy(self.ids[self.first[k] + j].astype(np.int64))
        shard = k // len(self.maps["moments"][0])
        start = self.first[shard * len(self.maps["moments"][0])]
        return torch.from_numpy(np.array(self.maps["text"][shard][self.first[k] + j - start]))

    def texts(self, index, pick):
        """index, pick (B,) -> words (B, ...)."""
        return torch.stack(list(self.pool.map(self.words, index.tolist(), pick.tolist())))

    def read(self, index, pick):
        """index, pick (B,) -> moments (B, 8, h, w), tokens (B, N, D) or None, words (B, ...)."""
        moments, tokens = (list(self.pool.map(f, index.tolist())) for f in (self.moments, self.tokens))
        return torch.stack(moments), torch.stack(tokens) if self.maps else None, self.texts(index, pick)

    def validation(self, seeds):
        """Captions of the validation set as text, one by each seed; U-ViT's features hold words alone."""
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
        self.stamp = f"{len(self.pixels)} images, crc32 {zlib.crc32(self.pixels.numpy()):08x}"
        self.shape, self.count = tuple(self.pixels.shape[1:]), len(self.pixels)
        self.null = Words().ids([""])[0]

    def texts(self, index, pick):
        return self.ids[self.labels[index] * len(SAYINGS) + (pick * len(SAYINGS)).long()]

    def read(self, index, pick):
        return self.pixels[index], self.tokens[index], self.texts(index, pick)

    def validation(self, seeds):
        return [SAYINGS[s // 10 % len(SAYINGS)].format(DIGITS[s % 10]) for s in seeds], None


def load_data(cfg):
    """Coco of --data, or the digits. Missing: exit code 3 with the remedy."""
    path, patch = FILES.get(cfg.data, cfg.data), shape_of_size(cfg)["patch_size"]
    if cfg.data != "digits" and not os.path.isdir(path):
        fail(3, f"{path}: no such folder; make it by --stage encode --source COCO, or pass --data FOLDER")
    images = CaptionedDigits(max(1, 8 // patch)) if cfg.data == "digits" else Coco(path)
    if images.shape[-1] % patch:
        fail(2, f"--size {cfg.size}: patches of {patch} do not fill images of {images.shape[-1]}")
    return images


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


class Words:
    """The text encoder of the digits: a fixed random vector per word, any word, plus one per place."""
    LENGTH, WIDTH = 4, 32

    def __init__(self, device="cpu"):
        seeded = {n: torch.Generator().manual_seed(fold("words", n)) for n in (4096, self.LENGTH)}
        self.table, self.place = (torch.randn((n, self.WIDTH), generator=g).to(device)
                                  for n, g in seeded.items())

    def ids(self, prompts):
        """Captions -> (B, L) int64; 0 = no word."""
        rows = [[1 + zlib.crc32(word.encode()) % 4095 for word in p.lower().split()[:self.LENGTH]]
                for p in prompts]
        return torch.tensor([row + [0] * (self.LENGTH - len(row)) for row in rows])

    def __call__(self, words):
        """ids (B, L) -> features (B, L, D)."""
        return self.table[words.to(self.table.device)] + self.place


class Clip:
    """CLIP's text tower, frozen, float32: last hidden states of 77 tokens (U-ViT). Loaded when asked."""

    def __init__(self, name, device):
        self.name, self.device, self.model = name, device, None

    def load(self):
        if self.model is not None:
            return
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError:
            fail(3, "captions need CLIP: pip install diffusers transformers accelerate")
        self.tokenizer = CLIPTokenizer.from_pretrained(self.name)
        self.model = CLIPTextModel.from_pretrained(self.name).to(self.device).requires_grad_(False).eval()

    def ids(self, prompts):
        """Captions -> token ids (B, 77), cut or filled."""
        self.load()
        return self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=77,
                              return_tensors="pt").input_ids

    @torch.no_grad()
    def __call__(self, words):
        """ids (B, 77) -> features (B, 77, 768); cached features pass."""
        words = words.to(self.device, non_blocking=True)
        if words.is_floating_point():
            return words.float()
        self.load()
        return self.model(input_ids=words.long()).last_hidden_state.float()


def text_encoder(cfg, device):
    """Captions -> ids -> features: CLIP, or the digits' fixed vectors."""
    return Words(device) if cfg.data == "digits" else Clip(cfg.text, device)


def dino(cfg, device):
    """Returns f(uint8 (B, 3, 256, 256)) -> (B, 256, 768): DINOv2's normed patch tokens (REPA)."""
    try:
        from transformers import Dinov2Model
    except ImportError:
        fail(3, "REPA needs DINOv2: pip install diffusers transformers accelerate")
    # choice: transformers' resampling of the table of positions to 16x16; REPA calls timm's
    model = Dinov2Model.from_pretrained(cfg.vision).to(device).requires_grad_(False).eval()
    mean, std = (torch.tensor(c, device=device).view(3, 1, 1)
                 for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    @torch.no_grad()
    def tokens(images):
        x = (images.to(device).float() / 255 - mean) / std
        return model(F.interpolate(x, 224, mode="bicubic")).last_hidden_state[:, 1:]
    return tokens


def random_tokens(images, grid):
    """DINOv2 of the digits: two fixed random convolutions, (B, 1, 8, 8) uint8 -> (B, grid * grid, 32)."""
    g, x = torch.Generator().manual_seed(fold("tokens")), images.float() / 127.5 - 1
    for c in (1, 32):
        x = F.conv2d(x, torch.randn((32, c, 3, 3), generator=g) / (9 * c) ** 0.5, padding=1).relu()
    x = F.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)
    return x - x.mean((0, 1))


def square(image, res):
    """U-ViT's crop: the middle square, then LANCZOS to res. RGB in, RGB out."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((res, res), Image.LANCZOS)


def read_coco(source, part):
    """[(image file, [captions])] of train2014 or val2014, by image id (U-ViT)."""
    name = f"{source}/annotations/captions_{part}.json"
    with fid.blame(name):
        with open(name) as f:
            given = json.load(f)
        captions = {}
        for a in given["annotations"]:
            captions.setdefault(a["image_id"], []).append(a["caption"])
        images = sorted((i["id"], i["file_name"]) for i in given["images"])
        return [(f"{source}/{part}/{file}", captions[k]) for k, file in images]


def pictures(names, pool):
    """Image files -> uint8 (B, 3, 256, 256)."""
    def read(name):
        with fid.blame(name), Image.open(name) as image:
            return np.asarray(square(image.convert("RGB"), 256))
    return torch.from_numpy(np.stack(list(pool.map(read, names)))).permute(0, 3, 1, 2).contiguous()


def encode_coco(cfg, rank, world, device):
    """--source -> shards, fp16, of moments, DINOv2 tokens and, by --cache_text, CLIP features; captions; FID's side.

    A shard is there when all its arrays are, so a killed run goes on; index.json is written last of all.
    """
    target = FILES.get(cfg.data, cfg.data)
    train, val = (read_coco(cfg.source, part) for part in ("train2014", "val2014"))
    vae, encoder, vision = sd_vae(cfg, device), Clip(cfg.text, device), dino(cfg, device)
    arrays, shards = ["moments", "tokens", "text"][:2 + cfg.cache_text], -(-len(train) // SHARD)
    index = dict(kind=KIND, scale=SCALE, vae=cfg.vae, vision=cfg.vision, text=cfg.text, crop="U-ViT 256",
                 images=len(train), captions=sum(len(c) for _, c in train), shards=shards, arrays=arrays)
    os.makedirs(target, exist_ok=True)
    same_parts(index, target, rank)
    for k in range(rank, shards, world):
        if not all(os.path.exists(f"{target}/{name}_{k:05d}.npy") for name in arrays):
            part, path = train[k * SHARD:(k + 1) * SHARD], f"{target}/{{}}_{k:05d}.npy"
            encode_captioned(cfg, part, path, vae, vision, encoder)
            log(cfg, f"encode: {min(len(train), (k + 1) * SHARD):,}/{len(train):,} images")
    if not os.path.exists(f"{target}/val.npz"):
        with ThreadPoolExecutor(8) as pool:
            names = [name for name, _ in val][rank::world]
            batches = (pictures(names[i:i + 64], pool) for i in range(0, len(names), 64))
            reference = fid.measure(fid.load_inception(cfg.inception).to(device), batches, device)
        if rank == 0:
            fid.save_statistics(f"{target}/val.npz", reference)
    if world > 1:
        dist.barrier()
    if rank == 0:
        texts, null = [c for _, captions in train for c in captions], encoder.ids([""])
        ids = np.concatenate([encoder.ids(texts[i:i + 1024]).numpy() for i in range(0, len(texts), 1024)])
        np.save(f"{target}/ids.npy", ids.astype(np.uint16))                          # CLIP has 49,408 tokens
        np.save(f"{target}/first.npy", np.cumsum([0] + [len(captions) for _, captions in train]))
        np.save(f"{target}/null.npy", (encoder(null).half().cpu() if cfg.cache_text else null)[0].numpy())
        write_json(f"{target}/val.json", [captions for _, captions in val])
        write_json(f"{target}/index.json", index)
        log(cfg, f"encode: {target}, {len(train):,} images, {len(texts):,} captions, {len(val):,} for FID")


def write_json(path, content):
    """Write a JSON file by way of a temporary one."""
    with open(path + ".tmp", "w") as f:
        json.dump(content, f)
    os.replace(path + ".tmp", path)


def same_parts(index, target, rank):
    """Exit code 2 if target holds shards of other encoders or another source: they would mix."""
    begun = f"{target}/begun.json"
    if os.path.exists(begun):
        with fid.blame(begun), open(begun) as f:
            old = json.load(f)
        if differs := [k for k in index if k != "arrays" and old.get(k) != index[k]]:
            fail(2, f"{target} was begun with {differs[0]} {old.get(differs[0])}, now {index[differs[0]]}; "
                    "name another --data FOLDER")
    elif rank == 0:
        write_json(begun, index)


@torch.no_grad()
def encode_captioned(cfg, part, path, vae, vision, encoder):
    """[(image file, captions)] -> one shard, by temporary files; path has a hole for the array's name."""
    arrays, rows = {}, {}

    def put(name, total, values):
        if name not in arrays:
            shape = (total, *values.shape[1:])
            arrays[name] = np.lib.format.open_memmap(path.format(name) + ".tmp", "w+", np.float16, shape)
        start = rows.get(name, 0)
        rows[name] = start + len(values)
        arrays[name][start:rows[name]] = values.half().cpu().numpy()
    with ThreadPoolExecutor(8) as pool:
        for i in range(0, len(part), 32):
            pixels = pictures([name for name, _ in part[i:i + 32]], pool)
            code = vae.encode(to_float(pixels, encoder.device)).latent_dist
            put("tokens", len(part), vision(pixels))
            put("moments", len(part), torch.cat([code.mean, code.std], 1))
    if cfg.cache_text:
        texts = [c for _, captions in part for c in captions]
        for i in range(0, len(texts), 256):
            put("text", len(texts), encoder(encoder.ids(texts[i:i + 256])))
    for name in arrays:
        arrays[name].flush()
        os.replace(path.format(name) + ".tmp", path.format(name))


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


def loss_repa(h, tokens):
    """REPA: minus the mean cosine of h (B, N, D), projected, and DINOv2's tokens of the clean image; fp32."""
    return -F.cosine_similarity(h.float(), tokens.to(h.device, non_blocking=True).float(), dim=2).mean()


def loss_sit(f, z, v, t, text):
    """Flow matching: |u(z, t) - v|^2, mean over numbers; also the sum (B,) of each sample, and REPA's h."""
    u, h = f(z, t, t, text, repa=True)
    square = (u - v).square().flatten(1).sum(1)
    return square.mean() / v[0].numel(), square.detach(), h


def loss_mf_text(f, slope, z, v, t, r, text, null, led, cfg):
    """Mean Flow, loss_mf of train_mf_imagenet256.py with captions; also REPA's h, of the primal forward.

    w |u - sg(v~ - (t - r) du/dt)|^2, w = sg(|.|^2 + c)^-p, mean over samples; also |.|^2 (B,).
    f(z, t, r, text) -> u, with repa=True (u, h); slope(z, t, r, text, v) -> du/dt; z (B, C, H, W) is
    (1 - t) x + t eps, v = eps - x; t, r (B,) on the CPU; text (B, L, D); null (1, L, D); led (B,) bool: samples
    with guidance. v~ is v, where led omega v + kappa u(z, t, t | text) + (1 - omega - kappa) u(z, t, t | null),
    and z's tangent. Where r = t the factor (t - r) is 0: no product, and u(z, t, t | text) is u itself.
    """
    far, rest = r < t, 1 - cfg.omega - cfg.kappa
    ask_null = led if abs(rest) > 1e-9 else torch.zeros_like(led)
    ask_own = led & far if cfg.kappa else torch.zeros_like(led)
    near, far, i, j = (m.nonzero()[:, 0].to(z.device, non_blocking=True) for m in (led & ~far, far, ask_null, ask_own))
    share = 1 + (cfg.omega - 1) * led.to(v.dtype)
    t, r, share = (a.to(z.device, non_blocking=True) for a in (t, r, share))
    target = share.view(-1, 1, 1, 1) * v
    with torch.no_grad():
        if len(i) + len(j):
            at = torch.cat([i, j])
            asked = f(z[at], t[at], t[at], torch.cat([null.expand_as(text[i]), text[j]]))
            target[i] += rest * asked[:len(i)]
            target[j] += cfg.kappa * asked[len(i):]
        if len(far):
            product = slope(z[far], t[far], r[far], text[far], target[far])
            target[far] -= (t - r)[far].view(-1, 1, 1, 1) * product
    u, h = f(z, t, r, text, repa=True)
    if cfg.kappa:
        target[near] += cfg.kappa * u.detach()[near]
    square = (u - target).square().flatten(1).sum(1)
    return (square / (square.detach() + cfg.weight_c) ** cfg.power).mean(), square.detach(), h


def all_pairs(nodes, diagonal=0):
    """(i, j), each (P,): every pair i < j of a trajectory's states, noisiest first, and `diagonal` times i = j."""
    i, j = torch.triu_indices(nodes, nodes, 1)
    same = torch.arange(nodes).repeat(diagonal)
    return torch.cat([i, same]), torch.cat([j, same])


def velocity_text(cfg, net, text, null):
    """u(x, t, r) of a Mean Flow net for text (B, L, D); of a SiT v(x, t), guided by omega / (1 - kappa).

    Inside the interval of t: v(null) + scale (v(text) - v(null)), so none for the null caption.
    """
    scale = cfg.omega / (1 - cfg.kappa)

    def u(x, t, r=None):
        own = net(x, t, text, r, repa=False)
        if net.r_embedder is None and scale != 1 and cfg.guide_from <= t[0] <= cfg.guide_to:
            return net(x, t, null.expand_as(text), r, repa=False).lerp(own, scale)
        return own
    return u


@torch.no_grad()
def rollout_text(cfg, net, z, text, null, times):
    """States (N+1, B, ...) from z down `times` (N+1,), and the mean velocity of each step, (N, B, ...).

    A Mean Flow net jumps; a SiT is integrated by --solver.
    """
    calls, u = [], velocity_text(cfg, net, text, null)

    def recorded(x, t, r=None):
        calls.append(u(x, t, r))
        return calls[-1]
    one_clock = solvers.flow_heun if cfg.solver == "heun" else solvers.flow_euler
    states = (one_clock if net.r_embedder is None else solvers.mean_flow)(recorded, z, times)
    return states, torch.stack(calls).unflatten(0, (len(times) - 1, -1)).mean(1)


@torch.no_grad()
def teacher_pairs(cfg, teacher, text, null, shape, g, rank, world):
    """Eq. 8: one roll-out of the frozen teacher gives all pairs of its states, for any number of processes.

    text (n, L, D): the caption of each of n trajectories. Returns z (P n, C, H, W), t, r, the number of its
    caption (P n,) and the target, the mean velocity (z_t - z_r) / (t - r).
    """
    n, times = len(text), torch.linspace(1, 0, cfg.nodes, dtype=torch.float64)
    mine = slice(rank * n // world, (rank + 1) * n // world)
    noise = randn((n, *shape), g)[mine]
    solved = rollout_text(cfg, teacher, noise, text[mine], null, times)
    states, velocities = (gather(x, world) for x in solved)
    i, j = (k.to(g.device) for k in all_pairs(cfg.nodes, cfg.diagonal))
    times, wide = times.to(states), (-1, 1, 1, 1, 1)
    done = torch.cat([torch.zeros_like(states[:1]), (velocities * -times.diff().view(wide)).cumsum(0)])
    target = (done[j] - done[i]) / (times[i] - times[j]).view(wide)     # prefix sums: no difference of states
    if cfg.diagonal:
        u, ts = velocity_text(cfg, teacher, text[mine], null), times.view(-1, 1).expand(-1, n)[:, mine]
        own = torch.stack([u(x[mine], t, t) for x, t in zip(states, ts)])
        target[i == j] = gather(own, world)[i[i == j]]
    t, r = times[i].repeat_interleave(n), times[j].repeat_interleave(n)
    number = torch.arange(n, device=g.device).repeat(len(i))
    return states[i].flatten(0, 1), t, r, number, target.flatten(0, 1)


def loss_cmt_mf(f, z, t, r, y, target):
    """Eq. 8: |u(z, t, r) - target|^2 on pairs of a teacher's trajectory; also the square error (B,) of each.

    Unit weight (B.4), mean over numbers and pairs. The target is fixed data: no stop-gradient is needed.
    """
    square = (f(z, t, r, y) - target).square().flatten(1).sum(1)
    return square.mean() / target[0].numel(), square.detach()


# ---- sample -----------------------------------------------------------------------------------
def starts(net, seeds, device):
    """z at t = 1 (B, C, H, W): image i depends on seed i alone, not on batch, rank or caption."""
    size = net.grid * net.patch_size
    generators = [torch.Generator().manual_seed(fold("sample", s)) for s in seeds]
    return solvers.noise((net.x_embedder.proj.in_channels, size, size), generators).to(device)


def make_sampler(cfg, net, steps, device, null):
    """Returns f(seeds, text (B, L, D)) -> (B, C, H, W), not decoded: `steps` equal jumps from t = 1 to 0."""
    def sample(seeds, text):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return rollout_text(cfg, net, starts(net, seeds, device), text, null, times)[0][-1]
    return sample


def asked(images, encoder, seeds):
    """Captions, one by each seed, and their features (B, L, D)."""
    captions, words = images.validation(seeds)
    return captions, encoder(encoder.ids(captions) if words is None else words)


def digit_of(captions):
    """The digit that each caption names, (B,); -1 if none."""
    named = [[DIGITS.index(w) for w in c.lower().split() if w in DIGITS] for c in captions]
    return torch.tensor([n[0] if n else -1 for n in named])


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


def save_captioned(images, captions, path):
    """(rows, columns, C, H, W) in [-1, 1] -> one PNG: a caption above each row, small images enlarged."""
    x = fid.to_uint8(images.cpu())
    zoom = max(1, 32 // x.shape[3])
    x = F.pad(x.repeat_interleave(zoom, 3).repeat_interleave(zoom, 4), (0, 2, 18, 0))           # caption, gap
    n, columns, c, h, w = x.shape
    sheet = x.permute(0, 3, 1, 4, 2).reshape(n * h, columns * w, c).numpy()
    sheet = Image.fromarray(sheet.squeeze(2) if c == 1 else sheet).convert("RGB")
    draw = ImageDraw.Draw(sheet)
    for k, caption in enumerate(captions):            # Pillow's own font has no other letters
        shown = caption.encode("latin-1", "replace").decode("latin-1")
        draw.text((2, k * h + 2), shown, fill=(255, 255, 255))
    sheet.save(path + ".tmp", format="PNG")
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


def shape_of_size(cfg):
    """patch_size and depth of --size: a row of nets.SIZES, or PATCHxDEPTH."""
    if own := re.fullmatch(r"(\d+)x(\d+)", cfg.size):
        return dict(patch_size=int(own[1]), depth=int(own[2]))
    return {k: nets.SIZES[cfg.size][k] for k in ("patch_size", "depth")}


def model_size(cfg, images, encoder):
    """Constructor arguments of the net to train: --size, and what its data ask for."""
    tokens, text = images.read(torch.tensor([0]), torch.zeros(1))[1], encoder(images.null[None])
    if cfg.repa and tokens is None:
        fail(3, f"--data {cfg.data} holds no DINOv2 tokens; run --stage encode, or pass --repa 0")
    model = dict(shape_of_size(cfg), input_size=images.shape[-1], in_channels=images.shape[0],
                 context_dim=text.shape[-1], average_velocity=cfg.stage != "pretrain",
                 repa_depth=cfg.repa_depth, repa_dim=tokens.shape[-1] if cfg.repa else 0,
                 projector_dim=cfg.projector)
    if cfg.repa and tokens.shape[1] != (model["input_size"] // model["patch_size"]) ** 2:
        fail(2, f"--size {cfg.size}: REPA has {tokens.shape[1]} tokens an image, that is another patch size")
    return model


def check_guidance(cfg, stated, what):
    """Guidance is part of a Mean Flow, so all stages share it (B.4: imperative); exit code 2 if weights differ."""
    if stated.get("pretrain") == "fm" and stated["stage"] == "pretrain" or "omega" not in stated:
        return                                        # plain flow matching: guided when it is rolled out
    scales = [c["omega"] / (1 - c["kappa"]) for c in (stated, asdict(cfg))]
    spans = [(c["guide_from"], c["guide_to"]) for c in (stated, asdict(cfg))]
    if abs(scales[0] - scales[1]) > 1e-6 or spans[0] != spans[1] and scales[0] != 1:
        fail(2, f"{what} was trained with guidance {scales[0]:.4g} for t in {list(spans[0])}, this stage has "
                f"{scales[1]:.4g} in {list(spans[1])}; pass its --omega, --kappa, --guide_from, --guide_to")


def read_file(cfg, name):
    """(weights, constructor arguments) of a FILE or URL: ours, or a bare state dict of --size."""
    state, model = nets.load_pretrained(name)
    if "://" not in name:
        stated = torch.load(name, map_location="cpu", weights_only=True).get("cfg")
        if stated and stated["stage"] != "pretrain":
            check_guidance(cfg, stated, name)
    two = any(k.startswith(("r_embedder.", "h_embedder.")) for k in state)
    if not model:
        model = dict(model_size(cfg, load_data(cfg), text_encoder(cfg, "cpu")), average_velocity=two)
    return state, model


def teacher_state(cfg):
    """(weights, constructor arguments) of --teacher, else <out>/pretrain.pt."""
    if cfg.teacher:
        return read_file(cfg, cfg.teacher)
    if not (state := finished(f"{cfg.out}/pretrain.pt")):
        fail(3, f"no finished teacher in {cfg.out}; run --stage pretrain first, or pass --teacher FILE")
    return state["ema"], state["model"]


def build(cfg, model, device, state=None, what="", train=False):
    """An MM-DiT from constructor arguments, with weights by name if given; a second clock starts at zero."""
    torch.manual_seed(fold(cfg.seed, cfg.stage, "init"))
    net = nets.MMDiT(**model)
    if state is not None:
        nets.load_flow(net, state, what)
    net = net.to(device)
    return net if train else net.requires_grad_(False).eval()


def student(cfg, model, device, teacher):
    """The net to train. First weights: mid.pt's in post (unless --mid none), the teacher's (B.6), random, FILE's."""
    state, what = None, cfg.init
    if cfg.stage == "post" and cfg.mid != "none":
        what = f"{cfg.out}/mid.pt"
        if not (ckpt := finished(what)):
            fail(3, f"{what} is not finished; run --stage mid first, or pass --mid none")
        check_guidance(cfg, ckpt["cfg"], what)
        state = ckpt["ema"]
    elif cfg.init == "sit" and cfg.stage != "pretrain":
        state, what = teacher, "the teacher (--init sit)"
    elif cfg.init != "random" and cfg.stage != "pretrain":
        state = read_file(cfg, cfg.init)[0]
    return build(cfg, model, device, state, what, train=True)


def forward(cfg, net, device):
    """(f, slope) as the losses call them: u in --precision, du/dt in --product's; compiled by --compile."""
    cast, same = HALF.get(cfg.precision), cfg.product == "same"

    def swapped(z, t, r, text, repa=False):           # the order of a DiT's arguments
        return net(z, t, text, r, repa)

    def f(z, t, r, text, repa=False):
        with torch.autocast(device.type, cast, enabled=cast is not None):
            u = swapped(z, t, r, text, repa)
        return (u, None) if repa and torch.is_tensor(u) else u                       # a net without projector

    def slope(z, t, r, text, v):                      # trap: REPA only ever sees the primal forward
        with torch.autocast(device.type, cast if same else None, enabled=same and cast is not None):
            return derivative(swapped, z, t, r, text, v)

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
    images, encoder = load_data(cfg), text_encoder(cfg, device)           # mid reads captions, never an image
    data, weights, model = images.stamp, None, model_size(cfg, images, encoder)
    if ckpt and ckpt["data"] != data:
        fail(2, f"--data {cfg.data} has changed: {path} saw {ckpt['data']}, now {data}; use another --out")
    if cfg.stage == "mid" or cfg.stage == "post" and cfg.mid == "none" and cfg.init == "sit":
        weights, shown = teacher_state(cfg)
    if cfg.stage == "mid":
        teacher = build(cfg, shown, device, weights, "the teacher")
    net, null = student(cfg, model, device, weights).train(), encoder(images.null[None])
    asking = asked(images, encoder, range(64))[1] if rank == 0 else None          # captions of the pictures
    ema = deepcopy(net).requires_grad_(False).eval()
    (flat, grad), flat_ema = flatten(net), flatten(ema)[0]
    flat.grad = grad[:-1]
    opt = torch.optim.Adam([flat], lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    f, slope = forward(cfg, net, device)
    (n, pairs), errors = solves(cfg), torch.zeros(2, 6, device=device)    # sum, count by t - r: 0, quarters; REPA
    mine = slice(rank * B // world, (rank + 1) * B // world)                      # this process's share
    micro = torch.arange(B // world).split(cfg.batch_gpu or B)

    def draw(n, g):
        """Images, which of their captions, and whether it is dropped, each (n,)."""
        index = torch.randint(images.count, (n,), generator=g)
        return index, torch.rand(n, generator=g), torch.rand(n, generator=g) < cfg.dropout

    def read(step):
        g = torch.Generator().manual_seed(fold(cfg.seed, cfg.stage, step, "data"))
        index, pick, drop = draw(B, g)
        t, r = draw_times(B, g, cfg.ratio, cfg.P_mean, cfg.P_std)
        if cfg.stage == "pretrain":
            t = r = torch.rand(B, generator=g)                                    # SiT
        return *images.read(index[mine], pick[mine]), drop[mine], t[mine], r[mine]

    def caption(words, drop):
        return torch.where(drop.to(device, non_blocking=True).view(-1, 1, 1), null, encoder(words))
    start, since, scale, health = restore(cfg, ckpt, path, net, ema, opt, device)
    ckpt = weights = None                             # as large as the net, and needed no more
    reader = ThreadPoolExecutor(1)                                                # one step ahead
    ahead = reader.submit(read, start) if cfg.stage != "mid" else None
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
                index, pick, drop = draw(n, torch.Generator().manual_seed(fold(cfg.seed, "captions", solve)))
                texts = caption(images.texts(index, pick), drop)
                with torch.autocast(device.type, HALF.get(cfg.precision), enabled=cfg.precision in HALF):
                    bank = teacher_pairs(cfg, teacher, texts, null, images.shape, g, rank, world)
                order = torch.randperm(pairs, generator=g, device=device)
            z, t, r, number, target = (a[order[at:at + B][mine]] for a in bank)
            text = texts[number]
        else:
            (raw, tokens, words, drop, t, r), ahead = ahead.result(), reader.submit(read, step + 1)
            noise, eps = (randn((B, *images.shape), g)[mine] for _ in range(2))
            x, text = to_latents(raw, noise, device), caption(words, drop)
            level = t.to(device, non_blocking=True).view(-1, 1, 1, 1)
            z, v = (1 - level) * x + level * eps, eps - x
            led = (t >= cfg.guide_from) & (t <= cfg.guide_to) & ~drop & (cfg.omega != 1 or cfg.kappa != 0)

        gaps = (4 * (t - r)).ceil().long().to(device, non_blocking=True)          # 0, or the quarter of t - r
        for i in micro:                                                           # this process's share
            h = None
            if cfg.stage == "mid":
                loss, square = loss_cmt_mf(f, z[i], t[i], r[i], text[i], target[i])               # Eq. 8
            elif cfg.stage == "pretrain":
                loss, square, h = loss_sit(f, z[i], v[i], level[i].flatten(), text[i])
            else:
                loss, square, h = loss_mf_text(f, slope, z[i], v[i], t[i], r[i], text[i], null, led[i], cfg)
            if h is not None:
                away = loss_repa(h, tokens[i])                                    # REPA
                loss = loss + cfg.repa * away
                errors[:, 5] += torch.stack([-away.detach(), torch.ones_like(away)]).nan_to_num() * len(i)
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
            text, numbers = mse_by_gap(errors, world, "repa")
            report(cfg, done, lr, health, since, text, **numbers)
        if to_save and rank == 0:
            save(path, step=done, net=net.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(),
                 model=model, cfg=asdict(cfg), data=data,
                 seconds=since["seconds"], skipped=int(health[2]), scale=scale.item())
            sampler = make_sampler(cfg, ema, cfg.nfe if cfg.stage == "pretrain" else 1, device, null)
            save_grid(preview(sampler(range(64), asking)), f"{cfg.out}/samples_{cfg.stage}_{done:07d}.png")
            since["clock"] = time.time()
        if stop:
            fail(75, f"stopped by a signal; step {done} is saved, run the same command again to go on")
    if world > 1:
        dist.barrier()


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
    if not (0 <= cfg.ratio <= 1 and 0 <= cfg.repa < math.inf and cfg.nodes >= 2 and cfg.trajectories >= 1):
        fail(2, f"--ratio {cfg.ratio} --repa {cfg.repa} --nodes {cfg.nodes} --trajectories "
                f"{cfg.trajectories}: ratio is in [0, 1], repa 0 at least, nodes 2, trajectories 1")
    if not (cfg.size == "mmdit/2" or re.fullmatch(r"[1-9]\d*x[1-9]\d*", cfg.size)):
        fail(2, f"--size {cfg.size}: neither mmdit/2 nor PATCHxDEPTH as in 2x3")
    if cfg.repa and not 1 <= cfg.repa_depth <= shape_of_size(cfg)["depth"]:
        fail(2, f"--repa_depth {cfg.repa_depth}: --size {cfg.size} has {shape_of_size(cfg)['depth']} blocks")
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
    found = []
    if cfg.init not in ("sit", "random"):
        state, model = read_file(cfg, cfg.init)
        found.append(("init", build(cfg, model, device, state, cfg.init), {}))
    elif cfg.teacher:
        state, model = teacher_state(cfg)
        found.append(("teacher", build(cfg, model, device, state, cfg.teacher), {}))
    for stage in () if cfg.init not in ("sit", "random") else ("pretrain", "mid", "post")[bool(cfg.teacher):]:
        if ckpt := finished(f"{cfg.out}/{stage}.pt"):
            name = "teacher" if stage == "pretrain" else stage
            if stage != "pretrain":
                check_guidance(cfg, ckpt["cfg"], f"{cfg.out}/{stage}.pt")
            found.append((name, build(cfg, ckpt["model"], device, ckpt["ema"], stage), ckpt))
    if not found:
        fail(3, f"no finished stage in {cfg.out}; run --stage pretrain first, or pass --init FILE")
    return [(name, net, {"many": cfg.nfe} if net.r_embedder is None else {"1": 1, "2": 2}, ckpt)
            for name, net, ckpt in found]


def wanted(cfg):
    """--prompts: captions between bars, or of a file, one a line; without it eight of the validation set."""
    if os.path.isfile(cfg.prompts):
        with fid.blame(cfg.prompts), open(cfg.prompts) as f:
            return [line.strip() for line in f if line.strip()]
    captions = [p.strip() for p in cfg.prompts.split("|")]
    if not cfg.prompts and not any(captions := load_data(cfg).validation(range(8))[0]):
        fail(2, f"--prompts is empty, and --data {cfg.data} holds captions as numbers; pass --prompts 'a cat|a dog'")
    return captions


def sample(cfg, rank, world, device):
    """A PNG per caption and seed in <out>/samples/<net>_<steps>, and a sheet of all with their captions."""
    seeds, vae, encoder = seed_range(cfg.seeds), sd_vae(cfg, device), text_encoder(cfg, device)
    found, prompts = candidates(cfg, device), wanted(cfg)
    null = encoder(encoder.ids([""]))
    for name, net, kinds, _ in found:
        for n in kinds.values():
            folder, rows = f"{cfg.out}/samples/{name}_{n}", []
            os.makedirs(folder, exist_ok=True)
            sampler = make_sampler(cfg, net, n, device, null)
            for k, prompt in enumerate(prompts):
                text, row = encoder(encoder.ids([prompt])), []
                for i in range(0, len(seeds), 64):
                    part = seeds[i:i + 64]
                    row.append(decoded(sampler(part, text.expand(len(part), -1, -1)), vae).cpu())
                rows.append(torch.cat(row))
                for seed, image in zip(seeds, fid.to_uint8(rows[-1]).permute(0, 2, 3, 1).numpy()):
                    if seed % world == rank:
                        Image.fromarray(image.squeeze()).save(f"{folder}/{k:03d}_{seed:06d}.png")
            if rank == 0:
                save_captioned(torch.stack(rows)[:64, :16], prompts[:64], f"{cfg.out}/samples_{name}_{n}.png")
            log(cfg, f"sample: {len(seeds)} images of each of {len(prompts)} captions in {folder}")


def evaluate(cfg, rank, world, device):
    """Score every net there is, the teacher in --nfe steps, the students in 1 and 2; on digits also read them.

    Caption i of the validation set makes image i; the fixed classifier must read the digit that it names.
    """
    digits, metric = cfg.data == "digits", "FD-digits" if cfg.data == "digits" else "FID"
    vae, encoder, images = sd_vae(cfg, device), text_encoder(cfg, device), load_data(cfg)
    features = (fid.DigitsNet() if digits else fid.load_inception(cfg.inception)).to(device)
    if digits and not cfg.reference:
        batches = images.pixels[rank::world].split(250)
        reference = fid.measure(features, batches, device, file="of --data digits")
    else:
        reference = fid.load_reference(cfg.reference or f"{FILES.get(cfg.data, cfg.data)}/val.npz")
    found, table, null = candidates(cfg, device), [], encoder(images.null[None])
    for name, net, kinds, ckpt in found:
        row, reads = dict.fromkeys(("1", "2", "many"), "-"), dict.fromkeys(("1", "2", "many"), "-")
        for kind, n in kinds.items():
            latents, right = make_sampler(cfg, net, n, device, null), torch.zeros(2)
            sampler = captioned(latents, images, encoder, vae, digits and features, right)
            scores, ours = score(cfg, sampler, features, reference, rank, world, device)
            row[kind] = f"{scores.mean():.2f}"
            if cfg.repeat > 1:
                row[kind] += f" +- {scores.std():.2f}, min {scores.min():.2f}"
            if digits:
                if world > 1:
                    dist.all_reduce(right)
                reads[kind] = f"{right[0] / right[1]:.1%}"
            told = f", {reads[kind]} show their digit" * digits
            log(cfg, f"eval: {name} {n}-step {metric} {row[kind]}{told}",
                stage="eval", net=name, metric=f"{n}-step {metric}", values=scores.tolist(), read=reads[kind])
        seen = ckpt["step"] * ckpt["cfg"]["batch"] if ckpt else 0
        facts = [ckpt.get("step", "-"), f"{seen:,}", f"{ckpt.get('seconds', 0):.0f}"]
        table += [[name, *facts, *row.values()]]
        table += [[f"{name}, shows its digit", *facts, *reads.values()]] * digits
    if rank == 0:
        note = (f"decoder {cfg.vae if vae else 'none (pixels)'}, guidance {cfg.omega / (1 - cfg.kappa):.4g} "
                f"(omega {cfg.omega}, kappa {cfg.kappa}) for t in [{cfg.guide_from}, {cfg.guide_to}], "
                f"teacher by {cfg.solver}")
        results(cfg, metric, table, fid.protocol(ours, reference), note, cfg.nfe)
        sheets(cfg, found, images, encoder, vae, device)


def captioned(latents, images, encoder, vae, reader, right):
    """f(seeds) -> an image of each caption; right (2,) counts digits that the reader, if any, reads right, and all."""
    def sampler(seeds):
        captions, text = asked(images, encoder, seeds)
        x = decoded(latents(seeds, text), vae)
        if reader:
            said = reader.logits(fid.to_uint8(x)).argmax(1).cpu() == digit_of(captions)
            right.add_(torch.tensor([said.sum(), len(said)]))
        return x
    return sampler


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
def sheets(cfg, found, images, encoder, vae, device):
    """Pictures: a sheet with captions per net; one noise through the stages; trajectories and answers."""
    null, rows = encoder(images.null[None]), []
    captions, text = asked(images, encoder, range(10))
    for name, net, kinds, _ in found:
        for n in kinds.values():
            sampler = make_sampler(cfg, net, n, device, null)
            x = torch.stack([decoded(sampler(range(k, 80 + k, 10), text[k].expand(8, -1, -1)), vae)
                             for k in range(10)])
            save_captioned(x, captions, f"{cfg.out}/samples_{name}_{n}step.png")
            rows.append(x[:, :2].flatten(0, 1))
    save_grid(torch.cat(rows), f"{cfg.out}/samples_stages.png", columns=20)
    (_, first, *_), *others = found
    times, rows = torch.linspace(1, 0, cfg.nodes, dtype=torch.float64), []
    z = starts(first, range(3), device)
    states = rollout_text(cfg, first, z, text[:3], null, times)[0]                   # (nodes, 3, C, H, W)
    for j in range(3):
        x, t = states[:, j], times.to(states)
        words = text[j].expand(len(x), -1, -1)
        rows.append(x)
        rows += [x - t.view(-1, 1, 1, 1) * net(x, t, words, t * 0, repa=False) for _, net, *_ in others]
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
        encode_coco(cfg, rank, world, device)
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
