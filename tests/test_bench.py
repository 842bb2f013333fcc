"""bench.py: what it counts is what the methods cost, and every command of its docstring runs."""
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import nets


@pytest.mark.long
def test_pairs_cost_the_calls_that_the_paper_counts(monkeypatch, capsys):
    """C.2 per pair: CMT one teacher call and one forward; ECT none and two; ECD two for Heun; KD a whole solve (of 4)."""
    monkeypatch.setitem(bench.script.PRESETS, ("digits", "mid", "*"), dict(batch=16, nfe=4, trajectories=4))
    monkeypatch.setattr(bench, "ceiling", lambda device: 1e9)
    bench.main(["pairs", "--rounds", "1", "--batch", "16", "--batch_gpu", "8", "--loss", "l2"])
    rows = {r[0]: list(map(float, r[1:])) for r in re.findall(
        r"\| ([a-z ]+) \|.*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| \d+% \| \d+ \|\n", capsys.readouterr().out)}
    assert rows == {"cmt": [1, 1, 1], "ect": [0, 2, 1], "ecd euler": [1, 2, 1], "ecd heun": [2, 2, 1], "kd": [4, 1, 1],
                    "slow": [2.5, 1, 1], "plain": [1, 1, 1]}


@pytest.mark.long
def test_pairs_of_edm2_cost_the_same_calls(monkeypatch, capsys):
    monkeypatch.setitem(bench.imagenet.PRESETS, ("digits", "mid", "*"), dict(batch=16, nfe=4, trajectories=4))
    monkeypatch.setattr(bench, "ceiling", lambda device: 1e9)
    bench.main(["pairs", "--data", "edm2", "--rounds", "1", "--batch", "16", "--batch_gpu", "8", "--loss", "l2"])
    found = re.findall(r"^\| ([a-z ]+) \|.*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| \d+% \| \d+ \|$",
                       capsys.readouterr().out, re.M)
    assert {name: list(map(float, calls)) for name, *calls in found} == {
        "cmt": [1, 1, 1], "ect": [0, 2, 1], "ecd euler": [1, 2, 1], "ecd heun": [2, 2, 1]}


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


def test_weights_prints_a_time_for_each_way(capsys):
    bench.main(["weights", "--rounds", "1", "--channels", "64"])
    assert len(re.findall(r"\d ms \(", capsys.readouterr().out)) == 5


@pytest.mark.long
def test_claims_run_every_row_once_and_print_what_they_scored(tmp_path, monkeypatch, capsys):
    """Two rows, the second from the first one's teacher and mid-training; a second call runs nothing again."""
    tiny = "--steps 2 --samples 64 --batch 16 --nfe 4 --trajectories 4"
    rows = {"a": ("cmt_cifar", "", [tiny]), "b": ("cmt_cifar", "a mid", [f"--stage post --post ecd {tiny}"])}
    monkeypatch.setattr(bench, "CLAIMS", rows)
    ran, real = [], bench.subprocess.run

    def run(line, **flags):
        if not line[1].startswith("train_"):
            return real(line, **flags)
        ran.append(line[1])
        bench.script.main([*line[2:], *(tiny.split() if "eval" in line else [])])
    monkeypatch.setattr(bench.subprocess, "run", run)
    for _ in range(2):
        bench.main(["claims", "--seeds", "5", "--out", str(tmp_path / "claims")])
    table = re.findall(r"^\| (a|b) \| ([\d.]+ / [\d.]+) \| \2 \| \d+ \|$", capsys.readouterr().out, re.M)
    assert ran == ["train_cmt_cifar.py"] * 3 and len(table) == 4 and table[:2] == table[2:]
    log = (tmp_path / "claims/5/b/log.txt").read_text()
    assert f"eval: post 1-step FD-digits {table[1][1].split(' ')[0]}" in log and "mid: " not in log


@pytest.mark.long
@pytest.mark.parametrize("data", ["digits", "edm2"])
def test_precision_says_that_bf16_rounds_the_step_away(tmp_path, capsys, data):
    """At q = 4096 the difference is smaller than bf16's error and far larger than fp32's."""
    net = (nets.EDMPrecond if data == "digits" else nets.EDM2Precond)(**bench.MODELS[data])
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, 0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1) if p.ndim else p.data.fill_(1)
    torch.save(dict(ema=net.state_dict(), model=bench.MODELS[data]), tmp_path / "net.pt")
    bench.main(["precision", "--data", data, "--net", str(tmp_path / "net.pt")])
    out = capsys.readouterr().out
    found = re.findall(r"\| 1/\d+ \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|", out)
    rows = [list(map(float, row)) for row in found]
    assert len(rows) == 5 and [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all(fp32 < fp16 < bf16 for _, fp32, bf16, fp16 in rows)
    assert 100 * rows[0][1] < rows[0][0] < rows[0][2]
    size, fp32, bf16, fp16, twice = map(float, re.search(r"\n\| (\S+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|\n$", out).groups())
    assert 0 < fp32 < fp16 < bf16 < twice < size


@pytest.mark.long
def test_growth_times_batches_and_runs(monkeypatch, capsys):
    monkeypatch.setattr(bench, "BATCHES", [16])
    monkeypatch.setitem(bench.script.PRESETS, ("digits", "mid", "*"), dict(nfe=4, trajectories=4))
    real = bench.subprocess.run

    def run(line, **flags):
        if line[0] != bench.sys.executable:
            return real(line, **flags)
        bench.script.main(line[line.index(bench.script.__file__) + 1:] + ["--log_every", "1", "--batch", "16"])
    monkeypatch.setattr(bench.subprocess, "run", run)
    bench.main(["growth", "--rounds", "1", "--steps", "40"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^\| 16 \| \d+ \(\d+-\d+\) \|$", out, re.M)) == 1
    rows = re.findall(r"^\| (one|two) process.* \| (\d+) \| -?[\d.]+ \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", out, re.M)
    assert [r[:2] for r in rows] == [("one", "40"), ("one", "4"), ("two", "4")]
    assert all(0 < int(first) <= int(last) for *_, first, last in rows)


@pytest.mark.long
def test_curves_score_every_checkpoint_and_draw_two_pictures(tmp_path, monkeypatch, capsys):
    """Trained weights move on after they are saved: what is scored must be what they were."""
    tiny = "--steps 4 --batch 16 --nfe 4 --trajectories 4 --save_every 2 --lr 1e-2".split()
    main, script = bench.script.main, bench.script
    monkeypatch.setitem(script.PRESETS, ("digits", "eval", "*"), dict(samples=64))
    main(["--data", "digits", "--stage", "pretrain", "--out", str(tmp_path / "t"), *tiny])
    monkeypatch.setattr(script, "main", lambda argv: main([*argv, *tiny]))
    bench.main(["curves", "--net", str(tmp_path / "t/pretrain.pt"), "--out", str(tmp_path)])
    rows = re.findall(r"^(?:CMT \+ )?ECT, [12] step: (.*)$", capsys.readouterr().out, re.M)
    points = [[tuple(p.split()) for p in row.split(", ")] for row in rows]
    assert [len(p) for p in points] == [4, 4, 2, 2]
    assert [x for x, _ in points[0]] == ["32", "64", "96", "128"] and len({y for _, y in points[0]}) == 4
    for name in ("curve", "norms"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (900, 520) and len(image.getcolors(1000000)) > 10


@pytest.mark.long
def test_photos_train_and_score_every_row(tmp_path, monkeypatch, capsys):
    """Every net but the teacher starts from the teacher's weights; CMT's post-training from the mid-training above it."""
    rng, names = np.random.default_rng(0), [f"00000/img{i:08d}.png" for i in range(40)]
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as z:
        for name in names:
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "image.png")
            z.write(tmp_path / "image.png", name)
        z.writestr("dataset.json", json.dumps({"labels": [[n, i % 10] for i, n in enumerate(names)]}))
    tiny = " --steps 2 --batch 16 --nfe 4 --trajectories 4"
    rows = {row: [(stage, flags + tiny) for stage, flags in calls] for row, calls in bench.PHOTOS.items()}
    monkeypatch.setattr(bench, "PHOTOS", rows)
    monkeypatch.setattr(bench.PhotoNet.__init__, "__defaults__", (2, 16))
    out = tmp_path / "out"
    bench.main(["photos", "--data", str(tmp_path / "photos.zip"), "--out", str(out), "--seeds", "3", "--samples", "200"])
    found = re.findall(r"^\| (.+) \| 3 \| ([\d.]+)(?: / ([\d.]+))? \| \d+ \|$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in found] == list(rows) and (found[0][2] == "") and all(two for _, _, two in found[1:])
    first, second = (torch.load(out / "3" / d / "mid.pt", weights_only=True)["net"] for d in ("after_CMT", "CMT_+_ECT"))
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_an_unknown_word_is_refused():
    with pytest.raises(SystemExit):
        bench.main(["pears"])
