"""Networks: what the scripts train, learn from and measure distance with. No losses, no loops.

  what                            of                              source
  EDMPrecond, SongUNet            D(x, sigma), pixels             DDPM++ of Score-SDE with the preconditioning of EDM
  LPIPS                           distance of images in [-1, 1]   VGG-16 and the linear heads of the lpips package
  VGG                             distance of latents, digits     CMT App. B.5: trained on the data's own labels
  PixelDistance                   squared, pseudo-Huber           ECT
  load_pretrained, load_weights   official checkpoints            read without running what the file holds
  fetch                           downloads                       checked, then renamed into the cache
  SIZES                           constructor arguments           one row per model of the paper, and the digits

Parameter names are the official ones, so that official checkpoints load by name. D_x is what EDM calls the denoised
image; sigma is a noise level per sample, (B,); images are (B, C, H, W) in [-1, 1].
"""
import hashlib
import http.client
import importlib.util
import io
import math
import mmap
import os
import pickle
import pickletools
import re
import shutil
import struct
import urllib.parse
import urllib.request

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---- sizes -------------------------------------------------------------------------------------
SIZES = {  # EDMPrecond(**row); 55.7M and 61.8M parameters at 32 and 64 pixels (EDM, Table 7)
    "ddpm++-32": dict(img_resolution=32, img_channels=3, model_channels=128, channel_mult=(2, 2, 2)),
    "ddpm++-64": dict(img_resolution=64, img_channels=3, model_channels=128, channel_mult=(1, 2, 2, 2)),
    "ddpm++-8": dict(img_resolution=8, img_channels=1, model_channels=32, channel_mult=(1, 1), num_blocks=1,
                     attn_resolutions=()),
}


# ---- DDPM++ --------------------------------------------------------------------------------------
class Linear(nn.Linear):
    """nn.Linear with DDPM++'s initialisation: Xavier uniform scaled by init_weight, bias zero."""

    def __init__(self, in_features, out_features, bias=True, init_weight=1.0):
        super().__init__(in_features, out_features, bias)
        xavier_(self, init_weight)


class Conv2d(nn.Conv2d):
    """Convolution that may halve or double the resolution first: 2x2 mean or nearest neighbour (filter [1, 1])."""

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False, init_weight=1.0):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.up, self.down = up, down
        xavier_(self, init_weight)
        if up or down:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))    # in official checkpoints

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.down:
            x = F.avg_pool2d(x, 2)
        return super().forward(x)


def xavier_(layer, gain):
    """Xavier uniform weight times gain, zero bias, in place."""
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class GroupNorm(nn.GroupNorm):
    """Groups of at least 4 channels, 32 groups at most, eps 1e-6."""

    def __init__(self, channels):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)


class UNetBlock(nn.Module):
    """Residual block of DDPM++: two 3x3 convolutions, the noise embedding added between, optional self-attention.

    forward: x (B, in, H, W), emb (B, emb_channels) -> (B, out, H', W'). Both sums are scaled by sqrt(1/2).
    """

    def __init__(self, in_channels, out_channels, emb_channels, up=False, down=False, attention=False, dropout=0.0):
        super().__init__()
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down)
        self.affine = Linear(emb_channels, out_channels)
        self.norm1 = GroupNorm(out_channels)
        self.dropout = dropout
        self.conv1 = Conv2d(out_channels, out_channels, 3, init_weight=1e-5)
        self.skip = None
        if in_channels != out_channels or up or down:
            self.skip = Conv2d(in_channels, out_channels, 1, up=up, down=down)
        self.norm2 = None
        if attention:
            self.norm2 = GroupNorm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, init_weight=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, 1, init_weight=1e-5)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.norm2 is not None:
            # trap: channel 3c + {0, 1, 2} is q, k, v of channel c; they are not three contiguous blocks
            q, k, v = self.qkv(self.norm2(x)).unflatten(1, (-1, 3)).flatten(3).transpose(1, 3).unbind(2)  # (B, HW, C)
            a = F.scaled_dot_product_attention(q, k, v)
            x = (self.proj(a.transpose(1, 2).reshape(x.shape)) + x) * math.sqrt(0.5)
        return x


class SongUNet(nn.Module):
    """DDPM++ (Song et al. 2021, Table 7 of EDM): U-Net over resolutions, attention where attn_resolutions says.

    forward(x (B, C, H, W), noise_labels (B,), class_labels (B, label_dim) one-hot or None,
    augment_labels (B, augment_dim) or None) -> F_x (B, C, H, W).
    """

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=128,
                 channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.1,
                 label_dropout=0.0):
        super().__init__()
        self.model_channels, self.label_dropout = model_channels, label_dropout
        emb = model_channels * channel_mult_emb
        self.map_label = Linear(label_dim, model_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb)
        self.map_layer1 = Linear(emb, emb)

        self.enc = nn.ModuleDict()
        skips, c = [], model_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, c, 3)
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(c, c, emb, down=True, dropout=dropout)
            skips.append(c)
            for i in range(num_blocks):
                c_in, c = c, model_channels * mult
                self.enc[f"{res}x{res}_block{i}"] = UNetBlock(c_in, c, emb, attention=res in attn_resolutions,
                                                              dropout=dropout)
                skips.append(c)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(c, c, emb, attention=True, dropout=dropout)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(c, c, emb, dropout=dropout)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(c, c, emb, up=True, dropout=dropout)
            for i in range(num_blocks + 1):
                c_in, c = c + skips.pop(), model_channels * mult
                attention = i == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = UNetBlock(c_in, c, emb, attention=attention, dropout=dropout)
        self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(c)
        self.dec[f"{res}x{res}_aux_conv"] = Conv2d(c, out_channels, 3, init_weight=1e-5)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        half = self.model_channels // 2
        freqs = 1e-4 ** (torch.arange(half, device=x.device) / (half - 1))
        angles = noise_labels[:, None] * freqs
        emb = torch.cat([angles.sin(), angles.cos()], 1)                                     # (B, model_channels)
        if self.map_label is not None:
            if self.training and self.label_dropout:
                keep = torch.rand(len(x), 1, device=x.device) >= self.label_dropout
                class_labels = class_labels * keep
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        skips = []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("_conv") else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "_aux_" in name:
                x = F.silu(block(x)) if name.endswith("norm") else block(x)
            else:
                x = block(torch.cat([x, skips.pop()], 1) if "_block" in name else x, emb)
        return x


FIXED = dict(model_type="SongUNet", embedding_type="positional", encoder_type="standard", decoder_type="standard",
             channel_mult_noise=1, resample_filter=[1, 1])        # what makes a SongUNet a DDPM++ (EDM Table 7)
IGNORED = {"use_fp16", "sigma_min", "sigma_max"}                  # in official files, without a meaning here


class EDMPrecond(nn.Module):
    """EDM preconditioning around DDPM++: D_x = c_skip x + c_out F(c_in x, c_noise)   (EDM Table 1, Eq. 7).

    forward(x (B, C, H, W), sigma (B,), class_labels=None, augment_labels=None) -> D_x, float32.
    sigma_shift (same unit as sigma): outside training sigma - sigma_shift replaces sigma in the numerators, as the
    official CMT and ECT checkpoints are sampled (0.003); 0, our default, samples the function that was trained.
    ValueError for constructor arguments that are not DDPM++.
    """

    def __init__(self, img_resolution, img_channels, label_dim=0, sigma_data=0.5, sigma_shift=0.0, **unet):
        super().__init__()
        for name, value in FIXED.items():
            given = unet.pop(name, value)
            if (list(given) if isinstance(given, tuple) else given) != value:
                raise WeightsError(f"{name}={given!r}: DDPM++ has {value!r}; other SongUNet variants are not here")
        unet = {name: value for name, value in unet.items() if name not in IGNORED}
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_data, self.sigma_shift = sigma_data, sigma_shift
        self.model = SongUNet(img_resolution, img_channels, img_channels, label_dim, **unet)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        if self.label_dim and class_labels is None:
            class_labels = x.new_zeros(len(x), self.label_dim)
        shifted = sigma if self.training else sigma - self.sigma_shift
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / (shifted**2 + self.sigma_data**2)
        c_out = shifted * self.sigma_data / variance.sqrt()
        c_in = variance.rsqrt()
        c_noise = sigma.flatten().log() / 4
        F_x = self.model(c_in * x, c_noise, class_labels, augment_labels)
        return c_skip * x + c_out * F_x.float()


# ---- distances -----------------------------------------------------------------------------------
# Each has .features(x) -> list of tensors, .distance(features_a, features_b) -> (B,), .forward(a, b) -> (B,), so that
# the features of a target that many states share are computed once.
class PixelDistance(nn.Module):
    """Squared distance, mean over pixels (huber = 0), or pseudo-Huber sqrt(|a - b|^2 + c^2) - c, c = huber."""

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
    """Feature map (B, C, H, W) with unit length over channels; eps keeps a zero pixel zero, gradient included."""
    # trap: eps inside the root. Outside it, as in the lpips package, the derivative at a zero pixel is 0 * inf
    return f * (f.square().sum(1, keepdim=True) + eps).rsqrt()


class LPIPS(nn.Module):
    """LPIPS v0.1 with VGG-16: (B, 3, H, W) in [-1, 1], any size from 16 pixels; no resize, no clamp (B.2).

    vgg_state: state dict of torchvision's VGG-16 (`features.*`; the classifier is left out); None = random weights.
    The linear heads are read from the installed lpips package without importing it, because the import needs a
    torchvision that matches torch to the build. The weights are frozen; gradients reach the images.
    """
    SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))    # indices of convolutions in torchvision
    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self, vgg_state=None):
        super().__init__()
        self.features_ = nn.ModuleDict()
        channels = 3
        for slice_, width in zip(self.SLICES, self.WIDTHS):
            for index in slice_:
                self.features_[str(index)] = nn.Conv2d(channels, width, 3, padding=1)
                channels = width
        for k, width in enumerate(self.WIDTHS):
            setattr(self, f"lin{k}", nn.Conv2d(width, 1, 1, bias=False))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        if vgg_state is not None:
            trunk = {k.removeprefix("features."): v for k, v in vgg_state.items() if k.startswith("features.")}
            load_weights(self.features_, trunk, "VGG-16")
        heads = torch.load(lpips_heads(), map_location="cpu", weights_only=True)
        for k in range(5):
            getattr(self, f"lin{k}").load_state_dict({"weight": heads[f"lin{k}.model.1.weight"]})
        self.requires_grad_(False).eval()

    def features(self, x):
        x, maps = (x - self.shift) / self.scale, []
        for k, slice_ in enumerate(self.SLICES):
            if k:
                x = F.max_pool2d(x, 2)
            for index in slice_:
                x = F.relu(self.features_[str(index)](x))
            maps.append(unit(x, 1e-20))
        return maps

    def distance(self, features_a, features_b):
        return sum(getattr(self, f"lin{k}")((a - b).square()).mean((1, 2, 3))
                   for k, (a, b) in enumerate(zip(features_a, features_b)))

    def forward(self, a, b):
        return self.distance(self.features(a), self.features(b))


def lpips_heads():
    """Path of the LPIPS heads inside the installed lpips package; FileNotFoundError with the install line."""
    spec = importlib.util.find_spec("lpips")
    path = spec and os.path.join(os.path.dirname(spec.origin), "weights", "v0.1", "vgg.pth")
    if not path or not os.path.exists(path):
        raise FileNotFoundError("the lpips package holds the linear heads of LPIPS and is not installed; "
                                "run: pip install lpips")
    return path


class VGG(nn.Module):
    """VGG with GroupNorm, trained on the labels of the data it will measure (App. B.5); LPIPS form without heads.

    widths: one tuple of channels per resolution, halved between them. .logits(x) -> (B, num_classes) trains it;
    the distance is the squared difference of unit feature maps, summed over channels and slices, mean over pixels.
    """

    def __init__(self, in_channels=1, widths=((16, 16), (32, 32), (64, 64)), num_classes=10):
        super().__init__()
        self.slices, c = nn.ModuleList(), in_channels
        for k, slice_ in enumerate(widths):
            layers = [nn.MaxPool2d(2)] if k else []
            for width in slice_:
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.GroupNorm(width // 8, width), nn.ReLU()]
                c = width
            self.slices.append(nn.Sequential(*layers))
        self.head = nn.Linear(c, num_classes)

    def logits(self, x):
        for slice_ in self.slices:
            x = slice_(x)
        return self.head(x.mean((2, 3)))

    def features(self, x):
        maps = []
        for slice_ in self.slices:
            x = slice_(x)
            maps.append(unit(x, 1e-8))
        return maps

    def distance(self, features_a, features_b):
        return sum((a - b).square().sum(1).mean((1, 2)) for a, b in zip(features_a, features_b))

    def forward(self, a, b):
        return self.distance(self.features(a), self.features(b))


# ---- checkpoint import ------------------------------------------------------------------------
EDM_URL = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-%s-uncond-vp.pkl"
PRETRAINED = {"cifar10": EDM_URL % "cifar10-32x32", "ffhq": EDM_URL % "ffhq-64x64",
              "afhqv2": EDM_URL % "afhqv2-64x64"}
CHECKSUMS = {  # url -> sha256; NVIDIA publishes none, so `fetch` prints it: pin it here once you trust a file
    "https://download.pytorch.org/models/vgg16-397923af.pth":
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz":
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}
INTERFACE = ("img_resolution", "img_channels", "label_dim")    # how the constructors of EDM and EDM2 begin


class WeightsError(ValueError):
    """Weights that cannot be used; the message is one line with the file, what is wrong and the remedy."""


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


GLOBALS = {  # everything a file may name; builtin types and torch dtypes cannot be altered by a pickle
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
# trap: EXT codes are answered from a cache of real objects, past find_class. The rest is never needed.
REFUSED = {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ_EX", "BYTEARRAY8",
           "NEXT_BUFFER", "READONLY_BUFFER"}


class Reader(pickle.Unpickler):
    """Unpickler that builds plain values and Records. Names are looked up in GLOBALS; nothing is imported."""

    def find_class(self, module, name):
        if (module, name) not in GLOBALS:             # the exact pair, so a dotted name leads nowhere
            raise UnsafePickle(f"it asks for {f'{module}.{name}'[:80]!r}, which is not on the allow-list")
        return GLOBALS[module, name]

    def persistent_load(self, pid):                   # inside storages only, REFUSED keeps it out elsewhere
        return pid


def read_pickle(stream, refused=REFUSED):
    """The next pickle of a stream as a tree of plain values and Records. Raises anything if damaged."""
    start = stream.tell()
    for op, arg, position in pickletools.genops(stream):
        # trap: a memo index is an order for memory, nine bytes of file can ask for 64 GB
        if op.name in refused or op.name.endswith("PUT") and arg > position:
            raise UnsafePickle(f"it uses opcode {op.name} {arg!r:.20} at byte {position}")
    stream.seek(start)
    return Reader(stream).load()


def kind(node):
    """Name of what a Record stands for, "" for a plain value."""
    return type(node).__name__ if isinstance(node, Record) else ""


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
            and count == struct.pack("<q", numel) and len(raw) == start + numel * dtype.itemsize):
        raise ValueError("a tensor's storage has a wrong header or length")
    return torch.from_numpy(np.ndarray(numel, f"<i{dtype.itemsize}", raw, start).copy()).view(dtype)


def read_tensor(node, done):
    """_rebuild_parameter or _rebuild_tensor_v2 Record -> tensor. done: id of storage -> flat tensor."""
    node = node.args[0] if kind(node) == "_rebuild_parameter" else node
    if kind(node) != "_rebuild_tensor_v2" or kind(node.args[0]) != "_load_from_bytes":
        raise ValueError(f"a tensor is made by {kind(node)!r}")
    storage, offset, size, stride = node.args[:4]
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise ValueError("a tensor has a negative or no size, stride or offset")
    if id(storage) not in done:
        done[id(storage)] = read_storage(storage)
        storage.args = ()                             # trap: else two copies of EDM2-XXL, 3 GB each, are held
    flat = done[id(storage)]
    end = 1 + offset + sum((n - 1) * s for n, s in zip(size, stride)) if 0 not in size else 0
    if max(end, math.prod(size)) > len(flat):         # trap: stride 0 fits anywhere, its copy is of any size
        raise ValueError(f"a tensor of size {size}, stride {stride} leaves its storage of {len(flat)}")
    return flat.as_strided(size, stride, offset)


def read_module(node, prefix, state, done):
    """Fill `state` with a recorded module's tensors by name, in torch's order. Returns its __dict__."""
    fields = node.args[0]["state"] if kind(node) == "_reconstruct_persistent_obj" else node.state
    for name, tensor in (*fields["_parameters"].items(), *fields["_buffers"].items()):
        if tensor is not None and name not in fields.get("_non_persistent_buffers_set", ()):
            state[prefix + name] = read_tensor(tensor, done)
    for name, child in fields["_modules"].items():
        if child is not None:
            read_module(child, f"{prefix}{name}.", state, done)
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
    raise ValueError(f"a constructor argument is a {kind(value) or type(value).__name__}")


def read_nvidia(path):
    """(state_dict, init_kwargs) of the `ema` network of a .pkl by EDM, EDM2, ECT or CMT."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
        root = read_pickle(view)
    ema = root.pop("ema", None) if isinstance(root, dict) else None
    if kind(ema) != "_reconstruct_persistent_obj":
        raise ValueError("no `ema` network in it")
    state = {}
    fields = read_module(ema, "", state, {})
    args, kwargs = plain(fields.get("_init_args", ())), plain(fields.get("_init_kwargs", {}))
    named = {"_init_args": args} if len(args) > len(INTERFACE) else dict(zip(INTERFACE, args))
    return state, {**named, **kwargs}


def read_torch(path):
    """(state_dict, model kwargs) of a .pt: ours (`ema`, `model`) or a bare state dict."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        name = re.search(r"GLOBAL ([\w.]+)", str(e))
        if name is None:
            raise ValueError("torch.load(weights_only=True) cannot read it; NVIDIA's must end in .pkl") from e
        raise UnsafePickle(f"it asks for {name[1]!r}, which torch.load(weights_only=True) forbids") from None
    state, kwargs = (ckpt["ema"], ckpt.get("model", {})) if "ema" in ckpt else (ckpt, {})
    if not state or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"no state dict in it, its keys are {list(ckpt)[:5]}")
    # trap: DiT and REPA keep weights under `model`, where our checkpoints keep constructor arguments
    return state, {} if any(torch.is_tensor(v) for v in kwargs.values()) else kwargs


def load_pretrained(path_or_url):
    """(state_dict, init_kwargs) of a checkpoint, without running anything the file holds.

    *.pkl: the `ema` network of EDM, EDM2, ECT or CMT; init_kwargs are its constructor's arguments, plain
    values under NVIDIA's names. Other names: torch.load(weights_only=True) of our own checkpoint or of a bare
    state dict, whose kwargs are {}. A URL is fetched. Tensors are on the CPU in the file's dtype (EDM2: fp16,
    load_weights casts). UnsafePickle, a ValueError, names what the file asked for; ValueError if damaged,
    OSError if missing.
    """
    path = str(path_or_url)
    try:
        path = fetch(path) if "://" in path else path
    except OSError as e:
        raise OSError(f"{e}, or pass --teacher FILE") from None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return read_nvidia(path) if path.endswith(".pkl") else read_torch(path)
    except UnsafePickle as e:
        raise UnsafePickle(f"{path}: refused, {e}") from None
    except OSError:
        raise
    except Exception as e:                            # a cut file can fail anywhere; the cause is chained
        reason = f"{type(e).__name__}: {e}".splitlines()[0][:200]
        raise WeightsError(f"{path}: damaged, cut short or of another kind ({reason})") from e


def load_weights(net, state, what):
    """Copy a state dict into net by name, in net's dtype. what: the file's name, for the message.

    map_augment adds nothing without augment labels and is dropped if net has none. ValueError with the first
    names (and shapes) if any is missing, unexpected or of another shape; then nothing has been copied.
    """
    own = net.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.endswith("map_augment.weight")}
    wrong = {"missing": [k for k in own if k not in state], "unexpected": [k for k in state if k not in own],
             "of another shape": [f"{k} {tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the net"
                                  for k in own if k in state and state[k].shape != own[k].shape]}
    text = [f"{len(w)} {how}: {', '.join(w[:5])}{', ...' * (len(w) > 5)}" for how, w in wrong.items() if w]
    if text:                                          # trap: before any copy, or a failed load is half a load
        raise WeightsError(f"{what} does not fit the network: {'; '.join(text)}")
    for k, tensor in own.items():
        tensor.copy_(state[k])


def fetch(url, sha256="", md5=""):
    """Path of url's file in the cache ($CMT_CACHE, else ~/.cache/cmt), downloaded if it is not there yet.

    The sums given (sha256 defaults to CHECKSUMS) are checked, of a cached file too. A download gets its final
    name only when it is whole and right. OSError names url, file and remedy; WeightsError names both sums.
    """
    sha256 = sha256 or CHECKSUMS.get(url, "")
    cache = os.environ.get("CMT_CACHE") or os.path.expanduser("~/.cache/cmt")
    name = os.path.basename(urllib.parse.urlsplit(url).path)
    # trap: snapshots of two runs have one name, which alone would return the wrong network
    target = os.path.join(cache, f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}")
    if os.path.exists(target):
        check_sums(target, f"{target} (delete it to download it again)", sha256, md5)
        return target
    os.makedirs(cache, exist_ok=True)
    part = f"{target}.{os.getpid()}.part"
    try:
        with urllib.request.urlopen(url, timeout=60) as r, open(part, "wb") as f:
            size = r.headers.get("Content-Length")
            print(f"downloading {url}, {size or 'unknown number of'} bytes, to {target}", flush=True)
            shutil.copyfileobj(r, f, 1 << 20)
        if size and int(size) != os.path.getsize(part):    # trap: a lost connection looks like the file's end
            raise OSError(f"{os.path.getsize(part)} of {size} bytes arrived")
        print(f"sha256 {check_sums(part, url, sha256, md5)}  {target}", flush=True)
        os.replace(part, target)
    except (OSError, http.client.HTTPException) as e:
        raise OSError(f"cannot download {url} ({e}): download it yourself and save it as {target}") from None
    finally:
        if os.path.exists(part):
            os.remove(part)
    return target


def check_sums(path, what, sha256, md5):
    """sha256 of a file. WeightsError with `what` and both sums if it or the md5 is not as given ("" = any)."""
    sums = hashlib.sha256(), hashlib.md5()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            for s in sums:
                s.update(block)
    for s, wanted in zip(sums, (sha256, md5)):
        if wanted and s.hexdigest() != wanted.lower():
            raise WeightsError(f"{what}: its {s.name} is {s.hexdigest()}, expected {wanted}")
    return sums[0].hexdigest()
