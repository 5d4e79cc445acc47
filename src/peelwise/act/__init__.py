"""Actions: what can be done about a block, each usable by itself. Needs torch and nothing else of peelwise.

Whether an action helps is another question; ``docs/actions.md`` has what was measured.
"""

from peelwise.act.blocks import block_modules
from peelwise.act.folders import drop_blocks, scale_blocks
from peelwise.act.rates import RateMap, check_groups, factors_of, param_groups
from peelwise.act.rules import all_blocks, by_importance, growth, random_blocks
from peelwise.act.schedule import BlockSchedule
from peelwise.act.statistics import weights_from
from peelwise.act.witness import AppliedWitness, apply_witness_

__all__ = [
    "AppliedWitness",
    "BlockSchedule",
    "RateMap",
    "all_blocks",
    "apply_witness_",
    "block_modules",
    "by_importance",
    "check_groups",
    "drop_blocks",
    "factors_of",
    "growth",
    "param_groups",
    "random_blocks",
    "scale_blocks",
    "weights_from",
]
