"""From names to files: huggingface_hub with a small server that answers as the hub does, URLs with a plain server."""

import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import helpers_torch
import numpy as np
import pytest
from helpers import run_command

from vit_jax.errors import UserError
from vit_jax.weights import files, hub


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; no proxy for the test server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "vit_jax" / "weights"


DESCRIBED = ("config.json", files.PREPROCESSOR, files.PROCESSOR, files.OPEN_CLIP)


def content(folder, name="model.safetensors", values=1000):
    """The bytes of a weights file."""
    (files.write_npz if name.endswith(".npz") else files.write_safetensors)(
        folder / name, {"a": np.arange(float(values))}
    )
    return (folder / name).read_bytes()


def message(name):
    with pytest.raises(UserError) as caught:
        hub.fetch(name)
    text = str(caught.value)
    assert len(text.splitlines()) <= 3, text
    return text


# --- the table ------------------------------------------------------------------------------------------------------


def test_published_names(monkeypatch):
    """Each follows the naming scheme, has its own repository, a paper and a licence, and is found by its name."""
    requested = []
    monkeypatch.setattr(hub, "_from_hub", lambda model, name: requested.append(model) or Path("here"))
    for name, published in hub.PUBLISHED.items():
        assert re.fullmatch(r"(augreg|vit|sam|deit3?|dino|dinov[23]|mae|siglip2?|eva02|beitv2)-[a-z0-9-]+", name)
        assert re.fullmatch(r"timm/(vit|deit|deit3|eva02|beitv2)_[a-z0-9_]+\.[a-z0-9_]+", published.hub)
        assert re.search(r"\(arXiv \d{4}\.\d{5}\)", published.source)
        others = {"mae": "cc-by-nc-4.0", "dinov3": "dinov3-license", "eva02": "mit"}
        assert published.licence == others.get(name.partition("-")[0], "apache-2.0")
        hub.fetch(name)
        hub.fetch(published.hub)
        hub.fetch(published.hub.removeprefix("timm/"))
        assert requested[-3:] == [published.hub] * 3
    repositories = [published.hub for published in hub.PUBLISHED.values()]
    assert len(set(repositories)) == len(repositories)


@pytest.mark.parametrize("name", list(hub.PUBLISHED))
def test_short_names_agree_with_timms(name):
    """Patch size, image size and training data in timm's name and in the short name are the same."""
    size = {"ti": "tiny", "s": "small", "m": "medium", "b": "base", "l": "large", "h": "huge", "g": "giant"}
    size |= {"so400m": "so400m", "gopt": "giantopt", "7b": "7b"}
    family, letters, patch = re.match(r"(\w+)-(?:r\d*-)?(so400m|gopt|7b|[a-z]+)(\d+)", name).groups()
    architecture, tag = hub.PUBLISHED[name].hub.removeprefix("timm/").split(".")
    assert f"_{size[letters]}_" in architecture
    assert re.search(rf"_patch{patch}(_|$)|_s{patch}_", architecture)
    assert (re.search(r"_(r\d*)_", architecture) or [None, None])[1] == (re.search(r"-(r\d*)-", name) or [None, None])[
        1
    ]
    if pixels := re.search(r"-(\d\d\d)(-|$)", name):
        assert architecture.endswith(f"_{pixels[1]}")
    assert ("_reg4_" in architecture) == name.endswith("-reg")
    tags = {"augreg": "augreg", "vit": "orig", "sam": "sam", "dino": "dino", "dinov2": "lvd142m", "mae": "mae"}
    tags |= {"deit": "fb", "deit3": "fb", "siglip": "webli", "siglip2": "v2_webli", "dinov3": "lvd1689m"}
    tags |= {"eva02": "mim_in22k_ft_", "beitv2": "in1k_ft_in22k_in1k"}
    assert ("_plus_" in architecture) == name.endswith("-plus")
    assert tag.startswith(tags[family])
    if family in ("augreg", "vit"):
        ending = "in21k" if name.endswith("in21k") else "augreg_in1k" if "-in1k" in name else "in21k_ft_in1k"
        assert tag.endswith(ending)
    if family == "deit3":
        assert tag == ("fb_in22k_ft_in1k" if "in21k" in name else "fb_in1k")


def test_paths_have_precedence_over_names(tmp_path, monkeypatch):
    (tmp_path / "dino-s16").mkdir()
    assert hub.fetch("dino-s16") == Path("dino-s16")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.fetch("~/dino-s16") == tmp_path / "dino-s16"
    assert hub.fetch(tmp_path / "dino-s16") == tmp_path / "dino-s16"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dino-s15", "nearest: dino-s16"),
        ("DINOv2_b14_reg", "nearest: dinov2-b14-reg"),
        ("vit_base_patch16_224.augreg_in22k", "nearest: augreg-b16-in21k"),
        ("mae", "nearest: mae-"),
        ("", "neither a file nor a published model"),
        ("here/B_16.npz", "here/B_16.npz: there is no such file"),
        ("./here", "there is no such file"),
        ("/nowhere/at/all", "there is no such file"),
        ("B_16.npz", "there is no such file"),
        ("ViT-B_16.npz", "to download it: augreg-b16-in21k, "),
        ("here/ViT-B_16.npz", "to download it: augreg-b16-in21k, "),
        ("./weights.npz", "to download it: augreg-b16-in21k, dinov2-b14, ... (all: python -m vit_jax.convert --list)"),
        ("augreg-b16", "nearest: augreg-b16-in21k"),
        ("vit_base_patch16_224", "nearest: augreg-b16-224"),
        ("ViT-B/16", "nearest: augreg-b16-in21k"),
        ("owner/model.pth", "owner/model.pth: there is no such file"),
        ("gs://vit_models/augreg/B_16.npz", "only http and https URLs are supported"),
        ("http://[x/a.npz", "is not a valid URL"),
        ("http://nowhere/tf_model.h5?download=true", "http://nowhere/tf_model.h5?download=true is HDF5"),
        ("http://nowhere/model.safetensors.index.json", "index of a sharded file"),
    ],
)
def test_unknown_names(name, words):
    assert words in message(name)


# --- the hub --------------------------------------------------------------------------------------------------------


def test_without_huggingface_hub_files_are_placed_by_hand(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    text = message("dino-s16")
    assert "https://huggingface.co/timm/vit_small_patch16_224.dino cannot be downloaded" in text
    assert "huggingface_hub is missing: pip install huggingface_hub" in text
    placed = cache / "timm--vit_small_patch16_224.dino"
    assert str(placed) in text
    placed.mkdir(parents=True)
    assert "has no file of weights" in message("dino-s16")
    content(placed)
    for name in ("dino-s16", "vit_small_patch16_224.dino", "timm/vit_small_patch16_224.dino"):
        assert hub.fetch(name) == placed


def library(monkeypatch, snapshot, names=()):
    """Replaces huggingface_hub with the parts of it that are used, and an empty cache."""
    missing = type("RepositoryNotFoundError", (OSError,), {})
    offline = type("OfflineModeIsEnabled", (OSError,), {})
    not_cached = type("LocalEntryNotFoundError", (OSError,), {})
    siblings = [types.SimpleNamespace(rfilename=name, size=1_500_000) for name in names]

    def download(*arguments, local_files_only=False, **keywords):
        if local_files_only:
            raise not_cached
        return snapshot(*arguments, **keywords)

    def model_info(*_, **__):
        if not names:
            snapshot()
        return types.SimpleNamespace(siblings=siblings)

    fake = types.SimpleNamespace(
        snapshot_download=download,
        HfApi=lambda: types.SimpleNamespace(model_info=model_info),
        errors=types.SimpleNamespace(
            RepositoryNotFoundError=missing, OfflineModeIsEnabled=offline, LocalEntryNotFoundError=not_cached
        ),
        constants=types.SimpleNamespace(HF_HUB_ETAG_TIMEOUT=10, HF_HUB_CACHE="~/.cache/huggingface/hub"),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return missing


def test_errors_of_huggingface_hub(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host " + "x" * 500)

    library(monkeypatch, unreachable)
    text = message("mae-b16")
    assert "https://huggingface.co/timm/vit_base_patch16_224.mae cannot be downloaded: no route to host xx" in text
    assert "hf download timm/vit_base_patch16_224.mae config.json model.safetensors --local-dir mae-b16" in text

    def missing(*_, **__):
        raise error("401")

    error = library(monkeypatch, missing)
    text = message("timm/vit_base_patch16_224.may")
    assert "no https://huggingface.co/timm/vit_base_patch16_224.may" in text
    assert "nearest published models:" in text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["training_args.bin", "config.json"], "no file of weights"),
        (["a.pth", "b.pth"], "several weights files: a.pth, b.pth"),
        (["a.npz", "b.npz"], "several weights files: a.npz, b.npz"),
        (["deep/model.safetensors"], "no file of weights"),
    ],
)
def test_a_repository_without_exactly_one_weights_file(monkeypatch, tmp_path, names, words):
    library(monkeypatch, lambda *_, **__: str(tmp_path), names)
    text = message("owner/name")
    assert words in text and "https://huggingface.co/owner/name/resolve/main/FILE" in text


def test_a_repository_with_a_weights_file_of_another_name(monkeypatch, tmp_path, capsys):
    requests = []

    def snapshot(identifier, revision, allow_patterns):
        requests.append((identifier, revision, allow_patterns))
        if "B_16.npz" in allow_patterns:
            content(tmp_path, "B_16.npz")
        return str(tmp_path)

    library(monkeypatch, snapshot, ["B_16.npz", "README.md", "B_16.pth"])
    assert hub.fetch("owner/name@v2") == tmp_path
    assert requests == [("owner/name", "v2", [*DESCRIBED, "B_16.npz"])]
    line = "downloading owner/name from https://huggingface.co, 1.5 MB, to ~/.cache/huggingface/hub\n"
    assert capsys.readouterr().err == line
    for url in ("https://huggingface.co/owner/name/tree/v2", "https://hf.co/owner/name"):
        assert hub.fetch(url) == tmp_path
    assert [revision for _, revision, _ in requests] == ["v2", "v2", None]


def test_all_shards_are_downloaded(monkeypatch, tmp_path):
    requests, shards = [], [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]

    def snapshot(identifier, revision, allow_patterns):
        requests.append(allow_patterns)
        content(tmp_path, "model.safetensors")
        return str(tmp_path)

    library(monkeypatch, snapshot, [files.INDEX, *shards, "pytorch_model.bin", "model-00001-of-00002.bin"])
    hub.fetch("owner/name")
    assert requests == [[*DESCRIBED, files.INDEX, *shards]]


BIN, FLAX = "pytorch_model.bin", "flax_model.msgpack"
PARTS = [f"pytorch_model-{number:05}-of-00002.bin" for number in (1, 2)]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([BIN, FLAX, "tf_model.h5", "training_args.bin"], [BIN]),
        (["open_clip_pytorch_model.bin", "model.pt"], ["open_clip_pytorch_model.bin"]),
        (["dino_vits16.pth", FLAX], ["dino_vits16.pth"]),
        ([FLAX, "tf_model.h5"], [FLAX]),
        ([*PARTS, f"{BIN}.index.json", FLAX], [f"{BIN}.index.json", *PARTS]),
        ([BIN, FLAX, "model.safetensors", "model-00001-of-00002.safetensors"], ["model.safetensors"]),
    ],
)
def test_the_preferred_format_is_downloaded(monkeypatch, tmp_path, names, wanted):
    requests = []

    def snapshot(identifier, revision, allow_patterns):
        requests.append(allow_patterns)
        content(tmp_path)
        return str(tmp_path)

    library(monkeypatch, snapshot, [*names, "README.md"])
    hub.fetch("owner/name")
    assert requests == [[*DESCRIBED, *wanted]]


def test_a_repository_with_another_format_only(monkeypatch, tmp_path):
    library(monkeypatch, lambda *_, **__: str(tmp_path), ["tf_model.h5"])
    assert message("owner/name").startswith("https://huggingface.co/owner/name/resolve/main/tf_model.h5 is HDF5")


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes) with ETags and ranges, and the hub's API in `answers`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.answers, self.requests = {}, {}, []
        self.cut, self.etags, self.moved = None, True, {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        server, path = self.server, self.path.partition("?")[0]
        server.requests.append((self.command, path, self.headers["Range"], self.headers["If-Range"]))
        if path in server.answers:
            return self.answer(
                200, json.dumps(server.answers[path]).encode(), {"Content-Type": "application/json"}, body
            )
        if path in server.moved:
            return self.answer(302, b"", {"Location": server.moved[path]}, body)
        if path not in server.files:
            return self.answer(404, b"nothing here", {"X-Error-Code": "EntryNotFound"}, body)
        data = server.files[path]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": "c" * 40} if server.etags else {}
        start = int((self.headers["Range"] or "bytes=0-")[6:].partition("-")[0])
        if not self.headers["Range"] or self.headers["If-Range"] not in (None, etag):
            return self.answer(200, data, headers, body)
        if start >= len(data):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"}, body)
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(206, data[start:], headers, body)

    def answer(self, status, data, headers, body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            cut = self.server.cut if status in (200, 206) and len(data) > 2000 else None
            self.wfile.write(data[:cut])
            self.close_connection = cut is not None


@pytest.fixture
def server():
    serving = Server()
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield serving
    serving.shutdown()
    thread.join()
    serving.server_close()


def publish(server, identifier, contents):
    """Adds a model to the server, with the API of the hub."""
    commit = "c" * 40
    tree = [
        {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
            "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100},
        }
        for name, data in contents.items()
    ]
    siblings = [{"rfilename": name, "size": len(data)} for name, data in contents.items()]
    about = {"id": identifier, "modelId": identifier, "sha": commit, "siblings": siblings, "private": False, "tags": []}
    about |= {"downloads": 0, "likes": 0}
    for revision in ("main", commit):
        server.answers[f"/api/models/{identifier}/revision/{revision}"] = about
        server.answers[f"/api/models/{identifier}/tree/{revision}"] = tree
        for name, data in contents.items():
            server.files[f"/{identifier}/resolve/{revision}/{name}"] = data
    server.answers[f"/api/models/{identifier}"] = about


_FETCH = """
import sys
from vit_jax.errors import UserError
from vit_jax.weights import files, hub
assert "huggingface_hub" not in sys.modules
for name in sys.argv[1:]:
    try:
        folder = hub.fetch(name)
        stored = files.open_file(folder)
        sums = {key: float(array.sum()) for key, array in stored.arrays.items()}
        print(sorted(path.name for path in folder.iterdir()), sums, stored.config)
    except UserError as error:
        print(str(error).replace("\\n", " / "))
"""


def fetched(names, tmp_path, endpoint, **variables):
    """The output for each name in a separate process, since huggingface_hub reads its environment when imported."""
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"} | variables
    cache = os.environ["XDG_CACHE_HOME"]  # of the test
    return run_command(_FETCH, *names, stderr=subprocess.PIPE, XDG_CACHE_HOME=cache, **variables).splitlines()


@pytest.mark.slow
def test_huggingface_hub_itself(server, tmp_path):
    """Only config.json and the weights are downloaded; then neither the server nor a network is needed."""
    pytest.importorskip("huggingface_hub")
    data = content(tmp_path, values=20_000)
    everything = {"config.json": b'{"n": 1}', "model.safetensors": data, "pytorch_model.bin": data, "README.md": b"#"}
    publish(server, "timm/vit_small_patch16_224.dino", everything)
    helpers_torch.save({"a": np.ones(3)}, tmp_path / "a.pth")
    publish(server, "owner/old", {"pytorch_model.bin": (tmp_path / "a.pth").read_bytes(), "config.json": b"{}"})

    online, other = fetched(["dino-s16", "owner/old"], tmp_path, server.url)
    assert online == f"['config.json', 'model.safetensors'] {{'a': {sum(range(20_000)):.1f}}} {{'n': 1}}"
    assert other == "['config.json', 'pytorch_model.bin'] {'a': 3.0} {}"
    assert not any(re.search(r"dino/.*\.bin$|\.md$", path) for _, path, _, _ in server.requests)

    num_requests = len(server.requests)
    with socket.socket() as silent:  # accepts connections, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for endpoint, reason in (
            (server.url, "HF_HUB_OFFLINE is set"),
            ("http://127.0.0.1:9", "Connection refused"),  # nothing listens there
            (f"http://127.0.0.1:{silent.getsockname()[1]}", "timed out"),
        ):
            variables = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_OFFLINE": "01"["OFFLINE" in reason]}
            cached, also, missing = fetched(["dino-s16", "owner/old", "mae-b16"], tmp_path, endpoint, **variables)
            assert (cached, also) == (online, other)
            repository = "timm/vit_base_patch16_224.mae"
            assert missing.startswith(f"mae-b16: https://huggingface.co/{repository} cannot be downloaded: ")
            assert reason in missing
            assert f"hf download {repository} config.json model.safetensors --local-dir mae-b16 / " in missing
            assert missing.count(" / ") == 2
    assert len(server.requests) == num_requests


# --- URLs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "B_16-i21k.npz"])
def test_a_url_is_downloaded_once(server, tmp_path, cache, name):
    server.files[f"/x/{name}"] = content(tmp_path, name)
    path = hub.fetch(f"{server.url}/x/{name}?download=true")
    assert path.name == name and path.is_relative_to(cache / "url")
    assert path.read_bytes() == server.files[f"/x/{name}"]
    assert [entry.name for entry in path.parent.iterdir()] == [name]
    num_requests = len(server.requests)
    assert hub.fetch(f"{server.url}/x/{name}?download=true") == path
    assert len(server.requests) == num_requests


def test_a_url_of_a_pickle_that_is_not_read_is_kept_for_the_printed_command(server, cache):
    server.files["/x/a.pth"] = b"cos\nsystem\n(S'touch ran'\ntR."
    text = message(f"{server.url}/x/a.pth")
    (path,) = cache.rglob("a.pth")
    assert "it holds more than arrays (os.system)" in text and f" {path} " in text
    assert not Path("ran").exists()


@pytest.mark.parametrize(("text", "config"), [(b'{"n": 1}', {"n": 1}), (b"<html>", None), (b"[1]", None)])
def test_the_config_next_to_a_url(server, tmp_path, text, config):
    server.files |= {"/x/model.safetensors": content(tmp_path), "/x/config.json": text}
    assert files.open_file(hub.fetch(f"{server.url}/x/model.safetensors")).config == config


def test_an_interrupted_download_is_resumed(server, tmp_path):
    data = server.files["/x/a.npz"] = content(tmp_path, "a.npz")
    server.cut = 3000
    text = message(f"{server.url}/x/a.npz")
    assert "the download failed" in text and "run the same command again to resume it" in text
    server.cut = None
    assert hub.fetch(f"{server.url}/x/a.npz").read_bytes() == data
    _, _, byte_range, condition = server.requests[-1]
    assert byte_range == "bytes=3000-" and condition == f'"{hashlib.sha256(data).hexdigest()}"'


@pytest.mark.parametrize("etags", [True, False])
def test_another_file_is_not_appended_to_the_first(server, tmp_path, etags):
    server.etags = etags  # without one, the server cannot tell that the file changed
    server.files["/x/a.npz"] = content(tmp_path, "a.npz")
    server.cut = 3000
    message(f"{server.url}/x/a.npz")
    server.cut = None
    data = server.files["/x/a.npz"] = content(tmp_path, "a.npz", values=1500)
    assert hub.fetch(f"{server.url}/x/a.npz").read_bytes() == data


def test_a_partial_file_that_is_complete(server, tmp_path, cache):
    data = server.files["/x/a.npz"] = content(tmp_path, "a.npz")
    path = hub.fetch(f"{server.url}/x/a.npz")
    path.rename(path.with_name("a.npz.part"))
    path.with_name("a.npz.part.etag").write_text(f'"{hashlib.sha256(data).hexdigest()}"')
    assert hub.fetch(f"{server.url}/x/a.npz").read_bytes() == data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<!DOCTYPE html><html>", "cannot be loaded: a web page"),
        (b"\x80\x04\x95pickle", "its pickle is corrupt"),
        (b"", "the file is empty"),
    ],
)
def test_a_url_of_something_else(server, cache, data, words):
    server.files["/x/a.npz"] = data
    text = message(f"{server.url}/x/a.npz")
    assert words in text and server.url in text
    assert not list(cache.rglob("*.npz"))


def test_servers_that_fail(server, tmp_path):
    text = message(f"{server.url}/x/vit_base_patch16_224.mae.npz")
    assert "the server returned 404" in text and "published models: mae-b16" in text.splitlines()[1]
    assert "the download failed" in message("http://127.0.0.1:9/a.npz")
    server.moved["/x/a.npz"] = f"{server.url}/y/a.npz"
    server.files["/y/a.npz"] = content(tmp_path, "a.npz")
    assert hub.fetch(f"{server.url}/x/a.npz").read_bytes() == server.files["/y/a.npz"]


def test_a_full_disk(server, tmp_path, monkeypatch):
    server.files["/x/a.npz"] = content(tmp_path, "a.npz")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=5))
        assert "bytes to download" in message(f"{server.url}/x/a.npz") and "has 5 free" in message(
            f"{server.url}/x/a.npz"
        )
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "set XDG_CACHE_HOME to another directory" in message(f"{server.url}/x/a.npz")


def test_two_downloads_at_the_same_time(server, tmp_path):
    data = server.files["/x/a.npz"] = content(tmp_path, "a.npz", values=100_000)
    found = []
    threads = [threading.Thread(target=lambda: found.append(hub.fetch(f"{server.url}/x/a.npz"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and {path.read_bytes() for path in found} == {data}
    assert sum(path == "/x/a.npz" for _, path, _, _ in server.requests) == 1
