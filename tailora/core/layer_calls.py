"""Which layers a model calls, and which it uses by reading their weight, as Mamba does with dt_proj.

An adapter on a layer that is not called does nothing until it is merged.

    use_of               what the code of the module around a layer tells, before anything runs
    LayerCalls           what one forward of the model tells
    FirstStep            the same for the first step of training, with a warning
    not_called_message, only_read_message
                         what to do about such layers
"""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from tailora.errors import TailoraWarning

# ---- What the code tells

Use = Literal["called", "called or read", "read"]
ABOUT_A_WEIGHT = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad"}


def _uses_of_children(cls: type[nn.Module]) -> dict[str, Use]:
    """Returns name of a child -> how the forward of a class of modules uses it; without the children that it calls.

    "called or read": one branch calls the child, another hands its weight to a function, such as a fused kernel, or
    multiplies by it. Empty if the code cannot be read.
    """
    read, operands, used = set[str](), set[str](), set[str]()
    for tree in _methods_from(cls, "forward", set()):
        parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"):
                continue
            attribute = parents[node]
            if not isinstance(attribute, ast.Attribute):
                used.add(node.attr)
            elif attribute.attr == "weight":
                parent = parents[attribute]
                if isinstance(parent, ast.Attribute) and parent.attr in ABOUT_A_WEIGHT:
                    continue
                read.add(node.attr)
                parent = parents[parent] if isinstance(parent, ast.keyword) else parent
                is_question = isinstance(parent, ast.Call) and ast.unparse(parent.func) in ("isinstance", "hasattr")
                if isinstance(parent, ast.Call | ast.BinOp) and not is_question:
                    operands.add(node.attr)
    return {name: "called or read" if name in used else "read" for name in read if name in operands or name not in used}


# Once for each class. The stub of lru_cache takes module classes for unhashable.
uses_of_children: Callable[[type[nn.Module]], dict[str, Use]] = cast(Any, cache(_uses_of_children))


def use_of(parent: nn.Module, name: str) -> Use:
    """Returns how a module uses the layer that is its child of this name, as far as its code tells."""
    return uses_of_children(type(parent)).get(name, "called")


def _methods_from(cls: type, name: str, seen: set[str]) -> Iterator[ast.AST]:
    """Yields the code of a method and of all methods that it names; what it overrides, too, if it mentions `super`."""
    seen.add(name)
    for owner in cls.__mro__:
        method = inspect.unwrap(vars(owner).get(name))  # type: ignore[arg-type]
        if owner.__module__.startswith("torch.") or not inspect.isfunction(method):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, SyntaxError):
            continue
        yield tree
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for called in sorted(names - seen):
            if called not in seen and inspect.isfunction(inspect.getattr_static(cls, called, None)):
                yield from _methods_from(cls, called, seen)
        if not any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(tree)):
            return


# ---- What a forward tells


class LayerCalls:
    """Notes, from `start` to `stop`, which adapted layers run, and which of the modules that hold them do.

    layers: path -> adapted layer of `base_model`.
    """

    def __init__(self, base_model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        modules = dict(base_model.named_modules())
        self.layers = dict(layers)
        self.owners = {path: modules[_owner(path, modules)] for path in layers}
        self._ran: set[nn.Module] = set()
        self._read: set[str] = set()
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        for module in {*self.layers.values(), *self.owners.values()}:
            self._handles.append(module.register_forward_pre_hook(self._note))

    def stop(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _note(self, module: nn.Module, _: Any) -> None:
        self._ran.add(module)

    @property
    def none_called(self) -> bool:
        return self._ran.isdisjoint(self.layers.values())

    @property
    def not_called(self) -> list[str]:
        """Paths of layers that did not run although the module around them did.

        An expert without tokens and a layer in a tower of another modality are not among them.
        """
        return [
            path for path, layer in self.layers.items() if layer not in self._ran and self.owners[path] in self._ran
        ]

    @property
    def read_elsewhere(self) -> list[str]:
        """Those of `not_called` whose weight took part in a computation within `reads`."""
        return [path for path in self.not_called if path in self._read]

    def reads(self) -> TorchDispatchMode:
        """Returns a context that looks at the tensors of every operation, which slows it down."""
        weights: dict[int, list[str]] = {}
        for path, layer in self.layers.items():
            for parameter in layer.parameters(recurse=False):
                storage = parameter.untyped_storage() if type(parameter) is nn.Parameter else None
                if storage is not None and storage.nbytes() == parameter.nbytes:  # else it is known by no address
                    weights.setdefault(storage.data_ptr(), []).append(path)
        return _Reads(weights, self._read)


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the paths to `read` whose weights, found by the address of their storage, an operation takes."""

    def __init__(self, paths: Mapping[int, list[str]], read: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paths, self.read = paths, read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if type(value) in (Tensor, nn.Parameter):
                self.read.update(self.paths.get(value.untyped_storage().data_ptr(), ()))
        return func(*args, **(kwargs or {}))


def _owner(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Returns the path of the module whose forward calls the layer at `path`: the next one that is no mere list."""
    owner = path.rpartition(".")[0]
    while isinstance(modules[owner], nn.ModuleList | nn.ModuleDict):
        owner = owner.rpartition(".")[0]
    return owner


class FirstStep(LayerCalls):
    """Warns of layers that a forward did not call, when the backward that follows comes.

    `stop` ends it, if none comes.
    """

    @property
    def has_ended(self) -> bool:
        return not self._handles

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begins before the forward. The gradient of one of these parameters tells that there was a backward."""
        self.start()
        self._of_gradients = [
            parameter.register_post_accumulate_grad_hook(self._after_backward)  # type: ignore[no-untyped-call]
            for parameter in parameters
            if parameter.requires_grad
        ]

    def _after_backward(self, _: Tensor) -> None:
        if self._handles and (paths := self.not_called):
            warnings.warn(not_called_message(paths), TailoraWarning, stacklevel=2)
        super().stop()

    def stop(self) -> None:
        super().stop()
        while self._of_gradients:
            self._of_gradients.pop().remove()


# ---- Messages


def not_called_message(paths: Sequence[str]) -> str:
    return (
        f"these adapted layers were not called, although the module around them was: {_some(paths)}. Their adapters do "
        "nothing and are not trained; if the module reads their weights by itself, a merge would change what it "
        f"computes. Leave them out: exclude_modules={last_names(paths)}"
    )


def only_read_message(paths: Sequence[str]) -> str:
    return (
        f"the modules around these layers read their weights without calling them: {_some(paths)}. Adapters there "
        f"would do nothing. Leave them out: exclude_modules={last_names(paths)}"
    )


def _some(paths: Sequence[str]) -> str:
    return f"{', '.join(paths[:5])} ({len(paths)} in all)"


def last_names(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})
