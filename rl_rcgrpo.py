"""Stage 2: Reward-Conditioned Group Relative Policy Optimization (RC-GRPO, arXiv 2602.03025).

    torchrun rl_rcgrpo.py                                 # continues from the default stage 1 run
    torchrun --nproc_per_node 8 rl_rcgrpo.py --model runs/sft_rctp/model --reward_tokens high      # plain GRPO

GRPO learns nothing from a group whose rollouts all get the same reward. After stage 1 the token in the prompt
decides between success and failure, so a group whose rollouts draw their own tokens differs by construction.

One update:

    1. take --prompts_per_step tasks; for each draw G reward tokens, r_j ~ P(r)
    2. roll out: G conversations a task, each under its own token
    3. reward each; advantages over the whole group, both tokens mixed: A_j = (R_j - mean) / (std + eps)
    4. log-probs of the reference (the stage 1 checkpoint) under the same tokens
    5. minimise -E[ 1/G sum_j min(rho_j A_j, clip(rho_j, 1 - eps, 1 + eps) A_j) - beta KL(pi || pi_ref) ]

What the paper leaves open is decided so: the ratio rho is per token; a loss is averaged over a rollout's
tokens, then over rollouts; a batch is counted in rollouts and makes one update, so that rho is 1 and the clip
does not act (it does from --update_epochs 2 on).

--advantage and --dynamic_sampling are other remedies for groups without variance, to be compared under equal
conditions. Axes: S tasks, G rollouts of a group, B rollouts, M loss positions of a pack.
"""
import math
import random
from collections import Counter
from dataclasses import dataclass, replace

import bfcl_env

if __name__ == "__main__":
    bfcl_env.fix_hash_seed()

import torch
import torch.distributed as dist
from tqdm import tqdm

import rollout as sampler
import sft_rctp
from bfcl_env import BfclError
from rollout import (Pack, Trajectory, check_model, checksum, compute_dtype, load_policy, mean_reward, number,
                     pack, read_stage_info, rollout, run_main, token_logprobs, transcript)
from sft_rctp import (TrainLoop, begin_run, synced_time, load_full_weights, check_same_run, offload_shards, shard_model, get_lr,
                      free_weights, epoch_shuffle, init_distributed, optimizer_step, validate, validation_tasks,
                      pad_packs)

# Two transcriptions of the paper's hyper-parameters. 256 rollouts a step; the second names no number and
# takes the first's. (The first's plain GRPO has 64: --prompts_per_step 13.)
PRESETS = {"appendix": dict(lr=1e-6, beta=0.1, group_size=5, prompts_per_step=52),
           "notes": dict(lr=1e-5, beta=0.05, group_size=4, prompts_per_step=64)}
ADVANTAGES = ("group", "within_reward_token", "mean_only", "sign", "virtual_success")
REASONS = ("done", "malformed", "force_quit", "turn_tokens", "total_tokens", "context")


# ---- The maths: pure functions -----------------------------------------------------------------------------
def sample_reward_tokens(kind, group, p_high, rng) -> list[str | None]:
    """Reward tokens of a group: each rollout draws its own, P(high) = p_high; or all high, all low, none."""
    if kind == "mixed":
        return ["high" if rng.random() < p_high else "low" for _ in range(group)]
    return [None if kind == "none" else kind] * group


def group_advantages(rewards: torch.Tensor, tokens: torch.Tensor | None = None, kind="group",
                     eps=1e-6) -> torch.Tensor:
    """Advantages of the rollouts of each group: rewards [S, G] -> [S, G]. Equal rewards give exactly 0.

    group    A_j = (R_j - mean) / (std + eps) over the whole group, both tokens mixed; population std
    within_reward_token
             the same over the rollouts that share a token (tokens [S, G]); a lone one gets 0
    mean_only
             no division (Dr. GRPO, arXiv 2503.20783, without its length term)
    sign     2 R - 1, no baseline, binary rewards (arXiv 2605.07689)
    virtual_success
             one imagined rollout of reward 1 counts in mean and std, so that a group of failures learns too
             (NGRPO, arXiv 2509.18851, without its asymmetric clipping)

    Errors: BfclError for `sign` with a reward that is neither 0 nor 1.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.]]), eps=0)
    tensor([[ 1., -1., -1.,  1.],
            [ 0.,  0.,  0.,  0.]])
    """
    if kind == "within_reward_token":  # those that share a token are a group of their own
        out = torch.zeros_like(rewards)
        for s in range(len(rewards)):
            for token in tokens[s].unique():
                mine = tokens[s] == token  # [G] bool
                out[s, mine] = group_advantages(rewards[s, mine][None], eps=eps)[0]
        return out
    if kind == "sign":
        if not ((rewards == 0) | (rewards == 1)).all():
            raise BfclError("--advantage sign is for rewards 0 and 1: give another one, or --reward")
        return 2 * rewards - 1
    counted = rewards
    if kind == "virtual_success":
        counted = torch.cat([rewards, torch.ones_like(rewards[:, :1])], 1)  # [S, G + 1]
    mean = counted.mean(1, keepdim=True)  # [S, 1]
    std = counted.std(1, correction=0, keepdim=True)  # [S, 1]
    advantages = (rewards - mean) / (std + eps)  # [S, G]
    if kind == "mean_only":
        advantages = rewards - mean
    # Exactly, whatever rounding does to the mean: divided by a std of about 0 it would be blown up.
    zero_std = (counted == counted[:, :1]).all(1, keepdim=True)  # [S, 1]
    return advantages.masked_fill(zero_std, 0.0)


def policy_loss(logp, old_logp, ref_logp, advantages, weights, clip_eps=0.2, beta=0.1):
    """The clipped loss with its KL penalty: the sum over all positions of weight * (beta KL - gain).

    logp (with gradient), old_logp, ref_logp (or None with beta 0), advantages, weights: [M] each. Returns the
    loss and a dict of [M] tensors for the log. KL is the k3 estimator exp(d) - d - 1, d = ref_logp - logp:
    never negative, 0 where both agree (Schulman 2020, http://joschu.net/blog/kl-approx.html)."""
    ratio = (logp - old_logp).exp()  # rho
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(logp)
    if beta:
        d = ref_logp - logp
        kl = d.exp() - d - 1
    loss = (weights * (beta * kl - gain)).sum()
    # Where the clip takes the gradient away:
    low = (ratio < 1 - clip_eps) & (advantages < 0)
    high = (ratio > 1 + clip_eps) & (advantages > 0)
    return loss, {"kl": kl.detach(), "clip_ratio/low_mean": low, "clip_ratio/high_mean": high}


def variance_parts(rewards: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float]:
    """Mean within-group variance of rewards [S, G], split by the law of total variance into its part WITHIN
    tokens [S, G] (1: high) and its part BETWEEN them.

    The second is what Prop. 4.3 bounds, and what drawing tokens adds. By itself it teaches the high mode
    nothing: for a fixed token, a baseline that does not depend on the action adds nothing to the expected
    gradient."""
    means = torch.zeros_like(rewards)  # [S, G] of the rollouts with the same token
    for token in (0, 1):
        mine = tokens == token  # [S, G]
        count = mine.sum(1, keepdim=True).clamp(min=1)  # [S, 1]
        mean = (rewards * mine).sum(1, keepdim=True) / count  # [S, 1]
        means = torch.where(mine, mean, means)
    within = (rewards - means).square().mean()
    between = means.var(1, correction=0).mean()
    return within.item(), between.item()


# ---- Flags -------------------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None):
    parser = bfcl_env.Parser("Stage 2: RC-GRPO.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="notes",
        help="lr, beta, group and prompts of the paper's appendix or of notes on it (default: %(default)s)")
    add("--model", default="runs/sft_rctp/model",
        help="a stage 1 checkpoint: start and KL reference (default: %(default)s)")
    add("--steps", type=number(int, 1), default=400, help="batches (default: %(default)s)")
    add("--prompts_per_step", type=number(int, 1), help="tasks a step (default: %(default)s)")
    add("--group_size", type=number(int, 2), help="G, rollouts a task (default: %(default)s)")
    add("--reward_tokens", choices=["mixed", "high", "low", "none"], default="mixed",
        help="what the rollouts carry; high or none is plain GRPO (default: %(default)s)")
    add("--p_high", type=number(float, 0, 1), default=0.5,
        help="P(r = high) of `mixed` (default: %(default)s)")
    add("--beta", type=number(float, 0), help="weight of the KL; 0: no reference (default: %(default)s)")
    add("--clip_eps", type=number(float, 0, 1), default=0.2, help="of the ratio (default: %(default)s)")
    add("--update_epochs", type=number(int, 1), default=1, help="updates a batch (default: %(default)s)")
    add("--advantage", choices=ADVANTAGES, default="group",
        help="normalised over the group, or over its rollouts with the same token; not divided by the std; "
        "2 R - 1; with an imagined success (default: %(default)s)")
    add("--dynamic_sampling", type=number(int, 0), default=0, metavar="K",
        help="groups of equal rewards are drawn again with the next tasks, at most so many times (DAPO's "
        "dynamic sampling, arXiv 2503.14476; default: %(default)s)")
    sft_rctp.add_training_flags(parser, "runs/rl_rcgrpo")
    sampler.add_sampling_flags(parser)
    bfcl_env.add_env_flags(parser)
    parser.set_defaults(**PRESETS["notes"])  # for --help
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS[preset])
    return parser.parse_args(argv)


def check_flags(args):
    """Errors: BfclError for flags that do not fit each other, or what --model holds."""
    stage_info = read_stage_info(args.model)
    if not stage_info.stage:
        raise BfclError(f"no stage 1 checkpoint at {args.model}: run `torchrun sft_rctp.py` first, or give "
                        "the model/ folder of a stage 1 run with --model")
    check_model(args.model)
    if args.max_len > args.tokens_per_microbatch:
        raise BfclError(f"--max_len {args.max_len} is more than --tokens_per_microbatch "
                        f"{args.tokens_per_microbatch}: a rollout could not be trained on; give "
                        f"--max_len {args.tokens_per_microbatch}")
    if args.temperature == 0:
        raise BfclError("--temperature 0 is greedy: all rollouts of a group would be alike; give one above 0")
    if args.advantage == "sign" and args.reward == "progress":
        raise BfclError("--advantage sign is for rewards 0 and 1: give another one than --reward progress")
    wanted = {"high", "low"} if args.reward_tokens == "mixed" else {args.reward_tokens}
    if missing := wanted - set(stage_info.stage1_reward_tokens):
        if args.reward_tokens == "none":
            raise BfclError("stage 1 saw no prompt without a token: train it with --reward_token_dropout above 0, or "
                            "give another --reward_tokens")
        print(f"warning: stage 1 (--arm {stage_info.arm}) never saw the prompts of {sorted(missing)}")
    for name in ("tool_docs", "protocol", "call_format"):
        trained = getattr(stage_info, name)
        given = getattr(args, name)
        if given not in (trained, "auto"):
            raise BfclError(f"stage 1 was trained with --{name} {trained}, this run has {given}: give "
                            f"--{name} {trained}")
    validation_tasks(args, {*stage_info.tasks, *(task.id for task in bfcl_env.select_tasks(args))})


# ---- Steps 1 and 2: groups ---------------------------------------------------------------------------------
@dataclass
class Group:
    """The rollouts of one task, under tokens of their own."""
    slot: int  # its place in the batch
    trajectories: list[Trajectory]

    @property
    def zero_std(self):
        return len({t.reward for t in self.trajectories}) == 1


def sample_groups(policy, tasks, cursor, step, make_env, args, distributed):
    """One batch of groups. Returns (this rank's groups, all groups that were drawn, the next cursor).

    cursor: how many tasks of the endless shuffled order earlier steps took. Every draw follows from (seed,
    step, task id, how often it came before in this step, rollout), so that one rollout can be made alone. A
    slot of the batch stays with its rank; with --dynamic_sampling the flat ones take the next tasks of the order, the
    same at every world size."""
    kept, drawn = {}, []  # slot -> group; all groups
    seen = Counter()  # how often a task came in this step
    slots = list(range(args.prompts_per_step))  # that still need a group
    for _ in range(args.dynamic_sampling + 1):
        mine, envs, tokens, keys = [], [], [], []
        for slot, i in zip(slots, epoch_shuffle(len(tasks), cursor, len(slots), args.seed)):
            key = (args.seed, step, tasks[i].id, seen[i])
            seen[i] += 1
            if slot % distributed.size == distributed.rank:
                mine.append(slot)
                envs += [make_env(tasks[i]) for _ in range(args.group_size)]
                rng = random.Random(repr(key))
                tokens += sample_reward_tokens(args.reward_tokens, args.group_size, args.p_high, rng)
                keys += [(*key, j) for j in range(args.group_size)]
        cursor += len(slots)
        trajectories = rollout(policy, envs, tokens, keys, progress="rollouts" if distributed.is_main else None,
                               **sampler.sampling(args))
        groups = [Group(slot, trajectories[n * args.group_size:(n + 1) * args.group_size])
                  for n, slot in enumerate(mine)]
        kept.update({group.slot: group for group in groups})  # in place of flat ones
        everyone = sorted(distributed.gather(groups), key=lambda group: group.slot)
        drawn += everyone
        slots = [group.slot for group in everyone if group.zero_std]
        if not slots:
            break
    return list(kept.values()), drawn, cursor


def group_metrics(groups: list[Group], p_high):
    """What shows whether the tokens do their work, over all groups that were drawn."""
    trajectories = [t for group in groups for t in group.trajectories]
    G = len(groups[0].trajectories)
    rewards = torch.tensor([t.reward for t in trajectories]).view(-1, G)  # [S, G]
    tokens = torch.tensor([int(t.reward_token == "high") for t in trajectories]).view(-1, G)  # [S, G]
    within, between = variance_parts(rewards, tokens)
    out = {"reward": rewards.mean().item(),
           "reward_std": rewards.std(1, correction=0).mean().item(),
           "frac_reward_zero_std": sum(group.zero_std for group in groups) / len(groups),  # dead groups
           "rollouts": len(trajectories),
           "num_tokens": sum(sum(t.loss_mask) for t in trajectories),
           "rc/within_group_var": within + between,  # law of total variance
           "rc/var_within_tokens": within,
           "rc/var_between_tokens": between,
           "rc/frac_high": tokens.float().mean().item(),
           "rc/frac_single_token_groups": (tokens.amax(1) == tokens.amin(1)).float().mean().item()}
    by_token = mean_reward(trajectories, lambda t: t.reward_token or "none")
    for token, reward in by_token.items():
        out[f"rc/reward_{token}"] = reward
    if {"high", "low"} <= by_token.keys():
        gap = out["rc/mode_gap"] = by_token["high"] - by_token["low"]
        out["rc/var_bound"] = (G - 1) / G * p_high * (1 - p_high) * gap**2  # Prop. 4.3
    sums = Counter({f"rollout/{reason}_frac": 0 for reason in REASONS})
    for t in trajectories:
        sums.update({"reward/state": float(t.verdict.get("state") or 0),
                     "reward/action": float(t.verdict.get("action") or 0),
                     "completions/mean_length": sum(t.loss_mask),
                     "num_turns/mean": t.steps,
                     "tool_call_counts/mean": t.calls,
                     f"rollout/{t.reason}_frac": 1})
    return out | {name: total / len(trajectories) for name, total in sums.items()}


def save_rollouts(out, step, groups: list[Group], tokenizer):
    """The step's rollouts go to disk, best and worst are shown; of earlier steps every 50th stays."""
    trajectories = [t for group in groups for t in group.trajectories]
    sft_rctp.atomic_write(out / f"rollouts/step_{step:06d}.jsonl", "".join(t.to_json() + "\n" for t in trajectories))
    for path in (out / "rollouts").glob("step_*.jsonl"):
        earlier = int(path.stem.split("_")[1])
        if earlier < step and earlier % 50:
            path.unlink()
    ranked = sorted(trajectories, key=lambda t: t.reward)
    for title, t in (("best", ranked[-1]), ("worst", ranked[0])):
        tqdm.write(f"--- {title} of step {step}\n{transcript(t, tokenizer)}")


# ---- The five steps ----------------------------------------------------------------------------------------
def assign_advantages(packs: list[Pack], groups: list[Group], args):
    """Step 3: give every loss position the advantage of its rollout, and its weight in the mean over a
    rollout's tokens and then over the rollouts of all ranks."""
    trajectories = [t for group in groups for t in group.trajectories]  # [B]
    device = packs[0].ids.device
    shape = (len(groups), args.group_size)  # [S, G] of this rank, whose S may be 0
    rewards = torch.tensor([t.reward for t in trajectories], device=device).view(shape)
    tokens = torch.tensor([t.reward_token == "high" for t in trajectories], device=device).view(shape)
    advantages = group_advantages(rewards, tokens, args.advantage).flatten()  # [B]
    rollouts = args.prompts_per_step * args.group_size
    lengths = torch.tensor([sum(t.loss_mask) for t in trajectories], device=device)  # [B]
    weights = 1 / rollouts / lengths.clamp(min=1)  # [B]
    for p in packs:
        p.advantage = advantages[p.owners]  # [M]
        p.weight = weights[p.owners]  # [M]


def update_policy(model, optimizer, packs: list[Pack], banned, args, distributed):
    """Step 5: --update_epochs updates. Returns what the last one did, as means over all ranks' tokens."""
    for epoch in range(args.update_epochs):
        sums, largest = Counter(), [0.0]

        def loss_of(p):
            logp, entropy = model.token_logprobs(p, banned, args.temperature, entropy=True)  # [M] each
            if epoch == 0:  # before any update: the weights that sampled
                p.old_logp = logp.detach()
            loss, parts = policy_loss(logp, p.old_logp, p.ref_logp, p.advantage, p.weight, args.clip_eps,
                                      args.beta)
            gap = (p.old_logp - p.sampled_logp).abs()  # [M] between trainer and sampler
            largest.append(gap.max().item() if len(gap) else 0.0)
            parts |= {"tokens": torch.ones_like(logp), "entropy": entropy,
                      "sampling/sampling_logp_difference/mean": gap}
            sums.update({name: values.sum().item() for name, values in parts.items()})
            return loss
        norm, loss = optimizer_step(model, optimizer, packs, loss_of, distributed)
        if math.isnan(norm):  # the step was skipped
            break
    tokens = max(1, distributed.all_reduce(sums["tokens"]))
    means = {name: distributed.all_reduce(sums[name]) / tokens for name in sorted(sums) if name != "tokens"}
    return {"loss": loss, "grad_norm": norm, **means,
            "sampling/sampling_logp_difference/max": distributed.all_reduce(max(largest), dist.ReduceOp.MAX)}


def main():
    args = parse_args()
    check_flags(args)
    distributed = init_distributed()
    out, dtype = begin_run(args, distributed), compute_dtype(args.dtype, distributed.device)

    # The acting policy is one whole copy in the compute dtype; the learning one is sharded, its masters fp32.
    # The same memory holds, in turn, the acting weights and the reference's, and is given back before the
    # backward pass.
    policy = load_policy(args.model, dtype, distributed.device, weights=False, thinking=args.thinking)
    make_env = bfcl_env.make_env_fn(args, policy.call_format(args.call_format))
    chosen, val_tasks = bfcl_env.select_tasks(args), validation_tasks(args)
    tasks = sampler.filter_overlong(policy, chosen, make_env, args.max_len)
    val_tasks = sampler.filter_overlong(policy, val_tasks, make_env, args.max_len)
    learning = load_policy(args.model, torch.float32, "cpu", weights=distributed.is_main, thinking=args.thinking)
    weights = distributed.broadcast(distributed.is_main and checksum(learning.model))
    check_same_run(out, distributed, {"reference": weights, "compute": str(dtype)})
    model, optimizer = shard_model(learning, args, dtype, distributed)
    reference = offload_shards(model, dtype) if args.beta else {}
    run = TrainLoop(out, args, model, optimizer, args.steps, distributed)
    cursor = run.state.setdefault("cursor", 0)  # tasks that were drawn so far
    load_full_weights(policy.model, model)
    distributed.print0(f"stage 2: {args.model} | docs {args.tool_docs}, call format {policy.call_format(args.call_format)} "
              f"({policy.chat.why}) | all that fit: {len(tasks)} of {len(chosen)} tasks | "
              f"{args.steps} steps of {args.prompts_per_step} tasks x {args.group_size} rollouts, from {run.done + 1} | "
              f"tokens {args.reward_tokens}, advantage {args.advantage}, reward {args.reward}, "
              f"beta {args.beta}, lr {args.lr} | {dtype} on {distributed.size} x {distributed.device.type} | {out}")

    for step in run.steps():
        began = synced_time(distributed.device)

        # steps 1 and 2: tasks, tokens and rollouts, from the whole copy; each rank makes its share
        groups, drawn, cursor = sample_groups(policy, tasks, cursor, step, make_env, args, distributed)
        run.state["cursor"] = cursor
        rolled = synced_time(distributed.device)

        # step 3: rewards and advantages
        batch = [t for group in groups for t in group.trajectories]
        packs = pad_packs(pack(batch, args.tokens_per_microbatch, distributed.device), distributed)
        assign_advantages(packs, groups, args)

        # step 4: the reference takes the place of the acting weights for its log-probs
        if args.beta:
            load_full_weights(policy.model, model, reference)
            for p in packs:
                with torch.no_grad():
                    p.ref_logp = token_logprobs(policy.model, p, policy.banned, args.temperature)  # [M]
        free_weights(policy.model)
        compared = synced_time(distributed.device)

        # step 5: loss and update
        lr = get_lr(step, args.lr, args.steps)
        optimizer.param_groups[0]["lr"] = lr
        metrics = update_policy(model, optimizer, packs, policy.banned, args, distributed)
        load_full_weights(policy.model, model)
        seconds = synced_time(distributed.device) - began

        metrics |= group_metrics(drawn, args.p_high)
        metrics |= {"timing_s/rollout": rolled - began,
                    "timing_s/reference": compared - rolled,
                    "timing_s/update": began + seconds - compared,
                    "step_time": seconds,
                    "perf/throughput": metrics["num_tokens"] / seconds,
                    "learning_rate": lr}
        if distributed.is_main:
            save_rollouts(out, step, drawn, policy.tokenizer)
        if val_tasks and (step % args.eval_every == 0 or step == args.steps):
            token = None if args.reward_tokens == "none" else "high"
            metrics |= validate(policy, val_tasks, [token], make_env, args, distributed)
        run.log(step, metrics)

    trained_on = {*policy.stage_info.tasks, *(task.id for task in tasks)}
    run.end(learning, replace(
        policy.stage_info, stage="rcgrpo", reward_tokens=args.reward_tokens,
        advantage=args.advantage, dynamic_sampling=args.dynamic_sampling, rollouts=cursor * args.group_size,
        tasks=sorted(trained_on)), hint="python eval_bfcl.py --ckpt")


if __name__ == "__main__":
    run_main(main)
