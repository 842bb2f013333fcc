"""A GPU without data: inside FakeGPU() a tensor on "gpu" has shape, dtype and device; CPU tensors are real.

What CUDA refuses raises: operands on two devices or of two dtypes, a generator of another device. Each time
the host waits for the device, .waits gains "file:line function: why". Nothing is computed: a number that is
read is 1, and what is copied to the CPU is 0.
"""
import os
import re
import sys

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

aten, TORCH = torch.ops.aten, os.path.dirname(torch.__file__)
COPY, INDEX = (aten._to_copy, aten.copy_), (aten.index, aten.index_put, aten.index_put_)
SAME_DEVICE = *COPY, aten.cat, aten.stack             # elsewhere a single number may come from the CPU
SAME_DTYPE = {getattr(aten, name) for name in "mm bmm addmm baddbmm convolution lerp_ index_put index_put_ "
              "index_add_ native_group_norm native_layer_norm".split()}
LIBRARIES, RESULTS, ON_GPU = [], {}, {}               # kept alive; shapes by call; generators


class Module(backend_registration._DummyBackendModule):
    """torch.gpu, as far as torch asks for it."""
    def __getattr__(self, name):
        return lambda *a: {"get_amp_supported_dtype": [torch.bfloat16, torch.float16]}.get(name)


class Generator(torch.Generator):
    """A CPU generator that says it is on its device."""
    def __new__(cls, device="cpu"):
        g = super().__new__(cls)
        g.on = torch.device(device)
        ON_GPU[g._cdata] = g.on.type == "gpu"
        return g
    device = property(lambda g: g.on)


def pin_memory(tensor):
    """Tensor.pin_memory in every thread: a copy whose storage says what it is."""
    tensor = tensor.clone()
    tensor.untyped_storage().pinned = True
    return tensor


def tolist(tensor):
    """FakeTensor.tolist, which reads number by number, as CUDA does it: by one copy."""
    return tensor.cpu().tolist()


def each(f, a):
    """f of every argument; an operator has them singly or in lists."""
    return [each(f, b) for b in a] if isinstance(a, (list, tuple)) else f(a)


def flat(args, kwargs):
    """Every argument, those in lists too."""
    return [b for a in (*args, *kwargs.values()) for b in (a if isinstance(a, (list, tuple)) else [a])]


def floats(tensors):
    """The dtypes of those that hold floats."""
    return {a.dtype for a in tensors if isinstance(a, Tensor) and a.is_floating_point()}


def seen(a):
    """What the shape of a result depends on."""
    if isinstance(a, (list, tuple)):
        return tuple(map(seen, a))
    return (a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else \
        Generator if isinstance(a, torch._C.Generator) else (type(a), a)


def install():
    """Make "gpu" a device of torch with CUDA's rules of autocast, read from torch's own header."""
    backend_registration._setup_privateuseone_for_python_backend("gpu", Module())
    LIBRARIES.extend(torch.library.Library(name, "IMPL") for name in ("aten", "_"))
    LIBRARIES[1].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    LIBRARIES[0].impl("silu_backward", install, "PrivateUse1")        # else it comes apart; never called
    with open(f"{TORCH}/include/ATen/autocast_mode.h") as f:
        lists = re.findall(r"#define AT_FORALL_([A-Z]+)_?\w*\(_\)(.*?)\n(?:\n|#)", f.read(), re.S)
    for policy, body in lists:
        for name, overload in re.findall(r'[("](\w+)(?:[.]|, )?(\w*)[)"]', body):
            if op := getattr(getattr(aten, name), overload or "default", None):
                autocast(policy, op)


def autocast(policy, op):
    """One rule: op's floats become bf16 or fp16 (LOWER), the widest among them (PROMOTE), else float32."""
    def rule(*args, **kwargs):
        low = policy == "LOWER" or policy == "PROMOTE" and torch.float32 not in floats(flat(args, kwargs))
        dtype = torch.get_autocast_dtype("gpu") if low else torch.float32

        def cast(a):
            return a.to(dtype) if floats([a]) - {torch.float64} else a
        with _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastPrivateUse1)):
            return op(*each(cast, args), **{k: each(cast, a) for k, a in kwargs.items()})
    LIBRARIES[0].impl(op._name, rule, "AutocastPrivateUse1")


class FakeGPU(TorchDispatchMode):
    mode = None                                       # one for all: a script may keep a tensor between two

    def __init__(self):
        super().__init__()
        if not self.mode:
            install()
            FakeGPU.mode = mode = FakeTensorMode()
            mode.__deepcopy__ = lambda memo: mode     # trap: deepcopy of a tensor would copy its mode
        self.waits, self.device = [], torch.device("gpu", 0)

    def __enter__(self):
        self.before = torch.Generator, Tensor.pin_memory, FakeTensor.tolist
        torch.Generator, Tensor.pin_memory, FakeTensor.tolist = Generator, pin_memory, tolist
        torch._C._set_only_lift_cpu_tensors(True)     # else torch.tensor(..., device=) is not seen here
        return super().__enter__()

    def __exit__(self, *error):
        torch.Generator, Tensor.pin_memory, FakeTensor.tolist = self.before
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def wait(self, why):
        """Note the line that waits: the innermost one of a function outside torch and this file."""
        f = sys._getframe(2)
        while f and (f.f_code.co_filename.startswith((TORCH, __file__)) or f.f_code.co_name[0] == "<"):
            f = f.f_back
        file, line, name = (f.f_code.co_filename, f.f_lineno, f.f_code.co_name) if f else ("", 0, "backward")
        self.waits.append(f"{os.path.basename(file)}:{line} {name}: {why}")

    def fake(self, a):
        real = isinstance(a, Tensor) and not isinstance(a, FakeTensor)
        return FakeTensor(self.mode, a, self.device) if real else a

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, op = kwargs or {}, func.overloadpacket
        leaves = flat(args, kwargs)
        tensors = [a for a in leaves if isinstance(a, Tensor)]
        on = [isinstance(t, FakeTensor) for t in tensors]
        here = kwargs["device"].type == "gpu" if kwargs.get("device") else any(on)     # is the result on it?
        if any(ON_GPU.get(a._cdata, False) != here for a in leaves if isinstance(a, torch._C.Generator)):
            raise RuntimeError(f"{func}: the generator is on another device than the result")
        if not here and not any(on):
            return func(*args, **kwargs)
        if op is torch.ops.prim.device:               # trap: C++ asks for a tensor's device this way
            return self.device
        if op is aten._local_scalar_dense:
            self.wait("item")
            return torch.ones((), dtype=args[0].dtype).item()
        if op is aten.nonzero:
            self.wait("nonzero")
            return self.fake(torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device="meta"))
        mixed = not all(o or t.ndim == 0 and op not in SAME_DEVICE for o, t in zip(on, tensors))
        if op in COPY and on[-1] and (mixed or not here):
            self.wait("to cpu")
            dtype = kwargs.get("dtype") or args[0].dtype
            return args[0] if op is aten.copy_ else torch.zeros(args[0].shape, dtype=dtype)
        if op in COPY and mixed:
            source = tensors[-1]
            if not (kwargs.get("non_blocking") or op is aten.copy_ and args[-1] is True):
                self.wait("to gpu, blocking")
            # CUDA sets up to 64 KB aside: a vector has a number for each sample, whatever the size of the net
            elif source.ndim > 1 and not getattr(source.untyped_storage(), "pinned", False):
                self.wait("to gpu, not pinned")
        elif mixed and not (op in INDEX and on[0] or kwargs.get("device")) or \
                op in SAME_DTYPE and len(floats(tensors)) > 1:
            raise RuntimeError(f"{func}: {[(*t.shape, t.dtype, t.device.type) for t in tensors]}")
        if op in INDEX:
            mask = [i is not None and i.dtype == torch.bool for i in args[1]]
            if mixed or any(mask):
                self.wait("mask" if any(mask) else "index from the cpu")
            places = [torch.empty(i.numel(), dtype=torch.long) if m else i for i, m in zip(args[1], mask)]
            args = args[0], places, *args[2:]
        return self.result(func, args, kwargs)

    def result(self, func, args, kwargs):
        """Tensors of the right shapes, which are worked out once for each kind of call."""
        pure = not any(a.alias_info for a in (*func._schema.arguments, *func._schema.returns))
        key = (func, seen(args), *kwargs, seen([*kwargs.values()])) if pure else None
        if key in RESULTS:
            kind, known = RESULTS[key]
            empty = [a and torch.empty_strided(*a[:2], dtype=a[2], device="meta") for a in known]
            return kind([self.fake(a) for a in empty])

        def meta(a):
            if isinstance(a, Tensor) and not isinstance(a, FakeTensor):
                return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
            return torch.device("meta") if isinstance(a, torch.device) else a
        with in_kernel_invocation_manager(self.mode):
            out = func(*each(meta, args), **{k: each(meta, a) for k, a in kwargs.items()})
        if pure and isinstance(out, (Tensor, tuple)):
            kind, outs = (tuple, out) if isinstance(out, tuple) else (lambda outs: outs[0], [out])
            RESULTS[key] = kind, [None if a is None else seen(a) for a in outs]
        return each(self.fake, out)
