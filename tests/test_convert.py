"""Published files: every layout of every architecture is opened, recognised and drawn as published; exported runs come
back bit for bit; fine-tuning goes on from a file."""

import argparse
import json
import math
import os
import re
import struct
import zipfile
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from published import peer, same
from test_train import call, here, refused  # noqa: F401 (a fixture among them)

import build
import convert
import convert_tokens
import evaluate
import layers
import masked
import models
import objectives
import runs
import sample
import train
import weights
from convert import KLAutoencoder

GOLDEN = Path(__file__).parent / "golden"
# A recorded case of each architecture: its names and values are those of the published code.
CASES = {"dit": "dit-base", "lit": "lit-model", "dit-moe": "dit-moe-base", "terdit": "terdit-base",
         "dico": "dico-model", "uvit": "uvit-cond", "dimr": "dimr-2r", "fit": "fit-square", "fitv2": "fitv2-square",
         "flag-dit": "flag-dit-square", "flag-dit-text": "flag-dit-text-square", "drwkv": "drwkv-cond",
         "dimba": "dimba-model"}
MORE = ["dit-moe-qknorm", "uvit-uncond", "dimr-3r", "dico-pixel", "drwkv-uncond", "fitv2-mixed",
        "flag-dit-gqa", "flag-dit-text-video-derived"]


def case_of(name):
    return golden.load(GOLDEN / f"{name}.npz")


def architecture_of(case):
    return {"linear-attention": "lit"}.get(case.arch, case.arch)


# -------------------------------------------------------------------------------------------------------------- layouts


def safetensors(path, state):
    weights.write_safetensors(path, {name: v.contiguous() for name, v in state.items()})


def sharded(folder, state):
    """A folder of config.json, two shards and their index."""
    folder.mkdir()
    names = list(state)
    files = {name: f"model-0000{1 + (k % 2)}-of-00002.safetensors" for k, name in enumerate(names)}
    for file in set(files.values()):
        safetensors(folder / file, {name: state[name] for name in names if files[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text("{}")


def consolidated(folder, state):
    folder.mkdir()
    torch.save(state, folder / "consolidated_ema.00-of-01.pth")
    torch.save(argparse.Namespace(model="any", image_size=256), folder / "model_args.pth")


def alone(folder, state):
    folder.mkdir()
    safetensors(folder / "diffusion_pytorch_model.safetensors", state)
    (folder / "config.json").write_text('{"_class_name": "any"}')


def prefixed(prefix):
    return lambda path, state: torch.save({prefix + name: v for name, v in state.items()}, path)


def inside(key, **beside):
    return lambda path, state: torch.save({**beside, key: state}, path)


ARGS = argparse.Namespace(model="any", results_dir="results", lr=1e-4, epochs=1400, ckpt_every=50_000)
LAYOUTS = {
    "plain.pt": lambda path, state: torch.save(state, path),
    "legacy.bin": lambda path, state: torch.save(state, path, _use_new_zipfile_serialization=False),
    "ema.pt": inside("ema"), "model.pth": inside("model"), "module.pt": inside("module"),
    "state_dict.ckpt": inside("state_dict"), "data-parallel.pt": prefixed("module."), "wrapped.pt": prefixed("model."),
    "compiled.pt": prefixed("_orig_mod."), "both.pt": prefixed("module._orig_mod."),
    "training.pt": lambda path, state: torch.save(
        {"model": {name: v + 1 for name, v in state.items()}, "ema": state, "opt": {"step": 3}, "args": ARGS}, path),
    "stray.pt": lambda path, state: torch.save({**state, "epoch": 3, "note": "a word"}, path),
    "safe.safetensors": safetensors, "sharded": sharded, "consolidated": consolidated, "alone": alone,
}


@pytest.mark.parametrize("arch", CASES)
def test_every_layout_of_every_architecture(tmp_path, arch):
    """Each gives the same weights bit for bit, recognised; the published averages are taken, not the last weights."""
    state = case_of(CASES[arch]).state_dict
    for name, write in LAYOUTS.items():
        write(tmp_path / name, state)
        found = weights.open_weights(tmp_path / name)
        assert found.state.keys() == state.keys(), name
        assert all(torch.equal(found.state[key], value) for key, value in state.items()), name
        assert convert.recognise(found.state) == arch
        assert found.aside == (["epoch", "note"] if name == "stray.pt" else [])
    assert weights.open_weights(tmp_path / "training.pt").facts["ckpt_every"] == 50_000


@pytest.mark.parametrize("name", [*CASES.values(), *MORE])
def test_an_opened_file_computes_what_was_published(tmp_path, name):
    """`build.open_run` of a file: the network of the recorded case, its output, under the process that was published;
    and the same under the house's own names and options, so that the run can be built again."""
    case = case_of(name)
    path, arch = tmp_path / "file.pt", architecture_of(case)
    torch.save({"ema": case.state_dict}, path)
    config = case.config["stage_configs"][0] if arch == "dimr" else case.config
    text = f"{path}:heads={config[convert.HEADS[arch][0]]}" if arch in convert.HEADS else str(path)
    opened = build.open_run(text)
    reference = convert.load_official(case.arch, case.config, case.state_dict).eval()
    own = opened.objective.model.state_dict()
    assert own.keys() == reference.state_dict().keys()
    assert all(torch.equal(own[key], v) for key, v in reference.state_dict().items())
    x, y = torch.randn(2, *opened.objective.shape), torch.tensor([0, 1])
    if arch in ("fit", "fitv2", "flag-dit", "terdit", "dico"):
        x = x[:, :, :16, :16]
        opened.objective.model.resize(16) if opened.objective.model.any_size else None
    if reference.text_width:
        x = x[:, :, :8, :8] if arch == "flag-dit-text" else x
        y = layers.Text(torch.randn(2, 5, reference.text_width), torch.ones(2, 5, dtype=torch.bool))
        x = x[:, :, None] if "video" in name else x
    y = y if opened.objective.conditional else None
    t = torch.tensor([3.0, 0.4])
    if arch == "terdit":
        x = torch.randn(2, *opened.objective.shape)
        reference.grid = opened.objective.model.grid
    assert torch.equal(opened.objective.model(x, t, y), reference(x, t, y))


# ---------------------------------------------------------------------------------------------------------- recognition

KNOWN = [  # file, our name, side and channels of what it draws, classes; what its maker said beside; what is read
    ("DiT-XL-2-256x256.pt", "dit-xl/2", 32, 4, 1000, {"learn_sigma": True}, {"num_heads": 16}),
    ("DiT-XL-2-512x512.pt", "dit-xl/2", 64, 4, 1000, {"learn_sigma": True}, {}),
    ("SiT-XL-2-256x256.pt", "dit-xl/2", 32, 4, 1000, {"learn_sigma": True}, {"arch": "sit"}),
    ("dit_s_256.pt", "dit-s/2", 32, 4, 1000, {"learn_sigma": True}, {"num_heads": 6}),
    ("dit_b_256.pt", "dit-b/2", 32, 4, 1000, {"learn_sigma": True}, {"num_heads": 12}),
    ("dit_moe_s_8E2A.pt", "dit-moe-s/2-8e2a", 32, 4, 1000, {"learn_sigma": True}, {"num_experts": 8, "top_k": 2}),
    ("dit_moe_s_16E2A.pt", "dit-moe-s/2-16e2a", 32, 4, 1000, {"learn_sigma": True}, {"num_experts": 16}),
    ("dit_moe_b_8E2A.pt", "dit-moe-b/2-8e2a", 32, 4, 1000, {"learn_sigma": True}, {"num_heads": 12}),
    ("dit_moe_xl_8E2A.pt", "dit-moe-xl/2-8e2a", 32, 4, 1000, {"learn_sigma": True}, {"num_heads": 16}),
    ("dit_moe_g_16E2A.pt", "dit-moe-g/2-16e2a", 64, 4, 1000, {"learn_sigma": True}, {"num_experts": 16}),
    ("600M_256/consolidated_ema.pth", "terdit-600m", 32, 4, 1000, {"learn_sigma": True}, {"num_heads": 32}),
    ("3B_1180000_512/consolidated_ema.pth", "terdit-4.2b", 64, 4, 1000, {"learn_sigma": True}, {"num_heads": 32}),
    *((f"DiCo-{size.upper()}-256x256.pt", f"dico-{size}", 32, 4, 1000, {"learn_sigma": True}, {})
      for size in ("s", "b", "l", "xl", "h")),
    ("DiCo-XL-512x512.pt", "dico-xl", 64, 4, 1000, {"learn_sigma": True}, {}),
    ("cifar10_uvit_small.pth", "uvit-s/2", 32, 3, 0, {}, {"num_heads": 8}),
    ("celeba64_uvit_small.pth", "uvit-s/4", 64, 3, 0, {}, {"num_heads": 8}),
    ("imagenet64_uvit_mid.pth", "uvit-m/4", 64, 3, 1000, {"null_class": False}, {"num_heads": 12}),
    ("imagenet64_uvit_large.pth", "uvit-l/4", 64, 3, 1000, {"null_class": False}, {"num_heads": 16}),
    ("imagenet256_uvit_large.pth", "uvit-l/2", 32, 4, 1000, {}, {"num_heads": 16}),
    ("imagenet256_uvit_huge.pth", "uvit-h/2", 32, 4, 1000, {}, {"num_heads": 16}),
    ("imagenet512_uvit_large.pth", "uvit-l/4", 64, 4, 1000, {}, {"num_heads": 16}),
    ("imagenet512_uvit_huge.pth", "uvit-h/4", 64, 4, 1000, {}, {"num_heads": 16}),
    ("mscoco_uvit_small.pth", "uvit-s/2", 32, 4, 0, {"text_width": 768}, {"num_heads": 8, "text_length": 77}),
    ("mscoco_uvit_small_deep.pth", "uvit-s/2", 32, 4, 0, {"text_width": 768, "depth": 16}, {"num_heads": 8}),
    ("DiMR-XL_2R_800epochs.pth", "dimr-xl/2r", 32, 4, 1000, {}, {"num_heads": 16}),
    ("DiMR-G_2R_800epochs.pth", "dimr-g/2r", 32, 4, 1000, {}, {"num_heads": 16}),
    ("drwkv_h2_imagenet.pt", "drwkv-h/2", 32, 4, 1000, {}, {}),
    ("drwkv_l2_celeba.pt", "drwkv-l/2", 64, 3, 0, {}, {}),
    ("fitv1_xl.bin", "fit-xl/2", 32, 4, 1000, {"learn_sigma": True}, {"num_heads": 16}),
    ("fitv2_xl.safetensors", "fitv2-xl/2", 32, 4, 1000, {}, {"num_heads": 16}),
    ("fitv2_3B.bin", "fitv2-3b/2", 32, 4, 1000, {}, {"num_heads": 24}),
    ("FiTv2_XL_HRFT/model_ema.safetensors", "fitv2-xl/2", 64, 4, 1000, {}, {"rope": "vision-ntk", "trained": 16}),
    ("fitv2_hr_3B.safetensors", "fitv2-3b/2", 64, 4, 1000, {}, {"rope": "vision-ntk"}),
    ("600M_256/consolidated_ema.00-of-01.pth", "flag-dit-600m", 32, 4, 1000, {"spare_channels": True}, {}),
    ("3B/consolidated_ema.00-of-01.pth", "flag-dit-3b", 32, 4, 1000, {"spare_channels": True}, {"num_heads": 32}),
    ("7B/consolidated_ema.00-of-01.pth", "flag-dit-7b", 32, 4, 1000, {"spare_channels": True}, {"num_heads": 32}),
    ("Lumina-T2I/consolidated_ema.00-of-01.pth", "flag-dit-text-5b", 128, 4, 0, {"spare_channels": True}, {}),
    ("Dimba-L-2.pth", "dimba-l/2", 32, 4, 0, {"learn_sigma": True}, {"text_width": 4096}),
    ("Dimba-G-2.pth", "dimba-g/2", 32, 4, 0, {"learn_sigma": True}, {}),
    *((f"LiT-{size.upper()}-2.pt", f"lit-{size}/2", 32, 4, 1000, {"learn_sigma": True}, {}) for size in ("s", "xl")),
]


@pytest.mark.parametrize("file, name, side, channels, classes, made, read", KNOWN, ids=[row[0] for row in KNOWN])
def test_published_files_are_recognised(file, name, side, channels, classes, made, read):
    """Of names and shapes alone (their own size, on the meta device), and the file's name where these say nothing."""
    with torch.device("meta"):
        model = models.create_model(name, side, channels, classes, **made)
    arch = next(a for a, layout in convert.OFFICIAL.items() if layout.kind is models.backbone(name)
                and (a == "fitv2") == name.startswith("fitv2") and (a == "flag-dit-text") == ("-text-" in name))
    state = convert.OFFICIAL[arch].theirs(model.state_dict(), model)
    found = convert.described(weights.Weights(Path(file), state, {}, []))
    assert (found.arch, found.name) == (read.pop("arch", arch), name)
    settings = found.settings
    assert (settings["image_size"], settings["in_channels"]) == (side, channels)
    assert settings.get("text_width") or settings["num_classes"] == classes
    assert {key: settings[key] for key in read} == read
    extra = {"rope", "trained", "text_length"} if "rope" in read or "text" in name else set()
    assert {key for key in found.options if key not in made} <= extra
    told = [line for line in found.assumed if "experts" not in line and "rectified" not in line]
    assert told == [] or told == [f"images of {8 * side}x{8 * side} pixels"]


GENERATORS = [  # architecture, network of the published size, what is read off it
    ("mar", lambda: masked.MAR(16, 1000, 256, 768, 12, 12, 64, 6, 1024, 32),
     {"encoder_depth": 12, "encoder_num_heads": 12, "diffloss_d": 6, "diffloss_w": 1024, "img_size": 256}),
    ("mar", lambda: masked.MAR(16, 1000, 256, 1024, 16, 16, 64, 8, 1280, 32), {"encoder_num_heads": 16}),
    ("mar", lambda: masked.MAR(16, 1000, 256, 1280, 20, 16, 64, 12, 1536, 32),
     {"encoder_num_heads": 16, "vae_embed_dim": 16, "buffer_size": 64, "class_num": 1000}),
    ("mage", lambda: masked.MAGE(1024, 256, 768, 12, 12, 768, legacy=True), {"num_heads": 12, "grid": 16}),
    ("mage", lambda: masked.MAGE(1024, 256, 1024, 24, 16, 1024, legacy=True), {"num_heads": 16, "depth": 24}),
    ("maskgit-r", lambda: masked.MaskGITr(1024, 1000, 256, 768, 24, 8), {"num_heads": 8, "num_classes": 1000}),
]


@pytest.mark.parametrize("arch, make, read", GENERATORS)
def test_published_generators_of_tokens_are_recognised(arch, make, read):
    """Of names and shapes alone, on the meta device; without --official they are named."""
    with torch.device("meta"):
        state = {re.sub(r"^head\.", "diffloss.net.", name): v for name, v in make().state_dict().items()}
        arguments = convert_tokens.infer_tokens(arch, state)
        assert {key: arguments[key] for key in read} == read
        assert convert_tokens.load_tokens(arch, arguments, state).state_dict().keys() == make().state_dict().keys()
    with pytest.raises(ValueError, match=rf"x.pt: this is a .*: say --official {arch}$"):
        convert.described(weights.Weights(Path("x.pt"), state, {}, []))


def test_wrong_architectures_are_named(here, capsys):  # noqa: F811
    for arch, case in CASES.items():
        torch.save(case_of(case).state_dict, f"{arch}.pt")
    for arch in CASES:
        for wrong in CASES:
            alike = {arch, wrong} <= {"linear-attention", "lit"}
            if arch != wrong and not alike:
                with pytest.raises(ValueError, match=rf"{arch}\.pt: this is .*: use {arch}$") as error:
                    convert.published(f"{arch}.pt", wrong)
                assert convert.OFFICIAL[arch].title.removeprefix("a ") in str(error.value)
    with pytest.raises(ValueError, match="this is FiTv2, not FiT: use fitv2"):
        build.open_run("fitv2.pt:arch=fit")
    said = refused(capsys, sample.sample, "--official", "dit", "--checkpoint", "dico.pt")
    assert said == "sample.py: error: dico.pt: this is a DiCo, not a DiT: use dico"
    torch.save({"decoder.conv_in.weight": torch.zeros(2)}, "vae.pt")
    with pytest.raises(ValueError, match="vae.pt: this is Stable Diffusion's autoencoder"):
        build.open_run("vae.pt")
    torch.save({"conv.weight": torch.zeros(2)}, "other.pt")
    with pytest.raises(ValueError, match="no architecture that is known here; they begin with conv.weight"):
        build.open_run("other.pt")
    state = case_of("dico-model").state_dict
    torch.save({name: v for name, v in state.items() if not name.startswith("latent")}, "less.pt")
    with pytest.raises(ValueError, match="less.pt looks like a DiCo, but its weights are not all there"):
        build.open_run("less.pt")


# ------------------------------------------------------------------------------------------- damaged and hostile files


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def flipped(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.with_name("flipped.pt").write_bytes(raw)
    return path.with_name("flipped.pt")


def test_damaged_and_hostile_files(here):  # noqa: F811
    """A flipped bit of the numbers never loads; of a file's objects only Namespace beside plain types is built."""
    torch.save({"ema": {"w": torch.randn(64, 64)}}, "w.pt")
    with zipfile.ZipFile("w.pt") as archive:
        info = next(i for i in archive.infolist() if i.file_size >= 64 * 64 * 4)
        start = info.header_offset + 30 + len(info.filename) + len(info.extra) + 64
    for k in range(40):
        with pytest.raises(ValueError, match="flipped.pt is damaged"):
            weights.read_weights(flipped(Path("w.pt"), 8 * (start + 97 * k) + k % 8))
    for cut in (10, 1000, 16_000):
        Path("cut.pt").write_bytes(Path("w.pt").read_bytes()[:cut])
        with pytest.raises(ValueError, match="cut.pt is damaged|cut.pt is not a file of weights"):
            weights.read_weights("cut.pt")
    for what in (Evil(), np.float64(1), Path("x"), {1, Evil()}):
        torch.save({"ema": {"w": torch.zeros(1)}, "args": argparse.Namespace(bad=what)}, "evil.pt")
        with pytest.raises(ValueError, match="only tensors, plain types and argparse.Namespace are read") as error:
            weights.read_weights("evil.pt")
        assert "\x1b" not in str(error.value) and "\n" not in str(error.value)
    assert not Path("evil-was-here").exists()
    os.mkfifo("fifo.pt")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        weights.read_weights("fifo.pt")
    Path("shards").mkdir()
    torch.save({"w": torch.zeros(1)}, "shards/consolidated.00-of-02.pth")
    with pytest.raises(ValueError, match="consolidated.00-of-02.pth is one of 2 shards of model parallelism"):
        weights.read_weights("shards")


def test_damaged_safetensors(here):  # noqa: F811
    """The header says where each tensor lies: none may overlap, leave a gap or end beyond the file."""
    def file(header, body=b"\0" * 32):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        Path("w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
        return Path("w.safetensors")

    entry = lambda begin, end, shape, dtype="F32": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    good = {"a": entry(0, 16, [4]), "b": entry(16, 32, [2, 2]), "__metadata__": {"format": "pt"}}
    assert {k: tuple(v.shape) for k, v in weights.read_weights(file(good)).items()} == {"a": (4,), "b": (2, 2)}
    for header, why in (
            ({"a": entry(0, 16, [4]), "b": entry(8, 24, [4]), "c": entry(24, 32, [2])}, "overlap"),
            ({"a": entry(0, 16, [4]), "b": entry(0, 16, [4]), "c": entry(16, 32, [4])}, "overlap"),
            ({"a": entry(0, 8, [2]), "b": entry(16, 32, [4])}, "gap"), ({"a": entry(0, 16, [4])}, "gap"),
            ({"a": entry(0, 64, [16])}, "overlap"), ({"a": entry(0, 32, [-8, -1])}, "claims"),
            ({"a": entry(0, 32, [9])}, "claims"), ({"a": entry(0, 32, ["x"])}, "claims"),
            ({"a": entry(0, 32, [8], "F7")}, "damaged header"), ({"a": 3}, "damaged header"), ([1], "no list"),
            (b"[" * 100_000, "damaged header"), (b"{", "Expecting")):
        with pytest.raises(ValueError, match=f"w.safetensors is not a whole safetensors file: .*{why}"):
            weights.read_weights(file(header))
    Path("w.safetensors").write_bytes(struct.pack("<Q", 10**6) + b"{}")
    with pytest.raises(ValueError, match="header of 1000000 bytes"):
        weights.read_weights("w.safetensors")
    Path("w.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole"):
        weights.read_weights("w.safetensors")
    state = {"x": torch.randn(3, 2), "y": torch.arange(5), "h": torch.randn(4).bfloat16(), "none": torch.zeros(0, 3)}
    weights.write_safetensors("w.safetensors", state, {"format": "pt"})
    assert all(torch.equal(v, state[k]) for k, v in weights.read_weights("w.safetensors").items())


# ------------------------------------------------------------------------------------------------- published defaults


def test_what_a_file_cannot_say_is_assumed_in_a_line(here, capsys):  # noqa: F811
    torch.save(case_of("dit-moe-base").state_dict, "dit_moe.pt")
    two = build.open_run("dit_moe.pt:heads=4")
    assert "assumed: 2 experts a token\n" in capsys.readouterr().out
    one = build.open_run("dit_moe.pt:heads=4,top_k=1")
    assert "assumed" not in capsys.readouterr().out
    assert (two.objective.model.blocks[0].mlp.router.top_k, one.objective.model.blocks[0].mlp.router.top_k) == (2, 1)
    args = argparse.Namespace(num_experts_per_tok=1, model="DiT-S/2", image_size=64)
    torch.save({"ema": case_of("dit-moe-base").state_dict, "args": args}, "trained.pt")
    told = build.open_run("trained.pt:heads=4").objective.model
    assert told.blocks[0].mlp.router.top_k == 1 and "assumed" not in capsys.readouterr().out
    mistakes = {":arch=nothing": "no published architecture is called 'nothing'", ":size=x": "size is 'x'",
                ":top=1": "has no option 'top'", ":size=32": "position table in the file is that of"}
    for wrong, message in mistakes.items():
        with pytest.raises(ValueError, match=message):
            build.open_run(f"dit_moe.pt{wrong}")


def test_terdit_knows_its_labels_and_its_size(here):  # noqa: F811
    """Its label table is in the order of the class numbers as words: class 207 is row 121. Its folder says the size."""
    case = case_of("terdit-base")
    state = dict(case.state_dict)
    D = state["y_embedder.embedding_table.weight"].shape[1]
    state["y_embedder.embedding_table.weight"] = torch.arange(1001.0)[:, None].expand(1001, D).clone()
    Path("3B").mkdir()
    torch.save(state, "3B/consolidated_ema_ternary.00-of-01.pth")
    torch.save(argparse.Namespace(model="DiT_Llama_3B_patch2", image_size=512, num_classes=1000, qk_norm=True),
               "3B/model_args.pth")
    opened = build.open_run("3B:heads=4")
    table = opened.objective.model.y_embedder.embedding_table.weight
    assert (table[207, 0], table[10, 0], table[999, 0], table[1000, 0]) == (121, 2, 999, 1000)
    assert opened.objective.shape == (4, 64, 64)
    assert build.open_run("3B/consolidated_ema_ternary.00-of-01.pth:heads=4").objective.shape == (4, 64, 64)
    call(evaluate.evaluate, "export", "3B:heads=4", "out", "--to", "terdit")
    again = weights.read_weights("out")["y_embedder.embedding_table.weight"]
    assert torch.equal(again, state["y_embedder.embedding_table.weight"])


def test_fitv2_for_larger_images_is_told_by_its_name(here):  # noqa: F811
    state = case_of("fitv2-square").state_dict
    torch.save(state, "fitv2_hr_xl.bin")
    torch.save(state, "fitv2_xl.bin")
    hr, plain = (build.open_run(f"{name}:heads=3") for name in ("fitv2_hr_xl.bin", "fitv2_xl.bin"))
    assert (hr.objective.shape, hr.objective.model.rope, hr.objective.model.trained) == ((4, 64, 64), "vision-ntk", 16)
    assert hr.config["draw"]["guidance"] == 1.65 and plain.config["draw"]["guidance"] == 1.5
    assert (plain.objective.shape, plain.objective.model.rope) == ((4, 32, 32), "direct")


def test_text_files_draw_from_embeddings(here, capsys):  # noqa: F811
    """MS-COCO's U-ViT: 77 tokens of text beside time and patches. Guidance needs the empty caption's embedding."""
    model = models.create_model("uvit-nano", 16, 4, 0, text_width=24, patch_size=2, depth=2, hidden_size=64)
    torch.save(convert.OFFICIAL["uvit"].theirs(model.state_dict(), model), "mscoco_uvit.pth")
    np.savez("a.npz", caption_feature=np.random.randn(77, 24).astype(np.float32))
    call(sample.sample, "mscoco_uvit.pth", "--prompt", "a.npz", "--n", "1", "--steps", "3", "--out", "x.png")
    assert "no guidance, which needs the empty caption's embedding" in capsys.readouterr().out
    call(sample.sample, "mscoco_uvit.pth:null=a.npz", "--prompt", "a.npz", "--n", "1", "--steps", "3", "--out", "y.png")
    opened = build.open_run("mscoco_uvit.pth:null=a.npz")
    assert (opened.config["draw"]["guidance"], opened.config["latent_scale"]) == (2.0, 0.2301)
    with np.load("x.latents.npz") as x, np.load("y.latents.npz") as y:
        assert np.allclose(x["arr_0"], y["arr_0"], atol=1e-5)        # away from itself leads nowhere
    assert "precomputed embeddings: name some by --prompt" in refused(capsys, sample.sample, "mscoco_uvit.pth", "--n",
                                                                      "1", "--out", "z.png")


# --------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("name", [*CASES.values(), *MORE])
def test_recorded_cases_come_back_under_their_published_names(name):
    """Published names and values in, the same out, bit for bit: that the names are the published ones is recorded."""
    case = case_of(name)
    model = convert.load_official(case.arch, case.config, case.state_dict)
    back = convert.layout_of(case.arch).theirs(model.state_dict(), model)
    assert back.keys() == case.state_dict.keys()
    assert all(torch.equal(value, case.state_dict[key]) for key, value in back.items())


EXPORTS = {"dit-nano": "dit", "lit-nano": "lit", "dit-moe-nano": "dit-moe", "terdit-nano": "terdit",
           "dico-nano": "dico", "uvit-nano": "uvit", "dimr-nano": "dimr", "fit-nano": "fit", "fitv2-nano": "fitv2",
           "flag-dit-nano": "flag-dit", "flag-dit-text-nano": "flag-dit-text", "drwkv-nano": "drwkv",
           "dimba-nano": "dimba"}


def a_run(folder, name, classes=3, process="linear", **config):
    """The folder of a run of a model with random weights, as train.py leaves it."""
    config = {"model": name, "network": name, "process": process, "prediction": "own", "weighting": "own",
              "density": "own", "image_size": 16, "in_channels": 3, "num_classes": classes, "text": "npz",
              "classes": [f"class {k}" for k in range(classes)], "label_drop": 0.1, "unconditional": False,
              "subset": None, "data": "shapes:size=16", "data_dir": "data", "version": build.VERSION,
              "draw": {"steps": 2, "sampler": "ddim"}, **config}
    torch.manual_seed(0)
    objective = build.build(config)
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(0.05 * torch.randn_like(p) * p.requires_grad)
    state = objective.state_dict()
    folder.mkdir(parents=True)
    torch.save({"config": config, "step": 0, "model": state, "ema": state, "optimiser": {}}, folder / "ckpt.pt")
    return objective.eval()


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_runs_come_back_bit_for_bit(here, capsys, name):  # noqa: F811
    """evaluate.py export RUN --to ARCH: the folder opens as a run does, with equal weights, and draws the same."""
    arch, text = EXPORTS[name], "text" in name or "dimba" in name
    a_run(here / "run", name, 0 if text else 3)
    call(evaluate.evaluate, "export", "run", "out", "--to", arch)
    run, out = build.open_run("run"), build.open_run("out")
    ours, again = run.objective.state_dict(), out.objective.state_dict()
    assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)
    assert [out.config[key] for key in build.OF_EXPORT] == [run.config[key] for key in build.OF_EXPORT]
    y = layers.Text(torch.randn(2, 5, run.objective.model.text_width), torch.ones(2, 5, dtype=torch.bool)) if text \
        else torch.tensor([0, 2])
    drawn = [torch.cat(list(opened.images(2, conditions=y))) for opened in (run, out)]
    assert torch.equal(*drawn)
    card = Path("out/README.md").read_text()
    assert name in card and '"process": "linear"' in card and "Figures" in card
    assert "out is there already" in refused(capsys, evaluate.evaluate, "export", "run", "out", "--to", arch)
    wrong = "dico" if arch != "dico" else "dit"
    said = refused(capsys, evaluate.evaluate, "export", "run", "other", "--to", wrong)
    assert f"is not published as {wrong}: use " in said
    assert not Path("other").exists()


def test_what_has_no_published_layout_is_refused_or_kept_in_our_names(here, capsys):  # noqa: F811
    a_run(here / "unet", "unet-pico")
    said = refused(capsys, evaluate.evaluate, "export", "unet", "out", "--to", "dit")
    assert "unet-pico is not published as dit: it has no published layout" in said
    call(evaluate.evaluate, "export", "unet", "out", "--to", "safetensors")
    run, out = build.open_run("unet"), build.open_run("out")
    assert torch.equal(*(torch.cat(list(opened.images(2))) for opened in (run, out)))
    a_run(here / "td", "dit-nano:norm=td-ln")
    said = refused(capsys, evaluate.evaluate, "export", "td", "x", "--to", "dit")
    assert "the published dit has no place for norm='td-ln'" in said
    a_run(here / "none", "dit-nano", classes=0, unconditional=True)
    call(evaluate.evaluate, "export", "none", "y", "--to", "dit")
    assert weights.read_weights("y")["y_embedder.embedding_table.weight"].shape == (1, 128)
    assert torch.equal(*(torch.cat(list(build.open_run(path).images(2))) for path in ("none", "y")))


def test_diffusers_folder_is_read_back(here):  # noqa: F811
    a_run(here / "run", "dit-nano", process="linear:learned_variance=True")
    call(evaluate.evaluate, "export", "run", "out", "--to", "diffusers")
    ours = build.open_run("run").objective.model.state_dict()
    again = build.open_run("out:arch=dit,heads=4").objective.model.state_dict()
    assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)
    assert json.loads(Path("out/model_index.json").read_text())["_class_name"] == "DiTPipeline"


def test_diffusers_folder_opens_in_diffusers(here):  # noqa: F811
    """With its own classes, by its own loop: the same latents at 1e-5. diffusers divides the exponents of its time
    embedding by 127 where the published DiT has 128; that one number is set here."""
    diffusers = peer("diffusers")
    a_run(here / "run", "dit-nano:patch_size=2", process="linear:learned_variance=True", in_channels=4)
    call(evaluate.evaluate, "export", "run", "out", "--to", "diffusers")
    model = diffusers.DiTTransformer2DModel.from_pretrained("out/transformer").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained("out/scheduler")
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    opened, y = build.open_run("run"), torch.tensor([0, 2])
    x = objectives.ImageNoise(0, range(2)).normal(4, 16, 16)
    scheduler.set_timesteps(20)
    times = scheduler.timesteps.tolist()
    with torch.no_grad():
        for t in times:
            eps = model(x, torch.full((2,), t), y).sample[:, :4]
            x = scheduler.step(eps, t, x).prev_sample
    (ours,) = opened.images(2, conditions=y, sampler="ddim", steps=20, grid="leading", clip=False)
    same(ours, x, "latents", 1e-5)


# --------------------------------------------------------------------------------------- stable diffusion's autoencoder


def compvis(state):
    """diffusers' names of a Stable Diffusion autoencoder as CompVis's code has them, written out by hand."""
    levels, new = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("decoder.up_blocks")), {}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for name, v in state.items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        for ours, theirs in attention.items():
            name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
        name = name.replace("resnets", "block").replace("upsamplers.0", "upsample")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        square = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        new[name] = v[:, :, None, None] if square else v
    return new


def test_autoencoder_is_stable_diffusions(here):  # noqa: F811
    """Its parameters, and on recorded weights the numbers of diffusers 0.42's AutoencoderKL, from every layout."""
    with torch.device("meta"):
        whole = KLAutoencoder()
    assert sum(p.numel() for p in whole.parameters()) == 83_653_863
    case = case_of("kl-autoencoder")
    state = case.state_dict
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    before = {re.sub(r"attentions\.0\.(to_q|to_k|to_v|to_out\.0)", lambda m: f"attentions.0.{old[m[1]]}", n): v
              for n, v in state.items()}
    Path("vae").mkdir()
    safetensors("vae/diffusion_pytorch_model.safetensors", state)
    Path("vae/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    torch.save(before, "older.bin")
    torch.save(compvis(state), "autoencoder_kl.pth")
    torch.save({"state_dict": compvis(state), "global_step": 3}, "kl-f8.ckpt")
    whole = {f"first_stage_model.{n}": v for n, v in compvis(state).items()}
    torch.save({"state_dict": {**whole, "model.diffusion_model.out.0.weight": torch.zeros(3)}}, "sd-v1-4.ckpt")
    x, z = case.inputs["x"], case.inputs["z"]
    for path in ("vae", "older.bin", "autoencoder_kl.pth", "kl-f8.ckpt", "sd-v1-4.ckpt"):
        tokenizer = convert.load_tokenizer(path)
        with torch.no_grad():
            mean, log_variance = tokenizer.posterior(x)
            same(mean, case.outputs["mean"], f"{path}: mean")
            same(log_variance, case.outputs["log_variance"], f"{path}: log variance")
            same(tokenizer.decode(z), case.outputs["image"], f"{path}: image")
            same(tokenizer.encode(x), case.outputs["mean"], "encode")
            assert torch.equal(convert.load_decoder(path)(0.18215 * z), tokenizer(0.18215 * z))
    torch.save({n: v for n, v in state.items() if not n.startswith("encoder")}, "half.pt")
    with pytest.raises(ValueError, match="half.pt holds a decoder alone"):
        convert.load_tokenizer("half.pt")
    torch.save({"a": torch.zeros(1)}, "none.pt")
    with pytest.raises(ValueError, match="none.pt holds no autoencoder"):
        convert.load_decoder("none.pt")


# ----------------------------------------------------------------------------------------------- published trajectories
# The published solvers and schedules written out from their papers' formulas, none of our samplers in them.

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
LOG_ALPHAS = 0.5 * torch.log(1 - BETAS).cumsum(0)


def vp_log_alpha(t):
    return -0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1


def vp_time(lam):
    """The inverse of lambda(t) of the VP SDE."""
    c = 2 * (20 - 0.1) * torch.logaddexp(-2 * lam, torch.zeros_like(lam))
    return c / ((0.01 + c).sqrt() + 0.1) / (20 - 0.1)


def sd_log_alpha(t):
    """Stable Diffusion's chain at t = n/1000, log alpha linear between its steps n = 1 .. 1000."""
    n = (1000 * t - 1).clamp(0, 999)
    k = n.floor().clamp(max=998).long()
    return LOG_ALPHAS[k] + (n - k) * (LOG_ALPHAS[k + 1] - LOG_ALPHAS[k])


def lam_of(log_alpha):
    return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))


def block_orders(steps):
    """DPM-Solver-fast: orders of its blocks."""
    K = steps // 3 + 1
    return [3] * (K - 2) + [2, 1] if steps % 3 == 0 else [3] * (K - 1) + [steps % 3]


def dpm_solver_fast(eps, x, log_alpha, points, orders, of_x0):
    """DPM-Solver-1, -2 and -3 (2206.00927, algorithms 1-2; of_x0: their ++ forms, 2211.01095) over blocks of the times
    `points`, each reached from the block's start."""
    i = 0
    for order in orders:
        t = points[i:i + order + 1]
        la = log_alpha(t)
        lam, alpha, sigma = lam_of(la), la.exp(), (-torch.expm1(2 * la)).sqrt()
        h, r = lam[-1] - lam[0], (lam[1:-1] - lam[0]) / (lam[-1] - lam[0])

        def output(x, k, t=t, alpha=alpha, sigma=sigma):
            e = eps(x, t[k])
            return (x - sigma[k] * e) / alpha[k] if of_x0 else e

        def step(k, slope, second, x=x, h=h, r=r, alpha=alpha, sigma=sigma):
            share = 1.0 if k == order else r[k - 1]
            if of_x0:
                phi1 = torch.expm1(-share * h)
                phi2 = phi1 / (share * h) + 1
                new = sigma[k] / sigma[0] * x - alpha[k] * phi1 * m0
                return new + (alpha[k] * (phi2 if second else -phi1) * slope if slope is not None else 0)
            phi1 = torch.expm1(share * h)
            phi2 = phi1 / (share * h) - 1
            new = alpha[k] / alpha[0] * x - sigma[k] * phi1 * m0
            return new - (sigma[k] * (phi2 if second else phi1) * slope if slope is not None else 0)

        m0 = output(x, 0)
        if order == 1:
            x = step(1, None, False)
        elif order == 2:
            m1 = output(step(1, None, False), 1)
            x = step(2, 0.5 / r[0] * (m1 - m0), False)
        else:
            m1 = output(step(1, None, False), 1)
            m2 = output(step(2, r[1] / r[0] * (m1 - m0), True), 2)
            x = step(3, 1 / r[1] * (m2 - m0), True)
        i += order
    return x


def of_vp(steps, end=1e-4):
    """Blocks even in log-SNR, their inner points at thirds or the half."""
    orders, ends = block_orders(steps), lam_of(vp_log_alpha(torch.tensor([1.0, end], dtype=torch.float64)))
    edges = torch.linspace(*ends.tolist(), len(orders) + 1, dtype=torch.float64)
    lams = [edges[b] + k / order * (edges[b + 1] - edges[b]) for b, order in enumerate(orders) for k in range(order)]
    return torch.cat([torch.ones(1, dtype=torch.float64), vp_time(torch.stack([*lams[1:], edges[-1]]))]), orders


def euler_maruyama(eps, x, noise, steps):
    """The reverse SDE from t = 1 to 0.001 and then, without noise, to 0."""
    times = [0.0, *np.linspace(1e-3, 1, steps)]
    for s, t in list(zip(times, times[1:]))[::-1]:
        beta, std = 0.1 + t * (20 - 0.1), (-torch.expm1(2 * vp_log_alpha(torch.tensor(t)))).sqrt()
        drift = -0.5 * beta * x + beta * eps(x, torch.tensor(t, dtype=torch.float64)) / std
        x = x + drift * (s - t) + (math.sqrt(beta * (t - s)) * noise(x.shape) if s else 0)
    return x


class Mixture(layers.Backbone):
    """The exact eps of a mixture of Gaussians, told what the published network is told; the null label's is another."""

    def __init__(self, shape, log_alpha, null):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.means = 0.7 * torch.randn(3, *shape, generator=generator).double()
        self.stds, self.weights = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.5, 0.2], [0.5, 0.3, 0.2]))
        self.log_alpha, self.null = log_alpha, null

    def eps(self, x, log_alpha, wide):
        x, alpha, sigma = x.double(), log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        means, stds = (1 - 0.5 * wide) * self.means, (1 + wide) * self.stds
        v = alpha**2 * stds**2 + sigma**2                                                     # (K,)
        d = x[:, None] - alpha * means                                                        # (B, K, C, H, W)
        share = self.weights.log() - x[0].numel() / 2 * v.log() - d.flatten(2).square().sum(2) / (2 * v)
        return torch.einsum("bk,bkchw->bchw", share.softmax(1) * sigma / v, d)

    def forward(self, x, t, y=None):
        wide = float(self.null is not None and y is not None and bool((y == self.null).all()))
        return self.eps(x, self.log_alpha(t[0].double()), wide).to(x.dtype)


def published_file(name, **arguments):
    """Weights of a published U-ViT or DiMR with these arguments of its constructor, as small as may be."""
    layout = convert.OFFICIAL[name]
    model = layout.kind(**layout.settings(arguments))
    return layout.theirs(model.state_dict(), model)


def tiny_uvit(**arguments):
    return published_file("uvit", **dict(img_size=32, patch_size=16, in_chans=4, embed_dim=32, depth=2, num_heads=1,
                                         num_classes=1001, conv=True) | arguments)


def tiny_dimr():
    stage = dict(hidden_dim=64, num_attention_heads=16, image_input_ratio=1, final_kernel_size=3, max_height=8,
                 max_width=8, input_feature_ratio=1, num_blocks=1, dim=32, block_type="TransformerBlock")
    return published_file("dimr", channels=4, num_classes=1001, norm_type="TDRMSN", stage_configs=[stage])


TRAJECTORIES = {  # file -> its weights, the process that published it, its own scale of guidance (0 for none), steps
    "imagenet256_uvit_large.pth": (lambda: tiny_uvit(), "vp", 0.4, 50),
    "imagenet512_uvit_large.pth": (lambda: tiny_uvit(img_size=64, patch_size=32), "vp", 0.7, 50),
    "imagenet64_uvit_mid.pth": (lambda: tiny_uvit(in_chans=3, num_classes=1000), "vp", 0.0, 50),
    "imagenet256_uvit_huge.pth": (lambda: tiny_uvit(conv=False), "chain", 0.4, 50),
    "imagenet512_uvit_huge.pth": (lambda: tiny_uvit(conv=False, img_size=64, patch_size=32), "chain", 0.7, 50),
    "cifar10_uvit_small.pth": (lambda: tiny_uvit(in_chans=3, num_classes=-1), "sde", 0.0, 1000),
    "DiMR-XL_2R.pth": (tiny_dimr, "chain", 0.4, 250),
}


@pytest.mark.parametrize("file", TRAJECTORIES)
def test_trajectories_of_uvit_and_dimr_are_the_published_ones(here, file):  # noqa: F811
    """Opened and drawn with no option said, an analytic denoiser in the network's place: the published sampler's final
    latents within 1e-4."""
    make, process, scale, steps = TRAJECTORIES[file]
    torch.save(make(), file)
    opened, n = build.open_run(file), 2
    shape, classes = opened.objective.shape, opened.objective.num_classes
    assert classes == (0 if process == "sde" else 1000)
    told = {"chain": lambda t: sd_log_alpha(t / 1000)}.get(process, lambda t: vp_log_alpha(t / 999))
    opened.objective.model = network = Mixture(shape, told, classes or None)
    (ours,) = opened.images(n, seed=3)
    noise, log_alpha = objectives.ImageNoise(3, range(n)), sd_log_alpha if process == "chain" else vp_log_alpha

    def eps(x, t):
        cond = network.eps(x, log_alpha(t), 0.0)
        return cond + scale * (cond - network.eps(x, log_alpha(t), 1.0)) if scale else cond

    x = noise((n, *shape)).double()
    if process == "sde":
        theirs = euler_maruyama(eps, x, noise, steps)
    elif process == "vp":
        theirs = dpm_solver_fast(eps, x, vp_log_alpha, *of_vp(steps), of_x0=False)
    else:
        points = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
        theirs = dpm_solver_fast(eps, x, sd_log_alpha, points, block_orders(steps), of_x0=True)
    same(ours, theirs, file, 1e-4)


@pytest.mark.parametrize("steps", [9, 10, 11])
def test_dpm_solver_fast_with_any_number_of_steps(here, steps):  # noqa: F811
    torch.save(tiny_uvit(), "imagenet256_uvit_large.pth")
    opened = build.open_run("imagenet256_uvit_large.pth")
    opened.objective.model = network = Mixture(opened.objective.shape, lambda t: vp_log_alpha(t / 999), None)
    (ours,) = opened.images(1, steps=steps, guidance=1.0)
    x = objectives.ImageNoise(0, [0])((1, *opened.objective.shape)).double()
    theirs = dpm_solver_fast(lambda x, t: network.eps(x, vp_log_alpha(t), 0.0), x, vp_log_alpha, *of_vp(steps), False)
    same(ours, theirs, f"{steps} steps", 1e-4)


# ------------------------------------------------------------------------------------------------------------- used

PIXELS = ["--data", "shapes:size=16", "--batch", "8", "--log-every", "1", "--sample-n", "2", "--sample-every", "0",
          "--device", "cpu", "--draw", "steps=2", "--warmup", "0"]


@pytest.fixture
def files(here):  # noqa: F811
    """Published-layout DiTs of 8 classes and 16x16 pixels, small and large, and a DiT-MoE and a TerDiT beside."""
    sizes = {"dit_s": "dit-nano:depth=1,hidden_size=32,num_heads=1",
             "dit_xl": "dit-nano:depth=2,hidden_size=64,num_heads=1",
             "dit_moe": "dit-moe-nano:depth=1,hidden_size=32,num_heads=1,num_experts=4",
             "terdit": "terdit-nano:depth=1,hidden_size=32,num_heads=1"}
    for name, network in sizes.items():
        objective = a_run(here / f"run-{name}", network, 8, "linear:learned_variance=True")
        arch = {"dit_moe": "dit-moe", "terdit": "terdit"}.get(name, "dit")
        torch.save({"ema": convert.OFFICIAL[arch].theirs(objective.model.state_dict(), objective.model)}, f"{name}.pt")
    return here


def test_published_files_are_used_as_runs_are(files, capsys):
    """Guided by a weaker file, stitched (T-Stitch's own pairs), inherited from, distilled from."""
    call(sample.sample, "dit_xl.pt", "--n", "2", "--steps", "2", "--weak", "dit_s.pt", "--out", "weak.png")
    call(sample.sample, "dit_s.pt", "dit_xl.pt", "--stitch", "0.5", "--n", "2", "--steps", "4", "--out", "both.png")
    small, large = build.open_run("dit_s.pt"), build.open_run("dit_xl.pt")
    options = {"steps": 4, "seed": 0}
    for share, alone in ((0, large), (1, small)):
        both = build.open_stitched(["dit_s.pt", "dit_xl.pt"], [share, 1 - share])
        assert torch.equal(*(torch.cat(list(opened.images(2, **options))) for opened in (both, alone)))
    network = ["--model", "lit-nano:depth=2,hidden_size=64", "--process", "linear:learned_variance=True"]
    call(train.train, *PIXELS, *network, "--steps", "1", "--lr", "0", "--inherit", "dit_xl.pt", "--distill",
         "dit_xl.pt", "--out", "lit")
    assert "distill" in runs.history("lit")[0]
    ours, theirs = (build.open_run(path).objective.model.state_dict() for path in ("lit", "dit_xl.pt"))
    shared = [key for key in ours if ".attn." not in key]
    assert len(shared) > 10 and all(torch.equal(ours[key], theirs[key]) for key in shared)
    assert "its process is 'linear:learned_variance=True', here it is 'flow'" in refused(
        capsys, train.train, *PIXELS, *network[:2], "--steps", "1", "--distill", "dit_xl.pt", "--out", "x")


def test_published_files_are_measured_as_runs_are(files, capsys):
    call(evaluate.evaluate, "likelihood", "dit_s.pt:data=shapes:size=16", "--n", "2", "--chain-steps", "3")
    assert "bits per dimension" in capsys.readouterr().out
    assert "name a data set, dit_s.pt:data=NAME" in refused(capsys, evaluate.evaluate, "likelihood", "dit_s.pt")
    call(evaluate.evaluate, "score", "dit_s.pt:data=shapes:size=16", "--n", "8", "--steps", "2", "--classifier-steps",
         "2")
    assert json.loads(Path("runs/dit_s/score.json").read_text())["images"] == 8
    call(evaluate.evaluate, "speed", "dit_s.pt", "run-dit_xl", "--batch", "2", "--rounds", "1")
    assert "dit_s.pt" in capsys.readouterr().out
    call(evaluate.evaluate, "classify", "dit_s.pt:data=shapes:size=16", "--n", "2", "--keep", "3,1", "--samples", "2,4")
    assert len(list(Path("runs/dit_s").glob("classify-*.jsonl"))) == 1
    call(evaluate.evaluate, "experts", "dit_moe.pt:top_k=1", "--n", "1", "--steps", "2")
    assert json.loads(Path("runs/dit_moe/experts.json").read_text())["images_per_class"] == 1
    call(evaluate.evaluate, "pack", "terdit.pt", "--n", "1", "--rounds", "1", "--steps", "2")
    packed = build.open_run("runs/terdit/packed.pt")
    assert torch.equal(*(torch.cat(list(o.images(1, steps=2))) for o in (packed, build.open_run("terdit.pt"))))
    call(evaluate.evaluate, "export", "runs/terdit/packed.pt", "two-bits", "--to", "terdit")
    assert weights.read_weights("two-bits")["layers.0.attention.wq.weight"].dtype == torch.uint8
    assert build.open_run("two-bits").objective.model.layers[0].attention.wq.weight.dtype == torch.uint8


def first_loss(opened, config):
    """The loss that a training step of the new run would see first, of the file's own network."""
    dataset = build.load_data(config, "train")
    indices, flips = dataset.plan(0, config["batch"], config["seed"])
    x, y = dataset.gather(indices, flips)
    noise = objectives.StepNoise(config["seed"], 0, config["batch"])
    opened.objective.label_drop = config["label_drop"]
    return opened.objective.loss({"x": x, "y": y, "step": 0, "noise": noise})["loss"].item()


def test_fine_tuning_goes_on_where_the_file_left_it(files, capsys):
    """Without --model the file's network and process are taken; the first loss is the file's own. The same command goes
    on. Labels of other classes start fresh, positions stretch."""
    flags = [*PIXELS, "--start-from", "dit_xl.pt", "--official", "dit"]
    call(train.train, *flags, "--steps", "2", "--out", "tuned")
    run = build.open_run("tuned")
    assert run.config["process"] == "linear:learned_variance=True" and run.config["network"].startswith("dit-nano:")
    theirs = first_loss(build.open_run("dit_xl.pt"), run.config)
    assert math.isclose(runs.history("tuned")[0]["loss"], theirs, rel_tol=1e-5)
    call(train.train, *flags, "--steps", "3", "--decay", "constant", "--out", "more")
    call(train.train, *flags, "--steps", "4", "--decay", "constant", "--out", "more")
    assert [entry["step"] for entry in runs.history("more")] == [1, 2, 3, 4]
    larger = [word if word != "shapes:size=16" else "shapes:size=32" for word in flags]
    call(train.train, *larger, "--steps", "1", "--lr", "0", "--out", "larger")
    table = build.open_run("larger").objective.model.pos_embed
    assert table.shape == (1, 64, 64) and not torch.equal(table[0, :16], run.objective.model.pos_embed[0])
    call(train.train, *flags, "--steps", "1", "--lr", "0", "--unconditional", "--out", "none")
    assert "8 classes there, 0 here: their labels start fresh" in capsys.readouterr().out
    wrong = refused(capsys, train.train, *flags, "--process", "cosine", "--steps", "1", "--out", "x")
    assert "was trained with --process linear:learned_variance=True, not cosine" in wrong


def test_labels_of_other_classes_start_fresh_and_the_null_label_stays(files, capsys):
    objective = a_run(files / "ten", "dit-nano:depth=1,hidden_size=32,num_heads=1", 10, "linear:learned_variance=True")
    before = objective.state_dict()["model.y_embedder.embedding_table.weight"].clone()
    theirs = build.open_run("dit_s.pt").objective.state_dict()
    build.copy_weights(objective, "dit_s.pt")
    assert "dit_s.pt: 8 classes there, 10 here" in capsys.readouterr().out
    ours = objective.state_dict()
    table = ours.pop("model.y_embedder.embedding_table.weight")
    assert torch.equal(table[:-1], before[:-1])
    assert torch.equal(table[-1], theirs["model.y_embedder.embedding_table.weight"][-1])
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.slow
def test_fine_tuning_a_published_layout_on_cifar(here, capsys):  # noqa: F811
    """DiT-S/8 on CIFAR-10 for 200 steps, from a file in the published layout that this test makes: the loss starts
    where the file left it, far below a fresh network's. Needs CIFAR-10's files in the folder that CIFAR10 names.
    CIFAR10=/data/cifar python -m pytest -m slow -k fine_tuning_a_published -s"""
    folder = os.environ.get("CIFAR10")
    if not folder:
        pytest.skip("CIFAR10 names no folder")
    common = ["--data", "cifar10", "--data-dir", folder, "--process", "linear:learned_variance=True", "--batch", "16",
              "--lr", "3e-4", "--sample-n", "4", "--draw", "steps=2", "--log-every", "10", "--device", "cpu"]
    call(train.train, *common, "--model", "dit-s/8", "--steps", "150", "--out", "first")
    call(evaluate.evaluate, "export", "first", "file", "--to", "dit", "--weights", "model")
    call(train.train, *common, "--start-from", "file/dit.pt", "--official", "dit", "--steps", "200", "--seed", "1",
         "--out", "tuned")
    first, tuned = runs.history("first"), runs.history("tuned")
    print(f"\nloss at step 10: fresh {first[0]['loss']:.3f}, from the file {tuned[0]['loss']:.3f}; the file's last "
          f"{first[-1]['loss']:.3f}; after 200 more steps {tuned[-1]['loss']:.3f}")
    assert tuned[0]["loss"] < first[-1]["loss"] * 1.25 < first[0]["loss"]
