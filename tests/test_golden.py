"""Every golden case, numbers recorded from the published implementations, against our computation. A case of an unknown
architecture fails and is named. `pytest tests/test_golden.py --golden FOLDER` runs a folder of other cases."""

import re
from importlib import import_module
from pathlib import Path

import golden
import pytest
import torch
import torch.nn.functional as F
from published import same

import convert
import data
import diffusion
import moe
import objectives
import scans
from layers import (
    LabelEmbedder,
    PackedLinear,
    TernaryLinear,
    Text,
    canvas,
    drop_labels,
    pack,
    position_table,
    replace_ternary,
    rope_2d,
    rope_factor,
    rope_frequencies,
    rotate,
    ternary,
    timestep_embedding,
    unpack,
)
from models import DRWKVBlock, Stitched, channel_norm, create_model, q_shift, stitch_steps

# ------------------------------------------------------------------------------------------------------------------ dit


def chain(options):
    """The published create_diffusion's options as our process."""
    known = {"noise_schedule", "predict_xstart", "learn_sigma", "diffusion_steps"}
    assert set(options) <= known, f"options {set(options) - known} of create_diffusion are not covered"
    schedule = options.get("noise_schedule", "linear")
    table = {"linear": diffusion.linear_betas, "squaredcos_cap_v2": diffusion.cosine_betas}[schedule]
    return diffusion.Discrete(table(options.get("diffusion_steps", 1000)),
                              "x0" if options.get("predict_xstart") else "eps", options.get("learn_sigma", True))


def check_dit(case):
    if "drop" in case.inputs:
        check_dit_labels(case)
    elif not case.state_dict:
        check_dit_tables(case)
    else:
        model = convert.load_official("dit", case.config, case.state_dict).eval()
        check = (check_dit_sampling if "noises" in case.inputs else check_dit_guidance if "cfg_scale" in case.meta else
                 check_dit_loss if "noise" in case.inputs else check_dit_forward)
        check(case, model)


def check_dit_forward(case, model):
    x, t, y = (case.inputs[k] for k in "xty")
    points = {"patch_tokens": model.x_embedder, "block0.attn": model.blocks[0].attn, "block0.mlp": model.blocks[0].mlp,
              "block0": model.blocks[0], "block_last": model.blocks[-1], "final_tokens": model.final_layer,
              "t_emb": model.t_embedder, "y_emb": model.y_embedder}
    seen = {"t_freq": timestep_embedding(t, 256)}
    for name, module in points.items():
        if module is not None:
            module.register_forward_hook(lambda m, args, output, name=name: seen.__setitem__(name, output))
    seen["out"] = model(x, t, y)
    for name, value in case.outputs.items():
        same(seen[name], value, name)


def check_dit_guidance(case, model):
    x, t, y, scale = *(case.inputs[k] for k in "xty"), case.meta["cfg_scale"]
    process = chain({"learn_sigma": case.config["learn_sigma"]})
    null = torch.full_like(y, case.config["num_classes"])
    outputs = {"cond": model(x, t, y), "uncond": model(x, t, null)}
    channels = x.shape[1]

    def output_of(d):                       # a Denoised back to the network's channels
        return torch.cat([d.eps] + ([] if d.variance is None else [2 * d.variance - 1]), 1)

    cond, uncond = process.denoiser(model, y), process.denoiser(model, null)
    outputs["out_first3"] = output_of(diffusion.guided(cond, uncond, scale, channels=3)(x, t))
    outputs["out_all_channels"] = output_of(diffusion.guided(cond, uncond, scale)(x, t))
    # the published batch holds both halves: the second keeps the unconditional variance and fourth channel
    first3 = outputs["out_first3"]
    outputs["out_first3_second_half"] = torch.cat([first3[:, :3], outputs["uncond"][:, 3:]], 1)
    assert channels >= 3
    for name, value in case.outputs.items():
        same(outputs[name], value, name)


def check_dit_loss(case, model):
    process = chain({"learn_sigma": case.config["learn_sigma"], **case.meta["diffusion"]})
    x0, t, y, noise = (case.inputs[k] for k in ("x0", "t", "y", "noise"))
    ours = process.loss(model, x0, y, t, noise) | {"x_t": process.noised(x0, noise, t)}
    ours["loss"].mean().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            ours |= {f"grad_norm:{name}": p.grad.norm(), f"grad:{name}": p.grad}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


def check_dit_labels(case):
    embed = LabelEmbedder(case.config["num_classes"], case.config["hidden_size"], null=case.config["dropout_prob"] > 0)
    embed.load_state_dict(case.state_dict)
    y = case.inputs["y"]
    dropped = drop_labels(y, case.inputs["drop"] == 1, case.config["num_classes"])
    ours = {"labels_after_drop": dropped, "emb_forced": embed(dropped), "emb_plain": embed(y)}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


def check_dit_sampling(case, model):
    process = chain({"learn_sigma": case.config["learn_sigma"], **case.meta["diffusion"]})
    z, y, noises = (case.inputs[k] for k in ("z", "y", "noises"))
    kept = diffusion.respaced(process.T, case.meta["respacing"])
    times = torch.tensor([*reversed(kept), -1], dtype=torch.float64)
    null = torch.full_like(y, case.config["num_classes"])
    cond, uncond = process.denoiser(model, y), process.denoiser(model, null)
    denoise = diffusion.guided(cond, uncond, case.meta["cfg_scale"], channels=3)
    if case.meta["clip_denoised"]:
        denoise = diffusion.clipped(denoise, process)
    t, s = times[:-1], times[1:]
    _, _, log_small, log_large = process.posterior(t, s)
    log_small = torch.cat([log_small[:-1], log_small[-2:-1]])           # the last, -inf, is published as its neighbour
    with torch.no_grad():
        def walk(sampler, **options):
            pool = iter(noises)
            return torch.stack(list(sampler(denoise, z, times, process, lambda shape: next(pool), **options)))

        ours = {"timestep_map": torch.tensor(kept), "betas_respaced": log_large.exp().flip(0),
                "posterior_log_variance_clipped": log_small.flip(0), "ddpm_steps": walk(diffusion.SAMPLERS["ddpm"]),
                "ddim_steps": walk(diffusion.SAMPLERS["ddim"], eta=case.meta["ddim_eta"])}
        d = denoise(z, times[0])
        x0_factor, xt_factor, small, large = process.posterior(t[:1], s[:1])
    ours |= {"ddpm_final": ours["ddpm_steps"][-1], "ddim_final": ours["ddim_steps"][-1], "ddpm_xstart0": d.x0,
             "pmv_mean": x0_factor.float() * d.x0 + xt_factor.float() * z}
    if d.variance is not None:
        ours["pmv_log_variance"] = d.variance * large + (1 - d.variance) * small
    for name, value in case.outputs.items():
        same(ours[name], value, name)


def check_dit_tables(case):
    for name, value in case.outputs.items():
        kind, _, rest = name.partition(":")
        if kind.startswith("pos_embed"):
            dim, grid = (int(part[1:]) for part in kind.split("_")[2:])
            ours = position_table(dim, grid, grid)
        elif kind.startswith("timestep_embedding"):
            ours = timestep_embedding(case.inputs["t"], int("".join(filter(str.isdigit, kind))))
        elif kind == "space_timesteps":
            ours = torch.tensor(diffusion.respaced(1000, rest))
        elif kind == "betas_linear_first_last":
            ours = diffusion.linear_betas()[[0, 1, 499, 999]].float()
        elif kind == "param_count":
            with torch.device("meta"):
                model = create_model(rest.lower().replace("_", "/"), 32, 4, 1000, learn_sigma=True)
            ours = torch.tensor(sum(p.numel() for p in model.parameters()))
        else:
            raise AssertionError(f"nothing here computes {name}")
        same(ours, value, name)


# -------------------------------------------------------------------------------------------------------------- dit-moe


def watched(modules):
    """name -> what each module puts out, filled in whenever it is called."""
    seen = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda m, args, output, name=name: seen.__setitem__(name, output))
    return seen


def stacked(name, grads):
    """The value of a published parameter's name out of {our name: value}: single experts are rows of a stack."""
    (ours, value), = convert.moe_names({name: torch.zeros(())}).items()
    if ".experts." in name or name.startswith("experts."):
        return grads[ours][int(name.split("experts.")[1].split(".")[0])]
    return grads[ours]


def check_dit_moe(case):
    if "embed_dim" in case.config:
        check_moe_layer(case)
    elif not case.state_dict:
        for name, value in case.outputs.items():
            with torch.device("meta"):
                model = create_model("dit-moe-" + name.split(":")[1].lower().replace("_", "/"), 32, 4, 1000,
                                     learn_sigma=True)
            counts = sum(p.numel() for p in model.parameters()), moe.activated_parameters(model)
            same(torch.tensor(counts), value, name)
    else:
        model = convert.load_official("dit-moe", case.config, case.state_dict).eval()
        check = (check_moe_stats if "count_step" in case.outputs else check_moe_upcycle if "upcycled" in case.meta else
                 check_moe_flow if "t_logit" in case.inputs else check_moe_training if "x0" in case.inputs else
                 check_moe_forward)
        check(case, model)


def routing(router_output, prefix):
    """The recorded forms of what a router says."""
    weight, index, probs = router_output
    combine = torch.zeros_like(probs).scatter(1, index, weight)
    return {f"{prefix}router_probs": probs, f"{prefix}router_combine": combine,
            f"{prefix}router_index_sorted": index.sort(1)[0]}


def check_moe_forward(case, model):
    points = {"final_tokens": model.final_layer, "block_last": model.blocks[-1]}
    for k, block in enumerate(model.blocks):
        points |= {f"block{k}.attn": block.attn, f"block{k}.moe": block.mlp, f"block{k}": block,
                   f"block{k}.moe.shared": block.mlp.shared, f"block{k}.": block.mlp.router}
        block.mlp.register_forward_pre_hook(lambda m, args, k=k: seen.__setitem__(f"block{k}.moe.input", args[0]))
    seen = watched(points)
    seen["out"] = model(*(case.inputs[k] for k in "xty"))
    for k in range(len(model.blocks)):
        seen |= routing(seen[f"block{k}."], f"block{k}.")
    for name, value in case.outputs.items():
        same(seen[name], value, name)


def check_moe_layer(case):
    c, alpha = case.config, case.meta["aux_loss_alpha"]
    D = c["embed_dim"]
    layer = moe.MoE(D, c["mlp_ratio"] * D, c["num_experts"], c["num_experts_per_tok"],
                    case.meta["n_shared_experts"] * D)
    state = {name.removeprefix("mlp."): value for name, value in
             convert.moe_names({f"moe.{name}": value for name, value in case.state_dict.items()}).items()}
    convert.fill(layer, state, "this layer")
    for dispatch in (moe.loop, moe.grouped):
        layer.dispatch = dispatch
        x, g, router = case.inputs["x"].requires_grad_(), case.inputs["g"], watched({"router": layer.router})
        ours = {"y_eval": layer.eval()(x), "shared_only": layer.shared(x)} | routing(router["router"], "")
        ours["routed_only"] = ours["y_eval"] - ours["shared_only"]
        rows = x.flatten(0, 1)
        ours["expert_outputs"] = torch.stack([torch.nn.functional.linear(
            torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T), down)
            for gate, up, down in zip(layer.gate, layer.up, layer.down)], 1)
        weights = {"x": x} | {"moe." + name: p for name, p in layer.named_parameters()}
        aux = alpha * moe.balanced(layer.train(), 0, 1)["loss"] if layer.train()(x) is not None else None
        y = layer(x)
        task = (y * g).sum()
        total = moe.balanced(layer, task, alpha)["loss"]
        ours |= {"y_train": y, "aux_loss": aux[None]}
        for kind, loss in {"aux": aux, "task_only": task, "train": total, "zero_task": 0 * task + aux}.items():
            grads = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
            grads = {name.replace("moe.", "mlp."): v for (name, v) in zip(weights, grads) if v is not None}
            ours |= {f"{kind}_grad:x": grads["x"], f"{kind}_grad:gate.weight": grads["mlp.router.weight"]}
            for name in case.state_dict:
                if kind in ("task_only", "train"):
                    value = stacked(f"moe.{name}", grads)
                    ours |= {f"{kind}_grad:{name}": value, f"{kind}_grad_norm:{name}": value.norm()}
        for name, value in case.outputs.items():
            same(ours[name], value, f"{dispatch.__name__}: {name}")


def check_moe_training(case, model):
    process = chain({"learn_sigma": case.config["learn_sigma"], **case.meta.get("diffusion", {})})
    x0, t, y, noise = (case.inputs[k] for k in ("x0", "t", "y", "noise"))
    ours = {"mse_eval_mode": process.loss(model, x0, y, t, noise)["mse"]}
    ours |= process.loss(model.train(), x0, y, t, noise)
    alpha, task = case.meta["aux_loss_alpha"], ours["loss"].mean()
    ours["aux_losses"] = torch.stack([alpha * block.mlp.balance[0] for block in model.blocks])
    total = moe.balanced(model, task, alpha)["loss"]
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # What is recorded as task only is the total less the gradient of all balance losses, taken through the published
    # trick: there the last layer's loss, on its way up, calls forth the losses of all other layers a second time.
    for kind, loss in {"_task_only": task - ours["aux_losses"][:-1].sum(), "": total}.items():
        grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), retain_graph=True)))
        for name in case.state_dict:
            if name != "pos_embed":
                grad = stacked(name, grads)
                ours |= {f"grad{kind}:{name}": grad, f"grad_norm{kind}:{name}": grad.norm()}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


def check_moe_flow(case, model):
    process = convert.DiTMoEFlow(case.config["learn_sigma"])
    x0, noise, z, y = (case.inputs[k] for k in ("x0", "noise", "z", "y"))
    t = torch.sigmoid(case.inputs["t_logit"])
    ours = {"t": t, "loss_per_sample": process.loss(model, x0, y, t, noise)["loss"]}
    ours["loss"] = ours["loss_per_sample"].mean()[None]
    null, kept = torch.full_like(y, case.config["num_classes"]), []
    denoise = diffusion.guided(process.denoiser(model, y), process.denoiser(model, null), case.meta["cfg_scale"])

    def keeping(x, t):
        kept.append(denoise(x, t))
        return kept[-1]

    with torch.no_grad():
        walk = diffusion.SAMPLERS["euler"](keeping, z, process.times(case.meta["sample_steps"]), process, None)
        ours["trajectory"] = torch.stack([z, *walk])
    ours |= {"x0_predictions": torch.stack([d.x0 for d in kept]), "final": ours["trajectory"][-1]}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


def check_moe_upcycle(case, dense):
    x, t, y = (case.inputs[k] for k in "xty")
    c = case.meta["upcycled"]
    model = create_model("dit-moe-nano", c["input_size"], c["in_channels"], c["num_classes"], **{
        k: c[k] for k in ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "learn_sigma",
                          "num_experts")}, top_k=c["num_experts_per_tok"], qk_norm=c["use_flash_attn"],
        null_class=c["class_dropout_prob"] > 0).eval()
    moe.upcycle(model, dense.state_dict())
    for k, block in enumerate(model.blocks):
        assert 0.5 < block.mlp.router.weight.std() / 0.02 < 2
        block.mlp.router.weight.data = case.inputs[f"gate:blocks.{k}.moe.gate.weight"]
    seen = watched({f"block{k}.gate_sum": block.mlp.router for k, block in enumerate(model.blocks)})
    ours = {"out_dense": dense(x, t, y), "out_upcycled": model(x, t, y)}
    ours |= {name: output[0].sum(1) for name, output in seen.items()}
    for name, value in case.outputs.items():
        same(ours[name], value, name)
    for block in model.blocks:                          # our own form keeps the dense model's function
        block.mlp.router.renormalise = True
    same(model(x, t, y), ours["out_dense"], "the output, upcycled with renormalised weights")


def check_moe_stats(case, model):
    process = chain({"learn_sigma": case.config["learn_sigma"], **case.meta.get("diffusion", {})})
    kept = diffusion.respaced(process.T, case.meta["respacing"])
    times = torch.tensor([*reversed(kept), -1], dtype=torch.float64)
    classes, null = case.meta["classes"], case.config["num_classes"]
    counter, finals = moe.Counter(model, null, len(kept)), []
    with torch.no_grad(), counter:
        for z, y, noises in zip(case.inputs["z"], case.inputs["y"], case.inputs["noises"]):
            cond, uncond = process.denoiser(model, y[None]), process.denoiser(model, torch.full_like(y[None], null))
            denoise, pool = diffusion.guided(cond, uncond, case.meta["cfg_scale"], channels=3), iter(noises)
            walk = diffusion.SAMPLERS["ddpm"](denoise, z[None], times, process, lambda shape: next(pool)[None])
            for counter.step, x in enumerate(walk, start=1):            # noqa: B007
                pass
            finals.append(x[0])
            counter.step = 0
    ours = {"count_class": counter.classes[classes], "count_position": counter.positions, "count_step": counter.steps,
            "final": torch.stack(finals)}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


# --------------------------------------------------------------------------------------------------------------- terdit


def check_terdit(case):
    if "in_features" in case.config:
        check_terdit_linear(case)
        return
    model = convert.load_official("terdit", case.config, case.state_dict).eval()
    (check_terdit_training if "x0" in case.inputs else check_terdit_forward)(case, model)


def check_terdit_linear(case):
    c, (x, g) = case.config, (case.inputs.get(k) for k in "xg")
    layer = TernaryLinear(torch.nn.Linear(c["in_features"], c["out_features"], c["bias"]))
    convert.fill(layer, case.state_dict, "this layer")
    y, q = layer(x.requires_grad_()), ternary(layer.weight)
    (y * g).sum().backward()
    ours = {"y": y, "ternary": q.detach().round(), "gamma": layer.weight.abs().mean()[None], "grad:x": x.grad,
            "fraction_zero": (q == 0).float().mean()[None], "packed_uint8": pack(q.detach()),
            "unpacked_minus1": unpack(pack(q.detach())).float()}
    ours |= {f"grad:{name}": p.grad for name, p in layer.named_parameters()}
    ours |= {name: ternary(value) for name, value in case.inputs.items() if name.startswith("edge_")}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


def check_terdit_forward(case, model):
    x, t, y = (case.inputs[k] for k in "xty")
    points = {"patch_tokens": model.x_embedder, "final_tokens": model.final_layer, "layer_last": model.layers[-1]}
    for k, layer in enumerate(model.layers):
        points |= {f"layer{k}": layer, f"layer{k}.attention": layer.attention,
                   f"layer{k}.feed_forward": layer.feed_forward, f"layer{k}.adaLN": layer.adaLN_modulation,
                   f"layer{k}.adaLN_before_rms": layer.adaLN_modulation[1]}
    seen = watched(points)
    seen["out"] = model(x, t, y)
    ours = dict(seen)
    for name, m in model.named_modules():
        if isinstance(m, TernaryLinear):
            published = name.replace("forward.gate", "forward.w1").replace("forward.up", "forward.w3")
            published = published.replace("forward.down", "forward.w2")
            codes = ternary(m.weight).detach()
            ours |= {f"{published}.ternary": codes, f"packed_uint8:{published}.weight": pack(codes)}
    ours["out_packed"] = replace_ternary(model, PackedLinear)(x, t, y)
    assert torch.equal(ours["out_packed"], ours["out"]), "packing changes nothing, to the last bit"
    # the packed weights, under their published names, make the same model
    packed = {name: ours.get(f"packed_uint8:{name}", value) for name, value in case.state_dict.items()}
    again = convert.load_official("terdit", case.config, packed).eval()
    assert torch.equal(again(x, t, y), ours["out_packed"])
    for name, value in case.outputs.items():
        same(ours[name], value, name)


def check_terdit_training(case, model):
    process = chain({"learn_sigma": case.config["learn_sigma"], **case.meta.get("diffusion", {})})
    ours = process.loss(model, *(case.inputs[k] for k in ("x0", "y", "t", "noise")))
    ours["loss"].mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name in case.state_dict:
        grad = grads[convert.terdit_name(name)]
        ours |= {f"grad:{name}": grad.view_as(case.state_dict[name]), f"grad_norm:{name}": grad.norm()}
    for name, value in case.outputs.items():
        tolerance = 1e-5
        if name.endswith(("wq.alphas", "wk.alphas")) and case.config["qk_norm"]:
            # the norm behind it undoes any scale: a sum of terms that cancel, known no better than its terms
            layer = model.get_submodule(name.split(":")[1].removesuffix(".alphas"))
            terms = (layer.weight.grad / layer.alphas * ternary(layer.weight)).norm()
            tolerance *= max(1.0, (terms / value.norm()).item())
        same(ours[name], value, name, tolerance)


# ------------------------------------------------------------------------------------------------------------- t-stitch


def check_stitch(case):
    if not case.state_dict:
        check_stitch_schedule(case)
        return
    model = convert.load_official("t-stitch", case.config, case.state_dict).eval()
    configs = case.config["denoisers"]
    process = chain({"learn_sigma": configs[0]["learn_sigma"], **case.meta.get("diffusion", {})})
    z, y, noises, scale = *(case.inputs[k] for k in ("z", "y", "noises")), case.meta["cfg_scale"]
    times, chosen, kept = process.times(case.meta["steps"]), [], []
    denoise = process.denoiser(model, y)
    if scale is not None:
        null = torch.full_like(y, configs[0]["num_classes"])
        denoise = diffusion.guided(denoise, process.denoiser(model, null), scale, channels=3)
    if case.meta["clip_denoised"]:
        denoise = diffusion.clipped(denoise, process)

    def keeping(x, t):
        chosen.append(model.choose(t))
        kept.append(denoise(x, t))
        return kept[-1]

    pool, options = iter(noises), {"eta": case.meta["eta"]} if case.meta["solver"] == "ddim" else {}
    with torch.no_grad():
        sampler = diffusion.SAMPLERS[case.meta["solver"]]
        steps = list(sampler(keeping, z, times, process, lambda shape: next(pool), **options))
    ours = {"model_index": torch.tensor(chosen), "timesteps": times[:-1], "steps": torch.stack(steps),
            "final": steps[-1], "pred_xstart": torch.stack([d.x0 for d in kept])}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


def check_stitch_schedule(case):
    for name, value in case.outputs.items():
        kind, S = name.split(":")
        times = [float(t) for t in reversed(diffusion.respaced(1000, S))]
        if kind == "timesteps":
            ours = torch.tensor(times)
        else:
            rows = [[r, 1 - r] for r in case.config["ratios"]] if kind == "two" else case.config["fractions"]
            models = [torch.nn.Identity()] * len(rows[0])
            ours = torch.tensor([[Stitched(models, row).choose(t) for t in times] for row in rows])
            if int(S) >= 10 and kind == "two":              # where the fractions are whole numbers of steps, both agree
                same(torch.tensor([stitch_steps(int(S), row) for row in rows]), value, f"{name}, by steps")
        same(ours, value, name)


# --------------------------------------------------------------------------------------------- dico, uvit, dimr, td-ln


def captured(module, take=lambda args, output: output):
    """A dict that holds, after the module's next call, take(its arguments, its output) under "value"."""
    seen = {}
    module.register_forward_hook(lambda m, args, output: seen.__setitem__("value", take(args, output)))
    return seen


def compare(case, ours, model=None, rules=(), skip=()):
    """Every recorded output with ours, by name. Points of `watched` are opened; gradients are the model's."""
    names = {name: p for name, p in model.named_parameters()} if model else {}
    for name, value in case.outputs.items():
        kind, _, parameter = name.partition(":")
        if kind in ("grad", "grad_norm") and name not in ours:
            p = names[convert.renamed(rules, parameter)]
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            same(grad.norm() if kind == "grad_norm" else grad.reshape(value.shape), value, name)
        elif name not in skip:
            same(ours[name]["value"] if isinstance(ours[name], dict) else ours[name], value, name)


def backward_of_mse(case, out, ours):
    if "target" in case.inputs:
        ours["loss"] = (out - case.inputs["target"]).square().mean()
        ours["loss"].backward()


def check_dico(case):
    model, i = convert.load_official("dico", case.config, case.state_dict).eval(), case.inputs
    part = case.config.get("part")
    if part == "cca":
        gate = captured(model.conv, lambda args, output: output.sigmoid().flatten(1))
        return compare(case, {"out": model(i["x"]), "gate": gate})
    if part == "block":
        x, c = i["x"].requires_grad_(), i["c"].requires_grad_()
        ours = {"norm1": channel_norm(x), "modulation": captured(model.adaLN_modulation),
                "cca_gate": captured(model.cca.conv, lambda args, output: output.sigmoid().flatten(1)),
                **{name: captured(getattr(model, name)) for name in ("conv1", "conv2", "conv3")}, "out": model(x, c)}
        (ours["out"] * i["probe"]).mean().backward()
        return compare(case, ours | {"grad:x": x.grad, "grad:c": c.grad}, model, convert.DICO)
    if part == "train_loss":
        process = chain({"learn_sigma": case.config["learn_sigma"]})
        x0 = i.get("x0", i.get("x"))
        ours = process.loss(model, x0, i["y"], i["t"], i["noise"]) | {"x_t": process.noised(x0, i["noise"], i["t"])}
        ours["loss"].mean().backward()
        return compare(case, ours, model, convert.DICO)
    if part == "cfg":
        process = chain({"learn_sigma": case.config["learn_sigma"]})
        null = torch.full_like(i["y"], case.config["num_classes"])
        cond, uncond = (process.denoiser(model, y) for y in (i["y"], null))
        d = diffusion.guided(cond, uncond, case.config["cfg_scale"], channels=3)(i["x"], i["t"])
        guided = torch.cat([d.eps] + ([] if d.variance is None else [2 * d.variance - 1]), 1)
        return compare(case, {"guided_3ch": guided, "cond": model(i["x"], i["t"], i["y"]),
                              "uncond": model(i["x"], i["t"], null)})
    ours = {"x_embed": captured(model.x_embedder), "t_embed_1": captured(model.t_embedder[0]),
            "enc_1": captured(model.encoder1[-1]), "down_1": captured(model.encoder2[0], lambda args, output: args[0]),
            "enc_2": captured(model.encoder2[-1]), "latent": captured(model.middle[-1]),
            "up_2": captured(model.up2, lambda args, output: F.pixel_shuffle(output, 2)),
            "dec_2": captured(model.decoder2[-1]), "dec_1": captured(model.decoder1[-1])}
    ours["out"] = model(i["x"], i["t"], i.get("y"))
    backward_of_mse(case, ours["out"], ours)
    compare(case, ours, model, convert.DICO)


def check_uvit(case):
    model, i = convert.load_official("uvit", case.config, case.state_dict).eval(), case.inputs
    if case.config.get("part") == "block":
        return compare(case, {"out": model(i["x"], i.get("skip")), "attn": model.attn(i["x"])})
    ours = {"patch_embed": captured(model.x_embedder), "time_token": captured(model.t_embedder),
            "in_block0": captured(model.in_blocks[0]), "mid_block": captured(model.mid_block),
            "out_block0": captured(model.out_blocks[0]), "decoder_pred": captured(model.decoder_pred)}
    ours["out"] = model(i["x"], i["t"], i.get("y", i.get("context")))
    backward_of_mse(case, ours["out"], ours)
    compare(case, ours, model, convert.UVIT)


def check_td_ln(case):
    model, tau = convert.load_official("td-ln", case.config, case.state_dict), case.inputs["log_snr"] / 4
    same(case.inputs["t"] / 500 - 1, tau, "tau")
    gain, out = model.gain(tau), model(case.inputs["x"], tau)
    (out * case.inputs["probe"]).mean().backward()
    ours = {"current:weight": gain, "current:scale": gain, "current:bias": model.bias and model.bias(tau), "out": out}
    compare(case, ours, model, convert.TD_LN)


def check_dimr(case):
    i, part = case.inputs, case.config.get("part")
    if part == "loss":
        predictions = [i[f"pred_{k}"] for k in range(len(case.config["loss_coeffs"]))]
        errors = objectives.multi_scale_errors(predictions, i["noise"])
        ours = {"loss": sum(w * e for w, e in zip(case.config["loss_coeffs"], errors))}
        for k, (p, e) in enumerate(zip(predictions, errors)):
            ours |= {f"target_{k}": objectives.area_target(i["noise"], p.shape[-1]), f"mse_{k}": e}
        return compare(case, ours)
    model, planes = convert.load_official("dimr", case.config, case.state_dict).eval(), lambda x: x.permute(0, 3, 1, 2)

    def entry(branch):                                                       # patches with their positions
        return captured(branch.x_embedder, lambda args, out: out + planes(
            branch.pos_embed[None, :out.shape[2], :out.shape[3]]))

    if part == "branch":
        cascade, embedded = i["cascade"].permute(0, 2, 3, 1) if "cascade" in i else None, entry(model)
        out, cascade = model(i["x"], i["t"] / 500 - 1, i.get("y"), cascade)
        return compare(case, {"input_layer": embedded, "out": out, "cascade": planes(cascade)})
    ours = {}
    for k, branch in enumerate(model.branches):
        ours |= {f"branch{k}_input": entry(branch), f"branch{k}_block0": captured(branch.blocks[0])}
    outputs = model(i["x"], i["t"], i.get("y"), every=True)
    ours |= {f"out_{k}": out for k, out in enumerate(outputs)} | {"out": model(i["x"], i["t"], i.get("y"))}
    if "noise" in i:
        n = len(outputs) - 1
        errors = objectives.multi_scale_errors(outputs, i["noise"])
        ours["loss"] = sum(e * 4 ** (k / max(1, n) - 1 + (n == 0)) for k, e in enumerate(errors))
        ours["loss"].mean().backward()
    compare(case, ours, model, convert.DIMR)


# ------------------------------------------------------------------------------------- scans, drwkv, mamba, dimba, lit


def check_scan(case):
    """Both forms, in values and gradients. The kernel's own value, which departs from the formula, is informative."""
    operators = {"bi-wkv": (scans.bi_wkv, scans.bi_wkv_plain),
                 "selective-scan": (scans.selective_scan, scans.selective_scan_plain),
                 "linear-attention": (scans.linear_attention, scans.linear_attention_plain)}
    for operator in operators[case.arch]:
        x = {k: v.clone().requires_grad_() for k, v in case.inputs.items() if k != "gy"}
        if case.arch == "selective-scan":
            y, last = operator(*(x.get(k) for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")),
                               case.config["delta_softplus"])
        elif case.arch == "bi-wkv":
            y, last = operator(*(x[k] for k in "wukv")), None
        else:
            assert case.config.get("kernel", "relu") == "relu"
            y, last = operator(*(x[k] for k in "qkv"), case.config["eps"]), None
        (y * case.inputs["gy"]).sum().backward()
        ours = {"y": y, "last_state": last} | {f"grad_{k}": v.grad for k, v in x.items()}
        for name, value in case.outputs.items():
            if name != "y_official_kernel":
                same(ours[name], value, f"{operator.__name__}: {name}")


def check_module(case, module, call, seen, points=()):
    """call() -> y of a module with hooks at `points`; then the gradients of mean(y^2)."""
    for name, part, index in points:
        part.register_forward_hook(lambda m, args, output, name=name, index=index: seen.__setitem__(
            name, output if index is None else output[index]))
    seen["y"] = call()
    seen["loss"] = seen["y"].square().mean()
    seen["loss"].backward()
    for name, p in module.named_parameters():
        if p.grad is not None:
            seen |= {f"grad_norm:{name}": p.grad.norm(), f"grad:{name}": p.grad}
    for name, value in case.outputs.items():
        if name not in ("y_cfg", "y_cfg_second_half"):
            same(seen[name], value, name, case.meta.get("tolerance", 1e-5))


def check_guided(case, model, x, t, y, null):
    """forward_with_cfg: the first half of x twice, the null condition in the second half, the first three channels
    guided, the rest as they came."""
    half = x[: len(x) // 2]
    n = case.outputs["y_cfg"].shape[0]
    both = torch.cat([half, half]) if n == len(x) else None
    assert both is not None, "y_cfg is of the batch's size"
    with torch.no_grad():
        out = model(both, t, y if null is None else null)
    cond, uncond = out[:, :3].chunk(2)
    eps = uncond + case.config["cfg_scale"] * (cond - uncond)
    same(torch.cat([torch.cat([eps, eps]), out[:, 3:]], 1), case.outputs["y_cfg"], "y_cfg")


def check_drwkv(case):
    part, config = case.config.get("part"), case.config
    if part == "q_shift":
        shifted = q_shift(case.inputs["x"], config["patch_resolution"], config["shift_pixel"], config["gamma"])
        return same(shifted, case.outputs["y"], "y", 0)
    model = convert.load_official("drwkv", config, case.state_dict).eval()
    if part == "block":
        grid, x, c = config["patch_resolution"], case.inputs["x"].requires_grad_(), case.inputs["c"]
        x_mix = case.inputs["x_mix"]
        seen = {"spatial_mix": model.att(x_mix, grid), "channel_mix": model.ffn(x_mix, grid)}
        twin = DRWKVBlock(config["n_embd"], config["layer_id"], config["n_layer"], config["skip"],
                          init=config["init_mode"])
        for name, value in twin.state_dict().items():
            if "spatial_" in name:
                same(value, case.state_dict[name], f"initial {name}")

        def call():
            y = model(x, c, grid, case.inputs.get("skip"))
            seen["grad_x"] = torch.autograd.grad(y.square().mean(), x, retain_graph=True)[0]
            return y

        return check_module(case, model, call, seen)
    x, t, y = case.inputs["x"], case.inputs["t"], case.inputs.get("y")
    points = [("time_embed", model.time_embed, None), ("after_in_block0", model.in_blocks[0], None),
              ("after_mid_block", model.mid_block, None), ("after_last_out_block", model.out_blocks[-1], None)]
    check_module(case, model, lambda: model(x, t, y), {}, points)
    if "y_cfg" in case.outputs:
        check_guided(case, model, x, t, y, None)


def check_mamba(case):
    model, x = convert.load_official("mamba-block", case.config, case.state_dict), case.inputs["x"].requires_grad_()
    seen = {}

    def call():
        y = model(x)
        seen["grad_x"] = torch.autograd.grad(y.square().mean(), x, retain_graph=True)[0]
        return y

    check_module(case, model, call, seen)


def check_dimba(case):
    part, x, seen = case.config["part"], case.inputs["x"], {}
    model = convert.load_official("dimba", case.config, case.state_dict).eval()
    text, mask = case.inputs.get("text"), case.inputs.get("mask")
    mask = mask.bool() if mask is not None else None
    if part == "mamba_blocks":
        h, r = x, None
        for k, block in enumerate(model):
            h, r = block(h, r)
            same(h, case.outputs[f"hidden{k}"], f"hidden{k}")
            same(r, case.outputs[f"residual{k}"], f"residual{k}")
    elif part == "attention_block":
        x.requires_grad_()
        seen = {"self_attn": model.attn(x), "cross_attn": model.cross_attn(x, text, mask)}

        def call():
            y = model(x, text, case.inputs["t0"], mask)
            seen["grad_x"] = torch.autograd.grad(y.square().mean(), x, retain_graph=True)[0]
            return y

        check_module(case, model, call, seen)
    else:
        points = [("time_embed", model.t_embedder, None), ("t0", model.t_block, None),
                  ("text_proj", model.y_embedder, None)]
        points += [(f"after_attn{k}", block, None) for k, block in enumerate(model.blocks)]
        for k, block in enumerate(model.mamba_blocks):
            points += [(f"after_mamba{k}", block, 0), (f"residual{k}", block, 1)]
        size = [case.inputs[k].view(len(x), -1) for k in ("img_hw", "aspect_ratio") if k in case.inputs]
        size = torch.cat(size, 1) if size else None
        t, y = case.inputs["t"], Text(text, mask)
        check_module(case, model, lambda: model(x, t, y, size), seen, points)
        if "y_cfg" in case.outputs:
            check_guided(case, model, x, t, y, None)


def check_lit(case):
    if case.config["part"] == "op":
        return check_scan(case)
    model, seen = convert.load_official("lit", case.config, case.state_dict), {}
    x = case.inputs["x"].requires_grad_()
    if case.config["part"] == "model":
        points = [(f"after_block{k}", block, None) for k, block in enumerate(model.blocks)]
        return check_module(case, model, lambda: model(x, case.inputs["t"], case.inputs["y"]), seen, points)

    def call():
        y = model(x)
        seen["grad_x"] = torch.autograd.grad(y.square().mean(), x, retain_graph=True)[0]
        return y

    check_module(case, model, call, seen)


@pytest.mark.parametrize("name", ["dico-model", "dico-pixel", "uvit-cond", "uvit-uncond", "dimr-2r", "dimr-3r"])
def test_sizes_are_read_off_the_weights(name):
    case = golden.load(Path(__file__).parent / "golden" / f"{name}.npz")
    unknown = {"num_attention_heads", "num_heads", "dropout_prob"}
    read = convert.infer_config(case.arch, case.state_dict)
    stages = read.pop("stage_configs", [])
    for k, stage in enumerate(stages):
        theirs = case.config["stage_configs"][k]
        wrong = [key for key in theirs if key not in unknown and theirs[key] != stage[key]]
        assert wrong in ([], ["num_blocks"]) and theirs["num_blocks"] // 2 == stage["num_blocks"] // 2
    assert [key for key in read if key in case.config and key not in unknown and read[key] != case.config[key]] == []


# ---------------------------------------------------------------------------- fit, fitv2, flag-dit, rope, preprocessing


def check_tokens(case):
    """FiT, FiTv2, Flag-DiT: mixed sizes come as x0, x1, ...; block and attention outputs of an image of a mixed batch
    are recorded without the padding."""
    model = convert.load_official(case.arch, case.config, case.state_dict).eval()
    i, out, seen = case.inputs, case.outputs, {}
    blocks = model.blocks if hasattr(model, "blocks") else model.layers
    points = {"t_emb": model.t_embedder, "block0": blocks[0], "attn0": getattr(blocks[0], "attention", None)}
    for name, module in points.items():
        if module is not None:
            module.register_forward_hook(lambda m, args, output, name=name: seen.update({name: output} | seen))
    mixed = "x0" in i
    count = sum(name[0] == "x" and name[1:].isdigit() for name in i)
    x, noise = ([i.get(f"{name}{k}") for k in range(count)] if mixed else i.get(name) for name in ("x", "noise"))
    if "text" not in i:
        y, null = i["y"], torch.full_like(i["y"], case.config["num_classes"])
    else:
        y = Text(i["text"], i["text_mask"].bool())
        null = Text(i["null_text"], i["null_text_mask"].bool()) if "null_text" in i else None
    sampling = case.meta.get("sampling", {})
    model.ntk_factor = sampling.get("ntk_factor", getattr(model, "ntk_factor", None))
    model.rope_scaling = sampling.get("rope_scaling_factor", getattr(model, "rope_scaling", None))
    model.base_length = sampling.get("base_seqlen") if sampling.get("proportional_attn") else None
    t = i["t"]

    def guided(x, t):
        one, outputs = lambda y: lambda x, t: diffusion.Denoised(model(x, t, y), model(x, t, y)), []
        for k in range(len(x)):                        # the scale may depend on each sample's time
            scale = guidance_scale(case.meta, t[k])
            d = diffusion.guided(one(y[k:k + 1]), one(null[k:k + 1]), scale, channels=3)(x[k:k + 1], t[k:k + 1])
            outputs.append(d.eps)
        return torch.cat(outputs)

    ours = {"out": guided(x, t) if "cfg_scale" in case.meta else model(x, t, y)}
    if "euler" in case.meta:
        process = diffusion.RectifiedFlow("flow", shift=case.meta["euler"]["shift"])
        times = process.times(case.meta["euler"]["num_steps"] - 1, "uniform")
        denoise = lambda x, s: process.denoised(-guided(x, 1 - torch.as_tensor(s).float().expand(len(x))), x,
                                                torch.as_tensor(s).float().expand(len(x)))
        *_, ours["sample"] = diffusion.SAMPLERS["euler"](denoise, x, times, process, torch.randn)
        ours["times"] = (1 - times).float()
    if any(name.startswith(("loss", "mse", "vb")) for name in out):
        variance = case.config.get("learn_sigma") and case.arch == "fit"
        process = (diffusion.Discrete(diffusion.linear_betas(), learned_variance=variance) if case.arch == "fit" else
                   diffusion.RectifiedFlow("flow"))
        net = model if case.arch == "fit" else convert.Reversed(model)
        objective = objectives.Diffusion(net, process, None)
        x0, sizes = canvas(x) if mixed else (x, None)
        eps = canvas(noise)[0] if mixed else noise
        ours |= objective.parts(x0, y, t if case.arch == "fit" else 1 - t, eps, sizes)
        ours |= {"loss_mse_mean": ours["mse"].mean(), "loss_mean": ours["loss"].mean()}
        ours["loss_mse_mean" if mixed and variance else "loss_mean"].backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                ours |= {f"grad_norm:{name}": p.grad.norm(), f"grad:{name}": p.grad}
    if mixed:
        p = case.config["patch_size"]
        for k, image in enumerate(x):
            tokens = image.shape[1] // p * (image.shape[2] // p + (case.arch == "flag-dit-text"))
            ours[f"out{k}"] = ours["out"][k]
            for name in ("block0", "attn0"):           # the real tokens of all images, one after the other
                if name in seen:
                    ours[f"{name}_{k}"], seen[name] = seen[name][:tokens, 0], seen[name][tokens:]
    for name, value in out.items():
        same({**seen, **ours}[name], value, name)


def guidance_scale(meta, t):
    """FiT's guidance at t = 1 - share; scale_pow 0 is a constant one."""
    s, k = meta["cfg_scale"], meta.get("scale_pow", 0.0)
    return objectives.power_cosine(s, 1 - min(t.item(), 1), k) if k else s


def check_rope2d(case):
    c, d = case.config, case.config["head_dim"]
    names = {"normal": "direct", "linear": "pi", "ntk-aware": "ntk", "ntk-aware-pro1": "ntk-pro1",
             "ntk-aware-pro2": "ntk-pro2"}
    row, column = (v.flatten()[None] for v in torch.meshgrid(torch.arange(c["h"]), torch.arange(c["w"]), indexing="ij"))
    for key, value in case.outputs.items():
        kind, _, variant = key.partition(":")
        name, _, scale = variant.partition("/")
        rope, own = names.get(name, name), scale == "decoupled"
        lengths = (c["h"], c["w"]) if own else 2 * [max(c["h"], c["w"])]
        cos, sin = rope_2d(row, column, (c["h"], c["w"]), d, "vision-" * own + rope, c["ori_max_pe_len"], c["theta"])
        if kind.startswith("freqs"):
            length = lengths[kind == "freqs_w"]
            ours = rope_frequencies(d // 2, length, rope, c["ori_max_pe_len"], c["theta"])[0].float()
        elif kind == "factor":
            ours = rope_factor((c["h"], c["w"]), rope, c["ori_max_pe_len"])[0].float()
        elif kind in ("cos", "sin"):
            ours = (cos if kind == "cos" else sin)[0].repeat_interleave(2, 1)
        else:
            assert kind == "q_rot", f"nothing here computes {kind}"
            kept = re.search(r"every (\d+)th token", case.meta["note"])
            step = int(kept[1]) if kept else 1
            ours = rotate(case.inputs["q"], cos[:, ::step], sin[:, ::step])
        same(ours, value, key)


def check_sizes(case):
    c = case.config
    if case.arch == "fit-resize":
        ours = {"wh": torch.tensor([data.fit_size(*wh, c["image_size"], c["vae_down"] * c["patch_size"])
                                    for wh in case.inputs["wh"].tolist()])}
    else:
        ours = {"sizes": torch.tensor(data.crop_sizes(c["num_patches"], c["patch_size"], c["max_ratio"]))}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


CHECKS = {"bi-wkv": check_scan, "selective-scan": check_scan, "linear-attention": check_lit, "drwkv": check_drwkv,
          "mamba-block": check_mamba, "dimba": check_dimba,
          "dit": check_dit,
          "dit-moe": check_dit_moe, "terdit": check_terdit, "t-stitch": check_stitch,
          "dico": check_dico, "uvit": check_uvit, "td-ln": check_td_ln, "dimr": check_dimr,
          "fit": check_tokens, "fitv2": check_tokens, "flag-dit": check_tokens, "flag-dit-text": check_tokens,
          "rope2d": check_rope2d, "fit-resize": check_sizes, "lumina-crops": check_sizes}
for path in sorted(Path(__file__).parent.glob("golden_*.py")):           # each library's checks, in a file of its own
    CHECKS |= import_module(path.stem).CHECKS


def test_golden(golden_file):
    assert golden_file is not None, "the folder given by --golden holds no .npz"
    case = golden.load(golden_file)
    if case.arch not in CHECKS:
        pytest.fail(f"{golden_file.name}: no check is written for architecture {case.arch!r}")
    CHECKS[case.arch](case)
