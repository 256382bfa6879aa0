"""One tree of errors. Which branch an error is on says whose fault it was and what may follow from it.

* :class:`LocalError` – something here is wrong and the person at this machine can mend it.
* :class:`RemoteError` – a message from a peer. ``Ignore``: late or duplicate, nobody's fault.
  ``Reject``: provably bad, and the only branch that may ever become evidence.
* :class:`TransportError` – a peer or the network did not answer in time. Nobody can be blamed for it.

Every message is one sentence that says what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class P2pasrError(Exception):
    """Base of everything this library raises on purpose."""


class LocalError(P2pasrError):
    """A configuration, a file or the machine is wrong here; the message says how to mend it."""


class NonFiniteStep(LocalError):
    """A training step produced NaN or infinity; nothing of the round may leave this peer."""


class RemoteError(P2pasrError):
    """A message from a peer was not used."""


class Ignore(RemoteError):
    """The message is late, early or a duplicate: not used, and not held against its sender."""


class Reject(RemoteError):
    """The message breaks a rule in a way that its sender must have known."""


class TransportError(P2pasrError):
    """A peer, the network process or the network did not answer in time."""


class LinkDown(TransportError):
    """The network process died; it is restarted and the round is tried again."""


class RoundFailed(TransportError):
    """A round could not be finished; the state before it still stands. The message says why."""
