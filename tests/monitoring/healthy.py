"""Healthy runs of many kinds: no alert may come of any. Each is `(sink) -> None`, some hundred steps."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from clinometer.lm.model import TransformerLM
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.monitoring.watch import watch
from clinometer.optim.adamw import AdamW
from clinometer.optim.clipping import clip_grad_norm_
from clinometer.optim.schedule import cosine_schedule

STEPS = 150


def language_model(make, lr, *, warmup=20, steps=STEPS, dtype=None, parts=1, max_norm=1.0):
    """The repository's own trainer's loop in small: warm-up from (almost) 0, cosine to a tenth."""

    def run(sink):
        config = TransformerConfig(
            vocab_size=61, context_length=16, d_model=16, num_layers=4, num_heads=2, d_ff=48
        )
        model = TransformerLM(config)
        optimizers = make(model)
        text = torch.randint(61, (2000,)).cumsum(0) % 61
        with watch(model, optimizers, to=sink):
            for step in range(steps):
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = cosine_schedule(step, lr, lr / 10, warmup, max(steps, 2 * warmup))
                starts = torch.randint(2000 - 17, (4,))
                rows = torch.stack([text[s : s + 17] for s in starts])
                for part in rows.chunk(parts):
                    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                        logits = model(part[:, :-1])
                        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) / parts
                    loss.backward()
                clip_grad_norm_(model.parameters(), max_norm)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()

    return run


def muon(model):
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers")]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]


def classifier(model, make, *, steps=STEPS, shape=(16,), batch=16, clip=None):
    def run(sink):
        net = model()
        optimizer = make(net.parameters())
        teacher = torch.randn(math.prod(shape), 3)
        with watch(net, optimizer, to=sink):
            for _ in range(steps):
                x = torch.randn(batch, *shape)
                y = (x.flatten(1) @ teacher).argmax(1)
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()

    return run


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def overfitted(sink):
    """Full batch, until nothing is left to learn: gradients shrink by many powers of ten."""
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x = torch.randn(16, 8)
    y = x[:, :1].sin()
    with watch(net, optimizer, to=sink):
        for _ in range(600):
            optimizer.zero_grad()
            F.mse_loss(net(x), y).backward()
            optimizer.step()


def adversarial(sink):
    """A GAN: two models, two optimizers, each one's backward passes through the other."""
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    d = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    with watch(both, [d, g], to=sink):
        for _ in range(STEPS):
            real, noise = torch.randn(16, 2) * 0.3 + 1, torch.randn(16, 4)
            d.zero_grad()
            loss = F.softplus(-critic(real)).mean() + F.softplus(critic(generator(noise).detach())).mean()
            loss.backward()
            d.step()
            g.zero_grad()
            F.softplus(-critic(generator(noise))).mean().backward()
            g.step()


def generator_alone(sink):
    """A watch on one half of a GAN."""
    generator, critic = nn.Linear(4, 2), nn.Linear(2, 1)
    g = torch.optim.Adam(generator.parameters(), lr=1e-3)
    d = torch.optim.Adam(critic.parameters(), lr=1e-3)
    with watch(generator, g, to=sink):
        for _ in range(STEPS):
            noise = torch.randn(16, 4)
            d.zero_grad()
            F.softplus(critic(generator(noise).detach())).mean().backward()
            d.step()
            g.zero_grad()
            F.softplus(-critic(generator(noise))).mean().backward()
            g.step()


def frozen_backbone(sink):
    net = mlp()
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    with watch(net, optimizer, to=sink):
        for _ in range(STEPS):
            F.cross_entropy(net(torch.randn(8, 16)), torch.randint(3, (8,))).backward()
            optimizer.step()
            optimizer.zero_grad()


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(16, 16).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(4, 16) / 4)
        self.b = nn.Parameter(torch.zeros(16, 4))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def lora(sink):
    """B begins at zero, so A has no gradient in the first step; and the warm-up begins at lr 0."""
    net = nn.Sequential(LoRA(), nn.ReLU(), LoRA())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(s / 15, 1))
    with watch(net, optimizer, to=sink):
        for _ in range(STEPS):
            x = torch.randn(8, 16)
            F.mse_loss(net(x), x.roll(1, 1)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def embeddings(sink):
    """Rows absent from the batch, a sparse gradient, momentum that moves what has none."""
    table, head = nn.Embedding(500, 8, sparse=True), nn.Linear(8, 5)
    net = nn.ModuleDict({"table": table, "head": head})
    optimizers = [
        torch.optim.SparseAdam(table.parameters(), lr=1e-2),
        torch.optim.SGD(head.parameters(), lr=0.1),
    ]
    with watch(net, optimizers, to=sink):
        for _ in range(STEPS):
            ids = torch.randint(40, (16,))
            F.cross_entropy(head(table(ids)), ids % 5).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def scaled(sink):
    """float16 with a scale so large that the first steps overflow, as GradScaler means it to be."""
    net = mlp()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=20)
    with watch(net, optimizer, to=sink):
        for _ in range(STEPS):
            x, y = torch.randn(8, 16), torch.randint(3, (8,))
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(net(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def old_style_zeroing(sink):
    """Gradients cleared through .data, as in old tutorials."""
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with watch(net, optimizer, to=sink):
        for _ in range(STEPS):
            F.cross_entropy(net(torch.randn(8, 16)), torch.randint(3, (8,))).backward()
            optimizer.step()
            for p in net.parameters():
                p.grad.data.zero_()


def wasserstein_critic(sink):
    """Its last bias adds the same to real and fake: the loss does not depend on it, at any step."""
    critic = mlp()
    optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-3)
    with watch(critic, optimizer, to=sink):
        for _ in range(STEPS):
            optimizer.zero_grad()
            (critic(torch.randn(8, 16)).mean() - critic(torch.randn(8, 16) + 1).mean()).backward()
            optimizer.step()


def second_order(sink):
    """L-BFGS, long after it has arrived."""
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=5)
    x = torch.randn(64, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    with watch(net, optimizer, to=sink):
        for _ in range(STEPS):
            optimizer.step(closure)


def policy_gradient(sink):
    """Normalised advantages: a loss about zero, of both signs, that shrinks as the policy sharpens."""
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    with watch(net, optimizer, to=sink):
        for _ in range(500):
            states = torch.randn(32, 4)
            policy = torch.distributions.Categorical(logits=net(states))
            actions = policy.sample()
            reward = (actions == (states[:, 0] > 0)).float()
            advantage = (reward - reward.mean()) / (reward.std() + 1e-8)
            optimizer.zero_grad()
            (-(policy.log_prob(actions) * advantage).mean() - 0.01 * policy.entropy().mean()).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()


def second_head_waits(sink):
    """Two tasks one after the other: the second's head has no gradient until its turn."""
    body, heads = mlp(), nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
    net = nn.ModuleDict({"body": body, "heads": heads})
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    with watch(net, optimizer, to=sink):
        for step in range(STEPS):
            x = torch.randn(8, 16)
            optimizer.zero_grad()
            F.mse_loss(heads[step // 75](body(x)), x[:, :1]).backward()
            optimizer.step()


def two_losses_of_one_body(sink):
    """Two optimizers hold all tensors, and each loss has a head of its own, as in InfoGAN.

    The second optimizer's step leaves the first head where the first step has put it.
    """
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "one": nn.Linear(8, 1), "other": nn.Linear(8, 1)})
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for _ in range(2)]
    with watch(model, optimizers, to=sink):
        for _ in range(STEPS):
            x = torch.randn(16, 8)
            for optimizer, head in zip(optimizers, ("one", "other"), strict=True):
                optimizer.zero_grad()
                target = x[:, :1] if head == "one" else x[:, 1:2].square()
                F.mse_loss(model[head](torch.tanh(model["body"](x))), target).backward()
                optimizer.step()


def generator_waits(sink):
    """The critic is trained alone at first; the generator stands before it and has its own optimizer."""
    generator, critic = nn.Linear(4, 2), nn.Linear(2, 1)
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    g = torch.optim.Adam(generator.parameters(), lr=1e-3)
    d = torch.optim.Adam(critic.parameters(), lr=1e-3)
    with watch(both, [d, g], to=sink):
        for step in range(STEPS):
            noise = torch.randn(16, 4)
            d.zero_grad()
            loss = F.softplus(-critic(torch.randn(16, 2))).mean()
            (loss + F.softplus(critic(generator(noise).detach())).mean()).backward()
            d.step()
            if step >= 80:
                g.zero_grad()
                F.softplus(-critic(generator(noise))).mean().backward()
                g.step()


def rates(rate, steps):
    """A rate below what float32 can add, at its beginning or its end; biases show it first."""

    def run(sink):
        net = mlp()
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        teacher = torch.randn(16, 3)
        with watch(net, optimizer, to=sink):
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = rate(step)
                x = torch.randn(32, 16)
                F.cross_entropy(net(x), (x @ teacher).argmax(1)).backward()
                optimizer.step()
                optimizer.zero_grad()

    return run


def hugging_face(name):
    def run(sink):
        import transformers as hf

        small = {"vocab_size": 97, "use_cache": False} if name != "bert" else {"vocab_size": 97}
        match name:
            case "gpt2":
                net = hf.GPT2LMHeadModel(
                    hf.GPT2Config(n_layer=4, n_head=2, n_embd=32, n_positions=32, **small)
                )
            case "bert":
                net = hf.BertForMaskedLM(
                    hf.BertConfig(
                        hidden_size=32,
                        num_hidden_layers=4,
                        num_attention_heads=2,
                        intermediate_size=64,
                        **small,
                    )
                )
            case _:
                net = hf.T5ForConditionalGeneration(
                    hf.T5Config(
                        d_model=32,
                        d_kv=16,
                        d_ff=64,
                        num_layers=4,
                        num_heads=2,
                        decoder_start_token_id=0,
                        **small,
                    )
                )
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        with watch(net, optimizer, to=sink):
            for _ in range(100):
                x = torch.randint(90, (4, 12))
                net(input_ids=x, labels=x).loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return run


def adamw(lr):
    return lambda model: [AdamW(model.parameters(), lr=lr)]


HEALTHY = {
    "lm-adamw-3e-4": language_model(adamw(3e-4), 3e-4),
    "lm-adamw-6e-3": language_model(adamw(6e-3), 6e-3),
    "lm-adamw-2e-2": language_model(adamw(2e-2), 2e-2),
    "lm-muon": language_model(muon, 1e-2),
    "lm-sgd": language_model(lambda m: [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)], 0.1),
    "lm-bf16-parts": language_model(adamw(3e-3), 3e-3, dtype=torch.bfloat16, parts=4, steps=100),
    "lm-long-warmup": language_model(adamw(1e-3), 1e-3, warmup=5000, steps=220),
    "lm-hard-clipping": language_model(adamw(3e-3), 3e-3, max_norm=0.25),
    "mlp-sgd": classifier(mlp, lambda p: torch.optim.SGD(p, lr=0.1)),
    "mlp-sgd-slow": classifier(mlp, lambda p: torch.optim.SGD(p, lr=1e-4), steps=400),
    "mlp-adam": classifier(mlp, lambda p: torch.optim.Adam(p, lr=1e-3)),
    "mlp-rmsprop-batch-1": classifier(mlp, lambda p: torch.optim.RMSprop(p, lr=1e-3), batch=1, steps=400),
    "cnn-momentum": classifier(
        cnn, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True), shape=(1, 8, 8)
    ),
    "cnn-adamw": classifier(cnn, lambda p: torch.optim.AdamW(p, lr=1e-3), shape=(1, 8, 8), clip=1.0),
    "rate-finder": rates(lambda step: 1e-8 * 1e8 ** (step / 400), 401),
    "rate-decayed-away": rates(lambda step: 0.1 * 0.93**step, 350),
    "wasserstein-critic": wasserstein_critic,
    "l-bfgs": second_order,
    "policy-gradient": policy_gradient,
    "second-head-waits": second_head_waits,
    "two-losses": two_losses_of_one_body,
    "generator-waits": generator_waits,
    "overfitted": overfitted,
    "adversarial": adversarial,
    "generator-alone": generator_alone,
    "frozen-backbone": frozen_backbone,
    "lora": lora,
    "embeddings": embeddings,
    "scaled": scaled,
    "old-style-zeroing": old_style_zeroing,
    "gpt2": hugging_face("gpt2"),
    "bert": hugging_face("bert"),
    "t5": hugging_face("t5"),
}
