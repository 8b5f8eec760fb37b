"""Published tokenizers and generators of tokens into our models: ViTok, MaskGIT's VQGAN, MaskGIT, MAGE, MAR, and
MaskGIT-r of ReCAP. As in convert.py: a published constructor's arguments and parameter names -> our model.
"""

import math
import re

import torch

from autoencoders import VQGAN, ViTok
from masked import MAGE, MAR, MaskGIT, MaskGITr
from weights import checked, fill


def translated(rules, state_dict):
    """A state dict with the first place in every name that a pattern fits replaced, rule after rule."""
    changed = {}
    for name, value in state_dict.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name, count=1)
        changed[name] = value
    return changed


# ----------------------------------------------------------------------------------------------- vitok, maskgit's vqgan


def vitok(config, state_dict):
    """philippe-eecs/vitok, pytorch_vitok_old. A table of positions that is none of ours loads as a learned one."""
    known = dict(channels=3, img_size=256, num_frames=1, patch_size=16, tubelet_size=1, width=768, encoder_depth=6,
                 num_heads=12, decoder_depth=12, code_length=256, code_width=16, variational=True, rope_theta=10000.0,
                 rope_style="1d_axial", posemb="nope", block_casual=False)
    c = checked(config, known, dict(simple=[True], checkpoint=[False], lengths=[None], norm_layer=["layer"]), "ViTok")
    if c["posemb"] not in ("nope", "sincos1d", "sincos2d", "sincos3d", "learned", "dec"):
        raise ValueError(f"a ViTok with posemb = {c['posemb']!r} is not built here")
    if c["rope_theta"] and c["rope_style"] not in ("1d_axial", "2d_axial"):
        raise ValueError(f"a ViTok with rope_style = {c['rope_style']!r} is not built here")
    state_dict = dict(state_dict)
    if c["posemb"] == "dec":                                       # the decoder alone has a table
        state_dict["posemb"] = torch.zeros_like(state_dict["dec_posemb"])
    model = ViTok((c["num_frames"], c["img_size"], c["img_size"]), c["channels"], c["patch_size"], c["tubelet_size"],
                  c["width"], c["encoder_depth"], c["decoder_depth"], c["num_heads"], c["code_width"], c["variational"],
                  posemb=c["posemb"] if c["posemb"] in ("nope", "sincos3d") else "learned",
                  rope=c["rope_style"].split("_")[0] if c["rope_theta"] else "none", rope_theta=c["rope_theta"] or 1.0)
    return fill(model, state_dict, "this ViTok")


def vqgan_names(levels, blocks):
    """Prefixes of google-research/maskgit's VQGAN, whose modules are numbered as they are called -> ours."""
    names = {"quantizer.codebook": "quantize.embedding.weight"}
    for side, stages in (("encoder", [*(f"down.{k}.block" for k in range(levels)), "mid"]),
                         ("decoder", ["mid", *(f"up.{k}.block" for k in reversed(range(levels)))])):
        places = [f"{stage}.{n}" for stage in stages for n in range(blocks)]
        for number, place in enumerate(places):
            for theirs, ours in (("GroupNorm_0", "norm1"), ("Conv_0", "conv1"), ("GroupNorm_1", "norm2"),
                                 ("Conv_1", "conv2"), ("Conv_2", "nin_shortcut")):
                names[f"{side}.ResBlock_{number}.{theirs}"] = f"{side}.{place}.{ours}"
        names |= {f"{side}.Conv_0": f"{side}.conv_in", f"{side}.GroupNorm_0": f"{side}.norm_out"}
    names["encoder.Conv_1"] = "encoder.conv_out"
    names |= {f"decoder.Conv_{k}": f"decoder.up.{levels - k}.upsample_conv" for k in range(1, levels)}
    return names | {f"decoder.Conv_{levels}": "decoder.conv_out"}


def vqgan_name(name, names):
    """A published parameter's name in our VQGAN; one that is ours already stays."""
    prefix, _, leaf = name.rpartition(".")
    return names.get(name) or (f"{names[prefix]}.{leaf}" if prefix in names else name)


def vqgan(config, state_dict):
    """google-research/maskgit's tokenizer: flax modules, kernels turned to PyTorch's layout; or the converted file that
    circulates, whose names are ours. unit_range: the published one works on images in [0, 1]."""
    known = dict(size=256, filters=128, num_res_blocks=2, channel_multipliers=(1, 1, 2, 2, 4), embedding_dim=256,
                 codebook_size=1024, unit_range=False)
    c = checked(config, known, dict(module=["vqgan_tokenizer"]), "MaskGIT's VQGAN")
    names = vqgan_names(len(c["channel_multipliers"]), c["num_res_blocks"])
    first = state_dict.get("encoder.Conv_0.weight", state_dict.get("encoder.conv_in.weight"))
    model = VQGAN(first.shape[1], c["filters"], c["channel_multipliers"], c["num_res_blocks"], c["embedding_dim"],
                  c["codebook_size"], c["unit_range"])
    return fill(model, {vqgan_name(name, names): v for name, v in state_dict.items()}, "this VQGAN")


def infer_vqgan(state_dict):
    """Of the converted file."""
    levels = 1 + max(int(name.split(".")[2]) for name in state_dict if name.startswith("encoder.down."))
    blocks = 1 + max(int(name.split(".")[2]) for name in state_dict if name.startswith("encoder.mid."))
    filters = len(state_dict["encoder.conv_in.weight"])
    widths = [len(state_dict[f"encoder.down.{k}.block.0.conv1.weight"]) for k in range(levels)]
    codes, dim = state_dict["quantize.embedding.weight"].shape
    return dict(filters=filters, num_res_blocks=blocks, channel_multipliers=[w // filters for w in widths],
                embedding_dim=dim, codebook_size=codes, unit_range=True)


# ------------------------------------------------------------------------------------------- maskgit, mage, mar, recap

MASKGIT_RULES = [
    (r"^Embed_0\.embeddings_ln\.", "token_emb.LayerNorm."), (r"^Embed_0\.", "token_emb."),
    (r"^TransformerLayer_(\d+)\.", r"blocks.\1."), (r"Attention_0\.self_attention\.out\.", "attn.proj."),
    (r"Attention_0\.self_attention\.", "attn."), (r"Attention_0\.attention_output_ln\.", "norm1."),
    (r"Mlp_0\.intermediate_output\.", "mlp.fc1."), (r"Mlp_0\.layer_output\.", "mlp.fc2."),
    (r"Mlp_0\.layer_output_ln\.", "norm2."), (r"^MlmLayer_0\.mlm_dense\.", "mlm_layer.fc."),
    (r"^MlmLayer_0\.mlm_ln\.", "mlm_layer.ln."), (r"^MlmLayer_0\.mlm_bias\.bias$", "mlm_layer.bias"),
]


def maskgit(config, state_dict):
    """google-research/maskgit's Transformer: flax names, kernels turned to PyTorch's layout; query, key and value, as
    matrices (D, D), become one."""
    known = dict(codebook_size=1024, num_classes=1000, hidden_size=768, num_hidden_layers=24, num_attention_heads=16,
                 intermediate_size=3072, seq_len=256)
    c = checked(config, known, {}, "MaskGIT")
    state = translated(MASKGIT_RULES, state_dict)
    for k in range(c["num_hidden_layers"]):
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"blocks.{k}.attn.{name}.{leaf}", None) for name in ("query", "key", "value")]
            if all(part is not None for part in parts):
                state[f"blocks.{k}.attn.qkv.{leaf}"] = torch.cat(parts)
    if "mlm_layer.bias" in state:
        state["mlm_layer.bias"] = state["mlm_layer.bias"].view(1, 1, -1)
    model = MaskGIT(c["codebook_size"], c["num_classes"], c["seq_len"], c["hidden_size"], c["num_hidden_layers"],
                    c["num_attention_heads"], c["intermediate_size"])
    return fill(model, state, "this MaskGIT")


def infer_maskgit(state_dict):
    """Of the published model of ImageNet's 1000 classes."""
    words, D = state_dict["Embed_0.word_embeddings.weight"].shape
    layers = [name.split(".")[0] for name in state_dict if name.startswith("TransformerLayer_")]
    depth = 1 + max(int(layer.split("_")[1]) for layer in layers)
    return dict(codebook_size=words - 1001, num_classes=1000, hidden_size=D, num_hidden_layers=depth,
                num_attention_heads=16 if D == 768 else max(1, D // 64),
                intermediate_size=len(state_dict["TransformerLayer_0.Mlp_0.intermediate_output.weight"]),
                seq_len=len(state_dict["Embed_0.position_embeddings.weight"]) - 1)


def mage(config, state_dict):
    """LTH14/mage. What its checkpoints hold beside the network that runs (an unused ViT stem, the tokenizer) is left
    out."""
    known = dict(codebook_size=1024, grid=16, embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=768,
                 decoder_depth=8, decoder_num_heads=16, mask_ratio_min=0.5, mask_ratio_max=1.0)
    c = checked(config, known, dict(mlp_ratio=[4, 4.0]), "MAGE")
    unused = ("patch_embed.", "cls_token", "pos_embed", "decoder_pos_embed", "mask_token", "decoder_pred.", "vqgan.")
    state = {name: value for name, value in state_dict.items()
             if name == "decoder_pos_embed_learned" or not name.startswith(unused)}
    model = MAGE(c["codebook_size"], c["grid"] ** 2, c["embed_dim"], c["depth"], c["num_heads"], c["decoder_embed_dim"],
                 c["decoder_depth"], c["decoder_num_heads"], legacy=True)
    return fill(model, state, "this MAGE")


def infer_mage(state_dict):
    words, D = state_dict["token_emb.word_embeddings.weight"].shape
    _, positions, decoder = state_dict["decoder_pos_embed_learned"].shape
    depths = [1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith(prefix))
              for prefix in ("blocks.", "decoder_blocks.")]
    return dict(codebook_size=words - 1001, grid=math.isqrt(positions - 1), embed_dim=D, depth=depths[0],
                num_heads=max(1, D // 64), decoder_embed_dim=decoder, decoder_depth=depths[1], decoder_num_heads=16)


def mar(config, state_dict):
    """LTH14/mar: the network and its head. How often a token is used in training (diffusion_batch_mul) and how the head
    draws (num_sampling_steps) are not the network's."""
    known = dict(img_size=256, vae_stride=16, patch_size=1, encoder_embed_dim=1024, encoder_depth=16,
                 encoder_num_heads=16, decoder_embed_dim=1024, decoder_depth=16, decoder_num_heads=16, vae_embed_dim=16,
                 class_num=1000, buffer_size=64, diffloss_d=3, diffloss_w=1024, num_sampling_steps="100",
                 diffusion_batch_mul=4, mask_ratio_min=0.7, label_drop_prob=0.1, attn_dropout=0.1, proj_dropout=0.1)
    c = checked(config, known, dict(mlp_ratio=[4, 4.0], grad_checkpointing=[False]), "MAR")
    channels = c["vae_embed_dim"] * c["patch_size"] ** 2
    side = c["img_size"] // c["vae_stride"] // c["patch_size"]
    model = MAR(channels, c["class_num"], side**2, c["encoder_embed_dim"], c["encoder_depth"], c["encoder_num_heads"],
                c["buffer_size"], c["diffloss_d"], c["diffloss_w"], 2 * channels, 0.1, c["decoder_embed_dim"],
                c["decoder_depth"], c["decoder_num_heads"])
    return fill(model, translated([(r"^diffloss\.net\.", "head.")], state_dict), "this MAR")


def infer_mar(state_dict):
    D, C = state_dict["z_proj.weight"].shape
    N = state_dict["diffusion_pos_embed_learned"].shape[1]
    depths = [1 + max(int(name.split(".")[k]) for name in state_dict if name.startswith(prefix))
              for prefix, k in (("encoder_blocks.", 1), ("decoder_blocks.", 1), ("diffloss.net.res_blocks.", 3))]
    heads = 12 if D == 768 else 16
    return dict(img_size=16 * math.isqrt(N), vae_stride=16, patch_size=1, encoder_embed_dim=D, encoder_depth=depths[0],
                encoder_num_heads=heads, decoder_embed_dim=state_dict["mask_token"].shape[2], decoder_depth=depths[1],
                decoder_num_heads=heads, vae_embed_dim=C, class_num=len(state_dict["class_emb.weight"]),
                buffer_size=state_dict["encoder_pos_embed_learned"].shape[1] - N, diffloss_d=depths[2],
                diffloss_w=len(state_dict["diffloss.net.input_proj.weight"]))


def maskgit_r(config, state_dict):
    """liebenxj/ReCAP's MaskGIT-r, the U-ViT of AutoNAT over codes."""
    known = dict(grid=16, codebook_size=1024, embed_dim=768, depth=24, num_heads=8, num_classes=1000)
    c = checked(config, known, dict(backbone=["uvit-maskgit"]), "MaskGIT-r")
    model = MaskGITr(c["codebook_size"], c["num_classes"], c["grid"] ** 2, c["embed_dim"], c["depth"], c["num_heads"])
    return fill(model, state_dict, "this MaskGIT-r")


def infer_maskgit_r(state_dict):
    words, D = state_dict["token_emb.word_embeddings.weight"].shape
    depth = 2 * (1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("in_blocks.")))
    return dict(codebook_size=words - 1, embed_dim=D, depth=depth, num_heads=8 if D == 768 else max(1, D // 64),
                grid=math.isqrt(len(state_dict["token_emb.position_embeddings.weight"])),
                num_classes=len(state_dict["context_embed.word_embeddings.weight"]) - 1)


def recap(config, state_dict):
    """Either network that ReCAP was published on."""
    c = {key: value for key, value in config.items() if key != "backbone"}
    return mar(c, state_dict) if config.get("backbone") == "mar" else maskgit_r(c, state_dict)


# architecture -> (model of a config and weights, config of weights)
TOKENS = {
    "vitok": (vitok, None), "vqgan": (vqgan, infer_vqgan), "maskgit": (maskgit, infer_maskgit),
    "mage": (mage, infer_mage), "mar": (mar, infer_mar), "maskgit-r": (maskgit_r, infer_maskgit_r),
    "recap": (recap, None),
}


def load_tokens(arch, config, state_dict):
    """Our model of one of TOKENS, from the published constructor's arguments and published weights."""
    return TOKENS[arch][0](config, state_dict)


def infer_tokens(arch, state_dict):
    """The published constructor's arguments of one of TOKENS, read off the weights' names and shapes."""
    try:
        return TOKENS[arch][1](state_dict)
    except (KeyError, ValueError) as error:
        raise ValueError(f"these are not the weights of a published {arch}: {error} is missing") from None
