"""Addresses and queries: what is refused, and that no message repeats a secret."""

import pytest

from turbopump.core.config import parse
from turbopump.core.errors import ConfigError, UsageError
from turbopump.data.addresses import address_problem, check_query, masked, query_from_environment, to_one_host
from turbopump.data.format import open_dataset, verify_dataset
from turbopump.data.remote_files import RemoteConfig
from turbopump.inspect import inspect

PRESIGNED = {
    "a presigned address of S3": [
        "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA&X-Amz-Expires=60&X-Amz-Signature=5ec2e75ec2e7",
        "AWSAccessKeyId=AKIA&Signature=5ec2e75ec2e7&Expires=1",
    ],
    "a signed address of Google Cloud Storage": [
        "X-Goog-Algorithm=GOOG4-RSA-SHA256&X-Goog-Signature=5ec2e75ec2e7",
        "GoogleAccessId=me%40example.com&Expires=1&Signature=5ec2e75ec2e7",
    ],
    "a signed address of CloudFront": ["Expires=1&Signature=5ec2e75ec2e7&Key-Pair-Id=K"],
    "an Azure SAS of a blob": ["sv=2021-12-02&sr=b&sp=r&sig=5ec2e75ec2e7"],
}
OF_ALL_FILES = [
    "?sv=2021-12-02&sr=c&sp=rl&sig=5ec2e75ec2e7%3D",
    "sv=2021-12-02&ss=b&srt=o&sp=r&sig=5ec2e75ec2e7%3D",
    "Policy=eyJ-_~&Signature=5ec2e75ec2e7&Key-Pair-Id=K",
    "URLPrefix=aHR0cHM=&Expires=1&KeyName=k&Signature=5ec2e75ec2e7",
]


@pytest.mark.parametrize("kind", list(PRESIGNED))
def test_what_is_signed_for_one_file_is_refused_with_the_reason(kind):
    for query in PRESIGNED[kind]:
        told = [address_problem(f"https://host/path/manifest.json?{query}")]
        with pytest.raises(UsageError) as caught:
            check_query(query, "https")
        for said in (*told, str(caught.value)):
            assert kind in said and "signed for one file, and a dataset has many: use" in said
            assert "5ec2e75ec2e7" not in said


@pytest.mark.parametrize("query", OF_ALL_FILES)
def test_a_query_for_all_files_is_taken_from_the_environment(query, monkeypatch):
    monkeypatch.setenv("QUERY", query)
    check_query(query_from_environment("QUERY"), "https")
    said = address_problem(f"https://host/set?{query.lstrip('?')}")
    assert "'https://host/set' was given with a query" in said and "data.remote.query_env" in said
    assert "5ec2e75ec2e7" not in said
    with pytest.raises(UsageError, match="not s3://: use credentials"):
        check_query(query_from_environment("QUERY"), "s3")


def test_queries_of_no_form_and_none_are_refused(monkeypatch):
    for query in ("5ec2e75ec2e7", "a=5ec2e75ec2e7 b", "a=5ec2e75ec2e7&", "=5ec2e75ec2e7", "a=5ec2e75ec2e7#", "a=\n"):
        with pytest.raises(UsageError, match="not of the form name=value") as caught:
            check_query(query, "https")
        assert "5ec2e75ec2e7" not in str(caught.value)
    monkeypatch.delenv("QUERY", raising=False)
    with pytest.raises(UsageError, match="environment variable QUERY is not set"):
        query_from_environment("QUERY")


@pytest.mark.parametrize(
    "url",
    ["https://me:5ec2e75ec2e7@host/set", "s3://5ec2e75ec2e7@bucket/set", "https://host/set?a=5ec2e75ec2e7",
     "https://host/set#5ec2e75ec2e7", "https://me:5ec2e75ec2e7@[host/set", "https://host/set?X-Amz-Signature=5ec2e75ec2e7"],
)  # fmt: skip
def test_nothing_tells_a_secret_that_stood_in_an_address(url, cli):
    for call in (open_dataset, verify_dataset, inspect, lambda url: open_dataset(url, "mapped")):
        with pytest.raises(UsageError) as caught:
            call(url)
        assert "5ec2e75ec2e7" not in str(caught.value)
    recipe = {"model": {"kind": "transformer"}, "data": {"kind": "tokens", "path": url}}
    with pytest.raises(ConfigError, match=r"data\.path: 'https?://|data\.path: 's3://") as refused:
        parse(recipe)
    assert "5ec2e75ec2e7" not in str(refused.value)
    said = cli("inspect", url, "--json")
    assert said.code == 2 and "5ec2e75ec2e7" not in said.err + said.out


def test_servers_and_options_that_hold_a_secret_are_refused():
    for endpoint in ("http://me:5ec2e75ec2e7@host", "https://host?sig=5ec2e75ec2e7", "s3://host"):
        (problem,) = RemoteConfig(endpoint=endpoint).problems()
        assert problem.startswith("remote.endpoint: ") and "5ec2e75ec2e7" not in problem
    for name in ("secret_access_key", "azure_storage_master_key", "sas_token", "google_service_account_key"):
        assert "does not belong into settings" in RemoteConfig(options={name: "x"}).problems()[0]


def test_masks_cover_a_query_and_its_values_in_every_form():
    query = "sp=rl&se=2030-01-01T00%3A00%3A00Z&sig=aB%2Bc%2F9d8e7f6%3D"
    for text in (query, "aB%2Bc%2F9d8e7f6%3D", "aB+c/9d8e7f6=", "2030-01-01T00:00:00Z"):
        assert masked(f"GET /a?{text} failed", query) == "GET /a?*** failed"
    assert masked("range of rl", query) == "range of rl"


def test_a_query_keeps_to_the_host_of_its_server(monkeypatch):
    monkeypatch.setattr("turbopump.data.addresses.getproxies", dict)
    assert to_one_host("https://host:8443/set", "", {})["proxy_excludes"] == "host"
    assert to_one_host("az://container/set", "", {})["proxy_excludes"] == "blob.core.windows.net"
    assert to_one_host("az://container/set", "http://127.0.0.1:10000/account", {})["proxy_excludes"] == "127.0.0.1"
    with pytest.raises(UsageError, match="proxy"):
        to_one_host("https://host/set", "", {"proxy_url": "http://proxy"})
