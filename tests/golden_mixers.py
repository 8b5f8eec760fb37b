"""The linear-time mixers and their backbones: scans (state-spaces/mamba, OpenGVLab/Vision-RWKV), feizc/Diffusion-RWKV,
feizc/Dimba and its Mamba, LiT."""

import torch
from published import compare, gradients, output_of, same, watched

import convert
import diffusion
import scans
from guidance import guided
from layers import Text
from models import DRWKVBlock, q_shift

OPERATORS = {"bi-wkv": (scans.bi_wkv, scans.bi_wkv_plain),
             "selective-scan": (scans.selective_scan, scans.selective_scan_plain),
             "linear-attention": (scans.linear_attention, scans.linear_attention_plain)}
ARGUMENTS = {"bi-wkv": "w u k v", "selective-scan": "u delta A B C D z delta_bias", "linear-attention": "q k v"}


def scan(case):
    """Both forms, in values and gradients. The kernel's own value, which departs from the formula, is informative."""
    options = {"selective-scan": ("delta_softplus",), "linear-attention": ("eps",)}.get(case.arch, ())
    assert case.config.get("kernel", "relu") == "relu"
    for operator in OPERATORS[case.arch]:
        x = {name: v.clone().requires_grad_() for name, v in case.inputs.items() if name != "gy"}
        out = operator(*(x.get(name) for name in ARGUMENTS[case.arch].split()), *(case.config[o] for o in options))
        y, last = out if case.arch == "selective-scan" else (out, None)
        (y * case.inputs["gy"]).sum().backward()
        ours = {"y": y, "last_state": last} | {f"grad_{name}": v.grad for name, v in x.items()}
        for name, value in case.outputs.items():
            if name != "y_official_kernel":
                same(ours[name], value, f"{operator.__name__}: {name}")


def mean_square(case, module, call, *seen):
    """call() -> y, and the gradients of mean(y^2); seen: dicts of what else was recorded."""
    y = call()
    loss = y.square().mean()
    ours = {"y": y, "loss": loss}
    if "grad_x" in case.outputs:
        ours["grad_x"] = torch.autograd.grad(loss, case.inputs["x"], retain_graph=True)[0]
    loss.backward()
    for more in (*seen, gradients(dict(module.named_parameters()))):
        ours |= more
    compare(case, ours, skip=("y_cfg", "y_cfg_second_half"))


def guidance(case, model, condition):
    """forward_with_cfg: the first half of x twice, with the times and conditions of both halves; its three first
    channels guided, the rest of each half its own."""
    if "y_cfg" not in case.outputs:
        return
    half, t = len(case.inputs["x"]) // 2, case.inputs["t"]
    learned = case.config.get("learn_sigma", case.config.get("pred_sigma", False))
    process, x = diffusion.Discrete(diffusion.linear_betas(), learned_variance=learned), case.inputs["x"][:half]

    def half_of(rows):
        return lambda x, _: process.denoiser(model, condition[rows])(x, t[rows])

    halves = [half_of(slice(half)), half_of(slice(half, None))]
    with torch.no_grad():
        first = guided(*halves, case.config["cfg_scale"], channels=3)(x, None).eps[:, :3]
        rest = [output_of(denoise(x, None))[:, 3:] for denoise in halves]
    same(torch.cat([torch.cat([first, r], 1) for r in rest]), case.outputs["y_cfg"], "y_cfg")


def drwkv(case):
    part, config, i = case.config.get("part"), case.config, case.inputs
    if part == "q_shift":
        shifted = q_shift(i["x"], config["patch_resolution"], config["shift_pixel"], config["gamma"])
        return same(shifted, case.outputs["y"], "y", 0)
    model = convert.load_official("drwkv", config, case.state_dict).eval()
    if part == "block":
        return drwkv_block(case, model, config["patch_resolution"])
    seen = watched({"time_embed": model.time_embed, "after_in_block0": model.in_blocks[0],
                    "after_mid_block": model.mid_block, "after_last_out_block": model.out_blocks[-1]})
    mean_square(case, model, lambda: model(i["x"], i["t"], i.get("y")), seen)
    guidance(case, model, i.get("y"))


def drwkv_block(case, model, grid):
    x, c, config = case.inputs["x"].requires_grad_(), case.inputs["c"], case.config
    twin = DRWKVBlock(config["n_embd"], config["layer_id"], config["n_layer"], config["skip"], init=config["init_mode"])
    for name, value in twin.state_dict().items():
        if "spatial_" in name:
            same(value, case.state_dict[name], f"initial {name}")
    seen = {"spatial_mix": model.att(case.inputs["x_mix"], grid), "channel_mix": model.ffn(case.inputs["x_mix"], grid)}
    mean_square(case, model, lambda: model(x, c, grid, case.inputs.get("skip")), seen)


def mamba(case):
    model, x = convert.load_official("mamba-block", case.config, case.state_dict), case.inputs["x"].requires_grad_()
    mean_square(case, model, lambda: model(x))


def dimba(case):
    part, i = case.config["part"], case.inputs
    model = convert.load_official("dimba", case.config, case.state_dict).eval()
    mask = i["mask"].bool() if "mask" in i else None
    if part == "mamba_blocks":
        h, r = i["x"], None
        for k, block in enumerate(model):
            h, r = block(h, r)
            same(h, case.outputs[f"hidden{k}"], f"hidden{k}")
            same(r, case.outputs[f"residual{k}"], f"residual{k}")
    elif part == "attention_block":
        x = i["x"].requires_grad_()
        seen = {"self_attn": model.attn(x), "cross_attn": model.cross_attn(x, i["text"], mask)}
        mean_square(case, model, lambda: model(x, i["text"], i["t0"], mask), seen)
    else:
        everything = torch.ones(i["text"].shape[:2], dtype=torch.bool)
        dimba_model(case, model, Text(i["text"], everything if mask is None else mask))


def dimba_model(case, model, text):
    i, x = case.inputs, case.inputs["x"]
    seen = watched({"time_embed": model.t_embedder, "t0": model.t_block, "text_proj": model.y_embedder,
                    **{f"after_attn{k}": block for k, block in enumerate(model.blocks)}})
    mixed = watched({f"after_mamba{k}": block for k, block in enumerate(model.mamba_blocks)}, lambda args, out: out[0])
    residual = watched({f"residual{k}": block for k, block in enumerate(model.mamba_blocks)}, lambda args, out: out[1])
    size = [i[name].view(len(x), -1) for name in ("img_hw", "aspect_ratio") if name in i]
    size = torch.cat(size, 1) if size else None
    mean_square(case, model, lambda: model(x, i["t"], text, size), seen, mixed, residual)
    guidance(case, model, text)


def lit(case):
    if case.config["part"] == "op":
        return scan(case)
    model, x = convert.load_official("lit", case.config, case.state_dict), case.inputs["x"].requires_grad_()
    if case.config["part"] != "model":
        return mean_square(case, model, lambda: model(x))
    seen = watched({f"after_block{k}": block for k, block in enumerate(model.blocks)})
    mean_square(case, model, lambda: model(x, case.inputs["t"], case.inputs["y"]), seen)


CHECKS = {"bi-wkv": scan, "selective-scan": scan, "linear-attention": lit, "drwkv": drwkv, "mamba-block": mamba,
          "dimba": dimba, "lit": lit}
