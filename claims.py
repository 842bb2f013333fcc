"""What CMT gives: the paper's claims tried on digits and on small photos, score by score.

  python claims.py claims                   # every claim, three seeds of every run (hours)
  python claims.py claims --methods "CMT + ECT;ECT" --seeds 0       # some rows, one seed
  python claims.py curves                   # CMT + ECT beside ECT: score against images, half an hour
  python claims.py plot out/digits out/ect  # loss and gradient norm of any runs beside each other
  python claims.py sheet out/digits out/digits-1 out/digits-2       # a run's stages.png, three seeds' scores
  python claims.py photos --data cifar10.zip --out out/photos       # CMT + ECT beside ECT on 16x16 photos
  python claims.py roads --data cifar10.zip --out out/roads         # Mean Flow's roads there: score, time
  python claims.py bias --out out/digits    # Theorem 5.1: the gradient bias at each start of a finished run

Every run is a run of a script and leaves that script's folder; what is finished is not run again. photos
and roads take an EDM zip with labels. What a training pair costs: bench.py.
"""
import contextlib
import difflib
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import fid
import nets
import solvers
import train_cmt_cifar as script
import train_mf_imagenet256 as flow


@contextlib.contextmanager
def quiet():
    """Nothing of what runs inside is printed; the run's log.txt has it."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# ---- claims -----------------------------------------------------------------------------------
# The rows are those of docs/results.md. Where they were made, mid-training measured by a VGG of the labels
# and post-training had the plain norm; the CIFAR script's own default on digits is pseudo-Huber in both.
VGG = "--stage mid --loss vgg"                        # the claim of App. D; see vgg_distance
PIXELS = "--stage mid --loss huber"
PLAIN, HUBER = "--stage post --huber_c 0", "--stage post --huber_c 0.06"
ECT = f"{PLAIN} --mid none --steps 1500 --lr 1e-3"
ANNEALED = "--stage post --mid none --post annealed --decay linear"
SIT = "--pretrain fm --weak 4x128x4 --init teacher"          # a teacher of the student's size, its weights
CLAIMS = {  # row: (script, row whose teacher and, with "mid", mid-training it goes on from, a list of calls)
    "CMT + ECT": ("cmt_cifar", "", ["--stage pretrain", VGG, PLAIN]),
    "CMT alone, all images": ("cmt_cifar", "CMT + ECT", [f"{VGG} --steps 1500"]),
    "CMT short + ECT": ("cmt_cifar", "CMT + ECT", [f"{VGG} --steps 450", f"{PLAIN} --steps 1050"]),
    "CMT long + ECT": ("cmt_cifar", "CMT + ECT", [f"{VGG} --steps 1200", f"{PLAIN} --steps 300"]),
    "CMT + ECD": ("cmt_cifar", "CMT + ECT mid", [f"{PLAIN} --post ecd"]),
    "ECT": ("cmt_cifar", "CMT + ECT", [ECT]),
    "ECT, no warm-up": ("cmt_cifar", "CMT + ECT", [f"{ECT} --warmup 0"]),
    "CMT + ECT, no warm-up": ("cmt_cifar", "CMT + ECT mid", [f"{PLAIN} --warmup 0"]),
    "ECT, annealed": ("cmt_cifar", "CMT + ECT", [f"{ANNEALED} --huber_c 0"]),
    "ECT, annealed, pseudo-Huber": ("cmt_cifar", "CMT + ECT", [f"{ANNEALED} --huber_c 0.06"]),
    "ECT, pseudo-Huber": ("cmt_cifar", "CMT + ECT", [f"{ECT} --huber_c 0.06"]),
    "CMT + ECT, post by pseudo-Huber": ("cmt_cifar", "CMT + ECT mid", [HUBER]),
    "CMT + ECT, both by pseudo-Huber": ("cmt_cifar", "CMT by pseudo-Huber + ECT mid", [HUBER]),
    "ECT, annealed, random start": ("cmt_cifar", "CMT + ECT", [f"{ANNEALED} --init random --huber_c 0"]),
    "KD + ECT": ("cmt_cifar", "CMT + ECT", [f"{VGG} --mid kd", PLAIN]),
    "KD + ECT, equal time": ("cmt_cifar", "CMT + ECT", [f"{VGG} --mid kd --steps 206", PLAIN]),
    "Slow CMT + ECT": ("cmt_cifar", "CMT + ECT", [f"{VGG} --mid slow", PLAIN]),
    "Slow CMT + ECT, equal time": ("cmt_cifar", "CMT + ECT", [f"{VGG} --mid slow --steps 310", PLAIN]),
    "CMT by L2 + ECT": ("cmt_cifar", "CMT + ECT", ["--stage mid --loss l2", PLAIN]),
    "CMT by pseudo-Huber + ECT": ("cmt_cifar", "CMT + ECT", [PIXELS, PLAIN]),
    "CMT in bf16 + ECT": ("cmt_cifar", "CMT + ECT", [f"{VGG} --precision bf16", PLAIN]),
    "CMT from 4 steps + ECT": ("cmt_cifar", "CMT + ECT", [f"{VGG} --nfe 4", PLAIN]),
    "CMT from 8 steps + ECT": ("cmt_cifar", "CMT + ECT", [f"{VGG} --nfe 8", PLAIN]),
    "CMT from 32 steps + ECT": ("cmt_cifar", "CMT + ECT", [f"{VGG} --nfe 32", PLAIN]),
    "CMT + ECT, step 1/64": ("cmt_cifar", "CMT + ECT mid", [f"{PLAIN} --q 64"]),
    "CMT + ECT, step 1/4096": ("cmt_cifar", "CMT + ECT mid", [f"{PLAIN} --q 4096"]),
    "CMT by pseudo-Huber + ECT, step 1/4096": ("cmt_cifar", "CMT by pseudo-Huber + ECT mid", [
        f"{PLAIN} --q 4096"]),
    "CMT + ECT, both by pseudo-Huber, step 1/64": ("cmt_cifar", "CMT by pseudo-Huber + ECT mid", [
        f"{HUBER} --q 64"]),
    "CMT + ECT, both by pseudo-Huber, step 1/4096": ("cmt_cifar", "CMT by pseudo-Huber + ECT mid", [
        f"{HUBER} --q 4096"]),
    "ECT, step 1/64": ("cmt_cifar", "CMT + ECT", [f"{ECT} --q 64"]),
    "ECT, step 1/4096": ("cmt_cifar", "CMT + ECT", [f"{ECT} --q 4096"]),
    "CMT + ECT, both by pseudo-Huber, a quarter": ("cmt_cifar", "CMT + ECT", [
        f"{PIXELS} --steps 225", f"{HUBER} --steps 150"]),
    "CMT + ECT, both by pseudo-Huber, half": ("cmt_cifar", "CMT + ECT", [
        f"{PIXELS} --steps 450", f"{HUBER} --steps 300"]),
    "CMT + ECT, both by pseudo-Huber, twice": ("cmt_cifar", "CMT + ECT", [
        f"{PIXELS} --steps 1800", f"{HUBER} --steps 1200"]),
    "ECT, a quarter": ("cmt_cifar", "CMT + ECT", [f"{ECT} --steps 375"]),
    "ECT, half": ("cmt_cifar", "CMT + ECT", [f"{ECT} --steps 750"]),
    "ECT, annealed, pseudo-Huber, a quarter": ("cmt_cifar", "CMT + ECT", [
        f"{ANNEALED} --huber_c 0.06 --steps 375 --stair 47"]),
    "ECT, annealed, pseudo-Huber, half": ("cmt_cifar", "CMT + ECT", [
        f"{ANNEALED} --huber_c 0.06 --steps 750 --stair 94"]),
    "ECT, annealed, pseudo-Huber, twice": ("cmt_cifar", "CMT + ECT", [
        f"{ANNEALED} --huber_c 0.06 --steps 3000 --stair 375"]),
    "EDM2: CMT + ECT": ("cmt_imagenet", "", [""]),
    "EDM2: CMT + ECT, both by pseudo-Huber": ("cmt_imagenet", "EDM2: CMT + ECT", ["--loss huber"]),
    "EDM2: ECT": ("cmt_imagenet", "EDM2: CMT + ECT", ["--mid none --steps 1500"]),
    "EDM2: ECT tuned": ("cmt_imagenet", "EDM2: CMT + ECT", ["--mid none --steps 1500 --lr 2e-2 --q 64"]),
    "EDM2: CMT in bf16 + ECT": ("cmt_imagenet", "EDM2: CMT + ECT", [
        "--stage vgg", "--stage mid --precision bf16", "--stage post"]),
    "EDM2: CMT + ECT in fp16": ("cmt_imagenet", "EDM2: CMT + ECT mid", ["--stage post --precision fp16"]),
    "Mean Flow: CMT + Mean Flow": ("mf_imagenet256", "", [""]),
    "Mean Flow from scratch": ("mf_imagenet256", "Mean Flow: CMT + Mean Flow", ["--mid none --post vanilla"]),
    "Mean Flow: CMT in bf16 + Mean Flow": ("mf_imagenet256", "Mean Flow: CMT + Mean Flow", [
        "--stage mid --precision bf16", "--stage post"]),
    "Mean Flow from flow matching": ("mf_imagenet256", "", [f"{SIT} --mid none --post vanilla"]),
    "Mean Flow from flow matching, CMT": ("mf_imagenet256", "Mean Flow from flow matching", [
        f"{SIT} --stage mid --steps 1000", f"{SIT} --stage post --steps 1140"]),
    "Mean Flow from flow matching, CMT, teacher's v": ("mf_imagenet256", "Mean Flow from flow matching", [
        f"{SIT} --stage mid --steps 1000", f"{SIT} --stage post --post teacher --steps 780"]),
    "Text: CMT + Mean Flow": ("t2i_coco", "", [""]),
    "Text: CMT in bf16 + Mean Flow": ("t2i_coco", "Text: CMT + Mean Flow", [
        "--stage mid --precision bf16", "--stage post"]),
    "Text: Mean Flow from SiT": ("t2i_coco", "Text: CMT + Mean Flow", [
        "--mid none --post vanilla --steps 1500"]),
}


def claims(args, device):
    """Every row of CLAIMS with every seed, one run after the other; what is finished is not run again.

    A line for each net that a row has trained, as in docs/results.md: FD-digits in 1 / 2 / more steps.
    """
    seeds = [int(s) for s in args.seeds.split(",")]
    print("| run | " + " | ".join(f"seed {s}" for s in seeds) + " | median | mean | seconds |")
    print("|---" * (len(seeds) + 4) + "|")
    for row in CLAIMS if not args.methods else args.methods.split(";"):
        runs, base = [claim(row, seed, args.out) for seed in seeds], CLAIMS[row][1]
        nets, seconds = dict.fromkeys(key.split()[0] for key in runs[0][0]), [t for _, t in runs]
        known = ["teacher"] * bool(base) + ["mid"] * base.endswith(" mid")      # lines of the row before
        for net in [net for net in nets if net not in known]:
            columns = [[scores[key] for scores, _ in runs] for key in runs[0][0] if key.split()[0] == net]
            cells = [*zip(*columns), map(statistics.median, columns), map(statistics.mean, columns)]
            name = row if net == [*nets][-1] else f"{row} ({net})"
            print(f"| {name} | " + " | ".join(" / ".join(f"{v:.2f}" for v in cell) for cell in cells)
                  + f" | {statistics.median(seconds):.0f} |", flush=True)


def claim(row, seed, out):
    """Run one row with one seed, unless it is finished: {"net steps": score}, seconds of mid + post."""
    name, base, calls = CLAIMS[row]
    folder, source = (f"{out}/{seed}/{r.removesuffix(' mid').replace(' ', '_')}" for r in (row, base))
    flags, first = ["--data", "digits", "--seed", str(seed), "--out", folder], base
    while first and CLAIMS[first.removesuffix(" mid")][1]:
        first = CLAIMS[first.removesuffix(" mid")][1]     # whose teacher they all share
    if base:
        teacher = first.removesuffix(" mid").replace(" ", "_")
        flags += ["--teacher", file := f"{out}/{seed}/{teacher}/pretrain.pt"]
        if not os.path.exists(file):
            script.fail(2, f"--methods {row}: it goes on from {base.removesuffix(' mid')}; name that first")
    os.makedirs(folder, exist_ok=True)
    if base.endswith(" mid"):
        shutil.copy(f"{source}/mid.pt", folder)
    if "--stage" in calls[-1]:                            # else the one call runs all stages, the score too
        calls = [*calls, "--stage eval"]
    finished = os.path.exists(f"{folder}/results.md")
    for call in [] if finished else calls:
        by_vgg = "--loss vgg" in call
        with vgg_distance(f"{out}/{seed}/vgg.pt", seed) if by_vgg else contextlib.nullcontext(), quiet():
            home = importlib.import_module(f"train_{name}")
            home.main([*flags, *call.replace("--loss vgg", "--loss l2").split()])
    lines = fid.read_metrics(folder)
    scored = [m for m in lines if m["stage"] == "eval"]
    scores = {f"{m['net']} {m['metric'].split('-')[0]}": m["values"][0] for m in scored}
    return scores, sum({m["stage"]: m["seconds"] for m in lines if m["stage"] in ("mid", "post")}.values())


def vgg_distance(path, seed):
    """Inside, d of Eq. 7 in the CIFAR script is the VGG at path, whatever --loss says: App. D on digits."""
    if not os.path.exists(path):
        train_vgg(path, seed)

    def make_distance(cfg):
        vgg = nets.VGG()
        nets.load_weights(vgg, nets.load_checkpoint(path)["net"], path)
        return vgg.to(script.DEVICE).requires_grad_(False).eval()
    return mock.patch.object(script, "make_distance", make_distance)


def train_vgg(path, seed, steps=300, batch=128, lr=3e-3):
    """A small VGG trained on the digits' labels (the idea of App. B.5). Returns the share read right."""
    images, labels = fid.digits()
    torch.manual_seed(script.fold(seed, "vgg"))
    vgg = nets.VGG()
    opt = torch.optim.Adam(vgg.parameters(), lr=lr)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * (1 - step / steps)
        i = torch.randint(len(images), (batch,))
        dx, dy = torch.randint(-1, 2, (2,)).tolist()                                 # shifts by one pixel
        x = fid.to_float(images[i].roll((dx, dy), (2, 3)), "cpu")
        loss = F.cross_entropy(vgg.logits(x + 0.2 * torch.rand(()) * torch.randn(x.shape)), labels[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
    nets.save_checkpoint(path, net=vgg.state_dict())
    return (vgg.logits(fid.to_float(images, "cpu")).argmax(1) == labels).float().mean().item()


# ---- curves -----------------------------------------------------------------------------------
WITH, WITHOUT = "mid- and post-training", "without mid-training"          # as the pictures call them


def plot(args, device):
    """The curves of any runs beside each other, a panel for each stage and quantity: <out>/plot.png."""
    titles = dict(loss="loss", grad="gradient norm", mse_gap1="squared error of velocities, t - r up to 1/4")
    panels = {f"{stage}: {title}": {} for stage in fid.SPOKEN.values() for title in titles.values()}
    for run in dict.fromkeys(args.runs):
        if not (steps := [m for m in fid.read_metrics(run) if "images" in m]):
            what = "has no step of a training" if os.path.exists(f"{run}/metrics.jsonl") else "is not there"
            script.fail(3, f"plot: {run}/metrics.jsonl {what}; name the folder of a run")
        ones = [m for m in fid.read_metrics(run) if m.get("metric", "").startswith("1-step")]
        name = run + "".join(f", {m['metric']} {m['values'][0]:.2f} of {m['samples']:,} images"
                             for m in ones[-1:])
        for m, key in ((m, key) for m in steps for key in titles):
            panel = panels[f"{fid.SPOKEN[m['stage']]}: {titles[key]}"]
            panel.setdefault(name, []).append((m["images"], m.get(key, 0)))
    os.makedirs(args.out, exist_ok=True)
    fid.save_chart(f"{args.out}/plot.png", panels, "Losses do not rank runs: compare their scores\n"
                   "The stages of each run against the images (or pairs) that the stage has been trained on. "
                   "Beside a run the score of its last net, by so many samples; lower is better.")
    print(f"open {args.out}/plot.png; the next plot replaces it, unless it has another --out")


def ranged(values):
    """The mean of the scores of several seeds and, on a line below it, their range."""
    return f"{np.mean(values):.2f}\n{min(values):.2f} to {max(values):.2f}"


def sheet(args, device):
    """Score runs that differ in their seed alone: <out>/stages.png, images of the first, means of all."""
    drawn, made_of = [], []

    def keep(out, *stages, table=(), samples=0):
        drawn.extend([(stages, table, samples)] * bool(table))
    for run in args.runs:
        config = pathlib.Path(run, "config.json")
        if not config.exists():
            script.fail(3, f"sheet: {config} is not there; name the folder of a run")
        stages = json.loads(config.read_text())
        made = [*stages.values()][-1]
        nets_of_run = sorted(str(file.relative_to(run)) for file in config.parent.rglob("*.pt"))
        made_of.append((nets_of_run, [{**c, "seed": 0, "out": "", "teacher": ""} for c in stages.values()]))
        if made_of[-1] != made_of[0]:
            script.fail(3, f"sheet: {run} differs from {args.runs[0]} in more than its seed; finish it, with "
                           "its run in alone, or leave it out")
        home = importlib.import_module(made["script"].removesuffix(".py"))
        with quiet(), mock.patch.object(fid, "save_stages", keep):
            home.main(["--data", made["data"], "--seed", str(made["seed"]), "--stage", "eval", "--out", run])
    (shown, names, words), table, samples = drawn[0]
    for k, row in enumerate(table):
        for key in [key for key in row if "-step " in key and row[key] != "-"]:
            all_of = [float(rows[k][key].rstrip("%")) for _, rows, _ in drawn]
            row[key] = f"{np.mean(all_of):.1f}%" if "%" in row[key] else ranged(all_of)
    scope, below = words.split("\n", 1)
    many = f"means of {len(drawn)} seeds"
    seen = f"{made['script']}: scores are {many}, with their range; images are seed \\1's."
    below = re.sub(r"Seed (\d+)\.", seen, below)
    words = f"{fid.headline(table, scope, many)}\n{below}"
    fid.save_stages(args.out, shown, names, words, table, samples)
    print(f"open {args.out}/stages.png")


@contextlib.contextmanager
def kept_checkpoints(folder):
    """Inside, the checkpoints that a run saves, with EMA weights and CPU seconds then; none: exit code 2."""
    save, kept = nets.save_checkpoint, []

    def keep(path, **state):
        save(path, **state)
        ema = {k: v.clone() for k, v in state["ema"].state_dict().items()}
        kept.append({**state, "ema": ema, "cpu": time.process_time()})
    with mock.patch.object(nets, "save_checkpoint", keep):
        yield kept
    if not kept:
        script.fail(2, f"{folder} is finished, its checkpoints are gone; use another --out")


def curve(seed, features, reference, args):
    """Trains a teacher and two students: {"one step": {name: [(images, score)]}, "two steps": ...}, marks.

    Both sides are at their best in `claims`. A student begins with its teacher's weights, and their score.
    """
    teacher = f"{args.out}/{seed}/teacher"
    flags = ["--data", "digits", "--seed", seed, "--teacher", f"{teacher}/pretrain.pt", "--save_every", "150"]
    with quiet():
        script.main(["--data", "digits", "--seed", seed, "--stage", "pretrain", "--out", teacher])
    cfg = script.parse([*flags, "--stage", "eval"])

    def score(net, kind):
        return fid.score(script.make_sampler(cfg, net, kind), features, reference, cfg.samples)[1][0]

    weights, model = script.teacher_state(cfg)
    taught = script.build(cfg, model, weights)
    level, *starts = (score(taught, kind) for kind in ("teacher", 1, 2))
    scores, marks = {"one step": {}, "two steps": {}}, {}
    for name, calls in {WITH: [PIXELS, HUBER], WITHOUT: [f"{ANNEALED} --huber_c 0.06"]}.items():
        folder, seen = f"{args.out}/{seed}/{name.replace(' ', '_')}", 0
        for panel, start in zip(scores.values(), starts):
            panel[name] = [(0, start)]
        for call in calls:
            marks |= {seen: "blue: post-training begins"} if seen else {}
            print(f"seed {seed}, {name}: {call}, log in {folder}", flush=True)
            with kept_checkpoints(folder) as kept, quiet():
                script.main([*flags, "--out", folder, *call.split()])
            for state in kept:
                net = script.build(cfg, state["model"], state["ema"])
                at = seen + state["step"] * state["cfg"]["batch"]
                for steps, panel in enumerate(scores.values(), 1):
                    panel[name].append((at, score(net, steps)))
            seen = at
    for panel in scores.values():
        panel[f"teacher, {cfg.nfe} steps"] = [(0, level), (seen, level)]
    return scores, marks


def curves(args, device):
    """The paper's Figure 1 on digits, means and range of the seeds: <out>/scores.png."""
    features = fid.DigitsNet().to(device)
    reference = fid.measure(features, fid.digits()[0].split(250), device)
    runs, marks = zip(*(curve(seed, features, reference, args) for seed in args.seeds.split(",")))
    panels = {}
    for words, nets in runs[0].items():
        panel = panels[f"FD-digits in {words}, lower is better"] = {}
        for name, points in nets.items():
            found = np.array([[y for _, y in run[words][name]] for run in runs])         # (seeds, dots)
            panel[name] = [*zip((x for x, _ in points), found.mean(0), found.min(0), found.max(0))]
            print(f"{name}, {words}: " + ", ".join(f"{x:,} {y:.2f}" for x, y, *_ in panel[name]))
    ends = [{words: panels[f"FD-digits in {words}, lower is better"][net][-1][1] for words in runs[0]}
            for net in (WITH, WITHOUT)]
    fid.save_chart(f"{args.out}/scores.png", panels,
                   fid.beside("FD-digits", *ends, f"means of {len(runs)} seeds", "with a loss on pixels ")
                   + "\n"
                   "FD-digits: Frechet distance of 2,000 samples to the 8x8 digits, in a classifier's "
                   "features.\nNew real digits: about 0.4. Bars: the best and the worst seed.\n"
                   "Blue: mid-training on pairs (a state of a trajectory, its end), then post-training on "
                   "images.\nRed: images alone, by the best schedule that we found. Both begin with the "
                   "teacher's weights.\nCompare the last dots: there both learning rates have reached 0; red "
                   "was still improving.\nA pair costs as many passes as an image. "
                   "With a loss on features of a VGG, the paper's way, mid-training does not help here.",
                   "images or pairs that the student has seen", marks[0])
    print(f"open {args.out}/scores.png")


# ---- photos -----------------------------------------------------------------------------------
class PhotoNet(torch.nn.Module):
    """Scores photos: uint8 (B, 3, 16, 16) -> features (B, 128) of a small VGG trained on their labels."""
    dim = 128

    def __init__(self, images, labels, path, steps=2000, batch=128):
        super().__init__()
        torch.manual_seed(0)                              # trap: else every folder of runs has another judge
        self.vgg = nets.VGG(3, ((32, 32), (64, 64), (128, 128)))
        if os.path.exists(path):
            self.vgg.load_state_dict(torch.load(path, weights_only=True))
        else:
            known, opt = len(images) * 9 // 10, torch.optim.Adam(self.vgg.parameters(), lr=2e-3)
            for step in range(steps):
                opt.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
                i = torch.randint(known, (batch,))
                x = images[i] if step % 2 else images[i].flip(3)
                loss = F.cross_entropy(self.vgg.logits(fid.to_float(x, "cpu")), labels[i])
                opt.zero_grad()
                loss.backward()
                opt.step()
            torch.save(self.vgg.state_dict(), path)
        with torch.no_grad():
            parts = zip(images.split(500), labels.split(500))
            right = [self.vgg.logits(fid.to_float(x, "cpu")).argmax(1) == y for x, y in parts]
        held = torch.cat(right)[len(images) * 9 // 10:].float().mean()
        self.protocol = f"FD-photos: {held:.1%} of a tenth never trained on are read right"

    @torch.no_grad()
    def forward(self, images):
        return self.vgg.maps(fid.to_float(images, "cpu"))[-1].mean((2, 3))


PHOTOS = {  # row: calls, laid over the settings of digits; the last net is scored in 1 and 2 steps
    "teacher": ["--stage pretrain --steps 3000"],
    "after CMT": [PIXELS],
    "CMT + ECT": [PIXELS, PLAIN],
    "CMT + ECT, step 1/4096": [PIXELS, f"{PLAIN} --q 4096"],
    "ECT": [ECT],
    "ECT, step 1/4096": [f"{ECT} --q 4096"],
    "ECT, step 1/64": [f"{ECT} --q 64"],
    "ECT, annealed": [f"{ANNEALED} --huber_c 0"],
}
CALLED = {"after CMT": "mid-training alone", "CMT + ECT": WITH, "ECT, annealed": WITHOUT}
SHARED = "steps batch lr decay warmup ema_beta q stair dropout precision log_every save_every".split()


def small_photos(path, small):
    """Images (N, 3, 16, 16) and labels (N,) of an EDM zip, shrunk once: kept in the .npz `small`."""
    if not os.path.exists(small):
        labels, _ = fid.read_labels(path, fid.image_source(path)[0]) or \
            script.fail(3, f"--data {path}: no labels; pass an EDM zip with labels")
        np.savez(small, images=fid.load_images(path, 16).permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    with np.load(small) as f:
        images = torch.from_numpy(f["images"]).permute(0, 3, 1, 2).contiguous()
        return images, torch.from_numpy(f["labels"])


def judged_photos(args, small):
    """Images and labels of --data as small photos, the net that judges samples, its statistics of them."""
    if not os.path.exists(args.data):
        script.fail(3, f"--data {args.data}: not there; pass an EDM zip with labels")
    os.makedirs(args.out, exist_ok=True)
    images, labels = small_photos(args.data, small)
    features = PhotoNet(images, labels, f"{args.out}/features.pt")
    halves = [fid.measure(features, images[k::2].split(500))[:2] for k in (0, 1)]
    features.apart = fid.frechet_distance(*halves[0], *halves[1])
    print(f"{len(images):,} images; {features.protocol}; one half of them scores {features.apart:.2f} "
          "against the other")
    return images, labels, features, fid.measure(features, images.split(500))


def photo_run(row, seed, small, args):
    """Train one row of PHOTOS with one seed, unless it is there. Returns its folder and its last stage."""
    folder = f"{args.out}/{seed}/{row.replace(' ', '_').replace('/', '_')}"
    flags = ["--data", small, "--seed", seed, "--out", folder]
    if row != "teacher":
        flags += ["--teacher", f"{args.out}/{seed}/teacher/pretrain.pt"]
    if row.startswith("CMT") and not os.path.exists(f"{folder}/mid.pt"):
        os.makedirs(folder, exist_ok=True)                # mid-training is that of the row above
        shutil.copy(f"{args.out}/{seed}/after_CMT/mid.pt", folder)
    for call in PHOTOS[row]:
        digits = script.parse(["--data", "digits", *call.split()])
        same = [word for name in SHARED for word in (f"--{name}", str(getattr(digits, name)))]
        with quiet():
            script.main([*flags, *same, *call.split()])
    return folder, digits.stage


def photos(args, device):
    """CMT + ECT beside ECT on photos of 16x16 (--data: an EDM zip with labels), with the settings of digits.

    <out>/<seed>/stages.png shows the same noises through every net, beside them means of the seeds so far.
    """
    small, n = f"{args.out}/photos.npz", args.samples or 5_000
    images, _, features, reference = judged_photos(args, small)
    real = "real photos", 0, fid.to_float(images[:8], "cpu")
    print("| run | seed | FD-photos, 1 / 2 steps (teacher: 1 / 16) | seconds |\n|---|---|---|---|")
    scores, seen = {}, {}                                 # row, steps: its scores with the seeds so far
    for number, seed in enumerate(args.seeds.split(","), 1):
        shown = []
        for row in args.methods.split(";") if args.methods else PHOTOS:
            folder, stage = photo_run(row, seed, small, args)
            state = torch.load(f"{folder}/{stage}.pt", weights_only=True)
            cfg = script.parse(["--data", small])
            net, found = script.build(cfg, state["model"], state["ema"]), []
            for kind, steps in (1, 1), ("teacher", cfg.nfe) if row == "teacher" else (2, 2):
                sampler = script.make_sampler(cfg, net, kind)
                found.append(fid.score(sampler, features, reference, n)[0])
                scores.setdefault((row, steps), []).append(float(found[-1]))
                shown.append((CALLED.get(row, row), steps, sampler(range(8))))
            seen[row] = script.nets.cost(state)["images"]            # of its last stage
            print(f"| {row} | {seed} | {' / '.join(found)} | {state['seconds']:.0f} |", flush=True)
        table = {row: {"stage": CALLED.get(row, row)} for row, _ in scores}
        for (row, steps), values in scores.items():
            table[row][f"{steps}-step FD-photos"] = ranged(values)
        mid, *ends = [{words: np.mean(scores.get((row, int(steps)), np.nan))
                       for steps, words in fid.FEW.items()} for row in CALLED]
        new = features.apart * (1 / n + 1 / len(images)) / (4 / len(images))     # docs/results.md: 1/n + 1/m
        name = os.path.splitext(os.path.basename(args.data))[0]
        words = (f"{fid.beside('FD-photos', *ends, f'means of {number} seeds', 'with a loss on pixels ')}\n"
                 f"{n:,} new photos would score about {new:.2f}. train_cmt_cifar.py: scores are means of "
                 f"{number} seeds, with their range; images are seed {seed}'s.\n{fid.LEARNED[1][:-1]}"
                 + "; in one step it gains nothing" * bool(ends[0]['one step'] >= mid['one step'])
                 + f".\n{fid.BY_FEATURES}\nWithout mid-training: post-training alone, "
                 f"{fid.ANNEALED}, on {seen.get('ECT, annealed')} images (with it: as many pairs "
                 "and images).\n"
                 f"{len(images):,} photos of {name}, shrunk; nets this small draw no clear objects.")
        fid.save_stages(f"{args.out}/{seed}", [*shown, real], (), words, [*table.values()], n)


FM = "--pretrain fm --weak SIZE --init teacher"           # SIZE: --size, of student and flow-matching teacher
ROADS = {  # road: the road whose teacher it goes on from, its calls, laid over the settings of digits
    "flow matching": ("", ["--stage pretrain --pretrain fm --weak SIZE --steps 320"]),
    "weak Mean Flow": ("", ["--stage pretrain --weak 2x64x3 --steps 800"]),
    "from scratch": ("", ["--stage post --mid none --post vanilla --steps 640"]),
    "from scratch, 495 steps": ("", ["--stage post --mid none --post vanilla --steps 495"]),
    "CMT + Mean Flow": ("weak Mean Flow", [
        "--stage mid --weak 2x64x3 --steps 460", "--stage post --weak 2x64x3 --steps 280"]),
    "from flow matching": ("flow matching", [f"{FM} --stage post --mid none --post vanilla --steps 370"]),
    "flow matching, CMT, teacher's v": ("flow matching", [
        f"{FM} --stage mid --steps 300", f"{FM} --stage post --post teacher --ratio 0.25 --steps 160"]),
}


def road_run(road, seed, data, args):
    """Train a road; all checkpoints on it, with the CPU seconds of its own stages up to each."""
    (base, calls), kept = ROADS[road], []
    folder, source = (f"{args.out}/{seed}/{name.replace(' ', '_')}" for name in (road, base))
    flags = ["--data", "digits", "--seed", seed, "--out", folder, "--size", args.size]
    as_digits = mock.patch.object(fid, "digits", lambda: data)        # the script's data are these photos
    for call in calls:
        spent = (kept[-1]["cpu"] if kept else 0.0) - time.process_time()
        teacher = ["--teacher", f"{source}/pretrain.pt"] if base else []
        with kept_checkpoints(folder) as new, as_digits, quiet():
            call = f"--save_every 160 {call} {args.flags}".replace("SIZE", args.size)
            flow.main([*flags, *teacher, *call.split()])
        kept += [state | dict(cpu=spent + state["cpu"]) for state in new]
    return kept


def roads(args, device):
    """Mean Flow's ROADS on photos of 16x16: score against CPU seconds, a teacher's too."""
    *data, features, reference = judged_photos(args, f"{args.out}/photos.npz")
    cfg = flow.parse(["--data", "digits", "--labels", "random", *args.flags.split()])
    print("| road | seed | stage, steps | CPU s, with the teacher's | FD-photos |\n|---|---|---|---|---|")
    for seed in args.seeds.split(","):
        ends = {"": 0.0}
        for road in args.methods.split(";") if args.methods else ROADS:
            for state in road_run(road, seed, data, args):
                net = flow.build(cfg, state["model"], state["ema"])
                seconds = ends[road] = ends[ROADS[road][0]] + state["cpu"]
                steps = [cfg.nfe] if net.r_embedder is None else [1, 2]
                samplers = [flow.make_sampler(cfg, net, k) for k in steps]
                found = [fid.score(f, features, reference, args.samples or 2_500)[1][0] for f in samplers]
                scores = " / ".join(f"{x:.2f}" for x in found)
                stage = f"{state['cfg']['stage']}, {state['step']}"
                print(f"| {road} | {seed} | {stage} | {seconds:.0f} | {scores} |", flush=True)


# ---- gradient bias ----------------------------------------------------------------------------
def gradient_bias(net, x_t, x_r, t, r, end):
    """Theorem 5.1 measured at one start: |grad L_oracle - grad L_CM|^2, L_oracle, relative bias, cosine.

    d = squared L2, w = 1, means over images (Eq. 12, 13, App. F.4). end (B, C, H, W): where the teacher's ODE
    takes x_t; x_r the same image and noise at r < t. Relative: |difference| / |grad L_oracle|. Floats.
    """
    params = [p.requires_grad_() for p in net.parameters()]
    oracle, cm, loss = 0.0, 0.0, 0.0
    for a, b, t, r, e in zip(*(v.split(250) for v in (x_t, x_r, t, r, end))):
        with torch.no_grad():
            f_r = net(b, r)
        f_t = net(a, t)
        grads = []
        for target in (e, f_r):
            d = (f_t - target).square().sum() / len(x_t)
            loss += d.item() * (target is e)
            slopes = torch.autograd.grad(d, params, retain_graph=True)
            grads.append(torch.cat([v.flatten() for v in slopes]).double())
        oracle, cm = oracle + grads[0], cm + grads[1]
    norm, gap = oracle.norm().item(), (oracle - cm).norm().item()
    return gap**2, loss, gap / norm, (oracle @ cm).item() / (norm * cm.norm().item())


def finished_run(out):
    """Config of the CIFAR run in a folder, as its last finished checkpoint says, and whether it had CMT."""
    for stage in ("post", "mid", "pretrain"):
        ckpt = nets.finished(f"{out}/{stage}.pt")
        if ckpt and ckpt.get("script", "train_cmt_cifar.py") == "train_cmt_cifar.py":
            was = ckpt["cfg"]
            flags = [str(w) for name in ("data", "res", "seed", "teacher") for w in (f"--{name}", was[name])]
            cfg = script.parse([*flags, "--stage", "eval", "--out", out])
            return replace(cfg, stage="bias"), was["mid"] != "none"
    script.fail(3, f"--out {out}: no finished checkpoint of train_cmt_cifar.py is there; train or name one")


def ode_ends(teacher, x_t, t, steps=48):
    """Where the teacher's ODE takes each x_t: Heun steps on EDM's grid, scaled from t to end at 0."""
    ends, ratios = [], solvers.edm_sigmas(steps, 1.0, 0.002 / 80).tolist()
    with torch.no_grad():
        for state, level in zip(x_t.split(250), t.split(250)):
            for high, low in zip(ratios, ratios[1:]):
                state = solvers.ode_step(teacher, state, high * level, low * level, 2)
            ends.append(state)
    return torch.cat(ends)


def bias(args, device):
    """Gradient bias of Eq. 3 (Theorem 5.1) at every start there is and at a random one: <out>/bias.md."""
    (cfg, has_cmt), n = finished_run(args.out), args.samples or 500
    fid.OUT = args.out                                    # whose log and metrics get a line for each start
    images = script.load_data(cfg).to(device)
    g = torch.Generator(device).manual_seed(script.fold(cfg.seed, "bias"))
    found = script.candidates(cfg)
    names = dict(teacher="diffusion", mid="CMT", post="CMT + ECT" if has_cmt else "ECT")
    starts = {names.get(name, name): net for name, net, *_ in found}
    starts["random"] = script.build(cfg, script.model_size(cfg, images))
    x, t = script.draw(images, n, g), (cfg.P_mean + cfg.P_std * script.randn(n, g)).exp()
    eps = script.randn(x.shape, g)
    x_t = x + t.view(-1, 1, 1, 1) * eps
    end = ode_ends(found[0][1], x_t, t)
    lines = ["| start | step | squared bias | oracle loss | relative bias | cosine |", "|---" * 6 + "|"]
    for q in (4096, 64, 10):
        r = script.ect_step(t, q)
        x_r = x + r.view(-1, 1, 1, 1) * eps
        for name, net in starts.items():
            row = gradient_bias(net, x_t, x_r, t, r, end)
            lines.append(f"| {name} | 1/{q} | {row[0]:.4g} | {row[1]:.3f} | {row[2]:.3f} | {row[3]:.3f} |")
            if len(lines) == 3:
                fid.log("\n".join(lines[:2]))
            fid.log(lines[-1], stage="bias", start=name, q=q, values=row)
    with open(f"{args.out}/bias.md", "w") as f:
        f.write("\n".join([*lines, "", f"{n} images, ln t ~ N({cfg.P_mean}, {cfg.P_std}^2)"]) + "\n")
    print(f"open {args.out}/bias.md")


# ---- command line -----------------------------------------------------------------------------
USES = dict(  # command: its flags
    claims="out methods seeds device", curves="out seeds device", plot="runs out device",
    sheet="runs out device", photos="data out methods seeds samples device",
    roads="data out methods seeds size flags samples device", bias="out samples device")
FLAGS = dict(
    runs=dict(nargs="+", metavar="OUT", help="folders of runs, of any script"),
    out=dict(default="", help="folder of the runs; \"\" = out/claims; bias: out/digits"),
    methods=dict(default="", help="rows, between semicolons; \"\" = all"),
    seeds=dict(default="0,1,2", help="of the whole pipeline"),
    data=dict(required=True, help="an EDM zip with labels"),
    size=dict(default="2x128x6", help="of the student, PATCHxWIDTHxDEPTH"),
    flags=dict(default="--lr 4e-3", help="of every stage, as --flags=\"--lr 1e-3\""),
    samples=dict(type=int, default=0, help="0 = photos: 5,000, roads: 2,500, bias: 500"))


def main(argv=None):
    """The command line of the docstring."""
    args = fid.commands(globals(), "claims.py").parse_args(argv)
    args.out = args.out or ("out/digits" if args.what == "bias" else "out/claims")
    fid.check_out(args.out)
    script.DEVICE = device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if getattr(args, "samples", 0) < 0:
        script.fail(2, f"--samples {args.samples} is not possible; it must be 0 or more")
    rows = dict(claims=CLAIMS, photos=PHOTOS, roads=ROADS).get(args.what, ())
    for name in {*getattr(args, "methods", "").split(";")} - {"", *rows}:
        nearest = "; ".join(difflib.get_close_matches(name, rows, 5, 0))
        script.fail(2, f"--methods {name}: no such row of {args.what}; the nearest are {nearest}")
    if not re.fullmatch(r"\d+(,\d+)*", getattr(args, "seeds", "0")):
        script.fail(2, f"--seeds {args.seeds} is not possible; write 0 or 0,1,2")
    try:
        globals()[args.what](args, device)
    except (OSError, fid.DataError, nets.WeightsError) as error:         # any other is a crash, and shows it
        script.fail(3, f"{args.what}: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, fid.leave)
    main()
