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
tokens, then over rollouts; a batch is counted in rollouts and makes one update, so that rho is 1 and the clip
does not act (it does from --inner_epochs 2 on).

Axes: S tasks, G rollouts of a group, B rollouts, T sampled tokens of a rollout.
"""
import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import bfcl_env
from bfcl_env import BfclEnv, BfclError, number, show


# Two transcriptions of the paper's hyper-parameters; the second names no batch, and takes the first's.
PRESETS = {"appendix": dict(lr=1e-6, beta=0.1, group=5, batch=256),
           "notes": dict(lr=1e-5, beta=0.05, group=4, batch=256)}


def parse_args():
    parser = argparse.ArgumentParser(description="Stage 2: RC-GRPO.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="notes",
        help="lr, beta, group and batch of the paper's appendix or of notes on it (default: %(default)s)")
    add("--init", default="runs/sft_rctp/model",
        help="a stage 1 checkpoint: start and KL reference (default: %(default)s)")
    add("--steps", type=number(int, 1), default=400, help="batches (default: %(default)s)")
    add("--batch", type=number(int, 1), help="rollouts a step, made whole groups (default: %(default)s)")
    add("--prompts", type=number(int, 1), help="tasks a step (default: batch / group, rounded up)")
    add("--group", type=number(int, 2), help="G, rollouts a task (default: %(default)s)")
    add("--reward_tokens", choices=["mixed", "high", "low", "none"], default="mixed",
        help="what the rollouts carry; high or none is plain GRPO (default: %(default)s)")
    add("--p_high", type=number(float, 0, 1), default=0.5,
        help="P(r = high) of `mixed` (default: %(default)s)")
    add("--token_draw", choices=["iid", "exact"], default="iid",
        help="each rollout by itself, or G * p_high of each group (default: %(default)s)")
    add("--baseline", choices=["group", "token"], default="group",
        help="mean and std over the group, or over its rollouts with the same token (default: %(default)s)")
    add("--advantage_scale", choices=["group", "none"], default="group",
        help="divide by the std, or not (default: %(default)s)")
    add("--loss_average", choices=["sequence", "token"], default="sequence",
        help="over a rollout's tokens and then rollouts, or over all tokens (default: %(default)s)")
    add("--zero_variance", choices=["keep", "drop"], default="keep",
        help="groups with equal rewards: train on their KL, or leave them out (default: %(default)s)")
    add("--truncated", choices=["keep", "mask"], default="keep",
        help="rollouts that ran into a token limit: train on them, or not (default: %(default)s)")
    add("--inner_epochs", type=number(int, 1), default=1, help="updates a batch (default: %(default)s)")
    add("--beta", type=number(float, 0), help="weight of the KL; 0: no reference (default: %(default)s)")
    add("--clip_low", type=number(float, 0, 1), default=0.2, help="ratio below 1 (default: %(default)s)")
    add("--clip_high", type=number(float, 0), default=0.2, help="ratio above 1 (default: %(default)s)")
    bfcl_env.add_training_flags(parser, "runs/rl_rcgrpo")
    bfcl_env.add_sampling_flags(parser)
    bfcl_env.add_world_flags(parser)
    parser.set_defaults(**PRESETS["notes"])  # for --help
    chosen = parser.parse_known_args()[0]
    parser.set_defaults(**PRESETS[chosen.preset])
    if chosen.preset == "appendix" and chosen.reward_tokens != "mixed":
        parser.set_defaults(batch=64)  # of its plain GRPO
    args = parser.parse_args()
    args.prompts = args.prompts or -(-args.batch // args.group)
    try:
        contract = Path(args.init) / "rcgrpo.json"
        if not contract.is_file():
            raise BfclError(f"no stage 1 checkpoint at {args.init}: run `torchrun sft_rctp.py` first, or "
                            "give the model/ folder of a stage 1 run with --init")
        contract = json.loads(contract.read_text())
        wanted = {"mixed": {"high", "low"}}.get(args.reward_tokens, {args.reward_tokens})
        missing = wanted - set(contract.get("tokens", wanted))
        if missing == {"none"}:
            raise BfclError("stage 1 saw no prompt without a token: train it with --no_token above 0, or "
                            "give another --reward_tokens")
        if missing:
            print(f"warning: stage 1 (--arm {contract['arm']}) never saw the prompts of {sorted(missing)}",
                  file=sys.stderr)
        for name, value in contract.items():
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
        trained = {*contract.get("tasks", ()), *(task.id for task in bfcl_env.select_tasks(args))}
        bfcl_env.validation_tasks(args, trained)
        if not args.plan:
            bfcl_env.check_out(args)
    except BfclError as error:
        sys.exit(f"error: {error}")
    return args


# Flags are parsed before torch is imported, so that a mistake is told within seconds.
if __name__ == "__main__":
    bfcl_env.settle_environment()
    ARGS = parse_args()

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from rollout import checksum, load_policy, rollout, sampling, split_fitting
from sft_rctp import (Checkpointer, Interrupt, MetricsLogger, Packed, compute_dtype, copy_weights, end_run,
                      evaluate, fitting_validation, flops, learning_rate, make_optimizer, matmul_rate, pack,
                      peak_memory_gb, pinned, plan, plot_curves, release_weights, run_main, shard, shuffled,
                      skipped_in_a_row, start_run, start_world, token_logprobs, update)

TRUNCATED = ("turn_tokens", "total_tokens", "context")
SUMS = ("tokens", "entropy", "gap", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean",
        "clip_ratio/region_mean")  # over tokens; every rank has all of them, in this order
CURVES = ["reward", "rc/reward_high", "rc/reward_low", "rc/var_within_tokens", "rc/var_between_tokens",
          "frac_reward_zero_std", "kl", "entropy", "grad_norm", "eval/reward_high"]


# --------------------------------------------------------------------------------------------------
# The maths: pure functions.

def draw_reward_tokens(kind: str, group: int, p_high: float, rng: random.Random,
                       exact: bool = False) -> list[str | None]:
    """Reward tokens of a group: each rollout draws its own, P(high) = p_high; or all high, all low, none.

    exact: G * p_high rollouts get high, a fraction is rounded up with its probability, in random order."""
    if kind != "mixed":
        return [None if kind == "none" else kind] * group
    if not exact:
        return ["high" if rng.random() < p_high else "low" for _ in range(group)]
    high = int(group * p_high + rng.random())
    return rng.sample(["high"] * high + ["low"] * (group - high), group)


def group_advantages(rewards: torch.Tensor, tokens: torch.Tensor | None = None, scale: bool = True,
                     eps: float = 1e-6) -> torch.Tensor:
    """A_j = (R_j - mean) / (std + eps) over the whole group, both tokens mixed; population std (ddof 0).

    rewards [S, G] -> [S, G]. Equal rewards give exactly 0, whatever rounding does to their mean. tokens
    [S, G], if given, restricts mean and std to the rollouts of the same token; without `scale` there is no
    division.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.]]), eps=0)
    tensor([[ 1., -1., -1.,  1.],
            [ 0.,  0.,  0.,  0.]])
    """
    tokens = torch.zeros_like(rewards) if tokens is None else tokens
    peer = tokens[:, :, None] == tokens[:, None, :]  # [S, G, G] whose reward is in whose baseline
    others = rewards[:, None, :].expand(peer.shape)  # [S, G, G]
    n = peer.sum(2)  # [S, G]
    mean = (others * peer).sum(2) / n  # [S, G]
    std = ((others - mean[:, :, None]).square() * peer).sum(2).div(n).sqrt()  # [S, G]
    flat = ((others == rewards[:, :, None]) | ~peer).all(2)  # [S, G]
    return torch.where(flat, 0.0, (rewards - mean) / (std + eps if scale else 1.0))


def policy_loss(logp, old_logp, ref_logp, advantages, mask, clip_low: float = 0.2, clip_high: float = 0.2,
                beta: float = 0.1, average: str = "sequence", count: int | None = None):
    """The clipped loss with its KL penalty, averaged over a rollout's tokens, then over rollouts.

    logp (with gradient), old_logp, ref_logp (or None with beta 0), mask [B, T]; advantages [B]; average
    "token": over all tokens alike; count: how many rollouts (or tokens) the average is over, when those given
    are only a part of the update. Returns the loss and a dict of means over the tokens with mask 1. KL is the
    k3 estimator exp(d) - d - 1 with d = ref_logp - logp, never negative, 0 where both agree (Schulman 2020,
    http://joschu.net/blog/kl-approx.html)."""
    zero = torch.zeros_like(logp)
    logp = torch.where(mask, logp, zero)  # what stands at mask 0, NaN included, cannot reach the loss
    ratio = torch.where(mask, logp - old_logp, zero).exp()  # [B, T]
    A = advantages[:, None]  # [B, 1]
    gain = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # [B, T]
    kl = zero
    if beta:
        d = torch.where(mask, ref_logp - logp, zero)
        kl = d.exp() - d - 1  # [B, T]
    per_token = torch.where(mask, beta * kl - gain, zero)
    if average == "sequence":
        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
    loss = per_token.sum() / (count or (len(mask) if average == "sequence" else mask.sum()))
    with torch.no_grad():
        low, high = (ratio < 1 - clip_low) & (A < 0) & mask, (ratio > 1 + clip_high) & (A > 0) & mask
        stats = {"kl": kl, "clip_ratio/low_mean": low, "clip_ratio/high_mean": high,
                 "clip_ratio/region_mean": low | high}
        return loss, {name: (x * mask).sum() / mask.sum().clamp(min=1) for name, x in stats.items()}


def variance_parts(rewards: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float]:
    """Mean within-group variance of rewards [S, G], split by the law of total variance into its part WITHIN
    tokens [S, G] and its part BETWEEN them.

    The second is what Prop. 4.3 bounds, and what drawing tokens adds. By itself it teaches the high mode
    nothing: for a fixed token, a baseline that does not depend on the action adds nothing to the expected
    gradient."""
    means = torch.stack([rewards.masked_fill(tokens != t, 0).sum(1) / (tokens == t).sum(1).clamp(min=1)
                         for t in (0, 1)], 1).gather(1, tokens)  # [S, G] each rollout's token's mean
    return (rewards - means).square().mean().item(), means.var(1, correction=0).mean().item()


# --------------------------------------------------------------------------------------------------

def group_metrics(trajectories, G: int, p_high: float) -> dict:
    """What shows whether the tokens do their work. trajectories: group after group of G."""
    rewards = torch.tensor([t.reward for t in trajectories]).view(-1, G)  # [S, G]
    tokens = torch.tensor([int(t.reward_token == "high") for t in trajectories]).view(-1, G)  # [S, G]

    def mean(values):
        values = list(values)
        return sum(values) / len(values)
    out = {"reward": rewards.mean().item(), "reward_std": rewards.std(1, correction=0).mean().item(),
           "frac_reward_zero_std": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
           "rc/within_group_var": rewards.var(1, correction=0).mean().item()}
    out["rc/var_within_tokens"], out["rc/var_between_tokens"] = variance_parts(rewards, tokens)
    out["rc/frac_high"] = tokens.float().mean().item()
    out["rc/frac_single_token_groups"] = (tokens.amax(1) == tokens.amin(1)).float().mean().item()
    for token in ("high", "low"):
        if some := [t.reward for t in trajectories if t.reward_token == token]:
            out[f"rc/reward_{token}"] = mean(some)
    if {"rc/reward_high", "rc/reward_low"} <= out.keys():
        gap = out["rc/mode_gap"] = out["rc/reward_high"] - out["rc/reward_low"]
        out["rc/var_bound"] = (G - 1) / G * p_high * (1 - p_high) * gap**2  # Prop. 4.3
    for category in sorted({t.task.rsplit("_", 1)[0] for t in trajectories}):
        out[f"reward/{category}"] = mean(t.reward for t in trajectories if t.task.startswith(category + "_"))
    for part in ("state", "action"):
        out[f"reward/{part}"] = mean(float(t.verdict.get(part) or 0) for t in trajectories)
    out["completions/mean_length"] = mean(sum(t.mask) for t in trajectories)
    out["num_turns/mean"] = mean(t.steps for t in trajectories)
    out["tool_call_counts/mean"] = mean(t.calls for t in trajectories)
    for reason in ("done", "malformed", "force_quit", *TRUNCATED):
        out[f"rollout/{reason}_frac"] = mean(t.reason == reason for t in trajectories)
    return out


def main(args):
    if args.plan:  # every group at its longest
        policy, tasks = load_policy(args.init, device="meta"), bfcl_env.select_tasks(args)
        style = policy.style(args.style)
        some, _ = split_fitting(policy, tasks[::math.ceil(len(tasks) / 32)],
                                lambda task: BfclEnv(task, args.docs, style, args.protocol), args.max_len)
        P = max(len(policy.chat.opening(BfclEnv(task, args.docs, style, args.protocol).messages(), "high"))
                for task in some)
        own = min(args.max_len, policy.max_len) - P  # sampled tokens and results
        size = max(1, min(args.group, (args.tokens_per_microbatch - P) // own))  # branches of a pack
        counts = [size] * (args.group // size) + [args.group % size] * (args.group % size > 0)
        packs = [(Packed(P, [(P + i * own, P + (i + 1) * own) for i in range(n)]),
                  n * min(own, args.max_total_tokens)) for n in counts]
        plan(policy.model, args, packs * args.prompts, acts=True, reference=args.beta > 0)
        return
    world = start_world()
    out = start_run(args, world)
    (out / "rollouts").mkdir(exist_ok=True)
    tasks = bfcl_env.select_tasks(args)
    val_tasks = bfcl_env.validation_tasks(args, {task.id for task in tasks})
    dtype = compute_dtype(args.dtype, world.device)

    # The acting policy is one whole copy in the compute dtype; the learning one is sharded, its masters fp32.
    # The same memory holds, in turn, the acting weights and the reference's (kept in host memory), and is
    # given back before the backward pass.
    policy = load_policy(args.init, dtype=dtype, device=str(world.device))
    style = policy.style(args.style)
    tasks, left_out = split_fitting(
        policy, tasks, lambda task: BfclEnv(task, args.docs, style, args.protocol), args.max_len)
    reference = ({name: p.detach().cpu().clone() for name, p in policy.model.named_parameters()}
                 if args.beta else None)
    pinned(out, "reference", checksum(policy.model), world)
    val_tasks = fitting_validation(policy, val_tasks, args) if val_tasks else []
    model = load_policy(args.init, dtype=torch.float32, device="cpu").model  # sharding moves each rank's part
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model = shard(model, dtype, world)
    optimizer = make_optimizer(model, args.lr)
    checkpoints = Checkpointer(out, model, optimizer, args.keep, world)
    done = checkpoints.load()
    copy_weights(policy.model, model)
    logger, interrupt = MetricsLogger(out, world, done, args), Interrupt(world)
    rate, skipped, in_a_row = matmul_rate(dtype, world.device), 0, 0
    if world.main:
        print(f"stage 2: {args.init} | docs {args.docs}, style {style} | all that fit: {len(tasks)} of "
              f"{len(tasks) + left_out} tasks | {args.steps} steps of {args.prompts} tasks x {args.group} "
              f"rollouts, tokens {args.reward_tokens} | reward {args.reward} | "
              f"beta {args.beta}, lr {args.lr} | clip {args.clip_low}/{args.clip_high}"
              f"{' (does not act)' * (args.inner_epochs == 1)} | {dtype} on {world.size} x "
              f"{world.device.type} | {out}" + f" | from step {done + 1}" * (done > 0), flush=True)

    bar = tqdm(total=args.steps, initial=done, desc="stage 2", unit="step", disable=not world.main,
               dynamic_ncols=True)
    for step in range(done + 1, args.steps + 1):
        clock = [time.monotonic()]

        # step 1: tasks and tokens, the same on every rank; each rank takes its share of the groups
        chosen = shuffled(len(tasks), (step - 1) * args.prompts, args.prompts, args.seed)
        groups = [(i, draw_reward_tokens(args.reward_tokens, args.group, args.p_high,
                                         random.Random(f"{args.seed} {step} {slot}"),
                                         exact=args.token_draw == "exact")) for slot, i in enumerate(chosen)]
        mine = list(enumerate(groups))[world.rank::world.size]

        # step 2: rollouts, from the whole copy
        envs = [BfclEnv(tasks[i], args.docs, style, args.protocol) for _, (i, drawn) in mine for _ in drawn]
        trajectories = rollout(policy, envs, [token for _, (_, drawn) in mine for token in drawn],
                               [(args.seed, step, slot, j) for slot, _ in mine for j in range(args.group)],
                               progress="rollouts" if world.main else None, **sampling(args))
        clock.append(time.monotonic())
        dist.barrier()
        clock.append(time.monotonic())

        # step 3: rewards and advantages; what takes part in the update
        shape = (len(mine), args.group)  # [S, G] of this rank, whose S may be 0
        rewards = torch.tensor([t.reward for t in trajectories]).view(shape)
        tokens = torch.tensor([t.reward_token == "high" for t in trajectories], dtype=torch.long).view(shape)
        advantages = group_advantages(rewards, tokens if args.baseline == "token" else None,
                                      args.advantage_scale == "group").flatten()  # [B]
        flat = (advantages.view(shape) == 0).all(1).repeat_interleave(args.group)  # [B] no variance
        kept = [b for b, t in enumerate(trajectories) if 1 in t.mask
                and not (args.zero_variance == "drop" and flat[b])
                and not (args.truncated == "mask" and t.reason in TRUNCATED)]
        batch, advantages = [trajectories[b] for b in kept], advantages[kept].to(world.device)
        packs = pack(batch, args.tokens_per_microbatch)
        loss_tokens = sum(len(p.target) for p in packs)
        count = int(world.all_reduce(len(batch) if args.loss_average == "sequence" else loss_tokens))

        # step 4: the reference takes the place of the acting weights for its log-probs
        ref_logps = [None] * len(packs)
        if args.beta:
            copy_weights(policy.model, reference)
            with torch.no_grad():
                ref_logps = [token_logprobs(policy.model, p.to(world.device), policy.banned, args.temperature)
                             for p in packs]
        release_weights(policy.model)
        clock.append(time.monotonic())

        # step 5: loss and update
        lr = learning_rate(step, args.lr, args.warmup * args.steps, args.steps)
        optimizer.param_groups[0]["lr"] = lr
        norms, old_logps = [0.0], [None] * len(packs)
        for epoch in range(args.inner_epochs if count else 0):
            sums, largest_gap, at = dict.fromkeys(SUMS, 0.0), 0.0, -1

            def loss_of(p):
                nonlocal largest_gap, at
                # [M] each
                logp, entropy = model.token_logprobs(p, policy.banned, args.temperature, entropy=True)
                if not len(logp):
                    return logp.sum()
                at += 1
                if epoch == 0:  # before any update: the weights that sampled
                    old_logps[at] = logp.detach()
                owners, lengths = torch.unique_consecutive(p.owner, return_counts=True)

                def rows(flat):  # [M] -> [B, T], one row per rollout of this pack
                    return pad_sequence(flat.split(lengths.tolist()), batch_first=True)
                loss, stats = policy_loss(rows(logp), rows(old_logps[at]),
                                          rows(ref_logps[at]) if args.beta else None, advantages[owners],
                                          rows(torch.ones_like(logp)) > 0, args.clip_low, args.clip_high,
                                          args.beta, args.loss_average, count)
                sampled = [x for i in owners.tolist() for x, m in zip(batch[i].logps, batch[i].mask) if m]
                difference = (old_logps[at] - torch.tensor(sampled, device=logp.device)).abs()
                largest_gap = max(largest_gap, difference.max().item())
                parts = {"entropy": entropy.sum(), "gap": difference.sum(),
                         "tokens": len(logp), **{name: x * len(logp) for name, x in stats.items()}}
                for name in SUMS:
                    sums[name] += float(parts[name])
                return loss
            norm, loss = update(model, optimizer, packs, loss_of, world, args.max_grad_norm)
            norms.append(norm)
        norm = next((n for n in norms if not math.isfinite(n)), norms[-1])
        skipped += not math.isfinite(norm)
        copy_weights(policy.model, model)
        clock.append(time.monotonic())

        # what happened, over all ranks
        everyone = world.gather([(slot, trajectories[n * args.group:(n + 1) * args.group])
                                 for n, (slot, _) in enumerate(mine)])
        everyone = [t for _, group in sorted(everyone, key=lambda pair: pair[0]) for t in group]
        metrics = group_metrics(everyone, args.group, args.p_high)
        if count:
            sums = {name: world.all_reduce(x) for name, x in sums.items()}
            n = sums.pop("tokens")
            metrics |= {"loss": loss,
                        "sampling/sampling_logp_difference/mean": sums.pop("gap") / n,
                        "sampling/sampling_logp_difference/max": max(world.gather([largest_gap])),
                        **{name: x / n for name, x in sums.items()}}
            if not args.beta:
                metrics.pop("kl")
        phases = ("rollout", "wait", "reference", "update")
        seconds = dict(zip(phases, (b - a for a, b in zip(clock, clock[1:]))))
        work = world.all_reduce(flops(model, [p.layout for p in packs], loss_tokens)) * args.inner_epochs
        said = sum(sum(t.mask) for t in everyone)
        metrics |= {"grad_norm": norm, "learning_rate": lr, "num_tokens": said, "skipped_updates": skipped,
                    "rollouts_in_loss": int(world.all_reduce(len(batch))),
                    **{f"timing_s/{name}": x for name, x in seconds.items()},
                    "step_time": clock[-1] - clock[0],
                    "perf/throughput": said / (clock[-1] - clock[0]),
                    "perf/mfu": work / seconds["update"] / rate / world.size,
                    "perf/max_memory_allocated_gb": peak_memory_gb(world)}
        if world.main:
            with open(out / "rollouts" / f"step_{step:06d}.jsonl", "w") as f:
                f.writelines(t.to_json() + "\n" for t in everyone)
            ranked = sorted(everyone, key=lambda t: t.reward)
            for title, t in (("best", ranked[-1]), ("worst", ranked[0])):
                tqdm.write(f"--- {title} of step {step}\n{show(t, policy.tokenizer)}")
        best = None
        if val_tasks and (step % args.eval_every == 0 or step == args.steps):
            judged = None if args.reward_tokens == "none" else "high"
            metrics |= evaluate(policy, val_tasks, [judged], args, world)
            best = [metrics[f"eval/reward_{judged or 'none'}"]]
        logger.log(step, args.steps, metrics,
                   ["reward", "rc/reward_high", "rc/reward_low", "rc/var_within_tokens",
                    "rc/var_between_tokens", "frac_reward_zero_std", "kl", "entropy", "grad_norm",
                    "eval/reward_high", "step_time"])
        bar.update()
        in_a_row = skipped_in_a_row(in_a_row, norm, step)
        if step == 1 and world.main:
            tqdm.write(f"about {metrics['step_time'] * args.steps / 60:.1f} minutes for {args.steps} steps")
        stop = interrupt.everywhere()
        if stop or best or args.save_every and step % args.save_every == 0:
            checkpoints.save(step, best)
            if world.main:
                plot_curves(out, CURVES)
        if stop:
            raise BfclError(f"stopped after step {step}, as asked: the same command goes on from there")
    bar.close()

    step = checkpoints.load(best=True) or args.steps
    seen = sorted({*policy.contract["tasks"], *(task.id for task in tasks)})
    contract = {**policy.contract, "stage": "rcgrpo", "init": args.init, "step": step, "tasks": seen,
                "reward_tokens": args.reward_tokens, "baseline": args.baseline, "seed": args.seed,
                "steps": args.steps, "rollouts": args.steps * args.prompts * args.group}
    end_run(model, policy, out, contract, world, logger.began, CURVES, "python eval_bfcl.py --ckpt")


if __name__ == "__main__":
    run_main(main, ARGS)
