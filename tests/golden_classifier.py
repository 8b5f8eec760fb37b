"""diffusion_classifier.py against recorded numbers of diffusion-classifier/diffusion-classifier: staged pruning, and
the errors of a DiT under every class."""

import torch
from published import same

import convert
import diffusion
import diffusion_classifier as dc


def check_classifier(case):
    if "errors" in case.inputs:
        check_pruning(case)
    else:
        check_errors(case)


def check_pruning(case):
    c, table, asked = case.config, case.inputs["errors"], []

    def error(classes, times, slots):
        asked.append((classes, times, slots))
        return table[classes[:, None], slots]

    verdict = dc.prune(error, len(table), c["n_samples"], c["to_keep"], c["T"], c["n_trials"])
    evaluated = ~verdict.errors.isnan()
    ours = {"pred": verdict.winner, "n_evals": evaluated.sum(1), "mean_error": verdict.mean}
    for k, (classes, times, slots) in enumerate(asked):
        ours |= {f"stage{k}_classes": classes, f"stage{k}_t": times, f"stage{k}_noise": slots}
    for name, value in case.outputs.items():
        ours_ = torch.as_tensor(ours[name])
        # Where there are several noises at a time, the list of times may be recorded once a time or once a noise.
        if name.endswith("_t") and ours_.shape != value.shape:
            ours_ = ours_[::c["n_trials"]]
        same(ours_, value, name)


def check_errors(case):
    c, x0, noise = case.config, case.inputs["x0"], case.inputs["noise"]
    model = convert.load_official("dit", c["dit"], case.state_dict).eval()
    process = diffusion.Discrete(diffusion.linear_betas(), learned_variance=c["dit"]["learn_sigma"])
    K, denoiser = c["dit"]["num_classes"], lambda y: process.denoiser(model, y)

    def errors(classes, t, eps, loss):
        return dc.errors(process, denoiser, x0, classes, t.float(), eps, loss, "eps", batch=7)

    every, trials = torch.arange(K), c["n_trials"]
    grid = torch.arange(c["t_interval"] // 2, 1000, c["t_interval"]).repeat_interleave(trials)
    index = torch.arange(len(grid))
    if not c["randomize_noise"]:                     # then the published script takes the first noises in every batch
        index = index % c["batch_size"]
    table = torch.stack([errors(every, grid, noise[index], loss) for loss in ("l2", "l1", "vlb", "nll")], -1)
    mean = table.mean(1)
    total = errors(every, grid, noise[index], "l2+vlb").mean(1)
    ours = {"errors_mse_l1_kl_nll": table.view(K, -1, trials, 4), "mean": mean, "pred_l2": mean[:, 0].argmin(),
            "pred_l1": mean[:, 1].argmin(), "pred_vlb": mean[:, 2].argmin(), "pred_l2_plus_vlb": total.argmin()}
    times = torch.tensor(c["t_list"])
    for loss in ("l2", "l1", "huber"):
        found = errors(every, times, noise[:len(times)], loss)
        ours |= {f"error_{loss}": found, f"argmin_{loss}": found.mean(1).argmin()}
    if "n_samples" in c:
        verdict = dc.prune(lambda some, t, slots: errors(some, t, noise[slots], "l2"), K, c["n_samples"], c["to_keep"])
        ours |= {"adaptive_pred": verdict.winner, "adaptive_n_evals": (~verdict.errors.isnan()).sum(1),
                 "adaptive_mean": verdict.mean}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


CHECKS = {"diffusion-classifier": check_classifier}
