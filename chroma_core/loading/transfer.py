"""One file from the Hub into huggingface_hub's shared cache: continued where it broke off, checked, put in its place.

Why not `hf_hub_download`: it continues a broken file only within one call. Every call of huggingface_hub 2.4 writes to
a new temporary name and deletes it on failure, over HTTP and over xet alike (huggingface_hub issue 4196), so that a
10 GB file would start again after each lost connection. Here the beginning of a file stays beside the cache's blobs as
`<checksum>.chromakit.incomplete`, whatever ended the download, and the next call asks only for the rest.

The client's own parts do the work: its `http_get` with a Range header, its xet session where the Hub offers one (unless
HF_HUB_DISABLE_XET is set), its headers and token, its lock, and its folder layout, so that every other program finds
the files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import are_symlinks_supported, http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm

from ..errors import ModelFileError
from ..files import remove, replace

log = logging.getLogger("chromakit")

OnDownload = Callable[[int, int, str], None]
"""Bytes there, bytes in all, and the file's name within the repository. It may raise to cancel."""

TRANSFER_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)  # pyright: ignore
"""What a broken transfer raises. The first base of the client's error is that of its HTTP library, which changed from
requests to httpx to httpx2 between versions."""

CHECK_BYTES = 16 << 20


class Cancelled(Exception):
    """Carries what a caller's progress function raised past the client's own handlers, unchanged."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Progress:
    """Bytes over all files of a download, to a function of the caller's or, without one, to a bar in the terminal."""

    def __init__(self, total: int, title: str, on_progress: OnDownload | None) -> None:
        self.total = total
        self._on_progress = on_progress
        self._before = self._done = 0
        self._name = ""
        # `disable=None` draws the bar in a terminal and keeps it out of a log file.
        self._bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) if not on_progress else None

    def start(self, name: str, there: int) -> None:
        """The next file begins with `there` bytes of it on the disk already."""
        self._name, self._done = name, there
        self.tick()

    def update(self, count: int) -> None:
        """`count` more bytes of the present file; negative when a server insists on starting it again."""
        self._done += count
        self.tick()

    def finish_file(self, size: int) -> None:
        """The present file is in its place."""
        self._before, self._done = self._before + size, 0
        self.tick()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def tick(self) -> None:
        """Show what there is, and give a chance to cancel: also while waiting for another process, or checking."""
        done = min(self._before + self._done, self.total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        if self._on_progress is not None:
            try:
                self._on_progress(done, self.total, self._name)
            except BaseException as reason:
                raise Cancelled(reason) from reason


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: `size` in bytes; `checksum` is the SHA-256 of a large file (64 digits) or the git object
    id of a small one (40 digits), which is also its name among the cache's blobs."""

    path: str
    size: int
    checksum: str


@dataclass(frozen=True)
class CachedRepository:
    """A repository's folder in the cache, and where its files come from."""

    name: str
    cache: Path
    endpoint: str

    @property
    def folder(self) -> Path:
        """`models--owner--name` in the cache."""
        return self.cache / repo_folder_name(repo_id=self.name, repo_type="model")

    def snapshot(self, commit: str) -> Path:
        """The folder with the files of one commit under their own names."""
        return self.folder / "snapshots" / commit

    def partial(self, file: RemoteFile) -> Path:
        """Where the beginning of a file waits for the rest."""
        return self.folder / "blobs" / f"{file.checksum}.chromakit.incomplete"


def size_of(path: Path) -> int:
    """Bytes of a file; 0 when there is none."""
    return path.stat().st_size if path.is_file() else 0


def bring(file: RemoteFile, commit: str, repository: CachedRepository, progress: Progress) -> None:
    """Put `file` into the snapshot of `commit`, downloading what is missing of it.

    Raises one of TRANSFER_ERRORS or Cancelled, with what arrived kept; ModelFileError when it arrived damaged.
    """
    blob = repository.folder / "blobs" / file.checksum
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = repository.partial(file)
    progress.start(file.path, size_of(partial))
    with _locked(repository.cache / ".locks" / repository.folder.name / f"{file.checksum}.lock", progress):
        pointer = repository.snapshot(commit) / file.path
        if size_of(pointer) != file.size:  # else another process brought it while this one waited
            there = size_of(blob) == file.size  # a file that another commit has as well
            if not there:
                _download(file, commit, repository, progress)
                _check(partial, file, progress)
            _put_in_place(None if there else partial, blob, pointer, repository.cache)
    progress.finish_file(file.size)


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """The client's own lock on a file, so that two processes do not download it twice; can be cancelled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(WeakFileLock(path, timeout=1))
                break
            except Timeout:
                progress.tick()
        yield


def _download(file: RemoteFile, commit: str, repository: CachedRepository, progress: Progress) -> None:
    """Complete the partial file; goes on after an error for as long as each attempt gains bytes."""
    partial = repository.partial(file)
    if size_of(partial) > file.size:
        remove(partial)
    # The address is resolved anew by every attempt: the one that it redirects to is signed and expires.
    url = hf_hub_url(repository.name, file.path, revision=commit, endpoint=repository.endpoint)
    anew = False
    while True:
        there = size_of(partial)
        progress.start(file.path, there)
        try:
            with partial.open("ab") as out:
                _receive(url, file, out, there, progress)
            return
        except TRANSFER_ERRORS as error:
            if there and size_of(partial) > file.size and not anew:  # sent whole, which clients before 1.0 append
                anew = True
                remove(partial)
            elif not there < size_of(partial) <= file.size:
                raise
            log.warning("%s broke off at %d of %d bytes (%s); going on", file.path, size_of(partial), file.size, error)


def _receive(url: str, file: RemoteFile, out: Any, there: int, progress: Progress) -> None:
    """Append the bytes of `file` from `there` on, over xet where the Hub offers it and over plain HTTP else."""
    try:
        with closing(_xet_pieces(url, file, there, progress)) as pieces:
            for piece in pieces:
                out.write(piece)
                there += len(piece)
                progress.update(len(piece))
    except Cancelled:
        raise
    except Exception as error:
        out.flush()
        log.warning("The xet transfer of %s failed (%s); going on over plain HTTP", file.path, error)
    headers = build_hf_headers()
    headers["Accept-Encoding"] = "identity"  # a compressed answer cannot be continued
    bar: Any = progress
    http_get(url, out, resume_size=there, headers=headers, expected_size=file.size, _tqdm_bar=bar)


def _xet_pieces(url: str, file: RemoteFile, start: int, progress: Progress) -> Generator[bytes, None, None]:
    """The bytes of `file` from `start` on, up to 64 MiB each; nothing where xet is not offered, installed or wanted.

    Older clients have no xet session to stream from (an ImportError here); plain HTTP serves every file as well.
    """
    if constants.HF_HUB_DISABLE_XET or start == file.size or len(file.checksum) != 64:
        return
    try:
        from hf_xet import XetDownloadStreamGroup, XetFileInfo  # pyright: ignore
        from huggingface_hub.utils._xet import get_xet_session, refresh_xet_connection_info, xet_headers_without_auth
    except ImportError:
        return
    data = get_hf_file_metadata(url).xet_file_data
    if data is None or not hasattr(XetDownloadStreamGroup, "abort"):
        return
    headers = build_hf_headers()
    connection = refresh_xet_connection_info(file_data=data, headers=headers)
    group = get_xet_session().new_download_stream_group(
        endpoint=connection.endpoint,
        token=connection.access_token,
        token_expiry_unix_secs=connection.expiration_unix_epoch,
        token_refresh_url=data.refresh_route,
        token_refresh_headers=headers,
        custom_headers=xet_headers_without_auth(headers),
    )
    stream = group.download_stream(XetFileInfo(data.file_hash, file.size), start=start)
    with ThreadPoolExecutor(1) as waiting:  # so that a user can cancel while a piece is on its way, or stuck
        try:
            while True:
                awaited = waiting.submit(next, stream, None)
                while not wait([awaited], timeout=0.5).done:
                    progress.tick()
                if (piece := awaited.result()) is None:
                    return
                yield piece
        finally:
            group.abort()  # lets the thread go; a stream's own cancel() fails while a piece is awaited


def _check(path: Path, file: RemoteFile, progress: Progress) -> None:
    """Compare size and checksum with the repository's; a damaged file is deleted, so that the next try starts clean."""
    is_git = len(file.checksum) == 40
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if is_git else hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(CHECK_BYTES):
            digest.update(chunk)
            progress.tick()
    if digest.hexdigest() != file.checksum:
        size = size_of(path)
        remove(path)
        raise ModelFileError(
            f"'{file.path}' arrived damaged from the Hub: {size} of {file.size} bytes, checksum {digest.hexdigest()} "
            f"instead of {file.checksum}. It was deleted. Try again; if it happens again, something between this "
            "computer and the Hub (a proxy, a mirror named by HF_ENDPOINT, a failing disk) changes the file."
        )


def _put_in_place(new: Path | None, blob: Path, pointer: Path, cache: Path) -> None:
    """Move a new file among the blobs and link the snapshot to it; without symbolic links, move it there itself."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    link = pointer.with_name(f".{pointer.name}.{os.getpid()}.link")
    remove(link)
    if are_symlinks_supported(cache):
        if new is not None:
            replace(new, blob)
        link.symlink_to(os.path.relpath(blob, pointer.parent))
    elif new is not None:
        link = new
    else:
        shutil.copyfile(blob, link)
    replace(link, pointer)
