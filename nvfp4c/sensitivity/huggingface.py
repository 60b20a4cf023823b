"""A language model that lies in a folder as `transformers` writes it, with batches of text and the loss it is for.

The class that config.json names decides the loss:

- a causal language model: the next token, from those before it.
- a masked language model: masked tokens, from all others.
- an encoder without a head, which makes embeddings: which passage of the text follows which. Such a model has no loss
  of its own on plain text, for it was trained on labelled pairs or has lost its head. Neighbouring passages need no
  labels, and embedding models are trained on just them (arXiv 2201.10005).

The folder is data: nothing in it is executed, and nothing is fetched from a network.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from nvfp4c.errors import OptionError, TaskError
from nvfp4c.sensitivity.objectives import Marks, Objective, Samples, masked_token, neighbours, next_token
from nvfp4c.sensitivity.windows import windows
from nvfp4c.tasks import Task

BATCH_SIZE, LENGTH = 8, 128
"""Samples a batch, and tokens of each, where nothing else is asked for."""

LEAST_TEXT = 8
"""Tokens of text in a sequence, at least: fewer say nothing about a model."""

TOKENIZERS = ("tokenizer.*", "vocab.*", "*.model", "tekken.json")
"""Files, one of which every tokenizer has."""

ONLY_DATA = {"local_files_only": True, "trust_remote_code": False}
"""For everything that is loaded: no network, and no code that lies beside the model."""

CAUSAL, MASKED, ENCODER = "causal", "masked", "encoder"

T = TypeVar("T")


def load(
    path: Path,
    texts: Sequence[Path],
    *,
    batches: int = 8,
    held_out: int = 8,
    batch_size: int = BATCH_SIZE,
    sequence_length: int = LENGTH,
    seed: int = 0,
    device: str = "cpu",
) -> Task:
    """The model in the folder `path`, in FP32 and without dropout, with `batches` and `held_out` batches of text.

    texts: plain text files, or folders of them. batch_size: samples a batch, which for an encoder are pairs of
    passages. sequence_length: tokens of a sequence or passage, with those that mark its start and end. seed: which
    places of the text are taken, and which tokens are masked. device: where the model and its batches lie. No two
    samples overlap, and all batches have one shape: two int64 tensors [batch_size, sequence_length].

    Raises TaskError where the folder holds no language model that can be loaded, DataError where there is too little
    text, OptionError for a number that cannot be.
    """
    transformers = _transformers()
    _check_folder(path)
    with _quiet(transformers):
        config, kind, name, tokenizer = _opened(transformers, path)
        _check_numbers(config, tokenizer, kind, batches, held_out, batch_size, sequence_length)
        objective = _objective(kind, tokenizer, path, sequence_length, seed)
        rows = windows(
            texts,
            lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            count=(batches + held_out) * batch_size,
            length=objective.window,
            seed=seed,
        )
        samples = objective.samples(rows)
        _check_vocabulary(path, config, samples)
        model = _attempt(path, "model", lambda: _model(getattr(transformers, name), config, path).to(device))
    both = list(zip(*(part.to(device).split(batch_size) for part in samples), strict=True))
    return Task(str(path), model, both[:batches], objective.loss, held_out=both[batches:])


def model_and_tokenizer(path: Path) -> tuple[nn.Module, Any]:
    """The model in the folder `path` as `load` gives it, and its tokenizer: for a task with a loss of its own.

    Raises TaskError where the folder holds no language model that can be loaded.
    """
    transformers = _transformers()
    _check_folder(path)
    with _quiet(transformers):
        config, _, name, tokenizer = _opened(transformers, path)
        return _attempt(path, "model", lambda: _model(getattr(transformers, name), config, path)), tokenizer


def _opened(transformers: ModuleType, path: Path) -> tuple[Any, str, str, Any]:
    """The configuration, what the model is for, the name of its class, and the tokenizer."""
    config = _attempt(path, "configuration", lambda: transformers.AutoConfig.from_pretrained(path, **ONLY_DATA))
    kind, name = _kind(transformers, config, path)
    tokenizer = _attempt(path, "tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(path, **ONLY_DATA))
    return config, kind, name, tokenizer


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise TaskError(
            'loading a language model needs transformers, which is not installed; pip install "nvfp4c[hf]"'
        ) from error
    return transformers


def _check_folder(path: Path) -> None:
    """TaskError where `path` is no folder with a configuration, a tokenizer and weights, or these are a pickle."""
    if not path.is_dir():
        raise TaskError(
            f"there is no folder {path}; give one that holds config.json, a tokenizer and model.safetensors, as "
            "save_pretrained writes it"
        )
    if (path / "adapter_config.json").exists():
        raise TaskError(f"{path} holds an adapter, not a model; merge it into its model, and save that")
    if not (path / "config.json").exists():
        raise TaskError(f"{path} holds no config.json; give a folder that save_pretrained wrote")
    if not any(file for pattern in TOKENIZERS for file in path.glob(pattern)):
        raise TaskError(f"{path} holds no tokenizer; tokenizer.json is missing")
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(file.name for ending in ("bin", "pt", "pth", "ckpt") for file in path.glob(f"*.{ending}"))
    if pickles:
        raise TaskError(
            f"{path} holds its weights as {pickles[0]} alone, a pickle, which could execute code when it is loaded; "
            "save the model again with save_pretrained of transformers 5, which writes model.safetensors"
        )
    raise TaskError(f"{path} holds no weights; model.safetensors is missing")


def _kind(transformers: ModuleType, config: Any, path: Path) -> tuple[str, str]:
    """What the model is for, and the name of its class in `transformers`."""
    auto = transformers.models.auto.modeling_auto
    tables = {
        CAUSAL: auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MASKED: auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        ENCODER: auto.MODEL_MAPPING_NAMES,
    }
    names = list(config.architectures or ())
    if not names:
        raise TaskError(f'{path}/config.json names no class; add one, such as "architectures": ["BertForMaskedLM"]')
    if getattr(config, "quantization_config", None) is not None:
        raise TaskError(f"{path} holds weights that are quantised already; give the model they were made from")
    for kind, table in tables.items():
        if names[0] in table.values() and not config.is_encoder_decoder:
            return kind, names[0]
    raise TaskError(
        f"{path} holds a {names[0]}, which is no causal or masked language model, and no encoder without a head; write "
        "a task for it: a function that returns (model, batches, loss)"
    )


def _check_numbers(
    config: Any, tokenizer: Any, kind: str, batches: int, held_out: int, batch_size: int, sequence_length: int
) -> None:
    """OptionError for the first that cannot be."""
    least_size = 2 if kind == ENCODER else 1
    why = ": an encoder tells a passage from the others of its batch" if kind == ENCODER else ""
    if batches < 1 or held_out < 0:
        raise OptionError(f"{batches} batches and {held_out} held out are too few; ask for at least 1 and 0")
    if batch_size < least_size:
        raise OptionError(f"a batch of {batch_size} is too small; ask for at least {least_size}{why}")
    least = LEAST_TEXT + len(_marks(tokenizer))
    most = min(
        getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length,
        tokenizer.model_max_length,
    )
    if not least <= sequence_length <= most:
        raise OptionError(
            f"sequences of {sequence_length} tokens cannot be; this model takes {least} to {most}, with "
            f"{len(_marks(tokenizer))} that mark start and end"
        )


def _marks(tokenizer: Any) -> Marks:
    """What the tokenizer puts around a text, found by looking at one."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    for at in range(len(marked) - len(text) + 1):
        if marked[at : at + len(text)] == text:
            return Marks(tuple(marked[:at]), tuple(marked[at + len(text) :]))
    return Marks()


def _objective(kind: str, tokenizer: Any, path: Path, length: int, seed: int) -> Objective:
    marks = _marks(tokenizer)
    if kind == CAUSAL:
        return next_token(marks, length)
    if kind == ENCODER:
        return neighbours(marks, length)
    if tokenizer.mask_token_id is None:
        raise TaskError(f"the tokenizer in {path} has no mask token, which a masked language model needs")
    return masked_token(marks, length, tokenizer.mask_token_id, seed)


def _check_vocabulary(path: Path, config: Any, samples: Samples) -> None:
    """TaskError where the tokenizer makes tokens that the model does not know."""
    highest, size = max(int(part.max()) for part in samples), config.get_text_config().vocab_size
    if highest >= size:
        raise TaskError(
            f"the tokenizer in {path} makes tokens up to {highest}, but the model knows {size}; it is another model's"
        )


def _model(cls: Any, config: Any, path: Path) -> nn.Module:
    """The model in FP32, all its weights from the folder; in eval mode, with gradients on."""
    options: dict[str, Any] = {"attn_implementation": "sdpa" if cls._supports_sdpa else "eager"}
    if "add_pooling_layer" in inspect.signature(cls).parameters:
        options["add_pooling_layer"] = False  # nothing reads what it computes
    model, found = cls.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options, **ONLY_DATA
    )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise TaskError(f"{path} lacks {len(missing)} weights of a {cls.__name__}, the first is {missing[0]}")
    model.config.use_cache = False  # of keys and values, for text that is to be continued
    found_model: nn.Module = model.eval().requires_grad_(True)
    return found_model


def _attempt(path: Path, what: str, action: Callable[[], T]) -> T:
    """What `action` returns; TaskError with what it raises, which can be anything: the folder is not ours."""
    try:
        return action()
    except TaskError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise TaskError(f"the {what} in {path} cannot be loaded: {type(error).__name__}: {reason}") from error


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without the progress bars and warnings of `transformers`: what matters of them is an error here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
