"""What it costs: time, memory and accuracy of a training pair, beside the paper's numbers.

  python bench.py pairs                  # the digits net: CMT, ECT, ECD, KD, Slow CMT, a plain loop
  python bench.py pairs --data cifar10 --batch 16 --batch_gpu 4 --trajectories 1      # the 32x32 DDPM++
  python bench.py pairs --data edm2      # EDM2 on digits; --data imagenet64 --precision bf16: XL
  python bench.py mf                     # a Mean Flow step, in flow-matching steps on the same net
  python bench.py precision --net out/digits/mid.pt     # what each precision leaves of ECT's D_t - D_r
  python bench.py plan                   # the paper's runs on 8 GPUs: memory, hours, what the network carries
  python bench.py plan train_cmt_imagenet --res 64 --gpus 4 --device a100 --price 2.5    # one of them
  python bench.py roofline train_cmt_imagenet --stage mid    # where its bytes, FLOP, kernels and time go
  python bench.py step train_cmt_imagenet --stage mid        # time and memory of its step on your GPU

`pairs`, `step`, `plan` and `roofline` run the train() of a script with random weights, the last two on a GPU
without data, so that they need none. Calls are counted by hooks, FLOPs by torch. What CMT gives: claims.py.
"""
import argparse
import contextlib
import copy
import functools
import gc
import importlib
import itertools
import math
import os
import re
import signal
import statistics
import sys
import time
import types
import warnings
import weakref
from collections import Counter
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.autograd import forward_ad
from torch.utils import backend_registration
from torch.utils._device import device_decorator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fid
import nets
import solvers
import train_cmt_cifar as script
import train_cmt_imagenet as imagenet
import train_mf_imagenet256 as mean_flow

PAPER = {"cmt": 1.0, "ect": 0.79, "ecd euler": 0.98, "ecd heun": 1.17}                # C.1, CIFAR-10, A100
DATA = dict(  # --data: the script, and what it calls them
    digits=(script, "digits"), cifar10=(script, "cifar10"), edm2=(imagenet, "digits"),
    imagenet64=(imagenet, "imagenet"))
METHODS = {  # flags of the stage that trains by this method
    "cmt": "--stage mid", "ect": "--stage post", "ecd euler": "--stage post --post ecd_euler",
    "ecd heun": "--stage post --post ecd", "kd": "--stage mid --mid kd", "slow": "--stage mid --mid slow",
    "plain": "--stage mid"}


# ---- a training pair --------------------------------------------------------------------------
def plain_loop(cfg):
    """CMT as a first version would have it: a solve a step, tiled targets, a loop over parameters."""
    model, device = script.model_size(cfg, script.load_data(cfg)), script.DEVICE
    net, teacher = script.build(cfg, model, train=True), script.build(cfg, model)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    distance = script.make_distance(cfg)
    opt = torch.optim.RAdam(net.parameters(), lr=1e-5, foreach=False)
    n, g = max(1, cfg.batch // cfg.nfe), torch.Generator(device).manual_seed(0)
    shape, sigmas = (n, net.img_channels, *[net.img_resolution] * 2), solvers.logsnr_sigmas(cfg.nfe)
    while True:
        with torch.no_grad():
            xs = solvers.dpmpp(teacher, 80.0 * script.randn(shape, g), sigmas)
        t = sigmas[:-1].to(device, torch.float32).repeat_interleave(n)
        ends = distance.features(xs[-1].repeat(cfg.nfe, 1, 1, 1))
        loss = script.loss_cmt(net, xs[:-1].flatten(0, 1), t, ends, distance)
        opt.zero_grad()
        loss.backward()
        for p in net.parameters():
            torch.nan_to_num(p.grad, 0, 1e5, -1e5, out=p.grad)
        opt.step()
        with torch.no_grad():
            for p, q in zip(net.parameters(), ema.parameters()):
                q.copy_(p.lerp(q, cfg.ema_beta))
        script.count()


def window(home, cfg, device):
    """(first, last) of the steps that are timed: whole solves of the teacher, behind some to warm up."""
    k, first = steps_of_a_solve(home, cfg), 6 if cfg.compile else 2        # --compile runs from the first
    if device.type == "cpu":                          # where a step may take half a minute
        return 0, k
    return first, first + k * math.ceil(6 / k)


def timed(train, home, cfg, gpus, device, around=contextlib.nullcontext()):
    """Seconds of a step of train(cfg) in one of `gpus` processes, with random weights, nothing sent.

    around: what the steps between first and last are done in. None for a stage that trains nothing.
    """
    clock, (first, last), stack = [], window(home, cfg, device), contextlib.ExitStack()

    def count(*args):
        if len(clock) == first:
            stack.enter_context(around)
        synchronize(device)
        clock.append(time.perf_counter())
        if len(clock) > last:
            stack.close()
            raise StopIteration
    with random_weights(home, cfg, gpus, device, [], {home: dict(count=count)}) as (_, endless):
        train(endless)
    return (clock[last] - clock[first]) / (last - first) if clock else None


@contextlib.contextmanager
def counted(calls):
    """Inside, calls gains FLOP and the samples that nets see: a frozen one, or one in training.

    The latter's passes are recorded for backward, unrecorded, or in a product; and there is backward.
    """
    def called(net, args, out):
        if not isinstance(net, (nets.EDMPrecond, nets.EDM2Precond, nets.DiT)):
            return
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(args[0]).tangent is not None:
            kind = "product"
        elif not net.training:
            kind = "teacher"
        else:
            kind = "recorded" if out.requires_grad else "unrecorded"
        calls[kind] += len(out)
        if kind == "recorded":
            out.register_hook(lambda g: calls.update(backward=len(g)))
    hook = torch.nn.modules.module.register_module_forward_hook(called)
    with FlopCounterMode(display=False) as counter:
        yield
    hook.remove()
    calls["flop"] = counter.get_total_flops()


@contextlib.contextmanager
def peak_memory(device, found):
    """Inside, found gains the bytes allocated at the worst moment, above what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with torch.autograd.profiler.profile(profile_memory=True) as seen:         # writes two lines to stderr
        yield
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    in_order = sorted((e.start_ns(), e.nbytes()) for e in events)
    found.append(max(itertools.accumulate(size for _, size in in_order)))


def synchronize(device):
    """Wait for the GPU, so that a clock read next to it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(task, device):
    """What task() takes."""
    synchronize(device)
    start = time.perf_counter()
    task()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(tasks, rounds):
    """{name: round -> seconds} -> {name: [seconds]}; every round runs each once: noise hits all alike."""
    times = {name: [] for name in tasks}
    for k in range(rounds + 1):
        order = [*tasks][k % len(tasks):] + [*tasks][:k % len(tasks)]      # nobody is always the first
        for name in order:
            took = tasks[name](k)
            times[name] += [took] * (k > 0)                                # the first round warms up
    return times


def ceiling(device):
    """FLOP/s of a large square float32 matrix product: what a step could reach."""
    n = 4096 if device.type == "cuda" else 768
    a = torch.randn(n, n, device=device)
    times = interleaved({"": lambda k: seconds(lambda: [a @ a for _ in range(4)], device)}, 8)[""]
    return 4 * 2 * n**3 / min(times)


def pairs(args, device):
    """Table C.1 and the accounting of C.2: time, calls, FLOPs and memory per training pair of each method."""
    home, data = DATA[args.data]
    names = args.methods.split(",") if args.methods else [*METHODS]
    names = [*dict.fromkeys(["cmt", *names])]             # the others are told in pairs of CMT
    if home is imagenet:                                  # EDM2 has no KD, no Slow CMT, no plain loop
        names = [m for m in names if m[:2] in ("cm", "ec")]
    configs, tasks = {}, {}
    for name in names:
        flags = ["--data", data, *METHODS[name].split(), "--no-compile"]
        for knob in ("batch", "batch_gpu", "trajectories", "loss", "precision"):
            flags += [f"--{knob}", str(getattr(args, knob))] if getattr(args, knob) else []
        cfg = home.parse(flags)
        if cfg.stage == "mid":
            fid.check_solve(cfg, *home.solve_size(cfg), 1)
        plain = name == "plain"
        configs[name] = cfg = replace(cfg, trajectories=0) if plain else cfg          # 0: a solve a step
        tasks[name] = functools.partial(timed, plain_loop if plain else home.train, home, cfg, 1, device)
    rounds = {name: lambda k, task=task: task() for name, task in tasks.items()}     # all alike
    top, times = ceiling(device), interleaved(rounds, args.rounds)
    times = {name: [t / configs[name].batch * 1e6 for t in times[name]] for name in names}
    print(f"{args.data}, batch {configs['cmt'].batch}, {args.rounds} rounds, matmul {top / 1e9:.0f} GFLOP/s")
    print("| method | us per pair, median (range) | of CMT, median over rounds (range) | paper, CIFAR-10 | "
          "teacher calls | forwards | backwards | MFLOP | share of matmul | peak MB |\n" + "|---" * 10 + "|")
    for name, task in tasks.items():
        calls, peak = Counter(), []
        task(around=counted(calls))
        task(around=peak_memory(device, peak))
        calls["forward"] = calls["recorded"] + calls["unrecorded"]
        (first, last), batch = window(home, configs[name], device), configs[name].batch
        calls = {kind: n / (last - first) / batch for kind, n in calls.items()}                # of a pair
        shown = " | ".join(f"{calls.get(kind, 0):.2f}" for kind in ("teacher", "forward", "backward"))
        each, of_cmt = times[name], [a / b for a, b in zip(times[name], times["cmt"])]
        middle, flops = statistics.median(each), calls["flop"]
        print(f"| {name} | {middle:.0f} ({min(each):.0f}-{max(each):.0f}) | {statistics.median(of_cmt):.2f} "
              f"({min(of_cmt):.2f}-{max(of_cmt):.2f}) | {PAPER.get(name, '-')} | {shown} | {flops / 1e6:.1f}"
              f" | {flops / middle / top * 1e6:.0%} | {peak[0] / 1e6:.0f} |", flush=True)


# ---- a step of Mean Flow ----------------------------------------------------------------------
def flow_matching_step(net, z, v, t, r, y, guided, cfg):
    """The yardstick: |u(z, t, t) - v|^2, one forward and one backward pass."""
    (net(z, t, t, y) - v).square().mean().backward()


def mean_flow_step(net, z, v, t, r, y, guided, cfg):
    """Loss and gradient as the script takes them: the product where r < t, guidance where it counts."""
    flow = mean_flow.flow_of(cfg, net, torch.tensor(CLASSES, device=z.device))
    mean_flow.loss_mf(flow, z, v, t, r, y, guided, cfg)[0].backward()


def product_on_all_step(net, z, v, t, r, y, guided, cfg):
    """As the public PyTorch codes: a recorded jvp on every sample, guidance on every sample, then a mask."""
    target = v
    if cfg.omega != 1 or cfg.kappa:
        with torch.no_grad():
            asked = (1 - cfg.omega - cfg.kappa) * net(z, t, t, torch.full_like(y, CLASSES))
            asked += cfg.kappa * net(z, t, t, y) if cfg.kappa else 0
            target = torch.where(guided.view(-1, 1, 1, 1), cfg.omega * v + asked, v)
    u, dudt = torch.func.jvp(lambda z, t: net(z, t, r, y), (z, t), (target, torch.ones_like(t)))
    square = (u - (target - (t - r).view(-1, 1, 1, 1) * dudt).detach()).square().flatten(1).sum(1)
    (square / (square.detach() + mean_flow.WEIGHT_C)).mean().backward()


CLASSES = 1000                                        # the null class comes behind them
UNGUIDED, XL = "--omega 1 --kappa 0", "--omega 0.2 --kappa 0.92 --guide_to 0.75"
STEPS = {  # row: what is done, by which flags
    "flow matching": (flow_matching_step, UNGUIDED),
    "loss_mf, --ratio 0": (mean_flow_step, f"{UNGUIDED} --ratio 0"),
    "Mean Flow": (mean_flow_step, UNGUIDED),
    "Mean Flow, omega 0.2, kappa 0.92, t in [0, 0.75]": (mean_flow_step, XL),
    "Mean Flow, omega 1, kappa 0.5": (mean_flow_step, "--omega 1 --kappa 0.5 --guide_to 1"),
    "product on all": (product_on_all_step, UNGUIDED),
    "product and guidance on all, 0.2, 0.92": (product_on_all_step, XL)}


def timed_step(name, net, cfg, device, k):
    """Seconds of a row of STEPS on the samples of round k, which are the same for every row."""
    f, B, g = STEPS[name][0], cfg.batch, torch.Generator().manual_seed(k)
    z, v = torch.randn(2, B, 4, 32, 32, generator=g).to(device)
    t, r = mean_flow.draw_times(B, g, cfg.ratio, cfg.P_mean, cfg.P_std)
    y = torch.randint(CLASSES, (B,), generator=g)
    y = y.masked_fill(torch.rand(B, generator=g) < 0.1, CLASSES)
    guided, y = mean_flow.is_guided(cfg, 0, t, y, CLASSES), y.to(device)
    if f is not mean_flow_step:                           # the script wants these on the CPU
        t, r, guided = (a.to(device) for a in (t, r, guided))
    net.zero_grad()
    return seconds(lambda: f(net, z, v, t, r, y, guided, cfg), device)


def mf(args, device):
    """Cost of a Mean Flow step (loss and gradient, no update), in flow-matching steps of the same round."""
    common = ["--stage", "post", "--size", args.size, "--batch", str(args.batch or 16), "--no-compile"]
    configs = {name: mean_flow.parse([*common, *flags.split()]) for name, (_, flags) in STEPS.items()}
    cfg = configs["Mean Flow"]
    model = dict(mean_flow.size_row(cfg, "size"), input_size=32, in_channels=4, num_classes=CLASSES)
    net = mean_flow.build(cfg, model | dict(average_velocity=True), train=True)
    for p in net.parameters():                            # zero at the start, where blocks would not act
        p.data += 0.02 * torch.randn_like(p) * p.requires_grad
    tasks = {name: functools.partial(timed_step, name, net, configs[name], device) for name in STEPS}
    times, calls = interleaved(tasks, args.rounds), {name: Counter() for name in STEPS}
    for name, task in tasks.items():
        with counted(calls[name]):
            for k in range(4):
                task(k)
    params = sum(p.numel() for p in net.parameters()) / 1e6
    base = statistics.median(times["flow matching"]) * 1e3
    print(f"{args.size} on 4x32x32 ({params:.1f}M parameters), batch {cfg.batch}, {args.rounds} rounds; "
          f"flow matching {base:.0f} ms")
    print("| a step of | of a flow-matching step, median (range) | FLOPs | forwards recorded | "
          "in a product | for guidance |\n|---|---|---|---|---|---|")
    for name in STEPS:
        ratios = [a / b for a, b in zip(times[name], times["flow matching"])]
        seen = (calls[name][kind] / (4 * cfg.batch) for kind in ("recorded", "product", "unrecorded"))
        print(f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | "
              f"{calls[name]['flop'] / calls['flow matching']['flop']:.2f} | "
              f"{' | '.join(f'{x:.2f}' for x in seen)} |", flush=True)


# ---- precision --------------------------------------------------------------------------------
def precision(args, device):
    """Rounding of ECT's difference D_t - D_r, the whole signal of Eq. 3, and of a teacher's ends."""
    home, data = DATA[args.data]
    flags = ["--data", data, "--stage", "post", "--no-compile"]
    cfg, state = home.parse(flags), None
    model = teacher_size(home, cfg, blank(home, cfg))
    if args.net:
        state, model = nets.load_pretrained(args.net)

    def net_in(name, layout=torch.channels_last):
        """The net in a precision, as (x, sigma) -> D_x of 64 images."""
        cfg = home.parse([*flags, "--precision", name])
        net = home.build(cfg, model, state, args.net).to(memory_format=layout)
        if home is script:
            return script.in_precision(cfg, net)
        y = imagenet.one_hot(torch.arange(64, device=device) % net.label_dim, net.label_dim)
        return lambda x, sigma: net(x, sigma, y)
    forms = net_in("fp32", torch.contiguous_format), net_in("bf16"), net_in("fp16")
    true_net, side = net_in("fp32"), model["img_resolution"]
    shape, g = (64, model["img_channels"], side, side), torch.Generator(device).manual_seed(0)
    x, eps = 0.5 * script.randn(shape, g), script.randn(shape, g)
    t = (cfg.P_mean + cfg.P_std * script.randn(64, g)).exp()

    @torch.no_grad()
    def difference(f, r):
        D_t, D_r = (f(x + s.view(-1, 1, 1, 1) * eps, s).double() for s in (t, r))
        return D_t - D_r

    @torch.no_grad()
    def ends(f, steps=cfg.nfe):
        return solvers.dpmpp(f, 80 * eps, solvers.logsnr_sigmas(steps))[-1].double()

    def size(x):
        return f"{x.square().mean().sqrt():.1e}"
    print(f"{args.net or 'random weights'}, 64 images, root mean squares; "
          "fp32's own: in another memory layout")
    print("| step | D_t - D_r | error fp32 | error bf16 | error fp16 |\n|---|---|---|---|---|")
    for q in (4096, 1024, 512, 256, 64):
        r = script.ect_step(t, q)
        true = difference(true_net, r)
        errors = [size(difference(f, r) - true) for f in forms]
        print(f"| 1/{q} | {size(true)} | {' | '.join(errors)} |")
    true = ends(true_net)
    moved = [size(ends(f) - true) for f in forms] + [size(ends(true_net, 2 * cfg.nfe) - true)]
    print(f"\n| as a teacher: ends of {cfg.nfe} steps | moved by fp32 | bf16 | fp16 | "
          f"by {2 * cfg.nfe} steps |\n|---|---|---|---|---|")
    print(f"| {size(true)} | {' | '.join(moved)} |")


# ---- a GPU without data ----
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


def leaves(args, kwargs={}):
    """The arguments of an operator, those in its lists one by one. torch's pytree takes a quarter longer."""
    return [b for a in (*args, *kwargs.values()) for b in (a if isinstance(a, (list, tuple)) else (a,))]


def mapped(f, a):
    """f of an argument, or of each in a list or tuple."""
    return type(a)(map(f, a)) if isinstance(a, (list, tuple)) else f(a)


def floats(arguments):
    """The dtypes of those that hold floats."""
    return {a.dtype for a in arguments if isinstance(a, Tensor) and a.is_floating_point()}


@functools.cache
def is_pure(func):
    """Whether an operator neither writes to its arguments nor gives back a view of them."""
    return not any(a.alias_info for a in (*func._schema.arguments, *func._schema.returns))


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
    LIBRARIES[0].impl("_fused_sgd_", lambda *a, **k: None, "Meta")    # torch has none
    with open(f"{TORCH}/include/ATen/autocast_mode.h") as f:
        lists = re.findall(r"#define AT_FORALL_([A-Z]+)_?\w*\(_\)(.*?)\n(?:\n|#)", f.read(), re.S)
    for policy, body in lists:
        for name, overload in re.findall(r'[("](\w+)(?:[.]|, )?(\w*)[)"]', body):
            if op := getattr(getattr(aten, name), overload or "default", None):
                LIBRARIES[0].impl(op._name, functools.partial(autocast, policy, op), "AutocastPrivateUse1")


def autocast(policy, op, *args, **kwargs):
    """op with its floats in bf16 or fp16 (LOWER), in the widest among them (PROMOTE), else in float32."""
    low = policy == "LOWER" or (policy == "PROMOTE" and torch.float32 not in floats(leaves(args, kwargs)))
    dtype = torch.get_autocast_dtype("gpu") if low else torch.float32

    def cast(a):
        return a.to(dtype) if floats([a]) - {torch.float64} else a
    with _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastPrivateUse1)):
        return op(*(mapped(cast, a) for a in args), **{k: mapped(cast, a) for k, a in kwargs.items()})


class FakeGPU(TorchDispatchMode):
    """Inside it a tensor on "gpu" has shape, dtype and device; CPU tensors are real.

    What CUDA refuses raises: operands on two devices or of two dtypes, a generator of another device. Each
    time the host waits for the device, .waits gains "file:line function: why". Nothing is computed: a number
    that is read is 1, and what is copied to the CPU is 0.
    """
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
        torch.Generator, Tensor.pin_memory = Generator, pin_memory
        FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()       # by one copy, as CUDA, not by number
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
        if op is torch.ops.prim.device and isinstance(args[0], FakeTensor):
            return self.device                        # C++ asks for a tensor's device this way
        given = leaves(args, kwargs)
        tensors = [a for a in given if isinstance(a, Tensor)]
        on = [isinstance(t, FakeTensor) for t in tensors]
        here = kwargs["device"].type == "gpu" if kwargs.get("device") else any(on)     # is the result on it?
        if any(ON_GPU.get(a._cdata, False) != here for a in given if isinstance(a, torch._C.Generator)):
            raise RuntimeError(f"{func}: the generator is on another device than the result")
        if not here and not any(on):
            return func(*args, **kwargs)
        if op is aten._local_scalar_dense:
            self.wait("item")
            return torch.ones((), dtype=args[0].dtype).item()
        if op is aten.scalar_tensor:
            (out := self.result(func, args, kwargs)).untyped_storage().number = True
            return out
        if op in (*COPY, *INDEX[1:]) and getattr(tensors[-1].untyped_storage(), "number", False):
            self.wait("number to gpu")                # x[0] = 1.0 copies it there: so an H200 says
        if op is aten.nonzero:
            self.wait("nonzero")
            return self.fake(torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device="meta"))
        mixed = not all(o or (t.ndim == 0 and op not in SAME_DEVICE) for o, t in zip(on, tensors))
        if op in COPY and on[-1] and (mixed or not here):
            self.wait("to cpu")
            dtype = kwargs.get("dtype") or args[0].dtype
            return args[0] if op is aten.copy_ else torch.zeros(args[0].shape, dtype=dtype)
        if op in COPY and mixed:
            source = tensors[-1]
            if not (kwargs.get("non_blocking") or (op is aten.copy_ and args[-1] is True)):
                self.wait("to gpu, blocking")
            # CUDA sets up to 64 KB aside: a vector has a number for each sample, whatever the size of the net
            elif source.ndim > 1 and not getattr(source.untyped_storage(), "pinned", False):
                self.wait("to gpu, not pinned")
        elif (mixed and not ((op in INDEX and on[0]) or kwargs.get("device"))) or \
                (op in SAME_DTYPE and len(floats(tensors)) > 1):
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
        pure = is_pure(func)
        key = (func, seen(args), *kwargs, seen([*kwargs.values()])) if pure else None
        if key in RESULTS:
            kind, known = RESULTS[key]
            empty = functools.partial(torch.empty_strided, device="meta")
            return kind([self.fake(empty(*a[:2], dtype=a[2])) if len(a) == 3 else a[1] for a in known])

        def meta(a):
            if isinstance(a, Tensor) and not isinstance(a, FakeTensor):
                return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
            return torch.device("meta") if isinstance(a, torch.device) else a
        with in_kernel_invocation_manager(self.mode):
            out = func(*(mapped(meta, a) for a in args), **{k: mapped(meta, a) for k, a in kwargs.items()})
        if pure and isinstance(out, (Tensor, tuple)):
            kind, outs = (tuple, out) if isinstance(out, tuple) else (lambda outs: outs[0], [out])
            RESULTS[key] = kind, [seen(a) for a in outs]
        return mapped(self.fake, out)


# ---- full size ----------------------------------------------------------------------------------
FULL = (  # the paper's runs
    "train_cmt_cifar", "train_cmt_cifar --data ffhq", "train_cmt_imagenet", "train_cmt_imagenet --res 512",
    "train_cmt_imagenet --post ecd", "train_mf_imagenet256", "train_t2i_coco",
    "train_mf_imagenet256 --stage post --post vanilla --mid none")
CARDS = {  # public data sheets: dense TFLOP/s in bf16, TF32, fp32; TB/s; GB/s to the next card; GB
    "a100": (312, 156, 19.5, 2.04, 300, 80), "h100": (989, 495, 67, 3.35, 450, 80),
    "h200": (989, 495, 67, 4.8, 450, 141), "4090": (165, 82.6, 82.6, 1.01, 32, 24)}
REACHED = 0.455, 0.505, 0.67, 0.776, 0.776            # of these: an H100's 450, 250, 45, 2.6, 350
LAUNCH = 28e-6, 7e-6                                  # seconds a kernel, in Python (H200), by --compile
ETHERNET = 9.7                                        # GB/s of 100 Gb/s between nodes
IMAGES = dict(cifar10=50_000, ffhq=70_000, afhqv2=15_803)
OVERWRITE = aten.zero_, aten.fill_, aten.copy_, aten.bernoulli_, aten.normal_


def fakes(args):
    """The fake GPU's tensors among arguments, each once."""
    return [*{id(t): t for t in leaves(args) if isinstance(t, FakeTensor)}.values()]


class Meter(FakeGPU):
    """Counts kernels, in calls[phase, kind of number, FLOP, bytes], and the bytes in use.

    A kernel reads its operands and writes its results, once each. Phases: the last forward was a frozen net's
    (teacher), or one's in training; backward; weights, all the rest: optimiser, average, norms.
    """

    def __init__(self):
        super().__init__()
        self.phase, self.calls, self.alive, self.peak = "weights", Counter(), {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kwargs = super().__torch_dispatch__(func, types, args, kwargs), kwargs or {}
        schema, op = func._schema, func.overloadpacket
        writes = [a.alias_info and a.alias_info.is_write for a in (*schema.arguments, *schema.returns)]
        if op is aten._fused_adam_ and not kwargs.get("grad_scale"):
            writes[1] = False                         # without a scale it leaves gradients alone
        written = fakes([out, *(a for a, write in zip(args, writes) if write)])
        for storage in (t.untyped_storage() for t in written):
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.alive.values()))
        is_view = schema.returns and schema.returns[0].alias_info and not writes[-1]
        if written and not is_view and not re.search("empty|_unsafe_view", func.name()):
            read = fakes([*args[op in OVERWRITE:], *(a for k, a in kwargs.items() if k != "out")])
            sizes = (min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in (*read, *written))
            kind, flop = "", 0
            if op in flop_registry:
                exact = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
                kind = exact if torch.float32 in floats(read) else "bf16"
                flop = flop_registry[op](*args, **kwargs, out_val=out)
            self.calls[self.phase, kind, flop, sum(sizes)] += 1
        return out

    def called(self, module, args):
        """Before every forward of a module."""
        if module.training or self.phase == "weights":
            self.phase = "forward" if module.training else "teacher"

    def within(self, phase, f):
        """f in a phase of its own, behind which weights follow."""
        def phased(*args, **kwargs):
            self.phase = phase
            out = f(*args, **kwargs)
            self.phase = "weights"
            return out
        return phased


def attention(q, k, v, plain=F.scaled_dot_product_attention):
    """As CUDA has it: fused where heads have an axis and channels lie side by side."""
    if q.ndim < 4 or any(t.stride(-1) != 1 for t in (q, k, v)):
        return plain(q, k, v)
    if q.dtype == torch.float32:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad)[0]
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


def blank(home, cfg):
    """Noise in the shapes of a full-size stage's data; other data are read."""
    name, res = home.data_name(cfg), getattr(cfg, "res", 0)
    if name in ("digits", "own"):
        return home.load_data(cfg)
    if name in IMAGES:
        few = torch.randint(256, (100, 3, res or 32, res or 32), dtype=torch.uint8)
        return few[torch.arange(IMAGES[name]) % 100]
    shape, text = (3, 64, 64) if res == 64 else (8, res // 8 or 32, res // 8 or 32), torch.randn(77, 768)

    def read(index, pick=None):
        x = torch.randn(len(index), *shape)
        x = (50 * x + 128).clamp(0, 255).byte() if res == 64 else x
        return (x, torch.randn(len(x), 256, 768), texts(index, pick)) if name == "coco" else x

    def texts(index, pick):
        return text.repeat(len(index), 1, 1)
    return types.SimpleNamespace(read=read, texts=texts, null=text, count=1000, stamp="", classes=1000,
                                 labels=torch.zeros(1000).long(), shape=shape if res else (4, 32, 32))


def teacher_size(home, cfg, images):
    """Constructor arguments of the stage's teacher."""
    if home is script:
        return script.model_size(cfg, images)
    if home is imagenet:
        return imagenet.model_size(cfg, images)
    if home is mean_flow:
        return dict(mean_flow.size_row(cfg, "weak"), input_size=images.shape[1], in_channels=images.shape[0],
                    num_classes=images.classes, average_velocity=cfg.pretrain == "mf")
    width = home.text_encoder(cfg)(images.null[None]).shape[-1]
    return home.model_size(replace(cfg, stage="pretrain"), images, width)


@contextlib.contextmanager
def random_weights(home, cfg, gpus, device, sent, more):
    """Inside it home.train() is one of `gpus` processes, with random weights and data.

    Gives an ExitStack, and the configuration that train() should get: by it nothing is written or saved.
    `sent` gains the bytes that this process sends; `more` {module: {name: stand-in}} is laid over.
    """
    images, skip = blank(home, cfg), lambda *a, **k: None
    size = teacher_size(home, cfg, images)

    def load(name):                                   # EDM2's are known by their names
        row = re.search(r"edm2-img\d+-(\w+)-", name)
        return {}, {**size, **nets.SIZES[f"edm2-{row[1]}"]} if row else size

    def all_gather(parts, x):
        sent.append((gpus - 1) * x.nbytes)
        if device.type == "cuda":                     # the other processes' parts, as if they were this one's
            [part.copy_(x) for part in parts]
    nccl = types.SimpleNamespace(all_reduce=lambda x: sent.append(2 * (gpus - 1) / gpus * x.nbytes),
                                 all_gather=all_gather)
    stand_ins = {
        home: dict(WORLD=gpus, DEVICE=device, dist=nccl, build=device_decorator(device, home.build),
                   load_data=lambda cfg: images, teacher_state=lambda cfg: ({"": ""}, size), report=skip,
                   log=skip, resume=lambda cfg: (None, cfg.steps),
                   first_weights=lambda *a: (None, *[size] * ("cmt" in home.__name__), "")),
        nets: dict(load_pretrained=load, finished=lambda path: dict(ema={}), pretrained_lpips=nets.LPIPS,
                   load_weights=skip, load_flow=skip, fitting=skip, stamp=str, memory=skip),
        fid: dict(begin_stage=skip, agree=skip)}
    with contextlib.ExitStack() as stack:
        for where in {**stand_ins, **more}:
            for name, stand_in in {**stand_ins.get(where, {}), **more.get(where, {})}.items():
                if hasattr(where, name):
                    stack.enter_context(mock.patch.object(where, name, stand_in))
        for library in (torch.backends.cuda.matmul, cudnn := torch.backends.cudnn):
            stack.callback(setattr, library, "allow_tf32", library.allow_tf32)
            library.allow_tf32 = cfg.precision != "fp32"
        stack.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        cudnn.benchmark = True                        # as launch() has it
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        mine = replace(cfg, batch_gpu=cfg.batch_gpu or cfg.batch // gpus)
        stack.enter_context(fid.one_line(mine, nets.WeightsError))
        stack.enter_context(contextlib.suppress(StopIteration))           # enough is seen
        given = cfg.stage == "pretrain" and hasattr(home, "given_teacher") and home.given_teacher(cfg)
        fid.check_values(cfg, home.LIMITS, 0 if given else gpus)
        if cfg.stage == "mid":
            fid.check_solve(cfg, *home.solve_size(cfg), gpus)
        never = 10**9
        yield stack, replace(cfg, steps=never, save_every=never, log_every=never)


def steps_of_a_solve(home, cfg):
    """How many steps one solve of the teacher feeds."""
    return max(math.prod(home.solve_size(cfg)) // cfg.batch, 1) if cfg.stage == "mid" else 1


def measure(home, cfg, gpus):
    """Two steps of a stage in one of `gpus` processes: its script's own train(), on a GPU without data.

    Returns its parameters; bytes held before the first step, of the optimiser, at the peak; calls and bytes
    sent of one step, with its share of a solve. None for a stage that trains nothing.
    """
    meter, steps, sent, found = Meter(), [], [], types.SimpleNamespace()
    cfg = replace(cfg, compile=False)
    conv, norm, last = F.conv2d, F.group_norm, torch.channels_last

    def memory(weights, opt, path, stages):
        found.parameters, found.held, found.opt = len(weights), sum(meter.alive.values()), opt
        meter.calls.clear()
        meter.peak = found.held

    def count(*args):
        steps.append((meter.calls.copy(), sum(sent)))
        meter.calls.clear()
        sent.clear()
        if len(steps) == 2:
            raise StopIteration

    def conv2d(x, w, *args, **kwargs):                # as cuDNN: in the layout of the weights
        is_last = w.is_contiguous(memory_format=last) and not w.is_contiguous()
        return conv(x.contiguous(memory_format=last) if is_last else x, w, *args, **kwargs)
    more = {
        home: dict(count=count), Tensor: dict(backward=meter.within("backward", Tensor.backward)),
        nets: dict(scale_rows=meter.within("weights", nets.scale_rows), memory=memory),
        F: dict(conv2d=conv2d, group_norm=lambda x, *a: norm(x.contiguous(), *a),     # as CUDA: in its layout
                scaled_dot_product_attention=attention)}
    with random_weights(home, cfg, gpus, meter.device, sent, more) as (stack, cfg), meter:
        stack.callback(torch.nn.modules.module.register_module_forward_pre_hook(meter.called).remove)
        home.train(cfg)
    if not steps:
        return None
    (first, sent), (found.calls, found.sent) = steps
    if (k := steps_of_a_solve(home, cfg)) > 1:                     # only the first step has a solve
        found.calls.update({key: n / k for key, n in first.items() if key[0] == "teacher"})
        found.sent += (sent - found.sent) / k
    moments = fakes([t for state in found.opt.state.values() for t in state.values()])
    found.optimiser, found.peak = sum(t.nbytes for t in moments), meter.peak
    return found


def step(home, name, cfg, args):
    """A row: milliseconds and memory of a stage's step on this GPU, mean over whole solves, nothing sent."""
    gc.collect()                                      # the stage before is gone
    torch.cuda.empty_cache()
    device = torch.device("cuda", 0)
    took = timed(home.train, home, cfg, args.gpus, device, peak_memory(device, []))  # behind cuDNN's trials
    if not took:
        return []
    ms, peak = 1e3 * took, torch.cuda.max_memory_allocated() / 1e9
    hours = ms * cfg.steps / 3.6e6
    row = {"stage": name, "--batch_gpu": cfg.batch_gpu or cfg.batch // args.gpus, "ms a step": f"{ms:.3g}",
           "images/s": f"{1e3 * cfg.batch / args.gpus / ms:,.0f}", "peak GB": f"{peak:.3g}",
           "hours": short(hours), "GPU-hours": short(hours * args.gpus)}
    print(row, flush=True)                            # the next may not fit
    return [row]


def fitting(home, cfg, gpus, room):
    """(images at once, what a step does then): a process's share, or half of it until it fits in room."""
    micro, step = cfg.batch_gpu or cfg.batch // gpus, measure(home, cfg, gpus)
    while step and step.peak > room and micro % 2 == 0 and not cfg.batch_gpu:
        micro //= 2
        step = measure(home, replace(cfg, batch_gpu=micro), gpus)
    return micro, step


def spent(calls, card, compiled):
    """(columns of a table, milliseconds, share of them that is arithmetic) of these calls."""
    *tops, bandwidth = (share * top * 1e9 for share, top in zip(REACHED, CARDS[card][:4]))         # a ms
    tops, totals = dict(zip(("bf16", "tf32", "fp32"), tops)), Counter()
    for (_, kind, flop, moved), n in calls.items():
        arithmetic = flop / tops.get(kind, 1)
        totals.update(kernels=n, launches=n * LAUNCH[compiled] * 1e3, flop=n * flop,
                      arithmetic=n * arithmetic, moved=n * moved, products=n * moved * bool(kind),
                      gpu=n * max(arithmetic, moved / bandwidth))
    t = types.SimpleNamespace(**totals)
    ms = max(t.gpu, t.launches)
    return {"TFLOP": f"{t.flop / 1e12:.3g}", "kernels": f"{t.kernels:,.0f}", "GB: products, rest":
            f"{t.products / 1e9:.3g}, {(t.moved - t.products) / 1e9:.3g}", "ms: arithmetic, GPU, launches":
            f"{t.arithmetic:.3g}, {t.gpu:.3g}, {t.launches:.3g}"}, ms, t.arithmetic / ms


def plan(home, name, cfg, args):
    """A row: memory of a process, hours and price of a stage, what it sends."""
    link, room = CARDS[args.device][4:]
    micro, step = fitting(home, cfg, args.gpus, 0.9e9 * room)
    if not step:
        return []
    columns, ms, _ = spent(step.calls, args.device, cfg.compile)
    one, moments, held, peak = step.parameters * 4e-9, step.optimiser / 1e9, step.held / 1e9, step.peak / 1e9
    parts = [round(x, 5) for x in (one, one, one, moments, held - 3 * one, peak - held - moments)]
    near, far = (step.sent / 1e6 / speed for speed in (link * REACHED[4], ETHERNET))
    hours = (ms + near) * cfg.steps / 3.6e6
    price = {"dollars": f"{hours * args.gpus * args.price:,.2f}"} if args.price else {}
    return [{"stage": name, "peak GB": f"{peak:.3g}" + "!" * (peak > 0.9 * room), "--batch_gpu": micro,
             "ms a step": short(ms + near), "steps": f"{cfg.steps:,}", "hours": short(hours),
             "GPU-hours": short(hours * args.gpus), **price, "parameters": f"{step.parameters:,}",
             "GB: weights, gradients, average, optimiser, frozen and data, activations":
             ", ".join(f"{part:.3g}" for part in parts), **columns, "GB sent": f"{step.sent / 1e9:.3g}",
             "of the time, at 100 Gb/s": f"{near / (ms + near):.0%}, {far / (ms + far):.0%}"}]


def roofline(home, name, cfg, args):
    """Rows: where the FLOP, bytes, kernels and time of a step go."""
    step, rows = measure(home, cfg, args.gpus), []
    for phase in ("teacher", "forward", "backward", "weights", "all") if step else ():
        calls = {key: n for key, n in step.calls.items() if phase in (key[0], "all")}
        if calls:
            columns, _, share = spent(calls, args.device, cfg.compile)
            moved = sum(n * key[3] for key, n in calls.items()) / step.parameters
            rows.append({"stage": name, "phase": phase, **columns, "bytes a parameter": f"{moved:.0f}",
                         "of the ceiling": f"{share:.0%}", "peak GB": f"{step.peak / 1e9:.3g}"})
    return rows


def short(x):
    """Three digits; whole numbers from a thousand on."""
    return f"{x:.3g}" if x < 999.5 else f"{x:,.0f}"


def gpu_name():
    """What the machine's GPU is called, if it has one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def full_size(command, argv):
    """Prints the rows that plan, roofline or step has for each stage; plan's also for each command."""
    p = argparse.ArgumentParser(prog=f"bench.py {command.__name__}", description=command.__doc__,
                                epilog="Other flags: the script's.", allow_abbrev=False)
    p.add_argument("script", nargs="?", choices=sorted({line.split()[0] for line in FULL}),
                   type=lambda name: name.removesuffix(".py"), help="left out: the paper's runs")
    p.add_argument("--gpus", type=int, default=8, help="processes that share the batch")
    p.add_argument("--device", type=str.lower, choices=CARDS, default="h100", help="of plan and roofline")
    p.add_argument("--price", type=float, default=0.0, help="plan: dollars for an hour of one GPU")
    p.error = lambda text: fid.fail(2, f"{text}; flags: python {p.prog} --help")
    args, flags = p.parse_known_args(argv)
    for name, least in dict(gpus=1, price=0).items():
        if getattr(args, name) < least:
            p.error(f"--{name} {getattr(args, name)} is not possible; it must be {least} or more")
    if args.script:                                   # refused before anything is said
        home = importlib.import_module(args.script)
        fid.check_values(home.parse(flags), home.LIMITS, 0)
    what = "bf16 {} TFLOP/s", "TF32 {}", "fp32 {}", "memory {} TB/s", "to the next GPU {} GB/s"
    reached = ", ".join(text.format(f"{share * top:.3g}") + f" ({share:.1%})"
                        for text, share, top in zip(what, REACHED, CARDS[args.device]))
    said = (f"{args.gpus} x {args.device} (--gpus, --device), one process each. Assumed speeds, in brackets "
            f"their share of the data sheet: {reached}. A kernel launch takes {1e6 * LAUNCH[0]:.0f} us, "
            f"{1e6 * LAUNCH[1]:.0f} under --compile. A step takes the GPU's time or its launches' time, "
            "whichever is longer, and then sends its gradient.")
    if command is step:
        if gpu_name() == "no GPU":
            fid.fail(2, "step needs a GPU; plan estimates without one")
        said = f"torch {torch.__version__}, {gpu_name()}, one of {args.gpus} processes; nothing is sent."
    print(said + "\n")
    rows, roads, todo = {}, {}, []                    # of each stage, of each command; what is to be counted
    for line in [" ".join([args.script, *flags])] if args.script else FULL:
        home, given = importlib.import_module(line.split()[0]), line.split()[1:]
        stages = home.STAGES if (asked := home.parse(given).stage) == "all" else [asked]
        todo += [(line, home, home.parse([*given, "--stage", s])) for s in stages if s not in home.RUN]
    for k, (line, home, cfg) in enumerate(todo, 1):
        name = f"{home.data_name(cfg)} {cfg.stage} {getattr(cfg, cfg.stage, '')} {cfg.precision}"
        if name not in rows:
            print(f"counting {k} of {len(todo)}: {name}", file=sys.stderr, flush=True)
            rows[name] = command(home, name, cfg, args)
            if not rows[name]:
                print("  not trained, nothing to count", file=sys.stderr)
        if rows[name]:
            roads.setdefault(line, []).extend(rows[name])
    tables = [sum(rows.values(), [])]
    if command is plan and roads:                     # what a road costs, what its stages do, and of what
        at = list(tables[0][0]).index("parameters")
        tables = [[whole(line, stages) for line, stages in roads.items()],
                  [dict([*row.items()][:at]) for row in tables[0]],
                  [dict([*row.items()][:1] + [*row.items()][at:]) for row in tables[0]]]
    print("\n\n".join(map(fid.table, tables)) if tables[0] else "nothing of this trains")


def whole(line, stages):
    """A row for a command, from plan's rows of its stages."""
    sums = {name: sum(float(row[name].replace(",", "")) for row in stages)
            for name in ("hours", "GPU-hours", "dollars") if name in stages[0]}
    peak = max((row["peak GB"] for row in stages), key=lambda text: float(text.rstrip("!")))
    return {"command": line, "stages": len(stages), "most GB on a GPU": peak,
            **{name: short(total) for name, total in sums.items()}}


# ---- command line -----------------------------------------------------------------------------
USES = dict(  # command: its flags; the last three have their own and those of a script: full_size
    pairs="data methods batch batch_gpu trajectories loss precision rounds device",
    mf="size batch rounds device", precision="data net device", plan="", roofline="", step="")
FLAGS = dict(
    data=dict(default="digits", choices=DATA, help="edm2: the EDM2 of digits"),
    methods=dict(default="", help=f"between commas; \"\" = {','.join(METHODS)}"),
    net=dict(default="", help="checkpoint; \"\" = random weights"),
    batch=dict(type=int, default=0, help="0 = the script's own; mf: 16"),
    batch_gpu=dict(type=int, default=0, help="of a forward pass; 0 = the batch"),
    trajectories=dict(type=int, default=0, help="per solve; 0 = the script's own"),
    size=dict(default="4x256x8", help="the DiT, PATCHxWIDTHxDEPTH or a row of nets.SIZES"),
    loss=dict(default="", help="of mid-training; \"\" = the script's own"),
    precision=dict(default="fp32", help="of student and teacher"),
    rounds=dict(type=int, default=5, help="times that each is measured, in turn"))


def run(argv):
    """One command of the docstring."""
    if argv[:1] in (["plan"], ["roofline"], ["step"]):          # the flags behind it are those of a script
        return full_size(dict(plan=plan, roofline=roofline, step=step)[argv[0]], argv[1:])
    args = fid.commands(globals(), "bench.py").parse_args(argv)
    for name, least in dict(rounds=1, batch=0, batch_gpu=0, trajectories=0).items():
        if getattr(args, name, least) < least:
            script.fail(2, f"--{name} {getattr(args, name)} is not possible; it must be {least} or more")
    if odd := {*getattr(args, "methods", "").split(",")} - {"", *METHODS}:
        script.fail(2, f"--methods {', '.join(odd)}: no such method; there are {', '.join(METHODS)}")
    device = torch.device(args.device)
    for module in (script, imagenet, mean_flow):
        module.DEVICE = device
    if device.type == "cpu":
        torch.set_num_threads(1)
    tf32 = getattr(args, "precision", "fp32") != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    print(f"torch {torch.__version__}, {gpu_name() if device.type == 'cuda' else 'CPU, one thread'}")
    globals()[args.what](args, device)


def main(argv=None):
    """The command line of the docstring: files that cannot be used are one line, any other error a crash."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run(argv)
    except (OSError, fid.DataError, nets.WeightsError) as error:
        script.fail(3, f"{argv[0]}: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, fid.leave)
    main()
