"""bertray: a frozen BERT over your text once, linear heads on the vectors, judged and served, on Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertray.errors import BertrayError
    from bertray.explorer import explore
    from bertray.pipeline import run
    from bertray.predict import load
    from bertray.publication import publish
    from bertray.spec import Spec, load_spec

__version__ = "0.1.0"
__all__ = ["BertrayError", "Spec", "explore", "load", "load_spec", "publish", "run"]

_HOMES = {
    "BertrayError": "errors",
    "Spec": "spec",
    "explore": "explorer",
    "load": "predict",
    "load_spec": "spec",
    "publish": "publication",
    "run": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import bertray` itself loads neither torch nor Ray."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"bertray.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'bertray' has no attribute {name!r}")
