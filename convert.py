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
from diffusion import Discrete, RectifiedFlow
from layers import TDLN, PackedLinear, replace_ternary
from models import (
    DRWKV,
    MODELS,
    Branch,
    CompactChannelAttention,
    DiCo,
    DiCoBlock,
    Dimba,
    DimbaBlock,
    DiMR,
    DiT,
    DiTMoE,
    DRWKVBlock,
    FiT,
    FlagDiT,
    LinearAttention,
    LiT,
    Mamba,
    MambaBlock,
    Stitched,
    TerDiT,
    UViT,
    UViTBlock,
    options_of,
)


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


def preset_heads(prefix, depth, width):
    """The heads of the model of this family and size, which no shape tells; 64 channels a head where there is none."""
    for name in MODELS:
        if name.startswith(prefix):
            preset = options_of(name)
            if (preset["depth"].default, preset["hidden_size"].default) == (depth, width):
                return preset["num_heads"].default
    return max(1, width // 64)


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
    return dict(input_size=p * math.isqrt(state_dict["pos_embed"].shape[1]), patch_size=p, in_channels=C,
                hidden_size=D, depth=depth, num_heads=preset_heads("dit-", depth, D),
                mlp_ratio=state_dict["blocks.0.mlp.fc1.weight"].shape[0] / D,
                num_classes=state_dict["y_embedder.embedding_table.weight"].shape[0] - 1,
                learn_sigma=state_dict["final_layer.linear.bias"].numel() == 2 * C * p * p)


# ------------------------------------------------------------------------------- dico, uvit, dimr and its norms, td-ln


def renamed(rules, name):
    """A published parameter's name in our model: every rule (pattern, replacement) in turn."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def translated(rules, state_dict):
    return {renamed(rules, name): value for name, value in state_dict.items()}


DICO = [(r"^x_embedder\.proj", "x_embedder"), (r"^t_embedder_(\d)", lambda m: f"t_embedder.{int(m[1]) - 1}"),
        (r"embedding_table_(\d)", r"\1.embedding_table"), (r"^(en|de)coder_level_", r"\1coder"), (r"^latent", "middle"),
        (r"^(down|up)(\d)_(\d)\.body\.0", lambda m: f"{m[1]}{min(m[2], m[3])}"), (r"^reduce_chan_level", "join"),
        (r"\bca\.1\.", "cca.conv.")]


def dico(config, state_dict):
    """shallowdream204/DiCo. config["part"], as in the golden cases: "cca" and "block" are parts of the model."""
    c = dict(in_channels=4, hidden_size=1152, depth=[2, 5, 8, 5, 2], mlp_ratio=4, class_dropout_prob=0.1,
             num_classes=1000, learn_sigma=True, part=None) | config
    if c["part"] == "cca":
        gate = CompactChannelAttention(c["hidden_size"])
        return fill(gate, translated([(r"^1\.", "conv.")], state_dict), "this gate")
    if c["part"] == "block":
        return fill(DiCoBlock(c["hidden_size"], c["mlp_ratio"]), translated(DICO, state_dict), "this DiCo block")
    own = {k: c[k] for k in ("in_channels", "hidden_size", "depth", "mlp_ratio", "num_classes", "learn_sigma")}
    return fill(DiCo(null_class=c["class_dropout_prob"] > 0, **own), translated(DICO, state_dict), "this DiCo")


def infer_dico(state_dict):
    stages = "encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1"
    D, C, _, _ = state_dict["x_embedder.proj.weight"].shape
    return dict(input_size=32, in_channels=C, hidden_size=D,
                depth=[len({n.split(".")[1] for n in state_dict if n.startswith(s)}) for s in stages],
                mlp_ratio=state_dict["latent.0.conv4.weight"].shape[0] / (4 * D),
                num_classes=state_dict["y_embedder.embedding_table_0.weight"].shape[0] - 1,
                learn_sigma=state_dict["final_layer.out_proj.bias"].numel() == 2 * C)


UVIT = [(r"^patch_embed", "x_embedder"), (r"^time_embed", "t_embedder"), (r"^context_embed", "text_embedder"),
        (r"^label_emb", "y_embedder.embedding_table")]


def uvit(config, state_dict):
    """baofff/U-ViT, with labels or, given clip_dim, with text. Its num_classes counts the null label; -1 is none."""
    c = dict(img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
             qkv_bias=False, mlp_time_embed=False, num_classes=-1, conv=True, skip=True, part=None,
             num_clip_token=77) | config
    if c["part"] == "block":
        block = UViTBlock(c["dim"], c["num_heads"], c["mlp_ratio"], c["qkv_bias"], c["skip"])
        return fill(block, state_dict, "this U-ViT block")
    model = UViT(c["img_size"], c["patch_size"], c["in_chans"], c["embed_dim"], c["depth"], c["num_heads"],
                 c["mlp_ratio"], max(0, c["num_classes"] - 1), null_class=True, qkv_bias=c["qkv_bias"],
                 time_mlp=c["mlp_time_embed"], conv=c["conv"],
                 skip=c["skip"], text_width=c.get("clip_dim", 0), text_length=c["num_clip_token"])
    return fill(model, translated(UVIT, state_dict), "this U-ViT")


def infer_uvit(state_dict):
    D, C, p, _ = state_dict["patch_embed.proj.weight"].shape
    depth = 2 * len({n.split(".")[1] for n in state_dict if n.startswith("in_blocks.")})
    classes = state_dict["label_emb.weight"].shape[0] if "label_emb.weight" in state_dict else -1
    patches = state_dict["pos_embed"].shape[1] - 1 - (classes > 0)
    return dict(img_size=p * math.isqrt(patches), patch_size=p, in_chans=C, embed_dim=D, depth=depth,
                num_heads=preset_heads("uvit-", depth, D), num_classes=classes,
                mlp_ratio=state_dict["mid_block.mlp.fc1.weight"].shape[0] / D,
                qkv_bias="mid_block.attn.qkv.bias" in state_dict, mlp_time_embed="time_embed.0.weight" in state_dict,
                conv="final_layer.weight" in state_dict, skip="out_blocks.0.skip_linear.weight" in state_dict)


TD_LN = [(r"\b(weight|scale)\.(?=param|nodecay)", "gain."), (r"param([01])$", r"p\1"), (r"nodecay_weight$", "a"),
         (r"nodecay_bias$", "b")]
DIMR = TD_LN + [(r"^stages", "branches"), (r"input_layer\.1\.", "x_embedder."), (r"input_layer\.3\..*", "pos_embed"),
                (r"class_embeds", "y_embedder.embedding_table"), (r"upsample\.0", "cascade_norm"),
                (r"upsample\.1\.kernel", "up"), (r"upsample\.2", "up_norm"), (r"output_layer\.0", "norm"),
                (r"output_layer\.2", "head"), (r"skip_denses", "joins"), (r"block([12])\.norm", r"norm\1"),
                (r"block1\.query_key_value", "mixer.qkv"), (r"block1\.dense", "mixer.proj"), (r"block1\.1\.", "mixer."),
                (r"block2", "mlp")]


def td_ln(config, state_dict):
    """The time-dependent norm of qihao067/DiMR by itself."""
    return fill(TDLN(config["dim"], config["kind"] == "rmsnorm"), translated(TD_LN, state_dict), "this norm")


def dimr(config, state_dict):
    """qihao067/DiMR. Its num_classes counts the null label; 0 or None is none. config["part"] "branch": one branch."""
    state = translated(DIMR, state_dict)
    common = dict(num_classes=max(0, (config.get("num_classes") or 0) - 1))

    def branch(s):
        return dict(grid=(s["max_height"], s["max_width"]), dim=s["dim"], hidden=s["hidden_dim"],
                    blocks=s["num_blocks"], image_ratio=s["image_input_ratio"], patch_size=s["input_feature_ratio"],
                    num_heads=s["num_attention_heads"] if s["block_type"] == "TransformerBlock" else None,
                    kernel_size=s.get("kernel_size", 7), final_kernel=s["final_kernel_size"])

    if config.get("part") == "branch":
        own, C = branch(config["stage"]), config["channels"]
        if "up.weight" in state:
            width, L = state["up.weight"].shape
            own["cascade"] = L, math.isqrt(width // own["dim"])
        model = Branch(channels=C, out_channels=C, rms=config["norm_type"] == "TDRMSN", **common, **own)
    else:
        stages = [branch(s) for s in config["stage_configs"]]
        last = stages[-1]
        model = DiMR([side * last["patch_size"] * last["image_ratio"] for side in last["grid"]], config["channels"],
                     patch_sizes=[s["patch_size"] for s in stages], branches=stages,
                     norm="td-rms" if config["norm_type"] == "TDRMSN" else "td-ln", **common)
    own = model.state_dict()                                             # position tables: (h w, D) -> (h, w, D)
    state = {k: v.view(own[k].shape) if k.endswith("pos_embed") and k in own and v.numel() == own[k].numel() else v
             for k, v in state.items()}
    return fill(model, state, "this DiMR")


def infer_dimr(state_dict):
    names = sorted({n.split(".")[1] for n in state_dict if n.startswith("stages.")})
    stages = []
    for k in names:
        s = {n.removeprefix(f"stages.{k}."): v for n, v in state_dict.items() if n.startswith(f"stages.{k}.")}
        D, C, p, _ = s["input_layer.1.weight"].shape
        side, blocks = math.isqrt(len(s["input_layer.3.position_embeddings.weight"])), len(
            {n.split(".")[1] for n in s if n.startswith("blocks.")})
        conv = s.get("blocks.0.block1.1.weight")
        stages.append(dict(block_type="TransformerBlock" if conv is None else "ConvNeXtBlock", dim=D, num_blocks=blocks,
                           hidden_dim=s["blocks.0.block2.w0.weight"].shape[0], num_attention_heads=16,
                           max_height=side, max_width=side, image_input_ratio=1, input_feature_ratio=p,
                           kernel_size=7 if conv is None else conv.shape[-1],
                           final_kernel_size=s["output_layer.2.weight"].shape[-1]))
    classes = state_dict.get("stages.0.class_embeds.weight")
    return dict(channels=C, stage_configs=stages, num_classes=None if classes is None else len(classes),
                norm_type="TDRMSN" if "stages.0.blocks.0.block2.norm.scale.param0" in state_dict else "LN")


class CountsFromOne(Discrete):
    """A chain whose network is told of the steps as 1 .. T: steps are 0 .. T - 1 here."""

    def network_time(self, t):
        return t + 1


# ----------------------------------------------------------------------------------------------- fit, fitv2, flag-dit
# Parameters carry the published names. Published FiTv2 and Flag-DiT are told t in [0, 1] from noise to data and predict
# x1 - x0 = data - noise: `Reversed` is the process that calls them so.


class Reversed(RectifiedFlow):
    """Rectified flow whose network counts the time from noise, 0, to data, 1, and predicts x0 - eps."""

    def network_time(self, t):
        return 1 - t

    def split(self, output):
        return -output, None


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
    extent = c["max_pe_len_h"], c["max_pe_len_w"]
    gain = c["qk_norm_weight"] or c["q_norm"] == "w_layernorm"
    names = {"normal": "direct", "linear": "pi", "ntk-aware": "ntk", "ntk-aware-pro1": "ntk-pro1",
             "ntk-aware-pro2": "ntk-pro2"}
    model = FiT(image_size=p * math.isqrt(c["context_size"]), patch_size=p, in_channels=c["in_channels"], hidden_size=D,
                depth=c["depth"], num_heads=c["num_heads"], mlp_ratio=hidden / D, num_classes=c["num_classes"],
                learn_sigma=c["learn_sigma"], null_class=c["class_dropout_prob"] > 0, swiglu=c["use_swiglu"],
                qk_norm=("gain" if gain else True) if c["q_norm"] else False, theta=c["rope_theta"],
                lora_dim=c["adaln_lora_dim"] if c["adaln_type"] == "lora" else 0,
                rope=("vision-" if c["decouple"] else "") + names.get(rope, rope),
                extent=extent if all(extent) and not c["online_rope"] else None,
                time_shift=c["time_shifting"], trained=c["ori_max_pe_len"])
    return fill(model, state_dict, "this FiT")


def infer_fit(state_dict):
    D, _ = state_dict["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    swiglu, lora = "blocks.0.mlp.fc1_g.weight" in state_dict, "global_adaLN_modulation.1.weight" in state_dict
    hidden = state_dict[f"blocks.0.mlp.fc1{'_g' * swiglu}.weight"].shape[0]
    return dict(context_size=256, hidden_size=D, depth=depth, num_heads=preset_heads("fit", depth, D), patch_size=2,
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
# Published experts are one by one, ours are stacked: experts.<e>.gate_proj.weight, e = 0 .. E-1 -> gate (E, M, D).


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
    heads = D // len(state_dict["blocks.0.attn.q_norm.weight"]) if flash else preset_heads("dit-moe-", depth, D)
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

    def network_time(self, t):
        return t

    def split(self, output):
        return output.chunk(self.halves, 1)[0], None


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


# architecture: (its builder, the reader of its arguments, None for parts of which no file is published)
# --------------------------------------------------------------------------------------------- drwkv, dimba, mamba, lit
# Parameters carry the published names here too. A config may name a `part` of the model; the part is returned.


def drwkv(config, state_dict):
    """feizc/Diffusion-RWKV."""
    c = dict(img_size=32, patch_size=2, channels=4, embed_dim=384, depth=13, num_classes=-1, learn_sigma=False,
             hidden_rate=4, key_norm=False, post_norm=False, init_mode="fancy") | config
    same = {"hidden_rate": c["hidden_rate"], "key_norm": c["key_norm"], "post_norm": c["post_norm"],
            "init": c["init_mode"]}
    if c.get("part") == "block":
        return fill(DRWKVBlock(c["n_embd"], c["layer_id"], c["n_layer"], c["skip"], **same), state_dict, "this block")
    model = DRWKV(c["img_size"], c["patch_size"], c["channels"], c["embed_dim"], c["depth"], max(0, c["num_classes"]),
                  learn_sigma=c["learn_sigma"], drop_path=c.get("drop_path_rate", 0.1), **same)
    return fill(model, state_dict, "this Diffusion-RWKV")


def infer_drwkv(state_dict):
    D, C, p, _ = state_dict["patch_embed.proj.weight"].shape
    labels = state_dict.get("label_emb.embedding_table.weight")
    return dict(img_size=p * math.isqrt(state_dict["pos_embed"].shape[1]), patch_size=p, channels=C, embed_dim=D,
                depth=1 + sum(name.endswith("att.spatial_decay") for name in state_dict if "blocks." in name),
                num_classes=-1 if labels is None else len(labels) - 1,
                learn_sigma=state_dict["final_layer.linear.bias"].numel() == 2 * C * p * p,
                key_norm="mid_block.att.key_norm.weight" in state_dict)


def mamba(config, state_dict):
    """state-spaces/mamba's Mamba, and Dimba's two-sided one."""
    c = dict(d_state=16, d_conv=4, expand=2, bidirectional=False) | config
    rank = c.get("dt_rank") if c.get("dt_rank") != "auto" else None
    model = Mamba(c["d_model"], c["d_state"], c["d_conv"], c["expand"], c["bidirectional"], rank)
    return fill(model, state_dict, "this Mamba")


def dimba(config, state_dict):
    """feizc/Dimba. The position table is computed for the image at hand; the one in the file is not read."""
    c = dict(input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
             mamba_ratio=1.0, caption_channels=4096, model_max_length=120, pe_interpolation=1.0, micro_condition=False,
             pred_sigma=True) | config
    state_dict = {name: value for name, value in state_dict.items() if name != "pos_embed"}
    if c.get("part") == "attention_block":
        return fill(DimbaBlock(c["hidden_size"], c["num_heads"], c["mlp_ratio"]), state_dict, "this block")
    if c.get("part") == "mamba_blocks":
        blocks = nn.ModuleList(MambaBlock(c["dim"], d_state=c.get("d_state", 16)) for _ in range(c["n"]))
        return fill(blocks, state_dict, "these Mamba blocks")
    model = Dimba(c["input_size"], c["patch_size"], c["in_channels"], c["hidden_size"], c["depth"], c["num_heads"],
                  c["mlp_ratio"], c["mamba_ratio"], c["caption_channels"], c["model_max_length"], c["pe_interpolation"],
                  c["micro_condition"], learn_sigma=c["pred_sigma"])
    return fill(model, state_dict, "this Dimba")


def infer_dimba(state_dict):
    D, C, p, _ = state_dict["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    count = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("mamba_blocks."))
    length, width = state_dict["y_embedder.y_embedding"].shape
    side = p * math.isqrt(state_dict["pos_embed"].shape[1]) if "pos_embed" in state_dict else 32
    return dict(input_size=side, patch_size=p, in_channels=C, hidden_size=D, depth=depth, num_heads=16,
                mlp_ratio=state_dict["blocks.0.mlp.fc1.weight"].shape[0] / D, mamba_ratio=count / depth,
                caption_channels=width, model_max_length=length,
                micro_condition="ar_embedder.mlp.0.weight" in state_dict,
                pred_sigma=state_dict["final_layer.linear.bias"].numel() == 2 * C * p * p)


def lit(config, state_dict):
    """LiT with the parameter names of DiT and, for attention, q, kv, proj and dwc."""
    c = dict(input_size=32, patch_size=2, in_channels=4, mlp_ratio=4.0, num_classes=1000, kernel_size=5, qkv_bias=True,
             learn_sigma=True, class_dropout_prob=0.1) | config
    if c.get("part") == "module":
        module = LinearAttention(c["dim"], c["num_heads"], c["grid"], c["kernel_size"], c["qkv_bias"])
        return fill(module, state_dict, "this linear attention")
    model = LiT(c["input_size"], c["patch_size"], c["in_channels"], c["hidden_size"], c["depth"], c["num_heads"],
                c["mlp_ratio"], c["num_classes"], c["learn_sigma"], c["class_dropout_prob"] > 0, c["kernel_size"])
    return fill(model, state_dict, "this LiT")


def infer_lit(state_dict):
    width = state_dict["blocks.0.attn.dwc.weight"].shape[0]
    config = infer_dit(state_dict)
    return config | {"num_heads": config["hidden_size"] // width,
                     "kernel_size": state_dict["blocks.0.attn.dwc.weight"].shape[-1]}


OFFICIAL = {
    "dit": (dit, infer_dit),
    "dit-moe": (dit_moe, infer_dit_moe), "terdit": (terdit, infer_terdit), "t-stitch": (t_stitch, None),
    "dico": (dico, infer_dico), "uvit": (uvit, infer_uvit), "dimr": (dimr, infer_dimr), "td-ln": (td_ln, None),
    "drwkv": (drwkv, infer_drwkv), "dimba": (dimba, infer_dimba), "mamba-block": (mamba, None),
    "linear-attention": (lit, infer_lit), "lit": (lit, infer_lit),
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
