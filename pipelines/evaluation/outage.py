"""Waiting for somebody who is away: a reward server, a judge."""

import time


class Outage:
    """How long one that does not answer is asked again: so long for an outage, not for every question during it.

    Args:
        patience_s: Seconds from the first question without an answer; after that each further one is asked once.
    """

    def __init__(self, patience_s: float):
        self.patience_s = patience_s
        self._since: float | None = None

    def may_wait(self, pause_s: float) -> bool:
        """Whether there is time for another pause, after a question without an answer."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        return now + pause_s <= self._since + self.patience_s

    def is_over(self) -> None:
        """There was an answer."""
        self._since = None
