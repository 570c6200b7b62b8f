"""Unused is a fault only if nothing could reach it: no other input, depth, stage, exit or optimizer."""

import pytest
import torch
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose


def x():
    return torch.linspace(-1, 1, 24).reshape(6, 4)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        self.exits = nn.ModuleList(nn.Linear(4, 1) for _ in range(4))
        self.head_a, self.head_b = nn.Linear(4, 1), nn.Linear(4, 1)
        self.depth, self.which = 2, "a"


class Growing(Blocks):
    def forward(self, h):
        for block in self.blocks[: self.depth]:
            h = block(h).tanh()
        return h


class Sliced(Blocks):
    def forward(self, h):
        return self.layers[: self.depth](h)


class Counted(Blocks):
    def forward(self, h):
        for i in range(self.depth):
            h = self.blocks[i](h).tanh()
        return h


class Exits(Blocks):
    def forward(self, h):
        for i, (block, leave) in enumerate(zip(self.blocks, self.exits, strict=True)):
            h = block(h).tanh()
            if i == self.depth:
                return leave(h)


class Staged(Blocks):
    def forward(self, h):
        h = self.blocks[0](h)
        if self.depth > 2:
            h = self.blocks[1](h)
        return self.blocks[2](h)


class Named(Blocks):
    def forward(self, h):
        return getattr(self, f"head_{self.which}")(self.layers(h))


class Outside(Blocks):
    pass


ON_PURPOSE = {
    Growing: "blocks.3.weight",
    Sliced: "layers.3.weight",
    Counted: "blocks.2.weight",
    Exits: "blocks.3.weight",
    Staged: "blocks.1.weight",
    Named: "head_b.weight",
}


@pytest.mark.parametrize("kind", ON_PURPOSE)
def test_what_another_value_would_reach_is_explained(kind):
    model, name = kind(), ON_PURPOSE[kind]
    found = diagnose(model, lambda: model(x()).square().mean())
    assert (found[name].cause, found[name].severity) == ("unused", "explained"), found.render()


def test_a_depth_of_the_closure_counts_too():
    model, depth = Outside(), 2

    def loss():
        h = x()
        for block in model.blocks[:depth]:
            h = block(h)
        return h.square().mean()

    assert diagnose(model, loss)["blocks.3.weight"].severity == "explained"


class Short(Blocks):
    def forward(self, h):
        for i in range(len(self.blocks) - 1):
            h = self.blocks[i](h).tanh()
        return h


class WithoutLast(Blocks):
    def forward(self, h):
        for block in self.blocks[:-1]:
            h = block(h).tanh()
        return h


class FirstTwo(Blocks):
    def forward(self, h):
        return self.layers[1](self.layers[0](h))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Short, "blocks.3.weight"),
        (WithoutLast, "blocks.3.weight"),
        (FirstTwo, "layers.2.weight"),
        (Growing, "head_a.weight"),
    ],
)
def test_what_no_value_of_a_run_reaches_is_a_fault(kind, name):
    model = kind()
    found = diagnose(model, lambda: model(x()).square().mean())
    assert (found[name].cause, found[name].severity) == ("unused", "fault"), found.render()
    assert "Call the layer in forward, or remove it" in found[name].finding.say("remedy", "en")


@pytest.fixture
def game():
    torch.manual_seed(0)
    both = nn.ModuleDict({"gen": nn.Linear(4, 4), "disc": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))})
    return both, torch.optim.Adam(both["gen"].parameters()), torch.optim.Adam(both["disc"].parameters())


def discriminate(both):
    return both["disc"](both["gen"](x()).detach()).square().mean()  # <- here


def test_what_this_loss_leaves_to_another_optimizer_is_explained(game):
    both, generator, discriminator = game
    found = diagnose(both, lambda: discriminate(both), optimizer=[discriminator, generator])
    assert found.healthy, found.render()
    entry = found["gen.weight"]
    assert (entry.cause, entry.finding.variant) == ("cut", "other_step")
    assert entry.where.source.endswith("# <- here")
    without = diagnose(both, lambda: both["disc"](x()).mean(), optimizer=[discriminator, generator])
    assert without.healthy, without.render()
    assert without["gen.weight"].cause == "unused"


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(4, 4), "one": nn.Linear(4, 1), "other": nn.Linear(4, 1)})


def loss_of(heads, head, *, both=False):
    h = heads["body"](x()).tanh()
    extra = heads["other" if head == "one" else "one"](h) if both else None
    assert extra is None or extra.shape
    return (heads[head](h) - 1).square().mean()


@pytest.mark.parametrize("both", [False, True])
def test_a_head_that_two_optimizers_hold_is_left_to_the_other_loss(heads, both):
    first, second = (torch.optim.Adam(heads.parameters()) for _ in range(2))
    found = diagnose(heads, lambda: loss_of(heads, "one", both=both), optimizer=[first, second])
    entry = found["other.weight"]
    assert entry.finding.variant == "other_loss", found.render()
    assert found.healthy, found.render()
    # Of two that were not both given, the other must have moved it: one left over in a notebook has not.
    alone = diagnose(heads, lambda: loss_of(heads, "one", both=both), optimizer=first)
    assert alone["other.weight"].severity == "fault", alone.render()
    loss_of(heads, "other").backward()
    second.step()
    trained = diagnose(heads, lambda: loss_of(heads, "one", both=both), optimizer=first)
    assert trained["other.weight"].finding.variant == "other_loss", trained.render()
    assert trained.healthy, trained.render()


@pytest.mark.parametrize("both", [False, True])
def test_a_head_that_one_optimizer_holds_is_a_fault(heads, both):
    first = torch.optim.Adam(heads.parameters())
    second = torch.optim.Adam(heads["body"].parameters())
    found = diagnose(heads, lambda: loss_of(heads, "one", both=both), optimizer=[first, second])
    assert found["other.weight"].severity == "fault", found.render()


def test_cut_in_the_step_of_its_own_optimizer_it_is_a_fault(game):
    both, generator, _ = game
    found = diagnose(both, lambda: discriminate(both), optimizer=generator)
    assert (found["gen.weight"].cause, found["gen.weight"].severity) == ("cut", "fault")


def test_part_of_an_optimizer_that_is_trained_is_not_excused():
    torch.manual_seed(0)
    parts = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    first = torch.optim.Adam([*parts["a"].parameters(), *parts["b"].parameters()])
    second = torch.optim.Adam(parts["c"].parameters())
    found = diagnose(
        parts,
        lambda: parts["c"](parts["b"](parts["a"](x()).detach())).square().mean(),
        optimizer=[first, second],
    )
    assert (found["a.weight"].cause, found["a.weight"].severity) == ("cut", "fault")


def test_a_tensor_that_a_variable_holds_was_never_the_model_s():
    torch.manual_seed(0)
    q = nn.Linear(4, 1)
    nets = nn.ModuleDict({"q": q, "target": nn.Linear(4, 1).requires_grad_(True)})
    temperature = torch.zeros(1, requires_grad=True)
    optimizers = [torch.optim.Adam(q.parameters()), torch.optim.Adam([temperature])]

    def loss():
        with torch.no_grad():
            goal = nets["target"](x())
        return (q(x()) - goal).square().mean()

    found = diagnose(nets, loss, optimizer=optimizers)
    assert found.healthy, found.render()
    q.weight, q.bias = (nn.Parameter(p.detach().clone()) for p in (q.weight, q.bias))
    found = diagnose(nets, loss, optimizer=optimizers)
    (finding,) = (f for f in found.findings if f.severity == "fault")
    assert (finding.cause, finding.names) == ("stale-in-optimizer", ("q.weight", "q.bias"))
    assert temperature.grad is None


@pytest.fixture
def soft_actor_critic():
    torch.manual_seed(0)
    nets = nn.ModuleDict(
        {"actor": nn.Linear(4, 2), "critic": nn.Linear(6, 1), "target": nn.Linear(6, 1).requires_grad_(True)}
    )
    log_alpha = torch.zeros(1, requires_grad=True)
    return (
        nets,
        log_alpha,
        [
            torch.optim.Adam(nets["actor"].parameters()),
            torch.optim.Adam(nets["critic"].parameters()),
            torch.optim.Adam([log_alpha]),
        ],
    )


def critic_loss(nets, log_alpha):
    with torch.no_grad():
        a = nets["actor"](x())
        goal = nets["target"](torch.cat([x(), a], 1)) - log_alpha.exp() * a.sum(1, keepdim=True)
    return (nets["critic"](torch.cat([x(), nets["actor"](x()).detach()], 1)) - goal).square().mean()


def actor_loss(nets, log_alpha):
    a = nets["actor"](x())
    return (log_alpha.exp().detach() * a.sum(1) - nets["critic"](torch.cat([x(), a], 1)).squeeze(1)).mean()


def alpha_loss(nets, log_alpha):
    return -(log_alpha.exp() * (nets["actor"](x()).detach().sum(1) + 1)).mean()


@pytest.mark.parametrize("loss", [critic_loss, actor_loss, alpha_loss])
def test_each_loss_of_several_optimizers_is_healthy(soft_actor_critic, loss):
    nets, log_alpha, optimizers = soft_actor_critic
    found = diagnose(nets, lambda: loss(nets, log_alpha), optimizer=optimizers)
    assert found.healthy, found.render()
    assert found["target.weight"].severity == "explained"
    assert "remove the other" not in found.render("en")


def test_an_old_layer_that_a_variable_still_holds_is_stale_in_its_own_place_only():
    def built():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))

    model = built()
    old, optimizer = model[1], torch.optim.SGD(model.parameters(), 0.1)
    model[1] = nn.Linear(4, 1)
    found = diagnose(model, lambda: model(x()).square().mean(), optimizer=optimizer)
    assert [(f.cause, f.names) for f in found.findings] == [("stale-in-optimizer", ("1.weight", "1.bias"))]
    assert old.weight.grad is None

    model, other = built(), nn.Linear(4, 4)
    optimizer = torch.optim.SGD([*model[0].parameters(), *other.parameters()], 0.1)
    found = diagnose(model, lambda: model(x()).square().mean(), optimizer=optimizer)
    assert [(f.cause, f.names) for f in found.findings] == [("not-in-optimizer", ("1.weight", "1.bias"))]
