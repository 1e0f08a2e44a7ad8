"""
Files from the network: downloads that can be resumed and checked, and files of the Hugging Face Hub, which are looked
for on this machine first. Used by prepare.py for data sets and by model.py for models.

HF_HOME, HF_HUB_CACHE   where Hugging Face's own cache is
HF_ENDPOINT, HF_TOKEN   a mirror, an account (its token goes to that endpoint alone)
HF_HUB_OFFLINE          1: never ask the network
"""
import os
import re
import shutil
import time
from pathlib import Path

from nanopath.files import file_hash, need_space, read_json

DOWNLOADS = Path("data") / "downloads"


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_file(repo, file, kind="models", revision="main", tries=3):
    """Path of one file of a repository "OWNER/NAME" on the Hub; kind is models or datasets.

    FileNotFoundError: the repository has no such file (so that a caller can ask for an optional one), or
    HF_HUB_OFFLINE is set and it is not on this machine. ConnectionError: the network failed. ValueError: not a plain
    name (it may come from an index that somebody else wrote, and must not leave the folder)."""
    for name in (*repo.split("/"), *file.split("/"), *revision.split("/")):
        if not re.fullmatch(r"[\w.@=+-]+", name) or name in (".", ".."):
            raise ValueError(f"{repo}: {file!r} ({revision}) is not the name of a file on the Hub")
    folder = f"{kind}--{repo.replace('/', '--')}"
    home = os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", Path(home) / "hub")) / folder
    ref = cache / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    target = DOWNLOADS / folder / revision / file
    for place in (cache / "snapshots" / commit / file, target):
        if place.is_file():
            return place
    known = (cache / ".no_exist" / commit / file).is_file()        # Hugging Face's note that it has asked before
    if known or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        why = "it has no such file" if known else "not on this machine, and HF_HUB_OFFLINE is set"
        raise FileNotFoundError(f"{file} of {repo} ({revision}): {why}. Its place would be {target}")
    prefix = "" if kind == "models" else f"{kind}/"
    url = f"{endpoint()}/{prefix}{repo}/resolve/{revision}/{file}"
    download(url, target, token=os.environ.get("HF_TOKEN"), tries=tries)
    return target


def download(url, target, sha256=None, token=None, tries=3):
    """Fetch `url` into `target`: goes on with a part that an earlier try left, checks length and hash, then renames.

    FileNotFoundError, PermissionError: the server will not give it. ConnectionError: all tries failed."""
    import requests  # not at the top: most runs need no network, and it costs 0.1 s
    from tqdm import tqdm
    part = target.with_name(target.name + ".part")
    print(f"getting {url}")
    for attempt in range(tries):
        time.sleep(attempt)
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"}      # a range of a compressed stream would be of no use
        if have:
            headers["Range"] = f"bytes={have}-"
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(5, 60)) as reply:
                if reply.status_code in (401, 403, 404):
                    error = FileNotFoundError if reply.status_code == 404 else PermissionError
                    raise error(f"{url}: the server says {reply.status_code} {reply.reason}; check the name, "
                                f"or set HF_TOKEN if it needs an account")
                if reply.status_code == 416:           # the part is as long as the file, or longer: start again
                    part.unlink()
                reply.raise_for_status()
                have = have if reply.status_code == 206 else 0
                length = have + int(reply.headers.get("Content-Length", 0))
                target.parent.mkdir(parents=True, exist_ok=True)
                need_space(target.parent, length - have, "download")
                with (open(part, "ab" if have else "wb") as file,
                      tqdm(total=length, initial=have, unit="B", unit_scale=True, disable=None) as bar):
                    for block in reply.iter_content(1 << 16):   # a block that breaks off is lost
                        bar.update(file.write(block))
                for answer in [*reply.history, reply]:   # the Hub tells the hash of its large files on the way
                    linked = answer.headers.get("X-Linked-ETag", "").strip('"')
                    sha256 = sha256 or (linked if re.fullmatch("[0-9a-f]{64}", linked) else None)
            if length and part.stat().st_size < length:
                problem = f"the connection broke after {part.stat().st_size:,} of {length:,} bytes"
            elif sha256 and file_hash(part) != sha256:
                problem = "what came has another sha256 than expected"
                part.unlink()
            else:
                os.replace(part, target)
                return
        except requests.RequestException as error:
            problem = type(error).__name__
    raise ConnectionError(f"cannot get {url} ({problem}, {tries} tries). Put the file at {target}")


def hub_folder(repo):
    """The folder of a model "OWNER/NAME" with everything that is needed to run it, downloaded where it is not here yet.

    FileNotFoundError or ConnectionError say what is missing, and why."""
    found = [hub_file(repo, "config.json")]
    folder = found[0].parent
    try:
        if (folder / "tokenizer.json").is_file() and weight_files(folder):
            return folder                                  # all of it is here: the network is not even asked
    except ValueError:
        pass                                               # weights are missing: fetched below
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.bpe",
                 "encoder.json"):
        try:
            found.append(hub_file(repo, file))
        except FileNotFoundError:
            pass                                           # not every model has all of these
    try:
        found.append(hub_file(repo, "model.safetensors"))
    except FileNotFoundError:
        try:
            found.append(index := hub_file(repo, "model.safetensors.index.json"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{repo} has no safetensors weights that can be had; older models offer pickles only, "
                                    "which are never opened here") from None
        found += [hub_file(repo, shard) for shard in files_in_index(index)]
    folder = found[-1].parent
    for path in found:                                     # some from Hugging Face's cache, some of our own: put together
        if path.parent != folder:
            folder = DOWNLOADS / f"models--{repo.replace('/', '--')}" / "main"
            folder.mkdir(parents=True, exist_ok=True)
    for path in found:
        if path.parent != folder and not (folder / path.name).is_file():
            shutil.copyfile(path, folder / f"{path.name}.part")
            os.replace(folder / f"{path.name}.part", folder / path.name)
    return folder


def files_in_index(index):
    """File names in a model.safetensors.index.json."""
    names = read_json(index).get("weight_map")
    names = set(names.values()) if isinstance(names, dict) else None
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise ValueError(f"{index} names no shards, or not as plain NAME.safetensors")
    return sorted(names)


def find_folder(path, only=None):
    """The folder of a model on disk, or of one on the Hub named like Qwen/Qwen3-0.6B. ValueError says why there is none.

    only: the one file that is needed; the others are then not downloaded."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) or folder.parent.exists():
        raise ValueError(f"{path} holds no model (no config.json). Train one first: python train.py")
    try:
        return hub_file(str(path), only).parent if only else hub_folder(str(path))
    except OSError as error:
        raise ValueError(str(error)) from None


def weight_files(folder):
    """The safetensors files of a model folder: one, or the shards that its index names. ValueError where one is missing,
    or where there is a pickle instead: that could run any code, and is never opened."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single]
    if not single.is_file() and index.is_file():
        files = [folder / name for name in files_in_index(index)]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} is missing; {index.name} names {len(files)} shards. Copy it into the folder")
    elif not single.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        raise ValueError(f"{folder} has no model.safetensors" + (
            f", only {pickles[0]}, a pickle, which is never opened here: it may run any code. Convert it where you trust "
            "it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)" if pickles else
            ": the folder is incomplete. Train again: python train.py, or copy the missing file into it"))
    for file in files:
        with open(file, "rb") as opened:
            head = opened.read(9)                          # the length of the header, then the header: {
        if head[8:] != b"{" and head.startswith((b"PK\x03\x04", b"\x80")):
            raise ValueError(f"{file} is a pickle, whatever it is called, and never opened here: it may run any code")
    return files
