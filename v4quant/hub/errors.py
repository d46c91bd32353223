"""What the Hub, the network and huggingface_hub say when they fail, as one clear error without secrets.

Messages are our own, with the Hub's sentence after them, cut short and scrubbed: a token or a signed URL that a server
echoes goes no further.
"""

import contextlib
from collections.abc import Iterator

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from v4quant.errors import HubError, UsageError, V4QuantError
from v4quant.words import without_secrets

HINT_LOGIN = "Log in with: hf auth login, or set HF_TOKEN to a token of https://huggingface.co/settings/tokens"
_HINT_AGAIN = "Run the same command again; what is done is kept."
_MOST_CHARACTERS = 300


def scrubbed(text: str) -> str:
    """Foreign text without tokens and without the signed part of URLs, on one line, cut short."""
    text = " ".join(without_secrets(text).split())
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


@contextlib.contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn whatever a call of the Hub raises into one clear error.

    Args:
        where: what was being done with which repository, for the message.

    Raises:
        HubError: for refusals, failures, and answers that are not the Hub's.
        UsageError: for a name that the Hub would not take.
    """
    try:
        yield
    except V4QuantError:
        raise
    except HFValidationError as error:
        raise UsageError(f"{where}: {scrubbed(str(error))}") from error
    except RuntimeError as error:  # Xet's own, or huggingface_hub's around what went wrong with one of many uploads
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError | httpx2.HTTPError) else error
        raise _described(where, cause) from error
    except UnicodeEncodeError as error:  # of a header
        raise HubError(f"{where}: the token holds characters that no token has", hint=HINT_LOGIN) from error
    except (HfHubHTTPError, httpx2.HTTPError, httpx2.InvalidURL, OIDCError, OSError) as error:
        raise _described(where, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise HubError(
            f"{where}: the answer is not the Hub's: {scrubbed(f'{type(error).__name__}: {error}')}",
            hint="If HF_ENDPOINT is set, check that it is an endpoint of the Hub.",
        ) from error


def _described(where: str, error: BaseException) -> HubError:
    if isinstance(error, HfHubHTTPError):
        return status_error(where, error)
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{where}: HF_HUB_OFFLINE is set", hint="Unset it, or give a local folder.")
    if isinstance(error, LocalTokenNotFoundError | OIDCError):
        return HubError(f"{where}: no token: {scrubbed(str(error))}", hint=HINT_LOGIN)
    if isinstance(error, httpx2.TimeoutException):
        return HubError(f"{where}: the Hub does not answer in time", hint=_HINT_AGAIN)
    if isinstance(error, RuntimeError):
        return HubError(f"{where}: the transfer fails: {scrubbed(str(error))}", hint=_HINT_AGAIN)
    what = scrubbed(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    return HubError(f"{where}: cannot reach the Hub: {what}", hint=f"Check the network. {_HINT_AGAIN}")


def status_error(where: str, error: HfHubHTTPError) -> HubError:
    """An HTTP status as a message and what to do about it."""
    response = error.response
    status = response.status_code if response is not None else 0
    said = scrubbed(error.server_message or "")
    more = f": {said}" if said else ""
    if isinstance(error, GatedRepoError):
        return HubError(f"{where}: access is gated{more}", hint="Ask for access on the repository's page, then log in.")
    has_token = response is not None and "authorization" in response.request.headers
    if status == 401 and has_token:
        return HubError(f"{where}: the Hub does not accept the token; it is wrong or expired{more}", hint=HINT_LOGIN)
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{where}: no such revision{more}", hint="See the branches and tags on the repository's page.")
    if isinstance(error, RemoteEntryNotFoundError):
        return HubError(f"{where}: no such file{more}")
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        who = "the token has no access to it" if has_token else "no token is set"
        return HubError(f"{where}: no such repository, or it is private and {who}{more}", hint=HINT_LOGIN)
    if status == 403:
        return HubError(f"{where}: the token has no permission{more}", hint="Use a token with write access.")
    if status == 429:
        return HubError(f"{where}: too many requests{more}", hint=f"Wait some minutes. {_HINT_AGAIN}")
    if status >= 500:
        return HubError(f"{where}: the Hub fails ({status}){more}", hint=_HINT_AGAIN)
    return HubError(f"{where}: the Hub refuses ({status}){more}")
