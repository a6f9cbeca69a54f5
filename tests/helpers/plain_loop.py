"""Training as a few lines of PyTorch, to which the engine is compared: one process, one pack after another."""

import torch

from loomvideo.platform.training.loader import load_draw
from loomvideo.platform.training.packing import planner_of
from loomvideo.platform.training.schedule import ema_decay, learning_rate


def plain_training(config, recipe, dataset):
    """Losses and gradient norms of every step, then weights and averaged weights, float32 by name.

    With ``precision=bf16`` the model computes on bf16 copies of float32 weights, and gradients of packs are summed in
    float32.
    """
    planner = planner_of(recipe, [dataset], config, config.pack.per_step)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    _, initial = recipe.start()
    model = recipe.build_model()
    masters = {name: initial[name].float().clone() for name, _ in model.named_parameters()}
    model = model.to(dtype)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [masters[name] for name, p in trained.items() if p.ndim >= 2]
    vectors = [masters[name] for name, p in trained.items() if p.ndim < 2]
    settings = config.optimizer
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    average = {name: masters[name].clone() for name in masters}
    records = []
    for step in range(config.steps):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        packs = [
            recipe.collate([load_draw(recipe, [dataset], draw, config.seed) for draw in draws])
            for draws in planner.next_step()
        ]
        elements = sum(pack.num_loss_elements for pack in packs)
        loss, gradients = 0.0, {name: torch.zeros_like(masters[name]) for name in trained}
        for pack in packs:
            model.zero_grad()
            share = recipe.loss(model, pack.to(torch.device("cpu"), dtype)).sum / elements
            share.backward()
            loss += share.item()
            for name, parameter in trained.items():
                gradients[name] += parameter.grad.float()
        for name, gradient in gradients.items():
            masters[name].grad = gradient
        norm = torch.nn.utils.clip_grad_norm_([masters[name] for name in trained], settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, config.steps)
        optimizer.step()
        decay = ema_decay(config.ema, step)
        for name in masters:
            average[name].lerp_(masters[name], 1 - decay)
        records.append((loss, norm.item()))
    return records, masters, average
