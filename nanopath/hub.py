"""
Downloads that can be resumed and checked, and files of the Hugging Face Hub. A file that is already on this machine is
not downloaded again. prepare.py uses this file for datasets, model.py for models.

HF_HOME, HF_HUB_CACHE   where Hugging Face's own cache is
HF_ENDPOINT, HF_TOKEN   address of a mirror, token of an account (sent to that endpoint only)
HF_HUB_OFFLINE          1: never use the network
"""
import os
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from nanopath.files import file_hash, need_space, read_json

DOWNLOADS = Path("data") / "downloads"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_file(repo, file, kind="models", revision="main", tries=3):
    """Path of one file of a repository "OWNER/NAME" on the Hub; kind is models or datasets.

    All files of a repository come from one commit: the first download notes the commit of `revision`, later ones
    use it. Delete the repository's folder in data/downloads to fetch a newer commit.
    FileNotFoundError: the repository has no such file (so that a caller can try optional files), or HF_HUB_OFFLINE is
    set and the file is not on this machine. ConnectionError: the network failed. ValueError: a name with other
    characters than a file name, such as ../ (names come from downloaded indexes and must not leave the folder)."""
    for name in (*repo.split("/"), *file.split("/"), *revision.split("/")):
        if not re.fullmatch(r"[\w.@=+-]+", name) or name in (".", ".."):
            raise ValueError(f"{repo}: {file!r} ({revision}) is not the name of a file on the Hub")
    folder = f"{kind}--{repo.replace('/', '--')}"
    home = os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", Path(home) / "hub")) / folder
    notes = [note for note in (cache / "refs" / revision, DOWNLOADS / folder / "refs" / revision) if note.is_file()]
    commits = [note.read_text(encoding="utf-8").strip() for note in notes] or [revision]
    for place in (*(cache / "snapshots" / commit / file for commit in commits),
                  *(DOWNLOADS / folder / commit / file for commit in commits)):
        if place.is_file():
            return place
    known = (cache / ".no_exist" / commits[0] / file).is_file()    # Hugging Face's note: the file does not exist
    if known or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        why = "it has no such file" if known else "it is not on this machine, and HF_HUB_OFFLINE is set"
        target = DOWNLOADS / folder / commits[0] / file
        raise FileNotFoundError(f"{file} of {repo} ({revision}): {why}. Put the file at {target}")
    address = f"{endpoint()}/{'' if kind == 'models' else kind + '/'}{repo}/resolve"
    commit = next(filter(is_commit, commits), None) or pin(address, file, revision, DOWNLOADS / folder)
    target = DOWNLOADS / folder / commit / file
    download(f"{address}/{commit}/{file}", target, token=os.environ.get("HF_TOKEN"), tries=tries)
    return target


def is_commit(name):
    return bool(re.fullmatch("[0-9a-f]{40}", name))


def pin(address, file, revision, folder):
    """The commit that `revision` points to now, saved in folder/refs/<revision>, so that all later files and all
    processes use the same commit. `revision` itself where the server names no commit (a plain mirror)."""
    import requests
    note = folder / "refs" / revision
    loose = any(path.is_file() and path.suffix not in (".part", ".lock") for path in (folder / revision).rglob("*"))
    if is_commit(revision) or loose:                               # files of an unknown commit are already here
        return revision
    token, headers = os.environ.get("HF_TOKEN"), {}
    with sole_writer(note) as part:
        if part is not None:
            try:  # no redirects: their target, a file store, names no commit
                headers = requests.head(f"{address}/{revision}/{file}", timeout=(5, 60), allow_redirects=False,
                                        headers={"Authorization": f"Bearer {token}"} if token else {}).headers
            except requests.RequestException:
                pass                                               # the download that follows reports the error
            commit = headers.get("X-Repo-Commit", "")
            part.truncate(0)
            part.write(commit.encode())
            part.close()                                           # Windows neither renames nor deletes an open file
            if not is_commit(commit):
                os.unlink(part.name)
                return revision
            os.replace(part.name, note)
    return note.read_text(encoding="utf-8").strip()


@contextmanager
def sole_writer(target):
    """Open target.part for appending, for one process at a time; the others wait. Yields None to a process that waited
    while another process completed `target`. The caller closes the part, then renames or deletes it; a part that is
    neither renamed nor deleted is resumed later. The operating system ends the lock with its process."""
    before = stamp(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if stamp(target) != before:                                # another process completed it
            yield None
            return
        with open(target.with_name(target.name + ".part"), "ab") as part:
            yield part


def stamp(path):
    """Identity of a file, None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def download(url, target, sha256=None, token=None, tries=3):
    """Download `url` to `target`: resume the part of an earlier attempt, check length and hash, then rename it.

    Several processes may call it at once with one target: the first downloads, the others wait and use its file.
    FileNotFoundError, PermissionError: the server refuses the file. ConnectionError: all tries failed."""
    with sole_writer(target) as part:
        if part is None:
            return
        try:
            fetch(url, target, part, sha256, token, tries)
        finally:
            part.close()
            path = Path(part.name)
            if path.exists() and not path.stat().st_size:
                path.unlink()


def fetch(url, target, part, sha256, token, tries):
    """The attempts of `download`. part: the open file, which holds what an earlier attempt downloaded."""
    import requests  # not at the top: most runs need no network, and it costs 0.1 s
    from tqdm import tqdm
    print(f"download {url}")
    for attempt in range(tries):
        time.sleep(attempt)
        have = part.seek(0, os.SEEK_END)
        headers = {"Accept-Encoding": "identity"}      # a range of a compressed stream cannot be decoded
        if have:
            headers["Range"] = f"bytes={have}-"
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(5, 60)) as reply:
                if reply.status_code in (401, 403, 404):
                    error = FileNotFoundError if reply.status_code == 404 else PermissionError
                    raise error(f"{url}: the server answers {reply.status_code} {reply.reason}; check the name, "
                                f"or set HF_TOKEN if it needs an account")
                if reply.status_code == 416:           # the part is as long as the file, or longer: start again
                    part.truncate(0)
                reply.raise_for_status()
                if have and reply.status_code != 206:  # the server sends the whole file
                    part.truncate(0)
                    have = 0
                length = have + int(reply.headers.get("Content-Length", 0))
                need_space(target.parent, length - have, "download")
                with tqdm(total=length, initial=have, unit="B", unit_scale=True, disable=None) as bar:
                    for block in reply.iter_content(1 << 16):   # an incomplete block is dropped
                        bar.update(part.write(block))
                for answer in [*reply.history, reply]:   # the Hub sends the hash of its large files in a header
                    linked = answer.headers.get("X-Linked-ETag", "").strip('"')
                    sha256 = sha256 or (linked if re.fullmatch("[0-9a-f]{64}", linked) else None)
            part.flush()
            size = part.seek(0, os.SEEK_END)
            if length and size < length:
                problem = f"the connection broke after {size:,} of {length:,} bytes"
            elif sha256 and file_hash(part.name) != sha256:
                problem = "the download has another sha256 than expected"
                part.truncate(0)
            else:
                part.close()
                os.replace(part.name, target)
                return
        except requests.RequestException as error:
            problem = type(error).__name__
            part.flush()
    raise ConnectionError(f"cannot download {url} ({problem}, {tries} tries). Put the file at {target}")


def hub_folder(repo):
    """The folder of a model or an adapter "OWNER/NAME" with every file needed to run it; missing files are downloaded.

    FileNotFoundError and ConnectionError name the missing file and the reason."""
    adapter = False
    try:
        found = [hub_file(repo, "config.json")]
    except FileNotFoundError as error:
        try:
            found, adapter = [hub_file(repo, ADAPTER_FILES[0])], True
        except FileNotFoundError:
            raise error from None
    folder = found[0].parent
    try:
        complete = (folder / ADAPTER_FILES[1]).is_file() if adapter else weight_files(folder)
        if (folder / "tokenizer.json").is_file() and complete:
            return folder                                  # all files are here: no network needed
    except ValueError:
        pass                                               # weights are missing: fetched below
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "tokenizer.model", "spiece.model", "vocab.bpe", "encoder.json", "merges.txt", "vocab.json",
                 "vocab.txt", "special_tokens_map.json"):
        try:
            found.append(hub_file(repo, file))
        except FileNotFoundError:
            pass                                           # not every model has all of these
    weights = ADAPTER_FILES[1] if adapter else "model.safetensors"
    try:
        found.append(hub_file(repo, weights))
    except FileNotFoundError:
        try:
            found.append(index := hub_file(repo, f"{weights}.index.json"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{repo} has no safetensors weights that can be downloaded; older models have "
                                    "pickles only, which are never opened here") from None
        found += [hub_file(repo, shard) for shard in files_in_index(index)]
    folder = found[-1].parent
    for path in found:                                     # some files are in Hugging Face's cache, some in DOWNLOADS
        if path.parent != folder:
            folder = DOWNLOADS / f"models--{repo.replace('/', '--')}" / found[0].parent.name
    for path in found:
        if path.parent != folder and not (folder / path.name).is_file():
            with sole_writer(folder / path.name) as part:
                if part is not None:
                    part.close()
                    shutil.copyfile(path, part.name)
                    os.replace(part.name, folder / path.name)
    return folder


def files_in_index(index):
    """File names in a model.safetensors.index.json."""
    names = read_json(index).get("weight_map")
    names = set(names.values()) if isinstance(names, dict) else None
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise ValueError(f"{index} must map tensors to shards with names like NAME.safetensors")
    return sorted(names)


def is_adapter(folder):
    """Is it a folder of PEFT, which names its base model, and not a model by itself?"""
    return (folder / ADAPTER_FILES[0]).is_file() and not any(folder.glob("model*.safetensors"))


def find_folder(path, only=None):
    """The folder of a model or an adapter: a path, or a name on the Hub like Qwen/Qwen3-0.6B; or a GGUF file, which
    holds what a folder does. ValueError says why there is none.

    only: download this file only."""
    folder = Path(path)
    if only and is_adapter(folder):
        raise ValueError(f"{path} is an adapter folder. Give the model that its {ADAPTER_FILES[0]} names")
    if (folder / "config.json").is_file() or is_adapter(folder) or folder.suffix == ".gguf" and folder.is_file():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) or folder.parent.exists():
        why = "is not a model folder (no config.json)" if folder.exists() else "does not exist (no config.json there)"
        raise ValueError(f"{path} {why}. Give a model folder or a GGUF file, or train one: python train.py")
    try:
        return hub_file(str(path), only).parent if only else hub_folder(str(path))
    except OSError as error:
        raise ValueError(str(error)) from None


def weight_files(folder):
    """The safetensors files of a model folder: model.safetensors, or the shards in its index. ValueError where a file
    is missing or is a pickle: loading a pickle can run any code, so it is never opened."""
    if folder.suffix == ".gguf":
        return [folder]
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
            f", only {pickles[0]}, a pickle, which is never opened here: it may run any code. Convert it where you "
            "trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)" if pickles else
            ": the folder is incomplete. Train again: python train.py, or copy the missing file into it"))
    for file in files:
        with open(file, "rb") as opened:
            head = opened.read(9)                          # the length of the header, then the header: {
        if head[8:] != b"{" and head.startswith((b"PK\x03\x04", b"\x80")):
            raise ValueError(f"{file} is a pickle despite its name and is never opened here: it may run any code")
    return files
