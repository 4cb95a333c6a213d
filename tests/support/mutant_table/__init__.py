"""The faults that the suite must notice: each a mistake that libraries of this kind have made.

By what they are faults of; those of rounding, right in fp32, in a file of their own.
"""

from __future__ import annotations

from tests.support.mutant_table.activations import ACTIVATIONS
from tests.support.mutant_table.attention import ATTENTION
from tests.support.mutant_table.losses import LOSSES
from tests.support.mutant_table.norms import NORMS
from tests.support.mutant_table.ops import OPS
from tests.support.mutant_table.rounding import ROUNDING
from tests.support.mutant_table.runtime import RUNTIME

MUTANTS = (*NORMS, *ACTIVATIONS, *LOSSES, *ATTENTION, *RUNTIME, *OPS, *ROUNDING)
