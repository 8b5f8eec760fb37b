"""Published checkpoints into our models: one function an architecture, from the published constructor's arguments and
parameter names to a model of `models.py` with the weights in place.

    load_official("dit", config, state_dict)     config: the published constructor's keyword arguments
    infer_config("dit", state_dict)              the same arguments read off a published file's shapes
    read_weights(path)                           a .pt, .bin or .safetensors file as a flat state dict
"""

import json
import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoencoders import KLDecoder
from models import DRWKV, MODELS, Dimba, DimbaBlock, DiT, DRWKVBlock, LinearAttention, LiT, Mamba, MambaBlock


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
    model = Mamba(c["d_model"], c["d_state"], c["d_conv"], c["expand"], c["bidirectional"])
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
        return fill(nn.ModuleList(MambaBlock(c["dim"]) for _ in range(c["n"])), state_dict, "these Mamba blocks")
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


OFFICIAL = {"dit": (dit, infer_dit), "drwkv": (drwkv, infer_drwkv), "dimba": (dimba, infer_dimba),
            "mamba-block": (mamba, None), "linear-attention": (lit, infer_lit), "lit": (lit, infer_lit)}


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
