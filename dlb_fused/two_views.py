"""`TwoViewCarry`: overlapping batches from data that no sampler can order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor

FORMAT = 1  # of the state_dict
KEYS = ("format", "config", "carried")


class TwoViewCarry:
    """Joins each batch's second views to the next batch's first ones, for iterable data.

    Each item of `loader` is (view_0, view_1, labels, ...): n rows in two views (two draws of the
    augmentation), their labels, and whatever else belongs to a row, such as ids. Iterating yields
    (images, labels, ...) of the last batch's view_1 and then this batch's view_0, each row with its
    labels and ids: what `DLBLoss` expects, and what the official script trains on. Since the
    batches are joined here, in the order in which the trainer sees them, any number of loader
    workers is right; a chain built inside of workers is not, as their batches interleave.

    The first `lag` batches have only their fresh rows. A last batch of fewer rows makes a smaller
    overlap later. Leaving an epoch early breaks nothing. One iteration at a time.

    Args:
        loader: any iterable of batches, once an epoch: tensors of n rows (lists of n strings or
            bytes too), in tuples, lists and dicts at any depth.
        views: batches of another form: a function of the batch that returns the pair of
            what is yielded when its samples are fresh, and when they come again.
        carry_over: the chain goes on over the border of epochs. False: each epoch begins a new
            chain; call `DLBLoss.reset()` with it.
        lag: 1, or the number of micro-batches under gradient accumulation (`DLBLoss(lag=...)`).
        device: where batches are sent before they are joined, so that each view travels once, and
            from pinned memory if the loader pins it. Default: they stay where they are.

    Raises:
        ValueError: a bad argument; two batches in a row do not fit together.
        TypeError: `loader` is no iterable, a batch is not of the form above, or `len()` is asked
            and `loader` has none.

    Example:
        >>> a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
        >>> loader = [(a, a + 0.5, torch.tensor([1, 2])), (b, b + 0.5, torch.tensor([3, 4]))]
        >>> for images, labels in TwoViewCarry(loader):
        ...     print(images.flatten().tolist(), labels.tolist())
        [1.0, 2.0] [1, 2]
        [1.5, 2.5, 3.0, 4.0] [1, 2, 3, 4]

        Batches that are dicts:

        >>> def views(batch):
        ...     return tuple({"x": batch[name], "y": batch["y"]} for name in ("x0", "x1"))
        >>> loader = [{"x0": a, "x1": -a, "y": torch.tensor([1, 2])}]
        >>> next(iter(TwoViewCarry(loader, views=views)))["x"].flatten().tolist()
        [1.0, 2.0]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        views: Callable[[Any], tuple[Any, Any]] | None = None,
        carry_over: bool = True,
        lag: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(f"loader must yield batches, got {type(loader).__name__}")
        if views is not None and not callable(views):
            raise TypeError(f"views must be a function of a batch, got {type(views).__name__}")
        if not isinstance(carry_over, bool):
            raise ValueError(f"carry_over must be True or False, got {carry_over!r}")
        if type(lag) is not int or lag < 1:
            raise ValueError(f"lag must be an int >= 1, got {lag!r}")
        self.loader, self.views = loader, views or view_0_and_1
        self.carry_over, self.lag, self.device = carry_over, lag, device
        self._carried: list[Any] = []  # what comes again of the last `lag` batches, oldest first

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(
                "the length of TwoViewCarry is that of its loader, "
                f"but {type(self.loader).__name__} has no length"
            )
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if not self.carry_over:
            self.reset()
        for batch in self.loader:
            if self.device is not None:
                batch = each(lambda leaf: send(leaf, self.device), batch)
            fresh, again = self.views(batch)
            overlap = self._carried[:1] if len(self._carried) == self.lag else []
            joined = each(join, *overlap, fresh)
            self._carried = [*self._carried, again][-self.lag :]
            yield joined

    def reset(self) -> None:
        """Forgets the last batch: the next one begins a new chain."""
        self._carried = []

    def state_dict(self) -> dict[str, Any]:
        """The rows that come again, to go on after the batch that was yielded last. Where `loader`
        goes on is its own matter."""
        return {"format": FORMAT, "config": self._config(), "carried": list(self._carried)}

    def _config(self) -> dict[str, int | bool]:
        return {"carry_over": self.carry_over, "lag": self.lag}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. ValueError if it is malformed or was written under
        another configuration; nothing is changed then."""
        if not isinstance(state, dict) or set(state) != set(KEYS):
            raise ValueError(f"malformed TwoViewCarry state: expected a dict of {sorted(KEYS)}")
        if state["format"] != FORMAT:
            raise ValueError(
                f"TwoViewCarry state has format {state['format']!r}, this version reads {FORMAT}"
            )
        if state["config"] != self._config():
            raise ValueError(
                f"TwoViewCarry state was written with {state['config']!r}, but this is "
                f"{self._config()!r}"
            )
        if not isinstance(state["carried"], list) or len(state["carried"]) > self.lag:
            raise ValueError(
                f"malformed TwoViewCarry state: carried must be a list of at most lag={self.lag}"
            )
        self._carried = list(state["carried"])


def view_0_and_1(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 3:
        raise TypeError(
            f"a batch must be (view_0, view_1, labels, ...), got {describe(batch)}; "
            "for another form give views="
        )
    view_0, view_1, *rest = batch
    return (view_0, *rest), (view_1, *rest)


def each(function: Callable[..., Any], *trees: Any) -> Any:
    """The tree of `function` of the leaves at the same place of trees of one structure."""
    tree = trees[-1]
    if is_leaf(tree):
        return function(*trees)
    if not isinstance(tree, (Mapping, tuple, list)):
        raise TypeError(
            "a batch must be made of tensors, lists of strings, tuples, lists and dicts, "
            f"got {type(tree).__name__}"
        )
    if any(type(other) is not type(tree) or len(other) != len(tree) for other in trees):
        raise does_not_fit(*trees)
    if isinstance(tree, Mapping):
        if any(set(other) != set(tree) for other in trees):
            raise does_not_fit(*trees)
        return {key: each(function, *(other[key] for other in trees)) for key in tree}
    branches = [each(function, *others) for others in zip(*trees, strict=True)]
    return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)


def is_leaf(tree: Any) -> bool:
    return isinstance(tree, Tensor) or (
        isinstance(tree, (tuple, list)) and bool(tree) and isinstance(tree[0], (str, bytes))
    )


def send(leaf: Any, device: torch.device | str | None) -> Any:
    return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf


def join(*leaves: Any) -> Any:
    """The rows of all leaves; always a copy, so that what is carried belongs to nobody else."""
    leaf = leaves[-1]
    if any(type(other) is not type(leaf) for other in leaves):
        raise does_not_fit(*leaves)
    if not isinstance(leaf, Tensor):
        return type(leaf)(row for other in leaves for row in other)
    if leaf.dim() == 0:
        raise TypeError("a batch must be made of tensors with rows, got a 0-dim tensor")
    if any(other.shape[1:] != leaf.shape[1:] for other in leaves):
        raise does_not_fit(*leaves)
    return torch.cat([other.to(leaf.device) for other in leaves])


def does_not_fit(*trees: Any) -> ValueError:
    last, this = describe(trees[0]), describe(trees[-1])
    return ValueError(f"the rows of two batches do not fit together: {last}, then {this}")


def describe(tree: Any) -> str:
    name = type(tree).__name__
    if isinstance(tree, Tensor):
        return f"tensor of shape {tuple(tree.shape)}"
    if isinstance(tree, Mapping):
        return f"{name} of {sorted(tree)}"
    return f"{name} of {len(tree)}" if isinstance(tree, (tuple, list)) else name
