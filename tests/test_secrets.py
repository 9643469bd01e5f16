# SPDX-License-Identifier: Apache-2.0
"""Credentials are masked, and nothing else is."""

import string
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from igae.errors import MASK, redact

# Secrets that are no part of the words around them.
SECRET = st.text(string.ascii_letters + string.digits + "+/=_-.~%!$@:#?&;,", min_size=3, max_size=40).map(
    lambda text: f"Q{text}Z"
)
QUERY_SECRET = SECRET.filter(lambda text: "&" not in text)
PATH = st.text(string.ascii_lowercase + string.digits + "/-_.", max_size=20)
SCHEME = st.sampled_from(["s3", "https", "gs", "sftp", "git+ssh"])
NAMES = ["secret", "aws_secret_access_key", "token", "AWS_SESSION_TOKEN", "password", "passwd", "sas_token", "api_key"]


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("s3://KEY:SECRET@bucket/data", "s3://***@bucket/data"),
        ("s3://AKIA:ab/cd+e@f@bucket/data", "s3://***@bucket/data"),
        ("https://user:pass@host:8080/x", "https://***@host:8080/x"),
        ("https://ghp_TOKEN@host/x", "https://***@host/x"),
        (
            "https://h/x?X-Amz-Algorithm=A&X-Amz-Signature=abc%2F&v",
            "https://h/x?X-Amz-Algorithm=***&X-Amz-Signature=***&***",
        ),
        ("https://h/x?token=abc: pack the data again", "https://h/x?token=***: pack the data again"),
        ("https://h/x#access_token=abc", "https://h/x#access_token=***"),
        ("simplecache::s3://a:b@c/d", "simplecache::s3://***@c/d"),
        ("zip://a.zip::https://u:p@h/b?t=1", "zip://a.zip::https://***@h/b?t=***"),
        ("copy s3://a:b@c to gs://d?e=f now", "copy s3://***@c to gs://d?e=*** now"),
        ("{'key': 'abc', 'secret': 'd e', \"token\": \"f\"}", "{'key': 'abc', 'secret': ***, \"token\": ***}"),
        ("DefaultEndpointsProtocol=https;AccountKey=abc/==;X=1", "DefaultEndpointsProtocol=https;AccountKey=***;X=1"),
        ("GET /x?X-Amz-Signature=12&a=b", "GET /x?X-Amz-Signature=***&a=b"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ('Invalid bucket name "key:SECRET@nowhere": use', 'Invalid bucket name "***@nowhere": use'),
        ("key AKIAIOSFODNN7EXAMPLE is unknown", "key *** is unknown"),
    ],
)
def test_examples(text: str, hidden: str) -> None:
    assert redact(text) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/data/my@folder/what?/shards",
        "s3://bucket/v1@2/data",
        "gs://bucket/a#b",
        "http://127.0.0.1:9000/bucket/data",
        "file:///data/x",
        "simplecache::s3://bucket/data",
        "memory://packed",
        "rank 3: @here, at 10:30 @ noon, scp me@host:data",
        "NoCredentialsError: Unable to locate credentials",
        "InvalidToken: the provided token is malformed",
        "shard scenes-00001.tar in s3://bucket/data is damaged at byte 512: its header; see key: value, a=b",
    ],
)
def test_what_has_no_credentials_stays(text: str) -> None:
    assert redact(text) == text


@given(SCHEME, SECRET, SECRET, PATH)
def test_password(scheme: str, user: str, password: str, path: str) -> None:
    url = f"{scheme}://{user}:{password}@host/{path}"
    assert redact(url) == f"{scheme}://{MASK}@host/{path}"
    assert redact(f"cannot read {url} now") == f"cannot read {scheme}://{MASK}@host/{path} now"


@given(SCHEME, SECRET, PATH)
def test_token_as_user(scheme: str, token: str, path: str) -> None:
    token = quote(token, safe="")
    assert redact(f"{scheme}://{token}@host/{path}") == f"{scheme}://{MASK}@host/{path}"


@given(SCHEME, PATH, st.lists(st.tuples(st.sampled_from(["sig", "v", "X-Amz-Credential"]), QUERY_SECRET), min_size=1))
def test_query(scheme: str, path: str, query: list[tuple[str, str]]) -> None:
    assume(all("@" not in value for _, value in query))
    url = f"{scheme}://host/{path}?" + "&".join(f"{name}={value}" for name, value in query)
    assert redact(url) == f"{scheme}://host/{path}?" + "&".join(f"{name}={MASK}" for name, _ in query)


@given(SCHEME, PATH, SECRET.filter(lambda text: "&" not in text), SECRET, SECRET)
def test_no_secret_survives_anywhere(scheme: str, path: str, query: str, user: str, password: str) -> None:
    hidden = redact(f"x {scheme}://{user}:{password}@h/{path}?a={query}&b={query} y")
    assert hidden.startswith(f"x {scheme}://") and hidden.endswith(" y")
    assert not any(secret in hidden for secret in (user, password, query))


@given(st.sampled_from(NAMES), st.text(string.ascii_letters + string.digits + "+/=-", min_size=4).map("Q{}".format))
def test_options(name: str, value: str) -> None:
    for text in (f"{{'{name}': '{value}'}}", f'{{"{name}": "{value}"}}', f"{name}={value}", f"{name} = '{value}'"):
        assert value not in redact(text)
        assert name in redact(text)


@given(st.text() | st.from_regex(r"[a-z]{2,5}://[!-~]{0,40}( \w+=[!-~]*)?", fullmatch=True))
def test_a_second_time_changes_nothing(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


def test_commands_log_without_credentials() -> None:
    script = (
        "import logging; from igae.errors import log_to_stderr, say; log_to_stderr(); "
        "logging.getLogger('s3fs').warning('retry of %s', 's3://me:hush@bucket/x'); say('s3://me:hush@bucket/y')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "retry of s3://***@bucket/x\ns3://***@bucket/y\n" and done.stdout == ""


def test_every_command_logs_that_way() -> None:
    """A format of its own would show what libraries warn of as it is."""
    root = Path(__file__).parent.parent
    sources = [root / "train.py", *(root / "igae").rglob("*.py"), *(root / "data_tools").rglob("*.py")]
    assert [path.name for path in sources if "basicConfig" in path.read_text()] == ["errors.py"]
