"""Data sets of the hub by `datasets`, without its patience where nothing answers."""

from __future__ import annotations

from typing import Any

from tokred.eval.hub import impatient

__all__ = ["load_data_set"]


def load_data_set(name: str, config: str | None, **settings: Any) -> Any:
    """`datasets.load_dataset`. Where the hub does not answer in seconds, only the cache is looked into.

    Raises:
        Exception: any of `datasets`; `tokred.eval.hub.unreachable` tells those of a hub that is not there.
    """
    import datasets
    from huggingface_hub import constants

    with impatient(name):
        before = datasets.config.HF_HUB_OFFLINE  # a copy of the hub's switch, made when `datasets` is imported
        datasets.config.HF_HUB_OFFLINE = before or constants.HF_HUB_OFFLINE
        try:
            return datasets.load_dataset(name, config, **settings)
        finally:
            datasets.config.HF_HUB_OFFLINE = before
