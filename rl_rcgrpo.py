"""Stage 2: Reward-Conditioned Group Relative Policy Optimization (RC-GRPO, arXiv 2602.03025).

    torchrun rl_rcgrpo.py                                 # continues from the default stage 1 run
    torchrun --nproc_per_node 8 rl_rcgrpo.py --init runs/sft_rctp/model --reward_tokens high      # plain GRPO

GRPO learns nothing from a group whose rollouts all get the same reward. After stage 1 the token in the prompt
decides between success and failure, so a group whose rollouts draw their own tokens differs by construction.

One update:

    1. take --prompts tasks; for each draw G reward tokens, r_j ~ P(r)
    2. roll out: G conversations a task, each under its own token
    3. reward each; advantages over the whole group, both tokens mixed: A_j = (R_j - mean) / (std + eps)
    4. log-probs of the reference (the stage 1 checkpoint) under the same tokens
    5. minimise -E[ 1/G sum_j min(rho_j A_j, clip(rho_j, 1 - eps, 1 + eps) A_j) - beta KL(pi || pi_ref) ]

What the paper leaves open is decided so: the ratio rho is per token; a loss is averaged over a rollout's
tokens, then over rollouts; a batch makes one update, so that rho is 1 and the clip does not act.

Axes: S tasks, G rollouts of a group, B rollouts, T sampled tokens of a rollout.
"""
import argparse
import json
import random
import sys
import time
from pathlib import Path

import bfcl_env
from bfcl_env import BfclEnv, BfclError, number


def parse_args():
    parser = argparse.ArgumentParser(description="Stage 2: RC-GRPO.")
    add = parser.add_argument
    add("--init", default="runs/sft_rctp/model",
        help="a stage 1 checkpoint: start and KL reference (default: %(default)s)")
    add("--steps", type=number(int, 1), default=400, help="updates (default: %(default)s)")
    add("--prompts", type=number(int, 1), default=52,
        help="tasks a step; the paper has 256 rollouts (default: %(default)s)")
    add("--group", type=number(int, 2), default=5, help="G, rollouts a task (default: %(default)s)")
    add("--reward_tokens", choices=["mixed", "high", "low", "none"], default="mixed",
        help="what the rollouts carry; high is plain GRPO (default: %(default)s)")
    add("--p_high", type=number(float, 0, 1), default=0.5,
        help="P(r = high) of `mixed` (default: %(default)s)")
    add("--beta", type=number(float, 0), default=0.1,
        help="weight of the KL; 0: no reference (default: %(default)s)")
    add("--clip", type=number(float, 0), default=0.2, help="eps of the clipped ratio (default: %(default)s)")
    bfcl_env.add_training_flags(parser, "runs/rl_rcgrpo", lr=1e-6)
    bfcl_env.add_sampling_flags(parser)
    bfcl_env.add_world_flags(parser)
    args = parser.parse_args()
    try:
        bfcl_env.check_out(args.out)
        contract = Path(args.init) / "rcgrpo.json"
        if not contract.is_file():
            raise BfclError(f"no stage 1 checkpoint at {args.init}: run `torchrun sft_rctp.py` first, or "
                            "give the model/ folder of a stage 1 run with --init")
        for name, value in json.loads(contract.read_text()).items():
            if name in ("docs", "protocol", "style") and getattr(args, name) not in (value, "auto"):
                raise BfclError(f"stage 1 was trained with --{name} {value}, this run has "
                                f"{getattr(args, name)}: give --{name} {value}")
        if args.max_len > args.tokens_per_microbatch:
            raise BfclError(f"--max_len {args.max_len} is more than --tokens_per_microbatch "
                            f"{args.tokens_per_microbatch}: a rollout could not be trained on; give "
                            f"--max_len {args.tokens_per_microbatch}")
        if args.temperature == 0:
            raise BfclError("--temperature 0 is greedy: all rollouts of a group would be alike; give one "
                            "above 0")
        bfcl_env.check_model(args.init)
        bfcl_env.select_tasks(args)
    except BfclError as error:
        sys.exit(f"error: {error}")
    return args


# Flags are parsed before torch is imported, so that a mistake is told within seconds.
ARGS = parse_args() if __name__ == "__main__" else None

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from rollout import load_policy, rollout, sampling, show, split_fitting
from sft_rctp import (MetricsLogger, compute_dtype, end_run, full_state, make_optimizer, pack, peak_memory_gb,
                      shard, start_run, start_world, token_logprobs, update)


# --------------------------------------------------------------------------------------------------
# The maths: pure functions.

def draw_reward_tokens(kind: str, group: int, p_high: float, rng: random.Random) -> list[str | None]:
    """Reward tokens of a group: each rollout draws its own, P(high) = p_high; or all high, all low, none."""
    if kind == "mixed":
        return ["high" if rng.random() < p_high else "low" for _ in range(group)]
    return [None if kind == "none" else kind] * group


def group_advantages(rewards: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """A_j = (R_j - mean) / (std + eps) over the whole group, both tokens mixed; population std (ddof 0).

    rewards [S, G] -> [S, G]. Equal rewards give exactly 0, whatever rounding does to their mean.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.]]), eps=0)
    tensor([[ 1., -1., -1.,  1.],
            [ 0.,  0.,  0.,  0.]])
    """
    mean = rewards.mean(1, keepdim=True)  # [S, 1]
    std = rewards.std(1, correction=0, keepdim=True)  # [S, 1]
    flat = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # [S, 1]
    return torch.where(flat, 0.0, (rewards - mean) / (std + eps))


def policy_loss(logp, old_logp, ref_logp, advantages, mask, clip: float = 0.2, beta: float = 0.1,
                rollouts: int | None = None):
    """The clipped loss with its KL penalty, averaged over a rollout's tokens, then over rollouts.

    logp (with gradient), old_logp, ref_logp (or None with beta 0), mask [B, T]; advantages [B]; rollouts: how
    many the average is over, when the B given are only a part of the update. Returns the scalar loss and a
    dict of means over the tokens with mask 1. KL is the k3 estimator exp(d) - d - 1 with d = ref_logp - logp
    (Schulman 2020, http://joschu.net/blog/kl-approx.html): never negative, 0 where both agree."""
    zero = torch.zeros_like(logp)
    logp = torch.where(mask, logp, zero)  # what stands at mask 0, NaN included, cannot reach the loss
    ratio = torch.where(mask, logp - old_logp, zero).exp()  # [B, T]
    gain = torch.minimum(ratio * advantages[:, None],
                         ratio.clamp(1 - clip, 1 + clip) * advantages[:, None])  # [B, T]
    kl = zero
    if beta:
        d = torch.where(mask, ref_logp - logp, zero)
        kl = d.exp() - d - 1  # [B, T]
    per_token = torch.where(mask, beta * kl - gain, zero)
    lengths = mask.sum(1).clamp(min=1)  # [B]
    loss = (per_token.sum(1) / lengths).sum() / (rollouts or len(mask))
    n = mask.sum().clamp(min=1)
    clipped = ((ratio - 1).abs() > clip) & mask
    return loss, {"kl": (kl.detach() * mask).sum() / n, "clip_ratio": clipped.sum() / n}


# --------------------------------------------------------------------------------------------------

def group_metrics(trajectories, rewards, p_high: float) -> dict:
    """What shows whether the tokens do their work. trajectories: B, group after group; rewards [S, G]."""
    out = {"reward": rewards.mean().item(), "reward_std": rewards.std(1, correction=0).mean().item(),
           "frac_reward_zero_std": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
           "rc/within_group_var": rewards.var(1, correction=0).mean().item()}
    by_token = {k: [t.reward for t in trajectories if t.reward_token == k] for k in ("high", "low")}
    for k, values in by_token.items():
        if values:
            out[f"rc/reward_{k}"] = sum(values) / len(values)
    if all(by_token.values()):
        gap = out["rc/mode_gap"] = out["rc/reward_high"] - out["rc/reward_low"]
        G = rewards.shape[1]
        # Prop. 4.3: E[within-group variance] >= this
        out["rc/var_bound"] = (G - 1) / G * p_high * (1 - p_high) * gap**2
        out["rc/frac_high"] = len(by_token["high"]) / len(trajectories)
    said = [sum(t.mask) for t in trajectories]
    out["completions/mean_length"] = sum(said) / len(said)
    out["num_turns/mean"] = sum(t.steps for t in trajectories) / len(trajectories)
    out["tool_call_counts/mean"] = sum(t.calls for t in trajectories) / len(trajectories)
    for reason in ("malformed", "turn_tokens", "total_tokens", "context", "force_quit"):
        out[f"rollout/{reason}_frac"] = sum(t.reason == reason for t in trajectories) / len(trajectories)
    return out


def load_weights(model, state: dict) -> None:
    """Copy whole parameters into the one unsharded copy."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state[name])


def main(args):
    began = time.monotonic()
    world = start_world()
    out = start_run(args, world)
    (out / "rollouts").mkdir(exist_ok=True)
    torch.manual_seed(args.seed)
    tasks = bfcl_env.select_tasks(args)
    dtype = compute_dtype(args.dtype, world.device)

    # The acting policy is one whole copy in the compute dtype; the learning one is sharded, its masters fp32.
    policy = load_policy(args.init, dtype=dtype, device=str(world.device))
    style = policy.style(args.style)
    tasks, left_out = split_fitting(
        policy, tasks, lambda task: BfclEnv(task, args.docs, style, args.protocol), args.max_len)
    model = load_policy(args.init, dtype=torch.float32, device=str(world.device)).model
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model = shard(model, dtype, world)
    reference = ({name: p.detach().cpu().clone() for name, p in policy.model.named_parameters()}
                 if args.beta else None)
    optimizer, schedule = make_optimizer(model, args.lr, int(args.warmup * args.steps), args.steps, decay=0)
    logger = MetricsLogger(out, world)
    if world.main:
        print(f"stage 2: {args.init} | docs {args.docs}, style {style} | all that fit: {len(tasks)} of "
              f"{len(tasks) + left_out} tasks | {args.steps} "
              f"steps of {args.prompts} tasks x {args.group} rollouts, tokens {args.reward_tokens} | "
              f"reward {args.reward} | beta {args.beta}, lr {args.lr} | {dtype} on {world.size} x "
              f"{world.device.type} | {out}", flush=True)

    order: list[int] = []
    bar = tqdm(total=args.steps, desc="stage 2", unit="step", disable=not world.main, dynamic_ncols=True)
    for step in range(1, args.steps + 1):
        clock = [time.monotonic()]

        # step 1: tasks and tokens, the same on every rank; each rank takes its share of the groups
        while len(order) < args.prompts:
            order += random.Random(f"{args.seed} {step}").sample(range(len(tasks)), len(tasks))
        chosen, order = order[:args.prompts], order[args.prompts:]
        groups = [(i, draw_reward_tokens(args.reward_tokens, args.group, args.p_high,
                                         random.Random(f"{args.seed} {step} {slot}")))
                  for slot, i in enumerate(chosen)]
        mine = list(enumerate(groups))[world.rank::world.size]

        # step 2: rollouts, from the whole copy
        envs = [BfclEnv(tasks[i], args.docs, style, args.protocol) for _, (i, drawn) in mine for _ in drawn]
        trajectories = rollout(policy, envs, [token for _, (_, drawn) in mine for token in drawn],
                               [(args.seed, step, slot, j) for slot, _ in mine for j in range(args.group)],
                               progress="rollouts" if world.main else None, **sampling(args))
        clock.append(time.monotonic())

        # step 3: rewards and advantages
        rewards = torch.tensor([t.reward for t in trajectories]).view(-1, args.group)  # [S, G] of this rank
        advantages = group_advantages(rewards).flatten().to(world.device)  # [B]
        packs = pack(trajectories, args.tokens_per_microbatch)

        # step 4: the reference takes the place of the acting copy for its log-probs
        ref_logps = [None] * len(packs)
        if args.beta:
            load_weights(policy.model, reference)
            with torch.no_grad():
                ref_logps = [token_logprobs(policy.model, p.to(world.device), policy.banned,
                                            args.temperature)[0] for p in packs]
        clock.append(time.monotonic())

        # step 5: loss and update
        count = args.prompts * args.group
        sums = {"loss": 0.0, "kl": 0.0, "clip_ratio": 0.0, "entropy": 0.0, "gap": 0.0, "tokens": 0.0}
        largest_gap, queue = 0.0, iter(ref_logps)

        def loss_of(p):
            nonlocal largest_gap
            logp, entropy = model.token_logprobs(p, policy.banned, args.temperature)  # [M] each
            if not len(logp):
                return logp.sum()
            owners, lengths = torch.unique_consecutive(p.owner, return_counts=True)

            def rows(flat):  # [M] -> [B, T], one row per rollout of this pack
                return pad_sequence(flat.split(lengths.tolist()), batch_first=True)
            mask = rows(torch.ones_like(logp)) > 0
            ref = next(queue)
            loss, stats = policy_loss(rows(logp), rows(logp.detach()), ref if ref is None else rows(ref),
                                      advantages[owners], mask, args.clip, args.beta, count)
            sampled = [x for i in owners.tolist()
                       for x, m in zip(trajectories[i].logps, trajectories[i].mask) if m]
            difference = (logp.detach() - torch.tensor(sampled, device=logp.device)).abs()
            largest_gap = max(largest_gap, difference.max().item())
            for name, value in (("kl", stats["kl"] * len(logp)), ("tokens", len(logp)),
                                ("loss", loss.detach()), ("clip_ratio", stats["clip_ratio"] * len(logp)),
                                ("entropy", entropy.sum()), ("gap", difference.sum())):
                sums[name] += float(value)
            return loss
        norm = update(model, optimizer, packs, loss_of, world, args.max_grad_norm)
        lr = schedule.get_last_lr()[0]
        schedule.step()
        load_weights(policy.model, full_state(model))
        clock.append(time.monotonic())

        # what happened, over all ranks
        everyone = [None] * world.size
        dist.all_gather_object(everyone, (trajectories, sums, largest_gap))
        all_t = [t for ts, _, _ in everyone for t in ts]
        sums = {name: sum(s[name] for _, s, _ in everyone) for name in sums}
        tokens = max(1.0, sums["tokens"])
        metrics = group_metrics(all_t, torch.tensor([t.reward for t in all_t]).view(-1, args.group),
                                args.p_high)
        metrics |= {"loss": sums["loss"], "grad_norm": norm, "learning_rate": lr, "kl": sums["kl"] / tokens,
                    "clip_ratio/region_mean": sums["clip_ratio"] / tokens,
                    "entropy": sums["entropy"] / tokens,
                    "sampling/sampling_logp_difference/mean": sums["gap"] / tokens,
                    "sampling/sampling_logp_difference/max": max(g for _, _, g in everyone),
                    "num_tokens": tokens, "timing_s/rollout": clock[1] - clock[0],
                    "timing_s/reference": clock[2] - clock[1], "timing_s/update": clock[3] - clock[2],
                    "step_time": clock[3] - clock[0], "perf/max_memory_allocated_gb": peak_memory_gb(world)}
        if world.main:
            with open(out / "rollouts" / f"step_{step:06d}.jsonl", "w") as f:
                f.writelines(t.to_json() + "\n" for t in all_t)
            ranked = sorted(all_t, key=lambda t: t.reward)
            for title, t in (("best", ranked[-1]), ("worst", ranked[0])):
                tqdm.write(f"--- {title} of step {step}\n{show(t, policy.tokenizer)}")
        logger.log(step, args.steps, metrics,
                   ["reward", "rc/reward_high", "rc/reward_low", "frac_reward_zero_std", "kl", "entropy",
                    "loss", "grad_norm", "step_time"])
        bar.update()
        if step == 1 and world.main:
            tqdm.write(f"about {metrics['step_time'] * args.steps / 60:.1f} minutes for {args.steps} steps")
    bar.close()

    seen = sorted({*policy.contract["tasks"], *(task.id for task in tasks)})
    contract = {**policy.contract, "stage": "rcgrpo", "init": args.init, "tasks": seen}
    end_run(model, policy, out, contract, world, began, ["reward", "rc/reward_high", "rc/reward_low",
            "frac_reward_zero_std", "kl", "entropy"], "python eval_bfcl.py --ckpt")


if __name__ == "__main__":
    try:
        main(ARGS)
    except BfclError as error:
        sys.exit(f"error: {error}")
