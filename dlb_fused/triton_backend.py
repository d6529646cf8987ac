"""The backend `triton`: one launch forward, one launch backward.

The kernels are in `triton_kernels.py`; here is what launches them: the table of their forms, the
workspace, and how arguments reach them. They are compiled once for each C and each set of options,
never for the value of a float, for B, m or a stride.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlb_fused import gpu_memory
from dlb_fused.backends import LossArgs, LossOutputs

try:
    import triton
    import triton.language as tl

    from dlb_fused import triton_kernels as kernels
except ImportError as error:
    _MISSING: str | None = f"triton is not installed ({error})"
else:
    _MISSING = None

# Padded columns of 4-byte reals that one program can keep in registers without spilling, with the
# warps for it: 32 columns a thread, since what a row costs beside its columns (reductions, its
# end) is paid by every thread. Wider rows are read twice, _LOOP_BLOCK columns at a time, three
# programs a multiprocessor (two with label smoothing).
_WARPS = ((1024, 1), (2048, 2), (4096, 4), (8192, 8))
_LOOP_BLOCK = 2048
_LOOP_WARPS = 8
_LOOP_REGISTERS = (80, 96)
# Programs times labels up to which each program counts for itself: some 10 MB read from L2, about
# the time of the launch that this saves.
_COUNT_WORK = 1 << 20
# Labels, and sums of programs, that a warp reads at once.
_COUNT_WARP = gpu_memory.CHUNK_ROWS
_SUM_WARP = 256


class Plan(NamedTuple):
    """How the rows are laid out over programs."""

    looped: bool
    rows: int  # of a program
    block: int  # columns that a program holds at once
    vector: int  # looped: neighbouring columns with one running maximum
    num_warps: int
    registers: int | None  # bound for a thread


@functools.cache
def plan(columns: int, real_bytes: int, item_bytes: int, smoothing: bool) -> Plan:
    """The one table of forms, tiles and warps, for rows of `columns` elements."""
    scale = 1 if real_bytes == 4 else 4  # twice the registers, and more for exp2
    block = 1 << (columns - 1).bit_length()
    for widest, warps in _WARPS:
        if block * scale <= widest:
            # Several short rows: one access of 16 bytes a thread, 4 elements where rows are odd.
            wide = columns * item_bytes % 16 == 0
            tile = 32 * warps * (16 // item_bytes if wide else 4)
            rows = max(1, min(32 * warps, tile // block))
            return Plan(False, rows, block, 1, warps, None)
    registers = _LOOP_REGISTERS[smoothing] if real_bytes == 4 else 128
    return Plan(True, 1, _LOOP_BLOCK // scale, 16 // item_bytes, _LOOP_WARPS, registers)


class Launch(NamedTuple):
    """One launch: kernel[(grid,)](*args, **constants, **options)."""

    kernel: Any
    grid: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]  # of the compiler


def _interpreted() -> bool:
    return not isinstance(kernels.tile_kernel, triton.runtime.JITFunction)


def why_not(logits: Tensor) -> str | None:
    """None if Triton can take these logits, else the reason.

    CPU tensors are taken when Triton interprets its kernels (TRITON_INTERPRET=1 at import).
    """
    if _MISSING is not None:
        return _MISSING
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"the triton backend needs triton >= 3.6, found {triton.__version__}"
    if logits.is_cuda or (logits.device.type == "cpu" and _interpreted()):
        return None
    return f"the triton backend needs a CUDA device, got {logits.device.type}"


def forward(args: LossArgs) -> LossOutputs:
    """Loss, parts, gradient and next cache in one launch; see `backends.py`."""
    out = gpu_memory.outputs(args)
    if args.logits.shape[0] == 0:
        out.loss.zero_()
        out.parts.zero_()
        return out
    with gpu_memory.on(args.logits.device):
        for launch in forward_launches(args, out):
            _run(launch)
    return out


def backward(args: LossArgs, parts: Tensor, dloss: Tensor, dlogits: Tensor | None) -> Tensor:
    """dloss times the gradient, in one launch that returns at once where dlogits holds it."""
    always = dlogits is None
    if dlogits is None:
        dlogits = gpu_memory.empty_like_rows(args.logits)
    if dlogits.shape[0]:
        with gpu_memory.on(dlogits.device):
            _run(backward_launch(args, parts, dloss, dlogits, always))
    return dlogits


def rescale_(dlogits: Tensor, dloss: Tensor, grad_scale: float | Tensor) -> None:
    """dlogits *= dloss / grad_scale in one launch, which does nothing where they are equal."""
    if dlogits.shape[0]:
        with gpu_memory.on(dlogits.device):
            _run(rescale_launch(dlogits, dloss, grad_scale))


def forward_launches(args: LossArgs, out: LossOutputs) -> list[Launch]:
    """What `forward` launches, into tensors made by `gpu_memory.outputs`; B > 0."""
    form, constants = _form(args, out.dlogits)
    batch, last_logits = _batch(args)
    B, C = args.logits.shape
    programs = -(-B // form.rows)
    guarded = batch.last_labels is not None or args.stats is not None
    count = args.ce_count is None or (
        last_logits is not None and (args.kl_count is None or guarded)
    )
    in_chunks = count and programs * B > _COUNT_WORK
    space = gpu_memory.workspace("triton", args.logits.device, out.loss.dtype, B)
    counts = kernels.Counts(args.ce_count, args.kl_count, space.chunks if in_chunks else None, None)
    cache = kernels.Cache(out.next_logits, out.next_labels, out.next_valid)
    slot_rows = 0
    if args.pair is not None:
        slot_rows = args.pair.logits.shape[1]
        cache = kernels.Cache(args.pair.logits if args.copy_logits else None, *args.pair[1:3])
    sums = kernels.Sums(out.loss, out.parts, args.stats, space.sums, space.counter)
    launch = _row_launch(
        args,
        out.dlogits,
        None,
        args.grad_scale,
        batch,
        last_logits,
        counts,
        cache,
        sums,
        slot_rows,
        form,
        {**constants, "COUNT": count},
    )
    if not in_chunks:
        return [launch]
    sizes = (B, args.overlap if last_logits is not None else 0, slot_rows, args.ignore_index)
    block = constants["COUNT_BLOCK"]
    tally = {"C": C, "TEACHER": last_logits is not None, "BLOCK": block}
    chunks = -(-B // block)
    first = Launch(
        kernels.count_kernel, chunks, (batch, space.chunks, *sizes), tally, {"num_warps": 4}
    )
    return [first, launch]


def backward_launch(
    args: LossArgs, parts: Tensor, dloss: Tensor, dlogits: Tensor, always: bool
) -> Launch:
    """What `backward` launches. always: dlogits holds nothing yet, whatever dloss is."""
    form, constants = _form(args, dlogits)
    batch, last_logits = _batch(args)
    slot_rows = 0 if args.pair is None else args.pair.logits.shape[1]
    # No dloss equals NaN.
    scale = float("nan") if always else args.grad_scale
    nothing = kernels.Sums(None, None, None, None, None)
    return _row_launch(
        args,
        dlogits,
        dloss,
        scale,
        batch,
        last_logits,
        kernels.Counts(None, None, None, parts),
        kernels.Cache(None, None, None),
        nothing,
        slot_rows,
        form,
        {**constants, "COUNT": False},
    )


def rescale_launch(dlogits: Tensor, dloss: Tensor, grad_scale: float | Tensor) -> Launch:
    """What `rescale_` launches; B > 0."""
    B, C = dlogits.shape
    real = gpu_memory.real_of(dlogits.dtype)
    form = plan(C, real.itemsize, dlogits.element_size(), False)
    step = dlogits.stride(0)
    unit = _unit(step)
    constants = {"C": C, "ROWS": form.rows, "BLOCK": form.block, "UNIT": unit, "real": _tl(real)}
    args = (dlogits, dloss, _bits(grad_scale), B, step // unit)
    return Launch(kernels.rescale_kernel, -(-B // form.rows), args, constants, _options(form))


def _row_launch(
    args,
    dlogits,
    dloss,
    grad_scale,
    batch,
    last_logits,
    counts,
    cache,
    sums,
    slot_rows,
    form,
    constants,
) -> Launch:
    unit = constants["UNIT"]
    step = args.logits.stride(0) // unit
    last_step = 0 if last_logits is None else last_logits.stride(-2) // unit
    out_step = 0 if dlogits is None else dlogits.stride(0) // unit
    B = args.logits.shape[0]
    m = 0 if last_logits is None else args.overlap
    smoothing = _bits(args.label_smoothing) if args.label_smoothing else None
    lam = None if args.labels_b is None else _bits(args.lam)
    values = (
        args.logits,
        last_logits,
        dlogits,
        dloss,
        batch,
        counts,
        cache,
        sums,
        _bits(args.temperature),
        _bits(args.alpha),
        _bits(grad_scale),
        smoothing,
        lam,
        B,
        m,
        args.fresh,
        slot_rows,
        step,
        last_step,
        out_step,
        args.ignore_index,
    )
    kernel = kernels.loop_kernel if form.looped else kernels.tile_kernel
    return Launch(kernel, -(-B // form.rows), values, constants, _options(form))


def _form(args: LossArgs, dlogits: Tensor | None) -> tuple[Plan, dict[str, Any]]:
    """Plan and constants of a launch over the rows of logits."""
    logits = args.logits
    real = gpu_memory.real_of(logits.dtype)
    C = logits.shape[1]
    form = plan(C, real.itemsize, logits.element_size(), args.label_smoothing != 0)
    last_step = C if args.last_logits is None else args.last_logits.stride(0)
    out_step = C if dlogits is None else dlogits.stride(0)
    constants = {
        "C": C,
        "ROWS": form.rows,
        "BLOCK": form.block,
        "VECTOR": form.vector,
        "UNIT": _unit(logits.stride(0) | last_step | out_step),
        "TAUS": isinstance(args.temperature, Tensor) and args.temperature.dim() == 1,
        "ALPHAS": isinstance(args.alpha, Tensor) and args.alpha.dim() == 1,
        "LAMS": isinstance(args.lam, Tensor) and args.lam.dim() == 1,
        "COUNT_BLOCK": _COUNT_WARP * form.num_warps,
        "SUM_BLOCK": _SUM_WARP * form.num_warps,
        "real": _tl(real),
    }
    return form, constants


def _batch(args: LossArgs) -> tuple[kernels.Batch, Tensor | None]:
    """The vectors over rows, and the teacher; None of them without overlap."""
    parity = None if args.pair is None else args.pair.parity
    rest = args.weight, parity, args.labels_b, int(args.distill_ignored) or None
    if args.overlap == 0:
        return kernels.Batch(args.labels, None, None, None, *rest), None
    if args.pair is None:
        given = args.teacher_rows, args.last_labels, args.last_valid
        return kernels.Batch(args.labels, *given, *rest), args.last_logits
    given = None, args.pair.labels, args.pair.valid
    return kernels.Batch(args.labels, *given, *rest), args.pair.logits


def _tl(real: torch.dtype) -> Any:
    return tl.float64 if real == torch.float64 else tl.float32


def _unit(steps: int) -> int:
    """The largest power of two, up to 8, that divides the steps (or-ed together)."""
    return (steps | 8) & -(steps | 8)


def _bits(x: float | Tensor) -> int | Tensor:
    """A tensor as it is; a float as the bits of a double, since Triton would round it to fp32. 0 is
    passed as -0.0: all bits 0 would be an int32, and compile again."""
    if isinstance(x, Tensor):
        return x
    return struct.unpack("q", struct.pack("d", x or -0.0))[0]


def _options(form: Plan) -> dict[str, Any]:
    return {"num_warps": form.num_warps, "maxnreg": form.registers}


def _run(launch: Launch) -> None:
    launch.kernel[(launch.grid,)](*launch.args, **launch.constants, **launch.options)
