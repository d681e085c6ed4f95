"""Downloads that can be trusted: resumed where they broke, compared with a SHA-256, never half there.

One function, `download`, on the standard library's urllib; data/prepare.py says which files. Proxies are taken from
the environment, as urllib does. `python data/download.py URL FILE` downloads one file.
"""

import errno
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

try:
    import fcntl  # locks that end with their process
except ImportError:
    fcntl = None


def download(url: str, path: Path, size: int | None = None, sha256: str | None = None, timeout: float = 30, tries: int = 3) -> str:
    """Downloads `url` to `path` unless it is there; returns what was checked, in words.

    What arrives is kept beside it as .part and gone on with: by this call when the connection breaks (`tries` in a row
    without a byte end it), or by a later one. The complete file is compared with `size` and `sha256`; without the latter,
    with the SHA-256 that a Hugging Face server names. OSError if the file cannot be had; ValueError, and the
    .part file removed, if it is not what it should be.
    """
    path = Path(path)
    if path.is_file():
        _check(path, size, sha256)
        return f"sha256 {sha256} pinned here" if sha256 else "taken from an earlier download"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "ab") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OSError(f"{part} is being downloaded by another process; wait for it to end") from None
        try:
            linked = _persist(url, file, size, timeout, tries)
            file.flush()
            os.fsync(file.fileno())
            _check(part, size, sha256 or linked)
        except ValueError:
            part.unlink()
            raise
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()
        os.replace(part, path)
    if sha256:
        return f"sha256 {sha256} pinned here"
    return f"sha256 {linked} named by the server" if linked else "length only"


def progress(text: str) -> None:
    """A line on stderr that the next one overwrites; "" wipes it. Without a terminal, one line after another."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def _persist(url, file, size, timeout, tries) -> str | None:
    """Fetches until the file is complete; returns the SHA-256 named by the server, if any."""
    failures, have = 0, file.seek(0, os.SEEK_END)
    while True:
        try:
            return _fetch(url, file, size, timeout)
        except (OSError, http.client.HTTPException) as error:
            before, have = have, file.seek(0, os.SEEK_END)
            failures = failures + 1 if have <= before else 0
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or failures >= tries or getattr(error, "errno", None) == errno.ENOSPC:
                reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", None) or error
                kept = f"{have:,} bytes are kept, run it again to go on; or" if have else "connect to the network,"
                raise OSError(f"could not download {url} ({reason}): {kept} give a local file with --source FILE, or use "
                              "--source python, which needs no download") from None
            time.sleep(min(failures, 3))
        finally:
            progress("")


def _fetch(url, file, size, timeout) -> str | None:
    """Appends what is missing of `url` to `file`. OSError when the connection breaks, ValueError when the length is wrong."""
    redirects, have = _Redirects(), file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "nanoMEA", "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.build_opener(redirects).open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):  # nothing is missing
            return redirects.sha256(error.headers)
        file.truncate(0)
        raise OSError("the file has become shorter") from None
    with response:
        if response.status == 206:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise OSError("the server sent another range than the one asked for")
        else:  # it ignores ranges and sends everything
            file.truncate(0)
            have = 0
        length = response.headers.get("Content-Length") or ""
        total = have + int(length) if length.isdecimal() else size
        if size is not None and total != size:
            raise ValueError(f"{url} has {total:,} bytes where {size:,} are expected: it has changed, or is not the file")
        if total is not None and shutil.disk_usage(Path(file.name).parent).free < total - have:
            raise OSError(errno.ENOSPC, f"{total - have:,} bytes do not fit on the disk")
        shown = time.monotonic()
        while block := response.read1(1 << 18):
            file.write(block)
            have += len(block)
            if time.monotonic() - shown > 1:
                shown = time.monotonic()
                progress(f"{Path(file.name).stem}: {have / 1e6:,.1f}" + (f" of {total / 1e6:,.1f} MB" if total else " MB"))
        file.flush()
        if total is not None and have < total:
            raise OSError(f"connection broke at {have:,} of {total:,} bytes")
        return redirects.sha256(response.headers)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers the SHA-256 that Hugging Face sends with a redirection (X-Linked-Etag); refuses to leave https."""

    linked = ""

    def redirect_request(self, request, response, code, message, headers, url):
        self.linked = headers.get("X-Linked-Etag") or self.linked
        if request.full_url.startswith("https:") and not url.startswith("https:"):
            raise urllib.error.URLError(f"redirected away from https to {url}")
        return super().redirect_request(request, response, code, message, headers, url)

    def sha256(self, headers) -> str | None:
        match = re.fullmatch('"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag") or self.linked)
        return match and match[1]


def _check(path: Path, size: int | None, sha256: str | None) -> None:
    if size is not None and path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes where {size:,} are expected; remove it and run again")
    if sha256:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != sha256:
            raise ValueError(f"{path} has SHA-256 {digest.hexdigest()} where {sha256} is expected; remove it and run again")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print(__doc__)
    else:
        try:
            print(download(sys.argv[1], Path(sys.argv[2])))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
