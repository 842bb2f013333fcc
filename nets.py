"""Networks: what the scripts train, learn from and measure distance with. No losses, no loops.

  name                          what it is                    source
  SIZES, make, fitting          constructor arguments         one row per model of the paper, and the digits
  EDMPrecond, SongUNet          D(x, sigma)                   DDPM++ of Score-SDE, preconditioned as in EDM
  dropout_masks                 masks by place in the batch   one result for any number of processes
  EDM2Precond, EDM2UNet         D(x, sigma, y)                EDM2, normalised weights
  hoist, freeze                 EDM2 weights normalised once  EDM2 Eq. 47, 66: per step, or for good
  PixelDistance                 squared, pseudo-Huber         ECT
  VGG                           distance of latents, digits   CMT App. B.5: trained on the data's own labels
  LPIPS                         distance of images in [-1, 1] VGG-16 and the linear heads of the lpips package
  ELatentLPIPS                  distance of latents           CMT App. B.5: VGG-16 with GroupNorm
  load_pretrained, load_weights other people's checkpoints    read without running what the file holds
  fetch                         downloads                     checked, then renamed into the cache
  DiT                           v or u(x, t, r, y)            DiT, SiT with REPA's projector, Mean Flow
  MMDiT                         v or u(x, t, text, r)         SD3's MM-DiT at REPA's size
  derivative                    du/dt of Mean Flow            two products per linear layer
  load_flow, dit_shape          their official checkpoints    SiT, REPA, Mean Flow, converted to one clock
  sd_vae, CLIPText, dinov2      encoders of images, captions  diffusers and transformers, imported when called
  save_checkpoint, restore,     our own files, .safetensors   whole after a kill at any moment
  load_checkpoint, finished,
  flatten, stamp, cost

Parameter names are the official ones, so that official checkpoints load by name. D_x is what EDM calls the
denoised image; sigma is a noise level per sample, (B,); images are (B, C, H, W) in [-1, 1].
"""
import argparse
import contextlib
import fcntl
import functools
import hashlib
import http.client
import importlib.util
import inspect
import io
import json
import logging
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import re
import shutil
import sys
import urllib.parse
import urllib.request
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# ---- sizes -------------------------------------------------------------------------------------
SIZES = {  # EDMPrecond(**row); 55.7M and 61.8M parameters at 32 and 64 pixels (EDM, Table 7)
    "ddpm++-32": dict(img_resolution=32, img_channels=3, model_channels=128, channel_mult=(2, 2, 2)),
    "ddpm++-64": dict(img_resolution=64, img_channels=3, model_channels=128, channel_mult=(1, 2, 2, 2)),
    "ddpm++-8": dict(img_resolution=8, img_channels=1, model_channels=32, channel_mult=(1, 1), num_blocks=1,
                     attn_resolutions=()),
    "ddpm++-16": dict(img_resolution=16, img_channels=3, model_channels=32, channel_mult=(1, 1, 1),
                      num_blocks=1, attn_resolutions=()),
    # EDM2Precond(resolution, channels, labels, **row)
    **{f"edm2-{name}": dict(model_channels=width) for name, width in
       dict(xxs=64, xs=128, s=192, m=256, l=320, xl=384, xxl=448).items()},
    "edm2-8": dict(model_channels=32, channel_mult=(1, 1), channel_mult_emb=4, num_blocks=1,
                   attn_resolutions=(4,), channels_per_head=32),
    # DiT(**row), MMDiT(**row)
    "dit-s/4": dict(patch_size=4, hidden_size=384, depth=12, num_heads=6),
    "dit-b/4": dict(patch_size=4, hidden_size=768, depth=12, num_heads=12),
    "dit-b/2": dict(patch_size=2, hidden_size=768, depth=12, num_heads=12),
    "dit-m/2": dict(patch_size=2, hidden_size=1024, depth=16, num_heads=16),
    "dit-l/2": dict(patch_size=2, hidden_size=1024, depth=24, num_heads=16),
    "dit-xl/2": dict(patch_size=2, hidden_size=1152, depth=28, num_heads=16),
    "mmdit/2": dict(patch_size=2, depth=24, context_dim=768),
}


# ---- DDPM++ --------------------------------------------------------------------------------------
def xavier_(layer, gain=1.0):
    """layer, with a Xavier uniform weight times gain and a bias of zero."""
    nn.init.xavier_uniform_(layer.weight).data.mul_(gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def resample(x, how):
    """x at twice its resolution ("up": nearest neighbour), at half ("down": 2x2 mean), or unchanged."""
    if how == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.avg_pool2d(x, 2) if how == "down" else x


class Conv2d(nn.Conv2d):
    """Convolution of x resampled."""

    def __init__(self, in_channels, out_channels, kernel, how="keep", gain=1.0):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.how = how
        xavier_(self, gain)
        if how != "keep":
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))  # in official checkpoints

    def forward(self, x):
        return super().forward(resample(x, self.how))


class GroupNorm(nn.GroupNorm):
    """Groups of at least 4 channels, 32 groups at most, eps 1e-6."""

    def __init__(self, channels):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)

    def forward(self, x):
        # choice: group norms in x's precision: half the bytes of autocast, whose float32 only statistics need
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def dropout(block, x, kept):
    """Dropout in training. kept (B, C H W) bool says what stays (dropout_masks); if None, torch draws it."""
    if kept is None or not block.training or not block.dropout:
        return F.dropout(x, block.dropout, block.training)
    B, C, H, W = x.shape
    return x * kept.view(B, H, W, C).permute(0, 3, 1, 2) / (1 - block.dropout)


def dropout_masks(net, seeds):
    """What dropout keeps, (B, n) bool, in a net whose modules have `sizes`; None if nothing is dropped.

    Row i depends only on seeds[i], so a sample's masks depend on its place in the whole batch and not on
    the number of processes or micro-batches. The two calls in Eq. 3 share one row.
    """
    size = sum(sum(getattr(m, "sizes", ())) for m in net.modules())
    if not size and net.training and any("Dropout" in type(m).__name__ and m.p for m in net.modules()):
        raise WeightsError("nn.Dropout draws anew in both calls of Eq. 3; use nets.dropout: docs/forking.md")
    if not size or not net.training:
        return None
    rates, device = {getattr(m, "dropout", 0) for m in net.modules()} - {0}, next(net.parameters()).device
    if len(rates) > 1:
        raise WeightsError(f"dropout of rates {sorted(rates)}: the masks of a net have one")
    masks = torch.empty(len(seeds), size, dtype=torch.bool, device=device)
    for row, seed in zip(masks, seeds):
        row.bernoulli_(1 - max(rates, default=0), generator=torch.Generator(device).manual_seed(seed))
    return masks


class UNet(nn.Module):
    """What DDPM++ and EDM2 share: residual blocks over resolutions under their official names."""

    def add_blocks(self, block, first, img_resolution, widths, num_blocks, attn_resolutions, every):
        """Fill enc and dec; return the width of the last block.

        block(flavor, res, c_in, c_out, ...) makes a block; first is the convolution before all. If every,
        each dec block at a resolution in attn_resolutions has attention; otherwise only the last one has.
        """
        self.enc, self.dec, skips, c = nn.ModuleDict(), nn.ModuleDict(), [], len(first.weight)
        for level, width in enumerate(widths):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = first
            else:
                self.enc[f"{res}x{res}_down"] = block("enc", res, c, c, resample="down")
            skips.append(c)
            for i in range(num_blocks):
                attention = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = block("enc", res, c, width, attention=attention)
                skips.append(c := width)
        for level, width in reversed(list(enumerate(widths))):
            res = img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block("dec", res, c, c, attention=True)
                self.dec[f"{res}x{res}_in1"] = block("dec", res, c, c)
            else:
                self.dec[f"{res}x{res}_up"] = block("dec", res, c, c, resample="up")
            for i in range(num_blocks + 1):
                attention = res in attn_resolutions and (every or i == num_blocks)
                c_in, c = c + skips.pop(), width
                self.dec[f"{res}x{res}_block{i}"] = block("dec", res, c_in, c, attention=attention)
        named = [*self.enc.items(), *self.dec.items()][1:]     # how many numbers dropout decides on per block
        self.sizes = [b.width * int(name.split("x")[0]) ** 2 * (b.dropout > 0) for name, b in named]
        return c

    def walk(self, x, emb, masks, join):
        """Run x through all blocks; dec's get join(x, enc's output). masks: from dropout_masks, or None."""
        kept = iter([None] * len(self.sizes) if masks is None else masks.split(self.sizes, 1))
        skips = []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("_conv") else block(x, emb, next(kept))
            skips.append(x)
        for name, block in self.dec.items():
            if "_aux_" not in name:
                x = block(join(x, skips.pop()) if "_block" in name else x, emb, next(kept))
        return x


class UNetBlock(nn.Module):
    """Residual block of DDPM++: two 3x3 convolutions with the noise embedding added between, self-attention.

    forward: x (B, in, H, W), emb (B, emb_channels) -> (B, out, H', W'). Both sums are scaled by sqrt(1/2).
    """

    def __init__(self, in_channels, out_channels, emb_channels, resample="keep", attention=False,
                 dropout=0.0):
        super().__init__()
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, resample)
        self.affine = xavier_(nn.Linear(emb_channels, out_channels))
        self.norm1 = GroupNorm(out_channels)
        self.dropout, self.width = dropout, out_channels
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=1e-5)
        same = in_channels == out_channels and resample == "keep"
        self.skip = None if same else Conv2d(in_channels, out_channels, 1, resample)
        self.norm2 = GroupNorm(out_channels) if attention else None
        if attention:
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, 1, gain=1e-5)

    def forward(self, x, emb, kept=None):
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(dropout(self, h, kept))
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.norm2 is not None:
            # trap: channel 3c + {0, 1, 2} is q, k, v of channel c; they are not three contiguous blocks
            qkv = self.qkv(self.norm2(x)).unflatten(1, (-1, 3)).flatten(3)           # (B, C, 3, HW)
            # one head; q, k, v (B, 1, HW, C) are contiguous, as fused kernels need
            a = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1).contiguous()[:, :, None])
            x = (self.proj(a[:, 0].transpose(1, 2).reshape(x.shape)) + x) * math.sqrt(0.5)
        return x


class SongUNet(UNet):
    """DDPM++ (Song et al. 2021, Table 7 of EDM): U-Net with attention at the resolutions attn_resolutions.

    forward(x (B, C, H, W), noise_labels (B,), class_labels (B, label_dim) one-hot or None, augment_labels (B,
    augment_dim) or None) -> F_x (B, C, H, W).
    """

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0,
                 model_channels=128, channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4,
                 attn_resolutions=(16,), dropout=0.1, label_dropout=0.0):
        super().__init__()
        self.model_channels, self.label_dropout = model_channels, label_dropout
        c, emb = model_channels, model_channels * channel_mult_emb
        self.map_label = xavier_(nn.Linear(label_dim, c)) if label_dim else None
        self.map_augment = xavier_(nn.Linear(augment_dim, c, bias=False)) if augment_dim else None
        self.map_layer0 = xavier_(nn.Linear(c, emb))
        self.map_layer1 = xavier_(nn.Linear(emb, emb))

        def block(flavor, res, c_in, c_out, **kwargs):
            return UNetBlock(c_in, c_out, emb, dropout=dropout, **kwargs)
        widths = [model_channels * m for m in channel_mult]
        first = Conv2d(in_channels, c, 3)
        c = self.add_blocks(block, first, img_resolution, widths, num_blocks, attn_resolutions, every=False)
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = GroupNorm(c)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = Conv2d(c, out_channels, 3, gain=1e-5)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, masks=None):
        half = self.model_channels // 2
        freqs = 1e-4 ** (torch.arange(half, device=x.device) / (half - 1))
        angles = noise_labels[:, None] * freqs
        emb = torch.cat([angles.sin(), angles.cos()], 1)                                 # (B, model_channels)
        if self.map_label is not None:
            if self.training and self.label_dropout:
                keep = torch.rand(len(x), 1, device=x.device) >= self.label_dropout
                class_labels = class_labels * keep
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        x = self.walk(x, emb, masks, lambda x, skip: torch.cat([x, skip], 1))
        norm, conv = [*self.dec.values()][-2:]
        return conv(F.silu(norm(x)))


class EDMPrecond(nn.Module):
    """EDM preconditioning around DDPM++: D_x = c_skip x + c_out F(c_in x, c_noise)   (EDM Table 1, Eq. 7).

    forward(x (B, C, H, W), sigma (B,), class_labels=None, augment_labels=None, masks=None) -> D_x, float32.
    masks: from dropout_masks; if None, torch draws dropout. Outside training, sigma - sigma_shift replaces
    sigma in c_skip and in the numerator of c_out, as official CMT and ECT checkpoints are sampled (0.003);
    with 0, the trained function is sampled. ValueError for constructor arguments that are not DDPM++'s.
    """

    def __init__(self, img_resolution, img_channels, label_dim=0, sigma_data=0.5, sigma_shift=0.0,
                 use_fp16=None, sigma_min=None, sigma_max=None, **unet):         # in files, but not used
        super().__init__()
        fixed = dict(model_type="SongUNet", embedding_type="positional", encoder_type="standard",
                     decoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1])
        for name, value in fixed.items():
            if (given := unet.pop(name, value)) != value:
                raise WeightsError(f"{name}={given!r}: DDPM++ has {value!r}; no other SongUNet is here")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_data, self.sigma_shift = sigma_data, sigma_shift
        self.model = SongUNet(img_resolution, img_channels, img_channels, label_dim, **unet)

    def forward(self, x, sigma, class_labels=None, augment_labels=None, masks=None):
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        if self.label_dim and class_labels is None:
            class_labels = x.new_zeros(len(x), self.label_dim)
        shifted = sigma if self.training else sigma - self.sigma_shift
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / (shifted**2 + self.sigma_data**2)
        c_out = shifted * self.sigma_data / variance.sqrt()
        c_in = variance.rsqrt()
        c_noise = sigma.flatten().log() / 4
        F_x = self.model(c_in * x, c_noise, class_labels, augment_labels, masks)
        return c_skip * x + c_out * F_x.float()


# ---- EDM2 ----------------------------------------------------------------------------------------
# Karras et al. 2024, arXiv 2312.02696: activations and weights keep magnitude 1. No biases, no norm layers.
EPS = 1e-4                                            # added to a root mean square before it divides


def row_norm(w):
    """eps sqrt(fan_in) + |row| of a weight (out, in, ...), float32; a layer applies w / row_norm(w)."""
    dims = tuple(range(1, w.ndim))
    norm = torch.linalg.vector_norm(w, dim=dims, keepdim=True, dtype=torch.float32)
    return norm + EPS * math.sqrt(w[0].numel())     # RMS set to 1, then divided by sqrt(fan_in): EDM2 Eq. 47


def normalize(x, dim):
    """x with root mean square 1 over dim; the mean square is taken in float32."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    # trap: eps is added to the RMS, not to the norm or to its square
    return x / (norm / math.sqrt(x.shape[dim]) + EPS).to(x.dtype)


def mp_silu(x):
    """SiLU over its root mean square on N(0, 1): EDM2 Eq. 81."""
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    """(1 - t) a + t b at unit magnitude: EDM2 Eq. 88."""
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b, t):
    """Channels of a and b joined; b has the share t of the magnitude: EDM2 Eq. 103."""
    n_a, n_b = a.shape[1], b.shape[1]
    c = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (c * (1 - t) / math.sqrt(n_a)), b * (c * t / math.sqrt(n_b))], 1)


class MPFourier(nn.Module):
    """Random features sqrt(2) cos(f x + p) of x (B,) -> (B, channels), float32: EDM2 Eq. 75."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x):
        return (x.float()[:, None] * self.freqs.float() + self.phases.float()).cos() * math.sqrt(2)


class MPConv(nn.Module):
    """Convolution (kernel (k, k)) or linear layer (kernel ()) with normalised rows: EDM2 Eq. 47.

    weight is normalised at every call, in the graph, unless `hoist` or `freeze` has filled `hoisted`.
    """

    def __init__(self, in_channels, out_channels, kernel=()):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.register_buffer("hoisted", None, persistent=False)

    def forward(self, x, gain=None):
        w = (self.weight / row_norm(self.weight) if self.hoisted is None else self.hoisted).to(x.dtype)
        y = F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)
        return y if gain is None else y * gain        # not w * gain: each gain would then need its own w


def rows(w):
    """w (out, in, ...) as (out, fan_in), a view in the order of its memory, channels last or not."""
    return w.as_strided((len(w), w[0].numel()), (w[0].numel(), 1))


@torch.no_grad()
def scale_rows(layers, dtype, force=False):
    """Fill .hoisted with weight / d, as forward applies it, with d = row_norm(weight).

    dtype (None: float32) is for convolutions only. Returns |row| and d of every layer.
    force: the rows first get root mean square 1, in place (EDM2 Eq. 66); their new d needs no second pass.
    """
    ws = [rows(m.weight.detach()) for m in layers]
    roots = [math.sqrt(w.shape[1]) for w in ws]
    eps = [EPS * root for root in roots]
    norms = [torch.linalg.vector_norm(w, dim=1, keepdim=True, dtype=torch.float32) for w in ws]
    ds = torch._foreach_add(norms, eps)               # one number per row: all layers in one kernel
    if force:
        scales = torch._foreach_reciprocal(ds)
        torch._foreach_mul_(scales, roots)
        for w, scale in zip(ws, scales):
            w.mul_(scale)
        torch._foreach_mul_(norms, scales)
        ds = torch._foreach_add(norms, eps)
    for m, w, d in zip(layers, ws, ds):
        low = torch.float32 if dtype is None or m.weight.ndim == 2 else dtype
        h = torch.div(w, d, out=torch.empty_like(w, dtype=low))
        m.hoisted = h.as_strided(m.weight.shape, m.weight.stride())
    return norms, ds


@torch.no_grad()
def pull_back(layers, norms, ds, anew):
    """Add (anew: write) (g - h (h . g) d / |w|) / d to .weight.grad; h = .hoisted = w / d, g its gradient."""
    torch._foreach_clamp_min_(norms, 1e-30)
    for m, ratio, inverse in zip(layers, torch._foreach_div(ds, norms), torch._foreach_reciprocal(ds)):
        if m.hoisted.grad is not None:
            h, g = rows(m.hoisted.detach()), rows(m.hoisted.grad)
            wide = torch.float32 if g.dtype == torch.float16 else g.dtype          # trap: h . g above 65,504
            # choice: in g's precision, by a matrix product: it reads each once and writes no product
            along = torch.bmm(h[:, None].to(wide), g[..., None].to(wide))[:, 0]
            g.addcmul_(h, along.mul_(ratio), value=-1)
            m.weight.grad = torch.zeros_like(m.weight) if m.weight.grad is None else m.weight.grad
            grad = rows(m.weight.grad)                # trap: write in place; .grad views the flat vector
            torch.mul(g, inverse, out=grad) if anew else grad.addcmul_(g, inverse)


def trainable(net):
    """MPConv layers of net that are not frozen."""
    return [m for m in net.modules() if isinstance(m, MPConv) and m.weight is not None]


@contextlib.contextmanager
def hoist(net, force=False):
    """Inside, all forward and backward passes of net share weights normalised once, in net.compute_dtype.

    force (once a step): the rows of every MPConv are first set to root mean square 1, in place (EDM2 Eq. 66),
    and their gradient is written to .grad, not added.
    trap: not in forward, unlike the official code: a second forward changes what the first's backward needs.
    At the end, the gradient collected over all micro-batches, in that precision, goes through the
    normalisation once, into weight.grad; after an exception it is dropped. Weights must not change inside.
    """
    layers = trainable(net)
    if not layers:                                    # frozen, or without MPConvs
        yield net
        return
    try:
        norms, ds = scale_rows(layers, getattr(net, "compute_dtype", None), force)
        for m in layers:
            m.hoisted.requires_grad_(m.weight.requires_grad)
        yield net
        pull_back(layers, norms, ds, force)
    finally:
        for m in layers:
            m.hoisted = None


def freeze(net):
    """Return net for inference only: weights normalised for good, one copy, in net.compute_dtype.

    The trainable weights are gone, so state_dict() is refused: net can be neither saved nor loaded into.
    """
    layers = trainable(net)
    if layers:
        scale_rows(layers, net.compute_dtype)
    for m in layers:
        m.weight = None

    def refuse(net, prefix, keep_vars):
        raise WeightsError("this network is frozen, it has no weights to save or load; keep its file")
    net.register_state_dict_pre_hook(refuse)
    return net.requires_grad_(False).eval()


class Block(nn.Module):
    """Residual block of EDM2, flavor "enc" (pixel norm first) or "dec", optional cosine attention.

    forward: x (B, in, H, W), emb (B, emb_channels) float32 -> (B, out, H', W'), |values| <= clip_act.
    """

    def __init__(self, in_channels, out_channels, emb_channels, flavor="enc", resample="keep",
                 attention=False, channels_per_head=64, dropout=0.0, res_balance=0.3, attn_balance=0.3,
                 clip_act=256):
        super().__init__()
        self.flavor, self.resample, self.dropout, self.width = flavor, resample, dropout, out_channels
        self.res_balance, self.attn_balance, self.clip_act = res_balance, attn_balance, clip_act
        self.heads = out_channels // channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1)) if self.heads else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if self.heads else None

    def forward(self, x, emb, kept=None):
        x = resample(x, self.resample)
        skip = (lambda x: x) if self.conv_skip is None else self.conv_skip
        if self.flavor == "enc":
            x = normalize(skip(x), 1)         # trap: pixel norm after the skip convolution, before the branch
        y = self.conv_res0(mp_silu(x))
        c = (self.emb_linear(emb, self.emb_gain) + 1).to(y.dtype)
        y = self.conv_res1(dropout(self, mp_silu(y * c[:, :, None, None]), kept))
        x = mp_sum(skip(x) if self.flavor == "dec" else x, y, self.res_balance)
        if self.heads:
            # trap: channel 3 (head channels_per_head + c) + {0, 1, 2} is q, k, v; no contiguous blocks
            qkv = self.attn_qkv(x).unflatten(1, (self.heads, -1, 3)).flatten(4)         # (B, heads, C, 3, HW)
            q, k, v = normalize(qkv.permute(3, 0, 1, 4, 2).contiguous(), -1)          # (B, heads, HW, C) each
            a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)     # (B, HW, heads C)
            a = a.transpose(1, 2).unflatten(2, x.shape[2:])                            # channels_last
            x = mp_sum(x, self.attn_proj(a), self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)


class EDM2UNet(UNet):
    """U-Net of EDM2. forward(x (B, C, H, W), noise_labels (B,), class_labels (B, label_dim) or None) -> F_x.

    The embedding is float32, the rest has x's dtype. block: Block's balances, clip_act and channels_per_head.
    dropout applies at resolutions up to dropout_res, or everywhere if that is None (ECT: 16).
    """

    def __init__(self, img_resolution, img_channels, label_dim, model_channels=192, channel_mult=(1, 2, 3, 4),
                 channel_mult_noise=None, channel_mult_emb=None, num_blocks=3, attn_resolutions=(16, 8),
                 label_balance=0.5, concat_balance=0.5, dropout=0.0, dropout_res=None, **block):
        super().__init__()
        widths = [model_channels * m for m in channel_mult]
        noise = model_channels * channel_mult_noise if channel_mult_noise is not None else widths[0]
        emb = model_channels * channel_mult_emb if channel_mult_emb is not None else max(widths)
        self.label_dim, self.label_balance, self.concat_balance = label_dim, label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise)
        self.emb_noise = MPConv(noise, emb)
        self.emb_label = MPConv(label_dim, emb) if label_dim else None

        def make(flavor, res, c_in, c_out, **kwargs):
            p = dropout if dropout_res is None or res <= dropout_res else 0.0
            return Block(c_in, c_out, emb, flavor, dropout=p, **kwargs, **block)
        first = MPConv(img_channels + 1, widths[0], (3, 3))
        c = self.add_blocks(make, first, img_resolution, widths, num_blocks, attn_resolutions, every=True)
        self.out_conv = MPConv(c, img_channels, (3, 3))

    def forward(self, x, noise_labels, class_labels=None, masks=None):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(class_labels * math.sqrt(self.label_dim)), self.label_balance)
        emb = mp_silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)             # a channel of ones replaces the biases
        x = self.walk(x, emb, masks, lambda x, skip: mp_cat(x, skip, self.concat_balance))
        return self.out_conv(x, self.out_gain)


class EDM2Precond(nn.Module):
    """EDM preconditioning around EDM2's U-Net: D_x = c_skip x + c_out F(c_in x, ln(sigma) / 4).

    forward(x (B, C, H, W), sigma (B,), class_labels (B, label_dim) one-hot, None = zeros = no class) -> D_x
    float32; with return_logvar, (D_x, u (B, 1, 1, 1)): u is the log variance in EDM2's loss. sigma > 0; as it
    falls to 0, D_x -> x. compute_dtype is for the U-Net's activations and, by casting, its weights; None =
    float32. The rest is always float32. logvar_channels = 0 leaves out the head of u, which ECT and CMT do
    not use. ValueError for any other resample_filter.
    """

    def __init__(self, img_resolution, img_channels, label_dim, sigma_data=0.5, logvar_channels=128,
                 compute_dtype=None, use_fp16=None, resample_filter=(1, 1), **unet):    # use_fp16 is not used
        super().__init__()
        if list(resample_filter) != [1, 1]:
            raise WeightsError(f"resample_filter={resample_filter!r}: EDM2 has [1, 1]; others are not here")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_data, self.compute_dtype = sigma_data, compute_dtype
        self.unet = EDM2UNet(img_resolution, img_channels, label_dim, **unet)
        self.logvar_fourier = MPFourier(logvar_channels) if logvar_channels else None
        self.logvar_linear = MPConv(logvar_channels, 1) if logvar_channels else None

    def forward(self, x, sigma, class_labels=None, return_logvar=False, masks=None):
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        if self.label_dim:
            none = x.new_zeros(len(x), self.label_dim)
            class_labels = none if class_labels is None else class_labels.float()
        variance = sigma**2 + self.sigma_data**2
        c_skip, c_in = self.sigma_data**2 / variance, variance.rsqrt()
        c_out, c_noise = sigma * self.sigma_data * c_in, sigma.flatten().log() / 4
        F_x = self.unet((c_in * x).to(self.compute_dtype or torch.float32), c_noise, class_labels, masks)
        D_x = c_skip * x + c_out * F_x.float()
        if not return_logvar:
            return D_x
        return D_x, self.logvar_linear(self.logvar_fourier(c_noise)).view(-1, 1, 1, 1)


# ---- distances -----------------------------------------------------------------------------------
# Each has .features(x) -> list of tensors, .distance(features_a, features_b) -> (B,), .forward(a, b) -> (B,),
# so that a target shared by many states has its features computed once.
class PixelDistance(nn.Module):
    """Mean square (huber = 0), or the norm's pseudo-Huber, sqrt(|a - b|^2 + c^2) - c with c = huber."""

    def __init__(self, huber=0.0):
        super().__init__()
        self.huber = huber

    def features(self, x):
        return [x]

    def distance(self, features_a, features_b):
        square = (features_a[0] - features_b[0]).square().flatten(1)
        if not self.huber:
            return square.mean(1)
        return (square.sum(1) + self.huber**2).sqrt() - self.huber

    def forward(self, a, b):
        return self.distance(self.features(a), self.features(b))


def unit(f, eps):
    """Feature map (B, C, H, W) of unit length over channels; eps keeps a zero pixel zero."""
    # trap: eps inside the root. Outside it, as in the lpips package, a zero pixel's derivative is 0 * inf
    return f * (f.square().sum(1, keepdim=True) + eps).rsqrt()


class VGG(nn.Module):
    """VGG with GroupNorm, trained on the labels of the data it will measure (App. B.5); LPIPS without heads.

    widths: a tuple of channels per slice; pools: slices that begin by halving the resolution. The distance is
    the squared difference of unit feature maps, summed over channels and slices, averaged over pixels. groups
    = 0: 8 channels each; None: no norm. .logits(x) -> (B, num_classes) trains; num_classes = 0: no head.
    """

    def __init__(self, in_channels=1, widths=((16, 16), (32, 32), (64, 64)), num_classes=10, pools=(1, 2),
                 groups=0):
        super().__init__()
        self.slices, self.eps, c = nn.ModuleList(), 1e-8, in_channels
        for k, slice_ in enumerate(widths):
            layers = [nn.MaxPool2d(2)] if k in pools else []
            for width in slice_:
                norm = [] if groups is None else [nn.GroupNorm(groups or width // 8, width)]
                layers += [nn.Conv2d(c, width, 3, padding=1), *norm, nn.ReLU()]
                c = width
            self.slices.append(nn.Sequential(*layers))
        self.head = nn.Linear(c, num_classes) if num_classes else None

    def maps(self, x):
        """The output of each slice."""
        out = []
        for slice_ in self.slices:
            x = slice_(x)
            out.append(x)
        return out

    def logits(self, x):
        return self.head(self.maps(x)[-1].mean((2, 3)))

    def features(self, x):
        return [unit(f, self.eps) for f in self.maps(x)]

    def distance(self, features_a, features_b):
        return sum((a - b).square().sum(1).mean((1, 2)) for a, b in zip(features_a, features_b))

    def forward(self, a, b):
        return self.distance(self.features(a), self.features(b))


class LPIPS(VGG):
    """LPIPS v0.1 with VGG-16: (B, 3, H, W) in [-1, 1], any size from 16 pixels; no resize, no clamp (B.2).

    vgg_state: state dict of torchvision's VGG-16 (`features.*`; the classifier is left out); None = random
    weights. The weights are frozen; gradients reach the images.
    """
    WIDTHS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)

    def __init__(self, vgg_state=None):
        super().__init__(3, self.WIDTHS, num_classes=0, pools=(1, 2, 3, 4), groups=None)
        self.eps = 1e-20
        self.heads = nn.ModuleList([nn.Conv2d(slice_[-1], 1, 1, bias=False) for slice_ in self.WIDTHS])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        if vgg_state is not None:
            trunk = nn.Sequential(*[layer for slice_ in self.slices for layer in slice_])    # torchvision's
            state = {k[9:]: v for k, v in vgg_state.items() if k.startswith("features.")}
            load_weights(trunk, state, "VGG-16")
        state = torch.load(lpips_heads(), map_location="cpu", weights_only=True)
        load_weights(self.heads, {f"{k}.weight": state[f"lin{k}.model.1.weight"] for k in range(5)}, "LPIPS")
        self.requires_grad_(False).eval()

    def maps(self, x):
        return super().maps((x - self.shift) / self.scale)

    def distance(self, features_a, features_b):
        return sum(head((a - b).square()).mean((1, 2, 3))
                   for head, a, b in zip(self.heads, features_a, features_b))


def pretrained_lpips():
    """LPIPS with torchvision's VGG-16, downloaded to the cache once."""
    try:
        return LPIPS(load_pretrained(fetch(VGG_URL))[0])
    except OSError as e:
        raise OSError(f"{e}, or measure pixels, without a VGG: --loss huber") from None


def lpips_heads():
    """Path of the linear heads in the installed lpips package; FileNotFoundError with the install line."""
    spec = importlib.util.find_spec("lpips")          # an import would need a torchvision of just this torch
    if spec is None:
        raise FileNotFoundError("the linear heads of LPIPS are in a package: pip install lpips")
    return os.path.join(os.path.dirname(spec.origin), "weights", "v0.1", "vgg.pth")


class ELatentLPIPS(VGG):
    """VGG-16 with GroupNorm on latents (B, 4, 64, 64) of deviation 0.5; taps at 64, 64, 64, 32, 16 (B.5).

    vgg_state: state dict of a net trained through .logits; None = random weights. num_classes: adds VGG-16's
    head, trainable; 0 = only the distance, frozen. ensemble: a name in ENSEMBLES for random views (blit,
    geometry, colour, filter, noise, cutout): .draw makes one per sample, .augment applies it to both images
    before .features; a target's features can be kept only without an ensemble.
    """
    ENSEMBLES = {"none": "", "bg": "bg", "bgc": "bgc", "bgcfnc": "bgcfno"}       # o: cutout

    def __init__(self, vgg_state=None, num_classes=0, ensemble="none"):
        super().__init__(4, LPIPS.WIDTHS, num_classes=0, pools=(3, 4), groups=32)
        self.parts = self.ENSEMBLES[ensemble]
        names = dict(affine="b", colour="c", gains="f", noise="n", mask="o")
        self.views = [name for name, part in names.items() if part in self.parts]      # what .draw returns
        if num_classes:
            self.head = nn.Sequential(
                nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Dropout(),
                nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, num_classes))
        for m in self.modules():                      # torchvision's initialisation of VGG
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.zeros_(m.bias)
        if vgg_state is not None:
            state = {k: v for k, v in vgg_state.items() if num_classes or not k.startswith("head.")}
            load_weights(self, state, "the VGG of latents")
        if not num_classes:
            self.requires_grad_(False).eval()

    def logits(self, x):
        return self.head(self.maps(x)[-1])

    def draw(self, x, generator):
        """A dict: one random transformation per sample of x, distributed as in StyleGAN2-ADA."""
        def N(*shape, law=torch.randn):
            return law(len(x), *shape, generator=generator, device=generator.device).to(x)

        def U(*shape):
            return N(*shape, law=torch.rand)

        (C, H, W), draw = x.shape[1:], {}
        # affine maps work on [-1, 1]: a pixel is 2 / size; not new_tensor: the host waits for its copy
        size = torch.cat([x.new_full((1,), n) for n in (W, H)])
        if "b" in self.parts:
            pixels = ((U(2) - 0.5) * size / 4).round()
            draw["affine"] = affine((U() * 4).floor() / 4, U().round() * 2 - 1, 1, pixels * 2 / size)
        if "g" in self.parts:
            scale, aspect = 2 ** (0.2 * N()), 2 ** (0.2 * N())
            stretched = affine(U(), scale * aspect, scale / aspect, N(2) / 4)
            draw["affine"] = draw["affine"] @ stretched @ affine(U())
        if "c" in self.parts:
            bright, contrast = 0.2 * N(), 2 ** (0.5 * N())
            draw["colour"] = rgb_matrix(bright, contrast, U().round() * 2 - 1, U(), 2 ** N())
        if "f" in self.parts:                     # band by band, keeping the power of a 1/f spectrum
            draw["gains"] = x.new_ones(len(x), 4)
            power = torch.cat([x.new_full((n,), share / 13) for n, share in ((1, 10), (3, 1))])
            for band in range(4):
                draw["gains"][:, band] *= 2 ** N()
                draw["gains"] /= (draw["gains"] ** 2 * power).sum(1, keepdim=True).sqrt()
        if "n" in self.parts:
            draw["noise"] = 0.1 * N(1, 1, 1).abs() * N(C, H, W)
        if "o" in self.parts:                      # zero a rectangle of half the height and half the width
            places = (torch.arange(n, device=x.device) + 0.5 for n in (H, W))
            rows, columns = ((p - U(1) * len(p)).abs() >= len(p) / 4 for p in places)
            draw["mask"] = (rows[:, None, :, None] | columns[:, None, None, :]).to(x)
        return draw

    @staticmethod
    def augment(x, draw):
        """Apply what .draw returned to x; differentiable in x."""
        if "affine" in draw:
            # choice: bilinear sampling, reflection at the borders; the authors resample by a sym6 wavelet
            grid = F.affine_grid(draw["affine"][:, :2], x.shape, align_corners=False)
            x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        if "colour" in draw:
            x = torch.einsum("bij,bjhw->bihw", draw["colour"], x)
        if "gains" in draw:
            # choice: four bands by binomial blurs of reach 1, 2, 4; the authors filter with a sym2 wavelet
            fine = blur(x, 1)
            middle = blur(fine, 2)
            low = blur(middle, 4)
            bands = zip(draw["gains"].unbind(1), (low, middle - low, fine - middle, x - fine))
            x = sum(gain[:, None, None, None] * band for gain, band in bands)
        return (x + draw.get("noise", 0)) * draw.get("mask", 1)


def affine(turns, sx=1, sy=1, shift=0):
    """(B, 3, 3): scale by sx, sy, rotate by `turns` (B,) full turns, move by shift (B, 2)."""
    c, s = (2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()
    last = torch.cat([turns.new_zeros(2), turns.new_ones(1)])
    linear = torch.stack([c * sx, -s * sy, s * sx, c * sy], 1).view(-1, 2, 2)
    moved = torch.cat([linear, (shift + torch.zeros_like(linear[:, 0]))[:, :, None]], 2)
    return torch.cat([moved, last.expand(len(c), 1, 3)], 1)


def rgb_matrix(bright, contrast, luma, hue, saturation):
    """(B, 4, 4) colour matrix of StyleGAN2-ADA. Arguments are (B,): luma 1 or -1 (flipped), hue in turns."""
    # choice: the matrix of RGB pixels acts on 4 latent channels, as the authors ran it; the 4th is RGB's 1
    grey, eye = bright.new_full((3, 3), 1 / 3), torch.eye(4, device=bright.device, dtype=bright.dtype)
    cross = (eye[:3, :3].roll(1, 0) - eye[:3, :3].roll(-1, 0)) / math.sqrt(3)          # [0, -1, 1], ...
    given = bright, contrast, luma, 2 * math.pi * hue, saturation
    bright, contrast, luma, hue, saturation = (v.view(-1, 1, 1) for v in given)
    around = hue.cos() * (eye[:3, :3] - grey) + hue.sin() * cross    # saturation scales away from grey
    matrix = eye.repeat(len(bright), 1, 1)
    matrix[:, :3, :3] = contrast * (luma * grey + saturation * around)
    matrix[:, :3, 3:] = contrast * luma * bright
    return matrix


def blur(x, reach):
    """Filter [1, 2, 1] / 4 along both axes with taps `reach` apart, borders reflected."""
    x = F.pad(x, (reach,) * 4, mode="reflect")
    x = (x[..., :-2 * reach] + 2 * x[..., reach:-reach] + x[..., 2 * reach:]) / 4
    return (x[..., :-2 * reach, :] + 2 * x[..., reach:-reach, :] + x[..., 2 * reach:, :]) / 4


# ---- checkpoint import ------------------------------------------------------------------------
EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-%s-uncond-vp.pkl"
EDM2_URL = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/%s.pkl"
PRETRAINED = {"cifar10": EDM_URL % "cifar10-32x32", "ffhq": EDM_URL % "ffhq-64x64",
              "afhqv2": EDM_URL % "afhqv2-64x64",
              # choice: 64's teacher is not named; this one has the FID the paper quotes, 1.33 in 63 calls
              "imagenet64": EDM2_URL % "edm2-img64-xl-0671088-0.040",
              "imagenet512": EDM2_URL % "edm2-img512-xxl-0939524-0.070"}
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
CHECKSUMS = {  # url -> sha256; NVIDIA publishes none, so `fetch` prints one to pin here once you trust a file
    VGG_URL: "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz":
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}
INTERFACE = ("img_resolution", "img_channels", "label_dim")    # first arguments of EDM's and EDM2's classes


class WeightsError(ValueError):
    """Weights that cannot be used; the one-line message names the file, the fault and the remedy."""


class UnsafePickle(WeightsError):
    """A file asks for something that is not on the allow-list. Nothing that it asked for was done."""


class Record:
    """Stand-in for any class or function a foreign pickle names: keeps arguments and state, does nothing."""
    __slots__ = ("args", "state")

    def __new__(cls, *args):
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state):                    # trap: else BUILD sets attributes, even of this class
        self.state = state


GLOBALS = {  # everything a file may name; a pickle cannot alter builtin types or torch dtypes
    ("collections", "OrderedDict"): dict, ("dnnlib.util", "EasyDict"): dict,
    ("__builtin__", "set"): set, ("builtins", "set"): set,
    **{("torch", f"{name}Storage"): getattr(torch, name.lower())
       for name in ("Half", "Float", "Double", "BFloat16", "Long", "Int", "Short")},
    **{(module, name): type(name, (Record,), {"__slots__": ()}) for module, names in (
        ("torch_utils.persistence", ["_reconstruct_persistent_obj"]),
        ("torch._utils", ["_rebuild_parameter", "_rebuild_tensor_v2"]),
        ("torch.storage", ["_load_from_bytes"]),
        ("torch.nn.modules.container", ["ModuleDict", "ModuleList", "Sequential"]),
        ("numpy", ["dtype", "ndarray"]), ("_codecs", ["encode"]),
        ("numpy.core.multiarray", ["scalar", "_reconstruct"]),     # numpy 1
        ("numpy._core.multiarray", ["scalar", "_reconstruct"]),    # numpy 2
    ) for name in names},
}
# trap: EXT codes come from a cache of real objects, bypassing find_class. The rest is never needed.
REFUSED = {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ_EX", "BYTEARRAY8",
           "NEXT_BUFFER", "READONLY_BUFFER"}


class Reader(pickle.Unpickler):
    """Unpickler that builds plain values and Records. Names are looked up in GLOBALS; nothing is imported."""

    def find_class(self, module, name):
        if (module, name) not in GLOBALS:             # the exact pair, so a dotted name leads nowhere
            raise UnsafePickle(f"it asks for {f'{module}.{name}'[:80]!r}, which is not on the allow-list")
        return GLOBALS[module, name]

    def persistent_load(self, pid):                   # only inside storages; REFUSED keeps it out elsewhere
        return pid


def read_pickle(stream, refused=REFUSED):
    """The next pickle of a stream as a tree of plain values and Records. Damage may raise any error."""
    start = stream.tell()
    for op, arg, position in pickletools.genops(stream):
        # trap: a memo index requests memory; nine bytes of a file can ask for 64 GB
        if op.name in refused or (op.name.endswith("PUT") and arg > position):
            raise UnsafePickle(f"it uses opcode {op.name} {arg!r:.20} at byte {position}")
    stream.seek(start)
    return Reader(stream).load()


def kind(node):
    """Name of a value's type, or of what a Record stands for."""
    return type(node).__name__


def raw_bytes(node):
    """A bytes object, which protocol 2 writes as _codecs.encode(text, 'latin1')."""
    return node.args[0].encode("latin1") if kind(node) == "encode" else node


def read_storage(node):
    """_load_from_bytes Record -> its numbers as a flat tensor with memory of its own.

    The bytes are torch's legacy format: five pickles (magic, 1001, system, record, keys), the count as int64,
    the numbers. Stock torch runs these inner pickles. ValueError unless every byte is accounted for.
    """
    raw = raw_bytes(node.args[0])
    stream = io.BytesIO(raw)
    magic, version, system, record, keys = (read_pickle(stream, REFUSED - {"BINPERSID"}) for _ in range(5))
    tag, dtype, key, _, numel, view = record          # _ is the device it was saved from
    start, count = stream.tell() + 8, stream.read(8)
    if not (magic == 0x1950A86A20F9469CFC6C and version == 1001 and system["little_endian"] is True
            and tag == "storage" and isinstance(dtype, torch.dtype) and view is None and keys == [key]
            and count == numel.to_bytes(8, "little") and len(raw) == start + numel * dtype.itemsize):
        raise ValueError("a tensor's storage has a wrong header or length")
    return torch.from_numpy(np.ndarray(numel, f"<i{dtype.itemsize}", raw, start).copy()).view(dtype)


def read_tensor(node):
    """_rebuild_parameter or _rebuild_tensor_v2 Record -> tensor."""
    node = node.args[0] if kind(node) == "_rebuild_parameter" else node
    if kind(node) != "_rebuild_tensor_v2" or kind(node.args[0]) != "_load_from_bytes":
        raise ValueError(f"a tensor is made by {kind(node)!r}")
    storage, offset, size, stride = node.args[:4]
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise ValueError("a tensor has a negative or no size, stride or offset")
    if not torch.is_tensor(storage.args):             # trap: drop bytes, else EDM2-XXL takes twice its 3 GB
        storage.args = read_storage(storage)
    flat = storage.args
    end = 1 + offset + sum((n - 1) * s for n, s in zip(size, stride)) if 0 not in size else 0
    if max(end, math.prod(size)) > len(flat):         # trap: stride 0 always fits; its copy can be any size
        raise ValueError(f"a tensor of size {size}, stride {stride} leaves its storage of {len(flat)}")
    return flat.as_strided(size, stride, offset)


def read_module(node, prefix, state):
    """Fill `state` with a recorded module's tensors by name, in torch's order. Returns its __dict__."""
    fields = node.args[0]["state"] if kind(node) == "_reconstruct_persistent_obj" else node.state
    for name, tensor in (*fields["_parameters"].items(), *fields["_buffers"].items()):
        if tensor is not None and name not in fields.get("_non_persistent_buffers_set", ()):
            state[prefix + name] = read_tensor(tensor)
    for name, child in fields["_modules"].items():
        if child is not None:
            read_module(child, f"{prefix}{name}.", state)
    return fields


def plain(value):
    """A recorded argument as plain Python; numpy scalars become numbers. ValueError for anything else."""
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if kind(value) == "scalar":
        dtype, raw = value.args
        if dtype.args[0] in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
            return np.frombuffer(raw_bytes(raw), np.dtype(dtype.args[0]).newbyteorder(dtype.state[1])).item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a constructor argument is a {kind(value)}")


def read_nvidia(path):
    """(state_dict, init_kwargs) of the `ema` network of a .pkl by EDM, EDM2, ECT or CMT."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
        root = read_pickle(view)
    ema = root.pop("ema", None) if isinstance(root, dict) else None
    if kind(ema) != "_reconstruct_persistent_obj":
        raise ValueError("no `ema` network in it")
    if ema.args[0]["class_name"] in ("VPPrecond", "VEPrecond", "iDDPMPrecond"):     # same names, other noise
        raise ValueError(f"its {ema.args[0]['class_name']} has another noise process than EDMPrecond")
    state = {}
    fields = read_module(ema, "", state)
    args, kwargs = plain(fields.get("_init_args", ())), plain(fields.get("_init_kwargs", {}))
    named = {"_init_args": args} if len(args) > len(INTERFACE) else dict(zip(INTERFACE, args))
    return state, {**named, **kwargs}


def read_torch(path):
    """What a .pt holds, memory-mapped. Settings beside the weights (DiT, SiT, REPA) become Records."""
    settings = ("argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar",
                "numpy._core.multiarray.scalar")
    try:
        with torch.serialization.safe_globals([(Record, name) for name in settings]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        name = re.search(r"GLOBAL ([\w.]+)", str(e))
        if name is None:
            raise ValueError("torch.load(weights_only=True) cannot read it; NVIDIA's must end in .pkl") from e
        raise UnsafePickle(f"it asks for {name[1]!r}, which torch.load(weights_only=True) forbids; save its "
                           "state dict alone") from None


DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)


def read_safetensors(path):
    """What a .safetensors holds, memory-mapped: the header's length, a JSON header, the numbers."""
    data = torch.from_file(path, size=os.path.getsize(path), dtype=torch.uint8)
    start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
    header, data = json.loads(data[8:start].numpy().tobytes()), data[start:]
    ours, state, end = header.pop("__metadata__", {}).get("cmt"), {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        fits = first == end and last - first == math.prod(shape) * dtype.itemsize
        if not fits or any(type(n) is not int or n < 0 for n in (first, last, *shape)):
            raise ValueError(f"{name[:80]!r} is not where the tensor before it ends, or has another size")
        raw, end = data[first:last], last
        state[name] = (raw.clone() if raw.data_ptr() % dtype.itemsize else raw).view(dtype).view(shape)
    if end != len(data):
        raise ValueError(f"{len(data)} bytes of tensors, its header says {end}")
    return {"ema": state, **json.loads(ours)} if ours else state


def write_safetensors(ckpt, file):
    """Write a checkpoint's average as .safetensors, constructor arguments and configuration in its header."""
    state, end = sorted(ckpt["ema"].items(), key=lambda item: -item[1].dtype.itemsize), 0        # so aligned
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"cmt": json.dumps({k: ckpt[k] for k in ("model", "cfg")})}}
    for k, v in state:
        offsets, end = [end, end + v.nbytes], end + v.nbytes
        header[k] = dict(dtype=names[v.dtype], shape=list(v.shape), data_offsets=offsets)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, v in state:
        file.write(v.contiguous().flatten().view(torch.uint8).numpy())


AVERAGED = {"ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema"}
TRAINED = {"model", "net", "module", "state_dict", "model_state_dict", "params"}


def state_dicts(tree, place=()):
    """Every state dict in nested dicts, by its place; keys like ema.x beside net.x, or module.x, nest too."""
    if not isinstance(tree, dict) or not all(isinstance(k, str) for k in tree):
        return {}
    if tree and all(map(torch.is_tensor, tree.values())):
        plain, groups = {k.replace("_orig_mod.", ""): v for k, v in tree.items()}, {}      # of torch.compile
        tree = plain if len(plain) == len(tree) else tree
        for k, v in tree.items():
            head, _, rest = k.partition(".")
            groups.setdefault(head, {})[rest] = v
        if not AVERAGED & groups.keys() and groups.keys() not in ({"module"}, {"net"}):
            return {place: tree}
        tree = groups
    return {p: state for k, v in tree.items() for p, state in state_dicts(v, (*place, k)).items()}


def choose(tree):
    """(place, state dict) in a nest: average, else trained net, else the only one; ValueError if two."""
    found = state_dicts(tree)
    for names in (AVERAGED, TRAINED, {name for place in found for name in place}):
        places = [place for place in found if not place or names & set(place)]
        if len(places) > 1:
            raise ValueError(f"it holds {', '.join(map('.'.join, places))[:99]}; save the one you want alone")
        if places:
            return places[0], found[places[0]]
    raise ValueError(f"no state dict in it, its keys are {list(tree)[:5]}")


def unet_size(state):
    """Constructor arguments of a bare DDPM++ or EDM2: the SIZES row with its width; {} for any other net."""
    found = re.search(r"^(model|unet)\.enc\.(\d+)x\2_conv\.weight$", "\n".join(state), re.M)
    if not found:
        return {}
    edm2, (width, channels, *_) = found[1] == "unet", state[found[0]].shape
    labels = state.get("unet.emb_label.weight" if edm2 else "model.map_label.weight", torch.empty(0, 0))
    family = "edm2-" if edm2 else f"ddpm++-{found[2]}"
    rows = [row for name, row in SIZES.items() if name.startswith(family) and row["model_channels"] == width]
    given = dict(img_resolution=int(found[2]), img_channels=channels - edm2, label_dim=labels.shape[1])
    return {**rows[0], **given} if rows else {}       # EDM2 adds a channel of ones


def read_weights(path_or_url):
    """load_pretrained's (state_dict, init_kwargs), plus the configuration in our own files, else {}."""
    path = str(path_or_url)
    if path.startswith("edm2-") and not os.path.exists(path):
        path = EDM2_URL % path
    path = fetch(path) if "://" in path else path
    if not os.path.isfile(path):
        fault = "a folder, not a" if os.path.isdir(path) else "no such"
        raise FileNotFoundError(f"{path or repr(path)}: {fault} file; give a file or a URL")
    with open(path, "rb") as f:
        if re.fullmatch(rb"[\s!-~]*", f.read(99)):    # a page of a site, a pointer of git-lfs
            raise WeightsError(f"{path}: text or empty, no weights; pass the weights themselves")
    try:
        if path.endswith(".pkl"):
            return *read_nvidia(path), {}
        tree = read_safetensors(path) if path.endswith(".safetensors") else read_torch(path)
        place, state = choose(tree)
        model, size = tree.get("model"), unet_size(state)
        wrong = zipfile.is_zipfile(path) and not is_whole(path, os.stat(path).st_mtime_ns)
    except UnsafePickle as e:
        raise UnsafePickle(f"{path}: refused, {e}") from None
    except Exception as e:                            # a cut file can fail anywhere; the cause is chained
        if isinstance(e, OSError) and e.errno != 22:  # 22: what torch raises for a truncated file
            raise
        reason = "it ends too early" if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        reason = reason.splitlines()[0].split(". ")[0][:200]
        raise WeightsError(f"{path}: damaged, cut short or of another kind ({reason}); pass another") from e
    # trap: DiT and REPA keep weights under `model`, where our checkpoints keep constructor arguments
    no_weights = not any(map(torch.is_tensor, tree_leaves(model)))
    own = place[:1] == ("ema",) and isinstance(model, dict) and no_weights
    if wrong and own:
        raise WeightsError(f"{path}: damaged, a byte in it is wrong (CRC); copy it again")
    if wrong:
        tell(f"warning: {path} has wrong checksums (CRC): damaged, or saved without them")
    if own:
        if tree.get("step", math.inf) < (steps := tree.get("cfg", {}).get("steps", 0)):
            tell(f"warning: {path} is not finished, step {tree['step']:,} of {steps:,}")
        MAKERS[str(path_or_url)] = f" of {tree.get('script', 'another script')}"
        return state, model or size, tree.get("cfg", {})
    if place:
        tell(f"{path}: took its {'.'.join(place)}; it holds {', '.join(tree)[:80]}")
    return state, size, {}


@functools.cache
def tell(text):
    """Print a line about a file once, from the first process, on stderr, apart from results."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def load_pretrained(path_or_url):
    """(state_dict, init_kwargs) of a checkpoint, without running anything the file holds.

    *.pkl: the `ema` network of EDM, EDM2, ECT or CMT; init_kwargs are its constructor's arguments, plain
    values under NVIDIA's names. *.safetensors and other names (torch.load, weights_only=True): our own
    checkpoint, or the state dict that `choose` finds, whose kwargs are those of a U-Net in SIZES or {}. A URL
    is fetched. Tensors are on the CPU in the file's dtype (EDM2: fp16, load_weights casts). UnsafePickle, a
    ValueError, names what the file asked for; ValueError if damaged, OSError if missing.
    """
    return read_weights(path_or_url)[:2]


def make(network, model, what, **more):
    """network(**model, **more), `model` from the file named `what`; WeightsError if it has no such net."""
    try:
        return network(**{**model, **more})
    except Exception as e:                            # wrong arguments can surface as any error
        if not what:
            raise WeightsError(f"model_size does not say the arguments of {network.__name__}: {e}") from e
        reason = "" if isinstance(e, TypeError) else f" ({e})"
        kind = f"{MAKERS.get(what, '')} with {', '.join([*map(str, model)][:5])}"
        why = f"{network.__name__}, but one{kind}{reason}; pass weights of this script's network"
        raise WeightsError(f"{what}: no {why if model else NO_SIZE}") from e


NO_SIZE = "net of nets.SIZES has such weights; pass the .pt or .pkl of its training"
MAKERS = {}                                           # file: " of " + the script that made it
HIDDEN = ("num_heads", "channels_per_head", "sigma_data", "label_balance", "concat_balance", "res_balance",
          "attn_balance", "clip_act")                 # arguments not visible in weights


def fitting(state, said, model, what):
    """Return state, of a net with arguments `said`, if a net with `model` would compute the same with it."""
    usual = {k: p.default for network in (Block, EDM2UNet, EDM2Precond, DiT)
             for k, p in inspect.signature(network).parameters.items()}
    both = said.keys() & model.keys()
    for k in (*sorted(both & {"img_channels", "in_channels", "input_size"}), *HIDDEN) if both else ():
        was, now = said.get(k, usual.get(k)), model.get(k, usual.get(k))
        if was != now:
            raise WeightsError(f"{what} was trained with {k} {was}, the net to train has {now}")
    return state


def load_weights(net, state, what):
    """Copy a state dict into net by name, in net's dtype. what: the file's name, for the message.

    map_augment adds nothing without augment labels and is dropped if net lacks it. ValueError with the first
    names (and shapes) if any is missing, unexpected or of another shape; in that case nothing is copied.
    """
    own = net.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.endswith("map_augment.weight")}
    wrong = {"missing": [k for k in own if k not in state], "unexpected": [k for k in state if k not in own],
             "of another shape": [f"{k} {tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the net"
                                  for k in own if k in state and state[k].shape != own[k].shape],
             "not finite, or of another type": [k for k, v in state.items() if not v.isfinite().all() or (
                                         k in own and v.is_floating_point() != own[k].is_floating_point())]}
    text = [f"{len(w)} {how}: {', '.join(w[:5])}{', ...' * (len(w) > 5)}" for how, w in wrong.items() if w]
    if text:                                          # trap: raise before any copy, or half would be loaded
        raise WeightsError(f"{what} does not fit the network: {'; '.join(text)}; pass others")
    for k, tensor in own.items():
        tensor.copy_(state[k])


def fetch(url, sha256=""):
    """Path of url's file in the cache ($CMT_CACHE, else ~/.cache/cmt), downloaded if it is not there yet.

    sha256 (default: from CHECKSUMS) is checked, for a cached file too. A download gets its final name only
    once it is complete and right. OSError names url, file and remedy; WeightsError names both checksums.
    """
    sha256 = sha256 or CHECKSUMS.get(url, "")
    cache = os.environ.get("CMT_CACHE") or os.path.expanduser("~/.cache/cmt")
    name = os.path.basename(urllib.parse.urlsplit(url).path)
    # trap: snapshots of two runs share a name, which by itself would return the wrong network
    target = os.path.join(cache, f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}")
    try:
        os.makedirs(cache, exist_ok=True)
        part, folder = f"{target}.{os.getpid()}.part", os.open(cache, os.O_RDONLY)
    except OSError as e:
        raise WeightsError(f"{cache}: {e.strerror}; set $CMT_CACHE to a folder of yours") from None
    fcntl.flock(folder, fcntl.LOCK_EX)    # trap: else each process of a machine would download a copy
    try:
        if os.path.exists(target):
            if sha256:
                check_sum(target, f"{target} (delete it to download it again)", sha256)
            return target
        if os.environ.get("CMT_OFFLINE") == "dry run":    # of fid.dry_run
            raise SystemExit(tell(f"to download: {url} -> {target}"))
        if os.environ.get("CMT_OFFLINE"):
            raise OSError("CMT_OFFLINE is set")
        with urllib.request.urlopen(url, timeout=60) as r, open(part, "wb") as f:
            size = r.headers.get("Content-Length")
            tell(f"downloading {url}, {size or 'unknown number of'} bytes, to {target}")
            shutil.copyfileobj(r, f, 1 << 20)
        if size and int(size) != os.path.getsize(part):    # trap: a lost connection looks like the file's end
            raise OSError(f"{os.path.getsize(part)} of {size} bytes arrived")
        tell(f"sha256 {check_sum(part, url, sha256)}  {target}")
        os.replace(part, target)
        return target
    except (OSError, http.client.HTTPException) as e:
        raise OSError(f"cannot download {url} ({e}): download it yourself and save it as {target}") from None
    finally:
        os.close(folder)
        if os.path.exists(part):
            os.remove(part)


def check_sum(path, what, expected):
    """sha256 of a file. WeightsError with `what` and both sums unless it is the expected one ("" = any)."""
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if expected and found != expected.lower():
        raise WeightsError(f"{what}: its sha256 is {found}, expected {expected}")
    return found


# ---- DiT, SiT, MM-DiT ----------------------------------------------------------------------------
# One clock for all: z_t = (1 - t) data + t noise, so t = 1 is noise and the velocity is v = noise - data.
# Mean Flow's average velocity is u(z_t, t, r) = (z_t - z_r) / (t - r), 0 <= r <= t <= 1; u(z, t, t) is v.
class TimestepEmbedder(nn.Module):
    """t (B,), not scaled by 1000 -> (B, hidden_size): cos and sin of w t, w = 10000^(-k/128), then an MLP."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        with torch.autocast(t.device.type, enabled=False):    # trap: bf16 rounds t, and t - r, to 0.004
            t = t.to(self.mlp[0].weight.dtype)
            angles = t[:, None] * frequencies(t)
            return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


def frequencies(like):
    """w (128,) of the time features, in the dtype and on the device of `like`."""
    return 1e-4 ** (torch.arange(128, device=like.device, dtype=like.dtype) / 128)


def sincos(grid, dim):
    """Position table (1, grid * grid, dim), row-major tokens: first half from columns, second from rows."""
    angles = torch.arange(grid).double()[:, None] * 1e-4 ** (torch.arange(dim // 4).double() / (dim // 4))
    axis = torch.cat([angles.sin(), angles.cos()], 1)                                # (grid, dim / 2)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], 1)[None].float()


def modulate(x, shift, scale):
    """Layer norm without weights of x (B, N, D), then shift and scale (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def attention(qkv):
    """qkv (B, N, 3, heads, d) -> (B, N, heads * d): a fused kernel, or plain softmax in torch.func.jvp."""
    q, k, v = qkv.transpose(1, 3).unbind(2)                                          # (B, heads, N, d)
    # trap: no fused kernel has a forward derivative. The level is private and -1 outside forward mode; unlike
    # looking for tangents, it also works under vmap and torch.compile
    if forward_ad._current_level < 0:
        a = F.scaled_dot_product_attention(q, k, v)
    else:
        a = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return a.transpose(1, 2).flatten(2)


class DiTBlock(nn.Module):
    """Transformer block with adaptive layer norm, split at its attention, where MM-DiT joins two streams.

    x (B, N, D), m = modulation(c (B, D)). pre_only: MM-DiT's last text block, which is read, then dropped.
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, pre_only=False):
        super().__init__()
        self.num_heads, self.chunks, wide = num_heads, 2 if pre_only else 6, int(hidden_size * mlp_ratio)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(hidden_size, 3 * hidden_size)})
        if not pre_only:
            self.attn["proj"] = nn.Linear(hidden_size, hidden_size)
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(hidden_size, wide),
                                      "fc2": nn.Linear(wide, hidden_size)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, self.chunks * hidden_size))

    def modulation(self, c):
        return self.adaLN_modulation(c)[:, None].chunk(self.chunks, 2)    # shift, scale, gate; attention, MLP

    def qkv(self, x, m):
        return self.attn.qkv(modulate(x, m[0], m[1])).unflatten(2, (3, self.num_heads, -1))

    def update(self, x, a, m):
        x = x + m[2] * self.attn.proj(a)
        h = F.gelu(self.mlp.fc1(modulate(x, m[3], m[4])), approximate="tanh")
        return x + m[5] * self.mlp.fc2(h)

    def forward(self, x, c):
        m = self.modulation(c)
        return self.update(x, attention(self.qkv(x, m)), m)


class FlowTransformer(nn.Module):
    """What DiT and MM-DiT share: patches in, one clock or two, REPA's projector, patches out."""

    def __init__(self, input_size, patch_size, in_channels, hidden_size, average_velocity):
        super().__init__()
        self.patch_size, self.grid = patch_size, input_size // patch_size
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)})
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.r_embedder = TimestepEmbedder(hidden_size) if average_velocity else None

    def tokens(self, x):                                           # (B, C, H, W) -> (B, N, D)
        return self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed

    def clock(self, x, t, r):
        t = t.expand(len(x))
        c = self.t_embedder(t)
        if self.r_embedder is not None:                            # embeds t - r, the length of the interval
            c = c + self.r_embedder((t - (t if r is None else r)).expand(len(x)))
        return c

    def add_projector(self, hidden_size, repa_dim, repa_depth, projector_dim, depth):
        """REPA (Yu et al. 2025): an MLP after block repa_depth, counted from 1. repa_dim = 0: none."""
        if repa_dim and not 1 <= repa_depth <= depth:
            raise ValueError(f"repa_depth={repa_depth}: the network has {depth} blocks")
        self.repa_depth = repa_depth if repa_dim else 0
        if repa_dim:
            self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(hidden_size, projector_dim), nn.SiLU(),
                nn.Linear(projector_dim, projector_dim), nn.SiLU(), nn.Linear(projector_dim, repa_dim))])

    def add_final_layer(self, hidden_size, out_channels):
        self.final_layer = nn.ModuleDict({
            "linear": nn.Linear(hidden_size, self.patch_size**2 * out_channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))})

    def read_out(self, h, c, x, z):                                # -> u (B, C, H, W) | (u, z), in x's dtype
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, 2)
        h = self.final_layer.linear(modulate(h, shift, scale))     # (B, grid * grid, patch * patch * C)
        h = h.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, (self.grid, self.grid))
        u = h.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).to(x.dtype)
        return u if z is None else (u, z.to(x.dtype))


class DiT(FlowTransformer):
    """DiT (Peebles & Xie 2023): the velocity of SiT (one clock) or the average velocity of Mean Flow (two).

    forward(x (B, C, H, W), t (B,), r (B,) or None = t, y (B,) integers or None) -> u (B, C, H, W).
    y = num_classes, or None, is the null class. average_velocity=False uses only t and ignores r. With
    repa_dim the result is (u, z (B, N, repa_dim)); repa=False skips the projector and returns only u, for
    sampling and the Jacobian product.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, average_velocity=True, repa_dim=0, repa_depth=8,
                 projector_dim=2048):
        super().__init__(input_size, patch_size, in_channels, hidden_size, average_velocity)
        self.num_classes = num_classes
        self.pos_embed = nn.Parameter(sincos(self.grid, hidden_size), requires_grad=False)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, hidden_size)})
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.add_projector(hidden_size, repa_dim, repa_depth, projector_dim, depth)
        self.add_final_layer(hidden_size, in_channels)
        for m in self.modules():           # Xavier, small embeddings; zero scales, so no block acts and u = 0
            if isinstance(m, nn.Linear):
                xavier_(m)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))              # a view
        nn.init.zeros_(self.x_embedder.proj.bias)
        times = [e.mlp[i] for e in (self.t_embedder, self.r_embedder) if e is not None for i in (0, 2)]
        for m in (self.y_embedder.embedding_table, *times):
            nn.init.normal_(m.weight, std=0.02)
        gates = [b.adaLN_modulation[1] for b in (*self.blocks, self.final_layer)]
        for m in (*gates, self.final_layer.linear):
            nn.init.zeros_(m.weight)

    def forward(self, x, t, r=None, y=None, repa=True):
        y = torch.full((len(x),), self.num_classes, device=x.device) if y is None else y
        c, h, z = self.clock(x, t, r) + self.y_embedder.embedding_table(y), self.tokens(x), None
        for i, block in enumerate(self.blocks, 1):
            h = block(h, c)
            if repa and i == self.repa_depth:
                z = self.projectors[0](h)
        return self.read_out(h, c, x, z)


class MMDiT(FlowTransformer):
    """MM-DiT (Esser et al. 2024) as in REPA: text and image tokens have their own weights but one attention.

    forward(x (B, C, H, W), t (B,), context (B, L, context_dim), r (B,) or None = t) -> u | (u, z), as in DiT.
    It has width 32 * depth, depth heads and torch's initialisation. The text has no mask or pooled vector.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, depth=24, context_dim=768,
                 average_velocity=False, repa_dim=768, repa_depth=8, projector_dim=2048):
        hidden_size = 32 * depth
        super().__init__(input_size, patch_size, in_channels, hidden_size, average_velocity)
        self.register_buffer("pos_embed", sincos(self.grid, hidden_size))
        self.context_embedder = nn.Linear(context_dim, hidden_size)
        self.joint_blocks = nn.ModuleList([nn.ModuleDict({
            "context_block": DiTBlock(hidden_size, depth, pre_only=i == depth - 1),
            "x_block": DiTBlock(hidden_size, depth)}) for i in range(depth)])
        self.add_final_layer(hidden_size, in_channels)
        self.add_projector(hidden_size, repa_dim, repa_depth, projector_dim, depth)

    def forward(self, x, t, context, r=None, repa=True):
        c, text, h, z = self.clock(x, t, r), self.context_embedder(context), self.tokens(x), None
        for i, block in enumerate(self.joint_blocks, 1):
            m_text, m = block.context_block.modulation(c), block.x_block.modulation(c)
            qkv = torch.cat([block.context_block.qkv(text, m_text), block.x_block.qkv(h, m)], 1)
            a_text, a = attention(qkv).split([text.shape[1], h.shape[1]], 1)
            h = block.x_block.update(h, a, m)
            if i < len(self.joint_blocks):
                text = block.context_block.update(text, a_text, m_text)
            if repa and i == self.repa_depth:
                z = self.projectors[0](h)
        return self.read_out(h, c, x, z)


TURNED = ("final_layer.linear.weight", "final_layer.linear.bias", "t_embedder.mlp.0.weight")


class TwoProducts(TorchFunctionMode):
    """Inside, a linear layer's derivative is the layer without its bias: just two products.

    Autograd's own rule adds the absent derivatives of weights and bias: a third of a small net's time.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and (x := forward_ad.unpack_dual(args[0])).tangent is not None:
            return forward_ad.make_dual(func(x.primal, *args[1:]), func(x.tangent, args[1]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def derivative(net, z, t, r, y, v):
    """du/dt along the flow: v . (gradient in z) + (partial derivative in t). Records no gradient."""
    one = torch.ones_like(t)                          # trap: r stays fixed (FID 61; moving, 138: MF Table 1b)
    if torch.compiler.is_compiling():
        return torch.func.jvp(lambda z, t: net(z, t, r, y, repa=False), (z, t), (v, one))[1]
    with forward_ad.dual_level(), TwoProducts():      # the same product in 60 % of jvp's time
        u = net(forward_ad.make_dual(z, v), forward_ad.make_dual(t, one), r, y, repa=False)
        return forward_ad.unpack_dual(u).tangent


def dit_shape(state, name):
    """A DiT's constructor arguments from its weights; num_heads from a SIZES row as wide and deep, else 0."""
    try:
        hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1]) * patch
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    except (KeyError, ValueError, IndexError) as e:
        kind = f"no DiT, SiT or Mean Flow net, but a net{MAKERS.get(name, '')} without {e}"
        raise WeightsError(f"{name}: {kind}; pass such a net") from None
    heads = [row["num_heads"] for row in SIZES.values()
             if (row.get("hidden_size"), row.get("depth")) == (hidden, depth)]
    two_clocks = any(k.startswith(("r_embedder.", "h_embedder.")) for k in state)
    return dict(input_size=side, in_channels=channels, patch_size=patch, hidden_size=hidden, depth=depth,
                num_heads=[*heads, 0][0], num_classes=classes, average_velocity=two_clocks)


def load_flow(net, state, what):
    """Copy a checkpoint of SiT, REPA or Mean Flow (PyTorch, or ported from JAX) into a DiT or MMDiT of ours.

    what: the file's name. An official SiT has t = 1 at the data, velocity data - noise and twice the output
    channels, which identify it; `turned` converts its weights to our clock, exactly. DiT's own files, noise
    predictors with t = 0..999, have the same names and shapes: only the file's name tells them apart. If the
    file has no second embedder, u(x, t, r) starts as v(x, t) for every r; if it has no projector, net keeps
    its own; a projector that net lacks is dropped. WeightsError for any other difference.
    """
    if os.path.basename(what).startswith("DiT-"):
        raise WeightsError(f"{what}: DiT predicts noise, no velocity; pass a SiT, or rename it if it is one")
    state = {re.sub(r"^h_embedder\.", "r_embedder.", k): v for k, v in state.items()}    # the JAX port's name
    own, old = net.state_dict(), "r_embedder.mlp.0.weight" not in state
    if old and set(TURNED) <= set(state) and len(state[TURNED[0]]) == 2 * len(own[TURNED[0]]):
        state = turned(state, net.x_embedder.proj.in_channels)
    state = {k: v for k, v in state.items() if k in own or not k.startswith("projectors.")}
    fresh = {k: v for k, v in own.items() if k.startswith("pos_embed")}
    if not any(k.startswith("projectors.") for k in state):
        fresh |= {k: v for k, v in own.items() if k.startswith("projectors.")}
    if old:    # trap: only the last layer is zero; were the first too, no gradient would reach the weights
        fresh |= {k: v * ("mlp.2" not in k) for k, v in own.items() if k.startswith("r_embedder.")}
    load_weights(net, {**fresh, **state}, what)


def turned(state, channels):
    """Weights of an official v_sit(x, s) -> those of our v(x, t) = -v_sit(x, 1 - t), extra channels dropped.

    cos and sin of w (1 - t) are sums of cos(w t) and sin(w t), which the clock's first layer absorbs.
    """
    state, first = dict(state), state[TURNED[2]]
    for k in TURNED[:2]:    # trap: the channel is a row's fastest index, so the extra ones lie between ours
        state[k] = -state[k].unflatten(0, (-1, 2, channels))[:, 0].flatten(0, 1)
    (cos, sin), w = first.double().chunk(2, 1), frequencies(first.double())
    turn = [cos * w.cos() + sin * w.sin(), cos * w.sin() - sin * w.cos()]
    state[TURNED[2]] = torch.cat(turn, 1).to(first.dtype)
    return state


# ---- encoders ----------------------------------------------------------------------------------
SD_SCALE = 0.18215                                  # latents of the SD-VAE times this have a deviation near 1
# choice: MF's SD-VAE for all; REPA's script decodes with ft-ema. CLIP is U-ViT's, DINOv2 REPA's
SD_VAE, CLIP, DINO = "stabilityai/sd-vae-ft-mse", "openai/clip-vit-large-patch14", "facebook/dinov2-base"
ENCODERS = {           # class: package, what its config.json calls it, the flag that takes a folder
    "AutoencoderKL": ("diffusers", [None], "--vae FOLDER/{}"),
    "CLIPTextModel": ("transformers", ["clip", "clip_text_model"], "--encoders FOLDER"),
    "CLIPTokenizer": ("transformers", [None], "--encoders FOLDER"),
    "Dinov2Model": ("transformers", ["dinov2"], "--encoders FOLDER")}


def local_first(kind, name, **more):
    """A class in ENCODERS from a folder or the hub's cache, else online; WeightsError says what to do."""
    package, _, flag = ENCODERS[kind]
    try:
        make = getattr(importlib.import_module(package), kind)
    except Exception as e:                            # say, a torchvision that was built for another torch
        raise WeightsError(f"{package} cannot be imported: {' '.join(str(e).split())[:300]}; "
                           "pip install diffusers transformers accelerate") from e
    try:
        logging.disable(logging.ERROR)                # report the fault in one line, not in fifty
        with contextlib.redirect_stderr(io.StringIO()):
            return make.from_pretrained(name, local_files_only=True, **more)
    except Exception as e:
        if os.path.isdir(name):
            raise WeightsError(f"{name}: {' '.join(str(e).split())[:300]} ({type(e).__name__})") from e
    finally:
        logging.disable(logging.NOTSET)
    last = os.path.basename(name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise WeightsError(f"{name}: no such folder; pass {flag.format(last)}")
    try:                                              # trap: the hub's own client would try for half a minute
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=20).close()
        return make.from_pretrained(name, local_files_only=False, **more)
    except Exception as e:
        raise WeightsError(f"{name}: not downloaded, and cannot be now ({' '.join(str(e).split())[:99]}); "
                           f"where there is network: hf download {name} --local-dir FOLDER/{last}; then pass "
                           f"{flag.format(last)}") from e


def pretrained(kind, name, device):
    """The frozen float32 model of a class in ENCODERS, from a folder or the hub. WeightsError if not whole.

    identity: its name and the checksum of its weights, without the decoder's, because sd-vae-ft-mse and -ema
    can each decode what either has encoded.
    """
    model, info = local_first(kind, name, output_loading_info=True)
    lost, found = [*info["missing_keys"], *info["mismatched_keys"]], getattr(model.config, "model_type", None)
    if lost or found not in ENCODERS[kind][1]:        # trap: the libraries would go on, with random weights
        raise WeightsError(f"{name}: no whole {kind}: its kind is {found}, it lacks {len(lost)} weights "
                           f"{lost[:2]}")
    model = model.float().requires_grad_(False).eval()
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder.", "post_quant_conv."))}
    model.identity = f"{os.path.abspath(name) if os.path.isdir(name) else name}, {stamp(own)}"
    return model.to(device)


def sd_vae(name, device):
    """The SD-VAE (a folder, or a name on the hub, "" = MF's), frozen, float32."""
    return pretrained("AutoencoderKL", name or SD_VAE, device)


def encode_moments(vae, images):
    """Images (B, 3, H, W) in the range the dataset uses -> mean and deviation of latents (B, 8, H/8, W/8)."""
    code = vae.encode(images.contiguous()).latent_dist        # trap: channels_last on a CPU is off by 0.01
    return torch.cat([code.mean, code.std], 1).float()


def decode_latents(vae, z):
    """Latents z (B, 4, h, w), not scaled -> the VAE's images (B, 3, 8 h, 8 w); 16 at a time if 32x32."""
    parts = z.contiguous().split(max(1, 16 * 32**2 // z.shape[2:].numel()))
    return torch.cat([vae.decode(part).sample for part in parts])


class CLIPText:
    """CLIP's text tower, frozen, float32: last hidden states of 77 tokens (U-ViT). Loaded when first used."""

    def __init__(self, name, device):
        self.name, self.device = name or CLIP, device

    @functools.cached_property
    def parts(self):
        """The model and its tokenizer."""
        model = pretrained("CLIPTextModel", self.name, self.device)
        tokenizer, expected = local_first("CLIPTokenizer", self.name), model.config.vocab_size
        if len(tokenizer) != expected:                # trap: without its files the tokenizer knows 2 tokens
            raise WeightsError(f"{self.name}: {len(tokenizer)} tokens, not {expected}; are vocab.json and "
                               "merges.txt there?")
        return model, tokenizer

    @property
    def identity(self):
        return self.parts[0].identity

    def ids(self, captions):
        """Captions -> token ids (B, 77), cut or filled."""
        return self.parts[1](list(captions), padding="max_length", truncation=True, max_length=77,
                             return_tensors="pt").input_ids

    @torch.no_grad()
    def __call__(self, words):
        """Token ids (B, 77) -> features (B, 77, 768); U-ViT's pass through."""
        words = words.to(self.device, non_blocking=True)
        if words.is_floating_point():
            return words.float()
        return self.parts[0](input_ids=words.long()).last_hidden_state.float()


def dinov2(name, device):
    """f(uint8 (B, 3, 256, 256)) -> (B, 256, 768): the normed patch tokens of DINOv2 (REPA)."""
    # choice: transformers' resampling of the table of positions to 16x16; REPA calls timm's
    model = pretrained("Dinov2Model", name or DINO, device)
    mean, std = (torch.tensor(c, device=device).view(3, 1, 1)
                 for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    @torch.no_grad()
    def tokens(images):
        x = (images.to(device).float() / 255 - mean) / std
        return model(F.interpolate(x, 224, mode="bicubic")).last_hidden_state[:, 1:]
    tokens.identity = model.identity
    return tokens


# ---- our own checkpoints -----------------------------------------------------------------------
def flatten(net):
    """Make net's weights views of one vector, gradients views of another; return both (frozen: grad None).

    Optimiser, EMA, norm and all-reduce are then one operation each.
    """
    if any(name.endswith("running_mean") for name, _ in net.named_buffers()):
        raise WeightsError("this net has batch norm, whose averages neither the EMA nor other processes see; "
                           "use group norm")
    params, offset = list(net.parameters()), 0
    flat = torch.empty(sum(p.numel() for p in params), device=params[0].device)
    frozen = not any(p.requires_grad for p in params)
    grad = None if frozen else torch.zeros(len(flat), device=flat.device)
    for p in params:
        p.data = flat.as_strided(p.shape, p.stride(), offset).copy_(p.detach())
        if not frozen:
            p.grad = grad.as_strided(p.shape, p.stride(), offset)
        offset += p.numel()
    return flat, grad


def save_checkpoint(path, **state):
    """Write a temporary file, flush, rename: a kill at any moment leaves this file or the last one whole.

    For a network or an optimiser, its state_dict() is saved. The previous file stays as path.prev. OSError if
    it cannot be written; what was there stays.
    """
    state = {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in state.items()}
    try:
        with open(path + ".tmp", "wb") as f:
            (write_safetensors if path.endswith(".safetensors") else torch.save)(state, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:              # trap: torch turns a full disk into a RuntimeError
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + ".tmp")
        size = sum(t.nbytes for t in tree_leaves(state) if torch.is_tensor(t))
        raise OSError(f"{path}: cannot write {size:,} bytes ({type(e).__name__}); free some space, or name "
                      "a folder that is there") from e
    if os.path.exists(path) and path not in DAMAGED:
        os.replace(path, path + ".prev")
    os.replace(path + ".tmp", path)
    DAMAGED.discard(path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


DAMAGED = set()                                       # trap: a damaged file must not replace a whole .prev


@functools.cache
def is_whole(path, when):
    """Whether every byte of a checkpoint written at `when` is right. It is read once per process."""
    with zipfile.ZipFile(path) as file:
        return file.testzip() is None


def load_checkpoint(path, whole=False):
    """The checkpoint at path, else (with a warning) the one before, memory-mapped; None if there is none.

    whole: check every byte; torch does not, and 9 in 10 flipped bits would load silently. WeightsError if
    checkpoints exist but none is whole; it never starts afresh.
    """
    found = [p for p in (path, path + ".prev") if os.path.exists(p)]
    for p in found:
        try:
            if whole and not is_whole(p, os.stat(p).st_mtime_ns):
                raise ValueError("wrong CRC")
            state = torch.load(p, map_location="cpu", weights_only=True, mmap=True)
            if p != path:
                print(f"warning: {path} is missing or damaged; going on from {p}", file=sys.stderr)
            return state
        except Exception as e:                        # damage can surface as any error
            DAMAGED.add(p)
            print(f"warning: {p} is damaged, cut or changed ({type(e).__name__})", file=sys.stderr)
    if found:
        raise WeightsError(f"{' and '.join(found)}: damaged; to start anew move that and later stages away")
    return None


def finished(path):
    """The checkpoint at path, or None if there is none or its stage is not finished."""
    ckpt = load_checkpoint(path, whole=True)
    return ckpt if ckpt and ckpt["step"] >= ckpt["cfg"]["steps"] else None


def stamp(state):
    """A string that changes when a state dict's numbers do, wherever the file is stored."""
    total = 0
    for name in sorted(state):
        total = zlib.crc32(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), total)
    return f"crc32 {total:08x}"


def restore(ckpt, path, net, ema, opt, numbers):
    """Restore weights, their average and the optimiser's moments from the checkpoint at path, if any.

    Returns `numbers`, a dict, with the values that the checkpoint holds; values that it lacks stay as given.
    """
    if ckpt is None:
        return numbers
    load_weights(net, ckpt["net"], path)
    load_weights(ema, ckpt["ema"], path)
    # trap: the file's settings may be those of an older optimiser, whose eps of 1e10 would train nothing
    opt.load_state_dict(dict(ckpt["opt"], param_groups=opt.state_dict()["param_groups"]))
    return {name: ckpt.get(name, new) for name, new in numbers.items()}


def cost(ckpt):
    """Table columns: what a checkpoint's stage cost and which --init FILE it started from; or dashes."""
    if not ckpt:
        return dict(steps="-", images="-", seconds="-")
    images, cfg = ckpt["step"] * ckpt["cfg"]["batch"], {"init": "", **ckpt["cfg"]}
    on = cfg["stage"] != "pretrain" and cfg["init"] not in ("", "teacher", "random", "sit")
    steps = str(ckpt["step"]) + f" on {cfg['init']}" * on
    return dict(steps=steps, images=f"{images:,}", seconds=f"{ckpt['seconds']:.0f}")


def peak_memory():
    """{"GB": torch's peak memory since the last call}; {} without CUDA. cuDNN's first trials use more."""
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return dict(GB=peak)


def memory(weights, opt, path, stages=1):
    """Text on what a process is sure to hold before its first step and, on a GPU, out of how much memory.

    OSError if the disk lacks room for two checkpoints of each stage that is left; path: this stage's.
    """
    one, moments = weights.nbytes / 1e9, 1 if isinstance(opt, torch.optim.SGD) else 2
    folder = next(p for p in pathlib.Path(path).absolute().parents if p.is_dir())     # in a dry run, above it
    free, copies = shutil.disk_usage(folder).free / 1e9, 2 * max(1, stages) - os.path.exists(path)
    if free < (need := copies * (2 + moments) * one):
        what = f"{copies} checkpoints of this and later stages take {need:.3g} GB"
        raise OSError(f"{path}: {what}, {free:.3g} are free; make room, or use another --out")
    text = f"{len(weights):,} parameters"
    if one < 0.1 and not weights.is_cuda:
        return text
    text += f"; GB: weights, gradients, average {one:.3g} each, optimiser {moments * one:.3g}"
    if weights.is_cuda:
        room = torch.cuda.get_device_properties(weights.device).total_memory / 1e9
        held = torch.cuda.memory_allocated(weights.device) / 1e9 + moments * one * (not opt.state)
        text += f", frozen nets and data {held - (3 + moments) * one:.3g}: {held:.3g} of {room:.3g}"
        text += ", warning: above 90 %" * (held > 0.9 * room)
    return f"{text}; activations: bench.py plan"


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Weights that any script reads -> a file with their arguments.")
    p.add_argument("source", metavar="IN", help="our .pt, NVIDIA's .pkl, a state dict, or a URL of one")
    p.add_argument("made", metavar="OUT.safetensors")
    p.error = lambda text: sys.exit(print(f"nets.py: {text}; nets.py --help", file=sys.stderr) or 2)
    args = p.parse_args()
    if not args.made.endswith(".safetensors"):
        p.error(f"{args.made}: the file to write must end with .safetensors")
    try:
        save_checkpoint(args.made, **dict(zip(("ema", "model", "cfg"), read_weights(args.source))))
        print(f"wrote {args.made}")
    except (WeightsError, OSError) as error:
        sys.exit(print(f"nets.py: {error}", file=sys.stderr) or 3)
