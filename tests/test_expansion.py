"""A compact model put back into the dense shape computes the same, and the next, smaller plan cuts it."""

from __future__ import annotations

import pytest
import torch
from forms import FAMILIES, output, random_path, relative_error, signature_of

from converters.expansion import expand
from converters.surgery import compact
from deploy_prune.errors import PlanError


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_compact_model_is_the_same_in_the_dense_shape_and_can_be_cut_further(
    family: str, request: pytest.FixtureRequest
) -> None:
    model, signature = request.getfixturevalue(family), signature_of(family)
    path = random_path(model, signature, seed=1)
    larger, smaller = path.plan(0.3), path.plan(0.6)
    small = compact(model, larger)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))  # training
    wide = expand(small, larger, model)
    assert [p.shape for p in wide.parameters()] == [p.shape for p in model.parameters()]
    assert relative_error(output(wide, signature), output(small, signature)) < 1e-5
    again = compact(wide, larger, check_weights=False).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in small.state_dict().items())
    assert sum(p.numel() for p in compact(wide, smaller, check_weights=False).parameters()) < sum(
        p.numel() for p in small.parameters()
    )


def test_a_model_of_another_plan_is_refused(tiny_vit: torch.nn.Module) -> None:
    path = random_path(tiny_vit, signature_of("tiny_vit"), seed=1)
    with pytest.raises(PlanError, match="not the one this plan cuts"):
        expand(compact(tiny_vit, path.plan(0.3)), path.plan(0.6), tiny_vit)
