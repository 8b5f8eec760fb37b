"""DiT, facebookresearch/DiT: forward pass, guidance, loss, sampling, tables."""

import torch
from published import chain, compare, gradients, guided, output_of, watched

import convert
import diffusion
import objectives
from guidance import clipped
from guidance import guided as guide
from layers import Backbone, position_table, timestep_embedding
from models import create_model
from samplers import SAMPLERS


def check(case):
    if "drop" in case.inputs:
        labels(case)
    elif not case.state_dict:
        tables(case)
    else:
        model = convert.load_official("dit", case.config, case.state_dict).eval()
        kind = (sampling if "noises" in case.inputs else guidance if "cfg_scale" in case.meta else
                loss if "noise" in case.inputs else forward)
        compare(case, kind(case, model))


def forward(case, model):
    x, t, y = (case.inputs[k] for k in "xty")
    seen = watched({"patch_tokens": model.x_embedder, "block0.attn": model.blocks[0].attn,
                    "block0.mlp": model.blocks[0].mlp, "block0": model.blocks[0], "block_last": model.blocks[-1],
                    "final_tokens": model.final_layer, "t_emb": model.t_embedder, "y_emb": model.y_embedder})
    return {"out": model(x, t, y), "t_freq": timestep_embedding(t, 256)} | seen


def guidance(case, model):
    x, t, y, scale = *(case.inputs[k] for k in "xty"), case.meta["cfg_scale"]
    process, null = chain({"learn_sigma": case.config["learn_sigma"]}), torch.full_like(y, case.config["num_classes"])
    cond, uncond = process.denoiser(model, y), process.denoiser(model, null)
    first3 = output_of(guided(process, model, y, null, scale)(x, t))
    unconditional = model(x, t, null)
    # The published batch holds both halves: the second keeps the unconditional variance and fourth channel.
    return {"cond": model(x, t, y), "uncond": unconditional, "out_first3": first3,
            "out_all_channels": output_of(guide(cond, uncond, scale)(x, t)),
            "out_first3_second_half": torch.cat([first3[:, :3], unconditional[:, 3:]], 1)}


def loss(case, model):
    process = chain({"learn_sigma": case.config["learn_sigma"], **case.meta["diffusion"]})
    x0, t, y, noise = (case.inputs[k] for k in ("x0", "t", "y", "noise"))
    ours = process.loss(model, x0, y, t, noise) | {"x_t": process.noised(x0, noise, t)}
    ours["loss"].mean().backward()
    return ours | gradients(dict(model.named_parameters()))


def labels(case):
    """Labels are dropped by the objective, embedded by the model."""
    classes, y, drop = case.config["num_classes"], case.inputs["y"], case.inputs["drop"] == 1
    model = create_model("dit-nano", num_classes=classes, hidden_size=case.config["hidden_size"],
                         null_class=case.config["dropout_prob"] > 0, depth=1)
    model.y_embedder.load_state_dict(case.state_dict)
    dropped = objectives.Diffusion(Backbone(), diffusion.create_process("linear"), (3, 8, 8), classes).dropped(y, drop)
    compare(case, {"labels_after_drop": dropped, "emb_forced": model.y_embedder(dropped),
                   "emb_plain": model.y_embedder(y)})


def sampling(case, model):
    process = chain({"learn_sigma": case.config["learn_sigma"], **case.meta["diffusion"]})
    z, y, noises = (case.inputs[k] for k in ("z", "y", "noises"))
    kept = diffusion.respaced(process.T, case.meta["respacing"])
    times = torch.tensor([*reversed(kept), -1], dtype=torch.float64)
    denoise = guided(process, model, y, torch.full_like(y, case.config["num_classes"]), case.meta["cfg_scale"])
    if case.meta["clip_denoised"]:
        denoise = clipped(denoise, process)

    def walk(sampler, **options):
        pool = iter(noises)
        return torch.stack(list(SAMPLERS[sampler](denoise, z, times, process, lambda shape: next(pool), **options)))

    t, s = times[:-1], times[1:]
    _, _, log_small, log_large = process.posterior(t, s)
    log_small = torch.cat([log_small[:-1], log_small[-2:-1]])           # the last, -inf, is published as its neighbour
    with torch.no_grad():
        ddpm, ddim, d = walk("ddpm"), walk("ddim", eta=case.meta["ddim_eta"]), denoise(z, times[0].item())
        x0_factor, xt_factor, small, large = process.posterior(t[:1], s[:1])
    ours = {"timestep_map": torch.tensor(kept), "betas_respaced": log_large.exp().flip(0),
            "posterior_log_variance_clipped": log_small.flip(0), "ddpm_steps": ddpm, "ddpm_final": ddpm[-1],
            "ddim_steps": ddim, "ddim_final": ddim[-1], "ddpm_xstart0": d.x0,
            "pmv_mean": x0_factor.float() * d.x0 + xt_factor.float() * z}
    if d.variance is not None:
        ours["pmv_log_variance"] = d.variance * large + (1 - d.variance) * small
    return ours


def tables(case):
    ours = {}
    for name in case.outputs:
        kind, _, rest = name.partition(":")
        if kind.startswith("pos_embed"):
            dim, grid = (int(part[1:]) for part in kind.split("_")[2:])
            ours[name] = position_table(dim, grid, grid)
        elif kind.startswith("timestep_embedding"):
            ours[name] = timestep_embedding(case.inputs["t"], int("".join(filter(str.isdigit, kind))))
        elif kind == "space_timesteps":
            ours[name] = torch.tensor(diffusion.respaced(1000, rest))
        elif kind == "betas_linear_first_last":
            ours[name] = diffusion.linear_betas()[[0, 1, 499, 999]].float()
        elif kind == "param_count":
            with torch.device("meta"):
                model = create_model(rest.lower().replace("_", "/"), 32, 4, 1000, learn_sigma=True)
            ours[name] = torch.tensor(sum(p.numel() for p in model.parameters()))
    compare(case, ours)


CHECKS = {"dit": check}
