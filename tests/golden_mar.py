"""Published MAR, and ReCAP on MAR and on MaskGIT-r, against masked.py. Decodes run on the stored noise."""

import math

import torch
from golden_masked import compare, grad_norms, watched

import convert_tokens
import diffusion
import masked
import samplers

# ------------------------------------------------------------------------------------------------------------------ mar


def published_process():
    return diffusion.Discrete(diffusion.cosine_betas(), learned_variance=True)


def ladder(kept):
    """A case's kept steps, ascending, as sampling times."""
    return torch.tensor([*reversed(kept.tolist()), -1], dtype=torch.float64)


def check_mar(case):
    model = convert_tokens.load_tokens("mar", case.config, case.state_dict).eval()
    check = {"forward": check_mar_forward, "head": check_mar_head, "sample": check_mar_decode}[case.meta["kind"]]
    check(case, model)


def theirs(name):
    return name.replace("head.", "diffloss.net.", 1)


def check_mar_forward(case, model):
    x, y, orders, rate, t, noise = (case.inputs[k] for k in ("x", "labels", "orders", "mask_rate", "t", "noise"))
    tokens = masked.patchify(x, case.config["patch_size"])
    B, N, C = tokens.shape
    hidden = masked.first_of(orders, math.ceil(N * rate.item()))
    t, noise = (v.view(-1, B, N, *v.shape[1:]).transpose(0, 1) for v in (t, noise))          # (B, r, N, ...)
    ours = watched({"h_enc_block0": model.encoder_blocks[0], "h_enc": model.encoder_norm,
                    "h_dec_block0": model.decoder_blocks[0], "z": model})
    c = model.class_embedding(y)
    loss = model.loss(published_process(), tokens, hidden, c, t.double(), noise)["loss"]
    loss.backward()
    compare(ours | grad_norms(model, theirs) | {"loss": loss, "mask": hidden.float()}, case)


def check_mar_head(case, model):
    i, process, options = case.inputs, published_process(), case.meta["options"]
    seen = watched({"h_time": model.head.time_embed})
    out = model.head(i["x_t"], i["t"], i["z"])
    fixed = dict(seen)
    t = i["t"].double()
    parts = process.loss(model.head, i["x0"], i["z"], t, i["noise"])
    times = ladder(i["timesteps"])
    _, _, log_small, log_large = process.posterior(times[:-1], times[1:])
    log_small = torch.cat([log_small[:-1], log_small[-2:-1]])         # the last, -inf, is published as its neighbour
    half = len(i["x_t"]) // 2
    c, u = (process.denoiser(model.head, z) for z in i["z"].chunk(2))
    guided = masked.guided(c, u, options["cfg"])

    def sample(denoise, rows):
        numbers = iter(i["steps"][:, :rows])
        noise = lambda shape: options["temperature"] * next(numbers)
        return list(samplers.ddpm(denoise, i["init"][:rows], times, process, noise))[-1]

    apart = masked.guided(lambda x, _: c(x, t[:half]), lambda x, _: u(x, t[half:]), options["cfg"])     # own times each
    with torch.no_grad():
        x = i["x_t"][:half]
        both, eps = model.head(torch.cat([x, x]), i["t"], i["z"]), apart(x, 0).eps
        ours = fixed | parts | {
            "out": out, "x_t_train": process.noised(i["x0"], i["noise"], t), "betas": process.betas.float(),
            "betas_gen": log_large.exp().flip(0).float(),
            "posterior_log_variance_clipped_gen": log_small.flip(0).float(),
            "out_cfg": torch.cat([torch.cat([eps, eps]), both[:, eps.shape[1]:]], 1),
            "sample": sample(process.denoiser(model.head, i["z"]), 2 * half),
            "sample_cfg": sample(guided, half)}
    kept = [name for name in case.outputs if name.startswith("respaced_")]
    ours |= {name: torch.tensor(diffusion.respaced(process.T, name.split("_")[1])) for name in kept}
    compare(ours, case)


class StoredNoise(masked.HeadNoise):
    """A case's noise by token position."""

    def __init__(self, init, steps):
        self.numbers = [init, *steps]


def check_mar_decode(case, model):
    """Generation, plain or with ReCAP; guidance doubles the batch."""
    i, o, process, N = case.inputs, case.meta["options"], published_process(), model.length
    B, T = len(i["orders"]), o["num_iter"]
    reuse = "pre_full_iters" in o
    after = masked.hidden_counts(N, T)                                     # falling to 0
    shown = after if reuse else [*after[:-1], max(1, after[-1])]        # plain MAR counts 1 as hidden in the last step
    counts = [before - m for before, m in zip([N, *after], after)]
    groups = masked.plan(T, o.get("pre_full_iters", T), o.get("num_cache_iters", 0), counts)
    scales = [masked.guidance_at(o["cfg"], 1 - m / N, o["cfg_schedule"]) for m in shown]
    noises = {False: (StoredNoise(i["noise_init"], i["noise_steps"]), ladder(i["timesteps"]))}
    if reuse:
        noises[True] = StoredNoise(i["noise_init"], i["noise_steps_fast"]), ladder(i["timesteps_fast"])
    calls, fasts, written = [], [], torch.full((B, N), -1)

    def draw(z, places, step, fast):
        noise, times = noises[fast]
        fasts.append(fast)
        written.scatter_(1, places, step)
        return masked.draw_tokens(model.head, process, z, places, noise, scales[step], o["temperature"], sampler="ddpm",
                                  times=times)

    def record(module, args, kwargs, output):
        tokens, hidden, positions = args[0], args[1], args[3] if len(args) > 3 else None
        past, visible = args[4] if len(args) > 4 else None, (~hidden[0]).sum().item()
        front = model.buffer if kwargs.get("buffer", True) else 0
        lengths = [visible + front, past[0][0][0].shape[1] if past else 0, tokens.shape[1] + front,
                   past[1][0][0].shape[1] if past else 0]
        if positions is not None and front:
            positions = torch.cat([torch.arange(front).expand(len(positions), -1), positions + front], 1)
        elif positions is not None:
            positions = positions + model.buffer
        calls.append((positions is None, lengths, output[0][:B], positions, encoded["h"][:B]))

    encoded = watched({"h": model.encoder_norm})
    model.register_forward_hook(record, with_kwargs=True)
    c = model.class_embedding(i["labels"])
    if o["cfg"] != 1:
        c = torch.cat([c, model.class_embedding(torch.full((B,), model.num_classes))])
    tokens, hidden = torch.zeros(B, N, model.channels), torch.ones(B, N, dtype=torch.bool)
    steps = list(masked.decode_mar(model, draw, tokens, hidden, c, i["orders"], groups, o.get("cache_buffer", False)))
    p = case.config["patch_size"]
    side = math.isqrt(N)
    full, local = [k for k in calls if k[0]], [k for k in calls if not k[0]]
    ours = {"latents": masked.unpatchify(steps[-1].tokens, (side, side), p), "decode_step": written,
            "n_decoded": torch.tensor(counts), "cfg_per_step": torch.tensor(scales),
            "cfg_per_iter": torch.tensor(scales),
            "masklen_per_iter": torch.tensor(shown).float(), "head_is_fast": torch.tensor(fasts).long(),
            "call_is_full": torch.tensor([k[0] for k in calls]).long(), "z_iter0": full[0][2], "z_full0": full[0][2],
            "z_last": full[-1][2]}
    names = ("call_enc_new", "call_enc_past", "call_dec_new", "call_dec_past")
    ours |= {name: torch.tensor([k[1][n] for k in calls]) for n, name in enumerate(names)}
    if "pred_mask_per_iter" in case.outputs:
        ours["pred_mask_per_iter"] = torch.stack([(written == t).long() for t in range(T)], 1)
        ours["n_decoded"] = ours["n_decoded"].expand(B, -1)
    if local:
        ours |= {"z_local0": local[0][2], "local0_positions": local[0][3][:B], "enc_local0": local[0][4],
                 "z_local_last": local[-1][2]}
    compare(ours, case)


# ---------------------------------------------------------------------------------------------------------------- recap


def check_recap(case):
    model = convert_tokens.load_tokens("recap", case.config, case.state_dict).eval()
    if case.config.get("backbone") == "mar":
        check_mar_decode(case, model)
    else:
        (check_recap_forward if case.meta["kind"] == "forward" else check_recap_decode)(case, model)


def check_recap_forward(case, model):
    i = case.inputs
    ours = dict(seen := watched({"h_embed": model.token_emb, "h_in0": model.in_blocks[0], "h_mid": model.mid_block,
                                 "h_out0": model.out_blocks[0]}))
    logits, memory = model(i["tokens"], i["labels"])
    ours |= seen | {"logits": logits, "k_block0": memory[0][0], "v_last": memory[-1][1]}
    past = masked.outside(memory, i["positions"], front=1)
    ours["logits_local"], _ = model(i["local_tokens"], i["labels"], i["positions"], past)
    compare(ours, case)


def check_recap_decode(case, model):
    i, o, N, T = case.inputs, case.meta["options"], model.length, case.meta["options"]["gen_step"]
    B, K, G = len(i["labels"]), model.codes, len(i["gumbel_conf"])
    groups = masked.plan(T, o["pre_full_iters"], o["num_cache_iters"], masked.token_counts(N, T))
    scales = torch.linspace(0.05, 0.1, T, dtype=torch.float64).tolist() if o["cfg"] else None
    token = iter(i["gumbel_token"])
    numbers = (v for g, group in enumerate(groups) for v in (i["gumbel_conf"][g], i["gumbel_choice"][g],
                                                            *(next(token) for _ in group)))
    calls = []                                        # one a step: positions, tokens, their number, cached, logits

    def record(module, args, output):
        tokens, _, positions, past = args
        logits, step, cached = output[0], len(calls), past[0][0].shape[1] if past else 0
        if scales:                                    # a local pass guides by the scale of the step before
            c, u = logits.chunk(2)
            logits = c + scales[step - (positions is not None)] * (c - u)
        calls.append((None if positions is None else positions[:B], tokens[:B], tokens.shape[1] + 1, cached, logits))

    hook = model.register_forward_hook(record)
    x = torch.full((B, N), K)
    steps = list(masked.recap(model, x, i["labels"], groups, lambda *sizes: next(numbers), o["conf_temp"],
                              o["samp_temp"], scales))
    hook.remove()
    after = []                                        # the tokens after each step, the mask where none is written
    for step in steps:
        x = x.scatter(1, step.written, step.tokens.gather(1, step.written))
        after.append(x)
    ends = torch.tensor([len(group) for group in groups]).cumsum(0) - 1
    temperatures = iter([masked.falling(o["samp_temp"], t, T) for t in range(T)])

    def table(rows):
        width = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])

    is_local = [positions is not None for positions, *_ in calls]
    ours = {"final_tokens": x, "tokens_per_group": torch.stack([after[k] for k in ends], 1),
            "order": torch.cat([step.written for step in steps], 1), "group_schedule": table(groups),
            "group_sizes": torch.tensor([sum(group) for group in groups]),
            "samp_temp_schedule": table([[next(temperatures) for _ in group] for group in groups]),
            "conf_temp_schedule": torch.tensor([o["conf_temp"] * (1 - (g + 1) / G) for g in range(G)]),
            "call_is_full": 1 - torch.tensor(is_local).long(), "n_full": T - sum(is_local), "n_local": sum(is_local),
            "call_n_new_tokens": torch.tensor([k[2] for k in calls]), "logits_full0": calls[0][4],
            "call_n_cached": torch.tensor([k[3] for k in calls])}
    if any(is_local):
        first, last = is_local.index(True), T - 1 - is_local[::-1].index(True)
        whole, _ = model(after[first - 1], i["labels"])
        if scales:
            null = torch.full_like(i["labels"], model.num_classes)
            whole = whole + scales[first - 1] * (whole - model(after[first - 1], null)[0])
        ours |= {"local0_positions": calls[first][0], "local0_tokens_in": calls[first][1],
                 "logits_local0": calls[first][4], "logits_local_last": calls[last][4],
                 "local_last_positions": calls[last][0], "logits_local0_if_full": masked.take(whole, calls[first][0])}
    compare(ours, case)


CHECKS = {"mar": check_mar, "recap": check_recap}
