"""Many students from one cache: ``run_sweep(recipe)`` trains every row of the recipe's section `sweep`."""

from kdcache.sweep.run import run_sweep

__all__ = ["run_sweep"]
