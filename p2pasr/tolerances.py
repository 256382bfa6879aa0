"""How far honest re-runs of a run's segments may lie apart, by the precision that its task computes in.

In float32 the manifest's defaults are a margin above what was measured. Where a task rounds more coarsely, a value
that falls to the other side of a rounding on other hardware is off by as much as what was rounded, and some steps
later so is everything: such runs get limits of their own. docs/threat-model.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from p2pasr.errors import LocalError
from p2pasr.protocol.manifest import VerifySection

COARSE_CLOSE: Final = 0.2
"""`verify.close` of tasks that compute with fewer bits: the largest error of honest bf16 that was measured is 0.17."""

COARSE_FAR: Final = 0.7
"""Their `verify.far`: more than three times as much."""

_FULL: Final = {"precision": "fp32", "quantise": "none", "optimizer": "adamw"}
"""Settings of `task.config` that change how values are rounded, at what they are in float32."""


def coarse_settings(config: Mapping[str, Any]) -> str:
    """The settings of a `task.config` with which it computes in fewer bits than float32, for people; "" if none."""
    return ", ".join(f"{key}: {config[key]}" for key, full in _FULL.items() if config.get(key, full) != full)


def tolerant(verify: VerifySection, config: Mapping[str, Any]) -> VerifySection:
    """A run's `verify` section with limits that honest hardware keeps.

    Args:
        verify: with the limits that the run's author wrote, or none.
        config: the run's `task.config`.

    Raises:
        LocalError: segments are re-run, and the author's limits are tighter than honest hardware keeps.
    """
    coarse = coarse_settings(config)
    if not coarse:
        return verify
    measured = {"close": COARSE_CLOSE, "far": COARSE_FAR}
    given = verify.model_fields_set & measured.keys()
    chosen = verify.model_copy(update={name: value for name, value in measured.items() if name not in given})
    for name, least in measured.items():
        if verify.rate > 0 and getattr(chosen, name) < least:
            raise LocalError(
                f"verify.{name} ({getattr(chosen, name):g}) blames honest hardware in a task with {coarse}, which "
                f"needs {least:g} or more; leave close and far out, train in fp32, or set verify.rate to 0"
            )
    return chosen
