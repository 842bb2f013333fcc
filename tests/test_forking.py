"""What docs/forking.md promises: its code trains as printed, and a slip is told, by the run or by tests/test_forks.py."""
import importlib
import re
from pathlib import Path

import pytest
import torch

import fid
import nets
import train_cmt_cifar as script
from conftest import ROOT, TINY, code, forked
from test_forks import ask_pairs, faults, idle

pytestmark = pytest.mark.usefixtures("here")


def test_the_post_training_of_the_forking_guide_trains(here, monkeypatch, capsys):
    """docs/forking.md: its row, its loss and its branch; test_forks.py names a word without its branch."""
    loss, branch, row = re.search(r'```python\n(def loss_mine.*?)```.*?```python\n(.*?)```.*?`(\("digits", "post", "mine"\).*?)`', (ROOT / "docs/forking.md").read_text(), re.S).groups()
    text = (ROOT / "train_cmt_cifar.py").read_text()
    for old, new in (('] = "ect"', ', "mine"] = "ect"'), ("\n}\nABOUT", f"\n    {row}\n}}\nABOUT"), ("def make_distance(", loss + "\n\ndef make_distance(")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    mine = [*TINY, "--steps", "2", "--post", "mine"]
    assert idle(forked(text, monkeypatch), "forgotten") == ["--post=mine: mine: no branch returns its loss; is a return missing? (docs/forking.md)"]
    fork = forked(text.replace("    assert cfg.post", branch + "    assert cfg.post"), monkeypatch)
    fork.main([*mine, "--out", "x"])
    before, after = (nets.load_checkpoint(f"x/{stage}.pt")["ema"] for stage in ("mid", "post"))
    assert Path("x/results.md").exists() and any(not torch.equal(before[k], after[k]) for k in before)
    cfg = fork.parse([*TINY, "--stage", "mid"])                        # of one stage, too
    assert "fork.py is a fork: python -m pytest tests/test_forks.py" in fid.overview([(3, cfg)], torch.device("cpu"), cfg)
    for home, counted in ((fork, False), (script, True)):             # bench.py knows no forks
        capsys.readouterr()
        with pytest.raises(SystemExit):
            home.main([*TINY, "--out", "new", "--dry_run"])
        out = capsys.readouterr().out
        assert ("python bench.py plan" in out) == counted and ("fork.py is a fork: python -m pytest tests/test_forks.py" in out) != counted


def test_the_knob_of_the_forking_guide_changes_mid_training(here, monkeypatch, capsys):
    """docs/forking.md: its four edits; another value asks for mid-training anew, and for no other stage."""
    field, row, use = re.search(r'`    (states: int.*?)`.*?`("states": "mid",)`.*?`(else \(n, min.*?\)\))`', (ROOT / "docs/forking.md").read_text(), re.S).groups()
    text = (ROOT / "train_cmt_cifar.py").read_text()
    for old, new in (("    dry_run: bool", f"    {field}\n    dry_run: bool"), ('1_000): "nfe"', '1_000): "nfe states"'), ('    "post q stair"', f'    {row}\n    "post q stair"'), ("else (n, cfg.nfe)", use)):
        assert text.count(old) == 1
        text = text.replace(old, new)
    fork, argv = forked(text, monkeypatch), [*TINY, "--steps", "2", "--nfe", "8", "--trajectories", "8", "--batch", "16", "--out", "x"]
    fork.main([*argv, "--states", "4"])
    assert nets.load_checkpoint("x/mid.pt")["cfg"]["states"] == 4 and fork.solve_size(fork.parse([*argv, "--states", "4"])) == (8, 4)
    capsys.readouterr()
    assert code([*argv, "--states", "6"], capsys, fork.main)[0] == 2
    fork.main([*argv, "--states", "6", "--stage", "post"])
    assert "finished" in capsys.readouterr().out and not faults(fork) and not idle(fork, "tried")


def test_the_weight_of_the_forking_guide_trains(here, monkeypatch):
    """docs/forking.md: the five places of a knob of the loss."""
    text = (ROOT / "docs/forking.md").read_text()
    field, head, body, call = re.search(r"`    (p: float.*?)`.*?(def loss_cmt.*?)\n(.*?)\n\n( *return.*?)\n", text, re.S).groups()
    fork = changed(monkeypatch, ("    dry_run: bool", f"    {field}\n    dry_run: bool"), ('"batch_gpu warmup', '"p batch_gpu warmup'), ('    "post q stair"', '    "p": "mid",\n    "post q stair"'),
                   ("def loss_cmt(net, x_t, t, target, d):", head), ("    return d.distance(d.features(net(x_t, t)), target).mean()", body), ("        return loss_cmt(f, x_t, t, [a[owner] for a in shared], run.distance)", call))
    assert not faults(fork) and not idle(fork, "tried")


def test_the_network_of_the_forking_guide_trains(here, monkeypatch):
    """docs/forking.md: its class and its two edits, in a copy of the script, through every stage."""
    own = re.search(r"```python\n(class Small.*?)```.*?`(net = nets.make.*?)`.*?`(return dict.*?)`", (ROOT / "docs/forking.md").read_text(), re.S)
    text = (ROOT / "train_cmt_cifar.py").read_text()
    for old, new in (("def build(", own[1] + "\n\ndef build("), (re.search(r"net = nets.make\(.*?sigma_shift=shift\)", text, re.S)[0], own[2]),
                     (re.search(r'return \{\*\*nets.SIZES.*', text)[0], own[3])):
        assert text.count(old) == 1
        text = text.replace(old, new)
    forked(text, monkeypatch).main([*TINY, "--steps", "2", "--dropout", "0.5", "--out", "x"])
    assert Path("x/results.md").exists() and {*nets.load_checkpoint("x/post.pt")["ema"]} == {
        f"{layer}.{what}" for layer in ("first", "last") for what in ("weight", "bias")}


def changed(monkeypatch, *edits):
    """A fork of train_cmt_cifar.py with these edits, (old, new) each."""
    text = (ROOT / "train_cmt_cifar.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return forked(text, monkeypatch)


@pytest.mark.parametrize("old, new, words", [
    ("    dry_run: bool", "    lam: float = 0.1\n    dry_run: bool", ["--lam: nothing reads cfg.lam", "--lam: no row of LIMITS says what it may be"]),
    ("    dry_run: bool", "    lam: bool = False\n    dry_run: bool", ["--lam: nothing reads cfg.lam"]),
    ("    dry_run: bool", "    lam: Literal['one', 't'] = 'one'\n    dry_run: bool", ["--lam: nothing reads cfg.lam"]),
    ("    dry_run: bool", "    lam: str = ''\n    dry_run: bool", []),
    ("def loss_cmt(net, x_t, t, target, d):", "def loss_cmt(net, x_t, t, target, d, p=1.0):", ["loss_cmt does nothing with its argument p"]),
    ("[a[owner] for a in shared], run.distance)  ", "[a[owner] for a in shared], run.distance) * cfg.lamb  ", ["cfg.lamb: Config has no such field"]),
    ("        return loss_cmt(f", "        return loss_mine(f", ["loss_of uses loss_mine, which is nowhere"]),
    ('] = "ect"', ', "mine"] = "ect"', ["post mine: no row of ABOUT says what to expect of it"])])
def test_what_is_written_and_means_nothing_is_told(old, new, words, here, monkeypatch):
    """The commonest slips of a fork; the four scripts have none, nor has a knob with all that it needs."""
    assert faults(changed(monkeypatch, (old, new))) == words


DRAWN = 'assert cfg.mid in (', 'assert cfg.mid in ("mine", '
KNOB = "    dry_run: bool", "    lam: float = 0.1\n    dry_run: bool"
MID, POST, LOSS = ('"none"] = "cmt"', '"none", "mine"] = "cmt"'), ('] = "ect"', ', "mine"] = "ect"'), ('"l2"] = "lpips"', '"l2", "mine"] = "lpips"')


@pytest.mark.parametrize("edits, words", [
    ([MID], ["--mid=mine: mine: no branch draws its pairs; is a return missing? (docs/forking.md)"]),
    ([MID, DRAWN, ("        return loss_cmt(f", "        if cfg.mid == 'mine':\n            loss_cmt(f, x_t, t, [a[owner] for a in shared], run.distance) * 2\n        return loss_cmt(f")],
     ["--mid=mine trains just as without it"]),
    ([MID, DRAWN, ("        return loss_cmt(f", "        if cfg.mid == 'mine':\n            return loss_cmt(f, x_t, t, [a[owner] for a in shared], run.distance) * 2\n        return loss_cmt(f")], []),
    ([POST, ('"ecd", "ecd_euler"), f', '"ecd", "ecd_euler", "mine"), f')], ["--post=mine trains just as without it"]),
    ([POST, ('"ecd", "ecd_euler"), f', '"ecd", "ecd_euler", "mine"), f'), ("    (\"digits\", \"post\", \"annealed\"", "    (\"digits\", \"post\", \"mine\"): dict(lr=1e-3),\n    (\"digits\", \"post\", \"annealed\"")],
     ["--post=mine trains just as without it"]),
    ([POST, ('"ecd", "ecd_euler"), f', '"ecd", "ecd_euler", "mine"), f'), ('    "post q stair"', '    "q stair": "post, not post mine",\n    "huber_c": "mid, post, not post mine",\n    "post q stair"')],
     ["--post=mine trains just as without it"]),
    ([POST, ("    assert cfg.post", "    if cfg.post == 'mine':\n        return loss_dm(f, x, t, eps)\n    assert cfg.post")],
     ['post mine does not read huber_c: READ_BY needs "huber_c": "mid, post, not post mine",', 'post mine does not read q: READ_BY needs "q": "post, not post mine",']),
    ([POST, ("    assert cfg.post", "    if cfg.post == 'mine':\n        x_t = x + t.view(-1, 1, 1, 1) * eps\n        return (f(x_t, t) - run.teacher(x_t, t)).square().mean()\n    assert cfg.post")],
     ['post mine does not read huber_c: READ_BY needs "huber_c": "mid, post, not post mine",', 'post mine does not read q: READ_BY needs "q": "post, not post mine",']),      # but P_mean, P_std
    ([LOSS], ["--loss=mine: mine: make_distance returns nothing for it; is a return missing? (docs/forking.md)"]),
    ([LOSS, ('if cfg.loss in ("huber", "l2")', 'if cfg.loss in ("huber", "l2", "mine")')], []),
    ([KNOB], ["--lam=0.05 changes no weight"]),
    ([KNOB, ("        return loss_cmt(f, x_t, t, [a[owner] for a in shared], run.distance)", "        return loss_cmt(f, x_t, t, [a[owner] for a in shared], run.distance) * cfg.lam")], ['--lam=0.05 changes the weights of mid alone: READ_BY needs "lam": "mid",']),
    ([KNOB, ("    return loss_ect(f, x_t", "    return (1 if cfg.post == 'ect' else cfg.lam) * loss_ect(f, x_t")],
     ['--lam=0.05 changes the weights of post ecd, post ecd_euler, post annealed alone: READ_BY needs "lam": "post ecd, post ecd_euler, post annealed",'])])
def test_what_is_new_and_trains_nothing_of_its_own_is_told(edits, words, here, monkeypatch):
    """A branch forgotten, or without return; numbers of PRESETS under a new name; a knob that is nowhere used."""
    said = idle(changed(monkeypatch, *edits), "tried")
    assert sorted(said) == words


@pytest.mark.parametrize("loss, wrong", [("(t.view(-1, 1) * (f(x, t) - x).square().flatten(1).mean(1)).mean()", True),
                                         ("(t * (f(x, t) - x).square().flatten(1).mean(1)).mean()", False)])
def test_a_loss_that_is_no_mean_over_rows_is_told(loss, wrong, here, monkeypatch):
    """Its gradient would depend on --batch_gpu and on the number of processes."""
    said = idle(changed(monkeypatch, POST, ("    assert cfg.post", f"    if cfg.post == 'mine':\n        return {loss}\n    assert cfg.post")), "tried")
    assert any("--batch_gpu changes what is learned" in line for line in said) == wrong


def test_a_solve_whose_ends_are_not_all_a_pairs_is_told():
    with pytest.raises(AssertionError, match="of 4 ends of a solve 2 are a pair's"):
        ask_pairs([torch.zeros(4, 1), torch.arange(4) % 2], 4, [torch.zeros(4, 1)])                    # every end for each of its pairs


def test_a_branch_that_returns_nothing_does_not_train_as_another_method(road, monkeypatch, capsys):
    """Without `return` before loss_mine, a fork's post-training would be ECT, in silence."""
    text = (ROOT / "train_cmt_cifar.py").read_text().replace('] = "ect"', ', "mine"] = "ect"')
    fork = forked(text.replace("    assert cfg.post in", '    if cfg.post == "mine":\n        loss_ect(f, x, x, t, t / 2)\n    assert cfg.post in'), monkeypatch)
    argv = [*TINY, "--stage", "post", "--mid", "none", "--post", "mine", "--teacher", str(road / "pretrain.pt"), "--steps", "1", "--out", "x"]
    exit_code, err = code(argv, capsys, fork.main)
    assert exit_code == 2 and "mine: no branch returns its loss; is a return missing? (docs/forking.md)" in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("branch, words", [("return (f(x, t) - x).square().flatten(1).mean(1)", "RuntimeError: grad can be implicitly created only for scalar outputs"),
                                           ("return (f(x, t) - x).detach().square().mean()", "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn"),
                                           ("assert x.ndim == 3, 'a shape'", "AssertionError: a shape"),
                                           ("return x[torch.tensor([99])].mean()", "IndexError: index 99 is out of bounds for dimension 0 with size"),
                                           ("return f(run.teacher(x, t), t).mean()", "TypeError: 'NoneType' object is not callable")])
def test_a_slip_in_the_loss_of_a_fork_is_a_traceback_and_told(branch, words, road, monkeypatch):
    text = (ROOT / "train_cmt_cifar.py").read_text().replace('] = "ect"', ', "mine"] = "ect"').replace('NO_TEACHER = ["ect"', 'NO_TEACHER = ["mine", "ect"')
    fork = forked(text.replace("    assert cfg.post in", f'    if cfg.post == "mine":\n        {branch}\n    assert cfg.post in'), monkeypatch)
    with pytest.raises(Exception, match=words.partition(": ")[2]):
        fork.main([*TINY, "--stage", "post", "--mid", "none", "--post", "mine", "--teacher", str(road / "pretrain.pt"), "--steps", "1", "--out", "x"])
    assert "Traceback" in (log := Path("x/log.txt").read_text()) and words in log
    line, = idle(fork, "tried")
    assert re.match(r"--post=mine: fork\.py, line \d+: ", line) and words in line


@pytest.mark.parametrize("old, new, words", [
    ('"none"] = "cmt"', '"none"] = "ctm"', "Config: mid = 'ctm' must be cmt, kd, slow, none"),
    ('dict(precision="bf16")', 'dict(precision="fp23")', "PRESETS ('*', 'mid', '*'): precision = 'fp23' must be fp32, tf32, bf16, fp16"),
    ('dict(steps=900, lr=2e-3', 'dict(steps=900, lr="2e-3"', "PRESETS ('digits', 'mid', '*'): lr = '2e-3' must be float"),
    ('("*", "mid", "*")', '("*", "midd", "*")', "PRESETS names midd, which is no stage"),
    ('("own", "mid", "*")', '("owns", "mid", "*")', "PRESETS names owns, which is no data set")])
def test_a_slip_in_a_table_of_a_fork_is_told(old, new, words, here, monkeypatch):
    """A row that never matches is silent; a value that is none trains something else under the name that was asked for."""
    assert faults(changed(monkeypatch, (old, new))) == [words]


@pytest.mark.parametrize("old, new, words", [
    ("solver = solvers.dpmpp", "solver = lambda *a: solvers.dpmpp(*a).flip(0)", "teacher_solver returned no states from x_T"),
    ("solver = solvers.dpmpp", "solver = lambda *a: solvers.dpmpp(*a)[1:]", "teacher_solver returned no states from x_T"),
    ("solver = solvers.dpmpp", "solver = solvers.flow_euler", "teacher_solver returned no states from x_T"),
    ("sigmas = solvers.logsnr_sigmas", "sigmas = lambda n: solvers.logsnr_sigmas(n, 40.0)", "teacher_sigmas returned no tensor of 5 levels, falling from 80"),
    ("sigmas = solvers.logsnr_sigmas", "sigmas = lambda n: solvers.logsnr_sigmas(n - 1)", "teacher_sigmas returned no tensor of 5 levels"),
    ("sigmas = solvers.logsnr_sigmas", "sigmas = lambda n: solvers.logsnr_sigmas(n).tolist()", "teacher_sigmas returned no tensor of 5 levels"),
    ("return xs[:used].flatten(0, 1)[order], t[order], owner[order]", "return xs[:used].flatten(0, 1)[order], owner[order], t[order]", "owner of a solve is torch.float32, not int64"),
    ("t[order], owner[order]", "t[order][1:], owner[order]", "a solve returned 64, 63, 64 rows, solve_size says 64 pairs"),
    ("return nets.pretrained_lpips()", "nets.pretrained_lpips()", "--loss=lpips: a distance has no method features"),
    ("return nets.PixelDistance(", "return nets.VGG(1) or nets.PixelDistance(", "make its net .requires_grad_(False).eval()")])
def test_a_slip_in_a_solver_a_solve_or_a_distance_of_a_fork_is_told(old, new, words, here, monkeypatch):
    """Each of them would train something else under the name that was asked for."""
    said = idle(changed(monkeypatch, (old, new)), "tried")
    assert said and words in said[0]


def test_images_of_a_fork_that_are_no_bytes_are_refused(here, monkeypatch, capsys):
    fork = changed(monkeypatch, ("return fid.digits()[0]", "return fid.digits()[0].float()"))
    exit_code, err = code([*TINY, "--stage", "pretrain", "--teacher", "scratch", "--steps", "1", "--out", "x"], capsys, fork.main)
    assert exit_code == 3 and "images are torch.float32, not uint8 (N, C, H, W)" in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("table, key, value, odd", [
    ("PRESETS", ("digits", "post", "mien"), dict(steps=20), "mien, which is no method of post"), ("PRESETS", ("digits", "post", "*"), dict(qq=2), "qq, which is no field of Config"),
    ("LIMITS", ("0 or more", bool), "lambd", "lambd, which is no field of Config"), ("READ_BY", "q lamda", "mid", "lamda, which is no field of Config"),
    ("READ_BY", "q", "post, not post mien", "mien, which is no method of post"), ("READ_BY", "q", "mdi", "mdi, which is no stage"),
    ("NO_TEACHER", -1, "anealed", "anealed, which is no method of post"), ("ABOUT", "post mien", "words", "mien, which is no method of post")])
def test_a_name_in_a_table_of_a_fork_that_is_nowhere_is_told(table, key, value, odd, monkeypatch):
    now = getattr(script, table)
    monkeypatch.setattr(script, table, {**now, key: value} if isinstance(now, dict) else [*now, value])
    assert faults(script) == [f"{table} names {odd}"]
