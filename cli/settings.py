"""A run's settings from a YAML file and the command line: every mistake is one sentence with file, line and field.

YAML is read as another way to write the command line: both give texts, and transformers' `HfArgumentParser` makes
values of them by the types of the config's fields. So `learning_rate: 1e-5` and `eval_strategy: no` mean what they say.
"""

import argparse
import dataclasses
import difflib
import enum
import json
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from outspoken.cli.common import CommandError


@dataclass(frozen=True)
class Given:
    """A field as somebody wrote it: one text, several, a mapping, or None for `null`. `where` says in which place."""

    name: str
    value: str | list[str] | dict[str, Any] | None
    where: str = ""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise argparse.ArgumentError(None, message)


class Fields:
    """The fields of some dataclasses, and how texts become their values."""

    def __init__(self, *classes: Any):
        self.classes = classes
        self.hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
        self._parser = _Parser(list(classes), add_help=False, allow_abbrev=False, exit_on_error=False)
        self._actions = {a.dest: a for a in self._parser._actions if not isinstance(a, argparse._StoreFalseAction)}
        self._aliases = {
            option.lstrip("-").replace("-", "_"): dest
            for dest, action in self._actions.items()
            for option in action.option_strings
        }

    def resolve(self, name: str, where: str) -> str:
        """The field that a name stands for (hyphens count as underscores).

        Raises:
            CommandError: there is none; a close match is named.
        """
        plain = name.replace("-", "_")
        if plain in self._aliases:
            return self._aliases[plain]
        near = difflib.get_close_matches(plain, self._aliases, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`--fields` lists them all."
        config = self.classes[-1].__name__
        raise CommandError(f"{where}: '{name}' is no field of {config} or of the command; {hint}")

    def is_flag(self, name: str) -> bool:
        return self._actions[name].type is string_to_bool

    def convert(self, given: Given) -> Any:
        """The value of a field from what was written.

        Raises:
            CommandError: it does not fit; the sentence tells where it stands and what would fit.
        """
        action, value = self._actions[given.name], given.value
        alternatives = _alternatives(self.hints[given.name])
        if value is None:
            if type(None) in alternatives:
                return None
            raise self._misfit(given, "null")
        if isinstance(value, dict):
            if any(typing.get_origin(a) is dict or a is dict for a in alternatives):
                return value
            raise self._misfit(given, "a mapping")
        if any(typing.get_args(a) == (dict,) for a in alternatives):
            if isinstance(value, list) and all(isinstance(item, dict) for item in value):
                return value
            raise self._misfit(given, repr(value))
        lists = any(typing.get_origin(a) is list for a in alternatives)
        if isinstance(value, list) and action.nargs != "+":
            if lists:
                return value
            raise self._misfit(given, f"{len(value)} values")
        if isinstance(value, str) and value.startswith("{") and dict in map(_plain, alternatives):
            try:
                return json.loads(value)
            except ValueError as error:
                raise CommandError(f"{given.where}: {given.name} is no JSON: {error}.") from None
        if bool in alternatives and str in alternatives:  # HfArgumentParser would take truth values only
            return {"true": True, "false": False}.get(str(value).lower(), value)
        texts = value if isinstance(value, list) else [value]
        if value == "" and action.nargs == "+":
            return "" if str in alternatives else []
        option = f"--{given.name}"
        tokens = [option, *texts] if action.nargs == "+" else [f"{option}={texts[0]}"]
        try:
            namespace, rest = self._parser.parse_known_args(tokens)
        except (argparse.ArgumentError, argparse.ArgumentTypeError):
            raise self._misfit(given, ", ".join(map(repr, texts)) or "nothing") from None
        if rest:
            raise self._misfit(given, ", ".join(map(repr, texts)))
        return getattr(namespace, given.name)

    def _misfit(self, given: Given, got: str) -> CommandError:
        return CommandError(f"{given.where}: {given.name} must be {self.expected(given.name)}, not {got}.")

    def expected(self, name: str) -> str:
        """What a field takes, in words."""
        action = self._actions[name]
        alternatives = _alternatives(self.hints[name])
        words = _WORDS.get(action.type, "")  # type: ignore[call-overload]
        if bool in alternatives and str in alternatives:
            words = "true, false or a text"
        elif action.choices is not None:
            words = f"one of {', '.join(str(getattr(c, 'value', c)) for c in action.choices)}"
        elif isinstance(action.type, type) and issubclass(action.type, enum.Enum):
            words = f"one of {', '.join(str(c.value) for c in action.type)}"
        if dict in map(_plain, alternatives):
            words = "a mapping"
        if action.nargs == "+":
            plural = {"a number": "numbers", "a whole number": "whole numbers", "a text": "texts"}.get(words, words)
            words = f"one or more {plural}".replace("more one of", "more of")
        if any(typing.get_args(a) == (dict,) for a in alternatives):
            words = "a list of mappings"
        words = words or "a value"
        return f"{words} or null" if type(None) in alternatives else words

    def build(self, given: Sequence[Given]) -> tuple[Any, ...]:
        """One instance of each class; fields that were not given have their defaults.

        Raises:
            CommandError: a value does not fit, or a class refuses its values.
        """
        values = {g.name: self.convert(g) for g in given}
        built = []
        for cls in self.classes:
            names = {f.name for f in dataclasses.fields(cls) if f.init}
            try:
                built.append(cls(**{name: value for name, value in values.items() if name in names}))
            except (ValueError, TypeError, ImportError) as error:
                raise CommandError(f"{place_of(str(error), given)}{one_line(error)}") from None
        return tuple(built)

    def table(self) -> list[dict[str, Any]]:
        """Every field: name, what it takes, default, help, and whether it can change while the run trains."""
        rows = []
        for cls in self.classes:
            for f in dataclasses.fields(cls):
                if f.init:
                    default = None if f.default is dataclasses.MISSING else getattr(f.default, "value", f.default)
                    if f.default_factory is not dataclasses.MISSING:
                        default = f.default_factory()
                    rows.append(
                        {
                            "name": f.name,
                            "takes": self.expected(f.name),
                            "default": default,
                            "live": "live" in f.metadata,
                            "help": " ".join(str(f.metadata.get("help", "")).split()),
                        }
                    )
        return rows


_WORDS = {float: "a number", int: "a whole number", str: "a text", string_to_bool: "true or false"}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows."""
    return typing.get_args(hint) if typing.get_origin(hint) not in (None, list, dict, typing.Literal) else (hint,)


def _plain(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def one_line(error: object, limit: int = 800) -> str:
    """An error's message on one line, as a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text if text[-1] in ".!?…" else text + "."


def place_of(message: str, given: Sequence[Given]) -> str:
    """Where the field stands that a message is about: the first it names, else the first whose value it names."""
    words = set(re.findall(r"[A-Za-z_]\w*", message))
    named = [g for g in given if g.name in words]
    named = sorted(named, key=lambda g: message.index(g.name)) or [
        g for g in given if any(len(part) > 3 and part in message for part in _parts(g.value))
    ]
    return f"{named[0].where}: " if named else ""


def _parts(value: Any) -> list[str]:
    """The texts that would show in a message about a value, ordinary words left out."""
    if isinstance(value, dict):
        return [part for key, nested in value.items() for part in (str(key), *_parts(nested))]
    if isinstance(value, list):
        return [part for item in value for part in _parts(item)]
    return [value] if isinstance(value, str) and value.lower() not in ("true", "false", "none", "auto") else []


# ---------------------------------------------------------------------- the two places


def read_yaml(path: str | Path, fields: Fields) -> list[Given]:
    """The fields of a YAML file: a mapping from names to values.

    Raises:
        CommandError: it cannot be read, is no such file, or names what does not exist.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CommandError(f"{path} cannot be read: {reason}.") from None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise CommandError(f"{path} line {root.start_mark.line + 1}: expected lines like 'learning_rate: 1e-5'.")
        found: dict[str, Given] = {}
        for key, value in root.value:
            given = _given(key, value, path, fields, loader)
            if given.name in found:
                raise CommandError(f"{given.where}: {given.name} stands already at {found[given.name].where}.")
            found[given.name] = given
        return list(found.values())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" line {mark.line + 1}" if mark is not None else ""
        raise CommandError(f"{path}{at}: this is no YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise CommandError(f"{path}: this is no YAML: {one_line(error)}") from None


def _given(key: yaml.Node, value: yaml.Node, path: str | Path, fields: Fields, loader: yaml.SafeLoader) -> Given:
    where = f"{path} line {key.start_mark.line + 1}"
    if not isinstance(key, yaml.ScalarNode):
        raise CommandError(f"{where}: a field's name must be a word.")
    name = fields.resolve(key.value, where)
    if isinstance(value, yaml.ScalarNode):
        return Given(name, None if value.tag.endswith(":null") else value.value, where)
    if isinstance(value, yaml.MappingNode):
        return Given(name, loader.construct_document(value), where)
    if any(typing.get_args(a) == (dict,) for a in _alternatives(fields.hints[name])):
        return Given(name, loader.construct_document(value), where)
    texts = []
    for item in value.value:
        if not isinstance(item, yaml.ScalarNode):
            raise CommandError(f"{where}: {name} must be {fields.expected(name)}, not a list of lists or mappings.")
        texts.append(item.value)
    return Given(name, texts, where)


def read_arguments(tokens: Sequence[str], fields: Fields) -> list[Given]:
    """The fields of a command line: `--field value`, `--field=value`, `--flag`, `--no_flag`, `--list a b c`.

    Raises:
        CommandError: a token belongs to no field, or names what does not exist.
    """
    given: list[Given] = []
    tokens = list(tokens)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            raise CommandError(f"'{token}' stands alone; write settings as --field value.")
        name, equals, value = token[2:].partition("=")
        values = [value] if equals else []
        while not equals and tokens and not tokens[0].startswith("--"):
            values.append(tokens.pop(0))
        where = f"--{name}"
        plain = name.replace("-", "_")
        if not values and plain.startswith("no_") and plain.removeprefix("no_") in fields.hints:
            flag = plain.removeprefix("no_")
            if fields.is_flag(flag):
                given.append(Given(flag, "false", where))
                continue
        field = fields.resolve(name, "command line")
        if not values and not fields.is_flag(field):
            raise CommandError(f"{where} needs a value: {fields.expected(field)}.")
        if len(values) == 1 and values[0].lower() in ("none", "null") and _unset_by_word(fields.hints[field]):
            given.append(Given(field, None, where))
        else:
            given.append(Given(field, values if len(values) > 1 else values[0] if values else "true", where))
    return given


def _unset_by_word(hint: Any) -> bool:
    """Whether the word "none" means that a field is unset: where no text is expected, or a mapping is."""
    alternatives = {_plain(a) for a in _alternatives(hint)}
    return type(None) in alternatives and (str not in alternatives or dict in alternatives)


def merged(*sources: Sequence[Given]) -> list[Given]:
    """All fields; of a field that is named several times the last one counts."""
    return list({given.name: given for source in sources for given in source}.values())
