"""FiT and FiTv2, whlzy/FiT; Flag-DiT, Alpha-VLLM/Lumina-T2X: token sequences of any size, their rotary positions, and
how images are brought to such sizes."""

import re

import torch
from published import compare, gradients, same, watched

import convert
import data
import diffusion
import objectives
from guidance import guided, power_cosine
from layers import Text, canvas, rope_2d, rope_factor, rope_frequencies, rotate
from samplers import SAMPLERS, grid_times

ROPES = {"normal": "direct", "linear": "pi", "ntk-aware": "ntk", "ntk-aware-pro1": "ntk-pro1",
         "ntk-aware-pro2": "ntk-pro2"}


def check(case):
    """Mixed sizes come as x0, x1, ..."""
    model = convert.load_official(case.arch, case.config, case.state_dict).eval()
    if case.arch.startswith("flag-dit"):
        sampling = case.meta.get("sampling", {})
        model.ntk_factor = sampling.get("ntk_factor", model.ntk_factor)
        model.rope_scaling = sampling.get("rope_scaling_factor", model.rope_scaling)
        model.base_length = sampling.get("base_seqlen") if sampling.get("proportional_attn") else None
        first = model.layers[0]
        seen = watched({"t_emb": model.t_embedder, "block0": first, "attn0": first.attention})
    else:
        seen = watched({"t_emb": model.t_embedder, "block0": model.blocks[0]})
    count = sum(re.fullmatch(r"x\d+", name) is not None for name in case.inputs)
    x = [case.inputs[f"x{k}"] for k in range(count)] if count else case.inputs["x"]
    y, null = conditions(case)
    if "cfg_scale" in case.meta:
        ours = {"out": guidance(case, model, y, null)(x, case.inputs["t"])}
    else:
        ours = {"out": model(x, case.inputs["t"], y)}
    seen = dict(seen)
    if "euler" in case.meta:
        ours |= euler(case, guidance(case, model, y, null), x)
    if any(name.startswith(("loss", "mse", "vb")) for name in case.outputs):
        ours |= loss(case, model, x, y)
    if count:
        ours |= one_by_one(case, x, ours["out"], seen)
    compare(case, seen | ours)


def conditions(case):
    """(labels or Text, those of guidance)."""
    i = case.inputs
    if "text" not in i:
        return i["y"], torch.full_like(i["y"], case.config["num_classes"])
    null = Text(i["null_text"], i["null_text_mask"].bool()) if "null_text" in i else None
    return Text(i["text"], i["text_mask"].bool()), null


def guidance(case, model, y, null):
    """The network under guidance of its first three channels; the scale may depend on each sample's time."""

    def output(y):
        def denoise(x, t):
            return diffusion.Denoised(model(x, t, y), model(x, t, y))
        return denoise

    def denoise(x, t):
        rows = [slice(k, k + 1) for k in range(len(x))]
        return torch.cat([guided(output(y[row]), output(null[row]), scale(case.meta, t[row]), channels=3)(
            x[row], t[row]).eps for row in rows])

    return denoise


def scale(meta, t):
    """FiT's guidance at t = 1 - share; scale_pow 0 is a constant one."""
    if not meta.get("scale_pow"):
        return meta["cfg_scale"]
    return power_cosine(meta["cfg_scale"], 1 - min(t.item(), 1), meta["scale_pow"])


def euler(case, network, x):
    process = convert.Reversed("flow", shift=case.meta["euler"]["shift"])
    times = grid_times(process, case.meta["euler"]["num_steps"] - 1, "uniform")

    def denoise(x, t):
        t = torch.as_tensor(t).float().expand(len(x))
        return process.denoised(network(x, process.network_time(t)), x, t)

    *_, last = SAMPLERS["euler"](denoise, x, times, process, torch.randn)
    return {"sample": last, "times": (1 - times).float()}


def loss(case, model, x, y):
    """FiT is a chain with learned variances, the others are flows, t counted from noise."""
    chain, mixed, t = case.arch == "fit", isinstance(x, list), case.inputs["t"]
    variance = chain and case.config.get("learn_sigma")
    process = diffusion.Discrete(diffusion.linear_betas(), learned_variance=variance) if chain else convert.Reversed()
    noise = [case.inputs[f"noise{k}"] for k in range(len(x))] if mixed else case.inputs["noise"]
    x0, sizes = canvas(x) if mixed else (x, None)
    eps = canvas(noise)[0] if mixed else noise
    objective = objectives.Diffusion(model, process, None)
    ours = objective.parts(x0, y, t if chain else 1 - t, eps, sizes)
    ours |= {"loss_mse_mean": ours["mse"].mean(), "loss_mean": ours["loss"].mean()}
    ours["loss_mse_mean" if mixed and variance else "loss_mean"].backward()
    return ours | gradients(dict(model.named_parameters()))


def one_by_one(case, images, outputs, seen):
    """Each image's output, and its tokens after the first block and attention, which are recorded without padding: the
    real tokens of all images lie one after the other."""
    ours, p = {}, case.config["patch_size"]
    lengths = [x.shape[1] // p * (x.shape[2] // p + (case.arch == "flag-dit-text")) for x in images]
    for k, out in enumerate(outputs):
        ours[f"out{k}"] = out
    for name in ("block0", "attn0"):
        if name in seen:
            for k, tokens in enumerate(seen[name].split(lengths)):
                ours[f"{name}_{k}"] = tokens[:, 0]
    return ours


def rope(case):
    c, d = case.config, case.config["head_dim"]
    size, trained = (c["h"], c["w"]), c["ori_max_pe_len"]
    row, column = (v.flatten()[None] for v in torch.meshgrid(torch.arange(c["h"]), torch.arange(c["w"]), indexing="ij"))
    for key, value in case.outputs.items():
        kind, _, variant = key.partition(":")
        name, _, how = variant.partition("/")
        name, own = ROPES.get(name, name), how == "decoupled"
        cos, sin = rope_2d(row, column, size, d, "vision-" * own + name, trained, c["theta"])
        if kind.startswith("freqs"):
            length = size[kind == "freqs_w"] if own else max(size)
            ours = rope_frequencies(d // 2, length, name, trained, c["theta"])[0].float()
        elif kind == "factor":
            ours = rope_factor(size, name, trained)[0].float()
        elif kind in ("cos", "sin"):
            ours = (cos if kind == "cos" else sin)[0].repeat_interleave(2, 1)
        else:
            assert kind == "q_rot", f"nothing here computes {kind}"
            kept = re.search(r"every (\d+)th token", case.meta["note"])
            step = int(kept[1]) if kept else 1
            ours = rotate(case.inputs["q"], cos[:, ::step], sin[:, ::step])
        same(ours, value, key)


def resize(case):
    c = case.config
    rows = [data.fit_size(*wh, c["image_size"], c["vae_down"] * c["patch_size"]) for wh in case.inputs["wh"].tolist()]
    compare(case, {"wh": torch.tensor(rows)})


def crops(case):
    c = case.config
    compare(case, {"sizes": torch.tensor(data.crop_sizes(c["num_patches"], c["patch_size"], c["max_ratio"]))})


CHECKS = {"fit": check, "fitv2": check, "flag-dit": check, "flag-dit-text": check, "rope2d": rope, "fit-resize": resize,
          "lumina-crops": crops}
