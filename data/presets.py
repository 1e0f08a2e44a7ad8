"""
The datasets that prepare.py knows by name, and where a copy of a file may be on this machine already.

A dataset is a list of addresses; hf://datasets/OWNER/NAME[@REVISION]/FILE is a file of the Hugging Face Hub. Each
download can be replaced by a file that you have: --input=FILE, or a folder of such files in NANOPATH_DATA.
"""
import os
import re
import sysconfig
from pathlib import Path

from data.readers import Source, find_files, kind_of
from nanopath.files import file_hash
from nanopath.hub import DOWNLOADS, download, hub_file

HUB = "hf://datasets/"
WIKI = HUB + "Salesforce/wikitext/wikitext-"
DATASETS = {  # train, val: addresses (no val: prepare.py splits); other keys are defaults for the flags of that name
    "shakespeare": dict(
        train=["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"],
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "stdlib": dict(skip_bad=True),
    "tinyworld": dict(vocab_size=768, pattern="qwen2", special_tokens=True),
    "tinystories": dict(
        train=[HUB + "roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt"],
        val=[HUB + "roneneldan/TinyStories/TinyStoriesV2-GPT4-valid.txt"], separator="<|endoftext|>"),
    "wikitext-2": dict(   # each row is one line of an article, so the rows are joined again
        train=[WIKI + "2-raw-v1/train-00000-of-00001.parquet"],
        val=[WIKI + "2-raw-v1/validation-00000-of-00001.parquet"], join_rows=True),
    "wikitext-103": dict(
        train=[WIKI + f"103-raw-v1/train-{i:05d}-of-00002.parquet" for i in range(2)],
        val=[WIKI + "103-raw-v1/validation-00000-of-00001.parquet"], join_rows=True),
    "openwebtext": dict(  # 80 files of 300 MB, 9 billion GPT-2 tokens
        train=[HUB + f"Skylion007/openwebtext/plain_text/train-{i:05d}-of-00080.parquet" for i in range(80)],
        val_fraction=0.0005),
    "fineweb-edu": dict(  # the 10-billion-token sample, 2 GB a file
        train=[HUB + f"HuggingFaceFW/fineweb-edu/sample/10BT/{i:03d}_00000.parquet" for i in range(14)],
        val_fraction=0.001, files=1),
    "c4": dict(           # 1024 files of 300 MB
        train=[HUB + f"allenai/c4/en/c4-train.{i:05d}-of-01024.json.gz" for i in range(1024)],
        val=[HUB + "allenai/c4/en/c4-validation.00000-of-00008.json.gz"], files=1),
}


def find_sources(cfg):
    """The files behind prepare.py's command line, in a fixed order: on every machine the same input gives the same
    shards."""
    name = cfg.sources[0]
    if name in DATASETS and cfg.input is None:
        if name == "stdlib":
            return stdlib_sources()
        if name == "tinyworld":            # a generator: its own file stands for the text it makes
            return [Source(Path(__file__).with_name("tinyworld.py"), "world", split) for split in ("train", "val")]
        dataset = DATASETS[name]
        wanted = [(url, "train" if "val" in dataset else None) for url in dataset["train"][:cfg.files]]
        wanted += [(url, "val") for url in dataset.get("val", [])]
        found = [(locate(url, name, cfg.tries), split) for url, split in wanted]
        return [Source(path, kind_of(path), split) for path, split in found]
    names = [cfg.input] if cfg.input else cfg.sources
    try:
        return find_files(names, lambda url: locate(url, tries=cfg.tries))
    except FileNotFoundError as error:
        path = Path(str(error))
        if path.suffix or len(path.parts) > 1:
            raise SystemExit(f"{path}: no such file or folder, and no file matches it as a glob") from None
        raise SystemExit(f"unknown dataset or missing file {str(path)!r}: the datasets are {', '.join(DATASETS)}; try "
                         f"python prepare.py stdlib, or name a file or folder of your own") from None


def stdlib_sources():
    """The source files of the running Python's library (without tests and installed packages) and its help topics."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
    sources = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - skip)
        sources += [Source(Path(folder) / name, "text") for name in sorted(names) if name.endswith(".py")]
    import pydoc_data.topics
    return sources + [Source(Path(pydoc_data.topics.__file__), "topics")]


def locate(url, preset=None, tries=3):
    """A local copy of a file: from NANOPATH_DATA, our downloads, Hugging Face's cache, or else the network."""
    flat = "tinyshakespeare.txt" if preset == "shakespeare" else re.sub(r"[^\w.@-]+", "_", url.split("://")[1])
    sha256 = DATASETS[preset].get("sha256") if preset else None
    folder = os.environ.get("NANOPATH_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data")
    path = DOWNLOADS / flat
    for place in (Path(folder) / flat, path):
        if place.is_file() and (sha256 is None or file_hash(place) == sha256):
            print(f"found   {place}")
            return place
    try:
        if url.startswith(HUB):
            owner, name, file = url.removeprefix(HUB).split("/", 2)
            name, _, revision = name.partition("@")
            path = hub_file(f"{owner}/{name}", file, "datasets", revision or "main", tries)
            print(f"found   {path}")
        else:
            download(url, path, sha256, tries=tries)
    except ConnectionError as error:
        raise SystemExit(f"{error}, or prepare a dataset that needs no network: python prepare.py stdlib") from None
    except (FileNotFoundError, PermissionError) as error:
        raise SystemExit(str(error)) from None
    return path
