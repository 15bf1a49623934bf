"""Kept for recipes, those in run folders too, that import it from here; it is `nndist.data.shards`."""

from .data.shards import Example, Sharded, write_shards

__all__ = ["Example", "Sharded", "write_shards"]
