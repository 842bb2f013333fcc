"""train_cmt_imagenet.py: every stage on digits, both --post, EDM2's data, encoding, guidance, resume, two processes."""
import io
import json
import os
import re
import signal
import socket
import sys
import time
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import conftest
from conftest import alone_is_shown, code, fork, wait, weights
from PIL import Image

import nets
import solvers
import train_cmt_imagenet as script

pytestmark = pytest.mark.usefixtures("here")
TINY = [*conftest.TINY, "--nfe", "8", "--vgg.steps", "3"]


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    """One whole run of a few steps: pretrain, vgg, mid, post, eval."""
    out = tmp_path_factory.mktemp("imagenet")
    script.main([*TINY, "--out", str(out), "--steps", "3"])
    return out


def cfg(*argv):
    return script.parse([str(a) for a in argv])


# ---- the road ------------------------------------------------------------------------------------
def test_all_stages_leave_checkpoints_pictures_and_a_table(road):
    for stage in ("pretrain", "vgg", "mid", "post"):
        c = torch.load(road / f"{stage}.pt", weights_only=True)
        assert c["step"] == 3 and all(torch.isfinite(v).all() for v in c["ema"].values())
    table = (road / "results.md").read_text()
    assert re.search(r"\| teacher \| 3 \| 48 \| \d+ \| \d+\.\d\d \| - \| \d+\.\d\d \|", table), table
    assert re.search(r"\| post \| 3 \| 48 \| \d+ \| \d+\.\d\d \| \d+\.\d\d \| - \|", table), table
    assert "balanced labels" in table and "FID" not in table.replace("fid", "")
    for name in ("samples_teacher_8step", "samples_mid_1step", "samples_post_2step", "stages", "trajectory", "curve", "previews/mid_0000003"):
        assert Image.open(road / f"{name}.png").size[0] >= 900


@pytest.mark.parametrize("flags", ["--post ecd --mid none", "--post ecd_euler --mid none", "--post ecd_code --mid none", "--init random --mid none",
                                   "--loss l2 --batch_gpu 8 --precision bf16", "--loss huber --dropout 0.3", "--loss l2 --precision fp16"])
def test_variants_train(road, tmp_path, flags):
    stage = "post" if "--mid none" in flags else "mid"
    script.main([*TINY, "--out", str(tmp_path), "--teacher", str(road / "pretrain.pt"), "--steps", "2", "--stage", stage,
                 *flags.split()])
    assert torch.load(tmp_path / f"{stage}.pt", weights_only=True)["skipped"] == 0


def test_guide_changes_the_teacher_of_ecd_and_its_samples(road, tmp_path):
    torch.manual_seed(0)
    state = torch.load(road / "pretrain.pt", weights_only=True)
    guide = {k: v + 0.3 * torch.randn_like(v) if v.ndim else v + 0.5 for k, v in state["ema"].items()}
    torch.save({"ema": guide, "model": state["model"]}, "guide.pt")
    base = [*TINY, "--teacher", road / "pretrain.pt", "--guide", "guide.pt", "--w", "2.0", "--steps", "1", "--stage", "post",
            "--mid", "none", "--post"]
    for post in ("ecd", "ect"):
        script.main([str(a) for a in [*base, post, "--out", post]])
    assert not torch.equal(weights("ecd/post.pt"), weights("ect/post.pt"))
    c = cfg(*base[:-1])
    net = script.build(c, state["model"], state["ema"], "teacher")
    guided, plain = (script.make_sampler(one, net, "teacher")([0, 1]) for one in (c, replace(c, guide="")))
    assert (plain - guided).abs().max() > 1e-3


def test_teachers_of_ecd_are_known_by_their_weights(road, capsys):
    """Under other names a finished or begun stage goes on; with other weights it is refused, by the name of the flag."""
    state = torch.load(road / "pretrain.pt", weights_only=True)
    for name in ("main", "guide", "copy", "other"):
        state["ema"]["unet.out_gain"] = torch.tensor(0.5 if name == "other" else 1.0)
        torch.save({"ema": state["ema"], "model": state["model"]}, f"{name}.pt")
    base = [*TINY, "--teacher", road / "pretrain.pt", "--w", "2.0", "--stage", "post", "--mid", "none", "--post", "ecd", "--out", "x",
            "--decay", "constant"]
    for steps in ("1", "1", "2"):
        script.main([str(a) for a in [*base, "--main", "main.pt", "--guide", "guide.pt", "--steps", steps]])
    for steps in ("2", "3"):
        script.main([str(a) for a in [*base, "--main", "copy.pt", "--guide", "./guide.pt", "--steps", steps]])
        for flag in ("--main", "--guide"):
            words = [*base, "--main", "main.pt", "--guide", "guide.pt", flag, "other.pt", "--steps", steps]
            exit_code, err = code(words, capsys, script.main)
            assert exit_code == 2 and "saw 1797 images" in err and "main crc32" in err and len(err.strip().splitlines()) == 1
    assert nets.load_checkpoint("x/post.pt")["step"] == 3


def test_own_images_that_no_distance_measures_are_refused_before_the_first_stage(capsys):
    for mode, side, text in (("L", 16, "not 1x16x16"), ("RGB", 8, "not 3x8x8"), ("RGB", 24, "needs (3, 16, 16)")):
        os.makedirs(f"{mode}{side}")
        Image.new(mode, (side, side)).save(f"{mode}{side}/a.png")
        argv = ["--data", f"{mode}{side}", "--res", 8 if side == 8 else 16, "--teacher", "scratch", "--out", "x", "--batch", 8,
                "--trajectories", 8]
        exit_code, err = code(argv, capsys, script.main)
        *_, line = err.strip().splitlines()
        assert exit_code in (2, 3) and text in line and not os.path.exists("x/log.txt"), err


def test_a_frozen_teacher_equals_the_net_that_was_saved(road):
    state = torch.load(road / "pretrain.pt", weights_only=True)
    c = cfg(*TINY, "--stage", "mid")
    frozen = script.build(c, state["model"], state["ema"], "teacher")
    net = nets.EDM2Precond(**state["model"]).eval()
    nets.load_weights(net, state["ema"], "")
    x, sigma, y = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0, 80.0]), torch.eye(10)[:4]
    with torch.no_grad():
        assert torch.allclose(frozen(x, sigma, y), net(x, sigma, y), atol=1e-5)


def test_samples_depend_on_their_seed_alone_and_labels_are_as_named(road):
    state = torch.load(road / "post.pt", weights_only=True)
    c = cfg(*TINY, "--stage", "sample")
    net = script.build(c, state["model"], state["ema"], "post")
    f = script.make_sampler(c, net, 2)
    assert torch.allclose(f([5, 6, 7])[1], f([6])[0], atol=1e-5)
    _, y, _ = script.prior(net, range(25), "balanced")
    assert y.argmax(1).tolist() == [s % 10 for s in range(25)]
    x_T, y, _ = script.prior(net, range(200), "random")
    assert len(set(y.argmax(1).tolist())) == 10 and torch.equal(x_T, script.prior(net, range(200), "balanced")[0])


def test_dropout_of_the_student_is_at_16_pixels_and_below_of_the_teacher_everywhere():
    """B.3, as ECT; EDM2 itself at all resolutions. Frozen nets have none."""
    model = dict(img_resolution=32, img_channels=3, label_dim=2, model_channels=16, channel_mult=(1, 1), num_blocks=1, attn_resolutions=())
    for stage, train, expected in (("mid", True, [0, 0.3]), ("pretrain", True, [0.3, 0.3]), ("pretrain", False, [0, 0])):
        unet = script.build(cfg("--stage", stage, "--dropout", "0.3"), model, train=train).unet
        assert [unet.enc[f"{res}x{res}_block0"].dropout for res in (32, 16)] == expected


def test_a_resumed_post_stage_needs_neither_teacher_nor_mid(road, monkeypatch):
    argv = [*TINY, "--out", "x", "--stage", "post", "--steps", "4"]
    os.makedirs("x")
    for name in ("pretrain.pt", "mid.pt"):
        os.link(road / name, f"x/{name}")
    real = script.total

    def stopping(*args):
        script.STOP.append(signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(script, "total", stopping)
    with pytest.raises(SystemExit) as e:
        script.main(argv)
    assert e.value.code == 75
    monkeypatch.setattr(script, "total", real)
    monkeypatch.setattr(script, "STOP", [])
    os.remove("x/pretrain.pt")
    os.remove("x/mid.pt")
    script.main(argv)
    assert torch.load("x/post.pt", weights_only=True)["step"] == 4


# ---- the losses ----------------------------------------------------------------------------------
def test_ecd_takes_one_guided_heun_step():
    """By hand: D_g = g + w (m - g); d = (x - D_g(x, t)) / t; x' = x + (r - t) d; x_r = x + (r - t) (d + d') / 2."""
    def main(x, s, y):
        return x / (1 + s.view(-1, 1, 1, 1)) + y.sum()

    def weak(x, s, y):
        return x / (2 + s.view(-1, 1, 1, 1))
    w, t, r = 1.7, torch.tensor([2.0, 0.5]), torch.tensor([1.9, 0.4])
    x, y = torch.randn(2, 3, 4, 4), torch.full((2, 1), 0.25)
    D = script.autoguided(main, weak, w)
    T, R = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
    d = (x - (weak(x, t, y) + w * (main(x, t, y) - weak(x, t, y)))) / T
    x_ = x + (R - T) * d
    d_ = (x_ - (weak(x_, r, y) + w * (main(x_, r, y) - weak(x_, r, y)))) / R
    assert torch.allclose(solvers.ode_step(lambda x, s: D(x, s, y), x, t, r, 2), x + (R - T) * (d + d_) / 2, atol=1e-5)
    assert script.autoguided(main, None, 3.0) is main and script.autoguided(main, weak, 1) is main


def test_pairs_carry_the_class_of_their_trajectory():
    def teacher(x, s, y):                             # pulls each trajectory to the number of its class
        return y.argmax(1).float().view(-1, 1, 1, 1).expand_as(x)
    g = torch.Generator().manual_seed(0)
    cfg = script.parse("--data digits --stage mid --nfe 8 --trajectories 6".split())
    x_t, t, y, owner, x_0 = script.teacher_pairs(cfg, teacher, (1, 8, 8), g, 10)
    assert x_t.shape == (48, 1, 8, 8) and len(set(y.argmax(1).tolist())) > 2
    assert torch.allclose(x_0[owner].mean((1, 2, 3)), y.argmax(1).float(), atol=1e-2)
    late = t < 0.01
    assert torch.allclose(x_t[late].mean((1, 2, 3)), y[late].argmax(1).float(), atol=1e-2)


def test_edm2_loss_by_hand_and_its_weight():
    def net(x, sigma, return_logvar):
        return torch.zeros_like(x), torch.full((len(x), 1, 1, 1), 0.5)
    x, sigma = torch.ones(2, 1, 2, 2), torch.tensor([0.5, 0.5])
    weight = (0.25 + 0.25) / 0.0625
    assert script.loss_edm2(net, x, sigma, x).item() == pytest.approx(4 * (weight / np.exp(0.5) + 0.5))
    assert script.edm_weight(sigma).tolist() == pytest.approx([weight] * 2)


@pytest.mark.parametrize("std, gamma", [(0.010, 96.995), (0.050, 16.972), (0.075, 10.289), (0.100, 6.937)])
def test_power_function_ema_has_the_published_exponents(std, gamma):
    cfg = script.Config(ema_std=std)
    assert script.ema_beta(cfg, 1) == pytest.approx(0.5 ** (gamma + 1), rel=1e-3)
    assert script.ema_beta(cfg, 0) == 0 and script.ema_beta(script.Config(ema_beta=0.9), 7) == 0.9


def test_learning_rates():
    c = cfg("--stage", "pretrain")
    assert script.lr_at(c, 0) == pytest.approx(7e-3 / 4884) and script.lr_at(c, 35_000 * 4) == pytest.approx(3.5e-3)
    c = cfg("--res", "512", "--stage", "vgg")
    assert [round(script.lr_at(c, int(p * c.steps)), 5) for p in (0.29, 0.31, 0.61, 0.91)] == [0.1, 0.01, 0.001, 0.0001]
    c = cfg("--stage", "mid")
    assert script.lr_at(c, 0) == 7e-4 and script.lr_at(c, 25_000) == pytest.approx(3.5e-4)


def test_presets_are_those_of_the_paper():
    c = cfg("--res", "64", "--stage", "mid")
    assert (c.steps * c.batch, c.lr, c.dropout, c.nfe, c.loss) == (6_400_000, 7e-4, 0.5, 16, "lpips")
    c = cfg("--res", "64", "--stage", "post")
    assert (c.steps * c.batch, c.lr, c.q, c.huber_c, c.ema_beta, c.decay) == (6_400_000, 1e-4, 512, 0.06, 0.9999, "linear")
    for post in ("ecd", "ecd_euler"):
        c = cfg("--res", "64", "--stage", "post", "--post", post)
        assert (c.steps * c.batch, c.q, c.decay, c.w) == (12_800_000, 256, "constant", 1.7)
    c = cfg("--res", "512", "--stage", "mid")
    assert (c.steps * c.batch, c.lr, c.dropout, c.loss, c.ensemble) == (12_800_000, 2e-4, 0, "elatent", "bgcfnc")
    c = cfg("--res", "512", "--stage", "post")
    assert (c.post, c.steps * c.batch, c.q, c.lr, c.decay, c.w) == ("ecd", 12_800_000, 1024, 1e-4, "constant", 2.05)
    c = cfg("--res", "512", "--stage", "post", "--post", "ecd_code")
    assert (c.steps * c.batch, c.q, c.lr) == (16_000_000, 1024, 1e-6)


def test_ensembled_distance_sees_both_images_alike():
    elatent = nets.ELatentLPIPS(ensemble="bgcfnc")
    x = torch.randn(1, 4, 32, 32)
    y = x + 0.5 * torch.randn_like(x)

    def seen(a, b, seed):
        views = elatent.draw(x, torch.Generator().manual_seed(seed))
        assert [*views] == elatent.views == ["affine", "colour", "gains", "noise", "mask"]
        return script.loss_cmt_views(lambda x_t, t: a, None, None, b, elatent, views.values()).item()
    assert seen(x, x, 1) == 0 < seen(x, y, 1) == seen(x, y, 1)
    assert len({elatent(x, y).item(), seen(x, y, 1), seen(x, y, 2)}) == 3


# ---- data ----------------------------------------------------------------------------------------
def folder_of_pictures(counts, size=(80, 70)):
    """A folder with a folder of pictures per class, as ImageNet's."""
    rng = np.random.default_rng(0)
    for k, n in enumerate(counts):
        os.makedirs(f"in/n{k:08d}")
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(f"in/n{k:08d}/{i}.png")


def test_encode_at_64_crops_labels_and_goes_on_where_it_was(monkeypatch, capsys):
    folder_of_pictures([3, 2])
    os.makedirs("data")
    argv = ["--stage", "encode", "--res", "64", "--source", "in", "--out", "x"]
    script.main(argv)
    part, when = Path("data/imagenet64.zip.parts/00000.npy"), os.stat("data/imagenet64.zip").st_mtime_ns
    made = part.stat().st_mtime_ns
    images = script.load_data(cfg("--res", "64"))
    assert images.labels.tolist() == [0, 0, 0, 1, 1] and images.read(torch.tensor([0, 4])).shape == (2, 3, 64, 64)
    expected = script.fid.crop(Image.open("in/n00000001/1.png").convert("RGB"), 64)
    assert np.array_equal(images.image(4).permute(1, 2, 0).numpy(), np.asarray(expected))
    script.main(argv)
    assert part.stat().st_mtime_ns == made and os.stat("data/imagenet64.zip").st_mtime_ns == when       # nothing to do
    with zipfile.ZipFile("data/imagenet64.zip") as z:
        assert z.namelist() == [f"00000/img{i:08d}.png" for i in range(5)] + ["dataset.json"]
        assert Image.open(z.open("00000/img00000004.png")).mode == "RGB"
    zipfile.ZipFile("data/imagenet64.zip").extractall("folder")
    same = script.load_data(cfg("--data", "folder"))
    assert torch.equal(same.read(torch.arange(5)), images.read(torch.arange(5))) and same.names == images.names
    exit_code, err = code(["--res", "512", "--data", "folder", "--stage", "post", "--mid", "none", "--out", "y", "--loss", "l2",
                           "--ensemble", "none", "--guide", "", "--main", ""], capsys, script.main)
    assert exit_code == 3 and "(3, 64, 64); --res 512 needs (8, 64, 64)" in err


def test_512_without_diffusers_names_the_line_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    script.load_vae.cache_clear()
    folder_of_pictures([1])
    exit_code, err = code(["--res", "512", "--stage", "encode", "--source", "in", "--out", "x"], capsys, script.main)
    assert exit_code == 3 and "pip install diffusers" in err and len(err.strip().splitlines()) == 1


class Vae:
    """Encodes an image to its 8x8 mean colour (4 channels, deviation 0.1), decodes by repeating it."""
    identity = "a stub, crc32 0"

    def encode(self, x):
        assert x.shape[1:] == (3, 512, 512) and 0 <= x.min() and 0.9 < x.max() <= 1
        mean = torch.nn.functional.avg_pool2d(x[:, [0, 1, 2, 0]], 8)
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.1)))

    def decode(self, z):
        return types.SimpleNamespace(sample=z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))


def test_latents_are_encoded_and_decoded_as_edm2_does(monkeypatch):
    folder_of_pictures([1], (520, 600))
    os.makedirs("data")
    monkeypatch.setattr(script, "load_vae", lambda *a: Vae())
    script.main(["--stage", "encode", "--res", "512", "--source", "in", "--out", "x"])
    images = script.load_data(cfg("--res", "512"))
    raw = images.read(torch.tensor([0]))
    assert raw.shape == (1, 8, 64, 64) and images.names == ["00000/img-mean-std-00000000.npy"] and (raw[:, 4:] == 0.1).all()
    zero, one = torch.zeros(1, 4, 64, 64), torch.ones(1, 4, 64, 64)
    x = script.to_input(raw, zero)
    assert x[0, 0, 0, 0].item() == pytest.approx(raw[0, 0, 0, 0].item() * 0.11990407 - 0.69664264, abs=1e-6)
    assert x[0, 3, 0, 0].item() == pytest.approx(raw[0, 3, 0, 0].item() * 0.15243903 + 0.32774392, abs=1e-6)
    assert (script.to_input(raw, one) - x)[0, 1].mean().item() == pytest.approx(0.1 * 0.10822511, rel=1e-3)
    back = script.to_images(cfg("--res", "512"), x)
    exact = (raw[:, :3] * 255).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert ((script.fid.to_uint8(back) - exact.floor()).abs() <= ((exact - exact.round()).abs() < 0.01)).all()      # as EDM2: floor(255 v)
    given = torch.tensor([-0.1, 0.0, 0.99 / 255, 1.6 / 255, 254.9 / 255, 1.1]).view(1, 1, 1, 6)
    monkeypatch.setattr(nets, "decode_latents", lambda vae, z: given)
    assert script.fid.to_uint8(script.to_images(cfg("--res", "512"), x)).flatten().tolist() == [0, 0, 0, 1, 254, 255]


def test_own_zip_trains_and_a_bad_picture_is_named(capsys):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile("own.zip", "w") as z:
        for i in range(4):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(buffer, "PNG")
            z.writestr(f"00000/img{i:08d}.png", buffer.getvalue() if i != 2 else b"broken")
        z.writestr("dataset.json", json.dumps({"labels": [[f"00000/img{i:08d}.png", i % 2] for i in range(4)]}))
    argv = ["--data", "own.zip", "--res", "16", "--stage", "post", "--mid", "none", "--batch", "8", "--out", "x", "--steps", "3"]
    model = dict(img_resolution=16, img_channels=3, label_dim=2, **nets.SIZES["edm2-8"])
    torch.save({"ema": nets.EDM2Precond(**model).state_dict(), "model": model}, "teacher.pt")
    exit_code, err = code([*argv, "--teacher", "teacher.pt"], capsys, script.main)
    labels, refused = err.strip().splitlines()
    assert exit_code == 3 and "img00000002.png" in refused and "1 of 4 pictures" in refused
    assert "2 classes of 2 to 2 pictures" in labels and not os.path.exists("x/post.pt")
    with zipfile.ZipFile("own.zip") as old, zipfile.ZipFile("bad.zip", "w") as new:
        new.writestr("00000/img00000000.png", old.read("00000/img00000000.png"))
        new.writestr("dataset.json", '{"labels": [["00000/other.png", 1]]}')
    argv[1] = "bad.zip"
    exit_code, err = code([*argv, "--teacher", "teacher.pt"], capsys, script.main)
    assert exit_code == 3 and "no label for 00000/img00000000.png" in err
    os.makedirs("mixed")
    for k, size in enumerate([(16, 16), (15, 16), (16, 14)]):
        Image.new("RGB", size).save(f"mixed/{k}.png")
    argv[1] = "mixed"                                                        # the remedy of several is said once
    exit_code, err = code([*argv, "--teacher", "teacher.pt"], capsys, script.main)
    assert exit_code == 3 and err.splitlines()[-1].endswith(
        "mixed: 1.png is uint8 (3, 16, 15), not (3, 16, 16); mixed: 2.png is uint8 (3, 14, 16), not (3, 16, 16); "
        "2 of 3 pictures cannot be used: make them alike by --stage encode --source FOLDER")


def test_pictures_are_read_once_and_known_by_their_contents(capsys, monkeypatch):
    """A repaired picture resumes, two of equal size that were exchanged do not pass; a stage reads what no stage has read."""
    rng = np.random.default_rng(0)
    for i in range(4):
        os.makedirs(f"own/{i % 2}", exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(f"own/{i % 2}/{i}.bmp")
    model = dict(img_resolution=16, img_channels=3, label_dim=2, **nets.SIZES["edm2-8"])
    torch.save({"ema": nets.EDM2Precond(**model).state_dict(), "model": model}, "teacher.pt")
    argv = ["--data", "./own", "--res", "16", "--stage", "post", "--mid", "none", "--batch", "4", "--out", "x", "--steps", "2",
            "--teacher", "teacher.pt", "--save_every", "1"]
    script.main(argv)
    whole, checks = {name: Path(name).read_bytes() for name in ("own/0/0.bmp", "own/0/2.bmp")}, []
    real = script.fid.check_pictures
    monkeypatch.setattr(script.fid, "check_pictures", lambda *a: checks.append(1) or real(*a))
    os.replace("x/post.pt.prev", "x/post.pt")
    script.main(argv)                                                         # goes on from step 1
    assert checks == [] and torch.load("x/post.pt", weights_only=True)["step"] == 2
    os.replace("x/post.pt.prev", "x/post.pt")
    Path("own/0/2.bmp").write_bytes(whole["own/0/2.bmp"][:100])
    exit_code, err = code(argv, capsys, script.main)
    assert exit_code == 3 and "own/0/2.bmp" in err and "1 of 4 pictures" in err
    Path("own/0/2.bmp").write_bytes(whole["own/0/2.bmp"])
    script.main(argv)
    assert checks == [1, 1] and torch.load("x/post.pt", weights_only=True)["step"] == 2
    os.replace("x/post.pt.prev", "x/post.pt")
    for one, other in zip(whole, reversed(whole)):
        Path(one).write_bytes(whole[other])
    exit_code, err = code(argv, capsys, script.main)
    assert exit_code == 2 and "--data or --teacher has changed" in err


def test_nothing_in_place_says_what_is_needed_and_mid_needs_no_data(capsys, monkeypatch):
    exit_code, err = code(["--res", "64"], capsys, script.main)
    lines = err.strip().splitlines()
    assert exit_code == 3 and "data/imagenet64.zip is not there" in lines[0] and "--res 64 --stage encode --source FOLDER" in lines[0]
    asked = []
    monkeypatch.setattr(nets, "fetch", lambda url, *a: asked.append(url) or script.fail(3, url))
    exit_code, err = code(["--res", "64", "--stage", "mid"], capsys, script.main)
    assert exit_code == 3 and asked == [nets.PRETRAINED["imagenet64"]] and "edm2-img64-xl-0671088-0.040.pkl" in err
    for flags, text in (["--res", "64"], "imagenet64.zip is not there"), (["--data", "digits", "--w", "2"], "weak.pkl: no such file"):
        exit_code, err = code([*flags, "--stage", "post", "--guide", "weak.pkl", "--post", "ecd"], capsys, script.main)
        assert exit_code == 3 and text in err


@pytest.mark.parametrize("line, text", [
    ("--res 64 --stage mid --loss elatent --teacher t", "--loss elatent does not measure --res 64"),
    ("--res 64 --stage mid --ensemble bg", "--ensemble bg belongs to --loss elatent"),
    ("--data digits --batch 30 --stage mid", "must fill whole batches of --batch 30"),
    ("--data imagenot --stage mid", "nor the name of a data set; did you mean imagenet?"), ("--res 128", "--res 128 is not possible"),
    ("--data digits --w 2", "--w 2.0: there is no --guide whose answer it weighs"),
    ("--data digits --mid.w nan", "--mid.w: mid never reads it")])
def test_bad_input_is_one_line(line, text, capsys):
    exit_code, err = code(line.split(), capsys, script.main)
    assert exit_code == 2 and text in err and len(err.strip().splitlines()) == 1


# ---- scale ---------------------------------------------------------------------------------------
def test_micro_batches_give_the_result_of_the_whole_batch(road):
    argv = [*TINY, "--stage", "post", "--mid", "none", "--steps", "3", "--teacher", str(road / "pretrain.pt")]
    for n in ("16", "4"):
        script.main([*argv, "--batch_gpu", n, "--out", n])
    a, b = (torch.load(f"{n}/post.pt", weights_only=True)["net"] for n in ("16", "4"))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-4


def test_random_views_are_those_of_a_pairs_place_in_the_batch():
    """ELatentLPIPS with views: micro-batches of one and the whole batch. Random weights: ReLUs switch by rounding (1e-3)."""
    model = dict(img_resolution=64, img_channels=4, label_dim=2, model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
                 channels_per_head=16)
    torch.save({"ema": nets.EDM2Precond(**model).state_dict(), "model": model}, "teacher.pt")
    vgg, found = nets.ELatentLPIPS().state_dict(), []
    for n in ("1", "2"):
        os.makedirs(n)
        torch.save({"ema": vgg, "step": 1, "cfg": {"steps": 1}}, f"{n}/vgg.pt")
        script.main(["--res", "512", "--stage", "mid", "--teacher", "teacher.pt", "--steps", "1", "--batch", "2", "--trajectories", "1",
                     "--nfe", "2", "--precision", "fp32", "--batch_gpu", n, "--out", n])
        found.append((torch.load(f"{n}/mid.pt", weights_only=True)["opt"]["state"][0]["exp_avg"],
                      json.loads(Path(n, "metrics.jsonl").read_text())["loss"]))
    (one, loss), (both, same) = found
    assert loss == pytest.approx(same, rel=1e-5) and (one - both).norm() < 1e-2 * both.norm()


@pytest.mark.parametrize("stage", [pytest.param("pretrain", marks=pytest.mark.long),
                                   pytest.param("vgg", marks=pytest.mark.long), "mid",
                                   pytest.param("post", marks=pytest.mark.long)])
def test_kill_and_signal_leave_the_undisturbed_result_and_two_processes_agree(road, stage):
    """Kill -9, then SIGTERM (code 75), then to the end: bit for bit one quiet run. Two processes: to rounding."""
    argv = [*TINY, "--stage", stage, f"--{stage}.steps", "10", "--batch_gpu", "8", "--save_every", "3", "--trajectories", "16",
            "--dropout", "0.2", "--loss", "l2" if stage == "mid" else "lpips", "--nfe", "2"]
    argv += ["--teacher", road / "pretrain.pt", "--mid", "none" if stage == "post" else "cmt"] if stage in ("mid", "post") else []

    def start(out, log="log", **kwargs):
        return fork([*argv, "--out", out], log, main=script.main, **kwargs)
    whole, pid, path, calls, real = start("whole"), start("cut", "log1"), Path("cut/metrics.jsonl"), [], script.total

    def stop_at_the_second_step(*args):
        calls.append(1)
        script.STOP.extend([signal.SIGTERM] * (len(calls) == 2))
        return real(*args)
    while not path.exists() or '"step": 4,' not in path.read_text():
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    assert wait(start("cut", patch=lambda: setattr(script, "total", stop_at_the_second_step))) == 75 and wait(start("cut")) == 0 and wait(whole) == 0
    a = weights(f"whole/{stage}.pt")
    assert torch.equal(a, weights(f"cut/{stage}.pt"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    assert [wait(p) for p in [start("two", f"log{r}", rank=r, world=2, port=port) for r in range(2)]] == [0, 0]
    assert (a - weights(f"two/{stage}.pt")).norm() / a.norm() < 1e-5


@pytest.mark.long
def test_512_runs_every_stage_on_latents_with_a_small_net(monkeypatch):
    """encode, vgg (the full one, 138M parameters), mid with an ensemble, ECD with autoguidance, samples decoded."""
    folder_of_pictures([3, 3], (520, 520))
    os.makedirs("data")
    monkeypatch.setattr(script, "load_vae", lambda *a: Vae())
    script.main(["--stage", "encode", "--res", "512", "--source", "in", "--out", "x"])
    model = dict(img_resolution=64, img_channels=4, label_dim=2, model_channels=16, channel_mult=(1, 1), num_blocks=1,
                 attn_resolutions=(), channels_per_head=16)
    for name in ("teacher", "guide"):
        torch.save({"ema": nets.EDM2Precond(**model).state_dict(), "model": model}, f"{name}.pt")
    base = ["--res", "512", "--out", "x", "--teacher", "teacher.pt", "--main", "teacher.pt", "--guide", "guide.pt", "--steps", "2",
            "--batch", "4", "--log_every", "1", "--trajectories", "2", "--nfe", "2"]
    for stage in ("vgg", "mid", "post"):
        script.main([*base, "--stage", stage])
        state = torch.load(f"x/{stage}.pt", weights_only=True)
        assert state["skipped"] == 0 and all(torch.isfinite(v).all() for v in state["net"].values())
        rule = state["opt"]["param_groups"][0]
        assert dict(vgg=rule.get("momentum") == 0.9, mid=rule.get("betas") == (0.9, 0.999), post=rule.get("betas") == (0.9, 0.99))[stage]
    script.main([*base, "--stage", "sample", "--seeds", "0-1"])
    assert Image.open("x/samples/post_2/000001.png").size == (512, 512)


def test_a_run_without_mid_training_in_the_folder_alone_is_shown_beside(road):
    alone_is_shown(script, road, TINY)
