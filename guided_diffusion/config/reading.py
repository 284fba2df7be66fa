"""From a YAML file, with ``KEY=VALUE`` options, to a checked configuration."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.schema import (
    QUOTES_HINT,
    AnyConf,
    Conf,
    conf_from_dict,
    keys_of,
    shown,
    with_place,
)
from guided_diffusion.errors import UserError, looked_in

_INTEGER, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may be there only once, and only decimal numbers are numbers.

    Text stays what YAML 1.1 would take for a number in base 8, 16 or 60: 012, 0x12 and 1:30.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INTEGER, _FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for name in (name for name, _ in node.value if isinstance(name, yaml.ScalarNode)):
            if name.value in seen:
                problem = f"the key {name.value} is here twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


_DECIMAL = r"[-+]?([0-9]+[.][0-9]*|[.][0-9]+)([eE][-+][0-9]+)?$|[-+]?[.](inf|nan)$"
_STARTS = list("-+.0123456789")
_Loader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?(0|[1-9][0-9]{0,17})$"), _STARTS)
_Loader.add_implicit_resolver(_FLOAT, re.compile(_DECIMAL), _STARTS)


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
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        problem = error.reason
    except RecursionError:
        line, column, problem = 1, 1, "nested too deeply"
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise UserError(f"no valid YAML: {error}") from None  # such as the date 2024-02-30
    raise UserError(f"no valid YAML: line {line}, column {column}: {problem}")


def read_yaml(path: str | os.PathLike) -> Any:
    """Return the tree of a YAML file, unchecked.

    Raises UserError, in one line, for a file that cannot be read, is not in UTF-8 or is no YAML.
    """
    path = Path(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("is a pipe or device and not a file")  # opening a pipe would wait forever
        with path.open("rb") as file:
            raw = file.read(1024)
            if b"\0" not in raw:  # someone may give a checkpoint instead: do not read it all
                raw += file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        where = looked_in(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot be read: {reason}{where}", path=path) from None
    if b"\0" in raw:
        is_utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "UTF-16 (save the file as UTF-8 in the editor)" if is_utf16 else "a binary file"
        raise UserError(path=path, expected="YAML in UTF-8", got=found)
    try:
        return _parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problem = f"line {line} is in another encoding"
        raise UserError(problem, path=path, expected="YAML in UTF-8") from None
    except UserError as error:
        raise with_place(error, path=path) from None


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
    text = text.strip()
    # Where nothing is quoted, # begins no comment: it may be a colour or part of a path.
    has_hash = re.search(r"(^|\s)#", text) and not text.startswith(("'", '"', "[", "{"))
    branch[parts[-1]] = text if has_hash else _parse(text)
    return ".".join(str(part) for part in parts)


def as_overrides(keys: Mapping[str, Any]) -> list[str]:
    """Return keys and values as texts KEY=VALUE, which ``load_conf`` takes."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]


def load_conf(
    path: str | os.PathLike, cls: type[AnyConf] = InpaintConf, overrides: Sequence[str] = ()
) -> AnyConf:
    """Read and check a YAML file.

    ``overrides`` are texts KEY=VALUE as ``--set`` takes them: the key is dotted, the value is YAML,
    and data.gt_path is short for data.eval.<set>.gt_path. Raises UserError, in one line, for
    anything wrong with the file, a key or a value.
    """
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
            raise with_place(error, path=name) from None
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
        raise with_place(error, path=error.path or " ".join(options) or path) from None
