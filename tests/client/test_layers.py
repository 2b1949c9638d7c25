"""Which layers are tracked, what passes through, and gradients as matrices."""

import copy
import warnings

import pytest
import torch
from torch import nn

from skfac.client import ConfigurationError, PassThroughWarning
from skfac.client.layers import track_layers


def tracked(model: nn.Module, *skip: str, parameters=None) -> list[str]:
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.5)
    return [layer.name for layer in track_layers(model, optimizer, skip)]


def test_linear_and_convolution_are_tracked_in_order():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(3, 4))

    assert tracked(model) == ["0", "2"]


def test_what_passes_through_is_named_once():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.LSTM(4, 4), *(nn.LayerNorm(4) for _ in range(5))
    )
    with pytest.warns(PassThroughWarning) as caught:
        assert tracked(model) == ["0"]

    (warning,) = caught
    expected = "(LSTM: 1; LayerNorm: 2, 3, 4 and 2 more). Name them in skip"
    assert expected in str(warning.message)


def test_skip_is_silent():
    model = nn.ModuleDict({"head": nn.Linear(3, 4), "norm": nn.LayerNorm(4)})
    model["body"] = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tracked(model, "norm", "body.*") == ["head"]


def test_frozen_layers_are_left_out_silently():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)

    assert tracked(model) == ["1"]


def test_a_frozen_weight_with_a_trained_bias_passes_through():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)

    with pytest.warns(PassThroughWarning, match="Linear: 0"):
        assert tracked(model) == ["1"]


def test_layers_of_another_optimizer_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))

    assert tracked(model, parameters=list(model[0].parameters())) == ["0"]


def test_modules_that_share_weight_and_bias_are_one_layer():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias

    layers = track_layers(model, torch.optim.SGD(model.parameters(), lr=0.1), ())

    assert [layer.modules for layer in layers] == [(model[0], model[2]), (model[1],)]


def test_modules_that_share_a_weight_and_not_the_bias_pass_through():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight

    with pytest.warns(PassThroughWarning, match="Linear: 0, 1"):
        assert tracked(model) == ["2"]


def test_modules_that_share_a_bias_and_not_the_weight_pass_through():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias

    with pytest.warns(PassThroughWarning, match="Linear: 0, 1"):
        assert tracked(model) == ["2"]


def test_looking_at_a_parametrized_layer_changes_nothing():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(30, 30))
    model = nn.Sequential(layer, nn.Linear(30, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.warns(PassThroughWarning, match="ParametrizedLinear: 0"):
        assert tracked(model) == ["1"]

    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("change", ["weight", "bias", "no bias", "untied"])
def test_parameters_that_are_replaced_are_noticed(change):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    (layer,) = track_layers(model, torch.optim.SGD(model.parameters(), lr=0.1), ())
    layer.check_parameters()
    if change == "weight":
        model[0].weight = nn.Parameter(torch.randn(3, 3))
    elif change == "untied":
        model[1].weight = nn.Parameter(torch.randn(3, 3))
    else:
        model[0].bias = None if change == "no bias" else nn.Parameter(torch.randn(3))

    with pytest.raises(ConfigurationError, match="'0' has got other parameters"):
        layer.check_parameters()


def test_an_embedding_tied_to_a_head_passes_through():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, False))
    model[2].weight = model[0].weight

    with pytest.warns(PassThroughWarning, match="Embedding: 0; Linear: 2"):
        assert tracked(model) == ["1"]


def test_a_copy_of_a_module_runs_with_other_parameters():
    module = nn.Linear(3, 3)
    (layer,) = track_layers(module, torch.optim.SGD(module.parameters(), lr=0.5), ())

    assert layer.runs_in(module)
    assert not layer.runs_in(copy.deepcopy(module))


def test_a_model_without_layers_is_refused():
    with (
        pytest.raises(ConfigurationError, match="no layer to precondition"),
        pytest.warns(PassThroughWarning, match="LayerNorm: model"),
    ):
        tracked(nn.LayerNorm(3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda b: nn.Linear(3, 4, b),
        lambda b: nn.Conv2d(2, 4, 3, bias=b),
        lambda b: nn.Conv2d(4, 6, 3, groups=2, bias=b),
        lambda b: nn.ConvTranspose2d(4, 6, (2, 3), groups=2, bias=b),
    ],
)
def test_gradients_round_trip_as_matrices(make, bias):
    module = make(bias)
    (layer,) = track_layers(module, torch.optim.SGD(module.parameters(), lr=0.5), ())
    assert layer.gradient() is None
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: p.grad.clone() for name, p in module.named_parameters()}

    matrix = layer.gradient()
    assert matrix is not None
    assert matrix.shape[-2:] == (layer.spec.d_out, layer.spec.d_in)
    if bias:
        assert torch.equal(matrix[..., -1].flatten(), before["bias"])
    layer.set_gradient(matrix, torch.tensor(3.0))

    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, 3 * before[name])


def test_the_learning_rate_is_the_one_of_its_group_now():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    groups = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": model[1].parameters(), "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups)
    layers = track_layers(model, optimizer, ())
    optimizer.param_groups[1]["lr"] = torch.tensor(0.25)

    assert [layer.learning_rate for layer in layers] == [0.1, 0.25]


def test_the_larger_rate_of_weight_and_bias_counts():
    model = nn.Linear(3, 4)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.2)
    (layer,) = track_layers(model, optimizer, ())

    assert layer.learning_rate == 0.2
    optimizer.param_groups[1]["lr"] = torch.tensor(0.01)
    assert float(layer.learning_rate) == pytest.approx(0.1)


def test_groups_may_come_and_go():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    groups = [{"params": list(layer.parameters()), "lr": 0.1} for layer in model]
    groups[1]["lr"] = 0.2
    optimizer = torch.optim.SGD(groups)
    layers = track_layers(model, optimizer, ())

    optimizer.param_groups.reverse()
    assert [layer.learning_rate for layer in layers] == [0.1, 0.2]
    del optimizer.param_groups[0]
    assert [layer.learning_rate for layer in layers] == [0.1, 0.0]
