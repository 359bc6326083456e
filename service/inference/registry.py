"""The models that are served, by name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from concord.model.bundle import BundleError
from concord.model.modality import Modality
from concord.service.inference.jobs import Rejection
from concord.service.inference.served_model import ServedModel


class UnknownModel(LookupError):  # noqa: N818
    """No model of this name is served. The message lists some that are."""


class ModelRegistry:
    """One model a bundle folder. Changed on one event loop, by ``put``; ``choose`` may be called from any thread.

    Args:
        models: each from a different folder.
        default_model: name or name@version that serves requests without a model. None: the only name.

    Raises:
        BundleError: two have the same name and version, or the default is ambiguous or missing.
    """

    def __init__(self, models: Sequence[ServedModel], default_model: str | None = None) -> None:
        self._models = {model.runtime.bundle.path: model for model in models}
        names = {model.manifest.name for model in models}
        if default_model is None and len(names) > 1:
            raise BundleError(f"several models are served, {sorted(names)}: name one in CONCORD_DEFAULT_MODEL")
        self._default = default_model or names.pop()
        self._names = self._index(self._models)

    @property
    def models(self) -> Iterable[ServedModel]:
        """In no particular order."""
        return self._models.values()

    @property
    def folders(self) -> list[Path]:
        """Bundle folders, in the order in which they were added."""
        return list(self._models)

    def all(self) -> list[ServedModel]:
        """In the order of their names."""
        return sorted(self._models.values(), key=lambda model: _order(model.label))

    def at(self, folder: Path) -> ServedModel | None:
        """The model of a bundle folder."""
        return self._models.get(folder)

    def choose(self, name: str | None) -> ServedModel:
        """The model of a name, of name@version, or the default; of several versions of a name the highest.

        Raises:
            UnknownModel: there is none.
        """
        model = self._names.get(self._default if name is None else name)
        if model is None:
            raise UnknownModel(f"no model of this name is served: there is {', '.join(sorted(self._names)[:32])}")
        return model

    def current(self, model: ServedModel, name: str | None) -> ServedModel:
        """What is served from the folder of ``model`` now: it may have been replaced, by one that takes the same rows.

        Raises:
            UnknownModel: ``name`` names the version that was replaced.
        """
        current = self._models[model.runtime.bundle.path]
        return current if current is model or name is None or "@" not in name else self.choose(name)

    def check_put(self, folder: Path, model: ServedModel) -> None:
        """Raises BundleError where ``put`` would."""
        old = self._models.get(folder)
        if old is not None:
            _check_interface(old, model)
        self._index({**self._models, folder: model})

    def put(self, folder: Path, model: ServedModel) -> None:
        """Serve ``model`` from ``folder`` instead of the model that was served from it. There is no gap: every request runs on
        the one or on the other.

        Raises:
            BundleError: its name is taken, or its name, modalities or latent size are not those of the model it replaces.
        """
        self.check_put(folder, model)
        models = {**self._models, folder: model}
        self._models, self._names = models, self._index(models)

    def modalities(self) -> tuple[Modality, ...]:
        """Of all models."""
        return tuple(dict.fromkeys(modality for model in self.all() for modality in model.runtime.modalities))

    def liveness(self) -> dict[str, str]:
        """The heartbeat of each inference thread, "ok" or what is wrong."""
        return {f"{model.label}/inference": model.alive() for model in self.all()}

    def checks(self) -> dict[str, str]:
        """The readiness checks of all models, each "ok" or what is wrong."""
        return {f"{m.label}/{name}": result for m in self.all() for name, result in m.checks().items()}

    def check_capacity(self, pending: int = 0) -> Rejection | None:
        """Why every model would reject one more request now; None if some model would accept it.

        Args:
            pending: requests that are accepted and not submitted yet.
        """
        first = None
        for model in self._models.values():
            rejection = model.check_capacity(pending)
            if rejection is None:
                return None
            first = first or rejection
        return first

    def _index(self, models: Mapping[Path, ServedModel]) -> dict[str, ServedModel]:
        names: dict[str, ServedModel] = {}
        for model in sorted(models.values(), key=lambda one: _order(one.label)):
            if model.label in names:
                raise BundleError(f"{model.runtime.bundle.path}: {model.label} is served from another folder already")
            names[model.label] = names[model.manifest.name] = model
        if self._default not in names:
            raise BundleError(f"the default model {self._default} is not among {sorted(names)}")
        return names


def _check_interface(old: ServedModel, new: ServedModel) -> None:
    """Clients of the old model must be able to go on with the new one: with requests in flight and with stored vectors."""
    for field in ("name", "latent", "modalities"):
        if getattr(old.manifest, field) != getattr(new.manifest, field):
            raise BundleError(
                f"{new.runtime.bundle.path}: {field} differs from what is served, {old.label}: restart the service for that, "
                "or put the bundle into a separate folder"
            )


def _order(label: str) -> list[tuple[bool, int | str]]:
    """Natural sort key: version 10 comes after 9."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.findall(r"\d+|\D+", label)]
