"""bench.py: what it counts is what the methods cost, and every command of its docstring runs."""
import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import bench
import nets


def calls(capsys):
    """{method: [teacher calls, forwards, backwards]} of a printed table of pairs."""
    found = re.findall(r"^\| ([a-z ]+) \|.*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| \d+% \| \d+ \|$",
                       capsys.readouterr().out, re.M)
    return {name: list(map(float, rest)) for name, *rest in found}


@pytest.mark.long
def test_pairs_cost_the_calls_that_the_paper_counts(monkeypatch, capsys):
    """C.2 per pair: CMT one teacher call, one forward; ECT none and two; ECD two (Heun); KD a solve (4)."""
    monkeypatch.setitem(bench.script.PRESETS, ("digits", "mid", "*"), dict(batch=16, nfe=4, trajectories=4))
    monkeypatch.setattr(bench, "ceiling", lambda device: 1e9)
    bench.main(["pairs", "--rounds", "1", "--batch", "16", "--batch_gpu", "8", "--loss", "l2"])
    assert calls(capsys) == {
        "cmt": [1, 1, 1], "ect": [0, 2, 1], "ecd euler": [1, 2, 1], "ecd heun": [2, 2, 1], "kd": [4, 1, 1],
        "slow": [2.5, 1, 1], "plain": [1, 1, 1]}


def test_pairs_of_edm2_cost_the_same_calls(monkeypatch, capsys):
    monkeypatch.setitem(bench.imagenet.PRESETS, ("digits", "mid", "*"), dict(batch=16, nfe=4, trajectories=4))
    monkeypatch.setattr(bench, "ceiling", lambda device: 1e9)
    bench.main("pairs --data edm2 --rounds 1 --batch 16 --batch_gpu 8 --loss l2".split())
    assert calls(capsys) == {
        "cmt": [1, 1, 1], "ect": [0, 2, 1], "ecd euler": [1, 2, 1], "ecd heun": [2, 2, 1]}


@pytest.mark.long
def test_a_mean_flow_step_is_a_forward_pass_and_a_quarter_of_a_product(capsys):
    """Forwards by hooks: no guidance where none is asked; the product on a quarter; the textbook on all."""
    bench.main(["mf", "--rounds", "1", "--size", "4x32x1"])
    found = re.findall(r"^\| (.+?) \| [\d.]+ \(.*?\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
                       capsys.readouterr().out, re.M)
    rows = {name: [float(x) for x in rest] for name, *rest in found}
    assert len(rows) == 7 and rows["flow matching"] == [1, 1, 0, 0] == rows["loss_mf, --ratio 0"]
    assert rows["Mean Flow"][1:] == [1, 0.25, 0] and rows["product on all"][2:] == [1, 0]
    assert rows["Mean Flow"][0] < 1.3 < rows["product on all"][0]
    assert 0.25 <= rows["Mean Flow, omega 0.2, kappa 0.92, t in [0, 0.75]"][3] <= 1.25


@pytest.mark.long
@pytest.mark.parametrize("data", ["digits", "edm2"])
def test_precision_says_that_bf16_rounds_the_step_away(tmp_path, capsys, data):
    """At q = 4096 the difference is smaller than bf16's error and far larger than fp32's."""
    home, name = bench.DATA[data]
    cfg = home.parse(["--data", name])
    model = bench.teacher_size(home, cfg, home.load_data(cfg))
    net = (nets.EDMPrecond if data == "digits" else nets.EDM2Precond)(**model)
    torch.manual_seed(0)
    for p in net.parameters():
        if p.ndim:
            torch.nn.init.normal_(p, 0, 2 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)      # large, as trained ones
        else:
            p.data.fill_(1)
    torch.save(dict(ema=net.state_dict(), model=model), tmp_path / "net.pt")
    bench.main(["precision", "--data", data, "--net", str(tmp_path / "net.pt")])
    out = capsys.readouterr().out
    found = re.findall(r"\| 1/\d+ \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|", out)
    rows = [list(map(float, row)) for row in found]
    assert len(rows) == 5 and [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all(fp32 < fp16 < bf16 for _, fp32, bf16, fp16 in rows)
    assert 100 * rows[0][1] < rows[0][0] < rows[0][2]
    last = re.search(r"\n\| (\S+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|\n$", out)
    size, fp32, bf16, fp16, twice = map(float, last.groups())
    assert 0 < fp32 < fp16 < bf16 < twice < size


COUNTED = """
import contextlib, functools, io, json, sys
import torch
import bench

bench.measure = functools.cache(bench.measure)       # some steps are asked for twice


def planned(flags):
    # (exit code, output) of bench.py plan
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            return bench.main(["plan", *flags.split()]) or 0, out.getvalue()
        except SystemExit as e:
            return e.code, out.getvalue()


def seen(flags):
    cfg = bench.script.parse(["--data", "digits", *flags.split()])
    step = bench.measure(bench.script, cfg, 1)
    flop = {phase: sum(n * k[2] for k, n in step.calls.items() if k[0] == phase) for phase, *_ in step.calls}
    return dict(flop=flop, **{k: getattr(step, k) for k in ("parameters", "held", "optimiser", "peak", "sent")})


with bench.Meter() as meter:
    net = torch.nn.Linear(8, 16, bias=False).to(meter.device)
    meter.calls.clear()
    x = torch.zeros(4, 8, device=meter.device)
    y = net(x)
    y.t()
    forward = [*meter.calls.items()]
    meter.calls.clear()
    held = sum(meter.alive.values())
    y.sum().backward()
    x.add_(x)
    x.zero_()
    rest = [*meter.calls.items()]
    del x, y
    small = dict(forward=forward, rest=rest, held=held, left=sum(meter.alive.values()))
sizes = [seen(f"--stage post --batch_gpu {n}") for n in (8, 16, 32)]
post = bench.script.parse("--data digits --stage post".split())
fit, step = bench.fitting(bench.script, post, 1, sizes[1]["peak"])
none = bench.measure(bench.script, bench.script.parse("--stage mid --mid none".split()), 1)
refused = [planned(flags)[0] for flags in (
    "train_cmt_mnist", "train_cmt_cifar --gpus 0", "train_cmt_cifar --device tpu",
    "train_cmt_cifar --data digits --gpus 5", "train_cmt_cifar --banana 1")]
idle = [planned(f"train_cmt_cifar --stage {flags}") for flags in ("mid --mid none", "eval", "pretrain")]
print(json.dumps(dict(small=small, sizes=sizes, mid=seen("--stage mid --nfe 4 --trajectories 8"), fit=fit, peak=step.peak, none=none,
                      refused=refused, idle=idle)))
bench.main("plan train_mf_imagenet256.py --data digits --size 4x128x1 --gpus 2 --price 3 --device a100".split())
bench.main("roofline train_mf_imagenet256 --data digits --size 4x128x1 --gpus 2 --stage mid".split())
"""


@pytest.fixture(scope="module")
def counted():
    """What a process of its own has counted on a GPU without data, and the tables that it printed."""
    out = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True,
                         cwd=Path(bench.__file__).parent).stdout
    first, rest = out.split("\n", 1)
    lines = [re.split(r" *\| *", line)[1:-1] for line in rest.splitlines() if line.startswith("|")]
    heads = [k for k, cells in enumerate(lines) if cells[0] in ("stage", "command")] + [None]
    tables = [[dict(zip(lines[a], cells)) for cells in lines[a + 2:b]] for a, b in zip(heads, heads[1:])]
    return json.loads(first), tables


def test_a_small_net_costs_what_is_counted_by_hand(counted):
    """One linear layer, 4 images, 8 to 16 channels."""
    small = counted[0]["small"]
    zeros, product = small["forward"]                                  # and the transpose is no kernel
    assert product == [["weights", "fp32", 2 * 4 * 8 * 16, 4 * (4 * 8 + 8 * 16 + 4 * 16)], 1]
    rest = [key for key, _ in small["rest"]]
    assert [key[2] for key in rest if key[2]] == [2 * 4 * 8 * 16]      # of the weights, none of the images
    assert rest[-2:] == [["weights", "", 0, 2 * 4 * 32], ["weights", "", 0, 4 * 32]]       # x += x; zero_
    assert small["held"] == 4 * (128 + 32 + 64) and small["left"] == 4 * 2 * 128           # weights, gradient


def test_a_stage_holds_what_its_parameters_say(counted):
    """Weights, gradients, average 4 bytes each, RAdam's moments 8; the rest is affine in the images at once."""
    sizes, n = counted[0]["sizes"], counted[0]["sizes"][0]["parameters"]
    for step in sizes:
        assert step["parameters"] == n and 12 * n <= step["held"] < 12.5 * n and step["sent"] == 0
        assert step["optimiser"] == pytest.approx(8 * n, abs=8) and step["flop"] == sizes[0]["flop"]
    low, middle, high = (step["peak"] for step in sizes)
    assert high - middle == pytest.approx(2 * (middle - low), rel=0.02) and middle > 20 * n
    assert (counted[0]["fit"], counted[0]["peak"]) == (16, middle)     # as many as fit in what 16 need
    assert counted[0]["none"] is None


def test_a_pair_costs_one_call_of_the_teacher_and_one_of_the_student(counted):
    """C.2, by FLOP; backward is two more, but for the gradient of the images, which nobody asks for."""
    flop, post = counted[0]["mid"]["flop"], counted[0]["sizes"][0]["flop"]
    assert flop["teacher"] == flop["forward"] == post["forward"] / 2 and flop["weights"] == 0
    assert 1.9 < flop["backward"] / flop["forward"] < 2
    assert counted[0]["mid"]["held"] == pytest.approx(16 * counted[0]["mid"]["parameters"], rel=0.01)


def test_plan_has_a_row_a_stage_and_prices_multiply(counted):
    rows = [{**row, **more} for row, more in zip(*counted[1][1:3], strict=True)]
    assert [row["stage"].split()[1] for row in rows] == ["pretrain", "mid", "post"]
    for row in rows:
        n = int(row["parameters"].replace(",", ""))
        column = next(c for c in row if c.startswith("GB: weights, gradients, average, optimiser, frozen"))
        parts = [float(part) for part in row[column].split(", ")]
        assert parts[:4] == [pytest.approx(b * n / 1e9, rel=0.01) for b in (4, 4, 4, 8)]
        assert float(row["GB sent"]) == pytest.approx(4 * n / 1e9, rel=0.1)    # of two: the gradient, once each
        assert sum(parts) == pytest.approx(float(row["peak GB"]), rel=0.02)
        hours = float(row["ms a step"]) * int(row["steps"].replace(",", "")) / 3.6e6
        assert float(row["hours"]) == pytest.approx(hours, rel=0.01)
        assert float(row["GPU-hours"]) == pytest.approx(2 * hours, rel=0.01)
        assert float(row["dollars"]) == pytest.approx(6 * hours, abs=0.01)
        assert {"TFLOP", "kernels", "GB: products, rest", "GB sent", "of the time, at 100 Gb/s"} <= set(row)
    (whole,), most = counted[1][0], max(float(row["peak GB"]) for row in rows)
    assert whole["stages"] == "3" and float(whole["most GB on a GPU"]) == most
    assert float(whole["dollars"]) == pytest.approx(sum(float(row["dollars"]) for row in rows), rel=0.01)


def test_roofline_splits_a_step(counted):
    rows = {row["phase"]: row for row in counted[1][3]}
    assert list(rows) == ["teacher", "forward", "backward", "weights", "all"]
    kernels = [int(row["kernels"].replace(",", "")) for row in rows.values()]
    assert sum(kernels[:-1]) == pytest.approx(kernels[-1], abs=2)
    # gradient: read, zeroed; Adam: 28; average: 12; autocast's copies of the weights: 6
    assert 48 <= int(rows["weights"]["bytes a parameter"]) < 56 and float(rows["weights"]["TFLOP"]) == 0


@pytest.mark.parametrize("calls, ms, share", [
    ({("forward", "bf16", 450e9, 1): 1}, 1.0, 1.0), ({("forward", "tf32", 0.25e9, 1): 2000}, 14.0, 1 / 7),
    ({("weights", "", 0, 2.6e9): 3}, 3.0, 0.0), ({("forward", "fp32", 45e9, 26e9): 1}, 10.0, 0.1)])
def test_a_step_takes_its_arithmetic_its_bytes_or_its_launches(calls, ms, share):
    """An H100's numbers; a kernel takes what is longer of its arithmetic and its bytes."""
    columns, took, of_it = bench.spent(calls, "h100", True)
    assert took == pytest.approx(ms, rel=0.01) and of_it == pytest.approx(share, abs=0.01)


def test_plan_refuses_what_it_cannot_plan_and_says_that_nothing_trains(counted):
    assert counted[0]["refused"] == [2] * 5
    assert [(code, out.endswith("nothing of this trains\n")) for code, out in counted[0]["idle"]] == [(0, True)] * 3


def test_a_stage_says_what_it_holds(road, monkeypatch):
    """In the log of every stage; on a GPU beside what there is, with a warning above 90 % of it."""
    said = re.findall(r"^(\w+): begins, 3 steps, ([\d,]+) parameters(?:; first the teacher draws trajectories)?$", (road / "log.txt").read_text(), re.M)
    assert [stage for stage, _ in said] == ["pretrain", "mid", "post"]              # of small nets the number alone
    large = torch.zeros(1).expand(300_000_000)
    assert "300,000,000 parameters; GB: weights, gradients, average 1.2 each, optimiser 2.4; " in nets.memory(
        large, argparse.Namespace(state={}), str(road / "x.pt"))

    class Weights(list):
        nbytes, is_cuda, device = 4e9, True, "cuda:0"
    monkeypatch.setattr(nets.shutil, "disk_usage", lambda out: argparse.Namespace(free=32e9))
    for room, warns in ((30e9, False), (28e9, True)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: argparse.Namespace(total_memory=room))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 18e9)
        text = nets.memory(Weights(), argparse.Namespace(state={}), str(road / "none.pt"))
        assert f"frozen nets and data 6: 26 of {room / 1e9:.0f}" in text and ("above 90 %" in text) == warns
        begun = nets.memory(Weights(), argparse.Namespace(state={0: "moments"}), str(road / "none.pt"))                   # allocated by now
        assert "frozen nets and data -2: 18 of" in begun
    monkeypatch.setattr(nets.shutil, "disk_usage", lambda out: argparse.Namespace(free=31e9))
    with pytest.raises(OSError, match="none.pt: 2 checkpoints of this and later stages take 32 GB, 31 are free"):                 # before the first step
        nets.memory(Weights(), argparse.Namespace(state={}), str(road / "none.pt"))
    assert nets.memory(Weights(), argparse.Namespace(state={}), road / "mid.pt")        # going on asks for one


def test_docs_name_the_rows_of_pairs_and_mf_as_they_are_printed():
    from test_house import DOCS, tables
    names = [row["a step of"] for rows in tables(DOCS["costs.md"]) for row in rows if "a step of" in row]
    assert [re.sub(r"\*\*| \(.*\)", "", name) for name in names] == [*bench.STEPS]
    assert [row["method"] for rows in tables(DOCS["costs.md"]) for row in rows if "method" in row] == [*bench.METHODS]


def test_an_unknown_word_is_refused(capsys):
    for argv, word in (["pears"], "pears"), (["mf", "--loss", "l2"], "--loss"), (["precision", "--precision", "fp16"], "--precision"), (
            ["pairs", "--methods", "cmt,foo"], "foo"), (["mf", "--batch", "-2"], "--batch -2"), (["plan", "--price", "-3"], "--price -3"), (["plan", "train_cmt_imagenet", "--res", "63"], "--res 63"), (
            ["plan", "train_cmt_cifar", "--nfe", "0"], "--nfe 0"), (["pairs", "--device", "gpu"], "gpu"):
        with pytest.raises(SystemExit) as e:
            bench.main(argv)
        err = capsys.readouterr().err
        assert e.value.code == 2 and word in err and len(err.splitlines()) == 1       # nothing is ignored


def test_step_measures_the_scripts_own_step(monkeypatch, capsys):
    """On a GPU; here the CPU stands in for it. Noise and random weights, the mean over whole solves, --gpus' share."""
    steps, random_weights = Counter(), bench.random_weights
    monkeypatch.setattr(bench, "gpu_name", lambda: "a GPU")        # torch itself is to see none, also where it is built for one
    for name, value in dict(synchronize=None, empty_cache=None, reset_peak_memory_stats=None, max_memory_allocated=2e9).items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)

    def on_cpu(home, cfg, gpus, device, sent, more):
        assert device.type == "cuda"
        count = more[home]["count"]
        more = {home: dict(count=lambda *args: steps.update([cfg.stage]) or count(*args))}
        return random_weights(home, cfg, gpus, torch.device("cpu"), sent, more)
    monkeypatch.setattr(bench, "random_weights", on_cpu)
    bench.main("step train_mf_imagenet256 --data digits --batch 16 --trajectories 4 --gpus 2 --steps 3 --save_every 1 --out x".split())
    out = capsys.readouterr().out
    assert not Path("x").exists()                     # a run of that name is left alone
    assert "a GPU, one of 2 processes; nothing is sent" in out
    rows = [re.split(r" *\| *", line)[1:-1] for line in out.splitlines() if line.startswith("| digits")]
    assert [row[0].split()[1] for row in rows] == ["pretrain", "mid", "post"] == [*steps]
    assert steps["pretrain"] == steps["post"] == 9 and steps["mid"] == 3 + 112 // 16     # 28 pairs a trajectory
    for _, once, ms, speed, peak, *_ in rows:
        assert (once, peak) == ("8", "2") and float(speed.replace(",", "")) == pytest.approx(8e3 / float(ms), rel=0.02)
    monkeypatch.setattr(bench, "gpu_name", lambda: "no GPU")
    with pytest.raises(SystemExit):
        bench.main(["step", "train_cmt_cifar"])
    assert "step needs a GPU; plan estimates without one" in capsys.readouterr().err
