"""The one exception for mistakes a user can mend."""


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
