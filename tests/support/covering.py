"""Covering arrays: few combinations in which every two choices of different factors meet."""

import itertools
from collections.abc import Mapping, Sequence


def pairwise(factors: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Rows naming one choice per factor; each pair of choices is in at least one row. Greedy."""
    names = list(factors)
    open_pairs = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
    }
    rows = []
    while open_pairs:
        first = min(open_pairs, key=sorted)
        row = dict(first)
        for name in names:
            if name in row:
                continue
            row[name] = max(
                factors[name],
                key=lambda choice, name=name: sum(
                    frozenset([(name, choice), taken]) in open_pairs for taken in row.items()
                ),
            )
        open_pairs -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: row[name] for name in names})
    return rows
