"""The processes of one evaluation: one, or those that `accelerate launch` or torchrun started."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokred.core.errors import InvalidParameterError
from tokred.eval.bench import require
from tokred.eval.hub import brief
from tokred.eval.report import dumps

__all__ = ["Processes", "finish", "join"]


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank, count: 0 to count - 1. device: of this one.
    """

    rank: int
    count: int
    device: torch.device
    _state: Any = None

    @property
    def first(self) -> bool:
        """Whether it is the one that claims the folder, prints and writes the results."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all have come here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def leave(self) -> None:
        """No process waits for this one any more."""
        if self._state is not None:
            self._state.destroy_process_group()


def finish(processes: Processes, results: dict[str, Any], out: Path, began: float) -> dict[str, Any]:
    """Note the seconds since `began`, write results.json whole or not at all, and let the other processes go."""
    results["seconds"] = round(time.perf_counter() - began, 1)
    half = out / "results.part"
    half.write_text(dumps(results) + "\n", encoding="utf-8")
    os.replace(half, out / "results.json")
    processes.leave()
    return results


def join(device: str | None = None) -> Processes:
    """Find the other processes, if the environment names any.

    Args:
        device: "cpu", "cuda" ...; None is CUDA where there is one. Of several processes each has its own, and
            "cuda:1" is refused.

    Raises:
        InvalidParameterError: no such device here. MissingExtraError: several processes without accelerate.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        require("eval", "accelerate", what="an evaluation by several processes")
        from accelerate import PartialState

        wanted = _device(device, several=True)
        on_cpu = wanted.type == "cpu"
        state = PartialState(cpu=on_cpu)  # without it accelerate starts no group of CPU processes
        return Processes(state.process_index, state.num_processes, state.device, state)
    return Processes(0, 1, _device(device))


def _device(name: str | None, several: bool = False) -> torch.device:
    """A device that is here; of `several` processes without a number."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if several and found.index is not None:
            raise InvalidParameterError(
                f"--device {name}: each of several processes takes a device of its own; say --device {found.type}, and "
                "which GPUs may be taken by CUDA_VISIBLE_DEVICES"
            )
        if not several or not torch.cuda.is_available():  # those on other GPUs need no memory of the first
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InvalidParameterError(f"--device {name}: {brief(error)}; expected cpu, cuda or cuda:N") from error
    return found
