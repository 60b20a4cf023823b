"""Language models loaded from a folder: what they are fed, what their loss is, and what is said of a bad folder."""

from __future__ import annotations

import json
import math
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from typer.testing import CliRunner

from nvfp4c import plan as plans
from nvfp4c.cli import app
from nvfp4c.errors import DataError, OptionError, TaskError
from nvfp4c.sensitivity import huggingface, windows
from nvfp4c.sensitivity.objectives import NO_TARGET
from nvfp4c.tasks import Task

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
PAD, CLS, SEP, MASK, UNK = range(5)
VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
WORDS = [f"{number:03d}" for number in range(VOCABULARY - len(SPECIAL))]
"""With its space a word has four characters, so that no excerpt of the text begins within one."""

LENGTH, BATCH = 16, 3

MODELS: dict[str, Callable[[], Any]] = {
    "causal": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1)),
    "masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
    "encoder": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may reach for a network."""

    def refuse(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of MODELS, with a tokenizer of words, and `text`, which names a word in every place."""
    root = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(root / name)
        tokenizer(marks_after=name != "causal").save_pretrained(root / name)
    (root / "text").mkdir()
    for number in range(4):
        places = torch.randint(len(WORDS), (2000,), generator=torch.Generator().manual_seed(number))
        (root / "text" / f"{number}.txt").write_text(" ".join(WORDS[place] for place in places))
    return root


def tokenizer(marks_after: bool) -> transformers.PreTrainedTokenizerFast:
    """One token a word, [CLS] before a text and [SEP] after it."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if marks_after else "[CLS] $A", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
    )


@pytest.fixture
def copy(folders: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the folders, to be spoilt."""

    def copied(name: str) -> Path:
        (tmp_path / name).mkdir()
        for file in (folders / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        return tmp_path / name

    return copied


def load(folder: Path, text: Path, **options: Any) -> Task:
    options = {"batches": 2, "held_out": 1, "batch_size": BATCH, "sequence_length": LENGTH, **options}
    return huggingface.load(folder, [text], **options)


def refused(folder: Path, text: Path, kind: type[Exception] = TaskError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load(folder, text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def batches_of(task: Task) -> list[tuple[torch.Tensor, torch.Tensor]]:
    assert task.held_out is not None
    return [*task.training()[0], *task.held_out]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_loaded_as_it_was_saved(folders: Path, name: str) -> None:
    """In FP32, without dropout, with gradients; and its loss is what random weights give."""
    task = load(folders / name, folders / "text")
    assert not task.model.training
    saved = type(task.model).from_pretrained(folders / name).state_dict()
    assert all(torch.equal(weight, saved[key]) for key, weight in task.model.state_dict().items())
    assert {parameter.dtype for parameter in task.model.parameters()} == {torch.float32}
    batches, loss = task.training()
    first, *_ = batches
    value = loss(task.model, first)
    assert torch.equal(value, loss(task.model, first))
    guess = math.log(BATCH if name == "encoder" else VOCABULARY)
    # Random weights guess, but no two passages of a random encoder are equally alike: their cosines, close to 1 each,
    # differ by at most 0.1, which is 2 after the temperature.
    assert value.item() == pytest.approx(guess, abs=2 if name == "encoder" else 0.5)
    value.backward()
    idle = [key for key, parameter in task.model.named_parameters() if parameter.grad is None]
    assert idle == [], "a part that does not serve the loss is not loaded"


@pytest.mark.parametrize("name", MODELS)
def test_batches_are_the_same_each_time_and_their_seeds_differ(folders: Path, name: str) -> None:
    first, again, other = (
        torch.cat([part for batch in batches_of(load(folders / name, folders / "text", seed=seed)) for part in batch])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", MODELS)
def test_batches_have_one_shape_and_as_many_as_asked_for(folders: Path, name: str) -> None:
    task = load(folders / name, folders / "text", batches=3, held_out=2)
    assert len(list(task.training()[0])) == 3
    assert len(batches_of(task)) == 5
    assert {tuple(part.shape) for batch in batches_of(task) for part in batch} == {(BATCH, LENGTH)}


def test_a_causal_model_guesses_each_next_token(folders: Path) -> None:
    task = load(folders / "causal", folders / "text")
    for tokens, targets in batches_of(task):
        assert (tokens[:, 0] == CLS).all()
        assert (tokens[:, 1:] >= len(SPECIAL)).all()
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
    batches, loss = task.training()
    tokens, targets = next(iter(batches))
    whole = torch.cat([tokens, targets[:, -1:]], dim=1)
    expected = task.model(input_ids=whole, labels=whole)
    # `transformers` computes it of the same logits, in another order of sums.
    torch.testing.assert_close(loss(task.model, (tokens, targets)), expected.loss, rtol=1e-5, atol=0)


def test_a_masked_model_guesses_what_is_masked(folders: Path) -> None:
    task = load(folders / "masked", folders / "text")
    text = LENGTH - 2
    for tokens, targets in batches_of(task):
        masked = tokens == MASK
        assert torch.equal(masked, targets != NO_TARGET)
        assert masked.sum(1).tolist() == [round(0.15 * text)] * BATCH
        assert (tokens[:, 0] == CLS).all() and (tokens[:, -1] == SEP).all()
        assert (targets[masked] >= len(SPECIAL)).all()
    batches, loss = task.training()
    tokens, targets = next(iter(batches))
    expected = task.model(input_ids=tokens, labels=targets).loss
    torch.testing.assert_close(loss(task.model, (tokens, targets)), expected, rtol=1e-5, atol=0)


def test_an_encoder_is_fed_neighbours(folders: Path) -> None:
    """The second passage goes on where the first one ends."""
    text = [file.read_text() for file in (folders / "text").iterdir()]
    for first, second in batches_of(load(folders / "encoder", folders / "text")):
        for one, two in zip(first, second, strict=True):
            assert (one[0], one[-1], two[0], two[-1]) == (CLS, SEP, CLS, SEP)
            passage = " ".join(WORDS[token - len(SPECIAL)] for token in (*one[1:-1], *two[1:-1]))
            assert any(passage in file for file in text)


class Embedder(nn.Module):
    """Tokens are their own embeddings."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        states = nn.functional.one_hot(input_ids, 8).float()
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=states)


def test_the_contrastive_loss_is_low_for_neighbours_alone(folders: Path) -> None:
    _, loss = load(folders / "encoder", folders / "text").training()
    first = torch.tensor([[1, 1], [2, 2]])
    # Cosines are 1 and 0, so 1 / 0.05 = 20 is what the own one has above the other.
    assert loss(Embedder(), (first, first)).item() == pytest.approx(math.log1p(math.exp(-20)), abs=1e-6)
    assert loss(Embedder(), (first, first.flip(0))).item() == pytest.approx(20, abs=1e-4)
    assert loss(Embedder(), (first, torch.ones_like(first))).item() == pytest.approx((math.log(2) + 10) / 2, abs=1e-4)


def test_no_two_windows_overlap_even_where_text_is_given_twice(folders: Path) -> None:
    """Each place of this text has a number of its own."""
    text = folders / "numbers.txt"
    text.write_text(" ".join(f"{number:06d}" for number in range(5000)))
    found = windows.windows(
        [text, text], lambda part: [int(word) for word in part.split()], count=20, length=12, seed=0
    )
    assert found.shape == (20, 12)
    # An excerpt may begin within a number, whose rest is then a smaller one: whole numbers are compared.
    assert len(found[:, 1:].unique()) == 20 * 11


def test_a_folder_and_a_file_may_be_text(folders: Path) -> None:
    single = load(folders / "causal", folders / "text" / "0.txt")
    assert all((tokens != UNK).all() for tokens, _ in batches_of(single))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: folder / "absent", "there is no folder"),
        (lambda folder: folder / "config.json", "there is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights; model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "a pickle"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100), "the model in"),
        (lambda folder: (folder / "config.json").write_text("{"), "the configuration in"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer in"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: change(folder, architectures=None), "names no class"),
        (
            lambda folder: change(folder, architectures=["BertForSequenceClassification"]),
            "no causal or masked",
        ),
        (lambda folder: change(folder, quantization_config={"quant_method": "gptq"}), "quantised already"),
        (lambda folder: change(folder, model_type="new"), "the configuration in"),
        (lambda folder: change(folder, num_hidden_layers=2), "lacks 16 weights of a BertForMaskedLM"),
        (lambda folder: change(folder, vocab_size=100), "makes tokens up to"),
    ],
)
def test_a_folder_that_holds_no_model_is_refused(
    copy: Callable[[str], Path], folders: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    folder = copy("masked")
    changed = spoil(folder)
    elsewhere = isinstance(changed, Path) and changed.suffix != ".bin"
    assert said in refused(changed if elsewhere else folder, folders / "text")


def change(folder: Path, **values: Any) -> None:
    """Set entries of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_code_beside_a_model_is_not_executed(copy: Callable[[str], Path], folders: Path, tmp_path: Path) -> None:
    folder = copy("causal")
    code = f"open({str(tmp_path / 'executed')!r}, 'w').close()\n"
    (folder / "custom_generate").mkdir()
    for name in ("custom_generate/generate.py", "modeling.py", "configuration.py"):
        (folder / name).write_text(code)
    change(folder, auto_map={"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"})
    assert isinstance(load(folder, folders / "text").model, transformers.LlamaForCausalLM)
    change(folder, model_type="of_their_own")
    assert "the configuration in" in refused(folder, folders / "text")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("causal", {"batches": 0}, "too few"),
        ("causal", {"held_out": -1}, "too few"),
        ("causal", {"batch_size": 0}, "ask for at least 1"),
        ("encoder", {"batch_size": 1}, "ask for at least 2: an encoder tells"),
        ("masked", {"sequence_length": 65}, "takes 10 to 64, with 2 that mark"),
        ("masked", {"sequence_length": 9}, "takes 10 to 64, with 2 that mark"),
    ],
)
def test_numbers_that_cannot_be(folders: Path, name: str, options: dict[str, int], said: str) -> None:
    assert said in refused(folders / name, folders / "text", OptionError, **options)


def test_text_that_is_missing_or_too_short(folders: Path, tmp_path: Path) -> None:
    assert "there is no file or folder" in refused(folders / "causal", tmp_path / "absent", DataError)
    (tmp_path / "empty.txt").write_text("")
    assert "holds no text" in refused(folders / "causal", tmp_path / "empty.txt", DataError)
    (tmp_path / "short.txt").write_text("001 " * 50)
    message = refused(folders / "causal", tmp_path / "short.txt", DataError)
    # 9 windows of 16 tokens (the mark is one of the 17 that a sample and its targets take), at 8 characters a token.
    assert "holds 200 characters, enough for 2 of the 9 windows of 16 tokens asked for" in message
    assert "About 1,152 characters are needed" in message
    with pytest.raises(DataError, match="no text was given"):
        huggingface.load(folders / "causal", [], sequence_length=LENGTH)


def test_as_much_text_as_is_asked_for_is_enough(folders: Path, tmp_path: Path) -> None:
    words = (WORDS * 3)[: 1152 // 4]
    (tmp_path / "enough.txt").write_text(" ".join(words))
    assert len(batches_of(load(folders / "causal", tmp_path / "enough.txt"))) == 3


def test_the_command(folders: Path, tmp_path: Path) -> None:
    """From a folder to a plan that the backend takes."""
    arguments = [
        "--hf",
        str(folders / "causal"),
        "--text",
        str(folders / "text"),
        "--batches",
        "2",
        "--no-pairs",
        "--json",
    ]
    arguments += [
        "--batches",
        "2",
        "--batch-size",
        str(BATCH),
        "--length",
        str(LENGTH),
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    found = CliRunner().invoke(app, ["sensitivity", *arguments])
    assert found.exit_code == 0, found.output
    sites = {site["site"]: site for site in json.loads(found.stdout)["measurements"]["sites"]}
    assert sites["model.layers.0.mlp.gate_proj"]["roles"]["fprop"]["m"] == BATCH * LENGTH
    plan = plans.load(tmp_path / "plan.json")
    model = load(folders / "causal", folders / "text").model
    compiled = torch.compile(model, backend="nvfp4", options={"plan": plan})
    assert compiled(torch.full((1, LENGTH), 9)).logits.isfinite().all()


def test_without_transformers_it_says_what_to_install(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install "nvfp4c[hf]"' in refused(folders / "causal", folders / "text")


def test_nothing_is_printed_and_its_settings_are_given_back(folders: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(folders / "encoder", folders / "text")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
