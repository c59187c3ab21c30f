"""kdcache: offline knowledge distillation. Run the teacher once, share its cache, train many students.

Everything is imported on first use: ``import kdcache`` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.cache.hub import publish
    from kdcache.cache.merge import merge
    from kdcache.cache.reader import Cache, Split
    from kdcache.cache.share import pull, push
    from kdcache.cache.store import open_cache
    from kdcache.cache.subset import subset
    from kdcache.cache.verify import verify
    from kdcache.errors import KdcacheError
    from kdcache.recipe import Recipe, load_recipe
    from kdcache.student.distill import distill
    from kdcache.teacher.capture import capture

__version__ = "0.1.0"
__all__ = [
    "Cache",
    "KdcacheError",
    "Recipe",
    "Split",
    "capture",
    "distill",
    "load_recipe",
    "merge",
    "open_cache",
    "publish",
    "pull",
    "push",
    "subset",
    "verify",
]

_HOME = {
    "Cache": "kdcache.cache.reader",
    "Split": "kdcache.cache.reader",
    "open_cache": "kdcache.cache.store",
    "push": "kdcache.cache.share",
    "pull": "kdcache.cache.share",
    "publish": "kdcache.cache.hub",
    "subset": "kdcache.cache.subset",
    "merge": "kdcache.cache.merge",
    "verify": "kdcache.cache.verify",
    "KdcacheError": "kdcache.errors",
    "Recipe": "kdcache.recipe",
    "load_recipe": "kdcache.recipe",
    "distill": "kdcache.student.distill",
    "capture": "kdcache.teacher.capture",
}


def __dir__() -> list[str]:
    return [*__all__, "errors", "views", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("errors", "views"):
        return import_module(f"kdcache.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
