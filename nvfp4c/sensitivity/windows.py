"""Text as windows of tokens: of equal length, from all over the text, no two from the same place."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nvfp4c import text_files
from nvfp4c.errors import DataError

CHARACTERS_PER_TOKEN = 8
"""Room that a token is given: twice what tokenizers need for English, enough for the white space of source code."""


def windows(
    texts: Sequence[Path], encode: Callable[[str], Sequence[int]], *, count: int, length: int, seed: int
) -> Tensor:
    """`count` windows of `length` tokens each, int64 [count, length], the same ones for the same text and seed.

    texts: files, or folders of them. The text is cut into excerpts of CHARACTERS_PER_TOKEN * length characters, which
    are taken in an order that `seed` gives; a window is the start of an excerpt. Excerpts that are equal count once, so
    that no two windows overlap even where a file is given twice.

    Raises DataError where there is no text, or too little of it.
    """
    if not texts:
        raise DataError("no text was given; pass files or folders of plain text")
    width = CHARACTERS_PER_TOKEN * length
    found = [text for path in texts for text in _texts(path)]
    excerpts = list(dict.fromkeys(text[at : at + width] for text in found for at in range(0, len(text), width)))
    random.Random(seed).shuffle(excerpts)
    rows: list[Sequence[int]] = []
    for excerpt in excerpts:
        tokens = encode(excerpt)
        if len(tokens) >= length:
            rows.append(tokens[:length])
            if len(rows) == count:
                return torch.tensor(rows, dtype=torch.int64)
    raise DataError(
        f"too little text: {', '.join(map(str, texts))} holds {sum(map(len, found)):,} characters, enough for "
        f"{len(rows)} of the {count} windows of {length} tokens asked for. About {count * width:,} characters "
        "are needed, in files no shorter than a window. Give more text, or ask for fewer, smaller or shorter batches."
    )


def _texts(path: Path) -> list[str]:
    """The text files at or below `path`, bytes that are no UTF-8 replaced; DataError where there are none."""
    if not path.exists():
        raise DataError(f"there is no file or folder {path} to read text from")
    found = [content.decode("utf-8", errors="replace") for _, content in text_files.read(path)]
    if not found:
        raise DataError(f"{path} holds no text: {text_files.NOTHING_READ}")
    return found
