"""Parser of commands, from text or from the words of a shell. Runs on: driver.

    mymnist fit test_model batch_size=128 epochs=5
    -> Command("fit", "test_model", {"batch_size": 128, "epochs": 5})

The two functions give the same ``Command``. ``parse`` reads text by the grammar. ``parse_words``
takes words that a shell has already split and unquoted; it never joins them again.
"""

from __future__ import annotations

import functools
import itertools
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lark

from spark_mnist import errors, options

logger = logging.getLogger(__name__)

WITHOUT_ROWS = ("models", "describe", "delete", "rollback")
"""Operations on saved models; the others read a DataFrame, which only ``doctor`` can do without."""
WITHOUT_NAME = ("models",)
"""Operations without a model name."""
WITH_OPTIONAL_NAME = ("doctor",)
"""Operations with an optional model name."""
GRAMMAR = r"""
    command: (token | option)*
    option: token "=" token
    token: WORD | QUOTED
    WORD: /[^\s|='"][^\s|=]*/
    QUOTED: /('[^']*'|"[^"]*")(?=[\s=|]|\Z)/
    %ignore /\s+/
"""


@dataclass(frozen=True)
class Command:
    """One operation on one named model, with typed options."""

    operation: str
    model_name: str
    """Name of the model; empty for an operation without one."""
    options: dict[str, Any]


@dataclass(frozen=True)
class Word:
    """A token, or one side of an option, and its position in the text that errors show."""

    text: str
    column: int


@dataclass(frozen=True)
class Assignment:
    """An option: ``name=value``."""

    name: Word
    value: Word


def parse(text: str) -> Command:
    """Parse the text of a command.

    Args:
        text: ``[mymnist] operation model_name (name=value)*``.

    Raises:
        errors.CommandError: The text is not a command; the message shows where with a caret.
    """
    try:
        items: Any = _parser().parse(text)
    except lark.exceptions.UnexpectedInput as error:
        raise _syntax_error(text, error) from None
    return _to_command(text, items)


def parse_words(words: Sequence[str]) -> Command:
    """Parse a command that a shell has already split into words.

    Args:
        words: Operation, model name, then ``name=value`` words, each split at its first ``=``.

    Raises:
        errors.CommandError: The words are not a command.
    """
    items: list[Word | Assignment] = []
    column = 0
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name:
            items.append(Assignment(Word(name, column), Word(value, column + len(name) + 1)))
        else:
            items.append(Word(word, column))
        column += len(shlex.quote(word)) + 1
    return _to_command(shlex.join(words), items)


@functools.cache
def _parser() -> lark.Lark:
    return lark.Lark(GRAMMAR, start="command", parser="lalr", transformer=_ItemTransformer())


class _ItemTransformer(lark.Transformer[Any, list[Word | Assignment]]):
    """Transformer of the parse tree to words and assignments."""

    WORD = staticmethod(lambda token: Word(str(token), token.start_pos))
    QUOTED = staticmethod(lambda token: Word(str(token)[1:-1], token.start_pos))
    token = staticmethod(lambda children: children[0])
    option = staticmethod(lambda children: Assignment(*children))
    command: Any = staticmethod(list)


def _to_command(text: str, items: Sequence[Word | Assignment]) -> Command:
    if items and isinstance(items[0], Word) and items[0].text == "mymnist":
        items = items[1:]
    has_name = _takes_name(items)
    prefix = itertools.takewhile(lambda item: isinstance(item, Word), items[: 1 + has_name])
    words = [item for item in prefix if isinstance(item, Word)]
    next_item = items[len(words)] if len(items) > len(words) else None
    column = next_item.name.column if isinstance(next_item, Assignment) else len(text)
    if any(isinstance(item, Word) for item in items[len(words) :]) and len(words) < 1 + has_name:
        raise _error(text, column, "the operation and the model name come before the options")
    if not words:
        raise _error(text, column, f"the operation is missing: {_operations()}")
    operation = words[0].text
    if operation not in options.OPERATIONS:
        hint = errors.did_you_mean(operation, options.OPERATIONS)
        raise _error(
            text, words[0].column, f"unknown operation {operation!r}: {_operations()}{hint}"
        )
    if has_name and (len(words) < 2 or not words[1].text):
        raise _error(text, column, "the model name is missing after the operation")
    name = words[1].text if has_name else ""
    return Command(operation, name, _options(text, operation, items[1 + has_name :]))


def _takes_name(items: Sequence[Word | Assignment]) -> bool:
    """Return whether a model name must follow the operation."""
    operation = items[0].text if items and isinstance(items[0], Word) else ""
    if operation in WITH_OPTIONAL_NAME:
        return len(items) > 1 and isinstance(items[1], Word)
    return operation not in WITHOUT_NAME


def _options(text: str, operation: str, items: Sequence[Word | Assignment]) -> dict[str, Any]:
    names: set[str] = set()
    values: dict[str, Any] = {}
    for item in items:
        if isinstance(item, Word):
            raise _error(text, item.column, f"{item.text!r} is no option: write name=value")
        name = item.name.text
        if name not in options.FIELDS:
            hint = options.hint(name, options.FIELDS)
            raise _error(text, item.name.column, f"unknown option {name!r}{hint}")
        if name in names:
            raise _error(text, item.name.column, f"{name} is given twice")
        names.add(name)
        if not item.value.text:
            raise _error(text, item.value.column, f"{name} has an empty value")
        try:
            value = options.read(name, item.value.text)
        except errors.OptionError as error:
            raise _error(text, item.value.column, str(error)) from None
        if operation in options.operations_with(name):
            values[name] = value
        else:
            logger.warning("%s does not use %s; it is ignored", operation, name)
    return values


def _syntax_error(text: str, error: lark.exceptions.UnexpectedInput) -> errors.CommandError:
    position = error.pos_in_stream
    if position is None or position < 0 or position >= len(text):
        return _error(text, len(text), "a value is missing at the end")
    char = text[position]
    if char in "'\"" and isinstance(error, lark.exceptions.UnexpectedCharacters):
        has_closing_quote = char in text[position + 1 :]
        return _error(
            text,
            position,
            "text follows a closing quote" if has_closing_quote else "the quote never ends",
        )
    if char == "=":
        return _error(text, position, "'=' needs a name before it and one value after it")
    return _error(text, position, f"{char!r} cannot stand in a bare word; quote it")


def _error(text: str, column: int, message: str) -> errors.CommandError:
    start = text.rfind("\n", 0, column) + 1
    line = text[start:].split("\n", 1)[0].replace("\t", " ")
    return errors.CommandError(f"{message}\n  {line}\n  {' ' * (column - start)}^")


def _operations() -> str:
    return "use " + ", ".join(options.OPERATIONS)
