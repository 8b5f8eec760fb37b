"""DiT-MoE, feizc/DiT-MoE: the layer with its gradients, forward pass, training, rectified flow, upcycling, routing."""

import torch
import torch.nn.functional as F
from published import chain, compare, guided, same, watched

import convert
import diffusion
import moe
from guidance import guided as guide
from models import create_model
from samplers import SAMPLERS, grid_times


def check(case):
    if "embed_dim" in case.config:
        layer(case)
    elif not case.state_dict:
        compare(case, {name: torch.tensor(counts(name.split(":")[1])) for name in case.outputs})
    else:
        model = convert.load_official("dit-moe", case.config, case.state_dict).eval()
        kind = (routing_of_samples if "count_step" in case.outputs else upcycling if "upcycled" in case.meta else
                flow if "t_logit" in case.inputs else training if "x0" in case.inputs else forward)
        compare(case, kind(case, model))


def counts(size):
    with torch.device("meta"):
        model = create_model("dit-moe-" + size.lower().replace("_", "/"), 32, 4, 1000, learn_sigma=True)
    return sum(p.numel() for p in model.parameters()), moe.activated_parameters(model)


def stacked(name, values):
    """The value of a published parameter's name out of {our name: value}: single experts are rows of a stack."""
    (ours, _), = convert.moe_ours({name: torch.zeros(())}, None).items()
    if ".experts." in name or name.startswith("experts."):
        return values[ours][int(name.split("experts.")[1].split(".")[0])]
    return values[ours]


def routing(router_output, prefix):
    """The recorded forms of what a router says."""
    weight, index, probs = router_output
    return {f"{prefix}router_probs": probs, f"{prefix}router_index_sorted": index.sort(1)[0],
            f"{prefix}router_combine": torch.zeros_like(probs).scatter(1, index, weight)}


def forward(case, model):
    points, inputs = {"final_tokens": model.final_layer, "block_last": model.blocks[-1]}, {}
    for k, block in enumerate(model.blocks):
        points |= {f"block{k}.attn": block.attn, f"block{k}.moe": block.mlp, f"block{k}": block,
                   f"block{k}.moe.shared": block.mlp.shared, f"block{k}.": block.mlp.router}
        inputs[f"block{k}.moe.input"] = block.mlp
    seen, fed = watched(points), watched(inputs, lambda args, output: args[0])
    ours = {"out": model(*(case.inputs[k] for k in "xty"))}
    for k in range(len(model.blocks)):
        ours |= routing(seen[f"block{k}."], f"block{k}.")
    return ours | seen | fed


def layer(case):
    c, alpha = case.config, case.meta["aux_loss_alpha"]
    D = c["embed_dim"]
    ours = moe.MoE(D, c["mlp_ratio"] * D, c["num_experts"], c["num_experts_per_tok"], case.meta["n_shared_experts"] * D)
    state = {name.removeprefix("mlp."): value for name, value in
             convert.moe_ours({f"moe.{name}": value for name, value in case.state_dict.items()}, None).items()}
    convert.fill(ours, state, "this layer")
    for ours.dispatch in (moe.loop, moe.grouped):
        for name, value in layer_outputs(case, ours, alpha).items():
            if name in case.outputs:
                same(value, case.outputs[name], f"{ours.dispatch.__name__}: {name}")


def layer_outputs(case, m, alpha):
    """Everything recorded of the layer m; `zero_task`: the balance loss acts though the task's gradient is zero."""
    x, g, router = case.inputs["x"].requires_grad_(), case.inputs["g"], watched({"router": m.router})
    ours = {"y_eval": m.eval()(x), "shared_only": m.shared(x)} | routing(router["router"], "")
    ours["routed_only"] = ours["y_eval"] - ours["shared_only"]
    ours["expert_outputs"] = torch.stack([F.linear(F.silu(x.flatten(0, 1) @ gate.T) * (x.flatten(0, 1) @ up.T), down)
                                          for gate, up, down in zip(m.gate, m.up, m.down)], 1)
    weights = {"x": x} | {f"mlp.{name}": p for name, p in m.named_parameters()}
    ours["y_train"] = m.train()(x)
    losses, _ = moe.balance_losses(m)
    aux, task = alpha * losses.sum(), (ours["y_train"] * g).sum()
    ours["aux_loss"] = aux[None]
    for kind, loss in {"aux": aux, "task_only": task, "train": task + aux, "zero_task": 0 * task + aux}.items():
        grads = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
        grads = {name: value for name, value in zip(weights, grads) if value is not None}
        ours |= {f"{kind}_grad:x": grads["x"], f"{kind}_grad:gate.weight": grads["mlp.router.weight"]}
        for name in case.state_dict if kind in ("task_only", "train") else ():
            value = stacked(f"moe.{name}", grads)
            ours |= {f"{kind}_grad:{name}": value, f"{kind}_grad_norm:{name}": value.norm()}
    missing = [name for name in case.outputs if name not in ours]
    assert not missing, f"nothing here computes {missing}"
    return ours


def training(case, model):
    process = chain({"learn_sigma": case.config["learn_sigma"], **case.meta.get("diffusion", {})})
    x0, t, y, noise = (case.inputs[k] for k in ("x0", "t", "y", "noise"))
    ours = {"mse_eval_mode": process.loss(model, x0, y, t, noise)["mse"]}
    ours |= process.loss(model.train(), x0, y, t, noise)
    model.balance, task = case.meta["aux_loss_alpha"], ours["loss"].mean()
    ours["aux_losses"] = torch.stack([model.balance * block.mlp.routed[0] for block in model.blocks])
    total = moe.balanced(model, task)["loss"]
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # What is recorded as task only is the total less the gradient of all balance losses, taken through the published
    # trick: there the last layer's loss, on its way up, calls forth the losses of all other layers a second time.
    for kind, loss in {"_task_only": task - ours["aux_losses"][:-1].sum(), "": total}.items():
        grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), retain_graph=True)))
        for name in case.state_dict:
            if name != "pos_embed":
                grad = stacked(name, grads)
                ours |= {f"grad{kind}:{name}": grad, f"grad_norm{kind}:{name}": grad.norm()}
    return ours


def flow(case, model):
    process = convert.DiTMoEFlow(spare=case.config["learn_sigma"])
    x0, noise, z, y = (case.inputs[k] for k in ("x0", "noise", "z", "y"))
    t = torch.sigmoid(case.inputs["t_logit"])
    ours = {"t": t, "loss_per_sample": process.loss(model, x0, y, t, noise)["loss"]}
    ours["loss"] = ours["loss_per_sample"].mean()[None]
    null, kept = torch.full_like(y, case.config["num_classes"]), []
    denoise = guide(process.denoiser(model, y), process.denoiser(model, null), case.meta["cfg_scale"])

    def keeping(x, t):
        kept.append(denoise(x, t))
        return kept[-1]

    with torch.no_grad():
        walk = SAMPLERS["euler"](keeping, z, grid_times(process, case.meta["sample_steps"]), process, None)
        ours["trajectory"] = torch.stack([z, *walk])
    return ours | {"x0_predictions": torch.stack([d.x0 for d in kept]), "final": ours["trajectory"][-1]}


def upcycling(case, dense):
    x, t, y = (case.inputs[k] for k in "xty")
    c = case.meta["upcycled"]
    same_names = "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "learn_sigma", "num_experts"
    model = create_model("dit-moe-nano", c["input_size"], c["in_channels"], c["num_classes"],
                         **{name: c[name] for name in same_names}, top_k=c["num_experts_per_tok"],
                         qk_norm=c["use_flash_attn"], null_class=c["class_dropout_prob"] > 0).eval()
    moe.upcycle(model, dense.state_dict())
    for k, block in enumerate(model.blocks):
        assert 0.5 < block.mlp.router.weight.std() / 0.02 < 2
        block.mlp.router.weight.data = case.inputs[f"gate:blocks.{k}.moe.gate.weight"]
    routers = watched({f"block{k}.gate_sum": block.mlp.router for k, block in enumerate(model.blocks)},
                      lambda args, output: output[0].sum(1))
    ours = {"out_dense": dense(x, t, y), "out_upcycled": model(x, t, y)} | routers
    for block in model.blocks:                          # our own form keeps the dense model's function
        block.mlp.router.renormalise = True
    same(model(x, t, y), ours["out_dense"], "the output, upcycled with renormalised weights")
    return ours


def routing_of_samples(case, model):
    process = chain({"learn_sigma": case.config["learn_sigma"], **case.meta.get("diffusion", {})})
    kept = diffusion.respaced(process.T, case.meta["respacing"])
    times = torch.tensor([*reversed(kept), -1], dtype=torch.float64)
    classes, null = case.meta["classes"], case.config["num_classes"]
    counter, finals = moe.Counter(model, null, len(kept)), []
    with torch.no_grad(), counter:
        for z, y, noises in zip(case.inputs["z"], case.inputs["y"], case.inputs["noises"]):
            denoise = guided(process, model, y[None], torch.full_like(y[None], null), case.meta["cfg_scale"])
            pool = iter(noises)
            walk = SAMPLERS["ddpm"](denoise, z[None], times, process, lambda shape: next(pool)[None])
            for counter.step, x in enumerate(walk, start=1):            # noqa: B007
                pass
            finals.append(x[0])
            counter.step = 0
    return {"count_class": counter.classes[classes], "count_position": counter.positions, "count_step": counter.steps,
            "final": torch.stack(finals)}


CHECKS = {"dit-moe": check}
