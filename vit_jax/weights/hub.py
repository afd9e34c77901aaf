"""From what a user names to a file on this machine: a path, a URL, a published model, a model on the Hugging Face hub.

Only config.json and files of arrays (.safetensors, .npz) are ever fetched. What has been fetched is found again
without network.
"""

import contextlib
import difflib
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vit_jax.errors import UserError
from vit_jax.weights import files
from vit_jax.weights.published import PUBLISHED

HUB = "https://huggingface.co"
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_WEIGHTS = [files.SAFETENSORS, files.INDEX, "model-*-of-*.safetensors"]
_SUFFIXES = (".npz", ".safetensors", ".json")
_STALL_SECONDS = 30  # a download that brings nothing for so long has ended
_CONFIG_BYTES = 10**6


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/vit_jax/weights, or ~/.cache/vit_jax/weights."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vit_jax" / "weights"


def fetch(path_or_name: str | os.PathLike[str]) -> Path:
    """The file or folder that is meant, brought to this machine where it is not there yet.

    Args:
        path_or_name: in the order in which they are tried: an http or https URL of a file; a path; a short name of
            `PUBLISHED`, or timm's name of the same model; a model on the Hugging Face hub as owner/name or
            owner/name@revision.

    Returns:
        A path; for a model of the hub a folder with its files, in huggingface_hub's own cache or, where they have been
        put there by hand, in cache_dir()/owner--name.

    Raises:
        UserError: nothing of that name is known; it cannot be fetched, and the message says which file to get from
            where and where to put it; or it is of a kind that is never read.
    """
    name = os.fspath(path_or_name)
    if re.match(r"https?://", name):
        return _from_url(name)
    if "://" in name:
        raise UserError(f"{name}: only http and https are read.\nCopy the file to this machine and name its path.")
    path = Path(name).expanduser()
    if name and os.path.exists(path):  # unlike Path.exists, of any text at all
        return path
    if name in PUBLISHED:
        return _from_hub(PUBLISHED[name].hub, name)
    for known in PUBLISHED.values():
        if name == known.hub.partition("/")[2]:
            return _from_hub(known.hub, name)
    if not _HUB_ID.fullmatch(name) or path.suffix.lower() in _SUFFIXES:
        raise _unknown(name)
    files.check_suffix(path)
    return _from_hub(name, name)


def _unknown(name: str) -> UserError:
    if "/" in name or Path(name).suffix.lower() in _SUFFIXES or name.startswith(("~", ".")):
        return UserError(f"{name}: there is no such file or folder.")
    return UserError(
        f"{name!r} is neither a file nor a published model.\nNearest: {', '.join(_nearest(name))}.\n"
        "Or give a path, a URL, or a model of the Hugging Face hub as owner/name."
    )


def _nearest(name: str) -> list[str]:
    """The three published names most like `name`, timm's names counted as well."""
    plain = name.lower().replace("_", "-").replace("/", "")
    short = difflib.get_close_matches(plain, PUBLISHED, n=3, cutoff=0)
    timm = difflib.get_close_matches(
        name, [known.hub.partition("/")[2] for known in PUBLISHED.values()], n=3, cutoff=0.7
    )
    return timm or short


# --- the Hugging Face hub -------------------------------------------------------------------------------------------


def _from_hub(model: str, name: str) -> Path:
    """The folder of a model of the hub, fetched by huggingface_hub into its cache."""
    identifier, _, revision = model.partition("@")
    placed = cache_dir() / identifier.replace("/", "--")
    if placed.is_dir() and not revision:
        files.find(placed)
        return placed
    try:
        import huggingface_hub
    except ImportError as error:
        raise _by_hand(name, identifier, "huggingface_hub is missing (pip install 'vit_jax[hub]')") from error
    try:
        folder = _snapshot(huggingface_hub, identifier, revision or None)
    except UserError:
        raise
    except Exception as error:  # among them its HTTP client's, and which client that is depends on its version
        missing = isinstance(error, huggingface_hub.errors.RepositoryNotFoundError)
        raise (_no_model(name, identifier) if missing else _by_hand(name, identifier, _line(error))) from error
    files.find(folder)
    return folder


def _snapshot(huggingface_hub, identifier: str, revision: str | None) -> Path:
    """Fetches config.json and the weights; checks sizes and check sums, goes on where it was interrupted.

    Without network it returns what it has, if that is all there is of these files.
    """

    def snapshot(patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(identifier, revision=revision, allow_patterns=[files.CONFIG, *patterns])
        )

    folder = snapshot(_WEIGHTS)
    with contextlib.suppress(UserError):
        files.find(folder)
        return folder
    names = [name for name in huggingface_hub.HfApi().list_repo_files(identifier, revision=revision) if "/" not in name]
    found = [name for name in names if name.endswith((".safetensors", ".npz"))]
    if len(found) != 1:
        held = f"several files of weights: {', '.join(found[:4])}" if found else "no .safetensors and no .npz file"
        raise UserError(
            f"{identifier} on the hub holds {held}.\n"
            f"Give the URL of one: {HUB}/{identifier}/resolve/{revision or 'main'}/FILE"
        )
    return snapshot(found)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _by_hand(name: str, identifier: str, reason: str) -> UserError:
    return UserError(
        f"{name}: cannot be fetched from the hub: {reason}.\n"
        f"Get {files.SAFETENSORS} and {files.CONFIG} from {HUB}/{identifier}/tree/main on any machine, and put both\n"
        f"into {cache_dir() / identifier.replace('/', '--')} (the same name then works) or any folder, and name that."
    )


def _no_model(name: str, identifier: str) -> UserError:
    return UserError(
        f"{name}: there is no such file here, and no {HUB}/{identifier}, or not for everyone (hf auth login).\n"
        f"Nearest published: {', '.join(_nearest(name))}."
    )


# --- a URL ----------------------------------------------------------------------------------------------------------


def _from_url(url: str) -> Path:
    """The downloaded file, in a folder of its own with the config.json beside it, where there is one."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url} is no URL: {error}.") from error
    inside = parts.path.strip("/").split("/")
    if parts.hostname in _HUB_HOSTS:
        if len(inside) == 2 or inside[2:3] == ["tree"]:
            revision = inside[3] if len(inside) > 3 and inside[3] != "main" else ""
            identifier = "/".join(inside[:2])
            return _from_hub(f"{identifier}@{revision}" if revision else identifier, url)
        if inside[2:3] == ["blob"]:  # the page that shows the file
            url = parts._replace(path=f"/{'/'.join([*inside[:2], 'resolve', *inside[3:]])}").geturl()
    filename = re.sub(r"[^\w.-]", "_", urllib.parse.unquote(inside[-1])) or "weights"
    files.check_suffix(Path(filename), url)
    if filename.endswith(".json"):
        raise UserError(
            f"{url} names files in parts.\nName their model as owner/name, or a folder that holds them all."
        )
    target = cache_dir() / "url" / hashlib.sha256(url.encode()).hexdigest()[:16] / filename
    if target.exists():
        return target
    with _disk(url, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(filename + ".part").open("ab") as part:
            fcntl.flock(part, fcntl.LOCK_EX)  # several processes may want it: one downloads, the others wait
            if not target.exists():
                _download(url, target, part)
    return target


def _download(url: str, target: Path, part: BinaryIO) -> None:
    """Completes `part` and makes it `target`, once it has proved to be a file of arrays."""
    if target.suffix == ".safetensors":
        _beside(url, target.parent)
    print(f"downloading {url} to {target}", file=sys.stderr, flush=True)
    with _network(url):
        total = _complete(url, Path(part.name), part)
    part.flush()
    have = os.fstat(part.fileno()).st_size
    if total is not None and have < total:
        raise _stopped(url, f"the connection was closed at {have:,} of {total:,} bytes")
    os.replace(part.name, target)
    _validator(Path(part.name)).unlink(missing_ok=True)
    try:
        files.open_file(target)
    except UserError as error:
        target.unlink()
        raise UserError(f"{url}: {str(error).replace(f'{target} ', '')}") from error


def _complete(url: str, path: Path, part: BinaryIO) -> int | None:
    """Appends what is missing to `part`; returns how many bytes the whole file has, None where the server is silent.

    A part is gone on with only if the server says, by the same ETag or date as before, that the file is still the same.
    """
    have = os.fstat(part.fileno()).st_size
    validator = _validator(path).read_text() if have and _validator(path).exists() else None
    headers = {"Range": f"bytes={have}-", "If-Range": validator} if validator else {}
    try:
        reply = _open(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        reply = _open(url, {})  # nothing lies behind what is there; so it may be another file
    with reply:
        resumed = reply.status == 206 and (reply.headers["Content-Range"] or "").startswith(f"bytes {have}-")
        if not resumed:
            part.truncate(have := 0)
        length = reply.headers["Content-Length"]
        total = have + int(length) if length and length.isdigit() else None
        free = shutil.disk_usage(path.parent).free
        if total is not None and total - have > free:
            raise UserError(f"{url}: {total - have:,} bytes to come, and {path.parent} has {free:,} free.")
        tag = reply.headers["ETag"]
        seal = tag if tag and not tag.startswith("W/") else reply.headers["Last-Modified"]
        _validator(path).write_text(seal) if seal else _validator(path).unlink(missing_ok=True)
        while block := reply.read(2**20):
            part.write(block)
            have += len(block)
            if sys.stderr.isatty():
                of = f" of {total / 1e6:,.0f}" if total else ""
                print(f"\r{have / 1e6:,.0f}{of} MB", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return total


def _validator(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    headers = {"User-Agent": "vit_jax", "Accept-Encoding": "identity", **headers}
    reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_STALL_SECONDS)
    if url.startswith("https:") and not reply.url.startswith("https:"):
        reply.close()
        raise UserError(f"{url} leads to {reply.url}, which is not encrypted.\nGive that URL itself, if it is trusted.")
    return reply


def _beside(url: str, folder: Path) -> None:
    """Fetches the config.json that lies beside the file, if there is one."""
    parts = urllib.parse.urlsplit(url)
    beside = parts._replace(path=parts.path.rpartition("/")[0] + f"/{files.CONFIG}").geturl()
    with _network(url):
        try:
            with _open(beside, {}) as reply:
                text = reply.read(_CONFIG_BYTES)
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise
            return
    path = folder / files.CONFIG
    path.write_bytes(text)
    try:
        files.read_json(path)
    except UserError:  # a server that answers every address with a page
        path.unlink()


@contextlib.contextmanager
def _network(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        closed = " (Google closed that bucket in 2026)" if "storage.googleapis.com/vit_models" in url else ""
        raise UserError(
            f"{url}: the server answers {error.code} {error.reason}{closed}.\n"
            f"Published models have names: {', '.join(_nearest(Path(urllib.parse.urlsplit(url).path).stem))}, ..."
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _stopped(url, _line(getattr(error, "reason", error))) from error


def _stopped(url: str, reason: object) -> UserError:
    return UserError(
        f"{url}: cannot be downloaded: {reason}.\n"
        "Run it again to go on from there; or get the file on any machine, copy it here, and give its path."
    )


@contextlib.contextmanager
def _disk(url: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{url}: cannot be stored in {folder}: {error.strerror or error}.\n"
            "Free or unlock it, or set XDG_CACHE_HOME to another folder."
        ) from error
