"""Methods written straight from their equations, block by block, nothing folded or shared. Slow; for comparison."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prompttune as pt
from prompttune.backbones import SwinBackbone, VitBackbone
from prompttune.methods.sa2vp import SA2VP, SA2VPConfig, SwinSA2VP
from prompttune.methods.vpt import SwinVPT


def aligned_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_prefix_tokens: int, window: int | None
) -> Tensor:
    """The definition, one query at a time: slow.

    Args:
        q, k, v: [B, H, N, d].

    Returns:
        [B, H, N, d].
    """
    rows, columns = grid
    out = torch.empty_like(q)
    for query in range(q.shape[2]):
        seen = list(range(k.shape[2]))
        if query >= num_prefix_tokens and window is not None:
            row, column = divmod(query - num_prefix_tokens, columns)
            near_rows = range(max(0, row - window // 2), min(rows, row + window // 2 + 1))
            near_columns = range(max(0, column - window // 2), min(columns, column + window // 2 + 1))
            seen = [num_prefix_tokens + r * columns + c for r in near_rows for c in near_columns]
        scores = torch.einsum("bhd,bhkd->bhk", q[:, :, query], k[:, :, seen]) / q.shape[-1] ** 0.5
        out[:, :, query] = torch.einsum("bhk,bhkd->bhd", scores.softmax(dim=-1), v[:, :, seen])
    return out


def cross(backbone: VitBackbone, config: SA2VPConfig, index: int, x: Tensor, y: Tensor) -> Tensor:
    """x + proj(attend(W^q norm1(x), W^k norm1(y), W^v norm1(y)))."""
    block = backbone.model.blocks[index]
    attention = block.attn

    def part(tokens: Tensor, which: int) -> Tensor:
        size = attention.attn_dim
        rows = slice(which * size, (which + 1) * size)
        bias = None if attention.qkv.bias is None else attention.qkv.bias[rows]
        flat = F.linear(block.norm1(tokens), attention.qkv.weight[rows], bias)
        return flat.reshape(*tokens.shape[:2], attention.num_heads, -1).transpose(1, 2)

    q, k, v = attention.q_norm(part(x, 0)), attention.k_norm(part(y, 1)), part(y, 2)
    window = config.window if config.attention == "aligned" else None
    seen = aligned_attention_reference(q, k, v, backbone.grid, backbone.num_prefix_tokens, window)
    return x + block.ls1(attention.proj(seen.transpose(1, 2).flatten(2)))


def features(model: pt.PromptModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features of the base and the prompt pathway, [B, D] each."""
    backbone, method = model.backbone, model.method
    assert isinstance(backbone, VitBackbone)
    assert isinstance(method, SA2VP)
    config = method.config
    h = backbone.embed(images)
    p = backbone.position(method.prompts["0"]()).expand_as(h)
    for index in range(backbone.depth):
        block = backbone.model.blocks[index]
        prompt_layer = index in method.prompt_layers
        given = cross(backbone, config, index, p, h) if prompt_layer else cross(backbone, config, index, h, p)
        if config.adapter:
            adapter = method.adapters[index]
            act = F.gelu if config.activation == "gelu" else F.relu
            given = adapter.up(act(adapter.down(adapter.norm(given))))
        h, p = block(h), block(p)
        if prompt_layer:
            p = p + config.gamma * given
            if index > 0:
                prompt = method.prompts[str(index)]
                new = prompt() if config.fusion == "paper" else block(prompt())
                p = p + prompt.scale * new
        else:
            h = h + config.gamma * given
    pooled = [backbone.model.forward_head(backbone.model.norm(tokens), pre_logits=True) for tokens in (h, p)]
    return pooled[0], pooled[1]


def lspt_features(model: pt.PromptModel, images: Tensor) -> Tensor:
    """LSPT with PyTorch's own LSTM cell, [B, D]."""
    backbone, method = model.backbone, model.method
    assert isinstance(backbone, VitBackbone)
    config, width = method.config, backbone.width
    if config.long_term:
        cell = torch.nn.LSTMCell(width, width)
        ours = method.cell
        full = config.cell_rank is None
        cell.weight_ih.data = (ours.weight_ih if full else ours.up_ih @ ours.down_ih).data
        cell.weight_hh.data = (ours.weight_hh if full else ours.up_hh @ ours.down_hh).data
        cell.bias_ih.data, cell.bias_hh.data = ours.bias_ih.data, ours.bias_hh.data
    tokens = backbone.embed(images)
    prefix, count, rows = backbone.num_prefix_tokens, config.num_prompts, images.shape[0]
    head, patches = tokens[:, :prefix], tokens[:, prefix:]
    prompts = method.prompts[0].expand(rows, -1, -1)
    memory = torch.zeros(rows * count, width)
    for index in range(backbone.depth):
        out = backbone.model.blocks[index](torch.cat((head, prompts, patches), dim=1))
        head, prompts, patches = out.split([prefix, count, out.shape[1] - prefix - count], dim=1)
        if index + 1 == backbone.depth:
            break
        if config.spatial:
            prompts = prompts + patches.mean(dim=1, keepdim=True)
        if config.long_term:
            entered = method.prompts[index + 1].expand(rows, -1, -1).reshape(-1, width)
            hidden, memory = cell(entered, (prompts.reshape(-1, width), memory))
            prompts = hidden.reshape(rows, count, width)
    whole = backbone.model.norm(torch.cat((head, patches), dim=1))
    return backbone.model.forward_head(whole, pre_logits=True)


def swin_cross(config: SA2VPConfig, block: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """x + proj(attend(W^q norm1(x), W^k norm1(y), W^v norm1(y))) over whole maps [B, R, C, D]."""
    attention, grid = block.attn, (x.shape[1], x.shape[2])

    def parts(tokens: Tensor) -> Tensor:
        flat = attention.qkv(block.norm1(tokens.flatten(1, 2)))
        return flat.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, N, d]

    window = config.window if config.attention == "aligned" else None
    seen = aligned_attention_reference(parts(x)[0], parts(y)[1], parts(y)[2], grid, 0, window)
    return x + attention.proj(seen.transpose(1, 2).flatten(2)).unflatten(1, grid)


def swin_features(model: pt.PromptModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """SA²VP on a Swin, with timm's own stages and blocks; pooled features of both pathways, [B, D] each."""
    backbone, method = model.backbone, model.method
    assert isinstance(backbone, SwinBackbone)
    assert isinstance(method, SwinSA2VP)
    config, timms = method.config, backbone.model
    h = timms.patch_embed(images)  # [B, R, C, D]
    p = timms.patch_embed.norm(method.prompts["0"]()).unflatten(1, backbone.grid).expand_as(h)
    for number, stage in enumerate(timms.layers):
        h, p = stage.downsample(h), stage.downsample(p)
        for index, block in enumerate(stage.blocks):
            if number != 2:
                h, p = block(h), block(p)
                continue
            prompt_layer = index in method.prompt_layers
            given = swin_cross(config, block, p, h) if prompt_layer else swin_cross(config, block, h, p)
            if config.adapter:
                adapter = method.adapters[index]
                act = F.gelu if config.activation == "gelu" else F.relu
                given = adapter.up(act(adapter.down(adapter.norm(given))))
            h, p = block(h), block(p)
            if prompt_layer:
                p = p + config.gamma * given
            else:
                h = h + config.gamma * given
    return timms.norm(h).mean((1, 2)), timms.norm(p).mean((1, 2))


def swin_vpt_block(block: nn.Module, tokens: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """A block of a map [B, R, C, D] and prompts [B, P, D], one window of one image after the other."""
    attention, (height, width), shift = block.attn, block.window_size, block.shift_size
    rows, columns = tokens.shape[1:3]
    normed = block.norm1(tokens).roll((-shift[0], -shift[1]), dims=(1, 2))
    normed = F.pad(normed, (0, 0, 0, -columns % width, 0, -rows % height))
    seen, out = [], torch.zeros_like(normed)
    for image in range(tokens.shape[0]):
        before, heard = block.norm1(prompts[image]), []
        count, places = (
            before.shape[0],
            [(r, c) for r in range(0, normed.shape[1], height) for c in range(0, normed.shape[2], width)],
        )
        for number, (r, c) in enumerate(places):
            window = normed[image, r : r + height, c : c + width].reshape(-1, normed.shape[-1])
            mask = attention._get_rel_pos_bias()[0]
            if block.attn_mask is not None:
                mask = mask + block.attn_mask[number]
            together = torch.cat((before, window))
            q, k, v = attention.qkv(together).unflatten(-1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)
            scores = q @ k.transpose(-2, -1) * attention.scale
            scores[:, count:, count:] += mask
            attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
            heard.append(attended[:count])
            out[image, r : r + height, c : c + width] = attention.proj(attended[count:]).reshape(height, width, -1)
        seen.append(attention.proj(torch.stack(heard).mean(0)))  # a norm of Swin v2 follows once
    tokens = tokens + out[:, :rows, :columns].roll(shift, dims=(1, 2))
    prompts = prompts + torch.stack(seen)
    return tokens + block.mlp(block.norm2(tokens)), prompts + block.mlp(block.norm2(prompts))


def swin_vpt_features(model: pt.PromptModel, images: Tensor) -> Tensor:
    """VPT on a Swin, shallow and deep, [B, D]."""
    backbone, method = model.backbone, model.method
    assert isinstance(backbone, SwinBackbone)
    assert isinstance(method, SwinVPT)
    timms, rows = backbone.model, images.shape[0]
    tokens = timms.patch_embed(images)
    prompts = method.prompts[0][0].expand(rows, -1, -1)
    for number, stage in enumerate(timms.layers):
        tokens = stage.downsample(tokens)
        if number > 0 and not method.config.deep:
            merging = stage.downsample
            prompts = merging.reduction(merging.norm(prompts.repeat(1, 1, 4)))
        for place, block in enumerate(stage.blocks):
            if method.config.deep:
                prompts = method.prompts[number][place].expand(rows, -1, -1)
            tokens, prompts = swin_vpt_block(block, tokens, prompts)
    return timms.norm(tokens).mean((1, 2))
