"""Policy rules: CEL conditions over a call's facts, compiled once and evaluated within bounds.

The library has no limit of its own on an expression, and a deeply nested one ends the process. So an
expression's shape is measured before the library sees it: how deep it nests, how many times it can walk
how much. What would cost too much for the facts at hand is not evaluated and counts as failed, which for
`allow` means not matched and for the other two matched.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, Struct

from corral.governance.facts import CallFacts, shell_value
from corral.protocol.types import PolicyRule

if TYPE_CHECKING:
    import cel

MAX_RULES = 200
"""Rules in one layer."""
MAX_DEPTH = 120
"""How deep an expression may nest, in steps of the library's recursion; beyond 200 it overflows a 256 KiB stack."""
MAX_JOINS = 8
"""`+` in one expression: each may double a text or a list."""
MAX_NESTED_MACROS = 2
MAX_CHARACTERS = 64 * 1024 * 1024
"""Characters that one text can grow to by joining."""
DECISION_BUDGET = 200_000
"""What all rules of one decision may cost together; a unit is about 1 µs."""

FACTS = frozenset({"tool", "risk", "args", "session", "actor", "shell", "argv", "path", "url"})


class RuleProblem(ValueError):
    """An expression that is no condition, or one that could not be evaluated within bounds."""


# ---- the library


_loading = threading.Lock()


@lru_cache(maxsize=1)
def _cel() -> ModuleType:
    """The library, without its command line: that would take 0.8 s of the first decision, and 25 MiB.

    The package imports its `cli` module, and with it terminal libraries, before anything else. An empty
    module stands in for it during the import and is taken away again.
    """
    with _loading:
        if "cel" not in sys.modules and "cel.cli" not in sys.modules:
            sys.modules["cel.cli"] = ModuleType("cel.cli")
            try:
                import cel
            finally:
                del sys.modules["cel.cli"]
            vars(cel).pop("cli", None)
        import cel

        return cel


# ---- the shape of an expression


class Shape(Struct, kw_only=True, frozen=True):
    """What an expression can cost: `weights[d]` units for each round of `d` nested macros."""

    weights: tuple[int, ...]
    widest: int
    joins: int

    def cost(self, size: Size) -> int:
        """Units for facts of this size."""
        rounds = max(size.items, self.widest) << self.joins
        characters = size.characters << self.joins
        if characters > MAX_CHARACTERS:
            return DECISION_BUDGET + 1
        units: int = sum(weight * rounds**depth for depth, weight in enumerate(self.weights))
        return (1 + characters // 65536) * units


class Size(Struct, kw_only=True):
    """Of some facts: the items of the longest list or object, the characters of the longest text."""

    items: int = 1
    characters: int = 0

    def add(self, value: Any) -> None:
        if isinstance(value, str):
            self.characters = max(self.characters, len(value))
        elif isinstance(value, dict | list):
            self.items = max(self.items, len(value))
            for item in value.values() if isinstance(value, dict) else value:
                self.add(item)


# Strings as CEL's grammar has them, to the letter: what were a string here and code there would hide its brackets.
_ESCAPE = r"""\\(?:[abfnrtv"'`?\\]|[xX][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-3][0-7]{2})"""
_STRING = "|".join(
    [
        *(rf"[rR]{quote * 3}[\s\S]*?{quote * 3}|[rR]{quote}[^{quote}\r\n]*{quote}" for quote in "'\""),
        *(
            rf"{quote * 3}(?:[^\\]|{_ESCAPE})*?{quote * 3}|{quote}(?:[^\\{quote}\r\n]|{_ESCAPE})*{quote}"
            for quote in "'\""
        ),
    ]
)
_TOKEN = re.compile(
    rf"""[ \t\r\n\f]+ | //[^\n]*
      | (?P<text>[bB]?(?:{_STRING}))
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*) | (?P<number>[0-9][0-9A-Za-z.]*)
      | (?P<sign>&&|\|\||==|!=|<=|>=|[-+*/%<>=!?:.,()\[\]{{}}])""",
    re.VERBOSE,
)
_MACROS = frozenset({"all", "exists", "exists_one", "existsOne", "map", "filter"})
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_FLAT = frozenset({"&&", "||", ","})
_BRACKET_DEPTH = 5
_COUNTED = re.compile(r"\{\s*[0-9]")


class _Level(Struct):
    """One pair of brackets: steps of the running part, the deepest seen below it, the deepest part so far."""

    opened_by: str = ""
    macro: bool = False
    steps: int = 0
    below: int = 0
    deepest: int = 0
    items: int = 0

    def end_part(self) -> None:
        self.deepest = max(self.deepest, self.steps + self.below)
        self.steps = self.below = 0


class _Measuring:
    def __init__(self) -> None:
        self.levels = [_Level()]
        self.weights = [0] * (MAX_NESTED_MACROS + 1)
        self.macros = self.joins = self.widest = 0

    def take(self, sign: str, before: str) -> None:
        level = self.levels[-1]
        if sign in _OPENING:
            macro = sign == "(" and before in _MACROS
            self.macros += macro
            if self.macros > MAX_NESTED_MACROS:
                raise RuleProblem(f"more than {MAX_NESTED_MACROS} macros (all, exists, map, …) inside each other")
            self.levels.append(_Level(opened_by=sign, macro=macro))
        elif sign in _CLOSING:
            if len(self.levels) == 1:
                raise RuleProblem(f"a {sign} without its opening")
            level = self.levels.pop()
            level.end_part()
            self.macros -= level.macro
            self.widest = max(self.widest, level.items + 1)
            outer = self.levels[-1]
            outer.below = max(outer.below, level.deepest + _BRACKET_DEPTH)
            outer.steps += 1
        elif sign in _FLAT or (sign == ":" and level.opened_by == "{"):
            level.items += sign == ","
            level.end_part()
        else:
            self.joins += sign == "+"
            level.steps += 1

    def weigh(self, units: int) -> None:
        self.weights[self.macros] += units

    def shape(self) -> Shape:
        (outermost,) = self.levels
        outermost.end_part()
        if outermost.deepest > MAX_DEPTH:
            raise RuleProblem("it nests too deep, or joins too much into one term")
        if self.joins > MAX_JOINS:
            raise RuleProblem(f"more than {MAX_JOINS} times +")
        return Shape(weights=tuple(self.weights), widest=self.widest, joins=self.joins)


def measure(text: str) -> Shape:
    """The shape of an expression. Raises RuleProblem for one that must not be given to the library."""
    measuring = _Measuring()
    position, before = 0, ""
    # A pattern is compiled anew at each evaluation; with counted repetitions that takes milliseconds.
    pattern_cost = 5000 if _COUNTED.search(text) else 100 + len(text)
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise RuleProblem(f"cannot be read at character {position + 1}: {text[position : position + 20]!r}")
        position = found.end()
        if found.lastgroup is None:
            continue
        measuring.weigh(pattern_cost if found[0] == "matches" else 1)
        if found.lastgroup == "sign" or found[0] == "in":
            measuring.take(found[0], before)
        before = found[0]
    if len(measuring.levels) != 1:
        raise RuleProblem("a bracket is not closed")
    return measuring.shape()


# ---- compiled conditions


class Condition(Struct, kw_only=True, frozen=True):
    """A compiled `when`: the facts it names, its shape and its program."""

    program: Any
    names: frozenset[str]
    shape: Shape


@lru_cache(maxsize=4096)
def _compiled(when: str) -> Condition | str:
    """The condition, or what is wrong with it. Kept by its text, which is all that it depends on."""
    try:
        shape = measure(when)
    except RuleProblem as problem:
        return str(problem)
    library = _cel()
    try:
        program: cel.Program = library.compile(when)
    except ValueError as error:
        return _first_line(str(error))
    names = frozenset(program.variables()) & FACTS
    return Condition(program=program, names=names, shape=shape)


def compile_condition(when: str) -> Condition:
    """The condition of a rule. Raises RuleProblem with what is wrong."""
    found = _compiled(when)
    if isinstance(found, str):
        raise RuleProblem(found)
    return found


def _first_line(message: str) -> str:
    """The parser's complaint without the expression, which it repeats."""
    found = re.search(r"ERROR: <input>:(\d+):(\d+): ([^\n]*)", message)
    return f"line {found[1]}, column {found[2]}: {found[3]}" if found else message.splitlines()[0][:300]


# ---- evaluation


class Match(Struct, kw_only=True, frozen=True):
    """A rule that holds for a call. `why`: what else than a true condition made it hold, if anything."""

    rule: PolicyRule
    why: str | None = None


class Evaluation:
    """One decision's evaluation: facts are converted once, and all rules share one budget."""

    def __init__(self, facts: CallFacts) -> None:
        self._facts = facts
        self._left = DECISION_BUDGET
        self._values: dict[str, Any] = {}
        self._context: Any = None
        self._loose_context: Any = None
        self._size = Size()

    def matching(self, rules: Iterable[PolicyRule]) -> list[Match]:
        """Those of `rules` that hold for the call, in their order."""
        return [match for rule in rules if (match := self.match(rule)) is not None]

    def match(self, rule: PolicyRule) -> Match | None:
        """The match, None if the rule does not hold."""
        tool = self._facts.tool
        if not any(pattern in ("*", tool) or fnmatchcase(tool, pattern) for pattern in rule.tools):
            return None
        if rule.when is UNSET:
            return Match(rule=rule)
        condition = _compiled(rule.when)
        result = None if isinstance(condition, str) else self._evaluate(condition, loose=False)
        if result is True:
            return Match(rule=rule)
        if rule.action == "allow":
            return None
        if result is None:
            return Match(rule=rule, why="its condition could not be evaluated")
        # A text that is not simple has no commands, by the contract. A rule that restricts must not be
        # lost by that: it is asked again about all that looks like a command in the text.
        if (
            isinstance(condition, Condition)
            and "shell" in condition.names
            and self._facts.shell is not None
            and not self._facts.shell.simple
            and self._evaluate(condition, loose=True) is not False
        ):
            return Match(rule=rule, why="the text is not simple, and holds what looks like it")
        return None

    def _evaluate(self, condition: Condition, *, loose: bool) -> bool | None:
        """True or False, None for whatever else: a failure, another type, too much to do."""
        if loose and (self._facts.shell is None or self._facts.shell.lookalikes is None):
            return None
        try:
            context = self._ready(condition.names, loose=loose)
            self._left -= condition.shape.cost(self._size)
            if self._left < 0:
                return None
            result = condition.program.execute(context)
        except Exception:
            # Whatever it was: by the contract a failure is an answer.
            return None
        except BaseException as error:
            # The library's own crash is no Exception, so that nobody takes it for one; here it is one.
            if type(error).__name__ != "PanicException":
                raise
            return None
        return result if isinstance(result, bool) else None

    def _ready(self, names: frozenset[str], *, loose: bool) -> Any:
        """A context with the facts of that name. A fact that is missing stays unknown to the expression."""
        if self._context is None:
            self._context = _cel().Context()
        for name in names - self._values.keys():
            try:
                value = self._facts.value(name)
            except KeyError:
                self._values[name] = None
                continue
            self._context.add_variable(name, value)
            self._values[name] = value
            self._size.add(value)
        if not loose:
            return self._context
        if self._loose_context is None:
            self._loose_context = _cel().Context()
            assert self._facts.shell is not None
            assert self._facts.shell.lookalikes is not None
            value = shell_value(False, self._facts.shell.lookalikes)
            self._loose_context.add_variable("shell", value)
            self._size.add(value)
        for name in names - {"shell"}:
            if self._values[name] is not None:
                self._loose_context.add_variable(name, self._values[name])
        return self._loose_context
