"""Compares metrics.py with the recorded numbers of the published implementations: Inception, LPIPS, distances."""

import re

import torch
from published import same
from pytest import approx

import metrics


def check_inception(case):
    """Within 1e-3 of features of about 0.4 to 4, what float32 leaves of 94 layers; the first wrong layer is named."""
    config, images = case.config, case.inputs["images"].to(torch.uint8)
    assert (config["bn_eps"], config["input_size"]) == (1e-3, 299), f"options {config} are not covered"
    left = set(case.outputs)

    def close(name, ours, tolerance=1e-3):
        left.discard(name)
        value = case.outputs[name]
        error = (ours - value).abs().max() if ours.shape == value.shape else torch.inf
        assert error <= tolerance, f"{name}: off by {error:.1e}"

    resized = metrics.resize_tf1(images.float(), 299)
    close("resized_tf1_row", resized[0, :, 150], 1e-2)
    close("resized_tf1_mean", resized.mean((2, 3)), 1e-2)
    for camp, prefix in (("tf", "tf_"), ("pytorch-fid", "ptfid_")):
        network = metrics.Inception(camp, config["num_classes"])
        assert set(network.state_dict()) == set(case.state_dict)
        metrics.fill_weights(network, case.state_dict, "the case")
        if camp == "pytorch-fid":
            close("resized_ptfid_row", (network.prepare(images)[0, :, 150] + 1) / 2)
        for layer in (name[8:] for name in case.outputs if name.startswith(f"{prefix}mean:")):
            network.get_submodule(layer).register_forward_hook(
                lambda module, x, y, name=f"{prefix}mean:{layer}": close(name, y.mean((2, 3))))
        found = network(images, metrics.LEVELS)
        if camp == "tf":
            close("tf_spatial_nhwc", found["spatial"])
            close("tf_logits_unbiased", network.logits(found["2048"]))
            close("tf_logits", network.logits(found["2048"], bias=True))
        for level in set(metrics.LEVELS) - {"spatial"}:
            close(prefix + level, found[level])
    assert not left, f"recorded, but compared with nothing: {sorted(left)}"


def check_lpips(case):
    net = metrics.fill_weights(metrics.LPIPS(case.config["net"]), case.state_dict, "the case")
    a, b = case.inputs["a"], case.inputs["b"]
    layers, total = net.layers(a, b), case.outputs["lpips"]
    same(net(a, b), total, "lpips")
    for k in range(5):                               # of the sum: a small layer's own float32 rounding is larger
        error = (layers[:, k] - case.outputs[f"layer{k}"]).norm() / total.norm()
        assert error <= 1e-5, f"layer {k}: off by {error:.1e} of the distance"


def check_metrics(case):
    """Everything recorded, found by its name; an unknown name raises KeyError."""
    x, y, config = case.inputs["real"], case.inputs["fake"], case.config
    logits, a, b = case.inputs["logits"], case.inputs["image_a"], case.inputs["image_b"]
    real, fake = metrics.statistics(x, 7), metrics.statistics(y, 64)
    ours = {"real_mu": real.mu, "real_sigma": real.sigma, "fake_mu": fake.mu, "fake_sigma": fake.sigma,
            "cmmd": metrics.cmmd(x, y, chunk=33), "psnr": metrics.psnr(a, b), "ssim_gaussian": metrics.ssim(a, b),
            "ssim_uniform7": metrics.ssim(a, b, "uniform")}

    # Features give the distance to the last digits; covariances that are singular have lost half of them.
    singular = min(len(x), len(y)) <= x.shape[1]
    exact, tolerance = case.outputs["fid_exact"].item(), 1e-6 if singular else 1e-9
    assert metrics.frechet_distance(x, y) == approx(exact, rel=tolerance)
    assert metrics.frechet_distance((real.mu, real.sigma), fake) == approx(exact, rel=tolerance)
    for name in ("fid_exact", "fid_pytorch_fid", "fid_torch_fidelity", "fid_edm", "fid_dgm_eval"):
        ours[name] = metrics.frechet_distance(x, y)

    count, size = config["kid_subsets"], config["kid_subset_size"]
    rows = case.outputs["kid_subset_index_real"], case.outputs["kid_subset_index_fake"]
    values = torch.tensor([metrics.polynomial_mmd(x[i], y[j]) for i, j in zip(*rows)], dtype=torch.float64)
    mean, std = metrics.kid(x, y, count, size)
    assert values.mean().item() == approx(mean, rel=1e-12), "KID draws other rows"
    m = min(len(x), len(y))
    ours |= {"kid_full": metrics.polynomial_mmd(x[:m], y[:m]), "kid_mean": mean, "kid_std": std,
             "kid_subset_index_real": rows[0], "kid_subset_index_fake": rows[1]}

    for name in case.outputs:
        if match := re.fullmatch(r"is_(mean|std)_splits(\d+)", name):
            ours[name] = metrics.inception_score(logits, int(match[2]))[match[1] == "std"]
        elif match := re.fullmatch(r"is_adm_split(\d+)", name):
            ours[name] = metrics.inception_score(logits, chunk=int(match[1]))[0]
        elif match := re.fullmatch(r"(precision|recall|density|coverage)_(prdc|torch_fidelity)_k(\d+)", name):
            ours[name] = metrics.prdc(x, y, int(match[3]), match[2] == "torch_fidelity", chunk=17)[match[1]]
    for name, value in case.outputs.items():
        loose = (singular and name.startswith("fid_")) or "torch_fidelity_k" in name          # float32 means there
        same(torch.as_tensor(ours[name], dtype=value.dtype), value, name, 1e-6 if loose else 1e-9)


CHECKS = {"inception-fid": check_inception, "metrics": check_metrics, "lpips-alex": check_lpips,
          "lpips-vgg": check_lpips}
