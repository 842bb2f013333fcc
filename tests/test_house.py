"""What keeps the house in order: imports, one text per shared name, banners, knobs in use, README true."""
import ast
import re
import shlex
import signal
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("train_*.py"))
MODULES = ["nets", "solvers", "fid"]
OWN = {"forward", "Config", "load_data", "main", "train", "candidates", "evaluate", "sheets", "build", "student", "model_size",
       "teacher_state", "make_distance", "make_sampler", "check_batch", "sample",
       "data_name", "data_file", "teacher_pairs", "run_stage", "solves"}    # what a script may say in its own way
README = (ROOT / "README.md").read_text()


def toplevel(path):
    """name -> source of each function and class of a file."""
    text = path.read_text()
    lines = text.splitlines()
    return {n.name: "\n".join(lines[n.lineno - 1:n.end_lineno]) for n in ast.parse(text).body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def test_same_name_same_text():
    """Duplicated on purpose means duplicated exactly: a name shared by two scripts has one text."""
    seen, compared = {}, 0
    for path in SCRIPTS:
        for name, source in toplevel(path).items():
            if name not in OWN:
                first = seen.setdefault(name, (path.name, source))
                compared += first[0] != path.name
                assert source == first[1], f"{name} differs: {first[0]} and {path.name}"
    assert compared >= 12 * (len(SCRIPTS) - 1)        # the guard must never run empty


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_imports_follow_the_house(path):
    allowed = {"nets": {"torch", "numpy"}, "solvers": {"torch"}, "fid": {"torch", "numpy", "PIL"}}
    allowed = allowed.get(path.stem, {"torch", "numpy", "PIL", *MODULES})
    allowed = allowed | {p.stem for p in SCRIPTS} if path.stem == "bench" else allowed
    def roots(nodes):
        return {name.split(".")[0] for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}
    tree = ast.parse(path.read_text())
    assert roots(tree.body) - set(sys.stdlib_module_names) <= allowed
    optional = {"diffusers", "transformers"} if path in SCRIPTS else set()            # encoders: inside their functions
    assert roots(ast.walk(tree)) - set(sys.stdlib_module_names) <= allowed | optional


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_six_banners_in_one_order(path):
    names = re.findall(r"^# ---- (\w+) -+$", path.read_text(), re.M)
    assert names == ["knobs", "data", "losses", "sample", "plumbing", "main"]


@pytest.mark.parametrize("path", [*SCRIPTS, *(ROOT / f"{m}.py" for m in MODULES)], ids=lambda p: p.name)
def test_lines_are_short_and_functions_documented(path):
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 120
    missing = [n.name for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
               and not ast.get_docstring(n) and n.name != "Config"]
    assert not missing


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_every_knob_is_used_and_explained(path):
    script, text = __import__(path.stem), path.read_text()
    for f in fields(script.Config):
        assert re.search(rf"\b(cfg|c)\.{f.name}\b", text) or f'"{f.name}"' in text, f"--{f.name} is never read"
    presets = {k for row in script.PRESETS.values() for k in row}
    assert presets <= {f.name for f in fields(script.Config)}
    assert set(" ".join(script.FREE.values()).split()) <= {f.name for f in fields(script.Config)}


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
    monkeypatch.setattr(script, "run_stage", lambda c, *_: seen.update({c.precision: torch.backends.cudnn.allow_tf32}))
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    for name in ("tf32", "fp32", "bf16"):
        script.main(["--data", "digits", "--stage", "eval", "--precision", name, "--out", str(tmp_path)])
    assert seen == {"tf32": True, "fp32": False, "bf16": True}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    seen.clear()
    monkeypatch.setattr(script, "run_stage", lambda c, *_: seen.update({c.stage: (c.init, signal.getsignal(signal.SIGTERM))}))
    script.main(["--data", "digits", "--init", "mine.pt", "--out", str(tmp_path)])
    assert {s for s, (_, f) in seen.items() if f == script.on_signal} == {*script.TRAINED} & {*seen}     # eval just ends
    assert seen["mid"][0] == "mine.pt" and seen["eval"][0] == script.Config.init        # what was trained is scored
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
        signal.signal(number, handler)


def commands(text):
    """Every command line of a text that runs one of our files."""
    for line in text.splitlines():
        found = re.match(r"\s*(?:pip install \S+ \S+ && )?((?:python|torchrun)\b.*?)(?:\s{2,}#.*)?$", line)
        for command in [found[1]] if found else re.findall(r"`((?:python|torchrun)[^`]*)`", line):
            if re.search(r"\b(train_\w+|fid|bench)\.py\b", command):
                yield command


ALL = sorted({c for text in [README, *(p.read_text().split('"""')[1] for p in SCRIPTS)] for c in commands(text)})


@pytest.mark.parametrize("command", [c for c in ALL if "train_" in c])
def test_every_printed_command_parses(command):
    """README and docstrings: the flags exist, the values are possible."""
    words = shlex.split(command)
    name = next(w for w in words if w.startswith("train_"))
    assert (ROOT / name).exists()
    __import__(name[:-3]).parse(words[words.index(name) + 1:])


def test_readme_prints_commands_and_choices_of_the_code():
    assert len([c for c in ALL if c in README]) >= 15
    for path in [*SCRIPTS, ROOT / "solvers.py", ROOT / "nets.py"]:
        for line in re.findall(r"# choice: (.{20})", path.read_text()):
            assert line.split(",")[0].split(";")[0][:14].strip().lower() in README.lower(), f"{path.name}: choice not in README: {line}"


def test_the_loss_of_the_forking_guide_works():
    """The README's code block, as printed: zero on equal images, one number per image, a gradient."""
    import torch
    space = {}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], space)
    distance, x = space["Edges"](), torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    near = (x + 0.1 * x.roll(1, 0)).requires_grad_()
    far = distance.distance(distance.features(near), distance.features(x))
    assert distance.distance(distance.features(x), distance.features(x)).tolist() == [0, 0, 0] and far.shape == (3,)
    far.sum().backward()
    assert near.grad.abs().amin() >= 0 < near.grad.abs().amax()
    assert distance.distance(distance.features(x + 1), distance.features(x)).abs().max() < 1e-10   # flat areas: nothing


def test_links_of_the_readme_lead_to_their_lines():
    """[`name`](file.py#L12) points at the line that defines name."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    wrong = [link for link in links if not re.match(
        rf"(def|class) {link[0]}\b", (ROOT / link[1]).read_text().splitlines()[int(link[2]) - 1])]
    assert len(links) >= 8 and not wrong
