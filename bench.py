"""The measured claims of the README, one sub-command each; the last line is one JSON object.

    python bench.py env        # milliseconds a verdict, against the official checker
"""
import argparse
import contextlib
import io
import json
import random
import statistics
import time

import bfcl_env


def mutated(task, seed: int) -> list[list[list[str]]]:
    """The gold calls, one a step, with one or two calls dropped, repeated, swapped or moved to another turn."""
    rng, turns = random.Random(f"{task.id} {seed}"), [list(calls) for calls in task.gold]
    for _ in range(rng.randint(1, 2)):
        calls = rng.choice([calls for calls in turns if calls])
        call = calls.pop(rng.randrange(len(calls)))
        other = rng.choice(turns)
        other[:0] = rng.choice([[], [call], [call, call]])
        if not any(turns):
            turns[0].append(call)
    return [[[call] for call in calls] for calls in turns]


def bench_env() -> dict:
    """Milliseconds a verdict, ours and the official checker's, alternately in one process: 800 tasks x 8 trajectories.

    The official checker starts from fresh instances each time, as each evaluation does. `live_ms_per_verdict` is what
    judging adds to a live rollout: the ends of its turns and the verdict. All gold sides are executed beforehand.
    """
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker as checker
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils as executor

    tasks, ours, official, live, agree = bfcl_env.load_tasks(), [], [], [], []
    for task in tasks:
        task.replay
    for seed in range(8):
        for task in tasks:
            turns = mutated(task, seed)
            start = time.perf_counter()
            verdict = bfcl_env.judge(task, turns)
            ours.append(time.perf_counter() - start)
            for name in [name for name in vars(executor) if name.endswith("_instance")]:
                delattr(executor, name)
            entry = {"id": task.id, "initial_config": task.config, "involved_classes": task.classes}
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                out = checker.multi_turn_checker(turns, task.gold, entry, task.category, "bench")
            official.append(time.perf_counter() - start)
            agree.append((out["valid"], out.get("error_type")) == (verdict.valid, verdict.error_type))
            episode, spent = bfcl_env.Episode(task), 0.0
            for turn in turns:
                for step in turn:
                    episode.execute(step)
                start = time.perf_counter()
                episode.end_turn()
                spent += time.perf_counter() - start
            start = time.perf_counter()
            episode.verdict()
            live.append(spent + time.perf_counter() - start)
    ms = {name: 1000 * statistics.mean(times) for name, times in
          [("ms_per_verdict", ours), ("official_ms_per_verdict", official), ("live_ms_per_verdict", live)]}
    result = {**{name: round(value, 4) for name, value in ms.items()}, "verdicts": len(ours), "agree": sum(agree),
              "speedup": round(ms["official_ms_per_verdict"] / ms["ms_per_verdict"], 2)}
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure a claim of the README.")
    parser.add_argument("what", choices=["env"])
    parser.parse_args()
    print(json.dumps(bench_env()))
