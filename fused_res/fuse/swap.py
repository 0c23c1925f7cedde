"""``fuse_`` replaces the forward of a model's residual blocks in place, ``unfuse_`` restores it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ..dispatch.outlook import outlook
from ..nn.blocks import FusedForward, FusedPartialForward, FusedStem, Planned, with_signature_of
from ..nn.sequential import FusedSequential, unchain
from ..ops.res_block import check_recompute
from ..run.chain import has_chain, is_link, may_link
from ..run.description import kind_of
from ..run.guards import guard_of
from ..run.partial import methods
from .match import plan_of
from .modules import is_norm
from .plan import BlockPlan, PartialPlan, Unplanned
from .stem import stem_plan_of, stems_of
from .trace import Unfusable, Untraceable, in_words


@dataclass
class FuseReport:
    """The result of ``fuse_``. Prints as a table.

    fused: names of the blocks that run fused.
    partly: (name, reason) of blocks that have only segments fused.
    stem: (name, what is fused) of modules that have convolution, BatchNorm and ReLU outside blocks.
    skipped: (name, reason) of blocks that are not changed.
    already: names of blocks that were fused before.
    no_stem: (name, reason) of modules that may have a stem, which is not fused.
    advice: sentences that say how to make the model faster.
    runs: a sentence on what will run on this device, in this dtype, on this backend.

    Examples:
        >>> net = torch.nn.Sequential(fused_res.reference.ResBlock(64, 64))
        >>> fused_res.fuse_(net).fused
        ['0']
    """

    fused: list[str] = field(default_factory=list)
    partly: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    runs: str = ""
    stem: list[tuple[str, str]] = field(default_factory=list)
    no_stem: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(name, "stem", what) for name, what in self.stem]
        rows += [(name, "fused", "") for name in self.fused]
        rows += [(name, "partly", reason) for name, reason in self.partly]
        rows += [(name, "skipped", reason) for name, reason in self.skipped]
        shown = [
            ("block", "result", "reason"),
            *((n or "(the model)", r, why) for n, r, why in rows),
        ]
        width = max(len(name) for name, _, _ in shown)
        lines = [f"{name:<{width}}  {result:<7}  {why}".rstrip() for name, result, why in shown]
        counts = [(self.fused, "fused"), (self.partly, "partly"), (self.skipped, "skipped"),
                  (self.already, "already fused"), (self.stem, "stem")]  # fmt: skip
        always = "fused", "skipped"
        total = ", ".join(f"{len(of)} {what}" for of, what in counts if of or what in always)
        stems = [f"no stem of {name or '(the model)'}: {reason}" for name, reason in self.no_stem]
        runs = [self.runs] if self.runs else []
        return "\n".join([*lines, total, *stems, *self.advice, *runs])


_classes: WeakValueDictionary[tuple, type[nn.Module]] = WeakValueDictionary()


def fused_class(
    original: type[nn.Module], plan: BlockPlan | PartialPlan | Unplanned, recompute: str | None
) -> type[nn.Module]:
    """The class of a fused block: ``original`` with its forward replaced by ``plan``."""
    key = original, plan, recompute
    if plan.record is not None and plan.record.leads_back:
        return _fused_class(*key)  # a cache would keep the module alive
    try:
        found = _classes.get(key)
    except TypeError:  # a forward may have constants without a hash
        return _fused_class(*key)
    if found is None:
        found = _classes[key] = _fused_class(*key)
    return found


def _fused_class(
    original: type[nn.Module], plan: BlockPlan | PartialPlan | Unplanned, recompute: str | None
) -> type[nn.Module]:
    mixin = FusedPartialForward if isinstance(plan, PartialPlan) else FusedForward
    mixin = FusedStem if getattr(plan, "stem", False) else mixin
    body = {
        "plan": plan,
        "recompute": recompute,
        "original": original,
        "forward": with_signature_of(mixin.forward, original.forward),
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex,
        "__setstate__": _set_state,
    }
    if isinstance(plan, PartialPlan):
        body |= methods(plan)
    return type(f"Fused{original.__name__}", (mixin, original), body)


def _rebuild(
    original: type[nn.Module], plan: BlockPlan | PartialPlan | Unplanned, recompute: str | None
) -> nn.Module:
    cls = fused_class(original, plan, recompute)
    return cls.__new__(cls)


def _reduce_ex(self, protocol):
    # the class is made at run time, so copies and pickles name its sources
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    made_from = type(self).original, type(self).plan, type(self).recompute
    return _rebuild, made_from, state


def _set_state(self, state):
    cls = type(self)
    cls.original.__setstate__(self, state)
    if isinstance(cls.plan, Unplanned):
        self.__class__ = made = cls.original
        with contextlib.suppress(Unfusable):
            plan = (stem_plan_of if cls.plan.stem else plan_of)(self, cls.plan.opaque)
            made = made if plan is None else fused_class(made, plan, cls.recompute)
        served = "model_class" in cls.__dict__
        self.__class__ = cls._serving_class(made) if served else made


def refuse_wrapped(model: nn.Module, caller: str = "fuse_") -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        kind = type(module).__name__
        where = f"its child {name!r}" if name else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model must not be scripted, but {where} is a {kind}: call {caller} before "
                f"torch.jit.script"
            )
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError(
                f"model must not be compiled, but {where} is a {kind}: call {caller} before "
                f"torch.compile"
            )
        if kind in ("DistributedDataParallel", "DataParallel") or kind.startswith(
            "FullyShardedDataParallel"
        ):
            raise ValueError(
                f"model must not be wrapped, but {where} is a {kind}: call {caller}(model) first "
                f"and wrap the result, or {caller}(model.module)"
            )


ATTRIBUTES = ("plan", "backend", "recompute", "original", "_usual", "_quiet")  # a fused block's
CHANNELS_LAST = (
    "advice: the weights are in NCHW order; model.to(memory_format=torch.channels_last) and inputs "
    "in it are faster"
)


def _why_no_subclass(block: nn.Module) -> str | None:
    """Why a block's class cannot have a fused subclass, or None."""
    if isinstance(block, fx.GraphModule):  # it writes its forward onto its class
        return "a torch.fx graph: fuse_ before it is traced"
    fused = isinstance(block, Planned)
    own = [] if fused else [attribute for attribute in ATTRIBUTES if hasattr(block, attribute)]
    return f"it has an attribute {own[0]!r} of its own" if own else None


def _is_channels_last(model: nn.Module) -> bool:
    """Whether the weights are channels_last; those that are in both layouts do not count."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    telling = [w for w in weights if w.size(1) > 1 and w[0, 0].numel() > 1]
    return all(w.is_contiguous(memory_format=torch.channels_last) for w in telling)


def outlook_of(model: nn.Module) -> str:
    """What will run on the device and in the dtype of the model's convolutions."""
    weight = next(m.weight for m in model.modules() if isinstance(m, nn.Conv2d))
    return "" if weight.is_meta else outlook(weight.device, weight.dtype)


def fuse_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
    dry_run: bool = False,
    recompute: str | None = None,
    stems: bool | None = None,
) -> FuseReport:
    """Makes every residual block of ``model`` that can be fused run fused kernels, in place.

    A block is recognised by the dataflow of its forward, not by the names of its class and
    attributes. Some blocks have more in them than one op computes (squeeze-and-excitation, drop
    path, pre-activation, ...). In these, segments of consecutive convolutions, norms, ReLUs and
    adds run fused.

    A convolution and the BatchNorm and ReLU after it run fused outside of blocks too, as in the
    stem of a network, where a trace shows what the forward around them does. A maxpool after them
    stays PyTorch's. A trace runs a forward on proxies: what that writes outside of the model, or
    prints, it does then too.

    Only the class of a block, or of the module around a stem, changes, to a subclass. Name,
    children, attributes, Parameter objects, state_dict keys and hooks stay. An ``nn.Sequential``
    that has consecutive blocks with identity shortcuts gets a subclass too, which runs these blocks
    in one call for inference. Another call of ``fuse_`` changes nothing. ``unfuse_`` reverses it.

    Args:
        model: any module that is not wrapped, compiled or scripted.
        filter_fn: called with (block, name); with ``stems=True`` with the module around a stem and
            its name too. Only those for which it returns True are fused.
        strict: raise, and change nothing, if a block is skipped for another reason than the filter.
            A stem never is a reason.
        dry_run: make the report, and change nothing.
        recompute: ``last``: in training, the backward pass of a block or segment computes its last
            convolution again, and the forward pass does not keep the output of that convolution
            (about 40 % of the memory that a fused bottleneck keeps). None: the output is kept.
        stems: fuse convolution, BatchNorm and ReLU outside of blocks too. Default: where no
            ``filter_fn`` is given.

    Returns:
        FuseReport: names of the fused blocks, of the partly fused ones and of the skipped ones,
            with reasons; and of the modules around stems.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` or a module in it is wrapped (DDP, FSDP), compiled or scripted;
            ``strict`` and a block was skipped; or ``recompute`` has another value.

    Warns:
        UserWarning: no block or stem was fused, now or before.

    Examples:
        >>> net = torch.nn.Sequential(fused_res.reference.ResBlock(64, 64))
        >>> print(fused_res.fuse_(net.to(memory_format=torch.channels_last)))
        block  result   reason
        0      fused
        1 fused, 0 skipped
        on cpu in float32 fused kernels run
    """
    refuse_wrapped(model)
    check_recompute(recompute)
    search = _Search(filter_fn, recompute)
    search.visit(model, "")
    if stems or (stems is None and filter_fn is None):
        search.visit_outside(model)
    report = search.report
    if strict and report.skipped:
        raise ValueError(f"strict=True, but blocks were skipped; nothing was changed:\n{report}")
    report.skipped += search.filtered
    if search.classes and not _is_channels_last(model):
        report.advice.append(CHANNELS_LAST)
    if not dry_run:
        _put_classes(search.classes)
        for module in model.modules():
            if type(module) is nn.Sequential and has_chain(module):
                module.__class__ = FusedSequential
    if search.classes or report.already or any(isinstance(m, FusedStem) for m in model.modules()):
        report.runs = outlook_of(model)
    else:
        warnings.warn(f"fuse_ found no residual block to fuse\n{report}", stacklevel=2)
    return report


class _Search:
    """Looks for residual blocks in a model, children before their parents.

    classes: the blocks to change, and their new classes.
    filtered: (name, reason) of blocks that the filter leaves out.
    """

    def __init__(
        self, filter_fn: Callable[[nn.Module, str], bool] | None, recompute: str | None
    ) -> None:
        self.report = FuseReport()
        self.classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self.filtered: list[tuple[str, str]] = []
        self._filter, self._recompute = filter_fn, recompute
        self._opaque: dict[str, bool] = {}  # name of a skipped block -> whether it may be no block
        self._seen: set[int] = set()

    def visit(self, module: nn.Module, name: str) -> bool:
        """Whether a residual block was found in ``module``."""
        if id(module) in self._seen:
            return False
        self._seen.add(id(module))
        if isinstance(module, FusedForward) and (
            "original" not in type(module).__dict__ or guard_of(module, module.plan.record).same
        ):
            self.report.already.append(name)
            return True
        inside = [
            self.visit(inner, f"{name}.{key}" if name else key)
            for key, inner in module.named_children()
        ]
        forward = type(module).forward
        if any(inside) or not inside or forward in (nn.Sequential.forward, nn.Module.forward):
            return any(inside)
        if isinstance(module, nn.Conv2d) or parametrize.is_parametrized(module):
            return False  # a single layer, its weight computed from others
        if not any(isinstance(m, nn.Conv2d) for m in module.modules()):
            return False
        return self._is_block(module, name)

    def _is_block(self, module: nn.Module, name: str) -> bool:
        """Whether it is a residual block that can be fused. Reports it, or why it is none."""
        prefix = f"{name}." if name else ""
        inner = {n: n[len(prefix) :] for n in self._opaque if n.startswith(prefix)}
        try:
            with torch.inference_mode(False):  # torch.fx cannot trace inference tensors
                plan = plan_of(module, inner.values())
        except Unfusable as reason:
            self.report.skipped.append((name, str(reason)))
            normless = not any(map(is_norm, module.modules()))
            self._opaque[name] = normless or isinstance(reason, Untraceable)
            return False  # its parent may be a block with more to fuse
        if plan is None:
            return False
        cls = self._class_for(module, plan)
        if isinstance(cls, str):
            self.report.skipped.append((name, cls))
            return False
        if self._filter is not None and not self._filter(module, name):
            self.filtered.append((name, "left out by filter_fn"))
            return True
        self.report.skipped = [
            row for row in self.report.skipped if not (row[0] in inner and self._opaque[row[0]])
        ]
        if isinstance(plan, PartialPlan):
            norms = sum(isinstance(m, _BatchNorm) for m in module.modules())
            self.report.partly.append((name, f"{plan.norms} of {norms} norms; {plan.reason}"))
        else:
            self.report.fused.append(name)
        self.classes.append((module, cls))
        return True

    def _class_for(self, module: nn.Module, plan: BlockPlan | PartialPlan) -> type[nn.Module] | str:
        """The class of a module with this plan, or why there is none."""
        reason = _why_no_subclass(module)
        if reason is not None:
            return reason
        try:
            return fused_class(kind_of(module), plan, self._recompute)
        except Exception as error:  # of its __init_subclass__ or metaclass
            return f"its class cannot have a subclass: {in_words(error)}"

    def visit_outside(self, model: nn.Module) -> None:
        """Looks for convolution, norm and ReLU outside of the blocks that were found."""
        report, new = self.report, {id(module): cls.plan for module, cls in self.classes}
        others = (*report.partly, *report.skipped, *self.filtered)
        blocks = {*report.fused, *report.already, *(name for name, _ in others)}

        def links(module: nn.Module) -> bool:
            plan = new.get(id(module))
            if plan is None:
                return is_link(module)
            return isinstance(plan, BlockPlan) and may_link(plan)

        with torch.inference_mode(False):
            found = stems_of(model, blocks, links)
        for name, module, plan in found:
            cls = plan if isinstance(plan, str) else self._class_for(module, plan)
            if isinstance(cls, str):
                report.no_stem.append((name, cls))
            elif self._filter is None or self._filter(module, name):
                report.stem.append((name, plan.reason))
                self.classes.append((module, cls))


def _put_classes(classes: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Changes the class of every block, or of none if one fails."""
    before = [(module, type(module)) for module, _ in classes]
    try:
        for module, cls in classes:
            module.__class__ = cls
    except BaseException:
        for module, cls in before:
            module.__class__ = cls
        raise


def unfuse_stems(model: nn.Module) -> None:
    """Gives every stem that ``fuse_`` changed its own class back, in place."""
    for module in model.modules():
        original = type(module).__dict__.get("original")
        if isinstance(module, FusedStem) and original is not None:
            module.__class__ = original


def unfuse_(model: nn.Module) -> list[str]:
    """Gives every block and stem that ``fuse_`` changed its own class back, in place.

    Args:
        model: any module.

    Returns:
        list[str]: the names of the blocks.

    Examples:
        >>> net = torch.nn.Sequential(fused_res.reference.ResBlock(64, 64))
        >>> report = fused_res.fuse_(net)
        >>> fused_res.unfuse_(net)
        ['0']
    """
    names = []
    for name, module in model.named_modules():
        original = type(module).__dict__.get("original")
        if isinstance(module, FusedForward) and original is not None:
            module.__class__ = original
            names.append(name)
        elif type(module) is FusedSequential:
            unchain(module)
    unfuse_stems(model)
    return names
