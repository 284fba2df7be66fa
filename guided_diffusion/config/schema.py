"""Reading and checking a YAML: what a key is, how a file becomes a configuration.

A configuration is a frozen dataclass derived from ``Conf``. Each YAML key is one field, declared
with ``key(...)``: default, one sentence, range. Checks, help, Markdown and JSON Schema come from
this declaration alone. A configuration checks itself whenever it is made: from a file, by ``--set``
or by ``dataclasses.replace``. The keys themselves stand in keys.py.
"""

import dataclasses
import difflib
import operator
import os
import re
import reprlib
import sys
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from types import NoneType
from typing import Any, ClassVar, NamedTuple, TypeVar

from guided_diffusion.errors import UserError

# ---- What a key may hold -------------------------------------------------------------------------
BOUNDS = {  # the bounds that key() takes: (test, words for messages, JSON Schema's keyword)
    "low": (operator.ge, "at least", "minimum"),
    "above": (operator.gt, "above", "exclusiveMinimum"),
    "high": (operator.le, "at most", "maximum"),
    "below": (operator.lt, "below", "exclusiveMaximum"),
    "multiple_of": (lambda value, unit: value % unit == 0, "a multiple of", "multipleOf"),
}
KINDS = {  # type of a field: (words for messages, JSON Schema's type)
    int: ("an integer", "integer"),
    float: ("a finite number", "number"),
    bool: ("true or false", "boolean"),
    str: ("text", "string"),
}
EXPONENT = r"[-+]?(\d{1,18}(\.\d{0,18})?|\.\d{1,18})[eE][-+]?\d{1,3}"
# Control characters, lone surrogates, and Unicode's ends of lines and of paragraphs.
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
QUOTES_HINT = "in double quotes \\ is special, so write single quotes or /"


class Pattern(NamedTuple):
    """Numbers with commas between. YAML may give them as text, as one number or as a list."""

    regex: str
    words: str


def _commas(item: str) -> str:
    return f"{item}(?:, *{item})*"


_COUNT = r"[1-9]\d{0,5}"
WIDTHS = Pattern(
    f"(?:{_commas(r'(?:[0-9]{1,3}(?:[.][0-9]{1,9})?|[.][0-9]{1,9})')})?",
    "numbers and commas, such as '1,2,4'",
)
SIDES = Pattern(f"(?:{_commas(_COUNT)})?", "integers and commas, such as '32,16,8'")
RATES = Pattern(_commas(r"(?:0|0?\.\d{1,9})"), "numbers below 1 and commas, such as '0.9999'")
STEPS = Pattern(
    f"(?:{_commas(_COUNT)}|ddim{_COUNT})?",
    "'250', '20,30', 'ddim50' or the like",
)


def key(
    default: Any = MISSING,
    text: str = "",
    *,
    choices: tuple = (),
    pattern: Pattern | None = None,
    special: int | None = None,
    path: bool = False,
    under: str | None = None,
    affects_results: bool = True,
    **bounds: float,
) -> Any:
    """Declare a YAML key as a field of a dataclass. A key without a default is required.

    Args:
        default: the value where the YAML does not have the key.
        text: one sentence for help, README and editors.
        choices: all allowed values.
        pattern: the form of a text of numbers.
        special: one number that is allowed outside the bounds, such as -1.
        path: whether the text is a path, in which a leading ~ is the home folder.
        under: "eval" where the key holds ``eval:``, and that one set of keys under any name.
        affects_results: whether a result's pixels depend on it; else a run may be resumed with
            another value.
        bounds: low, above, high, below, multiple_of; see BOUNDS.
    """
    rules = {"choices": choices, "pattern": pattern, "special": special, "path": path}
    rules |= {"under": under, "bounds": bounds, "affects_results": affects_results}
    return dataclasses.field(default=default, metadata={"text": text, **rules})


def keys_of(cls: type) -> dict[str, dataclasses.Field]:
    """Return the fields of a configuration that are YAML keys, by name."""
    return {field.name: field for field in dataclasses.fields(cls) if field.metadata}


def types_of(field: dataclasses.Field) -> tuple[type, ...]:
    """Return the types of a key's value: one, or several such as (int, NoneType)."""
    return typing.get_args(field.type) or (field.type,)


def shown(value: Any) -> str:
    """Return ``value`` for a message: never long, and true, false as YAML writes them."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 60
    return brief.repr(value)


def expected_value(field: dataclasses.Field) -> str:
    """Say in words what a key's value has to be."""
    rules = field.metadata
    if rules["choices"]:
        return " or ".join(c if isinstance(c, str) else shown(c) for c in rules["choices"])
    if rules["pattern"]:
        return rules["pattern"].words
    bounds = [f"{BOUNDS[name][1]} {limit}" for name, limit in rules["bounds"].items()]
    special = [] if rules["special"] is None else [f"or {rules['special']}"]
    range_ = [" and ".join(bounds)] if bounds else []
    return ", ".join([KINDS[types_of(field)[0]][0], *range_, *special])


def _number(value: Any, kind: type) -> int | float | None:
    """Return ``value`` as an int or float; None if it is neither or not finite.

    Text such as 1e-4 or 1.5e1 is a number too: YAML 1.1 knows exponents only with both a point and
    a sign, and reads others as text.
    """
    if isinstance(value, str) and re.fullmatch(EXPONENT, value, re.ASCII):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
        return None
    return kind(value) if kind is float or value == int(value) else None


def _text(value: Any) -> str | None:
    """Return ``value`` as text; None if it is none. Integers count: ``name: 12`` means text.

    YAML makes dates, true and 1.1 of other unquoted text, such as 2024-01-01, yes and 1.10. How it
    was written is lost then.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return str(value)
    is_text = isinstance(value, str) and UNPRINTABLE.isdisjoint(map(unicodedata.category, value))
    return value if is_text else None


def _number_text(value: Any, pattern: Pattern) -> str | None:
    """Return ``value`` as numbers with commas between; None if it does not fit ``pattern``."""
    items = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int | float | str) for item in items):
        return None
    text = ",".join(item if isinstance(item, str) else shown(item) for item in items)
    return text.replace(" ", "") if re.fullmatch(pattern.regex, text, re.ASCII) else None


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """Return a key's value in its own type; UserError where it does not fit the declaration."""
    rules, kind, got = field.metadata, types_of(field)[0], shown(value)
    if NoneType in types_of(field) and (value is None or value == ""):
        return None
    if dataclasses.is_dataclass(kind):
        return value
    if rules["choices"]:
        if any(type(value) is type(choice) and value == choice for choice in rules["choices"]):
            return value
        if len(rules["choices"]) == 1 and isinstance(value, bool):  # the sentence says why
            raise UserError(rules["text"].rstrip("."), key=field.name, got=got)
    elif kind is bool and isinstance(value, bool):
        return value
    elif kind is str:
        return _checked_text(field, value)
    elif kind in (int, float):
        number = _number(value, kind)
        bounds = [(BOUNDS[name][0], limit) for name, limit in rules["bounds"].items()]
        inside = number is not None and all(test(number, limit) for test, limit in bounds)
        if inside or (number is not None and number == rules["special"]):
            return number
    raise UserError(key=field.name, expected=expected_value(field), got=got)


def _checked_text(field: dataclasses.Field, value: Any) -> str:
    """Return a text; UserError, too, where the system's encoding has no file of such a name."""
    rules, got, problem, expected = field.metadata, shown(value), "", expected_value(field)
    text = _number_text(value, rules["pattern"]) if rules["pattern"] else _text(value)
    if text or (text == "" and field.default is not MISSING):
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            names = f"this system's file names are {sys.getfilesystemencoding()}"
            problem = f"{names}; start with PYTHONUTF8=1 before python"
            raise UserError(problem, key=field.name, got=ascii(text)) from None
        # Not Path.expanduser, which would drop a leading "./".
        return os.path.expanduser(text) if rules["path"] else text  # noqa: PTH111
    if not rules["pattern"] and not isinstance(value, str):
        problem, expected = "text that YAML takes for something else needs quotes", None
    elif not rules["pattern"] and text is None:  # mostly "C:\new", where \n is a line break
        expected = f"text without control characters ({QUOTES_HINT})"
    raise UserError(problem, key=field.name, expected=expected, got=got)


def numbers(text: str, kind: type) -> tuple:
    """Return the numbers of a text that has commas between them."""
    return tuple(kind(item) for item in text.split(",") if item)


def require(fits: bool, keys: str, problem: str) -> None:
    """Raise UserError unless some values go together; ``keys`` are their keys, joined by 'and'."""
    if not fits:
        raise UserError(problem, key=keys)


@dataclass(frozen=True, kw_only=True)
class Conf:
    """The base of all configurations: converts and checks every key.

    ``ignored`` names dotted keys that a YAML may have without effect, each with the reason.
    """

    ignored: ClassVar[Mapping[str, str]] = {}

    @staticmethod
    def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a tree completed with the keys that are decided elsewhere than in the YAML."""
        return tree

    @property
    def without_effect(self) -> Sequence[str]:
        """Keys that have no effect here; those at their defaults are not written."""
        return ()

    def __post_init__(self) -> None:
        for field in keys_of(type(self)).values():
            self._set(field.name, _checked(field, getattr(self, field.name)))

    def _set(self, name: str, value: Any) -> None:
        """Set a key of this frozen object, in ``__post_init__`` alone."""
        object.__setattr__(self, name, value)


AnyConf = TypeVar("AnyConf", bound=Conf)


# ---- From a tree, and back -----------------------------------------------------------------------


def with_place(error: UserError, *, path: object = None, prefix: str = "") -> UserError:
    """Return the same error with the file it is in, or with ``prefix`` before each of its keys."""
    keys = error.key and " and ".join(prefix + name for name in error.key.split(" and "))
    return UserError(error.problem, path=path, key=keys, expected=error.expected, got=error.got)


def _mapping(tree: Any, where: str) -> Mapping:
    """Return ``tree``; UserError, with the dotted key ``where``, unless it has keys and values."""
    if not isinstance(tree, Mapping):
        raise UserError(key=where or None, expected="keys and values", got=shown(tree))
    return tree


def _unknown(name: Any, cls: type, prefix: str, root: type) -> UserError:
    """Return the error of an unknown key; it names the known key that is spelt most like it.

    Of keys spelt equally alike, one at the same place in the tree is named.
    """
    name = str(name)[:100]
    known = [*(prefix + key for key in keys_of(cls)), *(doc.key for doc in describe(root))]
    last = [key.rpartition(".")[2].lower() for key in known]
    alike = [difflib.SequenceMatcher(None, name.lower(), each).ratio() for each in last]
    nearest = known[alike.index(max(alike))]
    return UserError(f"unknown key; the nearest known key is {nearest}", key=prefix + name)


def _build(
    cls: type[AnyConf], tree: Any, root: type[Conf], prefix: str = "", place: str = "", **extra: str
) -> AnyConf:
    """Make a ``cls`` from the part of the whole tree that stands at ``prefix``.

    Args:
        cls: the configuration to make.
        tree: keys and values.
        root: the class of the whole tree.
        prefix: what stands before the keys in messages, such as ``data.eval.faces.``.
        place: the same as ``ignored`` and help write it, such as ``data.eval.<set>.``.
        extra: fields that are no keys.
    """
    known, values = keys_of(cls), dict(extra)
    for name, value in _mapping(tree, prefix.rstrip(".")).items():
        if name not in known:
            if f"{place}{name}" not in root.ignored:
                raise _unknown(name, cls, prefix, root)
        elif value is None:
            pass  # an empty value is an absent one
        elif known[name].metadata["under"]:
            values[name] = _build_named(known[name], value, root)
        elif dataclasses.is_dataclass(known[name].type):
            inner = (f"{prefix}{name}.", f"{place}{name}.")
            values[name] = _build(known[name].type, value, root, *inner)
        else:
            values[name] = value
    for name, field in known.items():
        if field.default is MISSING and name not in values:
            raise UserError(f"is missing ({field.metadata['text']})", key=prefix + name)
    try:
        return cls(**values)
    except UserError as error:
        raise with_place(error, prefix=prefix) from None


def _build_named(field: dataclasses.Field, tree: Any, root: type[Conf]) -> Conf:
    """Make the configuration of a key such as ``data``, which holds ``eval: <any name>: keys``."""
    under = field.metadata["under"]
    where = f"{field.name}.{under}"
    for name in _mapping(tree, field.name):
        if name != under:
            problem = f"unknown key; the nearest known key is {where}"
            raise UserError(problem, key=f"{field.name}.{name}")
    sets = _mapping(tree.get(under), where)
    if len(sets) != 1:
        raise UserError(key=where, expected="one set of keys", got=shown(list(sets)))
    [(name, keys)] = sets.items()
    named = _text(name)
    if not named:
        raise UserError(key=where, expected="the name of a set of keys", got=shown(name))
    inner = (f"{where}.{named}.", f"{where}.<set>.")
    return _build(field.type, {} if keys is None else keys, root, *inner, name=named)


def conf_from_dict(
    tree: Any, cls: type[AnyConf], source: object = None, *, is_complete: bool = False
) -> AnyConf:
    """Make a checked configuration from a tree in the published YAML form.

    Keys that something else decides, such as a folder that the tree names, are completed, unless it
    ``is_complete``. Raises UserError, naming the file ``source``, for anything wrong with the tree.
    """
    try:
        if isinstance(tree, Mapping) and not is_complete:
            tree = cls.completed(tree)
        return _build(cls, tree, cls)
    except UserError as error:  # a folder that the tree names may be at fault itself
        raise with_place(error, path=error.path or source) from None


def conf_to_dict(conf: Conf) -> dict[str, Any]:
    """Return all keys as a tree in the published YAML form; it loads as the same ``conf``."""
    tree = {}
    for name, field in keys_of(type(conf)).items():
        value, under = getattr(conf, name), field.metadata["under"]
        if name in conf.without_effect and value == field.default:
            continue
        if under:
            tree[name] = {under: {value.name: conf_to_dict(value)}}
        elif isinstance(value, Conf):
            tree[name] = conf_to_dict(value)
        elif value is not None:
            tree[name] = value
    return tree


def result_settings(conf: Conf, prefix: str = "") -> dict[str, str]:
    """Return the keys that results depend on, dotted, with their values as text."""
    settings = {}
    for name, field in keys_of(type(conf)).items():
        value = getattr(conf, name)
        if isinstance(value, Conf):
            settings |= result_settings(value, f"{prefix}{name}.")
        elif field.metadata["affects_results"] and value is not None:
            settings[prefix + name] = str(value)
    return settings


# ---- The keys, described -------------------------------------------------------------------------


class KeyDoc(NamedTuple):
    """A YAML key as its reader sees it: dotted name, type and range, default, sentence."""

    key: str
    type: str
    default: str
    text: str


def prefix_within(prefix: str, field: dataclasses.Field) -> str:
    """Return what stands before the keys inside of ``field``, such as ``data.eval.<set>.``."""
    under = field.metadata["under"]
    return f"{prefix}{field.name}.{under}.<set>." if under else f"{prefix}{field.name}."


def describe(cls: type[Conf], prefix: str = "") -> list[KeyDoc]:
    """Return all keys of a configuration in order; keys of keys have dotted names."""
    docs = []
    for name, field in keys_of(cls).items():
        if dataclasses.is_dataclass(field.type):
            docs += describe(field.type, prefix_within(prefix, field))
        else:
            words = {MISSING: "required", None: "absent", "": "empty"}
            default = words.get(field.default) or shown(field.default).strip("'")
            text = field.metadata["text"]
            docs.append(KeyDoc(prefix + name, expected_value(field), default, text))
    return docs
