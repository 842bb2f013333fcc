"""Two modules in one file: the score, FID; and from the banner `files` on, most of it, what runs share.

  part (its banner)         what it is: its main names
  Inception-v3              FID's net, the TF graph of 2015: InceptionV3, load_inception, resize_tf1
  digits                    FD-digits' net, made here: DigitsNet, digits
  statistics and distance   Heusel et al. 2017, Eq. 6: Statistics, measure, frechet_distance, protocol
  images of a sampler       seeds -> images, score, PNGs: draw_seeds, score, score_net, save_images
  files                     other people's pictures, read as a person sees them or refused: list_pictures,
                            read_labels, load_images, read_cifar, image_shape, check_once, prefetch,
                            load_reference, to_float, to_uint8, stamp
  images to train on        crops of ADM, EDM2, U-ViT: rgb, crop, square, ahead
  encode                    pictures -> arrays, resumed: begin_encode, encode_shards, encoder_of
  pictures with words       read without the README: save_stages, save_trajectory, save_chart, about
  a run of a script         its lines, lock and flags, and refusals to begin, in one line: log, say,
                            words_of, fail, one_line, parse, begin_run, same_folder, stages_of,
                            check_values, check_solve, finished_mid, seed_range
  processes and stages      what they share, compared by content: agree, from_first, wait_for_first,
                            patient_group, same_data, same_names, say_changed, made_by, steps_left,
                            check_teacher, check_init, same_guidance, guidance_note
  the folder of a run       log.txt, metrics.jsonl, config.json, previews, results.md: new_tally, count,
                            report, begin_stage, overview, dry_run, save_curve, save_preview,
                            save_samples, save_captions, save_classes, save_results
  command line              this:
  python fid.py A B                              folders, .zip, .npz or .png of images, .npz
                                                 of statistics, or a name such as cifar10
  python fid.py --save stats.npz A               statistics of A, for later
  python fid.py --features digits A B            FD-digits; the default when A or B is a .png sheet of digits
  torchrun --nproc_per_node=8 fid.py A B         each process takes every 8th image; same number
  python fid.py --train-digits assets/fd_digits.npz

The resize is part of the protocol; the two differ by 8.6 grey levels on CIFAR-10:
  tf1         pixel i reads from i in/299, then (x - 128) / 128; the default: TTUR, EDM, ECT, torch-fidelity
  half_pixel  pixel i reads from (i + 1/2) in/299 - 1/2, then x / 127.5 - 1: pytorch-fid
Precision, recall and the like: reuse net(images). Exit codes: 0 done, 2 usage, 3 data or weights.
From the running script fid takes Config and its tables: PRESETS (values), READ_BY (which stages read a knob;
default: all), NO_WEIGHT (knobs that change no weight), ABOUT (a stage in words), STAGES, FILES, RUN,
NEED_STAGE; DEVICE and nets; it calls data_name, lr_at, check, solve_size, resume, teacher_state,
candidates and set_up. tests/test_forks.py looks at the tables of a fork.
"""
import argparse
import atexit
import collections
import contextlib
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import hashlib
import http.client
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import traceback
import typing
import unicodedata
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torch import nn

ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URLS = [f"https://github.com/{place}inception-2015-12-05-6726825d.pth" for place in (
    "mseitzer/pytorch-fid/releases/download/fid_weights/pt_",
    "toshas/torch-fidelity/releases/download/v0.2.0/weights-")]            # the same 95,628,359 bytes
NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/"
REFERENCES = {         # nobody publishes their checksums, so the one found is printed beside every number
    "cifar10": NVIDIA + "edm/fid-refs/cifar10-32x32.npz",
    "ffhq": NVIDIA + "edm/fid-refs/ffhq-64x64.npz",
    "afhqv2": NVIDIA + "edm/fid-refs/afhqv2-64x64.npz",
    "imagenet64": NVIDIA + "edm2/dataset-refs/img64.pkl",                  # EDM2: Dhariwal's crop
    "imagenet64-edm": NVIDIA + "edm/fid-refs/imagenet-64x64.npz",          # EDM: another crop, another FID
    "imagenet512": NVIDIA + "edm2/dataset-refs/img512.pkl",
    "imagenet256": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
                   "VIRTUAL_imagenet256_labeled.npz",                      # ADM, 2 GB
}
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")         # inside, whatever the name ends in
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
HALVES = "2,000 new real digits would score about 0.4; halves of the real ones, 900 each, score 0.78."
HIDDEN = re.compile(r"(^|/)(\.[^/]|__MACOSX/)")                          # .DS_Store, ._x.png, .git
Reference = collections.namedtuple("Reference", "mu cov n features file sha256")    # not stated: n 0, text ""
FOREIGN = {"cannot identify image file": "not a picture, or a part of one",
           "Expecting ": "not JSON, or damaged; mend it or move it away",
           "Unterminated string": "JSON that is cut; mend it or move it away",
           "not a zip file": "not a .zip, or a part of one; copy the file again",       # what libraries say
           "pickled (object) data": "not an .npz of arrays, or a part of one; copy it again, or numpy.savez"}


class DataError(ValueError):
    """Unusable images, statistics or weights: one line that names the file. Exit code 3."""


def first_line(error):
    """What an error says in its first line, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def blame(name):
    """Turns any error from a foreign file into a one-line DataError that begins with the file's name."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error).split(" <_io.")[0]
        text = next((ours for theirs, ours in FOREIGN.items() if theirs in text), text)
        text += f" ({type(error).__name__})" * (" " not in text)             # a word alone says too little
        raise DataError(f"{name}: {' '.join(text.split())[:300]}") from error


# ---- Inception-v3 ------------------------------------------------------------------------------
# trap: FID's graph averages over pixels inside the image only; Mixed_7c takes the maximum where 7b averages
average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = functools.partial(F.max_pool2d, kernel_size=3, stride=2)

AT_35 = dict(branch1x1="64 1x1", branch5x5="48 1x1, 64 5x5", branch3x3dbl="64 1x1, 96 3x3, 96 3x3",
             branch_pool="c 1x1")
AT_17 = dict(branch1x1="192 1x1", branch7x7="c 1x1, c 1x7, 192 7x1",
             branch7x7dbl="c 1x1, c 7x1, c 1x7, c 7x1, 192 1x7", branch_pool="192 1x1")
AT_8 = dict(branch1x1="320 1x1", branch3x3="384 1x1, 384 1x3+3x1",
            branch3x3dbl="448 1x1, 384 3x3, 384 1x3+3x1", branch_pool="192 1x1")
TO_17 = dict(branch3x3="384 3x3/2", branch3x3dbl="64 1x1, 96 3x3, 96 3x3/2")
TO_8 = dict(branch3x3="192 1x1, 320 3x3/2", branch7x7x3="192 1x1, 192 1x7, 192 7x1, 192 3x3/2")
MIXED = {              # name: pool, branches, c
    "Mixed_5b": (average, AT_35, 32), "Mixed_5c": (average, AT_35, 64), "Mixed_5d": (average, AT_35, 64),
    "Mixed_6a": (halve, TO_17, 0), "Mixed_6b": (average, AT_17, 128), "Mixed_6c": (average, AT_17, 160),
    "Mixed_6d": (average, AT_17, 160), "Mixed_6e": (average, AT_17, 192),
    "Mixed_7a": (halve, TO_8, 0), "Mixed_7b": (average, AT_8, 0), "Mixed_7c": (maximum, AT_8, 0)}


def conv_bn(c_in, c_out, kernel, stride=1, padding=0):
    """Convolution without bias, batch norm (eps 1e-3); the names are the checkpoint's."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
    bn = nn.BatchNorm2d(c_out, eps=1e-3)
    return nn.Sequential(collections.OrderedDict(conv=conv, bn=bn, relu=nn.ReLU()))


class Mixed(nn.Module):
    """Branches of convolutions over one input, joined along channels; halving blocks append the pooled input.

    A branch is a text: "48 1x1, 64 5x5" is 48 channels of 1x1, then 64 of 5x5, same padding; "/2" is stride 2
    without padding; "384 1x3+3x1" joins two convolutions of one input. branch_pool reads the pooled input.
    """

    def __init__(self, c_in, pool, branches, width):
        super().__init__()
        self.pool, self.steps, self.channels = pool, {}, c_in if pool is halve else 0
        for branch, text in branches.items():
            c, self.steps[branch], steps = c_in, [], text.replace("c", str(width)).split(", ")
            for i, step in enumerate(steps, 1):
                c_out, kernels = step.split()
                kernels, _, stride = kernels.partition("/")
                names = []
                for letter, kernel in zip("ab", kernels.split("+")):
                    names.append(branch + f"_{i}" * (len(steps) > 1) + letter * ("+" in kernels))
                    h, w = map(int, kernel.split("x"))
                    padding = 0 if stride else (h // 2, w // 2)
                    self.add_module(names[-1], conv_bn(c, int(c_out), (h, w), int(stride or 1), padding))
                self.steps[branch].append(names)
                c = int(c_out) * len(names)
            self.channels += c

    def forward(self, x):
        joined = []
        for branch, steps in self.steps.items():
            h = self.pool(x) if branch == "branch_pool" else x
            for names in steps:
                h = torch.cat([getattr(self, name)(h) for name in names], 1)
            joined.append(h)
        return torch.cat(joined + [self.pool(x)] * (self.pool is halve), 1)


RESIZES = {"tf1": "(x-128)/128", "half_pixel": "x/127.5-1"}                # and the scale that goes with it


def resize_tf1(x, size=299):
    """TF1's resize_bilinear: pixel i reads from i * in/out. x float (B, C, H, W) -> (B, C, size, size)."""
    for dim in (3, 2):
        at = torch.arange(size, device=x.device, dtype=torch.float32) * (x.shape[dim] / size)
        low = at.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)     # trap: the last pixels would read beyond the border
        a, b = x.index_select(dim, low), x.index_select(dim, high)
        x = a + (b - a) * (at - low).view(-1, *[1] * (3 - dim))
    return x


class InceptionV3(nn.Module):
    """The 2015 FID network; names of parameters are those of pt_inception-2015-12-05-6726825d.pth.

    state: its state dict, loaded strictly (None: untrained, for shapes). resize: "tf1" or "half_pixel"; the
    bare class defaults to the public port's half_pixel; our scores all come from load_inception, whose
    default is tf1. forward: images uint8 (B, 3 or 1, H, W) -> pool3 features (B, 2048) float32, no gradient.
    """
    dim = 2048

    @torch.random.fork_rng(devices=[])     # trap: building a net would consume training's random numbers
    def __init__(self, state=None, resize="half_pixel", weights="given by the caller"):
        super().__init__()
        if resize not in RESIZES:
            raise ValueError(f"resize {resize}: one of {', '.join(RESIZES)} expected")
        self.resize, self.weights = resize, weights
        self.Conv2d_1a_3x3 = conv_bn(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = conv_bn(32, 32, 3)
        self.Conv2d_2b_3x3 = conv_bn(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = conv_bn(64, 80, 1)
        self.Conv2d_4a_3x3 = conv_bn(80, 192, 3)
        channels = 192
        for name, row in MIXED.items():
            self.add_module(name, Mixed(channels, *row))
            channels = getattr(self, name).channels
        self.fc = nn.Linear(channels, 1008)              # in the file, not in FID
        if state is not None:
            with blame(f"Inception weights {weights}"):
                self.load_state_dict(state)
        self.eval().requires_grad_(False)

    @property
    def protocol(self):
        resize = f"resize {self.resize} to 299, {RESIZES[self.resize]}"
        return f"FID: inception-v3 2015-12-05, weights {self.weights}, {resize}"

    @torch.no_grad()
    def forward(self, images):
        check_images(images, (1, 3))
        # trap: TF32 or the caller's autocast would move the features, and the FID with them
        fp32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), fp32:
            x = images.expand(-1, 3, -1, -1).float()
            if self.resize == "tf1":
                x = (resize_tf1(x) - 128) / 128
            else:
                x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) / 127.5 - 1
            x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
            x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
            for name in MIXED:
                x = getattr(self, name)(x)
            return x.mean((2, 3))


def check_images(images, channels, size="H, W"):
    """DataError unless images are uint8 (B, C, H, W), with C in channels and, if given, (H, W) = size."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in channels \
            or size not in ("H, W", images.shape[2:]):
        given = f"{images.dtype} {tuple(images.shape)}"
        wanted = f"{' or '.join(map(str, channels))} channels, {size}"
        raise DataError(f"images are {given}; expected uint8 of {wanted}; other --data, --init, --features?")


def load_inception(path="", resize="tf1"):
    """InceptionV3 with the weights of --inception FILE, or the published ones, downloaded once and checked.

    DataError for a missing or damaged file; the protocol says so if the file is not the published one.
    """
    remedy = "give a copy with --inception FILE; 8x8 digits: --features digits"
    file = path or fetch(INCEPTION_URLS, INCEPTION_SHA256, remedy)
    with blame(f"--inception {file}"):
        found = sha256(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    foreign = "" if found == INCEPTION_SHA256 else " (not the published file)"
    return InceptionV3(state, resize, f"{os.path.basename(file)} sha256 {found[:16]}{foreign}")


# ---- digits ------------------------------------------------------------------------------------
class DigitsNet(nn.Module):
    """40k-parameter classifier: digits uint8 (B, 1, 8, 8) -> features (B, 64) float32, without gradient.

    The Frechet distance of these features is called FD-digits. weights: an .npz; "" leaves the net untrained.
    """
    dim = 64

    @torch.random.fork_rng(devices=[])
    def __init__(self, weights=os.path.join(ASSETS, "fd_digits.npz")):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 64))
        # choice: the features end before this ReLU, behind which some hardly ever leave zero
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, 10))
        if weights:
            with blame(weights), np.load(weights) as file:
                self.load_state_dict({key: torch.from_numpy(file[key]) for key in file})
            self.protocol = f"FD-digits: {os.path.basename(weights)} sha256 {sha256(weights)[:16]}"
            self.eval().requires_grad_(False)

    def logits(self, images):
        """Class scores (B, 10); forward returns what the head reads."""
        check_images(images, (1,), (8, 8))
        return self.head(self.body(images.float() / 127.5 - 1))

    @torch.no_grad()
    def forward(self, images):
        check_images(images, (1,), (8, 8))
        fp32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with fp32, torch.autocast(images.device.type, enabled=False):
            return self.body(images.float() / 127.5 - 1)


def digits(path=os.path.join(ASSETS, "digits.png")):
    """Digits of the sheet: uint8 (1797, 1, 8, 8), labels int64 (1797,); rows 3c to 3c + 2 hold class c."""
    images, rows = tiles(path)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(rows) // 3


def train_digits(path, steps=800, seed=0):
    """Makes assets/fd_digits.npz from four in five digits, moved by at most a pixel; prints its quality."""
    images, labels = digits()
    held = torch.arange(len(labels)) % 5 == 0            # never trained on: an honest accuracy
    padded = F.pad(images[~held], (1, 1, 1, 1))
    moved = torch.stack([padded[..., i:i + 8, j:j + 8] for i, j in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))])
    torch.manual_seed(seed)
    net = DigitsNet("")
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps)
    for _ in range(steps):
        move, i = torch.randint(5, (128,)), torch.randint(moved.shape[1], (128,))
        loss = F.cross_entropy(net.logits(moved[move, i]), labels[~held][i], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    np.savez(path, **{key: value.numpy() for key, value in net.state_dict().items()})
    net = DigitsNet(path)
    right = (net.logits(images[held]).argmax(1) == labels[held]).float().mean()
    print(f"{path}: {os.path.getsize(path)} bytes, {100 * right:.1f}% of {held.sum()} held-out digits")

    def fd(a, b):
        return frechet_distance(*measure(net, [a])[:2], *measure(net, [b])[:2])
    halves = [fd(images[i[::2]], images[i[1::2]]) for i in map(torch.randperm, [len(images)] * 20)]
    print(f"FD-digits: half against half {np.mean(halves):.2f} +- {np.std(halves):.2f} (20 random halves)")


# ---- statistics and distance -------------------------------------------------------------------
class Statistics:
    """Running n, mean and covariance of features (B, dim): float64 sums on the device of the features."""

    def __init__(self, dim):
        self.dim, self.n, self.reduced = dim, 0, False
        self.sum, self.outer = torch.zeros(dim).double(), torch.zeros(dim, dim).double()

    def update(self, features):
        """Adds features (B, dim). Raises ValueError for another shape, NaN and infinity, and after reduce."""
        if features.ndim != 2 or features.shape[1] != self.dim or self.reduced:
            raise ValueError(f"features {tuple(features.shape)}; expected (B, {self.dim}), before reduce()")
        f = features.detach().double()                   # trap: float32 sums spoil the covariance
        if not f.isfinite().all():
            raise DataError("features are not finite")
        self.n, self.sum, self.outer = self.n + len(f), self.sum.to(f) + f.sum(0), self.outer.to(f) + f.T @ f
        return self

    def reduce(self):
        """Sums over ranks in one all_reduce, which every rank must join; nothing without a process group."""
        if dist.is_initialized() and not self.reduced:   # trap: twice would count every image world times
            flat = torch.cat([torch.tensor([self.n]).to(self.sum), self.sum, self.outer.flatten()])
            flat = flat.cuda() if dist.get_backend() == "nccl" else flat.cpu()
            dist.all_reduce(flat)
            self.n, self.sum = int(flat[0].item()), flat[1:self.dim + 1]
            self.outer = flat[self.dim + 1:].view(self.dim, self.dim)
        self.reduced = True
        return self

    @property
    def mean(self):
        return self.sum / self.n

    @property
    def cov(self):
        """Unbiased, (dim, dim). Raises ValueError below two samples."""
        if self.n < 2:
            raise ValueError(f"{self.n} images, a covariance needs two at least")
        return (self.outer - self.n * self.mean.outer(self.mean)) / (self.n - 1)


def measure(net, batches, device="cpu", file=""):
    """Reference made of uint8 batches, summed over ranks: every rank must call it, some may have no batch."""
    stats = Statistics(net.dim)
    for images in batches:
        try:
            stats.update(net(images.to(device)))
        except DataError as error:                    # wrong size or number of channels
            raise DataError(f"{file or 'samples'}: {error}") from None
    stats.reduce()
    with blame(file or "images"):
        return Reference(stats.mean, stats.cov, stats.n, net.protocol, file, sha256(file))


def root(cov):
    """R (D, rank) with R R^T = cov: Cholesky's, or from the eigenvectors when cov is singular."""
    R, info = torch.linalg.cholesky_ex(cov)
    if info.item() == 0:
        return R
    w, V = torch.linalg.eigh(cov)
    # trap: eigenvalues that should be zero come out near 1e-16 of either sign, and their roots add up
    keep = w > len(w) * torch.finfo(w.dtype).eps * w[-1]
    return V[:, keep] * w[keep].sqrt()


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^1/2), a float >= 0; (D,) and (D, D), numpy or torch.

    With cov = R R^T, Tr (cov1 cov2)^1/2 is the sum of the singular values of R1^T R2: real, >= 0, symmetric.
    Raises ValueError for dimensions that differ, for NaN and infinity.
    """
    given = [torch.as_tensor(a).to("cpu", torch.float64) for a in (mu1, cov1, mu2, cov2)]
    (mu1, cov1, mu2, cov2), D = given, given[0].numel()
    if [a.shape for a in given] != [(D,), (D, D)] * 2:
        raise ValueError(f"dimensions differ: {[tuple(a.shape) for a in given]}; are the features the same?")
    if not all(a.isfinite().all() for a in given):
        raise ValueError("a mean or covariance is not finite")
    # choice: singular values, not eigenvalues of R1^T cov2 R1, where 1e-16 of a rounded zero becomes 1e-8;
    # and one thread, 5 s in 2048 dimensions: two take 3 s on idle cores, and took 90 s on busy ones
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trace = torch.linalg.svdvals(root(cov1).T @ root(cov2)).sum()
    finally:
        torch.set_num_threads(threads)
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace
    return max(distance.item(), 0.0)    # choice: equal sets come out at +-1e-12; a distance is not negative


def protocol(a, b):
    """One line that says what the distance of two References means, to print beside it.

    Raises DataError when their features are stated and differ.
    """
    if a.features and b.features and a.features != b.features:
        raise DataError(f"features differ: {a.file} has {a.features}; {b.file} has {b.features}")
    sides = [f"{r.n or '?'} images {r.file or 'of this run'}" + f" (sha256 {r.sha256})" * bool(r.sha256)
             + f" (too few for {len(r.mu)} features, under {16 * len(r.mu)}: it comes out high)"
             * (0 < r.n < 16 * len(r.mu))
             for r in (a, b)]
    return f"{a.features or b.features or 'features not stated'}, covariance N-1, {' against '.join(sides)}"


# ---- images of a sampler -----------------------------------------------------------------------
# A sampler is a function: seeds (a range) -> images (B, C, H, W) in [-1, 1]; image i depends only on seed i.
def draw_seeds(sampler, seeds, batch=64, seconds=math.inf):
    """Images of the seeds, `batch` at a time; no batch begins after `seconds`: slow machines draw fewer."""
    end, images = time.time() + seconds, sampler(seeds[:batch if seconds == math.inf else 2])
    while len(images) < len(seeds) and time.time() < end:
        some = seeds[len(images):len(images) + min(len(images), batch)]
        images = torch.cat([images, sampler(some)])
    return images


def score(sampler, features, reference, samples, repeat=1, batch=250):
    """Frechet distances of `repeat` sets of `samples` images, fresh seeds each; processes share the work.

    Returns their mean as text (with deviation and minimum if repeat > 1), the list, and the last Reference.
    """
    (rank, world), ours = processes(), reference._replace(features=features.protocol, file="this run")
    protocol(ours, reference)            # do the features match? Ask before hours of sampling
    distances, device = [], next(features.parameters()).device
    for j in range(repeat):
        seeds = range(j * samples + rank, (j + 1) * samples, world)
        batches = (to_uint8(sampler(some)) for some in in_batches(seeds, batch, "images drawn"))
        ours = measure(features, batches, device)
        distances.append(frechet_distance(ours.mu, ours.cov, reference.mu, reference.cov))
    text = f"{np.mean(distances):.2f}"
    if repeat > 1:
        text += f" +- {np.std(distances, ddof=1):.2f}, min {min(distances):.2f}"
    return text, distances, ours


def score_net(row, samplers, features, reference, cfg, **more):
    """Scores a net: adds a column to its table row for each of samplers {steps: sampler}, and logs a line.

    cfg: a Config with samples, repeat, batch_gpu; more: for metrics.jsonl. Returns the last Reference.
    """
    distance = features.protocol.partition(":")[0]
    row |= {f"{steps}-step {distance}": "-" for steps in (1, 2)}
    for steps, sampler in samplers.items():
        column = f"{steps}-step {distance}"
        row[column], values, ours = score(sampler, features, reference, cfg.samples, cfg.repeat,
                                          cfg.batch_gpu or 250)
        log(f"eval: {row['stage']} {column} {row[column]}", stage="eval",
            net=row["stage"].partition(",")[0], metric=column, samples=cfg.samples, values=values, **more)
    return ours


def save_images(sampler, seeds, prefix, batch=64):
    """One PNG a seed, prefix000007.png; every process draws and writes its share."""
    rank, world = processes()
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    for some in in_batches(seeds[rank::world], batch, "images drawn"):
        images = to_uint8(sampler(some)).permute(0, 2, 3, 1).cpu().numpy()
        for seed, image in zip(some, images):
            Image.fromarray(image.squeeze()).save(f"{prefix}{seed:06d}.png")


# ---- files -------------------------------------------------------------------------------------
def to_uint8(x):
    """[-1, 1] -> floor(127.5 x + 128) in 0..255, the rounding of EDM and ECT. DataError for NaN, infinity."""
    if not x.isfinite().all():
        raise DataError("samples are not finite; their net has diverged, try a smaller --lr, another --out")
    return (x.float() * 127.5 + 128).clamp(0, 255).byte()     # trap: without clamp 256 becomes 0


def stamp(images):
    """A text that changes when the images do, uint8 (N, C, H, W)."""
    if getattr(images, "dtype", None) is not torch.uint8 or images.ndim != 4:
        raise DataError(f"images are {getattr(images, 'dtype', None)}, not uint8 (N, C, H, W): load_data")
    return f"{len(images)} images, crc32 {zlib.crc32(images.numpy()):08x}"


def to_float(images, device):
    """uint8 (B, C, H, W) -> [-1, 1], channels_last, on device."""
    x = images.to(device, non_blocking=True).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def sha256(file):
    """Hexadecimal sum of a file; "" for a folder."""
    if not os.path.isfile(file):
        return ""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_whole(path, write):
    """write(file) under a temporary name, flushed, renamed. DataError if the disk does not take it."""
    try:
        with open(path + ".tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise DataError(f"{path}: cannot be written ({error}); free some space and run again") from error


def fetch(urls, expected="", remedy=""):
    """Path of a file in $CMT_CACHE or ~/.cache/cmt; else downloaded to a temporary name, checked, renamed.

    Processes that miss it at the same time wait for the first. DataError names urls, file, sums and remedy.
    """
    cache = os.environ.get("CMT_CACHE") or os.path.expanduser("~/.cache/cmt")
    path, problems = os.path.join(cache, os.path.basename(urls[0])), {}
    if os.environ.get("CMT_OFFLINE") == "dry run" and not os.path.exists(path):
        return say(f"to download: {urls[0]} -> {path}")
    temporary = f"{path}.{os.getpid()}"
    with blame(f"{cache}, set $CMT_CACHE to a folder of yours"):
        os.makedirs(cache, exist_ok=True)
        folder = os.open(cache, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)                   # trap: eight processes would download eight copies
    for url in urls if not os.path.exists(path) else ():
        try:
            if os.environ.get("CMT_OFFLINE"):
                raise OSError("CMT_OFFLINE is set")
            with urllib.request.urlopen(url, timeout=60) as page, open(temporary, "wb") as file:
                file.write(page.read())                  # trap: in pieces, a connection cut short is no error
            if expected and sha256(temporary) != expected:
                raise OSError(f"what came has sha256 {sha256(temporary)}")
            os.replace(temporary, path)
            break
        except (OSError, http.client.HTTPException) as error:
            problems.setdefault(str(error))              # a cause once
            with contextlib.suppress(OSError):
                os.remove(temporary)
    os.close(folder)
    if not os.path.exists(path):
        raise DataError(f"no {path} (sha256 {expected or 'not published'}), no download from "
                        f"{' or '.join(urls)} ({', '.join(problems)}): {remedy or 'save it there'}")
    if expected and sha256(path) != expected:
        raise DataError(f"{path}: sha256 is {sha256(path)}, not {expected}; delete it or {remedy}")
    return path


def open_picture(file, label, exif=True):
    """A picture, by its path or bytes, as a person sees it: uint8 (H, W, C), C = 1 or 3.

    Transparency is shown over white, 16 bits become 8, an animation gives its first frame; colour profiles
    are not applied. exif: turn it upright as the camera noted. DataError begins with label.
    """
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    with blame(label), Image.open(file, formats=FORMATS) as image:
        mode, grey = image.mode, image.mode in ("1", "L", "LA")
        # trap: here Pillow compares the transparent colour with 8-bit pixels; in a TIFF, 0 may be white
        odd = ("transparency" in image.info and image.tile[0][3] in ("L;2", "L;4", "I;16B", "RGB;16B")) \
            or (mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(262) == 0)
        if exif:
            ImageOps.exif_transpose(image, in_place=True)
        if not odd and (mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM"))):
            return ((np.asarray(image).astype(int) + 128) // 257).astype(np.uint8)[..., None]
        if odd or (not grey and mode not in ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")):
            raise DataError(f"{label}: this kind of mode {mode} is not read; save it as an 8-bit RGB PNG")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("L" if grey else "RGB")).reshape(image.height, image.width, -1)


def walk(folder, below="", above=()):
    """Names of the files in a folder; links are followed, but not in circles, and must lead somewhere."""
    real = os.path.realpath(folder)
    for entry in list(os.scandir(folder)) if real not in above else ():
        if entry.is_symlink() and not entry.name.startswith(".") and not os.path.exists(entry.path):
            raise DataError(f"{entry.path}: a link that leads nowhere; mend or remove it")
        if entry.is_dir():
            yield from walk(entry.path, f"{below}{entry.name}/", (*above, real))
        else:
            yield below + entry.name


def members(path):
    """(names, root) of the files in a folder or .zip; root.joinpath(name).read_bytes() reads one."""
    if os.path.isdir(path):
        return list(walk(path)), pathlib.Path(path)
    if os.stat(path) and not path.lower().endswith(".zip"):
        raise DataError(f"{path}: no images; expected a folder or .zip of pictures, .npz, .npy or .png sheet")
    root = zipfile.Path(path)
    names = [name for name in root.root.namelist() if not name.endswith("/")]
    if odd := [name for name, n in collections.Counter(names).items() if n > 1 or "\\" in name]:
        raise DataError(f"{path}: {odd[0]!r} is there twice or has a backslash; unpack it, and zip it again")
    return names, root


def list_pictures(path, endings=PICTURES):
    """(names, read) of the pictures of a folder or .zip, sorted; read(name, exif=True) as open_picture.

    Hidden files and other suffixes are left out; a line counts them. For an .npy, read returns its array.
    """
    with blame(path):
        files, root = members(path)
    names = sorted({n for n in files if n.lower().endswith(endings) and not HIDDEN.search(n)})
    left = sorted(n for n in set(files) - set(names) if os.path.basename(n) != "dataset.json")
    kind = "pictures" if endings == PICTURES else ", ".join(endings)
    text = f"{len(left)} files that are hidden or no {kind}, such as {left[:3]}" if left else ""
    if not names:
        mend = "name the folder or .zip that does" if endings == PICTURES else \
            "of pictures --stage encode --source FOLDER makes latents"
        raise DataError(f"{path}: holds no {', '.join(endings)}{text and '; '}{text}; {mend}")
    if left:
        say(f"{path}: {len(names)} pictures; left out: {text}")

    def read(name, exif=True):
        with blame(label := os.path.join(path, name)):
            data = root.joinpath(name).read_bytes()
            return load_array(io.BytesIO(data)) if name.endswith(".npy") else open_picture(data, label, exif)
    return names, read


PARSING = threading.Lock()


def load_array(file):
    """np.load for threads, of finite numbers."""
    with PARSING:                     # trap: numpy parses headers by `ast`, which two threads can break
        array = np.load(file)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinity")
    return array


def read_labels(path, names):
    """(labels int64 (N,), classes) of these pictures of a folder or .zip, or None; a line says which.

    From EDM's dataset.json, at the root or the only one elsewhere: {"labels": [[name, 0], ...]}, or null.
    Else from folders as in torchvision: one level, sorted; those without pictures get no number. DataError
    unless every picture has one label, and the labels are 0, 1, 2, ... without a gap.
    """
    with blame(path):
        files, root = members(path)
        lists = [n for n in files if os.path.basename(n) == "dataset.json" and not HIDDEN.search(n)]
        lists.sort(key=len)                              # one at the root comes first
        if lists[1:] and lists[0] != "dataset.json":
            raise DataError(f"{path}: which is meant, {lists[0]} or {lists[1]}? Put it at the root")
    source = os.path.join(path, lists[0]) if lists else path
    with blame(source):
        if lists:
            listed = json.loads(root.joinpath(lists[0]).read_bytes())["labels"]
            if listed is None:
                return say(f"{source}: no labels, it holds null")
            given = {os.path.join(os.path.dirname(lists[0]), name): label for name, label in listed}
            if len(given) < len(listed):
                raise DataError(f"{source}: {len(listed) - len(given)} pictures have a second label")
            left, kind = sorted(given.keys() - set(names)), "labels of absent pictures"
        else:
            classes = {folder: k for k, folder in enumerate(sorted(set(map(os.path.dirname, names))))}
            last, kind = max(classes), "folders without pictures"
            top = os.path.dirname(last)
            if len(classes) == 1:
                return say(f"{path}: no labels, no dataset.json, and all pictures in one folder")
            if odd := [folder for folder in classes if folder == top or os.path.dirname(folder) != top]:
                raise DataError(f"{path}: pictures lie in {odd[0]!r} and in {last!r}; classes are folders "
                                "side by side; move the pictures, or list them in a dataset.json")
            given = {name: classes[os.path.dirname(name)] for name in names}
            inside = [os.path.join(top, d.name) for d in root.joinpath(top).iterdir() if d.is_dir()]
            left = sorted(d for d in inside if d not in classes and not HIDDEN.search(d + "/"))
        if wrong := [n for n in names if type(given.get(n)) is not int or given[n] < 0]:
            raise DataError(f"{source}: no label for {wrong[0]} (found {given.get(wrong[0])!r:.40}), nor for "
                            f"{len(wrong) - 1} others; labels are 0, 1, 2, ...")
        labels = [given[n] for n in names]
        counts = collections.Counter(labels)
        if set(counts) != set(range(len(counts))):
            raise DataError(f"{source}: {len(counts)} labels from {min(counts)} to {max(counts)}; renumber "
                            f"them 0 to {len(counts) - 1}, without a gap")
        text = f"; left out: {len(left)} {kind}, such as {left[0]!r}" if left else ""
        least, most = min(counts.values()), max(counts.values())
        names = "" if lists else f": {', '.join(map(os.path.basename, [*classes][:10]))}"
        say(f"{source}: {len(counts)} classes of {least} to {most} pictures{names}{text}")
        return torch.tensor(labels), len(counts)


def in_batches(items, batch, what):
    """Yields the items, `batch` at a time; every ten seconds the first process reports its progress."""
    start = told = time.time()
    for i in range(0, len(items), batch):
        yield items[i:i + batch]
        done, now = min(i + batch, len(items)), time.time()
        if processes()[0] == 0 and now > told + 10:
            told, left = now, duration((now - start) * (len(items) / done - 1))
            show(f"{done:,}/{len(items):,} {what}, {left} left", sys.stderr)


def check_pictures(names, read, label):
    """Reads every picture once, in threads. Returns "N images, crc32 X", X of shapes and pixels in order.

    DataError names the first three that cannot be read and counts them.
    """
    def checksum(name):
        try:
            image = np.ascontiguousarray(read(name))
        except DataError as error:
            return error
        return zlib.crc32(image, zlib.crc32(repr(image.shape).encode()))
    with ThreadPoolExecutor() as pool:
        parts = in_batches(names, 256, f"pictures of {label} read")
        sums = [answer for part in parts for answer in pool.map(checksum, part)]
    if bad := [error for error in sums if isinstance(error, DataError)]:
        first, remedy = [*map(str, bad[:3])], "mend or remove them"
        if len(remedies := {text.partition("; ")[2] for text in first}) == 1:                    # said once
            first, remedy = [text.partition("; ")[0] for text in first], remedies.pop() or remedy
        raise DataError(f"{'; '.join(first)}; {len(bad)} of {len(names)} pictures cannot be used: {remedy}")
    return f"{len(names)} images, crc32 {zlib.crc32(np.array(sums, '<u4')):08x}"


def listing(path, names):
    """{name: [size, mtime, ctime]} in a folder, {name: [size, CRC]} in a .zip."""
    if os.path.isfile(path):
        with zipfile.ZipFile(path) as file:
            return {name: [file.getinfo(name).file_size, file.getinfo(name).CRC] for name in names}
    with ThreadPoolExecutor() as pool:
        stats = pool.map(lambda name: os.stat(os.path.join(path, name)), names)
        return {name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in zip(names, stats)}


def check_once(path, names, read, note):
    """The first process runs check_pictures for all: read(k) for every index k of names, the files of path.

    Its answer, kept in the file `note`, holds while names, sizes and times (in a .zip: CRCs) are the same.
    DataError in a process that sees other names than the first (or, in a .zip, other CRCs).
    """
    mine = zlib.crc32(repr(listing(path, names) if os.path.isfile(path) else names).encode())

    def check():
        seen = f"{zlib.crc32(repr(listing(path, names)).encode()):08x} "
        answer = pathlib.Path(note).read_text() if os.path.exists(note) else ""
        if not answer.startswith(seen):
            answer = seen + check_pictures(range(len(names)), read, path)
            if KEEP:
                os.makedirs(os.path.dirname(note), exist_ok=True)
                pathlib.Path(note).write_text(answer)
        return mine, answer.partition(" ")[2]
    first, answer = from_first(check)
    if mine != first:
        raise DataError(f"{path} holds other files here than in process 0; all nodes must share --data")
    return answer


def tiles(path):
    """Sheet of grey 8x8 tiles -> those that are not blank, uint8 (n, 8, 8, 1), and the row of each (n,)."""
    sheet = open_picture(path, path)
    if sheet.shape[0] % 8 or sheet.shape[1] % 8 or sheet.shape[2] != 1:
        raise DataError(f"{path}: {sheet.shape} is no sheet of grey 8x8 tiles; for images name a folder")
    grid = sheet.reshape(sheet.shape[0] // 8, 8, -1, 8, 1).swapaxes(1, 2)
    rows, columns = grid.any((2, 3, 4)).nonzero()        # trap: the blank tiles that fill a row are no digits
    return grid[rows, columns], rows


def array_images(path):
    """Images of a .npy, or arr_0 or images of an .npz: uint8 (N, H, W, C) or (N, C, H, W) -> (N, H, W, C)."""
    array = np.load(path, mmap_mode="r")
    if path.lower().endswith(".npz"):
        if not (found := [array[key] for key in ("arr_0", "images") if key in array]):
            raise DataError(f"{path}: holds {', '.join(array)}; expected arr_0 or images")
        array = found[0]
    if array.ndim == 4 and array.shape[3] not in (1, 3):
        say(f"{path}: {array.shape} is read as (N, C, H, W)")
        array = array.transpose(0, 2, 3, 1)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        raise DataError(f"{path}: is {array.dtype} {array.shape}; expected uint8 images (N, H, W, C) as "
                        "arr_0 or images (floats: (x * 255).round().astype('uint8'); grey: x[..., None])")
    return array


def image_source(path):
    """(names, read) of a path that holds images: read(name) -> uint8 (H, W, C)."""
    kind = os.path.splitext(path)[1].lower()
    if os.path.isdir(path) or kind not in (".npy", ".npz", ".png"):
        return list_pictures(path)
    array = tiles(path)[0] if kind == ".png" else array_images(path)
    return range(len(array)), array.__getitem__


def read_images(path, batch=64, rank=0, world=1):
    """Yields images rank, rank + world, ... of a folder, .zip, .npz, .npy, .png sheet as uint8 (b, C, H, W).

    All must have one size. DataError names the file.
    """
    with blame(path):
        names, read = image_source(path)
        shape = read(names[0]).shape
    for some in in_batches(names[rank::world], batch, f"images of {path} read"):
        images = [read(name) for name in some]
        for name, image in zip(some, images):
            if image.shape != shape:
                raise DataError(f"{path}: {name} is {image.shape}, but {names[0]} is {shape} (H, W, C); "
                                "make all of one size")
        yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class Inert(list):
    """Stands in for a pickle's global and what it would make: keeps arguments and state, runs nothing."""
    __slots__ = ()

    def __call__(self, *args):
        return Inert(args)

    def __setstate__(self, state):
        self.extend(state)


class ArrayUnpickler(pickle.Unpickler):
    """Reads numbers, text, containers and numpy arrays (as Inert); refuses every other global by its name."""
    ALLOWED = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
               ("numpy", "ndarray"), ("numpy", "dtype")}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:           # trap: the stock one imports what the file names
            raise DataError(f"refused {module}.{name}: only numbers and numpy arrays are read from a .pkl")
        return Inert()


def float_array(inert):
    """The array that numpy's _reconstruct would have made, as float64 (shape); elements must be floats."""
    *_, shape, dtype, fortran, data = inert
    if dtype[4] + dtype[0] not in ("<f4", "<f8"):
        raise ValueError(f"array of {dtype[4]}{dtype[0]} where floats were expected")
    return np.frombuffer(data, dtype[0]).reshape(shape, order="CF"[fortran]).astype(np.float64)


def read_statistics(path):
    """Reference of an .npz (mu, sigma, maybe n, protocol: EDM, ADM, ours) or of EDM2's .pkl (its "fid")."""
    with blame(path):
        if path.endswith(".pkl"):
            with open(path, "rb") as file:
                stats = ArrayUnpickler(file).load()
            mu, cov = float_array(stats["fid"]["mu"]), float_array(stats["fid"]["sigma"])
            n, features = stats["num_images"], ""
        else:
            with np.load(path) as file:
                mu, cov = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
                n, features = file.get("n", 0), str(file.get("protocol", ""))
        if mu.ndim != 1 or cov.shape != mu.shape * 2:
            raise DataError(f"{path}: mu is {mu.shape} and sigma {cov.shape}; expected (D,) and (D, D)")
        return Reference(torch.from_numpy(mu), torch.from_numpy(cov), int(n), features, path, sha256(path))


def save_statistics(path, reference):
    """Writes a Reference as .npz (mu, sigma, n, protocol)."""
    mu, cov, n, features, *_ = reference
    write_whole(path, lambda file: np.savez(file, mu=mu.cpu(), sigma=cov.cpu(), n=n, protocol=features))


def load_reference(name):
    """Reference of a name in REFERENCES, downloaded to the cache once, or of a file of statistics."""
    if name in REFERENCES and not os.path.exists(name):
        name = fetch([REFERENCES[name]], remedy="save a copy of it there, or give the path of a copy")
    return read_statistics(name)


def image_shape(path, res=0):
    """(H, W, C) of the images that load_images reads, by the first of them."""
    with blame(path):
        names, read = image_source(path)
        return (res, res, 3) if res else read(names[0]).shape


def net_side(side):
    """The largest net size, 16, 32 or 64, that pictures of this side fill; this side itself, if none."""
    return max((res for res in (16, 32, 64) if res <= side), default=side)


def load_images(path, res=0):
    """Images of a folder, .zip or .npz, uint8 (N, C, H, W), whole in memory.

    res > 0: each middle square in RGB, LANCZOS to res; none may be smaller. Else all must have one size.
    """
    shape = image_shape(path, res)
    names, read = image_source(path)
    images, shapes = np.empty((len(names), shape[2], *shape[:2]), np.uint8), [shape] * len(names)

    def keep(k):
        image = read(names[k])
        shapes[k] = image.shape
        if res and min(image.shape[:2]) >= res:
            image = np.asarray(square(rgb(image), res))
        if image.shape == shape:
            images[k] = image.transpose(2, 0, 1)
        return image
    check_pictures(range(len(names)), keep, path)
    if odd := [k for k, s in enumerate(shapes) if (min(s[:2]) < res if res else s != shape)]:
        (h, w, _), fits = shapes[odd[0]], net_side(min(min(s[:2]) for s in shapes))
        what = (f"are too small for --res {res}, such as {names[odd[0]]}, {w}x{h}; take them out, or pass "
                f"--res {fits}" if res else f"are not {shape} (H, W, C) as {names[0]}, such as "
                f"{names[odd[0]]}, {shapes[odd[0]]}; pass --res {fits}, which crops and resizes all")
        raise DataError(f"{path}: {len(odd)} of {len(names)} pictures {what}")
    return torch.from_numpy(images)


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"


def read_cifar(path):
    """The 50,000 training images in cifar-10-python.tar.gz, not unpickled, as the pixels lie in one piece."""
    found = hashlib.md5(pathlib.Path(path).read_bytes()).hexdigest()
    if found != CIFAR_MD5:
        raise DataError(f"{path}: md5 is {found}, expected {CIFAR_MD5}; delete it to download it again")
    marker = b"T" + (10_000 * 3072).to_bytes(4, "little")          # BINSTRING and its length
    with tarfile.open(path) as tar:
        raw = [tar.extractfile(f"cifar-10-batches-py/data_batch_{i}").read() for i in range(1, 6)]
    pixels = b"".join(r[(i := r.index(marker) + 5):i + 10_000 * 3072] for r in raw)
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 3, 32, 32)


def prefetch(name, must=True):
    """Downloads what scoring data of this name needs, before hours of training rather than after.

    Returns whether something is missing. That is a DataError, or a warning if must is False.
    """
    try:
        fetch(INCEPTION_URLS, INCEPTION_SHA256, "save a copy of it there")
        if name in REFERENCES:
            fetch([REFERENCES[name]], remedy="save a copy of it there")
    except DataError as error:
        if must:
            raise
        short = re.sub(r" \(sha256 \w+\)| or http\S+", "", str(error))               # one address will do
        say(f"warning: pictures will be drawn, but not scored: {short}")
        return True
    return False


# ---- images to train on ------------------------------------------------------------------------
def rgb(pixels):
    """uint8 (H, W, 1 or 3) -> a Pillow image in RGB, as crop and square take it."""
    return Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def crop(image, res):
    """Centre crop of ADM and EDM2: halve (BOX) while twice too large, BICUBIC to res. RGB in, RGB out."""
    while min(image.size) >= 2 * res:
        image = image.resize(tuple(n // 2 for n in image.size), Image.BOX)
    scale = res / min(image.size)
    image = image.resize(tuple(round(n * scale) for n in image.size), Image.BICUBIC)
    left, top = (image.width - res) // 2, (image.height - res) // 2
    return image.crop((left, top, left + res, top + res))


def square(image, res):
    """The middle square, LANCZOS to res (U-ViT; own images). RGB in, RGB out."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((res, res), Image.LANCZOS)


def ahead(read, items, threads=1, more=1):
    """Yields read(item) for each of the items, in order; threads already read the next `more`."""
    pool, waiting = ThreadPoolExecutor(threads), collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > more:
                yield waiting.popleft().result()
        yield from (one.result() for one in waiting)
    finally:     # trap: waiting for threads here can hang; garbage collection in any thread may close this
        pool.shutdown(wait=False, cancel_futures=True)


def read_ahead(read, batches):
    """Yields uint8 (B, C, H, W) for each batch of names; threads call read(name) two batches in advance."""
    threads = max(2, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    names = (name for batch in batches for name in batch)
    images = ahead(read, names, threads, 2 * max(map(len, batches), default=0))
    for batch in batches:
        yield torch.from_numpy(np.stack([next(images) for _ in batch])).permute(0, 3, 1, 2)


# ---- encode ------------------------------------------------------------------------------------
SHARD = 1024                         # pictures per shard: the most a kill costs each process


def write_json(path, content):
    """A JSON file, whole or not there."""
    write_whole(path, lambda file: file.write(json.dumps(content).encode()))


def difference(old, new):
    """What has changed between two contents of begun.json, in words; "" if nothing has."""
    was, now = old["pictures"], new["pictures"]
    changes = dict(added=now.keys() - was, removed=was.keys() - now,
                   changed=[name for name in was if now.get(name, was[name])[:2] != was[name][:2]])
    texts = [f"{len(names)} pictures {how}, such as {min(names)}" for how, names in changes.items() if names]
    was, now = old["record"], new["record"]                  # of "NAME, crc32 X" the sum alone is compared
    texts += [f"{key} was {was.get(key)}, now {now[key]}" for key in now
              if str(was.get(key)).rpartition(", ")[2] != str(now[key]).rpartition(", ")[2]]
    return "; ".join(texts)


def begin_encode(folder, record, source, names, read, size):
    """Begins or resumes encoding pictures into a folder, for all processes. Returns their record.

    record: a dict of all that the result depends on: settings and encoders. folder/begun.json keeps it with
    the size and time of each of the names in source; exit code 2 if it was begun with others. First
    read(name) reads all pictures, so that a damaged one is found before hours of work and the record gets
    their checksum. DataError names such a picture, or a disk without room for `size` bytes.
    """
    def begin():
        begun, there = f"{folder}/begun.json", os.listdir(folder) if os.path.isdir(folder) else []
        there = set(there) - {"begun.json.tmp"}       # trap: a kill may leave it alone
        new = dict(record=dict(record, shard=SHARD), pictures=listing(source, names))
        if is_begun := os.path.exists(begun):
            with blame(begun), open(begun) as file:
                old = json.load(file)
                changes = difference(old, new)
            if changes:
                fail(2, f"{folder} was begun with other data: {changes}; delete it, or name another --data")
            new = old
        elif there:
            fail(2, f"{folder} is not ours, it holds {min(there)}; name another --data")
        os.makedirs(folder, exist_ok=True)
        missing = size - sum(entry.stat().st_size for entry in os.scandir(folder))
        if missing > (free := shutil.disk_usage(folder).free):
            raise DataError(f"{folder}: {missing / 1e9:.3g} GB needed, its disk has {free / 1e9:.3g} left")
        if not is_begun:
            new["record"]["pictures"] = check_pictures(names, read, source)
            write_json(begun, new)
        return new["record"]
    return from_first(begin)


@torch.no_grad()
def encode_shards(folder, arrays, names, read, encode, batch):
    """Pictures -> shards of arrays, in the order of names; processes share them and leave when all exist.

    read(name): uint8 (H, W, C); encode(uint8 (B, C, H, W)) -> a tensor (B, ...) for each of the arrays. Shard
    k is folder/<array><k>.npy for each, renamed when whole, so a killed run can go on. batch: how many are
    encoded at a time (0: a shard).
    """
    (rank, world), group, batch = processes(), patient_group(), batch or SHARD

    def files(k):
        return [f"{folder}/{array}{k:05d}.npy" for array in arrays]
    todo = [k for k in range(-(-len(names) // SHARD)) if not all(map(os.path.exists, files(k)))]
    if group:
        dist.barrier(group)              # trap: what a fast process writes would shorten a slow one's list
    shards = {k: names[k * SHARD:(k + 1) * SHARD] for k in todo[rank::world]}
    batches = [(k, part[i:i + batch]) for k, part in shards.items() for i in range(0, len(part), batch)]
    rows, images = [], read_ahead(read, [part for _, part in batches])
    for [(k, part)] in in_batches(batches, 1, f"batches of {batch} pictures encoded into {folder}"):
        rows.append([array.cpu().numpy() for array in encode(next(images))])
        if part[-1] == shards[k][-1]:
            for file, parts in zip(files(k), zip(*rows)):
                write_whole(file, lambda f: np.save(f, np.concatenate(parts)))
            rows = []
    if group:
        dist.barrier(group)


def write_zip(file, parts, record, labels):
    """EDM2's zip of the shards in the folder `parts`: an .npy or .png for each image, and dataset.json."""
    names = []
    with zipfile.ZipFile(file, "w") as z:
        for part in sorted(name for name in os.listdir(parts) if name.endswith(".npy")):
            for image in np.load(f"{parts}/{part}", mmap_mode="r"):
                i, buffer = len(names), io.BytesIO()
                if image.dtype == np.uint8:
                    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
                    picture.save(buffer, format="PNG", compress_level=0)
                    names.append(f"{i // 1000:05d}/img{i:08d}.png")
                else:
                    np.save(buffer, image)
                    names.append(f"{i // 1000:05d}/img-mean-std-{i:08d}.npy")
                z.writestr(names[-1], buffer.getvalue())
        z.writestr("dataset.json", json.dumps({"labels": list(zip(names, labels)), "made_of": record}))


def made_of(path):
    """The record of an encoded folder or .zip: what it was made of, and by which encoders. Else {}."""
    file = next(filter(os.path.isfile, (f"{path}/index.json", f"{path}/dataset.json", path)), "")
    return read_record(file, os.stat(file).st_mtime_ns) if file.endswith((".json", ".zip")) else {}


@functools.cache                     # trap: every batch of samples asks; ImageNet's has a million labels
def read_record(file, when):
    """made_of's answer, from a file that was written at `when`."""
    with blame(file):
        text = zipfile.Path(file, "dataset.json") if file.endswith(".zip") else pathlib.Path(file)
        record = json.loads(text.read_bytes()) if text.exists() else {}
        return record if file.endswith("index.json") else record.get("made_of", {})


def encoder_of(path, kind, load, name, device):
    """load(name, device); name defaults to what made the data at path; exit code 2 if another made them."""
    made, _, stamp = made_of(path).get(kind, "").rpartition(", ")
    encoder = load(name or made, device)
    if stamp and not encoder.identity.endswith(stamp):
        fail(2, f"{path} was made by the {kind} {made}, {stamp}, not by {encoder.identity}; pass that one")
    return encoder


# ---- pictures with words -----------------------------------------------------------------------
NAMES = dict(teacher="teacher", mid="mid-training alone", post="after post-training",
             alone="without mid-training")
SPOKEN = dict(pretrain="pre-training", vgg="VGG", mid="mid-training", post="post-training")
WIDE = 1_800                                             # pixels of a sheet
BY_FEATURES = "The paper compares by features, not by pixels."
COMPARED = dict(huber="pixels", l2="pixels", lpips="VGG features", elatentlpips="VGG features")    # by --loss
ROW = " of this row"
ANNEALED = "with a shrinking gap between the two levels"
LEARNED = ("Students: Mean Flows. Mid-training learns the mean velocity between any two states of a "
           "teacher's trajectory.\nPost-training learns it from images.",
           "Students: consistency models. Mid-training learns the jump from any state of a teacher's "
           "trajectory to its end.\nPost-training learns, from images, to give one answer at two close noise "
           "levels.")
JUMPS = ("between any two states of the teacher's trajectory",
         "from every state of the teacher's trajectory to its end")
FEW = {"1": "one step", "2": "two steps"}                # the steps of students that a heading tells
INKS = {"without|scratch": "#c0392b", "flow": "#8e44ad", "mid|CMT": "#1f5fbf", "teacher|pre-": "#2e8b57",
        "post": "#d98a00", "VGG": "#555555"}             # what a name speaks of: its colour in every chart


def headed(caption):
    """(heading, text below): the first of several lines, and the rest, signed by the running script."""
    heading, _, below = caption.partition("\n") if "\n" in caption else ("", "", caption)
    return heading[:1].upper() + heading[1:], below + f" By {os.path.basename(sys.argv[0])}." * bool(MADE_BY)


def plain(text):
    """Text as Pillow's bundled font can write it: without accents, and a question mark for other letters."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(letters).encode("ascii", "replace").decode()


def boxed(text, wide, font):
    """(text wrapped to at most `wide` pixels, its width, its height); nothing is cut off."""
    # no break before a number, a sign, / or %, after a sign, or inside "mid- and post-training"
    text = re.sub(r" (?=[-%/\d]|\+-)|(?<=[ +]-) |(?<=->) |(?<=[Mm]id-) |(?<=[Mm]id- and) ", "\0", plain(text))
    lines = []
    for part in text.split("\n"):
        for letters in range(int(wide / font.getlength(".")), 0, -1):
            some = [line.replace("\0", " ") for line in textwrap.wrap(part, letters, break_on_hyphens=False)]
            if max(map(font.getlength, some), default=0) <= wide:
                break
        lines += some or [""]
    text = "\n".join(lines)
    return text, *ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)[2:]


def enlarged(images, zoom, mode):
    """(n, C, H, W) in [-1, 1] -> n pictures, `zoom` times as large; latents show three channels."""
    x = images.float().cpu()
    x = x[:, :3] / (2 * x.std() + 1e-9) if x.shape[1] == 4 else x.expand(-1, 3, -1, -1)
    for pixels in to_uint8(x).permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(pixels).convert(mode)
        yield image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)


def save_sheet(path, rows, caption, header=(), breaks=()):
    """Rows of images with words around them -> one PNG, WIDE pixels wide or wider.

    rows: a list of (label, images (n, C, H, W) in [-1, 1], texts...). header: what stands above labels,
    images and texts. Texts are at the right or, if nothing stands above them, below each image. Small
    images are enlarged; latents (4 channels) show three. caption: a heading, a newline, sentences below.
    breaks: numbers of rows after which there is a gap.
    """
    n, (h, w) = max(len(row[1]) for row in rows), rows[0][1].shape[-2:]
    em = max(32, n * w // 60)                            # letters grow with the sheet
    font, gap = ImageFont.load_default(em), em // 4
    labels = [boxed(row[0], 13 * em, font) for row in rows]
    texts = [[boxed(re.sub(r" (?=\+-)|(?<=,) ", "\n", text), WIDE, font) for text in row[2:]] for row in rows]
    corner, *heads = [boxed(text, 8 * em, font) for text in header[:n + 1]] or [("", 0, 0)]
    ends = [boxed(text, 6 * em, font) for text in header[n + 1:]]
    left = max(width for _, width, _ in (corner, *labels)) + 4 * gap
    wides = [max(width for _, width, _ in column) + 4 * gap for column in zip(ends, *texts)]
    zoom = max(1, min(192 // w, -((left + n * gap + sum(wides) - WIDE) // (n * w))))
    zoom = max([zoom, *((width + 3 * gap) // w for _, width, _ in heads)])
    below = [] if ends else sum(texts, [])               # texts below images
    cell = max([w * zoom, *(width + 3 * gap for _, width, _ in (*heads, *below))]) + gap
    right, middles = left + n * cell, [left + k * cell + w * zoom // 2 for k in range(n)]
    middles += [right + sum(wides[:k]) + wide // 2 for k, wide in enumerate(wides)]
    caption += f" Images of {w}x{h} pixels, smoothed." * (zoom > 3 and rows[0][1].shape[1] != 4)
    wide, large = max(WIDE, right + sum(wides)) - 4 * gap, ImageFont.load_default(em * 3 // 2)
    small = ImageFont.load_default(em * 5 // 6)
    title, words = map(boxed, headed(caption), (wide, wide), (large, small))
    top = title[2] + 4 * gap * bool(title[0]) + max(high for *_, high in (corner, *heads, *ends)) + 3 * gap
    heights = [max(h * zoom, high) + gap + 4 * gap * (k in breaks) for k, (*_, high) in enumerate(labels, 1)]
    heights = [high + 5 * gap * bool(below and notes) for high, notes in zip(heights, texts)]
    width = max(WIDE, right + sum(wides) + gap, title[1] + 4 * gap, words[1] + 4 * gap)
    mode = "L" if all(row[1].shape[1] == 1 for row in rows) else "RGB"
    picture = Image.new(mode, (width, top + sum(heights) + words[2] + 5 * gap), "white")
    write, y = functools.partial(ImageDraw.Draw(picture).multiline_text, fill="black", font=font), top
    write((2 * gap, 2 * gap), title[0], font=large)
    write((2 * gap, top - gap), corner[0], anchor="ld")
    for (text, *_), middle in zip((*heads, *ends), middles):
        write((middle, top - gap), text, anchor="md", align="center")
    for (label, _, high), row, notes, height in zip(labels, rows, texts, heights):
        write((2 * gap, y + max(h * zoom, high) // 2), label, anchor="lm")
        for (text, *_), middle in zip(notes, middles if below else middles[n:]):
            at, anchor = (h * zoom + gap // 2, "ma") if below else (max(h * zoom, high) // 2, "mm")
            write((middle, y + at), text, anchor=anchor, align="center")
        for k, image in enumerate(enlarged(row[1], zoom, mode)):
            picture.paste(image, (left + k * cell, y))
        y += height
    write((2 * gap, y + gap), words[0], font=small)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_whole(path, lambda file: picture.save(file, format="PNG", compress_level=1))   # else slow


def save_seeds(path, images, seeds, caption, header=(), columns=16):
    """A sheet of the images of these seeds (there may be fewer images); header: as in save_sheet."""
    rows, columns, step = [], len(header[1:]) or columns, getattr(seeds, "step", 1)
    every = f" by {step}" * (step > 1)
    for k, row in enumerate(images.split(columns)):
        mine = seeds[columns * k:columns * k + len(row)]
        rows.append((f"seeds {mine[0]} to {mine[-1]}{every}", row))
    save_sheet(path, rows, caption, header)


def called(name):
    """What a net is called in pictures; post-training goes on from mid-training where this run has one."""
    both = name == "post" and os.path.exists(f"{OUT}/mid.pt")
    return "mid- and post-training" if both else NAMES.get(name, name)


def net_label(name, steps, sep="\n"):
    """What a row of a sheet is called: net and steps (0: no net)."""
    return f"{called(name)}{sep}{steps} step{'s' * (steps > 1)}" if steps else name


def numbers_of(name, steps, table):
    """{name: number} in a table for a net in `steps` steps; a student's one step also gets those of two."""
    row = {row["stage"].partition(",")[0]: row for row in reversed(table)}.get(name, {})
    found = {key.partition(" ")[2] + ROW * key.startswith(f"{steps}-step F"): value
             for key, value in row.items() if key.startswith(f"{steps}-step ")}
    # listed here since two-step images are not shown: they look like one-step images
    return found | {f"{key.partition(' ')[2]} in two steps": value for key, value in row.items()
                    if steps == 1 and key.startswith("2-step F") and value != "-"}


def about(cfg, found):
    """Lines of a caption: what mid-training compares by; how nets were made, and how large they are.

    found: (name, net, ..., checkpoint) of each.
    """
    sizes = {"teacher" if name == "teacher" else "students":              # frozen weights are buffers
             sum(p.numel() for p in (*net.parameters(), *net.buffers())) for name, net, *_ in found}
    knobs = {name: ckpt.get("cfg", {}) for name, *_, ckpt in found if name in ("mid", "post", "alone")}
    loss, alone = knobs.get("mid", {}).get("loss", "velocities"), knobs.get("alone", {})
    scope, nets = f"with a loss on {COMPARED.get(loss, loss)} " * ("mid" in knobs), home_of(cfg).nets
    seen = {name: ckpt["step"] * ckpt["cfg"]["batch"] for name, *_, ckpt in found if ckpt and ckpt.get("cfg")}
    ours = seen.get("mid", 0) + seen.get("post", 0)
    many = "as many" if ours == seen.get("alone") else f"{ours:,}"
    with_it = f" (with it: {many} pairs and images)" * bool(ours)
    how = ["post-training alone", *[ANNEALED] * (alone.get("post") == "annealed")]
    if alone.get("pretrain") == "fm" and (start := nets.finished(f"{cfg.out}/alone/pretrain.pt")):
        how[0] = f"flow matching on {nets.cost(start)['images']} images, then post-training"
        how += ["in about equal time"] * (cfg.data == "digits")
        first = f"a teacher on {seen.get('teacher', 0):,} images, then " * ("teacher" in seen)
        with_it = f".\nWith it: {first}{ours:,} pairs and images"
    how += [f"on {seen.get('alone', 0):,} images{with_it}"]
    learned = LEARNED[loss != "velocities"] + f" {BY_FEATURES}" * (COMPARED.get(loss) == "pixels")
    if sizes.get("students", 0) > 1.2 * sizes.get("teacher", math.inf):
        learned += f" Students are {sizes['students'] / sizes['teacher']:.1f} times as large as the teacher."
    lines = [f"Without mid-training: {', '.join(how)}."] * bool(alone) + [learned] * ("mid" in knobs)
    return "\n".join([scope, *lines, f"Seed {cfg.seed}."])


def effect(now, without):
    """What mid-training does to a score, lower is better; within 10 % it changes little."""
    return "changes little" if abs(now - without) < 0.1 * without else "helps" if now < without else "hurts"


def beside(distance, now, without, seeds, scope):
    """For a heading: scores {"one step": ..., "two steps": ...} with mid-training of a scope, and without."""
    steps, said = [k for k in without if k in now], {}       # said: {verdict: its steps}
    for k in steps:
        said.setdefault(effect(now[k], without[k]), []).append(k)
    told = ", ".join(f"{verdict} in {' and in '.join(these)}" for verdict, these in said.items())
    ours, others = (" / ".join(f"{side[k]:.2f}" for k in steps) for side in (now, without))
    where = {"FD-digits": "On digits, mid", "FD-photos": "On small photos, mid"}.get(distance, "Mid")
    return f"{where}-training {scope}{told}: {distance} {ours} with it, {others} without ({seeds})"


def distance_of(table):
    """The name of the one-step score in a table, "" if it has none."""
    return next((key.partition(" ")[2] for row in table for key in row if key.startswith("1-step F")), "")


def scores_of(table):
    """{net: {"one step": its score, "two steps": ...}}, last net first; of a net's rows the first counts."""
    return {row["stage"].partition(",")[0]: {
        FEW[key[0]]: float(value.split()[0]) for key, value in row.items()
        if key.startswith(("1-step F", "2-step F")) and value != "-"} for row in reversed(table)}


def headline(table, scope="", seeds="one seed"):
    """For a heading: scores with mid-training and without, if both are there; else of the last student."""
    nets = scores_of(table)
    mid, post, alone = (nets.get(net, {}) for net in ("mid", "post", "alone"))
    if mid and post.keys() & alone.keys():
        return beside(distance_of(table), post, alone, seeds, scope)
    return next((f"{called(net)}: {distance_of(table)} (lower is better) "
                 + ", ".join(f"{v:.2f} in {k}" for k, v in found.items())
                 for net, found in nets.items() if found and net not in ("alone", "teacher")), "")


def of_scores(table, samples):
    """For a caption: what the scores of a table are, and what does not help."""
    few = "; with so few it is off, mostly high" * (samples < 1_024)
    few += " (2,000 new real digits: about 0.4)" * (distance_of(table) == "FD-digits")
    text = (f"\n{distance_of(table)}, lower is better: Frechet distance of {samples:,} samples to the data, "
            f"in a classifier's features{few}.")
    nets = scores_of(table)
    if "mid" in nets and "alone" not in nets:
        text += "\nOnly a run without mid-training tells whether it helps (docs/usage.md)."
    mid, post = nets.get("mid", {}), nets.get("post", {})
    worse = [k for k in mid if k in post and effect(post[k], mid[k]) == "hurts"]
    notes = [f"Post-training makes scores worse in {' and in '.join(worse)}."] * bool(worse)
    if any("shows its digit" in key for row in table for key in row):
        notes += ["Shows its digit: a classifier reads the image as that digit."]
    return text + "\n" * bool(notes) + " ".join(notes)


def save_stages(out, shown, names=(), words="", table=(), samples=2_000):
    """<out>/stages.png: the same noises through every net. The scores are in it once the table has them.

    shown: a list of (net, steps, images (n, C, H, W)); each is drawn in one step, a teacher also in its most.
    names: n texts that say what to draw. Classes stand above the columns; captions, which are long, stand
    at the left, with the nets above. words: end the caption.
    """
    most = max([steps for name, steps, _ in shown if name == "teacher"], default=0)
    shown = [row for row in shown if row[1] < 2 or row[:2] == ("teacher", most)]
    if distance_of(table) == "FD-digits":                  # scored: what should it look like?
        images, classes = digits()
        some = [classes.tolist().index(k % 10) for k in range(len(shown[0][2]))]
        shown = [*shown, ("real digits" + ", 0 to 9" * (not names), 0, to_float(images[some], "cpu"))]
    labels = [net_label(name, steps) for name, steps, _ in shown]
    numbers = [numbers_of(name, steps, table) for name, steps, _ in shown]
    what, line = "class" if "".join(names).isdigit() else "caption", "column"
    start = os.path.commonprefix(names).rpartition(" ")[0]               # of all captions: said once
    if any(len(name) > 16 for name in names):            # captions at the left; nets and numbers above
        columns, line, breaks = torch.stack([x.cpu() for *_, x in shown], 1), "row", ()
        labels = ["\n".join([label, *map(" ".join, found.items())]).replace(ROW, "")
                  for label, found in zip(labels, numbers)]
        rows, header = [*zip(names, columns)], [what, *labels]
    else:
        above = [name.removeprefix(start).strip() for name in names] or [""] * len(shown[0][2])
        keys = {key for found in numbers for key in found}
        keys = sorted(keys, key=lambda key: (not key.startswith("F"), "two" in key, key))
        rows = [(label, row[2], *(found.get(key, "-" * bool(row[1])) for key in keys))
                for label, row, found in zip(labels, shown, numbers)]
        breaks = [k for k in range(1, len(shown)) if shown[k][0] != shown[k - 1][0]]     # another net begins
        what = f"{what}\n{start} ..." if start else what * bool(names)
        header = [what, *above, *keys] if names or keys else ()
    title, _, words = words.partition("\n")
    if not title or title[0].islower():                  # no title, but what mid-training compares by
        title = headline(table, title) or "What every net draws from the same noises"
    last = "; the last row is real" * (not shown[-1][1])
    caption = f"{title}\nIn each {line} every net draws from the same noise{last}."
    caption += " What looks alike can differ in score." + of_scores(table, samples) if table else ""
    path = f"{out}/stages" + f"_{shown[0][0]}" * shown[0][0].startswith("init_") + ".png"    # --init FILE
    if table or not (os.path.exists(path) and os.path.exists(f"{out}/results.md")):     # scores stay
        save_sheet(path, rows, f"{caption}\n{words}", header, breaks)


def save_trajectory(out, states, levels, nets, show=lambda x: x, names=(), words=""):
    """<out>/trajectory.png: a trajectory of the teacher and, below it, every net's answers along it.

    states (N+1, n, C, H, W) at levels (N+1,): sigma, or a flow's t. nets: {name: f(x, level on the CPU) ->
    where all n land in one step}. show: states -> images. names: of each. words: for the caption.
    """
    wide = levels.clamp(min=1).to(states).view(-1, 1, 1, 1, 1)
    moved = (states / wide).diff(dim=0).flatten(1).norm(dim=1).cumsum(0)     # at most nine are shown
    evenly = torch.searchsorted(moved, torch.linspace(0, moved[-1].item(), 9).to(moved)[1:-1]) + 1
    n = len(states)
    some = sorted({0, *evenly.tolist(), n - 1}) if n > 9 else range(n)
    states, levels, wide = states[some], levels[some], wide[some]
    apart = (states[-1] - states[-1].roll(1, 0)).square().mean().sqrt().item()
    along = [(x, level.expand(len(x))) for x, level in zip(states, levels.float())]
    # at zero noise the answer is the state itself, since a consistency model would see ln 0. We leave out
    # "alone", which has its own ends, and, beside mid-training, post-training, which left this trajectory
    answers = {net: torch.stack([f(x, level) if level.all() else x for x, level in along])
               for net, f in nets.items() if net not in ("alone", "post" * ("mid" in nets))}
    words_for = {net: "student after mid-training" if net == "mid" else called(net) for net in answers}
    errors = {net: (x - states[-1]).square().flatten(2).mean(2).sqrt() for net, x in answers.items()}
    k = [torch.zeros(1, 1), *errors.values()][-1][0].median(0).indices.item()      # the noise that is drawn
    name = f"\n{names[k % len(names)]}" if names else ""
    rows = [(f"the teacher's trajectory{name}", show((states / wide)[:, k]))]               # at unit scale
    rows += [(f"{words_for[net]}\nin one step", show(x[:, k]),
              *(f"error {e:.2f}" for e in errors[net][:, k].tolist())) for net, x in answers.items()]
    means = "; ".join(f"{words_for[net]} {error[0].mean().item():.2f}" for net, error in errors.items())
    consistency = bool(levels.max() > 1)
    notes = [f"{len(some)} of {n} states; the others look like their neighbours"] * (len(some) < n)
    notes += ["drawn divided by sigma, where it is above 1"] * consistency
    caption = (f"Mid-training teaches the jump {JUMPS[consistency]}\n"
               "First row: the trajectory, from noise to an image"
               + f" ({'; '.join(notes)})" * bool(notes) + ".\nBelow: each net's answer to each state"
               + "; the teacher's is nearly the mean of all images that this noisy one could have been"
               * (consistency and "teacher" in nets)
               + f".\nError: root mean square distance from the end; two ends are {apart:.2f} apart.\n"
               f"Mean error in the first column, of {states.shape[1]} noises: {means}. "
               "Shown: the noise whose error in the last row is the median."
               + "\nPost-training no longer aims at this end: not shown." * ({"mid", "post"} <= nets.keys())
               + words)
    first, *middle, end = (f"{level:.2g}" for level in levels.tolist())
    header = [f"noise level {'sigma' if consistency else 't'}", f"noise\n{first}", *middle, f"the end\n{end}"]
    save_sheet(f"{out}/trajectory.png", rows, caption, header, (1,))


def ticks_of(low, high, firsts=(1, 2, 5)):
    """Round numbers from the last one below low to the first one above high; firsts: their first digits."""
    ticks = [m * 10.0**e for e in range(-9, 13) for m in firsts]
    return [t for below, t, above in zip([0, *ticks], ticks, [*ticks[1:], math.inf])
            if above >= low and below <= high]


def colours_of(names):
    """{name: (R, G, B)}: the colour of what a name is about, else a free one."""
    own, inks = {name: [ink for words, ink in INKS.items() if re.search(words, name)] for name in names}, {}
    for name in sorted(own, key=lambda name: not own[name]):                # those with a colour of their own
        free = [ink for ink in (*own[name], *INKS.values()) if ink not in inks.values()]
        inks[name] = [*free, *INKS.values()][0]
    return {name: ImageColor.getrgb(ink) for name, ink in inks.items()}


def save_chart(path, panels, caption, across="images", marks=(), columns=1):
    """{title: {name: [(x, y)]}} -> a PNG, one panel per title; x counts `across`; y, above 0, is logarithmic.

    (x, y, low, high) gets an error bar. marks: {x: what begins there}. columns: how many panels stand
    side by side; several have own axes and no legends.
    """
    font, width = ImageFont.load_default(64), 4000                       # twice the size of the file: smooth
    panels = {title: {plain(name): seen for name, points in curves.items()
                      if (seen := [p for p in points if 0 < p[1] < math.inf])}
              for title, curves in panels.items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    colours = colours_of([*dict.fromkeys(name for curves in panels.values() for name in curves)])
    labels = [[name + f": {points[-1][1]:.2f}" * ("better" in title) for name, points in curves.items()]
              for title, curves in panels.items()]
    legend = round(max([0, *map(font.getlength, sum(labels, []))])) + 220 if columns == 1 else 0
    cell, rows = (width - legend) // columns, -(-len(panels) // columns)
    titles = [boxed(title + " (log scale)" * (columns == 1), cell - 400, font)[0] for title in panels]
    over = 160 + 76 * max([0, *(title.count("\n") for title in titles)])                    # for the title
    height = over + max(570, 1140 - 220 * rows) + 200
    heading, words = headed(caption)
    wide, large = width - 420, ImageFont.load_default(96)
    heading, words = boxed(heading, wide, large), boxed(words, wide, font)
    above = heading[2] + 100 * bool(heading[0])
    picture = Image.new("RGB", (width, above + height * rows + words[2] + 80), "white")
    pen = ImageDraw.Draw(picture)
    pen.multiline_text((320, 60), heading[0], "black", large)
    ends = [max(x for points in curves.values() for x, *_ in points) or 1 for curves in panels.values()]
    for k, (title, curves) in enumerate(panels.items()):
        left, top = 320 + k % columns * cell, above + k // columns * height + over
        right, bottom = left + cell - 420 + 20 * (columns > 1), top - over + height - 200
        ys = [y for points in curves.values() for _, *some in points for y in some]
        shared = columns == 1 and 5 * ends[k] > 2 * max(ends)        # panels of like length share their axis
        end = max(ends) if shared else ends[k]
        step = next(t for t in ticks_of(1e-9, end) if end / t <= (6 if columns == 1 else 4))
        end = step * math.ceil(end / step)
        unit, letter = next((u, s) for u, s in ((1e6, "M"), (1e3, "k"), (1, "")) if step >= u or u == 1)
        middle = (min(ys) * max(ys)) ** 0.5                                  # a flat curve should look flat
        ys = [*ys, middle / 2, middle * 2]
        ticks = ticks_of(min(ys), max(ys))
        if not 3 < len(ticks) < 9:
            ticks = ticks_of(min(ys), max(ys), (1, 1.5, 2, 3, 4, 5, 7) if len(ticks) < 4 else (1,))
        low, high = math.log(ticks[0]), math.log(ticks[-1]) + (len(ticks) == 1)

        def at(x, y):
            return (left + (right - left) * x / end,
                    bottom - (bottom - top) * (math.log(y) - low) / (high - low))
        for y in ticks:
            pen.line([at(0, y), at(end, y)], "#dddddd", 4)
            pen.text((left - 32, at(0, y)[1]), f"{y:,g}", "black", font, anchor="rm")
        for x in range(round(end / step) + 1):
            text = f"{x * step / unit:,g}{letter * (x > 0)}"
            pen.text((at(x * step, ticks[0])[0], bottom + 24), text, "black", font, anchor="mt")
        pen.multiline_text((left, top - 32), titles[k], "black", font, anchor="ld")
        counted = "pairs" if title.startswith("mid-training:") else across
        pen.text((left, bottom + 100), counted, "black", font, anchor="lt")
        for row, (x, begins) in enumerate(dict(marks).items()):
            x, _ = at(x, ticks[0])
            pen.line([(x, top), (x, bottom)], "#999999", 4)
            pen.text((x + 20, top + 8 + 88 * row), begins, "#555555", font, anchor="lt")
        few = sum(map(len, curves.values())) < 20 * len(curves)  # what was measured, as dots
        for row, (name, points) in reversed([*enumerate(curves.items())]):       # the first one on top
            dots = [at(x, y) for x, y, *_ in points]
            level = len(dots) == 2 and dots[0][1] == dots[1][1]              # a reference line: dashed
            for x in range(int(dots[0][0]), int(dots[1][0]), 60) if level else ():
                pen.line((x, dots[0][1], x + 36, dots[0][1]), colours[name], 8)
            if len(dots) > 1 and not level:
                pen.line(dots, colours[name], 8, joint="curve")
            for (x, y), (at_x, _, *bar) in zip(dots, points) if (few or len(dots) == 1) and not level else ():
                pen.ellipse((x - 16, y - 16, x + 16, y + 16), colours[name])
                for tip in (at(at_x, tip)[1] for tip in bar):
                    pen.line([(x - 20, tip), (x + 20, tip)], colours[name], 6)
                    pen.line([(x, tip), (x, y)], colours[name], 6)
            x, y = right + 80, top + 88 * row
            if columns == 1 and (k == 0 or labels[k] != labels[k - 1]):                  # said once
                for dash in ((0, 18), (30, 48)) if level else ((0, 48),):
                    pen.rectangle((x + dash[0], y + 16, x + dash[1], y + 40), colours[name])
                pen.text((x + 80, y), labels[k][row], "black", font, "lt")
    pen.multiline_text((320, above + height * rows + 20), words[0], "black", font)
    write_whole(path, lambda file: picture.reduce(2).save(file, format="PNG", compress_level=1))


# ---- a run of a script --------------------------------------------------------------------------
OUT = ""                                                 # folder of the first process's run, with its log.txt
MADE_BY = ""                                             # its command, torch, device and commit
SAID = []                                                # lines about files: also before there is a folder
PACE = []                                                # seconds and step of a process's first line
KEEP = True                                              # False in a dry run, which writes nothing


def show(text, stream):
    """Print a line. If nobody reads on (`| head`, a closed terminal), the output ends but not the run."""
    try:
        print(text.encode(errors="backslashreplace").decode(), file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def write_line(file, text):
    """Adds a line to a file of the run's folder, if there is one."""
    if os.path.isdir(OUT):                                   # a new folder is removed if nothing began
        with open(f"{OUT}/{file}", "a", errors="backslashreplace") as f:
            f.write(text + "\n")


def log(text, **numbers):
    """A line on the screen and in log.txt; numbers, if any, go to metrics.jsonl. First process only."""
    if processes()[0] == 0:
        show(text, sys.stdout)
        write_line("log.txt", text)
        if numbers:
            write_line("metrics.jsonl", json.dumps(numbers))


def say(text, everyone=False):
    """A line about files, once, from the first process: on stderr, apart from results, and in a run's log."""
    if (everyone or os.environ.get("RANK", "0") == "0") and text not in SAID:      # all stages open the same
        SAID.append(text)
        show(text, sys.stderr)
        write_line("log.txt", text)


def fail(code, message):
    """One line, then exit: 1 crash, 2 usage or config, 3 data or weights, 4 diverged, 75 stopped, saved."""
    with contextlib.suppress(OSError):                                    # 1, 3 may strike one process alone
        say(f"{os.path.basename(sys.argv[0])}: {message}", everyone=code in (1, 3))
    raise SystemExit(code)


@contextlib.contextmanager
def one_line(cfg, *errors):
    """Turns errors that a user can fix into one line and an exit code; all others remain crashes.

    errors: those besides DataError and OSError. cfg: the Config whose flags the line names.
    """
    try:
        yield
    except KeyboardInterrupt:
        leave(2, None)
    except (DataError, OSError, *errors) as e:
        full = getattr(e, "errno", 0) in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)
        text = first_line(e) + f"; free some space for {cfg.out} and run again" * full
        flags = [f"--{k} " for k, v in vars(cfg).items() if v and text.startswith(f"{v}: ")]
        fail(3, "".join(flags[:1]) + text)                # with the flag that names the file, if any
    except torch.OutOfMemoryError as e:
        now = cfg.batch_gpu or cfg.batch // processes()[1]
        fail(1, f"{first_line(e)} Run again with a --batch_gpu smaller than {now}")
    except Exception as e:
        if isinstance(e, AssertionError) and re.search("no branch|returns nothing", str(e)):
            fail(2, f"{first_line(e)}; is a return missing? (docs/forking.md)")    # what a fork forgot
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail(2, f"--compile: {' '.join(str(e).split()[:40])}; mend the compiler, or pass --no-compile")
        calls = [f.line for f in traceback.extract_tb(e.__traceback__) if "dist." in f.line]
        if calls and isinstance(e, RuntimeError):
            fail(1, f"{calls[0]}: {first_line(e)}; if another process died, it says why; run again")
        write_line("log.txt", traceback.format_exc().rstrip())
        raise


def leave(number, frame):
    """Exit on a signal, with nothing half done: one line, no traceback."""
    say("stopped by a signal; nothing is lost, the same command does it again")
    os._exit(128 + number)


def open_out(out, script, argv):
    """Makes the folder of a run, locks it (two runs would mix), begins its log. First process only."""
    global OUT, MADE_BY
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        fail(2, f"--out {out}: {error.strerror}; name another folder")
    lock = open(f"{out}/.lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)    # released by the system, however the process ends
    except BlockingIOError:
        lock.seek(0)
        fail(2, f"another run ({lock.read()}) is at work in {out}; use another --out")
    except OSError:
        show(f"warning: {out} cannot be locked; start no second run in it", sys.stderr)
    lock.truncate(0)
    print(f"process {os.getpid()} on {os.uname().nodename}", end="", file=lock, flush=True)
    OUT = out
    metrics = pathlib.Path(out, "metrics.jsonl")
    if metrics.is_file() and metrics.read_bytes()[-1:] not in (b"", b"\n"):
        write_line(metrics.name, "")                        # trap: else the next line is lost with a cut one
    folder, name = os.path.split(os.path.abspath(script))
    git = f"git -C '{folder}' describe --always --dirty --exclude='*' 2>/dev/null || echo unknown"
    commit = subprocess.getoutput(git)                      # -dirty: with changes of your own
    untracked = subprocess.getoutput(f"git -C '{folder}' ls-files --others '{name}' 2>/dev/null")
    commit += f", {name} not committed" * (untracked == name)          # a fork
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    MADE_BY = f"{name} {shlex.join(argv)} | torch {torch.__version__} | {device} | commit {commit}"
    log(MADE_BY)
    for text in SAID:
        write_line("log.txt", text)
    return lock


SCORED = "seeds samples repeat second_sigma".split()                       # knobs that no training reads
DRAWN = "second_sigma sigma_shift labels sampler precision w"              # change samples of the same net
INITS = "teacher", "random"                                  # all other values of --init are a FILE
SAMPLED = f"init nfe nodes prompts omega kappa guide_from guide_to {DRAWN}"           # knobs of sampling, too


def of_samples(home):
    """Names of knobs on which no weight depends, or on which samples do."""
    return f"{home.NO_WEIGHT} {SAMPLED}".split()


def same_folder(cfg, script, argv):
    """Exit code 2 if another script, other data or, for eval and sample, other knobs made a folder.

    A stage that trains compares its own knobs. A warning asks for a teacher that lies elsewhere.
    """
    home, path = home_of(cfg), pathlib.Path(cfg.out, "config.json")
    if not path.is_file():
        return
    with blame(path):
        made = [dict(c, data=os.path.basename(c["data"])) for c in json.loads(path.read_text()).values()]
    now = dict(vars(cfg), script=os.path.basename(script), data=os.path.basename(cfg.data))
    drawn, own = cfg.stage in ("eval", "sample"), home.data_name(cfg) == "own"
    typed = [word[2:].partition("=")[0] for word in argv if word.startswith("--")]
    knobs = [k for k in (*["res"] * ("res" in now), *typed) if k in now and k not in of_samples(home)]
    for k in ("script", *["data"] * (drawn or not own), *knobs * drawn):
        was = dict.fromkeys(c[k] for c in made if k in c)
        if was and now[k] not in was and (k != "script" or str([*was][0]).startswith("train_")):
            flag, teacher = k if k == "script" else f"--{k}", f"{cfg.out}/pretrain.pt"
            how = f"; a copy of that script keeps its teacher by --teacher {teacher}"
            fail(2, f"{cfg.out} was made with {flag} {', '.join(map(str, was))}, now {now[k]}; use another "
                    "--out, or the flags of then" + how * (k == "script" and os.path.exists(teacher)))
    told = [c["teacher"] for c in made if c.get("teacher", "scratch") not in ("", "scratch")]
    if drawn and told and not cfg.teacher and not os.path.exists(cfg.init):
        say(f"warning: its teacher is neither drawn nor scored; pass --teacher {told[-1]}")


def check_start(cfg):
    """Exit code 3 where --stage mid or --stage post, asked for alone, lacks what it starts from."""
    home, out = home_of(cfg), pathlib.Path(cfg.out)
    if cfg.mid == "none" or (out / f"{cfg.stage}.pt").exists():           # left out; or begun: it goes on
        return
    if cfg.stage == "post" and cfg.init in INITS:
        finished_mid(cfg, home.nets.finished)
    given = cfg.teacher not in ("", "scratch") or home.data_name(cfg) in home.nets.PRETRAINED
    if cfg.stage == "mid" and not given and not (out / "pretrain.pt").exists():
        home.teacher_state(cfg)


@contextlib.contextmanager
def begin_run(cfg, script, argv):
    """The first process calls open_out; all compare its log. A new folder is removed if nothing began."""
    out = cfg.out
    new = not os.path.exists(out)
    lock = contextlib.nullcontext() if processes()[0] else open_out(out, script, argv)
    if group := patient_group():
        dist.barrier(group)
    path = pathlib.Path(out, "log.txt")
    seen = path.read_bytes() if path.is_file() else b""       # its size alone may be an old one over NFS
    agree(path, f"{len(seen)} bytes, crc32 {zlib.crc32(seen):08x}")
    with lock:
        try:
            check_start(cfg)
            yield
            if os.path.exists(f"{out}/{cfg.stage}.pt"):       # after one stage; a full run ends with a table
                names = {"res", *of_samples(home_of(cfg))} - {"data", "stage", "seeds", "init", "precision"}
                log(f"{cfg.stage}: done; open curve.png and previews in {out}; to draw and score it: "
                    + command(cfg, "eval", names - {"compile", "batch_gpu", "log_every", "save_every"}))
        except BaseException:
            if new and processes()[0] == 0 and {*os.listdir(out)} == {".lock", "log.txt"}:
                shutil.rmtree(out)
            raise


def home_of(cfg):
    """The script at work, a module: the one whose Config this is."""
    return sys.modules[type(cfg).__module__]


def words_of(cfg):
    """ABOUT's sentence on a stage: the one for its method, as "post mine", else for the stage."""
    about = home_of(cfg).ABOUT
    return about.get(f"{cfg.stage} {getattr(cfg, cfg.stage, '')}", about[cfg.stage])


def parse(home, argv):
    """argv (list of str) -> Config. Exit code 2 for an unknown flag or bad choice. home: the script's module.

    Weakest first: a field's default, the matching rows of PRESETS from top to bottom, --field, --stage.field.
    """
    config, presets = home.Config, home.PRESETS
    p = parser(home.__doc__, config, tuple(home.STAGES))
    if asks := {"-h", "--help"} & {*argv}:
        p.epilog = f"{inspect.getsource(config)}\n{given(home, [a for a in argv if a not in asks])}"
    typed = vars(p.parse_args(argv))                         # only what was typed: for all stages, or for one
    own = f"{typed.get('stage', 'all')}."
    named = getattr(home, "NEED_STAGE", {}).get(own[:-1], "").split()
    flags = {k: v for k, v in typed.items() if "." not in k and k not in named and (k, v) != ("out", "")}
    flags |= {k.removeprefix(own): v for k, v in typed.items() if k.startswith(own)}
    name = home.data_name(config(**flags))
    whole = config(**{**presets.get((name, "*", "*"), {}), **flags})
    key = name, whole.stage, getattr(whole, whole.stage, "*")      # the method is what --mid or --post says
    rows = [row for pattern, row in presets.items() if all(a in ("*", b) for a, b in zip(pattern, key))]
    preset = {field: value for row in rows for field, value in row.items()}
    path = pathlib.Path(whole.data)
    folder = (path.name if path.is_dir() else path.stem) or name if name == "own" else name
    return config(**{"out": f"out/{folder}", **preset, **flags})


def stages_of(home, argv):
    """The Config of each stage that a command of the script `home` runs."""
    global OUT
    OUT = ""                                                 # left by an earlier call in this process
    SAID.clear()
    cfg = parse(home, argv)
    seed_range(cfg.seeds)                                    # is it one?
    stages = home.STAGES if cfg.stage == "all" else [cfg.stage]
    configs = [parse(home, [*argv, "--stage", stage]) for stage in stages]
    idle = ["pretrain"] * (cfg.teacher not in ("", "scratch")) + ["mid"] * (cfg.mid == "none")

    def unread(stage, field):
        if stage in ("eval", "sample"):
            never = dict(eval=["seeds"], sample=["samples", "repeat"])[stage]
            return field not in of_samples(home) or field in never
        from_mid = stage == "post" and cfg.stage == "all" and cfg.mid != "none"
        never = never_read(dataclasses.replace(cfg, stage=stage))
        return field in (*never, *SCORED, "init" * from_mid)

    for flag in [word.partition("=")[0] for word in argv if word.startswith("--")]:
        stage, dot, field = flag[2:].removeprefix("no-").rpartition(".")
        if dot and unread(stage, field):
            fail(2, f"{flag}: {stage} never reads it; leave it out")
        asked = [s for s in stages if stage in ("", s) and not (s in idle and stages[1:])]
        if field not in home.STAGES and all(unread(s, field) for s in asked):
            if cfg.stage == "all":
                say(f"warning: {flag} has no effect: no stage of this run reads it")
            elif dot or cfg.stage not in home.RUN or field in SCORED:        # same_folder compares the others
                log(f"{cfg.stage} reads no {flag}")          # it may be given the flags of a whole run
    for k, c in enumerate(configs):                          # --init FILE starts the first stage, not all
        later = cfg.stage == "all" and (c.stage == "eval" or (c.stage == "post" and c.mid != "none"))
        if later and c.init not in INITS:
            configs[k] = dataclasses.replace(c, init=home.Config.init)
    # a number that READ_BY denies a stage has its default there, so a wrong row shows up
    plain = {f.name: f.default for f in dataclasses.fields(home.Config) if f.type in (int, float, bool)}
    return [dataclasses.replace(c, **{k: plain[k] for k in plain.keys() & {*never_read(c)}}) for c in configs]


def name_of(function):
    """A function's name, and what a functools.partial fixes: "dpmpp order=2"."""
    fixed = [f"{name}={value}" for name, value in getattr(function, "keywords", {}).items()]
    return " ".join([getattr(function, "func", function).__name__, *fixed])


def given(home, argv):
    """For --help: the values that these flags give to every stage, and those that differ between stages."""
    configs = {c.stage: vars(c) for c in stages_of(home, argv)}
    configs = {stage: c for stage, c in configs.items() if stage not in home.RUN} or configs   # that train
    first, *others = configs.values()
    same = {name: value for name, value in first.items() if all(c[name] == value for c in others)}
    lines = {"With these flags": same}
    for stage, c in configs.items():
        lines[f"--stage {stage}"] = {name: value for name, value in c.items() if name not in same}
    return "\n".join(f"{line}: " + ", ".join(f"{name} = {value!r}" for name, value in values.items())
                     for line, values in lines.items() if values)


@functools.cache
def parser(doc, config, stages):
    """Every field of a class of knobs as a flag, for all stages and, as --mid.lr, for one alone."""
    p = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                argument_default=argparse.SUPPRESS, usage="%(prog)s [--field value ...]")
    flags = []
    p.error = functools.partial(refuse, flags, "--help lists every flag")
    for f in dataclasses.fields(config):
        kind = dict(type={int: int, float: float}.get(f.type, str), choices=typing.get_args(f.type) or None)
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
            flags.append(f"no-{f.name}")
        own = () if f.name in (*OF_FOLDER, "dry_run") else stages
        for stage in ("", *(f"{name}." for name in own)):
            flags.append(f"{stage}{f.name}")
            p.add_argument(f"--{flags[-1]}", help=argparse.SUPPRESS, **kind)
    return p


REMEDIES = {"arguments: (?i:true|false|yes|no|on|off)$|explicit arg": "a switch is --NAME or --no-NAME; ",
            "arguments: \\d+( \\d+)*$": "a range is one word: --seeds 0-2; ",
            "arguments: -?[\u2010-\u2015\u2212]": "write a flag with two plain hyphens: --steps; ",
            "arguments: (?![-\u2010-\u2015\u2212\\d]|(?i:true|false|yes|no|on|off)$)":
            "a value stands behind its flag, --steps 3; ",
            "--(resume|continue)": "the same command, without it, goes on; ",
            "--(fp16|fp32|tf32|bf16|amp)": "write --precision bf16 or fp32; ",
            "--no.mid": "write --mid none; ",
            "--(device|(num_|n)?gpus?|cuda|nproc.*)( |$)":
            "torchrun --nproc_per_node=N runs on N GPUs, CUDA_VISIBLE_DEVICES=0 picks one; ",
            "--post: invalid choice: 'none'": "leave post-training out by --stage mid; ",
            "expected one argument": "write its value behind it (below 0: --NAME=-1); ",
            "not a whole number": "write its digits, as 1000; ", "not a number": "write 0.001 or 1e-3; "}
OF_FOLDER = "data", "stage", "out", "pretrain", "mid", "post"           # flags of a run, not of one stage
MEANT = dict(lr="learning_rate", steps="epochs num_epochs iterations max_steps", batch="batch_size",
             out="output output_dir save_dir", init="checkpoint ckpt", labels="class classes", ema_beta="ema")


def refuse(flags, where, message):
    """Exit code 2 for a command line that argparse rejects; for an unknown flag, suggests the one meant."""
    for value, words in {"int": "not a whole number", "float": "not a number"}.items():
        message = message.replace(f"invalid {value} value", words)
    unknown = re.search(r"unrecognized arguments: --([\w.-]+)", message)
    typed = unknown[1].replace("no_", "no-") if unknown else ""
    here = {word: flag for flag, words in MEANT.items() for word in words.split()}           # elsewhere: here
    meant = re.sub(r"[^.]+$", lambda name: here.get(name[0].replace("-", "_"), name[0]), typed)
    meant = meant.rpartition(".")[2] if meant.rpartition(".")[2] in OF_FOLDER else meant
    known = [flag for flag in {*flags} - {unknown and unknown[1]} if not re.match(r"(eval|sample)\.", flag)]
    more = "".join(f"did you mean --{flag}? " for flag in difflib.get_close_matches(meant, known, 1, 0.7))
    if typed and not more:
        texts = {p.name: p.read_text() for p in sorted(pathlib.Path(__file__).parent.glob("train_*.py"))}
        others = " and ".join(name for name, text in texts.items() if f"\n    {typed}: " in text)
        more = f"it is a flag of {others}; " * bool(others)
    more = "".join(text for words, text in REMEDIES.items() if re.search(words, message)) or more
    fail(2, f"{message}; {more}{where}")


def commands(home, prog):
    """The parser of a tool; home is its globals(). Commands are functions; USES names the FLAGS of each."""
    p = argparse.ArgumentParser(description=home["__doc__"],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    where = f"flags: python {prog} {{{','.join(home['USES'])}}} --help"
    p.error = functools.partial(refuse, [*home["FLAGS"]], where)
    what = p.add_subparsers(dest="what", metavar="WHAT", required=True, help="its flags: WHAT --help")
    devices = ["cpu", "cuda"][:1 + torch.cuda.is_available()]
    flags = dict(home["FLAGS"], device=dict(default=devices[-1], choices=devices))
    for command, names in home["USES"].items():
        about = home[command].__doc__
        own = what.add_parser(command, help=about, description=about, allow_abbrev=False)
        own.error = p.error
        for name in names.split():
            own.add_argument(name if "nargs" in flags[name] else f"--{name}", **flags[name])
    return p


def check_values(cfg, limits, world):
    """Checks a stage's knobs against limits {(rule, test): names}; exit code 2 names the remedy.

    world: number of processes that train, 0 if a stage does not train.
    """
    home, idle = home_of(cfg), never_read(cfg)
    for (rule, possible), names in limits.items():
        for name in [name for name in names.split() if name not in idle]:
            if not possible(getattr(cfg, name)) or abs(getattr(cfg, name)) == math.inf:
                fail(2, f"--{name} {getattr(cfg, name)} is not possible; it must be {rule}")
    path = os.sep in cfg.data or "." in cfg.data or os.path.exists(cfg.data)
    if home.data_name(cfg) == "own" and cfg.stage != "encode" and not path:
        names = [*(home.FILES if type(cfg).data in home.FILES else [type(cfg).data]), "digits"]
        meant = difflib.get_close_matches(cfg.data.lower(), names, 1)
        more = f"did you mean {meant[0]}?" if meant else f"pass one, or {', '.join(names)}"
        fail(2, f"--data {cfg.data}: no file or folder, nor the name of a data set; {more}")
    if world and cfg.batch % world:
        fail(2, f"--batch {cfg.batch}: {world} processes share it; pass {-(-cfg.batch // world) * world}")
    share = cfg.batch // max(world, 1)
    if world and cfg.batch_gpu and share % cfg.batch_gpu:
        fits = max(k for k in range(1, min(cfg.batch_gpu, share) + 1) if share % k == 0)
        fail(2, f"--batch_gpu {cfg.batch_gpu} must divide the {share} of --batch in a process; pass {fits}")
    if cfg.stage in ("sample", "eval"):
        check_named(cfg)
    check_out(cfg.out)
    for name in {"res", "vae", "encoders"} & {*vars(cfg)} if cfg.data == "digits" else ():
        if getattr(cfg, name) not in (8, getattr(type(cfg), name)):
            fail(2, f"--{name} {getattr(cfg, name)}: --data digits has 8x8 pixels; leave --{name} out")
    if cfg.data == "digits" and cfg.stage == "encode":
        fail(2, "--stage encode: --data digits needs none; leave --data out, or name what is to be made")


def check_named(cfg):
    """Exit code 3 for a --teacher or --init that is neither a file nor what can be fetched."""
    for flag in ("teacher", "init"):
        name = getattr(cfg, flag)
        known = name in ("", "scratch", *INITS) or name.startswith("edm2-") or "://" in name
        if not known and not os.path.exists(name):
            fail(3, f"--{flag} {name}: no such file; give a file or a URL")


def check_out(out):
    """Exit code 2 unless --out is a folder that may be written to, or can become one."""
    above = (pathlib.Path(out), *pathlib.Path(out).absolute().parents)
    there = next(p for p in above if p.exists() or p.is_symlink())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "may not be written to" if there.is_dir() else "is a file, or leads nowhere"
        fail(2, f"--out {out}: {there} {why}; name another folder")


def check_solve(cfg, n, used, world):
    """Exit code 2 unless the pairs, `used` of each of n trajectories, fill whole batches on all processes."""
    if not n * used or n * used % cfg.batch:
        states = f"--nodes {cfg.nodes}" if hasattr(cfg, "nodes") else f"--nfe {cfg.nfe}"
        least = cfg.batch // math.gcd(cfg.batch, used)
        fail(2, f"the {n * used} pairs of {states} and --trajectories {cfg.trajectories} must fill whole "
                f"batches of --batch {cfg.batch}; pass --trajectories {least} or a multiple")
    if n % world:
        fail(2, f"the {n} --trajectories of a solve must be a multiple of the {world} processes")


def finished_mid(cfg, finished):
    """The checkpoint of mid-training, that post-training starts from; exit code 3 without it."""
    path = f"{cfg.out}/mid.pt"
    return finished(path) or fail(3, f"{path} is not finished; run --stage mid first, or pass --mid none or "
                                  "--init FILE")


def seed_range(text):
    """--seeds "7", "0-63" or, for every tenth, "7-997:10" -> range; exit code 2 if it is none of these."""
    found = re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        fail(2, f"--seeds {text or repr(text)} is not possible; write 7, 0-63 or 7-997:10")
    return range(int(found[1]), int(found[2] or found[1]) + 1, int(found[3] or 1))


# ---- processes and stages -----------------------------------------------------------------------
TIMEOUT = datetime.timedelta(minutes=10)              # choice: ten minutes for an answer in a step


def processes():
    """(rank, number) of torchrun's processes; (0, 1) of one alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def patient_group():
    """A group in which all processes can wait for days for one that reads; None if there is only one."""
    return patient_group_of(dist.group.WORLD) if dist.is_initialized() else None


@functools.cache
def patient_group_of(world):
    """A patient_group, made once for each `world` that the processes form."""
    atexit.register(leave_groups)
    return dist.new_group(timeout=datetime.timedelta(days=9), backend="gloo")


def leave_groups():
    """Ends this process's groups at its exit, also after a refusal; peers on GPUs may still be at work."""
    patient_group_of.cache_clear()       # trap: Python ends in an abort, code -6, where it finds one alive
    if dist.is_initialized() and not torch.cuda.is_available():
        dist.destroy_process_group()


def agree(what, facts):
    """Exit code 3 where processes have read different files."""
    seen = [facts] * processes()[1]
    if group := patient_group():
        dist.all_gather_object(seen, facts, group)
    if others := [k for k, facts in enumerate(seen) if facts != seen[0]]:
        fail(3, f"{what}: {seen[0]} in process 0, {seen[others[0]]} in process {others[0]}; all nodes must "
                "share --out, --data and weights")


def same_data(ckpt, path, data):
    """Exit code 2 if the checkpoint at path, if there is one, saw other data or asked another teacher."""
    if ckpt and ckpt["data"] != data:
        was, now = (text.replace("none, teacher", "a teacher of") for text in (ckpt["data"], data))
        fail(2, f"--data or --teacher has changed: {path} saw {was}, now {now}; use another --out")


def same_names(cfg, ckpt):
    """Whether file names suffice: they match the checkpoint, and mid has no teacher FILE: it may be new."""
    is_file = cfg.stage == "mid" and os.path.exists(cfg.teacher)
    names = {"data", "teacher", "main", "guide"} & {*vars(cfg)}
    return not is_file and all(ckpt["cfg"][name] == vars(cfg)[name] for name in names)


def say_changed(found, stamp):
    """Warns of each net that was trained on images other than those of this stamp ("": any will do)."""
    for name, *_, ckpt in found:
        if ckpt and not ckpt["data"].startswith((stamp, "none")):
            say(f"warning: --data has changed since {name} was trained; it is compared with what is there")


def made_by(script):
    """What a checkpoint says of its script: the name, and a checksum of its text, nets and solvers."""
    beside = [sys.modules[name].__file__ for name in ("nets", "solvers") if name in sys.modules]
    texts = [pathlib.Path(path).read_bytes() for path in (script, *beside)]
    return dict(script=os.path.basename(script), code=zlib.crc32(b"".join(texts)))


def steps_left(cfg, ckpt, path):
    """Steps that a stage still has to go from ckpt, which may be None; exit code 2 if other knobs made it.

    Knobs that it never reads may differ; so may steps, if no later stage has begun from here.
    """
    home = home_of(cfg)
    after = home.STAGES[home.STAGES.index(cfg.stage) + 1:]
    later = [s for s in after if os.path.exists(f"{cfg.out}/{s}.pt")]
    if cfg.stage == "pretrain" and later and not ckpt:
        fail(2, f"{cfg.out}/{later[0]}.pt went on from a teacher that is not there; pass its --teacher again "
                f"(config.json has it, if it had one), put {path} back, or use another --out")
    if cfg.stage == "mid" and later and not ckpt:
        fail(2, f"{path} is not there, {later[0]}.pt, which went on from it, is; move it away too, or use "
                "another --out")
    made, here = ckpt.get("script", "an older script") if ckpt else "", made_by(inspect.getfile(type(cfg)))
    if ckpt and made.startswith("train_") and made != here["script"]:
        fail(2, f"{path} was made by {made}, not by {here['script']}; use another --out")
    if ckpt and ckpt.get("code", here["code"]) != here["code"]:
        say(f"warning: {made}, nets.py or solvers.py was changed since {cfg.out} was begun; to train that "
            "anew, use another --out")                       # once for all stages
    may = {*never_read(cfg), *home.NO_WEIGHT.split()}
    old = {f.name: ckpt["cfg"].get(f.name, f.default) for f in dataclasses.fields(cfg)} if ckpt else {}
    if old and not later and cfg.steps >= (done := ckpt["step"]):              # were its steps the same?
        rates = [[home.lr_at(dataclasses.replace(cfg, steps=n), s) for s in (0, done // 2, done - 1)]
                 for n in (old["steps"], cfg.steps)]
        may |= {"steps"} if rates[0] == rates[1] else set()
    if changed := [name for name, was in old.items() if was != getattr(cfg, name) and name not in may]:
        check_named(cfg)                              # the plainer cause first
        data, more, teacher = old["data"], cfg.steps - old["steps"], f"{cfg.out}/pretrain.pt"
        if cfg.data != data:
            fail(2, f"{path} was made by {made} --data {data}, now {cfg.data}; use another --out")
        how = f", with --teacher {teacher} to keep its teacher" * os.path.exists(teacher)
        if changed == ["steps"] and more > 0 and cfg.stage != "pretrain":
            names = vars(cfg).keys() - {"data", "stage", "dry_run", *never_read(cfg), *SCORED}
            new = dict(init=path, steps=more, out=f"{cfg.out}-longer-{cfg.stage}")
            new["teacher"] = teacher if os.path.exists(teacher) else cfg.teacher
            how = f"; to train it on, in a folder of its own: {command(cfg, cfg.stage, names, **new)}"
        flags = {k: f"--{k}" if k in home.STAGES else f"--{cfg.stage}.{k}" for k in changed}     # a method
        all_of = " and ".join(f"{flag} {old[k]}, now {getattr(cfg, k)}" for k, flag in flags.items())
        fail(2, f"{path} was made by {made} --data {data} with {all_of}; repeat its flags (its log.txt "
                f"begins with its command), or use another --out{how}")
    if cfg.stage == "post" and cfg.mid == "none" and not ckpt and os.path.exists(f"{cfg.out}/mid.pt"):
        fail(2, f"{cfg.out}/mid.pt is there, this road has --mid none; use another --out")
    agree(f"step of {path}", ckpt and ckpt["step"])
    return cfg.steps - (ckpt["step"] if ckpt else 0)


def never_read(cfg):
    """Names of knobs that a stage with its method does not read, from READ_BY of the script."""
    home, method = home_of(cfg), f"{cfg.stage} {getattr(cfg, cfg.stage, '')}"
    rows = home.READ_BY if cfg.stage in {*home.STAGES} - {*home.RUN} else {}
    return [name for names, where in rows.items() for name in names.split()
            if not {cfg.stage, method} & (read := {*where.split(", ")}) or f"not {method}" in read]


def command(cfg, stage, names, **new):
    """The command of a stage, with the new flags and those of `names` that differ from its defaults."""
    argv = ["--data", cfg.data, "--stage", stage]
    plain = vars(parse(home_of(cfg), argv))
    for name, value in {**vars(cfg), **new}.items():
        if name in new or (name in names and value != plain[name]):
            argv += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", value]
    return shlex.join(["python", os.path.basename(home_of(cfg).__file__), *map(str, argv)])


def check_teacher(cfg, finished, given, data, wanted):
    """Exit code 2 if our own teacher learned other data than `data`; 3 if a given one has other shapes.

    finished: that of nets.py; given(cfg) -> (weights, arguments), or None; wanted: what those must be.
    """
    own = finished(f"{cfg.out}/pretrain.pt") if cfg.teacher in ("", "scratch") else None
    same_data(own, f"{cfg.out}/pretrain.pt", data)
    weights, said = given(cfg)[:2] if given and not own else ({}, {})
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        fail(3, f"--teacher {cfg.teacher}: {len(bad)} of its tensors are not finite, {bad[0]}; pass another")
    maker = home_of(cfg).nets.MAKERS.get(cfg.teacher, "")
    odd = [name for name in wanted if said.get(name, wanted[name]) != wanted[name]]
    if weights and not said:                          # what nets.make would say on the way
        fail(3, f"--teacher {cfg.teacher}: no {home_of(cfg).nets.NO_SIZE}")
    if said and (odd or not {*wanted} & {*said}):
        what = f"its {odd[0]} is {said[odd[0]]}, not {wanted[odd[0]]}" if odd else "no teacher of this script"
        fail(3, f"--teacher {cfg.teacher}, a net{maker}: {what}; pass a teacher of this script and --data "
                f"{cfg.data}")
    if ckpt := finished(cfg.teacher) if maker.startswith(" of train_") else None:
        name, stamp = ckpt["cfg"]["data"], ckpt["data"]
        if data != stamp if data else pathlib.Path(name).name != pathlib.Path(cfg.data).name:
            say(f"warning: --teacher {cfg.teacher} learned --data {name}, {stamp}, not {cfg.data}")


def check_init(cfg, kwargs):
    """Exit code 3 where --init FILE draws digits, 1x8x8, and --data has other images, or the other way."""
    named = ("img_channels", "in_channels"), ("img_resolution", "input_size")
    channels, side = (kwargs.get(ours, kwargs.get(flow, 0)) for ours, flow in named)
    as_digits, own = (channels, side) == (1, 8), home_of(cfg).data_name(cfg) == "own"
    if side and not own and as_digits != (cfg.data == "digits"):
        fail(3, f"--init {cfg.init} draws {channels}x{side}x{side}, --data {cfg.data} has other images; pass "
                "the --data of that net")


def same_guidance(cfg, stated, what):
    """Guidance is part of a Mean Flow, so all stages share it (B.4); exit code 2 if weights have another.

    stated: the configuration in the checkpoint `what`. Flow matching is guided only when it is rolled out.
    """
    if "omega" not in stated or (stated["stage"] == "pretrain" and stated.get("pretrain", "mf") != "mf"):
        return
    scales = [c["omega"] / (1 - c["kappa"]) for c in (stated, dataclasses.asdict(cfg))]
    spans = [[c["guide_from"], c["guide_to"]] for c in (stated, dataclasses.asdict(cfg))]
    if abs(scales[0] - scales[1]) > 1e-6 or (spans[0] != spans[1] and scales[0] != 1):
        fail(2, f"{what} was trained with guidance {scales[0]:.4g} for t in {spans[0]}, this stage has "
                f"{scales[1]:.4g} in {spans[1]}; pass its --omega, --kappa, --guide_from, --guide_to")


def guidance_note(cfg, decoder):
    """What stands below a table of a Mean Flow's scores."""
    return (f"{cfg.samples} samples a score, seeds from 0, EMA weights, decoder {decoder}, guidance "
            f"{cfg.omega / (1 - cfg.kappa):.4g} (omega {cfg.omega}, kappa {cfg.kappa}) for t in "
            f"[{cfg.guide_from}, {cfg.guide_to}]")


def wait_for_first():
    """Other processes wait while the first one saves, for days if need be; it waits TIMEOUT for them."""
    if group := patient_group():
        dist.monitored_barrier(group, datetime.timedelta(days=9) if processes()[0] else TIMEOUT)


def from_first(work):
    """Returns the first process's work() in all processes."""
    group, answer = patient_group(), [None]
    if processes()[0] == 0:
        try:
            answer = [work()]
        except SystemExit as refused:                 # its line is written; the others leave with its code
            answer = [refused]
    if group:
        dist.broadcast_object_list(answer, 0, group)
    if isinstance(answer[0], SystemExit):
        raise answer[0]
    return answer[0]


# ---- the folder of a run -----------------------------------------------------------------------
def duration(seconds):
    """90 -> "90 s"; 150 -> "2.5 min"; up to days."""
    for unit, size in ("days", 86400), ("h", 3600), ("min", 60):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def read_metrics(out):
    """The lines of <out>/metrics.jsonl, a dict each. A line that a kill has cut is left out."""
    path, lines = pathlib.Path(out, "metrics.jsonl"), []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


ROAD = {}                                                # stage: (steps, batch), of those still to come


def new_tally(cfg):
    """What a stage counts: steps; steps (told) and seconds up to the last line, losses and gradient norms
    since then; steps skipped, in all and in a row; fp16's scale. `clock`: when the next line's time begins.
    """
    scale = 2.0**15 if cfg.precision == "fp16" else 1.0
    return dict(step=0, told=0, seconds=0.0, losses=[], norms=[], skipped=0, bad=0, scale=scale, clock=0.0)


def count(cfg, tally, loss, norm):
    """Counts a step as finite or skipped; moves fp16's scale. Exit code 4 after 10 skips, or all but one."""
    tally["step"] += 1
    if norm == 0:
        say(f"warning: {cfg.stage}: a gradient is exactly 0, nothing is learned; what do the flags do?")
    if math.isfinite(norm + loss):
        tally["losses"].append(loss)
        tally["norms"].append(norm)
        tally.update(bad=0, scale=tally["scale"] * (2 ** (1 / 2000) if cfg.precision == "fp16" else 1))
        return
    tally.update(bad=tally["bad"] + 1, skipped=tally["skipped"] + 1)
    if cfg.precision == "fp16" and tally["scale"] > 1:          # while the scale falls, nothing has diverged
        tally["scale"] /= 2
    elif tally["bad"] >= min(10, max(2, cfg.steps - 1)):
        path = f"{cfg.out}/{cfg.stage}.pt"
        kept = f"{path} is the last good one" if os.path.exists(path) else "none was saved"
        fail(4, f"{cfg.stage}: loss or gradient not finite in {tally['bad']} steps in a row; of its "
                f"checkpoints {kept}; try a smaller --lr with another --out")


def report(cfg, lr, tally, **more):
    """The line of a step: means over the finite steps since the last line, speed, time left."""
    done, took, n = tally["step"], time.time() - tally["clock"], tally["step"] - tally["told"]
    loss, norm = (sum(v) / len(v) if v else math.nan for v in (tally["losses"], tally["norms"]))
    tally.update(told=done, clock=time.time(), seconds=tally["seconds"] + took, losses=[], norms=[])
    images, rate, left = done * cfg.batch, n * cfg.batch / took, (cfg.steps - done) * cfg.batch
    ROAD.pop(cfg.stage, None)                                # what is left are the stages after this one
    later = sum(steps * batch for stage, (steps, batch) in ROAD.items() if "vgg" not in (stage, cfg.stage))
    given = "".join(f"{name} {value:.3g} | " for name, value in more.items() if "mse_gap" not in name)
    given += f"skipped {tally['skipped']} | " * bool(tally["skipped"])
    time_left = ""
    if PACE and left:                                        # of this process, without its first step
        pace = (done - PACE[1]) * cfg.batch / (tally["seconds"] - PACE[0])
        rest = f", at least {duration((left + later) / pace)} with the next stages" * bool(later)
        rest += ", without the next stages" * (cfg.stage == "vgg")
        time_left = f" | {duration(left / pace)} of training left{rest}"
    PACE[:] = PACE or [tally["seconds"], done]
    one = n == 1 < min(cfg.log_every, cfg.steps)             # after a start: noisy, not in metrics.jsonl
    numbers = dict(stage=cfg.stage, step=done, images=images, loss=loss, grad=norm, skipped=tally["skipped"],
                   lr=lr, images_per_second=rate, seconds=tally["seconds"], mean_of=n, **more)
    log(f"{cfg.stage} {done:6d}/{cfg.steps} {done / cfg.steps:4.0%} | "
        f"loss {loss:.5f}{' of one batch' * one} | {given}grad {norm:.3g} | "
        f"lr {lr:.2e} | {rate:.{0 if rate > 9 else 2}f} images/s{time_left}",
        **({} if one and left else numbers))
    losses = [m["loss"] for m in read_metrics(OUT) if m["stage"] == "mid"] if OUT and not left else [0]
    if cfg.stage == "mid" and len(losses) > 3 and losses[-1] > 1.2 * losses[0]:
        say(f"warning: mid: the loss has risen, from {losses[0]:.3g} to {losses[-1]:.3g}, and its target is "
            "fixed; train it anew with a smaller --mid.lr, or more steps, and another --out")


def add_errors(errors, square, gap):
    """Add each sample's mean squared error, square (B,), to the column of its gap t - r: 0, or a quarter.

    errors (2, 5 or more): sums, counts, on the device. What is not finite is left out.
    """
    column = (4 * gap).ceil().long().to(errors.device, non_blocking=True)
    finite = square.isfinite()
    errors[0].index_add_(0, column, torch.where(finite, square, 0.0))
    errors[1].index_add_(0, column, finite.float())


def mse_by_gap(errors):
    """Means since the last log, by name, from errors (2, 5) or, with REPA, (2, 6). Clears errors.

    mse_same: r = t; mse_gap1 to 4: t - r in each quarter. Empty ones are left out. The host waits here.
    """
    if processes()[1] > 1:
        dist.all_reduce(errors)
    sums, counts = errors.tolist()
    errors.zero_()
    names = "mse_same", "mse_gap1", "mse_gap2", "mse_gap3", "mse_gap4", "repa"
    return {name: s / n for name, s, n in zip(names, sums, counts) if n}


def begin_stage(cfg, tally, memory):
    """Before a stage goes on from its last step, saves its knobs in config.json and drops later metrics.

    A killed run has logged steps that will repeat. Only process 0 writes. Returns the line that says so.
    """
    file, configs, done = f"{cfg.out}/config.json", {}, tally["step"]
    begins = f"{cfg.stage}: goes on from step {done}" if done else f"{cfg.stage}: begins"
    begins += f", {cfg.steps} steps, {memory}" + "; compiles for minutes, --no-compile does not" * cfg.compile
    begins += "; first the teacher draws trajectories" * (cfg.stage == "mid")
    PACE.clear()
    tally.update(told=done, clock=time.time())
    if processes()[0] or cfg.dry_run:
        return begins
    if os.path.exists(file):
        with blame(file):
            configs = json.loads(pathlib.Path(file).read_bytes())
    script, idle = os.path.basename(inspect.getfile(type(cfg))), never_read(cfg)
    configs[cfg.stage] = dict(script=script, **{k: v for k, v in vars(cfg).items() if k not in idle})
    write_whole(file, lambda f: f.write((json.dumps(configs, indent=1) + "\n").encode()))
    kept = [m for m in read_metrics(cfg.out) if m["stage"] != cfg.stage or m["step"] <= done]
    if os.path.isfile(f"{cfg.out}/metrics.jsonl"):
        lines = "".join(json.dumps(m) + "\n" for m in kept)
        write_whole(f"{cfg.out}/metrics.jsonl", lambda f: f.write(lines.encode()))
    return begins


SCRIPTS = "train_cmt_cifar.py train_cmt_imagenet.py train_mf_imagenet256.py train_t2i_coco.py"


def overview(road, device, cfg):
    """What a run is to train, [(steps left, Config)]; warnings: no GPU, a stage too short for its knobs."""
    ROAD.clear()
    ROAD.update({c.stage: (left, c.batch) for left, c in road if left})
    text = ", ".join(f"{stage} {steps:,} steps of {batch}" for stage, (steps, batch) in ROAD.items())
    images = sum(map(math.prod, ROAD.values()))
    for left, c in [item for item in road if item[1].stage == "mid"]:
        n, used = home_of(c).solve_size(c)
        calls = getattr(c, "nodes", c.nfe + 1) - 1
        calls *= n * (calls + 1) / 2 if c.mid == "slow" else n
        images += math.ceil(left * c.batch / (n * used)) * calls / 3         # a call: a third of an image
    n, least = processes()[1], images / (1000 if cfg.data == "digits" else 250)
    text = f"{n} process{'es' * (n > 1)} on {device.type}; to train: {text or 'nothing'}"
    text += ", existing nets are drawn" * (not ROAD and cfg.stage in ("all", "eval", "sample"))
    text += " and scored (again)" * (not ROAD and cfg.stage in ("all", "eval"))
    if ROAD and device.type == "cpu":
        small = cfg.data == "digits" or getattr(cfg, "res", 0) == 16
        scores = f", and {'half a minute of ' * (cfg.data == 'digits')}scores" * (cfg.stage == "all")
        scores += "; shorter runs: docs/usage.md, Your own images" * (cfg.data != "digits" and least > 600)
        text += (f"; {duration(least)} to {duration(4 * least)} on one core in fp32{scores}" if small else
                 "\nwarning: there is no GPU; a CPU trains --data digits in minutes, --res 16 in hours")
    named = ROAD and cfg.init not in INITS
    text += f"\n{'mid' if 'mid' in ROAD else 'post'} starts from --init {cfg.init}" * bool(named)
    fork = os.path.basename(home_of(cfg).__file__)
    if ROAD and fork not in SCRIPTS and max(steps for steps, _ in ROAD.values()) > 2:
        text += f"\n{fork} is a fork: python -m pytest tests/test_forks.py finds its slips in seconds"
    text += (f"\nwarning: a score of {cfg.samples} samples is off, mostly high; pass --samples 1024 or more"
             ) * (cfg.samples < 1_024 and cfg.stage in ("all", "eval"))
    slow, average, warm, stairs = [], [], [], []             # one line a kind, not a stage
    for c in [c for left, c in road if left]:
        half = device.type == "cpu" and c.precision in ("bf16", "fp16")
        kept, low = c.ema_beta**c.steps * (not getattr(c, "ema_std", 0)), max(0.1, 1 - 5 / c.steps)
        slow += [f"{c.precision} (pass --{c.stage}.precision fp32)"] * half
        average += [f"{c.stage} {kept:.0%} (pass --{c.stage}.ema_beta {low:.3g})"] * (kept > 0.1)
        less = f"{c.stage} {c.warmup} for {c.steps} steps (pass --{c.stage}.warmup {c.steps // 20})"
        warm += [less] * (2 * c.warmup > c.steps)
        stairs += [f"{c.steps} (pass an eighth of them as --stair)"] * (getattr(c, "stair", 0) >= c.steps)
    kinds = {"up to eight times slower on most CPUs": slow, "warm-up is more than half": warm,
             "q never grows in so few steps": stairs,
             "averaged weights, which are drawn and scored, still hold this share of the first": average}
    return text + "".join(f"\nwarning: {kind}: {', '.join(odd)}" for kind, odd in kinds.items() if odd)


def dry_run(home, argv, configs):
    """Print what a command of the script `home` would train, skip and lack. Returns its exit code."""
    global KEEP
    os.environ.setdefault("CMT_OFFLINE", "dry run")          # a download is then a line, no error
    os.environ["HF_HUB_OFFLINE"] = "1"
    codes, road, KEEP = {}, {}, False
    ROAD.update({c.stage: (c.steps, c.batch) for c in configs if c.stage not in home.RUN})    # disk for all
    for c in configs:
        left, prepare = c.steps * (c.stage not in home.RUN), home.set_up
        if c.stage in home.RUN:
            prepare = (lambda c: list_pictures(c.source)) if c.stage == "encode" else home.candidates
        try:
            with contextlib.redirect_stdout(io.StringIO()), one_line(c, home.nets.WeightsError):
                left = home.resume(c)[1] if home.check(c) else 0
                if not codes and not any(steps for steps, _ in road.values()):    # later ones start there
                    prepare(c)
        except SystemExit as stopped:                        # refused; or it wants a download: a line, code 0
            codes |= {c.stage: stopped.code} if stopped.code else {}
            if stopped.code == 2:                            # but what lacks a file still has to be trained
                continue
        road[c.stage] = left, c
    if processes()[0] == 0:
        first = next((c for c in configs if c.stage in codes), parse(home, argv))
        text = overview(road.values(), home.DEVICE, first) + "\n"
        text *= bool(ROAD) or not codes                      # of what is refused whole nothing is "to train"
        cause = f"\nnothing starts until this is fixed (see above): {', '.join(codes)}" * bool(codes)
        idle = ", ".join(c.stage for c in configs if c.stage not in (*ROAD, *codes, *home.RUN)) or "none"
        bench = pathlib.Path(__file__).with_name("bench.py")             # it counts known scripts, no forks
        counted = bool(ROAD) and bench.is_file() and pathlib.Path(home.__file__).stem in bench.read_text()
        plan = ["plan", os.path.basename(home.__file__), *(a for a in argv if a != "--dry_run"), "--gpus"]
        show(f"{text}finished or not needed: {idle}\nfolder of the run, --out: {c.out}{cause}"
             + f"\nmemory and hours on GPUs: python bench.py {shlex.join(plan)} {processes()[1]}" * counted,
             sys.stdout)
    if dist.is_initialized():
        dist.destroy_process_group()
    return next(iter(codes.values()), 0)


def save_curve(cfg, table=()):
    """cfg.out's curve.png, a column per stage; a Mean Flow, whose loss stays near 1, shows squared error."""
    stages, drawn, scores = {}, "loss", headline(table)
    for m in filter(lambda m: "images" in m, read_metrics(cfg.out)):       # of training, not of scores
        drawn = "squared error" if "mse_same" in m or "mse_gap1" in m else "loss"
        title = drawn + (", short jumps" if "mse_gap1" in m else ", r = t" if "mse_same" in m else "")
        _, losses, norms = stages.setdefault(SPOKEN[m["stage"]], (title, [], []))
        losses.append((m["images"], m.get("mse_gap1", m.get("mse_same", m["loss"]))))
        norms.append((m["images"], m["grad"]))
    panels = {f"{stage}: {title}": {stage: losses} for stage, (title, losses, _) in stages.items()}
    panels |= {f"{stage}: gradient norm": {stage: norms} for stage, (_, _, norms) in stages.items()}
    words = [f"{SPOKEN[s]}: {words_of(dataclasses.replace(cfg, stage=s)).partition(': ')[2]}"
             for s in home_of(cfg).STAGES if SPOKEN.get(s) in stages]
    save_chart(f"{cfg.out}/curve.png", panels,
               f"{drawn.capitalize()} and gradient norm of each stage; only scores tell what is better\n"
               f"What to expect in {'; in '.join(words)}. Each panel has its own log scale, plotted against "
               "images trained on (mid-training: pairs). Each point is a mean since the last one."
               + (" Errors are of velocities; short jumps have 0 < t - r <= 1/4. Post-training's targets are "
                  "noisy: its errors and mid-training's cannot be compared.") * (drawn != "loss")
               + f" {scores[:1].upper()}{scores[1:]}; {cfg.samples:,} samples each." * bool(scores),
               columns=max(1, len(stages)))


def save_preview(cfg, tally, stop, sampler, drawn=""):
    """<out>/curve.png and, given a sampler, <out>/previews/<stage>_<step>.png: 60 noises, always the same.

    No preview if the run must stop: whoever sent the signal may wait for only 30 seconds.
    """
    done = tally["step"]
    save_curve(cfg)
    if sampler and not stop:
        images = draw_seeds(sampler, range(60), cfg.batch_gpu or 64, seconds=30)
        how = f"solved in {cfg.nfe} steps" if cfg.stage == "pretrain" else "in one step"
        header = ["class" if "class" in drawn else "digit", *map(str, range(10))] * (cfg.data == "digits")
        save_seeds(f"{cfg.out}/previews/{cfg.stage}_{done:07d}.png", images, range(60),
                   f"{SPOKEN[cfg.stage].capitalize()}, after {done:,} of {cfg.steps:,} steps of training\n"
                   f"Averaged weights, {how}; every preview has the same noises{drawn}. Scores: stages.png.",
                   header * bool(drawn), 10 if drawn else 12)
    tally["clock"] = time.time()                             # saving is no training


def say_missing(cfg, names):
    """A line for each existing checkpoint that is not among these nets: it is not finished."""
    alone = names[0].startswith("init_")
    for stage, name in dict(pretrain="teacher", mid="mid", post="post").items():
        if os.path.exists(path := f"{cfg.out}/{stage}.pt") and name not in names:
            say(f"{cfg.init} alone is shown, as --init asks; without it, what {cfg.out} holds" if alone else
                f"warning: {path} is not finished, so neither drawn nor scored; run again without --stage")


def samples_folder(cfg, name, steps, net=None):
    """<out>/samples/<net>_<steps>, plus knobs not at defaults. Exit code 2 if another net drew it."""
    own = {k: getattr(cfg, k) for k in ("data", "res") if hasattr(cfg, k)} | dict(stage="sample")
    plain = vars(parse(home_of(cfg), [f"--{k}={v}" for k, v in own.items()]))
    knobs = [k for k in DRAWN.split() if k != "second_sigma" or steps == 2]
    asked = [f"_{k}_{getattr(cfg, k)}" for k in knobs if plain.get(k) != vars(cfg).get(k)]
    folder = f"{cfg.out}/samples/{name}_{steps}{''.join(asked)}"

    def claim():
        note, weights = pathlib.Path(f"{folder}.txt"), dict([*net.named_parameters(), *net.named_buffers()])
        was, now = note.read_text() if note.exists() else "", home_of(cfg).nets.stamp(weights)
        if os.path.isdir(folder) and was not in ("", now):
            fail(2, f"{folder} was drawn by other weights, {was}, now {now}; move it away first")
        note.parent.mkdir(exist_ok=True)
        note.write_text(now)
    if net is not None:
        from_first(claim)
    return folder


def save_samples(cfg, found, make_sampler):
    """For each net, a PNG per seed of cfg.seeds in samples_folder, and a sheet of the first 64.

    found: (name, net, {steps: kind of sampler}, ...) of each; make_sampler(cfg, net, kind).
    """
    seeds, batch = seed_range(cfg.seeds), cfg.batch_gpu or 64
    say_missing(cfg, [name for name, *_ in found])
    for name, net, kinds, *_ in found:
        for steps, kind in kinds.items():
            sampler, folder = make_sampler(cfg, net, kind), f"{samples_folder(cfg, name, steps, net)}/"
            save_images(sampler, seeds, folder, batch)
            label = net_label(name, steps, sep=", ")
            caption = f"{label}\nOne image a seed; every net has the same noises."
            caption += f" The first 64 of {len(seeds):,}." * (len(seeds) > 64)
            caption += f" Second noise level {getattr(cfg, 'second_sigma', 0)}." * (kind == 2)
            other = os.path.basename(folder[:-1]).removeprefix(f"{name}_{steps}")         # as the folder
            sheet = f"{cfg.out}/samples_{name}_{steps}step{other}_seeds.png"
            if processes()[0] == 0:
                save_seeds(sheet, draw_seeds(sampler, seeds[:64], batch), seeds, caption)
            log(f"sample: {len(seeds)} images in {folder}; open {sheet} (other --seeds replace it)")


def save_captions(path, name, steps, rows, columns=(), scores=""):
    """A sheet of what a net draws in `steps` steps: each row is a caption with its images."""
    caption = f"{net_label(name, steps, sep=', ')}\nA row is one caption{scores}."
    save_sheet(path, rows, caption, ["caption", *columns])


def save_classes(cfg, found, samplers, n):
    """A sheet of each net, a column per class, and stages.png. Returns what the latter is made of.

    samplers: {(net, steps): sampler} of which seed k draws class k % n, or anything where n = 0.
    """
    columns, shown = range(min(n or 10, 10)), []
    seeds, classes = [k + (n or 10) * j for j in range(10) for k in columns], [str(k) for k in columns if n]
    for (name, steps), sampler in samplers.items():
        images = draw_seeds(sampler, seeds, cfg.batch_gpu or 64).cpu()
        caption = f"{net_label(name, steps, sep=', ')}\nOne image a seed; scores: stages.png, results.md."
        header = classes and ["class", *classes]
        save_seeds(f"{cfg.out}/samples_{name}_{steps}step.png", images, seeds, caption, header, 10)
        shown.append((name, steps, images[:len(columns)]))
    save_stages(cfg.out, shown, classes, words := about(cfg, found))
    return shown, classes, words


def table(rows):
    """A list of dicts as a Markdown table; columns are all keys, those of the last dict first."""
    keys = dict.fromkeys(key for row in reversed(rows) for key in row)
    lines = [keys, ["---"] * len(keys), *([row.get(key, "-") for key in keys] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def save_results(cfg, rows, note, stages):
    """Writes results.md (table of rows, note) and stages.png with scores in cfg.out; returns what to print.

    Earlier tables stay below. stages: save_stages' arguments, used only in the first process, which writes.
    """
    say_missing(cfg, [row["stage"].partition(",")[0] for row in rows])
    alone = f"_{rows[0]['stage']}" * rows[0]["stage"].startswith("init_")                  # --init FILE
    took = {m["stage"]: m["seconds"] for m in read_metrics(cfg.out) if "seconds" in m and not alone}
    text = f"{table(rows)}\n\n{note}" + f"\n{HALVES}" * note.startswith("FD-digits")
    text += f"\n{', '.join(took)} took {duration(sum(took.values()))} of training." * bool(took)
    file = pathlib.Path(cfg.out, "results.md")
    below = " (earlier tables stay below)" * file.exists()
    if processes()[0] == 0:
        new, old = text.encode(errors="backslashreplace"), file.read_bytes() if file.exists() else b""
        if not old.startswith(new + b"\n"):                   # else drawn again, with the same scores
            new += f"\n{time.strftime('%Y-%m-%d')}, {MADE_BY}\n".encode(errors="backslashreplace")
            write_whole(str(file), lambda f: f.write(new + b"\n" * bool(old) + old))
        save_stages(cfg.out, *stages, table=rows, samples=cfg.samples)
        if took:
            save_curve(cfg, rows)
    names = [f"stages{alone}.png", *(["trajectory.png", "curve.png"] * (not alone))]
    made = [name for name in names if os.path.exists(f"{cfg.out}/{name}")]
    made += [f"samples{alone}_*.png"] * any(pathlib.Path(cfg.out).glob(f"samples{alone}_*.png"))
    return f"{text}\nopen {', '.join(made)} and results.md{below} in {cfg.out}"


# ---- command line ------------------------------------------------------------------------------
def arguments():
    """Command line -> namespace; exit code 2 with one line for what it does not know."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    flags = "save features inception resize batch device train-digits".split()
    p.error = functools.partial(refuse, flags, "see python fid.py --help")
    cuda = torch.cuda.is_available()
    add = functools.partial(p.add_argument, default="")
    add("paths", nargs="*", metavar="A B", help="or one of " + ", ".join(REFERENCES))
    add("--save", metavar="FILE.npz", help="write the statistics of A")
    add("--features", choices=["inception", "digits"])
    add("--inception", metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth")
    add("--resize", default="tf1", choices=list(RESIZES))
    add("--batch", default=64, type=int, help="images at a time, in each process")
    add("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"][:1 + cuda])
    add("--train-digits", metavar="FILE.npz", help="make the weights of the digits net")
    args = p.parse_args()
    want = 0 if args.train_digits else 1 if args.save else 2
    if len(args.paths) != want:
        p.error(f"{want} paths expected, {len(args.paths)} given")
    if args.batch < 1:
        p.error(f"--batch {args.batch} must be 1 at least")
    for file in filter(None, (args.save, args.train_digits)):
        if not file.endswith(".npz") or not os.path.isdir(os.path.dirname(file) or "."):
            p.error(f"{file} must be an .npz in a folder that exists")
    sheet = any(path.endswith(".png") for path in args.paths)
    args.features = args.features or ("digits" if sheet else "inception")
    if args.features == "digits" and (args.inception or args.resize != "tf1"):
        p.error("--inception and --resize belong to --features inception, not to digits")
    return args


def references(args):
    """References of the paths, read or measured; unusable paths are found before anything is measured."""
    found, images = {}, []
    for path in dict.fromkeys(args.paths):
        if path not in REFERENCES and not os.path.exists(path):
            raise DataError(f"{path or 'A, B'}: not there; name a folder, .zip, .npz or .png, or one of "
                            + ", ".join(REFERENCES))
        with blame(path):
            named = path in REFERENCES and not os.path.exists(path)
            if named or path.endswith(".pkl") or (path.endswith(".npz") and "mu" in np.load(path)):
                found[path] = load_reference(path)
            else:
                image_source(path)
                images.append(path)
    if images:
        net = DigitsNet() if args.features == "digits" else load_inception(args.inception, args.resize)
    for path in images:
        batches = read_images(path, args.batch, *processes())
        found[path] = measure(net.to(args.device), batches, args.device, path)
    return [found[path] for path in args.paths]


def compare(args):
    """What the command line prints, and saves with --save."""
    a, *rest = references(args)
    if os.environ.get("RANK", "0") != "0":
        return
    if args.save:
        save_statistics(args.save, a)
        show(f"{args.save}: {a.n or '?'} images {a.file}, {a.features or 'features not stated'}", sys.stdout)
    for b in rest:
        with blame(f"{a.file} against {b.file}"):
            line, distance = protocol(a, b), frechet_distance(*a[:2], *b[:2])
        name = (a.features or b.features or "FID" * (len(a.mu) == 2048) or "Frechet distance").split(":")[0]
        show(f"{name} {distance:.4f}\n{line}", sys.stdout)


def main():
    """Command line; exit codes 0, 2 usage, 3 data or weights."""
    args = arguments()
    if "RANK" in os.environ:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        train_digits(args.train_digits) if args.train_digits else compare(args)
    except (OSError, ValueError) as error:
        fail(3, str(error))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
