"""A task delta: what a task changes of a base model, and nothing else of it.

Positions and the exclusive or of old and new bits are stored, so that `apply` and `subtract` are one operation, exact
to the bit whatever the rounding. The task's head is not of the base: it is stored whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploy_prune.delta.positions import decode, encode, entropy_bits
from deploy_prune.errors import ArtifactError, UsageError
from deploy_prune.files import atomic_file, existing_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TYPE, VERSION = "TaskDelta", "1"
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # bytes of a value -> how its bits are seen


@dataclass(frozen=True)
class _Wanted:
    """A model that an operation needs, in words."""

    what: str
    remedy: str


_BASE = _Wanted("base model", "Load the model that the delta names, unchanged and in the same precision.")
_RESULT = _Wanted("model with this delta applied", "Load what `apply` of this very delta made, unchanged since.")


@dataclass(frozen=True)
class Change:
    """Where one tensor of the base changes: `positions` (n,) int64, rising, in the flattened tensor, and `bits` (n,),
    old bits exclusive or new bits. `base_sha256` is of the base tensor's bytes, for who has it in another file."""

    shape: tuple[int, ...]
    dtype: str
    base_sha256: str
    positions: NDArray[np.int64]
    bits: NDArray[Any]


@dataclass(frozen=True)
class TaskDelta:
    """`changes` by tensor name of the base's state dict, `head` the task's own tensors, which the base may lack.

    `base_sha256` and `result_sha256` are hashes of all base tensors before and after, without the head's. `facts` is
    JSON data about how it was made.
    """

    base_sha256: str
    result_sha256: str
    changes: Mapping[str, Change]
    head: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def between(
        base: nn.Module, result: nn.Module, head: Iterable[str] = (), facts: Mapping[str, Any] | None = None
    ) -> TaskDelta:
        """What leads from `base` to `result`, two models of equal tensors but for those named in `head`.

        Raises UsageError when other names, shapes or types differ.
        """
        own = frozenset(head)
        old, new = _tensors(base, own), _tensors(result, own)
        if unlike := _unlike(old, new):
            raise UsageError(
                "these models differ in more than values",
                problems=unlike,
                remedy="Name the task's own tensors as head.",
            )
        changes = {}
        for name, tensor in old.items():
            before, after = _bits(tensor), _bits(new[name])
            where = np.flatnonzero(before != after)
            if len(where):
                changes[name] = Change(
                    tuple(tensor.shape),
                    str(tensor.dtype).removeprefix("torch."),
                    hashlib.sha256(before.tobytes()).hexdigest(),
                    where,
                    before[where] ^ after[where],
                )
        state = result.state_dict()
        return TaskDelta(
            body_sha256(old),
            body_sha256(new),
            changes,
            {name: state[name].detach().cpu().clone() for name in sorted(own)},
            dict(facts or {}),
        )

    def apply(self, model: nn.Module) -> nn.Module:
        """Make the base `model` the task's, in place: values change, and the head becomes the task's own.

        Raises ArtifactError, and changes nothing, when `model` is not the base.
        """
        return self._flip(model, self.base_sha256, self.result_sha256, _BASE, head=True)

    def subtract(self, model: nn.Module) -> nn.Module:
        """Make the task's `model` the base again, in place, bit for bit; the head stays the task's.

        Raises ArtifactError, and changes nothing, when `model` is not what `apply` made.
        """
        return self._flip(model, self.result_sha256, self.base_sha256, _RESULT, head=False)

    def check_base(self, model: nn.Module) -> None:
        """Raise ArtifactError unless `model` is the base, whatever its head."""
        self._check(_tensors(model, frozenset(self.head)), self.base_sha256, _BASE)

    @property
    def count(self) -> int:
        """How many values of the base change."""
        return sum(len(c.positions) for c in self.changes.values())

    def sizes(self, model: nn.Module | None = None) -> dict[str, float]:
        """What the delta takes, in bytes: `positions` as coded and at their entropy (each tensor's positions drawn
        from all sets of their number), `values`, `head`. With the base `model` also its own bytes, `base`, and the
        `share` of its values that change."""
        own = self.changes.values()
        sizes: dict[str, float] = {
            "positions": sum(len(encode(c.positions, _size(c))[0]) for c in own),
            "positions_entropy": sum(entropy_bits(len(c.positions), _size(c)) for c in own) / 8,
            "values": sum(c.bits.nbytes for c in own),
            "head": sum(t.numel() * t.element_size() for t in self.head.values()),
        }
        if model is not None:
            base = _tensors(model, frozenset(self.head))
            sizes["base"] = sum(t.numel() * t.element_size() for t in base.values())
            sizes["share"] = self.count / sum(t.numel() for t in base.values())
        return sizes

    def save(self, path: Path | str) -> None:
        """Write the delta as safetensors, atomically; the same delta is always the same bytes."""
        import torch
        from safetensors.torch import save

        tensors, listed = {}, {}
        for name, c in sorted(self.changes.items()):
            coded, k = encode(c.positions, _size(c))
            tensors[f"positions/{name}"] = torch.from_numpy(coded)
            tensors[f"bits/{name}"] = torch.from_numpy(c.bits.view(np.uint8))
            own = {"shape": c.shape, "dtype": c.dtype, "base_sha256": c.base_sha256}
            listed[name] = {**own, "count": len(c.positions), "k": k}
        tensors |= {f"head/{name}": tensor.contiguous() for name, tensor in self.head.items()}
        meta = {
            "_type": TYPE,
            "_version": VERSION,
            "base_sha256": self.base_sha256,
            "result_sha256": self.result_sha256,
            "changes": listed,
            "facts": dict(self.facts),
        }
        meta["sha256"] = _digest(meta, tensors)
        with atomic_file(path) as temporary:
            temporary.write_bytes(save(tensors, {"deploy_prune": json.dumps(meta, sort_keys=True)}))

    @staticmethod
    def load(path: Path | str) -> TaskDelta:
        """Read a delta. Raises UnavailableError (no file), ArtifactError (damaged, or not a delta)."""
        from safetensors import SafetensorError, safe_open

        path = existing_file(path, "delta file")
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["deploy_prune"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if (meta["_type"], meta["_version"]) != (TYPE, VERSION):
                raise ValueError(f"type {meta['_type']!r}, version {meta['_version']!r}")
            if meta.pop("sha256") != _digest(meta, tensors):
                raise ValueError("the content is not what its sha256 says")
            changes = {}
            for name, c in meta["changes"].items():
                shape, word = tuple(c["shape"]), _WORDS[_itemsize(c["dtype"])]
                positions = decode(tensors[f"positions/{name}"].numpy(), c["k"], c["count"], int(np.prod(shape)))
                bits = tensors[f"bits/{name}"].numpy().view(word)
                if len(bits) != len(positions):
                    raise ValueError(f"{name} has {len(positions)} positions and {len(bits)} values")
                changes[name] = Change(shape, c["dtype"], c["base_sha256"], positions, bits)
            head = {key.removeprefix("head/"): t for key, t in tensors.items() if key.startswith("head/")}
            return TaskDelta(meta["base_sha256"], meta["result_sha256"], changes, head, meta["facts"])
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                "not a whole task delta",
                where=str(path),
                got=f"{type(error).__name__}: {error}"[:200],
                remedy="The file is damaged or something else; get it again or train it again.",
            ) from error

    def _flip(self, model: nn.Module, before: str, after: str, wanted: _Wanted, *, head: bool) -> nn.Module:
        import torch

        tensors = _tensors(model, frozenset(self.head))
        self._check(tensors, before, wanted)
        if head:
            self._check_head(model)
        with torch.no_grad():
            for name, c in self.changes.items():
                flat = _bits(tensors[name]).copy()
                flat[c.positions] ^= c.bits
                tensors[name].copy_(_as(flat, tensors[name]))
            if head:
                own = model.state_dict(keep_vars=True)
                for name, value in self.head.items():
                    own[name].copy_(value)
        if body_sha256(tensors) != after:
            raise ArtifactError("the delta does not lead where it says", remedy="The file is damaged; get it again.")
        return model

    def _check_head(self, model: nn.Module) -> None:
        own = model.state_dict()
        problems = [
            f"{name}: the delta has shape {tuple(t.shape)}, the model "
            + (str(tuple(own[name].shape)) if name in own else "no such tensor")
            for name, t in self.head.items()
            if name not in own or own[name].shape != t.shape
        ]
        if problems:
            raise ArtifactError(
                "the model's head is not of the task's shape",
                problems=problems[:8],
                remedy="Load the base under a head of the task's size, as in hf:ENCODER?new_head=3.",
            )

    def _check(self, tensors: Mapping[str, Tensor], sha256: str, wanted: _Wanted) -> None:
        problems = [
            f"{name}: expected {c.dtype} {c.shape}, got "
            + (
                "nothing"
                if (t := tensors.get(name)) is None
                else f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
            )
            for name, c in self.changes.items()
            if (t := tensors.get(name)) is None
            or tuple(t.shape) != c.shape
            or str(t.dtype).removeprefix("torch.") != c.dtype
        ]
        got = body_sha256(tensors)
        if problems or got != sha256:
            base = self.facts.get("model")
            raise ArtifactError(
                f"not the {wanted.what} that this delta was made for",
                where=f"delta of base {base}" if base else None,
                expected=f"weights sha256 {sha256[:12]}…",
                got=f"{got[:12]}…",
                problems=problems[:8],
                remedy=wanted.remedy,
            )


def stack(base: nn.Module, deltas: Mapping[str, TaskDelta], *, overlap: str = "refuse") -> TaskDelta:
    """One delta of several of one base: where they change different values, all changes.

    `overlap` says what happens to a value that several change: "refuse" raises UsageError, "add" adds what each of them
    adds (task arithmetic; Ilharco et al., arXiv 2212.04089). Heads must differ in name. Raises ArtifactError for
    another base.
    """
    import copy

    if overlap not in ("refuse", "add"):
        raise UsageError(f"unknown overlap {overlap!r}", expected="refuse or add")
    heads: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        delta.check_base(base)
        if both := sorted(heads.keys() & delta.head.keys()):
            raise UsageError("two deltas have a head of one name", where=name, got=", ".join(both[:3]))
        heads |= delta.head
    if overlap == "refuse" and (shared := _overlaps(deltas)):
        raise UsageError(
            "these deltas change the same values",
            problems=shared,
            remedy='Pass overlap="add" to add what each adds, or keep them apart.',
        )
    import torch

    result = copy.deepcopy(base)
    old, new = _tensors(base, frozenset(heads)), _tensors(result, frozenset(heads))
    with torch.no_grad():
        for name, tensor in new.items():
            changes = [d.changes[name] for d in deltas.values() if name in d.changes]
            if not changes:
                continue
            before = _bits(old[name])
            if overlap == "refuse" or len(changes) == 1:  # exact to the bit
                flat = before.copy()
                for c in changes:
                    flat[c.positions] ^= c.bits
                tensor.copy_(_as(flat, tensor))
                continue
            total = old[name].double().flatten()
            for c in changes:
                where = torch.from_numpy(c.positions)
                changed = before.copy()
                changed[c.positions] ^= c.bits
                total[where] += _as(changed, tensor).flatten()[where].double() - old[name].flatten()[where].double()
            tensor.copy_(total.view_as(tensor).to(tensor.dtype))
    own = heads.keys() & base.state_dict().keys()
    made = TaskDelta.between(base, result, own, {"stacked": sorted(deltas), "overlap": overlap})
    return TaskDelta(made.base_sha256, made.result_sha256, made.changes, heads, made.facts)


def body_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, types, shapes and bytes, in sorted order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_bits(tensor).tobytes())
    return digest.hexdigest()


def _overlaps(deltas: Mapping[str, TaskDelta]) -> list[str]:
    found = []
    names = sorted({name for d in deltas.values() for name in d.changes})
    for name in names:
        parts = [d.changes[name].positions for d in deltas.values() if name in d.changes]
        more = sum(map(len, parts)) - len(np.unique(np.concatenate(parts)))
        if more:
            found.append(f"{name}: {more} values")
    return found


def _tensors(model: nn.Module, head: frozenset[str]) -> dict[str, Tensor]:
    """Parameters and buffers by name, without the head's; tied ones once, under the first of their names."""
    found: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        found.setdefault(id(tensor), name)
    return {name: state[name].detach() for name in found.values() if name not in head}


def _unlike(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{name}: only in one of them" for name in sorted(old.keys() ^ new.keys())]
    for name in sorted(old.keys() & new.keys()):
        a, b = old[name], new[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            problems.append(f"{name}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")
    return problems[:8]


def _bits(tensor: Tensor) -> NDArray[Any]:
    """The flattened tensor's bits as unsigned words: floats of any kind, integers, booleans."""
    import torch

    raw: NDArray[Any] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return raw.view(_WORDS[tensor.element_size()])


def _as(bits: NDArray[Any], like: Tensor) -> Tensor:
    """Words back as a tensor of the type and shape of `like`."""
    import torch

    return torch.from_numpy(bits.view(np.uint8)).view(like.dtype).view(like.shape)


def _itemsize(dtype: str) -> int:
    import torch

    found: torch.dtype = getattr(torch, dtype)
    return found.itemsize


def _size(change: Change) -> int:
    return int(np.prod(change.shape))


def _digest(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_bits(tensor).tobytes())
    return digest.hexdigest()
