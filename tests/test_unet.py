"""unet.py: shapes, conditions, its zero start, and its parts against numpy and torch's own."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unet import Attention, ResBlock, UNet, timestep_embedding


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(network, size=0.1):
    """Real weights in place of the zero-initialised ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return network.eval()


def inputs(B=3, size=8):
    return (normal(B, 3, size, size), torch.tensor([0, 500, 999])[:B], torch.tensor([0, 1, 2])[:B],
            torch.tensor([0, 1, 1])[:B])


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return randomised(UNet(8, classes=3, groups=2, width=16, multipliers=(1, 2), attention=4))


@pytest.mark.parametrize("size, width, multipliers, blocks, attention, patch", [
    (8, 16, (1,), 1, 8, 1), (8, 16, (1, 2), 2, 0, 2), (16, 32, (1, 2, 2), 1, 4, 2),
    (16, 16, (1, 2, 3), 1, 2, 4), (32, 16, (1, 2, 4), 1, 8, 2)])
def test_the_output_has_the_input_s_shape(size, width, multipliers, blocks, attention, patch):
    network = randomised(UNet(size, 3, 2, width, multipliers, blocks, attention, patch))
    x, t, y, g = inputs(size=size)
    out = network(x, t, y, g)
    assert out.shape == x.shape and out.dtype == torch.float32 and out.isfinite().all()


def test_attention_stands_only_at_small_maps():
    def sides(attention):
        found, network = [], UNet(32, 2, 0, 16, (1, 2, 4), 1, attention)
        hooks = [m.register_forward_hook(lambda m, i, o: found.append(o.shape[-1]))
                 for m in network.modules() if isinstance(m, Attention)]
        one = torch.zeros(1, dtype=torch.int64)
        network(torch.zeros(1, 3, 32, 32), one, one, one - 1)
        assert hooks
        return found
    assert sides(0) == [4]                                   # the middle alone
    assert sides(8) == [8, 4, 4, 4, 4, 8, 8]
    assert sides(16) == [16, 8, 4, 4, 4, 4, 8, 8, 16, 16]


def test_it_starts_at_zero():
    torch.manual_seed(0)
    assert (UNet(8, 3, 2, 16, (1, 2))(*inputs()) == 0).all()


def test_residual_branches_start_as_the_identity():
    torch.manual_seed(0)
    x, c = normal(2, 32, 4, 4), normal(2, 64)
    assert torch.equal(ResBlock(32, 32, 64)(x, c), x)
    assert torch.equal(Attention(32)(x), x)


def test_minus_1_is_the_embeddings_last_row(small):
    x, t, y, g = inputs()
    last_y, last_g = torch.full_like(y, 3), torch.full_like(g, 2)
    assert torch.equal(small(x, t, y * 0 - 1, g), small(x, t, last_y, g))
    assert torch.equal(small(x, t, y, g * 0 - 1), small(x, t, y, last_g))
    assert not torch.allclose(small(x, t, y * 0 - 1, g), small(x, t, y, g), atol=1e-3)


def test_a_data_set_without_groups_needs_none():
    x, t, y, g = inputs()
    assert randomised(UNet(8, 3, 0, 16, (1,)))(x, t, y, g * 0 - 1).isfinite().all()


def test_time_class_and_group_each_change_the_output(small):
    x, t, y, g = inputs()
    base = small(x, t, y, g)
    for changed in (small(x, (t + 300) % 1000, y, g), small(x, t, (y + 1) % 3, g),
                    small(x, t, y, (g + 1) % 2)):
        assert ((changed - base).abs().mean((1, 2, 3)) > 1e-3).all()


def test_no_sample_influences_another(small):
    x, t, y, g = inputs()
    base = small(x, t, y, g)
    x2, t2, y2, g2 = x.clone(), t.clone(), y.clone(), g.clone()
    x2[1], t2[1], y2[1], g2[1] = 5 * x[0], 3, -1, 0
    found = small(x2, t2, y2, g2)
    assert torch.allclose(found[[0, 2]], base[[0, 2]], atol=1e-6)
    assert not torch.allclose(found[1], base[1], atol=1e-2)


def test_every_pixel_reaches_every_pixel(small):
    """Through the attention at the lowest level; a skip or a patch left out would not."""
    x, t, y, g = inputs(1)
    x.requires_grad_()
    for i, j in ((0, 0), (7, 7), (3, 4)):
        grad, = torch.autograd.grad(small(x, t, y, g)[0, :, i, j].sum(), x)
        assert (grad != 0).all()


@pytest.mark.parametrize("size, patch, multipliers",
                         [(9, 2, (1,)), (10, 2, (1, 2)), (8, 4, (1, 2, 2))])
def test_a_size_that_does_not_fit_is_refused(size, patch, multipliers):
    with pytest.raises(ValueError, match=f"size {size} is no multiple"):
        UNet(size, 2, 0, 16, multipliers, patch=patch)


@pytest.mark.parametrize("width", [8, 24, 40])
def test_a_width_that_does_not_fit_is_refused(width):
    with pytest.raises(ValueError, match=f"width {width} is no multiple of 16"):
        UNet(8, 2, 0, width, (1,))


@pytest.mark.parametrize("dim, period", [(16, 10_000.0), (64, 10_000.0), (8, 100.0)])
def test_timestep_embedding_against_a_loop(dim, period):
    t = [0, 1, 7, 250, 999]
    wanted = np.zeros((len(t), dim))
    for row, value in enumerate(t):
        for i in range(dim // 2):
            frequency = period ** (-i / (dim // 2))
            wanted[row, i] = math.cos(value * frequency)
            wanted[row, dim // 2 + i] = math.sin(value * frequency)
    found = timestep_embedding(torch.tensor(t), dim, period)
    assert found.dtype == torch.float32 and np.allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("channels, heads", [(16, 1), (64, 2), (96, 3), (48, 1)])
def test_attention_against_torch_s_own(channels, heads):
    torch.manual_seed(0)
    module, x = randomised(Attention(channels), 0.15), normal(2, channels, 3, 4)
    assert module.heads == heads
    for given in (x, x.to(memory_format=torch.channels_last)):
        q, k, v = module.qkv(module.norm(given)).split(channels, dim=1)

        def heads_last(a):                                       # (B, heads, HW, d)
            return a.reshape(2, heads, channels // heads, 12).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(heads_last(q), heads_last(k), heads_last(v))
        wanted = x + module.out(mixed.transpose(2, 3).reshape(2, channels, 3, 4))
        assert torch.allclose(module(given), wanted, atol=1e-5)


def test_res_block_against_plain_functions():
    torch.manual_seed(0)
    block, x, c = randomised(ResBlock(16, 32, 8)), normal(2, 16, 4, 4), normal(2, 8)
    s = block.state_dict()

    def norm(h, name, groups):                                   # 16 channels a group
        parts = h.reshape(2, groups, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, correction=0, keepdim=True)
                                                         + 1e-5).sqrt()
        return (parts.reshape(h.shape) * s[f"{name}.weight"].view(1, -1, 1, 1)
                + s[f"{name}.bias"].view(1, -1, 1, 1))
    h = F.conv2d(F.silu(norm(x, "norm1", 1)), s["conv1.weight"], s["conv1.bias"], padding=1)
    told = c @ s["condition.weight"].T + s["condition.bias"]
    h = norm(h, "norm2", 2) * (1 + told[:, :32, None, None]) + told[:, 32:, None, None]
    h = F.conv2d(F.silu(h), s["conv2.weight"], s["conv2.bias"], padding=1)
    wanted = F.conv2d(x, s["skip.weight"], s["skip.bias"]) + h
    assert torch.allclose(block(x, c), wanted, atol=1e-5)
