"""The one error a user is meant to read: what is wrong, where, and how to mend it.

The command line prints it without a traceback and exits with 2; the HTTP server answers with
``status``. Everything else that is raised is a bug or a failure of the machine (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_GATE_SAID_NO, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


class UserError(Exception):
    """Bad input. ``what`` is wrong, ``where`` (file:line, key, URL), ``fix`` says how to mend it.

    ``status`` is the HTTP status the server answers with when the input came in a request, and
    ``retry_after`` the seconds after which the same request may be answered.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        fix: str = "",
        status: int = 400,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(what, where, fix, status, retry_after)
        self.what, self.where, self.fix, self.status = what, where, fix, status
        self.retry_after = retry_after

    def __str__(self) -> str:
        text = self.what
        if self.where:
            text = f"{self.where}: {text}"
        if self.fix:
            text += f"\n  fix: {self.fix}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments do not pickle by default; Ray sends them across nodes.
        return _rebuild, (type(self), self.args)


def _rebuild(cls: type[UserError], args: tuple[str, str, str, int, float | None]) -> UserError:
    what, where, fix, status, retry_after = args
    error = cls(what, where=where, fix=fix, status=status)
    error.retry_after = retry_after
    return error


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the nearest valid word, else the list of valid words."""
    names = sorted(valid)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(names)}"
