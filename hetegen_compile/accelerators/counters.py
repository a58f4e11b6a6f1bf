"""What an accelerator counts of the bytes that it moves and holds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counters:
    """Bytes that moved and bytes that are held, by category (``weights``, ``mirrors``, ``activations``, ...).

    ``peak_bytes`` is the most that was held at once, workspace included, ``step_peak_bytes`` that of the last step.
    ``staged_bytes`` went through the pinned ring on their way up. ``trips_down`` and ``trips_up`` count the schedule's
    transfers of activations (``to_host``, ``to_accelerator``), however many values each of them moved.
    ``native_trips``: those of the worker's that were one native call each, which read ``read_ahead_bytes`` of weights
    into the processors' caches while they waited.
    ``chains_recorded`` and ``chains_replayed``: chains of launches that became one call, and how often they were.
    """

    uploaded_bytes: dict[str, int] = field(default_factory=dict)
    staged_bytes: dict[str, int] = field(default_factory=dict)
    downloaded_bytes: dict[str, int] = field(default_factory=dict)
    held_bytes: dict[str, int] = field(default_factory=dict)
    trips_down: int = 0
    trips_up: int = 0
    native_trips: int = 0
    read_ahead_bytes: int = 0
    chains_recorded: int = 0
    chains_replayed: int = 0
    peak_bytes: int = 0
    step_peak_bytes: int = 0


__all__ = ["Counters"]
