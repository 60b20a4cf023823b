"""What a user gets wrong reaches them as one clear sentence, through `torch.compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inside import Mlp
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config

from nvfp4c.errors import Nvfp4Error, OptionError, PlanError, TargetError
from nvfp4c.options import check_torch, parse


def error_of(options: dict[str, Any]) -> Nvfp4Error:
    """What a first step with these options raises."""
    torch._dynamo.reset()
    compiled = torch.compile(Mlp(), backend="nvfp4", options=options)
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(torch.randn(4, 32))
    cause = caught.value.inner_exception
    assert isinstance(cause, Nvfp4Error)
    assert str(cause) in str(caught.value), "the user sees the sentence"
    return cause


def test_an_unknown_option_lists_the_valid_ones() -> None:
    error = error_of({"recipes": "nvfp4"})
    assert isinstance(error, OptionError)
    assert str(error) == (
        "unknown option 'recipes'; did you mean 'recipe'? (options: recipe, plan, target, product, mode, weight_cache)"
    )


def test_an_unknown_recipe_lists_the_valid_ones() -> None:
    error = error_of({"recipe": "nvfp4-everything"})
    assert isinstance(error, OptionError)
    assert "unknown recipe 'nvfp4-everything'" in str(error)
    for name in ("nvfp4-all", "nvfp4-forward", "nvfp4-backward", "nvfp4-inference", "nvfp4-weight-only", "bf16"):
        assert name in str(error)


@pytest.mark.parametrize("option", ["recipe", "target", "plan"])
def test_an_option_of_another_type_says_what_it_can_be(option: str) -> None:
    error = error_of({option: 4})
    assert isinstance(error, OptionError if option != "plan" else PlanError)
    assert option in str(error)
    assert "got int" in str(error)


def test_an_unknown_target_lists_the_valid_ones() -> None:
    error = error_of({"target": "sm_42"})
    assert isinstance(error, OptionError)
    assert "no target is called 'sm_42'" in str(error)
    assert "auto, cpu, sm_80, sm_89, sm_90" in str(error)


def test_a_gpu_target_for_a_model_on_the_cpu() -> None:
    error = error_of({"target": "sm_90"})
    assert isinstance(error, TargetError)
    assert "'sm_90' is a GPU, but the model is on the CPU" in str(error)


def test_an_unknown_mode_lists_the_valid_ones() -> None:
    """`torch.compile` takes a mode alone or options; so a mode may be one of the options."""
    sentence = "unknown mode 'fastest'; valid: default, max-autotune, max-autotune-no-cudagraphs, reduce-overhead"
    assert str(error_of({"recipe": "nvfp4", "mode": "fastest"})).startswith(sentence)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=sentence):
        torch.compile(Mlp(), backend="nvfp4", mode="fastest")(torch.randn(4, 32))


@pytest.mark.parametrize("given", ["sometimes", 1, None])
def test_another_weight_cache_says_what_it_can_be(given: object) -> None:
    error = error_of({"weight_cache": given})
    assert isinstance(error, OptionError)
    assert str(error) == f"weight_cache must be True, False, or one of off, training, always; got {given!r}"


@pytest.mark.parametrize(("given", "meaning"), [(True, "training"), (False, "off"), ("always", "always")])
def test_weight_caches(given: object, meaning: str) -> None:
    assert parse({"weight_cache": given}).weight_cache == meaning
    assert parse().weight_cache == "training"


def test_a_plan_with_a_site_that_does_not_exist_names_the_nearest() -> None:
    error = error_of({"plan": {"dwn": "bf16"}})
    assert isinstance(error, PlanError)
    assert str(error) == "the plan names 'dwn', but the model has no such site; did you mean 'down'?"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"version": 1,\n "rules": {"down": }}', "line 2, column 20"),
        ('{"version": 1, "rules": {"down": {"forward": "bf16"}}}', "rules['down']: unknown role 'forward'"),
        ('{"version": 1, "rules": {"down": "fp8"}}', "rules['down']: unknown precision 'fp8'; valid: nvfp4, bf16"),
        ('{"version": 9, "rules": {}}', "plan version 9 is not supported; expected 1"),
        ('{"version": 1, "rule": {}}', "unknown key 'rule'; did you mean 'rules'?"),
    ],
)
def test_a_malformed_plan_says_where(text: str, where: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    error = error_of({"plan": str(path)})
    assert isinstance(error, PlanError)
    assert str(error).startswith(str(path))
    assert where in str(error)


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    error = error_of({"plan": tmp_path / "none.json"})
    assert isinstance(error, PlanError)
    assert "cannot read the plan" in str(error)
    assert "none.json" in str(error)


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "1.13.1+cu117", "3.0.0a0+git123"])
def test_an_unsupported_torch(version: str) -> None:
    with pytest.raises(TargetError, match=r"PyTorch .* is not supported; install torch 2.11 to 2.15"):
        check_torch(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.1", "2.14.0.dev20260101+cu130", torch.__version__])
def test_a_supported_torch(version: str) -> None:
    check_torch(version)


def test_no_cpp_compiler() -> None:
    """Inductor reads CXX when it is imported, into this setting."""
    with inductor_config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        error = error_of({})
    assert isinstance(error, TargetError)
    assert "no C++ compiler" in str(error)
    assert "CXX" in str(error)


class Unusual(nn.Module):
    """Matmuls with a weight that cannot run in FP4, behind one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.precise = nn.Linear(32, 32, dtype=torch.float64)
        self.register_buffer("whole", torch.randint(-5, 5, (32, 32)))
        self.register_buffer("bytes", torch.randint(-5, 5, (32, 32), dtype=torch.int8))
        self.register_buffer("coo", torch.eye(32).to_sparse())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layer(x)
        return x, self.rest(x)

    def rest(self, x: Tensor) -> Tensor:
        rounded = (x * 3).round()
        total = self.precise(x.double()).float() + (rounded.long() @ self.whole).float()
        total = total + torch._int_mm(rounded.to(torch.int8), self.bytes).float()
        return total + torch.sparse.mm(self.coo, x)


def test_matmuls_that_cannot_be_fp4_stay_as_they_are(eager_kernels: None) -> None:
    """float64, integer and sparse ones: without an exception, and as PyTorch computes them."""
    torch.manual_seed(0)
    model = Unusual()
    x = torch.randn(32, 32)
    compiled = torch.compile(model, backend="nvfp4", options={"recipe": "nvfp4-all"})
    between, found = compiled(x)
    assert not torch.allclose(between, model.layer(x)), "the layer before them runs in NVFP4"
    torch.testing.assert_close(found, model.rest(between))
    found.sum().backward()
    assert model.precise.weight.grad is not None
    assert model.layer.weight.grad is not None
