"""The manifest: the immutable description of a run, whose digest is the run's name.

A person writes the `RunConfig` part as YAML; `p2pasr run new` adds the shards and the initial state
and so makes a `RunManifest`. Its canonical bytes are a blob like any other, so whoever knows the run
id can fetch it from any peer and check it.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Final, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from p2pasr.errors import LocalError, P2pasrError, Reject
from p2pasr.protocol.cohorts import MAX_BITS
from p2pasr.protocol.encoding import MAX_DEPTH, MEBIBYTE, blob_digest, pack, unpack
from p2pasr.protocol.messages import PeerId

FORMAT: Final = "p2pasr-run/1"
"""What a manifest says that it is."""

MAX_MANIFEST_BYTES: Final = 16 * MEBIBYTE
"""Longest manifest: about 100,000 shards."""

MAX_PARTS: Final = 8192
"""Parts that a delta may be cut into, so that one receipt can name them all with a full group for each."""

MAX_CONFIG_DEPTH: Final = MAX_DEPTH - 2
"""Levels that `task.config` may nest; it is two levels down in the manifest itself."""

HexDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


M = TypeVar("M", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TaskSection(_Section):
    """What is trained. `config` belongs to the task of this kind, which checks it itself."""

    kind: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,63}$")]
    config: dict[str, Any] = Field(default_factory=dict)

    @field_validator("config", mode="before")
    @classmethod
    def _storable(cls, config: Any) -> Any:
        return _storable(config, ()) if isinstance(config, dict) else config


class RoundSection(_Section):
    """How much is trained between two averages."""

    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    """Rounds in the whole run; the learning rate's schedule spans them."""
    segments: Annotated[int, Field(ge=1, le=1024)] = 4
    """Most segments a peer trains in a round; slower peers do fewer."""
    steps_per_segment: Annotated[int, Field(ge=1, le=100_000)] = 25
    samples_per_step: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Examples in one optimizer step, whatever micro-batches a peer's memory allows."""
    shards_per_peer: Annotated[int, Field(ge=1, le=128)] = 4
    """Shards assigned to each peer for a round."""
    max_seconds: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """A peer starts no further segment when it would end later than this after its first."""
    grace_seconds: Annotated[float, Field(gt=0, le=3_600)] = 30.0
    """How long claims of peers that still train are awaited after that."""
    min_peers: Annotated[int, Field(ge=1, le=1024)] = 1
    """A round is neither started nor averaged with fewer peers."""


class OuterSection(_Section):
    """How the average of the deltas moves the shared parameters."""

    kind: Literal["fedavg", "fedavgm", "nesterov", "fedadam"] = "fedavg"
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of `fedavgm` and `nesterov`; β₁ of `fedadam`."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Of `fedadam`, as β₂."""
    restart_rounds: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """Every so many rounds the optimizer forgets its moments and starts anew from the parameters; null for never."""

    def restarts(self, first: int, last: int) -> bool:
        """Whether one of these rounds, `last` included, begins with a fresh optimizer."""
        every = self.restart_rounds
        return every is not None and last // every * every >= max(first, 1)


class RuleSection(_Section):
    """How several deltas become one; `p2pasr.averaging.rules` says what each tolerates."""

    kind: Literal["mean", "trimmed-mean", "median", "krum", "centered-clip"] = "mean"
    clip_norm: Annotated[float, Field(ge=1)] | None = 2.0
    """No part counts with a norm above this multiple of the median of the group's; null for no limit."""
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """Share of values that `trimmed-mean` leaves out at each end."""
    hostile: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """Share of members that `krum` allows for."""
    bucket: Annotated[int, Field(ge=1, le=64)] = 2
    """Members that `centered-clip` draws together and averages before it clips; 1 for none."""
    iterations: Annotated[int, Field(ge=1, le=100)] = 3
    """How often `centered-clip` moves its center."""
    radius: Annotated[float, Field(gt=0)] = 1.0
    """How far a bucket pulls `centered-clip` at most, as a multiple of the median distance from the reference."""

    @property
    def needs_reference(self) -> bool:
        """Whether the rule starts from the last round's aggregate, which the state then holds."""
        return self.kind == "centered-clip"


class AveragingSection(_Section):
    """How deltas are encoded and merged."""

    rule: RuleSection = RuleSection()

    codec: Literal["float32", "float16", "int8", "int4"] = "float16"
    block: Annotated[int, Field(ge=16, le=65_536)] = 256
    """Values that share one scale in `int8` and `int4`."""
    part_values: Annotated[int, Field(ge=256, le=1 << 22)] = 1 << 17
    """Values in one part, the unit of reduction."""
    weight_cap: Annotated[float, Field(ge=1)] = 4.0
    """No claim weighs more than this multiple of the median claim."""
    probation_rounds: Annotated[int, Field(ge=0, le=1_000_000)] = 4
    """Rounds' worth of merged audio until a peer's claims weigh in full; a newcomer's weigh a quarter. 0 for none."""
    max_group: Annotated[int, Field(ge=2, le=64)] = 64
    """Peers that average together; a swarm of more splits into cohorts."""
    mix_rounds: Annotated[int, Field(ge=2, le=1024)] = 8
    """Every so many rounds the cohorts are mixed into one state again, which takes a round."""
    first_bits: Annotated[int, Field(ge=0, le=MAX_BITS)] = 0
    """The run begins with 2 to this power cohorts, for runs that a crowd joins before the first round."""
    outer: OuterSection = OuterSection()

    @property
    def excises(self) -> bool:
        """Whether a banned peer's last work can be taken out: what it did to the state is a term of a sum."""
        return self.rule.kind == "mean" and self.outer.kind == "fedavg"

    @model_validator(mode="after")
    def _parts_hold_whole_blocks(self) -> AveragingSection:
        if self.part_values % self.block:
            raise ValueError(f"part_values ({self.part_values}) must be a multiple of block ({self.block})")
        return self


class DataSection(_Section):
    """Whose the shards are, and how they are shared out."""

    policy: Literal["shared", "private"] = "shared"
    """`shared`: every member may fetch every shard, so that others can re-run what was trained on it. `private`: each
    peer trains on shards of its own, which never leave it; the run's shards are a public probe of what they learn."""
    redundancy: Annotated[int, Field(ge=1, le=64)] = 1
    """A shard counts as covered in an epoch when this many merged claims name it."""
    duplicates: Literal["average", "first"] = "average"
    """When several claims of one round name a shard: `average` counts all, `first` the lowest digest."""
    probe_margin: Annotated[float, Field(gt=0, le=10)] = 0.05
    """Of `private`: by what share of the loss on the probe a claim's delta alone may raise it."""
    private_weight_seconds: Annotated[float, Field(ge=1, le=86_400)] = 600.0
    """Of `private`: no claim counts for more seconds of audio, since nobody else can see how many there are."""

    @model_validator(mode="after")
    def _only_shared_shards_are_covered(self) -> DataSection:
        if self.policy == "private" and (self.redundancy, self.duplicates) != (1, "average"):
            raise ValueError("redundancy and duplicates are about shared shards; leave them out with policy: private")
        return self


class VerifySection(_Section):
    """How much of what peers claim is done again by others."""

    rate: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of the claims that each of their auditors re-runs a segment of. 0 switches re-runs off."""
    auditors: Annotated[int, Field(ge=1, le=16)] = 1
    """Members of a round that may be drawn to audit each of its claims."""
    parts: Annotated[int, Field(ge=0, le=64)] = 1
    """Parts of a reducer's share that the member drawn for it reduces again, bit for bit."""
    reductions: Annotated[float, Field(ge=0, le=1)] = 1 / 64
    """Share of the reducers of a round of whose parts one member reduces some again. Each part is then had from all
    of its senders, so that the parts fetched are at most half of this rate of what averaging transfers."""
    links: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the other claims whose last checkpoint one member compares with the delta. Each costs its transfer:
    twelve bytes a trained value, so that runs of large models lower it."""
    close: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """A re-run on other hardware whose relative error is at most this is taken for the same. Left out, this and `far`
    are 0.2 and 0.7 in tasks that compute in fewer bits than float32."""
    far: Annotated[float, Field(gt=0, lt=1)] = 5e-3
    """From this error on it is proof of cheating; between the two nobody can tell, and nobody is blamed."""
    strikes: Annotated[int, Field(ge=0, le=64)] = 2
    """Strikes, for withholding and false accusations, from which on a peer is suspended. 0 switches strikes off."""
    suspend_rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Rounds after its last strike in which a suspended peer takes no part."""
    strike_rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    """Rounds after its last strike in which a peer's strikes count."""

    @model_validator(mode="after")
    def _a_gap_lies_between(self) -> VerifySection:
        if self.far < 3 * self.close:
            raise ValueError(f"far ({self.far}) must be at least three times close ({self.close}); raise the one")
        return self

    @model_validator(mode="after")
    def _strikes_outlast_suspension(self) -> VerifySection:
        if self.suspend_rounds > self.strike_rounds:
            raise ValueError(
                f"suspend_rounds ({self.suspend_rounds}) must be at most strike_rounds ({self.strike_rounds}), after "
                f"which the strikes are forgotten; lower the one or raise the other"
            )
        return self


class AdmissionSection(_Section):
    """Who may take part."""

    kind: Literal["open", "allowlist", "invite"] = "open"
    """`open`: whoever comes. `allowlist`: the peers listed here, and nobody else's claims and votes count. `invite`:
    the peers listed here, the founders, and those whom members invite."""
    peers: Annotated[tuple[PeerId, ...], Field(max_length=4096, strict=False)] = ()
    """Peer IDs, as `p2pasr id` prints them."""
    invite_credit_rounds: Annotated[int, Field(ge=0, le=1_000_000)] = 4
    """Rounds' worth of merged audio from which on a member that is no founder may invite others."""
    invites_per_peer: Annotated[int, Field(ge=1, le=4096)] = 8
    """Guests that one member can bring."""
    work_bits: Annotated[int, Field(ge=0, le=32)] = 0
    """Leading zero bits of the proof of work that a key needs to count: 2 to this power hashes, once. 0 for none."""
    newcomers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Claims of peers without credit that count in one group, as soon as somebody in it has credit; null for all."""
    newcomer_share: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    """Most that peers early in their probation weigh together, of a group's whole weight; null for no limit."""

    @model_validator(mode="after")
    def _the_list_is_used(self) -> AdmissionSection:
        if (self.kind != "open") != bool(self.peers):
            raise ValueError("peers are listed with kind: allowlist or kind: invite, and only with these")
        return self


class RetentionSection(_Section):
    """How long a peer keeps what it could be asked for."""

    checkpoint_rounds: Annotated[int, Field(ge=3, le=1000)] = 3
    """Rounds whose checkpoints, delta and average are kept: so far back work is audited, and a cheat's taken out. In
    the second round after theirs, whoever opens nothing has a strike."""
    state_rounds: Annotated[int, Field(ge=2, le=1_000_000)] = 8


class RunConfig(_Section):
    """What a person decides about a run."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    """For people. Printable, since it appears on the terminals of strangers."""
    task: TaskSection
    rounds: RoundSection
    data: DataSection = DataSection()
    averaging: AveragingSection = AveragingSection()
    retention: RetentionSection = RetentionSection()
    verify: VerifySection = VerifySection()
    admission: AdmissionSection = AdmissionSection()
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError(f"{name!r:.60} is not one line of printable text")
        return name

    @model_validator(mode="after")
    def _private_work_is_clipped(self) -> RunConfig:
        if self.data.policy == "private" and self.averaging.rule.clip_norm is None:
            raise ValueError(
                "averaging.rule.clip_norm is null; with data.policy: private a number must limit how far one claim "
                "moves the average, for it is measured on the probe only afterwards"
            )
        return self

    @model_validator(mode="after")
    def _a_group_is_large_enough(self) -> RunConfig:
        least, most = self.rounds.min_peers, self.averaging.max_group
        if least > most:
            raise ValueError(
                f"rounds.min_peers ({least}) is more than averaging.max_group ({most}), so that no group could "
                f"ever average; lower the one or raise the other"
            )
        return self


class ShardRef(_Section):
    """A shard of the run: its name, and what weights and size limits are computed from."""

    digest: HexDigest
    bytes: Annotated[int, Field(ge=1, le=1 << 40)]
    clips: Annotated[int, Field(ge=1)]
    seconds: Annotated[float, Field(gt=0, le=1e9)]
    dialect: Annotated[str, StringConstraints(max_length=64)]
    longest: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Seconds of its longest clip, with which the memory to train it grows; null where it has no clips."""


class RunManifest(RunConfig):
    """A run, complete: everything two strangers need to compute the same states."""

    format: Literal["p2pasr-run/1"] = FORMAT
    shards: Annotated[tuple[ShardRef, ...], Field(min_length=1, max_length=100_000, strict=False)]
    initial: HexDigest
    """Digest of the initial parameters; each peer computes them itself and compares."""
    parameters: Annotated[int, Field(ge=1, le=1 << 33)]
    """Number of trained values, from which the sizes of deltas and states follow."""

    @model_validator(mode="after")
    def _shards_differ(self) -> RunManifest:
        if len({shard.digest for shard in self.shards}) != len(self.shards):
            raise ValueError("shards are listed twice; leave recordings that repeat others out of the input")
        return self

    @model_validator(mode="after")
    def _receipts_can_name_all_parts(self) -> RunManifest:
        part_values = self.averaging.part_values
        if self.parameters > MAX_PARTS * part_values:
            raise ValueError(
                f"averaging.part_values ({part_values}) cuts {self.parameters} trained values into more than "
                f"{MAX_PARTS} parts; set it to {-(-self.parameters // MAX_PARTS)} or more"
            )
        return self

    def canonical(self) -> bytes:
        """The manifest's blob: canonical msgpack."""
        return pack(self.model_dump())

    @property
    def run_id(self) -> bytes:
        """BLAKE3 of the canonical bytes, 32 bytes: the name of the run."""
        return blob_digest(self.canonical())

    @cached_property
    def clip_lengths(self) -> dict[str, float]:
        """Hex digest of a shard → seconds of its longest clip, of those that have clips."""
        return {shard.digest: shard.longest for shard in self.shards if shard.longest is not None}

    @cached_property
    def most_seconds_per_round(self) -> float:
        """The most seconds of audio that one round can merge: full groups in as many cohorts as there can be."""
        return self.most_seconds_per_group * (1 << MAX_BITS)

    @cached_property
    def most_seconds_per_group(self) -> float:
        """The most that a group can merge in one round: every member has the longest shards."""
        if self.data.policy == "private":
            return self.averaging.max_group * self.data.private_weight_seconds
        longest = sorted((shard.seconds for shard in self.shards), reverse=True)
        return self.averaging.max_group * sum(longest[: self.rounds.shards_per_peer])

    @cached_property
    def seconds_per_assignment(self) -> float:
        """Seconds of audio that the shards assigned to a peer for one round hold on average; the most, if private."""
        if self.data.policy == "private":
            return self.data.private_weight_seconds
        return fmean(shard.seconds for shard in self.shards) * min(self.rounds.shards_per_peer, len(self.shards))

    def write(self, path: Path) -> None:
        """Write the manifest for people to read and share, as JSON."""
        path.write_text(json.dumps(self.model_dump(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_config(path: Path) -> RunConfig:
    """Read a run's configuration from YAML.

    Raises:
        LocalError: not readable, not YAML, or with the place and the reason of the first bad key.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_YamlLoader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise LocalError(f"the configuration {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or the 30th of February
        raise LocalError(f"the configuration {path} is not YAML ({' '.join(str(error).split())})") from error
    if isinstance(content, dict) and content.get("format") == FORMAT:
        raise LocalError(f"{path} is a run's manifest already, not a configuration; peers take it with --run")
    return validated(RunConfig, content, str(path))


def read_manifest(path: Path) -> RunManifest:
    """Read a manifest file that `p2pasr run new` wrote.

    Raises:
        LocalError: not readable, or not a manifest.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LocalError(f"the manifest {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise LocalError(f"the manifest {path} is not JSON ({error})") from error
    return validated(RunManifest, content, str(path))


def parse_manifest(blob: bytes) -> RunManifest:
    """Read a manifest that came from a peer.

    Raises:
        Reject: too long, not canonical, or not a manifest.
    """
    manifest = validated(RunManifest, unpack(blob, MAX_MANIFEST_BYTES), "the manifest", Reject)
    if manifest.canonical() != blob:
        raise Reject("the manifest is not in canonical form")
    return manifest


def validated(model: type[M], content: Any, where: str, failure: type[P2pasrError] = LocalError) -> M:
    """Check content against a pydantic model.

    Args:
        where: what the content is, for the sentence.
        failure: what is raised.

    Raises:
        P2pasrError: the first problem, as one sentence that names the key.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise failure(_sentence(error, where)) from error


_PLAINER: Final = {
    "dict_type": "input should be a map of keys to values",
    "model_type": "input should be a map of keys to values",
    "tuple_type": "input should be a list",
}
"""What some of pydantic's errors are called here; people write YAML and not Python."""


def _sentence(error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    place = f"{where}: {key}" if key else where
    if first["type"] == "extra_forbidden":
        return f"{place} is not a known key; remove it or check its spelling"
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "value_error":  # one of ours, which says itself what it found
        return f"{place}: {first['ctx']['error']}"
    message = _PLAINER.get(first["type"], first["msg"])
    return f"{place}: {message[0].lower()}{message[1:]} (found {first['input']!r:.60})"


def _storable(value: Any, path: tuple[str, ...]) -> Any:
    """A value of `task.config` that JSON and msgpack both hold, with lists for all sequences.

    Args:
        path: the keys that lead to it.

    Raises:
        ValueError: one of them does not hold it; with its key.
    """
    where = ".".join(path)
    if len(path) > MAX_CONFIG_DEPTH:
        raise ValueError(f"{where:.60} is more than {MAX_CONFIG_DEPTH} levels deep; nest less")
    if isinstance(value, list | tuple):
        return [_storable(item, (*path, str(index))) for index, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not (isinstance(key, str) and _is_plain(key)):
                raise ValueError(f"the key {'.'.join((*path, str(key)))!r} is no text; put it in quotes")
        return {key: _storable(item, (*path, key)) for key, item in value.items()}
    if not _is_plain(value):
        raise ValueError(
            f"{where} is {value!r:.60}, which a manifest cannot hold; use text, true, false, null or a finite number "
            f"of at most 64 bits"
        )
    return value


def _is_plain(value: Any) -> bool:
    """Whether JSON and msgpack both hold this scalar."""
    try:
        pack(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bytes)


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; people mean a number."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
