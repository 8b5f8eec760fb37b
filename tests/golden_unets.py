"""DiCo, shallowdream204/DiCo; U-ViT, baofff/U-ViT; DiMR and its time-dependent norm, qihao067/DiMR."""

import torch
import torch.nn.functional as F
from published import chain, compare, gradients, guided, output_of, same, watched

import convert
import objectives
from models import channel_norm


def published(case, model):
    """{published name: parameter}, for the gradients that are recorded."""
    pairs = {"dico": convert.DICO, "uvit": convert.UVIT, "dimr": convert.DIMR, "td-ln": ()}[case.arch]
    own, names = dict(model.named_parameters()), {name.partition(":")[2] for name in case.outputs if ":" in name}
    ours = {name: next(iter(convert.renamed(convert.td_ln_ours({name: None}), pairs))) for name in names}
    return {name: own[new] for name, new in ours.items() if new in own}


def recorded_gradients(case, model):
    """The gradients of what was called backward, in the recorded shapes (position tables are flat there)."""
    ours = gradients(published(case, model))
    return {name: value.reshape(case.outputs[name].shape) for name, value in ours.items() if name in case.outputs}


def with_mse(case, model, out):
    """The loss against the recorded target and its gradients, if there is one."""
    if "target" not in case.inputs:
        return {"out": out}
    loss = (out - case.inputs["target"]).square().mean()
    loss.backward()
    return {"out": out, "loss": loss} | recorded_gradients(case, model)


def dico(case):
    model, i = convert.load_official("dico", case.config, case.state_dict).eval(), case.inputs
    kinds = {"cca": dico_gate, "block": dico_block, "train_loss": dico_loss, "cfg": dico_guidance}
    compare(case, kinds.get(case.config.get("part"), dico_forward)(case, model, i))


def dico_gate(case, model, i):
    seen = watched({"gate": model.conv}, lambda args, output: output.sigmoid().flatten(1))
    return {"out": model(i["x"])} | seen


def dico_block(case, model, i):
    x, c = i["x"].requires_grad_(), i["c"].requires_grad_()
    gate = watched({"cca_gate": model.cca.conv}, lambda args, output: output.sigmoid().flatten(1))
    seen = watched({"modulation": model.adaLN_modulation, "conv1": model.conv1, "conv2": model.conv2,
                    "conv3": model.conv3})
    out = model(x, c)
    (out * i["probe"]).mean().backward()
    return {"out": out, "norm1": channel_norm(x), "grad:x": x.grad, "grad:c": c.grad, **seen, **gate,
            **recorded_gradients(case, model)}


def dico_loss(case, model, i):
    process, x0 = chain({"learn_sigma": case.config["learn_sigma"]}), i.get("x0", i.get("x"))
    ours = process.loss(model, x0, i["y"], i["t"], i["noise"]) | {"x_t": process.noised(x0, i["noise"], i["t"])}
    ours["loss"].mean().backward()
    return ours | recorded_gradients(case, model)


def dico_guidance(case, model, i):
    process, null = chain({"learn_sigma": case.config["learn_sigma"]}), torch.full_like(i["y"],
                                                                                       case.config["num_classes"])
    denoise = guided(process, model, i["y"], null, case.config["cfg_scale"])
    return {"guided_3ch": output_of(denoise(i["x"], i["t"])), "cond": model(i["x"], i["t"], i["y"]),
            "uncond": model(i["x"], i["t"], null)}


def dico_forward(case, model, i):
    seen = watched({"x_embed": model.x_embedder, "t_embed_1": model.t_embedder[0], "enc_1": model.encoder1[-1],
                    "enc_2": model.encoder2[-1], "latent": model.middle[-1], "dec_2": model.decoder2[-1],
                    "dec_1": model.decoder1[-1]})
    down = watched({"down_1": model.encoder2[0]}, lambda args, output: args[0])
    up = watched({"up_2": model.up2}, lambda args, output: F.pixel_shuffle(output, 2))
    out = model(i["x"], i["t"], i.get("y"))
    return with_mse(case, model, out) | seen | down | up


def uvit(case):
    model, i = convert.load_official("uvit", case.config, case.state_dict).eval(), case.inputs
    if case.config.get("part") == "block":
        return compare(case, {"out": model(i["x"], i.get("skip")), "attn": model.attn(i["x"])})
    seen = watched({"patch_embed": model.x_embedder, "time_token": model.t_embedder, "in_block0": model.in_blocks[0],
                    "mid_block": model.mid_block, "out_block0": model.out_blocks[0],
                    "decoder_pred": model.decoder_pred})
    out = model(i["x"], i["t"], i.get("y", i.get("context")))
    compare(case, with_mse(case, model, out) | seen)


def td_ln(case):
    model, tau = convert.load_official("td-ln", case.config, case.state_dict), case.inputs["log_snr"] / 4
    same(case.inputs["t"] / 500 - 1, tau, "tau")
    gain, out = model.gain(tau), model(case.inputs["x"], tau)
    (out * case.inputs["probe"]).mean().backward()
    bias = {} if model.bias is None else {"current:bias": model.bias(tau)}
    compare(case, {"current:weight": gain, "current:scale": gain, "out": out, **bias,
                   **recorded_gradients(case, model)})


def planes(x):
    """(B, h, w, D), as our branches hold it, -> (B, D, h, w)."""
    return x.permute(0, 3, 1, 2)


def branch_points(branch, name, first_block=None):
    """Patches with their positions, what comes up from below, and the first block."""
    seen = watched({f"{name}input": branch.x_embedder}, lambda args, out: out + planes(
        branch.pos_embed[None, :out.shape[2], :out.shape[3]]))
    return seen, watched({first_block: branch.blocks[0]} if first_block else {})


def dimr(case):
    i, part = case.inputs, case.config.get("part")
    if part == "loss":
        return compare(case, multi_scale(case.config["loss_coeffs"], [i[f"pred_{k}"] for k in range(
            len(case.config["loss_coeffs"]))], i["noise"]))
    model = convert.load_official("dimr", case.config, case.state_dict).eval()
    if part == "branch":
        cascade = next((i[name].permute(0, 2, 3, 1) for name in ("cascade", "lowres") if name in i), None)
        embedded, _ = branch_points(model, "")
        raised = watched({"upsampled": model.up_norm}, lambda args, out: planes(out)) if cascade is not None else {}
        out, states = model(i["x"], i["t"] / 500 - 1, i.get("y"), cascade)
        return compare(case, {"input_layer": embedded["input"], "out": out, "cascade": planes(states), **raised})
    ours = [seen for k, branch in enumerate(model.branches)
            for seen in branch_points(branch, f"branch{k}_", f"branch{k}_block0")]
    outputs = model(i["x"], i["t"], i.get("y"), every=True)
    ours = {name: value for seen in ours for name, value in seen.items()}
    ours |= {f"out_{k}": out for k, out in enumerate(outputs)} | {"out": model(i["x"], i["t"], i.get("y"))}
    if "noise" in i:
        n = len(outputs) - 1
        shares = [4 ** (k / max(1, n) - 1 + (n == 0)) for k in range(len(outputs))]
        ours["loss"] = multi_scale(shares, outputs, i["noise"])["loss"]
        ours["loss"].mean().backward()
        ours |= recorded_gradients(case, model)
    compare(case, ours)


def multi_scale(shares, predictions, noise):
    errors = objectives.multi_scale_errors(predictions, noise)
    targets = {f"target_{k}": objectives.area_target(noise, p.shape[-1]) for k, p in enumerate(predictions)}
    return {"loss": sum(share * e for share, e in zip(shares, errors)), **targets,
            **{f"mse_{k}": e for k, e in enumerate(errors)}}


CHECKS = {"dico": dico, "uvit": uvit, "td-ln": td_ln, "dimr": dimr}
