"""Which name leads to which scorer.

A name leads, in this order, to

- a scorer that the settings fix: a function or an ensemble;
- the model that a scorer of the settings points to; `point` changes it;
- a loaded model by its own name, so that a new model can be tried before anything is switched to it.

It is read and changed on the event loop only, and a change is one assignment: a name leads to the one or to the other.
"""

from collections.abc import Iterator, Mapping

from steersman.reward.served_model import ModelState, ServedModel
from steersman.reward.types import Scorer


class Roster(Mapping[str, Scorer]):
    """The scorers of a server by every name that can be asked for."""

    def __init__(self) -> None:
        self.fixed: dict[str, Scorer] = {}
        self.models: dict[str, ServedModel] = {}
        self._pointers: dict[str, ServedModel] = {}

    def point(self, scorer: str, model: ServedModel) -> None:
        """Lets a name lead to a model, from the next lookup on."""
        self._pointers[scorer] = model

    def pointed(self, scorer: str) -> ServedModel | None:
        """The model that a scorer of the settings points to; None for other names."""
        return self._pointers.get(scorer)

    def pointing_to(self, model: ServedModel) -> list[str]:
        """Names of the scorers that point to a model, ascending."""
        return sorted(name for name, found in self._pointers.items() if found is model)

    def in_service(self) -> list[Scorer]:
        """What the settings name leads to: what a healthy server can use."""
        return [*self.fixed.values(), *{id(model): model for model in self._pointers.values()}.values()]

    def __getitem__(self, name: str) -> Scorer:
        if name in self.fixed:
            return self.fixed[name]
        if name in self._pointers:
            return self._pointers[name]
        model = self.models[name]
        if model.state is not ModelState.READY:
            raise KeyError(name)
        return model

    def __iter__(self) -> Iterator[str]:
        yield from self.fixed
        yield from self._pointers
        for name, model in self.models.items():
            if name not in self.fixed and name not in self._pointers and model.state is ModelState.READY:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)
