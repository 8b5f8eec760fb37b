"""Published MaskGIT and MAGE against masked.py. Decodes run on the stored noise."""

import torch
from golden_vitok import check_quantisers, check_vqgan
from published import same

import convert_tokens
import masked


def compare(ours, case):
    for name, value in case.outputs.items():
        same(torch.as_tensor(ours[name]).reshape(value.shape), value, name)


def watched(points):
    """name -> what each module puts out (of a block: without its memory), filled in at every call."""
    seen = {}
    for name, module in points.items():
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(
            name, out[0] if isinstance(out, tuple) else out))
    return seen


def grad_norms(model, rename):
    """{"grad_norm:published name": norm}. rename: the published name of ours."""
    return {f"grad_norm:{rename(name)}": p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}


def stack(steps):
    """Step by step (B, ...) -> (B, T, ...)."""
    return torch.stack(list(steps), 1)


# ----------------------------------------------------------------------------------------------------- maskgit and mage


def check_maskgit(case):
    module = case.config.get("module")
    if module:
        {"vqgan_tokenizer": check_vqgan, "quantizers": check_quantisers}[module](case)
    elif not case.config:
        check_schedule(case)
    else:
        model = convert_tokens.load_tokens("maskgit", case.config, case.state_dict).eval()
        (check_decode if "gumbel_sample" in case.inputs else check_maskgit_forward)(case, model)


def check_maskgit_forward(case, model):
    ours = watched({"h_embed": model.token_emb, "h_attn0": model.blocks[0].norm1, "h_block0": model.blocks[0]})
    h, _ = model.states(case.inputs["tokens"], case.inputs["labels"])
    ours["logits"] = model.words(h)
    if "targets" in case.inputs:
        losses = masked.smoothed(ours["logits"][:, 1:], case.inputs["targets"])
        ours["loss"] = masked.per_sample(losses, case.inputs["weights"])
        ours["loss"].backward()
        for name in case.state_dict:
            (mine, _), = convert_tokens.translated(convert_tokens.MASKGIT_RULES, {name: None}).items()
            part = {"query": 0, "key": 1, "value": 2}.get(mine.split(".")[-2])
            if part is None:
                grad = dict(model.named_parameters())[mine].grad
            else:
                block, _, _, leaf = mine.rsplit(".", 3)
                grad = dict(model.named_parameters())[f"{block}.attn.qkv.{leaf}"].grad.chunk(3)[part]
            ours[f"grad_norm:{name}"] = grad.norm()
    compare(ours, case)


def check_decode(case, model):
    """MaskGIT's and MAGE's loop. A case counts what is hidden before each step."""
    options, seen = case.meta["options"], []
    sample, choice = (case.inputs[f"gumbel_{name}"] for name in ("sample", "choice"))
    numbers = (value for pair in zip(sample, choice) for value in pair)

    def predict(tokens, t):
        seen.append(model(tokens, case.inputs.get("labels"))[0])
        return seen[-1]

    tokens = case.inputs.get("tokens", torch.full(choice.shape[1:], model.codes))
    steps = list(masked.decode(predict, tokens, model.codes, options["num_iter"], lambda *sizes: next(numbers),
                               options.get("schedule", "cosine"), options["choice_temperature"]))
    hidden = stack(step.hidden for step in steps)
    count = hidden.sum(2)
    after = torch.cat([count[:, 1:], torch.zeros_like(count[:, :1])], 1)
    compare({"final_tokens": steps[-1].tokens, "tokens_per_iter": stack(step.tokens for step in steps),
             "mask_per_iter": hidden.long(), "n_masked": count, "n_decoded": count - after, "logits_iter0": seen[0],
             "logits_last": seen[-1]}, case)


def check_schedule(case):
    for name, value in case.outputs.items():
        kind, *rest = name.split("_")
        if kind == "gamma":
            ours = torch.stack([masked.gamma(r, rest[0], 256) for r in case.inputs["ratio"].tolist()])
        else:
            left = total = int(rest[1][1:])
            ours, T = [], int(rest[2][1:])
            for t in range(T):
                left = masked.still_hidden(t, T, total, left, rest[0]).item()
                ours.append(left)
        same(torch.as_tensor(ours).to(value.dtype), value, name)


def check_mage(case):
    if not case.config:
        check_ratio(case)
        return
    model = convert_tokens.load_tokens("mage", case.config, case.state_dict).eval()
    (check_decode if "gumbel_sample" in case.inputs else check_mage_forward)(case, model)


def check_mage_forward(case, model):
    tokens, c = case.inputs["tokens"], case.config
    hidden, drop = model.hidden_and_dropped(case.inputs["noise"], case.inputs["mask_rate"].item(), c["mask_ratio_min"])
    ours = watched({"h_embed": model.token_emb, "h_block0": model.blocks[0], "h_dec_block0": model.decoder_blocks[0]})
    latent, _ = model.encode(torch.where(hidden, model.codes, tokens), drop=drop)
    h, _ = model.decode(latent, hidden, drop=drop)
    words, front = model.words(h), torch.zeros(len(tokens), 1)
    loss = model.loss(tokens, None, (hidden, drop))
    loss.backward()
    ours |= grad_norms(model, str) | {
        "latent": latent, "loss": loss, "drop_mask": torch.cat([front, drop.float()], 1),
        "all_mask": torch.cat([front, hidden.float()], 1), "logits": words[:, 1:, :model.codes],
        "logits_last40": words[..., -40:]}
    compare(ours, case)


def check_ratio(case):
    """Quantiles directly; the rest of what SciPy says of the same distribution follows from them."""
    for name in {key.split(".")[0] for key in case.outputs}:
        low, high, mean, std = case.outputs[f"{name}.params"].double().tolist()
        ratio = masked.TruncatedNormal(low, high, mean, std)
        same(ratio.quantile(case.inputs["q"]).float(), case.outputs[f"{name}.ppf"], f"{name}.ppf")
        u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
        draws = ratio.quantile(u)
        same(draws.mean(), case.outputs[f"{name}.mean"], f"{name}.mean")
        same(draws.std(), case.outputs[f"{name}.std"], f"{name}.std")
        share = torch.searchsorted(draws, case.inputs["x"].double()) / len(draws)
        same(share.float(), case.outputs[f"{name}.cdf"], f"{name}.cdf")
        count = torch.bincount((256 * draws).ceil().long(), minlength=257) / len(draws)
        same(count.float(), case.outputs[f"{name}.p_num_masked_of_256"], f"{name}.p_num_masked_of_256", 1e-3)


CHECKS = {"maskgit": check_maskgit, "mage": check_mage}
