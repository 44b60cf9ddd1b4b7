"""Time a peer's training from the beginning of its first step to the end of its last."""

import time
from typing import Any

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Seconds between the first step's beginning and the last one's end."""

    started = ended = 0.0

    @property
    def seconds(self) -> float:
        """The time between."""
        return self.ended - self.started

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start at the first step."""
        self.started = self.started or time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop at the last step."""
        self.ended = time.perf_counter()
