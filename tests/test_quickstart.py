"""The quickstart: its text, its model, the training loop, the report, and the whole command once."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from plotly.offline import get_plotlyjs

from nvfp4c import text_files
from nvfp4c.errors import DataError, OptionError, TargetError
from nvfp4c.explanation import Explanation, Row
from nvfp4c.grouping import group, single, totals
from nvfp4c.quickstart import data, report, results
from nvfp4c.quickstart.compare import Comparison
from nvfp4c.quickstart.model import SIZES, Gpt, rotary_table, rotate, size_named
from nvfp4c.quickstart.train import (
    Run,
    Settings,
    build_model,
    choose_device,
    learning_rate_factor,
    loss_of,
    train,
    train_batches,
    validation_batches,
)

SMALLEST = replace(SIZES["tiny"], layers=1, width=32, heads=2, hidden=48, sequence=16, batch=2)
SETTINGS = Settings(SMALLEST, steps=12, seed=0, device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(60):
        text = f"file {number} says that the quick brown fox jumps over the lazy dog\n"
        path = tmp_path / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text * 10)
    return tmp_path


def corpus_of(folder: Path) -> data.Corpus:
    return data.load(folder, minimum=SETTINGS.minimum_bytes)


def numbers_in(tokens: torch.Tensor) -> set[str]:
    return set(re.findall(r"file (\d+) says", bytes(tokens.tolist()).decode()))


def test_files_are_split_whole_by_their_path_alone(folder):
    corpus = corpus_of(folder)
    paths = {str(number): f"part{number % 3}/{number}.txt" for number in range(60)}
    held_out = {number for number, path in paths.items() if data.is_held_out(path)}
    assert numbers_in(corpus.validation) == held_out
    assert numbers_in(corpus.train) == set(paths) - held_out
    (folder / "part0" / "new.txt").write_text("something else\n" * 50)
    assert numbers_in(corpus_of(folder).validation) == held_out


def test_about_a_tenth_of_all_paths_is_held_out():
    held_out = sum(data.is_held_out(f"package/module{number}.py") for number in range(10_000))
    # The standard deviation of 10000 draws at 0.1 is 30; the paths are fixed, so this cannot vary.
    assert abs(held_out - 1000) < 150


def test_one_large_file_is_split_within(tmp_path):
    (tmp_path / "all.txt").write_bytes(bytes(range(1, 101)) * 10)
    corpus = data.load(tmp_path, minimum=50)
    assert corpus.split == "the last tenth of each file"
    assert (len(corpus.train), len(corpus.validation)) == (900, 100)


def test_binary_hidden_empty_and_broken_files_are_skipped(folder):
    before = corpus_of(folder)
    (folder / "image.png").write_bytes(b"\x89PNG\0" + b"x" * 5000)
    (folder / ".hidden").write_text("secret\n" * 500)
    (folder / "empty.txt").write_text("")
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret\n" * 500)
    after = corpus_of(folder)
    assert after.files == before.files
    assert torch.equal(after.train, before.train)


def test_any_bytes_are_text_unless_they_hold_a_zero(tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 1000)
    assert len(data.load(tmp_path, minimum=100).train) == 7200


def test_no_more_is_read_than_the_limit(folder, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_BYTES", 10_000)
    corpus = data.load(folder, minimum=10)
    assert len(corpus.train) + len(corpus.validation) == 10_000


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "absent", "does not exist"),
        (lambda folder: folder / "part0" / "0.txt", "is a file"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(folder, make, said):
    with pytest.raises(DataError, match=said):
        corpus_of(make(folder))


def test_a_folder_without_text_says_so(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\0" * 100_000)
    with pytest.raises(DataError, match="holds no text"):
        corpus_of(tmp_path)


def test_too_little_text_says_how_much_is_needed(tmp_path):
    (tmp_path / "short.txt").write_text("short\n")
    with pytest.raises(DataError, match=f"too little text: 6 bytes.*at least {SETTINGS.minimum_bytes} bytes"):
        corpus_of(tmp_path)


def test_the_standard_library_is_the_default():
    corpus = data.load()
    assert corpus.source == "source code of the Python standard library"
    assert b"def __init__(self" in bytes(corpus.train[:2_000_000].tolist())
    assert len(corpus.validation) > 100_000


def test_batches_are_fixed_by_the_seed_and_targets_come_next(folder):
    corpus = corpus_of(folder)
    first, again = (list(train_batches(corpus, SETTINGS)) for _ in range(2))
    other = list(train_batches(corpus, replace(SETTINGS, seed=1)))
    assert len(first) == SETTINGS.steps
    for (tokens, targets), (same, _) in zip(first, again, strict=True):
        assert tokens.shape == targets.shape == (2, 16)
        assert torch.equal(tokens, same)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert not torch.equal(first[0][0], other[0][0])


def test_validation_batches_are_the_same_for_every_seed_and_reach_both_ends(folder):
    corpus = corpus_of(folder)
    batches = validation_batches(corpus, SETTINGS)
    for (tokens, _), (same, _) in zip(batches, validation_batches(corpus, replace(SETTINGS, seed=7)), strict=True):
        assert torch.equal(tokens, same)
    assert torch.equal(batches[0][0][0], corpus.validation[:16].long())
    assert torch.equal(batches[-1][1][-1], corpus.validation[-16:].long())


def test_the_smallest_corpus_that_is_accepted_gives_batches():
    text = torch.arange(SETTINGS.minimum_bytes, dtype=torch.uint8)
    corpus = data.Corpus(text, text, "", 1, "")
    assert len(list(train_batches(corpus, SETTINGS))) == SETTINGS.steps
    assert len(validation_batches(corpus, SETTINGS)) > 0


def test_a_model_sees_the_past_alone():
    torch.manual_seed(0)
    model = Gpt(SMALLEST)
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:10], after[:10])
    assert not torch.equal(before[10:], after[10:])


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    cos, sin = rotary_table(8, 16)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 8, 16)
    turned_q, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)
    # FP32 sums of 16 products of size about 1: errors of a few ulps.
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1), rtol=1e-5, atol=1e-5)
    scores = (turned_q @ turned_k.transpose(-1, -2))[0, 0]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_divide_into_heads(name):
    assert size_named(name).width % (2 * size_named(name).heads) == 0


def test_an_unknown_size_or_device_names_what_there_is():
    with pytest.raises(OptionError, match="did you mean 'small'"):
        size_named("smal")
    with pytest.raises(OptionError, match="auto, cpu or cuda"):
        choose_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_says_so():
    assert choose_device("auto") == "cpu"
    with pytest.raises(TargetError, match="no CUDA GPU"):
        choose_device("cuda")


def test_the_learning_rate_rises_then_falls_to_a_tenth():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[9] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.1 <= factors[-1] < 0.101  # one step before the end of the cosine


def test_training_lowers_the_loss_and_repeats_bit_for_bit(folder):
    settings = replace(SETTINGS, steps=40)
    stages: list[str] = []
    run = train(settings, corpus_of(folder), "eager", watch=lambda progress: stages.append(progress.stage))
    again = train(settings, corpus_of(folder), "eager")
    assert again.train_losses == run.train_losses
    assert again.validation == run.validation
    assert len(run.train_losses) == 40
    assert [step for step, _ in run.validation] == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    assert run.final_validation_loss < run.validation[0][1] - 1
    assert run.diverged_at is None
    assert stages[0] == "compile"
    assert stages.count("train") == 40


def test_fewer_steps_than_validations(folder):
    run = train(replace(SETTINGS, steps=1), corpus_of(folder), "eager")
    assert [step for step, _ in run.validation] == [0, 1]


def test_a_run_that_diverges_stops_and_says_where(folder):
    wild = replace(SETTINGS, size=replace(SMALLEST, learning_rate=math.inf))
    run = train(wild, corpus_of(folder), "eager")
    assert run.diverged_at == 2
    assert len(run.train_losses) == 1
    assert math.isnan(run.final_validation_loss)
    assert math.isnan(run.final_train_loss)


def test_training_on_less_than_a_batch_is_refused():
    text = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(DataError, match="less than one batch"):
        train(SETTINGS, data.Corpus(text, text, "nothing", 1, ""), "eager")


def test_loss_of_a_fresh_model_is_that_of_guessing(folder):
    loss = loss_of(build_model(SETTINGS), next(train_batches(corpus_of(folder), SETTINGS)))
    # Weights of 0.02 give logits far below 1, so all 256 bytes are about equally likely.
    assert abs(float(loss.detach()) - math.log(256)) < 0.2


def row(site: str, role: str = "fprop", precision: str = "nvfp4", n: int = 8, share: float = 0.125) -> Row:
    reason = "" if precision == "nvfp4" else "because <it> & that"
    return Row(site, role, 4, n, 8, share, precision, "x 1x16 nearest", "w 16x16 nearest", "kernel", reason)


def test_equal_layers_share_a_line():
    rows = [row(f"layers.{number}.attn.{name}_proj") for number in (0, 1, 2, 10) for name in ("q", "k")]
    (line,) = group(rows)
    assert line.row.site == "layers.{0..2,10}.attn.{q,k}_proj"
    assert line.count == 8
    assert line.row.share == 1.0


def test_layers_that_differ_do_not_share_a_line():
    rows = [row("layers.0.fc"), row("layers.1.fc"), row("layers.2.fc", precision="bf16"), row("layers.3.fc", n=16)]
    assert [line.row.site for line in group(rows)] == [
        "layers.{0,1}.fc".replace(",", ".."),
        "layers.2.fc",
        "layers.3.fc",
    ]


def test_a_pattern_stands_for_every_combination():
    rows = [row("layers.0.experts.0"), row("layers.0.experts.1"), row("layers.1.experts.1")]
    assert [line.row.site for line in group(rows)] == ["layers.0.experts.{0..1}", "layers.1.experts.1"]


def test_roles_of_a_site_stay_together_in_order():
    rows = [row("a.b"), row("c"), row("c", "wgrad"), row("c", "dgrad"), row("a.b", "dgrad")]
    expected = [("a.b", "fprop"), ("a.b", "dgrad"), ("c", "fprop"), ("c", "dgrad"), ("c", "wgrad")]
    assert [(line.row.site, line.row.role) for line in single(rows)] == expected
    assert sum(line.count for line in group(rows)) == len(rows)


def test_totals_leave_the_backward_out_where_there_is_none():
    assert totals(Explanation("cpu", "nvfp4", 1, (row("a"), row("b", precision="bf16")))) == (
        "NVFP4 does 50.0% of the forward matmul operations."
    )
    both = Explanation("cpu", "nvfp4", 1, (row("a"), row("a", "dgrad", precision="bf16"), row("a", "wgrad")))
    assert totals(both) == "NVFP4 does 100.0% of the forward and 50.0% of the backward matmul operations."


def run_of(backend: str, final: float, diverged_at: int | None = None) -> Run:
    validation = ((0, 5.5), (6, 3.0), (12, final))
    return Run(backend, tuple(5.5 - 0.2 * step for step in range(12)), validation, 1234.5, 6.7, 8.9, None, diverged_at)


@pytest.fixture
def comparison() -> Comparison:
    rows = tuple(row(f"layers.{number}.fc", precision="bf16" if number == 3 else "nvfp4") for number in range(4))
    return Comparison(
        settings=SETTINGS,
        recipe="nvfp4",
        parameters=1000,
        corpus={"source": "a </script> folder", "files": 3, "split": "s", "train_bytes": 9, "validation_bytes": 1},
        environment={"device": "some <CPU>", "torch": "2.13.0"},
        baseline=run_of("inductor", 2.0),
        nvfp4=run_of("nvfp4", 2.02),
        explanation=Explanation("cpu", "nvfp4", 1, rows),
    )


class Links(HTMLParser):
    """Collects what a page would load or link to, and the tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "input", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(comparison):
    page = report.render(comparison, "nvfp4c quickstart --data '<here>'")
    own = page.replace(get_plotlyjs(), "")
    assert len(page) - len(own) == len(get_plotlyjs())
    assert not re.search(r"https?:|//cdn|@import|url\(", own)
    parser = Links()
    parser.feed(own)
    assert parser.links == []
    assert parser.open == []


def test_the_page_holds_what_was_measured_and_escapes_it(comparison):
    page = report.render(comparison, "nvfp4c quickstart --data '<here>'").replace(get_plotlyjs(), "")
    for text in (
        "NVFP4 lies 1.00% above FP32&#x27;s",
        "2.0200",
        "1,234",
        "some &lt;CPU&gt;",
        "because &lt;it&gt; &amp; that",
        "a &lt;/script&gt; folder",
        "--data &#x27;&lt;here&gt;&#x27;",
        "layers.{0..2}.fc",
        "<td>layers.1.fc</td>",
    ):
        assert text in page
    assert "$" not in page


def test_a_diverged_run_is_reported_as_such(comparison):
    diverged = replace(comparison, nvfp4=run_of("nvfp4", math.nan, diverged_at=7))
    assert report.verdict(diverged) == "NVFP4 diverged at step 7 of 12."
    assert "NaN" not in report.render(diverged, "").replace(get_plotlyjs(), "")
    assert json.loads(results.to_json(diverged.to_dict()))["relative_validation_gap"] is None


def test_equal_losses_have_no_direction(comparison):
    assert report.verdict(replace(comparison, nvfp4=run_of("nvfp4", 2.0))).endswith("are equal.")


def test_results_hold_every_number(comparison, tmp_path):
    numbers, page = report.save(comparison, tmp_path, "nvfp4c quickstart")
    found = json.loads(numbers.read_text())
    assert found["runs"]["nvfp4"]["train_losses"] == list(comparison.nvfp4.train_losses)
    assert found["runs"]["nvfp4"]["final_validation_loss"] == 2.02
    assert found["relative_validation_gap"] == pytest.approx(0.01, rel=1e-12)  # one FP64 division
    assert len(found["explanation"]["rows"]) == 4
    assert found["command"] == "nvfp4c quickstart"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([numbers.name, page.name])


@pytest.mark.parametrize("run", [run_of("nvfp4", 2.02), replace(run_of("nvfp4", 2.02), peak_memory_bytes=7)])
def test_a_run_survives_json(run):
    assert results.run_from_dict(json.loads(results.to_json(results.run_to_dict(run)))) == run


def test_a_diverged_run_survives_json():
    again = results.run_from_dict(json.loads(results.to_json(results.run_to_dict(run_of("nvfp4", math.nan, 7)))))
    assert again.diverged_at == 7
    assert math.isnan(again.validation[-1][1])


def test_an_interrupted_write_leaves_the_old_report(comparison, tmp_path, monkeypatch):
    _, page = report.save(comparison, tmp_path, "first")
    before = page.read_bytes()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report.save(comparison, tmp_path, "second")
    assert page.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write to"):
        results.prepared(tmp_path / "file" / "out")
