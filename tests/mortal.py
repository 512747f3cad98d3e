"""A model that ends its process in the middle of a search, `python:mortal:digits`, told by MORTAL=how:process:after.

`how` is kill (SIGKILL) or fail (an exception); `after` counts forward passes.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from deploy_prune.demo import digits_vit_untrained


def digits() -> Any:
    model = digits_vit_untrained()
    told = os.environ.get("MORTAL")
    if told:
        how, process, after = told.split(":")
        left = [int(after)]

        def count(*_: Any) -> None:
            left[0] -= 1
            if left[0] or os.environ.get("RANK", "0") != process:
                return
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no more of it")

        model.register_forward_pre_hook(count)
    return model
