"""Multimodal rotary positions of Qwen3-VL: where each token of a prompt sits in (time, height, width)."""

import torch


def prompt_positions(
    input_ids: torch.Tensor,
    image_grids: list[list[int]],
    video_grids: list[list[int]],
    image_token: int,
    video_token: int,
    merge_size: int,
) -> torch.Tensor:
    """Positions ``[3, tokens]`` of one prompt.

    Text advances all three axes by one a token. The tokens of an image, or of one frame pair of a video, share the time
    at which they start and count rows and columns from it; text goes on after the longer of the two sides.

    Args:
        input_ids: ``[tokens]``.
        image_grids: ``(1, rows, columns)`` of patches, one for each image, in order.
        video_grids: ``(frame pairs, rows, columns)``, one for each video, in order.
        image_token: The id that stands for a merged image patch.
        video_token: The id that stands for a merged video patch.
        merge_size: Patches a side of a merged patch.
    """
    grids = {image_token: iter(image_grids), video_token: iter([g[1:] for g in video_grids for _ in range(g[0])])}
    ids = input_ids.tolist()
    positions, start, index = [], 0, 0
    while index < len(ids):
        if ids[index] in grids:
            rows, columns = (side // merge_size for side in next(grids[ids[index]])[-2:])
            row = torch.arange(rows).repeat_interleave(columns)
            column = torch.arange(columns).repeat(rows)
            positions.append(torch.stack([torch.zeros_like(row), row, column]) + start)
            start += max(rows, columns)
            index += rows * columns
        else:
            positions.append(torch.full((3, 1), start))
            start += 1
            index += 1
    return torch.cat(positions, dim=1)
