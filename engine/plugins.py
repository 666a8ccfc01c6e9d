"""Find the class of a fork: `--algorithm my_idea.py`, `--env my_world.py`."""

import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path

from engine.errors import first_line, unknown

ROOT = Path(__file__).parent.parent
checksums = {}  # name as it was given -> SHA-256 of the file that was loaded


def is_file(name):
    """Is it the path of a Python file, and not a name?"""
    return str(name).endswith(".py")


def place(name, folder):
    """The file that is meant by a path, or by the name of a file in a folder of the root."""
    return Path(name).resolve() if is_file(name) else ROOT / folder / f"{name}.py"


def find_class(name, base, folder):
    """The one subclass of `base` in a file: a path, or the name of a file in a folder of the root.

    Its checksum is kept in `checksums`. Raises ValueError with one line.
    """
    path = place(name, folder)
    if not is_file(name):
        known = sorted(file.stem for file in path.parent.glob("*.py"))
        if name not in known:
            raise unknown(base.__name__.lower(), name, [*known, "path/to/file.py"])
    if not path.is_file():
        raise ValueError(f"{name}: there is no such file")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    module_name = f"{path.stem}_{checksum[:8]}" if is_file(name) else f"{folder}.{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses and pickle look it up there
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a user's file leads to
            del sys.modules[module_name]
            frames = [
                f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
            ]
            line = frames[-1].lineno if frames else getattr(error, "lineno", "?")
            raise ValueError(
                f"{path}, line {line}: {type(error).__name__}: {first_line(error)}"
            ) from error
    classes = [cls for cls in vars(sys.modules[module_name]).values() if inspect.isclass(cls)]
    own = [cls for cls in classes if issubclass(cls, base) and cls.__module__ == module_name]
    found = [cls for cls in own if not any(cls in other.__bases__ for other in own)]
    if len(found) != 1:
        names = ", ".join(cls.__name__ for cls in found) or "none"
        raise ValueError(f"{path}: needs one subclass of {base.__name__}; it has {names}")
    for cls in own:
        for method in vars(cls).keys() - set(dir(base)):
            meant = difflib.get_close_matches(method, dir(base), 1, cutoff=0.85)
            if meant:
                raise ValueError(f"{path}: {method} overrides nothing; did you mean {meant[0]}?")
    checksums[name] = checksum
    return found[0]


def where(error):
    """The file and line of a fork that an exception came through, in brackets; else nothing."""
    files = [str(place(name, "")) for name in checksums if is_file(name)]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
