"""Every golden case, numbers recorded from the published implementations, against our computation. A case of an unknown
architecture fails and is named. `pytest tests/test_golden.py --golden FOLDER` runs a folder of other cases."""

from pathlib import Path

import golden
import pytest
import torch
import torch.nn.functional as F
from golden_core import check_loss, check_sampler, check_schedule

import convert
import diffusion
import objectives
from layers import LabelEmbedder, drop_labels, position_table, timestep_embedding
from models import channel_norm, create_model


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


# --------------------------------------------------------------------------------------------- dico, uvit, dimr, td-ln


def watched(module, take=lambda args, output: output):
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
        gate = watched(model.conv, lambda args, output: output.sigmoid().flatten(1))
        return compare(case, {"out": model(i["x"]), "gate": gate})
    if part == "block":
        x, c = i["x"].requires_grad_(), i["c"].requires_grad_()
        ours = {"norm1": channel_norm(x), "modulation": watched(model.adaLN_modulation),
                "cca_gate": watched(model.cca.conv, lambda args, output: output.sigmoid().flatten(1)),
                **{name: watched(getattr(model, name)) for name in ("conv1", "conv2", "conv3")}, "out": model(x, c)}
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
    ours = {"x_embed": watched(model.x_embedder), "t_embed_1": watched(model.t_embedder[0]),
            "enc_1": watched(model.encoder1[-1]), "down_1": watched(model.encoder2[0], lambda args, output: args[0]),
            "enc_2": watched(model.encoder2[-1]), "latent": watched(model.middle[-1]),
            "up_2": watched(model.up2, lambda args, output: F.pixel_shuffle(output, 2)),
            "dec_2": watched(model.decoder2[-1]), "dec_1": watched(model.decoder1[-1])}
    ours["out"] = model(i["x"], i["t"], i.get("y"))
    backward_of_mse(case, ours["out"], ours)
    compare(case, ours, model, convert.DICO)


def check_uvit(case):
    model, i = convert.load_official("uvit", case.config, case.state_dict).eval(), case.inputs
    if case.config.get("part") == "block":
        return compare(case, {"out": model(i["x"], i.get("skip")), "attn": model.attn(i["x"])})
    ours = {"patch_embed": watched(model.x_embedder), "time_token": watched(model.t_embedder),
            "in_block0": watched(model.in_blocks[0]), "mid_block": watched(model.mid_block),
            "out_block0": watched(model.out_blocks[0]), "decoder_pred": watched(model.decoder_pred)}
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
        return watched(branch.x_embedder, lambda args, out: out + planes(
            branch.pos_embed[None, :out.shape[2], :out.shape[3]]))

    if part == "branch":
        cascade, embedded = i["cascade"].permute(0, 2, 3, 1) if "cascade" in i else None, entry(model)
        out, cascade = model(i["x"], i["t"] / 500 - 1, i.get("y"), cascade)
        return compare(case, {"input_layer": embedded, "out": out, "cascade": planes(cascade)})
    ours = {}
    for k, branch in enumerate(model.branches):
        ours |= {f"branch{k}_input": entry(branch), f"branch{k}_block0": watched(branch.blocks[0])}
    outputs = model(i["x"], i["t"], i.get("y"), every=True)
    ours |= {f"out_{k}": out for k, out in enumerate(outputs)} | {"out": model(i["x"], i["t"], i.get("y"))}
    if "noise" in i:
        n = len(outputs) - 1
        errors = objectives.multi_scale_errors(outputs, i["noise"])
        ours["loss"] = sum(e * 4 ** (k / max(1, n) - 1 + (n == 0)) for k, e in enumerate(errors))
        ours["loss"].mean().backward()
    compare(case, ours, model, convert.DIMR)


@pytest.mark.parametrize("name", ["dico-model", "dico-pixel", "uvit-cond", "uvit-uncond", "dimr-2r", "dimr-3r"])
def test_sizes_are_read_off_the_weights(name):
    case = golden.load(Path(__file__).parent / "golden" / f"{name}.npz")
    read = convert.infer_config(case.arch, case.state_dict)
    unknown = {"num_attention_heads", "num_heads", "dropout_prob"}
    stages = read.pop("stage_configs", [])
    for k, stage in enumerate(stages):
        theirs = case.config["stage_configs"][k]
        wrong = [key for key in theirs if key not in unknown and theirs[key] != stage[key]]
        assert wrong in ([], ["num_blocks"]) and theirs["num_blocks"] // 2 == stage["num_blocks"] // 2
    assert [key for key in read if key in case.config and key not in unknown and read[key] != case.config[key]] == []


CHECKS = {"dico": check_dico, "uvit": check_uvit, "td-ln": check_td_ln, "dimr": check_dimr, "dit": check_dit,
          "schedule": check_schedule, "loss": check_loss, "sampler": check_sampler}


def test_golden(golden_file):
    assert golden_file is not None, "the folder given by --golden holds no .npz"
    case = golden.load(golden_file)
    if case.arch not in CHECKS:
        pytest.fail(f"{golden_file.name}: no check is written for architecture {case.arch!r}")
    CHECKS[case.arch](case)
