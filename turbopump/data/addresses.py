"""What an address of a store may be, and the query that lets all its requests pass.

A query (`sv=...&sig=...`: an Azure SAS token, a policy of CloudFront, a signed prefix of Cloud CDN) is a secret that
holds for every file below an address. It comes from the environment, never with the address, which is written into run
directories and errors; it is masked in what servers answer, and no redirect carries it to another host (HTTP clients
hand the whole address on, as the referrer). Queries that are signed for one file alone are refused: a dataset has many.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from turbopump.core.errors import UsageError

SCHEMES = ("s3", "gs", "az", "http", "https", "file")
_QUERY = re.compile(r"[^\s=&?#\x00-\x1f\x7f-\U0010ffff]+=[^\s&?#\x00-\x1f\x7f-\U0010ffff]*")
_AZURE_SAS = ("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN")  # the names that obstore takes one from
_AZURE_FIRST = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY",
                "AZURE_STORAGE_TOKEN")  # fmt: skip
_NOWHERE = "http://255.255.255.255:9"  # no host has this address: connecting fails at once
_SHORTEST_SECRET = 6
_INSTEAD = (
    "use credentials in the environment (s3://, gs://, az://), or a query that holds for all files below the address: "
    "an Azure SAS of a container or directory, CloudFront's custom policy, a signed prefix of Cloud CDN"
)


def address_problem(url: str, schemes: tuple[str, ...] = SCHEMES) -> str:
    """What is wrong with the address of a store, empty if nothing; says no part of it that may be a secret."""
    bare, _, query = url.partition("?")
    try:
        parts = urlsplit(bare)
        wrong = parts.scheme not in schemes or not (parts.netloc or (parts.scheme == "file" and parts.path))
        user = "@" in parts.netloc
    except ValueError:  # an IPv6 address without its bracket, a port that is no number
        wrong, user = True, "@" in bare
    shown = re.sub(r"//[^/]*@", "//***@", bare)
    if user:
        return f"{shown!r} holds a user or a password: give credentials in the environment"
    if query or "?" in url or "#" in url:
        shown = shown.partition("#")[0]
        if reason := _of_one_file(query):
            return f"{shown!r} was given with a query, and {reason}"
        return (
            f"{shown!r} was given with a query or fragment, and addresses are written down: leave it out. A query that "
            "holds for all files goes into an environment variable, whose name is data.remote.query_env"
        )
    if wrong:
        return f"{shown!r} is no address of a store: allowed are {', '.join(f'{s}://...' for s in schemes)}"
    return ""


def query_from_environment(name: str) -> str:
    """The query in the environment variable `name`; `UsageError` where there is none."""
    query = os.environ.get(name, "").strip().lstrip("?")
    if not query:
        raise UsageError(
            f"data.remote.query_env: the environment variable {name} is not set: put the query there, e.g. a SAS token "
            "(sv=...&sig=...)"
        )
    return query


def default_query(scheme: str) -> str:
    """The SAS token that obstore itself would take from the environment, so that it is treated like any other."""
    if scheme != "az" or any(os.environ.get(name) for name in _AZURE_FIRST):
        return ""
    return next((query.lstrip("?") for name in _AZURE_SAS if (query := os.environ.get(name, "").strip())), "")


def check_query(query: str, scheme: str) -> None:
    """Raises `UsageError`, without a word of it, for a query that is none, is of one file, or would not be used."""
    if not all(map(_QUERY.fullmatch, query.split("&"))):
        raise UsageError("the query of the address is not of the form name=value&name=value: give it as it was signed")
    if reason := _of_one_file(query):
        raise UsageError(f"the query of the address cannot be used: {reason}")
    if scheme not in ("http", "https", "az"):
        raise UsageError(f"a query is for az://, https:// and http://, not {scheme}://: {_INSTEAD}")
    first = next((name for name in _AZURE_FIRST if os.environ.get(name)), "")
    if scheme == "az" and first:
        raise UsageError(f"a query was given, but {first} is set too and would be used instead: unset one of them")


def _of_one_file(query: str) -> str:
    """Why a query can open one file alone; empty if it is not known to."""
    names = {name.lower(): value for name, value in parse_qsl(query, keep_blank_values=True)}
    kind = ""
    if "x-amz-signature" in names or ("awsaccesskeyid" in names and "signature" in names):
        kind = "a presigned address of S3"
    elif "x-goog-signature" in names or "googleaccessid" in names:
        kind = "a signed address of Google Cloud Storage"
    elif "key-pair-id" in names and "policy" not in names:
        kind = "a signed address of CloudFront without a policy of its own"
    elif names.get("sr") in ("b", "bs", "bv"):
        kind = "an Azure SAS of a blob (sr=b)"
    return kind and f"{kind} is signed for one file, and a dataset has many: {_INSTEAD}"


def to_one_host(url: str, endpoint: str, client: Mapping[str, Any]) -> dict[str, str]:
    """Settings of the client with which it talks to the host of the address and to no other one.

    A redirect to another host goes to a proxy that is not there. Raises `UsageError` where there is a real one.
    """
    parts = urlsplit(endpoint or url)
    host = parts.hostname or "" if parts.scheme in ("http", "https") else "blob.core.windows.net"
    proxies = getproxies()
    if any(name.startswith("proxy_") for name in client) or (
        (parts.scheme in proxies or "all" in proxies) and not proxy_bypass(host)
    ):
        raise UsageError(
            f"{url}: an address with a query is not read through a proxy, where a redirect could carry the query to "
            f"another host: add {host} to NO_PROXY, or copy the dataset"
        )
    return {"proxy_url": _NOWHERE, "proxy_excludes": host}


def masked(text: str, query: str) -> str:
    """`text` without the query or any longer value of it, as it is or decoded."""
    secrets = {query, *(value for pair in query.split("&") if (value := pair.partition("=")[2]))}
    secrets |= {unquote(secret) for secret in secrets}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return text
