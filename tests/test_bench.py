"""bench.py: what it counts is what the methods cost, and every command of its docstring runs."""
import re

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


@pytest.mark.long
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


def test_weights_prints_a_time_for_each_way(capsys):
    bench.main(["weights", "--rounds", "1", "--channels", "64"])
    assert len(re.findall(r"\d ms \(", capsys.readouterr().out)) == 5


@pytest.mark.long
@pytest.mark.parametrize("data", ["digits", "edm2"])
def test_precision_says_that_bf16_rounds_the_step_away(tmp_path, capsys, data):
    """At q = 4096 the difference is smaller than bf16's error and far larger than fp32's."""
    net = (nets.EDMPrecond if data == "digits" else nets.EDM2Precond)(**bench.MODELS[data])
    torch.manual_seed(0)
    for p in net.parameters():
        if p.ndim:
            torch.nn.init.normal_(p, 0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
        else:
            p.data.fill_(1)
    torch.save(dict(ema=net.state_dict(), model=bench.MODELS[data]), tmp_path / "net.pt")
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


@pytest.mark.long
def test_growth_times_batches_and_runs(monkeypatch, capsys):
    monkeypatch.setattr(bench, "BATCHES", [16])
    monkeypatch.setitem(bench.script.PRESETS, ("digits", "mid", "*"), dict(nfe=4, trajectories=4))
    real = bench.subprocess.run

    def run(line, **flags):
        if line[0] != bench.sys.executable:
            return real(line, **flags)
        bench.main(line[line.index(bench.__file__) + 1:] + ["--log_every", "1", "--batch", "16"])
    monkeypatch.setattr(bench.subprocess, "run", run)
    bench.main(["growth", "--rounds", "1", "--steps", "40"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^\| 16 \| \d+ \(\d+-\d+\) \|$", out, re.M)) == 1
    pattern = r"^\| (one|two) process.* \| (\d+) \| -?[\d.]+ \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$"
    rows = re.findall(pattern, out, re.M)
    assert [r[:2] for r in rows] == [("one", "40"), ("one", "4"), ("two", "4")]
    assert all(0 < int(first) <= int(last) for *_, first, last in rows)


def test_memory_counts_activations_of_the_full_size_net_without_building_it(capsys):
    """XL: 31 GB (bf16 27) of weights, gradients, Adam, EMA, hoisted and theirs, under 1 GB an image."""
    for precision, held, least, most in (("fp32", 7, 0.5, 1.0), ("bf16", 6, 0.25, 0.5)):
        flags = "--script train_cmt_imagenet --res 64 --batch_gpu 16".split()
        bench.main(["memory", *flags, "--precision", precision])
        lines = capsys.readouterr().out.splitlines()
        mid, post = [[float(v) for v in re.findall(r"\d+\.\d+", line)] for line in lines]
        for total, fixed, frozen, one in (mid, post):
            assert fixed == pytest.approx(held * 1.1193 * 4, rel=0.01) and least < one < most
            assert total == pytest.approx(fixed + frozen + 16 * one, rel=0.01)
        assert post[2] == 0 < mid[2] == pytest.approx(1.1193 * (4 if precision == "fp32" else 2), rel=0.1)
    bench.main("memory --res 64 --stage post --post ecd".split())      # the teacher, and a weak XS
    assert 1.05 < float(re.search(r"([\d.]+) frozen nets", capsys.readouterr().out)[1]) / (1.1193 * 4) < 1.2


def test_memory_says_what_to_pass_to_a_smaller_gpu(monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    room = bench.argparse.Namespace(total_memory=40e9)
    monkeypatch.setattr(bench.torch.cuda, "get_device_properties", lambda device: room)
    assert bench.fitting(39, 0.5, 16) == ""
    assert bench.fitting(31 + 64, 0.5, 128).endswith("pass --batch_gpu 16")


def test_an_unknown_word_is_refused():
    with pytest.raises(SystemExit):
        bench.main(["pears"])
