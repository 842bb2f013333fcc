"""The training script through its own command line: every stage, two processes, own data, bad input. Faults: test_faults.py."""
import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import typing
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, code, frozen_calls, with_alone
from PIL import Image
from test_forks import ask_distance, faults

import fid
import nets
import train_cmt_cifar as script

pytestmark = pytest.mark.usefixtures("here")


# ---- the road ------------------------------------------------------------------------------------
def test_all_stages_leave_checkpoints_pictures_and_a_table(road):
    for stage in ("pretrain", "mid", "post"):
        c = torch.load(road / f"{stage}.pt", weights_only=True)
        assert c["step"] == 3 and all(torch.isfinite(v).all() for v in c["ema"].values())
    table = (road / "results.md").read_text()
    assert re.search(r"\| teacher \| 3 \| 48 \| \d+ \| \d+\.\d\d \| - \| \d+\.\d\d \|", table), table
    assert re.search(r"\| post \| 3 \| 48 \| \d+ \| \d+\.\d\d \| \d+\.\d\d \| - \|", table), table
    assert "FD-digits" in table and "FID" not in table.replace("fid", "") and "none" not in table
    assert script.fid.HALVES in table and "0.78" in table and "pretrain, mid, post took " in table
    for name in ("stages", "trajectory", "curve", "previews/mid_0000003"):
        assert Image.open(road / f"{name}.png").size[0] >= 900
    lines = [json.loads(line) for line in (road / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if m["stage"] == "mid"] == [1, 2, 3]
    assert all(m["loss"] > 0 < m["grad"] and m["skipped"] == 0 for m in lines if m["stage"] == "mid")
    assert {"1-step FD-digits", "2-step FD-digits"} <= {m.get("metric") for m in lines}
    log = (road / "log.txt").read_text()
    assert "--data digits" in log and torch.__version__ in log and " left, " in log and " with the next stages" in log and "images/s" in log


def test_finished_stages_are_skipped_and_left_alone(road, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in road.glob("*.pt")}
    script.main([*TINY, "--out", str(road), "--steps", "3"])
    assert "nothing to do" in capsys.readouterr().out
    script.main([*TINY, "--out", str(road), "--steps", "3", "--stage", "mid"])
    said = capsys.readouterr().out
    assert f"mid: done; open curve.png and previews in {road}; to draw and score it: python train_cmt_cifar.py" in said
    argv = said.rpartition("train_cmt_cifar.py ")[2].split()                     # as if the stage had been one of a road
    assert script.parse(argv) == replace(script.parse([*TINY, "--out", str(road), "--stage", "eval"]), **{k: vars(script.parse(argv))[k] for k in (
        "batch", "trajectories", "log_every")}) and argv.count("--samples") == 1 and "--lr" not in argv
    assert before == {p.name: p.stat().st_mtime_ns for p in road.glob("*.pt")}


@pytest.mark.parametrize("home, argv, words", [
    (script, ["--data", "digits", "--loss", "l2"], "was made with --loss huber, now l2"), (script, [], "was made with --data digits, now cifar10"),
    (script, ["--data", "digits", "--mid", "none"], "was made with --mid cmt, now none"),
    (importlib.import_module("train_cmt_imagenet"), ["--data", "digits"], "was made with script train_cmt_cifar.py, now train_cmt_imagenet.py; use another --out"),
    (importlib.import_module("train_cmt_imagenet"), ["--data", "digits", "--loss", "l2"], "now train_cmt_imagenet.py; use another --out, or the flags of then; a copy of that script keeps its teacher by --teacher ")])
def test_what_is_drawn_was_made_by_the_command_that_draws(road, home, argv, words, capsys):
    """Else the samples of another loss, script or data set are shown in silence. A teacher elsewhere is missed in a line."""
    for stage in ("sample", "eval"):
        with pytest.raises(SystemExit) as stop:
            home.main([*argv, "--stage", stage, "--out", str(road)])
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_knobs_of_what_is_drawn_are_compared_with_what_made_it(road, capsys):
    """The first that differs is named; what a stage never reads, or made it, may be said."""
    for flags, words in {"--stage sample --batch 7 --lr 9": "with --batch 16, now 7;", "--stage eval --steps 5000": "--steps 3, now 5000;"}.items():
        exit_code, err = code([*TINY, "--out", road, *flags.split()], capsys)
        assert exit_code == 2 and words in err and len(err.splitlines()) == 1, err
    script.main([*TINY, "--out", str(road), "--stage", "sample", "--seeds", "0", "--pretrain.lr", "1.0"])
    assert "sample reads no --pretrain.lr" in capsys.readouterr().out
    log = (road / "log.txt").read_bytes()
    assert code(["--data", "digits", "--out", road], capsys, importlib.import_module("train_t2i_coco").main)[0] == 2
    assert (road / "log.txt").read_bytes() == log                            # a stranger's command is no part of a run
    script.fid.same_folder(script.parse([*TINY, "--stage", "eval", "--out", str(road)]), script.__file__,
                           [*TINY, "--stage", "eval", "--out", str(road), "--mid.lr", "0.002", "--mid.q", "9", "--mid.batch_gpu", "4"])
    forked = {stage: dict(c, script="mine.py") for stage, c in json.loads((road / "config.json").read_text()).items()}
    os.makedirs("forked")
    Path("forked/config.json").write_text(json.dumps(forked))                # a fork that has got another name
    script.fid.same_folder(script.parse([*TINY, "--out", "forked"]), "mine2.py", [*TINY, "--out", "forked"])


def test_samples_of_other_knobs_lie_in_a_folder_of_their_own(tmp_path):
    cfg = script.parse(["--data", "digits", "--stage", "sample", "--out", "x"])
    assert script.fid.samples_folder(cfg, "mid", 2) == "x/samples/mid_2"
    assert script.fid.samples_folder(replace(cfg, second_sigma=0.3), "mid", 1) == "x/samples/mid_1"             # one step has no second level
    other = replace(cfg, second_sigma=0.3, sigma_shift=0.003)
    assert len({script.fid.samples_folder(c, "mid", 2) for c in (cfg, other, replace(other, second_sigma=0.03))}) == 3
    assert script.fid.samples_folder(replace(cfg, second_sigma=0.3), "mid", 2) == "x/samples/mid_2_second_sigma_0.3"


def test_the_time_of_mid_training_counts_the_calls_of_its_teacher():
    said = []
    for flags in "", "--mid slow", "--mid kd", "--nfe 32 --trajectories 64":
        c = script.parse(["--data", "digits", "--stage", "mid", *flags.split()])
        said.append(float(re.search(r"; ([\d.]+) (s|min) to", script.fid.overview([(c.steps, c)], torch.device("cpu"), c))[1]))
    assert said == [39, 116, 3.0, 39], said                                  # s, s, min, s


@pytest.mark.parametrize("name, flags", [("cmt_cifar", "--trajectories 0 --batch 8"), ("cmt_cifar", "--trajectories 0 --nfe 0"),
                                         ("cmt_imagenet", "--nfe 0"), ("mf_imagenet256", "--nodes 1"), ("t2i_coco", "--nodes 1")])
def test_a_dry_run_of_a_solve_that_is_refused_ends_in_its_line(name, flags, capsys):
    """Its trajectories give no pairs: the seconds of the first line would divide by them."""
    exit_code, err = code(["--data", "digits", "--dry_run", *flags.split()], capsys, importlib.import_module(f"train_{name}").main)
    assert exit_code == 2 and "Traceback" not in err and re.search("must (fill whole|be in 2)|is not possible", err)


@pytest.mark.parametrize("flags, trains", [("--ema_beta 1.5", ""), ("--batch -4", ""), ("--post.lr 0", "pretrain 2,000 steps of 32, mid 900 steps of 32;"),
                                           ("--mid.trajectories 3", "pretrain 2,000 steps of 32, post 600 steps of 32;")])
def test_a_dry_run_does_not_count_with_what_it_refuses(flags, trains, capsys):
    """An average that grows, a batch below 0, pairs that fill no batch: their steps, seconds and warnings would be nonsense."""
    with pytest.raises(SystemExit) as stop:
        script.main(["--data", "digits", "--dry_run", *flags.split()])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1 and (f"to train: {trains}" if trains else "finished or not needed: none") in said.out and "keeps" not in said.out
    assert "to train: nothing" not in said.out
    odd = [s for s in script.STAGES if s in said.out.partition("(see above): ")[2].splitlines()[0].split(", ")]
    assert odd and f"(see above): {', '.join(odd)}\n" in said.out and "drawn and scored" not in said.out         # in their order


def test_a_method_may_have_words_of_its_own(road, monkeypatch):
    """ABOUT goes by stage, or by stage and method, and the latter is no stage."""
    monkeypatch.setitem(script.ABOUT, "post annealed", "stage 3 of 4, mine: it rises")
    ect, annealed = (script.parse([*TINY, "--stage", "post", "--post", post, "--out", str(road)]) for post in ("ect", "annealed"))
    assert script.fid.words_of(ect) == script.ABOUT["post"] and script.fid.words_of(annealed).endswith("it rises")
    assert [c.stage for c in fid.stages_of(script, ["--data", "digits"])] == script.STAGES


def test_a_decay_without_its_entry_is_told(monkeypatch):
    monkeypatch.delitem(script.DECAYS, "linear")
    assert faults(script) == ["DECAYS has no entry linear, a word of --decay"]


def test_a_forgotten_teacher_is_asked_for_and_a_student_is_none(road, tmp_path, capsys, monkeypatch):
    """Else a second teacher is trained for days, and refused when mid-training has begun with the first; also by a dry run."""
    begun = [*TINY, "--out", str(tmp_path / "run"), "--steps", "2"]
    script.main([*begun, "--stage", "mid", "--teacher", str(road / "pretrain.pt")])
    for dry in ([], ["--dry_run"]):
        exit_code, err = code([*begun, *dry], capsys)
        assert exit_code == 2 and "mid.pt went on from a teacher that is not there; pass its --teacher again" in err
    assert not (tmp_path / "run/pretrain.pt").exists()
    for stage in ("mid", "vgg"):
        torch.save({**torch.load(road / "mid.pt"), "cfg": dict(stage=stage)}, tmp_path / f"{stage}.pt")
        exit_code, err = code([*TINY, "--out", str(tmp_path / "new"), "--stage", "mid", "--teacher", str(tmp_path / f"{stage}.pt")], capsys)
        assert exit_code == 3 and f"{stage}.pt is of --stage {stage}, no denoiser" in err


@pytest.mark.parametrize("flags", ["--mid kd", "--mid slow", "--mid none --post annealed", "--mid none --init random",
                                   "--mid none --post ecd", "--mid none --post ecd_euler", "--loss huber",
                                   "--loss l2 --trajectories 0", "--precision bf16 --batch_gpu 8", "--precision fp16"])
def test_baselines_and_variants_train(road, tmp_path, flags):
    base = [*TINY, "--out", str(tmp_path), "--teacher", str(road / "pretrain.pt"), "--steps", "2", *flags.split()]
    stage = "post" if "--mid none" in flags else "mid"
    script.main([*base, "--stage", stage])
    c = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
    assert c["step"] == 2 and c["skipped"] == 0
    start = torch.load(road / "pretrain.pt", weights_only=True)["ema"]
    largest = max(start, key=lambda name: start[name].numel())
    assert ("random" in flags) == (not torch.allclose(c["net"][largest], start[largest], atol=0.05))


def test_the_teacher_runs_in_the_precision_of_the_student(road, monkeypatch):
    seen = frozen_calls(script, monkeypatch)
    script.main([*TINY, "--stage", "mid", "--loss", "l2", "--teacher", str(road / "pretrain.pt"), "--steps", "1",
                 "--precision", "bf16", "--out", "half"])
    assert seen == {torch.bfloat16}


def test_student_of_post_starts_from_the_ema_of_mid(road, tmp_path):
    cfg = script.parse([*TINY, "--stage", "post", "--out", str(road), "--steps", "3"])
    ema = torch.load(road / "mid.pt", weights_only=True)["ema"]
    state, _, what = script.first_weights(cfg, None, {})
    assert all(torch.equal(v, ema[k]) for k, v in state.items()) and what.endswith("mid.pt")


def test_sample_writes_one_file_per_seed_that_depends_on_the_seed_alone(road, tmp_path):
    script.main([*TINY, "--out", str(road), "--steps", "3", "--stage", "sample", "--seeds", "3-5"])
    first = np.asarray(Image.open(road / "samples/post_2/000004.png"))
    script.main([*TINY, "--out", str(road), "--steps", "3", "--stage", "sample", "--seeds", "4"])
    assert (first == np.asarray(Image.open(road / "samples/post_2/000004.png"))).mean() > 0.9    # rounding of batches
    assert {p.name for p in (road / "samples").iterdir() if p.is_dir()} == {"teacher_1", "teacher_4", "mid_1", "mid_2", "post_1", "post_2"}


@pytest.mark.parametrize("scripts", ["train_cmt", pytest.param("train_", marks=pytest.mark.long)])
def test_every_readme_command_on_digits_runs(road, scripts, monkeypatch, capsys):
    """As printed, but for a few steps; the first of a script makes its teacher."""
    from test_house import ALL, DOCS, README
    readme = README + DOCS["usage.md"] + DOCS["forking.md"]
    tiny = ["--steps", "2", "--samples", "8", "--trajectories", "4", "--batch", "16", "--nfe", "4"]
    lines = sorted((c for c in ALL if scripts in c and "--data digits" in c and c in readme and "edges" not in c), key=len)
    variants = re.findall("`(.*?)`", " ".join(re.search(r"\*\*Variants\*\*(.*?)fixed gap", readme, re.S)[1].split()))
    variants = variants if scripts == "train_" else variants[:2]                # the others with --long
    lines += [f"{next(c for c in lines if 'out/l2' in c).split('--out')[0]} {flags} --out out/{k}" for k, flags in enumerate(variants)]
    for line in lines:
        _, name, *flags = shlex.split(line)
        known = {f"--{f.name}" for f in fields(importlib.import_module(name[:-3]).Config)}
        mine = [word for flag, value in zip(tiny[::2], tiny[1::2]) if flag in known for word in (flag, value)]
        mine += ["--vgg.steps", "2"] * (name == "train_cmt_imagenet.py")
        importlib.import_module(name[:-3]).main([*flags, *mine])
    assert len(lines) >= 5 and len(list(Path("out").glob("*/results.md"))) >= 5
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", "fid.py --features digits assets/digits.png assets/digits.png".split())
    fid.main()
    assert "FD-digits 0.0000" in capsys.readouterr().out


SMALL = "--data digits --batch 16 --batch_gpu 8 --trajectories 8 --samples 16 --save_every 99 --steps 8".split()
FLOW = "--dropout 0.3 --ratio 0.5 --omega 0.2 --kappa 0.9 --nfe 2"
COMPILED = {  # by script: flags of its road, and how many graphs each stage makes
    "train_cmt_cifar": ("--dropout 0.1 --nfe 4 --post ecd", dict(pretrain=1, mid=2, post=3)),
    "train_cmt_imagenet": ("--dropout 0.1 --nfe 2 --post ecd --loss l2", dict(pretrain=1, mid=2, post=3)),
    "train_mf_imagenet256": (f"{FLOW} --size 4x64x2 --weak 4x64x1", dict(pretrain=4, mid=1, post=4)),
    "train_t2i_coco": (FLOW, dict(pretrain=1, mid=1, post=4))}


@pytest.mark.parametrize("name, stages", [("train_cmt_imagenet", ["pretrain"]), *(
    pytest.param(name, ["pretrain", "mid", "post"], marks=pytest.mark.long) for name in COMPILED)])
def test_compiling_moves_no_weight_and_ends_after_the_first_steps(name, stages, monkeypatch):
    """By a backend that compiles nothing; the sizes of what Mean Flow's loss asks vary. Limits hold for all stages."""
    module, (flags, graphs), made, before = importlib.import_module(name), COMPILED[name], [], []
    count, compile = module.count, torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compile(f, backend=lambda g, _: made.append(g) or g.forward, **k))
    monkeypatch.setattr(module, "count", lambda *a: (before.append(len(made)), count(*a)))
    for stage in stages:
        for out, more in (("eager", []), ("compiled", ["--compile"])):
            began = len(made)
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                module.main([*SMALL, *flags.split(), *more, "--stage", stage, "--out", out])
            assert len(made) - began == graphs[stage] * bool(more) and before[-6] == before[-1], before
        one, two = (nets.load_checkpoint(f"{d}/{stage}.pt")["net"] for d in ("eager", "compiled"))
        for k in one:
            assert torch.allclose(one[k], two[k], rtol=0, atol=1e-6 if "cmt" not in name else 0), k      # another du/dt


# ---- resume --------------------------------------------------------------------------------------
def test_two_processes_give_the_result_of_one_dropout_included(road):
    """Micro-batches of one, none of two: the dropout masks are those of a sample's place in the whole batch."""
    state = torch.load(road / "pretrain.pt", weights_only=True)
    for name, w in state["ema"].items():
        w *= 1e4 if "conv1.weight" in name else 1     # they start at 1e-5, where dropout would leave no trace
    torch.save({"ema": state["ema"], "model": state["model"]}, "teacher.pt")
    argv = [*TINY, "--stage", "mid", "--steps", "2", "--teacher", "teacher.pt", "--loss", "l2",
            "--dropout", "0.3"]
    script.main([*map(str, argv), "--out", "one", "--batch_gpu", "4"])
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                        str(ROOT / "train_cmt_cifar.py"), *map(str, argv), "--out", "two"], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    one, two = (torch.load(f"{d}/mid.pt", weights_only=True)["net"] for d in ("one", "two"))
    error = max((one[k] - two[k]).abs().max().item() for k in one)
    assert error < 3e-6, error
    losses = [[json.loads(line)["loss"] for line in open(f"{d}/metrics.jsonl")] for d in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)                            # the mean over both processes


# ---- data ----------------------------------------------------------------------------------------
def make_zip(path, sizes, broken=()):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as z:
        for i, size in enumerate(sizes):
            Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)).save("image.png")
            data = Path("image.png").read_bytes()
            z.writestr(f"00000/img{i:08d}.png", data[:60] if i in broken else data)
        z.writestr("dataset.json", '{"labels": null}')


def load(*argv):
    return script.load_data(script.parse([*argv]))


def test_own_images_from_zip_folder_and_npz_train():
    make_zip("own.zip", [32] * 5)
    zipfile.ZipFile("own.zip").extractall("folder")
    x = load("--data", "own.zip")
    assert x.shape == (5, 3, 32, 32) and x.dtype == torch.uint8 and torch.equal(x, load("--data", "folder"))
    np.savez("own.npz", images=x.permute(0, 2, 3, 1).numpy())
    assert torch.equal(x, load("--data", "own.npz"))
    cfg = script.parse(["--data", "own.zip", "--stage", "pretrain", "--out", "own"])
    assert script.model_size(cfg, x) == nets.SIZES["ddpm++-32"] and (cfg.lr, cfg.steps) == (2e-4, 50_000)


def test_larger_own_images_are_cropped_and_resized_smaller_ones_refused():
    make_zip("own.zip", [48, 40, 32])
    assert load("--data", "own.zip", "--res", "32").shape == (3, 3, 32, 32)
    make_zip("small.zip", [48, 40, 31])
    with pytest.raises(ValueError, match=r"1 of 3 pictures are too small for --res 32, such as \S+img00000002.png, 31x31; take"):
        load("--data", "small.zip", "--res", "32")


def test_cifar10_is_read_from_the_archive_without_unpickling(monkeypatch):
    pixels = np.zeros((50_000, 3072), np.uint8)
    pixels[::1000] = np.random.default_rng(0).integers(0, 256, (50, 3072), np.uint8)
    evil = b"cos\nsystem\n(S'touch evil'\ntR."
    with tarfile.open("cifar.tar.gz", "w:gz", compresslevel=1) as tar:
        for i in range(5):
            body = evil + b"U\x04dataT" + (30_720_000).to_bytes(4, "little") + pixels[i * 10_000:][:10_000].tobytes() + b"."
            Path("batch").write_bytes(body)
            tar.add("batch", f"cifar-10-batches-py/data_batch_{i + 1}")
    with pytest.raises(ValueError, match="md5 is .* expected c58f30108f"):
        load("--data", "cifar.tar.gz")
    monkeypatch.setattr(script.fid, "CIFAR_MD5", hashlib.md5(Path("cifar.tar.gz").read_bytes()).hexdigest())
    x = load("--data", "cifar.tar.gz")
    assert not os.path.exists("evil") and np.array_equal(x.reshape(50_000, 3072).numpy(), pixels)


@pytest.mark.parametrize("data, missing", [("cifar10", "cifar-10-python.tar.gz"), ("own.zip", "vgg16")])
def test_what_a_later_stage_reads_is_missed_before_the_first(data, missing, monkeypatch, capsys):
    """Offline: CIFAR-10's file is for post; it is not found missing after days of mid."""
    def offline(*a, **k):
        raise OSError("no network")
    monkeypatch.setattr(nets.urllib.request, "urlopen", offline)
    make_zip("own.zip", [32] * 2)
    exit_code, err = code(["--data", *data.split(), "--teacher", "scratch", "--out", "x"], capsys)
    assert exit_code == 3 and missing in err and "no network" in err and len(err.strip().splitlines()) == 1
    assert not os.path.exists("x")


@pytest.mark.parametrize("name", ["train_cmt_cifar", "train_cmt_imagenet", "train_mf_imagenet256", "train_t2i_coco"])
def test_a_dry_run_says_what_it_would_do_and_does_nothing(name, monkeypatch, capsys):
    """It names what it would download and what it misses, each once; digits need nothing. No download, no folder."""
    main = __import__(name).main
    monkeypatch.setattr(nets.urllib.request, "urlopen", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(SystemExit) as stop:
        main(["--data", "digits", "--dry_run", "--mid.steps", "7", "--samples", "9"])
    out = capsys.readouterr().out
    assert "and half a minute of scores\nwarning: a score of 9 samples is off" in out                     # as the run itself
    assert re.search(r"; [\d.]+ (s|min) to [\d.]+ min on one core in fp32", out) and "OMP_NUM_THREADS" not in out
    assert stop.value.code == 0 and "mid 7 steps of 32" in out and f"plan {name}.py --data digits --mid.steps 7 --samples 9" in out
    monkeypatch.setenv("CMT_CACHE", "cache")
    with pytest.raises(SystemExit) as stop:
        main(["--dry_run"])
    lines = "".join(capsys.readouterr()).splitlines()
    wanted = {"train_cmt_cifar": ["to download: .*edm-cifar10", "vgg16", "to download: .*cifar-10-python", "to download: .*inception", "cifar10-32x32.npz"],
              "train_cmt_imagenet": ["to download: .*edm2-img64-xl", "to download: .*vgg16", "imagenet64.zip is not there", "inception"],
              "train_mf_imagenet256": ["imagenet256-sd is not there", "to download: .*inception"], "train_t2i_coco": ["coco256-sd"]}[name]
    assert stop.value.code == (0 if name == "train_cmt_cifar" else 3)         # what a run would fetch is no fault
    assert all(sum(re.search(word, line) is not None for line in lines) == 1 for word in wanted), lines
    monkeypatch.setenv("CMT_OFFLINE", "1")                                    # but it is where the user forbids it
    assert name == "train_t2i_coco" or "CMT_OFFLINE is set" in code(["--dry_run"], capsys, main)[1]
    torch.save({"weight": torch.zeros(3)}, "odd.pt")
    for flags, said in {"--seeds 5-1": "--seeds 5-1 is not possible",                     # of all stages, but said once
                        "--stage sample": "no finished stage", "--stage eval": "no finished stage",
                        "--stage mid": "no finished teacher", "--stage post": "mid.pt is not finished",
                        "--stage mid --teacher odd.pt": "odd.pt: no ", "--teacher odd.pt": "odd.pt: no ",
                        "--init odd.pt": "odd.pt: no ", "--init odd.pt --teacher gone.pt": "gone.pt"}.items():
        exit_code, err = code(["--data", "digits", "--dry_run", *flags.split()], capsys, main)
        assert exit_code in (2, 3) and said in err and len(err.strip().splitlines()) <= 1 + ("gone" in flags), (flags, err)
        real = code(["--data", "digits", *flags.split()], capsys, main)                   # the command itself: as it said, no folder
        assert real[0] == exit_code and real[1] in err and not [*Path().glob("out/*")], (flags, err, real)
    assert code("--data digits --dry_run --mid none --post vanilla --init random --stage post".split() if "cmt" not in name else
                ["--dry_run", "--data", "digits"], capsys, main)[0] == 0         # a start that asks no teacher
    unused = "--data digits --teacher gone.pt --mid none --stage mid --out x".split()                # the same code without it
    assert code(unused, capsys, lambda argv: main(argv) or sys.exit(0))[0] == code([*unused, "--dry_run"], capsys, main)[0]
    os.makedirs("photos/a")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save("photos/a/1.png")
    if name == "train_cmt_imagenet":                    # what encodes asks for no teacher
        assert code("--stage encode --source photos --res 64 --dry_run".split(), capsys, main)[0] == 0
        os.makedirs("empty")                          # what the command itself would refuse
        refused = [code(f"--stage encode --source empty --res 64{dry}".split(), capsys, main) for dry in ("", " --dry_run")]
        assert [exit_code for exit_code, _ in refused] == [3, 3] and all("empty: holds no .jpg" in err for _, err in refused)
    assert not [*Path().glob("out/*")]


def test_students_are_shown_and_scored_where_their_teacher_lies_elsewhere(road, capsys):
    os.makedirs("x")
    shutil.copy(road / "mid.pt", "x")
    for stage in "sample", "eval":
        script.main([*TINY, "--out", "x", "--seeds", "0-3", "--stage", stage])
    assert os.path.exists("x/samples/mid_1/000000.png") and "| mid |" in Path("x/results.md").read_text()
    assert not os.path.exists("x/trajectory.png")
    first = Path("x/results.md").read_text()
    script.main([*TINY, "--out", "x", "--stage", "eval"])                    # the same once more: no second table
    assert Path("x/results.md").read_text() == first
    Path("x/results.md").write_text(worse := first.replace("\n20", " Here it scores worse.\n20", 1))
    script.main([*TINY, "--out", "x", "--stage", "eval"])                    # a sentence less is another table
    assert Path("x/results.md").read_text().endswith(f"\n\n{worse}") and worse.count("worse") == 1
    Path("x/results.md").write_text(first)
    script.main([*TINY, "--out", "x", "--stage", "eval", "--samples", "12"])
    assert Path("x/results.md").read_text().endswith("\n\n" + first) and "12 samples a score" in Path("x/results.md").read_text()
    assert {m["samples"] for m in script.fid.read_metrics("x") if m["stage"] == "eval"} >= {12}


def test_seeds_by_steps_draw_one_class(road):
    """Balanced labels: the class is seed % 10, so every tenth seed from 7 draws sevens; an --init FILE is named by its file."""
    main = importlib.import_module("train_cmt_imagenet").main
    main("--data digits --stage pretrain --steps 1 --batch 8 --out y".split())
    main("--data digits --stage sample --seeds 7-27:10 --init y/pretrain.pt --out y".split())
    assert sorted(p.name for p in Path("y/samples/init_pretrain_1").iterdir()) == ["000007.png", "000017.png", "000027.png"]


def test_samples_of_other_weights_never_join_those_that_are_there(here, capsys):
    """A score of the folder would be of two nets. The same weights add theirs, also after the folder was moved away."""
    for seed in "01":
        script.main([*TINY, "--stage", "pretrain", "--steps", "1", "--seed", seed, "--out", f"of{seed}"])
    argv = ["--data", "digits", "--stage", "sample", "--out", "y", "--seeds"]
    for seeds in "0-1", "2":
        script.main([*argv, seeds, "--init", "of0/pretrain.pt"])
    exit_code, err = code([*argv, "2-4", "--init", "of1/pretrain.pt"], capsys)
    assert exit_code == 2 and re.search("y/samples/init_pretrain_1 was drawn by other weights, crc32 .*, now crc32 .*; move it away first", err)
    assert sorted(os.listdir("y/samples/init_pretrain_1")) == ["000000.png", "000001.png", "000002.png"]
    os.rename("y/samples/init_pretrain_1", "y/old")
    os.rename("y/samples/init_pretrain_2", "y/old2")
    script.main([*argv, "2-4", "--init", "of1/pretrain.pt"])
    assert len(os.listdir("y/samples/init_pretrain_1")) == 3


def test_a_teacher_of_other_images_is_told_of(here, capsys):
    """The student draws what it learned; by content where images are read, for mid-training alone by name."""
    for name, sizes in dict(one=[16] * 3, two=[16] * 4).items():
        make_zip(f"{name}.zip", sizes)
        script.main(["--data", f"{name}.zip", "--stage", "pretrain", "--steps", "1", "--batch", "2", "--out", name])
    os.rename("two.zip", "moved.zip")
    for data, flags, words in (("moved.zip", "--stage post --mid none", "learned --data one.zip, 3 images"), ("moved.zip", "--stage mid --loss huber", "learned --data one.zip"),
                               ("one.zip", "--stage post --mid none", "")):
        capsys.readouterr()
        fid.SAID.clear()
        script.check(script.parse(["--data", data, *flags.split(), "--teacher", "one/pretrain.pt", "--out", "x"]))
        warned = [line for line in capsys.readouterr().err.splitlines() if "--teacher" in line]
        assert len(warned) == bool(words) and all(words in line for line in warned), warned


def test_samples_are_counted_by_seeds_and_an_npz_says_what_it_holds(here, capsys):
    with pytest.raises(SystemExit):
        script.main(["--data", "digits", "--stage", "sample", "--samples", "5", "--dry_run"])
    assert "sample reads no --samples" in "".join(capsys.readouterr())
    np.savez("odd.npz", foo=np.zeros((3, 4)))
    np.savez("float.npz", images=np.zeros((3, 4, 4, 3)))
    for name, words in dict(odd="odd.npz: holds foo; expected arr_0 or images", float="is float64 (3, 4, 4, 3); expected uint8").items():
        exit_code, err = code(["--data", f"{name}.npz", "--stage", "pretrain", "--out", "x"], capsys)
        assert exit_code == 3 and words in err


def test_a_distance_that_is_not_per_image_is_told():
    """A sum over the batch would make the gradient depend on --batch_gpu."""
    whole = SimpleNamespace(features=lambda x: [x], distance=lambda a, b: (a[0] - b[0]).square().mean())
    each = SimpleNamespace(features=whole.features, distance=lambda a, b: (a[0] - b[0]).square().flatten(1).mean(1))
    ask_distance(each, (1, 8, 8))
    as_tensor = SimpleNamespace(features=lambda x: x, distance=each.distance)       # a tensor has rows, too, but they are images
    with_gradient = SimpleNamespace(features=lambda x: [x.requires_grad_()], distance=each.distance)
    for distance, words in ((whole, "a distance of 2 images is of shape [], not a number for each"),
                            (SimpleNamespace(features=whole.features), "no method distance"), (SimpleNamespace(distance=whole.distance), "no method features"),
                            (None, "no method features"), (3.0, "no method features"),
                            (as_tensor, "features of a distance are a Tensor, not a list"), (with_gradient, "have a gradient")):
        with pytest.raises(AssertionError, match=re.escape(words)):
            ask_distance(distance, (1, 8, 8))


def test_a_shift_of_sampling_moves_no_end_of_mid_training(road):
    """--sigma_shift is no knob of training: the teacher of mid-training, of ECD and in samples draws by what it has learned."""
    teacher = ["--teacher", str(road / "pretrain.pt"), "--steps", "2", "--out"]
    for out, flags in ("plain", []), ("shifted", ["--sigma_shift", "0.3"]):
        script.main([*TINY, *flags, "--stage", "mid", *teacher, out])
    one, two = (nets.load_checkpoint(f"{out}/mid.pt")["net"] for out in ("plain", "shifted"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    nets_of = [script.candidates(script.parse([*TINY, "--stage", "sample", "--out", "plain", "--sigma_shift", s]))[-1][1] for s in ("0", "0.3")]
    assert [net.sigma_shift for net in nets_of] == [0, 0.3]
    shifted = script.candidates(script.parse([*TINY, "--stage", "eval", "--out", str(road), "--sigma_shift", "0.3"]))
    assert [(name, net.sigma_shift) for name, net, *_ in shifted] == [("teacher", 0), ("mid", 0.3), ("post", 0.3)]


def test_first_weights_of_other_images_are_told_of_by_what_differs(road, capsys):
    make_zip("own.zip", [16] * 3)
    script.main(["--data", "own.zip", "--stage", "pretrain", "--steps", "1", "--batch", "2", "--out", "own"])
    exit_code, err = code([*TINY, "--stage", "mid", "--init", "own/pretrain.pt", "--teacher", str(road / "pretrain.pt"), "--out", "x"], capsys)
    assert exit_code == 3 and ("own/pretrain.pt was trained with img_channels 3, the net to train has 1" in err or "draws 3x16x16" in err)
    for stage in ("eval", "sample"):
        exit_code, err = code([*TINY, "--stage", stage, "--init", "own/pretrain.pt", "--out", "y"], capsys)
        assert exit_code == 3 and "--init own/pretrain.pt draws 3x16x16, --data digits has other images" in err and not os.path.exists("y/stages_init_pretrain.png")
    script.main(["--data", "own.zip", "--stage", "sample", "--seeds", "0", "--init", "own/pretrain.pt", "--out", "own"])


@pytest.mark.parametrize("name", ["cmt_cifar", "cmt_imagenet", "mf_imagenet256", "t2i_coco"])
def test_a_net_of_digits_is_not_shown_as_one_of_the_default_data(name, capsys):
    home = importlib.import_module(f"train_{name}")
    home.main("--data digits --stage pretrain --steps 1 --batch 2 --out d --log_every 1".split())
    exit_code, err = code("--stage sample --seeds 0 --init d/pretrain.pt --out x".split(), capsys, home.main)
    assert exit_code == 3 and f"--init d/pretrain.pt draws 1x8x8, --data {home.Config.data} has other images; pass the --data of that net" in err and not os.path.exists("x/samples")


def test_a_forgotten_data_is_refused_before_anything_is_fetched(road, monkeypatch, capsys):
    """Of a folder of digits; the default of --data is cifar10. Else Inception is fetched first."""
    monkeypatch.setattr(script, "check", lambda cfg: pytest.fail("files were looked for"))
    for name in ("train_cmt_cifar", "train_cmt_imagenet"):
        exit_code, err = code(["--out", road, "--steps", 3], capsys, importlib.import_module(name).main)
        assert exit_code == 2 and f"{road} was made with " in err and len(err.strip().splitlines()) == 1, err
        assert "--data digits, now cifar10" in err or "script" in err
    exit_code, err = code(["--data", "digits", "--out", road, "--stage", "sample", "--steps", 2], capsys)
    assert exit_code == 2 and "--steps 3, now 2" in err


def test_pictures_of_no_size_of_the_nets_are_told_one_that_fits(capsys):
    np.savez("x.npz", images=np.random.default_rng(0).integers(0, 255, (8, 20, 20, 3), dtype=np.uint8))
    exit_code, err = code("--data x.npz --stage pretrain --loss huber --batch 2 --steps 1 --out x".split(), capsys)
    assert exit_code == 3 and "no net of nets.SIZES draws 20x20 pixels; pass --res 16\n" in err and not os.path.exists("x")


def test_a_longer_run_is_told_a_command_that_trains_it(road, capsys):
    """It goes on from the finished stage, in a folder of its own, with the same teacher."""
    shutil.copytree(road, "x")
    exit_code, err = code([*TINY, "--out", "x", "--stage", "post", "--steps", "4"], capsys)
    told = re.search(r"to train it on, in a folder of its own: python train_cmt_cifar.py (.*)$", err, re.M)[1]
    assert exit_code == 2 and "--post.steps 3, now 4" in err and all(flag in told for flag in ("--init x/post.pt", "--steps 1", "--out x-longer-post", "--teacher x/pretrain.pt"))
    script.main([*TINY, *told.split()])
    assert nets.load_checkpoint("x-longer-post/post.pt")["step"] == 1
    exit_code, err = code([*TINY, "--out", "x"], capsys)                   # its flags are left out: nothing longer is asked for
    assert exit_code == 2 and "--pretrain.steps 3, now 2000" in err and "repeat its flags" in err and "longer" not in err


def test_a_folder_of_pictures_keeps_its_dots_in_the_name_of_its_run(here):
    """Else faces.v1 and faces.v2 are one run; of a file the ending is none of its name."""
    os.mkdir("faces.v1")
    assert [script.parse(["--data", path]).out for path in ("faces.v1", "./faces.v1/", "faces.zip")] == ["out/faces.v1", "out/faces.v1", "out/faces"]


def test_a_number_that_a_wrong_row_denies_a_stage_changes_nothing(road):
    """Else the run trains by it, and neither config.json nor a refusal ever says so."""
    argv = ["--data", "digits", "--trajectories", "64", "--q", "9", "--post.steps", "3"]
    seen = {c.stage: c for c in fid.stages_of(script, argv)}
    assert [seen[stage].trajectories for stage in ("pretrain", "mid", "post")] == [128, 64, 128]
    assert [seen[stage].q for stage in ("pretrain", "mid", "post")] == [4096, 4096, 9]
    assert seen["eval"].q == 9 and [seen[stage].mid for stage in ("pretrain", "post")] == ["cmt"] * 2


def test_ctrl_c_before_a_run_begins_is_a_line(here):
    """In the checks and in a dry run, which may read a large folder, as everywhere else."""
    text = "import signal, train_cmt_cifar as s; s.load_data = lambda cfg: signal.raise_signal(2); s.main(['--data', 'digits', '--out', 'x'{}])"
    for more in "", ", '--dry_run'":
        run = subprocess.run([sys.executable, "-c", text.format(more)], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
        assert run.returncode == 130 and run.stderr == "stopped by a signal; nothing is lost, the same command does it again\n", run.stderr


def test_a_finished_road_says_that_nothing_is_to_train_also_one_from_init_file(road, monkeypatch, capsys):
    """--init FILE starts the first stage alone, in a dry run too; and a prompt is printed as a shell takes it."""
    argv = [*TINY, "--steps", "1", "--init", str(road / "mid.pt"), "--out", "x"]
    script.main(argv)
    script.main(argv)
    assert "to train: mid 1 steps" not in capsys.readouterr().out.split("stage 4 of 4")[1]
    assert Path("x/log.txt").read_text().count("to train: nothing") == 1
    assert f"| mid | 1 on {road}/mid.pt | 16 |" in (table := Path("x/results.md").read_text()) and "| teacher | 1 | 16 |" in table
    assert code([*argv, "--dry_run"], capsys)[0] == 0
    with pytest.raises(SystemExit):
        importlib.import_module("train_t2i_coco").main(["--data", "digits", "--prompts", "a cat|a dog", "--dry_run"])
    assert "--prompts 'a cat|a dog'" in capsys.readouterr().out


def test_own_images_offline_give_pictures_and_no_score(monkeypatch, capsys):
    make_zip("own.zip", [8] * 4)
    monkeypatch.setenv("CMT_OFFLINE", "1")
    tiny = "--data own.zip --batch 4 --nfe 2 --trajectories 2 --loss huber --steps 1 --out x".split()
    sheets, save = {}, fid.save_sheet
    monkeypatch.setattr(fid, "save_sheet", lambda path, rows, *more, **how: sheets.update({path: [row[0] for row in rows]}) or save(path, rows, *more, **how))
    script.main(tiny)
    assert sheets["x/stages.png"][-1] == "real images"                        # no score says how near samples are
    assert re.search("warning: pictures will be drawn, but not scored.*inception.*https.*CMT_OFFLINE", (said := capsys.readouterr()).err) and "not scored; open" in said.out and os.path.exists("x/stages.png")
    assert not os.path.exists("x/results.md")
    with pytest.raises(ValueError, match="inception.*CMT_OFFLINE"):
        script.fid.prefetch("cifar10")


def test_a_slip_in_a_distance_is_shown_before_the_teacher_is_trained_and_by_its_own_error(monkeypatch):
    """A fork's: its line in log.txt has no folder any more, and must not be the error that is seen."""
    def slip(cfg):
        raise NameError("name 'Edges' is not defined")
    monkeypatch.setattr(script, "make_distance", slip)
    for stage in ("all", "mid"):
        with pytest.raises(NameError, match="Edges"):
            script.main([*TINY, "--stage", stage, "--out", "x", "--steps", "2"])
    assert not os.path.exists("x/pretrain.pt")
    monkeypatch.setattr(script, "check_files", lambda cfg: None)
    script.main([*TINY, "--stage", "pretrain", "--out", "y", "--steps", "2"])
    with pytest.raises(NameError, match="Edges"):                        # in a folder that is new, and gone then
        script.main([*TINY, "--stage", "mid", "--teacher", "y/pretrain.pt", "--out", "x", "--steps", "2"])
    assert not os.path.exists("x")


def test_a_distance_that_is_named_but_not_returned_is_not_another_one():
    """A fork's: without its return the VGG would measure under its name."""
    import train_cmt_imagenet
    for make in (script.make_distance, train_cmt_imagenet.make_distance):
        with pytest.raises(AssertionError, match="edges: make_distance returns nothing for it"):
            make(SimpleNamespace(loss="edges", data="digits", out="x", huber_c=0.0))


def test_a_file_is_scored_beside_the_pictures_of_the_run(road, capsys):
    """Its time of training and its curve are not the file's; where images are few, the table says so."""
    stages, before = road / "stages.png", (road / "stages.png").stat().st_mtime_ns
    script.main([*TINY, "--out", str(road), "--steps", "3", "--stage", "eval", "--init", str(road / "mid.pt")])
    text = capsys.readouterr().out
    assert stages.stat().st_mtime_ns == before and "open stages_init_mid.png and results.md" in text and "curve.png" not in text and "of training" not in text
    assert "too few for 64 features" in text


def test_a_run_without_mid_training_in_the_folder_alone_is_scored_beside(road, monkeypatch):
    with_alone(road)
    sheets, save = {}, fid.save_sheet
    monkeypatch.setattr(fid, "save_sheet", lambda path, rows, caption, *more, **how: sheets.update({path: (rows, caption)}) or save(path, rows, caption, *more, **how))
    script.main([*TINY, "--out", "x", "--steps", "3", "--stage", "eval"])
    rows = [line.split("|")[1:-1] for line in Path("x/results.md").read_text().partition("\n\n")[0].splitlines() if line.startswith(("| alone", "| post"))]
    assert len(rows) >= 2 and len(rows) % 2 == 0 and rows[0][1:] == rows[len(rows) // 2][1:]       # one net twice
    rows, caption = sheets["x/stages.png"]
    assert re.match("On digits, mid-training with a loss on pixels (helps|hurts|changes little) in one step(, (helps|hurts|changes little)| and) in two steps: FD-digits ", caption) and [label for label, *_ in rows if "without mid-training" in label]
    assert not [label for label, *_ in sheets["x/trajectory.png"][0] if "without" in label]         # its ends are its own


@pytest.mark.parametrize("fetch", [fid.fetch, nets.fetch])
def test_a_cache_that_cannot_be_used_is_named_with_the_way_out(fetch, monkeypatch):
    monkeypatch.setenv("CMT_CACHE", "/proc/none")
    with pytest.raises((fid.DataError, nets.WeightsError), match="/proc/none.*set \\$CMT_CACHE"):
        fetch(["https://x.invalid/a"] if fetch is fid.fetch else "https://x.invalid/a")


def test_huber_c_is_the_constant_of_mid_training_too():
    a, b = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.3)
    for c in (0.06, 0.5):
        distance = script.make_distance(script.parse(f"--data digits --stage mid --huber_c {c}".split()))
        assert distance(a, b).item() == pytest.approx((0.09 + c * c) ** 0.5 - c)


def test_a_gradient_of_zero_and_a_file_shown_alone_are_said(road, capsys):
    """Else a stage that learns nothing ends with 0, and the samples of another net are taken for the run's."""
    cfg = script.parse([*TINY, "--stage", "post"])
    for norm in (1.0, 0.0):
        script.count(cfg, fid.new_tally(cfg), 0.0, norm)
        assert ("warning: post: a gradient is exactly 0" in capsys.readouterr().err) == (norm == 0)
    script.main([*TINY, "--stage", "sample", "--seeds", "0", "--init", str(road / "mid.pt"), "--out", str(road)])
    assert f"mid.pt alone is shown, as --init asks; without it, what {road} holds" in capsys.readouterr().err


def test_a_line_behind_one_that_a_kill_has_cut_is_not_lost(tmp_path):
    """Scores are appended to metrics.jsonl by runs that train nothing, and so do not mend it."""
    cut = tmp_path / "metrics.jsonl"
    for text in '{"stage": "mid", "st', '{"stage": "mid", "step": 1}\n', "":
        cut.write_text(text)
        with contextlib.closing(fid.open_out(str(tmp_path), script.__file__, [])):
            fid.log("eval", stage="eval")
        assert fid.read_metrics(str(tmp_path)) == [{"stage": "mid", "step": 1}] * (text[-1:] == "\n") + [{"stage": "eval"}]


def test_post_starts_from_init_file_where_it_is_named(road):
    cfg = script.parse([*TINY, "--stage", "post", "--out", str(road), "--init", str(road / "pretrain.pt")])
    state, _, what = script.first_weights(cfg, None, {})
    ema = nets.load_checkpoint(str(road / "pretrain.pt"))["ema"]
    assert what.endswith("pretrain.pt") and state.keys() == ema.keys() and all(torch.equal(state[k], ema[k]) for k in ema)


# ---- bad input -----------------------------------------------------------------------------------
BAD = [  # (command line, exit code, what the line must say)
    ("--dat digits", 2, "unrecognized arguments: --dat digits; did you mean --data? --help lists every flag"),
    ("--data digits --batch ten", 2, "--batch"),
    ("--data digits --vgg.steps 4", 2, "unrecognized arguments: --vgg.steps 4; did you mean --steps? --help lists every flag"),
    ("--data digits --labels balanced", 2, "balanced; it is a flag of train_cmt_imagenet.py and train_mf_imagenet256.py; --help"),
    ("--data digits --compile False", 2, "unrecognized arguments: False; a switch is --NAME or --no-NAME; --help"),
    ("--data digits --mid best", 2, "choose from"),
    ("--data digits --lr -1", 2, "--lr -1.0 is not possible"),
    ("--data digits --steps 0", 2, "--steps 0 is not possible"),
    ("--data digits --seeds a-b", 2, "--seeds a-b"),
    ("--data digits --seeds 5-3", 2, "--seeds 5-3 is not possible; write 7, 0-63 or 7-997:10"),
    ("--data digits --seeds -5", 2, "--seeds -5 is not possible"),
    ("--data digits --seeds \u00b2", 2, "--seeds \u00b2 is not possible"),
    ("--data digits --steps 1e4", 2, "--steps: not a whole number: '1e4'; write its digits, as 1000; --help"), ("--data digits --lr 1,5e-3", 2, "--lr: not a number: '1,5e-3'; write 0.001 or 1e-3; --help"),
    ("--data digits --steps=0", 2, "--steps 0 is not possible"),
    ("--data digits --lr nan", 2, "--lr nan is not possible"),
    ("--data digits --batch", 2, "--batch: expected one argument"),
    ("--data digits --lr -1e-3", 2, "write its value behind it (below 0: --NAME=-1)"),
    ("--data digits --lr 30", 2, "--lr 30.0 is not possible; it must be above 0, at most 1"),
    ("--data digits --compile=yes", 2, "--compile"),
    ("--data own.zip --res -16", 2, "--res -16 is not possible"),
    ("--data cifra10", 2, "no file or folder, nor the name of a data set; did you mean cifar10?"), ("--data mine", 2, "pass one, or cifar10, ffhq, afhqv2, digits"), ("--nfe 1", 2, "--nfe 1 is not possible; it must be in 2 to"), ("--data gone.zip", 3, "pass --data PATH, cifar10, ffhq, afhqv2 or digits"),
    ("--data digit --teacher a.pt", 2, "did you mean digits?"), ("--data digits --classes 3", 2, "arguments: --classes 3; --help lists every flag"),
    ("--data ffhq --stage post --mid none --teacher none.pkl", 3, "data/ffhq-64x64.zip is not there"),
    ("--data missing.zip --stage pretrain", 3, "missing.zip is not there"),
    ("--data missing.zip --teacher none.pkl --loss l2", 3, "missing.zip is not there"),
    ("--data digits --huber_c -1", 2, "--huber_c -1.0 is not possible; it must be 0 or more"),
    ("--data digits --loss lpips --stage mid", 2, "needs 3x16x16 at least, not 1x8x8; pass --loss huber"),
    ("--data digits --huber_c 0 --stage mid", 2, "huber needs a c above 0"),
    ("--data missing.zip --loss l2", 3, "missing.zip is not there"),
    ("--data digits --batch_gpu -4", 2, "--batch_gpu -4"),
    ("--data digits --warmup -1", 2, "--warmup -1"),
    ("--data digits --stage mid --batch 30", 2, "--batch 30"),
    ("--data digits --stage post --batch_gpu 5", 2, "--batch_gpu 5 must divide the 32 of --batch in a process; pass 4"),
    ("--stage eval --init nothere.pkl", 3, "--init nothere.pkl: no such file"),
    ("--data digits --stage mid", 3, "run --stage pretrain first"),
    ("--data digits --stage mid --teacher none.pt", 3, "--teacher none.pt: no such file"),
    ("--data digits --stage eval", 3, "train without --stage, or --init"),
    ("--data Digits", 2, "did you mean digits?"), ("--post none", 2, "leave post-training out by --stage mid"),
    ("--batch-size 4", 2, "did you mean --batch?"), ("--mid.num_epochs 4", 2, "did you mean --mid.steps?"), ("--save_dir x", 2, "did you mean --out?"), ("--ckpt x", 2, "did you mean --init?"),
    ("--resume x", 2, "the same command, without it, goes on"), ("--bf16", 2, "write --precision bf16"), ("--no-mid", 2, "write --mid none"), ("--device cuda", 2, "CUDA_VISIBLE_DEVICES=0 picks"), ("--compile=False", 2, "a switch is --NAME or --no-NAME; --help"), ("--compile yes", 2, "yes; a switch is --NAME or --no-NAME; --help"),
    ("--compile true", 2, "true; a switch is --NAME or --no-NAME; --help"), ("digits", 2, "digits; a value stands behind its flag, --steps 3; --help"), ("--seeds 0 1 2", 2, "1 2; a range is one word: --seeds 0-2; --help"),
    ("\u2013-steps 5", 2, "write a flag with two plain hyphens: --steps; --help"),
    ("--data digits --mid.learning_rate 4", 2, "did you mean --mid.lr?"), ("--epochs=4", 2, "did you mean --steps?"), ("--no_compile", 2, "did you mean --no-compile?"), ("--data digits --mid.stage post", 2, "did you mean --stage?"),
    ("--data digits --mid.method kd", 2, "unrecognized arguments: --mid.method kd; --help lists every flag"),
    ("--data digits --mid.stesp 4", 2, "unrecognized arguments: --mid.stesp 4; did you mean --mid.steps? --help lists every flag"),
    ("--data digits --steps 99999999999999", 2, "it must be above 0, below 1e12"),
    ("--data digits --P_mean nan", 2, "--P_mean nan is not possible; it must be in -10 to 10"),
    ("--data cifar10 --res 16 --loss huber", 2, "--res 16: --data cifar10 has 32x32 pixels; leave --res out"),
    ("--data digits --post annealed --stair 0 --stage post", 2, "--stair 0 with --post annealed: of annealed alone, above 0"),
    ("--data digits --post.P_mean -40", 2, "--P_mean -40.0 is not possible; it must be in -10 to 10"),
    ("--data digits --q 2 --stair 187 --stage post", 2, "--stair 187 with --post ect: of annealed alone, above 0; leave it out"),
    ("--data digits --post.mid none", 2, "unrecognized arguments: --post.mid none; did you mean --mid? "),
    ("--data digits --mid.mid none --dry_run", 2, "unrecognized arguments: --mid.mid none; did you mean --mid? "),
    ("--data digits --pretrain.post annealed", 2, "unrecognized arguments: --pretrain.post annealed; did you mean --post? "),
    ("--data digits --out /proc/x", 2, "--out /proc/x: No such file or directory; name another folder"),
    ("--data digits --out /sys/x", 2, "--out /sys/x: Operation not permitted; name another folder"),
]


@pytest.mark.parametrize("line, expected, text", BAD, ids=[b[0] for b in BAD])
def test_bad_input_is_one_line_with_its_exit_code(line, expected, text, capsys):
    exit_code, err = code(line.split(), capsys)
    assert exit_code == expected and text in err and len(err.strip().splitlines()) == 1, err


def test_the_last_of_two_equal_flags_counts_and_an_empty_out_is_none():
    c = script.parse(["--data", "digits", "--steps", "3", "--steps=5", "--out", ""])
    assert c.steps == 5 and c.out == "out/digits"
    assert [script.parse(["--data", d]).out for d in ("a/cats.zip", "a/dogs/", "cifar10")] == ["out/cats", "out/dogs", "out/cifar10"]


def test_a_script_that_was_changed_says_so_when_it_goes_on(road, monkeypatch, capsys):
    """Of its text the checkpoint has a sum; older checkpoints have none, and say nothing."""
    argv = [*TINY, "--stage", "pretrain", "--out", str(road), "--steps", "3"]
    for made in (dict(script="train_cmt_cifar.py", code=0), dict(script="train_cmt_cifar.py")):
        script.fid.SAID.clear()
        ckpt = {k: v for k, v in nets.load_checkpoint(str(road / "pretrain.pt")).items() if k not in ("script", "code")}
        script.fid.steps_left(script.parse(argv), ckpt | made, "x/pretrain.pt")
        assert (f"train_cmt_cifar.py, nets.py or solvers.py was changed since {road} was begun" in capsys.readouterr().err) == ("code" in made)


def test_the_time_left_is_that_of_the_whole_stage_without_its_first_step(monkeypatch, capsys):
    """A slow first step (compiling) and a fast last window do not move it; the stages to come are named."""
    cfg, clock = script.parse(["--data", "digits", "--stage", "mid", "--steps", "100", "--batch", "1"]), [0.0]
    monkeypatch.setattr(script.fid.time, "time", lambda: clock[0])
    monkeypatch.setattr(script.fid, "ROAD", dict(post=(50, 1)))
    script.fid.PACE.clear()
    tally = script.fid.new_tally(cfg)
    for done, now in ((1, 60.0), (21, 80.0), (41, 90.0)):                # 60 s; then 40 steps in 30 s
        clock[0], tally["step"] = now, done
        script.fid.report(cfg, 1e-3, tally)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert " left" not in first and last.endswith("| 44 s of training left, at least 82 s with the next stages")


def test_a_mid_training_whose_loss_has_risen_is_said(tmp_path, monkeypatch, capsys):
    """Its target is fixed, so something is wrong; that of post-training moves, its loss may rise."""
    monkeypatch.setattr(script.fid, "OUT", str(tmp_path))
    monkeypatch.setattr(script.fid.time, "time", itertools.count(1.0).__next__)
    for stage, last, said in (("mid", 1.1, False), ("mid", 1.3, True), ("post", 1.3, False)):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        script.fid.PACE.clear()
        cfg = script.parse(["--data", "digits", "--stage", stage, "--steps", "100"])
        tally = script.fid.new_tally(cfg)
        for tally["step"], tally["losses"] in (1, [0.1]), (25, [1.0]), (50, [9.0]), (75, [9.0]), (100, [last]):         # the first is of one batch
            assert "has risen" not in capsys.readouterr().err
            script.fid.report(cfg, 1e-3, tally)
        assert ("mid: the loss has risen, from 1 to 1.3" in capsys.readouterr().err) == said
        script.fid.SAID.clear()


@pytest.mark.parametrize("mode, side, res", [("L", 32, 0), ("RGB", 8, 0), ("RGB", 32, 8), ("LA", 16, 0)])
def test_images_that_lpips_does_not_measure_are_refused_before_the_first_stage(mode, side, res, capsys):
    Path("own").mkdir()
    Image.new(mode, (side, side)).save("own/a.png")
    exit_code, err = code(["--data", "own", "--res", res, "--teacher", "scratch", "--out", "x"], capsys)
    assert exit_code == 2 and "--loss lpips needs 3x16x16" in err and len(err.strip().splitlines()) == 1 and not os.path.exists("x")


@pytest.mark.parametrize("name", ["train_cmt_cifar", "train_cmt_imagenet"])
def test_post_training_in_bf16_is_warned_of(name, monkeypatch, capsys):
    """bf16's error is as large as the difference that ECT learns from; mid-training alone may have it."""
    for flag, warned in ("--mid.precision", False), ("--precision", True):
        exit_code, err = code([*TINY, flag, "bf16", "--dry_run", "--out", "x"], capsys, importlib.import_module(name).main)
        assert exit_code == 0 and ("warning: bf16" in err) == warned


def test_lines_about_files_are_in_the_log_once():
    """Pre-training and the score read the same folder."""
    Path("own").mkdir()
    Path("own/notes.txt").write_text("mine")
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(f"own/{i}.png")
    argv = "--data own --stage pretrain --steps 1 --batch 4 --nfe 2 --out x".split()
    script.main(argv)
    assert Path("x/log.txt").read_text().count("left out: 1 files") == 1


def test_post_without_a_finished_mid_is_refused(road, capsys):
    exit_code, err = code([*TINY, "--stage", "post", "--out", "x", "--teacher", road / "pretrain.pt"], capsys)
    assert exit_code == 3 and "run --stage mid first" in err


def test_what_is_refused_leaves_no_folder(road, capsys):
    for flags in "--stage post --teacher gone.pt", "--stage post", "--stage eval", f"--stage mid --teacher {road}/mid.pt":
        exit_code, err = code([*TINY, *flags.split(), "--out", "x"], capsys)
        assert exit_code == 3 and len(err.splitlines()) == 1 and not os.path.exists("x")
    script.main([*TINY, "--stage", "eval", "--out", str(road)])
    few = "warning: a score of 16 samples is off, mostly high; pass --samples 1024 or more"
    assert f"to train: nothing, existing nets are drawn and scored (again)\n{few}\nstage 4 of 4" in capsys.readouterr().out


def test_a_flag_of_a_stage_that_is_not_trained_is_named(monkeypatch, capsys):
    flags = "--data digits --teacher t.pt --pretrain.lr 1e-3 --mid none --mid.steps=3 --post.steps 2 --lr 1e-4"
    script.fid.stages_of(script, flags.split())
    said = capsys.readouterr().err
    assert "--pretrain.lr has no effect" in said and "--mid.steps has" in said and said.count("no effect") == 2
    script.fid.stages_of(script, "--data digits --stage pretrain --mid.lr 1e-3".split())
    assert capsys.readouterr() == ("pretrain reads no --mid.lr\n", "")
    for flag in "--mid.q", "--post.nfe", "--mid.seeds", "--eval.steps", "--post.init":        # what that stage never reads is refused; after mid-training post starts from it
        with pytest.raises(SystemExit) as stop:
            script.fid.stages_of(script, ["--data", "digits", f"{flag}=3"])
        assert stop.value.code == 2 and f"{flag}: {flag[2:].split('.')[0]} never reads it" in capsys.readouterr().err
    script.fid.stages_of(script, "--data digits --mid none --post.init random".split())            # then it starts the student
    assert not capsys.readouterr().err
    for flags, idle in (("--mid kd --trajectories 64", "--trajectories"), ("--mid none --nfe=5 --loss l2", "--loss"),       # of no stage
                        ("--mid none --teacher t.pt --post annealed --dropout 0.1 --no-compile --samples 9", "")):
        script.fid.stages_of(script, ["--data", "digits", *flags.split()])
        said = capsys.readouterr().err
        assert said.count("no effect") == bool(idle) and f"warning: {idle}" in said + "warning: " * (not idle), (flags, said)
    for flags in "--stage mid --mid none", "--stage pretrain --teacher t.pt --steps 5":      # left out whole: a line of its own says so
        script.fid.stages_of(script, ["--data", "digits", *flags.split()])
        assert capsys.readouterr() == ("", "")
    for flags, unread in (("--stage post --loss l2 --nfe 8 --q 7", ["post reads no --loss", "post reads no --nfe"]), ("--stage eval --lr 1 --nfe 3", []),
                          ("--seeds 0-3 --stage sample", [])):                # a stage alone: in a line of the log, when it begins
        script.fid.stages_of(script, ["--data", "digits", *flags.split()])
        assert capsys.readouterr() == ("".join(line + "\n" for line in unread), "")
    for post, idle in ("ect", True), ("ecd", False):                                                     # of one method
        monkeypatch.setitem(script.READ_BY, "P_std", "post, not post ect")
        with pytest.raises(SystemExit) if idle else contextlib.nullcontext():
            script.fid.stages_of(script, f"--data digits --post {post} --post.P_std 2".split())
        assert ("--post.P_std: post never reads it" in capsys.readouterr().err) == idle


@pytest.mark.parametrize("flags", ["--q 2000000", "--post annealed --stair 2 --steps 80"])
def test_two_noise_levels_that_fp32_cannot_tell_apart_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        script.check(script.parse(f"--data digits --stage post {flags}".split()))
    assert stop.value.code == 2 and "2^20" in capsys.readouterr().err


def test_a_stage_too_short_for_its_average_or_its_warm_up_says_so():
    short, whole = (script.parse(f"--data digits --stage post {flags}".split()) for flags in ("--steps 7 --ema_beta 0.99", ""))
    said = script.fid.overview([(7, short), (600, whole)], script.DEVICE, short)
    assert said.count("warning") == 2 and "warm-up is more than half: post 20 for 7 steps (pass --post.warmup 0)" in said
    assert "still hold this share of the first: post 93% (pass --post.ema_beta 0.286)" in said
    assert "warning" not in script.fid.overview([(0, short)], script.DEVICE, short)             # it is finished


def test_a_dry_run_keeps_no_answer_about_pictures(monkeypatch, capsys):
    monkeypatch.setitem(nets.SIZES, "edm2-xl", dict(nets.SIZES["edm2-8"], attn_resolutions=()))       # it is built
    os.makedirs("photos/a")
    for k in range(3):
        Image.fromarray(np.full((16, 16, 3), k, np.uint8)).save(f"photos/a/{k}.png")
    code("--data photos --res 16 --teacher scratch --loss huber --dry_run --out x".split(), capsys,
         importlib.import_module("train_cmt_imagenet").main)
    assert not os.path.exists("x")


def test_a_teacher_that_is_not_finished_is_used_with_a_line(road, capsys):
    with open("whole.safetensors", "wb") as file:
        nets.write_safetensors(nets.load_checkpoint(str(road / "pretrain.pt"), whole=True), file)
    assert nets.read_weights("whole.safetensors")[0] and capsys.readouterr().err == ""
    torch.save({**nets.load_checkpoint(str(road / "pretrain.pt"), whole=True), "step": 2}, "half.pt")
    assert nets.read_weights("half.pt")[2]["stage"] == "pretrain"
    assert "half.pt is not finished, step 2 of 3" in capsys.readouterr().err
    assert nets.read_weights(road / "pretrain.pt")[0] and capsys.readouterr().err == ""


def test_a_finished_stage_of_another_road_is_not_taken_for_this_one(road, capsys):
    """In one folder: post from CMT's weights is not ECT from the teacher's."""
    for flags, name in (["--mid", "none"], "--mid cmt, now none"), (["--init", "random"], "--post.init"):
        exit_code, err = code([*TINY, "--out", road, "--steps", "3", "--stage", "post", *flags], capsys)
        assert exit_code == 2 and f"was made by train_cmt_cifar.py --data digits with {name}" in err
    for flag in "teacher", "init":                      # of two causes the plainer one, and no command that names what is not there
        exit_code, err = code([*TINY, "--out", road, "--steps", "9", "--stage", "mid", f"--{flag}", "gone.pt"], capsys)
        assert exit_code == 3 and err.splitlines()[-1].endswith(f"--{flag} gone.pt: no such file; give a file or a URL")


def test_post_training_without_the_mid_training_it_went_on_from_is_not_joined_by_another(road, capsys):
    """mid.pt was lost or moved away: a new one, perhaps of another teacher, would stand in one table with the old post.pt."""
    os.makedirs("x")
    for stage in ("pretrain", "post"):
        shutil.copy(road / f"{stage}.pt", "x")
    for dry in ([], ["--dry_run"]):
        exit_code, err = code([*TINY, "--steps", "3", "--out", "x", *dry], capsys)
        assert exit_code == 2 and "x/mid.pt is not there, post.pt" in err


def test_mid_training_asks_no_teacher_of_other_images(road, capsys):
    os.makedirs("own")
    for k in range(2):
        Image.new("RGB", (16, 16), (60 * k, 0, 0)).save(f"own/{k}.png")
    for stage in ("mid", "all"):
        exit_code, err = code(f"--data own --res 16 --loss huber --stage {stage} --teacher {road}/pretrain.pt --steps 2 --out x".split(), capsys)
        assert exit_code == 3 and "its img_channels is 1, not 3; pass a teacher of this script and --data own" in err


def test_a_folder_with_mid_training_is_none_of_a_road_without(road, capsys):
    """Else its table would show a mid from which post did not come."""
    os.makedirs("x")
    shutil.copy(road / "mid.pt", "x")
    for dry in ([], ["--dry_run"]):
        argv = [*TINY, "--steps", "3", "--teacher", str(road / "pretrain.pt"), "--out", "x", "--mid", "none", *dry]
        exit_code, err = code(argv, capsys)
        assert exit_code == 2 and "x/mid.pt is there, this road has --mid none" in err
    script.main([*TINY, "--stage", "pretrain", "--steps", "1", "--out", "y"])
    for dry in ([], ["--dry_run"]):                     # nor of another teacher
        exit_code, err = code([*TINY, "--steps", "3", "--teacher", "y/pretrain.pt", "--out", "x", *dry], capsys)
        assert exit_code == 2 and "has changed: x/mid.pt saw a teacher of crc32" in err


def test_every_process_names_the_fault_it_meets(monkeypatch, capsys):
    """A broken image is met by one process of eight: its line must not be lost with its rank."""
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), script.fid.one_line(script.parse(["--data", "digits"]), nets.WeightsError):
        raise script.fid.DataError("img00000007.png is broken")
    assert "img00000007.png is broken" in capsys.readouterr().err


def test_a_machine_without_git_runs_all_the_same(monkeypatch):
    monkeypatch.setenv("PATH", "")
    script.fid.open_out("x", script.__file__, []).close()
    assert "commit unknown" in Path("x/log.txt").read_text()


def test_a_fork_that_is_not_committed_is_not_logged_as_part_of_the_commit(here):
    """git describe --dirty does not see files that git does not know."""
    git = "git -c user.name=a -c user.email=a@b"
    assert subprocess.run(f"git init -q && touch own.py && {git} add own.py && {git} commit -qm a && touch fork.py", shell=True).returncode == 0
    for name in ("own", "fork"):
        script.fid.open_out(name, f"{name}.py", []).close()
    commit = subprocess.getoutput("git describe --always")
    assert [Path(f"{name}/log.txt").read_text().strip().endswith(f"commit {commit}{more}") for name, more in (("own", ""), ("fork", ", fork.py not committed"))] == [True, True]


def test_the_average_has_no_gradients():
    net = torch.nn.Linear(3, 2)
    (flat, grad), (average, none) = nets.flatten(net), nets.flatten(torch.nn.Linear(3, 2).requires_grad_(False))
    assert len(grad) == len(flat) and len(average) == len(flat) and none is None


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_broken_and_odd_images_are_named(capsys):
    make_zip("own.zip", [32, 32, 32], broken=[1])
    exit_code, err = code(["--data", "own.zip", "--stage", "pretrain", "--out", "x"], capsys)
    assert exit_code == 3 and "img00000001.png" in err
    make_zip("own.zip", [32, 32, 31])
    exit_code, err = code(["--data", "own.zip", "--stage", "pretrain", "--out", "x"], capsys)
    assert exit_code == 3 and "img00000002.png" in err and "31" in err
    make_zip("own.zip", [48, 48])
    exit_code, err = code(["--data", "own.zip", "--stage", "pretrain", "--out", "x"], capsys)
    assert exit_code == 3 and "48x48" in err and "--res" in err


@pytest.mark.parametrize("flags", [[], ["--res", "32"]])
def test_a_cut_zip_is_named(flags, capsys):
    make_zip("own.zip", [32, 32])
    Path("own.zip").write_bytes(Path("own.zip").read_bytes()[:900])
    exit_code, err = code(["--data", "own.zip", "--stage", "pretrain", "--out", "x", *flags], capsys)
    assert exit_code == 3 and "own.zip" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["train_cmt_cifar", "train_cmt_imagenet", "train_mf_imagenet256", "train_t2i_coco"])
def test_a_flag_behind_a_stage_is_that_stages_alone(name, capsys):
    other = __import__(name)
    argv = ["--data", "digits", "--lr", "0.5", "--mid.lr", "0.25", "--post.steps=7", "--eval.samples", "9"]
    given = {stage: other.parse([*argv, "--stage", stage]) for stage in other.STAGES}
    named = getattr(other, "NEED_STAGE", {})
    assert {s: c.lr for s, c in given.items() if s not in named} == {
        s: 0.25 if s == "mid" else 0.5 for s in other.STAGES if s not in named}
    assert all(given[s].lr == other.parse(["--data", "digits", "--stage", s]).lr for s in named)
    assert [s for s, c in given.items() if c.steps == 7] == ["post"] and [s for s, c in given.items() if c.samples == 9] == ["eval"]
    assert other.parse(argv).lr == 0.5
    for wrong in ("--mid.lrr", "--mid.out", "--sample.lr", "--mid.stage"):
        with pytest.raises(SystemExit) as stop:
            other.parse([*argv, wrong, "1"])
        assert stop.value.code == 2 and f"unrecognized arguments: {wrong}" in capsys.readouterr().err


def test_help_shows_every_knob_with_its_comment(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert "torchrun --nproc_per_node=8" in text and "# steps of the teacher, in trajectories and in samples (B.2)" in text
    with pytest.raises(SystemExit):
        script.parse("--help --data digits --stage post --lr 7".split())
    text = capsys.readouterr().out
    assert "With these flags: data = 'digits'" in text and "lr = 7.0" in text and "steps = 600" in text
    with pytest.raises(SystemExit):
        script.parse("-h --data digits --mid.lr 5".split())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--stage ")]
    assert [re.search(" lr = ([^,]+)", line)[1] for line in lines] == ["0.002", "5.0", "0.0003"]         # of stages that train


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_*.py")), ids=lambda p: p.name)
def test_every_knob_is_used_and_explained(path):
    script, text = __import__(path.stem), path.read_text() + (ROOT / "fid.py").read_text()
    for f in fields(script.Config):
        assert re.search(rf"\b(cfg|c)\.{f.name}\b", text) or f'"{f.name}"' in text, f"--{f.name} is never read"
        for value in typing.get_args(f.type) if f.name in ("mid", "post", "loss") else ():
            assert value == f.default or path.read_text().count(f'"{value}"') > 1, f"--{f.name} {value} has no code"
    numbers = {f.name for f in fields(script.Config) if f.type in (int, float)}
    without = numbers - set(" ".join(script.LIMITS.values()).split()) - {"P_mean", "seed", "w"}
    assert not without, f"no range in LIMITS: {without}"
    presets = {k for row in script.PRESETS.values() for k in row}
    assert presets <= {f.name for f in fields(script.Config)}
    assert set(" ".join([script.NO_WEIGHT, *script.READ_BY]).split()) <= {f.name for f in fields(script.Config)}


def test_a_teacher_of_another_script_is_named(capsys):
    """Every script with the teachers of the three others: one line with the script that made it, and no line of a run before it."""
    scripts = [importlib.import_module(f"train_{name}") for name in ("cmt_cifar", "cmt_imagenet", "mf_imagenet256", "t2i_coco")]
    for home in scripts:
        home.main(f"--data digits --stage pretrain --steps 1 --batch 2 --out {home.__name__} --log_every 1".split())
    for home, other in itertools.permutations(scripts, 2):
        for stage in "all", "mid", "eval", "sample":                             # a folder of another script, whose stages this one may not have
            exit_code, err = code(f"--data digits --stage {stage} --out {other.__name__}".split(), capsys, home.main)
            assert exit_code == 2 and f"was made with script {other.__name__}.py, now {home.__name__}.py" in err and err.count("\n") == 1, err
        argv = f"--data digits --stage mid --teacher {other.__name__}/pretrain.pt --out new".split()
        exit_code, err = code([*argv, *["--loss", "huber"] * (home in scripts[:2])], capsys, home.main)
        assert exit_code == 3 and f" of {other.__name__}.py" in err and err.count("\n") == 1, (home, other, err)
        assert not os.path.exists("new")


@pytest.mark.parametrize("name", ["cmt_cifar", "cmt_imagenet", "mf_imagenet256", "t2i_coco"])
def test_a_teacher_that_is_not_finite_is_refused_before_anything_begins(name, capsys):
    home, wrong = importlib.import_module(f"train_{name}"), f"--data digits --stage pretrain --steps 1 --batch 2 --out y --log_every 1"
    home.main(wrong.split())
    ckpt = torch.load("y/pretrain.pt", weights_only=True)
    next(v for v in ckpt["ema"].values() if v.is_floating_point()).fill_(math.nan)
    torch.save(ckpt, "nan.pt")
    exit_code, err = code(["--data", "digits", "--teacher", "nan.pt", "--out", "new"], capsys, home.main)
    assert exit_code == 3 and re.search(r"--teacher nan.pt: 1 of its tensors are not finite, \S+; pass another\n", err) and not os.path.exists("new"), err


@pytest.mark.parametrize("name", ["train_cmt_cifar", "train_cmt_imagenet", "train_mf_imagenet256", "train_t2i_coco"])
def test_a_stage_alone_without_its_start_is_refused_before_its_plan(name, capsys, here):
    """No line says what is to be trained, and a new folder does not stay; a log that is there gets the refusal."""
    main = importlib.import_module(name).main
    for stage, told in ("mid", "run --stage pretrain first"), ("post", "run --stage mid first"):
        for folder in "new", "old":
            Path("old").mkdir(exist_ok=True)
            exit_code, err = code(["--data", "digits", "--stage", stage, "--out", folder], capsys, main)
            assert exit_code == 3 and told in err and not os.path.exists("new"), err
        assert told in (log := Path("old/log.txt").read_text()) and "to train" not in log and " of 4" not in log


def test_what_starts_from_init_file_is_said(road):
    for flags, told in ([], "mid starts from --init x.pt"), (["--mid", "none"], "post starts from --init x.pt"):
        cfg = script.parse([*TINY, *flags, "--init", "x.pt"])
        stages = [replace(cfg, stage=stage) for stage in ("mid", "post")[len(flags) > 0:]]
        assert told in fid.overview([(3, c) for c in stages], torch.device("cpu"), cfg)
    assert "starts from" not in fid.overview([(3, script.parse(TINY))], torch.device("cpu"), script.parse(TINY))


def test_an_annealing_that_never_moves_q_is_told():
    """Of every preset q grows; where --steps end before the first stair does, a line says so."""
    for data in ("cifar10", "ffhq", "afhqv2", "digits", "own.zip"):
        cfg = script.parse(["--data", data, "--stage", "post", "--post", "annealed"])
        assert cfg.q == 2 and 128 < cfg.q ** (cfg.steps // cfg.stair) <= 512, data
    cfg = script.parse(["--data", "digits", "--stage", "post", "--post", "annealed", "--steps", "187"])
    assert "warning: q never grows in so few steps: 187 (pass an eighth of them as --stair)" in fid.overview([(187, cfg)], torch.device("cpu"), cfg)
    assert "never grows" not in fid.overview([(188, replace(cfg, steps=188))], torch.device("cpu"), replace(cfg, steps=188))


@pytest.mark.parametrize("name", ["train_cmt_cifar", "train_cmt_imagenet"])
def test_few_images_bring_a_warning(name, monkeypatch, capsys, here):
    """They are learned by heart, and no score tells."""
    images, labels = fid.digits()
    monkeypatch.setattr(fid, "digits", lambda: (images[:60], labels[:60]))
    importlib.import_module(name).main([*TINY, "--stage", "pretrain", "--steps", "1", "--out", "few"])
    assert "warning: images: 60; so few are learned by heart (docs/faq.md)" in capsys.readouterr().err
