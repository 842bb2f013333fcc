"""Looks at a fork before it trains for hours: the four scripts, and every other one beside them that has PRESETS.

    python -m pytest tests/test_forks.py

It asks what Python tells late or never: is every name somewhere, every field there and read, every argument of a loss used?
Then what the four scripts do not have, words and numbers of Config, is trained on digits for two steps, with it and without:
the weights must differ.
"""
import builtins
import contextlib
import dis
import importlib
import inspect
import io
import re
import shutil
import typing
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch

import fid
import nets
from conftest import ROOT

OURS = ["train_cmt_cifar", "train_cmt_imagenet", "train_mf_imagenet256", "train_t2i_coco"]
FORKS = sorted(p.stem for p in ROOT.glob("*.py") if "\nPRESETS = {" in p.read_text() and p.stem not in OURS)
STAGES = "pretrain", "mid", "post"
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
    return said + [f"{method}: no row of ABOUT says what to expect of it" for stage, word in words_of(home)
                   if stage in ("mid", "post") and (method := f"{stage} {word}") not in home.ABOUT]


def other(value):
    """Another value of a knob, which its limits probably allow."""
    return not value if isinstance(value, bool) else value // 2 or 1 if isinstance(value, int) and value != 1 else value / 2 or 0.5


def words_of(home):
    """[(field, word)]: choices of Config that none of the four scripts has."""
    known = {(f.name, word) for name in OURS for f in fields(importlib.import_module(name).Config) for word in typing.get_args(f.type)}
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
        with contextlib.redirect_stderr(said := io.StringIO()), contextlib.suppress(SystemExit):
            home.main([*digits, "--stage", stage, "--out", folder, *["--mid", "none"] * (stage == "post"), *own])
        ckpt = nets.finished(f"{folder}/{stage}.pt")
        return torch.cat([w.flatten() for w in ckpt["net"].values()]) if ckpt else said.getvalue()

    def differ(stage, some, others):
        a, b = trained(stage, *some), trained(stage, *others)
        return torch.is_tensor(a) and torch.is_tensor(b) and not torch.equal(a, b)

    def flag_of(name, value):
        return f"--{name}={value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}"

    digits, start = ["--data", "digits", "--steps", "2"], f"{out}/start"
    for stage in home.STAGES[:home.STAGES.index("mid")]:
        home.main([*digits, "--stage", stage, "--out", start])
    ours = {f.name for name in OURS for f in fields(importlib.import_module(name).Config)}
    new, said = words_of(home), []
    for name, word in new:
        flag, alike = f"--{name}={word}", True
        for stage in [name] if name in STAGES else STAGES:
            was, now = (vars(fid.stages_of(home, ["--data", "digits", "--stage", stage, *own])[0]) for own in ([], [flag]))
            numbers = [flag_of(f"{stage}.{k}", v) for k, v in now.items() if type(v) in (int, float, bool) and v != was[k] and k != "steps"]
            if not torch.is_tensor(failed := trained(stage, flag)):
                said.append(f"{flag}: {failed.strip().splitlines()[-1]}")
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
