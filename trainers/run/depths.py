"""How deep in a model each weight lies, for learning rates that fall from the output to the input.

Source of the idea: Howard and Ruder, "Universal language model fine-tuning", ACL 2018, section 3.2; per block: Clark et
al., "ELECTRA", ICLR 2020, appendix A.
"""

from collections.abc import Iterator
from typing import Any

import keras

from trainers.world import private_api


def levels_of(model: keras.Model) -> dict[int, int]:
    """The level of each variable by its `id`: 0 at the input, a block more each.

    Blocks are the layers that the model holds itself, in the order in which its constructor names them (Keras's own
    kinds of models: in their order); a model in it is taken apart. A block without a matrix or a kernel (a
    normalization) counts with the block before it; what the model itself holds (a class token, positions, an embedding)
    counts with the first.
    """
    levels, level, started = {}, 0, False
    for block in _blocks(model):
        weights = [weight for weight in block.weights if id(weight) not in levels]
        matrices = any(len(weight.shape) > 1 for weight in weights)
        level += started and matrices
        started |= matrices
        levels |= dict.fromkeys(map(id, weights), level)
    return {id(variable): 0 for variable in model.variables} | levels


def _blocks(model: Any) -> Iterator[Any]:
    for layer in model.layers if isinstance(model, keras.Sequential) else private_api.sublayers_of(model):
        if isinstance(layer, keras.Model):
            yield from _blocks(layer)
        else:
            yield layer
