"""Every golden case, numbers recorded from the published implementations, against our computation. A case of an unknown
architecture fails and is named. `pytest tests/test_golden.py --golden FOLDER` runs a folder of other cases."""

import golden
import pytest
import torch
from golden_core import check_loss, check_sampler, check_schedule

import convert
import diffusion
import scans
from layers import LabelEmbedder, Text, drop_labels, position_table, timestep_embedding
from models import DRWKVBlock, create_model, q_shift


def same(ours, theirs, what, tolerance=1e-5):
    """||ours - theirs|| / ||theirs|| <= tolerance; integers must be equal."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, published {tuple(theirs.shape)}"
    if not theirs.is_floating_point():
        assert torch.equal(ours.to(theirs.dtype), theirs), f"{what} differs"
        return
    error = (ours.detach().double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


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


CHECKS = {"bi-wkv": check_scan, "selective-scan": check_scan, "linear-attention": check_lit, "drwkv": check_drwkv,
          "mamba-block": check_mamba, "dimba": check_dimba,
          "dit": check_dit, "schedule": check_schedule, "loss": check_loss, "sampler": check_sampler}


def test_golden(golden_file):
    assert golden_file is not None, "the folder given by --golden holds no .npz"
    case = golden.load(golden_file)
    if case.arch not in CHECKS:
        pytest.fail(f"{golden_file.name}: no check is written for architecture {case.arch!r}")
    CHECKS[case.arch](case)
