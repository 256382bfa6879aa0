"""`python -m p2pasr.verify`: the same commands as `p2pasr verify`."""

from __future__ import annotations

from p2pasr.cli import run_app
from p2pasr.cli.verify import app

if __name__ == "__main__":
    run_app(app, "python -m p2pasr.verify")
