"""Times by cron expressions, in a time zone; where its clocks change, as Debian's cron has it."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from qwen_ray.errors import UserError


class Schedule:
    """The times that a cron expression of five fields names."""

    def __init__(self, expression: str, time_zone: str = "UTC") -> None:
        """:class:`UserError` for an expression or a zone (``Europe/Berlin``) that is none."""
        try:
            self._zone = ZoneInfo(time_zone)
        except (KeyError, ValueError, OSError):
            raise UserError(f"unknown time zone '{time_zone}'", fix="such as UTC or Europe/Berlin") from None
        self.expression = expression
        try:
            self._times(0.0)
            if len(expression.split()) != 5:  # the package takes one for seconds too
                raise CronSimError("Wrong number of fields")
        except CronSimError as e:
            raise UserError(
                f"'{expression}' is not a cron expression ({e})",
                fix="minute hour day month weekday, such as '0 3 * * 1'",
            ) from None

    def last(self, now: float) -> float | None:
        """The latest of its times up to ``now``; seconds since 1970. None if there was none in 50 years."""
        return self._first(self._times(int(now) + 1, reverse=True))

    def next(self, now: float) -> float | None:
        """The first of its times after ``now``. None if there will be none in 50 years."""
        return self._first(self._times(now))

    def _times(self, start: float, *, reverse: bool = False) -> CronSim:
        return CronSim(self.expression, datetime.fromtimestamp(start, self._zone), reverse=reverse)

    @staticmethod
    def _first(times: CronSim) -> float | None:
        try:
            return next(times).timestamp()
        except StopIteration:
            return None
