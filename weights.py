"""Files of weights, whoever wrote them: every layout that published checkpoints come in, read safely, and written.

    open_weights(path) -> Weights(path, state, facts, aside)        a file, or a folder of config.json and weights

What is read: torch's own files (checksums verified; tensors, plain types and argparse.Namespace, nothing is executed),
older torch files without an archive (which hold no checksums), safetensors, shards with an index, consolidated.00-of-01
files beside their model_args.pth. Around the weights may be "ema", "model", "module" or "state_dict", and before every
name "module.", "model." or "_orig_mod.".
"""

import argparse
import json
import math
import re
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

# What a training file calls its weights, the averaged ones first.
INSIDE = ("ema", "model_ema", "ema_state_dict", "model", "module", "state_dict", "model_state_dict")
PREFIXES = ("module.", "model.", "_orig_mod.")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
FORMAT = "diffusion-atlas"                           # in a config.json: weights of a run of ours, under our own names
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


class Weights(NamedTuple):
    """What a file holds: state, name -> tensor; facts, the settings beside it (of config.json, of `args`); aside, the
    names of what stands among the weights and is no tensor."""
    path: Path
    state: dict
    facts: dict
    aside: list


def open_weights(path):
    """A file or folder of weights as `Weights`. Raises FileNotFoundError, ValueError with what is wrong."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        content, facts = read_folder(path)
    elif path.is_file():
        content, facts = read_file(path), beside(path)
    else:
        raise ValueError(f"{path} is neither a file nor a folder")
    state, facts, aside = unwrapped(content, facts, path)
    return Weights(path, state, facts, aside)


def read_weights(path):
    """name -> tensor, as `open_weights`."""
    return open_weights(path).state


def unwrapped(content, facts, path):
    """(weights, facts, names that stand among the weights and are no tensors) of what a file holds."""
    while isinstance(content, dict):
        facts = plain(content.get("args")) | plain(content.get("config")) | facts
        key = next((key for key in INSIDE if isinstance(content.get(key), dict) and content[key]), None)
        if key is None:
            break
        content = content[key]
    tensors = {name: v for name, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, dict) \
        else {}
    if not tensors:
        raise ValueError(f"{path} holds no dictionary of tensors")
    aside = [str(name) for name in content if name not in tensors]
    while prefix := next((p for p in PREFIXES if all(str(name).startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): v for name, v in tensors.items()}
    return tensors, facts, aside


def plain(settings):
    """The settings that a Namespace or a dictionary holds, without those that are no numbers, words or lists."""
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    if not isinstance(settings, dict):
        return {}
    return {str(key): v for key, v in settings.items() if v is None or isinstance(v, (int, float, str, list, tuple))}


# ---------------------------------------------------------------------------------------------------------------- files


def read_file(path):
    """What a single file holds."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def read_torch(path):
    """What a file of torch holds, on the CPU. The checksums of its archive are verified: torch alone would load flipped
    bits without a word."""
    with open(path, "rb") as file:
        archive = file.read(2) == b"PK"
    if archive:
        verify(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:                       # a damaged or hostile file makes torch raise nearly every type
        if found := re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error)):
            raise ValueError(f"{path} holds a {found[1]}: of a file only tensors, plain types and argparse.Namespace "
                             "are read, and nothing in it is executed; save its weights by themselves") from None
        reason = re.sub(r"\x1b\[\d*m", "", (str(error).splitlines() or [type(error).__name__])[0])
        reason = "" if reason.startswith("Weights only load failed") else f" ({reason[:100]})"
        raise ValueError(f"{path} is not a file of weights that can be read{reason}: it is damaged, cut short or of "
                         "another kind") from None


def verify(path):
    """ValueError if a checksum of an archive does not match."""
    try:
        with zipfile.ZipFile(path) as archive, tqdm(total=path.stat().st_size, desc=f"checking {path.name}", unit="B",
                                                    unit_scale=True, delay=2, leave=False) as bar:
            for name in archive.namelist():
                with archive.open(name) as part:
                    while block := part.read(2**22):
                        bar.update(len(block))
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch or copy it again") from None


def read_safetensors(path):
    """The safetensors format: 8 bytes of header length, a JSON header {name: dtype, shape, data_offsets}, the raw
    numbers, which lie side by side without gaps. It has no checksums."""
    raw = np.memmap(path, np.uint8, "c") if path.stat().st_size else np.empty(0, np.uint8)
    try:
        length = struct.unpack("<Q", raw[:8].tobytes())[0]
        if length > min(100_000_000, len(raw) - 8):
            raise ValueError(f"header of {length} bytes in a file of {len(raw)}")
        header, body = json.loads(raw[8:8 + length].tobytes()), raw[8 + length:]
        if not isinstance(header, dict):
            raise ValueError("its header is no list of tensors")
        header.pop("__metadata__", None)
        spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
        for (begin, end), (after, _) in zip([(0, 0), *spans], [*spans, (len(body), None)]):
            if end != after:
                raise ValueError(f"bytes {begin} to {end} of one tensor and {after} of the next "
                                 f"{'overlap' if end > after else 'leave a gap'}")
        return {name: tensor_of(name, entry, body) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error) as error:
        reason = str(error) if isinstance(error, ValueError) else f"damaged header ({type(error).__name__})"
        raise ValueError(f"{path} is not a whole safetensors file: {reason}") from None


def tensor_of(name, entry, body):
    """A tensor of a safetensors file from its header's entry and the raw numbers."""
    (begin, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
    if any(not isinstance(side, int) or side < 0 for side in shape) or \
            not 0 <= begin <= end <= len(body) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} claims bytes {begin} to {end} for shape {shape}")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(body[begin:end].copy(), dtype=dtype).view(shape)


def write_safetensors(path, state, notes=None):
    """Write name -> tensor as safetensors. notes: words by name, kept in the file's header."""
    names, header, place = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    if notes:
        header["__metadata__"] = notes
    for name, value in state.items():
        size = value.numel() * value.element_size()
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in state.values():
            file.write(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


# -------------------------------------------------------------------------------------------------------------- folders


def read_folder(folder):
    """(what its weights hold, facts) of a folder: shards with an index, one consolidated file, or a single file."""
    facts = {}
    for name in ("config.json", "model_args.pth"):
        if (folder / name).is_file():
            facts |= settings_of(folder / name)
    indices = sorted(p for p in folder.iterdir() if p.name.endswith((".safetensors.index.json", ".bin.index.json")))
    if indices:
        return read_shards(indices[0]), facts
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file()
                   and not re.search(r"model_args|optim|scheduler|random_states|training_args", p.name))
    parts = sorted(p for p in folder.iterdir() if p.is_dir() and p.name in ("transformer", "vae", "ema", "model"))
    if not files and len(parts) == 1:                # a pipeline's folder with one part of weights
        content, inside = read_folder(parts[0])
        return content, facts | inside
    averaged = [p for p in files if "ema" in p.stem.lower()]
    ternary = [p for p in averaged if "ternary" in p.stem.lower()]
    chosen = ternary or averaged or files
    if len(safe := [p for p in chosen if p.suffix == ".safetensors"]) == 1:
        chosen = safe                                # the same weights in both formats
    if not chosen:
        raise ValueError(f"{folder} holds no weights ({', '.join(SUFFIXES)})")
    for p in chosen:
        if (shard := re.search(r"(\d+)-of-(\d+)", p.name)) and int(shard[2]) > 1:
            raise ValueError(f"{p} is one of {int(shard[2])} shards of model parallelism, each with a slice of every "
                             "layer, and no index says how they join: merge them with the code that wrote them")
    if len(chosen) > 1:
        raise ValueError(f"{folder} holds several files of weights ({', '.join(p.name for p in chosen[:4])}): name "
                         "one of them")
    return read_file(chosen[0]), facts


def beside(path):
    """The settings in the folder of a file that are its own: of an export of ours, of a consolidated file."""
    config, arguments = path.with_name("config.json"), path.with_name("model_args.pth")
    facts = settings_of(config) if config.is_file() else {}
    facts = facts if "architecture" in facts else {}
    return facts | settings_of(arguments) if path.name.startswith("consolidated") and arguments.is_file() else facts


def settings_of(path):
    """The plain settings in a config.json, or in the Namespace of a model_args.pth."""
    if path.suffix == ".pth":
        return plain(read_torch(path))
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def read_shards(index):
    """The weights of all shards that an index lists: {"weight_map": {name: file}}."""
    listed = settings_of(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ValueError(f"{index} lists no files under weight_map")
    state = {}
    for file in sorted(set(listed.values())):
        path = index.parent / Path(file).name
        if not path.is_file():
            raise FileNotFoundError(f"{index} lists {file}, which is not beside it")
        state |= {name: value for name, value in read_file(path).items() if isinstance(value, torch.Tensor)}
    if missing := [name for name in listed if name not in state]:
        raise ValueError(f"{index} lists {missing[0]}, and no shard holds it")
    return state


def fill(model, state_dict, what):
    """Load every weight, or raise a ValueError that names the first that does not fit."""
    own = model.state_dict()
    for name in [*own, *state_dict]:
        if name not in own or name not in state_dict or own[name].shape != state_dict[name].shape:
            found, wanted = (tuple(d[name].shape) if name in d else "nothing" for d in (state_dict, own))
            raise ValueError(f"these are not the weights of {what}: {name} is {found} in the file, "
                             f"{wanted} in the model")
    model.load_state_dict(state_dict)
    return model


def checked(config, known, fixed, what):
    """known updated by config. ValueError for an argument that is not known, or whose value is not the `fixed` one."""
    for key, value in config.items():
        if key not in known and (key not in fixed or value not in fixed[key]):
            raise ValueError(f"{what} with {key} = {value!r} is not built here")
    return known | {key: value for key, value in config.items() if key in known}
