"""The published weights: only the parts that are asked for, from the Hub into its shared cache.

Read at every call, so that a program may set them late: HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_CACHE (or HF_HOME, whose
folder `hub` it is) and HF_TOKEN. Where a variable is not set, what huggingface_hub read at its import counts: these
same settings, and HF_HUB_DISABLE_XET, HF_HUB_DOWNLOAD_TIMEOUT, HF_HUB_DISABLE_PROGRESS_BARS and the place of the token
that `hf auth login` wrote. Once huggingface_hub was imported offline it stays offline.

A repository of Chroma holds the model twice: as diffusers folders, read here, and as one 18 GB file, never fetched.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import ModelFileError
from ..files import read_json, remove
from ..model.flavours import Flavour
from ..weights.safetensors_files import read_safetensors
from .transfer import TRANSFER_ERRORS, CachedRepository, Cancelled, OnDownload, Progress, RemoteFile, bring, size_of

log = logging.getLogger("chromakit")

PARTS = ("transformer", "text_encoder", "tokenizer", "vae")
REVISION = re.compile(r"\w[\w./-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
# A dot within the stem marks a variant (`model.fp16.safetensors`): the same weights once more.
WEIGHTS = re.compile(r"[^.]+\.safetensors(\.index\.json)?")
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
TOKENIZER = re.compile(r".+\.(json|model|txt)")
GIB = 1 << 30
INSTEAD = (
    "Or name local files instead, one each for transformer, text_encoder and vae, from ComfyUI's folders "
    "models/diffusion_models, models/text_encoders and models/vae; or a local folder in diffusers layout."
)


def fetch(
    chosen: Flavour, parts: Sequence[str], revision: str | None = None, on_progress: OnDownload | None = None
) -> Path:
    """The folder that holds `parts` (of PARTS) of a flavour in diffusers layout, downloading what is missing of them.

    A complete copy in the cache needs no network when the revision is a commit, as the pinned ones are; a branch is
    looked up first, and the cached copy serves when that fails. A broken or cancelled download keeps what arrived and
    the next call continues it, in the middle of a file.

    Args:
        revision: a commit, branch or tag instead of the flavour's pinned commit.
        on_progress: called in this thread with bytes there, bytes in all and a file name. What it raises ends the
            download and is raised here. Without it a bar is drawn in the terminal.
    Raises:
        ModelFileError: no network, offline, no access, nothing of that name, disk full or damaged file; with the cause
            and what to do.
    """
    if chosen.repository is None:
        assert chosen.folder is not None
        return chosen.folder
    repository = CachedRepository(chosen.repository, cache_folder(), endpoint())
    wanted = revision or chosen.revision or constants.DEFAULT_REVISION
    if not REVISION.fullmatch(wanted) or ".." in wanted:  # it becomes part of a path in the cache
        raise ModelFileError(f"'{wanted}' is not a revision: name a commit, branch or tag of {chosen.repository}.")
    commit = wanted if COMMIT.fullmatch(wanted) else None
    if commit and _is_complete(repository.snapshot(commit), parts):
        return repository.snapshot(commit)
    try:
        if is_offline():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        commit, files = _listing(repository, wanted, parts)
        _download(chosen, repository, commit, files, parts, on_progress)
    except Cancelled as stopped:
        raise stopped.reason from None
    except TRANSFER_ERRORS as error:
        known = _cached_commit(repository, wanted)
        if commit is None and known and _is_complete(repository.snapshot(known), parts):
            log.warning("Using the cached copy of %s at '%s', because: %s", repository.name, wanted, error)
            return repository.snapshot(known)
        raise ModelFileError(_explain(error, chosen, wanted, parts, repository)) from error
    if not _is_complete(repository.snapshot(commit), parts):
        raise ModelFileError(
            f"'{repository.name}' at revision '{wanted}' does not hold what is needed: {', '.join(parts)} in diffusers "
            f"layout, as safetensors. Choose another revision. {INSTEAD}"
        )
    return repository.snapshot(commit)


def is_here(chosen: Flavour, parts: Sequence[str]) -> bool:
    """Whether `fetch` of the pinned commit would find all it needs on this machine."""
    if chosen.repository is None or chosen.revision is None:
        return chosen.folder is not None
    return _is_complete(
        CachedRepository(chosen.repository, cache_folder(), endpoint()).snapshot(chosen.revision), parts
    )


def endpoint() -> str:
    """Address of the Hub or of a mirror, without a slash at its end."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def cache_folder() -> Path:
    """The Hub's cache, shared with every other program that uses huggingface_hub."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(name):
            return Path(os.path.expandvars(os.environ[name])).expanduser() / below
    return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether the user forbids the network."""
    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES


def _listing(repository: CachedRepository, revision: str, parts: Sequence[str]) -> tuple[str, list[RemoteFile]]:
    """The commit that `revision` means, and those of its files that `parts` need."""
    api = HfApi(endpoint=repository.endpoint)
    try:
        info = api.model_info(
            repository.name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        files = [
            RemoteFile(s.rfilename, s.lfs.size if s.lfs else s.size, s.lfs.sha256 if s.lfs else s.blob_id)  # pyright: ignore
            for s in info.siblings or ()
        ]
    except HfHubHTTPError:
        raise
    except (ValueError, KeyError, TypeError) as error:  # a log-in page of the network, a wrong HF_ENDPOINT
        raise ConnectionError(f"{repository.endpoint} does not answer like the Hub") from error
    if info.sha is None or any(f.size is None or f.checksum is None for f in files):
        raise ConnectionError(f"{repository.endpoint} lists no commit, sizes or checksums")
    if not COMMIT.fullmatch(revision):
        reference = repository.folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(info.sha, encoding="utf-8")
    return info.sha, [f for part in parts for f in _needed(files, part)] + [
        f for f in files if f.path == "model_index.json"
    ]


def _needed(files: Sequence[RemoteFile], part: str) -> list[RemoteFile]:
    """The files of one part; a tokenizer's configuration last, because its presence means that the rest is there."""
    inside = {f.path.removeprefix(f"{part}/"): f for f in files if f.path.startswith(f"{part}/")}
    if part == "tokenizer":
        names = sorted(n for n in inside if TOKENIZER.fullmatch(n) and "/" not in n)
        return [inside[n] for n in sorted(names, key=lambda n: n == "tokenizer_config.json")]
    names = sorted(n for n in inside if WEIGHTS.fullmatch(n) and "/" not in n)
    if any(n.endswith(".index.json") for n in names):  # sharded: a single file beside the shards is a second copy
        names = [n for n in names if n.endswith(".index.json") or SHARD.search(n)]
    return [inside[n] for n in ("config.json", *names) if n in inside]


def _download(
    chosen: Flavour,
    repository: CachedRepository,
    commit: str,
    files: Sequence[RemoteFile],
    parts: Sequence[str],
    on_progress: OnDownload | None,
) -> None:
    snapshot = repository.snapshot(commit)
    missing = [f for f in files if size_of(snapshot / f.path) != f.size or not _is_whole(snapshot / f.path)]
    for file in missing:
        _discard(snapshot / file.path, file)
    total = sum(f.size for f in missing)
    needed = total - sum(min(f.size, size_of(repository.partial(f))) for f in missing)
    free = shutil.disk_usage(next(p for p in (repository.cache, *repository.cache.parents) if p.exists())).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / GIB:.1f} GiB are needed, {free / GIB:.1f} GiB are free")
    log.info("Fetching %s of %s: %.2f GiB of %.2f GiB", ", ".join(parts), chosen.name, needed / GIB, total / GIB)
    title = f"{chosen.title.partition(':')[0]} {', '.join(parts)}"
    with closing(Progress(total, title, on_progress)) as progress:
        for file in missing:
            bring(file, commit, repository, progress)


def _discard(path: Path, file: RemoteFile) -> None:
    """Remove a damaged file from the cache; does nothing where there is none."""
    if path.exists():
        log.warning(
            "The cached '%s' is damaged: %d bytes, %d expected; fetching it again", path, size_of(path), file.size
        )
        remove(path.resolve())
    remove(path)


def _is_complete(snapshot: Path, parts: Sequence[str]) -> bool:
    """Whether every part is there and whole; needs no listing, since an index names its shards."""
    return all(_has_tokenizer(snapshot / p) if p == "tokenizer" else _has_weights(snapshot / p) for p in parts)


def _has_tokenizer(folder: Path) -> bool:
    vocabulary = any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json"))
    return vocabulary and (folder / "tokenizer_config.json").is_file()


def _has_weights(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    names = {p.name for p in folder.iterdir() if WEIGHTS.fullmatch(p.name)}
    indices = [n for n in names if n.endswith(".index.json")]
    try:
        if indices:
            names = set(read_json(folder / indices[0], ModelFileError)["weight_map"].values())
    except (ModelFileError, KeyError):
        return False
    return bool(names) and all(_is_whole(folder / n) for n in names)


def _is_whole(path: Path) -> bool:
    """Whether a file is there and, if it is of safetensors, as long as its header says."""
    if path.is_file() and path.suffix == ".safetensors":
        try:
            read_safetensors(path)
        except ModelFileError:
            return False
    return path.is_file()


def _cached_commit(repository: CachedRepository, revision: str) -> str | None:
    """What a branch meant when it was last asked for."""
    reference = repository.folder / "refs" / revision
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


_SECRET = re.compile(r"hf_\w{8,}|(?<=://)[^/@\s]+(?=@)")
"""A token, or the name and password in the address of a mirror or proxy: an error is shown, logged and sent around."""


def _explain(
    error: BaseException, chosen: Flavour, revision: str, parts: Sequence[str], repository: CachedRepository
) -> str:
    """One paragraph: what failed, why, what to do."""
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    name, where = repository.name, repository.endpoint
    kept = "What was downloaded is kept; try again later to continue."
    if isinstance(error, OfflineModeIsEnabled):
        cause = f"HF_HUB_OFFLINE is set, and the cache {repository.cache} lacks it. Unset it to download."
    elif isinstance(error, RevisionNotFoundError):
        cause = f"the repository has no revision '{revision}'. Choose an existing commit, branch or tag, or none."
    elif status in (401, 403) or isinstance(error, GatedRepoError):
        cause = (
            f"{where} refuses access (status {status}). Accept the licence on the repository's page if it asks for it, "
            "and set HF_TOKEN to a token of yours that may read it."
        )
    elif isinstance(error, RepositoryNotFoundError):
        cause = f"{where} has no repository of that name, or a private one. Check HF_ENDPOINT, and HF_TOKEN."
    elif status == 404:
        cause = f"a file of the listing is not there ({reason}). Choose another revision."
    elif status:
        cause = f"{where} is in trouble: it answered with status {status}. {kept}"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        cause = (
            f"no room in the cache {repository.cache}: {error.strerror}. Free some space, or set HF_HOME to a folder "
            "on another disk; what was downloaded is kept."
        )
    elif isinstance(error, (PermissionError, NotADirectoryError)) or getattr(error, "errno", None) == errno.EROFS:
        cause = f"the cache cannot be written: {reason}. Set HF_HOME to a folder that can."
    else:
        cause = f"no connection to {where}: {reason}. Check the network, HF_ENDPOINT and any proxy. {kept}"
    snapshots = repository.folder / "snapshots"
    others = [p.name for p in snapshots.iterdir() if _is_complete(p, parts)] if snapshots.is_dir() else []
    if others:
        cause += f" The cache holds revision {others[0]} complete: name it as the revision to use that one."
    wanted = ", ".join(parts)
    told = f"{wanted} of '{chosen.name}' could not be fetched from {name} (revision {revision}): {cause} {INSTEAD}"
    return _SECRET.sub("…", told)
