"""Tiny random models of many architectures, as data: what ``architectures.py`` and the tests run through.

An entry names a family of transformers by its ``model_type``, or one of timm, the head that is put on it, and what its
config needs beyond the common sizes: three blocks of width 16 where the family leaves the choice. Samples are drawn
from a seed: walks through a vocabulary, or images with a bright quadrant.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

VOCABULARY, POSITIONS, TARGETS, WIDTH, BLOCKS, CLASSES, SIDE = 31, 8, 6, 16, 3, 4, 32

Batch = dict[str, Tensor]  # or a single sample


@dataclass(frozen=True)
class TinyModel:
    """One architecture.

    Args:
        kind: what it is for, a key of ``HEADS``; ``timm`` is an image classifier through ``image_classifier``.
        family: ``model_type`` in transformers, or the name in timm.
        options: what its config needs, over the common sizes; None for a size that it must not have.
        variant: tells two entries of one family apart.
        refused: a part of what the refusal says, where direct feedback is none.
    """

    kind: str
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    refused: str = ""

    @property
    def name(self) -> str:
        """Name of the row, and of the test."""
        return "-".join(filter(None, (self.kind, self.family, self.variant)))

    @property
    def enough(self) -> int:
        """How many samples have enough errors to fit a feedback matrix to them."""
        return 16 if self.kind in ("vision", "timm") else 64

    @property
    def auto_class(self) -> Any:
        """The class of transformers whose ``from_pretrained`` opens what was saved."""
        return getattr(transformers, HEADS[self.kind])

    @property
    def jumps(self) -> bool:
        """Whether routers choose between experts: a finite difference across a choice is no derivative."""
        return "num_experts_per_tok" in self.options

    def build(self, seed: int = 0) -> nn.Module:
        """Make the model with random weights; the global random state stays as it is."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self._build()
            # A branch or a head that starts from zero hides what is behind it, and leaves ReLUs at their kink.
            for p in (p for p in model.parameters() if not p.any()):
                nn.init.normal_(p, std=_SCALE)
            return model

    def _build(self) -> nn.Module:
        if self.kind == "timm":
            from grape_hf.vision.classifier import image_classifier

            return image_classifier(self.family, [f"class {i}" for i in range(CLASSES)], **self.options)
        sizes = _SIZES[self.kind] | dict(self.options)
        config = AutoConfig.for_model(self.family, **{name: size for name, size in sizes.items() if size is not None})
        return self.auto_class.from_config(config)

    def samples(self, number: int, seed: int = 0) -> list[Batch]:
        """Draw samples with labels, the first ones the same for any number."""
        generator = torch.Generator().manual_seed(seed)
        return [self._sample(generator) for _ in range(number)]

    def _sample(self, generator: torch.Generator) -> Batch:
        if self.kind in ("vision", "timm"):
            label = torch.randint(CLASSES, (), generator=generator)
            side = self.options.get("img_size", self.options.get("image_size", SIDE))
            pixels = 0.5 * torch.randn(3, side, side, generator=generator)
            row, column, half = int(label) // 2, int(label) % 2, side // 2
            pixels[:, row * half : (row + 1) * half, column * half : (column + 1) * half] += 1
            return {"pixel_values": pixels, "labels": label}
        ids = _walk(generator, POSITIONS)
        if self.kind == "classifier":
            return {"input_ids": ids, "labels": ids[0] % CLASSES}
        if self.kind == "masked":
            masked = torch.rand(POSITIONS, generator=generator) < 0.4
            masked[0] = True
            return {"input_ids": ids.masked_fill(masked, 1), "labels": ids.masked_fill(~masked, -100)}
        if self.kind == "encoder-decoder":
            return {"input_ids": ids, "labels": ids.flip(0)[:TARGETS]}
        return {"input_ids": ids, "labels": ids.clone()}


def _walk(generator: torch.Generator, length: int) -> Tensor:
    """A walk in small steps through the vocabulary but for its first two entries, padding and mask."""
    start = torch.randint(VOCABULARY, (1,), generator=generator)
    steps = torch.randint(1, 4, (length,), generator=generator)
    return 2 + (start + steps.cumsum(0)) % (VOCABULARY - 2)


HEADS = {
    "decoder": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "vision": "AutoModelForImageClassification",
    "timm": "AutoModelForImageClassification",
}

_SPECIAL = dict(pad_token_id=0, bos_token_id=2, eos_token_id=2)
# By all the names that families have for it.
_NO_DROPOUT = dict(
    dropout=0.0,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    dropout_rate=0.0,
    activation_dropout=0.0,
    drop_path_rate=0.0,
    seq_classif_dropout=0.0,
)
# Large enough for blocks to do something: with 0.02 and this width every block is close to the identity.
_SCALE = 0.2
_TEXT = dict(
    vocab_size=VOCABULARY,
    initializer_range=_SCALE,
    hidden_size=WIDTH,
    intermediate_size=2 * WIDTH,
    num_hidden_layers=BLOCKS,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=WIDTH // 2,
    max_position_embeddings=2 * POSITIONS,
)
_SIZES: dict[str, dict[str, Any]] = {
    "decoder": _TEXT | _SPECIAL | _NO_DROPOUT,
    "masked": _TEXT | _SPECIAL | _NO_DROPOUT,
    "classifier": _TEXT | _SPECIAL | _NO_DROPOUT | dict(num_labels=CLASSES),
    "encoder-decoder": dict(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        init_std=_SCALE,
        **_SPECIAL,
        **_NO_DROPOUT,
        decoder_start_token_id=0,
        max_position_embeddings=2 * POSITIONS,
    ),
    "vision": dict(num_labels=CLASSES, image_size=SIDE, initializer_range=_SCALE, **_NO_DROPOUT),
}
_BART = dict(
    encoder_layers=2,
    decoder_layers=3,
    encoder_ffn_dim=2 * WIDTH,
    decoder_ffn_dim=2 * WIDTH,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    forced_eos_token_id=None,
)
_T5 = dict(num_layers=2, num_decoder_layers=3, num_heads=2, d_kv=8, d_ff=2 * WIDTH)
_EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=WIDTH)
_ROUTER_LOSS = _EXPERTS | dict(output_router_logits=True, router_aux_loss_coef=0.1)
_SMALL = dict(img_size=SIDE)
_VIT = dict(
    hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=2, patch_size=8
)
_STAGES = dict(depths=[1, 2], hidden_sizes=[8, 16], num_stages=2, embedding_size=8)


def _each(kind: str, *plain: str, **special: dict[str, Any]) -> list[TinyModel]:
    """Entries of one kind: families that need nothing, then families with their options."""
    return [TinyModel(kind, family) for family in plain] + [TinyModel(kind, *pair) for pair in special.items()]


MODELS: list[TinyModel] = [
    *_each(
        "decoder",
        "gpt2",
        "gpt_neox",
        "gpt_bigcode",
        "bloom",
        "biogpt",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "stablelm",
        "starcoder2",
        "granite",
        "cohere",
        "cohere2",
        "olmo",
        "olmo2",
        "smollm3",
        "glm4",
        "nemotron",
        "persimmon",
        "helium",
        gpt_neo=dict(attention_types=[[["global"], 3]], num_layers=BLOCKS, num_heads=2),
        gptj=dict(rotary_dim=4),
        codegen=dict(num_attention_heads=4, rotary_dim=4),
        opt=dict(ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH),
        mpt=dict(expansion_ratio=2),
        falcon=dict(head_dim=None),
        mixtral=_EXPERTS,
        qwen2_moe=_EXPERTS | dict(shared_expert_intermediate_size=WIDTH),
        qwen3_moe=_EXPERTS,
        olmoe=_EXPERTS,
        granitemoe=_EXPERTS,
        gpt_oss=_EXPERTS,
        deepseek_v3=dict(
            num_key_value_heads=2,
            head_dim=4,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=WIDTH,
            first_k_dense_replace=1,
        ),
        mamba=dict(state_size=4),
        mamba2=dict(state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
        falcon_mamba=dict(state_size=4),
        recurrent_gemma=dict(lru_width=WIDTH, block_types=["recurrent", "recurrent", "attention"]),
        rwkv=dict(attention_hidden_size=WIDTH, context_length=POSITIONS, use_cache=False),
        qwen3_next=_EXPERTS
        | dict(
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            shared_expert_intermediate_size=WIDTH,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
    ),
    TinyModel(
        "decoder",
        "gemma3n_text",
        dict(
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
            laurel_rank=4,
            num_kv_shared_layers=0,
            activation_sparsity_pattern=[0.0] * BLOCKS,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        refused="Blocks that stack several streams",
    ),
    *(TinyModel("decoder", family, _ROUTER_LOSS, "router-loss") for family in ("mixtral", "qwen3_moe")),
    *_each("masked", "bert", "roberta", "electra", "mpnet", "deberta-v2", "modernbert"),
    *_each("masked", distilbert=dict(hidden_dim=2 * WIDTH), albert=dict(embedding_size=WIDTH)),
    *_each("classifier", "bert", "roberta", "electra", "modernbert", "gpt2", distilbert=dict(hidden_dim=2 * WIDTH)),
    *_each("encoder-decoder", t5=_T5, mt5=_T5, bart=_BART, mbart=_BART, marian=_BART, pegasus=_BART, m2m_100=_BART),
    *_each("vision", vit=_VIT, dinov2=_VIT, beit=_VIT, vit_msn=_VIT),
    *_each("vision", deit=_VIT | dict(architectures=["DeiTForImageClassification"])),
    *_each("vision", convnext=_STAGES, convnextv2=_STAGES, resnet=_STAGES, regnet=_STAGES | dict(groups_width=4)),
    TinyModel("vision", "resnet", _STAGES | dict(layer_type="basic"), "basic"),
    *_each("vision", swin=dict(embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=2, patch_size=4)),
    *_each("timm", "resnet10t", "densenet121", "efficientnet_b0", "mobilenetv3_small_050", "regnetx_002", "repvgg_a0"),
    *_each("timm", "convnext_atto", "inception_next_atto", "pvt_v2_b0", "mobilevit_xxs", "edgenext_xx_small"),
    *_each("timm", "poolformer_s12", "ghostnet_050", gmixer_12_224=_SMALL, xcit_nano_12_p16_224=_SMALL),
    *_each("timm", vit_tiny_patch16_224=_SMALL | dict(depth=BLOCKS, embed_dim=24)),
    *_each("timm", swin_tiny_patch4_window7_224=_SMALL | dict(window_size=4, embed_dim=12)),
    *_each("timm", "cspresnet50", "hgnetv2_b0", "rdnet_tiny"),  # their stages join what came around their blocks
]
