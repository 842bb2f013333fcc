"""train_t2i_coco.py: REPA, guidance, captions, pairs of the teacher, shards by fake encoders, stages, faults."""
import functools
import inspect
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
from conftest import Pretrained, alone_is_shown, code, fork, frozen_calls, wait, weights
from PIL import Image

import fid
import nets
import solvers
import train_t2i_coco as script

TINY = "--data digits --samples 20 --trajectories 8 --batch 16 --log_every 1 --nfe 3 --size 4x2".split()


@pytest.fixture(autouse=True)
def fresh(here, monkeypatch):
    monkeypatch.setattr(script, "STOP", [])


@pytest.fixture(scope="module", autouse=True)
def source():
    """inspect.getsource, of which parse makes --help, reads the whole script each time."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """One whole run of a few steps: pretrain, mid, post, eval."""
    out = tmp_path_factory.mktemp("t2i")
    script.main([*TINY, "--out", str(out), "--steps", "3"])
    return out


def cfg(*argv):
    return script.parse([str(a) for a in ("--data", "digits", *argv)])


def run(*argv):
    script.main([str(a) for a in argv])


def tiny(seed=0, **kwargs):
    """A small MM-DiT in float64 with two clocks and a projector after the first of two blocks."""
    torch.manual_seed(seed)
    small = dict(input_size=4, in_channels=2, patch_size=2, depth=2, context_dim=6, average_velocity=True)
    return nets.MMDiT(**{**small, **dict(repa_dim=5, repa_depth=1, projector_dim=8), **kwargs}).double()


def batch(n=16, seed=0, ratio=0.25):
    """z, v, t, r, text of float64 samples, a quarter with r < t; the null caption; which samples have one."""
    g = torch.Generator().manual_seed(seed)
    z, v = torch.randn((2, n, 2, 4, 4), generator=g, dtype=torch.float64)
    t, r = (a.double() for a in script.draw_times(n, g, ratio, -0.4, 1.0))
    text, null = torch.randn((n, 3, 6), generator=g).double(), torch.randn((1, 3, 6), generator=g).double()
    drop = torch.arange(n) % 5 == 0
    return z, v, t, r, torch.where(drop.view(-1, 1, 1), null, text), null, drop


def flow(net, null, *flags):
    """The Flow, and the list with REPA's features."""
    return script.repa_flow(cfg("--stage", "post", *flags), net, null)


def stop_in(n):
    """The run is asked to stop in its n-th step, as a signal would."""
    real, calls = script.count, []

    def counting(*a):
        real(*a)
        if calls.append(1) or len(calls) == n - 1:
            script.STOP.append(signal.SIGTERM)
    return counting


# ---- losses --------------------------------------------------------------------------------------
@pytest.mark.parametrize("omega, kappa", [(1.0, 0.5), (0.2, 0.9), (3.0, 0.0), (1.0, 0.0)])
def test_loss_is_mean_flow_by_the_book(omega, kappa):
    """Loss and gradient with the product and every guidance call on every sample, as the papers write it."""
    net, (z, v, t, r, text, null, drop) = tiny(), batch()
    c = cfg("--omega", omega, "--kappa", kappa)
    led = ~drop & (omega != 1 or kappa != 0)
    made, kept = flow(net, null)
    loss, square = script.loss_mf(made, z, v, t, r, text, led, c)
    book = lambda z, t, r, text: net(z, t, text, r, repa=False)                      # noqa: E731
    with torch.no_grad():
        guided = omega * v + kappa * book(z, t, t, text) + (1 - omega - kappa) * book(z, t, t, null.expand_as(text))
        tangent = torch.where(led.view(-1, 1, 1, 1), guided, v)
    u, slope = torch.func.jvp(lambda z, t: book(z, t, r, text), (z, t), (tangent, torch.ones_like(t)))
    error = (u - (tangent - (t - r).view(-1, 1, 1, 1) * slope).detach()).square().sum((1, 2, 3))
    expected = (error / (error.detach() + script.WEIGHT_C)).mean()
    assert torch.allclose(loss, expected, rtol=1e-12) and torch.allclose(square, error, rtol=1e-10)
    params = [p for n, p in net.named_parameters() if "projectors" not in n]
    ours, theirs = (torch.autograd.grad(x, params, allow_unused=True) for x in (loss, expected))
    assert all(a is b is None or torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(ours, theirs))
    assert len(kept) == 1 and torch.equal(kept[0], net(z, t, text, r)[1])


def test_repa_teaches_the_first_blocks_and_never_enters_the_product():
    """Its gradient ends behind block repa_depth; the projector runs once a step, in the primal forward, on all."""
    net, (z, v, t, r, text, null, drop) = tiny(), batch()
    calls = []
    net.projectors[0].register_forward_hook(lambda m, a, out: calls.append((len(out), out.requires_grad)))
    made, kept = flow(net, null)
    script.loss_mf(made, z, v, t, r, text, ~drop, cfg())
    h, = kept
    assert calls == [(16, True)] and h.shape == (16, 4, 5)
    script.loss_repa(h, torch.randn(16, 4, 5)).backward()
    first, last = (b.x_block.mlp.fc2.weight.grad for b in net.joint_blocks)
    assert first.abs().sum() > 0 and last is None and net.final_layer.linear.weight.grad is None
    h = h.detach()
    assert script.loss_repa(2 * h, h) == pytest.approx(-1) and script.loss_repa(-h, h) == pytest.approx(1)
    assert script.loss_repa((1e-3 * h).half(), (1e-3 * h).half()) == pytest.approx(-1, abs=1e-3)      # not NaN


@pytest.mark.long
def test_compiled_functions_hold_the_product_and_change_nothing(monkeypatch):
    """Both functions reach the compiler (a module compiled inside jvp would not), and loss and gradient stay."""
    graphs, results, real = [], [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend=lambda g, _: graphs.append(g) or g.forward))
    net, (z, v, t, r, text, null, drop) = tiny(depth=1), batch()
    for flags in ([], ["--compile"]):
        made, kept = flow(net, null, *flags)
        loss, _ = script.loss_mf(made, z, v, t, r, text, ~drop, cfg())
        results.append([loss, *kept, *torch.autograd.grad(loss, net.final_layer.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*results))
    assert len(graphs) >= 2 and any("jvp" in g.code or "make_dual" in g.code for g in graphs)


def test_repa_reaches_the_weights_through_training(road, tmp_path):
    """--repa 0 has no projector; pretrain and post with REPA move it, mid leaves it as it was."""
    state = {s: torch.load(road / f"{s}.pt", weights_only=True)["net"] for s in ("pretrain", "mid", "post")}
    key = "projectors.0.0.weight"
    ema = torch.load(road / "pretrain.pt", weights_only=True)["ema"]
    assert torch.equal(state["mid"][key], ema[key]) and not torch.equal(state["post"][key], ema[key])
    run(*TINY, "--out", tmp_path, "--stage", "pretrain", "--pretrain", "plain", "--steps", 1)
    assert not any("projectors" in k for k in torch.load(tmp_path / "pretrain.pt", weights_only=True)["net"])
    lines = [json.loads(line) for line in (road / "metrics.jsonl").read_text().splitlines()]
    assert all(-1 <= m["repa"] <= 1 for m in lines if m["stage"] in ("pretrain", "post"))


def test_sit_loss_is_zero_for_the_right_velocity():
    z, v, t, _, text, *_ = batch()
    right = lambda z, t, r, text: v                      # noqa: E731
    assert script.loss_sit(right, z, v, t, text)[0] == 0
    loss, square = script.loss_sit(right, z, v + 2, t, text)
    assert loss == pytest.approx(4) and square.tolist() == pytest.approx([4 * 32] * 16)


# ---- guidance and pairs --------------------------------------------------------------------------
def test_teacher_is_guided_by_two_inside_the_interval_and_never_for_the_null_caption():
    """Heun's rule asks at both ends of a step, each inside the interval or not."""
    net, (z, _, t, _, text, null, drop) = tiny(average_velocity=False), batch()
    c = cfg("--guide_from", 0.3, "--guide_to", 0.8)

    def v(x, t, scale):
        t = torch.full((16,), t).double()
        plain, own = (net(x, t, words, repa=False) for words in (null.expand_as(text), text))
        return plain + scale * (own - plain)
    with torch.no_grad():
        for t, r, scales in ((0.7, 0.5, (2, 2)), (0.9, 0.5, (1, 2)), (0.5, 0.2, (2, 1)), (0.25, 0.0, (1, 1))):
            states = script.rollout(c, net, z, text, null, torch.tensor([t, r]).double())
            velocity = (z - states[1]) / (t - r)
            first = v(z, t, scales[0])
            mean = (first + v(z - (t - r) * first, r, scales[1])) / 2
            assert torch.equal(states[0], z) and torch.allclose(velocity, mean)
            first = v(z, t, 0)
            assert torch.allclose(velocity[drop], ((first + v(z - (t - r) * first, r, 0)) / 2)[drop])
        two, t = tiny(), torch.full((16,), 0.7).double()     # guidance is part of a Mean Flow: one call, no more
        states = script.rollout(c, two, z, text, null, torch.tensor([0.7, 0.0]).double())
        assert torch.allclose((z - states[1]) / 0.7, two(z, t, text, 0 * t, repa=False))
    xl = script.parse(["--post", "xl", "--stage", "post"])
    assert (xl.omega, xl.kappa) == (0.2, 0.9) and xl.omega / (1 - xl.kappa) == pytest.approx(2)


@pytest.mark.parametrize("nodes, pairs", [(8, 28), (9, 36)])
def test_pairs_join_the_states_of_the_guided_solver(nodes, pairs):
    """Every target is (z_t - z_r) / (t - r) between two states of one trajectory, with the caption that made it."""
    net, (*_, text, null, _) = tiny(average_velocity=False).float(), batch()
    text, null = text[:3].float(), null.float()
    c, g = cfg("--stage", "mid", "--nodes", nodes), torch.Generator().manual_seed(0)
    z, t, r, number, target = script.teacher_pairs(c, net, text, null, (2, 4, 4), g)
    times = torch.linspace(1, 0, nodes)
    guided = lambda x, t: net(x, t, null.expand_as(text), repa=False).lerp(net(x, t, text, repa=False), 2)    # noqa: E731
    with torch.no_grad():
        noises = torch.stack([z[(t == 1) & (number == k)][0] for k in range(3)])
        states = solvers.flow_heun(guided, noises, times.double())
    place = lambda x: (x[:, None] - times).abs().argmin(1)                           # noqa: E731
    assert number.bincount().tolist() == [pairs] * 3 and (r < t).all() and not torch.equal(number, torch.arange(len(z)) % 3)
    assert len({*zip(t.tolist(), r.tolist())}) == pairs and torch.allclose(z, states[place(t), number], atol=1e-5)
    wide = (t - r).view(-1, 1, 1, 1)
    assert torch.allclose(target * wide, z - states[place(r), number], atol=1e-5)


def test_student_starts_as_the_teacher_for_every_r(road):
    """B.6: the SiT's weights; the second clock adds nothing at first. Post starts from the EMA of mid."""
    images, encoder = script.load_data(cfg(*TINY)), script.Words()
    c = cfg(*TINY, "--stage", "mid", "--out", road)
    state, model = script.teacher_state(c)
    teacher = script.build(c, model, state)
    net = script.build(c, script.model_size(c, images, 32), *script.first_weights(c), train=True)
    z, t, text = torch.randn(4, 1, 8, 8), torch.rand(4), encoder(encoder.ids(["the digit two"] * 4))
    assert torch.allclose(net(z, t, text, t / 3)[0], teacher(z, t, text)[0], atol=1e-6)
    c = cfg(*TINY, "--stage", "post", "--out", road, "--steps", 3)
    ckpt = torch.load(road / "mid.pt", weights_only=True)
    net = script.build(c, ckpt["model"], *script.first_weights(c), train=True)
    assert all(torch.equal(v, ckpt["ema"][k]) for k, v in net.state_dict().items())


# ---- captions ------------------------------------------------------------------------------------
def test_words_are_fixed_ordered_and_different():
    words = script.Words()
    a, b, c, null = (words(words.ids([s]))[0] for s in ("the digit seven", "The digit  SEVEN", "seven digit the", ""))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (4, 32)
    assert float(a[2, 0]) == pytest.approx(float(script.Words()(words.ids(["the digit seven"]))[0, 2, 0]), abs=0)
    ids = words.ids([s.format(d) for s in script.SAYINGS for d in script.DIGITS])
    assert len({tuple(row) for row in ids.tolist()}) == 50 and torch.equal(null, words.table[:1] + words.place)


def test_punctuation_does_not_change_a_digit():
    words = script.Words()
    for other in ("the digit seven.", "the digit 'seven'!", "The digit, seven", "the digit seven ..."):
        assert torch.equal(words.ids([other]), words.ids(["the digit seven"]))
    assert words.ids(["the digit seven"]).tolist() == [[634, 3532, 846, 0]]          # as every checkpoint has learned it


@pytest.mark.parametrize("prompts, text", [
    ("none.txt", "none.txt: No such file"), ("my captions.txt", "No such file"), ("folder.txt", "folder.txt: Is a directory"), ("empty.txt", "holds no caption"), (" | ", "holds no caption")])
def test_prompts_that_are_no_captions_are_refused_before_sampling(prompts, text, capsys):
    Path("folder.txt").mkdir()
    Path("empty.txt").write_text("\n \n")
    exit_code, err = code([*TINY, "--stage", "sample", "--prompts", prompts, "--out", "x"], capsys, main=script.main)
    assert exit_code == 2 + ("caption" not in text) and text in err and len(err.strip().splitlines()) == 1 and not os.path.exists("x")


def test_prompts_are_captions_or_the_lines_of_a_file():
    read = lambda text: script.given_prompts(cfg("--prompts", text))                 # noqa: E731
    Path("a.txt").write_bytes("\ufeffthe digit seven.\r\n\n  caf\u00e9 | bar \n".encode())
    assert read("a.txt") == read("./a.txt") == ["the digit seven.", "caf\u00e9 | bar"]
    assert read("a cat and/or a dog") == ["a cat and/or a dog"] and read("seven.") == ["seven."]
    assert read("a cat||a dog |") == ["a cat", "a dog"] and read("a.txt|") == ["a.txt"]


def test_images_have_five_captions_and_a_random_one_is_read():
    data, n = script.load_data(cfg()), 2000
    index = torch.arange(n) % data.count
    words = data.texts(index, torch.rand(n, generator=torch.Generator().manual_seed(0)))
    assert len({tuple(w) for w in data.texts(index * 0, torch.arange(n) / n).tolist()}) == 5
    asked = {tuple(w) for w in data.ids.tolist()}
    assert {tuple(w) for w in words.tolist()} == asked and len(asked) == 50
    raw, tokens, words = data.read(torch.tensor([0, 1796]), torch.tensor([0.0, 0.999]))
    assert raw.shape == (2, 1, 8, 8) and tokens.shape == (2, 16, 32)
    assert torch.equal(words, script.Words().ids(["the digit zero", "a handwritten nine"]))
    for seed, caption in enumerate(data.validation(range(50))[0]):           # what read_digits counts on
        assert [w for w in caption.split() if w in script.DIGITS] == [script.DIGITS[seed % 10]]
    assert tokens.std() > 0.1 and script.random_tokens(data.pixels[:1], 2).shape == (1, 4, 32)


def test_dropped_captions_are_the_null_caption_for_teacher_and_student(road, monkeypatch):
    """In post the loss never guides them; in mid a share of the trajectories has none, and so has the student."""
    seen, solved, real, pairs, loss_mid = [], [], script.loss_mf, script.teacher_pairs, script.loss_cmt_mf

    def spy(flow, z, v, t, r, text, guided, c):
        seen.append((text, flow.null_y, guided))
        return real(flow, z, v, t, r, text, guided, c)

    def watch(c, teacher, text, null, *a):
        solved.append((text, null, *pairs(c, teacher, text, null, *a)))
        return solved[-1][2:]

    def own(f, z, t, r, text, target):                   # each pair has the caption of its own trajectory
        texts, _, states, _, _, number, targets = solved[-1]
        at = [int((targets - one).flatten(1).abs().sum(1).argmin()) for one in target]
        assert torch.equal(states[at], z) and torch.equal(texts[number[at]], text)
        return loss_mid(f, z, t, r, text, target)
    for name, f in (("loss_mf", spy), ("teacher_pairs", watch), ("loss_cmt_mf", own)):
        monkeypatch.setattr(script, name, f)
    base = [*TINY, "--teacher", road / "pretrain.pt", "--out", "o", "--steps", 6, "--caption_dropout", 0.4]
    run(*base, "--stage", "post", "--mid", "none")
    text, null, led = (torch.cat(x) for x in zip(*seen))
    dropped = (text == null[:1]).flatten(1).all(1)
    assert 0.2 < dropped.float().mean() < 0.6 and torch.equal(led, ~dropped)
    run(*base, "--out", "o2", "--stage", "mid", "--trajectories", 64)
    (text, null, *_), = solved
    assert 0.2 < (text == null).flatten(1).all(1).float().mean() < 0.6


def test_captions_decide_the_digit():
    """A few seconds of training: with one noise for all, most samples are read as what their caption says."""
    run("--data", "digits", "--stage", "pretrain", "--size", "4x2", "--steps", 250, "--batch", 8, "--lr", 4e-3,
        "--ema_beta", 0.9, "--out", "o", "--log_every", 500, "--save_every", 500)
    (_, net, _, _), = script.candidates(cfg("--size", "4x2", "--out", "o"))
    words = script.Words()
    text, null = words(words.ids([f"the digit {d}" for d in script.DIGITS])), words(words.ids([""]))
    sampler = script.make_sampler(cfg("--size", "4x2"), net, 6, lambda seeds: text.repeat(8, 1, 1), null)
    x = sampler([s for s in range(8) for _ in range(10)])
    right = (fid.DigitsNet().logits(fid.to_uint8(x)).argmax(1) == torch.arange(10).repeat(8)).sum()
    assert right >= 32                                   # of 80; chance: 8


# ---- the road ------------------------------------------------------------------------------------
def test_all_stages_leave_checkpoints_pictures_and_a_table(road):
    for stage in ("pretrain", "mid", "post"):
        c = torch.load(road / f"{stage}.pt", weights_only=True)
        assert c["step"] == 3 and all(torch.isfinite(v).all() for v in c["ema"].values())
    table = (road / "results.md").read_text()
    score, share = r" \d+\.\d\d \|", r" \d+\.\d% \|"
    assert re.search(rf"\| teacher \| 3 \| 48 \| \d+ \|{score} - \|{share} - \|{score}{share}", table), table
    assert re.search(rf"\| post \| 3 \| 48 \| \d+ \|{2 * score}{2 * share} - \| - \|", table), table
    assert "guidance 2 (omega 1.0, kappa 0.5)" in table and "FID" not in table.replace("fid", "")
    for name in ("samples_teacher_3step", "samples_mid_1step", "samples_post_2step", "stages", "trajectory", "curve", "previews/mid_0000003"):
        assert Image.open(road / f"{name}.png").size[0] >= 900


@pytest.mark.parametrize("flags", [
    "--mid none --init random --batch_gpu 4 --precision bf16 --clip 1",
    "--mid none --post xl --repa 0", "--nodes 9 --trajectories 16 --clip 1",
    "--mid none --post vanilla --init FILE --ratio 1"])
def test_baselines_and_variants_train(road, tmp_path, flags):
    stage = "post" if "--mid none" in flags else "mid"
    flags = flags.replace("FILE", str(road / "mid.pt")).split()
    run(*TINY, "--out", tmp_path, "--teacher", road / "pretrain.pt", "--steps", 2, "--stage", stage, *flags)
    assert torch.load(tmp_path / f"{stage}.pt", weights_only=True)["skipped"] == 0


def test_the_teacher_runs_in_the_precision_of_the_student(road, monkeypatch):
    seen = frozen_calls(script, monkeypatch)
    run(*TINY, "--stage", "mid", "--teacher", road / "pretrain.pt", "--steps", 1, "--precision", "bf16", "--out", "half")
    assert seen == {torch.bfloat16}


def test_micro_batches_give_the_result_of_the_whole_batch(road):
    for n in (16, 4):
        run(*TINY, "--stage", "post", "--mid", "none", "--steps", 3, "--teacher", road / "pretrain.pt",
            "--batch_gpu", n, "--out", n)
    a, b = (torch.load(f"{n}/post.pt", weights_only=True)["net"] for n in (16, 4))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-4


def test_a_caption_that_is_cut_draws_a_warning(road, capsys):
    run(*TINY, "--stage", "sample", "--out", road, "--prompts", "the digit seven|a very very long seven", "--seeds", "3")
    warning = "--prompts 'a very very long seven' fills the text encoder"
    assert capsys.readouterr().out.count("fills the") == 1 == (road / "log.txt").read_text().count(warning)


def test_prompts_make_a_picture_for_each_caption_and_seed(road, capsys, monkeypatch):
    heads, save = [], fid.save_sheet
    monkeypatch.setattr(fid, "save_sheet", lambda path, rows, caption, header: heads.append(header) or save(path, rows, caption, header))
    Path("prompts.txt").write_text("the digit seven\n\na purple elephant\n")
    shutil.rmtree(road / "samples", ignore_errors=True)
    for prompts in ("the digit seven|a purple elephant", "prompts.txt"):
        run(*TINY, "--stage", "sample", "--out", road, "--prompts", prompts, "--seeds", "3-5")
        for k in ("teacher_1", "teacher_3", "mid_1", "post_2"):
            names = sorted(p.name for p in (road / f"samples/{k}").iterdir())
            assert names == [f"{c}_{s:06d}.png" for c in ("a-purple-elephant", "the-digit-seven") for s in (3, 4, 5)]
            assert Image.open(road / f"samples_{k}step_prompts.png").size[0] >= 900
        assert "has never seen elephant, purple" in capsys.readouterr().err
    assert heads == [["caption", "seed 3", "seed 4", "seed 5"]] * 12                               # a name above each column
    c = cfg(*TINY, "--stage", "sample", "--init", road / "post.pt", "--out", "x")
    (_, net, kinds, _), = script.candidates(c)
    assert kinds == {1: 1, 2: 2} and len(script.given_prompts(c)) == 8
    words = script.Words()
    text, null = words(words.ids(["the digit seven"])), words(words.ids([""]))
    one, two = (script.make_sampler(c, net, n, lambda seeds: text.expand(len(seeds), -1, -1), null) for n in (1, 2))
    shown = np.asarray(Image.open(road / "samples/post_1/the-digit-seven_000004.png"))
    assert np.array_equal(shown, fid.to_uint8(one([4]))[0, 0].numpy())
    assert torch.allclose(two([4, 9])[1], two([9])[0], atol=1e-5)


# ---- data ----------------------------------------------------------------------------------------
class FakeVAE(Pretrained):
    """Stands in for diffusers' AutoencoderKL: the mean is a small picture, the deviation a constant."""

    def encode(self, x):
        assert x.is_contiguous()
        mean = torch.nn.functional.avg_pool2d(x, 32)
        mean = torch.cat([mean, mean[:, :1]], 1)
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.125)))

    def decode(self, z):
        return types.SimpleNamespace(sample=torch.nn.functional.interpolate(z[:, :3], scale_factor=8))


class FakeDino(Pretrained):
    config = types.SimpleNamespace(model_type="dinov2")

    def forward(self, x):
        assert x.shape[2:] == (224, 224)
        x = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        return types.SimpleNamespace(last_hidden_state=torch.cat([x[:, :1] * 0, x], 1))


class FakeText(Pretrained):
    """Tokenizer and tower in one: letters are tokens, features are their values."""
    config = types.SimpleNamespace(model_type="clip", vocab_size=256)

    def __len__(self):
        return 256

    def __call__(self, prompts=None, input_ids=None, max_length=77, **kwargs):
        if input_ids is None:
            ids = [[ord(c) for c in p][:max_length] for p in prompts]
            return types.SimpleNamespace(input_ids=torch.tensor([i + [0] * (max_length - len(i)) for i in ids]))
        return types.SimpleNamespace(last_hidden_state=input_ids.float()[..., None] / 100 * torch.ones(6))


class FakeInception(torch.nn.Linear):
    dim, protocol = 3, "FID: a fake"

    def __init__(self):
        super().__init__(1, 1)                           # fid.score asks its parameters for the device

    def forward(self, images):
        return images.float().mean((2, 3))


@pytest.fixture
def coco(monkeypatch):
    """A tiny COCO in ./coco and encoders that need no package."""
    rng = np.random.default_rng(0)
    os.makedirs("coco/annotations")
    for part in ("train2014", "val2014"):
        os.makedirs(f"coco/{part}")
        images = [dict(id=9 - i, file_name=f"{i}.jpg") for i in range(6)]
        for i, image in enumerate(images):
            pixels = rng.integers(0, 255, (270, 300 + i, 3), np.uint8)
            Image.fromarray(pixels).save(f"coco/{part}/{image['file_name']}", quality=95)
        notes = [dict(image_id=9 - i, caption=f"{part} {i} says {j}") for j in range(5) for i in range(6)]
        Path(f"coco/annotations/captions_{part}.json").write_text(json.dumps(dict(images=images, annotations=notes)))
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=FakeVAE))
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(
        CLIPTextModel=FakeText, CLIPTokenizer=FakeText, Dinov2Model=FakeDino))
    monkeypatch.setattr(fid, "load_inception", lambda *a: FakeInception())
    monkeypatch.setattr(fid, "prefetch", lambda name: None)
    monkeypatch.setattr(script, "load_vae", nets.sd_vae)
    monkeypatch.setattr(fid, "SHARD", 4)
    return ["--stage", "encode", "--source", "coco", "--out", "o", "--data"]


def test_encoded_shards_resume_and_are_read_back(coco, capsys):
    run(*coco, "./lat")
    second = Path("lat/moments_00001.npy").stat().st_mtime_ns
    os.remove("lat/moments_00000.npy")                   # as if it had been killed there
    os.remove("lat/index.json")
    run(*coco, "./lat")
    assert Path("lat/moments_00001.npy").stat().st_mtime_ns == second
    data, clip = script.load_data(script.parse(["--data", "lat"])), nets.CLIPText("x", "cpu")
    assert data.count == 6 and data.shape == (4, 8, 8)
    raw, tokens, words = data.read(torch.tensor([0, 5]), torch.tensor([0.0, 0.99]))
    image = np.asarray(fid.square(Image.open("coco/train2014/0.jpg"), 256))           # id 9, the last by id
    x = torch.from_numpy(image.copy()).permute(2, 0, 1).float()
    mean = torch.nn.functional.avg_pool2d(x[None] / 127.5 - 1, 32)[0]
    assert torch.allclose(raw[1, :3], mean, atol=1e-3) and (raw[:, 4:] == 0.125).all() and tokens.shape == (2, 16, 3)
    noise = torch.randn(2, 4, 8, 8)                      # each visit draws its own latent
    assert torch.allclose(script.to_input(raw, noise), 0.18215 * (raw[:, :4] + 0.125 * noise))
    expected = clip.ids(["train2014 5 says 0", "train2014 0 says 4"])
    assert torch.equal(words, expected)
    assert torch.allclose(clip(words), clip(expected), atol=2e-3) and clip(data.null[None]).shape == (1, 77, 6)
    captions, none = data.validation(range(40))
    assert none is None and {c.split()[0] for c in captions} == {"val2014"} and len(set(captions)) > 10
    assert fid.load_reference("lat/val.npz").n == 6
    np.save("lat/ids.npy", np.load("lat/ids.npy")[::-1])
    assert script.Coco("lat", "o").stamp != data.stamp        # other captions, as many
    index = json.loads(Path("lat/index.json").read_text())
    Path("lat/index.json").write_text(json.dumps({**index, "scale": 0.18125}))
    exit_code, err = code(["--data", "./lat", "--stage", "pretrain", "--out", "x"], capsys, main=script.main)
    assert exit_code == 3 and "0.18125" in err and len(err.strip().splitlines()) == 1


def test_a_shard_killed_while_it_is_renamed_is_made_again(coco, monkeypatch, capsys):
    """It is there when all its arrays are; other encoders are refused, before and after the end, in another folder taken."""
    real, calls = os.replace, []

    def dies(a, b):
        calls.append(b)
        if len(calls) == 3:                              # begun.json, one array, and then
            raise GeneratorExit                          # as a kill: nothing catches it
        real(a, b)
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(GeneratorExit):
        run(*coco, "./lat")
    assert len(list(Path("lat").glob("*_00000.npy"))) == 1
    monkeypatch.setattr(os, "replace", real)
    run(*coco, "./lat")
    assert [len(shard) for shard in script.Coco("lat", "o").maps["tokens"]] == [4, 2]
    exit_code, err = code([*coco, "./lat", "--vae", "other"], capsys, main=script.main)
    assert exit_code == 2 and re.search("made by the vae stabilityai/sd-vae-ft-mse, .*, not by other", err)
    os.remove("lat/index.json")
    os.makedirs("mine/dinov2-base")
    Path("mine/dinov2-base/weight.txt").write_text("another")
    for flag, name, kind in (("--vae", "other", "vae stabilityai/sd-vae-ft-mse"), ("--encoders", "mine", "vision facebook/dinov2-base")):
        exit_code, err = code([*coco, "./lat", flag, name], capsys, main=script.main)
        assert exit_code == 2 and f"{kind.split()[0]} was {kind.split()[1]}, crc32" in err and ", now " in err and name in err


def test_coco_trains_is_scored_and_drawn(coco):
    """The latent road on the tiny COCO: every stage, own statistics of the validation images, decoded samples."""
    run(*coco, "./lat")
    base = ["--data", "lat", "--out", "o", "--steps", 2, "--batch", 8, "--trajectories", 2, "--size", "2x1",
            "--nfe", 2, "--samples", 4]
    run(*base)
    table = Path("o/results.md").read_text()
    assert "| post | 2 | 16 |" in table and "1-step FID" in table and "6 images lat/val.npz" in table
    run(*base, "--stage", "sample", "--seeds", "0-1", "--prompts", "a cat")
    assert Image.open("o/samples/post_1/a-cat_000001.png").size == (64, 64)


def test_encoders_of_the_data_are_taken_and_no_others(coco, capsys):
    """Moved to another folder they are the same; CLIP, DINOv2 of other weights are refused before anything is trained."""
    for folder in ("mine", "moved", "other"):
        for name in ("clip-vit-large-patch14", "dinov2-base"):
            os.makedirs(f"{folder}/{name}")
    Path("other/clip-vit-large-patch14/weight.txt").write_text("another")
    run(*coco, "./lat", "--encoders", "mine", "--vae", "mine/dinov2-base/")
    record = fid.made_of("lat")
    assert record["text"].startswith(os.path.abspath("mine/clip-vit-large-patch14, crc32")) and "dinov2-base, " in record["vae"]
    base = "--data lat --out o --stage pretrain --steps 1 --batch 4 --size 2x1 --nfe 2".split()
    run(*base, "--encoders", "moved")
    assert script.vae_of(script.parse(base)).identity == record["vae"]
    exit_code, err = code([*base, "--out", "p", "--encoders", "other"], capsys, main=script.main)
    assert exit_code == 2 and re.search("lat was made by the text .*mine/clip.*, crc32 .*, not by .*other/clip", err)
    assert len(err.strip().splitlines()) == 1 and not os.path.exists("p/pretrain.pt")


def test_features_of_uvit_are_read(coco, capsys):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        os.makedirs(f"u/{part}")
        for i in range(3):
            moments = np.concatenate([np.full((4, 8, 8), i), np.full((4, 8, 8), 2 * np.log(0.5))])
            np.save(f"u/{part}/{i}.npy", moments.astype(np.float32))
            for j in range(5 + (i == 1)):
                np.save(f"u/{part}/{i}_{j}.npy", np.full((7, 6), 10 * i + j, np.float32))
    np.save("u/empty_context.npy", rng.normal(size=(7, 6)).astype(np.float32))
    os.makedirs("o")
    data = script.Coco("u", "o")
    raw, tokens, words = data.read(torch.tensor([1, 2]), torch.tensor([0.999, 0.5]))
    assert data.count == 3 and not tokens.numel() and words[:, 0, 0].tolist() == [15, 22]
    assert (raw[0, :4] == 1).all() and torch.allclose(raw[:, 4:], torch.tensor(0.5))
    assert data.validation([0, 1])[1].shape == (2, 7, 6)
    base = ["--data", "./u", "--steps", 1, "--batch", 4, "--trajectories", 2, "--size", "2x1", "--nfe", 2,
            "--out", "o"]
    exit_code, err = code([*base, "--stage", "pretrain"], capsys, main=script.main)
    assert exit_code == 3 and "--repa 0" in err and len(err.strip().splitlines()) == 1
    exit_code, err = code([*base, "--pretrain", "plain", "--stage", "mid"], capsys, main=script.main)
    assert exit_code == 3 and "--repa 0" in err          # post would need them too: said before the teacher is trained
    for stage in ("pretrain", "mid", "post"):
        run(*base, "--repa", 0, "--stage", stage)
    exit_code, err = code([*base, "--repa", 0, "--stage", "sample"], capsys, main=script.main)
    assert exit_code == 2 and "--prompts is empty" in err and len(err.strip().splitlines()) == 1
    os.rename("u/train/1_2.npy", "u/train/1_9.npy")
    fresh = [*base[:-1], "new", "--repa", 0, "--stage", "pretrain"]
    exit_code, err = code(fresh, capsys, main=script.main)
    assert exit_code == 3 and "gap" in err and "train/1_3.npy" in err
    os.rename("u/train/1_9.npy", "u/train/1_2.npy")
    Path("u/train/2.npy").write_bytes(Path("u/train/2.npy").read_bytes()[:-9])
    exit_code, err = code(fresh, capsys, main=script.main)
    assert exit_code == 3 and "u/train/2.npy" in err and "1 of " in err          # before the first step, not at its turn


@pytest.mark.parametrize("line", ["--stage encode --source coco", "--data ./lat --stage encode --source coco"])
def test_missing_encoder_packages_give_the_install_line(coco, line, monkeypatch, capsys):
    for missing in ("diffusers", "transformers"):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, missing, None)
            exit_code, err = code([*line.split(), "--out", "o"], capsys, main=script.main)
        assert exit_code == 3 and "pip install diffusers transformers" in err and len(err.strip().splitlines()) == 1
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "transformers", None)
        with pytest.raises(nets.WeightsError, match="pip install"):
            nets.CLIPText("x", "cpu").ids(["a"])


# ---- faults --------------------------------------------------------------------------------------
def pair(argv, patch=lambda: None):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [fork(argv, f"log{r}", r, 2, port, patch, main=script.main) for r in range(2)]


def stages(road, stage):
    extra = ["--teacher", road / "pretrain.pt", "--mid", "cmt" if stage == "mid" else "none"]
    return [*TINY, "--stage", stage, "--batch_gpu", 8, *(extra if stage != "pretrain" else [])]


@pytest.mark.parametrize("stage", [pytest.param("pretrain", marks=pytest.mark.long),
                                   pytest.param("mid", marks=pytest.mark.long), "post"])
def test_two_processes_give_the_result_of_one(road, stage):
    argv = [*stages(road, stage), "--steps", 4]
    run(*argv, "--out", "one")
    assert [wait(p) for p in pair([*argv, "--out", "two"])] == [0, 0], Path("log0").read_text()
    a, b = (weights(f"{d}/{stage}.pt") for d in ("one", "two"))
    assert torch.equal(a, b)
    a, b = ([json.loads(line) for line in open(f"{d}/metrics.jsonl")] for d in ("one", "two"))
    keys = ("loss", "mse_gap1", "mse_gap4") if stage == "mid" else ("loss", "mse_same", "repa")
    assert all(m[k] == pytest.approx(n[k], rel=1e-5) for m, n in zip(a, b) for k in keys) and len(a) == len(b) == 4


@pytest.mark.long
def test_two_processes_score_as_one(road):
    one = (road / "results.md").read_text()
    assert [wait(p) for p in pair([*TINY, "--out", road, "--stage", "eval"])] == [0, 0], Path("log0").read_text()
    assert (road / "results.md").read_text() == one


@pytest.mark.parametrize("stage", ["mid", "post"])
def test_stopped_runs_end_as_the_undisturbed_one(road, stage, monkeypatch):
    """Bit for bit; mid is stopped inside a solve."""
    argv = [*stages(road, stage), "--steps", 5]
    run(*argv, "--out", "whole")
    with monkeypatch.context() as m:
        m.setattr(script, "count", stop_in(3))
        with pytest.raises(SystemExit):
            run(*argv, "--out", "cut")
    script.STOP.clear()
    assert nets.load_checkpoint(f"cut/{stage}.pt")["step"] == 3
    run(*argv, "--out", "cut")
    assert torch.equal(weights(f"whole/{stage}.pt"), weights(f"cut/{stage}.pt"))


@pytest.mark.long
@pytest.mark.parametrize("stage", ["pretrain", "mid", "post"])
def test_killed_or_stopped_runs_end_as_the_undisturbed_one(road, stage):
    """kill -9, then SIGTERM (exit code 75), then to the end: bit for bit one quiet run."""
    argv, path = [*stages(road, stage), "--steps", 8, "--save_every", 3], Path("cut/metrics.jsonl")
    whole = fork([*argv, "--out", "whole"], "log0", main=script.main)
    pid = fork([*argv, "--out", "cut"], "log1", main=script.main)
    while not path.exists() or '"step": 4,' not in path.read_text():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), Path("log1").read_text()[-2000:]
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    stop = lambda: setattr(script, "count", stop_in(2))                              # noqa: E731
    assert wait(fork([*argv, "--out", "cut"], "log2", patch=stop, main=script.main)) == 75, Path("log2").read_text()
    run(*argv, "--out", "cut")
    assert wait(whole) == 0 and torch.equal(weights(f"whole/{stage}.pt"), weights(f"cut/{stage}.pt"))


def test_a_step_that_is_not_finite_is_skipped_and_ten_end_the_run(monkeypatch, capsys):
    real, calls, bad = script.loss_sit, [], {2}

    def faulty(*a):
        loss, square = real(*a)
        return loss * (float("nan") if calls.append(1) or len(calls) in bad else 1), square
    monkeypatch.setattr(script, "loss_sit", faulty)
    run(*TINY, "--stage", "pretrain", "--steps", 4, "--out", "few", "--save_every", 1)
    assert nets.load_checkpoint("few/pretrain.pt")["skipped"] == 1
    bad.update({6})                                      # the moments of the step before would move the weights
    run(*TINY, "--stage", "pretrain", "--steps", 2, "--out", "two", "--save_every", 1)
    before, after = (torch.load(f"two/pretrain.pt{k}", weights_only=True) for k in (".prev", ""))
    assert (before["step"], after["step"], after["skipped"]) == (1, 2, 1)
    assert all(torch.equal(before["net"][k], v) for k, v in after["net"].items())
    moments = [ckpt["opt"]["state"][0]["exp_avg"] for ckpt in (before, after)]
    assert torch.equal(*moments) and moments[0].abs().max() > 0
    bad.update(range(8, 99))
    argv = [*TINY, "--stage", "pretrain", "--steps", 30, "--save_every", 2, "--out", "many"]
    exit_code, err = code(argv, capsys, main=script.main)
    assert exit_code == 4 and "not finite in 10 steps" in err
    assert all(torch.isfinite(v).all() for v in nets.load_checkpoint("many/pretrain.pt")["net"].values())


def test_stages_with_different_guidance_are_refused(road, tmp_path, capsys):
    """The scale is in the checkpoints; another (omega, kappa) of the same scale is the same flow."""
    base = [*TINY, "--steps", 1, "--out", tmp_path, "--teacher", road / "pretrain.pt"]
    run(*base, "--stage", "mid", "--omega", 0.5, "--kappa", 0.5)
    exit_code, err = code([*base, "--stage", "post"], capsys, main=script.main)
    assert exit_code == 2 and "mid.pt was trained with guidance 1 " in err and len(err.strip().splitlines()) == 1
    assert code([*base, "--stage", "eval"], capsys, main=script.main)[0] == 2    # the table would name another scale
    run(*base, "--stage", "post", "--omega", 0.2, "--kappa", 0.8)


def test_data_that_changed_between_two_runs_are_refused(monkeypatch, capsys):
    argv = [*TINY, "--stage", "pretrain", "--steps", 9, "--out", "o"]
    monkeypatch.setattr(script, "count", stop_in(2))
    assert code(argv, capsys, main=script.main)[0] == 75
    script.STOP.clear()
    pixels, labels = fid.digits()
    monkeypatch.setattr(fid, "digits", lambda: (pixels.flip(3), labels))
    exit_code, err = code(argv, capsys, main=script.main)
    assert exit_code == 2 and "--data or --teacher has changed" in err and len(err.strip().splitlines()) == 1


def test_default_net_has_the_size_of_the_paper():
    tokens = torch.zeros(1, 256, 768)
    images = types.SimpleNamespace(shape=(4, 32, 32), read=lambda i, p: [0, tokens])
    count = []
    for flags in ([], ["--repa", "0"]):
        model = script.model_size(script.parse(["--stage", "pretrain", *flags]), images, 768)
        with torch.device("meta"):
            count.append(sum(p.numel() for p in nets.MMDiT(**model).parameters()) / 1e6)
    assert count[1] == pytest.approx(505.07, abs=0.005) and count[0] - count[1] == pytest.approx(7.34, abs=0.005)


def test_a_net_of_another_kind_is_refused(capsys):
    torch.save(nets.DiT(4, 2, 1, 32, 1, 1, num_classes=2).state_dict(), "dit.pt")
    exit_code, err = code([*TINY, "--stage", "mid", "--teacher", "dit.pt", "--out", "o"], capsys, main=script.main)
    assert exit_code == 3 and "dit.pt: no MM-DiT" in err and len(err.strip().splitlines()) == 1


BAD = [
    ("--omega 0", 2, "--omega 0.0"),
    ("--kappa 1", 2, "--kappa 1.0 is not possible; it must be in [0, 1)"),
    ("--guide_from 0.9 --guide_to 0.5", 2, "must not be above --guide_to 0.5"),
    ("--ratio 2", 2, "--ratio 2.0"),
    ("--repa -1", 2, "--repa -1.0"),
    ("--size dit-xl/2", 2, "neither mmdit/2 nor PATCHxDEPTH"),
    ("--stage pretrain --size 3x2", 2, "--size 3x2: its patches do not fill the 8 pixels"),
    ("--stage pretrain --size 16x2", 2, "--size 16x2: its patches do not fill the 8 pixels"),
    ("--stage mid --trajectories 7", 2, "must fill whole batches"),
    ("--stage mid", 3, "run --stage pretrain first"),
    ("--stage mid --teacher none.pt", 3, "none.pt: no such file"),
    ("--stage eval", 3, "no finished stage"),
    ("--stage sample", 3, "no finished stage"),
    ("--data coco --stage encode --source nowhere", 3, "--source nowhere holds no annotations/captions_train2014.json"),
    ("--data coco --stage encode", 3, "--source FOLDER holds no annotations"),
    ("--stage post", 3, "run --stage mid first"),
    ("--data coco --stage pretrain", 3, "coco256-sd is not there"),
    ("--data ./none --stage pretrain", 3, "none is not there"),
    ("--data cocoo", 2, "did you mean coco?"), ("--data ./cocoo", 3, "cocoo is not there; make latents by --stage encode --source FOLDER, or pass --data FOLDER, coco or digits"),
    ("--promts a", 2, "unrecognized arguments: --promts"),
]


@pytest.mark.parametrize("line, expected, text", BAD, ids=[b[0] for b in BAD])
def test_bad_input_is_one_line_with_its_exit_code(line, expected, text, capsys):
    exit_code, err = code(["--data", "digits", *line.split()], capsys, main=script.main)
    assert exit_code == expected and text in err and len(err.strip().splitlines()) == 1, err


def test_a_slug_names_one_caption():
    assert script.slug("the digit seven") == "the-digit-seven"
    slugs = {script.slug(c) for c in ("A cat!", "a cat", "a  cat", "a cat.", "\u4e2d\u6587", "a/../b", "x" * 300, "x" * 301)}
    assert len(slugs) == 8 and all("/" not in s and "." not in s and len(s) < 60 for s in slugs)


def test_a_run_without_mid_training_in_the_folder_alone_is_shown_beside(road):
    alone_is_shown(script, road, TINY)
