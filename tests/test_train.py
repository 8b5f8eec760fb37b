"""The scripts as a user runs them: training, resuming after a crash, two processes, sampling, evaluating, mistakes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from PIL import Image

import build
import data
import diffusion
import evaluate
import figures
import guidance
import objectives
import runs
import sample
import samplers
import scores
import train

ROOT = Path(__file__).parent.parent
TINY = ["--model", "dit-nano:depth=1,hidden_size=32,num_heads=2", "--data", "shapes:size=8", "--batch", "8", "--steps",
        "6", "--log-every", "1", "--sample-n", "8", "--draw", "steps=2", "--sample-every", "0", "--device", "cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, a small `shapes`, and signal handlers put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.SPLITS, "train", range(200))
    monkeypatch.setitem(data.SPLITS, "test", range(1_000_000, 1_000_100))
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for s, handler in before.items():
        signal.signal(s, handler)


def call(function, *argv):
    """Run a script's main in this process."""
    old, sys.argv = sys.argv, [function.__name__ + ".py", *map(str, argv)]
    try:
        build.command(function)
    finally:
        sys.argv = old


def refused(capsys, function, *argv):
    """The one line that a mistake gets; exit code 2, no traceback."""
    with pytest.raises(SystemExit) as leaving:
        call(function, *argv)
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def weights(folder):
    """Everything that must be equal, as bytes."""
    state = runs.load_checkpoint(Path(folder) / "ckpt.pt")
    tensors = {f"{k}.{n}": v for k in ("model", "ema") for n, v in state[k].items()}
    optimisers = state["optimiser"]                                 # of Muon a pair
    for part, one in ({"adamw": optimisers} if "state" in optimisers else optimisers).items():
        for k, moments in one["state"].items():
            tensors |= {f"{part}.{k}.{n}": v for n, v in moments.items()}
    return state["step"], {n: v.numpy().tobytes() for n, v in tensors.items()}


def losses(folder):
    return [entry["loss"] for entry in runs.history(Path(folder))]


# ------------------------------------------------------------------------------------------------------------- training


def test_a_run_leaves_what_it_promises(here):
    call(train.train, *TINY, "--out", "r")
    written = sorted(p.name for p in Path("r").iterdir() if p.name != ".lock")
    assert written == ["ckpt.pt", "config.json", "loss.png", "metrics.jsonl", "samples"]
    entries = [json.loads(line) for line in open("r/metrics.jsonl")]
    assert [e["step"] for e in entries] == list(range(1, 7))
    assert 0.1 < entries[0]["loss"] < 10
    assert {"lr", "grad_norm", "images_per_s", "mse"} <= entries[0].keys()
    picture = Image.open("r/samples/step_0000006.png")
    assert picture.size[0] > picture.size[1] / 2 and len(picture.getcolors(2**24)) > 2
    assert json.load(open("r/config.json"))["classes"] == data.SHAPES


@pytest.mark.parametrize("options", [
    [],
    ["--process", "cosine", "--prediction", "v"],
    ["--process", "linear:learned_variance=True"],
    ["--process", "edm"],
    ["--weighting", "min-snr", "--density", "mode"],
    ["--unconditional"],
    ["--model", "dit-nano:depth=1,hidden_size=32,num_heads=2,moe=(4,2)"],
    ["--model", "dit-nano:depth=1,hidden_size=32,num_heads=2,ternary=True"],
    ["--model", "dimr-nano:hidden_size=16,depth=2,num_heads=2", "--weight-decay", "0.1"],
    ["--model", "unet-nano:channels=16,multipliers=(1,2),attention=(),dropout=0.3"],
])
def test_resumed_is_unbroken(here, options):
    """6 steps = 2 + 4 resumed steps, bit for bit, with other intervals of saving and drawing."""
    call(train.train, *TINY, *options, "--out", "whole")
    call(train.train, *TINY, *options, "--out", "parts", "--decay", "linear",
         "--save-every", "2", "--sample-every", "1")
    Path("parts/ckpt.pt").unlink()
    os.rename("parts/ckpt.prev.pt", "parts/ckpt.pt")
    assert weights("parts")[0] == 4
    call(train.train, "--out", "parts", "--resume", "--save-every", "3")
    assert weights("parts") == weights("whole") and losses("parts") == losses("whole")


@pytest.mark.parametrize("argv, own", [
    (["--model", "dit-nano"], ("muon", 0.02)),
    (["--model", "dit-nano", "--lr", "0.01"], ("muon", 0.01)),
    (["--model", "dit-nano", "--optimiser", "adamw"], ("adamw", 1e-3)),
    (["--model", "dit-nano:ternary=True"], ("adamw", 3e-3)),
    (["--model", "terdit-nano", "--optimiser", "muon:momentum=0.9"], ("muon:momentum=0.9", 0.02)),
    (["--model", "dit-nano", "--shard"], ("adamw", 1e-3)),
    (["--model", "dit-s/2"], ("adamw", 1e-4)),
    (["--model", "vitok-nano"], ("adamw", 1e-3)),
])
def test_a_model_says_its_own_optimiser(here, argv, own):
    config = train.parse(["--out", "r", *argv])[0]
    assert (config["optimiser"], config["lr"]) == own


def test_micro_batches_and_seed(here):
    call(train.train, *TINY, "--out", "one")
    call(train.train, *TINY, "--out", "four", "--accum", "4")
    call(train.train, *TINY, "--out", "other", "--seed", "1")
    assert losses("four") == pytest.approx(losses("one"), rel=1e-5)
    assert losses("other") != pytest.approx(losses("one"), rel=1e-3)


def test_the_best_checkpoint_is_kept(here, monkeypatch):
    """Scores come at their steps, and ckpt.best.pt is the checkpoint of the least distance."""
    monkeypatch.setattr(train.scores, "Scorer", lambda *args: lambda *args: {"frechet": next(distances)})
    distances = iter([3.0, 1.0, 2.0])
    call(train.train, *TINY, "--score-every", "2", "--out", "r")
    scored = {e["step"]: e["frechet"] for e in runs.history(Path("r")) if "frechet" in e}
    assert scored == {2: 3.0, 4: 1.0, 6: 2.0} and runs.load_checkpoint("r/ckpt.best.pt")["step"] == 4
    call(sample.sample, "r/ckpt.best.pt", "--n", "2")


def test_label_drop_rate():
    """A tenth of the labels become the null label, and only in training."""
    seen = []
    model = torch.nn.Linear(1, 1)
    model.forward = lambda x, t, y: seen.append(y) or x
    objective = objectives.Diffusion(model, diffusion.RectifiedFlow(), (3, 4, 4), num_classes=5)
    y = torch.arange(20_000) % 5
    objective.loss({"x": torch.zeros(20_000, 3, 4, 4), "y": y, "noise": objectives.StepNoise(0, 0, 20_000)})
    assert (seen[0] == 5).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(seen[0][seen[0] != 5], y[seen[0] != 5])
    assert torch.equal(objective.conditions(7), torch.tensor([0, 1, 2, 3, 4, 0, 1]))


def test_a_loss_that_is_not_finite_stops_the_run(here, capsys):
    argv = [*TINY, "--out", "r", "--lr", "1e30", "--warmup", "0", "--decay", "constant", "--save-every", "1"]
    message = refused(capsys, train.train, *argv)
    assert "at step" in message and "last good checkpoint is r/ckpt.pt" in message
    step, state = weights("r")
    assert f"at step {step + 1}" in message
    assert all(v.isfinite().all() for v in runs.load_checkpoint("r/ckpt.pt")["model"].values())


def test_out_of_memory_names_the_flags(here, capsys, monkeypatch):
    def full(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(objectives.Diffusion, "forward", full)
    assert "--batch" in (message := refused(capsys, train.train, *TINY)) and "--accum" in message


def test_averaged_weights_converge_in_single_precision(here):
    call(train.train, *TINY, "--out", "r", "--ema", "0")
    state = runs.load_checkpoint("r/ckpt.pt")
    assert all(torch.equal(v, state["ema"][k]) for k, v in state["model"].items()), "decay 0 is the model itself"
    assert all(v.dtype == torch.float32 for v in state["ema"].values())


# ----------------------------------------------------------------------------------------------------- whole processes


def start(argv, **env):
    """train.py as a process of its own, which listens to Ctrl-C even where these tests run in a shell's background."""
    return subprocess.Popen([sys.executable, ROOT / "train.py", *argv], env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def lines(folder):
    path = Path(folder) / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def crash_test(kills, steps, patience=300):
    """Kill -9 a run `kills` times, a random number of steps after each start; it must end as the unbroken one."""
    long = [*TINY, "--steps", str(steps), "--save-every", "1", "--data-dir", "nowhere"]
    process = start([*long, "--out", "whole"])
    assert process.wait(patience) == 0, process.stdout.read()
    chance, hits = random.Random(0), 0
    process = start([*long, "--out", "killed"])
    for _ in range(kills):
        goal = lines("killed") + chance.randrange(2, max(3, steps // (kills + 1)))
        while lines("killed") < goal and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)                  # a checkpoint is written at every step: some kills hit one
        hits += process.poll() is None
        process.kill()
        process.wait()
        runs.load_checkpoint("killed/ckpt.pt")              # there is always a whole one
        process = start([*long, "--out", "killed"])         # the same command again goes on
    assert process.wait(patience) == 0, process.stdout.read()
    assert hits >= kills - 1, "the kills came while it ran"
    assert weights("killed") == weights("whole") and losses("killed") == losses("whole")


def test_killed_at_random_moments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    crash_test(kills=3, steps=120)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    crash_test(kills=20, steps=600)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    process = start([*TINY, "--steps", "100000", "--out", "r"])
    while lines("r") < 5:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(60) == 0
    step = weights("r")[0]
    assert f"saved at step {step:,}" in process.stdout.read() and step == lines("r")


def test_two_processes_are_one(tmp_path, monkeypatch):
    """torchrun with 2 processes (gloo) and the same global batch: the same loss curve."""
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--data-dir", "nowhere", "--accum", "2"]
    process = start([*argv, "--out", "one"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                ROOT / "train.py", *argv, "--out", "two"]
    done = subprocess.run(torchrun, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=120)
    assert process.wait(240) == 0 and done.returncode == 0, done.stderr
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
    one, two = (runs.load_checkpoint(f"{name}/ckpt.pt")["model"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-5)


def test_one_writer(here, capsys):
    call(train.train, *TINY, "--out", "r")
    held = runs.lock(Path("r"))
    message = refused(capsys, train.train, *TINY, "--out", "r", "--resume")
    assert f"another process ({os.getpid()}) is writing" in message
    held.close()


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("argv, message", [
    (["--model", "dit-s2"], "unknown --model 'dit-s2': did you mean .*dit-s/2"),
    (["--data", "cifar"], "unknown --data 'cifar': did you mean cifar10"),
    (["--draw", "sampler=dimm"], "unknown --sampler 'dimm': did you mean ddim"),
    (["--draw", "sampler=ddim:etta=1"], "has no option 'etta': did you mean eta"),
    (["--draw", "grid=leading"], "count the steps of a chain"),
    (["--process", "linear", "--draw", "steps=5000"], "5000 sampling steps out of a chain of 1000"),
    (["--draw", "stepss=5"], "draws without an option 'stepss': did you mean steps"),
    (["--process", "sine"], "unknown --process 'sine'"),
    (["--steps", "0"], "argument --steps: '0' is not a whole number of at least 1"),
    (["--batch", "-4"], "argument --batch: '-4' is not a whole number"),
    (["--ema", "nan"], "argument --ema: 'nan' is not a number"),
    (["--optimiser", "adamw:betas=(0.9,)"], "adamw:betas=.* cannot be built"),
    (["--optimiser", "adam"], "unknown --optimiser 'adam': did you mean adamw"),
    (["--data", "shapes:size=10"], "10x10 is not divisible by the patch size 4: try 8x8"),
    (["--data", "shapes:size=0"], "size is 0, and must lie between 1 and"),
    (["--accum", "3"], "--batch 8 does not divide into 1 processes x 3 micro-batches"),
    (["--model", "dit-nano:layers=3"], "dit-nano has no option 'layers'"),
    (["--model", "dit-nano:depth=1.5"], "depth is 1.5, and must be a whole number"),
    (["--model", "dit-nano:hidden_size=-1"], "hidden_size is -1, and must lie between 1 and"),
    (["--model", "dit-nano:num_heads=3"], "width 128 does not divide into 3 heads"),
    (["--model", "dit-nano:hidden_size=65536,depth=1000"], "M parameters takes"),
    (["--model", "dit-nano:image_size=8"], "image_size: that is chosen by --data NAME:size="),
    (["--model", "dimr-nano:patch_sizes=()"], "patch_sizes is empty"),
    (["--model", "dit-nano:depth"], "dit-nano:depth"),
    (["--data", "folder", "--data-dir", "nowhere"], "nowhere"),
    (["--data", "cifar10:download=False", "--data-dir", "nowhere"], "cifar-10"),
    (["--device", "cuda:7"], "--device cuda:7: this machine"),
    (["--device", "meta"], "--device meta: this machine"),
    (["--out", "r", "--resume"], "there is no checkpoint r/ckpt.pt"),
    (["--process", "flow:learned_variance=True"], "flow has no option 'learned_variance'"),
    (["--process", "linear", "--prediction", "noise"], "unknown --prediction 'noise'"),
    (["--process", "zero-snr", "--prediction", "eps"], "this chain ends in pure noise"),
    (["--weighting", "minsnr"], "unknown --weighting 'minsnr': did you mean min-snr"),
    (["--process", "flow:shift=-1"], "shift"),
    (["@recipes/none.txt"], "none.txt"),
    (["--start-from", "nowhere"], "nowhere holds no run"),
    (["--distill", "r:share=1"], "--distill has no option 'share': did you mean shares"),
])
def test_mistakes_in_flags(here, capsys, argv, message):
    line = refused(capsys, train.train, *TINY, *argv)
    assert pytest.importorskip("re").search(message, line), line
    assert not list(Path(".").glob("runs/*/config.json")), "nothing is left behind"


def test_mistakes_with_runs(here, capsys):
    call(train.train, *TINY, "--out", "r", "--save-every", "3")
    before = weights("r")
    call(train.train, *TINY, "--out", "r")
    assert weights("r") == before, "the same command again finds nothing left to do"
    for argv, message in ((["--batch", "4"], "batch was 8 and is now 4"),
                          (["--model", "dit-nano:depth=2"], "model was"),
                          (["--data", "shapes:size=16"], "data was")):
        assert message in refused(capsys, train.train, *TINY, "--out", "r", *argv)
        assert message in refused(capsys, train.train, "--out", "r", "--resume", *argv)
    message = refused(capsys, train.train, *TINY, "--out", "r", "--overwrite", "--draw", "grid=leading")
    assert "count the steps" in message and weights("r") == before, "a refusal leaves the old run"
    assert "nowhere holds no run" in refused(capsys, sample.sample, "nowhere")
    assert "unknown class 'moon'" in refused(capsys, sample.sample, "r", "--classes", "moon")
    assert "must end in .gif" in refused(capsys, sample.sample, "r", "--film", "f.mp4")
    assert "name the folder of a run" in refused(capsys, sample.sample)
    Path("other").mkdir()
    Path("other/letter.txt").write_text("dear")
    assert "is in use and holds no run" in refused(capsys, train.train, *TINY, "--out", "other", "--overwrite")
    assert "it holds letter.txt" in refused(capsys, sample.sample, "r", "--out", "other")
    call(train.train, *TINY, "--out", "r", "--overwrite", "--steps", "5")
    assert weights("r")[0] == 5
    call(train.train, *TINY, "--out", "r", "--overwrite")

    whole = Path("r/ckpt.pt").read_bytes()
    runs.link(Path("r/ckpt.pt"), Path("r/ckpt.prev.pt"))
    Path("r/ckpt.pt").unlink()
    for damaged in (whole[:len(whole) // 2], b"hello", flipped(whole)):
        Path("r/ckpt.pt").write_bytes(damaged)
        message = refused(capsys, train.train, "--out", "r", "--resume")
        assert "r/ckpt.pt is damaged" in message and "--resume r/ckpt.prev.pt" in message
        assert "r/ckpt.pt is damaged" in refused(capsys, sample.sample, "r")
    call(train.train, "--out", "r", "--resume", "r/ckpt.prev.pt", "--steps", "7")
    assert json.load(open("r/config.json"))["steps"] == 7
    assert weights("r")[0] == 7

    state = runs.load_checkpoint("r/ckpt.pt")
    state["config"]["network"] = "dit-nano:depth=2,hidden_size=32,num_heads=2"
    torch.save(state, "r/ckpt.pt")
    assert "weights of another model" in refused(capsys, sample.sample, "r")


def flipped(raw):
    raw = bytearray(raw)
    raw[len(raw) // 2] ^= 4
    return bytes(raw)


def test_no_flipped_bit_is_loaded(here):
    """torch.load alone accepts nearly all of them."""
    call(train.train, *TINY, "--out", "r")
    whole, path, chance = Path("r/ckpt.pt").read_bytes(), Path("r/damaged.pt"), random.Random(0)
    state, silent = runs.load_checkpoint("r/ckpt.pt"), 0
    for _ in range(100):
        raw = bytearray(whole)
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        path.write_bytes(raw)
        try:
            other = runs.load_checkpoint(path)
            silent += any(not torch.equal(v, other["model"][k]) or not torch.equal(state["ema"][k], other["ema"][k])
                          for k, v in state["model"].items())
        except ValueError:
            pass
    assert silent == 0


def test_a_failed_write_leaves_the_old_file(here, monkeypatch):
    runs.save_checkpoint(Path("."), {"step": 1})

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("unexpected pos 704 vs 662")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write ckpt.pt .* what was there before is untouched"):
        runs.save_checkpoint(Path("."), {"step": 2})
    assert torch.load("ckpt.pt", weights_only=True) == {"step": 1} and not list(Path(".").glob("*.tmp"))


# --------------------------------------------------------------------------------------------- sampling and evaluation


@pytest.fixture
def run(here):
    call(train.train, *TINY, "--out", "r", "--lr", "1e-2")
    return here


def test_the_seed_makes_the_image_not_the_batch(run):
    for batch in (1, 3, 64):
        call(sample.sample, "r", "--n", "7", "--batch", batch, "--sampler", "ddpm", "--out", f"{batch}.npz")
    one, three, all_ = (np.load(f"{b}.npz") for b in (1, 3, 64))
    assert all_["arr_0"].shape == (7, 8, 8, 3) and all_["arr_0"].dtype == np.uint8
    assert list(all_["arr_1"]) == list(range(7))
    for other in (one, three):
        assert abs(other["arr_0"].astype(int) - all_["arr_0"]).max() <= 1
    call(sample.sample, "r", "--n", "7", "--sampler", "ddpm", "--seed", "1", "--out", "seed.npz")
    assert abs(np.load("seed.npz")["arr_0"].astype(int) - all_["arr_0"]).mean() > 5


def test_what_sample_writes(run, capsys):
    call(sample.sample, "r", "--n", "6", "--classes", "star,0", "--guidance", "3", "--film", "f.gif")
    assert Image.open("r/sample.png").size[0] > 64
    film = Image.open("f.gif")
    assert film.n_frames == 2, "two steps"
    call(sample.sample, "r", "--n", "3", "--out", "many")
    assert [p.name for p in sorted(Path("many").iterdir())] == ["000000.png", "000001.png", "000002.png"]
    assert Image.open("many/000000.png").size == (8, 8)
    assert "ends in .png or .npz" in refused(capsys, sample.sample, "r", "--out", "x.jpg")


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_every_sampler_draws(run, sampler):
    x = torch.cat(list(build.open_run("r").images(4, sampler=sampler, steps=6)))
    assert x.shape == (4, 3, 8, 8) and x.isfinite().all()


@pytest.mark.parametrize("rule", guidance.RULES)
def test_every_guidance_rule_draws(run, rule):
    argv = ["--guidance", "3", "--guidance-rule", rule, "--interval", "0.1,0.9", "--grid", "karras:rho=5"]
    call(sample.sample, "r", "--n", "4", *argv)
    assert Image.open("r/sample.png").size[0] > 64


def test_experts(here, capsys):
    """Training logs their balance; upcycling starts from one expert; the analysis counts and draws."""
    small = [*TINY[2:], "--data", "shapes:size=16"]
    call(train.train, *small, "--model", "dit-moe-nano:depth=2,hidden_size=24,num_heads=2,num_experts=1,top_k=1",
         "--out", "dense")
    call(train.train, *small, "--model", "dit-moe-nano:depth=2,hidden_size=24,num_heads=2,balance=0.5", "--upcycle",
         "dense", "--out", "moe")
    entry = runs.history(Path("moe"))[0]
    assert entry["loss"] > 0.5 * 2 * entry["balance"] > 0.99 and entry["load_cv"] > 0
    first = runs.load_checkpoint("dense/ckpt.pt")["ema"]["model.blocks.0.mlp.gate"]
    moved = runs.load_checkpoint("moe/ckpt.pt")["ema"]["model.blocks.0.mlp.gate"]
    assert moved.shape[0] == 8 and (moved - first).norm() < 0.5 * first.norm() * 8**0.5
    call(evaluate.evaluate, "experts", "moe", "--n", "2")
    assert "position" in capsys.readouterr().out
    result = json.load(open("moe/experts.json"))
    assert np.array(result["counts"]["step"]).sum((1, 2)).tolist() == [2 * len(data.SHAPES) * 2 * 16 * 2] * 2
    assert Image.open("moe/experts-position.png").size[0] > 300
    tiny = "dit-nano:depth=1,hidden_size=32,num_heads=2"
    for argv, message in ((["--model", f"{tiny},moe=(4,2),ternary=True"], "leave out one of the two"),
                          (["--model", f"{tiny},moe=(4,)"], "two numbers"),
                          (["--model", "unet-pico:moe=(4,2)"], "UNet has 0"),
                          (["--model", "dit-moe-nano", "--upcycle", "dit"], "cannot be upcycled")):
        call(train.train, *TINY, "--out", "dit")
        assert message in refused(capsys, train.train, *TINY, *argv, "--out", "u")
    assert "no experts" in refused(capsys, evaluate.evaluate, "experts", "dit")


def test_packed_weights_draw_the_same_images(here, capsys):
    call(train.train, *TINY, "--model", "dit-nano:depth=1,hidden_size=32,num_heads=2,ternary=True", "--out", "r")
    call(evaluate.evaluate, "pack", "r", "--n", "4", "--rounds", "1")
    assert "packed" in capsys.readouterr().out
    assert Path("r/packed.pt").stat().st_size < 0.5 * Path("r/ckpt.pt").stat().st_size
    for file in ("r", "r/packed.pt"):
        call(sample.sample, file, "--n", "4", "--out", Path(file).stem + ".npz")
    assert np.array_equal(np.load("r.npz")["arr_0"], np.load("packed.npz")["arr_0"])
    assert "no ternary weights to pack" in refused(capsys, evaluate.evaluate, "pack", "r/packed.pt")


def test_stitched_runs(run, capsys):
    call(train.train, *TINY, "--model", "dit-nano:depth=2,hidden_size=32,num_heads=2", "--out", "large")
    call(sample.sample, "r", "large", "--stitch", "0.5", "--n", "4", "--out", "x.npz")
    call(sample.sample, "r", "large", "r", "--stitch", "0.5,0.25,0.25", "--stitch-rule", "time", "--n", "4")
    assert np.load("x.npz")["arr_0"].shape == (4, 8, 8, 3)
    call(evaluate.evaluate, "stitch", "r", "large", "--n", "8", "--fractions", "0,0.5,1", "--seeds", "1,2",
         "--classifier-steps", "2")
    said, rows = capsys.readouterr().out, json.load(open("large/stitch.json"))
    assert "class accuracy" in said and [row["fraction"] for row in rows] == [0, 0.5, 1]
    assert rows[0]["macs"] > rows[1]["macs"] > rows[2]["macs"] and Image.open("large/stitch.png").size == (800, 460)
    assert "--stitch 0.4" in refused(capsys, sample.sample, "r", "large")
    assert "sum to 1" in refused(capsys, sample.sample, "r", "large", "--stitch", "0.4,0.4")
    assert "leave out --weak" in refused(capsys, sample.sample, "r", "large", "--stitch", "0.4", "--weak", "r")
    call(train.train, *TINY, "--out", "x0", "--prediction", "x0")
    assert "same prediction" in refused(capsys, sample.sample, "r", "x0", "--stitch", "0.4")


def test_official_dit_without_a_decoder(here, capsys):
    from models import DiT
    torch.save(DiT(8, 2, 4, 64, 1, 1, num_classes=7, learn_sigma=True).state_dict(), "dit.pt")
    call(sample.sample, "--official", "dit", "--checkpoint", "dit.pt", "--n", "2", "--classes", "3",
         "--steps", "4", "--out", "o.png")
    said = capsys.readouterr().out
    assert "false colour" in said and np.load("o.latents.npz")["arr_0"].shape == (2, 4, 8, 8)
    assert Image.open("o.png").mode == "RGB"
    assert "--checkpoint" in refused(capsys, sample.sample, "--official", "dit")


def test_score_and_speed(run, capsys):
    call(evaluate.evaluate, "score", "r", "--n", "16", "--classifier-steps", "3")
    said = capsys.readouterr().out
    assert "class accuracy" in said and "not the FID" in said
    result = json.load(open("r/score.json"))
    assert 0 <= result["class_accuracy"] <= 1 and result["frechet_classifier"] > result["frechet_classifier_real"] >= 0
    clock = time.perf_counter()
    call(evaluate.evaluate, "score", "r", "--n", "16", "--classifier-steps", "3")
    assert "training a classifier" not in capsys.readouterr().err and time.perf_counter() - clock < 20
    call(evaluate.evaluate, "samplers", "r", "--n", "8", "--counts", "2,4", "--samplers", "ddim,heun")
    assert "heun" in capsys.readouterr().out and Image.open("r/samplers.png").size == (800, 460)
    call(evaluate.evaluate, "likelihood", "r", "--n", "4", "--tolerance", "0.1")
    bits = float(capsys.readouterr().out.split()[0])
    assert 3 < bits < 30
    call(sample.sample, "r", "--n", "4", "--weak", "r", "--guidance", "2", "--threshold", "0.9", "--guidance-rule",
         "apg")
    call(evaluate.evaluate, "speed", "dit-nano", "--batch", "2", "--rounds", "1")
    assert "dit-nano" in (said := capsys.readouterr().out) and "0.083" in said
    assert "did you mean" in refused(capsys, evaluate.evaluate, "speed", "dit-nan")
    call(evaluate.evaluate, "speed", "dico-nano", "dit-nano:patch_size=2", "--image-size", "16", "--fair",
         "--batch", "2", "--rounds", "1", "--channels-last")
    said = capsys.readouterr().out
    share = float(said.split("times the MACs")[0].split()[-1])
    assert "dit-nano:patch_size=2,hidden_size=" in said and 0.95 < share < 1.05 and "training" in said


def test_a_run_as_judge(run, capsys):
    """A ResNet's run judges in place of a classifier trained on the spot: its own features, its own classes."""
    call(train.train, "--model", "resnet-nano:widths=(8,16),blocks=(1,1)", *TINY[2:], "--out", "judge")
    call(evaluate.evaluate, "score", "r", "--n", "16", "--judge", "judge")
    said = capsys.readouterr().out
    assert "16 features of judge" in said and "class accuracy" in said
    judge, x = scores.ResNetJudge(build.open_run("judge"), data.SHAPES), torch.rand(4, 3, 8, 8) * 2 - 1
    logits = build.open_run("judge").objective.model(x)
    assert torch.equal(judge.read([x])[1], logits.argmax(1))
    torch.testing.assert_close(judge.logits(judge.of_images(x)), logits)
    assert "no run of a ResNet" in refused(capsys, evaluate.evaluate, "score", "r", "--n", "4", "--judge", "r")
    with pytest.raises(ValueError, match="knows other classes"):
        scores.ResNetJudge(build.open_run("judge"), ["cat", "dog"])


def test_runs_beside_each_other(here, capsys):
    """Two logs as one picture; the bins of the noise level hold the run's loss and one number a bin, wherever samples
    fell; a folder without a log is refused."""
    call(train.train, *TINY, "--out", "a", "--log-every", "3")
    call(train.train, *TINY, "--out", "b", "--prediction", "flow", "--accum", "2", "--log-every", "3")
    for folder in ("a", "b"):
        for entry in runs.history(Path(folder)):
            assert len(entry["loss_by_noise"]) == len(entry["error_by_noise"]) == 10
            there = [value for value in entry["loss_by_noise"] if value is not None]
            assert min(there) <= entry["loss"] <= max(there)
    capsys.readouterr()
    call(evaluate.evaluate, "curves", "a", "b", "--out", "c.png")
    said = capsys.readouterr().out
    assert "c.png" in said and Image.open("c.png").size == (1600, 920)
    assert "name folders of runs" in refused(capsys, evaluate.evaluate, "curves", ".")


def test_list_and_help_and_recipes(here, capsys):
    for argv, words in ((["--list", "dit-xl"], ["dit-xl/2", "118.6"]),
                        (["--list"], ["imagenet64", "heun", "min-snr", "distill"]),
                        (["--help"], ["--model", "torchrun", "default: flow", "--draw"]),
                        (["--help", "all"], ["--label-drop", "--inherit"]),
                        (["--help", "edm"], ["processes", "samplers", "s_churn"]),
                        (["--help", "dit-nano"], ["hidden_size=128", "moe=", "adaLN-Zero"])):
        with pytest.raises(SystemExit):
            call(train.train, *argv)
        said = capsys.readouterr().out
        assert all(word in said for word in words), argv
    for recipe in (ROOT / "recipes").glob("*.txt"):
        args = train.flags().parse_args([f"@{recipe}"])
        build.own_optimiser(vars(args))
        build.check_settings(vars(args))
    Path("flags.txt").write_text("\ufeff--steps 9   # nine\n\n# only a comment\n--model dit-nano:depth=1\n")
    call(train.train, *TINY, "@flags.txt", "--dry-run", "--batch", "4")
    config = json.loads(capsys.readouterr().out)
    assert (config["steps"], config["batch"], config["model"]) == (9, 4, "dit-nano:depth=1")
    assert not Path("runs").exists()


def test_curves_and_grids_are_drawn():
    series = {"a": ([0, 1, 2], [1.0, 0.5, float("nan")]), "_b": ([0, 2], [2.0, 3.0])}
    picture = figures.curves(series, "title", "x", "y")
    assert picture.size == (800, 460) and len(picture.getcolors(2**24)) > 20
    assert figures.log_ticks(0.03, 1.7) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    x = torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 0.0, 1.0)])
    assert figures.to_uint8(x)[:, 0, 0, 0].tolist() == [0, 128, 255]
    assert figures.grid(figures.to_uint8(x), columns=3).size == (3 * 66 + 2, 66 + 2)


# ------------------------------------------------------------------------------------------- text, second stages, LiT

DIMBA = ["--model", "dimba-nano:depth=2,hidden_size=32,num_heads=2,text_width=16", *TINY[2:]]


def test_a_run_with_text(here, capsys):
    learn = ["--lr", "3e-2", "--warmup", "1", "--decay", "constant", "--subset", "red|blue"]
    call(train.train, *DIMBA, *learn, "--out", "t", "--save-every", "3")
    call(train.train, *DIMBA, *learn, "--out", "u", "--accum", "2")
    assert losses("t") == pytest.approx(losses("u"), rel=1e-4)
    os.replace("t/ckpt.prev.pt", "t/ckpt.pt")
    call(train.train, "--out", "t", "--resume")
    config = json.load(open("t/config.json"))
    assert len(config["prompts"]) == 8 and all("red" in p or "blue" in p for p in config["prompts"])
    for prompt in ("a large red ring on black", "a small blue star on white"):
        call(sample.sample, "t", "--n", "3", "--prompt", prompt, "--out", f"{prompt[2]}.npz")
    assert (np.load("l.npz")["arr_0"] != np.load("s.npz")["arr_0"]).any(), "the prompt matters"
    assert "reads at most" in refused(capsys, sample.sample, "t", "--prompt", "x" * 99)
    call(evaluate.evaluate, "prompts", "t", "--n", "8", "--classifier-steps", "2", "--subset", "red ring")
    said = capsys.readouterr().out
    assert "colour" in said and Image.open("t/prompts.png")
    assert "matches 'moon'" in refused(capsys, train.train, *DIMBA, "--out", "v", "--subset", "moon")
    call(train.train, *TINY, "--out", "labels")
    assert "reads no text" in refused(capsys, sample.sample, "labels", "--prompt", "a")
    assert "learned the captions" in refused(capsys, evaluate.evaluate, "prompts", "labels")


def test_captions_are_dropped_for_the_empty_one():
    class Reader(torch.nn.Module):
        text_width, text_length = 4, 9
        null_text = torch.full((9, 4), 7.0)

        def forward(self, x, t, y):
            seen.append(y)
            return x

    seen, noise = [], lambda: objectives.StepNoise(0, 0, 2000)
    objective = objectives.Diffusion(Reader(), diffusion.RectifiedFlow(), (3, 4, 4), encoder=torch.nn.Identity())
    y = data.byte_tokens(["red", "green ring"] * 1000, 9).long()
    objective.loss({"x": torch.zeros(2000, 3, 4, 4), "y": y, "noise": noise()})
    dropped = (seen[0][:, 1:] == 0).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02) and torch.equal(seen[0][~dropped], y[~dropped])
    assert torch.equal(seen[0][dropped][:1], torch.tensor([[data.START, *[0] * 8]]))
    text = data.Text(torch.zeros(2000, 3, 4), torch.ones(2000, 3, dtype=torch.bool))
    objective.loss({"x": torch.zeros(2000, 3, 4, 4), "y": text, "noise": noise()})
    assert torch.equal((seen[1].tokens == 7).all(2).all(1), dropped)


def test_precomputed_text(here, capsys):
    chance = np.random.default_rng(0)
    Path("photos").mkdir()
    for k in range(12):
        Image.fromarray(chance.integers(0, 255, (8, 8, 3), np.uint8)).save(f"photos/{k}.png")
        np.savez(f"photos/{k}.npz", caption_feature=chance.standard_normal((1, 4, 20)).astype(np.float16),
                 attention_mask=np.arange(4)[None] < 1 + k % 4)
    argv = [*TINY, "--model", "dimba-nano:depth=2,hidden_size=32,num_heads=2", "--data", "folder:size=8", "--data-dir",
            "photos", "--text", "npz"]
    call(train.train, *argv, "--out", "n")
    assert "text_width=20" in json.load(open("n/config.json"))["network"]
    call(train.train, *argv, "--out", "n", "--steps", "7")
    assert weights("n")[0] == 7, "the same command goes on"
    call(sample.sample, "n", "--n", "2", "--prompt", "photos/3.npz")
    assert "by --prompt FILE.npz" in refused(capsys, sample.sample, "n")
    np.savez("photos/3.npz", other=np.zeros(3))
    assert "photos/3.npz cannot be used" in refused(capsys, sample.sample, "n", "--prompt", "photos/3.npz")
    Path("photos/5.npz").unlink()
    assert "1 of" in refused(capsys, train.train, *argv, "--out", "m")


@pytest.mark.parametrize("model", ["dimba-nano:depth=2,hidden_size=32,num_heads=2,text_width=16",
                                   "drwkv-nano:depth=3,hidden_size=32", "dit-nano:depth=1,hidden_size=32,num_heads=2"])
def test_resolution_adaption(here, model):
    argv = [*TINY, "--model", model]
    call(train.train, *argv, "--out", "low")
    call(train.train, *argv, "--data", "shapes:size=16", "--start-from", "low", "--out", "high", "--lr", "1e-30")
    low, high = (runs.load_checkpoint(f"{name}/ckpt.pt") for name in ("low", "high"))
    for name, value in low["ema"].items():
        if "pos_embed" not in name:
            torch.testing.assert_close(high["model"][name], value)
        elif "drwkv" in model:
            assert high["model"][name].shape[1] == 4 * value.shape[1]
    assert build.split_name(high["config"]["network"])[1].get("pe_interpolation", 2.0) == 2.0


def test_inherit_and_distill(here, capsys):
    call(train.train, *TINY, "--out", "dit")
    lit = [*TINY, "--model", "lit-nano:depth=1,hidden_size=32,num_heads=2"]
    call(train.train, *lit, "--inherit", "dit", "--out", "lit", "--steps", "1", "--lr", "1e-30")
    mine, theirs = runs.load_checkpoint("lit/ckpt.pt")["model"], runs.load_checkpoint("dit/ckpt.pt")["ema"]
    fresh = {name.split(".attn.")[1].split(".")[0] for name in mine if name not in theirs or ".attn." in name}
    assert fresh == {"q", "kv", "proj", "dwc"}
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs if ".attn." not in name)
    call(train.train, *lit, "--out", "alone")
    call(train.train, *lit, "--distill", "dit:shares=(0,0)", "--out", "taught")
    assert losses("taught") == losses("alone") and weights("taught") == weights("alone")
    call(train.train, *TINY, "--start-from", "dit", "--distill", "dit", "--lr", "1e-30", "--out", "self")
    assert runs.history(Path("self"))[0]["distill"] < 1e-12, "nothing is to be learned from oneself"
    message = refused(capsys, train.train, *lit, "--distill", "dit", "--prediction", "eps", "--out", "x")
    assert "its prediction is 'own', here it is 'eps'" in message
    options = ["--process", "linear:learned_variance=True"]
    call(train.train, *TINY, *options, "--out", "hybrid")
    call(train.train, *lit, *options, "--distill", "hybrid:log_variance=True", "--out", "both")
    assert all(entry["distill_variance"] >= 0 for entry in runs.history(Path("both")))


def test_official_drwkv(here, capsys):
    from models import DRWKV
    torch.save(DRWKV(8, 2, 4, 32, 3, num_classes=7, learn_sigma=True).state_dict(), "rwkv.pt")
    call(sample.sample, "--official", "drwkv", "--checkpoint", "rwkv.pt", "--n", "2", "--steps", "2", "--out", "o.png")
    assert np.load("o.latents.npz")["arr_0"].shape == (2, 4, 8, 8)


@pytest.mark.parametrize("name", ["uvit-cond", "uvit-uncond", "dimr-2r", "dimr-3r"])
def test_official_uvit_and_dimr(here, name):
    case = golden.load(Path(__file__).parent / f"golden/{name}.npz")
    torch.save(case.state_dict, "published.pt")
    call(sample.sample, "--official", case.arch, "--checkpoint", "published.pt", "--n", "2", "--steps", "4",
         "--out", "o.png")
    assert Image.open("o.png").mode == "RGB" and Path("o.latents.npz").exists() == (name == "dimr-2r")


def test_mixers_are_timed(here, capsys):
    call(evaluate.evaluate, "speed", "--tokens", "256", "--width", "48", "--rounds", "1")
    assert "Bi-WKV" in capsys.readouterr().out and Image.open("mixers.png").size == (800, 460)
