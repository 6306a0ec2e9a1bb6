"""Requests and replies of the ``Shard`` protocol: what a router asks of one shard, as tensors, on no particular wire.

Legend: B bags, L pairs of all bags together, M rows asked for, W columns of the blocks named, H heads, K top-k,
D key dim. Bags are CSR: ``offsets`` [B + 1] int64, bag b holds pairs offsets[b] to offsets[b + 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from mempool.types.bags import Act, Bags

    Array = npt.NDArray[np.generic]

ReplyDtype = Literal["float32", "bfloat16", "float8_e4m3fn"]
"""What sums are answered in. float8_e4m3fn: in packed rows [B, P] uint8, a byte each, with a float32 scale per bag and
column block, as ``kernels.PackedLayout`` has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What every request says of the view it was planned with.

    Attributes:
        table_id: The table.
        epoch: Epoch of the placement the request was planned for; another one is answered ``StalePlacement``.
        incarnation: Incarnation of the shard the request was planned for; another one is answered ``StalePlacement``.
        table_version: A version that the table's gate has acknowledged to this client, or that a reply was stamped
            with; 0 if it knows of none. A shard that is behind it answers once it has caught up; ``DataLoss`` where
            the gate knows no such version: commits were lost.
    """

    table_id: int
    epoch: int
    incarnation: int
    table_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What every reply says of the shard that gave it.

    writes: Writes of rows that it has done so far, and 1; 0: it does not say. They make no version: while all of the
        stamp is the same, what is read of the shard's rows is the same to the bit.
    """

    shard: int
    incarnation: int
    epoch: int
    table_version: int
    writes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepId:
    """One rank's part in one step of its group. A client that joined no group is a group of one (rank 0).

    generation: How often the rank has gone back to an earlier step; a lower one is over, steps begin anew in each."""

    group: str
    rank: int
    step: int
    generation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteId:
    """One write of a client. Those before it that are not in ``open`` (ascending) are over: answered, or given up.

    writer: The client, a random number. number: Ascends in the life of a client, over all its tables.
    """

    writer: int
    number: int
    open: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherRequest:
    """Weighted sums of the rows this shard owns. Pairs of pages it does not own add nothing.

    Attributes:
        lookup_id: Client-wide unique number under which ids and weights are remembered.
        ids: [L] slot ids, int64 (or uint32 on the wire).
        weights: [L] float32 or bfloat16; None means all ones.
        offsets: [B + 1] int64.
        remember: Keep ids and weights for an Update to come.
        release: Lookup ids whose autograd graphs are gone: the shard forgets them.
        pin: Whose moment of the table is read, settled before; "": the newest version.
        act: Rows are experts [u, v]: of each pair act(<u, input>) * v is weighted and summed, not the row.
        inputs: [B, I] float32 or bfloat16: of each bag what u is multiplied with, the first I columns of a row. None
            without act.
        private: Nobody writes to its tensors: a shard of the same process may keep them as they are. On no wire.
        bags: Whose ids, weights and offsets these are, where they are private: what is made of them for one shard is
            there for the next that is asked for the same. On no wire.
    """

    envelope: Envelope
    lookup_id: int
    ids: Tensor
    weights: Tensor | None
    offsets: Tensor
    remember: bool
    release: tuple[int, ...] = ()
    reply_dtype: ReplyDtype = "float32"
    pin: str = ""
    act: Act = ""
    inputs: Tensor | None = None
    private: bool = False
    bags: Bags | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherReply:
    """``values`` [B, W] (float32; bfloat16 or packed rows when asked), the columns of ``blocks`` side by side,
    ascending; of experts [B, W - I], float32 or bfloat16."""

    stamp: Stamp
    blocks: tuple[int, ...]
    values: Tensor


class ArrayGather(NamedTuple):
    """A ``GatherRequest`` whose answer is to be float32, as arrays: of a small one on the CPU, to make a tensor costs
    as much as to sum a bag. A named tuple, which the interpreter's own code makes.

    Attributes:
        ids: [L] uint32.
        weights: [L] float32; None: all ones.
        offsets: [B + 1] int64.
        private: Nobody writes to the arrays.
        pin: As of a ``GatherRequest``.
    """

    envelope: Envelope
    lookup_id: int
    ids: Array
    weights: Array | None
    offsets: Array
    remember: bool
    release: tuple[int, ...]
    private: bool
    pin: str = ""


class ArrayGathered(NamedTuple):
    """A ``GatherReply``. values: [B, W] float32, contiguous."""

    stamp: Stamp
    blocks: tuple[int, ...]
    values: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRequest:
    """The gradient of one lookup.

    Attributes:
        sequence: Number of this update in the life of (group, rank), ascending; a repeat is answered as before.
        lookup_id: The lookup it is the gradient of.
        lookups: Of so many lookups, numbered on from ``lookup_id``, the bags one after the other; 0 is 1.
        blocks: Blocks whose columns ``grads`` has: all that this shard owns any page of, ascending.
        grads: [B, W] float32 or bfloat16, or packed rows [B, P] uint8; d loss / d pooled values.
        hold: Keep it as pending for the step's Commit. False for a frozen table: only d_weights are computed.
        want_weight_grad: Answer d_weights.
        ids, weights, offsets: As in the lookup; ids and offsets None where the shard should remember them itself,
            in which case a shard that does not answers ``ContextMissing`` and changes nothing.
        act, input_dim: As of the gather of experts, and I: ``grads`` has a bag's input, and beside it d loss / d sums.
            What u and v get is made of the rows as they are when the update comes.
        private, bags: As of a gather.
    """

    envelope: Envelope
    step_id: StepId
    sequence: int
    lookup_id: int
    blocks: tuple[int, ...]
    grads: Tensor
    hold: bool
    want_weight_grad: bool
    lookups: int = 1
    ids: Tensor | None = None
    weights: Tensor | None = None
    offsets: Tensor | None = None
    act: Act = ""
    input_dim: int = 0
    private: bool = False
    bags: Bags | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReply:
    """``weight_grad`` [L] float32: <grads[bag], V[id]> over the columns this shard owns; None if not asked for.

    Of experts [L + B * I]: behind the gradient of the weights that of the inputs, bag by bag.
    """

    stamp: Stamp
    weight_grad: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparePart:
    """One table's part in a step that is to be prepared. sequences: the updates that this shard was sent."""

    envelope: Envelope
    step_id: StepId
    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRequest:
    """Phase one of a step: is everything here, and how large is the gradient? All or nothing; holds off page moves.

    Attributes:
        parts: The tables of the step that this shard owns anything of.
        decider_table, decider_step: The first table of the step, whose gate decides, and the step as it counts them.
        wait: Where a table is held off, answer once it is not.
        norm_order: With want_norm, of the norm that is asked for besides the squared 2-norm; 0.0: none.
        attempt: Which Prepare of the step it is, ascending; 0: not counted.
    """

    parts: tuple[PreparePart, ...]
    want_norm: bool
    decider_table: int
    decider_step: int
    wait: bool = False
    norm_order: float = 0.0
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedPart:
    """Answer to a part of Prepare; the step is prepared where no part misses anything or is held off.

    Attributes:
        missing: Sequences this shard does not hold.
        squared_norm: Sum over the shard's (slot, block)s of the squared norm of the reduced gradient; 0.0 if not asked.
        finite: No inf or NaN in the reduced gradient; True if not asked.
        applied: The step was committed before; the rest is then of no meaning.
        held_off: The table's pages are moving.
        norm: Of the shard's (slot, block)s together, of the order asked for; 0.0 if none was.
    """

    stamp: Stamp
    missing: tuple[int, ...] = ()
    squared_norm: float = 0.0
    finite: bool = True
    applied: bool = False
    held_off: bool = False
    norm: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReply:
    """One for each part, in their order."""

    parts: tuple[PreparedPart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitPart:
    """One table's part in a step that is committed.

    Attributes:
        lr: Learning rate of this step.
        grad_scale: Multiplies the reduced gradient before the optimizer sees it (clipping, unscaling, mean).
        sequences: The updates of the step; none at a decider for tables whose gate it is not.
        version: The table version that the step makes, as the table's gate has said; 0 at the gate.
    """

    envelope: Envelope
    step_id: StepId
    lr: float
    grad_scale: float
    sequences: tuple[int, ...]
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest:
    """Phase two: decide the step at its decider, or, ``decided``, apply it elsewhere, in the table's order.

    Attributes:
        parts: All tables of the step, in its order, at the decider; else those that this shard owns anything of.
        one_phase: Prepare and commit in one message, where this shard owns all: only if nothing is missing.
    """

    parts: tuple[CommitPart, ...]
    decided: bool = False
    one_phase: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedPart:
    """``missing`` is only ever non-empty with one_phase; then nothing was decided.

    version: The table version that the step makes; 0 where another shard gives it, or where an update is missing.
    """

    stamp: Stamp
    missing: tuple[int, ...] = ()
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitReply:
    """One for each part, in their order. A repeat is answered as before."""

    parts: tuple[CommittedPart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardPart:
    """A step of one table that is dropped."""

    envelope: Envelope
    step_id: StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardRequest:
    """Drop what is held of steps that were not committed, and end their Prepare.

    Attributes:
        keep_updates: End the Prepare alone.
        attempt: Then: the newest Prepare that is ended; a later one stays.
    """

    parts: tuple[DiscardPart, ...]
    keep_updates: bool = False
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardReply:
    """``discarded``: how many held updates were dropped."""

    discarded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatRequest:
    """A rank is alive: what it holds here, of all tables, stays for a lease more."""

    incarnation: int
    group: str
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatReply:
    """lease_s: Seconds of silence after which what the rank holds is dropped; updates_held: of all tables, here."""

    lease_s: float
    updates_held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Top-k of the keys this shard owns. queries: [B, H, D] float32 for product keys, [B, 1, D] for flat keys, [B,
    sections, D] of a table of keys.

    Attributes:
        pin: As of ``GatherRequest``.
        groups: Of a table of hierarchical keys: [B, G] int64, ascending, the groups whose slots are scored. None:
            groups are.
        group_scores: [B, G] float32, added to the scores of their slots; with ``groups``.
    """

    envelope: Envelope
    queries: Tensor
    topk: int
    pin: str = ""
    groups: Tensor | None = None
    group_scores: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReply:
    """Candidates by (score descending, id ascending), before any softmax.

    Attributes:
        heads: The heads answered (product keys: those whose key page is here; flat keys: (0,); sections).
        scores: [B, len(heads), K] float32; -inf where there are fewer than K.
        ids: [B, len(heads), K] int64; -1 where there are fewer than K. Rows of a table of keys; of hierarchical keys
            groups, or slots.
    """

    stamp: Stamp
    heads: tuple[int, ...]
    scores: Tensor
    ids: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRowsRequest:
    """Rows of one named array: "values", "keys", or what belongs to a trainable array, named ``<array>.<what>``.

    Optimizer state ("values.sum", "values.exp_avg"), "values.master" (float32), "values.scales", "values.last_step"
    (int32), counts of use ("values.uses", "values.last_use", int64).
    ids: [M] int64: slot ids, or head numbers for the keys of product keys.
    pin: As of ``GatherRequest``; no optimizer state is kept for it.
    """

    envelope: Envelope
    array: str
    ids: Tensor
    pin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRowsReply:
    """``rows`` [M, W] in the array's dtype, one-byte values in float32; zeros where (slot, block) is not owned here.

    W: the columns of ``blocks`` for arrays per element, one column per block for row-wise state; of block (0,) alone
    key_dim for flat keys, 1 for counts of use; 2 * n * key_dim / 2 for product keys (blocks is then ()).
    """

    stamp: Stamp
    blocks: tuple[int, ...]
    rows: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRowsRequest:
    """Overwrite rows; shapes as in ReadRowsReply, ``blocks`` as this shard owns them. Pages not owned are skipped.

    Idempotent by ``write_id``; without one, each copy is written when it comes. Atomic on one shard, not across shards.
    Waits while the table's pages are moving. Values are rounded to what is stored, to nearest, with new scales; master
    with them. "values.scales", "values.last_step" and counts of use cannot be written.

    fresh: Of "values": as of slots that were never trained. Refused while a step of the table is undecided here.
    """

    envelope: Envelope
    array: str
    ids: Tensor
    blocks: tuple[int, ...]
    rows: Tensor
    write_id: WriteId | None = None
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRowsReply:
    """The write is done."""

    stamp: Stamp


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCountRequest:
    """Asks how many steps the table's optimizer counts, or sets it: so many are done at ``at_version``."""

    envelope: Envelope
    set: int | None = None
    at_version: int = 0
    write_id: WriteId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCountReply:
    """Steps that are done."""

    stamp: Stamp
    count: int
