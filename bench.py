"""What a training pair costs, beside the paper's numbers; and the paper's claims, tried on digits.

  python bench.py pairs                  # the digits net: CMT, ECT, ECD, KD, Slow CMT, a plain loop
  python bench.py pairs --data cifar10 --batch 16 --batch_gpu 4 --trajectories 1     # the 32x32 DDPM++
  python bench.py pairs --data edm2      # EDM2 on digits; --data imagenet64 --precision bf16: XL
  python bench.py weights                # EDM2: weights normalised at every call, once per step, or for good
  python bench.py mf                     # a Mean Flow step, in flow-matching steps on the same net
  python bench.py precision --net out/digits/mid.pt    # what each precision leaves of ECT's D_t - D_r; --data edm2
  python bench.py growth                 # pairs/s against batch, micro-batch, processes; start-up; a long run
  python bench.py curves                 # CMT + ECT beside ECT: score and gradient norm against images
  python bench.py claims                 # the paper's claims on digits, three seeds of every run (hours)
  python bench.py photos --data cifar10.zip --out out/photos     # CMT + ECT beside ECT on 16x16 photos, from an EDM zip

Losses, trajectories and updates are the functions of the scripts; calls are counted by hooks, FLOPs by torch.
"""
import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fid
import nets
import solvers
import train_cmt_cifar as script
import train_cmt_imagenet as imagenet
import train_mf_imagenet256 as mean_flow

PAPER = {"cmt": 1.0, "ect": 0.79, "ecd euler": 0.98, "ecd heun": 1.17}                # C.1, CIFAR-10, A100

MODELS = dict(digits=nets.SIZES["ddpm++-8"], cifar10=nets.SIZES["ddpm++-32"], edm2=nets.SIZES["edm2-8"] | dict(
    img_resolution=8, img_channels=1, label_dim=10), imagenet64=nets.SIZES["edm2-xl"] | dict(
    img_resolution=64, img_channels=3, label_dim=1000))
BATCHES = 16, 32, 64, 128, 256
METHODS = "cmt,ect,ecd euler,ecd heun,kd,slow,plain"


class Pairs:
    """One training method on its own student: cycle() does as many optimiser steps as one solve feeds."""

    def __init__(self, method, args, device):
        mid = dict(kd="kd", slow="slow").get(method, "cmt")
        ecd = method.split()[-1] if method.startswith("ecd") else "heun"
        stage = "post" if method.startswith("ec") else "mid"
        self.script = imagenet if args.data in ("edm2", "imagenet64") else script
        flags = ["--data", dict(edm2="digits", imagenet64="imagenet").get(args.data, args.data), "--stage", stage,
                 "--mid", mid, "--ecd", ecd, "--threads", "1", "--precision", args.precision]
        for name in ("batch", "batch_gpu", "trajectories", "loss"):
            flags += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
        self.cfg = cfg = self.script.parse(flags)
        self.method, self.device, self.classes = method, device, MODELS[args.data].get("label_dim", 0)
        self.script.check_batch(cfg, 1)
        self.net = self.script.build(cfg, MODELS[args.data], device, train=True).train()
        self.teacher = self.script.build(cfg, MODELS[args.data], device)
        self.ema = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.shape = self.net.img_channels, self.net.img_resolution, self.net.img_resolution
        self.images = torch.randint(0, 256, (2000, *self.shape), dtype=torch.uint8, device=device)
        self.distance = nets.PixelDistance(0.0)
        if cfg.loss == "lpips":
            self.distance = nets.VGG() if cfg.data == "digits" else nets.LPIPS()
            self.distance = self.distance.to(device).requires_grad_(False).eval()
        if method == "plain":
            self.opt = torch.optim.RAdam(self.net.parameters(), lr=1e-5, foreach=False)
        else:
            (self.flat, self.grad), (self.flat_ema, _) = script.flatten(self.net), script.flatten(self.ema)
            self.flat.grad = self.grad[:-1]
            self.opt = torch.optim.RAdam([self.flat], lr=1e-5, foreach=True)
            if self.classes:
                self.opt = torch.optim.Adam([self.flat], lr=1e-5, fused=True)
        self.scale, self.health = torch.tensor(1.0, device=device), torch.zeros(5, device=device)
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
        return self.cfg.batch if self.method[:3] in ("ect", "ecd", "pla") else self.script.solves(self.cfg)[1]

    def solve(self):
        """x_t, t, x_0, owner of the script's teacher_pairs, and classes (DDPM++: None)."""
        if self.classes:
            return imagenet.teacher_pairs(self.cfg, self.teacher, self.classes, self.sigmas, self.shape, self.g, 0, 1)
        f = script.forward(self.cfg, self.teacher, self.device)
        return *script.teacher_pairs(self.cfg, f, self.images, self.sigmas, self.shape, self.g, 0, 1), None

    def given(self, net, y):
        """net as a function of (x, sigma), for these classes."""
        if y is None:
            return script.forward(self.cfg, net, self.device)
        return lambda x, sigma: net(x, sigma, y)

    def cycle(self):
        if self.method == "plain":
            return self.plain()
        cfg, B, net = self.cfg, self.cfg.batch, self.net
        micro = torch.arange(B, device=self.device).split(cfg.batch_gpu or B)
        if cfg.stage == "mid":
            x_t, t, x_0, owner, y = self.solve()
            target = self.distance.features(x_0)
            for p in torch.arange(len(t), device=self.device).split(B):
                def loss(i):
                    p_i, own = p[i], owner[p[i]]
                    f = self.given(net, None if y is None else y[own])
                    return script.loss_cmt(f, x_t[p_i], t[p_i], [m[own] for m in target], self.distance)
                self.step(micro, loss)
            return
        x, eps = script.draw(self.images, B, self.g), script.randn((B, *self.shape), self.g)
        t = (cfg.P_mean + cfg.P_std * script.randn(B, self.g)).exp()
        r, y = script.ect_step(t, cfg.q), None
        if self.classes:
            labels = torch.randint(self.classes, (B,), generator=self.g, device=self.device)
            y = imagenet.one_hot(labels, self.classes)

        def loss(i):
            own = None if y is None else y[i]
            x_t, x_r = (x[i] + s[i].view(-1, 1, 1, 1) * eps[i] for s in (t, r))
            if self.method != "ect":
                with torch.no_grad():
                    D, order = self.given(self.teacher, own), 2 if cfg.ecd == "heun" else 1
                    x_r = solvers.ode_step(D, x_t, t[i], r[i], order)
            weight = imagenet.inverse_c_out(t[i], net.sigma_data) if self.classes else None
            return script.loss_ect(self.given(net, own), x[i], x_t, x_r, t[i], r[i], 0, cfg.huber, weight)
        self.step(micro, loss)

    def step(self, micro, loss):
        if self.classes:
            nets.force_weight_norm(self.net)
        with nets.hoist(self.net) if self.classes else contextlib.nullcontext():
            for i in micro:
                (loss(i) * (len(i) / self.cfg.batch)).backward()
        script.update(self.opt, self.flat, self.grad, self.health, self.scale, self.cfg)
        self.flat_ema.lerp_(self.flat, 1 - self.cfg.ema_beta)

    def plain(self):
        """CMT as a first version would have it: a solve per step, tiled targets, a loop over parameters."""
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
    with torch.autograd.profiler.profile(profile_memory=True) as seen:         # writes two lines of its own to stderr
        task()
    events = sorted((e.start_ns(), e.nbytes()) for e in seen.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in events))


def ceiling(device):
    """FLOP/s of a large square float32 matrix product: what a step could reach."""
    n = 4096 if device.type == "cuda" else 768
    a = torch.randn(n, n, device=device)
    times = interleaved({"matmul": lambda: [a @ a for _ in range(4)]}, 8, device)["matmul"]
    return 4 * 2 * n**3 / min(times)


def pairs(args, device):
    """Table C.1 and the accounting of C.2: time, calls, FLOPs and memory per training pair of each method."""
    names = (args.methods or METHODS).split(",")
    if "label_dim" in MODELS[args.data]:                  # EDM2 has no KD, no Slow CMT, no plain loop
        names = [m for m in names if m[:2] in ("cm", "ec")]
    methods = {m: Pairs(m, args, device) for m in names}
    top, times = ceiling(device), interleaved({m: p.cycle for m, p in methods.items()}, args.rounds, device)
    times = {m: [t / methods[m].pairs() * 1e6 for t in times[m]] for m in methods}
    peak = {m: peak_memory(p.cycle, device) / 1e6 for m, p in methods.items()}
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    print(f"{args.data}, batch {next(iter(methods.values())).cfg.batch}, {args.rounds} rounds, "
          f"torch {torch.__version__}, {where}, matmul {top / 1e9:.0f} GFLOP/s")
    print("| method | us per pair, median (range) | of CMT, median over rounds (range) | paper, CIFAR-10 | teacher calls | "
          "forwards | backwards | MFLOP | share of matmul | peak MB |\n|---|---|---|---|---|---|---|---|---|---|")
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


def weights(args, device):
    """EDM2: a step of micro-batches, weights normalised at every call or hoisted; a forward, frozen or not."""
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


def flow_matching_step(net, z, v, t, r, y, null, led, cfg):
    """The yardstick: |u(z, t, t) - v|^2, one forward and one backward pass."""
    (net(z, t, t, y) - v).square().mean().backward()


def mean_flow_step(net, z, v, t, r, y, null, led, cfg):
    """Loss and gradient as the script takes them: the product on samples with r < t, guidance where it counts."""
    f, slope = mean_flow.forward(cfg, net, z.device)
    mean_flow.loss_mf(f, slope, z, v, t, r, y, null, led, cfg)[0].backward()


def product_on_all_step(net, z, v, t, r, y, null, led, cfg):
    """As the public PyTorch codes: one recorded jvp on every sample, guidance on every sample, then a mask."""
    target = v
    if cfg.omega != 1 or cfg.kappa:
        with torch.no_grad():
            asked = (1 - cfg.omega - cfg.kappa) * net(z, t, t, torch.full_like(y, null))
            asked += cfg.kappa * net(z, t, t, y) if cfg.kappa else 0
            target = torch.where(led.view(-1, 1, 1, 1), cfg.omega * v + asked, v)
    u, dudt = torch.func.jvp(lambda z, t: net(z, t, r, y), (z, t), (target, torch.ones_like(t)))
    square = (u - (target - (t - r).view(-1, 1, 1, 1) * dudt).detach()).square().flatten(1).sum(1)
    (square / (square.detach() + cfg.weight_c)).mean().backward()


def mf(args, device):
    """Cost of a Mean Flow step (loss and gradient, no update) over a flow-matching step of the same round."""
    size, batch, rounds, no = args.size, args.batch or 16, args.rounds, "--omega 1 --kappa 0"
    xl, half = "--omega 0.2 --kappa 0.92 --guide_to 0.75", "--omega 1 --kappa 0.5 --guide_to 1"
    rows = {"flow matching": (flow_matching_step, no), "loss_mf, --ratio 0": (mean_flow_step, no + " --ratio 0"),
            "Mean Flow": (mean_flow_step, no),
            "Mean Flow, omega 0.2, kappa 0.92, t in [0, 0.75]": (mean_flow_step, xl),
            "Mean Flow, omega 1, kappa 0.5": (mean_flow_step, half),
            "product on all": (product_on_all_step, no),
            "product and guidance on all, 0.2, 0.92": (product_on_all_step, xl)}
    rows = {name: (step, mean_flow.parse(["--stage", "post", "--size", size, "--batch", str(batch), *flags.split()]))
            for name, (step, flags) in rows.items()}
    cfg = rows["Mean Flow"][1]
    model = mean_flow.model_size(cfg, dict(input_size=32, in_channels=4, num_classes=1000))
    net = mean_flow.build(cfg, model, device, train=True)
    for p in net.parameters():                            # zero at the start, where blocks would not act
        p.data += 0.02 * torch.randn_like(p) * p.requires_grad
    calls, times, flops, counts = Calls(net), {name: [] for name in rows}, {}, {}

    def step(name, k):
        f, cfg = rows[name]
        g = torch.Generator().manual_seed(k)              # every row of a round sees the same samples
        z, v = torch.randn(2, batch, 4, 32, 32, generator=g).to(device)
        t, r = mean_flow.draw_times(batch, g, cfg.ratio, cfg.P_mean, cfg.P_std)
        y = torch.randint(1000, (batch,), generator=g).masked_fill(torch.rand(batch, generator=g) < 0.1, 1000)
        led = mean_flow.guided(cfg, 0, t, y, 1000)
        if f is not mean_flow_step:                       # the script wants these on the CPU
            t, r, y, led = (a.to(device) for a in (t, r, y, led))
        net.zero_grad()
        synchronize(device)
        start = time.perf_counter()
        f(net, z, v, t, r, y, 1000, led, cfg)
        synchronize(device)
        return time.perf_counter() - start
    for name in rows:                                     # warm-up, and what a step does
        with FlopCounterMode(display=False) as counter:
            for k in range(3):
                step(name, k)
        flops[name] = counter.get_total_flops()
    for k in range(rounds):
        order = [*rows][k % len(rows):] + [*rows][:k % len(rows)]          # nobody is always the first
        for name in order:
            calls.recorded = calls.product = calls.guidance = 0
            times[name].append(step(name, k))
            counts.setdefault(name, []).append((calls.recorded, calls.product, calls.guidance))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    params, base = sum(p.numel() for p in net.parameters()) / 1e6, statistics.median(times["flow matching"]) * 1e3
    print(f"{size} on 4x32x32 ({params:.1f}M parameters), batch {batch}, {rounds} rounds, "
          f"torch {torch.__version__}, {where}; flow matching {base:.0f} ms")
    print("| a step of | of a flow-matching step, median (range) | FLOPs | forwards recorded | in a product | "
          "for guidance |\n|---|---|---|---|---|---|")
    for name in rows:
        ratios = [a / b for a, b in zip(times[name], times["flow matching"])]
        n = [statistics.mean(c) / batch for c in zip(*counts[name])]
        print(f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | "
              f"{flops[name] / flops['flow matching']:.2f} | {' | '.join(f'{x:.2f}' for x in n)} |", flush=True)


def precision(args, device):
    """Rounding of ECT's difference D_t - D_r, the whole signal of Eq. 3, and of a teacher's ends."""
    edm2 = "label_dim" in MODELS[args.data]
    home, state, model = imagenet if edm2 else script, None, MODELS[args.data]
    if args.net:
        state, model = nets.load_pretrained(args.net)
    flags = ["--data", dict(edm2="digits", imagenet64="imagenet").get(args.data, args.data), "--stage", "post"]

    def net_in(name, layout=torch.channels_last):
        """The net in a precision, as (x, sigma) -> D_x of 64 images."""
        cfg = home.parse([*flags, "--precision", name])
        net = home.build(cfg, model, device, state, args.net).to(memory_format=layout)
        if not edm2:
            return script.forward(cfg, net, device)
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
    print(f"{args.net or 'random weights'}, 64 images, root mean squares; fp32's own: in another memory layout")
    print("| step | D_t - D_r | error fp32 | error bf16 | error fp16 |\n|---|---|---|---|---|")
    for q in (4096, 1024, 512, 256, 64):
        r = script.ect_step(t, q)
        true = difference(true_net, r)
        errors = [size(difference(f, r) - true) for f in forms.values()]
        print(f"| 1/{q} | {size(true)} | {' | '.join(errors)} |")
    true = ends(true_net)
    moved = [size(ends(f) - true) for f in forms.values()] + [size(ends(true_net, 2 * cfg.nfe) - true)]
    print(f"\n| as a teacher: ends of {cfg.nfe} steps | moved by fp32 | bf16 | fp16 | by {2 * cfg.nfe} steps |")
    print("|---|---|---|---|---|")
    print(f"| {size(true)} | {' | '.join(moved)} |")


def growth(args, device):
    """Does a pair cost the same in large batches, in micro-batches, with two processes, late in a long run?"""
    print("| batch | us per pair of CMT, range over rounds |\n|---|---|")
    for batch in BATCHES:
        args.batch = batch
        p = Pairs("cmt", args, device)
        times = [t / p.pairs() * 1e6 for t in interleaved({"cmt": p.cycle}, args.rounds, device)["cmt"]]
        print(f"| {batch} | {statistics.median(times):.0f} ({min(times):.0f}-{max(times):.0f}) |", flush=True)
    print("\n| pretrain | steps | start-up, s | img/s, first quarter | last | MiB, first quarter | last |")
    print("|---" * 7 + "|")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    for name, steps, how, flags in (("one process", args.steps, [], []),
                                    ("one process, --batch_gpu 8", args.steps // 10, [], ["--batch_gpu", "8"]),
                                    ("two processes", args.steps // 10, torchrun, [])):
        with tempfile.TemporaryDirectory() as out:
            line = [sys.executable, *how, script.__file__, "--data", "digits", "--stage", "pretrain", "--out", out]
            start = time.time()
            subprocess.run([*line, "--steps", str(steps), "--save_every", "1000000", *flags],
                           check=True, stdout=subprocess.DEVNULL)
            took = time.time() - start
            with open(f"{out}/metrics.jsonl") as f:
                lines = [json.loads(line) for line in f]
        k, cells = max(1, len(lines) // 4), []
        for what in ("images_per_second", "memory"):
            seen = [m[what] for m in lines]
            cells += [f"{statistics.median(seen[:k]):.0f}", f"{statistics.median(seen[-k:]):.0f}"]
        print(f"| {name} | {steps:,} | {took - lines[-1]['seconds']:.1f} | {' | '.join(cells)} |", flush=True)


def chart(path, curves, title, x_label):
    """{name: [(x, y)]} -> a PNG of lines, y logarithmic with its ticks at 1, 2, 5 times powers of ten."""
    width, height, left, low = 900, 520, 70, 60
    colours = ["#1f5fbf", "#6fa8f5", "#c0392b", "#f0a090", "#2e8b57", "#8e44ad"]
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    xs, ys = zip(*(p for points in curves.values() for p in points))
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)]
    ticks = [y for y, above, below in zip(ticks[1:], ticks[2:], ticks) if above > min(ys) and below < max(ys)]
    bottom, top = math.log(ticks[0]), math.log(ticks[-1])

    def at(x, y):
        return (left + (width - left - 20) * x / max(xs),
                height - low - (height - low - 50) * (math.log(y) - bottom) / (top - bottom))
    for y in ticks:
        draw.line([at(0, y), at(max(xs), y)], "#dddddd")
        draw.text((left - 8, at(0, y)[1]), f"{y:g}", "black", font, anchor="rm")
    for k in range(6):
        x = max(xs) * k / 5
        draw.text((at(x, ticks[0])[0], height - low + 8), f"{x:,.0f}", "black", font, anchor="mt" if k < 5 else "rt")
    draw.text((width / 2, height - 22), x_label, "black", font, anchor="mt")
    draw.text((left, 14), title, "black", font)
    for k, ((name, points), colour) in enumerate(zip(curves.items(), colours[::1 + (len(curves) < 4)])):
        draw.line([at(*p) for p in points], colour, 3, joint="curve")
        draw.text((width - 30, 50 + 22 * k), name, colour, font, anchor="rt")
    image.save(path)


def curves(args, device):
    """The paper's Figure 1 on digits, and the gradient norm of every step: <out>/curve.png, <out>/norms.png.

    Both sides at their best in `claims`: pseudo-Huber losses, ECT annealed.
    """
    teacher = args.net or "out/digits/pretrain.pt"
    cfg = script.parse(["--data", "digits", "--stage", "eval"])
    features, save, kept = fid.DigitsNet().to(device), script.save, []
    reference = fid.measure(features, script.load_data(cfg).split(250), device)

    def keep(path, **state):
        save(path, **state)
        kept.append({**state, "ema": {k: v.clone() for k, v in state["ema"].items()}})
    scores, norms = {}, {}
    for name, calls in {"CMT + ECT": ["--stage mid --loss huber", "--stage post --huber 0.06"],
                        "ECT": ["--stage post --mid none --post annealed --decay linear --huber 0.06"]}.items():
        folder, seen, before = f"{args.out}/{name.replace(' ', '_')}", 0, 0
        flags = ["--data", "digits", "--teacher", teacher, "--out", folder]
        for call in calls:
            script.save, kept = keep, []
            script.main([*flags, *call.split(), "--save_every", "150", "--log_every", "1"])
            script.save = save
            for state in kept:
                net = script.build(cfg, state["model"], device, state["ema"])
                for kind in "12":
                    sampler = script.make_sampler(cfg, net, kind, device)
                    found = script.score(cfg, sampler, features, reference, 0, 1, device)
                    images = seen + state["step"] * state["cfg"]["batch"]
                    scores.setdefault(f"{name}, {kind} step", []).append((images, found[0].item()))
            seen += state["step"] * state["cfg"]["batch"]
        with open(f"{folder}/metrics.jsonl") as f:
            for m in map(json.loads, f):
                before += m["images"] - before if m["stage"] == "mid" else 0
                norms.setdefault(name, []).append((m["images"] + before * (m["stage"] == "post"), m["grad"]))
    chart(f"{args.out}/curve.png", scores, "FD-digits against training images", "images (pairs) seen")
    chart(f"{args.out}/norms.png", norms, "gradient norm of every step", "images (pairs) seen")
    for name, points in scores.items():
        print(f"{name}: " + ", ".join(f"{x:,} {y:.2f}" for x, y in points))


CLAIMS = {  # row: (script, row whose teacher and, with "mid", mid-training it goes on from, a list of calls)
    "CMT + ECT": ("cmt_cifar", "", [""]),
    "CMT alone, all images": ("cmt_cifar", "CMT + ECT", ["--stage vgg", "--stage mid --steps 1500"]),
    "CMT short + ECT": ("cmt_cifar", "CMT + ECT", [
        "--stage vgg", "--stage mid --steps 450", "--stage post --steps 1050"]),
    "CMT long + ECT": ("cmt_cifar", "CMT + ECT", [
        "--stage vgg", "--stage mid --steps 1200", "--stage post --steps 300"]),
    "CMT + ECD": ("cmt_cifar", "CMT + ECT mid", ["--stage post --post ecd"]),
    "ECT": ("cmt_cifar", "CMT + ECT", ["--mid none --steps 1500 --lr 1e-3"]),
    "ECT, no warm-up": ("cmt_cifar", "CMT + ECT", ["--mid none --steps 1500 --lr 1e-3 --warmup 0"]),
    "CMT + ECT, no warm-up": ("cmt_cifar", "CMT + ECT mid", ["--stage post --warmup 0"]),
    "ECT, annealed": ("cmt_cifar", "CMT + ECT", ["--mid none --post annealed --decay linear"]),
    "ECT, annealed, pseudo-Huber": ("cmt_cifar", "CMT + ECT", [
        "--mid none --post annealed --decay linear --huber 0.06"]),
    "ECT, pseudo-Huber": ("cmt_cifar", "CMT + ECT", ["--mid none --steps 1500 --lr 1e-3 --huber 0.06"]),
    "CMT by pseudo-Huber + ECT, pseudo-Huber": ("cmt_cifar", "CMT by pseudo-Huber + ECT mid", [
        "--stage post --huber 0.06"]),
    "ECT, annealed, random start": ("cmt_cifar", "CMT + ECT", [
        "--mid none --init random --post annealed --decay linear"]),
    "KD + ECT": ("cmt_cifar", "CMT + ECT", ["--mid kd"]),
    "KD + ECT, equal time": ("cmt_cifar", "CMT + ECT", [
        "--stage vgg", "--stage mid --mid kd --steps 206", "--stage post"]),
    "Slow CMT + ECT": ("cmt_cifar", "CMT + ECT", ["--mid slow"]),
    "Slow CMT + ECT, equal time": ("cmt_cifar", "CMT + ECT", [
        "--stage vgg", "--stage mid --mid slow --steps 310", "--stage post"]),
    "CMT by L2 + ECT": ("cmt_cifar", "CMT + ECT", ["--loss l2"]),
    "CMT by pseudo-Huber + ECT": ("cmt_cifar", "CMT + ECT", ["--loss huber"]),
    "CMT in bf16 + ECT": ("cmt_cifar", "CMT + ECT", ["--stage vgg", "--stage mid --precision bf16", "--stage post"]),
    "CMT from 4 steps + ECT": ("cmt_cifar", "CMT + ECT", ["--nfe 4"]),
    "CMT from 8 steps + ECT": ("cmt_cifar", "CMT + ECT", ["--nfe 8"]),
    "CMT from 32 steps + ECT": ("cmt_cifar", "CMT + ECT", ["--nfe 32"]),
    "CMT + ECT, step 1/64": ("cmt_cifar", "CMT + ECT mid", ["--stage post --q 64"]),
    "CMT + ECT, step 1/4096": ("cmt_cifar", "CMT + ECT mid", ["--stage post --q 4096"]),
    "CMT by pseudo-Huber + ECT, step 1/4096": ("cmt_cifar", "CMT by pseudo-Huber + ECT mid", [
        "--stage post --q 4096"]),
    "ECT, step 1/64": ("cmt_cifar", "CMT + ECT", ["--mid none --steps 1500 --lr 1e-3 --q 64"]),
    "ECT, step 1/4096": ("cmt_cifar", "CMT + ECT", ["--mid none --steps 1500 --lr 1e-3 --q 4096"]),
    "CMT + ECT, pseudo-Huber, a quarter": ("cmt_cifar", "CMT + ECT", [
        "--stage mid --loss huber --steps 225", "--stage post --steps 150 --huber 0.06"]),
    "CMT + ECT, pseudo-Huber, half": ("cmt_cifar", "CMT + ECT", [
        "--stage mid --loss huber --steps 450", "--stage post --steps 300 --huber 0.06"]),
    "CMT + ECT, pseudo-Huber, twice": ("cmt_cifar", "CMT + ECT", [
        "--stage mid --loss huber --steps 1800", "--stage post --steps 1200 --huber 0.06"]),
    "ECT, a quarter": ("cmt_cifar", "CMT + ECT", ["--mid none --steps 375 --lr 1e-3"]),
    "ECT, half": ("cmt_cifar", "CMT + ECT", ["--mid none --steps 750 --lr 1e-3"]),
    "ECT, annealed, pseudo-Huber, a quarter": ("cmt_cifar", "CMT + ECT", [
        "--mid none --post annealed --decay linear --huber 0.06 --steps 375 --double 47"]),
    "ECT, annealed, pseudo-Huber, half": ("cmt_cifar", "CMT + ECT", [
        "--mid none --post annealed --decay linear --huber 0.06 --steps 750 --double 94"]),
    "ECT, annealed, pseudo-Huber, twice": ("cmt_cifar", "CMT + ECT", [
        "--mid none --post annealed --decay linear --huber 0.06 --steps 3000 --double 375"]),
    "EDM2: CMT + ECT": ("cmt_imagenet", "", [""]),
    "EDM2: ECT": ("cmt_imagenet", "EDM2: CMT + ECT", ["--mid none --steps 1500"]),
    "EDM2: ECT tuned": ("cmt_imagenet", "EDM2: CMT + ECT", ["--mid none --steps 1500 --lr 2e-2 --q 64"]),
    "EDM2: CMT in bf16 + ECT": ("cmt_imagenet", "EDM2: CMT + ECT", [
        "--stage vgg", "--stage mid --precision bf16", "--stage post"]),
    "EDM2: CMT + ECT in fp16": ("cmt_imagenet", "EDM2: CMT + ECT mid", ["--stage post --precision fp16"]),
    "Mean Flow: CMT + Mean Flow": ("mf_imagenet256", "", [""]),
    "Mean Flow from scratch": ("mf_imagenet256", "Mean Flow: CMT + Mean Flow", ["--mid none --post vanilla"]),
    "Mean Flow: CMT in bf16 + Mean Flow": ("mf_imagenet256", "Mean Flow: CMT + Mean Flow", [
        "--stage mid --precision bf16", "--stage post"]),
    "Text: CMT + Mean Flow": ("t2i_coco", "", [""]),
    "Text: CMT in bf16 + Mean Flow": ("t2i_coco", "Text: CMT + Mean Flow", [
        "--stage mid --precision bf16", "--stage post"]),
    "Text: Mean Flow from SiT": ("t2i_coco", "Text: CMT + Mean Flow", [
        "--mid none --post vanilla --steps 1500"]),
}


def claim(row, seed, out):
    """Run one row with one seed, unless its results are there: {"net steps": score}, seconds of mid + post."""
    name, base, calls = CLAIMS[row]
    folder, source = (f"{out}/{seed}/{r.removesuffix(' mid').replace(' ', '_')}" for r in (row, base))
    os.makedirs(folder, exist_ok=True)
    flags, first = ["--data", "digits", "--seed", str(seed), "--out", folder], base
    while first and CLAIMS[first.removesuffix(" mid")][1]:
        first = CLAIMS[first.removesuffix(" mid")][1]     # whose teacher they all share
    if base:
        flags += ["--teacher", f"{out}/{seed}/{first.removesuffix(' mid').replace(' ', '_')}/pretrain.pt"]
    if base.endswith(" mid"):
        shutil.copy(f"{source}/mid.pt", folder)
    finished = os.path.exists(f"{folder}/results.md")
    for call in [] if finished else calls if "--stage" not in calls[-1] else [*calls, "--stage eval"]:
        line = [sys.executable, f"train_{name}.py", *flags, *call.split()]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    with open(f"{folder}/metrics.jsonl") as f:
        lines = [json.loads(line) for line in f]
    scored = [m for m in lines if m["stage"] == "eval"]
    scores = {f"{m['net']} {m['metric'].split('-')[0]}": m["values"][0] for m in scored}
    return scores, sum({m["stage"]: m["seconds"] for m in lines if m["stage"] in ("mid", "post")}.values())


def claims(args, device):
    """Every row of CLAIMS with every seed, one run after the other; what is finished is not run again."""
    seeds = [int(s) for s in args.seeds.split(",")]
    print("| run | " + " | ".join(f"seed {s}" for s in seeds) + " | median | seconds |")
    print("|---" * (len(seeds) + 3) + "|")
    for row in CLAIMS if not args.methods else args.methods.split(";"):
        runs = [claim(row, seed, args.out) for seed in seeds]
        last = "post" if "post 1" in runs[0][0] else "mid"
        pairs = [[scores[f"{last} {k}"] for scores, _ in runs] for k in (1, 2)]
        cells = [f"{a:.2f} / {b:.2f}" for a, b in zip(*pairs)]
        middle = " / ".join(f"{statistics.median(p):.2f}" for p in pairs)
        seconds = statistics.median(t for _, t in runs)
        print(f"| {row} | {' | '.join(cells)} | {middle} | {seconds:.0f} |", flush=True)


class PhotoNet(torch.nn.Module):
    """What scores photos: uint8 (B, 3, 16, 16) -> features (B, 128) of a small VGG trained on labels, here and now."""
    dim = 128

    def __init__(self, images, labels, path, steps=2000, batch=128):
        super().__init__()
        self.vgg = nets.VGG(3, ((32, 32), (64, 64), (128, 128)))
        if os.path.exists(path):
            self.vgg.load_state_dict(torch.load(path, weights_only=True))
        else:
            known, opt = len(images) * 9 // 10, torch.optim.Adam(self.vgg.parameters(), lr=2e-3)
            torch.manual_seed(0)
            for step in range(steps):
                opt.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
                i = torch.randint(known, (batch,))
                x = images[i] if step % 2 else images[i].flip(3)
                loss = torch.nn.functional.cross_entropy(self.vgg.logits(script.to_float(x, "cpu")), labels[i])
                opt.zero_grad()
                loss.backward()
                opt.step()
            torch.save(self.vgg.state_dict(), path)
        with torch.no_grad():
            parts = zip(images.split(500), labels.split(500))
            right = [self.vgg.logits(script.to_float(x, "cpu")).argmax(1) == y for x, y in parts]
        held = torch.cat(right)[len(images) * 9 // 10:].float().mean()
        self.protocol = f"FD-photos: {held:.1%} of a tenth never trained on are read right"

    @torch.no_grad()
    def forward(self, images):
        return self.vgg.maps(script.to_float(images, "cpu"))[-1].mean((2, 3))


PHOTOS = {  # row: calls (stage, flags), laid over the settings of digits; the last net is scored in 1 and 2 steps
    "teacher": [("pretrain", "--steps 3000")],
    "after CMT": [("mid", "--loss huber")],
    "CMT + ECT": [("mid", "--loss huber"), ("post", "")],
    "CMT + ECT, step 1/4096": [("mid", "--loss huber"), ("post", "--q 4096")],
    "ECT": [("post", "--mid none --steps 1500 --lr 1e-3")],
    "ECT, step 1/4096": [("post", "--mid none --steps 1500 --lr 1e-3 --q 4096")],
    "ECT, step 1/64": [("post", "--mid none --steps 1500 --lr 1e-3 --q 64")],
    "ECT, annealed": [("post", "--mid none --post annealed --decay linear")],
}
SHARED = "steps batch lr decay warmup ema_beta q double dropout threads precision log_every save_every".split()


def photos(args, device):
    """CMT + ECT beside ECT on 16x16 photos (--data: an EDM zip with labels), the settings of digits, every seed."""
    os.makedirs(args.out, exist_ok=True)
    small = f"{args.out}/photos.npz"
    if not os.path.exists(small):
        with zipfile.ZipFile(args.data) as z:
            listed = dict(json.loads(z.read("dataset.json"))["labels"])
        names, pixels = fid.image_source(args.data)[0], script.read_own(args.data, 16)
        np.savez(small, images=pixels.permute(0, 2, 3, 1).numpy(), labels=[listed[n] for n in names])
    with np.load(small) as f:
        images, labels = torch.from_numpy(f["images"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(f["labels"])
    features = PhotoNet(images, labels, f"{args.out}/features.pt")
    reference = fid.measure(features, images.split(500))
    print(f"{len(images):,} images; {features.protocol}\n| run | seed | FD-photos, 1 / 2 steps | seconds |\n|---|---|---|---|")
    for seed in args.seeds.split(","):
        for row in args.methods.split(";") if args.methods else PHOTOS:
            folder = f"{args.out}/{seed}/{row.replace(' ', '_').replace('/', '_')}"
            own = ["--data", small, "--seed", seed, "--samples", str(args.samples), "--out", folder]
            if row != "teacher":
                own += ["--teacher", f"{args.out}/{seed}/teacher/pretrain.pt"]
            if row.startswith("CMT") and not os.path.exists(f"{folder}/mid.pt"):
                os.makedirs(folder, exist_ok=True)        # mid-training is that of the row above
                shutil.copy(f"{args.out}/{seed}/after_CMT/mid.pt", folder)
            for stage, flags in PHOTOS[row]:
                digits = script.parse(["--data", "digits", "--stage", stage, *flags.split()])
                same = [word for name in SHARED for word in (f"--{name}", str(getattr(digits, name)))]
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    script.main([*own, "--stage", stage, *same, *flags.split()])
            state, cfg = torch.load(f"{folder}/{stage}.pt", weights_only=True), script.parse(own)
            net, found = script.build(cfg, state["model"], device, state["ema"]), []
            for kind in ["teacher"] if row == "teacher" else "12":
                sampler = script.make_sampler(cfg, net, kind, device)
                found.append(script.score(cfg, sampler, features, reference, 0, 1, device)[0].item())
                script.save_grid(sampler(range(64)), f"{folder}/samples_{kind}.png", columns=16)
            text = " / ".join(f"{x:.2f}" for x in found)
            print(f"| {row} | {seed} | {text} | {state['seconds']:.0f} |", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["pairs", "weights", "mf", "precision", "growth", "curves", "claims", "photos"])
    p.add_argument("--data", default="digits", help=f"{', '.join(MODELS)} (edm2: digits); photos: an EDM zip with labels")
    p.add_argument("--methods", default="", help="pairs: between commas; claims: rows, between semicolons")
    p.add_argument("--net", default="", help="precision: checkpoint; curves: the teacher")
    p.add_argument("--steps", type=int, default=10_000, help="growth: of the long run")
    p.add_argument("--seeds", default="0,1,2", help="claims: of the whole pipeline")
    p.add_argument("--out", default="out/claims", help="curves, claims: folder of the runs")
    p.add_argument("--samples", type=int, default=5_000, help="photos: images per score")
    p.add_argument("--batch", type=int, default=0, help="0 = the script's own; weights: 1")
    p.add_argument("--batch_gpu", type=int, default=0, help="pairs: of a forward pass; 0 = the batch")
    p.add_argument("--trajectories", type=int, default=0, help="pairs: per solve; 0 = the script's own")
    p.add_argument("--channels", type=int, default=128, help="weights: model_channels of the EDM2")
    p.add_argument("--size", default="4x256x8", help="mf: the DiT, PATCHxWIDTHxDEPTH or a row of nets.SIZES")
    p.add_argument("--loss", default="", help="of mid-training; default: the script's own")
    p.add_argument("--precision", default="fp32", help="pairs: of student and teacher")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    {f.__name__: f for f in (pairs, weights, mf, precision, growth, curves, claims, photos)}[args.what](args, device)


if __name__ == "__main__":
    main()
