"""RePaint: inpainting with denoising diffusion models (Lugmayr et al., CVPR 2022).

``from guided_diffusion import RePaint`` is the library; see docs/python.md.
"""

import os
import signal
from typing import Any

# Programs import this first, so it imports next to nothing itself.


def __getattr__(name: str) -> Any:
    """Import what takes seconds when it is first asked for."""
    if name == "RePaint":
        from guided_diffusion.run.repaint import RePaint

        return RePaint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def end_at_once_on_ctrl_c() -> None:
    """Let Ctrl-C end the process with status 130, as while it imports, or has nothing to save.

    An exception would not do: some modules swallow it while they are imported, others print it.
    Where Ctrl-C is ignored (nohup) it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def raise_on_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: from here on there is something to tidy up."""
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once(*_: object) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(130)
