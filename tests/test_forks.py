"""Looks at a fork before it trains for hours: the four scripts, and every other one beside them that has PRESETS.

    python -m pytest tests/test_forks.py

It asks what Python tells late or never: is every name somewhere, every field there and read, every argument of a loss used?
Do the tables name what exists? Do solver, noise levels, distances and solves return what the losses take? Then what the four
scripts do not have, words and numbers of Config, is trained on digits for two steps, with it and without: the weights must differ.
"""
import builtins
import contextlib
import dis
import importlib
import inspect
import io
import math
import re
import shutil
import traceback
import typing
from dataclasses import fields
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch

import fid
import nets
from conftest import ROOT

OURS = ["train_cmt_cifar", "train_cmt_imagenet", "train_mf_imagenet256", "train_t2i_coco"]
FORKS = sorted(p.stem for p in ROOT.glob("*.py") if "\nPRESETS = {" in p.read_text() and p.stem not in OURS)
STAGES = "pretrain", "mid", "post"
NO_MEAN = "--batch_gpu changes what is learned: is the loss a mean over rows, each weight of the shape of what it weighs?"
LOOKED_UP = "stage decay precision ensemble".split()   # choices that are keys of a table: a wrong one ends in an error


def faults(home):
    """Lines on what is written in a script, a module, and means nothing."""
    code, said = Path(home.__file__).read_text(), []
    functions = [inspect.unwrap(f).__code__ for f in vars(home).values() if inspect.isfunction(f) and f.__module__ == home.__name__]
    for function in functions:
        functions += filter(inspect.iscode, function.co_consts)            # functions in functions
        steps = [*dis.get_instructions(function)]
        names = {step.argval for step in steps if step.opname == "LOAD_GLOBAL"}
        said += [f"{function.co_name} uses {name}, which is nowhere" for name in names if not hasattr(home, name) and not hasattr(builtins, name)]
        loaded = str([step.argval for step in steps if step.opname.startswith("LOAD")])
        arguments = function.co_varnames[:function.co_argcount] if function.co_name.startswith("loss_") else ()
        said += [f"{function.co_name} does nothing with its argument {name}" for name in arguments if f"'{name}'" not in loaded]
    known, bounded = {f.name: f.type for f in fields(home.Config)}, " ".join([*home.LIMITS.values(), "seed"]).split()
    said += [f"cfg.{name}: Config has no such field" for name in {*re.findall(r"\bcfg\.(\w+)", code)} - {*known}]
    read = {*home.STAGES, *re.findall(r"\bc(?:fg)?\.(\w+)", code + Path(fid.__file__).read_text())}
    said += [f"--{name}: nothing reads cfg.{name}" for name in known if known[name] is not str and name not in read]
    said += [f"--{name}: no row of LIMITS says what it may be" for name in known if known[name] in (int, float) and name not in bounded]
    return said + faults_of_tables(home) + [f"{method}: no row of ABOUT says what to expect of it" for stage, word in words_of(home)
                   if stage in ("mid", "post") and (method := f"{stage} {word}") not in home.ABOUT]


def faults_of_tables(home):
    """Lines on a name in a table of a script that is nowhere, and on a value that its field cannot have."""
    kinds, said = {f.name: f.type for f in fields(home.Config)}, []
    words = {name: typing.get_args(kind) for name, kind in kinds.items()}
    named = [("LIMITS", name) for names in home.LIMITS.values() for name in names.split()]
    named += [("READ_BY", name) for names in home.READ_BY for name in names.split()]
    named += [("PRESETS", name) for row in home.PRESETS.values() for name in row]
    said += [f"{table} names {name}, which is no field of Config" for table, name in named if name not in kinds]

    keys = [("ABOUT", key) for key in home.ABOUT]
    keys += [("READ_BY", key.removeprefix("not ")) for where in home.READ_BY.values() for key in where.split(", ")]
    methods = [(table, *key.partition(" ")[::2]) for table, key in keys]
    methods += [("PRESETS", stage, method) for _, stage, method in home.PRESETS]
    methods += [("NO_TEACHER", "post", method) for method in home.NO_TEACHER]
    for table, stage, method in methods:
        if stage not in ("*", *words["stage"]):
            said.append(f"{table} names {stage}, which is no stage")
        elif method not in ("", "*", *words.get(stage, ())):
            said.append(f"{table} names {method}, which is no method of {stage}")
    data = "*", "own", "digits", home.Config.data, *home.FILES
    said += [f"PRESETS names {name}, which is no data set" for name, *_ in home.PRESETS if name not in data]

    defaults = {"Config": {f.name: f.default for f in fields(home.Config)}}
    for row, values in (defaults | {f"PRESETS {key}": row for key, row in home.PRESETS.items()}).items():
        for name in values.keys() & kinds:
            value, kind = values[name], (int, float) if kinds[name] is float else kinds[name]
            if value not in words[name] if words[name] else not isinstance(value, kind):
                said.append(f"{row}: {name} = {value!r} must be {', '.join(words[name]) or kinds[name].__name__}")
    said += [f"DECAYS has no entry {word}, a word of --decay" for word in words.get("decay", ()) if word not in home.DECAYS]
    return [*dict.fromkeys(said)]


def ask_solver(home, steps=4):
    """Fails unless the teacher's solver goes down its noise levels, tried on a net that answers with 0."""
    sigmas = home.teacher_sigmas(steps)
    falls = torch.is_tensor(sigmas) and len(sigmas) == steps + 1 and abs(sigmas[0] - 80) < 1e-6 and (sigmas.diff() < 0).all()
    assert falls, f"teacher_sigmas returned no tensor of {steps + 1} levels, falling from 80"
    x_T = torch.full((2, 1, 4, 4), 80.0)
    xs = home.teacher_solver(lambda x, sigma: 0 * x, x_T, sigmas)
    to_the_end = torch.is_tensor(xs) and xs.shape == (steps + 1, *x_T.shape) and (xs[0] - xs[-1] >= 79).all()
    assert to_the_end, "teacher_solver returned no states from x_T to the end, (steps + 1, B, C, H, W)"


def ask_distance(distance, shape):
    """Fails unless a distance works on two images of this shape, (C, H, W)."""
    for name in ("features", "distance"):
        assert callable(getattr(distance, name, None)), f"a distance has no method {name}; it has two, features(x) and distance(a, b)"
    features = distance.features(torch.rand(2, *shape) * 2 - 1)
    assert isinstance(features, list), f"features of a distance are a {type(features).__name__}, not a list of tensors, as [x]"
    assert not any(a.requires_grad for a in features), "features of a distance have a gradient: make its net .requires_grad_(False).eval()"
    answer = distance.distance(features, features)
    found = f"of shape {[*answer.shape]}" if torch.is_tensor(answer) else f"a {type(answer).__name__}"
    assert found == "of shape [2]", f"a distance of 2 images is {found}, not a number for each of them; end it in .flatten(1).mean(1), and return it"


def ask_pairs(pairs, expected, ends=None):
    """Fails unless a solve returned so many pairs; with ends, the last of its tensors says which end is a pair's."""
    sizes = [len(a) for a in pairs]
    assert {*sizes} == {expected}, f"a solve returned {', '.join(map(str, sizes))} rows, solve_size says {expected} pairs; make them agree"
    if ends:
        owner = pairs[-1]
        assert owner.dtype == torch.int64, f"owner of a solve is {owner.dtype}, not int64; it says which of its ends is a pair's"
        used = len(owner.unique())
        assert used == len(ends[0]), f"of {len(ends[0])} ends of a solve {used} are a pair's; is owner right?"


def ask_mid(home, cfg):
    """Fails unless the distance and the solve of a mid-training return what its loss takes."""
    vgg = nets.VGG().requires_grad_(False).eval()          # in place of the one that is fetched
    with fid.one_line(cfg, nets.WeightsError), mock.patch.object(nets, "pretrained_lpips", lambda: vgg):
        run, measured = home.set_up(cfg), hasattr(home, "make_distance")
        if measured:
            ask_distance(run.distance, run.shape)
        pairs, shared = home.solve(cfg, run, 0)
        ask_pairs(pairs, math.prod(home.solve_size(cfg)), shared if measured else None)


def why_not(home, work, *args):
    """In a line why work(*args) fails, "" if it does not."""
    said = io.StringIO()
    fid.SAID.clear()                                       # what was said before is said again
    try:
        with contextlib.redirect_stderr(said):
            work(*args)
    except SystemExit:                                 # the last line begins with the program's name
        return said.getvalue().strip().splitlines()[-1].partition(": ")[2]
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == home.__file__]
        if isinstance(error, AssertionError) and not lines:                   # of this file
            return fid.first_line(error)
        where = f"{Path(home.__file__).name}, line {lines[-1]}: " if lines else ""
        return f"{where}{type(error).__name__}: {fid.first_line(error)}"
    return ""


def other(value):
    """Another value of a knob, which its limits probably allow."""
    return not value if isinstance(value, bool) else value // 2 or 1 if isinstance(value, int) and value != 1 else value / 2 or 0.5


def origin(home):
    """The Config of the script that this one was copied from: the one whose knobs are most like it."""
    mine = {f.name for f in fields(home.Config)}
    return min((importlib.import_module(name).Config for name in OURS), key=lambda config: len(mine ^ {f.name for f in fields(config)}))


def words_of(home):
    """[(field, word)]: choices of Config that the script it was copied from has not."""
    known = {(f.name, word) for f in fields(origin(home)) for word in typing.get_args(f.type)}
    return [(f.name, word) for f in fields(home.Config) for word in typing.get_args(f.type)
            if word != f.default and (f.name, word) not in known and f.name not in LOOKED_UP]


def idle(home, out):
    """Lines on what is new in a fork and trains nothing of its own, or where READ_BY says so wrongly; out: an empty folder."""
    @cache
    def trained(stage, *flags):
        """The weights of a stage after two steps, its teacher the same each time; or what is said instead."""
        folder = f"{out}/{stage} {' '.join(flags)}"
        if stage != "pretrain":
            shutil.copytree(start, folder)
        own = [flag for flag in flags if flag.partition("=")[0] not in {f"--{s}" for s in STAGES} - {f"--{stage}"}]
        alone = ["--mid", "none", "--init", "random"] if stage == "post" else []       # where the student is the teacher, a loss between them is 0
        failed = why_not(home, home.main, [*digits, "--stage", stage, "--out", folder, *alone, *own])
        ckpt = nets.finished(f"{folder}/{stage}.pt")
        return torch.cat([w.flatten() for w in ckpt["net"].values()]) if ckpt else failed

    def differ(stage, some, others):
        a, b = trained(stage, *some), trained(stage, *others)
        return torch.is_tensor(a) and torch.is_tensor(b) and not torch.equal(a, b)

    def depends_on_batch_gpu(stage, flag):
        """Whether a step learns otherwise in parts of 8 rows; rounding moves it little, and the first weights are those of no step."""
        whole, parts, first = (trained(stage, flag, *more) for more in ([], ["--batch_gpu=8"], [f"--{stage}.lr=1e-12"]))
        return all(map(torch.is_tensor, (whole, parts, first))) and (whole - parts).norm() > 1e-3 * (whole - first).norm()

    def flag_of(name, value):
        return f"--{name}={value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}"

    digits, start = ["--data", "digits", "--steps", "2"], f"{out}/start"
    if hasattr(home, "teacher_solver") and (failed := why_not(home, ask_solver, home)):
        return [failed]
    for stage in home.STAGES[:home.STAGES.index("mid")]:
        home.main([*digits, "--stage", stage, "--out", start])
    choices = {f.name: typing.get_args(f.type) for f in fields(home.Config)}
    mid = [f"--mid={word}" for word in choices["mid"] if word != "none"]
    mid += [f"--loss={word}" for word in choices.get("loss", ())]
    misfits = {}                                           # each once, with the first flag that shows it
    for flag in mid:
        cfg = home.parse([*digits, "--stage", "mid", "--out", start, "--trajectories", "4", "--dry_run", flag])
        if failed := why_not(home, ask_mid, home, cfg):
            misfits.setdefault(failed, flag)
    new, said = words_of(home), [f"{flag}: {failed}" for failed, flag in misfits.items()]
    if {*misfits.values()} - {f"--{name}={word}" for name, word in new}:               # the default, which all that follows trains by
        return said
    ours, new = {f.name for f in fields(origin(home))}, [(name, word) for name, word in new if f"--{name}={word}" not in misfits.values()]
    for name, word in new:
        flag, alike = f"--{name}={word}", True
        for stage in [name] if name in STAGES else STAGES:
            was, now = (vars(fid.stages_of(home, ["--data", "digits", "--stage", stage, *own])[0]) for own in ([], [flag]))
            numbers = [flag_of(f"{stage}.{k}", v) for k, v in now.items() if type(v) in (int, float, bool) and v != was[k] and k != "steps"]
            if not torch.is_tensor(failed := trained(stage, flag)):
                said.append(f"{flag}: {failed}")
            elif depends_on_batch_gpu(stage, flag):
                said.append(f"{flag}: {NO_MEAN}")
            alike &= torch.is_tensor(failed) and not differ(stage, [flag], numbers)       # with its rows of PRESETS, without its name
        said += [f"{flag} trains just as without it"] * alike
    methods = [(f.name, word) for f in fields(home.Config) if f.name in ("mid", "post") for word in typing.get_args(f.type)
               if word not in ("none", f.default)]
    named = " ".join([*home.READ_BY, home.NO_WEIGHT]).split()
    for f in fields(home.Config):
        if f.type in (int, float, bool) and f.name not in {*ours, *home.NO_WEIGHT.split()}:
            flag = flag_of(f.name, other(f.default))
            read = [stage for stage in STAGES if differ(stage, [flag], [])]
            read += [f"{stage} {word}" for stage, word in methods if stage not in read
                     and differ(stage, [f"--{stage}={word}", flag], [f"--{stage}={word}"])]
            said += [f"{flag}: {NO_MEAN}" for stage in STAGES if stage in read and depends_on_batch_gpu(stage, flag)]
            if not read or (f.name not in named and read != [*STAGES]):
                said.append(f'{flag} changes the weights of {", ".join(read)} alone: READ_BY needs "{f.name}": "{", ".join(read)}",' if read
                            else f"{flag} changes no weight")
    for name, word in [(name, word) for name, word in new if name in ("mid", "post") and torch.is_tensor(trained(name, f"--{name}={word}"))]:
        cfg, mine = home.parse(["--data", "digits", "--stage", name, f"--{name}={word}"]), f"--{name}={word}"
        for names, where in home.READ_BY.items():
            for k in {*names.split()} - {*fid.never_read(cfg), "mid", "post", "init"}:
                flag = flag_of(f"{name}.{k}", other(getattr(cfg, k))) if type(getattr(cfg, k)) in (int, float) else ""
                if flag and differ(name, [flag], []) and torch.is_tensor(trained(name, mine, flag)) and not differ(name, [mine, flag], [mine]):
                    said.append(f'{name} {word} does not read {k}: READ_BY needs "{k}": "{where}, not {name} {word}",')
    return said


@pytest.mark.parametrize("name", [*OURS, *FORKS])
def test_all_that_is_written_means_something(name):
    if said := faults(importlib.import_module(name)):
        pytest.fail("\n".join(said), pytrace=False)


@pytest.mark.parametrize("name", FORKS)
def test_what_is_new_trains_something_of_its_own(name, here, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        said = idle(importlib.import_module(name), tmp_path)
    if said:
        pytest.fail("\n".join(said), pytrace=False)
