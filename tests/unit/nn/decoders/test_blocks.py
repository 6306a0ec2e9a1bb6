"""Decoder blocks and their feed-forward layers are found by what modules there are, in models of anybody."""

import pytest
from torch import nn

from mempool.errors import InvalidRequest
from mempool.nn.decoders.blocks import block_lists, places_of


class Part(nn.Module):
    """With children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class SelfAttention(nn.Linear):
    """By its class alone."""


def block(**more: nn.Module) -> nn.Module:
    return Part(norm=nn.LayerNorm(4), attn=nn.Linear(4, 4), post_attention_norm=nn.LayerNorm(4), **more)


def decoder(count: int = 3) -> nn.Module:
    blocks = [block(mlp=nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))) for _ in range(count)]
    return Part(embed=nn.Embedding(5, 4), body=Part(layers=nn.ModuleList(blocks)), head=nn.Linear(4, 5))


def names(model: nn.Module, layers: object) -> list[str]:
    return [place.name for place in places_of(model, layers)]  # type: ignore[arg-type]


def test_layers_have_indices_names_and_patterns() -> None:
    model = decoder(12)
    assert names(model, [4, -1]) == ["body.layers.4.mlp", "body.layers.11.mlp"]
    assert names(model, 2) == names(model, "body.layers.2") == names(model, "body.layers.2.mlp")
    assert names(model, "body.layers.[0-2].mlp") == [f"body.layers.{i}.mlp" for i in range(3)]
    assert names(model, "body.layers.*") == names(model, range(12))
    assert names(model, ["body.layers.3", 3, "*.3.mlp"]) == ["body.layers.3.mlp"], "each once"
    assert names(model, "*.layers.1.attn") == ["body.layers.1.attn"], "what is no feed-forward layer has a name too"
    (place,) = places_of(model, [1])
    assert getattr(place.parent, place.attribute) is place.module is model.get_submodule("body.layers.1.mlp")


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ({"anything": nn.Linear(4, 4)}, "anything"),
        ({"anything": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)}, "mlp"),
        ({"mlp": SelfAttention(4, 4), "dense": nn.Linear(4, 4), "act": nn.GELU()}, "dense"),
        ({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}, None),
        ({"norm2": nn.LayerNorm(4)}, None),
    ],
)
def test_a_feed_forward_layer_is_what_has_matrices_beside_attention(
    parts: dict[str, nn.Module], found: str | None
) -> None:
    (blocks,) = block_lists(Part(layers=nn.ModuleList([block(**parts)]))).values()
    assert blocks[0].ffn == (found and f"layers.0.{found}")


def test_lists_that_are_no_decoder_and_lists_in_blocks_are_left_out() -> None:
    experts = nn.ModuleList([block(mlp=nn.Linear(4, 4))])
    model = Part(
        layers=nn.ModuleList([block(mlp=Part(experts=experts))]),
        adapters=nn.ModuleList([nn.Linear(4, 4)]),
        mixers=nn.ModuleList([Part(norm=nn.LayerNorm(4), mixer=nn.Linear(4, 4))]),
    )
    assert list(block_lists(model)) == ["layers"]


def test_a_block_without_attention_among_others_has_none() -> None:
    mixed = nn.ModuleList([block(mlp=nn.Linear(4, 4)), Part(mixer=nn.Linear(4, 4), mlp=nn.Linear(4, 4))])
    assert names(Part(layers=mixed), 0) == ["layers.0.mlp"]
    with pytest.raises(InvalidRequest, match=r"block layers.1 has no feed-forward .* It has mixer, mlp: name"):
        places_of(Part(layers=mixed), 1)


def test_unknown_layers_are_told_what_there_is() -> None:
    for layers, message in (
        (3, r"no layer 3: body.layers has 3 blocks, 0 to 2"),
        ([0, -4], r"no layer -4: "),
        ("lm.*", r"no layer 'lm\.\*'\. Part has feed-forward layers body.layers.0.mlp, .*body.layers.2.mlp"),
        ([], r"names no layer\. Part has"),
        ([None], r"layer None is neither an index"),
        (1.5, r"layers = 1.5: give indices"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            places_of(decoder(), layers)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"body.layers.6.mlp, ... body.layers.39.mlp \(40 in all\)"):
        places_of(decoder(40), "nothing")
    two = Part(encoder=decoder(1), decoder=decoder(1))
    with pytest.raises(InvalidRequest, match=r"several lists of .*encoder.body.layers.0.mlp, decoder.body"):
        places_of(two, 0)
    assert names(two, "decoder.*.mlp") == ["decoder.body.layers.0.mlp"]
    with pytest.raises(InvalidRequest, match=r"no list of decoder blocks.* modules 0, 1"):
        places_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0)
    bare = Part(layers=nn.ModuleList([block(fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 4))]))
    with pytest.raises(InvalidRequest, match=r"Part has blocks layers.0, each of norm, attn, .*fc1, fc2"):
        places_of(bare, "mlp")
