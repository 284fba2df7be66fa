"""Folders of the Hugging Face hub: ``hf://owner/name`` or ``hf://owner/name@revision``."""

import re
from collections.abc import Sequence
from pathlib import Path

from guided_diffusion.errors import UserError

HUB = "hf://"
NEEDS = "pip install -r requirements-diffusers.txt"
_WORD = r"\w[\w.-]*"
_NAME = re.compile(rf"hf://({_WORD}/{_WORD})(?:@({_WORD}(?:/{_WORD})*))?/?", re.ASCII)


def local_folder(name: str) -> Path | None:
    """Return the folder that ``name`` means on this machine; uses no network.

    None for a name of the hub whose configuration has not been fetched. Raises UserError for a name
    that the hub cannot have, and where huggingface_hub is missing.
    """
    if not name.startswith(HUB):
        return Path(name)
    root = snapshot(name)
    return root if root and any(root.glob("**/config.json")) else None


def fetch_configuration(name: str) -> bool:
    """Fetch the JSON files of a name of the hub, if they are not here; return whether it did."""
    if not name.startswith(HUB) or local_folder(name):
        return False
    snapshot(name, ["*.json"])
    return True


def how_to_fetch(name: str) -> str:
    """Return the advice for a machine without network."""
    repository = name.removeprefix(HUB).partition("@")[0]
    folder = repository.rpartition("/")[2]
    command = f"hf download {repository} --local-dir {folder}"
    return f"on a machine with network: {command}, then set model_path to that folder"


def snapshot(name: str, patterns: Sequence[str] = ()) -> Path | None:
    """Return the folder of the hub's cache, after fetching the files that match ``patterns``.

    Without patterns it uses no network, and returns None where the folder is not there. Raises
    UserError as ``local_folder``, and where the files cannot be fetched.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(path=name[:100], expected="hf://owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"needs huggingface_hub: {NEEDS}", path=name) from None
    options = {"allow_patterns": list(patterns)} if patterns else {"local_files_only": True}
    try:
        return Path(snapshot_download(match[1], revision=match[2], **options))
    except Exception as error:  # the library raises many types
        if not patterns:
            return None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"cannot be fetched ({reason}); {how_to_fetch(name)}", path=name) from error
