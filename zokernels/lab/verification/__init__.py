"""What `zokernels verify` runs: is what this machine computes what the specification says?

`passes` holds every backend against the reference, `reference` that against exact arithmetic,
`noise` looks at the noise, and `training`, `drift` and `replay` at whole runs. `plan` lists all
cases, each with an id by which it can be run alone.
"""

from zokernels.lab.verification.case import Case, Failed, Outcome
from zokernels.lab.verification.plan import Plan, matches, plan

__all__ = ["Case", "Failed", "Outcome", "Plan", "matches", "plan"]
