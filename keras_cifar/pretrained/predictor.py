"""A network that comes with the package as something that classifies, by the functions of an export."""

from keras_cifar import pretrained
from keras_cifar.exporters import saved_model
from keras_cifar.inference.predictor import Predictor


class PretrainedPredictor(Predictor):
    """A Predictor of a network that is in no SavedModel.

    Raises:
        UsageError: there is none of this name.
        UserError: a file of it is damaged.
    """

    def __init__(self, name: str):
        model, card = pretrained.load(name)
        self.path = pretrained.DIRECTORY / f"{name}{pretrained.WEIGHTS}"
        self.size, self.class_names = card.image_shape[:2], card.class_names
        # Kept, since the functions do not keep the variables alive.
        self._loaded = saved_model.functions(model, card.class_names)
        functions = saved_model.signatures(self._loaded)
        self._take({name: f.get_concrete_function() for name, f in functions.items()})
