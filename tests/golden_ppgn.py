"""Golden cases of PPGN: the published sampler's chains, and the released generator's layers."""

import torch
from published import same
from torch import nn

import ppgn


def classifier(state, last, head):
    """The cases' small stand-ins for the published networks: one convolution of stride 2, one linear layer."""
    weight, bias = state(f"{last}.weight"), state(f"{last}.bias")
    conv = nn.Conv2d(*state("conv.weight").shape[1::-1], 3, 2, 1)
    conv.load_state_dict({"weight": state("conv.weight"), "bias": state("conv.bias")})
    linear = nn.Linear(*weight.shape[::-1])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return ppgn.Classifier({"conv1": nn.Sequential(conv, nn.ReLU()),
                            last: nn.Sequential(nn.Flatten(), linear, *head)}).double()


class Upwards(nn.Module):
    """The cases' generator: a linear layer and two transposed convolutions."""

    def __init__(self, config, state):
        super().__init__()
        width, side = config["width"], config["gen_size"] // 4
        self.start = (width, side, side)
        self.fc = nn.Linear(config["code"], width * side * side)
        self.deconv1 = nn.ConvTranspose2d(width, width, 4, 2, 1)
        self.deconv0 = nn.ConvTranspose2d(width, 3, 4, 2, 1)
        self.load_state_dict({name[2:]: value for name, value in state.items() if name.startswith("G.")})

    def forward(self, h):
        x = nn.functional.leaky_relu(self.fc(h), 0.3).unflatten(1, self.start)
        return self.deconv0(nn.functional.leaky_relu(self.deconv1(x), 0.3))


def run(case, exact):
    """The case's chain as a list of ppgn.Step, in float64 as it was recorded."""
    config, inputs, state = case.config, case.inputs, case.state_dict
    E = classifier(lambda name: state[f"E.{name}"], "fc6", [nn.ReLU()])
    C = classifier(lambda name: state[f"C.{name}"], "fc8", [])
    inpainting = None
    if "mask" in inputs:
        inpainting = ppgn.Inpainting(inputs["image"].double(), inputs["mask"].double())
    rows = iter(inputs["noise"].double().split(1))
    steps = ppgn.chain(
        inputs["h0"].double(), Upwards(config, state).double(), joint_of(E, config),
        ppgn.UnitCondition(C, "fc8", exact=exact, size=config["cls_size"]),
        [torch.tensor([k]) for k in config["classes_seq"]], lambda shape: next(rows), steps=config["n_iters"],
        lr=config["lr"], lr_end=config["lr_end"], epsilon=[config[f"epsilon{k}"] for k in (1, 2, 3)],
        epsilon4=config.get("epsilon4", 0.0), inpainting=inpainting)
    return list(steps)


def joint_of(encoder, config):
    return ppgn.joint_prior(encoder, config["enc_size"])


def check_chain(case):
    steps = run(case, exact=False)
    ours = {"h": torch.cat([s.code for s in steps]), "d_prior": torch.cat([s.d_prior for s in steps]),
            "prob": torch.cat([s.probability for s in steps]), "d_image_0": steps[0].d_image,
            "last_image": steps[-1].image, "d_condition": torch.cat([s.d_condition for s in steps]),
            "h_final": steps[-1].next}
    if "mask" in case.inputs:
        ours["d_context"] = torch.cat([s.d_context for s in steps])
    for name, value in case.outputs.items():
        if name != "d_condition_full_softmax":
            same(ours[name], value, name)
    check_exact(case, ours["h"])


def check_exact(case, codes):
    """The exact gradient is recorded along the published chain: one step from each of its codes."""
    found = []
    for i, h in enumerate(codes):
        moved = {**case.inputs, "h0": h[None]}
        turn = max(i - 1, 0) // case.config["n_iters"]
        there = {**case.config, "classes_seq": case.config["classes_seq"][turn:turn + 1], "n_iters": 1}
        step = run(type(case)(case.arch, there, case.state_dict, moved, {}, case.meta), exact=True)[0]
        found.append(step.d_condition)
    same(torch.cat(found), case.outputs["d_condition_full_softmax"], "d_condition_full_softmax")


def check_generator(case):
    config = case.config
    G = ppgn.Generator(config["code"], config["fc"], config["chans"], config["s0"], config.get("out_channels", 3))
    G.load_state_dict(case.state_dict)
    h = case.inputs["h"].requires_grad_()
    image = G(h)
    dh, = torch.autograd.grad((image * case.inputs["v"]).sum(), h)
    for name, value in case.outputs.items():
        same({"image": image, "dh": dh}[name], value, name)


CHECKS = {"ppgn": check_chain, "ppgn-generator": check_generator}
