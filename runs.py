"""A run's folder, runs/<name>/: what it holds, how it is written so that no crash can spoil it, how it is read back.

    config.json     every setting, enough to rebuild the model        ckpt.pt        the newest checkpoint
    metrics.jsonl   one line per log step                             ckpt.prev.pt   the one before
    loss.png        the curve                                         ckpt.best.pt   that of the best score, if scored
    samples/        step_0001000.png, ...

A checkpoint is {config, step, model, ema, optimiser}, plain types and tensors only. Nothing random is stored: data
order, noise and dropout are functions of (seed, step), so that a run killed at any moment goes on as if it had not
been.
"""

import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import torch

# Settings that may change when a run is resumed: they do not change what a step computes.
HARMLESS = {"steps", "log_every", "sample_every", "save_every", "sample_n", "device", "accum", "compile", "data_dir",
            "dry_run", "draw", "score_every", "score_n", "kernels", "remat", "shard"}
FILES = ("metrics.jsonl", "loss.png", "score.json", "ckpt.best.pt", "ckpt.prev.pt", "ckpt.pt", "config.json")


class Run(str):
    """The path of a run, as the type of an option or flag: build.py opens it and hands over what is in it."""


# ---------------------------------------------------------------------------------------------------- atomic writing


def write(path, save):
    """Call save(temporary path), flush it to disk and only then give it its name: `path` never holds half a file.
    Raises OSError with the space that is free and what was needed; what was there before is untouched."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        save(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:                      # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        before = f", the one before has {path.stat().st_size / 2**20:,.1f} MB" if path.exists() else ""
        raise OSError(f"cannot write {path} ({free:,.1f} MB free{before}): {error}; "
                      "what was there before is untouched") from None


def link(source, target):
    """Another name for a file, or a copy where the file system knows no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder, state):
    """Write ckpt.pt and keep the one it replaces as ckpt.prev.pt. There is a whole checkpoint at every moment."""
    newest, previous = folder / "ckpt.pt", folder / "ckpt.prev.pt"
    if newest.exists():
        write(previous, lambda path: link(newest, path))
    write(newest, lambda path: torch.save(state, path))


def load_tensors(path):
    """What a file of torch holds, on the CPU: plain types and tensors only, its checksums verified (torch alone would
    load flipped bits without a word). Raises ValueError that says what is wrong with the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"checksum of {bad} does not match")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                       # a damaged file makes torch raise nearly every type there is
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"{path} is damaged or of another kind ({reason})") from None


def load_checkpoint(path):
    """A checkpoint {config, step, model, ema, optimiser}. Raises FileNotFoundError, or ValueError that names the
    checkpoint before if this one is damaged."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state = load_tensors(path)
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict) or not state["config"]:
            raise ValueError(f"{path} is not a checkpoint of this project: it holds no settings")
        return {key: state[key] for key in ("config", "step", "model", "ema", "optimiser")}
    except (ValueError, KeyError) as error:
        message = str(error) if isinstance(error, ValueError) else f"{path} lacks {error}"
        previous = path.with_name("ckpt.prev.pt")
        if path.name == "ckpt.pt" and previous.exists():
            message += f"; the one before it is {previous}: train.py --resume {previous} goes on from there"
        raise ValueError(message) from None


# ----------------------------------------------------------------------------------------------------------- run folder


def holds_run(folder):
    """Whether the folder holds a run, which may have been killed before its first checkpoint; FileExistsError if it
    holds something else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: choose another folder by --out")
    inside = [entry.name for entry in folder.iterdir() if entry.name != ".lock" and not entry.name.endswith(".tmp")]
    if inside and "config.json" not in inside and "ckpt.pt" not in inside:
        raise FileExistsError(f"{folder} is in use and holds no run: choose another folder by --out")
    return bool(inside)


def start(folder, config, resume=False):
    """Write a run's config into its (locked) folder. Unless it resumes, an old run's files, and only those, go; its
    config.json last, so that a kill on the way leaves what can be started again."""
    if not resume:
        for name in ("samples", "ckpt.parts", "ckpt.parts.prev"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    for leftover in folder.rglob("*.tmp"):                        # what a killed process left half-written
        leftover.unlink()
    write(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def lock(folder):
    """Hold the folder for this process; a second one is refused. The system lets go when the process ends, however."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error.strerror}): choose another folder by --out") from None
    try:
        import fcntl
    except ImportError:                                           # Windows: no lock
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise ValueError(f"another process ({file.read().strip() or 'of unknown number'}) is writing to {folder}: "
                         "wait for it, or choose another folder by --out") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def changed(old, new):
    """The first setting that differs between two configs and changes what a step computes: (name, old, new) or None."""
    for key in old | new:
        if key == "data_checksum" and None in (old.get(key), new.get(key)):      # an older version took none
            continue
        if key not in HARMLESS and old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None


def check_resumable(folder, old, new):
    """Refuse to go on with settings that change what a step computes."""
    if difference := changed(old, new):
        key, before, now = difference
        raise ValueError(f"{folder} holds a run whose {key} was {before!r} and is now {now!r}: leave it as it was to "
                         "go on with it, start a new run by --out, or replace it by --overwrite")


def log(folder, entry):
    """Append one line to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def history(folder, until=None):
    """The entries of metrics.jsonl; with `until`, those of later steps and a torn last line leave the file."""
    path, entries = Path(folder) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if until is not None and path.exists():
        entries = [e for e in entries if e["step"] <= until]
        write(path, lambda p: p.write_text("".join(json.dumps(e) + "\n" for e in entries)))
    return entries


class Stop:
    """True once SIGINT (Ctrl-C), SIGTERM or SIGHUP (a closed terminal) has come: the loop finishes its step, saves,
    leaves. A second signal ends at once."""

    def __init__(self):
        self.asked = False
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)                  # Windows has no SIGHUP; nohup ignores it
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.asked:
            os._exit(128 + number)
        self.asked = True

    def __bool__(self):
        return self.asked
