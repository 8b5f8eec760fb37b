"""TerDiT, Lucky-Lance/TerDiT: the ternary layer, forward pass, packed weights, guidance, training."""

import torch
from published import chain, compare, gradients, guided, output_of, same, watched

import convert
from layers import PackedLinear, TernaryLinear, pack_codes, replace_ternary, ternary, unpack_codes


def check(case):
    if "in_features" in case.config:
        return linear(case)
    model = convert.load_official("terdit", case.config, case.state_dict).eval()
    kind = training if "x0" in case.inputs else guidance if "cfg_scale" in case.meta else forward
    kind(case, model)


def linear(case):
    c, (x, g) = case.config, (case.inputs.get(k) for k in "xg")
    layer = TernaryLinear(torch.nn.Linear(c["in_features"], c["out_features"], c["bias"]))
    convert.fill(layer, case.state_dict, "this layer")
    y, q = layer(x.requires_grad_()), ternary(layer.weight)
    (y * g).sum().backward()
    codes = pack_codes(q.detach())
    ours = {"y": y, "ternary": q.detach().round(), "gamma": layer.weight.abs().mean()[None], "grad:x": x.grad,
            "fraction_zero": (q == 0).float().mean()[None], "packed_uint8": codes,
            "unpacked_minus1": unpack_codes(codes).float()}
    edges = {name: ternary(value) for name, value in case.inputs.items() if name.startswith("edge_")}
    compare(case, ours | gradients(dict(layer.named_parameters())) | edges)


def published_name(name):
    for ours, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        name = name.replace(f"feed_forward.{ours}", f"feed_forward.{theirs}")
    return name


def forward(case, model):
    x, t, y = (case.inputs[k] for k in "xty")
    points = {"patch_tokens": model.x_embedder, "final_tokens": model.final_layer, "layer_last": model.layers[-1]}
    for k, layer in enumerate(model.layers):
        points |= {f"layer{k}": layer, f"layer{k}.attention": layer.attention,
                   f"layer{k}.feed_forward": layer.feed_forward, f"layer{k}.adaLN": layer.adaLN_modulation,
                   f"layer{k}.adaLN_before_rms": layer.adaLN_modulation[1]}
    seen = watched(points)
    out = model(x, t, y)
    ours = {"out": out} | seen
    for name, m in model.named_modules():
        if isinstance(m, TernaryLinear):
            published, codes = published_name(name), ternary(m.weight).detach()
            ours |= {f"{published}.ternary": codes, f"packed_uint8:{published}.weight": pack_codes(codes)}
    ours["out_packed"] = replace_ternary(model, PackedLinear)(x, t, y)
    assert torch.equal(ours["out_packed"], out), "packing changes nothing, to the last bit"
    # the packed weights, under their published names, make the same model
    packed = {name: ours.get(f"packed_uint8:{name}", value) for name, value in case.state_dict.items()}
    again = convert.load_official("terdit", case.config, packed).eval()
    assert torch.equal(again(x, t, y), out)
    compare(case, ours)


def guidance(case, model):
    """The first three channels guided, the rest as with labels."""
    x, t, y = (case.inputs[k] for k in "xty")
    process, null = chain({"learn_sigma": case.config["learn_sigma"]}), torch.full_like(y, case.config["num_classes"])
    denoise = guided(process, model, y, null, case.meta["cfg_scale"])
    compare(case, {"out_first3": output_of(denoise(x, t)), "cond": model(x, t, y), "uncond": model(x, t, null)})


def training(case, model):
    process = chain({"learn_sigma": case.config["learn_sigma"], **case.meta.get("diffusion", {})})
    ours = process.loss(model, *(case.inputs[k] for k in ("x0", "y", "t", "noise")))
    ours["loss"].mean().backward()
    weights = dict(model.named_parameters())
    called = {name: next(iter(convert.renamed({name: None}, convert.TERDIT))) for name in case.state_dict}
    ours |= gradients({name: weights[mine] for name, mine in called.items()})
    for name, value in case.outputs.items():
        tolerance = 1e-5
        if name.endswith(("wq.alphas", "wk.alphas")) and case.config["qk_norm"]:
            # the norm behind it undoes any scale: a sum of terms that cancel, known no better than its terms
            layer = model.get_submodule(name.split(":")[1].removesuffix(".alphas"))
            terms = (layer.weight.grad / layer.alphas * ternary(layer.weight)).norm()
            tolerance *= max(1.0, (terms / value.norm()).item())
        same(ours[name].reshape(value.shape), value, name, tolerance)


CHECKS = {"terdit": check}
