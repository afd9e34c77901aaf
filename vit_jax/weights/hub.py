"""Finds or downloads weights: a path, a URL, the name of a published model, or a model on the Hugging Face hub.

Only JSON files beside the weights and the weights are downloaded, of several formats the preferred one
(`files.candidates`). Downloaded files are cached, and used from there without asking the server again.
"""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import http.client
import os
import re
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from vit_jax import atomic, paths, terminal
from vit_jax.errors import UserError, few, nearest, one_line
from vit_jax.weights import files, pickles
from vit_jax.weights.published import LIST, PUBLISHED, nearest_models

HUB = "https://huggingface.co"
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_VARIANT = re.compile(r"(vit-?)?(ti|s|m|b|l|h|g)/\d+", re.IGNORECASE)  # B/16 and ViT-B/16 are no models on the hub
_EXAMPLES = ("augreg-b16-in21k", "dinov2-b14")
_SHARDS = "model-*-of-*.safetensors"
_SUFFIXES = (*files.ALL_SUFFIXES, ".json")
_STALL_SECONDS = 30  # a download that receives no data for this long fails
_CONFIG_BYTES = 10**6


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/vit_jax/weights, or ~/.cache/vit_jax/weights."""
    return paths.cache_dir() / "weights"


def fetch(path_or_name: str | os.PathLike[str]) -> Path:
    """The local path of a weights file or of a directory with one, downloaded if needed.

    Args:
        path_or_name: one of, in this order: the http or https URL of a file; a path; a short name in `PUBLISHED`, or
            timm's name of the same model; a model on the Hugging Face hub as owner/name or owner/name@revision.

    Returns:
        A path; for a model on the hub the directory with its files: in the cache of huggingface_hub, or
        cache_dir()/owner--name if the files were put there by hand.

    Raises:
        UserError: the name is unknown; the download fails (the message says which file to download and where to put
            it); or the format is not supported.
    """
    name = os.fspath(path_or_name)
    if re.match(r"https?://", name):
        return _from_url(name)
    if "://" in name:
        raise UserError(
            f"{name}: only http and https URLs are supported\n  copy the file to this machine and give its path"
        )
    if not name:
        raise _unknown(name, Path())
    path = paths.expand(name, "weights")
    if _exists(path):
        return path
    if name in PUBLISHED:
        return _from_hub(PUBLISHED[name].hub, name)
    for known in PUBLISHED.values():
        if name == known.hub.partition("/")[2]:
            return _from_hub(known.hub, name)
    if not _HUB_ID.fullmatch(name) or _VARIANT.fullmatch(name) or path.suffix.lower() in _SUFFIXES:
        raise _unknown(name, path)
    files.check_suffix(path)
    if path.parent.is_dir() or _nearest_paths(path):  # a misspelled directory is likelier than a model on the hub
        raise _unknown(name, path)
    return _from_hub(name, name)


def _exists(path: Path) -> bool:
    """Whether there is such a file or directory; any string is accepted.

    Raises:
        UserError: there is, but it cannot be reached.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which does not exist\n  correct the link"
            ) from error
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise UserError(f"{path} cannot be read: {error.strerror}\n  check its permissions and the disk") from error
    return True


def _unknown(name: str, path: Path) -> UserError:
    models = ", ".join(nearest_models(name) or _EXAMPLES)
    if ("/" in name or path.suffix.lower() in _SUFFIXES or name.startswith(("~", "."))) and not _VARIANT.fullmatch(
        name
    ):
        near = _nearest_paths(path)
        way_out = f"nearest: {', '.join(near)}" if near else "correct the path"
        if _HUB_ID.fullmatch(name) and path.suffix.lower() not in _SUFFIXES:
            download = f"use {HUB}/{name} for a model on the Hugging Face hub"
        else:
            download = f"or name a published model, to download it: {models}, ... (all: {LIST})"
        return UserError(f"{name}: there is no such file or directory\n  {way_out}\n  {download}")
    near = ", ".join([*_nearest_paths(Path(name)), models])
    return UserError(
        f"{name!r} is neither a file nor a published model\n  nearest: {near}, ... (all: {LIST})\n"
        "  allowed: a path, a URL, a published model, or a model on the Hugging Face hub as owner/name"
    )


def _nearest_paths(path: Path) -> list[str]:
    """The files and directories whose path, or that of their directory, is misspelled in `path`."""
    parents = [path.parent]
    if not path.parent.is_dir():
        parents = [path.parent.parent / one for one in nearest(path.parent.name, _entries(path.parent.parent))]
    return [str(parent / one) for parent in parents for one in nearest(path.name, _entries(parent), 3)]


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except (OSError, ValueError):  # not a directory, or not readable: nothing can be suggested
        return []


# --- the Hugging Face hub -------------------------------------------------------------------------------------------


def _from_hub(model: str, name: str) -> Path:
    """The directory of a model on the hub, downloaded by huggingface_hub into its cache."""
    identifier, _, revision = model.partition("@")
    placed = _placed(identifier)
    if placed.is_dir() and not revision:
        files.find(placed)
        return placed
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise _by_hand(name, identifier, "huggingface_hub is missing: pip install huggingface_hub") from error
    try:
        directory = _snapshot(huggingface_hub, identifier, revision or None)
    except UserError:
        raise
    except Exception as error:  # including those of its HTTP client, which depends on its version
        if isinstance(error, errors.RepositoryNotFoundError):
            raise _no_model(name, identifier) from error
        offline = f"HF_HUB_OFFLINE is set, and it is not in {constants.HF_HUB_CACHE}"
        reason = offline if isinstance(error, errors.OfflineModeIsEnabled) else one_line(error, 160)
        raise _by_hand(name, identifier, reason) from error
    files.find(directory)
    return directory


def sibling(directory: Path, filename: str) -> Path | None:
    """The file of this name in a directory that `fetch` returned, downloaded if that is of the hub; None if none is.

    Raises:
        UserError: the hub has such a file or may have one, but it cannot be downloaded.
    """
    path = directory / filename
    cached = re.search(r"models--([^/]+)/snapshots/(\w+)$", directory.as_posix())
    if path.is_file() or cached is None:
        return path if path.is_file() else None
    import huggingface_hub
    from huggingface_hub import errors

    identifier = cached[1].replace("--", "/", 1)
    try:
        return Path(huggingface_hub.hf_hub_download(identifier, filename, revision=cached[2]))
    except Exception as error:  # including those of its HTTP client, which depends on its version
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        raise UserError(
            f"{filename} of {HUB}/{identifier} cannot be downloaded: {one_line(error, 160)}\n"
            f"  download it on a machine with a network, and put it in {directory}"
        ) from error


def _placed(identifier: str) -> Path:
    """Where the files of a model may be put by hand."""
    return cache_dir() / identifier.replace("/", "--")


def _snapshot(huggingface_hub, identifier: str, revision: str | None) -> Path:
    """The directory of a model in the cache; what is missing there is downloaded, or its download resumed.

    Without a network, this ends after the timeout of huggingface_hub (HF_HUB_ETAG_TIMEOUT, 10 seconds).
    """
    from huggingface_hub import constants, errors

    described = [files.CONFIG, files.PREPROCESSOR, files.PROCESSOR, files.OPEN_CLIP]

    def snapshot(weights: list[str], **options: bool) -> Path:
        patterns = [*described, *weights]
        path = huggingface_hub.snapshot_download(identifier, revision=revision, allow_patterns=patterns, **options)
        return Path(path)

    with contextlib.suppress(errors.LocalEntryNotFoundError, UserError):
        # Of the preferred format all files must be in the cache; the other formats name their parts.
        directory = snapshot([files.SAFETENSORS, files.INDEX, _SHARDS], local_files_only=True)
        files.open_file(directory)  # unless it is incomplete
        return directory
    found = huggingface_hub.HfApi().model_info(
        identifier, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    sizes = {one.rfilename: one.size or 0 for one in found.siblings if "/" not in one.rfilename}
    names = _weights_among(sizes, identifier, revision)
    size = sum(sizes.get(name, 0) for name in [*described, *names])
    terminal.warn(f"downloading {identifier} from {HUB}, {size / 1e6:,.1f} MB, to {constants.HF_HUB_CACHE}")
    return snapshot(names)


def _weights_among(names: Mapping[str, int], identifier: str, revision: str | None) -> list[str]:
    """The files of a repository that contain the model.

    Raises:
        UserError: there is none, or there are several models.
    """
    found = files.candidates(names)
    if len(found) != 1:
        contents = f"several weights files: {few(found, 4)}" if found else "no file of weights"
        way_out = "give the URL of one" if found else "download another file, to convert it"
        raise UserError(
            f"{identifier} on the hub has {contents}\n  {way_out}: {HUB}/{identifier}/resolve/{revision or 'main'}/FILE"
        )
    files.check_suffix(Path(found[0]), f"{HUB}/{identifier}/resolve/{revision or 'main'}/{found[0]}")
    shards = re.sub(r"(?:-\d+-of-\d+(\.\w+)|(\.\w+)\.index\.json)$", r"-*-of-*\1\2", found[0])
    return [*found, *(name for name in names if fnmatch.fnmatch(name, shards) and name not in found)]


def _by_hand(name: str, identifier: str, reason: str) -> UserError:
    no_file = "" if name in PUBLISHED else "there is no such file, and "
    directory = name if name in PUBLISHED else identifier.replace("/", "--")
    what = f"{identifier} {files.CONFIG} {files.SAFETENSORS}"
    return UserError(
        f"{name}: {no_file}{HUB}/{identifier} cannot be downloaded: {reason}\n"
        f"  on a machine with a network: hf download {what} --local-dir {directory}\n"
        f"  then copy that directory to this machine and give its path, or put it at {_placed(identifier)}"
    )


def _no_model(name: str, identifier: str) -> UserError:
    return UserError(
        f"{name}: there is no such file, and no {HUB}/{identifier}, or it is private (hf auth login)\n"
        f"  nearest published models: {', '.join(nearest_models(name) or _EXAMPLES)}, ... (all: {LIST})"
    )


# --- a URL ----------------------------------------------------------------------------------------------------------


def _from_url(url: str) -> Path:
    """The downloaded file, in its own directory, together with its config.json if there is one."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise UserError(
            f"{url} is not a valid URL: {error}\n  correct it, or download the file and give its path"
        ) from error
    inside = parts.path.strip("/").split("/")
    if parts.hostname in _HUB_HOSTS:
        if len(inside) == 2 or inside[2:3] == ["tree"]:
            revision = inside[3] if len(inside) > 3 and inside[3] != "main" else ""
            identifier = "/".join(inside[:2])
            return _from_hub(f"{identifier}@{revision}" if revision else identifier, url)
        if inside[2:3] == ["blob"]:  # the page about the file
            url = parts._replace(path=f"/{'/'.join([*inside[:2], 'resolve', *inside[3:]])}").geturl()
    filename = re.sub(r"[^\w.-]", "_", urllib.parse.unquote(inside[-1])) or "weights"
    files.check_suffix(Path(filename), url)
    if filename.endswith(".json"):
        raise UserError(
            f"{url} is the index of a sharded file\n"
            "  give the model as owner/name, or a directory with all of its files"
        )
    target = cache_dir() / "url" / hashlib.sha256(url.encode()).hexdigest()[:16] / filename
    if target.exists():
        return target
    with _disk(url, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(filename + ".part").open("ab") as part:
            fcntl.flock(part, fcntl.LOCK_EX)  # of several processes one downloads, the others wait
            if not target.exists():
                _download(url, target, part)
    return target


def _download(url: str, target: Path, part: BinaryIO) -> None:
    """Completes `part`, renames it to `target` and checks that it is a file of arrays."""
    if target.suffix != ".npz":
        _download_config(url, target.parent)
    terminal.warn(f"downloading {url} to {target}")
    with _network(url):
        total = _complete(url, Path(part.name), part)
    part.flush()
    have = os.fstat(part.fileno()).st_size
    if total is not None and have < total:
        raise _interrupted(url, f"the connection was closed at {have:,} of {total:,} bytes")
    atomic.sync_and_rename(Path(part.name), target)
    _validator(Path(part.name)).unlink(missing_ok=True)
    try:
        files.open_file(target)
    except UserError as error:
        if isinstance(error.__cause__, pickles.UnsupportedError):  # the file is intact, and may be converted
            raise
        target.unlink()
        raise UserError(f"{url}: {str(error).replace(f'{target} ', '')}") from error


def _complete(url: str, path: Path, part: BinaryIO) -> int | None:
    """Appends the missing bytes to `part`; returns the size of the whole file, None if the server does not send it.

    An interrupted download is resumed only if the file has the same ETag or modification date as before.
    """
    have = os.fstat(part.fileno()).st_size
    validator = _validator(path).read_text() if have and _validator(path).exists() else None
    headers = {"Range": f"bytes={have}-", "If-Range": validator} if validator else {}
    try:
        reply = _open(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        reply = _open(url, {})  # `part` is not shorter than the file, so it may be of another one
    with reply:
        resumed = reply.status == 206 and (reply.headers["Content-Range"] or "").startswith(f"bytes {have}-")
        if not resumed:
            part.truncate(have := 0)
        length = reply.headers["Content-Length"]
        total = have + int(length) if length and length.isdigit() else None
        free = shutil.disk_usage(path.parent).free
        if total is not None and total - have > free:
            raise UserError(
                f"{url}: {total - have:,} bytes to download, but {path.parent} has {free:,} free\n"
                "  free disk space, or set XDG_CACHE_HOME to another directory"
            )
        tag = reply.headers["ETag"]
        seal = tag if tag and not tag.startswith("W/") else reply.headers["Last-Modified"]
        _validator(path).write_text(seal) if seal else _validator(path).unlink(missing_ok=True)
        while block := reply.read(2**20):
            part.write(block)
            have += len(block)
            if terminal.is_live(sys.stderr):
                of = f" of {total / 1e6:,.0f}" if total else ""
                terminal.warn(f"\r{have / 1e6:,.0f}{of} MB", end="")
    if terminal.is_live(sys.stderr):
        terminal.warn()
    return total


def _validator(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    headers = {"User-Agent": "vit_jax", "Accept-Encoding": "identity", **headers}
    reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_STALL_SECONDS)
    if url.startswith("https:") and not reply.url.startswith("https:"):
        reply.close()
        raise UserError(f"{url} redirects to {reply.url}, which is not encrypted\n  give that URL if you trust it")
    return reply


def _download_config(url: str, directory: Path) -> None:
    """Downloads the config.json next to the file, if there is one."""
    parts = urllib.parse.urlsplit(url)
    config_url = parts._replace(path=parts.path.rpartition("/")[0] + f"/{files.CONFIG}").geturl()
    with _network(url):
        try:
            with _open(config_url, {}) as reply:
                text = reply.read(_CONFIG_BYTES)
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise
            return
    path = directory / files.CONFIG
    path.write_bytes(text)
    try:
        files.read_json(path)
    except UserError:  # some servers answer every URL with a web page
        path.unlink()


@contextlib.contextmanager
def _network(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        near = nearest_models(Path(urllib.parse.urlsplit(url).path).stem)
        closed = " (Google closed that bucket in 2026)" if "storage.googleapis.com/vit_models" in url else ""
        raise UserError(
            f"{url}: the server returned {error.code} {error.reason}{closed}\n"
            f"  names of published models: {', '.join(near or _EXAMPLES)}, ... (all: {LIST})"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _interrupted(url, one_line(getattr(error, "reason", error), 160)) from error


def _interrupted(url: str, reason: str) -> UserError:
    return UserError(
        f"{url}: the download failed: {reason}\n"
        "  run the same command again to resume it; or copy the file to this machine and give its path"
    )


@contextlib.contextmanager
def _disk(url: str, directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{url}: cannot be stored in {directory}: {error.strerror or error}\n"
            "  free some disk space, or set XDG_CACHE_HOME to another directory"
        ) from error
