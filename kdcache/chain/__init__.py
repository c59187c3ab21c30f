"""Students that teach students: ``run_chain(recipe)`` carries out the recipe's section `chain`."""

from kdcache.chain.run import run_chain

__all__ = ["run_chain"]
