"""What the compiler makes of every kernel, without a GPU: registers, spills, load widths, MMA.

The launches come from running the ops of `tests/kernels/shapes_*.py` on fake tensors, and each is
specialised as Triton's own JIT specialises it. Needs a process without TRITON_INTERPRET:

    python -m tests.support.aot [--filter NAME] [--arch sm_90 ...] [--known FILE] [--json FILE]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import known
from tests.support.entries import Entry, entry_name, looked_up
from trilith.kernels._runtime.keys import settle_keys

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
LAUNCHED_AS = {"sm_120": "sm_86"}  # whose launch tables an architecture takes, if not its own
KIB = 1024
SHARED_LIMIT = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
MULTIPROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
}
MMA = {
    "sm_80": r"HMMA",
    "sm_86": r"HMMA",
    "sm_90": r"HGMMA",
    "sm_100": r"UTC\w*MMA",
    "sm_120": r"HMMA",
    "gfx942": r"v_mfma\w*",
}
# Launches that CI compiles, and the baseline has, beside one of each entry of attention's tables:
# so many of each kernel with dots, and of each without, whose code hardly depends on the
# architecture. The command above compiles all.
SAMPLED = {arch: (12, 6) if arch == "sm_90" else (6, 2) for arch in TARGETS}
KERNEL_TESTS = Path(__file__).parents[1] / "kernels"


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor argument: what the JIT looks at when it specialises."""

    dtype: torch.dtype
    offset: int
    size: int

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return self.size


@dataclass
class Launch:
    """One distinct compilation: a kernel with specialised arguments, on one architecture."""

    op: str
    sample: str
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    arch: str
    entry: Entry | None = None  # of attention's tables


@dataclass
class Report:
    """What one binary is made of. `spilled` in bytes; `wide` is the share of 16-byte loads."""

    op: str
    sample: str
    kernel: str
    arch: str
    variant: str = ""
    entry: str = ""
    key: str = ""  # under which Triton caches the binary; none of what does not compile
    is_known: bool = False  # and so was not compiled
    registers: int = 0
    spilled: int = 0
    spill_instructions: int = 0
    shared: int = 0
    wide: float = 1.0
    mma: int = 0
    needs_mma: bool = False
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class _Driver:
    """Answers for a GPU that is not there; Triton's per-device caches key on the architecture."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(*TARGETS[arch])
        self._device = list(TARGETS).index(arch)
        self.utils = SimpleNamespace()

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def assume_target(arch: str) -> None:
    from triton.runtime.driver import driver

    driver.set_active(_Driver(arch))


def cases(source: str = "") -> Iterator[tuple[str, Any]]:
    """(op name, Sample) of every `shapes_*.py`, or of one module; call under a FakeTensorMode."""
    if source:
        yield from importlib.import_module(source).cases()
        return
    for module in sorted(pkgutil.iter_modules([str(KERNEL_TESTS)]), key=lambda m: m.name):
        if module.name.startswith("shapes_"):
            yield from importlib.import_module(f"tests.kernels.{module.name}").cases()


def import_kernels() -> None:
    """Register every family's ops: nothing is loaded later, on fake tensors."""
    from trilith.plugins import manager

    manager.load()


def captured(arch: str, name: str = "", source: str = "") -> tuple[list[Launch], list[Report]]:
    """The distinct launches that the cases make on `arch`, and cases that failed before any."""
    from trilith.kernels._runtime import device, launch
    from trilith.plugins import registry

    found: dict[Any, Launch] = {}
    failures: list[Report] = []
    op_name, sample = "", None
    entries: list[Entry] = []

    def observe(kernel: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        entry = entries.pop() if entries else None
        if name not in kernel.__name__ and name not in op_name:
            return
        args = tuple(_stand_in(a) for a in args)
        key = (kernel.__name__, kernel.__module__, _specialised(kernel, args, options))
        one = Launch(op_name, repr(sample), kernel, args, dict(options), arch, entry)
        found.setdefault(key, one)

    assume_target(arch)
    device._INTERPRETED_MULTIPROCESSORS = MULTIPROCESSORS[arch]
    launch.observers.append(observe)
    try:
        tables = LAUNCHED_AS.get(arch, arch)
        with FakeTensorMode(), device.assume_architecture(tables), looked_up(entries):
            for op_name, sample in cases(source):
                try:
                    _run(registry.op(op_name), sample)
                except Exception as error:
                    problem = f"running on fake tensors: {type(error).__name__}: {error}"
                    failures.append(
                        Report(op_name, repr(sample), "-", arch, problems=[problem[:500]])
                    )
    finally:
        launch.observers.remove(observe)
    return list(found.values()), failures


def _run(op: Any, sample: Any) -> None:
    """Forward and backward of every implementation, on whatever tensors the sample holds."""
    from trilith.plugins.conformance import backward_arguments

    args = op.parameters.bind(sample.args, sample.kwargs)
    for implementation in op.implementations:
        results = op.torch_ops.run_forward(*args, implementation.provider)
        if implementation.backward is None:
            continue
        outputs = results[: op.spec.outputs]
        grads = [torch.empty_like(o) if o.is_floating_point() else None for o in outputs]
        call = backward_arguments(op, args, implementation.provider, results, grads)
        if any(call[-1]):
            op.torch_ops.run_backward(*call)


def _stand_in(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    size = value.element_size()
    return Pointer(
        value.dtype, value.storage_offset() * size % 16, value.untyped_storage().nbytes()
    )


def _specialised(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    from triton.runtime.driver import driver
    from triton.runtime.jit import compute_cache_key

    device = driver.active.get_current_device()
    _, key_cache, _, _, binder = kernel.device_caches[device]
    _, specialization, rest = binder(*args, debug=False, **options)
    return compute_cache_key(key_cache, specialization, rest)


def _innermost(error: BaseException) -> str:
    """Triton wraps an error once for each function around it; the first one says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"[:500]


def examine(launch: Launch) -> Report:
    """Compile one launch and read its binary, unless it is known."""
    start = time.perf_counter()
    assume_target(launch.arch)
    report = Report(launch.op, launch.sample, launch.kernel.__name__, launch.arch, _variant(launch))
    report.entry = entry_name(launch.entry) if launch.entry else ""
    settle_keys((launch.kernel, *launch.options.values()))
    key = known.key_of(launch.kernel, launch.args, launch.options) if _known else ""
    if key in _known:
        report = replace(report, key=key, is_known=True, **_known[key])
        _judge(report)
        return report
    try:
        with contextlib.redirect_stderr(sys.stdout):
            compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
    except Exception as error:
        report.problems.append(f"does not compile: {_innermost(error)}")
        return report
    report.key = compiled.hash
    report.shared = compiled.metadata.shared
    report.needs_mma = _needs_mma(compiled.asm["ttir"])
    if launch.arch.startswith("sm_"):
        _read_nvidia(compiled.asm["cubin"], report)
    else:
        _read_amd(compiled.asm["amdgcn"], report)
    _judge(report)
    report.seconds = time.perf_counter() - start
    return report


def _variant(launch: Launch) -> str:
    dtypes = [str(a.dtype).removeprefix("torch.") for a in launch.args if isinstance(a, Pointer)]
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    named = []
    for name, value in launch.options.items():
        value = getattr(value, "__name__", value)
        named.append(f"{name}={value}")
    return " ".join([",".join(short.get(d, d) for d in dict.fromkeys(dtypes)), *named])


def _needs_mma(ttir: str) -> bool:
    """Whether there are products of 16-bit matrices."""
    return re.search(r"tt\.dot .*?: tensor<\d+x\d+xb?f16> \* ", ttir) is not None


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _read_nvidia(cubin: bytes, report: Report) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True
        )
        code = subprocess.run(
            [_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True
        )
    resources = {
        key: int(value)
        for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage.stdout + usage.stderr)
    }
    mnemonics = collections.Counter(
        re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code.stdout)
    )
    if not mnemonics or "REG" not in resources:
        report.problems.append("nothing could be read from the binary")
        return
    by_opcode = collections.Counter()
    loads = collections.Counter()
    for mnemonic, count in mnemonics.items():
        opcode = mnemonic.split(".")[0]
        by_opcode[opcode] += count
        if opcode in ("LDG", "LDGSTS"):
            loads[_load_width(mnemonic)] += count
    report.registers = resources["REG"]
    report.spill_instructions = by_opcode["STL"] + by_opcode["LDL"]
    report.spilled = max(resources.get("LOCAL", 0), resources.get("STACK", 0))
    report.wide = _share_of_widest(loads)
    report.mma = sum(n for k, n in by_opcode.items() if re.fullmatch(MMA[report.arch], k))


def _load_width(mnemonic: str) -> int:
    suffixes = mnemonic.split(".")[1:]
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[s] for s in suffixes if s in widths), 4)


def _read_amd(assembly: str, report: Report) -> None:
    def figure(key: str) -> int:
        found = re.search(rf"{key}:\s*(\d+)", assembly)
        if found is None:
            report.problems.append(f"no {key} in the assembly")
            return 0
        return int(found[1])

    mnemonics = collections.Counter(re.findall(r"^\s+([a-z]\w+)", assembly, re.M))
    loads = collections.Counter()
    for mnemonic, count in mnemonics.items():
        found = re.match(r"(?:global|buffer)_load_(?:dword(x\d)?|(\w+))", mnemonic)
        if found:
            loads[4 * int((found[1] or "x1")[1:]) if found[2] is None else 2] += count
    report.registers = figure(r"\.vgpr_count")
    report.spill_instructions = figure(r"\.vgpr_spill_count")
    report.spilled = figure(r"\.private_segment_fixed_size")
    report.wide = _share_of_widest(loads)
    report.mma = sum(n for k, n in mnemonics.items() if re.fullmatch(MMA[report.arch], k))


def _share_of_widest(loads: collections.Counter[int]) -> float:
    """Of the bytes that all load instructions fetch, those fetched 16 or more at a time."""
    total = sum(width * count for width, count in loads.items())
    return sum(w * n for w, n in loads.items() if w >= 16) / total if total else 1.0


def _judge(report: Report) -> None:
    if report.spilled or report.spill_instructions:
        report.problems.append(
            f"spills: {report.spilled} bytes, {report.spill_instructions} instructions"
        )
    limit = SHARED_LIMIT[report.arch]
    if report.shared > limit:
        report.problems.append(f"shared memory: {report.shared} bytes, the limit is {limit}")
    if report.needs_mma and not report.mma:
        report.problems.append(
            f"no MMA instruction ({MMA[report.arch]}) though the kernel has 16-bit dots"
        )


_launches: list[Launch] = []
_known: dict[str, dict[str, Any]] = {}  # by `key`, what need not be compiled again


def _examine_at(index: int) -> Report:
    torch.set_num_threads(1)
    return examine(_launches[index])


def title(kernel: str, arch: str, variant: str, op: str) -> str:
    """What launches share whose binaries are held to the same figures."""
    return f"{kernel} {arch} [{variant or op}]"


def thinned(launches: list[Launch], most: Sequence[int]) -> list[Launch]:
    """The most laden launch of each entry of attention's tables, and so many of other kernels.

    Of these the largest tile per warp, then evenly smaller; a second number is for kernels without
    dots.
    """
    of_entry: dict[Entry, Launch] = {}
    by_kernel: dict[str, list[Launch]] = collections.defaultdict(list)
    for launch in launches:
        if launch.entry is None:
            by_kernel[launch.kernel.__name__].append(launch)
        else:
            of_entry[launch.entry] = max(of_entry.get(launch.entry, launch), launch, key=_burden)
    kept = list(of_entry.values())
    for own in by_kernel.values():
        own.sort(key=_elements_per_warp, reverse=True)
        count = min(most[0] if _has_dots(own[0].kernel) else most[-1], len(own))
        kept.extend(own[i * len(own) // count] for i in range(count))
    return kept


def _burden(launch: Launch) -> tuple[float, int, int, int]:
    pointers = sum(isinstance(a, Pointer) for a in launch.args)
    flags = [v for v in launch.options.values() if isinstance(v, bool)]
    flags += launch.options.get("FLAGS", ())
    chunks = sum(launch.options.get("CHUNKS", ()))
    return _elements_per_warp(launch), chunks, pointers, sum(flags)


def _has_dots(kernel: Any) -> bool:
    """Whether it or a function that it calls by name has one."""
    called = (kernel.fn.__globals__.get(name) for name in kernel.fn.__code__.co_names)
    return "tl.dot" in kernel.src or any(_has_dots(f) for f in called if hasattr(f, "src"))


def _elements_per_warp(launch: Launch) -> float:
    sizes = [v for k, v in launch.options.items() if k.startswith("BLOCK")]
    return math.prod(max(v, 1) for v in sizes) / launch.options.get("num_warps", 4)


def survey(
    archs: list[str], name: str = "", jobs: int = 2, source: str = "", most: Sequence[int] = ()
) -> tuple[list[Report], list[str]]:
    """Reports of the distinct launches on the given architectures, compiled in `jobs` processes;
    and the titles of all launches, also of those that `most` leaves out."""
    import_kernels()
    reports: list[Report] = []
    titles: set[str] = set()
    _launches.clear()
    for arch in archs:
        launches, failures = captured(arch, name, source)
        titles |= {title(x.kernel.__name__, arch, _variant(x), x.op) for x in launches}
        _launches.extend(thinned(launches, most) if most else launches)
        reports.extend(failures)
    if jobs == 1:
        return reports + [examine(launch) for launch in _launches], sorted(titles)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        reports += pool.map(_examine_at, range(len(_launches)), chunksize=1)
    return reports, sorted(titles)


def table(reports: list[Report]) -> str:
    head = ("kernel", "arch", "regs", "spill B", "spill ins", "shared", "wide", "mma", "variant")
    rows = [
        (
            r.kernel,
            r.arch,
            str(r.registers),
            str(r.spilled),
            str(r.spill_instructions),
            str(r.shared),
            f"{r.wide:.0%}",
            str(r.mma),
            f"{r.variant} <- {r.op} {r.sample}",
        )
        for r in sorted(reports, key=lambda r: (r.kernel, r.variant, r.arch))
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    lines = []
    for row in [head, *rows]:
        cells = [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[-1]]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.aot", description=__doc__)
    parser.add_argument("--filter", default="", help="part of a kernel's or an op's name")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", metavar="FILE", help="write the reports there")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--most",
        nargs="+",
        type=int,
        default=(),
        help="launches per kernel and architecture; a second number is for kernels without dots",
    )
    parser.add_argument("--cases", default="", help="a module with cases(), instead of the shapes")
    parser.add_argument("--known", type=Path, help="compile what is not in this file")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set; ahead-of-time compiling needs a process without it")
    start = time.perf_counter()
    if options.known:
        _known.update(known.read(options.known))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        reports, titles = survey(
            options.arch, options.filter, options.jobs, options.cases, options.most
        )
    if options.json:
        written = {"reports": [asdict(r) for r in reports], "launched": titles}
        Path(options.json).write_text(json.dumps(written))
    print(table(reports))
    failed = [r for r in reports if r.problems]
    for r in failed:
        print(f"{r.arch} {r.kernel} [{r.variant}] of {r.op} {r.sample}: {'; '.join(r.problems)}")
    fresh = sum(not r.is_known for r in reports)
    print(
        f"{len(reports)} binaries, {fresh} of them compiled, {len(failed)} with problems, "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
