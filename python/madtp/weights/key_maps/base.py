"""What all key maps have in common: a table of names, weights that are stacked or shaped differently, and both directions."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["KeyMap", "Sizes", "refuse", "renamed", "stacked", "text_sizes"]

_log = logging.getLogger("madtp")


def renamed(key: str, names: Mapping[str, str]) -> str:
    """The key with its longest known beginning replaced; {} in the table is the number of a block."""
    number = re.search(r"(?<=\.)\d+(?=\.)", key)
    general = key if number is None else f"{key[: number.start()]}{{}}{key[number.end() :]}"
    head = general
    while head:
        if head in names:
            return (names[head] + general[len(head) :]).replace("{}", "" if number is None else number.group())
        head = head.rpartition(".")[0]
    return key


def stacked(state: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
    """These weights on top of each other.

    Raises:
        ValueError: they differ in shape or dtype, or are no floating-point numbers; the message names them.
    """
    parts = [state[key] for key in keys]
    facts = [(list(part.shape), str(part.dtype)) for part in parts]
    if not parts[0].dim() or not parts[0].is_floating_point() or any(fact != facts[0] for fact in facts):
        told = ", ".join(f"{key} {shape} {dtype}" for key, (shape, dtype) in zip(keys, facts))
        raise ValueError(f"weights that belong together: expected one shape and one floating-point type, got {told}")
    return torch.cat(parts)


class Sizes:
    """Sizes of a model, read off the shapes of its weights.

    Args:
        state: its weights.
        kind: what to call it in errors, such as "a CLIP".
    """

    def __init__(self, state: Mapping[str, Tensor], kind: str) -> None:
        self.state, self.kind = state, kind

    def shape(self, key: str, dims: int) -> torch.Size:
        """Shape of a weight. Raises ValueError where it is missing or has another number of axes."""
        if key not in self.state:
            raise ValueError(f"not {self.kind}: {key} is missing")
        if self.state[key].dim() != dims or not self.state[key].numel():
            raise ValueError(f"{key}: expected {dims} dimensions, got {list(self.state[key].shape)}")
        return self.state[key].shape

    def numbers(self, pattern: str) -> list[int]:
        """Numbers of blocks: what the group of an expression at the beginning of keys matches."""
        return [int(found[1]) for found in map(re.compile(pattern).match, self.state) if found]

    def count(self, prefix: str) -> int:
        """How many blocks there are whose keys begin so; the number follows."""
        return 1 + max(self.numbers(re.escape(prefix) + r"(\d+)\."), default=-1)

    def side(self, key: str, patch: int) -> int:
        """Pixels of a side, of positions ``[1, 1 + patches, D]``. Raises ValueError unless the patches form a square."""
        patches = self.shape(key, 3)[1] - 1
        side = round(patches**0.5)
        if side * side != patches:
            raise ValueError(f"{key}: {patches} patches do not form a square grid")
        return side * patch

    def tower(self, prefix: str) -> dict[str, Any]:
        """An image encoder of our names below the prefix, as settings of its configuration but for the size of images; heads are
        64 wide."""
        width, _, patch, _ = self.shape(f"{prefix}patch_embed.proj.weight", 4)
        return {
            "patch_size": patch,
            "embed_dim": width,
            "depth": self.count(f"{prefix}blocks."),
            "num_heads": max(1, width // 64),
            "mlp_ratio": self.shape(f"{prefix}blocks.0.mlp.fc1.weight", 2)[0] / width,
        }

    def entries(self, width: int) -> tuple[int, int]:
        """Number and width of the dictionary's entries; 100 of this width where there is no dictionary."""
        return tuple(self.shape("space_dict", 2)) if "space_dict" in self.state else (100, width)


def refuse(config: Any, section: str = "", **expected) -> None:
    """Raise ValueError unless a configuration of transformers says what our layers have built in; what it does not have counts
    as said."""
    for name, value in expected.items():
        if getattr(config, name, value) != value:
            raise ValueError(f"{section}{name}: expected {value!r}, got {getattr(config, name)!r}")


def text_sizes(config: Any) -> dict[str, int]:
    """What a configuration of transformers says of a text transformer, under our names, which are the same."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {name: getattr(config, name) for name in (*names, "max_position_embeddings")}


@dataclass(frozen=True)
class KeyMap:
    """How one code base names and shapes the weights.

    Where it has two names for a weight of ours (releases differ), :meth:`parts_of` and :meth:`from_ours` give the first.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of their names -> of ours."""
    fused: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    """Modules (an expression), their parts that ours stacks along the first axis, and what the stack is called among their
    names (``names`` may then say what it is among ours)."""
    leading: Mapping[str, int] = field(default_factory=dict)
    """Ours -> axes of length 1 in front that theirs has not."""
    transposed: frozenset[str] = frozenset()
    """Ours that are matrices [in, out] there."""
    scalars: frozenset[str] = frozenset()
    """Ours without an axis that have one of length 1 there."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Their keys without a counterpart (expressions) -> what they are."""
    own: str = r"^space_dict$|^temp$|_query_model\.|\.query_models\."
    """Ours that have no place there (an expression)."""

    def drop(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state without what is ignored, which is listed by name in the log (INFO)."""
        left_out: dict[str, list[str]] = {}
        for key in state:
            reason = next((reason for pattern, reason in self.ignored.items() if re.search(pattern, key)), None)
            if reason is not None:
                left_out.setdefault(reason, []).append(key)
        for reason, keys in left_out.items():
            _log.info("ignored as %s: %s", reason, ", ".join(keys))
        dropped = {key for keys in left_out.values() for key in keys}
        return {key: value for key, value in state.items() if key not in dropped}

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their keys to ours; keys that are ours already stay.

        Raises:
            ValueError: weights that belong together and differ in shape or dtype.
        """
        state = self.drop(state)
        for module, parts, whole in self.fused:
            first = re.compile(rf"^((?:.*\.)?{module})\.{re.escape(parts[0])}\.(weight|bias)$")
            for lead, kind in [match.groups() for match in map(first.match, list(state)) if match]:
                sources = [f"{lead}.{part}.{kind}" for part in parts]
                if all(source in state for source in sources):
                    state[f"{lead}.{whole}.{kind}"] = stacked(state, sources)
                    for source in sources:
                        del state[source]
        ours = {}
        for key, value in state.items():
            name = renamed(key, self.names)
            if name != key or key in self.scalars:
                value = value.mT if name in self.transposed and value.dim() == 2 else value
                value = value[(None,) * self.leading.get(name, 0)]
                value = value.reshape(()) if name in self.scalars and value.numel() == 1 else value
            ours[name] = value
        return ours

    def parts_of(self, key: str) -> list[str]:
        """The names of their weights that one of ours is stacked of; none where they have no such weight."""
        if re.search(self.own, key):
            return []
        theirs: dict[str, str] = {}
        for name, ours in self.names.items():
            theirs.setdefault(ours, name)
        name = renamed(key, theirs)
        for module, parts, whole in self.fused:
            lead, found, kind = name.rpartition(f".{whole}.")
            if found and re.search(rf"(^|\.){module}$", lead):
                return [f"{lead}.{part}.{kind}" for part in parts]
        return [name]

    def from_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ours to theirs. No two tensors share memory."""
        theirs = {}
        for key, value in state.items():
            names = self.parts_of(key)
            if names and names != [key]:
                value = value.flatten(0, self.leading[key]) if key in self.leading else value
                value = value.mT.contiguous() if key in self.transposed else value
            value = value.reshape(1) if key in self.scalars else value
            if names:
                chunks = [value] if len(names) == 1 else [chunk.clone() for chunk in value.chunk(len(names))]
                theirs.update(zip(names, chunks))
        return theirs
