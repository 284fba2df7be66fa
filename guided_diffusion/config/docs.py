"""The keys for their readers: ``--help``, Markdown tables and JSON Schema.

``python guided_diffusion/config/docs.py`` rewrites the JSON Schemas in ``confs/`` and
docs/configuration.md after a key has changed.
"""

import dataclasses
import json
import sys
import textwrap
from dataclasses import MISSING
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from guided_diffusion.cli import command_line
from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.schema import (
    BOUNDS,
    KINDS,
    Conf,
    describe,
    keys_of,
    prefix_within,
    types_of,
)
from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.io.files import write_text_atomic


def markdown_table(cls: type[Conf]) -> str:
    """Return the keys as a Markdown table."""
    rows = [("key", "value", "default", "meaning"), ("---",) * 4]
    rows += [(f"`{doc.key}`", doc.type, doc.default, doc.text) for doc in describe(cls)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def help_text(cls: type[Conf], width: int = 100) -> str:
    """Return the keys as text for a terminal of ``width`` columns."""
    indents = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
    wrapper = textwrap.TextWrapper(width, **indents, break_on_hyphens=False)
    return "".join(
        f"  {doc.key}  ({doc.type}; default: {doc.default})\n{wrapper.fill(doc.text)}\n"
        for doc in describe(cls)
    )


def _json_key(field: dataclasses.Field) -> dict[str, Any]:
    """Return the JSON Schema of one key's value, which accepts what ``schema.py`` accepts."""
    rules, kind = field.metadata, types_of(field)[0]
    schema: dict[str, Any] = {"description": rules["text"]}
    if field.default not in (MISSING, None):
        schema["default"] = field.default
    optional = field.default is not MISSING  # an empty value is an absent one
    if rules["choices"]:
        return {**schema, "enum": [*rules["choices"], *([None] if optional else [])]}
    types = [KINDS[kind][1]] + ["null"] * optional + ["integer"] * (kind is str)
    if rules["pattern"]:
        types += ["number", "array"]
        schema["pattern"] = f"^{rules['pattern'].regex}$"
    bounds = {BOUNDS[name][2]: limit for name, limit in rules["bounds"].items()}
    if rules["special"] is not None:
        return {**schema, "anyOf": [{"type": types, **bounds}, {"const": rules["special"]}]}
    return {**schema, "type": types, **bounds}


def json_schema(cls: type[Conf], root: type[Conf] | None = None, place: str = "") -> dict[str, Any]:
    """Return the JSON Schema of a YAML. Editors complete and check keys with it.

    ``cls`` is ``root`` itself by default, or the part of it at ``place`` (``data.eval.<set>.``).
    """
    shut = {"type": "object", "additionalProperties": False}
    root = root or cls
    properties: dict[str, Any] = {}
    for name, field in keys_of(cls).items():
        if not dataclasses.is_dataclass(field.type):
            properties[name] = _json_key(field)
            continue
        under = field.metadata["under"]
        inner = json_schema(field.type, root, prefix_within(place, field))
        if under:
            one = {"type": "object", "minProperties": 1, "maxProperties": 1}
            sets = {under: {**one, "additionalProperties": inner}}
            inner = {**shut, "properties": sets, "required": [under]}
        properties[name] = inner
    for ignored, why in root.ignored.items():
        parent, _, name = ignored.rpartition(".")
        if parent == place.rstrip("."):
            properties[name] = {"description": f"Without effect: {why}."}
    required = [name for name, field in keys_of(cls).items() if field.default is MISSING]
    return {**shut, "properties": properties, "required": required}


def schema_files() -> dict[str, str]:
    """Return the JSON Schema files of ``confs/``: content by file name."""
    classes = {"schema.json": InpaintConf, "train.schema.json": TrainConf}
    draft = {"$schema": "http://json-schema.org/draft-07/schema#"}
    return {
        name: json.dumps({**draft, **json_schema(cls)}, indent=1) + "\n"
        for name, cls in classes.items()
    }


_PAGE = """# Configuration

`python guided_diffusion/config/docs.py` writes this page from the keys themselves. `python test.py
--help` and `python train.py --help` print the same. Editors that know JSON Schema complete and
check the files in `confs/`. A YAML states only what differs from the defaults. `--set KEY=VALUE`
changes a key on the command line, with dots for nested keys; `data.gt_path` is short for
`data.eval.<set>.gt_path`.

## Inpainting: test.py

{inpainting}
Published files hold further keys that never had an effect. They are accepted: {ignored}.

## Training: train.py

{training}"""


def configuration_page() -> str:
    """Return the text of ``docs/configuration.md``."""
    return _PAGE.format(
        inpainting=markdown_table(InpaintConf),
        ignored=", ".join(f"`{key}`" for key in InpaintConf.ignored),
        training=markdown_table(TrainConf),
    )


def main() -> None:
    """Rewrite the files that repeat the keys: JSON Schemas in ``confs/``, the page in ``docs/``."""
    root = Path(__file__).resolve().parents[2]
    for name, text in schema_files().items():
        write_text_atomic(root / "confs" / name, text)
    write_text_atomic(root / "docs" / "configuration.md", configuration_page())


if __name__ == "__main__":
    command_line(main)
