"""Published checkpoints into our models, and back: one key map an architecture.

    load_official("dit", config, state)     our model, from the published constructor's arguments and parameter names
    infer_config("dit", state)              these arguments, read off a published file's shapes
    recognise(state)                        whose names these are
    published(path)                         a file as it was published: network, process, how it draws; what was assumed
    exported("dit", model, options)         our weights under the published names, and the constructor's arguments

Contents: names; DiT, SiT, LiT, DiT-MoE, TerDiT; DiCo, U-ViT, DiMR; FiT, Flag-DiT; Diffusion-RWKV, Dimba, Mamba;
T-Stitch; the table of architectures; Stable Diffusion's autoencoder; processes of published networks; published files;
the command `export`.
"""

import inspect
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import convert_tokens
from autoencoders import KLAutoencoder, KLDecoder
from diffusion import PROCESSES, VP, Discrete, RectifiedFlow, chain, linear_betas, scaled_linear_betas
from layers import TDLN, PackedLinear, pair, position_table, replace_ternary
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
    backbone,
    options_of,
)
from weights import checked, fill, open_weights, read_weights  # noqa: F401 (the weights alone, by name)

# ---------------------------------------------------------------------------------------------------------------- names


class Layout(NamedTuple):
    """What there is to know of a published architecture."""
    title: str                              # as in "this is a DiT"
    kind: type                              # our class
    settings: Callable                      # the published constructor's arguments -> our class's
    arguments: Callable | None = None       # our class's arguments -> the published constructor's
    infer: Callable | None = None           # weights -> the published constructor's arguments
    unread: tuple = ()                      # those of them that no shape tells
    ours: Callable = lambda state, model: state              # weights under our names, for this model of ours
    theirs: Callable = lambda state, model: state            # and back
    null_class: str = "class_dropout_prob"                   # of the published constructor: above 0 with a null label


def renamed(state, pairs, back=False):
    """A state dict with parts of its names replaced: pairs (published, ours) of whole dotted parts, in this order."""
    rules = [(re.compile(rf"(?<![^.]){re.escape(old)}(?![^.])"), new)
             for old, new in ((pair[::-1] if back else pair) for pair in pairs)]
    changed = {}
    for name, value in state.items():
        for pattern, new in rules:
            name = pattern.sub(new, name)
        changed[name] = value
    return changed


def mapped(*pairs):
    """The `ours` and `theirs` of a layout whose names alone differ."""
    return {"ours": lambda state, model: renamed(state, pairs),
            "theirs": lambda state, model: renamed(state, pairs, back=True)}


def preset_heads(kind, depth, width):
    """The heads of the model of this class and size in our registry, which no shape tells; None if it has none."""
    for name in MODELS:
        preset = options_of(name)
        if backbone(name) is kind and (preset["depth"].default, preset["hidden_size"].default) == (depth, width):
            return preset["num_heads"].default
    return None


def heads(kind, depth, width):
    """As `preset_heads`; where there is no such preset 64 channels a head."""
    return preset_heads(kind, depth, width) or max(1, width // 64)


def count(state, prefix):
    """How many numbered parts "PREFIX.<k>." there are."""
    return 1 + max(int(name.removeprefix(prefix + ".").split(".")[0])
                   for name in state if name.startswith(prefix + "."))


def square_patch(numbers):
    """(channels, patch size) of a square patch of so many numbers: 4 channels (latents) if it can be, else 3 or 1."""
    for channels in (4, 3, 1, 16):
        side = math.isqrt(numbers // channels)
        if channels * side * side == numbers:
            return channels, side
    raise ValueError(f"a patch of {numbers} numbers")


def dropout_of(null_class):
    """A published class_dropout_prob: above 0 it makes a null label."""
    return 0.1 if null_class else 0.0


# ------------------------------------------------------------------------------------------------------------------ dit
# Our parameters carry the published names. SiT, 2401.08740, is the same network: which of the two a file is, its
# weights do not tell.

DIT = {"input_size": "image_size", "patch_size": "patch_size", "in_channels": "in_channels",
       "hidden_size": "hidden_size", "depth": "depth", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio",
       "num_classes": "num_classes", "learn_sigma": "learn_sigma"}


def dit_settings(config):
    """facebookresearch/DiT."""
    c = dict(input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
             class_dropout_prob=0.1, num_classes=1000, learn_sigma=True) | config
    return {ours: c[theirs] for theirs, ours in DIT.items()} | {"null_class": c["class_dropout_prob"] > 0}


def dit_arguments(k):
    return {theirs: k[ours] for theirs, ours in DIT.items()} | {"class_dropout_prob": dropout_of(k["null_class"])}


def infer_dit(state):
    D, C, p, _ = state["x_embedder.proj.weight"].shape
    depth = count(state, "blocks")
    return dict(input_size=p * math.isqrt(state["pos_embed"].shape[1]), patch_size=p, in_channels=C, hidden_size=D,
                depth=depth, num_heads=heads(DiT, depth, D),
                mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / D,
                num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
                learn_sigma=state["final_layer.linear.bias"].numel() == 2 * C * p * p)


def from_diffusers_dit(state):
    """diffusers' DiTTransformer2DModel -> facebookresearch/DiT. There each block has a copy of the embeddings, and the
    position table is computed."""
    first = "transformer_blocks.0.norm1.emb."
    found = {"x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": first + "timestep_embedder.linear_1",
             "t_embedder.mlp.2": first + "timestep_embedder.linear_2", "final_layer.adaLN_modulation.1": "proj_out_1",
             "final_layer.linear": "proj_out_2"}
    new = {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for ours, theirs in found.items() for kind in ("weight", "bias")}
    new["y_embedder.embedding_table.weight"] = state[first + "class_embedder.embedding_table.weight"]
    for k in range(count(state, "transformer_blocks")):
        block, own = f"transformer_blocks.{k}.", f"blocks.{k}."
        for kind in ("weight", "bias"):
            new[f"{own}attn.qkv.{kind}"] = torch.cat([state[f"{block}attn1.to_{letter}.{kind}"] for letter in "qkv"])
            for ours, theirs in DIFFUSERS_BLOCK.items():
                new[f"{own}{ours}.{kind}"] = state[f"{block}{theirs}.{kind}"]
    return new


DIFFUSERS_BLOCK = {"attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
                   "adaLN_modulation.1": "norm1.linear"}


def to_diffusers_dit(state):
    """The opposite of `from_diffusers_dit`."""
    new = {}
    for kind in ("weight", "bias"):
        new[f"pos_embed.proj.{kind}"] = state[f"x_embedder.proj.{kind}"]
        new[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        new[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
    for k in range(count(state, "blocks")):
        block, own = f"transformer_blocks.{k}.", f"blocks.{k}."
        table = state["y_embedder.embedding_table.weight"]
        new[f"{block}norm1.emb.class_embedder.embedding_table.weight"] = table
        for kind in ("weight", "bias"):
            for theirs, ours in (("linear_1", "t_embedder.mlp.0"), ("linear_2", "t_embedder.mlp.2")):
                new[f"{block}norm1.emb.timestep_embedder.{theirs}.{kind}"] = state[f"{ours}.{kind}"]
            for letter, part in zip("qkv", state[f"{own}attn.qkv.{kind}"].chunk(3)):
                new[f"{block}attn1.to_{letter}.{kind}"] = part
            for ours, theirs in DIFFUSERS_BLOCK.items():
                new[f"{block}{theirs}.{kind}"] = state[f"{own}{ours}.{kind}"]
    return new


# ------------------------------------------------------------------------------------------------------------------ lit


def lit_settings(config):
    """LiT with the parameter names of DiT and, for attention, q, kv, proj and dwc."""
    c = dict(input_size=32, patch_size=2, in_channels=4, mlp_ratio=4.0, num_classes=1000, kernel_size=5,
             learn_sigma=True, class_dropout_prob=0.1) | config
    return {ours: c[theirs] for theirs, ours in DIT.items()} | {
        "null_class": c["class_dropout_prob"] > 0, "kernel_size": c["kernel_size"]}


def lit_arguments(k):
    return dit_arguments(k) | {"kernel_size": k["kernel_size"]}


def infer_lit(state):
    width, _, kernel, _ = state["blocks.0.attn.dwc.weight"].shape
    config = infer_dit(state)
    return config | {"num_heads": config["hidden_size"] // width, "kernel_size": kernel}


# -------------------------------------------------------------------------------------------------------------- dit-moe
# Published experts are one by one, ours are stacked: experts.<e>.gate_proj.weight, e = 0 .. E-1 -> gate (E, M, D).

MOE = (("moe.gate", "mlp.router"), ("moe.shared_experts.gate_proj", "mlp.shared.gate"),
       ("moe.shared_experts.up_proj", "mlp.shared.up"), ("moe.shared_experts.down_proj", "mlp.shared.down"))
FLASH = (("attn.Wqkv", "attn.qkv"), ("attn.out_proj", "attn.proj"))     # the attention of the large ones
MOE_ARGUMENTS = DIT | {"num_experts": "num_experts", "num_experts_per_tok": "top_k", "use_flash_attn": "qk_norm"}


def moe_settings(config):
    """feizc/DiT-MoE. pretraining_tp changes how its products are computed, not what they give."""
    c = dict(input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4,
             class_dropout_prob=0.1, num_classes=1000, num_experts=8, num_experts_per_tok=2, learn_sigma=True,
             use_flash_attn=False) | config
    return {ours: c[theirs] for theirs, ours in MOE_ARGUMENTS.items()} | {
        "null_class": c["class_dropout_prob"] > 0}


def moe_arguments(k):
    return {theirs: k[ours] for theirs, ours in MOE_ARGUMENTS.items()} | {
        "class_dropout_prob": dropout_of(k["null_class"])}


def infer_moe(state):
    D, flash = state["x_embedder.proj.weight"].shape[0], "blocks.0.attn.Wqkv.weight" in state
    depth, E = count(state, "blocks"), len(state["blocks.0.moe.gate.weight"])
    shape = infer_dit({**state, "blocks.0.mlp.fc1.weight": state["x_embedder.proj.weight"]})
    return shape | dict(
        num_heads=D // len(state["blocks.0.attn.q_norm.weight"]) if flash else heads(DiTMoE, depth, D),
        mlp_ratio=len(state["blocks.0.moe.experts.0.gate_proj.weight"]) // D, num_experts=E,
        num_experts_per_tok=min(2, E), use_flash_attn=flash)


def moe_ours(state, model):
    new, experts = {}, {}
    for name, value in renamed(state, MOE + FLASH).items():
        if match := re.fullmatch(r"(.*)moe\.experts\.(\d+)\.(gate|up|down)_proj\.weight", name):
            experts.setdefault(f"{match[1]}mlp.{match[3]}", {})[int(match[2])] = value
        else:
            new[name] = value
    return new | {name: torch.stack([each[e] for e in sorted(each)]) for name, each in experts.items()}


def moe_theirs(state, model):
    new, flash = {}, "blocks.0.attn.q_norm.weight" in state
    for name, value in renamed(state, MOE + FLASH * flash, back=True).items():
        if match := re.fullmatch(r"(.*)mlp\.(gate|up|down)", name):
            new |= {f"{match[1]}moe.experts.{e}.{match[2]}_proj.weight": weight for e, weight in enumerate(value)}
        else:
            new[name] = value
    return new


# --------------------------------------------------------------------------------------------------------------- terdit

TERDIT = (("x_embedder", "x_embedder.proj"), ("feed_forward.w1", "feed_forward.gate"),
          ("feed_forward.w3", "feed_forward.up"), ("feed_forward.w2", "feed_forward.down"))
TERDIT_ARGUMENTS = {
    "input_size": "image_size", "patch_size": "patch_size", "in_channels": "in_channels", "dim": "hidden_size",
    "n_layers": "depth", "n_heads": "num_heads", "n_kv_heads": "kv_heads", "multiple_of": "multiple_of",
    "ffn_dim_multiplier": "ffn_multiplier", "norm_eps": "norm_eps", "num_classes": "num_classes",
    "learn_sigma": "learn_sigma", "qk_norm": "qk_norm"}


def terdit_settings(config):
    """Lucky-Lance/TerDiT: master weights of its training layers, or its packed ones (uint8), or both in one file."""
    c = dict(input_size=32, patch_size=2, in_channels=4, dim=4096, n_layers=32, n_heads=32, n_kv_heads=None,
             multiple_of=256, ffn_dim_multiplier=None, norm_eps=1e-5, class_dropout_prob=0.1, num_classes=1000,
             learn_sigma=True, qk_norm=False) | config
    return {ours: c[theirs] for theirs, ours in TERDIT_ARGUMENTS.items()} | {
        "null_class": c["class_dropout_prob"] > 0}


def terdit_arguments(k):
    return {theirs: k[ours] for theirs, ours in TERDIT_ARGUMENTS.items()} | {
        "class_dropout_prob": dropout_of(k["null_class"])}


def infer_terdit(state):
    """What the weights cannot say is taken from the presets (heads) or left at 256x256 images (32x32 latents)."""
    rows = lambda name: (4 if state[name].dtype == torch.uint8 else 1) * len(state[name])
    D, patch = state["x_embedder.weight"].shape
    channels, p = square_patch(patch)
    n_heads = 32 if D >= 1024 else max(1, D // 32)
    return dict(input_size=32, patch_size=p, in_channels=channels, dim=D, n_layers=count(state, "layers"),
                n_heads=n_heads, n_kv_heads=kv_heads(state, n_heads),
                **llama_width(D, rows("layers.0.feed_forward.w1.weight")),
                num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
                learn_sigma=state["final_layer.linear.bias"].numel() == 2 * patch,
                qk_norm="layers.0.attention.q_norm.weight" in state)


def kv_heads(state, n_heads):
    """Heads of keys and values where there are fewer of them than of queries, else None."""
    rows, D = state["layers.0.attention.wk.weight"].shape
    n_kv = (4 * rows if state["layers.0.attention.wk.weight"].dtype == torch.uint8 else rows) * n_heads // D
    return None if n_kv == n_heads else n_kv


def llama_width(D, hidden):
    """The published arguments that make a SwiGLU of this hidden width: LLaMA's own, or just these numbers."""
    own = -(-int(8 * D / 3) // 256) * 256
    return dict(multiple_of=256 if hidden == own else 1,
                ffn_dim_multiplier=None if hidden == own else (hidden + 0.5) / int(8 * D / 3))


def terdit_ours(state, model):
    """Layers that the file has packed are packed in the model too."""
    state = renamed(state, TERDIT)
    packed = {name.removesuffix(".weight") for name, value in state.items() if value.dtype == torch.uint8}
    replace_ternary(model, PackedLinear, packed)
    embed = "x_embedder.proj.weight"
    return state | {embed: state[embed].view_as(model.x_embedder.proj.weight)}


def terdit_theirs(state, model):
    state = renamed(state, TERDIT, back=True)
    return state | {"x_embedder.weight": state["x_embedder.weight"].flatten(1)}


# ----------------------------------------------------------------------------------------------------------------- dico

DICO = (("x_embedder.proj", "x_embedder"), ("t_embedder_1", "t_embedder.0"), ("t_embedder_2", "t_embedder.1"),
        ("t_embedder_3", "t_embedder.2"), ("embedding_table_0", "0.embedding_table"),
        ("embedding_table_1", "1.embedding_table"), ("embedding_table_2", "2.embedding_table"),
        ("encoder_level_1", "encoder1"), ("encoder_level_2", "encoder2"), ("latent", "middle"),
        ("decoder_level_2", "decoder2"), ("decoder_level_1", "decoder1"), ("down1_2.body.0", "down1"),
        ("down2_3.body.0", "down2"), ("up3_2.body.0", "up2"), ("up2_1.body.0", "up1"),
        ("reduce_chan_level2", "join2"), ("reduce_chan_level1", "join1"), ("ca.1", "cca.conv"))


def dico_settings(config):
    """shallowdream204/DiCo. It has no position table, so that its input_size is no argument of the published code."""
    c = dict(input_size=32, in_channels=4, hidden_size=1152, depth=[2, 5, 8, 5, 2], mlp_ratio=4, class_dropout_prob=0.1,
             num_classes=1000, learn_sigma=True) | config
    return {"image_size": c["input_size"], "null_class": c["class_dropout_prob"] > 0,
                  "depth": tuple(c["depth"])} | {
        key: c[key] for key in ("in_channels", "hidden_size", "mlp_ratio", "num_classes", "learn_sigma")}


def dico_arguments(k):
    own = {key: k[key] for key in ("in_channels", "hidden_size", "mlp_ratio", "num_classes", "learn_sigma")}
    return own | {"input_size": k["image_size"], "depth": list(k["depth"]),
                  "class_dropout_prob": dropout_of(k["null_class"])}


def infer_dico(state):
    stages = "encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1"
    D, C, _, _ = state["x_embedder.proj.weight"].shape
    return dict(input_size=32, in_channels=C, hidden_size=D, depth=[count(state, stage) for stage in stages],
                mlp_ratio=state["latent.0.conv4.weight"].shape[0] / (4 * D),
                num_classes=state["y_embedder.embedding_table_0.weight"].shape[0] - 1,
                learn_sigma=state["final_layer.out_proj.bias"].numel() == 2 * C)


def dico_part(config, state):
    """Parts of a DiCo: "cca" and "block"."""
    if config["part"] == "cca":
        return fill(CompactChannelAttention(config["hidden_size"]), renamed(state, [("1", "conv")]), "this gate")
    block = DiCoBlock(config["hidden_size"], config.get("mlp_ratio", 4))
    return fill(block, renamed(state, DICO), "this DiCo block")


# ----------------------------------------------------------------------------------------------------------------- uvit

UVIT = (("patch_embed", "x_embedder"), ("time_embed", "t_embedder"), ("context_embed", "text_embedder"),
        ("label_emb", "y_embedder.embedding_table"))
UVIT_ARGUMENTS = {
    "img_size": "image_size", "patch_size": "patch_size", "in_chans": "in_channels", "embed_dim": "hidden_size",
    "depth": "depth", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio", "qkv_bias": "qkv_bias",
    "mlp_time_embed": "time_mlp", "conv": "conv", "skip": "skip", "clip_dim": "text_width",
    "num_clip_token": "text_length"}


def uvit_settings(config):
    """baofff/U-ViT, with labels or, given clip_dim, with text. Its num_classes counts the null label, which the file of
    1000 rows (ImageNet 64x64) does not have; -1 is none."""
    c = dict(img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
             qkv_bias=False, mlp_time_embed=False, num_classes=-1, conv=True, skip=True, clip_dim=0,
             num_clip_token=77) | config
    null = c["num_classes"] != 1000
    return {ours: c[theirs] for theirs, ours in UVIT_ARGUMENTS.items()} | {
        "num_classes": max(0, c["num_classes"] - null), "null_class": null}


def uvit_arguments(k):
    own = {theirs: k[ours] for theirs, ours in UVIT_ARGUMENTS.items()}
    if k["text_width"]:
        return own
    del own["clip_dim"], own["num_clip_token"]
    return own | {"num_classes": k["num_classes"] + k["null_class"] if k["num_classes"] else -1}


def infer_uvit(state):
    D, C, p, _ = state["patch_embed.proj.weight"].shape
    depth, text = 2 * count(state, "in_blocks"), state.get("context_embed.weight")
    classes = len(state["label_emb.weight"]) if "label_emb.weight" in state else -1
    patches = state["pos_embed"].shape[1] - 1 - (classes > 0) - (77 if text is not None else 0)
    own = dict(img_size=p * math.isqrt(patches), patch_size=p, in_chans=C, embed_dim=D, depth=depth,
               num_heads=heads(UViT, depth, D) if text is None else max(1, D // 64), num_classes=classes,
               mlp_ratio=state["mid_block.mlp.fc1.weight"].shape[0] / D,
               qkv_bias="mid_block.attn.qkv.bias" in state, mlp_time_embed="time_embed.0.weight" in state,
               conv="final_layer.weight" in state, skip="out_blocks.0.skip_linear.weight" in state)
    return own | (dict(clip_dim=text.shape[1], num_clip_token=77) if text is not None else {})


def uvit_part(config, state):
    """One block of a U-ViT."""
    c = dict(mlp_ratio=4.0, qkv_bias=False, skip=True) | config
    block = UViTBlock(c["dim"], c["num_heads"], c["mlp_ratio"], c["qkv_bias"], c["skip"])
    return fill(block, state, "this U-ViT block")


# ----------------------------------------------------------------------------------------------------------------- dimr

DIMR = (("stages", "branches"), ("input_layer.1", "x_embedder"),
        ("input_layer.3.position_embeddings.weight", "pos_embed"), ("class_embeds", "y_embedder.embedding_table"),
        ("upsample.0", "cascade_norm"), ("upsample.1.kernel", "up"), ("upsample.2", "up_norm"),
        ("output_layer.0", "norm"), ("output_layer.2", "head"), ("skip_denses", "joins"), ("block1.norm", "norm1"),
        ("block2.norm", "norm2"), ("block1.query_key_value", "mixer.qkv"), ("block1.dense", "mixer.proj"),
        ("block1.1", "mixer"), ("block2", "mlp"))
TD_LN = {"param0": "p0", "param1": "p1", "nodecay_weight": "a", "nodecay_bias": "b"}


def td_ln_ours(state):
    """The time-dependent norms' parameters: gains are called weight, or scale where there is no bias."""
    def ours(match):
        return f"{'bias' if match[1] == 'bias' else 'gain'}.{TD_LN[match[2]]}"

    return {re.sub(rf"\b(weight|scale|bias)\.({'|'.join(TD_LN)})$", ours, name): v for name, v in state.items()}


def td_ln_theirs(state):
    """The opposite of `td_ln_ours`."""
    back, new = {short: name for name, short in TD_LN.items()}, {}
    for name, value in state.items():
        if match := re.fullmatch(r"((?:.*\.)?)(gain|bias)\.(p0|p1|a|b)", name):
            gain = "weight" if f"{match[1]}bias.p0" in state else "scale"
            name = f"{match[1]}{'bias' if match[2] == 'bias' else gain}.{back[match[3]]}"
        new[name] = value
    return new


def td_ln(config, state):
    """The time-dependent norm of qihao067/DiMR by itself."""
    return fill(TDLN(config["dim"], config["kind"] == "rmsnorm"), td_ln_ours(state), "this norm")


def branch_settings(s):
    """A published stage as the arguments of our `Branch`."""
    return dict(grid=(s["max_height"], s["max_width"]), dim=s["dim"], hidden=s["hidden_dim"], blocks=s["num_blocks"],
                image_ratio=s["image_input_ratio"], patch_size=s["input_feature_ratio"],
                num_heads=s["num_attention_heads"] if s["block_type"] == "TransformerBlock" else None,
                kernel_size=s.get("kernel_size", 7), final_kernel=s["final_kernel_size"])


def dimr_settings(config):
    """qihao067/DiMR. Its num_classes counts the null label; 0 or None is none. Stages that follow the rule of the
    published ones are written as our presets are, others as `branches`."""
    stages = [branch_settings(s) for s in config["stage_configs"]]
    first, last = stages[0], stages[-1]
    size = [side * last["patch_size"] * last["image_ratio"] for side in last["grid"]]
    own = dict(image_size=size[0] if size[0] == size[1] else tuple(size), in_channels=config["channels"],
               num_classes=max(0, (config.get("num_classes") or 0) - 1),
               norm="td-rms" if config["norm_type"] == "TDRMSN" else "td-ln",
               patch_sizes=tuple(s["patch_size"] for s in stages), hidden_size=first["dim"], depth=first["blocks"],
               num_heads=first["num_heads"] or 1)
    plain = [dict(grid=tuple(side // s["patch_size"] for side in size), dim=first["dim"] >> k,
                  hidden=2 * (first["dim"] >> k), blocks=(first["blocks"] + 1) // 2 if k else first["blocks"],
                  image_ratio=1, patch_size=s["patch_size"], num_heads=None if k else own["num_heads"], kernel_size=7,
                  final_kernel=3) for k, s in enumerate(stages)]
    odd = lambda s: s | {"blocks": s["blocks"] // 2}                 # an even number of blocks gets one more
    alike = [odd(s) for s in plain] == [odd(s) for s in stages]
    return own if alike else own | {"branches": tuple(stages)}


def dimr_arguments(k):
    size, stages = k["image_size"], []
    for i, patch in enumerate(k["patch_sizes"]):
        sides = [side // patch for side in ([size] * 2 if isinstance(size, int) else size)]
        own = dict(dim=k["hidden_size"] >> i, hidden_dim=2 * (k["hidden_size"] >> i), dropout_prob=0,
                   num_blocks=(k["depth"] + 1) // 2 if i else k["depth"], max_height=sides[0], max_width=sides[1],
                   image_input_ratio=1, input_feature_ratio=patch, final_kernel_size=3)
        kind = {"block_type": "ConvNeXtBlock", "kernel_size": 7} if i else \
            {"block_type": "TransformerBlock", "num_attention_heads": k["num_heads"]}
        stages.append(kind | own)
    return dict(channels=k["in_channels"], stage_configs=stages, norm_type="TDRMSN" if k["norm"] == "td-rms" else "LN",
                num_classes=k["num_classes"] + 1 if k["num_classes"] else None)


def infer_dimr(state):
    stages = []
    for k in range(count(state, "stages")):
        s = {n.removeprefix(f"stages.{k}."): v for n, v in state.items() if n.startswith(f"stages.{k}.")}
        D, C, p, _ = s["input_layer.1.weight"].shape
        side, blocks = math.isqrt(len(s["input_layer.3.position_embeddings.weight"])), count(s, "blocks")
        conv = s.get("blocks.0.block1.1.weight")
        stages.append(dict(block_type="TransformerBlock" if conv is None else "ConvNeXtBlock", dim=D, num_blocks=blocks,
                           hidden_dim=s["blocks.0.block2.w0.weight"].shape[0],
                           num_attention_heads=preset_heads(DiMR, blocks, D) or 16,
                           max_height=side, max_width=side, image_input_ratio=1, input_feature_ratio=p,
                           kernel_size=7 if conv is None else conv.shape[-1],
                           final_kernel_size=s["output_layer.2.weight"].shape[-1]))
    classes = state.get("stages.0.class_embeds.weight")
    return dict(channels=C, stage_configs=stages, num_classes=None if classes is None else len(classes),
                norm_type="TDRMSN" if "stages.0.blocks.0.block2.norm.scale.param0" in state else "LN")


def dimr_ours(state, model):
    """Position tables (h w, D) are (h, w, D) here."""
    state, own = renamed(td_ln_ours(state), DIMR), model.state_dict()
    return {name: v.view(own[name].shape) if name.endswith("pos_embed") and name in own
            and v.numel() == own[name].numel() else v for name, v in state.items()}


def dimr_theirs(state, model):
    state = {name: v.flatten(0, 1) if name.endswith("pos_embed") else v for name, v in state.items()}
    return td_ln_theirs(renamed(state, DIMR, back=True))


def dimr_part(config, state):
    """One branch of a DiMR."""
    own, C = branch_settings(config["stage"]), config["channels"]
    state = renamed(td_ln_ours(state), DIMR)
    if "up.weight" in state:
        width, L = state["up.weight"].shape
        own["cascade"] = L, math.isqrt(width // own["dim"])
    model = Branch(channels=C, out_channels=C, rms=config["norm_type"] == "TDRMSN",
                   num_classes=max(0, (config.get("num_classes") or 0) - 1), **own)
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"].view_as(model.pos_embed)
    return fill(model, state, "this branch of a DiMR")


# ------------------------------------------------------------------------------------------------------- fit and fitv2
# Parameters carry the published names.

FIT_ROPE = {"normal": "direct", "linear": "pi", "ntk-aware": "ntk", "ntk-aware-pro1": "ntk-pro1",
            "ntk-aware-pro2": "ntk-pro2"}


def fit_settings(config):
    """whlzy/FiT, versions 1 and 2."""
    c = checked(config, dict(
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
    extent, gain = (c["max_pe_len_h"], c["max_pe_len_w"]), c["qk_norm_weight"] or c["q_norm"] == "w_layernorm"
    return dict(
        image_size=p * math.isqrt(c["context_size"]), patch_size=p, in_channels=c["in_channels"], hidden_size=D,
        depth=c["depth"], num_heads=c["num_heads"], mlp_ratio=hidden / D, num_classes=c["num_classes"],
        learn_sigma=c["learn_sigma"], null_class=c["class_dropout_prob"] > 0, swiglu=c["use_swiglu"],
        qk_norm=("gain" if gain else True) if c["q_norm"] else False, theta=c["rope_theta"],
        lora_dim=c["adaln_lora_dim"] if c["adaln_type"] == "lora" else 0,
        rope=("vision-" if c["decouple"] else "") + FIT_ROPE.get(rope, rope),
        extent=extent if all(extent) and not c["online_rope"] else None, time_shift=c["time_shifting"],
        trained=c["ori_max_pe_len"])


def fit_arguments(k):
    own = {key: k[key] for key in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes",
                                   "learn_sigma")}
    hidden, D = int(k["hidden_size"] * k["mlp_ratio"] + 1e-6), k["hidden_size"]
    large = hidden == 4 * D or hidden != 4 * D * 2 // 3
    decouple, rope = k["rope"].startswith("vision-"), k["rope"].removeprefix("vision-")
    return own | dict(
        context_size=math.prod(side // k["patch_size"] for side in pair(k["image_size"])),
        mlp_ratio=hidden / D if large else 4.0,
        class_dropout_prob=dropout_of(k["null_class"]), use_swiglu=k["swiglu"],
        use_swiglu_large=bool(large and k["swiglu"]), q_norm="layernorm" if k["qk_norm"] else None,
        k_norm="layernorm" if k["qk_norm"] else None, qk_norm_weight=k["qk_norm"] == "gain",
        adaln_type="lora" if k["lora_dim"] else "normal", adaln_lora_dim=k["lora_dim"] or None, rope_theta=k["theta"],
        custom_freqs={ours: theirs for theirs, ours in FIT_ROPE.items()}.get(rope, rope), decouple=decouple,
        ori_max_pe_len=k["trained"], max_pe_len_h=(k["extent"] or (None, None))[0],
        max_pe_len_w=(k["extent"] or (None, None))[1], time_shifting=k["time_shift"], use_sit=not k["learn_sigma"])


def infer_fit(state):
    D, patch = state["x_embedder.proj.weight"].shape
    (channels, p), depth = square_patch(patch), count(state, "blocks")
    swiglu, lora = "blocks.0.mlp.fc1_g.weight" in state, "global_adaLN_modulation.1.weight" in state
    hidden = state[f"blocks.0.mlp.fc1{'_g' * swiglu}.weight"].shape[0]
    return dict(context_size=256, hidden_size=D, depth=depth, num_heads=heads(FiT, depth, D), patch_size=p,
                in_channels=channels, use_swiglu=swiglu, use_swiglu_large=hidden == 4 * D,
                adaln_type="lora" if lora else "normal",
                adaln_lora_dim=state["blocks.0.adaLN_modulation.1.weight"].shape[0] if lora else None,
                q_norm="layernorm" if lora else None, k_norm="layernorm" if lora else None,
                qk_norm_weight="blocks.0.attn.q_norm.weight" in state,
                num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
                learn_sigma=state["final_layer.linear.bias"].shape[0] == 2 * patch)


# ------------------------------------------------------------------------------------------------------------- flag-dit
# Parameters carry the published names.

FLAG = {"patch_size": "patch_size", "in_channels": "in_channels", "dim": "hidden_size", "n_layers": "depth",
        "n_heads": "num_heads", "n_kv_heads": "num_kv_heads", "multiple_of": "multiple_of",
        "ffn_dim_multiplier": "multiplier", "norm_eps": "norm_eps", "learn_sigma": "spare_channels",
        "qk_norm": "qk_norm", "cap_feat_dim": "text_width", "rope_scaling_factor": "rope_scaling",
        "ntk_factor": "ntk_factor", "nextline": "nextline"}


def flag_settings(config):
    """Alpha-VLLM/Lumina-T2X, the folders Flag-DiT-ImageNet (labels) and lumina_t2i (with cap_feat_dim: text). Ours are
    video, for [nextframe] tokens, and nextline, for [nextline] tokens with labels. The second half of its channels
    (learn_sigma) is thrown away."""
    c = checked(config, dict(
        input_size=32, patch_size=2, in_channels=4, dim=4096, n_layers=32, n_heads=32, n_kv_heads=None, multiple_of=256,
        ffn_dim_multiplier=None, norm_eps=1e-5, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True,
        qk_norm=False, cap_feat_dim=0, rope_scaling_factor=1.0, ntk_factor=1.0, video=False, nextline=None), {},
        "Flag-DiT")
    size = (1, c["input_size"], c["input_size"]) if c["video"] else c["input_size"]
    return {ours: c[theirs] for theirs, ours in FLAG.items()} | {
        "image_size": size, "num_classes": c["num_classes"], "null_class": c["class_dropout_prob"] > 0}


def flag_text_settings(config):
    """lumina_t2i, whose text features default to LLaMA-2-13B's width."""
    return flag_settings({"cap_feat_dim": 5120} | config)


def flag_arguments(k):
    own = {theirs: k[ours] for theirs, ours in FLAG.items()} | {"input_size": k["image_size"]}
    if k["text_width"]:
        return own
    del own["cap_feat_dim"]
    return own | {"num_classes": k["num_classes"], "class_dropout_prob": dropout_of(k["null_class"])}


def infer_flag(state):
    D, patch = state["x_embedder.weight"].shape
    channels, p = square_patch(patch)
    gate = state.get("layers.0.attention.gate")
    n_heads = 32 if D % 64 == 0 else max(1, D // 32)
    n_heads = n_heads if gate is None else gate.numel()
    own = dict(input_size=32, patch_size=p, in_channels=channels, dim=D, n_layers=count(state, "layers"),
               n_heads=n_heads, n_kv_heads=kv_heads(state, n_heads),
               **llama_width(D, len(state["layers.0.feed_forward.w1.weight"])),
               learn_sigma=len(state["final_layer.linear.bias"]) == 2 * patch,
               qk_norm="layers.0.attention.q_norm.weight" in state)
    if gate is not None:
        return own | dict(input_size=128, cap_feat_dim=len(state["cap_embedder.0.weight"]), video="eof_token" in state)
    return own | dict(num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
                      nextline=True if "eol_token" in state else None)


# --------------------------------------------------------------------------------------------- drwkv, dimba, mamba
# Parameters carry the published names here too.

DRWKV_ARGUMENTS = {"img_size": "image_size", "patch_size": "patch_size", "channels": "in_channels",
                   "embed_dim": "hidden_size", "depth": "depth", "learn_sigma": "learn_sigma",
                   "hidden_rate": "hidden_rate", "key_norm": "key_norm", "post_norm": "post_norm", "init_mode": "init",
                   "drop_path_rate": "drop_path"}


def drwkv_settings(config):
    """feizc/Diffusion-RWKV. num_classes -1: no labels."""
    c = dict(img_size=32, patch_size=2, channels=4, embed_dim=384, depth=13, num_classes=-1, learn_sigma=False,
             hidden_rate=4, key_norm=False, post_norm=False, init_mode="fancy", drop_path_rate=0.1) | config
    return {ours: c[theirs] for theirs, ours in DRWKV_ARGUMENTS.items()} | {
        "num_classes": max(0, c["num_classes"])}


def drwkv_arguments(k):
    return {theirs: k[ours] for theirs, ours in DRWKV_ARGUMENTS.items()} | {"num_classes": k["num_classes"] or -1}


def infer_drwkv(state):
    D, C, p, _ = state["patch_embed.proj.weight"].shape
    labels = state.get("label_emb.embedding_table.weight")
    hidden = state["mid_block.ffn.key.weight"].shape[0]
    return dict(img_size=p * math.isqrt(state["pos_embed"].shape[1]), patch_size=p, channels=C, embed_dim=D,
                depth=1 + sum(name.endswith("att.spatial_decay") for name in state if "blocks." in name),
                num_classes=-1 if labels is None else len(labels) - 1, hidden_rate=hidden // D,
                learn_sigma=state["final_layer.linear.bias"].numel() == 2 * C * p * p,
                key_norm="mid_block.att.key_norm.weight" in state)


def drwkv_part(config, state):
    """One block of a Diffusion-RWKV."""
    c = dict(hidden_rate=4, key_norm=False, post_norm=False, init_mode="fancy") | config
    block = DRWKVBlock(c["n_embd"], c["layer_id"], c["n_layer"], c["skip"], hidden_rate=c["hidden_rate"],
                       key_norm=c["key_norm"], post_norm=c["post_norm"], init=c["init_mode"])
    return fill(block, state, "this block")


def mamba(config, state):
    """state-spaces/mamba's Mamba, and Dimba's two-sided one."""
    c = dict(d_state=16, d_conv=4, expand=2, bidirectional=False) | config
    rank = c.get("dt_rank") if c.get("dt_rank") != "auto" else None
    model = Mamba(c["d_model"], c["d_state"], c["d_conv"], c["expand"], c["bidirectional"], rank)
    return fill(model, state, "this Mamba")


DIMBA = {"input_size": "image_size", "patch_size": "patch_size", "in_channels": "in_channels",
         "hidden_size": "hidden_size", "depth": "depth", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio",
         "mamba_ratio": "mamba_ratio", "caption_channels": "text_width", "model_max_length": "text_length",
         "pe_interpolation": "pe_interpolation", "micro_condition": "micro_condition", "pred_sigma": "learn_sigma"}


def dimba_settings(config):
    """feizc/Dimba. The position table is computed for the image at hand; the one in the file is not read."""
    c = dict(input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
             mamba_ratio=1.0, caption_channels=4096, model_max_length=120, pe_interpolation=1.0, micro_condition=False,
             pred_sigma=True, d_state=16) | config
    return {ours: c[theirs] for theirs, ours in DIMBA.items()} | {"d_state": c["d_state"]}


def dimba_arguments(k):
    return {theirs: k[ours] for theirs, ours in DIMBA.items()} | {"d_state": k["d_state"]}


def infer_dimba(state):
    D, C, p, _ = state["x_embedder.proj.weight"].shape
    depth, mambas = count(state, "blocks"), count(state, "mamba_blocks")
    length, width = state["y_embedder.y_embedding"].shape
    return dict(input_size=p * math.isqrt(state["pos_embed"].shape[1]) if "pos_embed" in state else 32, patch_size=p,
                in_channels=C, hidden_size=D, depth=depth, num_heads=16,
                mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / D, mamba_ratio=mambas / depth,
                caption_channels=width, model_max_length=length, micro_condition="ar_embedder.mlp.0.weight" in state,
                pred_sigma=state["final_layer.linear.bias"].numel() == 2 * C * p * p,
                d_state=state["mamba_blocks.0.mixer.A_log"].shape[1])


def dimba_ours(state, model):
    return {name: value for name, value in state.items() if name != "pos_embed"}


def dimba_theirs(state, model):
    """With the position table that the published code keeps: sinusoids of the grid of training."""
    side, D = model.base, model.x_embedder.proj.weight.shape[0]
    table = position_table(D, side, side, (1 / model.pe_interpolation,) * 2)
    return state | {"pos_embed": table[None]}


def dimba_part(config, state):
    """A Transformer block of a Dimba, or some of its Mamba blocks."""
    state = dimba_ours(state, None)
    if config["part"] == "attention_block":
        block = DimbaBlock(config["hidden_size"], config["num_heads"], config.get("mlp_ratio", 4.0))
        return fill(block, state, "this block")
    blocks = nn.ModuleList(MambaBlock(config["dim"], d_state=config.get("d_state", 16)) for _ in range(config["n"]))
    return fill(blocks, state, "these Mamba blocks")


def lit_part(config, state):
    """LiT's attention by itself."""
    c = dict(kernel_size=5, qkv_bias=True) | config
    module = LinearAttention(c["dim"], c["num_heads"], c["grid"], c["kernel_size"], c["qkv_bias"])
    return fill(module, state, "this linear attention")


# ------------------------------------------------------------------------------------------------------------- t-stitch


def t_stitch(config, state):
    """NVlabs/T-Stitch, folder dit: DiTs named denoisers.0, denoisers.1, ..., and the ratio of the first of two, or the
    fractions of all."""
    models = []
    for k, c in enumerate(config["denoisers"]):
        prefix = f"denoisers.{k}."
        own = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        models.append(load_official("dit", c, own))
    fractions = config.get("fractions") or [config["ratio"], 1 - config["ratio"]]
    return Stitched(models, fractions)


# -------------------------------------------------------------------------------------------------------- architectures

DIT_LAYOUT = Layout("a DiT", DiT, dit_settings, dit_arguments, infer_dit, ("num_heads",))
OFFICIAL = {
    "dit": DIT_LAYOUT,
    "sit": DIT_LAYOUT._replace(title="a SiT"),
    "lit": Layout("a LiT", LiT, lit_settings, lit_arguments, infer_lit),
    "dit-moe": Layout("a DiT-MoE", DiTMoE, moe_settings, moe_arguments, infer_moe, ("num_heads", "num_experts_per_tok"),
                      moe_ours, moe_theirs),
    "terdit": Layout("a TerDiT", TerDiT, terdit_settings, terdit_arguments, infer_terdit,
                     ("n_heads", "n_kv_heads", "input_size", "norm_eps"), terdit_ours, terdit_theirs),
    "dico": Layout("a DiCo", DiCo, dico_settings, dico_arguments, infer_dico, ("input_size",), **mapped(*DICO)),
    "uvit": Layout("a U-ViT", UViT, uvit_settings, uvit_arguments, infer_uvit, ("num_heads",), **mapped(*UVIT)),
    "dimr": Layout("a DiMR", DiMR, dimr_settings, dimr_arguments, infer_dimr, (), dimr_ours, dimr_theirs),
    "fit": Layout("a FiT", FiT, fit_settings, fit_arguments, infer_fit, ("num_heads", "context_size")),
    "fitv2": Layout("FiTv2", FiT, fit_settings, fit_arguments, infer_fit, ("num_heads", "context_size")),
    "flag-dit": Layout("a Flag-DiT", FlagDiT, flag_settings, flag_arguments, infer_flag,
                       ("n_heads", "n_kv_heads", "input_size", "norm_eps")),
    "flag-dit-text": Layout("Lumina's Flag-DiT of text", FlagDiT, flag_text_settings, flag_arguments, infer_flag,
                            ("input_size", "norm_eps")),
    "drwkv": Layout("a Diffusion-RWKV", DRWKV, drwkv_settings, drwkv_arguments, infer_drwkv),
    "dimba": Layout("a Dimba", Dimba, dimba_settings, dimba_arguments, infer_dimba, ("num_heads", "pe_interpolation"),
                    dimba_ours, dimba_theirs),
}
OFFICIAL["linear-attention"] = OFFICIAL["lit"]       # its name among the recorded cases
# (architecture, config["part"]): what is published as a part of a model, or has no file of its own.
PARTS = {
    ("dico", "cca"): dico_part, ("dico", "block"): dico_part, ("uvit", "block"): uvit_part,
    ("dimr", "branch"): dimr_part, ("drwkv", "block"): drwkv_part, ("dimba", "attention_block"): dimba_part,
    ("dimba", "mamba_blocks"): dimba_part, ("linear-attention", "module"): lit_part, ("lit", "module"): lit_part,
    ("td-ln", None): td_ln,
    ("mamba-block", None): mamba, ("t-stitch", None): t_stitch,
}


def layout_of(arch):
    """The `Layout` of an architecture; ValueError for an unknown one."""
    if arch not in OFFICIAL:
        raise ValueError(f"no published architecture is called {arch!r}: choose from {', '.join(OFFICIAL)}")
    return OFFICIAL[arch]


def load_official(arch, config, state_dict):
    """Our model of architecture `arch`, from the published constructor's arguments and published weights.
    config["part"] names a part of the model to return instead."""
    part = config.get("part")
    if make := PARTS.get((arch, part)):
        return make(config, state_dict)
    layout = layout_of(arch)
    model = layout.kind(**layout.settings({key: value for key, value in config.items() if key != "part"}))
    return fill(model, ours(arch, state_dict, model), f"this {layout.title.split(' ', 1)[-1]}")


def ours(arch, state, model):
    """Published weights under the names of this model of ours. An empty label table, of a model without classes, has no
    place here."""
    own, state = model.state_dict(), layout_of(arch).ours(state, model)
    return {name: v for name, v in state.items()
            if name in own or not (name.endswith("embedding_table.weight") and len(v) == 1 and not v.any())}


def infer_config(arch, state_dict):
    """The published constructor's arguments, read off the weights' names and shapes."""
    layout = layout_of(arch)
    try:
        return layout.infer(state_dict)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"these are not the weights of a published {arch}: {missing}") from None


# A parameter that only this architecture's files hold. In this order: later names occur in earlier architectures too.
MARKS = {
    "blocks.0.moe.gate.weight": "dit-moe", "blocks.0.attn.dwc.weight": "lit", "mamba_blocks.0.norm.weight": "dimba",
    "mid_block.att.spatial_decay": "drwkv", "decoder_pred.weight": "uvit", "encoder_level_1.0.conv1.weight": "dico",
    "stages.0.input_layer.1.weight": "dimr", "layers.0.attention.wq.alphas": "terdit",
    "layers.0.attention_y_norm.weight": "flag-dit-text", "global_adaLN_modulation.1.weight": "fitv2",
}
# What is known by name, and not one of our architectures.
ELSEWHERE = {
    "Embed_0.word_embeddings.weight": "a MaskGIT: say --official maskgit",
    "decoder_pos_embed_learned": "a MAGE: say --official mage",
    "diffusion_pos_embed_learned": "a MAR: say --official mar",
    "context_embed.word_embeddings.weight": "a MaskGIT-r: say --official maskgit-r",
    "layers.0.attention_norm1.weight": "a Next-DiT of Lumina-Next, which is not built here",
    "blocks.0.cross_attn.q_linear.weight": "a PixArt, which is not built here",
    "decoder.conv_in.weight": "Stable Diffusion's autoencoder: it is named by --decoder",
    "first_stage_model.decoder.conv_in.weight": "all of Stable Diffusion: only its autoencoder is read, by --decoder",
}


def recognise(state):
    """The architecture whose names these weights have, or None."""
    for mark, arch in MARKS.items():
        if mark in state:
            return arch
    patch = state.get("x_embedder.proj.weight")
    if patch is not None and "blocks.0.attn.qkv.weight" in state and "y_embedder.embedding_table.weight" in state:
        if patch.ndim == 4 and "pos_embed" in state:
            return "dit"
        if patch.ndim == 2:
            return "fit"
    if "layers.0.attention.wq.weight" in state and "layers.0.attention_norm.weight" in state:
        return "flag-dit"
    return None


# --------------------------------------------------------------------------------------- stable diffusion's autoencoder

COMPVIS = (("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1"),
           ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"), ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
           ("mid.attn_1.k", "mid_block.attentions.0.to_k"), ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
           ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"), ("norm_out", "conv_norm_out"),
           ("nin_shortcut", "conv_shortcut"), ("downsample", "downsamplers.0"), ("upsample", "upsamplers.0"))
EARLIER = (("attentions.0.query", "attentions.0.to_q"), ("attentions.0.key", "attentions.0.to_k"),
           ("attentions.0.value", "attentions.0.to_v"), ("attentions.0.proj_attn", "attentions.0.to_out.0"))


def autoencoder_names(state):
    """The parameters of Stable Diffusion's autoencoder under diffusers' names of today: of CompVis's files (alone, or
    inside a whole Stable Diffusion), or of diffusers' files from before 2023."""
    whole = "first_stage_model."
    if any(name.startswith(whole) for name in state):
        state = {name.removeprefix(whole): v for name, v in state.items() if name.startswith(whole)}
    state = {name: v for name, v in state.items()
             if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}
    if any(name.startswith(("decoder.mid.", "decoder.up.")) for name in state):
        last = count(state, "decoder.up") - 1
        state = renamed(state, COMPVIS)

        def level(match):                            # CompVis counts the decoder's levels from the image
            side, k = match[1], int(match[2])
            return f"{side}_blocks.{last - k if side == 'up' else k}."

        state = {re.sub(r"(?<=coder\.)(up|down)\.(\d+)\.", level, name).replace(".block.", ".resnets."): v
                 for name, v in state.items()}
    state = renamed(state, EARLIER)
    return {name: v[:, :, 0, 0] if ".attentions." in name and v.ndim == 4 else v for name, v in state.items()}


def autoencoder_settings(state):
    """The arguments of `KLAutoencoder`, read off the shapes."""
    levels = count(state, "decoder.up_blocks")
    return dict(widths=tuple(len(state[f"decoder.up_blocks.{k}.resnets.0.conv1.weight"]) for k in range(levels)),
                blocks=count(state, "decoder.up_blocks.0.resnets"),
                latent_channels=state["decoder.conv_in.weight"].shape[1], quant="post_quant_conv.weight" in state)


def load_autoencoder(path, kind):
    """A published autoencoder's file as a `kind`, KLAutoencoder or KLDecoder."""
    state, what = autoencoder_names(open_weights(path).state), f"Stable Diffusion's autoencoder in {path}"
    try:
        arguments = autoencoder_settings(state)
    except (KeyError, ValueError):
        raise ValueError(f"{path} holds no autoencoder of Stable Diffusion's kind") from None
    if any("_blocks." in name and ".attentions." in name and "mid_block" not in name for name in state):
        raise ValueError(f"{path}: an autoencoder with attention in its levels is not built here")
    if kind is KLDecoder:
        state = {name: v for name, v in state.items() if name.startswith(("decoder.", "post_quant_conv."))}
    elif not any(name.startswith("encoder.") for name in state):
        raise ValueError(f"{path} holds a decoder alone, and an encoder is needed")
    return fill(kind(**arguments), state, what).eval()


def load_decoder(path):
    """The decoder of a Stable Diffusion autoencoder's file, to draw latents with."""
    return load_autoencoder(path, KLDecoder)


def load_tokenizer(path):
    """A published autoencoder's file as a tokenizer of images, with encode and decode: Stable Diffusion's, or MaskGIT's
    VQGAN as the converted file that circulates."""
    state = read_weights(path)
    if "quantize.embedding.weight" in state:
        return convert_tokens.load_tokens("vqgan", convert_tokens.infer_tokens("vqgan", state), state).eval()
    return load_autoencoder(path, KLAutoencoder)


# ---------------------------------------------------------------------------------- processes of the published networks
# What published networks are told and predict, where it is not what the house's own processes do. `--process NAME`.


class LogChain(Discrete):
    """A chain whose log alpha is linear between its steps, as in DPM-Solver's code (2206.00927, appendix), and whose
    network may be told of any time between them."""
    first = 0                                        # what it is told at the first step

    def alpha(self, t):
        log_alpha = self.table(t.device).log() / 2                       # entry t + 1 belongs to t
        low = t.floor().long().clamp(-1, self.T - 2)
        return torch.lerp(log_alpha[low + 1], log_alpha[low + 2], (t - low).to(log_alpha.dtype)).exp()

    def time_of(self, s):
        falling = self.table(s.device).log() / 2
        log_alpha = -0.5 * torch.log1p(s.to(falling.dtype) ** 2)
        high = torch.searchsorted(-falling, -log_alpha.contiguous()).clamp(1, self.T)
        return high - 2 + ((log_alpha - falling[high - 1]) / (falling[high] - falling[high - 1])).clamp(0, 1)

    def known_time(self, t):
        return t

    def network_time(self, t):
        return t + self.first


class CountsFromOne(LogChain):
    """A chain whose network is told of its steps as 1 .. T; here they are 0 .. T - 1."""
    first = 1


class UViTVP(VP):
    """The VP SDE as U-ViT draws from it by DPM-Solver: down to t = 0.0001 (2209.12152)."""
    t_least = 1e-4


class Reversed(RectifiedFlow):
    """Rectified flow as SiT, FiTv2 and Lumina have it. The network counts the time from noise, 0, to data, 1, and
    predicts x0 - eps. spare: the second half of its channels is thrown away, as in SiT."""

    def __init__(self, prediction=None, *, spare=False, **options):
        super().__init__(prediction, **options)
        self.spare = spare

    def network_time(self, t):
        return 1 - t

    def split(self, output):
        return -output.chunk(1 + self.spare, 1)[0], None


class DiTMoEFlow(RectifiedFlow):
    """The rectified flow of DiT-MoE's XL and G. The network is told t itself, 0 to 1, and the second half of its
    channels, if it has one (spare), has no loss and is thrown away."""

    def __init__(self, spare=True, prediction=None, **options):
        super().__init__(prediction, **options)
        self.spare = spare

    def network_time(self, t):
        return t

    def split(self, output):
        return output.chunk(1 + self.spare, 1)[0], None


PROCESSES |= {"sit-flow": Reversed, "moe-flow": DiTMoEFlow, "uvit-vp": UViTVP,
              "uvit-chain": chain(scaled_linear_betas, "Stable Diffusion's chain as U-ViT-H and DiMR have it: the "
                                  "network is told of the steps as 1 .. 1000", kind=CountsFromOne),
              "dimba-chain": chain(linear_betas, "The linear chain as Dimba draws from it by DPM-Solver++: the network "
                                   "is told of times between the steps", kind=LogChain)}


# ------------------------------------------------------------------------------------------------------ published files

class Published(NamedTuple):
    """A published file, and how it was published."""
    arch: str
    title: str                              # what it is, in a line
    arguments: dict                         # of the published constructor
    settings: dict                          # of our class
    name: str | None                        # of the registry, with `options` it makes this model; None if none does
    options: dict
    state: dict                             # the published names and values
    process: str                            # name and options
    density: str                            # of its training times
    draw: dict                              # drawing options
    latent_scale: float                     # of the autoencoder whose latents it draws
    stride: int                             # pixels a latent, 1 for a model of pixels
    order: list | None                      # the row of the label table of each class, where it is not the class's own
    assumed: list                           # sentences on what the file does not say
    aside: list                             # what stands among the weights and is none
    run: dict                               # settings of the run of ours that it was exported from


def published(path, arch: str | None = None, size: int | None = None, top_k: int | None = None,
              heads: int | None = None):
    """A published file as `Published`. arch: its architecture (None: by its names). size: side in pixels of the images
    that it draws, top_k: experts a token, heads: of attention, each where neither weights nor settings beside them nor
    the file's name tell it. Raises FileNotFoundError, ValueError that names the file and what to do."""
    return described(open_weights(path), arch, size, top_k, heads)


def described(found, arch=None, size=None, top_k=None, heads=None):
    """As `published`, of the `Weights` of a file."""
    state, hint = found.state, name_of(found.path)
    if any("norm1.emb.class_embedder" in name for name in state):
        state = from_diffusers_dit(state)
        state["pos_embed"] = diffusers_positions(state, found.facts)
    arch = architecture(found, state, hint, arch)
    layout, facts = OFFICIAL[arch], found.facts
    try:
        read = layout.infer(state)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{found.path} looks like {layout.title}, but its weights are not all there: {error}") \
            from None
    told = facts.get("arguments") if isinstance(facts.get("arguments"), dict) else {}
    arguments = read | {key: facts[key] for key in layout.unread if key in facts} | told
    assumed = assume(arch, arguments, facts | told, hint, top_k, heads)
    if heads is not None and "n_kv_heads" in arguments:
        arguments["n_kv_heads"] = kv_heads(state, heads)
    side = side_of(arch, arguments, facts, told, hint, size, assumed)
    stand_at(arch, arguments, side, hint)
    settings = layout.settings(arguments)
    latents = settings["in_channels"] == 4
    process, draw, scale = drawing(arch, arguments, settings, hint, facts, assumed)
    rows = sorted(range(1000), key=str) if arch == "terdit" and settings["num_classes"] == 1000 and not told else None
    name, options = network_of(layout.kind, settings)
    return Published(arch, titled(arch, name, options, settings, 8 if latents else 1), arguments, settings, name,
                     options, state, process, "uniform" if arch in ("sit", "flag-dit-text") else "own", draw, scale,
                     8 if latents else 1,
                     [rows.index(k) for k in range(1000)] if rows else None, assumed, found.aside,
                     facts.get("run") or {} if "architecture" in facts else {})


def name_of(path):
    """The words of a file's name that may tell what it is; of a file called like all others, its folder's too."""
    generic = re.match(r"(pytorch_model|model|ema|checkpoint|consolidated|diffusion_pytorch|last|ckpt|\d+)([-_.]|$)",
                       path.name)
    return f"{path.parent.name}/{path.name}" if generic else path.name


def architecture(found, state, hint, wanted):
    """The architecture of a file: the one wanted, if the weights are its. ValueError with what they look like."""
    seen, path = recognise(state), found.path
    if wanted is not None:
        layout_of(wanted)
    elsewhere = next((what for mark, what in ELSEWHERE.items() if mark in state and seen is None), None)
    if seen is None:
        names = ", ".join(list(state)[:3])
        raise ValueError(f"{path}: this is {elsewhere}" if elsewhere else
                         f"{path} holds weights of no architecture that is known here; they begin with {names}")
    if seen == "dit" and wanted is None:
        flow = "path_type" in found.facts or re.search(r"(^|[^a-z])sit([^a-z]|$)", hint.lower())
        return "sit" if flow else "dit"
    alike = {"dit": ("dit", "sit"), "lit": ("lit", "linear-attention")}.get(seen, (seen,))
    if wanted is None or wanted in alike:
        return "lit" if wanted == "linear-attention" else wanted or seen
    raise ValueError(f"{path}: this is {OFFICIAL[seen].title.removeprefix('a ')}, not "
                     f"{OFFICIAL[wanted].title.removeprefix('a ')}: use {seen}" if seen.startswith("fit") else
                     f"{path}: this is {OFFICIAL[seen].title}, not {OFFICIAL[wanted].title}: use {seen}")


def diffusers_positions(state, facts):
    """DiT's position table for the grid that diffusers' config names (32 latents where it does not)."""
    D, _, p, _ = state["x_embedder.proj.weight"].shape
    side = int(facts.get("sample_size") or 32) // p
    return position_table(D, side, side)[None]


def assume(arch, arguments, facts, hint, top_k, heads):
    """Put what was said of a file into its arguments; returns sentences on what remains an assumption."""
    assumed = assume_heads(arch, arguments, facts, heads)
    if "num_experts_per_tok" in arguments:
        if top_k is not None:
            arguments["num_experts_per_tok"] = top_k
        elif "num_experts_per_tok" not in facts:
            assumed.append(plural(arguments["num_experts_per_tok"], "expert") + " a token")
    elif top_k is not None:
        raise ValueError(f"top_k={top_k}: {OFFICIAL[arch].title} has no experts")
    if arch == "dit" and "dit" not in hint.lower() and "model" not in facts:
        assumed.append("DiT, not SiT, which has the same names")
    return assumed


# Where the published constructors have their heads, depth and width, if the shapes do not tell the heads.
HEADS = {arch: ("num_heads", "depth", "hidden_size") for arch in ("dit", "sit", "dit-moe", "fit", "fitv2", "dimba")} | {
    "uvit": ("num_heads", "depth", "embed_dim"), "terdit": ("n_heads", "n_layers", "dim"),
    "flag-dit": ("n_heads", "n_layers", "dim"), "dimr": ("num_attention_heads", "num_blocks", "dim")}


def assume_heads(arch, arguments, facts, heads):
    """As `assume`, of the heads: those of our preset of this depth and width, or an assumption."""
    layout, (key, depth, width) = OFFICIAL[arch], HEADS.get(arch, (None, None, None))
    if key is None and heads is not None:
        raise ValueError(f"heads={heads}: of {layout.title} the weights tell the heads")
    where = arguments["stage_configs"][0] if arch == "dimr" else arguments
    if key is None or key in facts or "stage_configs" in facts:
        return []
    if heads is not None:
        where[key] = heads
        return []
    told = arguments.get("use_flash_attn") or arguments.get("clip_dim")      # by the norms; 64 channels, as published
    known = told or preset_heads(layout.kind, where[depth], where[width]) is not None
    return [] if known else [plural(where[key], "head")]


def plural(n, word):
    return f"{n} {word}{'s' * (n != 1)}"


SIDES = {"terdit": "input_size", "dico": "input_size", "flag-dit": "input_size", "flag-dit-text": "input_size",
         "fit": "context_size", "fitv2": "context_size"}       # the argument that no shape tells


def side_of(arch, arguments, facts, told, hint, size, assumed):
    """The side of what the network draws, in latents or pixels: of the position table, or as it was said."""
    channels = arguments.get("in_channels", arguments.get("in_chans", arguments.get("channels")))
    stride, key = 8 if channels == 4 else 1, SIDES.get(arch)
    if key is None:
        own = arguments.get("input_size") or arguments.get("img_size") or arguments["stage_configs"][-1]["max_height"]
        if size is not None and size != own * stride:
            raise ValueError(f"size={size}: the position table in the file is that of images of {own * stride} pixels")
        return own
    if size is not None:
        return size // stride
    if key in told:
        return told[key] if key == "input_size" else math.isqrt(told[key]) * arguments["patch_size"]
    if isinstance(facts.get("image_size"), int):
        return facts["image_size"] // stride
    if named := re.search(r"(?<!\d)(256|512|1024)(?!\d)", hint):
        return int(named[1]) // stride
    if arch == "fitv2" and high_resolution(hint):
        return 64
    side = 128 if arch == "flag-dit-text" else 32
    assumed.append(f"images of {side * stride}x{side * stride} pixels")
    return side


def high_resolution(hint):
    """Whether a file's name says that it is a FiTv2-HR."""
    return bool(re.search(r"hrft|(^|[-_/.])hr([-_/.]|$)", hint.lower()))


def stand_at(arch, arguments, side, hint):
    """Write the side into the arguments of an architecture whose weights do not tell it. A FiTv2 for more than 256
    tokens is one post-trained on larger images: its positions scale by vision-ntk from 16 tokens a side."""
    if SIDES.get(arch) == "input_size":
        arguments["input_size"] = side
    elif arch in SIDES:
        arguments["context_size"] = (side // arguments["patch_size"]) ** 2
        if arch == "fitv2" and arguments["context_size"] > 256 and "custom_freqs" not in arguments:
            arguments |= {"custom_freqs": "ntk-aware", "decouple": True, "ori_max_pe_len": 16}


def network_of(kind, settings):
    """(name, options) of the registry that make this model, with the fewest options; (None, {}) where an option cannot
    be written so."""
    facts, best = ("image_size", "in_channels", "num_classes", "learn_sigma"), (None, {})
    for name in MODELS:
        if backbone(name) is kind:
            known = options_of(name)
            options = {key: v for key, v in settings.items() if key not in facts and known[key].default != v}
            if best[0] is None or len(options) < len(best[1]):
                best = name, options
    plain = (bool, int, float, str, type(None))
    written = all(isinstance(v, plain) or isinstance(v, tuple) and all(isinstance(w, plain) for w in v)
                  for v in best[1].values())
    return best if written else (None, {})


def titled(arch, name, options, settings, stride):
    """What a file is, in a line."""
    size, classes = settings["image_size"], settings["num_classes"] if "num_classes" in settings else 0
    sides = "x".join(str(stride * side) for side in ((size, size) if isinstance(size, int) else size))
    what = name if name and not options else OFFICIAL[arch].title
    return f"{what}, {sides} pixels{' in latents' if stride > 1 else ''}, " + (
        f"{classes} classes" if classes else "text" if settings.get("text_width") else "no classes")


# ------------------------------------------------------------------------------------------- how published files draw
# Scales of guidance are written as DiT writes them, u + scale (c - u): U-ViT's and DiMR's own are 1 less.

ANCESTRAL = dict(sampler="ddpm", steps=250, guide_channels=3)
SD, SDXL = 0.18215, 0.13025                                      # latent scales


def drawing(arch, c, settings, hint, facts, assumed):
    """(process, drawing options, latent scale) as published. c: the published constructor's arguments."""
    linear = f"linear{':learned_variance=True' * bool(settings.get('learn_sigma'))}"
    scale = SDXL if arch in ("flag-dit-text", "dimba") else SD
    if arch == "uvit":
        process, draw, scale = uvit_drawing(c, settings, assumed)
    elif arch == "dimr":
        process = "uvit-chain"
        draw = dict(sampler="dpmpp-singlestep:order=3", steps=250, grid="even", last="least", guidance=1.4)
    elif arch == "dit-moe" and c["use_flash_attn"]:
        process, draw = f"moe-flow:spare={settings['learn_sigma']}", dict(sampler="euler", steps=50, guidance=7.0)
        assumed.append("rectified flow, as the published models with normalised queries and keys")
    elif arch == "sit":
        process = f"sit-flow:spare={settings['learn_sigma']}"
        draw = dict(sampler="rk45:rtol=0.001,atol=1e-06", steps=10, guidance=4.0, guide_channels=3)
    elif arch == "fitv2":
        process, draw = "sit-flow", dict(sampler="rk45:rtol=0.001,atol=1e-06", steps=10, guidance=1.5, guide_channels=3)
        if c["context_size"] > 256 and c["hidden_size"] < 2304:
            draw["guidance"] = 1.65
    elif arch == "flag-dit":
        process, draw = "sit-flow", dict(sampler="rk45:rtol=0.001,atol=1e-06", steps=10, guidance=4.0, guide_channels=3)
    elif arch == "flag-dit-text":
        process = "sit-flow"
        draw = dict(sampler="euler", steps=59, shift=4.0, guidance=4.0, guide_channels=3)
    elif arch == "dimba":
        process = f"dimba-chain{':learned_variance=True' * bool(settings['learn_sigma'])}"
        draw = dict(sampler="dpmpp-2m", steps=20, grid="even", last="least", guidance=4.5)
    else:
        own = {"dit": 4.0, "dit-moe": 4.0, "terdit": 4.0, "dico": 1.4, "drwkv": 1.5, "lit": 1.5, "fit": 1.5}
        process, draw = linear, ANCESTRAL | {"guidance": own[arch]}
    if not settings.get("text_width") and not (settings["num_classes"] and settings.get("null_class", True)):
        draw = {key: v for key, v in draw.items() if key not in ("guidance", "guide_channels")}
    return process, {"clip": False} | draw, scale


def uvit_drawing(c, settings, assumed):
    """As `drawing`, of a U-ViT: which of its three codes wrote a file shows in its size, channels and conditions."""
    solver = dict(steps=50, last="least")
    if c["in_chans"] != 4 and settings["num_classes"] == 0:                       # CIFAR-10, CelebA
        return "vp", dict(sampler="pc:predictor=euler,corrector='none'", steps=1000, grid="linspace"), 1.0
    if c.get("clip_dim"):                                                         # MS-COCO
        return "uvit-chain", solver | dict(sampler="dpmpp-singlestep:order=3", grid="even", guidance=2.0), 0.2301
    guidance = 1.7 if c["img_size"] > 32 else 1.4
    if c["in_chans"] == 4 and (not c["conv"] or c["embed_dim"] == 1152):          # H
        return "uvit-chain", solver | dict(sampler="dpmpp-singlestep:order=3", grid="even", guidance=guidance), SD
    if c["in_chans"] != 4:                                                        # ImageNet 64x64
        if settings["null_class"]:
            assumed.append("the last row of its labels is the null label")
        guidance = 1.0
    return "uvit-vp", solver | dict(sampler="dpm-solver", grid="fast", guidance=guidance), SD


# --------------------------------------------------------------------------------------------------------------- export

# Options that change how a model is made or trained, and not what it computes from given weights.
INERT = ("std", "drop_path", "init", "detach", "balance", "packed", "text_length")


def exported(arch, model, name, options, facts):
    """(weights under the published names, the published constructor's arguments) of a model of the registry made by
    (name, options) and facts: image_size, in_channels, num_classes, learn_sigma. ValueError if the published code has
    no place for an option of it."""
    layout, known = layout_of(arch), options_of(name)
    if layout.kind is not backbone(name):
        fitting = [a for a, other in OFFICIAL.items() if other.kind is backbone(name)]
        raise ValueError(f"{name} is not published as {arch}: " + (
            f"use {' or '.join(fitting)}" if fitting else "it has no published layout, use safetensors"))
    own = inspect.signature(layout.kind).parameters
    k = {key: p.default for key, p in known.items()} | options | {key: v for key, v in facts.items() if key in own}
    k.setdefault("num_classes", 0)
    arguments = layout.arguments(k)
    again = {key: p.default for key, p in (known | own).items()} | layout.settings(arguments)
    inert = INERT + ("image_size",) * (arch in SIDES) + ("num_classes",) * bool(k.get("text_width"))
    if "mlp_ratio" in again:                         # a hidden width is a whole number
        k["mlp_ratio"], again["mlp_ratio"] = (int(d["mlp_ratio"] * k["hidden_size"] + 1e-6) for d in (k, again))
    for key in own.keys() | known.keys():
        if key not in inert and not same(again[key], k.get(key, again[key])):
            raise ValueError(f"the published {arch} has no place for {key}={k[key]!r} of this {name}")
    state = layout.theirs({key: v.detach().cpu() for key, v in model.state_dict().items()}, model)
    return state | ({} if k["num_classes"] else empty_tables(arch, state)), arguments


def empty_tables(arch, state):
    """Label tables of zeros for a model without classes, of an architecture whose published code always has one."""
    tables = {"y_embedder.embedding_table.weight": "t_embedder.mlp.2.bias"}
    if arch == "dico":
        tables = {f"y_embedder.embedding_table_{k}.weight": f"t_embedder_{k + 1}.mlp.2.bias" for k in range(3)}
    if arch in ("uvit", "dimr", "drwkv", "dimba", "flag-dit-text"):
        return {}
    return {name: torch.zeros(1, len(state[bias])) for name, bias in tables.items()}


def same(a, b):
    """Whether two options are the same: lists as tuples, numbers to rounding."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool)
    return math.isclose(a, b, rel_tol=1e-9) if numbers else a == b
