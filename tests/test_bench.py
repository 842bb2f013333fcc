"""bench.py: what it counts is what the methods cost, and every command of its docstring runs."""
import re

import pytest

import bench


def test_pairs_cost_the_calls_that_the_paper_counts(monkeypatch, capsys):
    """C.2 per pair: CMT one teacher call and one forward; ECT none and two; ECD two for Heun; KD a whole solve (of 4)."""
    monkeypatch.setitem(bench.script.PRESETS, ("digits", "mid", "*"), dict(batch=16, nfe=4, trajectories=4))
    monkeypatch.setattr(bench, "ceiling", lambda device: 1e9)
    bench.main(["pairs", "--rounds", "1", "--batch", "16", "--loss", "l2"])
    rows = {r[0]: list(map(float, r[1:])) for r in re.findall(
        r"\| ([a-z ]+) \|.*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| \d+% \|\n", capsys.readouterr().out)}
    assert rows == {"cmt": [1, 1, 1], "ect": [0, 2, 1], "ecd euler": [1, 2, 1], "ecd heun": [2, 2, 1], "kd": [4, 1, 1],
                    "slow": [2.5, 1, 1], "plain": [1, 1, 1]}


def test_weights_prints_a_time_for_each_way(capsys):
    bench.main(["weights", "--rounds", "1", "--channels", "64"])
    assert len(re.findall(r"\d ms \(", capsys.readouterr().out)) == 5


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


def test_an_unknown_word_is_refused():
    with pytest.raises(SystemExit):
        bench.main(["pears"])
