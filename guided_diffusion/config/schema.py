"""What a YAML key is: one field with a type, a range and a sentence, and what follows from it.

A configuration is a frozen dataclass of ``Conf`` whose fields are keys. What ``key(...)`` says of a
key is the one source of its check, of its documentation and of the JSON Schema that editors read.
A configuration checks itself whenever it is made: from a file, by ``--set`` or by ``replace``.
This module knows no key by name; keys.py has them all.
"""

import dataclasses
import difflib
import operator
import os
import re
import reprlib
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, NamedTuple, TypeVar

import yaml

from guided_diffusion.errors import UserError, looked_in

MAX_YAML_BYTES = 1 << 21  # a checkpoint given for a YAML is refused without reading all of it
# ---- What a key may hold -------------------------------------------------------------------------
BOUNDS = {  # as key() takes it: (test, words, JSON Schema's word)
    "low": (operator.ge, "at least", "minimum"),
    "above": (operator.gt, "above", "exclusiveMinimum"),
    "high": (operator.le, "at most", "maximum"),
    "below": (operator.lt, "below", "exclusiveMaximum"),
    "multiple_of": (lambda value, unit: value % unit == 0, "a multiple of", "multipleOf"),
}
KINDS = {  # type: (words, JSON Schema's type)
    int: ("an integer", "integer"),
    float: ("a finite number", "number"),
    bool: ("true or false", "boolean"),
    str: ("text", "string"),
}


EXPONENT = r"[-+]?(\d{1,18}(\.\d{0,18})?|\.\d{1,18})[eE][-+]?\d{1,3}"
QUOTES = "in double quotes \\ is special, so write single quotes or /"


class Pattern(NamedTuple):
    """A text made of numbers: YAML may give it as text, as one number or as a list of numbers."""

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
    """A dataclass field that is a YAML key; without a default it is required.

    ``text`` documents it in one sentence. ``choices`` are all the values there are; ``bounds`` are
    those of BOUNDS and ``special`` is a value allowed outside them. A ``path`` may begin with ~,
    the home folder. ``under="eval"`` is for keys that hold ``eval:`` and in it one set of keys by a
    name that is free.
    """
    rules = {"choices": choices, "pattern": pattern, "special": special, "path": path}
    rules |= {"under": under, "bounds": bounds}
    return dataclasses.field(default=default, metadata={"text": text, **rules})


def _keys(cls: type) -> dict[str, dataclasses.Field]:
    """The fields of a configuration that are YAML keys."""
    return {field.name: field for field in dataclasses.fields(cls) if field.metadata}


def _kinds(field: dataclasses.Field) -> tuple[type, ...]:
    return typing.get_args(field.type) or (field.type,)


def shown(value: Any) -> str:
    """``value`` for a message: short whatever it holds, and as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 60
    return brief.repr(value)


def _wanted(field: dataclasses.Field) -> str:
    """In words, what a key's value has to be."""
    rules = field.metadata
    if rules["choices"]:
        return " or ".join(c if isinstance(c, str) else shown(c) for c in rules["choices"])
    if rules["pattern"]:
        return rules["pattern"].words
    bounds = [f"{BOUNDS[name][1]} {limit}" for name, limit in rules["bounds"].items()]
    special = [] if rules["special"] is None else [f"or {rules['special']}"]
    range_ = [" and ".join(bounds)] if bounds else []
    return ", ".join([KINDS[_kinds(field)[0]][0], *range_, *special])


def _number(value: Any, kind: type) -> int | float | None:
    """``value`` as an int or float, None if it is neither or not finite.

    Text such as 1e-4 counts: YAML 1.1 takes an exponent without point and sign for text.
    """
    if isinstance(value, str) and re.fullmatch(EXPONENT, value, re.ASCII):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
        return None
    return kind(value) if kind is float or value == int(value) else None


def _text(value: Any) -> str | None:
    """``value`` as text, None if it is none: integers count, as ``name: 12`` is meant as text.

    Other things that YAML makes of unquoted text (dates, ``yes``, 1.10) have lost how they were
    written.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return str(value)
    if not isinstance(value, str) or {"Cc", "Cs", "Zl", "Zp"} & set(
        map(unicodedata.category, value)
    ):
        return None
    return value


def _number_text(value: Any, pattern: Pattern) -> str | None:
    """``value`` as a text of ``pattern``, None if it is none."""
    items = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int | float | str) for item in items):
        return None
    text = ",".join(item if isinstance(item, str) else shown(item) for item in items)
    return text.replace(" ", "") if re.fullmatch(pattern.regex, text, re.ASCII) else None


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """A key's value in its own type; UserError names the key, what it wants and what it got."""
    rules, kind, got = field.metadata, _kinds(field)[0], shown(value)
    if NoneType in _kinds(field) and (value is None or value == ""):
        return None
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        raise UserError(key=field.name, expected=kind.__name__, got=got)
    wrong = UserError(key=field.name, expected=_wanted(field), got=got)
    if rules["choices"]:
        if any(type(value) is type(choice) and value == choice for choice in rules["choices"]):
            return value
        if len(rules["choices"]) == 1 and isinstance(value, bool):
            wrong = UserError(rules["text"].rstrip("."), key=field.name, got=got)
    elif kind is bool and isinstance(value, bool):
        return value
    elif kind is str:
        text = _number_text(value, rules["pattern"]) if rules["pattern"] else _text(value)
        if text or (text == "" and field.default is not MISSING):
            return os.path.expanduser(text) if rules["path"] else text  # noqa: PTH111 - keeps "./"
        if not rules["pattern"] and not isinstance(value, str):
            problem = "text that YAML takes for something else needs quotes"
            wrong = UserError(problem, key=field.name, got=got)
        elif text is None and not rules["pattern"]:  # mostly "C:\new": \n is the end of a line
            expected = f"text without control characters ({QUOTES})"
            wrong = UserError(key=field.name, expected=expected, got=got)
    elif kind in (int, float):
        number = _number(value, kind)
        bounds = [(BOUNDS[name][0], limit) for name, limit in rules["bounds"].items()]
        inside = number is not None and all(test(number, limit) for test, limit in bounds)
        if inside or (number is not None and number == rules["special"]):
            return number
    raise wrong


def numbers(text: str, kind: type) -> tuple:
    """The numbers of a text that holds them with commas between."""
    return tuple(kind(item) for item in text.split(",") if item)


def require(fits: bool, keys: str, problem: str) -> None:
    """Refuse values that do not go together; ``keys`` are the keys, joined by 'and'."""
    if not fits:
        raise UserError(problem, key=keys)


@dataclass(frozen=True, kw_only=True)
class Conf:
    """What all configurations share: every key is brought to its type and checked.

    ``ignored`` are dotted keys that a tree may have without effect, each with the reason.
    """

    ignored: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for field in _keys(type(self)).values():
            self._set(field.name, _checked(field, getattr(self, field.name)))

    def _set(self, name: str, value: Any) -> None:
        """Give a key its final value; for ``__post_init__`` alone."""
        object.__setattr__(self, name, value)


AnyConf = TypeVar("AnyConf", bound=Conf)


# ---- From a tree, and back -----------------------------------------------------------------------


def _seen_from(error: UserError, *, path: object = None, prefix: str = "") -> UserError:
    """The same error seen from further up: in a file, or with ``prefix`` before its keys."""
    keys = error.key and " and ".join(prefix + name for name in error.key.split(" and "))
    return UserError(error.problem, path=path, key=keys, expected=error.expected, got=error.got)


def _mapping(tree: Any, where: str) -> Mapping:
    if not isinstance(tree, Mapping):
        raise UserError(key=where or None, expected="keys and values", got=shown(tree))
    return tree


def _unknown(name: Any, cls: type, prefix: str, root: type) -> UserError:
    """An unknown key, with the known one that is spelt most like it, best one of this place."""
    name = str(name)[:100]
    local = [prefix + known for known in _keys(cls)]

    def likeness(known: str) -> tuple[float, bool]:
        last = known.rpartition(".")[2].lower()
        return difflib.SequenceMatcher(None, name.lower(), last).ratio(), known in local

    nearest = max([*local, *(doc.key for doc in describe(root))], key=likeness)
    return UserError(f"unknown key; the nearest known key is {nearest}", key=prefix + name)


def _build(
    cls: type[AnyConf], tree: Any, root: type[Conf], prefix: str = "", place: str = "", **extra: str
) -> AnyConf:
    """Make ``cls`` of the part of a tree at ``prefix``.

    ``root`` is the class of the whole tree, ``place`` is the prefix with ``<set>`` for the name of
    a set, and ``extra`` are fields that are no keys.
    """
    known, values = _keys(cls), dict(extra)
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
        raise _seen_from(error, prefix=prefix) from None


def _build_named(field: dataclasses.Field, tree: Any, root: type[Conf]) -> Conf:
    """The one set of keys, by a free name, of a key such as ``data: eval: <set>:``."""
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


def conf_from_dict(tree: Any, cls: type[AnyConf], source: object = None) -> AnyConf:
    """A checked configuration from a tree in the published YAML form.

    Raises UserError for anything wrong with it, as of the file ``source``.
    """
    try:
        return _build(cls, tree, cls)
    except UserError as error:
        raise _seen_from(error, path=source) from None


def conf_to_dict(conf: Conf) -> dict[str, Any]:
    """The tree in the published YAML form with all keys; loading it gives the same ``conf``."""
    tree = {}
    for name, field in _keys(type(conf)).items():
        value, under = getattr(conf, name), field.metadata["under"]
        if under:
            tree[name] = {under: {value.name: conf_to_dict(value)}}
        elif isinstance(value, Conf):
            tree[name] = conf_to_dict(value)
        elif value is not None:
            tree[name] = value
    return tree


# ---- From a file ---------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: no key twice, no aliases that multiply, integers are decimal."""

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
        try:  # always deep: PyYAML would fill a map or a set later, where nothing tells its place
            return super().construct_object(node, deep=True)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            raise yaml.MarkedYAMLError(
                problem=f"this is not a {node.tag.rpartition(':')[2]}",
                problem_mark=node.start_mark,
            ) from error

    def decimal(self, node: yaml.ScalarNode) -> int | str:
        """An integer; 012, 0x12 and 1:12, other integers to YAML 1.1, stay text."""
        text = self.construct_scalar(node)
        return int(text) if re.fullmatch(r"[-+]?(0|[1-9]\d{0,17})", text) else text

    def pointed(self, node: yaml.ScalarNode) -> float | str:
        """A number with a point; 1:30.5, to YAML 1.1 a number of base 60, stays text."""
        text = self.construct_scalar(node)
        return text if ":" in text else self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.pointed)


def _parse(text: str) -> Any:
    """What the YAML says; UserError tells line and column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem
        line, column = mark.line + 1, mark.column + 1
        if "escape" in problem:  # "C:\Users": \U wants eight digits
            problem = f"{problem}; {QUOTES}"
    except yaml.reader.ReaderError as error:
        lines = text[: error.position].split("\n")
        line, column, problem = len(lines), len(lines[-1]) + 1, error.reason
    except RecursionError:
        line, column, problem = 1, 1, "nested too deeply"
    raise UserError(f"no valid YAML: line {line}, column {column}: {problem}")


def read_yaml(path: str | os.PathLike, max_bytes: int = MAX_YAML_BYTES) -> Any:
    """The tree that a YAML file holds; UserError, in one line, for all that is wrong with it."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
        raise UserError("is no regular file", path=path)
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        where = looked_in(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot be read: {reason}{where}", path=path) from None
    found = _no_utf8(raw) or (len(raw) > max_bytes and f"more than {max_bytes >> 20} MiB")
    if found:
        raise UserError(path=path, expected="YAML in UTF-8", got=found)
    try:
        return _parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problem = f"line {line} is in another encoding"
        raise UserError(problem, path=path, expected="YAML in UTF-8") from None
    except UserError as error:
        raise _seen_from(error, path=path) from None


def _no_utf8(raw: bytes) -> str | None:
    """In words, what the bytes are that cannot be UTF-8 text."""
    zeros = [byte == 0 for byte in raw[:4]]
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or zeros in ([True, False] * 2, [False, True] * 2):
        return "UTF-16 or UTF-32 (save the file as UTF-8 in the editor)"
    return "a binary file" if b"\0" in raw else None


def _override(tree: dict, option: str, cls: type[Conf]) -> str:
    """Set in ``tree`` what ``option``, KEY=VALUE, says; returns the whole dotted key."""
    dotted, equals, text = option.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise UserError(expected="KEY=VALUE", got=shown(option))
    field = _keys(cls).get(parts[0])
    under = field and field.metadata["under"]
    if under and parts[1:2] not in ([], [under]):  # the short form
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
    branch[parts[-1]] = _parse(text)
    return ".".join(str(part) for part in parts)


def load(path: str | os.PathLike, cls: type[AnyConf], overrides: Sequence[str] = ()) -> AnyConf:
    """Read and check a YAML file.

    ``overrides`` are texts KEY=VALUE with dotted keys and values in YAML, as ``--set`` takes them;
    data.gt_path is short for data.eval.<set>.gt_path. Raises UserError, in one line, for all that
    can be wrong with a file, a key or a value.
    """
    if not os.fspath(path):
        raise UserError("the path of the YAML file is empty")
    path = os.path.expanduser(path)  # noqa: PTH111 - as the user wrote it but for the ~
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
            raise _seen_from(error, path=name) from None
    try:
        return conf_from_dict(tree, cls, path)
    except UserError as error:
        wrong = [f"{name}." for name in (error.key or "").split(" and ")]
        options = [
            option
            for name, option in given.items()
            if any(key.startswith(f"{name}.") or f"{name}.".startswith(key) for key in wrong)
        ]
        raise _seen_from(error, path=" ".join(options) or path) from None


# ---- The keys, described -------------------------------------------------------------------------


class KeyDoc(NamedTuple):
    """A YAML key for a reader: dotted name, what its value is, default, sentence."""

    key: str
    type: str
    default: str
    text: str


def _place(prefix: str, field: dataclasses.Field) -> str:
    under = field.metadata["under"]
    return f"{prefix}{field.name}.{under}.<set>." if under else f"{prefix}{field.name}."


def describe(cls: type[Conf], prefix: str = "") -> list[KeyDoc]:
    """All keys of a configuration in their order, nested ones by dotted names."""
    docs = []
    for name, field in _keys(cls).items():
        if dataclasses.is_dataclass(field.type):
            docs += describe(field.type, _place(prefix, field))
        else:
            words = {MISSING: "required", None: "absent", "": "empty"}
            default = words.get(field.default) or shown(field.default).strip("'")
            docs.append(KeyDoc(prefix + name, _wanted(field), default, field.metadata["text"]))
    return docs
