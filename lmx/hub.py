"""The Hugging Face hub: what a repo holds, and what of it is a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Final, NoReturn
from urllib.parse import quote

import msgspec

from . import __version__
from .errors import GatedRepo, HubUnreachable, InvalidRequest, RepoNotFound
from .inventory import Commit, Entry, Manifest

if TYPE_CHECKING:
    import httpx2

_REPO: Final = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.A)
_UNSAFE: Final = re.compile(r"[\\\0-\x1f\x7f\ud800-\udfff]|^[A-Za-z]:|(^|/)\.{0,2}(/|\Z)")
_TOP: Final = re.compile(r"[^/]*\.(safetensors|json|jinja|txt|model)|tokenizer[^/]*")
_NEVER: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".py", ".part")
_SPLIT: Final = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf\Z)")
_QUANTIZATIONS: Final = (
    "Q4_K_M Q4_K_S Q4_K_XL IQ4_XS IQ4_NL Q4_0 MXFP4 MXFP4_MOE Q4_1 Q5_K_M Q5_K_S Q5_0 Q5_1 Q6_K "
    "Q8_0 Q3_K_L Q3_K_M Q3_K_S Q2_K BF16 F16 F32"
).split()


def check_repo(repo: str) -> None:
    """
    Raises:
        InvalidRequest: it is not `org/name`.
    """
    if not _REPO.fullmatch(repo):
        raise InvalidRequest(f"not a Hugging Face repo (org/name): {repo!r:.200}", param="model")


def check_paths(paths: Iterable[str]) -> None:
    """
    Raises:
        InvalidRequest: one of them leads, or could lead on some system, out of its folder.
    """
    for path in filter(_UNSAFE.search, paths):
        raise InvalidRequest(f"the repo has an unsafe path: {path!r:.200}", param="model")


def choose(
    paths: Collection[str], files: Sequence[str] | None = None, quant: str | None = None
) -> list[str]:
    """What to fetch: the files that match `files`, else an MLX model (unless `quant` is given),
    else a GGUF model in one quantization.

    Raises:
        InvalidRequest: there is none; names what there is.
    """
    allowed = sorted(filter(_is_allowed, paths))
    if files is not None:
        chosen = [path for path in allowed if any(fnmatchcase(path, glob) for glob in files)]
        return chosen or _refuse("no file matches; there are", allowed, "files")
    weights = [path for path in allowed if fnmatchcase(path, "model*.safetensors")]
    if weights and "config.json" in allowed and quant is None:
        return weights + [p for p in allowed if not p.endswith((".safetensors", ".gguf"))]
    models: dict[tuple[str, int], dict[int, str]] = {}  # by name and number of parts: the parts
    for path in allowed:
        if path.endswith(".gguf") and not re.search("mmproj|imatrix", path, re.I):
            split = _SPLIT.search(path)
            number, count = (int(split[1]), int(split[2])) if split else (1, 1)
            models.setdefault((_SPLIT.sub("", path), count), {})[number] = path
    if not models:
        pickles = "*.bin and *.pt are never loaded; " * any(p.endswith(_NEVER) for p in paths)
        kinds = "GGUF file" if quant else "GGUF file and no config.json with model*.safetensors"
        _refuse(f"no {kinds}; {pickles}there are", sorted(paths), "model")
    for wanted in [quant] if quant else _QUANTIZATIONS:
        token = re.compile(rf"(^|[-./]){re.escape(wanted)}(?=[-./])", re.I)
        if fitting := [model for model in models if token.search(model[0])]:
            break
    else:
        fitting = list(models) if quant is None and len(models) == 1 else []
    if not fitting:
        firsts = [parts[min(parts)] for parts in models.values()]
        _refuse("choose one of these with quant or files", firsts, "quant")
    name, count = min(fitting, key=lambda model: (len(model[0]), model))  # plain before UD-...
    parts = models[name, count]
    if parts.keys() != set(range(1, count + 1)):
        _refuse(f"{name} should have {count} parts; there are", [*parts.values()], "model")
    return [parts[number] for number in sorted(parts)]


def _is_allowed(path: str) -> bool:
    if path.endswith(_NEVER) or path.startswith(".") or "/." in path:
        return False
    return path.endswith(".gguf") or _TOP.fullmatch(path) is not None


def _refuse(reason: str, paths: list[str], param: str) -> NoReturn:
    more = f" and {len(paths) - 20} more" if len(paths) > 20 else ""
    raise InvalidRequest(f"{reason}: {', '.join(paths[:20]) or 'none'}{more}", param=param)


class _Lfs(msgspec.Struct):
    sha256: str


class _File(msgspec.Struct):
    path: str = msgspec.field(name="rfilename")
    size: Annotated[int, msgspec.Meta(ge=0)] | None = None
    blob_id: str | None = msgspec.field(name="blobId", default=None)
    lfs: _Lfs | None = None


class _Repo(msgspec.Struct):
    """https://huggingface.co/docs/hub/api, with `blobs=true`."""

    sha: Commit
    siblings: list[_File]
    gated: bool | str | None = None


def resolve(
    repo: str,
    revision: str | None,
    files: Sequence[str] | None,
    quant: str | None,
    endpoint: str | None,
    timeout: float,
) -> Manifest:
    """The commit that `revision` is now, and what to fetch of it. Blocking."""
    import httpx2

    try:
        from huggingface_hub import constants, errors, get_session, hf_raise_for_status
    except ValueError as error:  # it parses HF_ENDPOINT when it is imported
        raise HubUnreachable(f"HF_ENDPOINT is no URL: {error}") from error
    check_repo(repo)
    if revision in (".", ".."):  # which a URL would lose
        raise InvalidRequest(f"no revision: {revision}", param="revision")
    hub = endpoint or constants.ENDPOINT

    # Not by HfApi, whose every first request of a day fetches a list of AI agents as well.
    def get(path: str) -> bytes:
        url = f"{hub}/api/models/{repo}{path}"
        response = get_session().get(url, headers=_headers(), timeout=timeout)
        hf_raise_for_status(response)
        return response.content

    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    try:
        found = msgspec.json.decode(get(f"{at}?blobs=true"), type=_Repo)
        if found.gated:  # what it holds is told to everyone
            get("/auth-check")
    except errors.GatedRepoError as error:
        terms = f"accept its terms at {hub}/{repo} and set HF_TOKEN"
        raise GatedRepo(f"{repo} is gated: {terms}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        version = f" with revision {revision}" if revision else ""
        raise RepoNotFound(f"{hub} shows no repo {repo}{version}") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise HubUnreachable(f"{hub}: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise HubUnreachable(f"{hub} does not answer like a hub: {error}") from error
    listed = {file.path: file for file in found.siblings}
    check_paths(listed)
    entries = {}
    for path in choose(listed, files, quant):
        file, expected = listed[path], None
        if file.size is None:
            raise HubUnreachable(f"{hub} tells no size of {path}")
        if file.lfs:  # whose blob is a pointer
            expected = f"sha256:{file.lfs.sha256}"
        elif file.blob_id:
            expected = f"git-sha1:{file.blob_id}"
        entries[path] = Entry(file.size, expected)
    return Manifest(repo, found.sha, entries)


def client(endpoint: str | None, timeout: float) -> tuple[httpx2.AsyncClient, str]:
    """A client with the user's token, and the hub's address. Blocking."""
    import httpx2
    from huggingface_hub import constants

    # A redirect to another host leaves Authorization behind: httpx2 sees to that.
    client = httpx2.AsyncClient(headers=_headers(), follow_redirects=True, timeout=timeout)
    return client, endpoint or constants.ENDPOINT


def _headers() -> dict[str, str]:
    from huggingface_hub import get_token

    headers = {"User-Agent": f"opta-lmx/{__version__}", "Accept-Encoding": "identity"}
    return headers | ({"Authorization": f"Bearer {token}"} if (token := get_token()) else {})
