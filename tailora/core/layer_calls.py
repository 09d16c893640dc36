"""Layers that a model does not call: it only reads their weights, as Mamba does with dt_proj, or does not use them.

An adapter on such a layer has no effect until it is merged.

    USES            classes of transformers that read the weights of some layers
    LayerCalls      which adapted layers one forward of the model calls, and which of them its output trains
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, takewhile
from typing import Literal

from torch import Tensor, nn

from tailora.core.attach import attached_parts
from tailora.errors import TailoraWarning

Use = Literal["called", "called or read", "read"]

# Name of a class -> how its forward uses its children, except the ones it always calls. "called or read": one branch
# calls the child, a different one passes its weight to a function such as a fused kernel. For all other classes, the
# first forward shows which children are not called.
USES: dict[str, dict[str, Use]] = {
    "MambaMixer": {"conv1d": "read", "dt_proj": "read", "x_proj": "called or read", "out_proj": "called or read"},
    "FalconMambaMixer": {"conv1d": "read", **dict.fromkeys(("dt_proj", "x_proj", "out_proj"), "called or read")},
    "JambaMambaMixer": {"conv1d": "read", "dt_proj": "called or read"},
    **{
        name: {"conv1d": "read", "out_proj": "called or read"}
        for name in ("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer")
    },
    "Zamba2MambaMixer": {"conv1d": "read", "out_proj": "called or read"},
    **{
        name: dict.fromkeys(("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"), "read")
        for name in ("LayoutLMv2Encoder", "LayoutLMv3Encoder")
    },
    "WavLMAttention": dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), "read"),
    "DetrMHAttentionMap": {"k_proj": "read"},
    "MaskFormerDetrMHAttentionMap": {"k_proj": "read"},
    "ConditionalDetrMHAttentionMap": {"k_proj": "read"},
    "DabDetrMHAttentionMap": {"k_linear": "read"},
    "MobileBertLMPredictionHead": {"dense": "read", "decoder": "read"},
    "LongcatFlashTopkRouter": {"classifier": "read"},
}


def use_of(parent: nn.Module, name: str) -> Use:
    """Returns how a module uses its child of this name, as far as known before a forward."""
    uses = next((USES[cls.__name__] for cls in type(parent).__mro__ if cls.__name__ in USES), {})
    return uses.get(name, "called")


class LayerCalls:
    """Records which adapted layers and which of their parent modules run.

    layers: path -> adapted layer of `base_model`.
    """

    def __init__(self, base_model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        modules = dict(base_model.named_modules())
        self.layers = dict(layers)
        self.around: dict[str, list[nn.Module]] = {}  # path -> the modules around the layer, the innermost first
        for path in layers:
            names = path.split(".")
            outer = [".".join(names[:count]) for count in reversed(range(len(names)))]
            self.around[path] = [modules[name] for name in outer if name in modules]
        # path -> the module whose forward calls the layer, which is no list
        self.owners = {path: next(m for m in modules if not is_list(m)) for path, modules in self.around.items()}
        self.ran: set[nn.Module] = set()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        modules = {*self.layers.values(), *chain.from_iterable(self.around.values())}
        handles = [module.register_forward_pre_hook(lambda module, _: self.ran.add(module)) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def warned_of(self) -> Iterator[None]:
        """Records a forward within the block and warns about layers that it did not call."""
        with self.recorded():
            yield
        if paths := self.not_called:
            warnings.warn(
                f"the model did not call these adapted layers, although it called their parent module: "
                f"{', '.join(paths[:5])} ({len(paths)} in total). Their adapters have no effect and are not trained, "
                "but a merge would change the output if the module reads their weights. Use "
                f"exclude_modules={last_names(paths)}",
                TailoraWarning,
                stacklevel=4,
            )

    @property
    def not_called(self) -> list[str]:
        """Paths of layers that did not run although the module around them did.

        An expert without tokens and a layer in a tower of another modality are not among them.
        """
        return [path for path, layer in self.layers.items() if layer not in self.ran and self.owners[path] in self.ran]

    def read_by(self, forward: Callable[[], Tensor]) -> list[str]:
        """Returns the layers of `not_called` whose weights the forward uses in another way.

        A quantized weight, which has no gradient, counts as used.
        """
        weights = {path: [*self.layers[path].parameters()] for path in self.not_called}
        plain = [weight for own in weights.values() for weight in own if weight.is_floating_point()]
        try:
            for weight in plain:
                weight.requires_grad = True
            unused = {*plain} - leaves(forward())
        finally:
            for weight in plain:  # the base model is frozen
                weight.requires_grad = False
        return [path for path, own in weights.items() if not unused.issuperset(own)]

    def not_trained_by(self, output: Tensor) -> list[str]:
        """Returns paths of layers to which `output`, of the recorded forward, passes no gradient.

        They or their part of the model did not run, such as cross-attention or a tower for images, or the output does
        not depend on them smoothly: an indexer only selects tokens. An expert without tokens, or an element of any
        other list of modules, is not among them.
        """
        trained = leaves(output)

        def is_idle(path: str) -> bool:
            outer = [*takewhile(lambda module: module not in self.ran, self.around[path])]
            return not outer or not is_list(outer[-1])

        def has_gradient(layer: nn.Module) -> bool:
            return any(parameter in trained for part in attached_parts(layer) for parameter in part.parameters())

        return [
            path
            for path, layer in self.layers.items()
            if (not has_gradient(layer) if layer in self.ran else is_idle(path))
        ]


def leaves(output: Tensor) -> set[Tensor]:
    """Returns the tensors that a backward from `output` would give a gradient."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return {node.variable for node in seen if hasattr(node, "variable")}


def is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def last_names(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})
