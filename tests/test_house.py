"""What keeps the house in order: imports, one text per shared name, banners, knobs in use, README true."""
import ast
import functools
import importlib
import re
import shlex
import signal
import statistics
import sys
import types
import typing
from dataclasses import fields, replace
from pathlib import Path

import pytest

import fid
import nets

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("train_*.py"))
MODULES = ["nets", "solvers", "fid"]
OWN = {"Config", "load_data", "data_name", "check", "teacher_pairs", "make_sampler", "teacher_state", "first_weights",
       "build", "train", "candidates", "evaluate",    # what a script may say in its own way: its data, nets and science;
       "needs_data", "read_batch", "to_input", "to_images", "encode_data", "make_distance", "rollout", "prior", "draw_sheets",
       "model_size", "size_row", "read_net", "solve_size", "solve", "image_batch", "loss_of", "loss_ect", "set_up", "check_files"}          # one role, one name: a diff shows what differs, not what it is called
# Lines and flags at most. The first guess, from a prototype: scripts 700, 860, 850, 1,000, nets 1,450, fid 800, bench 800, claims 500. Raise one
# only in a commit that says what the lines are for. Beyond the guess: nets: du/dt in one pass, dropout by place, encoders, other people's weights, EDM2's
# norms in one pass; fid: other people's pictures and labels, the engine of the encode stages, sheets and charts with words, and what all runs share and
# stood in four scripts (flags over presets, what people type, log, lock, refusals, dry run, comparisons of data, knobs, teachers, samples); bench: a GPU without data, plan, a
# step at full size; claims: Mean Flow's roads, photos; scripts: what is refused before anything is trained, latents and encoders.
BUDGET = {"train_cmt_cifar.py": 700, "train_cmt_imagenet.py": 934, "train_mf_imagenet256.py": 899,
          "train_t2i_coco.py": 1127, "nets.py": 1819, "fid.py": 2646, "solvers.py": 205, "bench.py": 966,
          "claims.py": 651, "README.md": 220}
FLAGS = {"train_cmt_cifar.py": 35, "train_cmt_imagenet.py": 42, "train_mf_imagenet256.py": 42, "train_t2i_coco.py": 43}
README = (ROOT / "README.md").read_text()
DOCS = {p.name: p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))}


def toplevel(path):
    """name -> source of each function and class of a file."""
    text = path.read_text()
    lines = text.splitlines()
    return {n.name: "\n".join(lines[n.lineno - 1:n.end_lineno]) for n in ast.parse(text).body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_no_preset_shows_the_weights_that_its_stage_began_with(path):
    """An average of 0.9999 a step still held 37 % of them after the 10,000 steps of own images."""
    flags = {"own": ["--data", "own.zip"], "imagenet64": [], "imagenet512": ["--res", "512"], "*": []}
    for data in {data for data, _, _ in __import__(path.stem).PRESETS}:
        for c in vars(defaults(path, *flags.get(data, ["--data", data]))).values():
            assert c.stage == "eval" or getattr(c, "ema_std", 0) or c.ema_beta**c.steps < 0.02, (data, c.stage)


def test_same_name_same_text():
    """Duplicated on purpose means duplicated exactly: a name shared by two scripts has one text."""
    seen, compared = {}, 0
    for path in SCRIPTS:
        for name, source in toplevel(path).items():
            if name not in OWN:
                first = seen.setdefault(name, (path.name, source))
                compared += first[0] != path.name
                assert source == first[1], f"{name} differs: {first[0]} and {path.name}"
    flow, text = (toplevel(ROOT / f"train_{name}.py")["solve_size"] for name in ("mf_imagenet256", "t2i_coco"))
    assert flow == text                                                   # the two scripts of noise levels have their own
    assert compared + 1 >= 10 * (len(SCRIPTS) - 1) and len(OWN) <= 31     # the guard must never run empty


@pytest.mark.parametrize("name", BUDGET)
def test_files_stay_within_their_budget(name):
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= BUDGET[name]
    assert name.endswith(".md") or max(map(len, lines)) <= 110


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_functions_are_short_and_take_few_parameters(path):
    """The loop of train is one screen; only train is longer than a page; losses may take two parameters more."""
    assert len(fields(__import__(path.stem).Config)) <= FLAGS[path.name]
    for n in ast.walk(ast.parse(path.read_text())):
        if isinstance(n, ast.FunctionDef):
            assert n.end_lineno - n.lineno < (48 if n.name == "train" else 45), n.name
            assert len(n.args.args) <= (8 if n.name.startswith("loss_") else 6), n.name
            if n.name == "train":
                loop = next(k for k in n.body if isinstance(k, ast.For))
                assert loop.end_lineno - loop.lineno < 34, "the loop of train"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_imports_follow_the_house(path):
    allowed = {"nets": {"torch", "numpy"}, "solvers": {"torch"}, "fid": {"torch", "numpy", "PIL"}}
    allowed = allowed.get(path.stem, {"torch", "numpy", "PIL", *MODULES})
    allowed = allowed | {p.stem for p in SCRIPTS} if path.stem in ("bench", "claims") else allowed
    def roots(nodes):
        return {name.split(".")[0] for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}
    tree = ast.parse(path.read_text())
    assert roots(tree.body) - set(sys.stdlib_module_names) <= allowed
    optional = {"lpips"} if path.stem == "nets" else set()          # diffusers, transformers: by importlib, when called
    assert roots(ast.walk(tree)) - set(sys.stdlib_module_names) <= allowed | optional


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_an_and_inside_an_or_has_parentheses(path):
    """Nobody should have to know which of them binds first."""
    lines = path.read_text().split("\n")
    inner = [v for n in ast.walk(ast.parse("\n".join(lines))) if isinstance(n, ast.BoolOp) and isinstance(n.op, ast.Or)
             for v in n.values if isinstance(v, ast.BoolOp)]
    assert not [v.lineno for v in inner if lines[v.lineno - 1][:v.col_offset].strip()[-1:] not in ("(", "")
                or not lines[v.end_lineno - 1][v.end_col_offset:].startswith(")")]


def test_uv_installs_what_requirements_say():
    """PEP 723: `uv run train_cmt_cifar.py` needs no environment; pytest is for the tests alone."""
    blocks = {re.search(r"^# /// script\n# dependencies = (.*)\n# ///$", p.read_text(), re.M)[1] for p in SCRIPTS}
    wanted = [re.split("[=<>]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()]
    assert [ast.literal_eval(block) for block in blocks] == [[name for name in wanted if name != "pytest"]]


def test_contents_of_fid_name_what_scripts_take():
    """A reader who meets fid.ahead in a script looks there first; what one script takes may be left out."""
    taken = [set(re.findall(r"\bfid\.([a-z]\w+)\(", p.read_text())) for p in SCRIPTS]
    common = {name for name in set.union(*taken) if sum(name in t for t in taken) > 2} - {"name_of"}
    assert len(common) > 30 and not {name for name in common if not re.search(rf"\b{name}\b", fid.__doc__)}


def test_what_fid_takes_of_a_script_is_listed_and_there():
    """Whoever renames one of these in a fork gets an error from another file."""
    text = (ROOT / "fid.py").read_text()
    taken = {a or b for a, b in re.findall(r"\bhome\.([A-Za-z]\w*)|\bhome_of\(\w+\)\.([A-Za-z]\w*)", text)}
    assert len(taken) > 15 and not {name for name in taken if not re.search(rf"\b{name}\b", fid.__doc__)}
    for path in SCRIPTS:
        home = vars(importlib.import_module(path.stem))
        assert not {name for name in taken if name not in home} - {"NEED_STAGE"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_eight_banners_in_one_order(path):
    names = re.findall(r"^# ---- ([\w ]+) -+$", path.read_text(), re.M)
    assert names == ["knobs", "pairs and losses", "train", "nets", "sample", "data", "plumbing", "main"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_branch_that_forgets_to_return_meets_an_assert(path):
    """Else a fork's post-training would go on into the last one, under its own name."""
    known = re.search(r"assert cfg\.post in \((.*?)\)", path.read_text())[1]
    assert {*re.findall(r'"(\w+)"', known)} == {*typing.get_args(typing.get_type_hints(__import__(path.stem).Config)["post"])}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_every_method_has_a_branch_or_a_row(path):
    """Else a name in Config would train as the method beside it; of a fork: tests/test_forks.py."""
    script = __import__(path.stem)
    kinds = typing.get_type_hints(script.Config)
    code = re.sub(r" # .*", "", path.read_text().partition("\ndef ")[2])         # a comment may hold it for numbers alone
    rows = {method for _, _, method in script.PRESETS}
    for name in {"pretrain", "mid", "post", "loss"} & {*kinds}:
        for known in typing.get_args(kinds[name]):
            assert f'"{known}"' in code or known in rows or known == getattr(script.Config, name)


@pytest.mark.parametrize("path", [*SCRIPTS, *(ROOT / f"{m}.py" for m in MODULES)], ids=lambda p: p.name)
def test_functions_are_documented(path):
    text = path.read_text()
    missing = [n.name for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
               and not ast.get_docstring(n) and n.name != "Config"]
    assert not missing


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_mid_training_is_bf16_and_post_training_keeps_its_step(path, tmp_path, monkeypatch):
    """Defaults; and TF32 is a switch of the process: every stage sets it for itself."""
    import torch
    script, seen = __import__(path.stem), {}
    data = script.Config.data
    given = {s: script.parse(["--data", data, "--stage", s]).precision for s in ("pretrain", "mid", "post", "eval")}
    exact = "fp32" if path.stem == "train_cmt_cifar" else "tf32"        # q = 4096 there: TF32 rounds as much as it is
    assert given == {"pretrain": exact, "mid": "bf16", "post": exact, "eval": exact}
    assert {script.parse(["--data", "digits", "--stage", s]).precision for s in given} == {"fp32"}
    def watch(note):
        monkeypatch.setattr(script, "check", lambda c: None)
        monkeypatch.setattr(script, "train", note)
        for stage in script.RUN:
            monkeypatch.setitem(script.RUN, stage, note)
    watch(lambda c: seen.update({c.precision: torch.backends.cudnn.allow_tf32}))
    before = [signal.getsignal(s) for s in script.SIGNALS]
    for name in ("tf32", "fp32", "bf16"):
        script.main(["--data", "digits", "--stage", "eval", "--precision", name, "--out", str(tmp_path)])
    assert seen == {"tf32": True, "fp32": False, "bf16": True}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    seen.clear()
    watch(lambda c: seen.update({c.stage: (c.init, [signal.getsignal(s) for s in script.SIGNALS])}))
    script.main(["--data", "digits", "--init", "mine.pt", "--out", str(tmp_path)])
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} == {*script.SIGNALS} - {signal.SIGHUP}
    assert {s for s, (_, f) in seen.items() if {*f} == {script.on_signal}} == {*script.STAGES} - {"eval"}     # eval just ends
    assert seen["mid"][0] == "mine.pt"
    assert seen["post"][0] == seen["eval"][0] == script.Config.init                   # what was trained goes on, is scored
    for number, handler in zip(script.SIGNALS, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_stage_is_refused_only_for_what_it_uses(path, tmp_path, monkeypatch):
    """Three processes do not divide the batch: a matter of stages that train."""
    script = __import__(path.stem)
    monkeypatch.setattr(script, "WORLD", 3)
    refused = set()
    for stage, *flags in (["eval"], ["sample"], ["pretrain"], ["pretrain", "--teacher", "x.pt"], ["mid", "--mid", "none"], ["mid"], ["post"]):
        argv = ["--data", "digits", "--stage", stage, *flags, "--batch", "32", "--batch_gpu", "5", "--out", str(tmp_path)]
        (tmp_path / "x.pt").touch()
        monkeypatch.chdir(tmp_path)
        try:
            script.check(script.parse(argv))
        except nets.WeightsError:
            assert "x.pt" in flags                     # an empty file
        except SystemExit as e:
            assert e.code == 2
            refused.add(" ".join([stage, *flags]))
    assert refused == {"pretrain", "mid", "post"}


def commands(text):
    """Every command line of a text that runs one of our files."""
    for line in text.splitlines():
        found = re.match(r"\s*(?:pip install \S+ \S+ && )?((?:python|torchrun)\b.*?)(?:\s{2,}#.*)?$", line)
        for command in [found[1]] if found else re.findall(r"`((?:python|torchrun)[^`]*)`", line):
            if re.search(r"\b(train_\w+|fid|bench|claims)\.py\b", command):
                yield command


ALL = sorted({c for text in [README, *DOCS.values(), *(p.read_text().split('"""')[1] for p in [*SCRIPTS, ROOT / "bench.py", ROOT / "claims.py"])] for c in commands(text)})


@pytest.mark.parametrize("command", ALL)
def test_every_printed_command_parses(command, monkeypatch):
    """README, docs and docstrings: the flags exist, the values are possible."""
    import bench
    import claims
    words = shlex.split(command)
    name, *flags = words[next(i for i, w in enumerate(words) if w.endswith(".py") and (ROOT / w).exists()):]
    flags = ["l2" if flag == "edges" else flag for flag in flags]         # the fork of docs/forking.md, which is not in the script
    if name.startswith("train_"):
        __import__(name[:-3]).parse(flags)
    monkeypatch.setattr(bench, "gpu_name", lambda: "a GPU")
    for f in (bench.measure, bench.step, bench.pairs, bench.mf, bench.precision):
        monkeypatch.setattr(bench, f.__name__, functools.wraps(f)(lambda *a: []))
    for name_of in claims.USES:
        monkeypatch.setattr(claims, name_of, lambda *a: None)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    run = {"fid.py": lambda flags: fid.arguments(), "bench.py": bench.main, "claims.py": claims.main}
    run.get(name, lambda flags: None)(flags)


def tables(text):
    """Every Markdown table of a text as a list of its rows: header -> cell."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        header, _, *rows = [[cell.strip() for cell in line.strip(" |").split(" | ")] for line in block.splitlines()]
        yield [dict(zip(header, row)) for row in rows]


def scores(cell):
    """Numbers with two decimals; not what brackets say beside them."""
    return [float(word) for word in re.findall(r"(?<![\d.])\d+\.\d\d\b", re.sub(r"\(.*?\)", "", cell))]


def test_scores_of_readme_are_those_of_docs_and_means_are_means():
    """The seeds in docs/ are what was measured: every mean and median comes from them, README's numbers too."""
    import claims
    known, compared = {"0.78"}, 0                      # what half of the digits scores
    for row in [row for text in DOCS.values() for rows in tables(text) for row in rows if "seed 0" in row]:
        seeds = [*zip(*(scores(row[f"seed {k}"]) for k in range(3)))]
        for kind, middle in (("mean", statistics.mean), ("median", statistics.median)):
            middles = [middle(values) for values in seeds]
            stated = [scores(cell) for name, cell in row.items() if name.split(",")[0] == kind]
            assert not stated or stated[0] == pytest.approx(middles[:len(stated[0])], abs=0.0101), row    # cell and mean are rounded, 0.005 each
            known |= {f"{value:.2f}" for value in sum(stated, []) + middles + [v for values in seeds for v in values]}
            compared += len(sum(stated, []))
    for name, columns, text, least in (("README.md", ["one step: with / without", "two steps: with / without"], README, 19),
                                       ("results.md", ["with mid-training", "without it"], DOCS["results.md"], 31),
                                       ("results.md", ["ours", "verdict"], DOCS["results.md"], 21),
                                       ("results.md", ["CMT + ECT, mean of 3 seeds", "beside it", "verdict"], DOCS["results.md"], 25)):
        rows = next(rows for rows in tables(text) if {*columns} <= {*rows[0]})
        found = {f"{value:.2f}" for row in rows for column in columns for value in scores(row[column])}
        assert len(found) >= least and found <= known, f"{name}: {found - known} are in no table of seeds"
    assert compared >= 80
    verdicts, best = next(rows for rows in tables(DOCS["results.md"]) if "one step" in rows[0]), {}
    for row in verdicts:                               # the words follow from the numbers, but where CPUs differ by more
        was, now = scores(row["without it"]), scores(row["with mid-training"])
        said = [row["one step"].strip("*"), row["two"]]
        assert said == ["level" if abs(b - a) < 0.1 * a else "helps" if b < a else "hurts" for a, b in zip(was, now)] or "--loss huber" in row["mid-training compares by"] and said[0] == "level", row
        kind = row["script"].partition(",")[0], row["mid-training compares by"].split()[0].strip(",")
        best.setdefault(kind, [f"{now[0]:.2f} / {was[0]:.2f} **{said[0]}**", f"{now[1]:.2f} / {was[1]:.2f} {said[1]}"])
    roads = next(row for row in verdicts if row["script"].startswith("train_mf_imagenet256.py, [photos]"))
    assert [roads["one step"], roads["two"]] == ["**hurts**", "hurts"] and ["photos" in row["script"] for row in verdicts] == 8 * [False] + 3 * [True]    # what claims' pictures say
    one = [row["one step"].strip("*") for row in verdicts[:8]]
    assert f"helps in {(words := 'no one two three four five six seven eight'.split())[one.count('helps')]} of {words[len(one)]} settings, {words[one.count('level')]} are level and {words[one.count('hurts')]} are worse" in " ".join(README.split())
    readme = next(rows for rows in tables(README) if "mid-training compares by" in rows[0])
    kinds = [(row.pop("script").partition(",")[0], row.pop("mid-training compares by").split()[0].strip(",")) for row in readme]
    paper = {kind: row for kind, row in best.items() if kind != ("train_cmt_imagenet.py", "pixels")}              # the defaults, and the paper's losses
    assert {kind: [*row.values()] for kind, row in zip(kinds, readme)} == paper and len(readme) == len(paper) == 5 and len(verdicts) == 11


STATED = {  # what README and docs say of defaults; digits: cifar imagenet flow coco, the paper's: big_*, ffhq, afhqv2
    "README.md": ["each of its {cifar.mid.nfe} states", "noise of level {cifar.eval.second_sigma} "],
    "usage.md": ["lengths ({own.pretrain.steps:,}, {own.mid.steps:,} and {own.post.steps:,} steps)"],
    "results.md": ["{big_cifar.mid.millions:.1f} + {big_cifar.post.millions:.1f} Mimg",
                   "{ffhq.mid.millions:.1f} + {ffhq.post.millions:.1f} Mimg", "{afhqv2.mid.millions:.1f} + {afhqv2.post.millions:.1f} Mimg",
                   "{cifar.mid.millions:.3f} + {cifar.post.millions:.3f} Mimg", "{imagenet.mid.millions:.3f} + {imagenet.post.millions:.3f} Mimg",
                   "{flow.mid.millions:.3f} + {flow.post.millions:.3f} Mimg", "{coco.mid.millions:.3f} + {coco.post.millions:.3f} Mimg",
                   "{cifar.mid.images:,} pairs of CMT + {cifar.post.images:,} images of ECT",
                   "with {cifar.post.warmup} steps of warm-up",
                   "{imagenet.mid.images:,} pairs of CMT + {imagenet.post.images:,} of ECT",
                   "the default: lr {imagenet.post.rate}, step 1/{imagenet.post.q}",
                   "Teacher {flow.mid.weak} (", "student {flow.mid.size} (", "the shipped default: {flow.post.rate}",
                   "| teacher, Mean Flow | {flow.pretrain.steps:,} x {flow.pretrain.batch} |",
                   "| after CMT | {flow.mid.steps:,} x {flow.mid.batch} |", "| + {flow.post.steps:,} x {flow.post.batch} |",
                   "{coco.pretrain.images:,} images of pre-training; then {coco.mid.images:,} pairs of CMT + {coco.post.images:,} images"],
    "runs.md": ["teacher, {cifar.mid.nfe} steps, {cifar.pretrain.images:,} images", "after CMT, {cifar.mid.images:,} pairs",
                "post-training is that of the default (lr {cifar.post.rate})"],
    "faq.md": ["EDM's {big_cifar.pretrain.millions:.0f} million images"],
    "costs.md": ["{cifar.mid.steps} steps, every trajectory once (the default)"],
    "choices.md": ["begins with {cifar.post.warmup} steps of warm-up", "post-training are not stated; {big_flow.post.steps:,} is",
                   "give {big_coco.mid.steps:,} and {big_coco.post.steps:,}", "per solve: {big_cifar.mid.trajectories}, and",
                   "per solve: {big_flow.mid.trajectories}, for", "per solve {big_coco.mid.trajectories}, whose"],
    "walkthrough.md": ["in {cifar.mid.nfe} calls", "`--trajectories {cifar.mid.trajectories}`", "noise of level {cifar.eval.second_sigma} "],
}


def defaults(path, *flags):
    """The stages of a script with these flags: each its Config, and what follows from that."""
    script, stages = __import__(path.stem), {}
    for stage in script.STAGES:
        c = script.parse([*flags, "--stage", stage])
        images, rate = c.steps * c.batch, f"{c.lr:.0e}".replace("e-0", "e-")
        stages[stage] = types.SimpleNamespace(**vars(c), images=images, millions=images / 1e6, rate=rate)
    return types.SimpleNamespace(**stages)


def test_presets_are_stated_as_they_are():
    """Whoever changes the steps, batch or rate of a default changes what README and docs say of it."""
    names, values = ("cifar", "imagenet", "flow", "coco"), {}
    for name, path in zip(names, SCRIPTS):
        values |= {name: defaults(path, "--data", "digits"), f"big_{name}": defaults(path)}
    values |= {data: defaults(SCRIPTS[0], "--data", data) for data in ("ffhq", "afhqv2")}
    values["own"] = defaults(SCRIPTS[0], "--data", "own.zip")
    for name, sentences in STATED.items():
        text = " ".join((README if name == "README.md" else DOCS[name]).split()) + " "       # wherever lines break
        for words in sentences:
            assert words.format(**values) in text, f"{name}: {words.format(**values)}"
    assert sum(map(len, STATED.values())) >= 35


def test_plan_counts_the_steps_of_today(capsys):
    """The big table of docs/costs.md has the stages, methods, precisions and steps that `bench.py plan` would print."""
    import bench
    def plan(home, name, cfg, args):
        """A row without what takes minutes to count."""
        return [{"stage": name, "steps": f"{cfg.steps:,}"}]
    bench.full_size(plan, [])
    printed = [[*row.values()] for rows in tables(capsys.readouterr().out) for row in rows]
    stated = next(rows for rows in tables(DOCS["costs.md"]) if {"stage", "steps"} <= {*rows[0]})
    stated = [[row["stage"], row["steps"]] for row in stated]
    assert stated == [row for row in printed if row in stated] and len(stated) >= 16
    assert {row[0] for row in printed if re.search(" mid | post ", row[0])} <= {row[0] for row in stated}


def test_hours_of_readme_are_those_of_plan():
    """Behind each command of the paper's runs: the sum of its stages in the big table of docs/costs.md."""
    rows = next(rows for rows in tables(DOCS["costs.md"]) if {"stage", "hours"} <= {*rows[0]})
    hours = {" ".join(row["stage"].split()[:-1]): float(row["hours"]) for row in rows}
    for words, stages in {"train_cmt_cifar.py .*# {} h": "cifar10 mid cmt, cifar10 post ect",
                          "--data ffhq, afhqv2: {} h": "ffhq mid cmt, ffhq post ect",
                          "--res 64 .*# {} h": "imagenet64 mid cmt, imagenet64 post ect",
                          "--post ecd: {} h": "imagenet64 mid cmt, imagenet64 post ecd",
                          "--res 512: {} h": "imagenet512 vgg, imagenet512 mid cmt, imagenet512 post ecd",
                          "train_mf_imagenet256.py .*# {} h": "imagenet pretrain mf, imagenet mid cmt, imagenet post mf",
                          "train_t2i_coco.py .*# {} h": "coco pretrain repa, coco mid cmt, coco post mf"}.items():
        total = f"{sum(hours[stage] for stage in stages.split(', ')):.2g}"
        assert re.search(words.format(re.escape(total)), README), f"{words.format(total)}: not in README"


def test_readme_says_which_functions_are_one_text_in_all_scripts():
    texts, said = [toplevel(path) for path in SCRIPTS], re.search(r"losses; (.*?) are the same text", README, re.S)[1]
    assert re.findall(r"`(\w+)`", said) == [name for name in texts[0] if len({t.get(name) for t in texts}) == 1] and said.startswith("`batches`")


def test_readme_prints_commands_and_docs_the_choices_of_the_code():
    assert len([c for c in ALL if c in README]) >= 12
    for name, text in {"README.md": README, **DOCS}.items():                       # a line break would hide a command from these tests
        spans = [s for block in re.sub(r"```.*?```", "", text, flags=re.S).split("\n\n") for s in re.findall(r"`([^`]*)`", block)]
        assert not (odd := [s for s in spans if "\n" in s and re.match(r"(python|torchrun|--)", s)]), f"{name}: {odd}"
    method = [*(ROOT / "train_cmt_cifar.py").read_text().split("\n# ---- ")[2:4], (ROOT / "solvers.py").read_text()]
    assert "take {} lines and the training {}; solvers.py has {}.".format(*(round(len(text.splitlines()), -1) for text in method)) in re.sub(r"\s+", " ", README)
    for path in [*SCRIPTS, ROOT / "solvers.py", ROOT / "nets.py"]:
        for line in re.findall(r"# choice: (.{20})", path.read_text()):
            assert line.split(",")[0].split(";")[0][:14].strip().lower() in DOCS["choices.md"].lower(), f"{path.name}: not in docs/choices.md: {line}"


def test_the_loss_of_the_forking_guide_works():
    """The distance of docs/forking.md, as printed: zero on equal images, one number per image, a gradient."""
    import torch
    space = {}
    exec(re.search(r"```python\n(.*?)```", DOCS["forking.md"], re.S)[1], space)
    distance, x = space["Edges"](), torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    near = (x + 0.1 * x.roll(1, 0)).requires_grad_()
    far = distance.distance(distance.features(near), distance.features(x))
    assert distance.distance(distance.features(x), distance.features(x)).tolist() == [0, 0, 0] and far.shape == (3,)
    far.sum().backward()
    assert near.grad.abs().amin() >= 0 < near.grad.abs().amax()
    assert distance.distance(distance.features(x + 1), distance.features(x)).abs().max() < 1e-10   # flat areas: nothing


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{n}" for n in DOCS)])
def test_links_lead_somewhere(name):
    """[`name`](file.py) leads to a file that defines name, other links to a file, and to a heading where they name one."""
    text, folder = (ROOT / name).read_text(), (ROOT / name).parent
    for word, target, heading in re.findall(r"\[([^\]]+)\]\(([^)#\s]*)(#[^)]*)?\)", text):
        if "://" in target:
            continue
        path = (folder / target).resolve() if target else ROOT / name
        assert path.exists(), f"{name}: {target}"
        if path.suffix == ".py" and re.fullmatch(r"`\w+`", word):
            assert re.search(rf"^(def|class) {word[1:-1]}\b|^{word[1:-1]}\b.*=", path.read_text(), re.M), f"{word} {target}"
        if heading and path.suffix == ".md":
            titles = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.*)", path.read_text(), re.M)]
            assert heading[1:] in titles, f"{name}: {target}{heading}"
