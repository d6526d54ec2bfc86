"""The world: the BFCL v4 multi-turn benchmark as an exact, safe and fast environment.

  1. `load_tasks` reads the 800 tasks (4 categories x 200 ids) from the installed package bfcl-eval
  2. `BfclEnv(task).messages()` opens a conversation: tool docs and the first user text
  3. `env.step(text)` executes the calls in what the model wrote; a text without calls ends the turn
  4. `env.verdict()` is what the official checker would say, with the paper's reward beside it

Questions, answers, docs and the simulated API classes come from bfcl-eval==2026.3.23 (Apache-2.0); nothing of
it is copied here. The official executor `eval`s what the model wrote and keeps instances in module globals.
Here text is parsed with ast and json and read as literals only, and every episode has its own instances.
Whatever calls with literal arguments can express has the official results and verdicts. The differences, all
deliberate:
  - nested calls, builtins, attributes and other expressions are not evaluated: the call gives an error string
  - while decoding, only + - * / on number literals are computed (the official decoder evaluates any operator)
  - the work of a step is bounded by LIMITS: a call over a bound gives an error string. There is no timer, so
    no verdict depends on how loaded the machine is
  - `find` and `du` on a cyclic directory tree give another error text than Python's recursion error
  - what official instances share (default lists of post_tweet, cards, bookings and weather of long_context,
    precision of mpmath and decimal) is the episode's own: verdicts are those of isolated official instances
"""
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
import operator
import os
import pickle
import random
import re
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

VERSION = "2026.3.23"  # of bfcl-eval
CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
TOOL_DOCS = ("full", "slim", "signature")
PROTOCOLS = ("official", "paper")
SPLIT_BY = ("family", "paper")
REWARDS = ("official", "paper", "progress")

MAX_STEPS = 21  # executed steps a turn (the official limit is 20, compared after counting)
MAX_TEXT = 100_000  # characters of a model text
# What the calls of one step may use. For scale: gold turns have up to 34 calls, 7,000 characters, 10 digits.
LIMITS = {
    "calls": 200,
    "characters of calls": 100_000,
    "characters of results": 20_000_000,
    "characters of files": 2_000_000,  # paths and contents in the directory trees that find and du walk
    "digits": 20_000,  # precision and decimal places
}
MAX_INT = 10**4300  # Python refuses to print longer integers, in these words:
TOO_LONG = ("Exceeds the limit (4300 digits) for integer string conversion; "
            "use sys.set_int_max_str_digits() to increase the limit")
ERROR = "Error during execution: "


RETIRED_FLAGS = {
    "--init": "--model", "--part": "--split", "--docs": "--tool_docs", "--style": "--call_format",
    "--no_token": "--reward_token_dropout", "--max_turn_tokens": "--max_new_tokens",
    "--max_total_tokens": "--max_sampled_tokens", "--clip": "--clip_eps", "--keep": "--save_total_limit",
    "--prompts": "--prompts_per_step", "--group": "--group_size", "--inner_epochs": "--update_epochs",
    "--batch": "--batch_size", "--limit": "--max_tasks", "--resample": "--dynamic_sampling"}


class BfclError(Exception):
    """A mistake of the caller: what is wrong, what was given, what to type instead."""


class CallSyntaxError(Exception):
    """A text that cannot be read as calls. In a conversation it ends the turn."""


def _choose(what, given, allowed):
    if given not in allowed:
        raise BfclError(f"unknown {what} {given!r}; choose one of: {', '.join(allowed)}")
    return given


# ---- Tasks -------------------------------------------------------------------------------------------------
def installed(distribution, version, module):
    """Folder of an installed data package, found without importing it.

    Errors: BfclError if it is absent or of another version."""
    fix = f"type: pip install --no-deps {distribution}=={version}"
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise BfclError(f"the data package {distribution} is not installed; {fix}") from None
    if found != version:
        raise BfclError(f"this code reads {distribution} {version}, but {found} is installed; {fix}")
    return Path(importlib.util.find_spec(module).submodule_search_locations[0])


@functools.cache
def _package():
    return installed("bfcl-eval", VERSION, "bfcl_eval")


def _constants(module="executable_backend_config"):
    """Modules of plain constants. (Not `bfcl_eval.utils`: importing that makes directories.)"""
    _package()  # Errors: BfclError if it is not there
    return importlib.import_module(f"bfcl_eval.constants.{module}")


def _rows(path):
    return [json.loads(row) for row in (_package() / "data" / path).read_text(encoding="utf-8").splitlines()]


@dataclass(eq=False)
class Task:
    """An entry of the benchmark. All episodes share it: read only."""

    id: str
    category: str
    index: int  # the number in the id; one index is the same story in all four categories
    turns: list[str | None]  # user text per turn; None where withheld functions are revealed
    gold: list[list[str]]  # call strings per turn
    config: dict  # class name -> initial configuration
    classes: list[str]
    withheld: dict[int, list[str]]  # turn -> functions withheld until then

    @property
    def docs(self) -> list[dict]:
        """The benchmark's docs of all functions, those withheld included, in the official order."""
        return [doc for name in self.classes for doc in _class_docs(name)]

    @functools.cached_property
    def functions(self) -> dict[str, str]:
        """Function name -> class name: all public methods, the only things that a call can reach."""
        return {name: class_name for class_name in self.classes for name in _public_methods(class_name)}

    @functools.cached_property
    def initial_state(self) -> bytes:
        """Class name -> loaded instance, pickled: unpickling copies everything, also the cards and bookings
        that long_context instances share."""
        instances = {name: _api_class(name)() for name in self.classes}
        for name, instance in instances.items():
            if name not in _constants().STATELESS_CLASSES:
                config = copy.deepcopy(self.config.get(name, {}))
                instance._load_scenario(config, long_context="long_context" in self.category)
        return pickle.dumps(instances)

    @functools.cached_property
    def gold_replay(self) -> types.SimpleNamespace:
        """The gold calls, executed once: results (Counters) and states per turn, and all bound calls."""
        episode, results, states = Episode(self), [], []
        for calls in self.gold:
            results.append(Counter(episode.run(calls)))
            states.append(episode.public_state())
        needed = {result for counter in results for result in counter}
        return types.SimpleNamespace(results=results, states=states, calls=episode.made, needed=needed)


@functools.cache
def _class_docs(name):
    return _rows("multi_turn_func_doc/" + _constants().MULTI_TURN_FUNC_DOC_FILE_MAPPING[name])


@functools.cache
def _api_class(name):
    return getattr(importlib.import_module(_constants().CLASS_FILE_PATH_MAPPING[name]), name)


@functools.cache
def _category(category):
    _choose("category", category, CATEGORIES)
    questions = _rows(f"BFCL_v4_{category}.json")
    gold = {row["id"]: row["ground_truth"] for row in _rows(f"possible_answer/BFCL_v4_{category}.json")}
    return [Task(id=row["id"], category=category, index=int(row["id"].rsplit("_", 1)[1]),
                 turns=[turn[0]["content"] if turn else None for turn in row["question"]],
                 gold=gold[row["id"]], config=row["initial_config"], classes=row["involved_classes"],
                 withheld={int(turn): names for turn, names in row.get("missed_function", {}).items()})
            for row in questions]


def load_tasks(categories=None) -> list[Task]:
    """The tasks of the categories (None: all 800), in the benchmark's order; the same objects at every call.

    Errors: BfclError for an unknown category, and if the package is absent or of another version.
    """
    return [task for name in (CATEGORIES if categories is None else categories) for task in _category(name)]


# ---- Splits ------------------------------------------------------------------------------------------------
def families(tasks: list[Task]) -> list[list[int]]:
    """The indices in groups: equal ground truth or initial configuration, in any category, is one family."""
    family = {task.index: {task.index} for task in tasks}  # index -> all members of its family
    first = {}  # content -> the index that had it first
    for task in tasks:
        for content in (json.dumps(task.gold), json.dumps(task.config, sort_keys=True)):
            merged = family[task.index] | family[first.setdefault(content, task.index)]
            for index in merged:
                family[index] = merged
    distinct = {min(members): members for members in family.values()}
    return [sorted(distinct[least]) for least in sorted(distinct)]


def split(tasks: list[Task], name="family", seed=0) -> dict[str, list[Task]]:
    """Parts "train", "val", "test" of `tasks`, in order. A task's part does not depend on the others given.

    family: of each block of 50 ids (file system, vehicle, trading, travel) 36, 4 and 10, in whole families
            and in all four categories: 576/64/160 of the 800 tasks.
    paper:  720/0/80 tasks at random, as in arXiv 2602.03025; most test tasks then have a twin in train.
    """
    rng = random.Random(seed)
    if _choose("split", name, SPLIT_BY) == "paper":
        print("warning: the paper split leaks: most of its test tasks have the gold calls of a training "
              "task; --split_by family has no such twins", file=sys.stderr)
        test = set(rng.sample([task.id for task in load_tasks()], 80))
        part_of = {task.id: "test" if task.id in test else "train" for task in tasks}
    else:
        index_part, blocks = {}, [[], [], [], []]
        for group in families(load_tasks()):
            blocks[group[0] // 50].append(group)
        for groups in blocks:
            room = {"test": 10, "val": 4, "train": 36}
            for group in sorted(groups, key=lambda _: rng.random()):  # in random order
                part = next(part for part in room if room[part] >= len(group))
                room[part] -= len(group)
                index_part.update(dict.fromkeys(group, part))
        part_of = {task.id: index_part[task.index] for task in tasks}
    return {part: [task for task in tasks if part_of[task.id] == part] for part in ("train", "val", "test")}


# ---- Tool docs, in three sizes -----------------------------------------------------------------------------
_TYPES = {"string": "str", "integer": "int", "boolean": "bool", "array": "list"}  # float and dict stay
_DONE = {"name": "done", "description": "Ends the conversation. Call it when all steps are complete.",
         "parameters": {"type": "dict", "properties": {}, "required": []}}


def signature(doc):
    """A function in one line.

    >>> signature(_class_docs("GorillaFileSystem")[-3])
    'tail(file_name: str, lines: int = 10)'
    """
    params = []
    for name, spec in doc["parameters"]["properties"].items():
        default = None if spec.get("default") == "None" else spec.get("default")  # the docs' spelling of None
        optional = "" if name in doc["parameters"]["required"] else f" = {default!r}"
        params.append(f"{name}: {_TYPES.get(spec['type'], spec['type'])}{optional}")
    return f"{doc['name']}({', '.join(params)})"


def _tool(doc, tool_docs, hint=True):
    """A function as an object. Officially, withheld functions come without the language hint."""
    if tool_docs == "full":
        language = " Note that the provided function is in Python 3 syntax."
        return {**doc, "description": doc["description"] + language * hint}
    about = doc["description"].split("Tool description: ")[-1]  # without the blurb on its class
    params = doc["parameters"]
    if tool_docs == "signature":
        about = about.split(". ")[0]
        params = {**params, "properties": {k: {"type": v["type"]} for k, v in params["properties"].items()}}
    return {"name": doc["name"], "description": about, "parameters": params}


def _listing(tools, tool_docs, call_format):
    lines = tool_docs == "signature" and call_format == "python"
    return "\n".join(signature(doc) if lines else json.dumps(_tool(doc, tool_docs)) for doc in tools)


def _system_text(tools, tool_docs):
    """The system message of the python style; "full" is the leaderboard's, from the package's templates."""
    if tool_docs != "full":
        return (
            "You help a user by calling functions. Reply with a list of calls and no other text:\n"
            "[first_function(param=value), second_function(param=value)]\n"
            "Write all arguments as keywords with literal values. You will see the results and can call "
            "again. When the user's message is dealt with, or something needed is missing, reply in plain "
            "words.\n\nFunctions:\n" + _listing(tools, tool_docs, "python"))
    official = _constants("default_prompts")
    part = dict(official.PROMPT_STYLE_TEMPLATES["classic"])
    part["tool_call_format"] = part["tool_call_no_tag"].format(
        output_format=official.OUTPUT_FORMAT_MAPPING["python"],
        param_types=official.PARAM_TYPE_MAPPING["python"])
    functions = json.dumps([_tool(doc, tool_docs) for doc in tools], indent=4)
    part["available_tools"] = part["available_tools"].format(format="json", functions=functions)
    return official.PROMPT_TEMPLATE_MAPPING["plaintext"].format(**part)


# ---- Calls: from a model's text to call strings ------------------------------------------------------------
@dataclass
class Call:
    """A call; `str(call)` is the string that the official decoder of its style gives, oddities included."""

    name: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    call_format: str = field(default="python", compare=False)

    def __str__(self):
        show, comma = (_show, ", ") if self.call_format == "python" else (repr, ",")
        keywords = [f"{key}={show(value)}" for key, value in self.kwargs.items()]
        return f"{self.name}({comma.join([*map(show, self.args), *keywords])})"


def _show(value):
    """The official prompting decoder keeps nested calls as dicts of dicts, so it writes such dicts as calls
    (an empty one fails), and it quotes the keys of the others without escapes."""
    if not isinstance(value, dict):
        return repr(value)
    if all(isinstance(v, dict) for v in value.values()):
        name, params = list(value.items())[0]
        return f"{name}({', '.join(f'{k}={_show(v)}' for k, v in params.items())})"
    return "{" + ", ".join(f"'{k}': {_show(v)}" for k, v in value.items()) + "}"


def _decode_python(text):
    text = text.strip("`\n ")
    text = ("" if text.startswith("[") else "[") + text
    text += "" if text.endswith("]") else "]"
    body = _parse(text.strip().strip("'"))
    return [_call(node) for node in ([body] if isinstance(body, ast.Call) else body.elts)]


def _parse(text):
    """Parsed as `eval` would, with its error texts, but not evaluated; without warnings on bad escapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile(text.lstrip(" \t"), "<string>", "eval", ast.PyCF_ONLY_AST, dont_inherit=True).body


def _call(node):
    parts, func, keywords = [], node.func, node.keywords
    while isinstance(func, ast.Attribute):
        parts, func = [func.attr, *parts], func.value
    parts = [func.id, *parts] if isinstance(func, ast.Name) else parts
    return Call(".".join(parts), (), {str(k.arg): _value(k.value, _decoded) for k in keywords})


def _value(node, other):
    """The value of a literal, in new objects: an API may keep a list and change it. `other` reads others."""
    match node:
        case ast.Constant(value=value) if value is not ...:
            return _bounded(value)
        case ast.List():
            return [_value(item, other) for item in node.elts]
        case ast.Tuple():
            return tuple(_value(item, other) for item in node.elts)
        case ast.Dict():
            return {_value(k, other): _value(v, other) for k, v in zip(node.keys, node.values)}
        case ast.BinOp():
            return _arithmetic(node)
    return other(node)


def _decoded(node):
    """What the official prompting decoder makes of an argument that is not a literal."""
    match node:
        case ast.Name():
            return node.id
        case ast.UnaryOp(operand=ast.Constant()):
            return -node.operand.value
        case ast.Call(keywords=[]):
            return ast.unparse(node)
        case ast.Call():
            call = _call(node)
            return {call.name: call.kwargs}
        case ast.Subscript():
            return f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]"
        case ast.Constant():
            return "..."
    raise ValueError(f"{type(node).__name__} is not a literal")


def _bounded(value):
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise ValueError(TOO_LONG)
    return value


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _arithmetic(node):
    match node:
        case ast.Constant(value=int() | float() | complex() as value):
            return _bounded(value)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            value = _arithmetic(node.operand)
            return -value if isinstance(node.op, ast.USub) else +value
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return _bounded(_OPERATORS[type(node.op)](_arithmetic(node.left), _arithmetic(node.right)))
    raise ValueError("only + - * / on numbers are computed")


def _write_python(calls):
    return f"[{', '.join(map(str, calls))}]"


def _decode_json(text):
    text, calls, end = text.split("</think>")[-1], [], 0
    opening, closing = "<tool_call>\n", "\n</tool_call>"
    # The official lazy regular expression finds the same, in quadratic time when closing tags are missing.
    while 0 <= (start := text.find(opening, end)) and 0 <= (end := text.find(closing, start + len(opening))):
        with contextlib.suppress(Exception):
            calls.append(json.loads(text[start + len(opening) : end]))
        end += len(closing)
    if any(type(call) is not dict for call in calls):
        raise ValueError("a tool call is not an object")
    return [json_call(call["name"], call["arguments"]) for call in calls]


def _write_json(calls):
    bodies = [json.dumps({"name": call.name, "arguments": call.kwargs}) for call in calls]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def json_call(name, arguments) -> Call:
    """A call from its parts as JSON gives them; `arguments` may be JSON text. Errors: any, if it is none."""
    if isinstance(name, (list, dict)):  # officially it becomes a dict's key: any scalar passes
        raise TypeError(f"{name!r} is no function name")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return Call(str(name), (), dict(arguments.items()), "json")


def _decode_llama(text):
    text = text.replace("<|python_tag|>", "")
    if ";" in text:
        calls = [json.loads(part) for part in text.split(";")]
    else:  # the official decoder evaluates this as Python, where `true` is an unknown name
        calls = _value(_parse(text), _strict)
        calls = [calls] if type(calls) is dict else calls
    return [Call(str(call["name"]), (), dict(call["parameters"].items()), "llama") for call in calls]


def _write_llama(calls):
    """Several calls are read as JSON, one alone as Python; none may hold the separator or a mark."""
    words = {"true": "True", "false": "False", "null": "None"} if len(calls) == 1 else {}
    bodies = []
    for call in calls:
        body = json.dumps({"name": call.name, "parameters": call.kwargs}, ensure_ascii=False)
        body = re.sub(r'"(?:[^"\\]|\\.)*"|[a-z]+', lambda m: words.get(m[0], m[0]), body)  # not in strings
        bodies.append(body.translate({ord(";"): "\\u003b", ord("|"): "\\u007c"}))
    return "; ".join(bodies)


@dataclass(frozen=True)
class CallFormat:
    """How calls are written in a message."""

    decode: Callable  # text -> list[Call], as an official handler does; errors: any
    write: Callable  # list[Call] -> a text that `decode` reads back
    native: bool  # the chat template shows the functions; else a system message does
    official: str  # a model of the leaderboard with this decoder
    marks: tuple = ()  # control tokens in such a text


CALL_FORMATS = {
    "python": CallFormat(_decode_python, _write_python, False, "Qwen/Qwen3-0.6B"),
    "json": CallFormat(_decode_json, _write_json, True, "Qwen/Qwen3-0.6B-FC", ("<tool_call>", "</tool_call>")),
    "llama": CallFormat(_decode_llama, _write_llama, True, "meta-llama/Llama-3.1-8B-Instruct-FC",
                   ("<|python_tag|>",)),
}


def parse_calls(text, call_format) -> list[Call]:
    """The calls in a model's text, decoded as the official handlers do. No calls and an error end a turn.

    python: the prompting decoder, for `[f(a=1), g()]`. Positional arguments are dropped, a bare name is a
            string (`true` is 'true'), any unary operator negates, the last of repeated keywords counts.
    json:   the Qwen function-calling decoder: `<tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>`
            blocks after the last </think>. A block of bad JSON is skipped.
    llama:  the Llama-3.1 function-calling decoder: one Python literal, `{"name": "f", "parameters": {}}` or a
            list of such, or several JSON objects between ";". `<|python_tag|>` is dropped.
    Unlike the official ones: a text over MAX_TEXT characters is an error, as are operators other than + - * /
    on number literals.
    Errors: CallSyntaxError and no other, whatever the text.

    >>> [str(call) for call in parse_calls("[cd(folder='a'), sort('b', file_name=c)]", "python")]
    ["cd(folder='a')", "sort(file_name='c')"]
    """
    decode = CALL_FORMATS[_choose("call format", call_format, CALL_FORMATS)].decode
    try:
        if len(text) > MAX_TEXT:
            raise ValueError(f"longer than {MAX_TEXT} characters")
        calls = decode(text)
        _ = [str(call) for call in calls]  # some values can be read but not written, for instance {}
        return calls
    except Exception as error:
        raise CallSyntaxError(f"{type(error).__name__}: {error}") from None


def write_calls(calls: list[Call], call_format):
    """One message that makes these calls: what `parse_calls(text, call_format)` reads back."""
    return CALL_FORMATS[call_format].write(calls)


def without_thoughts(text, call_format):
    """The part of a message that the official handlers of that style decode and store."""
    return text if call_format == "llama" else text.split("</think>")[-1].lstrip("\n")


# ---- Execution and judging ---------------------------------------------------------------------------------
_CALLEE = re.compile(r"\b([a-zA-Z_]\w*)\s*(?=\()")
# The official executor refuses calls of these names.
_DENIED = ("kill", "exit", "quit", "remove", "unlink", "popen", "Popen", "run")
_parse_often = functools.lru_cache(10_000)(_parse)  # a group's rollouts repeat each other's calls


class Episode:
    """A task's world in one rollout: its own instances, and the judge of each turn as it ends.

    player: part of the instances' names. The official executor puts an instance's name before every known
    function name that a parenthesis follows, even in a string argument; only there it can be seen.
    """

    def __init__(self, task: Task, player="model"):
        self.task, self.player, self.instances = task, player, pickle.loads(task.initial_state)
        self.own_methods = {name: _isolated(getattr(self.instances[task.functions[name]], name))
                            for name in ("post_tweet", "get_outside_temperature_from_google")
                            if name in task.functions}
        self.made = []  # (function, {parameter: value}) of all calls that could be read and bound
        self.found = Counter()  # result strings so far that the gold calls have too
        self.steps = 0  # executed steps of the open turn
        self.turn = self.passed = 0  # turns ended; turns that passed before the first failure
        self.failure = None  # (official error type, turn) of the first failure
        self.used = Counter()  # of LIMITS, by the running step

    def execute(self, calls) -> list[str]:
        """Execute a step's calls (`Call`s or strings). One result string a call, whatever the call."""
        results = self.run(calls)
        if calls not in ([], [""]):  # the official pipeline drops such steps
            self.steps += 1
        for result in results:
            if result in self.task.gold_replay.needed:
                self.found[result] += 1
        return results

    def run(self, calls) -> list[str]:
        """`execute`, without counting for the judge of the turn."""
        self.used.clear()
        with _kept_precision() if "MathAPI" in self.instances else contextlib.nullcontext():
            return [self._result(call) for call in calls]

    def use(self, what, amount):
        """Count work of the running step. Errors: ValueError over a bound of LIMITS."""
        self.used[what] += amount
        if self.used[what] > LIMITS[what]:
            raise ValueError(f"more than {LIMITS[what]} {what} in a step")

    def _result(self, call):
        try:
            self.use("calls", 1)
            self.use("characters of results", 0)  # when there is no more room, nothing is executed
            call = str(call)
            self.use("characters of calls", len(call))
            method, args, kwargs = self._read(call)
            if bound := _bound(method, args, kwargs):
                self.made.append(copy.deepcopy(bound) if "[" in call or "{" in call else bound)
            self._check_work(method, args, kwargs, len(call))
            result = _shown(method(*args, **kwargs))
            self.use("characters of results", len(result))
            return result
        except Exception as error:  # its text is not counted: 200 calls make 20 million characters at most
            return f"{ERROR}{error}"

    def _read(self, call):
        """(method, args, kwargs) of a call string. Only public methods of the task's classes can come out."""
        callee, _, rest = call.partition("(")
        plain = callee in self.task.functions and "(" not in rest
        if not plain:  # then it matters what the official executor makes of the text
            call = _CALLEE.sub(self._prefixed, call)
            callee = call.partition("(")[0]
            callee = callee.split(".")[1] if "." in callee else callee
            if callee in _DENIED:
                raise ValueError(f"Function call {callee} is not allowed.")
        node = (_parse_often if len(call) < 500 else _parse)(call)
        if not isinstance(node, ast.Call):
            raise _unreadable(node)
        names = [keyword.arg for keyword in node.keywords]
        if len(names) != len(set(names)):
            repeated = next(name for i, name in enumerate(names) if name in names[:i])
            raise SyntaxError(f"keyword argument repeated: {repeated} (<string>, line 1)")
        known = callee in self.task.functions
        if not known or not plain and ast.unparse(node.func) != self._prefixed(callee):
            raise _unreadable(node.func)
        method = self.own_methods.get(callee) or getattr(self.instances[self.task.functions[callee]], callee)
        args = [_value(arg, _strict) for arg in node.args]
        return method, args, {k.arg: _value(k.value, _strict) for k in node.keywords}

    def _prefixed(self, name):
        name = name if isinstance(name, str) else name[1]
        if name not in self.task.functions:
            return name
        instance = f"{self.player}_eval_{self.task.id}_{self.task.functions[name]}_instance"
        return f"{re.sub(r'[-./:]', '_', instance)}.{name}"

    def bound(self, call) -> tuple[str, dict] | None:
        """(function, {parameter: value}) of a call string; None if it cannot be called like that."""
        try:
            return _bound(*self._read(call))
        except Exception:
            return None

    def public_state(self):
        """A copy of what the official checker compares: class -> {public attribute: value}."""
        return copy.deepcopy({name: {k: v for k, v in vars(instance).items() if not k.startswith("_")}
                              for name, instance in self.instances.items()})

    def in_state(self, state):
        return all(vars(self.instances[name])[k] == v for name in state for k, v in state[name].items())

    def _error(self):
        """The official error type of the open turn, in the official order of checks; None if it passes."""
        gold, replay = self.task.gold[self.turn], self.task.gold_replay
        if not gold:
            return None  # no check at all; what the model does here shows in the state of the next turn
        if not self.steps:
            return "multi_turn:empty_turn_model_response"
        if not self.in_state(replay.states[self.turn]):
            return "multi_turn:instance_state_mismatch"
        if any(self.found[r] < n for r, n in replay.results[self.turn].items()):  # found in any turn so far
            return "multi_turn:execution_response_mismatch"
        return None

    def _judged(self):
        """(turn, passed, failure) with the open turn counted in."""
        if self.failure or self.turn >= len(self.task.gold):
            return self.turn + 1, self.passed, self.failure
        if error := self._error():
            return self.turn + 1, self.passed, (error, self.turn)
        return self.turn + 1, self.passed + 1, None

    def end_turn(self):
        """Judge the open turn and open the next."""
        self.turn, self.passed, self.failure = self._judged()
        self.steps = 0

    def verdict(self, open_turn=False) -> "Verdict":
        """The verdict so far. open_turn: count the open turn as recorded (the rollout was cut off)."""
        turns, passed, failure = self._judged() if open_turn else (self.turn, self.passed, self.failure)
        if turns != len(self.task.gold):
            failure = ("multi_turn:force_terminated", None)
        replay = self.task.gold_replay
        error_type, turn = failure or (None, None)
        return Verdict(not failure, error_type, turn, state=self.in_state(replay.states[-1]),
                       action=_covers(self.made, replay.calls), progress=passed / len(self.task.gold))

    def _check_work(self, method, args, kwargs, length):
        """Refuse the calls that take minutes or gigabytes in C code, which nothing could interrupt."""
        given = dict(zip(_parameters(method.__func__), args)) | kwargs
        match method.__name__:
            case "find" | "du":
                world = method.__self__
                for tree in {id(tree): tree for tree in (world.root, world._current_dir)}.values():
                    self._walk(tree, length)
            case "power":
                base, exponent = given.get("base"), given.get("exponent")
                if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
                    if base.bit_length() * exponent > 2 * MAX_INT.bit_length():
                        raise ValueError(TOO_LONG)  # officially after minutes, when it cannot be printed
            case "logarithm" | "square_root" | "round_number":
                digits = 0
                with contextlib.suppress(TypeError, ValueError, OverflowError):  # the method reports those
                    digits = abs(int(given.get("precision", given.get("decimal_places"))))
                self.use("digits", digits)
                for text in (given.get("value"), given.get("base")):  # mpmath writes "1e999999999" out
                    if isinstance(text, str) and re.search(r"e[\s\d_+-]{6}", text.lower()):
                        raise ValueError("a number with a long exponent")

    def _walk(self, directory, prefix):
        """Count the paths below a directory. Copies of a directory share its subdirectories: a few calls of
        cp make 2^n paths, or endless ones."""
        todo = [(directory, prefix)]
        while todo:  # without recursion: a chain of directories can be deep
            directory, length = todo.pop()
            for name, item in directory.contents.items():
                path = length + 1 + len(str(name))
                self.use("characters of files", path + len(str(getattr(item, "content", ""))))
                if hasattr(item, "contents"):
                    todo.append((item, path))


@functools.cache
def _public_methods(class_name):
    members = inspect.getmembers(_api_class(class_name), inspect.isfunction)
    return [name for name, _ in members if not name.startswith("_")]


@functools.cache
def _parameters(function):
    return list(inspect.signature(function).parameters)[1:]


def _shown(value):
    """A method's value as the official executor writes it."""
    if type(value) is dict:
        try:
            return json.dumps(value)
        except Exception:  # numbers of mpmath and decimal
            pass
    return str(value)


def _bound(method, args, kwargs):
    names = _parameters(method.__func__)
    named = dict(zip(names, args))
    if len(args) <= len(names) and all(k in names and k not in named for k in kwargs):
        return method.__name__, named | kwargs


def _isolated(method):
    """The method with its own copy of what changes outside its instance: `mention` extends the default lists
    of post_tweet, and the long_context weather report is a module-level dict."""
    f = method.__func__
    own = {k: dict(v) for k, v in f.__globals__.items() if k == "LONG_WEATHER_EXTENSION"}
    function = types.FunctionType(f.__code__, f.__globals__ | own, f.__name__, copy.deepcopy(f.__defaults__))
    return types.MethodType(function, method.__self__)


def _strict(node):
    """The values that calls may have beside those of `_value`."""
    match node:
        case ast.UnaryOp():
            return _arithmetic(node)
        case ast.Set():
            return {_value(item, _strict) for item in node.elts}
    raise _unreadable(node)


def _unreadable(node):
    """Why a node is not evaluated: mostly, as `eval` says too, since its leftmost name is unknown."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Name) and not node.id.endswith("_instance"):
        return NameError(f"name {node.id!r} is not defined")
    return TypeError("only calls with literal arguments are executed")


@contextlib.contextmanager
def _kept_precision():
    """MathAPI sets the process's precision of mpmath and decimal."""
    mpmath = importlib.import_module("mpmath")
    with mpmath.workprec(mpmath.mp.prec), decimal.localcontext():
        yield


@dataclass
class Verdict:
    """What a checker says. The official fields are None under the paper's protocol."""

    valid: bool | None
    error_type: str | None  # official string; None if valid
    turn: int | None  # 0-based; None if valid or if the error is not a turn's
    state: bool  # the paper's R_state: the final public state is the one of the gold calls
    action: bool  # the paper's R_action: every gold call was made
    progress: float | None  # turns that passed before the first failure / turns

    def reward(self, kind):
        """official: valid; paper: R_state * R_action; progress. Errors: BfclError if there is none."""
        values = {"official": self.valid, "paper": self.state and self.action, "progress": self.progress}
        if values[_choose("reward", kind, REWARDS)] is None:
            raise BfclError(f"the paper protocol has no {kind!r} reward; use --reward paper")
        return float(values[kind])


def _covers(made, gold):
    """R_action: each gold call has a call of its own with the same name and (at least) the same parameters.

    Not greedy: f(x=1, y=2) can serve f(x=1) or f(y=2), so servers may have to move (augmenting paths).
    """
    names = {name for name, _ in gold}
    made, serves = [call for call in made if call[0] in names], {}

    def place(g, tried):
        for m, (name, params) in enumerate(made):
            if m not in tried and name == gold[g][0] and params.items() >= gold[g][1].items():
                tried.add(m)
                if m not in serves or place(serves[m], tried):
                    serves[m] = g
                    return True
        return False

    return all(place(g, set()) for g in range(len(gold)))


def judge(task: Task, turns: list[list[list[str]]]) -> Verdict:
    """The verdict on recorded calls: `turns` is list[turn][step][call string], of any length."""
    episode = Episode(task)
    for turn in turns:
        for step in turn:
            episode.execute(step)
        episode.end_turn()
    return episode.verdict()


# ---- The world as a sampler sees it ------------------------------------------------------------------------
@dataclass
class StepResult:
    """The world's answer to one text of the model."""

    results: list[str]  # one a call
    next_user: str | None  # the next user message, if the turn has ended and another follows
    done: bool
    reason: str | None  # if done: "done" or "force_quit"
    calls: tuple = ()  # as executed


class BfclEnv:
    """A conversation about one task.

    official: turn by turn, as on the leaderboard. A text without calls ends the turn, MAX_STEPS executed
              steps in a turn end the conversation; withheld functions come as their turn's user message.
    paper:    all user turns in one message; a function done() ends the conversation (arXiv 2602.03025).
              Assumed where the paper is silent: withheld functions are there from the start, their turn is
              skipped; vague turns stay, followed by their clarification; calls after done() are not
              executed; a text without calls ends the conversation, as do MAX_STEPS steps; there is only the
              paper's reward.
    """

    def __init__(self, task, tool_docs="signature", call_format="python", protocol="official"):
        self.id = task.id
        self.task, self.tool_docs, self.call_format = task, _choose("tool docs", tool_docs, TOOL_DOCS), _choose("call format", call_format, CALL_FORMATS)
        self.merged = _choose("protocol", protocol, PROTOCOLS) == "paper"
        self.episode = Episode(task)
        self.turns = [[]]  # [turn][step][call string]; judge(task, env.turns) == env.verdict()
        self.done = False

    def messages(self) -> list[dict]:
        """System and user message; in a native style one with "tools", which the chat template renders."""
        tools, user = self.task.docs, self.task.turns[0]
        if self.merged:
            steps = [text for text in self.task.turns if text is not None]
            user = "\n".join(f"Step {n}: {text}" for n, text in enumerate(steps, 1))
            user += "\n\nComplete all the steps above, in order, then call done()."
            tools = tools + [_DONE]
        else:
            withheld = sum(self.task.withheld.values(), [])
            tools = [doc for doc in tools if doc["name"] not in withheld]
        if CALL_FORMATS[self.call_format].native:
            return [{"role": "user", "content": user, "tools": [_tool(doc, self.tool_docs) for doc in tools]}]
        return [{"role": "system", "content": _system_text(tools, self.tool_docs)},
                {"role": "user", "content": user}]

    def step(self, text) -> StepResult:
        """Execute the calls in a model's text; without calls, end the turn. Errors: BfclError when done."""
        if self.done:
            raise BfclError("this conversation is over; make a new BfclEnv")
        try:
            calls = [str(call) for call in parse_calls(without_thoughts(text, self.call_format), self.call_format)]
        except CallSyntaxError:
            calls = []
        ended, next_user, reason = not calls, None, None
        if self.merged and "done()" in calls:
            calls, ended = calls[: calls.index("done()")], True
        results = self.episode.execute(calls) if calls else []
        self.turns[-1] += [calls] if calls else []
        if ended and not self.merged and len(self.turns) < len(self.task.turns):
            next_user = self._next_user()
        elif ended or len(self.turns[-1]) == MAX_STEPS:
            self.done, reason = True, "done" if ended else "force_quit"
        if self.done or next_user is not None:
            self.episode.end_turn()
            self.turns += [] if self.done else [[]]
        return StepResult(results, next_user, self.done, reason, calls)

    def _next_user(self):
        """The next turn's text, or its withheld functions in the prompting and Qwen FC handlers' words."""
        turn = len(self.turns)
        if turn not in self.task.withheld:
            return self.task.turns[turn]
        tools = [doc for name in self.task.withheld[turn] for doc in self.task.docs if doc["name"] == name]
        full = str([_tool(doc, "full", hint=False) for doc in tools])
        listing = full if self.tool_docs == "full" else _listing(tools, self.tool_docs, self.call_format)
        official = _constants("default_prompts").DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING
        return official.format(functions=listing)

    def verdict(self) -> Verdict:
        """The verdict so far, from the live episode. A turn that was cut off counts as recorded."""
        verdict = self.episode.verdict(open_turn=not self.done)
        none = dict(valid=None, error_type=None, turn=None, progress=None)
        return dataclasses.replace(verdict, **none) if self.merged else verdict


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations of flags and says the new name of a retired one."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        for word in message.split():
            flag = word.partition("=")[0]
            if message.startswith("unrecognized arguments") and flag in RETIRED_FLAGS:
                message = f"{flag} is now called {RETIRED_FLAGS[flag]}"
                break
        super().error(message)


# ---- Flags that choose tasks and their world ---------------------------------------------------------------
def add_env_flags(parser: argparse.ArgumentParser, split="train", tasks=""):
    """The flags of all scripts that choose tasks and their world. split, tasks: the script's defaults."""
    group = parser.add_argument_group("environment")

    def add(flag, default, text, **rest):
        group.add_argument(flag, default=default, help=f"{text} (default: %(default)s)", **rest)

    add("--tool_docs", "signature", "tool docs: 4k to 10k, 1.4k to 4k or 0.2k to 0.7k tokens", choices=TOOL_DOCS)
    add("--call_format", "auto", "how calls are written; auto: as the chat template does, or python",
        choices=("auto", *CALL_FORMATS))
    add("--protocol", "official", "turn by turn, or all turns in one message", choices=PROTOCOLS)
    add("--reward", "official", "the checker's verdict, final state x calls made, or share of turns passed",
        choices=REWARDS)
    add("--split_by", "family", "whole families, or the paper's random split, which leaks", choices=SPLIT_BY)
    add("--split", split, "the part of the tasks", choices=("train", "val", "test", "all"))
    add("--categories", ",".join(CATEGORIES), "categories, comma-separated")
    add("--tasks", tasks, "task ids, comma-separated, in place of --split and --categories")
    add("--max_tasks", 0, "number of tasks, spread evenly over those chosen; 0 is all", type=int)


def make_env_fn(args: argparse.Namespace, call_format):
    """make_env(task) -> a new conversation about it, in the world that the flags choose."""
    return functools.partial(BfclEnv, tool_docs=args.tool_docs, call_format=call_format, protocol=args.protocol)


def select_tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks that the flags choose. Errors: BfclError for unknown ids or categories, or no task left."""
    def items(text):
        return [item.strip() for item in text.split(",") if item.strip()]

    if args.protocol == "paper" and args.reward != "paper":
        raise BfclError(f"the paper protocol has no {args.reward!r} reward: add --reward paper")
    known = {task.id: task for task in load_tasks()}
    for name in items(args.tasks):
        if name not in known:
            raise BfclError(f"unknown task {name!r}; ids are a category and a number from 0 to 199, for "
                            f"instance --tasks multi_turn_base_0 (categories: {', '.join(CATEGORIES)})")
    tasks = [known[name] for name in items(args.tasks)] or load_tasks(items(args.categories))
    if args.split != "all" and not items(args.tasks):
        tasks = split(tasks, args.split_by)[args.split]
    if not tasks or args.max_tasks < 0:
        raise BfclError(f"no tasks are left with --categories {args.categories!r} --split_by {args.split_by} "
                        f"--split {args.split} --max_tasks {args.max_tasks}; try --split all --max_tasks 0")
    count = min(args.max_tasks, len(tasks)) or len(tasks)
    return [tasks[i * len(tasks) // count] for i in range(count)]


def fix_hash_seed():
    """Start the process anew with a fixed hash seed, which Python reads only at its start: some results of
    the benchmark print sets, and a resumed run must see them in the same order."""
    if "PYTHONHASHSEED" not in os.environ:
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, sys.orig_argv)
