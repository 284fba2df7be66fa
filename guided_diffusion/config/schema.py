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
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, NamedTuple, TypeVar

import yaml

from guided_diffusion.errors import UserError, looked_in

# Someone may give a checkpoint instead of a YAML: do not read it all. The record of a run is a YAML
# too, with a line for each result.
MAX_YAML_BYTES = 1 << 28

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
STEPS = Pattern(f"(?:{_commas(_COUNT)}|ddim{_COUNT})?", "'250', '20,30', 'ddim50' or the like")


def key(
    default: Any = MISSING,
    text: str = "",
    *,
    choices: tuple = (),
    pattern: Pattern | None = None,
    special: int | None = None,
    path: bool = False,
    under: str | None = None,
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
        bounds: low, above, high, below, multiple_of; see BOUNDS.
    """
    rules = {"choices": choices, "pattern": pattern, "special": special, "path": path}
    rules |= {"under": under, "bounds": bounds}
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
        if isinstance(value, kind):
            return value
        raise UserError(key=field.name, expected=kind.__name__, got=got)
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


def _refuse_unwritable(name: str, text: str) -> None:
    """Raise ``UserError`` for text that no file's name can have in the system's encoding."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        problem = f"this system's file names are {encoding}; start with PYTHONUTF8=1 before python"
        raise UserError(problem, key=name, got=ascii(text)) from None


def _checked_text(field: dataclasses.Field, value: Any) -> str:
    rules, got, problem, expected = field.metadata, shown(value), "", expected_value(field)
    text = _number_text(value, rules["pattern"]) if rules["pattern"] else _text(value)
    if text or (text == "" and field.default is not MISSING):
        _refuse_unwritable(field.name, text)
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

    @classmethod
    def completed(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a tree with the keys that something else than the YAML decides."""
        return tree

    @property
    def without_effect(self) -> Sequence[str]:
        """Keys that mean nothing here, and stay out of the tree where they are as by default."""
        return ()

    def __post_init__(self) -> None:
        for field in keys_of(type(self)).values():
            self._set(field.name, _checked(field, getattr(self, field.name)))

    def _set(self, name: str, value: Any) -> None:
        """Set a key of this frozen object, in ``__post_init__`` alone."""
        object.__setattr__(self, name, value)


AnyConf = TypeVar("AnyConf", bound=Conf)


# ---- From a tree, and back -----------------------------------------------------------------------


def _with_place(error: UserError, *, path: object = None, prefix: str = "") -> UserError:
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
    local = [prefix + known for known in keys_of(cls)]

    def likeness(known: str) -> tuple[float, bool]:
        last = known.rpartition(".")[2].lower()
        return difflib.SequenceMatcher(None, name.lower(), last).ratio(), known in local

    nearest = max([*local, *(doc.key for doc in describe(root))], key=likeness)
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
        raise _with_place(error, prefix=prefix) from None


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
        raise _with_place(error, path=error.path or source) from None


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


# ---- From a file ---------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML with stricter rules.

    A key may be there only once. An alias stands for a single value, so that a small file cannot
    become a huge tree. Only decimal numbers are numbers. Errors tell line and column.
    """

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(
                problem="an alias may stand for a single value only", problem_mark=alias.start_mark
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for name in (name for name, _ in node.value if isinstance(name, yaml.ScalarNode)):
            if name.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name.value} is here twice", problem_mark=name.start_mark
                )
            seen.add(name.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:  # deep: PyYAML would otherwise fill maps and sets later, without a place for errors
            return super().construct_object(node, deep=True)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            raise yaml.MarkedYAMLError(
                problem=f"this is not a {node.tag.rpartition(':')[2]}",
                problem_mark=node.start_mark,
            ) from error

    def integer(self, node: yaml.ScalarNode) -> int | str:
        """Return an integer. 012, 0x12 and 1:12, which are integers in YAML 1.1, stay text."""
        text = self.construct_scalar(node)
        return int(text) if re.fullmatch(r"[-+]?(0|[1-9]\d{0,17})", text) else text

    def number(self, node: yaml.ScalarNode) -> float | str:
        """Return a float. 1:30.5, which is a number of base 60 in YAML 1.1, stays text."""
        text = self.construct_scalar(node)
        return text if ":" in text else self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)


def _parse(text: str) -> Any:
    """Return the tree of a YAML text; a UserError tells line and column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem
        line, column = mark.line + 1, mark.column + 1
        if "escape" in problem:  # as in "C:\Users", where eight digits should follow \U
            problem = f"{problem}; {QUOTES_HINT}"
    except yaml.reader.ReaderError as error:
        lines = text[: error.position].split("\n")
        line, column, problem = len(lines), len(lines[-1]) + 1, error.reason
    except RecursionError:
        line, column, problem = 1, 1, "nested too deeply"
    raise UserError(f"no valid YAML: line {line}, column {column}: {problem}")


def read_yaml(path: str | os.PathLike) -> Any:
    """Return the tree of a YAML file, unchecked.

    Raises UserError, in one line, for a file that cannot be read, is larger than
    ``MAX_YAML_BYTES``, is not in UTF-8 or is no YAML.
    """
    path = Path(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("is a pipe or device and not a file")  # opening a pipe would wait forever
        with path.open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        where = looked_in(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot be read: {reason}{where}", path=path) from None
    found = _encoding_but_utf8(raw)
    if found is None and len(raw) > MAX_YAML_BYTES:
        found = f"more than {MAX_YAML_BYTES >> 20} MiB"
    if found:
        raise UserError(path=path, expected="YAML in UTF-8", got=found)
    try:
        return _parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problem = f"line {line} is in another encoding"
        raise UserError(problem, path=path, expected="YAML in UTF-8") from None
    except UserError as error:
        raise _with_place(error, path=path) from None


def _encoding_but_utf8(raw: bytes) -> str | None:
    """Say what bytes are that are not UTF-8 at first sight; None where they may be."""
    zeros = [byte == 0 for byte in raw[:4]]
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or zeros in ([True, False] * 2, [False, True] * 2):
        return "UTF-16 (save the file as UTF-8 in the editor)"
    return "a binary file" if b"\0" in raw else None


def _override(tree: dict, option: str, cls: type[Conf]) -> str:
    """Set in ``tree`` what ``option`` (KEY=VALUE) says; return the dotted key in full."""
    dotted, equals, text = option.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise UserError(expected="KEY=VALUE", got=shown(option))
    field = keys_of(cls).get(parts[0])
    under = field and field.metadata["under"]
    if under and parts[1:2] not in ([], [under]):  # the short form, such as data.gt_path
        below = tree.get(parts[0])
        sets = below.get(under) if isinstance(below, dict) else None
        if not isinstance(sets, dict) or len(sets) != 1:
            raise UserError(f"the YAML has no {parts[0]}.{under}.<set> that this could mean")
        parts[1:1] = [under, *sets]
    branch = tree
    for part in parts[:-1]:
        part = next((name for name in branch if str(name) == part), part)  # 12 is a number in YAML
        if branch.get(part) is None:
            branch[part] = {}
        branch = branch[part]
        if not isinstance(branch, dict):
            raise UserError(f"{part} is a value and has no keys in it")
    branch[parts[-1]] = _parse_value(text)
    return ".".join(str(part) for part in parts)


def _parse_value(text: str) -> Any:
    """Return the VALUE of KEY=VALUE: YAML, in which # begins no comment where nothing is quoted."""
    text = text.strip()
    is_plain = not text.startswith(("'", '"', "[", "{"))
    return text if is_plain and re.search(r"(^|\s)#", text) else _parse(text)


def load(path: str | os.PathLike, cls: type[AnyConf], overrides: Sequence[str] = ()) -> AnyConf:
    """Read and check a YAML file.

    ``overrides`` are texts KEY=VALUE as ``--set`` takes them: the key is dotted, the value is YAML,
    and data.gt_path is short for data.eval.<set>.gt_path. Raises UserError, in one line, for
    anything wrong with the file, a key or a value.
    """
    if not os.fspath(path):
        raise UserError("the path of the YAML file is empty")
    path = os.path.expanduser(path)  # noqa: PTH111 - messages name the path as the user wrote it
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        found = "an empty file" if tree is None else shown(tree)
        raise UserError(path=path, expected="keys and values", got=found)
    given = {}
    for option in overrides:
        name = f"--set {option}" if len(option) <= 200 else f"--set {option[:200]}…"
        try:
            given[_override(tree, option, cls)] = name
        except UserError as error:
            raise _with_place(error, path=name) from None
    try:
        return conf_from_dict(tree, cls)
    except UserError as error:
        wrong = [f"{name}." for name in (error.key or "").split(" and ")]
        options = [
            option
            for name, option in given.items()
            if any(key.startswith(f"{name}.") or f"{name}.".startswith(key) for key in wrong)
        ]
        # Where options set the keys at fault, or a part of them, the file is not to blame.
        raise _with_place(error, path=error.path or " ".join(options) or path) from None


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
