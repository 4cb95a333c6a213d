"""What one binary is made of, read from its machine code, and what is wrong with it."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.architectures import MMA, SHARED_LIMIT


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


def read(compiled: Any, report: Report) -> None:
    """What Triton compiled, into the report."""
    report.key = compiled.hash
    report.shared = compiled.metadata.shared
    report.needs_mma = _needs_mma(compiled.asm["ttir"])
    if report.arch.startswith("sm_"):
        _read_nvidia(compiled.asm["cubin"], report)
    else:
        _read_amd(compiled.asm["amdgcn"], report)


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


def judge(report: Report) -> None:
    """Its problems: spills, too much shared memory, 16-bit dots without tensor cores."""
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
