"""What the attacks by real processes, and those on every kind of task, start from."""

from tests.swarm.conftest import fleet, folder, make_run, shards
from tests.unit.conftest import labelled, language_model

__all__ = ["fleet", "folder", "labelled", "language_model", "make_run", "shards"]
