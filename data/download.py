"""Downloads that survive a bad connection: retried, resumed, checked, and in place only when complete.

The bytes go to NAME.part, and the server's ETag to NAME.part.etag, so that a broken download goes on where it stopped,
in the same run or in a later one, unless the file on the server has changed meanwhile.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import requests
from tqdm import tqdm

from llmc.errors import UserError, explain_os_error
from llmc.files import open_file

ATTEMPTS = 5  # in a row without a new byte
BACKOFF = 1.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = (10, 60)  # seconds to connect, and between two reads
CHUNK = 1 << 16  # bytes; at most so many are lost when a connection breaks
RETRIED = (408, 429, 500, 502, 503, 504)


class BrokenDownload(Exception):
    """A failure that another attempt may mend; the text says what happened."""


def download(
    url: str, path: Path, *, size: int | None = None, sha256: str | None = None, instead: str = "make data"
) -> None:
    """Fetch `url` into `path`, whose folder exists; a `path` that is complete already is left alone.

    size, sha256: what the file must be; without `sha256` the hash that a Hugging Face hub sends is checked.
    instead: the command that does without this download, for the hint.
    Raises UserError: host unreachable, HTTP error, wrong size or hash, disk full, or another file called `path`.
    """
    if path.exists():
        check_file(path, size, sha256, "move it away and run again")
        print(f"{path} is there already")
        return
    part = path.with_name(path.name + ".part")
    try:
        hub_sha256 = fetch_persistently(url, part, size, instead)
        put_in_place(part, path, url, size, sha256 or hub_sha256)
    except KeyboardInterrupt:
        if part.exists():
            print(f"\n{part} keeps {part_size(part):,} bytes; run again to go on", file=sys.stderr)
        raise
    except OSError as error:
        raise explain_os_error(error, part, "writing") from None


def put_in_place(part: Path, path: Path, url: str, size: int | None, sha256: str | None) -> None:
    """Rename `part` to `path` if it is what it should be, else remove it: to resume it would not mend it."""
    try:
        check_file(part, size, sha256, f"run again; if this comes back, the file at {url} has changed")
    except UserError:
        discard(part)
        raise
    os.replace(part, path)
    discard(part)


def fetch_persistently(url: str, part: Path, size: int | None, instead: str) -> str | None:
    """As fetch, again and again until the whole file has come. Raises UserError after ATTEMPTS without a new byte."""
    failures = 0
    while True:
        had = part_size(part)
        try:
            return fetch(url, part, size)
        except BrokenDownload as broken:
            failures = 1 if part_size(part) > had else failures + 1
            if failures == ATTEMPTS:
                hint = f"check the network and run again, it goes on where it stopped; without a network: {instead}"
                raise UserError(f"{url}: {broken} ({ATTEMPTS} attempts)", hint) from None
            print(f"{broken}; trying again", file=sys.stderr)
        time.sleep(BACKOFF * 2 ** (failures - 1))


def fetch(url: str, part: Path, size: int | None) -> str | None:
    """One attempt: append to `part` what it lacks of `url`; the file's SHA-256 if the server tells, else None.

    Raises BrokenDownload if another attempt may help, UserError if not.
    """
    offset = part_size(part)
    with connection(url, offset) as response:
        if offset and response.headers.get("Content-Range") == f"bytes */{offset}":  # 416: nothing is lacking
            return hub_sha256(response)
        if offset and not continues(response, part, offset):
            discard(part)
            if response.status_code != 200:  # a range of another file, or none at all
                raise BrokenDownload("the file on the server has changed, starting over")
            offset = 0
        total = offset + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        if size is not None and total is not None and total != size:
            raise UserError(f"{url}: the server sends {total:,} bytes, expected {size:,}", "check the URL")
        require_space(part.parent, (total or size or offset) - offset)
        etag_path(part).write_text(validator(response))
        save(response, part, offset, total)
        return hub_sha256(response)


@contextlib.contextmanager
def connection(url: str, offset: int) -> Iterator[requests.Response]:
    """The answer of the server, to be read from byte `offset` on; what goes wrong is raised as by `fetch`."""
    # identity: a compressed answer could not be resumed, nor its length compared
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            check_status(response, url)
            yield response
    except requests.Timeout:
        raise BrokenDownload("no answer in time") from None
    except requests.ConnectionError as error:
        raise BrokenDownload(f"cannot be reached ({reason(error)})") from None
    except requests.exceptions.ChunkedEncodingError:
        raise BrokenDownload("the connection broke") from None
    except requests.RequestException as error:
        raise UserError(f"{url}: {error}", "check the URL") from None


def save(response: requests.Response, part: Path, offset: int, total: int | None) -> None:
    """Append the body to `part` behind a progress bar. Raises BrokenDownload if fewer bytes come than announced."""
    shown = dict(desc=part.name.removesuffix(".part"), unit="B", unit_scale=True)
    # disable=None: no bar unless stderr is a terminal
    with open(part, "ab") as file, tqdm(initial=offset, total=total, disable=None, **shown) as bar:
        for chunk in response.iter_content(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and part_size(part) < total:
        raise BrokenDownload(f"the connection broke after {part_size(part):,} of {total:,} bytes")


def check_status(response: requests.Response, url: str) -> None:
    """Raise BrokenDownload for a busy server, UserError for any other refusal; 416 (nothing in range) is no refusal."""
    status = f"{response.status_code} {response.reason}"
    if response.status_code in RETRIED:
        raise BrokenDownload(f"the server answers {status}")
    if response.status_code >= 400 and response.status_code != 416:
        raise UserError(f"{url}: the server answers {status}", "the file may have moved: open its site in a browser")


def continues(response: requests.Response, part: Path, offset: int) -> bool:
    """Does the answer go on at byte `offset` of the very file that `part` is the beginning of?"""
    begins = response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
    saved = etag_path(part).read_text() if etag_path(part).exists() else ""
    return response.status_code == 206 and begins and saved != "" and saved == validator(response)


def validator(response: requests.Response) -> str:
    """What tells two versions of a file apart, "" if the server says nothing."""
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def hub_sha256(response: requests.Response) -> str | None:
    """The file's SHA-256, which a Hugging Face hub sends as X-Linked-ETag before it redirects to its store."""
    for answer in (*response.history, response):
        etag = answer.headers.get("X-Linked-ETag", "").strip('"').lower()
        if len(etag) == 64 and set(etag) <= set("0123456789abcdef"):
            return etag
    return None


def check_file(path: Path, size: int | None, sha256: str | None, hint: str) -> None:
    """Raise UserError unless the file is as long as `size` and hashes to `sha256`, each where given."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise UserError(f"{path}: {found:,} bytes, expected {size:,}", hint)
    if sha256 is not None:
        with open_file(path) as file:
            digest = file_sha256(file)
        if digest != sha256:
            raise UserError(f"{path}: sha256 is {digest}, expected {sha256}", hint)


def file_sha256(file) -> str:
    """SHA-256 of an open binary file, read in chunks (hashlib.file_digest is new in Python 3.11)."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Raise UserError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: needs {needed / 1e9:.1f} GB of disk space, {free / 1e9:.1f} GB are free",
            "free some space (df -h), or name a folder on another disk with -o",
        )


def reason(error: BaseException) -> str:
    """The innermost cause of a connection error, without the addresses of the objects it passed through."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def part_size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def etag_path(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def discard(part: Path) -> None:
    """Remove `part` and its ETag."""
    part.unlink(missing_ok=True)
    etag_path(part).unlink(missing_ok=True)
