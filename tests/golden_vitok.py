"""Published ViTok, MaskGIT's VQGAN and the quantisers against autoencoders.py."""

import torch
import torch.nn.functional as F
from published import same

import autoencoders
import convert_tokens


def check_vitok(case):
    model = convert_tokens.load_tokens("vitok", case.config, case.state_dict)
    seen = {}

    def watch(name, module):
        module.register_forward_hook(lambda m, args, output: seen.__setitem__(name, output))

    watch("h_enc_block0", model.encoder.blocks[0])
    watch("h_enc", model.encoder)
    watch("h_dec_block0", model.decoder.blocks[0])
    model.tubelet_embed.proj.register_forward_hook(
        lambda m, args, output: seen.__setitem__("h_embed", output.flatten(2).transpose(1, 2)))
    x, eps = case.inputs["x"], case.inputs.get("eps")
    mean, logvar = model.posterior(x)
    rec, terms = model(x, eps)
    seen |= {"mean": mean, "rec": rec, "mse": F.mse_loss(rec, x),
             "huber_l1_beta005": F.smooth_l1_loss(rec, x, beta=0.05)}
    if logvar is None:
        seen |= {"std": torch.zeros_like(mean), "z": mean, "logvar": torch.zeros_like(mean)}
    else:
        std = (0.5 * logvar).exp()
        seen |= {"logvar": logvar, "std": std, "z": mean + std * eps, "kl": autoencoders.gaussian_kl(mean, logvar)}
    loss = seen["loss"] = seen["mse"] + 1e-3 * terms.get("kl", torch.zeros(()))
    loss.backward()
    grads = {f"grad_norm:{name}": p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    fixed = {name: value.detach().clone() for name, value in seen.items()}      # hooks write again below
    mode = model.decode(model.encode(x))
    ours = fixed | grads | {"rec_mode": mode}
    for name, value in case.outputs.items():
        if name == "kl" and logvar is None:
            continue
        same(ours[name].reshape(value.shape), value, name)
    if case.config.get("posemb") == "sincos3d":                # the table itself, not only the stored copy of it
        same(autoencoders.sincos_3d(model.grid, case.config["width"]), case.state_dict["posemb"], "posemb")


def check_vqgan(case):
    model = convert_tokens.load_tokens("vqgan", case.config, case.state_dict)
    x = case.inputs["x"]
    z = model.encoder(x)
    rec, terms = model(x)
    l2 = F.mse_loss(rec, x)
    loss = l2 + terms["commit"] + terms["codebook"] + terms["entropy"]
    loss.backward()
    names = convert_tokens.vqgan_names(len(case.config["channel_multipliers"]), case.config["num_res_blocks"])
    grads = {name: p.grad for name, p in model.named_parameters()}
    ours = {"z": z, "ids": terms["codes"], "rec": rec, "loss": loss, "l2": l2, "e_latent_loss": terms["commit"],
            "q_latent_loss": terms["codebook"], "entropy_loss": terms["entropy"],
            "decode_ids": model.decode(case.inputs["ids_given"])}
    ours |= {f"grad_norm:{name}": grads[convert_tokens.vqgan_name(name, names)].norm() for name in case.state_dict}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


def check_quantisers(case):
    ours = {}
    for name in {key.split(".")[0] for key in case.outputs} - {"lfq"}:
        z = case.inputs[f"z_{name}"].requires_grad_()
        quantise = autoencoders.FSQ(case.outputs[f"{name}.levels"].tolist())
        q, indices, _ = quantise(z)
        grad, = torch.autograd.grad(q.sum(), z)
        ours |= {f"{name}.bound": quantise.bound(z), f"{name}.codes": q, f"{name}.indices": indices,
                 f"{name}.levels": quantise.levels, f"{name}.grad_codes_wrt_z": grad}
        same(quantise.lookup(indices), case.outputs[f"{name}.codes"], f"{name} looked up")
    if "z_lfq" in case.inputs:
        z = case.inputs["z_lfq"]
        quantise = autoencoders.LFQ(z.shape[-1]).eval()
        q, indices, _ = quantise(z)
        ours |= {"lfq.codes": q, "lfq.indices": indices}
        same(quantise.lookup(indices), case.outputs["lfq.codes"], "lfq looked up")
    for name, value in case.outputs.items():
        same(ours[name], value, name)


CHECKS = {"vitok": check_vitok}
