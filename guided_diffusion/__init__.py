"""RePaint: inpainting with denoising diffusion models (Lugmayr et al., CVPR 2022).

Every module stands alone under its stage's name; this root holds only what all of them share:
the one exception for mistakes a user can mend, and how a command line reports it.
"""

import sys
import warnings
from collections.abc import Callable

from tqdm import tqdm


class UserError(ValueError):
    """A mistake the user can mend, told in one line: where, what was expected, what was found.

    ``path`` is the file at fault, ``key`` the YAML key or option; ``str()`` is a single line
    whatever the parts contain. Command lines print it and exit with status 2.
    """

    def __init__(
        self,
        problem: str = "",
        *,
        path: object = None,
        key: str | None = None,
        expected: object = None,
        got: object = None,
    ) -> None:
        self.problem, self.path, self.key = problem, path, key
        self.expected, self.got = expected, got
        pairs = (("expected", expected), ("found", got))
        contrast = ", ".join(f"{word} {value}" for word, value in pairs if value is not None)
        what = "; ".join(part for part in (problem, contrast) if part)
        where = [str(part) for part in (path, key) if part is not None]
        super().__init__(" ".join(": ".join([*where, what]).split()))


def command_line(main: Callable[[], int | None]) -> None:
    """Run ``main`` as a program: exit status 2 and one line on stderr for a ``UserError``.

    Warnings become one line each as well. Ctrl-C exits with 130; any other exception keeps its
    traceback, because it is a defect of the program and not of its input.
    """
    warnings.showwarning = lambda text, *_, **__: tqdm.write(f"warning: {text}", file=sys.stderr)
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}".removesuffix(": "), file=sys.stderr)
        status = 130
    sys.exit(status)
