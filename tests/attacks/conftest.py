"""What the attacks by real processes start from."""

from tests.swarm.conftest import fleet, folder, make_run, shards

__all__ = ["fleet", "folder", "make_run", "shards"]
