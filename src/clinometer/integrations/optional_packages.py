"""Packages that an integration needs and the rest of Clinometer does not."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from clinometer.messages import InputError


class MissingPackage(InputError, ImportError):
    """A package that is not installed; says how to install it. An ImportError too, as importing raises."""


def need(module: str, extra: str) -> ModuleType:
    """Import `module`. Raises MissingPackage if its package is not there at all."""
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # it is there, and lacks something itself
            raise
        raise MissingPackage("integrations.missing", package=package, extra=extra) from None
