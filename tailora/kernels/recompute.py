"""What is cheap to compute again is not kept for the backward, in layers of any architecture.

Half of what autograd keeps of a decoder layer follows in a pass or two from the rest: outputs of norms and activations,
gate times up, float32 copies of 16-bit tensors, masks of dropout. Within `recomputed` the output of a cheap function
gets a recipe, the function and its arguments, unless arguments that nothing else keeps would take as much memory.
autograd then keeps the recipe in place of the tensor. The backward computes the same bits again, each tensor once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

NAMES = """
    to float half bfloat16 double type type_as contiguous clone reshape flatten repeat_interleave cat stack
    add sub __rsub__ mul div true_divide __rdiv__ neg abs clamp where masked_fill
    pow square sqrt rsqrt reciprocal exp erf cos sin tanh sigmoid mean sum
    relu relu6 leaky_relu elu silu gelu mish softplus hardswish hardtanh hardsigmoid logsigmoid
    layer_norm rms_norm
"""  # of functions whose result depends on the arguments alone, in a pass or two over memory
CHEAP = {getattr(place, name) for name in NAMES.split() for place in (torch, Tensor, F) if hasattr(place, name)}
LEAST_BYTES = 1 << 16  # of a tensor that is worth a recipe
MOST_CALLS = 32  # of functions, to compute one tensor again
PLAIN = (Tensor, nn.Parameter, FakeTensor)  # classes of tensors that are what their storage says


@contextmanager
def recomputed() -> Iterator["Recomputing"]:
    """Within the block autograd does not keep what is cheap to compute again."""
    mode = Recomputing()
    with saved_tensors_hooks(mode.pack, _Reference.unpack), mode:
        yield mode


class _Kept:
    """A storage that stays until the backward.    is_saved: by autograd, not only as an argument of recipes."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage, self.is_saved = storage, False


class _Recipe:
    """How to compute the tensor of a storage again, from `leaves`.    uses: how often autograd will ask for it."""

    value: Tensor | None  # between the first use and the last, or from the moment when an argument changes

    def __init__(self, function: Callable[..., Any], inputs: list[Any], structure: TreeSpec, y: Tensor) -> None:
        self.function, self.inputs, self.structure = function, inputs, structure
        self.leaves, self.calls = set[_Kept](), 1
        for source in inputs:
            if isinstance(source, _Reference):
                self.leaves |= {source.kept} if source.recipe is None else source.recipe.leaves
                self.calls += 0 if source.recipe is None else source.recipe.calls
        self.dtype, self.version, self.uses, self.value = y.dtype, y._version, 0, None

    @property
    def new_bytes(self) -> int:
        """The memory that would be kept for this recipe alone."""
        return sum(kept.storage.nbytes() for kept in self.leaves if not kept.is_saved)

    def compute(self) -> Tensor:
        if self.value is not None:
            return self.value
        inputs = [source.get() if isinstance(source, _Reference) else source for source in self.inputs]
        args, kwargs = tree_unflatten(inputs, self.structure)
        with torch.no_grad():
            value: Tensor = self.function(*args, **kwargs)
        if self.uses > 0:
            self.value = value
        return value


class _Reference:
    """What stands for a tensor: an alias, which must not change until it is read, or a view of what a recipe makes."""

    tensor: Any  # None with a recipe
    kept: Any
    recipe: _Recipe | None

    def __init__(self, tensor: Tensor, kept: _Kept | None, recipe: _Recipe | None) -> None:
        self.tensor, self.version, self.kept = tensor.detach() if kept else None, tensor._version, kept
        self.set_recipe(tensor, recipe)

    def set_recipe(self, tensor: Tensor, recipe: _Recipe | None) -> None:
        self.recipe = recipe
        if recipe is not None:
            self.tensor = self.kept = None
            self.geometry = tensor.shape, tensor.stride(), tensor.storage_offset()

    def mark_saved(self) -> None:
        """Called when autograd keeps this reference."""
        if self.recipe is None:
            self.kept.is_saved = True
            return
        self.recipe.uses += 1
        for kept in self.recipe.leaves:
            kept.is_saved = True

    def get(self) -> Tensor:
        if self.recipe is not None:
            return self.recipe.compute().as_strided(*self.geometry)
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in place; "
                "train this model with --fast off"
            )
        tensor: Tensor = self.tensor
        return tensor

    def unpack(self) -> Tensor:
        with torch._C.DisableTorchFunction():
            tensor = self.get()
        if self.recipe is not None:
            self.recipe.uses -= 1
            if self.recipe.uses == 0 and self.recipe.leaves:
                self.recipe.value = None
        return tensor


class Recomputing(TorchFunctionMode):
    """Writes recipes, and decides what autograd keeps. Use `recomputed`."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = WeakValueDictionary[int, _Kept]()  # by address of the storage
        self._recipes = WeakSet[_Recipe]()
        self._packed: list[tuple[Tensor, _Reference]] | None = None  # within a cheap function: what it saves

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in CHEAP:
            if torch.is_grad_enabled():
                return self._call(func, args, kwargs)
        elif func is F.dropout and torch.is_grad_enabled():
            return self._dropout(*args, **kwargs)
        elif (_changes_argument(func) or "out" in kwargs) and isinstance(kwargs.get("out", args[0]), Tensor):
            self._before_change(kwargs.get("out", args[0]))
        return func(*args, **kwargs)

    def storages(self) -> Iterator[tuple[int, torch.UntypedStorage]]:
        """Yields what is kept at present, by address."""
        return ((key, kept.storage) for key, kept in self.kept.items() if kept.is_saved)

    def pack(self, tensor: Tensor) -> _Reference:
        with torch._C.DisableTorchFunction():  # or each attribute would be a call of `__torch_function__`
            reference = self._reference(tensor)
            reference.mark_saved()
        if self._packed is not None:
            self._packed.append((tensor, reference))
        return reference

    def _reference(self, tensor: Tensor) -> _Reference:
        storage = tensor.untyped_storage()
        recipe = vars(storage).get("recipe")
        if recipe is not None and recipe.version == tensor._version and recipe.dtype == tensor.dtype:
            return _Reference(tensor, None, recipe)
        kept = self.kept.get(storage._cdata)
        if kept is None:
            kept = _Kept(storage)
            kept.is_saved = isinstance(tensor, nn.Parameter)  # by the model
            if type(tensor) in PLAIN:
                self.kept[storage._cdata] = kept
        return _Reference(tensor, kept, None)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the function's result, and writes its recipe if that saves memory."""
        packed = self._packed = []
        try:
            y = func(*args, **kwargs)
        finally:
            self._packed = None
        if type(y) not in PLAIN or y.nbytes < LEAST_BYTES:
            return y
        storage = y.untyped_storage()
        inputs, structure = tree_flatten((args, kwargs))
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        is_view = any(type(x) not in PLAIN or x.untyped_storage() is storage for x in tensors)
        if is_view or storage.nbytes() != y.nbytes:
            return y
        inputs = [self._reference(x) if isinstance(x, Tensor) else x for x in inputs]
        recipe = _Recipe(func, inputs, structure, y)
        if recipe.calls <= MOST_CALLS and recipe.new_bytes < y.nbytes:
            vars(storage)["recipe"] = recipe
            self._recipes.add(recipe)
            for tensor, reference in packed:
                if tensor.untyped_storage() is storage:  # the function saves its result, as tanh does
                    reference.set_recipe(tensor, recipe)
                    reference.mark_saved()
        return y

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """torch's dropout. On a CPU its mask is drawn again."""
        if not training or p in (0, 1) or inplace or x.device.type != "cpu":
            return F.dropout(x, p, training, inplace)
        noise = self._call(_noise, (x.shape, x.dtype, p, torch.get_rng_state()), {})
        torch.empty_like(x).bernoulli_(1 - p)
        y: Tensor = self._call(torch.mul, (x, noise), {})
        return y

    def _before_change(self, tensor: Tensor) -> None:
        """Computes what follows from the tensor while it is as it was."""
        kept = self.kept.get(tensor.untyped_storage()._cdata)
        followers = [] if kept is None else [recipe for recipe in self._recipes if kept in recipe.leaves]
        for recipe in followers:
            recipe.value = recipe.compute()
        for recipe in followers:
            recipe.inputs, recipe.leaves = [], set()


def _noise(shape: torch.Size, dtype: torch.dtype, p: float, state: Tensor) -> Tensor:
    """Returns what dropout multiplies by, as torch draws it in this state of the random numbers."""
    generator = torch.Generator()
    generator.set_state(state)
    return torch.empty(shape, dtype=dtype).bernoulli_(1 - p, generator=generator).div_(1 - p)


def _changes_argument(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
