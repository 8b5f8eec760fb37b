"""Golden cases of A2-RL: the published environment, networks, reward and losses."""

import torch
from published import same

import cropping as c


def compare(ours, case):
    for name, value in case.outputs.items():
        same(ours[name], value, name)


def check_actions(case):
    box, sizes = case.inputs["box"], case.inputs["sizes"].tolist()
    moved, done = c.act(box, torch.zeros(len(box), dtype=torch.bool), case.inputs["action"])
    ours = {"box": moved, "done": done.long(), "pixels": torch.stack([c.pixels(moved, *size) for size in sizes])}
    n = case.inputs["walk_actions"].shape[1]
    box, done, walk = c.whole(n), torch.zeros(n, dtype=torch.bool), []
    for actions in case.inputs["walk_actions"]:
        box, done = c.act(box, done, actions)
        walk.append((box, done.long()))
    ours["walk_box"], ours["walk_done"] = map(torch.stack, zip(*walk))
    ours["walk_pixels"] = torch.stack([c.pixels(box, *size) for size in sizes])
    compare(ours, case)


def check_crop(case):
    image, box = case.inputs["image"], case.inputs["box"]
    at = c.pixels(box, *image.shape[1:])
    # the recorded crops were computed in float64
    crops = c.crop_resize(image[None].double(), at[None], case.config["size"], border="zero")[0]
    compare({"pixels": at, "crops": crops}, case)


def check_metrics(case):
    i = case.inputs
    iou = c.iou(i["pred"], i["target"])
    displacement = c.displacement(i["pred"], i["target"], i["height"], i["width"])
    compare({"iou": iou, "displacement": displacement, "mean_iou": iou.mean(), "mean_displacement": displacement.mean(),
             "alpha_recall": c.alpha_recall(iou, case.config["alpha"])}, case)


def network(case):
    config = case.config
    net = c.VFN([config[f"c{k}"] for k in range(1, 6)], config["emb"], (config["H"], config["W"]),
                config.get("spp", False), config.get("pooling", "max"))
    state = c.read_tensorflow(case.state_dict)
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    net.load_state_dict(part("ranker."), strict="ranker.score.weight" in state)
    return net.eval(), part("agent.")


def check_agent(case):
    net, weights = network(case)
    agent = c.Agent(2 * case.config["emb"], case.config["hid"])
    missing, unexpected = agent.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) == {"critic.weight", "critic.bias"}, (missing, unexpected)
    whole = net(case.inputs["image"])
    ours, state, k = {"global_feature": whole}, agent.start(len(whole)), 0
    while f"crop_{k}" in case.inputs:
        feature = net(case.inputs[f"crop_{k}"])
        logits, _, state = agent(torch.cat([whole, feature], 1), state)
        ours |= {f"crop_feature_{k}": feature, f"logits_{k}": logits, f"h_{k}": state[0], f"c_{k}": state[1]}
        k += 1
    compare(ours, case)


def check_reward(case):
    scores, H, W = case.inputs["scores"], case.config["H"], case.config["W"]
    box, done = c.whole(1), torch.zeros(1, dtype=torch.bool)
    rows = []
    for t, action in enumerate(case.inputs["actions"]):
        box, done = c.act(box, done, action[None])
        at = c.pixels(box, H, W)
        before, after = scores[t:t + 1], scores[t + 1:t + 2]
        rows.append((c.code_reward(before, after, at, t, done), c.paper_reward(before, after, at, t), done.long(), at))
    names = "reward_code", "reward_paper", "done", "pixels"
    compare({name: torch.cat(values) for name, values in zip(names, zip(*rows))}, case)


def check_vfn(case):
    net, _ = network(case)
    images = torch.cat([case.inputs["crops"], case.inputs["fulls"]])
    feature = net(images)
    score = net.score(feature)
    crop, full = score.chunk(2)
    compare({"feature": feature, "score": score, "hinge_loss": c.hinge(crop, full),
             "ranknet_loss": c.ranknet(crop, full), "crop_minus_full": crop - full}, case)


def check_a2c(case):
    config, i = case.config, case.inputs
    names = {"mlp.0": "fc1", "mlp.2": "fc2", "mlp.4": "fc3", "lstm": "lstm", "critic_linear": "critic",
             "actor_linear": "action_fc"}
    rename = lambda key: f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}"
    agent = c.Agent(config["ob_dim"], config["hidden"])
    agent.load_state_dict({rename(key): value for key, value in case.state_dict.items()})
    mask = (torch.arange(len(i["obs"]))[:, None] < i["lengths"]).float()
    states, state = [], agent.start(mask.shape[1])
    with torch.no_grad():
        for t, observation in enumerate(i["obs"]):
            states.append([part * mask[t][:, None] for part in state])
            state = agent(observation, state)[2]
    hs, cs = map(torch.stack, zip(*states))
    e = c.Episodes(i["obs"], i["actions"], i["rewards"], mask, hs, cs, torch.zeros(mask.shape[1]), None)
    values, logits = c.replay(agent, e)
    options = {name: config[key] for name, key in (("gamma", "gamma"), ("lam", "lam"), ("value_coef", "value_coef"),
                                                   ("entropy_coef", "entropy_coef")) if key in config}
    ours = c.a2c_loss(values, logits, e.actions, e.rewards, mask, **options)
    ours["loss"].backward()
    ours |= {"values": values, "logits": logits, "policy_loss": ours["policy"], "value_loss": ours["value"],
             "total_loss": ours["loss"], "mask": mask, "hidden": hs, "cell": cs}
    ours |= {f"grad_norm:{key}": agent.get_parameter(rename(key)).grad.norm() for key in case.state_dict}
    compare(ours, case)


CHECKS = {"crop-actions": check_actions, "crop-resize": check_crop, "crop-metrics": check_metrics,
          "a2rl-agent": check_agent, "crop-reward": check_reward, "vfn": check_vfn, "a2c": check_a2c}
