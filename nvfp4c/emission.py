"""Every kernel that a compiled model would launch on a GPU that need not be there: its source, its PTX, what it takes.

    task ── capture ── passes ── the partitioner ── fuse ── what each node launches ── Triton, ahead of time ── folder

Kernels are specialised as a launch would do it: by types, by tile, by sizes that are 1 or multiples of 16. Calls that
share all of that are uses of one kernel.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, fx

from nvfp4c import options as option_parsing
from nvfp4c.codegen import block_scaled_gemm, emit, kernels, operations
from nvfp4c.codegen.assembly import Assembly, assemble
from nvfp4c.codegen.chips import TARGETS
from nvfp4c.codegen.launches import launches
from nvfp4c.codegen.launching import Launch
from nvfp4c.dialect import BLOCK_SCALED_MM, PRODUCT, REGION, arguments, numbers
from nvfp4c.errors import OptionError, TargetError, nearest
from nvfp4c.fused_graphs import Half, fused_graphs, sites
from nvfp4c.region import Region
from nvfp4c.tasks import Task
from nvfp4c.watch import Watch, unwatched

GPUS = tuple(target.name for target in TARGETS.values() if target.capability)
NOTE = "No kernel for {target} has run on such a GPU yet: docs/blackwell.md says what is proven without one."

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
E4M3 = re.compile(r"cvt\.r[ns]\.[\w.]*e4m3x\d[\w.]*")
DIVISOR = 16
"""Triton compiles anew for an int that is a multiple of it, as it does for an int of 1."""

WORDS = {
    "unpack_rows": "code * scale, of blocks along the rows",
    "unpack_columns": "code * scale, of blocks down the columns",
    "product_factors": "the global factor of a product, for cuBLAS",
}
"""What the kernels that are not emitted compute."""

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Use:
    """A node that launches a kernel. shape: of what it reads. sites: `site role` of the matmuls that it serves."""

    graph: str
    node: str
    shape: str
    sites: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.graph}: {self.node} on {self.shape}, for {', '.join(self.sites)}"


@dataclass(frozen=True)
class Launched:
    """A kernel specialised for a launch. types, constants: of its arguments, by name. aligned: multiples of 16."""

    stem: str
    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    source: str
    computes: str

    def assemble(self, target: str) -> Assembly:
        return assemble(
            self.kernel,
            target,
            dict(self.types),
            dict(self.constants),
            aligned=self.aligned,
            num_warps=self.warps,
        )

    @property
    def specialisation(self) -> tuple[str, ...]:
        """What the kernel is compiled for: each of its arguments."""
        given = (f"{name}: {kind}" + f", a multiple of {DIVISOR}" * (name in self.aligned) for name, kind in self.types)
        return (*given, *(f"{name} = {value}" for name, value in self.constants), f"{self.warps} warps")


@dataclass(frozen=True)
class NativeProduct:
    """The product on FP4 tensor cores."""

    out_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    residual_dtype: torch.dtype | None
    stem: str = "block_scaled_gemm"

    @property
    def source(self) -> str:
        return inspect.getsource(block_scaled_gemm)

    @property
    def computes(self) -> str:
        return "the product on FP4 tensor cores"

    @property
    def specialisation(self) -> tuple[str, ...]:
        bias = f"a bias in {_name(self.bias_dtype)}" if self.bias_dtype else "no bias"
        residual = f"a residual in {_name(self.residual_dtype)}" if self.residual_dtype else "no residual"
        return (f"a result in {_name(self.out_dtype)}", bias, residual)

    def assemble(self, target: str) -> Assembly:
        return block_scaled_gemm.assemble_gemm(target, self.out_dtype, self.bias_dtype, self.residual_dtype)


Program = Launched | NativeProduct


@dataclass(frozen=True)
class EmittedKernel:
    """A line of the summary. name: of its two files, without their endings. spills: bytes. shared_bytes: a program's.

    specialisation: what it was compiled for, in words. mma, conversions: kinds of instructions found in the PTX.
    """

    name: str
    computes: str
    specialisation: tuple[str, ...]
    uses: tuple[Use, ...]
    registers: int
    shared_bytes: int
    spills: int
    mma: tuple[str, ...]
    conversions: tuple[str, ...]


@dataclass(frozen=True)
class Emission:
    """What `summary.json` holds. note: what is particular about the target, "" for nothing."""

    task: str
    target: str
    recipe: str
    note: str
    graphs: tuple[str, ...]
    versions: Mapping[str, str]
    kernels: tuple[EmittedKernel, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def emit_task(
    task: Task, target: str, out: Path, recipe: object = None, plan: object = None, watch: Watch = unwatched
) -> Emission:
    """Write every kernel of a task for a target such as "sm_90" into the new folder `out`; no GPU is needed.

    A task with a loss is emitted as in training, else as in inference. The model is run once, uncompiled. Each kernel
    becomes NN-name.py and NN-name.ptx, and the folder appears whole or not at all. Raises OptionError for a target that
    does not exist or a folder that holds files, TargetError for the CPU, and what the backend would raise.
    """
    check_target(target)
    given = {"plan": plan} if recipe is None else {"plan": plan, "recipe": recipe}
    options = option_parsing.parse(given)
    with whole_folder(out) as folder:
        watch("capturing", 0, 1)
        halves = fused_graphs(task, options, target)
        gathered = programs(halves, target)
        found = []
        for number, (program, uses) in enumerate(gathered.items()):
            watch(f"compiling for {target}", number, len(gathered))
            name = f"{number + 1:02d}-{program.stem}"
            assembly = program.assemble(target)
            (folder / f"{name}.py").write_text(header(program, uses, target) + program.source, encoding="utf-8")
            (folder / f"{name}.ptx").write_text(assembly.ptx, encoding="utf-8")
            found.append(_emitted(name, program, uses, assembly))
        emission = Emission(
            task=task.name,
            target=target,
            recipe=options.recipe.name,
            note=NOTE.format(target=target) if TARGETS[target].native_fp4 else "",
            graphs=tuple(half.title for half in halves),
            versions={"torch": torch.__version__, "triton": triton.__version__},
            kernels=tuple(found),
        )
        (folder / SUMMARY).write_text(emission.to_json(), encoding="utf-8")
    return emission


def check_target(name: str) -> None:
    """Raise OptionError for what is no target's name, TargetError for the CPU, and in Triton's interpreter."""
    if operations.INTERPRETED:
        raise TargetError("Triton's interpreter does not compile; unset TRITON_INTERPRET and start anew")
    if name == "cpu":
        raise TargetError(
            f"target 'cpu' has no emitted kernels, since Inductor writes its code; name a GPU: {', '.join(GPUS)}"
        )
    if name not in GPUS:
        raise OptionError(f"no GPU target is called {name!r}; {nearest(name, GPUS)} (valid: {', '.join(GPUS)})")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` at the end, or vanishes where the end is not reached.

    Raises OptionError where `path` is a file or holds files, or where nothing can be written beside it.
    """
    path = path.absolute()
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OptionError(f"{path} exists and is not an empty folder; choose another one, or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise OptionError(f"cannot write to {path}: {error.strerror}; choose another folder") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def programs(halves: Sequence[Half], target: str) -> dict[Program, list[Use]]:
    """What the graphs launch on a target, each distinct kernel with its uses, in the order of the first of them."""
    capability = TARGETS[target].capability
    assert capability is not None, "the CPU launches no kernels"
    found: dict[Program, list[Use]] = defaultdict(list)
    for half in halves:
        for node in half.graph.nodes:
            for program in _launches(node, capability):
                found[program].append(_use(half, node))
    return found


def _launches(node: fx.Node, capability: tuple[int, int]) -> Sequence[Program]:
    """The kernels that a node launches; none where it computes an empty matrix."""
    if node.target is BLOCK_SCALED_MM:
        product = _multiplying(node)
        return [] if product is None else [product]
    return [_launched(launch, region) for launch, region in launches(node, torch.device("cuda"), capability)]


def _multiplying(node: fx.Node) -> NativeProduct | None:
    """What `native_product.by_triton` launches; None for an empty product. A bias that is no vector is not its own."""
    a, _, _, b, _, _, bias, residual, dtype = arguments(node)
    if 0 in numbers((*a.meta["val"].shape, *b.meta["val"].shape)):
        return None
    if bias is not None and numbers(bias.meta["val"].shape) != numbers(b.meta["val"].shape[-2:-1]):
        return NativeProduct(torch.float32, None, None)
    bias_dtype, residual_dtype = (None if term is None else term.meta["val"].dtype for term in (bias, residual))
    return NativeProduct(dtype, bias_dtype, residual_dtype)


def _launched(launch: Launch, region: Region | None) -> Launched:
    """A launch's kernel, with the words and the source that it is shown with."""
    if region is not None:
        source = emit.emit(region).source
        title = (ast.get_docstring(ast.parse(source)) or "").removeprefix("Emitted by nvfp4c: ").removesuffix(".")
        stem = "_".join(dict.fromkeys(output.form.value for output in region.outputs))
    else:
        source, stem = inspect.getsource(kernels), launch.kernel.__name__
        title = WORDS[stem]
    return _specialised(launch, stem, source, title)


def _specialised(launch: Launch, stem: str, source: str, computes: str) -> Launched:
    """A launch's kernel, specialised for its arguments as Triton does it in a launch."""
    types: dict[str, str] = {}
    values: dict[str, Any] = {}
    aligned = []
    for parameter, value in zip(launch.kernel.params, (*launch.types, *launch.numbers), strict=False):
        special = not parameter.do_not_specialize
        if isinstance(value, torch.dtype):
            types[parameter.name] = POINTERS[value]
        elif value is None or (value == 1 and special):
            values[parameter.name] = value
        else:
            types[parameter.name] = "i32" if value < 1 << 31 else "i64"
            if value % DIVISOR == 0 and special:
                aligned.append(parameter.name)
    constants = (*values.items(), *launch.constants.items())
    return Launched(
        stem, launch.kernel, tuple(types.items()), constants, tuple(aligned), launch.warps, source, computes
    )


def _use(half: Half, node: fx.Node) -> Use:
    if node.target is BLOCK_SCALED_MM:
        reads = arguments(node)[0:6:3]
    elif node.target is PRODUCT:
        reads = arguments(node)[2:4]
    else:
        reads = arguments(node)[0] if node.target is REGION else arguments(node)[:1]
    return Use(half.title, node.name, " and ".join(_shape(read.meta["val"]) for read in reads), sites(half, node))


def _shape(value: Tensor) -> str:
    return f"{_name(value.dtype)} {list(numbers(value.shape))}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def header(program: Program, uses: Sequence[Use], target: str) -> str:
    """The comment above a source: what was compiled, and the graph nodes that it came from."""
    lines = [
        f"Compiled for {target} by nvfp4c emit: {program.computes}.",
        "",
        "Specialised for:",
        *textwrap.wrap("; ".join(program.specialisation), 110, initial_indent="  ", subsequent_indent="  "),
        "",
        "Launched by:",
        *(f"  {use}" for use in uses),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n"


def _emitted(name: str, program: Program, uses: Sequence[Use], assembly: Assembly) -> EmittedKernel:
    return EmittedKernel(
        name=name,
        computes=program.computes,
        specialisation=program.specialisation,
        uses=tuple(uses),
        registers=assembly.registers,
        shared_bytes=assembly.shared_bytes,
        spills=assembly.spills,
        mma=tuple(sorted(assembly.mma)),
        conversions=tuple(sorted(assembly.conversions | set(E4M3.findall(assembly.ptx)))),
    )
