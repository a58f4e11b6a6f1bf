"""How many random examples: few and always the same, or, with ``HETEGEN_EXAMPLES=1000``, that many new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

_WANTED = os.environ.get("HETEGEN_EXAMPLES")


def random_models(examples: int) -> settings:
    """Settings of a test whose every example compiles a model; ``examples`` unless the environment says."""
    return settings(
        max_examples=int(_WANTED or examples),
        derandomize=_WANTED is None,
        database=None,
        deadline=None,
        print_blob=True,
        phases=[phase for phase in Phase if phase is not Phase.explain],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )
