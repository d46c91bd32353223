"""How long to wait before asking again, and when to give up."""

import email.utils
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.errors import HfHubHTTPError

from v4quant.errors import HubError
from v4quant.hub.errors import hub_errors

_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds
# What a server may ask for; a Retry-After beyond it ends the run with a message rather than an hour of silence.
MAX_RETRY_AFTER = 300.0
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
sleep = time.sleep
_Result = TypeVar("_Result")


class Patience:
    """Counts failures that may pass; progress makes it start anew."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._failures = 0

    def progress(self) -> None:
        """Something came of it."""
        self._failures = 0

    def wait(self, why: str, retry_after: str | None = None) -> None:
        """Sleep before the next try.

        Args:
            why: what went wrong.
            retry_after: the header of that name.

        Raises:
            HubError: if it was tried often enough, or the server asks for too much time.
        """
        seconds = _seconds(retry_after)
        if self._failures == len(_WAITS):
            raise HubError(
                f"{self._where}: {why}, {len(_WAITS) + 1} times over", hint="Run the same command again later."
            )
        if seconds is not None and seconds > MAX_RETRY_AFTER:
            raise HubError(f"{self._where}: {why}; the Hub asks to wait {seconds:,.0f} s", hint="Run it again then.")
        sleep(max(seconds or 0.0, _WAITS[self._failures]))
        self._failures += 1


def persist(where: str, call: Callable[[], _Result]) -> _Result:
    """Call the Hub until it answers; huggingface_hub itself tries most calls once.

    Args:
        where: for messages.
        call: may be repeated without harm.

    Raises:
        HubError: if the Hub refuses, or fails again and again.
    """
    patience = Patience(where)
    while True:
        with hub_errors(where):
            try:
                return call()
            except HfHubHTTPError as error:
                if error.response is None or error.response.status_code not in RETRY_STATUS:
                    raise
                why, after = f"the Hub fails ({error.response.status_code})", error.response.headers.get("Retry-After")
            except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
                why, after = type(error).__name__, None
        patience.wait(why, after)


def _seconds(retry_after: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after.strip()[:12])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
