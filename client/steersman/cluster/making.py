"""Making the objects of a workload so that none is left behind."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from steersman.cluster.explain import is_transient
from steersman.cluster.objects import owned_by
from steersman.cluster.port import ClusterApi, kind_of
from steersman.cluster.problem import ApiProblem


def make(api: ClusterApi, things: Sequence[Mapping[str, Any]], *, patient: bool = True) -> dict[str, Any]:
    """Makes the first object, and the others as its own. Returns it.

    Raises ApiProblem. If one of the others is refused for good, or the caller is not `patient` and will not ask again,
    the first is taken back.
    """
    first = api.apply(things[0])
    try:
        make_rest(api, first, things[1:])
    except ApiProblem as problem:
        if not (patient and is_transient(problem)):
            with suppress(ApiProblem):  # the reason above is what matters
                metadata = first["metadata"]
                api.delete(kind_of(first), metadata["name"], metadata["uid"], wait_for_pods=False)
        raise
    return first


def make_rest(api: ClusterApi, owner: Mapping[str, Any], things: Sequence[Mapping[str, Any]]) -> None:
    """Makes objects that go with `owner`. Raises ApiProblem."""
    for thing in things:
        api.apply(owned_by(thing, owner))
