"""Which parameter goes to which optimizer, and which ones decay."""

import math

import pytest
import torch
from torch import Tensor, nn

from clinometer.messages import InputError
from clinometer.optim.adamw import AdamW
from clinometer.optim.make_optimizers import make_optimizers, set_lr
from clinometer.optim.muon import Muon
from clinometer.optim.sgd import SGD

MATRICES = ["layers.0.attn.q_proj.weight", "layers.0.ffn.w1.weight"]
OTHERS = ["token_embeddings.weight", "lm_head.weight"]
NORMS = ["layers.0.ln1.weight", "ln_final.weight"]


def named() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        **dict.fromkeys(MATRICES, (24, 8)),
        **dict.fromkeys(OTHERS, (10, 8)),
        **dict.fromkeys(NORMS, (8,)),
    }
    pairs = [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]
    for _, p in pairs:
        p.grad = torch.randn(p.shape, generator=generator)
    return pairs


def groups(optimizer: torch.optim.Optimizer) -> dict[str, tuple[list[str], float]]:
    return {g["name"]: (g["param_names"], g["weight_decay"]) for g in optimizer.param_groups}


def test_adamw_decays_what_has_two_dimensions_and_no_vectors() -> None:
    (optimizer,) = make_optimizers(named(), lr=1e-3, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1)
    assert isinstance(optimizer, AdamW)
    assert groups(optimizer) == {"decayed": (MATRICES + OTHERS, 0.1), "not decayed": (NORMS, 0.0)}
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.95), 1e-7)


def test_sgd_gets_its_momentum() -> None:
    (optimizer,) = make_optimizers(named(), name="sgd", lr=0.1, weight_decay=0.0, momentum=0.9)
    assert isinstance(optimizer, SGD)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest() -> None:
    muon, adamw = make_optimizers(named(), name="muon", lr=1e-2, weight_decay=0.1)
    assert isinstance(muon, torch.optim.Muon)
    assert groups(muon) == {"matrices": (MATRICES, 0.1)}
    assert muon.param_groups[0]["momentum"] == 0.95
    assert groups(adamw) == {"decayed": (OTHERS, 0.1), "not decayed": (NORMS, 0.0)}


def test_muons_update_has_the_size_of_adamws() -> None:
    """match_rms_adamw: an orthogonal 24×8 update has RMS 1/√24, times 0.2·√24 gives 0.2·lr."""
    pairs = named()
    before = {name: p.detach().clone() for name, p in pairs}
    for optimizer in make_optimizers(pairs, name="muon", lr=1e-2, weight_decay=0.0):
        optimizer.step()
    for name, p in pairs:
        rms = (p.detach() - before[name]).square().mean().sqrt().item()
        if name in MATRICES:
            assert rms == pytest.approx(0.2e-2, rel=0.3)
        else:
            assert rms == pytest.approx(1e-2, rel=1e-3)


def test_every_parameter_is_in_exactly_one_group() -> None:
    for name in ("adamw", "sgd", "muon"):
        pairs = named()
        optimizers = make_optimizers(iter(pairs), name=name, lr=0.1)
        held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for _, p in pairs)


def test_a_tied_weight_counts_once_under_its_first_name() -> None:
    shared = nn.Parameter(torch.ones(4, 2))
    (optimizer,) = make_optimizers([("token_embeddings.weight", shared), ("lm_head.weight", shared)], lr=0.1)
    assert groups(optimizer)["decayed"][0] == ["token_embeddings.weight"]


def test_a_kind_without_parameters_makes_no_optimizer() -> None:
    pairs = [("layers.0.w.weight", nn.Parameter(torch.ones(2, 2)))]
    assert [type(o) for o in make_optimizers(pairs, name="muon", lr=0.1)] == [Muon]
    pairs = [("ln_final.weight", nn.Parameter(torch.ones(2)))]
    assert [type(o) for o in make_optimizers(pairs, name="muon", lr=0.1)] == [AdamW]


@pytest.mark.parametrize(("given", "meant"), [("adam", "adamw"), ("Muon", "muon"), ("sdg", "sgd")])
def test_an_unknown_name_is_answered_with_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(InputError) as error:
        make_optimizers(named(), name=given, lr=0.1)
    for language in ("en", "zh"):
        sentence = error.value.render(language)
        assert "adamw, sgd, muon" in sentence
        assert sentence.count(repr(meant)) == 1


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(InputError) as error:
        make_optimizers(named(), name="xyz", lr=0.1)
    assert error.value.render("en") == "There is no optimizer 'xyz'; the optimizers are adamw, sgd, muon."


def test_no_parameters_is_refused() -> None:
    with pytest.raises(InputError) as error:
        make_optimizers(iter([]), lr=0.1)
    assert error.value.key == "optim.no_parameters"


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("lr", [-1.0, math.nan])
def test_a_bad_rate_is_refused_by_every_choice(name: str, lr: float) -> None:
    with pytest.raises(InputError) as error:
        make_optimizers(named(), name=name, lr=lr)
    assert error.value.key == "optim.nonnegative"


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_the_embeddings_keep_their_own_rate_in_proportion(name: str) -> None:
    pairs = named()
    optimizers = make_optimizers(pairs, name=name, lr=0.01, embedding_lr=0.03, weight_decay=0.1)
    by_name = {group["name"]: group for optimizer in optimizers for group in optimizer.param_groups}
    assert by_name["embeddings"]["param_names"] == ["token_embeddings.weight"]
    assert by_name["embeddings"]["weight_decay"] == 0.1
    everything = [key for group in by_name.values() for key in group["param_names"]]
    assert sorted(everything) == sorted(key for key, _ in pairs)

    set_lr(optimizers, 0.002)
    rates = {key: group["lr"] for key, group in by_name.items()}
    assert rates.pop("embeddings") == pytest.approx(0.006, rel=1e-12)
    assert set(rates.values()) == {0.002}


def test_a_rate_for_the_embeddings_survives_saving() -> None:
    first = make_optimizers(named(), lr=0.01, embedding_lr=0.04)
    second = make_optimizers(named(), lr=0.01, embedding_lr=0.01)
    second[0].load_state_dict(first[0].state_dict())
    set_lr(second, 0.5)
    assert {group["lr"] for group in second[0].param_groups if group["name"] == "embeddings"} == {2.0}


def test_without_one_the_groups_are_those_of_before() -> None:
    (plain,) = make_optimizers(named(), lr=0.01)
    assert all("lr_factor" not in group for group in plain.param_groups)
    assert groups(plain) == {"decayed": (MATRICES + OTHERS, 0.01), "not decayed": (NORMS, 0.0)}


def test_a_rate_in_proportion_to_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="lr is 0"):
        make_optimizers(named(), lr=0.0, embedding_lr=0.1)
    with pytest.raises(InputError, match="embedding_lr"):
        make_optimizers(named(), lr=0.1, embedding_lr=-0.1)
