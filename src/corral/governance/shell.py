"""What a shell text runs, where that can be said for certain: `shell.simple` and `shell.commands`.

A text is simple if two readers that know nothing of each other agree on every byte of it: a strict
scanner that takes the text apart into words, quotes and separators and gives up at anything else, and
the bash grammar of tree-sitter. What bash, dash and the two readers could read differently is not
simple, and so is what is too long to be judged in time: then a rule that allows does not match.
"""

from __future__ import annotations

import re
import sys
import threading
from functools import lru_cache
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

MAX_TEXT = 32 * 1024
"""Characters of a text that can be simple. A longer one is not: allow rules do not match it."""
MAX_COMMANDS = 256
MAX_WORDS = 4096
MAX_LOOKALIKES = 512


class Command(Struct, kw_only=True, frozen=True):
    """`argv` is what execve gets; `name` is `argv[0]` as written, `base` its last component."""

    name: str
    base: str
    argv: tuple[str, ...]


class ShellFacts(Struct, kw_only=True, frozen=True):
    """`commands` is empty unless `simple`.

    `lookalikes` is for denials alone: what in a text that is not simple looks like a command, found
    by a reader that would rather see too many than too few; None if there are too many to be judged.
    """

    simple: bool
    commands: tuple[Command, ...] = ()
    lookalikes: tuple[Command, ...] | None = ()


@lru_cache(maxsize=32)
def parse(text: str) -> ShellFacts:
    """The facts of one text as `bash -c` gets it. Linear in the text's length; kept, as a call is judged twice."""
    raw = _scan(text)
    if raw is not None and _grammar_agrees(text, raw):
        return ShellFacts(simple=True, commands=tuple(_command([_unquoted(word) for word in words]) for words in raw))
    return ShellFacts(simple=False, lookalikes=_lookalikes(text))


def _command(argv: list[str]) -> Command:
    return Command(name=argv[0], base=argv[0].rstrip("/").rpartition("/")[2], argv=tuple(argv))


# ---- the strict reader

# Letters of other scripts that show as nothing: a person could not tell such a word from another.
_INVISIBLE = frozenset("\u115f\u1160\u3164\uffa0")
# macOS takes these bytes for blanks in UTF-8 locales, also inside of a letter: bash would split the word.
_SPLITTING = re.compile(rb"[\x85\xa0]") if sys.platform == "darwin" else None

# A word: plain characters, '…' and "…" next to each other. Left out of the plain ones, because they mean
# something to some shell at some place: ! # $ & ( ) * ; < > ? [ \ ] ` { | } ~ and blanks.
_WORD = re.compile(
    r"""(?:[^\x00-\x24\x26-\x2a\x3b\x3c\x3e\x3f\x5b-\x5d\x60\x7b-\x7f]++|'[^'\n]*+'|"[^"$`\\!\n]*+")++"""
)
_SEPARATOR = re.compile(r"&&|\|\|(?![|&])|\|(?![|&])|;(?![;&|])|\n")
_SPACES = re.compile(r" *+")
# A command's name stands without quotes, and is nothing that could be an assignment or a job. Declarations
# read their arguments as assignments.
_NAME = re.compile(r"""[^=%^'"]++""")
_DECLARING = frozenset({"declare", "typeset", "export", "readonly", "local", "unset"})
_RESERVED = _DECLARING | {
    *("if", "then", "else", "elif", "fi", "case", "esac", "for", "select", "while", "until", "do", "done", "in"),
    *("function", "time", "coproc"),
}
# Builtins that take the name of a variable evaluate it: `read 'a[$(rm x)]'` runs `rm x`, quoted as it is, and
# `printf -v PATH x; ls` decides which `ls` it is. Some do so with an option alone.
_EVALUATING = frozenset({"read", "mapfile", "readarray", "let", "getopts", "compgen"})
_EVALUATING_OPTIONS = {"printf": re.compile("-v"), "test": re.compile("-[vR]$"), "wait": re.compile("-[a-zA-Z]*p")}
# These change how the shell reads what follows: with anything beside them the words are not certain.
_REREADING = frozenset({"alias", "unalias", "set", "shopt", "enable", "hash", "trap"})
_HARMLESS_SET = re.compile(r"-[eux]+|-[eux]*o|pipefail")


def _scan(text: str) -> list[list[str]] | None:
    """The commands' words as written, None if the text is not simple."""
    if len(text) > MAX_TEXT or not _characters_allowed(text):
        return None
    commands: list[list[str]] = []
    words: list[str] = []
    open_end = False  # after && || | something has to follow
    position = 0
    count = 0
    while position < len(text):
        if found := _WORD.match(text, position):
            count += 1
            if count > MAX_WORDS or (not words and not _can_be_name(found[0])):
                return None
            words.append(found[0])
            open_end = False
        elif found := _SEPARATOR.match(text, position):
            if words:
                commands.append(words)
                words = []
                open_end = found[0] not in (";", "\n")
            elif found[0] != "\n":
                return None
        else:
            found = _SPACES.match(text, position)
            if found is None or not found[0]:
                return None
        position = found.end()
    if words:
        commands.append(words)
    if open_end or not 0 < len(commands) <= MAX_COMMANDS:
        return None
    if len(commands) > 1 and any(_changes_reading(each) for each in commands):
        return None
    if any(_evaluates(each) for each in commands):
        return None
    return commands


def _characters_allowed(text: str) -> bool:
    if text.isascii():
        return all(" " <= char <= "~" or char == "\n" for char in set(text))
    for char in set(text):
        if not (" " <= char <= "~" or char == "\n" or (char > "\x7f" and char.isalpha() and char not in _INVISIBLE)):
            return False
    return _SPLITTING is None or _SPLITTING.search(text.encode()) is None


def _can_be_name(word: str) -> bool:
    return _NAME.fullmatch(word) is not None and word not in _RESERVED


def _evaluates(words: list[str]) -> bool:
    """Whether a builtin would take one of its words for more than text: a variable to be set or looked at."""
    if words[0] in _EVALUATING:
        return True
    option = _EVALUATING_OPTIONS.get(words[0])
    # Wherever it stands: `test` has its operators between operands, and only the builtin knows where options end.
    return option is not None and any(option.match(_unquoted(word)) for word in words[1:])


def _changes_reading(words: list[str]) -> bool:
    if words[0] == "set":
        return not all(_HARMLESS_SET.fullmatch(word) for word in words[1:])
    return words[0] in _REREADING


_PART = re.compile(r"""'([^']*)'|"([^"]*)"|([^'"]+)""")


def _unquoted(word: str) -> str:
    if "'" not in word and '"' not in word:
        return word
    return "".join(found[found.lastindex or 0] for found in _PART.finditer(word))


# ---- the grammar

_GROUPS = frozenset({"program", "list", "pipeline"})
_SEPARATORS = frozenset({";", "\n", "&&", "||", "|"})
_PLAIN = frozenset({"word", "number", "raw_string"})
_parsers = threading.local()


def _parser() -> Parser:
    """This thread's parser. Loaded with the first text: start-up does without."""
    if (ready := getattr(_parsers, "parser", None)) is not None:
        return ready  # type: ignore[no-any-return]
    import tree_sitter
    import tree_sitter_bash

    _parsers.parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))
    return _parsers.parser  # type: ignore[no-any-return]


def _grammar_agrees(text: str, commands: list[list[str]]) -> bool:
    """Whether the grammar sees these commands with these words, and nothing else."""
    data = text.encode()
    root = _parser().parse(data).root_node
    if root.has_error:
        return False
    seen: list[list[bytes]] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.type in _GROUPS:
            waiting.extend(reversed(node.children))
        elif node.type == "command":
            words = [_literal(child, data) for child in node.children]
            if None in words:
                return False
            seen.append([word for word in words if word is not None])
        elif node.type not in _SEPARATORS:
            return False
    return seen == [[word.encode() for word in words] for words in commands]


def _literal(node: Node, data: bytes) -> bytes | None:
    """The bytes of a word that is nothing but literal, None for any other node."""
    kind = node.type
    if kind == "command_name":
        return _literal(node.children[0], data) if len(node.children) == 1 else None
    if (kind in _PLAIN and not node.children) or (kind == "string" and _plain_string(node)):
        return data[node.start_byte : node.end_byte]
    if kind == "concatenation" and all(
        (part.type in _PLAIN and not part.children) or (part.type == "string" and _plain_string(part))
        for part in node.children
    ):
        return data[node.start_byte : node.end_byte]
    return None


def _plain_string(node: Node) -> bool:
    return all(child.type in ('"', "string_content") and not child.children for child in node.children)


# ---- the reader for denials

# Wherever a command could begin, quoted or not.
_BEGINNING = re.compile(r"[;\n\r&|(){}`]|\A")
_BLANK = re.compile(r"[ \t\f\v]*")
_LOOSE = re.compile(r"""(?:[^\s;&|(){}`'"\\<>]|'[^']*'|"(?:[^"\\]|\\.)*"|\\.|['"\\])+""", re.DOTALL)
_LOOSE_PART = re.compile(r"""\$?'([^']*)'|\$?"((?:[^"\\]|\\.)*)"|\\(.)|([^'"\\])|(['"\\])""", re.DOTALL)
_REDIRECTION = re.compile(r"[<>]+[&|!-]*[ \t]*")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\+?=")
_BEFORE_COMMANDS = frozenset({"if", "then", "else", "elif", "while", "until", "do", "!", "time", "coproc", "exec"})


def _lookalikes(text: str) -> tuple[Command, ...] | None:
    """All that looks like a command in a text that is not simple, however it is quoted; each once.

    Every command of a simple text is found again when anything is put before or after it with a
    separator between: a denial that speaks of it is not lost by making the text harder to read.
    """
    found: dict[tuple[str, ...], None] = {}
    # Each beginning is read up to its own end; a text made to have them overlap is given up.
    budget = 8 * len(text) + 4096
    for beginning in _BEGINNING.finditer(text):
        argv, read = _read_loosely(text, beginning.end())
        budget -= read
        for shorter in _inner(argv):
            found[shorter] = None
        if len(found) > MAX_LOOKALIKES or budget < 0:
            return None
    return tuple(_command(list(argv)) for argv in found)


def _inner(argv: list[str]) -> list[tuple[str, ...]]:
    """The command itself and, behind assignments and words of the shell's own, the one they lead."""
    starts = [tuple(argv)] if argv else []
    index = 0
    while index < len(argv) and (_ASSIGNMENT.match(argv[index]) or argv[index] in _BEFORE_COMMANDS):
        index += 1
    if 0 < index < len(argv):
        starts.append(tuple(argv[index:]))
    return starts


def _read_loosely(text: str, begin: int) -> tuple[list[str], int]:
    """The words from `begin` to the next separator, and how many characters that were."""
    argv: list[str] = []
    position = begin
    while True:
        blank = _BLANK.match(text, position)
        position = blank.end() if blank is not None else position
        if redirection := _REDIRECTION.match(text, position):
            # Its target is no argument; what it is does not matter here.
            target = _LOOSE.match(text, redirection.end())
            position = target.end() if target is not None else redirection.end()
        elif word := _LOOSE.match(text, position):
            argv.append(_loosely_unquoted(word[0]))
            position = word.end()
        else:
            return argv, position - begin


def _loosely_unquoted(word: str) -> str:
    if not any(char in word for char in "'\"\\"):
        return word
    word = word.replace("\\\n", "")  # a line goes on
    return "".join(found[found.lastindex or 0] for found in _LOOSE_PART.finditer(word))
