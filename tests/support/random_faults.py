"""Faults drawn at random in the functions that Triton compiles: what would nobody notice?

    python -m tests.support.random_faults [MODULE ...] [--count 40] [--seed 0]

The table of mutants has what somebody thought of; here a comparison, an operator, a side of a mask,
a branch, a constant or a statement is changed wherever chance points. Each fault runs in a fork
with the test files that the table has for its module. A survivor is to be read: many change nothing
that can be seen, as `z > 0` for `z >= 0` in relu, or what masked lanes hold; some only the time,
which `make counted` watches. The others want a test, and a line in the table.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tqdm import tqdm

from tests.support import mutants
from tests.support.mutants import Mutant, StaleMutant

_OTHER_OPERATOR = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*",
}  # fmt: skip
_OTHER_FUNCTION = {
    "tl.max": "tl.min", "tl.sum": "tl.max", "tl.maximum": "tl.minimum", "tl.minimum": "tl.maximum",
    "tl.log": "tl.log2", "tl.log2": "tl.log", "tl.exp2": "tl.exp", "tl.sqrt": "tl.abs",
}  # fmt: skip


@dataclass(frozen=True)
class Fault(Mutant):
    """A mutant whose text is where it starts, and may be elsewhere too."""

    start: int

    def applied_to(self, source: str) -> str:
        end = self.start + len(self.old)
        if source[self.start : end] != self.old:
            raise StaleMutant(f"{self.name}: its text is not there in {self.module}")
        return source[: self.start] + self.new + source[end:]


def replacements(node: ast.AST, text: Callable[[ast.AST], str]) -> Iterator[tuple[ast.AST, str]]:
    """Other texts for a node or a part of it."""
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            if type(operator) in _OTHER_OPERATOR:
                yield node, f"({text(left)} {_OTHER_OPERATOR[type(operator)]} {text(right)})"
        case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr(), right=right):
            yield from ((node, f"({text(side)})") for side in (left, right))
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OTHER_OPERATOR:
            yield node, f"({text(left)} {_OTHER_OPERATOR[type(operator)]} {text(right)})"
        case ast.IfExp(body=body, orelse=orelse):
            yield from ((node, f"({text(side)})") for side in (body, orelse))
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield node, f"({text(operand)})"
        case ast.Constant(value=float() | 1 | 2) if not isinstance(node.value, bool):
            yield node, repr(node.value + 1)
        case ast.AugAssign():
            yield node, "pass"
        case ast.Expr(value=ast.Call(func=function)) if "store" in text(function):
            yield node, "pass"
        case ast.Call(func=function, args=args):
            if text(function) == "tl.where":
                yield from ((node, f"({text(side)})") for side in args[1:])
            elif text(function) in _OTHER_FUNCTION:
                yield function, _OTHER_FUNCTION[text(function)]


def faults_in(module: str, tests: str) -> list[Fault]:
    """Every fault that there is in a module's functions for Triton."""
    path = module.removeprefix("trilith.").replace(".", "/")  # to ask for it would import it
    source = (mutants.ROOT / f"{path}.py").read_text()
    lines = [0, *accumulate(map(len, source.splitlines(keepends=True)))]

    def at(line: int, column: int) -> int:
        return lines[line - 1] + column

    def text(node: ast.AST) -> str:
        start = at(node.lineno, node.col_offset)
        return source[start : at(node.end_lineno, node.end_col_offset)]

    faults = []
    for function in ast.parse(source).body:
        if any("triton.jit" in text(d) for d in getattr(function, "decorator_list", [])):
            inner = (node for statement in function.body for node in ast.walk(statement))
            for node, new in (change for part in inner for change in replacements(part, text)):
                name = f"{path}:{node.lineno}:{node.col_offset} {new}"
                start = at(node.lineno, node.col_offset)
                faults.append(Fault(name, module, text(node), new, tests, start))
    return faults


def tests_of_modules() -> dict[str, str]:
    """The test files that the table's mutants of a module are found by, but conformance, which is
    every op's."""
    from tests.support.mutant_table import MUTANTS

    files: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for mutant in MUTANTS:
        words = shlex.split(mutant.tests)
        own = [w.partition("::")[0] for w in words if "/test_" in w and "conformance" not in w]
        files[mutant.module].update(dict.fromkeys(own))
    return {module: " ".join(paths) for module, paths in files.items() if paths}


def drawn(modules: Sequence[str], count: int, seed: int) -> list[Fault]:
    tests = tests_of_modules()
    chosen = [m for m in tests if not modules or any(name in m for name in modules)]
    faults = [fault for module in chosen for fault in faults_in(module, tests[module])]
    return random.Random(seed).sample(faults, min(count, len(faults)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="*", help="parts of names, as norm_kernels; none for all")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    faults = drawn(options.modules, options.count, options.seed)
    if not faults:
        parser.error(f"no kernels in {' '.join(options.modules)}")
    mutants.beside_the_table.extend(faults)
    mutants.warm()
    verdicts: Counter[str] = Counter()
    tqdm.monitor_interval = 0  # its thread would not be in the forks
    with tqdm(mutants.run(faults, options.jobs), total=len(faults)) as bar:
        for fault, verdict, told, seconds in bar:
            verdicts[verdict] += 1
            if verdict == "SURVIVED":
                bar.write(f"{fault.name.partition(' ')[0]}: {fault.old}\n    -> {fault.new}")
            elif verdict == "ERROR":
                bar.write(f"{fault.name}: no verdict after {seconds:.0f} s: {_last_line(told)}")
    killed, survived, errors = (verdicts[v] for v in ("killed", "SURVIVED", "ERROR"))
    print(f"{len(faults)} faults, {killed} killed, {survived} survived, {errors} without a verdict")
    return 0


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")[:120]


if __name__ == "__main__":
    sys.exit(main())
