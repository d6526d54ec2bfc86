"""The environment: the BFCL v4 multi-turn benchmark with the official verdicts, safe and fast.

  1. `load_tasks` reads the 800 tasks (4 categories x 200 ids) from the installed package bfcl-eval.
  2. `BfclEnv(task).messages()` opens a conversation with the tool docs and the first user text.
  3. `env.step(text)` executes the tool calls in the model's message; a message without calls ends the turn.
  4. `env.verdict()` returns the official checker's verdict, plus the paper's reward components.

Questions, answers, docs and the simulated API classes come from bfcl-eval==2026.3.23 (Apache-2.0); none of
the package's text or code is copied here. The official executor evaluates the model's text with `eval` and
keeps instances in module globals. Here the text is parsed with ast and json, only literals are read, and
every episode has its own instances. For calls with literal arguments, results and verdicts match the official
ones. The differences are deliberate:
  - Nested calls, builtins, attributes and other expressions are not evaluated: such a call returns an error
    string.
  - While decoding, only + - * / on number literals are computed; the official decoder evaluates any operator.
  - LIMITS bounds the work per step: a call over a bound returns an error string. There are no timers, so
    verdicts do not depend on the load of the machine.
  - `find` and `du` on a cyclic directory tree return a different error text than Python's recursion error.
  - State that official instances share (default lists of post_tweet; cards, bookings and weather of
    long_context; precision of mpmath and decimal) is isolated per episode: verdicts equal those of official
    instances in a fresh process.

Sections, in this order. Read the first three; the rest serves them.
  A conversation                    BfclEnv, PaperEnv
  Execution and judging             Episode, judge, Verdict
  Tasks                             Task, load_tasks
  Splits                            families, split
  Tool docs in three sizes          signature
  Calls from text                   Call, parse_calls, write_calls, CallFormat
  The official decoders' oddities   one decoder and one writer per call format
  Work limits                       LIMITS
  Flags                             add_env_flags, make_env_fn, select_tasks, start_process
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import decimal
import functools
import importlib.metadata
import importlib.util
import inspect
import json
import locale
import operator
import os
import pickle
import random
import re
import signal
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


class BfclError(Exception):
    """A user error. The message says what is wrong and what to type instead."""


class CallSyntaxError(Exception):
    """Text that does not parse as tool calls. In a conversation it ends the turn."""


def warn(text):
    """Print a warning, on the first rank alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {text}", file=sys.stderr)


def _choose(kind, given, allowed):
    """Return `given`, one of the allowed names. Raises: BfclError for any other name."""
    if given not in allowed:
        raise BfclError(f"unknown {kind} {given!r}; choose one of: {', '.join(allowed)}")
    return given


# ---- A conversation ----------------------------------------------------------------------------------------
# Maximum of executed steps per turn. The official MAXIMUM_STEP_LIMIT is 20, but it is compared after
# counting, so that 21 steps are executed.
MAX_STEPS = 21


@dataclass
class StepResult:
    """The environment's answer to one message of the model."""

    results: list[str]  # one per call
    next_user: str | None  # the next user message, if the turn has ended and another follows
    done: bool
    reason: str | None  # if done: "done" or "force_quit"
    calls: tuple = ()  # the calls as executed


class BfclEnv:
    """A conversation about one task, turn by turn, as on the leaderboard.

    A message without calls ends the turn. MAX_STEPS executed steps in one turn end the conversation. Withheld
    functions are revealed by the user message of their turn.
    """

    def __init__(self, task: Task, tool_docs="signature", call_format="python"):
        self.id = task.id
        self.task = task
        self.tool_docs = _choose("tool docs", tool_docs, TOOL_DOCS)
        self.call_format = _choose("call format", call_format, CALL_FORMATS)
        self.episode = Episode(task)
        self.turns = [[]]  # [turn][step][call string]; judge(task, env.turns) == env.verdict()
        self.done = False

    def messages(self) -> list[dict]:
        """Return the messages that open the conversation.

        Returns:
            A system and a user message. In a native call format: one user message with the key "tools", which
            the chat template renders.
        """
        docs = self._visible_docs()
        user = {"role": "user", "content": self._first_user_text()}
        if CALL_FORMATS[self.call_format].native:
            user["tools"] = [_tool(doc, self.tool_docs) for doc in docs]
            return [user]
        system = {"role": "system", "content": _system_text(docs, self.tool_docs)}
        return [system, user]

    def step(self, text) -> StepResult:
        """Execute the calls in a message of the model; a message without calls ends the turn.

        Raises:
            BfclError: the conversation is already over.
        """
        if self.done:
            raise BfclError("this conversation is over; make a new BfclEnv")
        calls, ends_turn = self._read_calls(text)
        results = []
        if calls:
            results = self.episode.execute(calls)
            self.turns[-1].append(calls)

        next_user = None
        reason = None
        if ends_turn:
            next_user = self._next_user_text()
            if next_user is None:
                reason = "done"
        elif len(self.turns[-1]) == MAX_STEPS:
            reason = "force_quit"

        self.done = reason is not None
        if ends_turn or self.done:
            self.episode.end_turn()
            if not self.done:
                self.turns.append([])
        return StepResult(results, next_user, self.done, reason, calls)

    def verdict(self) -> Verdict:
        """Return the verdict so far. An unfinished turn is judged as recorded."""
        return self.episode.verdict(open_turn=not self.done)

    def _visible_docs(self):
        """Return the docs of the functions that the opening messages show."""
        withheld = sum(self.task.withheld.values(), [])
        return [doc for doc in self.task.docs if doc["name"] not in withheld]

    def _first_user_text(self):
        return self.task.turns[0]

    def _read_calls(self, text):
        """Return the call strings of a message, and whether it ends the turn."""
        try:
            calls = parse_calls(without_thoughts(text, self.call_format), self.call_format)
        except CallSyntaxError:
            calls = []
        return [str(call) for call in calls], not calls

    def _next_user_text(self):
        """Return the user text of the next turn; None after the last.

        Withheld functions are revealed with the wording of the official prompting and Qwen FC handlers.
        """
        turn = len(self.turns)
        if turn >= len(self.task.turns):
            return None
        if turn not in self.task.withheld:
            return self.task.turns[turn]

        by_name = {doc["name"]: doc for doc in self.task.docs}
        docs = [by_name[name] for name in self.task.withheld[turn]]
        if self.tool_docs == "full":
            listing = str([_tool(doc, "full", hint=False) for doc in docs])
        else:
            listing = _list_tools(docs, self.tool_docs, self.call_format)
        template = _constants("default_prompts").DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING
        return template.format(functions=listing)


class PaperEnv(BfclEnv):
    """The paper's protocol (arXiv 2602.03025): all user turns in one message, ended by a call of done().

    The paper leaves some points open. Our assumptions:
      - All functions are available from the start; a turn that only reveals withheld functions is skipped.
      - Vague turns stay, followed by their clarification.
      - Calls after done() are not executed.
      - A message without calls ends the conversation, as do MAX_STEPS executed steps.
      - The verdict has the paper's reward only.
    """

    # The paper's own words (B.1).
    ENDING = ("\n\nComplete all the steps above using the available tools. "
              "Call done() when you have finished all tasks.")

    def _visible_docs(self):
        return [*self.task.docs, _DONE_DOC]

    def _first_user_text(self):
        texts = [text for text in self.task.turns if text is not None]
        steps = [f"Step {number}: {text}" for number, text in enumerate(texts, 1)]
        return "\n".join(steps) + self.ENDING

    def _read_calls(self, text):
        calls, ends_turn = super()._read_calls(text)
        if "done()" in calls:
            return calls[: calls.index("done()")], True
        return calls, ends_turn

    def _next_user_text(self):
        return None

    def verdict(self) -> Verdict:
        """Return the verdict so far, without the official fields."""
        verdict = super().verdict()
        return dataclasses.replace(verdict, valid=None, error_type=None, turn=None, progress=None)


PROTOCOLS = {"official": BfclEnv, "paper": PaperEnv}


# ---- Execution and judging ---------------------------------------------------------------------------------
ERROR = "Error during execution: "
REWARDS = ("official", "paper", "progress")
# A name that a parenthesis follows.
_CALLEE = re.compile(r"\b([a-zA-Z_]\w*)\s*(?=\()")
# The official executor refuses calls of these names.
_DENIED = ("kill", "exit", "quit", "remove", "unlink", "popen", "Popen", "run")
# These methods change objects outside their instance; see `_isolated`.
_SHARING_METHODS = ("post_tweet", "get_outside_temperature_from_google")


class Episode:
    """The state of one rollout of a task: its API instances, and how the turns so far were judged."""

    def __init__(self, task: Task):
        self.task = task
        self.instances = pickle.loads(task.initial_state)  # class name -> instance
        self.isolated_methods = {}
        for name in _SHARING_METHODS:
            if name in task.functions:
                method = getattr(self.instances[task.functions[name]], name)
                self.isolated_methods[name] = _isolated(method)
        self.budget = Budget()  # of the current step
        self.calls_made = []  # (function, {parameter: value}) of every call that parsed and bound
        self.gold_results = Counter()  # results so far that gold calls return too
        self.steps = 0  # executed steps of the current turn
        self.turn = 0  # turns that have ended; also the index of the current turn
        self.passed = 0  # turns that passed before the first failure
        self.failure = None  # (official error type, turn) of the first failure

    def execute(self, calls) -> list[str]:
        """Execute the calls of one step.

        Args:
            calls: `Call`s or call strings.

        Returns:
            Exactly one result string per call. Calls never raise: an error becomes a result.
        """
        results = self.run(calls)
        if calls not in ([], [""]):  # the official pipeline drops such steps
            self.steps += 1
        for result in results:
            if result in self.task.gold_replay.result_set:
                self.gold_results[result] += 1
        return results

    def run(self, calls) -> list[str]:
        """Execute calls like `execute`, but without counting them as a step of the conversation."""
        self.budget = Budget()
        uses_precision = "MathAPI" in self.instances
        with _restored_precision() if uses_precision else contextlib.nullcontext():
            return [self._result(call) for call in calls]

    def end_turn(self):
        """Judge the current turn and start the next."""
        self.passed, self.failure = self._judge_turn()
        self.turn += 1
        self.steps = 0

    def verdict(self, open_turn=False) -> Verdict:
        """Return the verdict so far.

        Args:
            open_turn: also judge the unfinished turn, as recorded (the rollout was cut off).
        """
        turns = self.turn
        passed = self.passed
        failure = self.failure
        if open_turn:
            turns += 1
            passed, failure = self._judge_turn()
        if turns != len(self.task.gold):
            failure = ("multi_turn:force_terminated", None)
        error_type, turn = failure or (None, None)
        replay = self.task.gold_replay
        return Verdict(
            valid=not failure,
            error_type=error_type,
            turn=turn,
            state=self.in_state(replay.states[-1]),
            action=_covers(self.calls_made, replay.calls),
            progress=passed / len(self.task.gold))

    def bound(self, call) -> tuple[str, dict] | None:
        """Return (function, {parameter: value}) of a call string; None if it does not parse and bind."""
        try:
            return _bind_args(*self._read(call))
        except Exception:
            return None

    def public_state(self):
        """Return a copy of the state that the official checker compares: class -> {attribute: value}."""
        state = {}
        for name, instance in self.instances.items():
            state[name] = {key: value for key, value in vars(instance).items() if not key.startswith("_")}
        return copy.deepcopy(state)

    def in_state(self, state):
        """Tell whether the instances' public attributes equal those of a `public_state`."""
        for name, attributes in state.items():
            current = vars(self.instances[name])
            if any(current[key] != value for key, value in attributes.items()):
                return False
        return True

    def _judge_turn(self):
        """Return (passed, failure) as if the current turn ended now."""
        if self.failure or self.turn >= len(self.task.gold):
            return self.passed, self.failure
        error = self._turn_error()
        if error:
            return self.passed, (error, self.turn)
        return self.passed + 1, None

    def _turn_error(self):
        """Return the official error type of the current turn; None if it passes.

        The checks are made in the official order.
        """
        replay = self.task.gold_replay
        if not self.task.gold[self.turn]:
            return None  # this turn is not checked; the effects of its calls show in the next turn's state
        if not self.steps:
            return "multi_turn:empty_turn_model_response"
        if not self.in_state(replay.states[self.turn]):
            return "multi_turn:instance_state_mismatch"
        # NOTE: as in the official checker, results of earlier turns count too.
        for result, count in replay.results[self.turn].items():
            if self.gold_results[result] < count:
                return "multi_turn:execution_response_mismatch"
        return None

    def _result(self, call):
        """Return the result string of one call; never raises."""
        try:
            self.budget.charge("calls", 1)
            self.budget.charge("characters of results", 0)  # once over the bound, nothing is executed
            call = str(call)
            self.budget.charge("characters of calls", len(call))
            method, args, kwargs = self._read(call)
            bound = _bind_args(method, args, kwargs)
            if bound:
                if "[" in call or "{" in call:
                    bound = copy.deepcopy(bound)  # the API may change a list or dict that it is given
                self.calls_made.append(bound)
            _check_work(self.budget, method, args, kwargs, len(call))
            result = _format_result(method(*args, **kwargs))
            self.budget.charge("characters of results", len(result))
            return result
        except Exception as error:
            # Error texts are not counted: 200 calls x 100,000 characters make 20 million at most.
            return f"{ERROR}{error}"

    def _read(self, call):
        """Return (method, args, kwargs) of a call string.

        Only public methods of the task's classes can come out.

        Raises:
            Exception: of any type, if the string is not such a call. Its text is the call's result.
        """
        callee, _, arguments = call.partition("(")
        is_plain = callee in self.task.functions and "(" not in arguments
        if not is_plain:  # reproduce the official executor's rewriting of the text
            call = _CALLEE.sub(lambda match: self._qualified(match[1]), call)
            callee = call.partition("(")[0]
            if "." in callee:
                callee = callee.split(".")[1]
            if callee in _DENIED:
                raise ValueError(f"Function call {callee} is not allowed.")

        parse = _parse_cached if len(call) < 500 else _parse
        node = parse(call)
        if not isinstance(node, ast.Call):
            raise _rejection(node)
        keywords = set()
        for keyword in node.keywords:
            if keyword.arg in keywords:
                raise SyntaxError(f"keyword argument repeated: {keyword.arg} (<string>, line 1)")
            keywords.add(keyword.arg)
        if callee not in self.task.functions:
            raise _rejection(node.func)
        if not is_plain and ast.unparse(node.func) != self._qualified(callee):
            raise _rejection(node.func)

        method = self.isolated_methods.get(callee)
        if method is None:
            method = getattr(self.instances[self.task.functions[callee]], callee)
        args = [_literal(arg, _execution_value) for arg in node.args]
        kwargs = {keyword.arg: _literal(keyword.value, _execution_value) for keyword in node.keywords}
        return method, args, kwargs

    def _qualified(self, name):
        """Return a function name as the official executor rewrites it: with its instance's name in front.

        The executor does so for every known function name that a parenthesis follows, even in a string
        argument, which is the only place where the rewriting is visible.
        """
        if name not in self.task.functions:
            return name
        instance = f"model_eval_{self.task.id}_{self.task.functions[name]}_instance"
        return f"{re.sub(r'[-./:]', '_', instance)}.{name}"


def judge(task: Task, turns: list[list[list[str]]]) -> Verdict:
    """Return the verdict on recorded calls.

    Args:
        task: the task of the conversation.
        turns: [turn][step][call string], of any length.
    """
    episode = Episode(task)
    for turn in turns:
        for step in turn:
            episode.execute(step)
        episode.end_turn()
    return episode.verdict()


@dataclass
class Verdict:
    """The result of judging an episode.

    Under the paper's protocol `valid`, `error_type`, `turn` and `progress` are None.
    """

    valid: bool | None
    error_type: str | None  # official string; None if valid
    turn: int | None  # 0-based; None if valid, or if the error belongs to no turn
    state: bool  # the paper's R_state: the final public state equals that of the gold calls
    action: bool  # the paper's R_action: every gold call was made
    progress: float | None  # turns that passed before the first failure / turns

    def reward(self, kind) -> float:
        """Return the reward of this kind: official (`valid`), paper (R_state * R_action) or progress.

        Raises:
            BfclError: there is no such reward, or the paper's protocol does not have it.
        """
        rewards = {
            "official": self.valid,
            "paper": self.state and self.action,
            "progress": self.progress,
        }
        reward = rewards[_choose("reward", kind, REWARDS)]
        if reward is None:
            raise BfclError(f"the paper protocol has no {kind!r} reward; use --reward paper")
        return float(reward)


def _covers(calls_made, gold_calls):
    """Tell whether R_action is 1: every gold call can be matched to a distinct call that was made.

    A match has the same function and at least the gold call's arguments. Greedy matching is not enough:
    f(x=1, y=2) can be matched to f(x=1) or to f(y=2), so earlier matches may have to be reassigned
    (augmenting paths).
    """
    functions = {function for function, _ in gold_calls}
    candidates = [call for call in calls_made if call[0] in functions]
    matched = {}  # index in candidates -> index in gold_calls

    def match_gold(gold_index, tried):
        """Try to match one gold call, reassigning earlier matches if necessary. Return whether it worked."""
        gold_function, gold_params = gold_calls[gold_index]
        for index, (function, params) in enumerate(candidates):
            if index in tried or function != gold_function or not params.items() >= gold_params.items():
                continue
            tried.add(index)
            if index not in matched or match_gold(matched[index], tried):
                matched[index] = gold_index
                return True
        return False

    return all(match_gold(gold_index, set()) for gold_index in range(len(gold_calls)))


@functools.cache
def _parameters(function):
    """Return the names of a method's parameters without `self`."""
    return list(inspect.signature(function).parameters)[1:]


def _bind_args(method, args, kwargs):
    """Return (function, {parameter: value}) of a call; None if the arguments do not fit the parameters."""
    names = _parameters(method.__func__)
    if len(args) > len(names):
        return None
    positional = dict(zip(names, args))
    for key in kwargs:
        if key not in names or key in positional:
            return None
    return method.__name__, positional | kwargs


def _isolated(method):
    """Rebind a method with private copies of the shared objects that it or other methods change.

    `mention` extends the default lists of post_tweet, and the long_context weather report is a module-level
    dict.
    """
    function = method.__func__
    module_globals = dict(function.__globals__)
    weather = module_globals.get("LONG_WEATHER_EXTENSION")
    if weather is not None:
        module_globals["LONG_WEATHER_EXTENSION"] = dict(weather)
    private = types.FunctionType(
        function.__code__,
        module_globals,
        function.__name__,
        copy.deepcopy(function.__defaults__))
    return types.MethodType(private, method.__self__)


def _format_result(value):
    """Format a method's return value as the official executor does."""
    if type(value) is dict:
        with contextlib.suppress(Exception):  # json cannot write numbers of mpmath and decimal
            return json.dumps(value)
    return str(value)


# ---- Tasks -------------------------------------------------------------------------------------------------
VERSION = "2026.3.23"  # of bfcl-eval
CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")


@dataclass(eq=False)
class Task:
    """One entry of the benchmark. All its episodes share this object: do not modify it."""

    id: str
    category: str
    index: int  # the number in the id; the same index is the same scenario in all four categories
    turns: list[str | None]  # user text per turn; None for a turn that only reveals withheld functions
    gold: list[list[str]]  # call strings per turn
    config: dict  # class name -> initial configuration
    classes: list[str]
    withheld: dict[int, list[str]]  # turn -> functions revealed at that turn (BFCL: missed_function)

    @property
    def docs(self) -> list[dict]:
        """The benchmark's docs of all functions, including withheld ones, in the official order."""
        docs = []
        for class_name in self.classes:
            docs += _class_docs(class_name)
        return docs

    @functools.cached_property
    def functions(self) -> dict[str, str]:
        """Function name -> class name: all public methods. Calls cannot reach anything else."""
        functions = {}
        for class_name in self.classes:
            for name in _public_methods(class_name):
                functions[name] = class_name
        return functions

    @functools.cached_property
    def initial_state(self) -> bytes:
        """Pickled initial instances by class name.

        Unpickling gives every episode a deep copy, also of the cards and bookings that long_context instances
        share.
        """
        instances = {name: _api_class(name)() for name in self.classes}
        for name, instance in instances.items():
            if name not in _constants().STATELESS_CLASSES:
                config = copy.deepcopy(self.config.get(name, {}))
                instance._load_scenario(config, long_context="long_context" in self.category)
        return pickle.dumps(instances)

    @functools.cached_property
    def gold_replay(self) -> types.SimpleNamespace:
        """The gold calls, executed once.

        results: Counter of result strings per turn
        states: public state after each turn
        calls: all calls, bound
        result_set: the result strings of all turns
        """
        episode = Episode(self)
        results = []
        states = []
        for calls in self.gold:
            results.append(Counter(episode.run(calls)))
            states.append(episode.public_state())
        return types.SimpleNamespace(
            results=results,
            states=states,
            calls=episode.calls_made,
            result_set=set().union(*results))


def load_tasks(categories=None) -> list[Task]:
    """Return the tasks of the categories (None: all 800) in the benchmark's order.

    Tasks are cached: every call returns the same objects.

    Raises:
        BfclError: a category is unknown, or the data package is absent or of another version.
    """
    tasks = []
    for category in CATEGORIES if categories is None else categories:
        tasks += _load_category(category)
    return tasks


@functools.cache
def _load_category(category):
    """Return the 200 tasks of one category."""
    _choose("category", category, CATEGORIES)
    answers = _read_rows(f"possible_answer/BFCL_v4_{category}.json")
    gold = {row["id"]: row["ground_truth"] for row in answers}
    tasks = []
    for row in _read_rows(f"BFCL_v4_{category}.json"):
        tasks.append(Task(
            id=row["id"],
            category=category,
            index=int(row["id"].rsplit("_", 1)[1]),
            turns=[turn[0]["content"] if turn else None for turn in row["question"]],
            gold=gold[row["id"]],
            config=row["initial_config"],
            classes=row["involved_classes"],
            withheld={int(turn): names for turn, names in row.get("missed_function", {}).items()}))
    return tasks


def installed(distribution, version, module):
    """Return the directory of an installed data package without importing it.

    Raises:
        BfclError: the package is absent or of another version.
    """
    fix = f"type: pip install --no-deps {distribution}=={version}"
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise BfclError(f"the data package {distribution} is not installed; {fix}") from None
    if found != version:
        raise BfclError(f"this code reads {distribution} {version}, but {found} is installed; {fix}")
    return Path(importlib.util.find_spec(module).submodule_search_locations[0])


@functools.cache
def package():
    return installed("bfcl-eval", VERSION, "bfcl_eval")


def _constants(module="executable_backend_config"):
    """Import one of bfcl_eval's constants-only modules.

    NOTE: `bfcl_eval.utils` must not be imported: the import makes directories.
    """
    package()  # raises BfclError if the package is absent
    return importlib.import_module(f"bfcl_eval.constants.{module}")


def _read_rows(path):
    """Return the JSON rows of a data file of the package."""
    text = (package() / "data" / path).read_text(encoding="utf-8")
    return [json.loads(row) for row in text.splitlines()]


@functools.cache
def _class_docs(class_name):
    file = _constants().MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name]
    return _read_rows("multi_turn_func_doc/" + file)


@functools.cache
def _api_class(class_name):
    module = importlib.import_module(_constants().CLASS_FILE_PATH_MAPPING[class_name])
    return getattr(module, class_name)


@functools.cache
def _public_methods(class_name):
    members = inspect.getmembers(_api_class(class_name), inspect.isfunction)
    return [name for name, _ in members if not name.startswith("_")]


# ---- Splits ------------------------------------------------------------------------------------------------
SPLIT_BY = ("family", "paper")


def families(tasks: list[Task]) -> list[list[int]]:
    """Group task indices into families.

    Tasks with the same ground truth or the same initial configuration, in any category, are one family.
    """
    family_of = {task.index: frozenset([task.index]) for task in tasks}
    first_index = {}  # content -> the first index with this content
    for task in tasks:
        for content in (json.dumps(task.gold), json.dumps(task.config, sort_keys=True)):
            twin = first_index.setdefault(content, task.index)
            merged = family_of[task.index] | family_of[twin]
            family_of.update(dict.fromkeys(merged, merged))
    return sorted(sorted(family) for family in set(family_of.values()))


def split(tasks: list[Task], name="family", seed=0) -> dict[str, list[Task]]:
    """Split tasks into the parts "train", "val" and "test", in order.

    The part of a task does not depend on which other tasks are passed.

    Args:
        tasks: the tasks to split.
        name: family: from each block of 50 ids (file system, vehicle, trading, travel) 36, 4 and 10 ids. A
            family stays together, and so do the four categories of an id: 576/64/160 of the 800 tasks.
            paper: 720/0/80 tasks at random, as in arXiv 2602.03025. Most test tasks then have a twin in
            train.
        seed: of the random choice.

    Raises:
        BfclError: there is no split of this name.
    """
    if _choose("split", name, SPLIT_BY) == "paper":
        part_of = _paper_parts(seed)
    else:
        part_of = _family_parts(seed)
    parts = {"train": [], "val": [], "test": []}
    for task in tasks:
        parts[part_of[task.id]].append(task)
    return parts


@functools.cache
def _paper_parts(seed):
    """Return task id -> part for the paper's random split, and warn that it leaks."""
    warn("the paper split leaks: most of its test tasks have the gold calls of a training task; "
         "--split_by family has no such twins")
    ids = [task.id for task in load_tasks()]
    test_ids = set(random.Random(seed).sample(ids, 80))
    return {task_id: "test" if task_id in test_ids else "train" for task_id in ids}


def _family_parts(seed):
    """Return task id -> part, where all indices of a family are in one part."""
    rng = random.Random(seed)
    all_families = families(load_tasks())
    part_of_index = {}
    for block in range(4):
        room = {"test": 10, "val": 4, "train": 36}
        in_block = [family for family in all_families if family[0] // 50 == block]
        in_block.sort(key=lambda _: rng.random())  # random order
        for family in in_block:
            part = next(part for part in room if room[part] >= len(family))
            room[part] -= len(family)
            part_of_index.update(dict.fromkeys(family, part))
    return {task.id: part_of_index[task.index] for task in load_tasks()}


# ---- Tool docs in three sizes ------------------------------------------------------------------------------
TOOL_DOCS = ("full", "slim", "signature")
# The types float and dict keep their names.
_PYTHON_TYPES = {"string": "str", "integer": "int", "boolean": "bool", "array": "list"}
_LANGUAGE_HINT = " Note that the provided function is in Python 3 syntax."
_DONE_DOC = {
    "name": "done",
    "description": "Ends the conversation. Call it when all steps are complete.",
    "parameters": {"type": "dict", "properties": {}, "required": []},
}


def signature(doc):
    """Return a function's signature in one line.

    >>> signature(_class_docs("GorillaFileSystem")[-3])
    'tail(file_name: str, lines: int = 10)'
    """
    params = []
    for name, spec in doc["parameters"]["properties"].items():
        param = f"{name}: {_PYTHON_TYPES.get(spec['type'], spec['type'])}"
        if name not in doc["parameters"]["required"]:
            default = spec.get("default")
            if default == "None":  # the docs write None as a string
                default = None
            param += f" = {default!r}"
        params.append(param)
    return f"{doc['name']}({', '.join(params)})"


def _tool(doc, tool_docs, hint=True):
    """Return the doc of a function in the given size.

    Args:
        doc: the benchmark's doc.
        tool_docs: full, slim or signature.
        hint: add the language hint to a full doc. The official prompt omits it for withheld functions.
    """
    description = doc["description"]
    if tool_docs == "full":
        if hint:
            description += _LANGUAGE_HINT
        return {**doc, "description": description}

    description = description.split("Tool description: ")[-1]  # without the description of the class
    params = doc["parameters"]
    if tool_docs == "signature":
        description = description.split(". ")[0]
        types_only = {name: {"type": spec["type"]} for name, spec in params["properties"].items()}
        params = {**params, "properties": types_only}
    return {"name": doc["name"], "description": description, "parameters": params}


def _list_tools(docs, tool_docs, call_format):
    """Return the docs as text, one line per function."""
    as_signatures = tool_docs == "signature" and call_format == "python"
    return "\n".join(signature(doc) if as_signatures else json.dumps(_tool(doc, tool_docs)) for doc in docs)


INSTRUCTIONS = """\
You help a user by calling functions. Reply with a list of calls and no other text:
[first_function(param=value), second_function(param=value)]
Write all arguments as keywords with literal values. You will see the results and can call again. \
When the user's request is done, or something needed is missing, reply in plain words.

Functions:
"""
# Our own sentences in the prompts. A checkpoint is saved with their hash, since it was trained on them.
PROMPT_TEXTS = (INSTRUCTIONS, PaperEnv.ENDING)


def _system_text(docs, tool_docs):
    """Return the system message of the python format.

    With tool_docs="full" it is the leaderboard's, built from the package's templates.
    """
    if tool_docs != "full":
        return INSTRUCTIONS + _list_tools(docs, tool_docs, "python")
    official = _constants("default_prompts")
    parts = dict(official.PROMPT_STYLE_TEMPLATES["classic"])
    parts["tool_call_format"] = parts["tool_call_no_tag"].format(
        output_format=official.OUTPUT_FORMAT_MAPPING["python"],
        param_types=official.PARAM_TYPE_MAPPING["python"])
    functions = json.dumps([_tool(doc, tool_docs) for doc in docs], indent=4)
    parts["available_tools"] = parts["available_tools"].format(format="json", functions=functions)
    return official.PROMPT_TEMPLATE_MAPPING["plaintext"].format(**parts)


# ---- Calls from text ---------------------------------------------------------------------------------------
MAX_TEXT = 100_000  # characters per message of the model


@dataclass
class Call:
    """A tool call. `str(call)` formats it exactly as the official decoder of its format does."""

    name: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    call_format: str = field(default="python", compare=False)

    def __str__(self):
        is_python = self.call_format == "python"
        separator = ", " if is_python else ","
        format_value = _format_value if is_python else repr
        arguments = [format_value(value) for value in self.args]
        arguments += [f"{key}={format_value(value)}" for key, value in self.kwargs.items()]
        return f"{self.name}({separator.join(arguments)})"


def parse_calls(text, call_format) -> list[Call]:
    """Parse the calls in a message of the model as the official handlers do.

    A message without calls, or one that does not parse, ends the turn.

    python: the prompting decoder, for `[f(a=1), g()]`. Positional arguments are dropped, a bare name is a
            string (`true` is 'true'), any unary operator negates, and of repeated keywords the last wins.
    json:   the Qwen function-calling decoder: `<tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>`
            blocks after the last </think>. A block of bad JSON is skipped.
    llama:  the Llama-3.1 function-calling decoder: one Python literal, `{"name": "f", "parameters": {}}` or a
            list of such, or several JSON objects between ";". `<|python_tag|>` is dropped.
    Unlike in the official decoders, a text over MAX_TEXT characters is an error, and so are operators other
    than + - * / on number literals.

    Raises:
        CallSyntaxError: the text does not parse. No other exception is raised, whatever the text.

    >>> [str(call) for call in parse_calls("[cd(folder='a'), sort('b', file_name=c)]", "python")]
    ["cd(folder='a')", "sort(file_name='c')"]
    """
    decode = CALL_FORMATS[_choose("call format", call_format, CALL_FORMATS)].decode
    try:
        if len(text) > MAX_TEXT:
            raise ValueError(f"longer than {MAX_TEXT} characters")
        calls = decode(text)
        for call in calls:
            str(call)  # raises for values that parse but cannot be formatted, for instance {}
        return calls
    except Exception as error:
        raise CallSyntaxError(f"{type(error).__name__}: {error}") from None


def write_calls(calls: list[Call], call_format):
    """Return a message that makes these calls: `parse_calls(message, call_format)` reads them back."""
    return CALL_FORMATS[call_format].write(calls)


def without_thoughts(text, call_format):
    """Return a message without its thinking block, as the official handlers of the format strip it."""
    if call_format == "llama":
        return text
    return text.split("</think>")[-1].lstrip("\n")


@dataclass(frozen=True)
class CallFormat:
    """A way to write calls in a message. The table CALL_FORMATS is in the next section."""

    decode: Callable  # text -> list[Call], as an official handler does; may raise any exception
    write: Callable  # list[Call] -> text that `decode` reads back
    native: bool  # True: the chat template renders the tools; False: a system message lists them
    official: str  # a model of the leaderboard with this decoder
    marks: tuple = ()  # control tokens in such a text


# ---- The official decoders' oddities -----------------------------------------------------------------------
def _format_value(value):
    """Format an argument as the official prompting decoder does.

    The decoder stores a nested call as a dict of dicts, so it formats such a dict as a call: {'f': {'x': 1}}
    becomes f(x=1), and {} fails. In other dicts it quotes the keys without escapes.
    """
    if not isinstance(value, dict):
        return repr(value)
    if all(isinstance(item, dict) for item in value.values()):
        name, params = list(value.items())[0]
        arguments = ", ".join(f"{key}={_format_value(item)}" for key, item in params.items())
        return f"{name}({arguments})"
    items = ", ".join(f"'{key}': {_format_value(item)}" for key, item in value.items())
    return f"{{{items}}}"


def _decode_python(text):
    text = text.strip("`\n ")
    if not text.startswith("["):
        text = "[" + text
    if not text.endswith("]"):
        text += "]"
    body = _parse(text.strip().strip("'"))
    nodes = [body] if isinstance(body, ast.Call) else body.elts
    return [_decode_call(node) for node in nodes]


def _write_python(calls):
    return f"[{', '.join(map(str, calls))}]"


def _decode_json(text):
    # Equivalent to the official lazy regular expression, which is quadratic when closing tags are missing.
    calls = []
    rest = text.split("</think>")[-1]
    while True:
        _, _, rest = rest.partition("<tool_call>\n")
        body, closing_tag, rest = rest.partition("\n</tool_call>")
        if not closing_tag:
            break
        with contextlib.suppress(Exception):
            calls.append(json.loads(body))
    if any(type(call) is not dict for call in calls):
        raise ValueError("a tool call is not an object")
    return [json_call(call["name"], call["arguments"]) for call in calls]


def _write_json(calls):
    blocks = []
    for call in calls:
        body = json.dumps({"name": call.name, "arguments": call.kwargs})
        # The decoder takes all text before this tag for a thought. In JSON "\/" is another spelling of "/".
        body = body.replace("</think>", "<\\/think>")
        blocks.append(f"<tool_call>\n{body}\n</tool_call>")
    return "\n".join(blocks)


def json_call(name, arguments) -> Call:
    """Return the call with this name and these arguments, as parsed from JSON.

    Args:
        name: the function's name.
        arguments: parameter -> value, or JSON text of it.

    Raises:
        Exception: of any type, if `arguments` is neither.
    """
    if isinstance(name, (list, dict)):  # the official code uses the name as a dict key: any scalar passes
        raise TypeError(f"{name!r} is no function name")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return Call(str(name), (), dict(arguments.items()), "json")


def _decode_llama(text):
    text = text.replace("<|python_tag|>", "")
    if ";" in text:
        calls = [json.loads(part) for part in text.split(";")]
    else:  # the official decoder evaluates this as Python, where `true` is an unknown name
        calls = _literal(_parse(text), _execution_value)
        if type(calls) is dict:
            calls = [calls]
    return [Call(str(call["name"]), (), dict(call["parameters"].items()), "llama") for call in calls]


# A string or a word of JSON text.
_STRING_OR_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[a-z]+')


def _write_llama(calls):
    """Write calls for the decoder, which parses several as JSON but a single one as a Python literal.

    Neither form may contain the separator ";" or a control token.
    """
    bodies = []
    for call in calls:
        body = json.dumps({"name": call.name, "parameters": call.kwargs}, ensure_ascii=False)
        if len(calls) == 1:
            body = _STRING_OR_WORD.sub(_python_word, body)
        body = body.translate({ord(";"): "\\u003b", ord("|"): "\\u007c"})
        bodies.append(body)
    return "; ".join(bodies)


def _python_word(match):
    """Return Python's spelling of JSON's true, false and null; strings and other words stay."""
    return {"true": "True", "false": "False", "null": "None"}.get(match[0], match[0])


CALL_FORMATS = {
    "python": CallFormat(
        _decode_python,
        _write_python,
        native=False,
        official="Qwen/Qwen3-0.6B"),
    "json": CallFormat(
        _decode_json,
        _write_json,
        native=True,
        official="Qwen/Qwen3-0.6B-FC",
        marks=("<tool_call>", "</tool_call>")),
    "llama": CallFormat(
        _decode_llama,
        _write_llama,
        native=True,
        official="meta-llama/Llama-3.1-8B-Instruct-FC",
        marks=("<|python_tag|>",)),
}


def _parse(text):
    """Parse an expression as `eval` would, with the same error messages, without evaluating it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bad escapes in strings
        tree = compile(text.lstrip(" \t"), "<string>", "eval", ast.PyCF_ONLY_AST, dont_inherit=True)
    return tree.body


_parse_cached = functools.lru_cache(10_000)(_parse)  # rollouts of a group often make the same call


def _decode_call(node):
    """Return the call of a node. Positional arguments are dropped, as the official prompting decoder does."""
    parts = []
    func = node.func
    while isinstance(func, ast.Attribute):
        parts.append(func.attr)
        func = func.value
    if isinstance(func, ast.Name):
        parts.append(func.id)
    name = ".".join(reversed(parts))
    kwargs = {str(keyword.arg): _literal(keyword.value, _decoded_value) for keyword in node.keywords}
    return Call(name, (), kwargs)


def _literal(node, fallback):
    """Return the value of a literal, in new objects: an API may change a list that it is given.

    Args:
        node: an ast node.
        fallback: a function that returns the value of a node that is not a literal, or raises.
    """
    match node:
        case ast.Constant(value=value) if value is not ...:
            return _check_int_size(value)
        case ast.List():
            return [_literal(item, fallback) for item in node.elts]
        case ast.Tuple():
            return tuple(_literal(item, fallback) for item in node.elts)
        case ast.Dict():
            items = zip(node.keys, node.values)
            return {_literal(key, fallback): _literal(value, fallback) for key, value in items}
        case ast.BinOp():
            return _arithmetic(node)
    return fallback(node)


def _decoded_value(node):
    """Decode an argument that is not a literal as the official prompting decoder does."""
    match node:
        case ast.Name():
            return node.id
        case ast.UnaryOp(operand=ast.Constant()):
            return -node.operand.value
        case ast.Call(keywords=[]):
            return ast.unparse(node)
        case ast.Call():
            call = _decode_call(node)
            return {call.name: call.kwargs}
        case ast.Subscript():
            return f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]"
        case ast.Constant():
            return "..."
    raise ValueError(f"{type(node).__name__} is not a literal")


def _execution_value(node):
    """Return the value of a node that calls accept in addition to the literals of `_literal`."""
    match node:
        case ast.UnaryOp():
            return _arithmetic(node)
        case ast.Set():
            return {_literal(item, _execution_value) for item in node.elts}
    raise _rejection(node)


def _rejection(node):
    """Return the error for a node that is not evaluated.

    In most cases it is the error that `eval` raises too: the leftmost name is unknown.
    """
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Name) and not node.id.endswith("_instance"):
        return NameError(f"name {node.id!r} is not defined")
    return TypeError("only calls with literal arguments are executed")


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _arithmetic(node):
    """Compute + - * / on number literals."""
    match node:
        case ast.Constant(value=int() | float() | complex() as value):
            return _check_int_size(value)
        case ast.UnaryOp(op=ast.USub()):
            return -_arithmetic(node.operand)
        case ast.UnaryOp(op=ast.UAdd()):
            return +_arithmetic(node.operand)
        case ast.BinOp() if type(node.op) in _OPERATORS:
            compute = _OPERATORS[type(node.op)]
            return _check_int_size(compute(_arithmetic(node.left), _arithmetic(node.right)))
    raise ValueError("only + - * / on numbers are computed")


def _check_int_size(value):
    """Return the value. Raises: ValueError for an integer that Python refuses to print."""
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise ValueError(TOO_LONG)
    return value


# ---- Work limits -------------------------------------------------------------------------------------------
# Limits per step. For scale: gold turns have up to 34 calls, 7,000 characters and 10 digits.
LIMITS = {
    "calls": 200,
    "characters of calls": 100_000,
    "characters of results": 20_000_000,
    "characters of files": 2_000_000,  # paths and contents in the directory trees that find and du walk
    "digits": 20_000,  # precision and decimal places
}
MAX_INT = 10**4300  # CPython does not convert longer integers to strings; TOO_LONG is its error text
TOO_LONG = ("Exceeds the limit (4300 digits) for integer string conversion; "
            "use sys.set_int_max_str_digits() to increase the limit")


class Budget(Counter):
    """The work that the calls of one step have used so far: key of LIMITS -> amount."""

    def charge(self, kind, amount):
        """Count work. Raises: ValueError over a bound of LIMITS."""
        self[kind] += amount
        if self[kind] > LIMITS[kind]:
            raise ValueError(f"more than {LIMITS[kind]} {kind} in a step")


def _check_work(budget, method, args, kwargs, call_length):
    """Reject calls that would take minutes or gigabytes inside C code, which nothing can interrupt.

    Raises:
        ValueError: the call takes too much work.
    """
    given = dict(zip(_parameters(method.__func__), args)) | kwargs
    match method.__name__:
        case "find" | "du":
            file_system = method.__self__
            _charge_tree(budget, file_system.root, call_length)
            if file_system._current_dir is not file_system.root:
                _charge_tree(budget, file_system._current_dir, call_length)
        case "power":
            base = given.get("base")
            exponent = given.get("exponent")
            if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
                if base.bit_length() * exponent > 2 * MAX_INT.bit_length():
                    raise ValueError(TOO_LONG)  # the official code raises it too, but after minutes
        case "logarithm" | "square_root" | "round_number":
            digits = 0
            with contextlib.suppress(TypeError, ValueError, OverflowError):  # the method raises its own error
                digits = abs(int(given.get("precision", given.get("decimal_places"))))
            budget.charge("digits", digits)
            for number in (given.get("value"), given.get("base")):
                # mpmath expands "1e999999999" to a billion digits.
                if isinstance(number, str) and re.search(r"e[\s\d_+-]{6}", number.lower()):
                    raise ValueError("a number with a long exponent")


def _charge_tree(budget, directory, path_length):
    """Charge for all paths and file contents below a directory.

    Copies of a directory share its subdirectories, so that n calls of `cp` can make 2^n paths, or a cycle.
    """
    pending = [(directory, path_length)]
    while pending:  # NOTE: not recursive, since a chain of directories can be deep
        directory, path_length = pending.pop()
        for name, item in directory.contents.items():
            item_length = path_length + 1 + len(str(name))
            content = str(getattr(item, "content", ""))
            budget.charge("characters of files", item_length + len(content))
            if hasattr(item, "contents"):
                pending.append((item, item_length))


@contextlib.contextmanager
def _restored_precision():
    """Restore the process's precision of mpmath and decimal afterwards: MathAPI sets both."""
    import mpmath  # here, since only MathAPI needs it

    with mpmath.workprec(mpmath.mp.prec), decimal.localcontext():
        yield


# ---- Flags -------------------------------------------------------------------------------------------------
RETIRED_FLAGS = {
    "--init": "--model", "--part": "--split",
    "--docs": "--tool_docs", "--style": "--call_format",
    "--no_token": "--reward_token_dropout", "--max_turn_tokens": "--max_new_tokens",
    "--max_total_tokens": "--max_sampled_tokens", "--clip": "--clip_eps",
    "--keep": "--save_total_limit", "--prompts": "--prompts_per_step",
    "--group": "--group_size", "--inner_epochs": "--update_epochs",
    "--batch": "--batch_size", "--limit": "--max_tasks",
    "--resample": "--dynamic_sampling"}
RETIRED_VALUES = {
    "--split family": "--split_by family", "--split paper": "--split_by paper",
    "--advantage token": "--advantage within_reward_token", "--advantage centred": "--advantage mean_only",
    "--advantage signed": "--advantage sign", "--advantage virtual": "--advantage virtual_success"}


class Parser(argparse.ArgumentParser):
    """A parser that accepts no abbreviations of flags and reports the new name of a retired one."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        """Exit with a message. For a retired flag or value of this script the message is its new name."""
        if message.startswith("unrecognized arguments"):
            for word in message.split():
                flag = word.partition("=")[0]
                new = RETIRED_FLAGS.get(flag)
                if new in self._option_string_actions:
                    message = f"{flag} is now called {new}"
                    break
        if choice := re.match(r"argument (--\w+): invalid choice: '(\w+)'", message):
            given = " ".join(choice.groups())
            if given in RETIRED_VALUES:
                message = f"{given} is now called {RETIRED_VALUES[given]}"
        super().error(message)


def add_env_flags(parser: argparse.ArgumentParser, split="train", tasks=""):
    """Add the flags that choose tasks and their environment, which all scripts share.

    Args:
        parser: the script's parser.
        split: the script's default of --split; None: the script decides later.
        tasks: the script's default of --tasks.
    """
    group = parser.add_argument_group("environment")

    def add(flag, default, text, **options):
        group.add_argument(flag, default=default, help=f"{text} (default: %(default)s)", **options)

    add("--tool_docs", "signature",
        "size of the tool docs in the prompt: full (4k to 10k tokens), slim (1.4k to 4k) or signature "
        "(one line per function, 0.2k to 0.7k)",
        choices=TOOL_DOCS)
    add("--call_format", "auto",
        "how calls are written: python (a list of calls), json (<tool_call> blocks), llama (Llama-3.1's "
        "objects) or auto (the format of the chat template; python if it has none)",
        choices=("auto", *CALL_FORMATS))
    add("--protocol", "official",
        "official: turn by turn; paper: all turns in one message",
        choices=PROTOCOLS)
    add("--reward", "official",
        "official: the checker's verdict; paper: final state x calls made; progress: share of turns passed",
        choices=REWARDS)
    add("--split_by", "family",
        "family: related tasks stay together; paper: the paper's random split, which leaks",
        choices=SPLIT_BY)
    group.add_argument(
        "--split", default=split, choices=("train", "val", "test", "all"),
        help="part of the tasks (default: train for training, test for evaluation, all with --score)")
    add("--categories", ",".join(CATEGORIES), "categories, comma-separated")
    add("--tasks", tasks, "task ids, comma-separated; overrides --split and --categories")
    add("--max_tasks", 0, "number of tasks, spread evenly over those chosen; 0: all", type=int)


def make_env_fn(args: argparse.Namespace, call_format):
    """Return make_env(task), which builds the environment that the flags choose."""
    env_class = PROTOCOLS[_choose("protocol", args.protocol, PROTOCOLS)]
    return functools.partial(env_class, tool_docs=args.tool_docs, call_format=call_format)


def select_tasks(args: argparse.Namespace) -> list[Task]:
    """Return the tasks that the flags choose.

    Raises:
        BfclError: an id or a category is unknown, no task is left, or the protocol lacks the reward.
    """
    if args.protocol == "paper" and args.reward != "paper":
        raise BfclError(f"the paper protocol has no {args.reward!r} reward: add --reward paper")
    known = {task.id: task for task in load_tasks()}
    ids = _split_commas(args.tasks)
    for task_id in ids:
        if task_id not in known:
            raise BfclError(f"unknown task {task_id!r}; ids are a category and a number from 0 to 199, for "
                            f"instance --tasks multi_turn_base_0 (categories: {', '.join(CATEGORIES)})")
    if ids:
        tasks = [known[task_id] for task_id in ids]
    else:
        tasks = load_tasks(_split_commas(args.categories))
        if args.split != "all":
            tasks = split(tasks, args.split_by)[args.split]
    if not tasks or args.max_tasks < 0:
        raise BfclError(f"no tasks are left with --categories {args.categories!r} --split_by {args.split_by} "
                        f"--split {args.split} --max_tasks {args.max_tasks}; try --split all --max_tasks 0")
    count = min(args.max_tasks or len(tasks), len(tasks))
    return [tasks[i * len(tasks) // count] for i in range(count)]


def _split_commas(text):
    """Return the items of a list with commas, each once."""
    items = [item.strip() for item in text.split(",")]
    return [item for item in dict.fromkeys(items) if item]


def start_process():
    """Restart the process unless its hash seed is fixed and its text files are UTF-8.

    Python reads both settings only at its start. Some results of the benchmark print sets, and a resumed run
    must see them in the same order. From here on Ctrl-C prints one sentence, until `TrainLoop` takes it over.
    """
    signal.signal(signal.SIGINT, _interrupt)
    wanted = {}
    if not os.environ.get("PYTHONHASHSEED", "").isdigit():
        wanted["PYTHONHASHSEED"] = "0"
    # NOTE: options such as -E make Python ignore these variables: restart once, not forever.
    if locale.getpreferredencoding(False).lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        wanted["PYTHONUTF8"] = "1"
    if wanted:
        os.execve(sys.executable, sys.orig_argv, os.environ | wanted)


def _interrupt(*_):
    sys.exit("interrupted: the same command continues from what is on disk, or starts again")
