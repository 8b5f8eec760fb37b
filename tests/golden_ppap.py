"""guides.py against recorded numbers of riiid/PPAP and openai/guided-diffusion: the noisy classifier, guided sampling,
LoRA, the choice of experts, a step of knowledge transfer."""

import torch
from published import same
from torch import nn

import diffusion
import guides
from guidance import clipped
from samplers import SAMPLERS


def check_classifier(case):
    c = dict(case.config)
    head = c.pop("num_head_channels", -1)
    names = {"image_size": "image_size", "in_channels": "in_channels", "out_channels": "num_classes",
             "model_channels": "channels", "num_res_blocks": "blocks", "channel_mult": "multipliers",
             "attention_resolutions": "attention", "use_scale_shift_norm": "scale_shift", "dropout": "dropout",
             "resblock_updown": "resblock_updown", "conv_resample": "conv_resample", "pool": "pool",
             "num_heads": "heads", "use_new_attention_order": "new_order"}
    published = {"pool": "adaptive", "use_scale_shift_norm": False, "resblock_updown": False,
                 "channel_mult": (1, 2, 4, 8)}
    for irrelevant in ("dims", "use_checkpoint", "use_fp16", "num_heads_upsample"):
        c.pop(irrelevant, None)
    options = {names[key]: value for key, value in (published | c).items()}
    model = guides.ADMClassifier(**options, head_channels=None if head == -1 else head)
    model.load_state_dict(case.state_dict)
    model.eval()
    x, t, y = (case.inputs[k] for k in "xty")
    log_prob = lambda x, t: -guides.Classes().error(model(x, t), y)
    ours = {"logits": model(x, t), "gradient": guides.gradient_of(log_prob)(x, t)}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


class Net(nn.Module):
    """The case's analytic denoiser eps(x, t) = conv(x) cos(t/700)."""

    def __init__(self, state):
        super().__init__()
        weight, bias = state["eps.conv.weight"], state["eps.conv.bias"]
        self.conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        self.conv.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, x, t, y=None):
        return self.conv(x) * torch.cos(t / 700)[:, None, None, None]


def expert(state, k):
    """fc2(tanh(fc1(flatten x))), as a network (x, t)."""
    part = {name.removeprefix(f"experts.{k}."): v for name, v in state.items() if name.startswith(f"experts.{k}.")}
    net = nn.Sequential()
    net.add_module("flat", nn.Flatten())
    for name in ("fc1", "fc2"):
        out, inside = part[f"{name}.weight"].shape
        net.add_module(name, nn.Linear(inside, out))
        if name == "fc1":
            net.add_module("tanh", nn.Tanh())
    net.load_state_dict(part)
    return Told(net)


class Told(nn.Module):
    """A network of x as one of (x, t)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x)


def fixed(values):
    """noise(shape): these, as often as asked."""
    return lambda shape: values.expand(shape)


def check_guidance(case):
    c, i = case.config, case.inputs
    betas = {"linear": diffusion.linear_betas, "cosine": diffusion.cosine_betas}[c["schedule"]]()
    process = diffusion.Discrete(betas, learned_variance=c["learn_sigma"])
    steps = diffusion.respaced(1000, c["respacing"])
    times = [float(t) for t in (-1, *steps)]                             # step k goes from times[k + 1] to times[k]
    experts = guides.Experts([expert(case.state_dict, k) for k in range(c["n_experts"])])
    used = []

    def log_prob(x, t):
        used.append((int(t[0]), int(experts.choose(t)[0])))
        return -guides.Classes().error(experts(x, process.network_time(t).float()), i["y"])

    gradient, x = guides.gradient_of(log_prob, c["scale"]), i["x"]
    free = process.denoiser(Net(case.state_dict))
    plain = clipped(free, process) if c["clip"] else free
    guided = guides.classifier_guided(plain, gradient, process)
    ours = {}
    with torch.no_grad():
        for k, step in enumerate(c["probe_steps"]):
            t, s = times[step + 1], times[step]
            before = (times[step + 2], t) if step + 2 < len(times) else None
            mean, variance = guides.reverse_step(process, plain(x, t), x, t, s, before, "large")
            g = gradient(x, torch.full((len(x),), t))
            pair = torch.tensor([t, s], dtype=torch.float64)
            down = torch.tensor([t, s, s - 1], dtype=torch.float64)          # not its last step: with noise
            sampled = next(guides.guided_ddpm(plain, x, down, process, fixed(i["noise"]), gradient=gradient,
                                              variance="large"))
            ours |= {f"mean_{k}": mean, f"variance_{k}": torch.as_tensor(variance).expand_as(mean),
                     f"gradient_{k}": g, f"guided_xstart_{k}": guided(x, t).x0, f"guided_mean_{k}": mean + variance * g,
                     f"p_sample_{k}": sampled if step else mean + variance * g,
                     f"ddim_sample_{k}": next(SAMPLERS["ddim"](guided, x, pair, process, fixed(i["noise"]),
                                                                         eta=c["eta"]))}
        used.clear()
        down = torch.tensor(times[::-1], dtype=torch.float64)
        chain = list(SAMPLERS["ddim"](guided, x, down, process, fixed(i["noise"]), eta=c["eta"]))
    ours |= {"ddim_first": chain[0], "ddim_final": chain[-1], "used_t": [t for t, _ in used],
             "used_expert": [k for _, k in used]}
    for name, value in case.outputs.items():
        same(ours[name], value, name)


# ----------------------------------------------------------------------------------------------------- LoRA and experts


def check_lora(case):
    for name, c in case.config.items():
        state = {k.removeprefix(f"{name}."): v for k, v in case.state_dict.items() if k.startswith(f"{name}.")}
        bias = any(k.endswith("bias") for k in state)
        if c["kind"] == "linear":
            layer = nn.Linear(c["in_features"], c["out_features"], bias)
        else:
            layer = nn.Conv2d(c["in_channels"], c["out_channels"], c["kernel_size"], c.get("stride", 1),
                              c.get("padding", 0), bias=bias)
        layer.load_state_dict({k.rpartition(".")[2]: v for k, v in state.items() if "lora" not in k})
        lora = guides.LoRA(layer, c["r"], c["alpha"])
        lora.load_state_dict({k: v for k, v in state.items() if "lora" in k}, strict=False)
        x = case.inputs[f"{name}.x"]
        same(lora.delta(), case.outputs[f"{name}.delta_weight"], "delta_weight")
        same(lora(x), case.outputs[f"{name}.y_merged"], "the layer as it is")
        same(lora.merged()(x), case.outputs[f"{name}.y_merged"], "the merged layer")
        # The published forward pass of a linear layer that is not merged leaves alpha/r out; ours does not.
        lora.scale = 1.0 if c["kind"] == "linear" else lora.scale
        same(lora(x), case.outputs[f"{name}.y_unmerged_code"], "the published un-merged layer")


def check_select(case):
    for N in case.config["n_experts"]:
        experts = guides.Experts([nn.Identity() for _ in range(N)])
        same(experts.choose(case.inputs["t"]), case.outputs[f"index_{N}"], f"index_{N}")
        same(experts.edges, case.outputs[f"edges_{N}"], f"edges_{N}")
        same([experts.span(i) for i in range(N)], case.outputs[f"train_range_{N}"], f"train_range_{N}")
    for spec in case.config["respacing"]:
        same(diffusion.respaced(case.config["T"], spec), case.outputs[f"steps_{spec}"], f"steps_{spec}")


def check_transfer(case):
    c, i = case.config, case.inputs
    blocks = [1 + max(int(k.split(".")[2]) for k in case.state_dict if k.startswith(f"teacher.layer{n + 1}."))
              for n in range(len(c["widths"]))]
    bottleneck = any(".conv3." in k for k in case.state_dict)
    net = guides.ResNet(3, c["classes"], c["widths"], blocks, bottleneck, statistics=guides.IMAGENET)
    missing = net.load_state_dict({k.removeprefix("teacher."): v for k, v in case.state_dict.items()
                                   if k.startswith("teacher.")}, strict=False).missing_keys
    assert all("running" in k or "num_batches" in k for k in missing)
    net.requires_grad_(False).eval()
    student = guides.adapted(net, c["r"], c["alpha"]).train()
    student.statistics = None                                            # as published: raw pixels
    prefix = "student.resnet."
    own = student.state_dict()
    own |= {k.removeprefix(prefix): v for k, v in case.state_dict.items() if k.startswith(prefix)}
    student.load_state_dict(own)
    process = diffusion.create_process("linear")
    xt, teacher = process.noised(i["x0"], i["noise"], i["t"]), net(i["x0"])
    z = student(xt)
    losses = guides.Classes().transfer(z, teacher)
    losses.mean().backward()
    ours = {"teacher_logits": teacher, "student_logits": z, "x_t": xt, "loss_per_sample": losses, "loss": losses.mean(),
            "bn1_running_mean": student.bn1.running_mean}
    trained = {name.replace(".layer.", "."): p for name, p in student.named_parameters() if p.requires_grad}
    assert sorted(f"resnet.{name}" for name in trained) == sorted(case.meta["trainable"])
    for name, p in trained.items():
        ours |= {f"grad_norm:resnet.{name}": p.grad.norm(), f"grad:resnet.{name}": p.grad}
    assert all(p.grad is None for p in net.parameters())
    for name, value in case.outputs.items():
        same(ours[name], value, name)


CHECKS = {"adm-classifier": check_classifier, "ppap-guidance": check_guidance, "lora": check_lora,
          "ppap-experts": check_select, "ppap-kd": check_transfer}
