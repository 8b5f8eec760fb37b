"""Published checkpoints into our models: one function an architecture, from the published constructor's arguments and
parameter names to a model of `models.py` with the weights in place.

    load_official("dit", config, state_dict)     config: the published constructor's keyword arguments
    infer_config("dit", state_dict)              the same arguments read off a published file's shapes
    read_weights(path)                           a .pt, .bin or .safetensors file as a flat state dict
"""

import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoencoders import KLDecoder
from diffusion import RectifiedFlow
from layers import PackedLinear, replace_ternary
from models import MODELS, DiT, DiTMoE, FiT, FlagDiT, Stitched, TerDiT


def read_weights(path):
    """name -> tensor from a file of weights. Nothing in the file is executed. An "ema", "model" or "state_dict" inside
    is opened. Raises FileNotFoundError, ValueError."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"{path} is not a file of weights that can be read safely ({reason})") from None
    for key in ("ema", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return state


def read_safetensors(path):
    """The safetensors format: 8 bytes of header length, a JSON header {name: dtype, shape, data_offsets}, the raw
    numbers."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
    raw = np.memmap(path, np.uint8, "c")
    try:
        length = struct.unpack("<Q", raw[:8].tobytes())[0]
        if length > min(100_000_000, len(raw) - 8):
            raise ValueError(f"header of {length} bytes in a file of {len(raw)}")
        header, body, state = json.loads(raw[8:8 + length].tobytes()), raw[8 + length:], {}
        for name, entry in header.items():
            if name != "__metadata__":
                (begin, end), dtype, shape = entry["data_offsets"], dtypes[entry["dtype"]], entry["shape"]
                if not 0 <= begin <= end <= len(body) or end - begin != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{name} claims bytes {begin} to {end} for shape {shape}")
                state[name] = (torch.frombuffer(body[begin:end].copy(), dtype=dtype).view(shape) if end > begin else
                               torch.empty(shape, dtype=dtype))
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
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


# ------------------------------------------------------------------------------------------------------------------ dit
# Our parameters carry the published names, so the key map is the identity.


def dit(config, state_dict):
    """facebookresearch/DiT."""
    defaults = dict(input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
                    class_dropout_prob=0.1, num_classes=1000, learn_sigma=True)
    c = defaults | config
    size, drop = c.pop("input_size"), c.pop("class_dropout_prob")
    return fill(DiT(image_size=size, null_class=drop > 0, **c), state_dict, "this DiT")


def infer_dit(state_dict):
    D, C, p, _ = state_dict["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    presets = {(k["depth"], k["hidden_size"]): k["num_heads"]
               for name, (_, k) in MODELS.items() if name.startswith("dit-")}
    return dict(input_size=p * math.isqrt(state_dict["pos_embed"].shape[1]), patch_size=p, in_channels=C,
                hidden_size=D, depth=depth, num_heads=presets.get((depth, D), D // 64),
                mlp_ratio=state_dict["blocks.0.mlp.fc1.weight"].shape[0] / D,
                num_classes=state_dict["y_embedder.embedding_table.weight"].shape[0] - 1,
                learn_sigma=state_dict["final_layer.linear.bias"].numel() == 2 * C * p * p)


# ----------------------------------------------------------------------------------------------- fit, fitv2, flag-dit
# Parameters carry the published names. Published FiTv2 and Flag-DiT are told t in [0, 1] from noise to data and predict
# x1 - x0 = data - noise: `Reversed` makes them models of our flow process.


class Reversed(nn.Module):
    """A published flow model as our flow process calls models: t is 1000 at noise and 0 at data, eps - x0 predicted."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, y=None, **options):
        return -self.model(x, 1 - t / 1000, y, **options)


def defaults(config, known, fixed, what):
    """known updated by config. ValueError for an argument that is not known, or whose value is not the `fixed` one."""
    for key, value in config.items():
        if key not in known and (key not in fixed or value not in fixed[key]):
            raise ValueError(f"{what} with {key} = {value!r} is not built here")
    return known | {key: value for key, value in config.items() if key in known}


def fit(config, state_dict):
    """whlzy/FiT, versions 1 and 2."""
    c = defaults(config, dict(
        context_size=256, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
        class_dropout_prob=0.1, num_classes=1000, learn_sigma=True, use_swiglu=False, use_swiglu_large=False,
        q_norm=None, k_norm=None, qk_norm_weight=False, adaln_type="normal", adaln_lora_dim=None, rope_theta=10000.0,
        custom_freqs="normal", max_pe_len_h=None, max_pe_len_w=None, decouple=False, ori_max_pe_len=None,
        online_rope=False, time_shifting=1, use_sit=False, use_checkpoint=False, pretrain_ckpt=None, ignore_keys=None,
        finetune=None), dict(rel_pos_embed=["rope"], norm_type=["layernorm"], qkv_bias=[True], ffn_bias=[True],
                             adaln_bias=[True], add_rel_pe_to_v=[False]), "FiT")
    if c["q_norm"] != c["k_norm"] or c["q_norm"] not in (None, "layernorm", "w_layernorm") or \
            c["adaln_type"] not in ("normal", "lora"):
        raise ValueError(f"FiT with q_norm {c['q_norm']}, k_norm {c['k_norm']}, adaln_type {c['adaln_type']} "
                         "is not built here")
    D, p, rope = c["hidden_size"], c["patch_size"], c["custom_freqs"].lower()
    hidden = int(D * c["mlp_ratio"])
    if c["use_swiglu"] and not c["use_swiglu_large"]:
        hidden = hidden * 2 // 3
    gain = c["qk_norm_weight"] or c["q_norm"] == "w_layernorm"
    names = {"normal": "direct", "linear": "pi", "ntk-aware": "ntk", "ntk-aware-pro1": "ntk-pro1",
             "ntk-aware-pro2": "ntk-pro2"}
    model = FiT(image_size=p * math.isqrt(c["context_size"]), patch_size=p, in_channels=c["in_channels"], hidden_size=D,
                depth=c["depth"], num_heads=c["num_heads"], mlp_ratio=hidden / D, num_classes=c["num_classes"],
                learn_sigma=c["learn_sigma"], null_class=c["class_dropout_prob"] > 0, swiglu=c["use_swiglu"],
                qk_norm=("gain" if gain else True) if c["q_norm"] else False, theta=c["rope_theta"],
                lora_dim=c["adaln_lora_dim"] if c["adaln_type"] == "lora" else 0,
                rope=("vision-" if c["decouple"] else "") + names.get(rope, rope),
                extent=None if rope == "normal" or c["online_rope"] else (c["max_pe_len_h"], c["max_pe_len_w"]),
                time_shift=c["time_shifting"], trained=c["ori_max_pe_len"])
    return fill(model, state_dict, "this FiT")


def infer_fit(state_dict):
    D, _ = state_dict["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    presets = {(k["depth"], k["hidden_size"]): k["num_heads"] for _, (kind, k) in MODELS.items() if kind is FiT}
    swiglu, lora = "blocks.0.mlp.fc1_g.weight" in state_dict, "global_adaLN_modulation.1.weight" in state_dict
    hidden = state_dict[f"blocks.0.mlp.fc1{'_g' * swiglu}.weight"].shape[0]
    return dict(context_size=256, hidden_size=D, depth=depth, num_heads=presets.get((depth, D), D // 64), patch_size=2,
                in_channels=state_dict["x_embedder.proj.weight"].shape[1] // 4, use_swiglu=swiglu,
                use_swiglu_large=hidden == 4 * D, adaln_type="lora" if lora else "normal",
                adaln_lora_dim=state_dict["blocks.0.adaLN_modulation.1.weight"].shape[0] if lora else None,
                q_norm="layernorm" if lora else None, k_norm="layernorm" if lora else None,
                qk_norm_weight="blocks.0.attn.q_norm.weight" in state_dict,
                num_classes=state_dict["y_embedder.embedding_table.weight"].shape[0] - 1,
                learn_sigma=(state_dict["final_layer.linear.bias"].shape[0]
                             == 2 * state_dict["x_embedder.proj.weight"].shape[1]))


def flag_dit(config, state_dict):
    """Alpha-VLLM/Lumina-T2X, the folders Flag-DiT-ImageNet (labels) and lumina_t2i (with cap_feat_dim: text; with
    video, a convention of ours: [nextframe] too)."""
    c = defaults(config, dict(
        input_size=32, patch_size=2, in_channels=4, dim=4096, n_layers=32, n_heads=32, n_kv_heads=None, multiple_of=256,
        ffn_dim_multiplier=None, norm_eps=1e-5, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True,
        qk_norm=False, cap_feat_dim=0, rope_scaling_factor=1.0, ntk_factor=1.0, video=False), {}, "Flag-DiT")
    size = (1, c["input_size"], c["input_size"]) if c["video"] else c["input_size"]
    model = FlagDiT(image_size=size, patch_size=c["patch_size"], in_channels=c["in_channels"], hidden_size=c["dim"],
                    depth=c["n_layers"], num_heads=c["n_heads"], num_kv_heads=c["n_kv_heads"],
                    multiple_of=c["multiple_of"], multiplier=c["ffn_dim_multiplier"], norm_eps=c["norm_eps"],
                    qk_norm=c["qk_norm"], num_classes=c["num_classes"], null_class=c["class_dropout_prob"] > 0,
                    spare_channels=c["learn_sigma"], text_width=c["cap_feat_dim"], ntk_factor=c["ntk_factor"],
                    rope_scaling=c["rope_scaling_factor"])
    return fill(model, state_dict, "this Flag-DiT")


def flag_dit_text(config, state_dict):
    """lumina_t2i, whose text features default to LLaMA-2-13B's width."""
    return flag_dit({"cap_feat_dim": 5120} | config, state_dict)


def infer_flag_dit(state_dict):
    D, patch = state_dict["x_embedder.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("layers."))
    return dict(input_size=32, patch_size=2, in_channels=patch // 4, dim=D, n_layers=depth, n_heads=32,
                n_kv_heads=len(state_dict["layers.0.attention.wk.weight"]) * 32 // D, multiple_of=1,
                ffn_dim_multiplier=(len(state_dict["layers.0.feed_forward.w1.weight"]) + 0.5) / int(8 * D / 3),
                num_classes=len(state_dict["y_embedder.embedding_table.weight"]) - 1,
                learn_sigma=len(state_dict["final_layer.linear.bias"]) == 2 * patch,
                qk_norm="layers.0.attention.q_norm.weight" in state_dict)


# -------------------------------------------------------------------------------------------------------------- dit-moe
# Published experts are one by one, ours are stacked: experts.<e>.gate_proj.weight, e = 0 .. E-1 -> gate (E, H, D).


def dit_moe(config, state_dict):
    """feizc/DiT-MoE. pretraining_tp changes how its products are computed, not what they give."""
    defaults = dict(input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4,
                    class_dropout_prob=0.1, num_classes=1000, num_experts=8, num_experts_per_tok=2, pretraining_tp=2,
                    learn_sigma=True, use_flash_attn=False)
    c = defaults | config
    size, drop, _ = c.pop("input_size"), c.pop("class_dropout_prob"), c.pop("pretraining_tp")
    model = DiTMoE(image_size=size, null_class=drop > 0, top_k=c.pop("num_experts_per_tok"),
                   qk_norm=c.pop("use_flash_attn"), **c)
    return fill(model, moe_names(state_dict), "this DiT-MoE")


def moe_names(state_dict):
    """Published names and single experts -> ours, stacked."""
    state, experts = {}, {}
    for name, value in state_dict.items():
        if match := re.fullmatch(r"(.*)moe\.experts\.(\d+)\.(gate|up|down)_proj\.weight", name):
            experts.setdefault(f"{match[1]}mlp.{match[3]}", {})[int(match[2])] = value
            continue
        name = name.replace("moe.gate.", "mlp.router.").replace("moe.shared_experts.", "mlp.shared.")
        name = name.replace("_proj.weight", ".weight") if ".shared." in name else name
        state[name.replace("attn.Wqkv.", "attn.qkv.").replace("attn.out_proj.", "attn.proj.")] = value
    return state | {name: torch.stack([each[e] for e in sorted(each)]) for name, each in experts.items()}


def infer_dit_moe(state_dict):
    D = state_dict["x_embedder.proj.weight"].shape[0]
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    E, flash = len(state_dict["blocks.0.moe.gate.weight"]), "blocks.0.attn.Wqkv.weight" in state_dict
    presets = {(k["depth"], k["hidden_size"]): k["num_heads"]
               for name, (_, k) in MODELS.items() if name.startswith("dit-moe-")}
    heads = (D // len(state_dict["blocks.0.attn.q_norm.weight"]) if flash else presets.get((depth, D), D // 64))
    ratio = len(state_dict["blocks.0.moe.experts.0.gate_proj.weight"]) // D
    shape = infer_dit({**state_dict, "blocks.0.mlp.fc1.weight": state_dict["x_embedder.proj.weight"]})
    return shape | dict(num_heads=heads, mlp_ratio=ratio, num_experts=E, num_experts_per_tok=min(2, E),
                        use_flash_attn=flash)


class DiTMoEFlow(RectifiedFlow):
    """The rectified flow of the published XL and G: the network is told t itself, 0 to 1, and the second half of its
    channels, if it has one (learn_sigma), has no loss and is thrown away."""

    def __init__(self, learn_sigma=True):
        super().__init__()
        self.halves = 2 if learn_sigma else 1

    def network_time(self, t): return t
    def split(self, output): return output.chunk(self.halves, 1)[0], None


# --------------------------------------------------------------------------------------------------------------- terdit


def terdit(config, state_dict):
    """Lucky-Lance/TerDiT: master weights of its training layers, or its packed ones (uint8), or both in one file."""
    defaults = dict(input_size=32, patch_size=2, in_channels=4, dim=4096, n_layers=32, n_heads=32, n_kv_heads=None,
                    multiple_of=256, ffn_dim_multiplier=None, norm_eps=1e-5, class_dropout_prob=0.1, num_classes=1000,
                    learn_sigma=True, qk_norm=False)
    c = defaults | config
    renamed = {"image_size": "input_size", "hidden_size": "dim", "depth": "n_layers", "num_heads": "n_heads",
               "kv_heads": "n_kv_heads", "ffn_multiplier": "ffn_dim_multiplier"}
    c |= {ours: c.pop(theirs) for ours, theirs in renamed.items()}
    model = TerDiT(null_class=c.pop("class_dropout_prob") > 0, **c)
    packed = {terdit_name(name.removesuffix(".weight")) for name, value in state_dict.items()
              if value.dtype == torch.uint8}
    state = {terdit_name(name): value for name, value in state_dict.items()}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].view_as(model.x_embedder.proj.weight)
    return fill(replace_ternary(model, PackedLinear, packed), state, "this TerDiT")


def terdit_name(name):
    """Published name -> ours."""
    name = name.replace("x_embedder.", "x_embedder.proj.")
    for theirs, ours in {"w1": "gate", "w3": "up", "w2": "down"}.items():
        name = name.replace(f"feed_forward.{theirs}", f"feed_forward.{ours}")
    return name


def infer_terdit(state_dict):
    """What the weights cannot say is taken from the presets (heads) or left at 256x256 images (32x32 latents)."""
    shape = lambda name: (4 if state_dict[name].dtype == torch.uint8 else 1) * len(state_dict[name])
    D, patch = state_dict["x_embedder.weight"].shape
    channels = 4
    hidden, p = shape("layers.0.feed_forward.w1.weight"), math.isqrt(patch // channels)
    heads = 32 if D >= 1024 else max(1, D // 32)
    return dict(input_size=32, patch_size=p, in_channels=channels, dim=D,
                n_layers=1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("layers.")),
                n_heads=heads, n_kv_heads=shape("layers.0.attention.wk.weight") * heads // D, multiple_of=hidden,
                num_classes=len(state_dict["y_embedder.embedding_table.weight"]) - 1,
                learn_sigma=state_dict["final_layer.linear.bias"].numel() == 2 * patch,
                qk_norm="layers.0.attention.q_norm.weight" in state_dict)


# ------------------------------------------------------------------------------------------------------------- t-stitch


def t_stitch(config, state_dict):
    """NVlabs/T-Stitch, folder dit: DiTs named denoisers.0, denoisers.1, ..., and the ratio of the first of two, or the
    fractions of all."""
    models = []
    for k, c in enumerate(config["denoisers"]):
        prefix = f"denoisers.{k}."
        own = {name.removeprefix(prefix): v for name, v in state_dict.items() if name.startswith(prefix)}
        models.append(dit(c, own))
    fractions = config.get("fractions") or [config["ratio"], 1 - config["ratio"]]
    return Stitched(models, fractions)


OFFICIAL = {
    "dit": (dit, infer_dit), "dit-moe": (dit_moe, infer_dit_moe), "terdit": (terdit, infer_terdit),
    "t-stitch": (t_stitch, None),                                  # no file of its own is published
    "fit": (fit, infer_fit), "fitv2": (fit, infer_fit),
    "flag-dit": (flag_dit, infer_flag_dit),
    "flag-dit-text": (flag_dit_text, None),                        # its text is LLaMA's, which is not here
}


def load_official(arch, config, state_dict):
    """Our model of architecture `arch`, from the published constructor's arguments and published weights."""
    if arch not in OFFICIAL:
        raise ValueError(f"no published architecture is called {arch!r}: choose from {', '.join(OFFICIAL)}")
    return OFFICIAL[arch][0](config, state_dict)


def infer_config(arch, state_dict):
    """The published constructor's arguments, read off the weights' names and shapes."""
    if arch not in OFFICIAL:
        raise ValueError(f"no published architecture is called {arch!r}: choose from {', '.join(OFFICIAL)}")
    try:
        return OFFICIAL[arch][1](state_dict)
    except (KeyError, ValueError) as error:
        raise ValueError(f"these are not the weights of a published {arch}: {error} is missing") from None


def load_decoder(path):
    """The decoder of a Stable Diffusion autoencoder file (diffusers' `AutoencoderKL`), to draw latents with."""
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}         # names before 2023
    state = {}
    for name, value in read_weights(path).items():
        if name.startswith(("decoder.", "post_quant_conv.")):
            for old, new in older.items():
                name = name.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
            state[name] = value[:, :, 0, 0] if ".attentions." in name and value.ndim == 4 else value
    return fill(KLDecoder(), state, "Stable Diffusion's decoder").eval()
