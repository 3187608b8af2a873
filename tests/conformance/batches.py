"""Batches whose rows have any number of images, from pixels or from features made by hand."""

import torch

PIECES = {0: [4], 1: [5, 7], 2: [3, 2, 6]}  # text around so many images


def batch_of(member, model, rows):
    """A left-padded batch whose rows have so many images, and the inputs of each row alone."""
    if member.pixels(1) is None:
        inputs = member.inputs([PIECES[images] for images in rows])
        return inputs, [member.row(inputs, row) for row in range(len(rows))]
    pixels = member.pixels(sum(rows))
    counts = member.counts(model, pixels)
    alone, first = [], 0
    for images in rows:
        ids = [7, 8, 9]
        for count in counts[first : first + images]:
            ids += [member.image_id] * count + [11, 12 + images]
        ids = torch.tensor([ids])
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        row |= member.extras(ids, images)
        if images:
            row |= member.take(pixels, first, first + images)
        alone.append(row)
        first += images
    ids = [row["input_ids"] for row in alone]
    width = max(row.shape[1] for row in ids)
    padded = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in ids])
    inputs = {"input_ids": padded, "attention_mask": (padded != 0).long()}
    return inputs | member.extras(padded, sum(rows)) | member.batch(pixels, list(rows)), alone
