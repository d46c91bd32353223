"""The one way to the Hub: huggingface_hub's own client, with time limits, and a token that goes to one host only.

huggingface_hub finds the token (HF_TOKEN, or `hf auth login`). Whatever URL it is asked to follow - a redirect, the
next page, where to upload - the token is taken off every request that leaves the endpoint's origin.
"""

import logging
import os
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import disable_progress_bars

import v4quant
from v4quant.errors import UsageError
from v4quant.hub.errors import hub_errors
from v4quant.words import remember_secret

# Seconds. huggingface_hub's own client would wait for ever.
_TIMEOUT = httpx2.Timeout(60.0, connect=20.0, write=120.0, read=120.0)
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Hub:
    """An endpoint, and whoever the token says that we are.

    Attributes:
        api: huggingface_hub's client for it.
    """

    api: HfApi

    @property
    def endpoint(self) -> str:
        """Its URL, without a slash at the end."""
        return str(self.api.endpoint)

    def headers(self) -> dict[str, str]:
        """Headers of a request to the endpoint; the token is among them, so they go nowhere else.

        Raises:
            HubError: if there should be a token and it cannot be had.
        """
        with hub_errors(self.endpoint):
            return dict(self.api._build_hf_headers())

    def is_endpoint(self, url: str) -> bool:
        """True for a URL of the endpoint's own origin."""
        return origin(url) == origin(self.endpoint)


def connect() -> Hub:
    """The Hub that HF_ENDPOINT names; huggingface.co by default.

    Raises:
        UsageError: if HF_ENDPOINT is no URL.
    """
    endpoint = _endpoint()
    if origin(endpoint) is None:
        raise UsageError(
            f"HF_ENDPOINT is {endpoint[:200]!r}, expected a URL", hint="For example: https://huggingface.co"
        )
    _set_up_once()
    return Hub(HfApi(endpoint=endpoint, library_name="v4quant", library_version=v4quant.__version__))


@cache
def _set_up_once() -> None:
    """Give huggingface_hub our HTTP client; again would close the one that other threads are using."""
    disable_progress_bars()  # the commands show their own
    hub_logging.set_verbosity(logging.ERROR)
    set_client_factory(_client)


def origin(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port; None for what is no web address."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        return None
    return (parts.scheme, parts.hostname.lower(), port) if parts.scheme in _PORTS and parts.hostname else None


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", constants._HF_DEFAULT_ENDPOINT).rstrip("/")


def _client() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = _TIMEOUT
    client.event_hooks = {"request": [*client.event_hooks["request"], _keep_the_token_home]}
    return client


def _keep_the_token_home(request: httpx2.Request) -> None:
    authorization = request.headers.get("authorization")
    if authorization is None:
        return
    remember_secret(authorization.removeprefix("Bearer ").strip())
    if origin(str(request.url)) != origin(_endpoint()):
        del request.headers["authorization"]
