"""train_mf_imagenet256.py: the Jacobian product, the losses against closed forms, pairs, latents, stages, faults."""
import functools
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import conftest
from conftest import Pretrained, alone_is_shown, code, fork, frozen_calls, wait, weights
from PIL import Image

import fid
import nets
import solvers
import train_cmt_cifar as cifar
import train_mf_imagenet256 as script
import train_t2i_coco as texts

TINY = ("--data digits --samples 16 --trajectories 8 --batch 16 --log_every 1 --nfe 3 --omega 0.4 --kappa 0.5 "
        "--guide_to 0.9 --weak 4x32x1 --size 4x64x1").split()


@pytest.fixture(autouse=True)
def fresh(here, monkeypatch):
    monkeypatch.setattr(script, "STOP", [])


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """One whole run of a few steps: pretrain, mid, post, eval."""
    out = tmp_path_factory.mktemp("mf")
    script.main([*TINY, "--out", str(out), "--steps", "3", "--labels", "both"])
    return out


def cfg(*argv):
    return script.parse([str(a) for a in ("--data", "digits", *argv)])


def tiny(seed=0, **kwargs):
    """A small DiT in float64 whose every weight acts."""
    torch.manual_seed(seed)
    net = nets.DiT(**{**dict(input_size=4, in_channels=2, patch_size=2, hidden_size=16, depth=2, num_heads=2,
                             num_classes=5), **kwargs}).double()
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p) * p.requires_grad
    return net


def batch(n=16, seed=0, ratio=0.25, classes=5):
    """z, v, t, r, y of float64 samples, some of the null class, a quarter with r < t."""
    g = torch.Generator().manual_seed(seed)
    z, v = torch.randn((2, n, 2, 4, 4), generator=g, dtype=torch.float64)
    t, r = (a.double() for a in script.draw_times(n, g, ratio, -0.4, 1.0))
    return z, v, t, r, torch.arange(n) % (classes + 1)


def flow(net, slope=None):
    """The script's Flow of a net in float64; slope: instead of the exact one."""
    made = script.flow_of(cfg(), net, torch.tensor(5))
    return made._replace(slope=slope) if slope else made


def run(*argv):
    script.main([str(a) for a in argv])


GAPS = {f"mse_gap{k}" for k in range(1, 5)}


# ---- the Jacobian product ------------------------------------------------------------------------
def test_derivative_equals_finite_differences_and_float64():
    """Along (v, 1, 0) of (z, t, r): any other direction fails by far."""
    net, (z, v, t, r, y) = tiny(), batch(ratio=1.0)
    exact, e = nets.derivative(net, z, t, r, y, v), 1e-5
    with torch.no_grad():
        step = lambda a, b, c: (net(z + a * v, t + b, r + c, y) - net(z - a * v, t - b, r - c, y)) / (2 * e)    # noqa: E731
        assert torch.allclose(exact, step(e, e, 0), rtol=1e-6, atol=1e-8)
        for wrong in ((e, 0, 0), (e, 0, e), (e, e, e), (0, e, 0)):
            assert (exact - step(*wrong)).abs().max() > 1e-3
    single = nets.derivative(net.float(), *(a.float() for a in (z, t, r)), y, v.float())
    assert (single - exact).norm() < 1e-5 * exact.norm() and not exact.requires_grad


def by_the_book(net, z, v, t, r, y, c):
    """Mean Flow's loss with every forward and the product on every sample, as the paper writes it."""
    null = torch.full_like(y, 5)
    with torch.no_grad():
        inside = (t >= c.guide_from) & (t <= c.guide_to) & (y != 5)
        led = c.omega * v + c.kappa * net(z, t, t, y) + (1 - c.omega - c.kappa) * net(z, t, t, null)
        v = torch.where(inside.view(-1, 1, 1, 1), led, v)
    u, dudt = torch.func.jvp(lambda z, t, r: net(z, t, r, y), (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
    error = ((u - (v - (t - r).view(-1, 1, 1, 1) * dudt).detach()) ** 2).sum((1, 2, 3))
    return (error / (error.detach() + script.WEIGHT_C) ** c.power).mean(), error


@pytest.mark.parametrize("omega, kappa, to", [(0.2, 0.92, 0.75), (1.0, 0.5, 1.0), (3.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.4, 0.6, 0.6)])
def test_product_on_some_samples_is_the_loss_and_gradient_of_the_product_on_all(omega, kappa, to):
    """And guidance asks the network only where it counts: half of the naive calls, and no product where r = t."""
    net, (z, v, t, r, y) = tiny(), batch()
    c, asked, products = cfg("--omega", omega, "--kappa", kappa, "--guide_to", to, "--power", 0.7), [], []

    def f(*a, **k):
        asked.append(len(a[0]))
        return net(*a, **k)

    def slope(*a):
        products.append(len(a[0]))
        return nets.derivative(net, *a)
    led, far = script.is_guided(c, 0, t, y, 5), r < t
    ours, raw = script.loss_mf(flow(f, slope), z, v, t, r, y, led, c)
    grads = torch.autograd.grad(ours, [p for p in net.parameters() if p.requires_grad])
    book, error = by_the_book(net, z, v, t, r, y, c)
    expected = torch.autograd.grad(book, [p for p in net.parameters() if p.requires_grad])
    assert torch.allclose(ours, book, rtol=1e-12) and torch.allclose(raw, error, rtol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(grads, expected))
    calls = (abs(1 - omega - kappa) > 1e-9) * led.sum() + (kappa > 0) * (led & far).sum()
    assert products == [4] and sum(asked) == 16 + calls and (led.sum() > 0) == (omega != 1 or kappa > 0)


def test_times_are_the_larger_and_smaller_of_two_draws():
    t, r = script.draw_times(100_000, torch.Generator().manual_seed(0), 0.25, -0.4, 1.0)
    assert (r <= t).all() and (r < t).sum() == 25_000 and 0 < r.min() and t.max() < 1
    assert all((r < t)[k:k + 4].sum() == 1 for k in range(0, 96, 4))                  # every micro-batch has its share
    assert t.mean() == pytest.approx(0.535, abs=0.003) and (t > 0.95).float().mean() < 2e-3
    t, r = script.draw_times(10, torch.Generator().manual_seed(0), 0.0, -0.4, 1.0)
    assert torch.equal(t, r)


# ---- an analytic flow ----------------------------------------------------------------------------
class Gaussian:
    """Data N(0, s^2): v(z, t) = z s'(t)/s(t) with s(t)^2 = (1-t)^2 s^2 + t^2, so z_r = z_t s(r)/s(t), as a net."""
    num_classes, grid, patch_size, s = 5, 2, 2, 0.5

    def __init__(self, two_clocks=True):
        self.r_embedder = two_clocks or None

    def spread(self, t):
        return ((1 - t) ** 2 * self.s**2 + t**2).sqrt().view(-1, 1, 1, 1)

    def __call__(self, z, t, r=None, y=None, repa=False):
        t = t.expand(len(z))
        v = z * ((t - (1 - t) * self.s**2) / ((1 - t) ** 2 * self.s**2 + t**2)).view(-1, 1, 1, 1)
        if self.r_embedder is None or r is None:
            return v
        h = (t - r).view(-1, 1, 1, 1)
        return torch.where(h > 0, z * (1 - self.spread(r) / self.spread(t)) / h.where(h > 0, 1.0), v)


def test_exact_flow_has_no_loss_and_u_at_r_equal_t_is_v():
    """Mean Flow's identity with the exact velocity: the loss of the exact u is 0, for r = t and r < t."""
    net, (z, _, t, r, y) = Gaussian(), batch(ratio=0.5)
    error = script.loss_mf(flow(net), z, net(z, t), t, r, y, y > 9, cfg())[1]
    assert error.max() < 1e-20
    assert torch.equal(net(z, t, t), net(z, t))
    dit, zeros = tiny(), torch.zeros(16, 2, 4, 4).double()
    with torch.no_grad():                               # r = t: the target is v, whatever the net
        raw = script.loss_mf(flow(dit, "never asked"), z, zeros, t, t, y, y > 9, cfg())[1]
        assert torch.allclose(raw, dit(z, t, t, y).square().sum((1, 2, 3)))


@pytest.mark.parametrize("nodes, pairs", [(8, 28), (9, 36)])
def test_pairs_of_an_analytic_teacher_are_the_closed_form(nodes, pairs):
    """States, times and targets travel together: every target is the closed form at its own z, t, r."""
    c = cfg("--stage", "mid", "--nodes", nodes, "--trajectories", 5)
    z, t, r, y, target = script.teacher_pairs(c, Gaussian(), (2, 4, 4), torch.Generator().manual_seed(0))
    assert len(z) == 5 * pairs == 5 * script.solve_size(c)[1] and (r < t).all()
    assert ((t == 1) & (r == 0)).sum() == 5 and (r == 0).sum() == 5 * (nodes - 1)
    assert torch.allclose(target, Gaussian()(z, t, r), atol=2e-6)
    assert torch.allclose(t.unique(), torch.linspace(0, 1, nodes)[1:])
    first, count = z[t == 1].unique(dim=0, return_counts=True)                    # the same five noises in every pair from t = 1
    assert count.tolist() == [nodes - 1] * 5 and first.std() == pytest.approx(1, abs=0.2) and not torch.equal(t, t.sort(descending=True)[0])
    loss, raw = script.loss_cmt_mf(Gaussian(), z, t, r, y, target)
    assert loss < 1e-11 and raw.shape == t.shape
    loss, raw = script.loss_cmt_mf(lambda z, *a: z * 0, z, t, r, y, target)
    assert loss == pytest.approx(target.square().mean()) and loss == pytest.approx(raw.mean() / 32)


def test_pairs_of_a_flow_matching_teacher_join_the_states_of_its_solver(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, **k: torch.arange(n))           # as pairs_of_states has them
    c = cfg("--stage", "mid", "--trajectories", 3)
    z, t, r, y, target = script.teacher_pairs(c, Gaussian(False), (2, 4, 4), torch.Generator().manual_seed(0))
    times = torch.linspace(1, 0, 8)
    states = solvers.flow_heun(Gaussian(False), z[:3], times.double())
    place = lambda x: (x[:, None] - times).abs().argmin(1)                            # noqa: E731
    own = torch.arange(len(z)) % 3
    end, wide = states[place(r), own], (t - r).view(-1, 1, 1, 1)
    assert torch.allclose(z, states[place(t), own], atol=1e-6) and torch.allclose(target, (z - end) / wide, atol=2e-5)


def test_labels_of_pairs_are_dropped_for_teacher_and_student_alike(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, **k: torch.arange(n))
    seen = []

    class Teacher(Gaussian):
        def __call__(self, z, t, r=None, y=None, repa=False):
            seen.append(y)
            return super().__call__(z, t, r)
    c = cfg("--stage", "mid", "--trajectories", 400)
    y = script.teacher_pairs(c, Teacher(), (2, 4, 4), torch.Generator().manual_seed(0))[3]
    assert all(torch.equal(s, y[:400]) for s in seen) and torch.equal(y, y[:400].repeat(28))
    assert 0.06 < (y == 5).float().mean() < 0.14 and set(y.tolist()) == set(range(6))


def test_flow_matching_teacher_learns_the_velocity_alone(monkeypatch):
    """One clock: r = t for every sample, whatever --ratio says, t uniform, squared error; SiT's training."""
    seen, real = [], script.loss_mf
    monkeypatch.setattr(script, "loss_mf", lambda *a: seen.append(a) or real(*a))
    run(*TINY, "--stage", "pretrain", "--pretrain", "fm", "--ratio", 0.5, "--batch", 64, "--steps", 4, "--out", "fm")
    t, r = (torch.cat([a[k] for a in seen]) for k in (3, 4))
    assert torch.equal(t, r) and t.mean() == pytest.approx(0.5, abs=0.06) and (t > 0.95).sum() > 3
    f, z, v, t, r, y, *_ = seen[-1]
    assert torch.allclose(real(*seen[-1])[0], (f.u(z, t, r, y) - v).square().sum((1, 2, 3)).mean())
    assert cfg("--stage", "pretrain").power == 1.0


def test_flow_matching_teacher_is_guided_inside_the_interval():
    """By hand, in the usual convention: v_null + s (v_y - v_null), s = omega / (1 - kappa), at both ends of a step."""
    net, (z, _, _, _, y) = tiny(average_velocity=False), batch()
    c, null = cfg("--omega", 1.0, "--kappa", 0.5, "--guide_from", 0.3, "--guide_to", 0.8), torch.full((16,), 5)

    def v(z, level, scale):
        t = torch.full((16,), level).double()
        plain, own = net(z, t, y=null), net(z, t, y=y)
        return plain + scale * (own - plain)
    with torch.no_grad():
        for first, second, *scales in ((0.5, 0.4, 2, 2), (0.95, 0.9, 1, 1), (0.2, 0.1, 1, 1), (0.9, 0.8, 1, 2), (0.3, 0.2, 2, 1)):
            states = script.rollout(c, net, z, y, torch.tensor([first, second], dtype=torch.float64))
            start = v(z, first, scales[0])
            end = v(z - (first - second) * start, second, scales[1])
            assert torch.equal(states[0], z) and torch.allclose(states[1], z - (first - second) * (start + end) / 2)


def test_the_teachers_velocity_is_the_target_and_the_tangent(monkeypatch):
    """--post teacher: flow matching guided by hand, in float64; a Mean Flow net's own u(z, t, t); then nothing is guided twice."""
    (z, _, t, _, y), c = batch(), cfg("--omega", 1.0, "--kappa", 0.5, "--guide_to", 0.6)
    led, one, two = script.is_guided(c, 0, t, y, 5), tiny(average_velocity=False), tiny()
    with torch.no_grad():
        own, plain = one(z, t, y=y), one(z, t, y=torch.full_like(y, 5))
        scale = torch.where((t <= 0.6) & (y != 5), 2.0, 1.0).view(-1, 1, 1, 1)
        assert torch.allclose(script.teacher_velocity(c, one, z, t, y, led), plain + scale * (own - plain), rtol=1e-12)
        assert torch.equal(script.teacher_velocity(c, two, z, t, y, led), two(z, t, t, y)) and led.any() and not led.all()
    seen, given, real, real_v = [], [], script.loss_mf, script.teacher_velocity
    monkeypatch.setattr(script, "teacher_velocity", lambda *a: given.append(real_v(*a)) or given[-1])
    monkeypatch.setattr(script, "loss_mf", lambda *a: seen.append(a) or real(*a))
    flags = [*TINY, "--out", "led", "--mid", "none", "--post", "teacher", "--steps", 2, "--batch_gpu", 8]
    run(*flags, "--stage", "pretrain", "--init", "teacher")
    run(*flags, "--stage", "post")
    v, guided, a = *(torch.cat([a[k] for a in seen[-4:]]) for k in (2, 6)), seen[-1][7]
    assert torch.equal(v, torch.cat(given)) and len(given) == 4 and not guided.any() and (a.power, a.ratio) == (0, 0.75)


# ---- weights -------------------------------------------------------------------------------------
def official_sit(net):
    """The state dict of an official SiT that means the same as `net`: t = 1 is data, extra output channels."""
    state, channels = net.state_dict(), net.x_embedder.proj.in_channels
    for k in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = -state[k].unflatten(0, (-1, channels))
        state[k] = torch.stack([rows, torch.randn_like(rows)], 1).flatten(0, 2)
    cos, sin = state["t_embedder.mlp.0.weight"].chunk(2, 1)
    w = nets.frequencies(cos)
    state["t_embedder.mlp.0.weight"] = torch.cat([cos * w.cos() + sin * w.sin(), cos * w.sin() - sin * w.cos()], 1)
    return state


def test_an_official_sit_starts_the_student_exactly(monkeypatch):
    """In float64, from the file through --init: v_ours(z, t) = -v_sit(z, 1 - t), for every r."""
    one = tiny(average_velocity=False, num_heads=1)
    torch.save(official_sit(one), "sit.pt")
    real = nets.DiT.__init__
    init = functools.wraps(real)(lambda self, *a, **k: (real(self, *a, **k), self.double())[0])
    monkeypatch.setattr(nets.DiT, "__init__", init)
    for flags in (["--init", "teacher", "--teacher", "sit.pt"], ["--init", "sit.pt"]):
        c = cfg("--stage", "post", "--mid", "none", "--size", "2x16x2x1", *flags)
        state, model = script.read_net(c, "sit.pt")
        net = script.build(c, {**model, "average_velocity": True}, *script.first_weights(c, model), train=True)
        z, _, t, r, y = batch(ratio=1.0)
        assert (net(z, t, r, y) - one(z, t, None, y)).abs().max() < 1e-12
    assert nets.dit_shape(state, "")["average_velocity"] is False
    big = {k: torch.empty(s) for k, s in (("x_embedder.proj.weight", (1152, 4, 2, 2)), ("pos_embed", (1, 256, 1152)),
           ("blocks.27.attn.qkv.weight", (3456, 1152)), ("h_embedder.mlp.0.weight", (1152, 256)),
           ("y_embedder.embedding_table.weight", (1001, 1152)))}
    full = {**nets.SIZES["dit-xl/2"], "input_size": 32, "in_channels": 4, "num_classes": 1000, "average_velocity": True}
    assert nets.dit_shape(big, "") == full
    with pytest.raises(nets.WeightsError, match="x.pt: no DiT"):
        nets.dit_shape({"w": torch.zeros(1)}, "x.pt")


def test_a_net_of_another_kind_is_refused(capsys):
    """A DDPM++ of another script as --teacher: one line, exit code 3."""
    model = dict(img_resolution=8, img_channels=1, model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    state = nets.EDMPrecond(**model).state_dict()
    torch.save(dict(net=state, ema=state, model=model, cfg=dict(stage="pretrain")), "ddpm.pt")
    for flags in (["--stage", "mid", "--teacher", "ddpm.pt"], ["--stage", "eval", "--init", "ddpm.pt"]):
        exit_code, err = code(["--data", "digits", *flags], capsys, main=script.main)
        assert exit_code == 3 and "ddpm.pt: no DiT" in err and len(err.strip().splitlines()) == 1, err


def test_stages_with_different_guidance_are_refused(road, tmp_path, capsys):
    """Scale and interval are in the checkpoints; another (omega, kappa) of the same scale is the same flow."""
    base = [*TINY, "--steps", "1", "--out", tmp_path, "--teacher", road / "pretrain.pt"]
    for flags, text in ((["--omega", "0.5"], "guidance 0.8 for t in [0.0, 0.9], this stage has 1 in"),
                        (["--guide_to", "0.8"], "this stage has 0.8 in [0.0, 0.8]")):
        exit_code, err = code([*base, "--stage", "mid", *flags], capsys, main=script.main)
        assert exit_code == 2 and text in err and len(err.strip().splitlines()) == 1, err
    nets.save_checkpoint("t.safetensors", **nets.load_checkpoint(str(road / "pretrain.pt")))        # exported, it says the same
    exit_code, err = code([*base, "--stage", "mid", "--omega", "0.5", "--teacher", "t.safetensors"], capsys, main=script.main)
    assert exit_code == 2 and "t.safetensors was trained with guidance 0.8" in err
    run(*base, "--stage", "mid", "--omega", "0.6", "--kappa", "0.25")
    exit_code, err = code([*base, "--stage", "post", "--kappa", "0.6"], capsys, main=script.main)
    assert exit_code == 2 and "mid.pt was trained with guidance 0.8" in err
    exit_code, err = code([*base, "--stage", "post", "--mid", "none", "--init", "teacher", "--kappa", "0.6", "--out", tmp_path / "x"],
                          capsys, main=script.main)
    assert exit_code == 2 and "pretrain.pt was trained with guidance" in err
    exit_code, err = code([*TINY, "--steps", 3, "--out", road, "--stage", "eval", "--kappa", "0.6"], capsys, main=script.main)
    assert exit_code == 2 and "was trained with guidance 0.8" in err                           # no table with a false note
    run(*TINY, "--steps", 1, "--out", "fm", "--stage", "pretrain", "--pretrain", "fm")         # guided when rolled out
    run(*TINY, "--steps", 1, "--out", "fm", "--stage", "mid", "--kappa", "0.6")


# ---- the road ------------------------------------------------------------------------------------
def test_all_stages_leave_checkpoints_pictures_and_a_table(road):
    for stage in ("pretrain", "mid", "post"):
        c = torch.load(road / f"{stage}.pt", weights_only=True)
        assert c["step"] == 3 and all(torch.isfinite(v).all() for v in c["ema"].values())
    table = (road / "results.md").read_text()
    for name in ("teacher", "mid", "post"):
        for labels in ("random", "balanced"):
            assert re.search(rf"\| {name}, {labels} labels \| 3 \| 48 \| \d+ \|( \d+\.\d\d \|){{3}}", table), table
    assert "decoder none" in table and "guidance 0.8" in table and "3-step FD-digits" in table
    assert "FID" not in table.replace("fid", "")
    for name in ("samples_teacher_3step", "samples_mid_1step", "samples_post_2step", "stages", "trajectory", "curve", "previews/mid_0000003"):
        assert Image.open(road / f"{name}.png").size[0] >= 900
    lines = [json.loads(line) for line in (road / "metrics.jsonl").read_text().splitlines()]
    post = [m for m in lines if m["stage"] == "post"]
    assert 0.9 < post[0]["loss"] <= 1 and GAPS & set(post[0])
    assert all(0.2 < m["mse_same"] < 2 for m in post)                                 # the raw error: the loss is always near 1
    mid = [m for m in lines if m["stage"] == "mid"]
    assert all(np.isfinite([m[k] for k in GAPS]).all() and "mse_same" not in m for m in mid)     # no such pair: nothing, not NaN
    assert "nan" not in (road / "log.txt").read_text().lower() + (road / "metrics.jsonl").read_text().lower()


@pytest.mark.parametrize("flags", ["--mid none --batch_gpu 4 --precision bf16", "--mid none --post vanilla",
                                   "--mid none --init teacher --unguided 1 --size 4x32x1", "--nodes 9 --trajectories 16",
                                   "--mid none --precision tf32 --ratio 1", "--mid none --precision fp16", "--nodes 5 --teacher fm"])
def test_baselines_and_variants_train(road, tmp_path, flags):
    stage, teacher = "post" if "--mid none" in flags else "mid", road / "pretrain.pt"
    if flags.endswith("fm"):
        teacher, flags = tmp_path / "pretrain.pt", flags.split(" --t")[0]
        run(*TINY, "--out", tmp_path, "--stage", "pretrain", "--pretrain", "fm", "--steps", 1)
    run(*TINY, "--out", tmp_path, "--teacher", teacher, "--steps", 2, "--stage", stage, *flags.split())
    c = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
    assert c["step"] == 2 and c["skipped"] == 0


def test_the_teacher_runs_in_the_precision_of_the_student(road, monkeypatch):
    seen = frozen_calls(script, monkeypatch)
    run(*TINY, "--stage", "mid", "--teacher", road / "pretrain.pt", "--steps", 1, "--precision", "bf16", "--out", "half")
    assert seen == {torch.bfloat16}


def test_student_of_post_starts_from_the_ema_of_mid(road):
    c = cfg(*TINY, "--stage", "post", "--out", road, "--steps", 3)
    ckpt = torch.load(road / "mid.pt", weights_only=True)
    net = script.build(c, ckpt["model"], *script.first_weights(c, ckpt["model"]), train=True)
    assert all(torch.equal(v, ckpt["ema"][k]) for k, v in net.state_dict().items())


def test_a_stage_asks_for_what_it_needs_and_no_more(road, capsys, monkeypatch):
    """Resumed, post reads neither mid.pt nor a teacher; a teacher from which nothing learns is not trained; --init is there."""
    real = script.report
    monkeypatch.setattr(script, "report", lambda c, lr, tally, **k: real(c, lr, tally, **k) or tally["step"] == 2 and script.on_signal(15, None))
    os.makedirs("o")
    shutil.copy(road / "mid.pt", "o/mid.pt")
    base = [*TINY, "--out", "o", "--stage", "post", "--steps", 4]
    assert code(base, capsys, main=script.main)[0] == 75
    os.remove("o/mid.pt")
    monkeypatch.setattr(script, "STOP", [])
    run(*base)
    assert nets.load_checkpoint("o/post.pt")["step"] == 4
    run(*TINY, "--out", "p", "--mid", "none", "--post", "vanilla", "--steps", 1, "--samples", 16)
    assert not os.path.exists("p/pretrain.pt") and os.path.exists("p/post.pt")
    exit_code, err = code([*TINY, "--out", "q", "--init", "none.pt"], capsys, main=script.main)
    assert exit_code == 3 and "none.pt" in err and not os.path.exists("q")


def test_first_steps_of_a_sit_start_are_unguided():
    t, y = torch.full((8,), 0.5), torch.arange(8)
    on = lambda step, *a: script.is_guided(cfg("--omega", 0.2, "--kappa", 0.92, "--stage", "post", *a), step, t, y, 7)    # noqa: E731
    assert on(0).tolist() == [True] * 7 + [False]                                     # the null class never is
    sit = "--init", "teacher", "--unguided", 10
    assert not on(9, *sit, "--mid", "none").any() and on(10, *sit, "--mid", "none").any()
    assert on(0, *sit).any()                            # a mid-trained student has its guidance already
    assert not on(0, "--guide_to", 0.4).any() and not on(0, "--guide_from", 0.6).any()


def test_samples_depend_on_their_seed_alone_and_labels_are_as_named(road):
    state = torch.load(road / "post.pt", weights_only=True)
    net = script.build(cfg(*TINY), state["model"], state["ema"], "post")
    f = script.make_sampler(cfg("--labels", "random"), net, 2)
    assert torch.allclose(f([5, 6, 7])[1], f([6])[0], atol=1e-5)
    assert script.prior(net, range(25), "balanced")[1].tolist() == [s % 10 for s in range(25)]
    z, y = script.prior(net, range(200), "random")
    assert len(set(y.tolist())) == 10 and torch.equal(z, script.prior(net, range(200), "balanced")[0])
    z, y = script.prior(net, [3], "balanced")
    t = torch.ones(1)
    with torch.no_grad():
        assert torch.equal(script.make_sampler(cfg(), net, 1)([3]), z - net(z, t, 0 * t, y))
    run(*TINY, "--out", road, "--steps", 3, "--stage", "sample", "--seeds", "3-5")
    assert {p.name for p in (road / "samples").iterdir() if p.is_dir()} == {f"{n}_{k}" for n in ("teacher", "mid", "post") for k in (1, 2, 3)}
    assert len(list((road / "samples/post_1").iterdir())) == 3


def test_compiled_functions_hold_the_product_and_change_nothing(monkeypatch):
    """Both functions reach the compiler (a module compiled inside jvp would not), and loss and gradient stay."""
    graphs, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend=lambda g, _: graphs.append(g) or g.forward))
    net, (z, v, t, r, y) = tiny(depth=1), batch()
    results = []
    for flags in ([], ["--compile"]):
        c = cfg("--stage", "post", *flags)
        made_of = script.flow_of(c, net, torch.tensor(5))
        loss = script.loss_mf(made_of, z, v, t, r, y, script.is_guided(c, 0, t, y, 5), c)[0]
        results.append([loss, *torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])])
        made = len(graphs)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*results))
    products = sum("jvp" in g.code or "make_dual" in g.code for g in graphs)
    assert made >= 2 and products >= 1
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):         # each stage makes its graphs anew
        for k in range(9):
            script.flow_of(c, eval(f"lambda z, t, r, y: z + {k}"), None).u(z, t, r, y)


# ---- the data ------------------------------------------------------------------------------------
class FakeVAE(Pretrained):
    """Stands in for diffusers' AutoencoderKL: the mean is a small picture, the deviation a constant per side."""

    def encode(self, x):
        assert x.is_contiguous()
        mean = torch.nn.functional.avg_pool2d(x, 8)
        mean = torch.cat([mean, mean[:, :1]], 1)
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.125)))

    def decode(self, z):
        return types.SimpleNamespace(sample=torch.nn.functional.interpolate(z[:, :3], scale_factor=8))


def pictures(folder, n=6):
    rng = np.random.default_rng(0)
    for i in range(n):
        os.makedirs(f"{folder}/n{i % 2:02d}", exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (270, 300 + i, 3), np.uint8)).save(f"{folder}/n{i % 2:02d}/{i}.png")


def test_encoded_shards_resume_and_are_read_back(monkeypatch, capsys):
    pictures("src")
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=FakeVAE))
    monkeypatch.setattr(fid, "SHARD", 4)
    argv = ["--data", "./lat", "--stage", "encode", "--source", "src", "--out", "o"]
    run(*argv)
    second = Path("lat/00001.npy").stat().st_mtime_ns
    os.remove("lat/00000.npy")                           # as if it had been killed there
    Path("lat/00000.npy.tmp").write_bytes(b"half")
    run(*argv)
    assert Path("lat/00001.npy").stat().st_mtime_ns == second
    index = json.loads(Path("lat/index.json").read_text())
    assert index["scale"] == 0.18215 and "sd-vae" in index["vae"] and index["kind"].startswith("mean, deviation")
    data = script.load_data(script.parse(["--data", "lat"]))
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.shape == (4, 32, 32) and data.classes == 2
    raw = data.read(torch.tensor([4, 4]), torch.tensor([False, True]))
    image = np.asarray(fid.crop(Image.open("src/n01/3.png"), 256)).astype(np.float32) / 127.5 - 1
    mean = torch.nn.functional.avg_pool2d(torch.from_numpy(image).permute(2, 0, 1)[None], 8)
    assert torch.allclose(raw[0, :3], mean[0], atol=1e-3) and torch.allclose(raw[1, :3], mean[0].flip(2), atol=1e-3)
    x = script.to_input(raw, torch.ones(2, 4, 32, 32))
    assert torch.allclose(x, 0.18215 * (raw[:, :4] + 0.125))
    assert torch.allclose(script.to_images(script.parse(["--data", "lat"]), x)[:, :, ::8, ::8], x[:, :3] / 0.18215)
    Path("lat/index.json").write_text(json.dumps({**index, "scale": 0.18125}))
    capsys.readouterr()
    exit_code, err = code(["--data", "lat", "--stage", "pretrain", "--out", "x"], capsys, main=script.main)
    assert exit_code == 3 and "0.18125" in err and len(err.strip().splitlines()) == 1


def test_sizes_that_do_not_fit_own_latents_are_refused_before_the_first_stage(capsys):
    os.makedirs("lat")
    np.save("lat/labels.npy", np.arange(8) % 3)
    np.save("lat/00000.npy", np.zeros((8, 2, 8, 8, 8), np.float16))
    Path("lat/index.json").write_text(json.dumps(dict(kind="mean, deviation; plain, flipped", scale=0.18215, shards=1)))
    exit_code, err = code(["--data", "lat", "--out", "x", "--weak", "4x32x1", "--size", "3x32x1"], capsys, main=script.main)
    assert exit_code == 2 and "--size 3x32x1: its patches do not fill the 8 pixels" in err and not os.path.exists("x")


def test_latents_train_and_are_scored(monkeypatch):
    """The latent road on tiny moments: pretrain, mid, post, sample with a decoder."""
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=FakeVAE))
    os.makedirs("lat")
    np.save("lat/labels.npy", np.arange(8) % 3)
    np.save("lat/00000.npy", np.random.default_rng(0).random((8, 2, 8, 8, 8)).astype(np.float16))
    Path("lat/index.json").write_text(json.dumps(dict(kind="mean, deviation; plain, flipped", scale=0.18215, shards=1)))
    base = ["--data", "lat", "--out", "o", "--steps", 2, "--batch", 8, "--trajectories", 2, "--weak", "4x32x1", "--size", "4x32x1",
            "--nfe", 2]
    for stage in ("pretrain", "mid", "post"):
        run(*base, "--stage", stage)
    run(*base, "--stage", "sample", "--seeds", "0-1")
    assert Image.open("o/samples/post_1/000001.png").size == (64, 64)
    assert torch.load("o/post.pt", weights_only=True)["model"]["num_classes"] == 3


def test_caches_of_others_are_read_as_what_they_are(capsys):
    """Deviation or log variance, one .npy per image, in a folder or a .zip; a damaged one is refused before the first step."""
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(4, 4, 4)).astype(np.float32), rng.random((4, 4, 4)).astype(np.float32) / 10 + 0.01
    for name, second in (("a", std), ("b", 2 * np.log(std))):
        os.makedirs(f"{name}/00")
        np.save(f"{name}/00/img-mean-std-0.npy", np.concatenate([mean, second]))
    Path("a/dataset.json").write_text(json.dumps({"labels": [["00/img-mean-std-0.npy", 0]]}))
    for d in ("n01", "n02"):
        os.makedirs(f"c/{d}")
        np.save(f"c/{d}/x.npy", np.concatenate([mean, std]))
    shutil.make_archive("d", "zip", "c")
    one, off = torch.tensor([0]), torch.tensor([False])
    for name in ("a", "b", "c", "d.zip"):
        os.makedirs(f"out-{name}")
        data = script.Latents(name, f"out-{name}")
        assert data.labels.tolist() == ([0] if name in "ab" else [0, 1])
        assert torch.allclose(data.read(one, off)[0], torch.from_numpy(np.concatenate([mean, std])), atol=1e-6)
        assert torch.equal(data.read(one, ~off), data.read(one, off).flip(3))
    assert script.Latents("c", "out-c").stamp == script.Latents("d.zip", "out-d.zip").stamp      # of contents
    before = script.Latents("c", "out-c").stamp
    np.save("c/n02/x.npy", np.concatenate([mean, std + 1]))                   # of equal size
    assert script.Latents("c", "out-c").stamp != before
    capsys.readouterr()
    os.makedirs("mdb"), os.makedirs("jax/train"), os.makedirs("odd")
    Path("mdb/data.mdb").write_bytes(b""), Path("jax/train/00000000.pt").write_bytes(b"")
    np.save("b/00/img-mean-std-0.npy", mean), np.save("odd/x.npy", mean.astype(str))
    Path("c/n02/x.npy").write_bytes(Path("c/n02/x.npy").read_bytes()[:-5])
    for name, text in (("mdb", "no .npy.*data.mdb.*--stage encode"), ("jax", "no .npy.*00000000.pt.*--stage encode"),
                       ("b", r"\(4, 4, 4\), not mean and deviation"), ("none", "none"), ("odd", "<U32"), ("c", "n02/x.npy.*1 of 2")):
        exit_code, err = code(["--data", f"./{name}", "--stage", "pretrain", "--out", "x"], capsys, main=script.main)
        assert exit_code == 3 and re.search(text, err) and len(err.strip().splitlines()) <= 2, err


def test_the_walkthrough_runs_as_printed(road, capsys):
    """Its blocks, one after the other, with 20 images instead of 500; each prints what it says."""
    cifar.main([*conftest.TINY, "--out", "out/digits", "--steps", "2"])
    os.symlink(road, "out/digits-mf")
    texts.main("--data digits --stage pretrain --steps 1 --batch 16".split())
    os.makedirs(drawn := "out/digits-t2i/samples/post_1")
    for caption in "seven-a", "two-seven":            # what the last exercise would draw
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(f"{drawn}/{caption}_000000.png")
    page = (Path(nets.__file__).parent / "docs/walkthrough.md").read_text()
    quoted, blocks = re.findall(r"```py\n(.*?)```", page, re.S), re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(quoted) == 4 and all(any(lines in p.read_text() for p in Path(nets.__file__).parent.glob("train_*.py")) for lines in quoted)
    capsys.readouterr()
    space, printed = {}, []
    with torch.set_grad_enabled(True):                # put back what the first block switches off
        for block in blocks:
            exec(block.replace("500", "20"), space)
            printed.append(len(capsys.readouterr().out.splitlines()))
    assert printed == [0, 4, 4, 7, 3, 4, 3, 2, 4, 3, 3, 3, 4, 1, 1, 2, 2] and space["xs"].shape == (17, 20, 1, 8, 8)


# ---- faults --------------------------------------------------------------------------------------
def pair(argv, patch=lambda: None):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [fork(argv, f"log{r}", r, 2, port, patch, main=script.main) for r in range(2)]


def stages(road, stage):
    extra = [] if stage == "pretrain" else ["--teacher", road / "pretrain.pt", "--mid", "cmt" if stage == "mid" else "none"]
    return [*TINY, "--stage", stage, *extra]


@pytest.mark.parametrize("stage", [pytest.param("mid", marks=pytest.mark.long), "post"])
def test_two_processes_give_the_result_of_one(road, stage):
    """Bit for bit with the same micro-batches; and they differ if the gradients are not summed."""
    argv = [*stages(road, stage), "--steps", 4, "--batch_gpu", 8]
    run(*argv, "--out", "one")
    assert [wait(p) for p in pair([*argv, "--out", "two"])] == [0, 0], Path("log0").read_text()
    assert torch.equal(weights(f"one/{stage}.pt"), weights(f"two/{stage}.pt"))
    a, b = ([json.loads(line) for line in open(f"{d}/metrics.jsonl")] for d in ("one", "two"))
    for key in ("loss", "mse_same") if stage == "post" else ("loss", *GAPS):
        assert [m[key] for m in a] == [pytest.approx(m[key], rel=1e-5) for m in b]
    if stage == "post":
        def alone():
            real = torch.distributed.all_reduce
            script.dist.all_reduce = lambda x: x if len(x) > 1000 else real(x)
        assert [wait(p) for p in pair([*argv, "--out", "three"], alone)] == [0, 0]
        assert not torch.equal(weights("one/post.pt"), weights("three/post.pt"))


def last_step(out):
    path = Path(out, "metrics.jsonl")
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.parametrize("stage", [pytest.param("mid", marks=pytest.mark.long), "post"])
def test_killed_or_stopped_runs_end_as_the_undisturbed_one(road, stage):
    """kill -9, then SIGTERM (exit code 75): the same command again, bit for bit the same end."""
    argv = [*stages(road, stage), "--steps", 24, "--save_every", 3]
    run(*argv, "--out", "whole")
    for number, at in ((signal.SIGKILL, 5), (signal.SIGTERM, 12)):
        pid = fork([*argv, "--out", "cut"], "log", main=script.main)
        while last_step("cut") < at:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), Path("log").read_text()[-2000:]
            time.sleep(0.003)
        os.kill(pid, number)
        assert wait(pid) == (75 if number == signal.SIGTERM else -number), Path("log").read_text()[-2000:]
    assert nets.load_checkpoint(f"cut/{stage}.pt")["step"] == last_step("cut") < 24
    run(*argv, "--out", "cut")
    assert torch.equal(weights(f"whole/{stage}.pt"), weights(f"cut/{stage}.pt"))


@pytest.mark.parametrize("name", ["train_mf_imagenet256", "train_t2i_coco"])
def test_the_product_is_never_taken_in_half_precision(name):
    """u(z, t, r, y) is, du/dt is not: bf16 moves it by a hundredth, TF32 by a thousandth (docs/costs.md)."""
    home, layer = __import__(name), torch.nn.Linear(2, 2)

    def net(z, *a, **k):
        return layer(z)
    flow = home.flow_of(home.parse(["--data", "digits", "--stage", "post", "--precision", "bf16"]), net, None)
    z, t = torch.ones(2, 1, 2, 2), torch.ones(2)
    assert flow.u(z, t, t, t).dtype == torch.bfloat16 and flow.slope(z, t, t, t, z).dtype == torch.float32


def test_a_step_that_is_not_finite_is_skipped_and_ten_end_the_run(monkeypatch, capsys):
    real, calls, bad = script.loss_mf, [], {2}

    def faulty(*a):
        loss, *rest = real(*a)
        return loss * (float("nan") if calls.append(1) or len(calls) in bad else 1), *rest
    monkeypatch.setattr(script, "loss_mf", faulty)
    run(*TINY, "--stage", "pretrain", "--steps", 4, "--out", "few")
    assert nets.load_checkpoint("few/pretrain.pt")["skipped"] == 1
    bad.update(range(8, 99))
    exit_code, err = code([*TINY, "--stage", "pretrain", "--steps", 30, "--save_every", 2, "--out", "many"], capsys, main=script.main)
    assert exit_code == 4 and "not finite in 10 steps" in err
    assert all(torch.isfinite(v).all() for v in nets.load_checkpoint("many/pretrain.pt")["net"].values())


BAD = [
    ("--omega 0", 2, "--omega 0.0"),
    ("--kappa 1", 2, "--kappa 1.0 is not possible; it must be in [0, 1)"),
    ("--guide_from 0.9", 2, "--guide_from 0.9 must not be above --guide_to 0.75"),
    ("--guide_to 1.5", 2, "--guide_to 1.5"),
    ("--ratio 2", 2, "--ratio 2.0"),
    ("--nodes 1", 2, "--nodes 1"),
    ("--size dit-q/2", 2, "--size dit-q/2"),
    ("--size 4x100x2", 2, "multiple of 32"),
    ("--stage pretrain --weak 3x64x2", 2, "do not fill the 8 pixels"),
    ("--size 3x64x2", 2, "do not fill the 8 pixels"),
    ("--power -1", 2, "--power -1"),
    ("--init none.pt", 3, "none.pt: no such file"),
    ("--weak ddpm++-8", 2, "PATCHxWIDTHxDEPTH"),
    ("--stage mid --trajectories 7", 2, "must fill whole batches"),
    ("--stage mid", 3, "run --stage pretrain first"),
    ("--stage mid --teacher none.pt", 3, "none.pt: no such file"),
    ("--stage eval", 3, "no finished stage"),
    ("--stage encode --source nowhere", 2, "--data digits needs none"),
    ("--data lat --stage encode --source nowhere", 3, "--source nowhere"),
    ("--stage post", 3, "run --stage mid first"),
    ("--stage post --mid none --post teacher", 3, "run --stage pretrain first"),
    ("--data imagenet --stage pretrain", 3, "imagenet256-sd"),
    ("--lable_drop 1", 2, "unrecognized arguments: --lable_drop"),
]


@pytest.mark.parametrize("line, expected, text", BAD, ids=[b[0] for b in BAD])
def test_bad_input_is_one_line_with_its_exit_code(line, expected, text, capsys):
    exit_code, err = code(["--data", "digits", *line.split()], capsys, main=script.main)
    assert exit_code == expected and text in err and len(err.strip().splitlines()) == 1, err


def test_a_run_without_mid_training_in_the_folder_alone_is_shown_beside(road):
    alone_is_shown(script, road, TINY)
