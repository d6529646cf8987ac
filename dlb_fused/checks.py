"""The checks at the door: each names the argument, what was expected and what came. None asks the
device anything.

For a few rows the checks would cost more than the loss. So `plain_args` looks first, in C++
(csrc/plain_args.h), whether a call is of the common kind that needs none of them."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from dlb_fused.backends import LossArgs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_DEFAULTS = LossArgs(None, None)  # type: ignore[arg-type]


def plain_args(
    logits: Any,
    labels: Any,
    last_logits: Any,
    ignore_index: Any,
    label_smoothing: Any,
    temperature: Any,
    alpha: Any,
) -> LossArgs | None:
    """What a backend gets, if all checks would pass and convert nothing; else, or where that is not
    known, None."""
    if torch.compiler.is_compiling():
        return None
    find: Any = (_compiled or _find_compiled()).plain_args
    grad = torch.is_grad_enabled()
    args: LossArgs | None = find(
        _DEFAULTS,
        grad,
        logits,
        labels,
        last_logits,
        ignore_index,
        label_smoothing,
        temperature,
        alpha,
    )
    return args


def is_number(tensor: Tensor, number: float | Tensor) -> bool:
    """Whether a 0-dim tensor is that float; False where the host does not know."""
    known: bool = (_compiled or _find_compiled()).is_number(tensor, number)
    return known


class _NotCompiled:
    """In place of the compiled module: nothing is known. (native.py says why.)"""

    plain_args = staticmethod(lambda *_: None)
    is_number = staticmethod(lambda *_: False)


_compiled: Any = None


def _find_compiled() -> Any:
    """At the first call, so that `import dlb_fused` loads nothing native."""
    global _compiled
    try:
        _compiled = importlib.import_module("dlb_fused._cpu")
    except ImportError:
        _compiled = _NotCompiled
    return _compiled


def check_logits(logits: Tensor, labels: Tensor) -> None:
    if type(logits) is not Tensor or type(labels) is not Tensor:
        check_tensor("logits", logits)
        check_tensor("labels", labels)
    shape = logits.shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"logits must have shape (B, C) with C > 0, got {tuple(shape)}")
    if logits.dtype not in DTYPES:
        raise TypeError(
            f"logits must be float32, bfloat16, float16 or float64, got {dtype_name(logits)}"
        )
    if labels.dtype != torch.int64:
        hint = "" if labels.is_floating_point() else "; call labels.long()"
        raise TypeError(f"labels must be int64 class indices, got {dtype_name(labels)}{hint}")
    if labels.shape != shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(logits)},), one for each row of logits, "
            f"got {tuple(labels.shape)}"
        )
    if labels.device != logits.device:
        check_device("labels", labels, logits)


def check_last_logits(last_logits: Tensor, logits: Tensor) -> Tensor:
    if type(last_logits) is not Tensor:
        check_tensor("last_logits", last_logits)
    shape = last_logits.shape
    if len(shape) != 2:
        hint = "; did you mean weight=?" if len(shape) == 1 else ""
        raise ValueError(f"last_logits must have shape (m, C), got {tuple(shape)}{hint}")
    B, C = logits.shape
    if shape[1] != C:
        raise ValueError(f"last_logits must have the {C} classes of logits, got {shape[1]}")
    if shape[0] > B:
        raise ValueError(f"last_logits has {shape[0]} rows, more than the {B} rows of logits")
    if last_logits.dtype not in DTYPES:
        raise TypeError(
            "last_logits must be float32, bfloat16, float16 or float64, "
            f"got {dtype_name(last_logits)}"
        )
    same = last_logits.dtype == logits.dtype
    if not same and torch.float64 in (last_logits.dtype, logits.dtype):
        raise TypeError(
            "last_logits and logits must both be float64 or neither, "
            f"got {dtype_name(last_logits)} and {dtype_name(logits)}"
        )
    if last_logits.requires_grad:
        raise ValueError("last_logits requires grad, but no gradient flows to it: pass it detached")
    if last_logits.device != logits.device:
        check_device("last_logits", last_logits, logits)
    return rows_contiguous(last_logits)


def check_ids(ids: Tensor, logits: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        came = dtype_name(ids) if isinstance(ids, Tensor) else type(ids).__name__
        hint = "; the cache is DLBLoss's own, for another teacher's logits use dlb_loss"
        raise TypeError(f"ids must be an int64 tensor, got {came}{hint}")
    check_one_a_row("ids", ids, logits)


def check_one_a_row(name: str, value: Tensor, logits: Tensor) -> None:
    if value.shape != logits.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({len(logits)},), one for each row of logits, "
            f"got {tuple(value.shape)}"
        )
    check_device(name, value, logits)


def check_distill(distill: Tensor, logits: Tensor) -> None:
    if not isinstance(distill, Tensor) or distill.dtype != torch.bool:
        came = dtype_name(distill) if isinstance(distill, Tensor) else type(distill).__name__
        raise TypeError(f"distill must be a bool tensor, got {came}")
    check_one_a_row("distill", distill, logits)


def check_options(
    logits: Tensor,
    m: int,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    temperature: float | Tensor,
    alpha: float | Tensor,
    normalizer: tuple[Tensor | float, Tensor | float] | None,
    grad_scale: float | Tensor | None,
) -> tuple[Any, ...]:
    """The fields weight ... grad_scale of `LossArgs`, in that order."""
    if (  # the commonest call, without a dozen function calls
        weight is normalizer is grad_scale is None
        and type(temperature) is type(alpha) is type(label_smoothing) is float
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and 0 < temperature < math.inf
        and 0 <= alpha < math.inf
        and 0 <= label_smoothing <= 1
    ):
        return None, ignore_index, label_smoothing, temperature, alpha, None, None, 1.0
    ce_count, kl_count = (
        (None, None) if normalizer is None else check_normalizer(normalizer, logits)
    )
    return (
        None if weight is None else check_weight(weight, logits),
        check_ignore_index(ignore_index),
        check_label_smoothing(label_smoothing),
        check_setting("temperature", temperature, logits, m),
        check_setting("alpha", alpha, logits, m),
        ce_count,
        kl_count,
        1.0 if grad_scale is None else check_grad_scale(grad_scale, logits),
    )


def check_weight(weight: Tensor, logits: Tensor) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.shape != logits.shape[1:]:
        raise ValueError(
            f"weight must have shape ({logits.shape[1]},), one for each class, "
            f"got {tuple(weight.shape)}"
        )
    check_constant("weight", weight, logits)
    if not torch.compiler.is_compiling():
        check_values("weight", weight)
    return as_real(weight, logits)


def check_ignore_index(ignore_index: int) -> int:
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into int64, got {ignore_index}")
    return ignore_index


def check_label_smoothing(label_smoothing: float) -> float:
    if not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing must be a float, got {type(label_smoothing).__name__}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    return float(label_smoothing)


def check_setting(name: str, value: float | Tensor, logits: Tensor, m: int) -> float | Tensor:
    """temperature or alpha: a float, or a tensor of logits' real dtype and of shape () or (m,)."""
    if not isinstance(value, Tensor):
        return check_number(name, value)
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != m):
        hint = "; did you mean weight=?" if value.shape == logits.shape[1:] else ""
        raise ValueError(
            f"{name} must be a float, a 0-dim tensor, or a tensor of shape ({m},), one for "
            f"each overlap row; got shape {tuple(value.shape)}{hint}"
        )
    check_constant(name, value, logits)
    value = as_real(value, logits)
    if not torch.compiler.is_compiling():
        check_values(name, value)
    return value


def check_labels_b(
    logits: Tensor, labels_b: Tensor | None, lam: float | Tensor | None
) -> dict[str, Any]:
    """The fields labels_b and lam of `LossArgs`."""
    if labels_b is None and lam is None:
        return {}
    if labels_b is None or lam is None:
        missing, given = ("lam", "labels_b") if lam is None else ("labels_b", "lam")
        raise TypeError(
            f"{given} was given without {missing}: the target of a row is lam of its class in "
            "labels and 1 - lam of its class in labels_b"
        )
    check_tensor("labels_b", labels_b)
    if labels_b.dtype != torch.int64:
        raise TypeError(f"labels_b must be int64 class indices, got {dtype_name(labels_b)}")
    if labels_b.shape != logits.shape[:1]:
        raise ValueError(
            f"labels_b must have shape ({len(logits)},) like labels, got {tuple(labels_b.shape)}"
        )
    check_device("labels_b", labels_b, logits)
    return {"labels_b": labels_b.contiguous(), "lam": check_lam(lam, logits)}


def check_lam(lam: float | Tensor, logits: Tensor) -> float | Tensor:
    if not isinstance(lam, Tensor):
        if not isinstance(lam, (int, float)):
            raise TypeError(f"lam must be a float or a tensor, got {type(lam).__name__}")
        if not 0 <= lam <= 1:
            raise ValueError(f"lam must be in [0, 1], got {lam}")
        return float(lam)
    if lam.shape not in ((), logits.shape[:1]):
        raise ValueError(
            f"lam must be a float, a 0-dim tensor, or a tensor of shape ({len(logits)},), one for "
            f"each row of logits; got shape {tuple(lam.shape)}"
        )
    check_constant("lam", lam, logits)
    if not torch.compiler.is_compiling():
        check_values("lam", lam)
    return as_real(lam, logits)


def check_flag(name: str, value: bool) -> None:
    if type(value) is not bool:
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_number(name: str, value: float) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or a tensor, got {type(value).__name__}")
    if not (0 < value < math.inf or (value == 0 and name == "alpha")):
        raise ValueError(f"{name} must be {RANGES[name]}, got {value}")
    return float(value)


RANGES = {
    "temperature": "finite and > 0",
    "alpha": "finite and >= 0",
    "lam": "in [0, 1]",
    "weight": "finite and >= 0",
}


def check_values(name: str, value: float | Tensor) -> None:
    """Of a tensor that RANGES names, where to look costs no sync."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        good = value.isfinite() & (value > 0 if name == "temperature" else value >= 0)
        if name == "lam":
            good &= value <= 1
        if not good.all():
            raise ValueError(f"{name} must be {RANGES[name]}, got {value[~good][0].item()}")


def check_grad_scale(grad_scale: float | Tensor, logits: Tensor) -> float | Tensor:
    if isinstance(grad_scale, Tensor):
        if grad_scale.dim() != 0:
            raise ValueError(
                f"grad_scale must be a float or a 0-dim tensor, got shape {tuple(grad_scale.shape)}"
            )
        check_constant("grad_scale", grad_scale, logits)
        return as_real(grad_scale, logits)
    if not isinstance(grad_scale, (int, float)):
        raise TypeError(f"grad_scale must be a float or a tensor, got {type(grad_scale).__name__}")
    if not -math.inf < grad_scale < math.inf:
        raise ValueError(f"grad_scale must be finite, got {grad_scale}")
    return float(grad_scale)


def check_normalizer(
    normalizer: tuple[Tensor | float, Tensor | float], logits: Tensor
) -> tuple[Tensor, ...]:
    if not isinstance(normalizer, (tuple, list)) or len(normalizer) != 2:
        came = repr(normalizer) if isinstance(normalizer, str) else type(normalizer).__name__
        hint = "; only DLBLoss takes 'global'" if came == "'global'" else ""
        raise TypeError(f"normalizer must be a pair (ce_count, kl_count), got {came}{hint}")
    counts = []
    for name, count in zip(("ce_count", "kl_count"), normalizer, strict=True):
        if not isinstance(count, Tensor):
            if not isinstance(count, (int, float)) or not 0 <= count < math.inf:
                raise ValueError(f"{name} of normalizer must be finite and >= 0, got {count!r}")
            count = logits.new_full((), count, dtype=real_dtype(logits))
        if count.dim() != 0:
            raise ValueError(
                f"{name} of normalizer must be a 0-dim tensor, got shape {tuple(count.shape)}"
            )
        if count.requires_grad:
            raise ValueError(f"{name} of normalizer requires grad: pass it detached")
        check_device(f"{name} of normalizer", count, logits)
        counts.append(as_real(count, logits))
    return tuple(counts)


def check_inplace(
    logits: Tensor, rows: Tensor, last_logits: Tensor | None, grad_scale: float | Tensor
) -> None:
    """`rows` is what `rows_contiguous` made of the logits, which are about to be overwritten."""
    if torch.compiler.is_compiling():
        raise RuntimeError("inplace=True cannot be used under torch.compile")
    base = logits._base if logits._is_view() else logits
    if base is not None and base.is_leaf and base.requires_grad:
        raise RuntimeError("inplace=True would overwrite a leaf that requires grad")
    if rows is not logits:
        raise RuntimeError("inplace=True needs logits whose last stride is 1")
    if overlaps_itself(logits):
        raise RuntimeError("inplace=True needs logits whose rows do not share memory")
    if last_logits is not None and share_memory(logits, last_logits):
        raise RuntimeError("inplace=True would overwrite last_logits, which share their memory")
    if (not isinstance(grad_scale, Tensor) or grad_scale.device.type == "cpu") and grad_scale == 0:
        raise ValueError("grad_scale=0 leaves no gradient that inplace=True could scale")


def check_tensor(name: str, value: Tensor) -> None:
    """Kernels read memory: a tensor that only stands for others (DTensor, FakeTensor) has none."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if torch.compiler.is_compiling() or isinstance(value, torch.nn.Parameter):
        return
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} must be a plain tensor, got {type(value).__name__}; of a DTensor pass the "
            "local one"
        )


def check_constant(name: str, value: Tensor, logits: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but it cannot be learned: pass it detached")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {dtype_name(value)}")
    check_device(name, value, logits)


def check_device(name: str, value: Tensor, logits: Tensor) -> None:
    if value.device != logits.device:
        raise ValueError(f"{name} must be on {logits.device} like logits, got {value.device}")


def real_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def as_real(value: Tensor, logits: Tensor) -> Tensor:
    """In the type that kernels compute in, contiguous, and what its bytes say (the imaginary part
    of a conjugate is not)."""
    value = value.to(real_dtype(logits)).contiguous()
    return value if torch.compiler.is_compiling() else value.resolve_neg()


def dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def rows_contiguous(value: Tensor) -> Tensor:
    """Kernels take any row stride; classes must lie side by side, and be what their bytes say."""
    if not torch.compiler.is_compiling() and value.is_neg():  # as of a conjugate
        value = value.resolve_neg()
    if value.is_contiguous() or value.stride(1) == 1 or value.shape[1] == 1:
        return value
    return value.contiguous()


def overlaps_itself(value: Tensor) -> bool:
    return len(value) > 1 and value.stride(0) < value.shape[1]


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two (rows, C) tensors meet."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    first, last = (max(x.data_ptr() for x in (a, b)), min(map(end_ptr, (a, b))))
    return first < last


def end_ptr(value: Tensor) -> int:
    steps = (len(value) - 1) * value.stride(0) + (value.shape[1] - 1) * value.stride(1)
    return value.data_ptr() + (steps + 1) * value.element_size()
