"""What the user is about to train: the model of a recipe or a folder, and the recipe's data."""

from __future__ import annotations

from dataclasses import dataclass

from bumblebee.checkpoint.hf_folder import load_config
from bumblebee.config import BumblebeeConfig
from bumblebee.model import Bumblebee
from bumblebee.recipe import Run


@dataclass(frozen=True)
class Subject:
    """What the checks of model and data are about.

    Args:
        config: of the model; None checks the options of the model families.
        model_class: of the model; None if it is not a Bumblebee.
        run: of the recipe, its model without weights and its data set up; None without a recipe.
        attention: the attention kernel that the recipe's model selects.
    """

    config: BumblebeeConfig | None = None
    model_class: type[Bumblebee] | None = Bumblebee
    run: Run | None = None
    attention: str = "auto"

    @classmethod
    def of_folder(cls, folder: str) -> Subject:
        """The model of a folder; its weights are not read.

        Raises:
            ValueError: not a model folder, or an architecture that Bumblebee does not implement.
        """
        return cls(load_config(folder))

    @classmethod
    def of_run(cls, run: Run) -> Subject:
        """The model and data of a recipe. Sets the data up.

        Raises:
            ValueError: files or records that cannot be used.
        """
        run.data.setup(run.seed)
        run.task.setup(run.data)
        model = run.task.model
        if isinstance(model, Bumblebee):
            return cls(model.config, type(model), run, model.attention)
        return cls(None, None, run)
