"""Reading model folders that may be damaged or foreign: whatever is wrong with one is told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from research.errors import InputError, first_line

# Past these a model can be neither built nor held: what says so is a damaged file.
MOST_LAYERS = 1000
LARGEST_SIZE = 1 << 24
COUNT_PREFIXES = ("num_", "n_")
COUNT_SUFFIXES = ("_size", "_layers", "_heads", "_dim", "_embeddings", "_positions")


@contextmanager
def refusing(complaint: str) -> Iterator[None]:
    """Turn whatever a library raises for a file it cannot use into one line: the complaint and the reason.

    Every exception counts: tokenizers raises none more exact than Exception, and behind its and
    transformers' calls a damaged file ends in errors of any kind, lack of memory among them.

    Raises:
        InputError: the block failed.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{complaint}: {first_line(error)}") from error
    except BaseException as error:
        # A panic of tokenizers or safetensors, which are written in Rust; its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{complaint}: {first_line(error)}") from error


def check_sizes(config: Any) -> None:
    """Raise ValueError when a configuration asks for a model that nothing can hold.

    Building such a model takes all memory, or for ever, before any library looks at the weights.
    """
    for name, value in vars(config).items():
        if not name.startswith(COUNT_PREFIXES) and not name.endswith(COUNT_SUFFIXES):
            continue
        most = MOST_LAYERS if name.endswith("layers") or name == "n_layer" else LARGEST_SIZE
        if isinstance(value, int) and value > most:
            raise ValueError(f"config.json says {name} is {value}; expected at most {most}")
