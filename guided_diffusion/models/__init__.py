"""Networks of other programs, behind the callable that this program's own are."""
