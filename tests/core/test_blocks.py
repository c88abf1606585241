"""Which modules are the blocks."""

import copy
import re
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from helpers import arguments, assert_same, fitted
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    FunnelConfig,
    FunnelForSequenceClassification,
    Trainer,
)

from grape_hf import GrapeTrainer
from grape_hf.core.blocks import find_blocks
from grape_hf.core.parts import find_head
from grape_hf.engine.points import feedback_blocks

TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=99)


def tiny(kind: str) -> nn.Module:
    sizes = dict(TINY)
    if kind == "mixtral":
        sizes |= dict(num_key_value_heads=2, num_local_experts=2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpt2", "transformer.h"),
        ("llama", "model.layers"),
        ("gpt_neox", "gpt_neox.layers"),
        ("opt", "model.decoder.layers"),
        ("falcon", "transformer.h"),
        ("mamba", "backbone.layers"),
        ("mixtral", "model.layers"),  # its experts are lists inside the blocks
    ],
)
def test_blocks_are_found(kind, name):
    model = tiny(kind)
    assert list(find_blocks(model)) == [f"{name}.{i}" for i in range(3)]
    assert list(find_blocks(model).values()) == list(model.get_submodule(name))
    assert find_head(model) is model.get_output_embeddings()


def test_blocks_are_found_through_peft():
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    inner = "base_model.model.model.layers"
    assert list(find_blocks(model)) == [f"{inner}.{i}" for i in range(3)]
    assert list(find_blocks(model, "model.layers.0,model.layers.2")) == [f"{inner}.0", f"{inner}.2"]


def test_classifiers():
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=4))
    assert list(find_blocks(model)) == [f"bert.encoder.layer.{i}" for i in range(3)]
    assert find_head(model) is model.classifier


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2))


class Stage(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Block() for _ in range(number))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.ModuleDict({"layer": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))})
        self.document = nn.ModuleDict({"layer": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))})


def test_two_networks_of_one_class_are_refused():
    """Towers, and no blocks, although what is inside them are Sequentials."""
    model = nn.ModuleDict({f"tower_{i}": timm.create_model("resnet10t") for i in range(2)})
    with pytest.raises(ValueError, match="several lists"):
        find_blocks(model)


def test_two_towers_are_refused_until_one_is_named():
    model = TwoTowers()
    with pytest.raises(
        ValueError, match=r"query.layer \(3 x Sequential\), document.layer \(2 x Sequential\).*Name one"
    ):
        find_blocks(model)
    assert list(find_blocks(model, "document.layer")) == ["document.layer.0", "document.layer.1"]


@pytest.mark.parametrize("listed", [True, False])
def test_what_is_proposed_is_the_whole_chain(listed):
    """A backbone's stages are lists in a list, or attributes; a decode head beside it is nearly as large."""
    stages = [nn.ModuleDict({"layers": nn.ModuleList([Block()])}) for _ in range(3)]
    backbone = nn.ModuleDict({"stages": nn.ModuleList(s.layers for s in stages)} if listed else {})
    if not listed:
        backbone.update({f"s{i}": Stage(1) for i in range(3)})
    model = nn.ModuleDict({"backbone": backbone, "head": nn.ModuleDict({"convs": nn.ModuleList([Block(), Block()])})})
    with pytest.raises(ValueError, match="several lists") as refused:
        find_blocks(model)
    proposed = re.search('blocks="(.*?)"', str(refused.value))[1]
    assert proposed == ",".join(f"backbone.stages.{i}" if listed else f"backbone.s{i}.steps" for i in range(3))
    found = find_blocks(model, proposed)
    assert len(found) == 3
    assert all(name.startswith("backbone") for name in found)


def test_a_small_side_list_does_not_matter():
    model = TwoTowers()
    model.document.layer = nn.ModuleList([nn.Sequential(nn.Linear(2, 1))])
    assert list(find_blocks(model)) == [f"query.layer.{i}" for i in range(3)]


def test_what_cannot_be_found_is_said():
    with pytest.raises(ValueError, match="found no blocks in Linear.*blocks="):
        find_blocks(nn.Linear(2, 2))
    model = tiny("gpt2")
    with pytest.raises(ValueError, match=r"'transformer.layers' does not exist.*transformer.h \(3 x GPT2Block\)"):
        find_blocks(model, "transformer.layers")
    with pytest.raises(ValueError, match="'former.h' does not exist"):
        find_blocks(model, "former.h")
    with pytest.raises(ValueError, match="'mlp' stands for several modules: transformer.h.0.mlp"):
        find_blocks(model, "mlp")
    with pytest.raises(ValueError, match="transformer.drop .Dropout. has no parameters"):
        find_blocks(model, "transformer.drop")
    with pytest.raises(ValueError, match='ModuleList has none.*feedback_space="hidden"'):
        find_head(nn.ModuleList([nn.Linear(2, 2)]))


@pytest.mark.parametrize("joined", ["list", "attributes"])
def test_a_list_is_never_a_block(joined):
    """Nobody calls a ModuleList: those of stages are gone through, in a list of lists or as attributes."""
    if joined == "list":
        model = nn.ModuleDict({"stages": nn.ModuleList([Stage(1).steps, Stage(2).steps])})
        assert list(find_blocks(model)) == ["stages.0.0", "stages.1.0", "stages.1.1"]
    else:
        model = nn.ModuleDict({"first": Stage(1), "second": Stage(2)})
        assert list(find_blocks(model)) == ["first.steps.0", "second.steps.0", "second.steps.1"]


def test_a_transformers_model_with_a_list_of_lists():
    config = FunnelConfig(block_sizes=[1, 2], num_decoder_layers=1, d_model=16, n_head=2, d_inner=32, vocab_size=99)
    model = FunnelForSequenceClassification(config)
    assert list(find_blocks(model)) == [f"funnel.encoder.blocks.{place}" for place in ("0.0", "1.0", "1.1")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # What stands behind the blocks of a stage joins their output with what came around them.
        ("cspresnet50", [f"stages.{i}" for i in range(4)]),
        (
            "hgnetv2_b0",
            [f"stages.{place}" for place in ("0.blocks.0", "1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0")],
        ),
        ("crossvit_tiny_240", [f"blocks.{i}" for i in range(3)]),
        # A step down in size behind them joins nothing.
        ("fasternet_t0", ["stages.0.blocks.0", *(f"stages.1.blocks.{i}" for i in range(2)), "stages.2.blocks.0"]),
        # A Sequential with a forward of its own is no chain.
        ("rdnet_tiny", ["dense_stages.0.0", *(f"dense_stages.{i}" for i in range(1, 7))]),
        # Attributes of one class are blocks, numbered ones a stage's, and parallel branches neither.
        (
            "inception_v3",
            ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "Mixed_5b"],
        ),
        ("regnetx_002", ["s1.b1", "s2.b1", "s3.b1", "s3.b2"]),
    ],
)
def test_stages_of_timm(name, expected):
    model = timm.create_model(name, num_classes=2)
    assert list(find_blocks(model))[: len(expected)] == expected


def maxvit() -> nn.Module:
    return torchvision.models.MaxVit((64, 64), 8, 2, [8, 8, 8, 8], [1, 1, 2, 1], 8, 0.0, num_classes=3)


def googlenet(aux_logits: bool = False) -> nn.Module:
    return torchvision.models.GoogLeNet(num_classes=3, aux_logits=aux_logits, init_weights=False)


INCEPTIONS = ["conv1", "conv2", "conv3", *(f"inception{n}" for n in ("3a", "3b", "4a", "4b", "4c", "4d", "4e"))]
LAYERS = ["layers.MBconv", "layers.window_attention", "layers.grid_attention"]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        # A residual block whose shortcut has another name is no stage.
        (
            maxvit,
            [f"blocks.{i}.layers.{j}.{name}" for i, n in enumerate((1, 1, 2, 1)) for j in range(n) for name in LAYERS],
        ),
        # Branches are no chains.
        (googlenet, [*INCEPTIONS, "inception5a", "inception5b"]),
        (lambda: googlenet(aux_logits=True), [*INCEPTIONS, "inception5a", "inception5b"]),
    ],
    ids=["maxvit", "googlenet", "googlenet-auxiliary"],
)
def test_networks_of_torchvision(build, expected):
    assert list(find_blocks(build())) == expected


@pytest.mark.parametrize("name", ["layers", "blocks"])
def test_a_number_of_layers_is_no_list(name):
    """A block may count its layers under the name that lists of blocks have."""
    model = nn.ModuleDict({"stages": nn.ModuleList([Residual() for _ in range(3)])})
    for block in model.stages:
        setattr(block, name, 2)
    assert list(find_blocks(model)) == [f"stages.{i}" for i in range(3)]


def test_looking_changes_nothing():
    model = tiny("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_blocks(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)


def test_a_model_may_be_the_list_of_its_blocks(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), Residual(), Residual(), Residual(), nn.Linear(2, 1))
    assert list(find_blocks(model)) == ["1", "2", "3"]
    assert list(find_blocks(Residual().branch)) == ["1", "2"]  # each weight with what follows it, by its last part
    network = nn.ModuleDict({"features": nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(3)))})
    found = find_blocks(nn.Sequential(network, Residual()))  # nothing is alike here: a network, and its head
    assert list(found) == [f"0.features.{i}" for i in range(3)]

    class OfOutputs(GrapeTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: object) -> Tensor:
            return model(inputs["x"]).square().mean()

    args = arguments(tmp_path, max_steps=2, remove_unused_columns=False, label_names=[])
    trainer = OfOutputs(model, args, train_dataset=[{"x": torch.randn(2)} for _ in range(8)])
    before = model[2].branch[0].weight.detach().clone()
    trainer.train()
    assert not torch.equal(model[2].branch[0].weight, before)


def test_what_stands_before_the_first_weights_of_a_plain_stack_belongs_to_its_first_block():
    stack = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    units = list(find_blocks(nn.Sequential(stack, nn.Linear(2, 2)), "0").values())
    assert [[type(part).__name__ for part in unit] for unit in units] == [
        ["Flatten", "Linear", "ReLU"],
        ["Linear", "ReLU"],
        ["Linear"],
    ]


def test_a_unit_ends_before_what_stands_at_other_places_too():
    """One ReLU for all is common, and its hooks could not tell at which place it runs."""
    relu = nn.ReLU()
    stack = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), relu, nn.MaxPool2d(2), relu),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), relu, relu),
        *(nn.Conv2d(4, 4, 3), relu, nn.Flatten(), nn.Linear(4, 2)),
    )
    for model, blocks, prefix in (
        (stack, None, ""),
        (nn.Sequential(stack), None, "0."),
        (nn.Sequential(stack), "0", "0."),
    ):
        units = find_blocks(model, blocks)
        assert list(units) == [f"{prefix}{place}" for place in (2, 5, 10, 11)]
        assert [len(unit) for unit in units.values()] == [3, 2, 3, 1]


def test_one_layer_with_weights_at_several_places_of_a_plain_stack_is_refused():
    shared = nn.Linear(4, 4)
    stack = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2))
    for blocks in (None, "0"):
        with pytest.raises(ValueError, match="one Linear stands at several places of a plain stack"):
            find_blocks(nn.Sequential(stack), blocks)


@pytest.mark.parametrize(
    "shared", [nn.ReLU(), nn.ReLU(inplace=True), nn.BatchNorm2d(4)], ids=["relu", "inplace", "norm"]
)
def test_a_plain_stack_with_one_module_at_several_places_trains(shared, tmp_path):
    """With as many sweeps as points it is backpropagation."""
    rows = [{"x": torch.randn(3, 6, 6), "labels": i % 2} for i in range(8)]

    def build() -> nn.Module:
        module = copy.deepcopy(shared)
        convolutions = [nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4)]
        layers = [layer for convolution in convolutions for layer in (convolution, module)]
        return PlainStack(nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 2)))

    swept = fitted(build, rows, tmp_path, feedback_sweeps=3, feedback_points=3)
    assert_same(swept, fitted(build, rows, tmp_path, Trainer), rtol=1e-5, atol=1e-6)


class Layers(nn.Module):
    """The network of many tutorials: layers are attributes, what is between them is in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper, self.readout = (
            nn.LSTM(196, 6, batch_first=True),
            nn.GRU(6, 6, batch_first=True),
            nn.Linear(6, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lower(x.flatten(2))  # (batch, steps, pixels)
        h, _ = self.upper(h)
        return self.readout(h[:, -1])


@pytest.mark.parametrize(
    ("net", "blocks"),
    [(Layers, ["conv1", "conv2", "fc1", "fc2"]), (Recurrent, ["lower", "upper", "readout"])],
)
def test_layers_that_are_attributes_are_blocks(net, blocks, tmp_path):
    """With as many sweeps as points they are backpropagation."""
    assert list(find_blocks(PlainStack(net()))) == [f"net.{name}" for name in blocks]
    rows = [{"x": torch.randn(3, 14, 14), "labels": i % 2} for i in range(8)]
    swept = fitted(lambda: PlainStack(net()), rows, tmp_path, feedback_sweeps=3)
    assert_same(swept, fitted(lambda: PlainStack(net()), rows, tmp_path, Trainer), rtol=1e-5, atol=1e-6)


class SequenceFirst(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        self.lower.batch_first = self.upper.batch_first = False
        h, _ = self.lower(x.flatten(2).movedim(1, 0))  # (steps, batch, pixels)
        h, _ = self.upper(h)
        return self.readout(h[-1])


def test_where_the_batch_is_not_first_blocks_of_one_layout_are_asked_for(tmp_path):
    rows = [{"x": torch.randn(3, 14, 14), "labels": i % 2} for i in range(8)]
    args = arguments(tmp_path, max_steps=1, feedback_space="hidden")
    with pytest.raises(RuntimeError, match=r"at y \(4\), found \[3, 4\].*name those alone with the option `blocks`"):
        GrapeTrainer(PlainStack(SequenceFirst()), args, train_dataset=rows).train()
    args = arguments(tmp_path, max_steps=1, blocks="net.lower,net.upper")
    GrapeTrainer(PlainStack(SequenceFirst()), args, train_dataset=rows).train()


def test_layers_above_the_rest_of_a_network_are_not_taken_for_all_of_it():
    model = PlainStack(Layers())
    model.net.body = nn.Bilinear(40, 40, 40)
    with pytest.raises(ValueError, match="found no blocks"):
        find_blocks(model)


class PlainStack(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(x), labels)}


def test_a_dict_that_is_named_stands_for_its_items():
    model = nn.Module()
    model.layers = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    assert list(find_blocks(model, "layers").items()) == [
        ("layers.first", model.layers.first), ("layers.second", model.layers.second)
    ]  # fmt: skip


class Steps(nn.Module):
    """Blocks in a list that is called ``layers``, and how they are run."""

    def __init__(self, layers: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(4, width), layers, nn.Linear(width, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.stem(x)
        for step in self.layers:
            for part in step if isinstance(step, nn.ModuleList) else [step]:
                h = torch.tanh(part(h)) if isinstance(part, nn.Linear) else part(h)
        return {"loss": F.cross_entropy(self.head(h), labels)}


class Raw(nn.Module):
    """A block whose weights are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(sizes) / 4) for sizes in ((6, 8), (8, 6)))

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(h @ self.up) @ self.down


class Whole(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


LISTS: dict[str, tuple[Callable[[], nn.Module], str | None, list[str]]] = {
    "raw": (lambda: nn.ModuleList(Raw() for _ in range(4)), None, [f"layers.{i}" for i in range(4)]),
    "raw-sequential": (lambda: nn.Sequential(*(Raw() for _ in range(4))), None, [f"layers.{i}" for i in range(4)]),
    "plain": (
        lambda: nn.ModuleList(nn.Linear(6, 6) for _ in range(4)),
        None,
        ["stem", *(f"layers.{i}" for i in range(4)), "head"],
    ),
    "lists": (
        lambda: nn.ModuleList(nn.ModuleList([Whole(), Whole()]) for _ in range(2)),
        "layers",
        [f"layers.{place}" for place in ("0.0", "0.1", "1.0", "1.1")],
    ),
}


@pytest.mark.parametrize("kind", LISTS)
def test_what_stands_in_a_list_trains(kind, tmp_path):
    """Blocks whose weights are their own, plain layers, and lists in a list, as it is found and as it is named."""
    build, named, expected = LISTS[kind]
    assert list(find_blocks(Steps(build()), named)) == expected
    rows = [{"x": torch.randn(4), "labels": i % 3} for i in range(12)]
    swept = fitted(lambda: Steps(build()), rows, tmp_path, feedback_sweeps=len(expected) - 1, blocks=named)
    assert_same(swept, fitted(lambda: Steps(build()), rows, tmp_path, Trainer), rtol=1e-5, atol=1e-6)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))


def test_what_is_no_block_is_not_taken_from_a_list():
    """Heads side by side, norms, and a block with weights of its own that is there once."""
    model = Steps(nn.ModuleList(Whole() for _ in range(3)))
    model.heads = nn.ModuleList(nn.Linear(6, 300) for _ in range(4))
    model.norms = nn.ModuleList(Scale() for _ in range(400))
    assert list(find_blocks(model)) == [f"layers.{i}" for i in range(3)]
    model = Steps(nn.Sequential(Whole(), Whole(), Scale(), Scale(), Raw()))
    assert list(find_blocks(model)) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("late", [True, False])
def test_plain_layers_in_a_list_join_those_that_are_attributes_where_sizes_fit(late):
    """Heads side by side make no input of one another, nor does what was registered before the list and runs last."""
    model = nn.Module()
    model.first = nn.Linear(4, 8)
    if late:
        model.second, model.heads = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 2)])
        assert list(find_blocks(model)) == ["first", "second"]
    else:
        model.last, model.hidden = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        assert list(find_blocks(model)) == [f"hidden.{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("blocks", "points", "ends"),
    [(9, 0, range(1, 10)), (9, 1, (4, 9)), (9, 2, (3, 6, 9)), (9, 8, range(1, 10)), (3, 1, (1, 3)), (1, 1, (1,))],
)
def test_feedback_points_are_evenly_spaced(blocks, points, ends):
    named = {f"h_{i}": nn.Identity() for i in range(1, blocks + 1)}
    kept = feedback_blocks(named, points)
    assert list(kept) == [f"h_{end}" for end in ends]
    assert all(block is named[name] for name, block in kept.items())
