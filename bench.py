"""What it costs: time, memory and accuracy of a training pair, beside the paper's numbers.

  python bench.py pairs                  # the digits net: CMT, ECT, ECD, KD, Slow CMT, a plain loop
  python bench.py pairs --data cifar10 --batch 16 --batch_gpu 4 --trajectories 1      # the 32x32 DDPM++
  python bench.py pairs --data edm2      # EDM2 on digits; --data imagenet64 --precision bf16: XL
  python bench.py weights                # EDM2: weights normalised at every call, once a step, or for good
  python bench.py mf                     # a Mean Flow step, in flow-matching steps on the same net
  python bench.py precision --net out/digits/mid.pt     # what each precision leaves of ECT's D_t - D_r
  python bench.py growth                 # pairs/s against batch, micro-batch, processes; start-up; a long run
  python bench.py memory --script train_cmt_imagenet --res 64 --batch_gpu 16          # bytes of each stage

Losses, trajectories and updates are the functions of the scripts; calls are counted by hooks, FLOPs by torch,
memory by counting (`memory`) or by what was allocated (the rest). What the method gives: claims.py.
"""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import nets
import solvers
import train_cmt_cifar as script
import train_cmt_imagenet as imagenet
import train_mf_imagenet256 as mean_flow

PAPER = {"cmt": 1.0, "ect": 0.79, "ecd euler": 0.98, "ecd heun": 1.17}                # C.1, CIFAR-10, A100
MODELS = dict(                                        # --data: constructor arguments
    digits=nets.SIZES["ddpm++-8"], cifar10=nets.SIZES["ddpm++-32"],
    edm2=dict(nets.SIZES["edm2-8"], img_resolution=8, img_channels=1, label_dim=10),
    imagenet64=dict(nets.SIZES["edm2-xl"], img_resolution=64, img_channels=3, label_dim=1000))
FLAGS = dict(edm2=["--data", "digits"], imagenet64=["--data", "imagenet"])            # of their script
BATCHES = 16, 32, 64, 128, 256
METHODS = {  # flags of the stage that trains by this method
    "cmt": "--stage mid", "ect": "--stage post", "ecd euler": "--stage post --post ecd_euler",
    "ecd heun": "--stage post --post ecd", "kd": "--stage mid --mid kd", "slow": "--stage mid --mid slow",
    "plain": "--stage mid"}


# ---- a training pair --------------------------------------------------------------------------
class Pairs:
    """One training method on its own student: cycle() does as many optimiser steps as one solve feeds."""

    def __init__(self, method, args, device):
        self.method, self.device, self.model = method, device, MODELS[args.data]
        self.classes = self.model.get("label_dim", 0)
        self.script = imagenet if self.classes else script
        flags = [*FLAGS.get(args.data, ["--data", args.data]), *METHODS[method].split()]
        for name in ("batch", "batch_gpu", "trajectories", "loss", "precision"):
            flags += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
        self.cfg = cfg = self.script.parse(flags)
        self.script.check_values(cfg)
        if cfg.stage == "mid" and self.script.solves(cfg)[1] % cfg.batch:
            script.fail(2, f"--trajectories {cfg.trajectories} must fill batches of --batch {cfg.batch}")
        self.net = self.script.build(cfg, self.model, train=True)
        self.teacher = self.script.build(cfg, self.model)
        self.ema = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.shape = self.net.img_channels, self.net.img_resolution, self.net.img_resolution
        self.images = torch.randint(0, 256, (2000, *self.shape), dtype=torch.uint8, device=device)
        self.distance = nets.PixelDistance(cfg.huber_c if cfg.loss == "huber" else 0.0)
        if cfg.loss == "lpips":                           # its time does not depend on its weights
            self.distance = nets.VGG() if cfg.data == "digits" else nets.LPIPS()
            self.distance = self.distance.to(device).requires_grad_(False).eval()
        if method == "plain":
            self.opt = torch.optim.RAdam(self.net.parameters(), lr=1e-5, foreach=False)
        else:
            (self.flat, self.grad), (self.flat_ema, _) = nets.flatten(self.net), nets.flatten(self.ema)
            self.flat.grad = self.grad[:-2]
            self.opt = torch.optim.RAdam([self.flat], lr=1e-5, foreach=True)
            if self.classes:
                self.opt = torch.optim.Adam([self.flat], lr=1e-5, fused=True)
        self.sigmas, self.g = solvers.logsnr_sigmas(cfg.nfe), torch.Generator(device).manual_seed(0)
        self.count = dict(teacher=0, forward=0, backward=0)
        self.teacher.register_forward_hook(lambda m, a, out: self.add("teacher", len(out)))
        self.net.register_forward_hook(self.student_called)

    def add(self, name, n):
        self.count[name] += n

    def student_called(self, module, args, out):
        self.add("forward", len(out))
        if out.requires_grad:
            out.register_hook(lambda g: self.add("backward", len(g)))

    def pairs(self):
        """Pairs of one cycle."""
        one_step = self.cfg.stage == "post" or self.method == "plain"
        return self.cfg.batch if one_step else self.script.solves(self.cfg)[1]

    def solve(self):
        """What the script's teacher_pairs returns: states, levels, ends, owners; classes (DDPM++: None)."""
        n, pairs = self.script.solves(self.cfg)
        if self.classes:
            return imagenet.teacher_pairs(self.teacher, self.classes, self.sigmas, n, self.shape, self.g)
        f = script.forward(self.cfg, self.teacher)
        if self.cfg.mid == "slow":
            return *script.slow_pairs(f, self.sigmas, n, self.images, self.g), None
        return *script.teacher_pairs(f, self.sigmas, n, self.shape, self.g, pairs // n), None

    def given(self, net, n, y=None):
        """net as the function of (x, sigma) that the losses call: on n images, of these classes."""
        masks = nets.dropout_masks(net, range(n))
        if y is not None:
            return lambda x, sigma: net(x, sigma, y, masks=masks)
        return functools.partial(script.forward(self.cfg, net), masks=masks)

    def cycle(self):
        """What the method does from one solve of the teacher to the next; ECT and ECD: one step."""
        if self.method == "plain":
            self.plain()
        elif self.cfg.stage == "mid":
            self.mid_training()
        else:
            self.post_training()

    def mid_training(self):
        states, levels, x_0, owner, y = self.solve()
        target, B = self.distance.features(x_0), self.cfg.batch
        for at in range(0, len(levels), B):
            def loss(i):
                p = slice(at + i.start, at + i.stop)
                ends = [features[owner[p]] for features in target]
                f = self.given(self.net, i.stop - i.start, None if y is None else y[owner[p]])
                return script.loss_cmt(f, states[p], levels[p], ends, self.distance)
            self.step(loss)

    def post_training(self):
        cfg, B, g = self.cfg, self.cfg.batch, self.g
        x, eps = script.draw(self.images, B, g), script.randn((B, *self.shape), g)
        sigma, y = (cfg.P_mean + cfg.P_std * script.randn(B, g)).exp(), None
        if self.classes:
            labels = torch.randint(self.classes, (B,), generator=g, device=self.device)
            y = imagenet.one_hot(labels, self.classes)

        def loss(i):
            t, r, own = sigma[i], script.ect_step(sigma[i], cfg.q), None if y is None else y[i]
            x_t, x_r = (x[i] + s.view(-1, 1, 1, 1) * eps[i] for s in (t, r))
            if self.method != "ect":
                with torch.no_grad():
                    order = 1 if cfg.post == "ecd_euler" else 2
                    x_r = solvers.ode_step(self.given(self.teacher, len(t), own), x_t, t, r, order)
            weight = imagenet.inverse_c_out(t, self.net.sigma_data) if self.classes else None
            f = self.given(self.net, len(t), own)
            return script.loss_ect(f, x_t, x_r, t, r, cfg.huber_c, weight)
        self.step(loss)

    def step(self, loss):
        """One optimiser step as the scripts take it, over the micro-batches; loss: slice -> its mean."""
        B, micro = self.cfg.batch, self.cfg.batch_gpu or self.cfg.batch
        if self.classes:
            nets.force_weight_norm(self.net)
        with nets.hoist(self.net) if self.classes else contextlib.nullcontext():
            for k in range(0, B, micro):
                part = loss(slice(k, k + micro)) * (micro / B)
                part.backward()
                self.grad[-2] += part.detach()
        norm, value, _ = script.total(self.grad, 1.0)
        if math.isfinite(norm + value):
            self.opt.step()
        self.grad.zero_()
        self.flat_ema.lerp_(self.flat, 1 - self.cfg.ema_beta)

    def plain(self):
        """CMT as a first version would have it: a solve a step, tiled targets, a loop over parameters."""
        n = max(1, self.cfg.batch // self.cfg.nfe)
        with torch.no_grad():
            xs = solvers.dpmpp(self.teacher, 80.0 * script.randn((n, *self.shape), self.g), self.sigmas)
        t = self.sigmas[:-1].to(self.device, torch.float32).repeat_interleave(n)
        ends = self.distance.features(xs[-1].repeat(self.cfg.nfe, 1, 1, 1))
        loss = script.loss_cmt(self.net, xs[:-1].flatten(0, 1), t, ends, self.distance)
        self.opt.zero_grad()
        loss.backward()
        for p in self.net.parameters():
            torch.nan_to_num(p.grad, 0, 1e5, -1e5, out=p.grad)
        self.opt.step()
        with torch.no_grad():
            for p, q in zip(self.net.parameters(), self.ema.parameters()):
                q.copy_(p.lerp(q, self.cfg.ema_beta))


def synchronize(device):
    """Wait for the GPU, so that a clock read next to it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(tasks, rounds, device):
    """{name: function} -> {name: [seconds per round]}; every round runs each once: noise hits all alike."""
    times = {name: [] for name in tasks}
    for k in range(rounds + 1):
        order = [*tasks][k % len(tasks):] + [*tasks][:k % len(tasks)]      # nobody is always the first
        for name in order:
            synchronize(device)
            start = time.perf_counter()
            tasks[name]()
            synchronize(device)
            times[name] += [time.perf_counter() - start] * (k > 0)         # the first round warms up
    return times


def peak_memory(task, device):
    """Bytes allocated at the worst moment of task(), above what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        task()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as seen:         # writes two lines to stderr
        task()
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    in_order = sorted((e.start_ns(), e.nbytes()) for e in events)
    return max(itertools.accumulate(size for _, size in in_order))


def ceiling(device):
    """FLOP/s of a large square float32 matrix product: what a step could reach."""
    n = 4096 if device.type == "cuda" else 768
    a = torch.randn(n, n, device=device)
    times = interleaved({"matmul": lambda: [a @ a for _ in range(4)]}, 8, device)["matmul"]
    return 4 * 2 * n**3 / min(times)


def here(device):
    """Where the numbers below come from: for their heading."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    return f"torch {torch.__version__}, {name}"


def pairs(args, device):
    """Table C.1 and the accounting of C.2: time, calls, FLOPs and memory per training pair of each method."""
    names = args.methods.split(",") if args.methods else [*METHODS]
    names = [*dict.fromkeys(["cmt", *names])]             # the others are told in pairs of CMT
    if "label_dim" in MODELS[args.data]:                  # EDM2 has no KD, no Slow CMT, no plain loop
        names = [m for m in names if m[:2] in ("cm", "ec")]
    methods = {m: Pairs(m, args, device) for m in names}
    top, times = ceiling(device), interleaved({m: p.cycle for m, p in methods.items()}, args.rounds, device)
    times = {m: [t / methods[m].pairs() * 1e6 for t in times[m]] for m in methods}
    peak = {m: peak_memory(p.cycle, device) / 1e6 for m, p in methods.items()}
    print(f"{args.data}, batch {methods['cmt'].cfg.batch}, {args.rounds} rounds, {here(device)}, "
          f"matmul {top / 1e9:.0f} GFLOP/s")
    print("| method | us per pair, median (range) | of CMT, median over rounds (range) | paper, CIFAR-10 | "
          "teacher calls | forwards | backwards | MFLOP | share of matmul | peak MB |\n" + "|---" * 10 + "|")
    for name, p in methods.items():
        p.count = dict.fromkeys(p.count, 0)
        with FlopCounterMode(display=False) as counter:
            p.cycle()
        calls = " | ".join(f"{v / p.pairs():.2f}" for v in p.count.values())
        each, of_cmt = times[name], [a / b for a, b in zip(times[name], times["cmt"])]
        middle, flops = statistics.median(each), counter.get_total_flops() / p.pairs()
        print(f"| {name} | {middle:.0f} ({min(each):.0f}-{max(each):.0f}) | "
              f"{statistics.median(of_cmt):.2f} ({min(of_cmt):.2f}-{max(of_cmt):.2f}) | "
              f"{PAPER.get(name, '-')} | {calls} | {flops / 1e6:.1f} | {flops / middle / top * 1e6:.0%} | "
              f"{peak[name]:.0f} |", flush=True)


# ---- weights of EDM2 --------------------------------------------------------------------------
def weights(args, device):
    """EDM2: a step of micro-batches, weights normalised at each call or hoisted; a forward, frozen or not."""
    model = dict(img_resolution=16, img_channels=4, label_dim=10, model_channels=args.channels,
                 channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
    net = nets.EDM2Precond(**model).to(device, memory_format=torch.channels_last)
    frozen = nets.freeze(copy.deepcopy(net))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    n = args.batch or 1
    x, sigma = torch.randn(n, 4, 16, 16, device=device), torch.ones(n, device=device)

    def step():
        for _ in range(4):
            net(x, sigma).square().mean().backward()

    def hoisted():
        with nets.hoist(net):
            step()

    @torch.no_grad()
    def forward(n):
        n(x, sigma)
    tasks = {"step of 4 micro-batches, normalised at every call": step, "the same, hoisted": hoisted,
             "forward, normalised": lambda: forward(net), "forward, frozen": lambda: forward(frozen),
             "forced normalisation, once per step": lambda: nets.force_weight_norm(net)}
    size = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"EDM2 of {size:.1f}M parameters, micro-batch {n}, 16x16 latents")
    for name, times in interleaved(tasks, args.rounds, device).items():
        middle, low, high = (f(times) * 1e3 for f in (statistics.median, min, max))
        print(f"{name:50s} {middle:8.1f} ms ({low:.1f}-{high:.1f})")


# ---- a step of Mean Flow ----------------------------------------------------------------------
class Calls:
    """Samples that a net's forward passes see: recorded for backward, inside a product, for guidance."""

    def __init__(self, net):
        self.recorded = self.product = self.guidance = 0
        net.register_forward_hook(self.count)

    def count(self, net, args, out):
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(args[0]).tangent is not None:
            self.product += len(out)
        elif torch.is_grad_enabled() or out.requires_grad:
            self.recorded += len(out)
        else:
            self.guidance += len(out)


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


def timed_step(name, net, cfg, k, device):
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
    synchronize(device)
    start = time.perf_counter()
    f(net, z, v, t, r, y, guided, cfg)
    synchronize(device)
    return time.perf_counter() - start


def mf(args, device):
    """Cost of a Mean Flow step (loss and gradient, no update), in flow-matching steps of the same round."""
    common = ["--stage", "post", "--size", args.size, "--batch", str(args.batch or 16)]
    configs = {name: mean_flow.parse([*common, *flags.split()]) for name, (_, flags) in STEPS.items()}
    cfg = configs["Mean Flow"]
    model = dict(mean_flow.size_row(cfg, "size"), input_size=32, in_channels=4, num_classes=CLASSES)
    net = mean_flow.build(cfg, model | dict(average_velocity=True), train=True)
    for p in net.parameters():                            # zero at the start, where blocks would not act
        p.data += 0.02 * torch.randn_like(p) * p.requires_grad
    calls, times, flops, counts = Calls(net), {name: [] for name in STEPS}, {}, {}
    for name in STEPS:                                    # warm-up, and what a step does
        with FlopCounterMode(display=False) as counter:
            for k in range(3):
                timed_step(name, net, configs[name], k, device)
        flops[name] = counter.get_total_flops()
    for k in range(args.rounds):
        order = [*STEPS][k % len(STEPS):] + [*STEPS][:k % len(STEPS)]      # nobody is always the first
        for name in order:
            calls.recorded = calls.product = calls.guidance = 0
            times[name].append(timed_step(name, net, configs[name], k, device))
            counts.setdefault(name, []).append((calls.recorded, calls.product, calls.guidance))
    params = sum(p.numel() for p in net.parameters()) / 1e6
    base = statistics.median(times["flow matching"]) * 1e3
    print(f"{args.size} on 4x32x32 ({params:.1f}M parameters), batch {cfg.batch}, {args.rounds} rounds, "
          f"{here(device)}; flow matching {base:.0f} ms")
    print("| a step of | of a flow-matching step, median (range) | FLOPs | forwards recorded | "
          "in a product | for guidance |\n|---|---|---|---|---|---|")
    for name in STEPS:
        ratios = [a / b for a, b in zip(times[name], times["flow matching"])]
        n = " | ".join(f"{statistics.mean(c) / cfg.batch:.2f}" for c in zip(*counts[name]))
        print(f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | "
              f"{flops[name] / flops['flow matching']:.2f} | {n} |", flush=True)


# ---- precision --------------------------------------------------------------------------------
def precision(args, device):
    """Rounding of ECT's difference D_t - D_r, the whole signal of Eq. 3, and of a teacher's ends."""
    edm2 = "label_dim" in MODELS[args.data]
    home, state, model = imagenet if edm2 else script, None, MODELS[args.data]
    if args.net:
        state, model = nets.load_pretrained(args.net)
    flags = [*FLAGS.get(args.data, ["--data", args.data]), "--stage", "post"]

    def net_in(name, layout=torch.channels_last):
        """The net in a precision, as (x, sigma) -> D_x of 64 images."""
        cfg = home.parse([*flags, "--precision", name])
        net = home.build(cfg, model, state, args.net).to(memory_format=layout)
        if not edm2:
            return script.forward(cfg, net)
        y = imagenet.one_hot(torch.arange(64, device=device) % net.label_dim, net.label_dim)
        return lambda x, sigma: net(x, sigma, y)
    cfg, forms = home.parse(flags), dict(fp32=net_in("fp32", torch.contiguous_format), bf16=net_in("bf16"),
                                         fp16=net_in("fp16"))
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
        errors = [size(difference(f, r) - true) for f in forms.values()]
        print(f"| 1/{q} | {size(true)} | {' | '.join(errors)} |")
    true = ends(true_net)
    moved = [size(ends(f) - true) for f in forms.values()] + [size(ends(true_net, 2 * cfg.nfe) - true)]
    print(f"\n| as a teacher: ends of {cfg.nfe} steps | moved by fp32 | bf16 | fp16 | "
          f"by {2 * cfg.nfe} steps |\n|---|---|---|---|---|")
    print(f"| {size(true)} | {' | '.join(moved)} |")


# ---- growth -----------------------------------------------------------------------------------
def watched(argv):
    """Run the CIFAR script with the peak memory of its process, in MiB, in every line of its log."""
    plain = script.report
    unit = 2**20 if sys.platform == "darwin" else 2**10   # macOS counts bytes, Linux KiB

    def report(*args):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        if script.DEVICE.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        plain(*args, memory=peak)
    script.report = report
    try:
        script.main(argv)
    finally:
        script.report = plain


def growth(args, device):
    """Does a pair cost the same in large batches, micro-batches, two processes, and late in a long run?"""
    print("| batch | us per pair of CMT, range over rounds |\n|---|---|")
    for batch in BATCHES:
        args.batch = batch
        p = Pairs("cmt", args, device)
        times = [t / p.pairs() * 1e6 for t in interleaved({"cmt": p.cycle}, args.rounds, device)["cmt"]]
        print(f"| {batch} | {statistics.median(times):.0f} ({min(times):.0f}-{max(times):.0f}) |", flush=True)
    print("\n| pretrain | steps | start-up, s | images/s, first quarter | last | MiB, first quarter | last |")
    print("|---" * 7 + "|")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    short = args.steps // 10
    for name, steps, launcher, flags in (
            ("one process", args.steps, [], []),
            ("one process, --batch_gpu 8", short, [], ["--batch_gpu", "8"]),
            ("two processes", short, torchrun, [])):
        with tempfile.TemporaryDirectory() as out:
            line = [sys.executable, *launcher, __file__, "watched", "--data", "digits", "--stage", "pretrain"]
            start = time.time()
            subprocess.run([*line, "--out", out, "--steps", str(steps), "--save_every", "1000000", *flags],
                           check=True, stdout=subprocess.DEVNULL)
            took = time.time() - start
            with open(f"{out}/metrics.jsonl") as f:
                lines = [json.loads(line) for line in f]
        k, cells = max(1, len(lines) // 4), []
        for what in ("images_per_second", "memory"):
            seen = [m[what] for m in lines]
            cells += [f"{statistics.median(seen[:k]):.0f}", f"{statistics.median(seen[-k:]):.0f}"]
        startup = took - lines[-1]["seconds"]
        print(f"| {name} | {steps:,} | {startup:.1f} | {' | '.join(cells)} |", flush=True)


# ---- memory -----------------------------------------------------------------------------------
EDM2 = dict(digits=MODELS["edm2"], imagenet64=MODELS["imagenet64"], imagenet512=dict(
    nets.SIZES["edm2-xxl"], img_resolution=64, img_channels=4, label_dim=1000))


def on_meta(cfg, model):
    """An EDM2 without memory, as train_cmt_imagenet.py would build it in this precision."""
    with torch.device("meta"):
        net = nets.EDM2Precond(**{**model, "logvar_channels": 0})
    net.compute_dtype = imagenet.HALF.get(cfg.precision)
    return net


def frozen_nets(cfg, model):
    """The constructor arguments of the frozen nets that a stage holds: a teacher, in ECD also its guide."""
    def size(name):                                       # of a snapshot, by its name; of a FILE: as model
        found = re.match(r"edm2-img\d+-(\w+)-", name)
        return {**model, **nets.SIZES[f"edm2-{found[1]}"]} if found else model
    if cfg.stage == "mid":
        return [model]
    if cfg.stage != "post" or cfg.post == "ect":
        return []
    return [size(cfg.main)] + [size(cfg.guide)] * bool(cfg.guide and cfg.w != 1)


def held(cfg, model):
    """Gigabytes of a process: (weights and all that is as large, frozen nets, activations of one image)."""
    net, seen = on_meta(cfg, model), {}
    with torch.device("meta"):
        x = torch.zeros(1, net.img_channels, net.img_resolution, net.img_resolution)

        def keep(t):
            return seen.setdefault(t.untyped_storage()._cdata, t)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), nets.hoist(net):
            net(x, torch.ones(1), torch.zeros(1, net.label_dim))
            own = {t.untyped_storage()._cdata for t in [*net.parameters(), *net.buffers()]}
        frozen = [nets.freeze(on_meta(cfg, arguments)) for arguments in frozen_nets(cfg, model)]
    one = sum(t.untyped_storage().nbytes() for key, t in seen.items() if key not in own) / 1e9
    size = sum(p.numel() for p in net.parameters()) * 4 / 1e9
    copies = 6 if net.compute_dtype else 7    # weights, gradients, Adam's two, EMA; hoisted and its gradient
    return copies * size, sum(t.nbytes for f in frozen for t in f.buffers()) / 1e9, one


def memory(argv):
    """A line a stage: what a process will hold, counted on nets without memory. Other flags: the script's."""
    p = argparse.ArgumentParser(prog="bench.py memory", description=memory.__doc__)
    p.add_argument("--script", default="train_cmt_imagenet", choices=["train_cmt_imagenet"])
    p.add_argument("--processes", type=int, default=1, help="that share the batch")
    args, flags = p.parse_known_args(argv)
    cfg = imagenet.parse(flags)
    for stage in ("mid", "post") if cfg.stage == "all" else [cfg.stage]:
        cfg = imagenet.parse([*flags, "--stage", stage])
        model = EDM2.get(imagenet.data_name(cfg))
        if not model or stage not in ("pretrain", "mid", "post"):
            script.fail(2, f"--data {cfg.data} --res {cfg.res} --stage {stage}: memory knows pretrain, mid "
                           f"and post of {', '.join(EDM2)}")
        n = cfg.batch_gpu or cfg.batch // args.processes
        fixed, frozen, one = held(cfg, model)
        total = fixed + frozen + one * n
        print(f"{stage}, {cfg.precision}: memory a process: {total:.1f} GB = {fixed:.1f} weights, gradients, "
              f"Adam, EMA, hoisted + {frozen:.1f} frozen nets + {n} images at once of {one:.3f}" +
              fitting(total, one, n))


def fitting(total, one, n):
    """What to pass, where this machine's GPU is smaller than total gigabytes."""
    if not torch.cuda.is_available():
        return ""
    room = torch.cuda.get_device_properties(0).total_memory / 1e9
    if total <= room:
        return ""
    fit = max(1, int((room - total + one * n) / one))
    return f"; this device has {room:.0f} GB: pass --batch_gpu {2 ** int(math.log2(fit))}"


# ---- command line -----------------------------------------------------------------------------
COMMANDS = {f.__name__: f for f in (pairs, weights, mf, precision, growth)}


def main(argv=None):
    """The command line of the docstring."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["memory"] or argv[:1] == ["watched"]:          # the flags behind it are those of a script
        return dict(memory=memory, watched=watched)[argv[0]](argv[1:])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=COMMANDS, help="or memory, with the flags of its script")
    p.add_argument("--data", default="digits", choices=MODELS, help="edm2: the EDM2 of digits")
    p.add_argument("--methods", default="", help=f"pairs: between commas; \"\" = {','.join(METHODS)}")
    p.add_argument("--net", default="", help="precision: checkpoint; \"\" = random weights")
    p.add_argument("--steps", type=int, default=10_000, help="growth: of the long run")
    p.add_argument("--batch", type=int, default=0, help="0 = the script's own; weights: 1; mf: 16")
    p.add_argument("--batch_gpu", type=int, default=0, help="pairs: of a forward pass; 0 = the batch")
    p.add_argument("--trajectories", type=int, default=0, help="pairs: per solve; 0 = the script's own")
    p.add_argument("--channels", type=int, default=128, help="weights: model_channels of the EDM2")
    p.add_argument("--size", default="4x256x8", help="mf: the DiT, PATCHxWIDTHxDEPTH or a row of nets.SIZES")
    p.add_argument("--loss", default="", help="pairs: of mid-training; \"\" = the script's own")
    p.add_argument("--precision", default="fp32", help="pairs: of student and teacher")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    device = torch.device(args.device)
    for module in (script, imagenet, mean_flow):
        module.DEVICE = device
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    COMMANDS[args.what](args, device)


if __name__ == "__main__":
    main()
