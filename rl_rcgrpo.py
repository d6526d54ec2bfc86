"""Stage 2: Reward-Conditioned Group Relative Policy Optimization (RC-GRPO, arXiv 2602.03025).

    torchrun rl_rcgrpo.py                                 # continues from the default stage 1 run
    torchrun --nproc_per_node 8 rl_rcgrpo.py --model runs/sft_rctp/model --reward_tokens high     # plain GRPO

GRPO learns nothing from a group whose rollouts all get the same reward. After stage 1 the reward token in the
prompt steers the policy towards success or failure, so rollouts that each draw their own token get different
rewards within a group.

One step:

    1. take --prompts_per_step tasks; for each draw G reward tokens, r_j ~ P(r)
    2. roll out: G conversations per task, each under its own reward token
    3. normalise the rewards over the whole group, high and low together: A_j = (R_j - mean) / (std + eps)
    4. compute the log-probs of the reference (the stage 1 checkpoint) under the same reward tokens
    5. update: take the old log-probs from the trainer's own first forward, before any weight has changed, and
       minimise -E[ 1/G sum_j min(rho_j A_j, clip(rho_j, 1 - clip_eps, 1 + clip_eps) A_j)
                    - beta KL(pi || pi_ref) ]                                                  (Eq. 8, 9)

The ratio rho is per token by default, pi / pi_old as in GRPO, and the loss is averaged over the tokens of a
rollout, then over rollouts. With one update per batch (--update_epochs 1) rho is 1 and never clipped.
Algorithm 1 prints another ratio, --ratio trajectory: pi(tau_j) / pi_ref(tau_j), one per rollout, against the
reference; it can be clipped from the run's second update on. The paper does not say what its batch size
counts: here rollouts. --advantage and --dynamic_sampling implement other fixes for zero-std groups, so that
they can be compared under equal conditions.

Axes: S tasks, G rollouts per group, B rollouts, M loss positions of a pack.

Sections: the maths; stage 2 (`main`, the update, the loss); groups; metrics, and rollouts on disk; flags.
Read the first three; the rest serves them.
"""
import math
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass

import bfcl_env

if __name__ == "__main__":
    bfcl_env.start_process()

import torch
import torch.distributed as dist
from tqdm import tqdm

import sft_rctp
from bfcl_env import BfclError, warn
from rollout import (Pack, Trajectory, add_sampling_flags, check_model, checksum, compute_dtype,
                     filter_overlong, load_policy, mean_reward, number, pack, read_stage_info, rollout,
                     run_main, sampling, token_logprobs, transcript)
from sft_rctp import (TrainLoop, begin_run, check_and_record_settings, check_kv_cache, epoch_shuffle,
                      export_checkpoint, free_weights, get_lr, init_distributed, load_full_weights,
                      offload_shards, optimizer_step, pad_packs, shard_model, synced_time, validate,
                      validation_tasks)

ADVANTAGES = ("group", "within_reward_token", "mean_only", "sign", "virtual_success")
RATIOS = ("per_token", "trajectory")


# ---- The maths: pure functions -----------------------------------------------------------------------------
def sample_reward_tokens(kind, group_size, p_high, rng):
    """Return the reward tokens of a group: "high", "low" or None for each rollout.

    Args:
        kind: "mixed": each rollout draws its own token with P(high) = p_high (Eq. 3); "high", "low" or
            "none": all have the same.
    """
    if kind == "mixed":
        return ["high" if rng.random() < p_high else "low" for _ in range(group_size)]
    return [None if kind == "none" else kind] * group_size


def group_advantages(rewards, reward_tokens=None, kind="group", eps=1e-6):
    """Return the advantages of the rollouts of each group.

    A group of equal rewards gets exactly 0, with two exceptions: `sign` has no baseline, and with
    `virtual_success` a group of failures differs from its virtual rollout.

    Args:
        rewards: [S, G].
        reward_tokens: [S, G], for `within_reward_token`.
        kind: one of ADVANTAGES:
            group: A_j = (R_j - mean) / (std + eps) over the whole group, high and low together, with the
                population std (arXiv 2602.03025, A.2)
            within_reward_token: the same over the rollouts that share a reward token; a single one gets 0
            mean_only: not divided by the std (Dr. GRPO, arXiv 2503.20783, without its length term)
            sign: 2 R - 1 without a baseline, for binary rewards (arXiv 2605.07689)
            virtual_success: adds a virtual rollout of reward 1 to mean and std, so that a group of failures
                learns too (NGRPO, arXiv 2509.18851, without its asymmetric clipping)

    Returns:
        [S, G].

    Raises:
        BfclError: for `sign` with a reward that is neither 0 nor 1.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.]]), eps=0)
    tensor([[ 1., -1., -1.,  1.],
            [ 0.,  0.,  0.,  0.]])
    """
    if kind == "within_reward_token":  # each reward token forms its own group
        advantages = torch.zeros_like(rewards)  # [S, G]
        for s in range(len(rewards)):
            for reward_token in reward_tokens[s].unique():
                members = reward_tokens[s] == reward_token  # [G] bool
                advantages[s, members] = group_advantages(rewards[s, members][None], eps=eps)[0]
        return advantages
    if kind == "sign":
        if not ((rewards == 0) | (rewards == 1)).all():
            raise BfclError("--advantage sign is for rewards 0 and 1: give another --advantage or --reward")
        return 2 * rewards - 1
    counted = rewards
    if kind == "virtual_success":
        counted = torch.cat([rewards, torch.ones_like(rewards[:, :1])], 1)  # [S, G + 1]
    mean = counted.mean(1, keepdim=True)  # [S, 1]
    std = (counted - mean).square().mean(1, keepdim=True).sqrt()  # [S, 1] without a warning for S = 0
    advantages = (rewards - mean) / (std + eps)  # [S, G]
    if kind == "mean_only":
        advantages = rewards - mean
    # NOTE: zeroed explicitly. The rounding error of the mean, divided by a std of about 0, would blow up.
    zero_std = (counted == counted[:, :1]).all(1, keepdim=True)  # [S, 1]
    return advantages.masked_fill(zero_std, 0.0)


def variance_parts(rewards, reward_tokens):
    """Split the mean within-group variance of rewards [S, G] by the law of total variance.

    The part BETWEEN reward tokens is the variance of their mean rewards; Prop. 4.3 bounds it from below. It
    alone does not improve the policy under high: for a fixed reward token the group mean is only a baseline,
    which does not change the expected gradient.

    Args:
        reward_tokens: [S, G], 1 for high.

    Returns:
        The part within reward tokens and the part between them.
    """
    means = torch.zeros_like(rewards)  # [S, G] mean reward of the rollouts with the same reward token
    for reward_token in (0, 1):
        members = reward_tokens == reward_token  # [S, G]
        count = members.sum(1, keepdim=True).clamp(min=1)  # [S, 1]
        mean = (rewards * members).sum(1, keepdim=True) / count  # [S, 1]
        means = torch.where(members, mean, means)
    within = (rewards - means).square().mean()
    between = means.var(1, correction=0).mean()
    return within.item(), between.item()


# ---- Stage 2 -----------------------------------------------------------------------------------------------
def main():
    args = parse_args()
    if args.export is not None:
        return export_checkpoint(args.export)
    check_flags(args)
    distributed = init_distributed()
    out = begin_run(args, distributed, ("checkpoints", "rollouts"))
    dtype = compute_dtype(args.dtype, distributed.device)

    # Two models. `trainer_policy` is sharded, in fp32. `sampler_policy` is one full copy in the compute dtype
    # with the policy's weights during the rollouts, the reference's for ref_logp, and none during the update.
    sampler_policy = load_policy(
        args.model, dtype, distributed.device, weights=False, thinking=args.thinking)
    call_format = sampler_policy.call_format(args.call_format)
    make_env = bfcl_env.make_env_fn(args, call_format)
    chosen = bfcl_env.select_tasks(args)
    tasks = filter_overlong(sampler_policy, chosen, make_env, args.max_len)
    val_tasks = filter_overlong(sampler_policy, validation_tasks(args), make_env, args.max_len)
    check_kv_cache(sampler_policy, tasks + val_tasks, make_env, args)
    trainer_policy = distributed.together(
        load_policy, args.model, torch.float32, "cpu", weights=distributed.is_main, thinking=args.thinking)
    sha256 = checksum(trainer_policy.model) if distributed.is_main else None
    sha256 = distributed.broadcast(sha256)
    check_and_record_settings(out, distributed, {"reference": sha256, "compute": str(dtype)})
    model, optimizer = shard_model(trainer_policy, args, dtype, distributed)
    reference_shards = offload_shards(model, dtype) if args.beta or args.ratio == "trajectory" else {}
    loop = TrainLoop(out, args, model, optimizer, args.steps, distributed)
    loop.resume()  # NOTE: after `offload_shards`, else the resumed weights would become the KL reference
    cursor = loop.state.setdefault("cursor", 0)  # tasks that were drawn so far
    load_full_weights(sampler_policy.model, model)
    distributed.print0(
        f"stage 2: {len(tasks)} of {len(chosen)} tasks fit the context | call format {call_format} "
        f"({sampler_policy.chat.call_format_reason}) | {dtype} on {distributed.size} x "
        f"{distributed.device.type} | {describe(args)}, from {loop.done + 1} | {out}")

    for step in loop.steps():
        started = synced_time(distributed.device)

        # steps 1 and 2: tasks, reward tokens and rollouts; each rank makes its share with the full copy
        groups, sampled_groups, cursor = sample_groups(
            sampler_policy, tasks, cursor, step, make_env, args, distributed)
        loop.state |= {"cursor": cursor,
                       "stage_info": stage2_info(sampler_policy, tasks, cursor * args.group_size, args)}
        rolled_out = synced_time(distributed.device)

        # step 3: rewards and advantages
        batch = trajectories_of(groups)
        packs = pad_packs(pack(batch, args.tokens_per_microbatch, distributed.device), distributed)
        assign_advantages(packs, groups, args)

        # step 4: load the reference's weights into the full copy and compute its log-probs
        if reference_shards:
            load_full_weights(sampler_policy.model, model, reference_shards)
            compute_ref_logp(sampler_policy, packs, args.temperature)
        free_weights(sampler_policy.model)
        compared = synced_time(distributed.device)

        # step 5: old log-probs, loss and update; then the new weights go to the full copy
        lr = get_lr(step, args.lr, args.steps)
        optimizer.param_groups[0]["lr"] = lr
        metrics = update_policy(model, optimizer, packs, sampler_policy.banned, args, distributed)
        load_full_weights(sampler_policy.model, model)
        seconds = synced_time(distributed.device) - started

        metrics |= group_metrics(sampled_groups, args.p_high)
        metrics |= {"timing_s/rollout": rolled_out - started,
                    "timing_s/reference": compared - rolled_out,
                    "timing_s/update": started + seconds - compared,
                    "step_time": seconds,
                    "perf/throughput": metrics["num_tokens"] / seconds,
                    "learning_rate": lr}
        if distributed.is_main:
            save_rollouts(out, step, sampled_groups, sampler_policy.tokenizer)
        if val_tasks and (step % args.eval_every == 0 or step == args.steps):
            reward_token = None if args.reward_tokens == "none" else "high"
            metrics |= validate(sampler_policy, val_tasks, [reward_token], make_env, args, distributed)
        loop.log(step, metrics)

    loop.end(trainer_policy)


def stage2_info(policy, tasks, rollouts, args):
    """Return the facts about this run that the evaluation needs, as the values of a StageInfo."""
    trained_on = {task.id for task in tasks} | {*policy.stage_info.tasks}
    return {**asdict(policy.stage_info),
            "stage": "rcgrpo",
            "reward_tokens": args.reward_tokens,
            "advantage": args.advantage,
            "ratio": args.ratio,
            "dynamic_sampling": args.dynamic_sampling,
            "rollouts": policy.stage_info.rollouts + rollouts,
            "tasks": sorted(trained_on),
            "flags": sft_rctp.training_flags(2, args, policy.stage_info)}


def update_policy(model, optimizer, packs: list[Pack], banned, args, distributed):
    """Run step 5: --update_epochs updates on one batch.

    NOTE: the old log-probs are the trainer's own, of the first epoch, when no weight has changed yet: there
    rho = 1. The sampler's (`sampled_logp`) are compared with them in the log and used for nothing else.

    Returns:
        The metrics of the last epoch, averaged over the tokens of all ranks.
    """
    for epoch in range(args.update_epochs):
        sums = Counter()
        largest_gap = 0.0

        def loss_of(p):
            nonlocal largest_gap
            logp, entropy = model.token_logprobs(p, banned, args.temperature, entropy=True)  # [M] each
            if epoch == 0:
                p.old_logp = logp.detach()
            owners = p.owners if args.ratio == "trajectory" else None
            loss, stats = policy_loss(
                logp, p.old_logp, p.ref_logp, p.advantage, p.weight, args.clip_eps, args.beta, owners)
            gap = (p.old_logp - p.sampled_logp).abs()  # [M] between trainer and sampler
            if len(gap):
                largest_gap = max(largest_gap, gap.max().item())
            stats["tokens"] = torch.ones_like(logp)
            stats["entropy"] = entropy
            stats["sampling/sampling_logp_difference/mean"] = gap
            for name, values in stats.items():
                sums[name] += values.sum().item()
            return loss

        norm, loss = optimizer_step(model, optimizer, packs, loss_of, distributed)
        if math.isnan(norm):  # the update was skipped
            break
    tokens = max(1, distributed.all_reduce(sums.pop("tokens")))
    means = {name: distributed.all_reduce(sums[name]) / tokens for name in sorted(sums)}
    largest_gap = distributed.all_reduce(largest_gap, dist.ReduceOp.MAX)
    return {"loss": loss,
            "grad_norm": norm,
            **means,
            "sampling/sampling_logp_difference/max": largest_gap}


def policy_loss(logp, old_logp, ref_logp, advantages, weights, clip_eps=0.2, beta=0.1, owners=None):
    """Return the clipped loss with its KL penalty: the sum over positions of weight * (beta KL - surrogate).

    KL is the k3 estimator exp(d) - d - 1 with d = ref_logp - logp: never negative, 0 where both agree
    (Schulman 2020, http://joschu.net/blog/kl-approx.html). Its value estimates KL(pi || pi_ref). NOTE: its
    gradient, as in every GRPO that uses it, is that of KL(pi_ref || pi).

    Args:
        logp: [M], with gradient.
        old_logp, ref_logp, advantages, weights: [M] each; ref_logp may be None where neither KL nor ratio
            needs it.
        owners: [M], for --ratio trajectory: the rollout of each position.

    Returns:
        The loss and a dict of [M] tensors for the log.
    """
    if owners is None:
        log_ratio = logp - old_logp  # [M]
    else:
        log_ratio = trajectory_log_ratio(logp, ref_logp, owners)  # [M]
    ratio = log_ratio.exp()  # [M] rho
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        d = ref_logp - logp
        kl = d.exp() - d - 1
    loss = (weights * (beta * kl - surrogate)).sum()
    # Tokens whose gradient is clipped away:
    clipped_low = (ratio < 1 - clip_eps) & (advantages < 0)
    clipped_high = (ratio > 1 + clip_eps) & (advantages > 0)
    return loss, {"kl": kl.detach(),
                  "clip_ratio/low_mean": clipped_low,
                  "clip_ratio/high_mean": clipped_high}


def trajectory_log_ratio(logp, ref_logp, owners):
    """Return log pi(tau_j) / pi_ref(tau_j) of the rollout j of each position (Algorithm 1), within +-20.

    A larger one would overflow in exp. NOTE: the bound does not stop the gradient: a failure that has become
    far more probable must still be made less so. A rollout lies in one pack, so its positions are all here.

    Returns:
        [M], the same value at all positions of a rollout.
    """
    _, index = owners.unique(return_inverse=True)  # [M] of the rollout, counted from 0 within the pack
    sums = torch.zeros_like(logp).index_add(0, index, logp - ref_logp)  # [M], one per rollout, then zeros
    bounded = sums + (sums.clamp(-20, 20) - sums).detach()  # [M]
    return bounded[index]


# ---- Groups ------------------------------------------------------------------------------------------------
@dataclass
class Group:
    """The rollouts of one task, each with its own reward token."""
    slot: int  # its position in the batch
    trajectories: list[Trajectory]

    @property
    def zero_std(self):
        return len({t.reward for t in self.trajectories}) == 1


def trajectories_of(groups: list[Group]) -> list[Trajectory]:
    trajectories = []
    for group in groups:
        trajectories += group.trajectories
    return trajectories


def sample_groups(policy, tasks, cursor, step, make_env, args, distributed):
    """Sample one batch of groups.

    All randomness is keyed by (seed, step, task id, repetition of the task in this step, rollout), so that
    any rollout can be reproduced alone. Slots are assigned to ranks in turn. With --dynamic_sampling zero-std
    slots are filled again from the next tasks, identically at every world size.

    Args:
        cursor: how many tasks of the endless shuffled order earlier steps took.

    Returns:
        This rank's groups, all groups that were sampled (refilled ones included), the next cursor.
    """
    kept = {}  # slot -> group
    sampled = []
    repetitions = Counter()  # of a task in this step
    slots = list(range(args.prompts_per_step))  # to fill
    for _ in range(args.dynamic_sampling + 1):
        mine = []  # slots of this rank, each with group_size environments, reward tokens and keys
        envs = []
        reward_tokens = []
        keys = []
        order = epoch_shuffle(len(tasks), cursor, len(slots), args.seed)
        for slot, i in zip(slots, order):
            key = (args.seed, step, tasks[i].id, repetitions[i])
            repetitions[i] += 1
            if slot % distributed.size != distributed.rank:
                continue
            mine.append(slot)
            rng = random.Random(repr(key))
            reward_tokens += sample_reward_tokens(args.reward_tokens, args.group_size, args.p_high, rng)
            for j in range(args.group_size):
                envs.append(make_env(tasks[i]))
                keys.append((*key, j))
        cursor += len(slots)
        progress = "rollouts" if distributed.is_main else None
        trajectories = rollout(policy, envs, reward_tokens, keys, progress=progress, **sampling(args))
        groups = []
        for n, slot in enumerate(mine):
            first = n * args.group_size
            groups.append(Group(slot, trajectories[first:first + args.group_size]))
        for group in groups:
            kept[group.slot] = group  # replaces a zero-std one
        everyone = sorted(distributed.gather(groups), key=lambda group: group.slot)
        sampled += everyone
        slots = [group.slot for group in everyone if group.zero_std]
        if not slots:
            break
    return list(kept.values()), sampled, cursor


def assign_advantages(packs: list[Pack], groups: list[Group], args):
    """Run step 3: give every loss position the advantage of its rollout and its weight in the loss.

    The weight is 1 / (rollouts in the batch * tokens of this rollout), whatever the packs and ranks are.
    """
    trajectories = trajectories_of(groups)  # [B]
    device = packs[0].ids.device
    shape = (len(groups), args.group_size)  # [S, G] of this rank, whose S may be 0
    rewards = torch.tensor([t.reward for t in trajectories], device=device)
    high = torch.tensor([t.reward_token == "high" for t in trajectories], device=device)
    advantages = group_advantages(rewards.view(shape), high.view(shape), args.advantage).flatten()  # [B]
    rollouts = args.prompts_per_step * args.group_size
    lengths = torch.tensor([sum(t.loss_mask) for t in trajectories], device=device)  # [B]
    weights = 1 / rollouts / lengths  # [B]; one without sampled tokens has no loss position
    for p in packs:
        p.advantage = advantages[p.owners]  # [M]
        p.weight = weights[p.owners]  # [M]


@torch.no_grad()
def compute_ref_logp(policy, packs: list[Pack], temperature):
    """Run step 4: fill in the log-probs of the reference, whose weights the policy has for now."""
    for p in packs:
        p.ref_logp = token_logprobs(policy.model, p, policy.banned, temperature)  # [M]


# ---- Metrics, and rollouts on disk -------------------------------------------------------------------------
REASONS = ("done", "malformed", "force_quit", "turn_tokens", "total_tokens", "context")


def group_metrics(groups: list[Group], p_high):
    """Return metrics over all sampled groups, including those that were sampled again."""
    trajectories = trajectories_of(groups)
    G = len(groups[0].trajectories)
    rewards = torch.tensor([t.reward for t in trajectories]).view(-1, G)  # [S, G]
    high = torch.tensor([int(t.reward_token == "high") for t in trajectories]).view(-1, G)  # [S, G]
    single_token = high.amax(1) == high.amin(1)  # [S]
    within, between = variance_parts(rewards, high)
    metrics = {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(1, correction=0).mean().item(),
        "frac_reward_zero_std": sum(group.zero_std for group in groups) / len(groups),
        "rollouts": len(trajectories),
        "num_tokens": sum(sum(t.loss_mask) for t in trajectories),  # sampled; in stage 1 prompts count too
        "rc/within_group_var": within + between,  # law of total variance
        "rc/var_within_tokens": within,
        "rc/var_between_tokens": between,
        "rc/frac_high": high.float().mean().item(),
        "rc/frac_single_token_groups": single_token.float().mean().item()}
    by_reward_token = mean_reward(trajectories, lambda t: t.reward_token or "none")
    for reward_token, reward in by_reward_token.items():
        metrics[f"rc/reward_{reward_token}"] = reward
    if {"high", "low"} <= by_reward_token.keys():
        gap = by_reward_token["high"] - by_reward_token["low"]
        metrics["rc/mode_gap"] = gap
        metrics["rc/var_bound"] = (G - 1) / G * p_high * (1 - p_high) * gap**2  # Prop. 4.3
    sums = Counter({f"rollout/{reason}_frac": 0 for reason in REASONS})
    for t in trajectories:
        sums["reward/state"] += float(t.verdict.get("state") or 0)
        sums["reward/action"] += float(t.verdict.get("action") or 0)
        sums["completions/mean_length"] += sum(t.loss_mask)
        sums["num_turns/mean"] += t.steps  # verl's name: these are messages, not BFCL's user turns
        sums["tool_call_counts/mean"] += t.calls
        sums[f"rollout/{t.reason}_frac"] += 1
    for name, total in sums.items():
        metrics[name] = total / len(trajectories)
    return metrics


def save_rollouts(out, step, groups: list[Group], tokenizer):
    """Save this step's rollouts, print the best and the worst, prune all but every 50th earlier step."""
    trajectories = trajectories_of(groups)
    lines = "".join(t.to_json() + "\n" for t in trajectories)
    sft_rctp.atomic_write(out / f"rollouts/step_{step:06d}.jsonl", lines)
    for path in (out / "rollouts").iterdir():
        name = re.fullmatch(r"step_(\d{6,})\.jsonl", path.name)  # other names are the user's
        if name and int(name[1]) < step and int(name[1]) % 50:
            path.unlink()
    ranked = sorted(trajectories, key=lambda t: t.reward)
    tqdm.write(f"--- best of step {step}\n{transcript(ranked[-1], tokenizer)}")
    tqdm.write(f"--- worst of step {step}\n{transcript(ranked[0], tokenizer)}")


# ---- Flags -------------------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None):
    parser = bfcl_env.Parser("Stage 2: RC-GRPO.")
    add = parser.add_argument
    add("--model",
        default="runs/sft_rctp/model",
        help="a stage 1 checkpoint: start and KL reference (default: %(default)s)")
    add("--steps",
        type=number(int, 1),
        default=400,
        help="batches of rollouts (default: %(default)s, the paper's epochs, tables 10 to 12)")
    add("--prompts_per_step",
        type=number(int, 1),
        default=52,
        help="tasks per step (default: %(default)s, with --group_size 5 the fewest that give 256 rollouts, "
             "the paper's batch as it is counted here; its GRPO baseline has 64: 13 tasks)")
    add("--group_size",
        type=number(int, 2),
        default=5,
        help="G, rollouts per task (default: %(default)s, as in the paper, tables 10 to 12)")
    add("--reward_tokens",
        choices=["mixed", "high", "low", "none"],
        default="mixed",
        help="mixed: each rollout draws high or low (RC-GRPO); high, low, none: the same for all rollouts, "
             "which is plain GRPO (default: %(default)s)")
    add("--p_high",
        type=number(float, 0, 1),
        default=0.5,
        help="P(high) of --reward_tokens mixed (default: %(default)s)")
    add("--beta",
        type=number(float, 0),
        default=0.1,
        help="weight of the KL penalty; 0: none (default: %(default)s, as in the paper, tables 10 to 12)")
    add("--clip_eps",
        type=number(float, 0, 1),
        default=0.2,
        help="clip range of the ratio (default: %(default)s, as in the paper, tables 10 to 12)")
    add("--ratio",
        choices=RATIOS,
        default="per_token",
        help="per_token: of each token, against the policy that sampled it (GRPO); trajectory: one per "
             "rollout, against the reference (the paper's Algorithm 1); its gradient is a sum over the "
             "rollout's tokens instead of a mean, so gradients are scaled down to norm 1 more often, and the "
             "KL, still a mean, weighs less (default: %(default)s)")
    add("--update_epochs",
        type=number(int, 1),
        default=1,
        help="updates per batch of rollouts (default: %(default)s)")
    add("--advantage",
        choices=ADVANTAGES,
        default="group",
        help="group: normalised over the group; within_reward_token: over its rollouts with the same reward "
             "token; mean_only: not divided by the std; sign: 2 R - 1; virtual_success: with one virtual "
             "rollout of reward 1 (default: %(default)s)")
    add("--dynamic_sampling",
        type=number(int, 0),
        default=0,
        metavar="K",
        help="sample zero-std groups again from the next tasks, at most K times (DAPO, arXiv 2503.14476; "
             "default: %(default)s)")
    sft_rctp.add_training_flags(parser, "runs/rl_rcgrpo", lr=1e-6)
    add_sampling_flags(parser)
    bfcl_env.add_env_flags(parser)
    return parser.parse_args(argv)


def describe(args):
    """Return the flags of a run for its first line."""
    return (f"{args.model} | docs {args.tool_docs} | reward tokens {args.reward_tokens}, "
            f"advantage {args.advantage}, ratio {args.ratio}, reward {args.reward}, beta {args.beta}, "
            f"lr {args.lr} | "
            f"{args.steps} steps of {args.prompts_per_step} tasks x {args.group_size} rollouts")


def check_flags(args):
    """Refuse flags that contradict each other or the stage 1 checkpoint.

    Raises:
        BfclError: with the flag to change.
    """
    stage_info = read_stage_info(args.model)
    if not stage_info.stage:
        raise BfclError(f"no stage 1 checkpoint at {args.model}: run `torchrun sft_rctp.py` first, or give "
                        "the model/ folder of a stage 1 run with --model")
    check_model(args.model)
    if args.temperature == 0:
        raise BfclError("--temperature 0 is greedy: all rollouts of a group would be alike; give one above 0")
    if args.advantage == "sign" and args.reward == "progress":
        raise BfclError("--advantage sign is for rewards 0 and 1: give another one than --reward progress")
    needed = {"high", "low"} if args.reward_tokens == "mixed" else {args.reward_tokens}
    missing = needed - set(stage_info.stage1_reward_tokens)
    if "none" in missing:
        raise BfclError("stage 1 saw no prompt without a reward token: train it with --reward_token_dropout "
                        "above 0, or give another --reward_tokens")
    if missing:
        warn(f"stage 1 (--arm {stage_info.arm}) was not trained with the reward tokens {sorted(missing)}")
    for name in ("tool_docs", "protocol", "call_format"):
        trained = getattr(stage_info, name)
        given = getattr(args, name)
        if given not in (trained, "auto"):
            raise BfclError(f"stage 1 was trained with --{name} {trained}, this run has {given}: give "
                            f"--{name} {trained}")
    tasks = {task.id for task in bfcl_env.select_tasks(args)}
    new = tasks - set(stage_info.tasks)
    if new:
        warn(f"stage 1 had no data of {len(new)} of this run's {len(tasks)} tasks: its --split_by, --split, "
             "--categories, --tasks or --max_tasks differ, or they were too long or never failed")
    validation_tasks(args, tasks | set(stage_info.tasks))  # raises if one of them was trained on


if __name__ == "__main__":
    run_main(main)
