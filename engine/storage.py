"""The memories' files."""

import json
import os
from zipfile import BadZipFile

import numpy as np


def write(path, keys, rest):
    """One .npz without pickle: the keys of all slots one after another, and the rest as JSON."""
    meta = [[name, len(slot_keys), rest[name]] for name, slot_keys in keys.items()]
    stacked = np.vstack(list(keys.values())) if keys else np.empty((0, 0), np.float32)
    with open(f"{path}.tmp", "wb") as file:
        blob = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez_compressed(file, keys=stacked, meta=blob)
    os.replace(f"{path}.tmp", path)  # a reader never sees half a file


def read(path):
    """[(slot, keys [n, d], rest)] of a file that `write` made."""
    try:
        with np.load(path, allow_pickle=False) as file:
            stacked = file["keys"]
            meta = json.loads(file["meta"].tobytes())
        slots = []
        first = 0
        for name, count, rest in meta:
            slots.append((name, stacked[first : first + count], rest))
            first += count
        if first != len(stacked):
            raise ValueError("its parts do not fit together")
        return slots
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path}: damaged or missing memory file ({error})") from error
