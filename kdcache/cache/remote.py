"""Directories elsewhere: a URL, the fsspec filesystem that reaches it, and what its failures mean.

fsspec is the transport and no more: its own caches write onto the final name and trust what exists. The
libraries' own retries are switched off where they can be, so that waiting is decided in one place (`transfer`).
"""

from __future__ import annotations

import errno
import importlib
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from fsspec.callbacks import Callback

from kdcache.cache.files import make_directory, write_file
from kdcache.errors import DamagedObjectError, KdcacheError, StorageError, TransferError

# Protocol -> the extra of kdcache that brings what fsspec needs for it.
PROTOCOLS: Final = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "hf": "", "https": "", "http": "", "file": ""}
MINIMUM_PIN: Final = 12
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.:-]*://")
_PIN = re.compile(rf"[0-9a-f]{{{MINIMUM_PIN},64}}")
# A revision of a Hub repository that is a cache id: the tag that publishing sets.
_TAG = re.compile(r"@([0-9a-f]{64})(?:/|$)")
_PIN_MARK = "#cache-id="
_CHUNK = 1 << 20
_CONNECT_SECONDS, _SILENT_SECONDS = 30.0, 60.0
# Answers of a server that a later try may change.
_PASSING = {408, 425, 429}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "LocalTokenNotFoundError"}
_NO_CREDENTIALS |= {"DefaultCredentialsError", "ProfileNotFound", "UnauthorizedSSOTokenError", "SSOTokenLoadError"}
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True)
class Location:
    """Where a cache lies, and the first hex digits of the cache id that is wanted there, or none."""

    url: str
    protocol: str
    pin: str = ""

    @property
    def local(self) -> bool:
        """Whether it is a directory of this machine."""
        return self.protocol == "file"

    @property
    def path(self) -> Path:
        """The directory, where it is a local one."""
        return Path(unquote(self.url.removeprefix("file://"))) if is_url(self.url) else Path(self.url)

    def __str__(self) -> str:
        """The URL as it may be shown: without a user name and a password."""
        return re.sub(r"(?<=://)[^/@]*@", "", self.url)


def is_url(text: str | Path) -> bool:
    """Whether a cache is named by a URL and not by a directory."""
    return isinstance(text, str) and _URL.match(text) is not None


def parse_location(text: str | Path, cache_id: str | None = None) -> Location:
    """A URL or a directory. ``URL#cache-id=HEX`` pins the cache, as ``cache_id`` does.

    Raises:
        TransferError: a protocol that is not one of ours, or a pin that is not one.
    """
    url, protocol, pin = str(text), "file", (cache_id or "").lower()
    if is_url(text):
        url, mark, fragment = url.partition(_PIN_MARK)
        fragment = fragment.lower()
        if pin and fragment and not (pin.startswith(fragment) or fragment.startswith(pin)):
            raise TransferError(f"{text} names another cache id than {pin}; give one of them")
        pin = max(pin, fragment, key=len)
        if mark and not fragment:
            raise TransferError(f"nothing behind {_PIN_MARK} in {text}; write the cache id's first hex digits there")
        protocol = url.partition("://")[0].lower()
        url = f"{protocol}://{url.partition('://')[2].rstrip('/')}"
        if protocol not in PROTOCOLS or "::" in url:
            known = ", ".join(f"{name}://" for name in PROTOCOLS)
            raise TransferError(f"expected a directory or a URL with one of {known}; found {text}")
        if protocol == "file" and not url.startswith("file:///"):
            raise TransferError(f"expected file:/// and a whole path, found {text}")
        if protocol in ("http", "https") and ("?" in url or "#" in url):
            raise TransferError(
                "expected the URL of a directory, to which file names are added; found a query or fragment (the only one is #cache-id=HEX)"
            )
        if protocol == "hf" and (named := _TAG.search(url)) is not None:
            pin = pin or named[1]
    elif protocol == "file" and re.match(r"^[a-z0-9]{2,}:", url):
        raise TransferError(f"expected a directory or a URL, found {text}; a URL has // behind its colon")
    if pin and _PIN.fullmatch(pin) is None:
        raise TransferError(
            f"a cache id is given by {MINIMUM_PIN} to 64 hex digits (kdcache inspect shows it), not {pin!r}"
        )
    return Location(url, protocol, pin)


class Place:
    """A directory reached through fsspec. Its methods let foreign exceptions through; `explain` translates them."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.fs, self.root = _filesystem(location)

    def __str__(self) -> str:
        return str(self.location)

    def download(self, name: str, target: Path, guard: Callback) -> None:
        """Copy an object into a file. ``guard`` hears the stated size and every chunk, and stops it by raising."""
        if not self.location.local:
            self.fs.get_file(self._path(name), str(target), callback=guard)
            return
        path = Path(self._path(name))
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
        with path.open("rb") as source, target.open("wb") as sink:
            while chunk := source.read(_CHUNK):
                guard.relative_update(len(chunk))
                sink.write(chunk)

    def upload(self, name: str, data: bytes) -> None:
        """Write an object; on this machine atomically."""
        if self.location.local:
            path = Path(self._path(name))
            make_directory(path.parent)
            write_file(path, data)
        else:
            self.fs.pipe_file(self._path(name), data)

    def size(self, name: str) -> int:
        """Bytes of an object, as the other side states them; -1 where it does not."""
        size = self.fs.info(self._path(name)).get("size")
        return size if isinstance(size, int) else -1

    def remove(self, name: str) -> None:
        """Delete an object of the cache."""
        self.fs.rm_file(self._path(name))

    def names(self, folder: str = "") -> list[str]:
        """Names in a folder; none where it does not exist."""
        try:
            found = self.fs.ls(self._path(folder) if folder else self.root, detail=False)
        except FileNotFoundError:
            return []
        return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found if path.rstrip("/") != self.root})

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"


def _filesystem(location: Location) -> tuple[Any, str]:
    """The filesystem of a URL and the directory in it.

    Raises:
        TransferError: the package for it is missing, or it refuses the URL.
    """
    from fsspec.core import url_to_fs

    if location.local:
        filesystem, _ = url_to_fs("file:///")
        return filesystem, str(location.path.absolute())
    # An instance of our own: the settings below are not for whoever else uses fsspec in this process.
    options: dict[str, Any] = {"skip_instance_cache": True}
    if location.protocol == "s3":
        options |= {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    if location.protocol in ("http", "https"):
        # Without a bound on the whole: a large shard may take its time, silence may not.
        timeout = importlib.import_module("aiohttp").ClientTimeout(
            total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS
        )
        options |= {"client_kwargs": {"timeout": timeout}}
    try:
        filesystem, root = url_to_fs(location.url, **options)
        if location.protocol == "s3":
            filesystem.retries = 1
        if location.protocol == "hf":
            root = _at_one_commit(filesystem, root)
    except ImportError as exc:
        extra = PROTOCOLS[location.protocol]
        way = f"pip install 'kdcache[{extra}]'" if extra else "install kdcache with its dependencies again"
        raise TransferError(f"{location.protocol}:// needs a package that is not installed ({exc}); {way}") from exc
    except Exception as exc:
        raise explain(exc, str(location)) from exc
    return filesystem, str(root).rstrip("/")


def _at_one_commit(filesystem: Any, root: str) -> str:
    """The path in a Hub repository with its revision replaced by the commit, so that one pull sees one state."""
    resolved = filesystem.resolve_path(root)
    if not hasattr(resolved, "repo_id"):
        return root
    hub = importlib.import_module("huggingface_hub").HfApi(endpoint=filesystem.endpoint, token=filesystem.token)
    commit = hub.repo_info(resolved.repo_id, repo_type=resolved.repo_type, revision=resolved.revision).sha
    kind = "" if resolved.repo_type == "model" else f"{resolved.repo_type}s/"
    return f"{kind}{resolved.repo_id}@{commit}/{resolved.path_in_repo}"


def worth_retrying(exc: BaseException) -> bool:
    """Whether a later try may go better: not where something is missing, forbidden, or asked for wrongly."""
    if isinstance(exc, KdcacheError):
        # What has been translated has been tried already; only bytes that do not fit may fit the next time.
        return isinstance(exc, DamagedObjectError)
    if isinstance(exc, (FileNotFoundError, PermissionError, ImportError, NotImplementedError)) or _has_no_credentials(
        exc
    ):
        return False
    if type(exc).__name__ == "OfflineModeIsEnabled":
        return False
    status = _status(exc)
    return status is None or status >= 500 or status < 400 or status in _PASSING


def explain(exc: Exception, where: str) -> KdcacheError:
    """A foreign exception as one of ours, with the way out."""
    if isinstance(exc, KdcacheError):
        return exc
    status = _status(exc)
    if isinstance(exc, OSError) and exc.errno in _FULL_DISK:
        return StorageError(f"cannot write what comes from {where}: {exc.strerror}; free some space and run it again")
    if _has_no_credentials(exc):
        return TransferError(
            f"no credentials for {where}; log in (AWS_PROFILE or AWS_ACCESS_KEY_ID, gcloud auth, hf auth login), "
            "or for a public bucket set FSSPEC_S3_ANON=true or FSSPEC_GS_TOKEN=anon"
        )
    if type(exc).__name__ == "OfflineModeIsEnabled":
        return TransferError(f"{where} is not asked: HF_HUB_OFFLINE is set; unset it, or give a local directory")
    if isinstance(exc, PermissionError) or status in (401, 403):
        return TransferError(f"{where} refuses access ({_line(exc)}); check the address and who you are logged in as")
    if isinstance(exc, FileNotFoundError) or status == 404:
        return TransferError(f"{where} does not exist, or is not to be seen by you; check the address")
    return TransferError(f"{where} cannot be reached or fails ({_line(exc)}); run the same command again to go on")


def _line(exc: BaseException) -> str:
    text = " ".join(str(exc).split())
    # A presigned address in a library's message would carry its signature into a log.
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
    return f"{type(exc).__name__}: {text[:300]}" if text else type(exc).__name__


def _has_no_credentials(exc: BaseException) -> bool:
    return any(type(e).__name__ in _NO_CREDENTIALS for e in _causes(exc))


def _status(exc: BaseException) -> int | None:
    """The HTTP status behind an exception of aiohttp, httpx, botocore or gcsfs."""
    for e in _causes(exc):
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # aiohttp's parser has codes too, of errors that no server stated; gcsfs has no other place for the status.
        code = getattr(e, "code", None) if type(e).__name__ == "HttpError" else None
        for value in (response, getattr(response, "status_code", None), getattr(e, "status", None), code):
            if isinstance(value, int) and 100 <= value < 600:
                return value
    return None


def _causes(exc: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = exc
    for _ in range(8):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__
