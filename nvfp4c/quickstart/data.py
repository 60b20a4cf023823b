"""Real text as byte tokens: the Python standard library's source by default, or any folder of text files.

There is no tokenizer: a token is one byte, so the vocabulary has 256 entries and every text can be read.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvfp4c import text_files
from nvfp4c.errors import DataError

VOCABULARY = 256
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """Text split in two; `train` and `validation` are uint8 tensors of shape [bytes].

    source: where the text came from. files: how many files it has. split: how validation text was chosen.
    """

    train: Tensor
    validation: Tensor
    source: str
    files: int
    split: str


def load(folder: Path | None = None, *, minimum: int = 4096) -> Corpus:
    """Read all text files below `folder`, or the source of the Python standard library when it is None.

    About a tenth of the files, chosen by a hash of each relative path, is held out for validation: a file stays on
    its side whatever else the folder holds. Where that leaves fewer than `minimum` bytes on a side (few files, or
    one large one), the last tenth of each file is held out instead.

    Raises DataError when the folder cannot be read, has no text, or has too little of it.
    """
    if folder is None:
        root, source = Path(sysconfig.get_paths()["stdlib"]), "source code of the Python standard library"
        texts = list(text_files.read(root, suffix=".py"))
        hint = "Pass --data DIR with a folder of text."
    else:
        root, source = _checked(folder), str(folder)
        texts = list(text_files.read(root))
        hint = "Pass a folder that holds text files."
    if not texts:
        raise DataError(f"{root} holds no text: {text_files.NOTHING_READ}. {hint}")
    corpus = _split_by_file(texts, source, minimum) or _split_each_file(texts, source)
    if min(len(corpus.train), len(corpus.validation)) < minimum:
        total = sum(len(text) for _, text in texts)
        raise DataError(
            f"{root} holds too little text: {total} bytes, of which a tenth is held out for validation, and each part "
            f"needs at least {minimum} bytes (one batch). {hint}"
        )
    return corpus


def is_held_out(relative_path: str) -> bool:
    """Whether a file belongs to the validation split; depends on its path alone."""
    digest = hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def _checked(folder: Path) -> Path:
    if not folder.exists():
        raise DataError(f"The data folder {folder} does not exist. Pass a folder that holds text files.")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file, but data is read from a folder. Pass {folder.parent} instead.")
    return folder


def _split_by_file(texts: list[tuple[str, bytes]], source: str, minimum: int) -> Corpus | None:
    train = b"".join(text for path, text in texts if not is_held_out(path))
    validation = b"".join(text for path, text in texts if is_held_out(path))
    if min(len(train), len(validation)) < minimum:
        return None
    held_out = sum(is_held_out(path) for path, _ in texts)
    split = f"{held_out} of {len(texts)} files, chosen by a hash of their path"
    return Corpus(_tokens(train), _tokens(validation), source, len(texts), split)


def _split_each_file(texts: list[tuple[str, bytes]], source: str) -> Corpus:
    cuts = [len(text) - int(len(text) * VALIDATION_SHARE) for _, text in texts]
    train = b"".join(text[:cut] for (_, text), cut in zip(texts, cuts, strict=True))
    validation = b"".join(text[cut:] for (_, text), cut in zip(texts, cuts, strict=True))
    return Corpus(_tokens(train), _tokens(validation), source, len(texts), "the last tenth of each file")


def _tokens(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
