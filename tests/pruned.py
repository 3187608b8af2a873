"""Models that torch-pruning has cut: widths of MLPs and numbers of heads that no config says."""

import torch_pruning as tp


def cut_mlps(model, inputs, layers, first, left):
    """Leave some neurons of the MLP of each layer, by the graph of what depends on what.

    `first` names the matrix that makes neurons; `left` says how many stay in each layer.
    """
    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs=dict(inputs), forward_fn=lambda model, inputs: model(**inputs)[0]
    )
    for layer, count in zip(layers, left, strict=True):
        linear = layer.get_submodule(first)
        gone = list(range(count, linear.out_features))
        graph.get_pruning_group(linear, tp.prune_linear_out_channels, gone).prune()


def cut_heads(attention, heads, output):
    """Take whole heads away, and those of keys and values that no other head reads."""
    width = attention.head_dim
    groups = getattr(attention, "num_key_value_groups", 1)

    def columns(of):
        return [head * width + n for head in of for n in range(width)]

    unread = [n for n in range(4) if all(n * groups + i in heads for i in range(groups))]
    tp.prune_linear_out_channels(attention.q_proj, columns(heads))
    tp.prune_linear_in_channels(getattr(attention, output), columns(heads))
    for part in (attention.k_proj, attention.v_proj):
        tp.prune_linear_out_channels(part, columns(unread))
    left = attention.q_proj.out_features // width
    attention.num_heads = left
    attention.num_key_value_groups = left * width // attention.k_proj.out_features
