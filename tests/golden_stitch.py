"""T-Stitch, NVlabs/T-Stitch, folder dit: which model takes which step, and whole trajectories."""

import torch
from published import chain, compare, guided, same

import convert
import diffusion
from guidance import clipped, stitch_by_steps, stitch_by_time, stitched
from samplers import SAMPLERS, grid_times


def check(case):
    (trajectory if case.state_dict else schedule)(case)


def trajectory(case):
    model = convert.load_official("t-stitch", case.config, case.state_dict).eval()
    c = case.config["denoisers"][0]
    process = chain({"learn_sigma": c["learn_sigma"], **case.meta.get("diffusion", {})})
    z, y, noises = (case.inputs[k] for k in ("z", "y", "noises"))
    null = torch.full_like(y, c["num_classes"])
    parts = [guided(process, part, y, null, case.meta["cfg_scale"]) for part in model.models]
    rule, times, chosen, kept = model.choose_model, grid_times(process, case.meta["steps"]), [], []
    denoise = stitched(parts, rule)
    if case.meta["clip_denoised"]:
        denoise = clipped(denoise, process)

    def keeping(x, t):
        chosen.append(rule(t))
        kept.append(denoise(x, t))
        return kept[-1]

    pool, options = iter(noises), {"eta": case.meta["eta"]} if case.meta["solver"] == "ddim" else {}
    with torch.no_grad():
        sampler = SAMPLERS[case.meta["solver"]]
        steps = list(sampler(keeping, z, times, process, lambda shape: next(pool), **options))
        for t in times[:-1]:                           # the module is the model that the rule names
            t = t.float().expand(len(z))
            assert torch.equal(model(z, t, y), model.models[rule(t[0].item())](z, t, y))
    compare(case, {"model_index": torch.tensor(chosen), "timesteps": times[:-1], "steps": torch.stack(steps),
                   "final": steps[-1], "pred_xstart": torch.stack([d.x0 for d in kept])})


def schedule(case):
    for name, value in case.outputs.items():
        kind, S = name.split(":")
        times = [float(t) for t in reversed(diffusion.respaced(1000, S))]
        if kind == "timesteps":
            same(torch.tensor(times), value, name)
            continue
        rows = [[r, 1 - r] for r in case.config["ratios"]] if kind == "two" else case.config["fractions"]
        for fractions, published in zip(rows, value):
            by_time, by_steps = stitch_by_time(fractions), stitch_by_steps([*times, -1], fractions)
            same(torch.tensor([by_time(t) for t in times]), published, f"{name}, fractions {fractions}")
            # The paper's rule gives whole numbers of steps; where the fractions are such, both agree.
            shares = [f * int(S) for f in fractions]
            if kind == "two" and int(S) >= 10 and all(abs(share - round(share)) < 1e-9 for share in shares):
                same(torch.tensor([by_steps(t) for t in times]), published, f"{name}, fractions {fractions}, by steps")


CHECKS = {"t-stitch": check}
