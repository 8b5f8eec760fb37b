"""Stable Diffusion's autoencoder, recorded from diffusers' AutoencoderKL."""

import torch
from published import compare

from autoencoders import KLAutoencoder
from convert import fill


def autoencoder(case):
    model = fill(KLAutoencoder(**case.config), case.state_dict, "this autoencoder")
    with torch.no_grad():
        mean, log_variance = model.posterior(case.inputs["x"])
        compare(case, {"mean": mean, "log_variance": log_variance, "image": model.decode(case.inputs["z"])})


CHECKS = {"kl-autoencoder": autoencoder}
