"""claims.py: every row and command runs on a few steps, and the gradient bias is what Theorem 5.1 says."""
import importlib
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import claims
import nets


@pytest.mark.long
def test_claims_run_every_row_once_and_print_what_they_scored(tmp_path, monkeypatch, capsys):
    """Two rows, the second from the first one's teacher and mid-training; a second call runs nothing."""
    tiny = "--steps 2 --samples 64 --batch 16 --nfe 4 --trajectories 4"
    rows = {"a": ("cmt_cifar", "", [tiny]), "b": ("cmt_cifar", "a mid", [f"--stage post --post ecd {tiny}"])}
    monkeypatch.setattr(claims, "CLAIMS", rows)
    ran, real = [], claims.script.main

    def run(argv):
        ran.append(argv)
        real([*argv, *(tiny.split() if "eval" in argv else [])])
    monkeypatch.setattr(claims.script, "main", run)
    for _ in range(2):
        claims.main(["claims", "--seeds", "5", "--out", str(tmp_path / "claims")])
    table = re.findall(r"^\| (a|b) \| ([\d.]+ / [\d.]+) \| \2 \| \2 \| \d+ \|$", out := capsys.readouterr().out, re.M)
    assert len(ran) == 3 and len(table) == 4 and table[:2] == table[2:]
    assert re.findall(r"^\| (run|[ab]\b.*?) \|", out, re.M) == ["run", *["a (teacher)", "a (mid)", "a", "b"]] * 2
    log = (tmp_path / "claims/5/b/log.txt").read_text()
    assert f"eval: post 1-step FD-digits {table[1][1].split(' ')[0]}" in log and "mid: " not in log


def test_a_sheet_has_the_means_of_its_runs_and_the_images_of_the_first(tmp_path, monkeypatch, capsys):
    """Verdicts of one seed differ from those of three; the words of the runs stay, but for the seed. Other nets: refused."""
    nets, told = ["teacher", "mid", "post", "alone"], {}
    for seed, one in enumerate((1.0, 2.0, 6.0)):                               # alone: 2 in one step, 1 in two
        (tmp_path / f"{seed}").mkdir()
        (tmp_path / f"{seed}/config.json").write_text(json.dumps(dict(post=dict(script="train_cmt_cifar.py", data="digits", seed=seed))))
        told[str(tmp_path / f"{seed}")] = [{"stage": name, "images": "9", "1-step FD-digits": f"{2.0 if name == 'alone' else one:.2f}",
                                            "2-step FD-digits": "-" if name == "teacher" else "1.00", "1-step shows its digit": f"{90 + seed}.5%"} for name in nets]

    def main(argv):
        flags = dict(zip(argv[::2], argv[1::2]))
        assert flags["--stage"] == "eval" and flags["--data"] == "digits" and flags["--out"].endswith(flags["--seed"])
        for more in {}, dict(table=told[flags["--out"]], samples=7):
            claims.fid.save_stages(flags["--out"], flags["--seed"], (), f"with it \nMore.\nSeed {flags['--seed']}. Large.", **more)
    drawn = []
    monkeypatch.setattr(claims.script, "main", main)
    monkeypatch.setattr(claims.fid, "save_stages", lambda *a: drawn.append(a))
    claims.main(["sheet", *told, "--out", str(tmp_path)])
    (out, shown, names, words, table, samples), = drawn
    assert (out, shown, names, samples) == (str(tmp_path), "0", (), 7) and [row["images"] for row in table] == ["9"] * 4
    assert words == ("On digits, mid-training with it hurts in one step, changes little in two steps: FD-digits 3.00 / 1.00 with it, 2.00 / 1.00 without (means of 3 seeds)"
                     "\nMore.\ntrain_cmt_cifar.py: scores are means of 3 seeds, with their range; images are seed 0's. Large.")
    assert [row["1-step FD-digits"] for row in table] == ["3.00\n1.00 to 6.00"] * 3 + ["2.00\n2.00 to 2.00"]
    assert table[0]["2-step FD-digits"] == "-" and {row["1-step shows its digit"] for row in table} == {"91.5%"}
    (tmp_path / "1/post.pt").touch()
    (tmp_path / "y").mkdir()
    (tmp_path / "y/config.json").write_text(json.dumps(dict(post=dict(script="train_cmt_cifar.py", data="digits", seed=0, q=7))))
    for runs, words in (([*told], "in more than its seed; finish it, with its run in alone, or leave it out"), ([str(tmp_path / "x")], "config.json is not there; name the folder of a run"),
                        ([*told][:1] + [str(tmp_path / "y")], "in more than its seed; finish it")):
        with pytest.raises(SystemExit) as stopped:
            claims.main(["sheet", *runs, "--out", str(tmp_path)])
        assert stopped.value.code == 3 and words in capsys.readouterr().err


@pytest.mark.parametrize("row", claims.CLAIMS)
def test_the_flags_of_every_row_exist(row):
    """Each call parses; a row goes on from one that has what it takes: a teacher, and mid-training."""
    name, base, calls = claims.CLAIMS[row]
    script = importlib.import_module(f"train_{name}")
    for call in calls:
        assert script.parse(["--data", "digits", *call.replace("--loss vgg", "--loss l2").split()])
    script_of_base, _, calls = claims.CLAIMS[base.removesuffix(" mid") or row]
    has_mid = calls == [""] or "--stage mid" in " ".join(calls)
    assert script_of_base == name and (has_mid or not base.endswith(" mid"))


def test_tables_of_docs_have_the_rows_that_claims_prints():
    """Under the same names; docs explain some in brackets. Nets before the last one are lines of the same runs."""
    from test_house import DOCS, tables
    found = 0
    text = DOCS["runs.md"] + DOCS["results.md"]
    for heading, prefix, rows in (("## The paper's claims, seed by seed", "", claims.CLAIMS), ("### Larger pictures", "", claims.PHOTOS),
                                  ("## ImageNet", "EDM2: ", claims.CLAIMS), ("## Text to image", "Text: ", claims.CLAIMS)):
        section = text.split(f"\n{heading}")[1].split("\n#")[0]
        for name in [next(iter(row.values())) for rows in tables(section) for row in rows if "seed 0" in row]:
            found += not name.startswith(("teacher", "after "))
            assert name.startswith(("teacher", "after ")) or prefix + re.sub(r"\*\*| \(.*\)", "", name) in rows, name
    assert found >= 36


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_mid_training_by_a_vgg_of_the_labels(road, tmp_path):
    """Trained once for a seed, it reads the digits; d of Eq. 7 in the block, outside the script's own."""
    assert claims.train_vgg("vgg.pt", 0) > 0.95
    outside, flags = claims.script.make_distance, "--stage mid --steps 2 --batch 16 --trajectories 2"
    flags = ["--data", "digits", "--loss", "l2", "--teacher", str(road / "pretrain.pt"), *flags.split()]
    with claims.vgg_distance("vgg.pt", 0):
        assert isinstance(claims.script.make_distance(None), nets.VGG)
        claims.script.main([*flags, "--out", "by_vgg"])
    claims.script.main([*flags, "--out", "by_l2"])
    a, b = (torch.load(f"{d}/mid.pt", weights_only=True)["net"] for d in ("by_vgg", "by_l2"))
    assert claims.script.make_distance is outside and any(not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.long
def test_curves_score_the_teacher_and_every_checkpoint_and_draw_them(tmp_path, monkeypatch, capsys):
    """Trained weights move on after they are saved: what is scored must be what they were."""
    tiny = "--steps 4 --batch 16 --nfe 4 --trajectories 4 --save_every 2 --lr 1e-2".split()
    main, script = claims.script.main, claims.script
    monkeypatch.setitem(script.PRESETS, ("digits", "eval", "*"), dict(samples=64))
    monkeypatch.setattr(script, "main", lambda argv: main([*argv, *tiny]))
    save, panels = claims.fid.save_chart, {}
    monkeypatch.setattr(claims.fid, "save_chart", lambda path, what, *more: panels.update(what) or save(path, what, *more))
    claims.main(["curves", "--seeds", "3,4", "--out", str(tmp_path)])
    assert all(low < mean < high for panel in panels.values() for name in (claims.WITH, claims.WITHOUT) for _, mean, low, high in panel[name])
    rows = re.findall(r"^(?:mid- and post-training|without mid-training), (?:one step|two steps): (.*)$", capsys.readouterr().out, re.M)
    points = [[tuple(p.split()) for p in row.split(", ")] for row in rows]
    assert [len(p) for p in points] == [5, 3, 5, 3]
    assert [x for x, _ in points[0]] == ["0", "32", "64", "96", "128"] and len({y for _, y in points[0]}) == 5
    assert points[0][0] == points[1][0] and points[2][0] == points[3][0] != points[0][0]              # both begin as the teacher
    with Image.open(tmp_path / "scores.png") as image:
        assert image.size[0] >= 900 and len(image.getcolors(1000000)) > 10
    claims.main(["plot", str(tmp_path / "3/mid-_and_post-training"), str(tmp_path / "3/without_mid-training"), "--out", str(tmp_path / "new")])
    assert Image.open(tmp_path / "new/plot.png").size[0] >= 900 and capsys.readouterr().out.startswith(f"open {tmp_path}/new/plot.png; ")


def test_plot_without_a_run_is_one_line(tmp_path, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/metrics.jsonl").write_text('{"stage": "mid", "images": 4, "loss": 1.0, "grad": 1.0}')
    for runs in ([str(tmp_path)], [str(tmp_path / "real"), str(tmp_path)]):           # one of two as well
        claims.fid.SAID.clear()                       # as in a process of its own
        with pytest.raises(SystemExit) as e:
            claims.main(["plot", *runs, "--out", str(tmp_path / "new")])
        assert e.value.code == 3 and "name the folder" in capsys.readouterr().err


def photo_zip(tmp_path):
    """Forty photos of noise and their ten labels, as EDM packs them."""
    rng, names = np.random.default_rng(0), [f"00000/img{i:08d}.png" for i in range(40)]
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as z:
        for name in names:
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "image.png")
            z.write(tmp_path / "image.png", name)
        z.writestr("dataset.json", json.dumps({"labels": [[n, i % 10] for i, n in enumerate(names)]}))
    return ["--data", str(tmp_path / "photos.zip"), "--out", str(tmp_path / "out"), "--samples", "200"]


def test_photos_are_judged_by_the_same_net_in_every_folder(tmp_path):
    """Two folders of runs, made at other times: their scores stand in one table."""
    images, labels = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8), torch.arange(40) % 10
    for seed in "12":
        torch.manual_seed(int(seed))
        claims.PhotoNet(images, labels, tmp_path / seed, 2, 16)
    first, second = (torch.load(tmp_path / seed, weights_only=True) for seed in "12")
    assert all(torch.equal(v, second[k]) for k, v in first.items())


@pytest.mark.long
def test_photos_train_and_score_every_row(tmp_path, monkeypatch, capsys):
    """All nets start from the teacher's weights, and CMT's post-training from the mid-training above it."""
    flags = photo_zip(tmp_path)
    tiny = " --steps 2 --batch 16 --nfe 4 --trajectories 4"
    rows = {row: [call + tiny for call in calls] for row, calls in claims.PHOTOS.items()}
    monkeypatch.setattr(claims, "PHOTOS", rows)
    monkeypatch.setattr(claims.PhotoNet.__init__, "__defaults__", (2, 16))
    out = tmp_path / "out"
    claims.main(["photos", *flags, "--seeds", "3"])
    found = re.findall(r"^\| (.+) \| 3 \| ([\d.]+)(?: / ([\d.]+))? \| \d+ \|$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in found] == list(rows)
    assert all(two for _, _, two in found)                # the teacher: in 1 and 16 steps
    mids = [out / "3" / folder / "mid.pt" for folder in ("after_CMT", "CMT_+_ECT")]
    first, second = (torch.load(path, weights_only=True)["net"] for path in mids)
    assert all(torch.equal(v, second[k]) for k, v in first.items())


@pytest.mark.long
def test_roads_train_score_and_count_the_seconds_of_the_teacher(tmp_path, monkeypatch, capsys):
    """A road's curve begins where its teacher ended; the digits are digits again afterwards."""
    tiny = " --steps 2 --batch 16 --trajectories 4 --size 4x32x1 --save_every 1 --weak 4x32x1"
    rows = {road: (base, [call + tiny for call in calls]) for road, (base, calls) in claims.ROADS.items()}
    monkeypatch.setattr(claims, "ROADS", rows)
    monkeypatch.setattr(claims.PhotoNet.__init__, "__defaults__", (2, 16))
    claims.main(["roads", *photo_zip(tmp_path), "--seeds", "3"])
    found = re.findall(r"^\| (.+) \| 3 \| (\w+), (\d) \| (\d+) \| ([\d.]+)(?: / ([\d.]+))? \|$", capsys.readouterr().out, re.M)
    assert [(name, stage) for name, stage, step, *_ in found if step == "2"] == [
        (road, call.split("--stage ")[1].split()[0]) for road, (_, calls) in rows.items() for call in calls]
    ends = {name: float(seconds) for name, _, _, seconds, *_ in found}
    assert all(ends[road] >= ends[base] for road, (base, _) in rows.items() if base)
    assert len(claims.fid.digits()[0]) == 1797


@pytest.mark.usefixtures("here")
def test_bias_has_a_row_for_every_start(road, capsys):
    """Small steps: the relative bias is near 1 for every start (docs/results.md)."""
    claims.main(["bias", "--out", str(road), "--samples", "16"])
    rows = [line.split(" | ") for line in (road / "bias.md").read_text().splitlines()[2:14]]
    assert [r[0][2:] for r in rows[:4]] == ["diffusion", "CMT", "CMT + ECT", "random"] and len(rows) == 12
    assert {r[1] for r in rows} == {"1/4096", "1/64", "1/10"} and all(float(r[2]) > 0 for r in rows)


def test_bias_of_an_empty_folder_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        claims.main(["bias", "--out", str(tmp_path)])
    assert e.value.code == 3 and "no finished checkpoint" in capsys.readouterr().err


def test_gradient_bias_is_that_of_two_gradients():
    """On a net of one weight: f = w x, so both gradients can be written down."""
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

        def forward(self, x, sigma):
            return self.w * x
    g = torch.Generator().manual_seed(0)
    x_t, x_r, end = torch.randn((3, 600, 1, 2, 2), generator=g, dtype=torch.float64)
    t = torch.ones(600, dtype=torch.float64)
    gap2, oracle, relative, cosine = claims.gradient_bias(Scale(), x_t, x_r, t, t / 2, end)
    a = (2 * x_t * (3 * x_t - end)).sum() / 600
    b = (2 * x_t * (3 * x_t - 3 * x_r)).sum() / 600
    assert gap2 == pytest.approx((a - b).item() ** 2)
    assert oracle == pytest.approx((3 * x_t - end).square().sum() / 600)
    assert relative == pytest.approx(abs(a - b) / abs(a)) and cosine == pytest.approx((a * b).sign().item())


def test_an_unknown_word_is_refused():
    with pytest.raises(SystemExit):
        claims.main(["pears"])


@pytest.mark.parametrize("argv, words", [
    ("claims --methods foo", "--methods foo: no such row"), ("roads --methods ECT --data x", "roads; the nearest are"), ("photos", "--data"), ("plot --seeds 1 out", "--seeds"), ("claims --seeds x", "--seeds x is not possible"),
    ("photos --data gone.zip", "gone.zip"), ("photos --data plain", "no labels"), ("bias --samples -1", "--samples -1"),
    ("claims --methods ECT --seeds 0", "--methods ECT: it goes on from"), ("bias --device gpu", "invalid choice"), ("curves --seedz x", "did you mean --seeds?"), ("bias --out plain/1.png", "plain/1.png: plain/1.png is a file"), ("bias --out gone", "no finished checkpoint of train_cmt_cifar.py")])
def test_a_wrong_command_is_one_line(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").mkdir()
    Image.new("RGB", (16, 16)).save("plain/1.png")
    with pytest.raises(SystemExit) as e:
        claims.main([*argv.split(), *["--out", "new"] * ("--out" not in argv)])
    err = capsys.readouterr().err.strip()
    assert e.value.code in (2, 3) and words in err and len(err.splitlines()) <= 1 + ("plain" in argv)    # it names what it found
